"""Ports, GPUs and Python of a host, from a /proc written by the test and output recorded from nvidia-smi."""

from __future__ import annotations

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _host

#: /proc/net/tcp and tcp6 as Linux 6.1 writes them; 1F41 is 8001, 1F42 is 8002, 0A is LISTEN.
HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
ROW = "   0: {local} {remote} {state} 00000000:00000000 00:00000000 00000000  {uid:4d}  0 {inode} 1 0 100 0 0 10 0\n"
FIRST, SECOND = "GPU-5d1c1f36-9b2f-4a45-8c0a-3f1e6f0a0001", "GPU-5d1c1f36-9b2f-4a45-8c0a-3f1e6f0a0002"
PORTS = {"primary": 8001, "secondary": 8002}


class FakeProc:
    """A /proc in which processes listen. IPv4 and IPv6 have a table each."""

    def __init__(self, path):
        self.path = path
        (path / "net").mkdir()
        (path / "self").mkdir()
        self.tables = {"tcp": HEAD, "tcp6": HEAD}
        self.write()

    def write(self):
        for name, text in self.tables.items():
            (self.path / "net" / name).write_text(text)

    def socket(self, port, inode, uid=0, table="tcp", state="0A"):
        local = ("0" * 32 if table == "tcp6" else "0100007F") + f":{port:04X}"
        remote = "0" * (32 if table == "tcp6" else 8) + ":0000"
        self.tables[table] += ROW.format(local=local, remote=remote, state=state, uid=uid, inode=inode)
        self.write()

    def process(self, pid, comm, cgroup, *inodes):
        (self.path / str(pid) / "fd").mkdir(parents=True)
        (self.path / str(pid) / "comm").write_text(comm + "\n")
        (self.path / str(pid) / "cgroup").write_text(f"0::{cgroup}\n")
        (self.path / str(pid) / "fd/0").symlink_to("/dev/null")
        for number, inode in enumerate(inodes, 3):
            (self.path / str(pid) / f"fd/{number}").symlink_to(f"socket:[{inode}]")

    def foreign(self, own_uid=None):
        return _host.foreign_listeners(PORTS, own_uid, str(self.path))


@pytest.fixture
def proc(tmp_path):
    return FakeProc(tmp_path)


SERVICES = [
    {"name": "vllm_gateway_port", "port": 8000, "unit": "vllm-gateway.service", "uid": 102},
    {"name": "vllm_health_agent_port", "port": 8403, "unit": "vllm-health.service", "uid": 0},
]


def test_a_service_keeps_its_port_and_another_program_is_named_with_the_variable(proc):
    proc.process(412, "haproxy", "/system.slice/vllm-gateway.service", 90)
    proc.socket(8000, 90)
    assert _host.taken_ports(SERVICES, str(proc.path)) == []
    proc.process(413, "haproxy", "/system.slice/haproxy.service", 91)
    proc.socket(8403, 91)
    assert _host.taken_ports(SERVICES, str(proc.path)) == [
        "port 8403 (vllm_health_agent_port) is taken by haproxy (process 413, haproxy.service): "
        "stop it, or set another port"
    ]


def test_a_service_that_cannot_be_told_is_judged_by_its_user(proc):
    proc.socket(8000, 90, uid=102)
    proc.socket(8403, 91, uid=33)
    (error,) = _host.taken_ports(SERVICES, str(proc.path))
    assert error.startswith("port 8403 (vllm_health_agent_port) is taken by a program of user 33 that cannot be told")


def test_free_ports_are_fine(proc):
    proc.process(7, "sshd", "/system.slice/ssh.service", 70)
    proc.socket(22, 70)
    assert proc.foreign() == []


@pytest.mark.parametrize("table", ["tcp", "tcp6"])
def test_a_foreign_program_is_named(proc, table):
    proc.process(412, "nginx", "/system.slice/nginx.service", 90)
    proc.socket(8001, 90, table=table)
    assert proc.foreign() == [
        "port 8001 of instance primary is taken by nginx (process 412, nginx.service): stop it, or declare another port"
    ]


def test_a_program_without_a_service_is_named_without_one(proc):
    proc.process(412, "python3", "/user.slice/user-0.slice/session-1.scope", 90)
    proc.socket(8002, 90)
    (error,) = proc.foreign()
    assert error.startswith("port 8002 of instance secondary is taken by python3 (process 412): ")


def test_our_own_engine_is_no_stranger(proc):
    proc.process(500, "vllm", "/system.slice/system-vllm.slice/vllm@primary.service", 91)
    proc.socket(8001, 91, uid=998)
    assert proc.foreign() == []


def test_a_program_that_can_be_told_is_judged_by_its_unit_whatever_its_user(proc):
    proc.process(500, "nc", "/system.slice/cron.service", 91)
    proc.socket(8001, 91, uid=998)
    assert len(proc.foreign(own_uid=998)) == 1


def test_a_connection_is_no_listener(proc):
    proc.socket(8001, 92, state="01")
    assert proc.foreign() == []


def test_a_process_that_cannot_be_told_is_judged_by_its_user(proc):
    proc.socket(8001, 93, uid=998)
    assert proc.foreign(own_uid=998) == []
    assert proc.foreign(own_uid=None) == [
        "port 8001 of instance primary is taken by a program of user 998 that cannot be told from here "
        "(container, other namespace): stop it, or declare another port"
    ]


def test_a_process_that_vanishes_meanwhile_is_passed_over(proc):
    (proc.path / "300").mkdir()  # no fd: it ended between the listing and the look
    proc.process(412, "nginx", "/system.slice/nginx.service", 90)
    proc.socket(8001, 90)
    assert "nginx" in proc.foreign()[0]


def test_a_file_that_is_closed_meanwhile_hides_nothing(proc, monkeypatch):
    proc.process(412, "nginx", "/system.slice/nginx.service", 90)
    proc.socket(8001, 90)
    listdir = _host.os.listdir
    closed = {f"{proc.path}/412/fd": ["99"]}
    monkeypatch.setattr(_host.os, "listdir", lambda path: closed.get(path, []) + listdir(path))
    assert "nginx" in proc.foreign()[0]


def test_a_host_without_ipv6_has_no_table_for_it(proc):
    (proc.path / "net/tcp6").unlink()
    proc.process(412, "nginx", "/system.slice/nginx.service", 90)
    proc.socket(8001, 90)
    (proc.path / "net/tcp6").unlink()
    assert len(proc.foreign()) == 1


def test_only_the_ports_asked_for_are_returned_in_order(proc):
    proc.process(412, "nginx", "/", 90, 91, 92)
    for port, inode in ((8002, 90), (8001, 91), (443, 92)):
        proc.socket(port, inode)
    assert [(found.port, found.pid) for found in _host.listeners([8001, 8002], str(proc.path))] == [
        (8001, 412),
        (8002, 412),
    ]


@pytest.mark.parametrize(
    ("declared", "uuids"),
    [
        ({"primary": [0], "secondary": [1]}, {"primary": [FIRST], "secondary": [SECOND]}),
        ({"primary": [1, 0]}, {"primary": [SECOND, FIRST]}),
        ({"primary": [SECOND]}, {"primary": [SECOND]}),
        ({"primary": []}, {"primary": []}),
    ],
)
def test_declared_gpus_become_uuids(declared, uuids):
    assert _host.match_gpus(declared, {0: FIRST, 1: SECOND}) == (uuids, [])


@pytest.mark.parametrize("gpu", [2, "GPU-00000000-0000-0000-0000-000000000000"])
def test_a_gpu_that_is_not_there_is_told_with_what_is(gpu):
    _, errors = _host.match_gpus({"primary": [gpu]}, {0: FIRST, 1: SECOND})
    have = f"the host has 0 ({FIRST}), 1 ({SECOND})"
    assert errors == [f"GPU {gpu} of instance primary is not there: {have}"]


def test_a_host_without_gpus_has_none():
    assert _host.match_gpus({"primary": [0]}, {})[1] == ["GPU 0 of instance primary is not there: the host has none"]


def test_a_gpu_by_index_and_by_uuid_is_the_same_gpu():
    found, errors = _host.match_gpus({"primary": [0], "secondary": [FIRST]}, {0: FIRST, 1: SECOND})
    assert (found, errors) == ({"primary": [FIRST], "secondary": [FIRST]}, [])


def test_a_gpu_twice_in_one_instance_is_told():
    _, errors = _host.match_gpus({"primary": [0, FIRST]}, {0: FIRST, 1: SECOND})
    assert errors == [f"GPU {FIRST} of instance primary is {FIRST}, which it has already: name each GPU once"]


@pytest.mark.parametrize("version", ["3.11.2", "3.12.0", "3.13.9"])
def test_pythons_that_can(version):
    assert _host.python_complaint(version, "/usr/bin/python3") == ""


@pytest.mark.parametrize(
    ("version", "found"),
    [
        ("3.10.12", "is Python 3.10.12"),
        ("3.14.0", "is Python 3.14.0"),
        ("3.9.2", "is Python 3.9.2"),
        ("", "is not there"),
    ],
)
def test_pythons_that_cannot(version, found):
    assert _host.python_complaint(version, "/usr/bin/python3") == (
        f"vllm_python is /usr/bin/python3, which {found}: wanted 3.11, 3.12 or 3.13"
    )

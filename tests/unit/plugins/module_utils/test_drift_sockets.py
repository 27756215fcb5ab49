"""Listening sockets, real and recorded, and the clock."""

from __future__ import annotations

import os
import socket

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _drift_sockets as sockets
from ansible_collections.nvl.vllm.plugins.module_utils._drift_kinds import Report
from ansible_collections.nvl.vllm.plugins.module_utils._drift_sockets import Door, Socket

PRIMARY, GATEWAY = "vllm@primary.service", "vllm-gateway.service"
#: From a host with an engine on 8001 (any address), statistics on loopback, and a port that the kernel picked.
TABLE = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 3500580A:AA83 00000000:0000 0A 00000000:00000000 00:00000000 00000000   999        0 7262213 1 0 100 0 0 10 0
   1: 0100007F:20D4 00000000:0000 0A 00000000:00000000 00:00000000 00000000   102        0 7258118 1 0 100 0 1 10 0
   2: 00000000:1F41 00000000:0000 0A 00000000:00000000 00:00000000 00000000   999        0 7261351 1 0 100 0 0 10 0
   3: 0100007F:1F41 0100007F:C350 01 00000000:00000000 00:00000000 00000000   999        0 7261399 1 0 100 0 0 10 0
"""
TABLE6 = """\
  sl  local_address                         remote_address                        st tx rx
   0: 00000000000000000000000000000000:0016 00000000000000000000000000000000:0000 0A 0:0 00:0 0 0 0 7054823 1 0
   1: 0000000000000000FFFF00000100007F:0050 00000000000000000000000000000000:0000 0A 0:0 00:0 0 0 0 7054824 1 0
   2: 000080FE00000000FF565002BD69B1FE:0051 00000000000000000000000000000000:0000 0A 0:0 00:0 0 0 0 7054825 1 0
"""
USERS = {999: "vllm", 102: "haproxy"}
PASSING = range(32768, 61000)


def compare(found, doors=(), units=(PRIMARY, GATEWAY)):
    report = Report("runtime")
    sockets.compare_sockets(found, doors, units, USERS, 999, PASSING, report)
    return [(item["kind"], item["where"]) for item in report.findings]


def test_tables_are_read():
    found = [(str(item), item.uid) for item in sockets.parse_table(TABLE).values()]
    assert found == [("10.88.0.53:43651", 999), ("127.0.0.1:8404", 102), ("0.0.0.0:8001", 999)]
    found = [str(item) for item in sockets.parse_table(TABLE6).values()]
    assert found == ["[::]:22", "127.0.0.1:80", "[fe80::250:56ff:feb1:69bd]:81"]


def test_a_real_socket_and_its_process_are_found():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (found,) = [item for item in sockets.read_sockets() if item.port == port and item.address == "127.0.0.1"]
    assert (found.pid, found.uid) == (os.getpid(), os.getuid())


def test_real_ports_that_the_kernel_picks():
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert server.getsockname()[1] in sockets.passing_ports()


DOORS = [Door(PRIMARY, "127.0.0.1", 8001, 999), Door(GATEWAY, "0.0.0.0", 8000, 102)]
GOOD = [Socket("127.0.0.1", 8001, 999, PRIMARY, "vllm", 5), Socket("0.0.0.0", 8000, 102, GATEWAY, "haproxy", 6)]


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ([], []),
        # The engine's own parts, with and without a process that root may see.
        ([Socket("10.0.0.1", 40000, 999, PRIMARY, "vllm", 5)], []),
        ([Socket("10.0.0.1", 40000, 999)], []),
        ([Socket("127.0.0.1", 9999, 999, PRIMARY, "vllm", 5)], [("undeclared_socket", f"{PRIMARY} 9999")]),
        ([Socket("127.0.0.1", 9999, 999)], [("undeclared_socket", "user vllm 9999")]),
        ([Socket("127.0.0.1", 40000, 999, "x.service", "nc", 7)], [("undeclared_socket", "x.service 40000")]),
        # HAProxy takes no port that the kernel picked.
        ([Socket("127.0.0.1", 40000, 102, GATEWAY, "haproxy", 6)], [("undeclared_socket", f"{GATEWAY} 40000")]),
        # The distribution's own HAProxy, and everybody else's programs.
        ([Socket("0.0.0.0", 80, 102, "haproxy.service", "haproxy", 8)], []),
        ([Socket("0.0.0.0", 22, 0, "ssh.service", "sshd", 9)], []),
    ],
)
def test_sockets_that_nobody_declared(more, wanted):
    assert compare([*GOOD, *more], DOORS) == wanted


@pytest.mark.parametrize(
    ("address", "wanted", "same"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "localhost", True),
        ("::1", "localhost", True),
        ("0.0.0.0", "127.0.0.1", False),
        ("::", "0.0.0.0", True),
        ("10.0.0.1", "", True),
        ("10.0.0.1", "10.0.0.2", False),
        ("10.0.0.1", "gpu-host", True),
        ("0.0.0.0", "gpu-host", False),
        ("::1", "0:0::1", True),
    ],
)
def test_addresses(address, wanted, same):
    found = compare([Socket(address, 8001, 999, PRIMARY, "vllm", 5)], [Door(PRIMARY, wanted, 8001, 999)])
    assert found == ([] if same else [("socket_address", f"{PRIMARY} 8001")])


def test_a_door_that_nobody_has_or_that_another_has():
    assert compare(GOOD[1:], DOORS) == [("socket_missing", f"{PRIMARY} 8001")]
    other = Socket("127.0.0.1", 8001, 1000, "x.service", "nc", 7)
    assert compare([other, GOOD[1]], DOORS) == [("socket_missing", f"{PRIMARY} 8001")]


def clock(in_step, container="", offset=None):
    report = Report("runtime")
    sockets.compare_clock(in_step, container, offset, 5.0, report)
    return [item["kind"] for item in report.findings], report.unknown


def test_the_clock():
    assert clock(True) == ([], [])
    assert clock(False) == (["clock_not_synchronised"], [])
    assert clock(False, "podman") == (["clock_not_managed"], [])
    assert clock(None, "podman") == (["clock_not_managed"], [])
    assert clock(True, "podman") == ([], [])
    findings, unknown = clock(None)
    assert findings == []
    assert len(unknown) == 1


@pytest.mark.parametrize(("offset", "late"), [(4.9, False), (-4.9, False), (5.1, True), (-3600.0, True)])
def test_clocks_that_differ(offset, late):
    assert clock(True, offset=offset)[0] == (["clock_offset"] if late else [])


def test_the_real_clock_is_asked():
    assert sockets.synchronised() in (True, False, None)
    assert 0 <= sockets.process_age() < 86400

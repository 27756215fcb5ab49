"""HAProxy's running state against its file; answers are recorded from HAProxy 2.6.12."""

from __future__ import annotations

import json
import os
import socket
import threading
from dataclasses import replace

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _drift_gateway as gateway
from ansible_collections.nvl.vllm.plugins.module_utils._drift_gateway import GatewayError, Server
from ansible_collections.nvl.vllm.plugins.module_utils._drift_kinds import Report

STATE = """\
1
# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_uweight srv_iweight \
srv_time_since_last_change srv_check_status srv_check_result srv_check_health srv_check_state srv_agent_state \
bk_f_forced_id srv_f_forced_id srv_fqdn srv_port srvrecord srv_use_ssl srv_check_port srv_check_addr srv_agent_addr \
srv_agent_port
3 engines 1 primary 127.0.0.1 2 0 1 1 1331 15 3 3 6 22 0 0 - 8001 - 0 0 - 127.0.0.1 8403
3 engines 2 secondary 127.0.0.1 2 0 1 1 1383 15 3 3 6 22 0 0 - 8002 - 0 0 - 127.0.0.1 8403
"""
STATISTICS = """\
# pxname,svname,qcur,qmax,scur,smax,slim,stot
door,FRONTEND,,,0,0,648,0
engines,primary,0,0,0,0,9,0
engines,secondary,0,0,0,0,,0
engines,BACKEND,0,0,0,0,65,0
"""
CONFIG = """\
defaults
  mode http
backend engines
  default-server check inter 1s fall 2 rise 2
  # 9 requests at once
  server primary 127.0.0.1:8001 agent-send "primary\\n" maxconn 9
  server secondary 127.0.0.1:8002 agent-send "secondary\\n" maxconn 9
"""
KEYS = "0x556beee892d0 eb51d26370e8 jo\n0x556beee892d1 aa00 team\n\n"


def compare(live=None, limits=None, config=None, excused=(), declared=("primary", "secondary")):
    report = Report("runtime")
    gateway.compare_servers(
        gateway.parse_servers(STATE) if live is None else live,
        {"primary": 9, "secondary": 9} if limits is None else limits,
        gateway.configured(CONFIG) if config is None else config,
        declared,
        report,
        excused,
    )
    return [(item["kind"], item["where"], item["found"]) for item in report.findings]


def changed(name="secondary", **fields):
    live = gateway.parse_servers(STATE)
    return {**live, name: replace(live[name], **fields)}


def test_what_is_recorded_is_as_declared():
    live = gateway.parse_servers(STATE)
    assert live["primary"].server == Server("primary", "127.0.0.1:8001", 1, -1)
    assert live["primary"].running
    assert gateway.parse_limits(STATISTICS) == {"primary": 9, "secondary": 0}
    assert gateway.configured(CONFIG)["secondary"] == Server("secondary", "127.0.0.1:8002", 1, 9)
    assert compare() == []


@pytest.mark.parametrize(
    ("before", "after", "wanted"),
    [
        (" 2 0 1 1 1383", " 2 8 1 1 1383", ("gateway_server_state", "secondary", "it is drained at the socket")),
        (
            " 2 0 1 1 1383",
            " 0 1 1 1 1383",
            ("gateway_server_state", "secondary", "it is in maintenance, which only its socket does"),
        ),
        (" 2 0 1 1 1383", " 0 0 1 1 1383", ("gateway_server_down", "secondary", "HAProxy takes it for down")),
        (" 2 0 1 1 1383", " 2 0 0 1 1383", ("gateway_server_changed", "secondary weight", "weight is 0")),
        (" - 8002 ", " - 9002 ", ("gateway_server_changed", "secondary address", "address is 127.0.0.1:9002")),
        (" 6 22 0 0 - 8002", " 6 18 0 0 - 8002", ("gateway_server_changed", "secondary check", "check is off")),
    ],
)
def test_what_was_changed_at_the_socket(before, after, wanted):
    text = STATE.replace(before, after)
    assert text != STATE
    assert compare(gateway.parse_servers(text)) == [wanted]


def test_a_limit_that_was_changed():
    assert compare(limits={"primary": 3, "secondary": 9}) == [
        ("gateway_server_changed", "primary maxconn", "maxconn is 3")
    ]


def test_an_engine_that_has_a_finding_of_its_own_is_excused():
    assert compare(changed(drained=True), excused=["secondary"]) == []
    assert compare(changed(running=False), excused=["secondary"]) == []
    assert compare(changed(maintenance=True), excused=["secondary"]) != []


def test_servers_that_are_too_many_or_too_few():
    assert compare(declared=["primary", "third"]) == [
        ("gateway_server_missing", "third", "HAProxy does not know it"),
        ("gateway_server_undeclared", "secondary", "it sends to 127.0.0.1:8002"),
    ]


def test_a_name_in_the_file_is_not_compared_with_an_address():
    config = {"primary": Server("primary", "engine-host:8001", 1, 9)}
    assert compare(config=config) == []


@pytest.mark.parametrize("text", ["", "Unknown command", STATE.replace(" 2 0 1 1 1383", " x 0 1 1 1383")])
def test_an_answer_that_is_not_known(text):
    with pytest.raises(GatewayError):
        gateway.parse_servers(text)


def test_keys_are_told_by_number_only():
    report = Report("runtime")
    on_disk = gateway.parse_keys("# x\neb51d26370e8 jo\nbb00 gone\n")
    gateway.compare_keys(gateway.parse_keys(KEYS), on_disk, report)
    assert report.findings[0]["found"] == "2 keys, 1 that the file does not name and 1 of the file missing"
    assert "aa00" not in str(report.findings)
    same = Report("runtime")
    gateway.compare_keys({"a"}, {"a"}, same)
    assert same.findings == []


@pytest.fixture
def started(tmp_path):
    """What a gateway that was just started notes, as its helper does; see roles/vllm_gateway/files/vllm-gateway."""
    (tmp_path / "haproxy.cfg").write_text(CONFIG)
    (tmp_path / "haproxy").write_text("")
    (tmp_path / "unit").write_text("[Service]")
    program = os.stat(tmp_path / "haproxy")
    files = {name: gateway.digest(str(tmp_path / name)) for name in ("haproxy.cfg", "keys")}
    return {
        "files": {**files, "haproxy": [program.st_size, int(program.st_mtime)]},
        "unit": gateway.digest(str(tmp_path / "unit")),
    }


def compare_inputs(noted, path):
    report = Report("runtime")
    gateway.compare_inputs(noted, str(path), str(path / "haproxy"), str(path / "unit"), report)
    return [(item["kind"], item["found"]) for item in report.findings], report.unknown


def test_a_gateway_that_runs_from_what_is_on_disk(started, tmp_path):
    assert started["files"]["keys"] == "absent"
    assert compare_inputs(started, tmp_path) == ([], [])


def test_a_gateway_that_does_not(started, tmp_path):
    (tmp_path / "keys").write_text("new")
    (tmp_path / "unit").write_text("[Unit]")
    (tmp_path / "haproxy").write_text("upgraded")
    assert compare_inputs(started, tmp_path)[0] == [
        ("program_replaced", f"{tmp_path}/haproxy changed since it was started"),
        ("stale_process", "changed since it was started: keys, vllm-gateway.service"),
    ]


def test_a_gateway_that_noted_nothing_is_unknown(started, tmp_path):
    findings, unknown = compare_inputs({}, tmp_path)
    assert findings == []
    assert len(unknown) == 1


def serve(path, answer):
    """A stand-in for HAProxy's socket; with None it takes the question and says nothing."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()
    done = threading.Event()

    def run():
        connection, _ = server.accept()
        with connection:
            connection.recv(1000)
            if answer is None:
                done.wait(30)
            else:
                connection.sendall(answer)
        server.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return done, thread


def test_haproxy_is_asked(tmp_path):
    _, thread = serve(tmp_path / "admin.sock", STATE.encode() * 50)
    assert gateway.ask(str(tmp_path / "admin.sock"), "show servers state", 5.0) == STATE * 50
    thread.join()


def test_a_haproxy_that_hangs_is_told_after_the_deadline(tmp_path):
    done, thread = serve(tmp_path / "admin.sock", None)
    with pytest.raises(GatewayError, match=r"within 0.2 s"):
        gateway.ask(str(tmp_path / "admin.sock"), "show info", 0.2)
    done.set()
    thread.join()
    with pytest.raises(GatewayError):
        gateway.ask(str(tmp_path / "none.sock"), "show info", 0.2)


def status(**engines):
    return json.dumps({"all_ejected": False, "instances": engines})


def test_the_agents_view():
    report = Report("runtime")
    text = status(
        primary={"state": "up", "drain": None},
        secondary={"state": "ejected", "reason": "it makes no progress", "drain": None},
        third={"state": "up", "drain": "work"},
    )
    out = gateway.compare_status(text, ["primary", "secondary", "third", "fourth"], report)
    assert out == {"secondary", "third"}
    assert [(item["kind"], item["where"]) for item in report.findings] == [
        ("stale_process", "vllm-health.service fourth"),
        ("engine_ejected", "secondary"),
    ]
    assert report.findings[1]["found"] == "ejected: it makes no progress"


def test_an_agent_that_says_something_else_is_unknown():
    report = Report("runtime")
    assert gateway.compare_status("<html>", ["primary"], report) == set()
    assert len(report.unknown) == 1


def test_drain_files_are_told_with_their_age():
    report = Report("runtime")
    drains = {"primary": ("fan\nwork", 7300.0), "gone": ("", 30.0)}
    gateway.compare_drains(drains, ["primary"], report)
    assert [item["found"] for item in report.findings] == [
        "drained for 30 s (no reason given), though no such engine is declared",
        "drained for 2 h (fan work)",
    ]

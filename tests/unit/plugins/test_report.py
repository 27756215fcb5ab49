"""The table at the end of a deploy."""

from __future__ import annotations

import pytest
from ansible_collections.nvl.vllm.plugins.filter.report import report

INSTANCES = [
    {"name": "primary", "port": 8001, "gpus": [0], "url": "http://127.0.0.1:8001"},
    {"name": "b", "port": 8002, "gpus": [], "url": "http://127.0.0.1:8002"},
]
ENDPOINTS = [
    {"name": "b", "healthy": False, "serves": {}},
    {"name": "primary", "healthy": True, "serves": {"model": "gpt-oss-120b", "ttft_seconds": 0.0254}},
]
DRILL = {
    "verdict": "passed",
    "sent": 412,
    "lost": 0,
    "retried": 2,
    "truncated": 1,
    "target": "primary",
    "seconds_to_recover": 27.1,
}


def test_a_row_for_each_instance_in_the_declared_order():
    lines = report(INSTANCES, ENDPOINTS, [DRILL], "gpt-oss-120b").splitlines()
    assert lines[0].split() == ["INSTANCE", "PORT", "DEVICE", "STATE", "MODEL", "FIRST", "TOKEN"]
    assert lines[1].split() == ["primary", "8001", "GPU", "0", "serves", "gpt-oss-120b", "25", "ms"]
    assert lines[2].split() == ["b", "8002", "CPU", "not", "healthy", "-", "-"]


def test_columns_line_up():
    lines = report(INSTANCES, ENDPOINTS, [DRILL], "gpt-oss-120b").splitlines()
    assert lines[1].index("8001") == lines[2].index("8002") == lines[0].index("PORT")


@pytest.mark.parametrize(
    ("drill", "line"),
    [
        (DRILL, "passed: 412 requests, 0 lost, 2 retried, 1 cut mid-stream; primary served again after 27.1 s"),
        ({**DRILL, "proven": "2026-01-31T12:00:00Z"}, "(drill of 2026-01-31T12:00:00Z, nothing changed since)"),
        ({"skipped": True}, "not drilled"),
        ({"skipped": True, "msg": "Would send"}, "Would send"),
    ],
)
def test_the_verdict_of_the_drill(drill, line):
    text = report(INSTANCES, ENDPOINTS, [drill], "m")
    assert line in next(found for found in text.splitlines() if found.startswith("Failover"))


def test_no_drill_at_all():
    assert "Failover  not drilled" in report(INSTANCES, ENDPOINTS, [], "m").splitlines()


def test_several_drills_are_a_line_each_with_their_names():
    drills = [{**DRILL, "item": {"name": "kill via gateway"}}, {"skipped": True, "item": {"name": "drain via gateway"}}]
    lines = report(INSTANCES, ENDPOINTS, drills, "m").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("Failover"))
    assert lines[first].startswith("Failover  kill via gateway passed: 412 requests, 0 lost")
    assert lines[first + 1] == "          drain via gateway not drilled"


@pytest.mark.parametrize(
    ("used", "line"),
    [
        (["b", "primary"], "Gateway   http://h:8000 serves, 2 of 2 engines up"),
        (["primary", "stranger"], "Gateway   http://h:8000 serves, 1 of 2 engines up"),
        (None, "Gateway   http://h:8000 not asked in check mode"),
    ],
)
def test_the_gateway_has_a_line_and_is_what_to_try(used, line):
    text = report(INSTANCES, ENDPOINTS, [DRILL], "m", gateway={"url": "http://h:8000", "used": used})
    assert line in text.splitlines()
    assert "curl -s http://h:8000/v1/chat/completions" in text


def test_without_a_gateway_the_first_instance_is_what_to_try():
    text = report(INSTANCES, ENDPOINTS, [DRILL], "m")
    assert "Gateway" not in text
    assert "curl -s http://127.0.0.1:8001/v1/chat/completions" in text


def test_the_command_has_a_stand_in_for_the_key_only_where_one_is_wanted():
    assert 'Bearer $VLLM_API_KEY"' in report(INSTANCES, ENDPOINTS, [DRILL], "m", "$VLLM_API_KEY")
    assert "Authorization" not in report(INSTANCES, ENDPOINTS, [DRILL], "m")

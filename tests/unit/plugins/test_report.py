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
    lines = report(INSTANCES, ENDPOINTS, DRILL, "gpt-oss-120b").splitlines()
    assert lines[0].split() == ["INSTANCE", "PORT", "DEVICE", "STATE", "MODEL", "FIRST", "TOKEN"]
    assert lines[1].split() == ["primary", "8001", "GPU", "0", "serves", "gpt-oss-120b", "25", "ms"]
    assert lines[2].split() == ["b", "8002", "CPU", "not", "healthy", "-", "-"]


def test_columns_line_up():
    lines = report(INSTANCES, ENDPOINTS, DRILL, "gpt-oss-120b").splitlines()
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
    text = report(INSTANCES, ENDPOINTS, drill, "m")
    assert line in next(found for found in text.splitlines() if found.startswith("Failover"))


def test_the_command_has_a_stand_in_for_the_key_only_where_one_is_wanted():
    assert 'Bearer $VLLM_API_KEY"' in report(INSTANCES, ENDPOINTS, DRILL, "m", "$VLLM_API_KEY")
    assert "Authorization" not in report(INSTANCES, ENDPOINTS, DRILL, "m")

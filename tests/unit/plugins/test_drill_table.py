"""Failover drills as a table."""

from __future__ import annotations

from ansible_collections.nvl.vllm.plugins.filter.drill_table import drill_table

DRILL = {
    "fault": "a kill",
    "via": "gateway",
    "verdict": "passed",
    "broken": [],
    "sent": 500,
    "completed": 499,
    "lost": 0,
    "retried": 0,
    "retried_by_gateway": 3,
    "truncated": 1,
    "latency": {"p50": 0.104, "p99": 1.5, "worst": 2.25},
    "seconds_to_eject": 1.006,
    "seconds_to_first_success": 0.1,
    "seconds_to_recover": 27.1284,
}
ROW = "a kill gateway passed 500 499 0 3 1 0.10 1.50 2.25 1.01 0.10 27.13"


def test_a_row_for_each_drill():
    lines = drill_table([DRILL, {**DRILL, "fault": "another fault"}]).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("DRILL ")
    assert " ".join(lines[1].split()) == ROW
    assert lines[1].index("gateway") == lines[2].index("gateway") == lines[0].index("VIA")


def test_what_was_not_measured_is_a_dash():
    client = {**DRILL, "via": "client", "retried": 2, "retried_by_gateway": None, "seconds_to_eject": None}
    row = drill_table([client]).splitlines()[1].split()
    assert row[3:] == ["passed", "500", "499", "0", "2", "1", "0.10", "1.50", "2.25", "-", "0.10", "27.13"]


def test_limits_that_were_not_kept_stand_below():
    failed = {**DRILL, "verdict": "failed", "broken": ["lost 3 of 500 requests (budget 0)"]}
    assert drill_table([failed]).splitlines()[-1] == "Not kept: a kill, gateway: lost 3 of 500 requests (budget 0)"


def test_drills_that_did_not_take_place():
    text = drill_table([{"skipped": True}, {"failed": True, "msg": "Drill refused, nothing was touched: because"}])
    assert text.splitlines() == ["No drill: skipped", "No drill: Drill refused, nothing was touched: because"]


def test_drills_of_a_loop_are_called_by_their_names():
    named = {"item": {"name": "kill with long prompts via gateway"}}
    failed = {**DRILL, **named, "verdict": "failed", "broken": ["lost 3"]}
    lines = drill_table([failed, {**named, "skipped": True, "msg": "Would send"}]).splitlines()
    assert lines[1].startswith("kill with long prompts  gateway  failed ")
    assert lines[2] == "Not kept: kill with long prompts, gateway: lost 3"
    assert lines[3] == "No drill: kill with long prompts via gateway: Would send"


def test_an_item_without_a_name_changes_nothing():
    assert drill_table([{**DRILL, "item": "kill"}]) == drill_table([DRILL])

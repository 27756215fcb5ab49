"""The table of the memory plan."""

from __future__ import annotations

import pytest
from ansible_collections.nvl.vllm.plugins.filter.plan_table import bar, plan_table

DEVICE = {
    "index": 0,
    "name": "NVIDIA H100 NVL",
    "total_gib": 93.0,
    "weights_gib": 61.4,
    "overhead_gib": 3.5,
    "kv_gib": 14.1,
    "foreign_gib": 0.0,
    "free_gib": 14.0,
}
INSTANCE = {
    "name": "primary",
    "devices": [0],
    "verdict": "wasteful",
    "budget": {"kv_gib": 14.1, "kv_low_gib": 12.8, "kv_high_gib": 15.5},
    "kv_tokens": 205606,
    "max_concurrency": 50.2,
    "max_model_len": 4096,
    "largest_max_model_len": 131072,
    "recommended_max_num_seqs": 45,
}
PLAN = {"devices": [DEVICE], "instances": [INSTANCE], "errors": [], "warnings": ["primary: 8 requests use little"]}


def test_table_is_read_at_a_glance():
    assert plan_table(PLAN).splitlines() == [
        "DEVICE             GiB   WEIGHTS  OTHER  KV CACHE  FOREIGN  FREE",
        "0 NVIDIA H100 NVL  93.0  61.4     3.5    14.1      -        14.0  ██████████████████████████▓▓▒▒▒▒▒▒······",
        "█ weights  ▓ CUDA, activations, graphs  ▒ KV cache  x held by others  · free",
        "",
        "INSTANCE  DEVICE  VERDICT   KV CACHE                                 AT ONCE                       ROOM FOR",
        "primary   0       wasteful  14.1 GiB (12.8 to 15.5), 205,606 tokens  50.2 requests of 4096 tokens  "
        "max-model-len up to 131072, max-num-seqs 45",
        "",
        "Note: primary: 8 requests use little",
    ]


@pytest.mark.parametrize("sizes", [(0, 0, 0, 0, 40), (10, 10, 10, 5, 5), (0.4, 0.4, 0.4, 0.4, 38.4), (40, 0, 0, 0, 0)])
def test_bar_is_as_long_as_the_device_is_large(sizes):
    assert len(bar(sizes, 40.0)) == 40


def test_bar_shows_who_holds_what():
    assert bar((20, 4, 8, 4, 4), 40.0) == "█" * 20 + "▓" * 4 + "▒" * 8 + "xxxx" + "····"


def test_what_does_not_fit_is_said_beside_the_bar():
    device = {**DEVICE, "weights_gib": 122.9, "overhead_gib": 6.9, "kv_gib": 28.3, "free_gib": -65.1}
    lines = plan_table(
        {**PLAN, "devices": [device], "errors": ["two engines share GPU 0"], "warnings": []}
    ).splitlines()
    assert lines[1].endswith("█" * 40 + " too little")
    assert lines[-1] == "Does not fit: two engines share GPU 0"


def test_findings_come_last_and_alone_where_there_is_no_plan():
    findings = [{"severity": "warning", "sentence": "GPU 0 is slow"}]
    assert plan_table(PLAN, findings).endswith("\n\nWarning: GPU 0 is slow")
    assert plan_table({}, findings) == (
        "There is no memory plan: GPUs or model are not known yet\nWarning: GPU 0 is slow"
    )
    assert plan_table({}, [], "its size is not known") == "There is no memory plan: its size is not known"

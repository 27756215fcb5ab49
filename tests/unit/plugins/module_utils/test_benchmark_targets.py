"""The guide's targets: met, missed, or nothing to judge, by the guide's value and by the corrected one."""

from __future__ import annotations

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _benchmark_targets as targets

H100 = {"device": "cuda", "hardware": "2 x NVIDIA H100 NVL", "model": "openai/gpt-oss-120b"}
CPU = {"device": "cpu", "hardware": "2 x AMD EPYC", "model": "tiny-gpt-oss"}


def run(seconds, **more):
    latencies = {key: {"p50": 1000 * seconds, "p95": 1.0, "p99": 1.0} for key in ("ttft_ms", "itl_ms", "e2e_ms")}
    figures = dict.fromkeys(("requests_per_s", "output_tokens_per_s", "total_tokens_per_s"), 1.0)
    return {"seconds": seconds, "requests": 4, **figures, **latencies, **more}


def group_of(cold, warm):
    """The whole requests take 100 ms more than the first token."""
    return {"cold_ms": cold, "warm_ms": [warm], "cold_e2e_ms": cold + 100, "warm_e2e_ms": [warm + 100]}


def path_of(kind="engine", power=390.0):
    prefix = run(
        1.0,
        groups=[group_of(1.0, 1.0), group_of(600.0, 100.0)],
        hits=60, queries=100, expected_hits=60, other_tokens=0,
    )  # fmt: skip
    shared = {"output_tokens": 128, "input_tokens": 2000, "group": 2}
    steps = [
        {"scenario": "parallel", "name": "sequential", "users": 1, "runs": [run(8.0)], **shared},
        {"scenario": "parallel", "name": "parallel", "users": 4, "runs": [run(5.0)], **shared},
        {"scenario": "prefix", "name": "prefix", "users": 1, "runs": [prefix], **shared},
        {
            "scenario": "sweep",
            "name": "8 users",
            "users": 8,
            "runs": [run(1.0, **{"from": 10.0, "to": 20.0})],
            **shared,
        },
    ]
    busy = {"t": [5.0, 12.0, 18.0], "utilization": [0.0, 98.0, 96.0], "memory_mib": [99999.0, 81000.0, 81100.0]}
    idle = {"t": [12.0, 18.0], "utilization": [0.0, None], "memory_mib": [81050.0, 81050.0], "power_w": [60.0, 61.0]}
    gpus = {"0": {**busy, "power_w": [700.0, power, 380.0]}, "1": idle}
    return {"path": kind, "kind": kind, "steps": steps, "timeline": {"gpus": gpus, "engines": {}}}


GUIDE = [{"gpu-memory-utilization": 0.85}] * 2


def judged(paths, labels, arguments=GUIDE):
    return {row["key"]: row for row in targets.judge_targets(paths, labels, arguments)}


def verdicts(paths, labels, arguments=GUIDE):
    rows = judged(paths, labels, arguments)
    return {key: (row["value"], row["guide_verdict"], row["verdict"]) for key, row in rows.items()}


def test_on_the_guides_hardware_all_are_judged():
    assert verdicts([path_of()], H100) == {
        "latency": (8.0, "met", "met"),
        "throughput": (8.0, "met", "met"),
        "gpu_utilization": (97.0, "missed", "met"),
        "gpu_memory": (85.04, "missed", "met"),
        "hit_rate": (60.0, "met", "met"),
        # First token 600 by 100 ms; the whole request, which the guide is about, 700 by 200 ms.
        "cached_speedup": (6.0, "met", "met"),
        "power": (390.0, "missed", "met"),
    }


def test_elsewhere_only_ratios_are_judged():
    path = path_of()
    path["timeline"]["gpus"] = {}
    found = verdicts([path], CPU)
    for key in ("latency", "throughput"):
        assert found[key][1:] == ("not comparable here", "not comparable here")
        assert found[key][0] == 8.0
    for key in ("gpu_utilization", "gpu_memory", "power"):
        assert found[key] == (None, "not measurable here", "not measurable here")
    assert found["hit_rate"][2] == found["cached_speedup"][2] == "met"


def test_another_gpu_or_another_model_is_not_the_guides():
    assert targets.comparable(H100) == ""
    assert "NVIDIA A100" in targets.comparable({**H100, "hardware": "1 x NVIDIA A100"})
    assert "llama" in targets.comparable({**H100, "model": "llama"})


def test_only_engines_alone_are_judged():
    values = {row["value"] for row in judged([path_of("together"), path_of("gateway")], H100).values()}
    assert values == {None}


def test_too_much_power_is_missed():
    assert verdicts([path_of(power=450.0)], H100)["power"] == (450.0, "missed", "missed")


@pytest.mark.parametrize(("watts", "verdict"), [(400.4, "met"), (408.0, "met"), (408.1, "missed")])
def test_a_sample_a_little_above_the_cap_is_the_cap(watts, verdict):
    assert verdicts([path_of(power=watts)], H100)["power"][2] == verdict


@pytest.mark.parametrize(
    ("arguments", "corrected", "verdict"),
    [
        ([{"gpu-memory-utilization": 0.85}], "82 to 88 GB", "met"),
        ([{"gpu-memory-utilization": 0.92}], "89 to 95 GB", "missed"),
        ([{}], "89 to 95 GB", "missed"),  # vLLM's default
        ([{"gpu-memory-utilization": 0.85}, {"gpu-memory-utilization": 0.92}], "82 to 95 GB", "met"),
        ([{"gpu-memory-utilization": 0.85, "kv-cache-memory-bytes": 2**30}], "none", "not comparable here"),
    ],
)
def test_how_much_memory_is_right_follows_from_what_is_declared(arguments, corrected, verdict):
    row = judged([path_of()], H100, arguments)["gpu_memory"]
    assert (row["value"], row["corrected"], row["verdict"]) == (85.04, corrected, verdict)
    assert row["guide"] == "75 to 85 GB"


def test_figures_that_depend_on_the_answers_length_tell_it():
    rows = judged([path_of()], H100)
    assert {key: row["condition"] for key, row in rows.items() if row["condition"]} == dict.fromkeys(
        ("latency", "throughput", "cached_speedup"), "with 128 output tokens"
    )


def test_the_guides_speed_up_is_judged_by_whole_requests():
    row = judged([path_of()], H100)["cached_speedup"]
    assert (row["value"], row["guide_value"]) == (6.0, 3.5)


@pytest.mark.parametrize("target", targets.targets_of(GUIDE), ids=lambda target: target.key)
def test_a_correction_has_its_reason(target):
    same = (target.low, target.high) == (target.corrected_low, target.corrected_high)
    assert same != bool(target.why)

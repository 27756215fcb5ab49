"""A benchmark's arithmetic: levels, figures of a run, what a path says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _benchmark as benchmark
from ansible_collections.nvl.vllm.plugins.module_utils._benchmark_watch import COUNTERS

#: What `vllm bench serve --save-detailed` of vLLM 0.32.0 wrote: three prefixes of 1960 tokens, each asked twice.
CAPTURED = json.loads((Path(__file__).parents[2] / "data/bench-serve-0.32.0.json").read_text())


def test_figures_are_those_that_vllm_tells():
    run = benchmark.figures([CAPTURED])
    assert run["requests"] == CAPTURED["completed"]
    assert run["input_tokens"] == CAPTURED["total_input_tokens"]
    assert run["output_tokens"] == CAPTURED["total_output_tokens"]
    for ours, theirs in (("ttft_ms", "ttft"), ("itl_ms", "itl"), ("e2e_ms", "e2el")):
        for share in (50, 95, 99):
            assert run[ours][f"p{share}"] == pytest.approx(CAPTURED[f"p{share}_{theirs}_ms"], abs=0.001)
    # vLLM's duration holds some client time around the requests.
    assert run["seconds"] == pytest.approx(CAPTURED["duration"], rel=0.02)
    assert run["output_tokens_per_s"] == pytest.approx(CAPTURED["output_throughput"], rel=0.02)


def test_runs_at_the_same_time_are_one():
    def one(begin: float) -> dict:
        return {
            "start_times": [begin, begin + 1],
            "latencies": [1.0, 1.0],
            "input_lens": [10, 10],
            "output_lens": [20, 20],
            "ttfts": [0.1, 0.3],
            "itls": [[0.01], [0.03]],
        }

    run = benchmark.figures([one(100.0), one(100.5)])
    assert (run["from"], run["to"], run["seconds"]) == (100.0, 102.5, 2.5)
    assert (run["requests"], run["requests_per_s"], run["output_tokens_per_s"]) == (4, 1.6, 32.0)
    assert run["ttft_ms"]["p50"] == 200.0


def test_answers_of_one_token_have_no_time_between_tokens():
    run = benchmark.figures([{**CAPTURED, "itls": [[] for _ in CAPTURED["itls"]]}])
    assert run["itl_ms"] is None


@pytest.mark.parametrize(
    ("limit", "expected"), [(1, [1]), (2, [1, 2]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12]), (0, [1])]
)
def test_levels_double_and_end_at_the_limit(limit, expected):
    assert benchmark.levels(limit) == expected


@pytest.mark.parametrize(
    ("kv_tokens", "max_num_seqs", "tokens", "cap", "expected"),
    [
        (16131, 8, 384, 64, 8),  # the profile's limit
        (16131, 0, 384, 64, 42),  # the KV cache
        (500_000, 1024, 384, 64, 64),  # the variable
        (100, 8, 384, 64, 1),
    ],
)
def test_users_end_where_an_engine_is_full(kv_tokens, max_num_seqs, tokens, cap, expected):
    assert benchmark.limit_of(kv_tokens, max_num_seqs, tokens, cap) == expected


def test_the_first_request_of_a_group_is_cold():
    groups = benchmark.cold_and_warm(CAPTURED["ttfts"], CAPTURED["latencies"], 2)
    assert [round(group["cold_ms"]) for group in groups] == [387, 389, 347]
    assert [round(group["warm_ms"][0]) for group in groups] == [55, 48, 49]
    # The whole requests, of four tokens each.
    assert [round(group["cold_e2e_ms"]) for group in groups] == [409, 410, 375]
    assert [round(group["warm_e2e_ms"][0]) for group in groups] == [86, 80, 76]


@pytest.mark.parametrize(
    ("prefix", "block", "groups", "group", "expected"),
    [
        (2000, 128, 3, 4, 15 * 128 * 9),  # as counted by a real engine: 17280
        (2000, 16, 1, 2, 2000),
        (1999, 16, 1, 2, 1984),
        (100, 128, 5, 4, 0),
    ],
)
def test_hits_are_whole_blocks_of_all_but_the_first_request(prefix, block, groups, group, expected):
    assert benchmark.expected_hits(prefix, block, groups, group) == expected


@pytest.mark.parametrize(
    ("hits", "other", "match"), [(1000, 0, True), (999, 0, False), (1064, 64, True), (1065, 64, False)]
)
def test_hits_of_others_are_told_from_ours(hits, other, match):
    assert benchmark.hits_match({"hits": hits, "expected_hits": 1000, "other_tokens": other}) is match


def test_counters_of_all_engines_are_added():
    before = {name: dict.fromkeys(COUNTERS, 10.0) | {"running": 1.0} for name in "ab"}
    after = {name: dict.fromkeys(COUNTERS, 12.0) | {"running": 0.0} for name in "ab"}
    assert benchmark.delta(before, after) == dict.fromkeys(COUNTERS, 4)


@pytest.mark.parametrize(
    ("requests", "tokens", "other"),
    [(4, 512, False), (6, 514, False), (5, 552, True), (4, 600, True)],
    ids=["nobody", "two probes of a token", "a user", "a user who is not done"],
)
def test_probes_of_one_token_are_no_company(requests, tokens, other):
    run = {"requests": 4, "input_tokens": 300, "output_tokens": 512}
    counters = {"requests": requests, "prompt_tokens": 300, "generation_tokens": tokens}
    assert benchmark.disturbed(benchmark.others(run, counters)) is other


def group_of(cold, *warm):
    """First tokens (ms); the whole requests take 100 ms more."""
    return {
        "cold_ms": cold, "warm_ms": list(warm), "cold_e2e_ms": cold + 100, "warm_e2e_ms": [each + 100 for each in warm],
    }  # fmt: skip


def prefix_run(*groups):
    """One that warms up comes first."""
    hits = {"hits": 60, "queries": 100, "expected_hits": 60, "other_tokens": 0}
    return {"groups": [group_of(9999.0, 1.0, 1.0), *groups], **hits}


def path_of(sequential, parallel, rates=(10.0, 30.0, 20.0), prefixes=None):
    def step(scenario, name, seconds, rate=1.0):
        runs = [
            {**figures, **latencies, "seconds": each, "requests": 4, "output_tokens_per_s": rate} for each in seconds
        ]
        return {"scenario": scenario, "name": name, "users": int(rate), "output_tokens": 128, "runs": runs}

    figures = dict.fromkeys(benchmark.FIGURES, 1.0)
    latencies = {key: {"p50": 1.0, "p95": 2.0, "p99": 3.0} for key in benchmark.LATENCIES}
    prefix = {
        "scenario": "prefix", "name": "prefix", "users": 1, "input_tokens": 2000, "group": 3, "output_tokens": 4,
        "runs": prefixes or [prefix_run(group_of(400.0, 100.0, 50.0))],
    }  # fmt: skip
    steps = [
        step("parallel", "sequential", sequential),
        step("parallel", "parallel", parallel),
        prefix,
        *(step("sweep", f"{rate:g} users", [1.0], rate) for rate in rates),
    ]
    return {"path": "primary", "kind": "engine", "steps": steps}


def test_the_speed_up_is_the_median_of_pairs():
    found = benchmark.judge_parallel(path_of([4.0, 6.0, 8.0], [2.0, 2.0, 2.0]))
    assert found["speedup"] == {"median": 3.0, "min": 2.0, "max": 4.0}
    assert found["sequential_s"]["median"] == 6.0


def test_the_first_group_warms_up_and_counts_for_hits_alone():
    found = benchmark.judge_prefix(path_of([1.0], [1.0]))
    assert found["cold_ms"] == {"median": 400.0, "min": 400.0, "max": 400.0}
    assert found["warm_ms"] == {"median": 75.0, "min": 75.0, "max": 75.0}
    assert found["speedup"]["median"] == pytest.approx(5.333)
    assert found["e2e_speedup"]["median"] == pytest.approx(500 / 175, abs=0.001)
    assert found["output_tokens"] == 4
    assert (found["hits"], found["hit_rate"], found["match"]) == (60, 0.6, True)


def test_the_spread_of_a_prefix_is_that_of_its_repetitions_and_not_of_single_requests():
    slow_request = prefix_run(group_of(400.0, 50.0, 50.0), group_of(2000.0, 50.0, 900.0), group_of(400.0, 50.0, 50.0))
    others = [prefix_run(group_of(cold, warm, warm)) for cold, warm in ((410.0, 52.0), (390.0, 48.0))]
    found = benchmark.judge_prefix(path_of([1.0], [1.0], prefixes=[slow_request, *others]))
    assert found["cold_ms"] == {"median": 400.0, "min": 390.0, "max": 410.0}
    assert found["warm_ms"] == {"median": 50.0, "min": 48.0, "max": 52.0}


def test_the_best_level_is_the_one_with_the_most_output():
    found = benchmark.judge_sweep(path_of([1.0], [1.0]))
    assert (found["concurrency"], found["output_tokens_per_s"]["median"]) == (30, 30.0)


def test_what_was_not_run_says_nothing():
    assert benchmark.judge({"path": "primary", "steps": []}) == {"parallel": None, "prefix": None, "sweep": None}

# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""The arithmetic of a benchmark: levels, figures of one run, their median and spread, and what they say.

Everything is worked out from the single requests that ``vllm bench serve --save-detailed`` tells, so that several runs
at the same time are one. Latencies are in ms, throughput in tokens or requests a second, durations in s.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ._benchmark_watch import COUNTERS

PARALLEL, PREFIX, SWEEP = "parallel", "prefix", "sweep"
SCENARIOS = (PARALLEL, PREFIX, SWEEP)
#: What is loaded: one engine, all of them at the same time, or their gateway.
KINDS = (ENGINE, TOGETHER, GATEWAY) = ("engine", "together", "gateway")
PERCENTILES = (50, 95, 99)
#: Figures of a run that are shown with median and spread, by the names in the results.
FIGURES = ("seconds", "requests_per_s", "output_tokens_per_s", "total_tokens_per_s")
LATENCIES = ("ttft_ms", "itl_ms", "e2e_ms")

Run = dict[str, Any]


def percentile(values: Sequence[float], share: float) -> float:
    """As numpy and ``vllm bench serve`` have it: linear between the two neighbours."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def percentiles(seconds: Iterable[float]) -> dict[str, float] | None:
    """p50, p95 and p99 in ms; None where there is no value."""
    values = list(seconds)
    if not values:
        return None
    return {f"p{share}": round(percentile(values, share) * 1000, 3) for share in PERCENTILES}


def users(count: int) -> str:
    """So many users."""
    return f"{count} user" + ("" if count == 1 else "s")


def levels(limit: int, start: int = 1) -> list[int]:
    """1, 2, 4, ... and the limit itself."""
    found = []
    level = start
    while level < limit:
        found.append(level)
        level *= 2
    return [*found, max(limit, start)]


def limit_of(kv_tokens: int, max_num_seqs: int, tokens: int, cap: int) -> int:
    """How many requests of so many tokens an engine can run at once, at most ``cap``; 0 is no limit of that kind."""
    limits = [cap, kv_tokens // tokens] + ([max_num_seqs] if max_num_seqs else [])
    return max(min(limits), 1)


def figures(details: Sequence[Mapping[str, Any]]) -> Run:
    """One run from what its processes, which loaded one target each, saved."""
    begins = [begin for one in details for begin in one["start_times"]]
    latencies = [latency for one in details for latency in one["latencies"]]
    first, last = min(begins), max(begin + latency for begin, latency in zip(begins, latencies))
    outputs = sum(sum(one["output_lens"]) for one in details)
    inputs = sum(sum(one["input_lens"]) for one in details)
    seconds = last - first
    return {
        "from": first,
        "to": last,
        "requests": len(begins),
        "input_tokens": inputs,
        "output_tokens": outputs,
        "seconds": round(seconds, 3),
        "requests_per_s": round(len(begins) / seconds, 4),
        "output_tokens_per_s": round(outputs / seconds, 3),
        "total_tokens_per_s": round((inputs + outputs) / seconds, 3),
        "ttft_ms": percentiles(value for one in details for value in one["ttfts"]),
        "itl_ms": percentiles(value for one in details for values in one["itls"] for value in values),
        "e2e_ms": percentiles(latencies),
    }


def cold_and_warm(ttfts: Sequence[float], latencies: Sequence[float], group: int) -> list[dict[str, Any]]:
    """Of each group of requests with a common beginning, the first one (cold) and the others (warm), in ms.

    First token, and the whole request (``e2e``). Arguments are in s.
    """
    found = []
    for place in range(0, len(ttfts) - group + 1, group):
        later = slice(place + 1, place + group)
        found.append(
            {
                "cold_ms": _ms(ttfts[place]),
                "warm_ms": [_ms(each) for each in ttfts[later]],
                "cold_e2e_ms": _ms(latencies[place]),
                "warm_e2e_ms": [_ms(each) for each in latencies[later]],
            }
        )
    return found


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def expected_hits(prefix_tokens: int, block_size: int, groups: int, group: int) -> int:
    """Tokens that the prefix cache must hit: of each later request of a group all whole blocks of what it shares."""
    return prefix_tokens // block_size * block_size * groups * (group - 1)


def delta(before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]]) -> dict[str, int]:
    """How far the counters of all engines rose."""
    return {key: round(sum(after[engine][key] - before[engine][key] for engine in before)) for key in COUNTERS}


def others(run: Mapping[str, Any], counters: Mapping[str, int]) -> dict[str, int]:
    """What the engines did in this time that was not this run's."""
    return {
        "requests": max(counters["requests"] - run["requests"], 0),
        "prompt_tokens": max(counters["prompt_tokens"] - run["input_tokens"], 0),
        "generation_tokens": max(counters["generation_tokens"] - run["output_tokens"], 0),
    }


def disturbed(other: Mapping[str, int]) -> bool:
    """Whether that was more than probes of the health agent and the gateway, which ask for one token each."""
    return other["generation_tokens"] > other["requests"]


def hits_match(prefix: Mapping[str, Any]) -> bool:
    """Whether the counters prove the hits that the arithmetic wants; prompts of others may add theirs."""
    wanted = prefix["expected_hits"]
    return bool(wanted <= prefix["hits"] <= wanted + prefix["other_tokens"])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def summary_of(step: Mapping[str, Any]) -> dict[str, Any]:
    """Median and spread of each figure over the repetitions of a step; latencies by percentile."""
    runs = step["runs"]
    found: dict[str, Any] = {key: spread([run[key] for run in runs]) for key in FIGURES}
    for key in LATENCIES:
        known = [run[key] for run in runs if run[key]]
        if known:
            found[key] = {share: spread([each[share] for each in known]) for share in known[0]}
    return found


def steps_of(path: Mapping[str, Any], scenario: str) -> list[Mapping[str, Any]]:
    """The steps of one scenario."""
    return [step for step in path["steps"] if step["scenario"] == scenario]


def judge_parallel(path: Mapping[str, Any]) -> dict[str, Any] | None:
    """How many times faster the same requests are at once than one after the other. Repetitions are pairs."""
    steps = {step["name"]: step for step in steps_of(path, PARALLEL)}
    if len(steps) < 2:
        return None
    one, all_ = steps["sequential"]["runs"], steps["parallel"]["runs"]
    ratios = [before["seconds"] / after["seconds"] for before, after in zip(one, all_)]
    return {
        "requests": steps["parallel"]["runs"][0]["requests"],
        "output_tokens": steps["parallel"]["output_tokens"],
        "sequential_s": spread([run["seconds"] for run in one]),
        "parallel_s": spread([run["seconds"] for run in all_]),
        "speedup": spread(ratios),
    }


def judge_prefix(path: Mapping[str, Any]) -> dict[str, Any] | None:
    """How much sooner the first token comes when the beginning of the prompt is in the cache."""
    steps = steps_of(path, PREFIX)
    if not steps:
        return None
    # Of each run the first group warms up: it counts for the hits, not for the times.
    runs = [run["groups"][1:] for run in steps[0]["runs"]]
    hits = sum(run["hits"] for run in steps[0]["runs"])
    queries = sum(run["queries"] for run in steps[0]["runs"])
    expected = sum(run["expected_hits"] for run in steps[0]["runs"])
    return {
        "prefix_tokens": steps[0]["input_tokens"],
        "group": steps[0]["group"],
        "output_tokens": steps[0]["output_tokens"],
        **_cold_beside_warm(runs, ""),
        **_cold_beside_warm(runs, "e2e_"),
        "hits": hits,
        "queries": queries,
        "expected_hits": expected,
        "hit_rate": round(hits / queries, 4) if queries else 0.0,
        "match": all(hits_match(run) for run in steps[0]["runs"]),
    }


def _cold_beside_warm(runs: Sequence[Sequence[Mapping[str, Any]]], kind: str) -> dict[str, dict[str, float]]:
    """Medians of each repetition and their spread, so that a single slow request does not widen it."""
    cold = [statistics.median(group[f"cold_{kind}ms"] for group in run) for run in runs]
    warm = [statistics.median(value for group in run for value in group[f"warm_{kind}ms"]) for run in runs]
    ratios = [before / after for before, after in zip(cold, warm)]
    return {f"cold_{kind}ms": spread(cold), f"warm_{kind}ms": spread(warm), f"{kind}speedup": spread(ratios)}


def judge_sweep(path: Mapping[str, Any]) -> dict[str, Any] | None:
    """The level with the most output tokens a second."""
    steps = steps_of(path, SWEEP)
    if not steps:
        return None
    best = max(steps, key=lambda step: statistics.median(run["output_tokens_per_s"] for run in step["runs"]))
    return {"concurrency": best["users"], "output_tokens_per_s": summary_of(best)["output_tokens_per_s"]}


def judge(path: Mapping[str, Any]) -> dict[str, Any]:
    """What one path says, by scenario; None for what was not run."""
    return {PARALLEL: judge_parallel(path), PREFIX: judge_prefix(path), SWEEP: judge_sweep(path)}

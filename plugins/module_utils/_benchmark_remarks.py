# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""What somebody who reads a benchmark's figures must know about how they came about, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ._benchmark import GATEWAY, PARALLEL, PREFIX, judge
from ._benchmark_baseline import REPETITIONS
from ._benchmark_watch import slowed
from ._gpu_metrics import REASONS


def remarks(paths: Sequence[Mapping[str, Any]]) -> list[str]:
    """About all paths, then about each."""
    count = repetitions(paths)
    found = [f"{count} of {REPETITIONS} repetitions: what may be chance cannot be told"] if count < REPETITIONS else []
    for path in paths:
        told = (*_odd(path), *_preempted(path), *_slowed(path), *_missed(path))
        found += [f"{path['path']}: {sentence}" for sentence in told]
    return found


def repetitions(paths: Sequence[Mapping[str, Any]]) -> int:
    """How often each step was measured; the least of all."""
    return min((len(step["runs"]) for path in paths for step in path["steps"]), default=0)


def _odd(path: Mapping[str, Any]) -> Iterator[str]:
    """Figures that cannot be, or that the arithmetic does not have so."""
    verdict = judge(path)
    parallel, prefix = verdict[PARALLEL], verdict[PREFIX]
    if parallel and parallel["speedup"]["max"] > parallel["requests"]:
        yield (
            f"{parallel['requests']} requests at once cannot be {parallel['speedup']['max']:.1f} times as fast as one "
            "after the other: something else slowed these down"
        )
    if prefix and not prefix["match"]:
        why = ""
        if path["kind"] == GATEWAY and prefix["hits"] < prefix["expected_hits"]:
            why = "; requests of a group go to different engines, unless vllm_gateway_affinity is session"
        yield (
            f"{prefix['hits']} tokens hit the prefix cache, and by the prompts' arithmetic it is "
            f"{prefix['expected_hits']}{why}"
        )


def _preempted(path: Mapping[str, Any]) -> Iterator[str]:
    for step in path["steps"]:
        count = sum(run["counters"]["preemptions"] for run in step["runs"])
        if count:
            yield f"{step['name']}: requests lost their place in the KV cache {count} times, and were computed again"


def _slowed(path: Mapping[str, Any]) -> Iterator[str]:
    for index, columns in path["timeline"]["gpus"].items():
        looks = [bits for bits in columns["clock_reasons"] if bits is not None]
        seen = [slowed(bits) for bits in looks]
        for words in dict.fromkeys(words for each in seen for words in each):
            yield f"GPU {index} was slowed down in {sum(words in each for each in seen)} of {len(looks)} looks: {words}"
        capped = sum(bool(int(bits) & REASONS["sw_power_cap"]) for bits in looks)
        if capped:
            yield f"GPU {index} was at its power cap in {capped} of {len(looks)} looks, as is usual under full load"


def _missed(path: Mapping[str, Any]) -> Iterator[str]:
    if path["missed"]:
        yield f"{path['missed']} looks at its engines came to nothing, so the timeline has gaps"

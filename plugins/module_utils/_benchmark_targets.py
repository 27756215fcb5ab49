# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""The targets of the configuration guide as data, with what is wrong about them, and how a benchmark does by them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ._benchmark import ENGINE, judge, steps_of, summary_of

MET, MISSED = "met", "missed"
NOT_MEASURED, NOT_COMPARABLE = "not measurable here", "not comparable here"
#: What the guide's figures were written for.
GUIDES_GPU, GUIDES_MODEL = "H100 NVL", "gpt-oss-120b"


@dataclass(frozen=True)
class Target:
    """One line of the guide's table.

    ``low`` and ``high`` bound the guide's value, ``corrected_low`` and ``corrected_high`` the one to judge by.
    A target that is no ratio is ``absolute``: it says nothing about another model or another GPU.
    """

    key: str
    metric: str
    unit: str
    guide: str
    low: float | None
    high: float | None
    corrected: str
    corrected_low: float | None
    corrected_high: float | None
    why: str
    measured_by: str
    absolute: bool


TARGETS = (
    Target(
        "latency",
        "Latency of a single request",
        "s",
        "about 10 s",
        None,
        10,
        "10 s at most",
        None,
        10,
        "",
        "the guide's question alone on an engine, end to end, p50",
        True,
    ),
    Target(
        "throughput",
        "Throughput of a batch",
        "requests in 10 s",
        "about 4 in 10 s",
        4,
        None,
        "4 or more in 10 s",
        4,
        None,
        "",
        "the guide's question from all users at once, on one engine",
        True,
    ),
    Target(
        "gpu_utilization",
        "GPU utilization",
        "%",
        "80 to 95 %",
        80,
        95,
        "80 % or more",
        80,
        None,
        "it counts the time in which anything runs on the GPU, so more than 95 % is no fault; and batches are best far "
        "above the guide's 4 to 8",
        "nvidia-smi, mean while an engine's best level of the sweep ran",
        True,
    ),
    Target(
        "gpu_memory",
        "GPU memory in use",
        "GB",
        "75 to 85 GB",
        75,
        85,
        "82 to 88 GB",
        82,
        88,
        "the card has 94 GB, of which CUDA sees 93.1 GiB; 0.85 of that is 85 GB, and CUDA itself comes on top",
        "nvidia-smi, most on one GPU during the sweep",
        True,
    ),
    Target(
        "hit_rate",
        "Prefix cache hit rate",
        "%",
        "more than 50 %",
        50,
        None,
        "more than 50 %",
        50,
        None,
        "",
        "hits by queries of the engine's counters, in tokens, while groups of requests share a beginning",
        False,
    ),
    Target(
        "cached_speedup",
        "Speed-up of a cached prompt",
        "times",
        "3 to 5 times, whole request",
        3,
        5,
        "3 times or more, first token",
        3,
        None,
        "a cached beginning saves the reading of the prompt and no output token, so it shows in the time to the first "
        "token; the whole request depends on how much is answered",
        "first token, cold by warm",
        False,
    ),
    Target(
        "power",
        "Power of a GPU",
        "W",
        "650 to 700 W",
        650,
        700,
        "400 W at most",
        None,
        400,
        "700 W is the SXM board; an H100 NVL is capped at 400 W",
        "nvidia-smi, greatest of one GPU while an engine's best level of the sweep ran",
        True,
    ),
)


def engines_alone(paths: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The paths that are one engine, without a gateway."""
    return [path for path in paths if path["kind"] == ENGINE]


def comparable(labels: Mapping[str, Any]) -> str:
    """Why absolute figures do not compare with the guide's; empty where they do."""
    if labels["device"] != "cuda":
        return f"measured on {labels['hardware']}, and the guide is about an {GUIDES_GPU}"
    if GUIDES_GPU not in labels["hardware"]:
        return f"measured on {labels['hardware']}, and the guide is about an {GUIDES_GPU}"
    if GUIDES_MODEL not in labels["model"]:
        return f"measured with {labels['model']}, and the guide is about {GUIDES_MODEL}"
    return ""


def measured(paths: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """A figure for each target that could be measured: the median over engines that were loaded alone."""
    found: dict[str, list[float]] = {}

    def add(key: str, value: float | None) -> None:
        if value is not None:
            found.setdefault(key, []).append(value)

    for path in engines_alone(paths):
        verdict = judge(path)
        if verdict["parallel"]:
            sequential = next(step for step in steps_of(path, "parallel") if step["name"] == "sequential")
            add("latency", summary_of(sequential)["e2e_ms"]["p50"]["median"] / 1000)
            add("throughput", 10 * verdict["parallel"]["requests"] / verdict["parallel"]["parallel_s"]["median"])
        if verdict["prefix"]:
            add("hit_rate", 100 * verdict["prefix"]["hit_rate"])
            add("cached_speedup", verdict["prefix"]["speedup"]["median"])
        if verdict["sweep"]:
            gpu = busy_gpus(path, verdict["sweep"]["concurrency"])
            for key in ("gpu_utilization", "gpu_memory", "power"):
                add(key, gpu.get(key))
    return {key: statistics.median(values) for key, values in found.items()}


def busy_gpus(path: Mapping[str, Any], users: int) -> dict[str, float]:
    """Of the busiest GPU while the path's level with so many users ran; empty where no GPU was watched."""
    runs = [run for step in steps_of(path, "sweep") if step["users"] == users for run in step["runs"]]
    spans = [(run["from"], run["to"]) for run in runs]
    found: dict[str, list[float]] = {}

    def add(key: str, values: list[float]) -> None:
        if values:
            # The mean of each GPU: an engine leaves those of the others idle.
            found.setdefault(key, []).append(statistics.fmean(values) if key == "gpu_utilization" else max(values))

    for columns in path["timeline"]["gpus"].values():
        places = [at for at, moment in enumerate(columns["t"]) if any(begin <= moment <= end for begin, end in spans)]

        def seen(column: str, columns: Mapping[str, Any] = columns, places: Sequence[int] = places) -> list[float]:
            return [columns[column][at] for at in places if columns[column][at] is not None]

        add("gpu_utilization", seen("utilization"))
        add("gpu_memory", [value * 2**20 / 1e9 for value in seen("memory_mib")])
        add("power", seen("power_w"))
    return {key: max(values) for key, values in found.items()}


def verdict_of(value: float | None, low: float | None, high: float | None) -> str:
    """Met or missed; a bound of None is none."""
    if value is None:
        return NOT_MEASURED
    return MET if (low is None or value >= low) and (high is None or value <= high) else MISSED


def judge_targets(paths: Sequence[Mapping[str, Any]], labels: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All targets, each with its figure and two verdicts: by the guide's value and by the corrected one."""
    values, reason = measured(paths), comparable(labels)
    rows = []
    for target in TARGETS:
        value = values.get(target.key)
        if value is not None and target.absolute and reason:
            verdicts = {"guide_verdict": NOT_COMPARABLE, "verdict": NOT_COMPARABLE, "note": reason}
        else:
            verdicts = {
                "guide_verdict": verdict_of(value, target.low, target.high),
                "verdict": verdict_of(value, target.corrected_low, target.corrected_high),
                "note": "" if value is not None else missing(target, labels),
            }
        rows.append({**asdict(target), "value": None if value is None else round(value, 2), **verdicts})
    return rows


def missing(target: Target, labels: Mapping[str, Any]) -> str:
    """Why there is no figure."""
    if target.measured_by.startswith("nvidia-smi") and labels["device"] != "cuda":
        return "there is no GPU"
    return "its scenario was not run on an engine alone, or its source told nothing"

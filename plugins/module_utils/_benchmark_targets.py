# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""The targets of the configuration guide as data, with what is wrong about them, and how a benchmark does by them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ._benchmark import ENGINE, judge, steps_of, summary_of
from ._memory_budget import device_by_name

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


#: Power that single samples may be above the cap (share), as the card keeps to it on average.
POWER_TOLERANCE = 0.02
#: How far (GB) a GPU's memory in use may be off its budget: CUDA itself comes on top, and a few blocks stay free.
MEMORY_TOLERANCE = 3.0
#: vLLM's own default.
UTILIZATION = 0.92

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
        "",
        None,
        None,
        "",
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
        "first token, cold by warm; by the guide's value the whole request of the same runs",
        False,
    ),
    Target(
        "power",
        "Power of a GPU",
        "W",
        "650 to 700 W",
        650,
        700,
        f"400 W at most, within {POWER_TOLERANCE:.0%}",
        None,
        400 * (1 + POWER_TOLERANCE),
        "700 W is the SXM board; an H100 NVL is capped at 400 W, which single samples exceed by a little",
        "nvidia-smi, greatest of one GPU while an engine's best level of the sweep ran",
        True,
    ),
)


def targets_of(arguments: Sequence[Mapping[str, Any]]) -> list[Target]:
    """The targets for engines with such arguments: how much memory is in use follows from them."""
    shares = sorted({float(one.get("gpu-memory-utilization", UTILIZATION)) for one in arguments})
    fixed = any(one.get("kv-cache-memory-bytes") for one in arguments)
    return [_memory(target, [] if fixed else shares) if target.key == "gpu_memory" else target for target in TARGETS]


def _memory(target: Target, shares: Sequence[float]) -> Target:
    """``shares`` of a GPU's memory that engines may use, in ascending order; none where that is set otherwise."""
    if not shares:
        why = "kv-cache-memory-bytes is set, so gpu-memory-utilization does not say how much is used"
        return replace(target, corrected="none", why=why)
    total = device_by_name(GUIDES_GPU).total_gib
    budgets = [share * total * 2**30 / 1e9 for share in shares]
    low, high = round(budgets[0] - MEMORY_TOLERANCE, 1), round(budgets[-1] + MEMORY_TOLERANCE, 1)
    return replace(
        target,
        corrected=f"{low:.0f} to {high:.0f} GB",
        corrected_low=low,
        corrected_high=high,
        why=f"gpu-memory-utilization {' and '.join(f'{share:g}' for share in shares)} of the {total:.1f} GiB that CUDA "
        f"sees is {' and '.join(f'{budget:.0f}' for budget in budgets)} GB; CUDA itself comes on top",
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


#: The figure that the guide's value of a target is about, where it is another one than the target's own.
BY_GUIDE = {"cached_speedup": "whole_speedup"}


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
            add("whole_speedup", verdict["prefix"]["e2e_speedup"]["median"])
        if verdict["sweep"]:
            gpu = busy_gpus(path, verdict["sweep"]["concurrency"])
            for key in ("gpu_utilization", "gpu_memory", "power"):
                add(key, gpu.get(key))
    return {key: statistics.median(values) for key, values in found.items()}


def conditions(paths: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """With how long an answer a target was measured, where that makes the figure."""
    found = {}
    for scenario, keys in (("parallel", ("latency", "throughput")), ("prefix", ("cached_speedup",))):
        lengths = {step["output_tokens"] for path in engines_alone(paths) for step in steps_of(path, scenario)}
        if lengths:
            told = " and ".join(map(str, sorted(lengths)))
            found.update(dict.fromkeys(keys, f"with {told} output tokens"))
    return found


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


def judge_targets(
    paths: Sequence[Mapping[str, Any]], labels: Mapping[str, Any], arguments: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """All targets, each with its figure and two verdicts: by the guide's value and by the corrected one.

    ``arguments`` are those of the engines.
    """
    values, reason, condition = measured(paths), comparable(labels), conditions(paths)
    rows = []
    for target in targets_of(arguments):
        value = values.get(target.key)
        by_guide = values.get(BY_GUIDE.get(target.key, target.key))
        if value is not None and target.absolute and reason:
            verdicts = {"guide_verdict": NOT_COMPARABLE, "verdict": NOT_COMPARABLE, "note": reason}
        else:
            boundless = value is not None and target.corrected_low is None and target.corrected_high is None
            verdicts = {
                "guide_verdict": verdict_of(by_guide, target.low, target.high),
                "verdict": NOT_COMPARABLE
                if boundless
                else verdict_of(value, target.corrected_low, target.corrected_high),
                "note": "" if value is not None else missing(target, labels),
            }
        rows.append(
            {
                **asdict(target),
                "value": None if value is None else round(value, 2),
                "guide_value": None if by_guide is None else round(by_guide, 2),
                "condition": condition.get(target.key, ""),
                **verdicts,
            }
        )
    return rows


def missing(target: Target, labels: Mapping[str, Any]) -> str:
    """Why there is no figure."""
    if target.measured_by.startswith("nvidia-smi") and labels["device"] != "cuda":
        return "there is no GPU"
    return "its scenario was not run on an engine alone, or its source told nothing"

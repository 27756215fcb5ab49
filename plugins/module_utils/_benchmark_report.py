# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""A benchmark's report: all paths of a host, what they say, the targets and the baseline, in one object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from . import _benchmark_baseline as baselines
from ._benchmark import judge, summary_of, users
from ._benchmark_remarks import remarks, repetitions
from ._benchmark_targets import MET, MISSED, NOT_COMPARABLE, NOT_MEASURED, judge_targets

SCHEMA = 1
VERDICTS = (MET, MISSED, NOT_MEASURED, NOT_COMPARABLE)
#: What the module benchmark documents that it returns. Ansible's own keys of a task's result are none of a report.
PATH_KEYS = (
    *("path", "kind", "engines", "hardware", "driver", "vllm", "time", "alone", "notes", "missed", "seconds"),
    *("steps", "timeline"),
)


class Answer(NamedTuple):
    """A figure, what it is, and what it rests on. ``good`` is None of what is neither good nor bad."""

    figure: str
    what: str
    why: str
    good: bool | None = None


def report(
    host: str,
    paths: Sequence[Mapping[str, Any]],
    labels: Mapping[str, Any],
    settings: Mapping[str, Any],
    arguments: Sequence[Mapping[str, Any]],
    baseline: Mapping[str, Any],
    threshold: float,
) -> dict[str, Any]:
    """The whole report. ``arguments`` are the engines'; ``baseline`` was stored for this key, empty where none was."""
    metrics = baselines.metrics(paths)
    return {
        "schema": SCHEMA,
        "host": host,
        "time": max(path["time"] for path in paths),
        "seconds": round(sum(path["seconds"] for path in paths), 1),
        "labels": dict(labels),
        "settings": dict(settings),
        "alone": all(path["alone"] for path in paths),
        "notes": [f"{path['path']}: {note}" for path in paths for note in path["notes"]],
        "remarks": remarks(paths),
        "verdicts": {path["path"]: judge(path) for path in paths},
        "targets": judge_targets(paths, labels, arguments),
        "metrics": metrics,
        "baseline": {
            "key": baselines.key_of(labels),
            "time": baseline.get("time"),
            "threshold": threshold,
            "stored": False,
            "refused": "",
            "rows": baselines.compare(metrics, baseline.get("metrics", {}), threshold),
        },
        "paths": [
            {
                **{key: path[key] for key in PATH_KEYS},
                "steps": [{**step, "summary": summary_of(step)} for step in path["steps"]],
            }
            for path in paths
        ],
    }


def verdicts(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """What each path says, in the order in which they ran, which the report has in its file, too."""
    return [(path["path"], report["verdicts"][path["path"]]) for path in report["paths"]]


def first_of(report: Mapping[str, Any], scenario: str) -> tuple[str, Mapping[str, Any]] | None:
    """The first path that ran a scenario, and what it says."""
    for name, verdict in verdicts(report):
        if verdict[scenario]:
            return name, verdict[scenario]
    return None


def best_sweep(report: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """The path and level with the most output."""
    found = [(name, verdict["sweep"]) for name, verdict in verdicts(report) if verdict["sweep"]]
    return max(found, key=lambda each: each[1]["output_tokens_per_s"]["median"], default=None)


def worse(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What is worse than the baseline."""
    return [row for row in report["baseline"]["rows"] if row["worse"]]


def refusal(report: Mapping[str, Any]) -> str:
    """Why these figures make no baseline; empty where they do."""
    if not report["alone"]:
        return (
            f"no baseline was stored: wanted engines that were alone, found: {'; '.join(report['notes'])}; run it "
            "again when nobody else asks them"
        )
    count = repetitions(report["paths"])
    if count < baselines.REPETITIONS:
        return (
            f"no baseline was stored: wanted {baselines.REPETITIONS} repetitions or more, found {count}: raise "
            "vllm_benchmark_repetitions"
        )
    return ""


def problems(report: Mapping[str, Any]) -> list[str]:
    """Sentences for what ends a run with an error."""
    baseline = report["baseline"]
    found = [baseline["refused"]] if baseline["refused"] else []
    if not baseline["stored"]:
        found += [
            f"worse than the baseline of {row['since'] or baseline['time']}: {baselines.sentence(row)}"
            for row in worse(report)
        ]
    return found


def headlines(report: Mapping[str, Any]) -> list[Answer]:
    """The answers."""
    found = []
    parallel, prefix, best = first_of(report, "parallel"), first_of(report, "prefix"), best_sweep(report)
    if parallel:
        name, verdict = parallel
        found.append(
            Answer(
                times(verdict["speedup"]),
                f"as fast: {verdict['requests']} requests at once instead of one after the other",
                f"{name}: {verdict['sequential_s']['median']:.2f} s one after the other, "
                f"{verdict['parallel_s']['median']:.2f} s at once; {ranged(verdict['speedup'], 1)} times",
                verdict["speedup"]["median"] > 1,
            )
        )
    if prefix:
        name, verdict = prefix
        proof = (
            "as the prompts' arithmetic has it" if verdict["match"] else f"not the expected {verdict['expected_hits']}"
        )
        found.append(
            Answer(
                times(verdict["speedup"]),
                "sooner: the first token, with the prompt's beginning in the cache",
                f"{name}: {verdict['cold_ms']['median']:.0f} ms cold, {verdict['warm_ms']['median']:.0f} ms warm; "
                f"{verdict['hits']} tokens hit, {proof}",
                verdict["match"] and verdict["speedup"]["median"] > 1,
            )
        )
    if best:
        name, verdict = best
        found.append(
            Answer(
                f"{verdict['output_tokens_per_s']['median']:.0f} tokens/s",
                f"best throughput, at {users(verdict['concurrency'])}",
                f"{name}: {ranged(verdict['output_tokens_per_s'], 0)} tokens/s of output",
            )
        )
    counted = {verdict: sum(1 for row in report["targets"] if row["verdict"] == verdict) for verdict in VERDICTS}
    judged = counted[MET] + counted[MISSED]
    rest = [f"{count} {verdict}" for verdict, count in counted.items() if count and verdict not in (MET, MISSED)]
    told = ", ".join(rest) or "all of them could be judged"
    found.append(Answer(f"{counted[MET]} of {judged}", "targets met", told, counted[MET] == judged if judged else None))
    return found


def by_guide(row: Mapping[str, Any]) -> str:
    """The verdict by the guide's own value, where it is another one than by the corrected value."""
    if row["guide_verdict"] == row["verdict"]:
        return ""
    figure = f", {row['guide_value']:g} {row['unit']}" if row["guide_value"] != row["value"] else ""
    return f"by the guide's value {row['guide_verdict']}{figure}"


def against_baseline(report: Mapping[str, Any]) -> str:
    """One sentence about the baseline."""
    baseline = report["baseline"]
    if baseline["stored"]:
        return "This run is the baseline now."
    if baseline["time"] is None:
        return "No baseline for this hardware and set-up yet: -e vllm_benchmark_save_baseline=true stores this run."
    count = len(worse(report))
    told = f"{count} of {len(baseline['rows'])} figures are worse" if count else "nothing is worse"
    return f"Beside the baseline of {baseline['time']}: {told} by more than {baseline['threshold']:g} % and chance."


def times(values: Mapping[str, float]) -> str:
    """A ratio."""
    return f"{values['median']:.1f}x"


def ranged(values: Mapping[str, float], digits: int) -> str:
    """Least and greatest."""
    return f"{values['min']:.{digits}f} to {values['max']:.{digits}f}"


def with_range(values: Mapping[str, float] | None, digits: int = 0) -> str:
    """Median with least and greatest; a dash where there is none."""
    return f"{values['median']:.{digits}f} ({ranged(values, digits)})" if values else "-"

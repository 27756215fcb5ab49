# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""A benchmark's report as text for the terminal and as Markdown; the tables are the HTML page's, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ._benchmark import users
from ._benchmark_report import against_baseline, by_guide, headlines, problems, times, verdicts, with_range
from ._drift_output import columns


class Table(NamedTuple):
    """A heading, a row of column names, and rows of text; ``left`` columns are words, the others numbers."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    left: int = 1


def tables(report: Mapping[str, Any]) -> list[Table]:
    """All figures. Those with a spread are a median, then the least and the greatest."""
    return [
        table
        for table in (_targets(report), _parallel(report), _prefix(report), *_sweeps(report), _baseline(report))
        if table.rows
    ]


def _targets(report: Mapping[str, Any]) -> Table:
    rows = []
    for row in report["targets"]:
        value = "-" if row["value"] is None else f"{row['value']:g} {row['unit']}"
        condition = f" {row['condition']}" if row["condition"] else ""
        told = "; ".join(filter(None, (by_guide(row), row["note"])))
        verdict = row["verdict"] + (f" ({told})" if told else "")
        corrected = row["corrected"] + (f": {row['why']}" if row["why"] else "")
        rows.append((row["metric"], row["guide"], corrected, f"{value}{condition}: {row['measured_by']}", verdict))
    return Table("Targets", ("Metric", "Guide", "To be judged by", "Measured", "Verdict"), rows, left=5)


def _parallel(report: Mapping[str, Any]) -> Table:
    rows = []
    for name, verdict in verdicts(report):
        found = verdict["parallel"]
        if found:
            figures = (with_range(found["sequential_s"], 2), with_range(found["parallel_s"], 2))
            rows.append((name, str(found["requests"]), *figures, with_range(found["speedup"], 1)))
    header = ("Path", "Requests", "One after the other (s)", "At once (s)", "Times as fast")
    return Table("One after the other, and at once", header, rows)


def _prefix(report: Mapping[str, Any]) -> Table:
    rows = []
    for name, verdict in verdicts(report):
        found = verdict["prefix"]
        if found:
            times_ = (
                *(with_range(found["cold_ms"]), with_range(found["warm_ms"]), with_range(found["speedup"], 1)),
                *(with_range(found["cold_e2e_ms"]), with_range(found["warm_e2e_ms"])),
                with_range(found["e2e_speedup"], 1),
            )
            hits = (str(found["hits"]), str(found["expected_hits"]), f"{100 * found['hit_rate']:.0f} %")
            rows.append((name, *times_, *hits))
    header = (
        *("Path", "Cold, first token (ms)", "Warm (ms)", "Times as fast"),
        *("Cold, whole request (ms)", "Warm (ms)", "Times as fast"),
        *("Tokens hit", "By arithmetic", "Hit rate"),
    )
    return Table("Beginning of the prompt new, and in the cache", header, rows)


def _sweeps(report: Mapping[str, Any]) -> list[Table]:
    header = (
        *("Users", "Output (tokens/s)", "Requests/s", "First token p50 (ms)", "p95", "p99"),
        *("Between tokens p50 (ms)", "p95", "p99", "End to end p50 (ms)", "p95", "p99"),
    )
    found = []
    for path in report["paths"]:
        rows = []
        for step in path["steps"]:
            if step["scenario"] == "sweep":
                summary = step["summary"]
                latencies = [
                    f"{summary[key][share]['median']:.0f}" if key in summary else "-"
                    for key in ("ttft_ms", "itl_ms", "e2e_ms")
                    for share in ("p50", "p95", "p99")
                ]
                output = with_range(summary["output_tokens_per_s"])
                rows.append((str(step["users"]), output, f"{summary['requests_per_s']['median']:.2f}", *latencies))
        found.append(Table(f"More and more users: {path['path']}", header, rows, left=0))
    return found


def _baseline(report: Mapping[str, Any]) -> Table:
    rows = [
        (
            row["name"],
            f"{with_range(row['then'], 1)} {row['unit']}",
            f"{with_range(row['now'], 1)} {row['unit']}",
            f"{row['change']:+.1f} %" + (" worse" if row["worse"] else ""),
        )
        for row in report["baseline"]["rows"]
    ]
    return Table("Beside the baseline", ("Figure", "Then", "Now", "Better by"), rows)


def setting(report: Mapping[str, Any]) -> str:
    """What was measured, in one line."""
    labels = report["labels"]
    driver = f", driver {labels['driver']}" if labels["driver"] else ""
    return f"{labels['hardware']}{driver}, vLLM {labels['vllm']}, {labels['model']}"


def summary(report: Mapping[str, Any], page: str) -> str:
    """What is printed at the end of a run."""
    lines = columns([(answer.figure, answer.what, answer.why) for answer in headlines(report)])
    rows = [("PATH", "AT ONCE", "CACHED FIRST TOKEN", "BEST OUTPUT")]
    for name, verdict in verdicts(report):
        parallel, prefix, sweep = verdict["parallel"], verdict["prefix"], verdict["sweep"]
        rows.append(
            (
                name,
                times(parallel["speedup"]) if parallel else "-",
                times(prefix["speedup"]) if prefix else "-",
                f"{sweep['output_tokens_per_s']['median']:.0f} tokens/s at {users(sweep['concurrency'])}"
                if sweep
                else "-",
            )
        )
    rest = [f"Not alone  {note}" for note in report["notes"]] + [f"Remark     {one}" for one in report["remarks"]]
    return "\n".join(
        [
            *lines,
            "",
            *columns(rows),
            "",
            *(columns([(row["metric"], row["verdict"], by_guide(row)) for row in report["targets"]])),
            "",
            *rest,
            f"Baseline   {against_baseline(report)}",
            *(f"           {problem}" for problem in problems(report)),
            f"Report     {page}",
        ]
    )


def markdown(report: Mapping[str, Any]) -> str:
    """The report for a wiki or a merge request."""
    parts = [
        f"# Benchmark of {report['host']}, {report['time']}",
        f"{setting(report)}.",
        "\n".join(f"- **{answer.figure}** {answer.what} ({answer.why})" for answer in headlines(report)),
        *(f"Not alone: {note}." for note in report["notes"]),
        *(f"Remark: {remark}." for remark in report["remarks"]),
        *(f"**{problem}**" for problem in problems(report)),
        against_baseline(report),
    ]
    for table in tables(report):
        parts += [f"## {table.title}", _markdown_table(table)]
    parts.append("Figures with a spread are the median, then the least and the greatest of all repetitions.")
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    rule = ["---" if place < table.left else "---:" for place in range(len(table.header))]
    rows: list[Sequence[str]] = [table.header, rule, *table.rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)

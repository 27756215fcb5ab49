# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""A drift report as a table for the terminal and as a text file for Prometheus."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ._drift import CLEAN, DRIFTED, UNKNOWN, counts
from ._drift_kinds import SEVERITIES

#: Lines of a difference in the terminal; all of it is in the report.
DIFF_LINES = 12


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Left-aligned columns, two spaces apart."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def number(count: int, word: str) -> str:
    """A count with its word, which gets an s where it is not one; criticals stay as they are."""
    return f"{count} {word}" + ("" if count == 1 or word == "critical" else "s")


def tally(host: Mapping[str, Any]) -> str:
    """How many findings of each severity, and how many of them are accepted."""
    found = Counter(finding["severity"] for finding in host["findings"] if not finding["accepted"])
    parts = [number(found[severity], severity) for severity in SEVERITIES if found[severity]]
    accepted = sum(1 for finding in host["findings"] if finding["accepted"])
    return ", ".join(parts + ([f"{accepted} accepted"] if accepted else [])) or "-"


def since(host: Mapping[str, Any]) -> str:
    """What is new and what is gone since the run that this one is compared with."""
    if host["compared_with"] is None:
        return "first look"
    new = sum(1 for finding in host["findings"] if finding["new"])
    parts = ([f"{new} new"] if new else []) + ([f"{len(host['gone'])} gone"] if host["gone"] else [])
    return ", ".join(parts) or ("-" if host["verdict"] == UNKNOWN else "no change")


def table(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The report as lines, each with the verdict that it is about or nothing: first a line for each host, then all that
    is to be known about those that are not clean."""
    hosts = report["hosts"]
    rows = [("HOST", "VERDICT", "FINDINGS", "SINCE THE LAST RUN")]
    rows += [(name, host["verdict"], tally(host), since(host)) for name, host in hosts.items()]
    for line, (name, verdict, _, _) in zip(columns(rows), rows):
        yield line, verdict if name in hosts else ""
    for name, host in hosts.items():
        lines = list(details(host))
        if lines:
            yield "", ""
            yield name, host["verdict"]
            for line in lines:
                yield f"  {line}", ""
    yield "", ""
    yield f"Verdict  {verdict_line(report)}", report["verdict"]


def verdict_line(report: Mapping[str, Any]) -> str:
    """The answer in one line."""
    found = Counter(host["verdict"] for host in report["hosts"].values())
    words = {CLEAN: "is as declared", DRIFTED: "drifted", UNKNOWN: "could not be looked at in full"}
    parts = [
        f"{number(found[verdict], 'host')} {word if found[verdict] == 1 else word.replace('is as', 'are as')}"
        for verdict, word in words.items()
        if found[verdict]
    ]
    took = f" ({report['seconds']:.0f} s)" if report["seconds"] is not None else ""
    return f"{report['verdict']}: {', '.join(parts)}{took}"


def details(host: Mapping[str, Any]) -> Iterator[str]:
    """What is to be known about one host, without indentation."""
    for told in host["unknown"]:
        for index, line in enumerate(told.splitlines()):
            yield f"{'unknown ' if index == 0 else '        '}  {line}"
    for finding in host["findings"]:
        yield f"{finding['severity']:8}  {finding['where']}: {finding['found']}" + (" (new)" if finding["new"] else "")
        yield f"          wanted {finding['wanted']} [{finding['kind']}]"
        if finding["accepted"]:
            yield f"          accepted until {finding['accepted']['until']}: {finding['accepted']['reason']}"
            continue
        if finding["expired"]:
            yield f"          its exception expired on {finding['expired']['until']}: {finding['expired']['reason']}"
        lines = finding.get("diff", "").splitlines()
        yield from (f"          | {line}" for line in lines[:DIFF_LINES])
        if len(lines) > DIFF_LINES:
            yield f"          | ... {len(lines) - DIFF_LINES} more lines"
        if counts(finding):
            yield f"          {finding['remedy']}"
    for finding in host["gone"]:
        yield f"gone      {finding['where']} [{finding['kind']}], which was there since {day(finding['since'])}"


def day(time: str) -> str:
    """The day of a time such as 2026-01-31T12:00:00Z."""
    return time.partition("T")[0]


def prometheus(hosts: Mapping[str, Mapping[str, Any]]) -> str:
    """The state of each host as Prometheus reads it from a text file; ``hosts`` have the ``time`` of their run.

    Findings are those that count: no notes, none that are accepted.
    """
    findings: list[str] = []
    failed: list[str] = []
    times: list[str] = []
    for name in sorted(hosts):
        host, label = hosts[name], escaped(name)
        found = Counter(finding["kind"] for finding in host["findings"] if counts(finding))
        findings += [f'drift_findings{{host="{label}",kind="{kind}"}} {found[kind]}' for kind in sorted(found)]
        failed.append(f'drift_check_failed{{host="{label}"}} {int(host["verdict"] == UNKNOWN)}')
        moment = datetime.datetime.strptime(host["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=datetime.timezone.utc)
        times.append(f'drift_last_run_timestamp_seconds{{host="{label}"}} {moment.timestamp():.0f}')
    blocks = (
        ("drift_findings", "Differences that count, by kind, at the last look.", findings),
        ("drift_check_failed", "1 where the last look could not see all of the host.", failed),
        ("drift_last_run_timestamp_seconds", "When the host was looked at last.", times),
    )
    return "".join(
        f"# HELP {name} {text}\n# TYPE {name} gauge\n" + "".join(f"{line}\n" for line in lines)
        for name, text, lines in blocks
    )


def escaped(value: str) -> str:
    """A label's value in Prometheus' text format."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

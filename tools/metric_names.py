"""Which metrics rules, dashboards and console pages ask for, and which a page of metrics offers.

Names of metrics change between releases, and a query for one that is gone is no error: it shows nothing, and an alert
on it never fires. So tests compare both sides, with pages that were captured and with a running Prometheus.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import promql_parser

#: Prometheus makes these itself.
BUILT_IN = re.compile(r"(up|ALERTS|ALERTS_FOR_STATE|scrape_\w+)")
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("", "_sum", "_count")}
#: What Grafana and the console pages put into a query before Prometheus sees it, as something that parses.
PLACEHOLDERS = (
    (re.compile(r"\$__rate_interval"), "5m"),
    (re.compile(r"\$\w+"), ".*"),
    (re.compile(r"%(\[\d\])?s(?=\))"), "offset 5m"),
)


def filled(query: str) -> str:
    """A query with its placeholders filled in, so that it covers everything."""
    for pattern, text in PLACEHOLDERS:
        query = pattern.sub(text, query)
    return query


def names_in(query: str) -> set[str]:
    """The metrics that a query reads. Raises ValueError where it is not PromQL, or chooses metrics by a pattern."""
    found: set[str] = set()
    unnamed: list[str] = []

    def visit(node: promql_parser.Expr) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            if node.name:
                found.add(node.name)
            else:
                unnamed.append(str(node))
        return True

    promql_parser.walk(promql_parser.parse(filled(query)), visit)
    if unnamed:
        raise ValueError(f"{query}: found {unnamed[0]}, which names no metric; write the name before the brace")
    return found


def names_on(page: str) -> set[str]:
    """The series that a page offers, with those of metrics that have a type and no sample yet."""
    found: set[str] = set()
    for line in page.splitlines():
        typed = re.match(r"# TYPE (\S+) (\w+)", line)
        if typed:
            found.update(typed[1] + suffix for suffix in SUFFIXES.get(typed[2], ("",)))
        elif sample := re.match(r"[a-zA-Z_:][\w:]*", line):
            found.add(sample[0])
    return found


def unknown(queries: Mapping[str, str], offered: Iterable[str]) -> dict[str, list[str]]:
    """The names that nothing offers, by where they are asked for."""
    known = set(offered)
    missing = {
        place: sorted(name for name in names_in(query) - known if not BUILT_IN.fullmatch(name))
        for place, query in queries.items()
    }
    return {place: names for place, names in missing.items() if names}


def of_rules(groups: Mapping[str, Any]) -> tuple[dict[str, str], set[str]]:
    """The queries of a file of rules, by group and rule, and the names that its recording rules make."""
    queries = {}
    made: set[str] = set()
    for group in groups["groups"]:
        for rule in group["rules"]:
            queries[f"{group['name']}: {rule.get('alert') or rule.get('record')}"] = str(rule["expr"])
            made.update({rule["record"]} if "record" in rule else ())
    return queries, made


def of_dashboards(directory: Path) -> dict[str, str]:
    """The queries of all dashboards, by file, panel and letter, and the series behind their variables."""
    return {place: query for path in sorted(directory.glob("*.json")) for place, query in _of_dashboard(path)}


def _of_dashboard(path: Path) -> Iterator[tuple[str, str]]:
    board = json.loads(path.read_text(encoding="utf-8"))
    for panel in board["panels"]:
        for target in panel.get("targets") or ():
            yield f"{path.name}: {panel['id']} {panel['title']}: {target['refId']}", target["expr"]
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            series = re.fullmatch(r"label_values\((.+), \w+\)", variable["query"])
            if series is None:
                raise ValueError(
                    f"{path.name}: variable {variable['name']}: found {variable['query']}, "
                    "wanted label_values(SERIES, LABEL)"
                )
            yield f"{path.name}: variable {variable['name']}", series[1]


def of_consoles(directory: Path) -> dict[str, str]:
    """The queries of all console pages, by file and line: what stands between backticks."""
    return {
        f"{path.name}:{text.count(chr(10), 0, found.start()) + 1}:{found.start()}": found[1]
        for path in sorted(directory.glob("*.html"))
        for text in [path.read_text(encoding="utf-8")]
        for found in re.finditer(r"`([^`]*)`", text)
    }

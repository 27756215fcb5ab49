#!/usr/bin/env python3
"""The results of ``make bench-failover`` as tables and a picture.

Usage: ``tools/bench_page.py RESULTS.json DOCS``. Writes the tables into ``DOCS/failover-benchmark.md``, between its two
marks, and the picture ``DOCS/images/failover-benchmark.svg``. Prints the tables.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- results: written by tools/bench_page.py -->", "<!-- end of results -->"
OURS = "gateway"
TITLES = {
    "gateway": "this gateway",
    "haproxy": "HAProxy, plain",
    "nginx": "nginx, vLLM's docs",
    "litellm": "LiteLLM proxy",
    "client": "guide's client",
    "direct": "no door",
    "again": "no door, again",
}
COLOURS = ("#1b7837", "#4393c3", "#92c5de", "#d6604d", "#b2abd2", "#666666", "#aaaaaa")  # in the order of TITLES
FAULTS = {
    "kill": "engine process killed",
    "kill_retried": "killed, users retry twice",
    "kill_server": "server process killed",
    "hang": "engine hangs",
    "stop": "stopped by an operator",
}


@dataclass(frozen=True)
class Drill:
    """One drill's numbers, times in seconds. ``problem`` says why it has none or did not end well; else it is empty."""

    door: str
    fault: str
    sent: int = 0
    lost: int = 0
    cut: int = 0
    p99: float | None = None
    worst: float | None = None
    recover: float | None = None
    problem: str = ""

    @property
    def measured(self) -> bool:
        """Whether there are numbers."""
        return self.sent > 0

    @property
    def noticed(self) -> int:
        """Requests of which users got no answer, or half of one."""
        return self.lost + self.cut


def main() -> None:
    """Render. Exits with a sentence where the page lacks its marks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("docs", type=Path)
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text(encoding="utf-8"))
    page = arguments.docs / "failover-benchmark.md"
    tables = render(results)
    try:
        text = replace_between(page.read_text(encoding="utf-8"), tables)
    except ValueError as error:
        sys.exit(f"bench_page: {page}: {error}")
    page.write_text(text, encoding="utf-8")
    draw(results, arguments.docs / "images" / "failover-benchmark.svg")
    print(tables)


def replace_between(page: str, tables: str) -> str:
    """The page with these tables between its marks. Raises ValueError where it lacks one."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"wanted the lines {BEGIN} and {END}, found one of them missing; restore it")
    return f"{before}{BEGIN}\n\n{tables}\n{END}{after}"


def render(results: Mapping[str, Any]) -> str:
    """All tables, with what they were measured on and what can be read from them."""
    drills = [drill_of(numbers) for numbers in results["drills"]]
    parts = [
        conditions(results),
        "### What users noticed",
        drill_table(drills),
        *problems(drills, results["absent"]),
        comparison(drills),
        "### What a door costs: stand-ins with a steady pace",
        delay_table(results["latency"]["standins"]),
        "### What a door costs: the engines",
        engine_table(results["latency"]["engines"]),
        cheaper(results["latency"]["standins"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def drill_of(numbers: Mapping[str, Any]) -> Drill:
    """A drill from what the module returned."""
    if "sent" not in numbers:
        return Drill(numbers["door"], numbers["fault"], problem=str(numbers.get("msg") or "no numbers"))
    return Drill(
        door=numbers["door"],
        fault=numbers["fault"],
        sent=numbers["sent"],
        lost=numbers["lost"],
        cut=numbers["truncated"],
        p99=numbers["latency"]["p99"],
        worst=numbers["latency"]["worst"],
        recover=numbers["seconds_to_recover"],
        problem="; ".join(numbers["broken"]),
    )


def conditions(results: Mapping[str, Any]) -> str:
    """When, on what, with what, and how busy that was."""
    machine, load, versions = results["machine"], results["load"], results["versions"]
    busy = sorted(drill["machine_load"] for drill in results["drills"])
    return (
        f"Measured on {machine['date']}: {machine['cores']} processor cores ({machine['processor']}), "
        f"{machine['memory_gib']} GiB, no GPU, state {results['state'] or 'unknown'} of this repository. "
        f"vLLM {versions['vllm']}, HAProxy {versions['haproxy']}, nginx {versions['nginx']}"
        + (f", LiteLLM {versions['litellm']}" if "litellm" in versions else "")
        + f". {load['concurrency']} clients, {load['max_tokens']} tokens each; a request that takes "
        f"{load['request_timeout']} s is given up; a hang lasts {load['fault_seconds']} s. "
        f"Before each drill the machine's load average (1 minute) was {busy[0]:.1f} to {busy[-1]:.1f}, "
        f"other work on it and the drill before included."
    )


def drill_table(drills: Sequence[Drill]) -> str:
    """A row for each fault and door."""
    header = ("Fault", "Door", "Requests", "Lost", "Cut", "99 of 100 took up to (s)", "Slowest (s)", "Whole again (s)")
    rows: list[tuple[str, ...]] = []
    for drill in drills_by_fault(drills):
        name = (FAULTS.get(drill.fault, drill.fault), TITLES.get(drill.door, drill.door))
        if drill.measured:
            counts = (str(drill.sent), str(drill.lost), str(drill.cut))
            rows.append((*name, *counts, number(drill.p99), number(drill.worst), number(drill.recover, 0)))
        else:
            rows.append((*name, *["-"] * 6))
    return markdown(header, rows, left=2)


def drills_by_fault(drills: Sequence[Drill]) -> list[Drill]:
    """Fault by fault, and within one in the order of the doors."""
    faults = list(dict.fromkeys(drill.fault for drill in drills))
    doors = list(TITLES)
    return sorted(drills, key=lambda drill: (faults.index(drill.fault), doors.index(drill.door)))


def problems(drills: Sequence[Drill], absent: Mapping[str, str]) -> list[str]:
    """A sentence for each drill that did not end well, and for each door that is not there."""
    found = [f"Not measured: {TITLES[door]}, as it could not be installed ({why})." for door, why in absent.items()]
    for drill in drills_by_fault(drills):
        if drill.problem:
            found.append(f"{TITLES[drill.door]}, {FAULTS[drill.fault]}: {drill.problem}.")
    return ["\n".join(f"- {sentence}" for sentence in found)] if found else []


def comparison(drills: Sequence[Drill]) -> str:
    """For each fault, who is as good as this gateway or better, by what users noticed and by the slowest answer."""
    lines = []
    for fault in dict.fromkeys(drill.fault for drill in drills):
        found = {drill.door: drill for drill in drills if drill.fault == fault and drill.measured}
        ours = found.pop(OURS, None)
        if ours is None or not found:
            continue
        equal = named(door for door, drill in found.items() if drill.noticed == ours.noticed)
        fewer = named(door for door, drill in found.items() if drill.noticed < ours.noticed)
        faster = named(door for door, drill in found.items() if below(drill.worst, ours.worst))
        line = f"- {FAULTS[fault]}: this gateway lost {ours.lost} and cut {ours.cut}"
        line += f"; fewer of both together: {fewer or 'nobody'}; as many: {equal or 'nobody'}"
        line += f"; a faster slowest answer: {faster or 'nobody'}."
        lines.append(line)
    return "\n".join(["As good as this gateway, or better:", "", *lines]) if lines else ""


def below(left: float | None, right: float | None) -> bool:
    """Whether both were measured and the first is less."""
    return left is not None and right is not None and left < right


def named(doors: Iterable[str]) -> str:
    """Titles of the doors, as a list in a sentence."""
    return ", ".join(TITLES[door] for door in doors)


def delay_table(doors: Mapping[str, Any]) -> str:
    """How long each token was under way, from the stand-in's hand to the client's."""
    header = ("Door", "Under way p50 (ms)", "p99", "Added p50", "Added p99", "Gap between tokens p99 (ms)", "Failed")
    rows = []
    for door, found in doors.items():
        delay, added = found["delay"], found["added"]["delay"]
        times = [(delay or {}).get("p50"), (delay or {}).get("p99"), (added or {}).get("p50"), (added or {}).get("p99")]
        gap = (found["gap"] or {}).get("p99")
        rows.append((TITLES[door], *(number(each) for each in times), number(gap), str(found["failed"])))
    return markdown(header, rows)


def engine_table(doors: Mapping[str, Any]) -> str:
    """Pace and length of real answers."""
    header = (
        *("Door", "Gap p50 (ms)", "p99", "Added p50", "Times direct", "First token p50 (ms)", "Added"),
        *("Request p50 (ms)", "Added", "Failed"),
    )
    rows = []
    for door, found in doors.items():
        gap, first, request, added = (found[key] or {} for key in ("gap", "first_token", "request", "added"))
        more = {key: added.get(key) or {} for key in ("gap", "first_token", "request")}
        cells = [
            *(number(gap.get("p50")), number(gap.get("p99"))),
            *(number(more["gap"].get("p50")), number(more["gap"].get("ratio"))),
            *(number(first.get("p50"), 0), number(more["first_token"].get("p50"), 1)),
            *(number(request.get("p50"), 0), number(more["request"].get("p50"), 1)),
        ]
        rows.append((TITLES[door], *cells, str(found["failed"])))
    return markdown(header, rows)


def cheaper(doors: Mapping[str, Any]) -> str:
    """Who adds less to a token than this gateway, by the stand-ins."""
    added = {door: (found["added"]["delay"] or {}).get("p50") for door, found in doors.items()}
    ours = added.get(OURS)
    others = [door for door in added if door not in (OURS, "direct", "again")]
    less = named(door for door in others if below(added[door], ours))
    return f"Adding less to a token (p50, stand-ins) than this gateway: {less or 'nobody'}."


def number(value: float | None, digits: int = 2) -> str:
    """With so many digits after the point; a dash for what was not measured."""
    # Adding 0 turns -0.0 into 0.0.
    return "-" if value is None else f"{round(value, digits) + 0:.{digits}f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table in Markdown; the first ``left`` columns are text, the others numbers."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(aligned)} |"

    rule = [("-" * width if column < left else "-" * (width - 1) + ":") for column, width in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def draw(results: Mapping[str, Any], path: Path) -> None:
    """The picture: what was lost and cut for each fault and door, and how long tokens are under way."""
    # Here, as the rest of this program needs no library.
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    # The same numbers give the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "bench", "svg.fonttype": "none", "font.size": 9})
    drills = [drill_of(numbers) for numbers in results["drills"]]
    doors = [door for door in TITLES if any(drill.door == door for drill in drills)]
    faults = list(dict.fromkeys(drill.fault for drill in drills))
    colours = dict(
        zip(TITLES, ("#1b7837", "#4393c3", "#92c5de", "#d6604d", "#b2abd2", "#666666", "#aaaaaa"), strict=True)
    )

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5), width_ratios=(3, 2), layout="constrained")
    height = 0.8 / len(doors)
    for place, door in enumerate(doors):
        for row, fault in enumerate(faults):
            drill = next((one for one in drills if (one.door, one.fault) == (door, fault)), None)
            if drill is None:
                continue
            middle = row + (place - (len(doors) - 1) / 2) * height
            bar = {"height": height * 0.9, "color": colours[door], "edgecolor": "white"}
            left.barh(middle, drill.lost, **bar)
            left.barh(middle, drill.cut, left=drill.lost, hatch="////", **bar)
            text = (
                f" {drill.lost} + {drill.cut}, slowest {number(drill.worst, 0)} s"
                if drill.measured
                else " not measured"
            )
            left.text(drill.noticed, middle, text, va="center", fontsize=7)
    left.set_yticks(range(len(faults)), [FAULTS[fault] for fault in faults])
    left.invert_yaxis()
    left.margins(x=0.25)
    left.set_xlabel("requests lost + answers cut (hatched)")
    left.set_title("What users noticed")
    handles = [Rectangle((0, 0), 1, 1, color=colours[door]) for door in doors]
    figure.legend(handles, [TITLES[door] for door in doors], loc="outside lower center", ncols=len(doors))

    delays = {door: found["delay"] for door, found in results["latency"]["standins"].items() if found["delay"]}
    names = [door for door in TITLES if door in delays and door != "again"]
    for row, door in enumerate(names):
        p50, p99 = delays[door]["p50"], delays[door]["p99"]
        right.plot([p50, p99], [row, row], color=colours[door], linewidth=2)
        right.plot([p50], [row], "o", color=colours[door])
        right.plot([p99], [row], "|", color=colours[door], markersize=12, markeredgewidth=2)
        right.text(p50, row - 0.18, number(p50), ha="center", fontsize=7)
    right.set_xscale("log")
    right.set_yticks(range(len(names)), [TITLES[door] for door in names])
    right.set_ylim(len(names) - 0.5, -0.5)
    right.grid(axis="x", color="#dddddd")
    right.set_xlabel("ms from server to client for each token\np50 (dot) to p99 (bar)")
    right.set_title("What a door costs")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()

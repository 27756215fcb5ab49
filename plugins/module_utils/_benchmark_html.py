# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""A benchmark's report as one HTML file that needs nothing else: no script, no font, no image from anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from ._benchmark_output import Table, setting, tables
from ._benchmark_report import against_baseline, headlines, problems
from ._benchmark_targets import MET, MISSED
from ._drift_html import _STYLE as DRIFT_STYLE

_STYLE = """
:root { --s0: #2e7d4f; --s1: #2563a8; --s2: #b7791f; --s3: #c2410c; --s4: #7c3aed; --s5: #667085; }
@media (prefers-color-scheme: dark) { :root { --s0: #5cc489; --s1: #6aa9e9; --s2: #e5b454; --s3: #f28b5b; --s4: #b794f6;
  --s5: #98a2b3; } }
main { max-width: 74rem; }
header { margin-bottom: 1.5rem; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: .75rem;
  margin: 0 0 1.5rem; }
.answers div { background: var(--card); border: 1px solid var(--line); border-top: .22rem solid var(--tint);
  border-radius: .5rem; padding: .8rem 1rem .9rem; }
.answers b { display: block; font-size: 1.9rem; line-height: 1.2; letter-spacing: -.02em; color: var(--tint); }
.answers span { display: block; font-weight: 600; line-height: 1.35; }
.answers small { display: block; color: var(--soft); margin-top: .35rem; line-height: 1.4; font-size: .85em; }
figure { margin: .8rem 0 .4rem; } figure svg { width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92em; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th { text-align: right; color: var(--soft); font-weight: 600; font-size: .85em; vertical-align: bottom; }
td { text-align: right; white-space: nowrap; } td.word, th.word { text-align: left; white-space: normal; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); } tr:last-child td { border-bottom: 0; }
td.met { color: var(--clean); font-weight: 600; } td.missed { color: var(--drifted); font-weight: 600; }
.said { border-left: .25rem solid var(--tint); padding: .1rem 0 .1rem .9rem; margin: 0 0 1rem;
  overflow-wrap: anywhere; }
"""
_TINTS = {True: "clean", False: "drifted", None: "note"}
_PICTURES = {
    "sweep": ("More and more users", "Throughput grows with users until the engine is full; then only latency grows. "
              "The shade is the spread of all repetitions."),
    "prefix": ("First token, beginning of the prompt new (cold) and in the cache (warm)", ""),
    "timeline": ("What the engines did meanwhile", "Path after path."),
}  # fmt: skip


def page(report: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """The whole page. Everything from outside is escaped."""
    bad = problems(report)
    title = f"Benchmark of {report['host']}"
    answers = "".join(
        f"<div class={_TINTS[answer.good]}><b>{escape(answer.figure)}</b><span>{escape(answer.what)}</span>"
        f"<small>{escape(answer.why)}</small></div>"
        for answer in headlines(report)
    )
    said = "".join(
        f'<p class="said {tint}">{escape(text)}</p>'
        for tint, text in (
            *(("drifted", problem) for problem in bad),
            *(("warning", company) for company in [alone(report)] if company),
            *(("warning", f"{remark}.") for remark in report["remarks"]),
            ("note", against_baseline(report)),
        )
    )
    shown = {table.title: _table(table) for table in tables(report)}
    targets = _section("Targets", "", shown.pop("Targets"))
    drawn = "".join(
        _section(heading, text, f'<figure role="img" aria-label="{escape(heading)}">{pictures[name]}</figure>')
        for name, (heading, text) in _PICTURES.items()
        if name in pictures
    )
    rest = "".join(_section(heading, "", table) for heading, table in shown.items())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}, {escape(report['time'])}</title><style>{DRIFT_STYLE}{_STYLE}</style></head>"
        f'<body><main>\n<header class="{"drifted" if bad else "clean"}"><h1>{escape(title)}</h1>'
        f"<p>{escape(setting(report))}, {escape(report['time'].replace('T', ' ').replace('Z', ' UTC'))}, "
        f"{report['seconds'] / 60:.0f} min</p></header>\n"
        f'<div class="answers">{answers}</div>\n{said}\n{drawn}{targets}{rest}'
        "<footer>Figures with a spread are the median, then the least and the greatest of all repetitions. Written by "
        '<code>playbooks/benchmark.yml</code>; the same as <a href="latest.json">JSON</a> and '
        '<a href="latest.md">Markdown</a>.</footer>\n</main></body></html>\n'
    )


def alone(report: Mapping[str, Any]) -> str:
    """What else the engines had to do; empty where it was nothing."""
    told = "; ".join(report["notes"])
    return f"Not alone. {told}. The figures are not what they would be alone." if told else ""


def _section(heading: str, text: str, body: str) -> str:
    told = f'<p class="facts">{escape(text)}</p>' if text else ""
    return f'<section><div class="title"><h2>{escape(heading)}</h2></div>{told}{body}</section>\n'


def _table(table: Table) -> str:
    def cell(tag: str, place: int, text: str) -> str:
        classes = ["word"] if place < table.left else []
        verdict = text.partition(" (")[0]
        if tag == "td" and verdict in (MET, MISSED):
            classes.append(verdict)
        names = f' class="{" ".join(classes)}"' if classes else ""
        return f"<{tag}{names}>{escape(text)}</{tag}>"

    def row(tag: str, cells: tuple[str, ...]) -> str:
        return f"<tr>{''.join(cell(tag, place, text) for place, text in enumerate(cells))}</tr>"

    body = "".join(row("td", cells) for cells in table.rows)
    return f'<div class="wide"><table><thead>{row("th", table.header)}</thead><tbody>{body}</tbody></table></div>'

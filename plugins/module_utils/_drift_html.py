# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""A drift report as one HTML file that needs nothing else: no script, no font, no image from anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from ._drift import CLEAN, DRIFTED, UNKNOWN, counts
from ._drift_output import day, number, tally, verdict_line

#: Runs in the strip of a host.
RUNS = 40
_WORDS = {CLEAN: "As declared", DRIFTED: "Drifted", UNKNOWN: "Not fully known"}
_SOURCES = {"configuration": "Configuration", "runtime": "What runs", "content": "What is on disk"}

_STYLE = """
:root { color-scheme: light dark; --paper: #f6f5f2; --card: #fff; --ink: #1d2430; --soft: #667085; --line: #e4e2dc;
  --clean: #2e7d4f; --drifted: #c2410c; --unknown: #7c3aed; --critical: #b42318; --warning: #b7791f; --note: #667085;
  --add: #e7f4ec; --del: #fcebe8; --code: #f4f3ef; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171c; --card: #1c2027; --ink: #e6e8ec; --soft: #98a2b3;
  --line: #2d333d; --clean: #5cc489; --drifted: #f28b5b; --unknown: #b794f6; --critical: #f97066; --warning: #e5b454;
  --note: #98a2b3; --add: #173325; --del: #3a1f1d; --code: #161a20; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.55 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
code, pre, .where { font-family: ui-monospace, "Cascadia Mono", "DejaVu Sans Mono", Menlo, monospace; font-size: .9em; }
h1 { margin: 0; font-size: 2.4rem; line-height: 1.15; letter-spacing: -.02em; }
.clean { --tint: var(--clean); } .drifted { --tint: var(--drifted); } .unknown { --tint: var(--unknown); }
.critical { --tint: var(--critical); } .warning { --tint: var(--warning); } .note { --tint: var(--note); }
header { border-left: .4rem solid var(--tint); padding: .2rem 0 .3rem 1.3rem; margin-bottom: 2rem; }
header h1 { color: var(--tint); }
header p { margin: .5rem 0 0; color: var(--soft); }
nav { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .75rem; margin-bottom: 2.5rem; }
nav a { display: block; text-decoration: none; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-top: .22rem solid var(--tint); border-radius: .5rem; padding: .75rem 1rem; }
nav a:hover, nav a:focus-visible { border-color: var(--tint); }
nav b { display: block; overflow-wrap: anywhere; } nav span { color: var(--soft); font-size: .9em; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .7rem; margin: 0 0 1.5rem;
  padding: 1.4rem 1.5rem 1rem; }
.title { display: flex; flex-wrap: wrap; align-items: center; gap: .4rem .8rem; }
h2 { margin: 0; font-size: 1.3rem; overflow-wrap: anywhere; }
h3 { margin: 1.4rem 0 .2rem; font-size: .78rem; letter-spacing: .07em; text-transform: uppercase; color: var(--soft); }
.pill { color: var(--tint); border: 1px solid var(--tint); border-radius: 1rem; padding: 0 .65rem; font-size: .82rem;
  font-weight: 600; }
.strip { margin-left: auto; display: flex; gap: 2px; }
.strip i { width: .5rem; height: 1.15rem; border-radius: 2px; background: var(--tint); opacity: .75; }
.strip i:last-child { opacity: 1; margin-left: 4px; outline: 2px solid var(--tint); outline-offset: 1px; }
.facts { color: var(--soft); margin: .35rem 0 0; font-size: .92em; }
article { border-top: 1px solid var(--line); padding: .8rem 0 .9rem 1rem; position: relative; }
h3 + article, summary + article { border-top: 0; }
article::before { content: ""; position: absolute; left: 0; top: 1.1rem; bottom: 1rem; width: .22rem;
  border-radius: 1rem; background: var(--tint); }
.head { display: flex; flex-wrap: wrap; gap: .15rem .6rem; align-items: baseline; }
.where { font-weight: 600; overflow-wrap: anywhere; }
.severity { color: var(--tint); font-weight: 600; font-size: .85rem; }
.kind { color: var(--soft); font-size: .85rem; margin-left: auto; }
.new { background: var(--tint); color: var(--card); border-radius: .3rem; padding: 0 .4rem; font-size: .75rem;
  font-weight: 700; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .9rem; margin: .35rem 0 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
details { margin-top: .5rem; } summary { cursor: pointer; color: var(--soft); font-size: .9em; }
pre { background: var(--code); border: 1px solid var(--line); border-radius: .4rem; padding: .5rem 0; margin: .4rem 0 0;
  overflow-x: auto; line-height: 1.45; }
pre span { display: block; padding: 0 .8rem; white-space: pre; min-width: max-content; min-height: 1.45em; }
pre .add { background: var(--add); } pre .del { background: var(--del); } pre .at { color: var(--soft); }
.plain { margin: .3rem 0 .8rem; padding-left: 1.2rem; } .plain li { margin: .2rem 0; overflow-wrap: anywhere;
  white-space: pre-line; }
.good { color: var(--soft); margin: .6rem 0 .5rem; }
footer { color: var(--soft); font-size: .88em; margin-top: 2rem; }
footer a { color: inherit; }
@media (max-width: 40rem) { .strip, .kind { margin-left: 0; } main { padding-top: 1.5rem; } h1 { font-size: 1.8rem; } }
@media print { :root { --paper: #fff; --card: #fff; } body { font-size: 10pt; } main { max-width: none; padding: 0; }
  nav { display: none; } section { border: 0; border-top: 1px solid #999; border-radius: 0; padding: 1rem 0 0; }
  article, .title { break-inside: avoid; } pre, pre span { white-space: pre-wrap; min-width: 0; }
  * { print-color-adjust: exact; } }
"""


def strips(reports: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[str, str, str]]]:
    """Time, verdict and findings of each host in its last runs, the oldest first. ``reports``: the newest first."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for one in reports:
        for name, host in one["hosts"].items():
            runs = found.setdefault(name, [])
            if len(runs) < RUNS:
                runs.insert(0, (one["time"], host["verdict"], tally(host)))
    return found


def page(report: Mapping[str, Any], runs: Mapping[str, Sequence[tuple[str, str, str]]]) -> str:
    """The whole page. Everything from outside is escaped."""
    hosts = report["hosts"]
    verdict = report["verdict"]
    title = verdict_line(report).partition(": ")[2]
    overview = "".join(
        f'<a class="{host["verdict"]}" href="#{escape(name)}"><b>{escape(name)}</b><span>{_WORDS[host["verdict"]]}'
        f"{_short(host)}</span></a>"
        for name, host in hosts.items()
    )
    sections = "".join(_section(name, host, runs.get(name, ())) for name, host in hosts.items())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Drift: {escape(verdict)}, {escape(report['time'])}</title><style>{_STYLE}</style></head><body><main>\n"
        f'<header class="{verdict}"><h1>{_WORDS[verdict]}</h1>'
        f"<p>{escape(title[:1].upper() + title[1:])}, {_when(report['time'])}</p></header>\n"
        f"<nav>{overview}</nav>\n{sections}"
        '<footer>Written by <code>playbooks/drift.yml</code>; the same as <a href="latest.json">JSON</a>. '
        "Values that look like secrets are hidden.</footer>\n</main></body></html>\n"
    )


def _when(time: str) -> str:
    """A time for people, UTC."""
    return f'<time datetime="{escape(time)}">{escape(time.replace("T", " ").replace("Z", " UTC"))}</time>'


def _short(host: Mapping[str, Any]) -> str:
    text = tally(host)
    return "" if text == "-" else f": {escape(text)}"


def _section(name: str, host: Mapping[str, Any], runs: Sequence[tuple[str, str, str]]) -> str:
    strip = "".join(
        f'<i class="{verdict}" title="{escape(f"{time}: {verdict}, {told}")}"></i>' for time, verdict, told in runs
    )
    body = "".join(_body(host))
    return (
        f'<section class="{host["verdict"]}" id="{escape(name)}"><div class="title"><h2>{escape(name)}</h2>'
        f'<span class="pill">{_WORDS[host["verdict"]]}</span>'
        f'<span class="strip" aria-hidden="true">{strip}</span></div>'
        f'<p class="facts">{_compared(host)}</p>{body}</section>\n'
    )


def _compared(host: Mapping[str, Any]) -> str:
    if host["compared_with"] is None:
        return "No earlier run saw all of this host."
    new = sum(1 for finding in host["findings"] if finding["new"])
    changes = f"{new} new, {len(host['gone'])} gone" if new or host["gone"] else "no change"
    return f"Since {_when(host['compared_with'])}: {changes}."


def _body(host: Mapping[str, Any]) -> Iterator[str]:
    if host["unknown"]:
        told = "".join(f"<li>{escape(sentence)}</li>" for sentence in host["unknown"])
        yield f'<h3>Could not be looked at</h3><ul class="plain">{told}</ul>'
    open_findings = [finding for finding in host["findings"] if not finding["accepted"]]
    for source, heading in _SOURCES.items():
        told = "".join(_finding(finding) for finding in open_findings if finding["source"] == source)
        if told:
            yield f"<h3>{heading}</h3>{told}"
    accepted = [finding for finding in host["findings"] if finding["accepted"]]
    if accepted:
        told = "".join(_finding(finding) for finding in accepted)
        yield f"<details><summary>{number(len(accepted), 'accepted difference')}</summary>{told}</details>"
    if host["gone"]:
        told = "".join(
            f'<li><span class="where">{escape(one["where"])}</span> ({escape(one["kind"])}, since '
            f"{day(one['since'])})</li>"
            for one in host["gone"]
        )
        yield f'<h3>Gone since then</h3><ul class="plain">{told}</ul>'
    if not host["findings"] and not host["unknown"]:
        yield '<p class="good">Everything is as declared.</p>'


def _finding(finding: Mapping[str, Any]) -> str:
    rows = [("found", finding["found"]), ("wanted", finding["wanted"])]
    if finding["accepted"]:
        rows.append(("accepted", f"until {finding['accepted']['until']}: {finding['accepted']['reason']}"))
    if finding["expired"]:
        rows.append(("expired", f"its exception, on {finding['expired']['until']}: {finding['expired']['reason']}"))
    if counts(finding):
        rows.append(("to do", finding["remedy"]))
    rows.append(("since", day(finding["since"])))
    terms = "".join(f"<dt>{term}</dt><dd>{escape(str(text))}</dd>" for term, text in rows)
    new = '<span class="new">new</span>' if finding["new"] else ""
    return (
        f'<article class="{finding["severity"]}"><div class="head"><span class="severity">{finding["severity"]}</span>'
        f'<span class="where">{escape(finding["where"])}</span>{new}'
        f'<span class="kind">{escape(finding["kind"])}</span></div>'
        f"<dl>{terms}</dl>{_diff(finding.get('diff', ''))}</article>"
    )


def _diff(text: str) -> str:
    if not text:
        return ""
    classes = {"+": "add", "-": "del", "@": "at"}
    lines = "".join(f'<span class="{classes.get(line[:1], "")}">{escape(line)}</span>' for line in text.splitlines())
    return f"<details open><summary>Difference (- on the host, + as declared)</summary><pre>{lines}</pre></details>"

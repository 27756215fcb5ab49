# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""The pictures of a benchmark's report as SVG: matplotlib draws, the page's style gives the colours.

matplotlib knows no CSS variables. So lines and text are drawn in stand-in colours, which are replaced in the SVG.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

_INK, _LINE = "#010203", "#040506"
_SERIES = ("#110001", "#110002", "#110003", "#110004", "#110005", "#110006")
#: Stand-ins and the variables of the page that take their place.
COLOURS = {_INK: "var(--ink)", _LINE: "var(--line)", **{each: f"var(--s{n})" for n, each in enumerate(_SERIES)}}
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 10,
    "font.family": "sans-serif",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _LINE,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "grid.color": _LINE,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def pictures(report: Mapping[str, Any]) -> dict[str, str]:
    """SVG by name, of what was run: ``sweep``, ``prefix``, ``timeline``."""
    found = {}
    with matplotlib.rc_context(_STYLE):
        for name, draw in (("sweep", _sweep), ("prefix", _prefix), ("timeline", _timeline)):
            # Names inside of one picture must not be those of another in the same page.
            matplotlib.rcParams["svg.hashsalt"] = name
            figure = draw(report)
            if figure is not None:
                found[name] = _svg(figure, name)
    return found


def _svg(figure: Any, name: str) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    for stand_in, variable in COLOURS.items():
        text = text.replace(stand_in, variable)
    # The page scales it; its names are its own; the page's font is its font.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'id="([a-z]+(?:\.[a-z]+)?_\d+)"', rf'id="{name}-\1"', text)
    return re.sub(r"font: (\d+(?:\.\d+)?)px [^;\"]*", r"font: \1px system-ui, sans-serif", text)


def _sweep(report: Mapping[str, Any]) -> Any:
    paths = [path for path in report["paths"] if any(step["scenario"] == "sweep" for step in path["steps"])]
    if not paths:
        return None
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.9), layout="constrained")
    for place, path in enumerate(paths):
        colour = _SERIES[place % len(_SERIES)]
        steps = [step for step in path["steps"] if step["scenario"] == "sweep"]
        users = [step["users"] for step in steps]
        output = [step["summary"]["output_tokens_per_s"] for step in steps]
        left.plot(users, [each["median"] for each in output], color=colour, marker="o", label=path["path"])
        left.fill_between(users, [e["min"] for e in output], [e["max"] for e in output], color=colour, alpha=0.15, lw=0)
        for axes, key in ((middle, "ttft_ms"), (right, "e2e_ms")):
            for share, style in (("p50", "-"), ("p95", "--")):
                values = [step["summary"][key][share]["median"] for step in steps]
                axes.plot(users, values, color=colour, linestyle=style, marker="o", markersize=4)
    ticks = sorted({step["users"] for path in paths for step in path["steps"] if step["scenario"] == "sweep"})
    titles = ("Output (tokens/s)", "First token (ms)", "End to end (ms)")
    for axes, title in zip((left, middle, right), titles):
        axes.set_title(title)
        axes.set_xlabel("users at the same time")
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
    left.legend()
    right.plot([], [], color=_INK, label="p50")
    right.plot([], [], color=_INK, linestyle="--", label="p95")
    right.legend(loc="upper left")
    return figure


def _prefix(report: Mapping[str, Any]) -> Any:
    found = [
        (path["path"], [group for run in step["runs"] for group in run["groups"][1:]])
        for path in report["paths"]
        for step in path["steps"]
        if step["scenario"] == "prefix"
    ]
    if not found:
        return None
    figure, axes = pyplot.subplots(figsize=(12, 0.9 + 0.75 * len(found)), layout="constrained")
    names: list[tuple[float, str]] = []
    height = 0.0
    for name, groups in found:
        cold = [group["cold_ms"] for group in groups]
        warm = [value for group in groups for value in group["warm_ms"]]
        for kind, values, colour in (("cold", cold, _SERIES[3]), ("warm", warm, _SERIES[0])):
            axes.plot(values, [height] * len(values), "o", color=colour, alpha=0.5, markersize=7, mew=0)
            median = report["verdicts"][name]["prefix"][f"{kind}_ms"]["median"]
            axes.plot([median, median], [height - 0.32, height + 0.32], color=colour, linewidth=2.5)
            names.append((height, f"{name}, {kind}"))
            height += 1
    axes.set_yticks([place for place, _ in names], [text for _, text in names])
    axes.set_ylim(height - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("time to the first token (ms); each dot is a request, each bar a median")
    return figure


def _timeline(report: Mapping[str, Any]) -> Any:
    """All paths after one another, as they ran: each on a time axis of its own, joined."""
    gpus = any(path["timeline"]["gpus"] for path in report["paths"])
    figure, all_axes = pyplot.subplots(
        2 + 2 * gpus, 1, figsize=(12, 3.6 + 2.6 * gpus), sharex=True, layout="constrained", squeeze=False
    )
    requests, usage, *more = [row[0] for row in all_axes]
    engines = list(dict.fromkeys(name for path in report["paths"] for name in path["timeline"]["engines"]))
    offset = 0.0
    for path in report["paths"]:
        length = 0.0
        for name, columns in path["timeline"]["engines"].items():
            colour = _SERIES[engines.index(name) % len(_SERIES)]
            moments = [offset + moment for moment in columns["t"]]
            length = max([length, *columns["t"]])
            requests.plot(moments, columns["running"], color=colour, lw=1.1)
            requests.plot(moments, columns["waiting"], color=colour, lw=1.1, linestyle=":")
            usage.plot(moments, [100 * value for value in columns["kv_usage"]], color=colour, lw=1.1)
        for index, columns in path["timeline"]["gpus"].items():
            colour = _SERIES[int(index) % len(_SERIES)]
            moments = [offset + moment for moment in columns["t"]]
            for axes, key in zip(more, ("utilization", "power_w")):
                axes.plot(moments, [float("nan") if v is None else v for v in columns[key]], color=colour, lw=1.1)
        requests.annotate(
            path["path"], (offset, 1), xycoords=("data", "axes fraction"), xytext=(4, -2), textcoords="offset points",
            va="top", fontsize=9, fontweight="bold",
        )  # fmt: skip
        offset += length
        for axes in (requests, usage, *more):
            axes.axvline(offset, color=_LINE, lw=1)
    for place, name in enumerate(engines):
        requests.plot([], [], color=_SERIES[place % len(_SERIES)], label=name)
    requests.plot([], [], color=_INK, linestyle=":", label="waiting")
    requests.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(engines) + 1, borderaxespad=0)
    cards = sorted({index for path in report["paths"] for index in path["timeline"]["gpus"]}, key=int)
    for axes in more:
        for index in cards:
            axes.plot([], [], color=_SERIES[int(index) % len(_SERIES)], label=f"GPU {index}")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(cards), borderaxespad=0)
    titles = ("Requests running", "KV cache in use (%)", "GPU utilization (%)", "GPU power (W)")
    for axes, title in zip((requests, usage, *more), titles):
        axes.set_title(title)
        axes.set_ylim(bottom=0)
        axes.margins(x=0)
    (more or [usage])[-1].set_xlabel("seconds")
    return figure

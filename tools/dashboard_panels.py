"""Kinds of panels as plain data for ``dashboards.py``, and the PromQL that several of them share.

Series carry the labels that the role's scrape configuration gives: ``job``, ``host``, and ``instance`` for an engine's
name. Colours: green is well, orange wants a look, red wants a person.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

TAG = "nvl-vllm"

# Where a threshold begins, and its colour; the first has no beginning.
Thresholds = Mapping[float | None, str]


@dataclass(frozen=True)
class Panel:
    """Lines over time. ``queries``: the legend of each, and its PromQL."""

    title: str
    description: str
    unit: str
    queries: Mapping[str, str]
    width: int = 8
    thresholds: Thresholds = field(default_factory=dict)
    words: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    maximum: float | None = None
    stacked: bool = False


@dataclass(frozen=True)
class Tiles(Panel):
    """The last value of each series, large."""

    width: int = 4


@dataclass(frozen=True)
class Timeline(Panel):
    """A bar for each series, coloured by its value over time."""

    width: int = 12


@dataclass(frozen=True)
class Table(Panel):
    """A row for each series. ``columns``: new names of columns; ``units``: those of single columns."""

    width: int = 12
    columns: Mapping[str, str] = field(default_factory=dict)
    units: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Board:
    """A dashboard. ``variables``: labels to narrow it down by, and the series that knows their values."""

    uid: str
    title: str
    description: str
    variables: Mapping[str, str]
    rows: Mapping[str, Sequence[Panel]]


HOST = 'host=~"$host"'
ENGINE = f'{HOST}, instance=~"$instance"'
DOOR = f'{HOST}, proxy="door"'
ENGINES = f'{HOST}, proxy="engines"'
GPU = f'{HOST}, gpu=~"$gpu"'
RATE = "[$__rate_interval]"

NONE_IS_GOOD: Thresholds = {None: "green", 1: "red"}
HALF_FULL: Thresholds = {None: "green", 0.8: "orange", 0.95: "red"}

#: The agent's states as numbers, since a panel maps numbers to words.
STATES = {
    1: ("up", "green"),
    2: ("starting", "blue"),
    3: ("unproven", "yellow"),
    4: ("stopped", "orange"),
    5: ("unreachable", "red"),
    6: ("hung", "dark-red"),
}


def state(select: str) -> str:
    """The health agent's word for each engine, as its number."""
    parts = (f'{number} * vllm_health_state{{{select}, state="{word}"}}' for number, (word, _) in STATES.items())
    return f"max by (host, instance) ({' or '.join(parts)})"


def quantiles(histogram: str, select: str, by: str = "") -> dict[str, str]:
    """Median, 95th and 99th percentile of a histogram, for each value of label ``by``."""
    labels = f"{by}, le" if by else "le"
    legend = f"{{{{{by}}}}} " if by else ""
    return {
        f"{legend}p{number}": f"histogram_quantile({number / 100}, "
        f"sum by ({labels}) (rate({histogram}_bucket{{{select}}}{RATE})))"
        for number in (50, 95, 99)
    }


def share(part: str, whole: str, by: str = "") -> str:
    """Part of the whole, 0 to 1; 0 where there is no whole."""
    labels = f" by ({by})" if by else ""
    return f"sum{labels} (rate({part}{RATE})) / clamp_min(sum{labels} (rate({whole}{RATE})), 1e-9)"


def rate(series: str, by: str) -> str:
    """Events a second, summed up by these labels."""
    return f"sum by ({by}) (rate({series}{RATE}))"

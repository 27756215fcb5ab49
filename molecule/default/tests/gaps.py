"""Whether a gateway passes on each token when it comes, by what tools/bench_latency.py has measured."""

from __future__ import annotations

from typing import Any


def judge_gaps(found: dict[str, Any]) -> None:
    """Less than 1 ms is added to the gap between two tokens, at the median, and not half of it is taken away.

    A gateway that collects tokens passes them on together: most gaps are then near 0, so that their median falls to
    next to nothing. Between two engines that others use, too, a median differs by a millisecond or two by chance.
    """
    added = found["gateway"]["added"]["gap"]
    assert added["p50"] < 1.0, found
    assert added["ratio"] > 0.5, found

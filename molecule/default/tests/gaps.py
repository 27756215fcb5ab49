"""Whether a gateway passes on each token when it comes, by what tools/bench_latency.py has measured."""

from __future__ import annotations

from typing import Any


def judge_gaps(found: dict[str, Any]) -> None:
    """Less than 1 ms is added to the gap between two tokens, and none is taken away.

    A gateway that collects tokens passes them on together: most gaps are then near 0, so that their median falls.
    """
    added = found["gateway"]["added"]["gap"]
    assert abs(added["p50"]) < 1.0, found
    assert 0.7 < added["ratio"] < 1.4, found

"""The numbers of a failover drill and the budget they are judged by. Pure functions.

All times are seconds; points in time are on the clock of the client that made the outcomes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ._dual_client import COMPLETED, LOST, TRUNCATED, Attempt, Outcome

ERROR_LIMIT = 5  # distinct errors that are reported; the rest is rarely another cause


@dataclass(frozen=True)
class Timeline:
    """When the fault came and when the target served again; or why it did not."""

    target: str
    fault_at: float
    recovered_at: float | None = None
    not_recovered: str = ""


@dataclass(frozen=True)
class Budget:
    """What a drill may cost. None: no limit, but for ``truncated`` the load's concurrency.

    A dead engine takes the answers with it that are being streamed, and there are never more of
    them than concurrent requests. ``worst_latency`` and ``recovery`` are seconds.
    """

    lost: int = 0
    truncated: int | None = None
    worst_latency: float | None = None
    recovery: float | None = None

    def broken(self, numbers: dict[str, Any], timeline: Timeline, concurrency: int, wanted_after: int) -> list[str]:
        """A sentence with the numbers for each limit that was not kept."""
        sent = numbers["sent"]
        found = []
        if numbers["lost"] > self.lost:
            found.append(f"lost {numbers['lost']} of {sent} requests (budget {self.lost})")
        truncated = concurrency if self.truncated is None else self.truncated
        if numbers["truncated"] > truncated:
            found.append(
                f"cut off {numbers['truncated']} of {sent} answers after their first token (budget {truncated})"
            )
        worst = numbers["latency"]["worst"]
        if self.worst_latency is not None and worst is not None and worst > self.worst_latency:
            found.append(f"the slowest answer took {worst} s (budget {self.worst_latency:g} s)")
        recovery = numbers["seconds_to_recover"]
        if recovery is None:
            found.append(f"{timeline.target} did not serve again: {timeline.not_recovered}")
        elif self.recovery is not None and recovery > self.recovery:
            found.append(f"{timeline.target} served again after {recovery} s (budget {self.recovery:g} s)")
        if recovery is not None and numbers["completed_after"] < wanted_after:
            found.append(f"{numbers['completed_after']} requests completed after the recovery (wanted {wanted_after})")
        return found


def summarise(outcomes: Sequence[Outcome], timeline: Timeline, endpoints: Sequence[str]) -> dict[str, Any]:
    """Counts and times of a whole drill. Latencies are those of completed requests."""
    states = Counter(outcome.state for outcome in outcomes)
    completed = [outcome for outcome in outcomes if outcome.state == COMPLETED]
    by_endpoint = Counter(outcome.endpoint for outcome in completed)
    attempts = [attempt for outcome in outcomes for attempt in outcome.attempts]
    latencies = sorted(outcome.seconds for outcome in completed)
    recovered = timeline.recovered_at
    to_recover = None if recovered is None else round(recovered - timeline.fault_at, 3)
    return {
        "sent": len(outcomes),
        "completed": states[COMPLETED],
        "completed_after": sum(recovered is not None and outcome.finished > recovered for outcome in completed),
        "lost": states[LOST],
        "truncated": states[TRUNCATED],
        "retried": sum(len(outcome.attempts) > 1 for outcome in outcomes),
        "attempts": len(attempts),
        "streamed": sum(outcome.streamed for outcome in outcomes),
        "latency": {
            "p50": percentile(latencies, 50),
            "p99": percentile(latencies, 99),
            "worst": percentile(latencies, 100),
        },
        "seconds_to_eject": _seconds_to_eject(attempts, timeline),
        "seconds_to_recover": to_recover,
        "endpoints": {name: by_endpoint[name] for name in endpoints},
        "errors": _errors(attempts),
    }


def percentile(ordered: Sequence[float], percent: float) -> float | None:
    """The nearest-rank percentile of ascending seconds, to the millisecond; None of nothing."""
    if not ordered:
        return None
    rank = max(math.ceil(percent / 100 * len(ordered)), 1)
    return round(ordered[rank - 1], 3)


def _seconds_to_eject(attempts: Sequence[Attempt], timeline: Timeline) -> float | None:
    """From the fault to the last request that failed at the target before it served again.

    From then on no user noticed the fault. None when no request failed there.
    """
    end = math.inf if timeline.recovered_at is None else timeline.recovered_at
    failures = [
        attempt.finished
        for attempt in attempts
        if attempt.error is not None
        and attempt.endpoint == timeline.target
        and timeline.fault_at <= attempt.finished <= end
    ]
    return round(max(failures) - timeline.fault_at, 3) if failures else None


def _errors(attempts: Sequence[Attempt]) -> list[dict[str, Any]]:
    """The first distinct errors in order of time: where, what kind, how often, and one in full.

    Grouped by kind: the full texts differ in numbers that do not matter.
    """
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for attempt in sorted(attempts, key=lambda one: one.finished):
        error = attempt.error
        if error is not None:
            group = groups.setdefault(
                (attempt.endpoint, error.kind),
                {
                    "endpoint": attempt.endpoint,
                    "kind": error.kind,
                    "count": 0,
                    "first": str(error),
                },
            )
            group["count"] += 1
    return list(groups.values())[:ERROR_LIMIT]

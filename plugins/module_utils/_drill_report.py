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
    """When the fault came and when the target served again; or why it did not.

    ``targets`` are the names in ``target`` where there are several. With ``watched``, ``ejected_at``
    is when the gateway's statistics first showed them out of use (None: never). ``refusals`` are
    those of a gateway without any engine (see _gateway_watch.summarise_refusals).
    """

    target: str
    fault_at: float
    recovered_at: float | None = None
    not_recovered: str = ""
    targets: tuple[str, ...] = ()
    watched: bool = False
    ejected_at: float | None = None
    retried_by_gateway: int | None = None
    refusals: dict[str, Any] | None = None


@dataclass(frozen=True)
class Budget:
    """What a drill may cost. None: no limit, but for ``truncated`` the load's concurrency.

    A dead engine takes the answers with it that are being streamed, and there are never more of
    them than concurrent requests. ``worst_latency``, ``eject``, ``recovery`` and ``refusal`` are
    seconds; ``refusal`` is for one refused request while all engines are down. Requests refused with
    503 at such a time are none of the lost: no gateway could have answered them.
    """

    lost: int = 0
    truncated: int | None = None
    worst_latency: float | None = None
    eject: float | None = None
    recovery: float | None = None
    refusal: float = 5.0

    def broken(self, numbers: dict[str, Any], timeline: Timeline, concurrency: int, wanted_after: int) -> list[str]:
        """A sentence with the numbers for each limit that was not kept."""
        sent = numbers["sent"]
        found = []
        lost = numbers["lost"] - (numbers["refused"] if timeline.refusals is not None else 0)
        if lost > self.lost:
            found.append(f"lost {lost} of {sent} requests (budget {self.lost})")
        truncated = concurrency if self.truncated is None else self.truncated
        if numbers["truncated"] > truncated:
            found.append(
                f"cut off {numbers['truncated']} of {sent} answers after their first token (budget {truncated})"
            )
        worst = numbers["latency"]["worst"]
        if self.worst_latency is not None and worst is not None and worst > self.worst_latency:
            found.append(f"the slowest answer took {worst} s (budget {self.worst_latency:g} s)")
        found += self._broken_eject(numbers, timeline)
        found += self._broken_refusals(timeline)
        recovery = numbers["seconds_to_recover"]
        if recovery is None:
            found.append(f"{timeline.target} did not serve again: {timeline.not_recovered}")
        elif self.recovery is not None and recovery > self.recovery:
            found.append(f"{timeline.target} served again after {recovery} s (budget {self.recovery:g} s)")
        if recovery is not None and numbers["completed_after"] < wanted_after:
            found.append(f"{numbers['completed_after']} requests completed after the recovery (wanted {wanted_after})")
        return found

    def _broken_eject(self, numbers: dict[str, Any], timeline: Timeline) -> list[str]:
        if self.eject is None:
            return []
        eject = numbers["seconds_to_eject"]
        if eject is None:
            never = f"the gateway went on to use {timeline.target} (budget {self.eject:g} s)"
            return [never] if timeline.watched else []
        return (
            [f"{timeline.target} was ejected after {eject} s (budget {self.eject:g} s)"] if eject > self.eject else []
        )

    def _broken_refusals(self, timeline: Timeline) -> list[str]:
        refusals = timeline.refusals
        if refusals is None:
            return []
        if refusals["slowest"] is None:
            return ["no request was refused with HTTP 503 while all engines were down"]
        found = []
        if refusals["improper"]:
            found.append(
                f"found {', '.join(refusals['improper'])} while all engines were down "
                f"(wanted HTTP 503 with Retry-After)"
            )
        if refusals["slowest"] > self.refusal:
            found.append(f"the slowest refusal took {refusals['slowest']} s (budget {self.refusal:g} s)")
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
        "refused": sum(outcome.state == LOST and _status(outcome) == 503 for outcome in outcomes),
        "truncated": states[TRUNCATED],
        "retried": sum(len(outcome.attempts) > 1 for outcome in outcomes),
        "retried_by_gateway": timeline.retried_by_gateway,
        "attempts": len(attempts),
        "streamed": sum(outcome.streamed for outcome in outcomes),
        "latency": {
            "p50": percentile(latencies, 50),
            "p99": percentile(latencies, 99),
            "worst": percentile(latencies, 100),
        },
        "seconds_to_eject": _seconds_to_eject(attempts, timeline),
        "seconds_to_first_success": _seconds_to_first_success(completed, timeline),
        "seconds_to_recover": to_recover,
        "refusals": timeline.refusals,
        "endpoints": {name: by_endpoint[name] for name in endpoints},
        "errors": _errors(attempts),
    }


def percentile(ordered: Sequence[float], percent: float) -> float | None:
    """The nearest-rank percentile of ascending seconds, to the millisecond; None of nothing."""
    if not ordered:
        return None
    rank = max(math.ceil(percent / 100 * len(ordered)), 1)
    return round(ordered[rank - 1], 3)


def _status(outcome: Outcome) -> int | None:
    """HTTP status of the attempt that decided a request that failed; None where there was none."""
    error = outcome.attempts[-1].error
    return error.status if error is not None else None


def _seconds_to_first_success(completed: Sequence[Outcome], timeline: Timeline) -> float | None:
    """From the fault to the first answer to a request that was sent after it."""
    finished = [outcome.finished for outcome in completed if outcome.started >= timeline.fault_at]
    return round(min(finished) - timeline.fault_at, 3) if finished else None


def _seconds_to_eject(attempts: Sequence[Attempt], timeline: Timeline) -> float | None:
    """From the fault until the gateway took the target out of use, where its statistics are watched.

    Else to the last request that failed at the target before it served again: from then on no user
    noticed the fault. None when no request failed there.
    """
    if timeline.watched:
        return None if timeline.ejected_at is None else round(timeline.ejected_at - timeline.fault_at, 3)
    end = math.inf if timeline.recovered_at is None else timeline.recovered_at
    failures = [
        attempt.finished
        for attempt in attempts
        if attempt.error is not None
        and attempt.endpoint in (timeline.targets or (timeline.target,))
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

"""When a client of several equal endpoints sends a request once more, where, and after how long.

The failover drill's client and the reference client (``client/``) both follow this, one with threads and
one with asyncio. So there is no clock, no waiting and no network here, and no other file is needed.

- Requests go round the healthy endpoints. An endpoint that fails leaves the round at once; an answer or
  a passed health check brings it back. When none is healthy, all are tried.
- A failed request moves to an endpoint that it has not tried, at once. One that failed it gets it again only
  after a pause, which ends early when that endpoint comes back.
- After the first piece of output nothing is repeated: the user has seen half an answer.
- A request that the server rejects (4xx other than 408 and 429) would be rejected again.
- A request that an engine took and failed with may be what the engine died of. It gets ``repeats``
  further chances, so that it cannot take down one engine after the other.
- An endpoint that asks for a rest (Retry-After) has it, LONGEST_REST at most or until a health check brings it
  back. A request goes where it may go first.

All times are seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

OVERLOADED = (408, 429)  # rejected for now, and nothing against the request or the endpoint
NOT_TAKEN = (*OVERLOADED, 503)  # turned away before an engine began with it
LONGEST_REST = 60.0  # a server that asks for more guesses: it may be asked again after this


@dataclass(frozen=True)
class Failure:
    """What went wrong with one attempt of a request.

    ``status`` is that of HTTP, or of an error inside an answer. ``reached`` is false when no connection
    was made, so that no engine can have seen the request. ``output`` tells whether any part of the
    answer had arrived.
    """

    status: int | None = None
    reached: bool = True
    output: bool = False

    @property
    def rejected(self) -> bool:
        """Whether the server refused the request itself, which says nothing against the server."""
        return self.status is not None and 400 <= self.status < 500

    @property
    def taken(self) -> bool:
        """Whether an engine may have begun with the request."""
        return self.reached and self.status not in NOT_TAKEN


@dataclass(frozen=True)
class RetryRules:
    """How often, and how long to wait once every endpoint has been tried.

    ``retries`` are the attempts after the first, ``repeats`` those of them that may follow an engine's
    failure. ``jitter`` is the part of a pause, from 0 to 1, by which it may be shorter or longer, so that
    clients that failed together do not come back together. Raises ValueError.
    """

    retries: int = 4
    pauses: tuple[float, ...] = (2.0, 4.0, 8.0, 16.0)
    jitter: float = 0.0
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.retries < 0 or self.repeats < 0 or any(pause < 0 for pause in self.pauses):
            raise ValueError("wanted retries, repeats and pauses of 0 or more")
        if not self.pauses or not 0 <= self.jitter <= 1:
            raise ValueError("wanted at least one pause, and a jitter from 0 to 1")

    def pause(self, number: int, draw: float = 0.5) -> float:
        """Seconds of the pause with this number, from 0; after the last it stays the same.

        ``draw`` is a random number from 0 to 1.
        """
        pause = self.pauses[min(number, len(self.pauses) - 1)]
        return pause * (1 + self.jitter * (2 * draw - 1))

    def may_repeat(self, failures: Sequence[Failure]) -> bool:
        """Whether a request may be sent again after these attempts, oldest first."""
        last = failures[-1]
        if last.output or len(failures) > self.retries:
            return False
        if last.rejected:
            return last.status in OVERLOADED
        return sum(failure.taken for failure in failures) <= self.repeats


def doubling(first: float, count: int) -> tuple[float, ...]:
    """So many pauses, each twice as long as the one before."""
    return tuple(first * 2.0**number for number in range(max(count, 1)))


class Standing:
    """What a client thinks of one endpoint: its circuit breaker, and its place in the round.

    ``events`` counts failures and recoveries. Who begins something notes the number, and what comes of
    it counts only if the number is still the same: otherwise it is old news.
    """

    def __init__(self) -> None:
        self.healthy = True  # until something shows otherwise
        self.turn = 0  # of its last use: the lowest is the next in the round
        self.events = 0
        self.not_before = 0.0  # the moment, on the client's clock, until which it wants to be left alone

    def rest(self, now: float, seconds: float) -> None:
        """Leave it alone for so long, as it asks for."""
        self.not_before = max(self.not_before, now + min(seconds, LONGEST_REST))

    def came_back(self, seen: int) -> bool:
        """Whether it has recovered since it had seen so many events."""
        return self.healthy and self.events != seen

    def mark(self, healthy: bool, seen: int) -> bool:
        """Note what was learnt by something that began at ``seen``; whether it was news."""
        if seen != self.events or (healthy and self.healthy):
            return False
        self.events += 1
        self.healthy = healthy
        if healthy:
            self.not_before = 0.0
        return True


Member = TypeVar("Member", bound=Standing)


def ready(member: Member, tried: Mapping[Member, int], resume: float) -> float:
    """The moment from which a request may ask an endpoint: ``resume``, its next pause's end, where that one failed it.

    ``tried`` are the endpoints that failed it, and how many events each had seen when it was asked.
    """
    waits = member in tried and not member.came_back(tried[member])
    return max(member.not_before, resume if waits else 0.0)


def choose(members: Sequence[Member], tried: Mapping[Member, int], now: float = 0.0, resume: float = 0.0) -> Member:
    """The endpoint for a request: the first that is ready, then not tried yet, then healthy, then whose turn it is."""
    member = min(
        members,
        key=lambda each: (max(now, ready(each, tried, resume)), each in tried, not each.healthy, each.turn),
    )
    member.turn = 1 + max(each.turn for each in members)
    return member


def recovered(tried: Mapping[Member, int]) -> bool:
    """Whether one of the tried endpoints, with their events at that time, has come back since."""
    return any(member.came_back(seen) for member, seen in tried.items())

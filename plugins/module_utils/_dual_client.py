"""A client of several equal endpoints with failover, as the agentic client of the guide behaves.

The rules are in _retry_policy.py. Each endpoint is checked in the background every ``health_interval``
seconds, and the pauses are ``backoff_base`` x 1, 2, 4, 8 seconds.

With a LibraryPolicy it behaves as a client of one door that is built on OpenAI's library.

All times are seconds on the client's clock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from . import _openai
from ._health import Look, check
from ._openai import Completion, ConnectFailed, Endpoint, EndpointError, HttpStatus, Messages
from ._retry_policy import Failure, RetryRules, Standing, choose, doubling, recovered

COMPLETED = "completed"
TRUNCATED = "truncated"  # failed after output had been streamed
LOST = "lost"  # failed without any output, and no retry is left

LIBRARY_PAUSE, LIBRARY_PAUSE_LIMIT = 0.5, 8.0  # of OpenAI's Python library

# transport(endpoint, messages, max_tokens, stream, deadline_seconds); raises EndpointError
Transport = Callable[[Endpoint, Messages, int, bool, float], Completion]


@dataclass(frozen=True)
class RetryPolicy:
    """The guide's numbers: 4 retries after 2, 4, 8, 16 s, health checks every 30 s.

    ``request_timeout`` is the deadline of one attempt, streaming included, and of a health check.
    Raises ValueError.
    """

    retries: int = 4
    backoff_base: float = 2.0
    health_interval: float = 30.0
    request_timeout: float = 60.0
    #: Whether news of a recovery ends a back-off.
    wakes_early: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.retries < 0 or self.backoff_base < 0:
            raise ValueError("wanted retries and backoff_base of 0 or more")
        if self.health_interval <= 0 or self.request_timeout <= 0:
            raise ValueError("wanted a health_interval and a request_timeout above 0 s")

    def backoff(self, number: int) -> float:
        """Seconds of the back-off with this number, counted from 0."""
        return self._rules.pause(number)

    def may_repeat(self, errors: Sequence[EndpointError]) -> bool:
        """Whether a request may be sent again after these failed attempts, oldest first."""
        return self._rules.may_repeat([_failure(error) for error in errors])

    @property
    def _rules(self) -> RetryRules:
        return RetryRules(self.retries, doubling(self.backoff_base, self.retries))


@dataclass(frozen=True)
class LibraryPolicy(RetryPolicy):
    """The further attempts of OpenAI's library, where a client makes them: after a failed connection or a 5xx.

    ``backoff_base`` is for what comes after a lost request alone. The library's pauses vary a little,
    which is left out here, and so is Retry-After. Raises ValueError.
    """

    wakes_early: ClassVar[bool] = False  # it knows nothing of health

    def backoff(self, number: int) -> float:
        return min(LIBRARY_PAUSE * 2.0**number, LIBRARY_PAUSE_LIMIT)

    def may_repeat(self, errors: Sequence[EndpointError]) -> bool:
        error = errors[-1]
        if error.chunks or len(errors) > self.retries:
            return False
        return isinstance(error, ConnectFailed) or (isinstance(error, HttpStatus) and (error.status or 0) >= 500)


@dataclass(frozen=True)
class Attempt:
    """One try of a request at one endpoint."""

    endpoint: str
    started: float
    finished: float
    error: EndpointError | None = None


@dataclass(frozen=True)
class Outcome:
    """How a request ended: COMPLETED, TRUNCATED or LOST. Never without an attempt."""

    state: str
    streamed: bool
    started: float
    finished: float
    attempts: tuple[Attempt, ...]
    completion: Completion | None = None

    @property
    def seconds(self) -> float:
        """From the call to its end, retries and back-offs included."""
        return self.finished - self.started

    @property
    def endpoint(self) -> str:
        """The endpoint that decided the outcome."""
        return self.attempts[-1].endpoint


class SystemTimer:
    """The clock and the waiting of a client; tests bring their own."""

    def now(self) -> float:
        """Seconds on a clock that only goes forward."""
        return time.monotonic()

    def wait(self, condition: threading.Condition, seconds: float) -> None:
        """Wait for a notification, at most so long. The caller holds the condition."""
        condition.wait(seconds)


class _Member(Standing):
    """An endpoint and what the client thinks of it. Guarded by the client's condition."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__()
        self.endpoint = endpoint


class DualEndpointClient:
    """See the module. Thread-safe; as a context manager it runs the background checks.

    ``probe`` says whether an endpoint is well. By default it asks for one token, because a vLLM
    whose engine hangs still answers /health.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        policy: RetryPolicy,
        model: str,
        transport: Transport | None = None,
        probe: Callable[[Endpoint], bool] | None = None,
        timer: SystemTimer | None = None,
    ) -> None:
        self.endpoints = tuple(endpoints)
        self.policy = policy
        self.model = model
        self._members = [_Member(endpoint) for endpoint in self.endpoints]
        self._transport = transport or self._chat
        self._probe = probe or self._serves
        self._timer = timer or SystemTimer()
        self._changed = threading.Condition()
        self._closed = False

    def __enter__(self) -> DualEndpointClient:
        for member in self._members:
            name = f"health of {member.endpoint.name}"
            threading.Thread(target=self._watch, args=(member,), name=name, daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the background checks and wake every back-off; such a request counts as lost."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def healthy(self) -> list[str]:
        """Names of the endpoints that are in use now."""
        with self._changed:
            return [member.endpoint.name for member in self._members if member.healthy]

    def request(self, messages: Messages, max_tokens: int, stream: bool = False) -> Outcome:
        """One chat completion with failover. The outcome says how it ended; nothing is raised."""
        started = self._timer.now()
        attempts: list[Attempt] = []
        tried: dict[_Member, int] = {}  # and how many events each had seen when it was chosen
        backoffs = 0
        while True:
            if len(tried) == len(self._members):
                self._back_off(self.policy.backoff(backoffs), tried)
                backoffs += 1
                if self._closed:
                    return Outcome(LOST, stream, started, self._timer.now(), tuple(attempts))
            attempt, completion = self._attempt(tried, messages, max_tokens, stream)
            attempts.append(attempt)
            state = self._state(attempts)
            if state:
                ended = attempt.finished
                return Outcome(state, stream, started, ended, tuple(attempts), completion)

    def check_health(self, name: str) -> None:
        """Probe one endpoint now, and use or avoid it accordingly."""
        self._check(next(member for member in self._members if member.endpoint.name == name))

    def _attempt(
        self, tried: dict[_Member, int], messages: Messages, max_tokens: int, stream: bool
    ) -> tuple[Attempt, Completion | None]:
        member, seen = self._choose(tried)
        name, begun = member.endpoint.name, self._timer.now()
        timeout = self.policy.request_timeout
        try:
            completion = self._transport(member.endpoint, messages, max_tokens, stream, timeout)
        except EndpointError as error:
            if not _failure(error).rejected:
                self._mark(member, False, seen)
            tried[member] = seen
            return Attempt(name, begun, self._timer.now(), error), None
        self._mark(member, True, seen)
        return Attempt(name, begun, self._timer.now()), completion

    def _state(self, attempts: Sequence[Attempt]) -> str:
        """How a request ends after its latest attempt, or nothing when it is to be retried."""
        errors = [attempt.error for attempt in attempts if attempt.error]
        if len(errors) < len(attempts):
            return COMPLETED
        if errors[-1].chunks:
            return TRUNCATED
        return "" if self.policy.may_repeat(errors) and not self._closed else LOST

    def _choose(self, tried: dict[_Member, int]) -> tuple[_Member, int]:
        with self._changed:
            member = choose(self._members, tried)
            return member, member.events

    def _back_off(self, seconds: float, tried: dict[_Member, int]) -> None:
        """Wait so long, or by the policy until an endpoint has recovered since this request tried it."""
        end = self._timer.now() + seconds
        with self._changed:
            while not self._closed and not (self.policy.wakes_early and recovered(tried)):
                left = end - self._timer.now()
                if left <= 0:
                    return
                self._timer.wait(self._changed, left)

    def _mark(self, member: _Member, healthy: bool, seen: int) -> None:
        with self._changed:
            if member.mark(healthy, seen):
                self._changed.notify_all()

    def _watch(self, member: _Member) -> None:
        while True:
            due = self._timer.now() + self.policy.health_interval
            with self._changed:
                while not self._closed and due > self._timer.now():
                    self._timer.wait(self._changed, due - self._timer.now())
                if self._closed:
                    return
            self._check(member)

    def _check(self, member: _Member) -> None:
        with self._changed:
            seen = member.events
        self._mark(member, self._probe(member.endpoint), seen)

    def _chat(
        self, endpoint: Endpoint, messages: Messages, max_tokens: int, stream: bool, seconds: float
    ) -> Completion:
        return _openai.chat(endpoint, self.model, messages, max_tokens, stream, seconds)

    def _serves(self, endpoint: Endpoint) -> bool:
        # Not the interval: an endpoint is too slow when it is too slow for a request.
        return check(endpoint, Look("serves", self.model, self.policy.request_timeout)).ok


def _failure(error: EndpointError) -> Failure:
    return Failure(error.status, reached=not isinstance(error, ConnectFailed), output=error.chunks > 0)

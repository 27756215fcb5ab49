"""The failover drill: steady load, a fault, and numbers about what the users noticed.

Before the fault anything that is not as it should be is a refusal and touches nothing: a drill
with one endpoint already down would take the service down. After the fault the load goes on until
the target serves again and some requests more; then the numbers are judged by a budget.

All times are seconds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ._drill_report import Budget, Timeline, summarise
from ._dual_client import COMPLETED, LOST, DualEndpointClient, Outcome, RetryPolicy
from ._engine_process import EngineError
from ._health import Look, Probe, check, examine_all, poll
from ._openai import Endpoint


class DrillRefused(Exception):
    """The drill ended before its fault. Nothing was touched but for some requests."""


class Fault(Protocol):
    """Something bad that happens to the target. ``str()`` says what in words."""

    def prepare(self) -> None:
        """See that the fault is possible, touching nothing. Raises EngineError."""

    def inject(self) -> None:
        """Do it. Raises EngineError, and then nothing was done."""

    def pending(self) -> str:
        """Why the target cannot have recovered yet; empty when it is worth a probe."""


@dataclass(frozen=True)
class Plan:
    """How much load, and for how long.

    ``recovery_timeout`` bounds each of the three phases: before the fault, until the target serves
    again, and after it. ``max_requests`` bounds the load whatever happens. Raises ValueError.
    """

    concurrency: int = 4
    max_tokens: int = 32
    requests_before: int = 8
    requests_after: int = 8
    recovery_timeout: float = 600.0
    probe_timeout: float = 30.0
    probe_interval: float = 1.0
    max_requests: int = 20000

    def __post_init__(self) -> None:
        for name in ("concurrency", "max_tokens", "requests_before", "requests_after"):
            if getattr(self, name) < 1:
                raise ValueError(f"wanted {name} of 1 or more, found {getattr(self, name)}")
        if self.recovery_timeout <= 0:
            raise ValueError(f"wanted recovery_timeout above 0, found {self.recovery_timeout:g}")


class Load:
    """Steady load: ``concurrency`` threads, each sending its next request when its last has ended.

    Half of the requests stream. The questions differ, so that caches do not answer for the engine.
    """

    def __init__(self, client: DualEndpointClient, plan: Plan) -> None:
        self.outcomes: list[Outcome] = []
        self.completed = 0
        self.lost = 0
        self._client = client
        self._plan = plan
        self._sent = 0
        self._changed = threading.Condition()
        self._stopping = False
        self._crash: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._work, name=f"load {number}", daemon=True)
            for number in range(plan.concurrency)
        ]

    def start(self) -> None:
        """Begin to send."""
        for thread in self._threads:
            thread.start()

    def wait(self, done: Callable[[], bool], seconds: float) -> bool:
        """Wait until ``done``, at most so long and only while the load runs. Returns ``done``."""
        with self._changed:
            self._changed.wait_for(lambda: done() or bool(self._ended()), seconds)
            return done()

    def pause(self, seconds: float) -> None:
        """Wait so long, or until the load has ended."""
        self.wait(lambda: False, seconds)

    def ended(self) -> str:
        """Why the load has ended by itself, empty while it runs."""
        with self._changed:
            return self._ended()

    def stop(self) -> list[Outcome]:
        """Let the requests under way end by the client's policy and return all outcomes.

        Raises whatever a sending thread died of: it is a defect, never a bad answer.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        if self._crash is not None:
            raise self._crash
        return self.outcomes

    def _ended(self) -> str:
        if self._crash is not None:
            return f"the load broke ({self._crash!r})"
        if self._sent >= self._plan.max_requests:
            return f"the load reached its limit of {self._plan.max_requests} requests"
        return ""

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    if self._stopping or self._ended():
                        return
                    number = self._sent
                    self._sent += 1
                self._send(number)
        except BaseException as crash:
            with self._changed:
                self._crash = crash
        finally:
            with self._changed:
                self._changed.notify_all()

    def _send(self, number: int) -> None:
        question = f"Count upwards from {number}."
        # A round of endpoints plain, then a round streamed. One by one would go in step with the
        # client's round robin, and one endpoint would get all the streams.
        stream = number // len(self._client.endpoints) % 2 == 1
        outcome = self._client.request(question, self._plan.max_tokens, stream)
        with self._changed:
            self.outcomes.append(outcome)
            self.completed += outcome.state == COMPLETED
            self.lost += outcome.state == LOST
            self._changed.notify_all()
            if outcome.state == LOST:
                # A server that refuses at once must not turn steady load into a storm.
                seconds = self._client.policy.backoff_base
                self._changed.wait_for(lambda: self._stopping, seconds)


def run_drill(
    endpoints: Sequence[Endpoint],
    target: Endpoint,
    fault: Fault,
    plan: Plan,
    budget: Budget,
    policy: RetryPolicy,
    model: str | None = None,
) -> dict[str, Any]:
    """The whole drill. Returns its numbers, ``verdict`` (passed, failed) and ``broken`` sentences.

    Raises DrillRefused while nothing has been touched yet.
    """
    names = [endpoint.name for endpoint in endpoints]
    look = Look("serves", model, plan.probe_timeout)
    served = _refuse_unless_ready(endpoints, look, fault)
    with DualEndpointClient(endpoints, policy, served) as client:
        load = Load(client, plan)
        load.start()
        try:
            _refuse_unless_steady(load, client, names, plan)
            timeline = _break_and_await(load, target, fault, plan, look)
        finally:
            outcomes = load.stop()
    numbers = summarise(outcomes, timeline, names)
    broken = budget.broken(numbers, timeline, plan.concurrency, plan.requests_after)
    return {**numbers, "verdict": "failed" if broken else "passed", "broken": broken}


def _refuse_unless_ready(endpoints: Sequence[Endpoint], look: Look, fault: Fault) -> str:
    """The model that all endpoints serve. Raises DrillRefused."""
    if len(endpoints) < 2:
        raise DrillRefused("wanted two endpoints or more to fail over between, found one")
    probes = [list(found.values())[-1] for found in examine_all(endpoints, look)]
    unwell = [probe.reason for probe in probes if not probe.ok]
    if unwell:
        raise DrillRefused(f"wanted every endpoint to serve first, found {'; '.join(unwell)}")
    served = sorted({str(probe.model) for probe in probes})
    if len(served) > 1:
        raise DrillRefused(f"wanted one model on all endpoints, found {', '.join(served)}")
    try:
        fault.prepare()
    except EngineError as error:
        raise DrillRefused(str(error)) from error
    return served[0]


def _refuse_unless_steady(load: Load, client: DualEndpointClient, names: Sequence[str], plan: Plan) -> None:
    """Wait for the requests before the fault. Raises DrillRefused unless all went well."""
    wanted = plan.requests_before
    load.wait(lambda: load.completed >= wanted or load.lost > 0, plan.recovery_timeout)
    avoided = [name for name in names if name not in client.healthy()]
    if load.completed < wanted or load.lost or avoided:
        found = f"{load.completed} completed, {load.lost} lost"
        if avoided:
            found += f", {', '.join(avoided)} avoided by the client after a failure"
        raise DrillRefused(f"wanted {wanted} requests to complete before the fault on healthy endpoints, found {found}")


def _break_and_await(load: Load, target: Endpoint, fault: Fault, plan: Plan, look: Look) -> Timeline:
    """The fault, the recovery and the requests after it. Raises DrillRefused without a fault."""
    fault_at = time.monotonic()
    try:
        fault.inject()
    except EngineError as error:
        raise DrillRefused(str(error)) from error

    def attempt(_left: float) -> Probe:
        pending = fault.pending()
        return Probe("serves", False, 0.0, pending) if pending else check(target, look)

    probe, why = poll(
        attempt,
        lambda found: found.ok,
        plan.recovery_timeout,
        plan.probe_interval,
        load.ended,
        pause=load.pause,
    )
    if not probe.ok:
        return Timeline(target.name, fault_at, None, f"{why}: {probe.reason}")
    recovered_at = time.monotonic()
    wanted = load.completed + plan.requests_after
    load.wait(lambda: load.completed >= wanted, plan.recovery_timeout)
    return Timeline(target.name, fault_at, recovered_at)

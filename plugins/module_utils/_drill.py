"""The failover drill: steady load, a fault, and numbers about what the users noticed.

Before the fault anything that is not as it should be is a refusal and touches nothing: a drill
with one endpoint already down would take the service down. After the fault the load goes on until
the target serves again and some requests more; then the numbers are judged by a budget.

The load goes through the client with failover (``client``), through the gateway by a plain client
(``gateway``: what users of the door notice; it retries as OpenAI's library does, or never), or to the
target alone by one that never retries (``single``: the control, which shows what the fault costs
without failover).

All times are seconds.
"""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ._drill_report import Budget, Timeline, summarise
from ._dual_client import COMPLETED, LOST, DualEndpointClient, LibraryPolicy, Outcome, RetryPolicy
from ._engine_process import EngineError
from ._faults import DeadMan, Fault, NotGuarded, undone
from ._gateway_watch import RefusalWatch, StatisticsWatch, summarise_refusals
from ._health import Look, Probe, check, examine_all, poll
from ._openai import Endpoint

VIA = (CLIENT, GATEWAY, SINGLE) = ("client", "gateway", "single")
PROMPT_WORD = " number"  # one token in the vocabularies of gpt-oss, Llama and Qwen
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class DrillRefused(Exception):
    """The drill ended before its fault. Nothing was touched but for some requests."""


class Interrupted(BaseException):
    """A signal asked the drill to end. No Exception, so that nothing takes it for a failure of its own."""


@dataclass(frozen=True)
class Scene:
    """Who takes part: the engines, those that suffer, and the gateway where the drill is about it.

    ``targets`` are endpoints, or the gateway itself. ``statistics`` is the gateway's CSV page.
    """

    endpoints: Sequence[Endpoint]
    targets: Sequence[Endpoint]
    via: str = CLIENT
    gateway: Endpoint | None = None
    statistics: Endpoint | None = None

    @property
    def loaded(self) -> list[Endpoint]:
        """What the load's client knows of."""
        if self.via == GATEWAY and self.gateway is not None:
            return [self.gateway]
        return list(self.targets if self.via == SINGLE else self.endpoints)

    @property
    def everything_down(self) -> bool:
        """Whether the fault takes down all engines, so that there is nothing to fail over to."""
        return set(self.targets) >= set(self.endpoints)


@dataclass(frozen=True)
class Plan:
    """How much load, and for how long.

    ``recovery_timeout`` bounds each of the three phases: before the fault, until the target serves
    again, and after it. ``max_requests`` bounds the load whatever happens. Each prompt is padded with
    ``prompt_tokens`` words. A client of the gateway makes ``gateway_retries`` further attempts.
    Raises ValueError.
    """

    concurrency: int = 4
    max_tokens: int = 32
    requests_before: int = 8
    requests_after: int = 8
    prompt_tokens: int = 0
    gateway_retries: int = 0
    recovery_timeout: float = 600.0
    probe_timeout: float = 30.0
    probe_interval: float = 1.0
    max_requests: int = 20000

    def __post_init__(self) -> None:
        for name in ("concurrency", "max_tokens", "requests_before", "requests_after"):
            if getattr(self, name) < 1:
                raise ValueError(f"wanted {name} of 1 or more, found {getattr(self, name)}")
        for name in ("prompt_tokens", "gateway_retries"):
            if getattr(self, name) < 0:
                raise ValueError(f"wanted {name} of 0 or more, found {getattr(self, name)}")
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
        question = f"Count upwards from {number}.{PROMPT_WORD * self._plan.prompt_tokens}"
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
    scene: Scene,
    fault: Fault,
    plan: Plan,
    budget: Budget,
    policy: RetryPolicy,
    timer: DeadMan,
    model: str | None = None,
) -> dict[str, Any]:
    """The whole drill. Returns its numbers, ``verdict`` (passed, failed) and ``broken`` sentences.

    Raises DrillRefused while nothing has been touched yet, EngineError where the fault could not be
    undone (``timer`` then tries once more), and Interrupted, undone, after a signal.
    """
    watch = None
    if scene.statistics is not None:
        watch = StatisticsWatch(scene.statistics, [endpoint.name for endpoint in scene.endpoints])
    try:
        with _interruptible():
            outcomes, timeline = _run(scene, fault, plan, policy, timer, model, watch)
    finally:
        fault.close()
        if watch is not None:
            watch.stop()
    numbers = summarise(outcomes, timeline, [endpoint.name for endpoint in scene.loaded])
    broken = budget.broken(numbers, timeline, plan.concurrency, plan.requests_after)
    return {**numbers, "verdict": "failed" if broken else "passed", "broken": broken}


def _run(
    scene: Scene,
    fault: Fault,
    plan: Plan,
    policy: RetryPolicy,
    timer: DeadMan,
    model: str | None,
    watch: StatisticsWatch | None,
) -> tuple[list[Outcome], Timeline]:
    look = Look("serves", model, plan.probe_timeout)
    served = _refuse_unless_ready(scene, look, fault, watch)
    policy = _policy_through(scene.via, policy, plan)
    loaded = [fault.entrance(endpoint) for endpoint in scene.loaded]
    names = [endpoint.name for endpoint in loaded]
    with DualEndpointClient(loaded, policy, served) as client:
        load = Load(client, plan)
        load.start()
        try:
            _refuse_unless_steady(load, client, names, plan)
            with undone(fault, timer):
                timeline = _break_and_await(scene, load, fault, plan, look, watch, served)
        except NotGuarded as error:
            raise DrillRefused(str(error)) from error
        except Interrupted:
            client.close()  # nobody waits for these requests' retries
            raise
        finally:
            outcomes = load.stop()
    return outcomes, timeline


def _policy_through(via: str, policy: RetryPolicy, plan: Plan) -> RetryPolicy:
    """How the load's client goes on after a failure."""
    if via == GATEWAY:
        return LibraryPolicy(**{**dataclasses.asdict(policy), "retries": plan.gateway_retries})
    return dataclasses.replace(policy, retries=0) if via == SINGLE else policy


@contextmanager
def _interruptible() -> Iterator[None]:
    """Within, the first signal raises Interrupted; further ones do not disturb the undoing."""

    def interrupt(number: int, _frame: object) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(signal.Signals(number).name)

    before = [signal.signal(each, interrupt) for each in SIGNALS]
    try:
        yield
    finally:
        for each, handler in zip(SIGNALS, before):
            signal.signal(each, handler)


def _refuse_unless_ready(scene: Scene, look: Look, fault: Fault, watch: StatisticsWatch | None) -> str:
    """The model that all endpoints serve. Raises DrillRefused."""
    if scene.via != SINGLE and len(scene.endpoints) < 2 and scene.gateway not in scene.targets:
        raise DrillRefused("wanted two endpoints or more to fail over between, found one")
    served = _served(scene.endpoints, look)
    try:
        fault.prepare()
    except EngineError as error:
        raise DrillRefused(str(error)) from error
    if watch is not None:
        watch.start()
        # With a relay in front of an engine, the gateway sees that engine only from now on.
        problem, why = poll(lambda _left: watch.missing(), lambda found: not found, look.timeout, 0.1)
        if problem:
            raise DrillRefused(f"wanted the gateway to use every engine first, found {problem} ({why})")
    if scene.gateway is not None:
        _served([scene.gateway], dataclasses.replace(look, model=served))
    return served


def _served(endpoints: Sequence[Endpoint], look: Look) -> str:
    """The model that all of them serve. Raises DrillRefused."""
    probes = [list(found.values())[-1] for found in examine_all(endpoints, look)]
    unwell = [probe.reason for probe in probes if not probe.ok]
    if unwell:
        raise DrillRefused(f"wanted every endpoint to serve first, found {'; '.join(unwell)}")
    served = sorted({str(probe.model) for probe in probes})
    if len(served) > 1:
        raise DrillRefused(f"wanted one model on all endpoints, found {', '.join(served)}")
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
        errors = [attempt.error for outcome in load.outcomes for attempt in outcome.attempts if attempt.error]
        if errors:
            found += f"; the first failure: {errors[0]}"
        raise DrillRefused(f"wanted {wanted} requests to complete before the fault on healthy endpoints, found {found}")


def _break_and_await(
    scene: Scene,
    load: Load,
    fault: Fault,
    plan: Plan,
    look: Look,
    watch: StatisticsWatch | None,
    model: str,
) -> Timeline:
    """The fault, the recovery and the requests after it. Raises DrillRefused without a fault."""
    retried = watch.retried() if watch else 0
    fault_at = time.monotonic()
    try:
        fault.inject()
    except EngineError as error:
        raise DrillRefused(str(error)) from error
    with _refusals_of(scene, model) as refusals:
        recovered_at, why = _await_recovery(scene, load, fault, plan, look, watch)
    if recovered_at is not None:
        wanted = load.completed + plan.requests_after
        load.wait(lambda: load.completed >= wanted, plan.recovery_timeout)
    names = [target.name for target in scene.targets]
    watched = watch is not None and scene.gateway not in scene.targets
    return Timeline(
        ", ".join(names),
        fault_at,
        recovered_at,
        why,
        targets=tuple(names),
        watched=watched,
        ejected_at=watch.ejected_at(names, fault_at) if watch and watched else None,
        retried_by_gateway=watch.retried() - retried if watch else None,
        refusals=summarise_refusals(refusals.found) if refusals else None,
    )


@contextmanager
def _refusals_of(scene: Scene, model: str) -> Iterator[RefusalWatch | None]:
    """Within, a gateway without any engine is asked how it refuses."""
    if scene.via != GATEWAY or scene.gateway is None or not scene.everything_down:
        yield None
        return
    refusals = RefusalWatch(scene.gateway, model)
    refusals.start()
    try:
        yield refusals
    finally:
        refusals.stop()


def _await_recovery(
    scene: Scene, load: Load, fault: Fault, plan: Plan, look: Look, watch: StatisticsWatch | None
) -> tuple[float | None, str]:
    """When all targets served again, and the gateway used them; or None and why they did not."""

    def attempt(_left: float) -> Probe:
        pending = fault.pending()
        if pending:
            return Probe("serves", False, 0.0, pending)
        for target in scene.targets:
            probe = check(target, look)
            if not probe.ok:
                return probe
        missing = watch.missing() if watch else ""
        return Probe("serves", not missing, 0.0, missing)

    probe, why = poll(
        attempt,
        lambda found: found.ok,
        plan.recovery_timeout,
        plan.probe_interval,
        load.ended,
        pause=load.pause,
    )
    return (time.monotonic(), "") if probe.ok else (None, f"{why}: {probe.reason}")

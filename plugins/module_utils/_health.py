"""Three depths of health of a vLLM server, and waiting for one of them.

*alive*
    ``/health`` answers 200. A vLLM whose engine hangs is still alive.
*serves*
    The wanted model is listed and one token was generated before a deadline.
*progresses*
    Tokens come out while requests run. A busy server may let a probe's own request wait until its
    deadline, a hung one lets every request wait: only this depth tells the two apart.

All times are seconds. Nothing here raises for a server that is not well: the verdict is a Probe.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from . import _openai
from ._openai import Endpoint, EndpointError

DEPTHS = ("alive", "serves", "progresses")
CANARY = "Say yes."
WATCH_SECONDS = 10.0  # how long counters may stand still before a canary has to decide
WATCH_INTERVAL = 0.25  # between two looks at the counters

RUNNING = "vllm:num_requests_running"
TOKENS = ("vllm:generation_tokens_total", "vllm:prompt_tokens_total")
# vLLM counts a prompt's tokens when the whole prompt is done. While a long one is being read, only
# the share of the KV cache in use moves.
KV_USAGE = "vllm:kv_cache_usage_perc"

T = TypeVar("T")
Clock = Callable[[], float]
Pause = Callable[[float], object]


def pause_for(seconds: float) -> None:
    """The default pause between two looks at a server: HTTP has nothing to wait on."""
    threading.Event().wait(seconds)


@dataclass(frozen=True)
class Probe:
    """What one look found. ``reason`` is a sentence: what was wanted, found, and where.

    ``seconds`` is how long the look took. Set where they were measured: ``model`` (served name),
    ``ttft_seconds`` (to the canary's first token), ``running`` (requests) and ``tokens`` (rise of
    the token counters while watched).
    """

    depth: str
    ok: bool
    seconds: float
    reason: str
    model: str | None = None
    ttft_seconds: float | None = None
    running: int | None = None
    tokens: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields that were measured, the depth aside."""
        fields = dataclasses.asdict(self)
        return {k: value for k, value in fields.items() if value is not None and k != "depth"}


@dataclass(frozen=True)
class Look:
    """How to look, the same for every endpoint. Raises ValueError.

    ``timeout`` bounds everything one look does, ``watch`` the part of *progresses* that watches
    counters (at most half of what is left). Without ``model`` the first listed one is taken.
    """

    depth: str = "serves"
    model: str | None = None
    timeout: float = 30.0
    max_tokens: int = 1
    watch: float = WATCH_SECONDS
    clock: Clock = time.monotonic
    pause: Pause = pause_for

    def __post_init__(self) -> None:
        if self.depth not in DEPTHS:
            raise ValueError(f"wanted a depth of {', '.join(DEPTHS)}, found {self.depth!r}")
        if self.timeout <= 0 or self.max_tokens < 1:
            raise ValueError(
                f"wanted a timeout above 0 s and max_tokens of 1 or more, "
                f"found {self.timeout:g} s and {self.max_tokens}"
            )


def examine(endpoint: Endpoint, look: Look) -> dict[str, Probe]:
    """Probe *alive* and, if that is well, ``look.depth``. The verdict is the last entry.

    *progresses* does not run *serves* first: on a busy server that alone would fail. It sends the
    same canary itself when the counters do not decide.
    """
    alive = _probe("alive", endpoint, look, _alive)
    if not alive.ok or look.depth == "alive":
        return {"alive": alive}
    prober = _serves if look.depth == "serves" else _progresses
    rest = dataclasses.replace(look, timeout=max(look.timeout - alive.seconds, 0.001))
    return {"alive": alive, look.depth: _probe(look.depth, endpoint, rest, prober)}


def check(endpoint: Endpoint, look: Look) -> Probe:
    """The deepest probe of examine(): of ``look.depth``, or of *alive* if even that failed."""
    return list(examine(endpoint, look).values())[-1]


def examine_all(endpoints: Sequence[Endpoint], look: Look, wait: float = 0.0) -> list[dict[str, Probe]]:
    """Examine all endpoints at the same time, again and again until one round finds all well.

    No new round begins after ``wait`` seconds; with 0 there is one round.
    """
    with ThreadPoolExecutor(max_workers=len(endpoints)) as pool:
        rounds, _why = poll(
            lambda _left: list(pool.map(lambda endpoint: examine(endpoint, look), endpoints)),
            lambda found: all(healthy(probes, look) for probes in found),
            wait,
            clock=look.clock,
            pause=look.pause,
        )
    return rounds


def healthy(probes: dict[str, Probe], look: Look) -> bool:
    """Whether examine() reached the wanted depth and found it well."""
    return look.depth in probes and probes[look.depth].ok


def wait_until(
    endpoint: Endpoint,
    look: Look,
    deadline_seconds: float,
    interval: float = 1.0,
    give_up: Callable[[], str] = lambda: "",
) -> Probe:
    """Check until the endpoint is well, and return the last probe.

    ``deadline_seconds`` is the total, a probe under way included. ``look.pause`` waits between two
    probes and may return early when something happened; ``give_up`` then says in words why there is
    nothing left to wait for (the server's process is gone), or returns an empty string.
    """

    def attempt(left: float) -> Probe:
        return check(endpoint, dataclasses.replace(look, timeout=min(look.timeout, left)))

    probe, why = poll(attempt, lambda found: found.ok, deadline_seconds, interval, give_up, look.clock, look.pause)
    return probe if probe.ok else dataclasses.replace(probe, reason=f"{why}: {probe.reason}")


def poll(
    attempt: Callable[[float], T],
    done: Callable[[T], bool],
    deadline_seconds: float,
    interval: float = 1.0,
    give_up: Callable[[], str] = lambda: "",
    clock: Clock = time.monotonic,
    pause: Pause = pause_for,
) -> tuple[T, str]:
    """Call ``attempt(seconds left)`` until its result is ``done``; at least once.

    Returns the last result and why it is the last: empty when done. No attempt begins with less
    than ``interval`` left: it would only replace the true reason by its own deadline.
    """
    end = clock() + deadline_seconds
    while True:
        result = attempt(max(end - clock(), 0.001))
        if done(result):
            return result, ""
        if end - clock() <= interval:
            return result, f"not within {deadline_seconds:g} s"
        pause(interval)
        why = give_up()
        if why:
            return result, why


class _Unwell(Exception):
    """A probe's bad verdict, in one sentence. ``facts`` are Probe fields measured so far."""

    def __init__(self, reason: str, **facts: Any) -> None:
        super().__init__(reason)
        self.facts = facts


Prober = Callable[[Endpoint, Look, Callable[[], float]], tuple[str, dict[str, Any]]]


def _probe(depth: str, endpoint: Endpoint, look: Look, prober: Prober) -> Probe:
    """Run one prober with a function that tells the seconds it has left, always above zero."""
    started = look.clock()

    def left() -> float:
        seconds = started + look.timeout - look.clock()
        if seconds <= 0:
            raise _Unwell(f"{endpoint}: wanted a verdict within {look.timeout:.3g} s, found none")
        return seconds

    ok = True
    facts: dict[str, Any] = {}
    try:
        reason, facts = prober(endpoint, look, left)
    except _Unwell as unwell:
        ok, reason, facts = False, str(unwell), unwell.facts
    except EndpointError as error:
        ok, reason = False, str(error)
    return Probe(depth, ok, round(look.clock() - started, 3), reason, **facts)


def _alive(endpoint: Endpoint, _look: Look, left: Callable[[], float]) -> tuple[str, dict[str, Any]]:
    _openai.get(endpoint, "/health", left())
    return f"{endpoint} answers /health with 200", {}


def _serves(endpoint: Endpoint, look: Look, left: Callable[[], float]) -> tuple[str, dict[str, Any]]:
    return _canary(endpoint, _listed_model(endpoint, look, left), look, left)


def _progresses(endpoint: Endpoint, look: Look, left: Callable[[], float]) -> tuple[str, dict[str, Any]]:
    """Moving counters prove progress. Where none move (idle, or stuck) a canary decides."""
    model = _listed_model(endpoint, look, left)
    before = now = _counters(endpoint, left)
    end = look.clock() + min(look.watch, left() / 2)  # the rest is the canary's
    while now[RUNNING] > 0 and look.clock() < end:
        look.pause(WATCH_INTERVAL)
        now = _counters(endpoint, left)
        tokens = int(sum(now[name] - before[name] for name in TOKENS))
        facts = {"model": model, "running": int(now[RUNNING]), "tokens": max(tokens, 0)}
        if tokens > 0:
            return f"{endpoint} made {tokens} tokens while it was watched", facts
        if now[KV_USAGE] != before[KV_USAGE]:
            return f"{endpoint} is reading a prompt: its KV cache use moves", facts
    running = int(now[RUNNING])
    facts = {"model": model, "running": running, "tokens": 0}
    try:
        reason, canary = _canary(endpoint, model, look, left)
    except EndpointError as error:
        state = f"{running} running requests without a new token" if running else "an idle engine"
        raise _Unwell(
            f"{endpoint}: wanted tokens to come out, found {state} and a canary that failed: "
            f"{error}; the engine hangs, restart its unit",
            **facts,
        ) from error
    return reason, {**facts, **canary}


def _listed_model(endpoint: Endpoint, look: Look, left: Callable[[], float]) -> str:
    listed = _openai.models(endpoint, left())
    wanted = look.model or (listed[0] if listed else "any model")
    if wanted not in listed:
        found = ", ".join(listed) or "none"
        raise _Unwell(f"{endpoint}: wanted {wanted} in /v1/models, found {found}")
    return wanted


def _canary(endpoint: Endpoint, model: str, look: Look, left: Callable[[], float]) -> tuple[str, dict[str, Any]]:
    answer = _openai.chat(endpoint, model, CANARY, look.max_tokens, True, left())
    ttft = round(answer.ttft_seconds or answer.seconds, 3)
    return f"{endpoint} answers as {model}", {"model": model, "ttft_seconds": ttft}


def _counters(endpoint: Endpoint, left: Callable[[], float]) -> dict[str, float]:
    names = (RUNNING, KV_USAGE, *TOKENS)
    found = _openai.metrics(endpoint, names, left())
    missing = [name for name in names if name not in found]
    if missing:
        raise _Unwell(f"{endpoint}: wanted {', '.join(missing)} in /metrics, found no such series")
    return found

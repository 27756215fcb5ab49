# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""When is an engine out, and when is it to be restarted? The decisions of the health agent, without any I/O.

``/health`` of vLLM answers 200 while its engine hangs, and a busy engine lets a probe wait as long as a hung one does.
What tells the two apart are the series of ``/metrics`` that only the engine itself can move. So:

- Any of them moved since the last look: the engine is well, however long its queue.
- None moved for ``stall_seconds`` while requests run: a canary (a completion of one token) is sent. If it fails, and
  still nothing moved since it began, the engine hangs.
- Nothing runs: nothing can move. A canary every ``idle_canary_interval``; two failures in a row are a hang.
- Nothing runs, and clients stay connected: an engine that hung just then does not know of their requests. A canary
  after ``stall_seconds``; one that had no answer in time is a hang.
- ``/metrics`` does not come in time: that says nothing of the engine, as the API server may be busy. The next look
  waits ``silence_timeout``, and only a server that is silent for all of that hangs.

A Watch takes what was seen of one engine and when, and says what follows as Decisions. A Ledger knows the restarts and
whether there may be one more. All times are seconds; ``now`` is any clock that only goes forward, ``wall`` is the time
since the epoch, as restarts are remembered beyond a boot.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ._health import KV_USAGE, RUNNING, TOKENS

WAITING = "vllm:num_requests_waiting"
#: What only an engine's own steps move (vLLM 0.32 and 0.33): the API server sets these from what the engine reports
#: after a step. While a long prompt is being read no token is counted, but each chunk of it takes KV cache.
SERIES = (
    *(RUNNING, WAITING, KV_USAGE, *TOKENS),
    *("vllm:iteration_tokens_total_count", "vllm:prefix_cache_queries_total", "vllm:num_preemptions_total"),
)
#: Without these, nothing can be said about progress.
NEEDED = (RUNNING, TOKENS[0])

UNPROVEN, UP, HUNG, UNREACHABLE, STARTING, STOPPED = "unproven", "up", "hung", "unreachable", "starting", "stopped"
STATES = (UNPROVEN, UP, HUNG, UNREACHABLE, STARTING, STOPPED)
#: What systemd says of a unit whose engine cannot be expected to answer. Not a fault of the engine.
UNIT_STATES = {
    "activating": STARTING,
    "reloading": STARTING,
    "deactivating": STOPPED,
    "inactive": STOPPED,
    "failed": STOPPED,
}
IDLE_FAILURES = 2  # canaries in a row that an engine without requests may fail


@dataclass(frozen=True)
class Thresholds:
    """When to act, in seconds where nothing else is said. Raises ValueError for a value that cannot work."""

    poll_interval: float = 1.0
    metrics_timeout: float = 2.0
    silence_timeout: float = 10.0
    stall_seconds: float = 3.0
    canary_timeout: float = 4.0
    idle_canary_interval: float = 10.0
    restart_after: float = 30.0
    restart_limit: int = 3
    restart_window: float = 3600.0
    query_of_death_window: float = 120.0
    rise: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            whole = field.name in ("restart_limit", "rise")
            kind = int if whole else (int, float)
            least = 1 if field.name == "rise" else 0
            if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
                wanted = "a whole number" if whole else "a number of seconds"
            elif value < least or (not whole and value == 0):
                wanted = f"{least} or more" if whole else "seconds above zero"
            else:
                continue
            raise ValueError(f"vllm_health_{field.name} is {value!r}: wanted {wanted}, set it so")


class Look(NamedTuple):
    """What one look at an engine found.

    ``kind`` is *answered* (with ``counters``), *blind* (an answer without the series that are needed), *silent* (no
    complete answer in time) or *refused* (nothing listens). ``unit`` is systemd's ActiveState, empty where it was not
    asked; ``drain`` is why an operator wants no new requests here, None where nobody does. ``clients`` are the
    addresses that are connected to the engine's port, the agent's own aside; they matter while nothing runs.
    """

    kind: str
    counters: Mapping[str, float] = {}
    reason: str = ""
    unit: str = ""
    drain: str | None = None
    clients: frozenset[str] = frozenset()


class Canary(NamedTuple):
    """How a canary ended: *ok*, *failed*, or *refused* by the API server, which says nothing of the engine.

    ``late`` tells of a failure that its deadline passed, so that the engine had all of the time.
    """

    kind: str
    reason: str = ""
    seconds: float = 0.0
    late: bool = False


class Decision(NamedTuple):
    """One thing that was decided, for the log.

    ``decision`` is *admit*, *eject*, *state* (out before and after), *drain*, *undrain*, *restart*, *restart_refused*,
    *restart_failed* or *note*.
    """

    decision: str
    instance: str
    state: str
    reason: str


def look_of(counters: Mapping[str, float]) -> Look:
    """The look at an engine whose ``/metrics`` answered with these series."""
    missing = [name for name in NEEDED if name not in counters]
    if missing:
        return Look(
            "blind", reason=f"/metrics has no {' and no '.join(missing)}: is this a version of vLLM that we know?"
        )
    return Look("answered", dict(counters))


class Watch:
    """One engine: its state, and the word that the gateway gets about it."""

    def __init__(self, name: str, thresholds: Thresholds, now: float) -> None:
        self.name = name
        self.thresholds = thresholds
        self.state = UNPROVEN
        self.reason = "not seen at work since the agent started"
        self.since = now
        self.unit = ""
        self.drain: str | None = None
        self.counters: Mapping[str, float] = {}
        self.sees_progress = False
        self.last_progress = now  # when a series last moved, or a canary was answered
        self.canary: Canary | None = None
        self.canaries = {"ok": 0, "failed": 0, "refused": 0}
        self.canary_began: float | None = None
        self.ejections: dict[str, int] = {}
        self.refused_restarts: dict[str, int] = {}
        self.restarts = 0
        self._judged = False  # whether this agent has ever known the state
        self._idle = False
        self._clients: frozenset[str] = frozenset()
        self._waited_for = False  # the same client was connected at this look and at the one before
        self._blind = False
        self._silent = False  # the last look had no answer in time
        self._moving_since: float | None = None  # first of the looks that all saw progress
        self._canary_ended = -math.inf
        self._failures = 0  # of canaries in a row, without progress meanwhile
        self._failed_first = -math.inf  # when the first of them ended
        self._unjudged = ""  # why the last of them failed, until the next look
        self._good = 0
        self._restart_from = now  # since when nothing moved in a hang, or the last try to end it
        self._told: set[str] = set()  # what is said once in an episode

    # What was seen.

    def observe(self, look: Look, began: float, now: float) -> list[Decision]:
        """Take the result of a look that began at ``began``, and what follows from it."""
        decisions = self._drained(look.drain)
        self.unit = look.unit
        patient, self._silent = self._silent, look.kind == "silent"
        moved = self._take(look, now)
        # A unit starts until the gateway sends to it, so an engine that answers before that is judged like any other.
        answers = look.kind in ("answered", "blind")
        if look.unit in UNIT_STATES and not (UNIT_STATES[look.unit] == STARTING and answers):
            return decisions + self._enter(UNIT_STATES[look.unit], f"the unit is {look.unit}", now)
        if look.kind == "refused":
            return decisions + self._enter(UNREACHABLE, look.reason, now)
        if self.state in (UNREACHABLE, STARTING, STOPPED):
            decisions += self._enter(UNPROVEN, "it answers, and no token was seen yet", now)
        if look.kind == "blind" and self._first("blind"):
            decisions.append(self._decide("note", f"hangs cannot be told from load: {look.reason}"))
        if moved and self._moved_enough(now):
            return decisions + self._enter(UP, "tokens come out", now)
        if self._silent and not patient:
            return decisions  # perhaps it was only late
        return decisions + self._judge(began, now)

    def canary_begins(self, now: float) -> None:
        """A canary was sent; there is never more than one under way."""
        self.canary_began = now

    def canary_ends(self, canary: Canary, now: float) -> list[Decision]:
        """Take a canary's result, and what follows from it. A failure is judged at the next look."""
        began, self.canary_began = self.canary_began, None
        self._canary_ended = now
        self.canary = canary
        self.canaries[canary.kind] += 1
        if canary.kind == "failed":
            # Tokens came out while it waited: it only stood in a long queue.
            if began is None or self.last_progress <= began:
                self._failed_first = self._failed_first if self._failures else now
                self._failures += 1
                self._unjudged = canary.reason
                self._good = 0
            return []
        decisions = []
        if canary.kind == "refused":
            if self._first(f"refused {canary.reason}"):
                decisions.append(self._decide("note", f"a canary was turned away and proves nothing: {canary.reason}"))
            # Its unit has completed a canary of its own before it was active.
            proven = self.state == UNPROVEN and self.unit == "active"
        else:
            self.last_progress = now
            self._failures, self._unjudged = 0, ""
            proven = self.state in (UNPROVEN, HUNG)
        if proven:
            self._good += 1
            if self._good >= self.thresholds.rise:
                decisions += self._enter(UP, "a canary was answered" if canary.kind == "ok" else "its unit is up", now)
        return decisions

    # What is to be done.

    def look_seconds(self) -> float:
        """How long the next look may take."""
        return self.thresholds.silence_timeout if self._silent else self.thresholds.metrics_timeout

    def wants_canary(self, now: float) -> bool:
        """Whether to send a canary now."""
        if self.canary_began is not None or self.state in (UNREACHABLE, STARTING, STOPPED):
            return False
        if self.state in (UNPROVEN, HUNG) or self._failures:
            return True
        quiet = now - max(self.last_progress, self._canary_ended)
        unhurried = self._blind or (self._idle and not self._waited_for)
        return quiet >= (self.thresholds.idle_canary_interval if unhurried else self._stall())

    def wants_unit(self, kind: str) -> bool:
        """Whether systemd's view of the unit is needed to judge a look of this kind."""
        return self.state != UP or kind in ("refused", "silent") or self._failures > 0

    def wants_restart(self, now: float) -> bool:
        """Whether the hang has lasted long enough, of a unit that is meant to run."""
        return (
            self.state == HUNG and self.unit == "active" and now - self._restart_from >= self.thresholds.restart_after
        )

    def restarted(self, now: float) -> Decision:
        """The engine is about to be killed, for systemd to start it again."""
        decision = self._decide("restart", f"hung for {now - self.since:.0f} s: {self.reason}")
        self.restarts += 1
        self._restart_from = now
        return decision

    def restart_refused(self, kind: str, reason: str) -> list[Decision]:
        """The restart is not allowed; said and counted once in an episode for each ``kind``."""
        if not self._first(f"restart {kind}"):
            return []
        self.refused_restarts[kind] = self.refused_restarts.get(kind, 0) + 1
        return [self._decide("restart_refused", reason)]

    def restart_failed(self, reason: str) -> Decision:
        """The kill did not work; it is tried again after ``restart_after``."""
        return self._decide("restart_failed", reason)

    # What is said.

    def word(self) -> str | None:
        """The line for HAProxy's agent-check, without its newline. None: nothing is known yet, so keep what was."""
        drained = self.drain is not None
        if self.state == UP:
            return "drain" if drained else "up ready"
        if not self._judged:
            return "drain" if drained else None
        # The space is needed: HAProxy takes "down#..." for a word that it does not know, and changes nothing.
        return ("drain " if drained else "") + f"down #{printable(self.reason)}"

    def status(self, now: float) -> dict[str, Any]:
        """Everything that is known, for a person."""
        return {
            "state": self.state,
            "reason": self.reason,
            "seconds_in_state": round(now - self.since, 1),
            "word": self.word(),
            "drain": self.drain,
            "unit": self.unit,
            "running": self.counters.get(RUNNING),
            "waiting": self.counters.get(WAITING),
            "sees_progress": self.sees_progress,
            "last_progress_seconds": round(now - self.last_progress, 1),
            "canary": self.canary._asdict() if self.canary else None,
            "canaries": dict(self.canaries),
            "ejections": dict(self.ejections),
            "restarts": self.restarts,
            "refused_restarts": dict(self.refused_restarts),
        }

    # Inside.

    def _stall(self) -> float:
        return self.thresholds.stall_seconds

    def _take(self, look: Look, now: float) -> bool:
        """Keep what the look saw; whether a series moved since the last one."""
        self._blind = look.kind == "blind"
        moved = False
        if look.kind == "answered":
            moved = bool(self.counters) and look.counters != self.counters
            self.counters = look.counters
            self.sees_progress = True
        elif look.kind == "blind":
            self.sees_progress = False
        elif look.kind == "refused":
            self.counters = {}  # the next engine there counts from zero, which is no progress
        self._idle = look.kind == "answered" and not look.counters[RUNNING] and not look.counters.get(WAITING)
        if self.canary_began is None:  # else one of the clients is the canary
            self._waited_for = bool(self._clients & look.clients)
            self._clients = look.clients
        if moved:
            self.last_progress = self._restart_from = now  # a hang that is interrupted begins anew
            self._failures, self._unjudged = 0, ""
            self._moving_since = now if self._moving_since is None else self._moving_since
        else:
            self._moving_since = None
        return moved

    def _moved_enough(self, now: float) -> bool:
        """Whether movement alone brings the engine back: at once, but after a hang only when it goes on."""
        if self.state == HUNG:
            return self._moving_since is not None and now - self._moving_since >= self._stall()
        return self.state == UNPROVEN

    def _judge(self, began: float, now: float) -> list[Decision]:
        """Whether the canary that failed means a hang.

        Only a look that began after its end can tell: where the whole host stood still, canary and look of that time
        have both run out, and the engine is well. A look that waits for silence outlasts a canary, and more are sent
        meanwhile: for it the first of those that failed counts.
        """
        if began < (self._failed_first if self._silent else self._canary_ended):
            return []
        failure, self._unjudged = self._unjudged, ""
        # A blind look cannot tell a hang from a queue, so the benefit of the doubt is the engine's.
        if not failure or self._blind or self.state == HUNG:
            return []
        quiet = now - self.last_progress
        certain = self._waited_for and self.canary is not None and self.canary.late
        if self._idle and not certain:
            if self._failures < IDLE_FAILURES:
                return []
            found = f"{self._failures} canaries in a row failed on an idle engine"
        elif quiet >= self._stall():
            clients = " for the clients that are connected" if self._idle else ""
            found = f"no token for {quiet:.0f} s{clients} and the canary failed"
        else:
            return []
        return self._enter(HUNG, f"{found}: {failure}", now)

    def _enter(self, state: str, reason: str, now: float) -> list[Decision]:
        """Change the state; no decision where it is that already."""
        if state == self.state:
            self.reason = reason if state == STOPPED else self.reason
            return []
        before, self.state, self.reason, self.since = self.state, state, reason, now
        self._judged = True
        self._failures, self._unjudged, self._good, self._told = 0, "", 0, set()
        if state == HUNG:
            self._restart_from = now
        if state in (UNPROVEN, HUNG):
            self._moving_since = None
        if state == UNPROVEN:
            self.last_progress = now  # a new engine has its time to show a first token
        if state == UP:
            return [self._decide("admit", reason)]
        if before == UP:
            self.ejections[state] = self.ejections.get(state, 0) + 1
            return [self._decide("eject", reason)]
        return [self._decide("state", reason)]

    def _drained(self, drain: str | None) -> list[Decision]:
        before, self.drain = self.drain, drain
        if (before is None) == (drain is None):
            return []
        return [self._decide("undrain", "its drain file is gone") if drain is None else self._decide("drain", drain)]

    def _first(self, what: str) -> bool:
        first = what not in self._told
        self._told.add(what)
        return first

    def _decide(self, decision: str, reason: str) -> Decision:
        return Decision(decision, self.name, self.state, reason)


def printable(text: str, limit: int = 100) -> str:
    """One line of printable ASCII of at most ``limit`` characters: HAProxy keeps 128, and ends a word at a newline."""
    line = " ".join("".join(char if " " <= char <= "~" else " " for char in text).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


class Ledger:
    """The restarts of all engines of the host, and whether there may be one more.

    ``restarts`` is name to times since the epoch. A time further in the future than its window was written by another
    clock and counts no more.
    """

    def __init__(self, thresholds: Thresholds, restarts: Mapping[str, Sequence[float]] | None = None) -> None:
        self.thresholds = thresholds
        self.restarts = {name: list(times) for name, times in (restarts or {}).items()}

    @classmethod
    def read(cls, thresholds: Thresholds, kept: Mapping[str, Any]) -> Ledger:
        """From what as_dict() gave and a file kept; what is no time in there is left out."""
        found = kept.get("restarts")
        names = found.items() if isinstance(found, dict) else ()
        times = {
            str(name): [time for time in items if isinstance(time, (int, float)) and not isinstance(time, bool)]
            for name, items in names
            if isinstance(items, list)
        }
        return cls(thresholds, times)

    def as_dict(self) -> dict[str, Any]:
        """For a file."""
        return {"restarts": self.restarts}

    def recent(self, name: str, window: float, wall: float) -> list[float]:
        """Restarts of this engine in the last ``window`` seconds."""
        return [time for time in self.restarts.get(name, []) if abs(wall - time) < window]

    def refusal(self, name: str, wall: float) -> tuple[str, str] | None:
        """Why this engine may not be restarted now, as a word for metrics and a sentence; None where it may."""
        limits = self.thresholds
        done = len(self.recent(name, limits.restart_window, wall))
        if done >= limits.restart_limit:
            return "storm", (
                f"{done} restarts in {limits.restart_window:.0f} s, and vllm_health_restart_limit is "
                f"{limits.restart_limit}: look at its journal, then restart the unit by hand"
            )
        for other in sorted(self.restarts):
            if other != name and self.recent(other, limits.query_of_death_window, wall):
                return "query_of_death", (
                    f"{other} was restarted for a hang less than {limits.query_of_death_window:.0f} s ago: the same "
                    f"request may have hung both, and would hang them again"
                )
        return None

    def note(self, name: str, wall: float) -> None:
        """A restart; what no window can reach any more is forgotten."""
        reach = max(self.thresholds.restart_window, self.thresholds.query_of_death_window)
        self.restarts[name] = [*self.recent(name, reach, wall), wall]

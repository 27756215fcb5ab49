# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""The faults of the failover drill, and how each is undone.

A fault that does not end by itself (a stopped process, a drained or stopped engine) is undone three
times over: by the fault itself when its time is up, at the end of the drill whatever happens, and by
a transient timer of systemd where the drill is killed. What systemd repairs anyway (a killed process
of a unit with ``Restart=always``) has nothing to undo.

All times are seconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ._engine_process import (
    EngineError,
    Kill,
    Process,
    find_engine,
    find_server,
    is_alive,
    send_signal,
)
from ._gateway_socket import Place, ServerAddress
from ._host import Runner
from ._http import Endpoint
from ._relay import PASS, RESET, SLOW, STORM503, Relay

DRAIN_DIRECTORY = "/run/nvl-vllm/drain"
DRAIN_REASON = "failover drill"
STOP_SECONDS = 60.0  # what a stop may take before its start is queued
NOT_LOADED = 5  # systemctl's exit status for a unit that is not there
UNDO_MARGIN = 30.0  # the timer waits so much longer than the fault is meant to last

KILL, KILL_SERVER, HANG, STOP, DRAIN = "kill", "kill_server", "hang", "stop", "drain"
GATEWAY_RELOAD, GATEWAY_KILL, BOTH_DOWN = "gateway_reload", "gateway_kill", "both_down"
KINDS = (KILL, KILL_SERVER, HANG, STOP, DRAIN, STORM503, SLOW, RESET, GATEWAY_RELOAD, GATEWAY_KILL, BOTH_DOWN)
#: Of the target's unit; BOTH_DOWN wants the units of all endpoints.
UNIT_KINDS = (KILL, KILL_SERVER, HANG, STOP)
RELAY_KINDS = (STORM503, SLOW, RESET)
GATEWAY_KINDS = (GATEWAY_RELOAD, GATEWAY_KILL)
RELAY_WORDS = {
    STORM503: "HTTP 503 to every request",
    SLOW: "slow answers",
    RESET: "connections reset in the middle of answers",
}

Clock = Callable[[], float]


class NotGuarded(EngineError):
    """There is no timer that would undo the fault. Nothing was done."""


class Fault:
    """Something bad that happens to the target. ``str()`` says what in words.

    ``lasts`` is how long it is meant to last where it needs undoing, ``undo`` the command that does
    it from outside; empty where there is nothing to undo.
    """

    lasts = 0.0
    undo: Sequence[str] = ()

    def prepare(self) -> None:
        """See that the fault is possible, touching nothing. Raises EngineError."""

    def entrance(self, endpoint: Endpoint) -> Endpoint:
        """Where a client of that endpoint is to send its requests, once prepared."""
        return endpoint

    def inject(self) -> None:
        """Do it. Raises EngineError, and then nothing was done."""
        raise NotImplementedError

    def pending(self) -> str:
        """Why the target cannot have recovered yet; empty when it is worth a probe. Ends what is due to end."""
        return ""

    def restore(self) -> None:
        """End the fault if it has not ended; safe to repeat. Raises EngineError."""

    def close(self) -> None:
        """Give back what prepare() took. Called once, at the very end."""


class _KillProcess(Fault):
    """SIGKILL to one process of a unit, which systemd then starts again."""

    what = "process"

    def __init__(self, unit: str, run: Runner, proc: Path = Path("/proc"), kill: Kill = os.kill) -> None:
        self._unit = unit
        self._run = run
        self._proc = proc
        self._kill = kill
        self._killed: Process | None = None

    def __str__(self) -> str:
        return f"SIGKILL to the {self.what} process of {self._unit}"

    def prepare(self) -> None:
        self._signal(0)

    def inject(self) -> None:
        _allow_start(self._run, self._unit)
        self._killed = self._signal(signal.SIGKILL)

    def pending(self) -> str:
        try:
            process = self._find()
        except EngineError as error:
            return str(error)
        return f"{self.what} {process.pid} is still the killed one" if process == self._killed else ""

    def _find(self) -> Process:
        raise NotImplementedError

    def _signal(self, number: int) -> Process:
        process = self._find()
        send_signal(process, number, f"{self.what} {process.pid} of {self._unit}", self._kill)
        return process


class KillEngine(_KillProcess):
    """The engine dies, as by the kernel's OOM killer or a crash. The server then ends by itself."""

    what = "engine"

    def _find(self) -> Process:
        return find_engine(self._unit, self._run, self._proc)


class KillServer(_KillProcess):
    """The unit's main process dies: vLLM's API server, or the gateway's master."""

    what = "main"

    def _find(self) -> Process:
        return find_server(self._unit, self._run, self._proc)


class Hang(Fault):
    """The engine hangs: SIGSTOP, then SIGCONT after ``seconds``.

    Where a watchdog kills the stopped process first, its successor is the recovery.
    """

    def __init__(
        self,
        unit: str,
        run: Runner,
        seconds: float,
        proc: Path = Path("/proc"),
        kill: Kill = os.kill,
        clock: Clock = time.monotonic,
    ) -> None:
        self.lasts = seconds
        # Of the unit, not of the process id, which may be another process by then.
        self.undo = ("systemctl", "kill", "--signal=SIGCONT", "--", unit)
        self._unit = unit
        self._run = run
        self._proc = proc
        self._kill = kill
        self._clock = clock
        self._find = find_engine
        self._stopped: Process | None = None
        self._end = 0.0

    def __str__(self) -> str:
        return f"SIGSTOP to the engine process of {self._unit} for {self.lasts:g} s"

    def prepare(self) -> None:
        try:
            process = self._process()
        except EngineError:
            self._find = find_server  # an engine inside its server has no process of its own
            process = self._process()
        self._signal(process, 0)

    def inject(self) -> None:
        process = self._process()
        self._end = self._clock() + self.lasts
        # Before it is: a signal that ends the drill in between would leave it stopped. A SIGCONT too many does no harm.
        self._stopped = process
        try:
            self._signal(process, signal.SIGSTOP)
        except EngineError:
            self._stopped = None
            raise

    def pending(self) -> str:
        if self._stopped is None:
            return ""
        if is_alive(self._stopped, self._proc):
            if self._clock() < self._end:
                return f"engine {self._stopped.pid} of {self._unit} is stopped on purpose"
            self.restore()
            return ""
        try:
            self._process()
        except EngineError as error:
            return str(error)
        return ""

    def restore(self) -> None:
        if self._stopped is not None and is_alive(self._stopped, self._proc):
            self._signal(self._stopped, signal.SIGCONT)
        self._stopped = None

    def _process(self) -> Process:
        return self._find(self._unit, self._run, self._proc)

    def _signal(self, process: Process, number: int) -> None:
        send_signal(process, number, f"engine {process.pid} of {self._unit}", self._kill)


class Stop(Fault):
    """An operator stops the unit, which may end its requests, and starts it once it has stopped."""

    # While the unit is still stopping, a start waits in systemd's queue: too early does no harm.
    lasts = STOP_SECONDS

    def __init__(self, unit: str, run: Runner) -> None:
        self.undo = ("systemctl", "--no-block", "start", "--", unit)
        self._unit = unit
        self._run = run
        self._stopping = False
        self._stopped_run = ""  # systemd's id of the run that was stopped

    def __str__(self) -> str:
        return f"systemctl stop {self._unit}, then start"

    def prepare(self) -> None:
        state, _run_id = self._look()
        if state != "active":
            raise EngineError(f"wanted {self._unit} active, found {state}; see `systemctl status {self._unit}`")

    def inject(self) -> None:
        self._stopped_run = self._look()[1]
        _allow_start(self._run, self._unit)
        self._stopping = True
        _systemctl(self._run, "--no-block", "stop", "--", self._unit)

    def pending(self) -> str:
        try:
            state, run_id = self._look()
        except EngineError as error:
            return str(error)
        if state in ("inactive", "failed"):
            self.restore()
            return f"{self._unit} has stopped ({state}) and is to start"
        if run_id == self._stopped_run:
            return f"{self._unit} still stops ({state})"
        self._stopping = False  # started, by whomever
        return "" if state == "active" else f"{self._unit} is {state}"

    def restore(self) -> None:
        if self._stopping:
            _systemctl(self._run, "--no-block", "start", "--", self._unit)
            self._stopping = False

    def _look(self) -> tuple[str, str]:
        """ActiveState and InvocationID."""
        shown = _systemctl(self._run, "show", "-p", "ActiveState", "-p", "InvocationID", "--", self._unit)
        found = dict(line.partition("=")[::2] for line in shown.splitlines())
        return found.get("ActiveState", "unknown"), found.get("InvocationID", "")


class Drain(Fault):
    """An operator drains the engine: its drain file, for ``seconds``."""

    def __init__(
        self,
        name: str,
        seconds: float,
        directory: str = DRAIN_DIRECTORY,
        clock: Clock = time.monotonic,
    ) -> None:
        self.lasts = seconds
        self._path = Path(directory) / name
        self.undo = ("rm", "-f", "--", str(self._path))
        self._clock = clock
        self._ours = False
        self._end = 0.0

    def __str__(self) -> str:
        return f"{self._path} for {self.lasts:g} s"

    def prepare(self) -> None:
        if self._path.exists():
            raise EngineError(f"wanted no {self._path}, found that {self._path.name} is drained already; remove it")

    def inject(self) -> None:
        self._end = self._clock() + self.lasts
        self._ours = True  # before it is: a signal that ends the drill in between would leave it there
        try:
            self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            with self._path.open("x") as stream:
                stream.write(DRAIN_REASON + "\n")
        except OSError as error:
            if not isinstance(error, FileExistsError):
                with contextlib.suppress(OSError):
                    self._path.unlink()
            self._ours = False
            raise EngineError(f"wanted to write {self._path}, found {error.strerror}; run the task as root") from error

    def pending(self) -> str:
        if self._ours and self._clock() < self._end:
            return f"{self._path.name} is drained on purpose"
        self.restore()
        return ""

    def restore(self) -> None:
        if self._ours:
            self._path.unlink(missing_ok=True)  # the unit's own start removes it, too
            self._ours = False


class Relayed(Fault):
    """What goes between client and engine is disturbed for ``seconds`` by a relay in this process.

    A gateway is told to look for the engine there for that time: ``door`` is its address of the target, ``unit`` the
    gateway's, whose reload undoes it from outside.
    """

    def __init__(
        self,
        kind: str,
        target: Endpoint,
        seconds: float,
        door: ServerAddress | None = None,
        unit: str = "",
        clock: Clock = time.monotonic,
    ) -> None:
        self.lasts = seconds
        self.undo = ("systemctl", "reload", "--", unit) if door else ()
        self._kind = kind
        self._target = target
        self._door = door
        self._clock = clock
        self._relay = Relay(target)
        self._home: Place | None = None  # where the gateway looked before
        self._end = 0.0

    def __str__(self) -> str:
        return f"{RELAY_WORDS[self._kind]} in front of {self._target.name} for {self.lasts:g} s"

    def prepare(self) -> None:
        if self._door:
            self._door.look()
        try:
            self._relay.start()
        except OSError as error:
            raise EngineError(f"wanted a port for the relay to {self._target.name}, found {error.strerror}") from error

    def entrance(self, endpoint: Endpoint) -> Endpoint:
        if endpoint != self._target:
            return endpoint
        return Endpoint(endpoint.name, f"http://127.0.0.1:{self._relay.port}", endpoint.api_key)

    def inject(self) -> None:
        self._end = self._clock() + self.lasts
        self._relay.mode = self._kind
        if self._door:
            self._home = self._door.look()
            self._door.move(("127.0.0.1", self._relay.port))

    def pending(self) -> str:
        if self._clock() < self._end:
            return f"{self} lasts"
        self.restore()
        return ""

    def restore(self) -> None:
        self._relay.mode = PASS
        if self._door and self._home:
            self._door.move(self._home)
            self._home = None

    def close(self) -> None:
        self._relay.close()


class GatewayReload(Fault):
    """The gateway takes its configuration again."""

    def __init__(self, unit: str, run: Runner) -> None:
        self._unit = unit
        self._run = run

    def __str__(self) -> str:
        return f"systemctl reload {self._unit}"

    def prepare(self) -> None:
        find_server(self._unit, self._run)

    def inject(self) -> None:
        _systemctl(self._run, "reload", "--", self._unit)


class AllOf(Fault):
    """Several faults at once, none of which needs undoing."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self._faults = tuple(faults)

    def __str__(self) -> str:
        return " and ".join(map(str, self._faults))

    def prepare(self) -> None:
        for fault in self._faults:
            fault.prepare()

    def inject(self) -> None:
        self.prepare()  # all or none
        for fault in self._faults:
            fault.inject()

    def pending(self) -> str:
        return "; ".join(filter(None, (fault.pending() for fault in self._faults)))


class DeadMan:
    """A transient timer of systemd that undoes a fault should the drill not live to do it."""

    def __init__(self, run: Runner, name: str) -> None:
        self._run = run
        self._name = name

    def arm(self, command: Sequence[str], seconds: float) -> None:
        """Have the command run after so long. Raises NotGuarded."""
        timer = [f"--unit={self._name}", f"--on-active={seconds:.0f}s", "--timer-property=AccuracySec=1s"]
        status, out, err = self._run(["systemd-run", "--collect", "--quiet", *timer, *command])
        if status != 0:
            raise NotGuarded(
                f"wanted a timer of systemd that undoes the fault should the drill be killed, "
                f"found exit status {status} of systemd-run: {' '.join((err or out).split())}"
            )

    def cancel(self) -> None:
        """The fault is undone. Raises EngineError."""
        command = ["systemctl", "stop", "--", f"{self._name}.timer"]
        status, out, err = self._run(command)
        if status not in (0, NOT_LOADED):  # it has done its work and is gone
            raise EngineError(_failed(command, status, out, err))


@contextlib.contextmanager
def undone(fault: Fault, timer: DeadMan) -> Iterator[None]:
    """Within, the fault may be injected; after, it has ended. Raises EngineError, at first NotGuarded.

    Where the fault cannot be ended, the timer stays and tries it once more.
    """
    if fault.undo:
        timer.arm(fault.undo, fault.lasts + UNDO_MARGIN)
    try:
        yield
    finally:
        fault.restore()
        if fault.undo:
            timer.cancel()


def _allow_start(run: Runner, unit: str) -> None:
    """Have systemd count the unit's starts from zero. Raises EngineError.

    A few drills in a row would otherwise use up its start limit, and the next one would leave the unit failed.
    """
    _systemctl(run, "reset-failed", "--", unit)


def _systemctl(run: Runner, *arguments: str) -> str:
    """What it prints. Raises EngineError where it fails."""
    command = ["systemctl", *arguments]
    status, out, err = run(command)
    if status != 0:
        raise EngineError(_failed(command, status, out, err))
    return out.strip()


def _failed(command: Sequence[str], status: int, out: str, err: str) -> str:
    return f"wanted `{' '.join(command)}` to succeed, found exit status {status}: {' '.join((err or out).split())}"

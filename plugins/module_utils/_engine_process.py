"""The engine process of a vLLM systemd unit: finding it, killing it, knowing its successor.

A vLLM server is an API server (the unit's main process) and, below it, the engine that does the
work in a process of its own. Linux only; reads /proc, asks systemctl.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ._host import Runner

ENGINE_NAME = "VLLM::EngineCore"
COMM_LIMIT = 15  # the kernel keeps that many characters of a process' name


class EngineError(Exception):
    """The engine process cannot be found or may not be signalled."""


@dataclass(frozen=True)
class Engine:
    """One engine process. The start time (clock ticks since boot) tells it from a reused pid."""

    pid: int
    started: int


def main_pid(unit: str, run: Runner) -> int:
    """Process id of the unit's main process. Raises EngineError."""
    status, out, err = run(["systemctl", "show", "-p", "MainPID", "--value", "--", unit])
    value = out.strip()
    if status != 0 or not value.isdigit():
        raise EngineError(
            f"wanted the main process of {unit} from systemctl, found exit status {status}: "
            f"{' '.join((err or out).split())}"
        )
    if value == "0":
        raise EngineError(
            f"wanted {unit} running on this host, found no main process; "
            f"check the unit's name and `systemctl status {unit}`"
        )
    return int(value)


def find_engine(unit: str, run: Runner, proc: Path = Path("/proc")) -> Engine:
    """The live engine below the unit's main process; of several the oldest. Raises EngineError."""
    main = main_pid(unit, run)
    processes = _processes(proc)
    family = [main]
    for pid in family:  # grows while it is walked: children, grandchildren, ...
        family += [child for child, (parent, _started) in processes.items() if parent == pid]
    engines = [Engine(pid, processes[pid][1]) for pid in family if pid in processes and _is_engine(proc / str(pid))]
    if not engines:
        raise EngineError(
            f"wanted a process named {ENGINE_NAME} below {unit} (main process {main}), "
            f"found {len(family) - 1} descendants and none of that name; is it still starting?"
        )
    return min(engines, key=lambda engine: (engine.started, engine.pid))


class KillEngine:
    """The fault "the engine dies": SIGKILL, as the kernel's OOM killer or a crash would do."""

    def __init__(
        self,
        unit: str,
        run: Runner,
        proc: Path = Path("/proc"),
        kill: Callable[[int, int], None] = os.kill,
    ) -> None:
        self._unit = unit
        self._run = run
        self._proc = proc
        self._kill = kill
        self._killed: Engine | None = None

    def __str__(self) -> str:
        return f"SIGKILL to the engine process of {self._unit}"

    def prepare(self) -> None:
        """Find the engine and see that it may be signalled, no more. Raises EngineError."""
        self._signal(0)

    def inject(self) -> None:
        """Kill the engine that runs now. Raises EngineError."""
        self._killed = self._signal(signal.SIGKILL)

    def pending(self) -> str:
        """What is still missing for a recovery, empty when a new engine runs."""
        try:
            engine = self._find()
        except EngineError as error:
            return str(error)
        return f"engine {engine.pid} is still the killed one" if engine == self._killed else ""

    def _find(self) -> Engine:
        return find_engine(self._unit, self._run, self._proc)

    def _signal(self, number: int) -> Engine:
        engine = self._find()
        try:
            self._kill(engine.pid, number)
        except PermissionError as error:
            raise EngineError(
                f"wanted to signal engine {engine.pid} of {self._unit}, found no permission; "
                f"run the task as root (become: true)"
            ) from error
        except ProcessLookupError as error:
            raise EngineError(f"engine {engine.pid} of {self._unit} ended by itself before it was signalled") from error
        return engine


def _processes(proc: Path) -> dict[int, tuple[int, int]]:
    """Parent and start time of every process that is not a zombie."""
    found = {}
    for stat in proc.glob("[0-9]*/stat"):
        try:
            # The name is in parentheses and may itself hold spaces and parentheses.
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended while we looked
        if fields and fields[0] != "Z":
            found[int(stat.parent.name)] = (int(fields[1]), int(fields[19]))
    return found


def _is_engine(process: Path) -> bool:
    try:
        name = (process / "comm").read_text().strip()
        title = (process / "cmdline").read_bytes().decode("utf-8", "replace")
    except OSError:
        return False
    return title.startswith(ENGINE_NAME) or name.startswith(ENGINE_NAME[:COMM_LIMIT])

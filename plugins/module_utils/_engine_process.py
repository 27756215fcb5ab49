"""The processes of a systemd unit: finding vLLM's engine or server, signalling it, knowing its successor.

A vLLM server is an API server (the unit's main process) and, below it, the engine that does the
work in a process of its own. Linux only; reads /proc, asks systemctl.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ._host import Runner

ENGINE_NAME = "VLLM::EngineCore"
COMM_LIMIT = 15  # the kernel keeps that many characters of a process' name

#: Sends a signal to a process id, as os.kill does.
Kill = Callable[[int, int], None]


class EngineError(Exception):
    """A process or unit is not what the drill needs, or may not be signalled."""


@dataclass(frozen=True)
class Process:
    """One process. The start time (clock ticks since boot) tells it from a reused pid."""

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


def find_server(unit: str, run: Runner, proc: Path = Path("/proc")) -> Process:
    """The unit's main process. Raises EngineError."""
    main = main_pid(unit, run)
    processes = _processes(proc)
    if main not in processes:
        raise EngineError(f"wanted the main process {main} of {unit} alive, found that it has ended; is it restarting?")
    return Process(main, processes[main][1])


def find_engine(unit: str, run: Runner, proc: Path = Path("/proc")) -> Process:
    """The live engine below the unit's main process; of several the oldest. Raises EngineError."""
    main = main_pid(unit, run)
    processes = _processes(proc)
    family = [main]
    for pid in family:  # grows while it is walked: children, grandchildren, ...
        family += [child for child, (parent, _started) in processes.items() if parent == pid]
    engines = [Process(pid, processes[pid][1]) for pid in family if pid in processes and _is_engine(proc / str(pid))]
    if not engines:
        raise EngineError(
            f"wanted a process named {ENGINE_NAME} below {unit} (main process {main}), "
            f"found {len(family) - 1} descendants and none of that name; is it still starting?"
        )
    return min(engines, key=lambda engine: (engine.started, engine.pid))


def is_alive(process: Process, proc: Path = Path("/proc")) -> bool:
    """Whether exactly this process still runs (or is stopped); a zombie does not."""
    return _processes(proc).get(process.pid, (0, -1))[1] == process.started


def send_signal(process: Process, number: int, what: str, kill: Kill = os.kill) -> None:
    """Signal it; ``what`` names it in messages. Raises EngineError."""
    try:
        kill(process.pid, number)
    except PermissionError as error:
        raise EngineError(
            f"wanted to signal {what}, found no permission; run the task as root (become: true)"
        ) from error
    except ProcessLookupError as error:
        raise EngineError(f"{what} ended by itself before it was signalled") from error


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

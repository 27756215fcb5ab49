# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Before, while and after an engine starts: what ``vllm@NAME.service`` asks of its helper.

vLLM has no readiness protocol for systemd, two engines that profile memory at the same time
mis-size each other (vllm#55827), and GPU memory is given back seconds after a process has ended. So
the unit runs this helper

``prepare`` (ExecStartPre)
    backs off after failed starts, waits for the host's other engines to finish theirs, and for the
    memory of its GPUs;
``ready`` (ExecStartPost)
    holds the start job until the engine has answered a completion, and the gateway, where there is one, uses it;
``leave`` (ExecStop)
    has the gateway, where there is one, send nothing more before the engine is asked to stop;
``stopped`` (ExecStopPost)
    gives the turn to start to the next one.

``prepare`` also records a fingerprint of everything the engine is started from. Whether a running
engine is what the files on disk say is then a comparison, not a guess from time stamps.

The helper runs as root with the unit's environment. Its state lies in ``/run/nvl-vllm``.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import math
import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from . import _openai
from ._calibration import CALIBRATION, keep, parse, read_settings
from ._gateway_watch import Server, parse_statistics
from ._health import Look, pause_for, wait_until
from ._host import Runner, read_text
from ._http import Endpoint, EndpointError
from ._json_file import read_object, write_object

STATE = "/run/nvl-vllm"
CONFIG = "/etc/vllm"
UNITS = "/etc/systemd/system"
LONGEST_BACK_OFF = 60.0
GPU_RELEASE_SECONDS = 90.0
#: Statistics of this host's gateway as CSV; nothing listens there where it has none.
GATEWAY = "http://127.0.0.1:8404/;csv"
#: The gateway asks the health agent once a second whether an engine is being drained.
LEAVE_SECONDS = 5.0
#: What the gateway sent just before it let go has arrived in the engine by then, whatever that has to do.
ARRIVE_SECONDS = 2.0
#: Its own check passes twice, a second apart, and the health agent's word comes on top.
RETURN_SECONDS = 15.0
#: What this helper writes into a drain file; another text is an operator's, whose file is left alone.
LEAVING = "the unit stops\n"


class NotReady(Exception):
    """Why an engine cannot start now; the text goes to the journal."""


@dataclass(frozen=True)
class Paths:
    """Where things are; tests put them elsewhere."""

    state: str = STATE
    config: str = CONFIG
    units: str = UNITS
    calibration: str = CALIBRATION


def fingerprint(name: str, root: str, model_path: str, paths: Paths = Paths()) -> str:
    """SHA-256 over all that an engine is started from.

    Its configuration, its environment, its unit with all overrides, the release that ``current``
    points to, and the checkpoint's files by name, size and modification time. A file that is not
    there counts as such.
    """
    digest = hashlib.sha256()
    for path in (
        f"{paths.config}/{name}.yaml",
        f"{paths.config}/{name}.env",
        f"{paths.units}/vllm@.service",
        *sorted(glob.glob(f"{paths.units}/vllm@.service.d/*.conf")),
        *sorted(glob.glob(f"{paths.units}/vllm@{name}.service.d/*.conf")),
    ):
        digest.update(f"\0{path}\0".encode())
        try:
            with open(path, "rb") as stream:
                digest.update(stream.read())
        except FileNotFoundError:
            digest.update(b"absent")
    digest.update(os.path.realpath(f"{root}/current").encode())
    for folder, _, names in sorted(os.walk(os.path.realpath(model_path))):
        for entry in sorted(names):
            digest.update(f"\0{folder}/{entry} ".encode())
            try:
                stat = os.stat(os.path.join(folder, entry))
                digest.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
            except FileNotFoundError:  # a link to nothing
                digest.update(b"absent")
    return digest.hexdigest()


def read_state(name: str, paths: Paths = Paths()) -> dict[str, Any]:
    """What the last start noted, or nothing.

    ``fingerprint``; ``release`` and ``model``, the real paths that it was started from; and
    ``failed_starts`` since the last good one.
    """
    return read_object(f"{paths.state}/{name}.json")


def write_state(name: str, state: Mapping[str, Any], paths: Paths = Paths()) -> None:
    """Replace the state of one instance."""
    write_object(f"{paths.state}/{name}.json", state)


def _open_directory(path: str) -> None:
    """Make it, and let all look into it whatever the unit's umask: engines look for their drain file."""
    os.makedirs(path, exist_ok=True)
    os.chmod(path, 0o755)


def back_off_seconds(failed_starts: int) -> float:
    """None before the first try, then 2, 4, 8 ... up to a minute."""
    return min(2.0**failed_starts, LONGEST_BACK_OFF) if failed_starts else 0.0


def count_start(name: str, now: str, paths: Paths = Paths(), **started_from: str) -> int:
    """Record a start and return how many failed before it. Changed inputs begin at zero again.

    ``now`` is the fingerprint; ``started_from`` is recorded along with it.
    """
    state = read_state(name, paths)
    failed = state.get("failed_starts", 0) if state.get("fingerprint") == now else 0
    write_state(name, {**started_from, "fingerprint": now, "failed_starts": failed + 1}, paths)
    return failed


class Turn:
    """The host's one turn to start. Held from ``prepare`` to ``ready`` or ``stopped``.

    systemd runs these as separate processes, so no process can hold a lock throughout; the holder
    stands in a file instead. A holder older than ``longest`` seconds (or of another boot, as the
    file is in /run) is gone: systemd itself ends a start that takes longer.
    """

    def __init__(self, name: str, longest: float, paths: Paths = Paths()) -> None:
        self.name = name
        self.longest = longest
        self.directory = paths.state

    @contextmanager
    def _holder(self) -> Iterator[dict[str, object]]:
        """The holder as a dictionary that is written back, under a lock on the file."""
        _open_directory(self.directory)
        with open(f"{self.directory}/turn", "a+", encoding="utf-8") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            stream.seek(0)
            text = stream.read()
            holder: dict[str, object] = json.loads(text) if text else {}
            yield holder
            stream.seek(0)
            stream.truncate()
            stream.write(json.dumps(holder) if holder else "")

    def take(self) -> str:
        """Take the turn where it is free; the name of the holder, which is then one's own."""
        with self._holder() as holder:
            since = holder.get("since", 0.0)
            age = time.monotonic() - (since if isinstance(since, float) else 0.0)
            if not holder or holder.get("name") == self.name or not 0 <= age < self.longest:
                holder.update(name=self.name, since=time.monotonic())
            return str(holder["name"])

    def give(self) -> None:
        """Give the turn back where it is one's own."""
        with self._holder() as holder:
            if holder.get("name") == self.name:
                holder.clear()


def wanted_mib(csv: str, utilization: float) -> list[tuple[int, int]]:
    """(free, wanted) MiB of each GPU, as vLLM's own check at start computes them.

    ``csv`` is the answer to ``--query-gpu=memory.total,memory.reserved,memory.free``. vLLM wants
    ceil(total as CUDA sees it * gpu_memory_utilization); CUDA sees total less reserved. Raises
    NotReady where the answer is anything else, such as ``[N/A]``.
    """
    result = []
    for line in csv.strip().splitlines():
        try:
            total, reserved, free = (int(field) for field in line.split(","))
        except ValueError:
            raise NotReady(f"nvidia-smi says {line!r}, wanted total, reserved and free MiB of a GPU") from None
        result.append((free, math.ceil((total - reserved) * utilization)))
    return result


def holders(gpus: str, run: Runner) -> str:
    """The programs that hold memory of the GPUs, for a person; those of other containers have no name here."""
    query = ["--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader,nounits"]
    rows = [line.split(",") for line in run(["nvidia-smi", f"--id={gpus}", *query])[1].splitlines()]
    named = [f"{row[1].strip()}, process {row[0].strip()}, {row[2].strip()} MiB" for row in rows if len(row) == 3]
    return "; ".join(named) or "nvidia-smi names nothing"


def wait_for_gpus(
    gpus: str,
    utilization: float,
    run: Runner,
    pause: Callable[[float], object],
    seconds: float = GPU_RELEASE_SECONDS,
) -> None:
    """Wait until the GPUs (UUIDs, comma-separated) have the memory that the engine will ask for.

    Raises NotReady with the figures where they do not get it within ``seconds``.
    """
    end = time.monotonic() + seconds
    query = ["--query-gpu=memory.total,memory.reserved,memory.free", "--format=csv,noheader,nounits"]
    while True:
        rc, out, err = run(["nvidia-smi", f"--id={gpus}", *query])
        if rc != 0:
            raise NotReady(f"nvidia-smi failed with status {rc}: {(out + err).strip()}")
        short = [(free, want) for free, want in wanted_mib(out, utilization) if free < want]
        if not short:
            return
        if time.monotonic() >= end:
            free, want = short[0]
            raise NotReady(
                f"a GPU of {gpus} has {free} MiB free and gpu-memory-utilization {utilization} wants {want} MiB: "
                f"end what else runs there ({holders(gpus, run)}), or lower gpu-memory-utilization"
            )
        pause(1.0)


class Helper:
    """The four moments of a unit's life. ``environment`` is what the unit gives its processes."""

    def __init__(
        self,
        name: str,
        environment: Mapping[str, str],
        run: Runner,
        paths: Paths = Paths(),
        say: Callable[[str], object] = print,
        pause: Callable[[float], object] = pause_for,
        gateway: str = GATEWAY,
    ) -> None:
        self.gateway = gateway
        self.name = name
        self.environment = environment
        self.run = run
        self.paths = paths
        self.say = say
        self.pause = pause
        self.drain = f"{paths.state}/drain/{name}"
        self.timeout = float(environment["NVL_VLLM_START_TIMEOUT"])
        # Less than systemd's own timeout, so that a lost turn is noticed before the waiting start is ended.
        self.turn = Turn(name, self.timeout * 0.9, paths)

    def prepare(self) -> None:
        root, model_path = self.environment["NVL_VLLM_ROOT"], self.environment["NVL_VLLM_MODEL_PATH"]
        now = fingerprint(self.name, root, model_path, self.paths)
        # The paths are for the removal of old releases and revisions: what a unit was started from stays.
        failed = count_start(
            self.name,
            now,
            self.paths,
            release=os.path.realpath(f"{root}/current"),
            model=os.path.realpath(model_path),
        )
        if failed:
            self.say(f"{failed} starts failed before this one: waiting {back_off_seconds(failed):.0f} s")
            self.pause(back_off_seconds(failed))
        holder = self.turn.take()
        if holder != self.name:
            self.say(f"waiting for {holder} to finish its start, as engines size their memory one at a time")
        while holder != self.name:
            self.pause(0.5)
            holder = self.turn.take()
        gpus = self.environment.get("CUDA_VISIBLE_DEVICES", "")
        if gpus:
            utilization = float(self.environment["NVL_VLLM_GPU_MEMORY_UTILIZATION"])
            wait_for_gpus(gpus, utilization, self.run, self.pause)

    def ready(self) -> None:
        main = int(self.environment["MAINPID"])
        with _watch(main) as (pause, gone):
            probe = wait_until(
                Endpoint(self.name, self.environment["NVL_VLLM_URL"], self.environment.get("VLLM_API_KEY") or None),
                Look(
                    model=self.environment["NVL_VLLM_SERVED_MODEL_NAME"],
                    timeout=min(60.0, self.timeout),
                    pause=pause,
                ),
                self.timeout * 0.9,
                give_up=lambda: "the engine ended while it started" if gone() else "",
            )
        if not probe.ok:
            raise NotReady(probe.reason)
        write_state(self.name, dict(read_state(self.name, self.paths), failed_starts=0), self.paths)
        if read_text(self.drain) == LEAVING:
            os.unlink(self.drain)
        self._wait_for_gateway()
        self.turn.give()
        self.say(probe.reason)
        if self.environment.get("CUDA_VISIBLE_DEVICES"):
            try:
                self.measured()
            except OSError as problem:  # the engine serves all the same
                self.say(f"what vLLM measured is not kept: {problem}")

    def measured(self) -> None:
        """Keep what vLLM measured at this start, for the next memory plan. Raises OSError."""
        unit = f"_SYSTEMD_INVOCATION_ID={self.environment.get('INVOCATION_ID', '')}"
        figures = parse(self.run(["journalctl", "--no-pager", "--output=cat", unit])[1])
        if figures:
            with open(f"{self.paths.config}/{self.name}.yaml", encoding="utf-8") as stream:
                configuration = stream.read()
            state = read_state(self.name, self.paths)
            started_from = {"release": state.get("release"), "model": state.get("model")}
            keep(self.name, figures, {**started_from, "settings": read_settings(configuration)}, self.paths.calibration)

    def leave(self) -> None:
        if not self.environment.get("MAINPID") or not self._sent_to():
            return  # it ended by itself, or nobody is told
        if not os.path.exists(self.drain):
            _open_directory(os.path.dirname(self.drain))
            with open(self.drain, "w", encoding="utf-8") as stream:
                stream.write(LEAVING)
        end = time.monotonic() + LEAVE_SECONDS
        while self._sent_to():
            if time.monotonic() >= end:
                self.say(f"the gateway has not let go of {self.name} in {LEAVE_SECONDS:.0f} s: stopping all the same")
                return
            self.pause(0.1)
        # From SIGTERM on vLLM goes on with what it has begun, and answers 500 to what it has not.
        end = time.monotonic() + ARRIVE_SECONDS
        while (server := self._at_gateway()) is not None and server.requests and time.monotonic() < end:
            self.pause(0.1)

    def _wait_for_gateway(self) -> None:
        """Whoever restarts engines one after the other stops the next one when this start job has ended.

        An operator's drain file keeps the engine out for as long as it is there.
        """
        end = time.monotonic() + RETURN_SECONDS
        while not os.path.exists(self.drain) and (server := self._at_gateway()) is not None and not server.in_use:
            if time.monotonic() >= end:
                self.say(f"the gateway does not use {self.name} after {RETURN_SECONDS:.0f} s: going on all the same")
                return
            self.pause(0.1)

    def _sent_to(self) -> bool:
        """Whether this host's gateway sends requests here. Without a gateway nobody does."""
        server = self._at_gateway()
        return server is not None and server.in_use

    def _at_gateway(self) -> Server | None:
        """This engine as the host's gateway sees it; None without a gateway, or where it does not know the engine."""
        try:
            page = _openai.get(Endpoint("gateway", self.gateway), "", 2.0).decode("utf-8", "replace")
            return parse_statistics(page).get(self.name)
        except (EndpointError, ValueError):
            return None

    def stopped(self) -> None:
        self.turn.give()


@contextmanager
def _watch(pid: int) -> Iterator[tuple[Callable[[float], object], Callable[[], bool]]]:
    """A pause that ends early when the process does, and whether it has."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        yield (lambda _: None), (lambda: True)
        return
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    try:
        yield (lambda seconds: poller.poll(seconds * 1000)), (lambda: bool(poller.poll(0)))
    finally:
        os.close(descriptor)


def main(argv: list[str], environment: Mapping[str, str], run: Runner) -> int:
    """``prepare|ready|leave|stopped NAME``. Exit status 0, 1 with the reason on standard error, 2 for bad usage."""
    if len(argv) != 2 or argv[0] not in ("prepare", "ready", "leave", "stopped"):
        print("usage: vllm-unit prepare|ready|leave|stopped NAME", file=sys.stderr)
        return 2
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        getattr(Helper(argv[1], environment, run), argv[0])()
    except NotReady as problem:
        print(f"not ready: {problem}", file=sys.stderr)
        return 1
    return 0

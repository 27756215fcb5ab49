# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Observes a host for the rules of :mod:`_doctor`. Reads, and asks each engine for one token; changes nothing."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import _drift_units, _gpu_health, _gpu_info, _health, _openai, _status
from ._agent_daemon import key_of
from ._doctor import OUT_OF_MEMORY, Instance, Observed
from ._drift_kinds import MASK, masked
from ._http import Endpoint, EndpointError
from ._unit import CONFIG, fingerprint, read_state

SERVICES = ("vllm-gateway.service", "vllm-health.service")
PROPERTIES = "Id,ActiveState,Result,NRestarts,ExecMainStartTimestampMonotonic,ActiveEnterTimestampMonotonic"
#: Rules of role gpu_preflight that tell of a GPU which does not work any more.
FAULTS = ("gpu_lost", "fatal_xid", "recovery_needed", "remap_failure", "ecc_uncorrected")
#: How far back (s) the journal is searched for memory that ran out.
LOOK_BACK = 3600.0
#: Lines that are read of a unit that does not run, to say why.
LAST_LINES = 200
_PRESSURE = re.compile(r"^some avg10=([\d.]+)", re.MULTILINE)
_SWAP = re.compile(r"^VmSwap:\s+(\d+) kB", re.MULTILINE)


@dataclass(frozen=True)
class Wanted:
    """What to look at. ``instances`` have ``name``, ``unit``, ``url``, ``gpus`` and ``arguments``; times in seconds."""

    instances: Sequence[Mapping[str, Any]]
    device: str
    gateway: bool
    agent_url: str
    statistics_url: str
    root: str
    model_path: str
    disks: Sequence[str]
    window: float
    interval: float
    timeout: float


def parse_utilization(text: str) -> dict[str, float]:
    """Utilization (0 to 1) by index, as ``nvidia-smi`` tells it in percent; without GPUs of which it cannot tell."""
    found = {}
    for line in text.splitlines():
        index, _, value = line.partition(",")
        with contextlib.suppress(ValueError):
            found[index.strip()] = float(value) / 100
    return found


class Look:
    """One look at a host; each method reads one thing."""

    def __init__(
        self,
        wanted: Wanted,
        run: _gpu_info.TimedRunner = _gpu_info.run_command,
        sleep: Callable[[float], None] = time.sleep,
        proc: str = "/proc",
        config: str = CONFIG,
    ) -> None:
        self.wanted = wanted
        self.run = run
        self.sleep = sleep
        self.proc = proc
        self.config = config
        self.unknown: list[str] = []
        self.silent: dict[str, str] = {}

    def text(self, *argv: str) -> str:
        """What a command prints; empty where it fails, which is noted. A search that finds nothing ends with 1."""
        try:
            status, out, error = self.run(list(argv), self.wanted.timeout)
        except (OSError, TimeoutError) as problem:
            self.unknown.append(f"{argv[0]}: {problem}")
            return ""
        if status != 0 and (status != 1 or error.strip()):
            self.unknown.append(f"{shlex.join(argv)}: exit status {status}: {error.strip()[-200:]}")
            return ""
        return out

    def sample(self, endpoint: Endpoint) -> dict[str, float]:
        """An engine's figures; none of one that does not answer, which its canary tells."""
        try:
            return _openai.metrics(endpoint, _status.NAMES, self.wanted.timeout)
        except EndpointError:
            return {}

    def utilization(self) -> dict[str, float]:
        if self.wanted.device != "cuda":
            return {}
        argv = ["nvidia-smi", "--query-gpu=index,utilization.gpu", "--format=csv,noheader,nounits"]
        try:
            status, out, _ = self.run(argv, self.wanted.timeout)
        except (OSError, TimeoutError):
            return {}  # gpu_problem says why
        return parse_utilization(out) if status == 0 else {}

    def window(self, endpoints: Sequence[Endpoint]) -> tuple[list[list[dict[str, float]]], list[dict[str, float]]]:
        """Samples of each engine, and of the GPUs, over the window."""
        end = time.monotonic() + self.wanted.window
        engines: list[list[dict[str, float]]] = [[] for _ in endpoints]
        gpus = []
        while True:
            for samples, endpoint in zip(engines, endpoints):
                samples.append(self.sample(endpoint))
            gpus.append(self.utilization())
            if time.monotonic() >= end:
                return [[one for one in samples if one] for samples in engines], gpus
            self.sleep(self.wanted.interval)

    def refused(self) -> tuple[dict[str, str], int]:
        """The gateway's servers, and how many answers 5xx it gave so far."""
        if not self.wanted.gateway:
            return {}, 0
        try:
            figures = _status.gateway_figures(self.asked(SERVICES[0], self.wanted.statistics_url, "/;csv"))
        except (EndpointError, ValueError) as problem:
            self.silent[SERVICES[0]] = str(problem)
            return {}, 0
        return figures["servers"], figures["errors_5xx"]

    def agent(self) -> dict[str, str]:
        """The health agent's word on each engine."""
        try:
            found = json.loads(self.asked(SERVICES[1], self.wanted.agent_url, "/status"))["instances"]
        except (EndpointError, ValueError, KeyError) as problem:
            self.silent[SERVICES[1]] = str(problem)
            return {}
        return {name: one["word"] for name, one in found.items()}

    def asked(self, service: str, url: str, path: str) -> str:
        """A page of a service. Raises EndpointError."""
        return _openai.get(Endpoint(service, url), path, self.wanted.timeout).decode("utf-8", "replace")

    def canary(self, name: str, url: str) -> tuple[bool, str]:
        """Whether ``/health`` answers, and why no token came; empty where one came."""
        try:
            key = key_of(name, self.config)
        except OSError as problem:
            return False, f"its key cannot be read: {problem}"
        probes = _health.examine(
            Endpoint(name, url, key), _health.Look(depth="progresses", timeout=self.wanted.timeout)
        )
        last = list(probes.values())[-1]
        return probes["alive"].ok, "" if last.ok else last.reason

    def states(self) -> dict[str, dict[str, str]]:
        units = [str(one["unit"]) for one in self.wanted.instances]
        # Of what is not to be there nothing is to be active.
        units += SERVICES if self.wanted.gateway else SERVICES[1:]
        return _drift_units.parse_units(self.text("systemctl", "show", f"--property={PROPERTIES}", *units))

    def journal(self, name: str, unit: str, *options: str) -> str:
        """Lines of an engine's unit, without its key, should one ever be in them."""
        text = self.text("journalctl", "--no-pager", "--quiet", f"--unit={unit}", *options)
        with contextlib.suppress(OSError):  # canary() tells of a key that cannot be read
            if key := key_of(name, self.config):
                text = text.replace(key, MASK)
        return text

    def start(self, name: str, unit: str, state: Mapping[str, str]) -> str:
        """What a running engine said until it was ready. Later lines, one for each request, say nothing of that."""
        if state.get("ActiveState") != "active":
            return self.journal(name, unit, "--output=cat", f"--lines={LAST_LINES}")
        booted = time.time() - time.clock_gettime(time.CLOCK_MONOTONIC)
        began, ready = (
            booted + int(state.get(f"{when}TimestampMonotonic") or 0) / 1e6 for when in ("ExecMainStart", "ActiveEnter")
        )
        return self.journal(name, unit, "--output=cat", f"--since=@{began - 1:.0f}", f"--until=@{ready + 1:.0f}")

    def out_of_memory(self, name: str, unit: str) -> list[str]:
        """Lines about memory that ran out, also before the last start: systemd starts such an engine again.

        What was before the engine's files were changed is left out, as that may have been the remedy.
        """
        since = time.time() - LOOK_BACK
        with contextlib.suppress(OSError):
            since = max(since, os.stat(f"{self.config}/{name}.yaml").st_mtime)
        options = ("--output=short-iso", f"--since=@{since:.0f}", f"--grep={OUT_OF_MEMORY}")
        # Time, host, program, text.
        words = [line.split(" ", 3) for line in self.journal(name, unit, *options).splitlines()]
        return [f"{word[0]} {word[3]}" for word in words if len(word) == 4]

    def swapped(self, unit: str) -> float:
        """MiB in swap of all processes of a unit."""
        total = 0.0
        for process in _drift_units.engines_running(self.proc):
            if process.unit == unit:
                with (
                    contextlib.suppress(OSError),
                    open(f"{self.proc}/{process.pid}/status", encoding="utf-8") as stream,
                ):
                    total += sum(map(float, _SWAP.findall(stream.read()))) / 1024
        return total

    def orphans(self, units: Sequence[str]) -> list[tuple[str, str]]:
        """What each engine of no declared unit is, and how to stop it."""
        return [
            (
                f"process {one.pid} ({masked(shlex.join(one.argv))[:80]})",
                f"systemctl stop {one.unit}" if one.unit else f"kill {one.pid}",
            )
            for one in _drift_units.engines_running(self.proc)
            if one.unit not in units
        ]

    def pressure(self) -> dict[str, float]:
        """Share of the last 10 s that some program waited; empty on kernels that do not tell."""
        found = {}
        for name in ("memory", "io"):
            with contextlib.suppress(OSError), open(f"{self.proc}/pressure/{name}", encoding="utf-8") as stream:
                found[name] = max(map(float, _PRESSURE.findall(stream.read())), default=0.0) / 100
        return found

    def space(self) -> dict[str, tuple[float, float]]:
        found = {}
        for path in self.wanted.disks:
            with contextlib.suppress(FileNotFoundError):
                stat = os.statvfs(path)
                found[path] = (stat.f_bavail * stat.f_frsize / 2**20, stat.f_blocks * stat.f_frsize / 2**20)
        return found

    def look(self) -> tuple[Observed, list[str]]:
        """Everything, and what could not be looked at."""
        wanted = self.wanted
        endpoints = [Endpoint(str(one["name"]), str(one["url"])) for one in wanted.instances]
        units = [str(one["unit"]) for one in wanted.instances]
        states = self.states()
        _, refused_before = self.refused()
        samples, utilization = self.window(endpoints)
        servers, refused = self.refused()
        agent = self.agent()
        facts = _gpu_info.read(self.run, wanted.timeout) if wanted.device == "cuda" else None
        instances = []
        for one, taken in zip(wanted.instances, samples):
            name, unit = str(one["name"]), str(one["unit"])
            alive, canary = self.canary(name, str(one["url"]))
            started = str(read_state(name).get("fingerprint", ""))
            instances.append(
                Instance(
                    name=name,
                    unit=unit,
                    arguments=one["arguments"],
                    state=states.get(unit, {}),
                    samples=taken,
                    alive=alive,
                    canary=canary,
                    journal=self.start(name, unit, states.get(unit, {})),
                    out_of_memory=self.out_of_memory(name, unit),
                    gpus=one["gpus"],
                    swapped_mib=self.swapped(unit),
                    agent=agent.get(name, ""),
                    stale=bool(started) and started != fingerprint(name, wanted.root, wanted.model_path),
                )
            )
        observed = Observed(
            instances=instances,
            window=wanted.window,
            gpus=self.gpus(facts, utilization),
            gpu_problem=facts.problem if facts else "",
            gateway=servers,
            gateway_state=states.get(SERVICES[0], {}) if wanted.gateway else {},
            gateway_refused=max(0, refused - refused_before),
            agent_state=states.get(SERVICES[1], {}),
            orphans=self.orphans(units),
            silent=self.silent,
            disks=self.space(),
            pressure=self.pressure(),
        )
        return observed, self.unknown

    @staticmethod
    def gpus(facts: _gpu_info.Facts | None, samples: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
        """Mean utilization of each GPU, and in which way it is slowed down."""
        found = []
        for gpu in facts.gpus if facts else ():
            values = [one[str(gpu.index)] for one in samples if str(gpu.index) in one]
            only = _gpu_info.Facts([gpu], _gpu_info.Host())
            ails = _gpu_health.findings(only)
            found.append(
                {
                    "index": gpu.index,
                    "uuid": gpu.uuid,
                    "utilization": sum(values) / len(values) if values else None,
                    "throttled": [one.sentence for one in ails if one.rule == "throttling"],
                    "faults": [one.sentence for one in ails if one.rule in FAULTS],
                }
            )
        return found

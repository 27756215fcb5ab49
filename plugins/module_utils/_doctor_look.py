# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Observes a host for the rules of :mod:`_doctor`. Reads, and asks each engine for one token; changes nothing."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import _doctor_plan, _drift_units, _gpu_health, _gpu_info, _health, _openai, _status
from ._agent_daemon import key_of
from ._benchmark_watch import GpuRow, read_gpus, slowed
from ._doctor import OUT_OF_MEMORY, Instance, Observed
from ._drift_kinds import MASK, masked
from ._host import read_text
from ._http import Endpoint, EndpointError
from ._plan_inputs import LIMITS, gpu_devices, memory_device
from ._unit import CONFIG, fingerprint, read_state

SERVICES = ("vllm-gateway.service", "vllm-health.service")
PROPERTIES = (
    "Id,ActiveState,Result,NRestarts,"
    "InactiveExitTimestampMonotonic,ExecMainStartTimestampMonotonic,ActiveEnterTimestampMonotonic"
)
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
    """What to look at. ``instances`` have ``name``, ``unit``, ``url``, ``gpus``, ``arguments`` and ``environment``.

    Times in seconds. ``version`` is vLLM's, empty for the one that the memory plan knows best.
    """

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
    version: str = ""


@dataclass(frozen=True)
class Window:
    """What was seen again and again: figures of each engine and of the gateway, and rows of all GPUs."""

    engines: Sequence[Sequence[Mapping[str, float]]]
    gateway: Sequence[Mapping[str, Any]]
    gpus: Sequence[GpuRow]


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

    def window(self, endpoints: Sequence[Endpoint]) -> Window:
        """Looks again and again until the window ends, twice at least.

        A gateway that does not answer is asked once more, at the end: each look at it may take as long as the window.
        """
        wanted = self.wanted
        end = time.monotonic() + wanted.window
        engines: list[list[dict[str, float]]] = [[] for _ in endpoints]
        gateway: list[dict[str, Any]] = []
        gpus: list[GpuRow] = []
        last = False
        while True:
            for samples, endpoint in zip(engines, endpoints):
                if sample := self.sample(endpoint):
                    samples.append(sample)
            if wanted.gateway and (last or SERVICES[0] not in self.silent) and (figures := self.gateway()):
                gateway.append(figures)
            if wanted.device == "cuda":
                gpus += read_gpus(self.run, wanted.timeout)  # where there are none, gpu_problem says why
            if last:
                return Window(engines, gateway, gpus)
            self.sleep(wanted.interval)
            last = time.monotonic() >= end

    def gateway(self) -> dict[str, Any]:
        """The gateway's figures; empty where it does not answer, which is noted until it does."""
        try:
            figures = _status.gateway_figures(self.asked(SERVICES[0], self.wanted.statistics_url, "/;csv"))
        except (EndpointError, ValueError) as problem:
            self.silent[SERVICES[0]] = str(problem)
            return {}
        self.silent.pop(SERVICES[0], None)
        return figures

    def refused(self, samples: Sequence[Mapping[str, Any]]) -> int | None:
        """Answers 5xx of the gateway within the window; None where it was seen less than twice."""
        if len(samples) > 1:
            return max(0, int(samples[-1]["errors_5xx"] - samples[0]["errors_5xx"]))
        if samples and SERVICES[0] not in self.silent:
            self.unknown.append(
                "the gateway answered at the end of the window only, so answers 5xx within it are not known"
            )
        return None

    def agent(self) -> dict[str, str]:
        """The health agent's word on each engine."""
        try:
            return _status.agent_words(self.asked(SERVICES[1], self.wanted.agent_url, "/status"))
        except (EndpointError, ValueError) as problem:
            self.silent[SERVICES[1]] = str(problem)
            return {}

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

    def plans(self, facts: _gpu_info.Facts | None) -> dict[str, str]:
        """What the memory plan has for each engine."""
        wanted = self.wanted
        if facts is None:
            devices = [memory_device(read_text(f"{self.proc}/meminfo"), map(read_text, LIMITS))]
        else:
            units = [one["unit"] for one in wanted.instances]
            ours = {each.uid for each in _drift_units.engines_running(self.proc) if each.unit in units}
            devices = gpu_devices(facts.gpus, ours)
        return _doctor_plan.sentences(
            wanted.instances, wanted.device, devices, wanted.root, wanted.model_path, wanted.version
        )

    def look(self) -> tuple[Observed, list[str]]:
        """Everything, and what could not be looked at."""
        wanted = self.wanted
        endpoints = [Endpoint(str(one["name"]), str(one["url"])) for one in wanted.instances]
        units = [str(one["unit"]) for one in wanted.instances]
        states = self.states()
        clock = time.clock_gettime(time.CLOCK_MONOTONIC)
        seen = self.window(endpoints)
        agent = self.agent()
        facts = _gpu_info.read(self.run, wanted.timeout) if wanted.device == "cuda" else None
        instances = []
        for one, taken in zip(wanted.instances, seen.engines):
            name, unit = str(one["name"]), str(one["unit"])
            alive, canary = self.canary(name, str(one["url"]))
            started = str(read_state(name).get("fingerprint", ""))
            queues = [figures["queues"].get(name, 0) for figures in seen.gateway]
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
                    queued=sum(queues) / max(1, len(queues)),
                    gpus=one["gpus"],
                    swapped_mib=self.swapped(unit),
                    agent=agent.get(name, ""),
                    stale=bool(started) and started != fingerprint(name, wanted.root, wanted.model_path),
                )
            )
        if any(one.out_of_memory for one in instances):
            plans = self.plans(facts)
            instances = [replace(one, plan=plans.get(one.name, "")) for one in instances]
        observed = Observed(
            instances=instances,
            window=wanted.window,
            clock=clock,
            gpus=self.gpus(facts, seen.gpus),
            gpu_problem=facts.problem if facts else "",
            gateway=seen.gateway[-1]["servers"] if seen.gateway else {},
            gateway_state=states.get(SERVICES[0], {}) if wanted.gateway else {},
            gateway_refused=self.refused(seen.gateway),
            agent_state=states.get(SERVICES[1], {}),
            orphans=self.orphans(units),
            silent=self.silent,
            disks=self.space(),
            pressure=self.pressure(),
        )
        return observed, self.unknown

    @staticmethod
    def gpus(facts: _gpu_info.Facts | None, samples: Sequence[GpuRow]) -> list[dict[str, Any]]:
        """Mean utilization of each GPU, and what slowed it down within the window."""
        found = []
        for gpu in facts.gpus if facts else ():
            rows = [one for one in samples if one["gpu"] == gpu.index]
            used = [one["utilization"] / 100 for one in rows if one["utilization"] is not None]
            slow = [slowed(one["clock_reasons"]) for one in rows]
            ails = _gpu_health.findings(_gpu_info.Facts([gpu], _gpu_info.Host()))
            found.append(
                {
                    "index": gpu.index,
                    "uuid": gpu.uuid,
                    "utilization": sum(used) / len(used) if used else None,
                    "throttled": [
                        f"{gpu}: in {sum(words in each for each in slow)} of {len(slow)} looks {words}"
                        for words in dict.fromkeys(words for each in slow for words in each)
                    ],
                    "faults": [one.sentence for one in ails if one.rule in FAULTS],
                }
            )
        return found

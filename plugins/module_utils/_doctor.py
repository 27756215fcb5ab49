# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""What ails the engines of a host, by rules over what was observed in a short window.

No I/O here: :mod:`_doctor_look` observes. Each rule is a generator of findings; all of them run, and a healthy host
gives none. Memory in MiB, times in seconds, shares from 0 to 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ._http import shorten
from ._status import (
    GENERATION,
    HITS,
    KV_USAGE,
    PREEMPTIONS,
    QUERIES,
    RUNNING,
    WAITING,
)

CRITICAL, WARNING = "critical", "warning"
SEVERITIES = (CRITICAL, WARNING)


@dataclass(frozen=True)
class Finding:
    """What ails, where, how that is known, and what to change."""

    name: str
    severity: str
    where: str
    evidence: str
    remedy: str


@dataclass(frozen=True)
class Limits:
    """From where on something is worth a finding; the role's variables of the same names say them."""

    hit_rate: float = 0.2
    gpu_utilization: float = 0.5
    kv_usage: float = 0.95
    load_rate: float = 100.0  # MiB/s
    load_size: float = 1.0  # GiB; how fast fewer were read tells nothing of a disk
    restarts: int = 3
    free_space: float = 0.05
    pressure: float = 0.5


@dataclass
class Instance:
    """One engine. ``samples`` are sums of :data:`_status.NAMES`, in the order that they were taken."""

    name: str
    unit: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    state: Mapping[str, str] = field(default_factory=dict)
    samples: Sequence[Mapping[str, float]] = ()
    alive: bool = False
    canary: str = ""  # why a token was wanted and not got; empty where it was
    gpus: Sequence[int | str] = ()  # indexes or UUIDs, as declared
    journal: str = ""  # of its start, or the last lines of one that does not run
    out_of_memory: Sequence[str] = ()  # lines of the last hour
    plan: str = ""  # what the memory plan has for it, in a sentence; only of one that ran out of memory
    queued: float = 0.0  # requests that wait for it at the gateway, on average
    swapped_mib: float = 0.0
    agent: str = ""
    stale: bool = False

    def __str__(self) -> str:
        return self.unit

    def first(self, name: str) -> float:
        return self.samples[0].get(name, 0.0) if self.samples else 0.0

    def last(self, name: str) -> float:
        return self.samples[-1].get(name, 0.0) if self.samples else 0.0

    def gained(self, name: str) -> float:
        """How much a counter rose; 0 where the engine was restarted in between."""
        return max(0.0, self.last(name) - self.first(name))

    def most(self, name: str) -> float:
        return max((sample.get(name, 0.0) for sample in self.samples), default=0.0)

    def mean(self, name: str) -> float:
        return sum(sample.get(name, 0.0) for sample in self.samples) / max(1, len(self.samples))

    def always(self, name: str) -> float:
        """The least of all samples."""
        return min((sample.get(name, 0.0) for sample in self.samples), default=0.0)

    def number(self, argument: str) -> int:
        value = self.arguments.get(argument)
        return value if isinstance(value, int) and not isinstance(value, bool) else 0

    @property
    def seats(self) -> int:
        """How many requests it runs at once; 0 where that is not declared."""
        return self.number("max-num-seqs") * max(1, self.number("data-parallel-size"))

    @property
    def full(self) -> bool:
        """Whether it runs about as many requests as it may.

        The mean of the window, as a request that ends leaves its seat empty for a moment.
        """
        return bool(self.seats) and self.mean(RUNNING) >= _FULL * self.seats

    @property
    def waited_for(self) -> bool:
        """Whether requests wait for it, inside or at the gateway, which lets only a few wait inside."""
        return self.mean(WAITING) > 0 or self.queued > 0


@dataclass
class Observed:
    """All of a host.

    ``gpus`` have ``index``, ``uuid``, ``utilization`` (mean, 0 to 1), ``throttled`` and ``faults`` (sentences).
    ``silent`` is why a service of ours did not answer, ``orphans`` what each is and how to stop it. ``clock`` is when
    it was looked at (s), as systemd's monotonic time stamps have it; ``gateway_refused`` is None where not known.
    """

    instances: Sequence[Instance]
    window: float
    clock: float = 0.0
    gpus: Sequence[Mapping[str, Any]] = ()
    gpu_problem: str = ""
    gateway: Mapping[str, str] = field(default_factory=dict)
    gateway_state: Mapping[str, str] = field(default_factory=dict)
    gateway_refused: int | None = None
    agent_state: Mapping[str, str] = field(default_factory=dict)
    orphans: Sequence[tuple[str, str]] = ()
    silent: Mapping[str, str] = field(default_factory=dict)
    disks: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # free and size in MiB
    pressure: Mapping[str, float] = field(default_factory=dict)


Rule = Callable[[Observed, Limits], Iterator[Finding]]

#: For Python and for journalctl --grep. The last is systemd's own.
OUT_OF_MEMORY = (
    "CUDA out of memory|OutOfMemoryError|is less than desired (GPU|CPU) memory utilization|"
    "No available memory for the cache blocks|larger than the available KV cache memory|killed by the OOM killer"
)
_FREE = re.compile(r"\(([\d.]+)/([\d.]+) GiB\) on startup")
_LONGEST = re.compile(r"estimated maximum model length is (\d+)")
_LOADED = re.compile(r"Loading weights took ([\d.]+) seconds")
_SIZE = re.compile(r"Checkpoint size: ([\d.]+) GiB")
#: Share of its seats from which on an engine is full.
_FULL = 0.9
#: How long (s) restarts matter after the last one.
_RESTARTS_MATTER = 3600.0


def _change(instance: Instance, argument: str, value: object, why: str) -> str:
    return f"set {argument}: {value} in the arguments of {instance.name} (vllm_instances or vllm_arguments), {why}"


def units(observed: Observed, limits: Limits) -> Iterator[Finding]:
    """Units that are not active, or were restarted again and again."""
    services = [(one.unit, one.state, one.journal) for one in observed.instances]
    services += [
        ("vllm-gateway.service", observed.gateway_state, ""),
        ("vllm-health.service", observed.agent_state, ""),
    ]
    for unit, state, journal in services:
        if not state:
            continue
        look = f"journalctl -u {unit} -n 50"
        active = state.get("ActiveState")
        reason = _last_error(journal)
        said = f"; its journal: {reason}" if reason else ""
        if active == "activating":
            evidence = f"it starts, and has not answered a completion yet{said}"
            yield Finding("starts", WARNING, unit, evidence, f"wait; {look} tells how far it is")
        elif active not in ("active", "reloading"):
            evidence = f"{active}, {state.get('Result')}{said}"
            yield Finding("unit_not_active", CRITICAL, unit, evidence, f"{look} tells why; systemctl start {unit}")
        elif unit in observed.silent:
            yield Finding("no_answer", CRITICAL, unit, observed.silent[unit], f"systemctl restart {unit}; {look}")
        restarts = int(state.get("NRestarts") or 0)
        ago = observed.clock - _started(state)
        if restarts >= limits.restarts and ago < _RESTARTS_MATTER:
            evidence = f"systemd restarted it {restarts} times, the last time {ago / 60:.0f} min ago"
            yield Finding("restarted", WARNING, unit, evidence, f"{look} tells why")


def _started(state: Mapping[str, str]) -> float:
    """When a unit was started last (s of the monotonic clock); one that dies before its main process counts, too."""
    return max(int(state.get(f"{what}TimestampMonotonic") or 0) for what in ("ExecMainStart", "InactiveExit")) / 1e6


def _last_error(journal: str) -> str:
    errors = [line for line in journal.splitlines() if re.search(r"\bERROR\b|Error:", line)]
    return errors[-1].strip()[-200:] if errors else ""


def memory(observed: Observed, _limits: Limits) -> Iterator[Finding]:
    """Engines that ran out of memory, by their own words or systemd's."""
    for one in observed.instances:
        killed = [line for line in one.out_of_memory if "OOM killer" in line]
        told = [line for line in one.out_of_memory if line not in killed]
        if told:
            evidence = shorten(told[-1]) + (f"; by the memory plan {one.plan}" if one.plan else "")
            yield Finding("out_of_memory", CRITICAL, one.unit, evidence, "; or ".join(_less(one, told[-1])))
        if killed:
            yield Finding(
                "killed_by_kernel",
                CRITICAL,
                one.unit,
                shorten(killed[-1]),
                "the host has too little memory: end other programs, give it more, or declare fewer instances",
            )


def _less(one: Instance, line: str) -> Iterator[str]:
    """What makes an engine fit, by its own message. Where that has the figures they are computed with."""
    utilization = one.arguments.get("gpu-memory-utilization")
    is_now = f"(it is {utilization})"
    # Where the cache's size is given, gpu-memory-utilization does not count.
    size = one.number("kv-cache-memory-bytes")
    more = f"raise kv-cache-memory-bytes (it is {size})" if size else f"raise gpu-memory-utilization {is_now}"
    tokens = one.number("max-num-batched-tokens")
    if free := _FREE.search(line):
        share = int(float(free.group(1)) / float(free.group(2)) * 100) / 100
        yield "end what else holds this memory (playbooks/preflight.yml names it)"
        yield f"set gpu-memory-utilization: {share:.2f} {is_now}"
    elif longest := _LONGEST.search(line):
        yield f"set max-model-len: {longest.group(1)} (it is {one.number('max-model-len')})"
        yield more
    elif "No available memory" in line:
        yield more
        if tokens:
            yield f"set max-num-batched-tokens: {tokens // 2} (it is {tokens})"
    elif isinstance(utilization, float):
        yield f"set gpu-memory-utilization: {max(0.5, utilization - 0.05):.2f} {is_now}"
        if (seqs := one.number("max-num-seqs")) > 1:
            yield f"set max-num-seqs: {seqs // 2} (it is {seqs})"
    yield "playbooks/preflight.yml computes what fits"


def silence(observed: Observed, _limits: Limits) -> Iterator[Finding]:
    """Engines that look healthy and give no token, and those that do not answer at all."""
    for one in observed.instances:
        if one.state and one.state.get("ActiveState") not in ("active", "reloading"):
            continue  # told by another rule
        if one.alive and one.canary:
            yield Finding(
                "false_healthy",
                CRITICAL,
                one.unit,
                f"/health answers 200, and {one.canary}",
                f"systemctl restart {one.unit}; role vllm_health does so by itself, after "
                "vllm_health_restart_after seconds",
            )
        elif not one.alive:
            yield Finding("no_answer", CRITICAL, one.unit, one.canary, f"journalctl -u {one.unit} -n 50 tells why")


def out_of_use(observed: Observed, _limits: Limits) -> Iterator[Finding]:
    """Engines that answer and get no requests, because agent or gateway keep them out."""
    for one in observed.instances:
        if not one.alive or one.canary:
            continue
        server = observed.gateway.get(one.name, "")
        if one.agent and not one.agent.startswith("up"):
            drained = one.agent.startswith("drain")
            remedy = f"rm /run/nvl-vllm/drain/{one.name}" if drained else "journalctl -u vllm-health tells why"
            yield Finding("kept_out", WARNING, one.unit, f"the health agent says {one.agent}", remedy)
        elif server and not server.startswith(("UP", "no check")):
            yield Finding(
                "kept_out", WARNING, one.unit, f"the gateway has it as {server}", "systemctl restart vllm-gateway"
            )
        if one.stale:
            yield Finding(
                "runs_from_older_files",
                WARNING,
                one.unit,
                "its configuration was changed since it was started",
                "run site.yml; playbooks/drift.yml tells what changed",
            )


def load(observed: Observed, limits: Limits) -> Iterator[Finding]:
    """Too many requests for what is declared, or for the KV cache."""
    for one in observed.instances:
        running, waiting, usage = one.most(RUNNING), one.most(WAITING), one.most(KV_USAGE)
        fewer = _change(
            one, "max-num-seqs", max(1, int(running) - 1), "or give the cache more memory: profile h100_nvl"
        )
        if usage >= limits.kv_usage:
            yield Finding(
                "kv_cache_full",
                WARNING,
                one.unit,
                f"{usage:.0%} of the KV cache was in use, {running:.0f} requests ran and {waiting:.0f} waited",
                fewer,
            )
        elif one.full and one.waited_for:
            yield Finding(
                "max_num_seqs_reached",
                WARNING,
                one.unit,
                f"{running:.0f} requests run (max-num-seqs {one.number('max-num-seqs')}), {waiting:.0f} wait in it and "
                f"{one.queued:.0f} at the gateway, with {usage:.0%} of the KV cache in use",
                _more_seats(one),
            )
        elif one.always(WAITING) > 0:
            yield Finding(
                "requests_wait",
                WARNING,
                one.unit,
                f"{one.always(WAITING):.0f} requests or more waited all the time while {one.mean(RUNNING):.0f} of "
                f"{one.seats} ran, with {usage:.0%} of the KV cache in use",
                "more comes in than it computes: lower max_concurrent of the client (agentic_client_max_concurrent), "
                f"or raise max-num-batched-tokens of {one.name} (it is {one.number('max-num-batched-tokens')})",
            )
        preempted = one.gained(PREEMPTIONS)
        if preempted:
            yield Finding(
                "preemptions",
                WARNING,
                one.unit,
                f"{preempted:.0f} requests lost their place in the KV cache within {observed.window:.0f} s and are "
                "computed again",
                fewer,
            )


def _more_seats(one: Instance) -> str:
    seqs = one.number("max-num-seqs") * 2
    return _change(one, "max-num-seqs", seqs, "and let playbooks/preflight.yml tell whether that fits")


def cache(observed: Observed, limits: Limits) -> Iterator[Finding]:
    """A prefix cache that is off or finds nothing."""
    for one in observed.instances:
        if one.arguments.get("enable-prefix-caching") is False:
            yield Finding(
                "prefix_cache_off",
                WARNING,
                one.unit,
                "enable-prefix-caching is false",
                _change(one, "enable-prefix-caching", "true", "it costs no memory"),
            )
            continue
        asked, hit = one.gained(QUERIES), one.gained(HITS)
        # A few short prompts, such as canaries, say nothing: less than a dozen of the cache's blocks.
        if asked >= 2048 and hit / asked < limits.hit_rate:
            yield Finding(
                "prefix_cache_without_hits",
                WARNING,
                one.unit,
                f"{hit:.0f} of {asked:.0f} prompt tokens ({hit / asked:.0%}) were found in the cache within "
                f"{observed.window:.0f} s",
                "clients' prompts differ early: send the same system prompt first, byte by byte, and what changes "
                "(time, names, identifiers) last; vllm_gateway_affinity: session sends a conversation to one engine",
            )


def gpus(observed: Observed, limits: Limits) -> Iterator[Finding]:
    """A driver that does not answer, idle GPUs beside waiting clients, slowed clocks."""
    if observed.gpu_problem:
        yield Finding(
            "gpu_driver", CRITICAL, "GPUs", observed.gpu_problem, "see the message; then playbooks/preflight.yml"
        )
    for gpu in observed.gpus:
        where = f"GPU {gpu['index']}"
        used = gpu.get("utilization")
        engines = [one for one in observed.instances if {gpu["index"], gpu["uuid"]} & set(one.gpus)]
        # The mean, as a canary of the health agent runs now and then on an idle engine.
        running = sum(one.mean(RUNNING) for one in engines)
        idle = used is not None and used < limits.gpu_utilization and running >= 1
        # Of an engine whose requests wait load() tells what to change.
        held_up = any(load(replace(observed, instances=engines), limits))
        if idle and not held_up and sum(one.gained(GENERATION) for one in engines) > 0:
            seats, full = sum(one.seats for one in engines), [one for one in engines if one.full]
            fewer = (
                f"clients send too few requests at once ({running:.0f} of {seats}): raise max_concurrent of the client "
                "(agentic_client_max_concurrent)"
            )
            yield Finding(
                "low_gpu_utilization",
                WARNING,
                where,
                f"{used:.0%} on average over {observed.window:.0f} s while {running:.0f} requests ran",
                "; and ".join(map(_more_seats, full)) if full else fewer,
            )
        for fault in gpu.get("faults") or ():
            yield Finding("gpu_fault", CRITICAL, where, fault, "see the message; then playbooks/preflight.yml")
        for reason in gpu.get("throttled") or ():
            yield Finding(
                "throttled",
                WARNING,
                where,
                reason,
                "check cooling and power supply; cuda_power_limit says the power cap that was asked for",
            )


def processes(observed: Observed, limits: Limits) -> Iterator[Finding]:
    """Engines without a unit, swapped memory, a slow disk, a crowded or full host."""
    for orphan, remedy in observed.orphans:
        yield Finding(
            "orphan_engine", CRITICAL, orphan, "it belongs to no declared unit and may hold GPU memory", remedy
        )
    for one in observed.instances:
        if one.swapped_mib >= 64:
            yield Finding(
                "swapped",
                WARNING,
                one.unit,
                f"{one.swapped_mib:.0f} MiB of it are in swap",
                "give the host more memory, or switch swap off (swapoff -a)",
            )
        times, sizes = _LOADED.findall(one.journal), _SIZE.findall(one.journal)
        if times and sizes and float(sizes[-1]) >= limits.load_size and float(times[-1]) > 0:
            rate = float(sizes[-1]) * 1024 / float(times[-1])
            if rate < limits.load_rate:
                yield Finding(
                    "slow_disk",
                    WARNING,
                    one.unit,
                    f"{sizes[-1]} GiB of weights took {times[-1]} s: {rate:.0f} MiB/s",
                    "put vllm_model_root on a local NVMe disk",
                )
    for path, (free, size) in sorted(observed.disks.items()):
        if size and free / size < limits.free_space:
            yield Finding(
                "disk_full", WARNING, path, f"{free / 1024:.1f} of {size / 1024:.1f} GiB are free", "make room"
            )
    for resource, share in sorted(observed.pressure.items()):
        if share >= limits.pressure:
            yield Finding(
                "pressure",
                WARNING,
                resource,
                f"programs waited for it {share:.0%} of the last 10 s (/proc/pressure/{resource})",
                "end other programs on this host, or give it more",
            )
    if observed.gateway_refused:
        yield Finding(
            "gateway_refused",
            WARNING,
            "vllm-gateway.service",
            f"{observed.gateway_refused} answers 5xx within {observed.window:.0f} s",
            "journalctl -u vllm-gateway has a line for each; raise vllm_gateway_queue where it was full",
        )


RULES: tuple[Rule, ...] = (units, memory, silence, out_of_use, load, cache, gpus, processes)


def diagnose(observed: Observed, limits: Limits = Limits(), rules: Iterable[Rule] = RULES) -> list[Finding]:
    """All findings, the worst first."""
    found = [finding for rule in rules for finding in rule(observed, limits)]
    return sorted(found, key=lambda one: (SEVERITIES.index(one.severity), one.name, one.where))


def table(hosts: Mapping[str, Mapping[str, Any]]) -> str:
    """All hosts for a terminal, each with its ``findings`` and with what is ``unknown``; a line for a healthy one."""
    lines: list[str] = []
    for host, found in sorted(hosts.items()):
        findings, unknown = found["findings"], found["unknown"]
        counts = [f"{len(findings)} finding{'s' if len(findings) > 1 else ''}"] if findings else []
        counts += [f"{len(unknown)} not looked at"] if unknown else []
        lines.append(f"{host}  {', '.join(counts) or 'healthy'}")
        for one in findings:
            lines += [
                f"  {one['severity']:8}  {one['name']}: {one['where']}",
                f"            {one['evidence']}",
                f"            do: {one['remedy']}",
            ]
        lines += [f"  unknown   {' '.join(one.split())}" for one in unknown]
        lines += [""] if counts else []
    return "\n".join(lines).rstrip()


def as_dicts(findings: Iterable[Finding]) -> list[dict[str, str]]:
    """Findings for a module to return."""
    return [asdict(finding) for finding in findings]

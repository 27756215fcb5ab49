# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Whether the engines of a host will start, and with how much KV cache, before anything is installed.

All engines of a host are judged together, in the order in which they start. What one engine takes is in
``_memory_budget``. All sizes are GiB per GPU unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ._kv_cache import KvCache, KvCacheError
from ._memory_budget import (
    GIB,
    Budget,
    Calibration,
    Device,
    MemoryPlanError,
    Settings,
    budget,
    checked_gib,
    estimate_weights,
    layout,
    parse_version,
    served,
    settings_of,
    start_shortage,
)
from ._model_facts import ModelFacts

FITS, TIGHT, WASTEFUL, FAILS = "fits", "tight", "wasteful", "does not fit"


@dataclass(frozen=True)
class InstancePlan:
    """The verdict on one engine. ``sentences`` say why, ``changes`` what would fit, each a list of arguments."""

    name: str
    devices: list[int]
    verdict: str
    sentences: list[str]
    changes: list[dict[str, Any]]
    budget: Budget
    max_model_len: int
    largest_max_model_len: int
    max_num_seqs: int
    recommended_max_num_seqs: int
    kv_tokens_low: int
    kv_tokens: int
    max_concurrency: float
    idle_kv_gib: float
    calibrated: bool


@dataclass(frozen=True)
class DevicePlan:
    """One device: weights + overhead + kv + foreign + free = total. Negative ``free_gib`` is what is missing."""

    index: int
    name: str
    total_gib: float
    weights_gib: float
    overhead_gib: float
    kv_gib: float
    foreign_gib: float
    free_gib: float
    instances: list[str]


@dataclass(frozen=True)
class HostPlan:
    """All engines of a host. ``fits`` is false where one of them would not start."""

    fits: bool
    version: str
    instances: list[InstancePlan]
    devices: list[DevicePlan]
    errors: list[str]
    warnings: list[str]


@dataclass(frozen=True)
class Wanted:
    """An engine as the declaration has it: ``arguments`` by vLLM's names, ``gpus`` by index or UUID."""

    name: str
    gpus: tuple[Any, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Host:
    """What is planned for: the devices that are there, the model, and the engines in the order that they start."""

    devices: tuple[Device, ...]
    model: ModelFacts
    instances: tuple[Wanted, ...]
    version: str = "0.32.0"
    device: str = "cuda"
    calibration: Calibration = field(default_factory=Calibration)


def plan(host: Host) -> HostPlan:
    """The plan of all engines of a host, in the order in which they start.

    Raises ModelFactsError or MemoryPlanError only for a model that no figure can be given for; what is
    wrong with one engine is in its plan.
    """
    return _Planner(host).plan()


class _Planner:
    def __init__(self, host: Host) -> None:
        self.host = host
        self.version = parse_version(host.version)
        self.cpu = host.device == "cpu"
        self.errors: list[str] = []
        #: Engines that fail by their own arguments, not for what their neighbours take in sum.
        self.refused: set[str] = set()
        self.taken: dict[int, float] = {device.index: 0.0 for device in host.devices}
        self.held: dict[int, list[tuple[str, Budget]]] = {device.index: [] for device in host.devices}

    def plan(self) -> HostPlan:
        if estimate_weights(self.host.model, self._blank(), self._any(), self.version).gib <= 0:
            raise MemoryPlanError(
                "the size of the weights is not known: give weight_bytes, the bytes of the checkpoint"
            )
        plans = []
        sharers: dict[int, list[str]] = {}
        for wanted in self.host.instances:
            for device in self._devices(wanted)[0]:
                sharers.setdefault(device.index, []).append(wanted.name)
        for wanted in self.host.instances:
            result = self._instance(wanted, sharers)
            if result:
                plans.append(result)
        self._shared(plans, sharers)
        warnings = [s for p in plans if p.verdict in (TIGHT, WASTEFUL) for s in p.sentences]
        errors = self.errors + [s for p in plans if p.verdict == FAILS for s in p.sentences]
        fits = not errors and all(p.verdict != FAILS for p in plans)
        return HostPlan(fits, ".".join(map(str, self.version)), plans, self._table(), errors, warnings)

    def _any(self) -> Device:
        return self.host.devices[0] if self.host.devices else Device(0, "", 81920)

    def _blank(self) -> Settings:
        return settings_of({}, self.host.model, self._any(), self.version, self.host.device)

    def _devices(self, wanted: Wanted) -> tuple[list[Device], list[Any]]:
        if self.cpu:
            return list(self.host.devices[:1]), []
        found, missing = [], []
        for gpu in wanted.gpus:
            match = [d for d in self.host.devices if gpu in (d.index, d.uuid) or str(gpu) == str(d.index)]
            if match:
                found.append(match[0])
            else:
                missing.append(gpu)
        return found, missing

    def _instance(self, wanted: Wanted, sharers: Mapping[int, Sequence[str]]) -> InstancePlan | None:
        host = self.host
        devices, missing = self._devices(wanted)
        if missing or not devices:
            there = ", ".join(f"{d.index} ({d.name})" for d in host.devices) or "none"
            wants = ", ".join(map(str, missing)) or "at least one"
            self.errors.append(f"{wanted.name} wants GPU {wants}: the host has {there}; change the instance's gpus")
            return None
        device = min(devices, key=lambda d: d.total_gib - d.foreign_gib - self.taken[d.index])
        try:
            model = served(host.model, wanted.arguments)
            settings = settings_of(wanted.arguments, model, device, self.version, host.device, wanted.environment)
            ranks = settings.tensor_parallel * settings.pipeline_parallel * settings.data_parallel
            if not self.cpu and ranks != len(devices):
                raise MemoryPlanError(
                    f"tensor {settings.tensor_parallel} x pipeline {settings.pipeline_parallel} x data "
                    f"{settings.data_parallel} parallel is {ranks} GPU(s), and {len(devices)} are declared"
                )
            cache = layout(model, settings)
        except (MemoryPlanError, KvCacheError) as error:
            self.errors.append(f"{wanted.name}: {error}")
            return None
        mine = budget(model, settings, device, self.version, host.device, host.calibration)
        verdict, sentences, changes = self._judge(wanted, settings, device, cache, mine, sharers)
        limit = model.max_position_embeddings or max(settings.max_model_len, 1)
        largest = cache.largest_length(mine.kv_low_gib * GIB, limit)
        length = settings.max_model_len if not settings.auto_length else max(1, largest)
        tokens = cache.tokens(max(0.0, mine.kv_gib) * GIB, length)
        concurrency = cache.max_concurrency(max(0.0, mine.kv_gib) * GIB, length)
        safe = cache.max_concurrency(max(0.0, mine.kv_low_gib) * GIB, length)
        recommended = max(1, min(1024, int(safe))) if cache.groups else settings.max_num_seqs
        idle = 0.0
        if verdict in (FITS, TIGHT) and cache.groups and mine.kv_low_gib > 0:
            needed = (settings.max_num_seqs * cache.blocks_per_request(length) + 1) * cache.block_bytes / GIB
            if needed < mine.kv_low_gib / 2:
                idle = mine.kv_gib - needed
                verdict = WASTEFUL
                sentences = [
                    f"{wanted.name}: max-num-seqs {settings.max_num_seqs} requests of max-model-len {length} use at "
                    f"most {needed:.1f} GiB of {mine.kv_gib:.1f} GiB KV cache on each GPU, {idle:.1f} GiB stay idle: "
                    f"set max-num-seqs to {recommended}, or max-model-len up to {largest}"
                ]
        for used in devices:
            self.held[used.index].append((wanted.name, mine))
            self.taken[used.index] += max(mine.used_gib, mine.requested_gib) if verdict != FAILS else mine.used_gib
        return InstancePlan(
            name=wanted.name,
            devices=[d.index for d in devices],
            verdict=verdict,
            sentences=sentences,
            changes=changes,
            budget=mine,
            max_model_len=length,
            largest_max_model_len=largest,
            max_num_seqs=settings.max_num_seqs,
            recommended_max_num_seqs=recommended,
            kv_tokens_low=cache.tokens(max(0.0, mine.kv_low_gib) * GIB, length),
            kv_tokens=tokens,
            max_concurrency=round(min(concurrency, 1e9), 2),
            idle_kv_gib=round(idle, 2),
            calibrated=any(term.source == "measured" for term in (mine.weights, mine.non_torch, mine.activation)),
        )

    def _judge(
        self,
        wanted: Wanted,
        settings: Settings,
        device: Device,
        cache: KvCache,
        mine: Budget,
        sharers: Mapping[int, Sequence[str]],
    ) -> tuple[str, list[str], list[dict[str, Any]]]:
        refusals = _refusals(wanted, settings, self.host.model)
        if refusals:
            self.refused.add(wanted.name)
            return FAILS, refusals, []
        where = "the host's memory" if self.cpu else f"GPU {device.index} ({device.name}, {device.total_gib:.2f} GiB)"
        shortage = start_shortage(settings, device, mine, self.version, self.taken[device.index], self.cpu)
        length = 1 if settings.auto_length else settings.max_model_len
        problem, tight = "", ""
        if shortage.free < 0:
            holders = ", ".join(f"{p.name} ({p.pid}) {p.mib:.0f} MiB" for p in device.foreign)
            others = [name for name, _ in self.held[device.index]]
            by = " and ".join([*(["instance " + ", ".join(others)] if others else []), *([holders] if holders else [])])
            own = f" once its CUDA context of {shortage.context:.1f} GiB is there" if shortage.context else ""
            wants = f"{wanted.name} wants {mine.requested_gib:.2f} GiB of {where}"
            if _only_checked(settings, device, mine, self.cpu) and mine.used_gib <= shortage.available:
                self.refused.add(wanted.name)
                wants = (
                    f"{wanted.name} uses about {mine.used_gib:.2f} GiB with kv-cache-memory-bytes, but vLLM starts "
                    f"only where gpu-memory-utilization {settings.gpu_memory_utilization:g} "
                    f"({checked_gib(settings, device):.2f} GiB) of {where} is free"
                )
            problem = f"{wants}, where {shortage.available:.2f} GiB are free{' beside ' + by if by else ''}{own}"
        elif cache.groups and mine.kv_gib <= 0:
            problem = (
                f"{wanted.name} has no memory left for a KV cache on {where}: of its budget of "
                f"{mine.requested_gib:.2f} GiB the weights take {mine.weights.gib:.2f} and overhead "
                f"{mine.requested_gib - mine.kv_gib - mine.weights.gib:.2f}"
            )
        elif not cache.can_start(mine.kv_gib * GIB, length):
            need = cache.needed_bytes(length) / GIB
            have = f"{mine.kv_gib:.2f} GiB (± {mine.kv_gib - mine.kv_low_gib:.2f})"
            parts = (
                f"{mine.requested_gib:.2f} GiB less {mine.weights.gib:.2f} weights, "
                f"{mine.requested_gib - mine.kv_gib - mine.weights.gib:.2f} overhead"
            )
            problem = (
                f"{wanted.name} needs {need:.2f} GiB of KV cache for one request of max-model-len {length} on {where}, "
                f"and {have} are left ({parts})"
            )
        elif shortage.later < 0:
            problem = (
                f"{wanted.name} captures CUDA graphs of about {mine.graphs.gib:.1f} GiB outside its budget of "
                f"{mine.requested_gib:.2f} GiB on {where}, where {max(0.0, shortage.later + mine.graphs.gib):.1f} GiB "
                "are left beside it"
            )
        elif not cache.can_start(mine.kv_low_gib * GIB, length):
            tight = (
                f"{wanted.name} should start on {where} with {mine.kv_gib:.2f} GiB of KV cache, but by the uncertainty "
                f"of the estimate it may be {mine.kv_low_gib:.2f} GiB, and max-model-len {length} needs "
                f"{cache.needed_bytes(length) / GIB:.2f} GiB"
            )
        elif shortage.later < shortage.margin:
            tight = (
                f"{wanted.name} leaves about {shortage.later:.1f} GiB of {where} outside its budget: the sampler's "
                "warm-up or a CUDA graph may run out of memory"
            )
        if not problem and not tight:
            return FITS, [], []
        changes = self._changes(wanted, settings, device, mine, sharers)
        advice = ": " + "; or ".join(change["text"] for change in changes) if changes else ""
        if problem:
            return FAILS, [problem + advice], changes
        return TIGHT, [tight + advice], changes

    def _changes(
        self,
        wanted: Wanted,
        settings: Settings,
        device: Device,
        mine: Budget,
        sharers: Mapping[int, Sequence[str]],
    ) -> list[dict[str, Any]]:
        """The nearest single changes that would fit with certainty."""
        changes: list[dict[str, Any]] = []
        model = served(self.host.model, wanted.arguments)
        others = [name for name in sharers.get(device.index, []) if name != wanted.name]
        if others and not self.cpu:
            spare = [d for d in self.host.devices if d.index not in sharers]
            free = [d.index for d in spare if self._room(wanted, d)]
            ranks = settings.tensor_parallel * settings.pipeline_parallel * settings.data_parallel
            free = free if len(free) >= ranks else []
            where = f"GPU {', '.join(map(str, free))} is free" if free else "the host needs one more"
            changes.append({"gpus": free[:ranks], "text": f"give {wanted.name} a GPU of its own ({where})"})

        def fits(arguments: Mapping[str, Any], gpus: int = 0, alone: bool = False) -> bool:
            try:
                trial = settings_of(
                    {**wanted.arguments, **arguments},
                    model,
                    device,
                    self.version,
                    self.host.device,
                    wanted.environment,
                )
                cache = layout(model, trial)
            except (MemoryPlanError, KvCacheError):
                return False
            calibration = Calibration() if gpus else self.host.calibration
            if arguments and not gpus:
                # What was measured stays, but KV that was measured is for other arguments.
                same = set(arguments) <= {"max-model-len", "gpu-memory-utilization"}
                calibration = calibration if same else replace(calibration, available_kv_gib=None)
            then = budget(model, trial, device, self.version, self.host.device, calibration)
            # On other GPUs nothing of the plan is in the way.
            taken = 0.0 if gpus else self.taken[device.index]
            there = replace(device, processes=(), free_mib=-1) if gpus or alone else device
            shortage = start_shortage(trial, there, then, self.version, taken, self.cpu)
            length = 1 if trial.auto_length else trial.max_model_len
            enough = shortage.free >= 0 and shortage.later >= shortage.margin
            return enough and cache.can_start(then.kv_low_gib * GIB, length)

        if device.foreign and fits({}, alone=True):
            changes.append({"text": "end " + " and ".join(f"{p.name} ({p.pid})" for p in device.foreign)})
        if not settings.auto_length and fits({"max-model-len": 1}):
            low, high = 1, settings.max_model_len
            while low < high:
                middle = (low + high + 1) // 2
                if fits({"max-model-len": middle}):
                    low = middle
                else:
                    high = middle - 1
            low = low // 1024 * 1024 if low > 4096 else low // 16 * 16 or low
            if low < settings.max_model_len:
                changes.append({"max-model-len": low, "text": f"set max-model-len to {low}"})
        if not settings.kv_cache_memory_bytes:
            now = settings.gpu_memory_utilization
            steps = [step / 100 for step in range(5, 99)]
            for step in sorted(steps, key=lambda value: abs(value - now)):
                if abs(step - now) > 0.004 and fits({"gpu-memory-utilization": step}):
                    changes.append(
                        {"gpu-memory-utilization": step, "text": f"set gpu-memory-utilization to {step:.2f}"}
                    )
                    break
        else:
            share = math.ceil(mine.used_gib / device.total_gib * 100) / 100
            if _only_checked(settings, device, mine, self.cpu) and fits({"gpu-memory-utilization": share}):
                text = f"set gpu-memory-utilization to {share:.2f} as well, about what the engine uses"
                changes.append({"gpu-memory-utilization": share, "text": text})
            sizes = range(settings.kv_cache_memory_bytes * 16 // GIB, 0, -1)
            size = next((n * GIB // 16 for n in sizes if fits({"kv-cache-memory-bytes": n * GIB // 16})), 0)
            if 0 < size < settings.kv_cache_memory_bytes and not self.cpu:
                text = f"set kv-cache-memory-bytes to {size} ({size / GIB:.2f} GiB)"
                changes.append({"kv-cache-memory-bytes": size, "text": text})
        newer = not self.cpu and device.generation in ("hopper", "ada", "blackwell")
        if settings.kv.cache_dtype == "auto" and newer and fits({"kv-cache-dtype": "fp8"}):
            changes.append({"kv-cache-dtype": "fp8", "text": "set kv-cache-dtype to fp8"})
        if not self.cpu:
            ranks = settings.tensor_parallel * 2
            while ranks <= 8 and model.heads % ranks == 0:
                if fits({"tensor-parallel-size": ranks}, gpus=ranks):
                    text = f"run it on {ranks} GPUs such as this with tensor-parallel-size {ranks}"
                    changes.append({"tensor-parallel-size": ranks, "text": text})
                    break
                ranks *= 2
        return changes

    def _room(self, wanted: Wanted, device: Device) -> bool:
        """Whether a GPU that nothing of the plan uses has, beside foreign memory, what the engine asks for."""
        host = self.host
        try:
            model = served(host.model, wanted.arguments)
            settings = settings_of(wanted.arguments, model, device, self.version, host.device, wanted.environment)
        except MemoryPlanError:
            return False
        mine = budget(model, settings, device, self.version, host.device, host.calibration)
        return start_shortage(settings, device, mine, self.version).free >= 0

    def _places(self, names: Sequence[str], devices: Sequence[Device]) -> list[int]:
        """A GPU for each of these engines, the first that has room; empty where there are too few."""
        left, places = list(devices), []
        for name in names:
            wanted = next(w for w in self.host.instances if w.name == name)
            found = next((d for d in left if self._room(wanted, d)), None)
            if found is None:
                return []
            left.remove(found)
            places.append(found.index)
        return places

    def _shared(self, plans: list[InstancePlan], sharers: Mapping[int, Sequence[str]]) -> None:
        """Say of each GPU that several engines want and cannot have what they want in sum, and where they would fit."""
        for index, names in sharers.items():
            mine = [p for p in plans if index in p.devices]
            if len(mine) < 2 or self.cpu or all(p.verdict != FAILS or p.name in self.refused for p in mine):
                continue
            device = next(d for d in self.host.devices if d.index == index)
            weights = " + ".join(f"{p.budget.weights.gib:.1f}" for p in mine)
            requests = " + ".join(f"{p.budget.requested_gib:.1f}" for p in mine)
            total_weights = sum(p.budget.weights.gib for p in mine)
            total = sum(p.budget.requested_gib for p in mine)
            alone = total_weights > device.total_gib - device.foreign_gib
            spare = [d for d in self.host.devices if d.index not in sharers]
            single = all(len(p.devices) == 1 for p in mine)
            places = self._places([p.name for p in mine], [device, *spare]) if single else []
            if places:
                placed = ", ".join(f"{p.name} on GPU {gpu}" for p, gpu in zip(mine, places))
                offer = f"declare one GPU for each, such as {placed}"
            else:
                offer = f"declare one GPU for each ({len(mine)} GPUs such as this one), or one instance on this GPU"
            self.errors.append(
                f"{' and '.join(names)} share GPU {index} ({device.name}, {device.total_gib:.2f} GiB): "
                f"their weights are {weights} = {total_weights:.1f} GiB"
                + (", which alone is more than the GPU has" if alone else "")
                + f", and they ask for {requests} = {total:.1f} GiB: {offer}"
            )

    def _table(self) -> list[DevicePlan]:
        result = []
        for device in self.host.devices:
            held = self.held[device.index]
            weights = sum(b.weights.gib for _, b in held)
            overhead = sum(b.overhead_gib for _, b in held)
            kv = sum(max(0.0, b.kv_gib) for _, b in held)
            total, foreign = device.total_gib, device.foreign_gib
            free = total - weights - overhead - kv - foreign
            names = [name for name, _ in held]
            result.append(DevicePlan(device.index, device.name, total, weights, overhead, kv, foreign, free, names))
        return result


def _only_checked(settings: Settings, device: Device, mine: Budget, cpu: bool) -> bool:
    """Whether vLLM's check at the start wants more than the engine uses, as kv-cache-memory-bytes says how much."""
    return bool(settings.kv_cache_memory_bytes) and not cpu and checked_gib(settings, device) > mine.used_gib


def _refusals(wanted: Wanted, settings: Settings, facts: ModelFacts) -> list[str]:
    """What vLLM refuses before it looks at any memory, one sentence each."""
    found = []
    given = {str(key).lstrip("-").replace("_", "-") for key, value in wanted.arguments.items() if value is not None}
    longer = str(wanted.environment.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "")).strip().lower() in ("1", "true")
    # These change the limit of the model's configuration.
    longer = longer or any(name.startswith(("hf-overrides", "rope-scaling")) for name in given)
    limit = facts.max_position_embeddings
    if 0 < limit < settings.max_model_len and not longer:
        found.append(
            f"{wanted.name}: vLLM refuses max-model-len {settings.max_model_len}, as the model's "
            f"max_position_embeddings is {limit}: set max-model-len to {limit} or less"
        )
    tokens, seqs = settings.max_num_batched_tokens, settings.max_num_seqs
    if seqs > tokens:
        found.append(
            f"{wanted.name}: vLLM refuses max-num-seqs {seqs}, as max-num-batched-tokens is {tokens}: "
            f"set max-num-seqs to {tokens} or less, or max-num-batched-tokens to {seqs} or more"
        )
    ranks = settings.tensor_parallel
    if facts.heads % ranks:
        best = next(n for n in range(ranks - 1, 0, -1) if facts.heads % n == 0)
        count = best * settings.pipeline_parallel * settings.data_parallel
        found.append(
            f"{wanted.name}: vLLM refuses tensor-parallel-size {ranks}, as it does not divide the model's "
            f"{facts.heads} attention heads: set tensor-parallel-size to {best} and declare {count} GPU(s)"
        )
    return found

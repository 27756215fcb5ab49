# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Whether the engines of a host will start, and with how much KV cache, before anything is installed.

The budget of an engine on each of its GPUs::

    requested = ceil(total x gpu-memory-utilization)            must be free when the engine starts
    KV cache  = requested - weights - non-torch - activation (- CUDA graphs from 0.21 on)

``total``, ``requested`` and all that follows from the KV cache (see ``_kv_cache``) are exact. The other
terms are estimates with an uncertainty each; what vLLM reported on the host itself ("calibration")
replaces them. All sizes are GiB per GPU unless said otherwise.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ._kv_cache import KvCache, KvCacheError, KvOptions, lay_out
from ._model_facts import BITS, FULL, LINEAR, Layer, ModelFacts

GIB = 2**30
#: The version that is planned for where none is given or it has no number (nightly, a commit).
PINNED = (0, 32, 0)

FITS, TIGHT, WASTEFUL, FAILS = "fits", "tight", "wasteful", "does not fit"


@dataclass(frozen=True)
class Board:
    """A GPU by name: ``memory.total`` of nvidia-smi, total as CUDA sees it, and what of it matters to vLLM."""

    pattern: str
    total_mib: int
    cuda_gib: float
    generation: str
    linked: bool = False


#: Boards whose figures were published, more special names first. ``linked``: NVLink between the GPUs of a host.
BOARDS = (
    Board(r"H100.*NVL", 95830, 93.10, "hopper", True),
    Board(r"H200", 143771, 139.80, "hopper", True),
    Board(r"H100", 81559, 79.18, "hopper", True),
    Board(r"GH200", 97871, 94.50, "hopper"),
    Board(r"B200", 183359, 178.35, "blackwell", True),
    Board(r"A[18]00.*40", 40960, 39.40, "ampere"),
    Board(r"A[18]00", 81920, 79.25, "ampere"),
    Board(r"L40S", 46068, 44.42, "ada"),
    Board(r"RTX PRO 6000", 97887, 94.97, "blackwell"),
    Board(r"RTX 5070 Ti", 16303, 15.47, "blackwell"),
    Board(r"RTX 5090", 32607, 31.36, "blackwell"),
    Board(r"RTX 5080", 16303, 15.47, "blackwell"),
    Board(r"RTX 4090", 24564, 23.52, "ada"),
    Board(r"RTX 3090", 24576, 23.56, "ampere"),
    Board(r"A10G", 23028, 22.06, "ampere"),
    Board(r"\bL4\b", 23034, 22.03, "ada"),
)


class MemoryPlanError(ValueError):
    """An argument or a device that cannot be planned with; the message is one sentence."""


@dataclass(frozen=True)
class Process:
    """A program that holds memory (MiB) of a GPU. ``own``: an engine of the plan that runs already."""

    name: str
    pid: int
    mib: float
    own: bool = False


@dataclass(frozen=True)
class Device:
    """One GPU, or the memory of the host for the CPU device, before any engine of the plan runs.

    ``reserved_mib`` and ``free_mib`` are nvidia-smi's ``memory.reserved`` and ``memory.free``; negative: not
    known. ``processes`` hold memory.
    """

    index: int
    name: str
    total_mib: float
    uuid: str = ""
    reserved_mib: float = -1
    free_mib: float = -1
    processes: tuple[Process, ...] = ()

    @property
    def board(self) -> Board | None:
        """The entry of ``BOARDS``, where the name is known."""
        return next((board for board in BOARDS if re.search(board.pattern, self.name, re.IGNORECASE)), None)

    @property
    def generation(self) -> str:
        """hopper, ampere and so on, or empty."""
        return self.board.generation if self.board else ""

    @property
    def total_gib(self) -> float:
        """Total as CUDA reports it: memory.total - memory.reserved, or the board's published figure."""
        if self.reserved_mib > 0:
            return (self.total_mib - self.reserved_mib) / 1024
        board = self.board
        if board and abs(board.total_mib - self.total_mib) < 0.02 * self.total_mib:
            return board.cuda_gib
        return self.total_mib / 1024 * 0.977  # what boards of other names keep back, by those of BOARDS

    @property
    def foreign_gib(self) -> float:
        """Memory that something outside the plan holds."""
        named = sum(process.mib for process in self.foreign) / 1024
        if self.free_mib < 0:
            return named
        own = sum(process.mib for process in self.processes if process.own) / 1024
        return max(named, self.total_gib - self.free_mib / 1024 - own, 0.0)

    @property
    def foreign(self) -> list[Process]:
        """The processes that are no engine of the plan."""
        return [process for process in self.processes if not process.own]


def device_by_name(name: str, index: int = 0) -> Device:
    """An idle GPU of a known board, for a plan without a host.

    Raises MemoryPlanError where ``BOARDS`` has none of this name.
    """
    device = Device(index, name, 0)
    if device.board is None:
        raise MemoryPlanError(f"GPU {name!r} is not known: give its total memory in MiB")
    return replace(device, total_mib=device.board.total_mib)


@dataclass(frozen=True)
class Term:
    """A part of the budget in GiB, with what it may be off by. ``source`` is estimated, measured or exact."""

    gib: float
    plus_minus: float
    source: str = "estimated"


@dataclass(frozen=True)
class Calibration:
    """What vLLM reported on this host when it started with the same model; None where it is not known (GiB)."""

    weights_gib: float | None = None
    non_torch_gib: float | None = None
    peak_activation_gib: float | None = None
    graph_gib: float | None = None
    available_kv_gib: float | None = None
    gpu_memory_utilization: float | None = None


@dataclass(frozen=True)
class Settings:
    """The arguments that memory depends on, with vLLM's defaults for version and device filled in."""

    gpu_memory_utilization: float
    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int
    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int
    enforce_eager: bool
    kv_cache_memory_bytes: int
    multimodal: bool
    runtime_fp8: bool
    cpu_offload_gb: float
    mtp_layers: int
    mxfp4: bool
    kv: KvOptions

    @property
    def auto_length(self) -> bool:
        """Whether vLLM chooses max-model-len itself."""
        return self.max_model_len < 0


@dataclass(frozen=True)
class Budget:
    """What an engine takes of each of its GPUs. ``kv_*`` may be negative: then nothing is left for the KV cache."""

    requested_gib: float
    weights: Term
    non_torch: Term
    activation: Term
    graphs: Term
    graphs_inside: bool
    kv_low_gib: float
    kv_gib: float
    kv_high_gib: float

    @property
    def overhead_gib(self) -> float:
        """All but weights and KV cache, graphs outside the budget included."""
        return self.non_torch.gib + self.activation.gib + self.graphs.gib

    @property
    def used_gib(self) -> float:
        """All that the engine holds once it serves."""
        return self.weights.gib + self.overhead_gib + max(0.0, self.kv_gib)


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


def parse_version(text: str) -> tuple[int, int, int]:
    """(0, 19, 1) from 0.19.1rc1 and the like; ``PINNED`` where there is no number, as in nightly."""
    match = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?(?!\.?dev)", str(text or ""))
    if not match:
        return PINNED
    return int(match[1]), int(match[2]), int(match[3] or 0)


def whole_number(value: Any, name: str) -> int:
    """A count as vLLM reads it: 32k is 32000, 32K is 32768, auto is -1.

    Raises MemoryPlanError for anything else.
    """
    if isinstance(value, bool):
        raise MemoryPlanError(f"{name} is {value!r}: wanted a whole number")
    if isinstance(value, int) or (isinstance(value, float) and value == int(value)):
        return int(value)
    text = str(value).strip()
    if text == "auto":
        return -1
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([kKmMgGtT]?)", text)
    if not match or ("." in match[1] and not match[2].islower()):
        raise MemoryPlanError(f"{name} is {value!r}: wanted a whole number such as 32768, 32k (32000) or 32K (32768)")
    power = " kmgt".index(match[2].lower() or " ")
    unit = 1000 if match[2].islower() else 1024
    return int(float(match[1]) * unit**power)


def settings_of(
    arguments: Mapping[str, Any],
    facts: ModelFacts,
    device: Device,
    version: tuple[int, int, int] = PINNED,
    kind: str = "cuda",
    environment: Mapping[str, str] | None = None,
) -> Settings:
    """The arguments with vLLM's defaults: ``get_batch_defaults`` and ``CacheConfig`` of 0.32, older ones by version.

    Raises MemoryPlanError for a value that cannot be read.
    """
    given = {str(key).lstrip("-").replace("_", "-"): value for key, value in arguments.items() if value is not None}

    def count(name: str, default: int) -> int:
        return whole_number(given[name], name) if name in given else default

    def switch(name: str, default: bool = False) -> bool:
        if f"no-{name}" in given:
            return not given[f"no-{name}"]
        value = given.get(name, default)
        return value if isinstance(value, bool) else str(value).lower() in ("true", "1", "yes")

    tensor, pipeline = count("tensor-parallel-size", 1), count("pipeline-parallel-size", 1)
    if min(tensor, pipeline) < 1:
        raise MemoryPlanError("tensor-parallel-size and pipeline-parallel-size must be 1 or more")
    default_tokens, default_seqs = _batch_defaults(device, version, kind, tensor * pipeline)
    seqs = count("max-num-seqs", default_seqs)
    length = count("max-model-len", facts.max_position_embeddings or 8192)
    tokens = count("max-num-batched-tokens", default_tokens)
    if "max-num-batched-tokens" not in given and length > 0:
        tokens = min(tokens, max(1, seqs) * length)
    if "max-num-seqs" not in given:
        seqs = min(seqs, tokens)
    if min(seqs, tokens) < 1 or length == 0 or length < -1:
        raise MemoryPlanError("max-model-len, max-num-seqs and max-num-batched-tokens must be 1 or more")

    speculation = _speculation(given)
    drafts = int(speculation.get("num_speculative_tokens") or 0)
    # Async scheduling is the default on CUDA from 0.14; that two batches in flight count for sliding
    # windows came with vllm#47728 in 0.26. Logs of 0.25.1 still show one.
    asynchronous = switch("async-scheduling", kind == "cuda" and version >= (0, 14, 0))
    batches = 2 if asynchronous and pipeline == 1 and version >= (0, 26, 0) else pipeline
    caching = switch("enable-prefix-caching", version >= (0, 18, 0))
    linear = any(layer.kind == LINEAR for layer in facts.layers)
    chunked = any(layer.kind == "chunked" for layer in facts.layers)
    block = count("block-size", 128 if kind == "cpu" else 16)
    hybrid = not switch("disable-hybrid-kv-cache-manager") and version >= (0, 10, 0) and not chunked
    utilization = given.get("gpu-memory-utilization", 0.92 if version >= (0, 21, 0) else 0.90)
    try:
        utilization = float(utilization)
    except (TypeError, ValueError):
        utilization = -1.0
    if not 0 < utilization <= 1:
        shown = given.get("gpu-memory-utilization")
        raise MemoryPlanError(f"gpu-memory-utilization is {shown!r}: wanted a number above 0, at most 1")
    explicit = count("kv-cache-memory-bytes", 0)
    space = (environment or {}).get("VLLM_CPU_KVCACHE_SPACE", "")
    if kind == "cpu" and str(space).strip() not in ("", "0"):
        explicit = whole_number(space, "VLLM_CPU_KVCACHE_SPACE") * GIB  # whole GiB, and it wins
    return Settings(
        gpu_memory_utilization=utilization,
        max_model_len=length,
        max_num_batched_tokens=tokens,
        max_num_seqs=seqs,
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        data_parallel=count("data-parallel-size", 1),
        enforce_eager=switch("enforce-eager") or kind == "cpu",
        kv_cache_memory_bytes=explicit,
        multimodal=facts.multimodal and not switch("language-model-only"),
        runtime_fp8=facts.quantization == "none" and str(given.get("quantization", "")).startswith("fp8"),
        cpu_offload_gb=float(given.get("cpu-offload-gb", 0) or 0),
        mtp_layers=facts.mtp_layers if "mtp" in str(speculation.get("method", "")) else 0,
        mxfp4=facts.quantization == "mxfp4",
        kv=KvOptions(
            block_size=block,
            cache_dtype=str(given.get("kv-cache-dtype", "auto")),
            tensor_parallel=tensor,
            pipeline_parallel=pipeline,
            context_parallel=count("decode-context-parallel-size", 1),
            hybrid=hybrid,
            max_num_batched_tokens=tokens,
            concurrent_batches=batches,
            state_blocks=(2 if caching and linear else 1) + drafts,
            tokens_by_group=version < (0, 21, 0),
            whole_model_check=version < (0, 16, 0),
        ),
    )


def _speculation(given: Mapping[str, Any]) -> Mapping[str, Any]:
    value = given.get("speculative-config") or {}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = {"method": value}
    return value if isinstance(value, Mapping) else {}


def _batch_defaults(device: Device, version: tuple[int, int, int], kind: str, world: int) -> tuple[int, int]:
    """max-num-batched-tokens and max-num-seqs of the API server, by the size of the GPU."""
    if kind == "cpu":
        return 2048 * world, 128 * world
    if device.total_gib >= 160:
        return 16384, 1024
    if device.total_gib >= 70 and "a100" not in device.name.lower():
        # 0.8 had one tier of sequences for all.
        return 8192, 1024 if version >= (0, 9, 0) else 256
    return 2048, 256


def layout(facts: ModelFacts, settings: Settings) -> KvCache:
    """The KV cache of the model with these arguments. Raises KvCacheError."""
    drafter = [Layer(FULL, facts.kv_heads, facts.head_dim, facts.head_dim)] * settings.mtp_layers
    return lay_out(facts, settings.kv, drafter)


# The estimates. Each formula is a sum of what is physically there; the few constants in it were fitted to
# published starts of 0.8 to 0.30 (per GPU, GiB), grouped by who published them.

#: Padding of MXFP4 experts: Marlin (GPUs other than Hopper, and Hopper before 0.12), Triton, and Hopper from 0.29.
#: gpt-oss-120b, of which 56.7 of 60.8 GiB are experts, loads 65.97, 64.38 and 61.43 GiB.
MXFP4_MARLIN, MXFP4_TRITON, MXFP4_HOPPER = 1.092, 1.065, 1.012
#: Bytes of the sampler for each sequence and token of the vocabulary: while it sorted all logits, from 0.17, from
#: 0.21 (logits in 16 bits and a copy in 32).
SAMPLER_SORT, SAMPLER, SAMPLER_LATE = 38.0, 14.0, 6.0
#: CUDA and kernels outside PyTorch on one GPU: before and from 0.17.
NON_TORCH_EARLY, NON_TORCH = 0.13, 0.25
#: Buffers for all-reduce between NVLinked GPUs: before 0.17, to 0.20, from 0.21.
LINKED_EARLY, LINKED, LINKED_LATE = 0.5, 1.85, 0.5
#: What stays with PyTorch after the profile run, counted from 0.21: on Hopper, and with MXFP4 experts anywhere.
KEPT_HOPPER, KEPT_MXFP4 = 1.0, 0.95
#: CUDA graphs for each layer and captured batch size: before and from 0.21.
GRAPH, GRAPH_LATE = 0.00045, 0.00028


def estimate_weights(
    facts: ModelFacts, settings: Settings, device: Device, version: tuple[int, int, int], kind: str = "cuda"
) -> Term:
    """Weights per GPU: bytes of the checkpoint, or of its parameters, as the kernels pad them, divided by the ranks.

    Uncertain by 1.2 % where the size of the checkpoint is known, else by 3 % (10 % at four bits).
    """
    known = facts.weight_bytes > 0
    total = (facts.weight_bytes or facts.estimated_weight_bytes) / GIB
    if total <= 0:
        return Term(0.0, float("inf"))
    if known and facts.mtp_layers > settings.mtp_layers and facts.depth:
        # vLLM skips layers for multi-token prediction unless it speculates with them.
        total *= facts.depth / (facts.depth + facts.mtp_layers)
    error = 0.1 + (0.012 if known else 0.03 if facts.quantization in ("none", "fp8", "int8") else 0.10) * total
    if settings.runtime_fp8:
        plain = facts.embedding_parameters * (1 if facts.tied else 2) * facts.dtype_bytes / GIB
        total = plain + (total - plain) / 2
        error += 0.03 * total
    ranks = settings.tensor_parallel * settings.pipeline_parallel
    if facts.quantization == "mxfp4" and kind == "cuda":
        experts = facts.expert_parameters * BITS["mxfp4"] / 8 / GIB
        if device.generation == "hopper" and version >= (0, 29, 0):
            factor = MXFP4_HOPPER
        elif device.generation == "hopper" and version >= (0, 12, 0):
            factor = MXFP4_TRITON
            error += 0.013 * total  # Marlin is used where the Triton kernels are not installed
        else:
            factor = MXFP4_MARLIN
        if settings.tensor_parallel > 1:
            part = -(-facts.expert_intermediate_size // settings.tensor_parallel)
            factor *= min(1.03, -(-part // 64) * 64 / part)
        total += experts * (factor - 1)
    replicated = 0.03 if ranks > 1 else 0.0
    return Term(max(0.0, total / ranks + replicated - settings.cpu_offload_gb), error / ranks)


def estimate_non_torch(facts: ModelFacts, settings: Settings, device: Device, version: tuple[int, int, int]) -> Term:
    """What CUDA, NCCL and kernels hold outside PyTorch; from 0.21 also what PyTorch keeps after the profile run."""
    gib = NON_TORCH_EARLY if version < (0, 17, 0) else NON_TORCH
    error = 0.15 if version < (0, 21, 0) else 0.3
    board = device.board
    if settings.tensor_parallel > 1 and board and board.linked:
        # NCCL's and the custom all-reduce's buffers, and symmetric memory.
        gib += LINKED_EARLY if version < (0, 17, 0) else LINKED if version < (0, 21, 0) else LINKED_LATE
        error = 0.7 if version < (0, 17, 0) else 0.3
    if version >= (0, 21, 0):
        if device.generation == "hopper":
            gib += KEPT_HOPPER
            error = 0.9
        if facts.quantization == "mxfp4":
            gib += KEPT_MXFP4
            error = max(error, 0.4)
    return Term(gib, error)


def estimate_activation(
    facts: ModelFacts, settings: Settings, version: tuple[int, int, int], kind: str = "cuda"
) -> Term:
    """The largest of three moments of the profile run, which do not coincide.

    - the sampler: max-num-seqs x vocabulary x SAMPLER, beside it the hidden states;
    - the widest layer: feed-forward or experts (every token as often as it has experts), 8 hidden states;
    - from 0.19 a copy of the token embedding, where it is part of the compiled graph of a text model.
    """
    seqs, tokens = min(settings.max_num_seqs, settings.max_num_batched_tokens), settings.max_num_batched_tokens
    ranks = settings.tensor_parallel
    each = SAMPLER_SORT if version < (0, 17, 0) else SAMPLER if version < (0, 21, 0) else SAMPLER_LATE
    hidden = tokens * facts.hidden_size
    sampler = (each * seqs * facts.vocab_size + 2 * hidden) / GIB + 0.05
    if facts.experts:
        width = facts.expert_intermediate_size / ranks
        wide = facts.experts_per_token * (max(2 * width, facts.hidden_size) + width)
    else:
        wide = 3 * facts.intermediate_size / ranks
    layer = tokens * (2 * wide + 16 * facts.hidden_size) / GIB
    if any(part.kind == LINEAR for part in facts.layers):
        layer += 0.5 * tokens / 8192
    if facts.mla_expanded:
        # Chunked prefill expands up to 64 Ki latent vectors to keys and values of all heads.
        layer += min(65536, 64 * seqs) * facts.mla_expanded / ranks * 2 / GIB
    copy = 0.0
    if kind == "cuda" and version >= (0, 19, 0) and ranks == 1 and not facts.multimodal:
        copy = facts.embedding_parameters * facts.dtype_bytes / GIB + 0.03
    gib = max(sampler, layer, copy)
    if settings.multimodal:
        gib += 0.3
    error = 0.15 + (0.5 if settings.multimodal else 0.0) + (0.3 + 0.1 * gib if facts.experts else 0.03 * gib)
    if version < (0, 17, 0):
        error += 0.3 * gib
    return Term(gib, error)


def capture_sizes(settings: Settings, version: tuple[int, int, int]) -> int:
    """Number of batch sizes that CUDA graphs are captured for by default."""
    largest = min(512, settings.max_num_batched_tokens)
    if version >= (0, 11, 0):
        largest = min(largest, 2 * settings.max_num_seqs)
    step = 16 if version >= (0, 11, 0) else 8
    return len([size for size in (1, 2, 4) if size <= largest]) + len(
        [*range(8, min(largest + 1, 256), 8), *range(256, largest + 1, step)]
    )


def estimate_graphs(facts: ModelFacts, settings: Settings, version: tuple[int, int, int]) -> Term:
    """CUDA graphs: GRAPH for each layer and batch size, and a first one."""
    if settings.enforce_eager:
        return Term(0.0, 0.0, "exact")
    each = GRAPH if version < (0, 21, 0) else GRAPH_LATE
    gib = 0.1 + each * facts.depth / settings.pipeline_parallel * capture_sizes(settings, version)
    if facts.mla_expanded and version >= (0, 21, 0):
        gib += 1.8  # its decode workspaces are captured with them
    return Term(gib, 0.1 + 0.35 * gib)


def budget(
    facts: ModelFacts,
    settings: Settings,
    device: Device,
    version: tuple[int, int, int] = PINNED,
    kind: str = "cuda",
    calibration: Calibration | None = None,
) -> Budget:
    """What an engine takes of one GPU, and what is left for its KV cache."""
    calibration = calibration or Calibration()

    def measured(value: float | None, estimate: Term) -> Term:
        # Terms differ by about so much from boot to boot.
        return estimate if value is None else Term(value, 0.05 if estimate.gib < 1 else 0.1, "measured")

    weights = measured(calibration.weights_gib, estimate_weights(facts, settings, device, version, kind))
    if kind == "cpu":
        # Python and libraries of the server and the engine process: 1.7 to 1.9 GiB where it was measured.
        non_torch, graphs = Term(1.7, 0.6), Term(0.0, 0.0, "exact")
    else:
        non_torch, graphs = (
            estimate_non_torch(facts, settings, device, version),
            estimate_graphs(facts, settings, version),
        )
    non_torch = measured(calibration.non_torch_gib, non_torch)
    activation = measured(calibration.peak_activation_gib, estimate_activation(facts, settings, version, kind))
    if not settings.enforce_eager:
        graphs = measured(calibration.graph_gib, graphs)
    inside = version >= (0, 21, 0)
    requested = checked_gib(settings, device)
    if settings.kv_cache_memory_bytes:
        kv = settings.kv_cache_memory_bytes / GIB
        requested = weights.gib + non_torch.gib + activation.gib + graphs.gib + kv
        return Budget(requested, weights, non_torch, activation, graphs, inside, kv, kv, kv)
    terms = [weights, non_torch, activation, *([graphs] if inside else [])]
    kv = requested - sum(term.gib for term in terms)
    error = math.sqrt(sum(term.plus_minus**2 for term in terms))
    if calibration.available_kv_gib is not None:
        before = calibration.gpu_memory_utilization or settings.gpu_memory_utilization
        kv = calibration.available_kv_gib + device.total_gib * (settings.gpu_memory_utilization - before)
        error = 0.2
        rest = requested - kv - weights.gib - non_torch.gib - (graphs.gib if inside else 0.0)
        activation = Term(rest, error, "measured")  # so that the parts sum up
    return Budget(requested, weights, non_torch, activation, graphs, inside, kv - error, kv, kv + error)


def context_gib(settings: Settings, device: Device) -> float:
    """What an engine's own CUDA context takes of the free memory before vLLM looks at it.

    0.2 to 0.6 GiB for one GPU, 1.1 to 2.2 with others.
    """
    if settings.tensor_parallel * settings.pipeline_parallel == 1:
        return 0.5
    return 1.5 if device.board and device.board.linked else 0.6


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
            settings = settings_of(wanted.arguments, host.model, device, self.version, host.device, wanted.environment)
            ranks = settings.tensor_parallel * settings.pipeline_parallel * settings.data_parallel
            if not self.cpu and ranks != len(devices):
                raise MemoryPlanError(
                    f"tensor {settings.tensor_parallel} x pipeline {settings.pipeline_parallel} x data "
                    f"{settings.data_parallel} parallel is {ranks} GPU(s), and {len(devices)} are declared"
                )
            cache = layout(host.model, settings)
        except (MemoryPlanError, KvCacheError) as error:
            self.errors.append(f"{wanted.name}: {error}")
            return None
        mine = budget(host.model, settings, device, self.version, host.device, host.calibration)
        verdict, sentences, changes = self._judge(wanted, settings, device, cache, mine, sharers)
        limit = host.model.max_position_embeddings or max(settings.max_model_len, 1)
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
                    self.host.model,
                    device,
                    self.version,
                    self.host.device,
                    wanted.environment,
                )
                cache = layout(self.host.model, trial)
            except (MemoryPlanError, KvCacheError):
                return False
            calibration = Calibration() if gpus else self.host.calibration
            if arguments and not gpus:
                # What was measured stays, but KV that was measured is for other arguments.
                same = set(arguments) <= {"max-model-len", "gpu-memory-utilization"}
                calibration = calibration if same else replace(calibration, available_kv_gib=None)
            then = budget(self.host.model, trial, device, self.version, self.host.device, calibration)
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
            while ranks <= 8 and self.host.model.heads % ranks == 0:
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
            settings = settings_of(wanted.arguments, host.model, device, self.version, host.device, wanted.environment)
        except MemoryPlanError:
            return False
        mine = budget(host.model, settings, device, self.version, host.device, host.calibration)
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


@dataclass(frozen=True)
class Shortage:
    """``free``: GiB above what the engine asks for when it starts; ``later``: what stays outside its budget then.

    ``margin`` is what ``later`` may be off by, ``context`` what the engine's own CUDA context takes first. Negative
    values are missing.
    """

    available: float
    context: float
    free: float
    later: float
    margin: float


def checked_gib(settings: Settings, device: Device) -> float:
    """What vLLM wants to be free of a GPU when it starts, with kv-cache-memory-bytes too (``request_memory``)."""
    return math.ceil(device.total_gib * GIB * settings.gpu_memory_utilization) / GIB


def start_shortage(
    settings: Settings,
    device: Device,
    mine: Budget,
    version: tuple[int, int, int],
    taken: float = 0.0,
    cpu: bool = False,
) -> Shortage:
    """Whether what is free suffices, when ``taken`` GiB belong to engines that started before."""
    context = 0.0 if cpu else context_gib(settings, device)
    available = device.total_gib - device.foreign_gib - taken - context
    wanted = mine.requested_gib
    if settings.kv_cache_memory_bytes:
        # vLLM sizes nothing by its utilization then, but still refuses to start where that much is not free. All
        # that is used must be there as well.
        wanted = mine.used_gib if cpu else max(mine.used_gib, checked_gib(settings, device))
    free = available - wanted
    if version >= (0, 21, 0) or cpu or settings.kv_cache_memory_bytes:
        return Shortage(available, context, free, max(0.0, free), 0.0)
    # Graphs come on top of the budget; so do the buffers that MXFP4's kernels take when they first run.
    extra = 2.5 if settings.mxfp4 else 0.0
    return Shortage(
        available, context, free, free - mine.graphs.gib - extra, 0.5 * mine.graphs.plus_minus + 0.2 * extra
    )

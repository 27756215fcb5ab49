# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""What one engine takes of a GPU: vLLM's defaults, the terms of its budget, and what must be free when it starts.

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
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ._kv_cache import KvCache, KvOptions, lay_out
from ._model_facts import BITS, FULL, LINEAR, Layer, ModelFacts

GIB = 2**30
#: The version that is planned for where none is given or it has no number (nightly, a commit).
PINNED = (0, 32, 0)


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
    expert_parallel: bool
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


#: Bytes of a number, by the argument dtype.
DTYPES = {"half": 2, "float16": 2, "bfloat16": 2, "float": 4, "float32": 4}


def served(facts: ModelFacts, arguments: Mapping[str, Any]) -> ModelFacts:
    """The facts of the model as the argument ``dtype`` has it served. Raises MemoryPlanError."""
    dtype = str(arguments.get("dtype") or "auto")
    if dtype == "auto":
        return facts
    if dtype not in DTYPES:
        raise MemoryPlanError(f"dtype is {dtype!r}: wanted auto or one of {', '.join(DTYPES)}")
    return replace(facts, dtype_bytes=DTYPES[dtype])


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
    data = count("data-parallel-size", 1)
    if min(tensor, pipeline, data) < 1:
        raise MemoryPlanError("tensor-, pipeline- and data-parallel-size must be 1 or more")
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
        data_parallel=data,
        expert_parallel=switch("enable-expert-parallel"),
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
KEPT_HOPPER, KEPT_MXFP4 = 0.35, 0.95
#: Bytes of the counts for penalties, for each sequence and token of the vocabulary, from 0.21 on Hopper: a number of
#: 4 bytes, and a bit for the prompt (``penalties.py`` of 0.32; seen in starts with 8, 64 and 1024 sequences).
COUNTS = 4.125
#: CUDA graphs for each layer and captured batch size: before and from 0.21.
GRAPH, GRAPH_LATE = 0.00045, 0.00028


def estimate_weights(
    facts: ModelFacts, settings: Settings, device: Device, version: tuple[int, int, int], kind: str = "cuda"
) -> Term:
    """Weights per GPU: bytes of the checkpoint, or of its parameters, as the kernels pad them, divided by the ranks.

    Experts are divided by the data-parallel ranks too, with and without expert parallelism
    (``FusedMoEParallelConfig.make``); all else is on each of them.
    Uncertain by 1.2 % where the size of the checkpoint is known, else by 3 % (10 % at four bits).
    """
    known = facts.weight_bytes > 0
    total = (facts.weight_bytes or facts.estimated_weight_bytes) / GIB
    if total <= 0:
        return Term(0.0, float("inf"))
    if known and facts.mtp_layers > settings.mtp_layers and facts.depth:
        # vLLM skips layers for multi-token prediction unless it speculates with them.
        total *= facts.depth / (facts.depth + facts.mtp_layers)
    if known and facts.quantization == "none":
        total *= facts.dtype_bytes / facts.stored_bytes
    error = 0.1 + (0.012 if known else 0.03 if facts.quantization in ("none", "fp8", "int8") else 0.10) * total
    if settings.runtime_fp8:
        plain = facts.embedding_parameters * (1 if facts.tied else 2) * facts.dtype_bytes / GIB
        total = plain + (total - plain) / 2
        error += 0.03 * total
    ranks = settings.tensor_parallel * settings.pipeline_parallel
    bits = BITS[facts.quantization] if facts.quantization != "none" else 8.0 * facts.dtype_bytes
    experts = min(total, facts.expert_parameters * (8.0 if settings.runtime_fp8 else bits) / 8 / GIB)
    if facts.quantization == "mxfp4" and kind == "cuda":
        if device.generation == "hopper" and version >= (0, 29, 0):
            factor = MXFP4_HOPPER
        elif device.generation == "hopper" and version >= (0, 12, 0):
            factor = MXFP4_TRITON
            error += 0.013 * total  # Marlin is used where the Triton kernels are not installed
        else:
            factor = MXFP4_MARLIN
        shares = settings.tensor_parallel * settings.data_parallel
        if shares > 1 and not settings.expert_parallel:
            part = -(-facts.expert_intermediate_size // shares)
            factor *= min(1.03, -(-part // 64) * 64 / part)
        total += experts * (factor - 1)
        experts *= factor
    replicated = 0.03 if ranks > 1 else 0.0
    each = (total - experts + experts / settings.data_parallel) / ranks
    return Term(max(0.0, each + replicated - settings.cpu_offload_gb), error / ranks)


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
            gib += KEPT_HOPPER + COUNTS * settings.max_num_seqs * facts.vocab_size / GIB
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


def capture_sizes(facts: ModelFacts, settings: Settings, version: tuple[int, int, int]) -> tuple[int, int]:
    """Numbers of batch sizes that CUDA graphs are captured for by default: in pieces, and whole for decoding alone."""
    step = 16 if version >= (0, 11, 0) else 8
    largest = min(512, settings.max_num_batched_tokens)
    decode = settings.max_num_seqs
    if version >= (0, 11, 0):
        largest = min(largest, 2 * settings.max_num_seqs)
    pieces = largest
    if facts.model_type == "gpt_oss" and version >= (0, 11, 0):
        # GptOssForCausalLMConfig: 1024, whatever max-num-seqs is. Seen: 83 in pieces, and 83, 11 and 4 whole.
        pieces, largest = 1024, min(1024, decode)

    def count(limit: int) -> int:
        return len([size for size in (1, 2, 4) if size <= limit]) + len(
            [*range(8, min(limit + 1, 256), 8), *range(256, limit + 1, step)]
        )

    return count(pieces), count(largest)


def estimate_graphs(facts: ModelFacts, settings: Settings, version: tuple[int, int, int]) -> Term:
    """CUDA graphs: GRAPH for each layer and batch size, three quarters of it in pieces, and a first one."""
    if settings.enforce_eager:
        return Term(0.0, 0.0, "exact")
    each = GRAPH if version < (0, 21, 0) else GRAPH_LATE
    pieces, whole = capture_sizes(facts, settings, version)
    gib = 0.1 + each * facts.depth / settings.pipeline_parallel * (0.75 * pieces + 0.25 * whole)
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

# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""The KV cache as vLLM lays it out: blocks, tokens, concurrency, and what the start-up check asks for.

Integer arithmetic, no estimate: the formulas are those of vLLM 0.32 (``v1/core/kv_cache_utils.py``,
``v1/kv_cache_interface.py``), with what was different before it. Checked against logs of 0.10 to 0.32.

Layers with equal needs form groups. All groups draw blocks from one pool, so a block has the bytes of
one group: layers of the group x page. ``page = block_size x kv_heads x (k + v dimension) x bytes``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ._model_facts import CHUNKED, FULL, LINEAR, MLA, SLIDING, Layer, ModelFacts

#: Bits of one element. fp8 has no scales of its own in the pages; nvfp4 has one of 8 bits for 16 elements.
KV_BITS = {
    "fp8": 8.0,
    "fp8_e4m3": 8.0,
    "fp8_e5m2": 8.0,
    "fp8_inc": 8.0,
    "nvfp4": 4.5,
    "bfloat16": 16.0,
    "float16": 16.0,
    "half": 16.0,
    "float32": 32.0,
}


class KvCacheError(ValueError):
    """Arguments that no cache can be laid out for; the message is one sentence."""


@dataclass(frozen=True)
class KvOptions:
    """What the layout depends on besides the model. Sizes in tokens.

    ``concurrent_batches`` is what can be in flight at once: 2 with async scheduling, else the
    pipeline's depth. ``state_blocks`` are the blocks a request holds of each group of linear layers.
    ``tokens_by_group``: up to 0.20 the log divided blocks by groups for "GPU KV cache size".
    ``whole_model_check``: up to 0.15 the start-up check held the need of all pipeline stages against one.
    """

    block_size: int = 16
    cache_dtype: str = "auto"
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    context_parallel: int = 1
    hybrid: bool = True
    max_num_batched_tokens: int = 8192
    concurrent_batches: int = 1
    state_blocks: int = 1
    tokens_by_group: bool = False
    whole_model_check: bool = False


@dataclass(frozen=True)
class Group:
    """Layers that share a block table. ``layers`` is their number on the widest pipeline stage; ``page`` in bytes."""

    kind: str
    layers: int
    page: int
    block_size: int
    window: int = 0


@dataclass(frozen=True)
class _Spec:
    kind: str
    page: int
    block_size: int
    window: int = 0


@dataclass(frozen=True)
class KvCache:
    """The layout. ``block_bytes`` is what one block of the pool takes on one GPU; no groups: no cache at all.

    ``check_bytes`` is that of the start-up check, where it is another.
    """

    groups: tuple[Group, ...]
    block_bytes: int
    options: KvOptions
    check_bytes: int = 0

    def blocks_per_request(self, length: int) -> int:
        """Blocks that a request of ``length`` tokens may hold at once, over all groups."""
        return sum(self._blocks(group, length) for group in self.groups)

    def _blocks(self, group: Group, length: int) -> int:
        in_flight = self.options.concurrent_batches * self.options.max_num_batched_tokens
        if group.kind == LINEAR:
            return self.options.state_blocks
        if group.kind == SLIDING:
            # One more, as a window need not begin where a block does.
            return _ceil(min(group.window - 1 + in_flight, length), group.block_size) + 1
        if group.kind == CHUNKED:
            return _ceil(min(group.window + in_flight, length), group.block_size)
        return _ceil(_ceil(length, self.options.context_parallel), group.block_size)

    def needed_bytes(self, length: int) -> int:
        """Bytes that a start with max-model-len ``length`` needs: one request, and one block that is never used."""
        if not self.groups:
            return 0
        return (self.blocks_per_request(length) + 1) * max(self.block_bytes, self.check_bytes)

    def can_start(self, kv_bytes: float, length: int) -> bool:
        """Whether vLLM accepts max-model-len ``length`` with so many bytes of KV cache."""
        if not self.groups:
            return True
        return kv_bytes > 0 and self.needed_bytes(length) <= kv_bytes

    def blocks(self, kv_bytes: float) -> int:
        """Blocks of the pool (``num_gpu_blocks``)."""
        return max(0, int(kv_bytes) // self.block_bytes) if self.groups else 1

    def max_concurrency(self, kv_bytes: float, length: int) -> float:
        """Requests of ``length`` tokens that fit at once, as the log's "Maximum concurrency"."""
        if not self.groups:
            return float("inf")
        return self.blocks(kv_bytes) / self.blocks_per_request(length)

    def tokens(self, kv_bytes: float, length: int) -> int:
        """Tokens as the log's "GPU KV cache size" and ``kv_cache_size_tokens`` have them."""
        if not self.groups:
            return 0
        if self.options.tokens_by_group:
            return self.blocks(kv_bytes) // len(self.groups) * min(group.block_size for group in self.groups)
        return int(self.max_concurrency(kv_bytes, length) * length)

    def largest_length(self, kv_bytes: float, limit: int) -> int:
        """The largest max-model-len up to ``limit`` that can start, 0 for none. What ``auto`` takes."""
        if not self.can_start(kv_bytes, 1):
            return 0
        low, high = 1, max(1, limit)
        while low < high:
            middle = (low + high + 1) // 2
            if self.can_start(kv_bytes, middle):
                low = middle
            else:
                high = middle - 1
        return low


def lay_out(facts: ModelFacts, options: KvOptions, extra_layers: Sequence[Layer] = ()) -> KvCache:
    """The KV cache of a model. ``extra_layers`` are those of a drafter.

    Raises KvCacheError for a cache dtype that is not known, or pages that cannot be made equal.
    """
    layers = [*facts.layers, *extra_layers]
    if not layers:
        return KvCache((), 0, options)
    block_size = options.block_size
    states = [layer for layer in layers if layer.kind == LINEAR]
    attention = [layer for layer in layers if layer.kind != LINEAR]
    state_page = max((_state_bytes(layer, facts, options) for layer in states), default=0)
    if states and attention:
        # The block of attention grows until its page holds a state; that page is then the state's too.
        per_token = max(_page(layer, 1, facts, options) for layer in attention)
        block_size = max(block_size, options.block_size * _ceil(state_page, options.block_size * per_token))
        state_page = max(state_page, block_size * per_token)
    specs = [
        _Spec(LINEAR, state_page, block_size)
        if layer.kind == LINEAR
        else _Spec(layer.kind, _page(layer, block_size, facts, options), block_size, layer.window)
        for layer in layers
    ]
    if not options.hybrid and any(spec.kind in (FULL, MLA) for spec in specs):
        specs = [_Spec(FULL, spec.page, spec.block_size) if spec.kind in (SLIDING, CHUNKED) else spec for spec in specs]
    check = _group(specs, 1)[1] if options.whole_model_check else 0
    return KvCache(*_group(specs, options.pipeline_parallel), options, check)


def _group(specs: list[_Spec], stages: int) -> tuple[tuple[Group, ...], int]:
    """Groups and bytes of a block, both for the pipeline stage that needs most."""
    stage = _stages(len(specs), stages)
    if len({(spec.kind, spec.window) for spec in specs}) == 1:
        # One kind: all layers in one group, whatever their pages.
        sizes = [sum(spec.page for spec, s in zip(specs, stage) if s == number) for number in range(stages)]
        widest = sizes.index(max(sizes))
        first = specs[0]
        group = Group(first.kind, stage.count(widest), first.page, first.block_size, first.window)
        return (group,), sizes[widest]
    specs = _unify(specs)
    members: dict[_Spec, list[int]] = {}
    for number, spec in enumerate(specs):
        members.setdefault(spec, []).append(number)
    counts = [len(numbers) for numbers in members.values()]
    size = min(counts)
    if max(counts) < 1.5 * size:
        size = max(counts)
    groups = []
    most = 0
    for spec, numbers in members.items():
        parts = _ceil(len(numbers), size)
        for part in range(parts):
            mine = numbers[part::parts]
            held = max(sum(stage[number] == s for number in mine) for s in range(stages))
            groups.append(Group(spec.kind, held, spec.page, spec.block_size, spec.window))
            most = max(most, held)
    # A group with fewer layers is padded.
    return tuple(groups), most * specs[0].page


def _unify(specs: list[_Spec]) -> list[_Spec]:
    """Give all pages the largest size: by more tokens a block where that comes out even, else by padding."""
    largest = max(spec.page for spec in specs)
    result = []
    for spec in specs:
        if spec.page == largest or spec.kind == LINEAR:
            result.append(_Spec(spec.kind, largest, spec.block_size, spec.window))
        elif largest % spec.page == 0:
            result.append(_Spec(spec.kind, largest, spec.block_size * (largest // spec.page), spec.window))
        elif spec.kind == MLA:
            raise KvCacheError(f"pages of {spec.page} B (MLA) and {largest} B cannot share a KV cache")
        else:
            result.append(_Spec(spec.kind, largest, spec.block_size, spec.window))
    return result


def _page(layer: Layer, block_size: int, facts: ModelFacts, options: KvOptions) -> int:
    """Bytes of one block of one layer on one GPU."""
    if layer.kind == MLA:
        elements = block_size * layer.head_dim  # one vector for all heads: every rank of a tensor group holds it
    else:
        # With fewer KV heads than ranks each rank holds a copy of one.
        heads = max(1, layer.kv_heads // options.tensor_parallel)
        elements = block_size * heads * (layer.head_dim + layer.head_dim_v)
    return int(elements * _bits(facts, options) / 8)


def _bits(facts: ModelFacts, options: KvOptions) -> float:
    if options.cache_dtype == "auto":
        return 8.0 * facts.dtype_bytes
    if options.cache_dtype not in KV_BITS:
        raise KvCacheError(f"kv-cache-dtype is {options.cache_dtype!r}: wanted auto or one of {', '.join(KV_BITS)}")
    return KV_BITS[options.cache_dtype]


def _state_bytes(layer: Layer, facts: ModelFacts, options: KvOptions) -> int:
    conv = layer.conv_state // options.tensor_parallel * facts.dtype_bytes
    return conv + layer.ssm_state // options.tensor_parallel * (layer.ssm_bytes or facts.dtype_bytes)


def _stages(layers: int, stages: int) -> list[int]:
    """Pipeline stage of each layer. What does not divide goes to the stages before the last, from the back."""
    sizes = [layers // stages] * stages
    for number in range(layers % stages):
        sizes[-2 - number if stages > 1 else 0] += 1
    return [number for number, size in enumerate(sizes) for _ in range(size)]


def _ceil(value: Any, divisor: Any) -> int:
    return int(-(-value // divisor))

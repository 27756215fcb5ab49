"""The layout of the KV cache against the figures that vLLM itself logged."""

from __future__ import annotations

import math

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _kv_cache as kv
from ansible_collections.nvl.vllm.plugins.module_utils._model_facts import Layer, built_in, from_config
from hypothesis import given, settings
from hypothesis import strategies as st

GIB, MIB = 2**30, 2**20
SMALL = {"hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 64, "vocab_size": 1000}
LLAMA = from_config({**SMALL, "num_hidden_layers": 3, "num_key_value_heads": 2, "head_dim": 128})
GPT_OSS = from_config({**SMALL, "model_type": "gpt_oss", "num_hidden_layers": 4, "head_dim": 64, "sliding_window": 128})
GEMMA = from_config(
    {
        **SMALL,
        "num_hidden_layers": 7,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "sliding_window": 512,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
    }
)
QWEN_35 = {
    **SMALL,
    "model_type": "qwen3_5_text",
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}


@pytest.mark.parametrize(
    ("utilization", "gib", "expected"),
    [
        (0.85, 10.63, [(37.7, 154570), (6.3, None), (2.1, None)]),
        (0.90, 15.29, [(54.3, 222229), (9.0, None), (3.0, None)]),
        (0.92, 17.15, [(60.9, 249297), (10.1, None), (3.4, None)]),
    ],
)
def test_gpt_oss_120b_on_an_h100_nvl(utilization, gib, expected):
    cache = kv.lay_out(built_in("gpt-oss-120b"), kv.KvOptions(concurrent_batches=2))
    assert cache.block_bytes == 589_824
    assert [group.layers for group in cache.groups] == [18, 18]
    # 93.10 GiB as CUDA has it (93.0994), less 68.5 GiB that are no KV cache.
    size = math.ceil(93.0994 * GIB * utilization) - 68.5 * GIB
    assert size / GIB == pytest.approx(gib, abs=0.0051)
    for length, (requests, tokens) in zip((4096, 32768, 131072), expected, strict=True):
        assert round(cache.max_concurrency(size, length), 1) == requests
        assert tokens in (None, cache.tokens(size, length))
        assert cache.can_start(size, length)


def test_what_gpt_oss_120b_needs():
    cache = kv.lay_out(built_in("gpt-oss-120b"), kv.KvOptions(concurrent_batches=2))
    assert cache.needed_bytes(4096) == (256 + 257 + 1) * 589_824
    assert cache.needed_bytes(131072) == (8192 + (127 + 16384 + 15) // 16 + 1 + 1) * 589_824
    assert cache.can_start(cache.needed_bytes(4096), 4096)
    assert not cache.can_start(cache.needed_bytes(4096) - 1, 4096)


# Seen on a running server of vLLM 0.32.0 (CPU): block of 128, no async scheduling.
@pytest.mark.parametrize(
    ("facts", "mib", "length", "batched", "hybrid", "tokens"),
    [
        (LLAMA, 64, 4096, 4096, True, 21_760),
        (GPT_OSS, 128, 8192, 4096, True, 21_399),
        (GPT_OSS, 128, 8192, 4096, False, 16_384),
        (GPT_OSS, 256, 32768, 512, True, 64_035),
        (GEMMA, 64, 8192, 4096, True, 29_330),
    ],
)
def test_the_cpu_server(facts, mib, length, batched, hybrid, tokens):
    cache = kv.lay_out(facts, kv.KvOptions(block_size=128, max_num_batched_tokens=batched, hybrid=hybrid))
    assert cache.tokens(mib * MIB, length) == tokens


def test_the_cpu_servers_concurrency():
    cache = kv.lay_out(GPT_OSS, kv.KvOptions(block_size=128, max_num_batched_tokens=4096))
    assert round(cache.max_concurrency(128 * MIB, 8192), 2) == 2.61


def test_linear_layers_widen_the_block_of_attention():
    # vLLM 0.20: blocks of 1056 tokens, and of 2096 with a cache of fp8.
    facts = from_config(QWEN_35)
    cache = kv.lay_out(facts, kv.KvOptions(tokens_by_group=True))
    assert {group.block_size for group in cache.groups} == {1056}
    assert cache.block_bytes == 10 * 1056 * 2048
    assert cache.blocks_per_request(4096) == 4 + 3
    assert kv.lay_out(facts, kv.KvOptions(cache_dtype="fp8")).groups[0].block_size == 2096


def test_pages_of_unequal_layers_are_made_equal_by_longer_blocks():
    layers = [Layer("sliding", 8, 256, 256, 1024)] * 5 + [Layer("full", 2, 512, 512)]
    facts = from_config({**SMALL, "num_hidden_layers": 1})
    cache = kv.lay_out(facts, kv.KvOptions(), layers)
    assert {(group.kind, group.block_size) for group in cache.groups} >= {("sliding", 16), ("full", 32)}


@pytest.mark.parametrize(("sliding", "full", "groups", "layers"), [(12, 13, 2, 13), (12, 18, 3, 12), (10, 5, 3, 5)])
def test_group_size(sliding, full, groups, layers):
    types = ["sliding_attention"] * sliding + ["full_attention"] * full
    facts = from_config(
        {**SMALL, "num_hidden_layers": sliding + full, "layer_types": types, "sliding_window": 64, "head_dim": 64}
    )
    cache = kv.lay_out(facts, kv.KvOptions())
    assert len(cache.groups) == groups
    assert cache.block_bytes == layers * 16 * 8 * 128 * 2


@pytest.mark.parametrize(("ranks", "heads"), [(1, 8), (2, 4), (8, 1), (16, 1)])
def test_tensor_parallel_divides_heads_and_replicates_the_last(ranks, heads):
    cache = kv.lay_out(built_in("gpt-oss-120b"), kv.KvOptions(tensor_parallel=ranks))
    assert cache.block_bytes == 18 * 16 * heads * 128 * 2


def test_pipeline_parallel_divides_layers():
    cache = kv.lay_out(built_in("gpt-oss-120b"), kv.KvOptions(pipeline_parallel=2))
    assert cache.block_bytes == 589_824 // 2
    old = kv.lay_out(built_in("gpt-oss-120b"), kv.KvOptions(pipeline_parallel=2, whole_model_check=True))
    assert old.needed_bytes(4096) == 2 * cache.needed_bytes(4096)


def test_layers_that_do_not_divide_go_to_the_stages_before_the_last():
    cache = kv.lay_out(GEMMA, kv.KvOptions(pipeline_parallel=4, hybrid=False))
    assert kv._stages(7, 4) == [0, 0, 1, 1, 2, 2, 3]
    assert cache.groups[0].layers == 2


@pytest.mark.parametrize(("window", "blocks"), [(1, 32 + 1), (17, 33 + 1), (18, 34 + 1)])
def test_a_window_needs_its_tokens_less_one_and_what_is_in_flight(window, blocks):
    facts = from_config({**SMALL, "num_hidden_layers": 2, "sliding_window": window})
    cache = kv.lay_out(facts, kv.KvOptions(max_num_batched_tokens=256, concurrent_batches=2))
    assert cache.blocks_per_request(10**6) == blocks


def test_a_chunked_layer_keeps_its_chunk_and_what_is_in_flight():
    facts = from_config({**SMALL, "num_hidden_layers": 4, "attention_chunk_size": 1024})
    cache = kv.lay_out(facts, kv.KvOptions(max_num_batched_tokens=512))
    assert cache.blocks_per_request(32768) == 2048 + 3 * 1536 // 16
    assert cache.blocks_per_request(512) == 4 * 32


def test_mla_is_not_divided():
    facts = from_config({**SMALL, "num_hidden_layers": 27, "kv_lora_rank": 512, "qk_rope_head_dim": 64})
    for ranks in (1, 2, 8):
        assert kv.lay_out(facts, kv.KvOptions(tensor_parallel=ranks)).block_bytes == 16 * 31_104


def test_fp8_halves():
    facts = built_in("gpt-oss-120b")
    assert kv.lay_out(facts, kv.KvOptions(cache_dtype="fp8")).block_bytes * 2 == 589_824
    with pytest.raises(ValueError, match="wanted auto or one of fp8"):
        kv.lay_out(facts, kv.KvOptions(cache_dtype="fp7"))


def test_largest_length_is_the_largest():
    cache = kv.lay_out(built_in("gpt-oss-120b"), kv.KvOptions())
    largest = cache.largest_length(2 * GIB, 131072)
    assert cache.can_start(2 * GIB, largest)
    assert not cache.can_start(2 * GIB, largest + 1)
    assert cache.largest_length(0, 131072) == 0


@settings(deadline=None)
@given(st.integers(0, 2**36), st.integers(0, 2**34), st.integers(1, 200_000), st.sampled_from([LLAMA, GPT_OSS, GEMMA]))
def test_more_memory_never_yields_fewer_tokens(size, more, length, facts):
    cache = kv.lay_out(facts, kv.KvOptions())
    assert cache.tokens(size, length) <= cache.tokens(size + more, length)
    assert cache.largest_length(size, 200_000) <= cache.largest_length(size + more, 200_000)
    assert cache.can_start(size + more, length) or not cache.can_start(size, length)


@settings(deadline=None)
@given(st.integers(1, 200_000), st.integers(0, 100_000), st.integers(1, 4))
def test_longer_requests_need_no_less(length, more, batches):
    cache = kv.lay_out(GPT_OSS, kv.KvOptions(concurrent_batches=batches))
    assert cache.needed_bytes(length) <= cache.needed_bytes(length + more)

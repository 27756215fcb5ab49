"""What is read from a model's config.json, and what is refused."""

from __future__ import annotations

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _model_facts as facts

BASE = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "intermediate_size": 128,
    "vocab_size": 1000,
}


def kinds(**config):
    return [layer.kind for layer in facts.from_config({**BASE, **config}).layers]


def test_gpt_oss_is_built_in():
    found = facts.built_in("openai/gpt-oss-120b")
    assert found == facts.built_in("/srv/models/gpt-oss-120b/")
    assert [layer.kind for layer in found.layers] == ["sliding", "full"] * 18
    assert {(layer.kv_heads, layer.head_dim, layer.head_dim_v) for layer in found.layers} == {(8, 64, 64)}
    assert found.quantization == "mxfp4"
    # Counted parameters come to the published checkpoint.
    assert found.estimated_weight_bytes == pytest.approx(found.weight_bytes, rel=0.005)


def test_another_model_is_not_built_in():
    with pytest.raises(facts.ModelFactsError, match=r"none of gpt-oss-120b, gpt-oss-20b: give its config\.json"):
        facts.built_in("Qwen/Qwen3-8B")


def test_every_head_has_keys_and_values_unless_told():
    layer = facts.from_config(BASE).layers[0]
    assert (layer.kv_heads, layer.head_dim, layer.head_dim_v) == (8, 8, 8)


def test_head_dim_need_not_be_hidden_by_heads():
    layer = facts.from_config({**BASE, "num_key_value_heads": 2, "head_dim": 128}).layers[0]
    assert (layer.kv_heads, layer.head_dim) == (2, 128)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"sliding_window": 16, "use_sliding_window": False}, ["full"] * 4),
        ({"sliding_window": None}, ["full"] * 4),
        ({"sliding_window": 16}, ["sliding"] * 4),
        ({"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 3}, ["full"] * 3 + ["sliding"]),
        ({"sliding_window": 16, "sliding_window_pattern": 2}, ["sliding", "full"] * 2),
        (
            {"sliding_window": 16, "model_type": "gemma3_text", "num_hidden_layers": 7},
            [*["sliding"] * 5, "full", "sliding"],
        ),
        (
            {
                "sliding_window": 16,
                "sliding_window_pattern": 2,
                "layer_types": ["full_attention"] * 3 + ["sliding_attention"],
            },
            ["full"] * 3 + ["sliding"],
        ),
        ({"attention_chunk_size": 8192}, ["chunked"] * 3 + ["full"]),
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, ["mla"] * 4),
    ],
)
def test_kinds_of_layers(config, expected):
    assert kinds(**config) == expected


def test_the_text_part_counts():
    found = facts.from_config({"model_type": "gemma3", "vision_config": {}, "text_config": {**BASE, "head_dim": 32}})
    assert found.multimodal
    assert found.layers[0].head_dim == 32


def test_gemma_4s_full_layers_have_other_heads_and_the_last_share_their_cache():
    config = {
        **BASE,
        "model_type": "gemma4_text",
        "head_dim": 256,
        "global_head_dim": 512,
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
    }
    assert [(layer.kind, layer.kv_heads, layer.head_dim) for layer in facts.from_config(config).layers] == [
        ("sliding", 4, 256),
        ("full", 2, 512),
    ]


def test_linear_layers_keep_a_state():
    config = {
        **BASE,
        "model_type": "qwen3_next",
        "full_attention_interval": 4,
        "linear_num_key_heads": 16,
        "linear_key_head_dim": 128,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
    }
    found = facts.from_config(config)
    assert [layer.kind for layer in found.layers] == ["linear"] * 3 + ["full"]
    assert (found.layers[0].conv_state, found.layers[0].ssm_state) == (8192 * 3, 32 * 128 * 128)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (None, "none"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "gptq", "bits": 8}, "int8"),
        ({"quant_method": "auto-round"}, "gptq"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"0": {"weights": {"num_bits": 8, "type": "int"}}}},
            "int8",
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"0": {"weights": {"num_bits": 4, "type": "int"}}}},
            "int4",
        ),
    ],
)
def test_quantization(section, expected):
    assert facts.from_config({**BASE, "quantization_config": section}).quantization == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": None}, "config.json has no num_hidden_layers, which memory depends on"),
        ({"vocab_size": "many"}, "config.json has vocab_size 'many': wanted a whole number"),
        ({"num_hidden_layers": True}, "config.json has num_hidden_layers True: wanted a whole number"),
        ({"layer_types": ["full_attention"]}, "config.json has 1 layer_types for num_hidden_layers 4"),
        ({"layer_types": ["odd"] * 4}, "config.json has layer_types with 'odd': no such kind can be planned"),
        (
            {"layer_types": ["sliding_attention"] * 4},
            "config.json has sliding layers, but its sliding_window is missing",
        ),
        (
            {"layer_types": ["linear_attention"] * 4},
            "config.json has linear layers, but no linear_num_value_heads or mamba_n_heads",
        ),
        (
            {"model_type": "deepseek_v4"},
            "config.json has model_type 'deepseek_v4': its caches have a form that cannot be planned",
        ),
        (
            {"quantization_config": {"quant_method": "odd"}},
            "config.json has quantization_config.quant_method 'odd': its size is not known",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_sentence(change, message):
    with pytest.raises(facts.ModelFactsError) as caught:
        facts.from_config({**BASE, **change})
    assert str(caught.value) == message


def test_a_config_that_is_no_object():
    with pytest.raises(ValueError, match="wanted an object"):
        facts.from_config([])


@pytest.mark.parametrize(
    ("section", "limit"),
    [
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 16384),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, 8192),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}}, 32768),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 4096),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 4096),
        ({"rope_scaling": {"rope_type": "linear", "factor": None}}, 4096),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, 4096),
        ({}, 4096),
    ],
)
def test_a_scaled_rotary_embedding_lengthens_the_model(section, limit):
    assert facts.from_config({**BASE, "max_position_embeddings": 4096, **section}).max_position_embeddings == limit


def test_the_checkpoints_own_dtype():
    assert facts.from_config({**BASE, "torch_dtype": "float32"}).stored_bytes == 4
    assert facts.from_config({**BASE, "dtype": "bfloat16"}).stored_bytes == 2

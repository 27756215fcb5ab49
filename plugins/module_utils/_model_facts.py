# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""What a model's ``config.json`` says about the memory that vLLM will need for it.

Pure: a dictionary in, values out. Names are those of Hugging Face's configurations. Where a model
has a text part (``text_config``), that part counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

FULL, SLIDING, CHUNKED, MLA, LINEAR = "full", "sliding", "chunked", "mla", "linear"

#: Bits per weight of the quantized linear layers, with their scales (block of 32 for mxfp4, 16 for nvfp4,
#: groups of 128 for awq and gptq).
BITS = {"none": 16.0, "fp8": 8.0, "int8": 8.0, "mxfp4": 4.25, "nvfp4": 4.5, "awq": 4.16, "gptq": 4.16, "int4": 4.16}

_LAYER_TYPES = {
    "full_attention": FULL,
    "attention": FULL,
    "sliding_attention": SLIDING,
    "chunked_attention": CHUNKED,
    "linear_attention": LINEAR,
    "mamba": LINEAR,
}
#: What the classes of transformers fill in where the published config.json leaves it out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
    },
    "gemma2": {"sliding_window_pattern": 2, "tie_word_embeddings": True},
    "gemma": {"tie_word_embeddings": True},
    "cohere2": {"sliding_window_pattern": 4, "tie_word_embeddings": True},
    "gpt_oss": {"sliding_window_pattern": 2},
    "gemma4_text": {"sliding_window_pattern": 6, "tie_word_embeddings": True},
}
_DEFAULTS["gemma3"] = _DEFAULTS["gemma3_text"]
_DEFAULTS["gemma4"] = _DEFAULTS["gemma4_text"]
#: Kinds of scaled rotary embedding whose factor is in max_position_embeddings already.
_SCALED_ALREADY = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")
#: Architectures with caches of a form of their own, which the formulas here do not describe.
_UNKNOWN = ("deepseek_v4", "deepseek_v32", "glm_moe_dsa", "whisper", "t5", "bart")


class ModelFactsError(ValueError):
    """A configuration that cannot be planned; the message is one sentence and names the field."""


@dataclass(frozen=True)
class Layer:
    """One layer as the KV cache sees it.

    ``kv_heads`` and ``head_dim`` of keys, ``head_dim_v`` of values. ``window`` in tokens of a sliding or
    chunked layer. A layer of kind ``mla`` keeps one vector of ``head_dim`` a token for all heads. A
    ``linear`` one keeps no tokens but a state: ``conv_state`` and ``ssm_state`` are numbers of elements.
    ``ssm_bytes`` is the size of one element of the latter, 0 for that of the model.
    """

    kind: str
    kv_heads: int = 0
    head_dim: int = 0
    head_dim_v: int = 0
    window: int = 0
    conv_state: int = 0
    ssm_state: int = 0
    ssm_bytes: int = 0


@dataclass(frozen=True)
class ModelFacts:
    """The figures that memory depends on. ``layers`` are in order and leave out those that share another's cache.

    ``expert_intermediate_size`` and ``experts_per_token`` are 0 for a dense model. ``weight_bytes`` is the
    size of the checkpoint, 0 where not known. ``depth`` counts all layers, ``mtp_layers`` are
    those for multi-token prediction, which vLLM loads only to speculate with. ``dtype_bytes`` are those of a
    weight as it is served, ``stored_bytes`` of one in the checkpoint, both where it is not quantized.
    ``max_position_embeddings`` has a scaled rotary embedding's factor in it, where vLLM multiplies the two.
    """

    name: str
    model_type: str
    layers: tuple[Layer, ...]
    depth: int
    hidden_size: int
    vocab_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    experts: int
    experts_per_token: int
    expert_intermediate_size: int
    shared_intermediate_size: int
    quantization: str
    dtype_bytes: int
    stored_bytes: int
    tied: bool
    multimodal: bool
    max_position_embeddings: int
    mtp_layers: int
    mla_expanded: int
    weight_bytes: int = 0

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the token embedding alone."""
        return self.vocab_size * self.hidden_size

    @property
    def expert_parameters(self) -> int:
        """Parameters of all routed experts (gate, up and down projection)."""
        return self.depth * self.experts * 3 * self.hidden_size * self.expert_intermediate_size

    @property
    def linear_parameters(self) -> int:
        """Parameters of attention and feed-forward layers, by the shapes of Llama and its kin."""
        attention = self.hidden_size * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        dense = 0 if self.experts else 3 * self.hidden_size * self.intermediate_size
        dense += 3 * self.hidden_size * self.shared_intermediate_size
        return self.depth * (attention + dense) + self.expert_parameters

    @property
    def estimated_weight_bytes(self) -> int:
        """Bytes of the checkpoint by counting parameters; of use only where its size is not known. 0: cannot say."""
        if not (self.hidden_size and self.vocab_size and (self.intermediate_size or self.experts)):
            return 0
        quantized = self.expert_parameters if self.quantization == "mxfp4" else self.linear_parameters
        plain = self.linear_parameters - quantized + self.embedding_parameters * (1 if self.tied else 2)
        bits = BITS[self.quantization] if self.quantization != "none" else 8.0 * self.dtype_bytes
        encoder = 900 * 2**20 if self.multimodal else 0  # as those for images mostly have
        return int(quantized * bits / 8 + plain * self.dtype_bytes + encoder)


def from_config(config: Mapping[str, Any], weight_bytes: int = 0, name: str = "") -> ModelFacts:
    """The facts of a model from its ``config.json`` and the size of its checkpoint (bytes, 0: not known).

    Raises ModelFactsError where a field that counts is missing or of a kind that cannot be planned.
    """
    if not isinstance(config, Mapping):
        raise ModelFactsError(f"config.json holds {type(config).__name__}: wanted an object")
    outer = config
    inner = config.get("text_config") or config.get("llm_config") or config.get("thinker_config", {})
    while isinstance(inner, Mapping) and inner:
        config = {**inner, "quantization_config": inner.get("quantization_config", outer.get("quantization_config"))}
        config.setdefault("dtype", outer.get("dtype") or outer.get("torch_dtype"))
        inner = inner.get("text_config", {})
    kind = str(config.get("model_type") or outer.get("model_type") or "")
    config = {**_DEFAULTS.get(kind, {}), **{key: value for key, value in config.items() if value is not None}}
    if kind in _UNKNOWN or outer.get("is_encoder_decoder") or "index_topk" in config or "compress_ratios" in config:
        raise ModelFactsError(f"config.json has model_type {kind!r}: its caches have a form that cannot be planned")

    depth = _whole(config, "num_hidden_layers", "n_layer", "n_layers")
    hidden = _whole(config, "hidden_size", "n_embd", "dim")
    heads = _whole(config, "num_attention_heads", "n_head", "n_heads")
    kv_heads = _whole(config, "num_key_value_heads", "n_kv_heads", default=heads)
    head_dim = _whole(config, "head_dim", default=-(-hidden // heads))
    experts = _whole(config, "num_local_experts", "num_experts", "n_routed_experts", default=0)
    intermediate = _whole(config, "intermediate_size", "hidden_dim", "n_inner", default=0)
    facts = ModelFacts(
        name=name,
        model_type=kind,
        layers=(),
        depth=depth,
        hidden_size=hidden,
        vocab_size=_whole(config, "vocab_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        experts=experts,
        experts_per_token=_whole(
            config, "num_experts_per_tok", "top_k_experts", "experts_per_token", default=2 if experts <= 16 else 8
        )
        if experts
        else 0,
        expert_intermediate_size=_whole(config, "moe_intermediate_size", default=intermediate) if experts else 0,
        shared_intermediate_size=_shared(config) if experts else 0,
        quantization=quantization(config),
        # float32 checkpoints are served in 16 bits unless the argument dtype says otherwise.
        dtype_bytes=2,
        stored_bytes=4 if "float32" in str(config.get("dtype") or config.get("torch_dtype")) else 2,
        tied=bool(config.get("tie_word_embeddings", outer.get("tie_word_embeddings", False))),
        multimodal=any(f"{part}_config" in outer for part in ("vision", "audio", "thinker")),
        max_position_embeddings=int(
            _whole(config, "max_position_embeddings", "max_seq_len", default=0) * _rope_factor(config)
        ),
        mtp_layers=_whole(config, "num_nextn_predict_layers", "mtp_num_hidden_layers", default=0),
        mla_expanded=0,
        weight_bytes=int(weight_bytes or 0),
    )
    if "kv_lora_rank" in config:
        expanded = heads * (_whole(config, "qk_nope_head_dim", default=128) + _whole(config, "v_head_dim", default=128))
        facts = replace(facts, mla_expanded=expanded)
    return replace(facts, layers=_layers(config, facts))


def _rope_factor(config: Mapping[str, Any]) -> float:
    """What vLLM multiplies the model's length with (``_get_and_verify_max_len`` of 0.32)."""
    section = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(section, Mapping) or "gemma3" in str(config.get("model_type")):
        return 1.0
    factor = 1.0
    # One set for all layers, or one for each kind of layer.
    for part in [section, *section.values()]:
        if isinstance(part, Mapping) and (part.get("rope_type") or part.get("type")) not in _SCALED_ALREADY:
            value = part.get("factor")
            factor = max(factor, float(value)) if isinstance(value, (int, float)) else factor
    return factor


def _layers(config: Mapping[str, Any], facts: ModelFacts) -> tuple[Layer, ...]:
    """The layers in order. ``layer_types`` wins over any pattern."""
    kinds = _kinds(config, facts)
    shared = _whole(config, "num_kv_shared_layers", default=0)
    window = _whole(config, "sliding_window", default=0)
    chunk = _whole(config, "attention_chunk_size", default=0)
    result = []
    for kind in kinds[: facts.depth - shared]:
        if kind == LINEAR:
            result.append(_state(config))
        elif "kv_lora_rank" in config:
            latent = _whole(config, "kv_lora_rank") + _whole(config, "qk_rope_head_dim")
            result.append(Layer(MLA, 1, latent))
        elif kind == SLIDING:
            if not window:
                raise ModelFactsError("config.json has sliding layers, but its sliding_window is missing")
            width = _whole(config, "v_head_dim", default=facts.head_dim)
            result.append(Layer(SLIDING, facts.kv_heads, facts.head_dim, width, window))
        else:
            # Gemma 4's full layers have heads of another size and number.
            dim = _whole(config, "global_head_dim", default=facts.head_dim)
            heads = _whole(config, "num_global_key_value_heads", default=facts.kv_heads)
            width = _whole(config, "v_head_dim", default=dim)
            result.append(Layer(kind, heads, dim, width, chunk if kind == CHUNKED else 0))
    return tuple(result)


def _kinds(config: Mapping[str, Any], facts: ModelFacts) -> list[str]:
    listed = config.get("layer_types")
    depth = facts.depth
    if isinstance(listed, (list, tuple)):
        unknown = [kind for kind in listed if kind not in _LAYER_TYPES]
        if unknown:
            raise ModelFactsError(f"config.json has layer_types with {unknown[0]!r}: no such kind can be planned")
        if len(listed) < depth:
            raise ModelFactsError(f"config.json has {len(listed)} layer_types for num_hidden_layers {depth}")
        kinds = [_LAYER_TYPES[kind] for kind in listed[:depth]]
        # Qwen lists its layers as full where sliding windows are switched off; a list is the last word.
        return kinds
    interval = _whole(config, "full_attention_interval", default=0)
    if interval:
        return [FULL if (number + 1) % interval == 0 else LINEAR for number in range(depth)]
    if config.get("attn_layer_indices") is not None:
        full = set(config["attn_layer_indices"])
        return [FULL if number in full else LINEAR for number in range(depth)]
    if "mamba_n_heads" in config or "ssm_cfg" in config or "hybrid_override_pattern" in config:
        raise ModelFactsError("config.json has layers with a state, but no layer_types that say which")
    if config.get("attention_chunk_size"):
        # Llama 4: every fourth layer has no rotary embedding and sees all tokens.
        step = _whole(config, "no_rope_layer_interval", default=4)
        return [FULL if (number + 1) % step == 0 else CHUNKED for number in range(depth)]
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        return [FULL] * depth
    if "max_window_layers" in config and config.get("use_sliding_window"):
        first = _whole(config, "max_window_layers")
        return [SLIDING if number >= first else FULL for number in range(depth)]
    pattern = _whole(config, "sliding_window_pattern", "_sliding_window_pattern", default=0)
    if pattern > 1:
        return [FULL if (number + 1) % pattern == 0 else SLIDING for number in range(depth)]
    return [SLIDING] * depth


def _state(config: Mapping[str, Any]) -> Layer:
    """The state of a linear layer: gated delta net (Qwen 3 Next and later), or Mamba 2."""
    wide = 4 if str(config.get("mamba_ssm_dtype")) == "float32" or "qwen3_5" in str(config.get("model_type")) else 0
    if "linear_num_value_heads" in config:
        keys = _whole(config, "linear_num_key_heads") * _whole(config, "linear_key_head_dim")
        heads, dim = _whole(config, "linear_num_value_heads"), _whole(config, "linear_value_head_dim")
        conv = (2 * keys + heads * dim) * (_whole(config, "linear_conv_kernel_dim") - 1)
        ssm = heads * dim * _whole(config, "linear_key_head_dim")
        return Layer(LINEAR, conv_state=conv, ssm_state=ssm, ssm_bytes=wide)
    if "mamba_n_heads" in config:
        heads, dim = _whole(config, "mamba_n_heads"), _whole(config, "mamba_d_head")
        state, groups = _whole(config, "mamba_d_state"), _whole(config, "mamba_n_groups", default=1)
        conv = (heads * dim + 2 * groups * state) * (_whole(config, "mamba_d_conv") - 1)
        return Layer(LINEAR, conv_state=conv, ssm_state=heads * dim * state, ssm_bytes=wide)
    raise ModelFactsError("config.json has linear layers, but no linear_num_value_heads or mamba_n_heads")


def quantization(config: Mapping[str, Any]) -> str:
    """How the checkpoint is quantized: a key of ``BITS``.

    Raises ModelFactsError for a method that is not known.
    """
    section = config.get("quantization_config")
    if not isinstance(section, Mapping) or not section:
        return "none"
    method = str(section.get("quant_method") or "").lower().replace("_", "-")
    algorithm = str(section.get("quant_algo") or "").lower()
    if method == "compressed-tensors":
        groups = section.get("config_groups")
        groups = list(groups.values()) if isinstance(groups, Mapping) else []
        weights = groups[0].get("weights") or {} if groups and isinstance(groups[0], Mapping) else {}
        bits = weights.get("num_bits", 8)
        if bits == 8:
            return "int8" if weights.get("type") == "int" else "fp8"
        return "nvfp4" if weights.get("type") == "float" else "int4"
    if method.startswith("modelopt"):
        return "fp8" if algorithm == "fp8" else "nvfp4"
    if method in ("gptq", "gptq-marlin", "auto-round"):
        return "int8" if section.get("bits") == 8 else "gptq"
    if method in ("fbgemm-fp8", "fp8"):
        return "fp8"
    if method in ("awq", "awq-marlin"):
        return "awq"
    if method == "mxfp4":
        return "mxfp4"
    if method == "bitsandbytes":
        return "int4" if section.get("load_in_4bit", section.get("_load_in_4bit")) else "int8"
    raise ModelFactsError(f"config.json has quantization_config.quant_method {method!r}: its size is not known")


def _shared(config: Mapping[str, Any]) -> int:
    """Width of what all tokens pass besides the routed experts."""
    width = _whole(config, "shared_expert_intermediate_size", default=0)
    count = _whole(config, "n_shared_experts", default=0)
    if count:
        width = count * _whole(config, "moe_intermediate_size", default=0)
    if str(config.get("model_type")).startswith(("llama4", "gemma4")):
        width = _whole(config, "intermediate_size")
    return width


def _whole(config: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, list) and value:
            value = value[0]
        if type(value) is not int or value < 0:
            raise ModelFactsError(f"config.json has {name} {value!r}: wanted a whole number")
        return value
    if default is None:
        raise ModelFactsError(f"config.json has no {names[0]}, which memory depends on")
    return default


def _gpt_oss(layers: int, experts: int) -> dict[str, Any]:
    return {
        "model_type": "gpt_oss",
        "num_hidden_layers": layers,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 201088,
        "num_local_experts": experts,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "quantization_config": {"quant_method": "mxfp4"},
    }


#: Models that a plan can be made for before their checkpoint is there: config.json and bytes of its tensors.
BUILT_IN: dict[str, tuple[dict[str, Any], int]] = {
    "gpt-oss-120b": (_gpt_oss(36, 128), 65_248_815_744),
    "gpt-oss-20b": (_gpt_oss(24, 32), 13_761_264_768),
}


def built_in(name: str) -> ModelFacts:
    """The facts of a model by repository, served name or path whose last part is one of ``BUILT_IN``.

    Raises ModelFactsError for any other.
    """
    key = name.rstrip("/").rpartition("/")[2].lower()
    if key not in BUILT_IN:
        known = ", ".join(BUILT_IN)
        raise ModelFactsError(f"model {name!r} is none of {known}: give its config.json and the bytes of its weights")
    config, weight_bytes = BUILT_IN[key]
    return from_config(config, weight_bytes, key)

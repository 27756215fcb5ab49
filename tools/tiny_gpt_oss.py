#!/usr/bin/env python3
"""Write a tiny model of gpt-oss's architecture, small enough for vLLM's CPU build to serve beside a second one.

Usage: ``tools/tiny_gpt_oss.py DIRECTORY``

It is served like the real checkpoint: ``GptOssForCausalLM`` in bfloat16 with alternating sliding-window and full
attention layers, 8 key/value heads of 64, attention sinks, experts, the whole o200k_harmony vocabulary. Its weights are
not random but a next-token table, so that every answer is a harmony message of the final channel that repeats
``SENTENCE`` until max_tokens, at any temperature:

- the attention's and the experts' output projections are zero, so a token's hidden state is its embedding alone;
- a token that has a successor embeds to an axis of its own, every other token to axis 0, which continues with the
  sentence: a text completion answers as well;
- the output projection scores, for each axis, that successor high and all other tokens zero.

The same bytes come out on every machine (the vocabulary is the one inside ``oss-harmony``), about 60 MB. The directory
appears or changes only as a whole, and is left untouched when it is right already.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from openai_harmony import HarmonyEncoding, HarmonyEncodingName, load_harmony_encoding
from safetensors.numpy import save_file

# No token may occur twice in it: the table knows one successor for each.
SENTENCE = (
    "This is a tiny stand-in with the architecture of gpt-oss: it knows nothing and repeats this one sentence until"
    " max_tokens."
)
BASE_TOKENS = 199_998
SPECIAL_TOKENS = {
    "<|startoftext|>": 199_998,
    "<|endoftext|>": 199_999,
    "<|return|>": 200_002,
    "<|constrain|>": 200_003,
    "<|channel|>": 200_005,
    "<|start|>": 200_006,
    "<|end|>": 200_007,
    "<|message|>": 200_008,
    "<|call|>": 200_012,
}
# How o200k cuts text into words before it looks them up.
WORDS = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
# As openai/gpt-oss-120b's config.json, unquantized and with smaller numbers where size is all that they mean.
CONFIG: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "eos_token_id": SPECIAL_TOKENS["<|return|>"],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "max_position_embeddings": 131_072,
    "model_type": "gpt_oss",
    "num_attention_heads": 16,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "pad_token_id": SPECIAL_TOKENS["<|endoftext|>"],
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150_000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 201_088,
}
GENERATION_CONFIG = {
    "bos_token_id": SPECIAL_TOKENS["<|startoftext|>"],
    "do_sample": True,
    "eos_token_id": [SPECIAL_TOKENS[token] for token in ("<|return|>", "<|endoftext|>", "<|call|>")],
    "pad_token_id": SPECIAL_TOKENS["<|endoftext|>"],
}
TOKENIZER_CONFIG = {
    "bos_token": "<|startoftext|>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|return|>",
    "model_input_names": ["input_ids", "attention_mask"],
    "model_max_length": CONFIG["max_position_embeddings"],
    "pad_token": "<|endoftext|>",
    "tokenizer_class": "PreTrainedTokenizerFast",
}


def successors(encoding: HarmonyEncoding) -> tuple[dict[int, int], int]:
    """Return the token that follows each token of an answer, and the one that follows any other token.

    Raises ``ValueError`` when a token of the sentence would need two successors.
    """
    first, *rest = encoding.encode(SENTENCE)
    again, *same = encoding.encode(" " + SENTENCE)  # from the second time on the first word has a space before it
    opening = encoding.encode("assistant<|channel|>final<|message|>", allowed_special="all")
    if rest != same or len({*opening, first, again, *rest}) != len(opening) + 2 + len(rest):
        raise ValueError("SENTENCE has a token that occurs twice: word it without repetition")
    chain = [*opening, first, *rest, again, rest[0]]
    return dict(pairwise(chain)), again


def weights(encoding: HarmonyEncoding) -> dict[str, np.ndarray]:
    """Return the checkpoint's tensors by their names in ``openai/gpt-oss-120b`` (unquantized: bfloat16)."""
    hidden, inner, experts = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["num_local_experts"]
    queries = CONFIG["num_attention_heads"] * CONFIG["head_dim"]
    keys = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    layer: dict[str, tuple[int, ...]] = {
        "mlp.experts.gate_up_proj": (experts, hidden, 2 * inner),
        "mlp.experts.gate_up_proj_bias": (experts, 2 * inner),
        "mlp.experts.down_proj": (experts, inner, hidden),
        "mlp.experts.down_proj_bias": (experts, hidden),
        "mlp.router.weight": (experts, hidden),
        "mlp.router.bias": (experts,),
        "self_attn.sinks": (CONFIG["num_attention_heads"],),
        "self_attn.o_proj.weight": (hidden, queries),
        "self_attn.o_proj.bias": (hidden,),
    }
    for name, rows in (("q", queries), ("k", keys), ("v", keys)):
        layer[f"self_attn.{name}_proj.weight"] = (rows, hidden)
        layer[f"self_attn.{name}_proj.bias"] = (rows,)
    tensors = {"model.norm.weight": np.ones(hidden, bfloat16)}
    for index in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{index}."
        tensors |= {prefix + name: np.zeros(shape, bfloat16) for name, shape in layer.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = np.ones(hidden, bfloat16)

    follows, otherwise = successors(encoding)
    embedding, head = (np.zeros((CONFIG["vocab_size"], hidden), bfloat16) for _ in range(2))
    embedding[:, 0] = 1
    # The final norm turns a unit axis into sqrt(hidden) = 8, so a successor scores 64: sampling cannot miss it.
    head[otherwise, 0] = 8
    for axis, (token, successor) in enumerate(follows.items(), start=1):
        embedding[token, 0], embedding[token, axis] = 0, 1
        head[successor, axis] = 8
    return tensors | {"model.embed_tokens.weight": embedding, "lm_head.weight": head}


def tokenizer(encoding: HarmonyEncoding) -> dict[str, Any]:
    """Return a ``tokenizer.json`` with the real ids and texts but without the merge rules.

    vLLM encodes chats with ``oss-harmony`` and needs this file to turn answers into text. Without the rules it is 4 MB
    instead of 28 MB and loads in a tenth of the time; a word of a text completion that is no token of its own is
    encoded byte by byte instead of in pieces.
    """
    # Byte-level vocabularies write every byte as one printable character: itself, or the next one from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = (byte for byte in range(256) if byte not in printable)
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    vocabulary = {}
    for token in range(BASE_TOKENS):
        raw = encoding.decode([token], errors="surrogateescape").encode("utf-8", errors="surrogateescape")
        vocabulary["".join(characters[byte] for byte in raw)] = token
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": id_, "content": text} | plain for text, id_ in SPECIAL_TOKENS.items()],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocabulary, "merges": []},
    }


def write(directory: Path) -> bool:
    """Make ``directory`` hold the model and nothing else; return whether anything had to change.

    Raises ``OSError`` when the directory's parent cannot be written; the directory is then as it was.
    """
    encoding = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
        model = Path(scratch, "model")
        model.mkdir()
        for name, content, indent in (
            ("config.json", CONFIG, 2),
            ("generation_config.json", GENERATION_CONFIG, 2),
            ("tokenizer_config.json", TOKENIZER_CONFIG, 2),
            ("tokenizer.json", tokenizer(encoding), None),
        ):
            (model / name).write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
        save_file(weights(encoding), model / "model.safetensors", metadata={"format": "pt"})
        names = sorted(path.name for path in model.iterdir())
        if directory.is_dir():
            present = sorted(path.name for path in directory.iterdir())
            if present == names and filecmp.cmpfiles(model, directory, names, shallow=False)[0] == names:
                return False
            directory.rename(Path(scratch, "previous"))
        model.rename(directory)
    return True


def main() -> None:
    """Write the model from the command line and say whether it changed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path, help="the model's own directory; replaced as a whole when it differs")
    directory = parser.parse_args().directory
    try:
        changed = write(directory)
    except OSError as error:
        sys.exit(f"tiny_gpt_oss: {error}")
    print(f"{directory}: {'written' if changed else 'unchanged'}")


if __name__ == "__main__":
    main()

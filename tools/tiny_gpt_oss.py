#!/usr/bin/env python3
"""Write a tiny model of gpt-oss's architecture, small enough for vLLM's CPU build to serve beside a
second one.

Usage: ``tools/tiny_gpt_oss.py DIRECTORY``

It is served like the real checkpoint: ``GptOssForCausalLM`` in bfloat16 with alternating
sliding-window and full attention layers, 8 key/value heads of 64, attention sinks, experts, the
whole o200k_harmony vocabulary. Its weights are not random but a next-token table, so that every
answer is a harmony message of the final channel that repeats ``SENTENCE`` until max_tokens, at any
temperature:

- the attention's and the experts' output projections are zero, so a token's hidden state is its
  embedding alone;
- a token that has a successor embeds to an axis of its own, every other token to axis 0, which
  continues with the sentence: a text completion answers as well;
- the output projection scores, for each axis, that successor high and all other tokens zero.

The same bytes come out on every machine (the vocabulary is the one inside ``oss-harmony``), about
60 MB. The directory appears or changes only as a whole, and is left untouched when it is right
already.
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
    "This is a tiny stand-in with the architecture of gpt-oss: it knows nothing and repeats this"
    " one sentence until max_tokens."
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
# How o200k cuts text into words before it looks them up; the first two alternatives differ in what
# a word must have at least: a small letter, or a capital one.
WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}]%s"
WORD += r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
WORDS = [WORD % ("*", "+"), WORD % ("+", "*"), r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"]
WORDS += [r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"]
# As openai/gpt-oss-120b's config.json, unquantized and with smaller numbers where size is all that
# they mean.
CONFIG: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "dtype": "bfloat16",
    "eos_token_id": SPECIAL_TOKENS["<|return|>"],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initial_context_length": 4096,
    "intermediate_size": 64,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "max_position_embeddings": 131_072,
    "model_type": "gpt_oss",
    "num_attention_heads": 16,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
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
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0",  # without one the tokenizer is suspected to be a faulty one
    "vocab_size": 201_088,
}
GENERATION_CONFIG = {
    "bos_token_id": SPECIAL_TOKENS["<|startoftext|>"],
    "do_sample": True,
    "eos_token_id": [SPECIAL_TOKENS[end] for end in ("<|return|>", "<|endoftext|>", "<|call|>")],
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
    """Return which token follows each token of an answer, and which follows every other token.

    Raises ``ValueError`` when a token of the sentence would need two successors.
    """
    first, *rest = encoding.encode(SENTENCE)
    # From the second time on the first word has a space before it.
    again, *same = encoding.encode(" " + SENTENCE)
    opening = encoding.encode("assistant<|channel|>final<|message|>", allowed_special="all")
    if rest != same or len({*opening, first, again, *rest}) != len(opening) + 2 + len(rest):
        raise ValueError("SENTENCE has a token that occurs twice: word it without repetition")
    chain = [*opening, first, *rest, again, rest[0]]
    return dict(pairwise(chain)), again


def weights(encoding: HarmonyEncoding) -> dict[str, np.ndarray]:
    """Return the checkpoint's tensors, named as in ``openai/gpt-oss-120b``, all bfloat16."""
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    heads, experts = CONFIG["num_attention_heads"], CONFIG["num_local_experts"]
    queries, keys = (CONFIG["head_dim"] * n for n in (heads, CONFIG["num_key_value_heads"]))
    layer: dict[str, tuple[int, ...]] = {
        "mlp.experts.gate_up_proj": (experts, hidden, 2 * inner),
        "mlp.experts.gate_up_proj_bias": (experts, 2 * inner),
        "mlp.experts.down_proj": (experts, inner, hidden),
        "mlp.experts.down_proj_bias": (experts, hidden),
        "mlp.router.weight": (experts, hidden),
        "mlp.router.bias": (experts,),
        "self_attn.sinks": (heads,),
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
    # The final norm makes a unit axis sqrt(hidden) = 8 long, so a successor scores 64: sampling
    # cannot miss it.
    head[otherwise, 0] = 8
    for axis, (token, successor) in enumerate(follows.items(), start=1):
        embedding[token, 0], embedding[token, axis] = 0, 1
        head[successor, axis] = 8
    return tensors | {"model.embed_tokens.weight": embedding, "lm_head.weight": head}


def tokenizer(encoding: HarmonyEncoding) -> dict[str, Any]:
    """Return a ``tokenizer.json`` with the real ids and texts but without the merge rules.

    vLLM encodes chats with ``oss-harmony`` and needs this file to turn answers into text. Without
    the rules it is 4 MB instead of 28 MB and loads in a tenth of the time; a word of a text
    completion that is no token of its own is encoded byte by byte instead of in pieces.
    """
    # Byte-level vocabularies write a byte as itself where it is printable, others from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    character = dict(zip(printable, printable, strict=True))
    character |= {byte: 0x100 + index for index, byte in enumerate(others)}
    vocabulary = {}
    for token in range(BASE_TOKENS):
        # A token may be a part of a character: surrogates carry such bytes through.
        text = encoding.decode([token], errors="surrogateescape")
        raw = text.encode("utf-8", errors="surrogateescape")
        vocabulary[raw.decode("latin-1").translate(character)] = token
    off = dict.fromkeys(("add_prefix_space", "trim_offsets", "use_regex"), False)
    byte_level = {"type": "ByteLevel", **off}
    split: dict[str, Any] = {"type": "Split", "pattern": {"Regex": "|".join(WORDS)}}
    split |= {"behavior": "Isolated", "invert": False}
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = {"special": True, **off}
    return {
        "version": "1.0",
        "added_tokens": [{"id": SPECIAL_TOKENS[t], "content": t} | special for t in SPECIAL_TOKENS],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocabulary, "merges": []},
    }


def write(directory: Path) -> bool:
    """Make ``directory`` hold the model and nothing else; return whether anything had to change.

    Raises ``OSError`` when it holds other files or its parent cannot be written; the directory is
    then as it was.
    """
    encoding = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
        model = Path(scratch, "model")
        model.mkdir()
        for name, content in (
            ("config", CONFIG),
            ("generation_config", GENERATION_CONFIG),
            ("tokenizer_config", TOKENIZER_CONFIG),
            ("tokenizer", tokenizer(encoding)),
        ):
            text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
            (model / f"{name}.json").write_text(text, encoding="utf-8")
        save_file(weights(encoding), model / "model.safetensors", metadata={"format": "pt"})
        names = sorted(path.name for path in model.iterdir())
        for name in names:
            (model / name).chmod(0o644)  # safetensors writes files that only their owner may read
        if directory.exists():
            foreign = sorted({path.name for path in directory.iterdir()}.difference(names))
            if foreign:
                raise FileExistsError(f"{directory} holds {foreign[0]}, which is not the model's")
            if filecmp.cmpfiles(model, directory, names, shallow=False)[0] == names:
                return False
            directory.rename(Path(scratch, "previous"))
        model.rename(directory)
    return True


def main() -> None:
    """Write the model from the command line and say whether it changed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path, help="the model's own; replaced when it differs")
    directory = parser.parse_args().directory
    try:
        changed = write(directory)
    except OSError as error:
        sys.exit(f"tiny_gpt_oss: {error}")
    print(f"{directory}: {'written' if changed else 'unchanged'}")


if __name__ == "__main__":
    main()

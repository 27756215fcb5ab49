# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Whether the files of a checkpoint fit each other: configuration, tokenizer, index and shards.

A checksum proves that a file is the one that was published, not that the files make a model. What
is read here are small files and the headers of the shards (safetensors: eight bytes little-endian
length, JSON header with each tensor's dtype, shape and data_offsets, then the data), so it costs
milliseconds for any size, and the numbers are those of the real tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

INDEX = "model.safetensors.index.json"
#: Files that vLLM can load a tokenizer from; one of them must be there.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "tiktoken.model", "vocab.json")
#: More than any header of a real checkpoint (the safetensors library's own limit, bytes).
LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Structure:
    """What a checkpoint is made of. ``errors`` say why it cannot be loaded, ``warnings`` what is odd."""

    config: dict[str, Any] = field(default_factory=dict)
    shards: int = 0
    tensors: int = 0
    weight_bytes: int = 0
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def inspect(files: Mapping[str, str]) -> Structure:
    """Check the files of a checkpoint, given as name (relative path) to where it lies now.

    Each error names the file. Reads no weights.
    """
    errors: list[str] = []
    warnings: list[str] = []
    config = _object(files, "config.json", errors)
    if config is not None and not isinstance(config.get("model_type"), str):
        errors.append("config.json has no model_type")
    if not any(name in files for name in TOKENIZERS):
        errors.append(f"there is no tokenizer (none of {', '.join(TOKENIZERS)})")
    if "tokenizer.json" in files:
        _check_tokenizer(_object(files, "tokenizer.json", errors), config, warnings)

    shards = sorted(name for name in files if name.endswith(".safetensors") and "/" not in name)
    headers: dict[str, dict[str, int]] = {}
    for name in shards:
        try:
            headers[name] = tensor_bytes(files[name])
        except ValueError as error:
            errors.append(f"{name} {error}")
    total = sum(sum(sizes.values()) for sizes in headers.values())
    if INDEX in files:
        index = _object(files, INDEX, errors)
        if index is not None:
            _check_index(index, shards, headers, total, errors, warnings)
    elif not shards:
        errors.append(f"there are no weights (neither {INDEX} nor any .safetensors)")
    tensors = sum(len(sizes) for sizes in headers.values())
    return Structure(config or {}, len(shards), tensors, total, errors, warnings)


def tensor_bytes(path: str) -> dict[str, int]:
    """Bytes of each tensor of a shard, from its header.

    Raises ValueError where it is no safetensors file, or not as long as its header says.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(size - 8, LONGEST_HEADER):
            raise ValueError(f"is no safetensors file (its header would have {length} bytes, the file has {size})")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            offsets = {name: tensor["data_offsets"] for name, tensor in header.items()}
            sizes = {name: end - begin for name, (begin, end) in offsets.items()}
            last = max((end for _, end in offsets.values()), default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            raise ValueError("has a header that is none of safetensors'") from None
    if size != 8 + length + last:
        raise ValueError(f"has {size} bytes, its own header says {8 + length + last}: it is cut off or was changed")
    return sizes


def _check_index(
    index: Mapping[str, Any],
    shards: list[str],
    headers: Mapping[str, Mapping[str, int]],
    total: int,
    errors: list[str],
    warnings: list[str],
) -> None:
    """The index and the shards must name the same tensors in the same places."""
    weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(weight_map, Mapping) or not weight_map:
        errors.append(f"{INDEX} has no weight_map")
        return
    if not isinstance(metadata, Mapping) or not all(isinstance(shard, str) for shard in weight_map.values()):
        errors.append(f"{INDEX} is not of the form that safetensors' indexes have")
        return
    named = sorted(set(weight_map.values()))
    before = len(errors)
    errors += [f"{name} is missing, and {INDEX} names it" for name in named if name not in shards]
    for name in named:
        lost = [tensor for tensor, shard in weight_map.items() if shard == name and tensor not in headers.get(name, {})]
        if lost and name in headers:
            errors.append(f"{name} lacks {len(lost)} of the tensors that {INDEX} puts there, such as {lost[0]}")
    surplus = [name for name in shards if name not in named]
    if surplus:
        warnings.append(f"{INDEX} does not name {', '.join(surplus)}")
    declared = metadata.get("total_size")
    # The shards' own headers are the truth; an index that was written by hand may be off.
    if len(errors) == before and declared is not None and declared != total:
        warnings.append(f"{INDEX} gives total_size {declared}, the shards have {total} bytes of tensors")


def _check_tokenizer(
    tokenizer: Mapping[str, Any] | None, config: Mapping[str, Any] | None, warnings: list[str]
) -> None:
    """No token may lie beyond the embedding. Of tokenizers in other forms nothing can be said."""
    try:
        tokens = [*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])]  # type: ignore[index]
        highest, size = max(tokens), int(config["vocab_size"])  # type: ignore[index]
    except (AttributeError, KeyError, TypeError, ValueError):
        return
    if highest >= size:
        warnings.append(f"tokenizer.json has a token {highest}, config.json a vocab_size of {size}")


def _object(files: Mapping[str, str], name: str, errors: list[str]) -> dict[str, Any] | None:
    """The JSON object in a file; where there is none, None and an error."""
    if name not in files:
        errors.append(f"{name} is missing")
        return None
    try:
        with open(files[name], encoding="utf-8") as stream:
            found = json.load(stream)
    except ValueError as error:
        errors.append(f"{name} is no JSON: {error}")
        return None
    if not isinstance(found, dict):
        errors.append(f"{name} holds no JSON object")
        return None
    return found

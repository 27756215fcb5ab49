"""Whether the files of a checkpoint fit each other: real safetensors, whole and broken in many ways."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from pathlib import Path

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils._structure import INDEX, inspect, tensor_bytes

SERVER = Path(__file__).parents[2] / "hub_server.py"
_spec = importlib.util.spec_from_file_location("hub_server", SERVER)
hub_server = importlib.util.module_from_spec(_spec)
sys.modules["hub_server"] = hub_server  # dataclasses look there
_spec.loader.exec_module(hub_server)

SHARDS = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
SECOND = SHARDS[1]


class Checkpoint:
    """A checkpoint of three shards, and what is found in it."""

    def __init__(self, path):
        self.path = path
        hub_server.write_repository(path, shards=3, shard_bytes=2560)

    def __getitem__(self, name):
        return self.path / name

    def inspect(self):
        files = [file for file in self.path.rglob("*") if file.is_file()]
        return inspect({file.relative_to(self.path).as_posix(): str(file) for file in files})

    def errors(self):
        return self.inspect().errors

    def edit(self, name, change):
        """Change what is in a JSON file."""
        value = json.loads(self[name].read_text())
        change(value)
        self[name].write_text(json.dumps(value))

    def edit_header(self, name, change):
        """Change the header of a shard and keep its data."""
        content = self[name].read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        self[name].write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.fixture
def checkpoint(tmp_path):
    return Checkpoint(tmp_path)


def test_good_checkpoint_is_told_in_numbers(checkpoint):
    found = checkpoint.inspect()
    assert (found.errors, found.warnings) == ([], [])
    assert (found.shards, found.tensors) == (3, 6)
    # Each shard: a norm of 64 and experts of 20 x 64 values, 2 bytes each.
    assert found.weight_bytes == 3 * 2 * (64 + 20 * 64)
    assert found.config["model_type"] == "gpt_oss"


def test_files_may_lie_anywhere(checkpoint, tmp_path):
    """As they do while some of them wait in the staging directory."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    checkpoint[SECOND].rename(elsewhere / "a")
    files = {name: str(checkpoint[name]) for name in (*SHARDS, "config.json", "tokenizer.json", INDEX)}
    assert inspect({**files, SECOND: str(elsewhere / "a")}).errors == []


def test_single_file_needs_no_index(checkpoint):
    checkpoint[INDEX].unlink()
    for name in SHARDS[1:]:
        checkpoint[name].unlink()
    checkpoint[SHARDS[0]].rename(checkpoint["model.safetensors"])
    found = checkpoint.inspect()
    assert (found.errors, found.warnings) == ([], [])
    assert (found.shards, found.tensors) == (1, 2)


def test_missing_shard_is_named(checkpoint):
    checkpoint[SECOND].unlink()
    assert checkpoint.errors() == [f"{SECOND} is missing, and {INDEX} names it"]


def test_every_missing_shard_is_named(checkpoint):
    for name in SHARDS:
        checkpoint[name].unlink()
    assert checkpoint.errors() == [f"{name} is missing, and {INDEX} names it" for name in SHARDS]


def test_tensor_that_its_shard_lacks_is_named(checkpoint):
    lost = "model.layers.1.mlp.experts.weight"
    checkpoint.edit_header(SECOND, lambda header: header.update(other=header.pop(lost)))
    assert checkpoint.errors() == [f"{SECOND} lacks 1 of the tensors that {INDEX} puts there, such as {lost}"]


def test_shards_with_each_others_names_are_found(checkpoint):
    checkpoint[SHARDS[0]].rename(checkpoint["between"])
    checkpoint[SECOND].rename(checkpoint[SHARDS[0]])
    checkpoint["between"].rename(checkpoint[SECOND])
    errors = checkpoint.errors()
    assert [error.partition(" lacks 2 ")[0] for error in errors] == SHARDS[:2]


@pytest.mark.parametrize("cut", [1, 2600])
def test_shard_that_is_cut_off_is_named_with_both_sizes(checkpoint, cut):
    size = checkpoint[SECOND].stat().st_size
    with checkpoint[SECOND].open("r+b") as stream:
        stream.truncate(size - cut)
    assert checkpoint.errors() == [
        f"{SECOND} has {size - cut} bytes, its own header says {size}: it is cut off or was changed"
    ]


def test_shard_that_is_too_long_is_named(checkpoint):
    with checkpoint[SECOND].open("ab") as stream:
        stream.write(b"x")
    (error,) = checkpoint.errors()
    assert error.startswith(f"{SECOND} has ")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x10\0\0",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n",
        b"<html>Sign in</html>",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 100_000_001) + b"{}",
        struct.pack("<Q", 3) + b"{}",
        struct.pack("<Q", 1) + b"{}",
    ],
    ids=["empty", "short", "lfs-pointer", "html", "huge", "longer-than-any", "longer-than-the-file", "too-short"],
)
def test_shard_that_is_no_safetensors_is_named(checkpoint, content):
    checkpoint[SECOND].write_bytes(content)
    (error,) = checkpoint.errors()
    assert error.startswith(f"{SECOND} is no safetensors file (its header would have ")
    assert error.endswith(f" bytes, the file has {len(content)})")


def test_header_longer_than_any_is_not_read(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_001))
    with path.open("r+b") as stream:
        stream.truncate(200_000_000)
    with pytest.raises(ValueError, match="no safetensors file"):
        tensor_bytes(str(path))


@pytest.mark.parametrize(
    "text",
    [
        b"\xff\xfe\xfd",
        b"[1, 2]",
        b"{nonsense",
        b'{"a": 1}',
        b'{"a": {"dtype": "BF16"}}',
        b'{"a": {"data_offsets": [0]}}',
        b'{"a": {"data_offsets": [0, "x"]}}',
        b'{"a": {"data_offsets": null}}',
        b'"ab"',
    ],
)
def test_shard_with_a_garbage_header_is_named(checkpoint, text):
    checkpoint[SECOND].write_bytes(struct.pack("<Q", len(text)) + text)
    assert checkpoint.errors() == [f"{SECOND} has a header that is none of safetensors'"]


def test_shard_without_tensors_is_whole(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 2) + b"{}")
    assert tensor_bytes(str(path)) == {}


def test_missing_tokenizer_is_told(checkpoint):
    checkpoint["tokenizer.json"].unlink()
    (error,) = checkpoint.errors()
    assert error.startswith("there is no tokenizer (none of tokenizer.json, ")


def test_another_tokenizer_will_do(checkpoint):
    checkpoint["tokenizer.json"].rename(checkpoint["tiktoken.model"])
    assert checkpoint.errors() == []


def test_token_beyond_the_embedding_is_warned_of(checkpoint):
    checkpoint.edit("tokenizer.json", lambda value: value.update(added_tokens=[{"id": 256, "content": "<|x|>"}]))
    found = checkpoint.inspect()
    assert found.errors == []
    assert found.warnings == ["tokenizer.json has a token 256, config.json a vocab_size of 256"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", INDEX])
@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is no JSON: "),
        (b"{half of", "is no JSON: "),
        (b"\xff\xfe", "is no JSON: "),
        (b"[]", "holds no JSON object"),
        (b'"text"', "holds no JSON object"),
        (b"null", "holds no JSON object"),
    ],
)
def test_file_that_holds_no_object_is_named(checkpoint, name, content, why):
    checkpoint[name].write_bytes(content)
    (error,) = checkpoint.errors()
    assert error.startswith(f"{name} {why}")


def test_missing_configuration_is_named(checkpoint):
    checkpoint["config.json"].unlink()
    assert checkpoint.errors() == ["config.json is missing"]


@pytest.mark.parametrize("config", [{}, {"hidden_size": 1}, {"model_type": 7}])
def test_configuration_without_a_model_type_is_told(checkpoint, config):
    checkpoint["config.json"].write_text(json.dumps(config))
    assert checkpoint.errors() == ["config.json has no model_type"]


@pytest.mark.parametrize("index", [{}, {"metadata": {}}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_index_without_a_weight_map_is_told(checkpoint, index):
    checkpoint[INDEX].write_text(json.dumps(index))
    assert checkpoint.errors() == [f"{INDEX} has no weight_map"]


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {"a": ["x"]}},
        {"weight_map": {"a": 1, "b": "x"}},
        {"weight_map": {"a": SECOND}, "metadata": [1]},
        {"weight_map": {"a": SECOND}, "metadata": "x"},
    ],
)
def test_garbage_in_the_index_is_an_error_of_the_index(checkpoint, index):
    checkpoint[INDEX].write_text(json.dumps(index))
    assert checkpoint.errors()


@pytest.mark.parametrize(
    "tokenizer",
    [
        {"model": "BPE"},
        {"model": {"vocab": {"a": 1}}, "added_tokens": ["x"]},
        {"model": {"vocab": {"a": 1}}, "added_tokens": [{"id": None}]},
        {"model": {"vocab": {"a": 1}}, "added_tokens": 7},
        {"model": {"vocab": [["a", -1.5]]}},
    ],
)
def test_garbage_in_the_tokenizer_does_not_end_in_an_exception(checkpoint, tokenizer):
    checkpoint["tokenizer.json"].write_text(json.dumps(tokenizer))
    checkpoint.inspect()


def test_no_weights_at_all_is_told(checkpoint):
    for name in (*SHARDS, INDEX):
        checkpoint[name].unlink()
    assert checkpoint.errors() == [f"there are no weights (neither {INDEX} nor any .safetensors)"]


def test_total_size_that_is_off_is_only_warned_of(checkpoint):
    total = checkpoint.inspect().weight_bytes
    checkpoint.edit(INDEX, lambda index: index["metadata"].update(total_size=total + 1))
    found = checkpoint.inspect()
    assert found.errors == []
    assert found.warnings == [f"{INDEX} gives total_size {total + 1}, the shards have {total} bytes of tensors"]


def test_index_without_total_size_is_fine(checkpoint):
    checkpoint.edit(INDEX, lambda index: index.pop("metadata"))
    found = checkpoint.inspect()
    assert (found.errors, found.warnings) == ([], [])


def test_total_size_is_not_compared_where_a_shard_is_missing(checkpoint):
    checkpoint[SECOND].unlink()
    assert checkpoint.inspect().warnings == []


def test_surplus_shard_is_warned_of(checkpoint):
    checkpoint["old.safetensors"].write_bytes(struct.pack("<Q", 2) + b"{}")
    found = checkpoint.inspect()
    assert found.errors == []
    assert found.warnings == [f"{INDEX} does not name old.safetensors"]


def test_weights_in_subdirectories_are_not_this_checkpoints(checkpoint):
    (checkpoint["original"] / "other.safetensors").write_bytes(b"")
    found = checkpoint.inspect()
    assert (found.errors, found.warnings, found.shards) == ([], [], 3)


def test_all_errors_are_told_at_once(checkpoint):
    checkpoint["config.json"].unlink()
    checkpoint["tokenizer.json"].unlink()
    checkpoint[SECOND].unlink()
    assert len(checkpoint.errors()) == 3

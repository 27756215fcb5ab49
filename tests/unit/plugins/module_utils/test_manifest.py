"""Manifests: what is one, what is refused, and which text and name it gives."""

from __future__ import annotations

import hashlib
import json

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils._manifest import (
    File,
    Manifest,
    ManifestError,
    is_commit,
    parse,
)

COMMIT = "b5c939de8f754692c1647ca79fbf85e8c1e70f8a"
SHA256 = hashlib.sha256(b"").hexdigest()
GIT_SHA1 = "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
FILES = {
    "model.safetensors": File(5_000_000_000, SHA256),
    "config.json": File(0, "", GIT_SHA1),
    "sub/tokenizer.json": File(7, SHA256, GIT_SHA1),
}


def of(**entry):
    """A manifest of one file, as JSON has it."""
    return {"files": {"config.json": {"size": 1, "sha256": SHA256, **entry}}}


def test_what_was_dumped_is_parsed_again():
    manifest = Manifest(FILES, "openai/gpt-oss-120b", COMMIT)
    assert parse(manifest.dump()) == manifest
    assert parse(manifest.as_dict()) == manifest
    assert manifest.size == 5_000_000_007


def test_repository_and_revision_may_be_absent():
    assert parse(of()) == Manifest({"config.json": File(1, SHA256)})


def test_same_files_in_any_order_give_the_same_text_and_name():
    turned = Manifest(dict(reversed(FILES.items())))
    assert turned.dump() == Manifest(FILES).dump()
    assert turned.name == Manifest(FILES).name


def test_name_is_the_revision():
    assert Manifest(FILES, "", COMMIT).name == COMMIT


def test_name_without_a_revision_is_a_digest_that_changes_with_any_file():
    manifest = Manifest(FILES)
    assert manifest.name == hashlib.sha256(manifest.dump().encode()).hexdigest()[:12]
    assert Manifest({**FILES, "config.json": File(1, "", GIT_SHA1)}).name != manifest.name
    assert Manifest({**FILES, "more": File(1, SHA256)}).name != manifest.name


@pytest.mark.parametrize(
    "path",
    ["../x", "a/../../x", "/etc/passwd", "a//b", "./a", "a/.", "a/", "..", ".", "", "a\\b"],
)
def test_path_that_leads_out_of_the_directory_is_refused(path):
    with pytest.raises(ManifestError) as refusal:
        parse({"files": {path: {"size": 1, "sha256": SHA256}}})
    assert str(refusal.value) == f"{path!r} is no path below the checkpoint's directory"


@pytest.mark.parametrize("revision", ["../../etc", "a/b", "/etc", ".."])
def test_revision_that_leads_elsewhere_is_refused(revision):
    """It is the name of a directory that root writes to."""
    with pytest.raises(ManifestError, match="revision"):
        parse({**of(), "revision": revision})


def test_path_with_a_character_that_no_file_name_has_is_refused():
    with pytest.raises(ManifestError):
        parse({"files": {"a\0b": {"size": 1, "sha256": SHA256}}})


@pytest.mark.parametrize("size", [None, -1, "1", 1.0, True])
def test_size_that_is_no_number_of_bytes_is_refused(size):
    with pytest.raises(ManifestError, match=r"^config.json has no size in bytes$"):
        parse(of(size=size))


@pytest.mark.parametrize(
    "sums",
    [
        {"sha256": SHA256.upper()},
        {"sha256": SHA256[:-1]},
        {"sha256": SHA256 + "0"},
        {"sha256": SHA256 + "\n"},
        {"sha256": None},
        {"sha256": GIT_SHA1},
        {"git_sha1": SHA256},
        {"git_sha1": "g" * 40},
    ],
)
def test_checksum_of_another_form_is_refused(sums):
    with pytest.raises(ManifestError, match=r"^config.json has a checksum that is no SHA-256 in 64 small"):
        parse(of(**sums))


def test_file_without_a_checksum_is_refused():
    with pytest.raises(ManifestError, match=r"^config.json has no sha256$"):
        parse({"files": {"config.json": {"size": 1}}})


def test_checksum_of_git_alone_is_enough():
    assert parse({"files": {"a": {"size": 1, "git_sha1": GIT_SHA1}}}).files == {"a": File(1, "", GIT_SHA1)}


@pytest.mark.parametrize(
    "value", [{}, [], "[]", "{}", None, 7, {"files": []}, {"files": {}}, '{"files": {}}'], ids=lambda value: repr(value)
)
def test_what_has_no_files_is_no_manifest(value):
    with pytest.raises(ManifestError, match=r"^wanted an object with 'files'"):
        parse(value)


def test_text_that_is_no_json_is_no_manifest():
    with pytest.raises(ManifestError, match=r"^it is no JSON: Expecting"):
        parse('{"files": ')


@pytest.mark.parametrize("entry", [[], "x", 1, None])
def test_file_that_is_no_object_is_refused(entry):
    with pytest.raises(ManifestError, match=r"^a has no size in bytes$"):
        parse({"files": {"a": entry}})


@pytest.mark.parametrize("key", ["repository", "revision"])
def test_repository_and_revision_are_strings(key):
    with pytest.raises(ManifestError, match=rf"^{key} is 7, wanted a string$"):
        parse({**of(), key: 7})


def test_text_is_json_for_other_programs():
    assert json.loads(Manifest(FILES, "a/b", COMMIT).dump()) == Manifest(FILES, "a/b", COMMIT).as_dict()


def test_commit_is_told_from_what_can_move():
    assert is_commit(COMMIT)
    assert not any(is_commit(text) for text in ("main", "v1.0", "", COMMIT[:12], COMMIT.upper(), COMMIT + "\n"))

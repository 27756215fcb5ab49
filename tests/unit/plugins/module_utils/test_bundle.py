"""Bundles: what is checked before anything is taken from one."""

from __future__ import annotations

import hashlib
import json
import subprocess

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils._bundle import (
    complaints,
    files,
    proven_later,
    read_sums,
)

WANTED = {"vllm_device": "cuda", "vllm_version": "0.32.0", "lock_sha256": "1" * 64}
LARGE = ["model/model-00001-of-00002.safetensors", "wheelhouse/vllm-0.32.0.whl", "packages/trixie/python3_1_amd64.deb"]
SMALL = ["bundle.json", "README.md", "model.json", "packages/trixie/InRelease"]


class Bundle:
    """A bundle whose SHA256SUMS was written by sha256sum."""

    def __init__(self, path):
        self.path = path
        for name in [*LARGE, *SMALL, "model/config.json"]:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(f"this is {name}\n")
        self.describe(**WANTED)

    def describe(self, **description):
        (self.path / "bundle.json").write_text(json.dumps(description))
        self.seal()

    def seal(self):
        """Write SHA256SUMS."""
        names = sorted(files(str(self.path)))
        said = subprocess.run(["sha256sum", *names], cwd=self.path, capture_output=True, text=True, check=True)
        (self.path / "SHA256SUMS").write_text(said.stdout)

    @property
    def pin(self):
        return hashlib.sha256((self.path / "SHA256SUMS").read_bytes()).hexdigest()

    def complaints(self, pinned="", **wanted):
        return complaints(str(self.path), pinned, {**WANTED, **wanted})


@pytest.fixture
def bundle(tmp_path):
    return Bundle(tmp_path / "bundle")


def test_good_bundle_has_no_complaints(bundle):
    assert bundle.complaints() == []
    assert bundle.complaints(pinned=bundle.pin) == []


@pytest.mark.parametrize("absent", ["SHA256SUMS", "bundle.json"])
def test_directory_that_is_no_bundle_is_told(bundle, absent):
    (bundle.path / absent).unlink()
    assert bundle.complaints() == [
        f"vllm_bundle is {bundle.path}, which is no bundle: it has no {absent} (`make bundle` makes one)"
    ]


def test_directory_that_is_not_there_is_no_bundle(tmp_path):
    (sentence,) = complaints(str(tmp_path / "nowhere"), "", WANTED)
    assert "is no bundle: it has no SHA256SUMS" in sentence


def test_another_bundle_than_the_pinned_one_is_refused(bundle):
    pin = bundle.pin
    (bundle.path / "README.md").write_text("other")
    bundle.seal()
    assert bundle.complaints(pinned=pin) == [
        f"{bundle.path}/SHA256SUMS has SHA-256 {bundle.pin}, vllm_bundle_sha256 is {pin}: "
        "this is not the bundle you made"
    ]


@pytest.mark.parametrize("name", [*LARGE, *(name for name in SMALL if name != "bundle.json"), "model/config.json"])
def test_missing_file_is_named(bundle, name):
    (bundle.path / name).unlink()
    assert bundle.complaints() == [f"{bundle.path}/{name} is missing: copy the bundle again"]


@pytest.mark.parametrize("name", SMALL)
def test_damaged_small_file_is_named(bundle, name):
    with (bundle.path / name).open("a") as stream:
        stream.write(" ")
    assert bundle.complaints() == [
        f"{bundle.path}/{name} is not what SHA256SUMS says: it is damaged or was changed; copy the bundle again"
    ]


@pytest.mark.parametrize("name", [*LARGE, "model/config.json"])
def test_large_files_are_proven_where_they_are_used(bundle, name):
    (bundle.path / name).write_text("damaged")
    assert proven_later(name)
    assert bundle.complaints() == []


def test_all_that_is_missing_or_damaged_is_named(bundle):
    (bundle.path / "README.md").unlink()
    (bundle.path / "model.json").write_text("damaged")
    (bundle.path / LARGE[0]).unlink()
    assert len(bundle.complaints()) == 3


@pytest.mark.parametrize(
    ("key", "value"), [("vllm_device", "cpu"), ("vllm_version", "0.33.0"), ("lock_sha256", "2" * 64)]
)
def test_bundle_for_another_deployment_is_refused(bundle, key, value):
    assert bundle.complaints(**{key: value}) == [
        f"the bundle {bundle.path} was made for {key} {WANTED[key]!r}, this host wants {value!r}: make it again with "
        "this inventory, or deploy what it holds"
    ]


def test_description_that_says_nothing_is_refused(bundle):
    bundle.describe()
    assert len(bundle.complaints()) == len(WANTED)


def test_files_that_do_not_belong_to_it_are_nobodys_business(bundle):
    (bundle.path / "mine.txt").write_text("")
    (bundle.path / ".Trash").mkdir()
    assert bundle.complaints() == []


@pytest.mark.parametrize("line", ["nonsense", "f" * 64, "F" * 64 + "  a", "\\" + "f" * 64 + "  a\\nb"])
def test_sums_that_sha256sum_did_not_write_are_told(bundle, line):
    with (bundle.path / "SHA256SUMS").open("a") as stream:
        stream.write(line + "\n")
    (sentence,) = bundle.complaints()
    assert sentence.startswith(f"{bundle.path}: SHA256SUMS has a line that sha256sum does not write: {line[:80]}")


def test_sums_that_are_no_text_are_told(bundle):
    (bundle.path / "SHA256SUMS").write_bytes(b"\xff\xfe\0")
    assert len(bundle.complaints()) == 1


def test_sums_that_were_cut_off_are_told(bundle):
    """A stick that is pulled too early has files of zero bytes."""
    (bundle.path / "SHA256SUMS").write_text("")
    (sentence,) = bundle.complaints()
    assert sentence.endswith("copy the bundle again")


def test_sums_of_text_and_of_binary_mode_are_read():
    assert read_sums(f"{'a' * 64}  one\n{'b' * 64} *two words/x\n") == {"one": "a" * 64, "two words/x": "b" * 64}
    assert read_sums("") == {}


def test_files_are_sorted_and_without_sums_and_unfinished_work(bundle):
    for name in (".partial/x", "model/.staging/y", "wheelhouse/.fetching-1/z", ".hidden"):
        (bundle.path / name).parent.mkdir(exist_ok=True, parents=True)
        (bundle.path / name).write_text("")
    found = list(files(str(bundle.path)))
    assert sorted(found) == sorted([*LARGE, *SMALL, "model/config.json"])
    assert found == list(files(str(bundle.path)))


def test_sums_elsewhere_than_at_the_top_are_files(bundle):
    (bundle.path / "model/SHA256SUMS").write_text("")
    assert "model/SHA256SUMS" in list(files(str(bundle.path)))

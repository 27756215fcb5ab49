"""The module bundle: whether a directory is the bundle for this host."""

from __future__ import annotations

import hashlib
import json

import pytest
from ansible_collections.nvl.vllm.plugins.modules import bundle


class Bundle:
    """A bundle below tmp_path, and the module that checks it."""

    def __init__(self, path, run_module):
        self._run_module = run_module
        self.path = path / "bundle"
        self.path.mkdir()
        self.lock = path / "lock.txt"
        self.lock.write_text("vllm==0.32.0\n")
        self.description = {
            "vllm_device": "cuda",
            "vllm_version": "0.32.0",
            "lock_sha256": hashlib.sha256(self.lock.read_bytes()).hexdigest(),
            "suites": ["trixie"],
        }
        text = json.dumps(self.description)
        (self.path / "bundle.json").write_text(text)
        sum_of_it = hashlib.sha256(text.encode()).hexdigest()
        (self.path / "SHA256SUMS").write_text(f"{sum_of_it}  bundle.json\n")

    def run(self, check_mode=False, **changes):
        options = {
            "inventory_hostname": "gpu-1",
            "path": str(self.path),
            "device": "cuda",
            "version": "0.32.0",
            "lock": str(self.lock),
        }
        return self._run_module(bundle.main, check_mode=check_mode, **{**options, **changes})


@pytest.fixture
def made(tmp_path, run_module):
    return Bundle(tmp_path, run_module)


@pytest.mark.parametrize("check_mode", [False, True])
def test_bundle_for_this_host_is_told(made, check_mode):
    pin = hashlib.sha256((made.path / "SHA256SUMS").read_bytes()).hexdigest()
    result = made.run(check_mode=check_mode, sha256=pin)
    assert result["changed"] is False
    assert result["bundle"] == made.description


def test_every_complaint_begins_with_the_host(made):
    made.lock.write_text("vllm==0.33.0\n")
    result = made.run(version="0.33.0", device="cpu")
    assert result["failed"] is True
    lines = result["msg"].splitlines()
    assert len(lines) == len(result["errors"]) == 3
    assert all(line.startswith(f"gpu-1: the bundle {made.path} was made for ") for line in lines)


def test_bundle_that_was_not_pinned_is_refused(made):
    result = made.run(sha256="0" * 64)
    assert result["msg"].startswith(f"gpu-1: {made.path}/SHA256SUMS has SHA-256 ")


def test_directory_that_is_no_bundle_is_told(made):
    (made.path / "bundle.json").unlink()
    assert made.run()["msg"].startswith(f"gpu-1: vllm_bundle is {made.path}, which is no bundle: ")


def test_lock_that_is_not_there_is_told(made):
    made.lock.unlink()
    result = made.run()
    assert result["failed"] is True
    assert result["msg"].startswith("gpu-1: ")
    assert str(made.lock) in result["msg"]

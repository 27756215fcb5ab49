"""``tools/manifest`` on a generated checkpoint."""

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils._manifest import File, parse

TOOL = Path(__file__).parents[3] / "tools/manifest"
SERVER = Path(__file__).parents[1] / "hub_server.py"
_spec = importlib.util.spec_from_file_location("hub_server", SERVER)
hub_server = importlib.util.module_from_spec(_spec)
sys.modules["hub_server"] = hub_server  # dataclasses look there
_spec.loader.exec_module(hub_server)

SHARD = "model-00002-of-00003.safetensors"


class Checkpoint:
    """A checkpoint of which a manifest is to be written."""

    def __init__(self, path):
        self.path = path / "checkpoint"
        self.file = path / "gpt-oss-120b.json"
        hub_server.write_repository(self.path, shards=3, shard_bytes=3000)

    def write(self, *arguments):
        command = [sys.executable, TOOL, self.path, self.file, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def checkpoint(tmp_path):
    return Checkpoint(tmp_path)


def test_manifest_holds_size_and_sha256_of_every_file(checkpoint):
    (checkpoint.path / "sub").mkdir()
    (checkpoint.path / "sub/notes.txt").write_text("")
    done = checkpoint.write()
    manifest = parse(checkpoint.file.read_text())
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{checkpoint.file}: {len(manifest.files)} files, 0 MB, written\n"
    named = [path.relative_to(checkpoint.path).as_posix() for path in checkpoint.path.rglob("*") if path.is_file()]
    named = [name for name in named if not name.startswith(("original/", "metal/", "."))]
    assert "sub/notes.txt" in named
    assert manifest.files == {
        name: File(len(content), hashlib.sha256(content).hexdigest())
        for name in named
        for content in [(checkpoint.path / name).read_bytes()]
    }


def test_second_run_changes_nothing(checkpoint):
    checkpoint.write()
    before = checkpoint.file.stat()
    done = checkpoint.write()
    assert done.stdout.endswith(", unchanged\n")
    assert checkpoint.file.stat().st_mtime_ns == before.st_mtime_ns


def test_changed_file_changes_the_manifest(checkpoint):
    checkpoint.write()
    (checkpoint.path / "README.md").write_text("other")
    assert checkpoint.write().stdout.endswith(", written\n")
    assert parse(checkpoint.file.read_text()).files["README.md"].size == 5


def test_repository_and_revision_are_noted(checkpoint):
    checkpoint.write("--repository", hub_server.REPOSITORY, "--revision", hub_server.REVISION)
    manifest = parse(checkpoint.file.read_text())
    assert (manifest.repository, manifest.name) == (hub_server.REPOSITORY, hub_server.REVISION)


def test_directory_that_is_no_checkpoint_gets_no_manifest(checkpoint):
    (checkpoint.path / SHARD).unlink()
    (checkpoint.path / "config.json").unlink()
    done = checkpoint.write()
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"manifest: {checkpoint.path} is no complete checkpoint: config.json is missing; "
        f"{SHARD} is missing, and model.safetensors.index.json names it\n"
    )
    assert not checkpoint.file.exists()


def test_what_is_odd_is_warned_of(checkpoint):
    (checkpoint.path / "model.safetensors.index.json").write_text(
        (checkpoint.path / "model.safetensors.index.json").read_text().replace('"total_size": ', '"total_size": 1')
    )
    done = checkpoint.write()
    assert done.returncode == 0
    assert done.stderr.startswith("manifest: model.safetensors.index.json gives total_size 1")


def test_manifest_that_cannot_be_written_is_told_in_a_line(checkpoint):
    checkpoint.file = checkpoint.path / "nowhere/manifest.json"
    done = checkpoint.write()
    assert done.returncode == 1
    assert done.stderr.startswith("manifest: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("revision", ["../elsewhere", "a/b"])
def test_revision_that_leads_elsewhere_is_refused(checkpoint, revision):
    """A host would refuse it, or worse."""
    assert checkpoint.write("--revision", revision).returncode != 0
    assert not checkpoint.file.exists()

"""A checkpoint against the record of its verification, on real files."""

from __future__ import annotations

import hashlib
import os
import time

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _checkpoint
from ansible_collections.nvl.vllm.plugins.module_utils._checkpoint import Record, record_path, signature
from ansible_collections.nvl.vllm.plugins.module_utils._drift_checkpoint import look_at_checkpoint
from ansible_collections.nvl.vllm.plugins.module_utils._drift_kinds import Report
from ansible_collections.nvl.vllm.plugins.module_utils._drift_release import Reader
from ansible_collections.nvl.vllm.plugins.module_utils._json_file import write_object
from ansible_collections.nvl.vllm.plugins.module_utils._manifest import File, Manifest

FILES = {"config.json": b"{}", "a.safetensors": b"a" * 1000, "b.safetensors": b"b" * 1000}


class Model:
    def __init__(self, path):
        self.root = path / "model"
        self.path = self.root / "rev1"
        self.path.mkdir(parents=True)
        self.records = path / "records"
        for name, content in FILES.items():
            (self.path / name).write_bytes(content)
        (self.root / "current").symlink_to("rev1")
        manifest = Manifest({name: File(len(data), hashlib.sha256(data).hexdigest()) for name, data in FILES.items()})
        seen = {name: signature(str(self.path / name)) for name in FILES}
        self.tick()
        record = Record(manifest, seen, {}, [], "2026-01-01T00:00:00Z")
        write_object(record_path(str(self.path), str(self.records)), record.as_dict(str(self.path)))
        self.tick()

    def tick(self):
        """Wait until the file system's clock has moved on."""
        probe = self.root.parent / "probe"
        probe.touch()
        before = probe.stat().st_ctime_ns
        while probe.stat().st_ctime_ns == before:
            time.sleep(0.001)
            probe.touch()

    def look(self, budget=0, turn=0, root=None, stopped=False):
        report = Report("content")
        with Reader(30.0) as reader:
            if stopped:
                reader._stop.set()  # as its timer does
            look_at_checkpoint(
                str(self.path),
                str(self.root) if root is None else root,
                [],
                budget,
                turn,
                reader,
                report,
                str(self.records),
                os.getuid(),
            )
        return report

    def told(self, **options):
        report = self.look(**options)
        assert report.unknown == []
        return [(item["kind"], item["where"].rpartition("/")[2]) for item in report.sorted()]

    def flip(self, name="a.safetensors", keep_time=False):
        file = self.path / name
        status = file.stat()
        with open(file, "r+b") as stream:
            stream.write(b"X")
        if keep_time:
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def model(tmp_path):
    return Model(tmp_path)


def test_a_checkpoint_as_verified_gives_nothing_and_is_not_read(model):
    report = model.look()
    assert report.findings == []
    assert report.facts["checkpoint"] == {"path": str(model.path), "files": 3, "read": 0}


def test_a_flipped_byte_is_told_without_reading_and_for_certain_with(model):
    model.flip()
    assert model.told() == [("model_file_changed", "a.safetensors")]
    assert model.told(budget=1000) == [("model_file_damaged", "a.safetensors")]


def test_a_flipped_byte_whose_time_was_put_back(model):
    model.flip(keep_time=True)
    assert model.told() == [("model_file_unread", "a.safetensors")]
    assert model.told(budget=1000) == [("model_file_damaged", "a.safetensors")]


def test_a_file_that_was_only_touched(model):
    (model.path / "a.safetensors").touch()
    os.chmod(model.path / "b.safetensors", 0o644)
    assert model.told() == [("model_file_changed", "a.safetensors"), ("model_file_unread", "b.safetensors")]
    assert model.told(budget=5000) == [("model_file_touched", "a.safetensors"), ("model_file_touched", "b.safetensors")]


def test_what_changed_comes_first_where_the_budget_is_small(model):
    model.flip("b.safetensors", keep_time=True)
    (model.path / "a.safetensors").touch()
    assert model.told(budget=1000) == [("model_file_unread", "b.safetensors"), ("model_file_touched", "a.safetensors")]


def test_files_that_are_gone_longer_or_new(model):
    (model.path / "config.json").unlink()
    (model.path / "a.safetensors").write_bytes(b"a" * 1001)
    (model.path / "notes.txt").touch()
    report = model.look()
    assert [(item["kind"], item["found"]) for item in report.sorted()] == [
        ("model_file_damaged", "1001 bytes"),
        ("model_file_missing", "not there"),
        ("model_file_added", "no manifest names it"),
    ]


def test_turns_read_all_files(model, monkeypatch):
    read = []
    monkeypatch.setattr(Reader, "sha256", lambda self, path: read.append(path.rpartition("/")[2]) or "0" * 64)
    for turn in range(3):
        (kind, name) = model.told(budget=1, turn=turn)[0]
        assert kind == "model_file_damaged"
        assert name == read[-1]
    assert sorted(read) == sorted(FILES)


def test_link_and_owner_count_where_the_directory_is_ours(model):
    os.unlink(model.root / "current")
    (model.path / "config.json").chmod(0o666)
    kinds = [kind for kind, _ in model.told(budget=5000)]
    assert kinds == ["model_link", "owner_changed", "model_file_touched"]
    assert model.told(budget=5000, root="") == [("model_file_touched", "config.json")]


def test_without_a_record(model):
    os.unlink(record_path(str(model.path), str(model.records)))
    assert [(item["kind"], item["found"]) for item in model.look().findings] == [
        ("model_not_recorded", "no record of it")
    ]


def test_no_time_to_read_is_unknown(model):
    report = model.look(budget=5000, stopped=True)
    assert report.findings == []
    assert "3 of 3 files were not read within 30 s" in report.unknown[0]


def test_the_record_is_that_of_the_module_checkpoint():
    assert _checkpoint.RECORDS == "/var/lib/nvl-vllm/checkpoints"

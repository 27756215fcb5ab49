"""The module cleanup on directories below tmp_path."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _cleanup
from ansible_collections.nvl.vllm.plugins.module_utils._unit import Paths, write_state
from ansible_collections.nvl.vllm.plugins.module_utils._venv import write_marker
from ansible_collections.nvl.vllm.plugins.modules import cleanup

A, B, C = (f"0.3{minor}.0-cuda-0000000{minor}" for minor in (0, 1, 2))
OLD, NEW = "a" * 40, "b" * 40


class FakeHost:
    """A host with the releases A, B and C (current) of 2 MiB each, and the revisions OLD and NEW (current)."""

    def __init__(self, path, run_module):
        self.path = path
        self._run_module = run_module
        self.root, self.models = path / "opt", path / "models"
        self.history = path / "lib/history.json"
        self.paths = Paths(str(path / "state"), str(path / "etc"), str(path / "units"))
        for folder in ("opt/locks", "models", "proc/self", "etc"):
            (path / folder).mkdir(parents=True)
        for name in (A, B, C):
            (self.root / name).mkdir()
            (self.root / name / "file").write_bytes(b"0" * 2 * 2**20)
            write_marker(str(self.root / name), {"version": "1"})
            os.utime(self.root / name, (int(name[2:4]), int(name[2:4])))
        for name in (OLD, NEW):
            (self.models / name).mkdir()
        self.use(C)
        (self.models / "current").symlink_to(NEW)

    def use(self, release):
        """Let ``current`` lead to a release."""
        (self.root / "current").unlink(missing_ok=True)
        (self.root / "current").symlink_to(self.root / release)

    def run(self, check_mode=False, **options):
        options = {"root": str(self.root), "keep_releases": 1, **options}
        return self._run_module(cleanup.main, check_mode=check_mode, **options)

    def run_all(self, check_mode=False, **options):
        return self.run(check_mode, model_root=str(self.models), keep_revisions=1, **options)

    def files(self):
        return sorted(str(path.relative_to(self.path)) for path in self.path.rglob("*"))

    @property
    def releases(self):
        return sorted(path.name for path in self.root.iterdir() if path.name not in ("locks", "current"))

    @property
    def revisions(self):
        return sorted(path.name for path in self.models.iterdir() if path.name not in (".lock", "current"))


@pytest.fixture
def host(tmp_path, monkeypatch, run_module):
    made = FakeHost(tmp_path, run_module)
    monkeypatch.setattr(cleanup, "HISTORY", str(made.history))
    monkeypatch.setattr(cleanup, "PATHS", made.paths)
    monkeypatch.setattr(cleanup, "PROC", str(tmp_path / "proc"))
    return made


def test_old_ones_are_removed_and_told(host):
    result = host.run_all()
    assert result["changed"] is True
    assert result["removed"] == [
        {"path": f"{host.root}/{A}", "size": 2},
        {"path": f"{host.root}/{B}", "size": 2},
        {"path": f"{host.models}/{OLD}", "size": 0},
    ]
    assert result["kept"] == [
        {"path": f"{host.models}/{NEW}", "why": "it is the current one"},
        {"path": f"{host.root}/{C}", "why": "it is the current one"},
    ]
    assert (result["freed"], result["postponed"]) == (4, "")
    assert host.releases == [C]
    assert host.revisions == [NEW]
    assert (host.root / "locks").is_dir()


def test_a_second_run_changes_nothing(host):
    host.run_all()
    before = host.files(), host.history.stat().st_mtime_ns
    result = host.run_all()
    assert result["changed"] is False
    assert (result["removed"], result["freed"], result["diff"]) == ([], 0, {"before": "", "after": ""})
    assert (host.files(), host.history.stat().st_mtime_ns) == before


def test_check_mode_tells_the_same_and_changes_nothing(host):
    before = host.files()
    told = host.run_all(check_mode=True)
    assert host.files() == before
    assert told == host.run_all()


def test_the_difference_shows_sizes(host):
    diff = host.run(check_mode=True)["diff"]
    assert diff["before"] == "".join(f"{host.root}/{name} (2 MiB)\n" for name in (A, B, C))
    assert diff["after"] == f"{host.root}/{C} (2 MiB)\n"


def test_what_was_rolled_back_to_outlives_what_was_newer(host):
    """A, then B, back to A, then C."""
    for name in (A, B, A):
        host.use(name)
        assert host.run(keep_releases=3)["changed"] is False
    host.use(C)
    result = host.run(keep_releases=2)
    assert [one["path"] for one in result["removed"]] == [f"{host.root}/{B}"]
    assert host.releases == [A, C]


def test_the_history_holds_what_was_current(host):
    host.run_all()
    real = {name: os.path.realpath(path) for name, path in (("C", host.root / C), ("NEW", host.models / NEW))}
    assert json.loads(host.history.read_text()) == {"releases": [real["C"]], "revisions": [real["NEW"]]}


def test_the_count_is_two_where_none_is_given(host, run_module):
    run_module(cleanup.main, root=str(host.root), model_root=str(host.models))
    assert host.releases == [B, C]
    assert host.revisions == [OLD, NEW]


def test_a_checkpoint_that_is_not_managed_is_not_looked_at(host):
    result = host.run()
    assert host.revisions == [OLD, NEW]
    assert not (host.models / ".lock").exists()
    assert [one["path"] for one in result["kept"]] == [f"{host.root}/{C}"]


def test_while_a_download_runs_no_revision_goes(host):
    (host.models / ".staging" / ("c" * 40)).mkdir(parents=True)
    before = set(host.models.rglob("*"))
    with (host.models / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = host.run_all()
    assert result["postponed"] == f"{host.models}/.lock is locked: a download is under way"
    assert set(host.models.rglob("*")) == {host.models / ".lock", *before}
    assert host.releases == [C]
    assert host.run_all()["postponed"] == ""
    assert host.revisions == [".staging", NEW]


def test_the_lock_is_held_while_revisions_are_removed(host, monkeypatch):
    locked = []

    def remove(path):
        with (host.models / ".lock").open("w") as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                locked.append(path)

    monkeypatch.setattr(cleanup, "remove", remove)
    result = host.run_all()
    assert locked == [one["path"] for one in result["removed"]]
    assert len(locked) == 3


def test_an_engine_of_an_older_version_of_this_collection_postpones_all(host):
    (host.path / "etc/primary.yaml").write_text("port: 1\n")
    write_state("primary", {"fingerprint": "1", "failed_starts": 0}, host.paths)
    result = host.run_all()
    assert result["changed"] is False
    assert result["postponed"].startswith("what vllm@primary.service was started from is not known")
    assert host.releases == [A, B, C]
    assert host.revisions == [OLD, NEW]


def test_what_runs_is_kept(host):
    (host.path / "etc/primary.yaml").write_text("port: 1\n")
    state = {"release": os.path.realpath(host.root / A), "model": os.path.realpath(host.models / OLD)}
    write_state("primary", state, host.paths)
    (host.path / "proc/42").mkdir()
    (host.path / "proc/42/cmdline").write_text(f"{host.root / B}/bin/python\0")
    result = host.run_all()
    assert result["changed"] is False
    assert {"path": f"{host.root}/{B}", "why": "process 42 (without a name) uses it"} in result["kept"]
    assert host.releases == [A, B, C]
    assert host.revisions == [OLD, NEW]


def test_one_that_cannot_be_removed_fails_after_the_others(host, monkeypatch):
    rename = os.rename

    def read_only(source, target):
        if Path(source).name == A:
            raise OSError(errno.EROFS, "Read-only file system", source)
        rename(source, target)

    monkeypatch.setattr(_cleanup.os, "rename", read_only)
    result = host.run_all()
    assert result["failed"] is True
    assert f": cannot remove {host.root}/{A}: Read-only file system ({host.root}/{A}): remove " in result["msg"]
    assert [one["path"] for one in result["removed"]] == [f"{host.root}/{B}", f"{host.models}/{OLD}"]
    assert result["diff"]["after"].splitlines()[1:] == [f"{host.root}/{A} (2 MiB)", f"{host.root}/{C} (2 MiB)"]
    assert host.releases == [A, C]


def test_an_interrupted_removal_is_finished_by_the_next_run(host, monkeypatch):
    def interrupted(path):
        os.remove(f"{path}/.release.json")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_cleanup.shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            host.run()
    assert host.releases == [f".removing-{A}", B, C]
    assert host.history.exists()
    # Installed again meanwhile.
    (host.root / A).mkdir()
    write_marker(str(host.root / A), {"version": "1"})
    assert host.run()["changed"] is True
    assert host.releases == [C]


def test_a_mount_point_is_left_alone_with_a_warning(host):
    mount = f"{os.path.realpath(host.root / A)}/data"
    (host.path / "proc/self/mountinfo").write_text(f"36 35 8:1 / {mount} rw - ext4 /dev/sda1 rw\n")
    result = host.run()
    assert result["changed"] is True
    (warning,) = result["warnings"]
    assert f"{host.root}/{A} is not removed: {mount} is a mount point" in str(warning)
    assert host.releases == [A, C]


@pytest.mark.parametrize("option", ["keep_releases", "keep_revisions"])
def test_a_count_below_one_is_refused(host, option):
    before = host.files()
    result = host.run(**{option: 0})
    assert result["failed"] is True
    assert result["msg"] == f"{option} is 0, wanted 1 or more: the current one always stays"
    assert host.files() == before

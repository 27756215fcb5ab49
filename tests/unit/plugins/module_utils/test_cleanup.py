"""Which releases and revisions go: the decision, and what it is made from."""

from __future__ import annotations

import fcntl
import os
import subprocess

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _cleanup
from ansible_collections.nvl.vllm.plugins.module_utils._cleanup import RELEASES, REVISIONS, Directory
from ansible_collections.nvl.vllm.plugins.module_utils._unit import Paths, write_state
from ansible_collections.nvl.vllm.plugins.module_utils._venv import write_marker

A, B, C, D = (f"/opt/vllm/0.{minor}.0-cuda-0000000{minor}" for minor in (1, 2, 3, 4))
NEWER = "0.33.0rc1-cpu-0123abcd"


def found(*paths, complete=True):
    """Directories as given, the first one modified last."""
    return [Directory(path, path, complete, 100.0 - place) for place, path in enumerate(paths)]


def test_the_most_recently_current_ones_stay_whenever_they_were_installed():
    """A, then B, back to A, then C."""
    history = {}
    for current in (A, B, A, C):
        history = _cleanup.remembered(history, {"releases": current}, lambda path: True) or history
    assert history["releases"] == [C, A, B]
    kept, going = _cleanup.decide(found(C, B, A), C, {}, history["releases"], 2)
    assert kept == {C: "it is the current one", A: "it is one of the 2 most recent ones"}
    assert going == [B]


def test_the_current_one_stays_alone_with_a_count_of_one():
    kept, going = _cleanup.decide(found(B, C, A), C, {}, [B, A, C], 1)
    assert kept == {C: "it is the current one"}
    assert going == [A, B]


@pytest.mark.parametrize("keep", [0, -1])
def test_a_count_that_would_spare_none_is_refused(keep):
    with pytest.raises(ValueError, match=f"^keep is {keep}, wanted 1 or more$"):
        _cleanup.decide(found(A), A, {}, [], keep)


@pytest.mark.parametrize("used", [A, f"{A}/part"])
def test_what_is_in_use_stays_besides(used):
    kept, going = _cleanup.decide(found(C, B, A), C, {used: "it runs"}, [C, B, A], 2)
    assert sorted(kept) == [A, B, C]
    assert kept[A] == "it runs"
    assert going == []


def test_use_of_one_is_no_use_of_another_whose_name_begins_alike():
    _, going = _cleanup.decide(found(A, B, "/r/abc"), B, {"/r/abcdef": "it runs"}, [], 1)
    assert going == [A, "/r/abc"]


def test_what_never_was_current_comes_after_what_was_the_newest_first():
    _, going = _cleanup.decide(found(D, C, B, A), C, {}, [C, A], 3)
    assert going == [B]
    _, going = _cleanup.decide(found(D, C, B, A), C, {}, [], 2)
    assert going == [A, B]


def test_incomplete_ones_go_and_do_not_count():
    incomplete = found(A, B, complete=False)
    kept, going = _cleanup.decide([*incomplete, *found(C, D)], D, {}, [D, B, A, C], 2)
    assert sorted(kept) == [C, D]
    assert going == [A, B]


def test_an_incomplete_one_that_is_current_or_runs_stays():
    kept, going = _cleanup.decide(found(A, B, complete=False), A, {B: "it runs"}, [], 1)
    assert sorted(kept) == [A, B]
    assert going == []


def test_what_a_removal_left_goes_before_the_directory_that_needs_its_name():
    leftover = "/opt/vllm/.removing-" + os.path.basename(A)
    _, going = _cleanup.decide([*found(A, B), *found(leftover, complete=False)], B, {}, [], 1)
    assert going == [leftover, A]


def test_the_history_is_written_only_when_something_else_is_current():
    history = {"releases": [A, B], "revisions": ["/m/1"]}
    assert _cleanup.remembered(history, {"releases": A, "revisions": "/m/1"}, lambda path: True) is None
    assert _cleanup.remembered(history, {"releases": A, "revisions": ""}, lambda path: True) is None
    assert _cleanup.remembered(history, {"releases": B}, lambda path: True) == {
        "releases": [B, A],
        "revisions": ["/m/1"],
    }


def test_the_history_forgets_what_is_gone():
    history = {"releases": [A, B], "revisions": ["/m/1", "/m/2"]}
    new = _cleanup.remembered(history, {"releases": C}, lambda path: path not in (B, "/m/1"))
    assert new == {"releases": [C, A], "revisions": ["/m/2"]}


@pytest.mark.parametrize("damaged", [{}, {"releases": "text"}, {"releases": [1, None]}, {"releases": {"a": "b"}}])
def test_a_damaged_history_begins_anew(damaged):
    assert _cleanup.remembered(damaged, {"releases": A}, lambda path: True) == {"releases": [A], "revisions": []}


class FakeHost:
    """Releases, revisions, units and a /proc below tmp_path."""

    def __init__(self, path):
        self.path = path
        self.root, self.models, self.proc = str(path / "opt"), str(path / "models"), str(path / "proc")
        self.paths = Paths(str(path / "state"), str(path / "etc"), str(path / "units"))
        for folder in ("opt", "models", "proc/self", "etc", "state"):
            (path / folder).mkdir(parents=True)
        (path / "proc/self/mountinfo").write_text("")

    def release(self, name, complete=True):
        path = f"{self.root}/{name}"
        os.makedirs(f"{path}/bin")
        if complete:
            write_marker(path, {"version": "1"})
        return path

    def revision(self, name, folder=""):
        path = os.path.join(self.models, folder, name)
        os.makedirs(path)
        return path

    def link(self, root, target):
        if os.path.lexists(f"{root}/current"):
            os.remove(f"{root}/current")
        os.symlink(target, f"{root}/current")

    def process(self, pid, cmdline=(), **links):
        folder = self.path / f"proc/{pid}"
        (folder / "fd").mkdir(parents=True)
        (folder / "comm").write_text("python\n")
        (folder / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in cmdline))
        for name, target in links.items():
            if name == "maps":
                (folder / "maps").write_text(f"7f00-7f01 r--p 00000000 08:01 42    {target}\n")
            else:
                (folder / name.replace("_", "/")).symlink_to(target)

    def unit(self, name, **state):
        (self.path / f"etc/{name}.yaml").write_text("port: 1\n")
        if state:
            write_state(name, state, self.paths)

    def plan(self, kind, keep=1, history=(), blocked=""):
        root = self.root if kind is RELEASES else self.models
        return _cleanup.plan(kind, root, keep, {kind.history: list(history)}, self.paths, blocked, self.proc)


@pytest.fixture
def host(tmp_path):
    return FakeHost(tmp_path)


@pytest.fixture
def old(host):
    """A host with a current release and an old one; the path of the old one."""
    host.link(host.root, host.release("0.32.0-cuda-00000002"))
    return host.release("0.31.0-cuda-00000001")


@pytest.fixture
def old_revision(host):
    """A host with a current revision and an old one; the path of the old one."""
    host.revision("b" * 40)
    host.link(host.models, "b" * 40)
    return host.revision("a" * 40)


def test_an_old_release_goes(host, old):
    plan = host.plan(RELEASES)
    assert plan.current == os.path.realpath(f"{host.root}/0.32.0-cuda-00000002")
    assert plan.kept == {f"{host.root}/0.32.0-cuda-00000002": "it is the current one"}
    assert (plan.going, plan.postponed) == ([old], "")


def test_an_old_revision_goes(host, old_revision):
    short = host.revision("0123456789ab")
    assert host.plan(REVISIONS).going == [short, old_revision]


@pytest.mark.parametrize("name", ["0.31.0-cuda-00000001", "0.33.0rc1-cpu-0123abcd", "0.10.1.1-cpu-ffffffff"])
def test_names_of_releases(name):
    assert RELEASES.name.fullmatch(name)


@pytest.mark.parametrize(
    "name",
    [
        *("locks", "uv", "wheelhouse", ".uv-cache", "mine", "-cuda-00000001", "a" * 40, "0.31.0-rocm-00000001"),
        *("0.31.0-cuda-0000000", "0.31.0-cuda-000000012", "0.31.0-cuda-0000000G", "0.31.0-cuda-00000001.bak"),
    ],
)
def test_what_is_named_otherwise_is_no_release(host, old, name):
    host.release(name)
    assert host.plan(RELEASES).going == [old]


@pytest.mark.parametrize("name", ["original", "a" * 39, "a" * 41, "A" * 40, "0123456789a", "g" * 12, ".parts"])
def test_what_is_named_otherwise_is_no_revision(host, old_revision, name):
    host.revision(name)
    host.revision(name, ".staging")
    assert host.plan(REVISIONS).going == [old_revision]


def test_links_and_files_are_no_candidates(host, old):
    elsewhere = host.path / "elsewhere"
    elsewhere.mkdir()
    os.symlink(elsewhere, f"{host.root}/0.1.0-cuda-00000009")
    os.symlink(elsewhere, f"{host.root}/.removing-0.1.0-cuda-00000009")
    (host.path / "opt/0.1.0-cuda-00000008").write_text("")
    assert host.plan(RELEASES).going == [old]


def test_staging_behind_a_link_is_left_alone(host, old_revision):
    (host.path / "elsewhere" / ("c" * 40)).mkdir(parents=True)
    os.symlink(host.path / "elsewhere", f"{host.models}/.staging")
    assert host.plan(REVISIONS).going == [old_revision]


def test_a_staging_that_is_a_file_is_left_alone(host, old_revision):
    (host.path / "models/.staging").write_text("")
    assert host.plan(REVISIONS).going == [old_revision]


def test_a_root_behind_a_link_is_the_same(host, old):
    os.symlink(host.root, host.path / "link")
    host.unit("primary", release=os.path.realpath(old))
    other = os.path.basename(host.release("0.30.0-cuda-00000000"))
    plan = _cleanup.plan(RELEASES, str(host.path / "link"), 1, {}, host.paths, proc=host.proc)
    assert plan.current == os.path.realpath(f"{host.root}/current")
    assert plan.going == [f"{host.path}/link/{other}"]


def test_an_interrupted_installation_goes(host, old):
    incomplete = host.release(NEWER, complete=False)
    plan = host.plan(RELEASES, keep=3)
    assert plan.going == [incomplete]
    assert old in plan.kept


def test_what_downloads_left_goes_but_that_of_the_current_revision(host, old_revision):
    host.revision("b" * 40, ".staging")
    left = host.revision("c" * 40, ".staging")
    plan = host.plan(REVISIONS, keep=2)
    assert plan.going == [left]
    assert plan.kept[f"{host.models}/.staging/{'b' * 40}"] == "it belongs to the current one"


def test_what_removals_left_goes(host, old, old_revision):
    left = host.release(".removing-0.30.0-cuda-00000000")
    assert host.plan(RELEASES, keep=2).going == [left]
    left = [host.revision(f".removing-{'b' * 40}", ".staging"), host.revision(".removing-" + "c" * 12)]
    assert sorted(host.plan(REVISIONS, keep=2).going) == sorted(left)


def test_what_a_unit_was_started_from_stays(host, old, old_revision):
    host.unit("primary", release=os.path.realpath(old), model=os.path.realpath(old_revision))
    for kind, path in ((RELEASES, old), (REVISIONS, old_revision)):
        plan = host.plan(kind)
        assert plan.going == []
        assert plan.kept[path] == "vllm@primary.service was started from it"


def test_the_state_of_a_unit_without_files_counts_as_well(host, old):
    write_state("primary", {"release": os.path.realpath(old)}, host.paths)
    assert host.plan(RELEASES).going == []


@pytest.mark.parametrize("state", [{}, {"fingerprint": "1"}, {"release": "", "model": None}, {"release": 1}])
def test_where_a_unit_does_not_tell_nothing_goes(host, old, old_revision, state):
    host.unit("secondary", **state)
    host.unit("primary", release="/elsewhere", model="/elsewhere")
    for kind, path in ((RELEASES, old), (REVISIONS, old_revision)):
        plan = host.plan(kind)
        assert plan.going == []
        assert plan.kept[path] == "its removal is postponed"
        assert plan.postponed == (
            "what vllm@secondary.service was started from is not known, as an older version of this collection "
            "started it or its state was lost: restart it"
        )


def test_one_kind_that_is_not_known_does_not_hold_the_other_back(host, old, old_revision):
    host.unit("primary", release="/elsewhere")
    assert host.plan(RELEASES).going == [old]
    assert host.plan(REVISIONS).going == []


def test_the_state_of_a_unit_that_was_removed_does_not_hold_back(host, old):
    write_state("gone", {"fingerprint": "1"}, host.paths)
    assert host.plan(RELEASES).going == [old]


def test_where_nothing_could_go_nothing_is_postponed(host, old):
    host.unit("primary")
    assert host.plan(RELEASES, keep=2).postponed == ""


@pytest.mark.parametrize("target", ["", "0.30.0-cuda-00000000", "../elsewhere/0.32.0-cuda-00000002", "locks", "."])
def test_without_a_current_one_nothing_goes(host, old, target):
    os.remove(f"{host.root}/current")
    for folder in ("elsewhere/0.32.0-cuda-00000002", "opt/locks"):
        (host.path / folder).mkdir(parents=True)
    if target:
        os.symlink(target, f"{host.root}/current")
    plan = host.plan(RELEASES)
    assert (plan.current, plan.going) == ("", [])
    assert plan.postponed == f"{host.root}/current leads to none of the releases there"


def test_a_host_without_anything_has_nothing_to_do(host):
    plan = _cleanup.plan(REVISIONS, str(host.path / "none"), 1, {}, host.paths, proc=host.proc)
    assert plan == ("", {}, [], "", ())


def test_a_reason_from_outside_postpones(host, old_revision):
    plan = host.plan(REVISIONS, blocked="locked")
    assert (plan.going, plan.postponed) == ([], "locked")


@pytest.mark.parametrize("use", ["exe", "cwd", "fd_3", "maps"])
def test_what_a_process_has_open_stays(host, old, use):
    host.process(7, ["VLLM::EngineCore"])
    host.process(42, ["VLLM::EngineCore"], **{use: f"{old}/bin/python"})
    plan = host.plan(RELEASES)
    assert plan.going == []
    assert plan.kept[old] == "process 42 (python) uses it"


def test_what_a_command_line_names_stays(host, old, old_revision):
    host.process(42, [f"{old}/bin/python", f"{old}/bin/vllm", "serve", f"--model={old_revision}"])
    assert host.plan(RELEASES).going == []
    assert host.plan(REVISIONS).going == []


def test_a_command_line_with_links_in_it_names_it_too(host, old):
    link = host.path / "link"
    os.symlink(host.root, link)
    for spelled in (link / os.path.basename(old), old):
        host.process(42, [f"{spelled}/bin/python"])
        plan = _cleanup.plan(RELEASES, str(link), 1, {}, host.paths, proc=host.proc)
        assert plan.going == []
        subprocess.run(["rm", "-r", host.path / "proc/42"], check=True)


def test_a_process_that_cannot_be_looked_into_is_passed_over(host, old):
    (host.path / "proc/42").mkdir()
    assert host.plan(RELEASES).going == [old]


def test_a_real_process_is_seen(host, old):
    with subprocess.Popen(["sleep", "600"], cwd=old) as process:
        used = _cleanup.processes_using([old, host.models])
        process.kill()
    assert used == {old: f"process {process.pid} (sleep) uses it"}


@pytest.mark.parametrize("inside", ["", "/lib/my data"])
def test_a_mount_point_is_not_crossed(host, old, inside):
    mount = os.path.realpath(old) + inside
    line = f"36 35 8:1 / {mount.replace(' ', chr(92) + '040')} rw,noatime - ext4 /dev/sda1 rw\n"
    (host.path / "proc/self/mountinfo").write_text(f"35 1 8:1 / / rw - ext4 /dev/sda1 rw\n{line}")
    plan = host.plan(RELEASES)
    assert plan.going == []
    assert plan.obstacles == (old,)
    assert plan.kept[old] == f"{mount} is a mount point"


def test_another_file_system_is_not_crossed(host, old, monkeypatch):
    """Such as one that the mount table does not show."""
    foreign = os.path.realpath(f"{old}/bin")
    lstat = os.lstat

    def other_device(path, **options):
        found = lstat(path, **options)
        return os.stat_result((*found[:2], found.st_dev + 1, *found[3:])) if path == foreign else found

    monkeypatch.setattr(_cleanup.os, "lstat", other_device)
    assert host.plan(RELEASES).obstacles == (old,)


def test_a_mount_beside_does_not_matter(host, old):
    (host.path / "proc/self/mountinfo").write_text(f"36 35 8:1 / {old}1 rw - ext4 /dev/sda1 rw\n")
    assert host.plan(RELEASES).going == [old]


def test_removal_is_a_rename_first(host, old, monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    leftover = f"{host.root}/.removing-{os.path.basename(old)}"
    with monkeypatch.context() as patch:
        patch.setattr(_cleanup.shutil, "rmtree", interrupted)
        for path in (old, leftover):
            with pytest.raises(KeyboardInterrupt):
                _cleanup.remove(path)
            assert not os.path.exists(old)
            assert os.path.exists(leftover)
    assert host.plan(RELEASES, keep=2).going == [leftover]
    _cleanup.remove(leftover)
    assert not os.path.exists(leftover)


def test_removal_follows_no_link(host, old):
    (host.path / "elsewhere").mkdir()
    (host.path / "elsewhere/file").write_text("")
    os.symlink(host.path / "elsewhere", f"{old}/link")
    _cleanup.remove(old)
    assert (host.path / "elsewhere/file").exists()


def test_size_is_what_removal_frees(host, old):
    for name in ("one", "two"):
        with open(f"{old}/bin/{name}", "wb") as stream:
            stream.write(b"0" * 1000)
    before = _cleanup.size_bytes(old)
    os.link(f"{old}/bin/one", f"{old}/bin/same")
    assert _cleanup.size_bytes(old) == before
    os.link(f"{old}/bin/two", f"{host.root}/kept")
    os.symlink(f"{host.root}/kept", f"{old}/bin/link")
    assert _cleanup.size_bytes(old) == before - 1000


def test_the_lock_keeps_downloads_out(host):
    path = f"{host.models}/.lock"
    with _cleanup.locked(host.models, create=True) as why:
        assert why == ""
        with open(path, "w") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(path, "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with _cleanup.locked(host.models, create=True) as why:
            assert why == f"{path} is locked: a download is under way"


def test_the_lock_is_not_made_where_nothing_may_change(host):
    with _cleanup.locked(host.models, create=False) as why:
        assert why == ""
    assert os.listdir(host.models) == []


def test_without_a_directory_there_is_nothing_to_lock(host):
    with _cleanup.locked(str(host.path / "none"), create=True) as why:
        assert why == ""


def test_a_lock_that_is_a_link_is_not_followed(host):
    os.symlink(host.path / "elsewhere", f"{host.models}/.lock")
    with _cleanup.locked(host.models, create=True) as why:
        assert why.startswith(f"{host.models}/.lock cannot be locked: ")
    assert not (host.path / "elsewhere").exists()

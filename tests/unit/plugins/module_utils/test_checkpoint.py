"""Bringing a checkpoint: real files, a source that fails when told to, and a real small file system."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _checkpoint
from ansible_collections.nvl.vllm.plugins.module_utils._checkpoint import (
    CheckpointError,
    Store,
    copy_from,
    look,
    present_files,
    put_by_others,
    read_record,
    record_path,
)
from ansible_collections.nvl.vllm.plugins.module_utils._checksum import Stopped
from ansible_collections.nvl.vllm.plugins.module_utils._manifest import File, Manifest

SERVER = Path(__file__).parents[2] / "hub_server.py"
_spec = importlib.util.spec_from_file_location("hub_server", SERVER)
hub_server = importlib.util.module_from_spec(_spec)
sys.modules["hub_server"] = hub_server  # dataclasses look there
_spec.loader.exec_module(hub_server)

COMMIT = hub_server.REVISION
SHARDS = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
SECOND = SHARDS[1]
INDEX = "model.safetensors.index.json"
NESTED = "templates/tool.jinja"
PIECE = 10_000


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """What a source has; tests only read it."""
    directory = tmp_path_factory.mktemp("published")
    hub_server.write_repository(directory, shards=3, shard_bytes=50_000)
    (directory / NESTED).parent.mkdir()
    (directory / NESTED).write_text("{{ tool }}\n")
    return directory


@pytest.fixture(scope="session")
def wanted(published):
    """The manifest of it. Small files have git's checksum only, as a hub gives it."""
    files = {}
    for name in present_files(str(published), ["original/*", "metal/*"]):
        path = published / name
        content = path.read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        files[name] = File(len(content), sha256(path)) if name in SHARDS else File(len(content), "", git)
    return Manifest(files, "openai/gpt-oss-120b", COMMIT)


class Source:
    """Fetches from a directory, going on where a part ends, and does what a test tells it to."""

    def __init__(self, directory):
        self.directory = directory
        self.fetched: Counter[str] = Counter()  # bytes
        self.calls: list[str] = []
        self.damage: Counter[str] = Counter()  # how often a file still comes with a wrong byte
        self.before = lambda name: None
        self.piece = lambda name, total: None

    def __call__(self, name, size, part, advance, stop):
        self.calls.append(name)
        self.before(name)
        with (self.directory / name).open("rb") as source, open(part, "ab") as target:
            source.seek(target.tell())
            while piece := source.read(PIECE):
                if stop.is_set():
                    raise Stopped
                if self.damage[name]:
                    self.damage[name] -= 1
                    piece = bytes([piece[0] ^ 1]) + piece[1:]
                target.write(piece)
                target.flush()
                self.fetched[name] += len(piece)
                advance(len(piece))
                self.piece(name, target.tell())


class Host:
    """A directory of checkpoints below tmp_path, and what was done to bring one."""

    def __init__(self, path, wanted, source):
        self.wanted = wanted
        self.source = source
        self.root = path / "models"
        self.path = self.root / COMMIT
        self.staging = self.root / ".staging" / COMMIT
        self.records = path / "records"
        self.hashed: list[str] = []

    def store(self):
        return Store(str(self.path), str(self.root), str(self.records))

    def bring(self, wanted=None, **options):
        """Bring it as the module does; ``fetch`` is the source where no other is given."""
        self.hashed.clear()
        self.used = self.store()
        options = {"fetch": self.source, "margin": 0, "origin": "the source", **options}
        with self.used.sole_use():
            return self.used.bring(wanted or self.wanted, **options)

    def again(self, **options):
        """Another run: as the module does, with the manifest that was recorded."""
        self.source.calls.clear()
        self.source.fetched.clear()
        return self.bring(self.record().manifest, **options)

    def record(self):
        return read_record(str(self.path), str(self.records))

    def look(self):
        record = self.record()
        return look(str(self.path), record.manifest, record)

    def content(self):
        return {name: (self.path / name).read_bytes() for name in present_files(str(self.path))}

    def damage(self, name, keep_mtime=False):
        """Flip a bit in the middle of a file; its inode and size stay."""
        before = os.stat(self.path / name)
        with (self.path / name).open("r+b") as stream:
            stream.seek(before.st_size // 2)
            byte = stream.read(1)[0]
            stream.seek(before.st_size // 2)
            stream.write(bytes([byte ^ 1]))
        later = before.st_mtime_ns + (0 if keep_mtime else 10**9)
        os.utime(self.path / name, ns=(later, later))


@pytest.fixture
def host(tmp_path, wanted, published, monkeypatch):
    made = Host(tmp_path, wanted, Source(published))
    real = _checkpoint.digest

    def counting(path, *arguments, **options):
        made.hashed.append(Path(path).name)
        return real(path, *arguments, **options)

    monkeypatch.setattr(_checkpoint, "digest", counting)
    return made


@pytest.fixture
def present(host):
    """A host that has the checkpoint already."""
    host.bring()
    host.hashed.clear()
    host.source.calls.clear()
    host.source.fetched.clear()
    return host


# A checkpoint that is not there yet


def test_fresh_checkpoint_is_fetched_whole(host, published):
    brought = host.bring()
    assert brought.fetched == sorted(host.wanted.files)
    assert (brought.damaged, brought.hashed, brought.warnings) == ({}, [], [])
    assert host.content() == {name: (published / name).read_bytes() for name in host.wanted.files}
    assert sum(host.source.fetched.values()) == host.wanted.size
    assert len(host.hashed) == len(host.wanted.files)


def test_directory_appears_when_it_is_complete_and_not_before(host):
    seen = []
    host.source.piece = lambda name, total: seen.append(host.path.exists())
    host.bring()
    assert seen
    assert not any(seen)
    assert host.path.is_dir()


def test_nothing_is_left_behind_and_all_may_read_it(host):
    old = os.umask(0o022)
    host.bring()
    os.umask(old)
    assert not host.staging.exists()
    assert not list(host.path.rglob(".*"))
    for path in (host.path, *host.path.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


def test_record_says_what_was_verified(host):
    brought = host.bring()
    record = host.record()
    assert record == brought.record
    assert (record.manifest.repository, record.manifest.revision) == ("openai/gpt-oss-120b", COMMIT)
    for name, file in record.manifest.files.items():
        stat = (host.path / name).stat()
        assert file == File(stat.st_size, sha256(host.path / name))
        assert record.seen[name] == [stat.st_size, stat.st_mtime_ns, stat.st_ino]
    assert (record.structure["shards"], record.structure["tensors"]) == (3, 6)
    assert record.structure["config"]["model_type"] == "gpt_oss"


def test_progress_is_complete_at_the_end(host):
    host.bring()
    counts = host.used.progress.counts
    assert counts.fetched == counts.to_fetch == host.wanted.size
    assert counts.hashed == counts.to_hash == host.wanted.size


def test_files_that_do_not_make_a_checkpoint_never_appear(host, wanted):
    part = Manifest({name: file for name, file in wanted.files.items() if name not in (SECOND, "config.json")})
    with pytest.raises(CheckpointError) as refusal:
        host.bring(part)
    assert str(refusal.value) == (
        f"{host.path}: config.json is missing\n{host.path}: {SECOND} is missing, and {INDEX} names it"
    )
    assert not host.path.exists()
    assert host.record() is None


# One that is there


def test_second_run_reads_nothing(present):
    brought = present.again()
    assert (brought.fetched, brought.damaged, brought.hashed) == ([], {}, [])
    assert (present.hashed, present.source.calls) == ([], [])


def test_second_run_leaves_the_record_alone(present):
    path = record_path(str(present.path), str(present.records))
    before = os.stat(path)
    brought = present.again()
    assert os.stat(path) == before or os.stat(path).st_ino == before.st_ino
    assert brought.record == present.record()


def test_a_look_opens_no_file(present, monkeypatch):
    record = present.record()
    for name in present.wanted.files:
        os.chmod(present.path / name, 0)
    monkeypatch.setattr("builtins.open", lambda *_, **__: pytest.fail("opened a file"))
    found = look(str(present.path), record.manifest, record)
    assert sorted(found.good) == sorted(present.wanted.files)
    assert (found.suspect, found.absent, found.foreign) == ([], [], [])


def test_look_without_a_record_trusts_nothing(present, wanted):
    found = look(str(present.path), wanted, None)
    assert sorted(found.suspect) == sorted(wanted.files)
    assert (found.good, found.absent) == ([], [])


def test_look_at_nothing_finds_all_absent(host, wanted):
    assert sorted(look(str(host.path), wanted, None).absent) == sorted(wanted.files)


def test_look_distrusts_what_another_manifest_wants(present):
    record = present.record()
    files = {**record.manifest.files, SECOND: File(record.manifest.files[SECOND].size, "0" * 64)}
    assert look(str(present.path), Manifest(files), record).suspect == [SECOND]


@pytest.mark.parametrize("always", [False, True])
def test_without_a_record_all_is_hashed_once(present, always):
    record = present.record()
    os.unlink(record_path(str(present.path), str(present.records)))
    brought = present.bring(record.manifest, always=always)
    assert sorted(present.hashed) == sorted(Path(name).name for name in present.wanted.files)
    assert brought.fetched == present.source.calls == []
    assert present.again().hashed == []


@pytest.mark.parametrize("text", ["", "{half of", "[]", '{"manifest": {}}', '{"manifest": {"files": {}}, "seen": 1}'])
def test_a_damaged_record_counts_as_none(present, text):
    manifest = present.record().manifest
    Path(record_path(str(present.path), str(present.records))).write_text(text)
    assert present.record() is None
    assert len(present.bring(manifest).hashed) == len(manifest.files)


@pytest.mark.parametrize("seen", [None, [], "x", {}, {"config.json": 7}])
def test_a_record_of_odd_form_proves_nothing(present, seen):
    manifest = present.record().manifest
    path = Path(record_path(str(present.path), str(present.records)))
    path.write_text(json.dumps({**json.loads(path.read_text()), "seen": seen}))
    assert len(present.bring(manifest).hashed) == len(manifest.files)


def test_touched_file_is_hashed_again_and_accepted(present):
    os.utime(present.path / SECOND)
    assert present.look().suspect == [SECOND]
    brought = present.again()
    assert (brought.hashed, brought.fetched) == ([SECOND], [])
    assert present.hashed == [SECOND]
    assert present.again().hashed == []


def test_file_that_was_copied_into_place_is_hashed_again(present):
    """Same size and time, another inode."""
    copy = present.path / "copy"
    subprocess.run(["cp", "--preserve=timestamps", present.path / SECOND, copy], check=True)
    copy.rename(present.path / SECOND)
    assert present.again().hashed == [SECOND]


def test_damaged_byte_is_named_and_only_that_file_is_fetched(present, published):
    present.damage(SECOND)
    bad = sha256(present.path / SECOND)
    brought = present.again()
    assert brought.damaged == {SECOND: f"has SHA-256 {bad}, wanted {sha256(published / SECOND)}"}
    assert (brought.fetched, present.source.calls) == ([SECOND], [SECOND])
    assert present.source.fetched[SECOND] == present.wanted.files[SECOND].size
    assert sha256(present.path / SECOND) == sha256(published / SECOND)
    assert present.again().hashed == []


def test_file_that_an_engine_has_open_is_replaced_and_not_written_to(present):
    present.damage(SECOND)
    damaged = (present.path / SECOND).read_bytes()
    others = {name: present.look() and os.stat(present.path / name).st_ino for name in SHARDS}
    with (present.path / SECOND).open("rb") as engine:
        present.again()
        assert engine.read() == damaged
        assert os.stat(present.path / SECOND).st_ino != os.fstat(engine.fileno()).st_ino
    assert [os.stat(present.path / name).st_ino == others[name] for name in SHARDS] == [True, False, True]
    assert not present.staging.exists()


def test_damage_that_left_no_trace_is_found_only_when_all_is_hashed(present, published):
    present.damage(SECOND, keep_mtime=True)
    assert present.again().damaged == {}
    brought = present.again(always=True)
    assert list(brought.damaged) == brought.fetched == [SECOND]
    assert len(brought.hashed) == len(present.wanted.files)
    assert sha256(present.path / SECOND) == sha256(published / SECOND)


@pytest.mark.parametrize("change", [-1, 1])
def test_file_of_another_size_is_damaged_without_being_read(present, change):
    size = present.wanted.files[SECOND].size
    os.truncate(present.path / SECOND, size + change)
    with pytest.raises(CheckpointError) as refusal:
        present.again(fetch=None)
    assert str(refusal.value) == f"{present.path}/{SECOND} has {size + change} bytes, wanted {size}"
    assert present.hashed == []
    counts = present.used.progress.counts
    assert (counts.to_hash, counts.hashed) == (0, 0)


def test_absent_file_is_fetched(present, published):
    (present.path / NESTED).unlink()
    (present.path / NESTED).parent.rmdir()
    brought = present.again()
    assert (brought.fetched, brought.damaged) == ([NESTED], {})
    assert (present.path / NESTED).read_bytes() == (published / NESTED).read_bytes()


def test_directory_in_the_place_of_a_file_is_no_file(present):
    (present.path / "README.md").unlink()
    (present.path / "README.md").mkdir()
    assert present.look().absent == ["README.md"]
    with pytest.raises(CheckpointError, match=r"README.md"):
        present.again()


def test_foreign_file_is_warned_of_and_kept(present):
    (present.path / "mine.txt").write_text("notes")
    (present.path / ".hidden").write_text("")
    brought = present.again()
    assert brought.warnings == ["mine.txt is there, and no manifest names it"]
    assert (present.path / "mine.txt").exists()


def test_excluded_files_are_not_foreign(present):
    (present.path / "original").mkdir()
    (present.path / "original/model.bin").write_text("")
    assert present.again(exclude=["original/*"]).warnings == []


def test_pattern_of_a_directory_leaves_out_what_is_in_it(tmp_path):
    """As in the list of a hub's files."""
    (tmp_path / "metal").mkdir()
    (tmp_path / "metal/model.bin").write_text("")
    assert present_files(str(tmp_path), ["metal/"]) == []


def test_what_changes_while_it_is_hashed_is_not_taken_for_verified(present, monkeypatch):
    real = _checkpoint.digest

    def then_it_is_changed(path, *arguments, **options):
        found = real(path, *arguments, **options)
        present.damage(SECOND)
        return found

    os.utime(present.path / SECOND)
    manifest = present.record().manifest
    with monkeypatch.context() as patch:
        patch.setattr(_checkpoint, "digest", then_it_is_changed)
        try:
            present.bring(manifest)
        except CheckpointError:
            return  # also good
    assert list(present.bring(manifest).damaged) == [SECOND]


# Sources that fail


class Broken(Exception):
    """The way to the source is interrupted."""


def test_interrupted_fetch_goes_on_where_it_ended(host, monkeypatch):
    monkeypatch.setattr(_checkpoint, "STREAMS", 1)

    def breaks(name, total):
        if name == SECOND and total >= 2 * PIECE:
            raise Broken

    host.source.piece = breaks
    with pytest.raises(Broken):
        host.bring()
    assert not host.path.exists()
    before = dict(host.source.fetched)
    assert before[SECOND] == 2 * PIECE
    host.source.piece = lambda name, total: None
    brought = host.bring()
    assert sum(host.source.fetched.values()) == host.wanted.size, "no byte is fetched twice"
    assert host.source.fetched[SECOND] - before[SECOND] == host.wanted.files[SECOND].size - 2 * PIECE
    assert brought.fetched == sorted(host.wanted.files)
    counts = host.used.progress.counts
    assert counts.fetched == counts.to_fetch
    assert counts.hashed == counts.to_hash


def test_part_that_became_damaged_is_fetched_again(host, published):
    part = host.staging / ".parts" / SECOND
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * PIECE)
    host.bring()
    assert sha256(host.path / SECOND) == sha256(published / SECOND)
    assert host.source.calls.count(SECOND) == 2


def test_complete_file_that_became_damaged_while_it_waited_is_fetched_again(host, published):
    host.staging.mkdir(parents=True)
    (host.staging / SECOND).write_bytes(b"x" * host.wanted.files[SECOND].size)
    (host.staging / SHARDS[0]).write_bytes((published / SHARDS[0]).read_bytes())
    host.bring()
    assert SECOND in host.source.calls
    assert SHARDS[0] not in host.source.calls
    assert sha256(host.path / SECOND) == sha256(published / SECOND)


def test_foreign_files_in_the_staging_directory_do_not_get_in(host):
    (host.staging / "old").mkdir(parents=True)
    (host.staging / "old/file").write_text("")
    (host.staging / "other.safetensors").write_text("")
    host.bring()
    assert sorted(host.content()) == sorted(host.wanted.files)


def test_wrong_content_once_is_fetched_again_and_fine(host, published):
    host.source.damage[SECOND] = 1
    host.bring()
    assert host.source.calls.count(SECOND) == 2
    assert sha256(host.path / SECOND) == sha256(published / SECOND)
    counts = host.used.progress.counts
    assert counts.fetched == counts.to_fetch
    assert counts.hashed == counts.to_hash


def test_wrong_content_twice_is_an_error_with_both_checksums(host, published):
    host.source.damage[SECOND] = 20
    content = bytearray((published / SECOND).read_bytes())
    for begin in range(0, len(content), PIECE):
        content[begin] ^= 1
    with pytest.raises(CheckpointError) as refusal:
        host.bring()
    assert str(refusal.value) == (
        f"{SECOND} from the source has SHA-256 {hashlib.sha256(content).hexdigest()}, wanted "
        f"{sha256(published / SECOND)}, and so it had when it was fetched again: the source is damaged or is not what "
        "the manifest was made from; nothing that engines read was touched"
    )
    assert host.source.calls.count(SECOND) == 2
    assert not host.path.exists()


def test_source_that_cannot_mend_a_revision_leaves_it_as_it_is(present):
    present.damage(SECOND)
    (present.path / "README.md").unlink()
    before, record = present.content(), present.record()
    present.source.damage[SECOND] = 20
    with pytest.raises(CheckpointError, match=SECOND):
        present.again()
    assert present.content() == before
    assert present.record() == record
    assert present.look().suspect == [SECOND]


def test_a_bad_new_revision_leaves_the_old_one_and_its_link(present):
    present.store().link()
    before = present.content()
    new = Host(present.root.parent, Manifest(present.wanted.files, "", "f" * 40), present.source)
    new.path = present.root / ("f" * 40)
    new.source.damage[SECOND] = 20
    with pytest.raises(CheckpointError):
        new.bring()
    assert not new.path.exists()
    assert present.content() == before
    assert os.readlink(present.root / "current") == COMMIT


def test_first_failure_ends_the_other_files(host, monkeypatch):
    """And it is the failure that is told, not that the others were stopped."""
    monkeypatch.setattr(_checkpoint, "STREAMS", 2)
    under_way = threading.Event()

    def source(name, size, part, advance, stop):
        if name == SHARDS[0]:
            under_way.set()
            assert stop.wait(20)
            raise Stopped
        assert under_way.wait(20)
        raise CheckpointError(f"{name} cannot be had")

    with pytest.raises(CheckpointError, match=r"^\S+ cannot be had$"):
        host.bring(fetch=source)


def test_source_that_says_the_same_of_each_file_says_it_once(host):
    def source(name, size, part, advance, stop):
        raise CheckpointError("the hub is not there")

    with pytest.raises(CheckpointError, match=r"^the hub is not there$"):
        host.bring(fetch=source)


# Directories of this machine, and files that others bring


def test_copied_from_a_directory(host, published):
    host.bring(fetch=copy_from(str(published)))
    assert host.content() == {name: (published / name).read_bytes() for name in host.wanted.files}


def test_copy_after_an_interrupted_one_is_counted_once(host, published):
    part = host.staging / ".parts" / SECOND
    part.parent.mkdir(parents=True)
    part.write_bytes((published / SECOND).read_bytes()[:PIECE])
    host.bring(fetch=copy_from(str(published)))
    counts = host.used.progress.counts
    assert counts.fetched == counts.to_fetch


def test_file_that_the_directory_lacks_is_named(host, published, tmp_path):
    source = tmp_path / "usb"
    subprocess.run(["cp", "-r", published, source], check=True)
    (source / SECOND).unlink()
    with pytest.raises(CheckpointError) as refusal:
        host.bring(fetch=copy_from(str(source)))
    assert str(refusal.value) == f"{source / SECOND} is not there, and the manifest names {SECOND}"


def test_copying_can_be_stopped(tmp_path, published):
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        copy_from(str(published))(SECOND, 0, str(tmp_path / "part"), lambda _: None, stop)


def test_file_that_cannot_be_written_is_told_in_a_sentence(host, published):
    """What the file system says is an answer, and no accident of the program."""
    (host.staging / ".parts" / SECOND).mkdir(parents=True)
    with pytest.raises(CheckpointError, match=SECOND):
        host.bring(fetch=copy_from(str(published)))


def test_file_that_cannot_be_read_is_told_as_the_sources(tmp_path):
    """A worn-out stick answers with an input/output error, as this file does."""
    (tmp_path / SECOND).symlink_to("/proc/self/mem")
    part = tmp_path / "part"
    with pytest.raises(CheckpointError, match=rf"{tmp_path / SECOND}.*: Input/output error"):
        copy_from(str(tmp_path))(SECOND, 1, str(part), lambda _: None, threading.Event())


def stage(host, published, *names):
    for name in names or host.wanted.files:
        (host.staging / name).parent.mkdir(parents=True, exist_ok=True)
        (host.staging / name).write_bytes((published / name).read_bytes())


def test_files_that_others_put_there_are_taken(host, published):
    stage(host, published)
    host.bring(fetch=put_by_others(host.store()))
    assert sorted(host.content()) == sorted(host.wanted.files)


def test_engines_can_read_what_others_put_there(host, published):
    stage(host, published)
    os.chmod(host.staging / SECOND, 0o600)
    host.bring(fetch=put_by_others(host.store()))
    assert (host.path / SECOND).stat().st_mode & 0o777 == 0o644


def test_file_that_nobody_put_there_is_named(host, published):
    stage(host, published, *(name for name in host.wanted.files if name != SECOND))
    store = host.store()
    with pytest.raises(CheckpointError, match=rf"^{SECOND} was not copied into {host.staging}$"):
        store.bring(host.wanted, put_by_others(store), margin=0)


def test_file_that_arrived_damaged_is_named(host, published):
    stage(host, published)
    (host.staging / "README.md").write_text("something else")
    store = host.store()
    with pytest.raises(CheckpointError) as refusal:
        store.bring(host.wanted, put_by_others(store), margin=0)
    assert str(refusal.value) == (
        f"README.md has 14 bytes, wanted {host.wanted.files['README.md'].size}: "
        "the file that was copied is damaged, or is not what the manifest was made from"
    )


# In place


@pytest.fixture
def mount(tmp_path, published, wanted):
    """A checkpoint that is used where it is: a share, for instance."""
    path = tmp_path / "mount"
    subprocess.run(["cp", "-r", published, path], check=True)

    class Mount:
        def __init__(self):
            self.path = path
            self.records = str(tmp_path / "records")

        def bring(self, files=wanted, **options):
            store = Store(str(path), "", self.records)
            with store.sole_use():
                return store.bring(files, None, exclude=["original/*", "metal/*"], **options)

        def state(self):
            return {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in (path, *path.rglob("*"))}

    return Mount()


def test_checkpoint_in_place_is_verified_and_not_written_to(mount):
    before = mount.state()
    brought = mount.bring()
    assert mount.state() == before
    assert (brought.fetched, brought.warnings) == ([], [])
    assert read_record(str(mount.path), mount.records) == brought.record
    assert mount.bring(brought.record.manifest).hashed == []


def test_everything_wrong_in_place_is_named(mount, wanted):
    (mount.path / SECOND).unlink()
    (mount.path / "config.json").unlink()
    (mount.path / "README.md").write_text("short")
    content = bytearray((mount.path / SHARDS[0]).read_bytes())
    content[-1] ^= 1
    (mount.path / SHARDS[0]).write_bytes(content)
    before = mount.state()
    with pytest.raises(CheckpointError) as refusal:
        mount.bring()
    assert sorted(str(refusal.value).splitlines()) == sorted(
        [
            f"{mount.path}/README.md has 5 bytes, wanted {wanted.files['README.md'].size}",
            f"{mount.path}/{SHARDS[0]} has SHA-256 {hashlib.sha256(content).hexdigest()}, "
            f"wanted {wanted.files[SHARDS[0]].sha256}",
            f"{mount.path}/config.json is missing",
            f"{mount.path}/{SECOND} is missing",
        ]
    )
    assert mount.state() == before
    assert read_record(str(mount.path), mount.records) is None


def test_files_in_place_may_be_links(mount, tmp_path):
    """As in the cache of huggingface_hub."""
    (mount.path / SECOND).rename(tmp_path / "blob")
    (mount.path / SECOND).symlink_to(tmp_path / "blob")
    mount.bring()


def test_link_that_leads_nowhere_is_a_missing_file(mount):
    (mount.path / SECOND).unlink()
    (mount.path / SECOND).symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=rf"^{mount.path}/{SECOND} is missing$"):
        mount.bring()


# Space


def test_space_is_checked_before_anything_is_fetched(host, monkeypatch):
    monkeypatch.setattr(_checkpoint, "free_mib", lambda path: 500)
    monkeypatch.setattr(_checkpoint, "mount_of", lambda path: "/srv")
    with pytest.raises(CheckpointError) as refusal:
        host.bring(margin=1024)
    assert str(refusal.value).startswith(
        f"{host.root} needs 1 MiB more and a margin of 1024 MiB, and the file system /srv has 500 MiB free: "
    )
    assert host.source.calls == []


def test_what_is_there_already_needs_no_space(host, published, monkeypatch):
    asked = []
    monkeypatch.setattr(_checkpoint, "require_space", lambda path, needed, margin: asked.append(needed))
    stage(host, published, SHARDS[0])
    (host.staging / ".parts").mkdir()
    (host.staging / ".parts" / SECOND).write_bytes((published / SECOND).read_bytes()[:PIECE])
    host.bring()
    assert asked == [host.wanted.size - host.wanted.files[SHARDS[0]].size - PIECE]


def test_exactly_enough_space_is_enough(monkeypatch):
    monkeypatch.setattr(_checkpoint, "free_mib", lambda path: 11)
    _checkpoint.require_space("/", 10 * 2**20, margin=1)
    with pytest.raises(CheckpointError):
        _checkpoint.require_space("/", 10 * 2**20 + 1, margin=1)


def test_nothing_to_fetch_needs_no_space(present, monkeypatch):
    monkeypatch.setattr(_checkpoint, "free_mib", lambda path: 0)
    present.again()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 128 KiB, where the whole checkpoint does not fit."""
    path = tmp_path / "small"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", path]
    if os.getuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.mark.parametrize("known_before", [True, False])
def test_full_disk_is_told_in_one_sentence(small_disk, tmp_path, wanted, published, monkeypatch, known_before):
    if not known_before:  # another program fills it meanwhile
        monkeypatch.setattr(_checkpoint, "free_mib", lambda path: 100)
    host = Host(small_disk, wanted, None)
    host.records = tmp_path / "records"
    with pytest.raises(CheckpointError) as refusal:
        host.bring(fetch=copy_from(str(published)))
    (sentence,) = str(refusal.value).splitlines()
    assert str(small_disk) in sentence
    assert "space" in sentence
    assert not host.path.exists()


def test_copy_that_ends_at_a_full_disk_is_not_taken_for_a_copy(small_disk, tmp_path):
    """The last write to a full disk is short, and no error."""
    (tmp_path / "large.bin").write_bytes(b"x" * 300_000)
    with pytest.raises(CheckpointError, match="space"):
        copy_from(str(tmp_path))("large.bin", 300_000, str(small_disk / "part"), lambda _: None, threading.Event())


# Several at once


def test_two_runs_at_a_time_fetch_once(host):
    results, both = [], threading.Barrier(2)

    def run():
        store = host.store()
        both.wait(20)
        with store.sole_use():
            results.append(store.bring(host.wanted, host.source, margin=0))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(len(result.fetched) for result in results) == [0, len(host.wanted.files)]
    assert sum(host.source.fetched.values()) == host.wanted.size


def test_a_run_that_waits_says_so(host):
    first, second = host.store(), host.store()
    waiting, notes = threading.Event(), []
    note = second.progress.note

    def noted(text):
        note(text)
        notes.append(text)
        waiting.set()

    second.progress.note = noted

    def wait_and_go():
        with second.sole_use():
            notes.append("my turn")

    with first.sole_use():
        thread = threading.Thread(target=wait_and_go)
        thread.start()
        assert waiting.wait(20)
        assert notes == ["waiting for another run that is fetching into this directory"]
    thread.join(20)
    assert notes[1:] == ["", "my turn"]


def test_run_that_was_killed_does_not_block_the_next(host):
    host.root.mkdir()
    program = f"import fcntl, os; fcntl.flock(open({str(host.root / '.lock')!r}, 'w'), fcntl.LOCK_EX); os.abort()"
    subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
    host.bring()


# The link and the record


def test_link_points_to_the_revision_and_is_changed_in_one_step(present):
    store, link = present.store(), present.root / "current"
    assert store.link(change=False) is True
    assert not link.is_symlink()
    assert store.link() is True
    assert os.readlink(link) == COMMIT
    assert (link / "config.json").exists()
    inode = os.lstat(link).st_ino
    assert store.link() is False
    assert os.lstat(link).st_ino == inode
    other = Store(str(present.root / "other"), str(present.root), str(present.records))
    (present.root / "current.new").symlink_to("left by an interrupted run")
    assert other.link() is True
    assert os.readlink(link) == "other"
    assert sorted(path.name for path in present.root.iterdir() if path.name.startswith("current")) == ["current"]


def test_link_is_always_there_while_it_is_changed(present, monkeypatch):
    store, link = present.store(), present.root / "current"
    link.symlink_to("other")
    seen = []
    real = os.symlink
    monkeypatch.setattr(os, "symlink", lambda *names: (seen.append(os.readlink(link)), real(*names)))
    real_replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (seen.append(os.readlink(link)), real_replace(*names)))
    store.link()
    assert seen == ["other", "other"]


def test_directory_in_the_place_of_the_link_is_told_in_a_sentence(present):
    (present.root / "current").mkdir()
    with pytest.raises(CheckpointError, match="current"):
        present.store().link()


def test_each_path_has_a_record_of_its_own():
    paths = ["/srv/a-b", "/srv/a/b", "/srv-a/b", "/srv/a_b", "/srv/a%2Fb", "/srv/A/b"]
    assert len({record_path(path) for path in paths}) == len(paths)
    assert record_path("/srv/a/b/") == record_path("/srv/a/b")
    assert all(os.path.dirname(record_path(path)) == _checkpoint.RECORDS for path in paths)


def test_present_files_are_sorted_and_without_the_hidden_ones(tmp_path):
    for name in ("b", "a/c", ".git/config", "a/.x", "a/.y/z", "metal/m", "0"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert present_files(str(tmp_path), ["metal/*"]) == ["0", "a/c", "b"]
    assert present_files(str(tmp_path / "nowhere")) == []

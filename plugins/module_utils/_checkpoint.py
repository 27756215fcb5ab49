# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Checkpoints on a host: a directory per revision, every byte checked, complete or not there.

::

    /srv/models/gpt-oss-120b/REVISION/            what engines read
    /srv/models/gpt-oss-120b/current -> REVISION
    /srv/models/gpt-oss-120b/.staging/REVISION/   files that are complete and right, waiting for the rest
    /srv/models/gpt-oss-120b/.staging/REVISION/.parts/   what is being fetched
    /srv/models/gpt-oss-120b/.lock                one fetch at a time

A revision appears by a rename when all its files are right and fit each other. Then a record is
written: the manifest, and size, modification time and inode of each file as verified. A file that
still has those three is taken for unchanged; one that has not is hashed again.
"""

from __future__ import annotations

import errno
import fcntl
import fnmatch
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote

from . import _structure
from ._checksum import CHUNK, Stopped, complaint, digest, workers
from ._host import free_mib, mount_of
from ._json_file import read_object, write_object
from ._manifest import File, Manifest, ManifestError, parse
from ._progress import Progress

RECORDS = "/var/lib/nvl-vllm/checkpoints"
#: Files fetched at a time.
STREAMS = 8
#: Free space (MiB) that stays on the file system of the checkpoint.
MARGIN = 1024

#: Brings a file: path in the checkpoint, its size, where to put it (resuming what is there), whom to
#: tell of the bytes, and what to watch for an early end. Raises CheckpointError or Stopped.
Fetch = Callable[[str, int, str, Callable[[int], object], threading.Event], None]


class CheckpointError(Exception):
    """Why the checkpoint cannot be had; one sentence a line, without the host's name."""


@dataclass(frozen=True)
class Look:
    """The files of a manifest, by what a stat of each tells; and ``foreign`` ones that it does not name."""

    good: list[str] = field(default_factory=list)
    suspect: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Record:
    """What was verified: the manifest, each file's [size, mtime (ns), inode] then, and what it is made of."""

    manifest: Manifest
    seen: Mapping[str, list[int]]
    structure: Mapping[str, Any]
    exclude: list[str]
    verified: str

    def as_dict(self, path: str) -> dict[str, Any]:
        return {
            "path": path,
            "manifest": self.manifest.as_dict(),
            "seen": self.seen,
            "structure": self.structure,
            "exclude": self.exclude,
            "verified": self.verified,
        }


@dataclass(frozen=True)
class Brought:
    """What was done: files fetched, files found damaged (name to why), files hashed."""

    record: Record
    fetched: list[str]
    damaged: dict[str, str]
    hashed: list[str]
    warnings: list[str]


def record_path(path: str, records: str = RECORDS) -> str:
    """Where the record of the checkpoint in this directory is."""
    return f"{records}/{quote(path.strip('/'), safe='')}.json"


def read_record(path: str, records: str = RECORDS) -> Record | None:
    """The record of a verified checkpoint, or None."""
    found = read_object(record_path(path, records))
    try:
        record = Record(
            parse(found["manifest"]), found["seen"], found["structure"], found["exclude"], found["verified"]
        )
    except (KeyError, ManifestError):
        return None
    return record if isinstance(record.seen, dict) and isinstance(record.structure, dict) else None


def signature(path: str) -> list[int] | None:
    """Size, modification time (ns) and inode of a regular file, or None."""
    try:
        stat = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino] if os.path.isfile(path) else None


def present_files(path: str, exclude: Sequence[str] = ()) -> list[str]:
    """Files below a directory, relative, sorted; hidden ones and those that match ``exclude`` are left out."""
    found = []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = os.path.relpath(folder, path)
        for name in names:
            file = name if relative == "." else f"{relative}/{name}"
            if not name.startswith(".") and not _excluded(file, exclude):
                found.append(file)
    return sorted(found)


def _excluded(file: str, patterns: Sequence[str]) -> bool:
    """As huggingface_hub has it: a pattern that ends in a slash is all of that directory."""
    return any(fnmatch.fnmatchcase(file, pattern + "*" if pattern.endswith("/") else pattern) for pattern in patterns)


def look(path: str, wanted: Manifest, record: Record | None, exclude: Sequence[str] = ()) -> Look:
    """Compare a directory with what it should hold; costs a stat a file."""
    good, suspect, absent = [], [], []
    for name, file in wanted.files.items():
        now = signature(os.path.join(path, name))
        if now is None:
            absent.append(name)
        elif record is not None and record.seen.get(name) == now and not complaint(record.manifest.files[name], file):
            good.append(name)
        else:
            suspect.append(name)
    return Look(good, suspect, absent, sorted(set(present_files(path, exclude)) - set(wanted.files)))


def require_space(path: str, needed: int, margin: int = MARGIN) -> None:
    """Raise CheckpointError where the file system has less than ``needed`` bytes and ``margin`` MiB."""
    if not needed:
        return
    needed_mib, free = -(-needed // 2**20), free_mib(path)
    if free < needed_mib + margin:
        raise CheckpointError(
            f"{path} needs {needed_mib} MiB more and a margin of {margin} MiB, and the file system {mount_of(path)} "
            f"has {free} MiB free: free space there, or set vllm_model_root to a directory on a larger one"
        )


@contextmanager
def _told(path: str) -> Iterator[None]:
    """What the file system refuses, as a CheckpointError."""
    try:
        yield
    except OSError as error:
        sentence = f"{error.filename or path}: {error.strerror}"
        if error.errno == errno.ENOSPC:
            sentence = (
                f"no space left on the file system {mount_of(path)} ({error.strerror}): free space there, or set "
                "vllm_model_root to a directory on a larger one"
            )
        raise CheckpointError(sentence) from None


def copy_from(directory: str) -> Fetch:
    """Fetch from a directory of this machine."""

    def fetch(name: str, size: int, part: str, advance: Callable[[int], object], stop: threading.Event) -> None:
        source = os.path.join(directory, name)
        if not os.path.isfile(source):
            raise CheckpointError(f"{source} is not there, and the manifest names {name}")
        advance(-_size(part))  # what an interrupted run left is not used: copying is quick
        with _told(source), open(source, "rb", buffering=0) as stream, _told(part), open(part, "wb") as target:
            buffer = memoryview(bytearray(CHUNK))
            while True:
                with _told(source):
                    count = stream.readinto(buffer)
                if not count:
                    break
                if stop.is_set():
                    raise Stopped
                target.write(buffer[:count])
                advance(count)
            target.flush()
            os.fsync(target.fileno())

    return fetch


def put_by_others(store: Store) -> Fetch:
    """For files that only others bring, into the staging directory: what is not there by now is an error."""

    def fetch(name: str, size: int, part: str, advance: Callable[[int], object], stop: threading.Event) -> None:
        why = store.rejected.get(name)
        raise CheckpointError(
            f"{name} {why}: the file that was copied is damaged, or is not what the manifest was made from"
            if why
            else f"{name} was not copied into {store.staging}"
        )

    return fetch


class Store:
    """A checkpoint's directory. ``root`` is empty where it is used in place and only ever read."""

    def __init__(self, path: str, root: str = "", records: str = RECORDS, progress: Progress | None = None) -> None:
        self.path = path.rstrip("/")
        self.root = root
        self.records = records
        self.staging = f"{root}/.staging/{os.path.basename(self.path)}" if root else ""
        self.parts = f"{self.staging}/.parts"
        self.progress = progress or Progress()
        self.stop = threading.Event()
        #: Signature of each file as it was hashed last.
        self.seen: dict[str, list[int]] = {}
        #: Files that were in the staging directory and were not as wanted, and why.
        self.rejected: dict[str, str] = {}

    @contextmanager
    def sole_use(self) -> Iterator[None]:
        """Keep other runs out, after waiting for one that is under way."""
        if not self.root:
            yield
            return
        os.makedirs(self.root, mode=0o755, exist_ok=True)
        with open(f"{self.root}/.lock", "w", encoding="utf-8") as lock:
            self.progress.note("waiting for another run that is fetching into this directory")
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.progress.note("")
            yield

    def bring(
        self,
        wanted: Manifest,
        fetch: Fetch | None,
        always: bool = False,
        margin: int = MARGIN,
        exclude: Sequence[str] = (),
        origin: str = "its source",
    ) -> Brought:
        """Make the directory hold what the manifest names, every byte checked, and record it.

        Without ``fetch`` nothing can be mended: what is damaged or absent is an error that names each
        file. With ``always`` all files are hashed, not only those that changed since they were last.
        ``margin`` in MiB. Raises CheckpointError; engines that read the directory then read on as before.
        """
        with _told(self.path):
            return self._bring(wanted, fetch, always, margin, exclude, origin)

    def _bring(
        self, wanted: Manifest, fetch: Fetch | None, always: bool, margin: int, exclude: Sequence[str], origin: str
    ) -> Brought:
        record = read_record(self.path, self.records)
        found = look(self.path, wanted, record, exclude)
        suspect = sorted(found.suspect + (found.good if always else []))
        self.seen = {}
        sums: dict[str, File] = {}
        if record is not None:
            sums.update({name: record.manifest.files[name] for name in found.good})
            self.seen.update({name: record.seen[name] for name in found.good})
        damaged = self._hash({name: os.path.join(self.path, name) for name in suspect}, wanted, sums)
        broken = sorted([*damaged, *found.absent])
        if broken and fetch is None:
            raise CheckpointError(
                "\n".join(
                    [f"{self.path}/{name} {why}" for name, why in sorted(damaged.items())]
                    + [f"{self.path}/{name} is missing" for name in found.absent]
                )
            )
        if broken and fetch is not None:
            self._gather(broken, wanted, fetch, margin, sums, origin)
        structure = self._check(wanted, broken)
        if broken:
            self._install(broken, wanted)
        # The order of the manifest, whatever the order in which the sums came.
        verified = Manifest(
            {name: replace(sums[name], git_sha1="") for name in sorted(wanted.files)},
            wanted.repository,
            wanted.revision,
        )
        new = Record(
            verified,
            {name: self.seen[name] for name in verified.files},
            {
                "config": structure.config,
                "shards": structure.shards,
                "tensors": structure.tensors,
                "weight_bytes": structure.weight_bytes,
            },
            list(exclude),
            time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )
        if broken or suspect or record is None or (record.manifest, record.exclude) != (verified, new.exclude):
            write_object(record_path(self.path, self.records), new.as_dict(self.path))
        else:
            new = record
        warnings = structure.warnings + [f"{name} is there, and no manifest names it" for name in found.foreign]
        return Brought(new, broken, damaged, suspect, warnings)

    def link(self, name: str = "current", change: bool = True) -> bool:
        """Let ``ROOT/current`` point to this revision; whether it did not."""
        path, target = f"{self.root}/{name}", os.path.basename(self.path)
        if os.path.islink(path) and os.readlink(path) == target:
            return False
        if change:
            with _told(path):
                with suppress(FileNotFoundError):  # left by an interrupted run
                    os.unlink(path + ".new")
                os.symlink(target, path + ".new")
                os.replace(path + ".new", path)
        return True

    def _digest(self, name: str, path: str, wanted: File) -> File:
        """Hash a file. What it was before counts as seen, so that a change meanwhile does not pass for verified."""
        self.seen[name] = signature(path) or []
        return digest(path, bool(wanted.git_sha1), lambda count: self.progress.add(hashed=count), self.stop)

    def _hash(self, paths: Mapping[str, str], wanted: Manifest, sums: dict[str, File]) -> dict[str, str]:
        """Hash the files given as name to path; what is wrong with each that is not as wanted."""
        wrong: dict[str, str] = {}
        self.progress.add(to_hash=sum(os.path.getsize(path) for path in paths.values()))

        def one(name: str) -> None:
            file = wanted.files[name]
            # A file of another size need not be read.
            size = os.path.getsize(paths[name])
            if size != file.size:
                self.progress.add(to_hash=-size)
                wrong[name] = complaint(File(size), file)
                return
            found = self._digest(name, paths[name], file)
            why = complaint(found, file)
            if why:
                wrong[name] = why
            else:
                sums[name] = found

        self._each(one, paths)
        return wrong

    def _gather(
        self,
        names: Sequence[str],
        wanted: Manifest,
        fetch: Fetch,
        margin: int,
        sums: dict[str, File],
        origin: str,
    ) -> None:
        """Have all these files in the staging directory, complete and right."""
        os.makedirs(self.parts, mode=0o755, exist_ok=True)
        waiting = {name: os.path.join(self.staging, name) for name in names}
        waiting = {name: path for name, path in waiting.items() if os.path.isfile(path)}
        self.rejected = self._hash(waiting, wanted, sums)
        for name in self.rejected:
            os.unlink(waiting.pop(name))
        missing = [name for name in names if name not in waiting]
        parts = {name: os.path.join(self.parts, quote(name, safe="")) for name in missing}
        have = {name: _size(parts[name]) for name in missing}
        total = sum(wanted.files[name].size for name in missing)
        require_space(self.root, total - sum(have.values()), margin)
        self.progress.add(to_fetch=total, fetched=sum(have.values()), to_hash=total)

        def one(name: str) -> None:
            file, part = wanted.files[name], parts[name]
            for attempt in (1, 2):
                fetch(name, file.size, part, lambda count: self.progress.add(fetched=count), self.stop)
                found = self._digest(name, part, file)
                why = complaint(found, file)
                if not why:
                    break
                os.unlink(part)
                if attempt == 2:
                    raise CheckpointError(
                        f"{name} from {origin} {why}, and so it had when it was fetched again: the source is damaged "
                        "or is not what the manifest was made from; nothing that engines read was touched"
                    )
                self.progress.add(fetched=-found.size, hashed=-found.size)
            sums[name] = found
            target = os.path.join(self.staging, name)
            os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
            os.replace(part, target)

        # The largest first, so that none of them is left alone at the end.
        self._each(one, sorted(missing, key=lambda name: -wanted.files[name].size), STREAMS)

    def _each(self, work: Callable[[str], None], names: Iterable[str], at_a_time: int = 0) -> None:
        """Do the work on several files at a time. The first failure ends the others."""
        self.stop.clear()
        with ThreadPoolExecutor(max_workers=at_a_time or workers()) as pool:
            running = [pool.submit(work, name) for name in names]
            try:
                wait(running, return_when=FIRST_EXCEPTION)
            finally:
                if any(future.done() and future.exception() for future in running):
                    self.stop.set()
                    pool.shutdown(wait=True, cancel_futures=True)
        failures = [failure for future in running if not future.cancelled() and (failure := future.exception())]
        told = [failure for failure in failures if not isinstance(failure, Stopped)]
        known = [failure for failure in told if isinstance(failure, CheckpointError)]
        for failure in told:
            if failure not in known:
                raise failure
        if known:
            raise CheckpointError("\n".join(dict.fromkeys(str(failure) for failure in known)))

    def _check(self, wanted: Manifest, staged: Iterable[str]) -> _structure.Structure:
        """Whether the files fit each other, wherever each of them lies now."""
        staged = set(staged)
        places = {name: os.path.join(self.staging if name in staged else self.path, name) for name in wanted.files}
        structure = _structure.inspect(places)
        if structure.errors:
            raise CheckpointError("\n".join(f"{self.path}: {error}" for error in structure.errors))
        return structure

    def _install(self, names: Iterable[str], wanted: Manifest) -> None:
        """Move what was gathered to where engines read: all at once for a new revision, else file by file."""
        names = list(names)
        for name in names:
            os.chmod(os.path.join(self.staging, name), 0o644)
        if os.path.isdir(self.path):
            for name in names:
                target = os.path.join(self.path, name)
                os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
                os.replace(os.path.join(self.staging, name), target)
            shutil.rmtree(self.staging)
            return
        shutil.rmtree(self.parts)
        for name in set(present_files(self.staging)) - set(wanted.files):
            os.unlink(os.path.join(self.staging, name))
        os.rename(self.staging, self.path)


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except FileNotFoundError:
        return 0

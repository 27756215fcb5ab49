# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""vLLM's environment on disk, against the RECORD of each wheel and the lock file.

A release is complete when ``.release.json`` is written, and nothing changes it after that. So a file
whose inode changed later (ctime, which no program can set back) is suspect and is read; the others
need a stat. What changed beneath the file system is found by reading a part of all files at each
look, another part with each ``turn``.
"""

from __future__ import annotations

import base64
import csv
import glob
import hashlib
import os
import re
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ._checksum import Stopped, digest
from ._drift_kinds import Report
from ._venv import MARKER, locked_packages, read_marker

#: uv locks an environment with this file, which anybody may open.
_UV_LOCK = ".lock"
#: So many findings of one kind in one folder are told as one.
_MANY = 5


class Listed(NamedTuple):
    """A file as a RECORD has it: SHA-256 in hexadecimal (empty for none) and size (bytes; None for none)."""

    sha256: str
    size: int | None


class Seen(NamedTuple):
    """What is compared of a file's inode. Times are in ns since the epoch."""

    size: int
    mtime: int
    ctime: int
    uid: int
    mode: int


@dataclass
class Tree:
    """A release as it lies on disk: its files, and those that its wheels list, by path relative to it."""

    files: dict[str, Seen]
    listed: dict[str, Listed]
    packages: dict[str, str] = field(default_factory=dict)


# Reading


def walk(root: str) -> Iterator[tuple[str, Seen]]:
    """Each file, link and folder below a folder, by relative path; links are not followed. Raises OSError."""
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                status = entry.stat(follow_symlinks=False)
                yield name, Seen(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_uid, status.st_mode)
                if stat.S_ISDIR(status.st_mode):
                    waiting.append(name)


def parse_record(text: str, folder: str) -> dict[str, Listed]:
    """A wheel's RECORD. ``folder`` is that of site-packages, relative to the release."""
    found = {}
    for row in csv.reader(text.splitlines()):
        if len(row) >= 3:
            kind, _, value = row[1].partition("=")
            sha256 = base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)).hex() if kind == "sha256" else ""
            found[os.path.normpath(f"{folder}/{row[0]}")] = Listed(sha256, int(row[2]) if row[2] else None)
    return found


def read_tree(release: str) -> Tree:
    """Raises OSError and ValueError."""
    listed: dict[str, Listed] = {}
    packages = {}
    for path in sorted(glob.glob(f"{glob.escape(release)}/lib/python*/site-packages/*.dist-info/RECORD")):
        info = os.path.dirname(path)
        name, _, version = os.path.basename(info)[: -len(".dist-info")].partition("-")
        packages[normal(name)] = version
        with open(path, encoding="utf-8", newline="") as stream:
            listed.update(parse_record(stream.read(), os.path.relpath(os.path.dirname(info), release)))
    return Tree(dict(walk(release)), listed, packages)


def normal(name: str) -> str:
    """A package's name as comparisons want it."""
    return re.sub(r"[-_.]+", "-", name).lower()


# Comparing


class Grouped:
    """Findings about many files: those of one kind in one folder become one where there are many."""

    def __init__(self, report: Report, root: str, depth: int) -> None:
        self.report, self.root, self.depth = report, root, depth
        self._found: dict[tuple[str, str], list[tuple[str, str, str]]] = {}

    def add(self, kind: str, name: str, found: str, wanted: str) -> None:
        folder = "/".join(name.split("/")[: self.depth])
        self._found.setdefault((kind, folder), []).append((name, found, wanted))

    def tell(self) -> None:
        for (kind, folder), items in sorted(self._found.items()):
            if len(items) <= _MANY:
                for name, found, wanted in sorted(items):
                    self.report.add(kind, f"{self.root}/{name}", found, wanted)
            else:
                name, found, wanted = min(items)
                self.report.add(kind, f"{self.root}/{folder}", f"{len(items)} files, such as {name}: {found}", wanted)


def compare_packages(found: Mapping[str, str], lock_text: str, report: Report) -> None:
    """The installed packages against those of the lock file."""
    wanted = {}
    for item in locked_packages(lock_text):
        name, _, version = item.partition("==")
        wanted[normal(name)] = version
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            report.add(
                "release_package",
                name,
                found.get(name, "not installed"),
                wanted.get(name, "not installed, as the lock file does not name it"),
            )


def compare_tree(release: str, tree: Tree, report: Report, owner: int = 0) -> list[str]:
    """All that stats tell; returns the files to be read, because their inode changed since the release was complete."""
    complete = tree.files[MARKER]
    grouped = Grouped(report, release, depth=4)  # lib/pythonX.Y/site-packages/PACKAGE
    files = {name: seen for name, seen in tree.files.items() if not stat.S_ISDIR(seen.mode)}
    later = {name for name, seen in files.items() if seen.ctime > complete.ctime}
    # A copy of the whole, or chown -R, changes every inode; then the time of the content has to do.
    if len(later) > len(files) / 2:
        later = {name for name in later if files[name].mtime > complete.mtime}
    suspect = []
    for name, listed in tree.listed.items():
        seen = files.get(name)
        if _byte_code(name):
            continue  # compiled anew at the installation
        if seen is None:
            grouped.add("release_file_missing", name, "not there", "the file of its wheel")
        elif listed.size is not None and seen.size != listed.size:
            grouped.add("release_file_changed", name, f"{seen.size} bytes", f"{listed.size} bytes")
        elif name in later and listed.sha256:
            suspect.append(name)
        elif name in later:
            grouped.add("release_file_changed", name, "written after the release was complete", "left alone")
    for name in files:
        if name in tree.listed and not _byte_code(name):
            continue
        if _byte_code(name):
            if name in later:
                grouped.add("release_file_added", name, "byte code from after the release was complete", "none")
        elif "/site-packages/" in name:
            grouped.add("release_file_added", name, "no wheel brought it", "files of wheels only")
        elif name in later:
            grouped.add("release_file_changed", name, "written after the release was complete", "left alone")
    compare_owners(grouped, tree.files, owner, exempt=(_UV_LOCK,))
    grouped.tell()
    return sorted(suspect)


def _byte_code(name: str) -> bool:
    return name.endswith(".pyc") and "/__pycache__/" in name


def compare_owners(grouped: Grouped, files: Mapping[str, Seen], owner: int, exempt: Sequence[str] = ()) -> None:
    """Files and folders that belong to somebody else than ``owner``, or that others may write."""
    for name, seen in files.items():
        writable = seen.mode & 0o022 and not stat.S_ISLNK(seen.mode) and name not in exempt
        if seen.uid != owner or writable:
            found = f"user {seen.uid}, mode {stat.S_IMODE(seen.mode):04o}"
            grouped.add("owner_changed", name, found, f"user {owner}, written by nobody else")


# Reading content


def portion(sizes: Mapping[str, int], budget: int, turn: int) -> list[str]:
    """The files to read in this turn: together no more than ``budget`` bytes, but one at least.

    Successive turns go through all of them and begin again. A budget of 0 is none.
    """
    if budget <= 0 or not sizes:
        return []
    groups: list[list[str]] = []
    room = 0
    for name in sorted(sizes):
        if not groups or sizes[name] > room:
            groups.append([])
            room = budget
        groups[-1].append(name)
        room -= sizes[name]
    return groups[turn % len(groups)]


class Reader:
    """Hashes files until ``seconds`` are over, all calls together."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.bytes = 0
        self._stop = threading.Event()
        self._timer = threading.Timer(seconds, self._stop.set)
        self._timer.daemon = True

    def __enter__(self) -> Reader:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def sha256(self, path: str) -> str:
        """Raises Stopped once the time is over, and OSError."""
        if self._stop.is_set():
            raise Stopped
        found = digest(path, stop=self._stop)
        self.bytes += found.size
        return found.sha256


def compare_content(release: str, tree: Tree, names: Iterable[str], reader: Reader, report: Report) -> int:
    """Read these files and compare them with their wheels; returns how many were read."""
    grouped = Grouped(report, release, depth=4)
    count = 0
    names = list(names)
    for name in names:
        try:
            found = reader.sha256(f"{release}/{name}")
        except Stopped:
            report.blind(
                f"{release}: {len(names) - count} of {len(names)} files were not read within {reader.seconds:g} s: "
                "give it more time, or a smaller budget"
            )
            break
        except FileNotFoundError:
            grouped.add("release_file_missing", name, "not there", "the file of its wheel")
            continue
        count += 1
        wanted = tree.listed[name].sha256
        if found != wanted:
            grouped.add("release_file_changed", name, f"SHA-256 {found[:12]}", wanted[:12])
    grouped.tell()
    return count


def look_at_release(
    release: str,
    lock: str,
    lock_sha256: str,
    budget: int,
    turn: int,
    reader: Reader,
    report: Report,
    owner: int = 0,
) -> None:
    """The whole of a release. ``budget`` in bytes, apart from what is suspect. Raises OSError and ValueError."""
    if read_marker(release) is None:
        found = "it has no .release.json" if os.path.isdir(release) else "it is not there"
        report.add("release_incomplete", release, found, "a complete release")
        return
    tree = read_tree(release)
    suspect = compare_tree(release, tree, report, owner)
    try:
        with open(lock, encoding="utf-8") as stream:
            text = stream.read()
    except FileNotFoundError:
        text = ""
    # As Ansible's lookup of a file gives it, which the name of the release is made from.
    has = hashlib.sha256(text.rstrip().encode()).hexdigest()
    if has == lock_sha256:
        compare_packages(tree.packages, text, report)
    else:
        found = f"SHA-256 {has[:12]}" if text else "not there"
        report.add("lock_changed", lock, found, lock_sha256[:12], f"copy the declared lock file to {lock} again")
    sizes = {
        name: listed.size or 0
        for name, listed in tree.listed.items()
        if listed.sha256
        and not _byte_code(name)
        and name not in suspect
        and name in tree.files
        and tree.files[name].size == listed.size
    }
    chosen = portion(sizes, budget, turn)
    count = compare_content(release, tree, [*suspect, *chosen], reader, report)
    report.facts["release"] = {
        "path": release,
        "files": len(tree.listed),
        "packages": len(tree.packages),
        "read": count,
        "suspect": len(suspect),
    }

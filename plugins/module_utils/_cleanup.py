# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Which releases of vLLM and revisions of the checkpoint can go, and how they go.

A directory stays where it is the current one, where a unit was started from it, where a process uses
it, or where it is one of the most recently current ones up to a declared count. What was current is
remembered in a file, newest first, because the time of installation says nothing about a release
that was rolled back to.

Only names that the roles give are looked at, only directories, never through a symbolic link.
Removal is a rename to a name that nobody takes for a release, then the removal of that: interrupted,
it leaves no half release behind, and the next run finishes it.

``decide`` and ``remembered`` are pure; the rest reads the host, and only ``remove`` and ``locked``
change it.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ._unit import Paths, read_state
from ._venv import read_marker

HISTORY = "/var/lib/nvl-vllm/history.json"
#: Before the name of a directory that is being removed.
LEFTOVER = ".removing-"
#: Below the root of the revisions: what downloads have not finished, and the file they lock.
STAGING = ".staging"
LOCK = ".lock"


class Kind(NamedTuple):
    """Releases or revisions: ``history`` and ``state`` are their keys in the history and in a unit's state."""

    history: str
    state: str
    name: re.Pattern[str]


RELEASES = Kind("releases", "release", re.compile(r"[0-9][0-9A-Za-z.+_]*-(cuda|cpu)-[0-9a-f]{8}"))
REVISIONS = Kind("revisions", "model", re.compile(r"[0-9a-f]{40}|[0-9a-f]{12}"))


class Directory(NamedTuple):
    """One candidate: ``real`` is its path without links, ``modified`` a time stamp (s)."""

    path: str
    real: str
    complete: bool
    modified: float


class Plan(NamedTuple):
    """What is to become of one kind: ``kept`` is path to reason, ``going`` paths in the order to remove them.

    ``current`` is the real path of the current one, or empty. ``postponed`` says why nothing goes
    although something could. ``obstacles`` are paths that could go but for a mount point.
    """

    current: str
    kept: dict[str, str]
    going: list[str]
    postponed: str = ""
    obstacles: tuple[str, ...] = ()


def decide(
    found: Iterable[Directory], current: str, used: Mapping[str, str], history: Sequence[str], keep: int
) -> tuple[dict[str, str], list[str]]:
    """(path to reason of what stays, paths of what can go).

    ``current`` and the keys of ``used`` (path to reason) and ``history`` are real paths. ``keep``
    counts complete directories, the current one included. What is in use beyond it stays besides.
    Raises ValueError where ``keep`` is less than 1.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}, wanted 1 or more")
    found = sorted(found)

    def recency(one: Directory) -> tuple[bool, int, float]:
        # What never was current, as far as is known, comes after all that was; the newest of these first.
        place = history.index(one.real) if one.real in history else len(history)
        return one.real != current, place, -one.modified

    recent = {one.path for one in sorted((one for one in found if one.complete), key=recency)[:keep]}
    kept: dict[str, str] = {}
    for one in found:
        uses = [why for path, why in used.items() if path == one.real or path.startswith(one.real + "/")]
        if one.real == current:
            kept[one.path] = "it is the current one"
        elif uses:
            kept[one.path] = uses[0]
        elif one.path in recent:
            kept[one.path] = "it is the most recent one" if keep == 1 else f"it is one of the {keep} most recent ones"
    # By path, so that what an interrupted removal left (".removing-NAME") goes before NAME wants that name.
    return kept, [one.path for one in found if one.path not in kept]


def remembered(
    history: Mapping[str, Any], current: Mapping[str, str], exists: Callable[[str], bool]
) -> dict[str, list[str]] | None:
    """The history with what is current now (kind to real path) in front; None where it is there already.

    Entries that are gone are left out. A kind without a current path stays as it is.
    """
    lists = {key: past(history, key) for key in (RELEASES.history, REVISIONS.history)}
    moved = {key: path for key, path in current.items() if path and lists[key][:1] != [path]}
    if not moved:
        return None
    for key, path in moved.items():
        lists[key].insert(0, path)
    return {key: [path for path in dict.fromkeys(paths) if exists(path)] for key, paths in lists.items()}


def past(history: Mapping[str, Any], key: str) -> list[str]:
    """The paths of one kind in a history, newest first; none where it is damaged."""
    paths = history.get(key)
    return [path for path in paths if isinstance(path, str)] if isinstance(paths, list) else []


def current_of(kind: Kind, root: str) -> str:
    """Real path of what the ``current`` link leads to; empty where that is none of the kind in this directory."""
    path = os.path.realpath(f"{root}/current")
    parent, name = os.path.split(path)
    known = os.path.isdir(path) and parent == os.path.realpath(root) and kind.name.fullmatch(name)
    return path if known else ""


def directories(kind: Kind, root: str) -> list[Directory]:
    """The candidates of a kind below its root, what interrupted removals and downloads left included."""

    def below(folder: str) -> Iterator[tuple[os.DirEntry[str], bool]]:
        """Directories, not links to such, with one of our names; and whether a removal has begun."""
        if os.path.islink(folder) and folder != root:
            return
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
            for entry in entries:
                leftover = entry.name.startswith(LEFTOVER)
                name = entry.name[len(LEFTOVER) :] if leftover else entry.name
                if kind.name.fullmatch(name) and entry.is_dir(follow_symlinks=False):
                    yield entry, leftover

    def as_found(entry: os.DirEntry[str], complete: bool) -> Directory:
        return Directory(entry.path, os.path.realpath(entry.path), complete, entry.stat(follow_symlinks=False).st_mtime)

    found = [
        as_found(entry, not leftover and (kind is REVISIONS or read_marker(entry.path) is not None))
        for entry, leftover in below(root)
    ]
    if kind is REVISIONS:
        found += [as_found(entry, False) for entry, _ in below(f"{root}/{STAGING}")]
    return found


def started_from(kind: Kind, paths: Paths) -> tuple[dict[str, str], list[str]]:
    """(real path to reason of what units were started from, names of units whose state does not tell).

    An instance with files in ``paths.config`` counts as one that may run.
    """

    def names(pattern: str) -> set[str]:
        return {os.path.splitext(os.path.basename(path))[0] for path in glob.glob(pattern)}

    used: dict[str, str] = {}
    unknown: list[str] = []
    configured = names(f"{paths.config}/*.yaml")
    for name in sorted(configured | names(f"{paths.state}/*.json")):
        path = read_state(name, paths).get(kind.state)
        if isinstance(path, str) and path:
            used.setdefault(path, f"vllm@{name}.service was started from it")
        elif name in configured:
            unknown.append(name)
    return used, unknown


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as stream:
            return stream.read()
    except OSError:
        return ""  # the process ended meanwhile, or is not ours to look into


def _links(pid: str) -> Iterator[str]:
    """Program, working directory and open files of a process (its folder in /proc), where they can be read."""
    names = ["exe", "cwd"]
    with contextlib.suppress(OSError):
        names += [f"fd/{number}" for number in os.listdir(f"{pid}/fd")]
    for name in names:
        with contextlib.suppress(OSError):
            yield os.readlink(f"{pid}/{name}")


def processes_using(paths: Iterable[str], proc: str = "/proc") -> dict[str, str]:
    """Path to reason of those that a process has in its command line, runs, works in, has open or mapped.

    The command line is what tells of an engine's API server: it begins with the interpreter of the
    release. An engine process renames itself, so that only its mapped libraries tell; those a
    container without CAP_SYS_PTRACE does not show. A path within another one's name counts as well.
    """
    spellings = {path: {path, os.path.realpath(path)} for path in paths}
    used: dict[str, str] = {}
    for pid in sorted(filter(str.isdigit, os.listdir(proc)), key=int):
        folder = f"{proc}/{pid}"
        text = "\0".join([_read(f"{folder}/cmdline"), _read(f"{folder}/maps"), *_links(folder)])
        for path, spelled in spellings.items():
            if path not in used and any(one in text for one in spelled):
                used[path] = f"process {pid} ({_read(f'{folder}/comm').strip() or 'without a name'}) uses it"
    return used


def mount_points(proc: str = "/proc") -> list[str]:
    """All mount points, bind mounts of the same file system included (their device number does not tell)."""
    rows = (line.split() for line in _read(f"{proc}/self/mountinfo").splitlines())
    return [re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), row[4]) for row in rows if len(row) > 4]


def obstacle(path: str, mounts: Iterable[str]) -> str:
    """A mount point that is the directory or lies in it, or the empty string: what is there is not ours."""
    real = os.path.realpath(path)
    for mount in mounts:
        if mount == real or mount.startswith(real + "/"):
            return mount
    device = os.lstat(os.path.dirname(real)).st_dev
    for folder, _, _ in os.walk(real):
        # Directories only: in an overlay files can have the number of a lower layer.
        if os.lstat(folder).st_dev != device:
            return folder
    return ""


def size_bytes(path: str) -> int:
    """Bytes that the removal of a directory frees: files that have another link elsewhere do not count."""
    inodes: dict[tuple[int, int], list[int]] = {}
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                found = os.lstat(os.path.join(folder, name))
            except FileNotFoundError:  # removed meanwhile
                continue
            if stat.S_ISREG(found.st_mode):
                inodes.setdefault((found.st_dev, found.st_ino), [found.st_size, found.st_nlink, 0])[2] += 1
    return sum(size for size, links, seen in inodes.values() if seen >= links)


@contextlib.contextmanager
def locked(root: str, create: bool) -> Iterator[str]:
    """Keep downloads out of a directory of revisions; yields why that is not possible, or the empty string.

    Without ``create`` a lock file that is not there counts as free, and none is made.
    """
    path = f"{root}/{LOCK}"
    descriptor = -1
    why = ""
    try:
        if os.path.isdir(root):
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        why = f"{path} is locked: a download is under way"
    except OSError as error:
        if create or not isinstance(error, FileNotFoundError):
            why = f"{path} cannot be locked: {error.strerror}"
    try:
        yield why
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def plan(
    kind: Kind,
    root: str,
    keep: int,
    history: Mapping[str, Any],
    paths: Paths,
    blocked: str = "",
    proc: str = "/proc",
) -> Plan:
    """What is to become of the directories below ``root``. ``blocked`` says why nothing may go now.

    Raises ValueError where ``keep`` is less than 1.
    """
    current = current_of(kind, root)
    used, unknown = started_from(kind, paths)
    if current and kind is REVISIONS:
        staged = os.path.join(os.path.realpath(root), STAGING, os.path.basename(current))
        used.setdefault(staged, "it belongs to the current one")
    found = directories(kind, root)
    kept, going = decide(found, current, used, past(history, kind.history), keep)
    if not going:
        return Plan(current, kept, going)

    if not current:
        blocked = blocked or f"{root}/current leads to none of the {kind.history} there"
    if unknown:
        blocked = blocked or (
            f"what vllm@{unknown[0]}.service was started from is not known, as an older version of this collection "
            "started it or its state was lost: restart it"
        )
    if blocked:
        return Plan(current, {**kept, **dict.fromkeys(going, "its removal is postponed")}, [], blocked)

    busy = processes_using(going, proc)
    mounts = mount_points(proc)
    obstacles = []
    for path in going:
        mount = "" if path in busy else obstacle(path, mounts)
        if mount:
            busy[path] = f"{mount} is a mount point"
            obstacles.append(path)
    return Plan(current, {**kept, **busy}, [path for path in going if path not in busy], "", tuple(obstacles))


def remove(path: str) -> None:
    """Remove a directory; interrupted, it leaves one whose name says so. Raises OSError."""
    folder, name = os.path.split(path)
    if not name.startswith(LEFTOVER):
        aside = os.path.join(folder, LEFTOVER + name)
        os.rename(path, aside)
        path = aside
    shutil.rmtree(path)

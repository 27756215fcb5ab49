# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""What lies on a host's disk, against what was installed: release, checkpoint, files of ours, packages.

Changes nothing. What cannot be read is told as unknown and does not keep the rest from being read.
"""

from __future__ import annotations

import grp
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ._checkpoint import RECORDS
from ._drift_checkpoint import look_at_checkpoint
from ._drift_kinds import Report
from ._drift_release import Grouped, Reader, compare_owners, look_at_release, walk
from ._gpu_info import TimedRunner, run_command

#: What the roles write into the folders of helpers, besides byte code. A test holds it against the roles.
LIBRARY = "/usr/local/lib/nvl-vllm"
HELPERS = (
    "nvl_vllm/_agent.py",
    "nvl_vllm/_agent_daemon.py",
    "nvl_vllm/_calibration.py",
    "nvl_vllm/_gateway_watch.py",
    "nvl_vllm/_health.py",
    "nvl_vllm/_host.py",
    "nvl_vllm/_http.py",
    "nvl_vllm/_json_file.py",
    "nvl_vllm/_openai.py",
    "nvl_vllm/_unit.py",
    "nvl_vllm/_units.py",
    "nvl_vllm/first_token.py",
)
GATEWAY_FILES = ("haproxy.cfg", "keys", "files.pem", "self_signed.pem")
#: They hold a private key, too.
CERTIFICATES = ("files.pem", "self_signed.pem")
#: What images leave out of packages.
_LEFT_OUT = re.compile(r"/usr/share/(doc|man|locale|info|lintian|doc-base|bug)/")
_VERIFIED = re.compile(r"^(missing|[?.5SMDLUGTPC]{9})\s+(c\s+)?(/.+)$")


@dataclass(frozen=True)
class Wanted:
    """What is installed and declared. Budgets are MiB, times seconds."""

    release: str
    root: str
    lock: str
    lock_sha256: str
    instances: Sequence[str]
    model_path: str
    model_root: str = ""
    model_exclude: Sequence[str] = ()
    packages: Sequence[str] = ()
    held: Sequence[str] = ()
    owned: Sequence[str] = ()
    release_hash_budget: int = 256
    hash_budget: int = 0
    turn: int = 0
    hash_timeout: float = 120.0
    timeout: float = 20.0


@dataclass(frozen=True)
class Paths:
    """Where things are, and whose; tests put them elsewhere. ``owner`` is root's number, ``group`` HAProxy's name."""

    config: str = "/etc/vllm"
    library: str = LIBRARY
    records: str = RECORDS
    notes: str = "/var/lib/nvl-vllm"
    state: str = "/run/nvl-vllm"
    owner: int = 0
    group: str = "haproxy"


class Look:
    """One look at the disk. ``run`` runs commands with a deadline."""

    def __init__(self, wanted: Wanted, run: TimedRunner = run_command, paths: Paths = Paths()) -> None:
        self.wanted = wanted
        self.run = run
        self.paths = paths
        self.report = Report("content")

    @contextmanager
    def part(self, what: str) -> Iterator[None]:
        """What goes wrong within is told as unknown."""
        try:
            yield
        except (OSError, ValueError, KeyError) as error:
            self.report.blind(f"{what} cannot be looked at: {error or type(error).__name__}")

    def look(self) -> Report:
        """All parts."""
        parts: list[tuple[str, Callable[[], None]]] = [
            ("the release", self.release),
            ("the checkpoint", self.checkpoint),
            ("the files of the roles", self.files),
            ("the packages", self.packages),
        ]
        for what, part in parts:
            with self.part(what):
                part()
        return self.report

    def release(self) -> None:
        wanted = self.wanted
        with Reader(wanted.hash_timeout) as reader:
            look_at_release(
                wanted.release,
                f"{wanted.root}/locks/{wanted.lock}",
                wanted.lock_sha256,
                wanted.release_hash_budget * 2**20,
                wanted.turn,
                reader,
                self.report,
                self.paths.owner,
            )

    def checkpoint(self) -> None:
        wanted = self.wanted
        with Reader(wanted.hash_timeout) as reader:
            look_at_checkpoint(
                wanted.model_path,
                wanted.model_root,
                wanted.model_exclude,
                wanted.hash_budget * 2**20,
                wanted.turn,
                reader,
                self.report,
                self.paths.records,
                self.paths.owner,
            )

    def files(self) -> None:
        known = {f"{name}.{kind}" for name in self.wanted.instances for kind in ("yaml", "env")}
        known |= {"health.json", *(f"gateway/{name}" for name in GATEWAY_FILES)}
        compare_names(self.paths.config, known, self.report, self.wanted.owned)
        compare_names(self.paths.library, set(HELPERS), self.report)
        # What a run of the roles in check mode does not look at.
        for name in CERTIFICATES:
            compare_certificate(f"{self.paths.config}/gateway/{name}", self.paths.owner, self.paths.group, self.report)
        for folder in (self.paths.notes, self.paths.state):
            if os.path.isdir(folder):
                grouped = Grouped(self.report, folder, depth=1)
                compare_owners(grouped, dict(walk(folder)), self.paths.owner)
                grouped.tell()

    def packages(self) -> None:
        names = list(dict.fromkeys([*self.wanted.packages, *self.wanted.held]))
        if not names:
            return
        query = [
            "dpkg-query",
            "--show",
            "--showformat=${Package}\t${Version}\t${db:Status-Want}\t${db:Status-Status}\n",
        ]
        # Status 1 where one of them is not there, which its absence from the list tells too.
        status, out, err = self.run([*query, "--", *names], self.wanted.timeout)
        if status not in (0, 1):
            raise OSError(f"dpkg-query failed: {(err or out).strip()}")
        found = {row[0]: row[1:] for row in (line.split("\t") for line in out.splitlines()) if len(row) == 4}
        compare_installed(found, self.wanted.packages, self.wanted.held, self.report)
        there = [name for name in self.wanted.packages if found.get(name, ["", "", ""])[2] == "installed"]
        if there:
            status, out, err = self.run(["dpkg", "--verify", "--", *there], self.wanted.timeout)
            if status not in (0, 1):
                raise OSError(f"dpkg --verify failed: {(err or out).strip()}")
            compare_verified(out, self.report)
        self.report.facts["packages"] = {name: row[0] for name, row in sorted(found.items())}


def compare_names(folder: str, known: set[str], report: Report, owned: Sequence[str] = ()) -> None:
    """Files below a folder that are none of ``known`` (relative paths), and not in ``owned`` folders (absolute ones).

    Byte code does not count.
    """
    if not os.path.isdir(folder):
        return
    others = {os.path.relpath(path, folder) for path in owned if path}
    folders = {os.path.dirname(name) for name in {*known, *others}} | {""}
    for name, seen in sorted(walk(folder)):
        is_folder = stat.S_ISDIR(seen.mode)
        if "__pycache__" in name.split("/") or name in known or (is_folder and name in folders):
            continue
        if any(name == other or name.startswith(f"{other}/") for other in others):
            continue
        # What is in a folder that nobody knows is told with it.
        if os.path.dirname(name) in folders:
            report.add("undeclared_file", f"{folder}/{name}", "no role wrote it", "files of the roles only")


def compare_certificate(path: str, owner: int, group: str, report: Report) -> None:
    """A certificate with its key: root's, and readable for HAProxy's group only. One that is not there is none."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return
    try:
        has = grp.getgrgid(status.st_gid).gr_name
    except KeyError:
        has = str(status.st_gid)
    mode = stat.S_IMODE(status.st_mode)
    if (status.st_uid, has, mode) != (owner, group, 0o640):
        report.add(
            "owner_changed",
            path,
            f"user {status.st_uid}, group {has}, mode {mode:04o}",
            f"user {owner}, group {group}, mode 0640",
            f"run chown {owner}:{group} {path} and chmod 0640 {path}; where others could read it, replace the key",
        )


def compare_installed(
    found: Mapping[str, Sequence[str]], wanted: Sequence[str], held: Sequence[str], report: Report
) -> None:
    """Packages (name to version, wanted state, state, as dpkg-query tells them) that must be installed, or held."""
    for name in dict.fromkeys([*wanted, *held]):
        row = found.get(name)
        if row is None or row[2] != "installed":
            report.add("package_missing", name, row[2] if row else "not installed", "installed")
        elif name in held and row[1] != "hold":
            report.add("package_not_held", name, "an upgrade may replace it", "held", f"run apt-mark hold {name}")


def compare_verified(text: str, report: Report) -> None:
    """The answer of ``dpkg --verify``. Files of configuration are their admin's to change."""
    for line in text.splitlines():
        match = _VERIFIED.match(line)
        if match is None or match.group(2):
            continue
        path = match.group(3)
        if match.group(1) != "missing":
            report.add(
                "package_file_changed", path, "another content than its package brought", "as its package brought it"
            )
        elif not _LEFT_OUT.match(path):
            report.add("package_file_changed", path, "not there", "as its package brought it")

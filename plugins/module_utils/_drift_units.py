# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Units and processes against what is declared: state, overrides, arguments, environment.

Readers take a runner or a ``/proc``; comparisons are text in, findings out.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shlex
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ._drift_kinds import MASK, Report, is_secret, masked
from ._host import read_text, unit_of
from ._units import parse_show

PROPERTIES = (
    "Id",
    "LoadState",
    "ActiveState",
    "SubState",
    "Result",
    "UnitFileState",
    "NRestarts",
    "MainPID",
    "FragmentPath",
    "DropInPaths",
    "NeedDaemonReload",
)
#: Where systemd takes units and drop-ins from that an admin or a program can write.
UNIT_FOLDERS = (
    "/etc/systemd/system",
    "/etc/systemd/system.control",
    "/run/systemd/system",
    "/run/systemd/system.control",
    "/run/systemd/transient",
)
#: Variables that systemd itself gives to a process.
SYSTEMD_VARIABLES = frozenset(
    [
        "LANG",
        "LANGUAGE",
        "PATH",
        "HOME",
        "LOGNAME",
        "USER",
        "SHELL",
        "TERM",
        "INVOCATION_ID",
        "JOURNAL_STREAM",
        "SYSTEMD_EXEC_PID",
        "MANAGERPID",
        "MAINPID",
        "NOTIFY_SOCKET",
        "WATCHDOG_PID",
        "WATCHDOG_USEC",
        "LISTEN_PID",
        "LISTEN_FDS",
        "LISTEN_FDNAMES",
        "RUNTIME_DIRECTORY",
        "STATE_DIRECTORY",
        "CACHE_DIRECTORY",
        "LOGS_DIRECTORY",
        "CONFIGURATION_DIRECTORY",
        "CREDENTIALS_DIRECTORY",
        "MEMORY_PRESSURE_WATCH",
        "MEMORY_PRESSURE_WRITE",
        "SYSTEMD_NSS_BYPASS_BUS",
    ]
)
_DELETED = " (deleted)"


@dataclass(frozen=True)
class Process:
    """One process as /proc tells it.

    ``program`` is the path of its executable file; empty where root may not see it, as in a container.
    ``started`` is in seconds since the epoch.
    """

    pid: int
    argv: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    program: str = ""
    unit: str = ""
    uid: int = -1
    started: float = 0.0

    def replaced(self, program: str) -> bool:
        """Whether the file that it runs is no longer on disk. ``program`` is where that should be."""
        if self.program:
            return self.program.endswith(_DELETED)
        return os.stat(program).st_ctime > self.started


# Reading


def read_process(pid: int, proc: str = "/proc") -> Process | None:
    """The process, or None where it has ended. Raises OSError where it may not be read."""
    folder = f"{proc}/{pid}"
    try:
        with open(f"{folder}/cmdline", "rb") as stream:
            argv = stream.read().decode("utf-8", "replace").rstrip("\0").split("\0")
        with open(f"{folder}/environ", "rb") as stream:
            pairs = stream.read().decode("utf-8", "surrogateescape").split("\0")
        uid = os.stat(folder).st_uid
        with open(f"{folder}/stat", encoding="utf-8", errors="replace") as stream:
            ticks = int(stream.read().rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return None
    try:
        program = os.readlink(f"{folder}/exe")
    except OSError:
        program = ""
    booted = time.time() - float(read_text(f"{proc}/uptime").split()[0])
    started = booted + ticks / os.sysconf("SC_CLK_TCK")
    environment = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    return Process(pid, argv, environment, program, unit_of(read_text(f"{folder}/cgroup")), uid, started)


def engines_running(proc: str = "/proc") -> list[Process]:
    """All processes that look like a vLLM server or a part of one."""
    found = []
    for pid in sorted(map(int, filter(str.isdigit, os.listdir(proc)))):
        argv = read_text(f"{proc}/{pid}/cmdline").rstrip("\0").split("\0")
        if is_engine(argv):
            process = read_process(pid, proc)
            if process is not None:
                found.append(process)
    return found


def is_engine(argv: Sequence[str]) -> bool:
    """Whether this is vLLM's command line or the title that one of its processes gave itself."""
    if argv[:1] and argv[0].startswith("VLLM::"):
        return True
    words = list(argv[:6])
    if not words or not re.match(r"(python[\d.]*|vllm|pt_main_thread)$", os.path.basename(words[0])):
        return False
    serve = any(os.path.basename(word) == "vllm" and following == "serve" for word, following in zip(words, words[1:]))
    return serve or any(
        word == "-m" and following.startswith("vllm.entrypoints") for word, following in zip(words, words[1:])
    )


def parse_units(text: str) -> dict[str, dict[str, str]]:
    """The answer of ``systemctl show`` to several units, by ``Id``."""
    blocks = [parse_show(block) for block in text.split("\n\n") if block.strip()]
    return {block["Id"]: block for block in blocks if "Id" in block}


def drop_ins(unit: str, folders: Sequence[str] = UNIT_FOLDERS) -> list[str]:
    """Drop-ins of a unit on disk, those of its template included, whether systemd has read them or not."""
    template = re.sub(r"@[^.]+", "@", unit)
    names = dict.fromkeys([template, unit])
    return [path for folder in folders for name in names for path in sorted(glob.glob(f"{folder}/{name}.d/*.conf"))]


# Files that give an environment


def parse_environment_file(text: str) -> dict[str, str]:
    """The variables of an EnvironmentFile as systemd reads it; the last line of a name counts."""
    found = {}
    for line in text.splitlines():
        line = line.strip()
        if line and line[0] not in "#;" and "=" in line:
            name, _, value = line.partition("=")
            found[name.strip()] = _unquoted(value.strip())
    return found


def _unquoted(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] == '"':
        return re.sub(r'\\(["\\`$])', r"\1", value[1:-1])
    if len(value) >= 2 and value[0] == value[-1] == "'":
        return value[1:-1]
    return value


def unit_environment(unit_file: str) -> dict[str, str]:
    """The variables of a unit file's own ``Environment=`` lines."""
    found: dict[str, str] = {}
    for line in unit_file.splitlines():
        if line.startswith("Environment="):
            for pair in shlex.split(line.partition("=")[2]):
                name, _, value = pair.partition("=")
                found[name] = value
    return found


# Comparing


def compare_units(
    shown: Mapping[str, Mapping[str, str]],
    wanted: Iterable[str],
    report: Report,
    restarts: int = 3,
    texts: Mapping[str, str] | None = None,
) -> None:
    """States and overrides of the wanted units. ``restarts`` is how many are not worth a note.

    ``texts`` are the drop-ins found on disk with their text, by ``UNIT PATH``.
    """
    for unit in wanted:
        show = shown.get(unit)
        if show is None:
            report.blind(f"systemctl says nothing of {unit}: run systemctl show {unit} on the host")
            continue
        _state(unit, show, report, restarts)
        _overrides(unit, show, texts or {}, report)


def _state(unit: str, show: Mapping[str, str], report: Report, restarts: int) -> None:
    active, load = show.get("ActiveState", ""), show.get("LoadState", "")
    enabled = show.get("UnitFileState", "")
    if load != "loaded":
        remedy = f"run systemctl unmask {unit}, then site.yml" if load == "masked" else ""
        report.add("unit_not_active", unit, f"the unit is {load}, and {active or 'not there'}", "active", remedy)
        return
    if active in ("activating", "deactivating", "reloading"):
        report.add("unit_starting", unit, f"{active} ({show.get('SubState', '')})", "active")
    elif active != "active":
        why = show.get("Result", "success")
        found = f"{active} ({why})" if active == "failed" or why != "success" else active
        report.add(
            "unit_not_active", unit, found, "active", f"read journalctl -u {unit}, then run site.yml, which starts it"
        )
    if enabled != "enabled":
        report.add("unit_not_enabled", unit, enabled or "no state of its file", "enabled")
    if show.get("NeedDaemonReload") == "yes":
        report.add("unit_not_reloaded", unit, "its files changed since systemd read them", "read")
    count = show.get("NRestarts", "0")
    if count.isdigit() and int(count) > restarts:
        report.add(
            "unit_restarts",
            unit,
            f"{count} restarts by systemd since it was started last",
            f"{restarts} or fewer",
            f"read journalctl -u {unit} for the reason",
        )


def _overrides(unit: str, show: Mapping[str, str], texts: Mapping[str, str], report: Report) -> None:
    template = re.sub(r"@[^.]+", "@", unit)
    own = f"/etc/systemd/system/{template}"
    fragment = show.get("FragmentPath", "")
    if fragment not in ("", own):
        report.add(
            "unit_override", unit, f"the unit file {fragment} counts", own, f"remove {fragment}, then run site.yml"
        )
    # What the distribution brings for all services is nobody's override.
    loaded = [path for path in show.get("DropInPaths", "").split() if not path.startswith(("/usr/lib/", "/lib/"))]
    on_disk = [key.partition(" ")[2] for key in texts if key.partition(" ")[0] == unit]
    for path in dict.fromkeys([*loaded, *on_disk]):
        report.add(
            "unit_override",
            f"{unit} {path}",
            f"{path} changes {unit}" + ("" if path in loaded else ", once systemd reads it"),
            "no drop-in",
            f"run systemctl revert {unit} (or remove {path} and run systemctl daemon-reload), then site.yml",
            masked(texts.get(f"{unit} {path}", "")).rstrip("\n"),
        )


def compare_undeclared_units(known: Mapping[str, Mapping[str, str]], declared: Collection[str], report: Report) -> None:
    """Units of ours that run or would run at boot, and that nobody declared."""
    for unit, show in sorted(known.items()):
        active, enabled = show.get("ActiveState", "inactive"), show.get("UnitFileState", "")
        if unit in declared or (active == "inactive" and enabled != "enabled"):
            continue
        report.add(
            "undeclared_unit",
            unit,
            f"{active}, {enabled or 'static'}",
            "not there",
            f"run site.yml, which removes it, or systemctl disable --now {unit}",
        )


def compare_arguments(unit: str, process: Process, wanted: Sequence[str], report: Report) -> None:
    """The command line of a unit's main process. Python puts its own path before a script's."""
    argv = process.argv
    if argv[:1] and argv[0].startswith("VLLM::"):
        report.blind(f"{unit}: its process calls itself {argv[0]}, so its arguments cannot be read")
        return
    script = len(argv) > 1 and re.match(r"python[\d.]*$", os.path.basename(argv[0])) is not None
    found = argv[1:] if script else argv
    if list(found) != list(wanted):
        report.add(
            "process_arguments",
            unit,
            masked(shlex.join(found)),
            shlex.join(wanted),
            f"run systemctl cat {unit} to see where they are from; remove the override and run site.yml",
        )


def compare_environment(
    unit: str,
    process: Process,
    wanted: Mapping[str, str],
    manager: Mapping[str, str],
    report: Report,
) -> None:
    """The environment of a unit's main process against its files; values of secrets are never shown."""
    for name in sorted({*wanted, *process.environment}):
        has, wants = process.environment.get(name), wanted.get(name)
        if has == wants or (wants is None and name in SYSTEMD_VARIABLES):
            continue
        where = f"{unit} {name}"
        if wants is None and manager.get(name) == has:
            report.add("inherited_environment", where, _value(name, has), "not set", f"declare {name}, or unset it")
            continue
        secret = is_secret(name) and has is not None and wants is not None
        report.add(
            "process_environment",
            where,
            "another value (not shown)" if secret else _value(name, has),
            "the value in its files (not shown)" if secret else _value(name, wants),
            f"run site.yml, which restarts {unit}; a variable of an override goes with the override",
        )


def _value(name: str, value: str | None) -> str:
    if value is None:
        return "not set"
    return f"set to {MASK}" if is_secret(name) else f"set to {masked(value)!r}"


def compare_key(unit: str, process: Process, wanted_sha256: str, report: Report) -> None:
    """The engine's API key against the declared one, by their hashes. An empty one is that of no key."""
    key = process.environment.get("VLLM_API_KEY", "")
    found = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest() if key else ""
    if found != wanted_sha256:
        report.add(
            "process_environment",
            f"{unit} VLLM_API_KEY",
            "another key than declared" if found and wanted_sha256 else "a key" if found else "no key",
            "the key of vllm_api_key" if wanted_sha256 else "no key",
            f"run site.yml, which writes the key and restarts {unit}",
        )


def compare_engines(processes: Iterable[Process], declared: Collection[str], report: Report) -> None:
    """vLLM's processes that belong to none of the declared units. Those of one unit or user are one finding."""
    strays: dict[str, list[Process]] = {}
    for process in processes:
        if process.unit not in declared:
            strays.setdefault(process.unit or f"user {process.uid}", []).append(process)
    for where, group in sorted(strays.items()):
        first = group[0]
        more = f" and {len(group) - 1} more" if len(group) > 1 else ""
        report.add(
            "undeclared_engine",
            where,
            f"process {first.pid} ({masked(shlex.join(first.argv))}){more}",
            "no vLLM outside of the declared units",
            f"stop it ({'systemctl stop ' + first.unit if first.unit else f'kill {first.pid}'}), or declare it",
        )


def changed_since(paths: Iterable[str], since: float) -> list[str]:
    """Which files changed after a moment (seconds since the epoch)."""
    found = []
    for path in paths:
        try:
            status = os.stat(path)
        except FileNotFoundError:
            continue
        if max(status.st_mtime, status.st_ctime) > since:
            found.append(path)
    return found

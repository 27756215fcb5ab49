# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""What a host must offer before anything is installed on it.

Loaders read ``/proc`` and run ``nvidia-smi``; the rest is text in, values out.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

#: Runs a command and returns exit status, standard output, standard error. AnsibleModule.run_command fits.
Runner = Callable[[list[str]], "tuple[int, str, str]"]

_LISTEN = "0A"


class Listener(NamedTuple):
    """A program that listens on a TCP port. ``uid`` is the socket's; the rest is empty where /proc does not tell."""

    port: int
    uid: int
    program: str = ""
    pid: int = 0
    unit: str = ""

    def __str__(self) -> str:
        if not self.pid:
            return f"a program of user {self.uid} that cannot be told from here (container, other namespace)"
        return f"{self.program} (process {self.pid}{', ' + self.unit if self.unit else ''})"


def listening_sockets(table: str) -> dict[str, tuple[int, int]]:
    """Inode to port and uid of each listening socket, from the text of ``/proc/net/tcp`` or ``tcp6``."""
    rows = (line.split() for line in table.splitlines()[1:])
    return {
        row[9]: (int(row[1].rpartition(":")[2], 16), int(row[7])) for row in rows if len(row) > 9 and row[3] == _LISTEN
    }


def unit_of(cgroup: str) -> str:
    """The service that a process belongs to, from the text of ``/proc/PID/cgroup``."""
    match = re.search(r"/([^/\n]+\.service)(?:/|$)", cgroup, re.MULTILINE)
    return match.group(1) if match else ""


def read_text(path: str) -> str:
    """The text of a file, or nothing where it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read()
    except OSError:
        return ""  # the process ended meanwhile, or IPv6 is off


def _links(folder: str) -> Iterator[str]:
    """Where the links of a folder lead; of a process that ended, or that one may not look into, none."""
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in names:
        with contextlib.suppress(OSError):  # closed meanwhile
            yield os.readlink(f"{folder}/{name}")


def listeners(ports: Iterable[int], proc: str = "/proc") -> list[Listener]:
    """Who listens on the given ports, in any address family. Programs are named where root may see them."""
    ports = set(ports)
    sockets: dict[str, tuple[int, int]] = {}
    for table in ("tcp", "tcp6"):
        for inode, (port, uid) in listening_sockets(read_text(f"{proc}/net/{table}")).items():
            if port in ports:
                sockets[f"socket:[{inode}]"] = (port, uid)
    found = {port: Listener(port, uid) for port, uid in sockets.values()}
    for pid in filter(str.isdigit, os.listdir(proc)) if sockets else ():
        for port, uid in {sockets[link] for link in _links(f"{proc}/{pid}/fd") if link in sockets}:
            unit = unit_of(read_text(f"{proc}/{pid}/cgroup"))
            found[port] = Listener(port, uid, read_text(f"{proc}/{pid}/comm").strip(), int(pid), unit)
    return [found[port] for port in sorted(found)]


def foreign_listeners(ports: Mapping[str, int], own_uid: int | None, proc: str = "/proc") -> list[str]:
    """A sentence for each instance whose port a program other than one of our engines has.

    ``own_uid`` is the engines' user, where there is one already: it decides where the program
    cannot be told.
    """
    found = {listener.port: listener for listener in listeners(ports.values(), proc)}

    def own(listener: Listener) -> bool:
        return listener.unit.startswith("vllm@") if listener.pid else listener.uid == own_uid

    return [
        f"port {port} of instance {name} is taken by {found[port]}: stop it, or declare another port"
        for name, port in ports.items()
        if port in found and not own(found[port])
    ]


def taken_ports(services: Iterable[Mapping[str, Any]], proc: str = "/proc") -> list[str]:
    """A sentence for each service (``name``, ``port``, ``unit``, ``uid``) whose port a program outside its unit has.

    ``uid`` is the user of the service's socket, None where there is none yet: it decides where the program cannot be
    told.
    """
    services = list(services)
    found = {listener.port: listener for listener in listeners((item["port"] for item in services), proc)}

    def own(item: Mapping[str, Any], listener: Listener) -> bool:
        return bool(listener.unit == item["unit"] if listener.pid else listener.uid == item["uid"])

    return [
        f"port {item['port']} ({item['name']}) is taken by {found[item['port']]}: stop it, or set another port"
        for item in services
        if item["port"] in found and not own(item, found[item["port"]])
    ]


def mount_of(path: str) -> str:
    """The mount point of the file system where the path is, or will be."""
    path = os.path.abspath(path)
    while not os.path.exists(path) or not os.path.ismount(path):
        path = os.path.dirname(path)
    return path


def free_mib(path: str) -> int:
    """Free space (MiB) of the file system where the path is, or will be."""
    return shutil.disk_usage(mount_of(path)).free // 2**20


def space_complaints(
    needs: Iterable[tuple[str, int, str]],
    mount: Callable[[str], str] = mount_of,
    free: Callable[[str], int] = free_mib,
) -> list[str]:
    """A sentence for each file system that has less free than what goes there needs in sum.

    ``needs`` are (directory, MiB, variable that moves it elsewhere).
    """
    wanted: dict[str, list[tuple[str, int, str]]] = {}
    for path, mib, variable in needs:
        if mib > 0:
            wanted.setdefault(mount(path), []).append((path, mib, variable))
    complaints = []
    for place, items in wanted.items():
        total, have = sum(mib for _, mib, _ in items), free(place)
        if have < total:
            what = " and ".join(f"{path} ({mib} MiB)" for path, mib, _ in items)
            variables = " or ".join(variable for _, _, variable in items)
            complaints.append(
                f"{what} need{'s' if len(items) == 1 else ''} {total} MiB of free disk space, and the file system "
                f"{place} has {have} MiB: free space there, or set {variables} to a directory on a larger file system"
            )
    return complaints


def match_gpus(
    declared: Mapping[str, Iterable[int | str]], present: Mapping[int, str]
) -> tuple[dict[str, list[str]], list[str]]:
    """UUIDs of each instance's GPUs, and a sentence for each that the host does not have, or that is named twice."""
    result: dict[str, list[str]] = {}
    errors: list[str] = []
    have = ", ".join(f"{index} ({uuid})" for index, uuid in sorted(present.items())) or "none"
    for name, wanted in declared.items():
        result[name] = []
        for gpu in wanted:
            uuid = present.get(gpu) if isinstance(gpu, int) else (gpu if gpu in present.values() else None)
            if uuid is None:
                errors.append(f"GPU {gpu} of instance {name} is not there: the host has {have}")
            elif uuid in result[name]:
                errors.append(f"GPU {gpu} of instance {name} is {uuid}, which it has already: name each GPU once")
            else:
                result[name].append(uuid)
    return result, errors


def python_complaint(version: str, path: str) -> str:
    """Why the interpreter cannot carry vLLM, or the empty string. ``version`` is such as 3.11.2."""
    parts = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if (3, 11) <= parts <= (3, 13):
        return ""
    found = f"is Python {version}" if parts else "is not there"
    return f"vllm_python is {path}, which {found}: wanted 3.11, 3.12 or 3.13"

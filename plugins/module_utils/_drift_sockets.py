# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Listening TCP sockets of our users and units, and the clock, against what is declared."""

from __future__ import annotations

import ctypes
import ipaddress
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from ._drift_kinds import Report
from ._host import _LISTEN, _links, read_text, unit_of

WILDCARDS = ("0.0.0.0", "::")
#: Place of maxerror (microseconds) in struct timex, in longs, and what it grows to when nothing sets the clock.
_MAXIMUM_ERROR, _NEVER_SET = 3, 16_000_000


@dataclass(frozen=True)
class Socket:
    """A listening socket. ``uid`` is its user; unit, program and pid are empty where no process shows it."""

    address: str
    port: int
    uid: int
    unit: str = ""
    program: str = ""
    pid: int = 0

    def __str__(self) -> str:
        shown = f"[{self.address}]" if ":" in self.address else self.address
        return f"{shown}:{self.port}"


@dataclass(frozen=True)
class Door:
    """Where a declared service listens, and as which user. ``address`` is empty where any is right."""

    unit: str
    address: str
    port: int
    uid: int


def address_of(text: str) -> str:
    """An address from /proc/net/tcp or tcp6: 32-bit words in the host's byte order (little endian here)."""
    words = [bytes.fromhex(text[start : start + 8])[::-1] for start in range(0, len(text), 8)]
    found = ipaddress.ip_address(b"".join(words))
    mapped = getattr(found, "ipv4_mapped", None)
    return str(mapped or found)


def parse_table(table: str) -> dict[str, Socket]:
    """The listening sockets of a table by their inode."""
    rows = (line.split() for line in table.splitlines()[1:])
    found = {}
    for row in rows:
        if len(row) > 9 and row[3] == _LISTEN:
            address, _, port = row[1].rpartition(":")
            found[row[9]] = Socket(address_of(address), int(port, 16), int(row[7]))
    return found


def read_sockets(proc: str = "/proc") -> list[Socket]:
    """All listening TCP sockets with the processes that have them. Raises OSError where /proc/net/tcp is not there."""
    with open(f"{proc}/net/tcp", encoding="ascii") as stream:
        sockets = parse_table(stream.read())
    sockets.update(parse_table(read_text(f"{proc}/net/tcp6")))
    by_link = {f"socket:[{inode}]": inode for inode in sockets}
    for pid in map(int, filter(str.isdigit, os.listdir(proc))):
        for inode in {by_link[link] for link in _links(f"{proc}/{pid}/fd") if link in by_link}:
            old = sockets[inode]
            # The parent, which comes first, counts: its children have the socket too.
            if not old.pid or pid < old.pid:
                unit = unit_of(read_text(f"{proc}/{pid}/cgroup"))
                program = read_text(f"{proc}/{pid}/comm").strip()
                sockets[inode] = Socket(old.address, old.port, old.uid, unit, program, pid)
    return sorted(sockets.values(), key=lambda item: (item.port, item.address))


def passing_ports(proc: str = "/proc") -> range:
    """Ports that the kernel gives to whoever asks for any."""
    first, last = map(int, read_text(f"{proc}/sys/net/ipv4/ip_local_port_range").split() or (32768, 60999))
    return range(first, last + 1)


def compare_sockets(
    sockets: Iterable[Socket],
    doors: Iterable[Door],
    units: Collection[str],
    users: Mapping[int, str],
    engine_uid: int | None,
    passing: range,
    report: Report,
) -> list[Socket]:
    """Sockets of ``units``, and of ``users`` (uid to name), against the declared doors; returns these sockets.

    ``doors`` are those of units that run. Engines listen on ports that the kernel picked, for their
    own parts (torch, gloo, NCCL); these are taken for granted. In some containers root cannot tell
    the process of a socket; then its user decides.
    """
    declared = {(door.uid, door.port): door for door in doors}
    ours = [item for item in sockets if item.unit in units or (item.uid in users and not _of_others(item, engine_uid))]
    for item in ours:
        door = declared.get((item.uid, item.port))
        if door is not None and item.unit not in ("", door.unit):
            door = None
        owner = item.unit or f"user {users[item.uid]}"
        if door is None:
            if not (item.uid == engine_uid and item.port in passing and (item.unit in units or not item.pid)):
                report.add(
                    "undeclared_socket",
                    f"{owner} {item.port}",
                    f"{_process(item)} listens on {item}",
                    f"no socket of {owner} on that port",
                    f"find out what it is (ss -ltnp sport = {item.port}), and stop it"
                    + (f" or restart {item.unit}" if item.unit else ""),
                )
        elif not _fits(item.address, door.address):
            report.add(
                "socket_address",
                f"{door.unit} {item.port}",
                f"it listens on {item}",
                f"{door.address}:{door.port}",
                f"run site.yml, which writes its address, and restart {door.unit}",
            )
    there = {(item.uid, item.port) for item in ours}
    for key, door in declared.items():
        if key not in there:
            report.add(
                "socket_missing",
                f"{door.unit} {door.port}",
                f"nothing of {door.unit} listens on port {door.port}",
                f"{door.address or 'any address'}:{door.port}",
                f"read journalctl -u {door.unit}, and run site.yml",
            )
    return ours


def _of_others(item: Socket, engine_uid: int | None) -> bool:
    """A service that is not ours may run as HAProxy's user too, but none as the engines'."""
    return bool(item.unit) and item.uid != engine_uid


def _process(item: Socket) -> str:
    return f"{item.program} (process {item.pid})" if item.pid else "a process"


def _fits(found: str, wanted: str) -> bool:
    if wanted in ("", found) or (wanted in WILDCARDS and found in WILDCARDS):
        return True
    if wanted == "localhost":
        return ipaddress.ip_address(found).is_loopback
    try:
        return ipaddress.ip_address(wanted) == ipaddress.ip_address(found)
    except ValueError:
        return found not in WILDCARDS  # a name: which address it stands for is the host's own matter


# The clock


def synchronised() -> bool | None:
    """Whether something keeps the kernel's clock in step, as timedatectl decides it; None where it is not told.

    timedatectl itself would have systemd start a service for the question.
    """
    timex = ctypes.create_string_buffer(256)  # struct timex has 208 bytes; no modes are set, so it only reads
    if ctypes.CDLL(None, use_errno=True).adjtimex(timex) < 0:
        return None
    longs = ctypes.cast(timex, ctypes.POINTER(ctypes.c_long))
    return bool(longs[_MAXIMUM_ERROR] < _NEVER_SET)


def process_age(proc: str = "/proc") -> float:
    """Seconds since this process started."""
    started = int(read_text(f"{proc}/self/stat").rpartition(")")[2].split()[19])
    return max(float(read_text(f"{proc}/uptime").split()[0]) - started / os.sysconf("SC_CLK_TCK"), 0.0)


def compare_clock(in_step: bool | None, container: str, offset: float | None, tolerance: float, report: Report) -> None:
    """``container`` is its kind, or empty; ``offset`` (s) is what the host is ahead of the controller."""
    if not in_step and container:
        report.add("clock_not_managed", "clock", f"a container of kind {container}", "set by its host")
    elif in_step is None:
        report.blind("the kernel does not tell whether something sets the clock: run timedatectl on the host")
    elif not in_step:
        report.add("clock_not_synchronised", "clock", "nothing has set the clock for hours", "synchronised")
    if offset is not None and abs(offset) > tolerance:
        way = "ahead of" if offset > 0 else "behind"
        report.add("clock_offset", "clock", f"{abs(offset):.1f} s {way} the controller", f"{tolerance:g} s or less")

# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""HAProxy's running state against its file, and what the health agent says of the engines.

HAProxy is asked at its admin socket (management guide, section 9.3): ``show servers state`` for what
was changed there, ``show stat`` for limits, ``show map`` for keys.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from . import _openai
from ._drift_kinds import Report
from ._http import Endpoint

UNIT = "vllm-gateway.service"
HEALTH = "vllm-health.service"
#: Bits of srv_admin_state that come from the socket or the agent, and not from the file.
_MAINTENANCE, _DRAIN = 0x01, 0x08
#: Bits of srv_check_state and srv_agent_state.
_CONFIGURED, _ENABLED = 0x02, 0x04
_RUNNING = 2  # srv_op_state


@dataclass(frozen=True)
class Server:
    """One server of a backend. ``maxconn`` is 0 for no limit, -1 where it was not told."""

    name: str
    address: str
    weight: int = 1
    maxconn: int = 0


@dataclass(frozen=True)
class Live:
    """A server as HAProxy runs it; ``problem`` tells in a word why it is not used, where it is not."""

    server: Server
    initial_weight: int = 1
    maintenance: bool = False
    drained: bool = False
    running: bool = True
    checks_off: bool = False


class GatewayError(Exception):
    """HAProxy could not be asked; one sentence."""


def ask(path: str, command: str, seconds: float) -> str:
    """HAProxy's answer to one command. Raises GatewayError, also after ``seconds`` in all."""
    end = time.monotonic() + seconds
    answer = b""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(seconds)
            connection.connect(path)
            connection.sendall(command.encode() + b"\n")
            while True:
                connection.settimeout(max(end - time.monotonic(), 0.001))
                part = connection.recv(65536)
                if not part:
                    break
                answer += part
    except OSError as error:
        raise GatewayError(f"HAProxy does not answer at {path} within {seconds:g} s: {error}") from None
    return answer.decode("utf-8", "replace")


def parse_servers(text: str, backend: str = "engines") -> dict[str, Live]:
    """The answer to ``show servers state``. Raises GatewayError."""
    names: list[str] = []
    found = {}
    for line in text.splitlines():
        if line.startswith("# be_id"):
            names = line[2:].split()
        elif names and line.strip():
            row = dict(zip(names, line.split()))
            if row.get("be_name") != backend:
                continue
            try:
                found[row["srv_name"]] = _live(row)
            except (KeyError, ValueError) as error:
                raise GatewayError(
                    f"HAProxy's server state has a line that is not known here ({error}): {line}"
                ) from None
    if not names:
        raise GatewayError(f"wanted HAProxy's server state, found {text[:60]!r}")
    return found


def _live(row: Mapping[str, str]) -> Live:
    admin = int(row["srv_admin_state"])
    states = [int(row[name]) for name in ("srv_check_state", "srv_agent_state")]
    return Live(
        Server(row["srv_name"], f"{row['srv_addr']}:{row['srv_port']}", int(row["srv_uweight"]), -1),
        int(row["srv_iweight"]),
        bool(admin & _MAINTENANCE),
        bool(admin & _DRAIN),
        int(row["srv_op_state"]) == _RUNNING,
        any(state & _CONFIGURED and not state & _ENABLED for state in states),
    )


def parse_limits(text: str, backend: str = "engines") -> dict[str, int]:
    """The maxconn of each server from ``show stat``; 0 for no limit."""
    rows = csv.DictReader(text.lstrip("# ").splitlines())
    return {
        row["svname"]: int(row.get("slim") or 0)
        for row in rows
        if row.get("pxname") == backend and row.get("svname") not in ("FRONTEND", "BACKEND", None)
    }


def parse_keys(text: str) -> set[str]:
    """The hashes in the answer to ``show map FILE``, or in such a file itself."""
    lines = [re.sub(r"^0x[0-9a-f]+ ", "", line.strip()) for line in text.splitlines()]
    return {line.split()[0] for line in lines if line and not line.startswith("#")}


def configured(text: str) -> dict[str, Server]:
    """The servers of a haproxy.cfg."""
    found = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 3 and words[0] == "server":
            options = dict(zip(words[3:], words[4:]))
            found[words[1]] = Server(words[1], words[2], int(options.get("weight", 1)), int(options.get("maxconn", 0)))
    return found


def compare_servers(
    live: Mapping[str, Live],
    limits: Mapping[str, int],
    config: Mapping[str, Server],
    declared: Iterable[str],
    report: Report,
    excused: Iterable[str] = (),
) -> None:
    """Servers that run against the file, and both against the declared names.

    ``excused`` have a finding of their own that tells why they are not used.
    """
    declared, excused = set(declared), set(excused)
    for name in sorted(declared - set(live)):
        report.add("gateway_server_missing", name, "HAProxy does not know it", "a server of the backend engines")
    for name in sorted(set(live) - declared):
        report.add(
            "gateway_server_undeclared", name, f"it sends to {live[name].server.address}", "declared engines only"
        )
    for name in sorted(declared & set(live)):
        _compare_server(name, live[name], limits.get(name), config.get(name), name in excused, report)


def _compare_server(
    name: str, now: Live, limit: int | None, wanted: Server | None, excused: bool, report: Report
) -> None:
    if now.maintenance:
        report.add("gateway_server_state", name, "it is in maintenance, which only its socket does", "in use")
    elif now.drained and not excused:
        report.add("gateway_server_state", name, "it is drained at the socket", "in use")
    elif not now.running and not excused:
        report.add("gateway_server_down", name, "HAProxy takes it for down", "in use")

    def changed(what: str, has: object, wants: object) -> None:
        report.add("gateway_server_changed", f"{name} {what}", f"{what} is {has}", f"{what} {wants}, as in its file")

    if now.server.weight != now.initial_weight:
        changed("weight", now.server.weight, now.initial_weight)
    elif wanted is not None and now.initial_weight != wanted.weight:
        changed("weight", now.initial_weight, wanted.weight)
    if (
        wanted is not None
        and re.match(r"[\d.]+:|\[?[0-9a-f:]+\]?:", wanted.address)
        and (now.server.address != wanted.address.replace("[", "").replace("]", ""))
    ):
        changed("address", now.server.address, wanted.address)
    if wanted is not None and limit is not None and limit != wanted.maxconn:
        changed("maxconn", limit, wanted.maxconn)
    # Maintenance pauses them.
    if now.checks_off and not now.maintenance:
        changed("check", "off", "on")


def compare_keys(running: set[str], on_disk: set[str], report: Report) -> None:
    """Hashes of clients' keys that HAProxy uses against those in its file. Hashes are not shown."""
    added, gone = len(running - on_disk), len(on_disk - running)
    if added or gone:
        parts = [f"{added} that the file does not name"] if added else []
        parts += [f"{gone} of the file missing"] if gone else []
        report.add(
            "gateway_keys", "keys", f"{len(running)} keys, {' and '.join(parts)}", "those of /etc/vllm/gateway/keys"
        )


def digest(path: str) -> str:
    """SHA-256 of a file; a file that is not there counts as such."""
    try:
        with open(path, "rb") as stream:
            return hashlib.sha256(stream.read()).hexdigest()
    except FileNotFoundError:
        return "absent"


def compare_inputs(noted: Mapping[str, Any], config: str, program: str, unit: str, report: Report) -> None:
    """What the gateway was started or reloaded from (``running.json``) against the files on disk.

    The arguments are the directory of its files, the program, and the unit file. Raises OSError.
    """
    was = dict(noted.get("files", {}))
    status = os.stat(program)
    if not was:
        report.blind("/run/vllm-gateway/running.json does not tell what the gateway runs from: restart vllm-gateway")
        return
    if was.pop("haproxy", None) != [status.st_size, int(status.st_mtime)]:
        report.add(
            "program_replaced",
            UNIT,
            f"{program} changed since it was started",
            "the program on disk",
            f"run systemctl reload {UNIT}, or site.yml",
        )
    changed = [name for name, sha256 in was.items() if digest(f"{config}/{name}") != sha256]
    if noted.get("unit") != digest(unit):
        changed.append(UNIT)
    if changed:
        report.add("stale_process", UNIT, f"changed since it was started: {', '.join(changed)}", "the files on disk")


# The health agent


def status(endpoint: Endpoint, seconds: float) -> str:
    """The health agent's /status. Raises EndpointError."""
    return _openai.get(endpoint, "/status", seconds).decode("utf-8", "replace")


def compare_status(text: str, declared: Iterable[str], report: Report) -> set[str]:
    """What the agent's /status says of the engines. Returns the names it has out of use, or drains."""
    try:
        instances = dict(json.loads(text)["instances"])
    except (ValueError, KeyError, TypeError):
        report.blind(f"{HEALTH}: its /status is not known here: {text[:60]!r}")
        return set()
    out = set()
    for name in sorted(set(declared) - set(instances)):
        report.add("stale_process", f"{HEALTH} {name}", f"the agent does not look at {name}", "all declared engines")
    for name in sorted(set(declared) & set(instances)):
        state = instances[name].get("state")
        if state != "up" or instances[name].get("drain") is not None:
            out.add(name)
        if state != "up":
            reason = instances[name].get("reason") or "no reason given"
            report.add("engine_ejected", name, f"{state}: {reason}", "up")
    return out


def compare_drains(drains: Mapping[str, tuple[str, float]], declared: Iterable[str], report: Report) -> None:
    """Drain files (name to text and age in seconds), whoever left them."""
    for name, (text, age) in sorted(drains.items()):
        known = "" if name in set(declared) else ", though no such engine is declared"
        why = " ".join(text.split())[:120] or "no reason given"
        remedy = f"remove /run/nvl-vllm/drain/{name} when the work is done"
        report.add("engine_drained", name, f"drained for {_age(age)} ({why}){known}", "no drain file", remedy)


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"

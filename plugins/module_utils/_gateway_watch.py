# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""What the gateway does during a failover drill: its statistics, and how it refuses requests.

Statistics are HAProxy's CSV page (management guide, section 9.1). All times are seconds; points in
time are on the monotonic clock, as those of the load.
"""

from __future__ import annotations

import contextlib
import csv
import http.client
import json
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from . import _openai
from ._http import Endpoint, EndpointError

INTERVAL = 0.1  # between two looks at the statistics
READ_SECONDS = 2.0
REFUSAL_INTERVAL = 1.0
REFUSAL_SECONDS = 20.0  # a refusal that takes longer is none
FRONTENDS = ("FRONTEND", "BACKEND")  # rows that are no servers
# A server that is "UP 1/3" on its way down still gets requests; NOLB, DRAIN, MAINT and DOWN get none.
IN_USE = ("UP", "no check")


@dataclass(frozen=True)
class Server:
    """One server of the gateway: whether it gets new requests, how often it was retried away from, what it has now."""

    in_use: bool
    retries: int
    requests: int = 0


def parse_statistics(text: str) -> dict[str, Server]:
    """Servers by name. One that is in several backends is in use if it is in any. Raises ValueError."""
    rows = csv.DictReader(text.lstrip("# ").splitlines())
    if not {"pxname", "svname", "status", "wretr"} <= set(rows.fieldnames or ()):
        raise ValueError(f"wanted HAProxy's statistics as CSV, found {text[:60]!r}; set stats_url to the page's ;csv")
    servers: dict[str, Server] = {}
    for row in rows:
        name = row["svname"]
        if name not in FRONTENDS:
            old = servers.get(name, Server(False, 0))
            in_use = old.in_use or (row["status"] or "").startswith(IN_USE)
            retries, requests = int(row["wretr"] or 0), int(row.get("scur") or 0)
            servers[name] = Server(in_use, old.retries + retries, old.requests + requests)
    return servers


class StatisticsWatch:
    """Reads the statistics again and again in the background, from start() to stop(). Thread-safe."""

    def __init__(self, statistics: Endpoint, names: Sequence[str], interval: float = INTERVAL) -> None:
        self._statistics = statistics
        self._names = tuple(names)
        self._interval = interval
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._in_use: dict[str, bool] = {}
        self._changes: list[tuple[float, str, bool]] = []
        self._retries: dict[str, int] = {}
        self._retried = 0
        self._problem = "not read yet"
        self._thread = threading.Thread(target=self._watch, name="statistics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def missing(self) -> str:
        """Why not every server is known to be in use by the gateway now; empty when all are."""
        with self._lock:
            idle = [name for name in self._names if not self._in_use.get(name)]
            if self._problem or not idle:
                return self._problem
            return f"the gateway does not use {', '.join(idle)}"

    def ejected_at(self, names: Sequence[str], since: float) -> float | None:
        """When the last of the servers was out of use for the first time; None where one never was."""
        with self._lock:
            first: dict[str, float] = {}
            for at, name, in_use in self._changes:
                if not in_use and at >= since:
                    first.setdefault(name, at)
        return max(first[name] for name in names) if all(name in first for name in names) else None

    def retried(self) -> int:
        """Times that the gateway sent a request once more since start(), as far as it was seen."""
        with self._lock:
            return self._retried

    def _watch(self) -> None:
        while not self._stopping.is_set():
            try:
                text = _openai.get(self._statistics, "", READ_SECONDS).decode("utf-8", "replace")
                self._note(parse_statistics(text))
            except (EndpointError, ValueError) as error:  # a gateway that was killed answers nothing
                with self._lock:
                    self._problem = str(error)
            self._stopping.wait(self._interval)

    def _note(self, servers: Mapping[str, Server]) -> None:
        now = time.monotonic()
        with self._lock:
            absent = [name for name in self._names if name not in servers]
            self._problem = ""
            if absent:
                found = ", ".join(sorted(servers)) or "none"
                self._problem = f"wanted {', '.join(absent)} among the servers of {self._statistics.url}, found {found}"
            for name in self._names:
                server = servers.get(name, Server(False, 0))
                if server.in_use != self._in_use.get(name):
                    self._changes.append((now, name, server.in_use))
                    self._in_use[name] = server.in_use
                before = self._retries.get(name, server.retries)
                # A gateway that was replaced counts from zero again.
                self._retried += server.retries - before if server.retries >= before else server.retries
                self._retries[name] = server.retries


@dataclass(frozen=True)
class Refusal:
    """How the gateway answered one request. ``status`` is 0 where it did not."""

    seconds: float
    status: int
    retry_after: str = ""

    def __str__(self) -> str:
        if not self.status:
            return "no answer"
        return "HTTP 503 without Retry-After" if self.status == 503 else f"HTTP {self.status}"

    @property
    def proper(self) -> bool:
        """A refusal that tells the client what is up and when to come back."""
        return self.status == 503 and bool(self.retry_after)


class RefusalWatch:
    """Asks the gateway for one token each second, apart from the load, and keeps how it answered."""

    def __init__(self, gateway: Endpoint, model: str, interval: float = REFUSAL_INTERVAL) -> None:
        self._gateway = gateway
        self._model = model
        self._interval = interval
        self.found: list[Refusal] = []  # in order of time; complete after stop()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="refusals", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Wait for the request under way, and ask no more."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._stopping.is_set():
            self.found.append(ask(self._gateway, self._model))
            self._stopping.wait(self._interval)


def ask(gateway: Endpoint, model: str, seconds: float = REFUSAL_SECONDS) -> Refusal:
    """One request of one token; its answer's head is all that counts."""
    parts = urlsplit(gateway.url)
    host = str(parts.hostname)
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        context = ssl.create_default_context()
        connection = http.client.HTTPSConnection(host, parts.port, timeout=seconds, context=context)
    else:
        connection = http.client.HTTPConnection(host, parts.port, timeout=seconds)
    headers = {"Content-Type": "application/json"}
    if gateway.api_key:
        headers["Authorization"] = f"Bearer {gateway.api_key}"
    question = {"role": "user", "content": "Say yes."}
    body = json.dumps({"model": model, "messages": [question], "max_tokens": 1, "stream": False})
    started = time.monotonic()
    status, retry_after = 0, ""
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("POST", f"{parts.path}/v1/chat/completions", body, headers)
        response = connection.getresponse()
        status, retry_after = response.status, response.headers.get("Retry-After", "")
    return Refusal(round(time.monotonic() - started, 3), status, retry_after)


def summarise_refusals(found: Sequence[Refusal]) -> dict[str, Any]:
    """From the first 503 to the last: how many, the slowest (seconds), and what else came between.

    What came before is the fault itself, which cuts requests under way.
    """
    refused = [number for number, one in enumerate(found) if one.status == 503]
    between = found[refused[0] : refused[-1] + 1] if refused else []
    wrong = [one for one in between if not one.proper and one.status != 200]
    return {
        "count": sum(one.proper for one in between),
        "slowest": max((one.seconds for one in between if one.status != 200), default=None),
        "improper": sorted({str(one) for one in wrong}),
        "retry_after": next((one.retry_after for one in between if one.proper), None),
    }

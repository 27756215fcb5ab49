# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""The health agent: looks at this host's engines and tells the gateway which of them to use.

One process a host, ``vllm-health.service``. For each engine it looks at ``/metrics`` and sends canaries; _agent.py
decides. It listens on loopback:

- agent port: HAProxy's agent-check sends ``NAME`` and a newline and gets one line from memory. No engine is asked, so
  the answer never waits. Of an engine that it does not know, or not yet, it says nothing: HAProxy keeps what it knew.
- status port: ``/metrics`` in Prometheus' text format, ``/status`` as JSON.

Once the gateway has heard that an engine hangs, a file of the engine's name says so to its middleware (first_token.py),
which hands back what waits there: the gateway itself cannot take it back in every version of HAProxy.

It runs as root: the key is in a file that only root reads, and only root may have systemd kill a unit. Its own failure
takes no engine down: HAProxy then keeps the last word, and its own checks.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from . import _openai
from ._agent import (
    HUNG,
    SERIES,
    STATES,
    UP,
    Canary,
    Decision,
    Ledger,
    Look,
    Thresholds,
    Watch,
    look_of,
)
from ._health import CANARY, RUNNING
from ._host import Runner, read_text
from ._http import DeadlineExceeded, Endpoint, EndpointError, HttpStatus
from ._json_file import read_object, write_object
from ._units import parse_show

HOST = "127.0.0.1"
SYSTEMCTL_SECONDS = 5.0  # also in the runner that the script brings
CLIENT_SECONDS = 2.0  # that a client may take to ask
REQUEST_LIMIT = 8192  # bytes of a client's question
NAMES_LIMIT = 100  # unknown names that are remembered, so that each is logged once
NOTIFY_INTERVAL = 5.0
STUCK_SECONDS = 30.0  # beyond a look's own time, after which an engine not looked at means that the agent is stuck
STALE = 3  # exit status of ``stale``
REFUSALS = ("storm", "query_of_death", "record")  # why a restart may be refused

ESTABLISHED = "01"  # in /proc/net/tcp

T = TypeVar("T")


@dataclass(frozen=True)
class Paths:
    """Where things are; tests put them elsewhere."""

    settings: str = "/etc/vllm/health.json"
    config: str = "/etc/vllm"
    drain: str = "/run/nvl-vllm/drain"
    hung: str = "/run/vllm-health/hung"
    state: str = "/var/lib/nvl-vllm/health.json"
    started: str = "/run/vllm-health/started"
    script: str = "/usr/local/libexec/vllm-health"
    unit: str = "/etc/systemd/system/vllm-health.service"


class BadSettings(Exception):
    """Why the settings cannot be used, in a sentence."""


@dataclass(frozen=True)
class Instance:
    """An engine to look after."""

    name: str
    url: str
    unit: str


@dataclass(frozen=True)
class Settings:
    """What ``health.json`` says."""

    instances: tuple[Instance, ...]
    agent_port: int
    status_port: int
    thresholds: Thresholds


def settings_of(path: str) -> Settings:
    """Read the settings. Raises BadSettings."""
    try:
        with open(path, encoding="utf-8") as stream:
            found = json.load(stream)
        instances = tuple(Instance(**item) for item in found["instances"])
        for item in instances:
            Endpoint(item.name, item.url)
        settings = Settings(instances, found["agent_port"], found["status_port"], Thresholds(**found["thresholds"]))
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise BadSettings(f"{path} cannot be used: {problem}") from problem
    names = [item.name for item in instances]
    if not names or len(set(names)) != len(names):
        raise BadSettings(f"{path} has the instances {names}: wanted one or more, each with a name of its own")
    return settings


def key_of(name: str, config: str) -> str | None:
    """The API key in ``NAME.env``, which the role vllm_instances writes; None where it has none. Raises OSError."""
    with open(f"{config}/{name}.env", encoding="utf-8") as stream:
        for line in stream:
            variable, _, value = line.strip().partition("=")
            if variable == "VLLM_API_KEY":
                with contextlib.suppress(ValueError):  # written by hand, without quotes
                    value = str(json.loads(value))
                return value or None
    return None


def drain_of(name: str, folder: str) -> str | None:
    """Why an operator or the unit's helper drains this engine; None where nobody does.

    The file alone drains: one that cannot be read drains too.
    """
    try:
        with open(f"{folder}/{name}", encoding="utf-8", errors="replace") as stream:
            return " ".join(stream.read(200).split()) or "no reason given"
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as problem:
        return f"a reason that cannot be read: {problem.strerror}"


def clients_of(port: int, net: str = "/proc/self/net") -> frozenset[str]:
    """The addresses that have an open connection to this port of the host, as the kernel writes them."""
    rows = (line.split() for table in ("tcp", "tcp6") for line in read_text(f"{net}/{table}").splitlines()[1:])
    local = f":{port:04X}"
    return frozenset(row[2] for row in rows if len(row) > 3 and row[3] == ESTABLISHED and row[1].endswith(local))


def look_at(endpoint: Endpoint, seconds: float) -> Look:
    """One look at an engine's ``/metrics``."""
    try:
        return look_of(_openai.metrics(endpoint, SERIES, seconds))
    except HttpStatus as problem:
        return Look("blind", reason=str(problem))
    except EndpointError as problem:
        refused = isinstance(problem.__cause__, ConnectionRefusedError)
        return Look("refused" if refused else "silent", reason=str(problem))


def send_canary(endpoint: Endpoint, seconds: float, clock: Callable[[], float] = time.monotonic) -> Canary:
    """A completion of one token, of the first model that the server lists."""
    began = clock()
    kind, reason, late = "ok", "", False
    try:
        listed = _openai.models(endpoint, seconds)
        left = max(began + seconds - clock(), 0.001)
        _openai.chat(endpoint, listed[0] if listed else "", CANARY, 1, True, left)
    except EndpointError as problem:
        # 429 is an overloaded server. The rest of 4xx is an answer of the API server alone: another key, another name.
        turned_away = problem.status is not None and 400 <= problem.status < 500 and problem.status != 429
        kind, reason, late = "refused" if turned_away else "failed", str(problem), isinstance(problem, DeadlineExceeded)
    return Canary(kind, reason, round(clock() - began, 3), late)


def notify(message: str, environment: Mapping[str, str]) -> None:
    """Tell systemd (sd_notify); nothing where it did not ask."""
    path = environment.get("NOTIFY_SOCKET", "")
    if path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.sendto(message.encode(), "\0" + path[1:] if path.startswith("@") else path)


def log(record: Mapping[str, object]) -> None:
    """One line of JSON to standard output, which is the journal."""
    print(json.dumps(record), flush=True)


@dataclass(frozen=True)
class Series:
    """One series of ``/metrics``: ``values`` gives the values of ``label`` with their numbers."""

    name: str
    kind: str
    text: str
    values: Callable[[Watch, float], Mapping[str, float]]
    label: str = ""


METRICS = (
    Series(
        "state",
        "gauge",
        "1 for the state that the engine is in.",
        lambda watch, now: {state: int(watch.state == state) for state in STATES},
        "state",
    ),
    Series(
        "drained",
        "gauge",
        "1 while a drain file is there.",
        lambda watch, now: {"": int(watch.drain is not None)},
    ),
    Series(
        "sees_progress",
        "gauge",
        "0 where the engine's metrics lack what tells a hang from load.",
        lambda watch, now: {"": int(watch.sees_progress)},
    ),
    Series(
        "last_progress_seconds",
        "gauge",
        "Time since a series last moved or a canary was answered.",
        lambda watch, now: {"": round(now - watch.last_progress, 3)},
    ),
    Series(
        "canary_seconds",
        "gauge",
        "How long the last canary took.",
        lambda watch, now: {"": watch.canary.seconds} if watch.canary else {},
    ),
    Series("canaries_total", "counter", "Canaries sent.", lambda watch, now: watch.canaries, "result"),
    Series(
        "ejections_total",
        "counter",
        "Times that an engine in use was taken out.",
        lambda watch, now: {state: watch.ejections.get(state, 0) for state in STATES if state != UP},
        "state",
    ),
    Series(
        "restarts_total",
        "counter",
        "Hung engines killed for systemd to start them again.",
        lambda watch, now: {"": watch.restarts},
    ),
    Series(
        "refused_restarts_total",
        "counter",
        "Restarts that were due and not allowed.",
        lambda watch, now: {reason: watch.refused_restarts.get(reason, 0) for reason in REFUSALS},
        "reason",
    ),
)


class Daemon:
    """Looks, canaries, restarts and the two listeners, all in one event loop; what blocks has threads of its own."""

    def __init__(
        self,
        settings: Settings,
        run: Runner,
        paths: Paths = Paths(),
        environment: Mapping[str, str] = os.environ,
        say: Callable[[Mapping[str, object]], object] = log,
    ) -> None:
        self.settings = settings
        self.thresholds = settings.thresholds
        self.run = run
        self.paths = paths
        self.environment = environment
        self.say = say
        self.stopping = asyncio.Event()
        self.ports: dict[str, int] = {}
        now = time.monotonic()
        self.watches = {item.name: Watch(item.name, self.thresholds, now) for item in settings.instances}
        self._ledger = Ledger.read(self.thresholds, read_object(paths.state))
        self._wake = {item.name: asyncio.Event() for item in settings.instances}
        self._looked = {item.name: now for item in settings.instances}
        self._unknown: set[str] = set()
        # For each engine a look or systemctl, and a canary, can be under way.
        self._pool = ThreadPoolExecutor(max_workers=2 * len(settings.instances))

    async def serve(self) -> None:
        """Listen and look until ``stopping`` is set. Raises OSError where a port is taken."""
        os.makedirs(self.paths.hung, exist_ok=True)
        agent = await self._listen("agent", self._agent_client, self.settings.agent_port)
        status = await self._listen("status", self._status_client, self.settings.status_port)
        tasks = [asyncio.ensure_future(self.stopping.wait()), asyncio.ensure_future(self._notify())]
        for item in self.settings.instances:
            tasks.append(asyncio.ensure_future(self._look_on(item)))
            tasks.append(asyncio.ensure_future(self._send_canaries(item)))
        try:
            # None of them ends by itself: what ends was told to, or is broken and takes the process along.
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for server in (agent, status):
                server.close()
            self._pool.shutdown(wait=False)

    async def _listen(self, name: str, client: Any, port: int) -> asyncio.AbstractServer:
        server = await asyncio.start_server(client, HOST, port, limit=REQUEST_LIMIT)
        self.ports[name] = server.sockets[0].getsockname()[1]
        return server

    async def _blocking(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    # Engines.

    async def _look_on(self, item: Instance) -> None:
        watch, wake = self.watches[item.name], self._wake[item.name]
        endpoint = Endpoint(item.name, item.url)  # /metrics asks for no key
        port = urlsplit(item.url).port or 80
        while True:
            wake.clear()  # before the look: a canary that ends during it is judged by another one
            began = time.monotonic()
            look = await self._blocking(look_at, endpoint, watch.look_seconds())
            unit = await self._blocking(self._unit_state, item.unit) if watch.wants_unit(look.kind) else ""
            # Nothing waits between this and the verdict, so the watch knows whether a canary is among the clients.
            clients = clients_of(port) if look.kind == "answered" and not look.counters[RUNNING] else frozenset()
            look = look._replace(unit=unit, drain=drain_of(item.name, self.paths.drain), clients=clients)
            self._tell(watch.observe(look, began, time.monotonic()))
            if watch.state != HUNG:
                Path(self.paths.hung, item.name).unlink(missing_ok=True)
            if watch.wants_restart(time.monotonic()):
                await self._restart(item, watch)
            self._looked[item.name] = time.monotonic()
            # Not wait_for: before Python 3.12 it can lose a cancellation, and the agent would not end.
            pause = max(began + self.thresholds.poll_interval - time.monotonic(), 0.0)
            timer = asyncio.get_running_loop().call_later(pause, wake.set)
            await wake.wait()
            timer.cancel()

    async def _send_canaries(self, item: Instance) -> None:
        watch = self.watches[item.name]
        while True:
            if watch.wants_canary(time.monotonic()):
                watch.canary_begins(time.monotonic())
                canary = await self._blocking(self._canary, item)
                self._tell(watch.canary_ends(canary, time.monotonic()))
                self._wake[item.name].set()  # a failure waits for a look
                # A canary that fails at once is not sent again at once.
                await asyncio.sleep(max(self.thresholds.poll_interval - canary.seconds, 0.0))
            await asyncio.sleep(self.thresholds.poll_interval / 4)

    def _canary(self, item: Instance) -> Canary:
        try:
            # Read each time, so that a new key needs no restart of the agent.
            endpoint = Endpoint(item.name, item.url, key_of(item.name, self.paths.config))
        except (OSError, ValueError) as problem:
            return Canary("refused", f"its key cannot be used: {problem}")
        return send_canary(endpoint, self.thresholds.canary_timeout)

    def _unit_state(self, unit: str) -> str:
        """systemd's ActiveState; empty where systemd does not say."""
        rc, out, _ = self.run(["systemctl", "show", "--property=ActiveState", "--", unit])
        return parse_show(out).get("ActiveState", "") if rc == 0 else ""

    async def _restart(self, item: Instance, watch: Watch) -> None:
        refusal = self._ledger.refusal(item.name, time.time())
        if refusal is not None:
            self._tell(watch.restart_refused(*refusal))
            return
        ledger = Ledger(self.thresholds, self._ledger.restarts)
        ledger.note(item.name, time.time())
        try:
            # Before the kill: what is not on disk does not count after a restart of the agent.
            write_object(self.paths.state, ledger.as_dict())
        except OSError as problem:
            self._tell(watch.restart_refused("record", f"{self.paths.state} cannot be written: {problem}"))
            return
        self._ledger = ledger
        self._tell([watch.restarted(time.monotonic())])
        # A hung engine ignores SIGTERM. The unit has Restart=always.
        argv = ["systemctl", "kill", "--signal=SIGKILL", "--", item.unit]
        rc, out, err = await self._blocking(self.run, argv)
        if rc != 0:
            self._tell([watch.restart_failed(f"{' '.join(argv)} ended with status {rc}: {(err or out).strip()}")])

    # The listeners.

    async def _agent_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._answer(reader.readline, self._agent_answer, reader, writer)

    async def _status_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def head() -> bytes:
            return await reader.readuntil(b"\r\n\r\n")

        await self._answer(head, self._status_answer, reader, writer)

    async def _answer(
        self, read: Any, answer: Callable[[str], bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            question = await asyncio.wait_for(read(), CLIENT_SECONDS)
            writer.write(answer(question.decode("ascii", "replace")))
            await asyncio.wait_for(writer.drain(), CLIENT_SECONDS)
        except (OSError, ValueError, EOFError, asyncio.LimitOverrunError, asyncio.TimeoutError):
            pass  # the client left, asked nothing or too much: it has no answer
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _agent_answer(self, question: str) -> bytes:
        name = question.strip()
        watch = self.watches.get(name)
        if watch is None:
            if name not in self._unknown and len(self._unknown) < NAMES_LIMIT:
                self._unknown.add(name)
                known = ", ".join(self.watches)
                reason = f"the gateway asks for an engine that {self.paths.settings} does not have: it has {known}"
                self._tell([Decision("note", name[:NAMES_LIMIT], "", reason)])
            return b""
        if watch.state == HUNG:
            Path(self.paths.hung, name).touch()
        word = watch.word()
        return f"{word}\n".encode("ascii") if word else b""

    def _status_answer(self, question: str) -> bytes:
        method, _, rest = question.partition(" ")
        path = rest.partition(" ")[0]
        if method != "GET" or path not in ("/metrics", "/status"):
            return _http("404 Not Found", "text/plain", "GET /metrics or /status\n")
        if path == "/metrics":
            return _http("200 OK", "text/plain; version=0.0.4; charset=utf-8", self.metrics())
        return _http("200 OK", "application/json", json.dumps(self.status(), indent=2) + "\n")

    def status(self) -> dict[str, Any]:
        """Everything that is known, for a person."""
        now = time.monotonic()
        return {
            "all_ejected": self._all_ejected(),
            "instances": {
                name: {**watch.status(now), "restarts_at": self._ledger.restarts.get(name, [])}
                for name, watch in self.watches.items()
            },
        }

    def metrics(self) -> str:
        """A page of Prometheus' text format."""
        now = time.monotonic()
        lines = []
        for series in METRICS:
            full = f"vllm_health_{series.name}"
            lines += [f"# HELP {full} {series.text}", f"# TYPE {full} {series.kind}"]
            for name, watch in self.watches.items():
                for value, number in series.values(watch, now).items():
                    more = f',{series.label}="{value}"' if series.label else ""
                    lines.append(f'{full}{{instance="{name}"{more}}} {number}')
        lines += [
            "# HELP vllm_health_all_ejected 1 while no engine of this host is up.",
            "# TYPE vllm_health_all_ejected gauge",
            f"vllm_health_all_ejected {int(self._all_ejected())}",
        ]
        return "\n".join(lines) + "\n"

    def _all_ejected(self) -> bool:
        return all(watch.state != UP for watch in self.watches.values())

    # systemd and the journal.

    async def _notify(self) -> None:
        """Ready, then alive as long as every engine is looked at."""
        stuck = STUCK_SECONDS + self.thresholds.poll_interval + self.thresholds.silence_timeout
        with open(self.paths.started, "w", encoding="utf-8") as stream:
            stream.write(digest(self.paths))
        notify("READY=1", self.environment)
        while True:
            if time.monotonic() - min(self._looked.values()) < stuck:
                notify("WATCHDOG=1", self.environment)
            await asyncio.sleep(NOTIFY_INTERVAL)

    def _tell(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            self.say({"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **decision._asdict()})


def _http(status: str, kind: str, body: str) -> bytes:
    data = body.encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    return head.encode() + data


def digest(paths: Paths) -> str:
    """SHA-256 over all that the agent is started from: its modules, script, settings and unit, as they are on disk."""
    loaded = [module for name, module in sys.modules.items() if name.startswith(f"{__package__}._")]
    modules = sorted(str(module.__file__) for module in loaded)
    total = hashlib.sha256()
    for path in (*modules, paths.script, paths.settings, paths.unit):
        total.update(f"\0{path}\0".encode())
        try:
            with open(path, "rb") as stream:
                total.update(stream.read())
        except FileNotFoundError:
            total.update(b"absent")
    return total.hexdigest()


def stale(paths: Paths) -> bool:
    """Whether the agent has to be started again: it does not run, or from other files than those on disk."""
    try:
        with open(paths.started, encoding="utf-8") as stream:
            return stream.read() != digest(paths)
    except FileNotFoundError:
        return True


async def _run(settings: Settings, run: Runner, paths: Paths) -> None:
    daemon = Daemon(settings, run, paths)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, daemon.stopping.set)
    await daemon.serve()


def main(argv: list[str], run: Runner, paths: Paths = Paths()) -> int:
    """``run``, ``check FILE`` or ``stale``.

    Exit status 0; 1 with the reason on standard error; 2 for bad usage; 3 where the running agent is stale.
    """
    try:
        if argv == ["run"]:
            asyncio.run(_run(settings_of(paths.settings), run, paths))
        elif argv[:1] == ["check"] and len(argv) == 2:
            settings_of(argv[1])
        elif argv == ["stale"]:
            return STALE if stale(paths) else 0
        else:
            print("usage: vllm-health run | check FILE | stale", file=sys.stderr)
            return 2
    except (BadSettings, OSError) as problem:
        print(f"vllm-health: {problem}", file=sys.stderr)
        return 1
    return 0

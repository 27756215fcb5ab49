# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""From the engines' arguments to the numbers of the gateway in front of them. Pure: nothing here reads a host.

The gateway is HAProxy. It can send a request again only while it still has all of it, so its buffers must hold the
largest request that an engine takes, and that follows from ``max-model-len``. How many requests it lets through to
an engine follows from ``max-num-seqs``, how long it waits from both. Every number comes with a sentence that says
why; the sentences are written into the configuration, next to the settings.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ._memory_budget import MemoryPlanError, whole_number

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")

#: Bytes of text that a token stands for at most, in prompts that fill a context: 4 in English, 6 in code and prose
#: with long words, and in languages of three UTF-8 bytes a character at two characters a token.
BYTES_PER_TOKEN = 6
#: JSON writes a character of three bytes as \uXXXX (six) and a quote or a line end as two.
JSON_ESCAPES = 2
#: Smallest and largest buffer (bytes). The smallest leaves room for tool definitions beside a short prompt.
SMALLEST_BUFFER, LARGEST_BUFFER = 128 * 1024, 16 * 1024 * 1024
#: What of a buffer is not for the body (bytes): headers (HEADERS at most), HAProxy's own reserve and its book-keeping.
HEADERS, RESERVE = 16 * 1024, 32 * 1024
#: max-num-seqs where the arguments do not say it: vLLM's own default on H100 and on one CPU.
DEFAULT_SEQS = {"cuda": 1024, "cpu": 128}
#: Tokens a second of one request on a fully loaded engine, at least.
SLOWEST = {"cuda": 20, "cpu": 5}
#: Slowest upload that is waited for (bytes a second), and what comes on top (s).
SLOWEST_UPLOAD, UPLOAD_START = 128 * 1024, 10
#: Connections that ask for nothing at the moment, beside those with a request.
IDLE_CONNECTIONS = 100
CONNECT_TIMEOUT, CHECK_TIMEOUT, KEEP_ALIVE = 2, 5, 30
STATISTICS_PORT = 8404  # on the loopback address
#: Key name in the log where clients use vllm_api_key itself.
SHARED_KEY = "vllm_api_key"
AFFINITIES = ("none", "session")
TLS = ("off", "files", "self_signed")


@dataclass(frozen=True)
class Wanted:
    """The role's variables without their prefix ``vllm_gateway_``, as the inventory has them (keys not yet checked)."""

    inventory_hostname: str
    device: str
    host: str
    port: int
    affinity: str = "none"
    queue: int = 256
    queue_timeout: int = 300
    max_model_len: int = 0
    body_limit: int = 0
    server_timeout: int = 0
    retry_after: int = 5
    tls: str = "off"
    tls_certificate: str = ""
    tls_key: str = field(default="", repr=False)
    keys: Sequence[Mapping[str, Any]] = field(default=(), repr=False)
    api_key: str = field(default="", repr=False)


@dataclass(frozen=True)
class Server:
    """One engine as HAProxy sees it. ``maxconn`` requests at once; ``maxqueue`` wait for it alone (0: none do)."""

    name: str
    address: str
    maxconn: int
    maxqueue: int


@dataclass(frozen=True)
class Plan:
    """What the configuration is made from. Times in seconds, sizes in bytes.

    ``worst_memory`` is what the buffers take when every request has the largest body: one for the request and one for
    the copy that is kept to send it again. ``keys`` are lines of
    HAProxy's map from a key's SHA-256 to its name.
    """

    bind: str
    servers: list[Server]
    bufsize: int
    body_limit: int
    maxconn: int
    queue: int
    worst_memory: int
    open_files: int
    timeouts: dict[str, int]
    keys: list[str]
    key_names: list[str]
    reasons: dict[str, str]
    warnings: list[str]


def key_digest(key: str) -> str:
    """SHA-256 of a key (hexadecimal, lower case), as ``printf %s KEY | sha256sum`` prints it."""
    return hashlib.sha256(key.encode()).hexdigest()


def plan(wanted: Wanted, instances: Sequence[Mapping[str, Any]]) -> tuple[Plan | None, list[str]]:
    """The gateway's numbers, or every mistake found, one sentence each.

    Each sentence names the host, the variable, its value, what is wanted. ``instances`` are those of the
    declaration: ``name``, ``url`` and ``arguments`` are read.
    """
    planner = _Planner(wanted, instances)
    made = planner.plan()
    return (None if planner.errors else made), planner.errors


class _Planner:
    def __init__(self, wanted: Wanted, instances: Sequence[Mapping[str, Any]]) -> None:
        self.wanted = wanted
        self.instances = instances
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.reasons: dict[str, str] = {}

    def refuse(self, variable: str, value: Any, wanted: str) -> None:
        self.errors.append(f"{self.wanted.inventory_hostname}: {variable} is {value!r}: {wanted}")

    def plan(self) -> Plan:
        self.check_variables()
        keys = self.keys()
        self.check_door(keys)
        longest = max((self.length(item) for item in self.instances), default=0)
        limit, bufsize = self.buffers(longest)
        servers = [self.server(item) for item in self.instances]
        slots = sum(server.maxconn for server in servers)
        queue = self.wanted.queue
        requests = slots + queue
        maxconn = 2 * requests + IDLE_CONNECTIONS
        memory = 2 * bufsize * requests
        # A request has a connection on each side; checks, listeners, sockets and logs take a few more.
        open_files = _power_of_two(maxconn + slots + 1024)
        self.reasons["maxconn"] = (
            f"{slots} requests at the engines and {queue} in the queue, as many connections again that have no request "
            f"at the moment, and {IDLE_CONNECTIONS} for whoever is refused."
        )
        # Measured with HAProxy 2.6 and 3.0: 100 requests of 80 bytes at an engine took 2 MiB each, with such a buffer.
        self.reasons["memory"] = (
            "A request at an engine takes a buffer however short it is, as HAProxy copies all of it, to have it for "
            f"another engine: {_mib(bufsize)} x {slots} = {_mib(bufsize * slots)} while the engines are full. One in "
            "the queue takes what its body has. At worst, with the largest body in every request, it is "
            f"{_mib(bufsize)} x 2 x {requests} = {_mib(memory)}. Too much for this host? Lower max-num-seqs, "
            "vllm_gateway_queue or vllm_gateway_body_limit."
        )
        self.reasons["queue"] = (
            f"Above {queue} waiting requests (vllm_gateway_queue) the next one is told at once to come back in "
            f"{self.wanted.retry_after} s. They wait here and not in an engine, so that the first free engine takes "
            "them, and none is lost with an engine."
        )
        return Plan(
            bind=f"{_bracketed(self.wanted.host)}:{self.wanted.port}",
            servers=servers,
            bufsize=bufsize,
            body_limit=limit,
            maxconn=maxconn,
            queue=queue,
            worst_memory=memory,
            open_files=max(65536, open_files),
            timeouts=self.timeouts(longest, limit),
            keys=[f"{digest} {name}" for digest, name in sorted(keys.items(), key=lambda item: item[1])],
            key_names=sorted(keys.values()),
            reasons=self.reasons,
            warnings=self.warnings,
        )

    def check_variables(self) -> None:
        wanted = self.wanted
        for name, value, low, high in (
            ("queue", wanted.queue, 1, 100_000),
            ("queue_timeout", wanted.queue_timeout, 1, 86_400),
            ("retry_after", wanted.retry_after, 1, 3600),
            ("max_model_len", wanted.max_model_len, 0, 2**31),
            ("server_timeout", wanted.server_timeout, 0, 604_800),
            ("body_limit", wanted.body_limit, 0, LARGEST_BUFFER - RESERVE),
            ("port", wanted.port, 1, 65_535),
        ):
            if not low <= value <= high:
                self.refuse(f"vllm_gateway_{name}", value, f"wanted a whole number from {low} to {high}")
        for name, choice, choices in (("affinity", wanted.affinity, AFFINITIES), ("tls", wanted.tls, TLS)):
            if choice not in choices:
                self.refuse(f"vllm_gateway_{name}", choice, f"wanted one of {', '.join(choices)}")
        taken = {int(urlsplit(str(item["url"])).port or 80): f"engine {item['name']}" for item in self.instances}
        owner = {STATISTICS_PORT: "the gateway's statistics", **taken}.get(wanted.port)
        if owner:
            self.refuse("vllm_gateway_port", wanted.port, f"it belongs to {owner}: set another port, such as 8000")
        if wanted.tls == "files":
            for name, content in (("certificate", wanted.tls_certificate), ("key", wanted.tls_key)):
                if not content.startswith(("/", "-----BEGIN ")):
                    shown = content if name == "certificate" else "***" if content else ""
                    self.refuse(
                        f"vllm_gateway_tls_{name}",
                        shown,
                        "wanted the absolute path of a PEM file on the host, or its text, as vllm_gateway_tls is files",
                    )

    def keys(self) -> dict[str, str]:
        """Names of the keys by their digests."""
        given = self.wanted.keys
        if not given and self.wanted.api_key:
            return {key_digest(self.wanted.api_key): SHARED_KEY}
        digests: dict[str, str] = {}
        for number, item in enumerate(given):
            where = f"vllm_gateway_keys[{number}]"
            pair = self.key(where, item)
            if pair is None:
                continue
            digest, name = pair
            if name in digests.values():
                self.refuse(f"{where}.name", name, "another key has this name: the log could not tell them apart")
            elif digest in digests:
                self.refuse(f"{where}.name", name, f"it is the same key as {digests[digest]}: leave one of them out")
            else:
                digests[digest] = name
        return digests

    def key(self, where: str, item: Mapping[str, Any]) -> tuple[str, str] | None:
        """Digest and name of one key. A key itself is never part of a sentence."""
        before = len(self.errors)
        name, key, digest = item.get("name"), item.get("key"), item.get("sha256")
        if not isinstance(name, str) or not _KEY_NAME.fullmatch(name):
            self.refuse(
                f"{where}.name", name, "wanted up to 64 letters, digits, '.', '_' and '-': it goes into the log"
            )
        if bool(key) == bool(digest):
            found = "both" if key else "neither"
            self.errors.append(f"{self.wanted.inventory_hostname}: {where} has {found} of sha256 and key: wanted one")
        elif key and not re.fullmatch(r"[\x21-\x7e]{16,256}", str(key)):
            self.refuse(
                f"{where}.key", "***", "wanted 16 to 256 ASCII characters without spaces (openssl rand -hex 32)"
            )
        elif digest and not _SHA256.fullmatch(str(digest)):
            self.refuse(f"{where}.sha256", digest, "wanted 64 hexadecimal digits (printf %s KEY | sha256sum)")
        if len(self.errors) > before:
            return None
        return (key_digest(str(key)) if key else str(digest).lower()), str(name)

    def check_door(self, keys: Mapping[str, str]) -> None:
        """Who may come in. Beyond loopback a key is asked for."""
        wanted = self.wanted
        if re.search(r"[\s\"'\\#$]", wanted.host) or not wanted.host:
            self.refuse("vllm_gateway_host", wanted.host, "wanted an address of the host, such as 127.0.0.1 or 0.0.0.0")
        if wanted.host in _LOOPBACK:
            return
        if not keys:
            self.refuse(
                "vllm_gateway_host",
                wanted.host,
                "set vllm_gateway_keys or vllm_api_key before the gateway listens beyond loopback",
            )
        if wanted.tls == "off":
            self.warnings.append(
                f"{wanted.inventory_hostname}: vllm_gateway_host is {wanted.host!r} and vllm_gateway_tls is 'off': "
                "keys and prompts cross the network in clear, unless something in front of the gateway encrypts them"
            )

    def count(self, instance: Mapping[str, Any], name: str) -> int | None:
        """An argument as a whole number; None where it is not given or vLLM is to find it out."""
        value = instance["arguments"].get(name)
        if value is None:
            return None
        try:
            number = whole_number(value, name)
        except MemoryPlanError as error:
            self.errors.append(f"{self.wanted.inventory_hostname}: {instance['name']}: {error}")
            return None
        return number if number > 0 else None

    def length(self, instance: Mapping[str, Any]) -> int:
        """Tokens of the longest request."""
        length = self.count(instance, "max-model-len") or self.wanted.max_model_len
        if not length:
            found = instance["arguments"].get("max-model-len", "not set")
            self.refuse(
                f"max-model-len of {instance['name']}",
                found,
                "the gateway's buffers follow from it: set a number there, or vllm_gateway_max_model_len",
            )
        return length

    def buffers(self, longest: int) -> tuple[int, int]:
        """Largest body and size of a buffer (bytes)."""
        body = longest * BYTES_PER_TOKEN * JSON_ESCAPES
        if self.wanted.body_limit:
            limit = self.wanted.body_limit
            bufsize = max(SMALLEST_BUFFER, _power_of_two(limit + RESERVE))
            why = f"Bodies of up to {limit} bytes are wanted (vllm_gateway_body_limit)"
        else:
            bufsize = min(max(SMALLEST_BUFFER, _power_of_two(body + RESERVE)), LARGEST_BUFFER)
            limit = bufsize - RESERVE
            why = (
                f"max-model-len {longest} x {BYTES_PER_TOKEN} bytes a token x {JSON_ESCAPES} for JSON's escapes = "
                f"{body} bytes is the largest body that an engine takes"
            )
        if limit < body:
            self.warnings.append(
                f"{self.wanted.inventory_hostname}: the longest prompts (max-model-len {longest}) can have {body} "
                f"bytes, and the gateway refuses bodies above {limit}: raise vllm_gateway_body_limit where that matters"
            )
        self.reasons["bufsize"] = (
            f"{why}, and {RESERVE} are for headers and book-keeping; the next power of two, from {SMALLEST_BUFFER} to "
            f"{LARGEST_BUFFER}. A request that fits into a buffer can be sent to another engine when its engine dies."
        )
        self.reasons["body_limit"] = f"What does not fit into a buffer is refused with 413: above {limit} bytes."
        return limit, bufsize

    def server(self, instance: Mapping[str, Any]) -> Server:
        """How many requests an engine is given at once."""
        name = str(instance["name"])
        ranks = self.count(instance, "data-parallel-size") or 1
        given = self.count(instance, "max-num-seqs")
        seqs = ranks * (given or DEFAULT_SEQS[self.wanted.device])
        ahead = max(1, seqs // 8)
        maxconn = seqs + ahead
        source = "max-num-seqs" if given else "vLLM's default of max-num-seqs"
        ranked = f" x {ranks} data-parallel ranks" if ranks > 1 else ""
        why = f"{source} {seqs // ranks}{ranked}, and {ahead} more that wait inside the engine for the next free place"
        inside = self.count(instance, "max-num-queued-reqs")
        if inside is not None and maxconn > inside - 1:
            maxconn = max(1, inside - 1)
            why = (
                f"max-num-queued-reqs {inside} less one, which is for the health agent: above it the engine answers 503"
            )
        self.reasons[f"server {name}"] = f"{maxconn} requests at once: {why}."
        # Only affinity makes requests wait for one engine; otherwise they wait for whichever is free first.
        queue = max(1, self.wanted.queue // len(self.instances)) if self.wanted.affinity == "session" else 0
        url = urlsplit(str(instance["url"]))
        return Server(name, f"{_bracketed(url.hostname or '')}:{url.port or 80}", maxconn, queue)

    def timeouts(self, longest: int, limit: int) -> dict[str, int]:
        """Seconds, by HAProxy's names."""
        slowest = SLOWEST[self.wanted.device]
        computed = 2 * _up(longest, slowest)
        server = self.wanted.server_timeout or _up(computed, 60) * 60
        upload = UPLOAD_START + _up(limit, SLOWEST_UPLOAD)
        self.reasons["timeout server"] = (
            f"vllm_gateway_server_timeout is {server} s."
            if self.wanted.server_timeout
            else f"An answer that is not streamed comes after its last token: {longest} tokens at {slowest} a second, "
            "and the same again for a request before it in the engine's queue. It is a last resort: engines that "
            "hang are found by the health agent within seconds, busy ones are left alone."
        )
        self.reasons["timeout client"] = "As the server's: a client that waits for its answer sends nothing."
        self.reasons["timeout queue"] = (
            f"A request waits at most {self.wanted.queue_timeout} s for an engine (vllm_gateway_queue_timeout): less "
            "than clients wait themselves (OpenAI's libraries 600 s), so they hear a reason."
        )
        self.reasons["timeout http-request"] = (
            f"{UPLOAD_START} s, and the largest body at {SLOWEST_UPLOAD // 1024} KiB a second: slower uploads get 408."
        )
        self.reasons["timeout http-keep-alive"] = (
            "Clients' idle connections are kept. Those to engines are not (http-server-close): vLLM closes idle ones "
            "after 5 s, and a request that meets the end of a connection would be a lost one."
        )
        self.reasons["timeout connect"] = "Engines are on this host: what does not answer in 2 s is not there."
        self.reasons["timeout check"] = (
            f"{CHECK_TIMEOUT} s for GET /health, as a busy engine can be slow to answer; a dead one refuses at once."
        )
        return {
            "connect": CONNECT_TIMEOUT,
            "check": CHECK_TIMEOUT,
            "client": server,
            "server": server,
            "queue": self.wanted.queue_timeout,
            "http-request": upload,
            "http-keep-alive": KEEP_ALIVE,
        }


def _up(number: int, step: int) -> int:
    """How often ``step`` fits, rounded up."""
    return -(-number // step)


def _power_of_two(number: int) -> int:
    """The next power of two."""
    return 1 << max(0, number - 1).bit_length()


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host

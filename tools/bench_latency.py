#!/usr/bin/env python3
"""What a door in front of vLLM adds to each token and to each request, beside the same requests without a door.

Usage, on the host of the engines (standard library only)::

    bench_latency.py measure --model NAME --door direct=URL,URL --door NAME=URL ... [--rounds 40] [--tokens 64]
    bench_latency.py stand-in PORT [--model NAME] [--interval 0.01]

``measure`` sends streamed requests one at a time. In each round every door has its turn, in an order that shifts by one
with the round, so that whatever else the machine does meets all doors alike. The first door is what the others are
compared with; of several URLs, each round takes the next one. The result is JSON on standard output. The key comes from
the environment variable VLLM_API_KEY.

``stand-in`` is no engine: it answers completions with a token every ``--interval`` seconds, and each token is the time
at which it was sent. On one host that clock is the same everywhere, so the client sees how long a token was under way.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

TIMEOUT = 60.0  # seconds without a byte; only a door that is broken takes as long
TOKEN_FIELDS = ("content", "reasoning", "reasoning_content")
MS = 1000.0


@dataclass(frozen=True)
class Door:
    """A name, and the base URLs that take turns."""

    name: str
    urls: tuple[str, ...]


@dataclass
class Samples:
    """What was seen through one door. All times are seconds."""

    gaps: list[float] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    requests: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """A complete streamed answer: when (s) it was asked for, each piece with text came, and it ended."""

    asked: float
    pieces: tuple[tuple[float, str], ...]
    ended: float


class AnswerFailed(Exception):
    """Why an answer does not count, in one sentence."""


def main() -> None:
    """Measure, or be the stand-in."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--model", required=True)
    measuring.add_argument("--door", action="append", required=True, type=door_of, metavar="NAME=URL[,URL]")
    measuring.add_argument("--rounds", type=int, default=40)
    measuring.add_argument("--tokens", type=int, default=64)
    standing_in = commands.add_parser("stand-in")
    standing_in.add_argument("port", type=int)
    standing_in.add_argument("--model", default="stand-in")
    standing_in.add_argument("--interval", type=float, default=0.01, help="seconds between two tokens")
    arguments = parser.parse_args()
    if arguments.command == "stand-in":
        StandIn(arguments.port, arguments.model, arguments.interval).serve_forever()
    key = os.environ.get("VLLM_API_KEY", "")
    samples = measure(arguments.door, arguments.model, arguments.rounds, arguments.tokens, key)
    json.dump(report(samples), sys.stdout, indent=1)


def door_of(text: str) -> Door:
    """``NAME=URL[,URL]`` as a Door. Raises argparse.ArgumentTypeError."""
    name, _, urls = text.partition("=")
    found = tuple(url.rstrip("/") for url in urls.split(",") if url)
    if not name or not found or not all(url.startswith("http://") for url in found):
        raise argparse.ArgumentTypeError(f"wanted NAME=http://HOST:PORT, found {text}")
    return Door(name, found)


def measure(doors: Sequence[Door], model: str, rounds: int, tokens: int, key: str) -> dict[str, Samples]:
    """Send the requests; one more round goes first and does not count. Returns the samples by door."""
    samples = {door.name: Samples() for door in doors}
    for number, door in turns(doors, rounds + 1):
        into = samples[door.name] if number else Samples()
        try:
            answer = ask(door.urls[number % len(door.urls)], model, tokens, key)
        except (OSError, http.client.HTTPException, ValueError, LookupError, AnswerFailed) as error:
            into.failures.append(f"{type(error).__name__}: {error}")
        else:
            add(into, answer)
    return samples


def turns(doors: Sequence[Door], rounds: int) -> Iterator[tuple[int, Door]]:
    """Round number and door of each request. No door is always the first of a round, or always behind the same one."""
    for number in range(rounds):
        # Forwards and backwards: in a mere rotation each door would follow the same one all the time.
        order = list(doors if number % 2 else reversed(doors))
        first = number // 2 % len(order)
        for door in order[first:] + order[:first]:
            yield number, door


def ask(url: str, model: str, tokens: int, key: str) -> Answer:
    """One streamed completion over a connection of its own.

    Raises AnswerFailed for an answer that is not whole, OSError and HTTPException for a connection that fails,
    ValueError and LookupError for events that are no chat completion.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Count upwards."}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
    }
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    pieces: list[tuple[float, str]] = []
    asked = time.monotonic()
    with closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT)) as connection:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise AnswerFailed(f"HTTP {response.status} from {url}: {response.read(300).decode('utf-8', 'replace')}")
        for line in response:
            arrived = time.monotonic()
            if not line.startswith(b"data:"):
                continue
            data = line[len(b"data:") :].strip()
            if data == b"[DONE]":
                return Answer(asked, tuple(pieces), time.monotonic())
            text = text_of(json.loads(data))
            if text:
                pieces.append((arrived, text))
    raise AnswerFailed(f"an answer of {url} that ended without [DONE] after {len(pieces)} pieces")


def text_of(event: dict[str, Any]) -> str:
    """Text of one event of a stream; empty for those that carry none. Raises AnswerFailed for an error inside."""
    if event.get("error"):
        raise AnswerFailed(f"an error inside the answer: {event['error']}")
    choices = event.get("choices")
    delta = choices[0].get("delta") or {} if choices else {}
    return next((str(delta[name]) for name in TOKEN_FIELDS if delta.get(name)), "")


def add(samples: Samples, answer: Answer) -> None:
    """Take the times of one answer. Raises AnswerFailed for one with fewer than two pieces, which has no gap."""
    arrivals = [arrived for arrived, _ in answer.pieces]
    if len(arrivals) < 2:
        raise AnswerFailed(f"an answer of {len(arrivals)} pieces; wanted two or more")
    samples.gaps += [later - earlier for earlier, later in pairwise(arrivals)]
    samples.first_tokens.append(arrivals[0] - answer.asked)
    samples.requests.append(answer.ended - answer.asked)
    sent = [sent_at(text) for _, text in answer.pieces]
    samples.delays += [arrived - at for arrived, at in zip(arrivals, sent, strict=True) if at is not None]


def sent_at(text: str) -> float | None:
    """When (s) the stand-in sent this token; None for a token of an engine."""
    kind, _, nanoseconds = text.strip().partition("@")
    return int(nanoseconds) / 1e9 if kind == "sent" and nanoseconds.isdecimal() else None


def report(samples: dict[str, Samples]) -> dict[str, Any]:
    """Percentiles by door in milliseconds, and what each door adds to the first one."""
    doors = {name: summary(found) for name, found in samples.items()}
    first = next(iter(doors.values()))
    for found in doors.values():
        found["added"] = {key: added(found[key], first[key]) for key in ("gap", "delay", "first_token", "request")}
    return doors


def summary(samples: Samples) -> dict[str, Any]:
    """One door's counts and percentiles (ms)."""
    return {
        "requests": len(samples.requests),
        "failed": len(samples.failures),
        "first_failure": samples.failures[0] if samples.failures else None,
        "gap": percentiles(samples.gaps),
        "delay": percentiles(samples.delays),
        "first_token": percentiles(samples.first_tokens),
        "request": percentiles(samples.requests),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """p50 and p99 in milliseconds, and of how many; None of nothing."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    return {
        "count": len(ordered),
        "p50": round(percentile(ordered, 50) * MS, 3),
        "p99": round(percentile(ordered, 99) * MS, 3),
    }


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile of ascending numbers, of which there is one at least."""
    return ordered[max(math.ceil(percent / 100 * len(ordered)), 1) - 1]


def added(found: dict[str, float] | None, first: dict[str, float] | None) -> dict[str, float | None] | None:
    """How much more (ms) than without a door, and how many times as much; None where either was not measured."""
    if found is None or first is None:
        return None
    return {
        "p50": round(found["p50"] - first["p50"], 3),
        "p99": round(found["p99"] - first["p99"], 3),
        "ratio": round(found["p50"] / first["p50"], 3) if first["p50"] > 0 else None,
    }


class StandIn(ThreadingHTTPServer):
    """Answers as an engine does, with a token every ``interval`` seconds. Raises OSError for a port in use."""

    daemon_threads = True

    def __init__(self, port: int, model: str, interval: float) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.model = model
        self.interval = interval


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # as vLLM's server has it
    server: StandIn

    def do_GET(self) -> None:
        if self.path == "/health":
            self._whole(b"")
        elif self.path == "/v1/models":
            self._whole(json.dumps({"object": "list", "data": [{"id": self.server.model, "object": "model"}]}).encode())
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not asked.get("stream"):
            self.send_error(400, "the stand-in only streams")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        # Clients of HTTP/1.0 know the end of an answer by the end of its connection.
        self._chunked = self.request_version != "HTTP/1.0"
        self.close_connection = not self._chunked
        if self._chunked:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._event({"role": "assistant", "content": ""}, None)
        # By the clock and not by pauses, whose errors would add up.
        start = time.monotonic()
        for number in range(1, int(asked["max_tokens"]) + 1):
            time.sleep(max(start + number * self.server.interval - time.monotonic(), 0.0))
            self._event({"content": f"sent@{time.monotonic_ns()} "}, None)
        self._event({}, "length")
        self._send(b"data: [DONE]\n\n")
        if self._chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _event(self, delta: dict[str, str], finish: str | None) -> None:
        event = {
            "id": "chatcmpl-stand-in",
            "object": "chat.completion.chunk",
            "created": 0,
            "model": self.server.model,
            "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}],
        }
        self._send(b"data: " + json.dumps(event).encode() + b"\n\n")

    def _send(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def _whole(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if body:  # who checks health may be gone after the head
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    main()

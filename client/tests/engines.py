"""Real HTTP servers that misbehave as told, and clients of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from agentic_client.llm_client import DualEndpointLLMClient, EndpointConfig, RetryRules, Timeouts

WORDS = ("one ", "two ", "three")
HANG_SECONDS = 60.0  # longer than any test waits
Behaviour = Callable[["Engine", asyncio.StreamWriter, dict[str, Any]], Awaitable[None]]


class Engine:
    """One endpoint. ``script`` holds the behaviour of the next requests, ``otherwise`` of all others."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.script: list[Behaviour] = []
        self.otherwise: Behaviour = answer
        self.probes: Behaviour = answer
        self.requests: list[dict[str, Any]] = []  # of users
        self.probed = 0
        self.headers: list[str] = []
        self.go = asyncio.Event()  # for what a behaviour waits for
        self.running = self.peak = self.disconnects = 0
        self.server: asyncio.Server | None = None
        self.port = 0

    @property
    def config(self) -> EndpointConfig:
        return EndpointConfig(url=f"http://127.0.0.1:{self.port}/v1", name=self.name)

    async def start(self) -> None:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self.server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self.server is not None:
            self.server.close()
            self.server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = 0  # by a user
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.headers.append(head)
            length = int(head.lower().split("content-length:")[1].split("\r\n")[0])
            body = json.loads(await reader.readexactly(length))
            if body["messages"] == [{"role": "user", "content": "ping"}]:
                self.probed += 1
                behaviour = self.probes
            else:
                asked = 1
                self.requests.append(body)
                behaviour = self.script.pop(0) if self.script else self.otherwise
            self.running += asked
            self.peak = max(self.peak, self.running)
            work = asyncio.ensure_future(behaviour(self, writer, body))
            gone = asyncio.ensure_future(reader.read(1))
            await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self.disconnects += 1
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.running -= asked
            writer.close()


def head(status: str, **headers: Any) -> bytes:
    lines = [f"HTTP/1.1 {status}", "Connection: close", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def event(data: Any) -> bytes:
    return b"data: " + (data if isinstance(data, str) else json.dumps(data)).encode() + b"\n\n"


def piece(text: str | None = None, finish: str | None = None, **delta: Any) -> bytes:
    choice = {"index": 0, "delta": {**delta, **({"content": text} if text else {})}, "finish_reason": finish}
    common = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return event(common | {"choices": [choice]})


STREAM = head("200 OK", Content_Type="text/event-stream") + piece(role="assistant")


def completion(finish: str = "stop") -> bytes:
    message = {"role": "assistant", "content": "".join(WORDS)}
    body = {
        "id": "c1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8},
    }
    return json.dumps(body).encode()


async def send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()


async def answer(_engine: Engine, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    """As it should be."""
    if body.get("stream"):
        usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
        last = {
            "id": "c1",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": "m",
            "choices": [],
            "usage": usage,
        }
        words = b"".join(piece(word) for word in WORDS)
        await send(writer, STREAM + words + piece(finish="stop") + event(last) + event("[DONE]"))
    else:
        text = completion()
        await send(writer, head("200 OK", Content_Type="application/json", Content_Length=len(text)) + text)


def says(*parts: bytes, pause: float = 0.0, then: str = "close") -> Behaviour:
    """Send these bytes, ``pause`` seconds apart; then close, reset or hang."""

    async def behave(_engine: Engine, writer: asyncio.StreamWriter, _body: dict[str, Any]) -> None:
        for part in parts:
            await send(writer, part)
            await asyncio.sleep(pause)
        if then == "hang":
            await asyncio.sleep(HANG_SECONDS)
        if then == "reset":
            writer.transport.abort()

    return behave


def whole(body: bytes, status: str = "200 OK", **headers: Any) -> Behaviour:
    return says(head(status, Content_Type="application/json", Content_Length=len(body), **headers) + body)


def fails(status: str, **headers: Any) -> Behaviour:
    return whole(b'{"error": {"message": "told so", "type": "t", "code": 1}}', status, **headers)


resets = says(then="reset")
hangs = says(then="hang")


class Service:
    """Two engines, the client's events, and clients whose pauses are short."""

    def __init__(self) -> None:
        self.a, self.b = Engine("a"), Engine("b")
        self.events: list[Any] = []

    @asynccontextmanager
    async def client(self, *engines: Engine, **more: Any) -> AsyncIterator[DualEndpointLLMClient]:
        timeouts = Timeouts(**({"first_token": 10.0, "total": 30.0} | more.pop("timeouts", {})))
        values = {"retry": RetryRules(pauses=(0.05,)), "api_key": "sk-test", "on_event": self.events.append} | more
        endpoints = [engine.config for engine in engines or (self.a, self.b)]
        async with DualEndpointLLMClient(endpoints, "m", timeouts=timeouts, **values) as client:
            yield client

    def seen(self, kind: type) -> list[Any]:
        return [each for each in self.events if isinstance(each, kind)]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another task does; the test's own deadline ends it."""
    while not condition():
        await asyncio.sleep(0.01)

#!/usr/bin/env python3
# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""A stand-in for a vLLM engine behind the gateway: HTTP/1.1 and SSE over real sockets, in a process that can be killed.

    tests/haproxy/stub_engine.py NAME PORT DIRECTORY

A request's body says how each engine behaves, by the engine's name; the same body can so end one engine and be
answered by the next: ``{"behave": {"primary": "die"}, "stream": true, "tokens": 20, "pause": 0.01}``.

    (none)    answer; the header X-Engine tells who, the JSON how many bytes came
    die       read the body, then end the process without a byte
    close     read the body, then close the connection without a byte
    reset     read the body, then reset the connection
    cut       send the head and one token, then close the connection
    hang      read the body, then say nothing
    held      say nothing at first, not even the head, then stream; "hold" is for how long (s)
    500, ...  answer with that status

While a request with ``"unhealthy": true`` runs, ``GET /health`` is 503.

As the engines' middleware does, it answers 502 to what waits (hang, held) once there is a file DIRECTORY/hung/NAME, and
503 to what comes while there is DIRECTORY/drained/NAME.

``GET /seen`` tells how many completions came, and what is under way. The standard library alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Coroutine
from pathlib import Path

name, port = sys.argv[1], int(sys.argv[2])
hung, drained = (Path(sys.argv[3], mark, name) for mark in ("hung", "drained"))
seen = {"completions": 0, "under_way": 0, "most": 0, "left": 0, "headers": {}, "ids": []}
unhealthy: list[bool] = []


def head(status: int, length: int | None = None, kind: str = "application/json") -> bytes:
    body = f"Content-Length: {length}" if length is not None else "Transfer-Encoding: chunked"
    start = f"HTTP/1.1 {status} Told\r\nX-Engine: {name}\r\nServer: uvicorn"
    return f"{start}\r\nContent-Type: {kind}\r\n{body}\r\n\r\n".encode()


def answer(status: int, value: object) -> bytes:
    data = json.dumps(value).encode()
    return head(status, len(data)) + data


def event(text: str) -> bytes:
    data = f"data: {text}\n\n".encode()
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


async def handed_back() -> None:
    while not hung.exists():
        await asyncio.sleep(0.05)


async def before_a_hang(waiting: Coroutine) -> bool:
    """Whether this ended before the hang was known."""
    tasks = [asyncio.ensure_future(waiting), asyncio.ensure_future(handed_back())]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    ended = tasks[0].done()
    for task in tasks:
        task.cancel()
    return ended


async def stream(writer: asyncio.StreamWriter, wanted: dict, behave: str) -> None:
    if behave == "held" and not await before_a_hang(asyncio.sleep(wanted["hold"])):
        writer.write(answer(502, {"error": {"message": "it hangs"}}))
        return
    writer.write(head(200, kind="text/event-stream"))
    for number in range(wanted.get("tokens", 3)):
        writer.write(event(json.dumps({"n": number, "sent": time.monotonic()})))
        await writer.drain()
        if behave == "cut":
            return
        await asyncio.sleep(wanted.get("pause", 0))
    writer.write(event("[DONE]") + b"0\r\n\r\n")


async def complete(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> None:
    wanted = json.loads(body)
    behave = "503" if drained.exists() else wanted.get("behave", {}).get(name, "")
    if behave == "die":
        os._exit(1)
    if behave == "close":
        return
    if behave == "reset":
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        return
    if behave == "hang":
        # What arrives now is the other side's end.
        if await before_a_hang(reader.read()):
            seen["left"] += 1
            return
        behave = "502"
    if behave.isdigit():
        writer.write(answer(int(behave), {"error": {"message": f"told so by {name}"}}))
    elif wanted.get("stream"):
        if wanted.get("unhealthy"):
            unhealthy.append(True)
        await stream(writer, wanted, behave)
        unhealthy.clear()
    else:
        await asyncio.sleep(wanted.get("pause", 0))
        writer.write(answer(200, {"engine": name, "bytes": len(body)}))


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        while True:
            text = (await reader.readuntil(b"\r\n\r\n")).decode()
            first, *lines = text.strip().split("\r\n")
            method, path, _ = first.split()
            headers = {key.lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
            body = b""
            if "content-length" in headers:
                body = await reader.readexactly(int(headers["content-length"]))
            while headers.get("transfer-encoding") == "chunked":
                size = int(await reader.readline(), 16)
                body += (await reader.readexactly(size + 2))[:-2]
                if not size:
                    break
            if method == "POST":
                seen["completions"] += 1
                seen["under_way"] += 1
                seen["most"] = max(seen["most"], seen["under_way"])
                seen["headers"] = headers
                seen["ids"].append(headers.get("x-request-id"))
                try:
                    await complete(reader, writer, body)
                finally:
                    seen["under_way"] -= 1
            else:
                value = {"/health": {}, "/seen": seen, "/v1/models": {"data": [{"id": "gpt-oss-120b"}]}}.get(path)
                status = 404 if value is None else 503 if path == "/health" and unhealthy else 200
                writer.write(answer(status, value))
            await writer.drain()
            if headers.get("connection") == "close" or method == "POST":
                break
    writer.close()


async def main() -> None:
    server = await asyncio.start_server(serve, "127.0.0.1", port, limit=2**25, backlog=1024)
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())

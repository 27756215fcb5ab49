# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""ASGI middleware of the engines: a streamed answer begins with its first token, and not before.

vLLM sends the head of a streamed answer, status 200, as soon as it has taken the request. The first
token can be seconds away, and where the engine dies or hangs meanwhile, it is too late: a gateway
sends a request to another engine only until the first byte of an answer has come. So the head waits
here until there is a token to go with it. That costs no time: a client can do nothing with a head.

What the gateway has sent and has no byte of is handed back to it where the engine can do nothing with
it: 502 for what waits when the health agent finds a hang, 503 for what comes while the engine is
drained. The gateway sends both to another engine. Requests of others go on as vLLM has them: they
may have nowhere else to go, and one of them is the health agent's own, which has to wait to see a
hang end.

vLLM loads it with ``--middleware nvl_vllm.first_token.FirstToken``.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

#: What answers with tokens. Clients of other paths get what vLLM sends, when it sends it.
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
#: Events with which vLLM greets a client of /v1/responses, before the engine has done anything.
_GREETINGS = (b"event: response.created\n", b"event: response.in_progress\n")
_DATA = b"data: "

#: The engine's name. A file of that name in one of these directories says that it is drained (an operator's file, or
#: that of the unit's helper), or that it hangs and the gateway knows (the health agent's).
_NAME = os.environ.get("NVL_VLLM_NAME", "")
_DRAINED, _HUNG = "/run/nvl-vllm/drain", "/run/vllm-health/hung"
_LOOK_SECONDS = 0.5  # between two looks for a hang, while requests wait


class FirstToken:
    """Holds the head of each streamed answer until the first piece that says something.

    A stream that begins with vLLM's error event becomes an answer with that event's status, as
    clients know how to retry a status and not an error in a stream. A request to an engine that is
    known to be dead is answered with 503. Everything else passes: other paths, what the client sends,
    that it goes away, and exceptions, which vLLM answers with 500 where no head has left.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self._waiting: set[_Answer] = set()  # of the gateway's requests
        self._watch: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _wants_tokens(scope):
            await self.app(scope, receive, send)
        elif _engine_is_dead(scope):
            # This request did not kill it, so a gateway may send it to another engine. What was under way when the
            # engine died gets vLLM's own 500: it may be the cause, and must not kill the next engine, too.
            await _refuse(send, 503, "The engine of this server has died and is about to be restarted.")
        elif not _from_gateway(scope):
            await self.app(scope, receive, _Answer(send).send)
        elif _is_marked(_DRAINED):
            # From a process of the gateway that has not heard of it yet. Stopping, vLLM would answer 500.
            await _refuse(send, 503, "This server takes no new requests, as it is drained.")
        else:
            await self._until_hung(scope, receive, _Answer(send))

    async def _until_hung(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        self._waiting.add(answer)
        self._watch = self._watch or asyncio.ensure_future(self._look_for_hang())
        try:
            await self.app(scope, receive, answer.send)
        finally:
            self._waiting.discard(answer)

    async def _look_for_hang(self) -> None:
        """As long as requests are here: hand them back when the engine is known to hang. One such task for all."""
        try:
            while self._waiting:
                if _is_marked(_HUNG):
                    await asyncio.gather(*(answer.hand_back() for answer in self._waiting), return_exceptions=True)
                await asyncio.sleep(_LOOK_SECONDS)
        finally:
            self._watch = None


class _Answer:
    """One answer on its way to the client."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._held: list[Message] = []
        self._released = False
        self._refused = False

    async def hand_back(self) -> None:
        """Answer 502 where no byte has left. A server then tells the application that its client has gone."""
        if not (self._released or self._refused):
            self._refused = True
            await _refuse(self._send, 502, "The engine of this server hangs.")

    async def send(self, message: Message) -> None:
        """Pass on what the application sends, or hold it."""
        if self._refused:
            pass  # the rest of an answer whose client has got an error instead
        elif self._released:
            await self._send(message)
        elif _is_early(message) if self._held else _begins_stream(message):
            self._held.append(message)
        elif self._held and (error := _error(message)) is not None:
            self._refused = True
            code = error.get("code")
            status = code if isinstance(code, int) and 400 <= code <= 599 else 500
            # What the layers below have added to the head (for browsers, say) counts for this answer, too.
            kept = [it for it in self._held[0]["headers"] if it[0].lower() not in (b"content-type", b"content-length")]
            await _send_error(self._send, status, error, kept)
        else:
            self._released = True
            for held in (*self._held, message):
                await self._send(held)


def _wants_tokens(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")) in PATHS


def _from_gateway(scope: Scope) -> bool:
    """Whether something that can send the request elsewhere has sent it: the gateway names each one."""
    return any(name.lower() == b"x-request-id" for name, _ in scope.get("headers", ()))


def _is_marked(directory: str) -> bool:
    return bool(_NAME) and os.path.exists(f"{directory}/{_NAME}")


def _engine_is_dead(scope: Scope) -> bool:
    """Whether vLLM knows that its engine is dead. Where it keeps that elsewhere, nothing is known."""
    state = getattr(scope.get("app"), "state", None)
    return bool(getattr(getattr(state, "engine_client", None), "errored", False))


def _begins_stream(message: Message) -> bool:
    if message["type"] != "http.response.start" or message["status"] != 200:
        return False
    headers = {name.lower(): value for name, value in message.get("headers", ())}
    return bool(headers.get(b"content-type", b"").startswith(b"text/event-stream"))


def _is_early(message: Message) -> bool:
    """Whether a piece of a stream comes before anything that the model said.

    A chat begins with a piece that has a role and no text; gpt-oss names its channel before it says anything.
    A comment (": keep-alive") does so, too, and is not held: who sets sse-keep-alive-interval wants bytes on the way
    during the wait, as something in between closes connections that are silent.
    """
    if message["type"] != "http.response.body" or not message.get("more_body", False):
        return False
    piece = bytes(message.get("body", b""))
    if not piece or piece.startswith(_GREETINGS):
        return True
    choices = (_event(piece) or {}).get("choices")
    return isinstance(choices, list) and bool(choices) and all(_says_nothing(choice) for choice in choices)


def _says_nothing(choice: dict[str, Any]) -> bool:
    """Whether a choice in a piece of a chat has no text, tool call, token or end yet."""
    delta = choice.get("delta")
    if not isinstance(delta, dict) or any(choice.get(name) for name in ("finish_reason", "logprobs", "token_ids")):
        return False
    return not any(value for name, value in delta.items() if name != "role")


def _error(message: Message) -> dict[str, Any] | None:
    """The error that vLLM puts into a stream, where the piece is one: ``data: {"error": {…, "code": 500}}``."""
    error = (_event(bytes(message.get("body", b""))) or {}).get("error")
    return error if isinstance(error, dict) else None


def _event(piece: bytes) -> dict[str, Any] | None:
    """The object that a piece of a stream begins with; None where it is anything else, such as ``data: [DONE]``."""
    line = piece.partition(b"\n")[0]
    if not line.startswith(_DATA):
        return None
    try:
        event = json.loads(line[len(_DATA) :])
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


async def _refuse(send: Send, status: int, message: str) -> None:
    error = {"message": message, "type": "ServiceUnavailableError", "param": None, "code": status}
    await _send_error(send, status, error, [(b"retry-after", b"1")])


async def _send_error(send: Send, status: int, error: dict[str, Any], headers: list[tuple[bytes, bytes]]) -> None:
    body = json.dumps({"error": error}).encode()
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *own]})
    await send({"type": "http.response.body", "body": body, "more_body": False})

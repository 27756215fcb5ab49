"""What this collection asks of an OpenAI-compatible server: models, metrics and chat completions.

It exists because "the server answered 200" says little about vLLM: an engine that dies sends an
error *inside* a stream and then ``[DONE]``, one that shuts down sends ``finish_reason: abort`` and
no token, one that hangs sends nothing for ever. Here an answer is complete or an exception.

All times are seconds, and each call has one total deadline (see _http.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

from ._http import (
    ConnectFailed,
    DeadlineExceeded,
    Endpoint,
    EndpointError,
    Exchange,
    HttpStatus,
    ResponseCut,
    ResponseFailed,
    endpoints_of,
    server_message,
    shorten,
)

__all__ = [
    "Completion",
    "ConnectFailed",
    "DeadlineExceeded",
    "Endpoint",
    "EndpointError",
    "HttpStatus",
    "ResponseCut",
    "ResponseFailed",
    "chat",
    "endpoints_of",
    "get",
    "metric_sums",
    "metrics",
    "models",
    "sse_data",
    "version",
]

Messages = Union[str, Sequence[Mapping[str, Any]]]

# vLLM: shut down under the request, or failed inside the engine.
FAILED_FINISHES = ("abort", "error")
# gpt-oss thinks before it answers, and a tool call is output too.
TOKEN_FIELDS = ("content", "reasoning", "reasoning_content", "tool_calls")


@dataclass(frozen=True)
class Completion:
    """A complete answer.

    ``ttft_seconds`` (time to first token) is None when the answer was not streamed, ``chunks``
    counts the pieces that carried output, ``completion_tokens`` is what the server counted.
    """

    text: str
    reasoning: str
    chunks: int
    ttft_seconds: float | None
    seconds: float
    finish_reason: str
    completion_tokens: int | None


def get(endpoint: Endpoint, path: str, deadline_seconds: float) -> bytes:
    """The body of ``GET path``. Raises EndpointError for anything but a complete 200."""
    with Exchange(endpoint, f"GET {path}", deadline_seconds) as exchange:
        return exchange.ask("GET", path).read()


def models(endpoint: Endpoint, deadline_seconds: float) -> list[str]:
    """Names that the server lists, in its order. Raises EndpointError."""
    body = get(endpoint, "/v1/models", deadline_seconds)
    try:
        return [str(entry["id"]) for entry in json.loads(body)["data"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ResponseFailed(
            f"{endpoint}: wanted a list of models from /v1/models, found {shorten(body)}; "
            f"is this an OpenAI-compatible server?"
        ) from error


def version(endpoint: Endpoint, deadline_seconds: float) -> str:
    """Version of the vLLM that answers, such as ``0.32.0+cpu``. Raises EndpointError."""
    body = get(endpoint, "/version", deadline_seconds)
    try:
        return str(json.loads(body)["version"])
    except (ValueError, TypeError, KeyError) as error:
        raise ResponseFailed(f"{endpoint}: wanted vLLM's version from /version, found {shorten(body)}") from error


def metrics(endpoint: Endpoint, names: Sequence[str], deadline_seconds: float) -> dict[str, float]:
    """Sums over labels of the named series of ``/metrics``; an absent series is left out.

    Raises EndpointError.
    """
    text = get(endpoint, "/metrics", deadline_seconds).decode("utf-8", "replace")
    return metric_sums(text, names)


def metric_sums(text: str, names: Sequence[str]) -> dict[str, float]:
    """Sums over labels of the named series in a page of Prometheus' text format.

    A sample that is no finite number (NaN, +Inf) counts as absent.
    """
    wanted = "|".join(re.escape(name) for name in names)
    # A label value may hold a closing brace: the labels end at the last one before the value.
    sample = re.compile(
        rf"^({wanted})(?:\{{.*\}})?[ \t]+([-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)(?=\s|$)",
        re.MULTILINE,
    )
    sums: dict[str, float] = {}
    for name, value in sample.findall(text):
        sums[name] = sums.get(name, 0.0) + float(value)
    return sums


def chat(
    endpoint: Endpoint,
    model: str,
    prompt_or_messages: Messages,
    max_tokens: int,
    stream: bool = False,
    deadline_seconds: float = 30.0,
) -> Completion:
    """One greedy chat completion, complete or an exception.

    Temperature 0, so that the same question costs the same work each time. Raises EndpointError,
    whose ``chunks`` says whether output had arrived by then.
    """
    messages = prompt_or_messages
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    payload: dict[str, Any] = {
        "model": model,
        "messages": [dict(message) for message in messages],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": stream,
    }
    if stream:
        # gpt-oss begins with channel syntax that has no text: only the usage shows those tokens.
        payload["stream_options"] = {"include_usage": True}
    with Exchange(endpoint, f"a completion of {model}", deadline_seconds) as exchange:
        response = exchange.ask("POST", "/v1/chat/completions", payload)
        answer = _Answer(exchange)
        if stream:
            for data in sse_data(response):
                if data == "[DONE]":
                    answer.done = True
                    break
                answer.add(data)
        else:
            answer.add(response.read().decode("utf-8", "replace"))
            answer.done = True
        return answer.completion(stream)


def sse_data(lines: Iterable[bytes]) -> Iterator[str]:
    """The data of each event of a server-sent event stream.

    Comments (keep-alives) and other fields are skipped. A last line without its newline was cut
    off on the way and is dropped.
    """
    data: list[str] = []
    for raw in lines:
        if not raw.endswith(b"\n"):
            break
        line = raw.decode("utf-8", "replace").rstrip("\r\n")
        if line.startswith("data:"):
            value = line[len("data:") :]
            data.append(value[1:] if value.startswith(" ") else value)
        elif not line and data:
            yield "\n".join(data)
            data = []
    if data:
        yield "\n".join(data)


class _Answer:
    """Collects the pieces of one chat completion and decides whether they make an answer."""

    def __init__(self, exchange: Exchange) -> None:
        self.done = False
        self._exchange = exchange
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._ttft: float | None = None
        self._finish: str | None = None
        self._tokens: int | None = None

    def add(self, data: str) -> None:
        """Take one JSON object: a whole answer or one event of a stream. Raises ResponseFailed."""
        try:
            self._take(json.loads(data))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise self._failed(f"JSON that is no chat completion: {shorten(data)}") from error

    def completion(self, streamed: bool) -> Completion:
        """Raises ResponseCut for an incomplete answer, ResponseFailed for one without a token."""
        exchange = self._exchange
        if not self.done or self._finish is None:
            missing = "finish_reason" if self.done else "[DONE]"
            found = f"an answer that ended without {missing} after {exchange.chunks} pieces"
            raise exchange.error(ResponseCut, found)
        if not exchange.chunks and not self._tokens:
            raise self._failed(f"an answer without a token (finish_reason {self._finish})")
        return Completion(
            text="".join(self._text),
            reasoning="".join(self._reasoning),
            chunks=exchange.chunks,
            ttft_seconds=self._ttft if streamed else None,
            seconds=exchange.elapsed(),
            finish_reason=self._finish,
            completion_tokens=self._tokens,
        )

    def _take(self, piece: dict[str, Any]) -> None:
        if piece.get("error") or piece.get("object") == "error":
            error = piece.get("error") or piece
            code = error.get("code") if isinstance(error, dict) else None
            status = code if isinstance(code, int) else None
            raise self._failed(f"an error inside the answer: {server_message(piece)}", status)
        usage = piece.get("usage")
        if usage:
            self._tokens = usage.get("completion_tokens")
        for choice in piece["choices"][:1]:
            delta = choice.get("delta") or choice.get("message") or {}
            if any(delta.get(name) for name in TOKEN_FIELDS):
                self._exchange.chunks += 1
                self._mark_first()
            self._text.append(delta.get("content") or "")
            self._reasoning.append(delta.get("reasoning") or delta.get("reasoning_content") or "")
            self._finish = choice.get("finish_reason") or self._finish
        if self._finish:
            self._mark_first()
        if self._finish in FAILED_FINISHES:
            raise self._failed(f"finish_reason {self._finish}: the server gave the request up")

    def _mark_first(self) -> None:
        if self._ttft is None:
            self._ttft = self._exchange.elapsed()

    def _failed(self, found: str, status: int | None = None) -> EndpointError:
        return self._exchange.error(ResponseFailed, found, status)

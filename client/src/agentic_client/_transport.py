"""One attempt of one request at one endpoint, through OpenAI's SDK: a complete answer or an AttemptError.

A status of 200 says little about vLLM: an engine that dies sends an error *inside* a stream, one that shuts
down sends ``finish_reason: abort``. Moments are on the clock of the running loop, in seconds.
"""

from __future__ import annotations

import asyncio
import email.utils
import math
import ssl
import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
import openai
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, field_validator

from .errors import (
    AnswerCutError,
    AttemptError,
    AttemptTimeoutError,
    ConnectError,
    ConnectTimeoutError,
    MalformedAnswerError,
    StatusError,
)

Messages = Iterable[Mapping[str, Any]]

FAILED_FINISHES = ("abort", "error")  # vLLM: shut down under the request, or failed inside the engine
OUTPUT_FIELDS = ("content", "reasoning", "reasoning_content", "tool_calls")
KEEP_ALIVE_SECONDS = 2.0  # vLLM closes an idle connection after 5 s, and must not do so under a request
GIVEN_UP = "no answer, and a health check failed meanwhile"
REMEDIES = {401: "; check the API key", 403: "; check the API key", 404: "; check the URL and the model name"}
MESSAGE_LIMIT = 300  # characters of a server's message that are worth repeating
# What reading an answer raises that is none; the last of them is of JSON that is too deep.
UNREADABLE = (ValueError, TypeError, AttributeError, KeyError, RecursionError)


class Options(BaseModel):
    """Values that never change, and no others than those it names."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class EndpointConfig(Options):
    """One server: its URL up to ``/v1``, and a name for messages."""

    url: str
    name: str = Field(min_length=1)

    @field_validator("url")
    @classmethod
    def _usable(cls, url: str) -> str:
        url = url.rstrip("/")
        try:
            parts = httpx2.URL(url)
            usable = parts.scheme in ("http", "https") and bool(parts.host) and not parts.query and not parts.userinfo
        except httpx2.InvalidURL:
            usable = False
        if not usable or not url.endswith("/v1"):
            raise ValueError("wanted a URL such as http://127.0.0.1:8001/v1")
        return url


class Timeouts(Options):
    """All in seconds.

    ``connect``: until there is a connection. ``first_token``: of a stream, from sending the request to its
    first output, so it must exceed the longest wait in the server's queue and the longest prompt. ``idle``: of a
    stream, between two pieces. ``total``: for the whole call, with its wait for a free slot, retries and pauses.
    """

    connect: PositiveFloat = 5.0
    first_token: PositiveFloat = 60.0
    idle: PositiveFloat = 30.0
    total: PositiveFloat = 300.0


@dataclass
class Record:
    """What is measured of one call."""

    first_output: float | None = None
    text: list[str] = field(default_factory=list)
    usage: CompletionUsage | None = None


class Transport:
    """The connections to one endpoint, within one event loop.

    ``heard`` is the moment of the last piece of an answer, of whichever request.
    """

    def __init__(
        self, endpoint: EndpointConfig, model: str, key: str | None, timeouts: Timeouts, verify: ssl.SSLContext | bool
    ) -> None:
        self.heard = -math.inf
        self._name = endpoint.name
        self._model = model
        self._timeouts = timeouts
        self._unheard: set[asyncio.Timeout] = set()  # of attempts under way that have had no output yet,
        self._streaming: set[asyncio.Timeout] = set()  # and of all others
        self._client = openai.AsyncOpenAI(
            base_url=endpoint.url,
            api_key=key or "none",  # the SDK wants one, and engines without a key do not look
            max_retries=0,
            timeout=httpx2.Timeout(None, connect=timeouts.connect),
            http_client=openai.DefaultAsyncHttpxClient(
                verify=verify,
                limits=httpx2.Limits(keepalive_expiry=KEEP_ALIVE_SECONDS),
            ),
        )

    async def aclose(self) -> None:
        """Close all connections, and end the attempts under way as if they were late."""
        _expire(self._unheard | self._streaming)
        await self._client.close()

    def give_up(self) -> None:
        """End the attempts that may be repeated elsewhere: whole answers, and streams without any output."""
        _expire(self._unheard)

    async def complete(
        self, messages: Messages, options: Mapping[str, Any], deadline: float, record: Record
    ) -> AsyncGenerator[ChatCompletion]:
        """One whole answer. Raises AttemptError, and TimeoutError at the deadline."""
        now = asyncio.get_running_loop().time
        try:
            async with _limited(deadline, self._unheard):
                with self._translated():
                    # Raw, as the SDK's own reading of a broken body raises what is no error of the SDK.
                    response = await self._client.chat.completions.with_raw_response.create(
                        **self._request(messages, options), stream=False
                    )
        except TimeoutError:
            if now() >= deadline:
                raise
            raise AttemptTimeoutError(self._name, GIVEN_UP) from None
        with self._understood():
            answer: ChatCompletion = response.parse()
            record.usage = answer.usage
            finishes = [(choice.message.role, choice.finish_reason)[1] for choice in answer.choices]
        if not finishes or not all(finishes) or any(finish in FAILED_FINISHES for finish in finishes):
            raise AnswerCutError(self._name, "the server gave the request up", f"finish_reason {finishes}")
        self.heard = now()
        yield answer

    async def stream(
        self, messages: Messages, options: Mapping[str, Any], deadline: float, record: Record
    ) -> AsyncGenerator[str]:
        """The pieces of the answer's text as they come. Raises AttemptError, and TimeoutError at the deadline."""
        now = asyncio.get_running_loop().time
        limit, found = now() + self._timeouts.first_token, f"no token within {self._timeouts.first_token:g} s"
        finished = False
        chunks: openai.AsyncStream[ChatCompletionChunk] | None = None
        try:
            while True:
                try:
                    limits = self._unheard if record.first_output is None else self._streaming
                    async with _limited(min(limit, deadline), limits):
                        with self._translated():
                            chunks = chunks or await self._open(messages, options)
                            with self._understood():
                                chunk = await anext(chunks, None)
                except TimeoutError:
                    if now() >= deadline:
                        raise
                    raise AttemptTimeoutError(self._name, found if now() >= limit else GIVEN_UP) from None
                if chunk is None:
                    break
                with self._understood():
                    record.usage = chunk.usage or record.usage
                    text, output, finish = _read(chunk)
                if finish in FAILED_FINISHES:
                    raise AnswerCutError(self._name, "the server gave the request up", f"finish_reason {finish}")
                self.heard = now()
                finished = finished or bool(finish)
                if output and record.first_output is None:
                    record.first_output = now()
                if text:
                    record.text.append(text)
                    yield text
                if record.first_output is not None:
                    limit, found = now() + self._timeouts.idle, f"nothing for {self._timeouts.idle:g} s in a stream"
            if not finished:
                raise AnswerCutError(self._name, "the stream ended without a finish_reason")
        except AttemptError as error:
            error.output = record.first_output is not None
            raise
        finally:
            if chunks is not None:
                await chunks.close()

    def _request(self, messages: Messages, options: Mapping[str, Any]) -> dict[str, Any]:
        return {**options, "model": self._model, "messages": list(messages)}

    async def _open(self, messages: Messages, options: Mapping[str, Any]) -> openai.AsyncStream[ChatCompletionChunk]:
        # The last piece of a stream tells the tokens.
        options = {"stream_options": {"include_usage": True}, **options}
        chunks: openai.AsyncStream[ChatCompletionChunk] = await self._client.chat.completions.create(
            **self._request(messages, options), stream=True
        )
        return chunks

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Whatever the SDK raises, as an AttemptError."""
        try:
            yield
        except openai.APIStatusError as error:
            reason = f"HTTP {error.status_code}{REMEDIES.get(error.status_code, '')}"
            wait = _retry_after(error.response.headers.get("retry-after"))
            raise StatusError(self._name, reason, _said(error), error.status_code, wait) from error
        except openai.APITimeoutError as error:
            raise ConnectTimeoutError(self._name, f"no connection within {self._timeouts.connect:g} s") from error
        except (openai.APIConnectionError, httpx2.HTTPError) as error:
            cause = error.__cause__ if isinstance(error, openai.APIError) else error
            if isinstance(cause, httpx2.ConnectError):
                raise ConnectError(self._name, "no connection", str(cause)) from error
            raise AnswerCutError(self._name, "the connection broke", str(cause)) from error
        except openai.APIError as error:
            code = str(error.code)
            status = int(code) if len(code) == 3 and code.isdecimal() else None
            raise StatusError(self._name, "an error inside the answer", _said(error), status) from error

    @contextmanager
    def _understood(self) -> Iterator[None]:
        """An answer that is none, as a MalformedAnswerError."""
        try:
            yield
        except (*UNREADABLE, openai.APIResponseValidationError) as error:
            said = f"{type(error).__name__}: {error}"[:MESSAGE_LIMIT]
            raise MalformedAnswerError(self._name, "no chat completion", said) from error


@asynccontextmanager
async def _limited(moment: float, limits: set[asyncio.Timeout]) -> AsyncGenerator[None]:
    """Raises TimeoutError at a moment, or earlier where the limit is made to expire."""
    async with asyncio.timeout_at(moment) as limit:
        limits.add(limit)
        try:
            yield
        finally:
            limits.remove(limit)


def _expire(limits: Iterable[asyncio.Timeout]) -> None:
    for limit in limits:
        if not limit.expired():  # its own moment can have come in the same turn of the event loop
            limit.reschedule(asyncio.get_running_loop().time())


def _read(chunk: ChatCompletionChunk) -> tuple[str, bool, str | None]:
    """The text of a piece of a stream, whether it carries any output, and its finish_reason."""
    for choice in chunk.choices[:1]:
        output = any(getattr(choice.delta, name, None) for name in OUTPUT_FIELDS)
        return choice.delta.content or "", output, choice.finish_reason
    return "", False, None


def _said(error: openai.APIError) -> str:
    """The server's own words in an error."""
    said = error.body.get("message") if isinstance(error.body, Mapping) else None
    return str(said or error.message)[:MESSAGE_LIMIT]


def _retry_after(header: str | None) -> float | None:
    """Seconds from now, of a header that has seconds or a date; None where it has neither."""
    try:
        seconds = float(header or "")
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header or "").timestamp() - time.time()
        except (ValueError, OverflowError, OSError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None

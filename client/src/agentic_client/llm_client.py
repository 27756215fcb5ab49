"""The client: round robin over equal endpoints, failover, retries, deadlines.

The rules of when a request is sent again are in _retry_policy.py, and the project's failover drill follows
the same. Moments are on the clock of the running loop; all times are seconds.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import ssl
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from openai.types.chat import ChatCompletion

from ._retry_policy import OVERLOADED, RetryRules, Standing, choose, ready
from ._transport import EndpointConfig, Messages, Record, Timeouts, Transport
from .config import load_config
from .errors import (
    AttemptError,
    ClientClosedError,
    ConfigError,
    ConnectTimeoutError,
    DeadlineExceededError,
    RequestRejectedError,
    RetriesExhaustedError,
    StreamInterruptedError,
)
from .events import AttemptFailed, CallEnded, EndpointChanged, Event, Waiting

__all__ = ["DualEndpointLLMClient", "EndpointConfig", "RetryRules", "Timeouts"]

KEY_VARIABLES = ("VLLM_API_KEY", "OPENAI_API_KEY")
RETRY_RULES = RetryRules(jitter=0.2)
PROBE = ({"role": "user", "content": "ping"},)

T = TypeVar("T")
#: attempt(transport, deadline, record): the answer in one or many pieces
Attempt = Callable[[Transport, float, Record], AsyncGenerator[T]]

log = logging.getLogger("agentic_client")


class _Member(Standing):
    """An endpoint, its connections and what the client thinks of it."""

    transport: Transport

    def __init__(self, endpoint: EndpointConfig) -> None:
        super().__init__()
        self.endpoint = endpoint
        self.name = endpoint.name


class DualEndpointLLMClient:
    """A client of one or more endpoints that serve the same model.

    ``api_key`` is by default taken from the environment: VLLM_API_KEY, then OPENAI_API_KEY.
    ``health_interval`` is the seconds between two health checks of a healthy endpoint. A check asks for one
    token, because a vLLM whose engine hangs still answers /health. An endpoint hangs when it gives neither that
    token nor a piece of any answer within ``health_timeout`` seconds. An endpoint that failed is checked after
    the pauses of ``retry``, until it answers. ``max_concurrent`` calls are under way at a time, others wait.
    ``max_tokens`` is the most tokens of a reply where a call does not say; without it the server decides.
    ``ca_file`` is a PEM file with the authority of the endpoints' certificates. ``on_event`` is called in the
    event loop and must be quick; an exception in it is logged and goes no further.

    Checks begin with the first call and end with ``aclose``, ``async with`` or the event loop. A client
    belongs to one event loop at a time.

    Raises ValueError, and OSError for a ``ca_file`` without certificates.
    """

    def __init__(
        self,
        endpoints: Sequence[EndpointConfig],
        model_name: str,
        *,
        api_key: str | None = None,
        timeouts: Timeouts | None = None,
        health_interval: float = 30.0,
        health_timeout: float = 10.0,
        retry: RetryRules = RETRY_RULES,
        max_concurrent: int = 4,
        max_tokens: int | None = None,
        ca_file: str | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        names = [endpoint.name for endpoint in endpoints]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"wanted one or more endpoints with different names, found {names}")
        if health_interval <= 0 or health_timeout <= 0 or max_concurrent < 1:
            raise ValueError(
                "wanted a health_interval and a health_timeout above 0 s, and a max_concurrent of 1 or more"
            )
        self.model_name = model_name
        self.timeouts = timeouts or Timeouts()
        self.health_interval = health_interval
        self.health_timeout = health_timeout
        self.retry = retry
        self.max_concurrent = max_concurrent
        self.max_tokens = max_tokens
        self._key = api_key or next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)
        self._verify = ssl.create_default_context(cafile=ca_file) if ca_file else True
        self._on_event = on_event
        self._members = [_Member(endpoint) for endpoint in endpoints]
        self._keeper: asyncio.Task[None] | None = None
        self._closed = False

    @classmethod
    def from_config(cls, path: str | Path, *, on_event: Callable[[Event], None] | None = None) -> Self:
        """A client as a configuration file describes it. Raises ConfigError."""
        config = load_config(path)
        llm = config.llm
        try:
            return cls(
                llm.endpoints,
                llm.model_name,
                api_key=llm.read_key(),
                timeouts=llm.timeouts,
                health_interval=llm.health_check.interval,
                health_timeout=llm.health_check.timeout,
                retry=RetryRules(llm.retry.attempts, tuple(llm.retry.backoff_seconds), RETRY_RULES.jitter),
                max_concurrent=llm.max_concurrent,
                max_tokens=config.conversation.reply_reserve_tokens,
                ca_file=llm.ca_file,
                on_event=on_event,
            )
        except OSError as error:
            raise ConfigError(
                f"{path}: llm.ca_file: wanted a readable PEM file with certificates in {llm.ca_file}, found: {error}"
            ) from error

    async def __aenter__(self) -> Self:
        self._start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the health checks and close all connections; calls under way fail with ClientClosedError."""
        self._closed = True
        keeper, self._keeper = self._keeper, None
        if keeper is not None and not keeper.done():
            self._publish()
            self._slots.release()  # a call that waits for a slot gets it, learns that it is late, and passes it on
            keeper.cancel()
            await asyncio.wait([keeper])
            await self._disconnect()  # one that had not begun yet leaves it to do

    def healthy(self) -> list[str]:
        """Names of the endpoints in the round now."""
        return [member.name for member in self._members if member.healthy]

    async def chat_completion(
        self, messages: Messages, *, timeout: float | None = None, **options: Any
    ) -> ChatCompletion:
        """The whole answer, as OpenAI's SDK has it: ``.choices[0].message``, ``.usage``.

        ``timeout`` is the total of this call in seconds instead of the client's. ``options`` go to the server:
        ``max_tokens``, ``temperature``, ``tools``, ``extra_body`` and whatever else the SDK takes.

        Raises RequestRejectedError, RetriesExhaustedError, DeadlineExceededError or ClientClosedError.
        """

        options, messages = self._limited(options), tuple(messages)  # each attempt reads them

        def attempt(transport: Transport, deadline: float, record: Record) -> AsyncGenerator[ChatCompletion]:
            return transport.complete(messages, options, deadline, record)

        # To the end, where the call is noted as a success.
        async with aclosing(self._call(attempt, timeout)) as answers:
            (answer,) = [each async for each in answers]
        return answer

    async def chat_completion_stream(
        self, messages: Messages, *, timeout: float | None = None, **options: Any
    ) -> AsyncGenerator[str]:
        """The pieces of the answer's text as they come; arguments as of ``chat_completion``.

        Reasoning and tool calls are not text: for those, use ``chat_completion``. Raises what that one raises,
        StreamInterruptedError for a stream that broke after its first output, and ValueError for more than one
        choice (``n``), whose pieces would come mixed.
        """

        count = {**options, **(options.get("extra_body") or {})}.get("n")
        if isinstance(count, int) and count > 1:
            raise ValueError(f"wanted one choice in a stream, found n={count}: use chat_completion")
        options, messages = self._limited(options), tuple(messages)

        def attempt(transport: Transport, deadline: float, record: Record) -> AsyncGenerator[str]:
            return transport.stream(messages, options, deadline, record)

        async with aclosing(self._call(attempt, timeout)) as pieces:
            async for piece in pieces:
                yield piece

    def _limited(self, options: dict[str, Any]) -> dict[str, Any]:
        if self.max_tokens is None or "max_completion_tokens" in options:
            return options
        return {"max_tokens": self.max_tokens, **options}

    def _start(self) -> None:
        """Open the connections and begin the checks, unless that was done in this event loop."""
        if self._closed:
            raise ClientClosedError("the client is closed")
        if self._keeper is None or self._keeper.done():
            for member in self._members:
                member.transport = Transport(member.endpoint, self.model_name, self._key, self.timeouts, self._verify)
            self._slots = asyncio.Semaphore(self.max_concurrent)
            self._news = asyncio.Event()
            self._keeper = asyncio.create_task(self._keep(), name="agentic_client health checks")

    async def _call(self, attempt: Attempt[T], timeout: float | None) -> AsyncGenerator[T]:
        """The answer of the first attempt that succeeds, and news of the call for the hook."""
        self._start()
        slots = self._slots  # the client may have others before this call ends, in another event loop
        call = _Call(asyncio.get_running_loop().time(), self.timeouts.total if timeout is None else timeout)
        error: BaseException | None = None
        try:
            try:
                async with asyncio.timeout_at(call.deadline):
                    await slots.acquire()
            except TimeoutError:
                raise DeadlineExceededError(call.seconds, call.errors) from None
            try:
                self._require_open()
                async with aclosing(self._attempts(call, attempt)) as pieces:
                    async for piece in pieces:
                        yield piece
            finally:
                slots.release()
        except BaseException as found:
            error = found
            raise
        finally:
            self._tell(call.ended(asyncio.get_running_loop().time(), error))

    async def _attempts(self, call: _Call, attempt: Attempt[T]) -> AsyncGenerator[T]:
        now = asyncio.get_running_loop().time
        tried: dict[_Member, int] = {}  # and how many events each had seen when it was chosen
        pauses = 0
        while True:
            resume = now() + self.retry.pause(pauses, random.random())
            await self._wait(call, tried, resume)
            member = choose(self._members, tried, now(), resume)
            pauses += member in tried
            seen, begun, record = member.events, now(), Record()
            call.begin(member.name, record)
            try:
                async with aclosing(attempt(member.transport, call.deadline, record)) as pieces:
                    async for piece in pieces:
                        yield piece
                        self._require_open()
                self._mark(member, True, seen, "a request was answered")
                return
            except TimeoutError:
                late = DeadlineExceededError(call.seconds, call.errors)
                if record.first_output is None:
                    raise late from None
                raise StreamInterruptedError(late, "".join(record.text)) from late
            except AttemptError as error:
                self._failed(call, member, seen, begun, error)
                tried[member] = seen
                if error.output:
                    raise StreamInterruptedError(error, "".join(record.text)) from error
            except RuntimeError as error:
                self._require_open(error)  # its connections were closed just before it would have used them
                raise

    def _failed(self, call: _Call, member: _Member, seen: int, begun: float, error: AttemptError) -> None:
        """Note a failed attempt. Raises where the call is over, unless a part of its answer is out already."""
        self._require_open(error)
        now = asyncio.get_running_loop().time()
        call.errors.append(error)
        kind, number = type(error).__name__, len(call.errors)
        self._tell(AttemptFailed(member.name, number, now - begun, kind, error.status, error.reason))
        if not error.failure.rejected:
            self._mark(member, False, seen, error.reason)
        if error.retry_after is not None:
            member.rest(now, error.retry_after)
        failures = [each.failure for each in call.errors]
        if error.output or self.retry.may_repeat(failures):
            return
        if error.failure.rejected and error.status not in OVERLOADED:
            raise RequestRejectedError(error) from error
        raise RetriesExhaustedError(f"gave up after {len(failures)} attempts", call.errors) from error

    async def _wait(self, call: _Call, tried: Mapping[_Member, int], resume: float) -> None:
        """Wait until an endpoint may be asked. What one of them does meanwhile can end the wait early."""
        now = asyncio.get_running_loop().time
        told = False
        while (until := min(ready(member, tried, resume) for member in self._members)) > now():
            rested = min(member.not_before for member in self._members)
            if rested >= call.deadline:
                why = f"the next attempt would be in {rested - now():.1f} s, after the call's {call.seconds:g} s"
                raise RetriesExhaustedError(why, call.errors)
            until = min(until, call.deadline)
            if not told:
                self._tell(Waiting(until - now()))
                told = True
            try:
                async with asyncio.timeout_at(until):
                    await self._news.wait()
            except TimeoutError:
                if now() >= call.deadline:
                    raise DeadlineExceededError(call.seconds, call.errors) from None
            self._require_open()

    def _require_open(self, cause: BaseException | None = None) -> None:
        if self._closed:
            raise ClientClosedError("the client was closed during the call") from cause

    def _mark(self, member: _Member, healthy: bool, seen: int, reason: str) -> None:
        before = member.healthy
        if member.mark(healthy, seen) and healthy != before:
            if healthy:
                log.info("%s is back: %s", member.name, reason)
            else:
                log.warning("%s is out: %s", member.name, reason)
            self._tell(EndpointChanged(member.name, healthy, reason))
            self._publish()

    def _publish(self) -> None:
        """Wake all that wait for news."""
        self._news.set()
        self._news = asyncio.Event()

    def _tell(self, event: Event) -> None:
        if self._on_event is not None:
            try:
                self._on_event(event)
            except Exception:
                log.exception("the on_event hook failed")

    async def _keep(self) -> None:
        """Check all endpoints for as long as the event loop runs, and close the connections at its end."""
        try:
            async with asyncio.TaskGroup() as group:
                for member in self._members:
                    group.create_task(self._watch(member), name=f"agentic_client checks {member.name}")
        finally:
            await self._disconnect()

    async def _disconnect(self) -> None:
        for member in self._members:
            await member.transport.aclose()

    async def _watch(self, member: _Member) -> None:
        loop = asyncio.get_running_loop()
        failed = 0  # checks in a row
        while True:
            known = member.healthy
            pause = self.health_interval
            if not known:
                pause = min(pause, self.retry.pause(failed, random.random()))
            due = loop.time() + pause
            with suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    while member.healthy == known:
                        await self._news.wait()
                failed = 0
                continue  # it changed meanwhile: so does the pause
            failed = 0 if await self._check(member) else failed + 1

    async def _check(self, member: _Member) -> bool:
        """Ask for one token and judge the endpoint by it; whether it is well."""
        seen, begun = member.events, asyncio.get_running_loop().time()
        well = late = away = False
        try:
            probe = member.transport.complete(PROBE, {"max_tokens": 1}, begun + self.health_timeout, Record())
            async with aclosing(probe) as answer:
                await anext(answer)
            well, reason = True, "a health check was answered"
        except TimeoutError:
            late, reason = True, f"no token within {self.health_timeout:g} s in a health check"
        except AttemptError as error:
            away = isinstance(error, ConnectTimeoutError)
            well, reason = error.status in OVERLOADED, f"{error.reason} in a health check"
        except Exception as error:  # whatever it is, it must not end the checks of all endpoints
            reason = f"{type(error).__name__} in a health check"
            log.error("%s: unexpected %s", member.name, reason)
        if (late or away) and member.transport.heard >= begun:  # busy is not dead
            well, reason = True, "it gave a part of an answer during a health check"
        self._mark(member, well, seen, reason)
        # What is under way at a host that is away is lost. One that is late may be busy after all, so that what it has
        # not begun to answer leaves it only for a better place.
        better = any(other.healthy for other in self._members if other is not member)
        if not well and (away or (late and better)):
            member.transport.give_up()
        return well


@dataclass
class _Call:
    """One call: its time and its attempts so far."""

    started: float
    seconds: float
    errors: list[AttemptError] = field(default_factory=list)
    attempts: int = 0
    endpoint: str | None = None
    record: Record = field(default_factory=Record)

    @property
    def deadline(self) -> float:
        return self.started + self.seconds

    def begin(self, endpoint: str, record: Record) -> None:
        """Another attempt."""
        self.attempts += 1
        self.endpoint = endpoint
        self.record = record

    def ended(self, now: float, error: BaseException | None) -> CallEnded:
        first, usage = self.record.first_output, self.record.usage
        return CallEnded(
            endpoint=self.endpoint,
            seconds=now - self.started,
            attempts=self.attempts,
            first_token_seconds=None if first is None else first - self.started,
            prompt_tokens=usage.prompt_tokens if usage else None,
            completion_tokens=usage.completion_tokens if usage else None,
            error=type(error).__name__ if error else None,
        )

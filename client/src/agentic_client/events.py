"""What a client tells its ``on_event`` hook, for logs and metrics. All times are seconds.

Nothing here comes from a prompt, an answer or a server's message: those are in the exceptions alone.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EndpointChanged:
    """An endpoint left the round, or came back."""

    endpoint: str
    healthy: bool
    reason: str


@dataclass(frozen=True)
class AttemptFailed:
    """One attempt of a call failed; ``number`` counts from 1, ``error`` is the name of its class.

    ``status`` is that of HTTP or of an error inside an answer, where there was one.
    """

    endpoint: str
    number: int
    seconds: float
    error: str
    status: int | None
    reason: str


@dataclass(frozen=True)
class Waiting:
    """A call waits before its next attempt, at most so long."""

    seconds: float


@dataclass(frozen=True)
class CallEnded:
    """A call ended, well or not.

    ``endpoint`` is the last one that was asked. ``seconds`` includes the wait for a free slot, retries and
    pauses; ``first_token_seconds`` too, and is only known of streams. ``error`` is the name of the
    exception's class, or None; GeneratorExit is a stream that its reader left. Tokens are as the server counted them.
    """

    endpoint: str | None
    seconds: float
    attempts: int
    first_token_seconds: float | None
    prompt_tokens: int | None
    completion_tokens: int | None
    error: str | None


Event = EndpointChanged | AttemptFailed | Waiting | CallEnded

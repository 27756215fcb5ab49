"""What can go wrong. All of it is an LLMClientError.

No message repeats the key or a prompt by itself. But a message tells what a server said, and servers may repeat a part
of the prompt; so logs and events have a failure's ``reason``, which is this package's own words, and not its message.
"""

from __future__ import annotations

from collections.abc import Sequence

from ._retry_policy import Failure


class LLMClientError(Exception):
    """Any failure of this package."""


class ConfigError(LLMClientError, ValueError):
    """A configuration file that cannot be used; the message names the file and every wrong value."""


class ClientClosedError(LLMClientError):
    """The client was closed before or during the call."""


class TokenCountError(LLMClientError):
    """Tokens could not be counted."""


class TurnTooLargeError(LLMClientError):
    """The system prompt and the last turn alone are larger than the window.

    ``found`` and ``wanted`` are tokens.
    """

    def __init__(self, found: int, wanted: int) -> None:
        super().__init__(
            f"the system prompt and the last turn have {found} tokens, wanted at most {wanted} (window_tokens): "
            f"shorten the last message, or raise the window together with max-model-len of the engines"
        )
        self.found = found
        self.wanted = wanted


class AttemptError(LLMClientError):
    """One attempt of a call that failed at one endpoint.

    ``reason`` says what happened in this package's words; only the message has ``said`` too, the server's or a
    library's. ``status`` is that of HTTP or of an error inside an answer. ``retry_after`` is in seconds, as the server
    has it. ``output`` is true when a part of the answer had arrived.
    """

    def __init__(
        self, endpoint: str, reason: str, said: str = "", status: int | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(": ".join(filter(None, (endpoint, reason, said))))
        self.endpoint = endpoint
        self.reason = reason
        self.status = status
        self.retry_after = retry_after
        self.output = False

    @property
    def failure(self) -> Failure:
        """The same in the words of the retry policy."""
        return Failure(self.status, reached=not isinstance(self, ConnectError), output=self.output)


class ConnectError(AttemptError):
    """No connection was made, so that no engine can have seen the request."""


class ConnectTimeoutError(ConnectError):
    """Nobody answered within the time to connect: the host is away, or takes no connections."""


class StatusError(AttemptError):
    """The server answered with an error: an HTTP status of 4xx or 5xx, or one inside a stream."""


class AttemptTimeoutError(AttemptError):
    """The endpoint took longer than one of the timeouts allows."""


class AnswerCutError(AttemptError):
    """The answer ended before it was complete."""


class MalformedAnswerError(AttemptError):
    """The answer is not what the protocol says: no JSON, or not the JSON of a completion."""


class RequestRejectedError(LLMClientError):
    """The server refused the request itself (4xx); it would refuse it again. ``status`` is HTTP's."""

    def __init__(self, error: AttemptError) -> None:
        super().__init__(str(error))
        self.endpoint = error.endpoint
        self.status = error.status


class RetriesExhaustedError(LLMClientError):
    """Every attempt failed, and there may be no more. ``attempts`` are their errors, oldest first."""

    def __init__(self, why: str, attempts: Sequence[AttemptError]) -> None:
        super().__init__("; ".join([why, *map(str, attempts)]))
        self.attempts = tuple(attempts)


class DeadlineExceededError(LLMClientError, TimeoutError):
    """The call took longer than its total time. ``attempts`` are the errors before that, oldest first."""

    def __init__(self, seconds: float, attempts: Sequence[AttemptError]) -> None:
        super().__init__("; ".join([f"no answer within {seconds:g} s", *map(str, attempts)]))
        self.attempts = tuple(attempts)


class StreamInterruptedError(LLMClientError):
    """A stream ended after its first output and before its end. It is never sent again.

    ``text`` is what had arrived. The cause is an AttemptError or a DeadlineExceededError.
    """

    def __init__(self, cause: LLMClientError, text: str) -> None:
        super().__init__(f"the answer was cut off after {len(text)} characters: {cause}")
        self.text = text

"""A client for several equal vLLM endpoints. See README.md."""

from .conversation_history import DEFAULT_SYSTEM_PROMPT, ConversationHistory, create_conversation_history
from .errors import (
    AnswerCutError,
    AttemptError,
    AttemptTimeoutError,
    ClientClosedError,
    ConfigError,
    ConnectError,
    ConnectTimeoutError,
    DeadlineExceededError,
    LLMClientError,
    MalformedAnswerError,
    RequestRejectedError,
    RetriesExhaustedError,
    StatusError,
    StreamInterruptedError,
    TokenCountError,
    TurnTooLargeError,
)
from .llm_client import DualEndpointLLMClient, EndpointConfig, RetryRules, Timeouts

__all__ = [
    "DEFAULT_SYSTEM_PROMPT",
    "AnswerCutError",
    "AttemptError",
    "AttemptTimeoutError",
    "ClientClosedError",
    "ConfigError",
    "ConnectError",
    "ConnectTimeoutError",
    "ConversationHistory",
    "DeadlineExceededError",
    "DualEndpointLLMClient",
    "EndpointConfig",
    "LLMClientError",
    "MalformedAnswerError",
    "RequestRejectedError",
    "RetriesExhaustedError",
    "RetryRules",
    "StatusError",
    "StreamInterruptedError",
    "Timeouts",
    "TokenCountError",
    "TurnTooLargeError",
    "create_conversation_history",
]

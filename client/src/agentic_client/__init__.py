"""A client for several equal vLLM endpoints. See README.md."""

from .conversation_history import DEFAULT_SYSTEM_PROMPT, ConversationHistory, create_conversation_history
from .llm_client import DualEndpointLLMClient, EndpointConfig, Timeouts

__all__ = [
    "DEFAULT_SYSTEM_PROMPT",
    "ConversationHistory",
    "DualEndpointLLMClient",
    "EndpointConfig",
    "Timeouts",
    "create_conversation_history",
]

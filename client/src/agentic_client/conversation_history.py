"""A conversation that always fits the model's window.

The system prompt comes first and never changes by a byte, so that the engines' prefix caches keep it.
What goes, when the window is full, are whole turns from the oldest on: a user's message with all that
followed it. So a tool's answer never stays behind without its call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from openai.types.chat import ChatCompletionMessage

from .config import load_config
from .errors import TurnTooLargeError
from .token_counters import HarmonyTokenCounter, Message, TokenCounter, Tool

__all__ = ["DEFAULT_SYSTEM_PROMPT", "ConversationHistory", "create_conversation_history"]

DEFAULT_SYSTEM_PROMPT = (
    "You are Agentic 2.0, an AI coding assistant. You write, change and explain code, fix bugs, research and "
    "process data, and you use the tools you are given. Prefer correct, simple and tested solutions. "
    "Say so when you do not know."
)
WINDOW_TOKENS = 3072  # the guide's: max-model-len 4096 less 1024 for the reply


class ConversationHistory:
    """A system prompt and turns; ``fit`` gives what to send.

    ``window_tokens`` is the most that a prompt may have, ``tools`` the tools that go with each request and
    count too. The default ``counter`` is for gpt-oss and needs the extra ``harmony``.
    """

    def __init__(
        self,
        system_prompt: str = DEFAULT_SYSTEM_PROMPT,
        *,
        window_tokens: int = WINDOW_TOKENS,
        counter: TokenCounter | None = None,
        tools: Sequence[Tool] = (),
    ) -> None:
        if window_tokens < 1:
            raise ValueError(f"wanted a window_tokens of 1 or more, found {window_tokens}")
        self._system_prompt = system_prompt
        self.window_tokens = window_tokens
        self.tools = tuple(deepcopy([dict(tool) for tool in tools]))
        self._counter = counter
        self._turns: list[list[dict[str, Any]]] = []

    @property
    def system_prompt(self) -> str:
        """It never changes: another prompt is another conversation."""
        return self._system_prompt

    @property
    def messages(self) -> list[dict[str, Any]]:
        """All that is kept, the system prompt first. A copy."""
        return deepcopy(self._assemble(self._turns))

    def add_user(self, text: str) -> None:
        """Begin a turn."""
        self.add({"role": "user", "content": text})

    def add_assistant(self, answer: str | ChatCompletionMessage) -> None:
        """The model's answer: its text, or the SDK's message, with its tool calls."""
        if isinstance(answer, str):
            self.add({"role": "assistant", "content": answer})
        else:
            self.add({"content": None, **answer.model_dump(exclude_none=True)})

    def add_tool(self, tool_call_id: str, text: str) -> None:
        """A tool's answer to a call in the same turn."""
        self.add({"role": "tool", "tool_call_id": tool_call_id, "content": text})

    def add(self, message: Message) -> None:
        """Any message as the API has it. Raises ValueError for one that cannot stand here."""
        role = message.get("role")
        if role not in ("user", "assistant", "tool"):
            raise ValueError(f"wanted a message of user, assistant or tool, found {role!r}; there is one system prompt")
        if role == "tool" and message.get("tool_call_id") not in self._calls():
            raise ValueError(
                f"wanted a tool_call_id of this turn ({', '.join(self._calls()) or 'there is none'}), "
                f"found {message.get('tool_call_id')!r}"
            )
        if role == "user" or not self._turns:
            self._turns.append([])
        self._turns[-1].append(deepcopy(dict(message)))

    def clear(self) -> None:
        """Forget all turns; the system prompt stays."""
        self._turns.clear()

    async def count(self) -> int:
        """Tokens of all that is kept. Raises TokenCountError."""
        return await self._count(self._turns)

    async def fit(self) -> list[dict[str, Any]]:
        """Drop the oldest turns until the rest fits the window, and return it to be sent.

        Raises TurnTooLargeError where the last turn alone does not fit, and then drops nothing;
        TokenCountError.
        """
        turns = [list(turn) for turn in self._turns]  # what is added meanwhile is the next call's
        oldest = list(self._turns)
        while (found := await self._count(turns)) > self.window_tokens:
            if len(turns) <= 1:
                raise TurnTooLargeError(found, self.window_tokens)
            del turns[0]
        # Another call may have dropped some of them meanwhile, so they are not the first ones any more.
        dropped = {id(turn) for turn in oldest[: len(oldest) - len(turns)]}
        self._turns[:] = [turn for turn in self._turns if id(turn) not in dropped]
        return deepcopy(self._assemble(turns))

    def _assemble(self, turns: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.system_prompt}, *(message for turn in turns for message in turn)]

    async def _count(self, turns: Sequence[Sequence[dict[str, Any]]]) -> int:
        if self._counter is None:
            self._counter = HarmonyTokenCounter()
        return await self._counter.count(self._assemble(turns), self.tools)

    def _calls(self) -> list[str]:
        turn = self._turns[-1] if self._turns else []
        return [call["id"] for message in turn for call in message.get("tool_calls") or ()]


def create_conversation_history(
    system_prompt: str = DEFAULT_SYSTEM_PROMPT,
    *,
    config: str | Path | None = None,
    counter: TokenCounter | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> ConversationHistory:
    """An empty conversation; ``config`` is a configuration file, whose window it takes. Raises ConfigError."""
    window = load_config(config).conversation.window_tokens if config else WINDOW_TOKENS
    return ConversationHistory(system_prompt, window_tokens=window, counter=counter, tools=tools)

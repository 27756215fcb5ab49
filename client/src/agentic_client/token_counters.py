"""How many tokens a chat has as the engine will see it, with everything that the chat's format adds."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import httpx2

from .errors import TokenCountError

Message = Mapping[str, Any]
Tool = Mapping[str, Any]


class TokenCounter(Protocol):
    """Counts a chat's tokens: what the server will call ``usage.prompt_tokens``."""

    async def count(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> int:
        """Raises TokenCountError."""
        ...


class ServerTokenCounter:
    """Asks an engine's ``/tokenize``: exact for every model that vLLM renders with its chat template.

    Not for gpt-oss, which vLLM renders without one: take HarmonyTokenCounter. ``url`` is an engine's, up to
    ``/v1``; a gateway does not pass ``/tokenize``. ``timeout`` is in seconds.
    """

    def __init__(self, url: str, model_name: str, *, api_key: str | None = None, timeout: float = 10.0) -> None:
        self._url = url.rstrip("/").removesuffix("/v1") + "/tokenize"
        self._model = model_name
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = timeout

    async def count(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> int:
        """Raises TokenCountError."""
        body: dict[str, Any] = {"model": self._model, "messages": list(messages)}
        if tools:
            body["tools"] = list(tools)
        try:
            async with httpx2.AsyncClient(timeout=self._timeout, headers=self._headers) as client:
                response = await client.post(self._url, json=body)
            response.raise_for_status()
            return int(response.json()["count"])
        except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
            raise TokenCountError(
                f"{self._url}: wanted the number of tokens, found {error}; is this an engine, and not a gateway?"
            ) from error


class HarmonyTokenCounter:
    """Counts offline, exactly as vLLM 0.32.0 renders chats of gpt-oss. Needs the extra ``harmony``."""

    def __init__(self) -> None:
        try:
            import openai_harmony
        except ImportError as error:
            raise TokenCountError(
                "counting without a server needs the package oss-harmony: pip install agentic-client[harmony], "
                "or pass another counter"
            ) from error
        self._harmony = openai_harmony
        name = openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS
        self._encoding = openai_harmony.load_harmony_encoding(name)

    async def count(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> int:
        """Raises TokenCountError."""
        try:
            return self._count(messages, tools)
        except (ValueError, TypeError, KeyError, AttributeError, self._harmony.HarmonyError) as error:
            raise TokenCountError(f"these messages cannot be rendered for gpt-oss: {error}") from error

    def _count(self, messages: Sequence[Message], tools: Sequence[Tool]) -> int:
        harmony = self._harmony
        rest = list(messages)
        instructions = None
        if rest and rest[0]["role"] in ("system", "developer"):
            instructions = _text(rest.pop(0))
        rendered = [self._system()]
        if instructions or tools:
            rendered.append(self._developer(instructions, tools))
        names = {call["id"]: call["function"]["name"] for each in rest for call in each.get("tool_calls") or ()}
        calls: list[str] = []
        for message in rest:
            rendered += self._render(message, names)
            calls += [call["function"]["name"] for call in message.get("tool_calls") or ()]
        tokens = self._encoding.render_conversation_for_completion(
            harmony.Conversation.from_messages(_without_old_thoughts(rendered)),
            harmony.Role.ASSISTANT,
            config=harmony.RenderConversationConfig(auto_drop_analysis=False),
        )
        return len(tokens) + sum(map(self._older_header, calls))

    def _older_header(self, function: str) -> int:
        """Tokens that vLLM's header of a tool call has more than Harmony's own: it keeps an older form."""
        older = (f"assistant to=functions.{function}", "commentary json")
        newer = ("assistant", f"commentary to=functions.{function} ", "json")
        special = 1  # <|constrain|>, which the older form has not
        return self._size(older) - self._size(newer) - special

    def _size(self, texts: Sequence[str]) -> int:
        return sum(len(self._encoding.encode(text)) for text in texts)

    def _system(self) -> Any:
        content = self._harmony.SystemContent.new()
        # Every date has as many tokens.
        content = content.with_conversation_start_date(datetime.date.today().isoformat())
        return self._harmony.Message.from_role_and_content(self._harmony.Role.SYSTEM, content)

    def _developer(self, instructions: str | None, tools: Sequence[Tool] = ()) -> Any:
        content = self._harmony.DeveloperContent.new()
        if instructions is not None:
            content = content.with_instructions(instructions)
        if tools:
            content = content.with_function_tools(
                [
                    self._harmony.ToolDescription.new(
                        name=tool["function"]["name"],
                        description=tool["function"].get("description") or "",
                        parameters=tool["function"].get("parameters"),
                    )
                    for tool in tools
                ]
            )
        return self._harmony.Message.from_role_and_content(self._harmony.Role.DEVELOPER, content)

    def _render(self, message: Message, names: Mapping[str, str]) -> list[Any]:
        make, roles = self._harmony.Message.from_role_and_content, self._harmony.Role
        role, text, calls = message["role"], _text(message), message.get("tool_calls") or ()
        if role in ("system", "developer"):
            return [self._developer(text)]
        if role == "tool":
            author = self._harmony.Author.new(roles.TOOL, f"functions.{names.get(message['tool_call_id'], '')}")
            answer = self._harmony.Message.from_author_and_content(author, text)
            return [answer.with_channel("commentary").with_recipient("assistant")]
        if role != "assistant":
            return [self._in_parts(roles.USER, message)]
        thought = message.get("reasoning")
        parts = [make(roles.ASSISTANT, thought).with_channel("analysis")] if thought else []
        if text and calls:
            parts.append(make(roles.ASSISTANT, text).with_channel("commentary"))
        elif text:
            parts.append(self._in_parts(roles.ASSISTANT, message).with_channel("final"))
        for call in calls:
            function = call["function"]
            part = make(roles.ASSISTANT, function.get("arguments") or "").with_channel("commentary")
            parts.append(part.with_recipient(f"functions.{function['name']}").with_content_type("json"))
        return parts

    def _in_parts(self, role: Any, message: Message) -> Any:
        """The engine encodes each part by itself, which can take more tokens than the whole text."""
        contents = [self._harmony.TextContent(text=text) for text in _texts(message)]
        return self._harmony.Message.from_role_and_contents(role, contents)


def _without_old_thoughts(messages: list[Any]) -> list[Any]:
    """Without the analysis before the last final answer: the model is not shown it again."""
    finals = [number for number, each in enumerate(messages) if each.channel == "final"]
    last = finals[-1] if finals else -1
    return [each for number, each in enumerate(messages) if number >= last or each.channel != "analysis"]


def _text(message: Message) -> str:
    return "".join(_texts(message))


def _texts(message: Message) -> list[str]:
    content = message.get("content") or ""
    return [content] if isinstance(content, str) else [part.get("text") or "" for part in content]

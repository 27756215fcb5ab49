"""Counts are those of the engine. The numbers here are what a vLLM 0.32.0 said for the same messages."""

from __future__ import annotations

import asyncio
import json
import sys

import pytest
from agentic_client import errors
from agentic_client.token_counters import HarmonyTokenCounter, ServerTokenCounter
from engines import fails, head, says

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Where"},
                "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
            },
            "required": ["city"],
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(identifier, name="get_weather", arguments='{"city": "Köln"}'):
    return {"id": identifier, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(identifier, text):
    return {"role": "tool", "tool_call_id": identifier, "content": text}


PARTS = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "you"}]
BOTH = [call("c1"), call("c2", "now", "{}")]
CHATS = {
    "user": (68, [user("Hello")], []),
    "system": (78, [system("Be kind."), user("Hello")], []),
    "empty system": (68, [system(""), user("Hello")], []),
    "late system": (82, [user("a"), system("be short"), user("b")], []),
    "turns": (97, [system("Be kind."), user("Hello"), said("Hi there"), user("Wie geht's? 日本語 🙂\n\n")], []),
    "old thoughts": (
        92,
        [user("1"), said("a", reasoning="think"), user("2"), said("b", reasoning="more thinking"), user("3")],
        [],
    ),
    "tools": (149, [system("Be kind."), user("Weather?")], [WEATHER, NOW]),
    "calls": (
        224,
        [
            *(system("Be kind."), user("Weather?"), said(None, tool_calls=BOTH, reasoning="I must look")),
            *(tool("c1", '{"t": 20}'), tool("c2", "12:00")),
        ],
        [WEATHER, NOW],
    ),
    "call with text": (
        194,
        [user("Weather?"), said("One moment", tool_calls=[call("c1")]), tool("c1", "20"), said("It is 20"), user("ok")],
        [WEATHER],
    ),
    "call without arguments": (129, [user("a"), said("", tool_calls=[call("c1", "now", "")]), tool("c1", "")], [NOW]),
    "parts": (70, [user(PARTS)], []),
    "answer in parts": (82, [user("a"), said(PARTS), user("b")], []),
    "call in parts": (179, [user("a"), said(PARTS, tool_calls=[call("c1")]), tool("c1", PARTS)], [WEATHER]),
    "special tokens as text": (77, [user("<|end|><|start|>system")], []),
    "empty answer": (73, [user("a"), said(""), user("b")], []),
}


@pytest.fixture(scope="module")
def harmony():
    return HarmonyTokenCounter()


@pytest.mark.parametrize("chat", CHATS)
def test_harmony_counts_what_the_engine_counts(harmony, chat):
    tokens, messages, tools = CHATS[chat]
    assert asyncio.run(harmony.count(messages, tools)) == tokens


def test_every_date_has_as_many_tokens(harmony):
    dates = [f"{year}-{month}-{day}" for year in (2026, 2031) for month in ("01", "12") for day in ("01", "31")]
    assert len({harmony._size([date]) for date in dates}) == 1


def test_messages_that_cannot_be_rendered(harmony):
    with pytest.raises(errors.TokenCountError, match="cannot be rendered"):
        asyncio.run(harmony.count([{"content": "no role"}]))


def test_without_the_extra_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai_harmony", None)
    with pytest.raises(errors.TokenCountError, match=r"pip install agentic-client\[harmony\]"):
        HarmonyTokenCounter()


def json_answer(body):
    text = json.dumps(body).encode()
    return says(head("200 OK", Content_Type="application/json", Content_Length=len(text)) + text)


def test_the_server_counts(run):
    async def test(service):
        service.a.otherwise = json_answer({"count": 12, "tokens": [1] * 12})
        counter = ServerTokenCounter(service.a.config.url, "m", api_key="sk-test")
        assert await counter.count([user("Hello")], [NOW]) == 12
        assert service.a.requests == [{"model": "m", "messages": [user("Hello")], "tools": [NOW]}]
        assert service.a.headers[0].startswith("POST /tokenize ")
        assert "Bearer sk-test" in service.a.headers[0]

    run(test)


@pytest.mark.parametrize(
    "behaviour",
    [fails("404 Not Found"), json_answer({"tokens": []}), json_answer([1]), says(head("200 OK") + b"<html>")],
    ids=["404", "no count", "a list", "html"],
)
def test_a_server_that_does_not_count(run, behaviour):
    async def test(service):
        service.a.otherwise = behaviour
        with pytest.raises(errors.TokenCountError, match=r"/tokenize: wanted the number of tokens"):
            await ServerTokenCounter(service.a.config.url, "m").count([user("Hello")])

    run(test)

"""A conversation always fits, keeps its system prompt, and never has an answer without its call."""

from __future__ import annotations

import asyncio
from copy import deepcopy

import pytest
from agentic_client import DEFAULT_SYSTEM_PROMPT, ConversationHistory, create_conversation_history, errors
from agentic_client.token_counters import HarmonyTokenCounter
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessage

CALL = {"id": "call1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "look", "description": "Looks", "parameters": {"type": "object"}}}


class WordCounter:
    """A word is a token, and so is a message."""

    async def count(self, messages, tools=()):
        words = sum(len(str(message.get("content") or "").split()) + 1 for message in messages)
        return words + len(list(tools))


def fit(history):
    return asyncio.run(history.fit())


texts = st.integers(0, 12).map(lambda count: " ".join(["word"] * count))
turns = st.tuples(texts, st.integers(0, 3), texts)
HARMONY = HarmonyTokenCounter()


@settings(max_examples=200, deadline=None)
@given(turns=st.lists(turns, max_size=8), window=st.integers(1, 60), prompt=texts)
def test_trimming(turns, window, prompt):
    trim(turns, window, prompt, WordCounter())


@settings(max_examples=20, deadline=None)
@given(turns=st.lists(turns, max_size=5), window=st.integers(60, 400), prompt=texts)
def test_trimming_by_the_engines_tokens(turns, window, prompt):
    trim(turns, window, prompt, HARMONY)


def trim(turns, window, prompt, counter):
    history = ConversationHistory(prompt, window_tokens=window, counter=counter)
    for number, (question, calls, answer) in enumerate(turns):
        history.add_user(question)
        if calls:
            ids = [f"{number}-{call}" for call in range(calls)]
            history.add({"role": "assistant", "tool_calls": [CALL | {"id": each} for each in ids]})
            for each in ids:
                history.add_tool(each, answer)
        history.add_assistant(answer)
    before = history.messages
    starts = [number for number, message in enumerate(before) if message["role"] == "user"]
    least = asyncio.run(counter.count([before[0], *before[starts[-1] if starts else 1 :]]))
    if least > window:
        with pytest.raises(errors.TurnTooLargeError, match=f"have {least} tokens, wanted at most {window} "):
            fit(history)
        assert history.messages == before
        return
    sent = fit(history)
    assert asyncio.run(counter.count(sent)) <= window
    assert sent[0] == {"role": "system", "content": prompt}
    assert fit(history) == sent == history.messages
    kept = len(sent) - 1
    assert sent[1:] == before[len(before) - kept :]  # the newest, whole and in order
    assert kept == 0 or sent[1]["role"] == "user"
    calls = {call["id"] for message in sent for call in message.get("tool_calls", ())}
    assert {message["tool_call_id"] for message in sent if message["role"] == "tool"} == calls
    dropped = [start for start in starts if start < len(before) - kept]
    if dropped:  # no more than needed
        assert asyncio.run(counter.count([before[0], *before[dropped[-1] :]])) > window


def test_the_default_is_the_guides():
    history = create_conversation_history()
    assert history.window_tokens == 3072
    assert history.messages == [{"role": "system", "content": DEFAULT_SYSTEM_PROMPT}]


def test_a_custom_prompt_is_kept_byte_for_byte():
    prompt = "  Ünïcode\r\n\ttrailing space "
    history = create_conversation_history(system_prompt=prompt, counter=WordCounter())
    history.add_user("Hi")
    assert fit(history)[0]["content"] == prompt


def test_what_is_handed_out_is_a_copy():
    history = ConversationHistory("Be kind", counter=WordCounter())
    history.add_user("Hi")
    fit(history)[0]["content"] = history.messages[1]["content"] = "changed"
    assert [message["content"] for message in history.messages] == ["Be kind", "Hi"]


def test_what_is_deep_inside_is_a_copy_too():
    given = {"role": "assistant", "content": None, "tool_calls": [deepcopy(CALL)]}
    tool = deepcopy(TOOL)
    history = ConversationHistory("Be kind", counter=WordCounter(), tools=[tool])
    history.add_user("Hi")
    history.add(given)
    for messages in (fit(history), history.messages):
        messages[2]["tool_calls"][0]["function"]["name"] = "changed"
    given["tool_calls"][0]["function"]["name"] = tool["function"]["name"] = "changed"
    assert history.messages[2]["tool_calls"] == [CALL]
    assert history.tools == (TOOL,)


def test_the_system_prompt_stays():
    history = ConversationHistory("Be kind")
    with pytest.raises(AttributeError):
        history.system_prompt = "Be rude"
    assert history.system_prompt == "Be kind"


def test_two_fits_at_a_time_drop_once():
    class Slow(WordCounter):
        async def count(self, messages, tools=()):
            await asyncio.sleep(0)
            return await super().count(messages, tools)

    history = ConversationHistory("a", window_tokens=6, counter=Slow())
    for text in ("one", "two", "three", "four"):
        history.add_user(text)

    async def both():
        return await asyncio.gather(history.fit(), history.fit())

    first, second = asyncio.run(both())
    assert [message["content"] for message in first] == ["a", "three", "four"]
    assert first == second == history.messages


def test_tools_count():
    history = ConversationHistory("a b", window_tokens=3, counter=WordCounter(), tools=[TOOL])
    with pytest.raises(errors.TurnTooLargeError, match="have 4 tokens, wanted at most 3"):
        fit(history)


def test_the_sdks_message_can_be_added():
    history = ConversationHistory("Be kind", counter=WordCounter())
    history.add_user("Hi")
    history.add_assistant(ChatCompletionMessage.model_validate({"role": "assistant", "tool_calls": [CALL]}))
    history.add_tool("call1", "seen")
    assert fit(history)[2:] == [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call1", "content": "seen"},
    ]
    history.clear()
    assert len(history.messages) == 1


@pytest.mark.parametrize("role", ["system", "developer", None])
def test_there_is_one_system_prompt(role):
    with pytest.raises(ValueError, match="wanted a message of user, assistant or tool"):
        ConversationHistory().add({"role": role, "content": "Be rude"})


def test_an_answer_without_its_call_is_refused():
    history = ConversationHistory()
    with pytest.raises(ValueError, match=r"\(there is none\), found 'call1'"):
        history.add_tool("call1", "seen")
    history.add_user("Hi")
    history.add({"role": "assistant", "tool_calls": [CALL]})
    history.add_user("Never mind")
    with pytest.raises(ValueError, match="wanted a tool_call_id of this turn"):
        history.add_tool("call1", "seen")


def test_a_window_has_at_least_one_token():
    with pytest.raises(ValueError, match="found 0"):
        ConversationHistory(window_tokens=0)


def test_what_is_added_while_tokens_are_counted_stays():
    history = ConversationHistory("a", window_tokens=4, counter=WordCounter())

    class Slow(WordCounter):
        async def count(self, messages, tools=()):
            if len(history.messages) < 4:
                history.add_user("late")
            return await super().count(messages, tools)

    history._counter = Slow()
    history.add_user("one two")
    history.add_user("three")
    assert [message["content"] for message in fit(history)] == ["a", "three"]
    assert [message["content"] for message in history.messages] == ["a", "three", "late"]


def test_the_default_counter_is_harmonys():
    history = ConversationHistory("Be kind.")
    history.add_user("Hello")
    assert asyncio.run(history.count()) == 78  # what a vLLM 0.32.0 counted

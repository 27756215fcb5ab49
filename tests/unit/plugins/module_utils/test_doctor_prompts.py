"""Where prompts begin to differ, by the guide's own example."""

from __future__ import annotations

import json

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.nvl.vllm.plugins.filter.prompt_difference import prompt_difference
from ansible_collections.nvl.vllm.plugins.module_utils._doctor_prompts import difference

GUIDE = ["You are an AI assistant.", "You are an AI assistant.", "You are an AI coding assistant."]


def lines(*values: object) -> str:
    return "\n".join(json.dumps(value) for value in values)


def test_the_place_is_told_and_the_text_only_where_it_is_allowed():
    text = lines(*GUIDE)
    sentence = "The 3 prompts share their first 14 characters of 24; there prompt 3 differs from prompt 1"
    assert difference(text, show=False) == sentence
    assert difference(text, show=True).splitlines() == [
        sentence,
        "  1: 'You are an AI assistant.'",
        "  3: 'You are an AI coding assistant.'",
    ]


@pytest.mark.parametrize(("show", "lines_"), [(True, 3), ("true", 3), (False, 1), ("false", 1), ("no", 1)])
def test_the_filter_shows_prompts_only_to_those_who_say_so(show: bool | str, lines_: int):
    assert len(prompt_difference(lines(*GUIDE), show).splitlines()) == lines_


def test_the_filter_says_what_it_wants():
    with pytest.raises(AnsibleFilterError, match="prompt_difference: wanted two prompts or more"):
        prompt_difference('"one"')
    with pytest.raises(AnsibleFilterError, match="maybe"):
        prompt_difference(lines(*GUIDE), "maybe")


def test_requests_are_compared_message_by_message():
    requests = [
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]}
        for question in ("Who?", "What?")
    ]
    assert "share their first 26 characters" in difference(lines(*requests), show=False)


def test_one_that_is_the_beginning_of_another_and_equal_ones():
    assert "share their first 3 characters of 3; there prompt 2" in difference(lines("abc", "abcd"), show=False)
    assert "All 2 prompts are the same (3 characters)" in difference(lines("abc", "abc"), show=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "wanted two prompts or more, found 0"),
        ('"one"\n\n', "found 1"),
        ('"one"\nno json', "line 2: wanted a prompt"),
        ('"one"\n{"prompt": "x"}', "line 2: wanted a prompt"),
        ('"one"\n7', "line 2: wanted a prompt"),
    ],
)
def test_what_is_no_file_of_prompts_is_refused(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        difference(text, show=False)

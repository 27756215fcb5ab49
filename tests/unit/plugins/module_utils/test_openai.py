"""The client of an OpenAI-compatible server: what is an answer, and the many ways to be none."""

from __future__ import annotations

import socket

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _openai
from ansible_collections.nvl.vllm.plugins.module_utils._openai import (
    ConnectFailed,
    DeadlineExceeded,
    Endpoint,
    HttpStatus,
    ResponseCut,
    ResponseFailed,
)

MODEL = "gpt-oss-120b"


def ask(fake, stream=True, deadline_seconds=10.0, api_key=None):
    endpoint = Endpoint("primary", fake.url, api_key)
    return _openai.chat(endpoint, MODEL, "Say yes.", 3, stream, deadline_seconds)


# Endpoint


def test_endpoint_hides_its_key():
    endpoint = Endpoint("primary", "http://127.0.0.1:8001/", "sk-secret")
    assert "sk-secret" not in repr(endpoint) + str(endpoint)
    assert str(endpoint) == "primary (http://127.0.0.1:8001)"


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8001",
        "ftp://host:1",
        "http://",
        "http://host:99999",
        "http://host:0",
        "http://user:pw@host",
        "http://host/?q=1",
        "http://" + 70 * "a" + ".example",
    ],
)
def test_endpoint_refuses_a_url_that_cannot_work(url):
    with pytest.raises(ValueError, match="endpoint primary: wanted a URL such as"):
        Endpoint("primary", url)


def test_endpoint_refuses_v1_with_the_remedy():
    with pytest.raises(ValueError, match="leave out the /v1"):
        Endpoint("primary", "http://127.0.0.1:8001/v1")


@pytest.mark.parametrize("key", ["", "sk secret", "sk-secret\n", "sk-sécret"])
def test_endpoint_refuses_a_key_that_is_no_header_and_does_not_repeat_it(key):
    with pytest.raises(ValueError, match="wanted an API key") as caught:
        Endpoint("primary", "http://127.0.0.1:8001", key)
    assert key == "" or key not in str(caught.value)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "at least one endpoint"),
        (
            [{"name": "a", "url": "http://h:1"}, {"name": "a", "url": "http://h:2"}],
            "differ in name",
        ),
        (
            [{"name": "a", "url": "http://h:1"}, {"name": "b", "url": "http://h:1/"}],
            "differ in url",
        ),
    ],
)
def test_endpoints_must_differ(items, message):
    with pytest.raises(ValueError, match=message):
        _openai.endpoints_of(items, None)


# Good answers


@pytest.mark.parametrize("stream", [True, False])
def test_chat(fake_vllm, stream):
    answer = ask(fake_vllm, stream)
    assert answer.text == "one two three"
    assert answer.chunks == (3 if stream else 1)
    assert answer.finish_reason == "length"
    assert answer.completion_tokens == 3
    if stream:
        assert 0 < answer.ttft_seconds <= answer.seconds
    else:
        assert answer.ttft_seconds is None


def test_chat_asks_greedily_and_for_usage(fake_vllm):
    ask(fake_vllm, stream=True)
    ask(fake_vllm, stream=False)
    streamed, plain = fake_vllm.asked("/v1/chat/completions")
    assert streamed == {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Say yes."}],
        "max_tokens": 3,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert "stream_options" not in plain


def test_chat_takes_messages(fake_vllm):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    _openai.chat(Endpoint("primary", fake_vllm.url), MODEL, messages, 3)
    assert fake_vllm.asked("/v1/chat/completions")[0]["messages"] == messages


def test_key_is_sent_as_bearer(fake_vllm):
    ask(fake_vllm, api_key="sk-secret")
    assert fake_vllm.requests[0][1]["Authorization"] == "Bearer sk-secret"


@pytest.mark.parametrize("behaviour", ["reasoning", "reasoning_content"])
@pytest.mark.parametrize("stream", [True, False])
def test_reasoning_counts_as_tokens(fake_vllm, behaviour, stream):
    fake_vllm.chat = behaviour
    answer = ask(fake_vllm, stream)
    assert (answer.text, answer.reasoning) == ("", "one two three")
    assert answer.chunks == (3 if stream else 1)


@pytest.mark.parametrize("stream", [True, False])
def test_a_token_without_text_is_an_answer(fake_vllm, stream):
    fake_vllm.chat = "silent_token"
    answer = ask(fake_vllm, stream)
    assert (answer.chunks, answer.completion_tokens) == (0, 1)
    if stream:
        assert answer.ttft_seconds > 0


def test_keep_alives_and_other_fields_are_skipped(fake_vllm):
    fake_vllm.chat = "keep_alive"
    assert ask(fake_vllm).text == "yes"


def test_a_path_before_v1_is_kept(fake_vllm):
    with pytest.raises(HttpStatus):
        _openai.models(Endpoint("gateway", fake_vllm.url + "/llm"), 10)
    assert fake_vllm.requests[0][0] == "/llm/v1/models"


# No answers


@pytest.mark.parametrize(
    ("behaviour", "stream", "error", "chunks", "message"),
    [
        ("close", True, ConnectFailed, 0, "is the server running"),
        ("reset", False, ConnectFailed, 0, "is the server running"),
        ("not_http", True, ConnectFailed, 0, "SSH-2.0"),
        ("cut_before_token", True, ResponseCut, 0, r"without \[DONE\] after 0 pieces"),
        ("cut_after_token", True, ResponseCut, 1, r"without \[DONE\] after 1 pieces"),
        ("cut_in_chunk", True, ResponseCut, 1, "after 1 pieces"),
        ("cut_in_body", False, ResponseCut, 0, "connection broken"),
        ("no_done", True, ResponseCut, 1, r"without \[DONE\]"),
        ("no_finish", True, ResponseCut, 1, "without finish_reason"),
        ("error_then_done", True, ResponseFailed, 0, "EngineCore encountered an issue"),
        ("token_error_then_done", True, ResponseFailed, 1, "EngineCore encountered an issue"),
        ("abort", True, ResponseFailed, 0, "finish_reason abort"),
        ("abort", False, ResponseFailed, 0, "finish_reason abort"),
        ("abort_after_tokens", True, ResponseFailed, 3, "finish_reason abort"),
        ("abort_after_tokens", False, ResponseFailed, 1, "finish_reason abort"),
        ("no_token", True, ResponseFailed, 0, "without a token"),
        ("no_token", False, ResponseFailed, 0, "without a token"),
        ("not_json", False, ResponseFailed, 0, "It works!"),
        ("not_json", True, ResponseCut, 0, r"without \[DONE\]"),
    ],
)
def test_what_is_no_answer(fake_vllm, behaviour, stream, error, chunks, message):
    fake_vllm.chat = behaviour
    with pytest.raises(error, match=message) as caught:
        ask(fake_vllm, stream)
    assert caught.value.chunks == chunks
    assert str(caught.value).startswith(f"primary ({fake_vllm.url}): wanted a completion of")


def test_an_error_inside_a_stream_carries_its_code(fake_vllm):
    fake_vllm.chat = "error_then_done"
    with pytest.raises(ResponseFailed) as caught:
        ask(fake_vllm)
    assert caught.value.status == 500


@pytest.mark.parametrize(
    ("behaviour", "stream", "chunks"),
    [
        ("hang", True, 0),
        ("hang", False, 0),
        ("hang_after_headers", True, 0),
        ("hang_after_token", True, 1),
        ("drip", True, 0),
        ("drip_headers", False, 0),
    ],
)
def test_the_deadline_is_total(fake_vllm, behaviour, stream, chunks):
    # The dripping ones would end well after two seconds: a time-out per receive never strikes.
    fake_vllm.chat = behaviour
    with pytest.raises(DeadlineExceeded, match=r"within 0\.15 s") as caught:
        ask(fake_vllm, stream, deadline_seconds=0.15)
    assert caught.value.chunks == chunks


def test_nobody_listens(fake_vllm):
    fake_vllm.die()
    with pytest.raises(ConnectFailed, match="Connection refused"):
        ask(fake_vllm)


def test_a_listener_that_never_accepts_is_a_deadline():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        endpoint = Endpoint("primary", f"http://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(DeadlineExceeded, match="found no answer within"):
            _openai.get(endpoint, "/health", 0.1)


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        ("401", "check the API key"),
        ("404", "check the URL"),
        ("429", "overloaded"),
        ("500", "answer 500"),
        ("503", "engine"),
    ],
)
def test_status_with_the_servers_message_and_a_remedy(fake_vllm, status, remedy):
    fake_vllm.chat = status
    with pytest.raises(HttpStatus, match=f"HTTP {status} told to answer {status}") as caught:
        ask(fake_vllm)
    assert caught.value.status == int(status)
    assert remedy in str(caught.value)


# Models, metrics, pieces


def test_models(fake_vllm):
    fake_vllm.models = ["a", "b"]
    assert _openai.models(Endpoint("primary", fake_vllm.url), 10) == ["a", "b"]


@pytest.mark.parametrize("page", [b"no json", b"[]", b'{"data": [{}]}', b'{"data": null}'])
def test_models_of_another_kind_of_server(monkeypatch, page):
    monkeypatch.setattr(_openai, "get", lambda *_arguments: page)
    with pytest.raises(ResponseFailed, match="OpenAI-compatible"):
        _openai.models(Endpoint("primary", "http://127.0.0.1:1"), 10)


def test_metrics(fake_vllm):
    names = ["vllm:generation_tokens_total", "vllm:none_of_these"]
    found = _openai.metrics(Endpoint("primary", fake_vllm.url), names, 10)
    assert found == {"vllm:generation_tokens_total": 100.0}


def test_metric_sums():
    page = "\n".join(
        [
            "# TYPE a counter",
            'a{engine="0",why="x} 7"} 1.5',
            'a{engine="1"} 2e1 1700000000000',
            "a 3",
            'a_created{engine="0"} 1.7e9',
            'ba{engine="0"} 4',
            "b NaN",
            "c +Inf",
            "c 5",
        ]
    )
    assert _openai.metric_sums(page, ["a", "b", "c", "d"]) == {"a": 24.5, "c": 5.0}


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: a\n\ndata: b\n\n", ["a", "b"]),
        (b"data:a\r\n\r\n", ["a"]),
        (b"data: a\ndata: b\n\n", ["a\nb"]),
        (b": comment\nevent: x\nid: 1\nretry: 5\ndata: a\n\n", ["a"]),
        (b"data: a\n\ndata: cut o", ["a"]),
        (b"data: a\n", ["a"]),
        (b"\n\n\n", []),
        (b"", []),
    ],
)
def test_sse_data(stream, events):
    assert list(_openai.sse_data(stream.splitlines(keepends=True))) == events

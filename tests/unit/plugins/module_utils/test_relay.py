"""The relay that disturbs what goes between a client and an engine, over real sockets."""

from __future__ import annotations

import http.client
import json
import socket
import time

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _openai
from ansible_collections.nvl.vllm.plugins.module_utils._openai import (
    Endpoint,
    HttpStatus,
    ResponseCut,
)
from ansible_collections.nvl.vllm.plugins.module_utils._relay import Relay, cut_position

MODEL = "gpt-oss-120b"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n"


@pytest.fixture
def relay(fake_vllm):
    relay = Relay(Endpoint("primary", fake_vllm.url), slow_seconds=0.05)
    relay.start()
    yield relay
    relay.close()


@pytest.fixture
def ask(relay):
    """Sends a completion through the relay."""

    def ask(stream=True, prompt="Hi"):
        through = Endpoint("relay", f"http://127.0.0.1:{relay.port}")
        return _openai.chat(through, MODEL, prompt, 3, stream, 10.0)

    return ask


@pytest.mark.parametrize("stream", [True, False])
def test_it_passes_everything_on(ask, stream):
    assert ask(stream).text == "one two three"


@pytest.mark.parametrize("stream", [True, False])
def test_a_storm_answers_503_and_asks_no_engine(relay, ask, fake_vllm, stream):
    relay.mode = "storm503"
    with pytest.raises(HttpStatus) as caught:
        ask(stream, "x" * 500_000)  # more than a socket holds: all of it must be read first
    assert caught.value.status == 503
    assert fake_vllm.requests == []
    relay.mode = "pass"
    assert ask(stream).text == "one two three"


def test_health_checks_pass_in_a_storm(relay):
    relay.mode = "storm503"
    through = Endpoint("relay", f"http://127.0.0.1:{relay.port}")
    assert _openai.get(through, "/health", 5.0) == b""


def test_a_storm_reaches_connections_that_are_open_already(relay, fake_vllm):
    body = json.dumps({"model": MODEL, "messages": [], "max_tokens": 3, "stream": False})
    connection = http.client.HTTPConnection("127.0.0.1", relay.port, timeout=5)
    for mode, status in (("pass", 200), ("storm503", 503)):
        relay.mode = mode
        connection.request("POST", "/v1/chat/completions", body)
        response = connection.getresponse()
        response.read()
        assert response.status == status
    connection.close()


def test_slow_answers_are_late_and_whole(relay, ask):
    relay.mode = "slow"
    started = time.monotonic()
    assert ask().text == "one two three"
    assert time.monotonic() - started >= 0.05


def test_a_stream_is_reset_after_its_first_tokens(relay, ask):
    relay.mode = "reset"
    with pytest.raises(ResponseCut) as caught:
        ask()
    assert caught.value.chunks == 2
    assert "reset" in str(caught.value)


def test_a_plain_answer_is_reset_in_its_half(relay, ask):
    relay.mode = "reset"
    with pytest.raises(ResponseCut):
        ask(stream=False)


def test_an_engine_that_is_gone_is_passed_on(ask, fake_vllm):
    fake_vllm.die()
    with pytest.raises(_openai.ConnectFailed):
        ask()


def test_closed_it_refuses_connections(relay):
    relay.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", relay.port), 5)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"", None),
        (b"HTTP/1.1 200 OK\r\n", None),
        (STREAM, None),
        (STREAM + b"data: 1\n\ndata: 2\n\n", None),
        (STREAM + b"data: 1\n\ndata: 2\n\ndata: 3\n\ndata: 4\n\n", len(STREAM) + 27),
        (PLAIN, None),
        (PLAIN + b"0123456789", len(PLAIN) + 5),
    ],
)
def test_where_an_answer_is_cut(answer, expected):
    assert cut_position(answer) == expected

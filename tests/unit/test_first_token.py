"""The engines' middleware, between a small application that answers as vLLM does and a recording server."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

SOURCE = Path(__file__).parents[2] / "roles/vllm_instances/files/first_token.py"
_spec = importlib.util.spec_from_file_location("first_token", SOURCE)
first_token = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(first_token)

CHAT = "/v1/chat/completions"
HEAD = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-request-id", b"abc")],
}
# As vLLM 0.32 sends them.
ROLE = (
    b'data: {"id":"chatcmpl-1","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,'
    b'"finish_reason":null}],"prompt_token_ids":null}\n\n'
)
TOKEN = b'data: {"id":"chatcmpl-1","choices":[{"index":0,"delta":{"content":"This"},"finish_reason":null}]}\n\n'
DONE = b"data: [DONE]\n\n"
CREATED = b'event: response.created\ndata: {"type":"response.created","response":{"error":null}}\n\n'
IN_PROGRESS = b'event: response.in_progress\ndata: {"type":"response.in_progress"}\n\n'
ADDED = b'event: response.output_item.added\ndata: {"type":"response.output_item.added"}\n\n'
DEAD = {"message": "EngineCore encountered an issue.", "type": "InternalServerError", "param": None, "code": 500}


def body(piece=b"", more=True):
    return {"type": "http.response.body", "body": piece, "more_body": more}


def stream(*pieces):
    """All messages of a streamed answer."""
    return [HEAD, *map(body, pieces), body(more=False)]


def event(**data):
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def scope(path=CHAT, method="POST", kind="http", **more):
    app = SimpleNamespace(state=SimpleNamespace(engine_client=SimpleNamespace(errored=False)))
    return {"type": kind, "method": method, "path": path, "root_path": "", "app": app, **more}


def unused():
    raise AssertionError("nobody asked for a message of the client")


def answers(messages, asked=None):
    """What has reached the client after each message of the application: one list of messages for each."""
    arrived, after = [], []

    async def send(message):
        arrived.append(message)

    async def app(scope, receive, send):
        for message in messages:
            await send(message)
            after.append(list(arrived))

    asyncio.run(first_token.FirstToken(app)(asked or scope(), unused, send))
    assert len(after) == len(messages)
    return after


def status_and_body(messages):
    """An answer that is complete and ends nothing twice."""
    start, content = messages
    assert (start["type"], content["type"], content["more_body"]) == (HEAD["type"], "http.response.body", False)
    headers = dict(start["headers"])
    assert len(headers) == len(start["headers"])
    assert headers[b"content-type"] == b"application/json"
    assert headers[b"content-length"] == str(len(content["body"])).encode()
    return start["status"], json.loads(content["body"])


@pytest.mark.parametrize(
    "asked",
    [
        scope("/v1/models"),
        scope("/health"),
        scope("/v1/chat/completions/batch"),
        scope("/inference" + CHAT),
        scope(method="GET"),
        scope(kind="websocket"),
        {"type": "lifespan", "state": {}},
    ],
    ids=["models", "health", "batch", "below", "get", "websocket", "lifespan"],
)
def test_what_is_not_asked_for_tokens_passes_untouched(asked):
    handed = []

    async def app(*given):
        handed.extend(given)

    async def send(message):
        raise AssertionError(message)

    asyncio.run(first_token.FirstToken(app)(asked, unused, send))
    assert [one is other for one, other in zip(handed, (asked, unused, send), strict=True)] == [True] * 3


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
def test_the_head_waits_for_the_first_piece(path):
    messages = stream(TOKEN, TOKEN, DONE)
    after = answers(messages, scope(path))
    assert after == [[], *(messages[:count] for count in range(2, 6))]


def test_below_a_root_path_it_is_the_same():
    assert answers(stream(TOKEN), scope("/llm" + CHAT, root_path="/llm"))[0] == []


def test_an_empty_piece_is_none():
    messages = stream(b"", TOKEN)
    assert answers(messages)[:3] == [[], [], messages[:3]]


def test_an_empty_stream_is_one():
    messages = stream()
    assert answers(messages) == [[], messages]


def test_greetings_of_responses_wait_for_the_model_and_keep_their_order():
    messages = stream(CREATED, IN_PROGRESS, ADDED, ADDED)
    after = answers(messages, scope("/v1/responses"))
    assert after[:4] == [[], [], [], messages[:4]]
    assert after[-1] == messages


@pytest.mark.parametrize("quiet", [ROLE, event(choices=[{"index": 0, "delta": {}, "finish_reason": None}])])
def test_a_piece_without_text_waits_for_the_first_token(quiet):
    assert answers([HEAD, body(ROLE), body(quiet), body(TOKEN)]) == [
        [],
        [],
        [],
        [HEAD, *map(body, (ROLE, quiet, TOKEN))],
    ]
    assert [message.get("status") for message in answers([HEAD, body(quiet), body(event(error=DEAD))])[-1]][:1] == [500]


@pytest.mark.parametrize(
    "choice",
    [
        {"delta": {"role": "assistant", "content": ""}, "finish_reason": "stop"},
        {"delta": {"content": ""}, "logprobs": {"content": []}},
        {"delta": {"content": ""}, "token_ids": [200005]},
        {"delta": {"reasoning": "Hm"}},
        {"delta": {"tool_calls": [{"index": 0}]}},
        {"text": ""},
    ],
)
def test_a_piece_that_says_something_is_passed_on(choice):
    first = event(choices=[choice])
    assert answers([HEAD, body(first)])[-1] == [HEAD, body(first)]


def test_a_piece_with_the_usage_alone_is_passed_on():
    first = event(choices=[], usage={"prompt_tokens": 3})
    assert answers([HEAD, body(first)])[-1] == [HEAD, body(first)]


def test_a_keep_alive_comment_is_not_held():
    messages = stream(b": keep-alive\n\n", event(error=DEAD), DONE)
    after = answers(messages)
    assert after[1] == messages[:2]
    assert after[-1] == messages  # the status has left, so the error stays in the stream


@pytest.mark.parametrize("status", [200, 400, 401, 500])
def test_an_answer_in_one_piece_is_not_held(status):
    head = {**HEAD, "status": status, "headers": [(b"content-type", b"application/json")]}
    messages = [head, body(json.dumps({"error": DEAD}).encode(), more=False)]
    assert answers(messages) == [messages[:1], messages]


def test_a_stream_with_another_status_is_not_held():
    messages = [{**HEAD, "status": 500}, body(event(error=DEAD)), body(more=False)]
    assert answers(messages) == [messages[:1], messages[:2], messages]


@pytest.mark.parametrize(
    ("code", "status"),
    [(400, 400), (500, 500), (503, 503), (599, 599), (399, 500), (600, 500), (200, 500), ("503", 500), (None, 500)],
)
def test_a_stream_that_begins_with_an_error_gets_its_status(code, status):
    error = {**DEAD, "code": code}
    after = answers(stream(event(error=error), DONE))
    assert status_and_body(after[1]) == (status, {"error": error})
    assert after[-1] == after[1]  # the rest is swallowed


def test_an_error_after_the_greetings_gets_its_status_without_them():
    after = answers(stream(CREATED, IN_PROGRESS, event(error=DEAD)), scope("/v1/responses"))
    assert after[2] == []
    assert status_and_body(after[-1]) == (500, {"error": DEAD})


def test_an_error_keeps_the_heads_other_headers():
    assert (b"x-request-id", b"abc") in answers(stream(event(error=DEAD)))[-1][0]["headers"]


def test_an_error_after_a_token_stays_in_the_stream():
    messages = stream(TOKEN, event(error=DEAD), DONE)
    assert answers(messages)[-1] == messages


@pytest.mark.parametrize(
    "piece",
    [DONE, event(error=None), event(error="no object"), event(choices=[]), b"data: [1]\n\n", b'data: {"error":\n\n'],
)
def test_other_first_pieces_are_passed_on(piece):
    messages = stream(piece)
    assert answers(messages) == [[], *(messages[:count] for count in range(2, 4))]


def test_a_piece_costs_one_call_of_send_and_is_not_copied():
    messages = stream(*[TOKEN] * 100)
    assert [id(message) for message in answers(messages)[-1]] == [id(message) for message in messages]


def refused(asked):
    arrived = []

    async def send(message):
        arrived.append(message)

    async def app(*_):
        raise AssertionError("a dead engine was asked")

    asyncio.run(first_token.FirstToken(app)(asked, unused, send))
    return arrived


def dead(path):
    asked = scope(path)
    asked["app"].state.engine_client.errored = True
    return asked


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
def test_a_request_to_a_dead_engine_is_refused_at_once(path):
    arrived = refused(dead(path))
    status, answer = status_and_body(arrived)
    assert status == answer["error"]["code"] == 503
    assert set(answer["error"]) == set(DEAD)
    assert (b"retry-after", b"1") in arrived[0]["headers"]


def test_other_paths_of_a_dead_engine_answer_themselves():
    messages = [{**HEAD, "status": 503}, body(more=False)]
    assert answers(messages, dead("/health")) == [messages[:1], messages]


@pytest.mark.parametrize(
    "app",
    [
        None,
        SimpleNamespace(),
        SimpleNamespace(state=SimpleNamespace()),
        SimpleNamespace(state=SimpleNamespace(engine_client=None)),
    ],
    ids=["no-app", "no-state", "no-engine", "render-server"],
)
def test_an_engine_of_which_nothing_is_known_counts_as_alive(app):
    assert answers(stream(TOKEN), scope(app=app))[-1] == stream(TOKEN)


def test_an_engine_that_dies_under_way_keeps_vllms_status():
    asked = scope()
    arrived = []

    async def send(message):
        arrived.append(message)

    async def app(scope, receive, send):
        await send(HEAD)
        scope["app"].state.engine_client.errored = True
        for piece in (event(error=DEAD), DONE):
            await send(body(piece))
        await send(body(more=False))

    asyncio.run(first_token.FirstToken(app)(asked, unused, send))
    assert status_and_body(arrived)[0] == 500


class Server:
    """A client that sends its request and then goes away; ``arrived`` is what it got."""

    def __init__(self):
        self.arrived = []
        self.gone = asyncio.Event()

    async def receive(self):
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.arrived.append(message)


def test_that_the_client_goes_away_reaches_vllm_while_the_head_is_held():
    async def scenario():
        server = Server()
        heard = []

        async def app(scope, receive, send):
            await send(HEAD)
            server.gone.set()
            heard.append((await receive())["type"])

        await asyncio.wait_for(first_token.FirstToken(app)(scope(), server.receive, server.send), 30)
        assert heard == ["http.disconnect"]
        assert server.arrived == []

    asyncio.run(scenario())


def test_cancellation_reaches_vllm_while_the_head_is_held():
    async def scenario():
        server = Server()
        held, ended = asyncio.Event(), []

        async def app(scope, receive, send):
            await send(HEAD)
            held.set()
            try:
                await receive()
            except asyncio.CancelledError:
                ended.append("cancelled")
                raise

        task = asyncio.create_task(first_token.FirstToken(app)(scope(), server.receive, server.send))
        await asyncio.wait_for(held.wait(), 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == ["cancelled"]
        assert server.arrived == []

    asyncio.run(scenario())


def test_an_exception_before_the_first_token_leaves_no_head_behind():
    """So the layer outside, which answers exceptions, can still send a status."""
    server_got = []

    async def send(message):
        server_got.append(message)

    async def app(scope, receive, send):
        await send(HEAD)
        await send(body(CREATED))
        raise RuntimeError("of vLLM")

    with pytest.raises(RuntimeError, match=r"^of vLLM$"):
        asyncio.run(first_token.FirstToken(app)(scope("/v1/responses"), unused, send))
    assert server_got == []


def test_a_client_that_is_gone_is_told_to_vllm():
    """A server may raise where the client has gone; that ends the stream in vLLM."""

    async def send(message):
        raise OSError("gone")

    async def app(scope, receive, send):
        await send(HEAD)
        await send(body(TOKEN))

    with pytest.raises(OSError, match=r"^gone$"):
        asyncio.run(first_token.FirstToken(app)(scope(), unused, send))

"""The engines' middleware, between a small application that answers as vLLM does and a recording server."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _agent_daemon, _faults

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


# What the gateway gets back


@pytest.fixture
def marks(tmp_path, monkeypatch):
    """Directories of the files that say that the engine is drained, and that it hangs."""
    monkeypatch.setattr(first_token, "_NAME", "primary")
    monkeypatch.setattr(first_token, "_LOOK_SECONDS", 0.01)
    for name in ("_DRAINED", "_HUNG"):
        monkeypatch.setattr(first_token, name, str(tmp_path / name))
        (tmp_path / name).mkdir()
    return SimpleNamespace(drained=tmp_path / "_DRAINED" / "primary", hung=tmp_path / "_HUNG" / "primary")


def of_gateway(path=CHAT):
    return scope(path, headers=[(b"X-Request-ID", b"7")])


def test_the_marks_are_where_the_agent_and_the_drill_make_them():
    paths = _agent_daemon.Paths()
    assert (paths.hung, paths.drain) == (first_token._HUNG, first_token._DRAINED)
    assert paths.drain == _faults.DRAIN_DIRECTORY


def test_the_engine_knows_its_name():
    template = (SOURCE.parents[1] / "templates/instance.env.j2").read_text()
    assert 'NVL_VLLM_NAME="{{ item.name }}"\n' in template
    assert 'os.environ.get("NVL_VLLM_NAME", "")' in SOURCE.read_text()


class Vllm:
    """An application whose engine hangs: it sends what it has, then waits for the engine to go on."""

    def __init__(self, *messages):
        self.messages = messages
        self.waits, self.goes_on = asyncio.Event(), asyncio.Event()

    async def __call__(self, scope, receive, send):
        for message in self.messages:
            await send(message)
        self.waits.set()
        await self.goes_on.wait()
        await send(body(TOKEN))
        await send(body(more=False))


def while_it_hangs(marks, app, asked):
    """What the client has got once the hang is known, and what when the engine has gone on."""

    async def scenario():
        server = Server()
        middleware = first_token.FirstToken(app)
        request = asyncio.create_task(middleware(asked, server.receive, server.send))
        await asyncio.wait_for(app.waits.wait(), 30)
        before = list(server.arrived)
        marks.hung.touch()
        # As many looks as it takes; where nothing is to come, so many that it would have.
        for _ in range(20):
            await asyncio.sleep(first_token._LOOK_SECONDS)
        known = list(server.arrived)
        app.goes_on.set()
        await asyncio.wait_for(request, 30)
        return before, known, server.arrived

    return asyncio.run(scenario())


@pytest.mark.parametrize("sent", [(), (HEAD,), (HEAD, body(ROLE))], ids=["nothing", "head", "greeting"])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
def test_what_waits_for_a_hung_engine_is_handed_back(marks, path, sent):
    before, known, after = while_it_hangs(marks, Vllm(*sent), of_gateway(path))
    assert before == []
    assert status_and_body(known)[0] == 502
    assert after == known  # what the engine says later, nobody hears


def test_a_stream_that_has_begun_is_not_handed_back(marks):
    before, known, after = while_it_hangs(marks, Vllm(HEAD, body(TOKEN)), of_gateway())
    assert before == known == [HEAD, body(TOKEN)]
    assert after == stream(TOKEN, TOKEN)


def test_requests_of_others_wait(marks):
    """The health agent's canary has to see the hang end."""
    before, known, after = while_it_hangs(marks, Vllm(HEAD), scope(headers=[(b"accept", b"*/*")]))
    assert before == known == []
    assert after == stream(TOKEN)


def test_one_that_cannot_be_told_does_not_keep_the_others(marks):
    async def scenario():
        server, app = Server(), Vllm(HEAD)
        middleware = first_token.FirstToken(app)

        async def gone(message):
            raise OSError("gone")

        requests = [asyncio.create_task(middleware(of_gateway(), server.receive, send)) for send in (gone, server.send)]
        await asyncio.wait_for(app.waits.wait(), 30)
        marks.hung.touch()
        while len(server.arrived) < 2:
            await asyncio.sleep(first_token._LOOK_SECONDS)
        app.goes_on.set()
        await asyncio.wait_for(asyncio.gather(*requests, return_exceptions=True), 30)
        return server.arrived

    assert status_and_body(asyncio.run(scenario()))[0] == 502


def test_the_look_for_a_hang_ends_with_the_last_request_and_begins_with_the_next(marks):
    async def scenario():
        middleware = first_token.FirstToken(app := Vllm(HEAD))
        for _ in range(2):
            server = Server()
            app.goes_on.set()
            await middleware(of_gateway(), server.receive, server.send)
            assert server.arrived == stream(TOKEN)
            while middleware._watch:
                await asyncio.sleep(first_token._LOOK_SECONDS)

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_drained_engine_takes_nothing_new_from_the_gateway(marks):
    marks.drained.touch()
    arrived = refused(of_gateway())
    assert status_and_body(arrived)[0] == 503
    assert (b"retry-after", b"1") in arrived[0]["headers"]
    assert answers(stream(TOKEN), scope(headers=[]))[-1] == stream(TOKEN)
    assert answers(stream(TOKEN), {**of_gateway("/v1/models"), "method": "GET"})[-1] == stream(TOKEN)


def test_an_engine_without_a_name_looks_for_nothing(marks, monkeypatch):
    monkeypatch.setattr(first_token, "_NAME", "")  # both directories are there
    assert answers(stream(TOKEN), of_gateway())[-1] == stream(TOKEN)

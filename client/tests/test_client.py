"""What the client promises beside failover: limits, cancellation, hooks, and an end without traces."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import textwrap
from pathlib import Path

import agentic_client
import pytest
from agentic_client import DualEndpointLLMClient, EndpointConfig, Timeouts, errors
from agentic_client.events import AttemptFailed, CallEnded, EndpointChanged
from engines import STREAM, WORDS, event, hangs, piece, resets, says, until, whole
from pydantic import ValidationError

ASK = [{"role": "user", "content": "Count to three"}]
A = EndpointConfig(url="http://127.0.0.1:1/v1", name="a")


def test_calls_beyond_max_concurrent_wait(run):
    async def test(service):
        service.a.otherwise = says(STREAM + piece("one "), piece(finish="stop"), pause=0.1)

        async with service.client(service.a, max_concurrent=2) as client:

            async def one():
                return [chunk async for chunk in client.chat_completion_stream(ASK)]

            assert await asyncio.gather(*[one() for _ in range(6)]) == [["one "]] * 6
        assert service.a.peak == 2

    run(test)


def test_the_wait_for_a_slot_counts(run):
    async def test(service):
        service.a.otherwise = hangs
        async with service.client(service.a, max_concurrent=1) as client:
            first = asyncio.create_task(client.chat_completion(ASK))
            await until(lambda: len(service.a.requests) == 1)
            with pytest.raises(errors.DeadlineExceededError):
                await client.chat_completion(ASK, timeout=0.2)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
        assert len(service.a.requests) == 1

    run(test)


@pytest.mark.parametrize("behaviour", [hangs, says(STREAM + piece("one "), then="hang")], ids=["answer", "stream"])
def test_cancelling_closes_the_connection_and_frees_the_slot(run, behaviour):
    async def test(service):
        service.a.script = [behaviour]
        async with service.client(service.a, max_concurrent=1) as client:

            async def consume():
                if behaviour is hangs:
                    return await client.chat_completion(ASK)
                return [chunk async for chunk in client.chat_completion_stream(ASK)]

            call = asyncio.create_task(consume())
            await until(lambda: len(service.a.requests) == 1)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await until(lambda: service.a.disconnects == 1)
            await client.chat_completion(ASK)
            assert client.healthy() == ["a"]
        assert service.seen(CallEnded)[0].error == "CancelledError"

    run(test)


def test_leaving_a_stream_early_frees_the_slot(run):
    async def test(service):
        service.a.script = [says(STREAM + piece("one "), then="hang")]
        async with service.client(service.a, max_concurrent=1) as client:
            async for _chunk in client.chat_completion_stream(ASK):
                break
            await client.chat_completion(ASK)
            await until(lambda: service.a.disconnects == 1)

    run(test)


@pytest.mark.parametrize("state", ["attempt", "pause"])
def test_closing_ends_calls_under_way(run, state):
    async def test(service):
        service.a.otherwise = hangs
        if state == "pause":
            await service.a.stop()
        async with service.client(service.a, timeouts={"connect": 1.0}) as client:
            call = asyncio.create_task(client.chat_completion(ASK))
            await until(lambda: bool(service.a.requests) or bool(service.events))
        with pytest.raises(errors.ClientClosedError):
            await call
        with pytest.raises(errors.ClientClosedError):
            await client.chat_completion(ASK)

    run(test)


@pytest.mark.parametrize("first", ["answer", "stream that nobody reads"])
def test_closing_ends_calls_that_wait_for_a_slot(run, first):
    async def test(service):
        service.a.otherwise = hangs if first == "answer" else says(STREAM + piece("one "), then="hang")
        async with service.client(service.a, max_concurrent=1) as client:
            pieces = client.chat_completion_stream(ASK)
            if first == "answer":
                waiting = [asyncio.create_task(client.chat_completion(ASK))]
            else:
                assert await anext(pieces) == "one "
                waiting = []
            await until(lambda: len(service.a.requests) == 1)
            waiting += [asyncio.create_task(client.chat_completion(ASK)) for _ in range(3)]
            await asyncio.sleep(0)  # they are in the queue
        for call in waiting:
            with pytest.raises(errors.ClientClosedError):
                await call
        assert len(service.a.requests) == 1
        await pieces.aclose()

    run(test)


def test_closing_ends_a_stream_whose_reader_is_slow(run):
    async def test(service):
        async with service.client() as client:
            pieces = client.chat_completion_stream(ASK)
            assert await anext(pieces) == "one "
        with pytest.raises(errors.ClientClosedError):
            await anext(pieces)

    run(test)


def test_closing_ends_calls_that_have_just_begun(run):
    async def test(service):
        service.a.otherwise = service.b.otherwise = hangs
        async with service.client() as client:
            calls = [asyncio.create_task(client.chat_completion(ASK)) for _ in range(4)]
            await asyncio.sleep(0)
        for call in calls:
            with pytest.raises(errors.ClientClosedError):
                await call

    run(test)


def test_a_call_gives_back_the_slot_that_it_took(run):
    """Also when the client has begun anew meanwhile, as it does in another event loop."""

    async def test(service):
        service.a.script = [says(STREAM + piece("one "), then="hang")]
        service.a.otherwise = says(STREAM + piece("one "), piece(finish="stop"), pause=0.1)
        async with service.client(service.a, max_concurrent=1) as client:
            before = client.chat_completion_stream(ASK)
            await anext(before)
            client._keeper.cancel()
            await asyncio.wait([client._keeper])

            async def one():
                return [chunk async for chunk in client.chat_completion_stream(ASK)]

            call = asyncio.create_task(one())
            await until(lambda: len(service.a.requests) == 2)
            with pytest.raises(errors.StreamInterruptedError):
                await anext(before)
            service.a.peak = 0
            await asyncio.gather(call, one(), one())
            assert service.a.peak == 1

    run(test)


def test_a_hook_that_fails_disturbs_nobody(run, caplog):
    async def test(service):
        async with service.client(on_event=lambda _event: 1 / 0) as client:
            await client.chat_completion(ASK)

    run(test)
    assert "ZeroDivisionError" in caplog.text


def test_neither_logs_nor_errors_hold_the_key_or_the_prompt(run, caplog):
    caplog.set_level(logging.INFO)

    async def test(service):
        service.a.otherwise = service.b.otherwise = resets
        async with service.client(api_key="sk-very-secret") as client:
            with pytest.raises(errors.RetriesExhaustedError) as caught:
                await client.chat_completion(ASK)
            assert "sk-very-secret" not in f"{client!r} {vars(client)['_members']} {caught.value} {service.events}"
            assert "Count to three" not in f"{caught.value} {service.events}"

    run(test)
    assert "the connection broke" in caplog.text
    assert "sk-very-secret" not in caplog.text
    assert "Count to three" not in caplog.text


ECHO = {"message": "Count to three is no question", "code": 500}


@pytest.mark.parametrize(
    "behaviour",
    [
        whole(json.dumps({"error": ECHO}).encode(), "500 Internal Server Error"),
        whole(b'{"choices": "Count to three"}'),
        says(b"HTTP/1.1 2OO Count to three\r\n\r\n"),
        says(STREAM + event({"error": ECHO})),
    ],
    ids=["status", "malformed", "no HTTP", "inside a stream"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_servers_say_is_in_exceptions_alone(run, caplog, behaviour, stream):
    """They may repeat a part of the prompt."""
    caplog.set_level(logging.INFO, "agentic_client")

    async def test(service):
        for engine in (service.a, service.b):
            engine.otherwise = engine.probes = behaviour
        async with service.client(health_interval=0.05) as client:
            call = anext(client.chat_completion_stream(ASK)) if stream else client.chat_completion(ASK)
            with pytest.raises(errors.RetriesExhaustedError):
                await call
            await until(lambda: service.a.probed > 1)
        assert len(service.seen(AttemptFailed)) == len(service.seen(EndpointChanged)) == 2
        assert "Count" not in f"{service.events}"

    run(test)
    assert "a is out: " in caplog.text
    assert "Count" not in caplog.text


def test_events_and_logs_tell_status_and_reason(run, caplog):
    async def test(service):
        service.a.script = [whole(json.dumps({"error": ECHO}).encode(), "500 Internal Server Error")]
        async with service.client() as client:
            await client.chat_completion(ASK)
        (failed,) = service.seen(AttemptFailed)
        assert (failed.endpoint, failed.error, failed.status, failed.reason) == ("a", "StatusError", 500, "HTTP 500")

    run(test)
    assert "a is out: HTTP 500" in caplog.text


@pytest.mark.parametrize(
    ("environment", "sent"),
    [
        ({"VLLM_API_KEY": "one", "OPENAI_API_KEY": "two"}, "one"),
        ({"OPENAI_API_KEY": "two"}, "two"),
        ({}, "none"),
    ],
)
def test_the_key_comes_from_the_environment(run, monkeypatch, environment, sent):
    for name in ("VLLM_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    async def test(service):
        async with service.client(api_key=None) as client:
            await client.chat_completion(ASK)
        assert f"Bearer {sent}\r\n" in service.a.headers[0]

    run(test)


@pytest.mark.parametrize(
    ("options", "sent"),
    [({}, 7), ({"max_tokens": 3}, 3), ({"max_completion_tokens": 3}, None)],
)
def test_replies_have_a_limit(run, options, sent):
    async def test(service):
        async with service.client(max_tokens=7) as client:
            await client.chat_completion(ASK, **options)
        assert service.a.requests[0].get("max_tokens") == sent

    run(test)


@pytest.mark.parametrize("options", [{"n": 2}, {"extra_body": {"n": 2}}])
def test_a_stream_has_one_choice(run, options):
    async def test(service):
        async with service.client() as client:
            with pytest.raises(ValueError, match="wanted one choice in a stream, found n=2: use chat_completion"):
                await anext(client.chat_completion_stream(ASK, **options))
            assert [chunk async for chunk in client.chat_completion_stream(ASK, n=1)] == list(WORDS)
            await client.chat_completion(ASK, **options)
        assert len(service.a.requests + service.b.requests) == 2

    run(test)


def test_an_option_that_there_is_not_is_the_callers_mistake(run):
    async def test(service):
        async with service.client() as client:
            with pytest.raises(TypeError, match="tempersture"):
                await client.chat_completion(ASK, tempersture=1)
            assert client.healthy() == ["a", "b"]
        assert service.a.requests == []

    run(test)


def test_a_client_can_be_used_in_one_event_loop_after_another(run):
    clients = []

    async def test(service):
        if not clients:
            clients.append(DualEndpointLLMClient([service.a.config], "m"))
        client = clients[0]
        client._members[0].endpoint = service.a.config
        assert (await client.chat_completion(ASK)).choices[0].message.content == "".join(WORDS)
        client._keeper.cancel()
        await asyncio.wait([client._keeper])

    run(test)
    run(test)


def test_a_script_may_just_end(run):
    """As the guide's scripts do: no close, no context manager, and neither a warning nor a hang."""
    script = """
        import asyncio, sys
        from agentic_client.llm_client import DualEndpointLLMClient, EndpointConfig

        async def main():
            client = DualEndpointLLMClient(
                endpoints=[EndpointConfig(url=sys.argv[1], name="a")], model_name="m"
            )
            messages = [{"role": "user", "content": "Hi"}]
            await asyncio.gather(*[client.chat_completion(messages) for _ in range(4)])
            async for chunk in client.chat_completion_stream(messages):
                print(chunk, end="", flush=True)

        asyncio.run(main())
    """

    async def test(service):
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-W", "error", "-W", "default::ResourceWarning", "-c", textwrap.dedent(script), service.a.config.url),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PYTHONPATH": str(Path(__file__).resolve().parents[1] / "src")},
        )
        out, complaints = await process.communicate()
        assert (out.decode(), complaints.decode(), process.returncode) == ("".join(WORDS), "", 0)

    run(test)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8001/v1", "http://127.0.0.1:8001", "ftp://a/v1", "http://u:p@a/v1", "http://"]
)
def test_urls_are_checked(url):
    with pytest.raises(ValidationError, match="wanted a URL such as"):
        EndpointConfig(url=url, name="a")


@pytest.mark.parametrize(
    ("endpoints", "more"),
    [([], {}), ([A, A], {}), ([A], {"max_concurrent": 0}), ([A], {"health_interval": 0}), ([A], {"health_timeout": 0})],
)
def test_arguments_are_checked(endpoints, more):
    with pytest.raises(ValueError, match="wanted"):
        DualEndpointLLMClient(endpoints, "m", **more)


def test_a_file_of_certificates_is_read_at_once(tmp_path):
    with pytest.raises(FileNotFoundError):
        DualEndpointLLMClient([A], "m", ca_file=str(tmp_path / "none.pem"))


def test_all_errors_are_at_the_top():
    classes = [each for each in vars(errors).values() if isinstance(each, type)]
    names = {each.__name__ for each in classes if each.__module__ == errors.__name__}
    assert names | {"RetryRules", "DualEndpointLLMClient"} <= set(agentic_client.__all__)
    assert all(hasattr(agentic_client, name) for name in agentic_client.__all__)


def test_timeouts_are_checked():
    with pytest.raises(ValidationError, match="greater than 0"):
        Timeouts(idle=0)

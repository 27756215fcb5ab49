"""What the client promises beside failover: limits, cancellation, hooks, and an end without traces."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from agentic_client import DualEndpointLLMClient, EndpointConfig, Timeouts, errors
from agentic_client.events import CallEnded
from engines import STREAM, WORDS, hangs, piece, resets, says, until
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
    [([], {}), ([A, A], {}), ([A], {"max_concurrent": 0}), ([A], {"health_interval": 0})],
)
def test_arguments_are_checked(endpoints, more):
    with pytest.raises(ValueError, match="wanted"):
        DualEndpointLLMClient(endpoints, "m", **more)


def test_timeouts_are_checked():
    with pytest.raises(ValidationError, match="greater than 0"):
        Timeouts(idle=0)

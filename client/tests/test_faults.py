"""Every way in which an engine can fail, over real connections; the engines count what reached them."""

from __future__ import annotations

import asyncio
import time

import pytest
from agentic_client import DualEndpointLLMClient, EndpointConfig, RetryRules, Timeouts, _transport, errors
from agentic_client.events import AttemptFailed, CallEnded, EndpointChanged, Waiting
from engines import (
    HANG_SECONDS,
    STREAM,
    WORDS,
    answer,
    completion,
    event,
    fails,
    hangs,
    head,
    piece,
    resets,
    says,
    send,
    until,
    whole,
)

ASK = [{"role": "user", "content": "Count to three"}]
TEXT = "".join(WORDS)
HTML = says(head("200 OK", Content_Type="text/html") + b"<html>maintenance</html>")
ABORTED = says(head("200 OK", Content_Type="application/json") + completion("abort"))

BEFORE_OUTPUT = {
    "reset": resets,
    "closed": says(),
    "500": fails("500 Internal Server Error"),
    "503": fails("503 Service Unavailable"),
    "429": fails("429 Too Many Requests"),
}
STREAMS = BEFORE_OUTPUT | {
    "no event": says(STREAM[: STREAM.index(b"\r\n\r\n") + 4]),
    "cut before a token": says(STREAM),
    "error, then done": says(STREAM + event({"error": {"message": "EngineCore died", "code": 500}}) + event("[DONE]")),
    "abort": says(STREAM + piece(finish="abort") + event("[DONE]")),
    "no JSON": says(STREAM + event("{not json")),
    "JSON of something else": says(STREAM + event([1, 2])),
    "no UTF-8": says(STREAM + b"data: \xff\xfe\n\n"),
    "an error that is cut": says(head("500 Internal Server Error", Content_Length=900) + b'{"error":'),
    "an error with a strange code": says(STREAM + event({"error": {"message": "died", "code": "9" * 5000}})),
    "html": HTML,
}
ANSWERS = BEFORE_OUTPUT | {
    "html": HTML,
    "abort": ABORTED,
    "cut": says(head("200 OK", Content_Length=900) + b'{"id":'),
    "no JSON": whole(b'{"id": "c1",'),
    "no UTF-8": whole(b'{"id": "\xff\xfe"}'),
    "JSON of something else": whole(b"[1, 2]"),
    "JSON that is too deep": whole(b"[" * 100_000),
}


async def slow_answer(engine, writer, body):
    """A whole answer that the test waits with."""
    await engine.go.wait()
    await answer(engine, writer, body)


async def streamed(client, **more):
    return [chunk async for chunk in client.chat_completion_stream(ASK, **more)]


def test_answers_come_in_turn(run):
    async def test(service):
        async with service.client() as client:
            for _ in range(4):
                reply = await client.chat_completion(ASK, temperature=0)
                assert reply.choices[0].message.content == TEXT
            assert await streamed(client) == list(WORDS)
        assert [len(engine.requests) for engine in (service.a, service.b)] == [3, 2]
        assert service.a.requests[0] == {"model": "m", "messages": ASK, "temperature": 0, "stream": False}
        assert all("Bearer sk-test" in head for head in service.a.headers)
        last = service.seen(CallEnded)[-1]
        for call in service.seen(CallEnded):
            assert (call.attempts, call.prompt_tokens, call.completion_tokens, call.error) == (1, 5, 3, None)
        assert 0 < last.first_token_seconds <= last.seconds

    run(test)


@pytest.mark.parametrize("fault", ANSWERS)
def test_a_failed_answer_moves_on_at_once(run, fault):
    async def test(service):
        service.a.script = [ANSWERS[fault]]
        async with service.client(retry=RetryRules()) as client:
            assert (await client.chat_completion(ASK)).choices[0].message.content == TEXT
            assert client.healthy() == (["a", "b"] if fault == "429" else ["b"])
        assert (len(service.a.requests), len(service.b.requests)) == (1, 1)
        assert service.seen(Waiting) == []

    run(test)


@pytest.mark.parametrize("fault", STREAMS)
def test_a_stream_that_fails_before_its_first_token_moves_on_at_once(run, fault):
    async def test(service):
        service.a.script = [STREAMS[fault]]
        async with service.client(retry=RetryRules()) as client:
            assert await streamed(client) == list(WORDS)
        assert (len(service.a.requests), len(service.b.requests)) == (1, 1)
        assert service.seen(Waiting) == []

    run(test)


@pytest.mark.parametrize(
    ("end", "cause"),
    [
        (says(STREAM + piece("one "), then="reset"), errors.AnswerCutError),
        (says(STREAM + piece("one ")), errors.AnswerCutError),
        (says(STREAM + piece("one ") + event("{not json")), errors.MalformedAnswerError),
        (says(STREAM + piece("one ") + event({"error": {"message": "died", "code": 500}})), errors.StatusError),
        (says(STREAM + piece("one ") + piece(finish="abort")), errors.AnswerCutError),
        (says(STREAM + piece("one "), then="hang"), errors.AttemptTimeoutError),
        # An event that comes byte by byte is not a piece.
        (
            says(STREAM + piece("one "), *[b"data: x"[n : n + 1] for n in range(7)] * 9, pause=0.1),
            errors.AttemptTimeoutError,
        ),
    ],
    ids=["reset", "closed", "malformed", "error", "abort", "hang", "slow bytes"],
)
def test_nothing_is_sent_twice_after_its_first_token(run, end, cause):
    async def test(service):
        service.a.script = [end]
        async with service.client(timeouts={"idle": 0.3}) as client:
            chunks = client.chat_completion_stream(ASK)
            assert await anext(chunks) == "one "
            with pytest.raises(errors.StreamInterruptedError, match="cut off after 4 characters") as caught:
                await anext(chunks)
        assert caught.value.text == "one "
        assert isinstance(caught.value.__cause__, cause)
        assert (len(service.a.requests), len(service.b.requests)) == (1, 0)

    run(test)


def test_reasoning_is_output_too(run):
    async def test(service):
        service.a.script = [says(STREAM + piece(reasoning="Hm"))]
        async with service.client() as client:
            with pytest.raises(errors.StreamInterruptedError):
                await streamed(client)
        assert service.b.requests == []

    run(test)


def test_a_request_that_kills_engines_is_sent_to_two_at_most(run):
    async def test(service):
        service.a.otherwise = service.b.otherwise = resets
        async with service.client() as client:
            with pytest.raises(errors.RetriesExhaustedError, match="after 2 attempts") as caught:
                await client.chat_completion(ASK)
        assert [error.endpoint for error in caught.value.attempts] == ["a", "b"]
        assert (len(service.a.requests), len(service.b.requests)) == (1, 1)

    run(test)


def test_without_any_engine_there_are_four_retries_with_pauses(run):
    async def test(service):
        await service.a.stop()
        await service.b.stop()
        async with service.client() as client:
            with pytest.raises(errors.RetriesExhaustedError, match="no connection") as caught:
                await client.chat_completion(ASK)
        assert len(caught.value.attempts) == 5
        assert len(service.seen(Waiting)) == 3

    run(test)


def test_a_recovery_ends_a_pause_early(run):
    async def test(service):
        await service.a.stop()
        async with service.client(service.a, retry=RetryRules(pauses=(0.2, HANG_SECONDS))) as client:
            call = asyncio.create_task(client.chat_completion(ASK, timeout=HANG_SECONDS * 3))
            await until_waiting(service, 1)
            await service.a.start()
            await call
        assert len(service.a.requests) == 1

    run(test)


async def until_waiting(service, count):
    await until(lambda: len(service.seen(Waiting)) >= count)


@pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Service Unavailable"])
def test_retry_after_is_honoured(run, status):
    async def test(service):
        service.a.script = [fails(status, Retry_After="1")]
        service.a.probes = fails("503 Service Unavailable")
        async with service.client(service.a) as client:
            began = time.monotonic()
            await client.chat_completion(ASK)
            assert time.monotonic() - began >= 1
        assert len(service.a.requests) == 2

    run(test)


def test_an_endpoint_that_asks_for_a_rest_is_left_alone_by_all_calls(run):
    async def test(service):
        service.a.script = [fails("429 Too Many Requests", Retry_After="3600")]
        async with service.client() as client:
            for _ in range(4):
                await client.chat_completion(ASK)
        assert (len(service.a.requests), len(service.b.requests)) == (1, 4)

    run(test)


def test_a_tried_endpoint_after_a_pause_comes_before_an_untried_one_after_a_long_rest(run):
    async def test(service):
        service.a.script = [fails("429 Too Many Requests", Retry_After="3600")]
        service.b.script = [answer, resets]
        async with service.client() as client:
            assert (await client.chat_completion(ASK)).choices[0].message.content == TEXT
            assert (await client.chat_completion(ASK)).choices[0].message.content == TEXT
        assert (len(service.a.requests), len(service.b.requests)) == (1, 3)

    run(test)


@pytest.mark.parametrize("asked", ["1e12", "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_nobody_rests_for_longer_than_a_minute(run, asked):
    async def test(service):
        service.a.script = [fails("429 Too Many Requests", Retry_After=asked)]
        async with service.client(service.a, timeouts={"total": 90.0}) as client:
            call = asyncio.create_task(client.chat_completion(ASK))
            await until_waiting(service, 1)
            assert 59 < service.seen(Waiting)[0].seconds <= 60
            call.cancel()
            await asyncio.wait([call])

    run(test)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("5", 5),
        ("0.5", 0.5),
        ("-5", 0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
        ("Thu, 32 Jan 2026 00:00:00 GMT", None),
        *((each, None) for each in ("inf", "1e999", "-inf", "nan", "soon", "", None)),
    ],
)
def test_retry_after_is_read(header, seconds):
    assert _transport._retry_after(header) == seconds


def test_a_rest_beyond_the_deadline_is_not_waited_for(run):
    async def test(service):
        service.a.script = [fails("429 Too Many Requests", Retry_After="3600")]
        async with service.client(service.a) as client:
            with pytest.raises(errors.RetriesExhaustedError, match="after the call's 30 s"):
                await client.chat_completion(ASK)
        assert len(service.a.requests) == 1

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_messages_may_come_from_a_generator(run, stream):
    async def test(service):
        service.a.script = [resets]
        async with service.client() as client:
            if stream:
                assert [chunk async for chunk in client.chat_completion_stream(each for each in ASK)] == list(WORDS)
            else:
                await client.chat_completion(each for each in ASK)
        assert [request["messages"] for request in service.a.requests + service.b.requests] == [ASK, ASK]

    run(test)


@pytest.mark.parametrize("status", ["400 Bad Request", "401 Unauthorized", "404 Not Found", "422 Unprocessable"])
def test_a_rejected_request_is_not_repeated(run, status):
    async def test(service):
        service.a.script = [fails(status)]
        async with service.client() as client:
            with pytest.raises(errors.RequestRejectedError, match="told so") as caught:
                await client.chat_completion(ASK)
            assert client.healthy() == ["a", "b"]
        assert caught.value.status == int(status.split()[0])
        assert service.b.requests == []

    run(test)


def test_a_host_that_takes_no_connection_in_time_is_away(run):
    async def test(service):
        endpoint = EndpointConfig(url=f"https://127.0.0.1:{service.a.port}/v1", name="a")  # whose TLS nobody answers
        timeouts = Timeouts(connect=0.2)
        async with DualEndpointLLMClient([endpoint], "m", timeouts=timeouts, retry=RetryRules(retries=0)) as client:
            with pytest.raises(errors.RetriesExhaustedError) as caught:
                await client.chat_completion(ASK)
        (error,) = caught.value.attempts
        assert isinstance(error, errors.ConnectTimeoutError)
        assert (error.reason, error.failure.reached) == ("no connection within 0.2 s", False)

    run(test)


def test_a_stream_without_a_token_moves_on_after_its_time(run):
    async def test(service):
        service.a.script = [says(STREAM, then="hang")]
        async with service.client(timeouts={"first_token": 0.3}) as client:
            assert await streamed(client) == list(WORDS)
        assert service.seen(AttemptFailed)[0].error == "AttemptTimeoutError"
        assert service.a.disconnects == 1

    run(test)


@pytest.mark.parametrize("begun", [b"", STREAM], ids=["silent", "without a token"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_hung_engine_loses_what_it_has_not_begun_to_answer(run, stream, begun):
    async def test(service):
        service.a.script = [says(begun, then="hang")]
        service.a.probes = hangs
        async with service.client(health_interval=0.2, health_timeout=0.3) as client:
            if stream:
                assert await streamed(client) == list(WORDS)
            else:
                assert (await client.chat_completion(ASK)).choices[0].message.content == TEXT
        assert (len(service.a.requests), len(service.b.requests)) == (1, 1)
        assert service.seen(AttemptFailed)[0].reason == "no answer, and a health check failed meanwhile"

    run(test)


async def talks(_engine, writer, _body):
    """A stream that goes on."""
    await send(writer, STREAM)
    while True:
        await send(writer, piece("word "))
        await asyncio.sleep(0.02)


def test_an_engine_that_hangs_leaves_the_round_when_a_check_has_had_its_time(run):
    async def test(service):
        service.a.probes = hangs
        timeouts = {"first_token": HANG_SECONDS}
        async with service.client(health_interval=0.1, health_timeout=0.2, timeouts=timeouts) as client:
            await until(lambda: client.healthy() == ["b"])
        assert service.seen(EndpointChanged)[0].reason == "no token within 0.2 s in a health check"

    run(test)


def test_an_engine_that_is_busy_is_not_taken_for_one_that_hangs(run):
    async def test(service):
        service.a.otherwise, service.a.probes = talks, hangs
        async with service.client(service.a, health_interval=0.05, health_timeout=0.2) as client:
            pieces = client.chat_completion_stream(ASK)
            while service.a.probed < 4:
                await anext(pieces)
            assert client.healthy() == ["a"]
            await pieces.aclose()
            await until(lambda: client.healthy() == [])

    run(test)


def test_a_busy_engine_keeps_its_whole_answers(run):
    async def test(service):
        service.a.script, service.a.probes = [talks, slow_answer], hangs
        async with service.client(health_interval=0.05, health_timeout=0.2) as client:
            pieces = client.chat_completion_stream(ASK)
            await anext(pieces)
            await client.chat_completion(ASK)  # the other's turn
            call = asyncio.create_task(client.chat_completion(ASK))
            while service.a.probed < 4:
                await anext(pieces)
            service.a.go.set()
            await call
            await pieces.aclose()
        assert (len(service.a.requests), len(service.b.requests)) == (2, 1)
        assert service.seen(AttemptFailed) == []

    run(test)


@pytest.mark.parametrize("probe", ["503 Service Unavailable", "500 Internal Server Error"])
def test_a_check_that_is_refused_leaves_whole_answers_alone(run, probe):
    async def test(service):
        service.a.script = [slow_answer]
        service.a.probes = fails(probe)
        async with service.client(health_interval=0.05) as client:
            call = asyncio.create_task(client.chat_completion(ASK))
            await until(lambda: service.a.probed > 2)
            service.a.go.set()
            await call
        assert (len(service.a.requests), len(service.b.requests)) == (1, 0)

    run(test)


def test_a_whole_answer_stays_where_there_is_no_better_place(run):
    """The last engine may hang, or have all its places taken: its answers are waited for."""

    async def test(service):
        service.a.script = [slow_answer]
        service.b.probes = fails("500 Internal Server Error")
        async with service.client(health_interval=0.05, health_timeout=0.1) as client:
            await until(lambda: client.healthy() == ["a"])
            call = asyncio.create_task(client.chat_completion(ASK))
            service.a.probes = hangs
            await until(lambda: client.healthy() == [])
            seen = service.a.probed
            await until(lambda: service.a.probed > seen + 2)
            service.a.go.set()
            await call
        assert (len(service.a.requests), len(service.b.requests)) == (1, 0)

    run(test)


def test_whole_answers_leave_a_host_that_is_away(run, monkeypatch):
    """It takes no connections, as it would if it were off; nothing else tells the calls under way."""

    async def test(service):
        service.a.script = [hangs]
        async with service.client(service.a, health_interval=0.2) as client:
            call = asyncio.create_task(client.chat_completion(ASK))
            await until(lambda: len(service.a.requests) == 1)
            transport, complete = client._members[0].transport, client._members[0].transport.complete

            async def away(*_arguments):
                raise errors.ConnectTimeoutError("a", "no connection within 5 s")
                yield

            monkeypatch.setattr(transport, "complete", away)
            await until(lambda: len(service.seen(AttemptFailed)) > 0)
            monkeypatch.setattr(transport, "complete", complete)
            await call
        assert len(service.a.requests) == 2

    run(test)


@pytest.mark.parametrize("probe", ["no JSON", "JSON that is too deep", "html"])
def test_an_answer_to_a_check_that_is_none_ends_no_checks(run, probe):
    async def test(service):
        service.a.probes = ANSWERS[probe]
        async with service.client(health_interval=0.05) as client:
            await until(lambda: client.healthy() == ["b"] and service.a.probed > 2)
            for _ in range(3):
                await client.chat_completion(ASK)
            assert service.a.requests == []
            service.a.probes = answer
            await until(lambda: client.healthy() == ["a", "b"])

    run(test)


def test_nothing_that_a_check_meets_ends_the_checks(run, monkeypatch, caplog):
    async def broken(*_arguments):
        raise ZeroDivisionError("Count to three")
        yield

    async def test(service):
        async with service.client(health_interval=0.05) as client:
            with monkeypatch.context() as patch:
                patch.setattr(client._members[0].transport, "complete", broken)
                await until(lambda: client.healthy() == ["b"])
                await client.chat_completion(ASK)
            await until(lambda: client.healthy() == ["a", "b"])

    run(test)
    assert "a: unexpected ZeroDivisionError in a health check" in caplog.text
    assert "Count to three" not in caplog.text


def test_a_call_whose_time_is_over_can_be_given_up(run):
    """Both can come in the same turn of the event loop."""

    async def test(service):
        async with service.client() as client:
            transport = client._members[0].transport

            async def late():
                async with _transport._limited(0, transport._unheard):
                    try:
                        await asyncio.sleep(HANG_SECONDS)
                    finally:
                        transport.give_up()

            with pytest.raises(TimeoutError):
                await late()

    run(test)


def test_the_deadline_ends_a_call(run):
    async def test(service):
        service.a.otherwise = hangs
        async with service.client() as client:
            with pytest.raises(errors.DeadlineExceededError, match=r"no answer within 0\.3 s"):
                await client.chat_completion(ASK, timeout=0.3)
            assert client.healthy() == ["a", "b"]  # the call was in a hurry, which is nobody's fault
        assert service.b.requests == []

    run(test)


def test_a_recovery_ends_a_pause_that_would_be_too_long(run):
    async def test(service):
        service.a.script = [resets]
        async with service.client(service.a, retry=RetryRules(pauses=(HANG_SECONDS,)), health_interval=0.1) as client:
            await client.chat_completion(ASK, timeout=20)
        assert len(service.a.requests) == 2
        assert service.seen(Waiting)[0].seconds <= 20

    run(test)


def test_a_pause_ends_with_the_call(run):
    async def test(service):
        await service.a.stop()
        async with service.client(service.a, retry=RetryRules(pauses=(HANG_SECONDS,))) as client:
            with pytest.raises(errors.DeadlineExceededError, match="no connection") as caught:
                await client.chat_completion(ASK, timeout=0.3)
        assert len(caught.value.attempts) == 1

    run(test)


def test_the_deadline_in_a_stream_interrupts_it(run):
    async def test(service):
        service.a.otherwise = says(STREAM + piece("one "), then="hang")
        async with service.client() as client:
            with pytest.raises(errors.StreamInterruptedError) as caught:
                await streamed(client, timeout=0.3)
        assert isinstance(caught.value.__cause__, errors.DeadlineExceededError)

    run(test)


def test_an_endpoint_leaves_the_round_and_comes_back_by_a_check(run):
    async def test(service):
        service.a.script = [resets]
        async with service.client() as client:
            await client.chat_completion(ASK)
            await until(lambda: client.healthy() == ["a", "b"])
        changes = [(each.endpoint, each.healthy) for each in service.seen(EndpointChanged)]
        assert changes == [("a", False), ("a", True)]
        assert service.a.probed == 1
        assert service.b.probed == 0  # its interval is 30 s

    run(test)


def test_an_answer_brings_an_endpoint_back(run):
    async def test(service):
        service.a.script = [resets]
        service.a.probes = hangs
        async with service.client(service.a) as client:
            await client.chat_completion(ASK)
            assert client.healthy() == ["a"]

    run(test)


def test_a_check_finds_a_dead_engine_before_a_request_does(run):
    async def test(service):
        service.a.probes = fails("500 Internal Server Error")
        async with service.client(health_interval=0.1) as client:
            await until(lambda: client.healthy() == ["b"])
            await client.chat_completion(ASK)
        assert service.a.requests == []

    run(test)


def test_an_overloaded_engine_passes_its_check(run):
    async def test(service):
        service.a.probes = fails("429 Too Many Requests")
        async with service.client(health_interval=0.05) as client:
            await until(lambda: service.a.probed == 3)
            assert client.healthy() == ["a", "b"]

    run(test)


def test_a_short_answer_is_not_taken_for_a_failure(run):
    async def test(service):
        service.a.script = [says(STREAM + piece(finish="length") + event("[DONE]"))]
        async with service.client(service.a) as client:
            assert await streamed(client) == []
        assert len(service.a.requests) == 1

    run(test)


def test_an_endpoint_that_stays_away_leaves_the_round_once(run):
    async def test(service):
        service.a.script = [resets]
        service.a.probes = resets
        async with service.client() as client:
            await client.chat_completion(ASK)
            await until(lambda: service.a.probed == 3)
        assert [(each.endpoint, each.healthy) for each in service.seen(EndpointChanged)] == [("a", False)]

    run(test)

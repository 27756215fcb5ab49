"""The meter of doors: its arithmetic, and its stand-in asked by its own client."""

import argparse
import http.client
import json
import threading

import pytest


@pytest.fixture(scope="session")
def meter(load_tool):
    return load_tool("bench_latency.py")


@pytest.fixture
def stand_in(meter):
    server = meter.StandIn(0, "model", 0.002)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(("percent", "wanted"), [(0, 1), (1, 1), (50, 50), (50.5, 51), (99, 99), (100, 100)], ids=str)
def test_percentile_is_the_nearest_rank(meter, percent, wanted):
    assert meter.percentile(list(range(1, 101)), percent) == wanted


def test_percentiles_are_milliseconds_of_unsorted_seconds(meter):
    assert meter.percentiles([0.003, 0.001, 0.002]) == {"count": 3, "p50": 2.0, "p99": 3.0}


def test_percentiles_of_nothing_are_none(meter):
    assert meter.percentiles([]) is None


def test_what_a_door_adds_is_the_difference_to_the_first(meter):
    samples = {"direct": meter.Samples(gaps=[0.010]), "door": meter.Samples(gaps=[0.015])}
    found = meter.report(samples)
    assert found["door"]["added"]["gap"] == {"p50": 5.0, "p99": 5.0, "ratio": 1.5}
    assert found["direct"]["added"]["gap"] == {"p50": 0.0, "p99": 0.0, "ratio": 1.0}
    assert found["door"]["added"]["delay"] is None


def test_gaps_of_zero_have_no_ratio(meter):
    zero = {"count": 1, "p50": 0.0, "p99": 0.0}
    assert meter.added(zero, zero)["ratio"] is None


def test_all_doors_have_a_turn_in_each_round_and_none_is_always_first(meter):
    doors = [meter.Door(name, ("http://h",)) for name in "abcd"]
    rounds = {}
    for number, door in meter.turns(doors, 8):
        rounds.setdefault(number, []).append(door.name)
    assert all(sorted(order) == list("abcd") for order in rounds.values())
    assert {order[0] for order in rounds.values()} == set("abcd")
    behind_a = {order[order.index("a") - 1] for order in rounds.values() if order[0] != "a"}
    assert len(behind_a) > 1


@pytest.mark.parametrize("text", ["direct", "=http://h:1", "direct=", "direct=ftp://h", "direct=http://h:1,h:2"])
def test_a_door_that_is_none_is_refused(meter, text):
    with pytest.raises(argparse.ArgumentTypeError, match="wanted NAME="):
        meter.door_of(text)


def test_a_door_may_have_several_urls(meter):
    assert meter.door_of("direct=http://h:1/,http://h:2").urls == ("http://h:1", "http://h:2")


def test_an_answer_gives_gaps_delays_and_length(meter):
    samples = meter.Samples()
    meter.add(samples, meter.Answer(1.0, ((1.5, "sent@1400000000 "), (1.75, "sent@1500000000 ")), 2.0))
    assert samples.gaps == [0.25]
    assert samples.delays == pytest.approx([0.1, 0.25])
    assert samples.first_tokens == [0.5]
    assert samples.requests == [1.0]


def test_words_of_an_engine_have_no_delay(meter):
    samples = meter.Samples()
    meter.add(samples, meter.Answer(0.0, ((1.0, "sent"), (2.0, "@12 sent@x")), 3.0))
    assert samples.delays == []


def test_an_answer_without_a_gap_is_a_failure(meter):
    with pytest.raises(meter.AnswerFailed, match="1 pieces"):
        meter.add(meter.Samples(), meter.Answer(0.0, ((1.0, "a"),), 2.0))


@pytest.mark.parametrize(
    ("event", "text"),
    [
        ({"choices": [{"delta": {"content": "a"}}]}, "a"),
        ({"choices": [{"delta": {"reasoning": "b"}}]}, "b"),
        ({"choices": [{"delta": {}}]}, ""),
        ({"choices": [{"delta": None}]}, ""),
        ({"choices": [], "usage": {}}, ""),
    ],
)
def test_text_of_an_event(meter, event, text):
    assert meter.text_of(event) == text


def test_an_error_in_a_stream_is_a_failure(meter):
    with pytest.raises(meter.AnswerFailed, match="engine died"):
        meter.text_of({"error": {"message": "engine died"}})


def test_measuring_the_stand_in(meter, stand_in):
    doors = [meter.Door("direct", (stand_in,)), meter.Door("closed", ("http://127.0.0.1:1",))]
    found = meter.report(meter.measure(doors, "model", 2, 5, ""))
    direct = found["direct"]
    assert (direct["requests"], direct["failed"]) == (2, 0)
    assert direct["gap"]["count"] == 2 * 4
    assert direct["delay"]["count"] == 2 * 5
    # It keeps its pace: 5 tokens, 2 ms apart.
    assert direct["request"]["p50"] >= 10
    assert 0 <= direct["delay"]["p50"] < direct["request"]["p99"]
    assert (found["closed"]["requests"], found["closed"]["failed"]) == (0, 2)
    assert "ConnectionRefusedError" in found["closed"]["first_failure"]
    assert found["closed"]["added"]["gap"] is None


def test_the_stand_in_looks_like_an_engine(stand_in):
    connection = http.client.HTTPConnection(stand_in.removeprefix("http://"), timeout=10)
    connection.request("GET", "/v1/models")
    assert json.loads(connection.getresponse().read())["data"][0]["id"] == "model"
    connection.request("GET", "/health")
    response = connection.getresponse()
    assert (response.status, response.read()) == (200, b"")
    connection.request("POST", "/v1/chat/completions", json.dumps({"stream": False}))
    assert connection.getresponse().status == 400
    connection.close()


def test_the_stand_in_ends_an_answer_in_http_1_0_by_closing(stand_in, monkeypatch):
    """nginx speaks HTTP/1.0 to what stands behind it, unless told otherwise."""
    monkeypatch.setattr(http.client.HTTPConnection, "_http_vsn", 10)
    monkeypatch.setattr(http.client.HTTPConnection, "_http_vsn_str", "HTTP/1.0")
    connection = http.client.HTTPConnection(stand_in.removeprefix("http://"), timeout=10)
    connection.request("POST", "/v1/chat/completions", json.dumps({"stream": True, "max_tokens": 2}))
    response = connection.getresponse()
    assert response.getheader("Transfer-Encoding") is None
    assert response.read().endswith(b"data: [DONE]\n\n")
    connection.close()

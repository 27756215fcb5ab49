"""The failover policy, without sockets and without waiting; and the client over real HTTP."""

from __future__ import annotations

import threading

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils._dual_client import (
    COMPLETED,
    LOST,
    TRUNCATED,
    DualEndpointClient,
    LibraryPolicy,
    RetryPolicy,
)
from ansible_collections.nvl.vllm.plugins.module_utils._openai import (
    Completion,
    ConnectFailed,
    DeadlineExceeded,
    Endpoint,
    HttpStatus,
    ResponseCut,
    ResponseFailed,
)

ANSWER = Completion("yes", "", 1, 0.1, 0.2, "stop", 1)
REFUSED = ConnectFailed("refused")


def status(number):
    return HttpStatus("told so", number)


class FakeTimer:
    """A clock that only waiting moves; ``meanwhile`` is called in the middle of each wait."""

    def __init__(self) -> None:
        self.time = 0.0
        self.waits: list[float] = []
        self.meanwhile = lambda: None

    def now(self) -> float:
        return self.time

    def wait(self, _condition: threading.Condition, seconds: float) -> None:
        self.waits.append(seconds)
        before = self.time
        self.time += seconds / 2
        self.meanwhile()
        self.time = max(self.time, before + seconds)


class Service:
    """Two scripted endpoints a and b: each answers its list of results, then ``otherwise``."""

    def __init__(self, a=(), b=(), otherwise=ANSWER, **policy) -> None:
        self.script = {"a": list(a), "b": list(b)}
        self.otherwise = otherwise
        self.asked = ""
        self.well = {"a": True, "b": True}
        self.before_probe_ends = lambda: None
        self.timer = FakeTimer()
        endpoints = [Endpoint("a", "http://a:1"), Endpoint("b", "http://b:1")]
        self.client = DualEndpointClient(endpoints, RetryPolicy(**policy), "model", self.answer, self.probe, self.timer)

    def answer(self, endpoint, _messages, _max_tokens, _stream, _seconds):
        self.asked += endpoint.name
        script = self.script[endpoint.name]
        result = script.pop(0) if script else self.otherwise
        if callable(result):
            result = result()
        if isinstance(result, Exception):
            raise result
        return result

    def probe(self, endpoint):
        well = self.well[endpoint.name]
        self.before_probe_ends()
        return well

    def request(self, stream=False):
        return self.client.request("Hi", 3, stream)


def test_round_robin_over_healthy_endpoints():
    service = Service()
    outcomes = [service.request() for _ in range(4)]
    assert service.asked == "abab"
    assert [outcome.endpoint for outcome in outcomes] == ["a", "b", "a", "b"]
    assert all(outcome.state == COMPLETED for outcome in outcomes)
    assert all(len(outcome.attempts) == 1 for outcome in outcomes)


@pytest.mark.parametrize(
    "error",
    [
        REFUSED,
        DeadlineExceeded("slow"),
        ResponseCut("cut before its first token"),
        ResponseFailed("abort"),
        ResponseFailed("engine dead", 500),
        status(500),
        status(503),
    ],
)
def test_failure_moves_on_at_once_and_ejects_at_once(error):
    service = Service(a=[error])
    outcome = service.request()
    assert outcome.state == COMPLETED
    assert outcome.endpoint == "b"
    assert [attempt.error for attempt in outcome.attempts] == [error, None]
    assert service.timer.waits == []
    assert service.client.healthy() == ["b"]
    service.request()
    assert service.asked == "abb"  # not a again, though it would be its turn


def test_back_off_doubles_only_once_every_endpoint_has_been_tried():
    service = Service(otherwise=REFUSED)
    outcome = service.request()
    assert outcome.state == LOST
    assert service.asked == "ababa"  # one attempt and four retries
    assert service.timer.waits == [2.0, 4.0, 8.0]
    assert outcome.seconds == 14.0
    assert outcome.completion is None


def test_back_off_of_the_guide_with_one_endpoint():
    policy = RetryPolicy()
    assert [policy.backoff(number) for number in range(4)] == [2.0, 4.0, 8.0, 16.0]


def test_no_retries_is_one_attempt():
    service = Service(otherwise=REFUSED, retries=0)
    assert service.request().state == LOST
    assert service.asked == "a"


# A client of one door, on OpenAI's library


class Door:
    """One scripted endpoint, asked by a client with the library's further attempts."""

    def __init__(self, *results, retries=2):
        self.script = list(results)
        self.timer = FakeTimer()
        door = Endpoint("gateway", "http://gateway:1")
        policy = LibraryPolicy(retries=retries)
        self.client = DualEndpointClient([door], policy, "model", self.answer, lambda _door: True, self.timer)

    def answer(self, *_arguments):
        result = self.script.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    def request(self):
        return self.client.request("Hi", 3)


@pytest.mark.parametrize("error", [REFUSED, status(500), status(502), status(503)], ids=str)
def test_the_library_tries_again_after_a_failed_connection_and_a_5xx(error):
    door = Door(error, error, ANSWER)
    outcome = door.request()
    assert outcome.state == COMPLETED
    assert [attempt.error for attempt in outcome.attempts] == [error, error, None]
    assert door.timer.waits == [0.5, 1.0]


def test_the_librarys_attempts_have_an_end():
    door = Door(*[status(500)] * 3)
    assert door.request().state == LOST
    assert door.script == []


def test_without_further_attempts_the_first_failure_is_a_loss():
    door = Door(status(500), retries=0)
    assert door.request().state == LOST
    assert door.timer.waits == []


@pytest.mark.parametrize(
    "error",
    [status(429), ResponseFailed("an error inside", 500), ResponseCut("before its first token"), DeadlineExceeded("")],
    ids=lambda error: type(error).__name__,
)
def test_the_library_does_not_repeat_what_began_or_was_turned_away(error):
    door = Door(error)
    assert door.request().state == LOST
    assert door.timer.waits == []


def test_the_library_sends_nothing_again_after_the_first_token():
    error = ConnectFailed("cut", chunks=1)
    assert Door(error).request().state == TRUNCATED


def test_the_librarys_pauses_have_a_limit():
    policy = LibraryPolicy()
    assert [policy.backoff(number) for number in range(6)] == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0]


def test_the_librarys_pause_is_not_ended_by_news_of_health():
    door = Door(REFUSED, ANSWER)
    door.timer.meanwhile = lambda: door.client.check_health("gateway")
    outcome = door.request()
    assert outcome.seconds == 0.5
    assert door.timer.time == 0.5


def test_recovery_ends_the_back_off_early():
    service = Service(a=[REFUSED], b=[REFUSED])
    service.timer.meanwhile = lambda: service.client.check_health("b")
    outcome = service.request()
    assert outcome.state == COMPLETED
    assert service.asked == "abb"
    assert len(service.timer.waits) == 1
    assert service.client.healthy() == ["b"]


def test_a_recovery_between_two_attempts_is_not_slept_over():
    service = Service(a=[REFUSED])

    def fail_while_a_recovers():
        service.client.check_health("a")
        return REFUSED

    service.script["b"] = [fail_while_a_recovers]
    assert service.request().state == COMPLETED
    assert service.asked == "aba"
    assert service.timer.waits == []


def test_after_the_first_token_nothing_is_retried():
    service = Service(a=[ResponseCut("cut", chunks=1)])
    outcome = service.request(stream=True)
    assert (outcome.state, outcome.streamed) == (TRUNCATED, True)
    assert service.asked == "a"
    assert service.client.healthy() == ["b"]


@pytest.mark.parametrize("number", [400, 401, 403, 404, 413, 422])
def test_a_rejected_request_is_not_retried_and_ejects_nobody(number):
    service = Service(a=[status(number)])
    assert service.request().state == LOST
    assert service.asked == "a"
    assert service.client.healthy() == ["a", "b"]


def test_a_request_rejected_inside_a_stream_is_not_retried():
    service = Service(a=[ResponseFailed("too long", 400)])
    assert service.request().state == LOST
    assert service.asked == "a"


@pytest.mark.parametrize("number", [408, 429])
def test_an_overloaded_endpoint_is_retried_elsewhere_but_not_ejected(number):
    service = Service(a=[status(number)], b=[status(number)])
    outcome = service.request()
    assert outcome.state == COMPLETED
    assert service.asked == "aba"
    assert service.timer.waits == [2.0]  # both are healthy, and yet it backs off
    assert service.client.healthy() == ["a", "b"]


def test_an_untried_endpoint_comes_before_a_tried_one_even_if_it_looks_unhealthy():
    service = Service(a=[status(429)])
    service.well["b"] = False
    service.client.check_health("b")
    assert service.request().endpoint == "b"
    assert service.asked == "ab"


def test_an_unhealthy_endpoint_is_tried_when_nothing_else_is_left():
    service = Service()
    service.well = {"a": False, "b": False}
    service.client.check_health("a")
    service.client.check_health("b")
    assert service.client.healthy() == []
    assert service.request().state == COMPLETED
    assert service.client.healthy() == ["a"]  # its answer is as good as a probe


def test_health_check_ejects_and_readmits():
    service = Service()
    service.well["a"] = False
    service.client.check_health("a")
    assert [service.request().endpoint for _ in range(2)] == ["b", "b"]
    service.well["a"] = True
    service.client.check_health("a")
    assert {service.request().endpoint for _ in range(2)} == {"a", "b"}


def test_a_probe_from_before_a_failure_does_not_readmit():
    service = Service(a=[REFUSED])
    service.before_probe_ends = service.request
    service.client.check_health("a")
    assert service.asked == "ab"
    assert service.client.healthy() == ["b"]


def test_a_failure_from_before_a_recovery_does_not_eject():
    service = Service()

    def fail_after_a_recovery():
        service.well["a"] = False
        service.client.check_health("a")
        service.well["a"] = True
        service.client.check_health("a")
        return DeadlineExceeded("asked the engine that is gone")

    service.script["a"] = [fail_after_a_recovery]
    assert service.request().state == COMPLETED
    assert service.asked == "ab"
    assert service.client.healthy() == ["a", "b"]


def test_close_ends_a_back_off_without_another_attempt():
    service = Service(otherwise=REFUSED)
    service.timer.meanwhile = service.client.close
    assert service.request().state == LOST
    assert service.asked == "ab"


@pytest.mark.parametrize(
    "policy",
    [
        {"retries": -1},
        {"backoff_base": -1.0},
        {"health_interval": 0.0},
        {"request_timeout": 0.0},
    ],
)
def test_policy_is_checked(policy):
    with pytest.raises(ValueError, match="wanted"):
        RetryPolicy(**policy)


# Over real HTTP


@pytest.fixture
def pair(make_fake_vllm):
    fakes = [make_fake_vllm(), make_fake_vllm()]
    return fakes, [Endpoint("primary", fakes[0].url), Endpoint("secondary", fakes[1].url)]


@pytest.mark.parametrize(
    ("behaviour", "stream"),
    [
        ("500", False),
        ("429", True),
        ("abort", False),
        ("abort", True),
        ("error_then_done", True),
        ("close", False),
    ],
)
def test_failover_over_http(pair, behaviour, stream):
    fakes, endpoints = pair
    fakes[0].chat = behaviour
    client = DualEndpointClient(endpoints, RetryPolicy(), "gpt-oss-120b")
    outcome = client.request("Hi", 3, stream)
    assert outcome.state == COMPLETED
    assert outcome.endpoint == "secondary"
    assert outcome.completion.text == "one two three"


def test_a_hung_endpoint_costs_one_request_timeout(pair):
    fakes, endpoints = pair
    fakes[0].chat = "hang"
    client = DualEndpointClient(endpoints, RetryPolicy(request_timeout=0.1), "gpt-oss-120b")
    outcome = client.request("Hi", 3)
    assert [attempt.error and attempt.error.kind for attempt in outcome.attempts] == [
        "deadline",
        None,
    ]


def test_background_checks_notice_a_recovery(pair):
    fakes, endpoints = pair
    fakes[0].die()
    policy = RetryPolicy(health_interval=0.02)
    with DualEndpointClient(endpoints, policy, "gpt-oss-120b") as client:
        assert client.request("Hi", 3).endpoint == "secondary"
        assert client.request("Hi", 3).endpoint == "secondary"
        fakes[0].restore()
        # The primary is asked again only after a probe: requests alone would stay where they are.
        assert any(client.request("Hi", 3).endpoint == "primary" for _ in range(2000))


def test_background_checks_notice_a_failure_before_a_request_does(pair):
    fakes, endpoints = pair
    fakes[0].health = 503
    policy = RetryPolicy(health_interval=0.02)
    with DualEndpointClient(endpoints, policy, "gpt-oss-120b") as client:
        for _ in range(2000):
            client.request("Hi", 3)
            if client.healthy() == ["secondary"]:
                break
        assert client.request("Hi", 3).endpoint == "secondary"

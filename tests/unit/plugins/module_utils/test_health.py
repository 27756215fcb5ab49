"""Three depths of health, and waiting for one of them."""

from __future__ import annotations

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _health
from ansible_collections.nvl.vllm.plugins.module_utils._health import (
    Look,
    check,
    examine,
    examine_all,
    wait_until,
)
from ansible_collections.nvl.vllm.plugins.module_utils._openai import Endpoint

MODEL = "gpt-oss-120b"


class FakeTime:
    """A clock that only a pause moves. ``then`` is called after each pause."""

    def __init__(self, then=lambda: None) -> None:
        self.now = 0.0
        self.pauses: list[float] = []
        self._then = then

    def clock(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds
        self._then()

    def look(self, *arguments, **options) -> Look:
        return Look(*arguments, clock=self.clock, pause=self.pause, **options)


@pytest.fixture
def primary(fake_vllm):
    return Endpoint("primary", fake_vllm.url)


# alive


def test_alive(primary):
    probe = check(primary, Look("alive"))
    assert probe.ok
    assert probe.depth == "alive"
    assert probe.reason == f"{primary} answers /health with 200"
    assert set(probe.as_dict()) == {"ok", "seconds", "reason"}


def test_a_dead_engine_is_not_alive(fake_vllm, primary):
    fake_vllm.health = 503
    probe = check(primary, Look("alive"))
    assert not probe.ok
    assert f"{primary}: wanted GET /health, found HTTP 503" in probe.reason


def test_nobody_listens(fake_vllm, primary):
    fake_vllm.die()
    probe = check(primary, Look("serves"))
    assert (probe.depth, probe.ok) == ("alive", False)
    assert "Connection refused" in probe.reason


# serves


def test_serves(fake_vllm, primary):
    probe = check(primary, Look("serves", MODEL))
    assert probe.ok
    assert (probe.depth, probe.model) == ("serves", MODEL)
    assert 0 <= probe.ttft_seconds <= probe.seconds
    assert fake_vllm.asked("/v1/chat/completions")[0]["max_tokens"] == 1


def test_serves_takes_the_first_listed_model(fake_vllm, primary):
    fake_vllm.models = ["first", "second"]
    assert check(primary, Look("serves")).model == "first"
    assert fake_vllm.asked("/v1/chat/completions")[0]["model"] == "first"


@pytest.mark.parametrize(("listed", "found"), [(["other"], "found other"), ([], "found none")])
def test_serves_wants_the_model_listed(fake_vllm, primary, listed, found):
    fake_vllm.models = listed
    probe = check(primary, Look("serves", MODEL))
    assert not probe.ok
    assert f"wanted {MODEL} in /v1/models, {found}" in probe.reason
    assert fake_vllm.asked("/v1/chat/completions") == []


def test_an_empty_list_of_models_does_not_serve(fake_vllm, primary):
    fake_vllm.models = []
    assert "wanted any model in /v1/models, found none" in check(primary, Look("serves")).reason


@pytest.mark.parametrize("behaviour", ["500", "abort", "error_then_done", "no_token", "close"])
def test_alive_but_does_not_serve(fake_vllm, primary, behaviour):
    fake_vllm.chat = behaviour
    probes = examine(primary, Look("serves"))
    assert [(probe.depth, probe.ok) for probe in probes.values()] == [
        ("alive", True),
        ("serves", False),
    ]


def test_a_hung_engine_is_alive_but_does_not_serve(fake_vllm, primary):
    fake_vllm.chat = "hang"
    probe = check(primary, Look("serves", timeout=0.2))
    assert (probe.depth, probe.ok) == ("serves", False)
    assert "found no answer within" in probe.reason


def test_depths_are_checked():
    with pytest.raises(ValueError, match="alive, serves, progresses, found 'well'"):
        Look("well")
    with pytest.raises(ValueError, match="timeout above 0"):
        Look("alive", timeout=0)


# progresses


def test_an_idle_engine_that_answers_progresses(fake_vllm, primary):
    time = FakeTime()
    probe = check(primary, time.look("progresses"))
    assert probe.ok
    assert (probe.running, probe.tokens, probe.model) == (0, 0, MODEL)
    assert probe.ttft_seconds is not None
    assert time.pauses == []


@pytest.mark.parametrize("series", _health.TOKENS)
def test_a_busy_engine_progresses_though_a_canary_would_wait(fake_vllm, primary, series):
    fake_vllm.running = 3
    fake_vllm.moving = series
    fake_vllm.chat = "hang"
    time = FakeTime()
    probe = check(primary, time.look("progresses"))
    assert probe.ok
    assert probe.running == 3
    assert probe.tokens > 0
    assert time.pauses == [_health.WATCH_INTERVAL]
    assert fake_vllm.asked("/v1/chat/completions") == []


def test_a_long_prompt_being_read_is_progress(fake_vllm, primary):
    fake_vllm.running = 1
    fake_vllm.moving = _health.KV_USAGE
    fake_vllm.chat = "hang"
    probe = check(primary, FakeTime().look("progresses"))
    assert probe.ok
    assert "KV cache use moves" in probe.reason


def test_an_engine_with_frozen_counters_hangs(fake_vllm, primary):
    fake_vllm.running = 2
    fake_vllm.chat = "hang"
    time = FakeTime()
    probe = check(primary, time.look("progresses", timeout=0.5, watch=2.0))
    assert not probe.ok
    assert probe.running == 2
    assert probe.tokens == 0
    assert "2 running requests without a new token and a canary that failed" in probe.reason
    assert "restart its unit" in probe.reason
    assert sum(time.pauses) == 0.25  # half of the time-out; the rest is the canary's


def test_frozen_counters_are_watched_no_longer_than_the_window(fake_vllm, primary):
    fake_vllm.running = 2
    time = FakeTime()
    probe = check(primary, time.look("progresses", timeout=30.0, watch=2.0))
    assert sum(time.pauses) == 2.0
    assert probe.ok  # the canary came through


def test_an_engine_that_hung_while_idle_is_found(fake_vllm, primary):
    fake_vllm.chat = "hang"
    probe = check(primary, FakeTime().look("progresses", timeout=0.2))
    assert not probe.ok
    assert "an idle engine and a canary that failed" in probe.reason


def test_progress_needs_vllms_series(fake_vllm, primary):
    del fake_vllm.series["vllm:prompt_tokens_total"]
    probe = check(primary, Look("progresses"))
    assert not probe.ok
    assert "wanted vllm:prompt_tokens_total in /metrics, found no such series" in probe.reason


def test_progress_of_another_model_does_not_count(fake_vllm, primary):
    fake_vllm.running = 1
    fake_vllm.moving = _health.TOKENS[0]
    assert not check(primary, Look("progresses", "other")).ok


# Waiting


def test_wait_until_returns_at_once_when_well(primary):
    time = FakeTime()
    assert wait_until(primary, time.look("serves"), 60).ok
    assert time.pauses == []


def test_wait_until_waits_for_a_server_that_comes_up(fake_vllm, primary):
    fake_vllm.health = 503

    def come_up():
        if len(time.pauses) == 3:
            fake_vllm.health = 200

    time = FakeTime(come_up)
    assert wait_until(primary, time.look("alive"), 60, interval=2.0).ok
    assert time.pauses == [2.0, 2.0, 2.0]


def test_wait_until_ends_with_the_true_reason(fake_vllm, primary):
    fake_vllm.health = 503
    time = FakeTime()
    probe = wait_until(primary, time.look("alive"), 10, interval=4.0)
    assert not probe.ok
    assert probe.reason.startswith(f"not within 10 s: {primary}: wanted GET /health, found HTTP 503")
    assert time.pauses == [4.0, 4.0]  # a third one would leave no time for a probe


def test_wait_until_gives_up_when_there_is_nothing_left_to_wait_for(fake_vllm, primary):
    fake_vllm.die()
    gone = []
    time = FakeTime(lambda: gone.append("main process 42 ended"))
    probe = wait_until(primary, time.look("alive"), 600, give_up=lambda: "".join(gone))
    assert not probe.ok
    assert probe.reason.startswith(f"main process 42 ended: {primary}: wanted GET /health")
    assert time.pauses == [1.0]


def test_wait_until_bounds_a_probe_by_the_time_that_is_left(fake_vllm, primary):
    fake_vllm.chat = "hang"
    probe = wait_until(primary, Look("serves", timeout=600), 0.2)
    assert not probe.ok
    assert "found no answer within" in probe.reason


def test_examine_all_looks_until_one_round_finds_all_well(make_fake_vllm):
    first, second = make_fake_vllm(), make_fake_vllm()
    second.health = 503

    def swap():
        # The one that was well falls ill as the other gets well: two more rounds.
        first.health = 503 if len(time.pauses) == 1 else 200
        second.health = 200

    time = FakeTime(swap)
    endpoints = [Endpoint("first", first.url), Endpoint("second", second.url)]
    look = time.look("alive")
    found = examine_all(endpoints, look, wait=60)
    assert [_health.healthy(probes, look) for probes in found] == [True, True]
    assert len(time.pauses) == 2
    assert len([path for path, _headers, _body in first.requests if path == "/health"]) == 3


def test_examine_all_without_wait_is_one_round(fake_vllm, primary):
    fake_vllm.health = 503
    time = FakeTime()
    found = examine_all([primary], time.look("serves"))
    assert not _health.healthy(found[0], time.look("serves"))
    assert len(fake_vllm.requests) == 1
    assert time.pauses == []

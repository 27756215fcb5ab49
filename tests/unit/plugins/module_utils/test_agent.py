"""When the health agent takes an engine out, and when it restarts one: the decisions alone, on a clock of the test."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _agent
from ansible_collections.nvl.vllm.plugins.module_utils._agent import Canary, Ledger, Look, Thresholds, Watch
from ansible_collections.nvl.vllm.plugins.module_utils._openai import metric_sums
from hypothesis import given, settings
from hypothesis import strategies as st

DATA = Path(__file__).parents[2] / "data"
RUNNING, KV_USAGE = "vllm:num_requests_running", "vllm:kv_cache_usage_perc"
GENERATED, PROMPTS = "vllm:generation_tokens_total", "vllm:prompt_tokens_total"
LIMITS = Thresholds()
OK = Canary("ok")
FAILED = Canary("failed", "no answer within 4 s", 4.0, True)
REFUSED = Look("refused", reason="Connection refused")
SILENT = Look("silent", reason="no answer within 2 s")


def counters(tokens=100, running=3, **more):
    return Look(
        "answered", {RUNNING: running, GENERATED: tokens, PROMPTS: 1000.0, KV_USAGE: 0.25, **more}, unit="active"
    )


class Story:
    """One engine's Watch and the time; every decision is kept."""

    def __init__(self, **thresholds):
        self.now = 1000.0
        self.thresholds = Thresholds(**thresholds)
        self.watch = Watch("primary", self.thresholds, self.now)
        self.decisions = []

    def look(self, look, after=1.0):
        self.now += after
        self.decisions += self.watch.observe(look, self.now, self.now)
        return self

    def canary(self, canary, took=0.1):
        self.watch.canary_begins(self.now)
        self.now += took
        self.decisions += self.watch.canary_ends(canary, self.now)
        return self

    def made(self):
        """Decisions since the last call."""
        made, self.decisions = [item.decision for item in self.decisions], []
        return made

    def up(self):
        self.look(counters()).canary(OK).look(counters())
        assert self.watch.state == "up"
        self.made()
        return self

    def hung(self):
        """An engine with requests whose tokens stopped."""
        self.up()
        for _ in range(5):
            self.look(counters())
        self.canary(FAILED, 4.0).look(counters(), 0.0)
        assert self.watch.state == "hung"
        self.made()
        return self


# Up


def test_an_engine_not_seen_yet_is_not_spoken_of():
    story = Story().look(counters())
    assert (story.watch.state, story.watch.word()) == ("unproven", None)
    assert story.watch.wants_canary(story.now)


def test_a_canary_proves_an_engine():
    story = Story().look(counters()).canary(OK)
    assert story.watch.word() == "up ready"
    assert story.made() == ["admit"]


@pytest.mark.parametrize("name", _agent.SERIES)
def test_any_series_that_moves_proves_an_engine(name):
    story = Story().look(counters(**{name: 1.0})).look(counters(**{name: 2.0}))
    assert story.watch.word() == "up ready"


def test_rise_asks_for_several_canaries():
    story = Story(rise=2).look(counters()).canary(OK)
    assert story.watch.state == "unproven"
    assert story.canary(OK).watch.state == "up"


def test_series_of_the_pinned_version_tell_progress():
    page = (DATA / "metrics-0.32.0.txt").read_text()
    look = _agent.look_of(metric_sums(page, _agent.SERIES))
    assert look.kind == "answered"
    assert set(look.counters) == set(_agent.SERIES)


def test_well_looks_are_no_decisions():
    story = Story().up()
    for tokens in range(50):
        story.look(counters(tokens))
    assert story.made() == []
    assert not story.watch.wants_canary(story.now)


# Hung


def test_a_canary_is_sent_after_stall_seconds_without_progress():
    story = Story().up()
    story.look(counters(), 1.5)
    assert not story.watch.wants_canary(story.now)
    story.look(counters(), 1.0)
    assert story.watch.wants_canary(story.now)
    story.watch.canary_begins(story.now)
    assert not story.watch.wants_canary(story.now)


def test_no_token_and_a_failed_canary_are_a_hang():
    story = Story().up()
    story.look(counters(), 4.0).canary(FAILED, 4.0)
    assert story.watch.word() == "up ready"
    story.look(counters(), 0.1)
    assert story.watch.word() == "down #no token for 9 s and the canary failed: no answer within 4 s"
    assert story.made() == ["eject"]
    assert story.watch.ejections == {"hung": 1}


def test_a_canary_that_stood_in_a_queue_is_no_hang():
    story = Story().up()
    story.look(counters(), 4.0)
    story.watch.canary_begins(story.now)
    story.look(counters(101), 1.0)
    story.watch.canary_ends(FAILED, story.now + 3)
    story.look(counters(101), 3.5).look(counters(101))
    assert story.watch.state == "up"


def test_a_long_prompt_moves_only_the_kv_cache():
    story = Story().up()
    for step in range(20):
        story.look(counters(**{KV_USAGE: step / 100}), 3.0)
        assert not story.watch.wants_canary(story.now)
    assert story.watch.state == "up"


def test_a_look_from_before_the_canarys_end_does_not_judge():
    """The whole host stood still: the look that was under way then proves nothing."""
    story = Story().up().look(SILENT, 4.0)
    began = story.now + 1
    story.canary(FAILED, 4.0)
    story.watch.observe(SILENT, began, story.now)
    assert story.watch.state == "up"
    story.look(counters(120), 1.0).look(counters(121))
    assert story.watch.state == "up"


def test_a_server_that_stays_silent_hangs():
    story = Story().up()
    story.look(SILENT, 4.0).canary(FAILED, 4.0).look(SILENT, 10.0)
    assert story.watch.state == "hung"


def test_canaries_that_end_while_a_look_waits_do_not_put_off_the_verdict():
    story = Story().up().look(SILENT, 4.0).canary(FAILED, 4.0)
    began = story.now
    story.canary(FAILED, 4.0).canary(FAILED, 4.0)
    story.watch.observe(SILENT, began, story.now + 2.0)
    assert story.watch.state == "hung"


def test_a_server_that_is_late_is_given_more_time_and_not_ejected():
    """It is busy with its clients: canaries fail, and every look that waits for it sees tokens."""
    story = Story().up()
    assert story.watch.look_seconds() == Thresholds().metrics_timeout
    for tokens in range(101, 110):
        story.look(SILENT, 4.0).canary(FAILED, 4.0)
        assert story.watch.look_seconds() == Thresholds().silence_timeout
        story.look(counters(tokens), 9.0)
        assert story.watch.look_seconds() == Thresholds().metrics_timeout
    # One late look and a canary that failed are no hang.
    story.look(counters(110), 1.0).look(counters(110), 4.0).canary(FAILED, 4.0).look(SILENT, 2.0)
    assert story.watch.state == "up"
    assert not story.watch.wants_restart(story.now + 1000.0)
    assert story.made() == []


def test_a_server_that_was_late_and_shows_no_token_hangs():
    story = Story().up()
    story.look(SILENT, 4.0).canary(FAILED, 4.0).look(counters(), 5.0)
    assert story.watch.state == "hung"


def test_an_idle_engine_is_asked_seldom_and_may_fail_once():
    idle = counters(running=0)
    story = Story().up().look(idle).look(idle, 9.0)
    assert not story.watch.wants_canary(story.now)
    story.look(idle)
    assert story.watch.wants_canary(story.now)
    story.canary(FAILED, 4.0).look(idle)
    assert story.watch.state == "up"
    assert story.watch.wants_canary(story.now)
    story.canary(FAILED, 4.0).look(idle)
    assert story.watch.word().startswith("down #2 canaries in a row failed on an idle engine: ")


def waited_for(client="0100007F:C001"):
    """Nothing runs, and a client is connected."""
    return counters(running=0)._replace(clients=frozenset([client]))


def test_clients_that_wait_for_an_engine_without_requests():
    """It hung between two requests: it does not know of those that came since."""
    story = Story().up().look(waited_for()).look(waited_for()).look(waited_for())
    assert not story.watch.wants_canary(story.now)
    story.look(waited_for())
    assert story.watch.wants_canary(story.now)
    story.canary(FAILED, 4.0).look(waited_for(), 0.1)
    assert story.watch.word().startswith("down #no token for 7 s for the clients that are connected and the canary fa")


def test_clients_that_come_and_go_are_no_hurry():
    story = Story().up()
    for number in range(8):
        story.look(waited_for(f"0100007F:C00{number}"))
        assert not story.watch.wants_canary(story.now)


def test_a_quick_failure_is_no_hang_yet_though_clients_are_connected():
    story = Story().up().look(waited_for()).look(waited_for(), 4.0)
    story.canary(Canary("failed", "HTTP 500")).look(waited_for())
    assert story.watch.state == "up"
    story.canary(Canary("failed", "HTTP 500")).look(waited_for())
    assert story.watch.state == "hung"


def test_the_canarys_own_connection_is_no_client():
    story = Story().up().look(counters(running=0)).look(counters(running=0), 10.0)
    story.watch.canary_begins(story.now)
    story.look(waited_for()).look(waited_for()).look(waited_for())
    story.decisions += story.watch.canary_ends(FAILED, story.now + 1.0)
    story.look(counters(running=0), 1.1)
    assert story.watch.state == "up"


def test_idle_failures_with_an_answer_between_are_no_hang():
    idle = counters(running=0)
    story = Story().up().look(idle)
    for _ in range(5):
        story.look(idle, 10.0).canary(FAILED, 4.0).look(idle).canary(OK).look(idle)
        assert story.watch.state == "up"


def test_progress_between_two_idle_failures_is_no_hang():
    story = Story().up().look(counters(running=0))
    story.look(counters(running=0), 10.0).canary(FAILED, 4.0).look(counters(running=0))
    story.look(counters(101)).look(counters(101, running=0))
    story.look(counters(101, running=0), 10.0).canary(FAILED, 4.0).look(counters(101, running=0))
    assert story.watch.state == "up"


def test_a_server_that_turns_the_canary_away_is_not_hung():
    story = Story().up()
    for _ in range(5):
        story.look(counters(), 4.0).canary(Canary("refused", "HTTP 401"))
    assert story.watch.state == "up"
    assert story.made() == ["note"]


def test_an_active_unit_that_turns_the_canary_away_is_used():
    story = Story().look(counters()).canary(Canary("refused", "HTTP 401"))
    assert story.watch.word() == "up ready"


def test_without_the_needed_series_no_hang_is_claimed():
    blind = _agent.look_of({RUNNING: 3.0})
    assert blind.kind == "blind"
    story = Story().up()
    for _ in range(5):
        story.look(blind, 10.0).canary(FAILED, 4.0).look(blind)
    assert story.watch.state == "up"
    assert not story.watch.sees_progress
    assert story.made() == ["note"]
    assert GENERATED in blind.reason


# Back


def test_one_movement_after_a_hang_is_not_enough():
    story = Story().hung().look(counters(101))
    assert story.watch.state == "hung"
    for tokens in range(102, 106):
        story.look(counters(tokens))
    assert story.watch.word() == "up ready"
    assert story.made() == ["admit"]


def test_a_canary_ends_a_hang():
    story = Story().hung()
    assert story.watch.wants_canary(story.now)
    assert story.canary(OK).watch.word() == "up ready"


# Not there


def test_an_engine_that_refuses_is_out_and_is_not_restarted():
    story = Story().up().look(REFUSED._replace(unit="active"))
    assert story.watch.word() == "down #Connection refused"
    assert story.made() == ["eject"]
    story.look(REFUSED._replace(unit="active"), 1000.0)
    assert not story.watch.wants_restart(story.now)
    assert not story.watch.wants_canary(story.now)
    assert story.made() == []


def test_a_new_engine_that_counts_from_zero_is_no_progress():
    story = Story().up().look(REFUSED).look(counters(0))
    assert story.watch.state == "unproven"
    assert story.watch.word().startswith("down #")
    assert story.canary(OK).watch.state == "up"


def test_a_new_engine_has_its_time_for_a_first_token():
    story = Story().up().look(REFUSED).look(REFUSED, 100.0).look(counters(0))
    story.canary(FAILED, 0.1).look(counters(0))
    assert story.watch.state == "unproven"
    story.canary(FAILED, 4.0).look(counters(0))
    assert story.watch.state == "hung"


@pytest.mark.parametrize(
    ("unit", "state", "look"),
    [
        *((unit, "starting", look) for unit in ("activating", "reloading") for look in (REFUSED, SILENT)),
        *((unit, "stopped", look) for unit in ("deactivating", "failed") for look in (REFUSED, SILENT, counters())),
    ],
)
def test_a_unit_that_starts_or_stops_is_out_and_left_alone(unit, state, look):
    story = Story().hung()
    for _ in range(3):
        story.look(look._replace(unit=unit), 100.0)
        assert story.watch.state == state
        assert story.watch.word() == f"down #the unit is {unit}"
        assert not story.watch.wants_canary(story.now)
        assert not story.watch.wants_restart(story.now)
    assert story.made() == ["state"]


def test_an_engine_that_answers_is_admitted_before_its_unit_has_started():
    story = Story().up().look(REFUSED).look(REFUSED._replace(unit="activating"))
    assert story.watch.state == "starting"
    story.look(counters(0)._replace(unit="activating"))
    assert story.watch.state == "unproven"
    assert story.canary(OK).watch.word() == "up ready"


def test_an_engine_that_hangs_while_its_unit_starts_is_not_restarted():
    story = Story().hung()
    story.look(counters(3)._replace(unit="activating"), 100.0)
    assert story.watch.word().startswith("down #")
    assert not story.watch.wants_restart(story.now)


def test_systemd_is_asked_only_when_something_is_wrong():
    story = Story().up()
    assert not story.watch.wants_unit("answered")
    assert story.watch.wants_unit("refused")
    assert story.watch.wants_unit("silent")
    assert story.hung().watch.wants_unit("answered")


# Drained


def test_drain_and_back():
    story = Story().up().look(counters(101)._replace(drain="new driver"))
    assert story.watch.word() == "drain"
    story.look(counters(102)._replace(drain="new driver"))
    assert story.made() == ["drain"]
    assert story.look(counters(103)).watch.word() == "up ready"
    assert story.made() == ["undrain"]


def test_a_drained_engine_that_hangs_is_both():
    story = Story().hung().look(counters()._replace(drain="new driver"))
    assert story.watch.word().startswith("drain down #no token for 10 s")


def test_a_drain_is_said_before_the_engine_is_known():
    assert Story().look(counters()._replace(drain="new driver")).watch.word() == "drain"


# Restarts


def test_a_restart_is_wanted_once_the_hang_has_lasted():
    story = Story().hung().look(counters(), 29.0)
    assert not story.watch.wants_restart(story.now)
    story.look(counters(), 1.1)
    assert story.watch.wants_restart(story.now)
    assert story.watch.restarted(story.now).decision == "restart"
    assert not story.watch.wants_restart(story.now)
    story.look(counters(), 30.0)
    assert story.watch.wants_restart(story.now)


def test_an_engine_whose_steps_are_long_is_not_restarted():
    """Ejected for a step longer than stall and canary, it still comes on: one of 120,000 tokens on a processor did."""
    story = Story().hung()
    for step in range(20):
        story.look(counters(**{KV_USAGE: step / 100}), 20.0).look(counters(**{KV_USAGE: step / 100}), 9.0)
        assert not story.watch.wants_restart(story.now)
    assert story.watch.state == "hung"


def test_a_unit_that_systemd_does_not_call_active_is_not_restarted():
    story = Story().hung().look(counters()._replace(unit=""), 1000.0)
    assert story.watch.state == "hung"
    assert not story.watch.wants_restart(story.now)


def test_a_refusal_is_said_once_an_episode():
    watch = Story().hung().watch
    assert [item.decision for item in watch.restart_refused("storm", "3 restarts")] == ["restart_refused"]
    assert watch.restart_refused("storm", "3 restarts") == []
    assert watch.refused_restarts == {"storm": 1}


def test_the_limit_of_restarts():
    ledger = Ledger(LIMITS)
    for wall in (1000.0, 1100.0, 1200.0):
        assert ledger.refusal("primary", wall) is None
        ledger.note("primary", wall)
    kind, reason = ledger.refusal("primary", 1300.0)
    assert kind == "storm"
    assert reason.startswith("3 restarts in 3600 s, and vllm_health_restart_limit is 3: ")
    assert ledger.refusal("primary", 4600.0) is None
    assert ledger.refusal("secondary", 1300.0)[0] == "query_of_death"
    assert ledger.refusal("secondary", 1320.0) is None


def test_a_limit_of_zero_allows_none():
    assert Ledger(Thresholds(restart_limit=0)).refusal("primary", 0.0)[0] == "storm"


def test_restarts_of_another_clock_do_not_count():
    ledger = Ledger(LIMITS, {"primary": [9e9, 9e9, 9e9], "secondary": [9e9]})
    assert ledger.refusal("primary", 1000.0) is None


@pytest.mark.parametrize("kept", [{}, {"restarts": 3}, {"restarts": {"primary": "x", "other": [True, "y", None]}}])
def test_a_record_of_something_else_is_no_restart(kept):
    assert Ledger.read(LIMITS, kept).refusal("primary", 1.0) is None


# Properties

PHASE = st.floats(0, 1)


class Simulation:
    """Looks and canaries as the daemon times them, of an engine that the test describes as functions of the time.

    ``moves`` gives the counters. ``answers`` gives, for a canary that begins at a time, when its answer comes (infinite
    where it hangs) and whether it is one; at the deadline it has failed.
    """

    STEP = 0.25  # how often the daemon thinks of a canary, in poll intervals

    def __init__(self, moves, answers, running=3, phase=0.0):
        self.moves, self.answers, self.running = moves, answers, running
        self.now = phase
        self.watch = Watch("primary", LIMITS, self.now)
        self.words = []  # (time, word) at each step
        self._canary = None  # (end, result)
        self._look_at = self.now

    def until(self, end):
        while self.now < end:
            if self._canary and self._canary[0] <= self.now:
                self.watch.canary_ends(self._canary[1], self.now)
                self._canary, self._look_at = None, self.now
            if self._look_at <= self.now:
                self.watch.observe(counters(self.moves(self.now), self.running), self.now, self.now)
                self._look_at = self.now + LIMITS.poll_interval
            if self.watch.wants_canary(self.now):
                self.watch.canary_begins(self.now)
                seconds, good = self.answers(self.now)
                late = seconds > LIMITS.canary_timeout
                result = FAILED if late or not good else OK
                self._canary = (self.now + min(seconds, LIMITS.canary_timeout), result)
            self.words.append((self.now, self.watch.word()))
            self.now += self.STEP * LIMITS.poll_interval
        return self


def staircase(gaps):
    """Counters that rise after each gap, and the time of the last rise."""
    times = []
    for gap in gaps:
        times.append((times[-1] if times else 0.0) + gap)
    return (lambda now: sum(time <= now for time in times)), times[-1]


@settings(deadline=None)
@given(
    gaps=st.lists(st.floats(0.01, LIMITS.stall_seconds - 1.5), min_size=10, max_size=30),
    fails_after=st.floats(0, 10),
    phase=PHASE,
)
def test_an_engine_with_progress_in_every_window_stays(gaps, fails_after, phase):
    """However its canaries fail: 200 long requests in its queue are load."""
    moves, end = staircase([0.5] * 6 + gaps)
    words = [word for _, word in Simulation(moves, lambda now: (fails_after, False), 200, phase).until(end).words]
    first = words.index("up ready")
    assert set(words[:first]) <= {None}
    assert set(words[first:]) == {"up ready"}


@settings(deadline=None)
@given(gaps=st.lists(st.floats(0.01, LIMITS.stall_seconds + LIMITS.canary_timeout - 1.5), min_size=10), phase=PHASE)
def test_steps_shorter_than_stall_and_canary_together_stay(gaps, phase):
    """An engine between whose steps even a canary waits to its deadline."""
    moves, end = staircase([0.5] * 6 + gaps)
    words = [word for _, word in Simulation(moves, lambda now: (math.inf, False), 8, phase).until(end).words]
    assert set(words[words.index("up ready") :]) == {"up ready"}


@settings(deadline=None)
@given(hangs_at=st.floats(5, 30), fails_after=st.one_of(st.just(math.inf), st.floats(0, 4)), phase=PHASE)
def test_a_hang_is_published_in_time(hangs_at, fails_after, phase):
    story = Simulation(
        lambda now: min(now, hangs_at), lambda now: (0.1, True) if now < hangs_at else (fails_after, False)
    )
    story.now += phase
    bound = hangs_at + LIMITS.stall_seconds + LIMITS.canary_timeout + 2 * LIMITS.poll_interval
    story.until(bound + 20)
    assert all(word == "up ready" for time, word in story.words if 3 <= time < hangs_at)
    after = [word for time, word in story.words if time >= bound]
    assert all(word.startswith("down #no token for ") for word in after)


@settings(deadline=None)
@given(
    tries=st.lists(st.tuples(st.sampled_from(["primary", "secondary", "third"]), st.floats(0, 600)), max_size=120),
    limit=st.integers(0, 4),
    forgets=st.booleans(),
)
def test_restarts_stay_within_their_limits(tries, limit, forgets):
    thresholds = Thresholds(restart_limit=limit)
    ledger, wall, done = Ledger(thresholds), 1e9, []
    for name, later in tries:
        wall += later
        if forgets:  # the agent itself was restarted, and has only its file
            ledger = Ledger.read(thresholds, json.loads(json.dumps(ledger.as_dict())))
        if ledger.refusal(name, wall) is None:
            ledger.note(name, wall)
            done.append((name, wall))
    for name, at in done:
        near = [other for other, time in done if 0 <= time - at < thresholds.query_of_death_window]
        assert set(near) == {name}
        assert len([1 for other, time in done if other == name and 0 <= time - at < 3600]) <= limit


@given(st.text())
def test_a_word_is_one_short_line(text):
    line = _agent.printable(text)
    assert len(line) <= 100
    assert all(" " <= char <= "~" for char in line)


# Thresholds


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("poll_interval", 0, "seconds above zero"),
        ("stall_seconds", -1, "0 or more|seconds above zero"),
        ("canary_timeout", math.inf, "a number of seconds"),
        ("canary_timeout", "4", "a number of seconds"),
        ("restart_limit", True, "a whole number"),
        ("restart_limit", 2.5, "a whole number"),
        ("restart_limit", -1, "0 or more"),
        ("rise", 0, "1 or more"),
    ],
)
def test_a_threshold_that_cannot_work_is_named(name, value, wanted):
    with pytest.raises(ValueError, match=rf"vllm_health_{name} is .*: wanted ({wanted})"):
        Thresholds(**{name: value})

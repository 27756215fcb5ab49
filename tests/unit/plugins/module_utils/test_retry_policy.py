"""The rules that all clients of this project follow."""

from __future__ import annotations

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils._retry_policy import (
    LONGEST_REST,
    Failure,
    RetryRules,
    Standing,
    choose,
    doubling,
    ready,
    recovered,
)

REFUSED = Failure(reached=False)
DIED = Failure(500)
BUSY = Failure(503)
TOO_MANY = Failure(429)
CUT = Failure()
SEEN = Failure(output=True)
WRONG = Failure(400)


@pytest.mark.parametrize(
    ("failures", "again"),
    [
        ([REFUSED], True),
        ([REFUSED] * 4, True),
        ([REFUSED] * 5, False),  # one attempt and four retries
        ([BUSY, TOO_MANY, BUSY, TOO_MANY], True),
        ([BUSY] * 5, False),
        ([DIED], True),
        ([DIED, DIED], False),  # it would kill a third engine
        ([CUT, DIED], False),
        ([DIED, REFUSED], True),  # the second never had it
        ([DIED, REFUSED, BUSY, DIED], False),
        ([WRONG], False),
        ([REFUSED, WRONG], False),
        ([SEEN], False),
        ([REFUSED, SEEN], False),
    ],
)
def test_when_a_request_is_sent_again(failures, again):
    assert RetryRules().may_repeat(failures) is again


def test_no_retries_is_one_attempt():
    assert not RetryRules(retries=0).may_repeat([REFUSED])


def test_an_engines_failure_can_be_final():
    assert not RetryRules(repeats=0).may_repeat([DIED])
    assert RetryRules(repeats=0).may_repeat([REFUSED])


@pytest.mark.parametrize(
    ("failure", "rejected", "taken"),
    [(REFUSED, False, False), (DIED, False, True), (BUSY, False, False), (TOO_MANY, True, False), (CUT, False, True)],
)
def test_what_a_failure_says(failure, rejected, taken):
    assert (failure.rejected, failure.taken) == (rejected, taken)


def test_pauses_are_the_guides():
    rules = RetryRules()
    assert [rules.pause(number) for number in range(6)] == [2.0, 4.0, 8.0, 16.0, 16.0, 16.0]
    assert doubling(2.0, 4) == rules.pauses
    assert doubling(2.0, 0) == (2.0,)


def test_jitter_spreads_a_pause_around_its_middle():
    rules = RetryRules(pauses=(10.0,), jitter=0.2)
    assert [rules.pause(0, draw) for draw in (0.0, 0.5, 1.0)] == [8.0, 10.0, 12.0]


@pytest.mark.parametrize(
    "wrong", [{"retries": -1}, {"repeats": -1}, {"pauses": ()}, {"pauses": (1.0, -1.0)}, {"jitter": 1.1}]
)
def test_rules_are_checked(wrong):
    with pytest.raises(ValueError, match="wanted"):
        RetryRules(**wrong)


def test_the_round_goes_over_the_healthy():
    a, b, c = members = [Standing(), Standing(), Standing()]
    assert [choose(members, {}) for _ in range(4)] == [a, b, c, a]
    b.mark(False, b.events)
    assert [choose(members, {}) for _ in range(3)] == [c, a, c]


def test_an_untried_endpoint_comes_before_a_tried_one_even_if_it_looks_unhealthy():
    a, b = members = [Standing(), Standing()]
    b.mark(False, b.events)
    assert choose(members, {a: a.events}) is b
    assert choose(members, {a: a.events, b: b.events}) is a


def test_all_are_tried_when_none_is_healthy():
    a, b = members = [Standing(), Standing()]
    for member in members:
        member.mark(False, member.events)
    assert [choose(members, {}) for _ in range(2)] == [a, b]


def test_an_endpoint_that_wants_a_rest_has_it_while_another_is_there():
    a, b = members = [Standing(), Standing()]
    a.rest(0.0, 10.0)
    assert [choose(members, {}, now) for now in (0.0, 9.0, 10.0)] == [b, b, a]


def test_the_first_that_is_ready_is_asked():
    a, b = members = [Standing(), Standing()]
    a.rest(0.0, 10.0)
    tried = {b: b.events}
    assert choose(members, tried, 0.0, resume=2.0) is b  # after its pause, and long before the other
    assert choose(members, tried, 0.0, resume=16.0) is a  # after its rest
    assert [ready(each, tried, 2.0) for each in members] == [10.0, 2.0]


def test_an_endpoint_that_came_back_needs_no_pause():
    _a, b = members = [Standing(), Standing()]
    tried = {each: each.events for each in members}
    for each in members:
        each.mark(False, each.events)
    b.mark(True, b.events)
    assert [ready(each, tried, 2.0) for each in members] == [2.0, 0.0]
    assert choose(members, tried, 0.0, resume=2.0) is b


def test_a_rest_has_a_limit_and_is_never_made_shorter_by_another_answer():
    endpoint = Standing()
    endpoint.rest(5.0, 1e12)
    assert endpoint.not_before == 5.0 + LONGEST_REST
    endpoint.rest(6.0, 1.0)
    assert endpoint.not_before == 5.0 + LONGEST_REST


def test_a_recovery_ends_the_rest():
    endpoint = Standing()
    endpoint.mark(False, endpoint.events)
    endpoint.rest(0.0, 10.0)
    endpoint.mark(True, endpoint.events)
    assert endpoint.not_before == 0.0


def test_old_news_does_not_count():
    endpoint = Standing()
    seen = endpoint.events
    assert endpoint.mark(False, seen)
    assert not endpoint.mark(True, seen)  # a probe from before the failure
    assert not endpoint.healthy
    assert endpoint.mark(True, endpoint.events)
    assert not endpoint.mark(True, endpoint.events)  # nothing new
    assert not endpoint.mark(False, seen)
    assert endpoint.healthy


def test_recovered_is_what_came_back_since_it_was_tried():
    endpoint = Standing()
    tried = {endpoint: endpoint.events}
    assert not recovered(tried)
    endpoint.mark(False, endpoint.events)
    assert not recovered(tried)
    endpoint.mark(True, endpoint.events)
    assert recovered(tried)

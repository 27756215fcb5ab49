"""The numbers of a drill and the budget they are judged by."""

from __future__ import annotations

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils._drill_report import (
    Budget,
    Timeline,
    percentile,
    summarise,
)
from ansible_collections.nvl.vllm.plugins.module_utils._dual_client import (
    COMPLETED,
    LOST,
    TRUNCATED,
    Attempt,
    Outcome,
)
from ansible_collections.nvl.vllm.plugins.module_utils._openai import (
    ConnectFailed,
    HttpStatus,
    ResponseCut,
)

TIMELINE = Timeline("a", fault_at=100.0, recovered_at=160.0)


def outcome(state, *attempts, streamed=False):
    """Attempts are (endpoint, started, finished, error)."""
    tries = tuple(Attempt(*attempt) for attempt in attempts)
    return Outcome(state, streamed, tries[0].started, tries[-1].finished, tries)


REFUSED = ConnectFailed("a refused")
OUTCOMES = [
    outcome(COMPLETED, ("a", 90.0, 91.0, None)),
    outcome(COMPLETED, ("b", 90.0, 92.0, None), streamed=True),
    outcome(TRUNCATED, ("a", 99.0, 100.5, ResponseCut("a cut", chunks=2)), streamed=True),
    outcome(COMPLETED, ("a", 99.0, 101.25, REFUSED), ("b", 101.25, 105.0, None)),
    outcome(LOST, ("a", 101.0, 101.5, REFUSED), ("b", 101.5, 104.0, HttpStatus("b said 503", 503))),
    outcome(COMPLETED, ("a", 165.0, 166.0, None)),
    outcome(COMPLETED, ("a", 170.0, 171.0, ConnectFailed("later")), ("b", 171.0, 172.0, None)),
]


def test_summarise():
    assert summarise(OUTCOMES, TIMELINE, ["a", "b"]) == {
        "sent": 7,
        "completed": 5,
        "completed_after": 2,
        "lost": 1,
        "refused": 1,
        "truncated": 1,
        "retried": 3,
        "retried_by_gateway": None,
        "attempts": 10,
        "streamed": 2,
        "latency": {"p50": 2.0, "p99": 6.0, "worst": 6.0},
        "seconds_to_eject": 1.5,
        "seconds_to_first_success": 66.0,
        "seconds_to_recover": 60.0,
        "refusals": None,
        "endpoints": {"a": 2, "b": 3},
        "errors": [
            {"endpoint": "a", "kind": "cut", "count": 1, "first": "a cut"},
            {"endpoint": "a", "kind": "connect", "count": 3, "first": "a refused"},
            {"endpoint": "b", "kind": "http", "count": 1, "first": "b said 503"},
        ],
    }


def test_summarise_without_recovery_counts_every_failure_at_the_target():
    numbers = summarise(OUTCOMES, Timeline("a", 100.0, None, "too late"), ["a", "b"])
    assert numbers["seconds_to_eject"] == 71.0
    assert numbers["seconds_to_recover"] is None
    assert numbers["completed_after"] == 0


def test_summarise_of_nothing():
    numbers = summarise([], TIMELINE, ["a", "b"])
    assert numbers["sent"] == 0
    assert numbers["latency"] == {"p50": None, "p99": None, "worst": None}
    assert numbers["seconds_to_eject"] is None
    assert numbers["endpoints"] == {"a": 0, "b": 0}


def test_at_most_five_errors():
    many = [outcome(LOST, (f"e{n}", 100.0, 101.0 + n, REFUSED)) for n in range(9)]
    errors = summarise(many, TIMELINE, [])["errors"]
    assert [error["endpoint"] for error in errors] == ["e0", "e1", "e2", "e3", "e4"]


@pytest.mark.parametrize(("percent", "expected"), [(0, 1.0), (50, 2.0), (51, 3.0), (75, 3.0), (99, 4.0), (100, 4.0)])
def test_percentile_is_nearest_rank(percent, expected):
    assert percentile([1.0, 2.0, 3.0, 4.0], percent) == expected


GOOD = {
    "sent": 50,
    "lost": 0,
    "truncated": 4,
    "completed_after": 8,
    "latency": {"worst": 12.5},
    "seconds_to_recover": 60.0,
}


def broken(budget, timeline=TIMELINE, **changes):
    return budget.broken({**GOOD, **changes}, timeline, concurrency=4, wanted_after=8)


def test_a_budget_that_is_just_kept():
    assert broken(Budget(worst_latency=12.5, recovery=60.0)) == []
    assert broken(Budget()) == []


@pytest.mark.parametrize(
    ("budget", "changes", "sentence"),
    [
        (Budget(), {"lost": 1}, "lost 1 of 50 requests (budget 0)"),
        (Budget(lost=2), {"lost": 3}, "lost 3 of 50 requests (budget 2)"),
        (
            Budget(),
            {"truncated": 5},
            "cut off 5 of 50 answers after their first token (budget 4)",
        ),
        (
            Budget(truncated=0),
            {"truncated": 1},
            "cut off 1 of 50 answers after their first token (budget 0)",
        ),
        (Budget(worst_latency=10), {}, "the slowest answer took 12.5 s (budget 10 s)"),
        (Budget(recovery=59.5), {}, "a served again after 60.0 s (budget 59.5 s)"),
        (Budget(), {"completed_after": 7}, "7 requests completed after the recovery (wanted 8)"),
    ],
)
def test_a_broken_budget_is_a_sentence_with_numbers(budget, changes, sentence):
    assert broken(budget, **changes) == [sentence]


def test_no_recovery_is_always_broken():
    never = Timeline("a", 100.0, None, "not within 600 s: engine gone")
    assert broken(Budget(), never, seconds_to_recover=None, completed_after=0) == [
        "a did not serve again: not within 600 s: engine gone"
    ]


def test_nothing_completed_has_no_worst_latency():
    assert broken(Budget(worst_latency=1.0), latency={"worst": None}) == []


# What the gateway's statistics and refusals add


@pytest.mark.parametrize(("ejected_at", "expected"), [(103.25, 3.25), (None, None)])
def test_with_statistics_they_tell_when_it_was_ejected(ejected_at, expected):
    timeline = Timeline("a", 100.0, 160.0, watched=True, ejected_at=ejected_at)
    assert summarise(OUTCOMES, timeline, ["a", "b"])["seconds_to_eject"] == expected


def test_of_several_targets_the_last_failure_counts():
    timeline = Timeline("a, b", 100.0, 160.0, targets=("a", "b"))
    assert summarise(OUTCOMES, timeline, ["a", "b"])["seconds_to_eject"] == 4.0


def test_only_requests_from_after_the_fault_are_a_first_success():
    early = [outcome(COMPLETED, ("a", 99.0, 100.5, None))]
    assert summarise(early, TIMELINE, ["a"])["seconds_to_first_success"] is None
    late = [*early, outcome(COMPLETED, ("a", 100.0, 102.0, None)), outcome(COMPLETED, ("a", 100.5, 101.0, None))]
    assert summarise(late, TIMELINE, ["a"])["seconds_to_first_success"] == 1.0


@pytest.mark.parametrize(
    ("eject", "watched", "sentences"),
    [
        (9.5, True, []),
        (10.5, True, ["a was ejected after 10.5 s (budget 10 s)"]),
        (None, True, ["the gateway went on to use a (budget 10 s)"]),
        (None, False, []),  # no attempt failed there
    ],
)
def test_the_budget_of_the_ejection(eject, watched, sentences):
    timeline = Timeline("a", 100.0, 160.0, watched=watched)
    assert broken(Budget(eject=10), timeline, seconds_to_eject=eject) == sentences
    assert broken(Budget(), timeline, seconds_to_eject=eject) == []


REFUSALS = {"count": 9, "slowest": 0.25, "improper": [], "retry_after": "5"}


def down(**changes):
    return Timeline("a, b", 100.0, 160.0, refusals={**REFUSALS, **changes})


@pytest.mark.parametrize(
    ("timeline", "sentences"),
    [
        (down(), []),
        (down(slowest=6.0), ["the slowest refusal took 6.0 s (budget 5 s)"]),
        (
            down(improper=["HTTP 502"]),
            ["found HTTP 502 while all engines were down (wanted HTTP 503 with Retry-After)"],
        ),
        (down(count=0, slowest=None), ["no request was refused with HTTP 503 while all engines were down"]),
    ],
)
def test_the_budget_of_refusals(timeline, sentences):
    assert broken(Budget(), timeline, lost=7, refused=7) == sentences


def test_what_was_refused_is_lost_unless_all_engines_were_down():
    assert broken(Budget(), lost=7, refused=7) == ["lost 7 of 50 requests (budget 0)"]
    assert broken(Budget(), down(), lost=8, refused=7) == ["lost 1 of 50 requests (budget 0)"]

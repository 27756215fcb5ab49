"""The failover drill against two stand-ins for vLLM over real HTTP."""

from __future__ import annotations

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _drill
from ansible_collections.nvl.vllm.plugins.module_utils._drill import DrillRefused, Plan, run_drill
from ansible_collections.nvl.vllm.plugins.module_utils._drill_report import Budget
from ansible_collections.nvl.vllm.plugins.module_utils._dual_client import RetryPolicy
from ansible_collections.nvl.vllm.plugins.module_utils._engine_process import EngineError
from ansible_collections.nvl.vllm.plugins.module_utils._openai import Endpoint

MODEL = "gpt-oss-120b"


class Outage:
    """A fault that begins with one function and, at the third look at it, ends with another."""

    def __init__(self, begin=lambda: None, end=None):
        self.begin = begin
        self.end = end
        self.looks = 0
        self.injected = False
        self.impossible = ""

    def __str__(self):
        return "an outage"

    def prepare(self):
        if self.impossible:
            raise EngineError(self.impossible)

    def inject(self):
        self.begin()
        self.injected = True

    def pending(self):
        self.looks += 1
        if self.looks == 3 and self.end:
            self.end()
        return "" if self.looks > 3 and self.end else "the outage lasts"


class Service:
    """Two stand-ins behind a drill that is quick about everything."""

    def __init__(self, make):
        self.primary, self.secondary = make(), make()
        for fake in (self.primary, self.secondary):
            fake.latency = 0.002
        self.endpoints = [
            Endpoint("primary", self.primary.url),
            Endpoint("secondary", self.secondary.url),
        ]
        self.budget = Budget()
        self.policy = {"backoff_base": 0.01, "health_interval": 5.0, "request_timeout": 5.0}
        self.plan = {"recovery_timeout": 20.0, "probe_interval": 0.02}

    def drill(self, fault, model=MODEL):
        plan, policy = Plan(**self.plan), RetryPolicy(**self.policy)
        target = self.endpoints[0]
        return run_drill(self.endpoints, target, fault, plan, self.budget, policy, model)


@pytest.fixture
def service(make_fake_vllm):
    return Service(make_fake_vllm)


def test_one_endpoint_dies_and_no_request_is_lost(service):
    result = service.drill(Outage(service.primary.die, service.primary.restore))
    assert result["verdict"] == "passed"
    assert result["broken"] == []
    assert result["lost"] == 0
    assert result["retried"] > 0
    assert result["truncated"] <= 4
    assert result["sent"] == result["completed"] + result["truncated"]
    assert result["attempts"] >= result["sent"] + result["retried"]
    assert abs(result["sent"] - 2 * result["streamed"]) <= 2
    assert result["completed_after"] >= 8
    assert 0 <= result["seconds_to_eject"] <= result["seconds_to_recover"]
    assert result["latency"]["p50"] <= result["latency"]["p99"] <= result["latency"]["worst"]
    assert all(result["endpoints"][name] > 0 for name in ("primary", "secondary"))
    assert sum(result["endpoints"].values()) == result["completed"]
    assert {error["endpoint"] for error in result["errors"]} == {"primary"}


def test_load_is_sent_as_declared(service):
    service.plan.update(concurrency=2, max_tokens=7)
    service.drill(Outage(service.primary.die, service.primary.restore))
    asked = service.secondary.asked("/v1/chat/completions")
    load = [body for body in asked if body["max_tokens"] == 7]
    assert {body["model"] for body in load} == {MODEL}
    assert {body["stream"] for body in load} == {True, False}
    questions = [body["messages"][0]["content"] for body in load]
    assert len(set(questions)) == len(questions)


def test_both_die_and_the_drill_fails(service):
    service.policy["retries"] = 2

    def both_die():
        service.primary.die()
        service.secondary.die()

    result = service.drill(Outage(both_die, service.primary.restore))
    assert result["verdict"] == "failed"
    assert result["lost"] > 0
    assert result["broken"][0] == f"lost {result['lost']} of {result['sent']} requests (budget 0)"
    assert result["sent"] == result["completed"] + result["truncated"] + result["lost"]


def test_a_target_that_never_serves_again_fails_the_drill(service):
    service.plan["recovery_timeout"] = 0.3
    result = service.drill(Outage(service.primary.die))
    assert result["verdict"] == "failed"
    assert result["lost"] == 0
    assert result["seconds_to_recover"] is None
    assert result["broken"] == ["primary did not serve again: not within 0.3 s: the outage lasts"]


def test_a_new_engine_that_does_not_serve_is_no_recovery(service):
    def restore_broken():
        service.primary.chat = "500"
        service.primary.restore()

    service.plan["recovery_timeout"] = 0.5
    result = service.drill(Outage(service.primary.die, restore_broken))
    assert result["seconds_to_recover"] is None
    assert "HTTP 500" in result["broken"][0]


def test_answers_that_are_cut_off_are_counted_as_truncated(service):
    class Cut(Outage):
        def inject(self):
            service.primary.chat = "cut_streams"

        def pending(self):
            return "" if service.primary.cuts else "no answer has been cut off yet"

    service.budget = Budget(truncated=0)
    # The client comes back soon, should its first request there have been one without streaming.
    service.policy["health_interval"] = 0.01
    result = service.drill(Cut())
    assert result["lost"] == 0
    assert result["truncated"] > 0
    assert result["verdict"] == "failed"
    assert f"cut off {result['truncated']} of {result['sent']} answers" in result["broken"][0]


def test_load_is_bounded(service):
    service.plan["max_requests"] = 60
    result = service.drill(Outage(service.primary.die))
    assert result["sent"] == 60
    assert "the load reached its limit of 60 requests" in result["broken"][0]


def test_each_endpoint_gets_plain_and_streamed_requests(service):
    service.plan.update(concurrency=1, requests_before=16)
    service.drill(Outage(service.primary.die, service.primary.restore))
    for fake in (service.primary, service.secondary):
        load = [b for b in fake.asked("/v1/chat/completions") if b["max_tokens"] == 32][:8]
        assert [body["stream"] for body in load] == 4 * [False, True]


# Refusals: nothing may be touched


def refused(service, fault, message, **options):
    with pytest.raises(DrillRefused, match=message):
        service.drill(fault, **options)
    assert not fault.injected


def test_no_drill_with_an_endpoint_already_down(service):
    service.secondary.die()
    fault = Outage(service.primary.die)
    refused(service, fault, r"wanted every endpoint to serve first, found secondary \(.*refused")
    assert service.primary.asked("/v1/chat/completions") != []  # it was probed like the other
    assert len(service.primary.asked("/v1/chat/completions")) == 1  # but got no load


def test_no_drill_with_one_endpoint(service):
    del service.endpoints[1]
    refused(service, Outage(service.primary.die), "two endpoints or more")
    assert service.primary.requests == []


def test_no_drill_with_different_models(service):
    service.secondary.models = ["other"]
    refused(service, Outage(), f"wanted one model on all endpoints, found {MODEL}, other", model=None)


def test_no_drill_when_the_fault_is_impossible(service):
    fault = Outage()
    fault.impossible = "no engine below vllm@primary.service"
    refused(service, fault, fault.impossible)
    assert len(service.primary.asked("/v1/chat/completions")) == 1


def test_no_drill_when_requests_fail_before_the_fault(service):
    def fail_under_load(client, question, max_tokens, stream):
        service.secondary.chat = "500"
        return original(client, question, max_tokens, stream)

    original = _drill.DualEndpointClient.request
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_drill.DualEndpointClient, "request", fail_under_load)
        refused(service, Outage(service.primary.die), "secondary avoided by the client")


def test_no_drill_when_requests_are_rejected_before_the_fault(service):
    def reject_under_load(client, question, max_tokens, stream):
        service.primary.chat = service.secondary.chat = "401"
        return original(client, question, max_tokens, stream)

    original = _drill.DualEndpointClient.request
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_drill.DualEndpointClient, "request", reject_under_load)
        refused(service, Outage(service.primary.die), r"0 completed, [1-4] lost")


def test_an_engine_that_is_gone_at_the_moment_of_the_fault(service):
    def too_late():
        raise EngineError("engine 12 ended by itself")

    refused(service, Outage(too_late), "ended by itself")


def test_a_defect_in_the_load_is_not_swallowed(service, monkeypatch):
    def defect(*_arguments, **_options):
        raise TypeError("a defect")

    monkeypatch.setattr(_drill.DualEndpointClient, "request", defect)
    with pytest.raises(TypeError, match="a defect"):
        service.drill(Outage(service.primary.die))


@pytest.mark.parametrize("wrong", [{"concurrency": 0}, {"requests_before": 0}, {"recovery_timeout": 0.0}])
def test_a_plan_is_checked(wrong):
    with pytest.raises(ValueError, match=f"wanted {next(iter(wrong))}"):
        Plan(**wrong)

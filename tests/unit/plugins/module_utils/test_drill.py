"""The failover drill against two stand-ins for vLLM over real HTTP."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _drill
from ansible_collections.nvl.vllm.plugins.module_utils._drill import (
    DrillRefused,
    Interrupted,
    Plan,
    Scene,
    run_drill,
)
from ansible_collections.nvl.vllm.plugins.module_utils._drill_report import Budget
from ansible_collections.nvl.vllm.plugins.module_utils._dual_client import RetryPolicy
from ansible_collections.nvl.vllm.plugins.module_utils._engine_process import EngineError
from ansible_collections.nvl.vllm.plugins.module_utils._faults import DeadMan, Fault, Relayed
from ansible_collections.nvl.vllm.plugins.module_utils._openai import Endpoint

MODEL = "gpt-oss-120b"


class Outage(Fault):
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
        self.via, self.gateway, self.statistics = "client", None, None
        self.both = False
        self.commands = []
        self.policy = {"backoff_base": 0.01, "health_interval": 5.0, "request_timeout": 5.0}
        self.plan = {"recovery_timeout": 20.0, "probe_interval": 0.02}

    def drill(self, fault, model=MODEL):
        plan, policy = Plan(**self.plan), RetryPolicy(**self.policy)
        targets = self.endpoints if self.both else self.endpoints[:1]
        scene = Scene(self.endpoints, targets, self.via, self.gateway, self.statistics)
        return run_drill(scene, fault, plan, self.budget, policy, DeadMan(self.run, "undo"), model)

    def run(self, command):
        """In the place of systemd: the commands are only noted."""
        self.commands.append(command)
        return 0, "", ""


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


def test_first_success_and_bodies_of_a_chosen_size(service):
    service.plan["prompt_tokens"] = 1000
    result = service.drill(Outage(service.primary.die, service.primary.restore))
    assert 0 < result["seconds_to_first_success"] <= result["seconds_to_recover"]
    load = [body for body in service.secondary.asked("/v1/chat/completions") if body["max_tokens"] == 32]
    questions = [body["messages"][0]["content"] for body in load]
    assert all(question.count(" number") == 1000 for question in questions)
    assert len({question.split(".")[0] for question in questions}) == len(questions)  # no shared beginning


def test_alone_the_target_loses_requests(service):
    service.via = "single"
    service.budget = Budget(lost=1000)
    result = service.drill(Outage(service.primary.die, service.primary.restore))
    assert result["lost"] > 0
    assert result["retried"] == 0
    assert result["attempts"] == result["sent"]
    assert list(result["endpoints"]) == ["primary"]
    # Only the look before the drill went to the other one.
    assert len(service.secondary.asked("/v1/chat/completions")) == 1


# Through a gateway


class Gateway:
    """A stand-in for the gateway: sends to the first live engine, before the first byte to the next.

    Its statistics say which engines live. Without any it answers ``refusal``.
    """

    def __init__(self, service):
        self.fakes = {"primary": service.primary, "secondary": service.secondary}
        self.refusal = {"Retry-After": "5"}
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle(self):
                with contextlib.suppress(OSError):  # clients leave
                    super().handle()

            def do_GET(self):
                if self.path == "/;csv":
                    self.reply(gateway.statistics().encode())
                else:
                    self.pass_on()

            def do_POST(self):
                self.pass_on(self.rfile.read(int(self.headers["Content-Length"])))

            def pass_on(self, body=b""):
                self.close_connection = True
                for fake in gateway.alive():
                    try:
                        engine = socket.create_connection(("127.0.0.1", fake.port), 5)
                    except OSError:
                        continue
                    with engine:
                        head = f"{self.command} {self.path} HTTP/1.1\r\nContent-Length: {len(body)}\r\n"
                        engine.sendall(f"{head}Connection: close\r\n\r\n".encode() + body)
                        answered = False
                        while data := engine.recv(65536):
                            self.wfile.write(data)
                            answered = True
                    if answered:
                        return
                self.reply(b"", 503, gateway.refusal)

            def reply(self, body, status=200, headers=None):
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def alive(self):
        return [fake for fake in self.fakes.values() if fake._server is not None]

    def statistics(self):
        alive = self.alive()
        rows = [f"e,{name},{'UP' if fake in alive else 'DOWN'},0" for name, fake in self.fakes.items()]
        return "\n".join(["# pxname,svname,status,wretr", *rows, ""])

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def gateway(service):
    gateway = Gateway(service)
    service.via = "gateway"
    service.gateway = Endpoint("gateway", gateway.url)
    service.statistics = Endpoint("statistics", f"{gateway.url}/;csv")
    yield gateway
    gateway.close()


class Kill(Outage):
    """Dies at once, and is back half a second later: time enough for one to look at the statistics."""

    def pending(self):
        self.looks += 1
        if self.looks == 25:
            self.end()
        return "" if self.looks > 25 else "dead"


def test_users_of_the_gateway_notice_little(service, gateway):
    service.budget = Budget(lost=4)  # the stand-in does not send again what was cut in the engine
    result = service.drill(Kill(service.primary.die, service.primary.restore))
    assert result["verdict"] == "passed", result["broken"]
    assert list(result["endpoints"]) == ["gateway"]
    assert result["retried"] == 0
    assert result["retried_by_gateway"] == 0
    assert 0 < result["seconds_to_eject"] < result["seconds_to_recover"]
    assert result["refusals"] is None


@pytest.mark.parametrize("retries", [0, 2])
def test_users_of_openais_library_get_over_a_500(service, gateway, retries):
    def behave(way):
        service.primary.chat = way

    service.plan["gateway_retries"] = retries
    service.budget = Budget(lost=100)
    # Every request of the load meets it; it is over before the first pause of half a second is.
    result = service.drill(Outage(lambda: behave("500"), lambda: behave("ok")))
    assert result["verdict"] == "passed", result["broken"]
    assert (result["lost"] > 0, result["retried"] > 0) == ((False, True) if retries else (True, False))


def test_a_gateway_that_never_ejects_breaks_the_budget(service, gateway):
    service.budget = Budget(eject=10.0)
    result = service.drill(Outage(end=lambda: None))  # nothing happens
    assert result["seconds_to_eject"] is None
    assert result["broken"] == ["the gateway went on to use primary (budget 10 s)"]


def test_the_gateway_itself_is_the_target(service, gateway):
    scene = Scene(service.endpoints[:1], [service.gateway], "gateway", service.gateway)
    plan, policy = Plan(**service.plan), RetryPolicy(**service.policy)
    result = run_drill(scene, Outage(end=lambda: None), plan, Budget(), policy, DeadMan(service.run, "undo"))
    assert result["verdict"] == "passed"


def both_down(service):
    service.both = True
    service.budget = Budget(lost=4)
    service.policy["backoff_base"] = 0.02

    def begin():
        service.primary.die()
        service.secondary.die()

    def end():
        service.primary.restore()
        service.secondary.restore()

    return service.drill(Kill(begin, end))


@pytest.fixture
def impatient(monkeypatch):
    """Asks more often how the gateway refuses."""

    def watch(gateway, model):
        return original(gateway, model, 0.02)

    original = _drill.RefusalWatch
    monkeypatch.setattr(_drill, "RefusalWatch", watch)


@pytest.mark.usefixtures("impatient")
def test_without_any_engine_the_gateway_refuses_properly(service, gateway):
    result = both_down(service)
    assert result["verdict"] == "passed", result["broken"]
    assert 0 < result["refused"] <= result["lost"]
    assert result["refusals"]["count"] > 0
    assert result["refusals"]["improper"] == []
    assert result["seconds_to_eject"] is not None
    assert result["seconds_to_first_success"] > 0.3


@pytest.mark.usefixtures("impatient")
def test_a_refusal_without_retry_after_breaks_the_budget(service, gateway):
    gateway.refusal = {}
    assert both_down(service)["broken"] == [
        "found HTTP 503 without Retry-After while all engines were down (wanted HTTP 503 with Retry-After)"
    ]


@pytest.mark.parametrize("behaviour", ["token_error_then_done", "no_done", "cut_after_token"])
def test_an_answer_that_breaks_off_is_never_silent(service, gateway, behaviour):
    class Broken(Outage):
        def inject(self):
            service.primary.chat = behaviour

        def pending(self):
            done = len(service.primary.asked("/v1/chat/completions"))
            if self.looks == 0:
                self.looks = done
            if done < self.looks + 6:
                return "some more"
            service.primary.chat = "ok"
            return ""

    service.plan["max_requests"] = 2000
    service.budget = Budget(lost=1000, truncated=0)
    result = service.drill(Broken())
    assert result["verdict"] == "failed"
    assert result["truncated"] > 0
    assert result["sent"] == result["completed"] + result["lost"] + result["truncated"]


@pytest.mark.parametrize("kind", ["storm503", "reset", "slow"])
def test_relayed_faults_in_front_of_one_of_two(service, kind):
    service.budget = Budget(truncated=1000)
    service.policy["health_interval"] = 0.05  # so that the client comes back to the target
    fault = Relayed(kind, service.endpoints[0], 0.3)
    result = service.drill(fault)
    assert result["verdict"] == "passed", result["broken"]
    assert result["seconds_to_recover"] >= 0.3
    assert bool(result["errors"]) == (kind != "slow")
    assert service.commands == []


def test_no_drill_through_a_gateway_that_does_not_use_an_engine(service, gateway):
    gateway.fakes["primary"] = type("Gone", (), {"_server": None})
    gateway.fakes["other"] = service.primary
    service.plan["probe_timeout"] = 0.3
    refused(service, Outage(), "wanted the gateway to use every engine first, found the gateway does not use primary")


def test_no_drill_through_a_gateway_that_does_not_answer(service, gateway):
    gateway.close()
    service.statistics = None
    refused(service, Outage(), r"wanted every endpoint to serve first, found gateway \(.*refused")


# Undoing


class Lasting(Outage):
    """A fault that lasts until it is restored, and what was called in which order."""

    lasts = 5.0
    undo = ("true",)

    def __init__(self, meanwhile=lambda: None):
        super().__init__()
        self.calls = []
        self.meanwhile = meanwhile

    def inject(self):
        self.calls.append("inject")

    def pending(self):
        self.meanwhile()
        return "it lasts"

    def restore(self):
        self.calls.append("restore")

    def close(self):
        self.calls.append("close")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_drill_undone(service, number):
    fault = Lasting(lambda: os.kill(os.getpid(), number))
    before = [signal.getsignal(each) for each in _drill.SIGNALS]
    with pytest.raises(Interrupted, match=signal.Signals(number).name):
        service.drill(fault)
    assert fault.calls == ["inject", "restore", "close"]
    assert [command[:2] for command in service.commands] == [["systemd-run", "--collect"], ["systemctl", "stop"]]
    assert [signal.getsignal(each) for each in _drill.SIGNALS] == before


def test_a_further_signal_does_not_disturb_the_undoing(service):
    class Disturbed(Lasting):
        def restore(self):
            os.kill(os.getpid(), signal.SIGTERM)
            super().restore()

    fault = Disturbed(lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        service.drill(fault)
    assert fault.calls == ["inject", "restore", "close"]


def test_a_fault_that_outlasts_the_drill_is_undone(service):
    service.plan["recovery_timeout"] = 0.3
    fault = Lasting()
    result = service.drill(fault)
    assert result["broken"] == ["primary did not serve again: not within 0.3 s: it lasts"]
    assert fault.calls == ["inject", "restore", "close"]


def test_no_drill_without_a_timer(service, monkeypatch):
    monkeypatch.setattr(service, "run", lambda _command: (1, "", "no bus"))
    fault = Lasting()
    with pytest.raises(DrillRefused, match="exit status 1 of systemd-run: no bus"):
        service.drill(fault)
    assert fault.calls == ["close"]


def test_a_fault_that_cannot_be_undone_is_said(service):
    class Stuck(Lasting):
        def restore(self):
            raise EngineError("no permission")

    service.plan["recovery_timeout"] = 0.1
    with pytest.raises(EngineError, match="no permission"):
        service.drill(Stuck())
    assert [command[0] for command in service.commands] == ["systemd-run"]  # the timer stays


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

"""The module failover_drill, its main() run as Ansible runs it."""

from __future__ import annotations

import os
import signal

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _faults
from ansible_collections.nvl.vllm.plugins.module_utils._engine_process import EngineError
from ansible_collections.nvl.vllm.plugins.modules import failover_drill

MODEL = "gpt-oss-120b"
QUICK = {"backoff_base": 0.01, "health_interval": 5, "request_timeout": 5, "recovery_timeout": 20}


class FakeKill(_faults.Fault):
    """In the place of KillEngine: a stand-in for vLLM dies, and is back at once."""

    units: list[str]
    servers: dict
    impossible = ""

    def __init__(self, unit, run):
        self.unit = unit
        self.server = self.servers[unit]
        self.killed = False

    def __str__(self):
        return "a kill"

    def prepare(self):
        if self.impossible:
            raise EngineError(self.impossible)

    def inject(self):
        self.units.append(self.unit)
        self.server.die()
        self.killed = True

    def pending(self):
        if self.killed:
            self.server.restore()
            self.killed = False
        return ""


@pytest.fixture
def drill(run_module, make_fake_vllm, monkeypatch):
    """Runs the module against two stand-ins; they are its attributes primary and secondary."""

    def run(**options):
        return run_module(failover_drill.main, **{"endpoints": run.endpoints, "model": MODEL, **QUICK, **options})

    run.primary, run.secondary = make_fake_vllm(), make_fake_vllm()
    for fake in (run.primary, run.secondary):
        fake.latency = 0.002
    servers = {"vllm@primary.service": run.primary, "vllm@secondary.service": run.secondary}
    run.endpoints = [
        {"name": "primary", "url": run.primary.url, "unit": "vllm@primary.service"},
        {"name": "secondary", "url": run.secondary.url, "unit": "vllm@secondary.service"},
    ]
    run.kill = type("Kill", (FakeKill,), {"units": [], "servers": servers})
    monkeypatch.setattr(_faults, "KillEngine", run.kill)
    return run


def test_a_drill_that_passes(drill):
    result = drill()
    assert "failed" not in result
    assert result["changed"] is False
    assert result["verdict"] == "passed"
    assert result["target"] == "primary"
    assert result["fault"] == "a kill"
    assert result["lost"] == 0
    assert result["sent"] >= 17  # 8 before, 8 after, and what met the fault
    assert drill.kill.units == ["vllm@primary.service"]


def test_another_target(drill):
    result = drill(target="secondary")
    assert result["target"] == "secondary"
    assert drill.kill.units == ["vllm@secondary.service"]
    assert {error["endpoint"] for error in result["errors"]} <= {"secondary"}


def test_a_broken_budget_fails_with_its_numbers(drill):
    result = drill(budget={"recovery": 0.000001, "worst_latency": 0.000001})
    assert result["failed"] is True
    assert result["verdict"] == "failed"
    assert result["msg"] == "Drill failed: " + "; ".join(result["broken"])
    assert "the slowest answer took" in result["msg"]
    assert "primary served again after" in result["msg"]
    assert result["completed"] > 0


def test_check_mode_sends_no_load_and_no_fault(drill):
    result = drill(check_mode=True)
    assert result["skipped"] is True
    assert result["changed"] is False
    assert result["msg"] == "Would send 4 requests at a time through primary, secondary, and a kill."
    assert drill.primary.requests == drill.secondary.requests == []


def test_refused_with_an_endpoint_down(drill):
    drill.secondary.die()
    result = drill()
    assert result["failed"] is True
    assert result["msg"].startswith(
        "Drill refused, nothing was touched: wanted every endpoint to serve first, found secondary"
    )
    assert "sent" not in result


def test_refused_without_an_engine(drill):
    drill.kill.impossible = "wanted a process named VLLM::EngineCore below vllm@primary.service"
    assert drill()["msg"] == f"Drill refused, nothing was touched: {drill.kill.impossible}"


def test_the_key_is_not_shown(drill):
    assert "sk-very-secret" not in str(drill(api_key="sk-very-secret"))
    assert drill.primary.requests[-1][1]["Authorization"] == "Bearer sk-very-secret"


def test_a_proven_subject_is_not_drilled_again(drill, tmp_path):
    proof = str(tmp_path / "made" / "drill.json")
    first = drill(subject="one", proof=proof)
    asked = len(drill.primary.requests)
    again = drill(subject="one", proof=proof)
    assert "proven" not in first
    assert again["proven"].endswith("Z")
    assert again["sent"] == first["sent"]
    assert len(drill.primary.requests) == asked
    assert drill.kill.units == ["vllm@primary.service"]


@pytest.mark.parametrize("options", [{"subject": "two"}, {"subject": "one", "force": True}, {}])
def test_another_subject_or_force_drills(drill, tmp_path, options):
    proof = str(tmp_path / "drill.json")
    drill(subject="one", proof=proof)
    assert "proven" not in drill(proof=proof, **options)


def test_a_failed_drill_proves_nothing(drill, tmp_path):
    proof = tmp_path / "drill.json"
    drill(subject="one", proof=str(proof), budget={"recovery": 0.000001})
    assert not proof.exists()


def test_a_damaged_proof_is_no_proof(drill, tmp_path):
    proof = tmp_path / "drill.json"
    proof.write_text('{"subject": "one", "time"')
    assert "proven" not in drill(subject="one", proof=str(proof))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "third"}, "wanted a target of primary, secondary, found third"),
        ({"endpoints": []}, "at least one endpoint"),
        (
            {"endpoints": [{"name": "a", "url": "http://h:1"}]},
            "set unit of that endpoint, such as vllm@a.service",
        ),
        ({"concurrency": 0}, "wanted concurrency of 1 or more, found 0"),
        ({"retries": -1}, "wanted retries"),
        ({"fault": "flood"}, "value of fault must be one of: kill"),
        ({"prompt_tokens": -1}, "wanted prompt_tokens of 0 or more, found -1"),
        ({"gateway_retries": -1}, "wanted gateway_retries of 0 or more, found -1"),
        ({"fault_seconds": 0}, "wanted fault_seconds above 0, found 0"),
        ({"via": "gateway"}, "wanted gateway_url for via of gateway, found none"),
        ({"via": "gateway", "gateway_url": "http://h:1/v1"}, "leave out the /v1"),
        ({"fault": "drain"}, "wanted via of gateway for the fault drain, found client"),
        ({"fault": "gateway_kill", "via": "single"}, "wanted via of gateway for the fault gateway_kill, found single"),
        ({"fault": "both_down", "via": "single"}, "for the fault both_down, found single"),
        ({"budget": {"speed": 1}}, "Unsupported parameters"),
    ],
)
def test_wrong_options_are_one_sentence(drill, options, message):
    result = drill(**options)
    assert result["failed"] is True
    assert message in result["msg"]
    assert drill.primary.requests == []


# Other faults and ways


URL = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fault": "hang"}, "primary, secondary, and SIGSTOP to the engine process of vllm@primary.service for 20 s."),
        ({"fault": "kill_server"}, "primary, secondary, and SIGKILL to the main process of vllm@primary.service."),
        ({"fault": "stop"}, "primary, secondary, and systemctl stop vllm@primary.service, then start."),
        ({"via": "single", "target": "secondary"}, "secondary, and a kill."),
        ({"fault": "both_down"}, "primary, secondary, and a kill and a kill."),
        ({"fault": "slow", "fault_seconds": 5}, "primary, secondary, and slow answers in front of primary for 5 s."),
        ({"fault": "drain", "via": "gateway"}, "gateway, and /run/nvl-vllm/drain/primary for 20 s."),
        ({"fault": "gateway_reload", "via": "gateway"}, "gateway, and systemctl reload vllm-gateway.service."),
        (
            {"fault": "gateway_kill", "via": "gateway", "gateway_unit": "door.service"},
            "gateway, and SIGKILL to the main process of door.service.",
        ),
    ],
)
def test_what_would_be_done(drill, options, message):
    result = drill(check_mode=True, gateway_url=URL, **options)
    assert result["msg"] == f"Would send 4 requests at a time through {message}"


def test_alone_it_is_the_control(drill):
    result = drill(via="single", budget={"lost": 100})
    assert (result["via"], result["verdict"]) == ("single", "passed")
    assert list(result["endpoints"]) == ["primary"]


def test_a_gateway_with_a_key_of_its_own(drill):
    # The secondary stands in for the gateway.
    drill.endpoints = drill.endpoints[:1]
    options = {"via": "gateway", "gateway_url": drill.secondary.url, "gateway_key": "sk-door", "api_key": "sk-engine"}
    result = drill(fault="gateway_reload", gateway_unit="none.service", **options)
    assert result["msg"].startswith("Drill refused, nothing was touched: wanted the main process of none.service")
    assert drill.primary.requests[-1][1]["Authorization"] == "Bearer sk-engine"


def test_all_engines_down_need_all_units(drill):
    del drill.endpoints[1]["unit"]
    result = drill(fault="both_down")
    assert "set unit of that endpoint, such as vllm@secondary.service" in result["msg"]


@pytest.mark.parametrize(
    "options", [{"fault": "slow", "fault_seconds": 0.1}, {"target": "secondary"}, {"via": "single"}]
)
def test_another_drill_is_not_proven_by_this_one(drill, tmp_path, options):
    proof = str(tmp_path / "drill.json")
    drill(subject="one", proof=proof)
    assert "proven" not in drill(subject="one", proof=proof, budget={"lost": 100}, **options)


def test_a_proof_from_before_there_was_via_is_good(drill, tmp_path):
    proof = tmp_path / "drill.json"
    drill(subject="one", proof=str(proof))
    proof.write_text(proof.read_text().replace('"via": "client",', ""))
    assert drill(subject="one", proof=str(proof))["proven"]


def test_interrupted_it_says_so(drill, monkeypatch):
    monkeypatch.setattr(drill.kill, "pending", lambda _self: os.kill(os.getpid(), signal.SIGTERM) or "gone")
    result = drill()
    assert result["failed"] is True
    assert result["msg"] == "Drill interrupted by SIGTERM; what it had done is undone"


def test_what_cannot_be_undone_names_the_timer_and_the_command(drill, monkeypatch):
    def stuck(_self):
        raise EngineError("no permission")

    monkeypatch.setattr(drill.kill, "undo", ("true", "primary"))
    monkeypatch.setattr(drill.kill, "restore", stuck)
    monkeypatch.setattr(_faults.DeadMan, "arm", lambda *_arguments: None)
    message = drill()["msg"]
    assert message.startswith("Drill not undone, look at primary: no permission; the timer nvl-vllm-drill-")
    assert message.endswith("(undo by hand: true primary)")

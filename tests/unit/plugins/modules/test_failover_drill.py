"""The module failover_drill, its main() run as Ansible runs it."""

from __future__ import annotations

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils._engine_process import EngineError
from ansible_collections.nvl.vllm.plugins.modules import failover_drill

MODEL = "gpt-oss-120b"
QUICK = {"backoff_base": 0.01, "health_interval": 5, "request_timeout": 5, "recovery_timeout": 20}


class FakeKill:
    """In the place of KillEngine: a stand-in for vLLM dies, and is back at once."""

    units: list[str]
    servers: dict
    impossible = ""

    def __init__(self, unit, run):
        self.units.append(unit)
        self.server = self.servers[unit]
        self.killed = False

    def __str__(self):
        return "a kill"

    def prepare(self):
        if self.impossible:
            raise EngineError(self.impossible)

    def inject(self):
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
    monkeypatch.setattr(failover_drill, "KillEngine", run.kill)
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
        ({"fault": "hang"}, "value of fault must be one of: kill"),
        ({"budget": {"speed": 1}}, "Unsupported parameters"),
    ],
)
def test_wrong_options_are_one_sentence(drill, options, message):
    result = drill(**options)
    assert result["failed"] is True
    assert message in result["msg"]
    assert drill.primary.requests == []

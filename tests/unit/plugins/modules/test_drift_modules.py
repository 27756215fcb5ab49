"""The modules drift_facts and drift_content as Ansible runs them: what they refuse, and what they return."""

from __future__ import annotations

import os
import socket

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _drift_content, _drift_facts
from ansible_collections.nvl.vllm.plugins.module_utils._drift_kinds import Report
from ansible_collections.nvl.vllm.plugins.modules import drift_content, drift_facts

FACTS = {
    "device": "cuda",
    "version": "0.32.0",
    "instances": [{"name": "primary", "unit": "vllm@primary.service", "port": 8001, "url": "http://127.0.0.1:8001"}],
    "served_model_name": "gpt",
    "model_path": "/srv/model",
}
CONTENT = {
    "release": "/opt/vllm/x",
    "lock": "cpu.txt",
    "lock_sha256": "0",
    "instances": ["primary"],
    "model_path": "/srv/model",
}
BOTH = [(drift_facts, FACTS), (drift_content, CONTENT)]


@pytest.fixture
def root(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)


@pytest.mark.parametrize(("module", "options"), BOTH)
def test_only_root_may_run_them(module, options, run_module, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    result = run_module(module.main, **options)
    assert result["failed"]
    assert result["msg"].startswith(f"{socket.gethostname()}: ")
    assert "become: true" in result["msg"]


@pytest.mark.parametrize(("module", "options"), BOTH)
def test_a_deadline_of_nothing_is_refused(module, options, run_module, root):
    result = run_module(module.main, timeout=0, **options)
    assert result["msg"] == "timeout is 0 s: wanted more than 0"


@pytest.mark.parametrize("check_mode", [True, False])
def test_what_runs(run_module, root, monkeypatch, check_mode):
    seen = []

    def look(self):
        seen.append(self.wanted)
        report = Report("runtime")
        report.add("unit_restarts", "b", "9", "3")
        report.add("unit_not_active", "a", "failed", "active")
        report.blind("x")
        report.facts["units"] = {}
        return report

    monkeypatch.setattr(_drift_facts.Look, "look", look)
    settings = {"power_limit": "350"}
    result = run_module(drift_facts.main, check_mode=check_mode, gpu_settings=settings, controller_time=5.5, **FACTS)
    assert [item["kind"] for item in result["findings"]] == ["unit_not_active", "unit_restarts"]
    assert (result["unknown"], result["facts"], result["changed"]) == (["x"], {"units": {}}, False)
    (wanted,) = seen
    assert wanted.gpu_settings.power_limit == "350"
    assert wanted.gpu_settings.prefix == "cuda_"
    assert (wanted.controller_time, wanted.agent_port, wanted.status_port) == (5.5, 8403, 8405)
    assert wanted.instances[0]["gpus"] == []


def test_what_is_on_disk(run_module, root, monkeypatch):
    seen = []

    def look(self):
        seen.append(self.wanted)
        return Report("content")

    monkeypatch.setattr(_drift_content.Look, "look", look)
    result = run_module(drift_content.main, check_mode=True, turn=7, hash_budget=4096, **CONTENT)
    assert (result["findings"], result["unknown"], result["changed"]) == ([], [], False)
    assert (seen[0].turn, seen[0].hash_budget, seen[0].release_hash_budget) == (7, 4096, 256)


def test_instances_with_an_environment_are_refused_as_it_may_hold_secrets(run_module, root):
    instance = {**FACTS["instances"][0], "environment": {"HF_TOKEN": "x"}}
    result = run_module(drift_facts.main, **{**FACTS, "instances": [instance]})
    assert "environment" in result["msg"]

"""What the memory plan has for an engine that ran out of memory, where it can be told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _doctor_plan
from ansible_collections.nvl.vllm.plugins.module_utils._model_facts import _gpt_oss

MIB = 1024
H100 = {"index": 0, "uuid": "GPU-0", "name": "NVIDIA H100 NVL", "total_mib": 95830, "reserved_mib": 594}


def engine(**arguments: Any) -> dict[str, Any]:
    return {"name": "primary", "gpus": [0], "arguments": {"max-model-len": 4096, **arguments}, "environment": {}}


def device(**changes: Any) -> dict[str, Any]:
    return {**H100, "free_mib": 95235, "processes": [], **changes}


def told(monkeypatch: pytest.MonkeyPatch, one: dict[str, Any], *devices: dict[str, Any], kind: str = "cuda") -> str:
    checkpoint = {"config": _gpt_oss(36, 128), "weight_bytes": int(60.8 * 2**30)}
    monkeypatch.setattr(_doctor_plan, "checkpoint_facts", lambda path: checkpoint)
    found = _doctor_plan.sentences([one], kind, devices, "/opt/vllm", "/srv/model", "0.32.0", "/nonexistent")
    return found.get("primary", "")


def test_the_plan_has_the_parts_and_what_would_fit(monkeypatch: pytest.MonkeyPatch):
    sentence = told(monkeypatch, engine(**{"gpu-memory-utilization": 0.85}), device())
    assert sentence.startswith("it takes 79.")
    assert "weights 6" in sentence
    assert ", with max-model-len up to 131072" in sentence


def test_what_does_not_fit_has_its_reason_and_its_change(monkeypatch: pytest.MonkeyPatch):
    trainer = {"name": "python3", "pid": 4242, "mib": 40000}
    busy = device(free_mib=55235, processes=[trainer])
    sentence = told(monkeypatch, engine(**{"gpu-memory-utilization": 0.85}), busy)
    assert "are free beside python3 (4242) 40000 MiB" in sentence
    assert "end python3 (4242)" in sentence


def test_the_cpu_has_its_memory(monkeypatch: pytest.MonkeyPatch):
    host = {"index": 0, "name": "CPU", "total_mib": 2000 * MIB}
    small = engine(**{"kv-cache-memory-bytes": 2**30})
    assert "KV cache 1.0" in told(monkeypatch, {**small, "gpus": []}, host, kind="cpu")


@pytest.mark.parametrize(
    "devices", [[], [{**H100, "free_mib": -1, "processes": [], "index": 7}]], ids=["none", "other"]
)
def test_without_its_gpu_there_is_no_plan(monkeypatch: pytest.MonkeyPatch, devices: list[dict[str, Any]]):
    assert told(monkeypatch, engine(), *devices) == ""


def test_without_a_checkpoint_or_with_an_odd_one_there_is_no_plan(tmp_path: Path):
    for config in ("", json.dumps({"model_type": "unheard-of"})):
        (tmp_path / "config.json").write_text(config) if config else None
        assert _doctor_plan.sentences([engine()], "cuda", [device()], "/opt/vllm", str(tmp_path), "") == {}

"""Scoring of the memory plan, with made-up starts."""

from __future__ import annotations

import json
import sys

import pytest

MODELS = {
    "made/up-8b": {
        "config": {
            "num_hidden_layers": 32,
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim_derived": 128,
            "intermediate_size": 14336,
            "vocab_size": 128000,
        },
        "checkpoint_bytes": 16_000_000_000,
    }
}
ROW = {
    "id": "one",
    "gpu": "H100 80GB",
    "vllm_version": "0.19.0",
    "model": "made/up-8b",
    "tp": 1,
    "flags": {"gpu_memory_utilization": 0.9, "max_model_len": 8192},
    "flags_presumed": {},
    "outcome": "ok",
    "source_group": "made",
    "tier": "A",
    "weights_gib": 14.93,
    "available_kv_gib": 54.0,
    "kv_tokens": 442_368,
}
FAIL = {
    "id": "two",
    "gpu": "RTX 4090",
    "vllm_version": "0.19.0",
    "model": "made/up-8b",
    "flags": {"gpu_memory_utilization": 0.9, "max_model_len": 131072},
    "outcome": "fail",
    "source_group": "up",
    "tier": "F1",
}
OCCUPIED = {
    "id": "three",
    "gpu": "A100 80GB",
    "model": "unknown",
    "free_at_start_gib": 40.0,
    "flags": {"gpu_memory_utilization": 0.9},
    "outcome": "fail",
    "source_group": "up",
    "tier": "F1",
}


@pytest.fixture(scope="module")
def score(load_tool):
    return load_tool("score_memory")


def test_a_start(score):
    found = score.score_row(ROW, MODELS)
    assert found.tokens == pytest.approx(0, abs=1e-4)
    assert abs(found.kv_weights) < 1
    assert abs(found.kv_blind) < 1
    assert found.verdict is True
    assert found.versioned


def test_a_start_that_failed(score):
    found = score.score_row(FAIL, MODELS)
    assert found.verdict is True
    assert not found.overconfident
    assert score.score_row(
        {**FAIL, "flags": {"gpu_memory_utilization": 0.9, "max_model_len": 512}}, MODELS
    ).overconfident


def test_free_memory_is_judged_without_the_model(score):
    found = score.score_row(OCCUPIED, {})
    assert found.note.startswith("not planned: config.json has no num_hidden_layers")
    assert found.verdict is True
    assert score.score_row({**OCCUPIED, "free_at_start_gib": 79.0}, {}).overconfident


def test_a_start_of_no_version_is_planned_with_caution(score):
    row = {**ROW, "vllm_version": None}
    each = [score.score_row({**row, "vllm_version": ".".join(map(str, era))}, MODELS).kv_blind for era in score.ERAS]
    assert min(each) < max(each)
    found = score.score_row(row, MODELS)
    assert found.kv_blind == min(each)
    assert not found.versioned
    # One that fits with some versions only is not promised to start.
    short = {**row, "flags": {"gpu_memory_utilization": 0.22, "max_model_len": 2048}, "outcome": "fail"}
    verdicts = {score.score_row(short, MODELS, ".".join(map(str, era))).verdict for era in score.ERAS}
    assert verdicts == {True, False}
    assert score.score_row(short, MODELS).verdict is True


@pytest.mark.parametrize(("values", "expected"), [([1.0], 1.0), (list(range(1, 11)), 9), (list(range(1, 12)), 10)])
def test_the_90th_percentile(score, values, expected):
    assert score.percentile(values, 0.9) == expected


def test_the_report(score, tmp_path, monkeypatch, capsys):
    cases, models = tmp_path / "cases.jsonl", tmp_path / "models.json"
    cases.write_text("".join(json.dumps(row) + "\n" for row in (ROW, FAIL, OCCUPIED)))
    models.write_text(json.dumps(MODELS))
    monkeypatch.setattr(sys, "argv", ["score_memory", str(cases), "--models", str(models), "--rows"])
    score.main()
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("made ") and "1 of 1" in line for line in lines)
    assert any(line.startswith("all ") and "3 of 3" in line for line in lines)
    assert lines[-1] == "predicted to fit beyond the uncertainty, and failed: 0, with known inputs 0"


def test_a_file_that_is_not_there(score, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["score_memory", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="score_memory: "):
        score.main()

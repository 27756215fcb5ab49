"""Figures beside those of an earlier run: which are worse, and which may be chance."""

from __future__ import annotations

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _benchmark_baseline as baseline

LABELS = {
    "device": "cuda",
    "hardware": "2 x NVIDIA H100 NVL",
    "driver": "580.95.05",
    "vllm": "0.32.0",
    "model": "openai/gpt-oss-120b",
    "digest": "0a1b2c3d",
}


def figure(median, least, most, better=baseline.HIGHER):
    return {"median": median, "min": least, "max": most, "unit": "tokens/s", "better": better}


def worse(now, then, threshold=10.0):
    (row,) = baseline.compare({"x": now}, {"x": then}, threshold)
    return row["worse"]


def test_the_key_is_a_readable_file_name():
    assert baseline.key_of(LABELS) == "cuda_2-x-nvidia-h100-nvl_driver-580_vllm-0.32.0_openai-gpt-oss-120b_0a1b2c3d"
    cpu = {**LABELS, "device": "cpu", "hardware": "2 x AMD EPYC", "driver": ""}
    assert baseline.key_of(cpu) == "cpu_2-x-amd-epyc_vllm-0.32.0_openai-gpt-oss-120b_0a1b2c3d"


def test_another_minor_driver_is_the_same_hardware_and_another_branch_is_not():
    key = baseline.key_of(LABELS)
    assert baseline.key_of({**LABELS, "driver": "580.178.04"}) == key
    assert baseline.key_of({**LABELS, "driver": "590.10"}) != key


def test_the_digest_is_about_how_engines_work_and_what_was_asked():
    settings = {"sweep_output_tokens": 128}
    arguments = [{"max-num-seqs": 8, "port": 8001, "model": "/srv/a"}]
    digest = baseline.digest(arguments, settings)
    assert baseline.digest([{"max-num-seqs": 8, "port": 9001, "model": "/srv/b"}], settings) == digest
    assert baseline.digest([{"max-num-seqs": 16}], settings) != digest
    assert baseline.digest(arguments, {"sweep_output_tokens": 64}) != digest
    assert len(digest) == 8


@pytest.mark.parametrize(
    ("now", "then", "expected"),
    [
        (figure(80, 78, 82), figure(100, 98, 102), True),
        (figure(95, 94, 96), figure(100, 98, 102), False),  # within the threshold
        (figure(80, 60, 99), figure(100, 98, 102), False),  # the best of now is among those of then
        (figure(130, 120, 140), figure(100, 98, 102), False),  # better
        (figure(120, 115, 125, "lower"), figure(100, 98, 102, "lower"), True),
        (figure(120, 100, 125, "lower"), figure(100, 98, 102, "lower"), False),
        (figure(80, 78, 82, "lower"), figure(100, 98, 102, "lower"), False),
    ],
)
def test_worse_is_beyond_the_threshold_and_beyond_chance(now, then, expected):
    assert worse(now, then) is expected


def test_the_threshold_is_percent():
    now, then = figure(85, 84, 86), figure(100, 99, 101)
    assert worse(now, then, 10)
    assert not worse(now, then, 20)


def test_change_above_zero_is_better_whatever_the_unit():
    rows = baseline.compare(
        {"rate": figure(110, 109, 111), "time": figure(110, 109, 111, "lower"), "new": figure(1, 1, 1)},
        {"rate": figure(100, 99, 101), "time": figure(100, 99, 101, "lower"), "old": figure(1, 1, 1)},
        10,
    )
    assert {row["name"]: row["change"] for row in rows} == {"rate": 10.0, "time": -10.0}


def test_of_a_part_the_rest_of_a_baseline_stays():
    def one(path, scenario, median):
        return {**figure(median, median, median), "path": path, "scenario": scenario}

    then = {
        "a: sequential": one("a", "parallel", 1),
        "a: 1 user, output": one("a", "sweep", 2),
        "a: 64 users, output": one("a", "sweep", 3),
        "b: 1 user, output": one("b", "sweep", 4),
    }
    # The sweep of a ends at another level now.
    now = {"a: 1 user, output": one("a", "sweep", 5)}
    found = baseline.merged(then, now)
    assert {name: each["median"] for name, each in found.items()} == {
        "a: sequential": 1,
        "a: 1 user, output": 5,
        "b: 1 user, output": 4,
    }


def test_a_sentence_has_both_figures():
    (row,) = baseline.compare({"x": figure(80, 78, 82)}, {"x": figure(100, 98, 102)}, 10)
    assert baseline.sentence(row) == "x: 80 tokens/s (78 to 82), was 100 (98 to 102): 20 % worse"

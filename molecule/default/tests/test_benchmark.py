"""The benchmark on real engines: at once beats one after the other, and a cached prefix is proven by the counters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import INSTANCES, main_pid, playbook
from testinfra.host import Host

RESULTS = "/var/lib/nvl-vllm/benchmark"
#: As little as shows everything: one engine, each step once.
SMALL = {
    "vllm_benchmark_paths": ["primary"],
    "vllm_benchmark_repetitions": 1,
    "vllm_benchmark_prefix_groups": 2,
    "vllm_benchmark_sweep_limit": 2,
    "vllm_benchmark_sweep_requests_per_user": 1,
    "vllm_benchmark_sweep_output_tokens": 32,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmarks")


def test_check_mode_sends_no_load(host: Host, directory: Path) -> None:
    before = host.check_output(f"ls -lA --time-style=full-iso {RESULTS} 2>/dev/null || true")
    done = playbook("playbooks/benchmark.yml", "--check", vllm_benchmark_directory=str(directory), **SMALL)
    assert done.returncode == 0, done.stdout
    assert "Would benchmark primary: parallel, prefix, sweep." in done.stdout
    assert list(directory.iterdir()) == []
    assert host.check_output(f"ls -lA --time-style=full-iso {RESULTS} 2>/dev/null || true") == before


@pytest.fixture(scope="module")
def report(host: Host, directory: Path) -> dict[str, Any]:
    """The report of a small run, as it was fetched. The engines run on."""
    before = {name: main_pid(host, name) for name in INSTANCES}
    done = playbook("playbooks/benchmark.yml", vllm_benchmark_directory=str(directory), **SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: main_pid(host, name) for name in INSTANCES} == before
    found: dict[str, Any] = json.loads((directory / "molecule/latest.json").read_text())
    return found


def test_requests_at_once_are_faster_than_one_after_the_other(report: dict[str, Any]) -> None:
    found = report["verdicts"]["primary"]["parallel"]
    assert found["speedup"]["median"] > 1.3, found


def test_a_cached_prefix_brings_the_first_token_sooner(report: dict[str, Any]) -> None:
    found = report["verdicts"]["primary"]["prefix"]
    assert found["warm_ms"]["median"] < found["cold_ms"]["median"] / 2, found


def test_the_counters_prove_the_hits_that_the_arithmetic_wants(report: dict[str, Any]) -> None:
    found = report["verdicts"]["primary"]["prefix"]
    # Three groups of four, one of them to warm up: of nine later requests 15 whole blocks of 128 tokens each.
    assert found["expected_hits"] == 3 * 3 * 15 * 128
    assert found["match"], found


def test_all_levels_have_throughput_and_latencies(report: dict[str, Any]) -> None:
    steps = {step["users"]: step for step in report["paths"][0]["steps"] if step["scenario"] == "sweep"}
    assert sorted(steps) == [1, 2]
    for users, step in steps.items():
        (run,) = step["runs"]
        assert run["output_tokens"] == 32 * users
        assert run["counters"]["generation_tokens"] >= run["output_tokens"]
        for key in ("ttft_ms", "itl_ms", "e2e_ms"):
            assert 0 < run[key]["p50"] <= run[key]["p95"] <= run[key]["p99"]
    timeline = report["paths"][0]["timeline"]["engines"]["primary"]
    assert max(timeline["running"]) >= 1
    assert timeline["generation_tokens"][-1] > timeline["generation_tokens"][0]


def test_the_report_is_on_the_controller_and_only_the_result_on_the_host(
    host: Host, directory: Path, report: dict[str, Any]
) -> None:
    page = (directory / "molecule/latest.html").read_text()
    assert page.count("<svg") == 3
    assert f"{report['verdicts']['primary']['parallel']['speedup']['median']:.1f}x" in page
    assert "## Targets" in (directory / "molecule/latest.md").read_text()
    assert host.check_output(f"ls -A {RESULTS}").split() == [".lock", "primary.json"]

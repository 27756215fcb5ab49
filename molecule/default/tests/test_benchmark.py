"""The benchmark on real engines: at once beats one after the other, and a cached prefix is proven by the counters."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import INSTANCES, main_pid, playbook
from testinfra.host import Host

RESULTS = "/var/lib/nvl-vllm/benchmark"
#: As little as shows everything: one engine, short answers, three repetitions for the spread.
SMALL = {
    "vllm_benchmark_paths": ["primary"],
    "vllm_benchmark_parallel_output_tokens": 48,
    "vllm_benchmark_prefix_groups": 2,
    "vllm_benchmark_sweep_limit": 2,
    "vllm_benchmark_sweep_requests_per_user": 1,
    "vllm_benchmark_sweep_output_tokens": 32,
}
HOST = "molecule"


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
    """The report of a small run, as it was fetched, which becomes the baseline. The engines run on."""
    before = {name: main_pid(host, name) for name in INSTANCES}
    done = playbook(
        "playbooks/benchmark.yml",
        **{**SMALL, "vllm_benchmark_directory": str(directory), "vllm_benchmark_save_baseline": True},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: main_pid(host, name) for name in INSTANCES} == before
    found: dict[str, Any] = json.loads((directory / HOST / "latest.json").read_text())
    return found


def test_requests_at_once_are_faster_than_one_after_the_other(directory: Path, report: dict[str, Any]) -> None:
    """By the median of three repetitions, whose spread is in the report."""
    found = report["verdicts"]["primary"]["parallel"]
    assert found["speedup"]["median"] > 1.3, found
    steps = {step["name"]: step for step in report["paths"][0]["steps"] if step["scenario"] == "parallel"}
    for name in ("sequential", "parallel"):
        seconds = sorted(run["seconds"] for run in steps[name]["runs"])
        assert len(seconds) == 3
        assert [found[f"{name}_s"][key] for key in ("min", "median", "max")] == seconds
    spread = found["speedup"]
    assert spread["min"] <= spread["median"] <= spread["max"]
    shown = f"{spread['median']:.1f} ({spread['min']:.1f} to {spread['max']:.1f})"
    assert shown in (directory / HOST / "latest.md").read_text()


def test_a_cached_prefix_brings_the_first_token_sooner(report: dict[str, Any]) -> None:
    found = report["verdicts"]["primary"]["prefix"]
    assert found["warm_ms"]["median"] < found["cold_ms"]["median"] / 2, found
    # And with it the whole request, here of few tokens.
    assert found["warm_ms"]["median"] < found["warm_e2e_ms"]["median"] < found["cold_e2e_ms"]["median"], found


def test_the_counters_prove_the_hits_that_the_arithmetic_wants(report: dict[str, Any]) -> None:
    found = report["verdicts"]["primary"]["prefix"]
    # In each of three repetitions three groups of four, one of them to warm up: of nine later requests 15 whole blocks
    # of 128 tokens each.
    assert found["expected_hits"] == 3 * 3 * 3 * 15 * 128
    assert found["match"], found
    # The counter of queries has the prompts' tokens: what all requests shared in groups, and 40 more each. Probes of
    # the health agent are counted, too.
    (step,) = (step for step in report["paths"][0]["steps"] if step["scenario"] == "prefix")
    prompts = sum(run["input_tokens"] for run in step["runs"])
    others = sum(run["others"]["prompt_tokens"] for run in step["runs"])
    assert prompts == pytest.approx(3 * 12 * (1946 + 40), rel=0.02)
    assert found["queries"] == pytest.approx(prompts + others, rel=0.02)
    assert found["hit_rate"] == pytest.approx(found["hits"] / found["queries"], abs=1e-4)


def test_all_levels_have_throughput_and_latencies(report: dict[str, Any]) -> None:
    steps = {step["users"]: step for step in report["paths"][0]["steps"] if step["scenario"] == "sweep"}
    assert sorted(steps) == [1, 2]
    for users, step in steps.items():
        assert len(step["runs"]) == 3
        for run in step["runs"]:
            assert run["output_tokens"] == 32 * users
            assert run["counters"]["generation_tokens"] >= run["output_tokens"]
            for key in ("ttft_ms", "itl_ms", "e2e_ms"):
                assert 0 < run[key]["p50"] <= run[key]["p95"] <= run[key]["p99"]
    timeline = report["paths"][0]["timeline"]["engines"]["primary"]
    assert max(timeline["running"]) >= 1
    assert timeline["generation_tokens"][-1] > timeline["generation_tokens"][0]


@pytest.mark.more
def test_the_gateway_is_a_path_to_both_engines(tmp_path: Path) -> None:
    path = {"vllm_benchmark_paths": ["gateway"], "vllm_benchmark_scenarios": ["sweep"]}
    done = playbook("playbooks/benchmark.yml", vllm_benchmark_directory=str(tmp_path), **{**SMALL, **path})
    assert done.returncode == 0, done.stdout + done.stderr
    (gateway,) = json.loads((tmp_path / HOST / "latest.json").read_text())["paths"]
    assert (gateway["path"], gateway["kind"], set(gateway["engines"])) == ("gateway", "gateway", set(INSTANCES))
    # Two users on each engine at most, so four through their gateway.
    assert [step["users"] for step in gateway["steps"] if step["scenario"] == "sweep"] == [1, 2, 4]
    busiest = max(gateway["steps"], key=lambda step: step["users"] * (step["scenario"] == "sweep"))
    assert all(run["requests"] == 4 for run in busiest["runs"])
    # Both worked for it.
    for name in INSTANCES:
        made = gateway["timeline"]["engines"][name]["generation_tokens"]
        assert made[-1] > made[0]


def test_the_report_is_on_the_controller_and_only_the_result_on_the_host(
    host: Host, directory: Path, report: dict[str, Any]
) -> None:
    page = (directory / HOST / "latest.html").read_text()
    assert page.count("<svg") == 3
    assert f"{report['verdicts']['primary']['parallel']['speedup']['median']:.1f}x" in page
    assert "## Targets" in (directory / HOST / "latest.md").read_text()
    assert host.check_output(f"ls -A {RESULTS}").split() == [".lock", "primary.json"]


def test_what_is_worse_than_the_baseline_fails_with_both_figures(directory: Path, report: dict[str, Any]) -> None:
    """Beside a baseline that is four times as fast as this host."""
    assert report["baseline"]["stored"] is True
    (path,) = (directory / "baselines").iterdir()
    baseline = json.loads(path.read_text())
    for name in ("primary: sequential", "primary: parallel"):
        for key in ("median", "min", "max"):
            baseline["metrics"][name][key] = round(baseline["metrics"][name][key] / 4, 3)
    path.write_text(json.dumps(baseline))
    then = baseline["metrics"]["primary: sequential"]

    part = {"vllm_benchmark_scenarios": ["parallel"]}
    done = playbook("playbooks/benchmark.yml", vllm_benchmark_directory=str(directory), **{**SMALL, **part})

    assert done.returncode == 2, done.stdout + done.stderr
    shown = " ".join(done.stdout.replace("\\n", " ").split())
    found = json.loads((directory / HOST / "latest.json").read_text())
    now = found["metrics"]["primary: sequential"]["median"]
    assert re.search(
        rf"worse than the baseline of {then['time']}: primary: sequential: {now:g} s \(\S+ to \S+\), was "
        rf"{then['median']:g} ",
        shown,
    )
    assert {row["name"]: row["worse"] for row in found["baseline"]["rows"]} == {
        "primary: sequential": True,
        "primary: parallel": True,
    }

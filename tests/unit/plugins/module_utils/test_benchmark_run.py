"""One path's benchmark: what it refuses, in which order it runs, what it notices and what it leaves."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shutil
from pathlib import Path

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _benchmark_run as run
from ansible_collections.nvl.vllm.plugins.module_utils._benchmark_load import BenchmarkError
from ansible_collections.nvl.vllm.plugins.module_utils._openai import Endpoint

MODEL = "gpt-oss-120b"
CACHES = {"primary": {"block_size": 128, "kv_tokens": 16131, "max_model_len": 4096}}
SMALL = {"parallel_requests": 2, "prefix_tokens": 300, "prefix_groups": 1, "prefix_group": 2, "sweep_limit": 2}


def wanted(*scenarios, **numbers):
    return run.Wanted(scenarios or ("parallel", "prefix", "sweep"), **{**SMALL, "repetitions": 2, **numbers})


def path_to(*fakes, kind="engine", targets=None):
    engines = [Endpoint(name, fake.url) for name, fake in zip(("primary", "secondary"), fakes, strict=False)]
    return run.Path("primary", kind, targets or engines, engines)


@pytest.fixture
def host(tmp_path):
    python = tmp_path / "root/current/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("")
    python.chmod(0o755)
    results = tmp_path / "results"
    results.mkdir()
    return run.Host(str(tmp_path / "root"), "nobody", "/srv/model", str(results))


class Loaded:
    """In place of the load: the engine's counters rise as the real ones do."""

    def __init__(self, fake, more=0):
        self.fake, self.more, self.steps, self.seeds = fake, more, [], []
        for name in ("request_success", "prefix_cache_queries", "prefix_cache_hits", "num_preemptions"):
            fake.series[f"vllm:{name}_total"] = 0.0

    def run(self, step, targets, model, seed):
        self.steps.append(step.name)
        self.seeds.append(seed)
        series, count = self.fake.series, step.requests
        tokens = step.input_tokens + 40
        series["vllm:request_success_total"] += count
        series["vllm:generation_tokens_total"] += count * step.output_tokens + self.more
        series["vllm:prompt_tokens_total"] += count * tokens
        series["vllm:prefix_cache_queries_total"] += count * tokens
        if step.kind == "prefix":
            series["vllm:prefix_cache_hits_total"] += 256 * count // 2
        return [
            {
                "start_times": [10.0 + number for number in range(count)],
                "latencies": [1.0] * count,
                "input_lens": [tokens] * count,
                "output_lens": [step.output_tokens] * count,
                "ttfts": [0.4, 0.1] * (count // 2) or [0.4],
                "itls": [[0.01]] * count,
            }
        ]


def benchmark(fake, load, *scenarios, **numbers):
    path = path_to(fake)
    watch = run.Watch(path.engines)
    return run.Benchmark(path, wanted(*scenarios, **numbers), MODEL, load, watch, CACHES)


def test_steps_that_are_compared_take_turns_after_a_warm_up(fake_vllm):
    load = Loaded(fake_vllm)
    bench = benchmark(fake_vllm, load, "parallel", "sweep")
    steps = bench.run()
    assert load.steps == [
        *("warm-up", "sequential", "parallel", "sequential", "parallel"),
        *("warm-up", "1 user", "2 users", "1 user", "2 users"),
    ]
    assert {step["name"]: len(step["runs"]) for step in steps} == {
        **dict.fromkeys(("sequential", "parallel", "1 user", "2 users"), 2)
    }
    assert bench.notes() == []


def test_no_two_runs_have_the_same_prompts(fake_vllm):
    load = Loaded(fake_vllm)
    benchmark(fake_vllm, load, "prefix", repetitions=5).run()
    assert len(set(load.seeds)) == 5


def test_hits_are_counted_beside_the_arithmetic(fake_vllm):
    steps = benchmark(fake_vllm, Loaded(fake_vllm), "prefix").run()
    found = steps[0]["runs"][0]
    # Two groups of two, one of them to warm up; 300 tokens are two whole blocks of 128.
    assert (found["hits"], found["expected_hits"], found["queries"]) == (512, 512, 4 * 340)
    assert (
        found["groups"] == [{"cold_ms": 400.0, "warm_ms": [100.0], "cold_e2e_ms": 1000.0, "warm_e2e_ms": [1000.0]}] * 2
    )


def test_requests_of_others_are_told(fake_vllm, monkeypatch):
    monkeypatch.setattr(run, "IDLE_SECONDS", 0.3)
    fake_vllm.running = 2
    bench = benchmark(fake_vllm, Loaded(fake_vllm, more=25), "parallel", repetitions=1)
    bench.run()
    assert bench.notes() == [
        "others had 50 tokens generated meanwhile",
        "requests of others were running when these began: sequential, parallel",
    ]


def test_users_of_a_gateway_are_those_of_all_its_engines(make_fake_vllm):
    fakes = make_fake_vllm(), make_fake_vllm()
    gateway = path_to(*fakes, kind="gateway", targets=[Endpoint("gateway", "http://127.0.0.1:8000")])
    (turn,) = run.plan(gateway, wanted("sweep", sweep_limit=4), 16131)
    assert [step.concurrency for step in turn] == [1, 2, 4, 8]
    together = path_to(*fakes, kind="together")
    (turn,) = run.plan(together, wanted("sweep", sweep_limit=4), 16131)
    assert [(step.concurrency, step.name) for step in turn] == [(1, "2 users"), (2, "4 users"), (4, "8 users")]


def test_engines_together_share_no_cache_to_look_at(make_fake_vllm):
    together = path_to(make_fake_vllm(), make_fake_vllm(), kind="together")
    assert run.plan(together, wanted("prefix"), 16131) == []


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"repetitions": 0}, "wanted repetitions of 1 or more, found 0"),
        ({"prefix_group": 1}, "wanted prefix_group of 2 or more"),
        ({"parallel_requests": 1}, "wanted parallel_requests of 2 or more, found 1"),
        ({"sweep_requests_per_user": 0}, "wanted sweep_requests_per_user of 1 or more"),
        ({"sweep_output_tokens": 0}, "wanted sweep_output_tokens of 1 or more"),
        ({"sweep_input_tokens": 40}, "wanted sweep_input_tokens of 41 or more, found 40"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(fake_vllm, host, numbers, message):
    with pytest.raises(BenchmarkError, match=message):
        run.benchmark(path_to(fake_vllm), wanted(**numbers), MODEL, host)
    assert fake_vllm.requests == []


def told_by(length):
    return lambda engine: ("0.32.0", {**CACHES["primary"], "max_model_len": length})


@pytest.mark.parametrize(
    ("scenario", "length", "message"),
    [
        ("parallel", 255, "parallel_output_tokens and the question within max-model-len 255, found 256 tokens"),
        ("prefix", 343, "prefix_tokens, prefix_output_tokens and 40 within max-model-len 343, found 344 tokens"),
        ("sweep", 383, "sweep_input_tokens and sweep_output_tokens within max-model-len 383, found 384 tokens"),
    ],
)
def test_requests_that_are_too_long_are_refused_before_any_load(
    fake_vllm, host, monkeypatch, scenario, length, message
):
    monkeypatch.setattr(run._benchmark_watch, "engine_of", told_by(length))
    with pytest.raises(BenchmarkError, match=message):
        run.benchmark(path_to(fake_vllm), wanted(scenario), MODEL, host)
    assert os.listdir(host.directory) == []


@pytest.mark.parametrize("length", [0, 384])
def test_what_just_fits_or_is_not_known_is_not_refused(length):
    run._refuse_lengths(wanted("sweep"), length)


def test_every_number_has_a_least_value():
    numbers = {field.name for field in dataclasses.fields(run.Wanted)} - {"scenarios", "max_num_seqs"}
    assert set(run.LEAST) == numbers


def test_an_engine_that_does_not_serve_is_refused_before_any_load(fake_vllm, host):
    fake_vllm.chat = "503"
    with pytest.raises(BenchmarkError, match=r"HTTP 503.*run playbooks/verify\.yml"):
        run.benchmark(path_to(fake_vllm), wanted(), MODEL, host)


def test_a_host_without_a_release_is_refused(fake_vllm, host):
    shutil.rmtree(host.root)
    with pytest.raises(BenchmarkError, match=r"found none; run site\.yml"):
        run.benchmark(path_to(fake_vllm), wanted(), MODEL, host)
    assert fake_vllm.requests == []


def test_a_full_disk_is_refused(fake_vllm, host, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(BenchmarkError, match="wanted 256 MiB free for results, found 0"):
        run.benchmark(path_to(fake_vllm), wanted(), MODEL, host)


def test_two_benchmarks_at_once_are_refused(fake_vllm, host, monkeypatch):
    monkeypatch.setattr(run._benchmark_watch, "engine_of", told_by(4096))
    with open(os.path.join(host.directory, ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BenchmarkError, match="found another benchmark on this host"):
            run.benchmark(path_to(fake_vllm), wanted(), MODEL, host)


def test_scratch_goes_whatever_happens_and_that_of_a_killed_benchmark_too(tmp_path):
    (tmp_path / "scratch-killed").mkdir()
    (tmp_path / "primary.json").write_text("{}")

    def leave():
        with run._scratch(str(tmp_path)) as path:
            assert [name for name in os.listdir(tmp_path) if name.startswith("scratch-")] == [Path(path).name]
            raise run.Left

    with pytest.raises(run.Left):
        leave()
    assert os.listdir(tmp_path) == ["primary.json"]


def test_an_asker_who_hangs_up_is_noticed(monkeypatch):
    reader, writer = os.pipe()
    with open(writer, "w") as stream:
        monkeypatch.setattr(run.sys, "__stdout__", stream)
        run.check_asker()
        os.close(reader)
        with pytest.raises(run.Left):
            run.check_asker()

"""The programs in ``tools/gpu``: logs of real starts, read and compared, and what is printed of them.

No engine runs here. The logs are excerpts of vLLM 0.32.0 with dummy weights, recorded on 2026-11-24: on one NVIDIA H200
(driver 580.159.04, gpt-oss-20b's and gpt-oss-120b's config.json), and on two cores of a CPU (the tiny gpt-oss).
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import types

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _calibration
from ansible_collections.nvl.vllm.plugins.module_utils import _memory_budget as budgets
from ansible_collections.nvl.vllm.plugins.module_utils._model_facts import built_in, from_config

H200 = budgets.Device(0, "NVIDIA H200", 143771, reserved_mib=616, free_mib=143156)

EAGER = """\
(EngineCore pid=1045) INFO 11-24 00:31:19 [v1/worker/gpu/model_runner.py:424] Model loading took 13.03 GiB memory and \
3.913156 seconds
(EngineCore pid=1045) INFO 11-24 00:31:30 [v1/worker/gpu_worker.py:759] Available KV cache memory: 114.94 GiB
(EngineCore pid=1045) INFO 11-24 00:31:30 [v1/core/kv_cache_utils.py:2327] GPU KV cache size: 3,309,072 tokens, \
Maximum concurrency for 8,192 tokens per request: 403.94x
(EngineCore pid=1045) INFO 11-24 00:31:30 [v1/worker/gpu_worker.py:1034] Free memory on device (139.29/139.8 GiB) on \
startup. Desired GPU memory utilization is (0.92, 128.62 GiB). Actual usage is 13.54 GiB for consumed memory (weights \
+ non-torch), 0.14 GiB for peak activation, and 0.0 GiB for CUDAGraph memory. Replace gpu_memory_utilization config \
with `--kv-cache-memory=123257992295` (114.79 GiB) to fit into requested memory, or `--kv-cache-memory=134714379776` \
(125.46 GiB) to fully utilize gpu memory. Current kv cache memory in use is 114.94 GiB.
memory_grid: started {"version": "0.32.0", "device": "cuda", "max_model_len": 8192, "blocks": 313861, \
"kv_bytes": 123415278695}
"""
EAGER_POINT = {
    "gpu-memory-utilization": 0.92,
    "max-model-len": 8192,
    "max-num-seqs": 64,
    "max-num-batched-tokens": 2048,
    "enforce-eager": True,
}
GRAPHS = """\
(EngineCore pid=2656) INFO 11-24 00:40:04 [v1/worker/gpu/model_runner.py:424] Model loading took 61.43 GiB memory and \
4.581655 seconds
(EngineCore pid=2656) INFO 11-24 00:41:37 [v1/worker/gpu_worker.py:759] Available KV cache memory: 22.58 GiB
(EngineCore pid=2656) INFO 11-24 00:41:37 [v1/core/kv_cache_utils.py:2327] GPU KV cache size: 584,076 tokens, Maximum \
concurrency for 131,072 tokens per request: 4.46x
(EngineCore pid=2656) INFO 11-24 00:42:17 [v1/worker/gpu_worker.py:971] CUDA graph pool memory: 0.22 GiB (actual), \
0.67 GiB (estimated), difference: 0.46 GiB (209.9%).
(EngineCore pid=2656) INFO 11-24 00:42:17 [v1/worker/gpu_worker.py:1034] Free memory on device (139.29/139.8 GiB) on \
startup. Desired GPU memory utilization is (0.6127, 85.66 GiB). Actual usage is 61.79 GiB for consumed memory (weights \
+ non-torch), 1.29 GiB for peak activation, and 0.22 GiB for CUDAGraph memory. Replace gpu_memory_utilization config \
with `--kv-cache-memory=23856445273` (22.22 GiB) to fit into requested memory, or `--kv-cache-memory=81441598976` \
(75.85 GiB) to fully utilize gpu memory. Current kv cache memory in use is 22.58 GiB.
memory_grid: started {"version": "0.32.0", "device": "cuda", "max_model_len": 131072, "blocks": 41108, \
"kv_bytes": 24246515545}
"""
GRAPHS_POINT = {
    "name": "h100_nvl",
    "gpu-memory-utilization": 0.6127,
    "max-model-len": 131072,
    "max-num-seqs": 64,
    "max-num-batched-tokens": 8192,
}
CPU = """\
(Worker pid=25709) INFO 11-24 00:23:45 [cpu_worker.py:260] Auto set (6.3/23.54) GiB for KV cache on node 0, with 7.06 \
GiB requested memory for the worker. 0.76 GiB memory was consumed by non-kv usages.
(EngineCore pid=22374) INFO 11-24 00:23:45 [kv_cache_utils.py:2327] CPU KV cache size: 1,056,440 tokens, Maximum \
concurrency for 4,096 tokens per request: 257.92x
memory_grid: started {"version": "0.32.0", "device": "cpu", "max_model_len": 4096, "blocks": 12896, "kv_bytes": null}
"""
CPU_POINT = {
    "gpu-memory-utilization": 0.3,
    "max-model-len": 4096,
    "max-num-seqs": 8,
    "max-num-batched-tokens": 2048,
}
#: Of the tiny gpt-oss, what its KV cache depends on.
TINY = {
    "model_type": "gpt_oss",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201088,
    "num_local_experts": 8,
    "num_experts_per_tok": 4,
    "intermediate_size": 64,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "max_position_embeddings": 131072,
}
REFUSED = """\
Traceback (most recent call last):
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, User-specified max_model_len (1000000) is greater than the derived max_model_len
"""
#: Beside an engine that held memory.
OCCUPIED = """\
(EngineCore pid=4576) ERROR 11-24 00:51:09 [core.py:1510]     raise ValueError(
(EngineCore pid=4576) ERROR 11-24 00:51:09 [core.py:1510] ValueError: Free memory on device cuda:0 (76.37/139.8 GiB) \
on startup is less than desired GPU memory utilization (0.5661, 79.14 GiB). Decrease GPU memory utilization or reduce \
GPU memory used by other processes.
(MainProcess pid=4502) Traceback (most recent call last):
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


@pytest.fixture(scope="module")
def grid(load_tool):
    return load_tool("gpu/memory_grid")


@pytest.fixture(scope="module")
def profiles(load_tool):
    return load_tool("gpu/compare_profiles")


@pytest.fixture(scope="module")
def record(load_tool):
    return load_tool("gpu/record")


# memory_grid


def test_the_terms_of_a_start_with_graphs(grid):
    row = grid.compare(GRAPHS_POINT, built_in("gpt-oss-120b"), H200, GRAPHS, 177.8)
    assert row.measured == {"weights": 61.43, "non_torch": 0.36, "activation": 0.62, "graphs": 0.67, "kv": 22.58}
    assert set(row.planned) == set(grid.TERMS)
    # The terms and the KV cache are all that was asked for.
    assert sum(row.planned.values()) == pytest.approx(85.66, abs=0.01)
    assert sum(row.measured.values()) == pytest.approx(85.66, abs=0.02)
    assert (row.started["total_gib"], row.started["graph_actual_gib"]) == (139.8, 0.22)
    assert (row.name, row.exactly, row.error) == ("h100_nvl", True, "")
    assert "name" not in row.arguments


def test_a_start_without_graphs_has_none_of_them(grid):
    row = grid.compare(EAGER_POINT, built_in("gpt-oss-20b"), H200, EAGER, 84.7)
    assert row.measured == {"weights": 13.03, "non_torch": 0.51, "activation": 0.14, "graphs": 0.0, "kv": 114.94}
    assert row.planned["graphs"] == 0
    assert row.exactly is True
    assert row.name == "0.92/8192/64/2048/eager"


def test_of_a_cpu_only_the_cache_is_known(grid):
    device = budgets.Device(0, "CPU", 23552)
    row = grid.compare(CPU_POINT, from_config(TINY), device, CPU, 139.3)
    assert row.measured == {"kv": 6.3}
    assert row.exactly is True
    assert grid.cells(row)[1:5] == ["-", "-", "-", "-"]


@pytest.mark.parametrize(
    ("was", "made"),
    [
        ("584,076", "584,077"),
        ("4.46x", "4.47x"),
        ('"blocks": 41108', '"blocks": 41109'),
        ("24246515545", "24245515545"),
    ],
)
def test_a_last_digit_that_differs_is_told(grid, was, made):
    row = grid.compare(GRAPHS_POINT, built_in("gpt-oss-120b"), H200, GRAPHS.replace(was, made), 1)
    assert row.exactly is False
    assert grid.cells(row)[-1] == "NOT exactly"


def test_a_start_that_failed_says_why(grid):
    row = grid.compare({"max-model-len": 1000000}, from_config(TINY), H200, REFUSED, 14)
    assert row.error.startswith(
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig Value"
    )
    assert "did not start: pydantic" in grid.table([row])
    assert "(76.37/139.8 GiB) on startup is less" in grid.compare({}, from_config(TINY), H200, OCCUPIED, 45).error
    assert grid.compare({}, from_config(TINY), H200, "", 14).error == "nothing"


def test_the_table_ends_with_medians(grid):
    facts = {"20b": built_in("gpt-oss-20b"), "120b": built_in("gpt-oss-120b")}
    rows = [
        grid.compare(EAGER_POINT, facts["20b"], H200, EAGER, 1),
        grid.compare(GRAPHS_POINT, facts["120b"], H200, GRAPHS, 1),
    ]
    lines = grid.table(rows).splitlines()
    rest = [row.measured["weights"] - row.planned["weights"] for row in rows]
    assert len(lines) == 5
    assert lines[-1].split("|")[2].strip() == f"{sum(rest) / 2:+.2f}"
    assert all(line.count("|") == 10 for line in lines)


def test_the_same_log_calibrates():
    assert _calibration.parse(GRAPHS) == {
        "weights_gib": 61.43,
        "non_torch_gib": 0.36,
        "peak_activation_gib": 0.62,
        "graph_gib": 0.67,
        "available_kv_gib": 22.58,
        "gpu_memory_utilization": 0.6127,
    }


def test_a_model_by_name_or_by_its_config(grid, tmp_path):
    assert grid.facts_of(tmp_path / "gpt-oss-120b") == built_in("gpt-oss-120b")
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    assert grid.facts_of(tmp_path).depth == 4


def test_main_starts_each_point_and_goes_on_after_one_that_fails(grid, monkeypatch, tmp_path, capsys):
    points = [GRAPHS_POINT, {**GRAPHS_POINT, "name": "too long", "max-model-len": 1000000}]
    (tmp_path / "points.jsonl").write_text("\n".join(map(json.dumps, points)) + "\n")
    asked = []

    def run_point(model, arguments, log):
        asked.append((model.name, arguments["max-model-len"]))
        log.write_text(GRAPHS if len(asked) == 1 else REFUSED)
        return 60.0

    monkeypatch.setattr(grid, "run_point", run_point)
    monkeypatch.setattr(grid, "host_device", lambda kind: H200)
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    platforms = types.ModuleType("vllm.platforms")
    platforms.current_platform = types.SimpleNamespace(is_cpu=lambda: False)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.setattr(grid.signal, "signal", lambda *_: None)
    kept = tmp_path / "kept.jsonl"
    argv = [str(tmp_path / "gpt-oss-120b"), str(tmp_path / "points.jsonl"), "--kept", str(kept)]
    assert grid.main([*argv, "--logs", str(tmp_path / "logs")]) == 1
    assert asked == [("gpt-oss-120b", 131072), ("gpt-oss-120b", 1000000)]
    assert [json.loads(line)["exactly"] for line in kept.read_text().splitlines()] == [True, None]
    assert (tmp_path / "logs" / "gpt-oss-120b-0.log").read_text() == GRAPHS
    assert "NVIDIA H200, 139.80 GiB" in capsys.readouterr().out
    # No time at all: nothing is started, and that is no success.
    assert grid.main([*argv, "--minutes", "-1"]) == 1
    assert len(asked) == 2
    assert "2 points left" in capsys.readouterr().out


def test_a_point_runs_in_a_process_of_its_own(grid, monkeypatch, tmp_path):
    monkeypatch.setattr(grid, "PATIENCE", 0.3)
    monkeypatch.setattr(grid.sys, "executable", "/bin/sh")
    script = tmp_path / "engine"
    script.write_text('echo "$1 $2"; echo $$ >"$0.pid"; sleep 600 & wait')
    monkeypatch.setattr(grid, "__file__", str(script))
    log = tmp_path / "log"
    assert grid.run_point(tmp_path, {"max-num-seqs": 8}, log) < 60
    assert f'--start {{"max-num-seqs": 8, "model": "{tmp_path}"}}' in log.read_text()
    assert "Error: no end after 0.3 s" in log.read_text()
    group = (tmp_path / "engine.pid").read_text().strip()
    running = subprocess.run(["ps", "-o", "stat=", "-g", group], capture_output=True, text=True, check=False).stdout
    assert [state for state in running.split() if not state.startswith("Z")] == []


# compare_profiles


def test_prompts_are_the_same_for_all_and_share_no_prefix(profiles):
    some = profiles.prompts("1-0", 50, 16)
    assert some == profiles.prompts("1-0", 50, 16)
    assert some != profiles.prompts("2-0", 50, 16)
    assert {len(prompt) for prompt in some} == {16}
    assert len({tuple(prompt[:4]) for prompt in some}) == 50


def test_figures_of_a_level(profiles):
    results = [(0.5, 2.0, 128)] * 18 + [(0.7, 3.0, 128), (0.9, 9.0, 128)]
    found = profiles.summary(results, 10.0)
    assert found == {
        "requests": 20,
        "seconds": 10.0,
        "tokens_per_s": 256.0,
        "mean_s": 2.4,
        "p95_s": 3.0,
        "first_s": 0.5,
    }


def test_the_engine_gets_its_share_and_nothing_of_the_server(profiles):
    given = {"gpu-memory-utilization": 0.92, "max-num-seqs": 64, "disable-access-log-for-endpoints": "/health"}
    fields = ["gpu_memory_utilization", "max_num_seqs", "model"]
    assert profiles.engine_arguments(given, fields, 93.1 / 139.8) == {
        "gpu_memory_utilization": 0.6127,
        "max_num_seqs": 64,
    }


def test_a_level_has_as_many_clients_and_two_requests_each(profiles):
    class Engine:
        """A stand-in for an engine that counts what it works on at once."""

        def __init__(self):
            self.running, self.most, self.names = 0, 0, []

        async def generate(self, prompt, sampling, name):
            self.running += 1
            self.most = max(self.most, self.running)
            self.names.append(name)
            for tokens in range(1, 4):
                await asyncio.sleep(0.01)
                yield types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=[0] * tokens)])
            self.running -= 1

    engine = Engine()
    found = asyncio.run(profiles.measure(engine, None, 5, "1-0", 8))
    assert (found["requests"], engine.most) == (10, 5)
    assert len(set(engine.names)) == 10
    assert found["tokens_per_s"] == pytest.approx(30 / found["seconds"], rel=0.02)


def test_the_last_round_is_shown_beside_the_first_profile(profiles):
    def run(name, *rates):
        levels = [
            {"round": turn, "concurrency": level, "tokens_per_s": rate, "mean_s": 1, "p95_s": 2, "first_s": 0.5}
            for turn, level, rate in zip((1, 1, 2, 2), (1, 8, 1, 8), rates, strict=True)
        ]
        return [{"profile": name, "started_s": 60.0}, *({"profile": name, **level} for level in levels)]

    lines = profiles.table([run("guide", 7, 7, 200, 1000), run("h100_nvl", 7, 7, 220, 1500)]).splitlines()
    assert lines[0].endswith("| h100_nvl / guide |")
    assert lines[2] == "| 1 | 200 | 1.00 | 2.00 | 0.50 | 220 | 1.00 | 2.00 | 0.50 | 1.10 |"
    assert lines[3].endswith("| 1.50 |")
    assert len(lines) == 4


def test_the_profiles_are_those_of_the_role(profiles, monkeypatch):
    assert profiles.profiles()["guide"]["max-num-seqs"] == 8
    monkeypatch.setattr(profiles.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match=r"profile fast is not known: wanted one of guide, h100_nvl"):
        profiles.main(["model", "guide", "fast"])


def test_a_profile_that_fails_names_its_log(profiles, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(profiles.sys, "executable", "/bin/sh")
    script = tmp_path / "engine"
    script.write_text("echo some log; echo 'compare_profiles: {\"started_s\": 1}'; exit 3")
    monkeypatch.setattr(profiles, "__file__", str(script))
    log = tmp_path / "log"
    with pytest.raises(SystemExit, match=f"guide ended with status 3: see {log}"):
        profiles.start_profile("guide", {}, log)
    assert log.read_text() == "some log\n"
    assert json.loads(capsys.readouterr().out) == {"profile": "guide", "started_s": 1}
    script.write_text("echo 'compare_profiles: {\"started_s\": 1}'")
    assert profiles.start_profile("guide", {}, log) == [{"profile": "guide", "started_s": 1}]


@pytest.mark.parametrize("name", ["memory_grid", "compare_profiles"])
def test_a_tool_that_is_ended_ends_its_engine(name, grid, profiles, monkeypatch, tmp_path):
    handlers = {}
    tool = {"memory_grid": grid, "compare_profiles": profiles}[name]
    monkeypatch.setattr(tool.signal, "signal", lambda number, handler: handlers.setdefault(number, handler))
    with pytest.raises((SystemExit, OSError, ImportError)):
        tool.main([str(tmp_path), str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        handlers[signal.SIGTERM](signal.SIGTERM, None)


# record


def test_what_tells_boards_apart_is_taken_out_alike_everywhere(record):
    clean = record.nameless()
    uuid, other = "GPU-bd7f35fc-8a08-0a52-b05e-df8970a62e5a", "GPU-bd7f35fc-8a08-0a52-b05e-df8970a62e5b"
    assert clean(f"<uuid>{uuid}</uuid><serial>1654923005512</serial>") == (
        "<uuid>GPU-00000000-0000-0000-0000-000000000001</uuid><serial>0000000000002</serial>"
    )
    assert clean(f"{other} {uuid}") == (
        "GPU-00000000-0000-0000-0000-000000000003 GPU-00000000-0000-0000-0000-000000000001"
    )
    assert clean("    Serial Number      : 1654923005512") == "    Serial Number      : 0000000000002"
    assert clean("Chassis Serial Number  : N/A, <serial>N/A</serial>") == (
        "Chassis Serial Number  : N/A, <serial>N/A</serial>"
    )


def test_calls_are_written_as_they_came(record, tmp_path):
    def run(argv, timeout):
        if argv == ["gone"]:
            raise FileNotFoundError("gone")
        return 0, "2026-11-24T00:28:49 usb 1-1: new device\n2026-11-24T00:28:49 NVRM: loading\n", "warned"

    recorder = record.Recorder(run)
    with pytest.raises(FileNotFoundError):
        recorder(["gone"], 1)
    for argv in (record._gpu_info.KERNEL_LOGS["dmesg"], ["nvidia-smi", "-q", "-x"]):
        assert recorder(argv, 1)[0] == 0
    record.write(tmp_path, recorder.calls)
    index = json.loads((tmp_path / "calls.json").read_text())
    assert [call["file"] for call in index] == ["00-dmesg-time-format-iso.txt", "01-nvidia-smi-q-x.xml"]
    assert [(call["status"], call["stderr"]) for call in index] == [(0, "warned")] * 2
    # The kernel log is that of the whole host; nvidia-smi's answer is kept as it is.
    assert (tmp_path / index[0]["file"]).read_text() == "2026-11-24T00:28:49 NVRM: loading\n"
    assert (tmp_path / index[1]["file"]).read_text().startswith("2026-11-24T00:28:49 usb")


def test_record_asks_what_gpu_info_asks_and_more(record, monkeypatch, tmp_path, capsys):
    answers = {
        ("nvidia-smi", "-q", "-x"): '<gpu id="00000000:AD:00.0"><product_name>NVIDIA H100 NVL</product_name></gpu>'
    }
    monkeypatch.setattr(record._gpu_info, "run_command", lambda argv, timeout: (0, answers.get(tuple(argv), ""), ""))
    monkeypatch.setattr(record.sys, "argv", ["record", str(tmp_path)])
    record.main()
    asked = [call["argv"] for call in json.loads((tmp_path / "calls.json").read_text())]
    assert record._gpu_info.ASK_ALL in asked
    assert record._gpu_info.ASK_CSV in asked
    assert asked[-len(record.PLAIN) :] == [*record.PLAIN]
    assert "NVIDIA H100 NVL" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_recorded(record, monkeypatch, tmp_path):
    def run(argv, timeout):
        raise FileNotFoundError(argv[0])

    monkeypatch.setattr(record._gpu_info, "run_command", run)
    monkeypatch.setattr(record.sys, "argv", ["record", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="nvidia-smi is not there"):
        record.main()
    assert not (tmp_path / "none").exists()

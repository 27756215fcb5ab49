"""The modules benchmark and benchmark_report as Ansible runs them: what they refuse, write and say."""

from __future__ import annotations

import html
import json
import os
import re
import socket
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from ansible_collections.nvl.vllm.plugins.module_utils import _benchmark_report
from ansible_collections.nvl.vllm.plugins.module_utils._benchmark_load import BenchmarkError
from ansible_collections.nvl.vllm.plugins.module_utils._benchmark_run import Left
from ansible_collections.nvl.vllm.plugins.modules import benchmark, benchmark_report

ROOT = Path(__file__).parents[4]
ENGINES = [{"name": name, "url": f"http://127.0.0.1:{port}"} for name, port in (("primary", 8001), ("secondary", 8002))]
OPTIONS = {
    "path": "primary",
    "targets": ENGINES[:1],
    "engines": ENGINES[:1],
    "model": "gpt-oss-120b",
    "tokenizer": "/srv/model",
    "device": "cpu",
}


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """The module on a host where benchmarks take no time; returns what they were asked."""
    asked = []

    def measure(*what):
        asked.append(what)
        return {"path": what[0].name, "steps": [], "vllm": "0.32.0"}

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(benchmark, "benchmark", measure)
    monkeypatch.setattr(benchmark.signal, "signal", lambda *_: None)
    return asked


def test_check_mode_sends_nothing(run_module, measured):
    result = run_module(benchmark.main, check_mode=True, **OPTIONS)
    assert result["skipped"]
    assert result["msg"] == "Would benchmark primary: parallel, prefix, sweep."
    assert measured == []


def test_only_root_may_benchmark(run_module, measured, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    result = run_module(benchmark.main, **OPTIONS)
    assert (
        result["msg"] == f"{socket.gethostname()}: benchmark runs as user 1000, wanted root: run it with become: true"
    )


def test_the_result_is_kept_and_returned(run_module, measured, tmp_path):
    result = run_module(benchmark.main, directory=str(tmp_path), api_key="the-key", repetitions=5, **OPTIONS)
    assert (result["changed"], result["vllm"], result["driver"]) == (False, "0.32.0", "")
    assert re.fullmatch(r"\d+ x \S.*", result["hardware"])
    assert json.loads((tmp_path / "primary.json").read_text())["hardware"] == result["hardware"]
    assert "the-key" not in (tmp_path / "primary.json").read_text()
    (path, wanted, model, host) = measured[0]
    assert (wanted.repetitions, model, host.gpus) == (5, "gpt-oss-120b", None)
    assert path.targets[0].api_key == "the-key"


def test_a_gateway_has_a_key_of_its_own(run_module, measured, tmp_path):
    door = [{"name": "gateway", "url": "http://127.0.0.1:8000"}]
    options = {**OPTIONS, "targets": door, "engines": ENGINES, "path": "gateway", "kind": "gateway"}
    run_module(benchmark.main, directory=str(tmp_path), api_key="of-engines", target_key="of-users", **options)
    path = measured[0][0]
    assert (path.targets[0].api_key, path.engines[0].api_key) == ("of-users", "of-engines")


@pytest.mark.parametrize(
    ("error", "message"),
    [(BenchmarkError("why"), "benchmark of primary: why"), (Left(), "was interrupted; nothing of it is left")],
)
def test_it_says_why_there_are_no_figures(run_module, measured, monkeypatch, tmp_path, error, message):
    def fail(*_):
        raise error

    monkeypatch.setattr(benchmark, "benchmark", fail)
    result = run_module(benchmark.main, directory=str(tmp_path), **OPTIONS)
    assert result["failed"]
    assert message in result["msg"]
    assert os.listdir(tmp_path) == []


def test_gpus_are_named_by_nvidia_smi(monkeypatch):
    said = "0, NVIDIA H100 NVL, 580.178.04\n1, NVIDIA H100 NVL, 580.178.04\n"
    monkeypatch.setattr(benchmark._gpu_info, "run_command", lambda *_: (0, said, ""))
    assert benchmark.hardware("cuda") == {"hardware": "2 x NVIDIA H100 NVL", "driver": "580.178.04"}
    mixed = said.replace("1, NVIDIA H100 NVL", "1, NVIDIA A100")
    monkeypatch.setattr(benchmark._gpu_info, "run_command", lambda *_: (0, mixed, ""))
    assert benchmark.hardware("cuda")["hardware"] == "1 x NVIDIA H100 NVL, 1 x NVIDIA A100"


@pytest.mark.parametrize(
    ("status", "line"), [(15, "Unable to determine the device handle"), (14, "WARNING: infoROM is corrupted at gpu 1")]
)
def test_of_gpus_that_do_not_answer_the_others_are_named(monkeypatch, status, line):
    said = f"0, NVIDIA H100 NVL, 580.178.04\n1, [Unknown Error], 580.178.04\n{line}\n"
    monkeypatch.setattr(benchmark._gpu_info, "run_command", lambda *_: (status, said, ""))
    assert benchmark.hardware("cuda") == {"hardware": "1 x NVIDIA H100 NVL", "driver": "580.178.04"}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((9, "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", ""), "is not loaded"),
        ((0, "", ""), "nvidia-smi finds no GPU"),
        (TimeoutError("nvidia-smi did not answer within 10 s"), "did not answer within 10 s"),
        (FileNotFoundError("nvidia-smi"), "wanted the names of the GPUs"),
    ],
)
def test_gpus_without_a_name_are_refused_before_any_load(run_module, measured, monkeypatch, tmp_path, answer, message):
    def run(*_):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(benchmark._gpu_info, "run_command", run)
    result = run_module(benchmark.main, directory=str(tmp_path), **{**OPTIONS, "device": "cuda"})
    assert result["failed"]
    assert message in result["msg"]
    assert measured == []
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("module", [benchmark, benchmark_report], ids=["benchmark", "benchmark_report"])
def test_documentation_equals_argument_spec(module, monkeypatch):
    class Caught(Exception):
        pass

    def catch(argument_spec, supports_check_mode):
        assert supports_check_mode
        raise Caught(argument_spec)

    monkeypatch.setattr(module, "AnsibleModule", catch)
    with pytest.raises(Caught) as caught:
        module.main()
    spec = caught.value.args[0]
    documented = yaml.safe_load(module.DOCUMENTATION)["options"]
    keys = ("type", "elements", "required", "default", "choices")

    def facts(options):
        return {
            name: {key: one[key] for key in keys if one.get(key) not in (None, False)} for name, one in options.items()
        }

    assert facts(documented) == facts(spec)
    assert [name for name, one in spec.items() if name.endswith("_key") and not one.get("no_log")] == []
    for task in yaml.safe_load(module.EXAMPLES):
        assert set(task[f"nvl.vllm.{module.__name__.rpartition('.')[2]}"]) <= set(documented)


# The report.


def test_the_settings_are_numbers_also_where_the_command_line_gives_strings():
    """Else the same benchmark would have another baseline."""
    variables = yaml.safe_load((ROOT / "roles/vllm_benchmark/vars/main.yml").read_text())
    for name, value in variables["__vllm_benchmark_settings"].items():
        assert value == f"{{{{ vllm_benchmark_{name} | int }}}}"


def repetition(seconds, **more):
    latencies = {key: {"p50": 100 * seconds, "p95": 200.0, "p99": 300.0} for key in ("ttft_ms", "itl_ms", "e2e_ms")}
    rates = {"requests_per_s": 1.0, "output_tokens_per_s": 100 / seconds, "total_tokens_per_s": 1.0}
    counters = {"preemptions": 0}
    shared = {"from": 1.0, "to": 2.0, "seconds": seconds, "requests": 4, "counters": counters}
    return {**shared, **rates, **latencies, **more}


def result_of(path="primary", slower=1.0, notes=(), gpus=None, repetitions=3, hits=17280, **more):
    def step(scenario, name, users, *runs, **more):
        shared = {"output_tokens": 128, "input_tokens": 2000, "group": 2, "runs": list(runs)}
        return {"scenario": scenario, "name": name, "users": users, **shared, **more}

    groups = [{"cold_ms": 390.0, "warm_ms": [61.0], "cold_e2e_ms": 420.0, "warm_e2e_ms": [91.0]}] * 3
    counted = {"hits": hits, "queries": 24000, "expected_hits": 17280, "other_tokens": 0}
    offs = (0, 0.1, 0.2)[:repetitions]
    timeline = {"t": [0.0, 1.0, 2.0], "running": [0, 4, 0], "waiting": [0, 1, 0], "kv_usage": [0.0, 0.5, 0.0]}
    return {
        "path": path, "kind": "engine", "alone": not notes, "notes": list(notes), "seconds": 60.0,
        "hardware": "2 x AMD EPYC", "driver": "", "vllm": "0.32.0", "time": "2026-11-24T08:00:00Z", "missed": 0,
        "engines": {path: {"block_size": 128, "kv_tokens": 16131}},
        "timeline": {"engines": {path: timeline}, "gpus": gpus or {}},
        "steps": [
            step("parallel", "sequential", 1, *(repetition(4.0 * slower + off) for off in offs)),
            step("parallel", "parallel", 4, *(repetition(1.2 * slower + off / 10) for off in offs)),
            step("prefix", "prefix", 1, *[repetition(1.0, groups=groups, **counted)] * repetitions),
            *(step("sweep", f"{n} users", n, *(repetition(slower / n + off / 100) for off in offs)) for n in (1, 2, 4)),
        ],
        **more,
    }  # fmt: skip


def reported(run_module, directory, *results, **more):
    options = {
        "host": "sandbox", "results": list(results), "device": "cpu", "model": "tiny-gpt-oss",
        "arguments": [{"max-num-seqs": 8}], "settings": {"sweep_output_tokens": 128}, "directory": str(directory),
    }  # fmt: skip
    return run_module(benchmark_report.main, **options, **more)


class Outside(HTMLParser):
    """Collects whatever a page would fetch, and what is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attributes):
        if tag in ("script", "link", "img", "iframe", "object"):
            self.found.append(tag)
        self.found += [
            value for key, value in attributes
            if key in ("src", "href", "xlink:href") and value not in ("latest.json", "latest.md") and value[:1] != "#"
        ]  # fmt: skip


def test_the_page_needs_nothing_from_elsewhere(run_module, tmp_path):
    gpus = {"0": {"t": [0.0, 1.5], "utilization": [0.0, None], "power_w": [60.0, 61.0], "memory_mib": [1.0, 2.0]}}
    gpus["0"]["clock_reasons"] = [1, None]
    result = reported(run_module, tmp_path, result_of("<b>&"), result_of("gateway", gpus=gpus))
    page = (tmp_path / "sandbox/latest.html").read_text()
    outside = Outside()
    outside.feed(page)
    assert outside.found == []
    assert "@import" not in page
    assert not re.findall(r"url\((?!#)", page)
    assert "<b>&" not in page
    assert page.count("<svg") == 3
    # Colours of the pictures are the page's, in light and dark.
    assert "var(--s0)" in page
    assert not re.search(r"#0[14]0[25]0[36]|#1100", page)
    assert result["page"] == str(tmp_path / "sandbox/latest.html")


def test_the_answers_are_at_the_beginning(run_module, tmp_path):
    result = reported(run_module, tmp_path, result_of(), result_of("secondary", 0.9))
    lines = result["summary"].splitlines()
    assert re.match(r"3\.4x\s+as fast: 4 requests at once instead of one after the other\s+primary: 4\.10 s", lines[0])
    assert re.match(r"6\.4x\s+sooner: the first token, .*51840 tokens hit, as the prompts' arithmetic has it", lines[1])
    assert re.match(r"442 tokens/s\s+best throughput, at 4 users\s+secondary", lines[2])
    assert re.match(r"2 of 2\s+targets met\s+3 not measurable here, 2 not comparable here", lines[3])
    markdown = (tmp_path / "sandbox/latest.md").read_text()
    assert markdown.index("3.4x") < markdown.index("## Targets")


def test_the_json_has_all_figures(run_module, tmp_path):
    reported(run_module, tmp_path, result_of())
    found = json.loads((tmp_path / "sandbox/latest.json").read_text())
    assert found["schema"] == 1
    assert found["verdicts"]["primary"]["parallel"]["speedup"]["median"] == pytest.approx(3.388)
    assert found["paths"][0]["steps"][0]["summary"]["seconds"] == {"median": 4.1, "min": 4.0, "max": 4.2}
    assert {row["key"] for row in found["targets"]} >= {"latency", "power"}
    assert found["baseline"]["time"] is None


def test_what_is_worse_than_the_baseline_is_named_with_its_figures(run_module, tmp_path):
    first = reported(run_module, tmp_path, result_of(), save_baseline=True)
    assert first["problems"] == []
    assert os.path.isfile(first["baseline"])
    same = reported(run_module, tmp_path, result_of(slower=1.01))
    assert same["problems"] == []
    assert "nothing is worse" in same["summary"]
    slow = reported(run_module, tmp_path, result_of(slower=1.5))
    assert (
        "worse than the baseline of 2026-11-24T08:00:00Z: primary: sequential: 6.1 s (6 to 6.2), was 4.1 (4 to 4.2): "
        "49 % worse"
    ) in slow["problems"]
    assert slow["problems"][0] in (tmp_path / "sandbox/latest.html").read_text()
    assert reported(run_module, tmp_path, result_of(slower=1.5), threshold=60)["problems"] == []


def test_a_baseline_of_other_settings_is_another_one(run_module, tmp_path):
    first = reported(run_module, tmp_path, result_of(), save_baseline=True)
    other = run_module(
        benchmark_report.main, host="sandbox", results=[result_of(slower=2)], device="cpu", model="tiny-gpt-oss",
        arguments=[{"max-num-seqs": 16}], settings={"sweep_output_tokens": 128}, directory=str(tmp_path),
    )  # fmt: skip
    assert other["baseline"] != first["baseline"]
    assert other["problems"] == []
    assert "No baseline for this hardware and set-up yet" in other["summary"]


def test_company_makes_no_baseline_and_is_told_in_a_report_that_is_written(run_module, tmp_path):
    note = "others had 99 tokens generated meanwhile"
    refused = reported(run_module, tmp_path, result_of(notes=[note]), save_baseline=True)
    (problem,) = refused["problems"]
    assert problem.startswith("no baseline was stored: wanted engines that were alone, found: primary: others had 99")
    assert problem in refused["summary"]
    for name in ("latest.html", "latest.md"):
        assert problem in (tmp_path / "sandbox" / name).read_text()
    found = json.loads((tmp_path / "sandbox/latest.json").read_text())
    assert (found["baseline"]["stored"], found["baseline"]["refused"]) == (False, problem)
    assert not (tmp_path / "baselines").exists()
    told = reported(run_module, tmp_path, result_of(notes=[note]))
    assert f"Not alone  primary: {note}" in told["summary"]
    assert note in (tmp_path / "sandbox/latest.html").read_text()


def test_too_few_repetitions_make_no_baseline(run_module, tmp_path):
    refused = reported(run_module, tmp_path, result_of(repetitions=2), save_baseline=True)
    assert "wanted 3 repetitions or more, found 2: raise vllm_benchmark_repetitions" in refused["problems"][0]
    assert "Remark     2 of 3 repetitions: what may be chance cannot be told" in refused["summary"]
    assert reported(run_module, tmp_path, result_of(repetitions=2))["problems"] == []
    assert not (tmp_path / "baselines").exists()


def test_a_part_is_stored_beside_the_rest(run_module, tmp_path):
    """One path, then one scenario of the other: nothing of the first baseline is lost."""
    first = reported(run_module, tmp_path, result_of(), result_of("gateway"), save_baseline=True)
    before = json.loads(Path(first["baseline"]).read_text())["metrics"]
    part = result_of("gateway", slower=2.0, time="2026-11-25T08:00:00Z")
    part["steps"] = [step for step in part["steps"] if step["scenario"] == "sweep"]
    reported(run_module, tmp_path, part, save_baseline=True)
    after = json.loads(Path(first["baseline"]).read_text())["metrics"]
    assert set(after) == set(before)
    changed = {name for name in after if after[name]["time"] != before[name]["time"]}
    assert changed == {name for name in after if name.startswith("gateway: ") and re.search(r" users?, ", name)}
    # Each figure is compared with the run that it is of.
    slow = reported(run_module, tmp_path, result_of(slower=3.0), result_of("gateway", slower=6.0))
    assert any(one.startswith("worse than the baseline of 2026-11-24T08:00:00Z: primary") for one in slow["problems"])
    assert any(one.startswith("worse than the baseline of 2026-11-25T08:00:00Z: gateway") for one in slow["problems"])


def test_what_the_figures_rest_on_is_said_in_words(run_module, tmp_path):
    columns = {"t": [0.0, 1.0], "utilization": [97.0, 98.0], "power_w": [399.0, 400.0], "memory_mib": [1.0, 1.0]}
    hot = {"0": {**columns, "clock_reasons": [0x48, 0x4]}, "1": {**columns, "clock_reasons": [0x1, None]}}
    odd = result_of("gateway", gpus=hot, hits=15000, missed=7, kind="gateway")
    odd["steps"][3]["runs"][0]["counters"] = {"preemptions": 12}
    odd["steps"][0]["runs"][0]["seconds"] = 99.0
    result = reported(run_module, tmp_path, result_of(), odd)
    told = [
        "gateway: GPU 0 was slowed down in 1 of 2 looks: it is too hot (hardware)",
        "gateway: GPU 0 was at its power cap in 1 of 2 looks, as is usual under full load",
        "gateway: 1 users: requests lost their place in the KV cache 12 times, and were computed again",
        "gateway: 4 requests at once cannot be 82.5 times as fast as one after the other: something else slowed these "
        "down",
        "gateway: 45000 tokens hit the prefix cache, and by the prompts' arithmetic it is 51840; requests of a group "
        "go to different engines, unless vllm_gateway_affinity is session",
        "gateway: 7 looks at its engines came to nothing, so the timeline has gaps",
    ]
    found = json.loads((tmp_path / "sandbox/latest.json").read_text())
    assert sorted(found["remarks"]) == sorted(told)
    page = html.unescape((tmp_path / "sandbox/latest.html").read_text())
    text = (tmp_path / "sandbox/latest.md").read_text()
    for one in told:
        assert f"Remark     {one}" in result["summary"]
        assert one in page
        assert one in text
    # Lines of GPUs have their legend.
    assert page.count(">GPU 1<") == 2


@pytest.mark.parametrize(
    ("changes", "tints"),
    [({}, ["clean", "clean", "note", "clean"]), ({"hits": 15000}, ["clean", "drifted", "note", "clean"])],
)
def test_an_answers_colour_is_its_verdict(run_module, tmp_path, changes, tints):
    reported(run_module, tmp_path, result_of(**changes))
    page = (tmp_path / "sandbox/latest.html").read_text()
    answers = page[page.index('class="answers"') : page.index('class="said')]
    assert re.findall(r"<div class=(\w+)>", answers) == tints


def test_a_target_that_is_missed_colours_its_answer(run_module, tmp_path):
    slow = result_of()
    for run in slow["steps"][2]["runs"]:
        run["queries"] = 99999
    reported(run_module, tmp_path, slow)
    assert "<div class=drifted><b>1 of 2</b><span>targets met" in (tmp_path / "sandbox/latest.html").read_text()


def test_the_guides_own_verdict_stands_beside_another_one(run_module, tmp_path):
    """4.6 times for the whole request is what the guide promises; 9 times would be more."""
    fast = result_of()
    for run in fast["steps"][2]["runs"]:
        run["groups"] = [{**group, "warm_e2e_ms": [42.0]} for group in run["groups"]]
    result = reported(run_module, tmp_path, fast)
    told = "by the guide's value missed, 10 times"
    assert re.search(rf"Speed-up of a cached prompt\s+met\s+{told}", result["summary"])
    for name in ("latest.html", "latest.md"):
        text = html.unescape((tmp_path / "sandbox" / name).read_text())
        assert f"met ({told})" in text
        assert "6.39 times with 128 output tokens: first token, cold by warm" in text
    assert "by the guide's value" not in reported(run_module, tmp_path, result_of())["summary"]


def test_of_a_task_only_what_the_module_returns_is_in_the_report(run_module, tmp_path):
    task = {"item": "primary", "invocation": {"module_args": {}}, "changed": False, "failed": False}
    reported(run_module, tmp_path, result_of(**task))
    found = json.loads((tmp_path / "sandbox/latest.json").read_text())
    assert set(found["paths"][0]) == set(yaml.safe_load(benchmark.RETURN)) == set(_benchmark_report.PATH_KEYS)


def test_check_mode_writes_nothing(run_module, tmp_path):
    reported(run_module, tmp_path, result_of(), check_mode=True, save_baseline=True)
    assert os.listdir(tmp_path) == []


def test_a_directory_that_cannot_be_written_is_named(run_module, tmp_path):
    (tmp_path / "file").write_text("")
    result = reported(run_module, tmp_path / "file", result_of())
    assert "set vllm_benchmark_directory to a directory of the user" in result["msg"]


def test_without_matplotlib_it_says_so(run_module, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_report, "MISSING", "ImportError: matplotlib")
    assert "matplotlib" in reported(run_module, tmp_path, result_of())["msg"]

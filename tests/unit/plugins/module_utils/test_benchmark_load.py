"""The process that runs vllm bench serve, with a stand-in for vLLM: what it is asked, what it sees, how it fails."""

from __future__ import annotations

import json
import os
import pwd
import signal
import sys
import textwrap
import time

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _benchmark_load as load
from ansible_collections.nvl.vllm.plugins.module_utils._openai import Endpoint

ME = pwd.getpwuid(os.geteuid()).pw_name
QUESTION = load.Step("parallel", "parallel", load.QUESTION, 4, 4, 128)
PREFIX = load.Step("prefix", "prefix", load.PREFIX, 1, 12, 4, input_tokens=2000, group=4)
SWEEP = load.Step("sweep", "8 users", load.LOAD, 8, 32, 128, input_tokens=256)
#: In place of vLLM: writes its arguments and its environment, or does what the seed tells.
STAND_IN = """
import json, os, sys, time
def main():
    words = sys.argv
    value = {words[at]: words[at + 1] for at in range(3, len(words) - 1) if words[at].startswith("--")}
    seed = int(value["--seed"])
    if seed == 1:
        print("what went wrong")
        sys.exit(3)
    if seed == 2:
        time.sleep(600)
    found = {"argv": words, "environment": dict(os.environ), "begin": time.monotonic()}
    if seed == 4:
        found.update(failed=1, num_prompts=4, errors=["", "Service Unavailable", "", ""])
    with open(os.path.join(value["--result-dir"], value["--result-filename"]), "w") as stream:
        json.dump(found, stream)
"""


def value(argv, name):
    return argv[argv.index(name) + 1]


def arguments(step, tmp_path):
    files = load.Files(str(tmp_path), "/srv/model")
    return load.arguments(step, "http://127.0.0.1:8001", "gpt", files, 7, "/scratch/1.json")


def test_the_question_is_a_chat(tmp_path):
    argv = arguments(QUESTION, tmp_path)
    assert value(argv, "--endpoint") == "/v1/chat/completions"
    assert (value(argv, "--num-prompts"), value(argv, "--max-concurrency")) == ("4", "4")
    assert (value(argv, "--sharegpt-output-len"), value(argv, "--seed")) == ("128", "7")
    assert {"--ignore-eos", "--save-detailed", "--disable-shuffle"} <= set(argv)


def test_a_group_has_a_prefix_of_its_own(tmp_path):
    argv = arguments(PREFIX, tmp_path)
    assert value(argv, "--prefix-repetition-prefix-len") == "2000"
    assert (value(argv, "--prefix-repetition-num-prefixes"), value(argv, "--num-prompts")) == ("3", "12")
    assert value(argv, "--max-concurrency") == "1"


def test_prompts_of_a_sweep_share_nothing(tmp_path):
    argv = arguments(SWEEP, tmp_path)
    assert value(argv, "--prefix-repetition-num-prefixes") == value(argv, "--num-prompts") == "32"
    lengths = [int(value(argv, f"--prefix-repetition-{part}-len")) for part in ("prefix", "suffix")]
    assert sum(lengths) == 256


@pytest.fixture
def root(tmp_path):
    """A release whose vLLM is the stand-in."""
    packages = tmp_path / "packages/vllm"
    for name in ("benchmarks/serve.py", "entrypoints/cli/main.py"):
        path = packages / name
        path.parent.mkdir(parents=True)
        path.write_text(STAND_IN)
    python = tmp_path / "root/current/bin/python"
    python.parent.mkdir(parents=True)
    text = f"""\
        #!/bin/sh
        PYTHONPATH={tmp_path}/packages exec {sys.executable} "$@"
        """
    python.write_text(textwrap.dedent(text))
    python.chmod(0o755)
    return tmp_path / "root"


@pytest.fixture
def scratch(tmp_path):
    path = tmp_path / "scratch"
    path.mkdir()
    return path


def running(root, scratch, deadline=60.0, check=lambda: None):
    return load.Load(str(root), ME, load.Files(str(scratch), "/srv/model"), deadline, check)


def test_runs_share_the_imports_and_begin_together(root, scratch, monkeypatch):
    monkeypatch.setenv("SECRET", "of the caller")
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    targets = [Endpoint("a", "http://127.0.0.1:1", "key-a"), Endpoint("b", "http://127.0.0.1:2")]
    with running(root, scratch) as bench:
        found = bench.run(QUESTION, targets, "gpt", 10)
        again = bench.run(QUESTION, targets[:1], "gpt", 20)
    assert [value(one["argv"], "--base-url") for one in (*found, *again)] == [
        "http://127.0.0.1:1", "http://127.0.0.1:2", "http://127.0.0.1:1",
    ]  # fmt: skip
    assert [value(one["argv"], "--seed") for one in found] == ["10", "11"]
    assert found[0]["argv"][:3] == ["vllm", "bench", "serve"]
    assert "key-a" not in " ".join(found[0]["argv"])
    assert found[0]["environment"]["OPENAI_API_KEY"] == "key-a"
    assert "OPENAI_API_KEY" not in found[1]["environment"]
    assert "SECRET" not in found[0]["environment"]
    assert found[0]["environment"]["HOME"] == str(scratch)
    assert sorted(os.listdir(scratch)) == ["driver.py", "question.json"]


def test_a_run_that_fails_tells_why(root, scratch):
    with running(root, scratch) as bench, pytest.raises(load.BenchmarkError, match="exit status 3: what went wrong"):
        bench.run(QUESTION, [Endpoint("a", "http://127.0.0.1:1")], "gpt", 1)


def test_a_request_that_fails_makes_the_figures_worthless(root, scratch):
    with running(root, scratch) as bench, pytest.raises(load.BenchmarkError, match="1 of 4 failed: Service Unavail"):
        bench.run(QUESTION, [Endpoint("a", "http://127.0.0.1:1")], "gpt", 4)


def test_a_vllm_without_its_benchmark_is_named(root, scratch, tmp_path):
    (tmp_path / "packages/vllm/benchmarks/serve.py").write_text("import aiohttp_is_missing\n")
    with pytest.raises(load.BenchmarkError, match="cannot be imported: No module named 'aiohttp_is_missing'"):
        running(root, scratch).__enter__()


def test_without_a_release_there_is_no_benchmark(tmp_path, scratch):
    with pytest.raises(load.BenchmarkError, match=r"run site\.yml"):
        running(tmp_path / "none", scratch).__enter__()


def test_a_user_that_is_not_there_is_named(root, scratch):
    bench = load.Load(str(root), "nobody-of-that-name", load.Files(str(scratch), "/srv/model"), 60.0)
    with pytest.raises(load.BenchmarkError, match=r"wanted a user nobody-of-that-name on this host.*run site\.yml"):
        bench.__enter__()


def test_a_process_that_has_ended_is_no_broken_pipe(root, scratch):
    with running(root, scratch) as bench:
        os.killpg(bench._process.pid, signal.SIGKILL)
        bench._process.wait()
        with pytest.raises(load.BenchmarkError, match=r"the process that runs vllm bench serve ended \(-9\)"):
            bench.run(QUESTION, [Endpoint("a", "http://127.0.0.1:1")], "gpt", 10)


@pytest.mark.parametrize("place", ["link", "pipe", "directory"])
def test_root_opens_nothing_that_the_loads_user_put_in_a_files_place(tmp_path, place):
    secret = tmp_path / "shadow"
    secret.write_text("root:s3cr3t")
    path = tmp_path / "1.log"
    {"link": lambda: path.symlink_to(secret), "pipe": lambda: os.mkfifo(path), "directory": path.mkdir}[place]()
    assert load._tail(str(path)) == "no output"
    run = {"result": str(path), "log": str(path)}
    bench = load.Load("/nonexistent", ME, load.Files(str(tmp_path), "/srv/model"), 60.0)
    with pytest.raises(load.BenchmarkError) as caught:
        bench._taken(run, 0, Endpoint("a", "http://127.0.0.1:1"))
    assert "s3cr3t" not in str(caught.value)


class Gone(BaseException):
    pass


@pytest.mark.parametrize("why", ["deadline", "asker"])
def test_a_run_ends_with_its_deadline_and_with_its_asker(root, scratch, monkeypatch, why):
    monkeypatch.setattr(load, "PATIENCE", 0.05)
    asked = []

    def check():
        asked.append(1)
        if why == "asker" and children(bench):
            raise Gone

    bench = running(root, scratch, 3.0 if why == "deadline" else 600.0, check)
    expected = Gone if why == "asker" else load.BenchmarkError
    with bench:
        session = bench._process.pid
        with pytest.raises(expected):
            bench.run(QUESTION, [Endpoint("a", "http://127.0.0.1:1")], "gpt", 2)
    assert asked
    # The run that was under way is gone with it: no process of its session is left.
    end = time.monotonic() + 30
    while any(session_of(pid) == session for pid in os.listdir("/proc") if pid.isdigit()):
        assert time.monotonic() < end, "the run goes on"
        time.sleep(0.05)


def test_certificates_for_the_gateway_come_along(root, scratch, monkeypatch, tmp_path):
    (tmp_path / "ca.pem").write_text("a certificate")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    with running(root, scratch) as bench:
        (found,) = bench.run(QUESTION, [Endpoint("a", "https://127.0.0.1:1")], "gpt", 10)
        path = found["environment"]["SSL_CERT_FILE"]
        assert path.startswith(str(scratch))
        with open(path, encoding="ascii") as stream:
            assert stream.read() == "a certificate"


def children(bench):
    pid = bench._process.pid
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as stream:
            return stream.read().split()
    except FileNotFoundError:
        return []


def session_of(pid):
    """The session of a process that runs; None for one that ended."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stream:
            fields = stream.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(fields[3]) if fields[0] != "Z" else None


def test_the_data_set_holds_the_guides_question(scratch):
    files = load.Files(str(scratch), "/srv/model")
    files.prepare()
    (entry,) = json.loads((scratch / "question.json").read_text())
    assert entry["conversations"][0]["value"] == "Write a Python function to sort a list."
    assert len(entry["conversations"]) == 2

"""playbooks/benchmark.yml itself, with a load that takes no time: a path that fails does not take the others along."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
#: Stands in the module's place for what loads a path. One fails; the others tell how many requests they were given.
LOAD = """

def benchmark(path, wanted, model, host):
    if path.name == "secondary":
        raise BenchmarkError("no more room")
    latencies = {key: {"p50": 1.0, "p95": 1.0, "p99": 1.0} for key in ("ttft_ms", "itl_ms", "e2e_ms")}
    run = {"from": 0.0, "to": 1.0, "requests": 4, "counters": {"preemptions": 0}, **latencies}
    run.update(dict.fromkeys(("requests_per_s", "output_tokens_per_s", "total_tokens_per_s"), 1.0))
    steps = [
        {"scenario": "parallel", "name": name, "users": users, "output_tokens": 9, "runs": [{**run, "seconds": s}] * 3}
        for name, users, s in (("sequential", 1, 4.0), ("parallel", 4, 1.0))
    ]
    engines = {one.name: {"block_size": 128, "kv_tokens": wanted.max_num_seqs} for one in path.engines}
    return {
        "path": path.name, "kind": path.kind, "engines": engines, "vllm": "0.32.0", "alone": True, "notes": [],
        "missed": 0, "seconds": 1.0, "steps": steps, "timeline": {"engines": {}, "gpus": {}},
    }


if __name__ == "__main__":
"""


def collection(directory: Path) -> Path:
    """This collection, but for the load of one module."""
    mine = directory / "ansible_collections/nvl/vllm"
    modules = mine / "plugins/modules"
    modules.mkdir(parents=True)
    for source, place in ((ROOT, mine), (ROOT / "plugins", mine / "plugins"), (ROOT / "plugins/modules", modules)):
        for path in source.iterdir():
            if not (place / path.name).exists() and path.name not in ("benchmark.py", "__pycache__", ".venv", ".git"):
                (place / path.name).symlink_to(path)
    text = (ROOT / "plugins/modules/benchmark.py").read_text()
    (modules / "benchmark.py").write_text(text.replace('\n\nif __name__ == "__main__":\n', LOAD))
    return directory


def run(directory: Path, **variables: Any) -> subprocess.CompletedProcess[str]:
    """The playbook on this machine, which it leaves as it is."""
    seats = {"primary": 4, "secondary": 8, "third": 16}
    here = {
        "ansible_connection": "local",
        "ansible_become": False,
        "ansible_python_interpreter": sys.executable,
        "vllm_device": "cpu",
        "vllm_model_source": "host",
        "vllm_model_directory": "/srv/model",
        "vllm_gateway_enabled": False,
        "vllm_benchmark_directory": str(directory / "benchmarks"),
        "vllm_instances": [
            {"name": name, "port": 8001 + number, "arguments": {"max-num-seqs": count}}
            for number, (name, count) in enumerate(seats.items())
        ],
    }
    (directory / "hosts.yml").write_text(yaml.safe_dump({"vllm": {"hosts": {"here": {**here, **variables}}}}))
    (directory / "results").mkdir()
    return subprocess.run(
        [
            *(Path(sys.executable).parent / "ansible-playbook", "-i", directory / "hosts.yml"),
            *(ROOT / "playbooks/benchmark.yml", "-e", f"__vllm_benchmark_results={directory}/results"),
        ],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(collection(directory / "collections"))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="the module runs as root only")
def test_a_path_that_fails_does_not_take_the_figures_of_the_others_along(tmp_path: Path):
    done = run(tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "benchmark of secondary: no more room" in done.stdout
    found = json.loads((tmp_path / "benchmarks/here/latest.json").read_text())
    # Each engine is loaded up to its own max-num-seqs, all together up to the least of them.
    given = {path["path"]: {one["kv_tokens"] for one in path["engines"].values()} for path in found["paths"]}
    assert given == {"primary": {4}, "third": {16}, "together": {4}}
    assert "4.0x" in done.stdout


def test_an_instance_that_is_called_as_a_path_is_refused(tmp_path: Path):
    done = run(tmp_path, vllm_instances=[{"name": "gateway", "port": 8001}])
    assert done.returncode == 2, done.stdout + done.stderr
    assert "vllm_instances has an instance gateway, which is what the benchmark calls" in " ".join(done.stdout.split())
    assert not (tmp_path / "benchmarks").exists()

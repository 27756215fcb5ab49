"""The module host_preflight on this machine, with stand-ins for nvidia-smi and dpkg-query on PATH."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils._venv import write_marker
from ansible_collections.nvl.vllm.plugins.modules import host_preflight

FIRST, SECOND = "GPU-5d1c1f36-9b2f-4a45-8c0a-3f1e6f0a0001", "GPU-5d1c1f36-9b2f-4a45-8c0a-3f1e6f0a0002"
FAKES = Path(__file__).parents[3] / "fakes"
UNKNOWN_USER = "no-such-user-here"


@pytest.fixture
def server():
    """A program that listens: this one. Its port is ``server``."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@pytest.fixture
def free_ports():
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        ports = [one.getsockname()[1], two.getsockname()[1]]
    return ports


@pytest.fixture
def preflight(tmp_path, monkeypatch, run_module, free_ports):
    """Runs the module; ``program`` writes a stand-in onto its PATH."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(host_preflight.platform, "machine", lambda: "x86_64")
    (tmp_path / "bin").mkdir()

    def program(name, text):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    def run(check_mode=False, ports=free_ports, gpus=([0], [1]), **changes):
        names = ("primary", "secondary")
        options = {
            "device": "cuda",
            "instances": [{"name": n, "port": p, "gpus": g} for n, p, g in zip(names, ports, gpus, strict=True)],
            "user": UNKNOWN_USER,
            "python": sys.executable,
            "release": str(tmp_path / "opt/vllm/0.32.0"),
            "required_space": 1,
        }
        return run_module(host_preflight.main, check_mode=check_mode, **{**options, **changes})

    program("dpkg-query", "exit 0")
    program("nvidia-smi", f'exec {sys.executable} {FAKES}/nvidia-smi "$@"')
    monkeypatch.setenv("NVIDIA_SMI_STATE", "idle")
    run.program, run.folder = program, tmp_path
    return run


def only_error(result):
    """The one thing that the module found."""
    assert result["failed"] is True
    (error,) = result["errors"]
    assert result["msg"] == f"{socket.gethostname()}: {error}"
    return error


def test_a_host_that_fits(preflight):
    result = preflight()
    assert "failed" not in result
    assert result["changed"] is False
    assert result["gpus"] == {"primary": [FIRST], "secondary": [SECOND]}
    assert result["gpu_problem"] == ""


def test_on_cpu_no_gpu_is_looked_for(preflight):
    preflight.program("nvidia-smi", "exit 9")
    result = preflight(device="cpu", gpus=([], []))
    assert "failed" not in result
    assert result["gpus"] == {}


def test_a_port_that_is_taken_is_told(preflight, server, free_ports):
    error = only_error(preflight(ports=[server, free_ports[1]]))
    assert error.startswith(f"port {server} of instance primary is taken by ")
    assert f"(process {os.getpid()}" in error


def test_a_gpu_that_is_not_there_is_told(preflight):
    assert only_error(preflight(gpus=([0], [2]))) == (
        f"GPU 2 of instance secondary is not there: the host has 0 ({FIRST}), 1 ({SECOND})"
    )


def test_a_host_without_driver_fails_but_in_check_mode_says_so(preflight):
    (preflight.folder / "bin/nvidia-smi").unlink()
    problem = "nvidia-smi is not there: install the NVIDIA driver"
    assert only_error(preflight()) == problem
    result = preflight(check_mode=True)
    assert "failed" not in result
    assert (result["gpus"], result["gpu_problem"]) == ({}, problem)


def test_too_little_space_is_told_with_figures(preflight):
    error = only_error(preflight(required_space=2**40))
    release = f"{preflight.folder}/opt/vllm/0.32.0"
    assert error.startswith(f"{release} ({2**40} MiB) needs {2**40} MiB of free disk space, and the file system /")
    assert error.endswith("or set vllm_root to a directory on a larger file system")


def test_the_checkpoint_needs_space_on_top_unless_it_is_there(preflight):
    folder = preflight.folder / "models"
    model = {"root": str(folder), "path": str(folder / "r1"), "required_space": 2**40}
    error = only_error(preflight(model=model, required_space=2**40))
    assert error.startswith(
        f"{preflight.folder}/opt/vllm/0.32.0 ({2**40} MiB) and {folder}/r1 ({2**40} MiB) need {2**41} MiB"
    )
    assert "set vllm_root or vllm_model_root to" in error
    (folder / "r1").mkdir(parents=True)
    assert "failed" not in preflight(model=model)


def test_what_an_interrupted_run_left_of_the_checkpoint_counts(preflight):
    staging = preflight.folder / "models/.staging/r1"
    staging.mkdir(parents=True)
    (staging / "shard").write_bytes(b"x" * 2**21)
    model = {"root": str(preflight.folder / "models"), "path": str(preflight.folder / "models/r1")}
    error = only_error(preflight(model={**model, "required_space": 2**40}))
    assert f"({2**40 - 2} MiB)" in error


def test_a_checkpoint_that_is_used_in_place_must_be_there_and_needs_no_space(preflight):
    folder = preflight.folder / "mnt"
    model = {"source": "host", "root": "", "path": str(folder), "required_space": 2**40}
    assert only_error(preflight(model=model)).startswith(
        f"vllm_model_directory is {folder}, which is no checkpoint: it holds no config.json."
    )
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert "failed" not in preflight(model=model)


def test_a_complete_release_needs_no_space(preflight):
    write_marker(str(preflight.folder / "opt/vllm/0.32.0"), {"version": "0.32.0"})
    assert "failed" not in preflight(required_space=2**40)


def test_an_interpreter_that_is_not_there_is_told(preflight):
    assert only_error(preflight(python="/nowhere/python3")) == (
        "vllm_python is /nowhere/python3, which is not there: wanted 3.11, 3.12 or 3.13"
    )


def test_an_interpreter_that_is_too_old_is_told(preflight):
    preflight.program("python3.9", "echo 3.9.2")
    assert "is Python 3.9.2: wanted 3.11" in only_error(preflight(python=str(preflight.folder / "bin/python3.9")))


def test_all_findings_are_told_at_once(preflight, monkeypatch, server, free_ports):
    monkeypatch.setattr(host_preflight.platform, "machine", lambda: "aarch64")
    (preflight.folder / "bin/dpkg-query").unlink()
    result = preflight(ports=[server, free_ports[1]], gpus=([0], [7]), required_space=2**40, python="/nowhere/python3")
    assert [error.split()[0] for error in result["errors"]] == [
        "this",
        "the",
        "vllm_python",
        str(preflight.folder / "opt/vllm/0.32.0"),
        "port",
        "GPU",
    ]
    assert result["msg"].count(f"{socket.gethostname()}: ") == 6


def test_what_the_plan_needs_is_returned(preflight):
    result = preflight()
    assert [(one["index"], one["name"], one["total_mib"]) for one in result["devices"]] == [
        (0, "NVIDIA H100 NVL", 95830),
        (1, "NVIDIA H100 NVL", 95830),
    ]
    assert (result["checkpoint"], result["calibration"]) == ({}, {})
    on_cpu = preflight(device="cpu", gpus=([], []))
    (memory,) = on_cpu["devices"]
    assert memory["name"] == "CPU"
    assert memory["total_mib"] > 0


def test_gpus_that_are_missing_leave_nothing_to_plan(preflight):
    assert preflight(gpus=([0], [2]), fail=False)["devices"] == []


def test_a_sick_gpu_is_an_error_unless_the_operator_says_otherwise(preflight, monkeypatch):
    monkeypatch.setenv("NVIDIA_SMI_STATE", "mig")
    assert "MIG" in only_error(preflight())
    result = preflight(severities={"mig_enabled": "warning"})
    assert "failed" not in result
    assert ("mig_enabled", "warning") in {(one["rule"], one["severity"]) for one in result["findings"]}


def test_trouble_of_a_gpu_that_nobody_uses_is_a_warning(preflight, monkeypatch):
    monkeypatch.setenv("NVIDIA_SMI_STATE", "mig")  # of GPU 0
    result = preflight(gpus=([1], [1]))
    assert "failed" not in result
    assert ("mig_enabled", "warning") in {(one["rule"], one["severity"]) for one in result["findings"]}


def test_a_severity_that_is_none_is_refused(preflight):
    assert "mig_enabled" in preflight(severities={"mig_enable": "warning"})["msg"]


def test_findings_are_returned_where_they_shall_not_fail(preflight):
    result = preflight(required_space=2**40, fail=False)
    assert "failed" not in result
    assert len(result["errors"]) == 1

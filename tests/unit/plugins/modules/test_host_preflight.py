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


@pytest.fixture
def bus(tmp_path):
    """Writes a stand-in for /sys that shows GPUs by their PCI device ids, and returns its path."""

    def write(*devices):
        for number, device in enumerate(devices):
            folder = tmp_path / f"sys/bus/pci/devices/0000:{0xAD + number:x}:00.0"
            folder.mkdir(parents=True)
            for name, value in (("vendor", "0x10de"), ("device", f"0x{device}"), ("class", "0x030200")):
                (folder / name).write_text(f"{value}\n")
        return str(tmp_path / "sys")

    return write


def notes(result):
    return [one["sentence"] for one in result["findings"] if one["severity"] == "note"]


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


# Before role cuda has installed the driver


@pytest.mark.parametrize("check_mode", [False, True])
def test_a_host_without_driver_is_planned_from_the_pci_bus_where_role_cuda_will_install_it(preflight, bus, check_mode):
    (preflight.folder / "bin/nvidia-smi").unlink()
    result = preflight(check_mode=check_mode, driver_managed=True, sys=bus("2321", "2321"), version="0.32.0")
    assert "failed" not in result
    assert (result["provisional"], result["gpus"], result["errors"]) == (True, {}, [])
    assert result["gpu_problem"] == "nvidia-smi is not there: install the NVIDIA driver"
    assert [(one["index"], one["total_mib"], one["free_mib"]) for one in result["devices"]] == [
        (0, 95830, -1),
        (1, 95830, -1),
    ]
    assert {one["severity"] for one in result["findings"]} == {"note"}
    told, seen = notes(result)
    assert told == "nvidia-smi is not there: install the NVIDIA driver (role cuda sees to it)"
    assert seen.startswith("the GPUs are taken from the PCI bus, before the driver is installed: 0 ")


def test_without_role_cuda_the_bus_is_not_looked_at(preflight, bus):
    (preflight.folder / "bin/nvidia-smi").unlink()
    result = preflight(sys=bus("2321", "2321"), fail=False)
    assert (result["provisional"], result["devices"]) == (False, [])
    assert result["errors"] == ["nvidia-smi is not there: install the NVIDIA driver"]


@pytest.mark.parametrize("check_mode", [False, True])
def test_a_host_without_a_gpu_is_an_error_before_any_driver_is_installed(preflight, check_mode):
    (preflight.folder / "bin/nvidia-smi").unlink()
    result = preflight(check_mode=check_mode, driver_managed=True, sys=str(preflight.folder / "sys"))
    assert only_error(result).startswith("vllm_device is cuda, and the host has no NVIDIA GPU on its PCI bus: ")
    assert result["devices"] == []


def test_a_declared_gpu_must_be_on_the_bus(preflight, bus):
    (preflight.folder / "bin/nvidia-smi").unlink()
    error = only_error(preflight(driver_managed=True, sys=bus("2321")))
    assert error == "GPU 1 of instance secondary is not there: the host has 0 (0000:ad:00.0)"


def test_a_gpu_that_is_declared_by_uuid_waits_for_the_driver(preflight, bus):
    (preflight.folder / "bin/nvidia-smi").unlink()
    result = preflight(driver_managed=True, sys=bus("2321", "2321"), gpus=([0], [SECOND]))
    assert "failed" not in result
    assert result["devices"] == []
    assert any(SECOND in sentence for sentence in notes(result))


def test_a_driver_that_answers_is_asked_also_where_role_cuda_will_change_it(preflight, bus, monkeypatch):
    monkeypatch.setenv("NVIDIA_SMI_STATE", "driver535")
    assert "CUDA 13.0, which wants driver 580.65.06 or newer" in only_error(preflight(version="0.32.0"))
    result = preflight(driver_managed=True, sys=bus("2321"), version="0.32.0")
    assert "failed" not in result
    assert (result["provisional"], result["gpus"]) == (False, {"primary": [FIRST], "secondary": [SECOND]})
    (told,) = [one for one in result["findings"] if one["rule"] == "driver_too_old"]
    assert told["severity"] == "note"
    assert told["sentence"].endswith(" (role cuda sees to it)")


def test_mig_is_left_to_role_cuda(preflight, monkeypatch):
    monkeypatch.setenv("NVIDIA_SMI_STATE", "mig")
    result = preflight(driver_managed=True)
    assert "failed" not in result
    assert ("mig_enabled", "note") in {(one["rule"], one["severity"]) for one in result["findings"]}


@pytest.mark.parametrize("check_mode", [False, True])
def test_a_driver_that_hangs_is_an_error_also_where_role_cuda_will_change_it(preflight, bus, check_mode):
    preflight.program("nvidia-smi", f"exec {sys.executable} -c 'import time; time.sleep(20)'")
    result = preflight(check_mode=check_mode, driver_managed=True, sys=bus("2321", "2321"), timeout=0.3)
    assert "did not answer within 0.3 s" in only_error(result)
    assert result["provisional"] is False


def test_the_oldest_driver_follows_from_the_version_unless_it_is_given(preflight, monkeypatch):
    monkeypatch.setenv("NVIDIA_SMI_STATE", "driver535")
    assert "failed" not in preflight()
    assert "failed" not in preflight(version="0.19.1")
    assert "failed" not in preflight(version="0.32.0", min_driver="535")
    assert "wants 580 or newer" in only_error(preflight(version="0.19.1", min_driver="580"))


def test_a_vllm_that_is_too_old_to_be_known_wants_a_decision(preflight):
    assert only_error(preflight(version="0.9.2")).endswith(
        "deploy 0.10.0 or newer, or set gpu_preflight_min_driver to the oldest driver that it runs on"
    )
    assert "failed" not in preflight(version="0.9.2", min_driver="535")
    assert "failed" not in preflight(version="0.9.2", device="cpu", gpus=([], []))


def test_an_oldest_driver_that_is_no_version_is_refused(preflight):
    assert preflight(min_driver="latest")["msg"] == (
        "gpu_preflight_min_driver cannot be read: the version is 'latest': wanted numbers with dots between them, such "
        "as 580.95.05"
    )

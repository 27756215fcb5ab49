"""The module gpu_info on this machine, with the stand-in for nvidia-smi on PATH."""

from __future__ import annotations

import dataclasses
import getpass
import os
import socket
from pathlib import Path

import pytest
import yaml
from ansible_collections.nvl.vllm.plugins.module_utils import _gpu_health, _gpu_info
from ansible_collections.nvl.vllm.plugins.modules import gpu_info

FAKES = Path(__file__).parents[3] / "fakes"


@pytest.fixture
def info(tmp_path, monkeypatch, run_module):
    """Runs the module on a host in a given state of the stand-in. The kernel log of this machine is left alone."""
    (tmp_path / "bin").mkdir()
    for name in ("journalctl", "dmesg"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\necho 2026-11-23T17:00:01+0000 gpu1 kernel: Linux\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{FAKES}:{os.environ['PATH']}")
    monkeypatch.setattr(_gpu_info, "ASK_MODULE", ["cat", f"{tmp_path}/version"])
    monkeypatch.setattr(_gpu_info, "ASK_ADDRESSES", ["ls", f"{tmp_path}/gpus"])

    def run(state, check_mode=False, **options):
        monkeypatch.setenv("NVIDIA_SMI_STATE", state)
        return run_module(gpu_info.main, check_mode=check_mode, **options)

    return run


def rules(result):
    return [finding["rule"] for finding in result["findings"]]


@pytest.mark.parametrize("check_mode", [False, True])
def test_a_healthy_host(info, check_mode):
    result = info("idle", check_mode=check_mode, min_driver="580", fail=True)
    assert "failed" not in result
    assert (result["changed"], result["findings"], result["problem"]) == (False, [], "")
    assert [gpu["total_mib"] for gpu in result["gpus"]] == [95830, 95830]
    assert result["host"]["topology"]["GPU0"] == {"GPU1": "NV12"}
    assert result["host"]["kernel_log"] == "journal"


def test_findings_alone_do_not_fail(info):
    result = info("driver535", min_driver="580")
    assert "failed" not in result
    assert rules(result) == ["driver_too_old"]


def test_with_fail_all_errors_are_told_at_once_and_the_facts_are_there(info):
    result = info("busy driver=575.57.08", min_driver="580", fail=True, own_user="no-such-user-here")
    assert result["failed"] is True
    host = socket.gethostname()
    first, second = result["msg"].splitlines()
    assert first.startswith(f"{host}: the NVIDIA driver is 575.57.08, and the vLLM to be deployed wants 580 or newer")
    assert second.startswith(f"{host}: GPU 0 (00000000:AD:00.0): process 4242 (/opt/train/bin/python3, ")
    assert len(result["gpus"]) == 2


def test_warnings_never_fail(info):
    result = info("persistence_off", fail=True)
    assert "failed" not in result
    assert rules(result) == ["persistence_off"] * 2


def test_severities_decide_what_fails(info):
    assert info("persistence_off", fail=True, severities={"persistence_off": "error"})["failed"] is True
    assert info("mig", fail=True, severities={"mig_enabled": "ignore"})["findings"] == []


def test_unknown_severities_are_refused(info):
    result = info("idle", severities={"mig_enable": "ignore", "ecc_off": "fatal"})
    assert result["failed"] is True
    assert result["msg"].splitlines() == [
        "severities names mig_enable, which is no rule; did you mean mig_enabled?",
        "severities.ecc_off is fatal: wanted error, warning, note, ignore",
    ]


def test_our_own_engine_is_told_by_its_user(info):
    state = f"busy pid={os.getpid()}"
    assert rules(info(state, own_user="no-such-user-here")) == ["foreign_process"]
    assert rules(info(state, own_user=getpass.getuser())) == []
    assert rules(info(state, own_user="no-such-user-here", own_pids=[os.getpid()])) == []
    assert rules(info(state, own_user="no-such-user-here", foreign_mib=80000)) == []


def test_a_driver_that_hangs_is_told_in_time(info):
    result = info("hang", timeout=0.5, fail=True)
    assert result["failed"] is True
    assert result["problem"].startswith("nvidia-smi did not answer within 0.5 s")
    assert result["gpus"] == []


def test_a_timeout_of_nothing_is_refused(info):
    assert info("idle", timeout=0)["msg"] == "timeout is 0 s: wanted more than 0"


def test_a_host_without_driver(info, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    result = info("idle", fail=True)
    assert result["msg"] == f"{socket.gethostname()}: nvidia-smi is not there: install the NVIDIA driver"


# Documentation


def test_documentation_equals_argument_spec(monkeypatch):
    caught = {}

    class Module:
        def __init__(self, argument_spec, supports_check_mode):
            caught.update(argument_spec)
            assert supports_check_mode
            raise InterruptedError

    monkeypatch.setattr(gpu_info, "AnsibleModule", Module)
    with pytest.raises(InterruptedError):
        gpu_info.main()
    documented = yaml.safe_load(gpu_info.DOCUMENTATION)["options"]
    keys = ("type", "elements", "default", "required")
    assert {name: {key: option[key] for key in keys if key in option} for name, option in documented.items()} == caught


def test_everything_that_is_returned_is_documented():
    returned = yaml.safe_load(gpu_info.RETURN)

    def names(kind):
        return {field.name for field in dataclasses.fields(kind)}

    gpus = returned["gpus"]["contains"]
    assert set(gpus) == names(_gpu_info.Gpu)
    assert set(gpus["processes"]["contains"]) == names(_gpu_info.Process)
    assert set(gpus["xids"]["contains"]) == names(_gpu_info.Xid)
    assert set(returned["host"]["contains"]) == names(_gpu_info.Host)
    assert set(returned["findings"]["contains"]) == set(_gpu_health.Finding._fields)


def test_the_defaults_of_all_rules_are_documented():
    text = " ".join(yaml.safe_load(gpu_info.DOCUMENTATION)["options"]["severities"]["description"])
    for rule, severity in _gpu_health.RULES.items():
        heading = {"error": "Errors", "warning": "Warnings", "note": "Notes"}[severity]
        before = text[: text.index(f"V({rule})")]
        assert max(("Errors", "Warnings", "Notes"), key=before.rfind) == heading, rule


def test_examples_use_documented_options():
    options = yaml.safe_load(gpu_info.DOCUMENTATION)["options"]
    for task in yaml.safe_load(gpu_info.EXAMPLES):
        arguments = task["nvl.vllm.gpu_info"] or {}
        assert set(arguments) <= set(options)
        assert _gpu_health.severity_complaints(arguments.get("severities", {})) == []

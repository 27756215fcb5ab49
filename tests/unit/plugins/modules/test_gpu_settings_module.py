"""The module gpu_settings on this machine, with stand-ins for nvidia-smi on PATH."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import sys
from pathlib import Path

import pytest
import yaml
from ansible_collections.nvl.vllm.plugins.module_utils import _gpu_info, _gpu_settings
from ansible_collections.nvl.vllm.plugins.modules import gpu_settings

FAKES = Path(__file__).parents[3] / "fakes"
FIRST_UUID, SECOND_UUID = (f"GPU-5d1c1f36-9b2f-4a45-8c0a-3f1e6f0a000{n}" for n in (1, 2))
FIRST = "GPU 0 (00000000:AD:00.0)"
WELL = {
    "persistence_mode": "Enabled",
    "mig.mode.current": "Disabled",
    "mig.mode.pending": "Disabled",
    "compute_mode": "Default",
    "power.limit": "400.00",
    "power.default_limit": "400.00",
    "power.min_limit": "200.00",
    "power.max_limit": "400.00",
}
#: Settings are its own, in a file; all other questions go to the larger stand-in.
STAND_IN = f"""\
#!{sys.executable}
# A stand-in for nvidia-smi, for tests.
import json, os, sys, time
argv, path = sys.argv[1:], os.environ["STAND_IN_SETTINGS"]
state = json.load(open(path))
if argv[0].startswith("--id=") and argv[1].startswith("--query-gpu=uuid,"):
    for uuid in argv[0][5:].split(","):
        row = {{"uuid": uuid, **state["gpus"][uuid]}}
        print(", ".join(row[name] for name in argv[1].partition("=")[2].split(",")))
elif argv[0] == "-i":
    state["told"].append(argv)
    row, value = state["gpus"][argv[1]], argv[3]
    if state.get("hangs") == argv[2]:
        time.sleep(60)
    if argv[2] == "-pm":
        row["persistence_mode"] = ["Disabled", "Enabled"][int(value)]
    elif argv[2] == "-mig":
        row["mig.mode.current"] = row["mig.mode.pending"] = "Disabled"
    elif argv[2] == "-c":
        row["compute_mode"] = {{"0": "Default", "3": "Exclusive_Process"}}[value]
    elif state.get("power") != "ignored":
        row["power.limit"] = f"{{float(value):.2f}}"
    with open(path, "w") as stream:
        json.dump(state, stream)
    print("All done.")
else:
    os.execv({str(FAKES / "nvidia-smi")!r}, ["nvidia-smi", *argv])
"""


class Host:
    """A host whose first GPU has other settings than a healthy one."""

    def __init__(self, path, run):
        self.path, self.run = path, run
        self.has()

    def has(self, first=None, **more):
        gpus = {FIRST_UUID: {**WELL, **(first or {})}, SECOND_UUID: dict(WELL)}
        self.path.write_text(json.dumps({"gpus": gpus, "told": [], **more}))

    @property
    def told(self):
        return json.loads(self.path.read_text())["told"]


@pytest.fixture
def host(tmp_path, monkeypatch, run_module):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("journalctl", "dmesg"):
        (folder / name).write_text("#!/bin/sh\necho 2026-11-23T17:00:01+0000 gpu1 kernel: Linux\n")
        (folder / name).chmod(0o755)
    (folder / "nvidia-smi").write_text(STAND_IN)
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("NVIDIA_SMI_STATE", "idle")
    monkeypatch.setenv("STAND_IN_SETTINGS", str(tmp_path / "settings.json"))
    monkeypatch.setattr(_gpu_info, "ASK_MODULE", ["cat", f"{tmp_path}/version"])
    monkeypatch.setattr(_gpu_info, "ASK_ADDRESSES", ["ls", f"{tmp_path}/gpus"])

    def run(check_mode=False, **options):
        return run_module(gpu_settings.main, check_mode=check_mode, **options)

    return Host(tmp_path / "settings.json", run)


def test_a_host_that_is_as_wanted(host):
    result = host.run()
    assert "failed" not in result
    assert (result["changed"], result["changes"], result["notes"]) == (False, [], [])
    assert [gpu["power_limit_w"] for gpu in result["gpus"]] == [400.0, 400.0]
    assert result["diff"]["before"] == result["diff"]["after"]
    assert [each[1:] for each in result["commands"]] == [
        ["-i", uuid, *options]
        for uuid in (FIRST_UUID, SECOND_UUID)
        for options in (["-mig", "0"], ["-pm", "1"], ["-c", "0"], ["-pl", "400"])
    ]
    assert host.told == []


def test_the_commands_that_it_returns_change_nothing_on_a_host_that_is_as_wanted(host):
    for argv in host.run(power_limit="350")["commands"]:
        status, _, _ = _gpu_info.run_command(argv, 20.0)
        assert status == 0
    assert host.run(power_limit="350")["changed"] is False


def test_differences_are_changed_once(host):
    host.has({"persistence_mode": "Disabled", "compute_mode": "Prohibited"})
    result = host.run()
    assert result["changed"] is True
    assert host.told == [["-i", FIRST_UUID, "-pm", "1"], ["-i", FIRST_UUID, "-c", "0"]]
    assert result["changes"][0] == {
        "gpu": FIRST,
        "uuid": FIRST_UUID,
        "setting": "persistence",
        "before": "Disabled",
        "after": "Enabled",
        "argv": ["nvidia-smi", "-i", FIRST_UUID, "-pm", "1"],
    }
    assert f"{FIRST}: persistence_mode Disabled\n" in result["diff"]["before"]
    assert f"{FIRST}: persistence_mode Enabled\n" in result["diff"]["after"]
    assert host.run()["changed"] is False


def test_check_mode_tells_the_same_and_changes_nothing(host):
    first = {"persistence_mode": "Disabled", "mig.mode.current": "Enabled", "mig.mode.pending": "Enabled"}
    host.has(first)
    check = host.run(check_mode=True, power_limit=300)
    assert host.told == []
    real = host.run(power_limit=300)
    assert len(host.told) == 4
    for key in ("changed", "diff", "gpus", "commands"):
        assert check[key] == real[key]
    assert sorted(each["argv"] for each in check["changes"]) == sorted(each["argv"] for each in real["changes"])


def test_only_the_chosen_gpu(host):
    result = host.run(gpus=[1], power_limit=300, mig=False)
    assert host.told == [["-i", SECOND_UUID, "-pl", "300"]]
    assert [gpu["index"] for gpu in result["gpus"]] == [1]


def test_nothing_is_changed_where_one_value_cannot_be_had(host):
    host.has({"persistence_mode": "Disabled"})
    result = host.run(power_limit=450, variable_prefix="cuda_")
    assert (result["failed"], result["changed"]) == (True, False)
    name = socket.gethostname()
    assert result["msg"].splitlines()[0] == (
        f"{name}: cuda_power_limit is 450 W, and {FIRST} takes 200 to 400 W: set cuda_power_limit to a value in this "
        "range or to default"
    )
    assert len(result["msg"].splitlines()) == 2
    assert host.told == []


def test_the_read_back_decides(host):
    host.has({"persistence_mode": "Disabled"}, power="ignored")
    result = host.run(power_limit=300, gpus=[0], variable_prefix="cuda_")
    assert (result["failed"], result["changed"]) == (True, True)
    assert [each["setting"] for each in result["changes"]] == ["persistence", "power_limit"]
    (line,) = result["msg"].splitlines()
    assert f": cuda_power_limit did not take on {FIRST}: wanted 300.00 W, and it is 400.00 W; " in line
    assert result["gpus"][0]["persistence_mode"] == "Enabled"


def test_a_command_that_hangs(host):
    host.has({"persistence_mode": "Disabled", "power.limit": "310.00"}, hangs="-pm")
    result = host.run(timeout=1.5)
    assert (result["failed"], result["changed"]) == (True, True)
    assert "nvidia-smi did not answer within 1.5 s" in result["msg"]
    assert [each["setting"] for each in result["changes"]] == ["persistence"]


def test_mig_is_not_changed_under_a_process(host, monkeypatch):
    monkeypatch.setenv("NVIDIA_SMI_STATE", "busy")
    host.has({"mig.mode.current": "Enabled", "mig.mode.pending": "Enabled"})
    result = host.run()
    assert "end 4242 (/opt/train/bin/python3), and run this again" in result["msg"]
    assert host.told == []
    assert host.run(mig="leave")["changed"] is False


@pytest.mark.parametrize(
    ("state", "options", "words"),
    [
        ("not_loaded", {}, "the NVIDIA driver is not loaded"),
        ("lost", {}, "GPU 1 (00000000:AE:00.0) is lost"),
        ("idle", {"gpus": ["7"], "variable_prefix": "cuda_"}, "cuda_gpus names 7, and the host has 0 (GPU-5d1c1f36"),
        ("idle", {"power_limit": "low"}, "power_limit is low: wanted a number of watts"),
        ("idle", {"timeout": 0, "variable_prefix": "cuda_"}, "cuda_timeout is 0 s: wanted more than 0"),
    ],
)
def test_what_is_refused(host, monkeypatch, state, options, words):
    monkeypatch.setenv("NVIDIA_SMI_STATE", state)
    result = host.run(**options)
    assert (result["failed"], result["changed"], result["changes"]) == (True, False, [])
    assert f"{socket.gethostname()}: {words}" in result["msg"]
    assert host.told == []


def test_the_healthy_gpu_beside_a_lost_one_can_be_set(host, monkeypatch):
    monkeypatch.setenv("NVIDIA_SMI_STATE", "lost")
    result = host.run(gpus=[0], power_limit=300)
    assert "failed" not in result
    assert host.told == [["-i", FIRST_UUID, "-pl", "300"]]


def test_the_documented_options_are_those_of_the_module(monkeypatch):
    caught = {}

    class Module:
        def __init__(self, argument_spec, supports_check_mode):
            caught.update(argument_spec)
            assert supports_check_mode
            raise InterruptedError

    monkeypatch.setattr(gpu_settings, "AnsibleModule", Module)
    with pytest.raises(InterruptedError):
        gpu_settings.main()
    documented = yaml.safe_load(gpu_settings.DOCUMENTATION)["options"]
    keys = ("type", "elements", "choices", "default", "required")
    assert {name: {key: option[key] for key in keys if key in option} for name, option in documented.items()} == caught


def test_everything_that_is_returned_is_documented(host):
    returned = yaml.safe_load(gpu_settings.RETURN)
    assert set(returned["gpus"]["contains"]) == {each.name for each in dataclasses.fields(_gpu_settings.Settings)}
    assert set(returned["changes"]["contains"]) == set(_gpu_settings.Change._fields)
    assert set(returned) | {"changed", "diff", "invocation"} == set(host.run())

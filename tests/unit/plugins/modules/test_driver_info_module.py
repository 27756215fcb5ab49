"""The module driver_info on a host that the test writes, with stand-ins for dpkg-query and modinfo on PATH."""

from __future__ import annotations

import functools
import os
import socket

import pytest
import yaml
from ansible_collections.nvl.vllm.plugins.module_utils import _driver
from ansible_collections.nvl.vllm.plugins.modules import driver_info

VERSION = "580.95.05"
REPOSITORY = "https://developer.download.nvidia.com/compute/cuda/repos/debian12/x86_64/"


@pytest.fixture
def info(tmp_path, monkeypatch, run_module):
    """Runs the module on a host with two H100 NVL, driver 570.26 loaded and in use, and 580.95.05 on disk."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(_driver, "Paths", functools.partial(_driver.Paths, root=str(tmp_path / "root")))

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    for address in ("0000:ae:00.0", "0000:ad:00.0"):
        for name, value in {"vendor": "0x10de", "device": "0x2321", "class": "0x030200"}.items():
            write(f"sys/bus/pci/devices/{address}/{name}", value + "\n")
    write("sys/module/nvidia/version", "570.26\n")
    for pid, unit in {500: "vllm@primary.service", 501: "other.service"}.items():
        write(f"proc/{pid}/comm", "python3\n")
        write(f"proc/{pid}/cgroup", f"0::/system.slice/{unit}\n")
        (tmp_path / f"proc/{pid}/fd").mkdir()
        (tmp_path / f"proc/{pid}/fd/0").symlink_to("/dev/nvidia0")
    write("apt/sources.list.d/nvidia-cuda.sources", f"Types: deb\nURIs: {REPOSITORY}\nSuites: /\n")
    write("bin/modinfo", f"#!/bin/sh\necho {VERSION}\n")
    rows = [["libcuda1", "hold"], ["libnvidia-ml1", "install"]]
    lines = "".join(f"{name}\\tamd64\\t{VERSION}-1\\t{want}\\tinstalled\\tok\\n" for name, want in rows)
    write("bin/dpkg-query", f"#!/bin/sh\nprintf '{lines}'\n")

    def run(check_mode=False, **changes):
        options = {
            "version": VERSION,
            "repository": REPOSITORY,
            "own_source": f"{tmp_path}/apt/sources.list.d/nvidia-cuda.sources",
            **{name: str(tmp_path / name) for name in ("sys", "proc", "apt")},
        }
        return run_module(driver_info.main, check_mode=check_mode, **{**options, **changes})

    run.write = write
    return run


@pytest.mark.parametrize("check_mode", [False, True])
def test_what_is_told(info, check_mode):
    result = info(check_mode=check_mode)
    assert "failed" not in result
    assert result["changed"] is False
    assert [gpu["address"] for gpu in result["gpus"]] == ["0000:ad:00.0", "0000:ae:00.0"]
    assert result["gpus"][0] == {"address": "0000:ad:00.0", "device": "2321", "name": "NVIDIA H100 NVL"}
    release = os.uname().release
    expected = {"release": release, "headers": False, "container": "", "header_packages": [f"linux-headers-{release}"]}
    assert result["kernel"] == expected
    assert (result["loaded"], result["on_disk"], result["nouveau"]) == ("570.26", VERSION, False)
    assert result["packages"][1] == {
        "name": "libnvidia-ml1",
        "version": f"{VERSION}-1",
        "held": False,
        "broken": False,
        "origins": [],
    }
    assert result["mok"] == {"path": "/var/lib/dkms/mok.pub", "state": "no key"}
    assert result["holds_missing"] == ["libnvidia-ml1"]
    assert result["engines_in_use"] == ["vllm@primary.service"]
    assert result["users"][1] == {"pid": 501, "name": "python3", "unit": "other.service"}
    assert (result["sources"], result["own_uris"], result["errors"]) == ([], [REPOSITORY], [])
    assert result["activation"]["step"] == "wait"
    assert "vllm@primary.service and by python3 (process 501, other.service)" in result["activation"]["reason"]
    assert len(result["notes"]) == 1


def test_all_that_is_returned_is_documented(info):
    documented = yaml.safe_load(driver_info.RETURN)
    result = info()
    assert set(result) - {"changed", "invocation"} == set(documented)
    for name in ("kernel", "mok", "activation"):
        assert set(result[name]) == set(documented[name]["contains"])
    for name in ("packages", "gpus", "users"):
        assert set(result[name][0]) == set(documented[name]["contains"])


def test_errors_do_not_fail_the_module(info):
    info.write("root/usr/bin/nvidia-uninstall", "")
    info.write("bin/dpkg-query", "#!/bin/sh\n[ $1 = -S ] && exit 1\nexit 0\n")
    result = info(sys="/nowhere")
    assert "failed" not in result
    assert [error.split()[0] for error in result["errors"]] == ["vllm_device", "/usr/bin/nvidia-uninstall"]


def test_without_the_name_of_its_own_file_the_entry_is_a_clash(info):
    result = info(own_source="")
    (error,) = result["errors"]
    assert "nvidia-cuda.sources names the repository" in error
    assert result["sources"][0]["uri"] == REPOSITORY


def test_the_options_reach_what_they_are_for(info):
    result = info(version="", engine_units="other.*")
    assert (result["errors"], result["holds_missing"], result["activation"]["step"]) == ([], [], "none")
    assert result["engines_in_use"] == ["other.service"]


def test_a_version_that_is_none_is_refused(info):
    result = info(version="580")
    assert result["failed"] is True
    assert result["msg"].startswith("cuda_driver_version is '580', ")


def test_a_deadline_of_nothing_is_refused(info):
    assert info(timeout=0)["msg"] == "timeout is 0 s: wanted more than 0"


def test_a_host_that_cannot_be_asked_fails_with_its_name(info):
    info.write("bin/modinfo", "#!/bin/sh\nexec /bin/sleep 60\n")
    result = info(timeout=0.2)
    assert result["failed"] is True
    assert result["msg"].startswith(f"{socket.gethostname()}: modinfo did not answer within 0.2 s: ")

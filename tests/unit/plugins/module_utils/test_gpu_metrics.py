"""The figures of GPUs under dcgm-exporter's names, from the stand-in for nvidia-smi."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _gpu_info, _gpu_metrics
from ansible_collections.nvl.vllm.plugins.module_utils._gpu_metrics import METRICS, ask, page

STAND_IN = Path(__file__).parents[3] / "fakes/nvidia-smi"
XID = "2026-11-24T01:0{}:00+00:00 h kernel: NVRM: Xid (PCI:0000:ad:00): {}, pid=1, text\n"


def runner(state: str, log: str = "2026-11-24T01:00:00+00:00 h kernel: well\n"):
    def run(argv: list[str], timeout: float) -> tuple[int, str, str]:
        if argv[0] == "journalctl":
            return 0, log, ""
        if argv[0] != "nvidia-smi":
            return 1, "", "no such file"
        environment = {**os.environ, "NVIDIA_SMI_STATE": state}
        done = subprocess.run(
            [str(STAND_IN), *argv[1:]], capture_output=True, text=True, env=environment, timeout=timeout, check=False
        )
        return done.returncode, done.stdout, done.stderr

    return run


def figures(state: str, **more: str) -> dict[tuple[str, str], float]:
    """All samples, by name without its prefix and index of the GPU."""
    run = runner(state, **more)
    text = page(_gpu_info.read(run, 20), ask(run, 20), "h1")
    found = re.findall(r'^DCGM_FI_DEV_(\w+)\{gpu="(\d*)".*\} (\S+)$', text, re.MULTILINE)
    return {(name, gpu): float(value) for name, gpu, value in found}


def test_a_healthy_gpu():
    found = figures("idle")
    assert {gpu for _, gpu in found} == {"0", "1"}
    wanted = {
        "GPU_UTIL": 0,
        "FB_USED": 0,
        "FB_FREE": 95235,
        "POWER_USAGE": 61.62,
        "POWER_MGMT_LIMIT": 400,
        "GPU_TEMP": 32,
    }
    wanted |= {"SM_CLOCK": 345, "XID_ERRORS": 0, "ECC_DBE_VOL_TOTAL": 0, "ROW_REMAP_PENDING": 0, "ROW_REMAP_FAILURE": 0}
    assert {name: found[name, "0"] for name in wanted} == wanted
    assert found["CLOCKS_EVENT_REASONS", "0"] == _gpu_metrics.REASONS["gpu_idle"]


@pytest.mark.parametrize(
    ("state", "name", "gpu", "value"),
    [
        ("busy", "GPU_UTIL", "0", 97),
        ("ecc_errors", "ECC_DBE_VOL_TOTAL", "0", 2),
        ("remap_pending", "ROW_REMAP_PENDING", "1", 1),
        ("remap_failure", "ROW_REMAP_FAILURE", "1", 1),
        ("power_cap", "POWER_MGMT_LIMIT", "0", 310),
        ("throttling", "CLOCKS_EVENT_REASONS", "0", 8 + 64),
        ("power_capped", "CLOCKS_EVENT_REASONS", "0", 4),
    ],
)
def test_what_is_wrong_is_told(state, name, gpu, value):
    assert figures(state)[name, gpu] == value
    assert figures("idle")[name, gpu] != value


def test_what_is_not_known_has_no_sample():
    found = figures("unreadable")
    assert ("GPU_TEMP", "0") not in found
    assert ("POWER_USAGE", "0") not in found
    assert found["GPU_TEMP", "1"] == 31


def test_fields_that_a_driver_does_not_know_leave_the_others():
    def run(argv: list[str], timeout: float) -> tuple[int, str, str]:
        if "clocks.mem" in argv[1]:
            return 2, "", 'Field "clocks.mem" is not a valid field to query.'
        return 0, "00000000:AD:00.0, 5, 61.5\n", ""

    assert ask(run, 1) == {"0000:ad:00": {"utilization.gpu": 5, "power.draw": 61.5}}


def xids(log: str) -> dict[str, str]:
    """The counts of GPU 0, by label xid."""
    run = runner("idle", log)
    text = page(_gpu_info.read(run, 20), {}, "h1")
    return dict(re.findall(r'^DCGM_EXP_XID_ERRORS_COUNT\{gpu="0",.*?"(?:,xid="(\d+)")?\} (\S+)$', text, re.MULTILINE))


def test_each_xid_is_counted_by_its_code_so_that_what_follows_a_fault_does_not_hide_it():
    log = XID.format(1, 79) + XID.format(2, 45) + XID.format(3, 45) + XID.format(4, 154)
    assert xids(log) == {"79": "1", "45": "2", "154": "1"}


def test_without_an_xid_the_count_is_0_and_has_no_code():
    assert xids("2026-11-24T01:00:00+00:00 h kernel: well\n") == {"": "0"}


def test_the_last_xid_is_told():
    found = figures("idle", log=XID.format(1, 79) + XID.format(5, 31) + XID.format(3, 48))
    assert found["XID_ERRORS", "0"] == 31
    assert found["XID_ERRORS", "1"] == 0


def test_without_a_kernel_log_no_xid_is_told():
    assert ("XID_ERRORS", "0") not in figures("idle", log="")
    assert xids("") == {}


def test_a_lost_gpu_has_its_xid_alone():
    found = figures("lost_first", log=XID.format(1, 79))
    assert {name for name, gpu in found if gpu == "0"} == {"XID_ERRORS"}
    assert found["XID_ERRORS", "0"] == 79


def test_each_figure_has_its_type():
    text = page(_gpu_info.Facts([], _gpu_info.Host()), {}, "h1")
    assert re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE) == [(name, kind) for name, kind, _ in METRICS]


def test_labels_are_those_of_dcgm_exporter():
    run = runner("idle")
    text = page(_gpu_info.read(run, 20), {}, 'a"b\\c')
    line = next(line for line in text.splitlines() if line.startswith("DCGM_FI_DEV_FB_USED{"))
    assert line == (
        'DCGM_FI_DEV_FB_USED{gpu="0",UUID="GPU-5d1c1f36-9b2f-4a45-8c0a-3f1e6f0a0001",pci_bus_id="00000000:AD:00.0",'
        'modelName="NVIDIA H100 NVL",Hostname="a\\"b\\\\c"} 0'
    )

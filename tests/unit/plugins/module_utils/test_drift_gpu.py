"""Driver and GPUs against what is declared."""

from __future__ import annotations

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _drift_gpu, _driver, _gpu_health, _gpu_settings
from ansible_collections.nvl.vllm.plugins.module_utils._drift_kinds import Report
from ansible_collections.nvl.vllm.plugins.module_utils._gpu_info import Facts, Gpu, Host, Process

A, B, C = (f"GPU-{letter * 8}" for letter in "abc")
VERSION = "580.95.05"


def gpu(index, uuid, **fields):
    return Gpu(f"00000000:A{index}:00.0", index=index, uuid=uuid, **fields)


def told(report):
    return [(item["kind"], item["where"]) for item in report.findings]


def driver(**fields):
    packages = [_driver.Package("libcuda1", f"{VERSION}-1", held=True)]
    facts = {"kernel": _driver.Kernel("6.1", True), "loaded": VERSION, "on_disk": VERSION, "packages": packages}
    report = Report("runtime")
    _drift_gpu.compare_driver(_driver.Facts(**{**facts, **fields}), VERSION, report)
    return told(report)


def test_the_declared_driver():
    assert driver() == []


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"loaded": "570.1.2"}, [("driver_not_loaded", "driver")]),
        ({"loaded": ""}, [("driver_not_loaded", "driver")]),
        ({"on_disk": "590.1.2"}, [("driver_not_installed", "driver")]),
        ({"packages": [_driver.Package("libcuda1", "590.48.01-1", held=True)]}, [("driver_package", "libcuda1")]),
        ({"packages": [_driver.Package("libcuda1", f"{VERSION}-1")]}, [("package_not_held", "libcuda1")]),
        # A tool beside the driver has a version of its own.
        ({"packages": [_driver.Package("nvidia-settings", "1.2-1")]}, []),
    ],
)
def test_another_driver(fields, wanted):
    assert driver(**fields) == wanted


@pytest.mark.parametrize(
    ("loaded", "on_disk", "kinds"),
    [
        ("", "", []),
        ("580.1", "580.1", []),
        ("570.1", "580.1", ["driver_not_loaded"]),
        ("", "580.1", ["driver_not_loaded"]),
    ],
)
def test_where_the_host_brings_its_driver_the_loaded_one_is_that_on_disk(loaded, on_disk, kinds):
    report = Report("runtime")
    facts = _driver.Facts(_driver.Kernel("6.1", True), loaded=loaded, on_disk=on_disk)
    _drift_gpu.compare_driver(facts, "", report)
    assert [item["kind"] for item in report.findings] == kinds


@pytest.mark.parametrize(
    ("declared", "recorded", "present", "wanted"),
    [
        ([0], [A], [gpu(0, A), gpu(1, B)], []),
        ([A], [A], [gpu(1, A)], []),
        ([0, 1], [A, B], [gpu(0, A), gpu(1, B)], []),
        ([0], [A], [gpu(0, C), gpu(1, B)], [("gpu_swapped", "primary GPU 0")]),
        ([0], [A], [gpu(0, B), gpu(1, A)], [("gpu_renumbered", "primary GPU 0")]),
        ([1], [B], [gpu(0, A)], [("gpu_missing", "primary GPU 1")]),
        ([B], [B], [gpu(0, A)], [("gpu_missing", f"primary GPU {B}")]),
        ([0], [A], [gpu(0, A, lost=True)], [("gpu_missing", "primary GPU 0")]),
    ],
)
def test_the_gpu_that_an_engine_was_deployed_on(declared, recorded, present, wanted):
    report = Report("runtime")
    _drift_gpu.compare_identity({"primary": declared}, {"primary": recorded}, present, report)
    assert told(report) == wanted
    assert report.unknown == []


@pytest.mark.parametrize("recorded", [[], ["0"]])
def test_without_a_recorded_uuid_the_identity_is_unknown(recorded):
    report = Report("runtime")
    _drift_gpu.compare_identity({"primary": [0]}, {"primary": recorded}, [gpu(0, A)], report)
    assert report.findings == []
    assert len(report.unknown) == 1


def test_settings_that_the_role_would_change():
    report = Report("runtime")
    change = _gpu_settings.Change("GPU 0 (x)", A, "power_limit", "400.00 W", "350.00 W", [])
    _drift_gpu.compare_settings([change], report)
    assert told(report) == [("gpu_setting", "GPU 0 (x) power_limit")]
    assert (report.findings[0]["found"], report.findings[0]["wanted"]) == ("power_limit is 400.00 W", "350.00 W")


def test_faults_and_foreign_processes():
    boards = [
        gpu(
            0,
            A,
            ecc_mode="Disabled",
            used_mib=9000,
            processes=[Process(77, "python", 8192, 1000)],
            persistence_mode="Disabled",
        ),
        Gpu("00000000:B0:00.0", lost=True),
        gpu(1, B, ecc_uncorrected_volatile=2),
    ]
    found = _gpu_health.findings(Facts(boards, Host()), _gpu_health.Wanted(own_uids=[999]))
    report = Report("runtime")
    _drift_gpu.compare_health(found, report)
    assert sorted(told(report)) == [
        ("gpu_ecc_off", "GPU 00000000:A0:00.0"),
        ("gpu_fault", "GPU 00000000:A1:00.0 ecc_uncorrected"),
        ("gpu_foreign_process", "GPU 00000000:A0:00.0"),
        ("gpu_missing", "GPU 00000000:B0:00.0"),
    ]
    ecc = next(item for item in report.findings if item["kind"] == "gpu_ecc_off")
    assert ecc["found"].endswith("so errors of its memory go unnoticed")
    assert ecc["remedy"] == "run nvidia-smi -i 0 -e 1, and reboot"


def test_what_cannot_be_read_is_unknown():
    report = Report("runtime")
    item = _gpu_health.Finding("unreadable", "warning", "x", "GPU 0: nvidia-smi fails to read values")
    _drift_gpu.compare_health([item], report)
    assert report.findings == []
    assert report.unknown == [item.sentence]


def test_rules_that_are_mapped_exist():
    assert set(_drift_gpu._KINDS) <= set(_gpu_health.RULES)

"""Which driver a release of vLLM and a CUDA toolkit want, and the filters that say so."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import yaml
from ansible.errors import AnsibleFilterError
from ansible_collections.nvl.vllm.plugins.filter import compatibility as filters
from ansible_collections.nvl.vllm.plugins.module_utils import _compatibility
from ansible_collections.nvl.vllm.plugins.module_utils._compatibility import (
    Build,
    UnknownRelease,
    at_least,
    build_of,
    driver_complaint,
    toolkit_complaint,
    version_parts,
)

ROOT = Path(__file__).parents[4]
LOCKS = sorted((ROOT / "roles/vllm/files/locks").glob("cuda-*.txt"))


# Versions


@pytest.mark.parametrize(
    ("found", "wanted", "enough"),
    [
        ("580.65.06", "580.65.06", True),
        ("580.65.06", "580.65.6", True),
        ("580.65.05", "580.65.06", False),
        ("580.126.09", "580.95.05", True),  # by number, not by letter
        ("579.999.99", "580.65.06", False),
        ("610.1", "580.65.06", True),
        ("580.95.05-1ubuntu1", "580.95.05", True),
        ("580.95.05-1ubuntu1", "580.95.06", False),
        ("580", "580.65.06", True),  # a 580 may be that one
        ("575", "580.65.06", False),
        ("580.65", "580.65.06", True),
        ("580.64", "580.65.06", False),
        ("580.65.06", "580", True),
        ("R580", "580", True),
    ],
)
def test_versions_are_compared_by_number_and_what_is_left_open_is_enough(found, wanted, enough):
    assert at_least(found, wanted) is enough


@pytest.mark.parametrize("text", ["", "latest", "."])
def test_what_has_no_number_is_no_version(text):
    with pytest.raises(ValueError, match="wanted numbers with dots between them"):
        at_least(text, "580")


# Releases of vLLM


@pytest.mark.parametrize(
    ("version", "torch", "cuda", "driver"),
    [
        ("0.10.0", "2.7.1", "12.6", "525.60.13"),
        ("0.10.1.1", "2.7.1", "12.6", "525.60.13"),
        ("0.10.2", "2.8.0", "12.8", "525.60.13"),
        ("0.11.0", "2.8.0", "12.8", "525.60.13"),
        ("0.11.1", "2.9.0", "12.8", "525.60.13"),
        ("0.13.0", "2.9.0", "12.8", "525.60.13"),
        ("0.16.0", "2.9.1", "12.8", "525.60.13"),
        ("0.19.1", "2.10.0", "12.8", "525.60.13"),
        ("0.20.0", "2.11.0", "13.0", "580.65.06"),
        ("v0.26.0", "2.11.0", "13.0", "580.65.06"),
        ("0.27.1", "2.13.0", "13.0", "580.65.06"),
        ("0.32.0", "2.13.0", "13.0", "580.65.06"),
        ("0.33.0", "2.14.0", "13.0", "580.65.06"),
        ("0.33.0rc1", "2.14.0", "13.0", "580.65.06"),
        ("0.33.2", "2.14.0", "13.0", "580.65.06"),
    ],
)
def test_what_a_release_is_built_with(version, torch, cuda, driver):
    assert build_of(version) == Build(torch, cuda, driver, assumed=False)


@pytest.mark.parametrize("version", ["0.34.0", "0.100.0", "1.0", "nightly"])
def test_a_release_that_is_newer_than_known_is_taken_for_the_newest(version):
    assert build_of(version) == build_of("0.33.0")._replace(assumed=True)


@pytest.mark.parametrize("version", ["0.9.2", "0.9", "0.6.3.post1"])
def test_a_release_that_is_older_than_known_is_refused(version):
    with pytest.raises(UnknownRelease) as caught:
        build_of(version)
    assert str(caught.value) == (
        f"the version of vLLM is {version}, and which driver a release wants is known from 0.10.0 on: deploy 0.10.0 or "
        "newer"
    )


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_the_table_says_what_the_lock_files_say(lock):
    """torch and CUDA of a release are those that its lock file has."""
    build = build_of(lock.stem.partition("-")[2])
    text = lock.read_text()
    assert re.findall(r"^torch==([\d.]+)", text, re.MULTILINE) == [build.torch]
    (toolkit,) = re.findall(r"^cuda-toolkit==(\d+\.\d+)", text, re.MULTILINE)
    assert (toolkit, build.assumed) == (build.cuda, False)


def test_there_are_lock_files_to_compare_with():
    assert LOCKS


@pytest.mark.parametrize(
    "keys",
    [
        [first for first, _, _ in _compatibility.RELEASES],
        [first for first, _ in _compatibility.TOOLKITS],
        [version_parts(driver) for _, driver in _compatibility.TOOLKITS],
        [version_parts(torch) for _, torch, _ in _compatibility.RELEASES],
    ],
)
def test_the_tables_rise(keys):
    assert all(one < two for one, two in itertools.pairwise(keys))


def test_the_newest_series_is_at_the_end_of_the_table():
    assert _compatibility.RELEASES[-1][0][:2] <= _compatibility.NEWEST


def test_a_majors_oldest_driver_is_that_of_its_first_toolkit():
    toolkits = dict(_compatibility.TOOLKITS)
    assert {major: toolkits[(major, 0)] for major in _compatibility.MINIMUM} == _compatibility.MINIMUM


# Drivers


@pytest.mark.parametrize(
    ("vllm", "driver"),
    [("0.33.0", "580.65.06"), ("0.33.0", "580"), ("0.40.0", "615.71.09"), ("0.19.1", "525.60.13"), ("0.10.0", "580")],
)
def test_a_driver_that_fits_gives_no_complaint(vllm, driver):
    assert driver_complaint(vllm, driver) == ""


def test_a_driver_that_is_too_old_is_told_with_all_versions_and_both_ways_out():
    assert driver_complaint("0.33.0", "575.57.08") == (
        "the NVIDIA driver is 575.57.08, which is too old for vLLM 0.33.0: its torch 2.14.0 is built for CUDA 13.0, "
        "which wants driver 580.65.06 or newer; take such a driver, or a vLLM older than 0.20.0"
    )


def test_what_is_assumed_is_said():
    assert "its torch 2.14.0 (assumed to be as that of 0.33, the newest that is known here) is built for CUDA 13.0" in (
        driver_complaint("0.34.0", "575")
    )


def test_no_vllm_is_offered_that_would_not_run_either():
    assert driver_complaint("0.33.0", "470.57.02").endswith("or newer; take such a driver")


# Toolkits


@pytest.mark.parametrize(
    ("toolkit", "driver"),
    [
        ("13.0", "580.65.06"),
        ("13.0", "580"),
        ("13.0.2", "580.95.05"),
        ("12.9", "580.65.06"),
        ("13.4", "615.71.09"),
        ("13.9", "615.71.09"),
        ("11.4", "470.57.02"),  # older than what is known
        ("12.7", "560.28.03"),  # a series that there is not: as the one before
    ],
)
def test_a_toolkit_that_the_driver_knows_gives_no_complaint(toolkit, driver):
    assert toolkit_complaint(toolkit, driver) == ""


def test_a_toolkit_that_is_newer_than_the_driver_is_told_with_the_newest_that_fits():
    assert toolkit_complaint("13.2", "590.48.01") == (
        "the CUDA toolkit is 13.2, which came with driver 595.45.04 or newer, and the NVIDIA driver is 590.48.01, so "
        "programs that it compiles may not run; take such a driver, or toolkit 13.1 or older"
    )


@pytest.mark.parametrize(("toolkit", "driver"), [("13.1", "580"), ("13.4", "610.43.02"), ("14.0", "610.43.02")])
def test_a_toolkit_of_a_newer_branch_is_told(toolkit, driver):
    assert f"the CUDA toolkit is {toolkit}, " in toolkit_complaint(toolkit, driver)


def test_no_toolkit_is_offered_for_a_driver_that_knows_none():
    assert toolkit_complaint("12.0", "470.57.02").endswith("may not run; take such a driver")


@pytest.mark.parametrize("toolkit", ["", "13", "latest", "cuda-toolkit-13-0"])
def test_what_is_no_series_is_refused(toolkit):
    with pytest.raises(ValueError, match=re.escape(f"the CUDA toolkit is {toolkit!r}: wanted a series such as 13.0")):
        toolkit_complaint(toolkit, "580")


# The filters


def test_the_filters_take_what_yaml_makes_of_a_version():
    found = filters.FilterModule().filters()
    assert found["driver_complaint"](580, "0.33.0") == ""
    assert found["driver_complaint"](575, "0.33.0") == driver_complaint("0.33.0", "575")
    assert found["toolkit_complaint"](13.2, 580.95) == toolkit_complaint("13.2", "580.95")
    assert found["toolkit_complaint"](13.0, 580.95) == ""


def test_what_cannot_be_judged_is_an_error_of_the_filter():
    with pytest.raises(AnsibleFilterError, match=r"the version of vLLM is 0\.9\.0"):
        filters.driver_complaint("580", "0.9.0")
    with pytest.raises(AnsibleFilterError, match="wanted a series such as 13"):
        filters.toolkit_complaint("", "580")


@pytest.mark.parametrize("name", sorted(filters.FilterModule().filters()))
def test_each_filter_is_documented_in_a_file_of_its_name(name):
    page = yaml.safe_load((ROOT / f"plugins/filter/{name}.yml").read_text())
    assert page["DOCUMENTATION"]["name"] == name
    assert f"nvl.vllm.{name}(" in page["EXAMPLES"]

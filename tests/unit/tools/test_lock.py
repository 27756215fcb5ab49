"""What ``tools/lock`` makes of uv's answer, and what the committed locks hold."""

import re
from pathlib import Path

import pytest

LOCKS = sorted((Path(__file__).parents[3] / "roles/vllm/files/locks").glob("*.txt"))
PYTHONS = ("3.11", "3.12", "3.13")


def package(name, *tags, marker=None):
    """A PEP 751 package whose wheels' SHA-256 sums are their tags."""
    url = f"https://files.example/{name}-1.0%2Blocal-"
    wheels = [{"url": f"{url}{tag}.whl", "hashes": {"sha256": tag}} for tag in tags]
    entry = {"name": name, "version": "1.0+local", "wheels": wheels}
    return entry | ({"marker": marker} if marker else {})


def test_each_python_gets_its_best_wheel_and_no_other(lock):
    abi = [f"cp3{minor}-cp3{minor}-manylinux_2_17_x86_64" for minor in (11, 12, 13, 14)]
    other = ["cp311-cp311-macosx_14_0_arm64", "cp311-cp311-musllinux_1_2_x86_64", "py3-none-any"]
    entries = lock.lock_entries([package("demo", *abi, *other)], PYTHONS)
    assert entries == {"demo==1.0+local": abi[:3]}


def test_wheel_of_a_newer_glibc_is_not_taken(lock):
    old, new = (f"cp311-abi3-manylinux_2_{minor}_x86_64" for minor in (28, 39))
    assert lock.lock_entries([package("demo", new, old)], PYTHONS) == {"demo==1.0+local": [old]}


def test_line_has_a_marker_only_where_the_pythons_differ(lock):
    packages = [
        package("always", "py3-none-any", marker="sys_platform == 'linux'"),
        package("sometimes", "py3-none-any", marker="python_full_version >= '3.12'"),
        package("never", "py3-none-any", marker="sys_platform == 'win32'"),
    ]
    assert set(lock.lock_entries(packages, PYTHONS)) == {
        "always==1.0+local",
        "sometimes==1.0+local ; python_version == '3.12' or python_version == '3.13'",
    }


def test_package_without_a_wheel_for_one_of_the_pythons_is_an_error(lock):
    with pytest.raises(LookupError, match=r"demo==1.0\+local has no wheel for CPython 3.12"):
        lock.lock_entries([package("demo", "cp311-cp311-manylinux_2_17_x86_64")], PYTHONS)


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_committed_lock_pins_wheels_by_hash_for_each_python_it_names(path, wheelhouse):
    text = path.read_text()
    pythons = re.findall(r"3\.\d+", text.splitlines()[1].partition(" on ")[0])
    assert pythons
    for python in pythons:
        pins = wheelhouse.read_lock(text, python)
        assert len({pin.name for pin in pins}) == len(pins)
        assert all(len(sum_) == 64 for pin in pins for sum_ in pin.sha256)
    assert "://" not in text


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_committed_lock_says_which_command_makes_it(path):
    flavour, _, version = path.stem.partition("-")
    if flavour == "uv":
        version = re.search(r"^uv==(\S+)", path.read_text(), re.MULTILINE)[1]
    assert f"# Made by `tools/lock {flavour} {version}`; do not edit." in path.read_text()

"""Whether file systems have room for all that goes there."""

from __future__ import annotations

import os
import shutil

from ansible_collections.nvl.vllm.plugins.module_utils._host import free_mib, mount_of, space_complaints

MOUNTS = {"/opt": "/", "/var": "/", "/srv": "/srv"}
FREE = {"/": 10_000, "/srv": 70_000}


def complaints(*needs, free=FREE):
    return space_complaints(needs, lambda path: MOUNTS["/" + path.split("/")[1]], free.__getitem__)


def test_enough_is_enough():
    assert complaints(("/opt/vllm", 10_000, "vllm_root"), ("/srv/models", 70_000, "vllm_model_root")) == []


def test_too_little_is_told_with_figures():
    assert complaints(("/srv/models", 70_001, "vllm_model_root")) == [
        "/srv/models (70001 MiB) needs 70001 MiB of free disk space, and the file system /srv has 70000 MiB: "
        "free space there, or set vllm_model_root to a directory on a larger file system"
    ]


def test_what_goes_to_one_file_system_is_summed_up():
    assert complaints(("/opt/vllm", 6_000, "vllm_root"), ("/var/cache", 5_000, "vllm_cache")) == [
        "/opt/vllm (6000 MiB) and /var/cache (5000 MiB) need 11000 MiB of free disk space, and the file system / has "
        "10000 MiB: free space there, or set vllm_root or vllm_cache to a directory on a larger file system"
    ]


def test_each_file_system_has_a_sentence():
    found = complaints(("/opt/a", 1, "a"), ("/srv/b", 1, "b"), free={"/": 0, "/srv": 0})
    assert [sentence.partition(" ")[0] for sentence in found] == ["/opt/a", "/srv/b"]


def test_nothing_needed_is_nothing_asked():
    assert complaints(("/nowhere", 0, "a"), ("/nowhere", -5, "b")) == []


def test_what_needs_nothing_is_not_named():
    (sentence,) = complaints(("/opt/a", 20_000, "a"), ("/var/b", 0, "b"))
    assert "/var/b" not in sentence


def test_directories_of_this_machine(tmp_path):
    needs = [(str(tmp_path / "not/there"), 2**40, "a"), (str(tmp_path), 1, "b")]
    (sentence,) = space_complaints(needs)
    assert f"the file system {mount_of(str(tmp_path))} has " in sentence
    assert space_complaints([(str(tmp_path), 1, "b")]) == []


def test_mount_point_is_that_of_the_nearest_directory_that_is_there(tmp_path):
    place = mount_of(str(tmp_path / "not/there"))
    assert os.path.ismount(place)
    assert os.stat(place).st_dev == os.stat(tmp_path).st_dev
    assert mount_of("/proc/self/status") == "/proc"
    assert mount_of("/") == mount_of("/no-such-directory") == "/"


def test_free_space_is_that_of_the_file_system(tmp_path):
    (tmp_path / "file").write_text("")
    near = shutil.disk_usage(tmp_path).free // 2**20
    assert abs(free_mib(str(tmp_path / "file")) - near) < 1024

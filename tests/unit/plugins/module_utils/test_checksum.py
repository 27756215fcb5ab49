"""Checksums: the same as those of hashlib, sha256sum and git."""

from __future__ import annotations

import hashlib
import random
import subprocess
import threading

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _checksum
from ansible_collections.nvl.vllm.plugins.module_utils._checksum import CHUNK, Stopped, complaint, digest
from ansible_collections.nvl.vllm.plugins.module_utils._manifest import File


@pytest.fixture(params=[0, 1, 4096, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 17])
def file(request, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(random.Random(request.param).randbytes(request.param))
    return path


def test_digest_is_that_of_other_programs(file):
    said = subprocess.run(["sha256sum", file], capture_output=True, text=True, check=True).stdout.split()[0]
    git = subprocess.run(["git", "hash-object", "--no-filters", file], capture_output=True, text=True, check=True)
    content = file.read_bytes()
    assert said == hashlib.sha256(content).hexdigest()
    assert digest(str(file)) == File(len(content), said)
    assert digest(str(file), git=True) == File(len(content), said, git.stdout.strip())


def test_every_byte_is_told_as_it_is_read(file):
    told = []
    digest(str(file), advance=told.append)
    assert sum(told) == file.stat().st_size
    assert all(0 < count <= CHUNK for count in told)


def test_stop_ends_it_before_the_file_does(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 5 * CHUNK)
    stop, told = threading.Event(), []

    def advance(count):
        told.append(count)
        stop.set()

    with pytest.raises(Stopped):
        digest(str(path), advance=advance, stop=stop)
    assert told == [CHUNK]


def test_stop_that_is_not_set_changes_nothing(file):
    assert digest(str(file), stop=threading.Event()) == digest(str(file))


def test_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(FileNotFoundError):
        digest(str(tmp_path / "nowhere"))


ONE, TWO = "1" * 64, "2" * 64
OLD, NEW = "a" * 40, "b" * 40


@pytest.mark.parametrize(
    ("found", "wanted", "why"),
    [
        (File(1, ONE, OLD), File(1, ONE, OLD), ""),
        (File(1, ONE), File(1, ONE), ""),
        (File(1, ONE, OLD), File(1, "", OLD), ""),
        (File(1, ONE, OLD), File(1, ONE), ""),
        (File(1), File(1), ""),
        (File(2), File(1, ONE), "has 2 bytes, wanted 1"),
        (File(1, TWO), File(1, ONE), f"has SHA-256 {TWO}, wanted {ONE}"),
        (File(1), File(1, ONE), f"has SHA-256 , wanted {ONE}"),
        (File(1, ONE, NEW), File(1, "", OLD), f"has the git blob {NEW}, wanted {OLD}"),
        (File(1, ONE, NEW), File(1, ONE, OLD), f"has the git blob {NEW}, wanted {OLD}"),
    ],
)
def test_complaint_says_what_was_found_and_what_was_wanted(found, wanted, why):
    assert complaint(found, wanted) == why


def test_some_files_are_worked_on_at_a_time_but_not_too_many():
    assert 1 <= _checksum.workers() <= 8

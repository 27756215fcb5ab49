"""Releases: their marker, their lock, and the sentence for a failed installation."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils._venv import (
    Supply,
    explain_failure,
    locked_packages,
    read_marker,
    supply_options,
    write_marker,
)

LOCKS = Path(__file__).parents[4] / "roles/vllm/files/locks"
WHEELHOUSE = Supply("/opt/vllm/wheelhouse")
INDEX = Supply("", ("https://pypi.example/simple",))

#: Recorded from uv 0.13 on standard error, paths and one sum shortened.
HASH_MISMATCH = """\
error: Failed to download `six==1.16.0`
  cause: Hash mismatch for `six==1.16.0`

         Expected:
           sha256:8abb0000000000000000000000000000000000000000000000000000000000aa

         Computed:
           sha256:8abb2f1d86890a2dfb989f9a77cfcfd3e47c2a354b01111771326f8aa26e0254
"""
TRUNCATED = """\
error: Failed to download `six==1.16.0`
  cause: Failed to extract archive: six-1.16.0-py2.py3-none-any.whl
  cause: Bad uncompressed size (got 11050, expected 11053) for file six.py
"""
MISSING = """\
error: No solution found when resolving dependencies
  cause: Because six was not found in the provided package locations and you require six==1.16.0, we can conclude that \
your requirements are unsatisfiable.
"""
UNREACHABLE = """\
error: Failed to fetch: http://127.0.0.1:9/simple/six/
  cause: error sending request for url (http://127.0.0.1:9/simple/six/)
  cause: client error (Connect)
  cause: tcp connect error
  cause: Connection refused (os error 111)
"""
DISK_FULL = """\
error: Failed to download `big==1.0`
  cause: Failed to extract archive: big-1.0-py3-none-any.whl
  cause: I/O operation failed during extraction
  cause: failed to write to file `/opt/vllm/.uv-cache/.tmpDHF8vl/big.py`: No space left on device (os error 28)
"""


@pytest.mark.parametrize(
    ("stderr", "supply", "sentence"),
    [
        (
            HASH_MISMATCH,
            WHEELHOUSE,
            "h1: six==1.16.0 from the wheelhouse /opt/vllm/wheelhouse has a hash that the lock file does not name "
            "(sha256:8abb2f1d86890a2dfb989f9a77cfcfd3e47c2a354b01111771326f8aa26e0254): "
            "the file was damaged or replaced; fetch it again, or lock again if the change was meant",
        ),
        (
            TRUNCATED,
            WHEELHOUSE,
            "h1: six==1.16.0 in the wheelhouse /opt/vllm/wheelhouse is truncated or damaged: fetch the file again",
        ),
        (
            MISSING,
            WHEELHOUSE,
            "h1: the wheelhouse /opt/vllm/wheelhouse does not hold what the lock file names (Because six was not found "
            "in the provided package locations and you require six==1.16.0, we can conclude that your requirements are "
            "unsatisfiable.): fill it from that file",
        ),
        (
            UNREACHABLE,
            INDEX,
            "h1: cannot reach the package index https://pypi.example/simple (Connection refused (os error 111)): "
            "check vllm_index_urls and the proxy, or set vllm_wheelhouse to a directory that the controller filled",
        ),
        (
            DISK_FULL,
            INDEX,
            "h1: the disk is full while installing big==1.0: free space, or set vllm_root to a larger file system",
        ),
        (
            "error: first\n  cause: second\n  cause: third\n",
            INDEX,
            "h1: installing from the index https://pypi.example/simple failed: second; third",
        ),
        (
            "Killed\n",
            WHEELHOUSE,
            "h1: installing from the wheelhouse /opt/vllm/wheelhouse failed: Killed",
        ),
        ("", Supply(""), "h1: installing from the index of the host's own configuration failed: it printed nothing"),
    ],
    ids=["hash", "truncated", "missing", "unreachable", "disk", "other", "no-cause", "silent"],
)
def test_a_failed_installation_is_one_sentence(stderr, supply, sentence):
    assert explain_failure(stderr, supply, "h1") == sentence


def test_a_wheelhouse_is_never_unreachable():
    assert "cannot reach" not in explain_failure(UNREACHABLE, WHEELHOUSE, "h1")


@pytest.mark.parametrize(
    ("supply", "options"),
    [
        (WHEELHOUSE, ["--no-index", "--find-links", "/opt/vllm/wheelhouse"]),
        (Supply("/a", ("https://b",)), ["--no-index", "--find-links", "/a"]),
        (Supply("", ("https://a", "https://b")), ["--index-url", "https://a", "--extra-index-url", "https://b"]),
        (Supply(""), []),
    ],
)
def test_options_of_a_supply(supply, options):
    assert supply_options(supply) == options


def test_a_marker_comes_back(tmp_path):
    write_marker(str(tmp_path), {"version": "0.32.0", "packages": 3})
    assert read_marker(str(tmp_path)) == {"version": "0.32.0", "packages": 3}
    assert [path.name for path in tmp_path.iterdir()] == [".release.json"]


@pytest.mark.parametrize("text", ["", "{half of", "[]"])
def test_a_marker_that_is_not_whole_is_none(tmp_path, text):
    (tmp_path / ".release.json").write_text(text)
    assert read_marker(str(tmp_path)) is None


def test_a_release_that_is_not_there_has_no_marker(tmp_path):
    (tmp_path / "file").write_text("")
    assert read_marker(str(tmp_path / "release")) is None
    assert read_marker(str(tmp_path / "file")) is None


def test_packages_of_a_lock():
    lock = """\
# A comment, six==0.0.0
six==1.16.0 \\
    --hash=sha256:8abb
fastapi[standard]==0.115.0 ; python_version == '3.12' \\
    --hash=sha256:01
vllm==0.32.0+cpu --hash=sha256:02
"""
    assert locked_packages(lock) == ["six==1.16.0", "fastapi==0.115.0", "vllm==0.32.0+cpu"]


@pytest.mark.parametrize("path", sorted(LOCKS.glob("*.txt")), ids=lambda path: path.name)
def test_every_requirement_of_our_locks_is_found(path):
    lines = [line for line in path.read_text().splitlines() if line and line[0] not in " #"]
    assert len(lines) > 0
    assert len(locked_packages(path.read_text())) == len(lines)

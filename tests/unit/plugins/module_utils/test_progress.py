"""How far a long task is: what is counted, what is told, and the file between the two."""

from __future__ import annotations

import json
import threading
import time

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils._progress import (
    GIB,
    Progress,
    amount,
    describe,
    duration,
)


def read(path):
    return json.loads(path.read_text())


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_counts_add_up():
    progress = Progress()
    progress.add(to_fetch=100, fetched=10)
    progress.add(fetched=30, hashed=5)
    progress.add(fetched=-20)
    assert (progress.counts.fetched, progress.counts.to_fetch, progress.counts.hashed) == (20, 100, 5)


def test_counts_of_many_threads_add_up():
    progress = Progress()
    threads = [
        threading.Thread(target=lambda: [progress.add(fetched=1, hashed=2) for _ in range(2000)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (progress.counts.fetched, progress.counts.hashed) == (16_000, 32_000)


def test_note_stays_until_something_moves():
    progress = Progress()
    progress.note("waiting for a turn")
    assert progress.counts.note == "waiting for a turn"
    progress.add(fetched=1)
    assert progress.counts.note == ""


def test_file_is_there_while_it_works_and_gone_at_the_end(tmp_path):
    path = tmp_path / "new/progress.json"
    progress = Progress(str(path))
    progress.add(to_fetch=10)
    with progress.told(interval=60):
        assert read(path) == {"fetched": 0, "to_fetch": 10, "hashed": 0, "to_hash": 0, "note": ""}
        assert path.stat().st_mode & 0o444 == 0o444
    assert list(path.parent.iterdir()) == []


def test_file_follows_the_counts(tmp_path):
    path = tmp_path / "progress.json"
    progress = Progress(str(path))
    with progress.told(interval=0.01):
        progress.add(fetched=7)
        wait_for(lambda: read(path)["fetched"] == 7)
        progress.note("the hub is silent")
        wait_for(lambda: read(path)["note"] == "the hub is silent")


def test_file_is_gone_after_a_failure_and_the_failure_is_told(tmp_path):
    path = tmp_path / "progress.json"
    with pytest.raises(RuntimeError, match="it failed"), Progress(str(path)).told():
        raise RuntimeError("it failed")
    assert list(tmp_path.iterdir()) == []


def test_without_a_file_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Progress().told():
        pass
    assert list(tmp_path.iterdir()) == []


def test_two_runs_that_meet_do_not_fail_each_other(tmp_path):
    """The file has one name for all runs on a host."""
    path = str(tmp_path / "progress.json")
    with Progress(path).told(interval=60), Progress(path).told(interval=60):
        pass


def test_run_ends_well_where_its_file_was_removed(tmp_path):
    path = tmp_path / "progress.json"
    with Progress(str(path)).told(interval=60):
        path.unlink()


def counts(fetched=0, to_fetch=0, hashed=0, to_hash=0, note=""):
    return {"fetched": fetched, "to_fetch": to_fetch, "hashed": hashed, "to_hash": to_hash, "note": note}


@pytest.mark.parametrize(
    ("now", "before", "line"),
    [
        ({}, {}, ""),
        (counts(), counts(), ""),
        (
            counts(3 * GIB, 60 * GIB),
            counts(1 * GIB, 60 * GIB),
            "fetched 3.0 GiB of 60.0 GiB (5 %), 205 MiB/s, 4 min 45 s left",
        ),
        (counts(1 * GIB, 60 * GIB), counts(1 * GIB, 60 * GIB), "fetched 1.0 GiB of 60.0 GiB (1 %)"),
        (
            counts(hashed=20 * GIB, to_hash=60 * GIB),
            counts(to_hash=60 * GIB),
            "verified 20.0 GiB of 60.0 GiB (33 %), 2.0 GiB/s, 20 s left",
        ),
        (
            counts(2**20, 4 * 2**20, 2**20, 8 * 2**20),
            counts(2**20, 4 * 2**20, 2**20, 8 * 2**20),
            "fetched 1 MiB of 4 MiB (25 %)",
        ),
        # Verification is told once all has arrived.
        (counts(GIB, GIB, 0, GIB), counts(GIB, GIB, 0, GIB), "verified 0 MiB of 1.0 GiB (0 %)"),
        (counts(0, GIB, GIB, GIB), counts(0, GIB, GIB, GIB), "fetched 0 MiB of 1.0 GiB (0 %)"),
        (counts(note="waiting for another run"), {}, "waiting for another run"),
        (
            counts(GIB, 2 * GIB, note="HTTP 503; trying again in 4 s"),
            counts(GIB, 2 * GIB),
            "fetched 1.0 GiB of 2.0 GiB (50 %), HTTP 503; trying again in 4 s",
        ),
        # It had to begin a file anew.
        (counts(GIB, 4 * GIB), counts(2 * GIB, 4 * GIB), "fetched 1.0 GiB of 4.0 GiB (25 %)"),
    ],
)
def test_line_says_how_far_it_is(now, before, line):
    assert describe(now, before, 10.0) == line


def test_what_was_there_before_the_first_look_was_not_fetched_at_that_speed():
    """A run that goes on where another one ended begins with what that one fetched."""
    assert describe(counts(58 * GIB, 60 * GIB), {}, 0.2) == "fetched 58.0 GiB of 60.0 GiB (96 %)"


def test_no_time_passed_is_no_speed():
    assert describe(counts(2 * GIB, 4 * GIB), counts(GIB, 4 * GIB), 0.0) == "fetched 2.0 GiB of 4.0 GiB (50 %)"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (59, "59 s"),
        (59.7, "1 min 0 s"),
        (61, "1 min 1 s"),
        (3599, "59 min 59 s"),
        (3599.6, "1 h 0 min"),
        (3725, "1 h 2 min"),
        (100_000, "27 h 46 min"),
    ],
)
def test_durations_for_a_person(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 MiB"), (2**20, "1 MiB"), (512 * 2**20, "512 MiB"), (GIB, "1.0 GiB"), (65_248_815_744, "60.8 GiB")],
)
def test_amounts_for_a_person(size, text):
    assert amount(size) == text

"""vLLM's environment against its wheels, on a real tree."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import time

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _drift_release as drift
from ansible_collections.nvl.vllm.plugins.module_utils._drift_kinds import Report
from hypothesis import given
from hypothesis import strategies as st

SITE = "lib/python3.11/site-packages"
FILES = {
    "alpha/__init__.py": b"one = 1\n",
    "alpha/core.py": b"def f(): pass\n",
    "../../../bin/alpha": b"#!/x\n",
    "alpha/__pycache__/listed.cpython-311.pyc": b"old",
}
LOCK = "alpha==1.0 \\\n    --hash=sha256:00\n# via x\nbeta-tool==2.0+cpu \\\n    --hash=sha256:11\n"


class Release:
    """A small release as the module venv leaves one."""

    def __init__(self, path):
        self.path = path / "release"
        self.site = self.path / SITE
        self.lock = path / "lock.txt"
        self.lock.write_text(LOCK)
        rows = []
        for name, content in FILES.items():
            file = self.site / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            rows.append(f"{name},sha256={digest},{len(content)}")
        self.info("alpha-1.0", [*rows, "alpha-1.0.dist-info/RECORD,,"])
        self.info("beta_tool-2.0+cpu", ["beta_tool-2.0+cpu.dist-info/RECORD,,"])
        # What uv compiles and writes besides.
        (self.site / "alpha/__pycache__/listed.cpython-311.pyc").write_bytes(b"compiled anew")
        (self.site / "alpha/__pycache__/core.cpython-311.pyc").write_bytes(b"compiled")
        (self.path / "pyvenv.cfg").write_text("home = /usr/bin\n")
        (self.path / ".lock").touch()
        (self.path / ".lock").chmod(0o666)
        (self.path / "lib64").symlink_to("lib")
        self.tick()
        (self.path / ".release.json").write_text('{"version": "1"}')
        self.tick()

    def info(self, name, rows):
        (self.site / f"{name}.dist-info").mkdir(parents=True)
        (self.site / f"{name}.dist-info/RECORD").write_text("\n".join(rows) + "\n")

    def tick(self):
        """Wait until the file system's clock has moved on."""
        probe = self.path.parent / "probe"
        probe.touch()
        before = probe.stat().st_ctime_ns
        while probe.stat().st_ctime_ns == before:
            time.sleep(0.001)
            probe.touch()

    def look(self, budget=0, turn=0, seconds=30.0, lock_sha256=None):
        report = Report("content")
        wanted = lock_sha256 or hashlib.sha256(LOCK.rstrip().encode()).hexdigest()
        with drift.Reader(seconds) as reader:
            drift.look_at_release(
                str(self.path), str(self.lock), wanted, budget, turn, reader, report, owner=os.getuid()
            )
        return report

    def told(self, **options):
        report = self.look(**options)
        assert report.unknown == []
        where = f"{self.path}/"
        return sorted(
            (item["kind"], item["where"].replace(where, "").replace(f"{SITE}/", "")) for item in report.findings
        )


@pytest.fixture
def release(tmp_path):
    return Release(tmp_path)


def test_a_release_as_installed_gives_nothing_and_reads_nothing(release):
    assert release.told() == []
    assert release.look().facts["release"] == {
        "path": str(release.path),
        "files": 6,
        "packages": 2,
        "read": 0,
        "suspect": 0,
    }


def test_a_file_of_the_same_size_and_time_is_found_by_its_inode(release):
    file = release.site / "alpha/core.py"
    status = file.stat()
    file.write_bytes(b"def g(): pass\n")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert release.told() == [("release_file_changed", "alpha/core.py")]


def test_a_touched_file_is_read_and_right(release):
    (release.site / "alpha/core.py").touch()
    report = release.look()
    assert report.findings == []
    assert report.facts["release"]["suspect"] == 1
    assert report.facts["release"]["read"] == 1


def test_what_is_gone_longer_or_new(release):
    (release.site / "alpha/core.py").write_bytes(b"def f(): return 1\n")
    (release.path / "bin/alpha").unlink()
    (release.site / "evil.pth").write_text("import os\n")
    (release.path / "pyvenv.cfg").write_text("include-system-site-packages = true\n")
    assert release.told() == [
        ("release_file_added", "evil.pth"),
        ("release_file_changed", "alpha/core.py"),
        ("release_file_changed", "pyvenv.cfg"),
        ("release_file_missing", "bin/alpha"),
    ]


def test_byte_code_from_after_the_installation(release):
    (release.site / "alpha/__pycache__/core.cpython-311.pyc").write_bytes(b"evil")
    assert release.told() == [("release_file_added", "alpha/__pycache__/core.cpython-311.pyc")]


def test_a_record_that_was_written_later(release):
    record = release.site / "alpha-1.0.dist-info/RECORD"
    record.write_text(record.read_text())
    assert release.told() == [("release_file_changed", "alpha-1.0.dist-info/RECORD")]


def test_chown_of_everything_is_no_change_of_content(release):
    release.tick()
    for folder, _, names in os.walk(release.path):
        for name in names:
            if name != ".release.json":
                path = os.path.join(folder, name)
                os.chown(path, os.getuid(), os.getgid(), follow_symlinks=False)
    assert release.told() == []


def test_owners_and_modes(release):
    (release.site / "alpha").chmod(0o777)
    assert release.told() == [("owner_changed", "alpha")]
    report = Report("content")
    grouped = drift.Grouped(report, "/x", depth=1)
    drift.compare_owners(grouped, {"a": drift.Seen(0, 0, 0, 999, 0o100644)}, 0)
    grouped.tell()
    assert report.findings[0]["found"] == "user 999, mode 0644"


def test_packages_against_the_lock(release):
    shutil.rmtree(release.site / "beta_tool-2.0+cpu.dist-info")
    release.info("gamma-3", [])
    found = [item for item in release.look().findings if item["kind"] == "release_package"]
    assert [(item["where"], item["found"], item["wanted"]) for item in found] == [
        ("beta-tool", "not installed", "2.0+cpu"),
        ("gamma", "3", "not installed, as the lock file does not name it"),
    ]


def test_another_lock_file_and_none(release):
    assert [item["found"] for item in release.look(lock_sha256="0" * 64).findings] == [
        f"SHA-256 {hashlib.sha256(LOCK.rstrip().encode()).hexdigest()[:12]}"
    ]
    release.lock.unlink()
    assert [(item["kind"], item["found"]) for item in release.look().findings] == [("lock_changed", "not there")]


def test_many_files_of_one_package_are_one_finding(release):
    for number in range(20):
        (release.site / f"alpha/new{number}.py").touch()
    (item,) = release.look().findings
    assert item["where"].endswith("site-packages/alpha")
    assert item["found"].startswith(f"20 files, such as {SITE}/alpha/new0.py")


def test_a_release_that_is_not_complete(release):
    (release.path / ".release.json").unlink()
    assert [(item["kind"], item["found"]) for item in release.look().findings] == [
        ("release_incomplete", "it has no .release.json")
    ]
    shutil.rmtree(release.path)
    assert release.look().findings[0]["found"] == "it is not there"


def test_what_no_stat_tells_is_found_by_reading(release, monkeypatch):
    """A flipped bit of the disk: content changes and the inode does not."""
    monkeypatch.setattr(drift, "digest", _flip(drift.digest))
    assert release.told() == []
    assert release.told(budget=10**6) == [("release_file_changed", "alpha/core.py")]


def _flip(real):
    def digest(path, **options):
        found = real(path, **options)
        return type(found)(found.size, "0" * 64) if path.endswith("core.py") else found

    return digest


def test_reading_that_takes_too_long_is_unknown(release):
    (release.site / "alpha/core.py").touch()
    reader = drift.Reader(5.0)
    reader._stop.set()  # as its timer does
    report = Report("content")
    tree = drift.read_tree(str(release.path))
    assert drift.compare_content(str(release.path), tree, [f"{SITE}/alpha/core.py"], reader, report) == 0
    assert "1 of 1 files were not read within 5 s" in report.unknown[0]


def test_the_timer_of_a_reader_ends_it():
    with drift.Reader(0.01) as reader:
        assert reader._stop.wait(10)
        with pytest.raises(drift.Stopped):
            reader.sha256("/etc/hostname")


@given(
    st.dictionaries(st.text(min_size=1, max_size=3), st.integers(0, 100), min_size=1, max_size=20),
    st.integers(1, 150),
    st.integers(0, 1000),
)
def test_successive_turns_go_through_all_files(sizes, budget, first):
    parts = [drift.portion(sizes, budget, first + number) for number in range(len(sizes))]
    assert {name for part in parts for name in part} == set(sizes)
    for part in parts:
        assert part
        assert len(part) == 1 or sum(sizes[name] for name in part) <= budget


def test_no_budget_reads_nothing():
    assert drift.portion({"a": 1}, 0, 0) == []
    assert drift.portion({}, 10, 0) == []


def test_the_marker_is_as_the_module_venv_writes_it(release):
    assert json.loads((release.path / drift.MARKER).read_text())["version"]

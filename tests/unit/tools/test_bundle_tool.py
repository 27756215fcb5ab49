"""``tools/bundle`` on a directory as ``playbooks/bundle.yml`` leaves it, and sha256sum on what it writes."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils._bundle import complaints
from ansible_collections.nvl.vllm.plugins.module_utils._manifest import File, Manifest, parse

TOOL = Path(__file__).parents[3] / "tools/bundle"
COMMIT = "b5c939de8f754692c1647ca79fbf85e8c1e70f8a"


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Bundle:
    """A bundle that lacks its description, its README and its sums."""

    def __init__(self, path):
        self.path = path / "bundle"
        self.lock = path / "lock.txt"
        self.lock.write_text("vllm==0.32.0\n")
        for name in (
            "wheelhouse/vllm-0.32.0-py3-none-any.whl",
            "model/config.json",
            "model/model.safetensors",
            "packages/trixie/InRelease",
            "packages/jammy/InRelease",
        ):
            self.put(name, f"this is {name}\n")
        self.manifest(sorted((self.path / "model").iterdir()))

    def put(self, name, text):
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_text(text)

    def manifest(self, files):
        """Write model.json."""
        named = {file.name: File(file.stat().st_size, sha256(file)) for file in files}
        self.put("model.json", Manifest(named, "openai/gpt-oss-120b", COMMIT).dump())

    def finish(self, **changes):
        options = {"device": "cuda", "version": "0.32.0", "lock": self.lock, "python": "3.11", **changes}
        arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, TOOL, self.path, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def check(self):
        command = ["sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS"]
        return subprocess.run(command, cwd=self.path, capture_output=True, text=True, check=False)

    @property
    def description(self):
        return json.loads((self.path / "bundle.json").read_text())

    @property
    def sums(self):
        return {line[66:]: line[:64] for line in (self.path / "SHA256SUMS").read_text().splitlines()}


@pytest.fixture
def bundle(tmp_path):
    return Bundle(tmp_path)


def test_sha256sum_accepts_the_sums_of_all_files(bundle):
    done = bundle.finish()
    assert (done.returncode, done.stderr) == (0, "")
    checked = bundle.check()
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    there = {path.relative_to(bundle.path).as_posix() for path in bundle.path.rglob("*") if path.is_file()}
    assert set(bundle.sums) == there - {"SHA256SUMS"}


def test_last_lines_tell_the_pin_and_what_was_done(bundle):
    pin, summary = bundle.finish().stdout.splitlines()[-2:]
    assert pin == f"SHA-256 of SHA256SUMS: {sha256(bundle.path / 'SHA256SUMS')}"
    assert summary == f"{bundle.path}: 8 files, 0 MB, written"


def test_second_run_changes_nothing(bundle):
    first = bundle.finish().stdout
    before = {path: path.stat().st_mtime_ns for path in bundle.path.rglob("*")}
    assert bundle.finish().stdout == first.replace("written", "unchanged")
    assert {path: path.stat().st_mtime_ns for path in bundle.path.rglob("*")} == before


def test_description_is_what_a_host_is_compared_with(bundle):
    bundle.finish()
    assert bundle.description == {
        "vllm_device": "cuda",
        "vllm_version": "0.32.0",
        "lock_sha256": sha256(bundle.lock),
        "python": "3.11",
        "model": {
            "repository": "openai/gpt-oss-120b",
            "revision": COMMIT,
            "size": sum(path.stat().st_size for path in (bundle.path / "model").iterdir()),
        },
        "suites": ["jammy", "trixie"],
    }
    wanted = {"vllm_device": "cuda", "vllm_version": "0.32.0", "lock_sha256": sha256(bundle.lock)}
    assert complaints(str(bundle.path), sha256(bundle.path / "SHA256SUMS"), wanted) == []


def test_readme_says_what_it_is(bundle):
    bundle.finish()
    readme = (bundle.path / "README.md").read_text()
    for text in ("vLLM 0.32.0 for cuda", f"openai/gpt-oss-120b {COMMIT}", "jammy, trixie", "site.yml -e vllm_bundle="):
        assert text in readme


@pytest.mark.parametrize("change", ["wheel", "new-file", "file-gone", "lock", "version"])
def test_what_changed_is_written_again(bundle, change):
    bundle.finish()
    options = {}
    if change == "wheel":
        bundle.put("wheelhouse/vllm-0.32.0-py3-none-any.whl", "another")
    elif change == "new-file":
        bundle.put("packages/trixie/Packages", "more")
    elif change == "file-gone":
        (bundle.path / "packages/trixie/InRelease").unlink()
    elif change == "lock":
        bundle.lock.write_text("vllm==0.33.0\n")
    else:
        options["version"] = "0.33.0"
    assert bundle.finish(**options).stdout.endswith(", written\n")
    assert bundle.check().returncode == 0


def test_checkpoint_is_not_hashed_again(bundle, load_tool, monkeypatch):
    """It was verified a moment ago, and has many bytes; sha256sum would find what changed since."""
    tool = load_tool("bundle")
    file = bundle.path / "model/model.safetensors"
    verified = sha256(file)
    file.write_text("damaged meanwhile")
    hashed = []
    real = tool.digest
    monkeypatch.setattr(tool, "digest", lambda path: (hashed.append(Path(path).name), real(path))[1])
    found = tool.sums(bundle.path, parse((bundle.path / "model.json").read_text()))
    assert found["model/model.safetensors"] == verified
    assert "vllm-0.32.0-py3-none-any.whl" in hashed
    assert not {"model.safetensors", "config.json"} & set(hashed)
    bundle.finish()
    assert bundle.sums["model/model.safetensors"] == verified
    assert bundle.check().returncode == 1


def test_file_beside_the_checkpoint_is_hashed(bundle):
    bundle.put("model/LICENSE", "Apache")
    bundle.finish()
    assert bundle.sums["model/LICENSE"] == sha256(bundle.path / "model/LICENSE")


def test_manifest_with_gits_checksums_only_is_enough(bundle):
    file = bundle.path / "model/config.json"
    git = subprocess.run(["git", "hash-object", "--no-filters", file], capture_output=True, text=True, check=True)
    named = {"config.json": File(file.stat().st_size, "", git.stdout.strip())}
    bundle.put("model.json", Manifest(named, "a/b", COMMIT).dump())
    assert bundle.finish().returncode == 0
    assert bundle.check().returncode == 0


def test_file_of_the_checkpoint_that_is_absent_is_told(bundle):
    """The bundle would be found out only on the hosts."""
    (bundle.path / "model/config.json").unlink()
    done = bundle.finish()
    assert done.returncode == 1
    assert done.stderr.startswith("bundle: ")
    assert "model/config.json" in done.stderr


def test_bundle_without_a_checkpoint_and_packages_says_so(bundle):
    subprocess.run(["rm", "-r", "model", "model.json", "packages"], cwd=bundle.path, check=True)
    assert bundle.finish().returncode == 0
    assert (bundle.description["model"], bundle.description["suites"]) == (None, [])
    readme = (bundle.path / "README.md").read_text()
    assert "Checkpoint: none, it is on the hosts." in readme
    assert "Debian packages for: none." in readme
    assert bundle.check().returncode == 0


def test_unfinished_work_does_not_get_in(bundle):
    bundle.put("packages/.trixie.partial/InRelease", "half")
    bundle.put("model/.staging/x", "half")
    bundle.finish()
    assert bundle.description["suites"] == ["jammy", "trixie"]
    assert not any("/." in name for name in bundle.sums)


@pytest.mark.parametrize("lost", ["lock", "directory", "manifest"])
def test_what_cannot_be_read_is_told_in_a_line(bundle, lost):
    if lost == "lock":
        bundle.lock.unlink()
    elif lost == "directory":
        bundle.path = bundle.path / "nowhere"
    else:
        bundle.put("model.json", "{half of")
    done = bundle.finish()
    assert done.returncode == 1
    assert done.stderr.startswith("bundle: ")
    assert len(done.stderr.splitlines()) == 1

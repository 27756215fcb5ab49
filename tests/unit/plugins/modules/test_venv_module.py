"""The module venv: real uv, and a wheelhouse of one tiny wheel that calls itself vLLM."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile

import pytest
from ansible_collections.nvl.vllm.plugins.modules import venv
from uv import find_uv_bin

SOURCE = "print('INFO 11-23 18:20:05 [importing.py:68] a line before')\n__version__ = '0.32.0+cpu'\n"
#: A stand-in for Python that records its calls. "-m venv" copies it; "-m pip" leaves a uv that fails.
PYTHON = """\
#!/bin/sh
echo "$*" >>{calls}
case $2 in
    venv) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    pip) printf '#!/bin/sh\\necho I am a stand-in >&2; exit 1\\n' >"${{0%/*}}/uv" && chmod +x "${{0%/*}}/uv" ;;
esac
"""


def make_wheel(folder):
    """A wheel of vLLM 0.32.0+cpu that talks when it is imported; returns its SHA-256."""
    info = "vllm-0.32.0+cpu.dist-info"
    files = {
        "vllm.py": SOURCE,
        "vllm_kernels.py": "",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    path = folder / "vllm-0.32.0+cpu-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return hashlib.sha256(path.read_bytes()).hexdigest()


class FakeHost:
    """A host below tmp_path that has wheelhouse, locks and uv."""

    def __init__(self, path, run_module):
        self.path = path
        self._run_module = run_module
        self.release = path / "opt/0.32.0-cpu-1a2b3c4d"
        self.lock, self.uv_lock = path / "cpu.txt", path / "uv.txt"
        for folder in ("wheelhouse", "opt", "uv/bin"):
            (path / folder).mkdir(parents=True)
        self.pin(make_wheel(path / "wheelhouse"))
        uv = find_uv_bin()
        (path / "uv/bin/uv").symlink_to(uv)
        version = subprocess.run([uv, "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
        self.uv_lock.write_text(f"uv=={version} --hash=sha256:00\n")

    def pin(self, sha256):
        self.lock.write_text(f"vllm==0.32.0+cpu \\\n    --hash=sha256:{sha256}\n")

    def run(self, check_mode=False, **changes):
        options = {
            "path": str(self.release),
            "lock": str(self.lock),
            "uv_lock": str(self.uv_lock),
            "uv_path": str(self.path / "uv"),
            "version": "0.32.0",
            "python": sys.executable,
            "wheelhouse": str(self.path / "wheelhouse"),
        }
        return self._run_module(venv.main, check_mode=check_mode, **{**options, **changes})

    def files(self):
        return {str(path.relative_to(self.path)) for path in (self.path / "opt").rglob("*")}

    @property
    def complete(self):
        return (self.release / ".release.json").exists()


@pytest.fixture
def host(tmp_path, run_module):
    return FakeHost(tmp_path, run_module)


def test_a_release_is_built_and_says_what_it_holds(host):
    result = host.run()
    assert result["changed"] is True
    assert (result["release"]["version"], result["release"]["packages"]) == ("0.32.0+cpu", 1)
    assert result["diff"]["after"] == "vllm==0.32.0+cpu\n"
    assert host.complete
    assert [path.name for path in (host.path / "opt").iterdir()] == [host.release.name]


@pytest.mark.parametrize("compile_bytecode", [True, False])
def test_byte_code_is_there_when_wanted_whatever_the_login_environment(host, monkeypatch, compile_bytecode):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    host.run(compile_bytecode=compile_bytecode)
    # vllm itself has been imported, to read its version.
    assert bool(list(host.release.rglob("vllm_kernels*.pyc"))) is compile_bytecode


def test_a_complete_release_is_never_touched(host):
    first = host.run()
    (host.release / "mine").write_text("")
    host.lock.write_text("")
    before = host.files()
    result = host.run(uv_path=str(host.path / "nowhere"), required_space=2**40)
    assert result["changed"] is False
    assert result["release"] == first["release"]
    assert host.files() == before


def test_what_an_interrupted_run_left_is_built_again(host):
    host.run()
    (host.release / ".release.json").unlink()
    (host.release / "half").write_text("")
    assert host.run()["changed"] is True
    assert host.complete
    assert not (host.release / "half").exists()


def test_without_the_space_nothing_is_written(host):
    result = host.run(required_space=2**40)
    assert result["failed"] is True
    free = venv.free_mib(str(host.path))
    assert f": {host.release} needs {2**40} MiB of free disk space, its file system has " in result["msg"]
    assert abs(int(result["msg"].partition("file system has ")[2].split()[0]) - free) < 1024
    assert host.files() == set()


def test_another_version_is_refused_and_not_marked(host):
    result = host.run(version="0.33.0")
    assert result["failed"] is True
    assert result["msg"].endswith(
        f": {host.release} holds vLLM 0.32.0+cpu, wanted 0.33.0: the lock file belongs to another version"
    )
    assert not host.complete
    assert host.run()["changed"] is True


def test_a_wheel_that_is_not_as_locked_is_refused_in_one_sentence(host):
    host.pin("0" * 64)
    result = host.run()
    assert result["failed"] is True
    assert "vllm==0.32.0+cpu from the wheelhouse" in result["msg"]
    assert "has a hash that the lock file does not name (sha256:" in result["msg"]
    assert not host.complete
    assert not (host.path / "opt/.uv-cache").exists()


def test_a_truncated_wheel_is_told(host):
    (wheel,) = (host.path / "wheelhouse").iterdir()
    wheel.write_bytes(wheel.read_bytes()[:-40])
    host.pin(hashlib.sha256(wheel.read_bytes()).hexdigest())
    result = host.run()
    assert result["failed"] is True
    assert result["msg"].endswith("is truncated or damaged: fetch the file again")
    assert not host.complete


def test_an_empty_wheelhouse_is_told(host):
    (wheel,) = (host.path / "wheelhouse").iterdir()
    wheel.unlink()
    assert "does not hold what the lock file names" in host.run()["msg"]


def test_check_mode_tells_and_writes_nothing(host):
    result = host.run(check_mode=True)
    assert result["changed"] is True
    assert result["diff"]["after"] == "vllm==0.32.0+cpu\n"
    assert host.files() == set()


def test_check_mode_on_a_virgin_host_has_no_lock(host):
    host.lock.unlink()
    assert host.run(check_mode=True)["changed"] is True


def test_uv_of_another_version_is_replaced_by_the_locked_one(host):
    calls, python = host.path / "calls", host.path / "python"
    python.write_text(PYTHON.format(calls=calls))
    python.chmod(0o755)
    host.uv_lock.write_text("uv==0.0.1 --hash=sha256:00\n")
    result = host.run(python=str(python))
    assert result["msg"].endswith("failed: I am a stand-in")
    assert calls.read_text().splitlines() == [
        f"-m venv {host.path}/uv",
        "-m pip install --quiet --no-deps --disable-pip-version-check --require-hashes --no-index "
        f"--find-links {host.path}/wheelhouse -r {host.uv_lock}",
    ]

"""What users install holds all of it, the retry policy included, which the clone has as a link."""

from __future__ import annotations

import os
import subprocess
import tarfile
import zipfile
from pathlib import Path

CLIENT = Path(__file__).resolve().parents[1]
POLICY = (CLIENT / "../plugins/module_utils/_retry_policy.py").read_text()


def test_a_wheel_and_a_source_archive_hold_the_policy(tmp_path):
    # uv brings the build backend with it: nothing is downloaded.
    for kind in ("--wheel", "--sdist"):
        subprocess.run(["uv", "build", "--offline", kind, "-o", tmp_path, CLIENT], check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name and not name.endswith("/")}
        assert wheel.read("agentic_client/_retry_policy.py").decode() == POLICY
    sources = {f"agentic_client/{path.name}" for path in (CLIENT / "src/agentic_client").iterdir() if path.is_file()}
    assert names == sources
    assert "agentic_client/py.typed" in names
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        policy = next(member for member in archive if member.name.endswith("/_retry_policy.py"))
        assert policy.isfile()


def test_the_policy_is_one_file():
    link = CLIENT / "src/agentic_client/_retry_policy.py"
    assert os.readlink(link) == "../../../plugins/module_utils/_retry_policy.py"

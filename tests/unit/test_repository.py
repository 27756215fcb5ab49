"""What the files of this repository have to keep to."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
#: Paths of machines that this was written on; in pieces, so that this file does not name them either.
MACHINE_PATHS = re.compile("|".join(("/" + "work/", "/opt/" + "wheels", "/" + r"root/\.(?!ssh)")))


def files() -> list[Path]:
    """All files that git has or would take."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_file_names_a_path_of_the_machine_it_was_written_on():
    named = {}
    for path in files():
        match = MACHINE_PATHS.search(path.read_text(errors="ignore"))
        if match:
            named[str(path.relative_to(ROOT))] = match[0]
    assert named == {}


@pytest.mark.parametrize("text", ["cd /" + "work/main", "--find-links /opt/" + "wheels", "/" + "root/.cache"])
def test_such_a_path_would_be_seen(text):
    assert MACHINE_PATHS.search(text)


def test_the_changelog_knows_the_version():
    version = yaml.safe_load((ROOT / "galaxy.yml").read_text())["version"]
    assert re.search(rf"^## \[?{re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_readme_names_the_playbooks_that_there_are():
    named = set(re.findall(r"playbooks/([\w-]+\.yml)", (ROOT / "README.md").read_text()))
    assert named == {path.name for path in ROOT.glob("playbooks/*.yml")}

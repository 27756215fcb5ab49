"""playbooks/doctor.yml itself, on hosts that are away: an old report never looks like this run's answer."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
AWAY = {"ansible_host": "127.0.0.1", "ansible_port": 1}
VARIABLES = {
    "vllm_device": "cpu",
    "vllm_model_source": "host",
    "vllm_model_directory": "/srv/model",
    "vllm_instances": [{"name": "primary", "port": 8001}],
}
FORMER = {"one": {"findings": [], "unknown": []}}


class Run:
    """One run of the playbook beside the report of a former one, on which all was well."""

    def __init__(self, directory: Path, *arguments: str, **variables: Any) -> None:
        inventory = {"vllm": {"hosts": {"one": AWAY, "two": AWAY}, "vars": VARIABLES | variables}}
        (directory / "hosts.yml").write_text(yaml.safe_dump(inventory))
        self.report = directory / "doctor.json"
        self.report.write_text(json.dumps(FORMER))
        done = subprocess.run(
            [
                *(Path(sys.executable).parent / "ansible-playbook", "-i", directory / "hosts.yml"),
                *(ROOT / "playbooks/doctor.yml", "-e", f"vllm_doctor_report={self.report}", *arguments),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        self.code, self.shown = done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text('"You are kind."\n"You are s3cr3t."\n')
    return path


@pytest.fixture(scope="module")
def away(tmp_path_factory: pytest.TempPathFactory, prompts: Path) -> Run:
    """A boolean as operators give it, which is a string."""
    given = (f"vllm_doctor_prompts={prompts}", "vllm_doctor_show_prompts=false")
    return Run(tmp_path_factory.mktemp("away"), *(word for one in given for word in ("-e", one)))


def test_hosts_that_are_away_are_in_the_report(away: Run):
    assert away.code == 4, away.shown
    found = json.loads(away.report.read_text())
    assert [(name, one["findings"]) for name, one in found.items()] == [("one", []), ("two", [])]
    assert all("Connection refused" in one["unknown"][0] for one in found.values())
    assert stat.S_IMODE(away.report.stat().st_mode) == 0o600
    assert "one 1 not looked at" in away.shown
    assert "healthy" not in away.shown


def test_prompts_are_compared_and_not_shown(away: Run):
    assert "share their first 8 characters of 13" in away.shown
    assert "s3cr3t" not in away.shown


def test_a_file_that_holds_no_prompts_does_not_end_the_run(tmp_path: Path):
    (tmp_path / "bad.jsonl").write_text("no json\n")
    done = Run(tmp_path, "-e", f"vllm_doctor_prompts={tmp_path}/bad.jsonl")
    assert done.code == 4, done.shown
    assert "line 1: wanted a prompt as a JSON string" in done.shown
    assert "the prompts could not be compared" in done.shown
    assert sorted(json.loads(done.report.read_text())) == ["one", "two"]


def test_a_wrong_declaration_leaves_no_old_report(tmp_path: Path):
    done = Run(tmp_path, vllm_instances=[])
    assert done.code == 2, done.shown
    assert "wanted a list of one instance or more" in done.shown
    assert not done.report.exists()

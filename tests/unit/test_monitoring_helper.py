"""The helper of the monitoring units: does a unit run from what is on disk?"""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
ROLE = ROOT / "roles/vllm_monitoring"
UNIT = "vllm-prometheus"


@pytest.fixture
def helper(tmp_path, monkeypatch):
    loader = SourceFileLoader("vllm_monitoring_helper", str(ROLE / "files/vllm-monitoring"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    found = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(found)
    (tmp_path / "run" / UNIT).mkdir(parents=True)
    (tmp_path / "rules").mkdir()
    for name in (f"{UNIT}.service", "program", "settings", "rules/a.yml"):
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(found, "RUNTIME", str(tmp_path / "run"))
    monkeypatch.setattr(found, "UNITS", str(tmp_path))
    found.main(["note", UNIT, *(str(tmp_path / name) for name in ("program", "settings", "rules"))])
    return found


def test_what_runs_from_the_files_is_left_alone(helper):
    assert helper.state(UNIT, active=True) == "started"


def test_what_does_not_run_is_started(helper, tmp_path):
    (tmp_path / "settings").write_text("2")
    assert helper.state(UNIT, active=False) == "started"


@pytest.mark.parametrize("name", ["settings", "rules/a.yml", "rules/b.yml"])
def test_changed_files_are_read_again(helper, tmp_path, name):
    (tmp_path / name).write_text("2")
    assert helper.state(UNIT, active=True) == "reloaded"
    helper.main(["reloaded", UNIT])
    assert helper.state(UNIT, active=True) == "started"


@pytest.mark.parametrize("name", [f"{UNIT}.service", "program"])
def test_a_changed_unit_or_program_is_a_restart(helper, tmp_path, name):
    (tmp_path / name).write_text("22")
    assert helper.state(UNIT, active=True) == "restarted"
    # Reading the files again does not make up for it.
    helper.main(["reloaded", UNIT])
    assert helper.state(UNIT, active=True) == "restarted"


def test_a_removed_rule_is_seen_and_a_file_of_others_is_not(helper, tmp_path):
    (tmp_path / "rules/notes.txt").write_text("1")
    assert helper.state(UNIT, active=True) == "started"
    (tmp_path / "rules/a.yml").unlink()
    assert helper.state(UNIT, active=True) == "reloaded"


def test_what_nobody_noted_is_restarted(helper, tmp_path):
    (tmp_path / "run" / UNIT / "running.json").write_text("{")
    assert helper.state(UNIT, active=True) == "restarted"


def test_a_wrong_call_is_refused(helper, capsys):
    assert helper.main(["note", UNIT]) == 2
    assert "usage" in capsys.readouterr().err


def test_the_text_files_writer_is_copied_with_all_that_it_imports():
    utils = ROOT / "plugins/module_utils"
    wanted, found = ["_monitoring_textfile"], set()
    while wanted:
        name = wanted.pop()
        if name not in found:
            found.add(name)
            for line in (utils / f"{name}.py").read_text().splitlines():
                if line.startswith("from . import "):
                    wanted.append(line.split()[3])
                elif line.startswith("from ._"):
                    wanted.append(line.split()[1].lstrip("."))
    variables = yaml.safe_load((ROLE / "vars/main.yml").read_text())
    sources = json.dumps(variables["__vllm_monitoring_textfile_files"])
    assert {name for name in ("_agent", *found) if f"/{name}.py" in sources} == found

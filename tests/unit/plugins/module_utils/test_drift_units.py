"""Units and processes against what is declared; recorded answers of systemd 252, and real processes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _drift_units as units
from ansible_collections.nvl.vllm.plugins.module_utils._drift_kinds import MASK, Report
from ansible_collections.nvl.vllm.plugins.module_utils._drift_units import Process

PRIMARY = "vllm@primary.service"
#: systemctl show of two units, as systemd 252 answers.
SHOWN = """\
MainPID=4369
Result=success
NRestarts=1
Id=vllm@primary.service
LoadState=loaded
ActiveState=active
SubState=running
FragmentPath=/etc/systemd/system/vllm@.service
DropInPaths=
UnitFileState=enabled
NeedDaemonReload=no

Id=vllm.target
LoadState=loaded
ActiveState=active
SubState=active
FragmentPath=/etc/systemd/system/vllm.target
DropInPaths=
UnitFileState=enabled
NeedDaemonReload=no
"""
ARGV = ["/opt/vllm/current/bin/vllm", "serve", "--config", "/etc/vllm/primary.yaml"]


def kinds(report):
    return [(item["kind"], item["where"]) for item in report.findings]


def shown(**changes):
    found = units.parse_units(SHOWN)
    found[PRIMARY].update(changes)
    return found


def test_units_as_declared_give_nothing():
    report = Report("runtime")
    units.compare_units(shown(), [PRIMARY, "vllm.target"], report)
    assert report.findings == []
    assert report.unknown == []


@pytest.mark.parametrize(
    ("changes", "kind", "found"),
    [
        ({"ActiveState": "inactive"}, "unit_not_active", "inactive"),
        ({"ActiveState": "failed", "Result": "start-limit-hit"}, "unit_not_active", "failed (start-limit-hit)"),
        ({"LoadState": "masked", "ActiveState": "inactive"}, "unit_not_active", "the unit is masked, and inactive"),
        ({"LoadState": "not-found", "ActiveState": ""}, "unit_not_active", "the unit is not-found, and not there"),
        ({"ActiveState": "activating", "SubState": "start-post"}, "unit_starting", "activating (start-post)"),
        ({"UnitFileState": "disabled"}, "unit_not_enabled", "disabled"),
        ({"NeedDaemonReload": "yes"}, "unit_not_reloaded", "its files changed since systemd read them"),
        ({"NRestarts": "4"}, "unit_restarts", "4 restarts by systemd since it was started last"),
        (
            {"FragmentPath": "/run/systemd/transient/vllm@primary.service"},
            "unit_override",
            "the unit file /run/systemd/transient/vllm@primary.service counts",
        ),
    ],
)
def test_a_state_that_is_not_as_declared(changes, kind, found):
    report = Report("runtime")
    units.compare_units(shown(**changes), [PRIMARY], report)
    assert [(item["kind"], item["where"], item["found"]) for item in report.findings] == [(kind, PRIMARY, found)]


def test_a_few_restarts_are_no_note_and_a_masked_unit_is_one_finding():
    report = Report("runtime")
    units.compare_units(shown(NRestarts="3"), [PRIMARY], report)
    assert report.findings == []


def test_a_unit_that_systemd_says_nothing_of_is_unknown():
    report = Report("runtime")
    units.compare_units({}, [PRIMARY], report)
    assert len(report.unknown) == 1
    assert PRIMARY in report.unknown[0]


def test_a_drop_in_is_told_with_its_text_and_without_its_secrets(tmp_path):
    folder = tmp_path / "etc/vllm@primary.service.d"
    folder.mkdir(parents=True)
    (folder / "override.conf").write_text("[Service]\nEnvironment=HF_TOKEN=hf_abc\nNice=5\n")
    (tmp_path / "etc/vllm@.service.d").mkdir()
    (tmp_path / "etc/vllm@.service.d/all.conf").write_text("[Service]\n")
    (tmp_path / "etc/vllm@other.service.d").mkdir()
    (tmp_path / "etc/vllm@other.service.d/x.conf").write_text("")
    paths = units.drop_ins(PRIMARY, [str(tmp_path / "etc"), str(tmp_path / "run")])
    assert [path.rpartition("/")[2] for path in paths] == ["all.conf", "override.conf"]

    report = Report("runtime")
    loaded = str(folder / "override.conf")
    texts = {f"{PRIMARY} {path}": Path(path).read_text() for path in paths}
    units.compare_units(
        shown(DropInPaths=f"{loaded} /usr/lib/systemd/system/service.d/x.conf"), [PRIMARY], report, texts=texts
    )
    override, everyone = report.findings
    assert override["where"] == f"{PRIMARY} {loaded}"
    assert override["diff"] == f"[Service]\nEnvironment=HF_TOKEN={MASK}\nNice=5"
    assert everyone["found"].endswith(", once systemd reads it")


def test_units_that_nobody_declared():
    report = Report("runtime")
    known = {
        PRIMARY: {"ActiveState": "active", "UnitFileState": "enabled"},
        "vllm@gone.service": {"ActiveState": "inactive", "UnitFileState": "enabled"},
        "vllm@old.service": {"ActiveState": "active", "UnitFileState": "disabled"},
        "vllm@dead.service": {"ActiveState": "inactive", "UnitFileState": "disabled"},
        "vllm-gateway.service": {"ActiveState": "inactive", "UnitFileState": ""},
    }
    units.compare_undeclared_units(known, [PRIMARY], report)
    assert kinds(report) == [("undeclared_unit", "vllm@gone.service"), ("undeclared_unit", "vllm@old.service")]


@pytest.mark.parametrize(
    ("argv", "engine"),
    [
        (["/opt/vllm/x/bin/python", *ARGV], True),
        (["python3.11", "/usr/bin/vllm", "serve", "model"], True),
        (["vllm", "serve", "model"], True),
        (["python3", "-m", "vllm.entrypoints.openai.api_server"], True),
        (["VLLM::EngineCore"], True),
        (["grep", "vllm", "serve"], False),
        (["/opt/vllm/x/bin/python", "-c", "from multiprocessing.resource_tracker import main;main(30)"], False),
        (["vim", "/etc/vllm/primary.yaml"], False),
        (["python3", "-I", "/usr/local/libexec/vllm-health", "run"], False),
        ([""], False),
        ([], False),
    ],
)
def test_what_looks_like_an_engine(argv, engine):
    assert units.is_engine(argv) is engine


def test_arguments():
    report = Report("runtime")
    units.compare_arguments(PRIMARY, Process(1, ["/opt/vllm/x/bin/python", *ARGV]), ARGV, report)
    assert report.findings == []
    more = [*ARGV, "--max-model-len", "2048", "--api-key", "sk-1"]
    units.compare_arguments(PRIMARY, Process(1, ["/opt/vllm/x/bin/python3.11", *more]), ARGV, report)
    assert kinds(report) == [("process_arguments", PRIMARY)]
    assert report.findings[0]["found"].endswith(f"--max-model-len 2048 --api-key {MASK}")


def test_a_title_tells_no_arguments():
    report = Report("runtime")
    units.compare_arguments(PRIMARY, Process(1, ["VLLM::APIServer"]), ARGV, report)
    assert report.findings == []
    assert "VLLM::APIServer" in report.unknown[0]


def test_environment_of_files():
    text = '#\n; x\nA="1"\nB="a \\"b\\" \\\\n \\$x"\nC=\'x y\'\nD=plain\nA="2"\n\nE=\n'
    assert units.parse_environment_file(text) == {"A": "2", "B": 'a "b" \\n $x', "C": "x y", "D": "plain", "E": ""}
    unit = '[Service]\nEnvironment=A=1 "B=x y"\nEnvironmentFile=/etc/x\n#Environment=C=1\n'
    assert units.unit_environment(unit) == {"A": "1", "B": "x y"}


def test_environment_of_a_process():
    report = Report("runtime")
    process = Process(
        1,
        environment={
            "PATH": "/bin",
            "INVOCATION_ID": "1",
            "SAME": "1",
            "OTHER": "old",
            "VLLM_API_KEY": "sk-found",
            "EXTRA": "1",
            "https_proxy": "http://jo:pass@proxy",
        },
    )
    wanted = {"SAME": "1", "OTHER": "new", "VLLM_API_KEY": "sk-wanted", "GONE": "1", "HF_TOKEN": "hf_wanted"}
    units.compare_environment(PRIMARY, process, wanted, {"https_proxy": "http://jo:pass@proxy"}, report)
    found = {item["where"].split()[1]: item for item in report.findings}
    assert sorted(found) == ["EXTRA", "GONE", "HF_TOKEN", "OTHER", "VLLM_API_KEY", "https_proxy"]
    assert found["https_proxy"]["kind"] == "inherited_environment"
    assert {item["kind"] for name, item in found.items() if name != "https_proxy"} == {"process_environment"}
    assert (found["OTHER"]["found"], found["OTHER"]["wanted"]) == ("set to 'old'", "set to 'new'")
    assert found["GONE"]["found"] == "not set"
    for secret in ("sk-found", "sk-wanted", "hf_wanted", "pass"):
        assert secret not in str(report.findings)


@pytest.mark.parametrize(
    ("key", "declared", "found"),
    [
        ("a", "a", None),
        ("", "", None),
        ("b", "a", "another key than declared"),
        ("b", "", "a key"),
        ("", "a", "no key"),
    ],
)
def test_the_key_is_compared_by_its_hash(key, declared, found):
    report = Report("runtime")
    process = Process(1, environment={"VLLM_API_KEY": key} if key else {})
    units.compare_key(PRIMARY, process, hashlib.sha256(declared.encode()).hexdigest() if declared else "", report)
    assert [item["found"] for item in report.findings] == ([found] if found else [])


def test_engines_outside_of_units_are_one_finding_for_each_owner():
    report = Report("runtime")
    found = [
        Process(10, ["vllm", "serve"], unit=PRIMARY),
        Process(11, ["vllm", "serve", "--api-key", "x9x9"], uid=1000),
        Process(12, ["VLLM::EngineCore"], uid=1000),
        Process(13, ["vllm", "serve"], unit="mine.service", uid=0),
    ]
    units.compare_engines(found, [PRIMARY], report)
    assert kinds(report) == [("undeclared_engine", "mine.service"), ("undeclared_engine", "user 1000")]
    assert report.findings[1]["found"] == f"process 11 (vllm serve --api-key {MASK}) and 1 more"
    assert "x9x9" not in str(report.findings)


def test_a_real_process_is_read(tmp_path):
    script = tmp_path / "vllm"
    script.write_text("print('up', flush=True)\ninput()\n")
    argv = [sys.executable, str(script), "serve", "model"]
    with subprocess.Popen(
        argv, env={"A": "1", "B": "x=y"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "up\n"
        found = next(process for process in units.engines_running() if process.pid == child.pid)
        assert found.argv == argv
        assert found.environment["A"] == "1"
        assert found.environment["B"] == "x=y"
        assert found.uid == os.getuid()
        assert abs(found.started - time.time()) < 60
        assert not found.replaced(os.path.realpath(sys.executable))
        child.communicate("\n")
    assert units.read_process(child.pid) is None


def test_a_program_is_replaced(tmp_path):
    program = tmp_path / "python"
    program.write_text("")
    now = time.time()
    assert Process(1, program="/usr/bin/python3.11 (deleted)").replaced("/nowhere")
    assert not Process(1, program="/usr/bin/python3.11").replaced("/nowhere")
    # Where /proc does not show it, its time decides.
    assert Process(1, started=now - 100).replaced(str(program))
    assert not Process(1, started=now + 100).replaced(str(program))


def test_files_that_changed_since(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("")
    new.write_text("")
    before = time.time() - 100
    assert units.changed_since([str(old), str(tmp_path / "none")], before) == [str(old)]
    assert units.changed_since([str(new)], time.time() + 100) == []

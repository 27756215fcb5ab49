"""The module units against a stand-in for systemctl and journalctl."""

from __future__ import annotations

import json
import sys

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _unit
from ansible_collections.nvl.vllm.plugins.modules import units

#: A stand-in for systemctl and journalctl: it keeps the units in a JSON file, records each call, and lets a start of
#: what "broken" names fail, as the real one does.
STAND_IN = """\
#!{python}
import json, pathlib, sys
here = pathlib.Path(__file__).parent
program = pathlib.Path(__file__).name
argv = sys.argv[1:]
with (here / "calls").open("a") as stream:
    print(program, *argv, file=stream)
state = json.loads((here / "state.json").read_text())
if program == "journalctl":
    print(state["journal"])
    sys.exit()
verb, names = argv[0], [word for word in argv[1:] if not word.startswith("--")]
status = 0
for name in names:
    unit = state["units"].setdefault(name, {{"ActiveState": "inactive", "UnitFileState": "disabled"}})
    if verb == "show":
        for key, value in unit.items():
            print(f"{{key}}={{value}}")
    elif verb in ("start", "restart"):
        unit["ActiveState"] = "failed" if name in state["broken"] else "active"
        status = int(name in state["broken"])
    elif verb in ("enable", "disable"):
        unit["UnitFileState"] = verb + "d"
        if "--now" in argv:
            unit["ActiveState"] = "inactive"
    elif verb == "is-enabled":
        status = int(unit["UnitFileState"] != "enabled")
    elif verb == "is-active":
        status = 0 if unit["ActiveState"] == "active" else 3
(here / "state.json").write_text(json.dumps(state))
sys.exit(status)
"""
READING = ("show", "is-enabled", "is-active")
RUNNING = {"ActiveState": "active", "UnitFileState": "enabled", "NeedDaemonReload": "no", "LoadState": "loaded"}
REASON = "OSError: [Errno 98] Address already in use"


class FakeHost:
    """A host on which both engines run from what is on disk."""

    def __init__(self, path, run_module):
        self.path = path
        self._run_module = run_module
        self.paths = _unit.Paths(str(path / "state"), str(path / "etc"), str(path / "units"))
        for folder in ("bin", "etc", "units/vllm.target.wants", "opt/a", "model"):
            (path / folder).mkdir(parents=True)
        (path / "opt/current").symlink_to(path / "opt/a")
        (path / "units/vllm@.service").write_text("[Service]\n")
        for program in ("systemctl", "journalctl"):
            (path / "bin" / program).write_text(STAND_IN.format(python=sys.executable))
            (path / "bin" / program).chmod(0o755)
        self.state = {"units": {"vllm.target": dict(RUNNING)}, "broken": [], "journal": f"a line\n{REASON}"}
        for name in ("primary", "secondary"):
            self.add(name)
        self.write()

    def write(self):
        (self.path / "bin/state.json").write_text(json.dumps(self.state))

    def add(self, name):
        (self.path / f"etc/{name}.yaml").write_text("port: 1\n")
        (self.path / f"etc/{name}.env").write_text("A=1\n")
        (self.path / f"units/vllm.target.wants/vllm@{name}.service").symlink_to("../vllm@.service")
        self.unit(name, **RUNNING)
        self.record(name)

    def unit(self, name, **properties):
        self.state["units"].setdefault(f"vllm@{name}.service", {}).update(properties)
        self.write()

    def record(self, name):
        """Let the engine run from what is on disk now."""
        now = _unit.fingerprint(name, str(self.path / "opt"), str(self.path / "model"), self.paths)
        _unit.write_state(name, {"fingerprint": now, "failed_starts": 0}, self.paths)

    def run(self, check_mode=False, instances=("primary", "secondary")):
        return self._run_module(
            units.main,
            check_mode=check_mode,
            instances=list(instances),
            root=str(self.path / "opt"),
            model_path=str(self.path / "model"),
        )

    @property
    def changing_calls(self):
        lines = (self.path / "bin/calls").read_text().splitlines()
        calls = [line.removeprefix("systemctl ") for line in lines if line.startswith("systemctl ")]
        return [call for call in calls if call.split()[0] not in READING]


@pytest.fixture
def host(tmp_path, monkeypatch, run_module):
    made = FakeHost(tmp_path, run_module)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(units, "CONFIG", made.paths.config)
    monkeypatch.setattr(units, "STATE", made.paths.state)
    monkeypatch.setattr(units, "UNITS", made.paths.units)
    # These take their paths from a default, which is an object of the function.
    for function in (_unit.fingerprint, _unit.read_state):
        monkeypatch.setattr(function, "__defaults__", (made.paths,))
    return made


def test_running_engines_are_left_alone(host):
    result = host.run()
    assert result["changed"] is False
    assert result["instances"] == {"primary": "none", "secondary": "none"}
    assert result["removed"] == []
    assert result["seconds"] == {}
    assert result["diff"] == {"before": "", "after": ""}
    assert host.changing_calls == []


def test_only_the_engine_whose_inputs_changed_is_restarted(host):
    (host.path / "etc/secondary.yaml").write_text("port: 2\n")
    result = host.run()
    assert result["changed"] is True
    assert result["instances"] == {"primary": "none", "secondary": "restarted"}
    assert list(result["seconds"]) == ["secondary"]
    assert host.changing_calls == ["reset-failed vllm@secondary.service", "restart vllm@secondary.service"]


def test_stopped_engines_are_started_in_the_order_declared(host):
    for name in ("primary", "secondary"):
        host.unit(name, ActiveState="inactive")
    result = host.run(instances=["secondary", "primary"])
    assert result["instances"] == {"secondary": "started", "primary": "started"}
    assert [call for call in host.changing_calls if call.startswith("start ")] == [
        "start vllm@secondary.service",
        "start vllm@primary.service",
    ]


def test_fingerprints_are_those_on_disk(host):
    result = host.run()
    expected = {name: _unit.read_state(name, host.paths)["fingerprint"] for name in ("primary", "secondary")}
    assert result["fingerprints"] == expected


def test_what_is_not_enabled_is_enabled_and_not_started_again(host):
    host.unit("primary", UnitFileState="disabled")
    result = host.run()
    assert result["changed"] is True
    assert host.changing_calls == ["enable --quiet vllm.target vllm@primary.service"]


def test_a_target_that_is_down_is_started(host):
    host.state["units"]["vllm.target"].update(ActiveState="inactive", UnitFileState="disabled")
    host.write()
    host.run()
    assert host.changing_calls == ["enable --quiet vllm.target", "start vllm.target"]


def test_a_unit_that_changed_on_disk_is_read_again_before_its_restart(host):
    (host.path / "units/vllm@.service").write_text("[Service]\nNice=5\n")
    for name in ("primary", "secondary"):
        host.unit(name, NeedDaemonReload="yes")
    host.run()
    assert host.changing_calls[0] == "daemon-reload"
    assert "restart vllm@primary.service" in host.changing_calls


def test_a_failed_start_is_told_with_its_reason_and_the_rest_is_left(host):
    for name in ("primary", "secondary"):
        (host.path / f"etc/{name}.yaml").write_text("port: 2\n")
    host.state["broken"] = ["vllm@primary.service"]
    host.write()
    result = host.run()
    assert result["failed"] is True
    assert f": vllm@primary.service did not come up: {REASON}; the other instances were left" in result["msg"]
    assert result["msg"].endswith("(journalctl -u vllm@primary.service has all of it)")
    assert result["journal"] == ["a line", REASON]
    assert host.changing_calls == ["reset-failed vllm@primary.service", "restart vllm@primary.service"]


def test_the_journal_is_read_from_before_the_start(host, monkeypatch):
    monkeypatch.setattr(units.time, "time", lambda: 1_700_000_000.9)
    host.unit("primary", ActiveState="failed")
    host.state["broken"] = ["vllm@primary.service"]
    host.write()
    host.run()
    (call,) = [line for line in (host.path / "bin/calls").read_text().splitlines() if line.startswith("journalctl")]
    assert call == "journalctl --unit vllm@primary.service --since @1700000000 --output cat --no-pager"


def test_after_a_failed_start_the_next_run_does_the_rest(host):
    (host.path / "etc/primary.yaml").write_text("port: 2\n")
    host.state["broken"] = ["vllm@primary.service"]
    host.write()
    host.run()
    host.state = json.loads((host.path / "bin/state.json").read_text())
    host.state["broken"] = []
    host.write()
    assert host.run()["instances"] == {"primary": "started", "secondary": "none"}
    assert host.changing_calls[-1] == "start vllm@primary.service"


def test_what_is_no_longer_declared_is_removed(host):
    result = host.run(instances=["primary"])
    assert result["changed"] is True
    assert result["removed"] == ["secondary"]
    assert host.changing_calls == ["disable --now vllm@secondary.service"]
    left = {str(path.relative_to(host.path)) for folder in ("etc", "state") for path in (host.path / folder).iterdir()}
    assert left == {"etc/primary.yaml", "etc/primary.env", "state/primary.json"}


def test_a_removal_that_was_interrupted_after_its_files_is_finished(host):
    for path in ("etc/secondary.yaml", "etc/secondary.env", "state/secondary.json"):
        (host.path / path).unlink()
    assert host.run(instances=["primary"])["removed"] == ["secondary"]


def test_files_of_an_instance_that_is_not_enabled_are_removed_too(host):
    (host.path / "units/vllm.target.wants/vllm@secondary.service").unlink()
    assert host.run(instances=["primary"])["removed"] == ["secondary"]
    assert not (host.path / "etc/secondary.env").exists()


def test_a_systemctl_that_fails_is_quoted(host):
    (host.path / "bin/systemctl").write_text("#!/bin/sh\necho 'Failed to connect to bus' >&2\nexit 1\n")
    result = host.run()
    assert result["failed"] is True
    assert "systemctl show" in result["msg"]
    assert result["msg"].endswith("failed: Failed to connect to bus")


def test_check_mode_tells_and_touches_nothing(host):
    host.add("old")
    host.unit("primary", ActiveState="failed", UnitFileState="disabled", NeedDaemonReload="yes")
    (host.path / "etc/secondary.yaml").write_text("port: 2\n")
    result = host.run(check_mode=True)
    assert result["changed"] is True
    assert result["instances"] == {"primary": "started", "secondary": "restarted"}
    assert result["removed"] == ["old"]
    assert result["diff"]["before"].splitlines()[0] == "vllm@primary.service not enabled"
    assert (host.path / "etc/old.yaml").exists()
    assert host.changing_calls == []

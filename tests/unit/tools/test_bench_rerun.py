"""What a run that changes nothing costs, with playbooks that only say they ran."""

from __future__ import annotations

import sys

import pytest

import bench_rerun

SITE = "TASK [a]\nok: [h]\nTASK [b]\nok: [h]\nPLAY RECAP ***\nh : ok=2 changed=%d failed=0\n"
LOOK = "TASK [a]\nTASK [b]\nTASK [c]\nPLAY RECAP ***\nh : ok=3 changed=0\n"


@pytest.fixture
def runs(monkeypatch):
    """The runs of playbooks by their order; what site.yml changes may be set."""
    outputs = {"site.yml": (SITE % 0, 20.0), "playbooks/drift.yml": (LOOK, 23.0)}
    monkeypatch.setattr(bench_rerun, "run", lambda _, playbook: outputs.get(playbook, ("", 10.0)))
    monkeypatch.setattr(sys, "argv", ["bench_rerun"])
    return outputs


def test_the_drift_check_is_measured_beside_the_deploy(runs, capsys):
    bench_rerun.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1] == ["site.yml", "2", "20.0", "changed=0"]
    assert rows[2] == ["ping", "2", "10.0", "ratio", "2.0"]
    assert rows[3] == ["drift.yml", "3", "23.0", "1.15", "of", "site.yml"]


def test_a_run_that_changes_something_is_no_measure(runs):
    runs["site.yml"] = (SITE % 1, 20.0)
    with pytest.raises(SystemExit, match="change nothing"):
        bench_rerun.main()

"""The alert rules with the role's defaults: each fires when it is to, is silent when it is not, and is explained."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from ansible_collections.nvl.vllm.plugins.module_utils import _drift_output, _gpu_metrics, _monitoring_textfile

from metric_names import names_on, of_rules, unknown

ROOT = Path(__file__).parents[2]
ROLE = ROOT / "roles/vllm_monitoring"
CASES = sorted(Path(__file__).parent.glob("rules/*.yml"))
PAGES = [ROOT / "tests/unit/data/metrics-0.32.0.txt", *(ROOT / "tests/unit/data/metrics").glob("*.txt")]


def alerts_in(directory: Path) -> dict[str, dict]:
    """All alerts by name."""
    groups = [group for path in directory.glob("*.yml") for group in yaml.safe_load(path.read_text())["groups"]]
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


@pytest.fixture(scope="module")
def alerts(rules: Path) -> dict[str, dict]:
    return alerts_in(rules)


@pytest.fixture(scope="module")
def checks() -> list[tuple[str, str, list[str]]]:
    """Name of the case, alert, and the labels of what is to fire, of all checks of all cases."""
    found = []
    for path in CASES:
        for case in yaml.safe_load(path.read_text())["tests"]:
            for check in case["promql_expr_test"]:
                alert = re.search(r'alertname="(\w+)"', check["expr"])
                found.append((case["name"], alert[1], [sample["labels"] for sample in check["exp_samples"]]))
    return found


def test_the_rules_are_valid(rules, promtool):
    subprocess.run([promtool, "check", "rules", "--lint-fatal", *sorted(rules.glob("*.yml"))], check=True)


@pytest.mark.parametrize("cases", CASES, ids=lambda path: path.stem)
def test_the_rules_do_what_the_cases_say(rules, promtool, tmp_path, cases):
    for path in (rules / f"nvl-vllm-{cases.stem}.yml", cases):
        shutil.copy(path, tmp_path)
    done = subprocess.run(
        [promtool, "test", "rules", cases.name], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_cases_in_which_it_fires_and_in_which_it_does_not(alerts, checks):
    fires = {alert for name, alert, samples in checks if name.startswith(f"{alert} fires") and samples}
    silent = {alert for name, alert, samples in checks if name.startswith(f"{alert} stays silent") and not samples}
    assert fires == set(alerts)
    assert silent == set(alerts)


def test_what_an_alert_says_of_its_labels_is_there(alerts, checks):
    for _, alert, samples in checks:
        text = " ".join(alerts[alert]["annotations"].values())
        for label in re.findall(r"\$labels\.(\w+)", text):
            assert all(f'{label}="' in sample for sample in samples), (alert, label)


def test_every_alert_is_explained(alerts):
    runbook = (ROOT / "docs/runbook.md").read_text()
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", runbook, re.MULTILINE | re.DOTALL))
    assert set(alerts) <= set(sections)
    for name, rule in alerts.items():
        assert rule["labels"]["severity"] in ("critical", "warning"), name
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}, name
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{name.lower()}"
        for part in ("**Means.**", "**Look.**", "**Do.**"):
            assert part in sections[name], (name, part)


def test_the_runbook_explains_no_alert_that_is_not_there(alerts):
    runbook = (ROOT / "docs/runbook.md").read_text()
    assert set(re.findall(r"^### (\w+)$", runbook, re.MULTILINE)) == set(alerts)


def test_each_time_can_be_set(alerts, rendered, tmp_path):
    for path in (ROLE / "templates/rules").iterdir():
        text = rendered(f"rules/{path.name}", vllm_monitoring_for=dict.fromkeys(alerts, "7s"))
        (tmp_path / path.stem).write_text(text)
    assert {name: rule["for"] for name, rule in alerts_in(tmp_path).items()} == dict.fromkeys(alerts, "7s")


def test_that_there_never_was_a_drift_check_is_an_alert_only_where_checks_are_said_to_run(rendered):
    assert "absent(" in rendered("rules/host.yml.j2", vllm_monitoring_drift=True)
    assert "absent(" not in rendered("rules/host.yml.j2", vllm_monitoring_drift=False)


def test_the_rules_ask_for_what_there_is(rules):
    queries: dict[str, str] = {}
    offered = set().union(*(names_on(path.read_text()) for path in PAGES), names_on(_drift_output.prometheus({})))
    offered |= {_monitoring_textfile.CERTIFICATE}
    for path in rules.glob("*.yml"):
        of_file, made = of_rules(yaml.safe_load(path.read_text()))
        queries |= of_file
        offered |= made
    assert len(queries) > 30
    assert unknown(queries, offered) == {}


def test_objectives_are_bounds_of_the_histograms():
    page = PAGES[0].read_text()
    options = yaml.safe_load((ROLE / "meta/argument_specs.yml").read_text())["argument_specs"]["main"]["options"]
    metrics = {"ttft": "time_to_first_token", "itl": "inter_token_latency"}
    for variable, metric in metrics.items():
        bounds = {float(bound) for bound in re.findall(rf'{metric}_seconds_bucket{{[^}}]*le="([^"]+)"', page)}
        assert set(options[f"vllm_monitoring_{variable}_seconds"]["choices"]) <= bounds


def test_both_sources_of_gpu_figures_have_what_the_rules_ask_for(rules):
    queries, _ = of_rules(yaml.safe_load((rules / "nvl-vllm-gpus.yml").read_text()))
    counters = (ROLE / "files/gpu-counters.csv").read_text().splitlines()
    dcgm = {line.partition(",")[0] for line in counters if not line.startswith("#")}
    assert unknown(queries, dcgm) == {}
    assert unknown(queries, {name for name, _, _ in _gpu_metrics.METRICS}) == {}
    known = names_on((ROOT / "tests/unit/data/metrics/dcgm-exporter.txt").read_text())
    assert dcgm - known == set()
    assert {name for name, _, _ in _gpu_metrics.METRICS} - known == set()

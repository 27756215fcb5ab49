"""Prometheus, Alertmanager and the exporters on the container: what they see, and what they say when an engine fails.

Nothing is deployed to a virgin host in the tests before; this file does it, in the order of its tests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from helpers import PORTS, await_, main_pid, playbook
from testinfra.host import Host

PLAYBOOK = "playbooks/monitoring.yml"
UNITS = ("vllm-prometheus", "vllm-alertmanager", "vllm-node-exporter")
RULES = "/etc/vllm/monitoring/rules"
#: So that the tests need not wait for what people are to be spared.
QUICK = {
    "vllm_monitoring_scrape_interval": 2,
    "vllm_monitoring_for": {"EngineDown": "2s", "EngineHung": "2s", "OneEndpointLeft": "0s"},
}
#: Alerts and targets are there within seconds; a loaded machine takes longer.
SECONDS = 60.0
CERTIFICATE = {"vllm_monitoring_certificates": ["/srv/of-a-test.pem"]}


def get(host: Host, address: str) -> Any:
    return json.loads(
        host.check_output("curl --silent --show-error --fail --max-time 10 %s", f"http://127.0.0.1:{address}")
    )


def alerts(host: Host, states: str = "silenced=false&inhibited=false") -> dict[tuple[str, str], dict[str, Any]]:
    """What Alertmanager would tell somebody, by alert and instance; or all in other states."""
    found = get(host, f"9093/api/v2/alerts?{states}")
    return {(one["labels"]["alertname"], one["labels"].get("instance", "")): one for one in found}


def units(host: Host) -> list[str]:
    return host.check_output(
        "cd /etc/systemd/system && ls | grep -E 'prometheus|alertmanager|exporter|textfile' || true"
    ).split()


@pytest.fixture(scope="module")
def monitored(host: Host) -> None:
    """The role with its defaults, but in a hurry, and with a certificate that ends soon."""
    host.run_expect(
        [0],
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 5 -subj /CN=test"
        " -keyout /srv/of-a-test.pem -out /srv/of-a-test.crt && cat /srv/of-a-test.crt >>/srv/of-a-test.pem",
    )
    done = playbook(PLAYBOOK, **QUICK, **CERTIFICATE)
    assert done.returncode == 0, done.stdout


@pytest.mark.more
def test_check_mode_on_a_host_without_monitoring(host: Host) -> None:
    before = units(host)
    done = playbook(PLAYBOOK, "--check", "--diff")
    assert done.returncode == 0, done.stdout
    assert "vllm-prometheus" in done.stdout
    assert units(host) == before == []
    assert not host.file("/etc/vllm/monitoring").exists


def test_an_existing_prometheus_gets_targets_and_rules_and_nothing_is_installed(host: Host) -> None:
    here = "/srv/of-the-operator"
    names = ("targets", "rules", "dashboards", "grafana_provisioning")
    directories = {f"vllm_monitoring_{name}_directory": f"{here}/{name}" for name in names}
    host.run_expect([0], f"install --directory --owner nobody --mode 0750 {here}/rules")
    done = playbook(PLAYBOOK, vllm_monitoring_prometheus="existing", vllm_monitoring_prometheus_unit="", **directories)
    assert done.returncode == 0, done.stdout
    targets = yaml.safe_load(host.file(f"{here}/targets/nvl-vllm.yml").content_string)
    assert {target["labels"]["job"] for target in targets} == {"vllm", "gateway", "health", "node"}
    assert host.file(f"{here}/rules/nvl-vllm-engines.yml").exists
    assert host.file(f"{here}/dashboards/nvl-vllm-overview.json").exists
    provider = yaml.safe_load(host.file(f"{here}/grafana_provisioning/nvl-vllm.yaml").content_string)
    assert provider["providers"][0]["options"]["path"] == f"{here}/dashboards"
    assert host.check_output(f"stat --format '%U %a' {here}/rules") == "nobody 750"
    assert units(host) == []
    assert not host.file("/etc/vllm/monitoring").exists
    assert not host.file("/usr/local/libexec/vllm-monitoring").exists
    host.run_expect([0], f"rm -r {here}")


def test_a_unit_of_the_operator_is_left_alone(host: Host) -> None:
    path = "/etc/systemd/system/prometheus-node-exporter.service"
    host.run_expect([0], f"printf '[Service]\nExecStart=/bin/true\n' >{path}")
    done = playbook(PLAYBOOK)
    assert done.returncode != 0
    assert f"{path} is a file" in " ".join(done.stdout.split()), done.stdout
    assert units(host) == ["prometheus-node-exporter.service"]
    host.run_expect([0], f"grep --quiet /bin/true {path} && rm {path}")


@pytest.mark.more
def test_figures_that_cannot_be_written_fail_the_play_with_the_reason(host: Host) -> None:
    done = playbook(PLAYBOOK, **QUICK, vllm_monitoring_certificates=["/srv/nowhere.pem"])
    assert done.returncode != 0
    assert "vllm_certificates.prom stays as it is: /srv/nowhere.pem" in " ".join(done.stdout.split()), done.stdout
    assert host.service("vllm-prometheus").is_running


@pytest.mark.usefixtures("monitored")
def test_a_second_run_changes_nothing() -> None:
    done = playbook(PLAYBOOK, **QUICK, **CERTIFICATE)
    assert done.returncode == 0, done.stdout
    assert "changed=0" in done.stdout, done.stdout


@pytest.mark.usefixtures("monitored")
def test_all_targets_are_up(host: Host) -> None:
    wanted = {(job, job) for job in ("gateway", "health", "node", "alertmanager")}
    wanted |= {("vllm", "primary"), ("vllm", "secondary")}

    def up() -> bool:
        found = get(host, "9090/api/v1/targets?state=active")["data"]["activeTargets"]
        labels = [target["labels"] for target in found if target["health"] == "up"]
        return {(each["job"], each["instance"]) for each in labels} == wanted

    await_(up, SECONDS)


@pytest.mark.usefixtures("monitored")
def test_rules_are_evaluated(host: Host) -> None:
    def evaluated() -> bool:
        groups = get(host, "9090/api/v1/rules")["data"]["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        assert [rule["lastError"] for rule in rules if rule.get("lastError")] == []
        return len(rules) > 25 and all(rule["health"] == "ok" for rule in rules)

    await_(evaluated, SECONDS)


@pytest.mark.usefixtures("monitored")
def test_only_loopback_listens(host: Host) -> None:
    lines = host.check_output("ss --listening --tcp --udp --numeric --no-header").splitlines()
    # 9094 is where Alertmanager would look for others like it.
    mine = {line.split()[4] for line in lines if line.split()[4].endswith((":9090", ":9093", ":9094", ":9100"))}
    assert mine == {"127.0.0.1:9090", "127.0.0.1:9093", "127.0.0.1:9100"}
    for unit in ("prometheus", "prometheus-alertmanager", "prometheus-node-exporter"):
        assert not host.service(unit).is_running
    for unit in UNITS:
        assert host.service(unit).is_running
        assert host.service(unit).is_enabled


@pytest.mark.usefixtures("monitored")
def test_changed_rules_are_read_without_a_restart(host: Host) -> None:
    pids = host.check_output(f"systemctl show --property=MainPID {' '.join(UNITS)}")
    state = "/usr/local/libexec/vllm-monitoring state vllm-prometheus"
    host.run_expect([0], f"touch {RULES}/of-a-test.yml")
    assert host.check_output(state) == "reloaded"
    host.run_expect([0], "systemctl reload vllm-prometheus")
    assert host.check_output(state) == "started"
    host.run_expect([0], f"printf 'groups: nonsense' >{RULES}/of-a-test.yml")
    assert host.run("systemctl reload vllm-prometheus").rc != 0
    host.run_expect([0], f"rm {RULES}/of-a-test.yml && systemctl reload vllm-prometheus")
    assert host.check_output(state) == "started"
    assert host.check_output(f"systemctl show --property=MainPID {' '.join(UNITS)}") == pids


@pytest.mark.usefixtures("monitored")
def test_a_certificate_that_ends_soon_is_an_alert(host: Host) -> None:
    await_(lambda: ("CertificateExpires", "node") in alerts(host), SECONDS)
    assert alerts(host)["CertificateExpires", "node"]["labels"]["file"] == "/srv/of-a-test.pem"


@pytest.mark.more
@pytest.mark.usefixtures("monitored")
def test_what_is_not_wanted_any_more_goes_and_leaves_the_package_its_unit(host: Host) -> None:
    done = playbook(PLAYBOOK, **QUICK, vllm_monitoring_node_exporter="existing")
    assert done.returncode == 0, done.stdout
    left = units(host)
    assert "prometheus.service" in left, "still masked"
    assert {"prometheus-node-exporter.service", "vllm-node-exporter.service", "vllm-textfile.timer"} & set(
        left
    ) == set()
    assert not host.service("vllm-node-exporter").is_running
    done = playbook(PLAYBOOK, **QUICK, **CERTIFICATE)
    assert done.returncode == 0, done.stdout
    assert host.service("vllm-node-exporter").is_running


def well(host: Host) -> bool:
    """Nothing of what these tests do is in alarm. Tests before may have left other alerts."""
    return not alerts(host).keys() & {("EngineHung", "secondary"), ("EngineDown", "secondary"), ("OneEndpointLeft", "")}


@pytest.fixture
def whole_again(host: Host) -> Iterator[None]:
    await_(lambda: well(host), SECONDS)
    yield
    host.run_expect([0], "systemctl kill --signal=SIGCONT vllm@secondary; systemctl start vllm@secondary")
    await_(lambda: well(host), SECONDS)


def health(host: Host, name: str) -> str:
    """The status of an engine's own /health."""
    ask = "curl --silent --output /dev/null --max-time 20 --write-out '%%{http_code}' http://127.0.0.1:%s/health"
    return str(host.run(ask, str(PORTS[name])).stdout)


@pytest.mark.usefixtures("monitored", "whole_again")
def test_an_engine_that_hangs_is_an_alert_that_ends(host: Host) -> None:
    """Its API server answers /health and /metrics on, as if nothing were wrong."""
    core = host.check_output(f"pgrep --parent {main_pid(host, 'secondary')} --full VLLM::EngineCore")
    answers: list[str] = []

    def told_while_healthy() -> bool:
        found = ("EngineHung", "secondary") in alerts(host)
        answers.append(health(host, "secondary"))
        return found

    host.run_expect([0], f"kill -STOP {core}")
    await_(told_while_healthy, SECONDS)
    # The last one may come when the agent has restarted it.
    assert answers[0] == "200"
    assert set(answers[:-1]) <= {"200"}
    told = alerts(host)
    assert ("EngineDown", "secondary") not in told
    assert ("EngineHung", "primary") not in told
    annotations = told["EngineHung", "secondary"]["annotations"]
    assert annotations["summary"].startswith("Engine secondary on ")
    assert annotations["runbook_url"] == "docs/runbook.md#enginehung"
    # The agent may have killed it by now.
    host.run(f"kill -CONT {core}")


@pytest.mark.usefixtures("monitored", "whole_again")
def test_an_engine_that_is_killed_and_stays_away_is_an_alert_that_ends(host: Host) -> None:
    host.run_expect(
        [0], "systemctl kill --signal=SIGKILL vllm@secondary.service; systemctl stop vllm@secondary.service"
    )
    await_(lambda: ("EngineDown", "secondary") in alerts(host), SECONDS)
    await_(lambda: ("OneEndpointLeft", "") in alerts(host), SECONDS)
    told = alerts(host)
    assert ("EngineDown", "primary") not in told
    # It explains its own figures, so they are told to nobody. Prometheus would take minutes to find one.
    labels = told["EngineDown", "secondary"]["labels"]
    full = {"labels": {name: labels[name] for name in ("host", "instance")} | {"alertname": "KvCacheNearlyFull"}}
    full["endsAt"] = host.check_output("date --utc --date='30 seconds' +%Y-%m-%dT%H:%M:%SZ")
    host.check_output(
        "curl --silent --show-error --fail -H 'Content-Type: application/json' -d %s http://127.0.0.1:9093/api/v2/alerts",
        json.dumps([full]),
    )
    await_(lambda: ("KvCacheNearlyFull", "secondary") in alerts(host, "active=false"), SECONDS)
    assert ("KvCacheNearlyFull", "secondary") not in alerts(host)

"""What the role works out of its variables, by Ansible itself: what is installed, delivered and scraped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template

ROLE = Path(__file__).parents[2] / "roles/vllm_monitoring"
LOADER = DataLoader()
# Of the roles before, and of the inventory.
HOST = {
    "inventory_hostname": "h1",
    "role_path": str(ROLE),
    "vllm_device": "cuda",
    "vllm_bundle": "",
    "cuda_driver_source": "nvidia",
    "vllm_gateway_enabled": True,
    "vllm_gateway_tls": "files",
    "vllm_health_status_port": 8405,
    "vllm_declared": {"instances": [{"name": "primary", "url": "http://127.0.0.1:8001"}]},
}
EXISTING = {"vllm_monitoring_prometheus": "existing"}
OWN = "/etc/vllm/monitoring"


def worked_out(name: str, **variables: object) -> Any:
    """A variable of the role, on a host with GPUs and a gateway with TLS that sets these."""
    everything = dict(HOST)
    for part in ("defaults", "vars"):
        everything |= LOADER.load_from_file(str(ROLE / part / "main.yml"), trusted_as_template=True)
    return Templar(LOADER, everything | variables).template(trust_as_template(f"{{{{ {name} }}}}"))


def units(**variables: object) -> list[str]:
    return [unit["name"] for unit in worked_out("__vllm_monitoring_wanted", **variables)]


def jobs(**variables: object) -> list[str]:
    return [target["job"] for target in worked_out("__vllm_monitoring_targets", **variables)]


def test_by_default_all_is_installed():
    assert units() == ["vllm-prometheus", "vllm-alertmanager", "vllm-node-exporter", "vllm-gpu-exporter"]
    packages = ["prometheus", "prometheus-alertmanager", "prometheus-node-exporter", "openssl"]
    assert worked_out("__vllm_monitoring_packages") == packages
    assert worked_out("__vllm_monitoring_textfile") is True
    assert jobs() == ["vllm", "gateway", "health", "node", "gpu", "alertmanager"]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_where_there_is_a_prometheus_nothing_is_installed(device):
    here = EXISTING | {"vllm_device": device}
    assert units(**here) == []
    assert worked_out("__vllm_monitoring_packages", **here) == []
    assert worked_out("__vllm_monitoring_dcgm", **here) is False
    assert worked_out("__vllm_monitoring_textfile", **here) is False
    delivered = [f"{OWN}/targets", f"{OWN}/rules", f"{OWN}/dashboards"]
    assert worked_out("__vllm_monitoring_directories", **here) == delivered


def test_where_there_is_a_prometheus_its_exporters_are_there_too():
    assert jobs(**EXISTING) == ["vllm", "gateway", "health", "node", "gpu"]
    assert jobs(**EXISTING, vllm_device="cpu") == ["vllm", "gateway", "health", "node"]
    assert "gpus" in worked_out("__vllm_monitoring_rules", **EXISTING)
    assert "gpus" not in worked_out("__vllm_monitoring_rules", **EXISTING, vllm_device="cpu")


@pytest.mark.parametrize(
    ("variables", "source"),
    [
        ({}, "dcgm"),
        ({"vllm_device": "cpu"}, "none"),
        ({"vllm_bundle": "/srv/bundle"}, "textfile"),
        ({"cuda_driver_source": "distribution"}, "textfile"),
        (EXISTING, "existing"),
    ],
)
def test_where_the_figures_of_gpus_come_from(variables, source):
    assert worked_out("vllm_monitoring_gpu_exporter", **variables) == source


def test_prometheus_own_certificate_is_watched_too():
    mine = {"vllm_monitoring_tls_certificate": "/etc/ssl/prometheus.crt"}
    both = ["/etc/vllm/gateway/files.pem", "/etc/ssl/prometheus.crt"]
    assert worked_out("vllm_monitoring_certificates", **mine) == both
    assert worked_out("vllm_monitoring_certificates", **mine, vllm_gateway_tls="off") == both[1:]
    assert worked_out("vllm_monitoring_certificates", **mine, **EXISTING) == []


def test_each_unit_knows_what_it_stands_for():
    for unit in worked_out("__vllm_monitoring_units"):
        assert unit["replaces"].endswith(".service")
        assert unit["variable"] in LOADER.load_from_file(str(ROLE / "defaults/main.yml"))


@pytest.mark.parametrize(
    ("path", "own"),
    [
        (OWN, True),
        (f"{OWN}/rules", True),
        ("/usr/local/lib/vllm-monitoring/nvl_vllm", True),
        ("/etc/prometheus/rules", False),
        ("/etc/vllm-of-others", False),
        ("/var/lib/prometheus/node-exporter", False),
        ("/usr/local/libexec", False),
    ],
)
def test_directories_of_the_operator_are_told_from_the_roles_own(path, own):
    assert worked_out(f"'{path}' is match(__vllm_monitoring_own)") is own


def test_what_is_on_other_hosts_does_not_carry_the_name_of_this_one(rendered):
    extra = [{"address": "10.0.0.2:9100", "job": "controller", "instance": "deploy"}]
    target = worked_out("__vllm_monitoring_targets", vllm_monitoring_extra_targets=extra)[-1]
    assert target == extra[0] | {"host": "deploy"}
    made = LOADER.load(rendered("targets.yml.j2", __vllm_monitoring_targets=[target]))
    labels = {"job": "controller", "host": "deploy", "instance": "deploy"}
    assert made == [{"targets": ["10.0.0.2:9100"], "labels": labels}]


def test_grafana_is_told_where_the_dashboards_are(rendered):
    there = "/etc/grafana/provisioning/dashboards"
    assert there in worked_out("__vllm_monitoring_directories", vllm_monitoring_grafana_provisioning_directory=there)
    made = LOADER.load(rendered("grafana.yaml.j2"))
    assert made["apiVersion"] == 1
    assert made["providers"] == [
        {"name": "nvl-vllm", "folder": "vLLM", "type": "file", "options": {"path": f"{OWN}/dashboards"}}
    ]


@pytest.mark.parametrize(("gpus", "wanted"), [(True, "CAP_DAC_READ_SEARCH CAP_SYSLOG"), (False, "CAP_DAC_READ_SEARCH")])
def test_the_text_files_writer_can_read_certificates_of_all_users(rendered, gpus, wanted):
    unit = rendered("vllm-textfile.service.j2", __vllm_monitoring_gpu_textfile=gpus)
    assert f"CapabilityBoundingSet={wanted}\n" in unit
    assert "--certificate /etc/vllm/gateway/files.pem\n" in unit

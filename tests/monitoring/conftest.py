"""The rules and configurations as the role writes them with its defaults, for the programs that check them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import jinja2
import pytest
import yaml

ROOT = Path(__file__).parents[2]
ROLE = ROOT / "roles/vllm_monitoring"
RULES = ("engines", "objectives", "gateway", "host", "gpus")
DEFAULTS = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
VALUES = {
    **DEFAULTS,
    "vllm_monitoring_alertmanager": "install",
    "vllm_monitoring_certificates": ["/etc/vllm/gateway/files.pem"],
    "vllm_monitoring_drift": True,
    "__vllm_monitoring_install_alertmanager": True,
    "inventory_hostname": "h1",
}


def render(name: str, **variables: object) -> str:
    """One template of the role, with the few filters of Ansible's that it uses."""
    environment = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(
        to_json=json.dumps,
        comment=lambda text: f"# {text}",
        combine=lambda first, *more: {name: value for each in (first, *more) for name, value in each.items()},
        zip=zip,
    )
    environment.globals.update(ansible_managed="Managed by a test", dict=dict)
    text = (ROLE / "templates" / name).read_text()
    return environment.from_string(text).render({**VALUES, **variables})


@pytest.fixture(scope="session")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the rules of a host that has everything."""
    directory = tmp_path_factory.mktemp("rules")
    for name in RULES:
        (directory / f"nvl-vllm-{name}.yml").write_text(render(f"rules/{name}.yml.j2"))
    return directory


@pytest.fixture(scope="session")
def rendered():
    """The function that renders a template."""
    return render


def program(name: str) -> str:
    """A program of the packages prometheus and prometheus-alertmanager."""
    return os.environ.get(name.upper()) or shutil.which(name) or f"/usr/bin/{name}"


@pytest.fixture(scope="session")
def promtool() -> str:
    return program("promtool")


@pytest.fixture(scope="session")
def amtool() -> str:
    return program("amtool")

"""Expressions of role vllm_gateway, as Ansible works them out."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar

ROLE = Path(__file__).parents[2] / "roles/vllm_gateway"


def load(path):
    return DataLoader().load_from_file(str(ROLE / path), trusted_as_template=True)


@pytest.mark.parametrize(
    ("variables", "owners"),
    [
        ({}, []),
        ({"vllm_gateway_port": 8405}, ["vllm_health_status_port"]),
        ({"vllm_gateway_port": "8403"}, ["vllm_health_agent_port"]),
        ({"vllm_gateway_port": 8403, "vllm_health_agent_port": 9000}, []),
        ({"vllm_gateway_port": 9000, "vllm_health_agent_port": "9000"}, ["vllm_health_agent_port"]),
    ],
)
def test_the_gateways_port_is_not_the_health_agents(variables, owners):
    everything = {**load("defaults/main.yml"), **load("vars/main.yml"), **variables}
    task = next(task for task in load("tasks/plan.yml") if "ansible.builtin.assert" in task)
    assert Templar(DataLoader(), everything).template(task["vars"]["owners"]) == owners

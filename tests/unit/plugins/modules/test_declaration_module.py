"""The module declaration: its wiring; the thinking is tested in test_declaration.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from ansible_collections.nvl.vllm.plugins.modules import declaration

ROLE = Path(__file__).parents[4] / "roles/vllm_declaration"
DEFAULTS = yaml.safe_load((ROLE / "defaults/main.yml").read_text())


@pytest.fixture
def declare(run_module):
    """Runs the module with the role's defaults for GPUs."""

    def run(**changes):
        options = {
            "inventory_hostname": "h100-1",
            "help_text": (ROLE / f"files/vllm-serve-help-{DEFAULTS['vllm_version']}.txt").read_text(),
            "environment_variables": DEFAULTS["vllm_environment"],
            "model": {
                name: DEFAULTS[f"vllm_model_{name}"]
                for name in ("source", "root", "repository", "revision", "endpoint", "token", "directory", "manifest")
            },
        }
        for name in (
            *("device", "version", "host", "home", "served_model_name"),
            *("instances", "profile", "profiles", "arguments"),
        ):
            options[name] = DEFAULTS[f"vllm_{name}"]
        return run_module(declaration.main, **{**options, **changes})

    return run


@pytest.mark.parametrize("check_mode", [True, False])
def test_defaults_are_two_instances(declare, check_mode):
    result = declare(check_mode=check_mode)
    assert result["changed"] is False
    assert [instance["unit"] for instance in result["instances"]] == ["vllm@primary.service", "vllm@secondary.service"]
    assert result["instances"][0]["arguments"]["max-num-seqs"] == 8


def test_environment_variables_reach_every_instance(declare):
    result = declare(environment_variables={"A": "1"})
    assert [instance["environment"]["A"] for instance in result["instances"]] == ["1", "1"]


def test_all_mistakes_are_in_the_message(declare):
    result = declare(arguments={"xyzzy": 1}, profile="none", environment_variables={"1": 1})
    assert result["failed"] is True
    assert result["msg"].splitlines() == result["errors"]
    assert len(result["errors"]) == 3  # the profile that two instances ask for is named once
    assert all(error.startswith("h100-1: vllm_") for error in result["errors"])


def test_the_key_is_not_in_the_result(declare):
    result = declare(api_key="sk-123456", host="10.0.0.11")
    assert "failed" not in result
    assert "sk-123456" not in str(result)


def test_text_that_is_no_help_is_refused(declare):
    result = declare(help_text="zsh: command not found: vllm")
    assert result["failed"] is True
    assert result["msg"] == (
        "h100-1: help_text for vLLM 0.32.0 is not the output of `vllm serve --help=all`: it has no --port"
    )

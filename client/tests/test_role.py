"""The client reads what role agentic_client writes, in both of its modes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jinja2
import pytest
import yaml
from agentic_client import DualEndpointLLMClient, create_conversation_history
from agentic_client.config import load_config
from ansible.plugins.filter.core import comment, to_nice_yaml
from ansible_collections.nvl.vllm.plugins.filter.client_config import checked
from ansible_collections.nvl.vllm.plugins.module_utils._client_config import Wanted

ROLE = Path(__file__).resolve().parents[2] / "roles/agentic_client"
DEFAULTS = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
SERVER = {
    "host": "gpu1",
    "address": "gpu1.example.com",
    "model": "gpt-oss-120b",
    "gateway": {
        "enabled": True,
        "host": "0.0.0.0",
        "port": 8000,
        "tls": "off",
        "own_keys": False,
        "server_timeout": 1680,
    },
    "instances": [
        {"name": name, "port": port, "host": "0.0.0.0", "max_model_len": 4096, "max_num_seqs": 8}
        for name, port in (("primary", 8001), ("secondary", 8002))
    ],
}


@pytest.fixture
def rendered(tmp_path):
    """Writes the file with the role's template and defaults."""

    def write(**variables):
        names = {field.name for field in dataclasses.fields(Wanted)}
        values = {name.removeprefix("agentic_client_"): value for name, value in DEFAULTS.items()}
        wanted = {name: value for name, value in values.items() if name in names} | variables
        environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
        environment.filters.update(comment=comment, to_nice_yaml=to_nice_yaml)
        template = environment.from_string((ROLE / "templates/config.yaml.j2").read_text())
        path = tmp_path / "config.yaml"
        made = checked([SERVER], "app1", 1, wanted)
        path.write_text(template.render(ansible_managed="Managed by a test", __agentic_client_made=made))
        return path

    return write


@pytest.mark.parametrize(
    ("mode", "urls"),
    [
        ("gateway", ["http://gpu1.example.com:8000/v1"]),
        ("endpoints", ["http://gpu1.example.com:8001/v1", "http://gpu1.example.com:8002/v1"]),
    ],
)
def test_the_roles_file_is_the_clients(rendered, tmp_path, mode, urls):
    key = tmp_path / "key"
    key.write_text("sk-file\n")
    path = rendered(mode=mode, key_path=str(key))
    config = load_config(path)
    assert (config.llm.mode, [endpoint.url for endpoint in config.llm.endpoints]) == (mode, urls)
    assert config.llm.timeouts.model_dump() == {"connect": 5, "first_token": 1680, "idle": 60, "total": 3480}
    assert config.llm.health_check.model_dump() == {"interval": 30, "timeout": 10}
    # Nothing that the client would take its own default for.
    unset = {"api_key_env", "ca_file"}
    assert config.llm.model_fields_set == set(type(config.llm).model_fields) - unset
    for part in (config, config.conversation, config.llm.timeouts, config.llm.health_check, config.llm.retry):
        assert part.model_fields_set == set(type(part).model_fields)
    client = DualEndpointLLMClient.from_config(path)
    assert (client.max_concurrent, client.max_tokens, client.health_timeout) == (8, 1024, 10)
    assert create_conversation_history(config=path).window_tokens == 3072


def test_all_variables_of_the_role_reach_the_file():
    variables = yaml.safe_load((ROLE / "vars/main.yml").read_text())
    assert set(variables["__agentic_client_wanted"]) == {field.name for field in dataclasses.fields(Wanted)}

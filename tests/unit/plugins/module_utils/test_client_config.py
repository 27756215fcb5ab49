"""The client's configuration, from what servers declare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.nvl.vllm.plugins.filter.client_config import checked
from ansible_collections.nvl.vllm.plugins.module_utils._client_config import (
    ANSWER_SECONDS,
    FIRST_TOKEN_SECONDS,
    ClientConfigError,
    Wanted,
    client_config,
    concurrency,
)

SCHEMA = json.loads((Path(__file__).resolve().parents[4] / "roles/agentic_client/files/config.schema.json").read_text())


def server(host: str = "gpu1", *, listens: str = "0.0.0.0", seqs: tuple[int, ...] = (8, 8), **gateway: Any) -> Any:
    return {
        "host": host,
        "address": f"{host}.example.com",
        "model": "gpt-oss-120b",
        "gateway": {
            "enabled": True,
            "host": listens,
            "port": 8000,
            "tls": "off",
            "own_keys": False,
            "server_timeout": 600,
            **gateway,
        },
        "instances": [
            {"name": f"engine{n}", "port": 8001 + n, "host": listens, "max_model_len": 4096, "max_num_seqs": count}
            for n, count in enumerate(seqs)
        ],
    }


def urls(made: dict[str, Any]) -> list[str]:
    return [one["url"] for one in made["config"]["llm"]["endpoints"]]


def test_the_guides_figures():
    made = client_config("app", [server()], 1, Wanted(key_path="/etc/agentic/api_key"))
    jsonschema.validate(made["config"], SCHEMA)
    assert made["config"]["conversation"] == {"window_tokens": 3072, "reply_reserve_tokens": 1024}
    llm = made["config"]["llm"]
    assert llm["endpoints"] == [{"name": "gpu1", "url": "http://gpu1.example.com:8000/v1"}]
    assert llm["retry"] == {"attempts": 4, "backoff_seconds": [2, 4, 8, 16]}
    assert llm["health_check"] == {"interval": 30, "timeout": 10}
    assert llm["timeouts"]["first_token"] == 600
    assert llm["timeouts"]["total"] == 600 + ANSWER_SECONDS
    assert llm["max_concurrent"] == 8
    assert llm["api_key_file"] == "/etc/agentic/api_key"


@pytest.mark.parametrize(
    ("client", "listens", "wanted"),
    [
        ("gpu1", "127.0.0.1", "http://127.0.0.1:8000/v1"),
        ("gpu1", "0.0.0.0", "http://127.0.0.1:8000/v1"),
        ("app", "0.0.0.0", "http://gpu1.example.com:8000/v1"),
        ("app", "10.0.0.7", "http://10.0.0.7:8000/v1"),
        ("app", "fd00::7", "http://[fd00::7]:8000/v1"),
    ],
)
def test_the_address_is_the_one_that_the_client_reaches(client: str, listens: str, wanted: str):
    assert urls(client_config(client, [server(listens=listens)], 1, Wanted())) == [wanted]


def test_a_key_in_the_environment_is_named_and_no_file_is():
    wanted = Wanted(key_path="/etc/agentic/api_key", key_env="VLLM_API_KEY")
    llm = client_config("app", [server()], 1, wanted)["config"]["llm"]
    assert llm["api_key_env"] == "VLLM_API_KEY"
    assert "api_key_file" not in llm


def test_lengths_are_read_as_vllm_reads_them():
    servers = [server()]
    for instance, length in zip(servers[0]["instances"], ("32k", "32K"), strict=True):
        instance["max_model_len"] = length
    assert client_config("app", servers, 1, Wanted())["config"]["conversation"]["window_tokens"] == 32000 - 1024


def test_no_retries_are_possible():
    assert client_config("app", [server()], 1, Wanted(attempts=0))["config"]["llm"]["retry"]["attempts"] == 0


def test_engines_by_themselves():
    made = client_config("app", [server()], 1, Wanted(mode="endpoints"))
    assert [one["name"] for one in made["config"]["llm"]["endpoints"]] == ["engine0", "engine1"]
    assert urls(made) == ["http://gpu1.example.com:8001/v1", "http://gpu1.example.com:8002/v1"]
    both = client_config("app", [server(), server("gpu2")], 1, Wanted(mode="endpoints"))
    assert [one["name"] for one in both["config"]["llm"]["endpoints"]][2:] == ["gpu2-engine0", "gpu2-engine1"]


def test_all_gateways_become_endpoints_and_tls_is_https():
    made = client_config("app", [server(tls="files"), server("gpu2")], 2, Wanted())
    assert urls(made) == ["https://gpu1.example.com:8000/v1", "http://gpu2.example.com:8000/v1"]


@pytest.mark.parametrize(
    ("seqs", "clients", "wanted"), [((8, 8), 1, 8), ((8, 8), 3, 2), ((8,), 1, 8), ((4, 64), 1, 4), ((1, 1), 9, 1)]
)
def test_what_runs_at_once_leaves_room_for_an_engine_that_is_away(seqs: tuple[int, ...], clients: int, wanted: int):
    assert concurrency(seqs, clients)[0] == wanted


def test_without_a_gateway_there_is_a_fixed_time_to_the_first_token():
    made = client_config("app", [server(enabled=False, server_timeout=0)], 1, Wanted(mode="endpoints"))
    assert made["config"]["llm"]["timeouts"]["first_token"] == FIRST_TOKEN_SECONDS


@pytest.mark.parametrize(
    ("servers", "wanted", "message"),
    [
        ([], Wanted(), "agentic_client_servers must be a group"),
        ([server(listens="127.0.0.1")], Wanted(), "vllm_gateway_host is 127.0.0.1, .*app is another: set"),
        ([server(listens="::1")], Wanted(mode="endpoints"), "vllm_host is ::1"),
        ([server(enabled=False)], Wanted(), "vllm_gateway_enabled is false"),
        ([server()], Wanted(reply_reserve=4096), "agentic_client_reply_reserve is 4096: wanted 1 to 4095 tokens"),
        ([server()], Wanted(reply_reserve=0), "agentic_client_reply_reserve is 0"),
        ([server()], Wanted(max_concurrent=17), "agentic_client_max_concurrent is 17: wanted 1 to 16"),
        ([server()], Wanted(max_concurrent=-1), "agentic_client_max_concurrent is -1"),
        ([server() | {"address": "127.0.0.1"}], Wanted(), "ansible_host is 127.0.0.1, .*set vllm_gateway_host"),
        ([server(tls="self_signed")], Wanted(), "vllm_gateway_tls is self_signed, .*set agentic_client_ca_file"),
        ([server(seqs=(0, 8))], Wanted(), "an engine declares no max-num-seqs"),
        ([server()], Wanted(idle_timeout=0), "agentic_client_idle_timeout is 0 s"),
        ([server()], Wanted(health_timeout=0), "agentic_client_health_timeout is 0 s"),
        ([server()], Wanted(total_timeout=10), "agentic_client_total_timeout is 10 s: wanted at least the 600 s"),
        ([server()], Wanted(attempts=-1), "agentic_client_attempts is -1"),
        ([server(), server("gpu2") | {"model": "other"}], Wanted(), "serve gpt-oss-120b, other"),
    ],
)
def test_what_cannot_work_is_refused_by_name(servers: list[Any], wanted: Wanted, message: str):
    with pytest.raises(ClientConfigError, match=message):
        client_config("app", servers, 1, wanted)


def test_all_mistakes_at_once():
    with pytest.raises(ClientConfigError) as caught:
        client_config("app", [server(listens="127.0.0.1")], 1, Wanted(reply_reserve=0, attempts=-1))
    assert len(str(caught.value).splitlines()) == 3


def test_an_engine_without_a_declared_length_or_with_a_wrong_one_is_named():
    servers = [server()]
    servers[0]["instances"][0]["max_model_len"] = "auto"
    with pytest.raises(ClientConfigError, match="max-model-len is not known"):
        client_config("app", servers, 1, Wanted())
    servers[0]["instances"][0]["max_model_len"] = "much"
    with pytest.raises(ClientConfigError, match="gpu1: max-model-len of engine0 is 'much': wanted"):
        client_config("app", servers, 1, Wanted())


def test_the_filter_keeps_to_the_schema():
    assert checked([server()], "app", 1, {"key_env": "VLLM_API_KEY"})["config"]["llm"]["mode"] == "gateway"
    with pytest.raises(AnsibleFilterError, match=r"app: llm.api_key_env is 'sk-not-a-name'"):
        checked([server()], "app", 1, {"key_env": "sk-not-a-name"})
    with pytest.raises(AnsibleFilterError, match="agentic_client_reply_reserve is 0"):
        checked([server()], "app", 1, {"reply_reserve": 0})

"""The configuration file."""

from __future__ import annotations

import traceback

import pytest
import yaml
from agentic_client import DualEndpointLLMClient, create_conversation_history
from agentic_client.config import load_config
from agentic_client.errors import ConfigError

GIVEN = {
    "llm": {
        "model_name": "gpt-oss-120b",
        "mode": "endpoints",
        "endpoints": [
            {"name": "primary", "url": "http://gpu1:8001/v1"},
            {"name": "secondary", "url": "http://gpu1:8002/v1/"},
        ],
        "api_key_env": "VLLM_API_KEY",
        "timeouts": {"connect": 3, "first_token": 90, "idle": 20, "total": 600},
        "health_check": {"interval": 15, "timeout": 5},
        "retry": {"attempts": 2, "backoff_seconds": [1, 3]},
        "max_concurrent": 2,
    },
    "conversation": {"window_tokens": 3000, "reply_reserve_tokens": 1096},
}


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "config.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write


def changed(**llm):
    return GIVEN | {"llm": {key: value for key, value in (GIVEN["llm"] | llm).items() if value is not None}}


def test_everything_in_the_file_is_used(write, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "sk-env")
    client = DualEndpointLLMClient.from_config(write(GIVEN))
    assert [member.endpoint.url for member in client._members] == ["http://gpu1:8001/v1", "http://gpu1:8002/v1"]
    assert client.timeouts.model_dump() == GIVEN["llm"]["timeouts"]
    assert (client.model_name, client.max_concurrent) == ("gpt-oss-120b", 2)
    assert (client.health_interval, client.health_timeout) == (15, 5)
    assert (client.retry.retries, client.retry.pauses) == (2, (1, 3))
    assert (client.max_tokens, client._key) == (1096, "sk-env")
    assert create_conversation_history(config=write(GIVEN)).window_tokens == 3000


def test_the_defaults_are_the_guides(write):
    llm = {"model_name": "m", "endpoints": [{"name": "gateway", "url": "http://gpu1:8000/v1"}]}
    config = load_config(write({"llm": llm}))
    assert config.llm.retry.model_dump() == {"attempts": 4, "backoff_seconds": [2, 4, 8, 16]}
    assert config.llm.health_check.model_dump() == {"interval": 30, "timeout": 10}
    assert (config.llm.mode, config.llm.max_concurrent) == ("gateway", 4)
    assert (config.conversation.window_tokens, config.conversation.reply_reserve_tokens) == (3072, 1024)
    assert config.llm.read_key() is None


def test_the_key_can_be_in_a_file(write, tmp_path):
    key = tmp_path / "key"
    key.write_text("sk-file\n")
    config = load_config(write(changed(api_key_env=None, api_key_file=str(key))))
    assert config.llm.read_key() == "sk-file"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(mode="direct"), r"llm\.mode: Input should be 'gateway' or 'endpoints', found 'direct'"),
        (changed(endpoints=[]), r"llm\.endpoints: .*at least 1"),
        (
            changed(endpoints=[{"name": "a", "url": "http://gpu1:8001"}]),
            r"llm\.endpoints\.0\.url: .*found 'http://gpu1:8001'",
        ),
        (changed(endpoints=GIVEN["llm"]["endpoints"][:1] * 2), "different names"),
        (changed(model_name=None), r"llm\.model_name: Field required"),
        (changed(api_key_file="/key"), "found both"),
        (changed(api_key="sk-inline"), r"llm\.api_key: Extra inputs are not permitted"),
        (changed(timeouts={"idle": 0}), r"llm\.timeouts\.idle: .*greater than 0, found 0"),
        (changed(retry={"attempts": -1}), r"llm\.retry\.attempts: .*found -1"),
        (changed(health_check={"timeout": 0}), r"llm\.health_check\.timeout: .*greater than 0, found 0"),
        (changed(max_concurrent=0), r"llm\.max_concurrent: .*found 0"),
        (GIVEN | {"conversation": {"window_tokens": 0}}, r"conversation\.window_tokens: .*found 0"),
        (GIVEN | {"conversations": {}}, "conversations: Extra inputs"),
        ("[]", "the file: "),
        ("a:\n  key: [sk-inline", "wanted YAML, found in line 2"),
    ],
)
def test_mistakes_are_named(write, content, message):
    path = write(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert "sk-inline" not in "".join(traceback.format_exception(caught.value))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"wanted a readable YAML file, found: .*No such file"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("content", [None, " \n", b"\xff"], ids=["absent", "empty", "binary"])
def test_a_key_file_without_a_key(write, tmp_path, content):
    key = tmp_path / "key"
    if content is not None:
        key.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=r"llm\.api_key_file: wanted"):
        DualEndpointLLMClient.from_config(write(changed(api_key_env=None, api_key_file=str(key))))


def test_a_variable_without_a_key(write, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="wanted the key in the variable VLLM_API_KEY, found none"):
        DualEndpointLLMClient.from_config(write(GIVEN))


@pytest.mark.parametrize("content", [None, "no certificate"], ids=["absent", "no certificate"])
def test_a_file_without_certificates(write, monkeypatch, tmp_path, content):
    monkeypatch.setenv("VLLM_API_KEY", "sk-env")
    authority = tmp_path / "ca.pem"
    if content:
        authority.write_text(content)
    with pytest.raises(ConfigError, match=rf"llm\.ca_file: wanted a readable PEM file .* in {authority}, found: "):
        DualEndpointLLMClient.from_config(write(changed(ca_file=str(authority))))

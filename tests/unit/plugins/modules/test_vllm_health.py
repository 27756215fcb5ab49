"""The module vllm_health, its main() run as Ansible runs it."""

from __future__ import annotations

import functools
import threading

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils._health import Look
from ansible_collections.nvl.vllm.plugins.modules import vllm_health

MODEL = "gpt-oss-120b"


@pytest.fixture
def health(run_module, make_fake_vllm):
    """Runs the module against two stand-ins; they are its attributes primary and secondary."""

    def run(**options):
        endpoints = [
            {"name": "primary", "url": run.primary.url},
            {"name": "secondary", "url": run.secondary.url},
        ]
        return run_module(vllm_health.main, **{"endpoints": endpoints, **options})

    run.primary, run.secondary = make_fake_vllm(), make_fake_vllm()
    return run


def test_all_well(health):
    result = health(model=MODEL)
    assert result["changed"] is False
    assert "failed" not in result
    first, second = result["endpoints"]
    assert first["name"] == "primary"
    assert first["url"] == health.primary.url
    assert first["healthy"] is True
    assert first["alive"]["ok"] is True
    assert first["serves"]["model"] == MODEL
    assert first["serves"]["ttft_seconds"] >= 0
    assert first["progresses"] == {}
    assert second["healthy"] is True


def test_the_wanted_version_may_have_a_local_part(health):
    health.primary.version = "0.32.0+cpu"
    assert "failed" not in health(version="0.32.0")


def test_another_version_is_not_healthy(health):
    health.secondary.version = "0.31.0"
    result = health(version="0.32.0")
    assert result["failed"] is True
    assert "1 of 2 endpoints not healthy: secondary" in result["msg"]
    assert "wanted vLLM 0.32.0, found 0.31.0: restart it" in result["msg"]
    assert [endpoint["healthy"] for endpoint in result["endpoints"]] == [True, False]


def test_each_unwell_endpoint_is_named_with_its_reason(health):
    health.primary.chat = "500"
    health.secondary.die()
    result = health()
    assert result["failed"] is True
    assert result["msg"].startswith("2 of 2 endpoints not healthy: primary (http://127.0.0.1:")
    assert "found HTTP 500 told to answer 500; secondary (http://127.0.0.1:" in result["msg"]
    assert [endpoint["healthy"] for endpoint in result["endpoints"]] == [False, False]
    assert result["endpoints"][0]["serves"]["ok"] is False
    assert result["endpoints"][1]["serves"] == {}


def test_the_journal_of_an_unwell_unit_is_named(health):
    unit = "vllm@primary.service"
    health.primary.health = 503
    result = health(endpoints=[{"name": "primary", "url": health.primary.url, "unit": unit}])
    assert result["msg"].endswith(f"(see journalctl -u {unit})")


def test_one_unwell_endpoint_leaves_the_other_well(health):
    health.secondary.health = 503
    result = health(depth="alive")
    assert result["msg"].startswith("1 of 2 endpoints not healthy: secondary")
    assert [endpoint["healthy"] for endpoint in result["endpoints"]] == [True, False]


def test_depth_alive_generates_nothing(health):
    health.primary.chat = health.secondary.chat = "500"
    assert "failed" not in health(depth="alive")
    assert health.primary.asked("/v1/chat/completions") == []


def test_depth_progresses(health):
    health.primary.running = 3
    health.primary.moving = "vllm:generation_tokens_total"
    health.primary.chat = "hang"
    first, second = health(depth="progresses")["endpoints"]
    assert first["healthy"] is True
    assert first["progresses"]["running"] == 3
    assert first["progresses"]["tokens"] > 0
    assert second["progresses"]["ttft_seconds"] >= 0


def test_endpoints_are_examined_at_the_same_time(health):
    # Each holds its answer back until the other has been asked too.
    both = threading.Barrier(2)
    for fake in (health.primary, health.secondary):
        fake.before_chat = lambda: both.wait(10)
    assert "failed" not in health()


def test_key_and_tokens_are_sent_and_the_key_is_not_shown(health):
    result = health(api_key="sk-very-secret", max_tokens=3)
    assert health.primary.requests[-1][1]["Authorization"] == "Bearer sk-very-secret"
    assert health.primary.asked("/v1/chat/completions")[0]["max_tokens"] == 3
    assert "sk-very-secret" not in str(result)


def test_wait_ends_when_all_are_well(health, monkeypatch):
    health.secondary.health = 503
    pauses = []

    def come_up(seconds):
        pauses.append(seconds)
        health.secondary.health = 200

    monkeypatch.setattr(vllm_health, "Look", functools.partial(Look, pause=come_up))
    assert "failed" not in health(wait=60)
    assert pauses == [1.0]


def test_check_mode_does_the_same(health):
    assert health(check_mode=True)["endpoints"][0]["serves"]["ok"] is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"endpoints": []}, "at least one endpoint"),
        ({"endpoints": [{"name": "a", "url": "nonsense"}]}, "wanted a URL such as"),
        ({"endpoints": [{"name": "a", "url": "http://h/v1"}]}, "leave out the /v1"),
        ({"endpoints": [{"name": "a"}]}, "missing required arguments: url"),
        ({"depth": "well"}, "value of depth must be one of: alive, serves, progresses"),
        ({"timeout": 0}, "wanted a timeout above 0"),
        ({"api_key": "a b"}, "wanted an API key"),
    ],
)
def test_wrong_options_are_one_sentence(health, options, message):
    result = health(**options)
    assert result["failed"] is True
    assert message in result["msg"]
    assert "Traceback" not in result["msg"]

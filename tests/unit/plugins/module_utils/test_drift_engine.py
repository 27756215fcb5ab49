"""What an engine says of itself; the metrics are recorded from vLLM 0.32.0."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _drift_engine as engine
from ansible_collections.nvl.vllm.plugins.module_utils import _openai
from ansible_collections.nvl.vllm.plugins.module_utils._drift_kinds import Report
from ansible_collections.nvl.vllm.plugins.module_utils._http import ConnectFailed, Endpoint, EndpointError

UNIT = "vllm@primary.service"
METRICS = """\
# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="128",cache_dtype="auto",enable_prefix_caching="True",engine="0",\
gpu_memory_utilization="0.85",kv_cache_dtype_skip_layers="[]",kv_cache_memory_bytes="134217728",\
num_gpu_blocks_override="None",prefix_caching_hash_algo="sha256"} 1.0
vllm:num_requests_running{engine="0"} 0.0
"""
ARGUMENTS = {
    "enable-prefix-caching": True,
    "gpu-memory-utilization": 0.85,
    "kv-cache-memory-bytes": 134217728,
    "max-model-len": 4096,
    "max-num-seqs": 8,
    "model": "/srv/models/x/1",
    "served-model-name": "gpt",
}


def said(**changes):
    model = {"id": "gpt", "root": "/srv/models/x/1", "parent": None, "max_model_len": 4096}
    found = {"version": "0.32.0+cpu", "models": [model], "cache": engine.parse_cache_info(METRICS)}
    found.update(changes)
    return found


def compare(found, arguments=ARGUMENTS, version="0.32.0"):
    report = Report("runtime")
    engine.compare_engine(UNIT, found, version, "gpt", arguments, report)
    return report


def differences(report):
    return [(item["kind"], item["where"].partition(" ")[2], item["found"], item["wanted"]) for item in report.findings]


def test_an_engine_as_declared_gives_nothing():
    report = compare(said())
    assert report.findings == []
    assert report.unknown == []


def test_another_version():
    assert differences(compare(said(version="0.33.0"))) == [("engine_version", "", "vLLM 0.33.0", "vLLM 0.32.0")]


def test_what_the_list_of_models_tells():
    model = {"id": "other", "root": "/srv/models/x/2", "parent": None, "max_model_len": 2048}
    adapter = {"id": "lora", "root": "/srv/lora", "parent": "other", "max_model_len": None}
    assert [item[1:] for item in differences(compare(said(models=[model, adapter])))] == [
        ("served-model-name", "served-model-name is other", "gpt"),
        ("model", "model is /srv/models/x/2", "/srv/models/x/1"),
        ("max-model-len", "max-model-len is 2048", "4096"),
    ]


def test_several_names_of_one_model():
    models = [{"id": name, "root": "/srv/models/x/1", "max_model_len": 4096} for name in ("b", "a")]
    assert compare(said(models=models), {**ARGUMENTS, "served-model-name": ["a", "b"]}).findings == []


def test_what_the_cache_tells():
    wanted = {**ARGUMENTS, "gpu-memory-utilization": 0.9, "enable-prefix-caching": False, "block-size": 16}
    assert [item[1:] for item in differences(compare(said(), wanted))] == [
        ("block-size", "block-size is 128", "16"),
        ("enable-prefix-caching", "enable-prefix-caching is True", "False"),
        ("gpu-memory-utilization", "gpu-memory-utilization is 0.85", "0.9"),
    ]


@pytest.mark.parametrize(
    ("name", "wants", "same"),
    [
        ("kv-cache-dtype", "auto", True),
        ("kv-cache-dtype", "fp8", False),
        ("kv-cache-memory-bytes", "128Mi", True),  # told in bytes; not worked out here
        ("gpu-memory-utilization", 0.850, True),
        ("prefix-caching-hash-algo", "sha256_cbor", False),
        ("max-num-seqs", 9, True),  # vLLM does not tell it
    ],
)
def test_how_values_are_compared(name, wants, same):
    assert (compare(said(), {name: wants, "served-model-name": "gpt"}).findings == []) is same


def test_a_format_stands_for_its_kind():
    cache = [{"cache_dtype": "fp8_e4m3"}]
    assert compare(said(cache=cache), {"kv-cache-dtype": "fp8", "served-model-name": "gpt"}).findings == []


def test_ranks_are_told_apart():
    cache = [{"engine": "0", "block_size": "16"}, {"engine": "1", "block_size": "32"}]
    found = differences(compare(said(cache=cache), {"block-size": 16, "served-model-name": "gpt"}))
    assert found == [("engine_configuration", "block-size (rank 1)", "block-size (rank 1) is 32", "16")]


def test_without_the_series_the_settings_are_unknown():
    report = compare(said(cache=[]))
    assert report.findings == []
    assert engine.CACHE_INFO in report.unknown[0]


def test_a_length_that_vllm_works_out_is_not_compared():
    assert compare(said(), {**ARGUMENTS, "max-model-len": "4k"}).findings == []


def test_the_recorded_page_of_metrics_has_the_series():
    page = (Path(__file__).parents[2] / "data/metrics-0.32.0.txt").read_text()
    (cache,) = engine.parse_cache_info(page)
    assert float(cache["gpu_memory_utilization"]) > 0


def test_an_engine_is_asked(fake_vllm):
    found = engine.read_engine(Endpoint("primary", fake_vllm.url), 5.0)
    assert found == {"version": "0.32.0", "models": [{"id": "gpt-oss-120b", "object": "model"}], "cache": []}


def test_an_engine_that_does_not_answer(fake_vllm):
    fake_vllm.die()
    with pytest.raises(ConnectFailed):
        engine.read_engine(Endpoint("primary", fake_vllm.url), 2.0)


def test_a_list_of_models_that_is_none(monkeypatch):
    pages = {"/version": {"version": "1"}, "/v1/models": {"oops": 1}, "/metrics": ""}
    monkeypatch.setattr(_openai, "get", lambda endpoint, path, seconds: json.dumps(pages[path]).encode())
    with pytest.raises(EndpointError, match="no list of models"):
        engine.read_engine(Endpoint("primary", "http://127.0.0.1:1"), 1.0)

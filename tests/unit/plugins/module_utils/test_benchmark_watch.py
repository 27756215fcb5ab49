"""What is seen of engines and GPUs while they are benchmarked."""

from __future__ import annotations

import time

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _benchmark_watch as watch
from ansible_collections.nvl.vllm.plugins.module_utils._drift_engine import parse_cache_info
from ansible_collections.nvl.vllm.plugins.module_utils._openai import Endpoint, EndpointError

CACHE = 'vllm:cache_config_info{block_size="128",kv_cache_size_tokens="16131"} 1.0'


def test_gpus_are_read_as_nvidia_smi_writes_them():
    rows = watch.parse_gpus(
        "0, 97, 81920, 398.71, 0x0000000000000004\n1, 0, 512, 61.62, 0x0000000000000001\nno devices were found\n"
    )
    assert rows == [
        {"gpu": 0, "utilization": 97.0, "memory_mib": 81920.0, "power_w": 398.71, "clock_reasons": 4},
        {"gpu": 1, "utilization": 0.0, "memory_mib": 512.0, "power_w": 61.62, "clock_reasons": 1},
    ]


def test_what_a_gpu_does_not_tell_is_none():
    (row,) = watch.parse_gpus("0, [N/A], ERR!, [Unknown Error], [N/A]")
    assert row == {"gpu": 0, "utilization": None, "memory_mib": None, "power_w": None, "clock_reasons": None}


def test_without_nvidia_smi_there_are_no_gpus(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert watch.read_gpus() == []


@pytest.mark.parametrize("length", [4096, None])
def test_an_engine_tells_version_cache_and_longest_request(fake_vllm, monkeypatch, length):
    endpoint = Endpoint("primary", fake_vllm.url)
    with pytest.raises(EndpointError, match="wanted block_size and kv_cache_size_tokens"):
        watch.engine_of(endpoint)
    models = [{"id": "gpt-oss-120b", **({"max_model_len": length} if length else {})}]
    told = {"version": "0.32.0", "models": models, "cache": parse_cache_info(CACHE)}
    monkeypatch.setattr(watch, "read_engine", lambda *_: told)
    caches = {"block_size": 128, "kv_tokens": 16131, "max_model_len": length or 0}
    assert watch.engine_of(endpoint) == ("0.32.0", caches)


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (None, []),
        (0x1, []),
        (0x4, []),
        (0x48, ["it is too hot (hardware)"]),
        (0x8, ["the hardware slows it down"]),
        (0xA0, ["it is too hot (driver)", "the power supply asks for less (power brake)"]),
    ],
)
def test_lowered_clocks_have_their_reasons_in_words(bits, words):
    assert watch.slowed(bits) == words


def test_of_a_gpu_that_is_lost_the_others_are_still_read():
    rows = watch.read_gpus(lambda argv, timeout: (15, "0, 97, 81920, 398.71, 0x0000000000000004\n", "GPU is lost"))
    assert [row["gpu"] for row in rows] == [0]


@pytest.mark.parametrize("error", [TimeoutError(), FileNotFoundError(), PermissionError()])
def test_an_nvidia_smi_that_does_not_answer_tells_of_no_gpu(error):
    def run(argv, timeout):
        raise error

    assert watch.read_gpus(run) == []


def test_an_engine_is_looked_at_until_the_end(fake_vllm, monkeypatch):
    monkeypatch.setattr(watch, "INTERVAL", 0.02)
    fake_vllm.running = 3
    gpu = {"gpu": 1, "utilization": 50.0, "memory_mib": 1.0, "power_w": 2.0, "clock_reasons": 0}
    with watch.Watch([Endpoint("primary", fake_vllm.url)], lambda: [gpu]) as seen:
        end = time.monotonic() + 20
        while len(seen.engines["primary"]["t"]) < 3 or not seen.gpus:
            assert time.monotonic() < end, "it did not look"
            time.sleep(0.01)
    columns = seen.engines["primary"]
    assert set(columns["running"]) == {3.0}
    assert columns["t"] == sorted(columns["t"])
    assert {len(values) for values in columns.values()} == {len(columns["t"])}
    assert set(seen.gpus[1]["power_w"]) == {2.0}


def test_looks_that_come_to_nothing_are_counted(fake_vllm, monkeypatch):
    monkeypatch.setattr(watch, "INTERVAL", 0.02)
    fake_vllm.die()
    with watch.Watch([Endpoint("primary", fake_vllm.url)]) as seen:
        end = time.monotonic() + 20
        while not seen.missed:
            assert time.monotonic() < end, "it did not look"
            time.sleep(0.01)
    assert seen.engines["primary"]["t"] == []

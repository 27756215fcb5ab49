"""What vLLM measured: read from its log, kept, and used for what it is for."""

from __future__ import annotations

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils._calibration import host_figures, keep, parse, read_settings

# The wording of vLLM 0.32's source; the figures are made up.
JOURNAL = """\
(EngineCore pid=41) INFO 11-23 20:00:01 [gpu_model_runner.py:5150] Model loading took 61.43 GiB memory and 31.5 seconds
(EngineCore pid=41) INFO 11-23 20:00:41 [gpu_worker.py:760] Available KV cache memory: 14.22 GiB
(EngineCore pid=41) INFO 11-23 20:00:55 [gpu_worker.py:972] CUDA graph pool memory: 0.80 GiB (actual), 0.71 GiB \
(estimated), difference: 0.09 GiB (11.3%).
(EngineCore pid=41) INFO 11-23 20:00:56 [gpu_worker.py:1034] Free memory on device (92.51/93.02 GiB) on startup. \
Desired GPU memory utilization is (0.85, 79.07 GiB). Actual usage is 62.10 GiB for consumed memory (weights + \
non-torch), 2.05 GiB for peak activation, and 0.80 GiB for CUDAGraph memory. Replace gpu_memory_utilization config with
"""
FIGURES = {
    "weights_gib": 61.43,
    "non_torch_gib": 0.67,
    # Less the graphs' estimate, which vLLM counts as part of it.
    "peak_activation_gib": 1.34,
    "graph_gib": 0.71,
    "available_kv_gib": 14.22,
    "gpu_memory_utilization": 0.85,
}
ARGUMENTS = {"tensor-parallel-size": 1, "max-num-seqs": 8, "enforce-eager": True}
PAIR = [{"name": name, "arguments": ARGUMENTS} for name in ("primary", "secondary")]


def test_figures_are_read_from_the_log():
    assert parse(JOURNAL) == FIGURES


def test_the_last_start_counts():
    assert parse(JOURNAL + JOURNAL.replace("61.43 GiB", "60.00 GiB"))["weights_gib"] == 60.0


def test_a_log_without_figures_gives_none():
    assert parse("INFO [cpu_worker.py:260] Explicitly set (0.12/23.54) GiB for KV cache on node 0.\n") == {}


def test_settings_are_those_that_count():
    text = (
        "# Engine arguments\nmax-num-seqs: 8\nenforce-eager: true\nmax-model-len: 4096\nquantization: 'fp8'\nport: 1\n"
    )
    assert read_settings(text) == {"max-num-seqs": "8", "enforce-eager": "true", "quantization": "fp8"}


@pytest.fixture
def measured(tmp_path):
    """A directory of records with what the primary measured; release and checkpoint are below it."""
    for name in ("release", "model"):
        (tmp_path / name).mkdir()
    started_from = {
        "release": str(tmp_path / "release"),
        "model": str(tmp_path / "model"),
        "settings": {"tensor-parallel-size": "1", "max-num-seqs": "8", "enforce-eager": "true"},
    }
    keep("primary", FIGURES, started_from, str(tmp_path))

    def ask(instances=PAIR, release="release", model="model"):
        return host_figures(instances, str(tmp_path / release), str(tmp_path / model), str(tmp_path))

    return ask


def test_figures_hold_for_instances_that_are_set_alike(measured):
    assert measured() == FIGURES


@pytest.mark.parametrize("change", [{"max-num-seqs": 64}, {"tensor-parallel-size": 2}, {"cpu-offload-gb": 30}])
def test_with_other_arguments_it_is_another_engine(measured, change):
    other = {"name": "secondary", "arguments": {**ARGUMENTS, **change}}
    assert measured([PAIR[0], other]) == {}


def test_a_checkpoint_that_was_replaced_in_place_is_another_one(measured, tmp_path):
    (tmp_path / "model/model.safetensors").write_bytes(b"x")
    assert measured() == {}


def test_arguments_that_do_not_count_may_differ(measured):
    assert measured([{"name": "primary", "arguments": {**ARGUMENTS, "max-model-len": 131072}}]) == FIGURES


@pytest.mark.parametrize("change", [{"release": "another"}, {"model": "another"}])
def test_another_release_or_checkpoint_is_not_known(measured, change):
    assert measured(**change) == {}


def test_an_instance_that_never_started_is_not_known(measured):
    assert measured([PAIR[1]]) == {}

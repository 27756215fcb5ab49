"""The plan of a host: what it says of engines that fit, nearly fit, waste memory, or do not fit."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _memory_budget as budgets
from ansible_collections.nvl.vllm.plugins.module_utils import _memory_plan as planning
from ansible_collections.nvl.vllm.plugins.module_utils._kv_cache import KvCacheError
from ansible_collections.nvl.vllm.plugins.module_utils._model_facts import (
    CHUNKED,
    FULL,
    LINEAR,
    Layer,
    built_in,
    from_config,
)
from hypothesis import given, settings
from hypothesis import strategies as st

GPT_OSS = built_in("gpt-oss-120b")
NVL = budgets.device_by_name("NVIDIA H100 NVL")
H100 = budgets.device_by_name("NVIDIA H100 80GB HBM3")
#: The arguments of the guide for H100 NVL.
GUIDE = {
    "gpu-memory-utilization": 0.85,
    "max-model-len": 4096,
    "max-num-seqs": 8,
    "max-num-batched-tokens": 8192,
    "tensor-parallel-size": 1,
}
QWEN3_8B = from_config(
    {
        "model_type": "qwen3",
        "num_hidden_layers": 36,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 12288,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
    },
    16_381_470_720,
)


def gpus(count, device=NVL):
    return tuple(replace(device, index=index, uuid=f"GPU-{index}") for index in range(count))


def pair(places, arguments=GUIDE):
    names = ("primary", "secondary")
    return tuple(planning.Wanted(name, (gpu,), arguments) for name, gpu in zip(names, places, strict=True))


def one(arguments, device=NVL, model=GPT_OSS, **changes):
    wanted = planning.Wanted("primary", tuple(changes.pop("gpus", (0,))), arguments)
    devices = changes.pop("devices", (device,))
    return planning.plan(planning.Host(devices, model, (wanted,), **changes))


def parts(device):
    return device.weights_gib + device.overhead_gib + device.kv_gib + device.foreign_gib + device.free_gib


# The guide


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("utilization", [0.85, 0.90])
def test_the_guides_pair_on_one_gpu_is_refused(count, utilization):
    arguments = {**GUIDE, "gpu-memory-utilization": utilization}
    plan = planning.plan(planning.Host(gpus(count), GPT_OSS, pair((0, 0), arguments)))
    assert not plan.fits
    text = "\n".join(plan.errors)
    assert "primary and secondary share GPU 0 (NVIDIA H100 NVL, 93.10 GiB)" in text
    assert "their weights are 61.4 + 61.4 = 122.9 GiB, which alone is more than the GPU has" in text
    if count == 2:
        assert "declare one GPU for each, such as primary on GPU 0, secondary on GPU 1" in text
        assert "give secondary a GPU of its own (GPU 1 is free)" in text
    else:
        assert "declare one GPU for each (2 GPUs such as this one), or one instance on this GPU" in text


def test_the_guides_pair_on_two_gpus_fits_and_leaves_memory_idle():
    plan = planning.plan(planning.Host(gpus(2), GPT_OSS, pair((0, 1))))
    assert plan.fits
    assert [instance.verdict for instance in plan.instances] == ["wasteful"] * 2
    instance = plan.instances[0]
    assert "max-num-seqs 8 requests of max-model-len 4096 use at most 2.3 GiB" in instance.sentences[0]
    assert instance.recommended_max_num_seqs > 30
    assert instance.largest_max_model_len == 131072


def test_the_recommendation_is_no_longer_wasteful():
    first = one(GUIDE).instances[0]
    again = one({**GUIDE, "max-num-seqs": first.recommended_max_num_seqs}).instances[0]
    assert again.verdict == "fits"


# One engine


def test_what_does_not_fit_names_changes_that_do():
    plan = one({"max-model-len": "128K", "gpu-memory-utilization": 0.73})
    (instance,) = plan.instances
    assert instance.verdict == "does not fit"
    assert "needs 5.07 GiB of KV cache for one request of max-model-len 131072 on GPU 0" in plan.errors[0]
    for change in instance.changes:
        arguments = {key: value for key, value in change.items() if key != "text"}
        ranks = arguments.get("tensor-parallel-size", 1)
        wanted = {"max-model-len": "128K", "gpu-memory-utilization": 0.73, **arguments}
        assert one(wanted, devices=gpus(ranks), gpus=range(ranks)).instances[0].verdict in ("fits", "wasteful")
    assert {key for change in instance.changes for key in change} >= {
        "max-model-len",
        "gpu-memory-utilization",
        "tensor-parallel-size",
    }


def test_a_card_that_is_too_small_for_the_weights():
    plan = one({}, budgets.device_by_name("NVIDIA L40S"))
    assert not plan.fits
    assert plan.instances[0].budget.kv_gib < 0
    assert "run it on 2 GPUs such as this with tensor-parallel-size 2" in plan.errors[0]


def test_without_any_room_the_weights_are_named():
    plan = one({"gpu-memory-utilization": 0.6})
    assert (
        "has no memory left for a KV cache on GPU 0 (NVIDIA H100 NVL, 93.10 GiB): of its budget of 55.86"
        in plan.errors[0]
    )


def test_fewer_bytes_are_offered_where_bytes_were_given():
    plan = one({"kv-cache-memory-bytes": "40G", "max-model-len": 4096})
    (change,) = (change for change in plan.instances[0].changes if "kv-cache-memory-bytes" in change)
    assert f"set kv-cache-memory-bytes to {change['kv-cache-memory-bytes']} (" in plan.errors[0]
    again = one({"kv-cache-memory-bytes": change["kv-cache-memory-bytes"], "max-model-len": 4096})
    assert again.fits


def test_between_low_and_expected_it_is_tight():
    mine = one({"max-model-len": 4096}).instances[0].budget
    # The utilization at which half of the uncertainty is left.
    half = 0.92 - (mine.kv_gib - (mine.kv_gib - mine.kv_low_gib) / 2 - 0.32) / NVL.total_gib
    plan = one({"max-model-len": 4096, "gpu-memory-utilization": round(half, 3)})
    assert plan.fits
    assert plan.instances[0].verdict == "tight"
    assert plan.warnings == plan.instances[0].sentences


def test_auto_takes_the_largest_length():
    instance = one({"max-model-len": "auto", "gpu-memory-utilization": 0.75}).instances[0]
    assert instance.max_model_len == instance.largest_max_model_len
    assert instance.max_model_len > 1


def test_graphs_outside_the_budget_up_to_0_20():
    arguments = {"gpu-memory-utilization": 0.99, "max-model-len": 4096}
    old = one(arguments, H100, QWEN3_8B, version="0.19.0")
    assert "captures CUDA graphs of about" in old.errors[0] or "are free" in old.errors[0]
    found = [one({}, H100, QWEN3_8B, version=v).instances[0].budget for v in ("0.20.1", "0.21.0")]
    assert [mine.graphs_inside for mine in found] == [False, True]
    eager = one({"enforce-eager": True}, H100, QWEN3_8B).instances[0].budget
    assert eager.graphs == budgets.Term(0.0, 0.0, "exact")


def test_mxfp4_takes_more_outside_the_budget_up_to_0_20():
    # gpt-oss-20b at 0.95 on an H100: passes the check of 0.19, and ran out of memory in the sampler's warm-up.
    arguments = {"gpu-memory-utilization": 0.95, "max-model-len": 8192}
    instance = one(arguments, H100, built_in("gpt-oss-20b"), version="0.19.0").instances[0]
    assert instance.verdict == "does not fit"
    assert "captures CUDA graphs of about 1.0 GiB outside its budget of 75.2" in instance.sentences[0]
    assert one({"max-model-len": 8192}, H100, built_in("gpt-oss-20b"), version="0.19.0").instances[0].verdict == "fits"


def test_bytes_override_utilization():
    instance = one({"kv-cache-memory-bytes": "4G", "gpu-memory-utilization": 0.1, "max-model-len": 4096}).instances[0]
    assert instance.budget.kv_low_gib == instance.budget.kv_gib == instance.budget.kv_high_gib == 4
    assert instance.verdict == "fits"


def test_the_version_changes_the_weights():
    loaded = [
        budgets.estimate_weights(GPT_OSS, budgets.settings_of({}, GPT_OSS, H100), H100, version).gib
        for version in ((0, 10, 1), (0, 14, 1), (0, 29, 0))
    ]
    assert loaded == pytest.approx([65.97, 64.38, 61.43], abs=0.12)


def changed(model=QWEN3_8B, version=(0, 32, 0), device=H100, arguments=None, **fields):
    """Settings and facts for a single estimate."""
    facts = replace(model, **fields)
    return facts, budgets.settings_of(arguments or {}, facts, device, version), version


def weights(arguments, model):
    settings = budgets.settings_of(arguments, model, H100)
    return budgets.estimate_weights(budgets.served(model, arguments), settings, H100, budgets.PINNED).gib


def test_experts_are_divided_by_the_data_parallel_ranks():
    experts = GPT_OSS.expert_parameters * 4.25 / 8 / budgets.GIB
    alone, two = (weights({"data-parallel-size": ranks}, GPT_OSS) for ranks in (1, 2))
    assert alone - two == pytest.approx(experts / 2, rel=0.05)
    assert weights({"data-parallel-size": 2, "enable-expert-parallel": True}, GPT_OSS) == pytest.approx(two, rel=0.03)
    # A dense model is on each of them.
    assert weights({"data-parallel-size": 2}, QWEN3_8B) == weights({}, QWEN3_8B)


def test_dtype_makes_weights_and_cache_twice_as_large():
    assert weights({"dtype": "float32"}, QWEN3_8B) == 2 * weights({}, QWEN3_8B)
    assert weights({"dtype": "half"}, QWEN3_8B) == weights({"dtype": "auto"}, QWEN3_8B)
    wide, narrow = (
        budgets.layout(budgets.served(QWEN3_8B, given), budgets.settings_of(given, QWEN3_8B, H100))
        for given in ({"dtype": "float32"}, {})
    )
    assert wide.block_bytes == 2 * narrow.block_bytes
    plan = one({"dtype": "int3"}, model=QWEN3_8B)
    assert plan.errors == ["primary: dtype is 'int3': wanted auto or one of half, float16, bfloat16, float, float32"]


def test_a_checkpoint_of_32_bits_is_served_in_16():
    stored = replace(QWEN3_8B, stored_bytes=4)
    assert weights({}, stored) == weights({}, QWEN3_8B) / 2
    assert weights({"dtype": "float32"}, stored) == weights({}, QWEN3_8B)


def test_layers_for_multi_token_prediction_are_loaded_to_speculate_only():
    def weights(arguments):
        facts, chosen, version = changed(mtp_layers=4, arguments=arguments)
        return budgets.estimate_weights(facts, chosen, H100, version).gib

    without, speculating = weights({}), weights({"speculative-config": {"method": "mtp", "num_speculative_tokens": 1}})
    assert without == pytest.approx(speculating * 36 / 40)


def test_activation_is_the_largest_moment():
    def activation(version, arguments=None, **fields):
        facts, chosen, _ = changed(version=version, arguments=arguments, **fields)
        return budgets.estimate_activation(facts, chosen, version).gib

    # The sampler, then the copy of the embedding that a text model on one GPU holds, then the layers alone.
    few = {"max-num-seqs": 8, "max-num-batched-tokens": 2048}
    assert activation((0, 16, 0)) == pytest.approx(38 * 1024 * 151936 / 2**30 + 2 * 8192 * 4096 / 2**30 + 0.05)
    assert activation((0, 32, 0), few) == pytest.approx(151936 * 4096 * 2 / 2**30 + 0.03)
    assert activation((0, 32, 0), {**few, "tensor-parallel-size": 2}) < 0.3
    assert activation((0, 32, 0), few, multimodal=True) < 0.7


@pytest.mark.parametrize(
    ("model", "version", "seqs", "sizes"),
    [
        (QWEN3_8B, (0, 10, 0), 2, (67, 67)),
        (QWEN3_8B, (0, 19, 0), 1024, (51, 51)),
        (QWEN3_8B, (0, 32, 0), 8, (5, 5)),
        (QWEN3_8B, (0, 32, 0), 256, (51, 51)),
        # Of the log of 0.32.0 on an H200.
        (GPT_OSS, (0, 32, 0), 1024, (83, 83)),
        (GPT_OSS, (0, 32, 0), 64, (83, 11)),
        (GPT_OSS, (0, 32, 0), 8, (83, 4)),
    ],
)
def test_captured_sizes(model, version, seqs, sizes):
    chosen = budgets.settings_of({"max-num-seqs": seqs}, model, H100, version)
    assert budgets.capture_sizes(model, chosen, version) == sizes


#: Starts of 0.32.0 on an H200 (docs/measurements.md): sequences, non-torch, graphs and KV cache in GiB, utilization.
@pytest.mark.parametrize(
    ("seqs", "length", "utilization", "non_torch", "graphs", "kv"),
    [
        (1024, 131072, 0.92, 1.15, 0.80, 64.07),
        (64, 131072, 0.6127, 0.36, 0.67, 22.58),
        (8, 4096, 0.5661, 0.33, 0.61, 15.60),
    ],
)
def test_what_was_measured_on_a_gpu_is_within_two_uncertainties(seqs, length, utilization, non_torch, graphs, kv):
    h200 = budgets.Device(0, "NVIDIA H200", 143771, reserved_mib=616)
    arguments = {"max-num-seqs": seqs, "max-model-len": length, "gpu-memory-utilization": utilization}
    chosen = budgets.settings_of(arguments, GPT_OSS, h200)
    mine = budgets.budget(GPT_OSS, chosen, h200)
    assert abs(mine.weights.gib - 61.43) < 0.05
    assert abs(mine.graphs.gib - graphs) < mine.graphs.plus_minus
    assert abs(mine.non_torch.gib - non_torch) < 2 * mine.non_torch.plus_minus
    # Never less than was promised.
    assert mine.kv_low_gib < mine.kv_gib < kv
    assert kv - mine.kv_gib < 2 * (mine.kv_gib - mine.kv_low_gib)


@pytest.mark.parametrize(("name", "more"), [("H100 80GB", 1.85), ("L40S", 0.0)])
@pytest.mark.parametrize("version", [(0, 16, 0), (0, 19, 0), (0, 20, 0)])
def test_linked_gpus_hold_buffers(name, more, version):
    device = budgets.device_by_name(name)
    one_gpu, two = (
        budgets.estimate_non_torch(
            QWEN3_8B, budgets.settings_of({"tensor-parallel-size": n}, QWEN3_8B, device), device, version
        ).gib
        for n in (1, 2)
    )
    assert two - one_gpu == pytest.approx(min(more, 0.5) if version < (0, 17, 0) else more)


def test_blocks_of_linear_layers_depend_on_prefix_caching():
    linear = replace(QWEN3_8B, layers=(Layer(LINEAR, conv_state=8, ssm_state=8), Layer(FULL, 8, 128, 128)))
    for arguments, blocks in (
        ({}, 2),
        ({"enable-prefix-caching": False}, 1),
        ({"no-enable-prefix-caching": True}, 1),
        ({"speculative-config": '{"method": "mtp", "num_speculative_tokens": 3}'}, 5),
    ):
        assert budgets.settings_of(arguments, linear, H100).kv.state_blocks == blocks


def test_chunked_layers_are_allocated_as_full_ones():
    chunked = replace(QWEN3_8B, layers=(Layer(CHUNKED, 8, 128, 128, 8192), Layer(FULL, 8, 128, 128)))
    assert budgets.settings_of({}, QWEN3_8B, H100).kv.hybrid
    assert not budgets.settings_of({}, chunked, H100).kv.hybrid
    assert not budgets.settings_of({"disable-hybrid-kv-cache-manager": True}, QWEN3_8B, H100).kv.hybrid


def test_defaults_on_the_cpu():
    chosen = budgets.settings_of({"tensor-parallel-size": 2}, QWEN3_8B, NVL, kind="cpu")
    assert (chosen.max_num_batched_tokens, chosen.max_num_seqs) == (4096, 256)
    assert (chosen.kv.block_size, chosen.kv.concurrent_batches, chosen.enforce_eager) == (128, 1, True)


# Arguments


@pytest.mark.parametrize(
    ("value", "expected"), [("32k", 32000), ("32K", 32768), ("1.5k", 1500), ("auto", -1), (4096, 4096), ("2G", 2**31)]
)
def test_whole_numbers(value, expected):
    assert budgets.whole_number(value, "max-model-len") == expected


@pytest.mark.parametrize("value", ["many", "1.5K", True, "32kk"])
def test_no_whole_numbers(value):
    with pytest.raises(budgets.MemoryPlanError, match=r"max-model-len is .*: wanted a whole number"):
        budgets.whole_number(value, "max-model-len")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.19.1rc1", (0, 19, 1)),
        ("v0.32.0", (0, 32, 0)),
        ("0.10.1.1", (0, 10, 1)),
        ("nightly", (0, 32, 0)),
        ("0.1.dev20051+g4", (0, 32, 0)),
    ],
)
def test_versions(text, expected):
    assert budgets.parse_version(text) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("H100 NVL", (8192, 1024)), ("A100 80GB", (2048, 256)), ("RTX 4090", (2048, 256)), ("B200", (16384, 1024))],
)
def test_defaults_by_gpu(name, expected):
    settings = budgets.settings_of({}, GPT_OSS, budgets.device_by_name(name))
    assert (settings.max_num_batched_tokens, settings.max_num_seqs) == expected


def test_defaults_by_version():
    found = [budgets.settings_of({}, GPT_OSS, NVL, version) for version in ((0, 13, 0), (0, 20, 0), (0, 32, 0))]
    assert [settings.gpu_memory_utilization for settings in found] == [0.90, 0.90, 0.92]
    assert [settings.kv.concurrent_batches for settings in found] == [1, 1, 2]
    assert budgets.settings_of({"no-async-scheduling": True}, GPT_OSS, NVL).kv.concurrent_batches == 1
    assert budgets.settings_of({"async-scheduling": False}, GPT_OSS, NVL).kv.concurrent_batches == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gpu-memory-utilization": 85}, "gpu-memory-utilization is 85: wanted a number above 0, at most 1"),
        ({"max-model-len": "long"}, "primary: max-model-len is 'long': wanted a whole number"),
        ({"kv-cache-dtype": "fp7"}, "primary: kv-cache-dtype is 'fp7': wanted auto or one of"),
        ({"tensor-parallel-size": 2}, "tensor 2 x pipeline 1 x data 1 parallel is 2 GPU(s), and 1 are declared"),
        ({"max-num-seqs": 0}, "must be 1 or more"),
    ],
)
def test_arguments_that_cannot_be_planned_with(arguments, message):
    plan = one(arguments)
    assert not plan.fits
    assert len(plan.errors) == 1
    assert message in plan.errors[0]


# Devices


def test_a_gpu_that_is_not_there():
    plan = planning.plan(planning.Host(gpus(1), GPT_OSS, pair((0, 1))))
    assert plan.errors == ["secondary wants GPU 1: the host has 0 (NVIDIA H100 NVL); change the instance's gpus"]


def test_gpus_by_uuid():
    plan = planning.plan(planning.Host(gpus(2), GPT_OSS, pair(("GPU-1", "GPU-0"))))
    assert [instance.devices for instance in plan.instances] == [[1], [0]]


def test_memory_of_other_programs_is_named():
    busy = replace(NVL, processes=(budgets.Process("python3", 4711, 20480),))
    plan = one(GUIDE, busy)
    assert "72.60 GiB are free beside python3 (4711) 20480 MiB once its CUDA context of 0.5 GiB" in plan.errors[0]
    assert ": end python3 (4711); or " in plan.errors[0]
    assert plan.devices[0].foreign_gib == 20


def test_free_memory_counts_where_no_program_is_named():
    busy = replace(NVL, free_mib=50 * 1024)
    assert busy.foreign_gib == pytest.approx(43.10)
    assert not one(GUIDE, busy).fits


def test_an_engine_of_the_plan_that_runs_already_is_not_in_its_own_way():
    running = replace(NVL, free_mib=15000, processes=(budgets.Process("VLLM::EngineCore", 1, 80300, own=True),))
    assert running.foreign_gib < 0.1
    assert one(GUIDE, running).fits
    assert not one(GUIDE, replace(running, processes=())).fits


def test_totals():
    assert NVL.total_gib == 93.10
    assert budgets.Device(0, "anything", 95830, reserved_mib=497).total_gib == (95830 - 497) / 1024
    with pytest.raises(budgets.MemoryPlanError, match="not known"):
        budgets.device_by_name("Voodoo 2")


def test_two_small_engines_share_a_gpu():
    plan = planning.plan(planning.Host(gpus(1), QWEN3_8B, pair((0, 0), {"gpu-memory-utilization": 0.4})))
    assert plan.fits
    assert parts(plan.devices[0]) == pytest.approx(93.10)
    assert plan.devices[0].instances == ["primary", "secondary"]
    assert plan.devices[0].free_gib > 0


def test_several_gpus_are_judged_by_the_one_with_the_least_left():
    single = planning.Wanted("single", (1,), {"gpu-memory-utilization": 0.5})
    both = planning.Wanted("pair", (0, 1), {"gpu-memory-utilization": 0.85, "tensor-parallel-size": 2})
    plan = planning.plan(planning.Host(gpus(2), QWEN3_8B, (single, both)))
    assert [instance.verdict for instance in plan.instances] == ["fits", "does not fit"]
    assert "pair wants 79.14 GiB of GPU 1" in plan.instances[1].sentences[0]
    assert "give pair a GPU of its own (the host needs one more)" in plan.instances[1].sentences[0]
    wide = planning.plan(planning.Host(gpus(3), QWEN3_8B, (single, both)))
    assert "(the host needs one more)" in wide.instances[1].sentences[0]
    assert "pair on GPU" not in "".join(wide.errors)


def test_bytes_do_not_replace_the_check_at_the_start():
    small = built_in("gpt-oss-20b")

    def shared(*shares):
        wanted = [
            planning.Wanted(name, (0,), {"kv-cache-memory-bytes": "8G", "max-num-seqs": 64, **more})
            for name, more in zip(("primary", "secondary"), shares, strict=True)
        ]
        return planning.plan(planning.Host(gpus(1), small, tuple(wanted)))

    plan = shared({}, {})
    assert [p.verdict for p in plan.instances] == ["fits", "does not fit"]
    (sentence,) = plan.errors
    assert "gpu-memory-utilization 0.92 (85.65 GiB) of GPU 0 (NVIDIA H100 NVL, 93.10 GiB) is free" in sentence
    (change,) = (c for c in plan.instances[1].changes if "gpu-memory-utilization" in c)
    share = change["gpu-memory-utilization"]
    assert f"set gpu-memory-utilization to {share:.2f} as well" in sentence
    assert 0 <= share * NVL.total_gib - plan.instances[1].budget.used_gib < 1
    again = shared({}, {"gpu-memory-utilization": share})
    assert again.fits
    assert [p.kv_tokens for p in again.instances] == [p.kv_tokens for p in plan.instances]
    # The CPU device has no such check.
    chosen = budgets.settings_of({"kv-cache-memory-bytes": "8G"}, small, NVL)
    mine = budgets.budget(small, chosen, NVL)
    found = [budgets.start_shortage(chosen, NVL, mine, budgets.PINNED, 30.0, cpu).free for cpu in (False, True)]
    assert found[0] < 0 < found[1]
    # What is used must be there in any case.
    assert not one({"kv-cache-memory-bytes": "90G", "gpu-memory-utilization": 0.1}, model=small).fits


def refused(arguments, model=QWEN3_8B, environment=None, count=1):
    wanted = planning.Wanted("primary", tuple(range(count)), arguments, environment or {})
    return planning.plan(planning.Host(gpus(count), model, (wanted,)))


@pytest.mark.parametrize(
    ("arguments", "count", "sentence"),
    [
        (
            {"max-model-len": 40961},
            1,
            "primary: vLLM refuses max-model-len 40961, as the model's max_position_embeddings is 40960: "
            "set max-model-len to 40960 or less",
        ),
        (
            {"max-num-seqs": 64, "max-num-batched-tokens": 32},
            1,
            "primary: vLLM refuses max-num-seqs 64, as max-num-batched-tokens is 32: "
            "set max-num-seqs to 32 or less, or max-num-batched-tokens to 64 or more",
        ),
        (
            {"tensor-parallel-size": 3},
            3,
            "primary: vLLM refuses tensor-parallel-size 3, as it does not divide the model's 32 attention heads: "
            "set tensor-parallel-size to 2 and declare 2 GPU(s)",
        ),
    ],
)
def test_what_vllm_refuses_before_it_looks_at_memory(arguments, count, sentence):
    plan = refused(arguments, count=count)
    assert plan.errors == [sentence]
    assert plan.instances[0].verdict == "does not fit"


def test_lengths_beyond_the_model_where_vllm_takes_them():
    long = {"max-model-len": 40961}
    assert refused(long, environment={"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}).fits
    assert not refused(long, environment={"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "0"}).fits
    assert refused(long, replace(QWEN3_8B, max_position_embeddings=0)).fits
    assert refused({**long, "hf-overrides": {"max_position_embeddings": 65536}}).fits
    assert refused({"max-model-len": 40960, "max-num-seqs": 32, "max-num-batched-tokens": 32}).fits


@pytest.mark.parametrize(("held", "free"), [(5 * 1024, True), (60 * 1024, False)])
def test_a_gpu_is_spare_where_foreign_memory_leaves_room(held, free):
    first, second = gpus(2)
    busy = replace(second, processes=(budgets.Process("python3", 4711, held),))
    text = "\n".join(planning.plan(planning.Host((first, busy), GPT_OSS, pair((0, 0)))).errors)
    assert ("give secondary a GPU of its own (GPU 1 is free)" in text) == free
    assert ("such as primary on GPU 0, secondary on GPU 1" in text) == free
    assert ("give secondary a GPU of its own (the host needs one more)" in text) == (not free)
    assert ("declare one GPU for each (2 GPUs such as this one)" in text) == (not free)


# Calibration


def test_what_was_measured_replaces_estimates_and_narrows_them():
    before = one(GUIDE).instances[0]
    measured = budgets.Calibration(61.43, 2.16, 1.17, 0.15)
    after = one(GUIDE, calibration=measured).instances[0]
    assert (before.calibrated, after.calibrated) == (False, True)
    assert after.budget.weights == budgets.Term(61.43, 0.1, "measured")
    assert after.budget.kv_gib == pytest.approx(math.ceil(93.10 * 2**30 * 0.85) / 2**30 - 61.43 - 2.16 - 1.17 - 0.15)
    assert (
        after.budget.kv_high_gib - after.budget.kv_low_gib < (before.budget.kv_high_gib - before.budget.kv_low_gib) / 3
    )


def test_measured_kv_moves_with_utilization():
    measured = budgets.Calibration(available_kv_gib=14.0, gpu_memory_utilization=0.85)
    plan = one({**GUIDE, "gpu-memory-utilization": 0.90}, calibration=measured)
    assert plan.instances[0].budget.kv_gib == pytest.approx(14.0 + 0.05 * 93.10)
    assert parts(plan.devices[0]) == pytest.approx(93.10)


# CPU


def cpu(arguments, mib=4096, environment=None):
    wanted = planning.Wanted("primary", (), arguments, environment or {})
    small = from_config(
        {
            "model_type": "gpt_oss",
            "num_hidden_layers": 4,
            "hidden_size": 64,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "intermediate_size": 64,
            "vocab_size": 201088,
            "sliding_window": 128,
            "max_position_embeddings": 131072,
        },
        53_000_000,
    )
    device = budgets.Device(0, "RAM", mib, reserved_mib=0, free_mib=mib)
    return planning.plan(
        planning.Host((replace(device, reserved_mib=1, total_mib=mib + 1),), small, (wanted,), device="cpu")
    )


def test_the_cpus_kv_cache():
    plan = cpu({"kv-cache-memory-bytes": 128 * 2**20, "max-model-len": 8192, "max-num-batched-tokens": 4096})
    assert plan.fits
    assert plan.instances[0].kv_tokens == 21_399
    assert plan.instances[0].budget.graphs.gib == 0


def test_the_variable_wins_and_counts_gib():
    plan = cpu({"kv-cache-memory-bytes": 1, "max-model-len": 8192}, environment={"VLLM_CPU_KVCACHE_SPACE": "1"})
    assert plan.instances[0].budget.kv_gib == 1
    assert not cpu({"max-model-len": 8192}, environment={"VLLM_CPU_KVCACHE_SPACE": "40"}).fits
    assert "the host's memory" in cpu({}, 4096, {"VLLM_CPU_KVCACHE_SPACE": "40"}).errors[0]


# Everywhere


def test_a_plan_is_json():
    plan = planning.plan(planning.Host(gpus(2), GPT_OSS, pair((0, 0))))
    assert json.loads(json.dumps(asdict(plan)))["fits"] is False


def test_a_model_of_unknown_size_is_refused():
    nothing = replace(QWEN3_8B, weight_bytes=0, intermediate_size=0)
    with pytest.raises(budgets.MemoryPlanError, match="give weight_bytes"):
        one({}, model=nothing)


def test_layers_that_cannot_share_are_refused_with_a_sentence():
    with pytest.raises(KvCacheError):
        budgets.layout(
            GPT_OSS,
            replace(
                budgets.settings_of({}, GPT_OSS, NVL),
                kv=replace(budgets.settings_of({}, GPT_OSS, NVL).kv, cache_dtype="odd"),
            ),
        )


ARGUMENTS = st.fixed_dictionaries(
    {
        "gpu-memory-utilization": st.floats(0.05, 1.0),
        "max-model-len": st.integers(1, 131072),
        "max-num-seqs": st.integers(1, 2048),
        "max-num-batched-tokens": st.integers(1, 65536),
        "enforce-eager": st.booleans(),
    }
)
VERSIONS = st.sampled_from(["0.8.5", "0.10.1", "0.16.0", "0.19.0", "0.21.0", "0.32.0", "0.33.0"])
MODELS = st.sampled_from([GPT_OSS, QWEN3_8B, built_in("gpt-oss-20b")])
DEVICES = st.sampled_from([NVL, H100, *(budgets.device_by_name(name) for name in ("A100 80GB", "L4", "H200"))])


@settings(deadline=None)
@given(ARGUMENTS, VERSIONS, MODELS, DEVICES, st.floats(0, 30000))
def test_parts_sum_to_the_total_and_low_is_below_high(arguments, version, model, device, held):
    busy = replace(device, processes=(budgets.Process("other", 1, held),))
    plan = one(arguments, busy, model, version=version)
    (found,) = plan.devices
    assert parts(found) == pytest.approx(found.total_gib)
    (instance,) = plan.instances
    mine = instance.budget
    assert mine.kv_low_gib <= mine.kv_gib <= mine.kv_high_gib
    assert instance.kv_tokens_low <= instance.kv_tokens
    assert plan.fits == (instance.verdict != "does not fit")
    assert bool(instance.sentences) == (instance.verdict != "fits")
    if instance.verdict != "does not fit":
        assert found.free_gib > -1e-6


@settings(deadline=None)
@given(ARGUMENTS, VERSIONS, MODELS, st.integers(20000, 150000), st.integers(0, 50000))
def test_more_memory_never_yields_fewer_tokens(arguments, version, model, mib, more):
    sizes = (mib, mib + more)
    plans = [one(arguments, budgets.Device(0, "", size, reserved_mib=1), model, version=version) for size in sizes]
    small, large = (plan.instances[0] for plan in plans)
    assert small.kv_tokens <= large.kv_tokens
    assert small.largest_max_model_len <= large.largest_max_model_len


@given(
    ARGUMENTS,
    VERSIONS,
    MODELS,
    DEVICES,
    st.sampled_from(["max-num-seqs", "max-num-batched-tokens"]),
    st.integers(1, 4096),
)
def test_more_sequences_or_tokens_never_yield_more_memory(arguments, version, model, device, name, more):
    larger = {**arguments, name: arguments[name] + more}
    less, same = (one(given, device, model, version=version).instances[0].budget for given in (larger, arguments))
    assert less.kv_gib <= same.kv_gib + 1e-9
    assert less.kv_low_gib <= same.kv_low_gib + 1e-9

"""The module gpu_memory: what it takes, returns and fails with."""

from __future__ import annotations

import pytest
import yaml
from ansible_collections.nvl.vllm.plugins.module_utils import _memory_plan as planning
from ansible_collections.nvl.vllm.plugins.modules import gpu_memory

KEYS = {"type", "elements", "required", "default", "choices"}
DEVICES = [{"index": index, "name": "NVIDIA H100 NVL", "total_mib": 95830} for index in (0, 1)]
MODEL = {"name": "openai/gpt-oss-120b"}
GUIDE = {"gpu-memory-utilization": 0.85, "max-model-len": 4096, "max-num-seqs": 8, "max-num-batched-tokens": 8192}


def instances(*gpus):
    names = ("primary", "secondary")
    return [{"name": n, "gpus": [g], "arguments": GUIDE, "port": 8001} for n, g in zip(names, gpus, strict=True)]


@pytest.fixture
def run(run_module):
    def run(check_mode=False, **options):
        given = {"devices": DEVICES, "model": MODEL, "instances": instances(0, 1)}
        return run_module(gpu_memory.main, check_mode=check_mode, **{**given, **options})

    return run


@pytest.mark.parametrize("check_mode", [False, True])
def test_a_plan_that_fits(run, check_mode):
    result = run(check_mode)
    assert result["changed"] is False
    assert result["plan"]["fits"] is True
    assert [instance["verdict"] for instance in result["plan"]["instances"]] == ["wasteful"] * 2


def test_the_guides_pair_on_one_gpu(run):
    result = run(instances=instances(0, 0))
    assert result["failed"]
    assert "their weights are 61.4 + 61.4 = 122.9 GiB, which alone is more than the GPU has" in result["msg"]
    assert result["plan"]["fits"] is False
    assert len(result["msg"].splitlines()) == len(result["plan"]["errors"])


def test_the_plan_alone(run):
    result = run(instances=instances(0, 0), fail=False)
    assert not result.get("failed")
    assert result["plan"]["errors"]


def test_a_model_by_its_config(run):
    config = {
        "model_type": "qwen3",
        "num_hidden_layers": 36,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 12288,
        "vocab_size": 151936,
    }
    result = run(model={"config": config, "weight_bytes": 16_381_470_720})
    assert result["plan"]["instances"][0]["budget"]["weights"]["gib"] == pytest.approx(15.27, abs=0.1)


def test_a_known_board_needs_no_size(run):
    result = run(devices=[{"index": index, "name": "H100 NVL"} for index in (0, 1)])
    assert result["plan"]["devices"][0]["total_gib"] == 93.1


def test_what_a_gpu_does_not_tell_is_none_and_more_keys_do_no_harm(run):
    unknown = {"uuid": None, "reserved_mib": None, "free_mib": None, "processes": None, "pci": "00000000:AD:00.0"}
    assert run(devices=[{**device, **unknown} for device in DEVICES])["plan"]["fits"] is True


def test_calibration(run):
    result = run(calibration={"weights_gib": 64.38, "non_torch_gib": 2.2})
    assert result["plan"]["instances"][0]["calibrated"] is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": {"name": "other"}}, "model 'other' is none of gpt-oss-120b, gpt-oss-20b"),
        ({"model": {"config": {"model_type": "llama"}}}, "config.json has no num_hidden_layers"),
        ({"devices": [{"index": 0, "name": "Voodoo 2"}]}, "GPU 'Voodoo 2' is not known: give its total memory in MiB"),
        ({"devices": [{**DEVICES[0], "processes": [{"pid": 1}]}]}, "processes of device 0: wanted name, pid and mib"),
        ({"devices": [{"name": "H100 NVL"}]}, "devices has an index None: wanted a whole number"),
        ({"devices": [{**DEVICES[0], "free_mib": "all"}]}, "free_mib of device 0 is 'all': wanted MiB"),
        ({"calibration": {"weight_gib": 1}}, "calibration.weight_gib is not known: wanted some of weights_gib"),
        ({"calibration": {"weights_gib": "1"}}, "calibration.weights_gib is '1': wanted GiB"),
    ],
)
def test_what_cannot_be_planned_with(run, options, message):
    result = run(**options)
    assert result["failed"]
    assert message in result["msg"]


def facts(options, nested):
    """What both sides say of each option, with nested options flattened."""
    found = {}
    for name, option in options.items():
        found[name] = {key: option[key] for key in KEYS if option.get(key) not in (None, False)}
        for inner, value in facts(option.get(nested, {}), nested).items():
            found[f"{name}.{inner}"] = value
    return found


def test_documentation_equals_argument_spec(monkeypatch):
    class Caught(Exception):
        pass

    def catch(argument_spec, supports_check_mode):
        assert supports_check_mode
        raise Caught(argument_spec)

    monkeypatch.setattr(gpu_memory, "AnsibleModule", catch)
    with pytest.raises(Caught) as caught:
        gpu_memory.main()
    documented = yaml.safe_load(gpu_memory.DOCUMENTATION)
    assert set(documented["attributes"]) == {"check_mode", "diff_mode", "idempotent"}
    assert facts(documented["options"], "suboptions") == facts(caught.value.args[0], "options")


def test_what_is_returned_is_documented():
    documented = yaml.safe_load(gpu_memory.RETURN)["plan"]["contains"]
    for name, kind in (("instances", planning.InstancePlan), ("devices", planning.DevicePlan)):
        assert list(documented[name]["contains"]) == list(kind.__dataclass_fields__)
    assert list(documented) == list(planning.HostPlan.__dataclass_fields__)


def test_examples_use_documented_options():
    documented = yaml.safe_load(gpu_memory.DOCUMENTATION)
    for task in yaml.safe_load(gpu_memory.EXAMPLES):
        assert set(task["nvl.vllm.gpu_memory"]) <= set(documented["options"])

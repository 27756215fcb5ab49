"""The plan's KV cache beside that of real engines: the same blocks, tokens and concurrency, exactly."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import PORTS, ROOT, SANDBOX, playbook_json, results
from testinfra.host import Host

sys.path.insert(0, str(ROOT / ".collections"))
from ansible_collections.nvl.vllm.plugins.module_utils._kv_cache import KvOptions, lay_out
from ansible_collections.nvl.vllm.plugins.module_utils._model_facts import from_config

MIB = 2**20
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 512,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL_HEADS = {**LLAMA, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64}
# Five sliding layers to a full one, and one more at the end: groups of unequal size.
GEMMA: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "dtype": "bfloat16",
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "sliding_window": 512,
    "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"],
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "query_pre_attn_scalar": 64,
    "hidden_activation": "gelu_pytorch_tanh",
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
# None: the sandbox's own model, sliding and full layers in turn, as in gpt-oss-120b.
GEOMETRIES = {
    "full": (LLAMA, 64 * MIB, 4096, 4096),
    "full with small heads": (SMALL_HEADS, 48 * MIB, 16384, 2048),
    "alternating": (None, 128 * MIB, 8192, 4096),
    "alternating with small batches": (None, 256 * MIB, 32768, 512),
    "five to one": (GEMMA, 64 * MIB, 8192, 4096),
}


def started(host: Host, config: dict[str, Any], kv_bytes: int, length: int, batched: int) -> dict[str, Any]:
    """What a real engine with these arguments says of its cache."""
    arguments = {"kv_cache_memory_bytes": kv_bytes, "max_model_len": length, "max_num_batched_tokens": batched}
    run = host.run(
        "d=$(mktemp -d) && printf %%s %s >$d/config.json && "
        "HOME=$d /opt/vllm/current/bin/python -c %s $d %s 2>&1; rm -r $d",
        json.dumps(config),
        (Path(__file__).parent / "engine_kv.py").read_text(),
        json.dumps(arguments),
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("KV ")]
    assert lines, run.stdout[-3000:]
    found: dict[str, Any] = json.loads(lines[-1][3:])
    return found


def test_the_preflights_plan_is_what_the_running_engines_say(host: Host) -> None:
    """All the way: from the inventory through the role to the numbers, for the pair that serves."""
    plan, _gateway = results(playbook_json("playbooks/preflight.yml"), "plan")
    for name, port in PORTS.items():
        metrics = host.check_output(f"curl -sf http://127.0.0.1:{port}/metrics")
        (line,) = [one for one in metrics.splitlines() if one.startswith("vllm:cache_config_info{")]
        said = dict(re.findall(r'(\w+)="([^"]*)"', line))
        (planned,) = [one for one in plan["instances"] if one["name"] == name]
        assert planned["kv_tokens"] == int(said["kv_cache_size_tokens"])
        # To the digits of vLLM's log.
        assert planned["max_concurrency"] == round(float(said["kv_cache_max_concurrency"]), 2)


# That of gpt-oss always, the others with `make more`.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "alternating" else pytest.mark.more) for name in GEOMETRIES]
)
def test_the_plan_is_what_the_engine_says(host: Host, name: str) -> None:
    config, kv_bytes, length, batched = GEOMETRIES[name]
    if config is None:
        config = json.loads((SANDBOX / "models/tiny-gpt-oss/config.json").read_text())
    said = started(host, config, kv_bytes, length, batched)
    plan = lay_out(from_config(config), KvOptions(block_size=128, max_num_batched_tokens=batched))
    assert said == {
        "blocks": plan.blocks(kv_bytes),
        "block_size": 128,
        "tokens": plan.tokens(kv_bytes, length),
        "concurrency": plan.max_concurrency(kv_bytes, length),
    }

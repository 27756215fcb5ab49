"""What vLLM makes of a KV cache: starts one real engine with random weights and prints its figures as JSON.

    RELEASE/bin/python engine_kv.py DIRECTORY '{"max_model_len": 4096, ...}'

DIRECTORY holds a config.json and nothing else.
"""

import json
import os
import sys

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
)

from vllm import LLM

engine = LLM(
    model=sys.argv[1],
    load_format="dummy",
    skip_tokenizer_init=True,
    enforce_eager=True,
    distributed_executor_backend="uni",
    **json.loads(sys.argv[2]),
)
cache = engine.llm_engine.vllm_config.cache_config
print(
    "KV",
    json.dumps(
        {
            "blocks": cache.num_gpu_blocks,
            "block_size": cache.block_size,
            "tokens": cache.kv_cache_size_tokens,
            "concurrency": cache.kv_cache_max_concurrency,
        }
    ),
)

# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""What vLLM measured when it started here, so that the next plan need not estimate it.

The lines are those of vLLM 0.32 (``v1/worker/gpu_worker.py``, ``gpu_model_runner.py``), in GiB per
GPU. The unit's helper keeps them after each good start, one file an instance; the preflight reads them.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ._json_file import read_object, write_object

CALIBRATION = "/var/lib/nvl-vllm/calibration"
#: Arguments that no measured figure depends on. Any other that differs makes the figures those of another engine.
HARMLESS = frozenset(
    (
        "model",
        "served-model-name",
        "host",
        "port",
        "gpu-memory-utilization",
        "kv-cache-memory-bytes",
        "max-model-len",
        "middleware",
        "enable-prefix-caching",
        "enable-log-requests",
        "disable-access-log-for-endpoints",
        "shutdown-timeout",
        "tool-call-parser",
        "enable-auto-tool-choice",
        "max-num-queued-reqs",
    )
)
_LINES = {
    "weights_gib": re.compile(r"Model loading took ([\d.]+) GiB"),
    "consumed_gib": re.compile(r"Actual usage is ([\d.]+) GiB for consumed memory"),
    "peak_activation_gib": re.compile(r"([\d.]+) GiB for peak activation"),
    "graph_gib": re.compile(r"CUDA graph pool memory: [\d.]+ GiB \(actual\), ([\d.]+) GiB \(estimated\)"),
    "available_kv_gib": re.compile(r"Available KV cache memory: ([\d.]+) GiB"),
    "gpu_memory_utilization": re.compile(r"Desired GPU memory utilization is \(([\d.]+),"),
}


def parse(journal: str) -> dict[str, float]:
    """The figures of the last start in a journal, named as in the memory plan; empty where there are none."""
    found = {}
    for name, pattern in _LINES.items():
        values = pattern.findall(journal)
        if values:
            found[name] = float(values[-1])
    consumed = found.pop("consumed_gib", None)
    if consumed is not None and "weights_gib" in found:
        found["non_torch_gib"] = round(max(0.0, consumed - found["weights_gib"]), 2)
    if "peak_activation_gib" in found and "graph_gib" in found:
        # vLLM counts the graphs' estimate as part of the activation.
        found["peak_activation_gib"] = round(max(0.0, found["peak_activation_gib"] - found["graph_gib"]), 2)
    return found


def settings(arguments: Mapping[str, Any]) -> dict[str, str]:
    """The arguments that figures depend on, as text."""
    return {name: str(value).lower() for name, value in arguments.items() if name not in HARMLESS}


def read_settings(configuration: str) -> dict[str, str]:
    """The same from the text of a NAME.yaml. Where a value is not one line, its first line stands for it."""
    pairs = re.findall(r"^([a-z0-9-]+): *(.*?) *$", configuration, re.MULTILINE)
    return settings({name: value.strip("'\"") for name, value in pairs})


def shard_bytes(model: str) -> int:
    """Bytes of the checkpoint's shards, as one may be replaced in place."""
    return sum(os.path.getsize(path) for path in glob.glob(f"{glob.escape(model)}/*.safetensors"))


def keep(
    name: str, figures: Mapping[str, float], started_from: Mapping[str, Any], directory: str = CALIBRATION
) -> None:
    """Keep the figures of an instance's start, with ``release``, ``model`` (real paths) and ``settings`` of it."""
    about = {**started_from, "shard_bytes": shard_bytes(started_from["model"])}
    write_object(f"{directory}/{name}.json", {**about, "figures": dict(figures)})


def host_figures(
    instances: Sequence[Mapping[str, Any]], release: str, model: str, directory: str = CALIBRATION
) -> dict[str, float]:
    """What is known of this release and checkpoint with the arguments of all declared instances; else nothing."""
    about = {
        "release": os.path.realpath(release),
        "model": os.path.realpath(model),
        "shard_bytes": shard_bytes(model),
    }
    for one in instances:
        kept = read_object(f"{directory}/{one['name']}.json")
        figures = kept.get("figures")
        if isinstance(figures, dict) and all(kept.get(key) == value for key, value in about.items()):
            alike = all(settings(other.get("arguments", {})) == kept.get("settings") for other in instances)
            return figures if alike else {}
    return {}

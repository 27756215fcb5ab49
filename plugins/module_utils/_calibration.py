# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""What vLLM measured when it started here, so that the next plan need not estimate it.

The lines are those of vLLM 0.32 (``v1/worker/gpu_worker.py``, ``gpu_model_runner.py``), in GiB per
GPU. The unit's helper keeps them after each good start, one file an instance; the preflight reads them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ._json_file import read_object, write_object

CALIBRATION = "/var/lib/nvl-vllm/calibration"
#: Arguments that activations, graphs and what CUDA takes depend on.
ARGUMENTS = (
    "tensor-parallel-size",
    "pipeline-parallel-size",
    "max-num-batched-tokens",
    "max-num-seqs",
    "enforce-eager",
    "quantization",
    "dtype",
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
    return found


def settings(configuration: str) -> dict[str, str]:
    """The values of ``ARGUMENTS`` in the text of a NAME.yaml, which is flat; as text, absent ones left out."""
    found = {}
    for name in ARGUMENTS:
        match = re.search(rf"^{name}: *(.*?) *$", configuration, re.MULTILINE)
        if match:
            found[name] = match[1].strip("'\"").lower()
    return found


def keep(
    name: str, figures: Mapping[str, float], started_from: Mapping[str, Any], directory: str = CALIBRATION
) -> None:
    """Keep the figures of an instance's start, with ``release``, ``model`` and ``settings`` that they are for."""
    write_object(f"{directory}/{name}.json", {**started_from, "figures": dict(figures)})


def host_figures(
    instances: Sequence[Mapping[str, Any]], release: str, model: str, directory: str = CALIBRATION
) -> dict[str, float]:
    """What is known for the declared instances, of this release and checkpoint; else nothing.

    All figures hold where every instance is set as the one that was measured. Otherwise only the
    weights are as they were.
    """
    wanted = [
        {name: str(value).lower() for name, value in one.get("arguments", {}).items() if name in ARGUMENTS}
        for one in instances
    ]
    paths = (os.path.realpath(release), os.path.realpath(model))
    for one in instances:
        kept = read_object(f"{directory}/{one['name']}.json")
        figures = kept.get("figures")
        if isinstance(figures, dict) and (kept.get("release"), kept.get("model")) == paths:
            if all(mine == kept.get("settings") for mine in wanted):
                return figures
            return {name: value for name, value in figures.items() if name == "weights_gib"}
    return {}

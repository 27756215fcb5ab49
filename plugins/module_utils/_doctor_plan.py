# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""What the memory plan has for the engines of a host, in a sentence each, beside what an engine said of its memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ._calibration import CALIBRATION, host_figures
from ._memory_budget import Calibration, Device, Process
from ._memory_plan import FAILS, TIGHT, Host, InstancePlan, Wanted, plan
from ._model_facts import from_config
from ._plan_inputs import checkpoint_facts


def devices_of(given: Sequence[Mapping[str, Any]]) -> tuple[Device, ...]:
    """Devices as _plan_inputs gives them (MiB)."""
    return tuple(
        Device(**{**one, "processes": tuple(Process(**each) for each in one.get("processes", ()))}) for one in given
    )


def sentences(
    instances: Sequence[Mapping[str, Any]],
    device: str,
    devices: Sequence[Mapping[str, Any]],
    root: str,
    model_path: str,
    version: str,
    calibration: str = CALIBRATION,
) -> dict[str, str]:
    """By engine; none of what cannot be planned, as where the checkpoint or a GPU is not there."""
    checkpoint = checkpoint_facts(model_path)
    if not checkpoint or not devices:
        return {}
    wanted = [
        Wanted(str(one["name"]), tuple(one["gpus"]), one["arguments"], one.get("environment") or {})
        for one in instances
    ]
    try:
        found = plan(
            Host(
                devices=devices_of(devices),
                model=from_config(checkpoint["config"], checkpoint["weight_bytes"]),
                instances=tuple(wanted),
                version=version,
                device=device,
                calibration=Calibration(**host_figures(instances, f"{root}/current", model_path, calibration)),
            )
        )
    except ValueError:  # a model or an argument that no figure can be given for
        return {}
    return {one.name: _sentence(one) for one in found.instances}


def _sentence(one: InstancePlan) -> str:
    mine = one.budget
    told = (
        f"it takes {mine.weights.gib + mine.overhead_gib + mine.kv_gib:.1f} GiB: weights {mine.weights.gib:.1f}, "
        f"overhead {mine.overhead_gib:.1f}, KV cache {mine.kv_gib:.1f}"
    )
    if one.verdict in (FAILS, TIGHT) and one.sentences:
        return f"{told}; {one.sentences[0]}"
    return f"{told}, with max-model-len up to {one.largest_max_model_len}"

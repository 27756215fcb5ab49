# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Earlier figures of the same hardware, and whether those of now are worse by more than chance.

A figure counts as worse where its median is worse by more than the threshold, and even the best of now is worse than
the worst of then: where the repetitions of both overlap, the difference may be chance.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ._benchmark import judge, steps_of, summary_of, users

SCHEMA = 1
HIGHER, LOWER = "higher", "lower"
#: Arguments that say where an engine is and what its files are called, not how it works.
_PLACES = ("host", "port", "model", "served-model-name", "middleware")


def digest(arguments: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """Eight digits for how the engines are set up and what was asked of them."""
    kept = [{key: value for key, value in one.items() if key not in _PLACES} for one in arguments]
    text = json.dumps([kept, dict(settings)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def key_of(labels: Mapping[str, Any]) -> str:
    """A readable file name for what figures can be compared: hardware, driver, vLLM, model, set-up."""
    parts = [labels["device"], labels["hardware"]]
    if labels["driver"]:
        parts.append(f"driver {str(labels['driver']).partition('.')[0]}")
    parts += [f"vllm {labels['vllm']}", labels["model"], labels["digest"]]
    return "_".join(re.sub(r"[^a-z0-9.]+", "-", str(part).lower()).strip("-") for part in parts)


def metrics(paths: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What is compared, by a readable name: median, spread, unit, and which way is better."""
    found: dict[str, dict[str, Any]] = {}

    def add(name: str, values: Mapping[str, float], unit: str, better: str) -> None:
        found[name] = {**values, "unit": unit, "better": better}

    for path in paths:
        name, verdict = path["path"], judge(path)
        if verdict["parallel"]:
            for each in ("sequential", "parallel"):
                add(f"{name}: {each}", verdict["parallel"][f"{each}_s"], "s", LOWER)
        if verdict["prefix"]:
            for each in ("cold", "warm"):
                add(f"{name}: first token, {each} prefix", verdict["prefix"][f"{each}_ms"], "ms", LOWER)
        for step in steps_of(path, "sweep"):
            summary, at = summary_of(step), f"{name}: {users(step['users'])}"
            add(f"{at}, output", summary["output_tokens_per_s"], "tokens/s", HIGHER)
            add(f"{at}, first token p95", summary["ttft_ms"]["p95"], "ms", LOWER)
            add(f"{at}, end to end p95", summary["e2e_ms"]["p95"], "ms", LOWER)
    return found


def compare(
    now: Mapping[str, Mapping[str, Any]], then: Mapping[str, Mapping[str, Any]], threshold: float
) -> list[dict[str, Any]]:
    """Every figure that both have; ``change`` (percent) is above 0 where now is better. ``threshold`` in percent."""
    rows = []
    for name, new in now.items():
        old = then.get(name)
        if old is None or not old["median"]:
            continue
        change = 100 * (new["median"] - old["median"]) / old["median"]
        if new["better"] == LOWER:
            change, apart = -change, new["min"] > old["max"]
        else:
            apart = new["max"] < old["min"]
        rows.append(
            {
                "name": name,
                "unit": new["unit"],
                "now": {key: new[key] for key in ("median", "min", "max")},
                "then": {key: old[key] for key in ("median", "min", "max")},
                "change": round(change, 1),
                "worse": change < -threshold and apart,
            }
        )
    return rows


def sentence(row: Mapping[str, Any]) -> str:
    """A figure that is worse, with both values."""
    now, then = row["now"], row["then"]
    return (
        f"{row['name']}: {now['median']:g} {row['unit']} ({now['min']:g} to {now['max']:g}), was {then['median']:g} "
        f"({then['min']:g} to {then['max']:g}): {-row['change']:.0f} % worse"
    )

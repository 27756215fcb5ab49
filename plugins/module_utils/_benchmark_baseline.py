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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ._benchmark import PARALLEL, PREFIX, SWEEP, judge, steps_of, summary_of, users

SCHEMA = 1
HIGHER, LOWER = "higher", "lower"
#: Fewer repetitions have no spread that tells chance.
REPETITIONS = 3
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
    """What is compared, by a readable name: median and spread over the repetitions, unit, which way is better; and of
    which path and scenario it is, and when it was measured."""
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        for scenario, name, values, unit, better in _figures(path):
            about = {"path": path["path"], "scenario": scenario, "time": path["time"]}
            found[f"{path['path']}: {name}"] = {**values, "unit": unit, "better": better, **about}
    return found


def _figures(path: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, float], str, str]]:
    """Scenario, name, spread, unit and which way is better, of all figures of one path."""
    verdict = judge(path)
    if verdict[PARALLEL]:
        for each in ("sequential", "parallel"):
            yield PARALLEL, each, verdict[PARALLEL][f"{each}_s"], "s", LOWER
    if verdict[PREFIX]:
        for each in ("cold", "warm"):
            yield PREFIX, f"first token, {each} prefix", verdict[PREFIX][f"{each}_ms"], "ms", LOWER
    for step in steps_of(path, SWEEP):
        summary, at = summary_of(step), users(step["users"])
        yield SWEEP, f"{at}, output", summary["output_tokens_per_s"], "tokens/s", HIGHER
        yield SWEEP, f"{at}, first token p95", summary["ttft_ms"]["p95"], "ms", LOWER
        yield SWEEP, f"{at}, end to end p95", summary["e2e_ms"]["p95"], "ms", LOWER


def merged(then: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """A baseline with the figures of this run. What this run did not measure, path or scenario, stays as it was."""
    measured = {(one["path"], one["scenario"]) for one in now.values()}
    stays = {name: one for name, one in then.items() if (one.get("path"), one.get("scenario")) not in measured}
    return {**stays, **now}


def compare(
    now: Mapping[str, Mapping[str, Any]], then: Mapping[str, Mapping[str, Any]], threshold: float
) -> list[dict[str, Any]]:
    """Every figure that both have; ``change`` (percent) is above 0 where now is better. ``threshold`` in percent.

    ``since`` is when the earlier one was measured.
    """
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
                "since": old.get("time"),
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

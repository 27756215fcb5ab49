# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""What a running engine says of itself, against its declared arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from . import _openai
from ._drift_kinds import Report
from ._http import Endpoint, EndpointError

CACHE_INFO = "vllm:cache_config_info"
#: Arguments that vLLM tells under another name.
_OTHER_NAMES = {"kv-cache-dtype": "cache_dtype"}
_SAMPLE = re.compile(rf"^{re.escape(CACHE_INFO)}\{{(.*)\}}[ \t]+\S+", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def parse_cache_info(metrics: str) -> list[dict[str, str]]:
    """The labels of each ``vllm:cache_config_info``; with data parallelism there is one for each rank."""
    return [dict(_LABEL.findall(labels)) for labels in _SAMPLE.findall(metrics)]


def read_engine(endpoint: Endpoint, seconds: float) -> dict[str, Any]:
    """``version``, ``models`` (as /v1/models lists them) and ``cache``. ``seconds`` for each. Raises EndpointError."""
    version = _openai.version(endpoint, seconds)
    body = _openai.get(endpoint, "/v1/models", seconds)
    metrics = _openai.get(endpoint, "/metrics", seconds).decode("utf-8", "replace")
    try:
        models = [dict(entry) for entry in json.loads(body)["data"]]
    except (ValueError, TypeError, KeyError) as error:
        raise EndpointError(f"{endpoint}: /v1/models is no list of models") from error
    return {"version": version, "models": models, "cache": parse_cache_info(metrics)}


def compare_engine(
    unit: str, found: Mapping[str, Any], version: str, served: str, arguments: Mapping[str, Any], report: Report
) -> None:
    """Version, model and the settings that vLLM tells. Local parts of versions (``+cpu``) do not count."""
    if found["version"].partition("+")[0] != version.partition("+")[0]:
        report.add("engine_version", unit, f"vLLM {found['version']}", f"vLLM {version}")

    def differs(name: str, has: object, wants: object) -> None:
        report.add("engine_configuration", f"{unit} {name}", f"{name} is {has}", f"{wants}")

    # An adapter names the model that it belongs to.
    models = {str(entry.get("id")): entry for entry in found["models"] if not entry.get("parent")}
    wanted_names = arguments.get("served-model-name", served)
    wanted_names = wanted_names if isinstance(wanted_names, list) else str(wanted_names).split()
    if sorted(models) != sorted(wanted_names):
        differs("served-model-name", ", ".join(sorted(models)) or "nothing", ", ".join(sorted(wanted_names)))
    for entry in list(models.values())[:1]:
        for name, key in (("model", "root"), ("max-model-len", "max_model_len")):
            wants, has = arguments.get(name), entry.get(key)
            # A length such as 32k or auto is worked out by vLLM.
            if has is not None and not _same(wants, has) and (key == "root" or isinstance(wants, int)) and wants:
                differs(name, has, wants)
    for cache in found["cache"]:
        rank = f" (rank {cache['engine']})" if len(found["cache"]) > 1 and "engine" in cache else ""
        for name, wants in sorted(arguments.items()):
            has = cache.get(_OTHER_NAMES.get(name, name.replace("-", "_")))
            if has is not None and not _same(wants, has):
                differs(f"{name}{rank}", has, wants)
    if not found["cache"]:
        report.blind(f"{unit}: its /metrics has no {CACHE_INFO}, so the settings of its cache cannot be compared")


def _same(wants: object, has: object) -> bool:
    """Whether a declared value and one that vLLM tells as text are the same."""
    if wants is None or wants == has or str(wants) == str(has):
        return True
    if isinstance(wants, bool):
        return False
    if isinstance(wants, (int, float)):
        try:
            return float(str(has)) == float(wants)
        except ValueError:
            return False
    text = str(wants)
    if re.fullmatch(r"[\d.]+[kKmMgGtT]i?[bB]?", text):
        return True  # a size with a unit: vLLM tells it in bytes
    # fp8 is told as the format that it stands for.
    return str(has).startswith(f"{text}_")

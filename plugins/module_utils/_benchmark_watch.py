# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""What engines and GPUs are doing while they are benchmarked: looked at twice a second, kept as columns.

Times are seconds of the monotonic clock. Memory is in MiB, power in W, utilization in percent.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from . import _openai
from ._drift_engine import read_engine
from ._gpu_health import _SLOWDOWNS
from ._gpu_info import TimedRunner, is_failure, run_command
from ._gpu_metrics import REASONS
from ._openai import Endpoint, EndpointError

GAUGES = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "kv_usage": "vllm:kv_cache_usage_perc",
}
COUNTERS = {
    "prompt_tokens": "vllm:prompt_tokens_total",
    "generation_tokens": "vllm:generation_tokens_total",
    "requests": "vllm:request_success_total",
    "prefix_queries": "vllm:prefix_cache_queries_total",
    "prefix_hits": "vllm:prefix_cache_hits_total",
    "preemptions": "vllm:num_preemptions_total",
}
#: What a timeline needs of them.
SAMPLED = ("running", "waiting", "kv_usage", "prompt_tokens", "generation_tokens", "preemptions")
GPU_FIELDS = {
    "utilization": "utilization.gpu",
    "memory_mib": "memory.used",
    "power_w": "power.draw",
    "clock_reasons": "clocks_event_reasons.active",
}
#: What slows a GPU down by a fault or a limit of the host, in words, by its bit of ``clock_reasons``.
SLOWDOWNS = {REASONS[name]: words for name, words in _SLOWDOWNS.items()}
INTERVAL = 0.5
DEADLINE = 10.0

GpuRow = dict[str, Any]


def look(engine: Endpoint) -> dict[str, float]:
    """The gauges and counters of one engine, by their short names; what is absent is 0. Raises EndpointError."""
    names = {**GAUGES, **COUNTERS}
    found = _openai.metrics(engine, list(names.values()), DEADLINE)
    return {short: found.get(name, 0.0) for short, name in names.items()}


def engine_of(engine: Endpoint) -> tuple[str, dict[str, int]]:
    """vLLM's version, and ``block_size``, ``kv_tokens`` and ``max_model_len`` (0 where it is not told) in tokens.

    Raises EndpointError, and where the first two are not told.
    """
    found = read_engine(engine, DEADLINE)
    infos = found["cache"]
    lengths = [int(model.get("max_model_len") or 0) for model in found["models"]]
    try:
        return found["version"], {
            "block_size": int(infos[0]["block_size"]),
            "kv_tokens": sum(int(info["kv_cache_size_tokens"]) for info in infos),
            "max_model_len": min(filter(None, lengths), default=0),
        }
    except (IndexError, KeyError, ValueError) as error:
        raise EndpointError(
            f"{engine}: wanted block_size and kv_cache_size_tokens in vllm:cache_config_info of /metrics, "
            f"found {infos[:1] or 'no such series'}"
        ) from error


def parse_gpus(text: str) -> list[GpuRow]:
    """Lines of ``nvidia-smi --query-gpu=index,...`` with the fields above; what a GPU does not tell is None."""
    rows = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(GPU_FIELDS) + 1 or not cells[0].isdigit():
            continue
        row: GpuRow = {"gpu": int(cells[0])}
        for (key, _), cell in zip(GPU_FIELDS.items(), cells[1:]):
            row[key] = _number(cell)
        rows.append(row)
    return rows


def _number(cell: str) -> float | int | None:
    if is_failure(cell):
        return None
    try:
        return int(cell, 16) if cell.startswith("0x") else float(cell)
    except ValueError:
        return None  # [N/A]


def read_gpus(run: TimedRunner = run_command, timeout: float = DEADLINE) -> list[GpuRow]:
    """What nvidia-smi tells now of each GPU; its exit status tells of the others. Nothing where it cannot be asked."""
    argv = ["nvidia-smi", f"--query-gpu=index,{','.join(GPU_FIELDS.values())}", "--format=csv,noheader,nounits"]
    try:
        return parse_gpus(run(argv, timeout)[1])
    except OSError:  # TimeoutError is one
        return []


def slowed(reasons: float | None) -> list[str]:
    """What slows a GPU down, in words; its own power cap and lack of work aside."""
    bits = int(reasons or 0)
    if bits & ~REASONS["hw_slowdown"] & sum(SLOWDOWNS):
        bits &= ~REASONS["hw_slowdown"]  # the others are why
    return [words for bit, words in SLOWDOWNS.items() if bits & bit]


class Watch:
    """Looks on, in threads of its own, until the context ends. ``missed`` counts looks that came to nothing."""

    def __init__(self, engines: Sequence[Endpoint], gpus: Callable[[], list[GpuRow]] | None = None) -> None:
        self.began = time.monotonic()
        self.engines: dict[str, dict[str, list[float]]] = {
            engine.name: {key: [] for key in ("t", *SAMPLED)} for engine in engines
        }
        self.gpus: dict[int, dict[str, list[Any]]] = {}
        self.missed = 0
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._watch_engine, args=(one,), daemon=True) for one in engines]
        if gpus is not None:
            self._threads.append(threading.Thread(target=self._watch_gpus, args=(gpus,), daemon=True))

    def __enter__(self) -> Watch:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _watch_engine(self, engine: Endpoint) -> None:
        columns = self.engines[engine.name]
        while True:
            moment = time.monotonic()
            try:
                found = look(engine)
            except EndpointError:
                self.missed += 1
            else:
                columns["t"].append(round(moment - self.began, 2))
                for key in SAMPLED:
                    columns[key].append(found[key])
            if self._end.wait(max(moment + INTERVAL - time.monotonic(), 0.05)):
                return

    def _watch_gpus(self, gpus: Callable[[], list[GpuRow]]) -> None:
        while True:
            moment = time.monotonic()
            for row in gpus():
                columns = self.gpus.setdefault(row["gpu"], {key: [] for key in ("t", *GPU_FIELDS)})
                columns["t"].append(round(moment - self.began, 2))
                for key in GPU_FIELDS:
                    columns[key].append(row[key])
            if self._end.wait(max(moment + INTERVAL - time.monotonic(), 0.05)):
                return

    def since(self, moment: float) -> float:
        """A moment of the monotonic clock as seconds of the timeline."""
        return round(moment - self.began, 3)

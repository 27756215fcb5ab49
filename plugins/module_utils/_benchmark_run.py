# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Benchmarks one path to the engines: refuses before any load, runs the scenarios, and leaves only its result.

All times are seconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import select
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import _benchmark_watch
from ._benchmark import (
    PARALLEL,
    PREFIX,
    SWEEP,
    TOGETHER,
    cold_and_warm,
    delta,
    disturbed,
    expected_hits,
    figures,
    levels,
    limit_of,
    others,
    users,
)
from ._benchmark_load import LOAD, QUESTION, SUFFIX, BenchmarkError, Files, Load, Step
from ._benchmark_watch import GpuRow, Watch
from ._health import Look, examine_all, healthy, poll
from ._openai import Endpoint, EndpointError

SCRATCH = "scratch-"
#: Free disk space for the results of runs under way (MiB).
REQUIRED_MIB = 256
#: The least of each number that means something.
LEAST = {
    "repetitions": 1,
    "parallel_requests": 2,
    "parallel_output_tokens": 1,
    "prefix_tokens": 1,
    "prefix_groups": 1,
    "prefix_group": 2,
    "prefix_output_tokens": 1,
    "sweep_limit": 1,
    "sweep_input_tokens": SUFFIX + 1,
    "sweep_output_tokens": 1,
    "sweep_requests_per_user": 1,
}
#: How long to wait for an engine to become idle.
IDLE_SECONDS = 15.0
#: Tokens of the guide's question in a chat, at most. Some 80 with gpt-oss.
QUESTION_TOKENS = 128
#: Prompts of the warm-up at the greatest level, so that no later run is the first of its kind.
WARM_UP_TOKENS = 8


class Left(BaseException):
    """Whoever asked for the benchmark is gone. No Exception, so that nothing takes it for a failure of its own."""


@dataclass(frozen=True)
class Path:
    """What is loaded. ``kind`` is one of KINDS; ``engines`` are those behind the targets."""

    name: str
    kind: str
    targets: Sequence[Endpoint]
    engines: Sequence[Endpoint]


@dataclass(frozen=True)
class Wanted:
    """How much is asked. Lengths are in tokens; ``max_num_seqs`` is of one engine, 0 for no limit of that kind."""

    scenarios: Sequence[str]
    repetitions: int = 3
    parallel_requests: int = 4
    parallel_output_tokens: int = 128
    prefix_tokens: int = 1946
    prefix_groups: int = 4
    prefix_group: int = 4
    prefix_output_tokens: int = 4
    sweep_limit: int = 64
    sweep_input_tokens: int = 256
    sweep_output_tokens: int = 128
    sweep_requests_per_user: int = 4
    max_num_seqs: int = 0


def plan(path: Path, wanted: Wanted, kv_tokens: int) -> list[list[Step]]:
    """The steps of one path. Those of an inner list take turns, repetition by repetition, so that what changes
    slowly on the host (heat, other work) meets all of them."""
    turns: list[list[Step]] = []
    if PARALLEL in wanted.scenarios:
        count, tokens = wanted.parallel_requests, wanted.parallel_output_tokens
        turns.append(
            [
                Step(PARALLEL, "sequential", QUESTION, 1, count, tokens),
                Step(PARALLEL, "parallel", QUESTION, count, count, tokens),
            ]
        )
    # Two targets at the same time share no cache: each alone says it all.
    if PREFIX in wanted.scenarios and path.kind != TOGETHER:
        groups = wanted.prefix_groups + 1
        requests = groups * wanted.prefix_group
        turns.append(
            [
                Step(
                    *(PREFIX, "prefix", PREFIX, 1, requests, wanted.prefix_output_tokens),
                    input_tokens=wanted.prefix_tokens,
                    group=wanted.prefix_group,
                )
            ]
        )
    if SWEEP in wanted.scenarios:
        engines = len(path.engines) // len(path.targets)
        length = wanted.sweep_input_tokens + wanted.sweep_output_tokens
        limit = limit_of(kv_tokens, wanted.max_num_seqs, length, wanted.sweep_limit) * engines
        turns.append(
            [
                Step(
                    *(SWEEP, users(level * len(path.targets)), LOAD, level),
                    *(level * wanted.sweep_requests_per_user, wanted.sweep_output_tokens, wanted.sweep_input_tokens),
                )
                for level in levels(limit)
            ]
        )
    return turns


class Benchmark:
    """One path's scenarios, run one after the other."""

    def __init__(
        self,
        path: Path,
        wanted: Wanted,
        model: str,
        load: Load,
        watch: Watch,
        caches: Mapping[str, Mapping[str, int]],
    ) -> None:
        self.path, self.wanted, self.model, self.load, self.watch = path, wanted, model, load, watch
        self.caches = caches
        self._disturbed = 0  # tokens
        self._busy: list[str] = []
        self._seeds = random.SystemRandom()

    def run(self) -> list[dict[str, Any]]:
        """All steps with their runs. Raises BenchmarkError."""
        found = []
        kv_tokens = min(cache["kv_tokens"] for cache in self.caches.values())
        for turn in plan(self.path, self.wanted, kv_tokens):
            self._warm_up(turn)
            runs: dict[str, list[dict[str, Any]]] = {step.name: [] for step in turn}
            for _ in range(self.wanted.repetitions):
                for step in turn:
                    runs[step.name].append(self._once(step))
            targets = len(self.path.targets)
            found += [{**step.as_dict(), "users": step.concurrency * targets, "runs": runs[step.name]} for step in turn]
        return found

    def _warm_up(self, turn: Sequence[Step]) -> None:
        """The greatest level once, with short answers. Prefixes warm up themselves, by their first group."""
        step = turn[-1]
        if step.kind == PREFIX:
            return
        short = Step("", "warm-up", step.kind, step.concurrency, step.concurrency, WARM_UP_TOKENS, step.input_tokens)
        self.load.run(short, self.path.targets, self.model, self._seed())

    def _once(self, step: Step) -> dict[str, Any]:
        """One run of one step, with what the engines counted meanwhile."""
        self._await_idle(step)
        before = self._look()
        details = self.load.run(step, self.path.targets, self.model, self._seed())
        # What ends with the last token is counted a moment later.
        requests = sum(len(one["start_times"]) for one in details)
        after, _ = poll(
            lambda _left: self._look(), lambda now: delta(before, now)["requests"] >= requests, IDLE_SECONDS, 0.1
        )
        counters = delta(before, after)
        run = figures(details)
        other = others(run, counters)
        if disturbed(other):
            self._disturbed += other["generation_tokens"]
        run.update(counters=counters, others=other)
        run.update({"from": self.watch.since(run["from"]), "to": self.watch.since(run["to"])})
        if step.kind == PREFIX:
            block = min(cache["block_size"] for cache in self.caches.values())
            groups = step.requests // step.group
            run.update(
                groups=cold_and_warm(details[0]["ttfts"], details[0]["latencies"], step.group),
                hits=counters["prefix_hits"],
                queries=counters["prefix_queries"],
                expected_hits=expected_hits(step.input_tokens, block, groups, step.group),
                other_tokens=other["prompt_tokens"],
            )
        return run

    def _await_idle(self, step: Step) -> None:
        """Wait a little for requests of others to end."""
        _, why = poll(lambda _left: self._running(), lambda running: running == 0, IDLE_SECONDS, 0.2)
        if why and step.name not in self._busy:
            self._busy.append(step.name)

    def _running(self) -> float:
        return sum(found["running"] + found["waiting"] for found in self._look().values())

    def _look(self) -> dict[str, dict[str, float]]:
        try:
            return {engine.name: _benchmark_watch.look(engine) for engine in self.path.engines}
        except EndpointError as error:
            raise BenchmarkError(str(error)) from error

    def notes(self) -> list[str]:
        """What else the engines had to do, in sentences."""
        found = []
        if self._disturbed:
            found.append(f"others had {self._disturbed} tokens generated meanwhile")
        if self._busy:
            found.append(f"requests of others were running when these began: {', '.join(self._busy)}")
        return found

    def _seed(self) -> int:
        """A nonce: prompts that no cache has seen. Below what numpy takes, with room for a seed of each target."""
        return self._seeds.randrange(2**31)


@dataclass(frozen=True)
class Host:
    """Where it runs: the release's root, who runs it, the directory of the results, and the GPUs' reader."""

    root: str
    user: str
    tokenizer: str
    directory: str
    timeout: float = 3600.0
    gpus: Callable[[], list[GpuRow]] | None = None


def benchmark(path: Path, wanted: Wanted, model: str, host: Host) -> dict[str, Any]:
    """Refuse, or run the path's scenarios and return what they gave. Raises BenchmarkError, and Left."""
    began = time.monotonic()
    _refuse(path, wanted, model, host)
    try:
        engines = {engine.name: _benchmark_watch.engine_of(engine) for engine in path.engines}
    except EndpointError as error:
        raise BenchmarkError(str(error)) from error
    caches = {name: cache for name, (_, cache) in engines.items()}
    _refuse_lengths(wanted, min(cache["max_model_len"] for cache in caches.values()))
    with (
        _only_one(host.directory),
        _scratch(host.directory) as scratch,
        Load(host.root, host.user, Files(scratch, host.tokenizer), host.timeout, check_asker) as load,
        Watch(path.engines, host.gpus) as watch,
    ):
        bench = Benchmark(path, wanted, model, load, watch, caches)
        steps = bench.run()
    return {
        "path": path.name,
        "kind": path.kind,
        "engines": caches,
        "vllm": engines[path.engines[0].name][0],
        "alone": not bench.notes(),
        "notes": bench.notes(),
        "seconds": round(time.monotonic() - began, 1),
        "missed": watch.missed,
        "steps": steps,
        "timeline": {"engines": watch.engines, "gpus": {str(gpu): rows for gpu, rows in watch.gpus.items()}},
    }


def _refuse(path: Path, wanted: Wanted, model: str, host: Host) -> None:
    """Raises BenchmarkError for whatever would make the load pointless, before there is any."""
    for name, least in LEAST.items():
        if getattr(wanted, name) < least:
            raise BenchmarkError(f"wanted {name} of {least} or more, found {getattr(wanted, name)}")
    python = os.path.join(host.root, "current", "bin", "python")
    if not os.access(python, os.X_OK):
        raise BenchmarkError(f"wanted vLLM's Python at {python}, found none; run site.yml")
    free = shutil.disk_usage(host.directory).free // 2**20
    if free < REQUIRED_MIB:
        raise BenchmarkError(f"{host.directory}: wanted {REQUIRED_MIB} MiB free for results, found {free}; make room")
    look = Look(depth="serves", model=model)
    everyone = [*path.engines, *(one for one in path.targets if one not in path.engines)]
    for probes in examine_all(everyone, look):
        if not healthy(probes, look):
            raise BenchmarkError(f"{list(probes.values())[-1].reason}; run playbooks/verify.yml")


def _refuse_lengths(wanted: Wanted, longest: int) -> None:
    """Raises BenchmarkError for requests that an engine refuses. ``longest``: its max-model-len, 0 where not known."""
    lengths = {
        PARALLEL: ("parallel_output_tokens and the question", wanted.parallel_output_tokens + QUESTION_TOKENS),
        PREFIX: (
            f"prefix_tokens, prefix_output_tokens and {SUFFIX}",
            wanted.prefix_tokens + SUFFIX + wanted.prefix_output_tokens,
        ),
        SWEEP: (
            "sweep_input_tokens and sweep_output_tokens",
            wanted.sweep_input_tokens + wanted.sweep_output_tokens,
        ),
    }
    for scenario in wanted.scenarios:
        what, tokens = lengths[scenario]
        if longest and tokens > longest:
            raise BenchmarkError(f"wanted {what} within max-model-len {longest}, found {tokens} tokens; ask for less")


@contextlib.contextmanager
def _only_one(directory: str) -> Iterator[None]:
    """Two benchmarks at the same time would measure each other."""
    with open(os.path.join(directory, ".lock"), "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BenchmarkError(
                "wanted to benchmark alone, found another benchmark on this host; wait for it"
            ) from error
        yield


@contextlib.contextmanager
def _scratch(directory: str) -> Iterator[str]:
    """A directory for the runs' files, removed at the end with those that a killed benchmark left."""
    for name in os.listdir(directory):
        if name.startswith(SCRATCH):
            shutil.rmtree(os.path.join(directory, name))
    path = tempfile.mkdtemp(prefix=SCRATCH, dir=directory)
    try:
        yield path
    finally:
        shutil.rmtree(path)


def check_asker() -> None:
    """Raises Left when nobody reads the answer any more: an operator who interrupts closes the connection."""
    poller = select.poll()
    poller.register(sys.__stdout__ or 1, 0)
    if any(event & (select.POLLERR | select.POLLHUP) for _, event in poller.poll(0)):
        raise Left

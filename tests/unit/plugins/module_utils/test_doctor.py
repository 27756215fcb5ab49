"""Each rule of the doctor finds what it is for, and nothing on a healthy host."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _doctor
from ansible_collections.nvl.vllm.plugins.module_utils._doctor import Instance, Limits, Observed, diagnose
from ansible_collections.nvl.vllm.plugins.module_utils._status import (
    GENERATION,
    HITS,
    KV_USAGE,
    PREEMPTIONS,
    QUERIES,
    RUNNING,
    WAITING,
)

ACTIVE = {"ActiveState": "active", "Result": "success", "NRestarts": "0"}
#: When the host is looked at (s of the monotonic clock).
NOW = 10_000.0
LOADED = "INFO Checkpoint size: 60.80 GiB. Available RAM\nINFO Loading weights took 30.4 seconds\n"


def engine(*samples: dict[str, float], **changes: Any) -> Instance:
    healthy = Instance(
        name="primary",
        unit="vllm@primary.service",
        arguments={
            "max-num-seqs": 8,
            "max-model-len": 4096,
            "gpu-memory-utilization": 0.85,
            "max-num-batched-tokens": 8192,
        },
        state=ACTIVE,
        samples=samples or ({}, {}),
        alive=True,
        journal=LOADED,
        gpus=[0],
        agent="up ready",
    )
    return replace(healthy, **changes)


def gpu(utilization: float, **changes: Any) -> dict[str, Any]:
    return {"index": 0, "uuid": "GPU-0", "utilization": utilization, "throttled": [], **changes}


def host(*instances: Instance, **changes: Any) -> Observed:
    return replace(
        Observed(
            instances=instances or (engine(),),
            window=10,
            clock=NOW,
            gpus=[gpu(0.0)],
            gateway={"primary": "UP"},
            gateway_state=ACTIVE,
            agent_state=ACTIVE,
            disks={"/srv": (500_000, 1_000_000)},
            pressure={"io": 0.1},
        ),
        **changes,
    )


def restarted(many: int, ago: float, stamp: str = "ExecMainStart") -> dict[str, str]:
    return {**ACTIVE, "NRestarts": str(many), f"{stamp}TimestampMonotonic": str(int((NOW - ago) * 1e6))}


def busy(**more: float) -> dict[str, float]:
    return {RUNNING: 4, WAITING: 0, KV_USAGE: 0.3, **more}


HEALTHY = [
    host(),
    # Busy and well: at the limit with nobody waiting, and waiting only now and then.
    host(engine(busy(**{RUNNING: 8}), busy(**{RUNNING: 8}))),
    host(engine(busy(**{RUNNING: 8, WAITING: 2}), busy())),
    # Restarted again and again, and well for more than an hour since.
    host(engine(state=restarted(5, 4000))),
    host(engine({QUERIES: 0, HITS: 0}, {QUERIES: 9000, HITS: 6000})),
    # A few canaries never hit.
    host(engine({QUERIES: 0}, {QUERIES: 700, HITS: 0})),
    # Restarted within the window: counters went back.
    host(engine({PREEMPTIONS: 50, QUERIES: 90000}, {PREEMPTIONS: 1, QUERIES: 10})),
    # An idle GPU is no fault, nor is a small checkpoint that loads in no time or slowly.
    host(engine(journal="Checkpoint size: 0.05 GiB\nLoading weights took 40.0 seconds")),
    host(
        engine({RUNNING: 8, GENERATION: 0}, {RUNNING: 8, GENERATION: 900}),
        gpus=[gpu(0.9), gpu(0.0, index=1, uuid="GPU-1")],
    ),
    # A canary of the health agent in one of ten looks.
    host(engine({RUNNING: 0, GENERATION: 0}, {RUNNING: 1, GENERATION: 0}, *[{RUNNING: 0, GENERATION: 1}] * 8)),
]


@pytest.mark.parametrize("observed", HEALTHY)
def test_a_healthy_host_has_no_finding(observed: Observed):
    assert diagnose(observed) == []


SICK: list[tuple[str, Observed, str, str]] = [
    (
        "unit_not_active",
        host(engine(state={"ActiveState": "failed", "Result": "exit-code"}, alive=False, journal="x\nERROR why not\n")),
        "failed, exit-code; its journal: ERROR why not",
        "journalctl -u vllm@primary.service",
    ),
    (
        "unit_not_active",
        host(gateway_state={"ActiveState": "inactive", "Result": "success"}),
        "inactive",
        "vllm-gateway",
    ),
    (
        "restarted",
        host(engine(state=restarted(3, 600))),
        "restarted it 3 times, the last time 10 min ago",
        "journalctl",
    ),
    # It dies before it has a main process.
    ("restarted", host(engine(state=restarted(4, 60, "InactiveExit"))), "restarted it 4 times", "journalctl"),
    (
        "starts",
        host(engine(state={"ActiveState": "activating", "Result": "success"}, alive=False)),
        "has not answered a completion yet",
        "wait",
    ),
    (
        "no_answer",
        host(silent={"vllm-gateway.service": "no answer within 10 s"}),
        "no answer within 10 s",
        "restart vllm-gateway",
    ),
    (
        "out_of_memory",
        host(engine(out_of_memory=["09:00 torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"])),
        "09:00 torch.OutOfMemoryError: CUDA out of memory",
        "set gpu-memory-utilization: 0.80 (it is 0.85); or set max-num-seqs: 4 (it is 8)",
    ),
    (
        "out_of_memory",
        host(
            engine(
                out_of_memory=[
                    "09:00 ValueError: Free memory on device cuda:0 (70.10/93.10 GiB) on startup is less than desired "
                    "GPU memory utilization (0.85, 79.14 GiB)."
                ]
            )
        ),
        "(70.10/93.10 GiB)",
        "set gpu-memory-utilization: 0.75 (it is 0.85)",
    ),
    (
        "out_of_memory",
        host(engine(out_of_memory=["09:00 ValueError: No available memory for the cache blocks. Try increasing"])),
        "No available memory",
        "raise gpu-memory-utilization (it is 0.85)",
    ),
    (
        "out_of_memory",
        host(
            engine(
                out_of_memory=[
                    "09:00 ValueError: To serve at least one request with the model's max seq len (4096), (0.5 GiB KV "
                    "cache is needed, which is larger than the available KV cache memory (0.25 GiB). Based on the "
                    "available memory, the estimated maximum model length is 2032."
                ]
            )
        ),
        "max seq len (4096)",
        "set max-model-len: 2032 (it is 4096)",
    ),
    (
        "killed_by_kernel",
        host(engine(out_of_memory=["09:00 A process of this unit has been killed by the OOM killer."])),
        "OOM",
        "memory",
    ),
    (
        "false_healthy",
        host(engine(canary="no token within 10 s")),
        "/health answers 200, and no token",
        "restart vllm@primary",
    ),
    ("no_answer", host(engine(alive=False, canary="connection refused")), "connection refused", "journalctl"),
    ("kept_out", host(engine(agent="down #hung")), "the health agent says down #hung", "journalctl -u vllm-health"),
    ("kept_out", host(engine(agent="drain")), "says drain", "rm /run/nvl-vllm/drain/primary"),
    ("kept_out", host(gateway={"primary": "MAINT"}), "the gateway has it as MAINT", "restart vllm-gateway"),
    ("runs_from_older_files", host(engine(stale=True)), "changed since it was started", "site.yml"),
    (
        "max_num_seqs_reached",
        host(engine(busy(**{RUNNING: 8, WAITING: 5}), busy(**{RUNNING: 8, WAITING: 3}))),
        "8 requests run (max-num-seqs 8), 5 wait in it and 0 at the gateway",
        "set max-num-seqs: 16 in the arguments of primary",
    ),
    # A seat is empty for a moment now and then, and all else waits at the gateway: no lack of requests.
    (
        "max_num_seqs_reached",
        host(
            engine(*(busy(**{RUNNING: n, GENERATION: n}) for n in (8, 8, 7, 8)), queued=20.0),
            gpus=[gpu(0.3)],
        ),
        "8 requests run (max-num-seqs 8), 0 wait in it and 20 at the gateway",
        "set max-num-seqs: 16 in the arguments of primary",
    ),
    (
        "max_num_seqs_reached",
        host(
            engine(*(busy(**{RUNNING: 8, WAITING: n, GENERATION: 9 - n}) for n in (1, 0, 1)), queued=3.0),
            gpus=[gpu(0.3)],
        ),
        "1 wait in it and 3 at the gateway",
        "set max-num-seqs: 16",
    ),
    (
        "max_num_seqs_reached",
        host(
            engine(
                busy(**{RUNNING: 16, WAITING: 1}),
                busy(**{RUNNING: 16, WAITING: 1}),
                arguments={"max-num-seqs": 8, "data-parallel-size": 2},
            )
        ),
        "16 requests run (max-num-seqs 8)",
        "set max-num-seqs: 16",
    ),
    (
        "kv_cache_full",
        host(engine(busy(), busy(**{KV_USAGE: 0.99, WAITING: 2}))),
        "99% of the KV cache was in use, 4 requests ran and 2 waited",
        "set max-num-seqs: 3",
    ),
    (
        "preemptions",
        host(engine(busy(), busy(**{PREEMPTIONS: 7}))),
        "7 requests lost their place",
        "set max-num-seqs: 3",
    ),
    (
        "prefix_cache_off",
        host(engine(arguments={"enable-prefix-caching": False})),
        "enable-prefix-caching is false",
        "set enable-prefix-caching: true",
    ),
    (
        "prefix_cache_without_hits",
        host(engine({QUERIES: 1000, HITS: 10}, {QUERIES: 11000, HITS: 510})),
        "500 of 10000 prompt tokens (5%)",
        "same system prompt",
    ),
    ("gpu_driver", host(gpu_problem="Driver/library version mismatch"), "mismatch", "preflight"),
    (
        "low_gpu_utilization",
        host(
            engine(busy(**{RUNNING: 1, GENERATION: 0}), busy(**{RUNNING: 1, GENERATION: 99})),
            gpus=[gpu(0.2)],
        ),
        "20% on average over 10 s while 1 requests ran",
        "clients send too few requests at once (1 of 8): raise max_concurrent of the client "
        "(agentic_client_max_concurrent)",
    ),
    # Clients send just as many as there are seats.
    (
        "low_gpu_utilization",
        host(
            engine(busy(**{RUNNING: 8, GENERATION: 0}), busy(**{RUNNING: 8, GENERATION: 99})),
            gpus=[gpu(0.2)],
        ),
        "20% on average over 10 s while 8 requests ran",
        "set max-num-seqs: 16 in the arguments of primary",
    ),
    # A canary that waits for a moment is no queue.
    (
        "low_gpu_utilization",
        host(
            engine(*(busy(**{RUNNING: 1, WAITING: n, GENERATION: n}) for n in (0, 1, 0, 1))),
            gpus=[gpu(0.2)],
        ),
        "while 1 requests ran",
        "agentic_client_max_concurrent",
    ),
    (
        "requests_wait",
        host(
            engine(busy(**{WAITING: 3, GENERATION: 0}), busy(**{WAITING: 5, GENERATION: 9})),
            # What waits is told, not that the GPU has little to do meanwhile.
            gpus=[gpu(0.2)],
        ),
        "3 requests or more waited all the time while 4 of 8 ran, with 30% of the KV cache in use",
        "raise max-num-batched-tokens of primary (it is 8192)",
    ),
    ("throttled", host(gpus=[gpu(0.9, throttled=["it is too hot"])]), "too hot", "cooling"),
    ("gpu_fault", host(gpus=[gpu(0.0, faults=["it cannot be reached"])]), "cannot be reached", "preflight"),
    ("orphan_engine", host(orphans=[("process 4711 (VLLM::EngineCore)", "kill 4711")]), "belongs to no", "kill 4711"),
    ("swapped", host(engine(swapped_mib=900.0)), "900 MiB of it are in swap", "swapoff"),
    (
        "slow_disk",
        host(engine(journal="Checkpoint size: 60.80 GiB.\nLoading weights took 1200.0 seconds")),
        "60.80 GiB of weights took 1200.0 s: 52 MiB/s",
        "vllm_model_root",
    ),
    ("disk_full", host(disks={"/srv": (100, 10_000)}), "0.1 of 9.8 GiB are free", "make room"),
    ("pressure", host(pressure={"memory": 0.8}), "waited for it 80% of the last 10 s", "end other programs"),
    (
        "out_of_memory",
        host(engine(out_of_memory=["09:00 CUDA out of memory"], plan="it takes 79.1 GiB: weights 64.4")),
        "09:00 CUDA out of memory; by the memory plan it takes 79.1 GiB: weights 64.4",
        "playbooks/preflight.yml computes what fits",
    ),
    ("gateway_refused", host(gateway_refused=12), "12 answers 5xx within 10 s", "vllm_gateway_queue"),
]


@pytest.mark.parametrize(("name", "observed", "evidence", "remedy"), SICK)
def test_each_illness_is_found_alone_with_evidence_and_remedy(
    name: str, observed: Observed, evidence: str, remedy: str
):
    (finding,) = diagnose(observed)
    assert finding.name == name
    assert evidence in finding.evidence
    assert remedy in finding.remedy


def test_every_rule_has_a_case():
    source = {name for name, *_ in SICK}
    named = set(re.findall(r'Finding\(\s*"(\w+)"', Path(_doctor.__file__).read_text()))
    assert named == source


def test_how_large_a_checkpoint_must_be_to_judge_a_disk_is_a_limit():
    observed = host(engine(journal="Checkpoint size: 0.05 GiB\nLoading weights took 4.0 seconds"))
    assert diagnose(observed) == []
    assert [one.name for one in diagnose(observed, Limits(load_size=0.01))] == ["slow_disk"]


def test_limits_decide():
    observed = host(engine({QUERIES: 0, HITS: 0}, {QUERIES: 9000, HITS: 4000}))
    assert diagnose(observed) == []
    assert [one.name for one in diagnose(observed, Limits(hit_rate=0.5))] == ["prefix_cache_without_hits"]


def test_the_worst_comes_first_in_a_table_that_a_person_reads():
    observed = host(engine(canary="no token"), disks={"/srv": (1, 10_000)})
    found = _doctor.as_dicts(diagnose(observed))
    shown = _doctor.table({"gpu1": {"findings": found, "unknown": []}, "gpu2": {"findings": [], "unknown": []}})
    assert [one["severity"] for one in found] == ["critical", "warning"]
    assert shown.splitlines()[0] == "gpu1  2 findings"
    assert shown.splitlines()[1] == "  critical  false_healthy: vllm@primary.service"
    assert shown.endswith("gpu2  healthy")


def test_a_host_that_was_not_looked_at_is_not_called_healthy():
    found = _doctor.as_dicts(diagnose(host(disks={"/srv": (1, 10_000)})))
    shown = _doctor.table(
        {"away": {"findings": [], "unknown": ["no\nroute"]}, "part": {"findings": found, "unknown": ["journalctl: no"]}}
    )
    lines = shown.splitlines()
    assert lines[:2] == ["away  1 not looked at", "  unknown   no route"]
    assert lines[3] == "part  1 finding, 1 not looked at"
    assert lines[-1] == "  unknown   journalctl: no"

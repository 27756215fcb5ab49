"""What is to do about units, and the line of a journal that tells why one failed."""

from __future__ import annotations

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils._units import (
    PENDING,
    Unit,
    journal_reason,
    parse_show,
    plan,
    undeclared,
)

OLD, NEW = "0" * 64, "1" * 64


def unit(active="active", started_from=NEW, **changes):
    return Unit(
        **{"name": "primary", "enabled": True, "stale": False, "wanted": NEW, **changes},
        active=active,
        started_from=started_from,
    )


@pytest.mark.parametrize(
    ("active", "started_from", "action"),
    [
        ("active", NEW, "none"),
        ("active", OLD, "restarted"),
        ("active", "", "restarted"),
        ("activating", NEW, "started"),
        ("activating", OLD, "restarted"),
        ("inactive", NEW, "started"),
        ("inactive", OLD, "started"),
        ("failed", NEW, "started"),
        ("failed", OLD, "started"),
        ("deactivating", NEW, "started"),
        ("", "", "started"),
    ],
)
def test_action_follows_from_state_and_inputs(active, started_from, action):
    assert unit(active, started_from).action == action


def test_where_all_is_well_nothing_changes():
    assert plan([unit()], [], target_enabled=True) == ([], [])


@pytest.mark.parametrize(
    ("found", "before", "after"),
    [
        (unit("inactive"), "vllm@primary.service inactive\n", "vllm@primary.service active\n"),
        (unit(""), "vllm@primary.service unknown\n", "vllm@primary.service active\n"),
        (
            unit(started_from=OLD),
            "vllm@primary.service runs from inputs 000000000000\n",
            "vllm@primary.service runs from inputs 111111111111\n",
        ),
        (
            unit(started_from=""),
            "vllm@primary.service runs from inputs that nobody noted\n",
            "vllm@primary.service runs from inputs 111111111111\n",
        ),
        # Check mode, where they are made later.
        (
            unit(started_from=OLD, wanted=PENDING),
            "vllm@primary.service runs from inputs 000000000000\n",
            "vllm@primary.service runs from new inputs\n",
        ),
        (unit(enabled=False), "vllm@primary.service not enabled\n", "vllm@primary.service enabled\n"),
    ],
)
def test_each_difference_is_a_line(found, before, after):
    assert plan([found], [], target_enabled=True) == ([before], [after])


def test_what_is_not_declared_and_the_target_have_lines_too():
    assert plan([], ["old"], target_enabled=False) == (
        ["vllm@old.service is there\n", "vllm.target not enabled\n"],
        ["vllm@old.service removed, as it is not declared\n", "vllm.target enabled\n"],
    )


def test_undeclared_are_told_once_in_order():
    assert undeclared(["primary", "z", "a", "z"], ["primary", "secondary"]) == ["a", "z"]


def test_show_is_read_as_a_dictionary():
    text = "ActiveState=active\nEnvironment=A=1 B=2\nLoadState=\n\n"
    assert parse_show(text) == {"ActiveState": "active", "Environment": "A=1 B=2", "LoadState": ""}


#: Recorded from vLLM 0.32.0, cut to the lines around the reason.
ENGINE_DIED = """\
Starting vllm@primary.service - vLLM engine primary...
(EngineCore pid=412) ERROR 11-23 18:20:05 [core.py:1201] EngineCore failed to start.
(EngineCore pid=412) ERROR 11-23 18:20:05 [core.py:1201] Traceback (most recent call last):
(EngineCore pid=412) AttributeError: '_OpNamespace' '_C' object has no attribute 'init_cpu_memory_env'
(APIServer pid=398) Traceback (most recent call last):
(APIServer pid=398) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
not ready: the engine ended while it started: http://127.0.0.1:8001: connection refused
vllm@primary.service: Control process exited, code=exited, status=1/FAILURE
vllm@primary.service: Failed with result 'exit-code'.
Failed to start vllm@primary.service - vLLM engine primary.
"""
BAD_ARGUMENT = """\
usage: vllm serve [model_tag] [options]
vllm serve: error: unrecognized arguments: --foo
not ready: the engine ended while it started: http://127.0.0.1:8001: connection refused
vllm@primary.service: Control process exited, code=exited, status=1/FAILURE
"""
PORT_TAKEN = """\
(APIServer pid=398)     sock.bind(addr)
(APIServer pid=398) OSError: [Errno 98] Address already in use
vllm@primary.service: Main process exited, code=exited, status=1/FAILURE
"""
GPU_TAKEN = """\
2 starts failed before this one: waiting 4 s
not ready: a GPU of GPU-1 has 14121 MiB free and gpu-memory-utilization 0.85 wants 80951 MiB
vllm@primary.service: Control process exited, code=exited, status=1/FAILURE
"""
NO_PROGRAM = """\
vllm@primary.service: Failed at step EXEC spawning /opt/vllm/current/bin/vllm: No such file or directory
"""


@pytest.mark.parametrize(
    ("journal", "reason"),
    [
        (ENGINE_DIED, "AttributeError: '_OpNamespace' '_C' object has no attribute 'init_cpu_memory_env'"),
        (BAD_ARGUMENT, "vllm serve: error: unrecognized arguments: --foo"),
        (PORT_TAKEN, "OSError: [Errno 98] Address already in use"),
        (GPU_TAKEN, "a GPU of GPU-1 has 14121 MiB free and gpu-memory-utilization 0.85 wants 80951 MiB"),
        (NO_PROGRAM, NO_PROGRAM.strip()),
        ("Starting ...\nsomething else\n\n", "something else"),
        ("", "its journal is empty"),
    ],
    ids=["engine", "argument", "port", "gpu", "program", "other", "empty"],
)
def test_the_reason_is_the_most_telling_line(journal, reason):
    assert journal_reason(journal) == reason


def test_the_last_of_several_reasons_counts():
    assert journal_reason("ValueError: first\nKeyError: second\n") == "KeyError: second"

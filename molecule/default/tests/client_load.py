"""Load by the reference client, run on the host of the engines: ``client_load.py ENDPOINT FAULT [UNDO]``.

Four callers ask the two engines without a pause, every other time for a stream. Once 20 answers have come, the command
FAULT is run, which breaks the engine ENDPOINT. Once that engine has left the round, UNDO is run, where there is one.
The load goes on until the engine is back and has answered ten more. Prints as JSON how the calls ended. The key is in
VLLM_API_KEY.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter
from typing import Any

from agentic_client import DualEndpointLLMClient, EndpointConfig, LLMClientError, StreamInterruptedError
from agentic_client.events import AttemptFailed, CallEnded, EndpointChanged, Event

CALLERS = 4
MAX_TOKENS = 33  # nobody else asks for so many: the engines' metrics tell these requests from all others
BEFORE = 20
AFTER = 10
LIMIT_SECONDS = 150.0
# A hang is found before the host's own health agent finds it, and nobody waits long for an engine that is back.
HEALTH = {"health_interval": 2.0, "health_timeout": 3.0}

target, fault, *undo = sys.argv[1:]
found: dict[str, Any] = {"sent": 0, "completed": 0, "lost": 0, "truncated": 0, "retried": 0, "first_loss": None}
completed_at: Counter[str] = Counter()
changes: list[tuple[str, bool, str]] = []
failures: list[str] = []
recovered_at: dict[str, int] = {}  # how many calls each endpoint had answered when it last changed
out = asyncio.Event()  # the target has left the round


def note(event: Event) -> None:
    if isinstance(event, EndpointChanged):
        changes.append((event.endpoint, event.healthy, event.reason))
        recovered_at[event.endpoint] = completed_at[event.endpoint]
        if event.endpoint == target and not event.healthy:
            out.set()
    elif isinstance(event, AttemptFailed):
        failures.append(f"{event.endpoint}: {event.reason}")
    elif isinstance(event, CallEnded):
        found["retried"] += event.attempts > 1
        if event.error is None and event.endpoint is not None:
            completed_at[event.endpoint] += 1


def over() -> bool:
    """Whether the broken engine is back and has answered, or a call was lost, which is all that there is to know."""
    back = any((name, healthy) == (target, True) for name, healthy, _reason in changes)
    return (back and completed_at[target] >= recovered_at[target] + AFTER) or found["lost"] > 0


async def caller(client: DualEndpointLLMClient, number: int) -> None:
    for turn in range(10**6):
        if over():
            return
        messages = [{"role": "user", "content": f"Question {turn} of caller {number}"}]
        found["sent"] += 1
        try:
            if (number + turn) % 2:
                async for _chunk in client.chat_completion_stream(messages, max_tokens=MAX_TOKENS):
                    pass
            else:
                await client.chat_completion(messages, max_tokens=MAX_TOKENS)
            found["completed"] += 1
        except StreamInterruptedError:
            found["truncated"] += 1
        except LLMClientError as error:
            found["lost"] += 1
            found["first_loss"] = found["first_loss"] or str(error)


async def breaker() -> None:
    while found["completed"] < BEFORE:
        if over():
            return
        await asyncio.sleep(0.05)
    await run(fault)
    for command in undo:
        await out.wait()
        await run(command)


async def run(command: str) -> None:
    await asyncio.to_thread(subprocess.run, command, shell=True, check=True)


async def main() -> None:
    endpoints = [
        EndpointConfig(url=f"http://localhost:{port}/v1", name=name)
        for name, port in (("primary", 8001), ("secondary", 8002))
    ]
    async with (
        DualEndpointLLMClient(endpoints, "gpt-oss-120b", on_event=note, **HEALTH) as client,
        asyncio.timeout(LIMIT_SECONDS),
        asyncio.TaskGroup() as group,
    ):
        group.create_task(breaker())
        for number in range(CALLERS):
            group.create_task(caller(client, number))
    print(json.dumps(found | {"completed_at": completed_at, "changes": changes, "failures": failures}))


asyncio.run(main())

"""Load by the reference client, run on the host of the engines: ``client_load.py COMMAND``.

Four callers ask the two engines without a pause, every other time for a stream. Once 20 answers have come, COMMAND is
run, which kills an engine; the load goes on until that engine has left the round, come back and answered ten more.
Prints as JSON how the calls ended. The key is in VLLM_API_KEY.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter
from typing import Any

from agentic_client import DualEndpointLLMClient, EndpointConfig
from agentic_client.errors import LLMClientError, StreamInterruptedError
from agentic_client.events import AttemptFailed, CallEnded, EndpointChanged, Event

CALLERS = 4
MAX_TOKENS = 33  # nobody else asks for so many: the engines' metrics tell these requests from all others
BEFORE = 20
AFTER = 10
LIMIT_SECONDS = 150.0

found: dict[str, Any] = {"sent": 0, "completed": 0, "lost": 0, "truncated": 0, "retried": 0, "first_loss": None}
completed_at: Counter[str] = Counter()
changes: list[tuple[str, bool]] = []
failures: list[str] = []
recovered_at: dict[str, int] = {}  # how many calls each endpoint had answered when it last changed


def note(event: Event) -> None:
    if isinstance(event, EndpointChanged):
        changes.append((event.endpoint, event.healthy))
        recovered_at[event.endpoint] = completed_at[event.endpoint]
    elif isinstance(event, AttemptFailed):
        failures.append(event.message)
    elif isinstance(event, CallEnded):
        found["retried"] += event.attempts > 1
        if event.error is None and event.endpoint is not None:
            completed_at[event.endpoint] += 1


def over() -> bool:
    """Whether the broken engine is back and has answered, or a call was lost, which is all that there is to know."""
    whole = ("primary", True) in changes and completed_at["primary"] >= recovered_at["primary"] + AFTER
    return whole or found["lost"] > 0


async def caller(client: DualEndpointLLMClient, number: int) -> None:
    for turn in range(10**6):
        if over():
            return
        messages = [{"role": "user", "content": f"Question {turn} of caller {number}"}]
        found["sent"] += 1
        try:
            if turn % 2:
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


async def breaker(command: str) -> None:
    while found["completed"] < BEFORE:
        if over():
            return
        await asyncio.sleep(0.05)
    await asyncio.to_thread(subprocess.run, command, shell=True, check=True)


async def main() -> None:
    endpoints = [
        EndpointConfig(url=f"http://localhost:{port}/v1", name=name)
        for name, port in (("primary", 8001), ("secondary", 8002))
    ]
    async with (
        DualEndpointLLMClient(endpoints, "gpt-oss-120b", on_event=note) as client,
        asyncio.timeout(LIMIT_SECONDS),
        asyncio.TaskGroup() as group,
    ):
        group.create_task(breaker(sys.argv[1]))
        for number in range(CALLERS):
            group.create_task(caller(client, number))
    print(json.dumps(found | {"completed_at": completed_at, "changes": changes, "failures": failures}))


asyncio.run(main())

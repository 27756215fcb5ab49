"""What the tests share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from engines import HANG_SECONDS, Service


@pytest.fixture
def run() -> Callable[[Callable[[Service], Coroutine[Any, Any, None]]], None]:
    """Runs a test's coroutine beside two engines; no task of the client may be left."""

    async def main(test: Callable[[Service], Coroutine[Any, Any, None]]) -> None:
        service = Service()
        await service.a.start()
        await service.b.start()
        async with asyncio.timeout(HANG_SECONDS / 2):
            await test(service)
        assert [task.get_name() for task in asyncio.all_tasks() if "agentic_client" in task.get_name()] == []
        await service.a.stop()
        await service.b.stop()

    return lambda test: asyncio.run(main(test))

# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Where prompts begin to differ: what is before that is all that a prefix cache can find again."""

from __future__ import annotations

import json

#: Characters that are shown before and after the first difference.
BEFORE, AFTER = 20, 40


def parse(text: str) -> list[str]:
    """Prompts of a file with one JSON value a line: a string, or a request with ``messages``. Raises ValueError."""
    prompts = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if isinstance(value, dict):
                value = "\n".join(f"{one['role']}: {one['content']}" for one in value["messages"])
        except (ValueError, KeyError, TypeError):
            value = None
        if not isinstance(value, str):
            raise ValueError(f"line {number}: wanted a prompt as a JSON string, or a request with messages, as JSON")
        prompts.append(value)
    if len(prompts) < 2:
        raise ValueError(f"wanted two prompts or more, found {len(prompts)}")
    return prompts


def difference(text: str, show: bool) -> str:
    """Where the prompts of such a file begin to differ, and with ``show`` the text there. Raises ValueError."""
    first, *others = parse(text)
    if all(other == first for other in others):
        return f"All {len(others) + 1} prompts are the same ({len(first)} characters): the cache should find them"
    shared, number = min((_shared(first, other), number) for number, other in enumerate(others, 2) if other != first)
    lines = [
        f"The {len(others) + 1} prompts share their first {shared} characters of {len(first)}; "
        f"there prompt {number} differs from prompt 1",
        *([f"  1: {_around(first, shared)}", f"  {number}: {_around(others[number - 2], shared)}"] if show else []),
    ]
    return "\n".join(lines)


def _shared(one: str, other: str) -> int:
    """How many characters are the same in both from the first one on."""
    pairs = enumerate(zip(one, other))
    return next((place for place, (mine, yours) in pairs if mine != yours), min(len(one), len(other)))


def _around(prompt: str, place: int) -> str:
    return repr(prompt[max(0, place - BEFORE) : place + AFTER])

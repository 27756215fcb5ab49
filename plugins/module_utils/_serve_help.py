# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""What ``vllm serve`` accepts, read from its own captured ``--help=all``.

The help text is argparse's: an option starts a line at an indentation of two, its help follows at
24. ``--x, --no-x`` is a boolean, ``{a,b}`` lists choices, ``X [X ...]`` takes several values, and
``(default: V)`` ends most texts. The text carries no types, so a type is only demanded where the
default or the text shows it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_OPTION = re.compile(r"^  (-{1,2}[a-zA-Z].*)$")
_FLAG = re.compile(r"^(--?[A-Za-z][\w.-]*)(?:[ ](\S.*))?$")
_DEFAULT = re.compile(r"\(default:\s*(.*?)\)\s*$", re.DOTALL)
_HUMAN = re.compile(r"\d+(\.\d+)?[kKmMgGtT]?")
#: Whole numbers whose default (None) and text do not show it.
_WHOLE = ("max-num-seqs", "block-size", "max-num-queued-reqs")
_FRACTION = ("gpu-memory-utilization",)


@dataclass(frozen=True)
class Option:
    """One option: its main name, its other spellings, and what its values look like."""

    name: str
    aliases: tuple[str, ...]
    negations: tuple[str, ...]
    metavar: str
    text: str

    @property
    def boolean(self) -> bool:
        return not self.metavar

    @property
    def choices(self) -> tuple[str, ...]:
        match = re.match(r"\{(.*?)\}", self.metavar)
        return tuple(match.group(1).split(",")) if match else ()

    @property
    def default(self) -> Any:
        """The default as a Python value where the text gives one, else None."""
        match = _DEFAULT.search(self.text)
        try:
            return ast.literal_eval(match.group(1)) if match else None
        except (SyntaxError, ValueError):
            return None

    def negates(self, key: str) -> bool:
        return key in self.negations

    def complaint(self, value: Any) -> str:
        """Why the pinned vLLM would not take the value, or the empty string."""
        flag = f"--{self.name}"
        if self.boolean:
            return "" if isinstance(value, bool) else f"{flag} is a switch: wanted true or false"
        if isinstance(value, bool) or value is None:
            return f"{flag} wants a value, not {str(value).lower()}"
        if isinstance(value, dict):
            takes = isinstance(self.default, dict) or "json" in self.text.lower() or "config" in self.name
            return "" if takes else f"{flag} takes no mapping"
        if isinstance(value, list):
            # vLLM hands the items of a list on one by one, so a list in JSON has to be a string.
            return "" if "..." in self.metavar else f"{flag} takes one value, not a list (a list in JSON is a string)"
        if self.choices and str(value) not in self.choices:
            return f"wanted one of {', '.join(self.choices)}"
        return self._number_complaint(value)

    def _number_complaint(self, value: Any) -> str:
        if self.name in _FRACTION:
            fine = isinstance(value, (int, float)) and 0 < value <= 1
            return "" if fine else "wanted a number above 0, at most 1"
        if "human-readable" in self.text:
            fine = _HUMAN.fullmatch(str(value)) is not None or (str(value) in ("auto", "-1") and "auto" in self.text)
            return "" if fine else "wanted a whole number, or one such as 32k (32000) or 32K (32768)"
        if type(self.default) is int or self.name in _WHOLE:
            return "" if type(value) is int else "wanted a whole number"
        if type(self.default) is float:
            return "" if isinstance(value, (int, float)) else "wanted a number"
        return ""


class ServeOptions:
    """All options of one version of ``vllm serve``, by every spelling without the dashes."""

    def __init__(self, options: Iterable[Option]) -> None:
        self._by_name: dict[str, Option] = {}
        for option in options:
            for name in (option.name, *option.aliases, *option.negations):
                self._by_name[name] = option

    @classmethod
    def parse(cls, help_text: str) -> ServeOptions:
        """Read the text of ``vllm serve --help=all``.

        Raises ValueError where the text is not that (it must at least know ``--port``).
        """
        found: list[tuple[str, list[str]]] = []
        in_option = False
        for line in help_text.splitlines():
            start = _OPTION.match(line)
            if start:
                head, _, text = re.sub(r" {2,}", "\n", start.group(1)).partition("\n")
                found.append((head, [text]))
                in_option = True
            elif line.startswith(" " * 10) and in_option:
                found[-1][1].append(line.strip())
            elif line.strip():
                in_option = False
        options = cls(_option(head, " ".join(text)) for head, text in found)
        if options.find("port") is None:
            raise ValueError("not the output of `vllm serve --help=all`: it has no --port")
        return options

    def find(self, name: str) -> Option | None:
        """The option that has this name (no leading dashes), whatever its spelling."""
        return self._by_name.get(name)

    def names(self) -> list[str]:
        return [name for name, option in self._by_name.items() if len(name) > 1 and not option.negates(name)]


def _option(head: str, text: str) -> Option:
    names: list[str] = []
    metavar = ""
    # Commas also stand inside {a,b}; every spelling begins with a dash.
    for part in re.split(r", (?=-)", head):
        match = _FLAG.match(part.strip())
        if not match:
            continue
        names.append(match.group(1).lstrip("-"))
        metavar = match.group(2) or metavar
    negations = tuple(name for name in names if name.startswith("no-") and name[3:] in names)
    positive = [name for name in names if name not in negations]
    return Option(positive[0], tuple(positive[1:]), negations, metavar, text)

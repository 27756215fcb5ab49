# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""How far a long task is: counted on the host, told on the controller.

The module counts and writes a small file every second; the action plugin of the same name reads it
while it waits, and shows a line when something has changed.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

GIB = 2**30


@dataclass
class Counts:
    """Bytes and files of one run; ``note`` is why nothing moves, where that is so."""

    fetched: int = 0
    to_fetch: int = 0
    hashed: int = 0
    to_hash: int = 0
    note: str = ""


class Progress:
    """Counts from several threads. ``path`` is the file that tells them; empty for none."""

    def __init__(self, path: str = "") -> None:
        self.path = path
        self.counts = Counts()
        self._lock = threading.Lock()

    def add(self, **amounts: int) -> None:
        """Add to the counts by name, such as ``fetched=4096``. What moves ends a note."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self.counts, name, getattr(self.counts, name) + amount)
            self.counts.note = ""

    def note(self, text: str) -> None:
        """Say why nothing moves."""
        with self._lock:
            self.counts.note = text

    @contextmanager
    def told(self, interval: float = 1.0) -> Iterator[None]:
        """Write the file now, every ``interval`` seconds, and remove it at the end."""
        if not self.path:
            yield
            return
        os.makedirs(os.path.dirname(self.path), mode=0o755, exist_ok=True)
        end = threading.Event()
        self._write()

        def tell() -> None:
            while not end.wait(interval):
                self._write()

        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        try:
            yield
        finally:
            end.set()
            teller.join()
            with suppress(FileNotFoundError):  # another run that ended has removed it
                os.unlink(self.path)

    def _write(self) -> None:
        with self._lock:
            text = json.dumps(asdict(self.counts))
        new = f"{self.path}.{os.getpid()}"
        with open(new, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(new, self.path)


def amount(size: float) -> str:
    """Bytes for a person, in MiB below one GiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def describe(now: Mapping[str, Any], before: Mapping[str, Any], seconds: float) -> str:
    """One line on how far it is, from the counts now and those ``seconds`` ago; empty where nothing is known."""
    # Files are verified as they arrive, so what is still to come decides how long it takes.
    fetching = now.get("fetched", 0) < now.get("to_fetch", 0)
    done, total, verb = ("fetched", "to_fetch", "fetched") if fetching else ("hashed", "to_hash", "verified")
    have, want = now.get(done, 0), now.get(total, 0)
    parts = []
    if want:
        parts.append(f"{verb} {amount(have)} of {amount(want)} ({100 * have // want} %)")
        # Before the first look another run may have done a part of it.
        rate = (have - before[done]) / seconds if done in before and seconds > 0 else 0.0
        if rate > 0:
            parts.append(f"{amount(rate)}/s, {duration((want - have) / rate)} left")
    if now.get("note"):
        parts.append(str(now["note"]))
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Seconds for a person."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"

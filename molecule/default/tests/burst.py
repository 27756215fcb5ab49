"""A burst of long requests, run on the host of the engines: ``burst.py AT_ONCE SECONDS URL...``.

Each client streams one long answer after the other until the time is up, then hangs up. Prints as JSON how many were
under way at most, how many tokens came, and how many requests failed before that. The key is in VLLM_API_KEY.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
import threading
import time
from typing import Any
from urllib.parse import urlsplit

HEADERS = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ['VLLM_API_KEY']}"}
found: dict[str, Any] = {
    "at_once": 0,
    "most_at_once": 0,
    "tokens": 0,
    "requests": 0,
    "failed": 0,
    "first_failure": None,
}
lock = threading.Lock()


def count(**changes: int) -> None:
    with lock:
        for name, change in changes.items():
            found[name] += change
        found["most_at_once"] = max(found["most_at_once"], found["at_once"])


def client(number: int, url: str, end: float) -> None:
    while time.monotonic() < end:
        prompt = f"Client {number} at {time.monotonic()}: " + "tell it in many words. " * 150
        body = {"model": "gpt-oss-120b", "prompt": prompt, "max_tokens": 1500, "ignore_eos": True, "stream": True}
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=600)
        count(at_once=1, requests=1)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), HEADERS)
            response = connection.getresponse()
            if response.status != 200:
                raise OSError(f"HTTP {response.status} {response.read(200)!r}")
            for line in response:
                count(tokens=line.startswith(b"data: {"))
                if time.monotonic() >= end:
                    break
        except (OSError, http.client.HTTPException) as error:
            # Those that still wait when the time is up are hung up on, which is no failure.
            if time.monotonic() < end:
                count(failed=1)
                found["first_failure"] = found["first_failure"] or str(error)
                time.sleep(1)
        finally:
            count(at_once=-1)
            connection.close()


def main(at_once: int, seconds: float, urls: list[str]) -> None:
    end = time.monotonic() + seconds
    clients = [
        threading.Thread(target=client, args=(number, urls[number % len(urls)], end), daemon=True)
        for number in range(at_once)
    ]
    for one in clients:
        one.start()
    time.sleep(max(0.0, end - time.monotonic()))
    print(json.dumps(found))


main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])

# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Runs ``vllm bench serve`` again and again, in a release's own Python, with the imports done once.

The imports take longer than most of the runs, and several runs can begin at the same moment. A program of its own
that imports nothing of this collection: _benchmark_load.py hands it to the release's interpreter.

Each line of standard input is a JSON list of runs, ``{"argv": [...], "env": {...}, "log": FILE}``, which begin
together. The answer is a line with the list of their exit statuses, when all have ended. The first line that it
writes is ``"ready"``, or ``{"error": ...}`` where this vLLM cannot benchmark.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any


def begin(run: dict[str, Any]) -> int:
    """Start one ``vllm bench serve`` as a child, and return its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        log = os.open(run["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(run["env"])
        sys.argv = ["vllm", "bench", "serve", *run["argv"]]
        from vllm.entrypoints.cli.main import main

        main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: what the parent's exit handlers clean up is the parent's.
        os._exit(status)


def serve() -> None:
    """Answer line by line, until standard input ends."""
    # What vLLM prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    ready: Any = "ready"
    try:
        import vllm.benchmarks.serve
        import vllm.entrypoints.cli.main  # noqa: F401
    except ImportError as error:
        ready = {"error": str(error)}
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        children = [begin(run) for run in json.loads(line)]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(statuses), file=answers, flush=True)


if __name__ == "__main__":
    serve()

# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""The load of a benchmark: what is asked, as arguments of ``vllm bench serve``, and the process that runs it.

All times are seconds; those of results are of the monotonic clock, which all processes of a host share.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import os
import pwd
import select
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import _benchmark_driver
from ._openai import Endpoint

QUESTION, PREFIX, LOAD = "question", "prefix", "load"
#: The question of the guide's first test.
GUIDES_QUESTION = "Write a Python function to sort a list."
#: Tokens after a shared prefix, other ones in each prompt. Few: of layers with a sliding window vLLM keeps what is near
#: the end of a prompt, and finds a shared prefix there at once only if it ends near, too.
SUFFIX = 40
#: Seconds between two looks at whether to go on.
PATIENCE = 0.5
LOG_LINES = 8


class BenchmarkError(Exception):
    """The benchmark cannot go on. The message says what was wanted, what was found and what to do."""


@dataclass(frozen=True)
class Step:
    """One kind of load at one level.

    ``concurrency`` and ``requests`` are those of each target. The requests of *question* all ask the guide's question;
    those of *load* have prompts of ``input_tokens`` that share nothing; those of *prefix* come one after the other, in
    groups of ``group`` with a common beginning of ``input_tokens`` that no earlier prompt had.
    """

    scenario: str
    name: str
    kind: str
    concurrency: int
    requests: int
    output_tokens: int
    input_tokens: int = 0
    group: int = 1

    def as_dict(self) -> dict[str, Any]:
        """For the results."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Files:
    """Where a run finds and leaves its files."""

    scratch: str
    tokenizer: str

    @property
    def question(self) -> str:
        """The data set with the guide's question."""
        return os.path.join(self.scratch, "question.json")

    @property
    def authority(self) -> str:
        """Certificates that the gateway's is checked by, where it is not one that the host trusts."""
        return os.path.join(self.scratch, "authority.pem")

    def prepare(self) -> None:
        """Write what the runs read."""
        # bench serve takes conversations; only their first turn is sent.
        turns = [{"from": "human", "value": GUIDES_QUESTION}, {"from": "gpt", "value": "-"}]
        with open(self.question, "w", encoding="utf-8") as stream:
            json.dump([{"conversations": turns}], stream)


def arguments(step: Step, url: str, model: str, files: Files, seed: int, result: str) -> list[str]:
    """What follows ``vllm bench serve``. Another ``seed`` makes other prompts."""
    argv = {
        "base-url": url,
        "model": model,
        "tokenizer": files.tokenizer,
        "seed": str(seed),
        "max-concurrency": str(step.concurrency),
        "temperature": "0",
        "percentile-metrics": "ttft,tpot,itl,e2el",
        "metric-percentiles": "50,95,99",
        "result-dir": os.path.dirname(result),
        "result-filename": os.path.basename(result),
    }
    if step.kind == QUESTION:
        argv.update(
            {
                "backend": "openai-chat",
                "endpoint": "/v1/chat/completions",
                "dataset-name": "sharegpt",
                "dataset-path": files.question,
                "sharegpt-output-len": str(step.output_tokens),
                "num-prompts": str(step.requests),
            }
        )
    else:
        prefixes = step.requests // step.group
        prefix = step.input_tokens - (SUFFIX if step.kind == LOAD else 0)
        argv.update(
            {
                "backend": "openai",
                "endpoint": "/v1/completions",
                "dataset-name": "prefix_repetition",
                "prefix-repetition-prefix-len": str(prefix),
                "prefix-repetition-suffix-len": str(SUFFIX),
                "prefix-repetition-num-prefixes": str(prefixes),
                "prefix-repetition-output-len": str(step.output_tokens),
                "num-prompts": str(prefixes * step.group),
            }
        )
    # Without a shuffle a group's requests follow each other. --ignore-eos: all runs do the same work.
    flags = ["ignore-eos", "save-result", "save-detailed", "disable-tqdm", "disable-shuffle"]
    return [word for key, value in argv.items() for word in (f"--{key}", value)] + [f"--{flag}" for flag in flags]


class Load:
    """The process that runs ``vllm bench serve``, as an unprivileged user. A context manager.

    ``check`` is called now and then while a run is under way; what it raises ends the run.
    """

    def __init__(
        self, root: str, user: str, files: Files, deadline: float, check: Callable[[], None] = lambda: None
    ) -> None:
        self._python = os.path.join(root, "current", "bin", "python")
        self._user = user
        self._files = files
        self._deadline = deadline
        self._check = check
        self._number = 0
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Load:
        try:
            account = pwd.getpwnam(self._user)
        except KeyError as error:
            raise BenchmarkError(f"wanted a user {self._user} on this host, found none; run site.yml") from error
        program = os.path.join(self._files.scratch, "driver.py")
        with open(program, "w", encoding="utf-8") as stream:
            stream.write(inspect.getsource(_benchmark_driver))
        self._files.prepare()
        # The gateway's own certificate is in a directory that this user cannot read.
        authority = os.environ.get("SSL_CERT_FILE")
        if authority:
            shutil.copyfile(authority, self._files.authority)
        for name in (".", *os.listdir(self._files.scratch)):
            os.chown(os.path.join(self._files.scratch, name), account.pw_uid, account.pw_gid)
        becoming: dict[str, Any] = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        if account.pw_uid == os.geteuid():
            becoming = {}  # it is that user already, and only root may become one
        try:
            self._process = subprocess.Popen(
                [self._python, "-B", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
                cwd=self._files.scratch,
                env=self._environment(),
                start_new_session=True,
                **becoming,
            )
        except OSError as error:
            raise BenchmarkError(f"wanted vLLM's Python at {self._python}, found: {error}; run site.yml") from error
        try:
            ready = self._answer("the imports of vllm bench serve")
        except BaseException:
            self.__exit__()
            raise
        if ready != "ready":
            self.__exit__()
            raise BenchmarkError(
                f"wanted `vllm bench serve` in {os.path.dirname(self._python)}, found that it cannot be imported: "
                f"{ready['error']}; add the package to the lock file (vllm_lock) and run site.yml"
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        # Its session holds the runs under way, too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # what it did not read any more
                    stream.close()
        self._process = None

    def run(self, step: Step, targets: Sequence[Endpoint], model: str, seed: int) -> list[dict[str, Any]]:
        """Load all targets at the same time, and return what each run found, in the order of the targets.

        Raises BenchmarkError where a run fails, or one of its requests.
        """
        runs = []
        for place, target in enumerate(targets):
            self._number += 1
            result = os.path.join(self._files.scratch, f"{self._number}.json")
            runs.append(
                {
                    "argv": arguments(step, target.url, model, self._files, seed + place, result),
                    "env": {"OPENAI_API_KEY": target.api_key} if target.api_key else {},
                    "log": os.path.join(self._files.scratch, f"{self._number}.log"),
                    "result": result,
                }
            )
        process = self._process
        if process is None or process.stdin is None:
            raise BenchmarkError("the load is not under way")
        # Where it has ended, _answer() says so.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(runs) + "\n")
            process.stdin.flush()
        statuses = self._answer(f"{step.name} on {', '.join(target.name for target in targets)}")
        return [self._taken(run, status, target) for run, status, target in zip(runs, statuses, targets)]

    def _taken(self, run: Mapping[str, Any], status: int, target: Endpoint) -> dict[str, Any]:
        """The result of one run; its files are removed."""
        try:
            with open(run["result"], encoding="utf-8", opener=_opened) as stream:
                found: dict[str, Any] = json.load(stream)
        except (OSError, ValueError) as error:
            raise BenchmarkError(
                f"{target}: wanted a result of vllm bench serve, found exit status {status}: {_tail(run['log'])}"
            ) from error
        failed = [text for text in found.get("errors", []) if text]
        if status or failed or found.get("failed"):
            raise BenchmarkError(
                f"{target}: wanted all requests answered, found {found.get('failed', len(failed))} of "
                f"{found.get('num_prompts')} failed: {failed[0].strip() if failed else _tail(run['log'])}"
            )
        os.unlink(run["result"])
        os.unlink(run["log"])
        return found

    def _answer(self, what: str) -> Any:
        """The next line of the driver. Raises BenchmarkError where none comes before the deadline."""
        process = self._process
        if process is None or process.stdout is None:
            raise BenchmarkError("the load is not under way")
        end = time.monotonic() + self._deadline
        while not select.select([process.stdout], [], [], PATIENCE)[0]:
            self._check()
            if time.monotonic() > end:
                raise BenchmarkError(
                    f"{what}: not within {self._deadline:g} s; raise vllm_benchmark_timeout, or ask for less"
                )
        line = process.stdout.readline()
        if not line:
            raise BenchmarkError(f"{what}: the process that runs vllm bench serve ended ({process.wait()})")
        return json.loads(line)

    def _environment(self) -> dict[str, str]:
        """Nothing of ours, no network but the endpoints, no GPU, and every cache in the scratch directory."""
        scratch = self._files.scratch
        authority = {"SSL_CERT_FILE": self._files.authority} if "SSL_CERT_FILE" in os.environ else {}
        return {
            **authority,
            "PATH": f"{os.path.dirname(self._python)}:/usr/local/bin:/usr/bin:/bin",
            "LC_ALL": "C.UTF-8",
            "HOME": scratch,
            "TMPDIR": scratch,
            "VLLM_CACHE_ROOT": scratch,
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "TQDM_DISABLE": "1",
        }


def _opened(path: str, flags: int) -> int:
    """Open a file that the load's user made, and nothing else that this user may have put in its place.

    Root reads it: no link may lead elsewhere, and no pipe may hold it up. Raises OSError.
    """
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no regular file")
    return descriptor


def _tail(path: str) -> str:
    """The end of a log."""
    try:
        with open(path, encoding="utf-8", errors="replace", opener=_opened) as stream:
            lines = [line.strip() for line in stream if line.strip()]
    except OSError:
        return "no output"
    return " | ".join(lines[-LOG_LINES:]) or "no output"

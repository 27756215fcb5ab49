"""The reference client against two real engines, from the wheel that users install.

It runs on the host of the engines, in the engines' own Python, which has all that the client needs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from guide_scripts import GUIDE, guide_scripts
from helpers import ROOT, await_, chat, main_pid
from testinfra.host import Host

THERE = "/root/client"
# How users move code over that imports `core`; the limit keeps the tests short, and is no part of it.
LLM_CLIENT = """\
from agentic_client.llm_client import *
import functools; DualEndpointLLMClient = functools.partial(DualEndpointLLMClient, max_tokens=24)
"""
HISTORY = "from agentic_client.conversation_history import *\n"
COUNT = """\
import asyncio, json, sys
from agentic_client import DualEndpointLLMClient, EndpointConfig, create_conversation_history

async def main():
    history = create_conversation_history()
    found = []
    endpoints = [EndpointConfig(url="http://localhost:8001/v1", name="primary")]
    async with DualEndpointLLMClient(endpoints, "gpt-oss-120b") as client:
        for number in range(3):
            history.add_user(f"Question {number}: wie geht's? " + "word " * number * 50)
            answer = await client.chat_completion(await history.fit(), max_tokens=12)
            found.append([await history.count(), answer.usage.prompt_tokens])
            history.add_assistant(answer.choices[0].message)
    print(json.dumps(found))

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def client(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The client on the host; the start of a command line that runs a file with it."""
    here = tmp_path_factory.mktemp("client")
    subprocess.run(["uv", "build", "--offline", "--wheel", "-o", here, ROOT / "client"], check=True)
    (here / "core").mkdir()
    files = {
        "core/__init__.py": "",
        "core/llm_client.py": LLM_CLIENT,
        "core/conversation_history.py": HISTORY,
        "count.py": COUNT,
        **guide_scripts(),
    }
    for name, text in files.items():
        (here / name).write_text(text)
    shutil.copy(Path(__file__).parent / "client_load.py", here)
    subprocess.run(
        ["ansible", "vllm", "-i", "inventory/molecule", "-m", "copy", "-a", f"src={here}/ dest={THERE} mode=preserve"],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
        check=True,
    )
    wheel = next(here.glob("*.whl")).name
    yield (
        "VLLM_API_KEY=$(sed -n 's/^VLLM_API_KEY=//p' /etc/vllm/primary.env | tr -d '\"') "
        f"PYTHONPATH={THERE}/{wheel} /opt/vllm/current/bin/python -W error {THERE}/"
    )
    host.check_output(f"rm -r {THERE}")


@pytest.mark.skipif(GUIDE not in os.environ, reason=f"{GUIDE} names no configuration guide, whose scripts this runs")
@pytest.mark.usefixtures("keeps_serving")
def test_the_guides_benchmarks_run_as_they_are(host: Host, client: str) -> None:
    for script, lines in (
        ("sequential.py", ("Sequential", "Parallel", "Speedup")),
        ("prefix.py", (r"First request \(cold\)", r"Second request \(cached\)", "Speedup")),
    ):
        done = host.run(client + script)
        assert (done.rc, done.stderr) == (0, "")
        assert re.fullmatch("".join(rf"{line}: [\d.]+(s|x)\n" for line in lines), done.stdout), done.stdout


@pytest.mark.usefixtures("keeps_serving")
def test_tokens_are_counted_as_the_engine_counts_them(host: Host, client: str) -> None:
    counts = json.loads(host.check_output(client + "count.py"))
    assert len(counts) == 3
    assert [counted for counted, _ in counts] == [said for _, said in counts]


def answered(host: Host) -> int:
    """Requests of the load that the secondary has answered: those with 20 to 50 tokens at most."""
    page = host.check_output("curl --silent --fail http://127.0.0.1:8002/metrics")
    found = dict(
        re.findall(r'^vllm:request_params_max_tokens_bucket\{.*le="(20|50)\.0".*\} (\S+)$', page, re.MULTILINE)
    )
    return int(float(found["50"]) - float(found["20"]))


def test_a_killed_engine_loses_nothing_and_repeats_no_answer(host: Host, client: str, api_key: str) -> None:
    host.check_output("systemctl reset-failed vllm@primary.service")
    before, pid = answered(host), main_pid(host, "primary")
    found: dict[str, Any] = json.loads(
        host.check_output(f"{client}client_load.py 'systemctl kill --signal=SIGKILL vllm@primary.service'")
    )
    assert main_pid(host, "primary") != pid
    assert found["changes"] == [["primary", False], ["primary", True]], found
    assert (found["lost"], found["first_loss"]) == (0, None)
    assert found["sent"] == found["completed"] + found["truncated"]
    assert found["truncated"] <= 4  # what the engine was streaming when it died
    assert found["retried"] + found["truncated"] > 0  # the load met the fault
    # The secondary has had each request once, and none whose answer the primary had begun.
    await_(lambda: answered(host) - before == found["completed_at"]["secondary"], 10)
    chat(host, "primary", api_key)

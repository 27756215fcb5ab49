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
from helpers import INSTANCES, PORTS, ROOT, await_, chat, main_pid
from testinfra.host import Host

THERE = "/root/client"
PAGE = ROOT / "docs/client.md"
# Runs a script as it is. The limit keeps the tests short; it is set around the script and around `core`, not in them.
LIMITED = """\
import functools, runpy, sys
from agentic_client import llm_client

llm_client.DualEndpointLLMClient = functools.partial(llm_client.DualEndpointLLMClient, max_tokens=24)
runpy.run_path(sys.argv[1], run_name="__main__")
"""
COUNT = """\
import asyncio, json
from core.conversation_history import create_conversation_history
from core.llm_client import DualEndpointLLMClient, EndpointConfig

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


def shims() -> dict[str, str]:
    """The two files that code which imports `core` is moved over with, as the page on the client has them."""
    found = dict(re.findall(r"^```python\n# (core/\w+\.py)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL))
    assert sorted(found) == ["core/conversation_history.py", "core/llm_client.py"]
    return found


@pytest.fixture(scope="module")
def client(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The client on the host; the start of a command line that runs a file with it."""
    here = tmp_path_factory.mktemp("client")
    subprocess.run(["uv", "build", "--offline", "--wheel", "-o", here, ROOT / "client"], check=True)
    (here / "core").mkdir()
    files = {
        "core/__init__.py": "",
        **shims(),
        "limited.py": LIMITED,
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
        done = host.run(f"{client}limited.py {THERE}/{script}")
        assert (done.rc, done.stderr) == (0, "")
        assert re.fullmatch("".join(rf"{line}: [\d.]+(s|x)\n" for line in lines), done.stdout), done.stdout


@pytest.mark.usefixtures("keeps_serving")
def test_tokens_are_counted_as_the_engine_counts_them(host: Host, client: str) -> None:
    counts = json.loads(host.check_output(client + "count.py"))
    assert len(counts) == 3
    assert [counted for counted, _ in counts] == [said for _, said in counts]


def answered(host: Host, name: str) -> int:
    """Requests of the load that an engine has answered: those with 20 to 50 tokens at most."""
    page = host.check_output(f"curl --silent --fail http://127.0.0.1:{PORTS[name]}/metrics")
    found = dict(
        re.findall(r'^vllm:request_params_max_tokens_bucket\{.*le="(20|50)\.0".*\} (\S+)$', page, re.MULTILINE)
    )
    return int(float(found["50"]) - float(found["20"]))


def load(host: Host, client: str, target: str, fault: str, *undo: str) -> dict[str, Any]:
    """Break an engine under load. No call may be lost, and the other engine must have had each request once."""
    (other,) = set(INSTANCES) - {target}
    before = answered(host, other)
    arguments = (target, fault, *undo)
    found: dict[str, Any] = json.loads(
        host.check_output(f"{client}client_load.py {' '.join(['%s'] * len(arguments))}", *arguments)
    )
    assert (found["lost"], found["first_loss"]) == (0, None), found
    assert found["sent"] == found["completed"] + found["truncated"]
    assert found["truncated"] <= 4, found  # no more than what the engine was streaming
    of_target = [healthy for name, healthy, _reason in found["changes"] if name == target]
    assert (of_target[:2], of_target[-1]) == ([False, True], True), found
    # None twice, and none whose answer the broken engine had begun.
    await_(lambda: answered(host, other) - before == found["completed_at"][other], 10)
    return found


def test_a_killed_engine_loses_nothing_and_repeats_no_answer(host: Host, client: str, api_key: str) -> None:
    host.check_output("systemctl reset-failed vllm@primary.service")
    pid = main_pid(host, "primary")
    found = load(host, client, "primary", "systemctl kill --signal=SIGKILL vllm@primary.service")
    assert main_pid(host, "primary") != pid
    assert found["retried"] + found["truncated"] > 0  # the load met the fault
    chat(host, "primary", api_key)


@pytest.mark.more
def test_an_engine_that_is_restarted_cuts_nothing(host: Host, client: str, api_key: str) -> None:
    """It lets run what it has begun with, and turns away what comes."""
    host.check_output("systemctl reset-failed vllm@secondary.service")
    pid = main_pid(host, "secondary")
    found = load(host, client, "secondary", "systemctl restart vllm@secondary.service")
    assert main_pid(host, "secondary") != pid
    assert found["truncated"] == 0, found
    chat(host, "secondary", api_key)


@pytest.fixture
def goes_on(host: Host) -> Iterator[None]:
    """Whatever happens, the secondary does not stay stopped."""
    yield
    host.run_expect(
        [0], "systemctl kill --signal=SIGCONT vllm@secondary.service; systemctl start vllm@secondary.service"
    )


@pytest.mark.more
@pytest.mark.usefixtures("goes_on")
def test_a_hung_engine_loses_nothing(host: Host, client: str, api_key: str) -> None:
    """It goes on once the client has found out, which is before the health agent would restart it."""
    pid = main_pid(host, "secondary")
    core = host.check_output(f"pgrep --parent {pid} --full VLLM::EngineCore")
    found = load(host, client, "secondary", f"kill -STOP {core}", f"kill -CONT {core}")
    assert found["retried"] > 0, found  # the load met the fault
    assert main_pid(host, "secondary") == pid
    chat(host, "secondary", api_key)

"""What the drills found (side_effect.yml, and the deploy itself), and what the gateway adds to a token."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from gaps import judge_gaps
from helpers import DOOR, INSTANCES, PORTS, ROOT, await_, chat, main_pid
from testinfra.host import Host

FAILOVER = "/var/lib/nvl-vllm/failover.json"
DEPLOYED = ("kill", "drain", "gateway_reload")
DRILLED = ("kill_server", "hang", "kill_server with long prompts")


def drills(host: Host) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(host.file(FAILOVER).content_string)["drills"]
    return found


def judge(numbers: dict[str, Any], requests: int) -> None:
    """Nothing lost, nothing silent: whatever was not completed was cut, and told so to its user."""
    assert numbers["verdict"] == "passed", numbers
    assert numbers["lost"] == 0
    assert numbers["sent"] == numbers["completed"] + numbers["truncated"]
    assert numbers["sent"] >= requests


@pytest.mark.parametrize("fault", DEPLOYED)
def test_deploy_has_proven_the_gateway(host: Host, fault: str) -> None:
    record = json.loads(host.file(f"/var/lib/nvl-vllm/drill-{fault}-gateway.json").content_string)
    numbers = record["numbers"]
    judge(numbers, 32)
    if fault == "kill":
        # The engine was really gone: requests met its end.
        assert numbers["retried"] + numbers["retried_by_gateway"] + numbers["truncated"] > 0


@pytest.mark.parametrize("fault", DRILLED)
def test_users_of_the_gateway_lose_nothing(host: Host, fault: str) -> None:
    judge(drills(host)[f"{fault} via gateway"], 32)


def test_a_hung_engine_is_out_in_less_than_ten_seconds(host: Host) -> None:
    assert drills(host)["hang via gateway"]["seconds_to_eject"] < 10


@pytest.mark.long
def test_a_stop_cuts_nothing(host: Host) -> None:
    assert drills(host)["stop via gateway"]["truncated"] == 0


def met(numbers: dict[str, Any]) -> bool:
    """Whether requests were on the engine that broke: sent again, cut, or kept waiting for much longer than others."""
    return bool(numbers["retried_by_gateway"] + numbers["truncated"] > 0 or numbers["latency"]["worst"] > 5)


def test_the_load_met_the_faults(host: Host) -> None:
    """A drill without losses proves nothing where no request was on the engine that broke."""
    found = drills(host)
    for fault in ("kill_server", "hang"):
        numbers = found[f"{fault} via gateway"]
        assert met(numbers), numbers


def test_the_gateway_alone_sends_the_largest_legal_prompt_again(host: Host) -> None:
    numbers = drills(host)["kill_server with long prompts via gateway"]
    assert numbers["retried_by_gateway"] > 0, numbers
    assert numbers["attempts"] == numbers["sent"]


@pytest.mark.long
def test_full_set_with_five_hundred_requests_each(host: Host) -> None:
    found = drills(host)
    for fault in ("kill", "kill_server", "hang", "stop", "drain", "gateway_reload", "storm503", "slow"):
        judge(found[f"{fault} via gateway"], 500)
    assert found["storm503 via gateway"]["retried_by_gateway"] > 0
    # Cut in the middle, and never taken for an answer.
    reset = found["reset via gateway"]
    assert reset["truncated"] + reset["lost"] > 0
    assert reset["sent"] == reset["completed"] + reset["truncated"] + reset["lost"]
    assert {name: numbers["verdict"] for name, numbers in found.items()} == dict.fromkeys(found, "passed")


def latency(host: Host, api_key: str, rounds: int) -> dict[str, Any]:
    """Milliseconds between tokens, direct and through the gateway, request by request in turns."""
    program = (ROOT / "tools/bench_latency.py").read_text()
    host.run_expect([0], "printf %%s %s >/tmp/bench_latency.py", program)
    engines = ",".join(f"http://127.0.0.1:{port}" for port in PORTS.values())
    doors = f"--door direct={engines} --door gateway=http://127.0.0.1:{DOOR}"
    # Over stdin: keys do not belong on a command line.
    script = f"read -r VLLM_API_KEY; export VLLM_API_KEY; exec python3 -I /tmp/bench_latency.py measure \
        --model gpt-oss-120b --rounds {rounds} --tokens 64 {doors}"
    found: dict[str, Any] = json.loads(host.check_output("printf '%%s\n' %s | sh -c %s", api_key, script))
    return found


def test_gateway_adds_less_than_a_millisecond_to_a_token(host: Host, api_key: str) -> None:
    found = latency(host, api_key, rounds=20)
    assert [found[name]["failed"] for name in ("direct", "gateway")] == [0, 0]
    assert found["gateway"]["gap"]["count"] > 1000
    judge_gaps(found)


def ejections(host: Host) -> dict[str, Any]:
    """How often the agent ejected each engine, and how often the gateway took it out, since they started."""
    status = json.loads(host.check_output("curl -sf http://127.0.0.1:8405/status"))
    page = host.check_output("curl -sf 'http://127.0.0.1:8404/;csv'").removeprefix("# ")
    rows = [row for row in csv.DictReader(io.StringIO(page)) if row["svname"] in PORTS]
    return {
        "agent": {name: one["ejections"] for name, one in status["instances"].items()},
        "gateway": {row["svname"]: row["chkdown"] for row in rows},
    }


def agent(host: Host) -> dict[str, dict[str, Any]]:
    """What the health agent knows of each engine."""
    found: dict[str, dict[str, Any]] = json.loads(host.check_output("curl -sf http://127.0.0.1:8405/status"))
    return found["instances"]


@pytest.mark.long
def test_an_engine_that_goes_on_hanging_is_restarted(host: Host, api_key: str) -> None:
    """Nobody sends SIGCONT: the agent kills it, systemd starts it, and users of the gateway are answered meanwhile."""
    since = host.check_output("date +%s")
    before, mains = agent(host), {name: main_pid(host, name) for name in INSTANCES}
    engine = host.check_output("pgrep --parent %s --full VLLM::EngineCore", str(mains["primary"]))
    host.check_output("kill -STOP %s", engine)

    def restarted() -> bool:
        chat(host, "gateway", api_key)
        return bool(agent(host)["primary"]["restarts"] == before["primary"]["restarts"] + 1)

    # 21 s at most until an idle engine is ejected, vllm_health_restart_after, and a slow machine.
    await_(restarted, 120)
    await_(lambda: {one["word"] for one in agent(host).values()} == {"up ready"}, 300)

    assert agent(host)["secondary"]["restarts"] == before["secondary"]["restarts"]
    assert main_pid(host, "primary") != mains["primary"]
    assert main_pid(host, "secondary") == mains["secondary"]
    assert host.run("kill -0 %s", engine).rc != 0
    for name in (*INSTANCES, "gateway"):
        chat(host, name, api_key)
    journal = host.check_output("journalctl --no-pager -o cat -u vllm-health --since @%s", since)
    made = [json.loads(line) for line in journal.splitlines() if line.startswith("{")]
    assert {one["instance"] for one in made} == {"primary"}
    assert [one["decision"] for one in made if one["decision"] != "state"] == ["eject", "restart", "admit"]


@pytest.mark.long
def test_a_burst_of_long_requests_ejects_nobody(host: Host, api_key: str) -> None:
    """200 at once on both engines for three minutes: busy is not dead."""
    before = ejections(host)
    host.run_expect([0], "printf %%s %s >/tmp/burst.py", (Path(__file__).parent / "burst.py").read_text())
    urls = " ".join(f"http://127.0.0.1:{port}" for port in PORTS.values())
    script = f"read -r VLLM_API_KEY; export VLLM_API_KEY; exec python3 -I /tmp/burst.py 200 180 {urls}"
    found = json.loads(host.check_output("printf '%%s\\n' %s | sh -c %s", api_key, script))
    assert found["most_at_once"] == 200, found
    assert found["failed"] == 0, found
    assert found["tokens"] > 1000, found
    assert ejections(host) == before

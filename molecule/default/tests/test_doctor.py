"""The doctor on real engines: healthy as they are, and each illness that can be had here found."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from helpers import DOOR, INSTANCES, PORTS, ROOT, SANDBOX, await_, chat, main_pid, playbook, show
from testinfra.host import Host

HEALTHY, SICK, UNKNOWN = 0, 2, 4
DECLARED = [{"name": name, "port": port} for name, port in PORTS.items()]
THIRD = 8009
#: Load goes on as long as this file is there.
MARK = "/run/doctor-load"
#: Run on the host: MANY clients at once, each with one request after the other.
LOAD = """
import collections, json, os, sys, threading, time, urllib.error, urllib.request
mark, url, many, more = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
headers = {"Content-Type": "application/json", "Authorization": "Bearer " + os.environ["VLLM_API_KEY"]}
found = collections.Counter()
def client(number):
    while os.path.exists(mark):
        question = {"role": "user", "content": f"Hello from client {number}"}
        body = {"model": "gpt-oss-120b", "messages": [question], "ignore_eos": True, **more}
        request = urllib.request.Request(url + "/v1/chat/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                answer.read()
            found["200"] += 1
        except urllib.error.HTTPError as error:
            found[str(error.code)] += 1
            time.sleep(0.2)  # what is refused at once would be asked for at once
clients = [threading.Thread(target=client, args=[number]) for number in range(many)]
for one in clients:
    one.start()
for one in clients:
    one.join()
print(json.dumps(found))
"""


class Doctor:
    """Runs of the playbook, with the findings as it writes them."""

    def __init__(self, directory: Path) -> None:
        self.report = directory / "doctor.json"
        self.shown = ""

    def run(self, **variables: Any) -> int:
        done = playbook(
            "playbooks/doctor.yml", **{"vllm_doctor_report": str(self.report), "vllm_doctor_window": 3.0, **variables}
        )
        self.shown = done.stdout + done.stderr
        return done.returncode

    def text(self) -> str:
        """What the operator reads, on one line."""
        return " ".join(self.shown.replace("\\n", " ").split())

    def found(self) -> dict[str, str]:
        """Evidence by name and place."""
        findings = json.loads(self.report.read_text())["molecule"]["findings"]
        return {f"{one['name']}: {one['where']}": one["evidence"] for one in findings}


@pytest.fixture
def doctor(tmp_path: Path) -> Doctor:
    return Doctor(tmp_path)


def in_use(host: Host) -> int:
    """How many engines the gateway uses."""
    page = host.run("curl -sf 'http://127.0.0.1:8404/;csv'").stdout
    return sum(line.startswith("engines,") and ",UP," in line for line in page.splitlines() if ",BACKEND," not in line)


@pytest.fixture
def whole(host: Host) -> Iterator[None]:
    """Both engines are used again before the next test."""
    yield
    await_(lambda: host.run("curl -sf http://127.0.0.1:8405/status").stdout.count('"up ready"') == 2, 90)
    await_(lambda: in_use(host) == 2, 30)


def running(host: Host, port: int) -> float:
    """Requests that an engine runs."""
    page = host.run(f"curl -sf http://127.0.0.1:{port}/metrics").stdout
    return sum(map(float, re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", page, re.MULTILINE)))


@contextmanager
def under_load(
    host: Host, key: str, port: int, many: int, await_running: dict[int, int], **more: Any
) -> Iterator[dict[str, int]]:
    """So many clients at an engine or the gateway until the block ends; then how often each status was answered.

    The block begins when the engines (by their ports) run as many requests as is said.
    """
    host.run_expect([0], f"touch {MARK}")
    statuses: dict[str, int] = {}
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(
            host.run,
            "VLLM_API_KEY=%s python3 -c %s %s %s %s %s",
            *(key, LOAD, MARK, f"http://127.0.0.1:{port}", str(many), json.dumps(more)),
        )
        try:
            await_(lambda: load.done() or all(running(host, each) >= n for each, n in await_running.items()), 60)
            assert not load.done(), load.result()
            yield statuses
        finally:
            host.run_expect([0], f"rm -f {MARK}")
            statuses.update(json.loads(load.result(timeout=180).stdout))


def test_a_healthy_host_has_no_finding(doctor: Doctor, keeps_serving: None) -> None:
    assert doctor.run() == HEALTHY, doctor.shown
    assert doctor.found() == {}
    assert "molecule  healthy" in doctor.shown


def test_a_host_that_works_has_none_either(
    host: Host, doctor: Doctor, api_key: str, keeps_serving: None, tmp_path: Path
) -> None:
    """A modest load through the gateway; and prompts are compared beside it."""
    (tmp_path / "prompts.jsonl").write_text('"You are an AI assistant."\n"You are an AI coding assistant."\n')
    with under_load(host, api_key, DOOR, 3, {}, max_tokens=300) as statuses:
        # A string, as -e on a command line gives it.
        prompts = {"vllm_doctor_prompts": str(tmp_path / "prompts.jsonl"), "vllm_doctor_show_prompts": "false"}
        assert doctor.run(**prompts) == HEALTHY, doctor.shown
    assert set(statuses) == {"200"}
    assert doctor.found() == {}
    assert "The 2 prompts share their first 14 characters of 24" in doctor.text()
    assert "coding" not in doctor.shown


@contextmanager
def stopped(host: Host, name: str) -> Iterator[None]:
    """An engine core that hangs."""
    pid = main_pid(host, name)
    core = host.check_output(f"pgrep --parent {pid} --full VLLM::EngineCore")
    # Without the agent, which would restart the engine while the doctor looks.
    host.run_expect([0], f"systemctl stop vllm-health.service && kill -{signal.SIGSTOP.value} {core}")
    try:
        yield
    finally:
        host.run_expect([0], f"kill -{signal.SIGCONT.value} {core}; systemctl start vllm-health.service")


def test_an_engine_that_hangs_is_false_healthy(host: Host, doctor: Doctor, whole: None) -> None:
    with stopped(host, "secondary"):
        assert doctor.run() == SICK, doctor.shown
        found = doctor.found()
    assert "/health answers 200" in found["false_healthy: vllm@secondary.service"]
    # The agent, which the test has stopped, is told too.
    assert "unit_not_active: vllm-health.service" in found


def test_an_agent_that_hangs_does_not_answer(host: Host, doctor: Doctor, whole: None) -> None:
    pid = show(host, "vllm-health.service", "MainPID")["MainPID"]
    host.run_expect([0], f"kill -{signal.SIGSTOP.value} {pid}")
    try:
        assert doctor.run() == SICK, doctor.shown
    finally:
        host.run_expect([0], f"kill -{signal.SIGCONT.value} {pid}")
    assert set(doctor.found()) == {"no_answer: vllm-health.service"}


def test_what_an_admin_leaves_behind_is_found(host: Host, doctor: Doctor, api_key: str, whole: None) -> None:
    host.run_expect(
        [0],
        "mkdir -p /run/nvl-vllm/drain && echo test | tee /run/nvl-vllm/drain/primary >/run/nvl-vllm/drain/secondary"
        " && cp -p /etc/vllm/primary.yaml /tmp/primary.yaml && echo '# by hand' >>/etc/vllm/primary.yaml"
        " && systemd-run --quiet --unit=stray bash -c 'exec -a VLLM::EngineCore sleep 600'",
    )
    try:
        await_(lambda: in_use(host) == 0, 30)
        with under_load(host, api_key, DOOR, 1, {}, max_tokens=1) as statuses:
            assert doctor.run() == SICK, doctor.shown
        found = doctor.found()
    finally:
        host.run_expect(
            [0],
            "rm -f /run/nvl-vllm/drain/*; systemctl stop stray; cp -p /tmp/primary.yaml /etc/vllm/primary.yaml",
        )
    for name in INSTANCES:
        assert found[f"kept_out: vllm@{name}.service"] == "the health agent says drain"
    assert set(statuses) == {"503"}
    assert re.fullmatch(r"[1-9]\d* answers 5xx within 3 s", found["gateway_refused: vllm-gateway.service"])
    assert "runs_from_older_files: vllm@primary.service" in found
    assert any(name.startswith("orphan_engine: process") for name in found), found


@pytest.mark.more
def test_an_engine_that_dies_at_its_start_says_why(host: Host, doctor: Doctor) -> None:
    """A throw-away engine that asks for more context than its KV cache has room for."""
    host.run_expect(
        [0],
        "cd /etc/vllm && cp -p secondary.env third.env"
        " && sed 's/8002/8009/; s/^max-model-len.*/max-model-len: 131072/' secondary.yaml >third.yaml",
    )
    try:
        host.run("systemctl start --no-block vllm@third.service")
        # It has failed, and systemd starts it again: the doctor still says why.
        await_(lambda: int(show(host, "vllm@third.service", "NRestarts")["NRestarts"]) > 0, 90)
        third = {"name": "third", "port": THIRD}
        assert doctor.run(vllm_instances=[*DECLARED, third], vllm_doctor_limits={"restarts": 1}) == SICK, doctor.shown
        found = doctor.found()
    finally:
        remove_third(host)
    evidence = found["out_of_memory: vllm@third.service"]
    assert "larger than the available KV cache memory" in evidence
    # With what is declared, which is not what the file here asks for, it would fit.
    assert re.search(r"; by the memory plan it takes [\d.]+ GiB: weights 0\.\d, .*KV cache 0\.1[,;]", evidence)
    longest = evidence.partition("estimated maximum model length is ")[2].partition(".")[0]
    assert f"set max-model-len: {longest} (it is 4096)" in doctor.text()
    assert re.search(r"times, the last time [01] min ago$", found["restarted: vllm@third.service"])


def remove_third(host: Host) -> None:
    host.run("systemctl stop vllm@third.service; systemctl reset-failed vllm@third.service")
    host.run_expect([0], "rm -f /etc/vllm/third.yaml /etc/vllm/third.env")


@pytest.mark.more
def test_an_engine_with_too_small_a_cache(host: Host, doctor: Doctor, api_key: str, whole: None) -> None:
    """A throw-away engine: 31 blocks of 128 tokens for its KV cache, and no prefix caching; then it is stopped."""
    arguments = {"kv-cache-memory-bytes": 2**24, "max-model-len": 1024, "enable-prefix-caching": False}
    changes = "".join(f"; s/^{name}:.*/{name}: {json.dumps(value)}/" for name, value in arguments.items())
    host.run_expect(
        [0],
        "cd /etc/vllm && cp -p secondary.env third.env"
        f" && sed 's/{PORTS['secondary']}/{THIRD}/{changes}' secondary.yaml >third.yaml"
        f" && sed -i 's/:{PORTS['secondary']}/:{THIRD}/' third.env",
    )
    inherited = {"enforce-eager": True, "distributed-executor-backend": "uni"}
    third = {"name": "third", "port": THIRD, "arguments": {**inherited, **arguments}}
    try:
        host.run_expect([0], "timeout 180 systemctl start vllm@third.service")
        with under_load(host, api_key, THIRD, 8, {THIRD: 2}, max_tokens=700) as statuses:
            # Whoever loses its place gives back all of its blocks, so that the cache is not full at each look.
            look = {"vllm_doctor_limits": {"kv_usage": 0.8}, "vllm_doctor_window": 10.0}
            assert doctor.run(vllm_instances=[*DECLARED, third], **look) == SICK, doctor.shown
        found = doctor.found()
        # Prompts of 900 tokens, of which a step reads one and a bit, and the cache holds three; short answers.
        long = [{"role": "user", "content": "tell it in many words. " * 140}]
        with under_load(host, api_key, THIRD, 20, {THIRD: 1}, max_tokens=2, messages=long):
            assert doctor.run(vllm_instances=[*DECLARED, third]) == SICK, doctor.shown
        crowded = doctor.found()
        host.run_expect([0], "systemctl stop vllm@third.service")
        assert doctor.run(vllm_instances=[*DECLARED, third], vllm_doctor_window=1.0) == SICK, doctor.shown
        after = doctor.found()
    finally:
        remove_third(host)
    assert set(statuses) == {"200"}
    assert found["prefix_cache_off: vllm@third.service"] == "enable-prefix-caching is false"
    assert " of the KV cache was in use, " in found["kv_cache_full: vllm@third.service"]
    assert "requests lost their place in the KV cache" in found["preemptions: vllm@third.service"]
    assert "requests or more waited all the time while " in crowded["requests_wait: vllm@third.service"]
    assert "unit_not_active: vllm@third.service" in after


@pytest.mark.more
def test_more_clients_than_seats(host: Host, doctor: Doctor, api_key: str, whole: None) -> None:
    """Through the gateway, which lets nine requests through to each engine and keeps the others."""
    with under_load(host, api_key, DOOR, 28, dict.fromkeys(PORTS.values(), 8), max_tokens=200):
        assert doctor.run() == SICK, doctor.shown
    for name in INSTANCES:
        evidence = doctor.found()[f"max_num_seqs_reached: vllm@{name}.service"]
        queued = re.match(r"8 requests run \(max-num-seqs 8\), [0-2] wait in it and (\d+) at the gateway", evidence)
        assert queued, evidence
        assert 5 <= int(queued[1]) <= 12, evidence
    assert "set max-num-seqs: 16 in the arguments of primary" in doctor.text()


def test_what_is_a_fault_is_for_the_operator_to_say(host: Host, doctor: Doctor) -> None:
    """Disks, the time that weights took, and what programs wait for, by limits that nothing keeps."""
    limits = {"free_space": 0.9999, "load_rate": 1e9, "load_size": 0.001, "pressure": 0}
    assert doctor.run(vllm_doctor_limits=limits) == SICK, doctor.shown
    found = doctor.found()
    # Not every kernel tells.
    waits = {f"pressure: {name}" for name in ("io", "memory") if host.run(f"cat /proc/pressure/{name}").rc == 0}
    loads = {f"slow_disk: vllm@{name}.service" for name in INSTANCES}
    disks = {name for name in found if name.startswith("disk_full: /")}
    assert set(found) == waits | loads | disks
    assert "disk_full: /srv/models/tiny-gpt-oss" in disks
    assert re.search(r"GiB of weights took [\d.]+ s: \d+ MiB/s", found["slow_disk: vllm@primary.service"])


#: The same engines, declared as those of a host with two GPUs.
GPUS: dict[str, Any] = {
    "vllm_device": "cuda",
    "cuda_driver_source": "host",
    "vllm_arguments": {},
    "vllm_environment": {},
    "vllm_instances": [{**one, "gpus": [number]} for number, one in enumerate(DECLARED)],
    "vllm_doctor_window": 1.0,
}


@pytest.fixture
def nvidia_smi(host: Host) -> Iterator[None]:
    """The stand-in on the host's PATH."""
    subprocess.run(
        [
            *("ssh", "-i", str(SANDBOX / "id_ed25519"), "-p", "2223"),
            *("-o", f"UserKnownHostsFile={SANDBOX}/known_hosts", "root@127.0.0.1"),
            "cat >/usr/local/bin/nvidia-smi && chmod 755 /usr/local/bin/nvidia-smi",
        ],
        input=(ROOT / "tests/fakes/nvidia-smi").read_bytes(),
        check=True,
        timeout=60,
    )
    yield
    host.run_expect([0], "rm -f /usr/local/bin/nvidia-smi /etc/nvidia-smi-state")


def test_a_gpu_that_is_hot_and_has_little_to_do(host: Host, doctor: Doctor, api_key: str, nvidia_smi: None) -> None:
    host.run_expect([0], "echo throttling >/etc/nvidia-smi-state")
    with under_load(host, api_key, PORTS["primary"], 2, {PORTS["primary"]: 2}, max_tokens=300):
        assert doctor.run(**GPUS) == SICK, doctor.shown
    found = doctor.found()
    assert set(found) == {"low_gpu_utilization: GPU 0", "throttled: GPU 0"}
    assert re.search(r": in (\d+) of \1 looks it is too hot \(hardware\)$", found["throttled: GPU 0"])
    assert re.match(r"0% on average over 1 s while [12] requests ran$", found["low_gpu_utilization: GPU 0"])
    assert re.search(r"clients send too few requests at once \([12] of 8\)", doctor.text())


@pytest.mark.parametrize(
    ("state", "name", "evidence"),
    [
        ("mismatch", "gpu_driver: GPUs", "kernel module and libraries are of different versions"),
        ("lost", "gpu_fault: GPU 1", "cannot be reached"),
    ],
)
def test_a_gpu_that_does_not_work(
    host: Host, doctor: Doctor, nvidia_smi: None, state: str, name: str, evidence: str
) -> None:
    host.run_expect([0], f"echo {state} >/etc/nvidia-smi-state")
    assert doctor.run(**GPUS) == SICK, doctor.shown
    found = doctor.found()
    assert set(found) == {name}
    assert evidence in found[name]


@pytest.mark.more
def test_prompts_that_share_nothing(host: Host, doctor: Doctor, api_key: str, whole: None) -> None:
    numbers = count()

    def another() -> None:
        text = " ".join(f"{next(numbers)}" for _ in range(700))
        chat(host, "primary", api_key, messages=[{"role": "user", "content": text}], max_tokens=1)

    with ThreadPoolExecutor(1) as pool:
        looked = pool.submit(doctor.run, vllm_doctor_window=15.0)
        while not looked.done():
            another()
        assert looked.result() == SICK, doctor.shown
    assert "prompt tokens (" in doctor.found()["prefix_cache_without_hits: vllm@primary.service"]


def test_a_host_that_is_away_is_no_healthy_one(doctor: Doctor) -> None:
    doctor.report.write_text('{"molecule": {"findings": [], "unknown": []}}')
    assert doctor.run(ansible_port=1) == UNKNOWN
    (why,) = json.loads(doctor.report.read_text())["molecule"]["unknown"]
    assert "Connection refused" in why
    assert "healthy" not in doctor.shown


def test_a_limit_that_there_is_not_is_refused(doctor: Doctor) -> None:
    assert doctor.run(vllm_doctor_limits={"hit_rat": 0.5}) == UNKNOWN
    (why,) = json.loads(doctor.report.read_text())["molecule"]["unknown"]
    assert why == "limits names hit_rat, which is no limit; did you mean hit_rate?"

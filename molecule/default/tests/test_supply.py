"""The checkpoint from a hub that misbehaves: success or one clear sentence, and the engines' own is untouched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, await_, playbook
from testinfra.host import Host

pytestmark = pytest.mark.usefixtures("keeps_serving", "hub")
COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
MODELS = "/srv/models/shards"
SHARD = "model-00002-of-00003.safetensors"
HUB = "http://127.0.0.1:8810"
#: A repository of three generated shards. Nothing serves it, so that the engines' checkpoint stays what it is.
FROM_HUB = {
    "vllm_model_endpoint": HUB,
    "vllm_model_repository": "nvl/shards",
    "vllm_model_revision": COMMIT,
    "vllm_model_root": MODELS,
}


@pytest.fixture
def hub(host: Host) -> Iterator[None]:
    """A second hub, beside the one that the tiny model is from; a checkpoint of its own for each test."""
    host.run_expect([0], f"rm -rf {MODELS}; rm -f /var/lib/nvl-vllm/checkpoints/*shards*")
    host.run_expect(
        [0],
        "systemd-run --unit=shards python3 /opt/hub/hub_server.py /opt/hub/shards --repository nvl/shards "
        f"--revision {COMMIT} --port 8810 --shard-bytes 3000000",
    )
    host.run_expect([0], f"curl -s --retry 30 --retry-delay 1 --retry-connrefused {HUB}/control/requests -o /dev/null")
    yield
    host.run_expect([0], "systemctl stop shards")


def fail(host: Host, *faults: str) -> None:
    host.run_expect([0], f"curl -sf {HUB}/control/faults --data-binary $'%s'" % "\\n".join(faults))


def requests(host: Host) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(host.check_output(f"curl -sf {HUB}/control/requests"))
    return found


def bring(*arguments: str, **variables: Any) -> subprocess.CompletedProcess[str]:
    return playbook("molecule/shared/model_only.yml", *arguments, **{**FROM_HUB, **variables})


def sentence(refused: subprocess.CompletedProcess[str]) -> str:
    """What the operator reads: Ansible's error, unwrapped."""
    assert refused.returncode != 0, refused.stdout
    return " ".join(refused.stdout.partition("[ERROR]")[2].partition("\nfatal:")[0].split())


def test_a_connection_that_breaks_and_a_limit_are_overcome(host: Host) -> None:
    fail(host, "cut,path=*00002*,after=2000000", "ratelimit,path=*00001*,seconds=1")
    brought = bring()
    assert brought.returncode == 0, brought.stdout
    assert host.file(f"{MODELS}/current").linked_to == f"{MODELS}/{COMMIT}"
    listed = host.check_output(f"cd {MODELS}/current && find . -type f | sort")
    assert "original" not in listed
    assert SHARD in listed
    assert host.file(f"{MODELS}/current/{SHARD}").mode == 0o644
    # What had arrived was not asked for again.
    ranges = [one["headers"].get("range") for one in requests(host) if "00002" in one["path"] and one["sent"]]
    assert len(ranges) == 2
    assert ranges[0] is None
    assert ranges[1] != "bytes=0-"

    asked = len(requests(host))
    again = bring()
    assert "changed=0" in again.stdout
    assert len(requests(host)) == asked


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("token,times=-1", "wants a token for nvl/shards (HTTP 401): set vllm_model_token"),
        ("revision,times=-1", f"has no commit {COMMIT} of nvl/shards"),
        (f"entry,path=*{SHARD},times=-1", f"has no {SHARD} in nvl/shards at {COMMIT}"),
        (f"corrupt,path=*{SHARD}*,times=-1", f"{SHARD} from {HUB}/nvl/shards has SHA-256"),
    ],
)
def test_what_cannot_be_had_is_told_in_one_sentence(host: Host, fault: str, told: str) -> None:
    fail(host, fault)
    error = sentence(bring())
    assert "nvl-vllm-molecule: " in error
    assert told in error
    # Neither a half checkpoint nor a link to it.
    assert not host.file(f"{MODELS}/{COMMIT}").exists
    assert not host.file(f"{MODELS}/current").exists


def test_no_space(host: Host) -> None:
    host.run_expect([0], f"mkdir -p {MODELS} && mount -t tmpfs -o size=8m tmpfs {MODELS}")
    try:
        error = sentence(bring())
        # Nothing was fetched in vain.
        assert not any(one["sent"] and ".safetensors" in one["path"] for one in requests(host))
    finally:
        host.run_expect([0], f"umount {MODELS}")
    assert f"the file system {MODELS} has " in error
    assert "set vllm_model_root to a directory on a larger one" in error


def test_a_damaged_file_is_named_and_fetched_again_alone(host: Host) -> None:
    assert bring().returncode == 0
    # One byte, and what a stat tells stays as it was.
    host.run_expect(
        [0],
        f"cd {MODELS}/current && touch -r {SHARD} /tmp/then && "
        f"printf X | dd of={SHARD} bs=1 seek=2500000 conv=notrunc status=none && touch -r /tmp/then {SHARD}",
    )
    assert "changed=0" in bring().stdout
    damaged = playbook("playbooks/verify_model.yml", **FROM_HUB)
    assert f"{MODELS}/{COMMIT}/{SHARD} has SHA-256" in sentence(damaged)
    assert "config.json" not in sentence(damaged)

    asked = len(requests(host))
    mended = bring(vllm_model_verify="always")
    assert mended.returncode == 0, mended.stdout
    fetched = {Path(one["path"]).name for one in requests(host)[asked:] if one["sent"]}
    assert fetched == {SHARD}
    sound = playbook("playbooks/verify_model.yml", **FROM_HUB)
    assert sound.returncode == 0
    assert "every byte as published" in sound.stdout


def test_a_run_that_is_killed_goes_on_and_its_token_is_nowhere(host: Host, tmp_path: Path) -> None:
    token = "hf_SecretOfTheTests"
    fail(host, f"trickle,path=*{SHARD}*,after=1000000,seconds=1")
    variables = {**FROM_HUB, "vllm_model_token": token}
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps(variables))
    # Not a pipe: the SSH connection that Ansible keeps would hold it open.
    log = (tmp_path / "log").open("w+")
    run = subprocess.Popen(
        ["ansible-playbook", "-vvv", "-i", "inventory/molecule", "molecule/shared/model_only.yml", "-e", f"@{secret}"],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    await_(lambda: any(SHARD in one["path"] and one["sent"] >= 1000000 for one in requests(host)), 120)
    on_host = host.check_output("cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null | tr '\\0' ' '")
    assert token not in on_host
    os.killpg(run.pid, signal.SIGKILL)
    run.wait(30)
    log.close()
    output = (tmp_path / "log").read_text()
    assert "Bring and verify" in output
    assert token not in output
    assert token not in host.check_output("journalctl --no-pager --boot")

    # The next one waits for the job on the host, which fetches on, and fetches nothing itself.
    host.run_expect([0], f"curl -sf -X POST {HUB}/control/release")
    again = playbook("molecule/shared/model_only.yml", **variables)
    assert again.returncode == 0, again.stdout
    assert host.file(f"{MODELS}/current/{SHARD}").exists
    whole = host.file(f"{MODELS}/current/{SHARD}").size
    assert sum(one["sent"] for one in requests(host) if SHARD in one["path"]) == whole


def test_old_releases_and_revisions_go_and_those_in_use_stay(host: Host) -> None:
    used = host.file("/opt/vllm/current").linked_to
    old = [f"/opt/vllm/0.{minor}.0-cpu-0123abcd" for minor in (29, 30, 31)]
    revisions = [f"/srv/models/tiny-gpt-oss/{digit * 40}" for digit in "abc"]
    host.run_expect([0], f"mkdir -p {' '.join(old + revisions)}")
    # Something still runs from the oldest.
    host.run_expect([0], f"cp /bin/sleep {old[0]}/sleep && systemd-run --unit=old {old[0]}/sleep infinity")
    for folder in old:
        host.run_expect([0], f'echo \'{{"version": "0"}}\' > {folder}/.release.json')
    try:
        removed = playbook("molecule/shared/cleanup_only.yml")
        assert removed.returncode == 0, removed.stdout
        left = host.check_output("ls -d /opt/vllm/*-cpu-* /srv/models/tiny-gpt-oss/*").split()
    finally:
        host.run_expect([0], "systemctl stop old")
        host.run_expect([0], f"rm -rf {' '.join(old + revisions)}")
    assert used in left
    assert [path for path in left if path in old] == [old[0], old[2]]
    assert len([path for path in left if path in revisions]) == 1

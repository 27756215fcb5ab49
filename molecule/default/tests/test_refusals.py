"""Bad input ends in one sentence, before anything is changed; what runs keeps serving."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from helpers import INSTANCES, SANDBOX, playbook, site
from testinfra.host import Host

pytestmark = pytest.mark.usefixtures("keeps_serving")
ELSEWHERE = "/opt/elsewhere"


def test_mistakes_in_the_declaration_are_named_all_at_once() -> None:
    refused = site(
        vllm_instances=[{"name": "primary", "port": 8001}, {"name": "primary", "port": 8001}],
        vllm_arguments={"max-model-length": 4096, "max-num-seqs": "many"},
    )
    assert refused.returncode != 0
    assert "molecule: vllm_instances[1].name is 'primary'" in refused.stdout
    assert "molecule: vllm_instances[1].port is 8001" in refused.stdout
    assert "no argument --max-model-length; did you mean max-model-len?" in refused.stdout
    assert "vllm_arguments.max-num-seqs is 'many': wanted a whole number" in refused.stdout
    # No task reached the host.
    assert "Check the host" not in refused.stdout


def test_wrong_type_of_a_later_role_is_refused_first() -> None:
    refused = site(vllm_instances_start_timeout="soon")
    assert refused.returncode != 0
    assert "vllm_instances_start_timeout" in refused.stdout
    assert "Check the host" not in refused.stdout


def test_port_of_another_program(host: Host) -> None:
    host.run_expect([0], "systemd-run --unit=squatter python3 -m http.server 8003 --bind 127.0.0.1")
    try:
        host.run_expect([0], "curl --silent --retry 20 --retry-delay 1 --retry-connrefused http://127.0.0.1:8003/")
        third = [{"name": name, "port": 8001 + number} for number, name in enumerate((*INSTANCES, "third"))]
        refused = site(vllm_instances=third)
    finally:
        host.run_expect([0], "systemctl stop squatter")
    assert refused.returncode != 0
    assert "port 8003 of instance third is taken by python3 (process" in refused.stdout
    assert "changed=0" in refused.stdout


def test_no_disk_space(host: Host) -> None:
    host.run_expect([0], f"mkdir -p {ELSEWHERE} && mount -t tmpfs -o size=64m tmpfs {ELSEWHERE}")
    try:
        refused = site(vllm_root=ELSEWHERE)
    finally:
        host.run_expect([0], f"umount {ELSEWHERE} && rmdir {ELSEWHERE}")
    assert refused.returncode != 0
    assert f"needs 3072 MiB of free disk space, and the file system {ELSEWHERE} has 64 MiB" in refused.stdout
    assert "changed=0" in refused.stdout


def test_unreachable_index(host: Host) -> None:
    refused = playbook(
        "molecule/shared/vllm_only.yml",
        vllm_root=ELSEWHERE,
        vllm_wheelhouse="",
        vllm_index_urls=["http://127.0.0.1:9/simple"],
    )
    host.run_expect([0], f"rm -r {ELSEWHERE}")
    assert refused.returncode != 0
    assert "cannot reach the package index http://127.0.0.1:9/simple" in refused.stdout


@pytest.mark.more
def test_damaged_wheel_is_refused_and_the_interrupted_installation_repaired(host: Host, tmp_path: Path) -> None:
    for wheel in (SANDBOX / "wheelhouse").glob("*.whl"):
        os.link(wheel, tmp_path / wheel.name)
    victim = next(tmp_path.glob("idna-*.whl"))
    content = bytearray(victim.read_bytes())
    victim.unlink()
    content[-1] ^= 1  # the archive's comment length: still a ZIP file, no longer the locked one
    victim.write_bytes(content)

    refused = playbook("molecule/shared/vllm_only.yml", vllm_root=ELSEWHERE, vllm_wheelhouse=str(tmp_path))
    assert refused.returncode != 0
    assert "idna==" in refused.stdout
    assert not host.file(f"{ELSEWHERE}/current").exists
    assert not host.file(f"{ELSEWHERE}/wheelhouse").exists

    shutil.rmtree(tmp_path)
    repaired = playbook("molecule/shared/vllm_only.yml", vllm_root=ELSEWHERE)
    assert repaired.returncode == 0, repaired.stdout
    assert host.file(f"{ELSEWHERE}/current/.release.json").exists
    host.run_expect([0], f"rm -r {ELSEWHERE}")

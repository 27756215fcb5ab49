"""What the tests share: the containers over SSH."""

from __future__ import annotations

import pytest
import testinfra
from gpu_hosts import SANDBOX
from testinfra.host import Host

PORTS = {"bookworm": 2224, "trixie": 2225}


def connect(name: str, control: str) -> Host:
    return testinfra.get_host(
        f"ssh://root@127.0.0.1:{PORTS[name]}",
        controlpersist=120,
        ssh_identity_file=str(SANDBOX / "id_ed25519"),
        ssh_extra_args=f"-o UserKnownHostsFile={SANDBOX}/known_hosts -o ControlPath={control}",
    )


@pytest.fixture(scope="session")
def bookworm(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return connect("bookworm", str(tmp_path_factory.mktemp("ssh") / "%C"))


@pytest.fixture(scope="session")
def trixie(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return connect("trixie", str(tmp_path_factory.mktemp("ssh") / "%C"))


@pytest.fixture(params=["bookworm", "trixie"])
def host(request: pytest.FixtureRequest) -> Host:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]

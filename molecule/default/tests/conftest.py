"""What the tests share: the container over SSH, its key, and the engines' journals where a test fails."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import testinfra
from helpers import INSTANCES, SANDBOX, chat, main_pid
from testinfra.host import Host


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    """The container. Over one kept SSH connection a command takes 11 ms; a ``podman exec`` takes 160."""
    control = tmp_path_factory.mktemp("ssh") / "%C"
    return testinfra.get_host(
        "ssh://root@127.0.0.1:2223",
        controlpersist=120,
        ssh_identity_file=str(SANDBOX / "id_ed25519"),
        ssh_extra_args=f"-o UserKnownHostsFile={SANDBOX}/known_hosts -o ControlPath={control}",
    )


@pytest.fixture(scope="session")
def api_key() -> str:
    return (SANDBOX / "api_key").read_text().split()[0]


@pytest.fixture
def keeps_serving(host: Host, api_key: str) -> Iterator[None]:
    """Both engines run on, untouched, and answer afterwards."""
    before = {name: main_pid(host, name) for name in INSTANCES}
    yield
    assert {name: main_pid(host, name) for name in INSTANCES} == before
    for name in INSTANCES:
        chat(host, name, api_key)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A failed test shows the end of the engines' journals."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    host = getattr(item, "funcargs", {}).get("host")
    if report.when == "call" and report.failed and host is not None:
        journal = host.run("journalctl --no-pager --lines 30 --unit 'vllm@*'").stdout
        report.sections.append(("journal of vllm@*", journal))

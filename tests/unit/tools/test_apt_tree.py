"""The tree of Debian packages against signed mirrors of tiny packages on this machine."""

import gzip
import hashlib
import lzma
import shutil
import subprocess
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

SUITE = "teststable"
PACK = {"xz": lzma.compress, "gz": gzip.compress}


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def run(*command):
    subprocess.run([*map(str, command)], check=True, capture_output=True)


class Key:
    """A key that signs, in a home of its own: the agent's socket needs a short path."""

    def __init__(self):
        self.home = Path(tempfile.mkdtemp(prefix="gpg-"))
        self.gpg("--passphrase", "", "--quick-generate-key", "mirror@example.org", "ed25519", "sign", "never")
        self.public = self.home / "public.gpg"
        self.gpg("--output", self.public, "--export")

    def gpg(self, *arguments):
        run("gpg", "--homedir", self.home, "--batch", "--quiet", "--yes", *arguments)

    def sign(self, text, path):
        plain = self.home / "plain"
        plain.write_text(text)
        self.gpg("--output", path, "--clearsign", plain)

    def remove(self):
        run("gpgconf", "--homedir", self.home, "--kill", "gpg-agent")
        shutil.rmtree(self.home)


@pytest.fixture(scope="session")
def keys():
    """The mirror's key, and one of somebody else."""
    made = Key(), Key()
    yield made
    for key in made:
        key.remove()


class Mirror:
    """A mirror with a web server, and what was asked of it."""

    def __init__(self, root, key):
        self.root, self.key, self.stanzas, self.form = root, key, {}, "xz"
        self.requests = requests = []
        root.mkdir()

        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, *_):
                requests.append(self.path)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(root)))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def add(self, name, version="1.0", suite=SUITE, **fields):
        """Build a package and put it in the pool; ``publish`` makes it known."""
        control = f"Package: {name}\nVersion: {version}\nArchitecture: amd64\nMaintainer: nobody\n"
        control += "".join(f"{field}: {value}\n" for field, value in fields.items()) + "Description: test\n"
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / "DEBIAN").mkdir()
            (Path(scratch) / "DEBIAN/control").write_text(control)
            Path(scratch).chmod(0o755)
            file = self.root / f"pool/main/{name}_{version.rpartition(':')[2]}_amd64.deb"
            file.parent.mkdir(parents=True, exist_ok=True)
            run("dpkg-deb", "--build", "--root-owner-group", "-Znone", scratch, file)
        data = file.read_bytes()
        control += f"Filename: {file.relative_to(self.root)}\nSize: {len(data)}\nSHA256: {sha256(data)}\n"
        self.stanzas.setdefault(suite, {})[name, version] = control
        return file

    def publish(self):
        """Write the indexes of all suites and sign them."""
        for suite, stanzas in self.stanzas.items():
            name = f"main/binary-amd64/Packages.{self.form}"
            plain = "\n".join(stanzas.values()).encode()
            dist = self.root / "dists" / suite
            (dist / name).parent.mkdir(parents=True, exist_ok=True)
            (dist / name).write_bytes(PACK[self.form](plain))
            files = {name: (dist / name).read_bytes(), name.rpartition(".")[0]: plain}
            release = (
                f"Codename: {suite}\nDate: Thu, 01 Jan 2026 00:00:00 UTC\nArchitectures: amd64\nComponents: main\n"
            )
            sums = "".join(f" {sha256(data)} {len(data)} {file}\n" for file, data in files.items())
            self.key.sign(f"{release}SHA256:\n{sums}", dist / "InRelease")

    @property
    def downloads(self):
        return sorted(Path(path).name for path in self.requests if path.endswith(".deb"))

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="session")
def apt_tree(load_tool):
    return load_tool("apt_tree")


@pytest.fixture(autouse=True)
def machine(apt_tree, monkeypatch):
    """This machine's apt as it would be without a proxy; a test may add to what it prints."""
    printed = ['Acquire::http::Proxy "DIRECT";', 'Acquire::Retries "0";', 'APT::Install-Recommends "true";']
    monkeypatch.setattr(apt_tree, "ask_machine", lambda *_: printed)
    return printed


@pytest.fixture
def make_mirror(tmp_path, keys):
    made = []

    def make(name, key=None):
        made.append(Mirror(tmp_path / name, key or keys[0]))
        return made[-1]

    yield make
    for mirror in made:
        mirror.stop()


@pytest.fixture
def mirror(make_mirror):
    """A mirror where ``app`` needs ``lib``, which needs ``base``; ``extra`` is only recommended."""
    made = make_mirror("mirror")
    made.add("base", "1:1.0+b1")
    made.add("lib", Depends="base (>= 1:1.0)")
    made.add("app", Depends="lib (>= 1.0), lib (<< 3)", Recommends="extra")
    made.add("extra")
    made.publish()
    return made


@pytest.fixture
def tree(tmp_path, mirror, keys, apt_tree):
    """The directory to fill, and a function that fills it."""

    class Tree:
        directory = tmp_path / "tree"
        mirrors = (mirror,)
        keyring = keys[0].public
        components = ()

        def fill(self, *packages):
            urls = [mirror.url for mirror in self.mirrors]
            sources = apt_tree.sources_of(SUITE, urls, self.keyring, list(self.components))
            summary, self.found = apt_tree.fill(self.directory, list(packages or ["app"]), sources)
            return summary

        def refusal(self, *packages):
            with pytest.raises(apt_tree.AptTreeError) as refusal:
                self.fill(*packages)
            assert "\n" not in str(refusal.value)
            return str(refusal.value)

        @property
        def debs(self):
            return {path.name.partition("_amd64")[0] for path in self.directory.rglob("*.deb")}

        def install_on_host(self, status, *packages):
            """Let apt check and fetch from the tree for a host; return what it would install."""
            host = apt_tree.Apt(Path(tempfile.mkdtemp(dir=tmp_path)), "amd64")
            (host.root / "status").write_text(status)
            source = f"file:{self.directory}"
            host.use([apt_tree.Source(source, found.suite, ("main",), self.keyring) for found in self.found])
            host.run("update")
            host.run("install", "--download-only", *packages)
            return {Path(unquote(deb.uri)).name.partition("_amd64")[0] for deb in host.resolve(list(packages))}

    return Tree()


def installed(name, version):
    return f"Package: {name}\nStatus: install ok installed\nArchitecture: amd64\nVersion: {version}\n\n"


def test_tree_holds_the_package_and_all_it_needs_but_nothing_recommended(tree):
    assert tree.fill() == "3 packages, 0 MB, 3 fetched, 0 removed"
    assert tree.debs == {"app_1.0", "lib_1.0", "base_1.0+b1"}


@pytest.mark.parametrize("form", PACK)
def test_signed_files_are_the_mirrors_byte_for_byte(tree, mirror, form):
    mirror.form = form
    mirror.publish()
    tree.fill()
    names = {f"dists/{SUITE}/InRelease", f"dists/{SUITE}/main/binary-amd64/Packages.{form}"}
    found = {str(path.relative_to(tree.directory)) for path in tree.directory.rglob("*") if path.is_file()}
    assert {name for name in found if not name.endswith(".deb")} == names
    for name in found:
        assert (tree.directory / name).read_bytes() == (mirror.root / name).read_bytes()


def test_host_with_nothing_installs_from_the_tree(tree):
    tree.fill()
    assert tree.install_on_host("", "app") == {"app_1.0", "lib_1.0", "base_1.0+b1"}


def test_host_with_newer_packages_keeps_them(tree):
    tree.fill()
    assert tree.install_on_host(installed("lib", "2.0"), "app") == {"app_1.0"}


def test_host_that_is_too_new_is_refused_by_apt(tree, apt_tree):
    tree.fill()
    with pytest.raises(apt_tree.AptTreeError, match=r"cannot be installed together: app : Depends: lib"):
        tree.install_on_host(installed("lib", "3.0"), "app")


def test_updates_and_security_come_along_where_the_mirror_has_them(tree, mirror):
    mirror.add("lib", "2.0", suite=f"{SUITE}-security")
    mirror.publish()
    tree.fill()
    assert [source.suite for source in tree.found] == [SUITE, f"{SUITE}-security"]
    assert tree.debs == {"app_1.0", "lib_2.0"}
    assert tree.install_on_host("", "app") == {"app_1.0", "lib_2.0"}


def test_security_may_be_at_another_mirror(tree, mirror, make_mirror):
    security = make_mirror("security")
    security.add("lib", "2.0", suite=f"{SUITE}-security")
    security.publish()
    tree.mirrors = (mirror, security)
    tree.fill()
    assert tree.debs == {"app_1.0", "lib_2.0"}


def test_dependency_that_another_named_package_stands_in_for_comes_too(tree, mirror):
    mirror.add("either", Depends="lib | extra")
    mirror.publish()
    tree.fill("either", "extra")
    assert tree.debs == {"either_1.0", "extra_1.0", "lib_1.0", "base_1.0+b1"}


def test_second_run_asks_for_the_releases_only(tree, mirror):
    tree.fill()
    mirror.requests.clear()
    assert tree.fill() == "3 packages, 0 MB, 0 fetched, 0 removed"
    assert [path for path in mirror.requests if SUITE + "/" in path and "Release" not in path] == []


def test_interrupted_run_is_resumed_with_what_is_missing(tree, mirror):
    tree.fill()
    (tree.directory / "pool/main/lib_1.0_amd64.deb").unlink()
    shutil.rmtree(tree.directory / "dists")
    (tree.directory / ".fetching-interrupted").mkdir()
    mirror.requests.clear()
    assert tree.fill() == "3 packages, 0 MB, 1 fetched, 0 removed"
    assert mirror.downloads == ["lib_1.0_amd64.deb"]
    assert {path.name for path in tree.directory.iterdir()} == {"dists", "pool"}


@pytest.mark.parametrize(
    "name",
    ["pool/main/lib_1.0_amd64.deb", f"dists/{SUITE}/InRelease", f"dists/{SUITE}/main/binary-amd64/Packages.xz"],
)
def test_damaged_file_is_fetched_again(tree, mirror, name):
    tree.fill()
    (tree.directory / name).write_bytes(b"damaged")
    tree.fill()
    assert (tree.directory / name).read_bytes() == (mirror.root / name).read_bytes()


def test_newer_version_on_the_mirror_replaces_the_older(tree, mirror):
    tree.fill()
    mirror.add("lib", "2.0")
    mirror.publish()
    assert tree.fill() == "2 packages, 0 MB, 1 fetched, 2 removed"
    assert tree.debs == {"app_1.0", "lib_2.0"}


def test_packages_that_are_no_longer_needed_go_and_other_files_stay(tree):
    tree.fill("app", "extra")
    (tree.directory / "README").touch()
    assert tree.fill("extra") == "1 packages, 0 MB, 0 fetched, 3 removed"
    assert tree.debs == {"extra_1.0"}
    assert (tree.directory / "README").exists()


def test_unknown_package_is_named(tree):
    assert tree.refusal("app", "nosuch") == "the suite has no package nosuch"


def test_dependency_that_nothing_provides_is_named(tree, mirror):
    mirror.add("broken", Depends="nosuch")
    mirror.publish()
    assert tree.refusal("broken").startswith("the packages cannot be installed together: broken : Depends: nosuch")


def test_mirror_without_the_suite_is_named(tree, mirror):
    shutil.rmtree(mirror.root / "dists")
    assert tree.refusal() == f"{mirror.url} has no suite {SUITE}"


def test_mirror_without_the_component_is_named(tree, mirror):
    tree.components = ("main", "nosuch")
    index = f"{SUITE}/nosuch/binary-amd64/Packages"
    assert tree.refusal() == f"{mirror.url} has no {index}: name another component"


def test_unreachable_mirror_is_named(tree, mirror):
    mirror.stop()
    assert tree.refusal().startswith(f"{mirror.url}/dists/{SUITE}/InRelease cannot be fetched: Could not connect")


def test_unreachable_security_is_not_taken_for_one_that_there_is_not(tree, mirror, make_mirror):
    security = make_mirror("security")
    security.stop()
    tree.mirrors = (mirror, security)
    assert "cannot be fetched: Could not connect" in tree.refusal()


def test_release_that_was_tampered_with_is_refused(tree, mirror):
    release = mirror.root / f"dists/{SUITE}/InRelease"
    release.write_text(release.read_text().replace("Components: main", "Components: evil"))
    assert tree.refusal().startswith(f"the signature of {mirror.url} {SUITE} is refused: ")
    assert not list(tree.directory.iterdir())


def test_release_of_another_key_is_refused(tree, keys):
    tree.keyring = keys[1].public
    assert "NO_PUBKEY" in tree.refusal()


def test_source_of_somebody_else_with_the_same_suite_is_passed_over(tree, mirror, make_mirror, keys):
    other = make_mirror("other", keys[1])
    other.add("app", "9.0")
    other.publish()
    tree.mirrors = (other, mirror)
    tree.fill()
    assert [source.mirror for source in tree.found] == [mirror.url]
    assert "app_1.0" in tree.debs


def test_security_with_a_refused_signature_is_not_passed_over(tree, mirror, make_mirror, keys):
    security = make_mirror("security", keys[1])
    security.add("lib", "2.0", suite=f"{SUITE}-security")
    security.publish()
    tree.mirrors = (mirror, security)
    assert tree.refusal().startswith(f"the signature of {security.url} {SUITE}-security is refused: ")


def test_mirror_without_a_signature_is_refused(tree, mirror):
    release = mirror.root / f"dists/{SUITE}/InRelease"
    text = release.read_text()
    release.with_name("Release").write_text(text.partition("\n\n")[2].partition("-----BEGIN")[0])
    release.unlink()
    assert tree.refusal() == f"{mirror.url} {SUITE} is not signed"


def test_index_that_was_tampered_with_is_refused(tree, mirror):
    index = mirror.root / f"dists/{SUITE}/main/binary-amd64/Packages.xz"
    index.write_bytes(index.read_bytes()[:-4] + b"evil")
    assert "Hash Sum mismatch" in tree.refusal()


def test_package_that_was_tampered_with_is_refused_and_not_kept(tree, mirror):
    deb = mirror.root / "pool/main/lib_1.0_amd64.deb"
    deb.write_bytes(deb.read_bytes()[:-4] + b"evil")
    assert tree.refusal() == f"{mirror.url}/pool/main/lib_1.0_amd64.deb cannot be fetched: Hash Sum mismatch"
    assert "lib_1.0" not in tree.debs


def test_missing_keyring_is_named(tree, tmp_path):
    tree.keyring = tmp_path / "nosuch.gpg"
    assert tree.refusal() == f"the keyring {tree.keyring} is not here"


def test_distribution_whose_keys_are_not_here_says_what_to_install(apt_tree, tmp_path, monkeypatch):
    monkeypatch.setattr(apt_tree, "KEYRINGS", tmp_path)
    with pytest.raises(
        apt_tree.AptTreeError, match=r"not here: install the package ubuntu-keyring, or name its --keyring$"
    ):
        apt_tree.sources_of("noble", [], None, [])


def test_unknown_suite_needs_a_mirror_and_a_keyring(apt_tree, keys):
    with pytest.raises(apt_tree.AptTreeError, match=r"^suite sid is none of bookworm, .*: name its --mirror and"):
        apt_tree.sources_of("sid", ["http://example.org/debian"], None, [])
    with pytest.raises(apt_tree.AptTreeError, match=r"apt does not have suite sid: name its --mirror"):
        apt_tree.sources_of("sid", [], keys[0].public, [])


def places(sources):
    return [(source.mirror, source.suite) for source in sources]


def test_mirrors_are_those_of_this_machine_for_the_suite(apt_tree, keys, machine):
    for path in ("one/dists/noble", "two/dists/trixie", "two/dists/trixie-security", "three/dists/sid"):
        machine.append(f"'http://{path}/InRelease' {path.replace('/', '_')}_InRelease 0 ")
    sources = apt_tree.sources_of("trixie", [], keys[0].public, [])
    assert places(sources) == [("http://two", "trixie"), ("http://two", "trixie-security")]


def test_other_suites_come_from_the_distribution(apt_tree, keys):
    sources = apt_tree.sources_of("noble", [], keys[0].public, [])
    assert places(sources) == [
        ("http://archive.ubuntu.com/ubuntu", "noble"),
        ("http://archive.ubuntu.com/ubuntu", "noble-updates"),
        ("http://security.ubuntu.com/ubuntu", "noble-security"),
    ]
    assert sources[0].components == ("main", "universe")

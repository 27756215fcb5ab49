"""signing_key.py on real files, with keys that gpg made and a real HTTP server."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import ssl
import stat
import subprocess
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from ansible_collections.nvl.vllm.plugins.module_utils._openpgp import MAX_SIZE, armor, primary_keys
from ansible_collections.nvl.vllm.plugins.modules import signing_key

REMEDY = "check url, proxy and ca_file, or give the key as content"


class Gpg:
    """gpg with a directory of its own."""

    def __init__(self, home):
        if not shutil.which("gpg"):
            pytest.fail("these tests use keys that the real gpg makes, which is not on PATH: install the package gpg")
        self.environment = {**os.environ, "GNUPGHOME": home, "LC_ALL": "C.UTF-8"}

    def __call__(self, *arguments):
        command = ["gpg", "--batch", "--quiet", "--no-tty", "--passphrase", "", "--pinentry-mode", "loopback"]
        run = subprocess.run([*command, *arguments], capture_output=True, env=self.environment, check=False)
        assert run.returncode == 0, run.stderr.decode()
        return run.stdout


class Material:
    """One key: its binary and armored file and its fingerprint."""

    def __init__(self, gpg, user, lifetime="never", date="20200101T000000"):
        gpg("--faked-system-time", date, "--quick-generate-key", user, "ed25519", "sign", lifetime)
        self.user = user
        self.binary = gpg("--export", user)
        self.armored = gpg("--armor", "--export", user)
        self.secret = gpg("--armor", "--export-secret-keys", user).decode()
        self.fingerprint = gpg("--with-colons", "--list-keys", user).decode().split("\nfpr:")[1].split(":")[8]


@pytest.fixture(scope="module")
def gpg():
    # Not below pytest's directory: the name of the agent's socket must be short.
    home = tempfile.mkdtemp(prefix="gpg-")
    try:
        gpg = Gpg(home)
        yield gpg
        subprocess.run(["gpgconf", "--kill", "gpg-agent"], env=gpg.environment, check=True)
    finally:
        shutil.rmtree(home)


@pytest.fixture(scope="module")
def good(gpg):
    return Material(gpg, "cudatools <cudatools@example.org>")


@pytest.fixture(scope="module")
def other(gpg):
    return Material(gpg, "other <other@example.org>")


@pytest.fixture(scope="module")
def expired(gpg):
    return Material(gpg, "old <old@example.org>", "1y")


@pytest.fixture(scope="module")
def prolonged(gpg, expired):
    """The binary file of ``expired``, after its owner has prolonged it."""
    gpg("--quick-set-expire", expired.fingerprint, "10y")
    return gpg("--export", expired.fingerprint)


class Server(ThreadingHTTPServer):
    """A web server whose answer a test sets. Asked for a whole URL, it is a proxy that answers itself."""

    daemon_threads = True

    def __init__(self, answer=b""):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.status = 200
        self.promised = None  # Content-Length, where it is not the right one
        self.pause = 0.0  # seconds between two bytes
        self.location = ""
        self.asked = []
        self.released = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.005,), daemon=True).start()

    @property
    def host(self):
        return f"127.0.0.1:{self.server_address[1]}"

    @property
    def url(self):
        return f"http://{self.host}/repos/3bf863cc.pub"

    def close(self):
        self.released.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.asked.append((self.path, dict(self.headers)))
        self.send_response(server.status)
        if server.location:
            self.send_header("Location", server.location)
        self.send_header("Content-Length", str(server.promised or len(server.answer)))
        self.end_headers()
        if not server.pause:
            self.wfile.write(server.answer)
            return
        for at in range(len(server.answer)):
            self.wfile.write(server.answer[at : at + 1])
            if server.released.wait(server.pause):
                return

    def log_message(self, *_args):
        pass


@pytest.fixture
def server(good):
    server = Server(good.binary)
    yield server
    server.close()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """A module is a process of its own; here its owner, its proxies and its umask must not stay."""
    monkeypatch.setattr(signing_key, "OWNER", str(os.getuid()))
    monkeypatch.setattr(signing_key, "GROUP", str(os.getgid()))
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.setenv(name, "")
        monkeypatch.setenv(name.upper(), "")
    before = os.umask(0o077)
    yield
    os.umask(before)


class Host:
    """The module's options as a role gives them, and the file on the host."""

    def __init__(self, run_module, path, url, good):
        self._run = run_module
        self.path = path / "etc/apt/keyrings/nvidia.asc"
        self.url = url
        self.good = good

    def run(self, check_mode=False, **changes):
        options = {"path": str(self.path), "fingerprints": [self.good.fingerprint], **changes}
        if "content" not in options:
            options.setdefault("url", self.url)
        return self._run(signing_key.main, check_mode=check_mode, **options)

    def has(self, data, mode=0o644):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_bytes(data)
        self.path.chmod(mode)

    def refuses(self, message, **changes):
        """Runs it, which must fail with this message and change nothing."""
        before = self.path.read_bytes() if self.path.exists() else None
        result = self.run(**changes)
        assert result["failed"] is True
        assert result["msg"] == message
        assert (self.path.read_bytes() if self.path.exists() else None) == before
        return result


@pytest.fixture
def host(run_module, tmp_path, server, good):
    return Host(run_module, tmp_path, server.url, good)


# What it writes


def test_fetched_key_is_written_armored_for_all_to_read(host, good, server, gpg):
    result = host.run()
    assert result["changed"] is True
    assert result["path"] == str(host.path)
    assert result["fingerprints"] == [good.fingerprint]
    assert result["users"] == [good.user]
    assert host.path.read_bytes() == good.armored
    assert gpg("--dearmor", "--output", "-", str(host.path)) == good.binary
    assert stat.S_IMODE(host.path.stat().st_mode) == 0o644
    assert [stat.S_IMODE(one.stat().st_mode) for one in list(host.path.parents)[:3]] == [0o755] * 3
    assert list(host.path.parent.iterdir()) == [host.path]
    assert [path for path, _headers in server.asked] == ["/repos/3bf863cc.pub"]


def test_armored_file_is_fetched_as_well(host, good, server):
    server.answer = b"Our key\r\n\r\n" + good.armored.replace(b"\n", b"\r\n")
    assert host.run()["changed"] is True
    assert host.path.read_bytes() == good.armored


def test_file_url(host, good, tmp_path, server):
    file = tmp_path / "key with blank.gpg"
    file.write_bytes(good.binary)
    assert host.run(url=file.as_uri())["changed"] is True
    assert host.path.read_bytes() == good.armored
    assert server.asked == []


def test_content(host, good, server):
    assert host.run(content=good.armored.decode())["changed"] is True
    assert host.run(content=good.armored.decode())["changed"] is False
    assert host.path.read_bytes() == good.armored
    assert server.asked == []


def test_fingerprint_may_be_written_as_gpg_shows_it(host, good):
    digits = good.fingerprint.lower()
    pretty = " ".join(digits[at : at + 4] for at in range(0, 40, 4))
    assert host.run(fingerprints=[pretty])["fingerprints"] == [good.fingerprint]


def test_two_keys_that_are_both_expected(host, good, other, server, gpg):
    server.answer = good.armored + other.armored
    result = host.run(fingerprints=[other.fingerprint, good.fingerprint])
    assert result["fingerprints"] == [good.fingerprint, other.fingerprint]
    assert result["users"] == [good.user, other.user]
    assert host.path.read_text() == armor(good.binary + other.binary)
    listed = gpg("--show-keys", "--with-colons", str(host.path)).decode()
    assert good.fingerprint in listed
    assert other.fingerprint in listed


def test_redirect_is_followed(host, good, server):
    target = Server(good.armored)
    server.status, server.location, server.answer = 302, target.url, b""
    try:
        assert host.run()["changed"] is True
    finally:
        target.close()
    assert len(target.asked) == 1


# A second run


def test_second_run_needs_no_network(host, server):
    host.run()
    server.close()
    result = host.run()
    assert result["changed"] is False
    assert result["fingerprints"] == [host.good.fingerprint]
    assert result["users"] == [host.good.user]
    assert len(server.asked) == 1


def test_expected_key_in_another_form_is_written_anew_without_network(host, good, server):
    host.has(good.binary)  # apt could not read it under this name
    assert host.run()["changed"] is True
    assert host.path.read_bytes() == good.armored
    assert server.asked == []


@pytest.mark.parametrize("content", ["another", "both", "text", "nothing"])
def test_anything_else_is_replaced(host, good, other, server, content):
    host.has(
        {
            "another": other.armored,
            "both": armor(good.binary + other.binary).encode(),
            "text": b"hello",
            "nothing": b"",
        }[content]
    )
    assert host.run()["changed"] is True
    assert host.path.read_bytes() == good.armored
    assert len(server.asked) == 1


def test_mode_is_put_right_without_network(host, good, server):
    host.has(good.armored, 0o600)
    assert host.run(check_mode=True)["changed"] is True
    assert stat.S_IMODE(host.path.stat().st_mode) == 0o600
    result = host.run()
    assert result["changed"] is True
    assert result["diff"]["before"]["mode"] == "0600"
    assert result["diff"]["after"]["mode"] == "0644"
    assert stat.S_IMODE(host.path.stat().st_mode) == 0o644
    assert host.run()["changed"] is False
    assert server.asked == []


def test_content_with_a_later_expiry_replaces_the_file(host, expired, prolonged):
    host.has(expired.armored)
    result = host.run(content=armor(prolonged), fingerprints=[expired.fingerprint])
    assert result["changed"] is True
    assert host.path.read_text() == armor(prolonged)


# Check and diff mode


def test_check_mode_fetches_and_writes_nothing(host, server):
    result = host.run(check_mode=True)
    assert result["changed"] is True
    assert result["fingerprints"] == [host.good.fingerprint]
    assert not host.path.parent.parent.exists()
    assert len(server.asked) == 1


def test_check_mode_refuses_too(host, good, other):
    result = host.run(check_mode=True, fingerprints=[other.fingerprint])
    assert result["failed"] is True
    assert "not the key that was expected" in result["msg"]


def test_diff_names_the_keys(host, good, other):
    host.has(other.armored)
    result = host.run(check_mode=True)
    assert result["diff"] == {
        "before": {
            "keys": [f"{other.fingerprint} ({other.user}), expires: never"],
            "sha256": hashlib.sha256(other.armored).hexdigest(),
        },
        "after": {
            "keys": [f"{good.fingerprint} ({good.user}), expires: never"],
            "sha256": hashlib.sha256(good.armored).hexdigest(),
        },
        "before_header": str(host.path),
        "after_header": str(host.path),
    }
    assert host.path.read_bytes() == other.armored


def test_diff_of_a_new_and_of_an_unchanged_file(host):
    first = host.run()["diff"]
    assert first["before"] == {}
    assert first["after"]["keys"]
    second = host.run()["diff"]
    assert second["before"] == second["after"] == first["after"]


# Keys that are not trusted


def test_another_key_is_refused(host, good, other, server):
    server.answer = other.binary
    host.has(good.armored + b"\n" + other.armored)
    host.refuses(
        f"the key at {server.url} is {other.fingerprint} ({other.user}), wanted {good.fingerprint}: it is not the key "
        "that was expected, so nothing was trusted; where the owner of the repository has changed the key, check the "
        "new fingerprint with them and set cuda_repository_fingerprints",
        variable="cuda_repository_fingerprints",
    )


@pytest.mark.parametrize("armored", [False, True])
def test_a_second_key_beside_the_expected_one_is_refused(host, good, other, server, armored):
    server.answer = good.armored + other.armored if armored else good.binary + other.binary
    host.refuses(
        f"the key at {server.url} is {good.fingerprint} ({good.user}) and {other.fingerprint} ({other.user}), wanted "
        f"{good.fingerprint}: {other.fingerprint} was not expected, so nothing was trusted; where the owner of the "
        "repository has changed the key, check the new fingerprint with them and set fingerprints"
    )


def test_a_missing_key_is_refused(host, good, other):
    host.refuses(
        f"the key in content is {good.fingerprint} ({good.user}), wanted {good.fingerprint} and {other.fingerprint}: "
        f"{other.fingerprint} is missing, so nothing was trusted; where the owner of the repository has changed the "
        "key, check the new fingerprint with them and set fingerprints",
        content=good.armored.decode(),
        fingerprints=[good.fingerprint, other.fingerprint],
    )


def test_a_subkey_with_the_wanted_fingerprint_is_not_the_key(host, gpg, other, server):
    gpg("--quick-add-key", other.fingerprint, "ed25519", "sign", "never")
    server.answer = gpg("--export", other.fingerprint)
    listed = gpg("--with-colons", "--with-subkey-fingerprint", "--list-keys", other.fingerprint).decode()
    subkey = listed.split("\nfpr:")[2].split(":")[8]
    result = host.run(fingerprints=[subkey])
    assert result["failed"] is True
    assert "it is not the key that was expected" in result["msg"]


@pytest.mark.parametrize("by", ["content", "url"])
def test_a_secret_key_is_refused_and_not_shown(host, good, server, by):
    server.answer = good.secret.encode()
    where = "in content" if by == "content" else f"at {server.url}"
    result = host.refuses(
        f"the key {where} cannot be used: it holds a secret key, which belongs on no host and into no inventory; only "
        f"the public key is wanted: {'set it to the armored public key' if by == 'content' else REMEDY}",
        **({"content": good.secret} if by == "content" else {}),
    )
    assert good.secret.splitlines()[3] not in str(result)


def test_login_page_of_a_proxy(host, server):
    server.answer = b"<!DOCTYPE html>\n<html><title>Please log in</title></html>"
    host.refuses(
        f"the key at {server.url} cannot be used: it is an HTML page, such as a proxy sends for a login, and no key: "
        f"{REMEDY}"
    )


def test_expired_key_is_refused(host, expired, server):
    server.answer = expired.binary
    result = host.run(fingerprints=[expired.fingerprint])
    assert result["failed"] is True
    assert result["msg"].startswith(
        f"the key at {server.url} is {expired.fingerprint} ({expired.user}), which expired on 2020-12-31, wanted one "
        "that is valid today, 2"
    )
    assert result["msg"].endswith("ask the owner of the repository for the new key and set fingerprints")
    assert not host.path.exists()


def test_expired_key_on_the_host_is_fetched_again(host, expired, prolonged, server):
    host.has(expired.armored)
    server.answer = prolonged
    result = host.run(fingerprints=[expired.fingerprint])
    assert result["changed"] is True
    assert host.path.read_text() == armor(prolonged)
    assert primary_keys(prolonged)[0].expires > 1893456000


def test_one_expired_key_of_two_is_a_warning(host, good, expired, server):
    server.answer = good.binary + expired.binary
    result = host.run(fingerprints=[good.fingerprint, expired.fingerprint])
    assert result["changed"] is True
    assert [warning["event"]["msg"] for warning in result["warnings"]] == [
        f"the key at {server.url} {expired.fingerprint} ({expired.user}) expired on 2020-12-31: apt refuses what it "
        "signs"
    ]


# The way to it


def test_proxy_is_asked_instead_of_the_server_and_of_the_environment(host, good, server, monkeypatch):
    proxy = Server(good.binary)
    monkeypatch.setenv("no_proxy", "*")
    try:
        result = host.run(url="http://repository.invalid/key.pub", proxy=f"http://me:secret-word@{proxy.host}")
    finally:
        proxy.close()
    assert result["changed"] is True
    ((path, headers),) = proxy.asked
    assert path == "http://repository.invalid/key.pub"
    assert headers["Proxy-Authorization"].startswith("Basic ")
    assert "secret-word" not in str(result)


def test_empty_proxy_leaves_the_environment(host, server, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://{server.host}")
    assert host.run(url="http://repository.invalid/key.pub")["changed"] is True
    assert server.asked[0][0] == "http://repository.invalid/key.pub"


def test_proxy_that_wants_a_login(host, server):
    server.status, server.answer = 407, b"<html>who are you</html>"
    url = "http://repository.invalid/key.pub"
    host.refuses(
        f"cannot fetch the key at {url}: HTTP 407 Proxy Authentication Required: {REMEDY}",
        url=url,
        proxy=f"http://{server.host}",
    )


@pytest.mark.parametrize(("status", "reason"), [(404, "Not Found"), (403, "Forbidden"), (503, "Service Unavailable")])
def test_status_that_is_an_error(host, server, status, reason):
    server.status = status
    host.refuses(f"cannot fetch the key at {server.url}: HTTP {status} {reason}: {REMEDY}")


def test_server_that_is_not_there(host):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/key.pub"
        host.refuses(f"cannot fetch the key at {url}: [Errno 111] Connection refused: {REMEDY}", url=url)


def test_user_and_password_of_the_url_are_not_repeated(host, server):
    server.status = 404
    host.refuses(
        f"cannot fetch the key at {server.url}: HTTP 404 Not Found: {REMEDY}",
        url=server.url.replace("//", "//me:secret-word@"),
    )


def test_broken_connection_is_no_shorter_key(host, good, server):
    server.promised, server.answer = len(good.binary), good.binary[: good.binary.index(good.user.encode())]
    server.answer += good.user.encode()
    assert primary_keys(server.answer)[0].fingerprint == good.fingerprint  # all but its self-signature
    host.refuses(
        f"cannot fetch the key at {server.url}: the connection broke after {len(server.answer)} of "
        f"{len(good.binary)} bytes: {REMEDY}"
    )


@pytest.mark.parametrize("pause", [0.02, 60])
def test_server_that_takes_too_long(host, server, pause):
    """One that sends a byte now and then, and one that falls silent."""
    server.pause = pause
    result = host.run(timeout=0.3)
    assert result["failed"] is True
    assert result["msg"].startswith(f"cannot fetch the key at {server.url}: ")
    assert "not complete within 0.3 s" in result["msg"] or "timed out" in result["msg"]


def test_file_that_is_too_large(host, server):
    server.answer = b"\x99" * (MAX_SIZE + 2)
    host.refuses(f"the key at {server.url} cannot be used: it is larger than 1 MiB, which no key is: {REMEDY}")


def test_file_url_that_is_not_there(host, tmp_path):
    url = (tmp_path / "none.asc").as_uri()
    result = host.run(url=url)
    assert result["failed"] is True
    assert result["msg"].startswith(f"cannot fetch the key at {url}: ")
    assert "No such file or directory" in result["msg"]


@pytest.fixture
def tls_server(good, tmp_path):
    """An HTTPS server, and the certificate that it is trusted by."""
    certificate, secret = tmp_path / "ca.pem", tmp_path / "ca.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", secret, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, secret)
    server = Server(good.binary)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_args: None  # the client that does not trust it
    server.ca_file = str(certificate)
    yield server
    server.close()


def test_ca_file(host, tls_server):
    url = tls_server.url.replace("http:", "https:")
    assert host.run(url=url, ca_file=tls_server.ca_file)["changed"] is True


def test_certificate_that_is_not_trusted(host, tls_server):
    url = tls_server.url.replace("http:", "https:")
    result = host.run(url=url)
    assert result["failed"] is True
    assert result["msg"].startswith(f"cannot fetch the key at {url}: ")
    assert "certificate verify failed" in result["msg"]
    assert result["msg"].endswith(REMEDY)


@pytest.mark.parametrize("content", [None, "hello"])
def test_ca_file_that_is_none(host, tmp_path, content):
    file = tmp_path / "ca.pem"
    if content:
        file.write_text(content)
    result = host.run(url="https://127.0.0.1:1/key.pub", ca_file=str(file))
    assert result["failed"] is True
    assert result["msg"].startswith("cannot fetch the key at https://127.0.0.1:1/key.pub: ")


# Options


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "/etc/apt/keyrings/x.gpg"}, "path is /etc/apt/keyrings/x.gpg, wanted an absolute path that ends in"),
        ({"path": "x.asc"}, "path is x.asc, wanted an absolute path"),
        ({"timeout": 0}, "timeout is 0, wanted more than 0 seconds"),
        ({"fingerprints": []}, "fingerprints is empty, wanted at least one fingerprint"),
        ({"fingerprints": ["3BF863CC"], "variable": "cuda_x"}, "cuda_x has '3BF863CC', wanted a fingerprint of 40"),
        ({"url": "ftp://x/key"}, "url cannot be fetched (wanted http, https or file, found ftp)"),
        ({"url": "/etc/key.asc"}, "url cannot be fetched (wanted http, https or file, found none)"),
        ({"url": "http:///key"}, "url cannot be fetched ("),
        ({"url": "file://"}, "url cannot be fetched ("),
        ({"url": "http://x:port/key"}, "url cannot be fetched ("),
        ({"content": "\n"}, "the key in content cannot be used: it is empty"),
        ({"content": "", "url": ""}, "url and content are both empty, wanted one of them"),
        ({"content": "the key", "url": "http://x/k"}, "url and content are both given, wanted one of them"),
    ],
)
def test_options_that_cannot_work(host, changes, message):
    result = host.run(**changes)
    assert result["failed"] is True
    assert result["msg"].startswith(message)


def test_a_directory_in_the_place_of_the_file(host):
    host.path.mkdir(parents=True)
    result = host.run()
    assert result["failed"] is True
    assert result["msg"] == (
        f"cannot write the key to {host.path}: Is a directory ({host.path}): check what is there, and whether its file "
        "system can be written"
    )


def test_a_file_in_the_place_of_the_directory(host):
    host.path.parent.parent.mkdir(parents=True)
    host.path.parent.write_text("")
    result = host.run()
    assert result["failed"] is True
    assert result["msg"].startswith(f"cannot write the key to {host.path}: Not a directory")


def test_documentation_equals_argument_spec(monkeypatch):
    class Caught(Exception):
        pass

    def catch(argument_spec, supports_check_mode):
        assert supports_check_mode
        raise Caught(argument_spec)

    monkeypatch.setattr(signing_key, "AnsibleModule", catch)
    with pytest.raises(Caught) as caught:
        signing_key.main()
    spec = caught.value.args[0]
    documented = yaml.safe_load(signing_key.DOCUMENTATION)["options"]
    keys = ("type", "elements", "required", "default")
    assert {name: {key: option.get(key) for key in keys} for name, option in documented.items()} == {
        name: {key: option.get(key) for key in keys} for name, option in spec.items()
    }
    assert {name for name, option in spec.items() if option.get("no_log")} == {"content", "proxy"}


def test_documentation_of_what_it_returns(host):
    described = yaml.safe_load(signing_key.RETURN)
    assert set(host.run(check_mode=True)) - {"changed", "diff", "invocation"} == set(described)

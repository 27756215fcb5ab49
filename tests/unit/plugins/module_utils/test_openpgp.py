"""OpenPGP keys: what gpg says about keys that it made itself, and what is made by hand to be refused."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
from dataclasses import replace

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _openpgp
from ansible_collections.nvl.vllm.plugins.module_utils._openpgp import (
    MAX_SIZE,
    Key,
    KeyRefused,
    PgpError,
    armor,
    check_expected,
    check_expiry,
    dearmor,
    decode,
    primary_keys,
    wanted_fingerprints,
)

#: The sample certificate of RFC 9580 A.3, whose fingerprint the RFC tells.
VERSION_6 = b"""-----BEGIN PGP PUBLIC KEY BLOCK-----

xioGY4d/4xsAAAAg+U2nu0jWCmHlZ3BqZYfQMxmZu52JGggkLq2EVD34laPCsQYf
GwoAAABCBYJjh3/jAwsJBwUVCg4IDAIWAAKbAwIeCSIhBssYbE8GCaaX5NUt+mxy
KwwfHifBilZwj2Ul7Ce62azJBScJAgcCAAAAAK0oIBA+LX0ifsDm185Ecds2v8lw
gyU2kCcUmKfvBXbAf6rhRYWzuQOwEn7E/aLwIwRaLsdry0+VcallHhSu4RN6HWaE
QsiPlR4zxP/TP7mhfVEe7XWPxtnMUMtf15OyA51YBM4qBmOHf+MZAAAAIIaTJINn
+eUBXbki+PSAld2nhJh/LVmFsS+60WyvXkQ1wpsGGBsKAAAALAWCY4d/4wKbDCIh
BssYbE8GCaaX5NUt+mxyKwwfHifBilZwj2Ul7Ce62azJAAAAAAQBIKbpGG2dWTX8
j+VjFM21J0hqWlEg+bdiojWnKfA5AQpWUWtnNwDEM0g12vYxoWM8Y81W+bHBw805
I8kWVkXU6vFOi+HWvv/ira7ofJu16NnoUkhclkUrk0mXubZvyl4GBg==
-----END PGP PUBLIC KEY BLOCK-----
"""
A, B, C = "A" * 40, "B" * 40, "C" * 40


class Gpg:
    """gpg with a directory of its own."""

    def __init__(self, home):
        if not shutil.which("gpg"):
            pytest.fail("these tests compare with the real gpg, which is not on PATH: install the package gpg")
        self.environment = {**os.environ, "GNUPGHOME": home, "LC_ALL": "C.UTF-8"}

    def __call__(self, *arguments, data=b"", date=None):
        command = ["gpg", "--batch", "--quiet", "--no-tty", "--passphrase", "", "--pinentry-mode", "loopback"]
        if date:
            command += ["--faked-system-time", f"{date}!"]  # "!": the clock stands still
        run = subprocess.run([*command, *arguments], input=data, capture_output=True, env=self.environment, check=False)
        assert run.returncode == 0, run.stderr.decode()
        return run.stdout

    def make(self, user, algorithm, lifetime, date=None):
        self("--quick-generate-key", user, algorithm, "sign", lifetime, date=date)
        return self.listed(self("--export", user))[0].fingerprint

    def listed(self, data):
        """The keys as gpg lists them."""
        keys = []
        for line in self("--show-keys", "--with-colons", data=data).decode().splitlines():
            fields = line.split(":")
            if fields[0] == "pub":
                times = int(fields[5]), int(fields[6]) if fields[6] else None
                fingerprint = ""
                users = []
            elif fields[0] == "fpr" and not fingerprint:
                fingerprint = fields[9]
                keys.append((fingerprint, users, times))
            elif fields[0] == "uid":
                users.append(fields[9].replace(r"\x3a", ":"))
        return [Key(fingerprint, tuple(sorted(users)), *times) for fingerprint, users, times in keys]


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
def exported(gpg):
    """The files to read, by name: made by gpg, binary."""
    rsa = gpg.make("RSA (old: kind) <rsa@example.org>", "rsa2048", "never")
    gpg("--quick-add-key", rsa, "rsa2048", "encr", "1y")
    edwards = gpg.make("Żółw <ed@example.org>", "ed25519", "2y")
    gpg("--quick-add-key", edwards, "ed25519", "sign", "never")
    gpg("--quick-add-key", edwards, "cv25519", "encr", "never")
    gpg("--quick-add-uid", edwards, "second <second@example.org>")
    expired = gpg.make("expired <expired@example.org>", "ed25519", "1d", date="20200101T000000")
    shorter = gpg.make("shorter <shorter@example.org>", "ed25519", "never", date="20200101T000000")
    gpg("--quick-set-expire", shorter, "1y", date="20200201T000000")
    longer = gpg.make("longer <longer@example.org>", "ed25519", "1y", date="20200101T000000")
    gpg("--quick-set-expire", longer, "never", date="20200201T000000")
    gpg("--quick-sign-key", longer)  # by the first key, which is another
    # Two users, of which only the second ever limited the key.
    mixed = gpg.make("mixed <mixed@example.org>", "ed25519", "never", date="20200101T000000")
    gpg("--quick-add-uid", mixed, "other <other@example.org>", date="20200301T000000")
    gpg("--quick-set-expire", mixed, "3y", date="20200401T000000")
    return {
        "rsa": gpg("--export", rsa),
        "ed25519": gpg("--export", edwards),
        "two": gpg("--export", rsa, edwards),
        "expired": gpg("--export", expired),
        "shorter": gpg("--export", shorter),
        "longer": gpg("--export", longer),
        "mixed": gpg("--export", mixed),
        "all": gpg("--export"),
    }


FILES = ("rsa", "ed25519", "two", "expired", "shorter", "longer", "mixed", "all")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("armored", [False, True])
def test_keys_are_those_that_gpg_lists(gpg, exported, name, armored):
    data = gpg("--enarmor", data=exported[name]) if armored else exported[name]
    data = data.replace(b"PGP ARMORED FILE", b"PGP PUBLIC KEY BLOCK")  # what --enarmor calls it
    # gpg lists the newest user first, where the file may have it last.
    found = [replace(key, user_ids=tuple(sorted(key.user_ids))) for key in primary_keys(decode(data))]
    assert found == gpg.listed(exported[name])


def test_the_keys_are_what_their_names_say(exported):
    keys = {name: primary_keys(exported[name]) for name in FILES}
    assert [len(keys[name]) for name in FILES] == [1, 1, 2, 1, 1, 1, 1, 6]
    assert keys["rsa"][0].user_ids == ("RSA (old: kind) <rsa@example.org>",)
    assert sorted(keys["ed25519"][0].user_ids) == ["second <second@example.org>", "Żółw <ed@example.org>"]
    lifetimes = {name: key.expires and key.expires - key.created for name, (key, *_more) in keys.items()}
    day = 86400
    assert lifetimes["expired"] == day
    assert lifetimes["shorter"] == (31 + 365) * day
    assert lifetimes["longer"] is None
    assert lifetimes["mixed"] == (31 + 29 + 31 + 3 * 365) * day
    assert keys["expired"][0].created == 1577836800


def test_subkeys_are_no_primary_keys(gpg, exported):
    listed = gpg("--show-keys", "--with-colons", "--with-subkey-fingerprint", data=exported["ed25519"]).decode()
    fingerprints = [line.split(":")[9] for line in listed.splitlines() if line.startswith("fpr:")]
    assert len(fingerprints) == 3
    assert [key.fingerprint for key in primary_keys(exported["ed25519"])] == fingerprints[:1]


def test_version_6_is_known():
    (key,) = primary_keys(decode(VERSION_6))
    assert key.fingerprint == "CB186C4F0609A697E4D52DFA6C722B0C1F1E27C18A56708F6525EC27BAD9ACC9"
    assert key.user_ids == ()
    assert key.expires is None


# Armor


@pytest.mark.parametrize("name", FILES)
def test_armor_is_what_gpg_reads_and_writes(gpg, exported, name):
    assert gpg("--dearmor", data=armor(exported[name]).encode()) == exported[name]
    assert (
        dearmor(gpg("--enarmor", data=exported[name]).replace(b"ARMORED FILE", b"PUBLIC KEY BLOCK")) == (exported[name])
    )
    assert dearmor(armor(exported[name]).encode()) == exported[name]


def test_export_is_read_as_it_comes(gpg, exported):
    fingerprint = primary_keys(exported["rsa"])[0].fingerprint
    text = gpg("--armor", "--export", fingerprint)
    assert decode(text) == exported["rsa"]
    assert armor(exported["rsa"]).encode() == text


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", " \n"),
        lambda text: text.replace("BLOCK-----\n", "BLOCK-----\nVersion: GnuPG v1\nComment: none\n", 1),
        lambda text: f"A key of ours:\n\n{text}\nand good-bye\n",
        lambda text: "\ufeff" + text,
        lambda text: "\n".join(line for line in text.splitlines() if not (len(line) == 5 and line[0] == "=")),
    ],
    ids=["crlf", "blanks", "headers", "text around", "byte order mark", "no checksum"],
)
def test_armor_may_look_different(exported, change):
    changed = change(armor(exported["two"]))
    assert changed != armor(exported["two"])
    assert decode(changed.encode()) == exported["two"]


def test_all_blocks_are_read(exported):
    text = armor(exported["rsa"]) + "\n" + armor(exported["ed25519"])
    assert decode(text.encode()) == exported["rsa"] + exported["ed25519"]


def test_a_second_block_that_is_cut_off_is_seen(exported):
    text = armor(exported["rsa"]) + armor(exported["ed25519"])[:-30]
    with pytest.raises(PgpError, match="it is cut off"):
        decode(text.encode())


def test_another_letter_does_not_fit_the_checksum(exported):
    lines = armor(exported["rsa"]).splitlines()
    lines[3] = ("B" if lines[3][0] == "A" else "A") + lines[3][1:]
    with pytest.raises(PgpError, match="it is damaged: its base64 text does not fit its checksum"):
        decode("\n".join(lines).encode())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b"hello", "it is no OpenPGP key: wanted"),
        (b"\x1f\x8b\x08", "it is no OpenPGP key: wanted"),
        (
            b"\n<!DOCTYPE HTML><title>Log in</title>",
            "it is an HTML page, such as a proxy sends for a login, and no key",
        ),
        (b"<html><body>Log in</body></html>", "it is an HTML page"),
        (b"\x99" * (MAX_SIZE + 1), "it is larger than 1 MiB"),
        (b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nmQEN", "it is cut off: a BEGIN line"),
        (b"see -----BEGIN PGP PUBLIC KEY BLOCK-----", "it is cut off: a BEGIN line"),
        (b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n\n-----END PGP PUBLIC KEY BLOCK-----", "it is damaged"),
        (b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nm!EN\n-----END PGP PUBLIC KEY BLOCK-----", "it is damaged"),
        (b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nmQEN\n=mQ=N\n-----END PGP PUBLIC KEY BLOCK-----", "it is damaged"),
        (b"-----BEGIN PGP SIGNATURE-----\n\nmQEN\n-----END PGP SIGNATURE-----", "it is a PGP SIGNATURE, wanted a PGP"),
    ],
)
def test_what_is_no_key_is_named(data, said):
    with pytest.raises(PgpError, match=said):
        decode(data)


@pytest.mark.parametrize("armored", [False, True])
def test_secret_keys_are_refused_and_not_shown(gpg, exported, armored):
    fingerprint = primary_keys(exported["rsa"])[0].fingerprint
    secret = gpg(*(["--armor"] if armored else []), "--export-secret-keys", fingerprint)
    for data in (secret, exported["ed25519"] + secret if not armored else armor(exported["ed25519"]).encode() + secret):
        with pytest.raises(PgpError) as caught:
            primary_keys(decode(data))
        assert str(caught.value) == _openpgp._SECRET_FOUND


def test_secret_subkeys_are_refused(exported):
    with pytest.raises(PgpError, match="it holds a secret key"):
        primary_keys(exported["rsa"] + packet(7, b"\x04secret"))


# Packets made by hand


def packet(tag, body, octets=1):
    """A packet in the new format, its length in 1, 2 or 5 octets."""
    if octets == 1:
        assert len(body) < 192
        length = bytes([len(body)])
    elif octets == 2:
        length = (len(body) - 192 + (192 << 8)).to_bytes(2, "big")
    else:
        length = b"\xff" + len(body).to_bytes(4, "big")
    return bytes([0xC0 | tag]) + length + body


def old_packet(tag, body, kind):
    """A packet in the old format, its length in 1, 2 or 4 octets (kind 0, 1, 2)."""
    return bytes([0x80 | tag << 2 | kind]) + len(body).to_bytes(1 << kind, "big") + body


KEY_BODY = b"\x04" + (1000).to_bytes(4, "big") + b"\x16" + b"k" * 250
KEY = packet(6, KEY_BODY, 2)
USER = packet(13, b"somebody <somebody@example.org>")
KEY_ID = bytes.fromhex(primary_keys(KEY)[0].fingerprint)[-8:]


def subpacket(kind, body):
    return bytes([len(body) + 1, kind]) + body


def signature(kind=0x13, at=2000, lifetime=None, issuer=KEY_ID, critical=0, version=4, hidden=b""):
    """A signature of version 4 or 6 on a user or a key, with a made-up value; ``hidden`` is in the part not signed."""
    hashed = subpacket(2, at.to_bytes(4, "big"))
    if lifetime is not None:
        hashed += subpacket(9 | critical, lifetime.to_bytes(4, "big"))
    hidden += subpacket(16, issuer)
    octets = 2 if version == 4 else 4
    body = bytes([version, kind, 22, 8]) + len(hashed).to_bytes(octets, "big") + hashed
    return packet(2, body + len(hidden).to_bytes(octets, "big") + hidden + b"value")


@pytest.mark.parametrize(
    "made",
    [packet(6, KEY_BODY, 2), packet(6, KEY_BODY, 5), old_packet(6, KEY_BODY, 1), old_packet(6, KEY_BODY, 2)],
    ids=["new 2", "new 5", "old 2", "old 4"],
)
def test_every_kind_of_length_gives_the_same_key(made):
    assert primary_keys(made + USER) == primary_keys(KEY + old_packet(13, USER[2:], 0))
    assert primary_keys(made + USER)[0].user_ids == ("somebody <somebody@example.org>",)


@pytest.mark.parametrize("length", [192, 193, 255, 256, 1000, 8383])
def test_lengths_of_two_octets(length):
    (key,) = primary_keys(KEY + packet(13, b"x" * length, 2))
    assert key.user_ids == ("x" * length,)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "it holds no key"),
        (b"\xc6\xe0" + b"x" * 9, "in parts"),
        (b"\x9b" + KEY_BODY, "without a length"),
        (KEY + b"garbage", "what follows a packet is no OpenPGP packet"),
        (KEY + packet(8, b"\x01compressed"), "packet of type 8, which is no part of a public key"),
        (packet(8, b"\x01compressed"), "packet of type 8"),
        (KEY + packet(11, b"literal"), "packet of type 11"),
        (USER + KEY, "begins with an OpenPGP packet of type 13, wanted a primary key"),
        (packet(14, KEY_BODY, 2), "begins with an OpenPGP packet of type 14"),
        (packet(6, b"\x03" + KEY_BODY[1:], 2), "a key of version 3, whose fingerprint others can have"),
        (packet(6, b"\x05" + KEY_BODY[1:], 2), "a key of version 5, wanted 4 or 6"),
        (packet(6, b"\x04\x00"), "cut off or damaged"),
        (packet(6, b""), "cut off or damaged"),
        (packet(6, b"\x04" + b"x" * 0x10000, 5), "too long"),
        (b"\x99" * (MAX_SIZE + 1), "it is larger than 1 MiB"),
        (KEY + USER + packet(2, b"\x04\x13\x16\x08\x00\x05\xff"), "cut off or damaged"),
    ],
)
def test_what_gpg_would_not_export_is_refused(data, said):
    with pytest.raises(PgpError, match=said):
        primary_keys(data)


def test_a_cut_key_is_never_another_key(exported):
    """Only between two packets can the cut not be seen; the key itself is the same then."""
    data = exported["ed25519"]
    whole = primary_keys(data)[0].fingerprint
    seen = 0
    for end in range(len(data)):
        try:
            assert [key.fingerprint for key in primary_keys(data[:end])] == [whole]
            seen += 1
        except PgpError:
            continue
    # One cut before each packet but the first, whose absence leaves no key.
    assert seen == len(list(_openpgp._packets(data))) - 1


def test_damage_gives_an_error_or_another_reading_but_nothing_else(exported):
    chance = random.Random(7)
    refused = 0
    for _ in range(3000):
        data = bytearray(exported["two"])
        for _ in range(chance.randrange(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            primary_keys(bytes(data))
        except PgpError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("signatures", "lifetime"),
    [
        ([signature()], None),
        ([signature(lifetime=500)], 500),
        ([signature(lifetime=500, critical=0x80)], 500),
        ([signature(lifetime=0)], None),
        ([signature(lifetime=500), signature(at=2001, lifetime=900)], 900),
        ([signature(at=2001, lifetime=900), signature(lifetime=500)], 900),
        ([signature(lifetime=500), signature(at=2001)], None),
        ([signature(lifetime=500), signature(lifetime=900)], 900),
        ([signature(lifetime=500), signature(at=2001, lifetime=900, issuer=b"stranger")], 500),
        ([signature(lifetime=500), signature(0x18, at=2001, lifetime=900)], 500),
        ([signature(lifetime=500, kind=0x1F), signature(at=2001, lifetime=900)], 500),
        ([signature(kind=0x1F, at=2001), signature(lifetime=900)], 900),
        ([signature(lifetime=500), signature(at=2001, lifetime=500, version=3)], 500),
        ([signature(lifetime=500, version=6)], 500),
        ([signature(hidden=subpacket(9, b"\0\0\1\0"))], None),
    ],
)
def test_lifetime_is_what_the_key_last_said_about_itself(signatures, lifetime):
    (key,) = primary_keys(KEY + USER + b"".join(signatures))
    assert (key.expires and key.expires - key.created) == lifetime
    assert key.created == 1000


def test_signature_on_the_key_itself_stands_before_the_users():
    (key,) = primary_keys(KEY + signature(0x1F, lifetime=700) + USER + signature(at=3000, lifetime=900))
    assert key.expires == 1700


def test_user_ids_cannot_write_to_the_terminal():
    (key,) = primary_keys(KEY + packet(13, b"a\x1b[2Jb\nok: c\xff \xe2\x80\xae"))
    assert key.user_ids == ("a?[2Jb?ok: c\ufffd ?",)
    assert str(key) == f"{key.fingerprint} (a?[2Jb?ok: c\ufffd ?)"


# Judgement


def key(fingerprint, *users, expires=None):
    return Key(fingerprint, users, 0, expires)


def test_wanted_fingerprints_may_have_blanks_and_small_letters():
    assert wanted_fingerprints(["eb69 3B30  35cd 5710 e231 e123 a4b4 6996 3bf8 63cc", "c" * 64], "x") == [
        "EB693B3035CD5710E231E123A4B469963BF863CC",
        "C" * 64,
    ]


@pytest.mark.parametrize("value", ["", "3BF863CC", "A" * 39, "A" * 41, "0x" + "A" * 40, "G" * 40, "A" * 63])
def test_what_is_no_fingerprint_is_refused(value):
    with pytest.raises(KeyRefused) as caught:
        wanted_fingerprints([A, value], "cuda_repository_fingerprints")
    assert str(caught.value).startswith(f"cuda_repository_fingerprints has {value!r}, wanted a fingerprint of 40 hexa")


def test_no_fingerprint_is_refused():
    with pytest.raises(KeyRefused, match=r"^fingerprints is empty, wanted at least one"):
        wanted_fingerprints([], "fingerprints")


@pytest.mark.parametrize(("keys", "wanted"), [([A], [A]), ([A, B], [B, A]), ([A, A], [A]), ([A], [A, A])])
def test_exactly_the_expected_keys_pass(keys, wanted):
    check_expected([key(one) for one in keys], wanted, "at x", "fingerprints")


@pytest.mark.parametrize(
    ("keys", "wanted", "found", "problem"),
    [
        ([A], [B], f"{A} (name <mail>), wanted {B}", "it is not the key that was expected"),
        ([A], [B, C], f"{A} (name <mail>), wanted {B} and {C}", "it is not the key that was expected"),
        ([A, B], [A], f"{A} (name <mail>) and {B} (name <mail>), wanted {A}", f"{B} was not expected"),
        ([A, B], [C], f"{A} (name <mail>) and {B} (name <mail>), wanted {C}", f"{A}, {B} was not expected"),
        ([A], [A, B], f"{A} (name <mail>), wanted {A} and {B}", f"{B} is missing"),
    ],
)
def test_other_keys_are_refused_with_what_was_found_and_wanted(keys, wanted, found, problem):
    with pytest.raises(KeyRefused) as caught:
        check_expected(
            [key(one, "name <mail>") for one in keys], wanted, "at http://x/k.pub", "cuda_repository_fingerprints"
        )
    assert str(caught.value) == (
        f"the key at http://x/k.pub is {found}: {problem}, so nothing was trusted; where the owner of the repository "
        "has changed the key, check the new fingerprint with them and set cuda_repository_fingerprints"
    )


def test_expired_keys_are_refused():
    with pytest.raises(KeyRefused) as caught:
        check_expiry([key(A, "name", expires=86400)], 3 * 86400, "at x", "fingerprints")
    assert str(caught.value) == (
        f"the key at x is {A} (name), which expired on 1970-01-02, wanted one that is valid today, 1970-01-04, as apt "
        "refuses what an expired key signs: check the host's clock, or ask the owner of the repository for the new key "
        "and set fingerprints"
    )


def test_one_valid_key_is_enough():
    keys = [key(A, expires=86400), key(B, expires=86401), key(C)]
    assert check_expiry(keys, 86400, "at x", "f") == [
        f"the key at x {A} expired on 1970-01-02: apt refuses what it signs"
    ]
    assert check_expiry(keys, 0, "at x", "f") == []

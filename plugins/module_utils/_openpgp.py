# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Which OpenPGP public keys a file holds, worked out without gpg, which a minimal host does not have.

The formats are those of RFC 9580 and, for version 4 keys, of the older RFC 4880. No signature is verified here, and
none needs to be: a fingerprint covers the whole primary key, and apt itself checks that a subkey, a user ID or a date
was signed by it. So user IDs and dates that are told from here are for people to read.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

#: Largest file that is looked at (bytes). A key with hundreds of signatures has a tenth of it.
MAX_SIZE = 1 << 20

_SIGNATURE, _PUBLIC_KEY, _TRUST, _USER_ID, _PUBLIC_SUBKEY, _USER_ATTRIBUTE = 2, 6, 12, 13, 14, 17
_SECRET_KEYS = (5, 7)
#: All that a file of public keys is made of. Anything else, such as compressed packets, could hide a key from here that
#: another reader finds.
_OF_A_PUBLIC_KEY = (_SIGNATURE, _PUBLIC_KEY, _TRUST, _USER_ID, _PUBLIC_SUBKEY, _USER_ATTRIBUTE)

_CERTIFICATIONS, _DIRECT = (0x10, 0x11, 0x12, 0x13), 0x1F  # types of signatures
_CREATED, _KEY_LIFETIME, _ISSUER, _ISSUER_FINGERPRINT = 2, 9, 16, 33  # types of their subpackets

_BLOCK = re.compile(r"^-----BEGIN PGP ([^-\n]+)-----[ \t\r]*\n(.*?)^-----END PGP \1-----", re.MULTILINE | re.DOTALL)
_PUBLIC_BLOCK = "PUBLIC KEY BLOCK"
_SECRET_BLOCKS = ("PRIVATE KEY BLOCK", "SECRET KEY BLOCK")
_SECRET_FOUND = "it holds a secret key, which belongs on no host and into no inventory; only the public key is wanted"


class PgpError(Exception):
    """A file that is no OpenPGP public key, or holds what must not be trusted. The message begins with "it"."""


class KeyRefused(Exception):
    """Keys that are not the expected ones; the message is a whole sentence with the remedy."""


@dataclass(frozen=True)
class Key:
    """A primary key. The times are Unix times (s); ``expires`` is None for a key that never does."""

    fingerprint: str  # 40 (version 4) or 64 (version 6) upper-case hexadecimal digits
    user_ids: tuple[str, ...]
    created: int
    expires: int | None

    def __str__(self) -> str:
        return f"{self.fingerprint} ({self.user_ids[0][:100]})" if self.user_ids else self.fingerprint


# Armor


def decode(data: bytes) -> bytes:
    """The packets of a file, which may be armored or binary. Raises PgpError where it is neither."""
    if len(data) > MAX_SIZE:
        raise PgpError(f"it is larger than {MAX_SIZE >> 20} MiB, which no key is")
    data = data.removeprefix(b"\xef\xbb\xbf")  # an editor's mark of UTF-8
    if not data.strip():
        raise PgpError("it is empty")
    if data[0] & 0x80:  # every packet begins so, and no text does
        return data
    if b"-----BEGIN PGP " in data:
        return dearmor(data)
    if re.search(rb"<(!doctype html|html|head|body)\b", data[:4096], re.IGNORECASE):
        raise PgpError("it is an HTML page, such as a proxy sends for a login, and no key")
    raise PgpError('it is no OpenPGP key: wanted "-----BEGIN PGP PUBLIC KEY BLOCK-----" or the binary form')


def dearmor(text: bytes) -> bytes:
    """The packets of all public key blocks of an armored file, in their order; what stands around them is left out.

    Raises PgpError for another kind of block, and for one that is damaged (RFC 9580 6).
    """
    lines = text.decode("ascii", "replace")
    blocks = _BLOCK.findall(lines)
    if len(blocks) != lines.count("-----BEGIN PGP ") or not blocks:
        raise PgpError("it is cut off: a BEGIN line has no END line that fits")
    packets = b""
    for kind, body in blocks:
        if kind in _SECRET_BLOCKS:
            raise PgpError(_SECRET_FOUND)
        if kind != _PUBLIC_BLOCK:
            raise PgpError(f"it is a PGP {kind}, wanted a PGP {_PUBLIC_BLOCK}")
        packets += _dearmor_block(body)
    return packets


def _dearmor_block(body: str) -> bytes:
    # Headers such as "Version: 1" have a colon, which base64 has not.
    lines = [line.strip() for line in body.splitlines() if line.strip() and ":" not in line]
    checksum = lines.pop()[1:] if lines and re.fullmatch("=.{4}", lines[-1]) else None
    try:
        packets = base64.b64decode("".join(lines), validate=True)
        # RFC 9580 no longer wants the checksum, so it may be missing.
        intact = checksum is None or base64.b64decode(checksum, validate=True) == _crc24(packets)
    except (binascii.Error, ValueError):
        intact = False
    if not intact or not packets:
        raise PgpError("it is damaged: its base64 text does not fit its checksum or is no base64")
    return packets


def armor(packets: bytes) -> str:
    """The packets as one public key block (RFC 9580 6.2), also where they were several."""
    text = base64.b64encode(packets).decode()
    lines = [text[at : at + 64] for at in range(0, len(text), 64)]
    checksum = base64.b64encode(_crc24(packets)).decode()
    return "\n".join(
        [f"-----BEGIN PGP {_PUBLIC_BLOCK}-----", "", *lines, f"={checksum}", f"-----END PGP {_PUBLIC_BLOCK}-----", ""]
    )


def _crc24(data: bytes) -> bytes:
    """RFC 9580 6.1.1."""
    crc = 0xB704CE
    for byte in data:
        crc ^= byte << 16
        for _ in range(8):
            crc <<= 1
            if crc & 0x1000000:
                crc ^= 0x1864CFB
    return crc.to_bytes(3, "big")


# Packets


def primary_keys(packets: bytes) -> list[Key]:
    """The primary keys in the binary form of a file, in its order.

    Raises PgpError where there is none, where the file holds anything but public keys, and where it is damaged.
    """
    if len(packets) > MAX_SIZE:
        raise PgpError(f"it is larger than {MAX_SIZE >> 20} MiB, which no key is")
    found: list[_Found] = []
    for tag, body in _packets(packets):
        if tag in _SECRET_KEYS:
            raise PgpError(_SECRET_FOUND)
        if tag not in _OF_A_PUBLIC_KEY:
            raise PgpError(f"it holds an OpenPGP packet of type {tag}, which is no part of a public key")
        if tag == _PUBLIC_KEY:
            found.append(_Found(body))
        elif not found:
            raise PgpError(f"it begins with an OpenPGP packet of type {tag}, wanted a primary key")
        elif tag in (_USER_ID, _USER_ATTRIBUTE):
            found[-1].add_user(body if tag == _USER_ID else None)
        elif tag == _SIGNATURE:
            found[-1].add_signature(body)
    if not found:
        raise PgpError("it holds no key")
    return [one.key() for one in found]


class _Reader:
    """Takes bytes from the front; raises PgpError where they end too early."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        if len(taken) < count:
            raise PgpError("it is cut off or damaged: an OpenPGP packet is longer than what there is of it")
        self._at += count
        return taken

    def number(self, count: int) -> int:
        return int.from_bytes(self.take(count), "big")

    def length(self, two_octets_end: int) -> int:
        """A length of one, two or five octets (RFC 9580 4.2.1 for packets, 5.2.3.7 for subpackets)."""
        first = self.number(1)
        if first < 192:
            return first
        if first < two_octets_end:
            return ((first - 192) << 8) + self.number(1) + 192
        if first < 255:
            raise PgpError("it has an OpenPGP packet in parts, which no key has")
        return self.number(4)

    def more(self) -> bool:
        return self._at < len(self._data)


def _packets(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and body of each packet, in the new or the old format (RFC 9580 4.2)."""
    reader = _Reader(data)
    while reader.more():
        head = reader.number(1)
        if not head & 0x80:
            raise PgpError("it is damaged, or more than a key: what follows a packet is no OpenPGP packet")
        if head & 0x40:
            tag, length = head & 0x3F, reader.length(two_octets_end=224)
        elif head & 3 == 3:
            raise PgpError("it has an OpenPGP packet without a length, which no key has")
        else:
            tag, length = head >> 2 & 0xF, reader.number(1 << (head & 3))
        yield tag, reader.take(length)


class _Found:
    """A primary key with what has been read of it so far."""

    def __init__(self, body: bytes) -> None:
        reader = _Reader(body)
        self.version = reader.number(1)
        if self.version in (2, 3):
            raise PgpError(f"it has a key of version {self.version}, whose fingerprint others can have, too")
        if self.version not in (4, 6):
            raise PgpError(f"it has a key of version {self.version}, wanted 4 or 6")
        self.created = reader.number(4)
        if self.version == 4:
            if len(body) > 0xFFFF:
                raise PgpError("it has a key that is too long")
            # SHA-1 is what the fingerprint is (RFC 4880 12.2), also where the host allows it for nothing else.
            digest = hashlib.sha1(b"\x99" + len(body).to_bytes(2, "big") + body, usedforsecurity=False)
        else:
            digest = hashlib.sha256(b"\x9b" + len(body).to_bytes(4, "big") + body)
        self.fingerprint = digest.digest()
        self.key_id = self.fingerprint[-8:] if self.version == 4 else self.fingerprint[:8]
        self.user_ids: list[str] = []
        self.users = 0
        #: The newest signature by the key itself on each user (0: on the key): its time, and the key's lifetime (s).
        self.claims: dict[int, tuple[int, int]] = {}

    def add_user(self, name: bytes | None) -> None:
        self.users += 1
        if name is not None:
            text = name.decode("utf-8", "replace")
            # It will stand in messages, where a newline or a terminal's control sequence could say something else.
            self.user_ids.append("".join(sign if sign.isprintable() else "?" for sign in text))

    def add_signature(self, body: bytes) -> None:
        """Remember what a signature by the key itself says about its lifetime; others say nothing about that."""
        reader = _Reader(body)
        version = reader.number(1)
        if version not in (4, 6):
            return  # version 3 has no lifetime; what is newer is not known
        kind = reader.number(1)
        if kind not in (*_CERTIFICATIONS, _DIRECT):
            return
        reader.take(2)  # algorithms
        octets = 2 if version == 4 else 4
        hashed = _subpackets(reader.take(reader.number(octets)))
        unhashed = _subpackets(reader.take(reader.number(octets)))
        issuers = {**unhashed, **hashed}
        by_itself = self.key_id == issuers.get(_ISSUER) or self.fingerprint == issuers.get(_ISSUER_FINGERPRINT, b"")[1:]
        if not by_itself or _CREATED not in hashed:
            return
        claim = int.from_bytes(hashed[_CREATED], "big"), int.from_bytes(hashed.get(_KEY_LIFETIME, b""), "big")
        user = 0 if kind == _DIRECT else self.users
        if claim[0] >= self.claims.get(user, (0, 0))[0]:
            self.claims[user] = claim

    def key(self) -> Key:
        # As gpg decides: what the key says about itself goes first, then the user with the newest signature.
        limited = {user: claim for user, claim in self.claims.items() if claim[1]}
        _time, lifetime = limited.get(0) or max(limited.values(), default=(0, 0))
        expires = self.created + lifetime if lifetime else None
        return Key(self.fingerprint.hex().upper(), tuple(self.user_ids), self.created, expires)


def _subpackets(data: bytes) -> dict[int, bytes]:
    """The subpackets of a signature by type; the last one counts (RFC 9580 5.2.3.9)."""
    reader, found = _Reader(data), {}
    while reader.more():
        body = reader.take(reader.length(two_octets_end=255))
        if body:
            found[body[0] & 0x7F] = body[1:]  # the eighth bit says that it is critical
    return found


# Judgement


def wanted_fingerprints(values: Iterable[str], variable: str) -> list[str]:
    """The fingerprints in upper case and without spaces.

    Raises KeyRefused where there is none, or one is not 40 or 64 hexadecimal digits.
    """
    wanted = []
    for value in values:
        digits = "".join(value.split()).upper()
        if not re.fullmatch("[0-9A-F]{40}|[0-9A-F]{64}", digits):
            raise KeyRefused(
                f"{variable} has {value!r}, wanted a fingerprint of 40 hexadecimal digits (64 for a key of version 6): "
                "give the whole fingerprint, as a shorter one can be forged"
            )
        wanted.append(digits)
    if not wanted:
        raise KeyRefused(f"{variable} is empty, wanted at least one fingerprint: name the keys that may be trusted")
    return wanted


def check_expected(keys: Sequence[Key], wanted: Sequence[str], where: str, variable: str) -> None:
    """Raises KeyRefused unless the keys are exactly the wanted ones.

    ``where`` follows "the key" in the message ("at URL"), ``variable`` is what the operator sets to change ``wanted``.
    """
    others = [key for key in keys if key.fingerprint not in wanted]
    there = {key.fingerprint for key in keys}
    missing = [fingerprint for fingerprint in wanted if fingerprint not in there]
    if not others and not missing:
        return
    if not others:
        problem = f"{', '.join(missing)} is missing"
    elif len(keys) == 1:
        problem = "it is not the key that was expected"
    else:
        problem = f"{', '.join(key.fingerprint for key in others)} was not expected"
    raise KeyRefused(
        f"the key {where} is {' and '.join(map(str, keys))}, wanted {' and '.join(wanted)}: {problem}, so nothing was "
        "trusted; where the owner of the repository has changed the key, check the new fingerprint with them and set "
        f"{variable}"
    )


def check_expiry(keys: Sequence[Key], now: float, where: str, variable: str) -> list[str]:
    """A warning for each key that has expired at ``now`` (Unix time, s). Raises KeyRefused where all have."""
    expired = [key for key in keys if has_expired(key, now)]
    if len(expired) < len(keys):
        return [f"the key {where} {key} expired on {day(key.expires)}: apt refuses what it signs" for key in expired]
    raise KeyRefused(
        f"the key {where} is {' and '.join(f'{key}, which expired on {day(key.expires)}' for key in keys)}, wanted one "
        f"that is valid today, {day(int(now))}, as apt refuses what an expired key signs: check the host's clock, or "
        f"ask the owner of the repository for the new key and set {variable}"
    )


def has_expired(key: Key, now: float) -> bool:
    """Whether the key has expired at ``now`` (Unix time, s)."""
    return key.expires is not None and key.expires <= now


def day(moment: int | None) -> str:
    """The date of a Unix time (s), in UTC; "never" for None."""
    return "never" if moment is None else time.strftime("%Y-%m-%d", time.gmtime(moment))

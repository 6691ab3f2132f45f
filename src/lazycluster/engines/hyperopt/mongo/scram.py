"""SCRAM-SHA-256 (RFC 5802, RFC 7677), the server's side."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
from dataclasses import dataclass, field, replace

from .errors import CommandError

ITERATIONS = 15000
MECHANISM = "SCRAM-SHA-256"


def _failed() -> CommandError:
    return CommandError(18, "Authentication failed.")


def _hmac(key: bytes, message: bytes) -> bytes:
    return hmac.new(key, message, hashlib.sha256).digest()


@dataclass(frozen=True)
class ScramCredentials:
    """The part of a password that a server keeps: it is not enough to log in with.

    Attributes:
        user: The name.
    """

    user: str
    salt: bytes = field(repr=False)
    stored_key: bytes = field(repr=False)
    server_key: bytes = field(repr=False)

    @classmethod
    def of(cls, user: str, password: str) -> ScramCredentials:
        """Return them for a password of printable ASCII characters."""
        salt = os.urandom(28)
        salted = hashlib.pbkdf2_hmac("sha256", password.encode("ascii"), salt, ITERATIONS)
        stored = hashlib.sha256(_hmac(salted, b"Client Key")).digest()
        return cls(user, salt, stored, _hmac(salted, b"Server Key"))


class Conversation:
    """One attempt to log in.

    Args:
        credentials: What is known of the user.
    """

    def __init__(self, credentials: ScramCredentials) -> None:
        self._credentials = credentials
        self._said = b""
        self._nonce = b""
        self.done = False
        self._step = 0

    def answer(self, payload: bytes) -> bytes:
        """Return the answer to the next message.

        Raises:
            CommandError: If the client does not know the password, or does not speak the protocol.
        """
        self._step += 1
        if self._step == 1:
            return self._first(payload)
        if self._step == 2:
            return self._final(payload)
        if self._step == 3 and not payload:  # clients that want an empty last exchange
            self.done = True
            return b""
        raise _failed()

    def _first(self, payload: bytes) -> bytes:
        head, _, bare = payload.partition(b",,")
        attributes = _attributes(bare)
        if head != b"n" or not attributes.get(b"r") or b"m" in attributes:
            raise _failed()
        user = attributes.get(b"n", b"").replace(b"=2C", b",").replace(b"=3D", b"=")
        if user != self._credentials.user.encode():
            # Unknown users are not to be told from known ones before the end, and are not to cost more than these.
            self._credentials = replace(self._credentials, stored_key=os.urandom(32), server_key=os.urandom(32))
        self._nonce = attributes[b"r"] + base64.b64encode(os.urandom(24))
        salt = base64.b64encode(self._credentials.salt)
        reply = b"r=" + self._nonce + b",s=" + salt + b",i=" + str(ITERATIONS).encode()
        self._said = bare + b"," + reply
        return reply

    def _final(self, payload: bytes) -> bytes:
        without_proof, _, proof = payload.rpartition(b",p=")
        attributes = _attributes(without_proof)
        if attributes.get(b"c") != b"biws" or not hmac.compare_digest(attributes.get(b"r", b""), self._nonce):
            raise _failed()
        message = self._said + b"," + without_proof
        signature = _hmac(self._credentials.stored_key, message)
        try:
            given = base64.b64decode(proof, validate=True)
        except ValueError:
            raise _failed() from None
        if len(given) != len(signature):
            raise _failed()
        client_key = bytes(a ^ b for a, b in zip(given, signature, strict=True))
        if not hmac.compare_digest(hashlib.sha256(client_key).digest(), self._credentials.stored_key):
            raise _failed()
        self.done = True
        return b"v=" + base64.b64encode(_hmac(self._credentials.server_key, message))


def _attributes(text: bytes) -> dict[bytes, bytes]:
    parts = (part.partition(b"=") for part in text.split(b","))
    return {name: value for name, _, value in parts}

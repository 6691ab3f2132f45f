"""Access to the database of one Hyperopt cluster: its address, its password, the certificates it is known by."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from lazycluster.cluster.sent.messages import LOOPBACK
from lazycluster.core.certificates import Identity, make_identities, valid_until

from .programs import compat

__all__ = ["DatabaseAccess"]


class DatabaseAccess:
    """Secrets and addresses by which the database and those who use it know each other.

    Args:
        dbname: The name of the database.

    Attributes:
        dbname: The same.
        user: Who logs in. hyperopt looks for this one, and no other, in the database ``admin``.
        password: The password, made anew for each cluster.
        authority: The certificate by which the database is known, made anew for each start of it; "" if it is one
            that somebody else's launcher starts, and that has none.
        identity: Its own certificate and key.
        authority_file: The file on the manager with the certificate of the authority, for clients of the database.
    """

    authority: str
    identity: Identity | None
    authority_file: Path | None

    def __init__(self, dbname: str) -> None:
        self.dbname = dbname
        self.user, self.password = "hyperopt", secrets.token_urlsafe(24)
        self.authority, self.identity, self.authority_file = "", None, None

    def adopt(self, connection: Mapping[str, Any]) -> None:
        """Take over what a connection file has: the user, the password and the file of the authority."""
        address = urlsplit(str(connection["mongo_trial_url"]))
        self.user, self.password = str(address.username), str(address.password)
        for file in parse_qs(address.query).get(compat.AUTHORITY, []):
            self.authority_file = Path(file)

    def make_identity(self, directory: str) -> None:
        """Make certificates for a database that is to be started.

        Args:
            directory: A private directory, where that of the authority is put.
        """
        self.authority, identities = make_identities("database")
        self.identity = identities["database"]
        self.authority_file = Path(directory, f"database-{secrets.token_hex(4)}.pem")
        self.authority_file.write_text(self.authority, "ascii")

    def forget_identity(self) -> None:
        """Forget the certificates: the database has ended."""
        if self.authority_file is not None:
            self.authority_file.unlink(missing_ok=True)
        self.authority, self.identity, self.authority_file = "", None, None

    def url(self, port: int, scheme: str = "mongo", path: str = "", options: Mapping[str, str] | None = None) -> str:
        """Return the address of the database, password included.

        Args:
            port: The port.
            scheme: How it begins.
            path: What follows the name of the database.
            options: What follows in the query, beside what tells how the database is known.
        """
        address = f"{scheme}://{self.user}:{self.password}@{LOOPBACK}:{port}/{self.dbname}{path}"
        known = {"tls": "true", compat.AUTHORITY: str(self.authority_file)} if self.authority_file else {}
        query = urlencode({**(options or {}), **known}, safe="/")
        return f"{address}?{query}" if query else address

    @property
    def login(self) -> dict[str, str]:
        """The user and the password, as a database and its workers are told them."""
        return {"user": self.user, "password": self.password}

    @property
    def tls(self) -> dict[str, str] | None:
        """The certificate and key of the database, as it is told them; None if it has none."""
        return None if self.identity is None else {"certificate": self.identity.certificate, "key": self.identity.key}

    def valid_until(self) -> float | None:
        """Return when the certificate of the database expires, in seconds since 1970; None if there is none."""
        return None if self.identity is None else valid_until(self.identity.certificate)

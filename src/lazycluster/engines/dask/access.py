"""Access to the processes of one Dask cluster: its certificates, its addresses, the secret path of its dashboards."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from lazycluster.cluster.certificates import Credentials, make_credentials
from lazycluster.cluster.sent.messages import LOOPBACK
from lazycluster.core.certificates import valid_until

__all__ = ["ClusterAccess"]


class ClusterAccess:
    """Secrets and addresses that processes and clients of one cluster need to talk to each other.

    Attributes:
        secure: Whether connections are encrypted and authenticated.
        prefix: The secret part of the dashboards' addresses.
    """

    def __init__(self) -> None:
        self.secure = True
        self.forget()

    def forget(self) -> None:
        """Forget the secrets; a cluster that is started anew has others."""
        self.prefix = secrets.token_urlsafe(18)
        self._credentials: Credentials | None = None
        self._adopted: dict[str, Any] | None = None

    def adopt(self, connection: Mapping[str, Any]) -> None:
        """Take over what a connection file has: a client's certificate, and the address of the dashboard."""
        self._adopted = dict(connection["security"])
        self.prefix = str(connection.get("dashboard", "///")).split("/")[3]

    @property
    def protocol(self) -> str:
        """Beginning of addresses."""
        return "tls" if self.secure else "tcp"

    def address(self, port: int, host: str = LOOPBACK) -> str:
        """Return the address of a port, as Dask writes it."""
        return f"{self.protocol}://[{host}]:{port}" if ":" in host else f"{self.protocol}://{host}:{port}"

    @property
    def credentials(self) -> Credentials:
        """The certificates of the cluster, made when they are first needed."""
        self._credentials = self._credentials or make_credentials()
        return self._credentials

    def security(self, role: str) -> dict[str, Any]:
        """Return the arguments of `distributed.Security` for a role."""
        if self._adopted is not None:
            return self._adopted
        if not self.secure:
            return {"require_encryption": False}
        return self.credentials.for_role(role)

    def settings(self, role: str) -> dict[str, Any]:
        """Return what a process with a role is told of it."""
        return {"protocol": self.protocol, "security": self.security(role), "prefix": self.prefix}

    def valid_until(self) -> float | None:
        """Return when the certificates expire, in seconds since 1970; None if there are none."""
        return valid_until(self.credentials.scheduler.certificate) if self.secure else None

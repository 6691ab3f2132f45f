"""Certificates of the parties of one Dask cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lazycluster.core.certificates import Identity, make_identities


@dataclass(frozen=True)
class Credentials:
    """Certificates by which the parties of one cluster know each other.

    Whoever is to take part needs an identity that was signed by the cluster's own authority, whose key is forgotten
    as soon as all identities are made.

    Attributes:
        authority: The certificate of the authority.
        scheduler: The scheduler's identity.
        worker: The workers' identity.
        client: The clients' identity.
    """

    authority: str
    scheduler: Identity
    worker: Identity
    client: Identity

    def for_role(self, role: str) -> dict[str, Any]:
        """Return the arguments of `distributed.Security` for the process of one role, which gets its own key only."""
        identity: Identity = getattr(self, role)
        arguments: dict[str, Any] = {"require_encryption": True, "tls_ca_file": self.authority}
        # A task may ask its worker for a client (`get_client`, `worker_client`), which uses the worker's security.
        for name in {role, "client"}:
            arguments[f"tls_{name}_cert"] = identity.certificate
            arguments[f"tls_{name}_key"] = identity.key
        return arguments


def make_credentials() -> Credentials:
    """Make the credentials of one Dask cluster.

    Raises:
        ModuleNotFoundError: If the package `cryptography` is not installed.
    """
    authority, identities = make_identities("scheduler", "worker", "client")
    return Credentials(authority, **identities)

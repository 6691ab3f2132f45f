"""What an installer's output means: the package concerned, and what to do."""

from __future__ import annotations

import re

from lazycluster.exceptions import EnvironmentBuildError

__all__ = ["IndexUnreachableError", "explained"]


class IndexUnreachableError(EnvironmentBuildError):
    """The index, or what it names, cannot be reached now."""


# Only where a word begins: what has no spaces in it for a megabyte is read once, not from each of its characters.
_NAME = r"(?<![A-Za-z0-9._-])`?(?P<package>[A-Za-z0-9][A-Za-z0-9._-]*)"
_CLOCK = "check the clock there, and the certificates"

# The first that matches says what it is about. Where none does, the output speaks for itself.
_KNOWN: tuple[tuple[str, str, str], ...] = (
    (r"No space left on device|disk quota exceeded", "the disk is full", "free some space there"),
    (
        r"network (was|is) disabled|network connectivity is disabled",
        "the network is disabled",
        "enable it: it is disabled by UV_OFFLINE or in the configuration of uv on the manager",
    ),
    (
        r"invalid peer certificate|certificate verify failed|CertificateExpired|NotValidYet|UnknownIssuer",
        "the certificate of the index is not accepted",
        _CLOCK + "; a certificate authority of your own is named with SSL_CERT_FILE on the manager",
    ),
    (
        r"error sending request for url|client error \(Connect\)|cause: (tcp connect|dns) error"
        r"|unable to access '[^']*': (Could not resolve|Failed to connect|Couldn't connect)|HTTP status server error",
        "the index cannot be reached",
        "check the network and the index in the configuration of pip or uv on the manager",
    ),
    (
        rf"Because {_NAME}\s+was\s+not\s+found\s+in\s+the\s+(package|provided|registry)",
        "there is no package {package}",
        "correct the name of {package}, or leave it out: EnvironmentSpec(..., exclude=)",
    ),
    (rf"{_NAME} was not found in the (package )?(registry|cache)", "there is no package {package}", "correct its name"),
    (
        rf"there\s+(is|are)\s+no\s+versions?\s+of\s+{_NAME}",
        "no version of {package} fits",
        "ask for a version of {package} that exists, or exclude it",
    ),
    (
        rf"{_NAME}(==\S+)?\s+has\s+no\s+(wheels|source distribution|usable wheels)[^\n]*",
        "{package} has no wheel for the host's platform and Python",
        "choose another version of {package}, or leave it out: EnvironmentSpec(..., exclude=), or use another Python: "
        "EnvironmentSpec(..., python=)",
    ),
    (
        r"requirements are unsatisfiable|No solution found",
        "the requirements contradict each other",
        "loosen one of the versions named above",
    ),
    (
        rf"Hash mismatch for {_NAME}",
        "the hash of {package} is wrong: it is not what was locked",
        "if it was published anew, lock it again; else do not trust this index",
    ),
    (
        rf"(Failed to build|Build backend failed|Failed to prepare distributions)( {_NAME})?",
        "no wheel fits, and it cannot be built here",
        "choose a version that has a wheel, install what its build needs (see above), or exclude it",
    ),
    (
        r"Git operation failed",
        "a repository cannot be fetched",
        "check its address and branch, and that git can clone it here without being asked anything",
    ),
    (
        r"401 Unauthorized|403 Forbidden|Missing credentials",
        "the index wants other credentials",
        "check name and password of the index in the configuration of pip or uv on the manager",
    ),
    (
        r"dns error|error sending request|Connection refused|tcp connect error|timed out|Could not connect"
        r"|Failed to fetch|Network is unreachable",
        "the index cannot be reached",
        "check the network and the index in the configuration of pip or uv on the manager",
    ),
    (
        r"Permission denied|Read-only file system",
        "it is not allowed to write there",
        "choose another directory: EnvironmentSpec(..., cache_dir=)",
    ),
    (
        r"No interpreter found for Python (?P<package>\S+)",
        "no Python {package} was found",
        "install Python {package}, or choose another: EnvironmentSpec(..., python=)",
    ),
    (r"TOML parse error|Failed to parse|Couldn't parse", "the file or a requirement cannot be read", "correct it"),
)
_UNREACHABLE = ("the network is disabled", "the index cannot be reached")


def explained(host: str, what: str, output: str, package: str = "") -> EnvironmentBuildError:
    """Return what an installer printed as an error.

    Args:
        host: Where it ran.
        what: What it was to do.
        output: What it printed, without secrets.
        package: The package that it was about, if that is known.
    """
    for pattern, problem, hint in _KNOWN:
        found = re.search(pattern, output, re.IGNORECASE)
        if found:
            package = package or (found.groupdict().get("package") or "").rstrip(".:`")
            kind = IndexUnreachableError if problem in _UNREACHABLE else EnvironmentBuildError
            return kind(
                host, f"{what}: {problem.format(package=package)}", package, hint.format(package=package), output
            )
    return EnvironmentBuildError(host, f"{what} failed", package, "see what it printed, above", output)

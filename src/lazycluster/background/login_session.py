"""The end of a user's login, as systemd's logind makes it: which processes it ends, and how one is kept from that."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import subprocess

from lazycluster.core import unix
from lazycluster.exceptions import BackgroundError

__all__ = ["outliving"]

_LIMIT = 10.0  # seconds for an answer of logind
_MANAGER = ("KillUserProcesses", "KillOnlyUsers", "KillExcludeUsers")
_BUS = ("XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS")


def outliving() -> list[str]:
    """Return what stands before a command so that its process outlives the login: nothing on most machines.

    logind ends the processes of a session with it if ``KillUserProcesses=yes``, and those of a user's own services
    with the last session, unless the user lingers. With lingering, a process must not be in the session all the same.

    Raises:
        BackgroundError: If the process would be ended with the login; says what to do.
    """
    group = _control_group()
    if "/user.slice/" not in group:
        return []
    in_session = re.search(r"/session-[^/]+\.scope", group) is not None
    if in_session and not _kills():
        return []
    if not _lingers():
        why = "KillUserProcesses=yes" if in_session else "this is one of your own services (systemctl --user)"
        raise BackgroundError(
            f"a cluster in the background would end with your login on this machine: {why}\n"
            "  Next step: loginctl enable-linger, then start the cluster again"
        )
    return _outside_of_the_session() if in_session else []


def _outside_of_the_session() -> list[str]:
    if shutil.which("systemd-run") is None or not os.environ.get("XDG_RUNTIME_DIR"):
        raise BackgroundError(
            "a cluster in the background would end with your login on this machine (KillUserProcesses=yes), and "
            "systemd-run, which could start it outside of the login, cannot be used: it is not installed, or "
            "XDG_RUNTIME_DIR is not set\n  Next step: log in as yourself (ssh, not su or sudo), then start it again"
        )
    return ["systemd-run", "--user", "--scope", "--quiet", "--collect", "--"]


def variables() -> dict[str, str]:
    """Return the environment variables that `systemd-run` needs; the cluster itself does not keep them."""
    return {name: os.environ[name] for name in _BUS if name in os.environ}


def _control_group() -> str:
    """Return the control group that systemd has put this process into, "" if there is none."""
    lines = unix.control_groups()
    found = {line.split(":", 2)[1]: line.split(":", 2)[2] for line in lines if line.count(":") >= 2}
    return found.get("name=systemd") or found.get("", "")


def _kills() -> bool:
    """Return whether logind ends what a session of this user leaves. What cannot be asked is taken for the default."""
    answers = _ask("show-session", *(f"--property={name}" for name in _MANAGER))
    if answers.get("KillUserProcesses") != "yes":
        return False
    user = getpass.getuser()
    only, never = (answers.get(name, "").split() for name in _MANAGER[1:])
    return user not in never and (not only or user in only)


def _lingers() -> bool:
    return _ask("show-user", str(os.getuid()), "--property=Linger").get("Linger") == "yes"


def _ask(*arguments: str) -> dict[str, str]:
    argv = ["loginctl", "--no-pager", *arguments]
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_LIMIT, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)

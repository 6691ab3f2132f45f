"""Whether the system ends a user's processes when the user's session ends."""

from __future__ import annotations

import glob
import os
import pwd

_FILES = (
    "/etc/systemd/logind.conf",
    "/usr/lib/systemd/logind.conf.d/*.conf",
    "/usr/local/lib/systemd/logind.conf.d/*.conf",
    "/run/systemd/logind.conf.d/*.conf",
    "/etc/systemd/logind.conf.d/*.conf",
)


def kills_at_logout(root: str = "", session: str = "") -> str:
    """Return why nothing of this user outlives an ssh session; empty if it does.

    Args:
        root: A directory that stands for ``/``.
        session: The name of the session that logind has for this process, by default the one that it is in.
    """
    if not (session or os.environ.get("XDG_SESSION_ID") or "/session-" in _read(root + "/proc/self/cgroup")):
        return ""  # logind knows nothing of it
    settings = {"KillUserProcesses": "no", "KillOnlyUsers": "", "KillExcludeUsers": "root"}
    place = ""
    for pattern in _FILES:
        for path in sorted(glob.glob(root + pattern)):
            for line in _read(path).splitlines():
                name, equals, value = line.strip().partition("=")
                if equals and name.strip() in settings:
                    settings[name.strip()] = value.strip()
                    place = path[len(root) :] if name.strip() == "KillUserProcesses" else place
    if settings["KillUserProcesses"].lower() not in ("yes", "true", "on", "1", "y", "t"):
        return ""
    user, only = _user(), settings["KillOnlyUsers"].split()
    if user in settings["KillExcludeUsers"].split() or (only and user not in only):
        return ""
    return "the system ends a user's processes at logout (KillUserProcesses=yes in {})".format(place)


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""

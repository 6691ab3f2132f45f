"""What a set of throw-away hosts can be asked to be."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

PASSWORD = "lazy pass-w0rd"
PASSWORD_HASH = "$6$lazycluster$m4RxJ7yL7G7InSmIRx47MZpHuuQIu/wB/Mgl26Qj5Kv3btG1GDcJan2UrvhA6DiC8DYgrMa.bEDDeFRGRduKO1"

_NOISE = 'echo "noise on stdout"; echo "noise on stderr" >&2\n'

#: Start-up files of the login shells, by what they do. dash reads none unless it is interactive.
RC_FILES: dict[str, dict[str, str]] = {
    "noisy": {
        ".bashrc": _NOISE,
        ".zshenv": _NOISE,
        ".tcshrc": 'echo "noise on stdout"; sh -c \'echo "noise on stderr" >&2\'\n',
        ".config/fish/config.fish": _NOISE,
    },
    "reads_stdin": {
        ".bashrc": "read -r answer\n",
        ".zshenv": "read -r answer\n",
        ".tcshrc": "set answer = $<\n",
        ".config/fish/config.fish": "read answer\n",
    },
    "eats_stdin": {
        ".bashrc": "cat >/dev/null\n",
        ".zshenv": "cat >/dev/null\n",
        ".tcshrc": "cat >/dev/null\n",
        ".config/fish/config.fish": "cat >/dev/null\n",
    },
    "exits": {
        ".bashrc": "exit 3\n",
        ".zshenv": "exit 3\n",
        ".tcshrc": "exit 3\n",
        ".config/fish/config.fish": "exit 3\n",
    },
}


class HostsUnavailableError(Exception):
    """Hosts of this kind cannot be had here; the message says what is missing."""


class HostsFailedError(Exception):
    """Hosts did not come up, or the supervisor could not do what it was asked; the message holds what it said."""


@dataclass(frozen=True)
class Options:
    """What the hosts of one set have in common.

    Attributes:
        python: ``None`` for the interpreter that runs this, ``"3.8"`` for one of that version (pyenv or PATH), a path,
            or ``"none"`` for hosts without any, unless ``path`` or ``files`` bring one.
        shell: Login shell of the user: bash, dash, zsh, fish, tcsh, or a path.
        user: Account that the ssh config names: ``lazy``, ``root``, or another one that is made.
        bastion: The hosts are reachable through the host ``bastion`` only.
        forwarding: False puts ``AllowTcpForwarding no`` into the hosts' sshd.
        max_sessions: ``MaxSessions`` of the hosts' sshd.
        password: The only way to log in is the password ``PASSWORD``.
        rc: One of ``RC_FILES``: what the start-up files of the login shell do.
        files: Files in the user's home, by relative path.
        sshd: Further options of the hosts' sshd, by name.
        bastion_sshd: Further options of the bastion's sshd, by name.
        ssh_config: Lines that each host gets in the client's configuration file.
        port: Port of sshd.
        tmp_size: Size of /tmp, as in mount(8); memory is only taken for what is written.
        home_size: Size of the home directory.
        shared_home: The hosts share one home directory, as with NFS.
        path: Directories that come first on the hosts' PATH.
        env: Variables that sshd sets for every session.
        own: Directories that every session has of its own, empty at first, as those of containers do. The sessions of
            ordinary users are in user namespaces of their own, too; those of root are not.
        flooding: The switch passes the question who has an address on to all hosts, as those of laboratories do. False:
            it answers itself, as the networks of clouds do; nothing else is passed on to all then.
    """

    python: str | None = None
    shell: str = "bash"
    user: str = "lazy"
    bastion: bool = False
    forwarding: bool = True
    max_sessions: int | None = None
    password: bool = False
    rc: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    sshd: Mapping[str, str] = field(default_factory=dict)
    bastion_sshd: Mapping[str, str] = field(default_factory=dict)
    ssh_config: tuple[str, ...] = ()
    port: int = 22
    tmp_size: str = "2g"
    home_size: str = "2g"
    shared_home: bool = False
    path: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    own: tuple[str, ...] = ()
    flooding: bool = True

    def __post_init__(self) -> None:
        if self.rc is not None and self.rc not in RC_FILES:
            raise ValueError(f"rc must be one of {sorted(RC_FILES)}, not {self.rc!r}")

    @property
    def interpreter(self) -> str | None:
        """Path of the hosts' ``python3``; None for hosts without one."""
        return None if self.python == "none" else find_python(self.python)

    @property
    def shell_path(self) -> str:
        """Path of the login shell."""
        found = shutil.which(self.shell)
        if found is None:
            raise HostsUnavailableError(f"the shell {self.shell} is not installed")
        return found

    @property
    def home_files(self) -> dict[str, str]:
        """Files of the home directory."""
        return {**(RC_FILES[self.rc] if self.rc else {}), **self.files}


def find_python(wanted: str | None) -> str:
    """Find an interpreter.

    Args:
        wanted: A path, a version like "3.8", or None for the running one.

    Returns:
        An absolute path, in whose directory there is a ``python3``.

    Raises:
        HostsUnavailableError: There is none.
    """
    if wanted is None:
        return str(Path(sys.executable).with_name("python3"))
    if os.sep in wanted:
        return wanted
    roots = [Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser(), Path("/opt/pyenv")]
    for root in roots:
        for folder in sorted(root.glob(f"versions/{wanted}.*/bin/python3"), reverse=True):
            return str(folder)
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        found = Path(folder) / f"python{wanted}"
        if "shims" not in found.parts and found.exists() and (found.parent / "python3").resolve() == found.resolve():
            return str(found.parent / "python3")
    raise HostsUnavailableError(f"Python {wanted} is not installed (looked in pyenv and on the PATH)")


def visible_paths(interpreter: str | None, more: tuple[str, ...]) -> list[str]:
    """Directories that an interpreter needs, however they are hidden: its environment's and its installation's."""
    paths = [os.path.abspath(path) for path in more]
    if interpreter is not None:
        for binary in (os.path.abspath(interpreter), os.path.realpath(interpreter)):
            prefix = os.path.dirname(os.path.dirname(binary))
            if prefix not in ("/usr", "/usr/local", "/"):
                paths.append(prefix)
    return list(dict.fromkeys(paths))


def private_parents(paths: list[str]) -> list[str]:
    """The outermost ancestors that an ordinary user may not pass."""
    found = []
    for path in paths:
        for parent in reversed(Path(path).parents):
            if str(parent) != "/" and not parent.stat().st_mode & 0o001:
                found.append(str(parent))
                break
    return list(dict.fromkeys(found))

"""The files that make a host: sshd's and ssh's configuration, accounts, what is mounted where."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sshhosts.options import PASSWORD_HASH, Options, private_parents, visible_paths

if TYPE_CHECKING:
    from sshhosts.host import Host

_ACCOUNTS = {"lazy": 1000, "mallory": 1001}


def host_spec(layout: dict[str, Any], name: str, options: Options, *, inner: bool = False) -> dict[str, Any]:
    """Describe one host for the supervisor.

    Args:
        layout: What all hosts of the set share.
        name: Its name.
        options: What it is to be.
        inner: It is a bastion: on both bridges.

    Returns:
        Plain data.
    """
    visible = visible_paths(options.interpreter, options.path)
    masks = {
        "/root": f"mode=0700,size={options.home_size}",
        "/home": "mode=0755,size=1m",
        "/run": "mode=0755,size=16m",
        "/tmp": f"mode=1777,size={options.tmp_size}",
        "/var/tmp": f"mode=1777,size={options.tmp_size}",
        "/dev/shm": "mode=1777,size=1g",
    }
    for path in private_parents(visible):
        masks[path] = f"mode=0755,size={options.home_size}"
    accounts = {**_ACCOUNTS, options.user: _ACCOUNTS.get(options.user, 1002)}
    accounts.pop("root", None)
    return {
        "name": name,
        "hostname": name,
        "port": options.port,
        "sshd": shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin") or "/usr/sbin/sshd",
        "interfaces": _interfaces(layout, name, behind=options.bastion, inner=inner),
        "flooding": options.flooding,
        "visible": visible,
        "hidden": layout["hidden"],
        "tmpfs": masks,
        "tools": options.interpreter is None,
        "shared_home": f"{layout['directory']}/home" if options.shared_home else "",
        "users": [_user(account, uid, options) for account, uid in {"root": 0, **accounts}.items()],
        "files": _files(layout, name, options, accounts, inner=inner),
    }


def _interfaces(layout: dict[str, Any], name: str, *, behind: bool, inner: bool) -> list[dict[str, str]]:
    if inner:
        return [
            {"bridge": "front", "address": "198.18.SUBNET.2"},
            {"bridge": "inner", "address": "198.19.SUBNET.2"},
        ]
    last = layout["names"].index(name) + 10
    if behind:
        return [{"bridge": "inner", "address": f"198.19.SUBNET.{last}"}]
    return [{"bridge": "front", "address": f"198.18.SUBNET.{last}"}]


def _user(name: str, uid: int, options: Options) -> dict[str, Any]:
    ours = name == options.user
    return {
        "name": name,
        "uid": uid,
        "gid": uid,
        "home": "/root" if name == "root" else f"/home/{name}",
        "home_options": "" if name == "root" else f"mode=0700,size={options.home_size}",
        "shares": ours,
        "files": options.home_files if ours else {},
    }


def _files(
    layout: dict[str, Any], name: str, options: Options, accounts: dict[str, int], *, inner: bool
) -> dict[str, Any]:
    directory = Path(layout["directory"])
    passwd = [f"root:x:0:0:root:/root:{options.shell_path if options.user == 'root' else '/bin/bash'}"]
    group = ["root:x:0:"]
    shadow = [f"root:{PASSWORD_HASH}:19000:0:99999:7:::"]
    for account, uid in accounts.items():
        shell = options.shell_path if account == options.user else "/bin/bash"
        passwd.append(f"{account}:x:{uid}:{uid}:{account}:/home/{account}:{shell}")
        group.append(f"{account}:x:{uid}:")
        shadow.append(f"{account}:{PASSWORD_HASH}:19000:0:99999:7:::")
    system = [line for line in Path("/etc/passwd").read_text().splitlines() if _is_system(line)]
    groups = [line for line in Path("/etc/group").read_text().splitlines() if _is_system(line)]
    behind = options.bastion or inner  # the bastion, too, has to find those that are behind it
    addresses = {host: f"198.{19 if behind else 18}.SUBNET.{n + 10}" for n, host in enumerate(layout["names"])}
    names = [f"{address} {host}" for host, address in addresses.items()]
    own = addresses.get(name, "198.18.SUBNET.2")
    return {
        "sshd_config": (0o644, _sshd_config(layout, options)),
        "own": (0o755, _own_directories(options)),
        "host_key": (0o600, (directory / f"{name}.key").read_text()),
        "authorized_keys": (0o644, "" if options.password else layout["public_key"]),
        "passwd": (0o644, "\n".join(passwd + system) + "\n"),
        "group": (0o644, "\n".join(group + groups) + "\n"),
        "shadow": (0o600, "\n".join(shadow) + "\n"),
        "hosts": (0o644, "\n".join(["127.0.0.1 localhost", f"{own} {name}", *names]) + "\n"),
    }


def _own_directories(options: Options) -> str:
    """The program that gives a session directories of its own, before it does what the session is for."""
    mounts = "".join(f"mount -t tmpfs -o mode=1777 none {path} && " for path in options.own)
    user = "--user --map-current-user --keep-caps" if options.user != "root" else ""
    drop = "setpriv --bounding-set=-all --inh-caps=-all --ambient-caps=-all" if options.user != "root" else ""
    run = f'{mounts}exec {drop} "$SHELL" -c "$SSH_ORIGINAL_COMMAND"'
    return f"#!/bin/sh\nexec unshare {user} --mount sh -c {shlex.quote(run)}\n"


def _is_system(line: str) -> bool:
    number = line.split(":")[2]
    return number.isdigit() and (0 < int(number) < 1000 or int(number) >= 65534)


def _sshd_config(layout: dict[str, Any], options: Options) -> str:
    settings = {
        "Port": str(options.port),
        "HostKey": "/run/host/host_key",
        "AuthorizedKeysFile": "/run/host/authorized_keys",
        "PidFile": "none",
        "StrictModes": "no",
        "PermitRootLogin": "yes",
        "PasswordAuthentication": "yes" if options.password else "no",
        "KbdInteractiveAuthentication": "no",
        "Subsystem": "sftp internal-sftp",
        "SetEnv": " ".join(_quoted({"PATH": layout["path"], **options.env})),
    }
    if openssh_version() >= (9, 8):
        # Tests fail to log in on purpose; the penalty would hit whoever comes next from the same address.
        settings["PerSourcePenalties"] = "no"
    if not options.forwarding:
        settings["AllowTcpForwarding"] = "no"
    if options.max_sessions is not None:
        settings["MaxSessions"] = str(options.max_sessions)
    if options.own:
        settings["ForceCommand"] = "/run/host/own"
    settings.update(options.sshd)
    return "".join(f"{name} {value}\n" for name, value in settings.items())


def _quoted(variables: dict[str, str]) -> list[str]:
    return [f'{name}="{value}"' if " " in value else f"{name}={value}" for name, value in variables.items()]


@cache
def openssh_version() -> tuple[int, int]:
    """Version of the installed OpenSSH."""
    said = subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=True).stderr
    found = re.search(r"OpenSSH_(\d+)\.(\d+)", said)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def client_config(directory: Path, hosts: Sequence[Host], options: Options) -> tuple[str, str]:
    """The user's ssh config, and the known_hosts file to it."""
    blocks, keys = [], []
    for host in hosts:
        bastion = host.name == "bastion"
        lines = [
            f"Host {host.name}",
            f"    HostName {host.address}",
            f"    Port {host.port}",
            f"    User {host.user}",
            f"    UserKnownHostsFile {directory}/known_hosts",
            "    GlobalKnownHostsFile none",
            "    StrictHostKeyChecking yes",
            "    UpdateHostKeys no",
            "    IdentitiesOnly yes",
            "    IdentityAgent none",
            f"    IdentityFile {'none' if options.password and not bastion else directory / 'id_ed25519'}",
        ]
        if options.bastion and not bastion:
            lines.append("    ProxyJump bastion")
        if not bastion:
            lines += [f"    {line}" for line in options.ssh_config]
        blocks.append("\n".join(lines))
        address = host.address if host.port == 22 else f"[{host.address}]:{host.port}"
        keys.append(f"{address} {(directory / f'{host.name}.key.pub').read_text().strip()}\n")
    return "\n\n".join(blocks) + "\n", "".join(keys)

"""``scripts/hosts``: throw-away SSH hosts from the command line."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from sshhosts import Hosts, HostsFailedError, HostsUnavailableError
from sshhosts.options import RC_FILES

_STATE = Path("/tmp") / f"lazycluster-hosts-{os.geteuid()}"

_EPILOG = """\
examples:
  scripts/hosts up 3                         three hosts, then:  ssh -F /tmp/lazycluster-hosts-0/config host1
  scripts/hosts up 2 --bastion               reachable through a jump host only
  scripts/hosts up 1 --shell zsh --rc noisy  a login shell that prints at every start
  scripts/hosts up 1 --sshd MaxSessions=2 --no-forwarding --python 3.8
  scripts/hosts status
  scripts/hosts down

The hosts are real OpenSSH servers in Linux namespaces of their own, joined by a bridge that nothing else is on.
They need root, and live until "down". Each has an ordinary user "lazy"; "--user root" logs in as root.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.action(options)
    except (HostsUnavailableError, HostsFailedError, ValueError) as error:
        print(f"scripts/hosts: {error}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/hosts",
        description="Bring up throw-away SSH hosts on this machine, to try lazycluster or ssh on.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="{up,down,status}", required=True)
    up = commands.add_parser("up", help="bring hosts up, and say how to use them")
    up.set_defaults(action=_up)
    up.add_argument("count", type=_count, nargs="?", default=3, metavar="N", help="how many (default 3, at most 200)")
    up.add_argument("--python", metavar="WHICH", help='python3 of the hosts: a version ("3.8"), a path, or "none"')
    up.add_argument("--shell", default="bash", help="login shell: bash, dash, zsh, fish, tcsh, or a path")
    up.add_argument("--user", default="lazy", help='account that the ssh config names (default "lazy"; "root")')
    up.add_argument("--rc", choices=sorted(RC_FILES), help="what the login shell's start-up file does")
    up.add_argument("--bastion", action="store_true", help='reachable through the jump host "bastion" only')
    up.add_argument("--no-forwarding", dest="forwarding", action="store_false", help="sshd forbids TCP forwarding")
    up.add_argument("--max-sessions", type=int, metavar="N", help="sshd's MaxSessions")
    up.add_argument("--password", action="store_true", help="log in by password only (status prints it)")
    up.add_argument("--shared-home", action="store_true", help="all hosts share one home directory, as with NFS")
    up.add_argument("--port", type=int, default=22, help="port of sshd (default 22)")
    up.add_argument("--tmp-size", default="2g", metavar="SIZE", help="size of /tmp, as in mount(8) (default 2g)")
    up.add_argument(
        "--own-tmp", dest="own", action="store_const", const=("/tmp",), default=(), help="each session has its own /tmp"
    )
    up.add_argument(
        "--sshd", action="append", default=[], type=_setting, metavar="NAME=VALUE", help="a further option of sshd"
    )
    down = commands.add_parser("down", help="end the hosts, and remove everything that was made for them")
    down.set_defaults(action=_down)
    status = commands.add_parser("status", help="say which hosts are up")
    status.set_defaults(action=_status)
    return parser


def _count(text: str) -> int:
    number = int(text) if text.isdigit() else 0
    if not 1 <= number <= 200:
        raise argparse.ArgumentTypeError(f"must be a number from 1 to 200, not {text!r}")
    return number


def _setting(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not name or not sign:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, not {text!r}")
    return name, value


def _running() -> dict[str, Any] | None:
    """What is up, from the file that ``up`` left; None when its supervisor is gone."""
    try:
        state: dict[str, Any] = json.loads((_STATE / "state.json").read_text())
        command = Path(f"/proc/{state['pid']}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return state if b"supervisor.py" in command else None


def _up(options: argparse.Namespace) -> int:
    if _running():
        raise HostsUnavailableError('hosts are up already (scripts/hosts status); "scripts/hosts down" ends them')
    chosen = {name: value for name, value in vars(options).items() if name not in ("action", "count", "sshd")}
    pool = Hosts(options.count, keep=True, directory=str(_STATE), sshd=dict(options.sshd), **chosen)
    shutil.rmtree(_STATE, ignore_errors=True)
    _STATE.mkdir(0o700)
    began = time.monotonic()
    pool.start()
    took = time.monotonic() - began
    state = {
        "pid": pool.supervisor_pid,
        "config": pool.config_file,
        "password": pool[0].password if options.password else None,
        "hosts": {host.name: f"{host.user}@{host.address}:{host.port}" for host in pool.all},
    }
    (_STATE / "state.json").write_text(json.dumps(state))
    pool.release()
    print(f"{options.count} host{'s' if options.count > 1 else ''} up in {took:.2f} s")
    _tell(state)
    return 0


def _tell(state: dict[str, Any]) -> None:
    shown = list(state["hosts"].items())
    for name, address in shown if len(shown) <= 12 else [*shown[:6], ("…", ""), *shown[-2:]]:
        print(f"  {name:8} {address}")
    print(f"""
ssh config   {state["config"]}
shell        ssh -F {state["config"]} host1
lazycluster  export LAZYCLUSTER_SSH_CONFIG={state["config"]}
end them     scripts/hosts down""")
    if state["password"]:
        print(f"password     {state['password']}")


def _down(_: argparse.Namespace) -> int:
    state = _running()
    if state is None:
        shutil.rmtree(_STATE, ignore_errors=True)
        print("no hosts are up")
        return 0
    with contextlib.suppress(ProcessLookupError):
        os.kill(state["pid"], signal.SIGTERM)
    deadline = time.monotonic() + 20
    while _running() or _STATE.exists():
        if time.monotonic() > deadline:
            raise HostsFailedError(f"the hosts' supervisor (pid {state['pid']}) did not end within 20 s")
        time.sleep(0.02)
    print("the hosts are gone")
    return 0


def _status(_: argparse.Namespace) -> int:
    state = _running()
    if state is None:
        print('no hosts are up; "scripts/hosts up 3" brings up three')
        return 3
    print(f"up: {len(state['hosts'])} hosts (supervisor {state['pid']})")
    _tell(state)
    return 0


if __name__ == "__main__":
    sys.exit(main())

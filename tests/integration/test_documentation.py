"""Every code block of README and documentation runs, on hosts, and prints what is said there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import documents

TOP = Path(__file__).parents[2]
PAGES = sorted([TOP / "README.md", *(TOP / "docs").rglob("*.md")])
RUN = [page for page in PAGES if any(b.language in ("python", "console") for b in documents.blocks(page.read_text()))]


def home_for(hosts: Any, directory: Path) -> Path:
    """Make the home directory of somebody who has these hosts, and what the system is to know of names and accounts.

    ssh, and so the library, takes the home directory from the system's list of accounts, whatever ``HOME`` says.
    """
    home = directory / "home"
    (home / "work").mkdir(parents=True)
    ssh = home / ".ssh"
    ssh.mkdir(mode=0o700)
    shutil.copy2(hosts.key_file, ssh / "id_ed25519")
    shutil.copy2(f"{hosts.key_file}.pub", ssh / "id_ed25519.pub")
    addresses = {host.name: host.address for host in hosts.all}
    names = {"gateway.lab.example": addresses["bastion"]} if "bastion" in addresses else addresses
    known = Path(hosts.known_hosts).read_text()
    for name, address in names.items():
        known = re.sub(rf"^{re.escape(address)} ", f"{name},{address} ", known, flags=re.MULTILINE)
    if hosts.bastion is None:
        (ssh / "known_hosts").write_text(known)
        (ssh / "config").write_text(f"Host {' '.join(hosts.names)}\n    User {hosts[0].user}\n")
        (ssh / "config").chmod(0o600)
    lines = [line.split(":") for line in Path("/etc/passwd").read_text().splitlines()]
    accounts = [":".join([*f[:5], str(home), *f[6:]]) if f[2] == str(os.getuid()) else ":".join(f) for f in lines]
    (directory / "passwd").write_text("\n".join(accounts) + "\n")
    (directory / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for n, a in names.items()))
    return home


def run_page(page: Path, hosts: Any, directory: Path) -> None:
    home = home_for(hosts, directory)
    mounts = f'mount --bind "{directory}/passwd" /etc/passwd && mount --bind "{directory}/hosts" /etc/hosts'
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SSH_")}
    environment |= {"HOME": str(home), "PYTHONPATH": str(TOP / "tests"), "COLUMNS": "100", "LC_ALL": "C.UTF-8"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", f'{mounts} && exec "$@"', "sh",
         sys.executable, "-W", "error::ResourceWarning", str(TOP / "tests" / "documents.py"), str(page)],
        cwd=home / "work", env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-6000:]}"


@pytest.mark.parametrize("page", RUN, ids=[str(page.relative_to(TOP)) for page in RUN])
def test_code_of_pages(page: Path, make_hosts: Any, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    behind = "<!-- hosts: behind a bastion -->" in page.read_text()
    pool = make_hosts(3, bastion=True, user="ada") if behind else request.getfixturevalue("hosts")
    if not hasattr(pool, "manager_address") or os.getuid() != 0:
        pytest.skip("needs hosts in namespaces of their own")
    run_page(page, pool, tmp_path)


def test_links_of_the_readme() -> None:
    for page in (TOP / "README.md", TOP / "CHANGELOG.md", TOP / "SECURITY.md"):
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            assert re.match(r"https?://", target) or (TOP / target).exists(), f"{page.name}: {target}"


def test_nobody_is_told_of_code_that_is_not_run() -> None:
    reasons = [b.mark for page in PAGES for b in documents.blocks(page.read_text()) if b.mark.startswith("not run:")]
    assert len(reasons) < 25, reasons

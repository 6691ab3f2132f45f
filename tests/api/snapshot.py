#!/usr/bin/env python3
"""Snapshot of what others rely on: public names with their signatures, the help of all commands, messages.

    python tests/api/snapshot.py            compare with the files in tests/api/snapshot, and print the differences
    python tests/api/snapshot.py --write    write the files anew; their diff then shows what has changed for users

Where a name is defined makes no difference, as long as it can be imported from where the documentation says.
The keys of --json documents need hosts: tests/integration/test_json_documents.py compares and writes those.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from api import messages, names, stored

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).with_name("snapshot")
COMMAND = "python tests/api/snapshot.py --write"
WRITE = "LAZYCLUSTER_WRITE_SNAPSHOT"  # set: the test of --json documents writes their file


def help_lines() -> list[str]:
    """Return the help of each command, as a terminal of 80 columns shows it."""
    import click
    from click.testing import CliRunner

    from lazycluster.cli.app import cli

    lines = [f"# by click {click_version()}"]

    def visit(command: click.Command, context: click.Context, path: list[str]) -> None:
        done = CliRunner().invoke(cli, [*path, "--help"], terminal_width=80, prog_name="lazycluster")
        assert done.exit_code == 0, (path, done.output)
        lines.extend(["", " ".join(["$ lazycluster", *path, "--help"]), *map(str.rstrip, done.output.splitlines())])
        for name in command.list_commands(context) if isinstance(command, click.Group) else ():
            found = command.get_command(context, name)
            assert found is not None
            visit(found, click.Context(found, info_name=name, parent=context), [*path, name])

    visit(cli, click.Context(cli, info_name="lazycluster"), [])
    return lines


def click_version() -> str:
    return metadata.version("click")


def is_pinned_click() -> bool:
    """Whether this is the click that scripts/test installs: others lay out the same help otherwise."""
    pins = (ROOT / "constraints" / "pinned.txt").read_text(encoding="utf-8")
    return re.search(rf"^click=={re.escape(click_version())}$", pins, re.MULTILINE) is not None


PARTS: dict[str, tuple[str, Callable[[], list[str]]]] = {
    "names": ("Public names, by the modules that the documentation imports them from", names.lines),
    "help": ("The help of all commands at 80 columns", help_lines),
    "errors": ("The texts of errors, logs and output; {} stands for what is put in", messages.lines),
    "stored": ("Names that stand in what is stored, set or configured elsewhere, and do not change", stored.lines),
}


def text_of(title: str, lines: Iterable[str]) -> str:
    return "\n".join([f"# {title}.", f"# Written by: {COMMAND}", "", *lines, ""])


def current(part: str) -> str:
    """Return what the file of a part should hold."""
    title, lines = PARTS[part]
    return text_of(title, lines())


def difference(part: str, now: str) -> str:
    """Return how a part differs from its file; nothing if it does not."""
    path = FOLDER / f"{part}.txt"
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    titles = (str(path.relative_to(ROOT)), "the present code")
    return "\n".join(difflib.unified_diff(before.splitlines(), now.splitlines(), *titles, n=1, lineterm=""))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    status = 0
    for part in PARTS:
        if part == "help" and not is_pinned_click():
            print(f"the help is compared with the click of constraints/pinned.txt only, not {click_version()}")
            continue
        now = current(part)
        if options.write:
            (FOLDER / f"{part}.txt").write_text(now, encoding="utf-8")
        elif found := difference(part, now):
            print(found)
            status = 1
    if options.write:
        test = [sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/integration/test_json_documents.py"]
        return subprocess.run(test, cwd=ROOT, env={**os.environ, WRITE: "1"}).returncode
    return status


if __name__ == "__main__":
    sys.exit(main())

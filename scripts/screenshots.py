"""Writes pictures of what the command line prints on three throw-away hosts, as SVG."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.ansi import AnsiDecoder
from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI

from sshhosts import Hosts

PICTURES = Path(__file__).parent.parent / "docs" / "screenshots"
WIDTH = 110
# Name of the picture -> what is run.
COMMANDS = {
    "list-runtimes": ["list-runtimes", "-l", "-w", "host[1-3],host9"],
    "doctor": ["doctor", "host1"],
}
# The fonts would be fetched from elsewhere.
FORMAT = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)


def main() -> None:
    """Write all pictures."""
    with Hosts(3) as hosts:
        for name, arguments in COMMANDS.items():
            command, *rest = arguments
            argv = [sys.executable, "-m", "lazycluster", command, "--config", hosts.config_file, *rest]
            environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": str(WIDTH)}
            done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
            # Where this checkout lies is nobody's business.
            text = (done.stdout + done.stderr).replace(sys.prefix, "/opt/venv")
            shown = " ".join(f"'{word}'" if set(word) & set(" $*[,") else word for word in ["lazycluster", *arguments])
            write(name, f"\x1b[32m$\x1b[0m \x1b[1m{shown}\x1b[0m\n{text}")


def write(name: str, text: str) -> None:
    """Write one picture."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for line in AnsiDecoder().decode(text.rstrip("\n")):
        console.print(line, soft_wrap=False)
    svg = console.export_svg(title="", theme=DIMMED_MONOKAI, code_format=FORMAT, unique_id=name)
    path = PICTURES / f"{name}.svg"
    path.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n", encoding="utf-8")
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()

"""Runs the code blocks of a Markdown page, in order, and compares what they print with what the page says.

Blocks of ``python`` share one namespace, ``console`` blocks are given to
bash, a ``text`` block says what the block before it prints (``...`` stands for anything), and a block with a title is a
file. A comment before a block says what is special about it: ``not run: why``, ``raises``, ``exit: 3``, ``background``,
``numbers vary``. Lines that commands print may come in any order, since hosts answer as they like.

Usage: python documents.py PAGE.md      (in the directory where it is to run)
"""

from __future__ import annotations

import contextlib
import io
import re
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>```+)(?P<info>[^`]*)$")
_COMMENT = re.compile(r"<!--\s*(.*?)\s*-->", re.DOTALL)
_RUNS = ("python", "console")
_MARKS = ("table", "/table", "not run:", "raises", "exit:", "background", "numbers vary", "hosts:")


class DocumentError(Exception):
    """A page says something that is not so."""


@dataclass
class Block:
    """A code block, or a hidden set-up.

    Attributes:
        language: The first word after the backticks.
        code: What it holds.
        line: Where it starts in the page, from 1.
        title: The name of the file that it is, if it has one.
        mark: The comment before it.
        output: What the page says that it prints, or None.
    """

    language: str
    code: str
    line: int
    title: str = ""
    mark: str = ""
    output: str | None = None
    output_line: int = 0


def blocks(text: str) -> list[Block]:
    """Return the blocks of a page, with the outputs joined to what prints them."""
    found: list[Block] = []
    mark, between = "", ""
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        if line.strip().startswith("<!--"):
            comment = line
            while "-->" not in comment:
                comment += "\n" + next(lines)[1]
            if comment.startswith("<!-- setup\n"):
                code = comment.removeprefix("<!-- setup\n").removesuffix("-->")
                found.append(Block("python", code, number + 1, mark="setup"))
            else:
                mark = _mark(comment, number)
            continue
        opening = _FENCE.match(line)
        if opening is None:
            if line.strip():
                mark, between = "", between + line
            continue
        block = _block(opening, number, lines)
        block.mark, mark = mark, ""
        if block.language == "text" and found and not between and found[-1].output is None:
            found[-1].output, found[-1].output_line = block.code, block.line
            found[-1].mark = "; ".join(filter(None, (found[-1].mark, block.mark)))
        else:
            found.append(block)
        between = ""
    return found


def _mark(comment: str, number: int) -> str:
    match = _COMMENT.match(comment.strip())
    text = match[1] if match else ""
    if not text.startswith(_MARKS):
        raise DocumentError(f"line {number}: a comment that says nothing known: {comment!r}")
    if text.startswith("not run:") and not text.removeprefix("not run:").strip():
        raise DocumentError(f"line {number}: say why the block is not run")
    return text


def _block(opening: re.Match[str], number: int, lines: Iterator[tuple[int, str]]) -> Block:
    indent, ticks, info = opening["indent"], opening["ticks"], opening["info"].strip()
    code: list[str] = []
    for _, line in lines:
        if line.strip() == ticks:
            break
        code.append(line.removeprefix(indent))
    title = re.search(r'title="([^"]+)"', info)
    return Block(info.split()[0] if info else "", "\n".join(code) + "\n", number + 1, title[1] if title else "")


def same(said: str, printed: str, *, numbers: bool = True) -> bool:
    """Whether what was printed is what the page says; ``...`` stands for anything.

    Args:
        said: By the page.
        printed: What was printed.
        numbers: Whether numbers, and the space around them, must be the same.
    """
    pattern = ".*".join(re.escape(part) for part in _trimmed(said).split("..."))
    if not numbers:
        pattern = re.sub(r"(\\ )*\d+((\\\.)?\d+)*", r" *[0-9.]+", re.sub(r"(\\ )+", r"\\s+", pattern))
    return re.fullmatch(pattern, _trimmed(printed), re.DOTALL) is not None


def same_lines(said: str, printed: str, *, numbers: bool = True) -> bool:
    """Whether the same lines were printed, in any order."""
    if same(said, printed, numbers=numbers):
        return True
    left = _trimmed(printed).splitlines()
    for line in _trimmed(said).splitlines():
        found = next((other for other in left if same(line, other, numbers=numbers)), None)
        if found is None:
            return False
        left.remove(found)
    return not left


def _trimmed(text: str) -> str:
    # Python marks the place in a line of a traceback (~~~^^^) where it can read the file, as it can on some machines.
    lines = (line.rstrip() for line in text.strip("\n").splitlines())
    return "\n".join(line for line in lines if not line or line.strip("~^ "))


class Page:
    """A page that is being run.

    Args:
        path: The page.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.namespace = types.ModuleType("__main__").__dict__
        self.background: list[subprocess.Popen[bytes]] = []

    def run(self) -> int:
        """Run all blocks; returns how many."""
        count = 0
        try:
            for block in blocks(self.path.read_text(encoding="utf-8")):
                try:
                    count += self.run_block(block)
                except Exception as error:
                    raise DocumentError(f"{self.path}:{block.line}: {error}\n\n{block.code}") from error
        finally:
            self.end()
        return count

    def run_block(self, block: Block) -> bool:
        """Run a block, or do what else it is for; whether it was run."""
        if block.mark.startswith("not run:"):
            return False
        if block.title:
            file = Path(block.title).expanduser()
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.code, encoding="utf-8")
            return False
        if block.language not in _RUNS:
            if block.language in ("sh", "bash", "pycon", "py"):
                raise DocumentError(
                    f"write blocks of {block.language!r} as 'console' or 'python', so that they are run"
                )
            return False
        if block.language == "python":
            self.compare(block, self.python(block))
        else:
            self.console(block)
        return True

    def python(self, block: Block) -> str:
        """Run Python, and return what it prints."""
        # Tracebacks and warnings then tell the page's own lines.
        program = compile("\n" * (block.line - 1) + block.code, str(self.path), "exec")
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            if "raises" in block.mark:
                try:
                    exec(program, self.namespace)
                except Exception as error:  # noqa: BLE001 - whatever the page raises
                    print(f"{type(error).__name__}: {error}")
                else:
                    raise DocumentError("it was to raise an error")
            else:
                exec(program, self.namespace)
        return out.getvalue()

    def compare(self, block: Block, printed: str) -> None:
        """Compare what was printed with what the page says."""
        if block.output is not None and not same(block.output, printed, numbers="numbers vary" not in block.mark):
            where = f"{self.path}:{block.output_line}"
            raise DocumentError(f"it printed\n{printed}\nand not, as {where} says,\n{block.output}")

    def console(self, block: Block) -> None:
        """Run the commands of a console block; lines that follow one are what it prints."""
        wanted = re.search(r"exit: (\d+)", block.mark)
        status = int(wanted[1]) if wanted else 0
        for command, said in commands(block.code):
            if "background" in block.mark:
                self.start(command, said)
                continue
            done = subprocess.run(
                ["bash", "-c", command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, timeout=60,
            )  # fmt: skip
            if done.returncode != status:
                raise DocumentError(f"{command}: exit status {done.returncode}\n{done.stdout}")
            if said and not same_lines(said, done.stdout, numbers="numbers vary" not in block.mark):
                raise DocumentError(f"{command} printed\n{done.stdout}\nand not\n{said}")

    def start(self, command: str, said: str) -> None:
        """Start a command that stays, and wait until it has printed what the page says."""
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self.background.append(process)
        assert process.stdout is not None
        printed = ""
        for line in process.stdout:
            printed += line.decode()
            if same_lines(said, printed):
                return
        raise DocumentError(f"{command} ended with {process.wait()}; it printed\n{printed}")

    def end(self) -> None:
        """Press Ctrl-C in what still runs."""
        for process in self.background:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=30)


def commands(text: str) -> Iterator[tuple[str, str]]:
    """Return the commands of a console block, each with what it is to print."""
    command, said = "", ""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith("$ "):
            if command:
                yield command, said
            command, said = line[2:], ""
            while command.endswith("\\"):
                command += "\n" + next(lines).removeprefix("> ")
        elif command:
            said += line + "\n"
        else:
            raise DocumentError(f"a console block starts with '$ ', not with {line!r}")
    if command:
        yield command, said


if __name__ == "__main__":
    try:
        print(Page(Path(sys.argv[1])).run(), "blocks")
    except DocumentError as problem:
        sys.exit(f"\n{problem}")

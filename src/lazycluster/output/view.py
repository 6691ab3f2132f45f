"""Views of objects: one description, shown as tables on a terminal, plain text in a file, HTML in a notebook.

Most of what is shown comes from hosts, which may mean harm: a terminal gets no control characters, a notebook no HTML.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lazycluster.exceptions import printable

from .lines import write
from .progress import in_notebook

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["Cell", "Fact", "Shown", "Table", "View", "as_html", "as_text", "columns", "headline", "show"]

Tone = Literal["", "good", "bad", "dim"]
Fact: TypeAlias = "tuple[str, Cell | str]"

_STYLES = {"": "", "good": "green", "bad": "red", "dim": "dim"}
# Halfway between dark and bright, so that they can be read on both; what they mean stands there in words, too.
_COLOURS = {"": "", "good": "color:#2e9e4f", "bad": "color:#e0443e", "dim": "opacity:.65"}
_LEFT = "text-align:left;vertical-align:top"
_OPEN = 12  # rows; longer tables are closed at first
_UNLIMITED = 100_000
_PLAIN = "mathjax_ignore tex2jax_ignore"  # what hosts say is no formula, which could hold links


@dataclass(frozen=True)
class Cell:
    """A text with a tone.

    Attributes:
        text: The text.
        tone: What it means: ``good``, ``bad``, ``dim`` for what is less important, or nothing.
    """

    text: str
    tone: Tone = ""


@dataclass(frozen=True)
class Table:
    """Rows under a head.

    Attributes:
        head: The names of the columns.
        rows: As many cells each.
        title: What it is.
        right: The columns whose cells are aligned to the right: numbers.
        exact: The columns whose cells keep their spaces: what programs printed.
    """

    head: tuple[str, ...]
    rows: Sequence[Sequence[Cell | str]]
    title: str = ""
    right: frozenset[str] = frozenset()
    exact: frozenset[str] = frozenset()


@dataclass(frozen=True)
class View:
    """The view of an object.

    Attributes:
        title: What it is, and its name.
        state: Its state.
        facts: Names and values.
        tables: What it consists of.
    """

    title: str = ""
    state: Cell | None = None
    facts: Sequence[Fact] = ()
    tables: Sequence[Table] = field(default_factory=tuple)

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> View:
        """Return a view from what `dataclasses.asdict` has made of one, perhaps after a way through JSON."""

        def cell(value: Any) -> Cell | str:
            return Cell(**value) if isinstance(value, Mapping) else str(value)

        tables = [
            Table(
                tuple(table["head"]),
                [[cell(value) for value in row] for row in table["rows"]],
                table["title"],
                frozenset(table["right"]),
                frozenset(table["exact"]),
            )
            for table in document["tables"]
        ]
        state = None if document["state"] is None else Cell(**document["state"])
        return cls(document["title"], state, [(name, cell(value)) for name, value in document["facts"]], tables)


class Shown:
    """Base of objects with a view, which notebooks show as HTML."""

    def _view(self) -> View:
        raise NotImplementedError

    def _repr_html_(self) -> str:
        return as_html(self._view())


def show(view: View) -> None:
    """Print a view, or show it below the cell of a notebook."""
    if in_notebook():
        from IPython.display import display

        display({"text/html": as_html(view), "text/plain": as_text(view, columns())}, raw=True)
    else:
        write(as_text(view, columns(), sys.stdout))


def columns() -> int:
    """Return the number of columns for what is printed."""
    if os.environ.get("COLUMNS", "").isdigit():
        return max(20, int(os.environ["COLUMNS"]))
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):  # no terminal: whoever reads it later may have a wide one
        return _UNLIMITED


def headline(text: str) -> str:
    """Return a line to print to standard output above an output."""
    line = printable(f"--- {text}")
    return f"\033[1m{line}\033[0m" if _is_terminal(sys.stdout) and not os.environ.get("NO_COLOR") else line


# --- text ----------------------------------------------------------------------------------------
def as_text(view: View, width: int = 80, like: object = None) -> str:
    """Return a view as text.

    Args:
        view: The view.
        width: The most columns that it may take.
        like: Where it goes; if that is a terminal, it gets colours, unless ``NO_COLOR`` is set.
    """
    from rich.console import Console
    from rich.table import Table as Grid
    from rich.text import Text

    # What it looks like depends on where it goes in the end, so it is not asked of the file that it goes to meanwhile.
    terminal = _is_terminal(like) and not in_notebook()
    console = Console(
        file=io.StringIO(), width=width, force_terminal=terminal, highlight=False, force_jupyter=False, emoji=False
    )
    if view.title:
        head = Text(printable(view.title), style="bold")
        if view.state is not None:
            head.append("  ").append(printable(view.state.text), style=_STYLES[view.state.tone] or "not bold")
        console.print(head, soft_wrap=True)
    if view.facts:
        grid = Grid.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True, style="dim")
        grid.add_column(overflow="fold")
        for name, value in view.facts:
            grid.add_row(Text(printable(f"  {name}" if view.title else name)), _rich(value))
        console.print(grid)
    for table in view.tables:
        if table.title:
            console.print(Text(printable(table.title), style="bold"), soft_wrap=True)
        grid = Grid(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for name in table.head:
            grid.add_column(Text(printable(name)), justify="right" if name in table.right else "left", overflow="fold")
        for row in table.rows:
            grid.add_row(*map(_rich, row))
        console.print(grid)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def _rich(cell: Cell | str) -> Text:
    from rich.text import Text

    if isinstance(cell, str):
        return Text(printable(cell))
    return Text(printable(cell.text), style=_STYLES[cell.tone])


def _is_terminal(stream: object) -> bool:
    try:
        return bool(stream.isatty()) if stream is not None else False  # type: ignore[attr-defined]
    except (AttributeError, ValueError):
        return False


# --- HTML ----------------------------------------------------------------------------------------
def as_html(view: View) -> str:
    """Return a view as HTML for light and dark pages: it has no background, and the page's own text colour."""
    parts = []
    if view.title:
        state = "" if view.state is None else f"&ensp;{_span(view.state)}"
        parts.append(f'<div style="margin-bottom:.3em"><strong>{_escaped(view.title)}</strong>{state}</div>')
    if view.facts:
        rows = "".join(
            f'<tr style="background:none"><td style="{_LEFT};opacity:.65">{_escaped(name)}</td>'
            f'<td style="{_LEFT}">{_span(value)}</td></tr>'
            for name, value in view.facts
        )
        parts.append(f'<table style="margin:0;border:none">{rows}</table>')
    parts += [_table(table) for table in view.tables]
    return f'<div class="lazycluster {_PLAIN}" style="overflow-x:auto">{"".join(parts)}</div>'


def _table(table: Table) -> str:
    def line(kind: str, cells: Sequence[Cell | str]) -> str:
        shown = "".join(
            f'<{kind} style="{_style(table, name, kind)}">{_span(cell)}</{kind}>'
            for name, cell in zip(table.head, cells, strict=True)
        )
        return f"<tr>{shown}</tr>"

    rows = "".join(line("td", row) for row in table.rows)
    grid = f'<table style="margin:0"><thead>{line("th", table.head)}</thead><tbody>{rows}</tbody></table>'
    if not table.title:
        return grid
    opened = " open" if len(table.rows) <= _OPEN else ""
    return (
        f'<details{opened} style="margin-top:.5em"><summary style="cursor:pointer">{_escaped(table.title)}</summary>'
        f"{grid}</details>"
    )


def _style(table: Table, column: str, kind: str) -> str:
    style = _LEFT.replace("left", "right") if column in table.right else _LEFT
    return f"{style};white-space:pre-wrap;font-family:monospace" if kind == "td" and column in table.exact else style


def _span(cell: Cell | str) -> str:
    if isinstance(cell, str) or not cell.tone:
        return _escaped(cell if isinstance(cell, str) else cell.text)
    return f'<span style="{_COLOURS[cell.tone]}">{_escaped(cell.text)}</span>'


def _escaped(text: str) -> str:
    import html

    return html.escape(printable(text)).replace("\n", "<br>")

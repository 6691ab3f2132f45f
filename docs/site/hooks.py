"""Hooks of mkdocs: pages that are made of what is elsewhere in the project, and drawings that follow the theme."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
from mkdocs.structure.files import File, Files

from lazycluster import exceptions
from lazycluster.cluster import exceptions as cluster_exceptions

TOP = Path(__file__).resolve().parents[2]

# Files of the checkout that are pages of the site, too. Pages link to them as files, as in a checkout.
_FILES = {"CHANGELOG.md": "reference/changelog.md", "SECURITY.md": "reference/security-tests.md"}
# Long names of tests in tables break where a person would break them.
_IN_CELL = re.compile(r"(?<=<td>).*?(?=</td>)", re.DOTALL)
# What is raised is named in docstrings of modules that do not know it.
_ERRORS = {name: f"{module.__name__}.{name}" for module in (exceptions, cluster_exceptions) for name in module.__all__}
_ERROR = re.compile(rf"(?<=\s)<code>({'|'.join(_ERRORS)})</code>")
_ALTERNATIVES = re.compile(r"<code>\((<span title=.*?)\)</code>")
_DRAWING = re.compile(r'<p><img alt="([^"]*)" src="[^"]*?drawings/([\w-]+\.svg)"[^>]*>\s*</p>')


def on_files(files: Files, config: Any) -> Files:
    """Add the command line's reference, and the files of the checkout."""
    files.append(File.generated(config, "reference/command-line.md", content=command_line()))
    for name, uri in _FILES.items():
        text = re.sub(r"\]\(docs/", "](../", (TOP / name).read_text(encoding="utf-8"))
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links to files of the checkout lead to their pages."""
    up = "../" * page.file.src_uri.count("/")
    for name, uri in _FILES.items():
        markdown = re.sub(rf"\]\((?:\.\./)+{re.escape(name)}(?=[#)])", f"]({up}{uri}", markdown)
    return markdown


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Put drawings into the page itself, so that they have the colours of the theme; let names be links, and break."""
    html = _IN_CELL.sub(lambda cell: re.sub(r"(?<=_)(?=\w)|(?<=::)(?=\w)", "<wbr>", cell[0]), html)
    if page.file.src_uri.startswith("reference/"):
        html = _ALTERNATIVES.sub(lambda found: f"<code>{found[1]}</code>", html)
        html = _ERROR.sub(
            lambda found: f'<autoref optional identifier="{_ERRORS[found[1]]}">{found[0]}</autoref>', html
        )

    def inlined(found: re.Match[str]) -> str:
        wide = TOP / "docs" / "drawings" / found[2]
        both = (wide, wide.with_stem(f"{wide.stem}-narrow"))  # the style sheet shows the one that fits
        text = "".join(re.sub(r"<\?xml.*?\?>", "", svg.read_text(encoding="utf-8")) for svg in both)
        return f'<figure class="drawing" role="img" aria-label="{found[1]}">{text}</figure>'

    return _DRAWING.sub(inlined, html)


def command_line() -> str:
    """Return the reference of the command line as Markdown, made of what `--help` prints."""
    from lazycluster.cli.app import cli

    root = click.Context(
        cli, info_name="lazycluster", help_option_names=["-h", "--help"], max_content_width=80, terminal_width=80
    )
    parts = [
        "# Command line\n\nWhat `--help` prints. See also [the tutorials](../tutorials/first-cluster.md).\n",
        _help("lazycluster", cli, root),
    ]
    for name in cli.list_commands(root):
        command = cli.get_command(root, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=root, max_content_width=80, terminal_width=80)
        parts.append(_help(f"lazycluster {name}", command, context))
        if isinstance(command, click.Group):
            for inner in command.list_commands(context):
                below = command.get_command(context, inner)
                assert below is not None
                nested = click.Context(below, info_name=inner, parent=context, max_content_width=80, terminal_width=80)
                parts.append(_help(f"lazycluster {name} {inner}", below, nested))
    return "\n".join(parts)


def _help(title: str, command: click.Command, context: click.Context) -> str:
    return f"## {title}\n\n```text\n{command.get_help(context)}\n```\n"

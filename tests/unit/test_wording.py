"""Errors name the options of the command that shows them, or say that it is Python that has them."""

from __future__ import annotations

import ast
import logging
import re
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import lazycluster
from lazycluster.cli.app import cli
from lazycluster.cli.option_names import names_its_options, spelled, spelled_next_steps
from lazycluster.exceptions import ForwardingForbiddenError, InvalidRuntimeError, InvalidRuntimesError

_LIBRARY = Path(lazycluster.__file__).parent
_NOT_OURS = ("cli", "mongo")  # it words its own; talks to databases
_EXAMPLES = {"hosts", "exp_key"}  # of Python programs in help and demonstrations
# As wording.py takes them: a name, an equals sign, and a value that a program would not have.
_ARGUMENT = re.compile(r"""(?<![\w-])([a-z_]+)=(?:"[^"\n]*"|\[[^]\n]*\]|\{[^}\n]*\}|(?=[\s,;.)]|$))""")


@pytest.fixture
def shown() -> Any:
    """Return what a hint becomes in a command, without running that."""

    def show(words: str, hint: str) -> str:
        context = click.Context(cli, info_name="lazycluster")
        for word in words.split():
            assert isinstance(context.command, click.Group)
            command = context.command.get_command(context, word)
            assert command is not None
            context = click.Context(command, info_name=word, parent=context)
        with context:
            return str(names_its_options(spelled)(hint))

    return show


@pytest.mark.parametrize(
    ("command", "hint", "becomes"),
    [
        ("start dask", 'choose with python="auto", or with setup="..."', "choose with --python auto, or with --setup"),
        ("start dask", 'RuntimeGroup(..., environment="manager")', "--environment manager"),
        ("start dask", "name its path with python=, please", "name its path with --python, please"),
        ("start dask", 'python="/opt/my python/bin/python3"', "--python '/opt/my python/bin/python3'"),
        ("start dask", 'My(..., check_versions="warn"), if', 'My(..., check_versions="warn") (in Python), if'),
        ("start hyperopt", 'connection_kwargs={"relay": "agent"}', "--relay"),
        ("start hyperopt", 'EnvironmentSpec(..., python="3.x")', 'EnvironmentSpec(..., python="3.x") (in Python)'),
        ("forward", 'connection_kwargs={"relay": "agent"}', "--relay"),
        ("env build", 'EnvironmentSpec(..., python="3.x")', "--python 3.x"),
        ("env build", "EnvironmentSpec(..., exclude=['torch'])", "--exclude torch"),
        ("env build", "EnvironmentSpec(..., cache_dir=), or", "--cache-dir, or"),
        ("env build", 'name it with python="..."', 'name it with python="..." (in Python)'),
        ("run", 'python="/usr/bin/python3"', 'python="/usr/bin/python3" (in Python)'),  # its --python is a script
        ("run", 'connection_kwargs={"host_keys": "accept-new"}', "--accept-new-host-key"),
        ("demo", 'go on without them: on_unreachable="skip"', "go on without them: -x HOSTS"),
        ("run", "python3 -m pip install dask==2024.1 'numpy<3'", "python3 -m pip install dask==2024.1 'numpy<3'"),
        ("run", "ssh -o UserKnownHostsFile=/x host", "ssh -o UserKnownHostsFile=/x host"),
    ],
)  # fmt: skip
def test_options_as_a_command_has_them(command: str, hint: str, becomes: str, shown: Any) -> None:
    assert shown(command, hint) == becomes


def test_only_next_steps_are_changed() -> None:
    said = 'exit status 1: f(python="auto")'
    assert spelled_next_steps(said) == said
    assert spelled_next_steps(f'{said}\n  Next step: python="auto"').startswith(f"{said}\n  Next step: ")


def test_errors_that_commands_meet(shown: Any) -> None:
    hosts = [InvalidRuntimeError(name, "dns", "is not known") for name in ("a", "b")]
    assert "-x HOSTS" in shown("start dask", str(InvalidRuntimesError(hosts)))
    assert shown("expose", str(ForwardingForbiddenError("a", "no"))).endswith(
        "let our agent forward the ports: --relay"
    )


def test_each_argument_that_a_message_names_is_known_here() -> None:
    """Whoever has an error name another one thinks of what the command line has in its place."""
    named: set[str] = set()
    for path in _LIBRARY.rglob("*.py"):
        if path.relative_to(_LIBRARY).parts[0] not in _NOT_OURS:
            named |= {name for text in _messages(path) for name in _ARGUMENT.findall(text)}
    with_options = {
        "python",
        "setup",
        "environment",
        "exclude",
        "cache_dir",
        "connection_kwargs",
        "network",
        "on_unreachable",
    }
    in_python_only = {
        "address",
        "check_versions",
        "ports",
        "master_launcher",
        "worker_launcher",
        "group",
        "minimum",
        "maximum",
    }
    in_python_only |= {"master_port", "dashboard_port", "nthreads", "worker_count"}  # instead of worker_options=
    no_arguments = {"pid", "style"}  # of a repr, and of HTML
    assert named <= with_options | in_python_only | no_arguments | _EXAMPLES


def _messages(path: Path) -> list[str]:
    """Return the texts of a module that are sentences, and no documentation."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            texts.append(node.value)
    return [text for text in texts if " " in text and "<" not in text]


def test_numbers_without_their_limits_in_the_help() -> None:
    assert "x>=" not in CliRunner().invoke(cli, ["run", "--help"]).output
    for words, most in (
        (["run", "--fanout", "0", "-w", "a", "--", "b"], 1_000_000),
        (["start", "dask", "--port", "x"], 65535),
    ):
        assert f"from 1 to {most}" in str(CliRunner().invoke(cli, words).output)


def test_an_environment_that_is_none_is_told_before_anything_is_connected() -> None:
    for what in ("numpy", "not-there/requirements.txt", ""):
        done = CliRunner().invoke(cli, ["start", "dask", "-w", "nowhere.invalid", "--environment", what])
        assert done.exit_code == 2
        said = "no such file on this machine" if what.endswith(".txt") else "such as 'lazycluster env build' prints"
        assert said in done.output


def test_warnings_of_the_library_name_options_in_the_same_way(shown: Any) -> None:
    shown("start dask", "")
    text = 'skipped: host1: no\n  Next step: name it with python="/opt/python3"'
    record = logging.LogRecord("lazycluster", logging.WARNING, "", 0, "%s", (text,), None)
    assert logging.lastResort is not None
    assert logging.lastResort.format(record) == "skipped: host1: no\n  Next step: name it with --python /opt/python3"

"""The same error has the same words wherever it comes from; the words are those of the snapshot of messages."""

from __future__ import annotations

import re

import pytest
from click.testing import CliRunner

from api.snapshot import FOLDER
from lazycluster.cli.app import cli

_LINES = (FOLDER / "errors.txt").read_text().splitlines()

_INSTEAD = {
    r"holds a null|cannot contain a null": "contains a null character",
    r"whole number": "an integer",
    r"must be (?:a )?text\b(?!, count)|, or (?:a )?text such": "a string",
    r"must be >=|must not be negative": "must be at least",
    r"must be more than|must be a positive": "must be greater than",
    r"must be between": "must be from 1 to 9",
    r"exclude each other": "either x or y can be given, not both",
    r"\bsetup lines": "set-up lines",
    r"\b[Cc]orrect (?:the|it|its|that|line|what|ssh_options)\b": "fix",
    r"\(did you mean|known are": "suggestion() of core/suggestions.py",
    r"; its hosts are|a host of the group": "is not in the group, and suggestion()",
    r"\S Next step:|[^ ]\\nNext step:": "a line of its own: \\n  Next step: ",
    r"\bon this side\b": "on the manager",
    r"\b(?:gives|gave|sends|sent) no answer\b": "does not answer, did not answer within",
    r"(?<!there)(?<!that) is no (?!more|longer|room)\w": "is not a",
    r"there is no such (?:file|directory)": "no such file",
}  # fmt: skip


@pytest.mark.parametrize("other", _INSTEAD)
def test_each_error_has_one_wording(other: str) -> None:
    found = [line for line in _LINES if re.search(other, line.partition(": ")[2])]
    assert not found, f"others say {_INSTEAD[other]!r}:\n" + "\n".join(found)


_HOSTS = [["run", "true"], ["put", "/etc/hostname", "x"], ["get", "x", "y"], ["start", "dask"], ["up", "x", "dask"],
          ["ps"], ["logs", "x"], ["wait", "x"], ["cancel", "x"], ["rm", "x"], ["env", "list"], ["env", "build", "x"],
          ["env", "prune"], ["expose", "1"], ["cleanup"], ["demo"], ["list-runtimes"]]  # fmt: skip
_CONFIG = [*_HOSTS, ["forward", "x", "1"], ["doctor", "x"], ["add-runtime", "x", "y"], ["delete-runtime", "x"]]


@pytest.mark.parametrize(
    "commands, options, error",
    [
        (_HOSTS, ["-w", "a["], "'a[': a bracket has no partner"),
        (_HOSTS, ["-w", "@a"], "'@a' is not known; @all stands for all hosts of the ssh configuration"),
        (_HOSTS, ["-w", ""], "no hosts are named: the given set or file is empty"),
        (_HOSTS, ["-w", "a", "-x", "a"], "no host is left: all named hosts are excluded"),
        (_HOSTS, ["-w", "-a"], "'-a': a host's name begins with '-', which ssh would take for an option"),
        (_HOSTS, ["-w", "^/a/b"], "Invalid value: no such file: /a/b"),
        (_HOSTS, ["--hostfile", "/a/b"], "Invalid value for '--hostfile': no such file: /a/b"),
        (_HOSTS, ["--hostfile", "/"], "Invalid value for '--hostfile': / is a directory, not a file"),
        (_CONFIG, ["--config", "/"], "Invalid value for '--config': / is a directory, not a file"),
        (_CONFIG[:-2], ["--config", "/a/b"], "Invalid value for '--config': no such file: /a/b"),
        (
            _CONFIG[:-2],
            ["--user", "-a"],
            "'-a': a user's name cannot begin with '-'",
        ),
        (
            _CONFIG[:-2],
            ["--connect-timeout", "x"],
            "Invalid value for '--connect-timeout': 'x' is not a time in seconds, from 0.1 to 86400",
        ),
    ],
)
def test_all_commands_refuse_wrong_usage_in_the_same_words(
    commands: list[list[str]], options: list[str], error: str
) -> None:
    for words in commands:
        at = {"env": 2, "start": 2, "up": 3}.get(words[0], 1)
        done = CliRunner().invoke(cli, [*words[:at], *options, *words[at:]])
        assert done.exit_code == 2, (words, done.output)
        assert done.output.splitlines()[-1].endswith(error), words


def test_a_single_host_is_refused_as_a_set_of_them_is() -> None:
    for name in ("a[", "@a", "", "-a"):
        said = [CliRunner().invoke(cli, words) for words in (["forward", "--", name, "1"], ["expose", "-w", name, "1"])]
        assert [done.exit_code for done in said] == [2, 2]
        assert len({done.output.splitlines()[-1] for done in said}) == 1
    assert "'a,b' is not a single host" in CliRunner().invoke(cli, ["forward", "a,b", "1"]).output

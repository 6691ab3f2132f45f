"""Credentials in the addresses of requirements: nobody sees them, and who needs them has them."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from lazycluster import EnvironmentSpec
from lazycluster.environments.index import Credential, IndexSettings, for_git, logins_in, plain
from lazycluster.environments.plan import Target
from lazycluster.environments.resolution import resolve, settings_for, with_passwords
from lazycluster.environments.spec import hide
from lazycluster.exceptions import EnvironmentBuildError

_ADDRESS = "https://example.invalid/team/thing.git"
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def test_they_are_told_from_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "to:ken")
    line = "thing @ git+https://me:${TOKEN}@example.invalid/team/thing.git@main#subdirectory=x ; python_version > '3'"
    assert plain(line) == (
        "thing @ git+https://example.invalid/team/thing.git@main#subdirectory=x ; python_version > '3'"
    )
    assert logins_in("git+https://m%40e:p%2Fw@example.invalid/team/thing.git@v1") == [
        Credential(_ADDRESS, "m@e", "p/w")
    ]
    for same in (
        "thing @ git+ssh://git@example.invalid/thing.git",
        "thing @ https://me:s3cret@example.invalid/thing-1-py3-none-any.whl",  # uv fetches it by itself
        "thing @ git+https://example.invalid/thing.git@${TOKEN}",
        "numpy>=2 ; extra == 'a@b'",
    ):
        assert plain(same) == same


def test_they_are_not_shown() -> None:
    (login,) = logins_in("git+https://me:s3cret@example.invalid/team/thing.git")
    assert "s3cret" not in repr([login, IndexSettings(logins=(login,))])
    assert hide("https://me@work.invalid:s3cret@example.invalid/x") == "https://***@example.invalid/x"


def _answer(variables: dict[str, str], home: Path, address: str = _ADDRESS) -> str:
    env = {**os.environ, "HOME": str(home), **variables}
    done = subprocess.run(
        ["git", "credential", "fill"], input=f"url={address}\n\n", env=env, capture_output=True, text=True, check=True
    )
    return done.stdout


@needs_git
def test_git_knows_them_and_gives_them_to_nobody_else(tmp_path: Path) -> None:
    kept = tmp_path / ".git-credentials"
    kept.write_text("https://other:other@example.invalid\n")
    (tmp_path / ".gitconfig").write_text("[credential]\n\thelper = store\n")
    odd = "p $(touch x) '\"%s\\"
    known = for_git([Credential(_ADDRESS, "me", odd)], {"GIT_CONFIG_COUNT": "1", "X": "y"})
    variables = {"GIT_CONFIG_KEY_0": "user.name", "GIT_CONFIG_VALUE_0": "somebody", **known}
    assert f"username=me\npassword={odd}\n" in _answer(variables, tmp_path)
    assert "password=other\n" in _answer(variables, tmp_path, "https://example.invalid/elsewhere.git")
    assert for_git([], os.environ) == {}


@needs_git
def test_a_name_alone_may_have_a_password_that_git_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".git-credentials").write_text("https://me:known@example.invalid\n")
    (tmp_path / ".gitconfig").write_text("[credential]\n\thelper = store\n")
    told = asyncio.run(with_passwords([Credential(_ADDRESS, "me", None), Credential(_ADDRESS, "a-token", None)]))
    assert told == (Credential(_ADDRESS, "me", "known"), Credential(_ADDRESS, "a-token", None))
    assert "username=a-token\npassword=\n" in _answer(for_git(told[1:], {}), tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        '[project]\nname = "x"\ndependencies = ["y @ git+https://me:s3cret@example.invalid/y.git"]\n',
        '[tool.uv.sources]\ny = { git = "https://ghp_s3cret@example.invalid/y.git" }\n',
        '[tool.uv.sources]\ny = [{ path = "y" }, { git = "https://me:s3cret@example.invalid/y.git" }]\n',
    ],
)
def test_files_that_uv_reads_by_itself_must_have_none(tmp_path: Path, text: str) -> None:
    project = tmp_path / "pyproject.toml"
    project.write_text(text)
    included, file = tmp_path / "more.txt", tmp_path / "requirements.txt"
    included.write_text("y @ git+https://me:s3cret@example.invalid/y.git\n")
    file.write_text("-r more.txt\n")
    for source in (project, file, [str(tmp_path)]):
        with pytest.raises(EnvironmentBuildError, match="credentials in the address of https://example") as caught:
            asyncio.run(_resolved(EnvironmentSpec(source)))
        assert "s3cret" not in str(caught.value)
        assert "Next step: take them out of the address" in str(caught.value)


async def _resolved(spec: EnvironmentSpec) -> None:
    await resolve(spec, Target((3, 13), "linux", "x86_64", "glibc", "2.36"), await settings_for(spec))

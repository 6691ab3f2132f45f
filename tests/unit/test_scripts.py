"""The scripts' set-up: what it says, and what it leaves alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_TOP = Path(__file__).parents[2]


def _run(line: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a line of shell with scripts/setup-lib at hand."""
    program = f'here={_TOP}; . "$here/scripts/setup-lib"; {line}'
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    return subprocess.run(["sh", "-c", program], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", ["demo", "pin", "test"])
def test_help_sets_up_nothing(script: str, tmp_path: Path) -> None:
    environment = {**os.environ, "LAZYCLUSTER_VENV": str(tmp_path / "venv")}
    argv = [str(_TOP / "scripts" / script), "--help"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: scripts/{script}")
    assert list(tmp_path.iterdir()) == []


def test_a_stage_shows_its_output_only_if_it_fails() -> None:
    done = _run('lc_stage "Say it" echo said')
    assert (done.returncode, done.stdout) == (0, "")
    assert "-- Say it\n" in done.stderr
    assert "said" not in done.stderr.replace("Say it", "")
    done = _run("lc_stage Fail sh -c 'echo cause at https://name:secret@index.example/simple; exit 3'")
    assert done.returncode == 3
    assert "cause at <registry>" in done.stderr
    assert "secret" not in done.stderr


@pytest.mark.parametrize("kind", ["demo", "dev"])
def test_a_directory_of_somebody_else_is_left_alone(kind: str, tmp_path: Path) -> None:
    mine = tmp_path / "work"
    mine.mkdir()
    (mine / "thesis.txt").write_text("three years")
    done = _run(f"lc_environment {kind}", LAZYCLUSTER_VENV=str(mine))
    assert done.returncode == 1
    assert "was not made by these scripts: remove it, or name another in $LAZYCLUSTER_VENV" in done.stderr
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]


def test_an_environment_is_made_once(tmp_path: Path) -> None:
    """One that is up to date is not touched; that of all tests serves the demo, too."""
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "constraints").mkdir()
    (tmp_path / "constraints" / "pinned.txt").write_text("click==8.5.1\n")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "setup-lib").write_text((_TOP / "scripts" / "setup-lib").read_text())
    (tmp_path / ".venv").mkdir()
    stamp = '"$("$PYTHON" -V) $(cksum <constraints/pinned.txt)" "$(cksum <pyproject.toml)" dev'
    prepare = f'cd {tmp_path}; here={tmp_path}; . scripts/setup-lib; printf "%s\\n" {stamp} >.venv/.lazycluster; '
    variables = {"LAZYCLUSTER_VENV": ""}
    for kind in ("dev", "demo"):
        done = _run(f"{prepare} lc_environment {kind}", **variables)
        assert (done.returncode, done.stderr) == (0, ""), kind
    # Another version: it is made anew, here with a Python that makes none.
    done = _run(
        f"{prepare} echo >>constraints/pinned.txt; lc_new_environment() {{ return 7; }}; lc_environment dev",
        **variables,
    )
    assert done.returncode == 1
    assert "-- Make an environment in .venv with Python 3." in done.stderr


def test_a_python_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    done = _run("lc_environment dev", PYTHON="/bin/false", LAZYCLUSTER_VENV=str(tmp_path / "venv"))
    assert done.returncode == 1
    assert "PYTHON=/bin/false is not a Python from 3.10 to 3.14" in done.stderr
    assert list(tmp_path.iterdir()) == []

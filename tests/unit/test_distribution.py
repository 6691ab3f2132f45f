"""What is built of this project, and how its texts say that one installs it."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement

import lazycluster
from lazycluster.core import extras

_ROOT = Path(__file__).parents[2]
_NAME = f"lazycluster-{lazycluster.__version__}"
# What tests, tools, builds, editors and systems leave in a working tree, also in directories whose files do go in.
_LEFT_BEHIND = (
    ".hypothesis/examples/0123/4567",
    ".hypothesis/unicode_data/15.0/charmap.json.gz",
    ".pytest_cache/v/cache/lastfailed",
    ".pytest_cache/README.md",
    ".mypy_cache/3.13/x.data.json",
    ".ruff_cache/0.17/1",
    ".venv/bin/python",
    ".venv/lib/x.py",
    ".coverage",
    ".env",
    ".git/config",
    ".idea/workspace.xml",
    "build/lib/x.py",
    "dist/lazycluster-0.1.tar.gz",
    "htmlcov/index.html",
    "site/index.html",
    "cluster.json",
    "id_ed25519",
    "notes.txt",
    "src/lazycluster.egg-info/PKG-INFO",
    "src/lazycluster/__pycache__/x.cpython-313.pyc",
    "src/lazycluster/__pycache__/x.py",
    "src/lazycluster/.DS_Store",
    "src/lazycluster/agent/agent.py~",
    "src/lazycluster/agent/.agent.py.swp",
    "src/lazycluster/old.orig",
    "tests/.hypothesis/examples/0123/4567",
    "tests/unit/__pycache__/x.cpython-313.pyc",
    "tests/unit/.pytest_cache/README.md",
    "tests/log.txt",
    "examples/.ipynb_checkpoints/first_steps-checkpoint.ipynb",
    "examples/__pycache__/x.py",
    "examples/trials.db",
    "docs/.DS_Store",
    "docs/index.html",
    "docs/.ipynb_checkpoints/index.md",
    "scripts/__pycache__/demo.cpython-313.pyc",
    "scripts/report.xml",
    "scripts/.demo.swp",
)


def _listed(*options: str) -> list[str]:
    if not (_ROOT / ".git").exists():
        pytest.skip("not a checkout: what belongs to the project is not known")
    argv = ["git", "ls-files", "-z", "--cached", *options]
    done = subprocess.run(argv, cwd=_ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\0") if name and (_ROOT / name).is_file()]


@pytest.fixture(scope="module")
def project() -> list[str]:
    """The files of the project, those that are not committed yet included."""
    return sorted(_listed("--others", "--exclude-standard"))


@pytest.fixture(scope="module")
def built(project: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with what was built of a working tree in which a lot has been left behind."""
    folder = tmp_path_factory.mktemp("distribution")
    tree = folder / "tree"
    for name in project:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(_ROOT / name, tree / name)
    for name in _LEFT_BEHIND:
        assert name not in project
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("left behind\n")
    _build(tree, folder)
    yield folder
    shutil.rmtree(folder)


def _build(tree: Path, target: Path, *options: str) -> None:
    argv = [sys.executable, "-m", "hatchling", "build", "-d", str(target), *options]
    done = subprocess.run(argv, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def _contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


# --- what is built ---------------------------------------------------------------------------------
def test_an_sdist_holds_the_project_and_nothing_else(built: Path, project: list[str]) -> None:
    with tarfile.open(built / f"{_NAME}.tar.gz") as archive:
        members = archive.getmembers()
    assert all(member.isfile() for member in members)
    found = sorted(member.name.removeprefix(f"{_NAME}/") for member in members)
    assert found == sorted([*project, "PKG-INFO"]), "see [tool.hatch.build] in pyproject.toml"
    executable = {name for name in project if os.access(_ROOT / name, os.X_OK)}
    assert {member.name.removeprefix(f"{_NAME}/") for member in members if member.mode & 0o111} == executable


def test_a_wheel_holds_the_package_and_nothing_else(built: Path, project: list[str]) -> None:
    (wheel,) = built.glob("*.whl")
    described = {f"{_NAME}.dist-info/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")}
    described.add(f"{_NAME}.dist-info/licenses/LICENSE")
    package = {name.removeprefix("src/") for name in project if name.startswith("src/")}
    assert _contents(wheel).keys() == package | described


def test_a_wheel_of_an_sdist_is_that_of_the_checkout(built: Path, tmp_path: Path) -> None:
    with tarfile.open(built / f"{_NAME}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data") if sys.version_info >= (3, 12) else archive.extractall(tmp_path)
    _build(tmp_path / _NAME, tmp_path, "-t", "wheel")
    (wheel,), (other,) = built.glob("*.whl"), tmp_path.glob("*.whl")
    assert _contents(wheel) == _contents(other)


def test_a_wheel_works(built: Path, tmp_path: Path) -> None:
    """It has all that it needs: what it sends to hosts, too."""
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    program = (
        "import lazycluster, sys\n"
        "print(lazycluster.__file__, lazycluster.__version__)\n"
        "with lazycluster.LocalRuntime() as runtime:\n"
        "    print(runtime.call(lambda x: x + 1, 41))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"{tmp_path}/lazycluster/__init__.py", lazycluster.__version__, "42"]


@pytest.mark.filterwarnings("default")
def test_metadata_is_what_an_index_takes(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"{_NAME}.dist-info/METADATA")
    with tarfile.open(built / f"{_NAME}.tar.gz") as archive:
        information = archive.extractfile(f"{_NAME}/PKG-INFO")
        assert information is not None
        assert information.read() == text
    found = Metadata.from_email(text)  # checks everything, and refuses what it does not know
    assert found.description == (_ROOT / "README.md").read_text(encoding="utf-8")
    assert found.description_content_type == "text/markdown"
    assert found.license_expression == "Apache-2.0"


def test_the_version_is_above_that_of_the_other_project_of_this_name() -> None:
    from packaging.version import Version

    assert Version(lazycluster.__version__) > Version("0.2.4")
    heading = re.search(r"^## (\S+)", (_ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert heading is not None
    assert heading[1] == lazycluster.__version__


# --- how one installs it ---------------------------------------------------------------------------
# The words of one command, up to where a sentence goes on or the next command begins.
_WORDS = r"(?:(?!\b(?:in|of|from|for)\b)[^\n`;&|])*?"
_INSTALLS = re.compile(
    rf"(?:\b(?:pip[0-9.]*|uv|poetry|pdm|conda|mamba)\b{_WORDS}\b(?:install|add|tool run)|"
    rf"\bpipx (?:install|inject|run)|\buvx)\b{_WORDS}[ \"'\\]lazycluster(?![\w./(-])"
)
_OF_THE_INDEX = re.compile(r"(?<![\w./-])lazycluster\[[a-z]")
_TEXTS = (".md", ".py", ".ipynb", ".toml", ".yml", ".svg", ".css", "")


def _faults(text: str) -> list[str]:
    return [match[0] for pattern in (_INSTALLS, _OF_THE_INDEX) for match in pattern.finditer(text)]


def test_no_text_has_this_installed_from_an_index() -> None:
    """Package indexes have another project under this name."""
    here = str(Path(__file__).relative_to(_ROOT))
    names = [name for name in _listed() if Path(name).suffix in _TEXTS and name != here and "/fixtures/" not in name]
    texts = {name: (_ROOT / name).read_text(encoding="utf-8") for name in names}
    assert {"README.md", "docs/environments.md", "examples/dask_cluster.ipynb", "scripts/test"} <= texts.keys()
    assert {name: _faults(text) for name, text in texts.items() if _faults(text)} == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pip install lazycluster", True),
        ("`python -m pip install -U lazycluster`", True),
        ("pip3 install --upgrade 'lazycluster[dask]'", True),
        ("(`pip install 'lazycluster[dask]'`)", True),
        ('\\"pip install \\\\\\"lazycluster[dask]\\\\\\"', True),
        ("uv add lazycluster", True),
        ("uv pip install lazycluster==1.0", True),
        ("uv tool install lazycluster", True),
        ("pipx install lazycluster", True),
        ("uvx lazycluster demo", True),
        ("uv tool run lazycluster demo", True),
        ("pip install dask lazycluster", True),
        ("needs lazycluster[hyperopt]", True),
        ("pip install '.[dask]' in a checkout of lazycluster", False),
        ("pip install dist/lazycluster-1.0.0rc1-py3-none-any.whl", False),
        ("uv tool run --from dist/x.whl lazycluster --help", False),
        ("pip install -e ./lazycluster", False),
        ("pip install . && lazycluster demo", False),
        ("uv run lazycluster demo", False),
        ("lazycluster run 'pip install numpy'", False),
    ],
)
def test_texts_that_are_found(text: str, expected: bool) -> None:
    assert bool(_faults(text)) is expected


@pytest.mark.parametrize("extra", ["dask", "hyperopt", "environments"])
def test_what_an_extra_brings_can_be_installed_without_it(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(extras.install_command(extra))
    packages = [Requirement(word) for word in words[words.index("install") + 1 :] if not word.startswith("-")]
    assert {"dask": "dask", "hyperopt": "pymongo", "environments": "uv"}[extra] in {one.name for one in packages}
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else find(name))
    monkeypatch.setattr(sys, "executable", "/with space/python")
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert extras.install_command(extra).startswith("uv pip install --python '/with space/python' ")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert extras.install_command(extra).startswith("'/with space/python' -m pip install ")


def test_extras_of_sources_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    for stand_in in (requires, lambda name: None, lambda name: ["click>=8", "cloudpickle; extra == 'all'"]):
        monkeypatch.setattr(metadata, "requires", stand_in)
        assert extras.install_command("dask").endswith("install '.[dask]' in a checkout of lazycluster")

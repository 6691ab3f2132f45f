"""Code keeps the name of its file wherever it is sent, whatever the pickling library makes of it."""

from __future__ import annotations

import importlib
import inspect
import linecache
import marshal
import os
import pickle
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from direct_zygote import DirectZygote, ready_zygote

from lazycluster.agent import filenames
from lazycluster.pool.serialization import pack
from lazycluster.tasks.functions import with_source_lines
from lazycluster.tasks.pickling import dump_call

_CELL = "/tmp/ipykernel_4242/1234567890.py"  # no such file: the kernel has the text, in `linecache`
_FUNCTIONS = """\
import functools

def plain():
    raise KeyError("here")

lambda_ = lambda: {}["here"]

def nested():
    def inner():
        raise KeyError("here")
    inner()

def with_generator():
    return sum({}["here"] for _ in range(3))

class Model:
    def fit(self):
        raise KeyError("here")

method = Model().fit
partial = functools.partial(plain)

async def coroutine():
    raise KeyError("here")

def decorated(function):
    @functools.wraps(function)
    def wrapper():
        return function()
    return wrapper

wrapped = decorated(plain)
"""
_KINDS = ("plain", "lambda_", "nested", "with_generator", "method", "partial", "coroutine", "wrapped")


@pytest.fixture(scope="module")
def host() -> Iterator[DirectZygote]:
    with ready_zygote() as zygote:
        yield zygote


def _cell(source: str, file: str, space: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run code as a cell of a notebook, which is in no file."""
    monkeypatch.setitem(linecache.cache, file, (len(source), None, source.splitlines(keepends=True), file))
    exec(compile(source, file, "exec"), space)


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The namespace of a notebook in which the cell with the functions was run."""
    module = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)
    _cell(_FUNCTIONS, _CELL, module.__dict__, monkeypatch)
    return module.__dict__


def _check(traceback: str, file: str) -> None:
    """Check that frames name the file, and show the line of code that is there."""
    source = [line.strip() for line in _FUNCTIONS.splitlines()]
    found = re.findall(rf'^  File "{re.escape(file)}", line (\d+), in .*\n    (.*)$', traceback, re.MULTILINE)
    assert found, traceback
    for number, line in found:
        assert line == source[int(number) - 1]
    assert '"here"' in found[-1][1]
    assert "dynamic-code" not in traceback


@pytest.mark.parametrize("kind", _KINDS)
def test_tracebacks_show_lines_of_notebooks(host: DirectZygote, main: dict[str, Any], kind: str) -> None:
    outcome = host.run(dump_call(main[kind]))[1]
    assert outcome is not None
    assert isinstance(outcome.exception, KeyError)
    _check(outcome.traceback, _CELL)


@pytest.mark.parametrize("lock", ["", "import threading; lock = threading.Lock()\n"], ids=["by value", "as source"])
def test_tracebacks_show_lines_of_modules(
    host: DirectZygote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lock: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    name = "lc_filenames_source" if lock else "lc_filenames_value"
    text = _FUNCTIONS.replace("def plain():\n", "def plain():\n    lock\n" if lock else "def plain():\n")
    (tmp_path / f"{name}.py").write_text(lock + text)
    module = importlib.import_module(name)
    monkeypatch.setitem(sys.modules, name, module)  # and is forgotten afterwards
    outcome = host.run(dump_call(module.plain))[1]
    assert outcome is not None
    assert f'  File "{module.__file__}", line' in outcome.traceback
    assert '    raise KeyError("here")' in outcome.traceback

    def text_of(function: Any) -> str:
        return inspect.getsource(function)

    assert 'raise KeyError("here")' in host.call(text_of, module.plain)


def test_functions_that_come_back_and_go_elsewhere(host: DirectZygote, main: dict[str, Any]) -> None:
    exec("def returning():\n    return nested", main)
    function = host.call(main["returning"])
    for _ in range(2):
        function = host.call(lambda x: x, function)
    assert function is not main["nested"]
    assert function.__code__.co_filename == _CELL
    assert [code.co_filename for code in function.__code__.co_consts if isinstance(code, types.CodeType)] == [_CELL]
    outcome = host.run(dump_call(function))[1]
    assert outcome is not None
    _check(outcome.traceback, _CELL)


@pytest.mark.parametrize("folder", ["project", "site-packages"])
def test_a_host_with_another_version_of_a_file(tmp_path: Path, folder: str) -> None:
    """Code of the user's own ran as it is here; installed code as it is there."""
    path = tmp_path / folder / "fail.py"
    path.parent.mkdir()
    path.write_text("def train():\n    raise KeyError(here)\n")
    there = (
        "Traceback (most recent call last):\n"
        f'  File "{path}", line 2, in train\n    old(\n    ~~~^\n        there)\n    ^^^^^^\n'
        f'  File "{path}", line 9, in gone\n    is only there\n'
        f"  File \"{path}\", line 2, in train\nKeyError: 'x'\n    of two lines"
    )
    here = there.replace("    old(\n    ~~~^\n        there)\n    ^^^^^^\n", "    raise KeyError(here)\n")
    expected = here if folder == "project" else there
    assert with_source_lines(there) == expected.replace("KeyError: 'x'", "    raise KeyError(here)\nKeyError: 'x'")


def test_a_host_that_names_what_is_no_source(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 1 << 40)  # without blocks: it would fill the memory
    for name in (
        "/dev/zero",
        "/proc/self/maps",
        str(tmp_path),
        f"{tmp_path}/fifo",
        f"{tmp_path}/huge",
        "\0",
        "x" * 9999,
    ):
        text = f'  File "{name}", line 1, in train\nKeyError'
        assert with_source_lines(text) == text
    for number in ("0", "9" * 5000):
        text = f'  File "{__file__}", line {number}, in train\nKeyError'
        assert with_source_lines(text) == text


# --- pickles ---------------------------------------------------------------------------------------
def test_equal_code_is_pickled_to_equal_bytes(main: dict[str, Any]) -> None:
    for kind in ("nested", "method", "with_generator"):
        assert pack(main[kind]).digest == pack(main[kind]).digest
    first = filenames.dumps(main["nested"].__code__)
    compiled = compile(_FUNCTIONS, "".join(list(_CELL)), "exec")  # the name of the file is another string
    (other,) = (code for code in compiled.co_consts if getattr(code, "co_name", "") == "nested")
    assert filenames.dumps(other) == first
    alone = filenames.dumps(("/x", other))
    assert len(filenames.dumps((other.co_filename, other))) - len(alone) == len(_CELL) - len("/x")
    assert first.count(_CELL.encode()) == 1  # for the function and what is defined in it


def test_another_way_to_pickle_code(main: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The name does not depend on how the library writes code, whatever its next version does."""

    def reduce(code: types.CodeType) -> Any:
        return marshal.loads, (marshal.dumps(code.replace(co_filename="<hidden>")),)

    table = {**cloudpickle.Pickler.dispatch_table, types.CodeType: reduce}
    monkeypatch.setattr(cloudpickle.Pickler, "dispatch_table", table)
    assert pickle.loads(cloudpickle.dumps(main["plain"])).__code__.co_filename == "<hidden>"
    assert pickle.loads(filenames.dumps(main["plain"])).__code__.co_filename == _CELL


def test_readers_need_nothing_of_ours(main: dict[str, Any]) -> None:
    read = (
        "import pickle, sys; print(pickle.load(sys.stdin.buffer)().__code__.co_filename, 'lazycluster' in sys.modules)"
    )
    exec("def outer():\n    return nested", main)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", read],
        input=filenames.dumps(main["outer"]),
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode().split() == [_CELL, "False"]


@pytest.mark.parametrize("name", ["", "x", "<string>", '/a/é\n"b.py', "\udcff.py", "/" + "long/" * 5000 + "x.py"])
def test_names_of_any_kind(name: str) -> None:
    code = compile("1", "x", "eval").replace(co_filename=name)
    assert pickle.loads(filenames.dumps(code)) == code
    assert pickle.loads(filenames.dumps(code)).co_filename == name

"""Calls go by value, with all the local code that they reach, to a process that has none of it."""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib
import os
import socket
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from direct_zygote import DirectZygote, ready_zygote

from lazycluster.tasks import local_code
from lazycluster.tasks.pickling import dump_call, name_of


@pytest.fixture(scope="module")
def host() -> Iterator[DirectZygote]:
    with ready_zygote() as zygote:
        yield zygote


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes local modules: local(name=source, ...) returns the first one, imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def make(**sources: str) -> ModuleType:
        for name, source in sources.items():
            path = tmp_path / (name.replace("__", "/", 1) + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(source))
        importlib.invalidate_caches()
        return importlib.import_module(next(iter(sources)).replace("__", ".", 1))

    yield make
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def main_namespace(source: str) -> dict[str, Any]:
    """Run code as if it stood in `__main__`, as a notebook's cells do."""
    space = sys.modules["__main__"].__dict__
    exec(textwrap.dedent(source), space)
    return space


# --- functions -----------------------------------------------------------------------------------
def test_lambda_and_closure(host: DirectZygote) -> None:
    base = 40
    assert host.call(lambda: 1) == 1
    assert host.call(lambda x: base + x, 2) == 42


def test_keyword_arguments_of_any_name(host: DirectZygote) -> None:
    assert host.call(lambda **kw: kw, function=1, args=2, me=3) == {"function": 1, "args": 2, "me": 3}


def test_recursion(host: DirectZygote) -> None:
    def factorial(n: int) -> int:
        return 1 if n < 2 else n * factorial(n - 1)

    assert host.call(factorial, 10) == 3628800


def test_decorated_partial_method_and_callable_object(host: DirectZygote) -> None:
    def doubled(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any) -> Any:
            return 2 * function(*args)

        return wrapper

    class Adder:
        def __init__(self, n: int) -> None:
            self.n = n

        def add(self, x: int) -> int:
            return self.n + x

        __call__ = add

    @doubled
    def three() -> int:
        return 3

    assert host.call(three) == 6
    assert host.call(functools.partial(max, 3), 9) == 9
    assert host.call(Adder(4).add, 1) == 5
    assert host.call(Adder(4), 2) == 6
    assert host.call(sorted, [2, 1]) == [1, 2]


def test_async_function(host: DirectZygote) -> None:
    async def answer(x: int) -> int:
        import asyncio

        await asyncio.sleep(0)
        return x + 1

    assert host.call(answer, 1) == 2


def test_functions_of_main_share_its_globals(host: DirectZygote) -> None:
    space = main_namespace(
        """
        count = 5
        def bump():
            global count
            count += 1
        def bumped_twice():
            import __main__
            bump(); bump()
            return count, __main__.count
        """
    )
    assert host.call(space["bumped_twice"]) == (7, 7)
    assert space["count"] == 5


def test_cached_function_of_main(host: DirectZygote) -> None:
    space = main_namespace(
        """
        import functools
        @functools.lru_cache(maxsize=7)
        def square(x):
            return x * x
        def squares():
            return square(3), square(3), square.cache_info().hits, square.cache_parameters()["maxsize"]
        """
    )
    assert host.call(space["squares"]) == (9, 9, 1, 7)


# --- local modules -------------------------------------------------------------------------------
def test_helpers_that_use_helpers(host: DirectZygote, local: Any) -> None:
    module = local(
        lc_first="import lc_second\ndef run(x):\n    return lc_second.scaled(x)\n",
        lc_second="from lc_third import FACTOR\ndef scaled(x):\n    return FACTOR * x\n",
        lc_third="FACTOR = 3\n",
    )
    assert host.call(module.run, 5) == 15
    assert host.call(lambda: module.run(2)) == 6


def test_current_value_of_a_modules_variable_is_what_counts(host: DirectZygote, local: Any) -> None:
    module = local(lc_settings="FACTOR = 2\ndef get():\n    return FACTOR\n")
    module.FACTOR = 7
    assert host.call(module.get) == 7
    assert host.call(lambda: module.FACTOR) == 7


def test_import_inside_of_functions(host: DirectZygote, local: Any) -> None:
    module = local(
        lc_outer="""
            def loaded():
                import lc_inner
                return lc_inner.value()
            def loaded_from():
                from lc_inner import value as v
                return v()
            def method():
                class A:
                    def f(self):
                        import lc_inner as i
                        return i.value()
                return A().f()
            """,
        lc_inner="import lc_deep\ndef value():\n    return lc_deep.DEEP\n",
        lc_deep="DEEP = 'deep'\n",
    )
    assert "lc_inner" not in sys.modules
    for function in (module.loaded, module.loaded_from, module.method):
        assert host.call(function) == "deep"
    importlib.import_module("lc_inner")
    for function in (module.loaded, module.loaded_from, module.method):
        assert host.call(function) == "deep"


def test_package_with_relative_imports(host: DirectZygote, local: Any) -> None:
    module = local(
        lc_pack__work="""
            from .tools import tool
            from . import tools as everything
            def by_name():
                return tool()
            def by_module():
                return everything.tool()
            def in_body():
                from .tools import tool as t
                from . import tools
                import lc_pack.tools
                return t() + tools.tool() + lc_pack.tools.tool()
            """,
        lc_pack____init__="from . import tools\n",
        lc_pack__tools="def tool():\n    return 'tool'\n",
    )
    assert host.call(module.by_name) == "tool"
    assert host.call(module.by_module) == "tool"
    assert host.call(module.in_body) == "tool" * 3


def test_attributes_that_cannot_be_foreseen(host: DirectZygote, local: Any) -> None:
    module = local(lc_dynamic="def a():\n    return 'a'\ndef b():\n    return a() + 'b'\n")
    assert host.call(lambda name: getattr(module, name)(), "b") == "ab"
    assert host.call(lambda: getattr(module, "a")()) == "a"  # noqa: B009
    with pytest.raises(AttributeError, match="lc_dynamic"):
        host.call(lambda name: getattr(module, name), "nothing")


def test_module_that_imports_what_no_host_has(host: DirectZygote, local: Any) -> None:
    local(lc_only_here="X = 1\n")
    module = local(lc_user="import lazycluster, lc_only_here\ndef f():\n    return 8\n")
    call = dump_call(module.f)
    assert b"import lazycluster" in b"".join(call.parts)  # its source, for the case that it is needed
    assert host.call(module.f) == 8


def test_module_with_a_lock_goes_as_source(host: DirectZygote, local: Any) -> None:
    module = local(
        lc_locked="""
            import threading
            from lc_below import below
            lock = threading.Lock()
            def f():
                with lock:
                    return below()
            """,
        lc_below="def below():\n    return 'below'\n",
    )
    assert host.call(module.f) == "below"
    assert host.call(lambda: module.f() + str(module.lock.locked())) == "belowFalse"


def test_singledispatch(host: DirectZygote, local: Any) -> None:
    module = local(
        lc_dispatch="""
            import functools
            @functools.singledispatch
            def kind(x):
                return "other"
            @kind.register
            def _(x: int):
                return "int"
            """
    )
    assert host.call(module.kind, 1) == "int"
    assert host.call(lambda: module.kind("")) == "other"


def test_classes_keep_their_identity_both_ways(host: DirectZygote, local: Any) -> None:
    module = local(
        lc_classes="""
            import dataclasses, enum
            @dataclasses.dataclass
            class Point:
                x: int
                def moved(self):
                    return Point(self.x + 1)
            class Colour(enum.Enum):
                RED = 1
            class OwnError(Exception):
                pass
            def move(p):
                assert isinstance(p, Point) and type(p.moved()) is Point
                import pickle
                return pickle.loads(pickle.dumps(p.moved())), Colour.RED
            def fail():
                raise OwnError("own")
            """
    )
    moves = module.Point.moved
    point, colour = host.call(module.move, module.Point(1))
    assert type(point) is module.Point
    assert point == module.Point(2)
    assert colour is module.Colour.RED
    assert module.Point.moved is moves
    with pytest.raises(module.OwnError, match="own"):
        host.call(module.fail)


def test_classes_of_functions_come_back_as_they_were(host: DirectZygote) -> None:
    @dataclasses.dataclass
    class Result:
        value: int

    class Level(enum.IntEnum):
        LOW = 1

    result, level = host.call(lambda: (Result(3), Level.LOW))
    assert type(result) is Result
    assert level is Level.LOW


def test_exception_group_and_notes(host: DirectZygote) -> None:
    def fail() -> None:
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise ValueError("outer") from error

    outcome = host.run(dump_call(fail))[1]
    assert isinstance(outcome.exception, ValueError)
    assert "KeyError: 'inner'" in outcome.traceback
    assert "direct cause" in outcome.traceback
    assert "call_process" not in outcome.traceback
    assert 'raise KeyError("inner")' in outcome.traceback  # the line of code, which only the manager has


def test_multiprocessing_in_a_function(host: DirectZygote, local: Any) -> None:
    module = local(
        lc_pool="""
            import multiprocessing
            def square(x):
                return x * x
            def squares():
                with multiprocessing.get_context("fork").Pool(2) as pool:
                    return pool.map(square, [1, 2, 3])
            """
    )
    assert host.call(module.squares) == [1, 4, 9]


def test_nothing_installed_goes_by_value() -> None:
    import json

    import numpy

    size = dump_call(lambda: (json.dumps({}), numpy.zeros(1), pytest.raises)).size
    assert size < 3000


# --- arguments -----------------------------------------------------------------------------------
def test_arguments_are_copied_at_once() -> None:
    import numpy

    array = numpy.zeros(1_000_000)
    call = dump_call(lambda a: a, (array,))
    before = b"".join(call.parts)
    array += 1
    assert b"".join(call.parts) == before


def test_arrays_of_every_order(host: DirectZygote) -> None:
    import numpy

    matrix = numpy.arange(300_000).reshape(500, 600)
    for array in (matrix, numpy.asfortranarray(matrix), matrix[::2, ::3], matrix.T):
        result = host.call(lambda a: a * 2, array)
        assert (result == array * 2).all()
        assert result.flags.writeable


class Holder:
    def __init__(self, inner: Any) -> None:
        self.inner = inner


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (threading.Lock, ["argument 'config' of ", "config['a'][1].inner is a _thread.lock", "make it in"]),
        (lambda: (x for x in ()), ["generator", "pass a list"]),
        (lambda: open(os.devnull), ["TextIOWrapper", "pass the path"]),  # noqa: SIM115
        (lambda: socket.socket(), ["socket.socket", "connect in the function"]),
        (lambda: threading.Thread(), ["threading.Thread"]),
    ],
)
def test_what_cannot_be_sent_is_named(make: Any, words: list[str]) -> None:
    def f(config: Any) -> None:
        pass

    thing = make()
    try:
        with pytest.raises(TypeError) as caught:
            dump_call(f, (), {"config": {"a": [1, Holder(thing)]}})
    finally:
        if hasattr(thing, "close"):
            thing.close()
    message = str(caught.value)
    for word in words:
        assert word in message, message


def test_a_global_that_cannot_be_sent_is_named() -> None:
    space = main_namespace("import threading\nguard = threading.Lock()\ndef guarded():\n    return guard.locked()\n")
    with pytest.raises(TypeError, match=r"guarded\(\).*global variable 'guard'.*_thread.lock"):
        dump_call(space["guarded"])


def test_closure_variable_that_cannot_be_sent_is_named() -> None:
    guard = threading.Lock()
    with pytest.raises(TypeError, match=r"variable 'guard' of the enclosing function"):
        dump_call(lambda: guard)


def test_no_function() -> None:
    with pytest.raises(TypeError, match="is not a function"):
        dump_call(3)  # type: ignore[arg-type]


def test_names() -> None:
    assert name_of(functools.partial(test_names)) == "test_names"
    assert name_of(Holder(1)) == "Holder"
    assert name_of(lambda: 1) == "test_names.<lambda>"


def test_functions_that_set_up_their_imports_want_a_clean_process() -> None:
    def careful() -> None:
        import os

        os.environ["OMP_NUM_THREADS"] = "1"
        import numpy  # noqa: F401

    def plain() -> None:
        import numpy  # noqa: F401

    assert dump_call(careful).fresh
    assert not dump_call(plain).fresh
    assert "numpy" in dump_call(plain).imports


class Rude:
    """Raises whatever one wants to know of it."""

    def __repr__(self):
        raise RuntimeError("no name")

    def __reduce_ex__(self, protocol):
        raise RuntimeError("not to be sent")

    @property
    def __dict__(self):
        raise RuntimeError("no attributes")


def test_what_cannot_even_be_shown_is_told_of_all_the_same():
    for argument in (Rude(), [Rude()], {Rude(): threading.Lock()}):
        with pytest.raises(TypeError, match=r"len\(\) cannot be sent to a host"):
            dump_call(len, (argument,))
    with pytest.raises(TypeError, match="a Rude is not a function"):
        dump_call(Rude())
    with pytest.raises(TypeError) as caught:
        dump_call(len, ({"k" * 1_000_000: threading.Lock()},))
    assert len(str(caught.value)) < 1000


# --- what hosts have installed -------------------------------------------------------------------
def test_parts_of_a_namespace_that_are_installed_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A namespace has parts of several distributions: one is local here, the other is installed there."""
    mine, site = tmp_path / "checkout", tmp_path / "site-packages"
    own_text = """
        from some_space import other

        def value():
            return other.VALUE

        def late():
            import some_space.more
            return some_space.more.VALUE, some_space.__name__
    """
    files = ((mine, "own", textwrap.dedent(own_text)), (site, "other", "VALUE = 'installed'\n"))
    for folder, name, text in (*files, (site, "more", "VALUE = 'more'\n")):
        (folder / "some_space").mkdir(parents=True, exist_ok=True)
        (folder / "some_space" / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(str(folder))
    own: Any = importlib.import_module("some_space.own")
    try:
        with DirectZygote(env={**os.environ, "PYTHONPATH": str(site)}) as zygote:
            assert zygote.facts().get("ready")
            zygote.give_library()
            for _ in range(2):
                assert zygote.call(own.value) == "installed"
                assert zygote.call(own.late) == ("more", "some_space")
    finally:
        for name in [name for name in sys.modules if name.startswith("some_space")]:
            del sys.modules[name]


def test_a_module_that_is_named_like_one_of_the_standard_library(host: DirectZygote, local: Any) -> None:
    """Also like a package of it, which has data and submodules of its own."""
    local(
        turtledemo__paths="def here():\n    return __file__\n",
        turtledemo____init__="from . import paths\n\n\ndef where():\n    return paths.here(), __file__, __path__\n",
    )
    module: Any = sys.modules["turtledemo"]
    here, file, path = host.call(module.where)
    assert here == str(Path(module.__file__).with_name("paths.py"))
    assert (file, path) == (module.__file__, [str(Path(module.__file__).parent)])  # this is the same machine
    call = dump_call(module.where)
    Path(module.__file__).write_text("# of another version\n")
    outcome = host.run(call)[1]
    assert outcome is not None
    assert outcome.value[2] == []


def test_names_of_projects(tmp_path: Path) -> None:
    folder = tmp_path / "src" / "package"
    folder.mkdir(parents=True)
    expected = {
        "": "",
        '[build-system]\nname = "no"\n[project]\nversion = "1"\n# name = "no"\nname = "the-name"\n': "the-name",
        "[tool.poetry]\nname = 'of-poetry'\n": "of-poetry",
        "[project]\ndynamic = []\n[tool.other]\nname = 'no'\n": "",
    }
    for text, name in expected.items():
        (tmp_path / "pyproject.toml").write_text(text)
        local_code.distribution_of.cache_clear()
        assert local_code.distribution_of(str(folder)) == name
    (tmp_path / "setup.cfg").write_text("[metadata]\nversion = 1\nname = of-setup-cfg\n")
    local_code.distribution_of.cache_clear()
    assert local_code.distribution_of(str(folder)) == "of-setup-cfg"
    (tmp_path / "src" / "egg.egg-info").mkdir()
    local_code.distribution_of.cache_clear()
    assert local_code.distribution_of(str(folder)) == "egg"


class _Unwilling:
    def __reduce__(self) -> Any:
        raise LookupError("not me")


def test_the_error_of_code_of_others_is_the_cause_and_no_other_one_is() -> None:
    with pytest.raises(TypeError, match=r"cannot be sent to a host: it is a _thread\.lock") as caught:
        dump_call(len, (threading.Lock(),))
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    with pytest.raises(TypeError, match="not me") as caught:
        dump_call(len, (_Unwilling(),))
    assert isinstance(caught.value.__cause__, LookupError)

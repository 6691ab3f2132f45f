"""Interpreters whose modules have no bytecode and may not get any: it is kept for the user."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from lazycluster import Runtime
from lazycluster.core import event_loop

_PREFIX = "/tmp/of-root"
_LIBRARY = f"{_PREFIX}/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
_PYC = f"{_LIBRARY}/package/__pycache__/__init__.{sys.implementation.cache_tag}.pyc"
_CACHES = "~/.cache/lazycluster/bytecode"


@pytest.fixture
def host(make_hosts: Any) -> Iterator[Any]:
    """A host with an interpreter of root's, one of whose packages was not compiled."""
    host = make_hosts(1)[0]
    host.run(f"{sys.base_prefix}/bin/python3 -m venv --without-pip {_PREFIX}")
    host.run(f"mkdir {_LIBRARY}/package && echo 'VALUE = 1' >{_LIBRARY}/package/__init__.py")
    yield host
    host.run(f"rm -rf {_PREFIX}")


@contextlib.contextmanager
def _connected(host: Any) -> Iterator[Runtime]:
    settings = {"config_file": host._pool.config_file}
    with Runtime(host.name, connection_kwargs=settings, python=f"{_PREFIX}/bin/python") as runtime:
        yield runtime


def _value() -> int:
    import package  # type: ignore[import-not-found]

    value: int = package.VALUE
    return value


def _told(runtime: Runtime) -> dict[str, Any]:
    asking = runtime._connection.request("packages", python=f"{_PREFIX}/bin/python", env={}, names=[])
    told: dict[str, Any] = event_loop.run(asking)["bytecode"]
    return told


def _caches(host: Any) -> list[str]:
    listed: str = host.run(f"ls -d {_CACHES}/* 2>/dev/null; true", user=host.user).stdout
    return listed.split()


def test_what_was_compiled_once_is_used_again(host: Any) -> None:
    with _connected(host) as runtime:
        told = _told(runtime)
        assert runtime.call(_value) == 1
    assert told["lacking"] == [_LIBRARY]
    assert told["problem"] == ""
    (cache,) = _caches(host)
    assert told["cache"] == cache
    # What is run is what is kept: the cache gets the code of another source of the same size and time.
    change = f"touch -r {_LIBRARY}/package/__init__.py ~/other.py"
    compiled = f'{sys.base_prefix}/bin/python3 -c \'import py_compile; py_compile.compile("other.py", "other.pyc")\''
    host.run(
        f"cd ~ && echo 'VALUE = 2' >other.py && {change} && {compiled} && cp other.pyc {cache}{_PYC}", user=host.user
    )
    with _connected(host) as runtime:
        assert runtime.call(_value) == 2
    # Another version, even one with the same size and time, has a cache of its own.
    host.run(f"mkdir {_LIBRARY}/package-2.dist-info")
    with _connected(host) as runtime:
        assert runtime.call(_value) == 1
    assert len(_caches(host)) == 2


def test_where_it_is_not_needed_there_is_none(host: Any) -> None:
    host.run(f"{_PREFIX}/bin/python3 -m compileall -q {_LIBRARY}")
    with _connected(host) as runtime:
        assert _told(runtime) == {"lacking": [], "cache": "", "problem": ""}
        assert runtime.call(_value) == 1
    assert _caches(host) == []


def test_a_place_that_others_can_write_to_is_not_used(host: Any) -> None:
    host.run(f"mkdir -p {_CACHES} && chmod 755 ~ && chmod 777 {_CACHES}", user=host.user)
    with _connected(host) as runtime:
        told = _told(runtime)
        assert runtime.call(_value) == 1
    assert told["cache"] == ""
    assert "everybody may write to it" in told["problem"]
    found = host.run(f"find {_CACHES} -name '*.pyc'", user=host.user)
    assert found.stdout == ""


def test_caches_used_longest_ago_go(host: Any) -> None:
    host.run(f"mkdir -p {_CACHES} && cd {_CACHES} && mkdir 1 2 3 4 5 && touch -d 2001-01-01 1 2", user=host.user)
    with _connected(host) as runtime:
        told = _told(runtime)
    names = {path.rpartition("/")[2] for path in _caches(host)}
    assert names == {"3", "4", "5", told["cache"].rpartition("/")[2]}


def test_environments_can_be_made_beside_it(host: Any) -> None:
    with _connected(host) as runtime:
        runtime.call(_value)
        answer = event_loop.run(runtime._connection.request("environment", action="list"))
    assert answer["environments"] == []

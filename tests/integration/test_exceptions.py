"""Exceptions and objects of the user's own classes come back from hosts, which have nothing of this library."""

from __future__ import annotations

from typing import Any

import pytest
from cluster_groups import ssh_group

from lazycluster.exceptions import RemoteTraceback, TaskExecutionError


class _TwoArgumentsError(Exception):
    def __init__(self, place: str, number: int) -> None:
        super().__init__(f"{place}-{number}")
        self.number = number


class _KeywordError(Exception):
    def __init__(self, *, number: int) -> None:
        super().__init__(f"number {number}")
        self.number = number


class _DefaultError(Exception):
    def __init__(self, place: str, number: int = 0) -> None:
        super().__init__(f"{place}-{number}")
        self.number = number


def _raising(kind: type[Exception], **arguments: Any) -> None:
    raise kind(**arguments)


@pytest.mark.parametrize(
    ("kind", "arguments", "text"),
    [
        (_TwoArgumentsError, {"place": "a", "number": 5}, "a-5"),
        (_KeywordError, {"number": 5}, "number 5"),
        (_DefaultError, {"place": "a", "number": 5}, "a-5"),
    ],
)
def test_exceptions_come_back_whatever_their_class_takes(
    kind: type[Exception], arguments: dict[str, Any], text: str, hosts: Any
) -> None:
    """On hosts that have nothing of this library; from an executor, from `map`, and as the cause from `call`."""
    with ssh_group(hosts) as group:
        with group.executor(max_workers=1) as executor:
            error = executor.submit(_raising, kind, **arguments).exception(timeout=60)
        assert type(error) is kind
        assert (str(error), error.number, error.args) == (text, 5, (text,))
        assert isinstance(error.__cause__, RemoteTraceback)
        with pytest.raises(kind, match=text) as caught:
            list(group.map(lambda _: _raising(kind, **arguments), [1]))
        assert isinstance(caught.value.__cause__, RemoteTraceback)
        with pytest.raises(TaskExecutionError, match=text) as failed:
            group.runtimes[0].call(_raising, kind, **arguments)
        assert type(failed.value.__cause__) is kind
        assert str(failed.value.__cause__) == text


def test_what_is_built_in_comes_back_as_it_was(hosts: Any) -> None:
    def collect() -> list[BaseException]:
        own = type("Own", (OSError,), {})
        return [UnicodeDecodeError("utf-8", b"x", 0, 1, "why"), KeyError("k"), own(2, "no", "f"), StopIteration(3)]

    with ssh_group(hosts) as group:
        decode, key, own, stop = group.runtimes[0].call(collect)
    assert (decode.reason, decode.object, key.args, own.filename, stop.value) == ("why", b"x", ("k",), "f", 3)


class _Own:
    def __init__(self, value: int) -> None:
        self.value = value


def test_objects_of_own_classes_come_back(hosts: Any) -> None:
    with ssh_group(hosts) as group:
        found = group.runtimes[0].call(_Own, 3)
        mapped = list(group.map(_Own, [4]))
    assert [type(one) for one in (found, *mapped)] == [_Own, _Own]
    assert (found.value, mapped[0].value) == (3, 4)

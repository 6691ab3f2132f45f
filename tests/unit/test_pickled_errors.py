"""Errors between processes, and from earlier versions."""

from __future__ import annotations

import base64
import copy
import importlib
import json
import pickle
import pkgutil

import pytest
from errors_of_each_kind import ERRORS, FILE, described

import lazycluster
from lazycluster.exceptions import LazyclusterError


def _kinds(kind: type[LazyclusterError]) -> set[type[LazyclusterError]]:
    return {kind}.union(*(_kinds(one) for one in kind.__subclasses__()))


def test_there_is_one_of_each_kind() -> None:
    for module in pkgutil.walk_packages(lazycluster.__path__, "lazycluster."):
        if module.name.split(".")[-1] in ("exceptions", "errors", "mux", "transfer"):
            importlib.import_module(module.name)
    ours = {kind for kind in _kinds(LazyclusterError) if kind.__module__.startswith("lazycluster.")}
    assert ours == {type(error) for error in ERRORS}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_that_is_pickled_or_copied_is_the_same(error: LazyclusterError) -> None:
    again = [pickle.loads(pickle.dumps(error, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for same in [*again, copy.copy(error), copy.deepcopy(error)]:
        assert described(same) == described(error)
        assert same.args == error.args


@pytest.mark.parametrize("kept", json.loads(FILE.read_text()), ids=lambda kept: kept[1]["type"])
def test_what_an_earlier_version_has_pickled_is_read(kept: tuple[str, dict[str, str]]) -> None:
    assert described(pickle.loads(base64.b64decode(kept[0]))) == kept[1]


def test_an_error_of_a_user_is_pickled_whatever_its_constructor_takes() -> None:
    error = OwnError("host-1", extra=5)
    error.noted = ["later"]
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.extra, again.noted) == ("on host-1", 5, ["later"])


class OwnError(LazyclusterError):
    noted: list[str]

    def __init__(self, host: str, *, extra: int) -> None:
        self.extra = extra
        super().__init__(f"on {host}")

"""Sets of hosts as they are written on a command line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazycluster.cli.hostsets import HostSetError, expand, fold, from_lines, match


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        (" , ,", []),
        ("a,b,a", ["a", "b"]),
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("node[08-10]", ["node08", "node09", "node10"]),
        ("node[8-10]", ["node8", "node9", "node10"]),
        ("n[1,3,5-9/2]", ["n1", "n3", "n5", "n7", "n9"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("me@node[1-2]:2222", ["me@node1:2222", "me@node2:2222"]),
        ("gpu{a,b},x{1..3}", ["gpua", "gpub", "x1", "x2", "x3"]),
        ("{a,b{1,2}}", ["a", "b1", "b2"]),
        ("me@[::1]:22", ["me@[::1]:22"]),
        ("gpu-*,[ab]1", ["gpu-*", "[ab]1"]),
        ("node[1-3].lab.org", ["node1.lab.org", "node2.lab.org", "node3.lab.org"]),
    ],
)
def test_expand(text: str, names: list[str]) -> None:
    assert expand(text) == names


@pytest.mark.parametrize(
    "text", ["n[3-1]", "n[1", "n1]", "n{a", "n[1-999999999]", "n[1-5/0]", "n[-]", "a[1-999]b[1-999]c[1-9]"]
)
def test_nonsense(text: str) -> None:
    with pytest.raises(HostSetError):
        expand(text)


def test_match() -> None:
    known = ["node1", "node2", "gpu-a", "gpu-b"]
    assert match(["gpu-*", "other"], known) == ["gpu-a", "gpu-b", "other"]
    assert match(["@all"], known) == known
    assert match(["[gn]*-a"], known) == ["gpu-a"]
    with pytest.raises(HostSetError, match=r"node\[1-2\],gpu-a,gpu-b"):
        match(["x*"], known)
    with pytest.raises(HostSetError, match="@all"):
        match(["@gpus"], known)


def test_lines() -> None:
    assert from_lines("a b # c\n\n# all of it\nnode[1-2],c\n") == ["a", "b", "node1", "node2", "c"]


@given(
    st.lists(
        st.builds(
            "{}{}{}".format,
            st.sampled_from(["n", "node", "r1-"]),
            st.integers(0, 200),
            st.sampled_from(["", ".lab", "-x"]),
        )
    )
)
def test_fold_and_expand_are_inverse(names: list[str]) -> None:
    assert sorted(expand(fold(names))) == sorted(set(names))


@given(st.lists(st.integers(0, 99).map("{:02d}".format).map("node{}".format), min_size=1))
def test_fold_keeps_zeros(names: list[str]) -> None:
    assert sorted(expand(fold(names))) == sorted(set(names))

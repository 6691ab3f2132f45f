"""Sets of hosts as they are written on a command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazycluster.cli.options import fold, from_lines, match, targets, without
from lazycluster.core.hostsets import HostSetError, expand, fits
from lazycluster.group.settings import read_settings
from lazycluster.ssh.destination import parse_destination


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
        # blanks as in ClusterShell
        ("n[1, 12]", ["n1", "n12"]),
        ("n[1 - 3]", ["n1", "n2", "n3"]),
        ("n[ 01 - 05 / 2 , 9 ] , m", ["n01", "n03", "n05", "n9", "m"]),
        ("n[1,\t2],\n m", ["n1", "n2", "m"]),
        # ranges as in bash
        ("n{3..1}", ["n3", "n2", "n1"]),
        ("n{10..1..3}", ["n10", "n7", "n4", "n1"]),
        ("n{1..10..-3}", ["n1", "n4", "n7", "n10"]),
        ("n{9..011}", ["n009", "n010", "n011"]),
        ("n{01..3}", ["n01", "n02", "n03"]),
        ("n{1..3..0}", ["n1", "n2", "n3"]),
        ("n{-1..1}", ["n-1", "n0", "n1"]),
        ("n{-01..1}", ["n-01", "n000", "n001"]),
        ("n{05..-1..3}", ["n05", "n02", "n-1"]),
        ("n{-0..1}", ["n0", "n1"]),
        ("n{a..c}", ["na", "nb", "nc"]),
        ("n{E..A..2}", ["nE", "nC", "nA"]),
        ("n{a,}", ["na", "n"]),
        ("{,a}", ["a"]),
        ("{{1..2},x}y", ["1y", "2y", "xy"]),
        ("{n[1-2],m}{a,b}", ["n1a", "n1b", "n2a", "n2b", "ma", "mb"]),
        # patterns
        ("n[!1]", ["n[!1]"]),
        ("n[a-c0-9_]?", ["n[a-c0-9_]?"]),
        ("{gpu-*,cpu[ab]}[1-2]", ["gpu-*1", "gpu-*2", "cpu[ab]1", "cpu[ab]2"]),
        # addresses
        ("[::1],ssh://me@[fe80::1%eth0]:22,::1", ["[::1]", "ssh://me@[fe80::1%eth0]:22", "::1"]),
    ],
)
def test_expand(text: str, names: list[str]) -> None:
    assert expand(text) == names


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        *((text, "has no partner") for text in ("n[1", "n1]", "n{a", "n{a,b", "n}", "n{a,b}}", "a]b[", "n{1..2")),
        *((text, "empty range") for text in ("n[3-1]", "n[1-5/0]")),
        *((text, "a range is written") for text in ("n[-]", "n[1-3,]", "n[,1]", "n[1 2]", "n[1--3]", "n[-1]", "n[/2]")),
        *((text, "same length") for text in ("n[1-010]", "n[01-100]", "n[9-011]")),
        ("n[^1]", "[!1]"),
        ("n[a,b]", "{a,b}"),
        *((text, "brackets hold") for text in ("n[]", "n[ ]", "n[c-a]", "n[a-]", "n[1*]", "n[a b]", "n[!]", "n[a:b]")),
        *((text, "brackets hold") for text in ("n[\u0661-\u0663]", "n[1;ls]", "n[$HOME]", "n[::1]")),
        *((text, "cannot hold brackets") for text in ("n[[1]]", "{[}]")),
        *((text, "braces hold words") for text in ("n{a}", "n{}", "n{1-3}")),
        *(
            (text, "a range is written")
            for text in ("n{a..3}", "n{1..}", "n{1...3}", "n{1..2..3..4}", "n{A..c}", "{..}")
        ),
        *((text, "braces of its own") for text in ("n{1..2,3}", "n{1,2..3}")),
        *((text, "braces hold no blanks") for text in ("n{a, b}", "n{1 .. 3}", "n{a b,c}")),
        *((text, "commas between") for text in ("a b", "n [1-2]", "n[1-2] m", "a\tb", "a\nb")),
        *((text, "-x") for text in ("a&b", "a!b", "a^b", "n[1-3]!n2", "&a", "a!")),
        ("a,^hosts.txt", "^FILE"),
        *((text, "begins with '-'") for text in ("-a", "a,-oProxyCommand=touch x", "-[1-2]")),
    ],
)
def test_neither_a_set_nor_a_pattern(text: str, hint: str) -> None:
    with pytest.raises(HostSetError) as caught:
        expand(text)
    assert hint in str(caught.value).partition(": ")[2]


@pytest.mark.parametrize(
    "text",
    [
        "n[1-999999999]",
        "a[1-999]b[1-999]c[1-9]",
        "{a,a}" * 26,
        "{" * 2000 + "a" + "}" * 2000,
        "{a," * 2000 + "a" + "}" * 2000,
        "[" * 2000,
        "x" * 10**6 + "{1..99999}",
        "n[1]" * 10**5,
        "n[" + "1-99999," * 10**4 + "1]",
        "n{" + "{1..99999}," * 10**3 + "a}",
        "n{1..999999999999}",
        "n[" + "9" * 5000 + "]",
        "n{1.." + "9" * 5000 + "}",
        "n{0..1.." + "9" * 5000 + "}",
        "{1..60000},{1..60000}a,b",
    ],
)
def test_too_much_is_refused_at_once(text: str) -> None:
    """Without the time, the memory or the recursion that it would take; and the error does not repeat it all."""
    with pytest.raises(HostSetError) as caught:
        expand(text)
    assert len(str(caught.value)) < 200


def test_what_is_many_but_not_too_many() -> None:
    assert len(expand("n[1-100000]")) == 100_000
    assert expand("n" + "[1]" * 1000) == ["n" + "1" * 1000]
    assert len(expand("{a,b}" * 16)) == 2**16


@given(st.text("na01,-[]{}./! ^*", max_size=20))
def test_any_text_is_refused_or_stands_for_names(text: str) -> None:
    """What is left in a name beside a pattern's own characters is what a host's name may have."""
    try:
        names = expand(text)
    except HostSetError:
        return
    assert all(name and not set(name) & set("{}, ^") for name in names)


def test_match() -> None:
    known = ["node1", "node2", "gpu-a", "gpu-b"]
    assert match(["gpu-*", "other"], known) == ["gpu-a", "gpu-b", "other"]
    assert match(["@all"], known) == known
    assert match(["[gn]*-a"], known) == ["gpu-a"]
    with pytest.raises(HostSetError, match=r"node\[1-2\],gpu-a,gpu-b"):
        match(["x*"], known)
    with pytest.raises(HostSetError, match="@all"):
        match(["@gpus"], known)
    with pytest.raises(HostSetError, match="says the user"):
        match(["me@gpu-*"], known)
    for name in ("-oProxyCommand=x", "a;b", "a:b", "me@", "a$b"):
        with pytest.raises(HostSetError):
            match([name], known)


@pytest.mark.parametrize(
    ("named", "excluded", "left"),
    [
        ("n[1-3]", "n[1, 3]", ["n2"]),
        ("n[1-3]", "n*", []),  # also hosts that the configuration does not know
        ("n[1-3],me@n1:22,[::1]:22", "n1,::1", ["n2", "n3"]),
        ("n1,me@n1", "me@n1", ["n1"]),
        ("@all", "gpu-*", ["node1"]),
        ("n1", "@all", ["n1"]),
        ("n1", "other", ["n1"]),
    ],
)
def test_without(named: str, excluded: str, left: list[str]) -> None:
    known = ["node1", "gpu-a", "gpu-b"]
    assert without(match(expand(named), known), expand(excluded), known) == left


def test_what_is_meant_in_python() -> None:
    known = ["n1", "n2", "n3", "n12", "n13", "gpu-a"]
    for text, names in {
        "n1": ["n1"],
        "n[1, 12]": ["n1", "n12"],
        "n[1-3]": ["n1", "n2", "n3"],
        "n[12-13]": ["n12", "n13"],
        "n[13]": ["n1", "n3"],
        "n?": ["n1", "n2", "n3"],
        "gpu-*,n{2..1}": ["n1", "n2", "gpu-a"],
    }.items():
        assert [host for host in known if fits(host, text)] == names
    for text in ("n[^1]", "n[1,a]", "n[13],gpu-a", "n[13]x[1-2]", "a!b", "{a,a}" * 26):
        with pytest.raises(HostSetError):
            fits("n1", text)
    assert fits("[::1]:22", "[::1]:22")


def test_lines() -> None:
    assert from_lines("n[1, 12] , m # x\nn[1 - 2]") == ["n1", "n12", "m", "n2"]
    with pytest.raises(HostSetError, match="partner"):
        from_lines("n[1,\n2]")
    with pytest.raises(HostSetError, match="more than"):
        from_lines("a[1-60000]\nb[1-60000]")
    assert from_lines("a b # c\n\n# all of it\nnode[1-2],c\n") == ["a", "b", "node1", "node2", "c"]


@pytest.mark.parametrize("blank", ["\xa0", "\x0b", "\x0c", "\x85", "\u2028", "\u2003", "\ufeff"])
def test_what_only_looks_like_a_blank_is_refused(blank: str) -> None:
    """Taken for one, it would turn a comment into hosts, or a name into two."""
    assert from_lines(f"a # b{blank}c\n") == ["a"]
    for text in (f"a{blank}b", f"a,{blank}b"):
        with pytest.raises(HostSetError, match="is not a host"):
            match(from_lines(text), [])
    with pytest.raises(HostSetError):
        expand(f"n[1,{blank}2]")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_files_of_other_systems(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "hosts"
    file.write_bytes("n[1-2]\r\n# \xe9\r\nn3\r\n".encode(encoding))
    assert targets([f"^{file}"], [], None, "/dev/null", None, False).names == ["n1", "n2", "n3"]
    with file.open("rb") as opened:
        assert targets([], [], opened, "/dev/null", None, False).names == ["n1", "n2", "n3"]


def test_settings_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "hosts.toml"
    file.write_text('[n1]\npython = "auto"\n', encoding="utf-8-sig")
    assert read_settings(file) == {"n1": {"python": "auto"}}


def test_slots_of_mpi(capsys: pytest.CaptureFixture[str]) -> None:
    assert from_lines("n1 slots=4 max_slots=8\nn2  slots=2\t# n3\nn[4-5] max-slots=1\n") == ["n1", "n2", "n4", "n5"]
    assert capsys.readouterr().err == "Note: slots= in a file with hosts is for MPI, and not used here.\n"
    for text in ("n1 slots=many", "n1 cpu=4", "n1 slots=4x"):
        with pytest.raises(HostSetError, match="slots=N"):
            from_lines(text)


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


@pytest.mark.parametrize("name", ["n" + "9" * 5000, "n" + "0" * 40 + "1", "n\u0661", "n" + "1" * 18 + "2"])
def test_fold_leaves_strange_names_as_they_are(name: str) -> None:
    assert fold([name]) == name


@pytest.mark.parametrize("name", ["n[1-2]", "me@n[1-2]:22", "n[1", "n^1"])
def test_a_set_is_no_name(name: str) -> None:
    """Where one host is named, as in `Runtime`, ssh would look for a host of that name."""
    with pytest.raises(ValueError, match="is not a host"):
        parse_destination(name)

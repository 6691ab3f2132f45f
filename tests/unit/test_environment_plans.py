"""What hosts and indexes say, before names on the manager are made of it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lazycluster import EnvironmentSpec
from lazycluster.environments.activation import HostEnvironment
from lazycluster.environments.build import BuildHost
from lazycluster.environments.plan import LockedPackage, Target
from lazycluster.exceptions import EnvironmentBuildError

_FACTS = {"system": "linux", "machine": "x86_64", "libc": ["glibc", "2.36"]}
_EVIL = ["", "../../x", "/etc/x", "..", "-x", "a b", "x\n", "x\0", "é", "x" * 300, "$(x)", "--find-links=x", "x\x1b[2J"]


@pytest.mark.parametrize(
    ("changed", "platform"),
    [
        ({}, "x86_64-manylinux_2_36"),
        ({"machine": "armv7l"}, "armv7l-manylinux_2_36"),
        ({"machine": "arm64", "libc": ["musl", ""]}, "aarch64-unknown-linux-musl"),
        ({"libc": ["glibc", "2.31.9000-rc1"]}, "x86_64-manylinux_2_31"),
        ({"system": "darwin", "machine": "arm64", "libc": ["musl", ""]}, "aarch64-apple-darwin"),
    ],
)
def test_platforms(changed: dict[str, Any], platform: str) -> None:
    assert Target.of((3, 13), {**_FACTS, **changed}).platform == platform


@pytest.mark.parametrize("evil", _EVIL)
@pytest.mark.parametrize("what", ["system", "machine", "libc", "libc version"])
def test_a_platform_that_cannot_be_is_an_error(evil: str, what: str) -> None:
    """It would be a part of paths on the manager, and of uv's arguments."""
    libc = {"libc": [evil, "2.36"], "libc version": ["glibc", evil]}.get(what, _FACTS["libc"])
    facts = {**_FACTS, "libc": libc, **({what: evil} if what in _FACTS else {})}
    if (what, evil) == ("libc version", ""):
        return  # as musl has it

    class Host:
        async def request(self, op: str, **params: Any) -> dict[str, Any]:
            return facts

    place = BuildHost("host1", Host())  # type: ignore[arg-type]
    environment = HostEnvironment(place, EnvironmentSpec(["numpy"]))
    with pytest.raises(EnvironmentBuildError, match=f"its {what} is") as caught:
        asyncio.run(environment._target())
    assert caught.value.host == "host1" and "\n" not in caught.value.problem


@pytest.mark.parametrize("name", ["..%2F..%2Fx.whl", "%2Fetc%2Fx.whl", "a/..%2Fx.whl", "x.whl#/y", "x.whl?a=/../b"])
def test_the_name_of_a_file_leads_nowhere(name: str) -> None:
    assert LockedPackage("x", url=f"https://index.invalid/files/{name}").filename == "x.whl"


@pytest.mark.parametrize(
    ("tags", "fits"),
    [
        ("py3-none-any", True),
        ("py2.py3-none-any", True),
        ("cp313-cp313-manylinux_2_17_x86_64.manylinux2014_x86_64", True),
        ("cp39-abi3-manylinux_2_28_x86_64", True),
        ("cp313-cp313-manylinux_2_39_x86_64", False),
        ("cp313-cp313-manylinux_2_17_aarch64", False),
        ("cp313-cp313-musllinux_1_2_x86_64", False),
        ("cp312-cp312-manylinux_2_17_x86_64", False),
        ("cp314-abi3-manylinux_2_17_x86_64", False),
        ("cp313-cp313-macosx_11_0_x86_64", False),
    ],
)
def test_wheels_are_accepted_by_their_tags(tags: str, fits: bool) -> None:
    assert Target.of((3, 13), _FACTS).accepts(f"thing-1.0-{tags}.whl") is fits


def test_wheels_for_macos_are_accepted_by_their_processor() -> None:
    target = Target.of((3, 13), {**_FACTS, "system": "darwin", "machine": "arm64"})
    assert target.accepts("thing-1.0-cp313-cp313-macosx_11_0_arm64.whl")
    assert target.accepts("thing-1.0-cp313-cp313-macosx_11_0_universal2.whl")
    assert not target.accepts("thing-1.0-cp313-cp313-macosx_11_0_x86_64.whl")

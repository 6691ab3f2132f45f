"""Environments that are kept on a host, and what is written there: without a host."""

from __future__ import annotations

import asyncio
import fcntl
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lazycluster.agent import environments, keeping
from lazycluster.environments.making import Maker


def test_what_another_build_is_about_to_use_is_not_pruned(tmp_path: Path) -> None:
    wheel, unpacked = tmp_path / "wheels" / ("a" * 64) / "x.whl", tmp_path / "cache" / "archive-v0" / "abc" / "file"
    for path in (wheel, unpacked):
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(100_000))
    (tmp_path / "envs").mkdir()
    building = environments.lock(str(tmp_path / "envs" / "py313-other.build"), fcntl.LOCK_EX)
    assert building is not None
    keeping.prune_environments(str(tmp_path), 1000, None)
    assert wheel.exists()
    assert unpacked.exists()
    os.close(building)
    keeping.prune_environments(str(tmp_path), 1000, None)
    assert not wheel.exists()
    assert not unpacked.exists()


def test_a_list_of_packages_may_be_longer_than_an_argument(tmp_path: Path) -> None:
    class Here:
        host = "here"

        async def run(self, argv: Sequence[str], env: Mapping[str, str], what: str) -> str:
            return subprocess.run(argv, check=True, capture_output=True, text=True).stdout

    text = "".join(f"line {number}: 'quoted' \"twice\" %s \\n ü\n" for number in range(20_000))
    here: Any = Here()
    nothing: Any = None
    maker = Maker(here, nothing, nothing, nothing)
    for _ in range(2):  # a file that is there is written anew
        asyncio.run(maker._write(text, str(tmp_path / "file")))
        assert (tmp_path / "file").read_text() == text

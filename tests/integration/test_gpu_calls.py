"""Calls with GPUs of their own; what the hosts have is told by a stand-in for nvidia-smi."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

import fakegpus
from lazycluster import LocalRuntime, RuntimeGroup
from lazycluster.exceptions import AgentError


def group_with(tmp_path: Path, gpus: dict[str, Any]) -> RuntimeGroup:
    runtimes = []
    for host, rows in gpus.items():
        directory = fakegpus.stand_in(tmp_path / host, rows)
        path = f"{directory}:{os.environ['PATH']}"
        runtimes.append(LocalRuntime(host=host, env={"PATH": path, "NAME_OF_HOST": host}))
    return RuntimeGroup(runtimes)


def seen(_: int) -> tuple[str, str, int]:
    time.sleep(0.05)
    return os.environ["NAME_OF_HOST"], os.environ["CUDA_VISIBLE_DEVICES"], os.getpid()


def test_each_worker_sees_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with group_with(tmp_path, {"a": 2, "b": 0, "c": [fakegpus.row(0, 9000), fakegpus.row(1)]}) as group:
        found = set(group.map(seen, range(40), gpus_per_call=1))
        assert {(host, gpu) for host, gpu, _ in found} == {("a", "0"), ("a", "1"), ("c", "0"), ("c", "1")}
        assert len({pid for _, _, pid in found}) == 4
        assert "left out: b: the host has no GPU" in caplog.text
        # Others have none of them until those workers have gone.
        with (
            group.executor(gpus_per_call=1) as executor,
            pytest.raises(AgentError, match=r"(?s)no host has GPUs.*used by a pool"),
        ):
            executor.submit(abs, 1).result()
        assert list(group.map(abs, [-1])) == [1]
        with group.executor(gpus_per_call=1, idle_gpus=True) as executor:
            found = set(executor.map(seen, range(40)))
        assert {(host, gpu) for host, gpu, _ in found} == {("a", "0"), ("a", "1"), ("c", "1")}


def test_several_gpus_or_a_part_of_one(tmp_path: Path) -> None:
    with group_with(tmp_path, {"a": 3}) as group:
        with group.executor(gpus_per_call=2) as executor:
            assert {gpu for _, gpu, _ in executor.map(seen, range(10))} == {"0,1"}
        with group.executor(gpus_per_call=0.5, workers_per_host=3) as executor:
            found = set(executor.map(seen, range(40)))
        assert sorted(gpu for _, gpu, _ in found) == ["0", "0", "1"]


@pytest.mark.parametrize("number", [0, -1, 1.5, 0.3, "1", True])
def test_a_number_that_makes_no_sense(tmp_path: Path, number: Any) -> None:
    with group_with(tmp_path, {"a": 1}) as group:
        with pytest.raises((TypeError, ValueError), match="gpus_per_call"):
            group.executor(gpus_per_call=number)
        with pytest.raises(ValueError, match="say how many"):
            group.map(abs, [1], idle_gpus=True)

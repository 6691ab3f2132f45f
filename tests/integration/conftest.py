"""Fixtures of the integration tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lazycluster import Environment
from wheelhouse import Index, serve


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """An index that the manager's uv is configured to use, and nothing else."""
    config = tmp_path / "uv.toml"
    config.write_text("")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-cache"))
    # What an earlier test has fetched is not to be found: it has the same hash.
    monkeypatch.setattr(Environment, "main_directory", str(tmp_path / "state"))
    monkeypatch.setenv("UV_CONFIG_FILE", str(config))
    for name in ("UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(tmp_path / "index") as served:
        monkeypatch.setenv("UV_DEFAULT_INDEX", served.url)
        yield served

"""What users may say of a Dask cluster's scheduler and workers, and the address of its dashboard."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("distributed")
import dask

from lazycluster.engines.dask.dashboard_link import dashboard_link, plain_link, shown_link
from lazycluster.engines.dask.options import checked_options


@pytest.mark.parametrize(
    ("what", "name", "instead"),
    [
        ("worker_options", "nthreads", "use nthreads= of the cluster"),
        ("worker_options", "threads_per_worker", "use nthreads= of the cluster"),
        ("worker_options", "memory_limit", "use memory_limit= of the cluster"),
        ("worker_options", "local_directory", "use local_directory= of the cluster"),
        ("worker_options", "resources", "use resources= of the cluster"),
        ("worker_options", "n_workers", "use worker_count= of start()"),
        ("worker_options", "dashboard_address", "ports= of the cluster"),
        ("worker_options", "name", "their host and a number"),
        ("worker_options", "security", "certificates of its own"),
        ("scheduler_options", "port", "use master_port= of start()"),
        ("scheduler_options", "dashboard_address", "use dashboard_port= of the cluster"),
        ("scheduler_options", "host", "network= of the cluster"),
    ],
)
def test_what_the_cluster_sets_itself_is_refused_with_what_to_use(what: str, name: str, instead: str) -> None:
    with pytest.raises(ValueError, match=f"{what}: {name!r} cannot be set there: ") as caught:
        checked_options({name: 1}, what)
    assert instead in str(caught.value)


def test_every_option_that_the_programs_pass_is_refused() -> None:
    """So that none of them ends a worker, some seconds later, with 'multiple values for keyword argument'."""
    import ast
    import inspect

    from lazycluster.engines.dask.programs import scheduler, worker

    for program, what in ((scheduler, "scheduler_options"), (worker, "worker_options")):
        calls = [one for one in ast.walk(ast.parse(inspect.getsource(program))) if isinstance(one, ast.Call)]
        made = [call for call in calls if any(word.arg is None for word in call.keywords) and len(call.keywords) > 4]
        assert len(made) == 1
        for word in made[0].keywords:
            if word.arg is not None:
                with pytest.raises(ValueError, match="cannot be set there"):
                    checked_options({word.arg: None}, what)


def test_other_options_pass() -> None:
    given: dict[str, Any] = {"death_timeout": 5, "env": {"A": "1"}}
    assert checked_options(given, "worker_options") == given
    assert checked_options(None, "scheduler_options") == {}
    with pytest.raises(TypeError, match="scheduler_options must be a dictionary"):
        checked_options([("port", 1)], "scheduler_options")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("template", "link"),
    [
        ("{scheme}://{host}:{port}/status", "http://127.0.0.1:25001/se-cret/status"),
        ("{HUB}proxy/{port}/status", "/user/me/proxy/25001/se-cret/status"),
        ("{HUB}proxy/{host}:{port}/status", "/user/me/proxy/127.0.0.1:25001/se-cret/status"),
        ("/proxy/{port}", "/proxy/25001/se-cret/status"),
        ("/proxy/{port}/graph", "/proxy/25001/se-cret/graph"),
        ("https://me.example/dask/status", "https://me.example/dask/se-cret/status"),
        ("https://{port}.example/{prefix}/graph", "https://25001.example/se-cret/graph"),
    ],
)
def test_the_link_is_as_configured(template: str, link: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUB", "/user/me/")
    with dask.config.set({"distributed.dashboard.link": template}):
        assert dashboard_link(25001, "se-cret") == link
        assert shown_link(plain_link(25001, "se-cret")) == link
        assert shown_link("https://elsewhere/status") == "https://elsewhere/status"


@pytest.mark.parametrize("template", ["{NO_SUCH_VARIABLE}/{port}", "{port", "{}/{port}", "{port.nothing}"])
def test_a_link_that_cannot_be_made_is_told(template: str, caplog: pytest.LogCaptureFixture) -> None:
    with dask.config.set({"distributed.dashboard.link": template}):
        assert dashboard_link(25001, "secret") == plain_link(25001, "secret")
    assert f"{template!r}, cannot be used" in caplog.text

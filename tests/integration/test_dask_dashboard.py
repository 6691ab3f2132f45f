"""The dashboards of a Dask cluster, as a browser sees them through jupyter-server-proxy, which takes a prefix away."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import pytest

pytest.importorskip("distributed")
pytest.importorskip("bokeh")

import dask
from cluster_groups import ssh_group

from lazycluster import RuntimeGroup
from lazycluster.cluster.dask_cluster import DaskCluster
from lazycluster.exceptions import PortInUseError

pytestmark = pytest.mark.filterwarnings("ignore")

_PORT = 25999
_LINKS = {"a": "href", "link": "href", "script": "src", "img": "src"}


@pytest.fixture(scope="module")
def group(module_hosts: Any) -> Iterator[RuntimeGroup]:
    with ssh_group(module_hosts) as group:
        yield group


@pytest.fixture(scope="module")
def cluster(group: RuntimeGroup) -> Iterator[DaskCluster]:
    with DaskCluster(group, dashboard_port=_PORT) as cluster:
        cluster.start()
        yield cluster


@pytest.fixture(scope="module")
def jupyter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Jupyter server such as JupyterHub starts for a user, with jupyter-server-proxy."""
    pytest.importorskip("jupyter_server_proxy")
    home = tmp_path_factory.mktemp("jupyter")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {"port": port, "base_url": "/user/me/", "root_dir": str(home), "open_browser": False, "allow_root": True}
    arguments = [f"--ServerApp.{name}={value}" for name, value in options.items()]
    places = {f"JUPYTER_{name}_DIR": str(home / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    command = [sys.executable, "-m", "jupyter_server", "--IdentityProvider.token=", *arguments]
    with subprocess.Popen(
        command, env={**os.environ, **places, "HOME": str(home)}, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            assert any("is running at" in line for line in process.stderr), "it did not start"
            # What it says from now on must not fill the pipe.
            drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
            yield f"http://127.0.0.1:{port}/user/me/"
        finally:
            process.terminate()
            process.wait()
            drain.wait()


class _Unfollowed(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _get(url: str) -> tuple[int, str, str]:
    """Return status, content, and where it leads to."""
    opener = urllib.request.build_opener(_Unfollowed)
    try:
        with opener.open(url, timeout=30) as answer:
            return answer.status, answer.read().decode("utf-8", "replace"), ""
    except urllib.error.HTTPError as error:
        with error:
            return error.code, "", error.headers.get("Location", "")


def _browse(url: str, root: str) -> tuple[str, str]:
    """Return address and content of a page to which a browser gets from an address without leaving a path."""
    for _ in range(5):
        status, text, leads_to = _get(url)
        if not leads_to:
            assert status == 200, (status, url)
            return url, text
        url = urljoin(url, leads_to)
        assert url.startswith(root), f"{url} is outside {root}"
    raise AssertionError(f"redirected for ever: {url}")


class _Links(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        target = dict(attrs).get(_LINKS.get(tag, ""))
        if target and not urlsplit(target).scheme:
            self.found.append((tag, target))


def _check_page(url: str, root: str, loaded: set[str]) -> None:
    """Make sure that nothing in a page leads out of a path, and that what a browser loads with it is there.

    As a browser does, what was `loaded` with another page is not loaded again.
    """
    place, text = _browse(url, root)
    links = _Links(text).found
    assert links
    for tag, target in links:
        address = urljoin(place, target)
        assert address.startswith(root), f"{target} in {place} leads out of {root}"
        if tag != "a" and address not in loaded:
            _browse(address, root)
            loaded.add(address)


def _check_websocket(url: str) -> None:
    """Make sure that the server of a page answers over its websocket, as a browser opens it."""
    from bokeh.client import pull_session

    session = pull_session(url=url)
    try:
        assert session.document.roots
    finally:
        session.close()


def _link(cluster: DaskCluster, jupyter: str) -> str:
    with dask.config.set({"distributed.dashboard.link": jupyter + "proxy/{port}/status"}):
        return cluster.dashboard_link


def test_the_dashboard_stays_behind_a_proxy_that_takes_a_prefix_away(cluster: DaskCluster, jupyter: str) -> None:
    link = _link(cluster, jupyter)
    assert link.startswith(f"{jupyter}proxy/{_PORT}/")
    root = link.removesuffix("status")
    assert _browse(root.removesuffix("/"), root)[0] == link
    assert _browse(root, root)[0] == link
    loaded: set[str] = set()
    for page in ("status", "workers", "tasks", "system", "profile", "graph", "info/main/workers.html", "info"):
        _check_page(root + page, root, loaded)
    _check_websocket(link)


def test_the_first_look_at_a_dashboard_leads_to_where_it_was(group: RuntimeGroup, jupyter: str) -> None:
    """The pages are imported by then, and the browser is sent to them."""
    with DaskCluster(group) as cluster:
        cluster.start(1)
        link = _link(cluster, jupyter)
        place, text = _browse(link + "?theme=light", link.removesuffix("status"))
    assert place == link + "?theme=light"
    assert "bokeh" in text


def test_dashboards_of_workers_are_reached_through_that_of_the_scheduler(cluster: DaskCluster, jupyter: str) -> None:
    root = _link(cluster, jupyter).removesuffix("status")
    _, text = _browse(root + "info/main/workers.html", root)
    links = [urljoin(root + "info/main/", found) for found in re.findall(r'href="([^"]*/proxy/[^"]*)"', text)]
    assert len(links) == 3
    assert all(link.startswith(f"{root}proxy/") for link in links)
    _check_page(links[1], links[1].removesuffix("status"), set())
    _check_websocket(links[1])


def test_clients_tell_the_dashboard_as_it_is_configured(cluster: DaskCluster, tmp_path: Path) -> None:
    plain = cluster.dashboard_link
    secret = plain.split("/")[3]
    file = cluster.write_connection_file(tmp_path / "cluster.json")
    with DaskCluster.connect(file) as connected, cluster.get_client(timeout=20) as own:
        assert connected.dashboard_link == own.dashboard_link == plain
        with dask.config.set({"distributed.dashboard.link": "/user/me/proxy/{port}/status"}):
            wanted = f"/user/me/proxy/{_PORT}/{secret}/status"
            assert connected.dashboard_link == own.dashboard_link == wanted
            assert wanted in connected._repr_html_()


def test_a_dashboard_has_the_port_that_was_asked_for_or_none(cluster: DaskCluster, group: RuntimeGroup) -> None:
    assert f":{_PORT}/" in cluster.dashboard_link
    with DaskCluster(group, ports=[*range(25900, 25904), _PORT], dashboard_port=_PORT) as other:
        with pytest.raises(PortInUseError, match=str(_PORT)):
            other.start(1)
        assert other.status.name == "failed"
    with pytest.raises(ValueError, match="dashboard_port"):
        DaskCluster(group, dashboard_port=70000)

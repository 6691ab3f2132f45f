"""Training with XGBoost and LightGBM on Dask clusters, whose workers connect to each other by themselves."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("distributed")
pytest.importorskip("cryptography")

from cluster_groups import local_group, ssh_group

from lazycluster import RuntimeGroup
from lazycluster.cluster.dask_cluster import DaskCluster

da = pytest.importorskip("dask.array")
numpy = pytest.importorskip("numpy")
xgboost = pytest.importorskip("xgboost")
dask_xgboost = pytest.importorskip("xgboost.dask")
lightgbm = pytest.importorskip("lightgbm")

pytestmark = [
    # distributed leaves these to the garbage collector when comms are torn down.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:Parameter n_jobs will be ignored"),  # LightGBM, of its own default
]

OPTIONS = {"nthreads": 1, "memory_limit": "1 GB"}
REFUSED = r'(?s)opens connections of its own.*several machines.*Next step: DaskCluster\(group, network="direct"\)'
ROWS = 2000


@pytest.fixture(scope="module")
def group(module_hosts: Any) -> Iterator[RuntimeGroup]:
    with ssh_group(module_hosts) as group:
        yield group


@contextlib.contextmanager
def _client(group: RuntimeGroup, workers: int = 2) -> Iterator[Any]:
    with DaskCluster(group, **OPTIONS) as cluster:
        cluster.start(workers)
        with cluster.get_client(timeout=30) as client:
            yield client


@pytest.fixture(scope="module")
def tunnelled(group: RuntimeGroup) -> Iterator[Any]:
    with _client(group) as client:
        yield client


@pytest.fixture(scope="module")
def alone() -> Iterator[Any]:
    with local_group(2) as group, _client(group) as client:
        yield client


@pytest.fixture(scope="module")
def direct(group: RuntimeGroup) -> Iterator[DaskCluster]:
    with DaskCluster(group, network="direct", **OPTIONS) as cluster:
        cluster.start(2)
        yield cluster


def _data(client: Any) -> tuple[Any, Any, Any, Any]:
    """Return features and classes here, and the same with a part on each worker."""
    # Few values, which are in every part: so their borders are the same however the data is divided.
    features = numpy.random.default_rng(0).integers(0, 20, (ROWS, 4)) / 20
    classes = (features[:, 0] + features[:, 1] > 1).astype(int)
    workers = sorted(client.scheduler_info(n_workers=-1)["workers"])
    chunk = ROWS // len(workers)
    parts = [slice(start, start + chunk) for start in range(0, ROWS, chunk)]

    def spread(values: Any) -> Any:
        placed = [
            client.scatter(values[part], workers=[on], hash=False) for part, on in zip(parts, workers, strict=True)
        ]
        shape = (chunk, *values.shape[1:])
        return da.concatenate([da.from_delayed(one, shape, values.dtype) for one in placed])

    return features, classes, spread(features), spread(classes)


def _train_xgboost(client: Any, **options: Any) -> tuple[Any, Any]:
    """Return the probabilities that a model gives that was trained on the workers, and those of one trained here."""
    features, classes, spread_features, spread_classes = _data(client)
    settings = {"objective": "binary:logistic", "tree_method": "hist", "max_depth": 3}
    data = dask_xgboost.DaskDMatrix(client, spread_features, spread_classes)
    trained = dask_xgboost.train(client, settings, data, num_boost_round=10, evals=[(data, "train")], **options)
    found = dask_xgboost.predict(client, trained["booster"], data).compute()
    assert len(trained["history"]["train"]["logloss"]) == 10
    here = xgboost.DMatrix(features, classes)
    return found, xgboost.train(settings, here, 10).predict(here)


def _train_lightgbm(client: Any, **options: Any) -> tuple[Any, Any]:
    features, classes, spread_features, spread_classes = _data(client)
    settings = {"n_estimators": 10, "num_leaves": 8, "min_child_samples": 5, "verbose": -1}
    model = lightgbm.DaskLGBMClassifier(client=client, **settings, **options)
    model.fit(spread_features, spread_classes)
    here = lightgbm.LGBMClassifier(**settings).fit(features, classes)
    return model.predict_proba(spread_features).compute(), here.predict_proba(features)


TRAININGS = pytest.mark.parametrize("train", [_train_xgboost, _train_lightgbm])


@TRAININGS
def test_hosts_that_reach_each_other_give_the_model_of_one_machine(direct: DaskCluster, train: Any) -> None:
    with direct.get_client(timeout=30) as client:
        found, here = train(client)
    assert numpy.allclose(found, here, atol=1e-4)
    assert found.std() > 0.2  # it has learnt something


@TRAININGS
def test_hosts_that_have_tunnels_only_refuse(tunnelled: Any, train: Any) -> None:
    with pytest.raises(RuntimeError, match=REFUSED):
        train(tunnelled)
    assert tunnelled.submit(lambda: 3, pure=False).result(timeout=30) == 3


def test_a_plain_client_is_told_the_same(tunnelled: Any) -> None:
    from distributed import Client

    with (
        Client(tunnelled.scheduler.address, security=tunnelled.security, set_as_default=False) as plain,
        pytest.raises(RuntimeError, match=REFUSED),
    ):
        _train_lightgbm(plain)


@TRAININGS
def test_workers_of_one_machine_need_no_direct_network(alone: Any, train: Any) -> None:
    found, here = train(alone)
    assert numpy.allclose(found, here, atol=1e-4)


def test_one_worker_behind_a_tunnel_is_enough_for_lightgbm(group: RuntimeGroup) -> None:
    with _client(group, workers=1) as client:
        found, here = _train_lightgbm(client)
    assert numpy.allclose(found, here, atol=1e-4)


def test_a_firewall_that_admits_chosen_ports_only(direct: DaskCluster, module_hosts: Any) -> None:
    first, second = module_hosts[:2]
    admitted = "24786,25000:25100,26000:26002"
    with contextlib.ExitStack() as stack:
        for host, other in ((first, second), (second, first)):
            new = ["INPUT", "-s", other.address, "-p", "tcp", "--syn", "-m", "multiport", "!", "--dports", admitted]
            host.run(["/usr/sbin/iptables", "-I", *new, "-j", "REJECT"])
            stack.callback(host.run, ["/usr/sbin/iptables", "-D", *new, "-j", "REJECT"])
        with direct.get_client(timeout=30) as client:
            found, here = _train_lightgbm(client, local_listen_port=26002)
            assert numpy.allclose(found, here, atol=1e-4)
            if not hasattr(xgboost.collective.Config, "worker_port"):  # before 3.3
                pytest.skip("this XGBoost does not let choose the ports of workers")
            ports = {"tracker_host_ip": first.address, "tracker_port": 26000, "worker_port": 26001}
            found, here = _train_xgboost(client, coll_cfg=xgboost.collective.Config(**ports))
            assert numpy.allclose(found, here, atol=1e-4)


PROGRAM = """
import sys

from dask import array as da
from dask.distributed import Client
from xgboost import dask as dxgb
from xgboost.dask import DaskDMatrix

from lazycluster.cluster.dask_cluster import DaskCluster


def main(client: Client) -> None:
    # generate some random data for demonstration
    m = 1000
    n = 10
    rng = da.random.default_rng(1)
    X = rng.normal(size=(m, n), chunks=(m // 4, -1))
    y = X.sum(axis=1)

    # DaskDMatrix acts like normal DMatrix, works as a proxy for local DMatrix scatter around workers.
    dtrain = DaskDMatrix(client, X, y)

    # Use train method from xgboost.dask instead of xgboost.
    output = dxgb.train(
        client,
        {"verbosity": 1, "tree_method": "hist"},
        dtrain,
        num_boost_round=4,
        evals=[(dtrain, "train")],
    )
    bst = output["booster"]
    history = output["history"]
    # you can pass output directly into `predict` too.
    prediction = dxgb.predict(client, bst, dtrain)
    print("Evaluation history:", history)
    print(prediction.compute().shape)


with DaskCluster.connect(sys.argv[1]) as client:
    main(client)
"""


def test_the_example_of_xgboost_in_a_program_of_its_own(direct: DaskCluster, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(direct.write_connection_file(tmp_path / "cluster.json"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "Evaluation history: {'train'" in done.stdout
    assert done.stdout.endswith("(1000,)\n")

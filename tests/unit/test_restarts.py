"""What has ended is started again, but not for ever."""

from __future__ import annotations

from lazycluster.agent.restart_policy import RestartPolicy
from lazycluster.engines.dask.launchers import LocalMasterLauncher
from lazycluster.engines.dask.launchers import RoundRobinLauncher as DaskWorkers
from lazycluster.engines.hyperopt.masters import EmbeddedMongoLauncher, LocalMongoLauncher
from lazycluster.engines.hyperopt.workers import RoundRobinLauncher as HyperoptWorkers


def test_what_others_have_ended_does_not_count_against_the_limit() -> None:
    restarts = RestartPolicy(1)
    assert None not in [restarts.next(blameless=True) for _ in range(50)]
    assert restarts.next() is not None
    assert restarts.next(blameless=True) is not None
    assert restarts.next() is None
    assert restarts.count == 52


def test_every_limit_can_be_reached_within_the_time_in_which_restarts_are_counted() -> None:
    from lazycluster.agent.restart_policy import WINDOW

    for launcher in (LocalMasterLauncher, DaskWorkers, EmbeddedMongoLauncher, LocalMongoLauncher, HyperoptWorkers):
        restarts = RestartPolicy(launcher.RESTARTS)
        delays = [restarts.next() or 0.0 for _ in range(launcher.RESTARTS)]
        assert sum(delays) < WINDOW / 2
        assert restarts.next() is None

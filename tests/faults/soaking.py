"""The soak: all loads again and again on some hosts, a random fault every few seconds; see ``scripts/soak``."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from injections import DIRECT, FAULTS, Fault, in_soak
from loads import LOADS, Load, Outcome, Running
from measures import growth, measure
from scenes import NobodyThereError, Scene, UnavailableError

import leaks
from lazycluster import Environment, RuntimeGroup
from patience import until
from sshhosts import Hosts, own_network

_LIMIT = 600.0  # seconds after which a load hangs
_QUIET = 300.0  # seconds until all is as it should be once nothing is broken any more
_GOOD = ("right", "clear error")


class Breaker(threading.Thread):
    """Breaks something on a host every few seconds, and mends it in time.

    Args:
        scene: Where.
        every: Seconds from one fault to the next.
        seed: Of what is chosen.
        faults: What is chosen from.

    Attributes:
        struck: How often each fault was injected.
        missed: How often nobody was there to be hit.
        failures: What went wrong with the injection itself.
    """

    def __init__(self, scene: Scene, every: float, seed: int, faults: list[Fault]) -> None:
        super().__init__(name="breaker", daemon=True)
        self.struck: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()
        self.failures: list[str] = []
        self._scene, self._every, self._faults = scene, every, faults
        self._random = random.Random(seed)
        self._broken: dict[int, tuple[float, str, contextlib.AbstractContextManager[None]]] = {}
        self._end = threading.Event()
        self._work = threading.Lock()

    def run(self) -> None:
        """Go on until `stop`."""
        due = time.monotonic() + self._every
        while not self._end.wait(0.2):
            with self._work:
                self._mend(time.monotonic())
                if time.monotonic() >= due:
                    due = time.monotonic() + self._every
                    self._strike()

    def quiet(self) -> threading.Lock:
        """Mend everything now; nothing is broken as long as what is returned is held."""
        self._work.acquire()
        self._mend(float("inf"))
        return self._work

    def stop(self) -> None:
        """Break nothing more, and mend everything."""
        self._end.set()
        self.join()
        self._mend(float("inf"))

    def _strike(self) -> None:
        free = [number for number in range(len(self._scene.hosts)) if number not in self._broken]
        if not free:
            return
        chosen, number = self._random.choice(self._faults), self._random.choice(free)
        strike = chosen.strike(self._scene, number)
        name = self._scene.hosts[number].name
        try:
            strike.__enter__()
        except (NobodyThereError, UnavailableError):
            self.missed[chosen.name] += 1
        except Exception as error:  # noqa: BLE001 - the soak is to end with a table, whatever happens
            self.failures.append(f"{chosen.name} on {name}: {error!r}")
        else:
            say(f"  {chosen.name}: {name}")
            self.struck[chosen.name] += 1
            self._broken[number] = (time.monotonic() + chosen.lasts, chosen.name, strike)

    def _mend(self, now: float) -> None:
        for number, (until_when, name, strike) in list(self._broken.items()):
            if until_when <= now:
                del self._broken[number]
                try:
                    strike.__exit__(None, None, None)
                except NobodyThereError:
                    self.struck[name] -= 1
                    self.missed[name] += 1
                except Exception as error:  # noqa: BLE001 - as above
                    self.failures.append(f"mending {name} on host{number + 1}: {error!r}")


def say(text: str) -> None:
    """Tell whoever looks on."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


class Soak:
    """One soak.

    Args:
        scene: Where.
        breaker: Who breaks.
        temporary: The manager's directory for temporary files.
    """

    def __init__(self, scene: Scene, breaker: Breaker, temporary: Path) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.retries: Counter[str] = Counter()
        self.bad: list[str] = []
        self.samples: list[dict[str, float]] = []
        self.rounds = 0
        self.interruptions = 0
        self.hired = 0
        self._scene, self._breaker, self._temporary = scene, breaker, temporary

    def round(self) -> None:
        """All loads at once, to their ends; then a look at what is held."""
        self.rounds += 1
        say(f"round {self.rounds}")
        # Of the networks, a cluster has one: this one's is that of tunnels.
        present = [Running(load(self._scene)) for name, load in LOADS.items() if name != DIRECT]
        slow = list(present)  # those that have not ended once; the others are begun again meanwhile
        while present:
            for one in [one for one in present if one.wait(0.1) or time.monotonic() - one.began > _LIMIT]:
                self._note(one.load, one.outcome(0))
                present.remove(one)
                slow = [other for other in slow if other is not one]
                if slow:
                    present.append(Running(type(one.load)(self._scene)))
        with self._paused():
            self._settle()
            self.samples.append(measure(self._scene.hosts, self._temporary))
            say("  " + ", ".join(f"{name} {value:.0f}" for name, value in self.samples[-1].items()))

    @contextlib.contextmanager
    def _paused(self) -> Any:
        lock = self._breaker.quiet()
        try:
            yield
        finally:
            lock.release()

    def _note(self, load: Load, outcome: Outcome) -> None:
        say(f"  {load.name}: {outcome} ({outcome.seconds:.0f} s)")
        self.outcomes[load.name, outcome.kind] += 1
        self.retries[load.name] += outcome.retries
        if outcome.kind != "right":
            print(outcome.detail, flush=True)
        if outcome.kind not in _GOOD:
            self.bad.append(f"round {self.rounds}: {load.name}: {outcome}")

    def _hire(self, scene: Scene) -> None:
        """Do what their user does about workers that were started again too often: say how many there are to be."""
        for cluster in (scene.dask, scene.hyperopt):
            failed = [worker for worker in cluster.workers if worker.state == "failed"]
            self.hired += len(failed)
            if failed and cluster is scene.dask:
                cluster.scale(len(scene.hosts))
            elif failed:
                cluster.start_workers(len(failed))

    def _settle(self) -> None:
        scene = self._scene
        try:
            self._hire(scene)
            until(lambda: all(one.state == "open" for one in scene.group.status), "all links", _QUIET)
            for cluster in (scene.dask, scene.hyperopt):
                until(lambda cluster=cluster: _complete(cluster, len(scene.hosts)), f"all workers of {cluster}", _QUIET)
        except AssertionError as error:
            states = [str(one) for one in scene.group.status]
            workers = [
                f"{one.name} {one.state} {one.problem}" for one in [*scene.dask.workers, *scene.hyperopt.workers]
            ]
            self.bad.append(f"round {self.rounds}: {error}: " + "; ".join([*states, *workers]))
            say(self.bad[-1])


def _complete(cluster: Any, count: int) -> bool:
    return sum(worker.state == "ready" for worker in cluster.workers) >= count and cluster.master.state == "ready"


# --- from the command line --------------------------------------------------------------------------------
def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="how long (default: 60)")
    parser.add_argument("--hosts", type=int, default=8, help="on how many hosts (default: 8)")
    parser.add_argument("--every", type=float, default=10, help="seconds from one fault to the next (default: 10)")
    parser.add_argument("--seed", type=int, default=None, help="of what is chosen (default: random)")
    parser.add_argument("--fault", action="append", help="only faults with this in their names; may be given again")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    return parser.parse_args()


def chosen_faults(wanted: list[str] | None) -> list[Fault]:
    """The faults that hosts and links come back from."""
    usable = [one for one in FAULTS.values() if in_soak(one)]
    return [one for one in usable if not wanted or any(part in one.name for part in wanted)]


def main() -> int:
    """Soak, and print what came of it."""
    arguments = _arguments()
    if not own_network():
        print("the soak needs Linux, and root: its hosts are network namespaces", file=sys.stderr)
        return 2
    seed = random.SystemRandom().randrange(1 << 31) if arguments.seed is None else arguments.seed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    warnings.simplefilter("ignore")
    temporary = Path(tempfile.mkdtemp(prefix="ls-", dir="/tmp"))
    state = Path(tempfile.mkdtemp(prefix="ls-state-", dir="/tmp"))
    os.environ.update(TMPDIR=str(temporary), XDG_STATE_HOME=str(state), LAZYCLUSTER_SOAK=str(os.getpid()))
    tempfile.tempdir = str(temporary)
    Environment.main_directory = str(state / "lazycluster")
    logging.basicConfig(format="%(asctime)s %(name)s %(message)s", level=logging.WARNING)
    say(f"{arguments.minutes:g} minutes, {arguments.hosts} hosts, a fault every {arguments.every:g} s, seed {seed}")
    try:
        return _soak(arguments, seed, temporary, state)
    finally:
        tempfile.tempdir = None
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(state, ignore_errors=True)


def _soak(arguments: argparse.Namespace, seed: int, temporary: Path, state: Path) -> int:
    from lazycluster.cluster.dask_cluster import DaskCluster
    from lazycluster.cluster.hyperopt_cluster import HyperoptCluster

    settings: dict[str, Any] = {"link_timeout": 4, "grace": 300}
    marker = f"LAZYCLUSTER_SOAK={os.getpid()}"
    began = time.monotonic()
    with Hosts(arguments.hosts, sshd={"KexAlgorithms": "curve25519-sha256"}) as hosts:
        manager = leaks.Manager(temporary, marker, own_network=True).remember()
        settings["config_file"] = hosts.config_file
        with (
            RuntimeGroup(hosts=hosts.names, connection_kwargs=settings, python=sys.executable) as group,
            DaskCluster(group, nthreads=1) as dask,
            HyperoptCluster(group, dbpath=str(state / "db")) as hyperopt,
        ):
            dask.start()
            hyperopt.start()
            scene = Scene(hosts, group, state, dask, hyperopt)
            breaker = Breaker(scene, arguments.every, seed, chosen_faults(arguments.fault))
            soak = Soak(scene, breaker, temporary)
            breaker.start()
            while time.monotonic() - began < 60 * arguments.minutes:
                soak.round()
            breaker.stop()
            soak.interruptions = sum(runtime._connection.interruptions for runtime in group.runtimes)
        left = leaks.settle(lambda: [*manager.leftovers(), *(one for host in hosts for one in host.leftovers())])
    minutes = (time.monotonic() - began) / 60
    return report(soak, breaker, left, minutes, arguments, seed)


def report(
    soak: Soak, breaker: Breaker, left: list[str], minutes: float, arguments: argparse.Namespace, seed: int
) -> int:
    """Print the tables; returns the exit status."""
    grown = growth(soak.samples)
    print(f"\n{minutes:.1f} minutes, {arguments.hosts} hosts, {soak.rounds} rounds, seed {seed}")
    missed = sum(breaker.missed.values())
    print(f"\nfaults: {sum(breaker.struck.values())}; {missed} others found nobody to hit")
    for name, count in sorted(breaker.struck.items()):
        print(f"  {count:5} {name}")
    print("\nloads:")
    for (name, kind), count in sorted(soak.outcomes.items()):
        print(f"  {count:5} {name}: {kind}")
    print(f"  begun anew by their user: {sum(soak.retries.values())}")
    print(f"  workers that had ended for good, and were replaced by their user: {soak.hired}")
    print(f"  links that were interrupted, and came back: {soak.interruptions}")
    print("\nheld after the second round, and after the last:")
    for name in soak.samples[0]:
        first, last = soak.samples[min(1, len(soak.samples) - 1)][name], soak.samples[-1][name]
        print(f"  {first:8.0f} {last:8.0f}  {name}")
    problems = [*soak.bad, *breaker.failures, *(f"left: {one}" for one in left), *(f"grown: {one}" for one in grown)]
    print("\n" + ("\n".join(["WRONG:", *problems]) if problems else "no wrong result, nothing left, nothing has grown"))
    if arguments.json:
        loads = {f"{name}: {kind}": count for (name, kind), count in soak.outcomes.items()}
        figures = {"minutes": minutes, "hosts": arguments.hosts, "every": arguments.every, "seed": seed,
                   "rounds": soak.rounds, "faults": breaker.struck, "missed": breaker.missed, "loads": loads,
                   "begun anew": soak.retries, "hired": soak.hired, "interruptions": soak.interruptions,
                   "samples": soak.samples, "problems": problems}  # fmt: skip
        arguments.json.write_text(json.dumps(figures, indent=1))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

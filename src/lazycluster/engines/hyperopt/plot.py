"""A search as a picture: the losses of its trials, and the best one so far."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from lazycluster.cluster.exceptions import ClusterError
from lazycluster.core.extras import install_command

from .programs import trials

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ClusterError(
        f"a plot needs matplotlib, which cannot be imported here ({error}).\n  Next step: {install_command('hyperopt')}"
    ) from error

__all__ = ["LossPlot"]

_WANTED = {"tid": 1, "state": 1, "result.loss": 1, "result.status": 1}
_SIZE = (8.0, 4.5)  # inches
_DOTS = 150  # per inch
_DECADES = 1000.0  # from the smallest loss to the largest one, from which on the axis is a logarithmic one
_POINTS, _BEST, _FAILED = "#7a93ac", "#c2410c", "#b91c1c"


class LossPlot(Figure):
    """A figure that a notebook shows by itself."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=_DOTS)
        return buffer.getvalue()


def plot_losses(jobs: Any, exp_key: str | None, path: str | Path | None) -> LossPlot:
    """Return a picture of a search.

    Args:
        jobs: The collection of trials.
        exp_key: The name of the search; None: all.
        path: Where to write it, too; the ending of the name says in which format.
    """
    found = list(jobs.find({} if exp_key is None else {"exp_key": exp_key}, projection=_WANTED).sort("tid", 1))
    figure = LossPlot(figsize=_SIZE, layout="constrained")
    _draw(figure.add_subplot(), found, "all searches" if exp_key is None else exp_key)
    if path is not None:
        figure.savefig(path, dpi=_DOTS)
    return figure


def _draw(axes: Any, found: list[Any], title: str) -> None:
    points = [(number, loss) for number, trial in enumerate(found, 1) if (loss := loss_of(trial)) is not None]
    failed = [number for number, trial in enumerate(found, 1) if trial["state"] == trials.ERROR]
    losses = [loss for _, loss in points]
    if losses and min(losses) > 0 and max(losses) > _DECADES * min(losses):
        axes.set_yscale("log")
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#e5e7eb")
    axes.scatter([number for number, _ in points], losses, s=16, color=_POINTS, alpha=0.75, lw=0, label="loss")
    if points:
        _draw_best(axes, points, len(found))
    if failed:
        style: dict[str, Any] = {"marker": "x", "s": 22, "color": _FAILED, "clip_on": False, "lw": 1.2}
        bottom = axes.get_xaxis_transform()  # trials along, and the height of the axes upwards
        axes.scatter(failed, [0.0] * len(failed), transform=bottom, label=f"failed ({len(failed)})", **style)
    axes.set_xlim(0.5, max(len(found), 1) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="trial", ylabel="loss")
    axes.set_title(title, loc="left", fontsize=11, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    if points or failed:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=9)  # hides no point
    else:
        axes.text(0.5, 0.5, "no trial has ended yet", transform=axes.transAxes, ha="center", color="#6b7280")


def _draw_best(axes: Any, points: list[tuple[int, float]], last: int) -> None:
    best: list[tuple[int, float]] = []
    for number, loss in points:
        if not best or loss < best[-1][1]:
            best.append((number, loss))
    number, loss = best[-1]
    steps = [*best, (last + 0.5, loss)]
    label = f"best so far: {loss:.4g}, trial {number}"
    axes.step(*zip(*steps, strict=True), where="post", color=_BEST, lw=1.8, label=label)
    axes.scatter([number], [loss], s=46, facecolor="white", edgecolor=_BEST, lw=1.8, zorder=5)


def loss_of(trial: Any) -> float | None:
    """Return the loss of a trial; None if it has none that counts."""
    result = trial.get("result") or {}
    loss = result.get("loss")
    if trial["state"] != trials.DONE or result.get("status") != "ok" or loss is None:
        return None
    return float(loss) if math.isfinite(loss) else None

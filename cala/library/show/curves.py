"""Recalls and losses as curves and bars."""

import math
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ...annotations import read_json
from ...data import Triplets
from ...errors import CalaError
from ...retrieval import recalls
from .cards import to_ranks
from .style import DASHES
from .style import GREY
from .style import PALETTE
from .style import Page
from .style import style

LOSSES = ("loss", "qtm", "tbia", "ctr")  # columns of a log
PANELS_A_ROW = 4


@style()
def recall_curve(
    ranks: Mapping[str, Iterable],  # {name: (Q,) ranks of the targets}
    gallery: int | None = None,  # pictures that compete; draws what chance reaches
) -> Page:
    "Recall at 1 to 50, a line for each model."
    page = Page(figsize=(5, 2.6), layout="constrained")
    ax = page.subplots()
    ks = tuple(range(1, 51))
    for name, model_ranks in ranks.items():
        ax.plot(ks, list(recalls(to_ranks(model_ranks), ks).values()), label=name)
    if gallery:
        ax.plot(ks, [min(100, 100 * k / gallery) for k in ks], color=GREY, lw=1, ls=":", label="chance")
    ax.set(xscale="log", ylim=(0, 103), xlabel="k", ylabel="recall at k, %")
    ax.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    ax.minorticks_off()
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return page


def read_log(
    log: pd.DataFrame | Sequence[dict] | str | Path,  # a table, its rows, or a .csv file
) -> pd.DataFrame:
    "The log of a run as a table."
    if not isinstance(log, (str, Path)):
        return pd.DataFrame(log)
    if not Path(log).is_file():
        raise CalaError(f"no log {log}; give the log.csv or metrics.csv of a run's folder")
    return pd.read_csv(log)


def name_column(
    column: str,  # of a log
) -> str:
    "The name of a column in a figure: R@5 for recall_at5, Rs@1 for group_recall_at1, TBIA for tbia."
    if column in LOSSES[1:]:
        return column.upper()
    return column.replace("group_recall_at", "Rs@").replace("recall_at", "R@").replace("_", " ")


class Line(NamedTuple):
    "One line of a panel."

    log: pd.DataFrame
    column: str
    label: str
    number: int  # decides on colour and dashes


def _title_panel(column: str, several_runs: bool) -> str:
    "The panel that a column of a log belongs to."
    name = name_column(column)
    if column in LOSSES[1:]:
        return f"{name} loss"
    if "recall_at" not in column:
        return name
    if several_runs:
        return f"{name}, %"
    return "recall in the group of six, %" if column.startswith("group") else "recall in the gallery, %"


def _plan_panels(runs: dict[str, pd.DataFrame]) -> dict[str, list[Line]]:
    "Title and lines of each panel. Recalls of a single run share a panel; every other column has its own."
    recall_columns = [column for log in runs.values() for column in log if "recall_at" in column]
    panels = {}
    for column in dict.fromkeys([*LOSSES, "learning_rate", *recall_columns]):
        for number, (run, log) in enumerate(runs.items()):
            if column not in log or log[column].isna().all():  # a run with QTM alone logs its other terms as NaN
                continue
            lines = panels.setdefault(_title_panel(column, len(runs) > 1), [])
            is_single = len(runs) == 1
            label = name_column(column) if is_single else run
            lines.append(Line(log, column, label, number=len(lines) if is_single else number))
    return panels


def _draw_line(ax: Axes, line: Line, smooth: float):
    "Losses: the values faintly, and over them their running mean. All else as it is, with marks if there are few."
    rows = line.log.dropna(subset=[line.column])
    values = rows[line.column]
    x, ax_label = range(len(values)), "row"
    for counter in ("epoch", "step"):
        if counter in rows and rows[counter].is_monotonic_increasing:  # False where a value is missing
            x, ax_label = rows[counter], counter
    colour, dashes = PALETTE[line.number % 6], DASHES[line.number % 6]
    few = len(values) < 20
    if line.column in LOSSES and not few:
        ax.plot(x, values, color=colour, alpha=0.25, lw=0.7, ls="-", zorder=0)
        values = values.ewm(alpha=1 - smooth).mean()  # divides by the sum of the weights, so it does not start at 0
    ax.plot(x, values, color=colour, ls=dashes, label=line.label, marker="o" if few else None, ms=3)
    ax.set_xlabel(ax_label)


def _count_name_columns(lines: list[Line]) -> int:
    "How many names of 8 points fit beside one another under a panel."
    longest = max(len(line.label) for line in lines)
    return max(1, int(2.1 / (0.4 + 0.061 * longest)))


def _fill_panel(ax: Axes, title: str, lines: list[Line], smooth: float):
    "Draw all lines of a panel; names stand under it, where no line can run through them."
    for line in lines:
        _draw_line(ax, line, smooth)
    highest = 103 if "%" in title else 1.05 * ax.dataLim.ymax  # percentages keep their whole range
    ax.set(title=title, ylim=(0, highest if 0 < highest < math.inf else None))
    ax.ticklabel_format(axis="y", scilimits=(-3, 4))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    if len(lines) > 1 or "%" in title or lines[0].label not in title:
        space: dict[str, Any] = dict(columnspacing=1, borderaxespad=4.4, borderpad=0)
        names = _count_name_columns(lines)
        ax.legend(fontsize=8, ncols=names, loc="upper center", bbox_to_anchor=(0.5, 0), **space)


@style()
def loss_curves(
    logs: pd.DataFrame | Sequence[dict] | str | Path | Mapping,  # log of a run (see `read_log`), or {name: log}
    smooth: float = 0.9,  # weight of the past in the running mean; 0 for none
) -> Page:
    "A panel for each loss term and the learning rate; recalls of one run share a panel, those of several do not."
    named = logs if isinstance(logs, Mapping) else {"": logs}
    panels = _plan_panels({name: read_log(log) for name, log in named.items()})
    if not panels:
        raise CalaError("nothing to draw: the log has no numbers under loss, qtm, tbia, ctr, learning_rate or a recall")
    high = math.ceil(len(panels) / PANELS_A_ROW)
    wide = math.ceil(len(panels) / high)
    name_rows = max(math.ceil(len(lines) / _count_name_columns(lines)) for lines in panels.values())
    page = Page(figsize=(2.5 * wide, (2 + 0.17 * name_rows) * high), layout="constrained")
    for n, (title, lines) in enumerate(panels.items()):
        _fill_panel(page.add_subplot(high, wide, n + 1), title, lines, smooth)
    return page


def edit_kinds(
    dataset: Triplets,  # CIRR or FashionIQ, of a drawn world
) -> list[str]:  # one for each triplet
    "The kind of edit behind each triplet; of several edits at once only their number, as in '2 changes'."
    path = dataset.root / "drawn" / f"edits.{dataset.split}.json"
    if not path.is_file():
        raise CalaError(f"no {path}: kinds of edits are known of drawn worlds only (cala-demo draws one)")
    edits = read_json(path, dict)
    kinds = []
    for triplet in dataset.triplets:
        edit = edits[triplet.pair_id]
        kinds.append(f"{edit.count('+') + 1} changes" if "+" in edit else edit)
    return kinds


def wilson(
    hits: Any,  # successes; a number, or an array of numbers
    n: Any,  # trials
) -> tuple[Any, Any]:  # low and high, percentages
    "The 95% interval of a proportion (Wilson 1927); it is correct for few trials, where p +- 1.96 s is not."
    z, p = 1.96, hits / n
    middle = p + z * z / (2 * n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return 100 * (middle - half) / (1 + z * z / n), 100 * (middle + half) / (1 + z * z / n)


@style()
def per_kind_recall(
    ranks: Iterable | Mapping[str, Iterable],  # (Q,) ranks of the targets, or {name: ranks}
    kinds: list[str],  # (Q,) kind of each query's edit
    k: int = 1,  # recall at this k
) -> Page:
    "Recall at k for each kind of edit, the hardest first, with the number of queries and a 95% interval."
    models = ranks if isinstance(ranks, Mapping) else {"": ranks}
    found = pd.DataFrame({name: (to_ranks(of_model) <= k).numpy() for name, of_model in models.items()})
    recall: Any = found.groupby(np.array(kinds)).mean()
    recall = recall.sort_values(recall.columns[0], kind="stable")
    counts: Any = pd.Series(kinds).value_counts()[recall.index]
    page = Page(figsize=(5.5, 0.5 + len(recall) * max(0.3, 0.2 * len(models))), layout="constrained")
    ax = page.subplots()
    thick, rows = 0.8 / len(models), np.arange(len(recall))
    for m, name in enumerate(models):
        y, colour = rows - 0.4 + thick * (m + 0.5), PALETTE[m % 6]
        ax.barh(y, 100 * recall[name], thick * 0.9, color=colour, alpha=0.5, label=name)
        ax.hlines(y, *wilson(recall[name] * counts, counts), color=colour, lw=1.5)
        for place, share in zip(y, recall[name]):
            ax.text(102, place, f"{100 * share:.0f}", va="center", size=8)
    ax.set(xlim=(0, 118), xlabel=f"recall at {k}, %", xticks=range(0, 101, 20))
    ax.set_yticks(rows, [f"{kind}  (n = {n})" for kind, n in counts.items()])
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    if len(models) > 1:
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return page

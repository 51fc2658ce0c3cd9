"""Recalls and losses as curves and bars."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ...annotations import read_json
from ...data import Triplets
from ...errors import CalaError
from ...retrieval import recalls
from .cards import to_ranks
from .style import DASHES, GREY, PALETTE, Page, style

TERMS = ("qtm", "tbia", "ctr")  # columns of a log beside the total, `loss`
NO_LOSSES = ("epoch", "step", "learning_rate")  # the other columns of a log
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


def list_losses(
    columns: Iterable[str],  # of a log, or of a table of metrics, which has no losses
) -> list[str]:
    "The columns that are losses, the total first; a model of your own may have more terms than three."
    names = list(columns)
    if "loss" not in names:
        return [name for name in names if name in TERMS]
    return [name for name in names if name not in NO_LOSSES and "recall_at" not in name]


def name_column(
    column: str,  # of a log
) -> str:
    "The name of a column in a figure: R@5 for recall_at5, Rs@1 for group_recall_at1, TBIA for tbia."
    if column in TERMS:
        return column.upper()
    return column.replace("group_recall_at", "Rs@").replace("recall_at", "R@").replace("_", " ")


def _title_panel(column: str, several_runs: bool, losses: list[str]) -> str:
    "The panel that a column of a log belongs to."
    name = name_column(column)
    if column in losses and column != "loss":
        return f"{name} loss"
    if "recall_at" not in column:
        return name
    if several_runs:
        return f"{name}, %"
    return "recall in the group of six, %" if column.startswith("group") else "recall in the gallery, %"


def _read_values(log: pd.DataFrame, column: str) -> pd.Series:
    "The values of a column over the steps, the epochs or, where a log counts neither, the rows."
    rows: Any = log.dropna(subset=[column])
    for counter in ("step", "epoch"):
        if counter in rows and rows[counter].is_monotonic_increasing:  # False where a count is missing
            return rows.set_index(counter)[column]
    return rows[column].reset_index(drop=True).rename_axis("row")


def _plan_panels(runs: dict[str, pd.DataFrame]) -> dict[str, dict[str, pd.Series]]:
    "Title of each panel -> label -> line. Recalls of a single run share a panel; every other column has its own."
    losses = [column for log in runs.values() for column in list_losses(log)]
    recall_columns = [column for log in runs.values() for column in log if "recall_at" in column]
    panels = {}
    for column in dict.fromkeys([*losses, "learning_rate", *recall_columns]):
        for run, log in runs.items():
            if column in log and log[column].notna().any():  # a run with QTM alone logs its other terms as NaN
                label = run if len(runs) > 1 else name_column(column)
                panels.setdefault(_title_panel(column, len(runs) > 1, losses), {})[label] = _read_values(log, column)
    return panels


def _count_name_columns(lines: dict[str, pd.Series]) -> int:
    "How many names of 8 points fit beside one another under a panel."
    return max(1, int(2.1 / (0.4 + 0.061 * max(map(len, lines)))))


def _fill_panel(ax: Axes, title: str, lines: dict[str, pd.Series], labels: list[str], smooth: float):
    "Draw all lines of a panel, in the colours of their places among `labels`; names stand under it, beside no line."
    for label, values in lines.items():
        number, few = labels.index(label) % 6, len(values) < 20
        if title.endswith("loss") and not few:
            ax.plot(values, color=PALETTE[number], alpha=0.25, lw=0.7, ls="-", zorder=0)
            values = values.ewm(alpha=1 - smooth).mean()  # divides by the sum of the weights, so it does not start at 0
        ax.plot(values, color=PALETTE[number], ls=DASHES[number], label=label, marker="o" if few else None, ms=3)
        ax.set_xlabel(str(values.index.name))
    highest = 103 if "%" in title else 1.05 * ax.dataLim.ymax  # percentages keep their whole range
    ax.set(title=title, ylim=(0, highest if 0 < highest < math.inf else None))
    ax.ticklabel_format(axis="y", scilimits=(-3, 4))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    if len(lines) > 1 or "%" in title or next(iter(lines)) not in title:
        space: dict[str, Any] = dict(columnspacing=1, borderaxespad=4.4, borderpad=0)
        names = _count_name_columns(lines)
        ax.legend(fontsize=8, ncols=names, loc="upper center", bbox_to_anchor=(0.5, 0), **space)


@style()
def loss_curves(
    logs: pd.DataFrame | Sequence[dict] | str | Path | Mapping,  # log of a run (see `read_log`), or {name: log}
    smooth: float = 0.9,  # weight of the past in the running mean; 0 for none
) -> Page:
    "A panel for each loss term and the learning rate; recalls of one run share a panel, those of several do not."
    runs = {name: read_log(log) for name, log in (logs if isinstance(logs, Mapping) else {"": logs}).items()}
    panels = _plan_panels(runs)
    if not panels:
        raise CalaError("nothing to draw: the log has no numbers under loss, qtm, tbia, ctr, learning_rate or a recall")
    high = math.ceil(len(panels) / PANELS_A_ROW)
    wide = math.ceil(len(panels) / high)
    name_rows = max(math.ceil(len(lines) / _count_name_columns(lines)) for lines in panels.values())
    page = Page(figsize=(2.5 * wide, (2 + 0.17 * name_rows) * high), layout="constrained")
    for n, (title, lines) in enumerate(panels.items(), 1):
        labels = list(runs if len(runs) > 1 else lines)
        _fill_panel(page.add_subplot(high, wide, n), title, lines, labels, smooth)
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
    hits = pd.DataFrame({name: (to_ranks(of_model) <= k).numpy() for name, of_model in models.items()})
    recall: Any = hits.groupby(np.array(kinds)).mean()
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

"""A training run while it trains: curves in a notebook, lines of text in a terminal."""

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from time import monotonic

import ipywidgets

from ...data import Triplets
from ...model import CaLa
from .cards import draw_rankings
from .curves import list_losses, loss_curves, name_column, read_log
from .style import Page, write_page
from .widgets import Movable, QueryExplorer, html_image


class TrainingPanel(Movable):
    "Loss, recall and example queries of a run while it trains; lines of text where there are no widgets."

    def __init__(
        self,
        steps: int | None = None,  # of the whole run, if known
        every: float = 2,  # seconds between two drawings or lines
        say: Callable[[str], object] = print,  # is called with each line of text
        dataset: Triplets | None = None,  # opened with the model's transform, for examples
        queries: Sequence[int] = (),  # which of its triplets are ranked at every validation
    ):
        self.steps, self.every, self.say, self.dataset, self.queries = steps, every, say, dataset, queries
        self.rows, self.validations = [], []
        self.examples = None  # a figure
        self.drawn = -math.inf  # when

    def line(self) -> str:
        "The state of the run in one line."
        parts = []
        for row in self.rows[-1:]:
            if "step" in row:
                parts.append(f"step {row['step']:.0f}" + (f" of {self.steps}" if self.steps else ""))
            losses = {column: row[column] for column in list_losses(row) if math.isfinite(row.get(column, math.nan))}
            parts += [f"{name_column(column)} {loss:.3g}" for column, loss in losses.items()]
        for row in self.validations[-1:]:
            recalls = {name_column(column): value for column, value in row.items()}
            parts += [f"{name} {recalls[name]:.1f}" for name in ("R@1", "R@10", "Rs@1") if name in recalls]
        return "  ".join(parts) or "nothing logged yet"

    __repr__ = line

    def figure(self) -> Page:
        "The curves so far."
        recalls = [
            {name: value for name, value in row.items() if name == "epoch" or "recall_at" in name}
            for row in self.validations
        ]
        rows = self.rows + recalls
        return loss_curves(rows) if rows else write_page(self.line())

    def build_widget(self) -> ipywidgets.VBox:
        "Progress, line, curves, examples."
        self.progress = ipywidgets.IntProgress(max=self.steps or 1)
        self.text, self.curves, self.answers = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
        if self.rows or self.validations:
            self.fill_widget()
        return ipywidgets.VBox([self.progress, self.text, self.curves, self.answers])

    def fill_widget(self):
        "Bring progress, line, curves and examples up to date."
        if self.rows:
            self.progress.value = min(self.progress.max, int(self.rows[-1].get("step", 0)))
        self.text.value = f'<span style="white-space:pre-wrap">{escape(self.line())}</span>'
        self.curves.value = html_image(self.figure(), "training curves")
        if self.examples is not None:
            self.answers.value = html_image(self.examples, "examples")

    def refresh(self):
        "Draw into the widget if there is one; otherwise print a line."
        if "widget" in self.__dict__:
            self.update_widget()
        else:
            self.say(self.line())
        self.drawn = monotonic()

    def __call__(
        self,
        row: dict,  # of the log (loss, ...) or of a validation (recall_at1, ...)
    ):
        "Keep a row; draw or print after `every` seconds, and at every validation."
        is_validation = any("recall" in column for column in row)
        if is_validation:
            self.validations.append(row)
        else:
            self.rows.append(row)
        if is_validation or monotonic() - self.drawn > self.every:
            self.refresh()

    def see(
        self,
        model: CaLa,  # as it is now
    ):
        "Rank the example queries; `train` calls this before it hands over the row of a validation."
        if self.dataset is None or not len(self.queries):
            return
        explorer = QueryExplorer(model, self.dataset, k=5)
        answers = [explorer.pick(i)[""] for i in self.queries]
        self.examples = draw_rankings(self.dataset.gallery, answers, k=5)
        if "widget" not in self.__dict__:
            for answer in answers:
                self.say(f"  {answer.caption}: the target has rank {answer.rank:g}")

    def read(
        self,
        folder: str | Path,  # of a run: log.csv, and metrics.csv once there was a validation
    ) -> "TrainingPanel":
        "Read the tables of a run that trains elsewhere, as they are now."
        log, metrics = Path(folder, "log.csv"), Path(folder, "metrics.csv")
        self.rows = read_log(log).to_dict("records")
        self.validations = read_log(metrics).to_dict("records") if metrics.is_file() else []
        self.refresh()
        return self

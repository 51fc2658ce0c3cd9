"""Progress of a long loop: a bar in a terminal, a widget in Jupyter, and a line now and then in a log file.

tqdm draws the bars and widgets. It redraws a bar with a carriage return, which a log file keeps as one very long line.
So `LogLines` writes whole lines wherever standard error is not a terminal: a file, a pipe, or nohup.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

from tqdm.asyncio import tqdm as plain_tqdm
from tqdm.auto import tqdm
from tqdm.std import tqdm as TextBar

if TYPE_CHECKING:
    from torch import Tensor

IN_JUPYTER = tqdm is not plain_tqdm
BAR_DELAY = 1.0  # seconds until a bar or a widget appears; shorter work shows none
LINE_DELAY = 2.0  # seconds until the first line in a log; shorter work writes none
LINE_INTERVALS = 5.0, 300.0  # seconds between two lines in a log: a tenth of the time so far, within these bounds
MEGABYTE = 10**6
LARGE = 256 * MEGABYTE  # bytes; less is read, hashed or written in a moment


class LogLines(TextBar):
    "Counts as tqdm does, and writes lines instead of redrawing a bar."

    monitor_interval = 0  # no thread that redraws slow bars
    disable = True  # until the constructor is through; Ctrl-C may stop it

    def __init__(
        self,
        *args: Any,  # of tqdm
        **options: Any,  # likewise
    ):
        delay = float(os.environ.get("TQDM_DELAY", LINE_DELAY))
        super().__init__(*args, **options, miniters=1, mininterval=delay, delay=delay)

    def __iter__(self):
        with self:
            for item in self.iterable:
                yield item
                self.update()

    @staticmethod
    def status_printer(
        file: TextIO,
    ) -> Callable:
        "What tqdm calls with the text of a bar."

        def write_line(text: str):
            file.write(f"{text}\n")
            file.flush()

        return write_line

    def display(
        self,
        msg: str | None = None,  # None: the state
        pos: int | None = None,  # on which line of a terminal
    ):
        "Write a line, and decide when the next one is due."
        if msg == "":  # tqdm clears a bar with it
            return
        self.sp(str(self) if msg is None else msg)
        shortest, longest = LINE_INTERVALS
        self.mininterval = min(max(self.format_dict["elapsed"] / 10, shortest), longest)

    def close(self):
        "Write a last line, unless the work was short."
        if not self.disable and self.format_dict["elapsed"] >= self.delay and self.last_print_n < self.n:
            self.display()
        self.leave = False  # tqdm would draw the bar once more
        super().close()

    def __str__(self):
        state = self.format_dict
        elapsed, interval = state["elapsed"], self.format_interval
        unit = state["unit"].strip()
        amount = f"{self.n:,}" if self.total is None else f"{self.n:,} of {self.total:,}"
        parts = [f"{self.desc.removesuffix(': ')}: {amount}" + (f" {unit}" if unit else "")]
        if self.total and self.n >= self.total:
            parts.append(f"took {interval(elapsed)}")
        else:
            parts.append(f"{interval(elapsed)} so far")
            if self.total and self.n:
                parts.append(f"about {interval(elapsed * (self.total - self.n) / (self.n - self.initial))} left")
        if self.postfix:
            parts.append(self.postfix)
        return ", ".join(parts)


def show_progress(
    items: Iterable | None = None,  # what the loop runs over; None: the caller counts with `update`
    title: str = "",  # what is done
    total: int | None = None,  # how many items; None: `len(items)`
    unit: str = "",  # what is counted, in the plural, such as pictures
    is_hidden: bool = False,  # show nothing, for example because another process shows the same work
    is_part: bool = False,  # of other work with progress of its own: the bar disappears at its end
) -> TextBar:  # an iterator over the items, and a context manager with `update` and `set_postfix(..., refresh=False)`
    "Show how far a loop is and how long it will still take."
    options: dict[str, Any] = dict(desc=title, total=total, unit=f" {unit}" if unit else "", leave=not is_part)
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    if IN_JUPYTER or is_terminal:
        return tqdm(items, **options, disable=is_hidden, delay=BAR_DELAY, dynamic_ncols=True)
    return LogLines(items, **options, disable=is_hidden or sys.stderr is None)


def show_tensors(
    tensors: dict[str, "Tensor"],
    title: str,  # what is done with each
) -> Iterator[tuple[str, "Tensor"]]:  # name and tensor
    "The tensors of a model or of a file of weights, with progress in megabytes if they are large."
    done, total = 0, sum(tensor.nbytes for tensor in tensors.values())
    is_small = total < LARGE
    with show_progress(None, title, total // MEGABYTE, "MB", is_hidden=is_small, is_part=True) as bar:
        for name, tensor in tensors.items():
            yield name, tensor
            done += tensor.nbytes
            bar.update(done // MEGABYTE - bar.n)

"""How the project's figures look: colours, type, a page that shows itself, and boxes and texts measured in inches."""

import textwrap
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ...errors import CalaError

# Colours that colour-blind readers can tell apart (Okabe and Ito); the grey can be read on white and on black.
GREY = "#797979"
BLUE = "#0072B2"
VERMILION = "#D55E00"
ORANGE = "#E69F00"
PALETTE = [BLUE, VERMILION, "#009E73", "#CC79A7", ORANGE, "#56B4E9"]  # the last two have little contrast with white
DASHES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1))]

INKED = "text.color axes.labelcolor axes.edgecolor axes.titlecolor xtick.color ytick.color grid.color".split()
STYLE: dict[Any, Any] = {  # matplotlib calls its keys `RcKeyType`
    **dict.fromkeys(INKED, GREY),
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "font.size": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "axes.prop_cycle": cycler(color=PALETTE) + cycler(linestyle=DASHES),
    "svg.hashsalt": "cala",
}
LINE_SIZES = np.arange(10, 4.5, -0.5)  # points that a text in a box may have


@contextmanager
def style() -> Iterator[None]:
    "Context manager and decorator: figures made inside suit light and dark pages and colour-blind readers."
    with matplotlib.rc_context(STYLE):
        yield


def small_png(
    figure: Figure,
) -> bytes:
    "A figure as PNG, with a palette of 256 colours unless it holds photographs."
    full = BytesIO()
    figure.savefig(full, format="png", bbox_inches="tight", dpi=figure.dpi)
    image = Image.open(full)
    if image.getcolors(20_000) is None:
        return full.getvalue()
    small = BytesIO()
    image.quantize(256, method=Image.Quantize.FASTOCTREE).save(small, "PNG", optimize=True)
    return small.getvalue()


def notebook_output(
    thing: Any,  # its repr is the text for front ends without pictures
    figure: Figure,
) -> dict[str, str]:  # MIME type -> data
    "What a notebook stores for an object that shows itself as a figure."
    return {"image/png": b64encode(small_png(figure)).decode(), "text/plain": repr(thing)}


class Page(Figure):
    "A matplotlib figure that a notebook shows once, whether pyplot is in use or not."

    def _ipython_display_(self):
        display(notebook_output(self, self), raw=True)

    def save(
        self,
        path: str | Path,  # ends in .png or .svg; its folder is made if need be
    ) -> "Page":
        "Write the figure, and return it."
        path = Path(path)
        if path.suffix not in (".png", ".svg"):
            raise CalaError(f"{path}: a figure is written as .png or .svg; end the path with one of them")
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if path.suffix == ".svg" else None  # a date would change the bytes
        with style():
            self.savefig(path, bbox_inches="tight", metadata=metadata)
        return self


def break_lines(
    text: str,
    width: float,  # of a line, in inches
    size: float,  # of the type, in points
    most: int | None = None,  # lines; a longer text is cut and ends in dots
) -> list[str]:
    "Break a text into lines."
    columns = max(4, int(width * 72 / (0.55 * size)))  # a letter is about 0.55 of its size wide
    return textwrap.wrap(text, columns, max_lines=most, placeholder=" …") or [""]


@style()
def make_boxes(
    widths: list[float],  # of the columns, in inches
    rows: int,
    below: float = 0.2,  # room for a label under each row, in inches
) -> tuple[Page, np.ndarray]:  # and the boxes (rows, columns)
    "A page of empty boxes, one inch high, for pictures and texts."
    above, gap = 0.2, 0.12
    page_width = sum(widths) + gap * (len(widths) + 1)
    page_height = above + rows * (1 + below)
    page = Page(figsize=(page_width, page_height))
    places = {
        "width_ratios": widths,
        "left": gap / page_width,
        "right": 1 - gap / page_width,
        "top": 1 - above / page_height,
        "bottom": below / page_height,
        "wspace": gap * len(widths) / sum(widths),
        "hspace": below,
    }
    boxes = page.subplots(rows, len(widths), squeeze=False, gridspec_kw=places)
    for box in boxes.flat:
        box.set_axis_off()
    return page, boxes


@style()
def place_picture(
    box: Axes,
    picture: Image.Image,  # is made smaller, in place, so that a page of photographs stays small
    label: str = "",  # under the picture
    frame: str | None = None,  # colour; None draws a thin grey frame
):
    "Draw a picture into a box."
    picture.thumbnail((256, 256))
    box.imshow(picture)
    box.set_axis_on()
    box.grid(False)
    box.set(xticks=[], yticks=[])
    for spine in box.spines.values():
        spine.set(visible=True, color=frame or GREY, linewidth=3 if frame else 0.5)
    box.set_xlabel(label, fontsize=8, color=frame or GREY, labelpad=3, parse_math=False)


def place_text(
    box: Axes,
    text: str,
):
    "Write a text into a box, small enough to fit, over an arrow from left to right."
    extent = box.get_window_extent().transformed(box.figure.dpi_scale_trans.inverted())  # in inches
    size, most = 10.0, 1
    for size in LINE_SIZES:  # the largest type in which the text fits; if none fits, the text is cut
        most = max(1, int(0.78 * extent.height * 72 / (1.3 * size)))
        if len(break_lines(text, extent.width, size)) <= most:
            break
    lines = "\n".join(break_lines(text, extent.width, size, most))
    written = box.text(0.5, 0.61, lines, fontsize=size, color=GREY, parse_math=False, transform=box.transAxes)
    written.set(ha="center", va="center")
    true_width = max(1, written.get_window_extent().width)  # capitals are wider than the estimate of `break_lines`
    written.set_fontsize(size * min(1, extent.width * box.figure.dpi / true_width))
    arrowprops = dict(arrowstyle="-|>", color=GREY, lw=1.4)
    box.annotate("", (1, 0.1), (0, 0.1), xycoords="axes fraction", arrowprops=arrowprops)


@style()
def write_page(
    text: str,
) -> Page:
    "A page with one line of text, where there is nothing to draw."
    page = Page(figsize=(4.5, 0.6))
    box = page.subplots()
    box.set_axis_off()
    box.text(0.5, 0.5, text, ha="center", va="center")
    return page

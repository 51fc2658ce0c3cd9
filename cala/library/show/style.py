"""A recall is a number, a mistake is a picture: cards, ranking grids, curves, and things to move in a lesson."""
import textwrap
from base64 import b64encode
from io import BytesIO
from pathlib import Path

import matplotlib
from cycler import cycler
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image

from ...errors import CalaError


GREY = "#797979"

BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"

ORANGE, SKY = "#E69F00", "#56B4E9"   # 2.3 to 1 on white: only ever the fifth and sixth line

PALETTE = [BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY]

DASHES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1))]

INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color", "grid.color")

STYLE = {
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "savefig.dpi": 150, "figure.dpi": 100,
    **dict.fromkeys(INKED, GREY), "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.titlelocation": "left", "axes.titlesize": 9, "font.size": 9, "legend.frameon": False, "lines.linewidth": 1.6,
    "axes.prop_cycle": cycler(color=PALETTE) + cycler(linestyle=DASHES), "svg.hashsalt": "cala"}

def style():
    "Context manager and decorator: figures made inside are readable on light and dark and by colour-blind readers."
    return matplotlib.rc_context(STYLE)

def small_png(
    fig,  # a matplotlib Figure
):        # bytes
    "A figure as PNG, with a palette unless there are photographs in it."
    full, small = BytesIO(), BytesIO()
    fig.savefig(full, format="png", bbox_inches="tight", dpi=fig.dpi)
    image = Image.open(full)
    if image.getcolors(20_000) is None: return full.getvalue()
    image.quantize(256, method=Image.Quantize.FASTOCTREE).save(small, "PNG", optimize=True)
    return small.getvalue()

def _bundle(thing, fig):
    "A notebook's record of `thing`, whose picture is `fig`."
    return {"image/png": b64encode(small_png(fig)).decode(), "text/plain": repr(thing)}

class Page(Figure):
    "A matplotlib figure that shows itself, once, with or without pyplot."
    def _ipython_display_(self): display(_bundle(self, self), raw=True)

    def saved(self,
        path=None,  # ending in .png or .svg; None writes nothing
    ) -> "Page":    # itself
        "Write the figure if a path is given."
        if path is None: return self
        path = Path(path)
        if path.suffix not in (".png", ".svg"): raise CalaError(f"save={str(path)!r}: a figure is written as .png or .svg; end the path with one of them")
        path.parent.mkdir(parents=True, exist_ok=True)
        with style(): self.savefig(path, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)
        return self

def _lines(text, width, size, most=None):
    "`text` broken into lines of `width` inches at `size` points; more than `most` are cut, and three dots say so."
    columns = max(4, int(width * 72 / (0.55 * size)))
    return textwrap.wrap(text, columns, max_lines=most, placeholder=" …") or [""]

def _fit(text, width, height):
    "`text` broken into lines, and the size of type, so that it fits a box of `width` by `height` inches."
    for size in (10, 9.5, 9, 8.5, 8, 7.5, 7, 6.5, 6, 5.5, 5):
        lines, most = _lines(text, width, size), max(1, int(height * 72 / (1.3 * size)))
        if len(lines) <= most: return "\n".join(lines), size
    return "\n".join(_lines(text, width, size, most)), size

@style()
def _boxes(widths, rows, height, below=0.2, above=0.2, gap=0.12):
    "A page of empty boxes [row][column], all in inches; `below` each row there is room for a label."
    W, H = sum(widths) + gap * (len(widths) + 1), above + rows * (height + below)
    left = lambda c: sum(widths[:c]) + gap * (c + 1)
    place = lambda r, c: [left(c) / W, 1 - (above + (r + 1) * height + r * below) / H, widths[c] / W, height / H]
    page = Page(figsize=(W, H))
    axes = [[page.add_axes(place(r, c), frame_on=True) for c in range(len(widths))] for r in range(rows)]
    for ax in page.axes: ax.set_axis_off()
    return page, axes

"""Draw the project's figures as SVG. `python draw.py` writes the files beside this script; `python draw.py --check` compares them."""

import re
import sys
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
FONT = "'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
SMALLEST = 13  # px; no text is smaller, subscripts included

# Colours of Okabe and Ito, which colour-blind readers can tell apart: r is the reference, c the text, t the target, g the gradient.
LIGHT = dict(page="#ffffff", edge="#d0d7de", ink="#1f2328", muted="#57606a", line="#57606a", plain="#f6f8fa", frozen="#e1e5ea", cell="#ffffff",
             r="#0072b2", c="#d55e00", t="#009e73", g="#cc79a7", r_fill="#dcedf8", c_fill="#fdebdf", t_fill="#ddf3ec", g_fill="#f8eaf2")
DARK = dict(page="#14181f", edge="#3d444d", ink="#e9eef4", muted="#aab4bf", line="#9aa5b1", plain="#222933", frozen="#363e49", cell="#14181f",
            r="#56b4e9", c="#e69f00", t="#1fbf92", g="#cc79a7", r_fill="#12344a", c_fill="#43310f", t_fill="#0f3a2f", g_fill="#43293a")


# ------------------------------------------------------------------------------------------------------------------
# Helpers: text, boxes, arrows
# ------------------------------------------------------------------------------------------------------------------

def style_rules(
    colours: dict,  # LIGHT or DARK
) -> str:           # lines of CSS
    "The look of every class that the figures use."
    rules = ["text {{ fill: {ink}; }}", ".muted {{ fill: {muted}; }}", ".page {{ fill: {page}; stroke: {edge}; }}",
             ".panel {{ fill: none; stroke: {edge}; }}", ".plain {{ fill: {plain}; stroke: {line}; }}",
             ".frozen {{ fill: {frozen}; stroke: {line}; }}", ".cell {{ fill: {cell}; stroke: {line}; }}",
             ".line {{ stroke: {line}; }}", ".head {{ fill: {line}; }}"]
    for name in "rctg":
        rules.append(f".{name} {{{{ fill: {{{name}_fill}}; stroke: {{{name}}}; }}}}")
        rules.append(f".line-{name} {{{{ stroke: {{{name}}}; }}}} .head-{name} {{{{ fill: {{{name}}}; }}}}")
    return "\n".join(rule.format(**colours) for rule in rules)


# Widths of characters as shares of the font size, in DejaVu Sans, the widest of the fonts that a reader may have.
WIDTHS = {0.32: " ',./:;IJ\\ijl|·′", 0.4: "!()-[]frt²", 0.53: "\"*?_`csz–", 0.64: "$0123456789EFLPSTYabdeghknopquvxy{}√β",
          0.75: "ABCKNRUVXZα", 0.84: "#&+<=>DGHOQ^w~→←↔×−", 0.9: "M", 1.0: "%@Wm"}
WIDTH_OF = {character: width for width, characters in WIDTHS.items() for character in characters}
MARKUP = re.compile(r"([_^])\{([^}]*)\}")  # F_{r} is F with the subscript r, Q^{T} is Q with the superscript T


def text_width(
    markup: str,  # text with _{subscripts} and ^{superscripts}
    size: float,  # font size in px
    bold: bool = False,
) -> float:       # px
    "An upper estimate of the width of a line of text."
    shrink = max(SMALLEST, 0.75 * size) / size
    plain = sum(WIDTH_OF.get(character, 0.7) for character in MARKUP.sub("", markup))
    raised = sum(WIDTH_OF.get(character, 0.7) for _, inner in MARKUP.findall(markup) for character in inner)
    return size * (plain + shrink * raised) * (1.08 if bold else 1)


def spans(
    markup: str,  # text with _{subscripts} and ^{superscripts}
    size: float,  # font size in px
) -> str:         # SVG
    "The markup as tspan elements."
    small, parts, offset, end = max(SMALLEST, 0.75 * size), [], 0, 0
    for match in [*MARKUP.finditer(markup), None]:
        plain = markup[end:match.start()] if match else markup[end:]
        if plain:
            parts.append(f'<tspan dy="{-offset:g}">{escape(plain)}</tspan>' if offset else escape(plain))
            offset = 0
        if match:
            shift = 0.24 * size if match[1] == "_" else -0.4 * size
            parts.append(f'<tspan dy="{round(shift - offset, 2):g}" font-size="{small:g}">{escape(match[2])}</tspan>')
            offset, end = round(shift, 2), match.end()
    return "".join(parts)


class Box(NamedTuple):
    "A rectangle, to draw lines from and to."
    x: float
    y: float
    width: float
    height: float

    @property
    def right(self): return self.x + self.width
    @property
    def bottom(self): return self.y + self.height
    @property
    def middle_x(self): return self.x + self.width / 2
    @property
    def middle_y(self): return self.y + self.height / 2


def number(value: float) -> str:
    "A coordinate with at most one digit behind the point."
    return f"{round(value, 1):g}"


class Figure:
    "An SVG picture on a panel of its own, so that it is readable whatever the colour of the page around it."

    def __init__(self,
        width: int,          # px
        height: int,         # px
        title: str,          # a short name, for screen readers
        description: str,    # what the figure shows, for screen readers
        lit: tuple = (),     # names of the parts that stay bright; the others are dimmed; empty: all are bright
    ):
        self.width, self.height, self.title, self.description, self.lit = width, height, title, description, lit
        self.dimmed, self.bright = [], []
        self.items = self.bright

    @contextmanager
    def part(self, *names: str):
        "Elements that are added inside belong to these parts and are dimmed unless one of them is lit."
        before = self.items
        if self.lit and not set(names) & set(self.lit): self.items = self.dimmed
        yield
        self.items = before

    def add(self, element: str):
        "Append an SVG element."
        self.items.append(element)

    def text(self,
        x: float,
        y: float,             # the middle of the line's small letters
        markup: str,          # with _{subscripts} and ^{superscripts}
        size: float = 14,
        anchor: str = "middle", # start, middle or end
        bold: bool = False,
        muted: bool = False,
        room: float = None,   # px that the text must not exceed
    ):
        "A line of text."
        width = text_width(markup, size, bold)
        left = x - dict(start=0, middle=width / 2, end=width)[anchor]
        if room is not None and width > room: raise ValueError(f"{self.title}: {markup!r} needs {width:.0f} px, there are {room:.0f}")
        if left < 4 or left + width > self.width - 4: raise ValueError(f"{self.title}: {markup!r} leaves the figure")
        weight, look = ' font-weight="600"' if bold else "", ' class="muted"' if muted else ""
        place = f'x="{number(x)}" y="{number(y + 0.35 * size)}" font-size="{size:g}" text-anchor="{anchor}"'
        self.add(f"<text {place}{weight}{look}>{spans(markup, size)}</text>")

    def lines(self,
        x: float,
        y: float,           # the middle of the block
        markups: list,      # lines; one that starts with * is bold, one that starts with ~ is muted
        size: float = 14,
        anchor: str = "middle",
        room: float = None, # px that no line must exceed
        leading: float = 1.32,
    ):
        "Several lines of text, one under the other."
        top = y - (len(markups) - 1) * size * leading / 2
        for n, markup in enumerate(markups):
            mark = markup[:1] if markup[:1] in ("*", "~") else ""
            self.text(x, top + n * size * leading, markup[len(mark):], size, anchor, mark == "*", mark == "~", room)

    def box(self,
        x: float,
        y: float,
        width: float,
        height: float,
        *markups: str,       # lines of text in its middle
        look: str = "plain", # plain, frozen, cell, panel, r, c, t or g
        size: float = 14,
        radius: float = 7,
        stroke: float = 1.8,
        dashed: bool = False,
    ) -> Box:
        "A rounded rectangle with text in it; a frozen one is dashed."
        dash = ' stroke-dasharray="6 4"' if dashed or look == "frozen" else ""
        place = f'x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}" rx="{radius:g}"'
        self.add(f'<rect class="{look}" {place} stroke-width="{stroke:g}"{dash}/>')
        if len(markups) * size * 1.32 > height: raise ValueError(f"{self.title}: {markups} is too high for its box")
        self.lines(x + width / 2, y + height / 2, list(markups), size, room=width - 8)
        return Box(x, y, width, height)

    def path(self,
        *points: tuple,       # corners; the corners between are rounded
        look: str = "",       # "", r, c, t or g
        heads: str = "end",   # where arrow heads are: end, both or none
        dashed: bool = False,
        stroke: float = 2,
        radius: float = 8,
    ):
        "An arrow or a line through points."
        first, last = points[0], points[-1]
        tail = shorten(first, points[1], 7) if heads == "both" else first
        tip = shorten(last, points[-2], 7) if heads in ("end", "both") else last
        shape = round_corners([tail, *points[1:-1], tip], radius)
        suffix, dash = f"-{look}" if look else "", ' stroke-dasharray="7 4"' if dashed else ""
        self.add(f'<path class="line{suffix}" d="{shape}" fill="none" stroke-width="{stroke:g}"{dash}/>')
        if heads in ("end", "both"): self.head(points[-2], last, suffix, stroke)
        if heads == "both": self.head(points[1], first, suffix, stroke)

    def head(self, start: tuple, end: tuple, suffix: str, stroke: float):
        "An arrow head at `end` of a line from `start`."
        length = ((end[0] - start[0]) ** 2 + (end[1] - start[1]) ** 2) ** 0.5
        along = (end[0] - start[0]) / length, (end[1] - start[1]) / length
        long, wide = 7 + 1.2 * stroke, 2.6 + 1.1 * stroke
        base = end[0] - long * along[0], end[1] - long * along[1]
        corners = [end, (base[0] - wide * along[1], base[1] + wide * along[0]), (base[0] + wide * along[1], base[1] - wide * along[0])]
        self.add(f'<polygon class="head{suffix}" points="{" ".join(f"{number(x)},{number(y)}" for x, y in corners)}"/>')

    def dot(self, x: float, y: float, look: str = "", radius: float = 4):
        "A filled dot, where lines join."
        self.add(f'<circle class="head{"-" + look if look else ""}" cx="{number(x)}" cy="{number(y)}" r="{radius:g}"/>')

    def node(self, x: float, y: float, sign: str, radius: float = 13):
        "A circle with a sign in it, such as a product."
        self.add(f'<circle class="cell" cx="{number(x)}" cy="{number(y)}" r="{radius:g}" stroke-width="1.8"/>')
        self.text(x, y, sign, 16)

    def lock(self, x: float, y: float):
        "A padlock with its middle at (x, y): this part is frozen."
        self.add(f'<path class="line" d="M{number(x - 3.5)} {number(y)}v-3a3.5 3.5 0 0 1 7 0v3" fill="none" stroke-width="1.8"/>')
        self.add(f'<rect class="head" x="{number(x - 6)}" y="{number(y - 1)}" width="12" height="9" rx="1.5"/>')

    def lens(self, x: float, y: float):
        "A magnifying glass with its middle at (x, y): retrieval needs this part."
        self.add(f'<circle class="page" cx="{number(x)}" cy="{number(y)}" r="10" stroke-width="1"/>')
        self.add(f'<circle class="line" cx="{number(x - 1.5)}" cy="{number(y - 1.5)}" r="4.5" fill="none" stroke-width="2"/>')
        self.add(f'<path class="line" d="M{number(x + 1.8)} {number(y + 1.8)}l4 4" fill="none" stroke-width="2.6" stroke-linecap="round"/>')

    def matrix(self,
        x: float,
        y: float,
        width: float,
        height: float,
        name: str,           # above it
        shape: str,          # below it
        rows: str = "",      # what a row belongs to: r, c, t or ""
        columns: str = "",   # what a column belongs to
        first_row: bool = False, # mark row 0
        size: float = 16,
    ) -> Box:
        "A matrix whose left and upper edges have the colours of its rows and columns."
        self.add(f'<rect class="cell" x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}" stroke-width="1.2"/>')
        if first_row: self.add(f'<rect class="{rows or "plain"}" x="{number(x)}" y="{number(y)}" width="{number(width)}" height="11" stroke-width="1.4"/>')
        left, top = (f"line-{look}" if look else "line" for look in (rows, columns))
        if columns: self.add(f'<path class="{top}" d="M{number(x)} {number(y + 2.5)}h{number(width)}" fill="none" stroke-width="5"/>')
        if rows: self.add(f'<path class="{left}" d="M{number(x + 2.5)} {number(y)}v{number(height)}" fill="none" stroke-width="5"/>')
        if name: self.text(x + width / 2, y - 15, name, size, bold=True)
        if shape: self.text(x + width / 2, y + height + 14, shape, 13, muted=True)
        return Box(x, y, width, height)

    def scores(self, x: float, y: float, side: float, diagonal: bool = True, cells: int = 4) -> Box:
        "A matrix of scores; its diagonal is filled where the right answers are."
        step = side / cells
        self.add(f'<rect class="cell" x="{number(x)}" y="{number(y)}" width="{number(side)}" height="{number(side)}" stroke-width="1.6"/>')
        for n in range(cells if diagonal else 0):
            self.add(f'<rect class="head" x="{number(x + n * step)}" y="{number(y + n * step)}" width="{number(step)}" height="{number(step)}"/>')
        for n in range(1, cells):
            grid = f"M{number(x + n * step)} {number(y)}v{number(side)}M{number(x)} {number(y + n * step)}h{number(side)}"
            self.add(f'<path class="line" d="{grid}" fill="none" stroke-width="0.8"/>')
        return Box(x, y, side, side)

    def picture(self, x: float, y: float, side: float, look: str) -> Box:
        "A small picture: a disc for the reference r, a disc and a square for the target t."
        frame = Box(x, y, side, side)
        self.add(f'<rect class="{look}" x="{number(x)}" y="{number(y)}" width="{number(side)}" height="{number(side)}" rx="5" stroke-width="2.2"/>')
        shape, low = f"head-{look}", y + 0.62 * side
        self.add(f'<circle class="{shape}" cx="{number(x + (0.5 if look == "r" else 0.32) * side)}" cy="{number(low)}" r="{number(0.17 * side)}"/>')
        if look == "t":
            self.add(f'<rect class="{shape}" x="{number(x + 0.56 * side)}" y="{number(low - 0.16 * side)}" width="{number(0.32 * side)}" height="{number(0.32 * side)}"/>')
        return frame

    def caption(self, x: float, y: float, width: float, height: float, *words: str, size: float = 13) -> Box:
        "A modification text."
        return self.box(x, y, width, height, *words, look="c", size=size, radius=5, stroke=2.2)

    def heading(self, title: str, *lines: str):
        "The title line of the figure and lines below it."
        self.text(24, 30, title, 18, "start", bold=True)
        for n, line in enumerate(lines): self.text(24, 56 + 21 * n, line, 15, "start", muted=True)

    def svg(self) -> str:
        "The whole file."
        dark = style_rules(DARK).replace("\n", "\n  ")
        head = (f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" '
                f'viewBox="0 0 {self.width} {self.height}" role="img" aria-labelledby="title desc" font-family="{FONT}">')
        page = f'<rect class="page" x="0.5" y="0.5" width="{self.width - 1}" height="{self.height - 1}" rx="10" stroke-width="1"/>'
        dimmed = ['<g opacity="0.22">', *self.dimmed, "</g>"] if self.dimmed else []
        return "\n".join([head, f'<title id="title">{escape(self.title)}</title>', f'<desc id="desc">{escape(self.description)}</desc>',
                          "<style>", style_rules(LIGHT), "@media (prefers-color-scheme: dark) {", f"  {dark}", "}", "</style>",
                          page, *dimmed, *self.bright, "</svg>", ""])


def shorten(
    end: tuple,    # a point
    other: tuple,  # the next point of the line
    by: float,     # px
) -> tuple:        # a point
    "`end`, moved towards `other`, so that a line does not show beside the tip of its arrow head."
    length = ((other[0] - end[0]) ** 2 + (other[1] - end[1]) ** 2) ** 0.5
    share = min(by, length / 2) / length
    return end[0] + share * (other[0] - end[0]), end[1] + share * (other[1] - end[1])


def round_corners(
    points: list,   # (x, y)
    radius: float,  # px
) -> str:           # the d of an SVG path
    "A line through points whose inner corners are rounded."
    steps = [f"M{number(points[0][0])} {number(points[0][1])}"]
    for before, corner, after in zip(points, points[1:], points[2:]):
        enter, leave = shorten(corner, before, radius), shorten(corner, after, radius)
        steps.append(f"L{number(enter[0])} {number(enter[1])}Q{number(corner[0])} {number(corner[1])} {number(leave[0])} {number(leave[1])}")
    return "".join([*steps, f"L{number(points[-1][0])} {number(points[-1][1])}"])


# ------------------------------------------------------------------------------------------------------------------
# CaLa whole, and with one part lit
# ------------------------------------------------------------------------------------------------------------------

# Part: the line under the title. None is the whole figure.
LIT = {
    None: "A triplet (reference r, text c, target t) becomes three B × B score matrices, and these become one loss.",
    "encoders": "Lit: the frozen trunk and the three encoders, which turn a triplet into tokens and features.",
    "composition": "Lit: the composition frame, which scores every query (r, c) with every target t.",
    "hca": "Lit: HCA reads F_{r}, F_{c} and F_{t}; its vector is compared with F_{r}[0], the feature of the reference.",
    "tac": "Lit: TAC reads both pictures without the text; its vector is compared with F_{c}[0], the feature of the text.",
    "objectives": "Lit: three matrices of scores, and the loss that they are combined to.",
    "retrieval": "Lit: what retrieval needs. HCA and TAC are not used; t is now each of G gallery pictures.",
}


def draw_architecture(
    part: str = None,  # a key of LIT; None: everything is bright
) -> Figure:
    "CaLa from the triplet to the loss."
    description = ("From left to right: text c, reference picture r and target picture t; a frozen vision trunk that reads both pictures; "
                   "encoders E_c (text), E_m (reference and text) and E_t (reference or target alone); the composition frame, HCA and TAC; "
                   "the score matrices QTM, TBIA and CTR; the loss. The trunk is frozen. HCA and TAC exist in training only.")
    title = "CaLa: from a triplet to the loss" if part is None else f"CaLa: from a triplet to the loss, {part} lit"
    figure = Figure(900, 652, title, description, lit=(part,) if part else ())
    figure.heading("CaLa: from a triplet to the loss", LIT[part])
    row_c, row_r, row_t, row_alone = 132, 275, 440, 388  # heights of F_c, F_r, F_t and F'_r
    draw_inputs(figure, row_c, row_r, row_t, row_alone, "gallery" if part == "retrieval" else "target t")
    draw_encoders(figure, row_c, row_r, row_t, row_alone)
    draw_modules(figure, row_c, row_r, row_t, row_alone, retrieval=part == "retrieval")
    draw_architecture_legend(figure, 525)
    return figure


def draw_inputs(figure, row_c, row_r, row_t, row_alone, name_of_target):
    "The triplet and the trunk."
    with figure.part("encoders", "retrieval"):
        figure.path((92, row_c), (275, row_c), look="c")
        figure.path((92, row_r), (122, row_r), look="r")
        figure.path((92, row_t), (122, row_t), look="t")
        figure.path((206, row_t), (275, row_t), look="t")
        figure.path((206, row_r), (275, row_r), look="r")
        figure.path((228, row_c), (228, row_r - 24), (275, row_r - 24), look="c")
        figure.dot(228, row_c, "c")
        figure.caption(22, row_c - 25, 70, 50, "“add a", "square”")
        figure.text(57, row_c + 38, "text c")
        figure.picture(30, row_r - 30, 60, "r")
        figure.text(60, row_r + 44, "reference r")
        figure.picture(30, row_t - 30, 60, "t")
        figure.text(60, row_t + 44, name_of_target)
        trunk = figure.box(122, row_r - 45, 84, row_t - row_r + 90, "*trunk", "frozen", look="frozen")
        figure.lock(trunk.middle_x, trunk.middle_y - 34)
        figure.lens(trunk.right - 5, trunk.y + 3)
        figure.text(240, row_r + 14, "V_{r}", 15)
        figure.text(240, row_t + 14, "V_{t}", 15)
    with figure.part("encoders"):
        figure.path((254, row_r), (254, row_alone), (275, row_alone), look="r", dashed=True)
        figure.dot(254, row_r, "r")


def draw_encoders(figure, row_c, row_r, row_t, row_alone):
    "The three encoders and what they give."
    with figure.part("encoders", "retrieval"):
        for row, top, bottom, name, task in ((row_c, 38, 38, "*E_{c}", "text"), (row_r, 48, 30, "*E_{m}", "picture, text"),
                                             (row_t, 82, 30, "*E_{t}", "picture alone")):
            box = figure.box(275, row - top, 104, top + bottom, name, task, "trains", size=14)
            figure.lens(box.right - 5, box.y + 3)
    features = ((row_c, "c", "F_{c}", "(B, L_{c}, d)", False, ("encoders", "retrieval", "composition", "hca", "tac")),
                (row_r, "r", "F_{r}", "(B, 32, d)", False, ("encoders", "retrieval", "composition", "hca")),
                (row_alone, "r", "F′_{r}", "(B, 32, d)", True, ("encoders", "tac")),
                (row_t, "t", "F_{t}", "(B, 32, d)", False, ("encoders", "retrieval", "composition", "hca", "tac")))
    for row, look, name, shape, dashed, parts in features:
        with figure.part(*parts):
            figure.path((379, row), (BUS[name], row), look=look, dashed=dashed, heads="none")
            figure.text(424, row - 14, name, 16, bold=True)
            figure.text(424, row + 15, shape, 13, muted=True)


BUS = {"F_{c}": 492, "F_{r}": 516, "F_{t}": 540, "F′_{r}": 492}  # where the vertical lines stand


def draw_modules(figure, row_c, row_r, row_t, row_alone, retrieval):
    "Frame, HCA and TAC, the three score matrices, and the loss."
    left, right = 588, 706
    bus_c, bus_r, bus_t = BUS["F_{c}"], BUS["F_{r}"], BUS["F_{t}"]
    with figure.part("tac", "objectives"):
        figure.path((bus_c, row_c), (bus_c, row_t + 58), (730, row_t + 58), (730, row_t - 6), (762, row_t - 6), look="c")
        figure.text(650, row_t + 44, "F_{c}[0]  (B, d)", 14)
    with figure.part("hca", "objectives"):
        figure.path((bus_r, row_r), (bus_r, row_r + 58), (730, row_r + 58), (730, row_r + 18), (762, row_r + 18), look="r")
        figure.text(650, row_r + 72, "F_{r}[0]  (B, d)", 14)
    with figure.part("hca"):
        figure.path((bus_c, row_c), (bus_c, row_r - 24), (left, row_r - 24), look="c", radius=0)
        figure.path((bus_t, row_t), (bus_t, row_r + 24), (left, row_r + 24), look="t", radius=0)
        figure.path((bus_r, row_r), (left, row_r), look="r")
    with figure.part("composition", "retrieval"):
        figure.path((bus_r, row_r), (bus_r, row_c - 24), (left, row_c - 24), look="r")
        figure.path((bus_t, row_t), (bus_t, row_c + 24), (left, row_c + 24), look="t")
        figure.path((bus_c, row_c), (left, row_c), look="c")
    with figure.part("tac"):
        figure.path((bus_c, row_alone), (left, row_alone), look="r", dashed=True)
        figure.path((bus_t, row_t), (left, row_t), look="t")
    for x, y, look, parts in ((bus_c, row_c, "c", ("composition", "hca", "tac", "retrieval")), (bus_c, row_r - 24, "c", ("hca",)),
                              (bus_r, row_r, "r", ("composition", "hca", "retrieval")), (bus_t, row_t, "t", ("composition", "hca", "tac", "retrieval")),
                              (bus_t, row_r + 24, "t", ("composition", "hca", "retrieval"))):
        with figure.part(*parts): figure.dot(x, y, look)
    with figure.part("composition", "retrieval"):
        box = figure.box(left, row_c - 40, right - left, 80, "*frame", "sum, ARTEMIS", "or Combiner")
        figure.lens(box.right - 5, box.y + 3)
    with figure.part("hca"):
        figure.box(left, row_r - 40, right - left, 80, "*HCA", "hinge-based", "cross-attention", size=14)
    with figure.part("tac"):
        figure.box(left, row_t - 70, right - left, 88, "*TAC", "twin-attention", "compositor", size=14)
    rows = (row_c, "QTM", ("composition", "retrieval", "objectives")), (row_r, "TBIA", ("hca", "objectives")), (row_t - 26, "CTR", ("tac", "objectives"))
    for row, name, parts in rows:
        with figure.part(*parts):
            figure.path((right, row), (762, row))
            figure.scores(762, row - 28, 56, diagonal=not retrieval)
            figure.text(790, row - 43, "scores" if retrieval and name == "QTM" else name, 15, bold=True)
            figure.text(790, row + 43, "(B, G)" if retrieval and name == "QTM" else "(B, B)", 13, muted=True)
            if name != "QTM": figure.text(730, row - 14, "(B, d)", 13, muted=True)
    with figure.part("objectives"):
        for row, _, _ in rows: figure.path((818, row), (842, row))
        figure.box(842, row_c - 40, 46, row_t - row_c + 54, "*L", "loss")


def draw_architecture_legend(figure, y):
    "What borders, signs, colours and letters mean."
    figure.path((20, y), (880, y), heads="none", stroke=1)
    figure.box(24, y + 16, 30, 20, radius=4)
    figure.text(62, y + 26, "trains", anchor="start")
    figure.box(122, y + 16, 30, 20, look="frozen", radius=4)
    figure.lock(137, y + 25)
    figure.text(160, y + 26, "never trains", anchor="start")
    figure.lens(268, y + 26)
    figure.text(284, y + 26, "also needed for retrieval", anchor="start")
    for x, look, name, dashed in ((470, "c", "from c", False), (556, "r", "from r", False), (642, "r", "from r, for TAC", True), (789, "t", "from t", False)):
        figure.path((x, y + 26), (x + 32, y + 26), look=look, dashed=dashed, heads="none", stroke=3)
        figure.text(x + 39, y + 26, name, anchor="start")
    figure.lines(24, y + 80, ["--encoder both: E_{m}, E_{c} and E_{t} train.  multi: E_{m} and E_{c} train, E_{t} is frozen.  text: only E_{c} trains.",
                              "B triplets, L_{c} tokens of text, width d.  V: trunk tokens (B, N, w).  BLIP-2: N = 257, w = 1024, d = 768.",
                              "F[0] is token 0 of F, the feature. The frame reads features only; the frame sum has no weights."], 15, "start", leading=1.6)


# ------------------------------------------------------------------------------------------------------------------
# The three associations of a triplet
# ------------------------------------------------------------------------------------------------------------------

ASSOCIATIONS = (  # name, long name, in symbols, what is given, question, what computes it, when
    ("QTM", "query-target matching", "(r, c) → t", "rc", ["Given the picture and the text,", "which target belongs to them?"],
     "frame: sum, ARTEMIS, Combiner", "training and retrieval"),
    ("TBIA", "text-bridged image alignment", "r ↔ t, hinge c", "c", ["Given the text as a hinge,", "which pictures belong together?"],
     "module: HCA", "training only"),
    ("CTR", "complementary text reasoning", "(r, t) → c", "rt", ["Given the two pictures,", "which text explains the change?"],
     "module: TAC", "training only"),
)


def draw_associations() -> Figure:
    "Three panels with the same three nodes; an arrow head points to what is predicted."
    description = ("Three panels with the nodes reference r, text c and target t. QTM: lines from r and c join and an arrow leads to t. "
                   "TBIA: an arrow with two heads joins r and t, and c hangs on its middle as the hinge. CTR: lines from r and t join and an arrow leads to c.")
    figure = Figure(900, 480, "The three associations of a triplet", description)
    figure.heading("The three associations of a triplet", "Lines without a head bring what is given. Arrow heads point to what is predicted or aligned.")
    for n, (name, long_name, symbols, given, question, module, use) in enumerate(ASSOCIATIONS):
        x, y, width = 20 + 293 * n, 80, 274
        figure.box(x, y, width, 382, look="panel", radius=10, stroke=1.2)
        middle, top, low = x + width / 2, y + 96, y + 218
        figure.text(middle, y + 22, f"{name}:  {symbols}", 17, bold=True, room=width - 12)
        figure.text(middle, y + 46, long_name, 14, muted=True, room=width - 12)
        ends = dict(r=(x + 76, low), c=(middle, top + 26), t=(x + width - 76, low))
        join = middle, low
        for letter, end in ends.items():
            if letter in given: figure.path(end, join, look=letter, heads="none", stroke=3)
        if name == "TBIA":
            figure.path(ends["r"], ends["t"], heads="both", stroke=3)
        else:
            asked = "t" if name == "QTM" else "c"
            figure.path(join, ends[asked], stroke=3)
        figure.dot(*join, radius=6)
        figure.picture(x + 20, low - 28, 56, "r")
        figure.picture(x + width - 76, low - 28, 56, "t")
        figure.caption(middle - 62, top - 20, 124, 46, "c: “add a square", "beside the disc”")
        figure.text(x + 48, low + 42, "r: reference")
        figure.text(x + width - 48, low + 42, "t: target")
        figure.lines(middle, y + 299, question, 14, room=width - 12)
        figure.lines(middle, y + 350, [f"~{module}", f"~{use}"], 14, room=width - 12)
    return figure


# ------------------------------------------------------------------------------------------------------------------
# One layer of the Q-Former
# ------------------------------------------------------------------------------------------------------------------

def draw_qformer() -> Figure:
    "One layer of the Q-Former."
    description = ("From left to right: 32 queries and the tokens of a text go through one self-attention together. Then only the queries go through "
                   "cross-attention to the picture's tokens, in every second layer. Queries and text have separate feed-forward networks.")
    figure = Figure(900, 520, "One layer of the Q-Former", description)
    figure.heading("One layer of the Q-Former", "BLIP-2 has 12 such layers. After each block, its input is added and the sum is normalised.")
    query, text, half = 225, 345, 38
    figure.box(24, query - half, 104, 2 * half, "*queries", "(B, 32, d)", look="cell")
    figure.box(24, text - half, 104, 2 * half, "*text tokens", "(B, L, d)", look="c")
    attention = figure.box(162, query - half, 150, text - query + 2 * half, "*self-attention", "queries and text", "attend to", "each other;", "nothing attends", "to padding")
    cross = figure.box(362, query - half, 184, 2 * half, "*cross-attention", "only queries; only in", "layers 0, 2, 4, 6, 8, 10")
    picture = figure.box(362, 94, 184, 56, "*picture tokens", "(B, N, w)", look="frozen")
    first = figure.box(594, query - half, 156, 2 * half, "*feed-forward", "for queries only,", "separate weights")
    second = figure.box(594, text - half, 156, 2 * half, "*feed-forward", "for text only,", "separate weights")
    figure.lock(picture.x + 22, picture.middle_y)
    figure.text(picture.right + 10, picture.middle_y, "from the frozen trunk", 14, "start", muted=True)
    figure.path((128, query), (attention.x, query))
    figure.path((128, text), (attention.x, text), look="c")
    figure.path((attention.right, query), (cross.x, query))
    figure.path((picture.middle_x, picture.bottom), (cross.middle_x, cross.y))
    figure.text(picture.middle_x + 10, (picture.bottom + cross.y) / 2, "keys, values", 13, "start", muted=True)
    figure.path((cross.right, query), (first.x, query))
    figure.path((attention.right, text), (second.x, text), look="c")
    figure.text((attention.right + second.x) / 2, text + 16, "no cross-attention for text tokens", 13, muted=True)
    figure.path((first.right, query), (790, query))
    figure.path((second.right, text), (790, text), look="c")
    figure.box(790, query - half, 92, 2 * half, "*queries", "(B, 32, d)", look="cell")
    figure.box(790, text - half, 92, 2 * half, "*text", "(B, L, d)", look="c")
    figure.path((20, 408), (880, 408), heads="none", stroke=1)
    figure.lines(24, 462, ["*Three encoders of this architecture, each with its own weights:",
                           "E_{t} reads a picture: queries and picture tokens, no text. Its output is F_{t} or F′_{r} (B, 32, d).",
                           "E_{c} reads a text: text tokens only, no queries, no cross-attention. Its output is F_{c} (B, L_{c}, d).",
                           "E_{m} reads a picture with a text: all of the above. The outputs of its queries are F_{r} (B, 32, d)."], 15, "start", leading=1.5)
    return figure


# ------------------------------------------------------------------------------------------------------------------
# HCA and TAC
# ------------------------------------------------------------------------------------------------------------------

def draw_hca() -> Figure:
    "The matrices of hinge-based cross-attention."
    description = ("Linear layers make Q from F_r, K from F_c, and K' and V from F_t. A is Q times K transposed, B is K times K' transposed, both divided "
                   "by the square root of d. P is the softmax of A times B over the target tokens, with dropout. Row 0 of P times V is the output.")
    figure = Figure(900, 640, "HCA: hinge-based cross-attention", description)
    figure.heading("HCA: hinge-based cross-attention", "Shapes of one triplet with BLIP-2; a batch adds an axis in front.")
    figure.text(560, 96, "Left edge: rows. Upper edge: columns.", 14, "start")
    for n, (look, name) in enumerate((("r", "tokens of reference and text"), ("c", "tokens of the text"), ("t", "tokens of the target"))):
        figure.path((560, 122 + 22 * n), (590, 122 + 22 * n), look=look, heads="none", stroke=5)
        figure.text(600, 122 + 22 * n, name, 14, "start", muted=True)
    made = draw_hca_inputs(figure)
    draw_hca_products(figure, *made)
    figure.path((20, 545), (880, 545), heads="none", stroke=1)
    figure.lines(24, 593, ["There is no softmax on A or B alone, no residual and no norm:  A B = Q K^{T} K K′^{T} / d.",
                           "So the Gram matrix K^{T} K of the text (d, d) is the metric between the reference's queries and the target's keys.",
                           "Scores:  z_{tbia}(i, j) = 10 · HCA_{i} · F_{r}[0]_{j}.  Only row 0 of Q is needed for the output."], 15, "start", leading=1.6)
    return figure


def draw_hca_inputs(figure):
    "F_r, F_c and F_t, the linear layers, and the boxes of Q, K, K' and V."
    side, low = 58, 42
    sources = {look: figure.matrix(30, middle - height / 2, side, height, name, shape, rows=look) for look, name, shape, middle, height in (
        ("r", "F_{r}", "(32, d)", 140, side), ("c", "F_{c}", "(L_{c}, d)", 250, low), ("t", "F_{t}", "(32, d)", 415, side))}
    made = []
    for look, layer, name, shape, middle, height in (("r", "W_{q}", "Q", "(32, d)", 140, side), ("c", "W_{c}", "K", "(L_{c}, d)", 250, low),
                                                     ("t", "W_{t}", "K′", "(32, d)", 360, side), ("t", "W_{v}", "V", "(32, d)", 470, side)):
        source = sources[look]
        bend = [] if look != "t" else [(108, source.middle_y), (108, middle)]
        figure.path((source.right, source.middle_y), *bend, (130, middle), look=look)
        layer = figure.box(130, middle - 17, 48, 34, layer, size=16)
        figure.path((layer.right, middle), (216, middle), look=look)
        made.append(figure.matrix(216, middle - height / 2, side, height, name, shape, rows=look))
    return made


def draw_hca_products(figure, q, k, k_target, v):
    "A and B, their product, the softmax, and the output."
    side, low, link_a, link_b, both = 58, 42, 190, 310, 250
    for source, shift, node_y, above, look in ((q, 0, link_a, True, "r"), (k, -9, link_a, False, "c"), (k, 9, link_b, True, "c"), (k_target, 0, link_b, False, "t")):
        y = source.middle_y + shift
        figure.path((source.right, y), (322, y), (322, node_y + (-13 if above else 13)), look=look)
    for y in (link_a, link_b):
        figure.node(322, y, "×")
        figure.path((335, y), (386, y))
        figure.text(359, y - 13, "/ √d", 13, muted=True)
    a = figure.matrix(386, link_a - side / 2, low, side, "A", "", rows="r", columns="c")
    b = figure.matrix(386, link_b - low / 2, side, low, "", "", rows="c", columns="t")
    figure.text(a.right + 8, link_a - 10, "(32, L_{c})", 13, "start", muted=True)
    figure.text(b.middle_x, b.bottom + 18, "B", 16, bold=True)
    figure.text(b.middle_x, b.bottom + 37, "(L_{c}, 32)", 13, muted=True)
    figure.path((a.right, link_a + 8), (502, link_a + 8), (502, both - 13))
    figure.path((b.right, link_b), (502, link_b), (502, both + 13))
    figure.node(502, both, "×")
    softmax = figure.box(530, both - 42, 124, 84, "*softmax of A B", "over the target", "tokens;", "dropout 0.1", size=13)
    figure.path((515, both), (softmax.x, both))
    p = figure.matrix(682, both - side / 2, side, side, "P", "(32, 32)", rows="r", columns="t")
    figure.path((softmax.right, both), (p.x, both))
    figure.node(770, both, "×")
    figure.path((p.right, both), (757, both))
    figure.path((v.right, v.middle_y), (770, v.middle_y), (770, both + 13), look="t")
    product = figure.matrix(812, both - side / 2, side, side, "P V", "", rows="r", first_row=True)
    figure.path((783, both), (product.x, both))
    figure.path((product.right, product.y + 5), (884, product.y + 5), (884, 385), (870, 385), look="r")
    figure.text(product.middle_x, product.bottom + 14, "(32, d)", 13, muted=True)
    figure.add(f'<rect class="r" x="812" y="379" width="58" height="11" stroke-width="1.4"/>')
    figure.text(841, 361, "row 0", 13, muted=True)
    figure.text(841, 408, "output", 15, bold=True)
    figure.text(841, 428, "(d)", 13, muted=True)


def draw_tac() -> Figure:
    "The four passes of both attentions of the twin-attention compositor."
    description = ("Two attentions, M1 and M2. M1 has F'_r as query and F_t as key and value; three more passes have the same query and the last output as "
                   "key and value. M2 is the mirror image with F_t as query. The output is the mean of token 0 of both results.")
    figure = Figure(900, 590, "TAC: twin-attention compositor", description)
    figure.heading("TAC: twin-attention compositor", "Shapes of one triplet with BLIP-2. Every block M_{1} has the same weights, and so has every block M_{2}.")
    side, upper, lower = 58, 200, 380
    reference = figure.matrix(30, 112, side, side, "F′_{r}", "(32, d)", rows="r")
    target = figure.matrix(30, 410, side, side, "F_{t}", "(32, d)", rows="t")
    starts = [220 + 136 * n for n in range(4)]
    figure.path((reference.right, reference.middle_y - 8), (starts[3] + 45, reference.middle_y - 8), (starts[3] + 45, upper - 32), look="r", dashed=True)
    figure.path((target.right, target.middle_y + 8), (starts[3] + 45, target.middle_y + 8), (starts[3] + 45, lower + 32), look="t")
    figure.path((reference.right, reference.middle_y + 12), (150, reference.middle_y + 12), (150, lower), (starts[0], lower), look="r", dashed=True)
    figure.path((target.right, target.middle_y - 12), (178, target.middle_y - 12), (178, upper), (starts[0], upper), look="t")
    for n, x in enumerate(starts):
        for row, name, look, source, out in ((upper, "M_{1}", "r", reference.middle_y - 8, -1), (lower, "M_{2}", "t", target.middle_y + 8, 1)):
            if n < 3:
                figure.path((x + 45, source), (x + 45, row + 32 * out), look=look, dashed=look == "r")
                figure.dot(x + 45, source, look)
            figure.box(x, row - 32, 90, 64, f"*{name}", f"pass {n + 1}")
            figure.text(x + 53, row + 46 * out, "q", 13, "start", muted=True)
            if n < 3:
                figure.path((x + 90, row), (x + 136, row))
                figure.text(x + 113, row - 14, "o_{1}" if row == upper else "o_{2}", 14)
    for row in (upper, lower): figure.text(200, row - 14, "k, v", 13, muted=True)
    first = figure.matrix(764, upper - side / 2, side, side, "o_{1}", "(32, d)", rows="r", first_row=True)
    second = figure.matrix(764, lower - side / 2, side, side, "o_{2}", "(32, d)", rows="t", first_row=True)
    for row in (upper, lower): figure.path((starts[3] + 90, row), (764, row))
    mean = figure.box(758, 272, 70, 36, "*mean")
    figure.path((first.right, first.y + 5), (846, first.y + 5), (846, 281), (mean.right, 281), look="r")
    figure.path((second.right, second.y + 5), (846, second.y + 5), (846, 299), (mean.right, 299), look="t")
    figure.text(853, 240, "row 0", 13, "start", muted=True)
    figure.text(853, 326, "row 0", 13, "start", muted=True)
    figure.path((mean.x, 290), (680, 290))
    figure.add('<rect class="plain" x="618" y="284" width="58" height="11" stroke-width="1.4"/>')
    figure.text(606, 290, "output (d)", 15, "end", bold=True)
    figure.path((20, 498), (880, 498), heads="none", stroke=1)
    figure.lines(24, 544, ["A pass is attention with one head:  softmax(q k^{T} / √d) v  with projections of q, k and v and of the result.",
                           "There is no dropout, no residual, no norm and no feed-forward network.",
                           "Output:  TAC = (o_{1}[0] + o_{2}[0]) / 2.   Scores:  z_{ctr}(i, j) = 10 · F_{c}[0]_{i} · TAC_{j}."], 15, "start", leading=1.6)
    return figure


# ------------------------------------------------------------------------------------------------------------------
# A training step, the cache, and the states of a run
# ------------------------------------------------------------------------------------------------------------------

def draw_step() -> Figure:
    "The data flow of a training step."
    description = ("A batch of texts and pictures goes through the frozen trunk and through embed, which gives five vectors a triplet: f_r, f_c, f_t, HCA and TAC. "
                   "compare makes three B by B score matrices of them, lose makes one loss. Gradients flow back as far as the encoders, not into the trunk.")
    figure = Figure(900, 575, "The data flow of a training step", description)
    figure.heading("The data flow of a training step")
    top, bottom = 116, 410
    row_c, row_r, row_t = 164, 262, 358
    draw_bracket(figure, 24, 505, 76, "each triplet by itself: row i depends on triplet i only")
    draw_bracket(figure, 565, 880, 76, "all triplets of the batch together")
    figure.box(24, row_c - 30, 112, 60, "*texts c", "B sentences", look="c")
    figure.box(24, row_r - 30, 112, 60, "*references r", "(B, 3, H, W)", look="r")
    figure.box(24, row_t - 30, 112, 60, "*targets t", "(B, 3, H, W)", look="t")
    trunk = figure.box(172, row_r - 44, 78, row_t - row_r + 88, "*trunk", "frozen", look="frozen")
    figure.lock(trunk.middle_x, trunk.middle_y - 32)
    embed = figure.box(338, top, 112, bottom - top, "*embed", "E_{m}, E_{c}, E_{t}", "HCA, TAC")
    figure.path((136, row_c), (embed.x, row_c), look="c")
    for row, look, name in ((row_r, "r", "V_{r}"), (row_t, "t", "V_{t}")):
        figure.path((136, row), (trunk.x, row), look=look)
        figure.path((trunk.right, row), (embed.x, row), look=look)
        figure.text((trunk.right + embed.x) / 2, row - 14, name, 16, bold=True)
        figure.text((trunk.right + embed.x) / 2, row + 15, "(B, N, w)", 13, muted=True)
    compare = figure.box(565, top, 108, bottom - top, "*compare", "frame (QTM)", "and products", "(TBIA, CTR)", size=13)
    for n, (name, look) in enumerate((("f_{r}", "r"), ("f_{c}", "c"), ("f_{t}", "t"), ("HCA", ""), ("TAC", ""))):
        row = top + 40 + 54 * n
        figure.path((embed.right, row), (compare.x, row), look=look)
        figure.text(500, row - 14, f"{name}  (B, d)", 14)
    lose = figure.box(800, top, 80, bottom - top, "*lose", "objective:", "released", "or paper")
    for row, name in ((170, "z_{qtm}"), (266, "z_{tbia}"), (362, "z_{ctr}")):
        figure.path((compare.right, row), (712, row))
        figure.scores(712, row - 22, 44)
        figure.path((756, row), (lose.x, row))
        figure.text(734, row - 35, name, 15, bold=True)
        figure.text(734, row + 35, "(B, B)", 13, muted=True)
    figure.path((840, bottom), (840, 462), (embed.middle_x, 462), (embed.middle_x, bottom), look="g", stroke=3.5)
    figure.path((compare.middle_x, 462), (compare.middle_x, bottom), look="g", stroke=3.5)
    figure.path((embed.middle_x, 462), (trunk.middle_x + 6, 462), look="g", stroke=3.5, heads="none", dashed=True)
    figure.path((trunk.middle_x, 448), (trunk.middle_x, 476), heads="none", stroke=4)
    figure.text(744, 446, "backward from the loss L", 14)
    figure.text(198, 462, "stops: trunk is frozen", 14, "end", muted=True)
    figure.path((20, 496), (880, 496), heads="none", stroke=1)
    figure.lines(24, 536, ["f_{r} = F_{r}[0],  f_{c} = F_{c}[0],  f_{t} = F_{t}[0].  The right answer of row i is on the diagonal; the loss is a cross-entropy.",
                           "After backward, AdamW updates the encoders that train, HCA, TAC and the frame."], 15, "start", leading=1.7)
    return figure


def draw_bracket(figure, left, right, y, name):
    "A horizontal bracket with a name above it."
    figure.path((left, y + 22), (left, y + 14), (right, y + 14), (right, y + 22), heads="none", stroke=1.6, radius=4)
    figure.text((left + right) / 2, y, name, 14)


def draw_cylinder(figure, x, y, width, height, *markups):
    "A disk with text on it."
    cap = 11
    body = f"M{x} {y + cap}v{height - 2 * cap}a{width / 2:g} {cap} 0 0 0 {width} 0v{2 * cap - height}"
    figure.add(f'<path class="plain" d="{body}" stroke-width="1.8"/>')
    figure.add(f'<ellipse class="plain" cx="{x + width / 2:g}" cy="{y + cap}" rx="{width / 2:g}" ry="{cap}" stroke-width="1.8"/>')
    figure.lines(x + width / 2, y + height / 2 + cap / 2, list(markups), 14, room=width - 8)
    return Box(x, y, width, height)


def draw_cache() -> Figure:
    "What is computed once, and what a training step reads."
    description = ("Left: once for every picture, transform and frozen trunk make tokens, which are written to disk in shards of 64 pictures. "
                   "Where the image encoder E_t is frozen, its output is written, too. Right: a training step reads tokens and embeddings, not pictures.")
    figure = Figure(900, 470, "The cache: pictures are read once, training steps read tokens", description)
    figure.heading("The cache: pictures are read once, training steps read tokens")
    upper, lower = 160, 312
    figure.box(20, 62, 396, 330, look="panel", radius=10, stroke=1.2)
    figure.box(612, 62, 268, 330, look="panel", radius=10, stroke=1.2)
    figure.text(36, 84, "Once for every picture", 15, "start", bold=True)
    figure.text(628, 84, "Every training step", 15, "start", bold=True)
    figure.picture(40, upper - 34, 48, "t")
    figure.picture(50, upper - 22, 48, "r")
    figure.text(72, upper + 46, "pictures")
    transform = figure.box(128, upper - 30, 92, 60, "*transform")
    trunk = figure.box(268, upper - 40, 92, 80, "*trunk", "frozen", look="frozen")
    figure.path((98, upper), (transform.x, upper))
    figure.path((transform.right, upper), (trunk.x, upper))
    figure.lock(trunk.right - 12, trunk.y + 12)
    tokens = draw_cylinder(figure, 440, upper - 56, 148, 112, "*token shards", "64 pictures a file", "(64, N, w)")
    figure.path((trunk.right, upper), (tokens.x, upper))
    image = figure.box(268, lower - 40, 92, 80, "*E_{t}", "frozen", look="frozen")
    figure.lock(image.right - 12, image.y + 12)
    figure.path((trunk.middle_x, trunk.bottom), (image.middle_x, image.y))
    figure.lines(244, lower, ["*constant targets", "only with --cache auto", "and --encoder multi", "or --encoder text"], 14, "end")
    targets = draw_cylinder(figure, 440, lower - 56, 148, 112, "*target shards", "64 pictures a file", "(64, 32, d)")
    figure.path((image.right, lower), (targets.x, lower))
    step = figure.box(740, upper - 44, 128, lower - upper + 88, "*training step", "E_{m}, E_{c}, frame,", "HCA, TAC, loss;", "E_{t} unless its", "output is on disk", size=13)
    figure.path((tokens.right, upper), (step.x, upper))
    figure.path((targets.right, lower), (step.x, lower))
    figure.text(668, upper - 15, "V_{r}, V_{t}", 16, bold=True)
    figure.text(668, upper + 16, "(B, N, w)", 13, muted=True)
    figure.text(668, lower - 15, "F′_{r}, F_{t}", 16, bold=True)
    figure.text(668, lower + 16, "(B, 32, d)", 13, muted=True)
    figure.lines(24, 430, ["The trunk is frozen and there is no augmentation, so its output for a picture is a constant.",
                           "Where target shards are read, V_{t} is not needed. Texts are short and are read from the annotations."], 15, "start", leading=1.7)
    return figure


def draw_run_states() -> Figure:
    "The states of a run and what leads from one to another."
    description = ("A new run trains an epoch, validates if that is due, saves, and goes on until it is finished. It stops early by Ctrl-C or SIGTERM, by a loss that is "
                   "not finite, or because it is killed. A stopped run is resumed from last/ and trains on; a finished one with a larger number of epochs.")
    figure = Figure(900, 580, "The states of a run", description)
    figure.heading("The states of a run", "A run is what cala-train does in one folder, from its first epoch to its last.")
    y, height = 178, 54
    new = figure.box(24, y, 92, height, "*new", radius=24)
    training = figure.box(186, y, 140, height, "*training", "an epoch", radius=24)
    validating = figure.box(416, y, 122, height, "*validating", radius=24)
    saved = figure.box(604, y, 136, height, "*saved", "last/, best/", radius=24)
    finished = figure.box(802, y, 82, height, "*finished", radius=24)
    middle = y + height / 2
    for start, end in ((new, training), (training, validating), (validating, saved), (saved, finished)): figure.path((start.right, middle), (end.x, middle))
    figure.text(151, middle - 14, "starts", 13)
    figure.lines(371, middle - 24, ["epoch", "is done"], 13)
    figure.text(571, middle - 14, "score", 13)
    figure.lines(771, middle - 24, ["no epoch", "remains"], 13)
    figure.path((272, y), (272, 138), (644, 138), (644, y))
    figure.text(458, 124, "epoch is done, validation is not due", 13)
    figure.path((700, y), (700, 96), (228, 96), (228, y))
    figure.text(464, 82, "epochs remain", 13)
    draw_stops(figure, training, validating, finished)
    figure.lines(24, 538, ["best/ holds the weights with the best validation score, last/ all that a run needs to go on bit for bit.",
                           "With --save-steps N, last/ is saved every N steps of an epoch, too."], 15, "start", leading=1.7)
    return figure


def draw_stops(figure, training, validating, finished):
    "The three ways to stop early, and how a run goes on."
    line, top, height = 258, 282, 92
    causes = []
    for x, width, markups in ((163, 226, ("*Ctrl-C or SIGTERM", "the step in progress ends, or", "validation stops at once;", "then last/ is saved")),
                              (403, 236, ("*loss or gradient not finite", "last/ is saved without this step;", "nonfinite.json names the batch")),
                              (653, 178, ("*killed", "SIGKILL, power failure:", "last/ stays as it was"))):
        causes.append(figure.box(x, top, width, height, *markups, look="cell", size=13))
    first, second, third = (cause.middle_x for cause in causes)
    figure.path((first, training.bottom), (first, top))
    figure.path((validating.middle_x, validating.bottom), (validating.middle_x, line), heads="none")
    figure.path((first, line), (third, line), (third, top))
    figure.path((second, line), (second, top))
    for x in (first, validating.middle_x, second): figure.dot(x, line)
    figure.text(624, line - 14, "the run stops early", 13)
    stopped = figure.box(456, 424, 130, 46, "*stopped", radius=22)
    resumed = figure.box(24, 424, 110, 46, "*resumed", radius=22)
    for cause in (causes[0], causes[2]): figure.path((cause.middle_x, top + height), (cause.middle_x, 398), (stopped.middle_x, 398), (stopped.middle_x, 424))
    figure.path((causes[1].middle_x, top + height), (stopped.middle_x, 424))
    figure.path((stopped.x, 447), (resumed.right, 447))
    figure.text(290, 433, "--resume: weights, optimizer, schedule,", 13)
    figure.text(290, 462, "random generators, place in the epoch", 13)
    figure.path((resumed.middle_x, resumed.y), (resumed.middle_x, line - 4), (216, line - 4), (216, training.bottom))
    figure.path((850, finished.bottom), (850, 498), (resumed.middle_x, 498), (resumed.middle_x, resumed.bottom))
    figure.text(640, 484, "--resume with a larger --num-epochs", 13)


# ------------------------------------------------------------------------------------------------------------------
# The wings of the project
# ------------------------------------------------------------------------------------------------------------------

LESSONS = (  # number, lesson and module, what the module holds
    ("00", "task", ""), ("01", "data", "data"), ("02", "contrast", "contrast"), ("03", "qformer", "qformer"), ("04", "encoders", "encoders"),
    ("05", "composition", "composition"), ("06", "associations", "associations"), ("07", "objectives", "objectives"), ("08", "model", "model"),
    ("09", "retrieval", "retrieval"), ("10", "training", "training"), ("11", "findings", ""))
BACKBONES = ("blip2", "clip", "contract")
LIBRARY = ("atlas", "audit", "cache", "checkpoint", "cli", "files", "gallery", "gradcache", "loading", "pictures", "probes", "processes", "released", "resume",
           "show", "submission", "trackers", "worlds")
SCRIPTS = ("ablation", "benchmark", "cache", "check", "cirr_submission", "combiner", "demo", "search", "train", "validate")


def draw_wings() -> Figure:
    "The four wings and their modules."
    description = (f"Four columns: method, backbones, library and scripts. Every column imports only from the columns to its left. "
                   f"The lessons of the method in reading order: {', '.join(f'{number} {name}' for number, name, _ in LESSONS)}. "
                   f"Backbones: {', '.join(BACKBONES)}. Library: {', '.join(LIBRARY)}. Scripts: {', '.join(SCRIPTS)}.")
    figure = Figure(900, 632, "The four wings of the project", description)
    figure.heading("The four wings of the project", "An arrow means: imports from. A wing imports only from wings to its left.",
                   "The lessons of the method are in reading order; a dashed lesson has no module.")
    columns = (24, 200, "method", "nbs/method", "cala/*.py"), (266, 150, "backbones", "nbs/backbones", "cala/backbones"), \
        (458, 238, "library", "nbs/library", "cala/library"), (738, 142, "scripts", "nbs/commands", "cala/scripts")
    top, first, pitch = 114, 200, 34
    for n, (x, width, name, notebooks, package) in enumerate(columns):
        figure.box(x, top, width, 500, look="panel", radius=10, stroke=1.2)
        figure.text(x + width / 2, top + 24, name, 17, bold=True)
        figure.lines(x + width / 2, top + 55, [f"~{notebooks}", f"~{package}"], 13, room=width - 8)
        if n: figure.path((x, top + 24), (columns[n - 1][0] + columns[n - 1][1], top + 24), stroke=3)
    for n, (number, name, module) in enumerate(LESSONS):
        figure.box(60, first + pitch * n, 152, 28, f"{number}  {name}", look="cell", dashed=not module, stroke=1.2)
    figure.path((42, first + 2), (42, first + pitch * 11 + 26), stroke=2.4)
    for n, name in enumerate(BACKBONES): figure.box(280, first + pitch * n, 122, 28, name, look="cell", stroke=1.2)
    for n, name in enumerate(LIBRARY): figure.box(470 + 112 * (n % 2), first + pitch * (n // 2), 102, 28, name, look="cell", stroke=1.2)
    for n, name in enumerate(SCRIPTS): figure.box(746, first + pitch * n, 126, 28, name, look="cell", stroke=1.2)
    return figure


# ------------------------------------------------------------------------------------------------------------------
# All figures
# ------------------------------------------------------------------------------------------------------------------

def all_figures() -> dict:  # file name -> Figure
    "Every figure by the name of its file."
    figures = {"architecture.svg": draw_architecture()}
    figures |= {f"architecture_{part}.svg": draw_architecture(part) for part in LIT if part}
    figures |= {"associations.svg": draw_associations(), "qformer.svg": draw_qformer(), "hca.svg": draw_hca(), "tac.svg": draw_tac(),
                "step.svg": draw_step(), "cache.svg": draw_cache(), "run_states.svg": draw_run_states(), "wings.svg": draw_wings()}
    return figures


def main(check: bool) -> int:
    "Write all files, or with `check` compare them; 1 if a file differs."
    stale = []
    for name, figure in all_figures().items():
        path, new = HERE / name, figure.svg().encode()
        if check and (not path.exists() or path.read_bytes() != new): stale.append(name)
        if not check: path.write_bytes(new)
    if stale: print(f"these figures are not what draw.py draws: {', '.join(stale)}; run python nbs/images/draw.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__": sys.exit(main("--check" in sys.argv[1:]))

"""Draw the project's figures as SVG.

`python draw.py` writes the files into the folder of this script. `python draw.py --check` compares them with what it
would write, and exits with 1 if one differs.
"""

import csv
import math
import re
import sys
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
FONT = "'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
SMALLEST = 13  # px; no text is smaller, subscripts included

# The colours of Okabe and Ito, which colour-blind readers can tell apart:
# r is the reference, c the text, t the target, g the gradient.
LIGHT = dict(
    page="#ffffff",
    edge="#d0d7de",
    ink="#1f2328",
    muted="#57606a",
    line="#57606a",
    plain="#f6f8fa",
    frozen="#e1e5ea",
    cell="#ffffff",
    r="#0072b2",
    c="#d55e00",
    t="#009e73",
    g="#cc79a7",
    r_fill="#dcedf8",
    c_fill="#fdebdf",
    t_fill="#ddf3ec",
    g_fill="#f8eaf2",
)
DARK = dict(
    page="#14181f",
    edge="#3d444d",
    ink="#e9eef4",
    muted="#aab4bf",
    line="#9aa5b1",
    plain="#222933",
    frozen="#363e49",
    cell="#14181f",
    r="#56b4e9",
    c="#e69f00",
    t="#1fbf92",
    g="#cc79a7",
    r_fill="#12344a",
    c_fill="#43310f",
    t_fill="#0f3a2f",
    g_fill="#43293a",
)


# ------------------------------------------------------------------------------------------------------------------
# Helpers: text, boxes, arrows
# ------------------------------------------------------------------------------------------------------------------


def style_rules(
    colours: dict,  # LIGHT or DARK
) -> str:  # lines of CSS
    "The look of every class that the figures use."
    rules = [
        "text {{ fill: {ink}; }}",
        ".muted {{ fill: {muted}; }}",
        ".page {{ fill: {page}; stroke: {edge}; }}",
        ".panel {{ fill: none; stroke: {edge}; }}",
        ".line {{ stroke: {line}; }}",
        ".head {{ fill: {line}; }}",
    ]
    for name in ("plain", "frozen", "cell"):
        rules.append(f".{name} {{{{ fill: {{{name}}}; stroke: {{line}}; }}}}")
    for name in ("r", "c", "t", "g"):
        rules.append(f".{name} {{{{ fill: {{{name}_fill}}; stroke: {{{name}}}; }}}}")
        rules.append(f".line-{name} {{{{ stroke: {{{name}}}; }}}}")
        rules.append(f".head-{name} {{{{ fill: {{{name}}}; }}}}")
    return "\n".join(rule.format(**colours) for rule in rules)


# Widths of characters as shares of the font size, in DejaVu Sans, the widest of the fonts that a reader may have.
WIDTHS = {
    0.32: " ',./:;IJ\\ijl|·′",
    0.4: "!()-[]frt²",
    0.53: '"*?_`csz–',
    0.64: "$0123456789EFLPSTYabdeghknopquvxy{}√β",
    0.75: "ABCKNRUVXZα",
    0.84: "#&+<=>DGHOQ^w~→←↔×−",
    0.9: "M",
    1.0: "%@Wm",
}
WIDTH_OF = {character: width for width, characters in WIDTHS.items() for character in characters}
MARKUP = re.compile(r"([_^])\{([^}]*)\}")  # F_{r} is F with the subscript r, Q^{T} is Q with the superscript T


def text_width(
    markup: str,  # text with _{subscripts} and ^{superscripts}
    size: float,  # font size in px
    bold: bool = False,
) -> float:  # px
    "An upper estimate of the width of a line of text."
    shrink = max(SMALLEST, 0.75 * size) / size
    plain = sum(WIDTH_OF.get(character, 0.7) for character in MARKUP.sub("", markup))
    raised = sum(WIDTH_OF.get(character, 0.7) for _, inner in MARKUP.findall(markup) for character in inner)
    return size * (plain + shrink * raised) * (1.08 if bold else 1)


def spans(
    markup: str,  # text with _{subscripts} and ^{superscripts}
    size: float,  # font size in px
) -> str:  # SVG
    "The markup as tspan elements."
    small, parts, offset, end = max(SMALLEST, 0.75 * size), [], 0, 0
    for match in [*MARKUP.finditer(markup), None]:
        plain = markup[end : match.start()] if match else markup[end:]
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
    def right(self):
        return self.x + self.width

    @property
    def bottom(self):
        return self.y + self.height

    @property
    def middle_x(self):
        return self.x + self.width / 2

    @property
    def middle_y(self):
        return self.y + self.height / 2


def format_value(
    value,  # a number or a text
) -> str:
    "A number with at most one digit behind the point; a text as it is."
    return value if isinstance(value, str) else f"{round(value, 1):g}"


class Figure:
    "An SVG picture on a panel of its own, so that it is readable whatever the colour of the page around it."

    def __init__(
        self,
        width: int,  # px
        height: int,  # px
        title: str,  # a short name, for screen readers
        description: str,  # what the figure shows, for screen readers
        lit: tuple = (),  # names of the parts that stay bright; the others are dimmed; empty: all are bright
    ):
        self.width, self.height, self.title, self.description, self.lit = width, height, title, description, lit
        self.dimmed, self.bright = [], []
        self.items = self.bright

    @contextmanager
    def part(self, *names: str):
        "Elements that are added inside belong to these parts and are dimmed unless one of them is lit."
        before = self.items
        if self.lit and not set(names) & set(self.lit):
            self.items = self.dimmed
        yield
        self.items = before

    def shape(
        self,
        tag: str,  # rect, circle, path ...
        look: str,  # its class
        **attributes,  # of the element; an underscore stands for a hyphen
    ):
        "Append an SVG element."
        pairs = [f'{name.replace("_", "-")}="{format_value(value)}"' for name, value in attributes.items()]
        self.items.append(f'<{tag} class="{look}" {" ".join(pairs)}/>')

    def text(
        self,
        x: float,
        y: float,  # the middle of the line's small letters
        markup: str,  # with _{subscripts} and ^{superscripts}
        size: float = 14,
        anchor: str = "middle",  # start, middle or end
        bold: bool = False,
        muted: bool = False,
        room: float = None,  # px that the text must not exceed
    ):
        "A line of text; ValueError if it does not fit."
        width = text_width(markup, size, bold)
        left = x - dict(start=0, middle=width / 2, end=width)[anchor]
        if room is not None and width > room:
            raise ValueError(f"{self.title}: {markup!r} needs {width:.0f} px, there are {room:.0f}")
        if left < 4 or left + width > self.width - 4:
            raise ValueError(f"{self.title}: {markup!r} leaves the figure")
        place = f'x="{format_value(x)}" y="{format_value(y + 0.35 * size)}" font-size="{size:g}" text-anchor="{anchor}"'
        if bold:
            place += ' font-weight="600"'
        if muted:
            place += ' class="muted"'
        self.items.append(f"<text {place}>{spans(markup, size)}</text>")

    def lines(
        self,
        x: float,
        y: float,  # the middle of the block
        *markups: str,  # lines; one that starts with * is bold, one that starts with ~ is muted
        size: float = 14,
        anchor: str = "middle",  # start, middle or end
        room: float = None,  # px that no line must exceed
        leading: float = 1.32,  # distance of lines, as a share of the size
    ):
        "Several lines of text, one under the other."
        top = y - (len(markups) - 1) * size * leading / 2
        for n, markup in enumerate(markups):
            mark = markup[:1] if markup[:1] in ("*", "~") else ""
            self.text(x, top + n * size * leading, markup[len(mark) :], size, anchor, mark == "*", mark == "~", room)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *markups: str,  # lines of text in its middle
        look: str = "plain",  # plain, frozen, cell, panel, r, c, t or g
        size: float = 14,
        radius: float = 7,
        stroke: float = 1.8,
        dashed: bool = False,
    ) -> Box:
        "A rounded rectangle with text in it; a frozen one is dashed."
        if len(markups) * size * 1.32 > height:
            raise ValueError(f"{self.title}: {markups} is too high for its box")
        dash = dict(stroke_dasharray="6 4") if dashed or look == "frozen" else {}
        self.shape("rect", look, x=x, y=y, width=width, height=height, rx=radius, stroke_width=stroke, **dash)
        self.lines(x + width / 2, y + height / 2, *markups, size=size, room=width - 8)
        return Box(x, y, width, height)

    def path(
        self,
        *points: tuple,  # its corners
        look: str = "",  # "", r, c, t or g
        heads: str = "end",  # where arrow heads are: end, both or none
        dashed: bool = False,
        stroke: float = 2,
        radius: float = 8,  # of rounded corners
    ):
        "An arrow or a line through points."
        first, last, suffix = points[0], points[-1], f"-{look}" if look else ""
        tail = shorten(first, points[1], 7) if heads == "both" else first
        tip = last if heads == "none" else shorten(last, points[-2], 7)
        dash = dict(stroke_dasharray="7 4") if dashed else {}
        course = round_corners([tail, *points[1:-1], tip], radius)
        self.shape("path", "line" + suffix, d=course, fill="none", stroke_width=stroke, **dash)
        if heads != "none":
            self.head(points[-2], last, "head" + suffix, stroke)
        if heads == "both":
            self.head(points[1], first, "head" + suffix, stroke)

    def head(self, start: tuple, end: tuple, look: str, stroke: float):
        "An arrow head at `end` of a line from `start`."
        length = ((end[0] - start[0]) ** 2 + (end[1] - start[1]) ** 2) ** 0.5
        along_x, along_y = (end[0] - start[0]) / length, (end[1] - start[1]) / length
        long, wide = 7 + 1.2 * stroke, 2.6 + 1.1 * stroke
        base_x, base_y = end[0] - long * along_x, end[1] - long * along_y
        left = base_x - wide * along_y, base_y + wide * along_x
        right = base_x + wide * along_y, base_y - wide * along_x
        corners = " ".join(f"{format_value(x)},{format_value(y)}" for x, y in (end, left, right))
        self.shape("polygon", look, points=corners)

    def rule(self, y: float):
        "A thin line across the figure."
        self.path((20, y), (880, y), heads="none", stroke=1)

    def notes(self, y: float, *markups: str):
        "Lines of explanation below the drawing; `y` is the middle of the first one."
        self.lines(24, y + 12 * (len(markups) - 1), *markups, size=15, anchor="start", leading=1.6)

    def dot(self, x: float, y: float, look: str = "", radius: float = 4):
        "A filled dot, where lines join."
        self.shape("circle", f"head-{look}" if look else "head", cx=x, cy=y, r=radius)

    def node(self, x: float, y: float, sign: str):
        "A circle with a sign in it, such as a product."
        self.shape("circle", "cell", cx=x, cy=y, r=13, stroke_width=1.8)
        self.text(x, y, sign, 16)

    def lock(self, x: float, y: float):
        "A padlock with its middle at (x, y): this part is frozen."
        bow = f"M{format_value(x - 3.5)} {format_value(y)}v-3a3.5 3.5 0 0 1 7 0v3"
        self.shape("path", "line", d=bow, fill="none", stroke_width=1.8)
        self.shape("rect", "head", x=x - 6, y=y - 1, width=12, height=9, rx=1.5)

    def lens(self, x: float, y: float):
        "A magnifying glass with its middle at (x, y): retrieval needs this part."
        handle = f"M{format_value(x + 1.8)} {format_value(y + 1.8)}l4 4"
        self.shape("circle", "page", cx=x, cy=y, r=10, stroke_width=1)
        self.shape("circle", "line", cx=x - 1.5, cy=y - 1.5, r=4.5, fill="none", stroke_width=2)
        self.shape("path", "line", d=handle, fill="none", stroke_width=2.6, stroke_linecap="round")

    def matrix(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        name: str,  # above it
        shape: str,  # below it
        rows: str,  # what a row belongs to: r, c or t
        columns: str = "",  # what a column belongs to: r, c, t, or "" for coordinates
        first_row: bool = False,  # mark row 0
    ) -> Box:
        "A matrix whose left and upper edges have the colours of its rows and columns."
        self.shape("rect", "cell", x=x, y=y, width=width, height=height, stroke_width=1.2)
        if first_row:
            self.row(x, y, width, rows)
        if columns:
            self.path((x, y + 2.5), (x + width, y + 2.5), look=columns, heads="none", stroke=5)
        self.path((x + 2.5, y), (x + 2.5, y + height), look=rows, heads="none", stroke=5)
        if name:
            self.text(x + width / 2, y - 15, name, 16, bold=True)
        if shape:
            self.text(x + width / 2, y + height + 14, shape, 13, muted=True)
        return Box(x, y, width, height)

    def row(self, x: float, y: float, width: float, look: str):
        "A single row of a matrix."
        self.shape("rect", look, x=x, y=y, width=width, height=11, stroke_width=1.4)

    def scores(self, x: float, y: float, side: float, diagonal: bool = True):
        "A matrix of scores; its diagonal is filled where the right answers are."
        step = side / 4
        self.shape("rect", "cell", x=x, y=y, width=side, height=side, stroke_width=1.6)
        for n in range(4 if diagonal else 0):
            self.shape("rect", "head", x=x + n * step, y=y + n * step, width=step, height=step)
        for n in range(1, 4):
            self.path((x + n * step, y), (x + n * step, y + side), heads="none", stroke=0.8)
            self.path((x, y + n * step), (x + side, y + n * step), heads="none", stroke=0.8)

    def picture(self, x: float, y: float, side: float, look: str):
        "A small picture: a disc for the reference r, a disc and a square for the target t."
        self.shape("rect", look, x=x, y=y, width=side, height=side, rx=5, stroke_width=2.2)
        middle = 0.5 if look == "r" else 0.32
        self.shape("circle", f"head-{look}", cx=x + middle * side, cy=y + 0.62 * side, r=0.17 * side)
        if look == "r":
            return
        self.shape("rect", f"head-{look}", x=x + 0.56 * side, y=y + 0.46 * side, width=0.32 * side, height=0.32 * side)

    def cylinder(self, x: float, y: float, width: float, height: float, *markups: str) -> Box:
        "A disk with text on it."
        cap, half = 11, width / 2
        body = f"M{x} {y + cap}v{height - 2 * cap}a{half:g} {cap} 0 0 0 {width} 0v{2 * cap - height}"
        self.shape("path", "plain", d=body, stroke_width=1.8)
        self.shape("ellipse", "plain", cx=x + half, cy=y + cap, rx=half, ry=cap, stroke_width=1.8)
        self.lines(x + half, y + (height + cap) / 2, *markups, room=width - 8)
        return Box(x, y, width, height)

    def bracket(self, left: float, right: float, y: float, name: str):
        "A horizontal bracket with a name above it."
        self.path((left, y + 22), (left, y + 14), (right, y + 14), (right, y + 22), heads="none", stroke=1.6, radius=4)
        self.text((left + right) / 2, y, name)

    def heading(self, title: str, *lines: str):
        "The title line of the figure and lines below it."
        self.text(24, 30, title, 18, "start", bold=True)
        for n, line in enumerate(lines):
            self.text(24, 56 + 21 * n, line, 15, "start", muted=True)

    def svg(self) -> str:
        "The whole file."
        size = f'width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
        names = 'role="img" aria-labelledby="title desc"'
        page = f'x="0.5" y="0.5" width="{self.width - 1}" height="{self.height - 1}" rx="10" stroke-width="1"'
        dimmed = ['<g opacity="0.22">', *self.dimmed, "</g>"] if self.dimmed else []
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} {names} font-family="{FONT}">',
                f'<title id="title">{escape(self.title)}</title>',
                f'<desc id="desc">{escape(self.description)}</desc>',
                "<style>",
                style_rules(LIGHT),
                "@media (prefers-color-scheme: dark) {",
                style_rules(DARK),
                "}",
                "</style>",
                f'<rect class="page" {page}/>',
                *dimmed,
                *self.bright,
                "</svg>",
                "",
            ]
        )


def shorten(
    end: tuple,  # a point
    other: tuple,  # the next point of the line
    by: float,  # px
) -> tuple:  # a point
    "`end`, moved towards `other`, so that a line does not show beside the tip of its arrow head."
    length = ((other[0] - end[0]) ** 2 + (other[1] - end[1]) ** 2) ** 0.5
    share = min(by, length / 2) / length
    return end[0] + share * (other[0] - end[0]), end[1] + share * (other[1] - end[1])


def round_corners(
    points: list,  # (x, y)
    radius: float,  # px
) -> str:  # the d of an SVG path
    "A line through points whose inner corners are rounded."

    def at(point):
        return f"{format_value(point[0])} {format_value(point[1])}"

    steps = [f"M{at(points[0])}"]
    for before, corner, after in zip(points, points[1:], points[2:]):
        steps.append(f"L{at(shorten(corner, before, radius))}Q{at(corner)} {at(shorten(corner, after, radius))}")
    return "".join([*steps, f"L{at(points[-1])}"])


# ------------------------------------------------------------------------------------------------------------------
# CaLa whole, and with one part lit
# ------------------------------------------------------------------------------------------------------------------

# Part: the line under the title. None is the figure with everything lit.
LIT = {
    None: "A triplet (reference r, text c, target t) becomes three B × B score matrices, and these become one loss.",
    "encoders": "Lit: the frozen trunk and the three encoders, which turn a triplet into tokens and features.",
    "composition": "Lit: the composition frame, which scores every query (r, c) with every target t.",
    "hca": "Lit: HCA reads F_{r}, F_{c} and F_{t}; its vector is compared with F_{r}[0], the reference's feature.",
    "tac": "Lit: TAC reads both pictures without the text; its vector is compared with F_{c}[0], the text's feature.",
    "objectives": "Lit: three matrices of scores, and the loss that they are combined to.",
    "retrieval": "Lit: what retrieval needs. HCA and TAC are not used; t is now each of G gallery pictures.",
}
C, R, ALONE, T = 132, 275, 388, 440  # heights of the lines of F_c, F_r, F'_r and F_t
BUS_C, BUS_R, BUS_T = 492, 516, 540  # where these lines branch to HCA, TAC and the frame


def draw_architecture(
    part: str = None,  # a key of LIT
) -> Figure:
    "CaLa from the triplet to the loss."
    title = "CaLa: from a triplet to the loss"
    description = (
        "From left to right: text c, reference picture r and target picture t; a frozen vision trunk that reads both "
        "pictures; encoders E_c (text), E_m (reference and text) and E_t (reference or target alone); the composition "
        "frame, HCA and TAC; the score matrices QTM, TBIA and CTR; the loss. HCA and TAC exist in training only."
    )
    figure = Figure(900, 652, f"{title}; lit: {part}" if part else title, description, lit=(part,) if part else ())
    figure.heading(title, LIT[part])
    draw_inputs(figure, "gallery" if part == "retrieval" else "target t")
    draw_encoders(figure)
    draw_branches(figure)
    draw_modules(figure)
    draw_scores(figure, retrieval=part == "retrieval")
    draw_legend(figure, 525)
    return figure


def draw_inputs(figure: Figure, name_of_target: str):
    "The triplet and the trunk."
    with figure.part("encoders", "retrieval"):
        figure.path((92, C), (275, C), look="c")
        figure.path((228, C), (228, R - 24), (275, R - 24), look="c")
        figure.dot(228, C, "c")
        for height, look in ((R, "r"), (T, "t")):
            figure.path((92, height), (122, height), look=look)
            figure.path((206, height), (275, height), look=look)
            figure.text(240, height + 14, f"V_{{{look}}}", 15)
            figure.picture(30, height - 30, 60, look)
        figure.box(22, C - 25, 70, 50, "“add a", "square”", look="c", size=13)
        figure.text(57, C + 38, "text c")
        figure.text(60, R + 44, "reference r")
        figure.text(60, T + 44, name_of_target)
        trunk = figure.box(122, R - 45, 84, T - R + 90, "*trunk", "frozen", look="frozen")
        figure.lock(trunk.middle_x, trunk.middle_y - 34)
        figure.lens(trunk.right - 5, trunk.y + 3)
    with figure.part("encoders"):
        figure.path((254, R), (254, ALONE), (275, ALONE), look="r", dashed=True)
        figure.dot(254, R, "r")


def draw_encoders(figure: Figure):
    "The three encoders and what they give."
    with figure.part("encoders", "retrieval"):
        for y, height, name, task in (
            (C - 38, 76, "*E_{c}", "text"),
            (R - 48, 78, "*E_{m}", "picture, text"),
            (T - 82, 112, "*E_{t}", "picture alone"),
        ):
            encoder = figure.box(275, y, 104, height, name, task, "trains")
            figure.lens(encoder.right - 5, encoder.y + 3)
    readers = ("encoders", "retrieval", "composition", "hca")
    for height, end, look, name, shape, parts in (
        (C, BUS_C, "c", "F_{c}", "(B, L_{c}, d)", (*readers, "tac")),
        (R, BUS_R, "r", "F_{r}", "(B, 32, d)", readers),
        (ALONE, BUS_C, "r", "F′_{r}", "(B, 32, d)", ("encoders", "tac")),
        (T, BUS_T, "t", "F_{t}", "(B, 32, d)", (*readers, "tac")),
    ):
        with figure.part(*parts):
            figure.path((379, height), (end, height), look=look, dashed=height == ALONE, heads="none")
            figure.text(424, height - 14, name, 16, bold=True)
            figure.text(424, height + 15, shape, 13, muted=True)


def draw_branches(figure: Figure):
    "The lines from the encoders' outputs to the frame, HCA, TAC and two of the score matrices."
    left = 588
    with figure.part("tac", "objectives"):
        figure.path((BUS_C, C), (BUS_C, T + 58), (730, T + 58), (730, T - 6), (762, T - 6), look="c")
        figure.text(650, T + 44, "F_{c}[0]  (B, d)")
    with figure.part("hca", "objectives"):
        figure.path((BUS_R, R), (BUS_R, R + 58), (730, R + 58), (730, R + 18), (762, R + 18), look="r")
        figure.text(650, R + 72, "F_{r}[0]  (B, d)")
    with figure.part("hca"):
        figure.path((BUS_R, R), (left, R), look="r")
        figure.path((BUS_C, C), (BUS_C, R - 24), (left, R - 24), look="c", radius=0)
        figure.path((BUS_T, T), (BUS_T, R + 24), (left, R + 24), look="t", radius=0)
    with figure.part("composition", "retrieval"):
        figure.path((BUS_R, R), (BUS_R, C - 24), (left, C - 24), look="r")
        figure.path((BUS_C, C), (left, C), look="c")
        figure.path((BUS_T, T), (BUS_T, C + 24), (left, C + 24), look="t")
    with figure.part("tac"):
        figure.path((BUS_C, ALONE), (left, ALONE), look="r", dashed=True)
        figure.path((BUS_T, T), (left, T), look="t")
    frame_and_hca = "composition", "retrieval", "hca"
    for x, y, look, parts in (
        (BUS_C, C, "c", (*frame_and_hca, "tac")),
        (BUS_C, R - 24, "c", ("hca",)),
        (BUS_R, R, "r", frame_and_hca),
        (BUS_T, T, "t", (*frame_and_hca, "tac")),
        (BUS_T, R + 24, "t", frame_and_hca),
    ):
        with figure.part(*parts):
            figure.dot(x, y, look)


def draw_modules(figure: Figure):
    "The frame, HCA and TAC."
    with figure.part("composition", "retrieval"):
        frame = figure.box(588, C - 40, 118, 80, "*frame", "sum, ARTEMIS", "or Combiner")
        figure.lens(frame.right - 5, frame.y + 3)
    with figure.part("hca"):
        figure.box(588, R - 40, 118, 80, "*HCA", "hinge-based", "cross-attention")
    with figure.part("tac"):
        figure.box(588, T - 70, 118, 88, "*TAC", "twin-attention", "compositor")


def draw_scores(figure: Figure, retrieval: bool):
    "The three score matrices and the loss; in retrieval, the scores of queries and gallery."
    first, shape = ("scores", "(B, G)") if retrieval else ("QTM", "(B, B)")
    rows = (
        (C, first, shape, ("composition", "retrieval", "objectives")),
        (R, "TBIA", "(B, B)", ("hca", "objectives")),
        (T - 26, "CTR", "(B, B)", ("tac", "objectives")),
    )
    for height, name, shape, parts in rows:
        with figure.part(*parts):
            figure.path((706, height), (762, height))
            figure.scores(762, height - 28, 56, diagonal=not retrieval)
            figure.text(790, height - 43, name, 15, bold=True)
            figure.text(790, height + 43, shape, 13, muted=True)
            if height != C:
                figure.text(730, height - 14, "(B, d)", 13, muted=True)
        with figure.part("objectives"):
            figure.path((818, height), (842, height))
    with figure.part("objectives"):
        figure.box(842, C - 40, 46, T - C + 54, "*L", "loss")


def draw_legend(figure: Figure, y: float):
    "What borders, signs, colours and letters mean."
    figure.rule(y)
    figure.box(24, y + 16, 30, 20, radius=4)
    figure.text(62, y + 26, "trains", anchor="start")
    figure.box(122, y + 16, 30, 20, look="frozen", radius=4)
    figure.lock(137, y + 25)
    figure.text(160, y + 26, "never trains", anchor="start")
    figure.lens(268, y + 26)
    figure.text(284, y + 26, "also needed for retrieval", anchor="start")
    lines = (470, "c", "from c"), (556, "r", "from r"), (642, "r", "from r, for TAC"), (789, "t", "from t")
    for x, look, name in lines:
        figure.path((x, y + 26), (x + 32, y + 26), look=look, dashed="TAC" in name, heads="none", stroke=3)
        figure.text(x + 39, y + 26, name, anchor="start")
    figure.notes(
        y + 56,
        "--encoder both: E_{m}, E_{c} and E_{t} train.  multi: E_{m} and E_{c} train.  text: only E_{c} trains.",
        "B triplets, L_{c} tokens of text, width d.  V: trunk tokens (B, N, w).  BLIP-2: N = 257, w = 1024, d = 768.",
        "F[0] is token 0 of F, the feature. The frame reads features only; the frame sum has no weights.",
    )


# ------------------------------------------------------------------------------------------------------------------
# The three associations of a triplet
# ------------------------------------------------------------------------------------------------------------------

ASSOCIATIONS = (  # name and symbols, long name, what is given, question, what computes it, when
    (
        "QTM:  (r, c) → t",
        "query-target matching",
        "rc",
        ("Given the picture and the text,", "which target belongs to them?"),
        "frame: sum, ARTEMIS, Combiner",
        "training and retrieval",
    ),
    (
        "TBIA:  r ↔ t, hinge c",
        "text-bridged image alignment",
        "c",
        ("Given the text as a hinge,", "which pictures belong together?"),
        "module: HCA",
        "training only",
    ),
    (
        "CTR:  (r, t) → c",
        "complementary text reasoning",
        "rt",
        ("Given the two pictures,", "which text explains the change?"),
        "module: TAC",
        "training only",
    ),
)


def draw_associations() -> Figure:
    "Three panels with the same three nodes; an arrow head points to what is predicted."
    description = (
        "Three panels with the nodes reference r, text c and target t. QTM: lines from r and c join and an arrow leads "
        "to t. TBIA: an arrow with two heads joins r and t, and c hangs on its middle as the hinge. CTR: lines from r "
        "and t join and an arrow leads to c."
    )
    figure = Figure(900, 480, "The three associations of a triplet", description)
    figure.heading(
        "The three associations of a triplet",
        "Lines without a head bring what is given. Arrow heads point to what is predicted or aligned.",
    )
    for n, (name, long_name, given, question, module, use) in enumerate(ASSOCIATIONS):
        x, y, width = 20 + 293 * n, 80, 274
        middle, low, room = x + width / 2, y + 218, width - 12
        join, ends = (middle, low), dict(r=(x + 76, low), c=(middle, y + 122), t=(x + width - 76, low))
        figure.box(x, y, width, 382, look="panel", radius=10, stroke=1.2)
        figure.text(middle, y + 22, name, 17, bold=True, room=room)
        figure.text(middle, y + 46, long_name, muted=True, room=room)
        for letter, end in ends.items():
            if letter in given:
                figure.path(end, join, look=letter, heads="none", stroke=3)
            else:
                figure.path(join, end, stroke=3)
        figure.dot(*join, radius=6)
        figure.picture(x + 20, low - 28, 56, "r")
        figure.picture(x + width - 76, low - 28, 56, "t")
        figure.box(middle - 62, y + 76, 124, 46, "c: “add a square", "beside the disc”", look="c", size=13)
        figure.text(x + 48, low + 42, "r: reference")
        figure.text(x + width - 48, low + 42, "t: target")
        figure.lines(middle, y + 299, *question, room=room)
        figure.lines(middle, y + 350, f"~{module}", f"~{use}", room=room)
    return figure


# ------------------------------------------------------------------------------------------------------------------
# One layer of the Q-Former
# ------------------------------------------------------------------------------------------------------------------


def draw_qformer() -> Figure:
    "One layer of the Q-Former."
    description = (
        "From left to right: 32 queries and the tokens of a text go through one self-attention together. Then only the "
        "queries go through cross-attention to the picture's tokens, in every second layer. Queries and text have "
        "separate feed-forward networks."
    )
    figure = Figure(900, 520, "One layer of the Q-Former", description)
    figure.heading(
        "One layer of the Q-Former",
        "BLIP-2 has 12 such layers. After each block, its input is added and the sum is normalised.",
    )
    query, text = 225, 345  # heights of the two lines
    top, height = query - 38, 76
    figure.box(24, top, 104, height, "*queries", "(B, 32, d)", look="cell")
    figure.box(24, text - 38, 104, height, "*text tokens", "(B, L, d)", look="c")
    attention = figure.box(
        162,
        top,
        150,
        text - query + height,
        "*self-attention",
        "queries and text",
        "attend to",
        "each other;",
        "nothing attends",
        "to padding",
    )
    picture = figure.box(362, 94, 184, 56, "*picture tokens", "(B, N, w)", look="frozen")
    figure.lock(picture.x + 22, picture.middle_y)
    figure.text(picture.right + 10, picture.middle_y, "from the frozen trunk", anchor="start", muted=True)
    cross = figure.box(362, top, 184, height, "*cross-attention", "only queries; only in", "layers 0, 2, 4, 6, 8, 10")
    figure.box(594, top, 156, height, "*feed-forward", "for queries only,", "separate weights")
    figure.box(594, text - 38, 156, height, "*feed-forward", "for text only,", "separate weights")
    figure.box(790, top, 92, height, "*queries", "(B, 32, d)", look="cell")
    figure.box(790, text - 38, 92, height, "*text", "(B, L, d)", look="c")
    for start, end in ((128, attention.x), (attention.right, cross.x), (cross.right, 594), (750, 790)):
        figure.path((start, query), (end, query))
    for start, end in ((128, attention.x), (attention.right, 594), (750, 790)):
        figure.path((start, text), (end, text), look="c")
    figure.path((picture.middle_x, picture.bottom), (cross.middle_x, cross.y))
    figure.text(picture.middle_x + 10, (picture.bottom + cross.y) / 2, "keys, values", 13, "start", muted=True)
    figure.text((attention.right + 594) / 2, text + 16, "no cross-attention for text tokens", 13, muted=True)
    figure.rule(408)
    figure.notes(
        428,
        "*Three encoders of this architecture, each with its own weights:",
        "E_{m} reads a picture with a text: all of the above. The outputs of its queries are F_{r} (B, 32, d).",
        "E_{c} reads a text: text tokens only, no queries, no cross-attention. Its output is F_{c} (B, L_{c}, d).",
        "E_{t} reads a picture: queries and picture tokens, no text. Its output is F_{t} or F′_{r} (B, 32, d).",
    )
    return figure


# ------------------------------------------------------------------------------------------------------------------
# HCA and TAC
# ------------------------------------------------------------------------------------------------------------------

SIDE, LOW = 58, 42  # px of d or 32 rows, and of L_c rows


def draw_hca() -> Figure:
    "The matrices of hinge-based cross-attention."
    description = (
        "Linear layers make Q from F_r, K from F_c, and K' and V from F_t. A is Q times K transposed, A' is K times K' "
        "transposed, both divided by the square root of d. P is the softmax of A times A' over the target tokens, with "
        "dropout. Row 0 of P times V is the output."
    )
    figure = Figure(900, 640, "HCA: hinge-based cross-attention", description)
    figure.heading(
        "HCA: hinge-based cross-attention", "Shapes of one triplet with BLIP-2; a batch adds an axis in front."
    )
    figure.text(560, 96, "Left edge: rows. Upper edge: columns.", anchor="start")
    for n, (look, name) in enumerate((("r", "reference and text"), ("c", "text"), ("t", "target"))):
        figure.path((560, 122 + 22 * n), (590, 122 + 22 * n), look=look, heads="none", stroke=5)
        figure.text(600, 122 + 22 * n, f"tokens of the {name}", anchor="start", muted=True)
    query, key, target_key, value = draw_hca_inputs(figure)
    draw_hca_links(figure, query, key, target_key)
    draw_hca_output(figure, value)
    figure.rule(545)
    figure.notes(
        569,
        "There is no softmax on A or A′ alone, no residual and no norm:  A A′ = Q K^{T} K K′^{T} / d.",
        "The Gram matrix K^{T} K of the text (d, d) is the metric between Q of the reference and K′ of the target.",
        "Scores:  z_{tbia}(i, j) = 10 · HCA_{i} · F_{r,j}[0].  Only row 0 of Q is needed for the output.",
    )
    return figure


def draw_hca_inputs(figure: Figure) -> list:  # boxes of Q, K, K' and V
    "F_r, F_c and F_t, the linear layers, and what they give."
    sources = dict(
        r=figure.matrix(30, 140 - SIDE / 2, SIDE, SIDE, "F_{r}", "(32, d)", "r"),
        c=figure.matrix(30, 250 - LOW / 2, SIDE, LOW, "F_{c}", "(L_{c}, d)", "c"),
        t=figure.matrix(30, 415 - SIDE / 2, SIDE, SIDE, "F_{t}", "(32, d)", "t"),
    )
    boxes = []
    for look, layer, name, middle in (
        ("r", "W_{q}", "Q", 140),
        ("c", "W_{c}", "K", 250),
        ("t", "W_{t}", "K′", 360),
        ("t", "W_{v}", "V", 470),
    ):
        source = sources[look]
        bend = [(108, source.middle_y), (108, middle)] if look == "t" else []
        figure.path((source.right, source.middle_y), *bend, (130, middle), look=look)
        figure.box(130, middle - 17, 48, 34, layer, size=16)
        figure.path((178, middle), (216, middle), look=look)
        shape = "(L_{c}, d)" if look == "c" else "(32, d)"
        boxes.append(figure.matrix(216, middle - source.height / 2, SIDE, source.height, name, shape, look))
    return boxes


def draw_hca_links(figure: Figure, query: Box, key: Box, target_key: Box):
    "A and A', the products that link the text with either picture, and their product."
    for box, shift, end, look in (
        (query, 0, 177, "r"),
        (key, -9, 203, "c"),
        (key, 9, 297, "c"),
        (target_key, 0, 323, "t"),
    ):
        y = box.middle_y + shift
        figure.path((box.right, y), (322, y), (322, end), look=look)
    for y in (190, 310):
        figure.node(322, y, "×")
        figure.path((335, y), (386, y))
        figure.text(359, y - 13, "/ √d", 13, muted=True)
    a = figure.matrix(386, 190 - SIDE / 2, LOW, SIDE, "A", "", "r", "c")
    a2 = figure.matrix(386, 310 - LOW / 2, SIDE, LOW, "", "", "c", "t")
    figure.text(a.right + 8, 180, "(32, L_{c})", 13, "start", muted=True)
    figure.text(a2.middle_x, a2.bottom + 18, "A′", 16, bold=True)
    figure.text(a2.middle_x, a2.bottom + 37, "(L_{c}, 32)", 13, muted=True)
    figure.path((a.right, 198), (502, 198), (502, 237))
    figure.path((a2.right, 310), (502, 310), (502, 263))
    figure.node(502, 250, "×")


def draw_hca_output(figure: Figure, value: Box):
    "The softmax, the product with V, and its row 0."
    softmax = figure.box(530, 208, 124, 84, "*softmax of A A′", "over the target", "tokens;", "dropout 0.1", size=13)
    weights = figure.matrix(682, 250 - SIDE / 2, SIDE, SIDE, "P", "(32, 32)", "r", "t")
    product = figure.matrix(812, 250 - SIDE / 2, SIDE, SIDE, "P V", "(32, d)", "r", first_row=True)
    figure.node(770, 250, "×")
    for start, end in ((515, softmax.x), (softmax.right, weights.x), (weights.right, 757), (783, product.x)):
        figure.path((start, 250), (end, 250))
    figure.path((value.right, value.middle_y), (770, value.middle_y), (770, 263), look="t")
    figure.path((product.right, product.y + 5), (884, product.y + 5), (884, 385), (870, 385), look="r")
    figure.row(product.x, 379, SIDE, "r")
    figure.text(product.middle_x, 361, "row 0", 13, muted=True)
    figure.text(product.middle_x, 408, "output", 15, bold=True)
    figure.text(product.middle_x, 428, "(d)", 13, muted=True)


def draw_tac() -> Figure:
    "The four passes of both attentions of the twin-attention compositor."
    description = (
        "Two attentions, M1 and M2. M1 has F'_r as query and F_t as key and value; three more passes have the same "
        "query and the last output as key and value. M2 is the mirror image with F_t as query. The output is the mean "
        "of token 0 of both results."
    )
    figure = Figure(900, 590, "TAC: twin-attention compositor", description)
    figure.heading(
        "TAC: twin-attention compositor",
        "Shapes of one triplet with BLIP-2. Every block M_{1} has the same weights, and so has every block M_{2}.",
    )
    figure.matrix(30, 112, SIDE, SIDE, "F′_{r}", "(32, d)", "r")
    figure.matrix(30, 410, SIDE, SIDE, "F_{t}", "(32, d)", "t")
    figure.path((88, 153), (150, 153), (150, 380), (220, 380), look="r", dashed=True)
    figure.path((88, 427), (178, 427), (178, 200), (220, 200), look="t")
    draw_passes(figure, "M_{1}", "o_{1}", "r", questions=133, middle=200)
    draw_passes(figure, "M_{2}", "o_{2}", "t", questions=447, middle=380)
    mean = figure.box(758, 272, 70, 36, "*mean")
    for look, start, end, label in (("r", 176, 281, 240), ("t", 356, 299, 326)):
        figure.path((822, start), (846, start), (846, end), (mean.right, end), look=look)
        figure.text(853, label, "row 0", 13, "start", muted=True)
    figure.path((mean.x, 290), (680, 290))
    figure.row(618, 284, SIDE, "plain")
    figure.text(606, 290, "output (d)", 15, "end", bold=True)
    figure.rule(498)
    figure.notes(
        520,
        "A pass is attention with one head:  softmax(q k^{T} / √d) v,  with projections of q, k, v and the result.",
        "There is no dropout, no residual, no norm and no feed-forward network.",
        "Output:  TAC = (o_{1}[0] + o_{2}[0]) / 2.   Scores:  z_{ctr}(i, j) = 10 · F_{c,i}[0] · TAC_{j}.",
    )
    return figure


def draw_passes(
    figure: Figure,
    module: str,  # the name of the attention
    output: str,  # the name of what it gives
    look: str,  # of the picture that gives the queries
    questions: float,  # height of the line that brings the queries
    middle: float,  # height of the blocks
):
    "Four passes of one attention, each with the same queries."
    edge = middle - 32 if questions < middle else middle + 32
    label = middle - 46 if questions < middle else middle + 46
    figure.path((88, questions), (673, questions), (673, edge), look=look, dashed=look == "r")
    figure.text(200, middle - 14, "k, v", 13, muted=True)
    for n in range(4):
        block = figure.box(220 + 136 * n, middle - 32, 90, 64, f"*{module}", f"pass {n + 1}")
        figure.text(block.middle_x + 8, label, "q", 13, "start", muted=True)
        figure.path((block.right, middle), (block.right + 46 if n < 3 else 764, middle))
        if n == 3:
            continue
        figure.path((block.middle_x, questions), (block.middle_x, edge), look=look, dashed=look == "r")
        figure.dot(block.middle_x, questions, look)
        figure.text(block.right + 23, middle - 14, output)
    figure.matrix(764, middle - SIDE / 2, SIDE, SIDE, output, "(32, d)", look, first_row=True)


# ------------------------------------------------------------------------------------------------------------------
# A training step, the cache, and the states of a run
# ------------------------------------------------------------------------------------------------------------------


def draw_step() -> Figure:
    "The data flow of a training step."
    description = (
        "A batch of texts and pictures goes through the frozen trunk and through embed, which gives five vectors for "
        "each triplet: f_r, f_c, f_t, HCA and TAC. compare makes three B by B score matrices of them, compute_losses "
        "makes one loss. Gradients flow back as far as the encoders, not into the trunk."
    )
    figure = Figure(900, 575, "The data flow of a training step", description)
    figure.heading("The data flow of a training step")
    figure.bracket(24, 490, 76, "each triplet by itself: row i depends on triplet i only")
    figure.bracket(533, 880, 76, "all triplets of the batch together")
    top, height = 116, 294
    figure.box(24, 134, 112, 60, "*texts c", "B sentences", look="c")
    figure.box(24, 232, 112, 60, "*references r", "(B, 3, H, W)", look="r")
    figure.box(24, 328, 112, 60, "*targets t", "(B, 3, H, W)", look="t")
    trunk = figure.box(172, 218, 78, 184, "*trunk", "frozen", look="frozen")
    figure.lock(trunk.middle_x, trunk.middle_y - 32)
    embed = figure.box(326, top, 112, height, "*embed", "E_{m}, E_{c}, E_{t}", "HCA, TAC")
    compare = figure.box(533, top, 108, height, "*compare", "frame (QTM)", "and products", "(TBIA, CTR)", size=13)
    losses = figure.box(
        756, top, 124, height, "*compute_losses", "objective:", "released,", "paper", "or two_way", size=13
    )
    figure.path((136, 164), (embed.x, 164), look="c")
    for y, look in ((262, "r"), (358, "t")):
        figure.path((136, y), (trunk.x, y), look=look)
        figure.path((trunk.right, y), (embed.x, y), look=look)
        figure.text(288, y - 14, f"V_{{{look}}}", 16, bold=True)
        figure.text(288, y + 15, "(B, N, w)", 13, muted=True)
    for n, (name, look) in enumerate((("f_{r}", "r"), ("f_{c}", "c"), ("f_{t}", "t"), ("HCA", ""), ("TAC", ""))):
        y = top + 40 + 54 * n
        figure.path((embed.right, y), (compare.x, y), look=look)
        figure.text(482, y - 14, f"{name}  (B, d)")
    for y, name in ((170, "z_{qtm}"), (266, "z_{tbia}"), (362, "z_{ctr}")):
        figure.path((compare.right, y), (676, y))
        figure.scores(676, y - 22, 44)
        figure.path((720, y), (losses.x, y))
        figure.text(698, y - 35, name, 15, bold=True)
        figure.text(698, y + 35, "(B, B)", 13, muted=True)
    draw_backward(figure, trunk, embed, compare, losses)
    figure.rule(496)
    figure.notes(
        523,
        "f_{r} = F_{r}[0],  f_{c} = F_{c}[0],  f_{t} = F_{t}[0].  The right answers are on the diagonals.",
        "After backward, AdamW updates the encoders that train, HCA, TAC and the frame.",
    )
    return figure


def draw_backward(figure: Figure, trunk: Box, embed: Box, compare: Box, losses: Box):
    "The way of the gradient, from the loss to where it stops."
    y = 462
    figure.path(
        (losses.middle_x, losses.bottom),
        (losses.middle_x, y),
        (embed.middle_x, y),
        (embed.middle_x, embed.bottom),
        look="g",
        stroke=3.5,
    )
    figure.path((compare.middle_x, y), (compare.middle_x, compare.bottom), look="g", stroke=3.5)
    figure.path((embed.middle_x, y), (trunk.middle_x + 6, y), look="g", stroke=3.5, heads="none", dashed=True)
    figure.path((trunk.middle_x, y - 14), (trunk.middle_x, y + 14), heads="none", stroke=4)
    figure.text(712, y - 16, "backward from the loss L")
    figure.text(198, y, "stops: trunk is frozen", anchor="end", muted=True)


def draw_cache() -> Figure:
    "What is computed once, and what a training step reads."
    description = (
        "Left: once for every picture, transform and frozen trunk make tokens, which are written to disk in shards of "
        "64 pictures. Where the image encoder E_t is frozen, its output is written, too. Right: a training step reads "
        "tokens and embeddings, not pictures."
    )
    figure = Figure(900, 470, "The cache: pictures are read once, training steps read tokens", description)
    figure.heading("The cache: pictures are read once, training steps read tokens")
    upper, lower = 160, 312  # heights of tokens and of constant targets
    figure.box(20, 62, 396, 330, look="panel", radius=10, stroke=1.2)
    figure.box(612, 62, 268, 330, look="panel", radius=10, stroke=1.2)
    figure.text(36, 84, "Once for every picture", 15, "start", bold=True)
    figure.text(628, 84, "Every training step", 15, "start", bold=True)
    figure.picture(40, upper - 34, 48, "t")
    figure.picture(50, upper - 22, 48, "r")
    figure.text(72, upper + 46, "pictures")
    figure.box(128, upper - 30, 92, 60, "*transform")
    figure.path((98, upper), (128, upper))
    figure.path((220, upper), (268, upper))
    figure.path((314, upper + 40), (314, lower - 40))
    figure.lines(
        244,
        lower,
        "*constant targets",
        "only with --cache auto",
        "and --encoder multi",
        "or --encoder text",
        anchor="end",
    )
    rows = (
        (upper, "trunk", "token", "(64, N, w)", "V_{r}, V_{t}", "(B, N, w)"),
        (lower, "E_{t}", "target", "(64, 32, d)", "F′_{r}, F_{t}", "(B, 32, d)"),
    )
    for y, network, kind, shape_on_disk, names, shape in rows:
        frozen = figure.box(268, y - 40, 92, 80, f"*{network}", "frozen", look="frozen")
        figure.lock(frozen.right - 12, frozen.y + 12)
        shards = figure.cylinder(440, y - 56, 148, 112, f"*{kind} shards", "64 pictures a file", shape_on_disk)
        figure.path((frozen.right, y), (shards.x, y))
        figure.path((shards.right, y), (740, y))
        figure.text(668, y - 15, names, 16, bold=True)
        figure.text(668, y + 16, shape, 13, muted=True)
    figure.box(
        740,
        upper - 44,
        128,
        lower - upper + 88,
        "*training step",
        "E_{m}, E_{c}, frame,",
        "HCA, TAC, loss;",
        "E_{t} unless its",
        "output is on disk",
        size=13,
    )
    figure.notes(
        417,
        "The trunk is frozen and there is no augmentation, so its output for a picture is a constant.",
        "Where target shards are read, V_{t} is not needed. Texts are short and are read from the annotations.",
    )
    return figure


def draw_run_states() -> Figure:
    "The states of a run and what leads from one to another."
    description = (
        "A new run trains an epoch, validates if that is due, saves, and goes on until it is finished. It stops early "
        "by Ctrl-C or SIGTERM, by a loss that is not finite, or because it is killed. A stopped run is resumed from "
        "last/ and trains on; a finished one is resumed with a larger number of epochs."
    )
    figure = Figure(900, 580, "The states of a run", description)
    figure.heading(
        "The states of a run", "A run is what cala-train does in one folder, from its first epoch to its last."
    )
    new = figure.box(24, 178, 92, 54, "*new", radius=24)
    training = figure.box(186, 178, 140, 54, "*training", "an epoch", radius=24)
    validating = figure.box(416, 178, 122, 54, "*validating", radius=24)
    saved = figure.box(604, 178, 136, 54, "*saved", "last/, best/", radius=24)
    finished = figure.box(802, 178, 82, 54, "*finished", radius=24)
    for start, end in ((new, training), (training, validating), (validating, saved), (saved, finished)):
        figure.path((start.right, 205), (end.x, 205))
    figure.text(151, 191, "starts", 13)
    figure.lines(371, 181, "epoch", "is done", size=13)
    figure.text(571, 191, "score", 13)
    figure.lines(771, 181, "no epoch", "remains", size=13)
    figure.path((272, 178), (272, 138), (644, 138), (644, 178))
    figure.text(458, 124, "epoch is done, validation is not due", 13)
    figure.path((700, 178), (700, 96), (228, 96), (228, 178))
    figure.text(464, 82, "epochs remain", 13)
    draw_stops(figure, training, validating, finished)
    figure.notes(
        525,
        "best/ holds the weights with the best validation score, last/ all that a run needs to go on bit for bit.",
        "With --save-steps N, last/ is saved every N steps of an epoch, too.",
    )
    return figure


def draw_stops(figure: Figure, training: Box, validating: Box, finished: Box):
    "The three ways to stop early, and how a run goes on."
    signals = figure.box(
        163,
        282,
        226,
        92,
        "*Ctrl-C or SIGTERM",
        "the step in progress ends, or",
        "validation stops at once;",
        "then last/ is saved",
        look="cell",
        size=13,
    )
    nonfinite = figure.box(
        403,
        282,
        236,
        92,
        "*loss or gradient not finite",
        "last/ is saved without this step;",
        "nonfinite.json names the batch",
        look="cell",
        size=13,
    )
    killed = figure.box(
        653, 282, 178, 92, "*killed", "SIGKILL, power failure:", "last/ stays as it was", look="cell", size=13
    )
    figure.path((signals.middle_x, training.bottom), (signals.middle_x, signals.y))
    figure.path((signals.middle_x, 258), (killed.middle_x, 258), (killed.middle_x, killed.y))
    figure.path((nonfinite.middle_x, 258), (nonfinite.middle_x, nonfinite.y))
    figure.path((validating.middle_x, validating.bottom), (validating.middle_x, 258), heads="none")
    for x in (signals.middle_x, validating.middle_x, nonfinite.middle_x):
        figure.dot(x, 258)
    figure.text(624, 244, "the run stops early", 13)
    stopped = figure.box(456, 424, 130, 46, "*stopped", radius=22)
    resumed = figure.box(24, 424, 110, 46, "*resumed", radius=22)
    for cause in (signals, killed):
        figure.path(
            (cause.middle_x, cause.bottom),
            (cause.middle_x, 398),
            (stopped.middle_x, 398),
            (stopped.middle_x, stopped.y),
        )
    figure.path((nonfinite.middle_x, nonfinite.bottom), (stopped.middle_x, stopped.y))
    figure.path((stopped.x, 447), (resumed.right, 447))
    figure.text(290, 433, "--resume: weights, optimizer, schedule,", 13)
    figure.text(290, 462, "random generators, place in the epoch", 13)
    figure.path((resumed.middle_x, resumed.y), (resumed.middle_x, 254), (216, 254), (216, training.bottom))
    figure.path((850, finished.bottom), (850, 498), (resumed.middle_x, 498), (resumed.middle_x, resumed.bottom))
    figure.text(640, 484, "--resume with a larger --num-epochs", 13)


# ------------------------------------------------------------------------------------------------------------------
# The wings of the project
# ------------------------------------------------------------------------------------------------------------------

LESSONS = (
    "00  task",
    "01  data",
    "02  contrast",
    "03  qformer",
    "04  encoders",
    "05  composition",
    "06  associations",
    "07  objectives",
    "08  model",
    "09  retrieval",
    "10  training",
    "11  rerank",
    "12  findings",
)
WITHOUT_MODULE = "00  task", "12  findings"
PLAIN = ("annotations", "errors", "options", "pictures", "progress", "recipe", "trust")
BACKBONES = ("blip2", "clip", "contract", "weights")
LIBRARY = (
    "ablation",
    "ablation_dataset",
    "atlas",
    "audit",
    "benchmark",
    "cache",
    "checkpoint",
    "circo",
    "cli",
    "combiner",
    "demo",
    "environment",
    "files",
    "flags",
    "gallery",
    "gpu",
    "gradcache",
    "holdout",
    "hub",
    "loading",
    "mteb_model",
    "needs",
    "noise",
    "probes",
    "processes",
    "released",
    "report",
    "results",
    "resume",
    "run",
    "search",
    "show",
    "sources",
    "speed",
    "stage1",
    "submission",
    "trackers",
    "worlds",
)
SCRIPTS = (
    "ablation",
    "benchmark",
    "cache",
    "check",
    "circo_submission",
    "cirr_submission",
    "combiner",
    "demo",
    "search",
    "train",
    "validate",
)


def draw_wings() -> Figure:
    "The four wings and their modules."
    description = (
        f"Four columns: method, backbones, library, scripts. Every column imports only from columns to its left. "
        f"The lessons of the method in reading order: {', '.join(LESSONS)}. "
        f"Modules of the method without a lesson: {', '.join(PLAIN)}. Backbones: {', '.join(BACKBONES)}. "
        f"Library: {', '.join(LIBRARY)}. Scripts: {', '.join(SCRIPTS)}."
    )
    figure = Figure(900, 784, "The four wings of the project", description)
    figure.heading(
        "The four wings of the project",
        "An arrow means: imports from. A wing imports only from wings to its left.",
        "The lessons of the method are in reading order; a dashed lesson has no module.",
    )
    method = draw_wing(figure, 24, 200, "method", "nbs/method", "cala/*.py")
    backbones = draw_wing(figure, 266, 130, "backbones", "nbs/backbones", "cala/backbones")
    library = draw_wing(figure, 438, 258, "library", "nbs/library", "cala/library")
    scripts = draw_wing(figure, 738, 142, "scripts", "nbs/commands", "cala/scripts")
    for left, right in ((method, backbones), (backbones, library), (library, scripts)):
        figure.path((right.x, 138), (left.right, 138), stroke=3)
    figure.path((42, 202), (42, 634), stroke=2.4)
    for n, lesson in enumerate(LESSONS):
        figure.box(60, 200 + 34 * n, 152, 28, lesson, look="cell", dashed=lesson in WITHOUT_MODULE, stroke=1.2)
    figure.text(124, 652, "without a lesson", 13)
    for n, name in enumerate(PLAIN):
        figure.box(32 + 95 * (n % 2), 664 + 25 * (n // 2), 89, 22, name, look="cell", size=13, stroke=1.2)
    for n, name in enumerate(BACKBONES):
        figure.box(270, 200 + 34 * n, 122, 28, name, look="cell", stroke=1.2)
    for n, name in enumerate(LIBRARY):
        size = 14 if len(name) < 16 else 13
        figure.box(443 + 126 * (n % 2), 200 + 29 * (n // 2), 122, 25, name, look="cell", size=size, stroke=1.2)
    for n, name in enumerate(SCRIPTS):
        figure.box(743, 200 + 34 * n, 132, 28, name, look="cell", stroke=1.2)
    return figure


def draw_wing(figure: Figure, x: float, width: float, name: str, notebooks: str, package: str) -> Box:
    "The panel of a wing, without its modules."
    panel = figure.box(x, 114, width, 652, look="panel", radius=10, stroke=1.2)
    figure.text(panel.middle_x, 138, name, 17, bold=True)
    figure.lines(panel.middle_x, 169, f"~{notebooks}", f"~{package}", size=13, room=width - 8)
    return panel


# ------------------------------------------------------------------------------------------------------------------
# The logit scale: recall of the committed rows of cala-ablation
# ------------------------------------------------------------------------------------------------------------------

ROWS = HERE.parent / "tutorials/ablation/rows.csv"
PLOT = Box(0, 100, 330, 186)  # place and size of the curves in a panel
LOWEST, HIGHEST = 20, 100  # percent, of the vertical axis


def read_scales(
    world: str,  # of the ablation
    column: str,  # of its rows
) -> dict:  # scale -> recall in percent, the mean over the first five seeds
    "Recall of QTM alone at every fixed scale, in the setting `standard`."
    values = {}
    with open(ROWS, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            scale = re.fullmatch(r"QTM at scale (\d+)", row["arm"])
            if scale and (row["setting"], row["world"]) == ("standard", world) and int(row["seed"]) < 5:
                values.setdefault(int(scale[1]), []).append(float(row[column]))
    return {scale: sum(recalls) / len(recalls) for scale, recalls in sorted(values.items())}


def draw_scale() -> Figure:
    "Recall against the logit scale, on two drawn worlds."
    figure = Figure(
        880,
        352,
        "Recall and the logit scale",
        "Two panels. R@1 and Rs@1 of QTM alone on the drawn CIRR world, and its R@1 and R@10 on the drawn FashionIQ "
        "world, are highest near a logit scale of 6 and fall towards 100.",
    )
    figure.heading("Recall of QTM alone at several logit scales", "Drawn data, no association; the mean of five seeds.")
    on_cirr = {"R@1": ("r", "kept_recall_at1"), "Rs@1": ("c", "kept_group_recall_at1")}
    draw_curves(figure, 70, "CIRR world", "cirr", on_cirr)
    on_fashioniq = {"R@1": ("r", "kept_recall_at1"), "R@10": ("t", "kept_recall_at10")}
    draw_curves(figure, 500, "FashionIQ world", "fashioniq", on_fashioniq)
    return figure


def draw_curves(
    figure: Figure,
    left: float,  # px
    title: str,
    world: str,  # of the ablation
    curves: dict,  # name -> (look, column of the rows)
):
    "A panel: recall in percent against the logit scale, on a logarithmic axis."

    def place(scale, recall):
        share = math.log(scale / 2) / math.log(100 / 2)
        return left + share * PLOT.width, PLOT.bottom - (recall - LOWEST) / (HIGHEST - LOWEST) * PLOT.height

    figure.text(left + PLOT.width / 2, PLOT.y - 14, title, 15, bold=True)
    for percent in range(LOWEST, HIGHEST + 1, 20):
        figure.path(place(2, percent), place(100, percent), heads="none", stroke=0.6)
        figure.text(left - 10, place(2, percent)[1], f"{percent}", 13, "end", muted=True)
    points = {}
    for name, (look, column) in curves.items():
        points = read_scales(world, column)
        corners = [place(scale, recall) for scale, recall in points.items()]
        figure.path(*corners, look=look, heads="none", stroke=2.4, radius=0.1)
        for x, y in corners:
            figure.dot(x, y, look)
        figure.text(corners[-1][0] + 2, corners[-1][1] - 14, name, 14, "end", bold=True)
    for scale in points:
        figure.text(place(scale, LOWEST)[0], PLOT.bottom + 16, f"{scale}", 13, muted=True)
    figure.text(left + PLOT.width / 2, PLOT.bottom + 40, "logit scale", 14)


# ------------------------------------------------------------------------------------------------------------------
# All figures
# ------------------------------------------------------------------------------------------------------------------


def all_figures() -> dict:  # file name -> Figure
    "Every figure by the name of its file."
    figures = {f"architecture_{part}.svg" if part else "architecture.svg": draw_architecture(part) for part in LIT}
    return figures | {
        "associations.svg": draw_associations(),
        "qformer.svg": draw_qformer(),
        "hca.svg": draw_hca(),
        "tac.svg": draw_tac(),
        "step.svg": draw_step(),
        "cache.svg": draw_cache(),
        "run_states.svg": draw_run_states(),
        "wings.svg": draw_wings(),
        "scale.svg": draw_scale(),
    }


def main(
    check: bool,  # compare, and write nothing
) -> int:  # 1 if a file differs
    "Write all files, or compare them with what would be written."
    stale = []
    for name, figure in all_figures().items():
        path, content = HERE / name, figure.svg().encode()
        if not check:
            path.write_bytes(content)
        elif not path.exists() or path.read_bytes() != content:
            stale.append(name)
    if stale:
        print(f"not as draw.py draws them: {', '.join(stale)}; run python nbs/images/draw.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))

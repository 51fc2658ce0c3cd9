"""Triplets, rankings and failures as pictures."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from PIL import Image

from ...annotations import Triplet
from ...data import Gallery, Triplets
from ...errors import CalaError
from .style import BLUE, GREY, VERMILION, Page, break_lines, make_boxes, place_picture, place_text, style


def to_ranks(
    ranks: Iterable,  # a tensor, a list or a column of a table
) -> torch.Tensor:  # (Q,)
    "Ranks of any form as a tensor; ties make halves."
    return torch.tensor([float(rank) for rank in ranks])


def join_captions(
    triplet: Triplet,
) -> str:
    "The modification text; the two sentences of FashionIQ are joined by 'and'."
    return " and ".join(triplet.captions)


def show_triplets(
    dataset: Triplets,  # CIRR or FashionIQ
    indices: Sequence[int],  # which triplets
    members: bool = False,  # also the six pictures of each group (CIRR)
) -> Page:
    "A row for each triplet: reference, modification text, target."
    triplets = [dataset.triplets[i] for i in indices]
    if members and not all(triplet.group for triplet in triplets):
        raise CalaError("members=True needs groups of six, which only CIRR has; leave members out")
    widths = [1, 2.2, 1]
    if members:
        widths += [0.05] + [0.8] * 6
    page, boxes = make_boxes(widths, len(triplets))
    gallery = dataset.gallery
    for row, triplet in zip(boxes, triplets):
        place_picture(row[0], gallery.picture(gallery.position(triplet.reference)), "reference", BLUE)
        place_text(row[1], join_captions(triplet))
        if triplet.target:  # the test split publishes none
            place_picture(row[2], gallery.picture(gallery.position(triplet.target)), "target", VERMILION)
        frames = {triplet.reference: BLUE, triplet.target: VERMILION}
        for box, name in zip(row[4:], triplet.group):
            place_picture(box, gallery.picture(gallery.position(name)), frame=frames.get(name))
    return page


def show_pictures(
    pictures: Sequence[Image.Image],
    labels: Sequence[str] | None = None,  # a line under each
    frames: Sequence[str | None] | None = None,  # colour of each frame; None for a thin grey one
    columns: int = 6,  # pictures in a row
) -> Page:
    "Pictures in rows, each with its label."
    if not pictures:
        raise CalaError("no pictures to show")
    labels = labels or [""] * len(pictures)
    frames = frames or [None] * len(pictures)
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    page, boxes = make_boxes([1] * columns, rows, below=0.4 if any(labels) else 0.1)
    for box, picture, label, frame in zip(boxes.flat, pictures, labels, frames):
        place_picture(box, picture, "\n".join(break_lines(label, 1.05, 8, most=2)), frame)
    return page


@dataclass
class Ranking:
    "One query and its answer, ready to be drawn."

    reference: int  # gallery position
    caption: str  # the modification text
    order: list[int]  # gallery positions, best first; the first few are enough
    scores: list[float] | None = None  # of the pictures in `order`, to be shown
    target: int | None = None  # gallery position, None if it is not known
    rank: float | None = None  # of the target, 1 = first; its place in `order` if None, so give it where scores tie
    note: str = ""  # a heading for the row
    first_ranks: list[int] | None = None  # of the pictures in `order`, before they were ranked again

    def __post_init__(self):
        if self.rank is None and self.target in self.order:
            self.rank = self.order.index(self.target) + 1

    def label(
        self,
        n: int,  # place in `order`
    ) -> str:
        "What stands under a picture: its rank, its score or its rank before it was ranked again, and `target`."
        label = f"{n + 1}"
        if self.first_ranks is not None:
            label += f" · was {self.first_ranks[n]}"
        elif self.scores is not None:
            label += f" · {self.scores[n]:.3g}"
        return f"{label}\ntarget" if self.order[n] == self.target else label

    def missed_target(
        self,
        k: int,  # pictures shown
    ) -> int | None:  # gallery position; None if the target is shown, or not known
        "The target, if it is not among the first k."
        return None if self.target in self.order[:k] else self.target


@style()
def draw_rankings(
    gallery: Gallery,  # of the pictures
    rankings: Sequence[Ranking],
    k: int = 6,  # pictures in a row
) -> Page:
    "A row for each ranking: the query at the left, rank and score under each picture, the target framed."
    widths = [1, 1.5] + [1] * k
    if any(ranking.missed_target(k) is not None for ranking in rankings):
        widths += [0.15, 1]  # dots, and a target that is not among the first k
    page, boxes = make_boxes(widths, len(rankings), below=0.55)
    for row, ranking in zip(boxes, rankings):
        place_picture(row[0], gallery.picture(ranking.reference), "reference", BLUE)
        place_text(row[1], ranking.caption)
        if ranking.note:
            row[0].set_title(ranking.note, fontsize=8, parse_math=False)
        for n, (box, position) in enumerate(zip(row[2 : 2 + k], ranking.order)):
            frame = VERMILION if position == ranking.target else None
            place_picture(box, gallery.picture(position), ranking.label(n), frame)
        missed = ranking.missed_target(k)
        if missed is not None:
            dots, box = row[2 + k :]
            place = f"{ranking.rank:g}" if ranking.rank else f"after {len(ranking.order)}"
            place_picture(box, gallery.picture(missed), f"{place}\ntarget", VERMILION)
            dots.text(0.5, 0.5, "…", ha="center", size=14, color=GREY)
    return page


def show_rankings(
    dataset: Triplets,  # CIRR or FashionIQ
    queries: Sequence[int],  # which triplets
    orders: Sequence | torch.Tensor,  # (len(queries), n) gallery positions, best first
    scores: Sequence | torch.Tensor | None = None,  # (len(queries), n) their scores, to be shown
    ranks: Sequence | torch.Tensor | None = None,  # (len(queries),) of the targets; read off `orders` if None
    k: int = 6,  # pictures in a row
    notes: Sequence[str] | None = None,  # headings, one for each query
) -> Page:
    "Rankings of several triplets of a data set."
    find = dataset.gallery.position
    rankings = []
    for n, (i, order) in enumerate(zip(queries, orders, strict=True)):
        triplet = dataset.triplets[i]
        ranking = Ranking(
            find(triplet.reference),
            join_captions(triplet),
            [int(position) for position in order],
            scores=None if scores is None else [float(score) for score in scores[n]],
            target=find(triplet.target) if triplet.target else None,
            rank=None if ranks is None else float(ranks[n]),
            note="" if notes is None else notes[n],
        )
        rankings.append(ranking)
    return draw_rankings(dataset.gallery, rankings, k)


def failures(
    ranks: Iterable,  # (Q,) ranks of the targets
    kinds: Sequence[str],  # (Q,) kind of each query's edit
    per_kind: int = 1,  # queries of each kind, at most
    above: int = 1,  # a failure is a rank above this
) -> list[int]:  # query numbers
    "The worst failures of each kind; the kind with the largest share of failures comes first."
    table = pd.DataFrame(dict(kind=list(kinds), rank=to_ranks(ranks)))
    table["failed"] = table["rank"] > above
    table["share"] = table.groupby("kind").failed.transform("mean")
    worst = table.query("failed").sort_values(["share", "kind", "rank"], ascending=False)
    return worst.groupby("kind", sort=False).head(per_kind).index.tolist()


def show_failures(
    dataset: Triplets,  # CIRR or FashionIQ
    ranks: Iterable,  # (Q,) ranks of the targets
    orders: Sequence | torch.Tensor,  # (Q, n) gallery positions, best first
    kinds: Sequence[str],  # (Q,) kind of each query's edit
    per_kind: int = 1,  # queries of each kind, at most
    above: int = 1,  # a failure is a rank above this
    k: int = 5,  # pictures in a row
) -> Page:
    "Rankings of the worst failures, sorted by kind of edit."
    ranks = to_ranks(ranks)
    worst = failures(ranks, kinds, per_kind, above)
    if not worst:
        raise CalaError(f"no query has a rank above {above}: there is no failure to show")
    notes = [f"{kinds[i]}: the target has rank {ranks[i]:g}" for i in worst]
    return show_rankings(dataset, worst, [orders[i] for i in worst], None, ranks[worst], k, notes)

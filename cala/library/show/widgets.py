"""Widgets for notebooks: triplets to look through, and a gallery to ask.

Each is a plain object first, with methods that take and return values and a `figure()`. The widget is built on top when
it is first shown; a front end without widgets (a web page, a PDF) shows the figure.
"""

from base64 import b64encode
from collections.abc import Callable
from functools import cached_property
from html import escape
from io import BytesIO
from typing import Any

import ipywidgets
import torch
from torch import Tensor

from ...contrast import association_logits
from ...data import Gallery
from ...data import Triplets
from ...errors import CalaError
from ...model import CaLa
from ...objectives import released
from ...rerank import Reranker
from ...retrieval import evaluating
from ...retrieval import load_batches
from ...retrieval import rank_table
from ...retrieval import sections
from .cards import Ranking
from .cards import draw_rankings
from .cards import join_captions
from .cards import show_triplets
from .style import BLUE
from .style import GREY
from .style import VERMILION
from .style import Page
from .style import make_boxes
from .style import notebook_output
from .style import place_text
from .style import small_png


class Movable:
    "An object with a `figure()` and a `widget`. A subclass has `build_widget`, `fill_widget` and `figure`."

    # A user moves a control, or a line in a cell calls a method: the widget must follow both. So every method ends in
    # `update_widget`, which sets all controls. But ipywidgets calls a control's observers also when a program sets it:
    # setting the first control would call the method again, while the other controls still have their old values.
    # Therefore `filling` is true while the controls are set, and what `observe` has connected does nothing meanwhile.
    filling = False

    @cached_property
    def widget(self) -> ipywidgets.Widget:
        "The widget, built on first use."
        return self.build_widget()

    def build_widget(self) -> ipywidgets.Widget:
        "Make the widget."
        raise NotImplementedError

    def fill_widget(self):
        "Bring all controls and pictures of the widget up to date."
        raise NotImplementedError

    def figure(self) -> Page:
        "What the widget shows, as a figure."
        raise NotImplementedError

    def update_widget(self):
        "Bring the widget up to date, if there is one."
        if "widget" not in self.__dict__:
            return
        self.filling = True
        try:
            self.fill_widget()
        finally:
            self.filling = False

    def observe(
        self,
        control: ipywidgets.Widget,
        act: Callable,  # is called with the new value
    ):
        "Call `act` when a user changes a control, and not when `fill_widget` does."

        def notice(change):
            if not self.filling:
                act(change["new"])

        control.observe(notice, "value")

    def _repr_mimebundle_(self, **kwargs):
        return (self.widget._repr_mimebundle_() or {}) | notebook_output(self, self.figure())


def html_image(
    figure: Page,
    alt: str,  # what it shows, for readers who do not see it
) -> str:
    "A figure as an HTML image, which a narrow window can shrink."
    data = b64encode(small_png(figure)).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(alt, quote=True)}" style="max-width:100%">'


def side_by_side(
    *parts: ipywidgets.Widget,
) -> ipywidgets.HBox:
    "Widgets in a row, or in as many rows as a narrow window needs."
    return ipywidgets.HBox(parts, layout=ipywidgets.Layout(flex_flow="row wrap"))


class TripletBrowser(Movable):
    "Look through a data set's triplets, by kind of edit and by words."

    def __init__(
        self,
        dataset: Triplets,  # CIRR or FashionIQ
        kinds: list[str] | None = None,  # (Q,) kind of each triplet, if known: see `edit_kinds`
        members: bool = False,  # also the group of six
    ):
        self.dataset, self.kinds, self.members = dataset, kinds, members
        self.matches = list(range(len(dataset.triplets)))
        self.at = 0  # place in `matches`
        self.kind, self.text = "all", ""

    def find(
        self,
        kind: str = "all",  # a kind of edit, or all
        text: str = "",  # words that must all stand in the modification text
    ) -> list[int]:  # numbers of the triplets found
        "Choose the triplets to look at; the first of them becomes the current one."
        words = text.lower().split()
        matches = []
        for i, triplet in enumerate(self.dataset.triplets):
            caption = join_captions(triplet).lower()
            if kind in ("all", self.kinds and self.kinds[i]) and all(word in caption for word in words):
                matches.append(i)
        self.matches, self.at, self.kind, self.text = matches, 0, kind, text
        self.update_widget()
        return matches

    def go(
        self,
        steps: int = 1,  # forward, or backward if negative
    ) -> int | None:  # number of the triplet; None if nothing was found
        "Step to another of the triplets found."
        if not self.matches:
            return None
        self.at = (self.at + steps) % len(self.matches)
        self.update_widget()
        return self.matches[self.at]

    def __repr__(self):
        return f"TripletBrowser: {len(self.matches)} of {len(self.dataset.triplets)} triplets"

    def figure(self) -> Page:
        "The current triplet."
        if self.matches:
            return show_triplets(self.dataset, [self.matches[self.at]], self.members)
        page, boxes = make_boxes([4.5], 1, 0.6)
        place_text(boxes[0, 0], "no triplet has these words", arrow=False)
        return page

    def fill_widget(self):
        "Bring filters, count and picture up to date."
        self.kind_menu.value, self.text_box.value = self.kind, self.text
        if self.matches:
            self.count.value = f"{self.at + 1} of {len(self.matches)}"
            caption = join_captions(self.dataset.triplets[self.matches[self.at]])
        else:
            self.count.value = "none"
            caption = "nothing found"
        self.card.value = html_image(self.figure(), caption)

    def build_widget(self) -> ipywidgets.VBox:
        "Filters over a picture."
        options = ["all", *sorted(set(self.kinds or []))]
        self.kind_menu = ipywidgets.Dropdown(options=options, description="kind of edit", disabled=not self.kinds)
        self.text_box = ipywidgets.Text(placeholder="words in the sentence", continuous_update=False)
        self.previous = ipywidgets.Button(description="previous")
        self.next = ipywidgets.Button(description="next")
        self.count, self.card = ipywidgets.Label(), ipywidgets.HTML()
        self.fill_widget()
        for control in (self.kind_menu, self.text_box):
            self.observe(control, lambda _: self.find(str(self.kind_menu.value), str(self.text_box.value)))
        self.previous.on_click(lambda _: self.go(-1))
        self.next.on_click(lambda _: self.go(1))
        controls = side_by_side(self.kind_menu, self.text_box, self.previous, self.next, self.count)
        return ipywidgets.VBox([controls, self.card])


def embed_gallery(
    model: CaLa,
    dataset: Triplets,  # its pictures must give tensors
    embed: Callable[[Tensor], Tensor],  # trunk tokens (B, N, w) -> one entry for each
) -> Tensor:  # (G, ...)
    "What a function gives for the trunk tokens of all pictures of the gallery."
    if not torch.is_tensor(dataset.pictures[0]):
        raise CalaError("the data set gives PIL pictures; open it with transform=model.backbone.transform()")
    batches = load_batches(dataset.pictures, 64, next(model.parameters()).device)
    with evaluating(model):
        return torch.cat([embed(model.tokens(batch)).float() for batch in batches])


def association_votes(
    model: CaLa,
    picture: Tensor,  # (1, 3, H, W) or tokens (1, N, w) of the reference
    caption: str,  # the modification text
    targets: Tensor,  # (n, L, d) image tokens of the gallery
    which: set[str],  # TBIA, CTR or both
    features: Tensor
    | None = None,  # (n, d) of the gallery, for a compositor that reads features; None: the first tokens
) -> dict[str, Tensor]:  # z_tbia and z_ctr, (n,) each, as far as `which` names them
    "Logits of the associations for one query and every picture of a gallery, as if it were the target."
    backbone = model.backbone
    tokens = model.tokens(picture)
    F_r, F_c = backbone.query(tokens, [caption]), backbone.text([caption])
    count = len(targets)
    logits = {}
    if "TBIA" in which and model.hca is not None:
        mask = F_c.mask.expand(count, -1) if model.mask_padding else None
        hca = model.hca(F_r.tokens.expand(count, -1, -1), F_c.tokens.expand(count, -1, -1), targets, mask)
        logits["z_tbia"] = association_logits(hca, F_r.feature, model.tbia_scale, model.normalise)[:, 0]
    if "CTR" in which and model.compositor is not None:
        alone = backbone.image(tokens)
        if model.compositor.reads == "feature":
            candidates = targets[:, 0] if features is None else features
            logits["z_ctr"] = model.score_pairs(F_r.feature, F_c.feature, alone.feature, candidates[None])[0]
        else:
            pairs = model.compositor(alone.tokens.expand(count, -1, -1), targets)
            query = model.compositor.query(F_r.feature, F_c.feature)
            logits["z_ctr"] = association_logits(pairs, query, model.ctr_scale, model.normalise)[:, 0]
    return logits


def joint_scores(
    model: CaLa,
    z_qtm: Tensor,  # (n,) logits of query-target matching
    z_tbia: Tensor | None = None,  # (n,), if TBIA votes
    z_ctr: Tensor | None = None,  # (n,), if CTR votes
) -> Tensor:  # (n,)
    "Minus the loss of the query's row if a picture were the target; over the candidates, not over a batch."
    w_tbia, w_ctr = model.w_tbia, model.w_ctr
    if model.objective is released:
        mixed = z_qtm if z_ctr is None else (1 - w_ctr) * z_qtm + w_ctr * z_ctr
        scores = mixed.log_softmax(-1)
        return scores if z_tbia is None else (1 - w_tbia) * scores + w_tbia * z_tbia.log_softmax(-1)
    scores = z_qtm.log_softmax(-1)
    for weight, logits in ((w_tbia, z_tbia), (w_ctr, z_ctr)):
        if logits is not None:
            scores = scores + weight * logits.log_softmax(-1)
    return scores


class PictureButton:
    "A picture that can be clicked, with a line of text under it."

    def __init__(
        self,
        click: Callable,  # called with the gallery position when the picture is clicked
        side: int = 96,  # pixels
    ):
        size = dict(width=f"{side}px", height=f"{side}px")
        over_the_picture = f"-{side + 4}px 0 4px 2px"
        self.position = 0
        self.image, self.text = ipywidgets.Image(layout=ipywidgets.Layout(**size)), ipywidgets.HTML()
        # ipywidgets has no picture that is a button: a transparent button lies over it, which the keyboard reaches too.
        layout = ipywidgets.Layout(margin=over_the_picture, **size)
        self.button = ipywidgets.Button(layout=layout, tooltip="take as reference")
        self.button.style.button_color = "transparent"
        self.button.on_click(lambda _: click(self.position))
        self.box = ipywidgets.VBox([self.image, self.button, self.text])

    def show(
        self,
        gallery: Gallery,
        position: int,  # which picture
        text: str = "",  # the line under it
        frame: str | None = None,  # colour of its frame
    ):
        "Show another picture."
        self.position = int(position)
        picture = gallery.picture(self.position)
        picture.thumbnail((192, 192))
        file = BytesIO()
        picture.save(file, "PNG")
        self.image.value, self.text.value = file.getvalue(), text
        self.image.layout.border = f"3px solid {frame}" if frame else f"1px solid {GREY}"


AGAIN = ", ranked again"  # ends the name of a ranking that is the second of its model


class QueryExplorer(Movable):
    "Rank a gallery for any reference and any modification text, with one model or several."

    def __init__(
        self,
        models: CaLa | dict[str, CaLa],  # one, or several by name
        dataset: Triplets,  # CIRR or FashionIQ, opened with the models' transform
        k: int = 6,  # pictures shown
        rerank: int = 20,  # how many of the best pictures the switch `rank again` ranks again
        rerank_weight: float | None = None,  # of CTR in the second ranking; None: there is no switch
    ):
        self.models = models if isinstance(models, dict) else {"": models}
        self.dataset, self.k = dataset, k
        self.rerankers = {}  # by name of the model
        if rerank_weight is not None:
            for name, model in self.models.items():
                if getattr(model.compositor, "reads", None) == "feature":
                    self.rerankers[name] = Reranker(model, rerank, rerank_weight)
            if not self.rerankers:
                raise CalaError(
                    "rerank_weight: no model here has a compositor of pairs; load a checkpoint trained with --ctr pairs"
                )
        self.is_again = False  # whether both rankings are shown
        self.features = {
            name: embed_gallery(model, dataset, model.embed_gallery) for name, model in self.models.items()
        }
        self.tokens: dict[str, Tensor] = {}  # of the gallery, for models whose associations vote
        self.added: set[str] = set()  # associations that vote
        self.pick(0)

    def candidates(
        self,
        reference: int,  # gallery position
    ) -> Tensor:  # gallery positions
        "The pictures that are ranked for a reference: CIRR leaves the reference out, FashionIQ keeps to its category."
        inside = []
        for section in sections(self.dataset):
            if (section.gallery == reference).any():
                inside.append(section.gallery)
        positions = torch.cat(inside).unique()
        return positions[positions != reference] if self.dataset.name == "CIRR" else positions

    def held(
        self,
        name: str | None = None,  # of a model; None for all of them
    ) -> set[str]:  # of TBIA, CTR
        "The associations that a model still holds."
        associations = set()
        for model in self.models.values() if name is None else [self.models[name]]:
            if model.hca is not None:
                associations.add("TBIA")
            if model.compositor is not None:
                associations.add("CTR")
        return associations

    def score(
        self,
        name: str,  # of a model
        reference: int,  # gallery position
        caption: str,  # the modification text
        rivals: Tensor,  # (n,) gallery positions
    ) -> Tensor:  # (n,)
        "The frame's scores; if associations vote, those of `joint_scores`."
        model, voting = self.models[name], self.added & self.held(name)
        frame: Any = model.frame
        picture = self.dataset.pictures[reference][None].to(self.features[name].device)
        with evaluating(model):
            z_qtm = frame.scores(*model.embed_queries(picture, [caption]), self.features[name])[0, rivals]
            if not voting:
                return z_qtm.cpu()
            if name not in self.tokens:
                backbone = model.backbone
                self.tokens[name] = embed_gallery(model, self.dataset, lambda tokens: backbone.image(tokens).tokens)
            features = self.features[name][rivals]
            votes = association_votes(model, picture, caption, self.tokens[name][rivals], voting, features)
            return joint_scores(model, z_qtm, **votes).cpu()

    def rank(
        self,
        name: str,  # of a model
        reference: int,  # gallery position
        caption: str,  # the modification text
        target: int | None = None,  # gallery position, if it is known
    ) -> Ranking:
        "The ranking of one model for one query."
        rivals = self.candidates(reference)
        scores = self.score(name, reference, caption, rivals)
        order = scores.argsort(descending=True)
        place = (rivals == (-1 if target is None else target)).nonzero()[:, 0]  # of the target among them, (1,) or (0,)
        rank = None
        if len(place):  # tied pictures count as the mean over their orders, as in the tables of `evaluate`
            ranks = rank_table(scores[None], place)
            rank = float(ranks.rank + ranks.ties / 2)
        return Ranking(reference, caption, rivals[order].tolist(), scores[order].tolist(), target, rank, name)

    def rank_again(
        self,
        name: str,  # of a model in `rerankers`
        reference: int,  # gallery position
        caption: str,  # the modification text
        target: int | None = None,  # gallery position, if it is known
    ) -> Ranking:
        "The ranking of one model by QTM alone, with its best pictures ranked again by CTR."
        model, reranker, rivals = self.models[name], self.rerankers[name], self.candidates(reference)
        frame: Any = model.frame
        features = self.features[name]
        gallery, own = features[rivals], features[reference][None]
        picture = self.dataset.pictures[reference][None].to(features.device)
        with evaluating(model):
            f_r, f_c = (feature.float() for feature in model.embed_queries(picture, [caption]))
            z_qtm, positions = frame.scores(f_r, f_c, gallery).sort(descending=True, stable=True)
            first = rivals[positions[0].cpu()].tolist()
            positions = reranker.sort(positions, z_qtm, (f_r, f_c, own), gallery)
        order = rivals[positions[0].cpu()].tolist()
        place = (rivals == (-1 if target is None else target)).nonzero()[:, 0]  # of the target among them, (1,) or (0,)
        rank = None
        if len(place):
            ranks = reranker.rank_queries(frame, f_r, f_c, gallery, own, place)
            rank = float(ranks.rank + ranks.ties / 2)
        moved = [first.index(position) + 1 for position in order]
        return Ranking(reference, caption, order, None, target, rank, f"{name}{AGAIN}".removeprefix(", "), moved)

    def ask(
        self,
        reference: int,  # gallery position
        caption: str,  # the modification text
        target: int | None = None,  # gallery position, if it is known
    ) -> dict[str, Ranking]:  # by name of the model
        "Rank the gallery for a query."
        self.reference, self.caption, self.target = int(reference), caption, target
        self.rankings = {}
        for name in self.models:
            self.rankings[name] = self.rank(name, self.reference, caption, target)
            if self.is_again and name in self.rerankers:
                self.rankings[name + AGAIN] = self.rank_again(name, self.reference, caption, target)
        self.update_widget()
        return self.rankings

    def switch_again(
        self,
        is_on: bool = True,
    ) -> dict[str, Ranking]:  # by name of the model; the second of a model under its name and `AGAIN`
        "Show the second ranking under the first, or the first alone."
        if is_on and not self.rerankers:
            raise CalaError(
                "give rerank_weight, and a model trained with --ctr pairs; cala-validate --rerank 20 chooses a weight"
            )
        self.is_again = is_on
        return self.ask(self.reference, self.caption, self.target)

    def add(
        self,
        *associations: str,  # TBIA, CTR; none of them is retrieval as it is
    ) -> dict[str, Ranking]:  # by name of the model
        "Let these associations vote along with matching, and no other. The paper uses them in training only."
        absent = set(associations) - self.held()
        if absent:
            raise CalaError(f"no model here holds {', '.join(sorted(absent))}; load a checkpoint trained with it")
        self.added = set(associations)
        return self.ask(self.reference, self.caption, self.target)

    def pick(
        self,
        i: int,  # which triplet
    ) -> dict[str, Ranking]:  # by name of the model
        "Take a triplet's reference and modification text, and frame its target."
        triplet, find = self.dataset.triplets[i], self.dataset.gallery.position
        self.picked = i
        target = find(triplet.target) if triplet.target else None
        return self.ask(find(triplet.reference), join_captions(triplet), target)

    def figure(self) -> Page:
        "The current rankings, a row for each model."
        return draw_rankings(self.dataset.gallery, list(self.rankings.values()), self.k)

    def __repr__(self):
        names = [name for name in self.models if name]
        return f"QueryExplorer: {len(self.dataset.gallery):,} pictures, {', '.join(names) or 'one model'}"

    def fill_widget(self):
        "Bring controls and pictures up to date."
        gallery = self.dataset.gallery
        self.triplet_slider.value, self.caption_box.value = self.picked, self.caption
        for name, box in self.voters.items():
            box.value = name in self.added
        self.again_box.value = self.is_again
        self.answer_rows.children = [self.rows[name] for name in self.rankings]
        self.question.show(gallery, self.reference, "reference", BLUE)
        for name, ranking in self.rankings.items():
            parts = [ranking.note] if ranking.note else []
            if ranking.rank:
                parts.append(f"the target has rank {ranking.rank:g}")
            self.titles[name].value = ": ".join(parts)
            for n, (button, position) in enumerate(zip(self.answers[name], ranking.order)):
                text = ranking.label(n)
                if position == ranking.target:
                    button.show(gallery, position, f"{text} · target", VERMILION)
                else:
                    button.show(gallery, position, text)

    def build_widget(self) -> ipywidgets.VBox:
        "A triplet slider, a modification text, boxes for what ranks, the reference, and rows of pictures."
        Layout = ipywidgets.Layout
        last = len(self.dataset.triplets) - 1
        self.triplet_slider = ipywidgets.IntSlider(max=last, description="triplet", continuous_update=False)
        self.caption_box = ipywidgets.Text(description="sentence", continuous_update=False, layout=Layout(width="36em"))
        self.voters = {}
        for name in ("TBIA", "CTR"):
            options: dict[str, Any] = dict(description=f"{name} votes", disabled=name not in self.held(), indent=False)
            self.voters[name] = ipywidgets.Checkbox(layout=Layout(width="9em"), **options)
        self.again_box = ipywidgets.Checkbox(
            description="rank again", disabled=not self.rerankers, indent=False, layout=Layout(width="9em")
        )
        self.question = PictureButton(self._take_reference)
        names = [*self.models, *[name + AGAIN for name in self.rerankers]]
        self.titles = {name: ipywidgets.Label() for name in names}
        self.answers = {name: [PictureButton(self._take_reference) for _ in range(self.k)] for name in names}
        self.rows = {}  # by name of the ranking; those of `rankings` are shown
        for name, buttons in self.answers.items():
            row = side_by_side(*[button.box for button in buttons])
            self.rows[name] = ipywidgets.VBox([self.titles[name], row])
        self.answer_rows = ipywidgets.VBox()
        self.fill_widget()
        self.observe(self.triplet_slider, self.pick)
        self.observe(self.caption_box, lambda caption: self.ask(self.reference, caption))
        for box in self.voters.values():
            self.observe(box, self._count_votes)
        self.observe(self.again_box, self.switch_again)
        # The empty label keeps the reference on one line with the first row of answers.
        question = ipywidgets.VBox([ipywidgets.Label(), self.question.box])
        votes = side_by_side(self.again_box, *self.voters.values())
        pictures = ipywidgets.HBox([question, self.answer_rows])
        return ipywidgets.VBox([self.triplet_slider, self.caption_box, votes, pictures])

    def _take_reference(self, position: int):
        self.ask(position, self.caption_box.value)

    def _count_votes(self, _):
        self.add(*[name for name, box in self.voters.items() if box.value])

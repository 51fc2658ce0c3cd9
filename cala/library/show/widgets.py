"""Widgets for notebooks: triplets to look through, and a gallery to ask.

Each is a plain object first, with methods that take and return values and a `figure()`. The widget is built on top when
it is first shown; a front end without widgets (a web page, a PDF) shows the figure.
"""

from base64 import b64encode
from collections.abc import Callable
from functools import cached_property, partial
from html import escape
from io import BytesIO
from typing import Any

import ipywidgets
import torch
from torch import Tensor

from ...contrast import association_logits
from ...data import Gallery, Triplets
from ...encoders import Embedding
from ...errors import CalaError
from ...model import CaLa, Encoded
from ...objectives import released
from ...rerank import Reranker
from ...retrieval import evaluating, load_batches, rank_table, sections
from .cards import Ranking, draw_rankings, join_captions, show_triplets
from .style import BLUE, GREY, VERMILION, Page, notebook_output, small_png, write_page


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
    ):
        self.dataset, self.kinds = dataset, kinds
        self.find()

    def find(
        self,
        kind: str = "all",  # a kind of edit, or all
        text: str = "",  # words that must all stand in the modification text
    ) -> list[int]:  # numbers of the triplets found
        "Choose the triplets to look at; the first of them becomes the current one."
        self.kind, self.text = kind, text
        self.matches, self.at = [], 0  # numbers of triplets, and the place of the current one among them
        for i, triplet in enumerate(self.dataset.triplets):
            caption = join_captions(triplet).lower()
            if kind in ("all", self.kinds and self.kinds[i]) and all(word in caption for word in text.lower().split()):
                self.matches.append(i)
        self.update_widget()
        return self.matches

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
            return show_triplets(self.dataset, [self.matches[self.at]])
        return write_page("no triplet has these words")

    def fill_widget(self):
        "Bring filters, count and picture up to date."
        self.kind_menu.value, self.text_box.value = self.kind, self.text
        count, caption = "none", "nothing found"
        if self.matches:
            count = f"{self.at + 1} of {len(self.matches)}"
            caption = join_captions(self.dataset.triplets[self.matches[self.at]])
        self.count.value, self.card.value = count, html_image(self.figure(), caption)

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
    features: Tensor | None = None,  # (n, d) of the gallery; None: the first tokens
) -> dict[str, Tensor]:  # z_tbia and z_ctr, (n,) each, as far as `which` names them
    "Logits of the associations for one query and every picture of a gallery, as if it were the target."
    tokens, count = model.tokens(picture), len(targets)
    query = model.backbone.query(tokens, [caption]), model.backbone.text([caption]), model.backbone.image(tokens)
    F_r, F_c, F_r_alone = (Embedding(*(part.expand(count, *part.shape[1:]) for part in each)) for each in query)
    F_t = Embedding(targets, targets[:, 0] if features is None else features, torch.ones(targets.shape[:2]))
    vectors = model.associate(Encoded(F_r, F_c, F_t, F_r_alone))
    logits = {}
    if "TBIA" in which and vectors.hca is not None:
        z_tbia = association_logits(vectors.hca, vectors.f_r[:1], model.tbia_scale, model.normalise)
        logits["z_tbia"] = z_tbia[:, 0]
    if "CTR" in which and vectors.pair is not None and vectors.pair_query is not None:
        z_ctr = association_logits(vectors.pair, vectors.pair_query[:1], model.ctr_scale, model.normalise)
        logits["z_ctr"] = z_ctr[:, 0]
    return logits


def joint_scores(
    model: CaLa,
    z_qtm: Tensor,  # (n,) logits of query-target matching
    z_tbia: Tensor | None = None,  # (n,), if TBIA votes
    z_ctr: Tensor | None = None,  # (n,), if CTR votes
) -> Tensor:  # (n,)
    "Minus the loss of the query's row if a picture were the target; over the candidates, not over a batch."
    w_tbia, w_ctr = model.w_tbia, model.w_ctr
    if model.objective is released and z_ctr is not None:
        z_qtm, z_ctr = (1 - w_ctr) * z_qtm + w_ctr * z_ctr, None
    scores = z_qtm.log_softmax(-1)
    if model.objective is released and z_tbia is not None:
        scores = (1 - w_tbia) * scores
    for weight, logits in ((w_tbia, z_tbia), (w_ctr, z_ctr)):
        if logits is not None:
            scores = scores + weight * logits.log_softmax(-1)
    return scores


class PictureButton(ipywidgets.VBox):
    "A picture that can be clicked, with a line of text under it."

    def __init__(
        self,
        click: Callable,  # called with the gallery position when the picture is clicked
    ):
        size, self.position = dict(width="96px", height="96px"), 0
        self.image, self.text = ipywidgets.Image(layout=size), ipywidgets.HTML()
        # ipywidgets has no picture that is a button: a transparent button lies over it, which the keyboard reaches too.
        layout, style = dict(margin="-100px 0 4px 2px", **size), dict(button_color="transparent")
        self.button = ipywidgets.Button(layout=layout, style=style, tooltip="take as reference")
        self.button.on_click(lambda _: click(self.position))
        super().__init__([self.image, self.button, self.text])

    def show(
        self,
        gallery: Gallery,
        position: int,  # which picture
        text: str,  # the line under it
        frame: str | None = None,  # colour of its frame
    ):
        "Show another picture."
        self.position = position
        picture, file = gallery.picture(position), BytesIO()
        picture.thumbnail((192, 192))
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
        inside = [section.gallery for section in sections(self.dataset) if reference in section.gallery]
        positions = torch.cat(inside).unique()
        return positions[positions != reference] if self.dataset.name == "CIRR" else positions

    def held(
        self,
        name: str | None = None,  # of a model; None for all of them
    ) -> set[str]:  # of TBIA, CTR
        "The associations that a model still holds."
        models = self.models.values() if name is None else [self.models[name]]
        associations = {"TBIA" for model in models if model.hca is not None}
        return associations | {"CTR" for model in models if model.compositor is not None}

    def rank(
        self,
        name: str,  # of a model
        is_again: bool = False,  # by QTM alone, and the best pictures again by CTR
    ) -> Ranking:
        "One model's ranking for the current query; ties count as the mean over their orders, as in `evaluate`."
        model, features = self.models[name], self.features[name]
        frame: Any = model.frame
        rivals = self.candidates(self.reference).to(features.device)
        place = (rivals == (-1 if self.target is None else self.target)).nonzero()[:, 0]  # (1,), or (0,)
        picture = self.dataset.pictures[self.reference][None].to(features.device)
        with evaluating(model):
            f_r, f_c = (feature.float() for feature in model.embed_queries(picture, [self.caption]))
            scores = frame.scores(f_r, f_c, features)[:, rivals]
            if is_again:
                reranker, gallery = self.rerankers[name], features[rivals]
                query = f_r, f_c, features[[self.reference]]
                first = scores.argsort(descending=True, stable=True)
                order = reranker.sort(first, scores.gather(1, first), query, gallery)[0]
                find_ranks = partial(reranker.rank_block, scores, query, gallery, exclude=None, groups=None)
                shown = dict(first_ranks=(first[0].argsort()[order] + 1).tolist())
            else:
                scores = self.count_votes(name, picture, rivals, scores)
                order = scores[0].argsort(descending=True)
                find_ranks = partial(rank_table, scores)
                shown = dict(scores=scores[0, order].tolist())
            ranks = find_ranks(place) if len(place) else None
        rank = None if ranks is None else float(ranks.rank + ranks.ties / 2)
        note = f"{name}{AGAIN}".removeprefix(", ") if is_again else name
        return Ranking(
            self.reference, self.caption, rivals[order].tolist(), target=self.target, rank=rank, note=note, **shown
        )

    def count_votes(
        self,
        name: str,  # of a model
        picture: Tensor,  # (1, 3, H, W), the reference
        rivals: Tensor,  # (n,) gallery positions
        z_qtm: Tensor,  # (1, n)
    ) -> Tensor:  # (1, n)
        "The scores of a model, after the votes of its associations."
        model, voting = self.models[name], self.added & self.held(name)
        if not voting:
            return z_qtm
        if name not in self.tokens:
            backbone = model.backbone
            self.tokens[name] = embed_gallery(model, self.dataset, lambda tokens: backbone.image(tokens).tokens)
        targets, features = self.tokens[name][rivals], self.features[name][rivals]
        votes = association_votes(model, picture, self.caption, targets, voting, features)
        return joint_scores(model, z_qtm, **votes)

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
            self.rankings[name] = self.rank(name)
            if self.is_again and name in self.rerankers:
                self.rankings[name + AGAIN] = self.rank(name, is_again=True)
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
            rank = f"the target has rank {ranking.rank:g}" if ranking.rank else ""
            self.titles[name].value = ": ".join(filter(None, [ranking.note, rank]))
            for n, (button, position) in enumerate(zip(self.answers[name], ranking.order)):
                frame = VERMILION if position == ranking.target else None
                button.show(gallery, position, ranking.label(n).replace("\n", " · "), frame)

    def build_widget(self) -> ipywidgets.VBox:
        "A triplet slider, a modification text, boxes for what ranks, the reference, and rows of pictures."
        last = len(self.dataset.triplets) - 1
        self.triplet_slider = ipywidgets.IntSlider(max=last, description="triplet", continuous_update=False)
        self.caption_box = ipywidgets.Text(description="sentence", continuous_update=False, layout=dict(width="36em"))
        options: dict[str, Any] = dict(indent=False, layout=dict(width="9em"))
        self.again_box = ipywidgets.Checkbox(description="rank again", disabled=not self.rerankers, **options)
        self.voters = {}
        for name in ("TBIA", "CTR"):
            is_absent = name not in self.held()
            self.voters[name] = ipywidgets.Checkbox(description=f"{name} votes", disabled=is_absent, **options)
        self.question = PictureButton(self._take_reference)
        self.titles, self.answers, self.rows = {}, {}, {}  # by name of the ranking; the rows of `rankings` are shown
        for name in [*self.models, *[name + AGAIN for name in self.rerankers]]:
            self.titles[name] = ipywidgets.Label()
            self.answers[name] = [PictureButton(self._take_reference) for _ in range(self.k)]
            self.rows[name] = ipywidgets.VBox([self.titles[name], side_by_side(*self.answers[name])])
        self.answer_rows = ipywidgets.VBox()
        self.fill_widget()
        self.observe(self.triplet_slider, self.pick)
        self.observe(self.caption_box, lambda caption: self.ask(self.reference, caption))
        self.observe(self.again_box, self.switch_again)
        for box in self.voters.values():
            self.observe(box, lambda _: self.add(*[name for name, box in self.voters.items() if box.value]))
        # The empty label keeps the reference on one line with the first row of answers.
        question = ipywidgets.VBox([ipywidgets.Label(), self.question])
        votes = side_by_side(self.again_box, *self.voters.values())
        pictures = ipywidgets.HBox([question, self.answer_rows])
        return ipywidgets.VBox([self.triplet_slider, self.caption_box, votes, pictures])

    def _take_reference(self, position: int):
        self.ask(position, self.caption_box.value)

"""A checkpoint as a model of mteb, the benchmark of embedding models.

    import mteb
    from cala.library.mteb_model import MtebModel

    model = MtebModel("runs/mine/best", device="cuda")
    tasks = mteb.get_tasks(tasks=["CIRRIT2IRetrieval", "FashionIQIT2IRetrieval"])
    print(mteb.evaluate(model, tasks).to_dataframe())

`pip install "cala[mteb]"` installs mteb on Python 3.12 and later. On Python 3.10 and 3.11 this project installs LAVIS,
which needs an older transformers than mteb.

mteb's recall and that of `cala-validate` agree to the last query on the same gallery, queries and pictures. mteb's own
tasks differ from `cala-validate` in these points:

- Gallery: CIRRIT2IRetrieval ranks the 21,551 pictures of all splits of CIRR, FashionIQIT2IRetrieval the 74,381 of all
  splits and categories of FashionIQ. `cala-validate --gallery all` ranks the same galleries.
- Reference: mteb ranks the reference, too. `cala-validate` leaves it out for CIRR, and ranks it for FashionIQ.
- Queries: mteb joins queries with the same reference and text into one query with several right answers, and its recall
  is the share of them that is found: 4,170 queries of 4,181 for CIRR, 6,003 of 6,016 for FashionIQ.
- Ties: mteb orders pictures with equal scores by their names; `cala-validate` counts the mean over all orders.
- Pictures and texts come from M-BEIR's copies of the data sets, whose pictures may have other sizes.
- Score: mteb's main score is nDCG@10; R@k is `recall_at_k`. There is no Rs@k.
"""

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..composition import Combiner, Sum
from ..errors import CalaError
from ..pictures import make_rgb
from ..progress import show_progress
from ..retrieval import evaluating
from .checkpoint import load_checkpoint, read_recipe
from .loading import find_device

TASKS = dict(CIRR="CIRRIT2IRetrieval", FashionIQ="FashionIQIT2IRetrieval")  # of mteb, by data set


class MtebModel:
    "A model as mteb's `EncoderProtocol` wants it. Only `mteb_model_meta` needs mteb."

    def __init__(
        self,
        checkpoint: str | Path,  # folder that cala-train wrote
        revision: str | None = None,  # of the weights; None: the beginning of their hash
        *,
        device: str | None = None,  # as torch calls it; None: a GPU if there is one
        **backbone_options: str,  # where this machine keeps published weights: weights, tokenizer
    ):
        content = read_recipe(checkpoint)
        self.name = Path(checkpoint).absolute().name
        self.revision = revision or content["sha256"][:16]
        self.dataset = content["recipe"].get("dataset")
        self.device = find_device(device)
        self.model = load_checkpoint(checkpoint, **backbone_options).for_retrieval().to(self.device)
        if not isinstance(self.model.frame, Sum | Combiner):
            raise CalaError(
                f"{checkpoint} composes with {self.model.config['cir_frame']}, which scores each pair of query and "
                "picture; mteb compares one vector of each: give a model with sum or combiner"
            )
        kind, ratio = content["recipe"].get("transform"), content["recipe"].get("target_ratio")
        self.transform = self.model.backbone.transform(kind or "targetpad", ratio or 1.25)

    @property
    def mteb_model_meta(self) -> Any:  # mteb's ModelMeta
        "What mteb writes beside its results."
        mteb: Any = import_module("mteb.models.model_meta")
        facts = dict(
            name=f"cala/{self.name}",
            revision=self.revision,
            languages=["eng-Latn"],
            modalities=["image", "text"],
            n_parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            embed_dim=self.model.backbone.dim,
            framework=["PyTorch"],
            similarity_fn_name=mteb.ScoringFunction.COSINE,
            use_instructions=False,
            training_datasets={TASKS[self.dataset]} if self.dataset in TASKS else None,
        )
        return mteb.ModelMeta.create_empty(facts)

    def encode(
        self,
        inputs: Iterable[dict[str, Any]],  # batches with image (B pictures), text (B texts), or both
        show_progress_bar: bool = True,
        **_: Any,  # what mteb says about the task
    ) -> Tensor:  # (N, d), each row of length 1
        "One vector for each picture, text, or picture with a text that changes it."
        batches = show_progress(inputs, "encode", unit="batches", is_hidden=not show_progress_bar, is_part=True)
        with evaluating(self.model):
            return torch.cat([self.encode_batch(batch).cpu() for batch in batches])

    def encode_batch(
        self,
        batch: dict[str, Any],  # image (B pictures), text (B texts), or both
    ) -> Tensor:  # (B, d)
        "The vectors of one batch."
        pictures, texts = batch.get("image"), batch.get("query", batch.get("text"))  # query: without mteb's instruction
        frame: Any = self.model.frame  # Sum or Combiner
        if pictures is not None:
            pixels = [self.transform(make_rgb(picture)) for picture in pictures]  # as the model was trained on them
            tokens = self.model.tokens(torch.stack(pixels).to(self.device))
            if texts is not None:
                return frame.query(*self.model.embed_queries(tokens, list(texts))).float()
            return F.normalize(self.model.embed_gallery(tokens).float(), dim=-1)
        if texts is not None:
            return F.normalize(self.model.backbone.text(list(texts)).feature.float(), dim=-1)
        raise CalaError(f"this model reads pictures and texts, and the task has {', '.join(batch)}")

    def similarity(
        self,
        embeddings1: Any,  # (n, d) or (d,), a tensor or an array
        embeddings2: Any,  # (m, d) or (d,)
    ) -> Tensor:  # (n, m)
        "The cosine of each pair."
        return to_rows(embeddings1) @ to_rows(embeddings2).T

    def similarity_pairwise(
        self,
        embeddings1: Any,  # (n, d) or (d,), a tensor or an array
        embeddings2: Any,  # (n, d) or (d,)
    ) -> Tensor:  # (n,)
        "The cosine of row i of the one with row i of the other."
        return (to_rows(embeddings1) * to_rows(embeddings2)).sum(-1)


def to_rows(
    embeddings: Any,  # (n, d) or (d,), a tensor or an array
) -> Tensor:  # (n, d), float32, each row of length 1
    "Embeddings in the form in which they are compared."
    return F.normalize(torch.atleast_2d(torch.as_tensor(embeddings)).float(), dim=-1)

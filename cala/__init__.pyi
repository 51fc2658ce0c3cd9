"""What `from cala import ...` offers, for editors and type checkers; tests/test_front_door.py keeps it equal to PUBLIC."""

from .data import CIRR as CIRR
from .data import FashionIQ as FashionIQ
from .qformer import QFormer as QFormer
from .encoders import make_backbone as make_backbone
from .composition import Sum as Sum
from .composition import Artemis as Artemis
from .composition import Combiner as Combiner
from .associations import HingeCrossAttention as HingeCrossAttention
from .associations import PairCompositor as PairCompositor
from .associations import TwinAttentionCompositor as TwinAttentionCompositor
from .objectives import paper as paper
from .objectives import released as released
from .objectives import two_way as two_way
from .model import CaLa as CaLa
from .retrieval import target_ranks as target_ranks
from .retrieval import cirr_metrics as cirr_metrics
from .retrieval import fashioniq_metrics as fashioniq_metrics
from .retrieval import embed as embed
from .retrieval import evaluate as evaluate
from .recipe import Recipe as Recipe
from .rerank import Reranker as Reranker
from .rerank import evaluate_again as evaluate_again
from .rerank import sweep_weights as sweep_weights
from .training import make_model as make_model
from .errors import CalaError as CalaError
from .library.audit import audit as audit
from .library.circo import CIRCO as CIRCO
from .library.circo import circo_metrics as circo_metrics
from .library.circo import write_circo_submission as write_circo_submission
from .library.worlds.scenes import draw_cirr as draw_cirr
from .library.worlds.garments import draw_fashioniq as draw_fashioniq
from .library.worlds.circo import draw_circo as draw_circo
from .library.checkpoint import load_checkpoint as load_checkpoint
from .library.checkpoint import save_checkpoint as save_checkpoint
from .library.released import load_released as load_released
from .library.hub import HubCheckpoint as HubCheckpoint
from .library.submission import write_cirr_submission as write_cirr_submission
from .library.run import train as train
from .library.ablation import add_second_stage as add_second_stage
from .library.ablation import compute_effects as compute_effects

__version__: str
PUBLIC: dict[str, str]

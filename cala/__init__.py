"""CaLa: composed image retrieval with complementary associations (SIGIR 2024).

The names in `PUBLIC` are the public interface. Each is imported on first use, so that `import cala` is fast.
"""

from importlib import import_module

__version__ = "0.2.0"

PUBLIC = {
    "CIRR": "data",
    "FashionIQ": "data",
    "QFormer": "qformer",
    "make_backbone": "encoders",
    "Sum": "composition",
    "Artemis": "composition",
    "Combiner": "composition",
    "HingeCrossAttention": "associations",
    "TwinAttentionCompositor": "associations",
    "PairCompositor": "associations",
    "paper": "objectives",
    "released": "objectives",
    "two_way": "objectives",
    "CaLa": "model",
    "target_ranks": "retrieval",
    "cirr_metrics": "retrieval",
    "fashioniq_metrics": "retrieval",
    "embed": "retrieval",
    "evaluate": "retrieval",
    "Reranker": "rerank",
    "evaluate_again": "rerank",
    "sweep_weights": "rerank",
    "Recipe": "recipe",
    "make_model": "training",
    "CalaError": "errors",
    "audit": "library.audit",
    "CIRCO": "library.circo",
    "circo_metrics": "library.circo",
    "write_circo_submission": "library.circo",
    "draw_cirr": "library.worlds.scenes",
    "draw_fashioniq": "library.worlds.garments",
    "draw_circo": "library.worlds.circo",
    "load_checkpoint": "library.checkpoint",
    "save_checkpoint": "library.checkpoint",
    "load_released": "library.released",
    "HubCheckpoint": "library.hub",
    "write_cirr_submission": "library.submission",
    "train": "library.run",
    "add_second_stage": "library.ablation",
    "compute_effects": "library.ablation",
}

__all__ = ["__version__", *PUBLIC]


def __getattr__(name):
    """Import a public name from the module that defines it."""
    if name not in PUBLIC:
        raise AttributeError(f"module 'cala' has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    """List the public names, those that are not loaded yet too."""
    return sorted(__all__)

"""Where the pictures of the data sets can be had, and which servers take answers to CIRR's test split.

The commands print these lines. Nothing is fetched.
"""

from collections.abc import Iterable

PICTURE_SOURCES = {
    "CIRR": (
        "its authors, by e-mail after the form of NLVR2: https://github.com/Cuberick-Orion/CIRR",
        "copy: https://huggingface.co/datasets/BUAADreamer/cir_dataset (folder cirr_dataset)",
        "copy: https://huggingface.co/datasets/JUNJIE99/VISTA_Evaluation (images/CIRR.tar.gz, 12.6 GB)",
        "copy: https://www.kaggle.com/datasets/anhngzv/cirr-cir",
    ),
    "FashionIQ": (
        "addresses of the pictures, some of which are gone: https://github.com/hongwang600/fashion-iq-metadata",
        "copy: https://huggingface.co/datasets/BUAADreamer/cir_dataset (folder fashionIQ_dataset)",
        "copy: https://huggingface.co/datasets/JUNJIE99/VISTA_Evaluation (images/FashionIQ.tar.gz, 965 MB)",
    ),
    "CIRCO": ("unlabeled2017.zip of COCO: https://cocodataset.org/#download",),
}
LICENCE_DOUBT = (
    "some copies are labelled MIT, but the pictures belong to others, and it is doubtful that a copy can give this "
    "licence; read the terms of the data set before you use one"
)
CIRR_SERVERS = ("https://cirr.cecs.anu.edu.au", "https://cirr.junjie.au")  # the second is the backup of the first


def describe_picture_sources(
    names: Iterable[str],  # of data sets
) -> list[str]:  # lines; none if there are no names
    "Where the pictures of data sets can be had, and what is known about the licence of copies."
    lines = [f"  {name}: {source}" for name in names for source in PICTURE_SOURCES[name]]
    if not lines:
        return []
    return ["where pictures can be had (nothing is fetched here):", *lines, f"  {LICENCE_DOUBT}"]


def describe_cirr_servers() -> str:
    "Where the two files of a submission go."
    first, backup = CIRR_SERVERS
    return f"upload both files to {first}, or to its backup {backup}; the server answers with the recalls"

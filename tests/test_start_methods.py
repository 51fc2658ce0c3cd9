"""Loader processes that are spawned, as on Windows and macOS, or started by a server, as on Python 3.14.

Such a process gets the data set as a pickle. A forked process, as on Linux, does not."""

import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from cala.data import CIRR, collate, open_dataset
from cala.encoders import CaptionedPictures
from cala.library.cache import cache_tokens
from cala.library.search import ReadablePictures
from cala.retrieval import collate_pictures
from saved_models import tiny


@pytest.mark.parametrize("name", ["CIRR", "FashionIQ"])
def test_a_data_set_is_the_same_after_pickling(world, name):
    data = open_dataset(name, world, "train", tiny().backbone.transform())
    copy = pickle.loads(pickle.dumps(data))
    assert len(copy) == len(data) and copy.triplets == data.triplets
    batch, other = collate([data[3]]), collate([copy[3]])
    assert torch.equal(batch.reference, other.reference) and torch.equal(batch.target, other.target)
    assert batch.captions == other.captions


def test_what_other_loaders_read_can_be_pickled(world, tmp_path):
    transform = tiny().backbone.transform()
    gallery = CIRR(world, "val", transform).gallery
    captioned = CaptionedPictures(gallery, {name: ["a red star"] for name in gallery.names})
    readable = ReadablePictures(dict(zip(gallery.names, gallery.paths)), transform)
    tokens = cache_tokens(tiny().backbone.trunk, gallery, tmp_path)
    for pictures in (gallery, captioned, readable, tokens):
        assert len(pickle.loads(pickle.dumps(pictures))) == len(gallery)
    pickle.dumps((collate, collate_pictures))


def test_a_spawned_process_decodes_pictures(world):
    gallery = CIRR(world, "val", tiny().backbone.transform()).gallery
    options = dict(batch_size=len(gallery), collate_fn=collate_pictures)
    (spawned,) = DataLoader(gallery, num_workers=1, multiprocessing_context="spawn", **options)
    (own,) = DataLoader(gallery, **options)
    assert torch.equal(spawned, own)

"Both data sets: published counts, layouts, hostile pictures and annotations, batches that do not depend on workers."

import json
import os
import pickle
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision.transforms as T
from PIL import Image, ImageFile
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from cala.annotations import FOLDERS, data_folder
from cala.data import (
    CIRR,
    CLIP_MEAN,
    CLIP_STD,
    TEXT_FORMS,
    FashionIQ,
    collate,
    fashioniq_text,
    image_transform,
    open_dataset,
    pad,
)
from cala.errors import CalaError
from cala.library.audit import audit
from cala.library.cli import run_command
from cala.library.worlds.garments import draw_fashioniq
from cala.library.worlds.scenes import draw_cirr
from cala.pictures import read_picture, resolve_folder
from cala.scripts import combiner, train, validate
from small_runs import draw_small_world, train_flags

PUBLISHED = Path(__file__).parents[2] / "shared" / "data"
published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published annotations are not here")


# The published files ------------------------------------------------------------------------------------------------


@published
def test_cirr_has_the_published_counts():
    val, test1 = CIRR(PUBLISHED, "val"), CIRR(PUBLISHED, "test1")
    assert (len(val), len(val.gallery)) == (4181, 2297)
    assert (len(test1), len(test1.gallery), test1.targets) == (4148, 2315, None)
    assert val.groups.shape == (4181, 6) and test1.groups.shape == (4148, 6)
    assert ((val.groups == val.references[:, None]).sum(1) == 1).all() and (
        (val.groups == val.targets[:, None]).sum(1) == 1
    ).all()


@published
@pytest.mark.parametrize(
    "category, original, val, queries",
    [("dress", 3817, 2628, 2017), ("shirt", 6346, 3089, 2038), ("toptee", 5373, 2902, 1961)],
)
def test_fashioniq_has_the_published_counts_under_both_protocols(category, original, val, queries):
    for protocol, size in (("original", original), ("val", val)):
        data = FashionIQ(PUBLISHED, "val", [category], protocol=protocol)
        assert (len(data), len(data.gallery), len(data.galleries[category])) == (queries, size, size)


@published
def test_three_categories_share_one_gallery_and_keep_their_own_sizes():
    data = FashionIQ(PUBLISHED, "val")
    assert len(data.gallery) == 15415
    assert {c: len(g) for c, g in data.galleries.items()} == dict(dress=3817, shirt=6346, toptee=5373)
    assert {c: len(q) for c, q in data.queries.items()} == dict(dress=2017, shirt=2038, toptee=1961)


@published
def test_audit_of_the_published_annotations_finds_the_missing_caption_file_and_every_picture_missing():
    found = audit(PUBLISHED)
    table = found.table().set_index(["dataset", "split", "category"])
    cirr, circo = found.problems
    assert "cap.rc2.train.json" in cirr and "image_info_unlabeled2017.json" in circo
    assert len(found.notes) == 18 and all("has an empty caption" in note for note in found.notes)
    assert (table.missing == table.pictures).all() and (table.present == 0).all() and not found.broken
    assert table.loc[("CIRR", "train", ""), "pictures"] == 16939
    assert table.loc[("FashionIQ", "train", "toptee"), ["triplets", "pictures"]].tolist() == [6027, 16121]
    assert table.loc[("FashionIQ", "val", "dress"), "val gallery"] == 2628
    assert not found.ok


@published
def test_published_pictures_that_are_missing_are_refused_with_count_and_first_file():
    with pytest.raises(
        CalaError, match=r"2,297 of 2,297 pictures of CIRR val are missing, the first is .*dev/dev-244-0-img0.png"
    ):
        CIRR(PUBLISHED, "val")[0]


# Layouts ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn")
    draw_cirr(root, train=4, val=3, test1=2, size=32)
    draw_fashioniq(root, train=12, val=8, test=4, size=32)
    return root


@pytest.fixture
def root(drawn, tmp_path):
    return Path(shutil.copytree(drawn, tmp_path / "data"))


def cirr_variant(root, kind):
    folder = root / "cirr_dataset"
    pictures = list((folder / "train").rglob("*.png"))
    if kind == "cirr_datasets":
        return (folder.rename(root / kind), root)[1]
    if kind == "own folder":
        return folder
    if kind == "train flat":
        for path in pictures:
            path.rename(folder / "train" / path.name)
    if kind == "train deeper":
        (folder / "train").rename(folder / "deep")
        (folder / "train").mkdir()
        (folder / "deep").rename(folder / "train" / "deep")
    if kind == "under images":
        (folder / "images").mkdir()
        for top in ("train", "dev", "test1"):
            (folder / top).rename(folder / "images" / top)
    if kind in ("all in images", "all at the top"):
        place = folder / "images" if kind == "all in images" else folder
        place.mkdir(exist_ok=True)
        for path in sorted(folder.glob("*/**/*.png")):
            path.rename(place / path.name)
    if kind == "captions/captions":
        (folder / "cirr").rename(folder / "captions")
    if kind == "one level more":
        (root / "cirr-cir").mkdir()
        folder.rename(root / "cirr-cir" / "cirr_dataset")
    if kind == "own name twice":
        folder.rename(root / "deeper")
        folder.mkdir()
        (root / "deeper").rename(folder / "cirr_dataset")
    if kind == "unknown name":
        folder.rename(root / "archive-1")
    if kind == "linked disk":
        (root / "disk").mkdir()
        (folder / "train").rename(root / "disk" / "train")
        (folder / "train").symlink_to(root / "disk" / "train")
    return root


CIRR_LAYOUTS = ["as drawn", "cirr_datasets", "own folder", "train flat", "train deeper", "under images", "linked disk"]
CIRR_LAYOUTS += ["all in images", "all at the top", "captions/captions"]
CIRR_LAYOUTS += ["one level more", "own name twice", "unknown name"]


@pytest.mark.parametrize("kind", CIRR_LAYOUTS)
def test_cirr_is_read_from_every_layout(root, kind):
    where = cirr_variant(root, kind)
    found = audit(where)
    assert found.ok and all("(" not in place and "of them outside" not in place for place in found.places)
    data = CIRR(where, "train")
    assert data.gallery.missing == [] and len(data.gallery) == 24
    assert data[0]["reference"].size == (32, 32)


@pytest.mark.parametrize(
    "kind",
    ["as drawn", "image_data", "fashioniq_dataset", "own folder", "by category", "png", "one level more", "flat"],
)
def test_fashioniq_is_read_from_every_layout(root, kind):
    folder = root / "fashionIQ_dataset"
    images = folder / "images"
    if kind == "image_data":
        images.rename(folder / kind)
    if kind == "fashioniq_dataset":
        folder.rename(root / kind)
    if kind == "by category":
        (images / "dress").mkdir()
        for path in images.glob("*.*"):
            path.rename(images / "dress" / path.name)
    if kind == "png":
        for path in list(images.iterdir()):
            Image.open(path).save(path.with_suffix(".PNG"))
            path.unlink()
    if kind == "one level more":
        (root / "FashionIQ-data").mkdir()
        folder.rename(root / "FashionIQ-data" / "fashion-iq")
    if kind == "flat":
        for path in sorted(images.iterdir()):
            path.rename(folder / path.name)
    assert audit(root).ok
    data = FashionIQ(folder if kind == "own folder" else root, "val")
    assert data.gallery.missing == [] and data[0]["target"].size == (32, 32)


FOLDER_NAMES = {
    "CIRR": ["CIRR", "cirr", "Cirr_Dataset", "cirr_datasets"],
    "FashionIQ": ["FashionIQ", "fashionIQ", "fashion-iq", "Fashion-IQ", "fashioniq", "fashionIQ_datasets"],
}


@pytest.mark.parametrize(
    "name, folder", [(name, folder) for name, folders in FOLDER_NAMES.items() for folder in folders]
)
def test_a_data_set_is_found_by_the_names_that_its_folder_has(root, name, folder):
    (root / FOLDERS[name]).rename(root / folder)
    data = open_dataset(name, root, "val")
    assert data.root == root / folder and data.gallery.missing == []
    assert len(open_dataset(name, root / folder, "val")) == len(data)
    assert audit(root).ok


@pytest.mark.parametrize("folder", ["CIRR", "cirr", "cirr_dataset"])
@pytest.mark.parametrize("layout", ["below cirr", "at the top", "flat"])
@pytest.mark.parametrize("pictures", ["", "img_raw", "images"])
def test_annotations_of_cirr_may_be_below_cirr_or_at_the_top(root, folder, layout, pictures):
    home = (root / "cirr_dataset").rename(root / folder)
    if pictures:
        (home / pictures).mkdir()
        for part in ("train", "dev", "test1"):
            (home / part).rename(home / pictures / part)
    if layout != "below cirr":
        for path in sorted((home / "cirr").iterdir()):
            path.rename(home / path.name)
        (home / "cirr").rmdir()
    if layout == "flat":
        for path in sorted(home.glob("*/*.rc2.*.json")):
            path.rename(home / path.name)
    for where in (root, home):
        assert data_folder(where, "CIRR") == home
        assert CIRR(where, "train").gallery.missing == []
    table = audit(home).table()
    assert set(table.dataset) == {"CIRR"} and (table.present == table.pictures).all()


def test_a_folder_above_cirr_is_not_taken_for_its_own_folder(root):
    home = (root / "cirr_dataset").rename(root / "cirr")
    for path in sorted((home / "cirr").iterdir()):
        path.rename(home / path.name)
    (home / "cirr").rmdir()  # root/cirr/captions is also where a folder named root would have its annotations
    assert data_folder(root, "CIRR") == home
    shutil.rmtree(home / "dev")
    assert data_folder(root, "CIRR") == home


@pytest.mark.parametrize(
    "kind", ["categories at the top", "categories below images", "resized_image", "resized_images", "linked categories"]
)
def test_pictures_of_fashioniq_are_found_in_folders_of_their_category(root, tmp_path, kind):
    home = (root / "fashionIQ_dataset").rename(root / "FashionIQ")
    if kind.startswith("resized"):
        (home / "images").rename(home / kind)
    else:
        for category in ("dress", "shirt", "toptee"):
            place = home / category if kind == "categories at the top" else home / "images" / category
            if kind == "linked categories":
                (tmp_path / "disk" / category).mkdir(parents=True)
                place.symlink_to(tmp_path / "disk" / category)
            else:
                place.mkdir(parents=True)
            for file in sorted((home / "image_splits").glob(f"split.{category}.*.json")):
                for path in [home / "images" / f"{each}.jpg" for each in json.loads(file.read_text())]:
                    if path.exists():
                        path.rename(place / path.name)
    for split in ("train", "val", "test"):
        assert FashionIQ(root, split).gallery.missing == []
    assert audit(root).ok
    assert FashionIQ(root, "val")[0]["reference"].size == (32, 32)


def test_two_copies_one_level_below_the_root_are_named_and_none_is_chosen(root):
    for copy in ("one", "two"):
        shutil.copytree(root / "cirr_dataset", root / copy / "CIRR")
    assert data_folder(root, "CIRR") == root / "cirr_dataset"  # the usual place comes first
    shutil.rmtree(root / "cirr_dataset")
    for read in (lambda: CIRR(root, "val"), lambda: audit(root)):
        with pytest.raises(CalaError, match=r"holds CIRR 2 times, as .*one/CIRR and as .*two/CIRR; choose one"):
            read()
    assert len(FashionIQ(root, "val")) > 0


def test_links_out_of_the_folder_are_followed_with_a_flag_that_results_name(root, tmp_path):
    folder, disk = root / "cirr_dataset", tmp_path / "disk"
    disk.mkdir()
    path = sorted((folder / "dev").iterdir())[0]
    path.rename(disk / "blob")
    path.symlink_to(disk / "blob")  # one picture
    (folder / "train" / "0").rename(disk / "more")
    (folder / "train" / "another").symlink_to(disk / "more")  # a folder further below, under another name
    (disk / "more" / "loop").symlink_to(folder / "train")
    resolve_folder.cache_clear()
    assert len(CIRR(root, "val").gallery.missing) == 1 and len(CIRR(root, "train").gallery.missing) == 6
    assert CIRR(root, "val").choices() == {}
    for split in ("val", "train"):
        data = CIRR(root, split, follow_links=True)
        assert data.gallery.missing == [] and data.choices() == dict(follow_links=True)
        assert data[0]["reference"].size == (32, 32)
    assert not audit(root).ok
    found = audit(root, deep=True, follow_links=True)
    assert found.ok and "7 of them outside this folder" in found.places[0]


@pytest.mark.parametrize("home", ["", "img_raw"])
def test_a_folder_of_pictures_may_be_a_link_to_another_disk(root, tmp_path, home):
    folder, disk = root / "cirr_dataset", tmp_path / "disk"
    disk.mkdir()
    (folder / home).mkdir(exist_ok=True)
    for part in ("train", "dev", "test1"):
        (folder / part).rename(disk / part)
        (folder / home / part).symlink_to(disk / part)
    assert audit(root).ok and CIRR(root, "train").gallery.missing == []
    (disk / "train" / "0").rename(tmp_path / "elsewhere")  # a link further below is not followed
    (disk / "train" / "0").symlink_to(tmp_path / "elsewhere")
    resolve_folder.cache_clear()
    assert len(CIRR(root, "train").gallery.missing) == 6


def test_a_snapshot_of_links_is_refused_with_a_way_out(root, tmp_path):
    path = sorted((root / "cirr_dataset" / "dev").iterdir())[0]
    path.rename(tmp_path / "blob")
    path.symlink_to(tmp_path / "blob")
    assert "cp -rL" in audit(root).broken[0]


def test_each_data_set_is_known_by_its_files_and_not_taken_for_the_other(root):
    for path in sorted((root / "cirr_dataset" / "cirr").iterdir()):
        path.rename(root / "cirr_dataset" / path.name)
    (root / "cirr_dataset" / "cirr").rmdir()
    assert set(audit(root / "cirr_dataset").table().dataset) == {"CIRR"}
    assert set(audit(root / "fashionIQ_dataset").table().dataset) == {"FashionIQ"}
    with pytest.raises(CalaError, match="holds no annotations of FashionIQ"):
        FashionIQ(root / "cirr_dataset", "val")


def test_the_check_says_where_it_found_what(root):
    cirr, fashioniq = audit(root).places
    places = "annotations in cirr/captions, cirr/image_splits; pictures in dev, test1, train"
    assert cirr == f"CIRR in {root / 'cirr_dataset'}: {places}"
    assert (
        f"FashionIQ in {root / 'fashionIQ_dataset'}: annotations in captions, image_splits; pictures in images"
        == fashioniq
    )
    shutil.rmtree(root / "cirr_dataset/dev")
    assert audit(root).places[0].endswith("pictures in test1, train")


@pytest.mark.parametrize(
    "file, content, says",
    [
        ("captions", '{"a": 1}\n{"b": 2}\n', "holds one JSON object a line; it must hold one JSON list"),
        (
            "captions",
            '{"annotations": [1, 2]}',
            "must hold a JSON list that is not empty, but holds an object with 'annotations'",
        ),
        ("captions", '[["B0001", "B0002", "is red"]]', "entry 0: is not an object, but a list of 3"),
        (
            "captions",
            '[{"candidate": "CANDIDATE", "reference": "B", "caption": "is red"}]',
            r"entry 0: has no target \(text\); it is an object with 'candidate', 'reference', 'caption'",
        ),
        (
            "image_splits",
            '{"B0001": "images/B0001.jpg"}',
            "must hold a JSON list that is not empty, but holds an object with 'B0001'",
        ),
        ("image_splits", '["B0001", ["B0002"]]', r"entry 1: \['B0002'\] is not a picture's name"),
    ],
)
def test_another_shape_is_named_with_the_shape_that_is_needed(root, file, content, says):
    names = json.loads((root / "fashionIQ_dataset/image_splits/split.dress.val.json").read_text())
    path = next((root / "fashionIQ_dataset" / file).glob("*.dress.val.json"))
    path.write_text(content.replace("CANDIDATE", names[0]))
    with pytest.raises(CalaError, match=says) as error:
        FashionIQ(root, "val", "dress")
    assert path.name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "categories",
    ["dress shirt", "dress,shirt", "shirt, dress", " shirt ,dress ", ["dress", "shirt"], ("shirt", "dress")],
)
def test_categories_are_taken_in_every_spelling(root, categories):
    assert FashionIQ(root, "val", categories).categories == ("dress", "shirt")


def test_names_of_folders_that_are_not_utf_8_are_read_and_saved(root, tmp_path):
    home = Path(os.fsdecode(os.fsencode(root) + b"-\xe9"))
    try:
        root.rename(home)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    (home / "cirr_dataset/dev").rename(home / "cirr_dataset/elsewhere")
    found = audit(home)
    found.save(tmp_path / "holes.txt")
    lines = (tmp_path / "holes.txt").read_bytes().splitlines()
    assert len(lines) == 18 and all(
        os.path.dirname(os.path.dirname(line)) == os.fsencode(home / "cirr_dataset") for line in lines
    )
    assert FashionIQ(home, "val")[0]["reference"].size == (32, 32)


def test_files_of_the_operating_system_among_the_pictures_change_nothing(root):
    for folder in (root / "cirr_dataset/dev", root / "fashionIQ_dataset/images"):
        for path in sorted(folder.iterdir())[:2]:
            (folder / f"._{path.name}").write_bytes(b"\0\5\26\7")
            shutil.copy(path, folder / f"another {path.name}")
        (folder / ".DS_Store").touch()
        (folder / "Thumbs.db").touch()
    assert audit(root, deep=True).ok and len(CIRR(root, "val").gallery) == 18


def test_pixels_are_kept_only_for_a_transform_of_two_steps(root):
    with pytest.raises(CalaError, match="methods pixels and floats"):
        CIRR(root, "val", transform=lambda picture: picture, keep=True)


def test_names_of_data_sets_and_splits_are_understood_in_any_case(root):
    assert len(open_dataset("cIrR", root, "test")) == len(open_dataset("CIRR", root, "test1"))
    assert len(open_dataset("FASHIONIQ", root, "test", categories="dress,shirt").categories) == 2


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda root: CIRR(root / "nowhere", "val"), "no folder .*nowhere"),
        (lambda root: CIRR(root / "fashionIQ_dataset", "val"), "holds no annotations of CIRR"),
        (lambda root: CIRR(root, "dev"), "CIRR has train, val, test1"),
        (lambda root: FashionIQ(root, "val", ["dress", "hat"]), "FashionIQ has dress, shirt, toptee"),
        (lambda root: FashionIQ(root, "val", []), "FashionIQ has dress, shirt, toptee"),
        (lambda root: FashionIQ(root, "val", protocol="both"), "there are original and val"),
        (lambda root: FashionIQ(root, "test", protocol="val"), "has no targets"),
        (lambda root: open_dataset("coco", root, "val"), "there are CIRR and FashionIQ"),
        (lambda root: audit(root / "fashionIQ_dataset" / "images"), "holds neither"),
    ],
)
def test_a_wrong_root_split_category_or_protocol_is_one_line(drawn, call, says):
    with pytest.raises(CalaError, match=says) as error:
        call(drawn)
    assert "\n" not in str(error.value)


# Galleries and texts -------------------------------------------------------------------------------------------------


@published
def test_galleries_of_all_splits_have_the_sizes_that_others_report():
    assert len(CIRR(PUBLISHED, "val", gallery_of="all").gallery) == 21551
    data = FashionIQ(PUBLISHED, "val", "dress,shirt", gallery_of="all")
    assert [len(gallery) for gallery in data.galleries.values()] == [74381, 74381]


def test_a_gallery_of_all_splits_begins_with_the_own_one_and_finds_all_pictures(root):
    for name in ("CIRR", "FashionIQ"):
        own, larger = open_dataset(name, root, "val"), open_dataset(name, root, "val", gallery_of="all")
        splits = [open_dataset(name, root, split).gallery.names for split in ("train", "val", "test")]
        assert set(larger.gallery.names) == {picture for names in splits for picture in names}
        assert larger.gallery.missing == [] and larger.triplets == own.triplets
        assert larger.choices() == own.choices() | dict(gallery_of="all")
    own, larger = CIRR(root, "val"), CIRR(root, "val", gallery_of="all")
    assert larger.gallery.names[: len(own.gallery)] == own.gallery.names
    assert torch.equal(larger.groups, own.groups) and torch.equal(larger.targets, own.targets)


def test_a_gallery_of_all_splits_needs_the_other_split_files_and_not_their_captions(root):
    (root / CAPTIONS.replace("val", "train")).unlink()
    assert len(CIRR(root, "val", gallery_of="all").gallery) == 24 + 18 + 12
    (root / SPLIT.replace("val", "test1")).unlink()
    with pytest.raises(CalaError, match=r"no annotation file .*split.rc2.test1.json"):
        CIRR(root, "val", gallery_of="all")


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(gallery_of="every"), "no gallery 'every'; there are split and all"),
        (dict(gallery_of="all", protocol="val"), "use original for a gallery of all splits"),
        (dict(text_form="three"), "no text form 'three'; there are both, reversed"),
    ],
)
def test_a_wrong_gallery_or_text_form_is_one_line(drawn, options, says):
    with pytest.raises(CalaError, match=says):
        FashionIQ(drawn, "val", **options)


def test_the_text_form_is_the_same_for_every_split_and_epoch(root):
    for split in ("train", "val"):
        data = FashionIQ(root, split, text_form="comma")
        first, second = (sentence.strip(".?, ") for sentence in data.triplets[0].captions)
        for epoch in range(3):
            data.set_epoch(epoch)
            assert data.caption(0) == f"{first.capitalize()}, {second}"
        assert data.choices() == dict(text_form="comma")
    assert FashionIQ(root, "train").choices() == dict(text_form="random")


def test_one_sentence_a_triplet_is_read_and_a_mixture_is_not(root):
    file = root / FIQ_CAPTIONS
    edit(lambda c: [each | dict(captions=each["captions"][:1]) for each in c])(file)
    data = FashionIQ(root, "val", "shirt")
    assert {fashioniq_text(triplet.captions, form) for triplet in data.triplets[:1] for form in TEXT_FORMS} == {
        data.caption(0)
    }
    assert audit(root).ok
    edit(lambda c: c[0].update(captions=["is red", "is blue"]))(file)
    with pytest.raises(CalaError, match=r"entry 1: has one sentence, and other entries have two \(and"):
        FashionIQ(root, "val", "shirt")


# Pictures -----------------------------------------------------------------------------------------------------------


def colours(path):
    image = read_picture(path)
    assert image.mode == "RGB"
    return np.asarray(image)


RED = np.zeros((4, 6, 3), np.uint8)
RED[..., 0] = 200


@pytest.mark.parametrize("mode", ["RGB", "P", "CMYK", "RGBA", "YCbCr"])
def test_every_colour_mode_is_read_as_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png")
    Image.fromarray(RED).convert(mode).save(path)
    assert np.abs(colours(path).astype(int) - RED).max() <= 4


@pytest.mark.parametrize("mode", ["CMYK", "L", "RGB"])
def test_jpeg_of_every_colour_mode_is_read_as_rgb(tmp_path, mode):
    Image.new("L" if mode == "L" else "RGB", (16, 8), 200 if mode == "L" else (200, 0, 0)).convert(mode).save(
        tmp_path / "a.jpg", quality=95
    )
    assert np.abs(colours(tmp_path / "a.jpg").astype(int) - ((200,) * 3 if mode == "L" else (200, 0, 0))).max() <= 6


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_of_several_frames_the_first_is_read(tmp_path, suffix):
    frames = [Image.new("RGB", (16, 8), colour) for colour in ((200, 0, 0), (0, 0, 200))]
    frames[0].save(
        tmp_path / f"a.{suffix}",
        save_all=True,
        append_images=frames[1:],
        **(dict(lossless=True) if suffix == "webp" else {}),
    )
    assert np.abs(colours(tmp_path / f"a.{suffix}").astype(int) - (200, 0, 0)).max() <= 4


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_grey_is_read_as_rgb(tmp_path, mode):
    Image.new("L", (6, 4), 255).convert(mode).save(tmp_path / "a.png")
    assert (colours(tmp_path / "a.png") == 255).all()


@pytest.mark.parametrize("dtype, top", [(np.uint16, 65535), (np.int32, 65535), (np.float32, 1.0)])
def test_sixteen_bits_and_floats_are_scaled_and_not_cut(tmp_path, dtype, top):
    Image.fromarray((np.linspace(0, 1, 24).reshape(4, 6) * top).astype(dtype)).save(tmp_path / "a.tif")
    assert np.abs(colours(tmp_path / "a.tif")[..., 0] - np.linspace(0, 255, 24).reshape(4, 6)).max() <= 1


def test_transparency_of_every_kind_is_white(tmp_path):
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.save(tmp_path / "rgba.png")
    clear.convert("LA").save(tmp_path / "la.png")
    Image.new("P", (4, 4), 0).save(tmp_path / "palette.png", transparency=0)
    Image.new("P", (4, 4), 0).save(tmp_path / "palette.gif", transparency=0)
    Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / "key.png", transparency=(9, 9, 9))
    for path in tmp_path.iterdir():
        assert (colours(path) == 255).all(), path


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_rotation_is_undone(tmp_path, turn):
    upright = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's numbers of the operations that make each
    stored = upright.transpose(Image.Transpose(undo[turn])) if turn > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = turn
    stored.save(tmp_path / "a.png", exif=exif)
    assert (colours(tmp_path / "a.png") == np.asarray(upright)).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1)])
def test_extreme_shapes_are_read_and_transformed(tmp_path, size):
    Image.new("RGB", size, (0, 200, 0)).save(tmp_path / "a.png")
    image = read_picture(tmp_path / "a.png")
    assert image.size == size
    for kind in ("targetpad", "squarepad", "plain"):
        assert image_transform(kind, 224)(image).shape == (3, 224, 224)


def bomb(path):
    Image.new("1", (20_000, 20_000)).save(path)


HOSTILE = {
    "empty.png": lambda path: path.write_bytes(b""),
    "text.jpg": lambda path: path.write_text("<html>"),
    "zeros.png": lambda path: path.write_bytes(bytes(5000)),
    "torn.png": lambda path: (Image.effect_noise((64, 64), 50).save(path), path.write_bytes(path.read_bytes()[:1500])),
    "torn.jpg": lambda path: (Image.effect_noise((64, 64), 50).save(path), path.write_bytes(path.read_bytes()[:700])),
    "bomb.png": bomb,
    "folder.png": lambda path: path.mkdir(),
    "gone.png": lambda path: None,
    "dangling.png": lambda path: path.symlink_to(path.parent / "nothing"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_hostile_picture_is_one_line_with_its_name(tmp_path, name):
    HOSTILE[name](tmp_path / name)
    with pytest.raises(CalaError, match=name) as error:
        read_picture(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["torn.png", "torn.jpg"])
def test_a_torn_picture_is_refused_whatever_another_library_told_pil(tmp_path, name, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as importing LAVIS leaves it
    HOSTILE[name](tmp_path / name)
    with pytest.raises(CalaError, match=name):
        read_picture(tmp_path / name)


def test_every_hostile_picture_is_in_the_deep_audit(root):
    folder = root / "cirr_dataset" / "dev"
    paths = sorted(folder.iterdir())
    for path, (name, spoil) in zip(paths, HOSTILE.items()):
        made = path.with_name(name)
        path.unlink()
        spoil(made)
        if made.exists() or made.is_symlink():
            made.rename(path)
    found = audit(root / "cirr_dataset", deep=True)
    row = found.table().set_index("split").loc["val"]
    assert (row.missing, row.broken, row.present) == (3, 6, len(paths) - 9) and not found.ok
    named = {*map(str, found.missing), *(line.split()[0] for line in found.broken)}
    assert named == set(map(str, paths[:9]))


def test_a_gallery_with_holes_is_refused_unless_asked_for(root):
    victim = CIRR(root, "val").triplets[0].target
    (root / "cirr_dataset" / "dev" / f"{victim}.png").unlink()
    whole = len(CIRR(root, "val"))  # counting needs no pictures
    with pytest.raises(
        CalaError, match=f"1 of 18 pictures of CIRR val is missing, the first is .*{victim}.png.*--allow-missing"
    ):
        CIRR(root, "val")[0]
    with pytest.warns(UserWarning, match="1 of 18 pictures of CIRR val is missing and left out"):
        data = CIRR(root, "val").require_pictures(allow_missing=True)
    assert data.left_out == dict(pictures=1, queries=whole - len(data)) and len(data.gallery) == 17
    assert all(victim not in (t.reference, t.target, *t.group) for t in data.triplets)
    assert data.groups.max() < 17 and len(list(DataLoader(data, 4, collate_fn=lambda items: items))) > 0


def test_holes_leave_the_galleries_of_fashioniq_consistent(root):
    data = FashionIQ(root, "val", transform=image_transform("targetpad", 16))
    data.gallery.paths[0].unlink()
    with pytest.warns(UserWarning, match="missing and left out"):
        data = FashionIQ(root, "val", allow_missing=True)
    assert torch.cat(list(data.galleries.values())).max() < len(data.gallery) and torch.cat(
        list(data.queries.values())
    ).max() < len(data)


@pytest.mark.parametrize("name, lost_of_val", [("CIRR", 1), ("FashionIQ", 2)])
def test_with_allow_missing_every_result_of_every_command_says_how_many(tmp_path, capsys, name, lost_of_val):
    root = draw_small_world(tmp_path)
    lost = {split: open_dataset(name, root, split).gallery for split in ("train", "val")}
    for split, count in (("train", 3), ("val", lost_of_val)):
        for path in lost[split].paths[:count]:
            path.unlink()
    words = ["--dataset", name, "--data-root", root, "--allow-missing", "--output"]

    def counts(path):
        return pd.read_csv(path)[["missing", "missing_train"]].drop_duplicates().values.tolist()

    with (
        pytest.warns(UserWarning, match=f"3 of .* pictures of {name} train are missing and left out"),
        pytest.warns(UserWarning, match=f"{lost_of_val} of .* {name} val"),
    ):
        run_command(train.main, train_flags(root, root / "run", *words, root / "run", epochs=1))
    assert counts(root / "run/metrics.csv") == [[lost_of_val, 3]] and re.search(
        "(?s)missing .*missing_train", capsys.readouterr().out
    )
    assert json.loads((root / "run/best/recipe.json").read_text())["metrics"]["missing"] == lost_of_val

    with pytest.warns(UserWarning, match=f"of {name} val (is|are) missing and left out"):
        run_command(validate.main, [str(w) for w in [*words, root / "out", "--checkpoint", root / "run/best"]])
    assert f"; {lost_of_val} picture{'s' if lost_of_val > 1 else ''} missing" in capsys.readouterr().out
    said, rows = json.loads((root / "out/result.json").read_text()), pd.read_csv(root / "out/result.csv")
    assert said["result"]["missing"] == lost_of_val and (rows["missing"] == lost_of_val).all() and len(rows) == 4

    with pytest.warns(UserWarning):
        run_command(
            combiner.main,
            [str(w) for w in [*words, root / "combined", "--checkpoint", root / "run/best", "--num-epochs", 1]],
        )
    assert counts(root / "combined/metrics.csv") == [[lost_of_val, 3]]


def test_without_any_picture_there_is_nothing_to_go_on_with(root):
    shutil.rmtree(root / "cirr_dataset" / "dev")
    with pytest.raises(CalaError, match="of CIRR val are missing; no triplet has all its pictures"):
        CIRR(root, "val", allow_missing=True)


# Transforms ---------------------------------------------------------------------------------------------------------


def clip4cir(ratio):
    "The transform of CLIP4Cir, which the released program uses, written as there."

    def pad(image):
        w, h = image.size
        if max(w, h) / min(w, h) < ratio:
            return image
        scaled = max(w, h) / ratio
        hp, vp = max(int((scaled - w) / 2), 0), max(int((scaled - h) / 2), 0)
        return T.functional.pad(image, [hp, vp, hp, vp], 0, "constant")

    return T.Compose(
        [
            pad,
            T.Resize(32, T.InterpolationMode.BICUBIC),
            T.CenterCrop(32),
            T.ToTensor(),
            T.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )


@pytest.mark.parametrize("size", [(40, 40), (50, 40), (51, 40), (40, 97), (300, 41), (33, 32)])
@pytest.mark.parametrize(
    "kind, ratio", [("targetpad", 1.25), ("targetpad", 2.0), ("squarepad", 1.0), ("plain", float("inf"))]
)
def test_transforms_equal_those_of_clip4cir(size, kind, ratio):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    ours = image_transform(kind, 32, ratio if kind == "targetpad" else 1.25)(image)
    assert torch.equal(ours, clip4cir(ratio)(image)) or (ours - clip4cir(ratio)(image)).abs().max() < 1e-6


def test_pads_are_black_and_centred():
    white = Image.new("RGB", (10, 100), (255, 255, 255))
    assert pad(white, 1.25, 32).size == (80, 100) and pad(white, 1.0, 32).size == (100, 100)
    assert np.asarray(pad(white, 1.0, 32)).any((0, 2)).nonzero()[0].tolist() == list(range(45, 55))


def test_kept_pictures_are_the_same_and_are_read_once(root):
    transform = image_transform("targetpad", 16)
    fresh, kept = CIRR(root, "val", transform), CIRR(root, "val", transform, keep=True)
    first = [kept.gallery[i] for i in range(len(kept.gallery))]
    for path in kept.gallery.paths[1:]:
        path.write_bytes(b"")
    assert all(torch.equal(a, kept.gallery[i]) for i, a in enumerate(first)) and torch.equal(first[0], fresh.gallery[0])


# Annotations --------------------------------------------------------------------------------------------------------

CAPTIONS, SPLIT = "cirr_dataset/cirr/captions/cap.rc2.val.json", "cirr_dataset/cirr/image_splits/split.rc2.val.json"


def edit(change):
    "A hostile edit of a JSON file, from a function that changes its content in place or returns another."

    def apply(path):
        content = json.loads(path.read_text())
        other = change(content)
        path.write_text(json.dumps(content if other is None else other))

    return apply


def entry(number, **changes):
    return edit(lambda entries: entries[number].update(changes))


@pytest.mark.parametrize(
    "file, spoil, says",
    [
        (CAPTIONS, lambda p: p.write_bytes(b""), "cannot be read as JSON"),
        (CAPTIONS, lambda p: p.write_bytes(p.read_bytes()[:-20]), "cannot be read as JSON"),
        (CAPTIONS, lambda p: p.write_bytes(p.read_text().encode("utf-16")), "cannot be read as JSON"),
        (CAPTIONS, lambda p: p.write_bytes(b"[" * 200_000), "cannot be read as JSON"),
        (CAPTIONS, lambda p: p.write_text("[" + "9" * 10_000 + "]"), "cannot be read as JSON"),
        (CAPTIONS, lambda p: p.unlink(), "no annotation file"),
        (CAPTIONS, edit(lambda c: []), "must hold a JSON list that is not empty"),
        (CAPTIONS, edit(lambda c: {"a": c}), "must hold a JSON list"),
        (CAPTIONS, edit(lambda c: [*c[:3], None]), "entry 3: is not an object"),
        (CAPTIONS, edit(lambda c: c[5].pop("target_hard") and None), "entry 5: has no target_hard"),
        (CAPTIONS, edit(lambda c: c[2].pop("img_set") and None), "entry 2: has no img_set"),
        (CAPTIONS, entry(2, img_set={"members": [[], {}]}), "entry 2: img_set must be an object with a list of names"),
        (CAPTIONS, entry(2, img_set={"members": ["dev-0-0-img0"] * 6}), r"entry 2: has a group of 6 \(1 different\)"),
        (CAPTIONS, entry(1, reference="dev-9-9-img9"), "entry 1: reference 'dev-9-9-img9' is not in the split file"),
        (CAPTIONS, entry(1, reference=["a"]), "entry 1: reference must be text, but is a list of 1"),
        (CAPTIONS, entry(1, caption=7), "entry 1: caption must be text"),
        (CAPTIONS, entry(1, caption="\ud800"), "entry 1: caption must be text"),
        (CAPTIONS, entry(1, pairid=True), "entry 1: pairid must be a number or text"),
        (CAPTIONS, edit(lambda c: c[4].update(pairid=c[3]["pairid"])), "entry 4: pairid .* is there twice"),
        (CAPTIONS, edit(lambda c: c[:2] + [dict(c[2], target_hard=c[6]["reference"])]), "is not in its own group"),
        (SPLIT, edit(lambda c: []), "must hold a JSON object that is not empty"),
        (
            SPLIT,
            edit(lambda c: c.update({"dev-0-0-img0": "../secret.png"})),
            "'dev-0-0-img0' has the path '../secret.png'",
        ),
        (SPLIT, edit(lambda c: c.update({"dev-0-0-img0": "/etc/secret.png"})), "within the data set's folder"),
        (SPLIT, edit(lambda c: c.update({"dev-0-0-img0": "dev\\..\\..\\secret.png"})), "within the data set's folder"),
        (SPLIT, edit(lambda c: c.update({"dev-0-0-img0": "C:/secret.png"})), "within the data set's folder"),
        (SPLIT, edit(lambda c: c.update({"dev-0-0-img0": "dev/a\0.png"})), "within the data set's folder"),
        (SPLIT, edit(lambda c: c.update({"dev-0-0-img0": 3})), "within the data set's folder"),
        (
            SPLIT,
            lambda p: p.write_text(p.read_text().replace("{", '{"dev-0-0-img0": "./dev/dev-0-0-img0.png", ', 1)),
            "'dev-0-0-img0' is there twice",
        ),
    ],
)
def test_a_hostile_cirr_annotation_is_one_line_with_file_and_entry(root, file, spoil, says):
    spoil(root / file)
    with pytest.raises(CalaError, match=says) as error:
        CIRR(root, "val")
    assert (root / file).name in str(error.value) and "\n" not in str(error.value)
    assert any((root / file).name in problem for problem in audit(root).problems)  # and the audit goes on


FIQ_CAPTIONS, FIQ_SPLIT = (
    "fashionIQ_dataset/captions/cap.shirt.val.json",
    "fashionIQ_dataset/image_splits/split.shirt.val.json",
)


@pytest.mark.parametrize(
    "file, spoil, says",
    [
        (
            FIQ_CAPTIONS,
            entry(1, captions=["is red"]),
            "entry 1: has one sentence, and other entries have two",
        ),
        (
            FIQ_CAPTIONS,
            entry(1, captions="is red"),
            "entry 1: captions must be a list of one or two sentences, but is 'is red'",
        ),
        (FIQ_CAPTIONS, entry(1, captions=["is red", None]), "entry 1: captions must be a list of one or two sentences"),
        (FIQ_CAPTIONS, entry(1, candidate=None), "entry 1: candidate must be text"),
        (FIQ_CAPTIONS, entry(1, target="B000000000"), "entry 1: target 'B000000000' is not in the split file"),
        (FIQ_SPLIT, edit(lambda c: [*c, c[0]]), "is there twice"),
        (FIQ_SPLIT, edit(lambda c: [*c, "../../secret"]), "'../../secret' is not a picture's name"),
        (FIQ_SPLIT, edit(lambda c: [*c, {}]), "is not a picture's name"),
    ],
)
def test_a_hostile_fashioniq_annotation_is_one_line_with_file_and_entry(root, file, spoil, says):
    spoil(root / file)
    with pytest.raises(CalaError, match=says) as error:
        FashionIQ(root, "val")
    assert (root / file).name in str(error.value) and "\n" not in str(error.value)
    assert len(FashionIQ(root, "val", "dress")) > 0  # the other categories are fine


def test_a_byte_order_mark_and_any_language_are_read(root):
    entries = json.loads((root / CAPTIONS).read_text())
    entries[0]["caption"] = "más rojo, плюс 猫 🐈"
    (root / CAPTIONS).write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8-sig")
    assert CIRR(root, "val").caption(0) == entries[0]["caption"]


def test_a_very_long_name_is_a_missing_picture_and_not_a_crash(root):
    edit(lambda c: c.update({"x" * 5000: "./dev/" + "x" * 5000 + ".png"}))(root / SPLIT)
    assert CIRR(root, "val").gallery.missing == ["x" * 5000]
    assert len(audit(root).missing) == 1


def test_groups_of_train_are_notes_since_training_does_not_use_them(root):
    file = root / CAPTIONS.replace("val", "train")
    edit(lambda c: c[0]["img_set"].update(members=["train-0-0-img0"]))(file)
    assert len(CIRR(root, "train")) == 24 and CIRR(root, "train").groups is None
    assert any("entry 0: has a group of 1" in note for note in audit(root).notes)


def test_a_link_out_of_the_root_is_not_followed(root, tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    data = CIRR(root, "val")
    data.gallery.paths[0].unlink()
    data.gallery.paths[0].symlink_to(secret)
    with pytest.raises(CalaError, match="is a link out of"):
        data.gallery[0]
    with pytest.raises(CalaError, match="1 of 18 pictures"):
        CIRR(root, "val").require_pictures()
    assert any("is a link out of" in line for line in audit(root).broken)


# Determinism --------------------------------------------------------------------------------------------------------


def batches(data, workers, persistent):
    sampler = DistributedSampler(data, num_replicas=1, rank=0, shuffle=True, seed=0)
    loader = DataLoader(
        data, 8, sampler=sampler, collate_fn=collate, num_workers=workers, persistent_workers=persistent
    )
    for epoch in range(3):
        sampler.set_epoch(epoch)
        data.set_epoch(epoch)
        yield from loader


@pytest.mark.filterwarnings("ignore:.*fork.*")
@pytest.mark.parametrize("workers, persistent", [(1, False), (2, True)])
def test_batches_do_not_depend_on_workers(root, workers, persistent):
    data = FashionIQ(root, "train", transform=image_transform("targetpad", 16), seed=3)
    alone, shared = list(batches(data, 0, False)), list(batches(data, workers, persistent))
    assert len(alone) == len(shared)
    for a, b in zip(alone, shared):
        assert a.captions == b.captions and torch.equal(a.index, b.index)
        assert torch.equal(a.reference, b.reference) and torch.equal(a.target, b.target)
    assert len({tuple(batch.index.tolist()) for batch in alone}) == len(alone)  # epochs differ in order


def test_texts_differ_by_epoch_and_seed_and_validation_never_changes(root):
    def texts(split, seed, epoch):
        data = FashionIQ(root, split, seed=seed)
        data.set_epoch(epoch)
        return [data.caption(i) for i in range(len(data))]

    assert texts("train", 0, 0) == texts("train", 0, 0)
    assert texts("train", 0, 0) != texts("train", 0, 1) and texts("train", 0, 0) != texts("train", 1, 0)
    assert texts("val", 0, 0) == texts("val", 1, 5)


def test_each_of_the_four_texts_comes_a_quarter_of_the_time(root):
    data, forms = FashionIQ(root, "train"), {}
    for epoch in range(60):
        data.set_epoch(epoch)
        for i, triplet in enumerate(data.triplets):
            one, two = (c.strip(".?, ") for c in triplet.captions)
            names = {
                f"{one} and {two}".capitalize(): "12",
                f"{two} and {one}".capitalize(): "21",
                one.capitalize(): "1",
                two.capitalize(): "2",
            }
            form = names[data.caption(i).capitalize()]
            forms[form] = forms.get(form, 0) + 1
    total = sum(forms.values())
    assert all(abs(forms[form] / total - 0.25) < 0.03 for form in ("12", "21", "1", "2"))


def test_a_data_set_survives_a_trip_to_another_process(root):
    data = FashionIQ(root, "train", transform=image_transform("squarepad", 16), keep=True)
    data.set_epoch(2)
    copy = pickle.loads(pickle.dumps(data))
    assert copy[1]["caption"] == data[1]["caption"] and torch.equal(copy[1]["reference"], data[1]["reference"])


def test_unlabelled_splits_make_batches_without_targets(root):
    for name in ("CIRR", "FashionIQ"):
        data = open_dataset(name, root, "test", image_transform("targetpad", 16))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            batch = next(iter(DataLoader(data, 3, collate_fn=collate)))
        assert batch.target is None and batch.reference.shape == (3, 3, 16, 16) and len(batch.captions) == 3


def test_a_fault_in_our_own_arithmetic_is_not_blamed_on_the_picture(tmp_path, monkeypatch):
    def fail(image):
        raise IndexError("a bug of cala")

    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    monkeypatch.setattr("cala.pictures.reduce_to_eight_bits", fail)
    with pytest.raises(IndexError):
        read_picture(tmp_path / "deep.png")

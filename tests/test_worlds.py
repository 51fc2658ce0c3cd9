"The five promises of nbs/library/worlds/scenes.ipynb, checked on the files alone."

import json
import os
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

import cala.library.worlds.scenes
from cala.errors import CalaError
from cala.library.files import lock_folder
from cala.library.worlds.garments import draw_fashioniq
from cala.library.worlds.scenes import COLOURS, EDIT_KINDS, draw_cirr, name_thing, random_scene

REAL = Path(__file__).parents[2] / "shared" / "data"
SPLITS, FASHION_SPLITS, CATEGORIES = ("train", "val", "test1"), ("train", "val", "test"), ("dress", "shirt", "toptee")
SMALL_CIRR = dict(train=60, val=20, test1=10, seed=3)
SMALL_FASHION = dict(train=60, val=30, test=20, seed=3)


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def digest(root, pattern="*"):
    "One number for the files under `root`, names and bytes."
    total = sha256()
    for path in sorted(p for p in Path(root).rglob(pattern) if p.is_file()):
        total.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


@pytest.fixture(scope="module")
def cirr(tmp_path_factory):
    return draw_cirr(tmp_path_factory.mktemp("cirr"), **SMALL_CIRR)


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    return draw_fashioniq(tmp_path_factory.mktemp("fashion"), **SMALL_FASHION)


def cirr_triplets(folder):
    "Every triplet of every split as (row, reference things, target name, split); test1 by its answers."
    for split in SPLITS:
        scenes = read(folder / f"drawn/scenes.{split}.json")
        answers = read(folder / "drawn/answers.test1.json") if split == "test1" else {}
        for row in read(folder / f"cirr/captions/cap.rc2.{split}.json"):
            yield row, scenes, row.get("target_hard") or answers[str(row["pairid"])], split


def key(things):
    return frozenset((t["cell"], t["shape"], t["colour"], t["size"]) for t in things)


# -- the same bytes, everywhere ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, arguments", [("draw_cirr", dict(train=4, val=3, test1=2)), ("draw_fashioniq", dict(train=8, val=5, test=4))]
)
def test_same_bytes_in_processes_with_other_hash_seeds(tmp_path, name, arguments):
    code = f"import sys; from cala import {name}; {name}(sys.argv[1], **{arguments!r})"
    for salt in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / salt)], env=dict(os.environ, PYTHONHASHSEED=salt), check=True
        )
    assert digest(tmp_path / "1") == digest(tmp_path / "2")


def test_another_seed_draws_another_world(tmp_path):
    assert digest(draw_cirr(tmp_path / "a", 2, 2, 1, seed=1)) != digest(draw_cirr(tmp_path / "b", 2, 2, 1, seed=-1))


@pytest.mark.parametrize(
    "draw, captions", [(draw_cirr, "cirr/captions/cap.rc2.val.json"), (draw_fashioniq, "captions/cap.dress.val.json")]
)
def test_validation_is_the_same_however_much_is_drawn_to_train_on(tmp_path, draw, captions):
    few, many = draw(tmp_path / "few", train=2, val=6), draw(tmp_path / "many", train=9, val=6)
    assert (few / captions).read_bytes() == (many / captions).read_bytes()
    assert (few / "drawn/scenes.val.json").read_bytes() == (many / "drawn/scenes.val.json").read_bytes()


# -- the published layout ----------------------------------------------------------------------------------------------


def shape(value):
    "Keys and types of an annotation; names and numbers as keys count as one; a list counts by its first element."
    if isinstance(value, dict):
        if any("-img" in k for k in value):
            return {"name": shape(next(iter(value.values())))}
        return {k: shape(v) for k, v in value.items()}
    return [shape(value[0])] if isinstance(value, list) else type(value).__name__


@pytest.mark.skipif(not REAL.exists(), reason="the real annotations are not here")
@pytest.mark.parametrize("file", ["captions/cap.rc2.val.json", "captions/cap.rc2.test1.json"])
def test_rows_have_the_fields_and_types_of_the_real_cirr(cirr, file):
    drawn, real = read(cirr / "cirr" / file)[0], read(REAL / "cirr_dataset/cirr" / file)[0]
    assert list(drawn) == list(real) and list(drawn["img_set"]) == list(real["img_set"])
    assert shape(drawn) == shape(real)


@pytest.mark.skipif(not REAL.exists(), reason="the real annotations are not here")
def test_picture_files_are_spelt_as_in_the_real_cirr(cirr):
    for split in SPLITS:
        for root in (cirr, REAL / "cirr_dataset"):
            for name, file in read(root / f"cirr/image_splits/split.rc2.{split}.json").items():
                folder = {"train": r"train/\d\d?", "val": "dev", "test1": "test1"}[split]
                assert re.fullmatch(rf"\./{folder}/{re.escape(name)}\.png", file)
                assert re.fullmatch(r"(train|dev|test1)-\d+-\d-img[01]", name)


@pytest.mark.skipif(not REAL.exists(), reason="the real annotations are not here")
@pytest.mark.parametrize("split", FASHION_SPLITS)
@pytest.mark.parametrize("category", CATEGORIES)
def test_files_have_the_fields_and_types_of_the_real_fashioniq(fashion, category, split):
    for file in (f"captions/cap.{category}.{split}.json", f"image_splits/split.{category}.{split}.json"):
        drawn, real = read(fashion / file), read(REAL / "fashionIQ_dataset" / file)
        assert shape(drawn[0]) == shape(real[0]) and (isinstance(drawn[0], str) or list(drawn[0]) == list(real[0]))
    assert all(re.fullmatch("B[0-9A-Z]{9}", name) for name in drawn)


def test_counts_are_those_asked_for_and_every_picture_is_there(cirr, fashion):
    for split in SPLITS:
        files = read(cirr / f"cirr/image_splits/split.rc2.{split}.json")
        assert len(files) == 6 * SMALL_CIRR[split] == len(read(cirr / f"cirr/captions/cap.rc2.{split}.json"))
        for file in files.values():
            with Image.open(cirr / file) as image:
                assert (image.size, image.mode) == ((96, 96), "RGB")
    for split in FASHION_SPLITS:
        for category in CATEGORIES:
            assert len(read(fashion / f"captions/cap.{category}.{split}.json")) == SMALL_FASHION[split]
            for name in read(fashion / f"image_splits/split.{category}.{split}.json"):
                with Image.open(fashion / f"images/{name}.jpg") as image:
                    assert (image.size, image.format) == ((96, 96), "JPEG")


def test_pair_ids_are_unique_and_members_are_six_of_one_split(cirr):
    ids, by_id = Counter(), {}
    for row, scenes, target, split in cirr_triplets(cirr):
        ids[row["pairid"]] += 1
        group = row["img_set"]
        assert (
            len(set(group["members"])) == 6
            and set(group["members"]) <= set(scenes)
            and {row["reference"], target} <= set(group["members"])
        )
        assert (
            by_id.setdefault((split, group["id"]), group["members"]) == group["members"]
            and 0 <= group["reference_rank"] <= 5
        )
    assert max(ids.values()) == 1


def test_the_targets_of_the_test_splits_are_nowhere_but_in_the_answers(cirr, fashion):
    assert "target" not in (cirr / "cirr/captions/cap.rc2.test1.json").read_text()
    answers = read(fashion / "drawn/answers.test.json")
    for category in CATEGORIES:
        rows = read(fashion / f"captions/cap.{category}.test.json")
        assert all(set(row) == {"candidate", "captions"} for row in rows) and all(
            f"{category}-{i}" in answers for i in range(len(rows))
        )


def test_the_two_fashioniq_protocols_have_different_galleries(fashion):
    for category in CATEGORIES:
        used = {
            row[end] for row in read(fashion / f"captions/cap.{category}.val.json") for end in ("candidate", "target")
        }
        assert used < set(read(fashion / f"image_splits/split.{category}.val.json"))


# -- unseen means unseen -----------------------------------------------------------------------------------------------


def test_no_scene_and_no_garment_occurs_twice_in_any_split(cirr, fashion):
    scenes = [key(v["objects"]) for split in SPLITS for v in read(cirr / f"drawn/scenes.{split}.json").values()]
    assert len(set(scenes)) == len(scenes) == 540
    garments = [
        tuple(v for k, v in about.items() if k != "captions")
        for split in FASHION_SPLITS
        for about in read(fashion / f"drawn/scenes.{split}.json").values()
    ]
    assert len(set(garments)) == len(garments)


def test_no_two_pictures_look_alike_even_at_48_pixels(tmp_path):
    for folder in (draw_cirr(tmp_path, 40, 10, 5, size=48), draw_fashioniq(tmp_path, 60, 20, 10, size=48)):
        pictures = [Image.open(p).tobytes() for p in folder.rglob("*") if p.suffix in (".png", ".jpg")]
        assert len(set(pictures)) == len(pictures) > 300


# -- the target is determined ------------------------------------------------------------------------------------------


def test_every_triplet_is_one_edit_of_the_recorded_kind(cirr):
    for row, scenes, target, split in cirr_triplets(cirr):
        before, after = key(scenes[row["reference"]]["objects"]), key(scenes[target]["objects"])
        gone, come = before - after, after - before
        kind = read_kinds(cirr, split)[str(row["pairid"])]
        if kind in ("add", "remove"):
            assert (len(gone), len(come)) == ((0, 1) if kind == "add" else (1, 0))
        else:
            (old,), (new,) = gone, come
            assert [a != b for a, b in zip(old, new)] == [
                field == kind for field in ("move", "shape", "colour", "size")
            ]


@cache
def read_kinds(folder, split):
    return read(folder / f"drawn/edits.{split}.json")


def test_the_six_kinds_are_about_equally_frequent(tmp_path):
    kinds = Counter(read(draw_cirr(tmp_path, 300, 1, 1, size=24) / "drawn/edits.train.json").values())
    assert set(kinds) == set(EDIT_KINDS) and all(abs(kinds[kind] / 1800 - 1 / 6) < 0.04 for kind in kinds)


SHAPE, COLOUR = "circle|square|triangle|star|heart|diamond", "red|orange|yellow|green|blue|cyan|pink|black"
PLACE = {
    place: i
    for i, place in enumerate(
        [
            "top left",
            "top middle",
            "top right",
            "middle left",
            "centre",
            "middle right",
            "bottom left",
            "bottom middle",
            "bottom right",
        ]
    )
}
IT = rf"the (?P<size>small |large )?(?P<colour>(?:{COLOUR}) )?(?P<shape>{SHAPE}|one|shape)\b"


def follow(sentence, things):
    "A reader of its own: where `sentence` leads from `things`; fails if it could lead to more than one scene."
    new = re.search(rf"\ba (small|large) ({COLOUR}) ({SHAPE}) (?:appears )?in the (.+?)$", sentence)
    if new:
        return things | {(PLACE[new[4]], new[3], new[2], new[1])}
    sentence = re.sub("the (colour|shape|size) of", "", sentence)  # says nothing about which
    named = [m for m in re.finditer(IT, sentence)]
    assert len(named) == 1, sentence
    said = {k: v.strip() for k, v in named[0].groupdict().items() if v and v not in ("one", "shape")}
    fits = [
        t for t in things if all(dict(zip(("cell", "shape", "colour", "size"), t))[k] == v for k, v in said.items())
    ]
    assert len(fits) == 1, (sentence, things)
    (cell, form, colour, size), rest = fits[0], sentence[: named[0].start()] + " " + sentence[named[0].end() :]
    if re.search("remove|take away|is gone|get rid|without", rest):
        return things - {fits[0]}
    place = re.search(r"(?:in|to) the (.+?)(?: now)?$", rest)
    if place:
        changed = (PLACE[place[1]], form, colour, size)
    elif shapes := re.findall(rf"\ba ({SHAPE})\b", rest):
        changed = (cell, *shapes, colour, size)
    elif colours := re.findall(rf"\b({COLOUR})\b", rest):
        changed = (cell, form, *colours, size)
    else:
        (word,) = re.findall("larger|bigger|smaller|small|large", rest)
        changed = (cell, form, colour, "small" if "small" in word else "large")
    return things - {fits[0]} | {changed}


def test_every_sentence_leads_from_its_reference_to_its_target_and_no_further(cirr):
    for row, scenes, target, _ in cirr_triplets(cirr):
        assert follow(row["caption"], key(scenes[row["reference"]]["objects"])) == key(scenes[target]["objects"]), row[
            "caption"
        ]


def test_captions_of_scenes_say_everything(cirr):
    for about in read(cirr / "drawn/scenes.val.json").values():
        assert len(about["captions"]) == 3
        for caption in about["captions"]:
            said = Counter(re.findall(rf"\b(small|large) ({COLOUR}) ({SHAPE})", caption))
            assert said == Counter((t["size"], t["colour"], t["shape"]) for t in about["objects"])
            assert all(t["place"] in caption for t in about["objects"])


MOTIFS = dict(striped="striped|stripes", dotted="dotted|dots", checked="checked|checks", floral="floral|flowers")


def restyle(sentences, old):
    "A reader of its own for two FashionIQ sentences: the target's attributes, by what they say and the reference."
    new = dict(old)
    for text in sentences:
        if re.search(r"\b(plain|no pattern|no (stripes|dots|checks|flowers))\b", text):
            new["pattern"] = "plain"
        thing = "(belt|bow|buttons|pocket|printed heart)"
        if re.search(rf"\b(no|without the|not have|not have a) {thing}|the {thing} removed", text):
            new["detail"] = "none"
        goes = r"\b(instead of|no|without|not have|the)( the)?( a)? "
        goes += "(belt|bow|buttons|pocket|printed heart|stripes|dots|checks|flowers)"
        text = re.sub(goes, "", text)
        for pattern, words in MOTIFS.items():
            if re.search(rf"\b({words})\b", text):
                new["pattern"] = pattern
        if m := re.search(r"\b(belt|bow|buttons|pocket|heart)\b", text):
            new["detail"] = m[1]
        if m := re.search(r"\b(red|orange|yellow|green|blue|purple|pink|brown|grey|black|white)\b", text):
            new["colour"] = m[1]
        if m := re.search(r"\b(round|v|square) neck|\b(collar)", text):
            new["neck"] = m[1] or m[2]
        if re.search("sleeveless|(no|without) sleeves|bare arms", text):
            new["sleeve"] = "sleeveless"
        elif m := re.search(r"(long|short)(?:er)? sleeve|sleeves that are (long|short)", text):
            new["sleeve"] = m[1] or m[2]
        if m := re.search(r"(short|medium|long) (?:in length|length|cut)|is (short|long)er", text):
            new["length"] = m[1] or m[2]
    return new


@pytest.mark.parametrize("split", FASHION_SPLITS)
def test_two_sentences_together_lead_to_the_target_garment(fashion, split):
    about, edits = read(fashion / f"drawn/scenes.{split}.json"), read(fashion / f"drawn/edits.{split}.json")
    answers = read(fashion / "drawn/answers.test.json")
    for category in CATEGORIES:
        for i, row in enumerate(read(fashion / f"captions/cap.{category}.{split}.json")):
            old, target = (
                {k: v for k, v in about[name].items() if k != "captions"}
                for name in (row["candidate"], row.get("target") or answers[f"{category}-{i}"])
            )
            assert restyle(row["captions"], old) == target, (row["captions"], old, target)
            assert (
                edits[f"{category}-{i}"] == "+".join(k for k in old if old[k] != target[k])
                and len(set(row["captions"])) == 2
            )


def test_the_vocabulary_is_small(cirr, fashion):
    words = set()
    for path in [*cirr.rglob("cap.*.json"), *fashion.rglob("cap.*.json")]:
        words |= {
            w
            for row in read(path)
            for text in [row.get("caption"), *row.get("captions", [])]
            if text
            for w in text.split()
        }
    for path in [*cirr.rglob("scenes.*.json"), *fashion.rglob("scenes.*.json")]:
        words |= {w.strip(",") for about in read(path).values() for text in about["captions"] for w in text.split()}
    assert len(words) < 250 and all(re.fullmatch("[a-z]+", word) for word in words)


# -- who may write where -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        dict(size=3),
        dict(size=100_000),
        dict(size=96.0),
        dict(size=True),
        dict(train=-1),
        dict(train="many"),
        dict(val=None),
        dict(test1=10**9),
        dict(train=0, val=0, test1=0),
        dict(pairs=0),
        dict(pairs=11),
        dict(seed=0.5),
        dict(seed=2**99),
    ],
)
def test_silly_numbers_are_refused_by_name_and_nothing_is_written(tmp_path, arguments):
    with pytest.raises(CalaError, match=list(arguments)[0] + ".*give a whole number"):
        draw_cirr(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "arguments", [dict(size=0), dict(train=4001), dict(train=3600), dict(test=-5), dict(seed="zero")]
)
def test_silly_numbers_of_garments_are_refused_by_name(tmp_path, arguments):
    with pytest.raises(CalaError, match="give a whole number"):
        draw_fashioniq(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("draw, folder", [(draw_cirr, "cirr_dataset"), (draw_fashioniq, "fashionIQ_dataset")])
def test_a_folder_with_something_else_is_left_alone(tmp_path, draw, folder):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "mine.txt").write_text("years of work")
    with pytest.raises(CalaError, match="not empty"):
        draw(tmp_path, 1, 1, 1)
    assert [p.name for p in tmp_path.rglob("*")] == [folder, "mine.txt"]


def test_another_world_in_the_same_place_is_refused_and_the_same_is_not_drawn_again(tmp_path):
    folder = draw_cirr(tmp_path, 2, 1, 1)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert draw_cirr(str(tmp_path), 2, 1, 1, seed=0) == folder and before == {
        p: p.stat().st_mtime_ns for p in folder.rglob("*")
    }
    with pytest.raises(CalaError, match="size 96 not 64"):
        draw_cirr(tmp_path, 2, 1, 1, size=64)
    draw_fashioniq(tmp_path, 1, 1, 1)  # the two data sets share a root


def test_a_root_that_is_a_file_or_a_broken_note_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CalaError, match="name another folder"):
        draw_cirr(tmp_path / "file", 1, 1, 1)
    for note in ("{", "[1]", "null"):
        (tmp_path / "cirr_dataset/drawn").mkdir(parents=True, exist_ok=True)
        (tmp_path / "cirr_dataset/drawn/world.json").write_text(note)
        with pytest.raises(CalaError, match="name another folder"):
            draw_cirr(tmp_path, 1, 1, 1)


def test_a_killed_drawing_is_not_taken_for_a_finished_one_and_can_be_started_again(tmp_path, monkeypatch):
    draw, left = cala.library.worlds.scenes.scene_picture, [20]

    def killed(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(cala.library.worlds.scenes, "scene_picture", killed)
    with pytest.raises(KeyboardInterrupt):
        draw_cirr(tmp_path / "killed", 4, 2, 1)
    monkeypatch.undo()
    assert not (tmp_path / "killed/cirr_dataset/drawn/world.json").exists()
    with pytest.raises(CalaError, match="train 4 not 5"):
        draw_cirr(tmp_path / "killed", 5, 2, 1)
    assert digest(draw_cirr(tmp_path / "killed", 4, 2, 1)) == digest(draw_cirr(tmp_path / "whole", 4, 2, 1))


@pytest.mark.parametrize("draw, folder", [(draw_cirr, "cirr_dataset"), (draw_fashioniq, "fashionIQ_dataset")])
def test_a_folder_in_which_another_process_draws_is_left_to_it(tmp_path, draw, folder):
    with lock_folder(tmp_path / folder):
        with pytest.raises(CalaError, match="another process is at work in"):
            draw(tmp_path, 1, 1, 1)
        assert [path.name for path in (tmp_path / folder).iterdir()] == [".cala.lock"]
    assert digest(draw(tmp_path, 1, 1, 1)) == digest(draw(tmp_path / "alone", 1, 1, 1))


# -- colours -----------------------------------------------------------------------------------------------------------

# How people see colours who lack the pigment for medium or for long wavelengths, by Machado and others (2009).
EYES = {
    "most people": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
}


@pytest.mark.parametrize("eyes", EYES)
def test_the_colours_of_scenes_are_told_apart_by_everybody(eyes):
    colours = np.array([[int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)] for code in COLOURS.values()])
    light = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    light = np.clip(light @ np.array(EYES[eyes]).T, 0, 1)
    colours = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    assert min(np.linalg.norm(a - b) for a, b in combinations(colours, 2)) > 0.2


# -- functions ---------------------------------------------------------------------------------------------------------


def test_a_name_fits_one_thing_and_every_word_of_it_is_needed():
    rng = Random(0)
    for _ in range(300):
        scene = random_scene(rng)
        for thing in scene:
            words = [word for word in name_thing(thing, scene, rng).split() if word not in ("the", "one", "shape")]

            def fitting(words):
                return [t for t in scene if set(words) <= {t.size, t.colour, t.shape}]

            assert fitting(words) == [thing]
            assert len(words) == 1 or all(len(fitting(set(words) - {word})) > 1 for word in words)


# Committed results come from drawn worlds, so the worlds must never change.
@pytest.mark.parametrize(
    "draw, arguments, annotations",
    [
        (draw_cirr, dict(train=40, val=20, test1=10, seed=3), "d15be4a5c397a595"),
        (draw_fashioniq, dict(train=60, val=30, test=20, seed=3), "473cc77ed35ef2f2"),
    ],
)
def test_a_world_is_the_same_as_in_earlier_versions(tmp_path, draw, arguments, annotations):
    "Annotations alone: how Pillow compresses a picture may change from version to version."
    assert digest(draw(tmp_path, **arguments), "*.json")[:16] == annotations

"CIRCO: the drawn world, the files, the metrics against a slow plain computation, the commands, and mistakes."

import json
import random
import shutil
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cala.composition import make_frame
from cala.errors import CalaError, count_things
from cala.library.audit import audit
from cala.library.checkpoint import save_checkpoint
from cala.library.circo import (
    CIRCO,
    CIRCO_AT,
    GALLERY_FILE,
    PICTURE_FOLDER,
    average_precision,
    check_circo_submittable,
    circo_baselines,
    circo_metrics,
    find_circo_faults,
    measure_circo,
    place_truths,
    rank_circo,
    top_columns,
    write_circo_submission,
)
from cala.library.cli import run_command
from cala.library.worlds.circo import EDIT_ASPECTS, draw_circo
from cala.library.worlds.scenes import Thing, difference, draw_cirr, make_scene
from cala.retrieval import Embedded, embed
from cala.scripts import circo_submission, validate
from saved_models import tiny
from stand_ins import REAL, needs_real


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return draw_circo(tmp_path_factory.mktemp("world"), val=20, test=12, size=24).parent


@pytest.fixture
def own(root, tmp_path):
    "A copy of the drawn world whose files a test may change; its pictures are a link."
    folder = tmp_path / "CIRCO"
    shutil.copytree(root / "CIRCO/annotations", folder / "annotations")
    (folder / GALLERY_FILE).parent.mkdir(parents=True)
    shutil.copy(root / "CIRCO" / GALLERY_FILE, folder / GALLERY_FILE)
    (folder / PICTURE_FOLDER).symlink_to(root / "CIRCO" / PICTURE_FOLDER)
    return folder


def official_metrics(data, predictions):
    "mAP, recall of the target and mAP@10 by aspect as CIRCO's repository defines them, from lists of 50 names."
    precisions, recalls, by_aspect = {k: [] for k in CIRCO_AT}, {k: [] for k in CIRCO_AT}, {}
    for query, prediction in zip(data.triplets, predictions):
        is_truth = np.isin(prediction, query.group)
        precision = np.cumsum(is_truth) * is_truth / np.arange(1, len(prediction) + 1)
        for k in CIRCO_AT:
            precisions[k].append(precision[:k].sum() / min(len(query.group), k))
            recalls[k].append(query.target in prediction[:k])
        for aspect in query.aspects:
            by_aspect.setdefault(aspect, []).append(precision[:10].sum() / min(len(query.group), 10))
    metrics = {f"map_at{k}": values for k, values in precisions.items()}
    metrics |= {f"recall_at{k}": values for k, values in recalls.items()}
    metrics |= {f"{aspect}_map_at10": values for aspect, values in by_aspect.items()}
    return {name: 100 * float(np.mean(values)) for name, values in metrics.items()}


def sort_names(data, scores):
    "The names of the first 50 pictures of each query by a full sort."
    return [[data.gallery.names[i] for i in row.argsort(descending=True)[:50]] for row in scores]


# The drawn world


def test_the_truths_of_a_drawn_query_are_all_scenes_that_fit_and_no_others(root):
    about = json.loads((root / "CIRCO/drawn/scenes.json").read_text())
    scenes = {}
    for name, things in about.items():
        scenes[f"{int(name):012}"] = make_scene([Thing(*(t[field] for field in Thing._fields)) for t in things])
    assert len(set(scenes.values())) == len(scenes)
    kinds = json.loads((root / "CIRCO/drawn/edits.val.json").read_text())
    data = CIRCO(root, "val")
    for query in data.triplets:
        reference, kind = scenes[query.reference], kinds[query.pair_id]
        edit: Any = difference(reference, scenes[query.target])
        assert edit.kind == kind and query.aspects == EDIT_ASPECTS[kind] and query.reference not in query.group
        for name, scene in scenes.items():
            other: Any = difference(reference, scene)
            fits = other is not None and (other.kind, other.before) == (kind, edit.before)
            if fits and kind == "add" and other is not None:
                fits = other.after.colour == edit.after.colour
            assert (name in query.group) == fits
    assert max(len(query.group) for query in data.triplets) > 3
    answers = json.loads((root / "CIRCO/drawn/answers.test.json").read_text())
    assert len(answers) == len(CIRCO(root, "test")) and all(answers.values())


# Files


@pytest.mark.parametrize("name", ["CIRCO", "circo", "circo_dataset", "Circo-dataset"])
def test_the_folder_is_found_by_the_names_that_people_give_it(root, tmp_path, name):
    (tmp_path / name).symlink_to(root / "CIRCO")
    assert len(CIRCO(tmp_path, "val")) == len(CIRCO(tmp_path / name, "val")) == 20


def test_the_text_has_the_shared_concept_only_if_asked_for_and_says_so(root):
    data, longer = CIRCO(root, "val"), CIRCO(root, "test1", shared_concept=True)
    query = longer.triplets[0]
    assert data.caption(0) == data.triplets[0].captions[0] and data.choices()["text"] == "modification text"
    assert longer.caption(0) == f"find {query.concept} but {query.captions[0]}"
    assert longer.choices()["text"] == "modification text with shared concept" and longer.split == "test"


def test_items_and_links_of_whole_folders_are_read(own):
    item = CIRCO(own, "val", transform=lambda picture: torch.zeros(3, *picture.size))[0]
    assert item["reference"].shape == item["target"].shape == (3, 24, 24)
    assert CIRCO(own, "test", transform=lambda picture: torch.zeros(1))[0]["target"] is None
    assert audit(own).ok and [row["pictures"] for row in audit(own).rows] == [len(CIRCO(own, "val").gallery)] * 2


def change_entry(**fields):
    def change(entries):
        entries[3].update(fields)

    return change


def drop_field(name):
    def change(entries):
        del entries[3][name]

    return change


FAULTS = {
    "no list": (lambda entries: entries.clear(), "must hold a JSON list that is not empty"),
    "no object": (lambda entries: entries.__setitem__(3, 7), "entry 3: is not an object, but 7"),
    "no truths": (drop_field("gt_img_ids"), "entry 3: has no gt_img_ids"),
    "no target": (drop_field("target_img_id"), "entry 3: has no target_img_id"),
    "no text": (change_entry(relative_caption=None), "entry 3: relative_caption must be text, but is None"),
    "no concept": (change_entry(shared_concept=["a"]), "entry 3: shared_concept must be text"),
    "empty truths": (change_entry(gt_img_ids=[]), "entry 3: gt_img_ids must be a list of picture ids"),
    "true": (change_entry(reference_img_id=True), "entry 3: reference_img_id must be a picture id, but is True"),
    "negative": (change_entry(reference_img_id=-1), "entry 3: reference_img_id must be a picture id"),
    "huge": (change_entry(reference_img_id=10**300), "entry 3: reference_img_id must be a picture id"),
    "unknown picture": (change_entry(reference_img_id=999_999), "entry 3: picture 999999 is not in the gallery"),
    "path": (change_entry(reference_img_id="../../x"), "entry 3: reference_img_id must be a picture id"),
    "aspect": (change_entry(semantic_aspects=["../x"]), "entry 3: semantic_aspects must be a list of some of"),
    "order": (change_entry(id=4), "entry 3: id must be 3, the place in the file, but is 4"),
    "target elsewhere": (change_entry(target_img_id=5), "entry 3: target_img_id 5 is not among gt_img_ids"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_an_annotation_file_is_one_line(own, fault):
    change, message = FAULTS[fault]
    path = own / "annotations/val.json"
    entries = json.loads(path.read_text())
    change(entries)
    path.write_text(json.dumps(entries))
    with pytest.raises(CalaError) as raised:
        CIRCO(own, "val")
    assert message in str(raised.value) and "\n" not in str(raised.value) and len(str(raised.value)) < 600
    assert not audit(own).ok


def test_truths_may_not_be_named_twice_and_the_target_is_put_first(own):
    path = own / "annotations/val.json"
    entries = json.loads(path.read_text())
    number = next(i for i, entry in enumerate(entries) if len(entry["gt_img_ids"]) > 1)
    entries[number]["gt_img_ids"].reverse()
    path.write_text(json.dumps(entries))
    assert int(CIRCO(own, "val").triplets[number].group[0]) == entries[number]["target_img_id"]
    entries[number]["gt_img_ids"].append(entries[number]["target_img_id"])
    path.write_text(json.dumps(entries))
    with pytest.raises(CalaError, match="names a picture twice"):
        CIRCO(own, "val")


GALLERY_FAULTS = {
    "[]": "must hold a JSON object",
    "{": "cannot be read as JSON",
    '{"images": {}}': "must hold a list of images",
    '{"images": [7]}': "image 0: needs an id and a file_name, but is 7",
    '{"images": [{"id": "1", "file_name": "000000000001.jpg"}]}': "image 0: needs an id and a file_name",
    '{"images": [{"id": 1, "file_name": "../000000000001.jpg"}]}': "image 0: needs an id and a file_name",
    '{"images": [{"id": 1, "file_name": "000000000002.jpg"}]}': "does not belong to id 1",
    '{"images": [{"id": 1, "file_name": "000000000001.jpg"}, {"id": 1, "file_name": "000000000001.png"}]}': "twice",
}


@pytest.mark.parametrize("text", GALLERY_FAULTS)
def test_a_fault_of_the_list_of_the_gallery_is_one_line(own, text):
    (own / GALLERY_FILE).write_text(text)
    with pytest.raises(CalaError, match=GALLERY_FAULTS[text]) as raised:
        CIRCO(own, "val")
    assert "\n" not in str(raised.value)


def test_a_missing_list_says_where_it_is(own):
    (own / GALLERY_FILE).unlink()
    with pytest.raises(CalaError, match="no list of the gallery .*; it is in image_info_unlabeled2017.zip") as raised:
        CIRCO(own, "val")
    assert "more" not in str(raised.value)  # entries are not accused of naming pictures that are not in the gallery


def test_without_missing_pictures_no_query_has_lost_a_truth(root, tmp_path):
    folder = draw_circo(tmp_path, val=20, test=12, size=24)
    whole = CIRCO(folder, "val")
    query = max(whole.triplets, key=lambda query: len(query.group))
    (folder / PICTURE_FOLDER / f"{query.group[-1]}.png").unlink()
    with pytest.raises(CalaError, match="cala-check lists them"):
        CIRCO(folder, "val").require_pictures()
    with pytest.warns(UserWarning, match="left out"):
        rest = CIRCO(folder, "val", allow_missing=True)
    assert query.pair_id not in [each.pair_id for each in rest.triplets]
    lost = count_things(rest.left_out["queries"], "query was", "queries were")
    with pytest.raises(CalaError, match=f"^{lost} left out, and a submission answers all of them"):
        check_circo_submittable(rest)
    assert (
        len(rest) + rest.left_out["queries"] == 20 and rest.truths.max() < len(rest.gallery) == len(whole.gallery) - 1
    )


# Metrics


def random_truths(queries, pictures, most, seed=0):
    rng = random.Random(seed)
    rows = [rng.sample(range(pictures), rng.randint(1, most)) for _ in range(queries)]
    return torch.tensor([row + [-1] * (most - len(row)) for row in rows])


def naive_average_precision(ranking, truths, k):
    matches, total = 0, 0.0
    for rank, picture in enumerate(ranking[:k], 1):
        if picture in truths:
            matches += 1
            total += matches / rank
    return total / min(len(truths), k)


@pytest.mark.parametrize("pictures", [60, 900, 9_001])
def test_average_precision_is_that_of_sorted_rows(pictures):
    scores, truths = torch.randn(30, pictures), random_truths(30, pictures, 9)
    scores.scatter_add_(1, truths.clamp(min=0), torch.rand(30, 9) * 3)  # truths tend to stand in front
    metrics = circo_metrics(scores, truths)
    for k in CIRCO_AT:
        naive = []
        for row, positions in zip(scores, truths.tolist()):
            ranking = row.argsort(descending=True).tolist()
            naive.append(naive_average_precision(ranking, {p for p in positions if p >= 0}, k))
        assert metrics[f"map_at{k}"] == pytest.approx(100 * np.mean(naive), abs=1e-4)
        first = (scores > scores.gather(1, truths[:, :1])).sum(1) < k
        assert metrics[f"recall_at{k}"] == pytest.approx(100 * first.double().mean().item(), abs=1e-4)


def test_tied_pictures_count_as_the_mean_over_all_orders():
    rng = random.Random(0)
    for _ in range(10):
        scores = [rng.randint(0, 2) for _ in range(6)]
        truths = rng.sample(range(6), rng.randint(1, 4))
        rankings = [sorted(order, key=lambda picture: -scores[picture]) for order in permutations(range(6))]
        expected = np.mean([naive_average_precision(ranking, truths, 5) for ranking in rankings])
        places = place_truths(torch.tensor([scores]).float(), torch.tensor([truths]))
        precision = average_precision(places.higher, places.equal, torch.tensor([len(truths)]))
        assert precision[5].item() == pytest.approx(expected, abs=1e-6)


def test_ties_that_go_on_beyond_the_first_50_count_in_full():
    scores, truths = torch.zeros(2, 5_000), torch.tensor([[7, 4_000], [1, -1]])
    scores[0, :20] = 1.0  # the truth 7 shares the first score with 19 pictures, the truth 4,000 the rest
    places = place_truths(scores, truths)
    assert places.higher.tolist() == [[0, 20], [0, 0]] and places.equal.tolist() == [[20, 4_980], [5_000, 0]]
    shuffled = []
    for seed in range(2_000):
        order = torch.randperm(20, generator=torch.Generator().manual_seed(seed)).tolist()
        shuffled.append(naive_average_precision(order, {7}, 10) / 2)
    metrics = average_precision(places.higher, places.equal, torch.tensor([2, 1]))
    assert metrics[10][0].item() == pytest.approx(np.mean(shuffled), abs=0.01)


def test_a_constant_model_reaches_what_chance_does_and_nan_is_refused(root):
    data = CIRCO(root, "val")
    ones = torch.ones(len(data.gallery), 4)
    flat = Embedded(ones, ones[: len(data)], ones[: len(data)])
    rows = circo_baselines(flat, data)
    for row in ("image only", "text only"):
        for key, value in rows["chance"].items():
            assert rows[row][key] == (pytest.approx(value, abs=1e-4) if isinstance(value, float) else value), key
        assert rows[row]["ties"] == len(data)
    with pytest.raises(CalaError, match="NaN"):
        measure_circo(make_frame("sum", 4), flat._replace(text=flat.text * torch.nan), data)


@pytest.mark.parametrize("shape", [(3, 40), (5, 2_000), (4, 8_000), (2, 8_031)])
def test_the_highest_columns_are_those_of_topk(shape):
    scores = torch.randn(shape)
    best, exact = top_columns(scores, 50), scores.topk(min(50, shape[1]))
    assert torch.equal(best.scores, exact.values) and torch.equal(scores.gather(1, best.positions), exact.values)
    coarse = scores.round()  # many ties
    best = top_columns(coarse, 50)
    assert torch.equal(best.scores, coarse.topk(min(50, shape[1])).values)
    assert all(len(set(row)) == len(row) for row in best.positions.tolist())


@pytest.mark.parametrize("frame", ["sum", "artemis", "combiner"])
def test_parts_of_the_table_give_what_the_whole_does_for_every_frame(root, frame):
    model, data = tiny(frame), CIRCO(root, "val")
    data.gallery.transform = model.backbone.transform("plain")
    embedded = embed(model, data, progress=False)
    whole: Any = measure_circo(model.frame, embedded, data)
    with torch.no_grad():
        network: Any = model.frame.eval()
        scores = network.scores(embedded.reference, embedded.text, embedded.gallery)
    expected = circo_metrics(scores, data.truths, data.aspects) | official_metrics(data, sort_names(data, scores))
    assert {key: whole[key] for key in expected} == pytest.approx(expected, abs=1e-3)
    parts = rank_circo(model.frame, embedded, data.truths, held=3 * len(data.gallery))
    assert torch.equal(parts.higher, rank_circo(model.frame, embedded, data.truths).higher)
    assert data.evaluate(model, progress=False) == pytest.approx(dict(whole), abs=1e-3)
    assert whole.ranks["ap_at10"].mean() * 100 == pytest.approx(whole["map_at10"], abs=1e-4)
    assert 100 * (whole.ranks["rank"] <= 10).mean() == pytest.approx(whole["recall_at10"], abs=1e-4)


# The real annotations


@pytest.fixture(scope="module")
def real_root(tmp_path_factory):
    "The real annotations with a gallery of all pictures that they name, and 4,000 more names; there are no pictures."
    root = tmp_path_factory.mktemp("real")
    shutil.copytree(REAL / "circo_dataset/annotations", root / "circo_dataset/annotations")
    numbers = set(random.Random(0).sample(range(600_000), 4_000))
    for split in ("val", "test"):
        for entry in json.loads((REAL / f"circo_dataset/annotations/{split}.json").read_text()):
            numbers |= {entry["reference_img_id"], *entry.get("gt_img_ids", ())}
    images = [dict(id=number, file_name=f"{number:012}.jpg") for number in sorted(numbers)]
    path = root / "circo_dataset" / GALLERY_FILE
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(dict(images=images)))
    return root


@needs_real
def test_the_real_annotations_are_read_as_they_were_counted(real_root):
    val, test = CIRCO(real_root, "val"), CIRCO(real_root, "test")
    sizes = (val.truths >= 0).sum(1)
    assert (len(val), len(test)) == (220, 800) and test.targets is None
    assert (int(sizes.min()), int(sizes.max())) == (1, 14) and sizes.double().mean().item() == pytest.approx(
        4.16, abs=0.01
    )
    assert (
        len(val.aspects) == 9
        and len(val.aspects["statement_with_conjunction"]) == 164
        and len(val.aspects["negation"]) == 21
    )
    assert not any(query.reference in query.group for query in val.triplets)


@needs_real
def test_metrics_are_those_of_the_official_definition_on_the_real_annotations(real_root):
    data = CIRCO(real_root, "val")
    truths = data.truths
    scores = torch.randn(len(data), len(data.gallery))
    for row, positions in zip(scores, truths):
        row[positions[positions >= 0]] += 2.0
    metrics = circo_metrics(scores, truths, data.aspects)
    assert metrics == pytest.approx(official_metrics(data, sort_names(data, scores)), abs=1e-4)
    assert 5 < metrics["map_at10"] < 95 and len(metrics) == 17


# The file for the server, and the commands


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    "A model as cala-train saves it after training on CIRR."
    folder = tmp_path_factory.mktemp("run") / "best"
    save_checkpoint(tiny(), folder, recipe=dict(dataset="CIRR", transform="squarepad"))
    return folder


def run(main, *words):
    return run_command(main, [str(word) for word in (*words, "--device", "cpu")], prog="cala")


def refused(capsys, main, *words):
    "The one line of a command that ends with status 2."
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(main, *words)
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_a_checkpoint_of_cirr_is_measured_on_circo_by_one_command(root, checkpoint, tmp_path, capsys):
    words = ["--dataset", "circo", "--data-root", root, "--checkpoint", checkpoint]
    rows = run(validate.main, *words, "--output", tmp_path / "plain")
    printed = capsys.readouterr().out
    assert "CIRCO val, reference kept; gallery 3" in printed and "text: modification text" in printed
    assert "mAP@5" in printed and "mAP@10 by semantic aspect: cardinality" in printed and "Rs@" not in printed
    content = json.loads((tmp_path / "plain/result.json").read_text())
    assert content["result"] == pytest.approx(dict(rows["sum"])) and list(rows) == [
        "chance",
        "image only",
        "text only",
        "sum",
    ]
    assert content["result"]["text"] == "modification text" and content["result"]["protocol"] == "reference kept"
    assert content["recipe"]["transform"] == "squarepad" and "--shared-concept" not in printed
    table = pd.read_csv(tmp_path / "plain/ranks.csv", dtype=dict(reference=str))
    assert 100 * table["ap_at5"].mean() == pytest.approx(content["result"]["map_at5"], abs=1e-4)
    assert table["reference"].str.len().eq(12).all()
    longer = run(validate.main, *words, "--shared-concept", "--output", tmp_path / "longer")["sum"]
    assert longer["text"] == "modification text with shared concept" and not longer.ranks.equals(rows["sum"].ranks)


def test_kept_features_give_the_same_result_and_serve_the_other_split(root, checkpoint, tmp_path, monkeypatch):
    words = ["--data-root", root, "--checkpoint", checkpoint, "--cache-dir", tmp_path / "cache"]
    results = {}
    for name, more in dict(off=[], made=["--cache", "tokens"], read=["--cache", "auto"]).items():
        results[name] = run(validate.main, "--dataset", "CIRCO", *words, *more, "--output", tmp_path / name)["sum"]
    assert results["made"] == results["read"] == pytest.approx(dict(results["off"]), abs=1e-3)
    caches = list((tmp_path / "cache").iterdir())
    size = sum(path.stat().st_size for path in caches[0].glob("*.safetensors"))
    assert len(caches) == 1 and size < 400 * len(CIRCO(root, "val").gallery)  # a feature a picture, not its tokens
    references = {triplet.reference for split in ("val", "test") for triplet in CIRCO(root, split).triplets}
    opened = []

    def read_reference(path, *more):
        opened.append(Path(path).stem)
        return Image.new("RGB", (24, 24))

    monkeypatch.setattr("cala.data.read_picture", read_reference)
    run(circo_submission.main, *words, "--cache", "tokens", "--output", tmp_path / "out")
    assert opened and set(opened) <= references
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_file_is_what_the_server_asks_for_and_scores_on_val_what_is_measured(root, checkpoint, tmp_path, capsys):
    words = ["--data-root", root, "--checkpoint", checkpoint, "--output", tmp_path / "out"]
    path = run(circo_submission.main, *words, "--submission-name", "mine", "--shared-concept")
    printed = capsys.readouterr().out
    assert "12 queries" in printed and "https://circo.micc.unifi.it/" in printed
    content = json.loads(path.read_text())
    assert list(content) == [str(i) for i in range(12)]
    assert all(len(set(row)) == 50 and all(type(number) is int for number in row) for row in content.values())
    facts = json.loads((tmp_path / "out/mine_facts.json").read_text())
    assert (
        facts["text"] == "modification text with shared concept" and len(facts["weights"]["checkpoint"]["sha256"]) == 64
    )
    val = CIRCO(root, "val")
    path = run(circo_submission.main, *words, "--split", "val")
    predictions = [[f"{number:012}" for number in row] for row in json.loads(path.read_text()).values()]
    measured = run(
        validate.main,
        "--dataset",
        "CIRCO",
        "--data-root",
        root,
        "--checkpoint",
        checkpoint,
        "--output",
        tmp_path / "val",
    )["sum"]
    official = official_metrics(val, predictions)
    assert {key: measured[key] for key in official} == pytest.approx(official, abs=1e-3)


def test_every_fault_of_a_file_is_found(root, tmp_path):
    data, path = CIRCO(root, "test"), tmp_path / "circo.json"
    model = tiny()
    data.gallery.transform = model.backbone.transform("plain")
    write_circo_submission(model.frame, embed(model, data, progress=False), data, path)
    assert find_circo_faults(path, data) == []
    content = json.loads(path.read_text())
    faulty = dict(content) | {"12": content["0"], "x" * 5_000: []}
    del faulty["11"]
    faulty["0"] = content["0"][:49]
    faulty["1"] = content["1"][:49] + content["1"][:1]
    faulty["2"] = [str(number) for number in content["2"]]
    faulty["3"] = content["3"][:49] + [999_999]
    faulty["4"] = [True] + content["4"][1:]
    path.write_text(json.dumps(faulty))
    assert find_circo_faults(path, data) == [
        "queries are missing: 1 of 12, the first is 11",
        "keys are no query of test: 2, the first is '12'",
        "the answer does not name 50 pictures (1 query, the first is 0)",
        "a picture is named twice (1 query, the first is 1)",
        "the answer is no list of picture ids (2 queries, the first is 2)",
        "a picture is not in the gallery (1 query, the first is 3)",
    ]
    for text, fault in {"[]": "it is not a JSON object", "{}": "it is empty", "{": "it is not JSON"}.items():
        path.write_text(text)
        assert find_circo_faults(path, data)[0].startswith(fault)
    path.write_text('{"0": [], "0": []}')
    assert find_circo_faults(path, data)[0] == "keys are there more than once: 1, the first is 0"
    with pytest.raises(CalaError, match="write it with cala-circo-submission"):
        find_circo_faults(tmp_path / "none.json", data)


def test_mistakes_are_one_line(root, checkpoint, tmp_path, capsys):
    draw_cirr(tmp_path, train=1, val=1, test1=1, size=24)
    small = draw_circo(tmp_path / "further/below", val=1, test=1, size=24)
    model = ["--checkpoint", checkpoint, "--output", tmp_path / "out"]
    commands = {
        "holds no annotations of CIRCO": (validate.main, "--dataset", "CIRCO", "--data-root", tmp_path),
        "only CIRCO has shared concepts": (validate.main, "--shared-concept", "--data-root", tmp_path),
        "no data set 'COCO'; give --dataset": (validate.main, "--dataset", "COCO", "--data-root", tmp_path),
        "a submission names 50 pictures": (circo_submission.main, "--data-root", small),
        "give a plain file name": (circo_submission.main, "--data-root", root, "--submission-name", "a/b"),
        "no split 'train'; CIRCO has val, test": (circo_submission.main, "--data-root", root, "--split", "train"),
    }
    for message, (main, *words) in commands.items():
        assert message in refused(capsys, main, *words, *model), message
    assert not (tmp_path / "out").exists()

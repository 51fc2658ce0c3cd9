"cala-search as a shell runs it: right answers, an index that stays correct, nothing left out silently."

import json
import os
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from cala.data import CIRR
from cala.encoders import make_backbone, read_vocabulary
from cala.library import search
from cala.library.checkpoint import save_checkpoint
from cala.library.cli import run_command
from cala.library.loading import ModelFlags
from cala.library.worlds.scenes import draw_cirr
from cala.model import CaLa
from cala.rerank import Reranker, evaluate_again
from cala.scripts.search import main
from cala.scripts.validate import main as validate

QUESTION = ["--reference", "a/00.png", "--sentence", "make the star red"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Twelve drawn pictures in two folders, and two untrained checkpoints of different weights."
    root = tmp_path_factory.mktemp("search")
    data = CIRR(draw_cirr(root / "data", train=1, val=2, test1=1, size=48), "val")
    words = read_vocabulary([t.captions[0] for t in data.triplets])
    for seed, name, frame in ((0, "sum", "sum"), (1, "artemis", "artemis")):
        torch.manual_seed(seed)
        save_checkpoint(
            CaLa(make_backbone("tiny", vocabulary=words, width=32, heads=2, layers=2, seed=seed), cir_frame=frame),
            root / name,
        )
    torch.manual_seed(0)
    backbone = make_backbone("tiny", vocabulary=words, width=32, heads=2, layers=2)
    pairs = CaLa(backbone, objective="two_way", frame_options=dict(scale=10.0))
    save_checkpoint(pairs, root / "run" / "pairs", recipe=dict(dataset="CIRR"))
    for n, path in enumerate(data.gallery.paths):
        folder = root / "photos" / "ab"[n // 6]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / f"{n:02d}.png")
    return root


@pytest.fixture
def photos(made, tmp_path):
    return shutil.copytree(made / "photos", tmp_path / "photos")


@pytest.fixture
def run(made, photos, capsys):
    def run(*words, model="sum"):
        status, words = 0, ["--pictures", photos, "--checkpoint", made / model, "--device", "cpu", *words]
        try:
            run_command(main.__wrapped__, [str(word) for word in words], prog="cala-search")
        except SystemExit as end:
            status = end.code
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def names(out):
    return [hit["name"] for hit in json.loads(out)["hits"]]


def test_as_a_module_it_prints_a_table_on_standard_output_and_the_rest_elsewhere(made, photos):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "cala.scripts.search",
            "--pictures",
            photos,
            "--checkpoint",
            made / "sum",
            *QUESTION,
            "--k",
            "3",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[0].split() == ["rank", "score", "name"] and len(lines) == 4
    assert "12 pictures in" in done.stderr and "12 new" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("model", ["sum", "artemis"])
def test_the_answers_are_those_of_the_model_in_its_order(made, photos, run, model):
    status, out, _ = run(*QUESTION, "--k", "50", "--json", model=model)
    cala, data = search.build_model(ModelFlags(checkpoint=str(made / model))), sorted(p for p in photos.rglob("*.png"))
    transform = cala.backbone.transform("targetpad", 1.25)
    x = torch.stack([transform(Image.open(path).convert("RGB")) for path in data])
    with torch.no_grad():
        scores = cala.frame.scores(*cala.embed_queries(x[:1], ["make the star red"]), cala.embed_gallery(x))[0]
    order = [n for n in scores.argsort(descending=True).tolist() if n != 0]
    assert status == 0 and len(names(out)) == 11 and "a/00.png" not in names(out)  # all but the reference
    found = [hit["score"] for hit in json.loads(out)["hits"]]
    torch.testing.assert_close(torch.tensor(found), scores[order], rtol=1e-3, atol=1e-3)


def test_a_clip_tower_can_be_asked_too(photos, capsys):
    words = [
        "--pictures",
        photos,
        "--clip-model-name",
        "RN50",
        "--random-weights",
        "small",
        *QUESTION,
        "--json",
        "--device",
        "cpu",
    ]
    hits = run_command(main.__wrapped__, [str(word) for word in words], prog="cala-search")
    assert [hit.rank for hit in hits] == list(range(1, 11)) and len(names(capsys.readouterr().out)) == 10


def test_pictures_that_come_change_and_go_are_noticed_and_others_not_embedded_again(photos, run, monkeypatch):
    embedded = []
    real = search.embed_pictures

    def spy(model, pictures, **options):
        embedded.extend(pictures.names)
        return real(model, pictures, **options)

    monkeypatch.setattr(search, "embed_pictures", spy)
    run()
    assert len(embedded) == 12
    embedded.clear()
    shutil.copy(photos / "a/01.png", photos / "b/new.png")
    (photos / "a/02.png").unlink()
    Image.new("RGB", (48, 48), "red").save(photos / "a/03.png")
    os.utime(photos / "a/04.png")
    status, out, err = run(*QUESTION, "--k", "50", "--json")
    assert "1 new, 1 changed, 1 gone" in err and embedded == ["a/03.png", "b/new.png"]
    assert "b/new.png" in names(out) and "a/02.png" not in names(out) and len(names(out)) == 11
    assert "nothing has changed" in run()[2]


def test_a_picture_that_cannot_be_read_is_named_every_time_and_tried_again_when_it_changes(photos, run):
    (photos / "torn.png").write_bytes((photos / "a/01.png").read_bytes()[:60])
    (photos / "empty.jpg").touch()
    (photos / "nowhere.png").symlink_to(photos / "gone.png")
    for _ in range(2):
        status, out, err = run(*QUESTION, "--json")
        assert status == 0 and json.loads(out)["left_out"] == ["empty.jpg", "nowhere.png", "torn.png"]
        assert all(err.count(f"left out: {photos / name}") == 1 for name in json.loads(out)["left_out"])
    shutil.copy(photos / "a/01.png", photos / "torn.png")
    assert json.loads(run(*QUESTION, "--json")[1])["left_out"] == ["empty.jpg", "nowhere.png"]


def test_a_kill_between_two_parts_loses_no_more_than_the_second(made, photos, run, monkeypatch):
    real, write = search.embed_pictures, search.Index.write

    def embed_in_small_parts(*given, **options):
        return real(*given, **options | dict(batch_size=4, part_size=4))

    monkeypatch.setattr(search, "embed_pictures", embed_in_small_parts)

    def stop(index):
        write(index)
        if len(index.parts) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(search.Index, "write", stop)
    assert run()[0] == 130
    monkeypatch.setattr(search.Index, "write", write)
    status, out, err = run(*QUESTION, "--json")
    assert status == 0 and "12 pictures" in err and "4 new" in err
    whole = names(out)
    assert whole == names(run(*QUESTION, "--json", "--index", photos.parent / "other")[1])


def test_an_index_of_other_weights_or_a_damaged_one_is_refused_until_it_is_made_anew(photos, run):
    run()
    status, out, err = run(*QUESTION, model="artemis")
    assert status == 2 and "made with another backbone" in err and "--rebuild" in err
    status, out, err = run(*QUESTION, "--transform", "squarepad")
    assert status == 2 and "made with another transform" in err
    part = next((photos / ".cala_search").glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-1] + b"\x7f")
    status, out, err = run(*QUESTION)
    assert status == 2 and f"{part} is damaged" in err and "Traceback" not in err
    assert run(*QUESTION, "--rebuild")[0] == 0
    for content in (
        "",
        "[]",
        '{"made_by": {}, "parts": {"x": [3]}, "broken": {}}',
        '{"made_by": 1, "parts": 2, "broken": 3}',
    ):
        (photos / ".cala_search/index.json").write_text(content)
        status, out, err = run(*QUESTION)
        assert status == 2 and "index.json is damaged" in err, content


def test_a_part_is_never_looked_for_outside_the_index(photos, run, tmp_path):
    run()
    file = photos / ".cala_search/index.json"
    said = json.loads(file.read_text())
    said["parts"] = {"../../elsewhere.safetensors": next(iter(said["parts"].values()))}
    file.write_text(json.dumps(said))
    assert run(*QUESTION)[0] == 2


@pytest.mark.parametrize("ending", ["png", "svg", "html"])
def test_a_grid_is_a_readable_file_of_its_kind(photos, run, tmp_path, ending):
    odd = photos / "b" / "<i> & ümläut $1 $2.png"
    shutil.copy(photos / "b/07.png", odd)
    path = tmp_path / "new" / f"grid.{ending}"
    assert run(*QUESTION, "--k", "12", "--grid", path)[0] == 0
    if ending == "png":
        assert Image.open(path).width > 500
    elif ending == "svg":
        ElementTree.parse(path)
    else:
        assert path.read_text("utf-8").count("<figure") == 13 and "&lt;i&gt; &amp; ümläut $1 $2.png" in path.read_text(
            "utf-8"
        )


@pytest.mark.parametrize(
    "words, says",
    [
        (["--reference", "a/00.png", "--sentence", " "], "--sentence is empty"),
        (["--reference", "none.png", "--sentence", "red"], "no picture none.png"),
        ([*QUESTION, "--k", "0"], "--k 0"),
        ([*QUESTION, "--grid", "x.pdf"], ".png, .svg or .html"),
        (["--json"], "show answers"),
        ([*QUESTION, "--checkpoint", "nowhere"], "nowhere is no checkpoint"),
        ([*QUESTION, "--pictures", "nowhere"], "no folder nowhere"),
        ([*QUESTION, "--device", "abacus"], "--device abacus"),
        (["--photos", "x"], "unrecognized arguments"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(words, says, run, photos):
    status, out, err = run(*words)
    assert status == 2 and says in err.splitlines()[-1] and "Traceback" not in err


def test_a_folder_without_pictures_and_one_that_holds_only_the_reference(run, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    status, out, err = run("--pictures", tmp_path / "empty", "--reference", photos / "a/00.png", "--sentence", "red")
    assert status == 2 and "no pictures below" in err
    shutil.copy(photos / "a/00.png", tmp_path / "empty")
    status, out, err = run("--pictures", tmp_path / "empty", "--reference", "00.png", "--sentence", "red")
    assert status == 2 and "except the reference" in err


def test_names_that_are_no_text_are_searched_and_shown(run, photos):
    try:
        shutil.copy(photos / "a/01.png", os.fsencode(photos) + b"/\xff.png")
    except OSError:
        pytest.skip("this file system takes text only")
    assert run(*QUESTION, "--k", "50")[0] == 0
    assert "\udcff.png" in names(run(*QUESTION, "--k", "50", "--json")[1])


def test_an_index_that_cannot_be_written_says_what_to_do(run, photos):
    status, out, err = run("--index", photos / "a/00.png")
    assert status == 2 and "is a file" in err and "--index" in err and len(err.splitlines()) == 1


# -- what a folder holds -----------------------------------------------------------------------------------------------


def test_linked_folders_are_searched_and_every_folder_once(run, photos, tmp_path):
    shutil.copytree(photos / "b", tmp_path / "elsewhere")
    (photos / "more").symlink_to(tmp_path / "elsewhere")
    (photos / "a" / "back").symlink_to(photos)
    (photos / "again").symlink_to(photos / "a")
    status, out, err = run("--sentence", "red", "--k", "50", "--json")
    assert status == 0 and "18 pictures" in err
    assert sorted(names(out)) == sorted(f"{folder}/{n:02d}.png" for folder, ns in SHOWN.items() for n in ns)


SHOWN = dict(a=range(6), b=range(6, 12), more=range(6, 12))


def test_a_linked_picture_is_one_picture_and_the_reference_is_left_out_under_every_name(run, photos, tmp_path):
    (photos / "0 favourite.png").symlink_to(photos / "a/00.png")
    os.link(photos / "a/00.png", photos / "b/hard link.png")
    (tmp_path / "desk.png").symlink_to(photos / "a/00.png")
    for reference in ("0 favourite.png", photos / "a/00.png", tmp_path / "desk.png", "b/hard link.png"):
        found = names(run("--reference", reference, "--sentence", "red", "--k", "50", "--json")[1])
        assert len(found) == 11 and not {"0 favourite.png", "a/00.png", "b/hard link.png"} & set(found)


def test_kinds_that_are_not_read_are_counted_and_are_no_broken_pictures(run, photos):
    for name in ("IMG_1.HEIC", "a/IMG_2.heic", "film.mov", "film.mpg", "paper.pdf", "logo.svg"):
        (photos / name).write_bytes(b"content of another kind")
    (photos / "notes.txt").write_text("milk")
    status, out, err = run(*QUESTION, "--json")
    answer = json.loads(out)
    assert status == 0 and answer["left_out"] == []
    assert answer["other_kinds"] == {".heic": 2, ".mov": 1, ".mpg": 1, ".pdf": 1, ".svg": 1}
    assert "2 .heic files, the first is IMG_1.HEIC" in err and "notes.txt" not in err


def test_a_folder_of_other_kinds_only_says_so(run, photos, tmp_path):
    (tmp_path / "only").mkdir()
    (tmp_path / "only/IMG_1.HEIC").write_bytes(b"content of another kind")
    status, out, err = run("--pictures", tmp_path / "only")
    assert status == 2 and "IMG_1.HEIC" in err and "no pictures below" in err.splitlines()[-1]


@pytest.mark.skipif(getattr(os, "geteuid", int)() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_read_is_named(run, photos):
    (photos / "closed").mkdir(mode=0)
    assert f"left out: {photos / 'closed'}" in run()[2]


# -- queries of one part -----------------------------------------------------------------------------------------------


def test_a_picture_alone_finds_its_like_and_a_sentence_alone_what_fits_it(made, photos, run):
    shutil.copy(photos / "a/00.png", photos / "b/copy.png")
    status, out, _ = run("--reference", "a/00.png", "--k", "50", "--json")
    assert status == 0 and names(out)[0] == "b/copy.png" and "a/00.png" not in names(out)
    status, out, _ = run("--sentence", "the star is red", "--k", "50", "--json")
    assert status == 0 and len(names(out)) == 13 and json.loads(out)["reference"] is None
    cala = search.build_model(ModelFlags(checkpoint=str(made / "sum")))
    transform = cala.backbone.transform("targetpad", 1.25)
    paths = [photos / name for name in names(out)]
    with torch.no_grad():
        gallery = cala.embed_gallery(torch.stack([transform(Image.open(path).convert("RGB")) for path in paths]))
        text = cala.backbone.text(["the star is red"]).feature
    scores = 100 * torch.cosine_similarity(text, gallery)
    torch.testing.assert_close(
        torch.tensor([hit["score"] for hit in json.loads(out)["hits"]]), scores, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("ending", ["png", "html"])
@pytest.mark.parametrize("words", [["--reference", "a/00.png"], ["--sentence", "a red star"]])
def test_a_query_of_one_part_has_a_grid(run, tmp_path, ending, words):
    assert run(*words, "--k", "3", "--grid", tmp_path / f"grid.{ending}")[0] == 0
    assert (tmp_path / f"grid.{ending}").stat().st_size > 1000


@pytest.mark.parametrize(
    "name",
    [
        "$x$ and $y.png",
        "{braces} {0} {title}.png",
        "50%(s) %d.png",
        "line\nbreak.png",
        "<b>&amp;.png",
        "$\\frac{1}{.png",
    ],
)
def test_odd_names_are_searched_and_shown(run, photos, tmp_path, name):
    shutil.copy(photos / "a/01.png", photos / name)
    assert name in names(run("--sentence", "red", "--k", "50", "--json")[1])
    for ending in ("png", "html"):
        assert (
            run("--reference", name, "--sentence", "$a$ {b} %d", "--k", "50", "--grid", tmp_path / f"x.{ending}")[0]
            == 0
        )


def test_copies_that_come_one_by_one_are_pictures_of_their_own(run, photos):
    run()
    for name in ("copy.png", "another copy.png"):  # each is a part of its own, with the same feature
        shutil.copy(photos / "a/01.png", photos / name)
        run()
    status, out, err = run("--sentence", "red", "--k", "50", "--json")
    assert "14 pictures" in err and "nothing has changed" in err
    assert {"a/01.png", "copy.png", "another copy.png"} < set(names(out)) and len(names(out)) == 14


def test_a_second_process_that_updates_the_index_is_refused(run, photos):
    run()
    shutil.copy(photos / "a/01.png", photos / "new.png")
    with search.lock_folder(photos / ".cala_search"):
        status, out, err = run(*QUESTION)
    assert status == 2 and "another process is at work" in err.splitlines()[-1]
    assert "1 new" in run(*QUESTION)[2]


# -- the first answers, ranked again -----------------------------------------------------------------------------------

AGAIN = [*QUESTION, "--rerank", "5"]


def test_the_second_ranking_is_that_of_evaluate_again(made, tmp_path, capsys):
    data, model = CIRR(made / "data", "val"), search.build_model(rerank_flags(made))
    data.gallery.transform = model.backbone.transform("targetpad", 1.25)
    expected = evaluate_again(Reranker(model, 6, 3.0), data, progress=False).ranks["rank"]
    first = evaluate_again(Reranker(model, 6, 0.0), data, progress=False).ranks["rank"]
    assert (expected != first).any()
    folder = data.gallery.paths[0].parent
    for i in range(0, len(data), 3):
        triplet = data.triplets[i]
        reference = folder / f"{triplet.reference}.png"
        words = ["--pictures", folder, "--index", tmp_path / "index", "--reference", reference, "--device", "cpu"]
        words += ["--checkpoint", made / "run/pairs", "--sentence", triplet.captions[0], "--k", "50", "--json"]
        words += ["--rerank", 6, "--rerank-weight", 3]
        hits = run_command(main.__wrapped__, [str(word) for word in words], prog="cala-search")
        capsys.readouterr()
        (hit,) = [hit for hit in hits if hit.name == f"{triplet.target}.png"]
        assert (hit.rank, hit.first_rank) == (expected[i], first[i])
        assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
        assert sorted(hit.first_rank for hit in hits[:6]) == list(range(1, 7))
        assert [hit.first_rank for hit in hits[6:]] == list(range(7, len(hits) + 1))
        assert all((hit.score_again is None) == (hit.rank > 6) for hit in hits)


def rerank_flags(made):
    flags = ModelFlags(checkpoint=str(made / "run/pairs"))
    flags.rerank, flags.rerank_weight = 6, 3.0
    return flags


def test_parts_of_an_index_do_not_change_the_second_ranking(run, photos, monkeypatch):
    again = [*AGAIN, "--rerank-weight", "3", "--k", "3", "--json"]
    whole = json.loads(run(*again, model="run/pairs")[1])
    real = search.embed_pictures
    parts = dict(batch_size=5, part_size=5)
    monkeypatch.setattr(search, "embed_pictures", lambda *given, **options: real(*given, **options | parts))
    status, out, err = run(*again, "--rebuild", model="run/pairs")
    assert status == 0 and len(list((photos / ".cala_search").glob("*.safetensors"))) == 3
    assert names(out) == [hit["name"] for hit in whole["hits"]]
    assert (whole["rerank"], whole["rerank_weight"], len(whole["hits"])) == (5, 3.0, 3)


def test_an_index_of_the_first_ranking_serves_the_second_and_the_table_says_so(run):
    run(*QUESTION, model="run/pairs")
    status, out, err = run(*AGAIN, "--rerank-weight", "0.5", "--k", "7", model="run/pairs")
    assert status == 0 and "nothing has changed" in err
    assert out.splitlines()[0].split() == ["rank", "first_rank", "score", "score_again", "name"]
    assert out.splitlines()[-1] == "the best 5 pictures are ranked again by CTR with weight 0.5"
    assert "NaN" not in out


@pytest.mark.parametrize("ending", ["png", "html"])
def test_a_grid_shows_both_ranks(run, tmp_path, ending):
    path = tmp_path / f"grid.{ending}"
    assert run(*AGAIN, "--rerank-weight", "9", "--k", "7", "--grid", path, model="run/pairs")[0] == 0
    if ending == "html":
        page = path.read_text("utf-8")
        assert page.count(", at first ") == 2 * 5 and page.count(", not ranked again ") == 2 * 2  # also in alt


def test_the_weight_comes_from_the_result_of_validation(made, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*AGAIN, model="run/pairs")
    assert status == 2 and "--rerank 5 needs --rerank-weight; cala-validate --checkpoint" in err and out == ""
    assert len(err.splitlines()) == 1
    words = ["--checkpoint", made / "run/pairs", "--data-root", made / "data", "--rerank", "5"]
    run_command(validate, [*map(str, words), "--output", "validation"], prog="cala-validate")
    capsys.readouterr()
    chosen = json.loads((tmp_path / "validation/result.json").read_text())["result"]["rerank_weight"]
    status, out, err = run(*AGAIN, "--json", model="run/pairs")
    assert status == 0 and json.loads(out)["rerank_weight"] == chosen and "chosen by cala-validate" in err
    shutil.copytree(tmp_path / "validation", made / "run/validation")
    monkeypatch.chdir(made)
    assert json.loads(run(*AGAIN, "--json", model="run/pairs")[1])["rerank_weight"] == chosen
    result = made / "run/validation/result.json"
    result.write_text(result.read_text().replace('"sha256": "', '"sha256": "0'))  # of other weights
    assert run(*AGAIN, model="run/pairs")[0] == 2
    shutil.rmtree(made / "run/validation")


@pytest.mark.parametrize(
    ("words", "model", "message"),
    [
        ([*AGAIN, "--rerank-weight", "1"], "sum", "this model has no compositor of pairs; train with --ctr pairs"),
        (["--reference", "a/00.png", "--rerank", "5"], "run/pairs", "give --reference and --sentence"),
        (["--rerank", "5"], "run/pairs", "give --reference and --sentence"),
        ([*QUESTION, "--rerank", "0", "--rerank-weight", "1"], "run/pairs", "--rerank 0: give 1 candidate or more"),
        ([*QUESTION, "--rerank-weight", "1"], "run/pairs", "--rerank-weight belongs to --rerank"),
    ],
)
def test_a_second_ranking_that_is_impossible_is_refused_before_any_work(run, photos, words, model, message):
    status, out, err = run(*words, model=model)
    assert status == 2 and message in err and len(err.splitlines()) == 1 and out == ""
    assert not (photos / ".cala_search").exists()

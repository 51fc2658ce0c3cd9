"A checkpoint as a model of mteb: its vectors, and mteb's own recalls against those of cala-validate."

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cala import draw_cirr, draw_fashioniq
from cala.data import CIRR, FashionIQ, image_transform
from cala.errors import CalaError
from cala.library.checkpoint import read_recipe, save_checkpoint
from cala.library.cli import run_command
from cala.library.mteb_model import MtebModel
from cala.retrieval import embed, rank_queries
from cala.scripts.validate import main as validate
from saved_models import tiny

AT = (1, 5, 10, 50)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    draw_cirr(root, train=1, val=3, test1=1, size=48)
    draw_fashioniq(root, train=4, val=60, test=1, size=48)
    return root


def save_tiny(folder, frame="sum", **recipe):
    "The folder of a checkpoint of a tiny model."
    save_checkpoint(tiny(frame), folder, dict(dataset="CIRR", transform="targetpad", target_ratio=1.25) | recipe)
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    return save_tiny(tmp_path / "best")


def read_queries(data):
    "The reference picture and the text of each query."
    pictures = [data.gallery.picture(position) for position in data.references.tolist()]
    return pictures, [data.caption(i) for i in range(len(data))]


def cut_batches(data, *columns, size=4):
    "The queries of a data set as mteb gives them: dicts with lists of pictures and of texts."
    rows = [dict(image=picture, text=text) for picture, text in zip(*read_queries(data))]
    parts = [rows[first : first + size] for first in range(0, len(rows), size)]
    return [{column: [row[column] for row in part] for column in columns} for part in parts]


def open_val(world, model):
    data = CIRR(world, "val")
    data.gallery.transform = image_transform("targetpad", model.model.backbone.size, 1.25)
    return data


@pytest.mark.parametrize("frame", ["sum", "combiner"])
def test_vectors_are_those_of_cala_embed(world, tmp_path, frame):
    model = MtebModel(save_tiny(tmp_path / "best", frame), device="cpu")
    data = open_val(world, model)
    embedded = embed(model.model, data)
    query = model.model.frame.query(embedded.reference, embedded.text)
    torch.testing.assert_close(model.encode(cut_batches(data, "image", "text"), prompt_type="query"), query)
    text = F.normalize(embedded.text, dim=-1)
    torch.testing.assert_close(model.encode(cut_batches(data, "text")), text)
    pictures = F.normalize(embedded.gallery[data.references], dim=-1)
    torch.testing.assert_close(model.encode(cut_batches(data, "image")), pictures)


def test_the_instruction_of_a_task_is_not_read(checkpoint):
    model = MtebModel(checkpoint, device="cpu")
    with_instruction = dict(text=["make it red Find a picture."], query=["make it red"])
    torch.testing.assert_close(model.encode([with_instruction]), model.encode([dict(text=["make it red"])]))


def test_similarity_is_the_cosine_of_tensors_and_arrays(checkpoint):
    model = MtebModel(checkpoint, device="cpu")
    one, two = torch.randn(3, 8), torch.randn(5, 8)
    cosines = F.cosine_similarity(one[:, None], two[None], dim=-1)
    torch.testing.assert_close(model.similarity(one, two.numpy()), cosines)
    torch.testing.assert_close(model.similarity(one[0], two[0]), cosines[:1, :1])
    torch.testing.assert_close(model.similarity_pairwise(one, two[:3]), cosines.diagonal())


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "I;16"])
def test_pictures_of_every_mode_are_read(checkpoint, mode):
    model = MtebModel(checkpoint, device="cpu")
    picture = Image.linear_gradient("L").convert("RGB" if mode == "I;16" else mode)
    picture = Image.new(mode, (40, 30)) if mode == "I;16" else picture
    assert model.encode([dict(image=[picture])]).isfinite().all()


def test_pictures_are_read_as_the_recipe_says(tmp_path):
    model = MtebModel(save_tiny(tmp_path / "best", transform="squarepad"), device="cpu")
    assert repr(model.transform) == repr(image_transform("squarepad", model.model.backbone.size, 1.25))


def test_a_frame_without_query_vectors_and_another_kind_of_input_are_refused_by_name(tmp_path, checkpoint):
    with pytest.raises(CalaError, match="composes with artemis.*give a model with sum or combiner"):
        MtebModel(save_tiny(tmp_path / "artemis", "artemis"))
    with pytest.raises(CalaError, match="reads pictures and texts, and the task has audio"):
        MtebModel(checkpoint, device="cpu").encode([dict(audio=[0])])


# With mteb ----------------------------------------------------------------------------------------------------------


def make_task(data, category="it2i", top_ranked=None):
    "A retrieval task of mteb on the queries and the gallery of a data set."
    datasets = pytest.importorskip("datasets")
    retrieval = pytest.importorskip("mteb.abstasks.retrieval")
    from mteb.abstasks.task_metadata import TaskMetadata

    facts = TaskMetadata(
        name="DrawnCIR",
        description="Composed queries of a drawn world.",
        dataset=dict(path="none", revision="none"),
        type="Any2AnyRetrieval",
        category=category,
        modalities=["text", "image"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
    )

    class DrawnTask(retrieval.AbsTaskRetrieval):
        metadata = facts
        k_values = AT

        def load_data(self, **_):
            pictures, texts = read_queries(data)
            ids = [query.pair_id for query in data.triplets]
            rows = dict(
                corpus=[dict(id=name, image=data.gallery.picture(i)) for i, name in enumerate(data.gallery.names)],
                queries=[dict(id=i, image=picture, text=text) for i, picture, text in zip(ids, pictures, texts)],
            )
            split: dict = {name: datasets.Dataset.from_list(each) for name, each in rows.items()}
            split["relevant_docs"] = {query.pair_id: {query.target: 1} for query in data.triplets}
            self.dataset = dict(default=dict(test=split | dict(top_ranked=top_ranked)))
            self.data_loaded = True

    return DrawnTask()


def evaluate_with_mteb(model, *arguments, **options):
    "The recalls of a task in percent, in the order of `AT`."
    task = make_task(*arguments, **options)
    mteb = pytest.importorskip("mteb")
    quiet = dict(cache=None, co2_tracker=False, show_progress_bar=False, encode_kwargs=dict(batch_size=5))
    scores = mteb.evaluate(model, task, **quiet).task_results[0].scores["test"][0]
    return [100 * scores[f"recall_at_{k}"] for k in AT]


def run_validate(world, checkpoint, output, *words):
    "The result of cala-validate."
    flags = ["--data-root", world, "--checkpoint", checkpoint, "--device", "cpu", "--output", output, *words]
    return run_command(validate, [str(word) for word in flags], prog="cala-validate")["sum"]


def test_mteb_sees_an_encoder_of_both_modalities(checkpoint):
    pytest.importorskip("mteb")
    from mteb.models.models_protocols import EncoderProtocol

    model = MtebModel(checkpoint, device="cpu")
    meta = model.mteb_model_meta
    assert isinstance(model, EncoderProtocol)
    assert (meta.name, meta.revision) == ("cala/best", read_recipe(checkpoint)["sha256"][:16])
    assert (meta.modalities, meta.embed_dim) == (["image", "text"], 32)
    assert meta.training_datasets == {"CIRRIT2IRetrieval"}


def test_without_the_references_mteb_has_the_recalls_of_cirr(world, checkpoint, tmp_path):
    data, model = CIRR(world, "val"), MtebModel(checkpoint, device="cpu")
    result = run_validate(world, checkpoint, tmp_path / "out")
    names = data.gallery.names
    others = {query.pair_id: [name for name in names if name != query.reference] for query in data.triplets}
    recalls = evaluate_with_mteb(model, data, top_ranked=others)
    assert recalls == pytest.approx([result[f"recall_at{k}"] for k in AT], abs=0.01)
    group = {query.pair_id: [name for name in query.group if name != query.reference] for query in data.triplets}
    assert evaluate_with_mteb(model, data, top_ranked=group)[0] == pytest.approx(result["group_recall_at1"], abs=0.01)


@pytest.mark.parametrize("part", ["it2i", "t2i", "i2i"])
def test_with_the_references_mteb_has_the_recalls_of_ranks_that_count_them(world, checkpoint, part):
    model = MtebModel(checkpoint, device="cpu")
    data = open_val(world, model)
    embedded = embed(model.model, data)
    reference, text = embedded.reference, embedded.text
    if part == "t2i":
        reference = torch.zeros_like(reference)
    if part == "i2i":
        reference, text = embedded.gallery[data.references], torch.zeros_like(text)
    ranks = rank_queries(model.model.frame, reference, text, embedded.gallery, data.targets).rank
    expected = [100 * float((ranks <= k).double().mean()) for k in AT]
    assert evaluate_with_mteb(model, data, part) == pytest.approx(expected, abs=0.01)


def test_mteb_has_the_recalls_of_fashioniq_whose_gallery_keeps_the_reference(world, checkpoint, tmp_path):
    words = ["--dataset", "FashionIQ", "--categories", "dress"]
    result = run_validate(world, checkpoint, tmp_path / "out", *words)
    recalls = dict(zip(AT, evaluate_with_mteb(MtebModel(checkpoint, device="cpu"), FashionIQ(world, "val", "dress"))))
    assert [recalls[10], recalls[50]] == pytest.approx([result["recall_at10"], result["recall_at50"]], abs=0.01)

"The benchmark: equal maths at every level, a form of JSON that does not change, and parts that can be asked for alone."
import json
from pathlib import Path

import pandas as pd
import pytest
import torch

import cala.scripts.benchmark
from cala.errors import CalaError
from cala.library.cli import run_command
from cala.scripts.benchmark import PARTS
from cala.scripts.benchmark import Benchmark
from cala.scripts.benchmark import apart
from cala.scripts.benchmark import artemis_loop
from cala.scripts.benchmark import compared
from cala.scripts.benchmark import draw_apart
from cala.scripts.benchmark import levels
from cala.scripts.benchmark import main
from cala.scripts.benchmark import make_benchmark_model
from cala.scripts.benchmark import measure_epoch
from cala.scripts.benchmark import measure_ranking
from cala.scripts.benchmark import measure_steps
from cala.scripts.benchmark import open_world
from cala.scripts.benchmark import ranking_problem

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench(): return Benchmark(device="cpu", repeats=1)


@pytest.fixture(scope="module")
def model(bench): return make_benchmark_model(bench, CPU)


@pytest.fixture(scope="module")
def data(bench, model, tmp_path_factory): return open_world(bench, model, tmp_path_factory.mktemp("world"))


def first_and_others(bench, model, data, folder, mode):
    "{level: Compared}, the released layout first."
    model.backbone.fine_tune(mode)
    found = {}
    for name, (layout, fetch) in levels(bench, model, data, folder).items():
        with layout(model): found[name] = compared(bench, model, fetch, CPU)
    return found


@pytest.mark.parametrize("mode, names", [("both", ["released", "shared trunk", "cached tokens"]), ("multi", ["released", "shared trunk", "cached tokens", "cached targets"]),
                                         ("text", ["released", "shared trunk", "cached tokens", "cached targets"])])
def test_each_level_has_the_released_layouts_loss_and_gradients_and_less_to_do(bench, model, data, tmp_path, mode, names):
    found = first_and_others(bench, model, data, tmp_path, mode)
    assert list(found) == names
    first = before = found["released"]
    for name in names[1:]:
        other = found[name]
        assert other.loss == pytest.approx(first.loss, abs=1e-4) and other.gradients.keys() == first.gradients.keys() and apart(other.gradients, first.gradients) < 1e-3
        assert other.flops < before.flops
        before = other
    trunks = [found[name].trunk for name in names]                                         # three pictures a triplet, two, none
    assert trunks[0] * 2 == trunks[1] * 3 > 0 and not any(trunks[2:]) and first.flops - first.trunk > 0


@pytest.mark.parametrize("spoil", ["visual", "multimodal", "textual"])
def test_the_comparison_sees_a_wrong_role(bench, model, data, tmp_path, spoil):
    roles = ["visual", "multimodal", "textual"]
    loss = first_and_others(bench, model, data, tmp_path, "both")["shared trunk"].loss
    right, wrong = (getattr(model.backbone, role) for role in (spoil, roles[roles.index(spoil) - 1]))
    try:
        setattr(model.backbone, spoil, wrong)
        assert abs(compared(bench, model, levels(bench, model, data, tmp_path)["shared trunk"][1], CPU).loss - loss) > 1e-2
    finally: setattr(model.backbone, spoil, right)


def test_the_model_is_left_as_it_was(bench, model, data, tmp_path):
    before = {name: p.clone() for name, p in model.state_dict().items()}
    fast = torch.backends.mha.get_fastpath_enabled()
    first_and_others(bench, model, data, tmp_path, "multi")
    assert "embed" not in vars(model) and torch.backends.mha.get_fastpath_enabled() == fast
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(p.requires_grad for p in model.backbone.multimodal.ln_vision.parameters())


def test_equal_seeds_draw_equal_weights(bench, model):
    other = make_benchmark_model(bench, CPU)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    draw_apart(other, 1)
    assert not torch.equal(model.backbone.visual.Qformer.bert.encoder.layer[0].attention.self.query.weight, other.backbone.visual.Qformer.bert.encoder.layer[0].attention.self.query.weight)


def test_the_table_says_how_far_gradients_are_and_sees_one_that_is_wrong(bench, model, data, tmp_path, monkeypatch):
    once = Benchmark(device="cpu", repeats=1, modes="multi")
    assert measure_steps(once, model, data, tmp_path, CPU).gradients.max() < 1e-3
    true = cala.scripts.benchmark.step
    def wrong(bench, model, fetch, device):
        loss = true(bench, model, fetch, device)
        if "embed" not in vars(model): model.backbone.multimodal.query_tokens.grad.mul_(1.01)  # everywhere but in the released layout
        return loss
    monkeypatch.setattr("cala.scripts.benchmark.step", wrong)
    assert measure_steps(once, model, data, tmp_path, CPU).gradients.tolist() == pytest.approx([0, .01, .01, .01], abs=1e-3)
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("mode", ["both", "multi"])
def test_an_epoch_sees_every_triplet_and_both_layouts_have_equal_recalls(model, tmp_path, monkeypatch, mode):
    seen, true = [], cala.scripts.benchmark.step
    def watched(bench, model, fetch, device):
        batch = fetch()
        seen.append(("embed" in vars(model), len(batch.captions), type(batch.target).__name__))
        return true(bench, model, lambda: batch, device)
    monkeypatch.setattr("cala.scripts.benchmark.step", watched)
    row, = measure_epoch(Benchmark(device="cpu", triplets=30, batch_size=8, modes=mode), model, tmp_path, CPU).to_dict("records")
    for released, kind in ((True, "Tensor"), (False, "Tensor" if mode == "both" else "Embedding")):
        sizes = [size for layout, size, what in seen if layout == released and what == kind]
        assert sizes == [8, 8, 8, 8, 6]                                                    # one to warm up, then all 30
    assert row["recalls"] == 0 and row["triplets"] == 30 and row["ratio"] == pytest.approx((row["released_training"] + row["released_validation"]) / (row["ours_training"] + row["ours_validation"]))


def test_ranking_by_names_and_by_counting_have_equal_recalls(bench):
    found = measure_ranking(bench, CPU)
    assert found["equal"] and found["ratio"] > 1


def test_the_loop_over_artemis_is_its_definition(bench):
    from cala.composition import Artemis
    p = ranking_problem(bench, CPU)
    torch.manual_seed(0)
    frame, (r, t, g) = Artemis(64), (p[key][:5] for key in ("reference", "text", "gallery"))
    with torch.no_grad():
        scores, unit = artemis_loop(frame, r, t, g), lambda x: x / x.norm()
        e, i = frame.explicit(t).softmax(-1), frame.implicit(t).softmax(-1)
        expected = [[unit(frame.transform(t)[q]) @ unit(e[q] * x) + unit(i[q] * r[q]) @ unit(i[q] * x) for x in g] for q in range(5)]
    assert torch.allclose(scores, torch.tensor(expected), atol=1e-5)


def test_the_command_prints_a_table_and_writes_json_of_the_agreed_form(tmp_path, capsys):
    words = ["--device", "cpu", "--repeats", "1", "--batch-size", "2", "--output", str(tmp_path / "out")]
    run_command(main, words, prog="benchmark")
    said, printed = json.loads((tmp_path / "out" / "benchmark.json").read_text()), capsys.readouterr().out
    assert list(said) == ["device", "versions", "command", "levels", "ranking", "artemis"]
    assert said["command"] == f"python -m cala.scripts.benchmark --batch-size 2 --device cpu --repeats 1 --output {tmp_path / 'out'}"
    assert [(row["mode"], row["level"]) for row in said["levels"]] == [("both", "released"), ("both", "shared trunk"), ("both", "cached tokens"), ("multi", "released"),
                                                                       ("multi", "shared trunk"), ("multi", "cached tokens"), ("multi", "cached targets")]
    for row in said["levels"]:
        first = next(other for other in said["levels"] if other["mode"] == row["mode"])
        assert list(row) == ["mode", "level", "seconds", "loss", "ratio"] and row["ratio"] == pytest.approx(first["seconds"] / row["seconds"])
        assert row["loss"] == pytest.approx(first["loss"], abs=1e-4)
    assert list(said["ranking"]) == list(said["artemis"]) == ["ratio"]
    for word in ("recalls equal", "a picture:", "AdamW", "peak of the device", "ARTEMIS"): assert word in printed
    assert (tmp_path / "out" / "benchmark.png").stat().st_size > 5000 and (tmp_path / "out" / "benchmark.csv").read_text().count("\n") == 8


def test_a_part_can_be_asked_for_alone(tmp_path):
    main(Benchmark(device="cpu", repeats=1, only="ranking", output=str(tmp_path)))
    said = json.loads((tmp_path / "benchmark.json").read_text())
    assert said["levels"] == [] and "artemis" not in said and said["ranking"]["ratio"] > 0


def test_an_epoch_is_measured_when_it_is_named(tmp_path, capsys):
    main(Benchmark(device="cpu", repeats=1, only="epoch", modes="multi", triplets=10, output=str(tmp_path)))
    printed = capsys.readouterr().out
    assert "an epoch of 10 triplets with --encoder multi" in printed and "recalls within 0;" in printed and "caches built in" in printed


def test_the_words_for_a_gpu_run_on_a_cpu_at_reduced_shapes(tmp_path, capsys):
    "The twin of the notebook's cell for a graphics card: bf16 trunk and autocast, every part, whole epochs."
    notebook = json.loads((Path(__file__).parent.parent / "nbs/27_benchmark.ipynb").read_text())
    line, = (line for cell in notebook["cells"] if cell["source"][:1] == ["#| cuda\n"] for line in cell["source"] if line.startswith("main("))
    words = dict(size="small", batch_size=4, device="cpu", repeats=1, triplets=10, output=str(tmp_path))
    wanted = eval(line.rstrip(";").replace("main(", "dict(bench=").replace("Benchmark(", "dict("), dict(PARTS=PARTS))["bench"]
    main(Benchmark(**wanted | words))
    printed = capsys.readouterr().out
    for word in ("cached targets", "of peak", "recalls equal", "ARTEMIS", "a picture:", "an epoch of 10 triplets with --encoder both", "an epoch of 10 triplets with --encoder multi"): assert word in printed
    for mode, rows in pd.read_csv(tmp_path / "benchmark.csv").groupby("mode"): assert rows.loss.max() - rows.loss.min() < .05 * rows.loss.max(), mode  # half precision rounds


def test_the_committed_figures_have_the_agreed_form_and_are_those_that_readme_cites():
    root = Path(__file__).parent.parent
    said = json.loads((root / "nbs/images/benchmark.json").read_text())
    assert list(said) == ["device", "versions", "command", "levels", "ranking", "artemis"] and said["command"].startswith("python -m cala.scripts.benchmark --size full")
    assert list(said["ranking"]) == list(said["artemis"]) == ["ratio"] and all(list(row) == ["mode", "level", "seconds", "loss", "ratio"] for row in said["levels"])
    readme = (root / "README.md").read_text()
    assert said["command"] in readme and said["device"] in readme
    for row in said["levels"]:
        first = next(other for other in said["levels"] if other["mode"] == row["mode"])
        assert row["loss"] == pytest.approx(first["loss"], abs=1e-4) and row["ratio"] == pytest.approx(first["seconds"] / row["seconds"])
        assert f"| {row['mode']} | {row['level']} | {row['seconds']:.2f} | {row['ratio']:.2f} |" in readme
    assert f"{said['ranking']['ratio']:.1f} times" in readme and f"{said['artemis']['ratio']:.1f} times" in readme


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for wrong, said in ((dict(size="huge"), "--size huge: choose one of small, full"), (dict(modes="none"), "--modes none"), (dict(repeats=0), "--repeats 0"), (dict(precision="fp8"), "--precision fp8")):
        with pytest.raises(CalaError, match=said): Benchmark(**wrong)
    with pytest.raises(CalaError, match="is a file; choose another --output"): main(Benchmark(output=str(tmp_path / "file")))
    monkeypatch.setattr("cala.scripts.benchmark.psutil.virtual_memory", lambda: type("", (), dict(available=1e9)))
    with pytest.raises(CalaError, match="--size full needs 12 GB of memory, 1.0 GB are free"): make_benchmark_model(Benchmark(size="full"), CPU)

"The benchmark: equal results at every level, JSON of a fixed form, and parts that can be measured alone."

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from cala.composition import Artemis
from cala.errors import CalaError
from cala.library import benchmark, gpu
from cala.library.benchmark import (
    draw_batch_world,
    draw_ranking,
    examine_step,
    gradient_difference,
    make_benchmark_model,
    make_levels,
    measure_epoch,
    measure_ranking,
    measure_steps,
    redraw_linear_layers,
    score_by_loop,
)
from cala.library.cli import run_command
from cala.library.flags import Benchmark
from cala.scripts.benchmark import main

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
LEVELS = ["released", "shared trunk", "cached tokens", "cached targets"]
KEYS = ["device", "versions", "command", "levels", "ranking", "artemis"]
REST = ["gradients", "GFLOP/triplet", "in", "trunks", "memory"]
LEVEL_KEYS = ["mode", "level", "seconds", "loss", "ratio"]


@pytest.fixture(scope="module")
def bench():
    return Benchmark(device="cpu", repeats=1)


@pytest.fixture(scope="module")
def model(bench):
    return make_benchmark_model(bench, CPU)


@pytest.fixture(scope="module")
def data(bench, model, tmp_path_factory):
    return draw_batch_world(bench, model, tmp_path_factory.mktemp("world"))


def examine_levels(bench, model, data, folder, mode):
    "A result for each level, the released layout first."
    model.backbone.fine_tune(mode)
    results = {}
    for level in make_levels(bench, model, data, folder):
        with level.layout(model):
            results[level.name] = examine_step(bench, model, level.fetch, CPU)
    return results


@pytest.mark.parametrize("mode, names", [("both", LEVELS[:3]), ("multi", LEVELS), ("text", LEVELS)])
def test_each_level_has_the_released_loss_and_gradients_and_less_to_do(bench, model, data, tmp_path, mode, names):
    results = examine_levels(bench, model, data, tmp_path, mode)
    assert list(results) == names
    released = before = results["released"]
    for name in names[1:]:
        result = results[name]
        assert result.loss == pytest.approx(released.loss, abs=1e-4)
        assert result.gradients.keys() == released.gradients.keys()
        assert gradient_difference(result.gradients, released.gradients) < 1e-3
        assert result.flops < before.flops
        before = result
    trunks = [result.trunk_flops for result in results.values()]
    assert trunks[0] * 2 == trunks[1] * 3 > 0  # three pictures a triplet, and two
    assert not any(trunks[2:])
    assert released.flops > released.trunk_flops


@pytest.mark.parametrize("spoilt", ["visual", "multimodal", "textual"])
def test_the_comparison_sees_a_wrong_role(bench, model, data, tmp_path, spoilt):
    roles = ["visual", "multimodal", "textual"]
    loss = examine_levels(bench, model, data, tmp_path, "both")["shared trunk"].loss
    right = getattr(model.backbone, spoilt)
    wrong = getattr(model.backbone, roles[roles.index(spoilt) - 1])
    try:
        setattr(model.backbone, spoilt, wrong)
        shared_trunk = make_levels(bench, model, data, tmp_path)[1]
        assert abs(examine_step(bench, model, shared_trunk.fetch, CPU).loss - loss) > 1e-2
    finally:
        setattr(model.backbone, spoilt, right)


def test_the_model_is_left_as_it_was(bench, model, data, tmp_path):
    before = {name: p.clone() for name, p in model.state_dict().items()}
    was_fused = torch.backends.mha.get_fastpath_enabled()
    examine_levels(bench, model, data, tmp_path, "multi")
    assert "encode" not in vars(model)
    assert torch.backends.mha.get_fastpath_enabled() == was_fused
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(p.requires_grad for p in model.backbone.multimodal.ln_vision.parameters())


def read_query_weight(model):
    return model.backbone.visual.Qformer.bert.encoder.layer[0].attention.self.query.weight


def test_equal_seeds_draw_equal_weights(bench, model):
    other = make_benchmark_model(bench, CPU)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    redraw_linear_layers(other, 1)
    assert not torch.equal(read_query_weight(model), read_query_weight(other))


def test_the_table_has_the_difference_of_gradients_and_sees_a_wrong_one(bench, model, data, tmp_path, monkeypatch):
    once = Benchmark(device="cpu", repeats=1, modes="multi")
    assert measure_steps(once, model, data, tmp_path, CPU).gradients.max() < 1e-3
    run_step = benchmark.run_step

    def run_wrong_step(bench, model, batch, device):
        loss = run_step(bench, model, batch, device)
        if "encode" not in vars(model):  # everywhere but in the released layout
            model.backbone.multimodal.query_tokens.grad.mul_(1.01)
        return loss

    monkeypatch.setattr(benchmark, "run_step", run_wrong_step)
    differences = measure_steps(once, model, data, tmp_path, CPU).gradients.tolist()
    assert differences == pytest.approx([0, 0.01, 0.01, 0.01], abs=1e-3)
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("mode", ["both", "multi"])
def test_an_epoch_reads_every_triplet_and_both_layouts_have_equal_recalls(model, tmp_path, monkeypatch, mode):
    steps, run_step = [], benchmark.run_step

    def watch_step(bench, model, batch, device):
        steps.append(("encode" in vars(model), type(batch.target).__name__, len(batch.captions)))
        return run_step(bench, model, batch, device)

    monkeypatch.setattr(benchmark, "run_step", watch_step)
    bench = Benchmark(device="cpu", triplets=30, batch_size=8, modes=mode)
    (row,) = measure_epoch(bench, model, tmp_path, CPU).to_dict("records")
    ours = "Tensor" if mode == "both" else "Embedding"
    sizes = [8, 8, 8, 8, 6]  # one batch to warm up, then all 30 triplets
    assert steps == [(True, "Tensor", size) for size in sizes] + [(False, ours, size) for size in sizes]
    assert row["recalls"] == 0
    assert row["triplets"] == 30
    released_seconds = row["released_training"] + row["released_validation"]
    assert row["ratio"] == pytest.approx(released_seconds / (row["ours_training"] + row["ours_validation"]))


def test_ranking_by_names_and_by_counting_have_equal_recalls(bench):
    result = measure_ranking(bench, CPU)
    assert result["are_equal"]
    assert result["ratio"] > 1


def test_the_loop_over_artemis_is_its_definition(bench):
    problem = draw_ranking(bench, CPU)
    torch.manual_seed(0)
    frame = Artemis(64)
    r, t, g = problem.reference[:5], problem.text[:5], problem.gallery[:5]
    expected = torch.empty(5, 5)
    with torch.no_grad():
        scores = score_by_loop(frame, r, t, g)
        explicit, implicit = frame.explicit(t).softmax(-1), frame.implicit(t).softmax(-1)
        for q in range(5):
            for n in range(5):
                e, i = explicit[q], implicit[q]
                expected[q, n] = F.cosine_similarity(frame.transform(t)[q], e * g[n], dim=0)
                expected[q, n] += F.cosine_similarity(i * r[q], i * g[n], dim=0)
    assert torch.allclose(scores, expected, atol=1e-5)


def check_levels(rows):
    "Keys, ratios and losses of the levels in JSON."
    for row in rows:
        released = next(other for other in rows if other["mode"] == row["mode"])
        assert list(row) == LEVEL_KEYS
        assert row["ratio"] == pytest.approx(released["seconds"] / row["seconds"])
        assert row["loss"] == pytest.approx(released["loss"], abs=1e-4)


def test_the_command_prints_a_table_and_writes_json_of_the_agreed_form(tmp_path, capsys):
    words = ["--device", "cpu", "--repeats", "1", "--batch-size", "2", "--output", str(tmp_path / "out")]
    run_command(main, words, prog="benchmark")
    summary, printed = json.loads((tmp_path / "out" / "benchmark.json").read_text()), capsys.readouterr().out
    assert list(summary) == KEYS
    command = "python -m cala.scripts.benchmark --batch-size 2 --device cpu --repeats 1 --output"
    assert summary["command"] == f"{command} {tmp_path / 'out'}"
    expected = [("both", level) for level in LEVELS[:3]] + [("multi", level) for level in LEVELS]
    assert [(row["mode"], row["level"]) for row in summary["levels"]] == expected
    check_levels(summary["levels"])
    assert list(summary["ranking"]) == list(summary["artemis"]) == ["ratio"]
    for word in (
        "recalls equal",
        "what one process reads:",
        "AdamW",
        "ARTEMIS",
        "reduced shapes: the report has no speed-ups",
    ):
        assert word in printed
    assert "of peak" not in printed
    assert ", speed-up" not in printed
    assert (tmp_path / "out" / "benchmark.png").stat().st_size > 5000
    assert (tmp_path / "out" / "benchmark.csv").read_text().count("\n") == 8


def test_at_full_size_speed_ups_and_shares_of_limits_are_printed():
    steps = dict(mode="both", level="released", seconds=2.0, ratio=1.5, loss=1.0, gradients=0.0, flops=10**12, trunk=0)
    memory = dict(released_memory=1e9, memory=1e9)
    results = dict(
        about=dict(device="cpu", versions=dict(torch="2"), command="benchmark"),
        limits=benchmark.Limits(flops=1e12, flops32=5e11, bandwidth=1e10),
        steps=pd.DataFrame([steps | dict(memory=10**9)]),
        optimizer=dict(default=2.0, fused=1.0, bytes=7.5e9),
        ranking=dict(released=2.0, ours=1.0, ratio=2.0, product=0.8, are_equal=True) | memory,
        artemis=dict(released=3.0, ours=1.0, ratio=3.0, difference=1e-7, batch_size=256, batch_ratio=4.0, flops=1e11),
        loading=pd.DataFrame([{"read": "tokens", "bytes": 1e6, "per second": 1000.0}]),
    )
    report = benchmark.describe_results(Benchmark(size="full"), results)
    assert report.splitlines()[1].split() == "mode level seconds speed-up of peak loss".split() + REST
    assert "1.50     50%" in report
    assert "limits: 1 TFLOP/s, 10 GB/s" in report
    assert "fused 1.000 s, 75% of the bandwidth" in report
    assert "speed-up 2.0, 80% of the speed of the matrix product alone" in report
    assert "speed-up 3.0, of a training batch of 256 4.0, 20% of peak" in report
    assert "10.0%" in report.splitlines()[-1]


def test_a_dry_run_of_the_gpu_mode_goes_on_after_a_failed_part(tmp_path, monkeypatch, capsys):
    def fail(bench, seconds):
        "Fail."
        raise RuntimeError("no luck")

    monkeypatch.setitem(gpu.PARTS, "tests", fail)
    run_command(main, ["--gpu", "--dry", "--output", str(tmp_path)], prog="benchmark")
    results, printed = json.loads((tmp_path / "gpu.json").read_text()), capsys.readouterr().out
    assert list(results) == ["device", "versions", "command", "limits", "parts"]
    states = dict(tests="failed", step="done", trunk="done", ranking="done", epoch="done")
    assert {name: part["state"] for name, part in results["parts"].items()} == states
    assert "RuntimeError: no luck" in results["parts"]["tests"]["note"]
    rows = {row["name"]: row for part in results["parts"].values() for row in part["rows"]}
    assert len([name for name in rows if name.startswith("kernel")]) == 10
    for name in ("step, multi, cached targets", "trunk of clip RN50x4", "epoch of CIRR, extrapolated, multi, ours"):
        assert rows[name]["of limit"].endswith("%")
        assert name in printed
    assert "of limit" not in printed  # at reduced shapes it means nothing


def test_the_gpu_mode_stops_in_time_and_needs_a_gpu(tmp_path, monkeypatch):
    assert gpu.run_part(gpu.run_tests, None, seconds=3)["state"] == "left out"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CalaError, match="--gpu: torch finds no GPU here; --gpu --dry"):
        main(Benchmark(gpu=True, output=str(tmp_path)))
    with pytest.raises(CalaError, match="--dry belongs to --gpu"):
        Benchmark(dry=True)


def test_the_tests_of_the_gpu_mode_are_counted_and_failures_are_named(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    file = tmp_path / "tests/test_gpu.py"
    file.write_text("import pytest\npytestmark = pytest.mark.gpu\ndef test_right(): pass\ndef test_wrong(): assert 0\n")
    monkeypatch.setattr(gpu, "TESTS", file)
    rows = gpu.run_tests(gpu.Bench(Benchmark(), CPU, None, tmp_path), 60)
    assert rows[0]["value"] == "2 tests, 1 failures, 0 errors, 0 skipped"
    assert rows[1] == dict(name="failed", value="test_wrong")


def test_a_part_can_be_measured_alone(tmp_path):
    main(Benchmark(device="cpu", repeats=1, only="ranking", output=str(tmp_path)))
    summary = json.loads((tmp_path / "benchmark.json").read_text())
    assert summary["levels"] == []
    assert "artemis" not in summary
    assert summary["ranking"]["ratio"] > 0


def test_the_evaluation_on_circo_is_measured_when_it_is_named(tmp_path, capsys):
    main(Benchmark(device="cpu", repeats=1, only="circo", output=str(tmp_path)))
    assert (
        "80 queries in 12,340 pictures" in (printed := capsys.readouterr().out) and "equal to the official" in printed
    )
    part = json.loads((tmp_path / "benchmark.json").read_text())["circo"]
    assert part["are_equal"] and part["map_at10"] > 1
    assert min(part["reading"], part["evaluation"], part["product"], part["memory"]) > 0


def test_an_epoch_is_measured_when_it_is_named(tmp_path, capsys):
    main(Benchmark(device="cpu", repeats=1, only="epoch", modes="multi", triplets=10, output=str(tmp_path)))
    printed = capsys.readouterr().out
    assert "an epoch of 10 triplets with --encoder multi" in printed
    assert "recalls within 0;" in printed
    assert "caches built in" in printed


def test_the_committed_results_have_the_agreed_form_and_are_those_that_readme_and_lesson_cite():
    summary = json.loads((ROOT / "nbs/images/benchmark.json").read_text())
    assert list(summary) == KEYS
    assert summary["command"].startswith("python -m cala.scripts.benchmark --size full")
    assert list(summary["ranking"]) == list(summary["artemis"]) == ["ratio"]
    check_levels(summary["levels"])
    readme = (ROOT / "README.md").read_text()
    assert summary["command"] in readme
    assert summary["device"] == "cpu: Intel(R) Xeon(R) Processor, 1 threads"
    assert "Intel Xeon with one thread" in " ".join(readme.split())
    for row in summary["levels"]:
        assert f"| {row['mode']} | {row['level']} | {row['seconds']:.2f} | {row['ratio']:.2f} |" in readme
    assert f"{summary['ranking']['ratio']:.1f} times as long" in readme
    lesson = (ROOT / "nbs/library/benchmark.ipynb").read_text()
    for part in ("ranking", "artemis"):
        assert f", speed-up {summary[part]['ratio']:.1f}, " in lesson


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    mistakes = {
        "--size huge: choose one of small, full": dict(size="huge"),
        "--modes none": dict(modes="none"),
        "--repeats 0": dict(repeats=0),
        "--precision fp8": dict(precision="fp8"),
    }
    for message, flags in mistakes.items():
        with pytest.raises(CalaError, match=message):
            Benchmark(**flags)
    with pytest.raises(CalaError, match="is a file; choose another --output"):
        main(Benchmark(output=str(tmp_path / "file")))

    class Memory:
        available = 1e9

    monkeypatch.setattr(benchmark.psutil, "virtual_memory", lambda: Memory)
    with pytest.raises(CalaError, match="--size full needs 12 GB of memory, 1.0 GB are free"):
        make_benchmark_model(Benchmark(size="full"), CPU)

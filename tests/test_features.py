"The cache: never wrong, whatever happened to trunk, transform, pictures, files or the process that built it; and constant targets, and what `auto` decides."

import json
import multiprocessing
import os
import pickle
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import distributed
from torch import nn
from torch.utils.data import DataLoader

import cala.library.cache.policy
import cala.library.cache.build
import cala.library.cache.files
from cala.errors import CalaError
from cala.data import CIRR
from cala.data import Gallery
from cala.data import collate
from cala.data import image_transform
from cala.encoders import make_backbone
from cala.library.cache.targets import TargetSide
from cala.library.cache.build import TokenCache
from cala.library.cache.build import build_tokens
from cala.library.cache.targets import cache_targets
from cala.library.cache.build import cache_tokens
from cala.library.cache.policy import choose
from cala.library.cache.build import estimate
from cala.library.cache.files import fingerprint
from cala.library.cache.build import open_tokens
from cala.library.cache.build import use_cache
from cala.library.cache.policy import use_caches
from cala.library.cache.build import Estimate
from cala.library.cache.build import Plan
from cala.model import CaLa
from cala.retrieval import evaluate
from cala.recipe import Recipe
from cala.library.run import train
from cala.library.worlds.scenes import draw_cirr
from small_runs import train_flags, world
from cala.library.cli import parse_flags

PICTURES, SHARD = 40, 8


@pytest.fixture(autouse=True)
def small_files(monkeypatch): monkeypatch.setattr(cala.library.cache.files, "SHARD", SHARD)


class Trunk(nn.Module):
    "(B, 3, 16, 16) -> (B, 16, 8); `pause` makes it as slow as a real one."
    def __init__(self, pause=0.):
        super().__init__()
        with torch.random.fork_rng(): torch.manual_seed(0); self.convolution = nn.Conv2d(3, 8, 4, 4)
        self.pause = pause

    def forward(self, pictures):
        time.sleep(self.pause)
        return self.convolution(pictures).flatten(2).transpose(1, 2)


def make_gallery(folder, kind="targetpad"):
    paths = sorted(Path(folder).glob("*.png"))
    return Gallery([p.stem for p in paths], paths, image_transform(kind, 16))


@pytest.fixture
def gallery(tmp_path):
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(PICTURES): Image.fromarray(rng.integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(tmp_path / "pictures" / f"{i:03}.png")
    return make_gallery(tmp_path / "pictures")


def direct(trunk, gallery):
    with torch.no_grad(): return trunk(torch.stack([gallery[i] for i in range(len(gallery))]))


def quietly(*args, **options): return cache_tokens(*args, report=None, **options)


def files_of(cache): return sorted(cache.place.glob("*.safetensors"))


def test_cached_tokens_are_those_of_the_trunk(gallery, tmp_path):
    cache = quietly(Trunk(), gallery, tmp_path / "cache", batch_size=3)
    assert cache.shape == (PICTURES, 16, 8) and cache.bytes == PICTURES * 16 * 8 * 4 and len(files_of(cache)) == PICTURES // SHARD
    assert torch.allclose(cache[:], direct(Trunk(), gallery), atol=1e-6)
    assert torch.equal(cache[torch.tensor([39, 1])], torch.stack([cache[39], cache[1]])) and cache[3].dtype == torch.float32


def test_half_precision_halves_the_size_and_rounds(gallery, tmp_path):
    half, full = (quietly(Trunk(), gallery, tmp_path / "cache", dtype=d) for d in ("float16", "float32"))
    assert half.bytes * 2 == full.bytes and half[0].dtype == torch.float16
    assert torch.equal(half[:], full[:].half())


def test_what_is_read_is_a_copy(gallery, tmp_path):
    cache = quietly(Trunk(), gallery, tmp_path / "cache")
    cache[3].zero_()
    assert torch.allclose(cache[3], direct(Trunk(), gallery)[3], atol=1e-6)


def forked(work, *args):
    "A child as loader workers are: nothing is imported again."
    child = multiprocessing.get_context("fork").Process(target=work, args=args, daemon=True)
    child.start()
    return child


def slowly(pictures, folder): quietly(Trunk(pause=.1), make_gallery(pictures), folder, batch_size=1)


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_cache_built_in_two_runs_with_a_kill_between_equals_one_built_at_once(gallery, tmp_path):
    folder = tmp_path / "killed"
    child = forked(slowly, tmp_path / "pictures", folder)
    deadline = time.time() + 120
    written = lambda: len(list(folder.rglob("*.safetensors")))
    while written() < 2 and time.time() < deadline and child.is_alive(): time.sleep(.01)
    child.kill(); child.join()
    assert child.exitcode == -signal.SIGKILL and 2 <= written() < PICTURES // SHARD
    before = {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    with pytest.raises(CalaError, match="is not finished"): open_tokens(Trunk(), gallery, folder)
    seen = []
    killed = cache_tokens(Trunk(), gallery, folder, report=seen.append)
    assert f"; {PICTURES - SHARD * len(before)} to do" in seen[0]
    at_once = quietly(Trunk(), gallery, tmp_path / "at_once", batch_size=1)
    killed.verify()
    assert torch.allclose(killed[:], at_once[:], atol=1e-6)
    assert {name: (killed.place / name).stat().st_mtime_ns for name in before} == before        # what was done before the kill was not computed again


def test_a_second_call_computes_nothing(gallery, tmp_path):
    class Once(Trunk):
        calls = 0
        def forward(self, pictures): type(self).calls += 1; return super().forward(pictures)
    trunk = Once()
    quietly(trunk, gallery, tmp_path / "cache")
    calls = Once.calls
    quietly(trunk, gallery, tmp_path / "cache")
    assert Once.calls == calls


def test_another_weight_transform_format_or_list_of_pictures_is_another_cache(gallery, tmp_path):
    folder, trunk, other = tmp_path / "cache", Trunk(), Trunk()
    quietly(trunk, gallery, folder)
    with torch.no_grad(): other.convolution.weight[0, 0, 0, 0] += 1e-7
    assert fingerprint(other) != fingerprint(trunk)
    with pytest.raises(CalaError, match="tokens of another trunk;"): open_tokens(other, gallery, folder)
    with pytest.raises(CalaError, match="tokens of another transform;"): open_tokens(trunk, make_gallery(tmp_path / "pictures", "plain"), folder)
    with pytest.raises(CalaError, match="tokens of another number format;"): open_tokens(trunk, gallery, folder, dtype="float16")
    with pytest.raises(CalaError, match="tokens of other pictures;"): open_tokens(trunk, gallery.without({"000"}), folder)
    with pytest.raises(CalaError, match="holds no tokens"): open_tokens(trunk, gallery, tmp_path / "nowhere")
    assert torch.allclose(quietly(other, gallery, folder)[:], direct(other, gallery), atol=1e-6)


def test_a_changed_picture_is_noticed_and_only_it_is_computed_again(gallery, tmp_path):
    folder, seen = tmp_path / "cache", []
    quietly(Trunk(), gallery, folder)
    gallery.paths[7].write_bytes(gallery.paths[8].read_bytes())
    with pytest.raises(CalaError, match="1 pictures have changed since their tokens were made, the first is .*007.png"): open_tokens(Trunk(), gallery, folder)
    cache = cache_tokens(Trunk(), gallery, folder, report=seen.append)
    assert "; 1 to do" in seen[0] and torch.allclose(cache[7], cache[8])
    assert torch.allclose(cache[:], direct(Trunk(), gallery), atol=1e-6)                          # its neighbours in the file stayed
    cache.verify()


def test_a_touched_or_moved_picture_is_the_same_picture(gallery, tmp_path):
    quietly(Trunk(), gallery, tmp_path / "cache")
    for path in gallery.paths: os.utime(path)
    open_tokens(Trunk(), gallery, tmp_path / "cache")
    moved = (tmp_path / "pictures").rename(tmp_path / "elsewhere")
    open_tokens(Trunk(), make_gallery(moved), tmp_path / "cache")


def test_a_change_that_hides_its_time_and_size_is_noticed_by_a_thorough_look(gallery, tmp_path):
    quietly(Trunk(), gallery, tmp_path / "cache")
    path, stat = gallery.paths[0], os.stat(gallery.paths[0])
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    open_tokens(Trunk(), gallery, tmp_path / "cache")
    with pytest.raises(CalaError, match="1 pictures have changed"): open_tokens(Trunk(), gallery, tmp_path / "cache", thorough=True)


HEADERS = dict(senseless=dict(marks="[[0, 1], 7, null, {}]"), foreign=dict(marks=json.dumps([[1, 1, "a", 1]] * 8), place="elsewhere"))
SPOILERS = {"empty": lambda path, good: path.write_bytes(b""), "cut short": lambda path, good: path.write_bytes(good[:900]),
            "garbage": lambda path, good: path.write_bytes(b"\xff\x00" * 50),
            "of a stranger": lambda path, good: save_file({"tokens": torch.zeros(3, 16, 8)}, path),
            "of another cache": lambda path, good: save_file({"tokens": torch.zeros(8, 2, 2)}, path, HEADERS["foreign"]),
            "without sense": lambda path, good: save_file({"tokens": torch.zeros(8, 16, 8)}, path, HEADERS["senseless"])}


@pytest.mark.parametrize("how", SPOILERS)
def test_a_spoilt_file_is_noticed_and_only_it_is_built_again(gallery, tmp_path, how):
    cache, seen = quietly(Trunk(), gallery, tmp_path / "cache"), []
    good, victim = cache[:], files_of(cache)[2]
    content = victim.read_bytes()
    victim.unlink()                                                                       # `cache` still maps the old one
    SPOILERS[how](victim, content)
    with pytest.raises(CalaError, match="00002.safetensors is damaged"): open_tokens(Trunk(), gallery, tmp_path / "cache")
    assert torch.equal(cache_tokens(Trunk(), gallery, tmp_path / "cache", report=seen.append)[:], good)
    assert "00002.safetensors is damaged" in seen[0] and f"; {SHARD} to do" in seen[1]


def test_a_lost_file_costs_its_own_pictures(gallery, tmp_path):
    cache, seen = quietly(Trunk(), gallery, tmp_path / "cache"), []
    good = cache[:]
    files_of(cache)[1].unlink()
    with pytest.raises(CalaError, match=f"is not finished, {SHARD} of {PICTURES}"): open_tokens(Trunk(), gallery, tmp_path / "cache")
    assert torch.equal(cache_tokens(Trunk(), gallery, tmp_path / "cache", report=seen.append)[:], good)
    assert f"; {SHARD} to do" in seen[0]


def test_a_flipped_bit_on_disk_is_found_by_verify(gallery, tmp_path):
    cache = quietly(Trunk(), gallery, tmp_path / "cache")
    cache.verify()
    content = bytearray(files_of(cache)[-1].read_bytes())
    content[-3] ^= 1
    files_of(cache)[-1].write_bytes(content)
    with pytest.raises(CalaError, match=f"holds other tokens of {PICTURES - 1:03}"): TokenCache(cache.place, gallery.names).verify()


def test_half_written_files_of_killed_runs_are_swept_away_after_a_day(gallery, tmp_path):
    place = quietly(Trunk(), gallery, tmp_path / "cache").place
    old, new = place / "00000.1.part", place / "00000.2.part"
    for path in (old, new): path.touch()
    os.utime(old, (1, 1))
    (place / "00001.safetensors").unlink()
    quietly(Trunk(), gallery, tmp_path / "cache")
    assert not old.exists() and new.exists()


def test_two_processes_build_one_cache_together(gallery, tmp_path):
    for rank in (1, 0): build_tokens(Trunk(), gallery, tmp_path / "cache", batch_size=4, part=(rank, 2), report=None)
    cache = open_tokens(Trunk(), gallery, tmp_path / "cache")
    assert torch.allclose(cache[:], direct(Trunk(), gallery), atol=1e-6)


def as_rank(rank, port, pictures, folder, said):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo")
    wrote, save = [], cala.library.cache.files._save_shard
    cala.library.cache.files._save_shard = lambda path, *rest: (wrote.append(path.stem), save(path, *rest))
    try: said.put((rank, len(quietly(Trunk(), make_gallery(pictures), folder)), *wrote))
    except CalaError as error: said.put((rank, str(error)))
    distributed.destroy_process_group()


def two_ranks(pictures, folder):
    "What both ranks said, rank 0 first."
    with socket.socket() as free: free.bind(("127.0.0.1", 0)); port = free.getsockname()[1]
    said = multiprocessing.get_context("fork").Queue()
    started = [forked(as_rank, rank, port, pictures, folder, said) for rank in range(2)]
    try: return sorted(said.get(timeout=120) for _ in started)
    finally:
        for process in started: process.join(10); process.kill()


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_two_gloo_ranks_share_the_work_and_a_broken_picture_stops_both(gallery, tmp_path):
    good = gallery.paths[20].read_bytes()
    gallery.paths[20].write_bytes(good[:50])                                             # in the third file: rank 0's
    said = two_ranks(tmp_path / "pictures", tmp_path / "cache")
    assert all("020.png cannot be decoded" in text for _, text in said), said
    gallery.paths[20].write_bytes(good)
    assert two_ranks(tmp_path / "pictures", tmp_path / "cache") == [(0, 40, "00002", "00004"), (1, 40)]  # rank 1 had done its part, rank 0 its first file
    assert torch.allclose(open_tokens(Trunk(), gallery, tmp_path / "cache")[:], direct(Trunk(), gallery), atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_workers_and_pickling_give_the_same_tokens(gallery, tmp_path):
    cache = quietly(Trunk(), gallery, tmp_path / "cache", num_workers=2, batch_size=16)
    assert torch.allclose(cache[:], direct(Trunk(), gallery), atol=1e-6)
    assert len(pickle.dumps(cache)) < 5000 and torch.equal(pickle.loads(pickle.dumps(cache))[:], cache[:])
    assert torch.equal(torch.cat(list(DataLoader(cache, 16, num_workers=2))), cache[:])


@pytest.mark.filterwarnings("ignore:.*fork.*")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_is_one_line_and_what_is_done_is_kept(gallery, tmp_path, workers):
    good = gallery.paths[30].read_bytes()
    gallery.paths[30].write_bytes(good[:100])
    with pytest.raises(CalaError, match="030.png cannot be decoded") as error: quietly(Trunk(), gallery, tmp_path / "cache", num_workers=workers)
    assert "\n" not in str(error.value)
    gallery.paths[30].write_bytes(good)
    seen = []
    cache_tokens(Trunk(), gallery, tmp_path / "cache", report=seen.append)
    assert "; 16 to do" in seen[0]


def test_holes_a_full_disk_and_what_cannot_be_kept_are_one_line(gallery, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    with pytest.raises(CalaError, match="does not say what it does"):
        quietly(Trunk(), Gallery(gallery.names, gallery.paths, lambda image: image), folder)
    with pytest.raises(CalaError, match="there are float16 and float32"): quietly(Trunk(), gallery, folder, dtype="int8")
    with pytest.raises(CalaError, match="a trunk gives tokens"): quietly(nn.Flatten(), gallery, folder)
    huge = Trunk()
    with torch.no_grad(): huge.convolution.weight.mul_(1e6)
    with pytest.raises(CalaError, match="cannot hold; use float32"): quietly(huge, gallery, folder, dtype="float16")
    monkeypatch.setattr("cala.library.cache.build.shutil.disk_usage", lambda path: type("", (), dict(free=1000)))
    with pytest.raises(CalaError, match="KB free; name another folder"): quietly(Trunk(), gallery, folder)
    monkeypatch.undo()
    monkeypatch.setattr(cala.library.cache.files, "SHARD", SHARD)
    real = os.fsync
    def full(descriptor): raise OSError(28, "No space left on device")
    monkeypatch.setattr("cala.library.cache.files.os.fsync", full)
    with pytest.raises(CalaError, match="No space left on device.*what is done is kept"): quietly(Trunk(), gallery, folder)
    assert not list(folder.rglob("*.part"))
    monkeypatch.setattr("cala.library.cache.files.os.fsync", real)
    quietly(Trunk(), gallery, folder).verify()
    gallery.paths[0].unlink()
    with pytest.raises(CalaError, match="1 of 40 pictures are missing"): quietly(Trunk(), make_missing(gallery), folder)


def make_missing(gallery): return Gallery(gallery.names, gallery.paths, gallery.transform)


def test_the_trunk_is_left_as_it_was(gallery, tmp_path):
    trunk = nn.Sequential(Trunk().eval(), nn.Dropout(.5))
    trunk.train(); trunk[0].eval()
    cache = quietly(trunk, gallery, tmp_path / "cache")
    assert [part.training for part in trunk.modules()] == [True, False, False, True]
    assert torch.allclose(cache[:], direct(trunk.eval(), gallery), atol=1e-6)            # and dropout was off


def test_the_cost_is_known_before(gallery, tmp_path):
    cost = estimate(Trunk(pause=.1), gallery)
    assert cost.shape == (PICTURES, 16, 8) and cost.bytes == PICTURES * 16 * 8 * 4 and cost.seconds > .1 * PICTURES / 8
    seen = []
    cache_tokens(Trunk(), gallery, tmp_path / "cache", report=seen.append)
    assert f"{PICTURES} pictures x 16 x 8 values, 20.5 KB" in seen[0]


def test_a_smaller_gallery_reads_its_part_of_a_larger_cache(gallery, tmp_path):
    cache = quietly(Trunk(), gallery, tmp_path / "cache")
    class Few: pass
    few = Few()
    few.gallery = gallery.without({f"{i:03}" for i in range(0, PICTURES, 2)})
    assert torch.equal(use_cache(few, cache).pictures[:], cache[:][1::2])
    with pytest.raises(CalaError, match="holds no tokens of 1 of these"): cache.part(["stranger"])
    assert json.loads((cache.place / "about.json").read_text())["pictures"] == PICTURES


# Targets


def small_model(mode="multi", **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CaLa(make_backbone("tiny", vocabulary="make it the a red blue".split(), width=32, heads=2, layers=2, queries=4), **options)
    model.backbone.fine_tune(mode)
    return model


def opened(world, model, split): return CIRR(world, split, model.backbone.transform())


def losses_and_gradients(model, data):
    batch = collate([data[i] for i in range(8)])
    model.eval().zero_grad()                                                             # HCA's dropout would draw
    losses = model(batch.reference, batch.captions, batch.target)
    losses.total.backward()
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["multi", "text"])
@pytest.mark.parametrize("weights", [{}, dict(tac_weight=0.), dict(hca_weight=0.), dict(tac_weight=0., hca_weight=0.)])
def test_cached_targets_change_neither_loss_nor_gradient_nor_recall(world, tmp_path, mode, weights):
    model = small_model(mode, **weights)
    fresh, kept = ([opened(world, model, split) for split in ("train", "val")] for _ in range(2))
    for data in kept: use_cache(data, quietly(model.backbone.trunk, data.gallery, tmp_path))          # they are there, so `auto` takes them
    assert use_caches(model, kept, "auto", tmp_path, passes=30, report=None).keep
    assert kept[0].target_pictures is not None and kept[1].target_pictures is not None
    (loss, gradients), (plain, plain_gradients) = losses_and_gradients(model, kept[0]), losses_and_gradients(model, fresh[0])
    assert torch.allclose(loss.total, plain.total, atol=1e-5) and gradients.keys() == plain_gradients.keys()
    for name in gradients: assert torch.allclose(gradients[name], plain_gradients[name], atol=1e-5), name
    ranks = [evaluate(model, data[1], progress=False).ranks for data in (kept, fresh)]
    assert (ranks[0]["rank"] == ranks[1]["rank"]).mean() > .95                            # rounding may swap neighbours


def test_neither_trunk_nor_image_encoder_runs_where_targets_are_cached(world, tmp_path):
    model = small_model()
    data = opened(world, model, "train")
    use_cache(data, quietly(model.backbone.trunk, data.gallery, tmp_path))
    use_caches(model, [data], "auto", tmp_path, passes=30, report=None)
    def never(*args): raise AssertionError("it ran")
    hooks = [module.register_forward_pre_hook(never) for module in (model.backbone.trunk, model.backbone.visual.Qformer.bert)]
    losses_and_gradients(model, data)
    for hook in hooks: hook.remove()


def test_targets_are_keyed_by_what_makes_them_and_by_nothing_else(world, tmp_path):
    model = small_model()
    gallery, backbone = opened(world, model, "train").gallery, model.backbone
    place = lambda: cache_targets(TargetSide(backbone), gallery, tmp_path, report=None).place
    first = place()
    with torch.no_grad(): backbone.multimodal.query_tokens.add_(1.); model.hca.query.weight.add_(1.)
    assert place() == first
    for weight in (backbone.visual.query_tokens, backbone.visual.ln_vision.bias, backbone.trunk.place):
        with torch.no_grad(): weight.view(-1)[0].add_(1e-6)
        first, before = place(), first
        assert first != before
    assert len(json.loads((first / "about.json").read_text())["weights"]) == 32


def test_a_changed_picture_changes_its_target_too(world, tmp_path):
    model, root = small_model(), draw_cirr(tmp_path / "world", train=4, val=1, test1=1, size=32)
    gallery, side, seen = opened(root, model, "train").gallery, TargetSide(model.backbone), []
    def both(report=None):
        tokens = cache_tokens(model.backbone.trunk, gallery, tmp_path / "cache", report=None)
        return cache_targets(side, gallery, tmp_path / "cache", tokens, report=report)
    both()
    gallery.paths[3].write_bytes(gallery.paths[4].read_bytes())
    targets = both(seen.append)
    assert "; 1 to do" in seen[0] and torch.allclose(targets[3].tokens, targets[4].tokens, atol=1e-6)


def test_with_clip_the_target_side_is_constant_only_while_its_reduction_is(tmp_path):
    pytest.importorskip("open_clip")
    backbone = make_backbone("clip", model_name="RN50", random_weights="small")
    constant = {mode: (backbone.fine_tune(mode), TargetSide(backbone).constant, TargetSide(backbone, whole=False).constant)[1:] for mode in ("both", "multi", "text")}
    assert constant == dict(both=(False, False), multi=(False, True), text=(True, True))  # the feature of `multi` is constant, its tokens are not
    side = TargetSide(backbone).eval()
    assert side.apart
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3): Image.new("RGB", (9, 9), (80 * i, 0, 9)).save(folder / f"{i}.png")
    gallery = Gallery(["0", "1", "2"], sorted(folder.iterdir()), backbone.transform())
    kept = cache_targets(side, gallery, tmp_path / "cache", report=None)[torch.arange(3)]
    with torch.no_grad(): said = backbone.image(backbone.trunk(torch.stack([gallery[i] for i in range(3)])))
    for mine, theirs in zip(kept, said): assert torch.allclose(mine.float(), theirs.float(), atol=1e-5)


def test_cache_off_tokens_and_auto_train_alike(world, tmp_path):
    run = lambda cache, *more: train(parse_flags(Recipe, train_flags(world, tmp_path / cache, "--encoder", "multi", "--cache", cache,
                                                                     "--cache-dir", tmp_path / "kept", *more, epochs=1)), progress=False)
    runs = [run("off"), run("tokens"), run("auto")]                                       # `auto` finds the tokens and adds targets
    for other in runs[1:]: assert [r["loss"] for r in other.log] == pytest.approx([r["loss"] for r in runs[0].log], abs=1e-3)


# The rule of `auto`


def plan(todo=1000, look=.02): return Plan({}, Path("."), list(range(todo)), Estimate((1000, 257, 1024), 1000 * 2**19, todo, look * todo))


@pytest.mark.parametrize("looks, look, read, free, keep, why", [
    (60, .02, .001, 10**12, True, "pay"), (1, .02, .001, 10**12, False, "not pay"), (60, .002, .002, 10**12, False, "not pay"),
    (60, .02, .001, 10**9, False, "not fit"), (60, .02, .001, 2 * 1000 * 2**19 + 2, True, "pay")])
def test_auto_keeps_what_pays_and_fits_and_says_why(looks, look, read, free, keep, why):
    choice = choose([plan(look=look)], [looks], read, free)
    assert choice.keep == keep and why in choice.why


def test_auto_takes_what_is_there_even_for_one_look_and_without_room(): assert choose([plan(todo=0)], [1], 9., 0).keep


def test_auto_for_one_validation_builds_nothing(world, tmp_path):
    model, seen = small_model(), []
    data = opened(world, model, "val")
    choice = use_caches(model, [data], "auto", tmp_path / "new", report=seen.append)
    assert not choice.keep and data.pictures is data.gallery and not list((tmp_path / "new").iterdir()) and "would not pay" in seen[0]


def test_an_unknown_way_to_cache_is_one_line():
    with pytest.raises(CalaError, match="--cache perhaps: choose one of off, tokens, auto"): use_caches(None, [], "perhaps", "nowhere")

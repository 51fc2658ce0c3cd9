"The cache is never wrong, whatever happened to trunk, transform, pictures, files or the process that built it."

import errno
import json
import multiprocessing
import os
import pickle
import signal
import socket
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import distributed, nn
from torch.utils.data import DataLoader

import cala.library.cache.build
import cala.library.cache.files
import cala.library.files
from cala.data import CIRR, Gallery, collate, image_transform
from cala.encoders import make_backbone
from cala.errors import CalaError
from cala.library.cache import (
    TargetSide,
    TokenCache,
    cache_targets,
    cache_tokens,
    choose_cache,
    open_tokens,
    use_caches,
    use_targets,
    use_tokens,
)
from cala.library.cache.build import CacheBuild, Estimate
from cala.library.cache.files import cache_place, describe_cache, fingerprint
from cala.library.cli import parse_flags
from cala.library.run import train
from cala.library.worlds.scenes import draw_cirr
from cala.model import CaLa
from cala.recipe import Recipe
from cala.retrieval import evaluate
from small_runs import (
    train_flags,
    world,  # noqa: F401
)

PICTURES, SHARD = 40, 8
DiskUsage = namedtuple("DiskUsage", "free")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cala.library.cache.files, "SHARD", SHARD)


class Trunk(nn.Module):
    "(B, 3, 16, 16) -> (B, 16, 8); `pause` makes it as slow as a real one."

    def __init__(self, pause=0.0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.convolution = nn.Conv2d(3, 8, 4, 4)
        self.pause = pause

    def forward(self, pictures):
        time.sleep(self.pause)
        return self.convolution(pictures).flatten(2).transpose(1, 2)


def make_gallery(folder, kind="targetpad"):
    paths = sorted(Path(folder).glob("*.png"))
    return Gallery([path.stem for path in paths], paths, image_transform(kind, 16))


@pytest.fixture(autouse=True)
def keep_messages(caplog):
    caplog.set_level("INFO", "cala")


@pytest.fixture
def gallery(tmp_path):
    (tmp_path / "pictures").mkdir()
    random = np.random.default_rng(0)
    for i in range(PICTURES):
        pixels = random.integers(0, 256, (20, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i:03}.png")
    return make_gallery(tmp_path / "pictures")


def compute_directly(trunk, gallery):
    with torch.no_grad():
        return trunk(torch.stack([gallery[i] for i in range(len(gallery))]))


def find_shards(cache):
    return sorted(cache.place.glob("*.safetensors"))


# Tokens


def test_cached_tokens_are_those_of_the_trunk(gallery, tmp_path):
    cache = cache_tokens(Trunk(), gallery, tmp_path / "cache", batch_size=3)
    assert cache.shape == (PICTURES, 16, 8)
    assert cache.disk_bytes == PICTURES * 16 * 8 * 4
    assert len(find_shards(cache)) == PICTURES // SHARD
    assert torch.allclose(cache[:], compute_directly(Trunk(), gallery), atol=1e-6)
    assert torch.equal(cache[torch.tensor([39, 1])], torch.stack([cache[39], cache[1]]))
    assert cache[3].dtype == torch.float32


def test_half_precision_halves_the_size_and_rounds(gallery, tmp_path):
    half, full = (cache_tokens(Trunk(), gallery, tmp_path / "cache", dtype) for dtype in ("float16", "float32"))
    assert half.disk_bytes * 2 == full.disk_bytes
    assert half[0].dtype == torch.float16
    assert torch.equal(half[:], full[:].half())


def test_what_is_read_is_a_copy(gallery, tmp_path):
    cache = cache_tokens(Trunk(), gallery, tmp_path / "cache")
    cache[3].zero_()
    assert torch.allclose(cache[3], compute_directly(Trunk(), gallery)[3], atol=1e-6)


def test_a_second_call_computes_nothing(gallery, tmp_path):
    class CountingTrunk(Trunk):
        calls = 0

        def forward(self, pictures):
            type(self).calls += 1
            return super().forward(pictures)

    cache_tokens(CountingTrunk(), gallery, tmp_path / "cache")
    calls = CountingTrunk.calls
    cache_tokens(CountingTrunk(), gallery, tmp_path / "cache")
    assert CountingTrunk.calls == calls


def test_the_trunk_is_left_as_it_was(gallery, tmp_path):
    trunk = nn.Sequential(Trunk().eval(), nn.Dropout(0.5))
    trunk.train()
    trunk[0].eval()
    cache = cache_tokens(trunk, gallery, tmp_path / "cache")
    assert [part.training for part in trunk.modules()] == [True, False, False, True]
    assert torch.allclose(cache[:], compute_directly(trunk.eval(), gallery), atol=1e-6)  # dropout was off


def test_a_smaller_gallery_reads_its_part_of_a_larger_cache(world, gallery, tmp_path):
    data = CIRR(world, "val", image_transform("targetpad", 16))
    cache = cache_tokens(Trunk(), data.gallery, tmp_path / "cache")
    part = CIRR(world, "val", image_transform("targetpad", 16))
    names = part.gallery.names[::2]
    part.gallery = part.gallery.without(set(part.gallery.names) - set(names))
    assert torch.equal(use_tokens(part, cache).pictures[:], cache[:][::2])
    with pytest.raises(CalaError, match="holds no tokens of 1 of these"):
        cache.select(["stranger"])


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_workers_and_pickling_give_the_same_tokens(gallery, tmp_path):
    cache = cache_tokens(Trunk(), gallery, tmp_path / "cache", num_workers=2, batch_size=16)
    assert torch.allclose(cache[:], compute_directly(Trunk(), gallery), atol=1e-6)
    assert len(pickle.dumps(cache)) < 5000
    assert torch.equal(pickle.loads(pickle.dumps(cache))[:], cache[:])
    assert torch.equal(torch.cat(list(DataLoader(cache, 16, num_workers=2))), cache[:])


# Fingerprints


def test_folders_of_caches_keep_their_names(gallery, monkeypatch):
    "A cache that an earlier version wrote is found: these names were recorded from it."
    monkeypatch.undo()
    trunk = nn.Conv2d(3, 2, 2)
    with torch.no_grad():
        trunk.weight.copy_(torch.arange(24.0).view(2, 3, 2, 2))
        trunk.bias.fill_(0.5)
    assert fingerprint(trunk) == "a78cad43f335ade9e09411d010c0cdec"
    two = Gallery(["a", "b"], ["a.png", "b.png"], image_transform("targetpad", 16))
    about = describe_cache(fingerprint(trunk), two, "float16")
    assert list(about) == ["version", "weights", "transform", "dtype", "names", "pictures", "shard"]
    assert about["names"] == "852635742d6eb30fdccb0e7c1b53d92f"
    assert cache_place("c", about) == Path("c/e1542acb4629e84c")


@pytest.mark.parametrize(
    "keep_tokens, digest", [(True, "966860302190347c955b4d48d6680113"), (False, "c2b5efec3f7249b5b5fdc0055860ac86")]
)
def test_fingerprints_of_targets_stay(keep_tokens, digest):
    backbone = make_backbone("tiny", vocabulary=["red"], width=32, heads=2, layers=1, queries=2)
    for parameter in backbone.parameters():
        parameter.data.fill_(0.25)
    backbone.fine_tune("multi")
    assert TargetSide(backbone, keep_tokens).fingerprint("trunk") == digest


def test_another_weight_transform_format_or_list_of_pictures_is_another_cache(gallery, tmp_path):
    folder, trunk, other = tmp_path / "cache", Trunk(), Trunk()
    cache_tokens(trunk, gallery, folder)
    with torch.no_grad():
        other.convolution.weight[0, 0, 0, 0] += 1e-7
    assert fingerprint(other) != fingerprint(trunk)
    with pytest.raises(CalaError, match="tokens of another trunk;"):
        open_tokens(other, gallery, folder)
    with pytest.raises(CalaError, match="tokens of another transform;"):
        open_tokens(trunk, make_gallery(tmp_path / "pictures", "plain"), folder)
    with pytest.raises(CalaError, match="tokens of another number format;"):
        open_tokens(trunk, gallery, folder, dtype="float16")
    with pytest.raises(CalaError, match="tokens of other pictures;"):
        open_tokens(trunk, gallery.without({"000"}), folder)
    with pytest.raises(CalaError, match="holds no tokens"):
        open_tokens(trunk, gallery, tmp_path / "nowhere")
    cache = cache_tokens(other, gallery, folder)
    assert torch.allclose(cache[:], compute_directly(other, gallery), atol=1e-6)


# Pictures that change


def test_a_changed_picture_is_noticed_and_only_it_is_computed_again(gallery, tmp_path, caplog):
    folder = tmp_path / "cache"
    cache_tokens(Trunk(), gallery, folder)
    gallery.paths[7].write_bytes(gallery.paths[8].read_bytes())
    with pytest.raises(CalaError, match="1 picture has changed since the tokens were made, the first is .*007.png"):
        open_tokens(Trunk(), gallery, folder)
    cache = cache_tokens(Trunk(), gallery, folder)
    assert "; 1 to do" in caplog.messages[-1]
    assert torch.allclose(cache[7], cache[8])
    assert torch.allclose(cache[:], compute_directly(Trunk(), gallery), atol=1e-6)  # the others in the shard stayed
    cache.verify()


def test_a_touched_or_moved_picture_is_the_same_picture(gallery, tmp_path):
    cache_tokens(Trunk(), gallery, tmp_path / "cache")
    for path in gallery.paths:
        os.utime(path)
    open_tokens(Trunk(), gallery, tmp_path / "cache")
    moved = (tmp_path / "pictures").rename(tmp_path / "elsewhere")
    open_tokens(Trunk(), make_gallery(moved), tmp_path / "cache")


def test_a_change_that_keeps_time_and_size_is_noticed_by_a_thorough_check(gallery, tmp_path):
    cache_tokens(Trunk(), gallery, tmp_path / "cache")
    path, stat = gallery.paths[0], os.stat(gallery.paths[0])
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    open_tokens(Trunk(), gallery, tmp_path / "cache")
    with pytest.raises(CalaError, match="1 picture has changed"):
        open_tokens(Trunk(), gallery, tmp_path / "cache", thorough=True)


# Files that are damaged


def cut_file(path, content):
    path.write_bytes(content[:900])


def empty_file(path, content):
    path.write_bytes(b"")


def write_garbage(path, content):
    path.write_bytes(b"\xff\x00" * 50)


def drop_header(path, content):
    save_file({"tokens": torch.zeros(3, 16, 8)}, path)


def take_shard_of_another_cache(path, content):
    marks = json.dumps([[1, 1, "a", 1]] * 8)
    save_file({"tokens": torch.zeros(8, 2, 2)}, path, dict(marks=marks, place="elsewhere"))


def write_wrong_marks(path, content):
    save_file({"tokens": torch.zeros(8, 16, 8)}, path, dict(marks="[[0, 1], 7, null, {}]"))


@pytest.mark.parametrize(
    "damage", [cut_file, empty_file, write_garbage, drop_header, take_shard_of_another_cache, write_wrong_marks]
)
def test_a_damaged_file_is_noticed_and_only_it_is_built_again(gallery, tmp_path, damage, caplog):
    cache = cache_tokens(Trunk(), gallery, tmp_path / "cache")
    caplog.clear()
    tokens, victim = cache[:], find_shards(cache)[2]
    content = victim.read_bytes()
    victim.unlink()  # `cache` still has the old file in memory
    damage(victim, content)
    with pytest.raises(CalaError, match="00002.safetensors is damaged"):
        open_tokens(Trunk(), gallery, tmp_path / "cache")
    rebuilt = cache_tokens(Trunk(), gallery, tmp_path / "cache")
    assert torch.equal(rebuilt[:], tokens)
    assert "00002.safetensors is damaged" in caplog.messages[0]
    assert f"; {SHARD} to do" in caplog.messages[1]


def test_a_lost_file_costs_its_own_pictures(gallery, tmp_path, caplog):
    cache = cache_tokens(Trunk(), gallery, tmp_path / "cache")
    caplog.clear()
    tokens = cache[:]
    find_shards(cache)[1].unlink()
    with pytest.raises(CalaError, match=f"is not finished, {SHARD} of {PICTURES}"):
        open_tokens(Trunk(), gallery, tmp_path / "cache")
    rebuilt = cache_tokens(Trunk(), gallery, tmp_path / "cache")
    assert torch.equal(rebuilt[:], tokens)
    assert f"; {SHARD} to do" in caplog.messages[0]


def test_a_flipped_bit_on_disk_is_found_by_verify(gallery, tmp_path):
    cache = cache_tokens(Trunk(), gallery, tmp_path / "cache")
    cache.verify()
    content = bytearray(find_shards(cache)[-1].read_bytes())
    content[-3] ^= 1
    find_shards(cache)[-1].write_bytes(content)
    with pytest.raises(CalaError, match=f"00004.safetensors is damaged: the tokens of {PICTURES - 1:03} have changed"):
        TokenCache(cache.place, gallery.names).verify()


def test_half_written_files_of_killed_runs_are_removed_after_a_day(gallery, tmp_path):
    place = cache_tokens(Trunk(), gallery, tmp_path / "cache").place
    old, new = place / "00000.safetensors.1.part", place / "00000.safetensors.2.part"
    for path in (old, new):
        path.touch()
    os.utime(old, (1, 1))
    (place / "00001.safetensors").unlink()
    cache_tokens(Trunk(), gallery, tmp_path / "cache")
    assert not old.exists()
    assert new.exists()


# Builds that stop


def start_fork(work, *args):
    "Start a child process as loader workers are started: nothing is imported again."
    child = multiprocessing.get_context("fork").Process(target=work, args=args, daemon=True)
    child.start()
    return child


def build_slowly(pictures, folder):
    cache_tokens(Trunk(pause=0.1), make_gallery(pictures), folder, batch_size=1)


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_build_that_was_killed_goes_on_and_equals_one_that_was_not(gallery, tmp_path, caplog):
    folder = tmp_path / "killed"
    child = start_fork(build_slowly, tmp_path / "pictures", folder)
    deadline = time.time() + 120
    while len(list(folder.rglob("*.safetensors"))) < 2 and time.time() < deadline and child.is_alive():
        time.sleep(0.01)
    child.kill()
    child.join()
    before = {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert child.exitcode == -signal.SIGKILL
    assert 2 <= len(before) < PICTURES // SHARD
    with pytest.raises(CalaError, match="is not finished"):
        open_tokens(Trunk(), gallery, folder)
    caplog.clear()
    killed = cache_tokens(Trunk(), gallery, folder)
    assert f"; {PICTURES - SHARD * len(before)} to do" in caplog.messages[0]
    at_once = cache_tokens(Trunk(), gallery, tmp_path / "at_once", batch_size=1)
    killed.verify()
    assert torch.allclose(killed[:], at_once[:], atol=1e-6)
    assert {name: (killed.place / name).stat().st_mtime_ns for name in before} == before  # not computed again


@pytest.mark.filterwarnings("ignore:.*fork.*")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_is_one_line_and_what_is_done_is_kept(gallery, tmp_path, workers, caplog):
    content = gallery.paths[30].read_bytes()
    gallery.paths[30].write_bytes(content[:100])
    with pytest.raises(CalaError, match="030.png cannot be decoded") as error:
        cache_tokens(Trunk(), gallery, tmp_path / "cache", num_workers=workers)
    assert "\n" not in str(error.value)
    gallery.paths[30].write_bytes(content)
    caplog.clear()
    cache_tokens(Trunk(), gallery, tmp_path / "cache")
    assert "; 16 to do" in caplog.messages[0]


def test_missing_pictures_are_refused(gallery, tmp_path):
    gallery.paths[0].unlink()
    with pytest.raises(CalaError, match="1 of 40 pictures is missing"):
        cache_tokens(Trunk(), make_missing(gallery), tmp_path / "cache")


def make_missing(gallery):
    return Gallery(gallery.names, gallery.paths, gallery.transform)


def test_what_cannot_be_kept_is_refused(gallery, tmp_path):
    folder = tmp_path / "cache"
    with pytest.raises(CalaError, match="does not say what it does"):
        cache_tokens(Trunk(), Gallery(gallery.names, gallery.paths, lambda image: image), folder)
    with pytest.raises(CalaError, match="choose float16 or float32"):
        cache_tokens(Trunk(), gallery, folder, dtype="int8")
    with pytest.raises(CalaError, match="a trunk must give tokens"):
        cache_tokens(nn.Flatten(), gallery, folder)
    huge = Trunk()
    with torch.no_grad():
        huge.convolution.weight.mul_(1e6)
    with pytest.raises(CalaError, match="cannot hold; use float32"):
        cache_tokens(huge, gallery, folder, dtype="float16")


def test_a_disk_without_room_is_noticed_before_the_work(gallery, tmp_path, monkeypatch):
    monkeypatch.setattr(cala.library.cache.build.shutil, "disk_usage", lambda path: DiskUsage(1000))
    with pytest.raises(CalaError, match="1.0 KB free; name another folder with --cache-dir, or use float16"):
        cache_tokens(Trunk(), gallery, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_disk_that_fills_up_keeps_what_is_done(gallery, tmp_path, monkeypatch, caplog):
    fsync = os.fsync
    written = []

    def fill_up(descriptor):
        written.append(descriptor)
        if len(written) > 3:  # about.json and two shards
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(cala.library.files.os, "fsync", fill_up)
        with pytest.raises(CalaError, match="No space left on device.*what is done is kept.*--cache-dir"):
            cache_tokens(Trunk(), gallery, tmp_path / "cache")
    assert not list(tmp_path.rglob("*.part"))
    caplog.clear()
    cache_tokens(Trunk(), gallery, tmp_path / "cache").verify()
    assert f"; {PICTURES - 2 * SHARD} to do" in caplog.messages[0]


# What it costs


def test_the_cost_is_known_before(gallery, tmp_path, caplog):
    build = CacheBuild(Trunk(pause=0.1), gallery, tmp_path / "cache")
    assert build.cost.shape == (PICTURES, 16, 8)
    assert build.cost.total_bytes == PICTURES * 16 * 8 * 4
    assert build.cost.seconds > 0.1 * PICTURES / 8
    assert not (tmp_path / "cache").exists()
    caplog.clear()
    cache_tokens(Trunk(), gallery, tmp_path / "cache")
    assert f"{PICTURES} pictures x 16 x 8 values, 20.5 KB" in caplog.messages[0]


# Several processes


def test_two_processes_build_one_cache_together(gallery, tmp_path, monkeypatch):
    for index in (1, 0):
        with monkeypatch.context() as patch:
            patch.setattr(cala.library.cache.build, "process_index_and_count", lambda: (index, 2))
            CacheBuild(Trunk(), gallery, tmp_path / "cache", batch_size=4).run()
    cache = open_tokens(Trunk(), gallery, tmp_path / "cache")
    assert torch.allclose(cache[:], compute_directly(Trunk(), gallery), atol=1e-6)


def run_process(index, port, pictures, folder, results):
    "One of two processes that build a cache; puts its number, and the shards that it wrote or its error."
    os.environ.update(RANK=str(index), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo")
    written, save_shard = [], cala.library.cache.build.save_shard

    def watch(path, *rest):
        written.append(path.stem)
        save_shard(path, *rest)

    cala.library.cache.build.save_shard = watch
    try:
        results.put((index, len(cache_tokens(Trunk(), make_gallery(pictures), folder)), *written))
    except CalaError as error:
        results.put((index, str(error)))
    distributed.destroy_process_group()


def run_two_processes(pictures, folder):
    "The results of both processes, in their order."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = multiprocessing.get_context("fork").Queue()
    started = [start_fork(run_process, index, port, pictures, folder, results) for index in range(2)]
    try:
        return sorted(results.get(timeout=120) for _ in started)
    finally:
        for process in started:
            process.join(10)
            process.kill()


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_two_gloo_processes_share_the_work_and_a_broken_picture_stops_both(gallery, tmp_path):
    pictures, folder = tmp_path / "pictures", tmp_path / "cache"
    content = gallery.paths[20].read_bytes()
    gallery.paths[20].write_bytes(content[:50])  # in the third shard, which is process 0's
    results = run_two_processes(pictures, folder)
    assert all("020.png cannot be decoded" in text for _, text in results), results
    gallery.paths[20].write_bytes(content)
    # Process 1 had finished its part, process 0 its first shard.
    assert run_two_processes(pictures, folder) == [(0, 40, "00002", "00004"), (1, 40)]
    cache = open_tokens(Trunk(), gallery, folder)
    assert torch.allclose(cache[:], compute_directly(Trunk(), gallery), atol=1e-6)


# Targets


def make_small_model(mode="multi", **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        words = "make it the a red blue".split()
        model = CaLa(make_backbone("tiny", vocabulary=words, width=32, heads=2, layers=2, queries=4), **options)
    model.backbone.fine_tune(mode)
    return model


def open_cirr(world, model, split):
    return CIRR(world, split, model.backbone.transform())


def compute_gradients(model, data):
    "Losses and gradients of eight triplets."
    batch = collate([data[i] for i in range(8)])
    model.eval().zero_grad()  # without HCA's dropout
    losses = model(batch.reference, batch.captions, batch.target)
    losses.total.backward()
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["multi", "text"])
@pytest.mark.parametrize(
    "weights", [{}, dict(tac_weight=0.0), dict(hca_weight=0.0), dict(tac_weight=0.0, hca_weight=0.0)]
)
def test_cached_targets_change_neither_loss_nor_gradient_nor_recall(world, tmp_path, mode, weights):
    model = make_small_model(mode, **weights)
    fresh, cached = ([open_cirr(world, model, split) for split in ("train", "val")] for _ in range(2))
    for data in cached:  # `auto` uses tokens that are there
        use_tokens(data, cache_tokens(model.backbone.trunk, data.gallery, tmp_path))
    assert use_caches(model, cached, "auto", tmp_path, passes=30).use
    assert cached[0].target_pictures is not None
    assert cached[1].target_pictures is not None
    loss, gradients = compute_gradients(model, cached[0])
    expected_loss, expected_gradients = compute_gradients(model, fresh[0])
    assert torch.allclose(loss.total, expected_loss.total, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected_gradients[name], atol=1e-5), name
    ranks, expected_ranks = (evaluate(model, data[1], progress=False).ranks for data in (cached, fresh))
    assert (ranks["rank"] == expected_ranks["rank"]).mean() > 0.95  # rounding may swap neighbours


def test_neither_trunk_nor_image_encoder_runs_where_targets_are_cached(world, tmp_path):
    model = make_small_model()
    data = open_cirr(world, model, "train")
    use_tokens(data, cache_tokens(model.backbone.trunk, data.gallery, tmp_path))
    use_caches(model, [data], "auto", tmp_path, passes=30)

    def refuse(*args):
        raise AssertionError("it ran")

    for module in (model.backbone.trunk, model.backbone.visual.Qformer.bert):
        module.register_forward_pre_hook(refuse)
    compute_gradients(model, data)


def test_targets_are_keyed_by_what_makes_them_and_by_nothing_else(world, tmp_path):
    model = make_small_model()
    gallery, backbone = open_cirr(world, model, "train").gallery, model.backbone

    def find_place():
        return cache_targets(TargetSide(backbone), gallery, tmp_path).place

    place = find_place()
    with torch.no_grad():
        backbone.multimodal.query_tokens.add_(1.0)
        model.hca.query.weight.add_(1.0)
    assert find_place() == place
    for weight in (backbone.visual.query_tokens, backbone.visual.ln_vision.bias, backbone.trunk.place):
        with torch.no_grad():
            weight.view(-1)[0].add_(1e-6)
        before, place = place, find_place()
        assert place != before


def test_a_changed_picture_changes_its_target_too(tmp_path, caplog):
    model, root = make_small_model(), draw_cirr(tmp_path / "world", train=4, val=1, test1=1, size=32)
    gallery, side = open_cirr(root, model, "train").gallery, TargetSide(model.backbone)

    def cache_both():
        tokens = cache_tokens(model.backbone.trunk, gallery, tmp_path / "cache")
        return cache_targets(side, gallery, tmp_path / "cache", tokens)

    cache_both()
    gallery.paths[3].write_bytes(gallery.paths[4].read_bytes())
    caplog.clear()
    targets = cache_both()
    assert "; 1 to do" in caplog.messages[0]
    assert torch.allclose(targets[3].tokens, targets[4].tokens, atol=1e-6)


def test_with_clip_the_target_side_is_constant_only_while_its_reduction_is(tmp_path):
    pytest.importorskip("open_clip")
    backbone = make_backbone("clip", model_name="RN50", random_weights="small")
    constant = {}
    for mode in ("both", "multi", "text"):
        backbone.fine_tune(mode)
        constant[mode] = tuple(TargetSide(backbone, keep_tokens).is_constant for keep_tokens in (True, False))
    # The feature of `multi` is constant, its tokens are not.
    assert constant == dict(both=(False, False), multi=(False, True), text=(True, True))
    side = TargetSide(backbone).eval()
    assert side.extra_feature
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (9, 9), (80 * i, 0, 9)).save(folder / f"{i}.png")
    gallery = Gallery(["0", "1", "2"], sorted(folder.iterdir()), backbone.transform())
    cached = cache_targets(side, gallery, tmp_path / "cache")[torch.arange(3)]
    with torch.no_grad():
        computed = backbone.image(backbone.trunk(torch.stack([gallery[i] for i in range(3)])))
    for part, expected in zip(cached, computed, strict=True):
        assert torch.allclose(part.float(), expected.float(), atol=1e-5)


def test_cache_off_tokens_and_auto_train_alike(world, tmp_path):
    def train_with(cache):
        flags = ["--encoder", "multi", "--cache", cache, "--cache-dir", tmp_path / "cache"]
        recipe = parse_flags(Recipe, train_flags(world, tmp_path / cache, *flags, epochs=1))
        return [row["loss"] for row in train(recipe, progress=False).log]

    expected = train_with("off")
    assert train_with("tokens") == pytest.approx(expected, abs=1e-3)
    assert train_with("auto") == pytest.approx(expected, abs=1e-3)  # finds the tokens and adds targets


# The rule of `auto`


def make_cost(todo=1000, compute_seconds=0.02):
    return Estimate((1000, 257, 1024), 2**19, todo, compute_seconds * todo)


@pytest.mark.parametrize(
    "readings, compute_seconds, read_seconds, free, use, reason",
    [
        (60, 0.02, 0.001, 10**12, True, "pays"),
        (1, 0.02, 0.001, 10**12, False, "not pay"),
        (60, 0.002, 0.002, 10**12, False, "not pay"),
        (60, 0.02, 0.001, 10**9, False, "not fit"),
        (60, 0.02, 0.001, 2 * 1000 * 2**19 + 2, True, "pays"),
    ],
)
def test_auto_uses_what_pays_and_fits_and_gives_the_reason(readings, compute_seconds, read_seconds, free, use, reason):
    choice = choose_cache([make_cost(compute_seconds=compute_seconds)], [readings], read_seconds, free)
    assert choice.use == use
    assert reason in choice.reason


def test_auto_uses_a_complete_cache_even_for_one_reading_and_without_room():
    assert choose_cache([], [], 9.0, 0).use


def test_auto_for_one_validation_builds_nothing(world, tmp_path, caplog):
    model = make_small_model()
    data = open_cirr(world, model, "val")
    choice = use_caches(model, [data], "auto", tmp_path / "new")
    assert not choice.use
    assert data.pictures is data.gallery
    assert not list((tmp_path / "new").iterdir())
    assert "would not pay" in caplog.messages[0]


def test_an_unknown_kind_of_cache_is_refused():
    with pytest.raises(CalaError, match="--cache perhaps: choose one of off, tokens, auto"):
        use_caches(None, [], "perhaps", "nowhere")


# Folders that cannot be written


def refuse_to_write(path, *args, **options):
    raise OSError(errno.EROFS, "Read-only file system", str(path))


@pytest.fixture(params=["no folder", "no file"])
def read_only(request, tmp_path, monkeypatch):
    "A folder for caches in which nothing can be made. The tests may run as root, who may write everywhere."
    if request.param == "no folder":
        (tmp_path / "file").touch()
        return tmp_path / "file" / "cache"
    monkeypatch.setattr(Path, "mkdir", refuse_to_write)
    monkeypatch.setattr(Path, "write_bytes", refuse_to_write)
    return tmp_path / "cache"


def test_tokens_in_a_folder_that_cannot_be_written_are_refused_with_the_flag_that_helps(world, read_only):
    model = make_small_model()
    data = open_cirr(world, model, "train")
    with pytest.raises(CalaError, match="cannot make .*cache.*; name another folder with --cache-dir"):
        use_caches(model, [data], "tokens", read_only, passes=30)


def test_auto_in_a_folder_that_cannot_be_written_goes_on_without_a_cache_and_says_so(world, read_only, caplog):
    model = make_small_model()
    data = open_cirr(world, model, "train")
    choice = use_caches(model, [data], "auto", read_only, passes=30)
    assert not choice.use
    assert data.pictures is data.gallery
    assert "not used, cannot" in caplog.messages[0]
    assert "--cache-dir" in caplog.messages[0]


def test_a_complete_cache_in_a_read_only_folder_is_used(world, tmp_path, monkeypatch):
    model = make_small_model()
    train = open_cirr(world, model, "train")
    use_caches(model, [train], "tokens", tmp_path)
    for name in ("mkdir", "write_bytes", "unlink"):
        monkeypatch.setattr(Path, name, refuse_to_write)
    monkeypatch.setattr(cala.library.cache.build, "save_shard", refuse_to_write)
    for kind in ("tokens", "auto"):
        data = open_cirr(world, model, "train")
        assert use_caches(model, [data], kind, tmp_path).use
        assert isinstance(data.pictures, TokenCache)


def test_targets_that_train_are_refused(world, tmp_path):
    model = make_small_model("both")
    gallery = open_cirr(world, model, "train").gallery
    with pytest.raises(CalaError, match="the image encoder trains.*--encoder multi or text, or --cache tokens"):
        cache_targets(TargetSide(model.backbone), gallery, tmp_path)


def test_a_part_of_a_data_set_reads_its_part_of_the_targets(world, tmp_path):
    model = make_small_model()
    data = open_cirr(world, model, "val")
    tokens = cache_tokens(model.backbone.trunk, data.gallery, tmp_path)
    targets = cache_targets(TargetSide(model.backbone), data.gallery, tmp_path, tokens)
    part = open_cirr(world, model, "val")
    names = part.gallery.names[1::2]
    part.gallery = part.gallery.without(set(part.gallery.names) - set(names))
    use_targets(part, tokens, targets)
    assert torch.equal(part.target_pictures.features(), targets.features()[1::2])
    assert torch.equal(targets.features(), torch.stack([targets[i].feature for i in range(len(targets))]))
    shuffled = targets.select(names[::-1]).features()
    assert torch.equal(shuffled, part.target_pictures.features().flip(0))
    assert torch.equal(part.pictures[0].image.tokens, targets[1].tokens)

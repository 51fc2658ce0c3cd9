"The token cache: never wrong, whatever happened to trunk, transform, pictures, files or the process that built it."

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from cala.commands import CalaError
from cala.data import Gallery, image_transform
from cala.features import TokenCache, build_tokens, cache_tokens, estimate, fingerprint, open_tokens, use_cache

PICTURES = 40


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


def test_cached_tokens_are_those_of_the_trunk(gallery, tmp_path):
    cache = quietly(Trunk(), gallery, tmp_path / "cache", batch_size=7)
    assert cache.shape == (PICTURES, 16, 8) and cache.bytes == PICTURES * 16 * 8 * 4
    assert torch.allclose(cache[:], direct(Trunk(), gallery), atol=1e-6)
    assert torch.equal(cache[torch.tensor([3, 1])], torch.stack([cache[3], cache[1]])) and cache[3].dtype == torch.float32


def test_half_precision_halves_the_size_and_rounds(gallery, tmp_path):
    half, full = (quietly(Trunk(), gallery, tmp_path / "cache", dtype=d) for d in ("float16", "float32"))
    assert half.bytes * 2 == full.bytes and half[0].dtype == torch.float32
    assert torch.equal(half[:], full[:].half().float())


CHILD = """
import sys
sys.path.insert(0, {tests!r})
from test_features import Trunk, make_gallery, cache_tokens
cache_tokens(Trunk(pause=.05), make_gallery({pictures!r}), {folder!r}, batch_size=1, report=None)
"""


def test_a_cache_built_in_two_runs_with_a_kill_between_equals_one_built_at_once(gallery, tmp_path):
    folder = tmp_path / "killed"
    code = CHILD.format(tests=str(Path(__file__).parent), pictures=str(tmp_path / "pictures"), folder=str(folder))
    child = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.time() + 120
    lines = lambda: sum(path.read_text().count("\n") for path in folder.rglob("done.*.jsonl"))
    while lines() < 10 and time.time() < deadline and child.poll() is None: time.sleep(.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and 10 <= lines() < PICTURES
    with pytest.raises(CalaError, match="is not finished"): open_tokens(Trunk(), gallery, folder)
    seen = []
    killed = cache_tokens(Trunk(), gallery, folder, report=seen.append)
    assert f"{PICTURES - lines_done(seen)} pictures to do" in seen[0]
    at_once = quietly(Trunk(), gallery, tmp_path / "at_once", batch_size=1)
    killed.verify()
    assert torch.allclose(killed[:], at_once[:], atol=1e-6)
    done = at_once.rows[:10]                     # what was done before the kill was not computed again: equal bit for bit
    assert torch.equal(killed[done], at_once[done])


def lines_done(seen): return PICTURES - int(seen[0].split(";")[1].split()[0])


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
    assert "; 1 pictures to do" in seen[0] and torch.allclose(cache[7], cache[8])


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


@pytest.mark.parametrize("left", [0, 50, 5000])
def test_a_truncated_cache_is_noticed_and_built_again(gallery, tmp_path, left):
    cache, seen = quietly(Trunk(), gallery, tmp_path / "cache"), []
    good = cache[:]
    os.truncate(cache.place / "tokens.npy", left)
    with pytest.raises(CalaError, match="tokens.npy is damaged"): open_tokens(Trunk(), gallery, tmp_path / "cache")
    assert torch.equal(cache_tokens(Trunk(), gallery, tmp_path / "cache", report=seen.append)[:], good)
    assert "is damaged" in seen[0] and f"{PICTURES} pictures to do" in seen[1]


def test_a_lost_token_file_does_not_leave_its_journal_behind(gallery, tmp_path):
    cache = quietly(Trunk(), gallery, tmp_path / "cache")
    good = cache[:]
    (cache.place / "tokens.npy").unlink()
    with pytest.raises(CalaError): open_tokens(Trunk(), gallery, tmp_path / "cache")
    assert torch.equal(quietly(Trunk(), gallery, tmp_path / "cache")[:], good)


@pytest.mark.parametrize("spoil", [lambda p: p.write_bytes(b"\xff\x00" * 50), lambda p: p.write_text("[0, 1]\n7\nnull\n{}\n[[], 1, 2, 3, 4]"), lambda p: p.unlink(),
                                   lambda p: p.write_text('[0, "x", null, [], {}]\n[99999, 1, 2, "a", 3]\n[-1, 1, 2, "a", 3]')])
def test_a_spoilt_journal_costs_time_and_nothing_else(gallery, tmp_path, spoil):
    cache = quietly(Trunk(), gallery, tmp_path / "cache")
    good = cache[:]
    spoil(cache.place / "done.0.jsonl")
    with pytest.raises(CalaError, match="is not finished|have changed"): open_tokens(Trunk(), gallery, tmp_path / "cache")
    assert torch.equal(quietly(Trunk(), gallery, tmp_path / "cache")[:], good)


def test_a_flipped_bit_on_disk_is_found_by_verify(gallery, tmp_path):
    cache = quietly(Trunk(), gallery, tmp_path / "cache")
    cache.verify()
    with open(cache.place / "tokens.npy", "r+b") as file: file.seek(-3, 2); file.write(b"\x55")
    with pytest.raises(CalaError, match=f"holds other tokens of {PICTURES - 1:03}"): TokenCache(cache.place, gallery.names).verify()


def test_a_token_file_from_a_stranger_cannot_run_code(gallery, tmp_path):
    class Trick:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "ran"),)
    cache = quietly(Trunk(), gallery, tmp_path / "cache")
    np.save(cache.place / "tokens.npy", np.array([Trick()], dtype=object), allow_pickle=True)
    with pytest.raises(CalaError, match="is damaged"): open_tokens(Trunk(), gallery, tmp_path / "cache")
    assert not (tmp_path / "ran").exists()


def test_a_token_file_of_another_shape_is_refused(gallery, tmp_path):
    cache = quietly(Trunk(), gallery, tmp_path / "cache")
    np.save(cache.place / "tokens.npy", np.zeros((3, 16, 8), np.float32))
    with pytest.raises(CalaError, match="is damaged"): open_tokens(Trunk(), gallery, tmp_path / "cache")
    assert quietly(Trunk(), gallery, tmp_path / "cache").shape == (PICTURES, 16, 8)


def test_two_processes_build_one_cache_together(gallery, tmp_path):
    for rank in (1, 0): build_tokens(Trunk(), gallery, tmp_path / "cache", batch_size=4, part=(rank, 2), report=None)
    cache = open_tokens(Trunk(), gallery, tmp_path / "cache")
    assert torch.allclose(cache[:], direct(Trunk(), gallery), atol=1e-6)
    assert sorted(path.name for path in cache.place.glob("done*")) == ["done.0.jsonl", "done.1.jsonl"]


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
    with pytest.raises(CalaError, match="030.png cannot be decoded") as error:
        quietly(Trunk(), gallery, tmp_path / "cache", batch_size=10, num_workers=workers)
    assert "\n" not in str(error.value)
    gallery.paths[30].write_bytes(good)
    seen = []
    cache_tokens(Trunk(), gallery, tmp_path / "cache", report=seen.append)
    assert "; 10 pictures to do" in seen[0]


def test_holes_a_full_disk_and_what_cannot_be_kept_are_one_line(gallery, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    with pytest.raises(CalaError, match="does not say what it does"):
        quietly(Trunk(), Gallery(gallery.names, gallery.paths, lambda image: image), folder)
    with pytest.raises(CalaError, match="there are float16 and float32"): quietly(Trunk(), gallery, folder, dtype="int8")
    with pytest.raises(CalaError, match="a trunk gives tokens"): quietly(nn.Flatten(), gallery, folder)
    huge = Trunk()
    with torch.no_grad(): huge.convolution.weight.mul_(1e6)
    with pytest.raises(CalaError, match="cannot hold; use float32"): quietly(huge, gallery, folder, dtype="float16")
    monkeypatch.setattr("cala.features.shutil.disk_usage", lambda path: type("", (), dict(free=1000)))
    with pytest.raises(CalaError, match="GB free; name another folder"): quietly(Trunk(), gallery, folder)
    monkeypatch.undo()
    real = os.fsync
    def full(descriptor): raise OSError(28, "No space left on device")
    monkeypatch.setattr("cala.features.os.fsync", full)
    with pytest.raises(CalaError, match="No space left on device.*what is done is kept"): quietly(Trunk(), gallery, folder)
    monkeypatch.setattr("cala.features.os.fsync", real)
    quietly(Trunk(), gallery, folder).verify()
    gallery.paths[0].unlink()
    with pytest.raises(CalaError, match="1 of 40 pictures are missing"): quietly(Trunk(), make_missing(gallery), folder)


def make_missing(gallery): return Gallery(gallery.names, gallery.paths, gallery.transform)


def test_the_trunk_is_left_as_it_was(gallery, tmp_path):
    trunk = nn.Sequential(Trunk(), nn.Dropout(.5)).train()
    cache = quietly(trunk, gallery, tmp_path / "cache")
    assert trunk.training and torch.allclose(cache[:], direct(trunk.eval(), gallery), atol=1e-6)   # and dropout was off


def test_the_cost_is_known_before(gallery, tmp_path):
    cost = estimate(Trunk(pause=.1), gallery)
    assert cost.shape == (PICTURES, 16, 8) and cost.bytes == PICTURES * 16 * 8 * 4 and cost.seconds > .1
    seen = []
    cache_tokens(Trunk(), gallery, tmp_path / "cache", report=seen.append)
    assert f"{PICTURES} pictures x 16 x 8 values" in seen[0]


def test_a_smaller_gallery_reads_its_part_of_a_larger_cache(gallery, tmp_path):
    cache = quietly(Trunk(), gallery, tmp_path / "cache")
    class Few: pass
    few = Few()
    few.gallery = gallery.without({f"{i:03}" for i in range(0, PICTURES, 2)})
    assert torch.equal(use_cache(few, cache).pictures[:], cache[:][1::2])
    with pytest.raises(CalaError, match="holds no tokens of 1 of these"): cache.part(["stranger"])
    assert json.loads((cache.place / "about.json").read_text())["pictures"] == PICTURES

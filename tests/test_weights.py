"""Files of weights: every kind of file that holds none is named, a download that is cut short is not kept."""

import http.server
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import cala.backbones.blip2 as blip2
import cala.backbones.weights as weights
from cala.backbones.clip import read_tensors
from cala.encoders import make_backbone
from cala.errors import CalaError
from cala.library.released import load_released
from hostile import BOMBS, Bomb
from lavis_helpers import VOCABULARY

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:e2a1\nsize 4787035285\n"
PAGE = b"\n<!DOCTYPE html><html>Access denied</html>"
MISFITS = {  # name of a file -> its content, and what the message must say
    "empty.pth": (b"", "empty.*cut short"),
    "pointer.pth": (POINTER, "Git LFS pointer.*git lfs pull"),
    "page.pth": (PAGE, "web page"),
    "error.pth": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"),
    "damaged.pth": (b"\x80\x02nothing", "damaged.pth"),
}


def read_blip2(path):
    return make_backbone("blip2", weights=str(path))


READERS = dict(torch=weights.read_torch, blip2=read_blip2, clip=read_tensors, released=load_released)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", MISFITS)
def test_a_file_that_holds_no_weights_is_named(tmp_path, name, reader):
    content, message = MISFITS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalaError, match=message) as raised:
        READERS[reader](tmp_path / name)
    line = str(raised.value)
    assert name in line and "\n" not in line
    assert "execute code" not in line or name == "damaged.pth"


@pytest.mark.parametrize("reader", READERS)
def test_a_numpy_value_beside_the_weights_is_named(tmp_path, reader):
    torch.save({"CLIP": {"a": torch.zeros(1)}, "best": np.float64(0.5)}, tmp_path / "best.pt")
    with pytest.raises(CalaError, match="NumPy value"):
        READERS[reader](tmp_path / "best.pt")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("reader", READERS)
def test_a_torchscript_archive_is_named(tmp_path, reader):
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "program.pt"))
    with pytest.raises(CalaError, match="TorchScript archive"):
        READERS[reader](tmp_path / "program.pt")


@pytest.mark.parametrize("form", BOMBS)
def test_code_in_a_file_is_never_executed(tmp_path, form):
    BOMBS[form](Bomb(tmp_path / "exploded"), tmp_path / "bomb.pt", "model")
    with pytest.raises(CalaError, match="could execute code"):
        weights.read_torch(tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()


def test_weights_are_read_by_content(tmp_path):
    state = {"a": torch.arange(3.0)}
    save_file(state, tmp_path / "no_suffix")
    torch.save(state, tmp_path / "weights.bin")
    for name in ("no_suffix", "weights.bin"):
        assert torch.equal(weights.read_weights(tmp_path / name)["a"], state["a"])
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "no_suffix").read_bytes()[:30])
    with pytest.raises(CalaError, match="cut short"):
        weights.read_weights(tmp_path / "cut.safetensors")
    for place, message in (
        ("https://example.org/a.pt", "is a URL"),
        (tmp_path, "is a folder"),
        (tmp_path / "none", "no weights file"),
    ):
        with pytest.raises(CalaError, match=message):
            weights.read_weights(place)


# The Hugging Face Hub


@pytest.fixture
def hub_folder(tmp_path):
    "A folder as transformers saves BLIP-2."
    folder = tmp_path / "hub"
    folder.mkdir()
    save_file({"query_tokens": torch.zeros(1, 32, 768)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "blip-2"}')
    return folder


@pytest.mark.parametrize("model_name", blip2.PUBLISHED)
def test_a_folder_of_the_hub_without_the_weights_of_blip2_is_named(hub_folder, model_name):
    for place in (hub_folder, hub_folder / "model.safetensors"):
        with pytest.raises(CalaError, match=f"{place} holds other weights; --model-name {model_name} needs blip2_"):
            make_backbone("blip2", model_name=model_name, weights=str(place))
    (hub_folder / "model.safetensors").unlink()
    with pytest.raises(CalaError, match="blip2_.*pth is missing"):
        make_backbone("blip2", model_name=model_name, weights=str(hub_folder))


def test_the_weights_of_a_hub_folder_are_found_in_the_cache_too(hub_folder):
    assert weights.list_hub_files(hub_folder) == [hub_folder / "model.safetensors"]
    cache = hub_folder.with_name("models--a--b")
    for name in ("snapshots/old", "snapshots/new"):
        (cache / name).mkdir(parents=True)
        (cache / name / "pytorch_model.bin").write_bytes(b"")
    assert weights.list_hub_files(cache) == []
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("new\n")
    assert weights.list_hub_files(cache) == [cache / "snapshots/new/pytorch_model.bin"]


def test_a_folder_of_the_hub_is_named_for_clip(hub_folder):
    with pytest.raises(CalaError, match="Hugging Face's transformers"):
        read_tensors(hub_folder)
    (hub_folder / "model.safetensors").rename(hub_folder / "open_clip_model.safetensors")
    with pytest.raises(CalaError, match="give the file .*open_clip_model.safetensors"):
        read_tensors(hub_folder)


# Downloads


class Server:
    "A server on this machine that sends one answer."

    def __init__(self):
        self.status, self.headers, self.body, self.requests = 200, {}, b"", 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests += 1
                self.send_response(outer.status)
                for name, value in outer.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(outer.body)

            do_HEAD = do_GET

            def log_message(self, *args):
                pass

        self.http = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_a_file_is_fetched_once(server):
    server.body = b"weights" * 5000
    server.headers = {"Content-Length": str(len(server.body))}
    path = weights.fetch(server.url + "a.pth?download=1")
    assert path.name == "a.pth" and path.read_bytes() == server.body
    assert weights.fetch(server.url + "a.pth") == path and server.requests == 1
    assert [entry.name for entry in path.parent.iterdir()] == ["a.pth"]


@pytest.mark.parametrize(
    "status, length, body, reason",
    [
        (200, 100_000, b"PK" + b"x" * 500, "got only 502 out of 100000 bytes"),
        (200, None, b"", "cut short"),
        (200, None, PAGE, "web page"),
        (200, None, POINTER, "Git LFS"),
        (403, 0, b"", "HTTP Error 403"),
    ],
)
def test_what_is_no_whole_file_is_refused_and_not_kept(server, status, length, body, reason):
    server.status, server.body = status, body
    server.headers = {} if length is None else {"Content-Length": str(length)}
    with pytest.raises(
        CalaError, match=f"a.pth is missing .*{reason}.*published at {server.url}a.pth.*--backbone"
    ) as raised:
        weights.fetch(server.url + "a.pth")
    assert "\n" not in str(raised.value)
    assert not list(weights.cache_folder().iterdir())


def test_a_refusal_of_the_weights_server_is_one_line(server, monkeypatch):
    server.status = 403
    for name in ("LAVIS_FILES", "BERT_FILES"):
        monkeypatch.setattr(blip2, name, server.url)
    with pytest.raises(CalaError, match="blip2_pretrained_vitL.pth is missing.*--backbone-weights"):
        make_backbone("blip2")


def test_a_server_is_reachable_if_it_answers(server):
    assert weights.is_reachable(server.url)
    server.status = 404
    assert not weights.is_reachable(server.url) and weights.is_reachable(server.url, any_answer=True)
    assert not weights.is_reachable("http://127.0.0.1:9/", any_answer=True)


def test_a_path_is_made_absolute_and_a_url_stays():
    assert weights.make_absolute("a") == str(Path.cwd() / "a") and weights.make_absolute(None) is None
    assert weights.make_absolute(blip2.LAVIS_FILES) == blip2.LAVIS_FILES
    assert weights.find_neighbour("x/a.pth", "b.pth") == str(Path("x/b.pth"))
    assert weights.find_neighbour("https://example.org/x/a.pth", "b.pth") == "https://example.org/x/b.pth"


# LAVIS that fails

FAILURES = [
    RuntimeError("size mismatch for Qformer.cls.predictions.bias: 30523\nagainst 30522"),
    ImportError("cannot import name apply_chunking_to_forward"),
    OSError("Can't load tokenizer for 'bert-base-uncased'"),
]


@pytest.fixture
def broken_lavis(monkeypatch):
    "LAVIS whose `load_model` raises `failure`, and files that are all found."
    failure = []

    def load_model(*args, **options):
        raise failure[0]

    monkeypatch.setattr(blip2, "import_lavis", lambda: load_model)
    monkeypatch.setattr(blip2, "is_reachable", lambda url: True)
    monkeypatch.setattr(blip2, "find_file", lambda place, *rest: Path("found"))
    return failure


@pytest.mark.parametrize("model_name", blip2.PUBLISHED)
@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_lavis_that_fails_gives_way_to_our_own_reader(broken_lavis, failure, model_name, monkeypatch, capsys):
    broken_lavis.append(failure)
    monkeypatch.setattr(blip2, "read_published", lambda place, name: ("trunk", {"place": place, "name": name}))
    state = {"place": blip2.LAVIS_FILES + blip2.PUBLISHED[model_name].qformer, "name": model_name}
    assert blip2.read_parts(model_name) == ("trunk", state, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert str(failure).split("\n")[0] in line


@pytest.mark.parametrize("failure", [TypeError("unexpected keyword argument"), RuntimeError("built for NumPy 1")])
def test_lavis_that_cannot_be_imported_is_as_if_it_were_absent(monkeypatch, capsys, failure):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise failure

    monkeypatch.setitem(sys.modules, "lavis", types.ModuleType("lavis"))
    monkeypatch.setitem(sys.modules, "lavis.models", Broken("lavis.models"))
    assert blip2.import_lavis() is None
    assert str(failure) in capsys.readouterr().err


# The vocabulary


@pytest.mark.parametrize("start, newline", [("", "\n"), ("\ufeff", "\n"), ("\ufeff", "\r\n")])
def test_a_vocabulary_with_a_byte_order_mark_is_read(tmp_path, start, newline):
    text = start + newline.join(VOCABULARY) + newline
    (tmp_path / "vocab.txt").write_bytes(text.encode("utf-8"))
    assert blip2.read_pieces(tmp_path / "vocab.txt") == {piece: number for number, piece in enumerate(VOCABULARY)}

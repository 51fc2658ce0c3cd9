"Over a thousand damaged files: each is read rightly or refused in one line with file and entry, without a traceback."

import contextlib
import io
import json
import math
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cala.data import CIRR, FashionIQ, image_transform
from cala.encoders import make_backbone
from cala.errors import CalaError
from cala.library.cache import cache_tokens, open_tokens
from cala.library.checkpoint import save_checkpoint
from cala.library.checkpoint import seal as sealed
from cala.library.cli import run_command
from cala.library.submission import submission_faults
from cala.library.worlds.garments import draw_fashioniq
from cala.library.worlds.scenes import draw_cirr
from cala.model import CaLa
from cala.scripts import check, validate
from small_runs import lines_of

PUBLISHED = Path(__file__).parents[2] / "shared" / "data"


def seeded(examples):
    "The same examples in every run; hypothesis only looks for a smaller one when it has found a failure."
    return settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


# ---------------------------------------------------------------- what may happen to a file


class Skip(Exception):
    "This accident cannot happen to that content."


ODD = [
    None,
    True,
    False,
    0,
    -1,
    3,
    1.5,
    math.nan,
    math.inf,
    10**40,
    "",
    " ",
    "x",
    "../../secret",
    "/etc/passwd",
    "dev\\..\\x",
    "C:/x.png",
    "a\0b",
    "a\nb",
    "\ud800",
    "\u202e",
    "nom é ж 猫",
    "x" * 5000,
    "[]",
    [],
    [[]],
    [None],
    ["x"],
    {},
    {"x": {}},
    {"members": ["x"] * 6},
    [[[[[[[[]]]]]]]],
    ["x"] * 300,
]


def places(content, at=()):
    "Every place in a JSON value, from the top."
    yield at
    children = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, child in children:
        yield from places(child, (*at, key))


TO_CONTENT = "replace", "replace", "delete", "repeat", "rename", "copy from", "wrap", "append"
TO_BYTES = (
    "cut",
    "flip",
    "insert",
    "encode",
    "twice",
    "trailing",
    "nested",
    "a letter of latin-1",
    "a key twice",
    "blank",
)
accidents = st.tuples(
    st.sampled_from([*TO_CONTENT, *TO_CONTENT, *TO_BYTES]), st.integers(0, 2**64 - 1)
)  # what, and the seed of where and with what


def inside(content, at):
    for key in at:
        content = content[key]
    return content


def happen(content, how, chance):
    "`content` with one thing changed; `Skip` where that cannot be."
    content = {"top": json.loads(json.dumps(content))}
    everywhere = list(places(content))[1:]
    depth = chance.randint(
        1, max(map(len, everywhere))
    )  # a file, an entry, a field and its parts are equally likely, however many of each there are
    level = [at for at in everywhere if len(at) == depth]
    at, odd = chance.choice(level), chance.choice(ODD)
    parent, key = inside(content, at[:-1]), at[-1]
    if how == "replace":
        parent[key] = odd
    elif how == "delete" and depth > 1:
        del parent[key]
    elif how == "repeat" and isinstance(parent, list):
        parent.insert(chance.randint(0, len(parent)), parent[key])
    elif how == "rename" and isinstance(parent, dict) and depth > 1:
        parent[str(odd)] = parent.pop(key)
    elif how == "copy from":
        parent[key] = inside(content, chance.choice(level))
    elif how == "wrap":
        parent[key] = chance.choice([[parent[key]], {"x": parent[key]}])
    elif how == "append" and isinstance(parent[key], list):
        parent[key].append(odd)
    else:
        raise Skip
    return content["top"]


def happen_to_bytes(data, how, chance):
    at, few = chance.randrange(max(1, len(data))), chance.randint(1, 3)
    if how == "cut":
        return data[:at]
    if how == "flip":
        return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
    if how == "insert":
        return data[:at] + chance.randbytes(few) + data[at:]
    if how == "encode":
        return data.decode().encode(chance.choice(["utf-16", "utf-16-le", "utf-32", "utf-7", "utf-8-sig", "cp037"]))
    if how == "twice":
        return data + data
    if how == "trailing":
        return data + b"\n\n \t" + b"," * (few > 2)
    if how == "nested":
        return b"[" * chance.randint(900, 10**5)
    if how == "a letter of latin-1":
        return data.replace(b"a", b"\xe9", few)
    if how == "a key twice":
        return re.sub(rb'("\w[^"]*": )', rb'\1"x", \1', data, count=1)
    return b" \n" * few


def damaged(data, accident):
    "The bytes of a JSON file after an accident."
    how, chance = accident[0], random.Random(accident[1])
    if how in TO_CONTENT:
        return json.dumps(happen(json.loads(data), how, chance), indent=1).encode()
    return happen_to_bytes(data, how, chance)


# ---------------------------------------------------------------- annotations: what is right, said once more


class Wrong(Exception):
    "(file, number of the entry or None)"


def parsed(data, file, kind):
    def once(pairs):
        if len({key for key, _ in pairs}) < len(pairs):
            raise Wrong(file, None)
        return dict(pairs)

    try:
        content = json.loads(data.decode("utf-8-sig"), object_pairs_hook=once)
    except (ValueError, RecursionError):
        raise Wrong(file, None) from None
    if type(content) is not kind or not content:
        raise Wrong(file, None)
    return content


def text(value):
    try:
        return isinstance(value, str) and bool(value.encode()) | True
    except UnicodeEncodeError:
        return False


def plain(name):
    return text(name) and name.isprintable() and name not in ("", ".", "..") and not re.search(r"[/\\:]", name)


def right_cirr(names, captions, split):
    "Triplets (reference, text, target, pair id, group) as an attentive person would read them, or `Wrong`."
    for i, (name, path) in enumerate(parsed(names, "split", dict).items()):
        parts = path.split("/") if text(path) else ["/"]
        if (
            not plain(name)
            or not all(plain(part) for part in parts if part not in ("", "."))
            or path.startswith("/")
            or not any(p not in ("", ".") for p in parts)
        ):
            raise Wrong("split", i)
    known, read, ids = set(json.loads(names.decode("utf-8-sig"))), [], set()
    for i, entry in enumerate(parsed(captions, "cap", list)):
        fields = entry if isinstance(entry, dict) else {}
        reference, target, group = fields.get("reference"), fields.get("target_hard"), fields.get("img_set")
        members = group.get("members") if isinstance(group, dict) else None
        ends = [reference] if split == "test1" and "target_hard" not in fields else [reference, target]
        whole = isinstance(members, list) and all(isinstance(m, str) for m in members)
        good = (
            all(isinstance(e, str) and e in known for e in ends)
            and text(fields.get("caption"))
            and type(fields.get("pairid")) in (int, str)
            and whole
        )
        six = (
            good
            and len(members) == len(set(members)) == 6
            and set(members) <= known
            and set(ends) <= set(members)
            and str(fields["pairid"]) not in ids
        )
        if not good or not six and split != "train":
            raise Wrong("cap", i)
        ids.add(str(fields["pairid"]))
        read.append((reference, (fields["caption"],), target, str(fields["pairid"]), tuple(members)))
    if len({t[2] is None for t in read}) > 1:
        raise Wrong("cap", None)
    return read


def right_fashioniq(names, captions, split):
    listed = parsed(names, "split", list)
    for i, name in enumerate(listed):
        if not plain(name) or name in listed[:i]:
            raise Wrong("split", i)
    read = []
    for i, entry in enumerate(parsed(captions, "cap", list)):
        fields = entry if isinstance(entry, dict) else {}
        ends = [fields.get("candidate")] + ([fields.get("target")] if split != "test" or "target" in fields else [])
        said = fields.get("captions")
        if (
            not all(isinstance(e, str) and e in listed for e in ends)
            or not isinstance(said, list)
            or len(said) != 2
            or not all(map(text, said))
        ):
            raise Wrong("cap", i)
        read.append((fields["candidate"], tuple(said), fields.get("target"), f"dress-{i}", ()))
    if len({t[2] is None for t in read}) > 1:
        raise Wrong("cap", None)
    return read


# ---------------------------------------------------------------- annotations: real and drawn


def few_of_the_published(root):
    "The first fifteen entries of each published file, and the names that they use and some more."
    for folder, names_in, captions_in in (
        ("cirr_dataset", "cirr/image_splits", "cirr/captions"),
        ("fashionIQ_dataset", "image_splits", "captions"),
    ):
        for file in sorted((PUBLISHED / folder / captions_in).glob("cap.*.json")):
            entries = json.loads(file.read_text())[:15]
            names = json.loads(
                (file.parents[1] / names_in.split("/")[-1] / file.name.replace("cap", "split", 1)).read_text()
            )
            used = {
                value
                for entry in entries
                for field in entry.values()
                for value in [field, *(field.get("members", []) if isinstance(field, dict) else [])]
                if isinstance(value, str)
            }
            kept = [name for i, name in enumerate(names) if name in used or i < 5]
            for place, content in (
                (captions_in, entries),
                (names_in, {name: names[name] for name in kept} if isinstance(names, dict) else kept),
            ):
                path = (
                    root / folder / place / (file.name if content is entries else file.name.replace("cap", "split", 1))
                )
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(content))
    return root


def few_drawn(root):
    draw_cirr(root, train=3, val=3, test1=2, size=24)
    draw_fashioniq(root, train=8, val=6, test=4, size=24)
    return root


FILES = {  # data set and split: the two files, who reads them, and what is right
    ("CIRR", split): (
        f"cirr_dataset/cirr/image_splits/split.rc2.{split}.json",
        f"cirr_dataset/cirr/captions/cap.rc2.{split}.json",
        CIRR,
        right_cirr,
    )
    for split in ("train", "val", "test1")
} | {
    ("FashionIQ", split): (
        f"fashionIQ_dataset/image_splits/split.dress.{split}.json",
        f"fashionIQ_dataset/captions/cap.dress.{split}.json",
        FashionIQ,
        right_fashioniq,
    )
    for split in ("train", "val", "test")
}


@contextlib.contextmanager
def instead(path, data):
    "Other content in a file, while the block runs."
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(before)


def run_check(root):
    "Status and output of cala-check."
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_command(check.main.__wrapped__, ["--data-root", str(root)], prog="cala-check")
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("source, examples", [("drawn", 1300), ("real", 350)])
def test_damaged_annotations_are_read_rightly_or_refused_with_file_and_entry(tmp_path, source, examples):
    if source == "real" and not PUBLISHED.is_dir():
        pytest.skip("the published annotations are not here")
    root, count = (few_drawn if source == "drawn" else few_of_the_published)(tmp_path), Counter()

    @seeded(examples)
    @given(
        st.sampled_from([key for key, value in FILES.items() if (root / value[1]).is_file()]), st.booleans(), accidents
    )
    def one_accident(which, of_names, accident):
        names, captions, reader, right = FILES[which]
        victim = root / (names if of_names else captions)
        try:
            data = damaged(victim.read_bytes(), accident)
        except Skip:
            return
        with instead(victim, data):
            try:
                expected, wrong = right((root / names).read_bytes(), (root / captions).read_bytes(), which[1]), None
            except Wrong as error:
                expected, wrong = None, error.args
            found, said = read_by(reader, root, which[1])
            status, out, err = run_check(root / names.split("/")[0])
        count["right" if wrong is None else "refused"] += 1
        assert found == expected, said
        assert status in (0, 1) and not err, err
        if wrong is not None:
            assert_named(wrong, Path(captions if wrong[0] == "cap" else names).name, said, out)

    one_accident()
    assert (
        count.total() > (1000 if source == "drawn" else 250) and min(count["right"], count["refused"]) > 0.15 * examples
    ), count


def read_by(reader, root, split):
    "What cala reads, or the line with which it refuses."
    options = dict(categories=["dress"]) if reader is FashionIQ else {}
    try:
        return [
            (t.reference, t.captions, t.target, t.pair_id, t.group) for t in reader(root, split, **options).triplets
        ], None
    except CalaError as error:
        return None, str(error)


def assert_named(wrong, file, said, out):
    assert "\n" not in said and len(said) < 1000
    assert (f"{file} entry {wrong[1]}: " if wrong[1] is not None else file) in said
    assert file in out and "must be corrected" in out.splitlines()[-1]


# ---------------------------------------------------------------- recipes of checkpoints


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A drawn validation split, a checkpoint, and what cala-validate prints of it."
    folder = tmp_path_factory.mktemp("small")
    draw_cirr(folder, train=1, val=2, test1=9, size=24)
    backbone = make_backbone("tiny", vocabulary=["red", "star"], size=16, width=16, heads=2, layers=1, queries=2)
    save_checkpoint(
        CaLa(backbone, tac_weight=0.0, hca_weight=0.0),
        folder / "best",
        recipe=dict(dataset="CIRR", transform="squarepad", target_ratio=1.25),
        metrics=dict(epoch=3),
    )
    return folder


def judged(folder, output):
    "Status of cala-validate, its result, and what it complains of."
    words = ["--checkpoint", folder / "best", "--data-root", folder, "--device", "cpu", "--output", output]
    err, status = io.StringIO(), 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            run_command(validate.main.__wrapped__, [str(word) for word in words], prog="cala-validate")
        except SystemExit as end:
            status = end.code
    return (
        status,
        json.loads((output / "result.json").read_text())["result"] if status == 0 else None,
        lines_of(err.getvalue()),
    )


def too_large(value):
    "A size that would be built for ever: cala does not judge sizes, and a file with one has to be stopped by hand."
    if isinstance(value, dict):
        return any(map(too_large, value.values()))
    return isinstance(value, (int, float)) and not abs(value) < 10**6


def test_a_damaged_recipe_is_read_rightly_or_refused_even_if_its_seal_was_made_anew(small, tmp_path):
    path, count = small / "best/recipe.json", Counter()
    good, (status, right, _) = path.read_bytes(), judged(small, tmp_path)
    assert status == 0

    @seeded(150)
    @given(accidents, st.booleans())
    def one_accident(accident, seal):
        try:
            data = damaged(good, accident)
        except Skip:
            return
        with contextlib.suppress(ValueError, RecursionError):
            said = json.loads(data)
            if isinstance(said, dict) and too_large(said.get("backbone")):
                return
            if seal and isinstance(said, dict):
                data = json.dumps(sealed({key: value for key, value in said.items() if key != "seal"})).encode()
        with instead(path, data):
            status, found, complaints = judged(small, tmp_path)
        count[status] += 1
        assert status in (0, 2) and (status == 0 or len(complaints) == 1 and len(complaints[0]) < 1000), complaints
        if status == 0:
            assert seal or found == right

    one_accident()
    assert count[0] > 10 and count[2] > 50, count


def test_damaged_annotations_end_cala_validate_in_a_result_or_in_one_line(small, tmp_path):
    count = Counter()

    @seeded(60)
    @given(st.booleans(), accidents)
    def one_accident(of_names, accident):
        victim = small / FILES["CIRR", "val"][0 if of_names else 1]
        try:
            data = damaged(victim.read_bytes(), accident)
        except Skip:
            return
        with instead(victim, data):
            status, found, complaints = judged(small, tmp_path)
        count[status] += 1
        assert status in (0, 2) and (status == 0 or len(complaints) == 1 and len(complaints[0]) < 1000), complaints

    one_accident()
    assert min(count[0], count[2]) > 5, count


# ---------------------------------------------------------------- notes of a token cache


class Trunk(torch.nn.Module):
    def forward(self, pictures):
        return pictures.flatten(2).transpose(1, 2)[:, :4]


def header_of(data):
    "A safetensors file's header and what follows it."
    end = 8 + int.from_bytes(data[:8], "little")
    return data[8:end], data[end:]


def with_header(header, rest):
    return len(header).to_bytes(8, "little") + header + rest


def test_damaged_notes_of_a_cache_cost_time_and_nothing_else(small, tmp_path):
    gallery = CIRR(small, "val", transform=image_transform("targetpad", 16)).gallery

    def make():
        return cache_tokens(Trunk(), gallery, tmp_path / "cache")

    right, place, count = make()[:], make().place, Counter()
    kept = {path.name: path.read_bytes() for path in place.iterdir()}
    (tokens,) = set(kept) - {"about.json"}
    header, rest = header_of(kept[tokens])

    @seeded(150)
    @given(st.sampled_from(["about.json", "header", "marks"]), accidents)
    def one_accident(what, accident):
        try:
            if what == "about.json":
                data = {what: damaged(kept[what], accident)}
            elif what == "header":
                data = {tokens: with_header(damaged(header, accident), rest)}
            else:
                said = json.loads(header)
                said["__metadata__"]["marks"] = damaged(said["__metadata__"]["marks"].encode(), accident).decode(
                    errors="replace"
                )
                data = {tokens: with_header(json.dumps(said).encode(), rest)}
        except Skip:
            return
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        for file, content in (kept | data).items():
            (place / file).write_bytes(content)
        try:
            assert torch.equal(open_tokens(Trunk(), gallery, tmp_path / "cache")[:], right)
            count["right"] += 1
        except CalaError as error:
            count["refused"] += 1
            assert "\n" not in str(error)
        assert torch.equal(make()[:], right)

    one_accident()
    assert min(count["right"], count["refused"]) > 20, count


@seeded(60)
@given(accidents)
def test_where_there_is_no_cache_a_damaged_note_of_another_one_is_no_matter(small, accident):
    gallery, folder = CIRR(small, "val", transform=image_transform("targetpad", 16)).gallery, small / "caches"
    note = folder / "another/about.json"
    note.parent.mkdir(parents=True, exist_ok=True)
    try:
        note.write_bytes(
            damaged(
                json.dumps(dict(version=1, weights="a", transform="b", dtype="float32", names="c")).encode(), accident
            )
        )
    except Skip:
        return
    with pytest.raises(CalaError, match="build these with"):
        open_tokens(Trunk(), gallery, folder)


# ---------------------------------------------------------------- submissions


def acceptable(content, data, metric):
    "The server's rules, said once more."
    if not isinstance(content, dict) or content.get("version") != "rc2" or content.get("metric") != metric:
        return False
    answers = {key: value for key, value in content.items() if key not in ("version", "metric")}
    if {t.pair_id for t in data.triplets} != set(answers):
        return False
    for triplet in data.triplets:
        names = answers[triplet.pair_id]
        if not isinstance(names, list) or not all(isinstance(n, str) and n in data.gallery.names for n in names):
            return False
        if len(names) != 50 or len(set(names)) != 50 or triplet.reference in names:
            return False
    return True


def test_a_damaged_submission_is_noticed(small, tmp_path):
    data, count = CIRR(small, "test1"), Counter()

    def names(triplet):
        return [name for name in data.gallery.names if name != triplet.reference][:50]

    good = json.dumps(dict(version="rc2", metric="recall") | {t.pair_id: names(t) for t in data.triplets[:]}).encode()

    @seeded(150)
    @given(accidents)
    def one_accident(accident):
        try:
            content = damaged(good, accident)
        except Skip:
            return
        (tmp_path / "file.json").write_bytes(content)
        try:
            expected = acceptable(parsed(content, "", dict), data, "recall") and not content.startswith(b"\xef\xbb\xbf")
        except Wrong:
            expected = False
        faults = submission_faults(tmp_path / "file.json", data)
        count[expected] += 1
        assert (not faults) == expected and all("\n" not in fault for fault in faults), faults

    one_accident()
    assert count[True] > 5 and count[False] > 80, count

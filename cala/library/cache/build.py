"""Building a cache: which pictures are missing, what they cost, and the work itself, shared by several processes.

Loader workers decode pictures, the module computes their rows, and each shard is written as soon as it is complete. A
build that is killed goes on where it stopped. With several processes, process i of n builds the shards whose number
leaves the remainder i when divided by n, so that no two processes write the same file.
"""

import logging
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any
from typing import NamedTuple

import torch
from torch import distributed
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset

from ...data import Gallery
from ...errors import CalaError
from ...errors import is_or_are
from ...progress import show_progress
from ...retrieval import evaluating
from ..files import FileMark
from ..files import mark_file
from .files import OTHER_FOLDER
from .files import Shard
from .files import cache_place
from .files import describe_cache
from .files import find_cache
from .files import fingerprint
from .files import finished_rows
from .files import save_shard
from .files import shard_number
from .files import shard_path
from .files import shard_rows
from .files import unfinished_rows
from .files import write_description

# Pictures and the rows that a module computes from them


class GalleryRows(Dataset):
    "Rows of a gallery: (row, mark of its picture, picture), or (row, None, message) if the picture cannot be read."

    def __init__(
        self,
        gallery: Gallery,
        rows: list[int],
        tokens: Any = None,  # a TokenCache to read instead of pictures
    ):
        self.gallery, self.rows, self.tokens = gallery, rows, tokens

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[int, FileMark | None, torch.Tensor | str]:
        row = self.rows[i]
        try:
            if self.tokens is None:
                return row, mark_file(self.gallery.paths[row]), self.gallery[row]
            return row, self.tokens.mark(row), self.tokens[row]
        except (CalaError, OSError) as error:  # a message, because an exception would bring a worker's traceback along
            return row, None, str(error)


class RowBatch(NamedTuple):
    "Some rows of a gallery."

    rows: list[int]
    marks: list[FileMark]
    inputs: torch.Tensor  # (B, 3, H, W) pictures, or (B, N, w) tokens
    error: str = ""  # the first picture that cannot be read; the other fields are empty then


def collate_rows(
    items: list[tuple],  # from `GalleryRows`
) -> RowBatch:
    "One batch of rows."
    for _, mark, message in items:
        if mark is None:
            return RowBatch([], [], torch.empty(0), message)
    rows, marks, inputs = zip(*items, strict=True)
    return RowBatch(list(rows), list(marks), torch.stack(inputs))


def run_trunk(
    trunk: nn.Module,  # pictures or tokens -> (B, N, w); on its device
    inputs: torch.Tensor,  # (B, 3, H, W) or (B, N, w)
    dtype: str,  # float16 or float32
    batch_size: int = 64,  # inputs at a time
) -> torch.Tensor:  # (B, N, w), on the CPU
    "The output of a frozen module, in evaluation mode; `CalaError` if `dtype` cannot hold it."
    device = next((p.device for p in trunk.parameters()), torch.device("cpu"))
    with evaluating(trunk):
        parts = [trunk(part.to(device)).to(getattr(torch, dtype)).cpu() for part in inputs.split(batch_size)]
    outputs = torch.cat(parts).contiguous()
    if outputs.ndim != 3:
        raise CalaError(f"a trunk must give tokens (B, N, w), and this one gives {tuple(outputs.shape)}")
    if not outputs.isfinite().all():
        advice = "; use float32" if dtype == "float16" else ""
        raise CalaError(f"the trunk gives values that {dtype} cannot hold{advice}")
    return outputs


# What a cache costs


class Estimate(NamedTuple):
    "What it takes to finish a cache."

    shape: tuple[int, ...]  # (pictures, N, w)
    row_bytes: int  # on disk, for one picture
    todo: int  # pictures to compute
    seconds: float  # for those, on this machine

    @property
    def total_bytes(self) -> int:  # of the whole cache
        return self.shape[0] * self.row_bytes

    @property
    def bytes_to_write(self) -> int:
        return self.todo * self.row_bytes

    def __str__(self) -> str:
        pictures, *values = (f"{n:,}" for n in self.shape)
        size, duration = format_bytes(self.total_bytes), format_seconds(self.seconds)
        return f"{pictures} pictures x {' x '.join(values)} values, {size}; {self.todo:,} to do, about {duration}"


def format_bytes(
    size: float,  # bytes
) -> str:
    "A size in a unit that suits it."
    if size >= 1e9:
        return f"{size / 1e9:.1f} GB"
    if size >= 1e5:
        return f"{size / 1e6:.1f} MB"
    return f"{size / 1e3:.1f} KB"


def format_seconds(
    seconds: float,
) -> str:
    "A duration in a unit that suits it."
    return f"{seconds / 60:.0f} minutes" if seconds > 99 else f"{seconds:.0f} s"


def check_disk_space(
    place: Path,  # the folder of a cache, or a folder that will hold one
    size: int,  # bytes that will be written
):
    "`CalaError` if the disk has no room."
    existing = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if size > free:
        needed, left = format_bytes(size), format_bytes(free)
        raise CalaError(f"the cache needs {needed}, {existing} has {left} free; {OTHER_FOLDER}, or use float16")


# Several processes


def process_index_and_count() -> tuple[int, int]:
    "The number of this process and how many there are; (0, 1) if torch.distributed is not running."
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def log_once(
    message: str,
    level: int = logging.INFO,
):
    "Write a message to the logger `cala`, on the first process only."
    if process_index_and_count()[0] == 0:
        logging.getLogger("cala").log(level, message)


def run_on_all_processes(
    work: Callable,  # without arguments
):
    "Run `work` on every process and wait for all; an error of one process is raised on all of them."
    error = None
    try:
        work()
    except CalaError as raised:
        error = raised
    _, count = process_index_and_count()
    errors: list[CalaError | None] = [error]
    if count > 1:
        errors = [None] * count
        distributed.all_gather_object(errors, error)
    for each in errors:
        if each is not None:
            raise each


# The build


class CacheBuild:
    "The work that is left until a cache is complete. Nothing is written before `run`."

    def __init__(
        self,
        module: nn.Module,  # frozen, on its device: pictures (B, 3, H, W) or tokens (B, N, w) -> (B, M, d)
        gallery: Gallery,  # pictures with their transform
        folder: str | Path,  # holds all caches
        dtype: str = "float32",  # or float16
        batch_size: int = 64,  # inputs of the module at a time
        num_workers: int = 0,  # processes that decode
        weights: str | None = None,  # `fingerprint(module)`, if it is known
        tokens: Any = None,  # a TokenCache of the gallery that the module reads instead of pictures
        trunk: nn.Module | None = None,  # in an estimate, makes these tokens while the cache is not there yet
    ):
        self.module, self.gallery, self.folder, self.dtype = module, gallery, folder, dtype
        self.batch_size, self.num_workers = batch_size, num_workers
        self.tokens, self.trunk = tokens, trunk
        self.about = describe_cache(weights or fingerprint(module), gallery, dtype)
        self.place = cache_place(folder, self.about)
        self.rows = unfinished_rows(gallery, self.find_finished_rows())
        if self.rows and gallery.missing:
            count = f"{len(gallery.missing):,} of {len(gallery):,} pictures {is_or_are(len(gallery.missing))}"
            raise CalaError(f"{count} missing; cala-check lists what is missing")

    def find_finished_rows(self) -> dict[int, FileMark]:
        "The rows that are on disk, with the marks of their pictures; a damaged shard counts as absent."
        finished, errors = finished_rows(self.place)
        for error in errors:
            log_once(f"{error}: its pictures are computed again", logging.WARNING)
        return finished

    @cached_property
    def cost(self) -> Estimate:
        "Size and time, estimated from eight pictures."
        sample = GalleryRows(self.gallery, self.rows[:8] or [0], self.tokens)
        process, processes = process_index_and_count()
        with show_progress(None, "estimate", 3, "steps", is_hidden=process > 0, is_part=True) as bar:
            start = perf_counter()
            batch = collate_rows([sample[i] for i in range(len(sample))])
            read_seconds = (perf_counter() - start) / len(sample)
            if batch.error:
                raise CalaError(batch.error)
            inputs = batch.inputs
            if self.trunk is not None and self.tokens is None:
                inputs, read_seconds = run_trunk(self.trunk, inputs, "float32"), 0.0
            bar.update()
            run_trunk(self.module, inputs[:1], self.dtype)  # warm-up
            bar.update()
            start = perf_counter()
            outputs = run_trunk(self.module, inputs, self.dtype)
            compute_seconds = (perf_counter() - start) / len(sample)
            bar.update()
        if self.num_workers:  # workers read while the module computes: the slower of the two decides
            seconds = max(read_seconds / self.num_workers, compute_seconds)
        else:
            seconds = read_seconds + compute_seconds
        shape = (len(self.gallery), *outputs.shape[1:])
        return Estimate(shape, outputs[0].nbytes, len(self.rows), seconds * len(self.rows) / processes)

    def run(
        self,
        part: tuple[int, int]
        | None = None,  # which part of how many; None: this process's, as torch.distributed has it
    ):
        "Compute and write the rows of this process, a shard at a time."
        index, count = part or process_index_and_count()
        rows = [row for row in self.rows if shard_number(row) % count == index]
        if not rows:
            return
        check_disk_space(self.place, self.cost.row_bytes * len(rows))
        log_once(f"{self.cost}, in {self.place}")
        write_description(self.place, self.about)
        dataset = GalleryRows(self.gallery, rows, self.tokens)
        shards = {}
        for i, row in enumerate(rows):
            shards.setdefault(shard_number(row), []).append(i)
        loader = DataLoader(
            dataset, batch_sampler=list(shards.values()), collate_fn=collate_rows, num_workers=self.num_workers
        )
        with show_progress(None, "cache", len(rows), "pictures", is_hidden=index > 0) as bar:
            for number, batch in zip(shards, loader, strict=True):
                if batch.error:
                    raise CalaError(batch.error)
                outputs = run_trunk(self.module, batch.inputs, self.dtype, self.batch_size)
                self._save(number, batch, outputs)
                bar.update(len(batch.rows))

    def finish(self) -> Path:
        "Compute what is missing, on all processes together, and give the folder of the complete cache."
        run_on_all_processes(self.run)
        return find_cache(self.gallery, self.folder, self.about)

    def _save(self, number, batch, outputs):
        "Write a shard: the new rows, and the rows of the old file that are still good."
        rows = shard_rows(number, len(self.gallery))
        path = shard_path(self.place, number)
        marks = batch.marks
        if len(batch.rows) < len(rows):
            old = Shard(path)
            new = {row: (output, mark) for row, output, mark in zip(batch.rows, outputs, marks, strict=True)}
            merged = [new[row] if row in new else (old.read_row(row), old.mark(row)) for row in rows]
            outputs, marks = torch.stack([output for output, _ in merged]), [mark for _, mark in merged]
        save_shard(path, outputs, marks)

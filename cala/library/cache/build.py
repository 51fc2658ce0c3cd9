"""Building a cache: which pictures are missing, what they cost, and the work itself, shared by several processes.

Loader workers decode pictures, the module computes their rows, and each shard is written as soon as it is complete. A
build that is killed goes on where it stopped. With several processes, process i of n builds the shards whose number
leaves the remainder i when divided by n, so that no two processes write the same file.
"""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, Dataset

from ...data import Gallery
from ...errors import CalaError, is_or_are
from ...progress import show_progress
from ...retrieval import evaluating
from ..cli import one_line
from ..files import FileMark, mark_file
from .files import (
    OTHER_FOLDER,
    Shard,
    cache_place,
    describe_cache,
    find_cache,
    fingerprint,
    finished_rows,
    save_shard,
    shard_number,
    shard_path,
    shard_rows,
    unfinished_rows,
    write_description,
)

# Pictures and the rows that a module computes from them


@dataclass
class GalleryRows(Dataset):
    "Rows of a gallery: the number of a row, the mark of its picture, and the picture or its tokens."

    gallery: Gallery
    rows: list[int]
    tokens: Any = None  # a TokenCache to read instead of pictures

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[int, FileMark, torch.Tensor]:
        row = self.rows[i]
        if self.tokens is not None:
            return row, self.tokens.mark(row), self.tokens[row]
        try:
            return row, mark_file(self.gallery.paths[row]), self.gallery[row]
        except OSError as error:
            raise CalaError(str(error)) from error


def collate_rows(
    items: list[tuple],  # from `GalleryRows`
) -> tuple[tuple, tuple, torch.Tensor]:  # rows; their marks; (B, 3, H, W) pictures, or (B, N, w) tokens
    "One batch of rows."
    rows, marks, inputs = zip(*items, strict=True)
    return rows, marks, torch.stack(inputs)


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
) -> int:
    "Bytes that are free on the disk; `CalaError` if they are not enough."
    existing = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if size > free:
        needed, left = format_bytes(size), format_bytes(free)
        raise CalaError(f"the cache needs {needed}, {existing} has {left} free; {OTHER_FOLDER}, or use float16")
    return free


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
        error = CalaError(one_line(raised))  # without the traceback that a loader worker brings along
    errors: list[CalaError | None] = [error] * process_index_and_count()[1]
    if len(errors) > 1:
        distributed.all_gather_object(errors, error)
    for each in errors:
        if each is not None:
            raise each


# The build


@dataclass
class CacheBuild:
    "The work that is left until a cache is complete. Nothing is written before `run`."

    module: nn.Module  # frozen, on its device: pictures (B, 3, H, W) or tokens (B, N, w) -> (B, M, d)
    gallery: Gallery  # pictures with their transform
    folder: str | Path  # holds all caches
    dtype: str = "float32"  # or float16
    batch_size: int = 64  # inputs of the module at a time
    num_workers: int = 0  # processes that decode
    weights: str | None = None  # `fingerprint(module)`, if it is known
    tokens: Any = None  # a TokenCache of the gallery that the module reads instead of pictures
    trunk: nn.Module | None = None  # in an estimate, makes these tokens while the cache is not there yet

    def __post_init__(self):
        gallery = self.gallery
        self.about = describe_cache(self.weights or fingerprint(self.module), gallery, self.dtype)
        self.place = cache_place(self.folder, self.about)
        finished, errors = finished_rows(self.place)
        for error in errors:
            log_once(f"{error}: its pictures are computed again", logging.WARNING)
        self.rows = unfinished_rows(gallery, finished)
        if self.rows and gallery.missing:
            count = f"{len(gallery.missing):,} of {len(gallery):,} pictures {is_or_are(len(gallery.missing))}"
            raise CalaError(f"{count} missing; cala-check lists what is missing")

    @cached_property
    def cost(self) -> Estimate:
        "Size and time, estimated from eight pictures."
        sample = GalleryRows(self.gallery, self.rows[:8], self.tokens)
        process, processes = process_index_and_count()
        with show_progress(None, "estimate", 3, "steps", is_hidden=process > 0, is_part=True) as bar:
            start = perf_counter()
            inputs = torch.stack([sample[i][-1] for i in range(len(sample))])
            read_seconds = (perf_counter() - start) / len(sample)
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

    def run(self):
        "Compute and write the rows of this process, a shard at a time."
        index, count = process_index_and_count()
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
            for new_rows, marks, inputs in loader:
                self._save(new_rows, marks, run_trunk(self.module, inputs, self.dtype, self.batch_size))
                bar.update(len(new_rows))

    def finish(self) -> Path:
        "Compute what is missing, on all processes together, and give the folder of the complete cache."
        run_on_all_processes(self.run)
        return find_cache(self.gallery, self.folder, self.about)

    def _save(self, new_rows, marks, outputs):
        "Write a shard: the new rows, and the rows of the old file that are still good."
        number = shard_number(new_rows[0])
        rows, path = shard_rows(number, len(self.gallery)), shard_path(self.place, number)
        content = dict(zip(new_rows, zip(outputs, marks, strict=True), strict=True))
        if len(content) < len(rows):
            old = Shard(path)
            content = {row: (old.read_row(row), old.marks[row]) for row in rows} | content
        values, marks = zip(*content.values(), strict=True)
        save_shard(path, torch.stack(values), marks)

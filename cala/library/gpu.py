"""All that only a GPU can show, in one command: tests, and measurements beside the limits of the device.

The parts stand in the order of their value. Each prints as it goes. A part that fails is noted with its error, and the
next part begins; no part begins after the time is over. gpu.json is written after every part.
"""

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import torch
from accelerate.utils.memory import clear_device_cache
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import cala

from ..composition import Sum
from ..encoders import make_backbone
from ..errors import CalaError
from ..model import CaLa
from ..retrieval import rank_queries
from .benchmark import (
    Limits,
    collate_first,
    describe_conditions,
    draw_batch_world,
    make_benchmark_model,
    measure_epoch,
    measure_limits,
    measure_optimizer,
    measure_steps,
    run_step,
    time_call,
)
from .cache.build import format_bytes
from .cli import one_line
from .files import write_atomically
from .flags import Benchmark
from .loading import find_device

TESTS = Path(cala.__file__).parents[1] / "tests" / "test_gpu.py"
SECONDS = 440  # after this no part begins
LAST_CHANCE = 20  # a part gets at least this many seconds
CIRR_TRIPLETS = 28_225  # to train on


@dataclass
class Bench:
    "What every part needs."

    flags: Benchmark  # with the sizes of this machine
    device: torch.device
    limits: Limits
    folder: Path  # for worlds and caches

    @cached_property
    def model(self) -> CaLa:
        "BLIP-2's shapes, with random weights."
        return make_benchmark_model(self.flags, self.device)


def choose_sizes(
    flags: Benchmark,  # with `gpu`
) -> Benchmark:
    "BLIP-2's full size in bf16 on the GPU, or a small size on the CPU with --dry."
    if flags.dry:
        small = dict(size="small", batch_size=4, repeats=1, triplets=10, modes=("multi",))
        return replace(flags, device="cpu", precision="bf16", **small)
    if not torch.cuda.is_available():
        raise CalaError("--gpu: torch finds no GPU here; --gpu --dry runs the same on the CPU at reduced shapes")
    return replace(flags, size="full", batch_size=64, precision="bf16", device="cuda", repeats=5, triplets=640)


def make_row(
    name: str,
    value: str,
    amount: float,  # FLOP or bytes
    seconds: float,
    limit: float,  # FLOP/s or bytes/s
) -> dict[str, str]:
    "A figure, with its share of the limit."
    return {"name": name, "value": value, "of limit": f"{amount / seconds / limit:.1%}"}


# The parts; each gives rows with `name`, `value` and `of limit` for the table at the end; rows before an error count


def run_tests(
    bench: Bench,
    seconds: float,  # that they may take
) -> list[dict[str, str]]:
    "Run the tests that are marked `gpu`."
    if not TESTS.is_file():
        raise CalaError(f"no {TESTS}: the tests come with the source of the project, not with the package")
    report = bench.folder / "tests.xml"
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}", str(TESTS)]
    environment = dict(os.environ, CALA_TEST_DEVICE=bench.device.type)
    try:
        status = subprocess.run(words, cwd=TESTS.parents[1], env=environment, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        raise CalaError(f"the tests took more than {seconds:.0f} s and were stopped") from None
    suite = ElementTree.parse(report).getroot().find("testsuite") if report.is_file() else None
    failed = [] if suite is None else [case.get("name", "") for case in suite if case.find("failure") is not None]
    if suite is None or (status and not failed):
        raise CalaError(f"pytest ended with status {status}; its own lines say why")
    counts = [f"{suite.get(name)} {name}" for name in ("tests", "failures", "errors", "skipped")]
    return [dict(name="tests", value=", ".join(counts)), *(dict(name="failed", value=name) for name in failed)]


def measure_step(
    bench: Bench,
    seconds: float,  # unused: the number of repeats is fixed
) -> Iterator[dict[str, str]]:
    "Steps of all levels, AdamW, and the ten largest kernels of a step."
    model = bench.model
    data = draw_batch_world(bench.flags, model, bench.folder / "world")
    steps = measure_steps(bench.flags, model, data, bench.folder, bench.device)
    print(steps.to_string(index=False))
    for step in steps.to_dict("records"):
        name, seconds = f"step, {step['mode']}, {step['level']}", step["seconds"]
        value = f"{seconds:.4f} s, loss {step['loss']:.4f}, {format_bytes(step['memory'])}"
        if not bench.flags.dry:
            value += f", speed-up {step['ratio']:.2f}"
        yield make_row(name, value, step["flops"], seconds, bench.limits.flops)
    update = measure_optimizer(bench.flags, model)
    seconds = update["fused"]
    yield make_row("AdamW, fused", f"{seconds:.4f} s", update["bytes"], seconds, bench.limits.bandwidth)
    batch = collate_first(data, bench.flags.batch_size)
    yield from list_kernels(bench, partial(run_step, bench.flags, model.train(), batch, bench.device))


def list_kernels(
    bench: Bench,
    work: Callable,  # without arguments
) -> list[dict[str, str]]:
    "The ten kernels that take longest, with their shares of the time."
    is_cuda = bench.device.type == "cuda"
    work()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]) as profiler:
        work()
    column = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    averages = profiler.key_averages()
    print(averages.table(sort_by=column, row_limit=10, max_name_column_width=60))
    device_type = DeviceType.CUDA if is_cuda else DeviceType.CPU
    events = [event for event in averages if event.device_type == device_type]
    times = pd.Series([getattr(event, column) for event in events], [event.key for event in events], float)
    shares = (times / times.sum()).nlargest(10)
    return [dict(name=f"kernel {name[:60]}", value=f"{share:.1%} of a step") for name, share in shares.items()]


def measure_trunks(
    bench: Bench,
    seconds: float,  # unused
) -> Iterator[dict[str, str]]:
    "The trunks of CLIP RN50x4 and of BLIP-2 in bf16."
    flags = bench.flags
    for name, options in dict(clip=dict(model_name="RN50x4"), blip2={}).items():
        backbone = make_backbone(name, **options, random_weights=flags.size, precision="bf16").to(bench.device).eval()
        pictures = torch.randn(flags.batch_size, 3, backbone.size, backbone.size, device=bench.device)
        read = torch.no_grad()(partial(backbone.trunk, pictures))
        with FlopCounterMode(display=False) as counter:
            read()
        seconds = time_call(read, flags.repeats)
        title = " ".join(["trunk of", name, *options.values()])
        value = f"{len(pictures) / seconds:,.0f} pictures/s"
        yield make_row(title, value, counter.get_total_flops(), seconds, bench.limits.flops)


def measure_large_ranking(
    bench: Bench,
    seconds: float,  # unused
) -> Iterator[dict[str, str]]:
    "Rank a million pictures for ten thousand queries, in float32."
    queries, pictures, width = (1_000, 10_000, 64) if bench.flags.dry else (10_000, 1_000_000, 640)
    gallery = torch.randn(pictures, width, device=bench.device)
    reference, text = torch.randn(2, queries, width, device=bench.device)
    targets = torch.randint(pictures, (queries,))
    seconds = time_call(partial(rank_queries, Sum(), reference, text, gallery, targets), bench.flags.repeats)
    title, flops = f"{queries:,} queries, {pictures:,} pictures", 2 * queries * pictures * width
    yield make_row(title, f"{seconds:.2f} s", flops, seconds, bench.limits.flops32)


def measure_short_epoch(
    bench: Bench,
    seconds: float,  # unused
) -> Iterator[dict[str, str]]:
    "A few steps and a validation with loading, extrapolated to an epoch of CIRR."
    for epoch in measure_epoch(bench.flags, bench.model, bench.folder / "short", bench.device).to_dict("records"):
        factor = CIRR_TRIPLETS / epoch["triplets"]
        for layout in ("released", "ours"):
            training, validation = (epoch[f"{layout}_{name}"] * factor for name in ("training", "validation"))
            title = f"epoch of CIRR, extrapolated, {epoch['mode']}, {layout}"
            value = f"{training:,.0f} s, validation {validation:,.0f} s, from {epoch['triplets']} triplets"
            yield make_row(title, value, epoch[f"{layout}_flops"] * factor, training, bench.limits.flops)
        yield dict(name=f"recalls, {epoch['mode']}", value=f"differ by {epoch['recalls']:.2g} at most")


PARTS = dict(
    tests=run_tests,
    step=measure_step,
    trunk=measure_trunks,
    ranking=measure_large_ranking,
    epoch=measure_short_epoch,
)

# All of them


def run_part(
    part: Callable,  # one of `PARTS`
    bench: Bench,
    seconds: float,  # left
) -> dict[str, Any]:  # state, seconds, rows, note
    "Run a part; an error ends only this part."
    start, rows, state, note = perf_counter(), [], "done", ""
    if seconds < LAST_CHANCE:
        return dict(state="left out", seconds=0.0, rows=rows, note="the time was over")
    try:
        for row in part(bench, seconds):
            rows.append(row)
            if row["name"] == "failed":
                state = "failed"
    except Exception as error:  # whatever it is, the other parts are still worth their time
        state, note = "failed", f"{type(error).__name__}: {one_line(error)[:300]}"
        if not isinstance(error, CalaError):
            traceback.print_exc()
    clear_device_cache(garbage_collection=True)
    return dict(state=state, seconds=round(perf_counter() - start, 1), rows=rows, note=note)


def make_table(
    parts: dict[str, dict],  # from `run_part`
    with_shares: bool,  # of limits; at reduced shapes they mean nothing, because most of the time is overhead
) -> str:
    "One table of everything."
    rows = []
    for name, part in parts.items():
        rows.append({"part": name, "name": f"{part['state']}, {part['seconds']:.0f} s", "value": part["note"]})
        rows += [dict(part="") | row for row in part["rows"]]
    texts = ["part", "name", "value"]
    table = pd.DataFrame(rows, columns=[*texts, "of limit"] if with_shares else texts).fillna("")
    table[texts] = table[texts].apply(lambda column: column.str.ljust(column.str.len().max()))
    return table.to_string(index=False, justify="left")


def run_parts(
    flags: Benchmark,  # with `gpu`
    folder: Path,  # for gpu.json
) -> dict[str, Any]:  # device, versions, command, limits, parts
    "Run all parts, print one table and write gpu.json."
    start, given = perf_counter(), flags
    flags = choose_sizes(flags)
    device = find_device(flags.device)
    limits, parts = measure_limits(flags, device), {}
    results = describe_conditions(given, device) | dict(limits=limits._asdict(), parts=parts)
    print(f"{results['device']}; torch {torch.__version__}; {limits.flops / 1e12:.3g} TFLOP/s in bf16, ", end="")
    print(f"{limits.flops32 / 1e12:.3g} in float32, {limits.bandwidth / 1e9:.4g} GB/s", flush=True)
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(flags, device, limits, Path(place))
        for name, part in PARTS.items():
            elapsed = perf_counter() - start
            print(f"\n[{elapsed:3.0f} s] {name}: {(part.__doc__ or '').splitlines()[0]}", flush=True)
            parts[name] = run_part(part, bench, SECONDS - elapsed)
            print(f"{parts[name]['state']} {parts[name]['note']}", flush=True)
            write_atomically(folder / "gpu.json", json.dumps(results, indent=1).encode())
    print(f"\n{make_table(parts, with_shares=not flags.dry)}")
    shares = "at reduced shapes no share of a limit is shown" if flags.dry else "shares are of the limits above"
    print(f"{perf_counter() - start:.0f} s; {shares}; all of it is in {folder / 'gpu.json'}")
    return results

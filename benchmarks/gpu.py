"""Checks and times everything on one accelerator, ours and Hugging Face's in turn: `python -m benchmarks.gpu`.

    python -m benchmarks.gpu [--size=tiny|base|large] [--output=FILE] [--sections=machine,parity,...] [--budget=SECONDS]

Run it from the root of a checkout; nothing needs to be installed but jax, flax, optax, numpy and, for the peer, torch
and transformers. Models are random, so no weights are read. FILE holds every row as soon as it is measured, so that a
run that is cut off keeps what it has. Float32 is compared at full precision, times are bfloat16's.
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both frameworks share the memory

import argparse
import functools
import importlib.metadata
import json
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from benchmarks import embed, peer, timing
from benchmarks.teacher_cache import cached
from benchmarks.workload import OPTIMIZER, Prompts, Workload, answer, image_memory, texts
from vlkd_jax.decoding import Decoding
from vlkd_jax.hf.save import save_bart, save_clip
from vlkd_jax.types import Batch, Params

BATCHES = {"tiny": (4, 8), "base": (64, 256), "large": (64, 256)}
"""Pairs of a train step: the one to compare, and a large one."""
PARITY_SIZE = {"tiny": "tiny", "base": "base", "large": "base"}
CAPTION, PARITY_CAPTION = 32, 16
"""BART tokens of a caption in a timed step and in a checked one."""
STEPS, ROUNDS, BEAM_ROUNDS = 3, 10, 5
"""Steps of a timed run, which ends with one synchronisation, and how often it is run, and a beam search."""
BFLOAT16 = {"ours": jnp.bfloat16, "peer": torch.bfloat16}
SEED = 0


class Report:
    """Rows as they are measured: told on standard output with the time, and written whole to a file."""

    def __init__(self, path: Path | None, settings: dict[str, Any]):
        self.path, self.start = path, time.monotonic()
        self.content: dict[str, Any] = {"settings": settings, "rows": []}

    def say(self, text: str) -> None:
        print(f"[{self.elapsed():6.1f} s] {text}", flush=True)

    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def row(self, section: str, name: str, **values: Any) -> None:
        self.content["rows"].append({"section": section, "name": name, **values})
        told = {key: f"{value:.5g}" if isinstance(value, float) else value for key, value in values.items()}
        told.pop("seconds", None)  # every round's: in the file
        self.say(f"{section} | {name} | {' | '.join(f'{key} {value}' for key, value in told.items())}")
        if self.path:
            self.path.write_text(json.dumps(self.content, indent=1) + "\n")


class Ours:
    """Our train step: jitted, its state donated."""

    def __init__(self, workload: Workload, params: Params, frozen: Params):
        self.workload, self.frozen = workload, frozen
        self.state = workload.state(params)
        self.step = jax.jit(workload.train_step(), donate_argnums=0)
        self.programs: dict[int, Any] = {}

    def prepare(self, batches: list[Batch]) -> dict[str, float]:
        """Compiles for batches of this size, once; what that took and what the program asks for."""
        self.batches, rows = jax.device_put(batches), len(batches[0].pixels)
        if rows not in self.programs:
            start = time.perf_counter()
            program = self.step.lower(self.state, self.frozen, self.batches[0]).compile()
            seconds = time.perf_counter() - start
            memory = program.memory_analysis()
            planned = memory.temp_size_in_bytes + memory.argument_size_in_bytes
            planned += memory.output_size_in_bytes - memory.alias_size_in_bytes
            flops = timing.matmul_flops(self.workload.train_step(), self.state, self.frozen, self.batches[0])
            facts = {"compile_seconds": seconds, "ours_planned_gib": planned / 2**30, "tflop_a_step": flops / 1e12}
            self.programs[rows] = program, facts
        self.program, facts = self.programs[rows]
        return facts

    def run(self) -> None:
        for k in range(STEPS):
            self.state, self.metrics = self.program(self.state, self.frozen, self.batches[k % len(self.batches)])
        jax.block_until_ready(self.state)


class Peer:
    """Hugging Face's train step in torch."""

    def __init__(self, teacher: peer.Teacher, student: peer.Student):
        self.trainer = peer.Trainer(teacher, student, OPTIMIZER, autocast=True)

    def prepare(self, batches: list[Batch], device: torch.device) -> dict[str, float]:
        """Runs once; what that took, compilation where it is on, and how much memory."""
        self.batches = [peer.tensors(vars(batch), device) for batch in batches]
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        self.run()
        told = {"peer_first_seconds": time.perf_counter() - start}
        if torch.cuda.is_available():
            told["peer_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return told

    def run(self) -> None:
        for k in range(STEPS):
            self.metrics = self.trainer.step(self.batches[k % len(self.batches)])
        synchronize()


class Bench:
    """What the sections share; the models of the timed size are made when a section first asks for them."""

    def __init__(self, size: str, report: Report):
        self.size, self.report = size, report
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.folder = tempfile.TemporaryDirectory()
        self.ceiling = float("nan")  # of matrix products, FLOP/s
        self.rng = np.random.default_rng(SEED)

    def models(
        self, size: str, dtypes: dict[str, Any]
    ) -> tuple[Workload, Params, Params, peer.Teacher, peer.Student, Path]:
        """The same random models on both sides: ours, its parameters, theirs, and the directory between them."""
        workload, directory = Workload.of(size, dtypes["ours"]), Path(self.folder.name) / size
        params, frozen = workload.draw(SEED)
        if not directory.exists():
            save_clip(directory / "clip", workload.clip, frozen["clip"])
            save_bart(directory / "bart", workload.bart, params["bart"])
        teacher = peer.Teacher(directory / "clip", dtypes["peer"], workload.clip.preprocessing)
        linears = (np.asarray(params[name]["kernel"]).T for name in ("sentence_projection", "image_projection"))
        student = peer.Student(directory / "bart", *map(torch.tensor, linears), float(params["logit_scale"]))
        return workload, params, frozen, teacher.to(self.device), student.to(self.device), directory / "bart"

    @functools.cached_property
    def trainers(self) -> tuple[Ours, Peer, Path]:
        """Ours and theirs of the timed size, bfloat16, and the directory of their BART."""
        self.report.say(f"drawing the models, size {self.size}")
        workload, params, frozen, teacher, student, directory = self.models(self.size, BFLOAT16)
        return Ours(workload, params, frozen), Peer(teacher, student), directory


def synchronize() -> None:
    """Waits for torch's device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure_machine(bench: Bench) -> None:
    """Versions, the device, and the two ceilings: matrix products, and copies within its memory."""
    names = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")
    versions = {name: importlib.metadata.version(name) for name in names}
    device = jax.devices()[0]
    bench.report.row("machine", device.device_kind, platform=device.platform, cores=os.cpu_count(), **versions)
    n, repeats = (512, 2) if bench.size == "tiny" else (8192, 30)
    a, b = (jax.random.normal(jax.random.key(k), (n, n), jnp.bfloat16) for k in range(2))
    product = jax.jit(jnp.matmul)
    torch_a, torch_b = (torch.randn(n, n, dtype=torch.bfloat16, device=bench.device) for _ in range(2))

    def repeat(function: Callable, *inputs: Any) -> None:
        for _ in range(repeats):
            output = function(*inputs)
        jax.block_until_ready(output) if isinstance(output, jax.Array) else synchronize()

    runs = {"jax": lambda: repeat(product, a, b), "torch": lambda: repeat(torch.matmul, torch_a, torch_b)}
    medians = _medians(timing.alternate(runs, 5))
    rates = {name: 2 * n**3 * repeats / seconds for name, seconds in medians.items()}
    bench.ceiling = max(rates.values())
    bench.report.row("machine", f"{n}^3 bfloat16 product, TFLOP/s", **{k: v / 1e12 for k, v in rates.items()})
    size = 2**20 if bench.size == "tiny" else 2**30
    values = jax.random.normal(jax.random.key(0), (size,), jnp.bfloat16)
    copy = jax.jit(lambda x: -x)
    seconds = _medians(timing.alternate({"copy": lambda: repeat(copy, values)}, 5))["copy"] / repeats
    bench.report.row("machine", "copy within the device, read and written", tb_per_second=4 * size / seconds / 1e12)


def _medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def check_parity(bench: Bench) -> None:
    """The same step everywhere: losses, gradient norm and greedy tokens."""
    size = PARITY_SIZE[bench.size]
    workload, params, frozen, teacher, student, directory = bench.models(
        size, {"ours": jnp.float32, "peer": torch.float32}
    )
    batch = workload.batch(bench.rng, 4, PARITY_CAPTION)
    host = jax.device_get((params, frozen))

    def ours(workload: Workload, device: jax.Device, precision: str) -> dict[str, float]:
        with jax.default_device(device), jax.default_matmul_precision(precision):
            params, frozen, inputs = jax.device_put((*host, batch), device)
            metrics = jax.jit(workload.train_step())(workload.state(params), frozen, inputs)[1]
        return {name: float(metrics[name]) for name in ("ttdm", "itcl", "icti", "grad_norm")}

    def theirs(autocast: bool) -> dict[str, float]:
        metrics = peer.Trainer(teacher, student, OPTIMIZER, autocast).step(peer.tensors(vars(batch), bench.device))
        return {name: value.item() for name, value in metrics.items()}

    accelerator = jax.devices()[0]
    torch.set_float32_matmul_precision("highest")
    with ThreadPoolExecutor(1) as pool:  # two compilers at once
        on_cpu = pool.submit(ours, workload, jax.devices("cpu")[0], "highest")
        float32 = ours(workload, accelerator, "highest")
        reference = on_cpu.result()
    _compare(bench, f"{size}, float32, device against CPU", float32, reference, 1e-4)
    reader = peer.Reader(teacher, student, torch.float32, directory)
    share = _same_tokens(workload, params, frozen, reader, workload.prompts(bench.rng, 4, ask=True))
    bench.report.row("parity", f"{size}, float32, greedy tokens equal to Hugging Face's", share=share, good=share == 1)
    _compare(bench, f"{size}, float32, Hugging Face against ours", theirs(False), float32, 1e-3)
    bfloat16 = ours(Workload.of(size, jnp.bfloat16), accelerator, "default")
    _compare(bench, f"{size}, ours in bfloat16 against float32", bfloat16, float32, None)


def _compare(
    bench: Bench, name: str, values: dict[str, float], reference: dict[str, float], tolerance: float | None
) -> None:
    """A row of relative differences; `good` where all keep to the tolerance."""
    differences = {key: abs(values[key] - wanted) / abs(wanted) for key, wanted in reference.items()}
    verdict = {} if tolerance is None else {"good": all(gap < tolerance for gap in differences.values())}
    bench.report.row("parity", name, **differences, **verdict)


def _same_tokens(workload: Workload, params: Params, frozen: Params, reader: peer.Reader, prompts: Prompts) -> float:
    """Share of equal greedy tokens."""
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(_answer(workload, params, frozen, prompts, Decoding(max_new_tokens=8)))
    inputs = peer.tensors(prompts._asdict(), reader.image_projection.device)
    theirs = reader.answer(reader.image_prefix(inputs["pixels"]), inputs, Decoding(max_new_tokens=8))
    return float(np.mean(ours == theirs.cpu().numpy()))


def _answer(workload: Workload, params: Params, frozen: Params, prompts: Prompts, options: Decoding) -> jax.Array:
    """Our tokens from pixels."""
    image = image_memory(workload.student, workload.teacher, params, frozen["clip"], prompts.pixels)
    return answer(workload.student, params, image, prompts, options)


def time_training(bench: Bench) -> None:
    """Images a second of a train step at the first batch size."""
    _time_training(bench, BATCHES[bench.size][0])


def time_compiled(bench: Bench) -> None:
    """The same against `torch.compile`."""
    bench.trainers[1].trainer.compile()
    _time_training(bench, BATCHES[bench.size][0])


def time_large_batch(bench: Bench) -> None:
    """The same with a large batch, where it fits."""
    _time_training(bench, BATCHES[bench.size][1])


def _time_training(bench: Bench, rows: int) -> None:
    ours, theirs, _ = bench.trainers
    mode = theirs.trainer.mode
    torch.set_float32_matmul_precision("high")
    batches = [ours.workload.batch(bench.rng, rows, CAPTION) for _ in range(2)]
    bench.report.say(f"compiling our step, batch {rows}")
    row: dict[str, Any] = dict(ours.prepare(batches))
    ours.run()
    row["ours_peak_gib"] = _peak_ours()
    runs = {"ours": ours.run}
    bench.report.say(f"our step is compiled; the peer's first steps, {mode}")
    try:
        row |= theirs.prepare(batches, bench.device)
        runs["peer"] = theirs.run
    except torch.OutOfMemoryError as error:
        row["peer"] = f"does not fit beside ours: {' '.join(str(error).split())[:200]}"
    seconds = timing.alternate(runs, ROUNDS)
    for name, median in _medians(seconds).items():
        row |= {f"{name}_images_per_second": rows * STEPS / median, f"{name}_ms": 1e3 * median / STEPS}
    if "peer" in runs:
        row["times_faster"] = timing.ratio(seconds, "peer", "ours")
        row["peer_loss"] = sum(theirs.metrics[name].item() for name in ("ttdm", "itcl", "icti"))
    row["ours_loss"] = float(ours.metrics["loss"])
    row["share_of_ceiling"] = 1e12 * row["tflop_a_step"] / (row["ours_ms"] / 1e3) / bench.ceiling
    name = f"{bench.size}, batch {rows}, caption {CAPTION}, bfloat16, peer {mode}"
    bench.report.row("train", name, **row, seconds=seconds)


def time_cached(bench: Bench) -> None:
    """Our step at the first batch size, with the teacher and from a bfloat16 cache of its outputs."""
    ours, rows = bench.trainers[0], BATCHES[bench.size][0]
    live = [ours.workload.batch(bench.rng, rows, CAPTION) for _ in range(2)]
    from_cache = [cached(ours.workload, ours.frozen["clip"], batch, "bfloat16") for batch in live]
    ours.prepare(live)  # compiled already, after "train"
    step = jax.jit(ours.workload.train_step(), donate_argnums=0)
    losses = {}

    def run_cached() -> None:
        for k in range(STEPS):
            ours.state, losses["cached"] = step(ours.state, ours.frozen, from_cache[k % 2])
        jax.block_until_ready(ours.state)

    bench.report.say("compiling the step from a cache")
    seconds = timing.alternate({"live": ours.run, "cached": run_cached}, ROUNDS)
    losses["live"] = ours.metrics
    bench.report.row(
        "cached",
        f"{bench.size}, batch {rows}, caption {CAPTION}, bfloat16",
        **{f"{name}_images_per_second": rows * STEPS / median for name, median in _medians(seconds).items()},
        times_faster=timing.ratio(seconds, "live", "cached"),
        **{f"{name}_loss": float(values["loss"]) for name, values in losses.items()},
        seconds=seconds,
    )


def time_embedding(bench: Bench) -> None:
    """Texts to unit embeddings, as retrieval needs them."""
    ours, theirs, _ = bench.trainers
    rows, model = 4 * BATCHES[bench.size][1], ours.workload.bart
    lengths = bench.rng.integers(CAPTION // 4, CAPTION + 1, rows)
    ids, mask = jax.device_put(texts(bench.rng, lengths, CAPTION, model))
    inputs = peer.tensors({"ids": np.asarray(ids), "mask": np.asarray(mask)}, bench.device)
    program, student = embed.our_program(ours.workload), theirs.trainer.student
    runs = {
        "ours": lambda: jax.block_until_ready(program(ours.state.params, ids, mask)),
        "peer": lambda: (embed.their_embeddings(student, inputs, autocast=True), synchronize()),
    }
    seconds = timing.alternate(runs, ROUNDS)
    bench.report.row(
        "embed",
        f"{bench.size}, {rows} texts of {CAPTION} tokens, bfloat16",
        **{f"{name}_texts_per_second": rows / median for name, median in _medians(seconds).items()},
        times_faster=timing.ratio(seconds, "peer", "ours"),
        seconds=seconds,
    )


def _peak_ours() -> float | None:
    """GiB that jax has held at most since the process began, where the device tells."""
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] / 2**30 if stats else None


def time_greedy(bench: Bench) -> None:
    """Greedy answers and captions a second, from pixels and from what the decoder reads of them."""
    _time_decoding(bench, "VQA", True, Decoding(max_new_tokens=10))
    _time_decoding(bench, "captions", False, Decoding(max_new_tokens=20))


def time_beam(bench: Bench) -> None:
    """The same by beam search, which is slower: fewer rounds."""
    _time_decoding(bench, "captions", False, Decoding("beam", max_new_tokens=20))
    _time_decoding(bench, "VQA", True, Decoding("beam", max_new_tokens=10))


def _time_decoding(bench: Bench, name: str, ask: bool, options: Decoding) -> None:
    ours, theirs, directory = bench.trainers
    reader = peer.Reader(theirs.trainer.teacher, theirs.trainer.student, torch.bfloat16, directory)
    workload, params, rows = ours.workload, ours.state.params, BATCHES[bench.size][0]
    prompts = workload.prompts(bench.rng, rows, ask)
    on_device, in_torch = jax.device_put(prompts), peer.tensors(prompts._asdict(), bench.device)
    method = f"beam {options.beams}" if options.method == "beam" else options.method
    bench.report.say(f"compiling {name}, {method}")
    image = image_memory(workload.student, workload.teacher, params, ours.frozen["clip"], on_device.pixels)
    prefix = reader.image_prefix(in_torch["pixels"])

    def from_pixels() -> jax.Array:
        return _answer(workload, params, ours.frozen, on_device, options)

    def from_memory() -> jax.Array:
        return answer(workload.student, params, image, on_device, options)

    places = {
        "pixels": (from_pixels, lambda: reader.answer(reader.image_prefix(in_torch["pixels"]), in_torch, options)),
        "image memory": (from_memory, lambda: reader.answer(prefix, in_torch, options)),
    }
    for place, (our_run, their_run) in places.items():
        runs = {
            "ours": lambda run=our_run: jax.block_until_ready(run()),
            "peer": lambda run=their_run: (run(), synchronize()),
        }
        seconds = timing.alternate(runs, ROUNDS if options.method == "greedy" else BEAM_ROUNDS)
        medians = _medians(seconds)
        bench.report.row(
            "decode",
            f"{bench.size}, {name}, {method}, {options.max_new_tokens} tokens, batch {rows}, bfloat16, from {place}",
            ours_per_second=rows / medians["ours"],
            peer_per_second=rows / medians["peer"],
            times_faster=timing.ratio(seconds, "peer", "ours"),
            ours_ms=1e3 * medians["ours"],
            peer_ms=1e3 * medians["peer"],
            peer_teacher=theirs.trainer.mode,
            seconds=seconds,
        )


SECTIONS: dict[str, tuple[Callable[[Bench], None], int]] = {
    "machine": (measure_machine, 20),
    "parity": (check_parity, 90),
    "train": (time_training, 100),
    "cached": (time_cached, 35),
    "embed": (time_embedding, 15),
    "greedy": (time_greedy, 70),
    "beam": (time_beam, 70),
    "compile": (time_compiled, 70),
    "large_batch": (time_large_batch, 80),
}
"""Name -> what is run and about how many seconds it takes at the large size, in the order in which they are run."""


def main() -> None:
    """Runs the sections that are asked for, those that the time is enough for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=BATCHES, default="large")
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--budget", type=float, default=480, help="seconds; what would take longer is left out")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    wanted = options.sections.split(",")
    if unknown := set(wanted) - SECTIONS.keys():
        parser.error(f"--sections: there is no {', '.join(sorted(unknown))}")
    report = Report(options.output, {"size": options.size, "date": time.strftime("%Y-%m-%d"), "sections": wanted})
    bench = Bench(options.size, report)
    for name in wanted:
        run, seconds = SECTIONS[name]
        if report.elapsed() + seconds > options.budget:
            report.row(name, "left out", not_measured=f"takes about {seconds} s, {options.budget:.0f} s are the limit")
            continue
        try:
            run(bench)
        except Exception as error:  # the other sections' rows are worth having
            traceback.print_exc()
            report.row(name, "failed", error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    report.say("done")


if __name__ == "__main__":
    main()

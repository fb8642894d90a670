"""Measure what a user gains: latency, throughput and size of each model in each engine.

Every model (BERT-base, TinyBERT6, TinyBERT4, a pruned BERT-base) runs in PyTorch (fp32, bf16) and
ONNX Runtime (fp32, int8), with 1 and 2 threads, batches of 1 and 32, at length 128 and on rows of
GLUE dev sets. Within one setting the candidates take turns, so that a busy machine slows all of
them. Random weights of the right shape serve: they are as fast as trained ones. Writes
inference.json and inference.md to --output_dir and prints the table.

Examples:
    python benchmarks/inference.py --glue_dir data/glue_data --output_dir results/inference
    python benchmarks/inference.py --models tinybert4 bert_base --lengths 128 --batches 1 \
        --output_dir results/inference_small
    python benchmarks/inference.py --models bert_base mine=models/distilled_tinybert_4l_rte \
        --output_dir results/inference_mine
    python benchmarks/inference.py --device cuda --output_dir results/inference_gpu
"""

import argparse
import copy
import logging
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.measure import machine
from quantize import RECORD_NAME, computed_in, write_onnx
from transformer.checkpoint import save_config
from transformer.features import Features, load_features
from transformer.file_utils import (
    ONNX_NAME,
    WEIGHTS_NAME,
    UserError,
    read_json,
    write_json,
    write_text,
)
from transformer.hub import fetch_model
from transformer.inference import load_classifier
from transformer.modeling import (
    BertConfig,
    SequenceClassifier,
    TinyBertForSequenceClassification,
    freeze,
    model_inputs,
)
from transformer.own_tasks import find_task
from transformer.run_folder import prepare_output_dir
from transformer.runtime import run_script
from transformer.tables import markdown_table
from transformer.tasks import get_task
from transformer.tokenization import load_tokenizer

logger = logging.getLogger(__name__)

# The pruned shape keeps three tenths of BERT-base's FLOPs, the lower layers more of them.
SHAPES: dict[str, dict[str, Any]] = {
    "bert_base": {},
    "tinybert6": {"num_hidden_layers": 6},
    "tinybert4": {"num_hidden_layers": 4, "hidden_size": 312, "intermediate_size": 1200},
    "pruned": {"heads_per_layer": [4, 4, 4, 4, 4, 4, 4, 4, 4, 3, 2, 2],
               "neurons_per_layer": [1200, 1200, 1100, 1100, 1000, 1000, 900, 900, 800, 700, 600,
                                     500]},
}
ENGINES = ("torch fp32", "torch bf16", "onnx fp32", "onnx int8")
ONNX_METHODS = {"fp32": "fp32", "int8": "int8-dynamic"}  # of quantize.py
BASELINE = ("bert_base", "torch fp32")
FIRST_WORD = 1000
ROWS_OF_A_TASK = 256
MOST_REPEATS = 50
SEED = 0

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "benchmarks/inference.py", description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--models", nargs="+", default=list(SHAPES),
        help=f"of {', '.join(SHAPES)}, or NAME=MODEL (folder, URL, hub id); what quantize.py made"
             " for a CPU is measured as it is, whatever --engines says")
    add("--engines", nargs="+", choices=ENGINES, default=list(ENGINES),
        help="what computes, and in which precision")
    add("--lengths", nargs="+", default=["128", "sst-2", "mrpc"],
        help="word pieces, or a task for rows of its dev set, where there is --glue_dir")
    add("--glue_dir", type=Path, default=None, help="folder with a folder for each GLUE task")
    add("--vocab_dir", type=str, default=None,
        help="model whose vocabulary encodes the rows: folder, URL or hub id; not given: the first"
             " MODEL of --models")
    add("--batches", nargs="+", type=int, default=[1, 32], help="rows a batch")
    add("--threads", nargs="+", type=int, default=[1, 2], help="threads of the CPU")
    add("--seconds", type=float, default=0.4,
        help="seconds for each candidate in each setting; the slowest take two calls' time")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where the models run")
    add("--output_dir", type=str, required=True, help="folder for the tables")
    add("--overwrite_output_dir", action="store_true",
        help="write into an output folder that is not empty")
    return parser


# ------------------------------------------------------------------ candidates


@dataclass
class Candidate:
    """A model in one engine; `load` gives it as many threads as PyTorch is set to."""

    model: str
    engine: str
    parameters: int
    megabytes: float  # of its weights
    vocab_size: int
    load: Callable[[], torch.nn.Module]


def make_model(name: str) -> torch.nn.Module:
    """Return a model of a known shape with random weights, or the one of NAME=MODEL."""
    folder = name.partition("=")[2]
    if not folder and name not in SHAPES:
        raise UserError(f"--models {name}: expected NAME=MODEL or one of {', '.join(SHAPES)}")
    if folder:
        model = load_classifier(folder)
    else:
        torch.manual_seed(SEED)
        model = TinyBertForSequenceClassification(BertConfig(**SHAPES[name]))
    if hasattr(model, "fit_dense"):
        del model.fit_dense  # only distillation uses it
    return freeze(model)


def load_torch(model: torch.nn.Module, dtype: torch.dtype | None,
               device: torch.device) -> torch.nn.Module:
    return freeze(copy.deepcopy(model), dtype, device)


def make_candidates(name: str, engines: list[str], folder: Path,
                    device: torch.device) -> Iterator[Candidate]:
    """Yield the model in each engine, its files below `folder`; what quantize.py made as it is."""
    short, _, source = name.partition("=")
    model = make_model(name)
    total = getattr(model, "parameter_total", sum(p.numel() for p in model.parameters()))
    candidate = partial(Candidate, short, parameters=total, vocab_size=model.config.vocab_size)
    is_torch = isinstance(model, SequenceClassifier)
    if not is_torch or (source and (Path(source) / RECORD_NAME).is_file()):
        made = read_json(Path(source) / RECORD_NAME)
        path = Path(source) / (WEIGHTS_NAME if is_torch else ONNX_NAME)
        load = (partial(load_torch, model, computed_in(made["method"], device), device)
                if is_torch else partial(load_classifier, source, None, device))
        yield candidate(f"{made['format']} {made['method']}",
                        megabytes=path.stat().st_size / 1e6, load=load)
        return
    for engine in engines:
        kind, precision = engine.split()
        if kind == "torch":
            dtype = torch.bfloat16 if precision == "bf16" else None
            yield candidate(engine, megabytes=total * (dtype or torch.float32).itemsize / 1e6,
                            load=partial(load_torch, model, dtype, device))
            continue
        model_dir = folder / f"{short}_{precision}"
        model_dir.mkdir()
        save_config(model, model_dir)
        write_onnx(model, ONNX_METHODS[precision], model_dir, None, reduce_range=False)
        yield candidate(engine, megabytes=(model_dir / ONNX_NAME).stat().st_size / 1e6,
                        load=partial(load_classifier, model_dir, None, device))


# ------------------------------------------------------------------ inputs


def fixed_batches(length: int, batch: int, vocab_size: int) -> list[Inputs]:
    """Return one batch of full rows of random words, [batch, length]."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(min(FIRST_WORD, vocab_size - 1), vocab_size, (batch, length),
                        generator=generator)
    return [(ids, torch.zeros_like(ids), torch.ones_like(ids))]


def task_rows(args: argparse.Namespace, name: str) -> Features:
    """Return the rows of a task's dev set: one of GLUE, or that of a folder of --glue_dir."""
    data_dir = args.glue_dir / name
    if not data_dir.is_dir():
        data_dir = args.glue_dir / get_task(name).folder
    task = find_task(None, data_dir)
    folder = args.vocab_dir or next(
        (model.partition("=")[2] for model in args.models if "=" in model), None)
    if folder is None:
        raise UserError(f"--lengths {name}: its rows need --vocab_dir, or a MODEL of --models")
    return load_features(task, data_dir, "dev",
                         load_tokenizer(fetch_model(folder, weights=False)),
                         task.max_seq_length, task.labels)


def task_batches(rows: Features, batch: int, vocab_size: int) -> list[Inputs]:
    """Return batches as evaluation makes them: rows of similar length, padded to the longest.

    Those of middle length come first: slow candidates see few batches, and all see the same.
    """
    chosen = np.random.default_rng(SEED).permutation(len(rows))[:ROWS_OF_A_TASK]
    chosen = chosen[np.argsort(rows.lengths[chosen], kind="stable")]
    batch = min(batch, len(chosen))
    groups = [chosen[begin : begin + batch]
              for begin in range(0, len(chosen) - batch + 1, batch)]
    order = sorted(range(len(groups)), key=lambda index: abs(index - (len(groups) - 1) / 2))
    return [tuple(x.clamp(max=vocab_size - 1) for x in model_inputs(rows.collate(groups[index])))
            for index in order]


def make_settings(args: argparse.Namespace,
                  vocab_size: int) -> list[tuple[str, int, list[Inputs]]]:
    """Return length, rows a batch and batches of each setting; tasks need --glue_dir."""
    settings = []
    for length in args.lengths:
        if length.isdigit():
            make = partial(fixed_batches, int(length))
        elif args.glue_dir is not None:
            make = partial(task_batches, task_rows(args, length))
        else:
            continue
        settings += [(length, batch, make(batch, vocab_size)) for batch in args.batches]
    if not settings:
        raise UserError(f"--lengths {' '.join(args.lengths)}: tasks need --glue_dir")
    return settings


# ------------------------------------------------------------------ measuring


def take_turns(calls: list[Callable[[int], None]], seconds: float) -> list[list[float]]:
    """Call each candidate in turn until its time is used up; returns the seconds of each call.

    The first call of each is the warm-up and does not count; each has at least two that do.
    """
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call(0)
    for index in range(MOST_REPEATS):
        for call, taken in zip(calls, times, strict=True):
            if index < 2 or sum(taken) < seconds:
                began = time.perf_counter()
                call(index)
                taken.append(time.perf_counter() - began)
    return times


def caller(model: torch.nn.Module, batches: list[Inputs],
           device: torch.device) -> Callable[[int], None]:
    """Return what computes batch `index`, from inputs on the CPU to logits on the CPU."""

    def call(index: int) -> None:
        inputs = [tensor.to(device) for tensor in batches[index % len(batches)]]
        model(*inputs, score_layers=())[0].cpu()

    return call


@torch.inference_mode()
def measure(
    candidates: list[Candidate], args: argparse.Namespace,
    settings: list[tuple[str, int, list[Inputs]]], device: torch.device,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each candidate in each setting; times are milliseconds a batch."""
    for threads in args.threads:
        torch.set_num_threads(threads)
        models = [candidate.load() for candidate in candidates]
        for length, batch, inputs in settings:
            times = take_turns([caller(model, inputs, device) for model in models], args.seconds)
            medians = {(candidate.model, candidate.engine): statistics.median(taken)
                       for candidate, taken in zip(candidates, times, strict=True)}
            baseline = medians.get(BASELINE)
            logger.info("measured: %d threads, batch %d, length %s", threads, batch, length)
            for candidate, taken in zip(candidates, times, strict=True):
                median = medians[candidate.model, candidate.engine]
                yield {
                    "model": candidate.model, "engine": candidate.engine, "threads": threads,
                    "batch": batch, "length": length, "median": 1e3 * median,
                    "p95": 1e3 * float(np.percentile(taken, 95)),
                    "rows_per_second": batch / median, "repeats": len(taken),
                    "megabytes": candidate.megabytes, "parameters": candidate.parameters,
                    "speedup": None if baseline is None else baseline / median}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    formats = {"threads": "{}", "batch": "{}", "length": "{}", "model": "{}", "engine": "{}",
               "median": "{:.2f} ms", "p95": "{:.2f} ms", "rows_per_second": "{:.1f}",
               "megabytes": "{:.1f}", "parameters": "{:,}", "speedup": "{:.1f}x"}
    return markdown_table([name.replace("_", " ") for name in formats], [
        ["" if row[name] is None else form.format(row[name]) for name, form in formats.items()]
        for row in rows])


# ------------------------------------------------------------------ command line


def check_args(args: argparse.Namespace) -> None:
    """Raise a `UserError` for numbers, names and devices that make no sense."""
    names = [name.partition("=")[0] for name in args.models]
    if len(set(names)) < len(names) or any("/" in name for name in names):
        raise UserError(f"--models {' '.join(args.models)}: expected different names without /")
    if any(length.isdigit() and int(length) < 3 for length in args.lengths):
        raise UserError(f"--lengths {' '.join(args.lengths)}: expected at least 3 word pieces")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU; expected one, or --device cpu")


def main(args: argparse.Namespace) -> None:
    check_args(args)
    device = torch.device(args.device)
    args.threads = args.threads if args.device == "cpu" else args.threads[:1]
    output_dir = prepare_output_dir(args.output_dir, args.overwrite_output_dir, keep=True)

    # Measurements
    with TemporaryDirectory(prefix="inference_") as folder:
        args.models = [f"{short}={fetch_model(source)}" if source else short
                       for short, _, source in (name.partition("=") for name in args.models)]
        candidates = [candidate for name in args.models
                      for candidate in make_candidates(name, args.engines, Path(folder), device)]
        settings = make_settings(args, min(candidate.vocab_size for candidate in candidates))
        began = time.monotonic()
        measured = list(measure(candidates, args, settings, device))

    # Results
    text = table(measured)
    facts = {**machine(device), "command": shlex.join(sys.argv),
             "minutes": (time.monotonic() - began) / 60}
    write_json(output_dir / "inference.json", {**facts, "rows": measured})
    write_text(output_dir / "inference.md", f"{text}\nMade by `{facts['command']}`.\n")
    print(text)


if __name__ == "__main__":
    run_script(main, get_args_parser())

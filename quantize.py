"""Make a task's classifier smaller and faster: half precision, or 8-bit integers as ONNX.

The output folder is a model directory: `task_distill.py --do_eval` and `predict.py` take it, and
`quantization.json` says how it was made. Which method fits which format:

    fp32          onnx          the graph, fused
    fp16          torch, onnx   weights in 16 bits; on a CPU computed in 32
    bf16          torch         weights in 16 bits; computed so where the processor can
    int8-dynamic  onnx          8-bit weights, inputs rounded as they come; of a bilstm or bigru
                                the word embeddings, which are nearly all of it
    int8-static   onnx          the same, within ranges measured once on training rows

Examples:
    python quantize.py --model models/distilled_tinybert_4l_rte --method int8-dynamic \
        --format onnx --output_dir models/int8_tinybert_4l_rte \
        --do_eval --task_name RTE --data_dir data/glue_data/RTE
    python quantize.py --model models/distilled_tinybert_4l_rte --method int8-static \
        --format onnx --output_dir models/static_tinybert_4l_rte \
        --task_name RTE --data_dir data/glue_data/RTE --calibration_rows 128
"""

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from transformer.checkpoint import (
    check_weights,
    save_config,
    save_pretrained,
    weights_path,
    weights_record,
)
from transformer.config import BertConfig, find_config
from transformer.evaluation import (
    by_split,
    evaluate_splits,
    evaluation_splits,
    warn_of_chance,
    write_results,
)
from transformer.features import Features, load_features
from transformer.file_utils import (
    ONNX_NAME,
    WEIGHTS_NAME,
    UserError,
    atomic_path,
    file_sha256,
    write_json,
)
from transformer.hub import fetch_model
from transformer.inference import load_classifier, match_labels, note_task
from transformer.modeling import freeze, model_inputs
from transformer.own_tasks import add_data_arguments, save_task, stored_task, task_of
from transformer.recurrent import RecurrentConfig, read_config
from transformer.run_folder import check_not_input, prepare_output_dir
from transformer.runtime import add_eval_split_argument, commit_id, get_device, run_script
from transformer.tasks import Task, get_task
from transformer.tokenization import BertTokenizer, load_tokenizer

logger = logging.getLogger(__name__)

METHODS = {"fp32": ("onnx",), "fp16": ("torch", "onnx"), "bf16": ("torch",),
           "int8-dynamic": ("onnx",), "int8-static": ("onnx",)}
INT8_REASON = "int8 as ONNX is as small and faster, and other tools read it"
REASONS = {"fp32": "an fp32 PyTorch model is what --model already is",
           "bf16": "ONNX Runtime computes no bfloat16 on a CPU",
           "int8-dynamic": INT8_REASON, "int8-static": INT8_REASON}  # against the other format
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
CALIBRATION_BATCH = 8
RECORD_NAME = "quantization.json"


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "quantize.py", description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=str, required=True,
        help="classifier to make smaller: folder, URL or hub id of a PyTorch model")
    add("--output_dir", type=str, required=True, help="folder for the model that is made")
    add("--method", choices=METHODS, required=True,
        help="precision of the weights; fp32 only exports to ONNX")
    add("--format", choices=["torch", "onnx"], default="onnx",
        help="a PyTorch checkpoint, or a model.onnx for ONNX Runtime")
    add_data_arguments(parser, required=False)
    add("--calibration_rows", type=int, default=128,
        help="training rows on which int8-static measures its ranges")
    add("--reduce_range", action=argparse.BooleanOptionalAction, default=None,
        help="ONNX weights of 7 bits, for CPUs without VNNI; not given: where this one has none")
    add("--do_eval", action="store_true",
        help="measure the model before and after")
    add_eval_split_argument(parser)
    add("--max_seq_length", type=int, default=128,
        help="longest input in word pieces; not given: the task's (64 for single sentences)")
    add("--eval_batch_size", type=int, default=32, help="rows a batch on dev")
    add("--do_lower_case", action="store_true",
        help="lower-case the text; without it the model's own setting holds")
    add("--cache_dir", type=str, default="",
        help="folder for downloaded models; empty: $TINYBERT_CACHE, else ~/.cache/tinybert, and for"
             " the hub its own cache")
    add("--no_cuda", action="store_true", help="evaluate on the CPU")
    add("--seed", type=int, default=42, help="seed of the choice of calibration rows")
    add("--overwrite_output_dir", action="store_true",
        help="write into an output folder that is not empty")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise a `UserError` for flags that do not go together."""
    check_not_input(args.output_dir, [args.model])
    if args.format not in METHODS[args.method]:
        raise UserError(f"--method {args.method} --format {args.format}: {REASONS[args.method]};"
                        f" expected --format {METHODS[args.method][0]}")
    if (args.do_eval or args.method == "int8-static") and args.data_dir is None:
        raise UserError("--do_eval and int8-static read rows of a task; --data_dir is missing")
    if args.data_dir is None and (args.dev_share or args.test_share or args.train_split):
        raise UserError("--dev_share, --test_share and --train_split are parts of the rows of"
                        " --data_dir, which is missing")
    if args.eval_split and not args.do_eval:
        raise UserError("--eval_split says what --do_eval measures on; expected --do_eval, too")


def check_method(method: str, config: BertConfig, path: Path) -> None:
    """Raise a `UserError` for a model that --method cannot quantize."""
    if method == "int8-static" and isinstance(config, RecurrentConfig):
        raise UserError(f"--method int8-static: {path} is a {config.model_type}, of which only the"
                        " word embeddings are quantized, without ranges; expected int8-dynamic")


def find_rows_task(args: argparse.Namespace) -> Task | None:
    """Return the task whose rows are read, if any; its length holds where none was given."""
    if args.data_dir is None:
        return None if args.task_name is None else get_task(args.task_name)
    task = task_of(args)
    if "max_seq_length" not in args.given:
        args.max_seq_length = task.max_seq_length
    return task


def read_settings(args: argparse.Namespace, task: Task | None) -> tuple[
        Path, BertTokenizer, tuple[str, ...]]:
    """Find the model's folder; read its vocabulary and, for a task, its labels; no weights."""
    if args.format == "onnx":
        import transformer.onnx_model  # noqa: F401  now, for its packages may be missing
    folder = fetch_model(args.model, args.cache_dir or None)
    weights_path(folder)  # an ONNX model cannot be quantized again
    config = read_config(path := find_config(folder))
    check_method(args.method, config, path)
    if args.format == "onnx":
        config.check_own_layers(
            folder, "expected --method fp16 or bf16 with --format torch")
    labels = () if task is None else match_labels(task, config, path)
    tokenizer = load_tokenizer(folder, args.do_lower_case or None)
    config.check_vocabulary(len(tokenizer), folder)
    if task is not None:
        config.check_length(args.max_seq_length, "the model")
    return folder, tokenizer, labels


def load_source(args: argparse.Namespace, folder: Path, task: Task | None) -> nn.Module:
    """Load the model in float32; its weights must fit into those of --method."""
    model = load_classifier(folder, None if task is None else task.num_labels)
    if (dtype := HALF.get(args.method)) is not None:  # float16 ends at 65504
        check_weights({name: value.to(dtype) for name, value in model.named_parameters()},
                      f"{folder} as {args.method}")
    return freeze(model)


def calibration_batches(rows: Features, count: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield `count` rows at random as inputs of the model, a few at a time."""
    chosen = np.random.default_rng(seed % 2**64).permutation(len(rows))[:count]
    for begin in range(0, len(chosen), CALIBRATION_BATCH):
        yield model_inputs(rows.collate(chosen[begin : begin + CALIBRATION_BATCH]))


def write_onnx(model: nn.Module, method: str, folder: Path,
               calibration: Iterator[tuple[Tensor, ...]] | None,
               reduce_range: bool | None) -> dict[str, Any]:
    """Write a model.onnx; returns its opset and the versions that made it."""
    import onnx  # here, as onnx_model: a second to load
    import onnxruntime

    from transformer.onnx_model import OPSET, build, cpu_has_vnni, fuse, halve, quantize

    int8 = method.startswith("int8")
    fused = fuse(build(model, scale_rows=int8), attention=not int8)
    record = {"opset": OPSET, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    with atomic_path(folder / ONNX_NAME) as temporary:
        if int8:
            reduce_range = not cpu_has_vnni() if reduce_range is None else reduce_range
            quantize(fused.model, temporary, reduce_range, calibration)
            return {**record, "reduce_range": reduce_range}
        if method == "fp16":
            halve(fused)
        onnx.save(fused.model, temporary)
    return record


def computed_in(method: str, device: torch.device) -> torch.dtype | None:
    """Return what a PyTorch model of the method computes in; None: float32.

    A CPU computes float16 too slowly to be of use; its weights are rounded all the same.
    """
    return HALF.get(method) if method == "bf16" or device.type == "cuda" else None


def compare(args: argparse.Namespace, task: Task, folder: Path, before: dict[str, dict],
            rows: dict[str, Features]) -> None:
    """Evaluate the model that was written, from its files, and write both results.

    Raises:
        UserError: it has come to predict one class for all rows.
    """
    device = get_device(args.no_cuda)
    model = load_classifier(folder, task.num_labels, device)
    dtype = computed_in(args.method, device)
    freeze(model, dtype, device)
    after = evaluate_splits(model, rows, task, device, args.eval_batch_size, dtype)
    metrics, per_class = by_split(after, "metrics"), by_split(after, "per_class")
    changed = {split: int((after[split]["predictions"] != before[split]["predictions"]).sum())
               for split in rows}
    first = next(iter(rows))
    write_results(folder, {
        "task": task.name, "split": first, "model": str(folder), "method": args.method,
        "format": args.format, "metrics": metrics[first], "all_metrics": metrics,
        "before": by_split(before, "metrics"), "per_class": per_class, "rows": len(rows[first]),
        **({} if task.is_regression else {"changed_predictions": changed}),
        "selection": "none: this checkpoint as it is",
    })
    for split, measured in rows.items():
        print(f"{task.name} {split} ({len(measured)} rows)  before"
              f" {format_metrics(before[split])}  after {format_metrics(after[split])}")
    warn_of_chance(task, metrics, per_class)
    for split in rows:
        kinds = [len(np.unique(result[split]["predictions"])) for result in (before, after)]
        if kinds[1] == 1 < kinds[0]:
            raise UserError(f"{folder}: the same prediction for all rows of {split}, unlike the"
                            " model before: do not use it")


def format_metrics(result: dict[str, Any]) -> str:
    return " ".join(f"{name} {value:.4f}" for name, value in result["metrics"].items())


def main(args: argparse.Namespace) -> None:
    # Settings and rows
    check_args(args)
    task = find_rows_task(args)
    splits = evaluation_splits(task, args.data_dir, args.eval_split) if args.do_eval else ()
    source, tokenizer, labels = read_settings(args, task)
    rows = {split: load_features(task, args.data_dir, split, tokenizer, args.max_seq_length, labels,
                                 cache=True)
            for split in (*splits, *["train"] * (args.method == "int8-static"))}
    calibration = None
    if args.method == "int8-static":
        train = rows["train"]
        calibration = calibration_batches(train, args.calibration_rows, args.seed)
    rows = {split: rows[split] for split in splits}

    # Model
    model = load_source(args, source, task)
    if task is not None:
        note_task(model.config, task, labels)
    before = evaluate_splits(model, rows, task, "cpu", args.eval_batch_size)

    # The smaller model
    folder = prepare_output_dir(args.output_dir, args.overwrite_output_dir, [source])
    record = {"method": args.method, "format": args.format, "source": args.model,
              **weights_record(source)}
    if (trained := task or stored_task(source)) is not None:
        save_task(trained, folder)
    if args.format == "torch":
        save_pretrained(model.to(HALF[args.method]), folder, tokenizer)
    else:
        save_config(model, folder, tokenizer, has_weights=False)
        record |= write_onnx(model, args.method, folder, calibration, args.reduce_range)

    # How it was made
    made = folder / (ONNX_NAME if args.format == "onnx" else WEIGHTS_NAME)
    before_size, size = record["bytes_before"], made.stat().st_size
    if calibration is not None:
        record["calibration"] = {"task": task.name, "split": "train", "seed": args.seed,
                                 "rows": min(args.calibration_rows, len(train)),
                                 "max_seq_length": args.max_seq_length}
    write_json(folder / RECORD_NAME, {**record, "sha256": file_sha256(made), "bytes_after": size,
                                      "commit": commit_id(), "torch": torch.__version__})
    print(f"{made}: {size / 1e6:.1f} MB, {100 * size / before_size:.1f} % of"
          f" {before_size / 1e6:.1f}")
    if args.do_eval:
        compare(args, task, folder, before, rows)


if __name__ == "__main__":
    run_script(main, get_args_parser())

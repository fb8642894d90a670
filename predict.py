"""Label sentences, or pairs of sentences, with any trained classifier: PyTorch or ONNX.

Reads one input a line, from standard input as it comes or from a file: a text, or two with a tab
between; columns that the model's task, a header or --columns names; JSON lines such as
{"text": ...} or {"sentence1": ..., "sentence2": ...}; CSV and Parquet files. Writes one line for
each: the label and the probability of every label, all labels above one half of a multi-label
model, or the score of a regression.

Examples:
    echo "a charming film" | python predict.py --model models/distilled_tinybert_4l_sst2
    python predict.py --model models/int8_tinybert_4l_rte --input_file pairs.tsv --format jsonl
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transformer.config import BertConfig
from transformer.evaluation import predict_logits
from transformer.features import encode_examples
from transformer.file_utils import TOKENIZER_CONFIG_NAME, UserError, read_json
from transformer.hub import fetch_model
from transformer.inference import load_classifier
from transformer.modeling import freeze
from transformer.own_tasks import stored_task
from transformer.runtime import (
    add_precision_argument,
    get_device,
    resolve_precision,
    run_script,
)
from transformer.tables import display_width, pad
from transformer.tasks import Example, Task, label_order
from transformer.text_inputs import TEXT_FORMS, Row, TextInputs
from transformer.tokenization import (
    AnyTokenizer,
    BertTokenizer,
    load_tokenizer,
    truncate_pair,
)

logger = logging.getLogger(__name__)

UNLABELLED = "0"  # stands for the label that encoding asks for
SHOWN_LABELS = 5  # of more, --format text shows the most probable
LABEL_WIDTH = 14  # cells of --format text, at least


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "predict.py", description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="With --precision fp32 the answers are those of Hugging Face's pipeline to five"
               " digits; in bf16, faster and auto's choice where the device has it, to two.",
    )
    add = parser.add_argument
    add("--model", type=str, required=True,
        help="classifier, from training or quantize.py: folder, URL or hub id")
    add("--input_file", type=Path, default=None,
        help="tab-separated lines, JSON lines (.jsonl), .csv or .parquet; not given: standard"
             " input")
    add("--input_format", choices=["auto", *TEXT_FORMS], default="auto",
        help="auto: by the suffix of --input_file or the first line, tab-separated otherwise")
    add("--columns", nargs="+", default=[], metavar="NAME_OR_NUMBER",
        help="the columns (from 1, or by the header's names) or JSON keys of the one text or the"
             " two; not given: those of the model's task, or usual ones by name, else all there"
             " are")
    add("--format", choices=["text", "tsv", "jsonl"], default="text",
        help=f"a table to read (of more than {SHOWN_LABELS} labels with the most probable ones), or"
             " tab-separated with a header, or JSON lines")
    add("--max_seq_length", type=int, default=None,
        help="longest input in word pieces, longer ones are cut, with a note; not given: what the"
             " model takes (a batch is only as long as its longest row)")
    add("--batch_size", type=int, default=32, help="inputs that are computed at once")
    add("--do_lower_case", action="store_true",
        help="lower-case the text; without it the model's own setting holds")
    add("--cache_dir", type=str, default="",
        help="folder for downloaded models; empty: $TINYBERT_CACHE, else ~/.cache/tinybert, and for"
             " the hub its own cache")
    add("--no_cuda", action="store_true", help="compute on the CPU")
    add_precision_argument(parser)
    return parser


# ------------------------------------------------------------------ predicting


def answer_kind(config: BertConfig) -> str:
    """Return what the outputs say: a label (softmax), labels (sigmoid), a score or scores."""
    if config.is_multi_label:
        return "labels"
    if config.num_labels == 1:  # whatever the model calls it: a softmax of one says nothing
        return "score"
    return "scores" if config.problem_type == "regression" else "label"


def longest_input(folder: Path, config: BertConfig) -> int:
    """Return the word pieces that Hugging Face's tokenizer cuts to, or that the model takes."""
    path = folder / TOKENIZER_CONFIG_NAME
    limit = read_json(path).get("model_max_length") if path.is_file() else None
    is_limit = isinstance(limit, int | float) and limit < config.max_position_embeddings
    if is_limit and limit < 3:
        raise UserError(f"{path}: model_max_length is {limit}; expected at least 3")
    return int(limit) if is_limit else config.max_position_embeddings


def takes_one_text(config: BertConfig, tokenizer: AnyTokenizer, task: Task | None) -> str:
    """Say why a model takes single texts alone; "" where it takes pairs.

    Without a known task a BERT of one type of segments does, as its relatives that have none do
    not, nor the students with their tokenizers.
    """
    if task is not None:
        return f"was trained on {task.name}" if task.text_b is None else ""
    is_bert = config.family == "bert" and isinstance(tokenizer, BertTokenizer)
    return "has one type of segments" if is_bert and config.type_vocab_size == 1 else ""


def check_pairs(rows: list[Row], name: str, why: str, task: Task | None) -> None:
    """Raise a `UserError` for a pair where the model takes single texts; warn of the reverse.

    `why` is that of `takes_one_text`.
    """
    for row in rows:
        if why and row.text_b is not None:
            raise UserError(f"{name}, line {row.line}: two texts; the model takes one, it {why}"
                            " (--columns chooses)")
    if task is not None and task.text_b is not None and rows[0].text_b is None:
        logger.warning("%s, line %d: one text; the model was trained on pairs (%s)",
                       name, rows[0].line, task.name)


def cut_pair(length_a: np.ndarray, length_b: np.ndarray,
             budget: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut as `truncate_pair`, but as Hugging Face's fast tokenizers do where both texts are cut.

    They give an odd last piece to the longer text, to the second if they are equal; BERT, and so
    training and evaluation, to the first.
    """
    keep_a, keep_b = truncate_pair(length_a, length_b, budget)
    moved = (length_a <= length_b) & (keep_a > keep_b)
    return keep_a - moved, keep_b + moved


def note_cut_rows(rows: list[Row], tokenizer: AnyTokenizer, longest: int) -> None:
    """Say which rows are longer than the model is given."""
    pairs = [(row.text_a, row.text_b or "") for row in rows]
    _, pieces = tokenizer.encode_flat(chain.from_iterable(pairs))
    for row, first, second in zip(rows, pieces[::2], pieces[1::2], strict=True):
        total = int(first) + int(second) + 2 + (row.text_b is not None) * tokenizer.separators
        if total > longest:
            logger.warning("line %d: %d word pieces, cut to %d", row.line, total, longest)


def predict(model: torch.nn.Module, tokenizer: AnyTokenizer, rows: list[Row], longest: int,
            batch_size: int, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    """Return the logits [rows, labels] of texts cut to `longest` word pieces."""
    note_cut_rows(rows, tokenizer, longest)
    examples = (Example(f"line {row.line}", row.text_a, row.text_b, UNLABELLED) for row in rows)
    features = encode_examples(examples, tokenizer, longest, (), regression=True, cut=cut_pair)
    return predict_logits(model, features, device, batch_size, dtype)


def predictions(
    rows: list[Row], logits: torch.Tensor, kind: str, names: list[str]
) -> Iterator[dict[str, Any]]:
    """Yield the label or labels and the probabilities, or the score or scores, of each row."""
    values = {"label": logits.softmax(dim=1), "labels": logits.sigmoid()}.get(kind, logits)
    for row, numbers in zip(rows, values.tolist(), strict=True):
        named = dict(zip(names, numbers, strict=True))
        answer = {
            "score": numbers[0], "scores": named, "label": max(names, key=named.get),
            "labels": [name for name in names if named[name] > 0.5],
        }[kind]
        texts = ({"sentence": row.text_a} if row.text_b is None else
                 {"sentence1": row.text_a, "sentence2": row.text_b})
        probabilities = {"probabilities": named} if kind.startswith("label") else {}
        yield {"line": row.line, kind: answer, **probabilities, **texts}


# ------------------------------------------------------------------ writing


def one_line(text: str) -> str:
    """Return a text without tabs and line breaks."""
    return " ".join(text.split())


def format_line(prediction: dict[str, Any], form: str, width: int = LABEL_WIDTH) -> str:
    """Return one line of output; `width` is that of the labels in a table to read."""
    if form == "jsonl":
        return json.dumps(prediction, ensure_ascii=False)
    texts = [one_line(prediction[key]) for key in ("sentence", "sentence1", "sentence2")
             if key in prediction]
    labels = [one_line(each if isinstance(each, str) else ", ".join(each))
              for each in (prediction.get("label"), prediction.get("labels")) if each is not None]
    numbers = (prediction.get("probabilities") or prediction.get("scores")
               or {"score": prediction["score"]})
    if form == "tsv":
        figures = [f"{number:.6f}" for number in numbers.values()]
        return "\t".join([str(prediction["line"]), *labels, *figures, *(*texts, "")[:2]])
    names = list(numbers)
    if labels and len(names) > SHOWN_LABELS:
        names = sorted(names, key=numbers.get, reverse=True)[:SHOWN_LABELS]
    figures = "  ".join(f"{one_line(name)} {numbers[name]:.4f}" for name in names)
    label = "".join(f"{pad(each or '-', width)}  " for each in labels)
    return f"{label}{figures}  {' | '.join(texts)}"


def header(kind: str, names: list[str]) -> str:
    """Return the first line of tab-separated output."""
    numbers = {"score": ["score"], "scores": names}.get(kind, [kind, *names])
    return "\t".join(["line", *map(one_line, numbers), "sentence", "sentence2"])


def write_all(lines: Iterable[str]) -> None:
    """Print lines as they are made; a reader that has gone (`| head`) ends it quietly."""
    try:
        for line in lines:
            print(line, flush=True)
    except BrokenPipeError:
        # Python would complain of the same once more when it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_args(args: argparse.Namespace) -> None:
    """Raise a `UserError` for a column that there cannot be."""
    if len(args.columns) > 2 or "0" in args.columns:
        raise UserError(f"--columns {' '.join(args.columns)}; expected one or two, from 1")


def check_streams(path: Path | None) -> None:
    """Raise a `UserError` where input or output is missing; `path`: None for standard input."""
    if path is not None and (path.is_dir() or not path.exists()):
        raise UserError(f"--input_file {path}: {'a folder' if path.is_dir() else 'no such file'};"
                        " expected a file of lines")
    for stream, name in ((path or sys.stdin, "standard input"), (sys.stdout, "standard output")):
        if stream is None:
            raise UserError(f"{name} is closed; expected it open (input: or --input_file)")


def main(args: argparse.Namespace) -> None:
    # Settings and model
    check_args(args)
    check_streams(args.input_file)
    sys.stdout.reconfigure(encoding="utf-8")  # whatever the terminal's: the texts are
    device = get_device(args.no_cuda)
    dtype = resolve_precision(args.precision, device)
    folder = fetch_model(args.model, args.cache_dir or None)
    task, tokenizer = stored_task(folder), load_tokenizer(folder, args.do_lower_case or None)
    model = load_classifier(folder, device=device)
    config = model.config
    config.check_vocabulary(len(tokenizer), folder)
    longest = args.max_seq_length or longest_input(folder, config)
    config.check_length(longest, "the model")
    freeze(model, dtype, device)

    # Predictions, as the input comes
    kind = answer_kind(config)
    names = list(config.id2label.values())
    if task is not None and not task.is_glue:
        names = list(label_order(task, config.id2label)) or names
    one_text = takes_one_text(config, tokenizer, task)
    inputs = TextInputs(args.input_file, args.input_format, args.columns, task, names)
    width = max(LABEL_WIDTH, *(display_width(one_line(name)) for name in names))

    def lines() -> Iterator[str]:
        if args.format == "tsv":
            yield header(kind, names)
        for rows in inputs.rows(stream):
            check_pairs(rows, inputs.name, one_text, task)
            logits = predict(model, tokenizer, rows, longest, args.batch_size, device, dtype)
            yield from (format_line(each, args.format, width)
                        for each in predictions(rows, logits, kind, names))

    with (nullcontext(sys.stdin.buffer) if args.input_file is None
          else args.input_file.open("rb")) as stream:
        write_all(lines())


if __name__ == "__main__":
    run_script(main, get_args_parser())

"""Label sentences, or pairs of sentences, with any trained classifier: PyTorch or ONNX.

Reads one input a line, pairs separated by a tab, from standard input as it comes or from a file;
JSON lines hold {"sentence": ...} or {"sentence1": ..., "sentence2": ...}. Writes one line for each:
the label and the probability of every label, or the score of a regression task.

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
from typing import Any, BinaryIO, NamedTuple

import torch

from transformer.checkpoint import fetch_model
from transformer.evaluation import predict_logits
from transformer.features import encode_examples
from transformer.file_utils import UserError
from transformer.inference import load_classifier
from transformer.modeling import freeze
from transformer.runtime import (
    add_precision_argument,
    get_device,
    resolve_precision,
    run_script,
)
from transformer.tasks import BYTE_ORDER_MARK, Example
from transformer.tokenization import BertTokenizer

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 16
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
UNLABELLED = "0"  # stands for the label that encoding asks for


class Row(NamedTuple):
    """One input: its line number from 1, and one text or two."""

    line: int
    text_a: str
    text_b: str | None


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "predict.py", description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=str, required=True,
        help="classifier: folder or URL, from training or quantize.py")
    add("--input_file", type=Path, default=None,
        help="tab-separated lines, or JSON lines (.jsonl); not given: standard input")
    add("--input_format", choices=["auto", "tsv", "jsonl"], default="auto",
        help="auto: by the suffix of --input_file, tab-separated otherwise")
    add("--format", choices=["text", "tsv", "jsonl"], default="text",
        help="a table to read, or tab-separated with a header, or JSON lines")
    add("--max_seq_length", type=int, default=128,
        help="longest input in word pieces; longer ones are cut, with a note")
    add("--batch_size", type=int, default=32, help="inputs that are computed at once")
    add("--do_lower_case", action="store_true",
        help="lower-case the text; without it the model's own setting holds")
    add("--cache_dir", type=str, default="",
        help="folder for models given as URLs; empty: $TINYBERT_CACHE, else ~/.cache/tinybert")
    add("--no_cuda", action="store_true", help="compute on the CPU")
    add_precision_argument(parser)
    return parser


# ------------------------------------------------------------------ reading


def arriving_lines(stream: BinaryIO) -> Iterator[list[bytes]]:
    """Yield the lines of a stream as they arrive: all that are there, then wait for more."""
    rest = b""
    while chunk := stream.read1(CHUNK_BYTES):
        *lines, rest = (rest + chunk).split(b"\n")
        if lines:
            yield lines
    if rest:
        yield [rest]


def parse_json(name: str, number: int, text: str) -> tuple[str, str | None]:
    """Read one JSON line; returns its one text or two."""
    try:
        value = json.loads(text)
        keys = ["sentence"] if "sentence" in value else ["sentence1", "sentence2"]
        # JSON can spell half a surrogate pair, which UTF-8 can not.
        first, *second = (value[key].encode("utf-8", "replace").decode() for key in keys)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f'{name}, line {number}: {text[:60]!r}; expected {{"sentence": "..."}} or'
                        ' {"sentence1": "...", "sentence2": "..."}') from None
    return first, second[0] if second else None


def parse_line(name: str, number: int, raw: bytes, is_json: bool) -> Row | None:
    """Read one line; None for an empty one. Bytes that are not UTF-8 are replaced, with a note."""
    text = raw.removesuffix(b"\r").decode("utf-8", errors="replace")
    if number == 1:
        text = text.removeprefix(BYTE_ORDER_MARK)
    if not text.strip():
        logger.warning("%s, line %d: empty, passed over", name, number)
        return None
    if "\ufffd" in text and "\ufffd".encode() not in raw:
        logger.warning("%s, line %d: is not UTF-8; what cannot be read is replaced", name, number)
    if is_json:
        return Row(number, *parse_json(name, number, text))
    text_a, *others = text.split("\t")
    if len(others) > 1:
        raise UserError(f"{name}, line {number}: {len(others) + 1} columns; expected a sentence,"
                        " or two with a tab between")
    return Row(number, text_a, others[0] if others else None)


def read_rows(stream: BinaryIO, name: str, is_json: bool) -> Iterator[list[Row]]:
    """Yield the rows of a stream as they arrive."""
    first = 1
    for lines in arriving_lines(stream):
        rows = [parse_line(name, number, raw, is_json)
                for number, raw in enumerate(lines, start=first)]
        first += len(lines)
        if rows := [row for row in rows if row is not None]:
            yield rows


# ------------------------------------------------------------------ predicting


def note_cut_rows(rows: list[Row], tokenizer: BertTokenizer, longest: int) -> None:
    """Say which rows are longer than the model is given."""
    pairs = [(row.text_a, row.text_b or "") for row in rows]
    _, pieces = tokenizer.encode_flat(chain.from_iterable(pairs))
    for row, first, second in zip(rows, pieces[::2], pieces[1::2], strict=True):
        total = int(first) + int(second) + (2 if row.text_b is None else 3)
        if total > longest:
            logger.warning("line %d: %d word pieces, cut to %d", row.line, total, longest)


def predict(model: torch.nn.Module, tokenizer: BertTokenizer, rows: list[Row],
            args: argparse.Namespace, device: torch.device,
            dtype: torch.dtype | None) -> torch.Tensor:
    """Return the logits [rows, labels] that evaluation would see."""
    note_cut_rows(rows, tokenizer, args.max_seq_length)
    examples = (Example(f"line {row.line}", row.text_a, row.text_b, UNLABELLED) for row in rows)
    features = encode_examples(examples, tokenizer, args.max_seq_length, (), regression=True)
    return predict_logits(model, features, device, args.batch_size, dtype)


def predictions(rows: list[Row], logits: torch.Tensor, names: dict[int, str]) -> Iterator[dict]:
    """Yield the label and probabilities, or the score, of each row."""
    all_probabilities = logits.softmax(dim=1).tolist()
    for row, scores, probabilities in zip(rows, logits.tolist(), all_probabilities, strict=True):
        texts = ({"sentence": row.text_a} if row.text_b is None else
                 {"sentence1": row.text_a, "sentence2": row.text_b})
        if len(names) == 1:  # regression
            yield {"line": row.line, "score": scores[0], **texts}
            continue
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        yield {"line": row.line, "label": names[best], "probabilities": {
            names[index]: value for index, value in enumerate(probabilities)}, **texts}


# ------------------------------------------------------------------ writing


def format_line(prediction: dict[str, Any], form: str) -> str:
    """Return one line of output."""
    if form == "jsonl":
        return json.dumps(prediction, ensure_ascii=False)
    texts = [prediction[key] for key in ("sentence", "sentence1", "sentence2") if key in prediction]
    numbers = prediction.get("probabilities", {"score": prediction.get("score")})
    if form == "tsv":
        label = [prediction["label"]] if "label" in prediction else []
        cells = [str(prediction["line"]), *label, *(f"{number:.6f}" for number in numbers.values())]
        return "\t".join([*cells, *(" ".join(text.split()) for text in (*texts, "")[:2])])
    figures = "  ".join(f"{name} {number:.4f}" for name, number in numbers.items())
    label = f"{prediction['label']:<14}  " if "label" in prediction else ""
    return f"{label}{figures}  {' | '.join(' '.join(text.split()) for text in texts)}"


def header(names: dict[int, str]) -> str:
    """Return the first line of tab-separated output."""
    numbers = ["score"] if len(names) == 1 else ["label", *names.values()]
    return "\t".join(["line", *numbers, "sentence", "sentence2"])


def write_all(lines: Iterable[str]) -> None:
    """Print lines as they are made; a reader that has gone (`| head`) ends it quietly."""
    try:
        for line in lines:
            print(line, flush=True)
    except BrokenPipeError:
        # Python would complain of the same once more when it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(args: argparse.Namespace) -> None:
    # Settings and model
    path = args.input_file
    if path is not None and not path.is_file():
        raise UserError(f"--input_file {path}: no such file, or a folder; expected a file of lines")
    sys.stdout.reconfigure(encoding="utf-8")  # whatever the terminal's: the texts are
    device = get_device(args.no_cuda)
    dtype = resolve_precision(args.precision, device)
    folder = fetch_model(args.model, args.cache_dir or None)
    model = load_classifier(folder, device=device)
    tokenizer = BertTokenizer.from_pretrained(folder, args.do_lower_case or None)
    model.config.check_vocabulary(len(tokenizer), folder)
    model.config.check_length(args.max_seq_length, "the model")
    freeze(model, dtype, device)

    # Predictions, as the input comes
    is_json = (path is not None and path.suffix in JSON_SUFFIXES
               if args.input_format == "auto" else args.input_format == "jsonl")
    name = "standard input" if path is None else str(path)
    names = model.config.id2label

    def lines() -> Iterator[str]:
        if args.format == "tsv":
            yield header(names)
        for rows in read_rows(stream, name, is_json):
            logits = predict(model, tokenizer, rows, args, device, dtype)
            yield from (format_line(each, args.format) for each in predictions(rows, logits, names))

    with nullcontext(sys.stdin.buffer) if path is None else path.open("rb") as stream:
        write_all(lines())


if __name__ == "__main__":
    run_script(main, get_args_parser())

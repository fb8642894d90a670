"""Files of pre-training instances: how an epoch is written, and the dataset that reads it back.

On disk epochs are of one of two formats, each with an `epoch_N_metrics.json` that counts the
instances:

binary  `corpus.bin` has the ids, `corpus.json` says what they are and of which vocabulary,
        `epoch_N.bin` has a record of spans an instance, and with masking `epoch_N_masks.bin` has
        a fixed number of masked positions an instance.
json    `epoch_N.json` has one JSON object an instance, as the original wrote it; it is converted
        to the arrays of the binary format before it is read.
"""

import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch

from transformer.corpus import (
    CORPUS_IDS_NAME,
    Corpus,
    EpochSettings,
    Instances,
    Masking,
    RandomNumbers,
    id_dtype,
    load_array,
    make_instances,
    mask_tokens,
)
from transformer.file_utils import UserError, read_json, write_json
from transformer.tokenization import CLS, SEP, AnyTokenizer

logger = logging.getLogger(__name__)

CORPUS_INFO_NAME = "corpus.json"
BINARY_SUFFIX, MASKS_SUFFIX, JSON_SUFFIX = ".bin", "_masks.bin", ".json"
METRICS_SUFFIX = "_metrics.json"
GENERATED_FILE = re.compile(
    r"corpus\.(?:bin|json)|epoch_(\d+)(\.bin|_masks\.bin|\.json|_metrics\.json)"
)
ROWS_PER_BLOCK = 1 << 12  # read or checked at once


# ------------------------------------------------------------------ what a folder holds


class Metrics(NamedTuple):
    """The counts beside an epoch's data file."""

    num_training_examples: int
    max_seq_len: int


class CorpusInfo(NamedTuple):
    """What `corpus.json` says of the binary files."""

    dtype: str  # of the ids
    tokens: int
    predictions: int  # masked positions of a row
    vocabulary_sha256: str


def vocabulary_sha256(tokenizer: AnyTokenizer) -> str:
    """Return the fingerprint of a vocabulary: all its word pieces, in the order of their ids."""
    return hashlib.sha256("\n".join(tokenizer.vocab).encode()).hexdigest()


def record_dtype(tokens: int) -> np.dtype:
    """Return the record of an instance in `epoch_N.bin`: 13 bytes, or 21 from 2^32 tokens on."""
    start = "<u4" if tokens < 1 << 32 else "<u8"
    return np.dtype([
        ("first_start", start), ("first_length", "<u2"),
        ("second_start", start), ("second_length", "<u2"), ("is_random_next", "u1"),
    ])


def mask_dtype(vocab_size: int) -> np.dtype:
    """Return a masked position in `epoch_N_masks.bin`; 0, which is [CLS], stands for none."""
    return np.dtype([("position", "<u2"), ("id", id_dtype(vocab_size))])


def epoch_path(data_dir: Path | str, epoch: int, suffix: str) -> Path:
    """Return a file of an epoch, which counts from 0."""
    return Path(data_dir) / f"epoch_{epoch}{suffix}"


def generated_files(data_dir: Path) -> list[Path]:
    """Return the generated files of any format; first those without which no epoch is read."""
    paths = [path for path in data_dir.iterdir() if GENERATED_FILE.fullmatch(path.name)]
    return sorted(paths, key=lambda path: (not path.name.startswith("epoch_0"), path.name))


# ------------------------------------------------------------------ writing an epoch


class MaskedRow(NamedTuple):
    """An instance as ids with special tokens, what is masked, and the original ids there."""

    first_length: int  # tokens of segment 0
    is_random_next: bool
    ids: list[int]
    positions: list[int]
    labels: list[int]


@dataclass
class EpochWriter:
    """Encodes instances of a corpus for the files of one format, "binary" or "json"."""

    corpus_dir: Path
    tokenizer: AnyTokenizer
    settings: EpochSettings
    masking: Masking
    format: str

    @cached_property
    def corpus(self) -> Corpus:
        """The tokenized corpus, whose files the worker processes share."""
        return Corpus.open(self.corpus_dir, len(self.tokenizer))

    @property
    def predictions(self) -> int:
        """How many masked positions a row has in `epoch_N_masks.bin`."""
        return self.masking.predictions(self.settings.max_seq_len)

    @property
    def suffixes(self) -> list[str]:
        """How the names of an epoch's data files end."""
        if self.format == "json":
            return [JSON_SUFFIX]
        return [BINARY_SUFFIX, MASKS_SUFFIX] if self.predictions else [BINARY_SUFFIX]

    def encode(self, epoch: int, block: tuple[int, int]) -> tuple[int, list[bytes]]:
        """Return the number of instances of sentences [begin, end), and their bytes in each file.

        The files are those of `suffixes`.
        """
        encode = self._json if self.format == "json" else self._binary
        blocks = list(make_instances(self.corpus, self.settings, epoch, *block))
        contents = zip(*(encode(epoch, instances) for instances in blocks), strict=True)
        return (sum(len(instances.numbers) for instances in blocks),
                [b"".join(content) for content in contents])

    def _binary(self, epoch: int, instances: Instances) -> Iterator[bytes]:
        """Yield the records, and with masking the masked positions."""
        records = np.empty(len(instances.numbers), record_dtype(len(self.corpus.token_ids)))
        for field, values in zip(records.dtype.names, instances[1:], strict=True):
            records[field] = values
        yield records.tobytes()
        if not self.predictions:
            return
        masks = np.zeros((len(records), self.predictions), mask_dtype(len(self.tokenizer)))
        for slots, row in zip(masks, self._rows(epoch, instances), strict=True):
            masked = [(position, row.ids[position]) for position in row.positions]
            slots[: len(masked)] = masked
        yield masks.tobytes()

    def _json(self, epoch: int, instances: Instances) -> Iterator[bytes]:
        """Yield the lines."""
        lines = []
        for row in self._rows(epoch, instances):
            tokens = ", ".join([self._json_pieces[index] for index in row.ids])
            labels = ", ".join([self._json_pieces[index] for index in row.labels])
            segments = [0] * row.first_length + [1] * (len(row.ids) - row.first_length)
            lines.append(
                f'{{"tokens": [{tokens}], "segment_ids": {segments}, '
                f'"is_random_next": {"true" if row.is_random_next else "false"}, '
                f'"masked_lm_positions": {row.positions}, "masked_lm_labels": [{labels}]}}\n'
            )
        yield "".join(lines).encode()

    def _rows(self, epoch: int, instances: Instances) -> Iterator[MaskedRow]:
        """Return instances as ids, masked."""
        token_ids, tokenizer = self.corpus.token_ids, self.tokenizer
        seeds = RandomNumbers(self.settings.seed, epoch).bits("masking", instances.numbers)
        columns = (values.tolist() for values in (seeds, *instances[1:]))
        for seed, first, first_length, second, second_length, is_random in zip(
            *columns, strict=True
        ):
            ids = token_ids[first : first + first_length].tolist()
            ids = [tokenizer.cls_id, *ids, tokenizer.sep_id]
            if second_length:
                ids += [tokenizer.sep_id] * (tokenizer.separators - 1)
                ids += token_ids[second : second + second_length].tolist()
                ids.append(tokenizer.sep_id)
            masked = mask_tokens(ids, self.masking, Random(seed))
            yield MaskedRow(first_length + 2, is_random, *masked)

    @cached_property
    def _json_pieces(self) -> list[str]:
        # Encoded once a piece and not once a token: the same text as json.dumps, 3 times as fast.
        return [json.dumps(piece) for piece in self.tokenizer.vocab]

    def write_info(self, path: Path) -> None:
        """Write `corpus.json`, which says what the ids of the binary format are."""
        info = CorpusInfo(
            id_dtype(len(self.tokenizer)), len(self.corpus.token_ids), self.predictions,
            vocabulary_sha256(self.tokenizer),
        )
        write_json(path, info._asdict())

    def write_metrics(self, path: Path, rows: int) -> None:
        """Write `epoch_N_metrics.json`, the counts of an epoch."""
        write_json(path, Metrics(rows, self.settings.max_seq_len)._asdict())


# ------------------------------------------------------------------ finding and checking files


def find_epochs(data_dir: Path | str) -> tuple[int, str]:
    """Return how many epochs were generated, and how their data files end: .bin or .json.

    None, those of both formats, a gap in their numbers, and a data file or metrics file without
    the other are `UserError`s that name the missing file.
    """
    names = [GENERATED_FILE.fullmatch(path.name) for path in generated_files(Path(data_dir))]
    suffixes = {name[2] for name in names} & {BINARY_SUFFIX, JSON_SUFFIX}
    if not suffixes:
        raise UserError(
            f"{data_dir}: no epoch_0.json and no epoch_0.bin; expected the output of "
            "pregenerate_training_data.py"
        )
    if len(suffixes) > 1:
        raise UserError(
            f"{data_dir}: data files of both formats, .bin and .json; expected those of one run"
        )
    suffix = suffixes.pop()
    count = 1 + max(int(name[1]) for name in names if name[1])
    for epoch in range(count):
        for path in (epoch_path(data_dir, epoch, end) for end in (suffix, METRICS_SUFFIX)):
            if not path.is_file():
                raise UserError(
                    f"{path}: no such file; expected epochs 0 to {count - 1}, each with its "
                    "data and its metrics"
                )
    return count, suffix


def _read_fields(path: Path, kind: type) -> Any:
    """Read a JSON object with these fields; None if one of them is not of its type."""
    content = read_json(path)
    values = [content.get(name) for name in kind._fields]
    types = list(kind.__annotations__.values())
    return kind(*values) if list(map(type, values)) == types else None


def read_metrics(data_dir: Path | str, epoch: int) -> Metrics:
    """Read `epoch_N_metrics.json`; a missing or wrong one is a `UserError`."""
    path = epoch_path(data_dir, epoch, METRICS_SUFFIX)
    metrics = _read_fields(path, Metrics)
    if metrics is None or min(metrics) < 1:
        raise UserError(f"{path}: expected positive integers {' and '.join(Metrics._fields)}")
    return metrics


def read_corpus_info(data_dir: Path, tokenizer: AnyTokenizer) -> CorpusInfo:
    """Read `corpus.json`; one that is wrong or of another vocabulary is a `UserError`."""
    path = data_dir / CORPUS_INFO_NAME
    info = _read_fields(path, CorpusInfo)
    if info is None:
        raise UserError(f"{path}: expected {', '.join(CorpusInfo._fields)}")
    own = vocabulary_sha256(tokenizer)
    if (info.vocabulary_sha256, info.dtype) != (own, id_dtype(len(tokenizer))):
        raise UserError(
            f"{path}: of the vocabulary with SHA-256 {info.vocabulary_sha256[:12]}...; expected "
            f"the model's {len(tokenizer)} word pieces, {own[:12]}..., as the data are ids of them"
        )
    return info


def read_array(
    path: Path, dtype: np.dtype | str, count: int, source: str, mapped: bool
) -> np.ndarray:
    """Read or map `count` values; a file of another size is a `UserError`.

    `source` is the name of the file that says how many there are.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the one that {source} describes")
    expected = count * np.dtype(dtype).itemsize
    if path.stat().st_size != expected:
        raise UserError(
            f"{path}: {path.stat().st_size} bytes; expected {expected}, as {source} says; the "
            "file is incomplete or of another call"
        )
    return load_array(path, dtype, mapped)


# ------------------------------------------------------------------ reading an epoch


class _Epoch(NamedTuple):
    """What a dataset holds, whatever the format: spans of text, and what to write over it."""

    token_ids: np.ndarray  # [tokens]
    records: np.ndarray  # [rows] of record_dtype
    masks: np.ndarray  # [rows, predictions] of mask_dtype


def _read_binary_epoch(
    path: Path, metrics: Metrics, tokenizer: AnyTokenizer, mapped: bool
) -> _Epoch:
    """Read or map `epoch_N.bin` and the files beside it, and check them."""
    info = read_corpus_info(path.parent, tokenizer)
    rows, counted = metrics.num_training_examples, f"{path.stem}{METRICS_SUFFIX}"
    ids_file = path.with_name(CORPUS_IDS_NAME)
    token_ids = read_array(ids_file, info.dtype, info.tokens, CORPUS_INFO_NAME, mapped)
    records = read_array(path, record_dtype(info.tokens), rows, counted, mapped)
    masks = np.empty(0, mask_dtype(len(tokenizer)))
    if info.predictions:
        masks_file = path.with_name(path.stem + MASKS_SUFFIX)
        masks = read_array(masks_file, masks.dtype, rows * info.predictions, counted, mapped)
    for begin in range(0, rows, ROWS_PER_BLOCK):
        block = records[begin : begin + ROWS_PER_BLOCK]
        right = block["first_length"] > 0
        right &= _lengths(block, tokenizer.separators) <= metrics.max_seq_len
        for part in ("first", "second"):
            right &= block[f"{part}_start"] <= info.tokens - block[f"{part}_length"].astype("i8")
        if not right.all():
            raise UserError(
                f"{path}: record {begin + int(np.argmin(right))} (from 0) is no pair of spans of "
                f"the {info.tokens} tokens in {CORPUS_IDS_NAME}; the file is damaged or of "
                "another call"
            )
    return _Epoch(token_ids, records, masks.reshape(rows, info.predictions))


def _lengths(records: np.ndarray, separators: int) -> np.ndarray:
    """Return the length of each row, special tokens included, as int32."""
    lengths = np.add(records["first_length"], 2, dtype=np.int32)
    lengths += records["second_length"]
    lengths += (records["second_length"] > 0) * np.int32(separators)
    return lengths


def parse_row(line: bytes, max_length: int, vocab: dict[str, int]) -> tuple[list[int], list[int]]:
    """Return the ids of both segments' text of a line of `epoch_N.json`, as they are masked.

    A malformed line is a ValueError or a TypeError.
    """
    row = json.loads(line)
    tokens, segments = row.get("tokens"), row.get("segment_ids")
    length, first = len(tokens), segments.count(0)
    if not 0 < length <= max_length:
        raise ValueError(f"{length} tokens; expected 1 to {max_length}")
    if segments != [0] * first + [1] * (length - first):
        raise ValueError(f"expected {length} segment ids, zeros and then ones")
    if [tokens[0], tokens[first - 1], tokens[-1]] != [CLS, SEP, SEP] or first == length - 1:
        raise ValueError("expected the tokens [CLS], text, [SEP], and of a pair text, [SEP]")
    try:
        ids = [vocab[token] for token in tokens]
    except KeyError as error:
        raise ValueError(f"token {error} is not in the model's vocabulary of {len(vocab)} word "
                         "pieces") from None
    return ids[1 : first - 1], ids[first:-1]


def read_json_rows(
    path: Path, metrics: Metrics, vocab: dict[str, int]
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield what `parse_row` returns; a malformed line is a `UserError` that names it."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield parse_row(line, metrics.max_seq_len, vocab)
            # ValueError covers malformed JSON and bytes that are not UTF-8.
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(
                    f"{path}, line {number}: {error}; expected the "
                    f"{metrics.num_training_examples} rows that its metrics file counts"
                ) from None


def _convert_json_epoch(
    path: Path, metrics: Metrics, tokenizer: AnyTokenizer, mapped: bool
) -> _Epoch:
    """Convert `epoch_N.json` to arrays as those of the binary format, block by block.

    They pass through temporary files without names, which not even a killed process leaves
    behind; TMPDIR chooses the place.
    """
    ids_dtype, spans_dtype = np.dtype(id_dtype(len(tokenizer))), record_dtype(1 << 32)
    rows = read_json_rows(path, metrics, tokenizer.vocab)
    start = count = 0
    with tempfile.TemporaryFile() as ids_file, tempfile.TemporaryFile() as spans_file:
        while block := list(islice(rows, ROWS_PER_BLOCK)):
            text, spans = [], []
            for first, second in block:
                middle = start + len(first)
                spans.append((start, len(first), middle, len(second), False))
                start = middle + len(second)
                text += first + second
            ids_file.write(np.array(text, ids_dtype).data)
            spans_file.write(np.array(spans, spans_dtype).data)
            count += len(block)
        if count != metrics.num_training_examples:
            raise UserError(
                f"{path}: {count} rows; expected {metrics.num_training_examples}, as "
                f"{path.stem}{METRICS_SUFFIX} says; the file is incomplete or of another call"
            )
        ids_file.seek(0)
        spans_file.seek(0)
        return _Epoch(load_array(ids_file, ids_dtype, mapped),
                      load_array(spans_file, spans_dtype, mapped),
                      np.empty((count, 0), mask_dtype(len(tokenizer))))


# ------------------------------------------------------------------ the dataset


class PregeneratedDataset:
    """One epoch of instances as flat integer arrays, in memory or mapped.

    It takes 2 bytes a token and 13 an instance, `lengths` 4 more once it is read; a JSON epoch
    first takes as much in temporary files (TMPDIR chooses the place). With `reduce_memory` the
    arrays stay in their files, which are mapped into memory. An epoch beyond the generated ones
    reads them again in turn. A missing file, a malformed row, more or fewer rows than the metrics
    say, rows longer than `max_seq_length`, and data of another vocabulary are `UserError`s.
    """

    def __init__(
        self, data_dir: Path | str, epoch: int, tokenizer: AnyTokenizer,
        max_seq_length: int = 128, reduce_memory: bool = False,
    ) -> None:
        generated, suffix = find_epochs(data_dir)
        self.epoch = epoch % generated
        path = epoch_path(data_dir, self.epoch, suffix)
        if epoch >= generated:
            logger.info("epoch %d: reads %s again, as %d epochs were generated",
                        epoch, path.name, generated)
        metrics = read_metrics(data_dir, self.epoch)
        if metrics.max_seq_len > max_seq_length:
            raise UserError(
                f"{epoch_path(data_dir, self.epoch, METRICS_SUFFIX)}: instances of up to "
                f"{metrics.max_seq_len} tokens; expected at most the --max_seq_length of "
                f"{max_seq_length}"
            )
        self.cls_id, self.sep_id, self.pad_id = (
            tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id)
        self.separators, self.segments = tokenizer.separators, tokenizer.segments
        read = _read_binary_epoch if suffix == BINARY_SUFFIX else _convert_json_epoch
        self._data = read(path, metrics, tokenizer, reduce_memory)

    def __len__(self) -> int:
        return len(self._data.records)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row with the special ones, int32 [rows]."""
        return _lengths(self._data.records, self.separators)

    def collate(self, indices: Sequence[int], pad_to: int | None = None) -> dict[str, torch.Tensor]:
        """Return int64 tensors [rows, length], padded to the longest row or to `pad_to`.

        `input_ids`, `token_type_ids` and `attention_mask` (1 at real tokens).
        """
        indices = np.asarray(indices, dtype=np.int64)
        records = self._data.records[indices]
        first_starts, second_starts, first_lengths, second_lengths = (
            records[field].astype(np.int64)[:, None]
            for field in ("first_start", "second_start", "first_length", "second_length")
        )
        is_pair = second_lengths > 0  # [rows, 1]
        # [rows, 1]: where the first text's last [SEP] stands, and the row's last
        middles = first_lengths + 1 + is_pair * (self.separators - 1)
        ends = middles + second_lengths + is_pair
        length = pad_to or int(ends.max()) + 1
        positions = np.arange(length)
        is_second = positions > middles  # [rows, length]
        places = positions + np.where(is_second, second_starts - middles - 1, first_starts - 1)
        # Places of special tokens and padding mean nothing and may lie outside the corpus.
        input_ids = self._data.token_ids.take(places, mode="clip").astype(np.int64)
        attention_mask = positions <= ends
        input_ids[~attention_mask] = self.pad_id
        input_ids[:, 0] = self.cls_id
        np.put_along_axis(input_ids, ends, self.sep_id, axis=1)
        for place in range(self.separators):
            np.put_along_axis(input_ids, np.maximum(middles - place, first_lengths + 1),
                              self.sep_id, axis=1)
        masks = self._data.masks[indices]  # [rows, predictions]
        rows, slots = np.nonzero(masks["position"])
        input_ids[rows, masks["position"][rows, slots]] = masks["id"][rows, slots]
        return {
            "input_ids": torch.from_numpy(input_ids),
            "token_type_ids": torch.from_numpy(
                is_second & attention_mask & self.segments).long(),
            "attention_mask": torch.from_numpy(attention_mask).long(),
        }

"""Pre-training text: documents, next-sentence instances, masking, and the files they live in.

A corpus is one flat array of word-piece ids with the starts of its sentences and documents; an
instance is two spans of that array, as cutting it to length only trims ends (BERT, arXiv
1810.04805, section 3.1 and appendix A). On disk an epoch is the original's pair of files:
`epoch_N.json` with one JSON object a line, and `epoch_N_metrics.json` with its counts.
"""

import json
import logging
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from transformer.file_utils import UserError, atomic_path, read_json, write_json
from transformer.tokenization import BertTokenizer

logger = logging.getLogger(__name__)

LINES_PER_BATCH = 8192
VALUES_PER_FLUSH = 1 << 20
MANY_UNKNOWN = 0.1
IGNORED_LABEL = -100
CONTINUATION_PREFIX = "##"


# ------------------------------------------------------------------ flat integer arrays


class IntegerWriter:
    """Collects integers of one dtype, in memory or, where a path is given, in a file."""

    TYPE_CODES = {"uint8": "B", "uint16": "H", "int32": "i", "int64": "q"}

    def __init__(self, dtype: str, path: Path | None = None) -> None:
        self.dtype = dtype
        self.path = path
        self._values = array(self.TYPE_CODES[dtype])
        self._file = path.open("wb") if path else None

    def extend(self, values: Iterable[int]) -> None:
        """Append integers, which must fit the dtype."""
        self._values.extend(values)
        if self._file and len(self._values) >= VALUES_PER_FLUSH:
            self._flush()

    def _flush(self) -> None:
        self._values.tofile(self._file)
        del self._values[:]

    def close(self) -> np.ndarray:
        """Return all values: an array in memory, or a read-only map of the file."""
        if self._file is None:
            return np.asarray(self._values)  # shares the memory
        self._flush()
        self._file.close()
        return map_integers(self.path, self.dtype)


def map_integers(path: Path, dtype: str) -> np.ndarray:
    """Map a file of integers into memory, read-only; an empty file is an empty array."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def id_dtype(vocab_size: int) -> str:
    """Return the smallest dtype that holds every word-piece id."""
    return "uint16" if vocab_size <= 1 << 16 else "int32"


# ------------------------------------------------------------------ documents


class Corpus(NamedTuple):
    """Tokenized documents. Sentence s has the ids `token_ids[starts[s]:starts[s + 1]]`."""

    token_ids: np.ndarray  # [tokens]
    sentence_starts: np.ndarray  # [sentences + 1], counted in tokens
    document_starts: np.ndarray  # [documents + 1], counted in sentences
    unknown: int  # how many ids are [UNK]

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.document_starts) - 1

    @property
    def sentences(self) -> int:
        """Number of sentences."""
        return len(self.sentence_starts) - 1

    @classmethod
    def open(cls, directory: Path, vocab_size: int) -> "Corpus":
        """Map a corpus that `build_corpus` wrote to a folder; processes share its memory."""
        return cls(
            map_integers(directory / "token_ids", id_dtype(vocab_size)),
            map_integers(directory / "sentence_starts", "int64"),
            map_integers(directory / "document_starts", "int64"),
            0,
        )


def read_corpus_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 text file, stripped; other bytes are a `UserError` with line."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield line.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: {error}; expected UTF-8 text, one sentence a line"
                ) from error


def line_batches(lines: Iterable[str], size: int = LINES_PER_BATCH) -> Iterator[list[str]]:
    """Group lines into lists of at most `size`."""
    batch: list[str] = []
    for line in lines:
        batch.append(line)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def build_corpus(
    lines: Iterable[str], tokenizer: BertTokenizer, directory: Path | None = None
) -> Corpus:
    """Tokenize sentences, one a line, with an empty line between documents.

    Sentences without word pieces and documents without sentences are dropped. With a `directory`
    the arrays live in files there, and memory stays at a batch of lines whatever the corpus.
    """
    token_ids, sentence_starts, document_starts = (
        IntegerWriter(dtype, directory / name if directory else None)
        for name, dtype in (
            ("token_ids", id_dtype(len(tokenizer))),
            ("sentence_starts", "int64"),
            ("document_starts", "int64"),
        )
    )
    tokens = sentences = last_start = unknown = 0
    sentence_starts.extend([0])
    document_starts.extend([0])
    for batch in line_batches(lines):
        for line, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            if ids:
                token_ids.extend(ids)
                tokens += len(ids)
                sentences += 1
                sentence_starts.extend([tokens])
                unknown += ids.count(tokenizer.unk_id)
            elif not line and sentences > last_start:
                document_starts.extend([sentences])
                last_start = sentences
    if sentences > last_start:
        document_starts.extend([sentences])
    return Corpus(
        token_ids.close(), sentence_starts.close(), document_starts.close(), unknown
    )


def check_corpus(corpus: Corpus, source: Path | str, one_seq: bool) -> None:
    """Raise a `UserError` for a corpus that no instances can be made from; warn of many [UNK]."""
    if not corpus.documents:
        raise UserError(
            f"{source}: 0 documents; expected one sentence a line and a blank line between "
            "documents (prepare_data.py writes it so)"
        )
    if corpus.documents == 1 and not one_seq:
        raise UserError(
            f"{source}: 1 document, so there is no other to take random next sentences from; "
            "expected a blank line between documents, or --one_seq"
        )
    share = corpus.unknown / len(corpus.token_ids)
    if share > MANY_UNKNOWN:
        logger.warning(
            "%s: %.0f %% of the word pieces are [UNK]; does the vocabulary fit the language "
            "and the case (--do_lower_case)?", source, 100 * share,
        )


# ------------------------------------------------------------------ next-sentence instances


class Instance(NamedTuple):
    """Spans of the corpus, [start, end) in tokens; `second` is None for one segment."""

    first: tuple[int, int]
    second: tuple[int, int] | None
    is_random_next: bool


def truncate_pair(
    first: tuple[int, int], second: tuple[int, int], max_tokens: int, random: Random
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Trim the longer span at a random end, token by token, until both hold `max_tokens`."""
    (start_a, end_a), (start_b, end_b) = first, second
    excess = (end_a - start_a) + (end_b - start_b) - max_tokens
    for _ in range(excess):
        from_front = random.random() < 0.5
        if end_a - start_a > end_b - start_b:
            start_a, end_a = (start_a + 1, end_a) if from_front else (start_a, end_a - 1)
        else:
            start_b, end_b = (start_b + 1, end_b) if from_front else (start_b, end_b - 1)
    return (start_a, end_a), (start_b, end_b)


def truncate_one(span: tuple[int, int], max_tokens: int, random: Random) -> tuple[int, int]:
    """Trim one span at random ends, token by token, until it holds `max_tokens`."""
    excess = max(0, span[1] - span[0] - max_tokens)
    from_front = sum(random.random() < 0.5 for _ in range(excess))
    return span[0] + from_front, span[1] - (excess - from_front)


def random_span(corpus: Corpus, document: int, length: int, random: Random) -> tuple[int, int]:
    """Take sentences of another document, from a random one on, until they hold `length` tokens.

    Every sentence outside `document` is equally likely to be the first, which is to draw a
    document by its number of sentences and then one of them. Stops at the document's end.
    """
    begin, end = (int(start) for start in corpus.document_starts[document : document + 2])
    sentence = random.randrange(corpus.sentences - (end - begin))
    if sentence >= begin:
        sentence += end - begin
    other = int(np.searchsorted(corpus.document_starts, sentence, side="right"))
    last = int(corpus.document_starts[other])
    starts = corpus.sentence_starts[sentence : last + 1]
    needed = int(np.searchsorted(starts, starts[0] + max(1, length)))
    return int(starts[0]), int(starts[min(needed, len(starts) - 1)])


def document_instances(
    corpus: Corpus,
    document: int,
    random: Random,
    *,
    max_seq_len: int = 128,
    short_seq_prob: float = 0.1,
    one_seq: bool = False,
) -> Iterator[Instance]:
    """Yield the instances of one document for one epoch.

    Sentences are gathered until they hold the target length, split at a random one, and half of
    the time the second part is exchanged for a random span and given back to the document. The
    target is the full length or, with probability `short_seq_prob`, a random shorter one.
    `one_seq` keeps what was gathered as one segment. Lengths count the special tokens.
    """
    begin, end = (int(start) for start in corpus.document_starts[document : document + 2])
    starts = corpus.sentence_starts[begin : end + 1].tolist()
    max_tokens = max_seq_len - (2 if one_seq else 3)
    # Kept from the original: one target length a document, where BERT draws one an instance.
    target = random.randint(2, max_tokens) if random.random() < short_seq_prob else max_tokens
    sentence, count = 0, end - begin
    while sentence < count:
        stop = sentence + 1
        while stop < count and starts[stop] - starts[sentence] < target:
            stop += 1
        gathered = (starts[sentence], starts[stop])
        if one_seq:
            yield Instance(truncate_one(gathered, max_tokens, random), None, False)
            sentence = stop
            continue
        split = sentence + (random.randrange(1, stop - sentence) if stop - sentence > 1 else 1)
        first, second = (starts[sentence], starts[split]), (starts[split], starts[stop])
        is_random = stop == split or random.random() < 0.5
        if is_random:
            second = random_span(corpus, document, target - (first[1] - first[0]), random)
            stop = split
        yield Instance(*truncate_pair(first, second, max_tokens, random), is_random)
        sentence = stop


# ------------------------------------------------------------------ masking


class Masking(NamedTuple):
    """How tokens are masked (BERT, section 3.1); probability 0 masks nothing."""

    probability: float
    max_predictions: int
    mask_id: int
    special_ids: frozenset[int]
    vocab_size: int
    continuation_ids: frozenset[int] = frozenset()  # pieces to mask with the word before them

    @classmethod
    def of(
        cls, tokenizer: BertTokenizer, probability: float, max_predictions: int, whole_words: bool
    ) -> "Masking":
        """Take the ids from a tokenizer; `whole_words` masks all pieces of a word or none."""
        pieces = tokenizer.vocab.items() if whole_words else ()
        return cls(
            probability,
            max_predictions,
            tokenizer.mask_id,
            frozenset((tokenizer.cls_id, tokenizer.sep_id)),
            len(tokenizer),
            frozenset(index for piece, index in pieces if piece.startswith(CONTINUATION_PREFIX)),
        )


def mask_tokens(
    ids: Sequence[int], masking: Masking, random: Random
) -> tuple[list[int], list[int], list[int]]:
    """Return the masked ids, the sorted positions of the predictions, and their original ids.

    Of the chosen tokens 80 % become [MASK], 10 % a random piece, and 10 % stay.
    """
    masked = list(ids)
    # Kept from the original: at least one prediction, though here not at probability 0.
    budget = min(masking.max_predictions, max(1, round(len(masked) * masking.probability)))
    if masking.probability <= 0 or budget <= 0:
        return masked, [], []
    words: list[list[int]] = []
    for position, index in enumerate(masked):
        if index in masking.special_ids:
            continue
        if index in masking.continuation_ids and words and words[-1][-1] == position - 1:
            words[-1].append(position)
        else:
            words.append([position])
    random.shuffle(words)
    positions: list[int] = []
    for word in words:
        if len(positions) + len(word) <= budget:
            positions.extend(word)
        if len(positions) == budget:
            break
    positions.sort()
    labels = [masked[position] for position in positions]
    for position in positions:
        choice = random.random()
        if choice < 0.8:
            masked[position] = masking.mask_id
        elif choice < 0.9:
            masked[position] = random.randrange(masking.vocab_size)
    return masked, positions, labels


# ------------------------------------------------------------------ writing an epoch


class EpochSettings(NamedTuple):
    """What the instances of a run have in common."""

    seed: int
    max_seq_len: int
    short_seq_prob: float
    one_seq: bool
    masking: Masking


class RowWriter:
    """Spells instances as the original's JSON lines."""

    def __init__(self, corpus: Corpus, pieces: Sequence[str], masking: Masking) -> None:
        """`pieces` are the vocabulary's entries in id order, with [CLS] and [SEP]."""
        self.corpus = corpus
        self.masking = masking
        # Spelled once a piece and not once a token: the same text as json.dumps, 3 times as fast.
        self._spelled = [json.dumps(piece) for piece in pieces]
        self._cls, self._sep = pieces.index("[CLS]"), pieces.index("[SEP]")

    def row(self, instance: Instance, random: Random) -> str:
        """Return one line, line break included."""
        first, second = (
            self.corpus.token_ids[span[0] : span[1]].tolist() if span else []
            for span in instance[:2]
        )
        ids = [self._cls, *first, self._sep]
        segments = [0] * len(ids)
        if second:
            ids += [*second, self._sep]
            segments += [1] * (len(second) + 1)
        ids, positions, labels = mask_tokens(ids, self.masking, random)
        return (
            f'{{"tokens": [{self._join(ids)}], "segment_ids": {segments}, '
            f'"is_random_next": {"true" if instance.is_random_next else "false"}, '
            f'"masked_lm_positions": {positions}, "masked_lm_labels": [{self._join(labels)}]}}\n'
        )

    def _join(self, ids: list[int]) -> str:
        return ", ".join([self._spelled[index] for index in ids])


def epoch_paths(data_dir: Path, epoch: int) -> tuple[Path, Path]:
    """Return the data file and the metrics file of an epoch, which counts from 0."""
    return data_dir / f"epoch_{epoch}.json", data_dir / f"epoch_{epoch}_metrics.json"


def write_epoch(
    corpus: Corpus,
    pieces: Sequence[str],
    output_dir: Path,
    epoch: int,
    settings: EpochSettings,
    documents: Iterable[int],
) -> int:
    """Write both files of an epoch, atomically, and return its number of instances.

    `documents` are the numbers of the documents to use, in order (a progress bar around a range).
    Each has its own random numbers, by seed, epoch and document, so that the result does not
    depend on how the work is divided.
    """
    writer = RowWriter(corpus, pieces, settings.masking)
    data_file, metrics_file = epoch_paths(output_dir, epoch)
    rows = 0
    with (
        atomic_path(data_file) as temporary,
        temporary.open("w", encoding="utf-8", newline="\n") as output,
    ):
        for document in documents:
            random = Random(f"{settings.seed}/{epoch}/{document}")
            instances = document_instances(
                corpus, document, random, max_seq_len=settings.max_seq_len,
                short_seq_prob=settings.short_seq_prob, one_seq=settings.one_seq,
            )
            for instance in instances:
                output.write(writer.row(instance, random))
                rows += 1
    write_json(
        metrics_file, {"num_training_examples": rows, "max_seq_len": settings.max_seq_len}
    )
    return rows


# ------------------------------------------------------------------ reading an epoch


class Metrics(NamedTuple):
    """The counts beside an epoch's data file."""

    num_training_examples: int
    max_seq_len: int


def read_metrics(data_dir: Path | str, epoch: int) -> Metrics:
    """Read `epoch_N_metrics.json`; a missing or wrong one is a `UserError`."""
    path = epoch_paths(Path(data_dir), epoch)[1]
    content = read_json(path)
    values = [content.get(key) if isinstance(content, dict) else None for key in Metrics._fields]
    if not all(type(value) is int and value > 0 for value in values):
        raise UserError(f"{path}: expected positive integers {' and '.join(Metrics._fields)}")
    return Metrics(*values)


def count_epochs(data_dir: Path | str) -> int:
    """Return how many epochs were generated.

    None, a gap in their numbers, and a data file or metrics file without the other are
    `UserError`s that name the missing file.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise UserError(f"{data_dir}: no such folder; expected pregenerate_training_data.py's")
    numbers = {
        int(name.split("_")[1].split(".")[0])
        for name in (path.name for path in data_dir.glob("epoch_*.json"))
        if name.removesuffix("_metrics.json").removesuffix(".json")[6:].isdecimal()
    }
    if not numbers:
        raise UserError(
            f"{data_dir}: no epoch_0.json; expected the output of pregenerate_training_data.py"
        )
    count = max(numbers) + 1
    for epoch in range(count):
        for path in epoch_paths(data_dir, epoch):
            if not path.is_file():
                raise UserError(
                    f"{path}: no such file; expected epochs 0 to {count - 1}, each with its "
                    "data and its metrics"
                )
    return count


def samples_per_epoch(data_dir: Path | str, epochs: int) -> list[int]:
    """Return the number of instances of each training epoch; generated ones are used in turn."""
    generated = count_epochs(data_dir)
    return [
        read_metrics(data_dir, epoch % generated).num_training_examples for epoch in range(epochs)
    ]


def check_row(row: Any, max_length: int) -> int:
    """Return how many tokens the first segment has; a malformed row is a `ValueError`."""
    if not isinstance(row, dict):
        raise ValueError("expected a JSON object")
    for key in ("tokens", "segment_ids", "masked_lm_positions", "masked_lm_labels"):
        if not isinstance(row.get(key), list):
            raise ValueError(f'expected a list "{key}"')
    if not isinstance(row.get("is_random_next"), bool):
        raise ValueError('expected true or false as "is_random_next"')
    length, segments = len(row["tokens"]), row["segment_ids"]
    if not 0 < length <= max_length:
        raise ValueError(f"{length} tokens; expected 1 to {max_length}")
    first = segments.count(0)
    if segments != [0] * first + [1] * (length - first):
        raise ValueError(f"expected {length} segment ids, zeros and then ones")
    positions = row["masked_lm_positions"]
    if len(positions) != len(row["masked_lm_labels"]):
        raise ValueError(
            f"{len(positions)} masked positions, but {len(row['masked_lm_labels'])} labels"
        )
    if any(type(position) is not int or not 0 <= position < length for position in positions):
        raise ValueError(f"expected masked positions from 0 to {length - 1}")
    return first


class PregeneratedDataset(Dataset):
    """One epoch of instances, held as flat integer arrays (2 to 4 bytes a token).

    With `reduce_memory` the arrays are files in a temporary folder (TMPDIR chooses the place),
    mapped into memory. An epoch beyond the generated ones reads them again in turn.

    Raises:
        UserError: a missing epoch, a malformed row, more or fewer rows than the metrics say,
            rows longer than `max_seq_length`, or a token that the vocabulary lacks.
    """

    def __init__(
        self,
        data_dir: Path | str,
        epoch: int,
        tokenizer: BertTokenizer,
        max_seq_length: int = 128,
        reduce_memory: bool = False,
    ) -> None:
        generated = count_epochs(data_dir)
        self.epoch = epoch % generated
        if epoch >= generated:
            logger.info(
                "epoch %d: reads epoch_%d.json again, as %d epochs were generated",
                epoch, self.epoch, generated,
            )
        self.data_file, metrics_file = epoch_paths(Path(data_dir), self.epoch)
        metrics = read_metrics(data_dir, self.epoch)
        if metrics.max_seq_len > max_seq_length:
            raise UserError(
                f"{metrics_file}: instances of up to {metrics.max_seq_len} tokens; expected at "
                f"most the --max_seq_length of {max_seq_length}"
            )
        self.max_seq_length = max_seq_length
        self.pad_id = tokenizer.pad_id
        self._folder = tempfile.TemporaryDirectory(prefix="tinybert-") if reduce_memory else None
        self._read(metrics, tokenizer)

    def _read(self, metrics: Metrics, tokenizer: BertTokenizer) -> None:
        """Fill the arrays from the data file and check its number of rows."""
        folder = Path(self._folder.name) if self._folder else None
        ids = id_dtype(len(tokenizer))
        names = {
            "token_ids": ids, "lengths": "int32", "first_lengths": "int32",
            "is_next": "uint8", "positions": "int32", "labels": ids, "label_counts": "int32",
        }
        writers = {
            name: IntegerWriter(dtype, folder / name if folder else None)
            for name, dtype in names.items()
        }
        for first, row in self._rows(metrics, tokenizer.vocab):
            writers["token_ids"].extend(row["tokens"])
            writers["lengths"].extend([len(row["tokens"])])
            writers["first_lengths"].extend([first])
            # Kept from the original: "is next" is 1 where the second segment is random, BERT's
            # label of that class.
            writers["is_next"].extend([row["is_random_next"]])
            writers["positions"].extend(row["masked_lm_positions"])
            writers["labels"].extend(row["masked_lm_labels"])
            writers["label_counts"].extend([len(row["masked_lm_labels"])])
        arrays = {name: writer.close() for name, writer in writers.items()}
        self.lengths = arrays["lengths"]  # [rows], tokens with the special ones
        if len(self) != metrics.num_training_examples:
            raise UserError(
                f"{self.data_file}: {len(self)} rows; expected {metrics.num_training_examples}, "
                f"as {epoch_paths(self.data_file.parent, self.epoch)[1].name} says; the file is "
                "incomplete or of another run"
            )
        self._token_ids, self._first_lengths = arrays["token_ids"], arrays["first_lengths"]
        self._is_next = arrays["is_next"]
        self._positions, self._labels = arrays["positions"], arrays["labels"]
        self._starts = self._offsets("starts", self.lengths, folder)  # [rows + 1]
        self._label_starts = self._offsets("label_starts", arrays["label_counts"], folder)

    def _rows(
        self, metrics: Metrics, vocab: dict[str, int]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield each row with ids for its tokens and labels, and its first segment's length."""
        with self.data_file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    row = json.loads(line)
                    first = check_row(row, metrics.max_seq_len)
                    for key in ("tokens", "masked_lm_labels"):
                        row[key] = [vocab[token] for token in row[key]]
                except KeyError as error:
                    raise UserError(
                        f"{self.data_file}, line {number}: token {error.args[0]!r} is not in the "
                        f"model's vocabulary of {len(vocab)} word pieces; expected data that was "
                        "generated with this vocabulary"
                    ) from None
                # ValueError covers malformed JSON and bytes that are not UTF-8.
                except (ValueError, TypeError) as error:
                    raise UserError(
                        f"{self.data_file}, line {number}: {error}; expected the "
                        f"{metrics.num_training_examples} rows that its metrics file counts"
                    ) from None
                yield first, row

    @staticmethod
    def _offsets(name: str, counts: np.ndarray, folder: Path | None) -> np.ndarray:
        """Return where each row starts in a flat array, and where the last one ends."""
        writer = IntegerWriter("int64", folder / name if folder else None)
        writer.extend([0])
        total = 0
        for begin in range(0, len(counts), VALUES_PER_FLUSH):
            ends = list(accumulate(counts[begin : begin + VALUES_PER_FLUSH].tolist(),
                                   initial=total))
            writer.extend(ends[1:])
            total = ends[-1]
        return writer.close()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        """Return ids, attention mask, segments, labels, each [max_seq_length], and is_next []."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        batch = self.collate([index % len(self)], pad_to=self.max_seq_length)
        keys = ("input_ids", "attention_mask", "token_type_ids", "labels")
        is_next = torch.tensor(int(self._is_next[index]), dtype=torch.int64)
        return (*(batch[key][0] for key in keys), is_next)

    def collate(
        self, indices: Sequence[int], pad_to: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Return int64 tensors [rows, length], padded to the longest row or to `pad_to`.

        `input_ids`, `token_type_ids`, `attention_mask` (1 at real tokens), and `labels` with the
        original ids at masked positions and -100 elsewhere.
        """
        length = pad_to or max(int(self.lengths[index]) for index in indices)
        shape = (len(indices), length)
        input_ids = np.full(shape, self.pad_id, dtype=np.int64)
        token_type_ids, attention_mask = np.zeros((2, *shape), dtype=np.int64)
        labels = np.full(shape, IGNORED_LABEL, dtype=np.int64)
        for row, index in enumerate(indices):
            start, end = self._starts[index], self._starts[index + 1]
            input_ids[row, : end - start] = self._token_ids[start:end]
            token_type_ids[row, self._first_lengths[index] : end - start] = 1
            attention_mask[row, : end - start] = 1
            chosen = slice(self._label_starts[index], self._label_starts[index + 1])
            labels[row, self._positions[chosen]] = self._labels[chosen]
        arrays = {
            "input_ids": input_ids, "token_type_ids": token_type_ids,
            "attention_mask": attention_mask, "labels": labels,
        }
        return {name: torch.from_numpy(values) for name, values in arrays.items()}

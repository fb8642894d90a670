"""Pre-training text: documents, next-sentence instances, masking, and the files they live in.

A corpus is one flat array of word-piece ids with the starts of its sentences and documents; an
instance is two spans of that array, as cutting it to length only trims ends (BERT, arXiv
1810.04805, section 3.1 and appendix A). On disk a run is one of two kinds, each with an
`epoch_N_metrics.json` an epoch that counts its instances:

binary  `corpus.bin` has the ids, `corpus.json` says what they are and of which vocabulary,
        `epoch_N.bin` has a record of spans an instance, and with masking `epoch_N_masks.bin` has
        a fixed number of masked positions an instance.
json    `epoch_N.json` has one JSON object an instance, as the original wrote it.
"""

import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, cached_property
from io import BytesIO
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from transformer.file_utils import UserError, read_json, write_json
from transformer.tokenization import BLOCK_BYTES, CLS, SEP, BertTokenizer

logger = logging.getLogger(__name__)

SENTENCES_PER_BLOCK = 1 << 14  # worked on at once
ROWS_PER_BLOCK = 1 << 12
RECORDS_PER_CHECK = 1 << 18
MANY_UNKNOWN = 0.1
IGNORED_LABEL = -100
CONTINUATION_PREFIX = "##"
CORPUS_IDS_NAME = "corpus.bin"
CORPUS_INFO_NAME = "corpus.json"
SENTENCES_NAME, DOCUMENTS_NAME = "sentence_starts", "document_starts"
BINARY_SUFFIX, MASKS_SUFFIX, JSON_SUFFIX = ".bin", "_masks.bin", ".json"
METRICS_SUFFIX = "_metrics.json"
GENERATED_FILE = re.compile(
    r"corpus\.(bin|json)|epoch_(\d+)(\.bin|_masks\.bin|\.json|_metrics\.json)"
)


# ------------------------------------------------------------------ flat arrays


class ArrayWriter:
    """Collects arrays of one dtype end to end, in memory or, where a path is given, in a file."""

    def __init__(self, dtype: np.dtype | str, path: Path | None = None) -> None:
        self.dtype = np.dtype(dtype)
        self.path = path
        self._output: BinaryIO = path.open("wb") if path else BytesIO()

    def write(self, values: np.ndarray | Sequence) -> None:
        """Append values, which must fit the dtype."""
        self._output.write(np.ascontiguousarray(values, dtype=self.dtype).data)

    def close(self) -> np.ndarray:
        """Return all values: an array in memory, or a read-only map of the file."""
        if self.path is None:
            return np.frombuffer(self._output.getbuffer(), dtype=self.dtype)  # shares the memory
        self._output.close()
        return map_array(self.path, self.dtype)


def map_array(path: Path, dtype: np.dtype | str) -> np.ndarray:
    """Map a file of values into memory, read-only; an empty file is an empty array."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype=dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def id_dtype(vocab_size: int) -> str:
    """Return the smallest dtype that holds every word-piece id."""
    return "<u2" if vocab_size <= 1 << 16 else "<i4"


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
    def open(cls, folder: Path, vocab_size: int) -> "Corpus":
        """Map a corpus that `build_corpus` wrote to a folder; processes share its memory."""
        return cls(
            map_array(folder / CORPUS_IDS_NAME, id_dtype(vocab_size)),
            map_array(folder / SENTENCES_NAME, "<i8"),
            map_array(folder / DOCUMENTS_NAME, "<i8"),
            0,
        )


class TokenizedBlock(NamedTuple):
    """A part of a corpus, from a line's start to a line's end."""

    text_bytes: int
    token_ids: np.ndarray  # [tokens]
    lengths: np.ndarray  # [sentences], in tokens
    blank_lines: np.ndarray  # [blank lines], how many of the block's sentences are before each
    unknown: int


def line_blocks(path: Path, size: int = BLOCK_BYTES) -> Iterator[tuple[int, int]]:
    """Yield the bytes [start, end) of blocks of whole lines, of `size` and up to a line more."""
    total = path.stat().st_size
    end = 0
    with path.open("rb") as lines:
        while end < total:
            start = end
            lines.seek(min(start + size, total) - 1)
            lines.readline()
            end = lines.tell()
            yield start, end


def tokenize_block(path: Path, block: tuple[int, int], tokenizer: BertTokenizer) -> TokenizedBlock:
    """Tokenize bytes [start, end) of a UTF-8 file: a sentence a line, blank between documents.

    Lines without word pieces are dropped. Bytes that are not UTF-8 are a `UserError` with line.
    """
    start, end = block
    with path.open("rb") as file:
        file.seek(start)
        text = file.read(end - start)
    text_lines = text.removesuffix(b"\n")
    try:
        ids, lengths = tokenizer.encode_lines(text_lines)
        lines = text_lines.split(b"\n")
        blank = [line for line in np.flatnonzero(lengths == 0) if not lines[line].decode().strip()]
    except UnicodeDecodeError:
        check_utf8(path)  # raises the error that names the line
        raise
    sentences = np.cumsum(lengths > 0)
    return TokenizedBlock(
        len(text),
        ids.astype(id_dtype(len(tokenizer))),
        lengths[lengths > 0],
        sentences[blank],
        int((ids == tokenizer.unk_id).sum()),
    )


def check_utf8(path: Path) -> None:
    """Raise a `UserError` that names the first line of a file which is not UTF-8."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: {error}; expected UTF-8 text, one sentence a line"
                ) from error


def build_corpus(
    blocks: Iterable[TokenizedBlock],
    vocab_size: int,
    folder: Path | None = None,
    ids_file: Path | None = None,
) -> Corpus:
    """Join blocks, in the order of the text; documents without sentences are dropped.

    With a `folder` the arrays are files in it, which `Corpus.open` maps, and memory stays at a
    block whatever the corpus. With an `ids_file` at least the ids are in that file.
    """
    if folder:
        ids_file = folder / CORPUS_IDS_NAME
    token_ids = ArrayWriter(id_dtype(vocab_size), ids_file)
    sentence_starts, document_starts = (
        ArrayWriter("<i8", folder / name if folder else None)
        for name in (SENTENCES_NAME, DOCUMENTS_NAME)
    )
    tokens = sentences = last_start = unknown = 0
    sentence_starts.write([0])
    document_starts.write([0])
    for block in blocks:
        token_ids.write(block.token_ids)
        sentence_starts.write(tokens + np.cumsum(block.lengths, dtype=np.int64))
        starts = np.unique(sentences + block.blank_lines)
        starts = starts[starts > last_start]
        document_starts.write(starts)
        last_start = int(starts[-1]) if len(starts) else last_start
        tokens += len(block.token_ids)
        sentences += len(block.lengths)
        unknown += block.unknown
    if sentences > last_start:
        document_starts.write([sentences])
    return Corpus(token_ids.close(), sentence_starts.close(), document_starts.close(), unknown)


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


# ------------------------------------------------------------------ random numbers


class RandomNumbers(NamedTuple):
    """The random numbers of an epoch, each by its purpose and a sentence's or document's number.

    As no number depends on those drawn before, neither the division of the work nor its order
    changes the result. They are those of SplitMix64 (Steele, Lea and Flood, 2014), which also
    defines the n-th number by n alone, with a start for each seed, epoch and purpose.
    """

    seed: int
    epoch: int

    def bits(self, purpose: str, numbers: np.ndarray) -> np.ndarray:
        """Return 64 random bits for each of `numbers`, as uint64."""
        state = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        state += _stream_start(f"{self.seed}/{self.epoch}/{purpose}")
        state ^= state >> np.uint64(30)
        state *= np.uint64(0xBF58476D1CE4E5B9)
        state ^= state >> np.uint64(27)
        state *= np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))

    def uniform(self, purpose: str, numbers: np.ndarray) -> np.ndarray:
        """Return a random number from 0 to below 1 for each of `numbers`."""
        return (self.bits(purpose, numbers) >> np.uint64(11)) * 2.0**-53

    def below(self, purpose: str, numbers: np.ndarray, limits: np.ndarray | int) -> np.ndarray:
        """Return a random integer from 0 to below the limit for each of `numbers`."""
        return (self.uniform(purpose, numbers) * limits).astype(np.int64)

    def heads(self, purpose: str, numbers: np.ndarray, flips: np.ndarray) -> np.ndarray:
        """Return for each of `numbers` how many of so many coin flips are heads."""
        heads = np.zeros(len(numbers), dtype=np.int64)
        for word in range(-(-int(flips.max(initial=0)) // 64)):
            rows = np.flatnonzero(flips > 64 * word)
            unused = np.maximum(64 * (word + 1) - flips[rows], 0).astype(np.uint64)
            bits = self.bits(f"{purpose} {word}", numbers[rows]) >> unused
            flipped = np.unpackbits(bits.view(np.uint8).reshape(-1, 8), axis=1)
            heads[rows] += flipped.sum(axis=1, dtype=np.int64)
        return heads


@cache
def _stream_start(name: str) -> np.uint64:
    return np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype="<u8")[0]


# ------------------------------------------------------------------ next-sentence instances


class EpochSettings(NamedTuple):
    """What the instances of a run have in common; lengths count the special tokens."""

    seed: int = 42
    max_seq_len: int = 128
    short_seq_prob: float = 0.1
    one_seq: bool = False

    @property
    def max_tokens(self) -> int:
        """How many tokens of text an instance holds."""
        return self.max_seq_len - (2 if self.one_seq else 3)


class Instances(NamedTuple):
    """Instances one after the other: two spans of the corpus, counted in tokens.

    `sentences` are the numbers of the sentences that they begin with, which differ. Of one
    segment, the second length is 0.
    """

    sentences: np.ndarray  # [instances]
    first_starts: np.ndarray  # [instances]
    first_lengths: np.ndarray  # [instances]
    second_starts: np.ndarray  # [instances]
    second_lengths: np.ndarray  # [instances]
    is_random_next: np.ndarray  # [instances], bool


class _Plan(NamedTuple):
    """For each sentence [sentences] of a block, the instance that would begin with it."""

    documents: np.ndarray  # the sentence's document
    targets: np.ndarray  # tokens to gather
    splits: np.ndarray  # the sentence that begins the second part
    stops: np.ndarray  # the sentence after the second part
    is_random: np.ndarray  # whether a random span replaces the second part
    following: np.ndarray  # the sentence that begins the next instance


def make_instances(
    corpus: Corpus, settings: EpochSettings, epoch: int, begin: int = 0, end: int | None = None
) -> Iterator[Instances]:
    """Yield the instances of the sentences [begin, end) for one epoch, block by block.

    `begin` and `end` are borders of documents, of the whole corpus if not given. Sentences are
    gathered until they hold the target length, split at a random one, and half of the time the
    second part is exchanged for a random span and given back to the document. The target is the
    full length or, with probability `short_seq_prob`, a random shorter one. `one_seq` keeps
    what was gathered as one segment.
    """
    random = RandomNumbers(settings.seed, epoch)
    end = corpus.sentences if end is None else end
    while begin < end:
        # The next instance depends on where the last one ended; everything else is computed for
        # all sentences of the block at once, and then kept for those that begin an instance.
        plan = _plan_instances(
            corpus, settings, random, begin, min(begin + SENTENCES_PER_BLOCK, end)
        )
        following = (plan.following - begin).tolist()
        chosen, place = [], 0
        while place < len(following):
            chosen.append(place)
            place = following[place]
        chosen = np.array(chosen)
        plan = _Plan(*(values[chosen] for values in plan))
        yield _cut_instances(corpus, settings, random, begin + chosen, plan)
        begin += place


def _plan_instances(
    corpus: Corpus, settings: EpochSettings, random: RandomNumbers, begin: int, end: int
) -> _Plan:
    """Plan an instance from every sentence in [begin, end)."""
    sentences = np.arange(begin, end)
    documents = np.searchsorted(corpus.document_starts, sentences, side="right") - 1
    numbers = np.arange(documents[0], documents[-1] + 1)
    # Kept from the original: one target length a document, where BERT draws one an instance.
    is_short = random.uniform("short", numbers) < settings.short_seq_prob
    short_targets = 2 + random.below("target", numbers, settings.max_tokens - 1)
    targets = np.where(is_short, short_targets, settings.max_tokens)[documents - documents[0]]
    # A sentence has a token at least, so no instance reaches further than its target.
    starts = corpus.sentence_starts[begin : end + settings.max_tokens]
    stops = begin + np.searchsorted(starts, starts[: len(sentences)] + targets)
    stops = np.minimum(stops, corpus.document_starts[documents + 1])
    if settings.one_seq:
        never = np.zeros(len(sentences), dtype=bool)
        return _Plan(documents, targets, stops, stops, never, stops)
    splits = sentences + 1 + random.below("split", sentences, stops - sentences - 1)
    is_random = (splits == stops) | (random.uniform("next", sentences) < 0.5)
    return _Plan(
        documents, targets, splits, stops, is_random, np.where(is_random, splits, stops)
    )


def _cut_instances(
    corpus: Corpus,
    settings: EpochSettings,
    random: RandomNumbers,
    sentences: np.ndarray,
    plan: _Plan,
) -> Instances:
    """Take the planned instances that begin with `sentences`, cut to length."""
    first_starts, second_starts, ends = (
        corpus.sentence_starts[place] for place in (sentences, plan.splits, plan.stops)
    )
    first_lengths, second_lengths = second_starts - first_starts, ends - second_starts
    chosen = np.flatnonzero(plan.is_random)
    second_starts[chosen], second_lengths[chosen] = random_spans(
        corpus, random, sentences[chosen], plan.documents[chosen],
        plan.targets[chosen] - first_lengths[chosen],
    )
    first_cut, second_cut = truncation(first_lengths, second_lengths, settings.max_tokens)
    return Instances(
        sentences,
        first_starts + random.heads("first", sentences, first_cut),
        first_lengths - first_cut,
        second_starts + random.heads("second", sentences, second_cut),
        second_lengths - second_cut,
        plan.is_random,
    )


def random_spans(
    corpus: Corpus,
    random: RandomNumbers,
    sentences: np.ndarray,
    documents: np.ndarray,
    lengths: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Take sentences of other documents, from random ones on, until they hold `lengths` tokens.

    For each of `sentences` [spans], which are of `documents`, every sentence outside its document
    is equally likely to be the first, which is to draw a document by its number of sentences and
    then one of them. A span stops at its document's end. Returns starts and lengths in tokens.
    """
    begins, ends = corpus.document_starts[documents], corpus.document_starts[documents + 1]
    own = ends - begins
    drawn = random.below("random sentence", sentences, corpus.sentences - own)
    drawn += np.where(drawn >= begins, own, 0)
    others = np.searchsorted(corpus.document_starts, drawn, side="right")
    starts = corpus.sentence_starts[drawn]
    stops = np.searchsorted(corpus.sentence_starts, starts + np.maximum(lengths, 1))
    stops = np.minimum(stops, corpus.document_starts[others])
    return starts, corpus.sentence_starts[stops] - starts


def truncation(
    first_lengths: np.ndarray, second_lengths: np.ndarray, max_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return how many tokens to cut off each first and second span, so that both fit together.

    The longer one loses tokens until both are equally long; then they take turns, the second
    first. At which end a span loses each of them is another matter.
    """
    excess = np.maximum(first_lengths + second_lengths - max_tokens, 0)
    difference = first_lengths - second_lengths
    alone = np.minimum(excess, abs(difference))
    rest = excess - alone
    is_first = difference > 0
    return np.where(is_first, alone, 0) + rest // 2, np.where(is_first, 0, alone) + (rest + 1) // 2


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

    def predictions(self, length: int) -> int:
        """Return how many of `length` tokens are masked, at most."""
        if self.probability <= 0:
            return 0
        # Kept from the original: at least one prediction, though here not at probability 0.
        return min(self.max_predictions, max(1, round(length * self.probability)))


def mask_tokens(
    ids: Sequence[int], masking: Masking, random: Random
) -> tuple[list[int], list[int], list[int]]:
    """Return the masked ids, the sorted positions of the predictions, and their original ids.

    Of the chosen tokens 80 % become [MASK], 10 % a random piece, and 10 % stay.
    """
    masked = list(ids)
    budget = masking.predictions(len(masked))
    if budget <= 0:
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


class MaskedRow(NamedTuple):
    """An instance in full: ids with special tokens, what is masked, and the original ids there."""

    ids: list[int]
    first_length: int  # tokens of segment 0
    positions: list[int]
    labels: list[int]
    is_random_next: bool


def masked_rows(
    corpus: Corpus,
    tokenizer: BertTokenizer,
    masking: Masking,
    numbers: RandomNumbers,
    instances: Instances,
) -> Iterator[MaskedRow]:
    """Spell instances out and mask them."""
    seeds = numbers.bits("masking", instances.sentences).tolist()
    columns = (values.tolist() for values in instances[1:])
    for seed, first, first_length, second, second_length, is_random in zip(
        seeds, *columns, strict=True
    ):
        ids = corpus.token_ids[first : first + first_length].tolist()
        ids = [tokenizer.cls_id, *ids, tokenizer.sep_id]
        if second_length:
            ids += corpus.token_ids[second : second + second_length].tolist()
            ids.append(tokenizer.sep_id)
        masked = mask_tokens(ids, masking, Random(seed))
        yield MaskedRow(masked[0], first_length + 2, *masked[1:], is_random)


# ------------------------------------------------------------------ writing an epoch


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


@dataclass
class EpochWriter:
    """Writes instances as the files of one format, "binary" or "json"."""

    corpus: Corpus
    tokenizer: BertTokenizer
    settings: EpochSettings
    masking: Masking
    format: str

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

    def write(self, stem: Path, epoch: int, begin: int, end: int) -> int:
        """Write the instances of the sentences [begin, end) to files stem + suffix; count them."""
        rows = 0
        with ExitStack() as stack:
            files = [
                stack.enter_context(stem.with_name(stem.name + suffix).open("wb"))
                for suffix in self.suffixes
            ]
            for instances in make_instances(self.corpus, self.settings, epoch, begin, end):
                spell = self._json if self.format == "json" else self._binary
                for file, content in zip(files, spell(epoch, instances), strict=True):
                    file.write(content)
                rows += len(instances.sentences)
        return rows

    def _rows(self, epoch: int, instances: Instances) -> Iterator[MaskedRow]:
        random = RandomNumbers(self.settings.seed, epoch)
        return masked_rows(self.corpus, self.tokenizer, self.masking, random, instances)

    def _binary(self, epoch: int, instances: Instances) -> Iterator[bytes]:
        """Yield the records, and with masking the masked positions."""
        records = np.empty(len(instances.sentences), record_dtype(len(self.corpus.token_ids)))
        for field, values in zip(records.dtype.names, instances[1:], strict=True):
            records[field] = values
        yield records.tobytes()
        if not self.predictions:
            return
        masks = np.zeros((len(records), self.predictions), mask_dtype(len(self.tokenizer)))
        for slots, row in zip(masks, self._rows(epoch, instances), strict=True):
            slots["position"][: len(row.positions)] = row.positions
            slots["id"][: len(row.positions)] = [row.ids[position] for position in row.positions]
        yield masks.tobytes()

    def _json(self, epoch: int, instances: Instances) -> Iterator[bytes]:
        """Yield the lines."""
        lines = []
        for row in self._rows(epoch, instances):
            segments = [0] * row.first_length + [1] * (len(row.ids) - row.first_length)
            lines.append(
                f'{{"tokens": [{self._join(row.ids)}], "segment_ids": {segments}, '
                f'"is_random_next": {"true" if row.is_random_next else "false"}, '
                f'"masked_lm_positions": {row.positions}, '
                f'"masked_lm_labels": [{self._join(row.labels)}]}}\n'
            )
        yield "".join(lines).encode()

    @cached_property
    def _spelled(self) -> list[str]:
        # Spelled once a piece and not once a token: the same text as json.dumps, 3 times as fast.
        return [json.dumps(piece) for piece in self.tokenizer.vocab]

    def _join(self, ids: list[int]) -> str:
        return ", ".join([self._spelled[index] for index in ids])

    def finish(self, folder: Path, rows: Sequence[int]) -> list[Path]:
        """Write the counts of whole epochs beside their data; return all files of the run.

        `rows` are the instances of each epoch. Files that are moved in the returned order do not
        pass for a run until all are there.
        """
        files = []
        if self.format == "binary":
            info = CorpusInfo(
                id_dtype(len(self.tokenizer)), len(self.corpus.token_ids), self.predictions,
                vocabulary_sha256(self.tokenizer),
            )
            write_json(folder / CORPUS_INFO_NAME, info._asdict())
            files = [folder / CORPUS_IDS_NAME, folder / CORPUS_INFO_NAME]
        # The last epoch first: epochs are only read if they are numbered from 0 without a gap.
        for epoch in reversed(range(len(rows))):
            metrics = Metrics(rows[epoch], self.settings.max_seq_len)
            metrics_file = epoch_path(folder, epoch, METRICS_SUFFIX)
            write_json(metrics_file, metrics._asdict())
            files += [epoch_path(folder, epoch, suffix) for suffix in self.suffixes]
            files.append(metrics_file)
        return files


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


def vocabulary_sha256(tokenizer: BertTokenizer) -> str:
    """Return the fingerprint of a vocabulary: all its word pieces, in the order of their ids."""
    return hashlib.sha256("\n".join(tokenizer.vocab).encode()).hexdigest()


def epoch_path(data_dir: Path | str, epoch: int, suffix: str) -> Path:
    """Return a file of an epoch, which counts from 0."""
    return Path(data_dir) / f"epoch_{epoch}{suffix}"


def generated_files(data_dir: Path) -> list[Path]:
    """Return the files of earlier runs of any format, those without which no run is read first."""
    paths = [path for path in data_dir.iterdir() if GENERATED_FILE.fullmatch(path.name)]
    return sorted(paths, key=lambda path: (not path.name.startswith("epoch_0"), path.name))


def read_metrics(data_dir: Path | str, epoch: int) -> Metrics:
    """Read `epoch_N_metrics.json`; a missing or wrong one is a `UserError`."""
    path = epoch_path(data_dir, epoch, METRICS_SUFFIX)
    content = read_json(path)
    values = [content.get(key) if isinstance(content, dict) else None for key in Metrics._fields]
    if not all(type(value) is int and value > 0 for value in values):
        raise UserError(f"{path}: expected positive integers {' and '.join(Metrics._fields)}")
    return Metrics(*values)


def read_corpus_info(data_dir: Path, tokenizer: BertTokenizer) -> CorpusInfo:
    """Read `corpus.json`; one that is wrong or of another vocabulary is a `UserError`."""
    path = data_dir / CORPUS_INFO_NAME
    content = read_json(path)
    wanted = {"dtype": str, "tokens": int, "predictions": int, "vocabulary_sha256": str}
    if not isinstance(content, dict) or any(
        type(content.get(key)) is not kind for key, kind in wanted.items()
    ):
        raise UserError(f"{path}: expected {', '.join(wanted)}")
    info = CorpusInfo(*(content[key] for key in wanted))
    own = vocabulary_sha256(tokenizer)
    if (info.vocabulary_sha256, info.dtype) != (own, id_dtype(len(tokenizer))):
        raise UserError(
            f"{path}: of the vocabulary with SHA-256 {info.vocabulary_sha256[:12]}...; expected "
            f"the model's {len(tokenizer)} word pieces, {own[:12]}..., as the data are ids of them"
        )
    return info


def data_suffix(data_dir: Path | str) -> str:
    """Return how the names of the data files in a folder end: .bin or .json.

    A folder that is missing, has none, or has both is a `UserError`.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise UserError(f"{data_dir}: no such folder; expected pregenerate_training_data.py's")
    found = sorted({BINARY_SUFFIX, JSON_SUFFIX} & _epoch_numbers(data_dir).keys())
    if not found:
        raise UserError(
            f"{data_dir}: no epoch_0.json and no epoch_0.bin; expected the output of "
            "pregenerate_training_data.py"
        )
    if len(found) > 1:
        raise UserError(
            f"{data_dir}: data files of both formats, .bin and .json; expected those of one run"
        )
    return found[0]


def _epoch_numbers(data_dir: Path) -> dict[str, set[int]]:
    """Return the numbers of the epochs that a folder has files of, by the files' suffix."""
    numbers: dict[str, set[int]] = {}
    for path in generated_files(data_dir):
        _, epoch, suffix = GENERATED_FILE.fullmatch(path.name).groups()
        if epoch:
            numbers.setdefault(suffix, set()).add(int(epoch))
    return numbers


def count_epochs(data_dir: Path | str) -> int:
    """Return how many epochs were generated.

    None, a gap in their numbers, and a data file or metrics file without the other are
    `UserError`s that name the missing file.
    """
    suffix = data_suffix(data_dir)
    count = 1 + max(set.union(*_epoch_numbers(Path(data_dir)).values()))
    for epoch in range(count):
        for path in (epoch_path(data_dir, epoch, end) for end in (suffix, METRICS_SUFFIX)):
            if not path.is_file():
                raise UserError(
                    f"{path}: no such file; expected epochs 0 to {count - 1}, each with its "
                    "data and its metrics"
                )
    return count


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
            "file is incomplete or of another run"
        )
    return map_array(path, dtype) if mapped else np.fromfile(path, dtype)


# ------------------------------------------------------------------ reading JSON


class JsonRow(NamedTuple):
    """A row of `epoch_N.json` as ids: the unmasked text of both segments, and what is masked."""

    first: list[int]
    second: list[int]
    is_random_next: bool
    masks: list[tuple[int, int]]  # position in the row, id that is shown there


def check_row(row: Any, max_length: int) -> int:
    """Return how many tokens the first segment has; a malformed row is a `ValueError`."""
    if not isinstance(row, dict):
        raise ValueError("expected a JSON object")
    for key in ("tokens", "segment_ids", "masked_lm_positions", "masked_lm_labels"):
        if not isinstance(row.get(key), list):
            raise ValueError(f'expected a list "{key}"')
    if not isinstance(row.get("is_random_next"), bool):
        raise ValueError('expected true or false as "is_random_next"')
    tokens, segments = row["tokens"], row["segment_ids"]
    length = len(tokens)
    if not 0 < length <= max_length:
        raise ValueError(f"{length} tokens; expected 1 to {max_length}")
    first = segments.count(0)
    if segments != [0] * first + [1] * (length - first):
        raise ValueError(f"expected {length} segment ids, zeros and then ones")
    ends = [tokens[0], tokens[first - 1], tokens[-1]]
    if ends != [CLS, SEP, SEP] or first == length - 1:
        raise ValueError("expected the tokens [CLS], text, [SEP], and of a pair text, [SEP]")
    positions = row["masked_lm_positions"]
    if len(positions) != len(row["masked_lm_labels"]):
        raise ValueError(
            f"{len(positions)} masked positions, but {len(row['masked_lm_labels'])} labels"
        )
    special = (0, first - 1, length - 1)
    if any(
        type(position) is not int or not 0 <= position < length or position in special
        for position in positions
    ):
        raise ValueError(
            f"expected masked positions from 0 to {length - 1}, none of [CLS] or [SEP]"
        )
    return first


def read_json_rows(
    path: Path, metrics: Metrics, vocab: dict[str, int]
) -> Iterator[JsonRow]:
    """Yield the rows of `epoch_N.json`; a malformed one is a `UserError` that names its line."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                first = check_row(row, metrics.max_seq_len)
                ids = [vocab[token] for token in row["tokens"]]
                masks = []
                for position, label in zip(
                    row["masked_lm_positions"], row["masked_lm_labels"], strict=True
                ):
                    masks.append((position, ids[position]))
                    ids[position] = vocab[label]
            except KeyError as error:
                raise UserError(
                    f"{path}, line {number}: token {error.args[0]!r} is not in the model's "
                    f"vocabulary of {len(vocab)} word pieces; expected data that was generated "
                    "with this vocabulary"
                ) from None
            # ValueError covers malformed JSON and bytes that are not UTF-8.
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"{path}, line {number}: {error}; expected the "
                    f"{metrics.num_training_examples} rows that its metrics file counts"
                ) from None
            yield JsonRow(ids[1 : first - 1], ids[first:-1], row["is_random_next"], masks)


# ------------------------------------------------------------------ the dataset


class _Epoch(NamedTuple):
    """What a dataset holds, whatever the files: spans of unmasked text, and what is masked."""

    token_ids: np.ndarray  # [tokens]
    records: np.ndarray  # [rows] of record_dtype
    masks: np.ndarray  # [rows, predictions] of mask_dtype


def _read_json_epoch(
    path: Path, metrics: Metrics, tokenizer: BertTokenizer, folder: Path | None
) -> _Epoch:
    """Read `epoch_N.json`; with a `folder` the arrays are files in it."""
    ids = id_dtype(len(tokenizer))
    token_ids, records, masks, counts = (
        ArrayWriter(dtype, folder / name if folder else None)
        for name, dtype in (
            ("token_ids", ids), ("records", record_dtype(1 << 32)),
            ("masks", mask_dtype(len(tokenizer))), ("mask_counts", "<u2"),
        )
    )
    rows = read_json_rows(path, metrics, tokenizer.vocab)
    start = count = 0
    while block := list(islice(rows, ROWS_PER_BLOCK)):
        spans = []
        for row in block:
            middle = start + len(row.first)
            spans.append(
                (start, len(row.first), middle, len(row.second), row.is_random_next)
            )
            start = middle + len(row.second)
        token_ids.write([index for row in block for part in row[:2] for index in part])
        records.write(np.array(spans, dtype=records.dtype))
        masks.write(np.array([mask for row in block for mask in row.masks], dtype=masks.dtype))
        counts.write([len(row.masks) for row in block])
        count += len(block)
    if count != metrics.num_training_examples:
        raise UserError(
            f"{path}: {count} rows; expected {metrics.num_training_examples}, as "
            f"{path.stem}{METRICS_SUFFIX} says; the file is incomplete or of another run"
        )
    slots = _mask_slots(masks.close(), counts.close(), folder / "slots" if folder else None)
    return _Epoch(token_ids.close(), records.close(), slots)


def _mask_slots(masks: np.ndarray, counts: np.ndarray, path: Path | None) -> np.ndarray:
    """Give each row as many places for masks as the longest needs: [masks] to [rows, places]."""
    width = int(counts.max(initial=0))
    writer = ArrayWriter(masks.dtype, path)
    start = 0
    for begin in range(0, len(counts), ROWS_PER_BLOCK):
        part = counts[begin : begin + ROWS_PER_BLOCK]
        slots = np.zeros((len(part), width), masks.dtype)
        end = start + int(part.sum())
        slots[np.arange(width) < part[:, None]] = masks[start:end]
        writer.write(slots)
        start = end
    return writer.close().reshape(len(counts), width)


def _read_binary_epoch(
    path: Path, metrics: Metrics, tokenizer: BertTokenizer, mapped: bool
) -> _Epoch:
    """Read or map `epoch_N.bin` and the files beside it, and check them."""
    info = read_corpus_info(path.parent, tokenizer)
    rows, counted = metrics.num_training_examples, f"{path.stem}{METRICS_SUFFIX}"
    ids_file = path.with_name(CORPUS_IDS_NAME)
    token_ids = read_array(ids_file, info.dtype, info.tokens, CORPUS_INFO_NAME, mapped)
    records = read_array(path, record_dtype(info.tokens), rows, counted, mapped)
    dtype = mask_dtype(len(tokenizer))
    if info.predictions:
        masks_file = path.with_name(path.stem + MASKS_SUFFIX)
        masks = read_array(masks_file, dtype, rows * info.predictions, counted, mapped)
    else:
        masks = np.empty(0, dtype)
    for begin in range(0, rows, RECORDS_PER_CHECK):
        block = records[begin : begin + RECORDS_PER_CHECK]
        lengths = _lengths(block)
        ends = [block[f"{part}_start"].astype(np.int64) + block[f"{part}_length"]
                for part in ("first", "second")]
        right = (block["first_length"] > 0) & (lengths <= metrics.max_seq_len) & (
            np.maximum(*ends) <= info.tokens)
        if not right.all():
            raise UserError(
                f"{path}: record {begin + int(np.argmin(right))} (from 0) is no pair of spans of "
                f"the {info.tokens} tokens in {CORPUS_IDS_NAME}; the file is damaged or of "
                "another run"
            )
    return _Epoch(token_ids, records, masks.reshape(rows, info.predictions))


def _lengths(records: np.ndarray) -> np.ndarray:
    """Return the length of each row, special tokens included, as int32."""
    first, second = (records[f"{part}_length"].astype(np.int32) for part in ("first", "second"))
    return first + second + 2 + (second > 0)


class PregeneratedDataset(Dataset):
    """One epoch of instances, binary or JSON, held as flat integer arrays.

    A binary epoch takes 2 bytes a token of the corpus and 13 an instance, a JSON one 2 a token
    of an instance. With `reduce_memory` none is held: the binary files themselves are mapped
    into memory, and a JSON epoch becomes files in a temporary folder (TMPDIR chooses the place).
    An epoch beyond the generated ones reads them again in turn.

    Raises:
        UserError: a missing epoch or file, a malformed row, more or fewer rows than the metrics
            say, rows longer than `max_seq_length`, or data of another vocabulary.
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
        path = epoch_path(data_dir, self.epoch, data_suffix(data_dir))
        if epoch >= generated:
            logger.info(
                "epoch %d: reads %s again, as %d epochs were generated",
                epoch, path.name, generated,
            )
        metrics = read_metrics(data_dir, self.epoch)
        if metrics.max_seq_len > max_seq_length:
            raise UserError(
                f"{epoch_path(data_dir, self.epoch, METRICS_SUFFIX)}: instances of up to "
                f"{metrics.max_seq_len} tokens; expected at most the --max_seq_length of "
                f"{max_seq_length}"
            )
        self.max_seq_length = max_seq_length
        self.cls_id, self.sep_id, self.pad_id = (
            tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id)
        self._folder: tempfile.TemporaryDirectory | None = None
        if path.suffix == BINARY_SUFFIX:
            self._data = _read_binary_epoch(path, metrics, tokenizer, reduce_memory)
            return
        if reduce_memory:
            self._folder = tempfile.TemporaryDirectory(prefix="tinybert-")
        folder = Path(self._folder.name) if self._folder else None
        self._data = _read_json_epoch(path, metrics, tokenizer, folder)

    def __len__(self) -> int:
        return len(self._data.records)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row with the special ones [rows], computed anew at each reading."""
        return _lengths(self._data.records)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        """Return ids, attention mask, segments, labels, each [max_seq_length], and is_next []."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        batch = self.collate([index], pad_to=self.max_seq_length)
        keys = ("input_ids", "attention_mask", "token_type_ids", "labels")
        # Kept from the original: "is next" is 1 where the second segment is random, BERT's label
        # of that class.
        is_next = torch.tensor(int(self._data.records["is_random_next"][index]))
        return (*(batch[key][0] for key in keys), is_next)

    def collate(
        self, indices: Sequence[int], pad_to: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Return int64 tensors [rows, length], padded to the longest row or to `pad_to`.

        `input_ids`, `token_type_ids`, `attention_mask` (1 at real tokens), and `labels` with the
        original ids at masked positions and -100 elsewhere.
        """
        indices = np.asarray(indices, dtype=np.int64)
        records = self._data.records[indices]
        first_starts, second_starts, first_lengths, second_lengths = (
            records[field].astype(np.int64)[:, None]
            for field in ("first_start", "second_start", "first_length", "second_length")
        )
        middles = first_lengths + 1  # [rows, 1], where the first [SEP] stands
        ends = middles + second_lengths + (second_lengths > 0)  # [rows, 1], the last [SEP]
        length = pad_to or int(ends.max()) + 1
        positions = np.arange(length)
        is_second = positions > middles  # [rows, length]
        places = positions + np.where(
            is_second, second_starts - middles - 1, first_starts - 1
        )
        # Places of special tokens and padding mean nothing and may lie outside the corpus.
        input_ids = self._data.token_ids.take(places, mode="clip").astype(np.int64)
        attention_mask = positions <= ends
        input_ids[~attention_mask] = self.pad_id
        input_ids[:, 0] = self.cls_id
        for separators in (middles, ends):
            np.put_along_axis(input_ids, separators, self.sep_id, axis=1)
        labels = np.full(input_ids.shape, IGNORED_LABEL, dtype=np.int64)
        masks = self._data.masks[indices]  # [rows, predictions]
        rows, slots = np.nonzero(masks["position"])
        masked = rows, masks["position"][rows, slots]
        labels[masked] = input_ids[masked]
        input_ids[masked] = masks["id"][rows, slots]
        arrays = {
            "input_ids": input_ids,
            "token_type_ids": (is_second & attention_mask).astype(np.int64),
            "attention_mask": attention_mask.astype(np.int64),
            "labels": labels,
        }
        return {name: torch.from_numpy(values) for name, values in arrays.items()}

"""Text of pre-training: a corpus as word-piece ids, instances of it, and masking.

A corpus is one flat array of ids with the starts of its sentences and documents; an instance is
two spans of that array, as cutting it to length only trims ends (BERT, arXiv 1810.04805, section
3.1 and appendix A).
"""

import hashlib
import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import BinaryIO, NamedTuple

import numpy as np

from transformer.file_utils import UserError, is_packed, open_text, text_lines
from transformer.piece_tables import flat_indices
from transformer.tokenization import BLOCK_BYTES, AnyTokenizer, FileTokenizer, truncate_pair

SENTENCES_PER_BLOCK = 1 << 14  # planned at once
CORPUS_IDS_NAME = "corpus.bin"
SENTENCES_NAME, DOCUMENTS_NAME = "sentences.bin", "documents.bin"


def load_array(
    file: Path | BinaryIO, dtype: np.dtype | str, mapped: bool = True
) -> np.ndarray:
    """Read all values of a file, or map them into memory, read-only."""
    if mapped:
        with suppress(ValueError):  # an empty file can not be mapped
            return np.asarray(np.memmap(file, dtype, mode="r"))
    return np.fromfile(file, dtype)


def id_dtype(vocab_size: int) -> str:
    """Return the smallest dtype that holds every word-piece id."""
    return "<u2" if vocab_size <= 1 << 16 else "<i4"


# ------------------------------------------------------------------ documents


class Corpus(NamedTuple):
    """Tokenized documents. Sentence s has the ids `token_ids[starts[s]:starts[s + 1]]`."""

    token_ids: np.ndarray  # [tokens]
    sentence_starts: np.ndarray  # [sentences + 1], counted in tokens
    document_starts: np.ndarray  # [documents + 1], counted in sentences

    @property
    def documents(self) -> int:
        return len(self.document_starts) - 1

    @property
    def sentences(self) -> int:
        return len(self.sentence_starts) - 1

    @classmethod
    def open(cls, folder: Path, vocab_size: int) -> "Corpus":
        """Map the files that `write_corpus` wrote; processes share their memory."""
        return cls(load_array(folder / CORPUS_IDS_NAME, id_dtype(vocab_size)),
                   load_array(folder / SENTENCES_NAME, "<i8"),
                   load_array(folder / DOCUMENTS_NAME, "<i8"))


class TextBlock(NamedTuple):
    """Whole lines of a UTF-8 file.

    start, end: its bytes in the file, which are compressed ones where `text` holds the lines.
    ends_file: whether nothing of the file follows, save what is no text.
    """

    path: Path
    start: int
    end: int
    ends_file: bool
    text: bytes | None = None

    def read(self) -> bytes:
        """Return the lines, without the end of the last."""
        if self.text is not None:
            return self.text.removesuffix(b"\n")
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.end - self.start).removesuffix(b"\n")


class TokenizedBlock(NamedTuple):
    """Whole lines of a corpus, tokenized."""

    token_ids: np.ndarray  # [tokens]
    lengths: np.ndarray  # [sentences], in tokens
    document_ends: np.ndarray  # [ends], how many of the block's sentences are before each
    unknown: int  # how many ids are [UNK]
    size: int  # bytes of the file


def line_blocks(path: Path, size: int = BLOCK_BYTES) -> Iterator[TextBlock]:
    """Yield the blocks of a file: whole lines, of `size` and up to a line more.

    A compressed file is read here, any other by `TextBlock.read`. A damaged one is a `UserError`.
    """
    if is_packed(path):
        yield from _compressed_blocks(path, size)
        return
    stop, end = path.stat().st_size, 0
    with path.open("rb") as lines:
        while end < stop:
            start = end
            lines.seek(min(start + size, stop) - 1)
            lines.readline()
            end = lines.tell()
            yield TextBlock(path, start, end, end == stop)


def _compressed_blocks(path: Path, size: int) -> Iterator[TextBlock]:
    start, stop = 0, path.stat().st_size
    with open_text(path) as lines:
        while text := lines.read(size):
            text += lines.readline()
            ends_file = not lines.peek(1)
            end = stop if ends_file else os.lseek(lines.fileno(), 0, os.SEEK_CUR)
            yield TextBlock(path, start, end, ends_file, text)
            start = end


def tokenize_block(
    tokenizer: AnyTokenizer, block: TextBlock, by_line: bool = False
) -> TokenizedBlock:
    """Tokenize a block: a sentence a line, a blank line and the file's end between documents.

    With `by_line` each line is a document of one sentence or, with a tab between them, of two.
    Sentences without word pieces are dropped. Bytes that are not UTF-8 are a `UserError` with line.
    """
    text = block.read()
    lines = text.split(b"\n")
    if by_line and b"\t" in text:
        text = b"\n".join(line.replace(b"\t", b"\n", 1) for line in lines)
    try:
        ids, lengths = tokenizer.encode_lines(text)
        if by_line:
            ends = np.cumsum([1 + (b"\t" in line) for line in lines]) - 1
        else:
            ends = [line for line in np.flatnonzero(lengths == 0)
                    if not lines[line].decode().strip()]
    except UnicodeDecodeError:
        deque(text_lines(block.path), maxlen=0)  # raises the error that names the line
        raise
    if block.ends_file:
        ends = [*ends, len(lengths) - 1]
    sentences = np.cumsum(lengths > 0)
    return TokenizedBlock(
        ids.astype(id_dtype(len(tokenizer))),
        lengths[lengths > 0],
        sentences[ends],
        int((ids == tokenizer.unk_id).sum()),
        block.end - block.start,
    )


def write_corpus(folder: Path, blocks: Iterable[TokenizedBlock]) -> int:
    """Write blocks, in the order of the text, as the files of a corpus; return the [UNK] in them.

    Documents without sentences are dropped. Memory stays at a block whatever the corpus.
    """
    tokens = sentences = last_start = unknown = 0

    def write(file: BinaryIO, values: np.ndarray | list[int]) -> None:
        file.write(np.ascontiguousarray(values, dtype="<i8").data)

    names = (CORPUS_IDS_NAME, SENTENCES_NAME, DOCUMENTS_NAME)
    with ExitStack() as stack:
        token_ids, sentence_starts, document_starts = (
            stack.enter_context((folder / name).open("wb")) for name in names)
        write(sentence_starts, [0])
        write(document_starts, [0])
        for block in blocks:
            token_ids.write(block.token_ids.data)
            write(sentence_starts, tokens + np.cumsum(block.lengths, dtype=np.int64))
            starts = np.unique(sentences + block.document_ends)
            starts = starts[starts > last_start]
            write(document_starts, starts)
            last_start = int(starts[-1]) if len(starts) else last_start
            tokens += len(block.token_ids)
            sentences += len(block.lengths)
            unknown += block.unknown
        if sentences > last_start:
            write(document_starts, [sentences])
    return unknown


def document_blocks(corpus: Corpus, size: int = SENTENCES_PER_BLOCK) -> list[tuple[int, int]]:
    """Return the sentences [begin, end) of blocks of whole documents, of about `size`."""
    wanted = np.arange(0, corpus.sentences, size)
    bounds = np.unique(corpus.document_starts[np.searchsorted(corpus.document_starts, wanted)])
    bounds = [*bounds[bounds < corpus.sentences].tolist(), corpus.sentences]
    return list(itertools.pairwise(bounds))


# ------------------------------------------------------------------ random numbers


class RandomNumbers(NamedTuple):
    """The random numbers of an epoch, each by its purpose and the index of a sentence or document.

    As no number depends on those drawn before, neither the division of the work nor its order
    changes the result. They are those of SplitMix64 (Steele, Lea and Flood, 2014), which also
    defines the n-th number by n alone, with a start for each seed, epoch and purpose.
    """

    seed: int
    epoch: int

    def bits(self, purpose: str, indices: np.ndarray) -> np.ndarray:
        """Return 64 random bits for each of `indices`, as uint64."""
        name = f"{self.seed}/{self.epoch}/{purpose}"
        state = indices.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        state += np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype="<u8")[0]
        state ^= state >> np.uint64(30)
        state *= np.uint64(0xBF58476D1CE4E5B9)
        state ^= state >> np.uint64(27)
        state *= np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))

    def uniform(self, purpose: str, indices: np.ndarray) -> np.ndarray:
        """Return a random number from 0 to below 1 for each of `indices`."""
        return (self.bits(purpose, indices) >> np.uint64(11)) * 2.0**-53

    def below(self, purpose: str, indices: np.ndarray, limits: np.ndarray | int) -> np.ndarray:
        """Return a random integer from 0 to below the limit for each of `indices`."""
        return (self.uniform(purpose, indices) * limits).astype(np.int64)

    def heads(self, purpose: str, indices: np.ndarray, flips: np.ndarray) -> np.ndarray:
        """Return for each of `indices` how many of so many coin flips are heads."""
        heads = np.zeros(len(indices), dtype=np.int64)
        for word in range(-(-int(flips.max(initial=0)) // 64)):
            rows = np.flatnonzero(flips > 64 * word)
            unused = np.maximum(64 * (word + 1) - flips[rows], 0).astype(np.uint64)
            bits = self.bits(f"{purpose} {word}", indices[rows]) >> unused
            flipped = np.unpackbits(bits.view(np.uint8).reshape(-1, 8), axis=1)
            heads[rows] += flipped.sum(axis=1, dtype=np.int64)
        return heads


# ------------------------------------------------------------------ instances


class EpochSettings(NamedTuple):
    """What the instances of a run have in common; lengths count the special tokens.

    instances: "pairs": next-sentence instances; "packed": one segment of as many sentences as fit;
        "lines": a line of the corpus is one, of a text or of two
    long_lines: what becomes of lines that are too long: "cut", or "split" into several instances
    separators: how many [SEP] stand between two texts
    """

    seed: int = 42
    max_seq_len: int = 128
    short_seq_prob: float = 0.1
    instances: str = "pairs"
    long_lines: str = "cut"
    separators: int = 1

    @property
    def max_tokens(self) -> int:
        """How many tokens of text an instance holds; of lines, one without a second text."""
        return self.max_seq_len - 2 - (self.instances == "pairs") * self.separators


class Instances(NamedTuple):
    """Instances one after the other [instances]: two spans of the corpus, counted in tokens."""

    numbers: np.ndarray  # each time another: what begins it, a sentence or, of lines, a token
    first_starts: np.ndarray
    first_lengths: np.ndarray
    second_starts: np.ndarray
    second_lengths: np.ndarray  # 0 where there is one segment
    is_random_next: np.ndarray  # bool


class _Plan(NamedTuple):
    """For each sentence [sentences] of a block, the instance that would begin with it."""

    sentences: np.ndarray
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

    `begin` and `end` are boundaries of documents, of the whole corpus if not given. Sentences are
    gathered until they hold the target length, split at a random one, and half of the time the
    second part is exchanged for a random span and given back to the document. The target is the
    full length or, with probability `short_seq_prob`, a random shorter one. Packed, what was
    gathered is kept as one segment. Lines give the same instances in every epoch.
    """
    random = RandomNumbers(settings.seed, epoch)
    end = corpus.sentences if end is None else end
    if settings.instances == "lines":
        yield from _line_instances(corpus, settings, begin, end)
        return
    while begin < end:
        # The next instance depends on where the last one ended; everything else is computed for
        # all sentences of the block at once, and then kept for those that begin an instance.
        block_end = min(begin + SENTENCES_PER_BLOCK, end)
        plan = _plan_instances(corpus, settings, random, begin, block_end)
        following = (plan.following - begin).tolist()
        chosen, place = [], 0
        while place < len(following):
            chosen.append(place)
            place = following[place]
        chosen = np.array(chosen)
        plan = _Plan(*(values[chosen] for values in plan))
        yield _cut_instances(corpus, settings, random, plan)
        begin += place


def _plan_instances(
    corpus: Corpus, settings: EpochSettings, random: RandomNumbers, begin: int, end: int
) -> _Plan:
    """Plan an instance from every sentence in [begin, end)."""
    sentences = np.arange(begin, end)
    documents = np.searchsorted(corpus.document_starts, sentences, side="right") - 1
    indices = np.arange(documents[0], documents[-1] + 1)
    # Kept from the original: one target length a document, where BERT draws one an instance.
    is_short = random.uniform("short", indices) < settings.short_seq_prob
    short_targets = 2 + random.below("target", indices, settings.max_tokens - 1)
    targets = np.where(is_short, short_targets, settings.max_tokens)[documents - documents[0]]
    # A sentence has a token at least, so no instance reaches further than its target.
    starts = corpus.sentence_starts[begin : end + settings.max_tokens]
    stops = begin + np.searchsorted(starts, starts[: len(sentences)] + targets)
    stops = np.minimum(stops, corpus.document_starts[documents + 1])
    if settings.instances == "packed":
        never = np.zeros(len(sentences), dtype=bool)
        return _Plan(sentences, documents, targets, stops, stops, never, stops)
    splits = sentences + 1 + random.below("split", sentences, stops - sentences - 1)
    is_random = (splits == stops) | (random.uniform("next", sentences) < 0.5)
    following = np.where(is_random, splits, stops)
    return _Plan(sentences, documents, targets, splits, stops, is_random, following)


def _cut_instances(
    corpus: Corpus, settings: EpochSettings, random: RandomNumbers, plan: _Plan
) -> Instances:
    """Take the planned instances, cut to length."""
    first_starts, second_starts, ends = (
        corpus.sentence_starts[place] for place in (plan.sentences, plan.splits, plan.stops)
    )
    first_lengths, second_lengths = second_starts - first_starts, ends - second_starts
    chosen = np.flatnonzero(plan.is_random)
    second_starts[chosen], second_lengths[chosen] = random_spans(
        corpus, random, plan.sentences[chosen], plan.documents[chosen],
        plan.targets[chosen] - first_lengths[chosen],
    )
    first_kept, second_kept = truncate_pair(first_lengths, second_lengths, settings.max_tokens)
    return Instances(
        plan.sentences,
        first_starts + random.heads("first", plan.sentences, first_lengths - first_kept),
        first_kept,
        second_starts + random.heads("second", plan.sentences, second_lengths - second_kept),
        second_kept,
        plan.is_random,
    )


def _line_instances(
    corpus: Corpus, settings: EpochSettings, begin: int, end: int
) -> Iterator[Instances]:
    """Yield an instance of each document, which is a line, in blocks.

    The beginnings of the texts are kept; of two, the longer one is cut first. Split, what was cut
    off makes instances of one segment after the line's own.
    """
    lines = np.searchsorted(corpus.document_starts, [begin, end])
    for first in range(*lines, SENTENCES_PER_BLOCK):
        bounds = corpus.document_starts[first : min(first + SENTENCES_PER_BLOCK, lines[1]) + 1]
        # The second text of a line without one is empty: it starts at the line's end.
        starts = corpus.sentence_starts[np.stack([bounds[:-1], bounds[:-1] + 1])]  # [2, lines]
        lengths = np.stack([starts[1], corpus.sentence_starts[bounds[1:]]]) - starts
        room = settings.max_tokens - (lengths[1] > 0) * settings.separators
        kept = np.stack(truncate_pair(*lengths, room))
        spans = np.stack([starts[0], kept[0], starts[1], kept[1]])  # [4, instances]
        if settings.long_lines == "split":
            spans = _with_rests(spans, starts + kept, lengths - kept, settings.max_tokens)
        yield Instances(spans[0], *spans, np.zeros(spans.shape[1], dtype=bool))


def _with_rests(
    spans: np.ndarray, starts: np.ndarray, lengths: np.ndarray, max_tokens: int
) -> np.ndarray:
    """Add to the spans of lines, [4, lines], those of what was cut off their texts, [2, lines]."""
    starts, lengths = starts.T.ravel(), lengths.T.ravel()  # line by line
    counts = -(-lengths // max_tokens)
    done = flat_indices(np.zeros_like(counts), counts) * max_tokens
    more = np.zeros((4, len(done)), dtype=spans.dtype)
    more[0] = np.repeat(starts, counts) + done
    more[1] = np.minimum(np.repeat(lengths, counts) - done, max_tokens)
    lines = np.arange(spans.shape[1])
    order = np.argsort(np.concatenate([lines, np.repeat(np.repeat(lines, 2), counts)]),
                       kind="stable")
    return np.concatenate([spans, more], axis=1)[:, order]


def random_spans(
    corpus: Corpus, random: RandomNumbers,
    sentences: np.ndarray, documents: np.ndarray, lengths: np.ndarray,
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


# ------------------------------------------------------------------ masking


@dataclass
class Masking:
    """How tokens are masked (BERT, section 3.1); probability 0 masks nothing."""

    tokenizer: AnyTokenizer
    probability: float
    max_predictions: int
    whole_words: bool  # all pieces of a word or none

    def __post_init__(self) -> None:
        is_file = isinstance(self.tokenizer, FileTokenizer)
        if is_file and self.whole_words:
            raise UserError("--do_whole_word_mask: only a BERT's vocabulary (vocab.txt) marks the"
                            " pieces that continue a word, by ##; expected a call without the flag")
        if is_file and self.probability > 0 and self.tokenizer.mask_id < 0:
            raise UserError(f"{self.tokenizer.file}: no token for masks; expected a mask_token, or"
                            " no masks (--masked_lm_prob 0)")

    @cached_property
    def continuation_ids(self) -> frozenset[int]:
        """The pieces to mask with the word before them."""
        pieces = self.tokenizer.vocab.items() if self.whole_words else ()
        return frozenset(index for piece, index in pieces if piece.startswith("##"))

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
    if not budget:
        return masked, [], []
    tokenizer, continuation_ids = masking.tokenizer, masking.continuation_ids
    special_ids = (tokenizer.cls_id, tokenizer.sep_id)
    words: list[list[int]] = []
    for position, index in enumerate(masked):
        if index in special_ids:
            continue
        if index in continuation_ids and words and words[-1][-1] == position - 1:
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
            masked[position] = tokenizer.mask_id
        elif choice < 0.9:
            masked[position] = random.randrange(len(tokenizer))
    return masked, positions, labels

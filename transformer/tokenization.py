"""BERT's tokenizer: basic tokens (words and punctuation), then word pieces, as Rust does them.

The two steps are those of the original BERT (arXiv 1810.04805, appendix A): clean, space out
Chinese characters, lower-case and strip accents where asked, split at white space and
punctuation, then take the longest matching word piece from the left.
"""

import logging
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, islice, pairwise
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

from transformer.file_utils import (
    TOKENIZER_CONFIG_NAME,
    VOCAB_NAME,
    UserError,
    read_json,
    write_json,
    write_text,
)

logger = logging.getLogger(__name__)

UNK, SEP, PAD, CLS, MASK = SPECIAL_TOKENS = ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")
MAX_CHARACTERS_PER_WORD = 100
FAST_TOKENIZER_NAME = "tokenizer.json"
FINAL_SIGMA_CANDIDATE = "\u03a3"

ASCII_PUNCTUATION = [bytes([code]) for code in b"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"]
# White space to bytes.split, but to BERT control characters, which leave no gap.
ASCII_CONTROLS_OF_SPLIT = (b"\x0b", b"\x0c")
LINE_END = b"\xff"  # in lists of chunks: a byte that UTF-8 never has
BLOCK_BYTES = 1 << 18  # text that is tokenized at once
CACHE_BYTES = 64 << 20
CACHE_ENTRY_BYTES = 200  # of an entry beside its text: three Python objects and its ids


def load_vocab(vocab_file: Path | str) -> dict[str, int]:
    """Read one word piece a line; the line's number, from 0, is its id.

    A missing file, a blank line inside the file, a piece that appears twice and a file without
    one of the five special tokens are `UserError`s.
    """
    vocab_file = Path(vocab_file)
    if not vocab_file.is_file():
        raise UserError(f"{vocab_file}: no such file; expected a vocabulary, one word piece a line")
    try:
        lines = vocab_file.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{vocab_file}: not UTF-8 text ({error})") from error
    if lines and not lines[-1]:
        lines.pop()
    pieces = [line.rstrip("\r") for line in lines]
    vocab = dict(zip(pieces, range(len(pieces)), strict=True))
    for line, piece in enumerate(pieces, start=1):
        if not piece.strip():
            raise UserError(f"{vocab_file}: line {line} is blank; expected one word piece a line")
        if vocab[piece] != line - 1:
            raise UserError(f"{vocab_file}: lines {line} and {vocab[piece] + 1} are both {piece!r};"
                            " expected each word piece once")
    missing = [token for token in SPECIAL_TOKENS if token not in vocab]
    if missing:
        raise UserError(f"{vocab_file}: lacks {', '.join(missing)}; expected a BERT vocabulary")
    return vocab


def saved_lower_case(model_dir: Path) -> bool | None:
    """Whether the files beside `vocab.txt` say that text is lower-cased; None if none says so."""
    settings = []
    if (model_dir / TOKENIZER_CONFIG_NAME).is_file():
        settings.append(read_json(model_dir / TOKENIZER_CONFIG_NAME).get("do_lower_case"))
    if (model_dir / FAST_TOKENIZER_NAME).is_file():
        normalizer = read_json(model_dir / FAST_TOKENIZER_NAME).get("normalizer") or {}
        settings.append(normalizer.get("lowercase"))
    return next((setting for setting in settings if isinstance(setting, bool)), None)


class BasicTokenizer:
    """Text to words and punctuation marks; a special token that stands alone is kept whole."""

    def __init__(self, do_lower_case: bool = True):
        self.do_lower_case = do_lower_case
        self._cleaner = BertNormalizer(strip_accents=False, lowercase=False)
        self.normalizer = BertNormalizer(strip_accents=do_lower_case, lowercase=do_lower_case)
        self.pre_tokenizer = BertPreTokenizer()

    def tokenize(self, text: str) -> list[str]:
        """Split one text into its basic tokens."""
        words = []
        for part in self.parts(text):
            if part in SPECIAL_TOKENS:
                words.append(part)
            else:
                split = self.pre_tokenizer.pre_tokenize_str(self.normalizer.normalize_str(part))
                words.extend(word for word, _ in split)
        return words

    def parts(self, text: str) -> list[str]:
        """Cut a text at its special tokens, as they are the words that nothing may change.

        A special token counts only where white space surrounds it after cleaning, so that
        `[MASK].` is five tokens, as it always was in BERT.
        """
        if self.do_lower_case and FINAL_SIGMA_CANDIDATE in text:
            text = self._lower_sigma(text)
        if not any(token in text for token in SPECIAL_TOKENS):
            return [text]
        parts: list[str] = []
        plain: list[str] = []
        for word in self._cleaner.normalize_str(text).split():
            if word in SPECIAL_TOKENS:
                parts.extend([" ".join(plain), word] if plain else [word])
                plain = []
            else:
                plain.append(word)
        return [*parts, " ".join(plain)] if plain else parts

    @staticmethod
    def _lower_sigma(text: str) -> str:
        """Lower-case the words with a capital sigma: Python, unlike Rust, knows its final form."""

        def lower(match: re.Match[str]) -> str:
            return match[0].lower() if FINAL_SIGMA_CANDIDATE in match[0] else match[0]

        return re.sub(r"\S+", lower, text)


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Return where each of consecutive slices starts, and the end: [slices + 1]."""
    return np.concatenate([[0], np.cumsum(lengths)])


def flat_indices(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """List the indices of consecutive slices of a flat array: [sum of lengths]."""
    shifts = starts - (np.cumsum(lengths) - lengths)
    return np.arange(lengths.sum()) + np.repeat(shifts, lengths)


def truncate_pair(
    length_a: np.ndarray, length_b: np.ndarray, budget: np.ndarray | int
) -> tuple[np.ndarray, np.ndarray]:
    """Say how much of two sentences to keep so that both fit into `budget` positions, [rows].

    The same as BERT's loop that drops a piece of the longer sentence (of the second, if
    they are equal) until they fit.
    """
    keep_a = np.minimum(length_a, np.maximum(budget - budget // 2, budget - length_b))
    return keep_a, np.minimum(length_b, budget - keep_a)


class ChunkTable(dict[bytes, int]):
    """Maps chunks of text to indices, in the order in which they are first looked up.

    `ids` holds the word pieces of chunk 0, then of chunk 1, ..., and `ends[i + 1]` is where those
    of chunk i end. `new` are the chunks whose word pieces are still to be added.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ids = array("i")
        self.ends = array("q", [0])
        self.new: list[bytes] = []
        self.text_bytes = 0

    def __missing__(self, chunk: bytes) -> int:
        self.new.append(chunk)
        index = self[chunk] = len(self)
        return index

    def add(self, rows: Iterable[Sequence[int]]) -> None:
        """Give the new chunks their word pieces."""
        rows = list(rows)
        self.ids.extend(chain.from_iterable(rows))
        self.ends.extend(islice(accumulate(map(len, rows), initial=self.ends[-1]), 1, None))
        self.text_bytes += sum(map(len, self.new))
        self.new.clear()

    @property
    def usable(self) -> bool:
        """Whether it may grow further, and was not left half-filled by an error."""
        size = self.text_bytes + CACHE_ENTRY_BYTES * len(self)
        return not self.new and size <= CACHE_BYTES

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the word pieces of these chunks, and how many each has [chunks]."""
        ends = np.frombuffer(self.ends, dtype=np.int64)
        starts = ends[indices]
        counts = ends[indices + 1] - starts
        return np.frombuffer(self.ids, dtype=np.int32)[flat_indices(starts, counts)], counts


class BertTokenizer:
    """Text to word pieces and ids, with the vocabulary of one model.

    `vocab` maps pieces to ids in id order. A word longer than 100 characters, or one that the
    pieces cannot spell, becomes `[UNK]`.
    """

    def __init__(self, vocab_file: Path | str, do_lower_case: bool = True):
        self.vocab = load_vocab(vocab_file)
        self.do_lower_case = do_lower_case
        self.basic_tokenizer = BasicTokenizer(do_lower_case)
        self._pieces = list(self.vocab)
        self.unk_id, self.sep_id, self.pad_id, self.cls_id, self.mask_id = (
            self.vocab[token] for token in SPECIAL_TOKENS
        )
        self._fast = Tokenizer(WordPiece(
            self.vocab, unk_token=UNK, max_input_chars_per_word=MAX_CHARACTERS_PER_WORD))
        self._fast.normalizer = self.basic_tokenizer.normalizer
        self._fast.pre_tokenizer = self.basic_tokenizer.pre_tokenizer
        self.table = self._new_table()

    @classmethod
    def from_pretrained(
        cls, model_dir: Path | str, do_lower_case: bool | None = None
    ) -> "BertTokenizer":
        """Load the vocabulary of a model directory, with the case rule that the model was made for.

        `do_lower_case=None` takes the rule from `tokenizer_config.json` or `tokenizer.json`, else
        lower-cases if the vocabulary has no capitals. A given value wins, with a warning where
        the directory says otherwise. A missing `vocab.txt` is a `UserError`.
        """
        model_dir = Path(model_dir)
        vocab_file = model_dir / VOCAB_NAME
        if model_dir.is_file():
            vocab_file, model_dir = model_dir, model_dir.parent
        saved = saved_lower_case(model_dir)
        if do_lower_case is None:
            do_lower_case = saved
        elif saved is not None and saved != do_lower_case:
            logger.warning(
                "%s was made with do_lower_case=%s, but %s was asked for; words in the wrong case "
                "become [UNK]", model_dir, saved, do_lower_case,
            )
        if do_lower_case is None:  # special tokens aside
            do_lower_case = all(piece == piece.lower() for piece in load_vocab(vocab_file)
                                if not piece.startswith("["))
        return cls(vocab_file, do_lower_case)

    def __len__(self) -> int:
        return len(self.vocab)

    def tokenize(self, text: str) -> list[str]:
        """Split one text into word pieces; those that continue a word begin with `##`."""
        return self.convert_ids_to_tokens(self.encode_batch([text])[0])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Word-piece ids of each text, without special tokens and without truncation."""
        ids, lengths = self.encode_flat(texts)
        flat = ids.tolist()
        return [flat[start:end] for start, end in pairwise(offsets_of(lengths).tolist())]

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of one text and the character span of each in the text.

        Special tokens that are written in the text count as the characters they consist of.
        """
        encoding = self._fast.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def encode_flat(self, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of `encode_batch` as one flat array [pieces], and each text's length.

        Both are int32. The cache of earlier chunks (see `encode_lines`) takes at most some 64 MB.
        """
        parts = [self.encode_lines(block) for block in _line_blocks(texts)]
        if not parts:
            return np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int32)
        ids, lengths = zip(*parts, strict=True)
        return np.concatenate(ids), np.concatenate(lengths)

    def encode_lines(self, block: bytes) -> tuple[np.ndarray, np.ndarray]:
        r"""Tokenize UTF-8 text, one text a line: the ids of all [pieces], the length of each line.

        Basic tokens never reach over ASCII white space or punctuation, so the text falls into
        chunks there whose word pieces depend on nothing else. Each distinct chunk is tokenized
        once and then looked up; the table starts anew after 64 MB. Both results are int32.

        Raises:
            UnicodeDecodeError: the text is not UTF-8.
        """
        if not self.table.usable:
            self.table = self._new_table()
        chunks = self._chunks(block)
        indices = np.fromiter(map(self.table.__getitem__, chunks), np.int64, len(chunks))
        if self.table.new:
            self.table.add(self._encode_chunks(self.table.new))
        ids, counts = self.table.gather(indices)
        line_ends = np.flatnonzero(indices == self.table[LINE_END])
        ends = offsets_of(counts)[[*line_ends, len(counts)]]
        return ids, np.diff(ends, prepend=0).astype(np.int32)

    def _chunks(self, block: bytes) -> list[bytes]:
        """Cut text at ASCII white space and punctuation; a line end becomes `LINE_END`."""
        if LINE_END in block:
            block.decode()  # raises the error of a text that is not UTF-8
        if not any(token.encode() in block for token in SPECIAL_TOKENS):
            if self.do_lower_case and FINAL_SIGMA_CANDIDATE.encode() in block:
                block = self.basic_tokenizer._lower_sigma(block.decode()).encode()
            return self._plain_chunks(block)
        chunks: list[bytes] = []
        for line in block.split(b"\n"):
            for part in self.basic_tokenizer.parts(line.decode()):
                text = part.encode()
                chunks += [text] if part in SPECIAL_TOKENS else self._plain_chunks(text)
            chunks.append(LINE_END)
        return chunks[:-1]

    def _plain_chunks(self, block: bytes) -> list[bytes]:
        if self.do_lower_case:
            block = block.lower()  # the ASCII letters; the tokenizer does the others
        for control in ASCII_CONTROLS_OF_SPLIT:
            block = block.replace(control, b"")
        for mark in ASCII_PUNCTUATION:
            block = block.replace(mark, b" " + mark + b" ")
        return block.replace(b"\n", b" " + LINE_END + b" ").split()

    def _encode_chunks(self, chunks: list[bytes]) -> Iterator[Sequence[int]]:
        """Yield the word pieces of each chunk."""
        others = [chunk.decode() for chunk in chunks if not chunk.isalnum()]
        encoded = iter(self._fast.encode_batch_fast(others, add_special_tokens=False))
        tokenize_word = self._fast.model.tokenize
        for chunk in chunks:
            if not chunk.isalnum():
                yield next(encoded).ids
                continue
            # ASCII letters and digits are one basic token already.
            word = chunk.decode()
            index = self.vocab.get(word)
            if index is None or len(word) > MAX_CHARACTERS_PER_WORD:
                yield [token.id for token in tokenize_word(word)]
            else:
                yield (index,)

    def _new_table(self) -> ChunkTable:
        """Return a table with the line end, and the special tokens, which only `parts` finds."""
        table = ChunkTable()
        for chunk in (LINE_END, *map(str.encode, SPECIAL_TOKENS)):
            table[chunk]
        table.add([(), *((self.vocab[token],) for token in SPECIAL_TOKENS)])
        return table

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]:
        """Look ids of the vocabulary up."""
        return [self._pieces[index] for index in ids]

    def save_vocabulary(self, directory: Path | str, model_max_length: int | None = None) -> None:
        """Write `vocab.txt`, `tokenizer.json` and `tokenizer_config.json`, as Hugging Face.

        `model_max_length` is the longest input in word pieces, special tokens included.
        """
        directory = Path(directory)
        write_text(directory / VOCAB_NAME, "".join(f"{piece}\n" for piece in self.vocab))
        whole = Tokenizer.from_str(self._fast.to_str())
        whole.add_special_tokens(list(SPECIAL_TOKENS))
        whole.decoder = WordPieceDecoder()
        whole.post_processor = TemplateProcessing(
            f"{CLS} $A {SEP}", f"{CLS} $A {SEP} $B:1 {SEP}:1",
            [(CLS, self.cls_id), (SEP, self.sep_id)])
        write_text(directory / FAST_TOKENIZER_NAME, whole.to_str(pretty=True))
        limit = {} if model_max_length is None else {"model_max_length": model_max_length}
        write_json(
            directory / TOKENIZER_CONFIG_NAME,
            {"tokenizer_class": "BertTokenizer", "do_lower_case": self.do_lower_case, **limit,
             "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
             "strip_accents": None, "tokenize_chinese_chars": True,
             "unk_token": UNK, "sep_token": SEP, "pad_token": PAD, "cls_token": CLS,
             "mask_token": MASK},
        )


def _line_blocks(texts: Iterable[str]) -> Iterator[bytes]:
    """Join texts to blocks of lines in UTF-8; a line end inside a text becomes a space."""
    lines: list[bytes] = []
    size = 0
    for text in texts:
        lines.append(text.encode().replace(b"\n", b" "))
        size += len(lines[-1])
        if size >= BLOCK_BYTES:
            yield b"\n".join(lines)
            lines, size = [], 0
    if lines:
        yield b"\n".join(lines)

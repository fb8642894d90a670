"""BERT's tokenizer: basic tokens (words and punctuation), then word pieces, as Rust does them.

The two steps are those of the original BERT (arXiv 1810.04805, appendix A): clean, space out
Chinese characters, lower-case and strip accents where asked, split at white space and
punctuation, then take the longest matching word piece from the left. `load_tokenizer` reads this
tokenizer or whatever other one a model directory has.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

from transformer.file_tokenizer import FileTokenizer
from transformer.file_utils import (
    OTHER_VOCABULARIES,
    TOKENIZER_CONFIG_NAME,
    VOCAB_NAME,
    UserError,
    has_vocabulary,
    write_json,
    write_text,
)
from transformer.piece_tables import RUN, CharacterTable, ChunkTable
from transformer.tokenizer_files import (
    CLS,
    FAST_TOKENIZER_NAME,
    MASK,
    MAX_CHARACTERS_PER_WORD,
    PAD,
    SEP,
    SPECIAL_TOKENS,
    UNK,
    has_capitals,
    has_segments,
    input_names,
    is_berts,
    load_vocab,
    mend_case,
    read_tokenizer,
)

logger = logging.getLogger(__name__)

FINAL_SIGMA_CANDIDATE = "\u03a3"

ASCII_PUNCTUATION = [bytes([code]) for code in b"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"]
# White space to bytes.split, but to BERT control characters, which leave no gap.
ASCII_CONTROLS_OF_SPLIT = (b"\x0b", b"\x0c")
# In chunks of text: bytes that UTF-8 never has.
LINE_END = b"\xff"
SPECIAL_MARKS = {token: bytes([0xF8 + index]) for index, token in enumerate(SPECIAL_TOKENS)}
BLOCK_BYTES = 1 << 18  # text that is tokenized at once


class BasicTokenizer:
    """Text to words and punctuation marks; a special token that stands alone is kept whole.

    strip_accents: None: as `do_lower_case`
    kept: the tokens that are kept whole
    """

    def __init__(self, do_lower_case: bool = True, strip_accents: bool | None = None,
                 tokenize_chinese_chars: bool = True, kept: Sequence[str] = SPECIAL_TOKENS):
        self.do_lower_case = do_lower_case
        self.kept = kept
        self._cleaner = BertNormalizer(strip_accents=False, lowercase=False,
                                       handle_chinese_chars=tokenize_chinese_chars)
        self.normalizer = BertNormalizer(
            strip_accents=strip_accents, lowercase=do_lower_case,
            handle_chinese_chars=tokenize_chinese_chars)
        self.pre_tokenizer = BertPreTokenizer()

    def tokenize(self, text: str) -> list[str]:
        """Split one text into its basic tokens."""
        words = []
        for part in self.parts(text):
            if part in self.kept:
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
        if not any(token in text for token in self.kept):
            return [text]
        parts: list[str] = []
        plain: list[str] = []
        for word in self._cleaner.normalize_str(text).split():
            if word in self.kept:
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


def truncate_pair(
    length_a: np.ndarray, length_b: np.ndarray, budget: np.ndarray | int
) -> tuple[np.ndarray, np.ndarray]:
    """Say how much of two sentences to keep so that both fit into `budget` positions, [rows].

    The same as BERT's loop that drops a piece of the longer sentence (of the second, if
    they are equal) until they fit.
    """
    keep_a = np.minimum(length_a, np.maximum(budget - budget // 2, budget - length_b))
    return keep_a, np.minimum(length_b, budget - keep_a)


class BertTokenizer:
    """Text to word pieces and ids, with the vocabulary of one model.

    `vocab` maps pieces, and after them the added tokens, to ids in id order. A word longer than
    100 characters, or one that the pieces cannot spell, becomes `[UNK]`.

    Args:
        vocab: file of word pieces, or their ids.
        do_lower_case, strip_accents, tokenize_chinese_chars: settings of the same names in Hugging
            Face's `BertTokenizer`; accents are stripped where text is lower-cased unless told.
        added_tokens: tokens that are found in a text before anything else, by id.
        segments: whether the model is told the two texts of a pair apart.
    """

    separators = 1  # between the texts of a pair

    def __init__(self, vocab: Path | str | Mapping[str, int], do_lower_case: bool = True,
                 strip_accents: bool | None = None, tokenize_chinese_chars: bool = True,
                 added_tokens: Mapping[int, AddedToken] | None = None, segments: bool = True):
        self.vocab = dict(vocab) if isinstance(vocab, Mapping) else load_vocab(vocab)
        self.word_pieces = len(self.vocab)  # those of vocab.txt
        self.do_lower_case, self.strip_accents = do_lower_case, strip_accents
        self.tokenize_chinese_chars = tokenize_chinese_chars
        self.added_tokens = dict(added_tokens or {})
        self.segments = segments
        kept = (*SPECIAL_TOKENS, *(token.content for token in self.added_tokens.values()))
        self.basic_tokenizer = BasicTokenizer(
            do_lower_case, strip_accents, tokenize_chinese_chars, kept)
        self._fast = Tokenizer(WordPiece(
            self.vocab, unk_token=UNK, max_input_chars_per_word=MAX_CHARACTERS_PER_WORD))
        self._fast.normalizer = self.basic_tokenizer.normalizer
        self._fast.pre_tokenizer = self.basic_tokenizer.pre_tokenizer
        if self.added_tokens:
            self._add_tokens()
        self._pieces = list(self.vocab)
        self.unk_id, self.sep_id, self.pad_id, self.cls_id, self.mask_id = (
            self.vocab[token] for token in SPECIAL_TOKENS
        )
        self.table = self._new_table()

    def _add_tokens(self) -> None:
        """Have the added tokens, and BERT's five beside them, found anywhere in a text."""
        self._fast.add_special_tokens(list(SPECIAL_TOKENS))
        for index, token in self.added_tokens.items():
            add = self._fast.add_special_tokens if token.special else self._fast.add_tokens
            add([token])
            if (got := self._fast.token_to_id(token.content)) != index:
                raise UserError(f"the added token {token.content!r} has id {index}; expected {got},"
                                " the next after the vocabulary")
            self.vocab[token.content] = index

    @property
    def settings(self) -> dict[str, Any]:
        """All but the vocabulary that ids depend on."""
        strips = self.do_lower_case if self.strip_accents is None else self.strip_accents
        return {"do_lower_case": self.do_lower_case, "strip_accents": strips,
                "tokenize_chinese_chars": self.tokenize_chinese_chars,
                "added_tokens": {index: repr(token) for index, token in self.added_tokens.items()}}

    @classmethod
    def from_pretrained(
        cls, model_dir: Path | str, do_lower_case: bool | None = None
    ) -> "BertTokenizer":
        """Load the tokenizer of a model directory, with the settings that the model was made for.

        `do_lower_case=None` takes the rule from the directory's files, else lower-cases if the
        vocabulary has no capitals. A given value wins, with a warning where the directory says
        otherwise. See `read_tokenizer` for what is refused, `mend_case` for what is mended.
        """
        files = read_tokenizer(model_dir)
        if do_lower_case is not False:
            files = mend_case(files, None if do_lower_case else model_dir)
        saved = files.settings.get("do_lower_case")
        if do_lower_case is None:
            do_lower_case = not has_capitals(files.vocab) if saved is None else saved
        elif saved is not None and saved != do_lower_case:
            logger.warning(
                "%s was made with do_lower_case=%s, but %s was asked for; words in the wrong case "
                "become [UNK]", model_dir, saved, do_lower_case,
            )
        settings = {**files.settings, "do_lower_case": do_lower_case}
        try:
            return cls(files.vocab, **settings, added_tokens=files.added_tokens,
                       segments=has_segments(model_dir))
        except UserError as error:
            raise UserError(f"{model_dir}: {error}") from error

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

        Special tokens that are written in the text count as the characters they consist of, unless
        tokens were added.
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

        Basic tokens never reach over ideographs, punctuation and ASCII white space. Ideographs and
        punctuation are looked up one by one; the rest falls into chunks whose word pieces depend
        on nothing else. Each distinct chunk is tokenized once and then looked up; the table of
        chunks starts anew after 64 MB. Both results are int32.

        Raises:
            UnicodeDecodeError: the text is not UTF-8.
        """
        if self.added_tokens:  # found anywhere, not between white space only
            encoded = self._fast.encode_batch_fast(
                block.decode().split("\n"), add_special_tokens=False)
            ids = [each.ids for each in encoded]
            return (np.array([*chain.from_iterable(ids)], np.int32),
                    np.array([*map(len, ids)], np.int32))
        if not self.table.usable:
            self.table = self._new_table()
        block = self._mark_special_tokens(block)
        block, run_ids, run_lengths = self._characters.take_out(block)
        chunks = self._chunks(block)
        indices = np.fromiter(map(self.table.__getitem__, chunks), np.int64, len(chunks))
        if self.table.new:
            self.table.add(self._encode_chunks(self.table.new))
        ids, counts = self.table.gather(indices, run_ids, run_lengths)
        line_ends = np.flatnonzero(indices == self.table[LINE_END])
        ends = offsets_of(counts)[[*line_ends, len(counts)]]
        return ids, np.diff(ends, prepend=0).astype(np.int32)

    @cached_property
    def _characters(self) -> CharacterTable:
        return CharacterTable(self.vocab, self.unk_id, self.basic_tokenizer.tokenize,
                              self.tokenize_chinese_chars)

    def _mark_special_tokens(self, block: bytes) -> bytes:
        """Put `SPECIAL_MARKS` in the place of special tokens; lower-case words with a sigma."""
        if not block.isascii():
            text = block.decode()  # raises the error of a text that is not UTF-8
            if self.do_lower_case and FINAL_SIGMA_CANDIDATE in text:
                block = self.basic_tokenizer._lower_sigma(text).encode()
        if b"[" not in block or not any(token.encode() in block for token in SPECIAL_TOKENS):
            return block
        return b"\n".join(
            b" ".join(SPECIAL_MARKS.get(part) or part.encode()
                      for part in self.basic_tokenizer.parts(line))
            for line in block.decode().split("\n"))

    def _chunks(self, block: bytes) -> list[bytes]:
        """Cut text at ASCII white space and punctuation; a line end becomes `LINE_END`."""
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
        """Return a table with the chunks that are marks."""
        table = ChunkTable()
        for mark in (LINE_END, RUN, *SPECIAL_MARKS.values()):
            table[mark]
        table.add([(), (), *((self.vocab[token],) for token in SPECIAL_TOKENS)])
        return table

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]:
        """Look ids of the vocabulary up."""
        return [self._pieces[index] for index in ids]

    def save_vocabulary(
        self, directory: Path | str, model_max_length: int | None = None, segments: bool = True
    ) -> None:
        """Write `vocab.txt`, `tokenizer.json` and `tokenizer_config.json`, as Hugging Face.

        `model_max_length` is the model's longest input in word pieces, special tokens included;
        `segments`: whether it can tell the two texts of a pair apart.
        """
        directory = Path(directory)
        write_text(directory / VOCAB_NAME, "".join(
            f"{piece}\n" for piece in islice(self.vocab, self.word_pieces)))
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
             "model_input_names": input_names(self.segments and segments),
             "strip_accents": self.strip_accents,
             "tokenize_chinese_chars": self.tokenize_chinese_chars,
             "unk_token": UNK, "sep_token": SEP, "pad_token": PAD, "cls_token": CLS,
             "mask_token": MASK},
        )


AnyTokenizer = BertTokenizer | FileTokenizer


def load_tokenizer(model_dir: Path | str, do_lower_case: bool | None = None) -> AnyTokenizer:
    """Load the tokenizer of a model directory (or of the one that holds this `vocab.txt`).

    That of a BERT, of which `BertTokenizer.from_pretrained` says more, or any other one that a
    `tokenizer.json` describes; this one lower-cases or does not, whatever is asked for.

    Raises:
        UserError: neither file; `do_lower_case` for a `tokenizer.json` that keeps the case.
    """
    path = Path(model_dir)
    if path.is_dir() and not has_vocabulary(path):
        found = next((name for name in OTHER_VOCABULARIES if (path / name).is_file()), None)
        raise UserError(f"{path / VOCAB_NAME}: no such file, and no {FAST_TOKENIZER_NAME}; expected"
                        " one of the two" + (f" (Hugging Face's AutoTokenizer makes the second of"
                                             f" {found}: load and save it once)" if found else ""))
    if path.is_file() or is_berts(path):
        return BertTokenizer.from_pretrained(path, do_lower_case)
    tokenizer = FileTokenizer(path)
    if do_lower_case and not tokenizer.do_lower_case:
        raise UserError(f"--do_lower_case: {path / FAST_TOKENIZER_NAME} keeps the case, and the"
                        " model was trained with it; expected a call without the flag")
    return tokenizer


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

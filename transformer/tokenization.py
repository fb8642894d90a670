"""BERT's tokenizer: basic tokens (words and punctuation), then word pieces, as Rust does them.

The two steps are those of the original BERT (arXiv 1810.04805, appendix A): clean, space out
Chinese characters, lower-case and strip accents where asked, split at white space and
punctuation, then take the longest matching word piece from the left.
"""

import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from transformer.file_utils import VOCAB_NAME, UserError, read_json, write_json, write_text

logger = logging.getLogger(__name__)

UNK, SEP, PAD, CLS, MASK = SPECIAL_TOKENS = ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")
MAX_CHARACTERS_PER_WORD = 100
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
FAST_TOKENIZER_NAME = "tokenizer.json"
FINAL_SIGMA_CANDIDATE = "\u03a3"


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
    vocab: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        piece = line.rstrip("\r")
        if not piece.strip():
            raise UserError(f"{vocab_file}: line {number} is blank; expected one word piece a line")
        if piece in vocab:
            raise UserError(
                f"{vocab_file}: line {number} repeats {piece!r} of line {vocab[piece] + 1}; "
                "expected each word piece once"
            )
        vocab[piece] = number - 1
    missing = [token for token in SPECIAL_TOKENS if token not in vocab]
    if missing:
        raise UserError(f"{vocab_file}: lacks {', '.join(missing)}; expected a BERT vocabulary")
    return vocab


def saved_lower_case(model_dir: Path) -> bool | None:
    """Whether the files beside `vocab.txt` say that text is lower-cased; None if none says so."""
    config_file = model_dir / TOKENIZER_CONFIG_NAME
    if config_file.is_file():
        setting = read_json(config_file).get("do_lower_case")
        if isinstance(setting, bool):
            return setting
    fast_file = model_dir / FAST_TOKENIZER_NAME
    if fast_file.is_file():
        setting = (read_json(fast_file).get("normalizer") or {}).get("lowercase")
        if isinstance(setting, bool):
            return setting
    return None


def has_capitals(vocab: Iterable[str]) -> bool:
    """Whether any piece, the bracketed special ones aside, has an upper-case letter."""
    return any(piece != piece.lower() for piece in vocab if not piece.startswith("["))


class BasicTokenizer:
    """Text to words and punctuation marks; a special token that stands alone is kept whole."""

    def __init__(self, do_lower_case: bool = True):
        self.do_lower_case = do_lower_case
        self._cleaner = BertNormalizer(
            clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False
        )
        self.normalizer = BertNormalizer(
            clean_text=True,
            handle_chinese_chars=True,
            strip_accents=do_lower_case,
            lowercase=do_lower_case,
        )
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
        return re.sub(r"\S*\u03a3\S*", lambda match: match[0].lower(), text)


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
        self._fast = Tokenizer(
            WordPiece(
                self.vocab, unk_token=UNK, max_input_chars_per_word=MAX_CHARACTERS_PER_WORD
            )
        )
        self._fast.normalizer = self.basic_tokenizer.normalizer
        self._fast.pre_tokenizer = self.basic_tokenizer.pre_tokenizer

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
        if do_lower_case is None:
            do_lower_case = not has_capitals(load_vocab(vocab_file))
        return cls(vocab_file, do_lower_case)

    def __len__(self) -> int:
        return len(self.vocab)

    def tokenize(self, text: str) -> list[str]:
        """Split one text into word pieces; those that continue a word begin with `##`."""
        return self.convert_ids_to_tokens(self.encode_batch([text])[0])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Word-piece ids of each text, without special tokens and without truncation."""
        parts = [self.basic_tokenizer.parts(text) for text in texts]
        plain = [part for row in parts for part in row if part not in SPECIAL_TOKENS]
        encoded = iter(self._fast.encode_batch_fast(plain, add_special_tokens=False))
        rows = []
        for row in parts:
            ids: list[int] = []
            for part in row:
                ids.extend([self.vocab[part]] if part in SPECIAL_TOKENS else next(encoded).ids)
            rows.append(ids)
        return rows

    def convert_tokens_to_ids(self, tokens: Iterable[str]) -> list[int]:
        """Look pieces up; one that is not in the vocabulary is a `UserError` that names it."""
        try:
            return [self.vocab[token] for token in tokens]
        except KeyError as error:
            raise UserError(
                f"{error.args[0]!r}: not in the vocabulary of {len(self)} word pieces; expected "
                "text that was tokenized with this vocabulary"
            ) from None

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]:
        """Look ids up; one outside the vocabulary is a `UserError` that names it."""
        ids = [int(index) for index in ids]
        wrong = [index for index in ids if not 0 <= index < len(self._pieces)]
        if wrong:
            raise UserError(f"id {wrong[0]}: expected an id from 0 to {len(self) - 1}")
        return [self._pieces[index] for index in ids]

    def save_vocabulary(self, directory: Path | str) -> None:
        """Write `vocab.txt` and `tokenizer_config.json`, as Hugging Face has them."""
        directory = Path(directory)
        write_text(directory / VOCAB_NAME, "".join(f"{piece}\n" for piece in self.vocab))
        write_json(
            directory / TOKENIZER_CONFIG_NAME,
            {
                "tokenizer_class": "BertTokenizer",
                "do_lower_case": self.do_lower_case,
                "unk_token": UNK,
                "sep_token": SEP,
                "pad_token": PAD,
                "cls_token": CLS,
                "mask_token": MASK,
            },
        )

"""What the files of a BERT tokenizer say: its vocabulary, its settings, its added tokens.

Hugging Face's library writes `tokenizer.json` (the vocabulary and every setting), up to version 4
`vocab.txt` as well, and beside them `tokenizer_config.json`, `special_tokens_map.json` and
`added_tokens.json`. What they say is obeyed, or refused by its name.
"""

import logging
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.trainers import WordPieceTrainer

from transformer.file_utils import (
    TOKENIZER_CONFIG_NAME,
    VOCAB_NAME,
    UserError,
    read_json,
    text_lines,
)

logger = logging.getLogger(__name__)

UNK, SEP, PAD, CLS, MASK = SPECIAL_TOKENS = ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")
MAX_CHARACTERS_PER_WORD = 100
FAST_TOKENIZER_NAME = "tokenizer.json"
SPECIAL_TOKENS_NAME = "special_tokens_map.json"
ADDED_TOKENS_NAME = "added_tokens.json"

CLASSES = ["BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "PreTrainedTokenizer"]
# The values that settings may have where others are not supported; None: not given.
ONLY = {
    "tokenizer_class": [*CLASSES, *(f"{name}Fast" for name in CLASSES), "TokenizersBackend"],
    "do_basic_tokenize": [True], "never_split": [[]], "truncation_side": ["right"],
    "split_special_tokens": [False], "padding_side": ["right"],
    "truncation.direction": ["Right"], "padding.direction": ["Right"],
    "unk_token": [UNK], "sep_token": [SEP], "pad_token": [PAD], "cls_token": [CLS],
    "mask_token": [MASK],
    "model.type": ["WordPiece"], "model.unk_token": [UNK],
    "model.continuing_subword_prefix": ["##"],
    "model.max_input_chars_per_word": [MAX_CHARACTERS_PER_WORD],
    "normalizer.type": ["BertNormalizer"], "normalizer.clean_text": [True],
    "pre_tokenizer.type": ["BertPreTokenizer"],
}
# What is obeyed, under its names in tokenizer_config.json and in tokenizer.json.
OBEYED = {
    "do_lower_case": "do_lower_case", "normalizer.lowercase": "do_lower_case",
    "strip_accents": "strip_accents", "normalizer.strip_accents": "strip_accents",
    "tokenize_chinese_chars": "tokenize_chinese_chars",
    "normalizer.handle_chinese_chars": "tokenize_chinese_chars",
}
BLANK = "\u2028"  # stands for a piece of white space
BRACKETS = (("[", "]"), ("<", ">"))
ADDED_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class TokenizerFiles(NamedTuple):
    """A tokenizer as its files describe it.

    vocab: ids from 0 by word piece, in their order
    settings: those of `OBEYED` that some file gives
    added_tokens: what is found in a text before anything else, by id; not BERT's five
    """

    vocab: dict[str, int]
    settings: dict[str, bool]
    added_tokens: dict[int, AddedToken]


def check_vocab(pieces: list[str], source: Path | str) -> dict[str, int]:
    """Return the ids of word pieces, which must differ and hold BERT's five special tokens."""
    vocab = dict(zip(pieces, range(len(pieces)), strict=True))
    for line, piece in enumerate(pieces, start=1):
        if not piece:  # white space of Unicode, such as U+2028, is a piece
            raise UserError(f"{source}: line {line} is blank; expected one word piece a line")
        if vocab[piece] != line - 1:
            raise UserError(f"{source}: lines {line} and {vocab[piece] + 1} are both {piece!r};"
                            " expected each word piece once")
    missing = [token for token in SPECIAL_TOKENS if token not in vocab]
    if missing:
        raise UserError(f"{source}: lacks {', '.join(missing)}; expected a BERT vocabulary")
    return vocab


def load_vocab(vocab_file: Path | str) -> dict[str, int]:
    """Read one word piece a line; the line's number, from 0, is its id.

    A missing file, a blank line inside the file, a piece that appears twice and a file without
    one of the five special tokens are `UserError`s.
    """
    vocab_file = Path(vocab_file)
    if not vocab_file.is_file():
        raise UserError(f"{vocab_file}: no such file; expected a vocabulary, one word piece a line")
    lines = [line for _, line in text_lines(vocab_file)]
    if lines:
        lines[0] = lines[0].removeprefix("\ufeff")
    return check_vocab([line.removesuffix("\n").rstrip("\r") for line in lines], vocab_file)


def read_tokenizer(model_dir: Path | str) -> TokenizerFiles:
    """Read the tokenizer of a model directory (or of the one that holds this vocabulary file).

    Raises:
        UserError: no vocabulary, two that differ, a setting that is not supported or that two
            files contradict each other about, or special tokens placed otherwise than by BERT.
    """
    path = Path(model_dir)
    vocab_file, folder = (path, path.parent) if path.is_file() else (path / VOCAB_NAME, path)
    file = folder / FAST_TOKENIZER_NAME
    fast = read_json(file) if file.is_file() else None
    vocab = load_vocab(vocab_file) if vocab_file.is_file() or fast is None else None
    settings = _settings(folder, fast)
    if fast is not None:
        ids = fast["model"].get("vocab")
        if not isinstance(ids, dict) or [*range(len(ids))] != sorted(
                index for index in ids.values() if isinstance(index, int)):
            raise UserError(f"{file}: expected word pieces with the ids 0, 1, ... in model.vocab")
        # Hugging Face's library trims pieces of white space to nothing; no text ever has them.
        pieces = [piece.rstrip() or BLANK for piece in sorted(ids, key=ids.get)]
        vocab = vocab or check_vocab(pieces, file)
        if [piece.rstrip() or BLANK for piece in vocab] != pieces:
            raise UserError(f"{vocab_file} and {file} hold different vocabularies; expected the"
                            " same word pieces, or one file only")
        _check_frame(file, vocab)
    try:
        return TokenizerFiles(vocab, settings, _added_tokens(folder, fast))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: its added tokens cannot be read ({error!r}); expected them as"
                        " Hugging Face's library writes them") from error


def has_capitals(pieces: Iterable[str]) -> bool:
    """Whether a word piece has a capital letter; `[unused1]`, `<S>` and the like do not count."""
    return any(piece != piece.lower() and (piece[:1], piece[-1:]) not in BRACKETS
               for piece in pieces)


def _has_accents(pieces: Iterable[str]) -> bool:
    """Whether a word piece changes where accents are stripped: \u00e9, but also Hangul and kana."""
    return any(
        unicodedata.normalize("NFD", piece) != piece or "Mn" in map(unicodedata.category, piece)
        for piece in pieces)


def mend_case(files: TokenizerFiles, model_dir: Path | str | None) -> TokenizerFiles:
    """Lower-case text although the files say not to, where word pieces have small letters only.

    The hub's bert-base-chinese is published like that, and was trained on lower-cased text. As
    there, accents are stripped with the case, unless a piece has some. Only words that are `[UNK]`
    by what the files say get other word pieces. A folder that is given is named in the log.
    """
    pieces = [*files.vocab, *(token.content for token in files.added_tokens.values())]
    if (files.settings.get("do_lower_case") is not False or has_capitals(pieces)
            or not any(map(str.islower, pieces))):
        return files
    settings = {**files.settings, "do_lower_case": True}
    if settings.get("strip_accents") is None and _has_accents(pieces):
        settings["strip_accents"] = False
    if model_dir is not None:
        logger.warning(
            "%s: do_lower_case is false, but no word piece has a capital letter, so that words with"
            " capitals would be [UNK]: text is lower-cased, accents are %s", model_dir,
            "kept" if settings.get("strip_accents") is False else "stripped")
    return files._replace(settings=settings)


def _said(folder: Path, fast: dict[str, Any] | None) -> Iterator[tuple[Path, str, Any]]:
    """Yield file, name and value of what the files say."""
    for name in (TOKENIZER_CONFIG_NAME, SPECIAL_TOKENS_NAME):
        if (folder / name).is_file():
            for key, value in read_json(folder / name).items():
                yield folder / name, key, value
    parts = ("model", "normalizer", "pre_tokenizer", "truncation", "padding")
    for part in () if fast is None else parts:
        values = fast.get(part)
        if values is None and part in parts[3:]:  # not asked for
            continue
        if not isinstance(values, dict):
            raise UserError(f"{folder / FAST_TOKENIZER_NAME}: {part} is {values!r}; expected that"
                            " of BERT")
        for key, value in values.items():
            yield folder / FAST_TOKENIZER_NAME, f"{part}.{key}", value


def _settings(folder: Path, fast: dict[str, Any] | None) -> dict[str, bool]:
    """Return the settings that are obeyed, after all others were found to be BERT's."""
    settings: dict[str, bool] = {}
    said = [*_said(folder, fast)]
    distil = any(name == "tokenizer_class" and "DistilBert" in str(value)
                 for _, name, value in said)
    for file, name, value in said:
        if isinstance(value, dict) and "content" in value:  # a token with its flags
            value = value["content"]
        if name in ONLY and value is not None and value not in ONLY[name]:
            raise UserError(f"{file}: {name} is {value!r}; expected {ONLY[name][0]!r}")
        if name == "model_input_names" and "token_type_ids" not in value and not distil:
            raise UserError(f"{file}: {name} has no token_type_ids; expected a BERT's, which tell"
                            " the two texts of a pair apart")
        is_default = value is None and name == "strip_accents"  # as for its reader: by the case
        if name not in OBEYED or (value is None and not is_default):
            continue
        if not isinstance(value, bool) and not is_default:
            raise UserError(f"{file}: {name} is {value!r}; expected true or false")
        if settings.setdefault(OBEYED[name], value) != value:
            raise UserError(f"{file}: {name} is {value}, and another file of the folder says the"
                            " contrary; expected the same in all")
    return settings


def _check_frame(file: Path, vocab: dict[str, int]) -> None:
    """Raise a `UserError` unless a text and a pair are framed as BERT's are."""
    try:
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_padding()
        pair = tokenizer.encode("", "")
    except Exception as error:  # of the library, which raises no other class
        raise UserError(f"{file}: not a tokenizer ({error})") from error
    frame = [vocab[CLS], vocab[SEP], vocab[SEP]]
    if (pair.ids, pair.type_ids) != (frame, [0, 0, 1]):
        raise UserError(f"{file}: its post_processor frames two empty texts as {pair.tokens} in"
                        f" segments {pair.type_ids}; expected [CLS] [SEP] [SEP] in 0, 0, 1")


def _added_tokens(folder: Path, fast: dict[str, Any] | None) -> dict[int, AddedToken]:
    """Return the tokens that were added to a tokenizer, by id, in their order."""
    config = {}
    if (folder / TOKENIZER_CONFIG_NAME).is_file():
        config = read_json(folder / TOKENIZER_CONFIG_NAME).get("added_tokens_decoder") or {}
    described = {int(index): value for index, value in config.items()}
    if fast is not None:
        described |= {value["id"]: value for value in fast.get("added_tokens") or ()}
    tokens = {index: AddedToken(value["content"], **{
        flag: value[flag] for flag in ADDED_TOKEN_FLAGS if flag in value})
        for index, value in sorted(described.items()) if value["content"] not in SPECIAL_TOKENS}
    known = {*SPECIAL_TOKENS, *(token.content for token in tokens.values())}
    for token in _named_tokens(folder):
        if token not in known:
            raise UserError(f"{folder}: the token {token!r} was added, but {FAST_TOKENIZER_NAME}"
                            " does not say how it is found in a text; expected it there (save the"
                            " tokenizer with Hugging Face's library once more)")
    return tokens


def _named_tokens(folder: Path) -> Iterator[str]:
    """Yield the added tokens that are named only."""
    if (folder / ADDED_TOKENS_NAME).is_file():
        yield from read_json(folder / ADDED_TOKENS_NAME)
    for name in (TOKENIZER_CONFIG_NAME, SPECIAL_TOKENS_NAME):
        if (folder / name).is_file():
            for key in ("additional_special_tokens", "extra_special_tokens"):
                tokens = read_json(folder / name).get(key) or ()
                for token in tokens.values() if isinstance(tokens, dict) else tokens:
                    yield token["content"] if isinstance(token, dict) else token


def train_vocabulary(lines: Sequence[str], size: int) -> list[str]:
    """Train a lower-case WordPiece vocabulary of at most `size` pieces on lines of text.

    It holds the special tokens, then the text's characters, the most frequent where not all fit,
    then pieces of words. Characters that BERT spaces out (Chinese) make no longer pieces.
    """
    tokenizer = Tokenizer(WordPiece(unk_token=UNK))
    normalizer = tokenizer.normalizer = BertNormalizer(lowercase=True)
    splitter = tokenizer.pre_tokenizer = BertPreTokenizer()
    counts = Counter(chain.from_iterable(line.lower() for line in lines))
    letters, pieces, room = [], [], size - len(SPECIAL_TOKENS)
    for letter in sorted(counts, key=lambda letter: (-counts[letter], letter)):
        text = normalizer.normalize_str(f"a{letter}a")
        words = splitter.pre_tokenize_str(text)  # 1: it may stand inside a word; 2: white space
        continues = len(words) == 1
        if text != "aa" and len(words) != 2 and 1 + continues <= room:
            letters.append(letter)
            pieces += [f"##{letter}"] * continues
            room -= 1 + continues
    # Named in advance, the continuing letters get the same ids in every run; the trainer would
    # number them in the order of a randomly seeded hash map, and ties follow those numbers.
    trainer = WordPieceTrainer(
        vocab_size=size, min_frequency=2, initial_alphabet=sorted(letters), show_progress=False,
        limit_alphabet=len(letters),
        special_tokens=[PAD, UNK, CLS, SEP, MASK, *sorted(letters), *sorted(pieces)])
    tokenizer.train_from_iterator(lines, trainer)
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)

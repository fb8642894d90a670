"""What the files of a tokenizer say: its vocabulary, its settings, its added tokens.

Hugging Face's library writes `tokenizer.json` (the vocabulary and every setting), up to version 4
`vocab.txt` as well, and beside them `tokenizer_config.json`, `special_tokens_map.json` and
`added_tokens.json`. Of a BERT's, what they say is obeyed, or refused by its name; any other one is
what its `tokenizer.json` says.
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
    CONFIG_NAME,
    TOKENIZER_CONFIG_NAME,
    VOCAB_NAME,
    UserError,
    read_json,
    text_lines,
)

logger = logging.getLogger(__name__)

UNK, SEP, PAD, CLS, MASK = SPECIAL_TOKENS = ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")
MAX_CHARACTERS_PER_WORD = 100
INPUT_NAMES = ["input_ids", "token_type_ids", "attention_mask"]
FAST_TOKENIZER_NAME = "tokenizer.json"
SPECIAL_TOKENS_NAME = "special_tokens_map.json"
ADDED_TOKENS_NAME = "added_tokens.json"

BERT_CLASSES = ["BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer"]
CLASSES = [*BERT_CLASSES, "PreTrainedTokenizer"]
NO_SEGMENTS = ("Roberta", "Camembert", "DistilBert")  # in the names of classes
# The values that settings may have where others are not supported; None: not given.
ONLY_ANY = {
    "truncation_side": ["right"], "split_special_tokens": [False], "padding_side": ["right"],
    "truncation.direction": ["Right"], "padding.direction": ["Right"],
}
ONLY_BERT = {
    "tokenizer_class": [*CLASSES, *(f"{name}Fast" for name in CLASSES), "TokenizersBackend"],
    "do_basic_tokenize": [True], "never_split": [[]],
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
OPTIONAL_PARTS = ("truncation", "padding")  # of tokenizer.json
PARTS = ("model", "normalizer", "pre_tokenizer", *OPTIONAL_PARTS)
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
    return TokenizerFiles(vocab, settings, read_added_tokens(folder, fast))


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


def is_berts(model_dir: Path) -> bool:
    """Say whether `BertTokenizer` reads a folder's tokenizer; if not, its tokenizer.json says all.

    It does where there is no tokenizer.json, where that is a BERT's, and where another file says
    so: then what differs is refused, as Hugging Face's library ignores it.
    """
    file = model_dir / FAST_TOKENIZER_NAME
    if not file.is_file():
        return True
    fast, name = read_json(file), tokenizer_class(model_dir).removesuffix("Fast")
    model = fast.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict) or "merges" in model:
        return False
    return name in BERT_CLASSES or (
        vocab.keys() >= {*SPECIAL_TOKENS}
        and not any(_is_refused(setting, value, ONLY_BERT)
                    for _, setting, value in _said(model_dir, fast)))


def tokenizer_class(model_dir: Path) -> str:
    """Return the tokenizer's class in Hugging Face's library, "" where no file names it."""
    file = model_dir / TOKENIZER_CONFIG_NAME
    return str(file.is_file() and read_json(file).get("tokenizer_class") or "")


def has_segments(model_dir: Path | str, default: bool = True) -> bool:
    """Say whether a folder's model is told the two texts of a pair apart (`token_type_ids`)."""
    model_dir = Path(model_dir)
    model_dir = model_dir.parent if model_dir.is_file() else model_dir
    config, file = model_dir / CONFIG_NAME, model_dir / TOKENIZER_CONFIG_NAME
    values = read_json(config) if config.is_file() else {}
    if values.get("model_type") == "distilbert" or values.get("type_vocab_size") in (0, 1):
        return False
    names = read_json(file).get("model_input_names") if file.is_file() else None
    if names is not None:
        return "token_type_ids" in names
    return default and not any(kind in tokenizer_class(model_dir) for kind in NO_SEGMENTS)


def input_names(segments: bool, names: Sequence[str] = INPUT_NAMES) -> list[str]:
    """Return the inputs that Hugging Face's library is to make, as `has_segments` reads them."""
    return [name for name in names if segments or name != "token_type_ids"]


def _said(folder: Path, fast: dict[str, Any] | None) -> Iterator[tuple[Path, str, Any]]:
    """Yield file, name and value of what the files say; a part that is none has its own name."""
    for name in (SPECIAL_TOKENS_NAME, TOKENIZER_CONFIG_NAME):
        if (folder / name).is_file():
            for key, value in read_json(folder / name).items():
                yield folder / name, key, value
    for part in PARTS if fast is not None else ():
        values = fast.get(part)
        if isinstance(values, dict):
            for key, value in values.items():
                yield folder / FAST_TOKENIZER_NAME, f"{part}.{key}", value
        elif values is not None or part not in OPTIONAL_PARTS:
            yield folder / FAST_TOKENIZER_NAME, part, values


def _is_refused(name: str, value: Any, only: dict[str, list[Any]]) -> bool:
    if name in PARTS:
        return only is ONLY_BERT
    return name in only and value is not None and _content(value) not in only[name]


def _content(value: Any) -> Any:
    """Return a value, of a token with its flags the token."""
    return value.get("content", value) if isinstance(value, dict) else value


def check_settings(folder: Path, fast: dict[str, Any] | None, only: dict[str, list[Any]]) -> None:
    """Raise a `UserError` for a setting of another value than the `only` ones."""
    for file, name, value in _said(folder, fast):
        if _is_refused(name, value, only):
            expected = "that of BERT" if name in PARTS else repr(only[name][0])
            raise UserError(f"{file}: {name} is {_content(value)!r}; expected {expected}")


def _settings(folder: Path, fast: dict[str, Any] | None) -> dict[str, bool]:
    """Return the settings that are obeyed, after all others were found to be BERT's."""
    check_settings(folder, fast, ONLY_ANY)
    check_settings(folder, fast, ONLY_BERT)
    settings: dict[str, bool] = {}
    for file, name, value in _said(folder, fast):
        is_default = value is None and name == "strip_accents"  # as for its reader: by the case
        if name not in OBEYED or (value is None and not is_default):
            continue
        if not isinstance(value, bool) and not is_default:
            raise UserError(f"{file}: {name} is {value!r}; expected true or false")
        if settings.setdefault(OBEYED[name], value) != value:
            raise UserError(f"{file}: {name} is {value}, and another file of the folder says the"
                            " contrary; expected the same in all")
    return settings


def check_prefix_space(folder: Path, fast: dict[str, Any]) -> None:
    """Raise a `UserError` where two files contradict each other about a text's first space.

    Then one version of Hugging Face's library obeys the one, another the other.
    """
    file = folder / TOKENIZER_CONFIG_NAME
    said = read_json(file).get("add_prefix_space") if file.is_file() else None
    splitter = fast.get("pre_tokenizer") or {}
    for part in splitter.get("pretokenizers") or [splitter]:
        if said is not None and part.get("add_prefix_space", said) != said:
            raise UserError(f"{file}: add_prefix_space is {said}, and {FAST_TOKENIZER_NAME} says"
                            " the contrary; expected the same in both")


def named_tokens(folder: Path) -> dict[str, AddedToken]:
    """Return the special tokens that are named by their role, such as `cls_token`."""
    return {name: _as_token(value) for _, name, value in _said(folder, None)
            if name.endswith("_token") and isinstance(value, str | dict) and value}


def _as_token(value: str | dict[str, Any]) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    return AddedToken(value["content"], **{flag: value[flag] for flag in ADDED_TOKEN_FLAGS
                                           if flag in value})


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


def read_added_tokens(folder: Path, fast: dict[str, Any] | None) -> dict[int, AddedToken]:
    """Return the tokens that were added to a tokenizer, by id, in their order; not BERT's five."""
    try:
        config = {}
        if (folder / TOKENIZER_CONFIG_NAME).is_file():
            config = read_json(folder / TOKENIZER_CONFIG_NAME).get("added_tokens_decoder") or {}
        described = {int(index): value for index, value in config.items()}
        if fast is not None:
            described |= {value["id"]: value for value in fast.get("added_tokens") or ()}
        tokens = {index: _as_token(value) for index, value in sorted(described.items())
                  if value["content"] not in SPECIAL_TOKENS}
        named = [*_named_tokens(folder)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: its added tokens cannot be read ({error!r}); expected them as"
                        " Hugging Face's library writes them") from error
    known = {*SPECIAL_TOKENS, *(token.content for token in tokens.values())}
    for token in named:
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
                    yield _content(token)


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

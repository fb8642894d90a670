"""Any tokenizer that a `tokenizer.json` describes: byte-level BPE, Unigram, other WordPiece.

The file is the library's own and says all; beside it stand the names of the special tokens. How
a text and a pair are framed is found by a probe.
"""

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer

from transformer.file_utils import (
    TOKENIZER_CONFIG_NAME,
    UserError,
    atomic_path,
    read_json,
    write_json,
)
from transformer.tokenizer_files import (
    ADDED_TOKENS_NAME,
    FAST_TOKENIZER_NAME,
    INPUT_NAMES,
    ONLY_ANY,
    SPECIAL_TOKENS_NAME,
    check_prefix_space,
    check_settings,
    has_segments,
    input_names,
    named_tokens,
    read_added_tokens,
)

FILES = (FAST_TOKENIZER_NAME, TOKENIZER_CONFIG_NAME, SPECIAL_TOKENS_NAME, ADDED_TOKENS_NAME)
NONE = -1  # the id of a token that there is not
# What tokens are called where no file says it.
USUAL = {"pad": ("<pad>", "[PAD]"), "unk": ("<unk>", "[UNK]"), "mask": ("<mask>", "[MASK]")}
# The class of Hugging Face's library that does what tokenizer.json says.
GENERAL_CLASS = "PreTrainedTokenizerFast"
PROBE = "a"
TEXTS_AT_ONCE = 4096


class Frame(NamedTuple):
    """The special tokens around texts: [CLS] a [SEP], and [CLS] a [SEP]... b [SEP].

    separators: how many stand between the texts of a pair
    segments: whether the second text's `token_type_ids` are 1
    """

    cls_id: int
    sep_id: int
    separators: int
    segments: bool


class FileTokenizer:
    """Text to ids as the `tokenizer.json` of a model directory says; `BertTokenizer` for any model.

    `vocab` maps pieces, added tokens included, to ids in id order. The id of a special token that
    there is not is -1.

    separators, segments: see `Frame`; the folder's other files may say that there are no segments
    fingerprint: SHA-256 of `tokenizer.json`

    Raises:
        UserError: no tokenizer, one that frames texts otherwise than an encoder's, or one that
            pads or cuts on the left.
    """

    def __init__(self, model_dir: Path | str):
        folder = Path(model_dir)
        self.file = folder / FAST_TOKENIZER_NAME
        self.files = {name: (folder / name).read_bytes() for name in FILES
                      if (folder / name).is_file()}
        content = read_json(self.file)
        check_settings(folder, content, ONLY_ANY)
        try:
            self._fast = Tokenizer.from_buffer(self.files[FAST_TOKENIZER_NAME])
        except Exception as error:  # of the library, which raises no other class
            raise UserError(f"{self.file}: not a tokenizer ({error})") from error
        check_prefix_space(folder, content)
        self._fast.no_padding()
        self._fast.no_truncation()
        self.fingerprint = hashlib.sha256(self.files[FAST_TOKENIZER_NAME]).hexdigest()
        self.cls_id, self.sep_id, self.separators, by_frame = self._probe()
        self.segments = has_segments(folder, by_frame)
        names = named_tokens(folder)
        self.pad_id, self.unk_id, self.mask_id = self._find_tokens(folder, content, names)
        self._add_tokens(read_added_tokens(folder, content), names.values())
        vocab = self._fast.get_vocab()
        self.vocab = {piece: vocab[piece] for piece in sorted(vocab, key=vocab.__getitem__)}

    def _probe(self) -> Frame:
        """Find how a text and a pair are framed."""
        one, two = self._fast.encode(PROBE), self._fast.encode(PROBE, PROBE)
        special = [index for index, text in zip(two.ids, two.sequence_ids, strict=True)
                   if text is None]
        text = [index for index, number in zip(one.ids, one.sequence_ids, strict=True)
                if number is not None]
        if len(special) > 2:
            cls_id, *separators, sep_id = special
            first, second = [cls_id, *text, *separators], [*text, sep_id]
            segments = [0] * len(first) + [1] * len(second)
            if (one.ids == [cls_id, *text, sep_id] and two.ids == [*first, *second]
                    and {*separators} == {sep_id} and two.type_ids in (segments, [0] * len(two))):
                return Frame(cls_id, sep_id, len(separators), two.type_ids == segments)
        raise UserError(f"{self.file}: its post_processor frames two texts {PROBE!r} as"
                        f" {two.tokens} in segments {two.type_ids}; expected an encoder's, such as"
                        " [CLS] a [SEP] a [SEP]")

    def _find_tokens(
        self, folder: Path, content: dict[str, Any], names: dict[str, AddedToken]
    ) -> list[int]:
        """Return the ids of padding, unknown and mask, from the first place that names them."""
        model, padding = content["model"], content.get("padding") or {}
        unknown, index = model.get("unk_token"), model.get("unk_id")
        if isinstance(index, int):  # Unigram's
            unknown = model["vocab"][index][0]
        named = {role: getattr(names.get(f"{role}_token"), "content", None) for role in USUAL}
        candidates = {"pad": [named["pad"], padding.get("pad_token")],
                      "unk": [unknown, named["unk"]], "mask": [named["mask"]]}
        found = []
        for role, usual in USUAL.items():
            ids = map(self._fast.token_to_id, filter(None, [*candidates[role], *usual]))
            found.append(next((index for index in ids if index is not None), NONE))
        if found[0] == NONE:
            raise UserError(f"{self.file}: no token for padding; expected a pad_token in"
                            f" {folder / TOKENIZER_CONFIG_NAME}")
        return found

    def _add_tokens(self, added: Mapping[int, AddedToken], named: Iterable[AddedToken]) -> None:
        """Have the tokens that other files name found in texts, too, as Hugging Face's library."""
        roles = [AddedToken(token, special=True, normalized=False)
                 for token in self._roles().values()]
        known = {each.content for each in self._fast.get_added_tokens_decoder().values()}
        for index, token in [*added.items(), *((None, token) for token in (*named, *roles))]:
            own = self._fast.token_to_id(token.content)
            if token.content not in known and (own, index) != (None, None):
                add = self._fast.add_special_tokens if token.special else self._fast.add_tokens
                add([token])
                known.add(token.content)
                own = self._fast.token_to_id(token.content)
            if index not in (None, own):
                raise UserError(f"{self.file}: the added token {token.content!r} has id {own};"
                                f" expected {index}, as {TOKENIZER_CONFIG_NAME} says")

    def _roles(self) -> dict[str, str]:
        """Return the special tokens that there are, by the names of Hugging Face's settings."""
        ids = {"cls": self.cls_id, "sep": self.sep_id, "pad": self.pad_id, "unk": self.unk_id,
               "mask": self.mask_id}
        return {f"{role}_token": self._fast.id_to_token(index) for role, index in ids.items()
                if index != NONE}

    @property
    def settings(self) -> dict[str, Any]:
        """All but the vocabulary that ids depend on."""
        added = self._fast.get_added_tokens_decoder()
        return {FAST_TOKENIZER_NAME: self.fingerprint,
                "added_tokens": {index: repr(added[index]) for index in sorted(added)}}

    @property
    def do_lower_case(self) -> bool:
        """Whether text is lower-cased."""
        normalizer = self._fast.normalizer
        return normalizer is not None and normalizer.normalize_str("A") == "a"

    def __len__(self) -> int:
        return 1 + max(self.vocab.values())

    def tokenize(self, text: str) -> list[str]:
        """Split one text into pieces, as the vocabulary spells them."""
        return self._fast.encode(text, add_special_tokens=False).tokens

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]:
        """Look ids of the vocabulary up."""
        return [self._fast.id_to_token(index) for index in ids]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens and without truncation."""
        return [each.ids for each in self._fast.encode_batch_fast(
            list(texts), add_special_tokens=False)]

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of one text and the character span of each in the text."""
        encoding = self._fast.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def encode_flat(self, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of `encode_batch` as one flat array [pieces], and each text's length.

        Both are int32.
        """
        ids, lengths, texts = array("i"), array("i"), iter(texts)
        while block := list(islice(texts, TEXTS_AT_ONCE)):
            for each in self.encode_batch(block):
                ids.extend(each)
                lengths.append(len(each))
        return np.array(ids, np.int32), np.array(lengths, np.int32)

    def encode_lines(self, block: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Tokenize UTF-8 text, one text a line, without the white space around it.

        Raises:
            UnicodeDecodeError: the text is not UTF-8.
        """
        return self.encode_flat(line.strip() for line in block.decode().split("\n"))

    def save_vocabulary(
        self, directory: Path | str, model_max_length: int | None = None, segments: bool = True
    ) -> None:
        """Write the files as they were read, for a model of this length, with or without segments.

        `tokenizer_config.json` is completed by what decides how Hugging Face's library reads them:
        its class, its inputs, the names of special tokens, the longest input with those.
        """
        for name, content in self.files.items():
            with atomic_path(Path(directory) / name) as temporary:
                temporary.write_bytes(content)
        file = Path(directory) / TOKENIZER_CONFIG_NAME
        said = read_json(file) if file.is_file() else {}
        complete = {**said, "model_input_names": input_names(
            self.segments and segments, said.get("model_input_names") or INPUT_NAMES)}
        for name, value in {"tokenizer_class": GENERAL_CLASS, **self._roles()}.items():
            complete.setdefault(name, value)
        limit = said.get("model_max_length")
        if model_max_length is not None and not (
                isinstance(limit, int | float) and limit <= model_max_length):
            complete["model_max_length"] = model_max_length
        if complete != said:
            write_json(file, complete)

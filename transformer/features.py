"""Text turned into model input: flat arrays of word pieces, encoded once and kept on disk."""

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from transformer import distributed
from transformer.file_utils import UserError, atomic_path, cache_root, file_sha256
from transformer.piece_tables import flat_indices
from transformer.tasks import Example, Task, get_task, iterate_examples, split_paths
from transformer.tokenization import AnyTokenizer, FileTokenizer, offsets_of, truncate_pair

logger = logging.getLogger(__name__)

ENCODING_CHUNK = 8192  # examples read and handed to the tokenizer at once
UNKNOWN_SHARE_LIMIT = 0.10


@dataclass
class Features:
    """Encoded rows in flat arrays: a million rows take some 50 MB, not gigabytes.

    ids: word pieces of all rows, one after the other, [CLS] and [SEP] included
    offsets: [rows + 1], where each row starts in `ids`
    first_lengths: [rows], how many positions of a row belong to segment 0, the only one of a
        model without segments
    labels: [rows], int64 class numbers or float32 scores
    label_names: the class names by number, () for regression
    """

    ids: np.ndarray
    offsets: np.ndarray
    first_lengths: np.ndarray
    labels: torch.Tensor
    label_names: tuple[str, ...]
    pad_id: int

    def __len__(self) -> int:
        return len(self.first_lengths)

    @cached_property  # it is asked for with every batch
    def lengths(self) -> np.ndarray:
        """Word pieces of each row, [rows]."""
        return np.diff(self.offsets)

    def collate(self, indices: Sequence[int], pad_to: int | None = None) -> dict[str, torch.Tensor]:
        """Make a batch of the rows `indices`, padded to the longest of them or to `pad_to`.

        input_ids, token_type_ids, attention_mask: [batch, length] int64; labels: [batch].
        """
        indices = np.asarray(indices, dtype=np.int64)
        starts = self.offsets[indices]  # [batch]
        lengths = self.offsets[indices + 1] - starts  # [batch]
        longest = int(lengths.max())
        width = longest if pad_to is None else pad_to
        if width < longest:
            raise ValueError(f"cannot pad a row of {longest} positions to {pad_to}")
        positions = np.arange(width)  # [length]
        mask = positions < lengths[:, None]  # [batch, length]
        input_ids = np.full(mask.shape, self.pad_id, dtype=np.int64)
        input_ids[mask] = self.ids[(starts[:, None] + positions)[mask]]
        segments = mask & (positions >= self.first_lengths[indices][:, None])
        return {
            "input_ids": torch.from_numpy(input_ids),
            "token_type_ids": torch.from_numpy(segments.astype(np.int64)),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
            "labels": self.labels[torch.from_numpy(indices)],
        }

    def subset(self, indices: Sequence[int]) -> "Features":
        """Copy the rows `indices`, in that order."""
        indices = np.asarray(indices, dtype=np.int64)
        lengths = self.lengths[indices]
        return Features(
            self.ids[flat_indices(self.offsets[indices], lengths)], offsets_of(lengths),
            self.first_lengths[indices], self.labels[torch.from_numpy(indices)],
            self.label_names, self.pad_id)


def encode_rows(
    examples: Sequence[Example], tokenizer: AnyTokenizer, max_seq_length: int,
    cut: Callable = truncate_pair,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Encode rows: word pieces of all, [CLS] and [SEP] included, row lengths and first lengths."""
    # Each different text is tokenized once: augmented rows repeat the sentence they do not vary.
    texts = dict.fromkeys(text for example in examples for text in example[1:3] if text is not None)
    pieces, text_lengths = tokenizer.encode_flat(texts)
    text_starts = offsets_of(text_lengths)
    index_of = {text: index for index, text in enumerate(texts)}
    a = np.array([index_of[example.text_a] for example in examples])  # [rows]
    b = np.array([index_of.get(example.text_b, -1) for example in examples])  # [rows]
    paired = b >= 0
    separators = paired * tokenizer.separators  # between the two texts
    keep_a, keep_b = cut(
        text_lengths[a], np.where(paired, text_lengths[b], 0), max_seq_length - 2 - separators)

    lengths = keep_a + 2 + keep_b + separators
    offsets = offsets_of(lengths)
    starts = offsets[:-1]
    ids = np.full(
        offsets[-1], tokenizer.sep_id, np.uint16 if len(tokenizer) <= 2**16 else np.int32)
    ids[starts] = tokenizer.cls_id
    ids[flat_indices(starts + 1, keep_a)] = pieces[flat_indices(text_starts[a], keep_a)]
    second = starts + keep_a + 1 + tokenizer.separators
    ids[flat_indices(second, keep_b)] = pieces[flat_indices(text_starts[b], keep_b)]
    first_lengths = second - starts if tokenizer.segments else lengths
    return ids, lengths, first_lengths.astype(np.int32)


def encode_examples(
    examples: Iterable[Example], tokenizer: AnyTokenizer, max_seq_length: int,
    labels: Sequence[str], regression: bool = False, cut: Callable = truncate_pair,
) -> Features:
    """Encode rows as "[CLS] a [SEP]" or "[CLS] a [SEP] b [SEP]" of at most `max_seq_length`.

    Between two texts stand as many [SEP] as the tokenizer's model has had in training.
    `labels` are the class names in the order of the model's outputs (see `label_order`), `cut`
    says how much to keep of two texts (see `truncate_pair`). Warns when more than a tenth of the
    word pieces are unknown: then text and vocabulary do not fit, often because of lower-casing.
    """
    if max_seq_length < (least := 2 + tokenizer.separators):
        raise UserError(f"maximum sequence length {max_seq_length}; expected at least {least}"
                        " positions")
    examples, class_ids = iter(examples), {label: index for index, label in enumerate(labels)}
    dtype = np.float32 if regression else np.int64
    chunks = []
    while chunk := list(islice(examples, ENCODING_CHUNK)):
        targets = [float(example.label) if regression else class_ids[example.label]
                   for example in chunk]
        encoded = encode_rows(chunk, tokenizer, max_seq_length, cut)
        chunks.append((*encoded, np.array(targets, dtype)))
    ids, lengths, first_lengths, targets = map(np.concatenate, zip(*chunks, strict=True))
    features = Features(ids, offsets_of(lengths), first_lengths, torch.from_numpy(targets),
                        () if regression else tuple(labels), tokenizer.pad_id)
    warn_of_unknown_pieces(features, tokenizer)
    return features


def warn_of_unknown_pieces(features: Features, tokenizer: AnyTokenizer) -> None:
    """Warn where more than a tenth of the word pieces, special tokens aside, are unknown."""
    special = 2 * len(features) + int((features.first_lengths < features.lengths).sum())
    share = int((features.ids == tokenizer.unk_id).sum()) / max(1, len(features.ids) - special)
    if share > UNKNOWN_SHARE_LIMIT:
        logger.warning("%.0f %% of the word pieces are [UNK]: the vocabulary does not fit this text"
                       " (do_lower_case is %s; is the model uncased?)",
                       100 * share, tokenizer.do_lower_case)


# ------------------------------------------------------------------ features of a split


def load_features(
    task: str | Task, data_dir: Path | str, split: str, tokenizer: AnyTokenizer,
    max_seq_length: int, labels: Sequence[str], max_rows: int = 0, cache: bool = False,
) -> Features:
    """Read and encode one split, its first `max_rows` rows (0: all).

    The arguments are those of `load_examples` and `encode_examples`, and so are the errors. With
    `cache` the features are read from the user's cache where they were encoded before; under
    torchrun one process of each machine encodes, and the others find what it stored.
    """
    began = time.monotonic()
    task = get_task(task)
    paths = split_paths(task, data_dir, split)
    if split == "aug" and isinstance(tokenizer, FileTokenizer) and not tokenizer.do_lower_case:
        logger.warning("%s: augmented rows are words with spaces between them, in lower case where"
                       " their BERT was; this model keeps the case and has seen few such", paths[0])

    def encode() -> Features:
        examples = iterate_examples(task, data_dir, split, max_rows or None)
        return encode_examples(examples, tokenizer, max_seq_length, labels, task.is_regression)

    if not cache:
        return encode()
    # The name tells all that the features depend on, the rows' bytes and the vocabulary included.
    content = (task, [file_sha256(path) for path in paths], list(tokenizer.vocab),
               tokenizer.settings, tokenizer.segments, max_seq_length, list(labels), max_rows)
    key = hashlib.sha256(repr(content).encode()).hexdigest()
    file = cache_root() / "features" / f"{task.name}-{split}-{key}.npz"
    with distributed.main_first():
        features = cached(file, encode, tokenizer)
    logger.info("%s: %d rows in %.1f s", paths[0], len(features), time.monotonic() - began)
    return features


def cached(path: Path, encode: Callable[[], Features], tokenizer: AnyTokenizer) -> Features:
    """Read features from a file, or encode them and write it; what fails with it is a warning."""
    try:
        with np.load(path, allow_pickle=False) as stored:  # the zip's check sums find damage
            features = Features(
                stored["ids"], stored["offsets"], stored["first_lengths"],
                torch.from_numpy(stored["labels"]), tuple(stored["label_names"].tolist()),
                int(stored["pad_id"]))
        warn_of_unknown_pieces(features, tokenizer)
        return features
    except (FileNotFoundError, NotADirectoryError):
        pass
    except Exception as error:  # whatever is wrong with it, it can be made again
        logger.warning("%s: damaged (%s); the rows are encoded again", path, error)
    features = encode()
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **{item.name: getattr(features, item.name) for item in fields(features)})
    except OSError as error:
        logger.warning("%s: the features are not cached (%s)", path, error)
    return features

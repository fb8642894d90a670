"""Batches of rows of similar length, padded to few lengths."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch

from transformer.file_utils import UserError

MOST_BUCKETS = 8  # padded lengths of one set of rows
BATCH_UNIT = 64  # rows that are shuffled together where batches are larger


class Rows(Protocol):
    """Encoded rows: `Features` or `pretraining_data.PregeneratedDataset`."""

    lengths: np.ndarray  # [rows]

    def collate(self, rows: Sequence[int], pad_to: int | None = None) -> dict[str, torch.Tensor]:
        """Return the rows as tensors [rows, length]."""



def bucket_lengths(
    lengths: Sequence[int] | np.ndarray, multiple: int = 1, most: int = MOST_BUCKETS
) -> np.ndarray:
    """Choose at most `most` padded lengths, ascending, that pad these rows least in total.

    Each row is padded up to the next of them, so the last holds the longest row. All are
    multiples of `multiple`: 8 suits a GPU's matrix units, 1 a CPU. The choice is the best one,
    found by dynamic programming over the histogram of `lengths`.
    """
    rounded = -(-np.asarray(lengths, dtype=np.int64) // multiple)
    counts = np.bincount(rounded)
    used = np.flatnonzero(counts)  # no other length is ever worth a bucket
    widths = used * multiple  # [w]
    rows = np.concatenate([[0], np.cumsum(counts[used])])  # [w + 1], rows below each place
    # Positions of one bucket that takes the widths from `start` up to and with `end`, [w, w].
    places = np.arange(len(widths))
    cost = widths * (rows[1:] - rows[:-1, None]).astype(np.float64)  # exact up to 2**53
    cost[places[:, None] > places] = np.inf
    # Least positions of the widths before each place in as many buckets as were added, [w + 1].
    least = np.concatenate([[0.0], np.full(len(widths), np.inf)])
    starts = []  # for each bucket added: where it starts if it ends at a place, [w]
    for _ in range(min(most, len(widths))):
        totals = least[:-1, None] + cost  # [w, w]
        starts.append(totals.argmin(axis=0))
        least = np.concatenate([[np.inf], totals.min(axis=0)])
    chosen, end = [], len(widths)
    for start in reversed(starts):
        chosen.append(widths[end - 1])
        end = start[end - 1]
    return np.array(chosen[::-1], dtype=np.int64)


def padding_multiple(device: torch.device) -> int:
    """Return of what the padded lengths should be multiples: a GPU's matrix units take 8."""
    return 8 if device.type == "cuda" else 1


def padded_collate(
    data: Rows, multiple: int = 1, pad_to: int | None = None, limit: int | None = None
) -> Callable[[Sequence[int]], dict[str, torch.Tensor]]:
    """Return what makes batches of `data`, padded to one of few lengths, or all to `pad_to`.

    The lengths are those of `bucket_lengths`, so a batch is little longer than its longest row
    and there are at most 8 shapes to compile. `limit` is the longest that the model takes, where
    rounding up to `multiple` could pass it.
    """
    if pad_to is not None:
        return partial(data.collate, pad_to=pad_to)
    lengths = data.lengths
    buckets = bucket_lengths(lengths, multiple)
    if limit is not None:
        # A row that is too long stays so, for the model to complain of.
        buckets = np.minimum(buckets, max(limit, lengths.max()))

    def collate(rows: Sequence[int]) -> dict[str, torch.Tensor]:
        longest = lengths[rows].max()
        return data.collate(rows, pad_to=int(buckets[np.searchsorted(buckets, longest)]))

    return collate


def batches(
    lengths: Sequence[int] | np.ndarray,
    batch_size: int,
    generator: torch.Generator | None = None,
    multiple: int = 1,
    in_units: bool = False,
) -> list[np.ndarray]:
    """Split rows into batches of similar length, so that little is padded; each row once.

    Without `generator` the longest rows come first (evaluation: a batch that does not fit into
    memory fails at once). With it rows are shuffled within each of the `bucket_lengths` (in
    multiples of `multiple`) to which batches are padded, and the batches shuffled as well: the
    same generator state gives the same batches, at most 7 of them with rows of several buckets.
    With `in_units`, a batch of a multiple of BATCH_UNIT rows is made of consecutive units of so
    many, each of similar lengths, and the unit that is not full comes last: students with
    different batch sizes can learn from the same units.
    """
    if batch_size < 1:
        raise UserError(f"batch size {batch_size}; expected at least 1 row")
    lengths = np.asarray(lengths, dtype=np.int64)  # signed: the longest first is by -length
    if generator is None:
        order = np.argsort(-lengths, kind="stable")
    else:
        order = torch.randperm(len(lengths), generator=generator).numpy()
        buckets = bucket_lengths(lengths, multiple)
        # Numbers from the longest bucket down; in one byte they are sorted in linear time.
        numbers = (len(buckets) - np.searchsorted(buckets, lengths)).astype(np.uint8)
        order = order[np.argsort(numbers[order], kind="stable")]
    in_units = in_units and batch_size % BATCH_UNIT == 0
    size = BATCH_UNIT if in_units else batch_size
    groups = [order[begin : begin + size] for begin in range(0, len(order), size)]
    if generator is None:
        return groups
    rest = [groups.pop()] if in_units and groups and len(groups[-1]) < size else []
    groups = [groups[place] for place in
              torch.randperm(len(groups), generator=generator).tolist()] + rest
    units = batch_size // size
    return groups if units == 1 else [
        np.concatenate(groups[begin : begin + units]) for begin in range(0, len(groups), units)]

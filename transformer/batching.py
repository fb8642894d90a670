"""Batches of rows of similar length, padded to few lengths, and made ahead of their use."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch

from transformer.file_utils import UserError

MOST_BUCKETS = 8  # padded lengths of one set of rows
BATCH_UNIT = 64  # rows of similar length; larger batches are made of several such units

Batch = dict[str, torch.Tensor]
Collate = Callable[[Sequence[int]], Batch]  # from row numbers to tensors [rows, length]
# A pass over the data: of each optimizer step the micro-batches, and of each of those the rows.
Pass = tuple[Collate, Sequence[Sequence[Sequence[int]]]]


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
    data: Any, multiple: int = 1, pad_to: int | None = None, limit: int | None = None
) -> Collate:
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

    def collate(rows: Sequence[int]) -> Batch:
        longest = lengths[rows].max()
        return data.collate(rows, pad_to=int(buckets[np.searchsorted(buckets, longest)]))

    return collate


def batches(
    lengths: Sequence[int] | np.ndarray,
    batch_size: int,
    generator: torch.Generator | None = None,
    multiple: int = 1,
    short_last: bool = False,
) -> list[np.ndarray]:
    """Split rows into batches of similar length, so that little is padded; each row once.

    Without `generator` the longest rows come first (evaluation: a batch that does not fit into
    memory fails at once). With it rows are shuffled within each of the `bucket_lengths` (in
    multiples of `multiple`) to which batches are padded, and the batches shuffled as well: the
    same generator state gives the same batches, at most 7 of them with rows of several buckets.
    With `short_last` a batch that is not full stays the last one.
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
    groups = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    if generator is None:
        return groups
    last = [groups.pop()] if short_last and groups and len(groups[-1]) < batch_size else []
    places = torch.randperm(len(groups), generator=generator).tolist()
    return [groups[place] for place in places] + last


def micro_batches(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    """Cut the rows of a batch into micro-batches of `size` rows; the last may be smaller."""
    return [rows[begin : begin + size] for begin in range(0, len(rows), size)]


def pass_generator(seed: int, number: int) -> torch.Generator:
    """Return the generator that shuffles pass `number`; each pass has one of its own."""
    words = np.random.SeedSequence((seed % 2**63, number)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]))


def shuffled_passes(
    collate: Collate, lengths: np.ndarray, batch_size: int, micro_batch_size: int, seed: int,
    multiple: int, first: int,
) -> Iterator[Pass]:
    """Yield the passes over the same rows from pass `first` on."""
    for number in count(first):
        steps = batches(lengths, batch_size, pass_generator(seed, number), multiple)
        yield collate, [micro_batches(rows, micro_batch_size) for rows in steps]


def prefetch(items: Iterator, ahead: int = 8) -> Iterator:
    """Yield the items of an iterator that a thread runs up to `ahead` items in advance.

    An error in the iterator is raised here; leaving early ends the thread.
    """
    ready: queue.Queue = queue.Queue(ahead)
    stopped = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not stopped.is_set():
            try:
                ready.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:  # raised by the reader
            put("error", error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stopped.set()
        thread.join(timeout=1)  # longer only where it is reading an epoch; it ends by itself then

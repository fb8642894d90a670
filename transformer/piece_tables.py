"""Tables from text to the ids of its word pieces, for characters and for chunks of text.

Both rest on one fact: at some places of a text basic tokens always end, so that what stands
between two of them has the same word pieces wherever it is found.
"""

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, chain, islice

import numpy as np

CACHE_BYTES = 64 << 20
CACHE_ENTRY_BYTES = 200  # of an entry beside its text: three Python objects and its ids

IDEOGRAPHS = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF))  # those that Unicode does not decompose
PUNCTUATION = ((0x2010, 0x205E), (0x3001, 0x303D), (0xFE10, 0xFE6B), (0xFF01, 0xFF65))  # not all is
# The bytes with which UTF-8 begins these characters, of three bytes each: 0xE2 to 0xE9, and this.
FIRST_LEAD, LAST_LEAD, OTHER_LEAD = 0xE2, 0xE9, 0xEF
RUN = b"\xfe"  # a byte that UTF-8 never has; it stands for a run of characters taken out of a text

NONE = np.empty(0, np.int32)


def flat_indices(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """List the indices of consecutive slices of a flat array: [sum of lengths]."""
    shifts = starts - (np.cumsum(lengths) - lengths)
    return np.arange(lengths.sum()) + np.repeat(shifts, lengths)


class CharacterTable:
    """Ids of the characters that are basic tokens of their own: ideographs and punctuation.

    Their word piece depends on no neighbour, not even on accents that follow. Only those of three
    bytes in UTF-8 are in the table, and not the few ideographs that Unicode decomposes.

    Args:
        tokenize: splits a text into basic tokens.
        ideographs: whether it splits at ideographs.
    """

    def __init__(self, vocab: Mapping[str, int], unk_id: int,
                 tokenize: Callable[[str], list[str]], ideographs: bool):
        characters = [mark for mark in _characters(PUNCTUATION)
                      if tokenize(f"a{mark}a") == ["a", mark, "a"]]
        if ideographs:
            characters += _characters(IDEOGRAPHS)
        self.ids = np.full(1 << 16, -1, np.int32)  # by code point; -1: not in the table
        self.ids[[*map(ord, characters)]] = [vocab.get(each, unk_id) for each in characters]

    def take_out(self, text: bytes) -> tuple[bytes, np.ndarray, np.ndarray]:
        """Put the chunk `RUN` in the place of each run of these characters of UTF-8 text.

        Returns the text, the ids of all characters [characters], and how many each run has [runs].
        """
        if text.isascii():
            return text, NONE, NONE
        raw = np.frombuffer(text, np.uint8)
        places = np.flatnonzero(
            (raw >= FIRST_LEAD) & (raw <= LAST_LEAD) | (raw == OTHER_LEAD))
        first, second, third = (raw[places + place].astype(np.uint16) for place in range(3))
        ids = self.ids.take(first << 12 | (second & 63) << 6 | third & 63)
        taken = ids >= 0
        places, ids = places[taken], ids[taken]
        starts = np.flatnonzero(np.diff(places, prepend=-4) != 3)
        buffer = raw.copy()
        for place in range(3):
            buffer[places + place] = ord(" ")
        buffer[places[starts] + 1] = ord(RUN)
        return buffer.tobytes(), ids, np.diff(starts, append=len(places))


def _characters(ranges: Iterable[tuple[int, int]]) -> list[str]:
    return [chr(code) for first, last in ranges for code in range(first, last + 1)]


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

    def gather(self, indices: np.ndarray, run_ids: np.ndarray, run_lengths: np.ndarray
               ) -> tuple[np.ndarray, np.ndarray]:
        """Return the word pieces of these chunks, and how many each has [chunks].

        Those of a `RUN` are the next of `run_ids`, as many as the next of `run_lengths`.
        """
        ends = np.frombuffer(self.ends, dtype=np.int64)
        starts = ends[indices]
        counts = ends[indices + 1] - starts
        ids = np.frombuffer(self.ids, dtype=np.int32)[flat_indices(starts, counts)]
        if not len(run_lengths):
            return ids, counts
        is_run = indices == self[RUN]
        counts[is_run] = run_lengths
        in_run = np.repeat(is_run, counts)
        merged = np.empty(len(in_run), np.int32)
        merged[in_run], merged[~in_run] = run_ids, ids
        return merged, counts

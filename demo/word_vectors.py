"""Word vectors from the counts of neighbouring words, which stand for GloVe in the demo."""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.linalg import svds

from transformer.augmentation import WORD, count_words


def cooccurrence_vectors(
    lines: Sequence[str], dimension: int = 50, window: int = 5, min_count: int = 3
) -> tuple[list[str], np.ndarray]:
    """Return (words, vectors [words, dimension]) from positive pointwise mutual information.

    The counts are those of words at most `window` places apart in a sentence, weighted by one
    over the distance as in GloVe; a truncated singular value decomposition shortens them.
    """
    words = [word for word, count in count_words(lines).items() if count >= min_count]
    index = {word: i for i, word in enumerate(words)}
    rows, columns, weights = [], [], []
    for line in lines:
        ids = [index[word] for word in WORD.findall(line.lower()) if word in index]
        for distance in range(1, window + 1):
            for left, right in zip(ids, ids[distance:], strict=False):
                rows += [left, right]
                columns += [right, left]
                weights += [1 / distance] * 2
    counts = coo_matrix((weights, (rows, columns)), shape=(len(words), len(words))).tocsr()
    counts.sum_duplicates()
    frequency = np.asarray(counts.sum(axis=1)).ravel()
    pairs = counts.tocoo()
    information = np.log(pairs.data * frequency.sum() / frequency[pairs.row])
    # Context frequencies are smoothed (power 0.75), which keeps rare words from ruling.
    smooth = frequency**0.75 / (frequency**0.75).sum() * frequency.sum()
    information -= np.log(smooth[pairs.col])
    matrix = coo_matrix((np.maximum(information, 0), (pairs.row, pairs.col)), counts.shape).tocsr()
    start = np.full(len(words), len(words) ** -0.5)  # a fixed start makes the result repeatable
    left, singular, _ = svds(matrix, k=min(dimension, len(words) - 1), v0=start)
    order = np.argsort(-singular)
    vectors = left[:, order] * np.sqrt(singular[order])
    signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])])
    return words, vectors * signs

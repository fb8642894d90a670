"""Writes word vectors in GloVe's text format, made of a BERT's own input embeddings.

For runs that have no GloVe: the vector of a word is the mean of its word pieces' embeddings. The
most frequent words of a corpus come first, as in GloVe's files.

Example:
    python demo/word_vectors.py --bert_model models/bert-base-uncased --corpus data/corpus.txt \
        --output_file data/word_vectors.txt --vocab_size 20000
"""

import argparse
import collections
import logging
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformer.checkpoint import load_state
from transformer.file_utils import UserError, atomic_path
from transformer.runtime import run_script
from transformer.tokenization import BertTokenizer

logger = logging.getLogger(__name__)
WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|[0-9]+|[.,;:!?()]")


def count_words(lines: Iterable[str]) -> dict[str, int]:
    """Count lower-cased words and punctuation marks, the most frequent first (ties by spelling)."""
    counts = collections.Counter(word for line in lines for word in WORD.findall(line.lower()))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def write_vectors(path: Path, words: list[str], vectors: np.ndarray) -> None:
    """Write one line a word: the word and its numbers, separated by spaces.

    Args:
        words: the words, in the order of the file.
        vectors: [words, dimension].
    """
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for word, vector in zip(words, vectors, strict=True):
            file.write(f"{word} {' '.join(f'{number:.4f}' for number in vector)}\n")


def cooccurrence_vectors(
    lines: list[str], dimension: int = 50, window: int = 5, min_count: int = 3
) -> tuple[list[str], np.ndarray]:
    """Return (words, vectors [words, dimension]) from positive pointwise mutual information.

    The counts are those of words at most `window` places apart in a sentence, weighted by one
    over the distance as in GloVe; a truncated singular value decomposition shortens them.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.linalg import svds

    words = [word for word, count in count_words(lines).items() if count >= min_count]
    index = {word: i for i, word in enumerate(words)}
    rows, columns, weights = [], [], []
    for line in lines:
        ids = [index[w] for w in WORD.findall(line.lower()) if w in index]
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


def model_vectors(bert_model: Path, words: list[str]) -> np.ndarray:
    """Return [words, hidden]: the mean of each word's word piece embeddings."""
    state = load_state(bert_model)
    names = [name for name in state if name.endswith("embeddings.word_embeddings.weight")]
    if not names:
        raise UserError(f"{bert_model}: no word embeddings; expected a BERT checkpoint")
    table = state[names[0]].float().numpy()  # [vocabulary, hidden]
    pieces = BertTokenizer.from_pretrained(bert_model).encode_batch(words)
    return np.stack([table[ids].mean(axis=0) for ids in pieces])


def get_args_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--bert_model", type=Path, required=True,
                        help="folder of the BERT whose word embeddings are used")
    parser.add_argument("--corpus", type=Path, required=True, nargs="+",
                        help="text files whose words get a vector")
    parser.add_argument("--output_file", type=Path, required=True,
                        help="file to write, in GloVe's text format")
    parser.add_argument("--vocab_size", type=int, default=20000,
                        help="number of words, the most frequent ones")
    return parser  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Count the corpus's words and write their vectors."""
    lines = [line for path in args.corpus for line in path.read_text("utf-8").split("\n")]
    words = list(count_words(lines))[: args.vocab_size]
    if not words:
        raise UserError(f"{args.corpus[0]}: no words; expected English text")
    vectors = model_vectors(args.bert_model, words)
    write_vectors(args.output_file, words, vectors)
    logger.info("Wrote %d vectors of %d numbers to %s", *vectors.shape, args.output_file)


if __name__ == "__main__":
    run_script(main, get_args_parser())

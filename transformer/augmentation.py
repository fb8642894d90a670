"""Data augmentation: new sentences by replacing words (TinyBERT, arXiv 1909.10351, Algorithm 1).

A word that is one word piece is masked and BERT proposes replacements; a word of several pieces
takes its nearest neighbours among word vectors. Each new sentence then draws, word by word. In
Chinese a single ideograph is what a word of one piece is in English. Where there is no GloVe, word
vectors are composed of a BERT's input embeddings.
"""

import random
import re
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from transformer.file_utils import UserError, atomic_path, text_lines
from transformer.modeling import BertForMaskedLM, BertModel
from transformer.tokenization import BertTokenizer, load_tokenizer
from transformer.words import (
    IDEOGRAPHS,
    Sentence,
    Word,
    english_words,
    frequent_ngrams,
    is_ideographic,
    is_replacement,
    may_vary,
    negates,
)

WORD = re.compile("[a-z]+")
# Words that get a composed vector, of English and of any alphabet.
WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|[0-9]+|[.,;:!?()]")
ANY_LETTERS = re.compile(r"[^\W\d_]+")
ANY_WORD = re.compile(rf"{ANY_LETTERS.pattern}|[0-9]+|[.,;:!?()]")
COMPOSED_WORDS = 20_000
JUDGED_LINES = 10_000  # of a corpus, to tell its language
OTHER_LETTERS_LIMIT = 0.02  # share of an English text's words with letters other than a-z
SAMPLED_BYTES = 50_000_000  # of a corpus, to count n-grams in memory
UNKNOWN_VECTOR = b"<unk> "
VECTOR_BLOCK = 1024  # lines of a vector file parsed at once
SCORE_CELLS = 1 << 25  # cells of one block of similarities: 128 MiB of float32
SCORE_ERROR = 1e-4  # more than float32 can be wrong in a product of vectors of unit length
BATCH_TOKENS = {"cuda": 16384, "cpu": 2048}  # a CPU wants what fits into its caches
BATCH_ROWS = 1024  # one row costs a whole vocabulary of logits


def is_among(word: str, among: str | int) -> bool:
    """Return whether a word is one of those that `Word.among` means."""
    if among == "":
        return True
    if among == "letters":
        return not IDEOGRAPHS.search(word) and not negates(word)
    fits = len(word) == 1 if among == 1 else len(word) > 1 and abs(len(word) - among) <= 1
    return fits and is_ideographic(word) and may_vary(word)


class GloveIndex:
    """Word vectors of unit length and their nearest neighbours by cosine.

    words: the most frequent first
    vectors: [words, dim] float32
    """

    def __init__(self, words: Sequence[str], vectors: np.ndarray):
        self.words = list(words)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        self.vectors = (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)
        self._ids: dict[str, int] = {}
        self._folded_ids: dict[str, int] = {}
        for index, word in enumerate(self.words):
            self._ids.setdefault(word, index)
            self._folded_ids.setdefault(word.lower(), index)
        usable = norms[:, 0] > 0
        first = [
            is_replacement(word) and self._folded_ids[word.lower()] == index
            for index, word in enumerate(self.words)
        ]
        self._usable: dict[tuple[bool, str | int], np.ndarray] = {
            (False, ""): usable, (True, ""): usable & np.array(first)}
        self._cache: dict[tuple[int, bool, str | int], dict[str, list[str]]] = defaultdict(dict)

    def __len__(self) -> int:
        return len(self.words)

    @classmethod
    def load(cls, path: Path | str, vocab_size: int = 100000) -> "GloveIndex":
        """Read the first `vocab_size` vectors of a text file (GloVe's or word2vec's format).

        The last *dim* fields of a line are the vector and all before them is the word, since some
        words of the 840B file contain spaces. A first line "count dim" is skipped, so is `<unk>`.
        A line that does not fit is a `UserError` that names file and line.
        """
        lines = _vector_lines(Path(path), vocab_size)
        words: list[str] = []
        blocks: list[np.ndarray] = []
        dim = None
        while block := list(islice(lines, VECTOR_BLOCK)):
            if dim is None:  # as most lines have it: few words contain spaces
                widths = Counter(line.count(b" ") for _, line in block)
                dim = max(1, widths.most_common(1)[0][0])
            new_words, vectors = _parse_vectors(path, block, dim)
            words.extend(new_words)
            blocks.append(vectors)
        if not blocks:
            raise UserError(f"{path}: no word vectors; expected a word and its numbers on a line")
        if 2 * sum("\ufffd" in word for word in words) > len(words):
            deque(text_lines(path), maxlen=0)  # says what they are in place of UTF-8
        return cls(words, np.concatenate(blocks))

    def nearest(
        self, words: Iterable[str], k: int, words_only: bool = False, among: str | int = ""
    ) -> list[list[str]]:
        """Return the `k` nearest neighbours of each word, the nearest first, without the word.

        A word without a vector has none. `words_only` folds case: a query is found under any
        spelling, and neighbours are words in lower case, each once. `among` is that of a `Word`.
        """
        words = list(words)
        cache = self._cache[k, words_only, among]
        new = {}
        for word in dict.fromkeys(words):
            if word not in cache:
                new[word] = self._find(word, words_only)
        cache.update((word, []) for word, index in new.items() if index is None)
        known = [word for word, index in new.items() if index is not None]
        size = max(1, SCORE_CELLS // len(self))
        for start in range(0, len(known), size):
            block = known[start : start + size]
            indices = [new[word] for word in block]
            scores = self.vectors[indices] @ self.vectors.T  # [block, words]
            scores[:, ~self._among(words_only, among)] = -np.inf
            for word, index, row in zip(block, indices, scores, strict=True):
                cache[word] = self._best(row, index, k, words_only)
        return [list(cache[word]) for word in words]

    def _find(self, word: str, words_only: bool) -> int | None:
        index = self._ids.get(word)
        if index is None and words_only:
            index = self._folded_ids.get(word.lower())
        if index is None or not self._usable[False, ""][index]:
            return None
        return index

    def _among(self, words_only: bool, among: str | int) -> np.ndarray:
        """Return which words may be neighbours [words]."""
        key = (words_only, among)
        if key not in self._usable:
            fitting = np.array([is_among(word, among) for word in self.words])
            self._usable[key] = self._usable[words_only, ""] & fitting
        return self._usable[key]

    def _best(self, scores: np.ndarray, query: int, k: int, words_only: bool) -> list[str]:
        """Return the words of the `k` highest scores; equal ones in the order of the file."""
        scores[query] = -np.inf
        if words_only:
            scores[self._folded_ids[self.words[query].lower()]] = -np.inf
        k = min(k, len(scores))
        limit = np.partition(scores, -k)[-k] - SCORE_ERROR
        near = np.flatnonzero((scores >= limit) & (scores > -np.inf))
        # The last bits of `scores` depend on which queries were multiplied together, and so on
        # where a resumed run began; these do not.
        exact = (self.vectors[near] * self.vectors[query].astype(np.float64)).sum(axis=1)
        best = [self.words[index] for index in near[np.lexsort((near, -exact))][:k]]
        return [word.lower() for word in best] if words_only else best


def _vector_lines(path: Path, vocab_size: int) -> Iterator[tuple[int, bytes]]:
    """Yield the first `vocab_size` (line number, line) of a vector file, without its header."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected word vectors as text, one word a line")
    found = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and line.startswith((b"\x1f\x8b", b"PK", b"BZh")):
                raise UserError(f"{path}: a packed file; expected word vectors as text: unpack it")
            line = line.rstrip(b" \r\n")
            header = number == 1 and re.fullmatch(rb"\d+ \d+", line)
            if header or line.startswith(UNKNOWN_VECTOR):
                continue
            yield number, line
            found += 1
            if found == vocab_size:
                return


def _parse_vectors(
    path: Path | str, lines: Sequence[tuple[int, bytes]], dim: int
) -> tuple[list[str], np.ndarray]:
    """Split lines into words and their vectors [lines, dim]."""
    words, texts = [], []
    for number, line in lines:
        spaces = line.count(b" ")
        if spaces < dim:
            raise UserError(
                f"{path}, line {number}: {spaces + 1} fields; expected a word and {dim} numbers"
            )
        *word, rest = line.split(b" ", spaces - dim + 1)
        words.append(b" ".join(word).decode("utf-8", "replace"))
        texts.append(rest)
    vectors = _parse_numbers(b" ".join(texts))
    if vectors.size != len(lines) * dim:
        for (number, line), rest in zip(lines, texts, strict=True):
            if _parse_numbers(rest).size != dim:
                text = line[:60].decode("utf-8", "replace")
                raise UserError(
                    f"{path}, line {number}: {text!r}; expected {dim} finite numbers after the word"
                )
    return words, vectors.reshape(len(lines), dim)


def _parse_numbers(text: bytes) -> np.ndarray:
    """Return numbers separated by spaces as float32; empty if anything else is among them."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # how older numpy reports bad text
        try:
            numbers = np.fromstring(text, dtype=np.float32, sep=" ")
        except (ValueError, DeprecationWarning):
            return np.empty(0, dtype=np.float32)
    return numbers if np.isfinite(numbers).all() else np.empty(0, dtype=np.float32)


# ------------------------------------------------------------------ composed word vectors


def count_words(lines: Iterable[str]) -> dict[str, int]:
    """Count lower-cased words and punctuation marks, the most frequent first (ties by spelling)."""
    return _by_count(Counter(word for line in lines for word in WORD.findall(line.lower())))


def count_any_words(lines: Iterable[str]) -> dict[str, int]:
    """Count words of any alphabet and what recurs among ideographs, the most frequent first."""
    counts: Counter[str] = Counter()
    runs: list[str] = []
    for line in lines:
        runs += IDEOGRAPHS.findall(line)
        counts.update(ANY_WORD.findall(IDEOGRAPHS.sub(" ", line.lower())))
    return _by_count(counts + Counter(frequent_ngrams(runs)))


def _by_count(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def is_english(lines: Iterable[str]) -> bool:
    """Return whether hardly any word of a text has letters other than a-z."""
    words = [word for line in lines for word in ANY_LETTERS.findall(line)]
    return sum(not word.isascii() for word in words) <= OTHER_LETTERS_LIMIT * len(words)


def write_vectors(path: Path, words: Sequence[str], vectors: np.ndarray) -> None:
    """Write `vectors` [words, dim] in GloVe's text format, one line a word."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for word, vector in zip(words, vectors, strict=True):
            file.write(f"{word} {' '.join(f'{number:.4f}' for number in vector)}\n")


def _lines(files: Iterable[Path], texts: Iterable[str]) -> Iterator[str]:
    for path in files:
        yield from (line for _, line in text_lines(path))
    yield from texts


def corpus_words(files: Sequence[Path], texts: Sequence[str]) -> list[str]:
    """Return the words of text files and texts, the most frequent first.

    English, judged by the first lines, has words of letters a-z. Any other language has words of
    its alphabet and, of ideographs, what recurs as a unit; a large text is read here and there.
    """
    if is_english(islice(_lines(files, texts), JUDGED_LINES)):
        return list(count_words(_lines(files, texts)))
    step = 1 + sum(path.stat().st_size for path in files) // SAMPLED_BYTES
    return list(count_any_words(islice(_lines(files, texts), 0, None, step)))


def compose_vectors(
    model_dir: Path | str, files: Sequence[Path], texts: Sequence[str] = (),
    vocab_size: int = COMPOSED_WORDS,
) -> tuple[list[str], np.ndarray]:
    """Return the most frequent words of files and texts, and their vectors [words, hidden].

    A word's vector is the mean of the input embeddings of its word pieces. A word of ideographs
    that the vocabulary lacks has none.
    """
    tokenizer = load_tokenizer(model_dir)
    words = corpus_words(files, texts)[:vocab_size]
    pieces = dict(zip(words, tokenizer.encode_batch(words), strict=True))
    words = [word for word in words
             if not (is_ideographic(word) and tokenizer.unk_id in pieces[word])]
    if not words:
        place = f"{files[0]}: " if files else ""
        raise UserError(f"{place}no words that occur often enough; expected more text")
    model = BertModel.from_pretrained(model_dir)
    table = model.embeddings.word_embeddings.weight.detach().numpy()  # [vocabulary, hidden]
    return words, np.stack([table[pieces[word]].mean(axis=0) for word in words])


# ------------------------------------------------------------------ Algorithm 1


class Query(NamedTuple):
    """One masked word: which sentence, which part of it, and the model's input for it."""

    sentence: int
    part: int
    among: str | int  # what it may be replaced by: that of its `Word`
    ids: list[int]  # [CLS] masked sentence [SEP] original sentence [SEP]
    first_length: int  # how many of them belong to segment 0
    position: int  # where [MASK] stands


class DataAugmentor:
    """Algorithm 1 of the paper, for many sentences at once.

    model: a BertForMaskedLM with its head; put in eval mode here, used in its own precision
    M: replacements considered for a word; N: new sentences tried for a sentence
    p: the probability that a word is replaced
    seed: the draws of the i-th sentence depend on it and i alone, not on how sentences are batched
    drop_non_words: leave out [UNK], [unused7], punctuation and `##` pieces *before* taking the M
        best, and fold the case of the word vectors; False takes the M best of the whole
        vocabulary and then drops the `##` pieces, as the original does
    batch_tokens: word pieces in one batch of the model; 0 takes what suits the device
    find_words: finds the words that may be varied; None: those of the letters a-z
    next_sentence: the number i of the next sentence, from 0; set it to begin elsewhere
    counts: running totals: `words` that may be varied and those with `no_candidates`; word
        `pieces` and those `unknown`; `ideographs`, and those `in_words` of several
    """

    def __init__(
        self, model: BertForMaskedLM, tokenizer: BertTokenizer, glove: GloveIndex, M: int = 15,
        N: int = 30, p: float = 0.4, seed: int = 42, drop_non_words: bool = True,
        batch_tokens: int = 0, find_words: Callable[[str], Sentence] | None = None,
    ) -> None:
        model.config.check_vocabulary(len(tokenizer), "the tokenizer")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.glove = glove
        self.M, self.N, self.p, self.seed = M, N, p, seed
        self.drop_non_words = drop_non_words
        self.device = next(model.parameters()).device
        self.batch_tokens = batch_tokens or BATCH_TOKENS.get(self.device.type, BATCH_TOKENS["cpu"])
        self.counts: Counter[str] = Counter()
        self._pieces: dict[str, list[int]] = {}
        self._words = list(tokenizer.vocab)
        self._forbidden: dict[str | int, tuple[torch.Tensor, int]] = {}
        self._find_words = find_words or partial(
            english_words, basic_tokenizer=tokenizer.basic_tokenizer)
        self.next_sentence = 0

    def candidates(self, sentences: Sequence[str]) -> list[dict[int, list[str]]]:
        """Return for each sentence the replacements of each token that may be varied, best first.

        A word that gets no proposal keeps itself as the only one, as in the original. Of a text
        that is written without spaces the numbers are those of its `Sentence.parts`.
        """
        return [candidates for _, candidates in self._analyse(sentences)]

    def augment(self, sentences: Sequence[str]) -> list[list[str]]:
        """Return for each sentence itself and up to N different variations of it.

        Variations are lower-cased basic tokens joined by spaces; of texts with ideographs they
        are the text as it is, but for the words. N draws are made, and a draw that changes
        nothing or repeats an earlier one adds no sentence.
        """
        results = []
        for text, (sentence, candidates) in zip(sentences, self._analyse(sentences), strict=True):
            generator = random.Random(f"{self.seed}-{self.next_sentence}")
            self.next_sentence += 1
            results.append(self._vary(text, sentence, candidates, generator))
        return results

    def _vary(
        self, text: str, sentence: Sentence, candidates: dict[int, list[str]],
        generator: random.Random,
    ) -> list[str]:
        """Return the text and its variations; a part with `candidates` draws one of them."""
        parts, join = sentence.parts, sentence.separator.join
        seen = {text, join(parts)}
        variations = [text]
        draw = generator.random
        for _ in range(self.N if candidates else 0):
            new_parts = list(parts)
            for index, words in candidates.items():
                if draw() < self.p:
                    new_parts[index] = words[int(draw() * len(words))]
            new_text = join(new_parts)
            if new_text not in seen:
                seen.add(new_text)
                variations.append(new_text)
        return variations

    def _analyse(self, texts: Sequence[str]) -> list[tuple[Sentence, dict[int, list[str]]]]:
        """Return parts and candidates of each text; a repeated one is done once."""
        unique = list(dict.fromkeys(texts))
        sentences = [self._find_words(text) for text in unique]
        tokens = {token for sentence in sentences for token in sentence.tokens}
        new = sorted(tokens - self._pieces.keys())
        self._pieces.update(zip(new, self.tokenizer.encode_batch(new), strict=True))
        found: list[dict[int, list[str]]] = [{} for _ in unique]
        queries: dict[str | int, list[Query]] = defaultdict(list)
        rare: dict[str | int, list[tuple[int, Word]]] = defaultdict(list)
        for number, sentence in enumerate(sentences):
            pieces = [self._pieces[token] for token in sentence.tokens]
            starts = np.cumsum([0, *map(len, pieces)])
            sentence_ids = [piece for word in pieces for piece in word]
            self.counts["ideographs"] += sentence.ideographs
            self.counts["in_words"] += sentence.in_words
            self.counts["pieces"] += len(sentence_ids)
            self.counts["unknown"] += sentence_ids.count(self.tokenizer.unk_id)
            for word in sentence.words:
                length = 0 if word.token is None else len(pieces[word.token])
                found[number][word.part] = []  # fixes the order in which words draw
                if length == 1:
                    queries[word.among].append(
                        self._query(number, word, sentence_ids, int(starts[word.token])))
                else:
                    rare[word.among].append((number, word))
        for among, words in rare.items():
            near = self.glove.nearest(
                [word.text for _, word in words], self.M, self.drop_non_words, among)
            for (number, word), neighbours in zip(words, near, strict=True):
                found[number][word.part] = neighbours
        for among in queries:
            self._fill_masked(queries[among], found)
        for sentence, candidates in zip(sentences, found, strict=True):
            self.counts["words"] += len(candidates)
            for index, words in candidates.items():
                if not words:
                    self.counts["no_candidates"] += 1
                    words.append(sentence.parts[index])
        results = dict(zip(unique, zip(sentences, found, strict=True), strict=True))
        return [results[text] for text in texts]

    def _query(self, sentence: int, word: Word, pieces: list[int], start: int) -> Query:
        """Return the model's input that masks the piece at `start`, with the original beside it.

        An input longer than the model's positions is cut at its end; where that would cut off
        [MASK] itself, both copies of the sentence shrink to a window around it.
        """
        limit = self.model.config.max_position_embeddings
        if start + 1 >= limit:
            width = (limit - 3) // 2
            left = min(max(0, start - width // 2), len(pieces) - width)
            pieces, start = pieces[left : left + width], start - left
        separator = self.tokenizer.sep_id
        ids = [self.tokenizer.cls_id, *pieces, separator, *pieces, separator]
        ids[start + 1] = self.tokenizer.mask_id
        return Query(sentence, word.part, word.among, ids[:limit], len(pieces) + 2, start + 1)

    def _fill_masked(self, queries: Sequence[Query], found: list[dict[int, list[str]]]) -> None:
        """Fill in what the model proposes for the words that are one word piece."""
        batches = list(self._batches(queries))
        # All batches are queued before the first result is copied back from a GPU.
        proposals = [self._propose(batch) for batch in batches]
        for batch, best in zip(batches, proposals, strict=True):
            for query, ids in zip(batch, best.tolist(), strict=True):
                words = [self._words[piece] for piece in ids]
                found[query.sentence][query.part] = [
                    word for word in words if not word.startswith("##")
                ]

    def _proposed(self, among: str | int) -> tuple[torch.Tensor, int]:
        """Return what the model may not propose [its vocabulary], and how many words it may."""
        if among not in self._forbidden:
            allowed = [(not self.drop_non_words or is_replacement(word)) and is_among(word, among)
                       for word in self._words]
            count = sum(allowed)
            allowed += [False] * (self.model.config.vocab_size - len(allowed))
            self._forbidden[among] = ~torch.tensor(allowed, device=self.device), count
        return self._forbidden[among]

    def _batches(self, queries: Sequence[Query]) -> Iterator[list[Query]]:
        """Group queries of similar length, the longest first, into batches of bounded size."""
        batch: list[Query] = []
        for query in sorted(queries, key=lambda query: -len(query.ids)):
            longest = len(batch[0].ids) if batch else 0
            if batch and (
                len(batch) == BATCH_ROWS or (len(batch) + 1) * longest > self.batch_tokens
            ):
                yield batch
                batch = []
            batch.append(query)
        if batch:
            yield batch

    @torch.inference_mode()
    def _propose(self, batch: Sequence[Query]) -> torch.Tensor:
        """Return the ids of the best entries at each [MASK]: [batch, up to M], likeliest first.

        All of a batch are replaced by words of one kind.
        """
        shape = (len(batch), len(batch[0].ids))
        ids = np.full(shape, self.tokenizer.pad_id, dtype=np.int64)
        segments = np.zeros(shape, dtype=np.int64)
        attention_mask = np.zeros(shape, dtype=np.int64)
        for row, query in enumerate(batch):
            length = len(query.ids)
            ids[row, :length] = query.ids
            segments[row, query.first_length : length] = 1
            attention_mask[row, :length] = 1
        # Indices, not a boolean mask, whose count would synchronise with the GPU.
        rows, positions = np.arange(len(batch)), np.array([query.position for query in batch])
        *inputs, rows, positions = (
            torch.from_numpy(array).to(self.device)
            for array in (ids, segments, attention_mask, rows, positions))
        logits = self.model(*inputs, masked_positions=(rows, positions)).logits  # [batch, vocab]
        forbidden, allowed = self._proposed(batch[0].among)
        logits = logits.masked_fill(forbidden, float("-inf"))
        return logits.topk(min(self.M, allowed)).indices

"""Data augmentation: new sentences by replacing words (TinyBERT, arXiv 1909.10351, Algorithm 1).

A word that is one word piece is masked and BERT proposes replacements; a word of several pieces
takes its nearest neighbours among word vectors. Each new sentence then draws, word by word. Where
there is no GloVe, word vectors are composed of a BERT's input embeddings.
"""

import random
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from transformer.file_utils import UserError, atomic_path, text_lines
from transformer.modeling import BertForMaskedLM, BertModel
from transformer.tokenization import BertTokenizer

# Kept from the original: the usual English function words without the question words (what,
# which, who, whom, when, where, why, how), which therefore are replaced like any other word.
FUNCTION_WORDS = """
i me my myself we our ours ourselves you your yours yourself yourselves he him his himself
she her hers herself it its itself they them their theirs themselves
this that these those a an the all any both each few more most other some such own same
am is are was were be been being have has had having do does did doing can will should
and but if or because as until while than so nor
of at by for with about against between into through during before after above below to
from up down in out on off over under
again further then once here there no not only too very just now
s t d m o y ll re ve ma
ain aren couldn didn doesn don hadn hasn haven isn mightn mustn needn shan shouldn wasn
weren won wouldn
"""
STOP_WORDS = frozenset(FUNCTION_WORDS.split())

PLAIN_WORD = re.compile("[a-z]+")
WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|[0-9]+|[.,;:!?()]")  # words that get a composed vector
COMPOSED_WORDS = 20_000
UNKNOWN_VECTOR = b"<unk> "
VECTOR_BLOCK = 1024  # lines of a vector file parsed at once
SCORE_CELLS = 1 << 25  # cells of one block of similarities: 128 MiB of float32
SCORE_ERROR = 1e-4  # more than float32 can be wrong in a product of vectors of unit length
BATCH_TOKENS = {"cuda": 16384, "cpu": 2048}  # a CPU wants what fits into its caches
BATCH_ROWS = 1024  # one row costs a whole vocabulary of logits


def is_plain_word(token: str) -> bool:
    """Return whether Algorithm 1 may vary a basic token: letters a-z only and no stop word."""
    return PLAIN_WORD.fullmatch(token) is not None and token not in STOP_WORDS


def is_replacement(token: str) -> bool:
    """Return whether a vocabulary entry is a word: no special token, `##` piece or punctuation."""
    return token != "" and all(letter.isalpha() or letter.isdecimal() for letter in token)


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
        self._usable = {False: usable, True: usable & np.array(first)}
        self._cache: dict[tuple[int, bool], dict[str, list[str]]] = defaultdict(dict)

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
        return cls(words, np.concatenate(blocks))

    def nearest(self, words: Iterable[str], k: int, words_only: bool = False) -> list[list[str]]:
        """Return the `k` nearest neighbours of each word, the nearest first, without the word.

        A word without a vector has none. `words_only` folds case: a query is found under any
        spelling, and neighbours are words in lower case, each once.
        """
        words = list(words)
        cache = self._cache[k, words_only]
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
            scores[:, ~self._usable[words_only]] = -np.inf
            for word, index, row in zip(block, indices, scores, strict=True):
                cache[word] = self._best(row, index, k, words_only)
        return [list(cache[word]) for word in words]

    def _find(self, word: str, words_only: bool) -> int | None:
        index = self._ids.get(word)
        if index is None and words_only:
            index = self._folded_ids.get(word.lower())
        if index is None or not self._usable[False][index]:
            return None
        return index

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
    counts = Counter(word for line in lines for word in WORD.findall(line.lower()))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def write_vectors(path: Path, words: Sequence[str], vectors: np.ndarray) -> None:
    """Write `vectors` [words, dim] in GloVe's text format, one line a word."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for word, vector in zip(words, vectors, strict=True):
            file.write(f"{word} {' '.join(f'{number:.4f}' for number in vector)}\n")


def _lines(files: Iterable[Path]) -> Iterator[str]:
    for path in files:
        yield from (line for _, line in text_lines(path))


def compose_vectors(
    model_dir: Path | str, files: Sequence[Path], vocab_size: int = COMPOSED_WORDS
) -> tuple[list[str], np.ndarray]:
    """Return the most frequent words of text files and their vectors [words, hidden].

    A word's vector is the mean of the input embeddings of its word pieces.
    """
    words = list(count_words(_lines(files)))[:vocab_size]
    if not words:
        raise UserError(f"{files[0]}: no words; expected English text")
    model = BertModel.from_pretrained(model_dir)
    table = model.embeddings.word_embeddings.weight.detach().numpy()  # [vocabulary, hidden]
    pieces = BertTokenizer.from_pretrained(model_dir).encode_batch(words)
    return words, np.stack([table[ids].mean(axis=0) for ids in pieces])


# ------------------------------------------------------------------ Algorithm 1


class Query(NamedTuple):
    """One masked word: which sentence, which token of it, and the model's input for it."""

    sentence: int
    token: int
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
    next_sentence: the number i of the next sentence, from 0; set it to begin elsewhere
    counts: running totals: `words` that may be varied and those with `no_candidates`; word
        `pieces` and those `unknown`
    """

    def __init__(
        self, model: BertForMaskedLM, tokenizer: BertTokenizer, glove: GloveIndex, M: int = 15,
        N: int = 30, p: float = 0.4, seed: int = 42, drop_non_words: bool = True,
        batch_tokens: int = 0,
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
        allowed = [not drop_non_words or is_replacement(word) for word in self._words]
        self._allowed = sum(allowed)
        allowed += [False] * (model.config.vocab_size - len(allowed))
        self._forbidden = ~torch.tensor(allowed, device=self.device)  # [the model's vocabulary]
        self.next_sentence = 0

    def candidates(self, sentences: Sequence[str]) -> list[dict[int, list[str]]]:
        """Return for each sentence the replacements of each token that may be varied, best first.

        A word that gets no proposal keeps itself as the only one, as in the original.
        """
        return [candidates for _, candidates in self._analyse(sentences)]

    def augment(self, sentences: Sequence[str]) -> list[list[str]]:
        """Return for each sentence itself and up to N different variations of it.

        Variations are lower-cased basic tokens joined by spaces. N draws are made, and a draw
        that changes nothing or repeats an earlier one adds no sentence.
        """
        results = []
        for sentence, (tokens, candidates) in zip(
            sentences, self._analyse(sentences), strict=True
        ):
            generator = random.Random(f"{self.seed}-{self.next_sentence}")
            self.next_sentence += 1
            results.append(self._vary(sentence, tokens, candidates, generator))
        return results

    def _vary(
        self, sentence: str, tokens: list[str], candidates: dict[int, list[str]],
        generator: random.Random,
    ) -> list[str]:
        """Return the sentence and its variations; a token of `candidates` draws one of them."""
        seen = {sentence, " ".join(tokens)}
        variations = [sentence]
        draw = generator.random
        for _ in range(self.N if candidates else 0):
            new_tokens = list(tokens)
            for index, words in candidates.items():
                if draw() < self.p:
                    new_tokens[index] = words[int(draw() * len(words))]
            text = " ".join(new_tokens)
            if text not in seen:
                seen.add(text)
                variations.append(text)
        return variations

    def _analyse(self, sentences: Sequence[str]) -> list[tuple[list[str], dict[int, list[str]]]]:
        """Return basic tokens and candidates of each sentence; a repeated one is done once."""
        unique = list(dict.fromkeys(sentences))
        tokens = [self.tokenizer.basic_tokenizer.tokenize(sentence) for sentence in unique]
        new = sorted({token for row in tokens for token in row} - self._pieces.keys())
        self._pieces.update(zip(new, self.tokenizer.encode_batch(new), strict=True))
        found: list[dict[int, list[str]]] = [{} for _ in unique]
        queries, rare = [], []
        for sentence, row in enumerate(tokens):
            pieces = [self._pieces[token] for token in row]
            starts = np.cumsum([0, *map(len, pieces)])
            sentence_ids = [piece for word in pieces for piece in word]
            self.counts["pieces"] += len(sentence_ids)
            self.counts["unknown"] += sentence_ids.count(self.tokenizer.unk_id)
            for index, token in enumerate(row):
                if not pieces[index] or not is_plain_word(token):
                    continue
                found[sentence][index] = []  # fixes the order in which words draw
                if len(pieces[index]) == 1:
                    queries.append(self._query(sentence, index, sentence_ids, int(starts[index])))
                else:
                    rare.append((sentence, index, token))
        near = self.glove.nearest([word for _, _, word in rare], self.M, self.drop_non_words)
        for (sentence, index, _), words in zip(rare, near, strict=True):
            found[sentence][index] = words
        self._fill_masked(queries, found)
        for row, candidates in zip(tokens, found, strict=True):
            self.counts["words"] += len(candidates)
            for index, words in candidates.items():
                if not words:
                    self.counts["no_candidates"] += 1
                    words.append(row[index])
        results = dict(zip(unique, zip(tokens, found, strict=True), strict=True))
        return [results[sentence] for sentence in sentences]

    def _query(self, sentence: int, token: int, pieces: list[int], start: int) -> Query:
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
        return Query(sentence, token, ids[:limit], len(pieces) + 2, start + 1)

    def _fill_masked(self, queries: Sequence[Query], found: list[dict[int, list[str]]]) -> None:
        """Fill in what the model proposes for the words that are one word piece."""
        batches = list(self._batches(queries))
        # All batches are queued before the first result is copied back from a GPU.
        proposals = [self._propose(batch) for batch in batches]
        for batch, best in zip(batches, proposals, strict=True):
            for query, ids in zip(batch, best.tolist(), strict=True):
                words = [self._words[piece] for piece in ids]
                found[query.sentence][query.token] = [
                    word for word in words if not word.startswith("##")
                ]

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
        """Return the ids of the best entries at each [MASK]: [batch, up to M], likeliest first."""
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
        logits = logits.masked_fill(self._forbidden, float("-inf"))
        return logits.topk(min(self.M, self._allowed)).indices

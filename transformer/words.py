"""What counts as a word: of letters a-z (GLUE's English), of any alphabet, and of ideographs.

Chinese, and the kanji of Japanese, are written without spaces. Their words are the longest matches
of a run of ideographs among the words that a file of word vectors holds; for a corpus without such
a file, `frequent_ngrams` finds what recurs as a unit. Negations are never varied nor proposed.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from tokenizers import PreTokenizedString

from transformer.tokenization import BasicTokenizer

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

# Chinese function words of one character, simplified and traditional. `PARTICLES` are hardly ever a
# part of other words. A word of these alone (我们, 因为, 但是) is a function word, too.
PARTICLES = frozenset(
    "的了也都就才還还又很是和與与及把被我你您他她它這这那吗嗎呢吧啊呀哦嗯啦嘛么麼们們"
)
STOP_CHARACTERS = PARTICLES | frozenset(
    "地得着過过在最更太再給给讓让將将對对於于從从到由向往跟同比一個个些"
    "有而且但卻却雖虽然因為为所以如若果則则只會会能可應应該该要"
    "咱自己哪誰谁什甚怎其之此各每某樣样"
)
NEGATION_CHARACTERS = frozenset("不沒没無无未別别非莫勿否毋甭弗")
# Negations that are words of their own in other alphabets: Russian and its neighbours, Greek,
# Hebrew, Arabic, Persian, Korean, Hindi.
NEGATIONS = frozenset("""
не нет ни без нельзя никогда ничего ні немає без нема није δεν δε μη μην όχι χωρίς
לא אין בלי אל לا لا لم لن ليس ليست بدون نه 안 못 아니 नहीं मत न
""".split())

PLAIN_WORD = re.compile("[a-z]+")
IDEOGRAPH = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002ceaf\U0002f800-\U0002fa1f"
IDEOGRAPHS = re.compile(f"[{IDEOGRAPH}]+")
# Hiragana are the particles and endings of Japanese, its negations among them.
HIRAGANA_OR_IDEOGRAPH = re.compile(f"[\u3041-\u309f{IDEOGRAPH}]")
KANA = re.compile("[\u3041-\u30ff\uff66-\uff9f]")

MIN_COUNT = 5  # of an n-gram
LONGEST = 4  # ideographs of an n-gram
MIN_ASSOCIATION = 2.0  # pointwise mutual information of an n-gram's two parts, in nats
MAX_CONTAINED = 0.6  # share of an n-gram's places that one longer n-gram may cover


def is_plain_word(token: str) -> bool:
    """Return whether Algorithm 1 may vary a basic token: letters a-z only and no stop word."""
    return PLAIN_WORD.fullmatch(token) is not None and token not in STOP_WORDS


def is_replacement(token: str) -> bool:
    """Return whether a vocabulary entry is a word: no special token, `##` piece or punctuation."""
    return token != "" and all(letter.isalpha() or letter.isdecimal() for letter in token)


def is_alphabetic(token: str) -> bool:
    """Return whether a token is letters of any alphabet, with the marks that belong to them."""
    return token != "" and token[0].isalpha() and all(
        unicodedata.category(letter)[0] in "LM" for letter in token)


def is_ideographic(text: str) -> bool:
    """Return whether a text is ideographs and nothing else."""
    return IDEOGRAPHS.fullmatch(text) is not None


def negates(word: str) -> bool:
    """Return whether a word is a negation, or ideographs with one among them."""
    return word in NEGATIONS or not NEGATION_CHARACTERS.isdisjoint(word)


def may_vary(word: str) -> bool:
    """Return whether ideographs are a word that carries content, and no negation."""
    return not negates(word) and not STOP_CHARACTERS.issuperset(word)


# ------------------------------------------------------------------ words of a text


Span = tuple[str, int, int]  # a basic token, and where it begins and ends in its text


class Word(NamedTuple):
    """A word that may be varied.

    part: which part of its sentence it is
    text: what it is called in a file of word vectors
    among: what its replacements are: "" any words, "letters" words without ideographs, 1 single
        ideographs, a larger number n words of about n ideographs; but for "" no negations, and of
        ideographs no function words
    token: the basic token that the word is, None for one that only word vectors know
    """

    part: int
    text: str
    among: str | int
    token: int | None


class Sentence(NamedTuple):
    """A text as it is varied: `parts`, joined by `separator`, of which `words` may be replaced.

    tokens: its basic tokens, which the model sees
    ideographs: how many it has, and how many of them are `in_words` of several
    """

    parts: list[str]
    separator: str
    tokens: list[str]
    words: list[Word]
    ideographs: int = 0
    in_words: int = 0


def english_words(text: str, basic_tokenizer: BasicTokenizer) -> Sentence:
    """Cut a text into lower-cased basic tokens, of which words of the letters a-z may be varied."""
    tokens = basic_tokenizer.tokenize(text)
    words = [Word(index, token, "", index) for index, token in enumerate(tokens)
             if is_plain_word(token)]
    return Sentence(tokens, " ", tokens, words)


class WordFinder:
    """Finds the words of texts in any script, those of ideographs among the words of a lexicon."""

    def __init__(self, lexicon: Collection[str], basic_tokenizer: BasicTokenizer) -> None:
        self.basic_tokenizer = basic_tokenizer
        self.known = {word.lower() for word in lexicon}
        self.ideographic = {word for word in lexicon if len(word) > 1 and is_ideographic(word)}
        self.longest = max(map(len, self.ideographic), default=1)
        self.special = re.compile("|".join(map(re.escape, basic_tokenizer.kept)))

    def find(self, text: str) -> Sentence:
        """Cut a text into parts.

        A text without ideographs and kana is basic tokens joined by spaces, as English is. In the
        others all that is not a word to be varied stays as it is written.
        """
        if text.isascii():
            return english_words(text, self.basic_tokenizer)
        spans = list(self._spans(text))
        if not IDEOGRAPHS.search(text) and not KANA.search(text):
            return self._spaced(text, spans)
        return self._unspaced(text, spans)

    def cut(self, run: re.Match[str]) -> Iterator[tuple[int, str]]:
        """Cut ideographs from the left into the longest words of the lexicon, or single ones."""
        text, start = run.string, run.start()
        while start < run.end():
            longest = min(self.longest, run.end() - start)
            length = next((length for length in range(longest, 1, -1)
                           if text[start : start + length] in self.ideographic), 1)
            yield start, text[start : start + length]
            start += length

    def _spans(self, text: str) -> Iterator[Span]:
        """Yield the basic tokens of a text, and where each begins and ends in it."""
        done = 0
        for match in [*self.special.finditer(text), None]:
            start, end = match.span() if match else (len(text), len(text))
            piece = PreTokenizedString(text[done:start])
            piece.normalize(self.basic_tokenizer.normalizer.normalize)
            self.basic_tokenizer.pre_tokenizer.pre_tokenize(piece)
            for token, (first, last), _ in piece.get_splits("original", "char"):
                yield token, done + first, done + last
            if match:
                yield match[0], start, end
            done = end

    def _lookup(self, token: str, written: str) -> str | None:
        """Return what the vectors call a word of letters that may be varied, None for others.

        Letters a-z are words in any case, those of other alphabets where there is a vector.

        Args:
            token: the basic token, perhaps without the accents.
            written: the same in the text, in lower case.
        """
        known = written if written in self.known else token
        if PLAIN_WORD.fullmatch(token):
            return None if token in STOP_WORDS else known
        is_word = (known.lower() in self.known and is_alphabetic(token) and not token.isascii()
                   and not negates(written) and not HIRAGANA_OR_IDEOGRAPH.search(token))
        return known if is_word else None

    def _spaced(self, text: str, spans: Sequence[Span]) -> Sentence:
        parts, words = [], []
        for index, (token, start, end) in enumerate(spans):
            written = unicodedata.normalize("NFC", text[start:end])
            lower = written.lower() if self.basic_tokenizer.do_lower_case else written
            parts.append(token if written.isascii() else lower)
            known = self._lookup(token, written.lower())
            if known is not None:
                among = "" if PLAIN_WORD.fullmatch(token) else "letters"
                words.append(Word(index, known, among, index))
        return Sentence(parts, " ", parts, words)

    def _unspaced(self, text: str, spans: Sequence[Span]) -> Sentence:
        units = [unit for run in IDEOGRAPHS.finditer(text) for unit in self.cut(run)]
        found = [*self._ideographic_words(units, spans), *self._words_of_letters(text, spans)]
        parts, words = [], []
        done = 0
        for start, end, word in sorted(found):
            parts += [text[done:start], text[start:end]]
            words.append(word._replace(part=len(parts) - 1))
            done = end
        lengths = [len(unit) for _, unit in units]
        return Sentence(
            [*parts, text[done:]], "", [text[start:end] for _, start, end in spans], words,
            ideographs=sum(lengths), in_words=sum(length for length in lengths if length > 1))

    @staticmethod
    def _ideographic_words(
        units: Sequence[tuple[int, str]], spans: Sequence[Span]
    ) -> Iterator[tuple[int, int, Word]]:
        """Yield where each word of ideographs begins and ends, and its `Word` without the part."""
        single = {start: index for index, (_, start, end) in enumerate(spans) if end == start + 1}
        for start, unit in units:
            token = single.get(start) if len(unit) == 1 else None
            if may_vary(unit) and (len(unit) > 1 or token is not None):
                yield start, start + len(unit), Word(0, unit, len(unit), token)

    def _words_of_letters(
        self, text: str, spans: Sequence[Span]
    ) -> Iterator[tuple[int, int, Word]]:
        """Yield the same for the other words; those in kana are left to the vectors."""
        for index, (token, start, end) in enumerate(spans):
            known = self._lookup(token, unicodedata.normalize("NFC", text[start:end]).lower())
            if known is not None:
                yield start, end, Word(0, known, "letters", None if KANA.search(token) else index)


# ------------------------------------------------------------------ words of a corpus


def frequent_ngrams(runs: Sequence[str]) -> dict[str, int]:
    """Return which 2 to 4 ideographs are a unit in these runs, and how often each occurs.

    A unit recurs, its parts occur together far more often than by chance (pointwise mutual
    information), it has no particle, and it is not merely a part of one longer n-gram.
    """
    counts = Counter(character for run in runs for character in run)
    total = counts.total()
    covered: Counter[str] = Counter()  # how many places of an n-gram one longer n-gram takes
    for length in range(2, LONGEST + 2):
        longer = Counter(
            run[start : start + length] for run in runs for start in range(len(run) - length + 1)
            if run[start : start + length - 1] in counts
            and run[start + 1 : start + length] in counts)
        for ngram, count in longer.items():
            if count >= MIN_COUNT:
                counts[ngram] = count
                for part in (ngram[1:], ngram[:-1]) if PARTICLES.isdisjoint(ngram) else ():
                    covered[part] = max(covered[part], count)

    def association(ngram: str, cut: int) -> float:
        return math.log(counts[ngram] * total / (counts[ngram[:cut]] * counts[ngram[cut:]]))

    def is_unit(ngram: str) -> bool:
        return (1 < len(ngram) <= LONGEST and PARTICLES.isdisjoint(ngram)
                and covered[ngram] <= MAX_CONTAINED * counts[ngram]
                and min(association(ngram, cut) for cut in range(1, len(ngram))) >= MIN_ASSOCIATION)

    return {ngram: count for ngram, count in counts.items() if is_unit(ngram)}

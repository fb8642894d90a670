"""Where sentences end: Punkt for text with spaces, its own marks for Chinese and Japanese."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from transformer.file_utils import UserError, read_json, write_text

if TYPE_CHECKING:  # imported where it is needed, as it takes a second
    from nltk.tokenize.punkt import PunktParameters

PUNKT_DATA = "tokenizers/punkt_tab"
PUNKT_DOWNLOAD_SECONDS = 30
# The languages of nltk's models.
PUNKT_LANGUAGES = {
    "cs": "czech", "da": "danish", "nl": "dutch", "en": "english", "et": "estonian",
    "fi": "finnish", "fr": "french", "de": "german", "el": "greek", "it": "italian",
    "ml": "malayalam", "no": "norwegian", "pl": "polish", "pt": "portuguese", "ru": "russian",
    "sl": "slovene", "es": "spanish", "sv": "swedish", "tr": "turkish",
}
CJK_LANGUAGES = {"zh": "chinese", "ja": "japanese"}
CJK_RULE = "cjk"

# Ideographs and kana; what is written without spaces.
CJK_LETTERS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
CJK_LETTER = re.compile(f"[{CJK_LETTERS}]")
LETTER = re.compile(r"[^\W\d_]")
CJK_MARKS = "。！？；｡…"  # end a sentence wherever they stand
# The others are marks of half width, and the full stop that is a decimal point as well.
CJK_END = re.compile(
    rf"[{CJK_MARKS}]|(?<![0-9０-９])．|[!?](?=[\s{CJK_LETTERS}]|$)|(?<=[{CJK_LETTERS}])[!?;]"
    rf"|(?<=[{CJK_LETTERS}])\.(?![0-9A-Za-z])|(?<=[a-z]{{2}})\.(?=\s)"
)
MARKS = frozenset(f"{CJK_MARKS}!?．.")
CLOSING = frozenset("”’」』）】》〉〕］｝〗)]}＂＇»")
BELONGS = MARKS | CLOSING  # behind an end: to the same sentence
GOES_ON = frozenset("，、,：:")  # behind a quotation inside a sentence


class Splitter(Protocol):
    """Cuts texts into sentences, as those of nltk do."""

    def tokenize(self, text: str) -> Iterable[str]:
        """Return the sentences of a text, in order."""


class CjkSplitter:
    """Ends a sentence after 。！？；…, in full or half width, and the quotes closed behind them."""

    def tokenize(self, text: str) -> Iterator[str]:
        """Yield the sentences of a text, with the white space around them."""
        for line in text.split("\n"):
            yield from self._split_line(line)

    def _split_line(self, line: str) -> Iterator[str]:
        begin = counted = quotes = 0
        for match in CJK_END.finditer(line):
            if match.start() < begin or not re.search(r"\w", line[begin : match.start()]):
                continue  # the mark belongs to the sentence before, or opens one
            end = match.end()
            while end < len(line):
                # The straight quotation mark closes what one before it has opened.
                quotes, counted = quotes + line.count('"', counted, end), end
                if line[end] not in BELONGS and not (line[end] == '"' and quotes % 2):
                    break
                end += 1
            if line[end : end + 1] in GOES_ON:
                continue
            yield line[begin:end]
            begin = end
        yield line[begin:]


def split_sentences(text: str, splitter: Splitter) -> list[str]:
    """Cut a text into sentences with single spaces; the end of a paragraph also ends a sentence.

    No sentence holds a line break of any kind, so none can pass for the end of a document.
    """
    lines = (line for sentence in splitter.tokenize(text) for line in sentence.split("\n"))
    collapsed = (" ".join(line.split()) for line in lines)
    return [sentence for sentence in collapsed if sentence]


# ------------------------------------------------------------------ languages


def parse_language(name: str) -> str:
    """Return the code of a language, given as a code (zh, zh-CN) or in English.

    Raises:
        UserError: neither.
    """
    known = {**PUNKT_LANGUAGES, **CJK_LANGUAGES}
    code = re.split("[-_]", name.strip().lower())[0]
    code = {word: code for code, word in known.items()}.get(code, code)
    if not re.fullmatch("[a-z]{2,3}|auto", code):
        raise UserError(f"--language {name}: unknown; expected the code of a language, such as "
                        f"{', '.join(sorted(known))}, or auto")
    return code


def cjk_share(text: str) -> float:
    """Return how much of a text's letters are ideographs or kana, from 0 to 1."""
    return len(CJK_LETTER.findall(text)) / max(1, len(LETTER.findall(text)))


# ------------------------------------------------------------------ Punkt


def train_punkt(texts: Iterable[str]) -> PunktParameters:
    """Learn abbreviations and sentence starters from raw text (Kiss and Strunk 2006)."""
    from nltk.tokenize.punkt import PunktTrainer

    trainer = PunktTrainer()
    # Also word pairs around a full stop that is no known abbreviation's, such as "St. Petersburg".
    trainer.INCLUDE_ALL_COLLOCS = True
    for text in texts:
        trainer.train(text, finalize=False)
    trainer.finalize_training()
    return trainer.get_params()


def downloaded_punkt(language: str) -> PunktParameters | None:
    """Load nltk's model of a language, after one short attempt to download it; None without."""
    import nltk

    if language not in PUNKT_LANGUAGES:
        return None
    place = f"{PUNKT_DATA}/{PUNKT_LANGUAGES[language]}/"
    try:
        nltk.data.find(place)
    except LookupError:
        # In a process of its own, as name look-ups without a network heed no socket timeout.
        command = [sys.executable, "-m", "nltk.downloader", "-q", "punkt_tab"]
        try:
            subprocess.run(command, timeout=PUNKT_DOWNLOAD_SECONDS, capture_output=True)
        except subprocess.TimeoutExpired:
            return None
    try:
        return nltk.tokenize.punkt.load_punkt_params(nltk.data.find(place))
    except LookupError:
        return None


# ------------------------------------------------------------------ a splitter as a file


def write_splitter(
    path: Path, name: str, parameters: PunktParameters | None, cjk_share: float
) -> None:
    """Write a splitter as JSON, Punkt's sets as sorted lists; None stands for a `CjkSplitter`."""
    content = {"rule": CJK_RULE} if parameters is None else vars(parameters)
    content = {"name": name, "cjk_share": cjk_share, **content}
    write_text(path, json.dumps(content, default=sorted))


@cache
def read_splitter(path: Path) -> Splitter:
    """Read what `write_splitter` wrote."""
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    content, parameters = read_json(path), PunktParameters()
    if content.get("rule") == CJK_RULE:
        return CjkSplitter()
    parameters.abbrev_types.update(content["abbrev_types"])
    parameters.collocations.update(map(tuple, content["collocations"]))
    parameters.sent_starters.update(content["sent_starters"])
    parameters.ortho_context.update(content["ortho_context"])
    return PunktSentenceTokenizer(parameters)

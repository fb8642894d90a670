"""English prose that every Python installation carries: language reference and docstrings.

The text comes from `pydoc_data.topics` (the language reference behind `help()`) and from the
docstrings of the standard library, read as source and never imported. Two machines with the same
Python version get the same text; another minor version differs in a few per cent of it.
"""

import ast
import re
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

# Modules that Python 3.10 to 3.14 all ship, so that the text hardly depends on the version.
MODULES = """
abc argparse ast asyncio base64 bdb bz2 calendar cmd code codecs collections concurrent
configparser contextlib copy ctypes curses dataclasses datetime dbm difflib dis doctest email
encodings enum fileinput fractions ftplib functools genericpath getopt getpass graphlib gzip heapq
hmac html http imaplib importlib inspect io ipaddress json linecache locale logging lzma mailbox
mimetypes multiprocessing ntpath numbers operator optparse os pathlib pdb pickle pickletools
pkgutil platform plistlib poplib posixpath pprint profile pstats py_compile pyclbr pydoc queue
random re rlcompleter sched selectors shelve shutil site smtplib socket socketserver ssl stat
statistics subprocess symtable sysconfig tarfile tempfile textwrap threading timeit tokenize trace
traceback tracemalloc types typing unittest urllib uuid venv warnings weakref webbrowser wsgiref
xml xmlrpc zipfile zipimport
""".split()

MIN_WORDS, MAX_WORDS = 4, 40
MAX_ODD_SHARE = 0.15  # of a sentence's words may be code, numbers or symbols
PLAIN_WORD = re.compile(r"[\"'(]?[A-Za-z][a-z]*(?:[-'][A-Za-z]+)*[\"')]?[,.;:!?]*")
UNDERLINE = re.compile(r"(?m)^(\S.*)\n([=*~^\-])\2{2,}[ ]*$")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")


class Section(NamedTuple):
    """A heading ("" for the lead) and its paragraphs, each a list of sentences."""

    heading: str
    paragraphs: list[list[str]]


class Document(NamedTuple):
    """A title and its sections."""

    title: str
    sections: list[Section]

    @property
    def sentences(self) -> list[str]:
        """All sentences in reading order."""
        return [s for section in self.sections for p in section.paragraphs for s in p]


def odd_words(sentence: str) -> int:
    """Count the words of a sentence that are not plain English words (code, numbers)."""
    return sum(PLAIN_WORD.fullmatch(word) is None for word in sentence.split())


def is_prose(sentence: str) -> bool:
    """Tell whether a sentence is English prose and not code, a signature or a fragment."""
    words = sentence.split()
    return (
        MIN_WORDS <= len(words) <= MAX_WORDS
        and sentence[0].isupper()
        and sentence[-1] in ".!?"
        and sentence.isascii()
        and not re.search(r"::=|>>>|\.\.\.|_{2}|[<>{}\[\]|\\=]", sentence)
        and odd_words(sentence) <= MAX_ODD_SHARE * len(words)
    )


def paragraphs_of(text: str, seen: set[str]) -> list[list[str]]:
    """Split reStructuredText or docstring text into paragraphs of prose sentences.

    Sentences already in `seen` are left out (docstrings are often inherited by copying), new
    ones are added to it.
    """
    text = text.replace("\u2019", "'").replace("\u2018", "'")
    text = text.replace("\u201c", '"').replace("\u201d", '"')
    found = []
    for block in re.split(r"\n\s*\n", text):
        block = " ".join(re.sub(r"[*`]+", "", block).split())
        sentences = [s for s in SENTENCE_END.split(block) if s and is_prose(s) and s not in seen]
        sentences = list(dict.fromkeys(sentences))
        seen.update(sentences)
        if sentences:
            found.append(sentences)
    return found


def topic_document(name: str, text: str, seen: set[str]) -> Document:
    """Make a document of one topic of the language reference, one section a heading."""
    parts = UNDERLINE.split(text)  # text, heading, underline character, text, ...
    headings = [" ".join(re.sub(r"[\"`*]", "", h).split()) for h in parts[1::3]]
    title = headings[0] if headings else name.capitalize()
    sections = [Section("", paragraphs_of(parts[0] + "\n\n" + "".join(parts[3:4]), seen))]
    for heading, body in zip(headings[1:], parts[6::3], strict=True):
        sections.append(Section(heading, paragraphs_of(body, seen)))
    return Document(title, [s for s in sections if s.paragraphs])


def docstrings(node: ast.AST) -> str:
    """Join the docstrings of a node and of everything defined inside it."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(child) for child in ast.walk(node) if isinstance(child, kinds)]
    return "\n\n".join(text for text in texts if text)


def module_document(path: Path, name: str, seen: set[str]) -> Document:
    """Make a document of a module's docstrings: a lead, a section a class, then functions."""
    tree = ast.parse(path.read_bytes())
    sections = [Section("", paragraphs_of(ast.get_docstring(tree) or "", seen))]
    functions = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            heading = node.name.strip("_")
            sections.append(Section(heading, paragraphs_of(docstrings(node), seen)))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            functions += paragraphs_of(docstrings(node), seen)
    sections.append(Section("Functions", functions))
    return Document(f"{name} (Python module)", [s for s in sections if s.paragraphs])


def module_files(library: Path) -> list[tuple[str, Path]]:
    """List (dotted name, file) of the modules in `MODULES`, packages with their submodules."""
    found = []
    for module in MODULES:
        for path in [library / f"{module}.py", *sorted((library / module).rglob("*.py"))]:
            parts = path.relative_to(library).with_suffix("").parts
            if path.is_file() and not {"test", "tests", "idlelib", "__main__"} & set(parts):
                found.append((".".join(parts).removesuffix(".__init__"), path))
    return found


def load_documents(min_sentences: int = 4) -> list[Document]:
    """Return every document of at least `min_sentences` sentences, in a fixed order."""
    seen: set[str] = set()
    documents = [topic_document(name, text, seen) for name, text in sorted(topics.items())]
    for name, path in module_files(Path(sysconfig.get_paths()["stdlib"])):
        documents.append(module_document(path, name, seen))
    return [d for d in documents if len(d.sentences) >= min_sentences]

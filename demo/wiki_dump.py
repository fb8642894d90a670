"""Writes documents as a MediaWiki XML dump with the markup that real articles carry."""

import bz2
import random
import re
from pathlib import Path
from xml.sax.saxutils import escape

from demo.english import Document
from transformer.file_utils import atomic_path

NAMESPACES = {-2: "Media", -1: "Special", 0: "", 1: "Talk", 2: "User", 4: "Wikipedia", 6: "File",
              8: "MediaWiki", 10: "Template", 12: "Help", 14: "Category"}
SITE = "https://en.wikipedia.org/wiki/"
STAMP = "2024-01-01T00:00:00Z"


def site_info() -> str:
    """Return the opening of a dump: schema, site and namespaces."""
    spaces = "\n".join(
        f'      <namespace key="{key}" case="first-letter" />' if not name else
        f'      <namespace key="{key}" case="first-letter">{name}</namespace>'
        for key, name in NAMESPACES.items()
    )
    schema = "http://www.mediawiki.org/xml/export-0.10/"
    return f"""<mediawiki xmlns="{schema}" version="0.10" xml:lang="en">
  <siteinfo>
    <sitename>Wikipedia</sitename>
    <dbname>enwiki</dbname>
    <base>{SITE}Main_Page</base>
    <generator>TinyBERT demo</generator>
    <case>first-letter</case>
    <namespaces>
{spaces}
    </namespaces>
  </siteinfo>
"""


def page(identity: int, title: str, text: str, namespace: int = 0, redirect: str = "") -> str:
    """Return one <page> element; `text` is wiki markup, escaped here."""
    target = f'    <redirect title="{escape(redirect)}" />\n' if redirect else ""
    return f"""  <page>
    <title>{escape(title)}</title>
    <ns>{namespace}</ns>
    <id>{identity}</id>
{target}    <revision>
      <id>{100000 + identity}</id>
      <timestamp>{STAMP}</timestamp>
      <contributor>
        <username>Demo</username>
        <id>1</id>
      </contributor>
      <model>wikitext</model>
      <format>text/x-wiki</format>
      <text xml:space="preserve">{escape(text)}</text>
    </revision>
  </page>
"""


def mark_up(sentence: str, rng: random.Random) -> str:
    """Add a link, emphasis or a footnote to a sentence now and then."""
    words = sentence.split(" ")
    places = [i for i, word in enumerate(words) if re.fullmatch(r"[a-z]{5,}", word)]
    if places and rng.random() < 0.5:
        place = rng.choice(places)
        word = words[place]
        forms = [f"[[{word}]]", f"[[{word.capitalize()} (computing)|{word}]]", f"''{word}''"]
        words[place] = rng.choice(forms)
    text = " ".join(words)
    if rng.random() < 0.15:
        cite = "{{cite web|url=https://docs.python.org/3/|title=Python documentation}}"
        text += f'<ref name="r{rng.randrange(1000)}">{cite}</ref>'
    return text


def article(document: Document, rng: random.Random) -> str:
    """Return a document as wiki markup: infobox, lead, sections, table, references, category."""
    name = document.title.split(" (")[0]
    parts = [f"{{{{Infobox software\n| name = {name}\n| genre = Library\n}}}}",
             "[[File:Python logo.svg|thumb|right|The logo]]"]
    for number, section in enumerate(document.sections):
        if section.heading:
            parts.append(f"== {section.heading} ==")
        for paragraph in section.paragraphs:
            parts.append(" ".join(mark_up(sentence, rng) for sentence in paragraph))
        if number == 0:
            parts.append("<!-- a comment that no reader sees -->")
    parts.append(f'{{| class="wikitable"\n! Name !! Kind\n|-\n| {name} || article\n|}}')
    parts.append("== References ==\n{{reflist}}\n\n[[Category:Python (programming language)]]")
    return "\n\n".join(parts)


def write_dump(path: Path, documents: list[Document], rng: random.Random) -> None:
    """Write a bz2-compressed dump of all documents, with redirects, a template and a talk page."""
    pages = [site_info()]
    pages.append(page(1, "Template:Reflist", "<references />", namespace=10))
    pages.append(page(2, "Talk:Python", "Is this article complete? ~~~~", namespace=1))
    identity = 10
    for document in documents:
        name = document.title.split(" (")[0]
        pages.append(page(identity, document.title, article(document, rng)))
        if rng.random() < 0.2:
            text = f"#REDIRECT [[{document.title}]]\n\n{{{{Redr|from shorter title}}}}"
            shorter = f"{name} (redirect)"
            pages.append(page(identity + 1, shorter, text, redirect=document.title))
        identity += 2
    pages.append("</mediawiki>\n")
    with atomic_path(path) as temporary:
        temporary.write_bytes(bz2.compress("".join(pages).encode("utf-8")))

"""prepare_data.py: from WikiExtractor's JSON to a corpus, and on real text to real instances."""

import bz2
import json
import logging
import subprocess
import sys
from pathlib import Path

import helpers
import nltk
import numpy as np
import pytest
from helpers import GOLDEN, SHARED
from hypothesis import given
from hypothesis import strategies as st
from nltk.tokenize.punkt import PunktSentenceTokenizer

import prepare_data
from transformer.corpus import (
    Corpus,
    EpochSettings,
    line_blocks,
    make_instances,
    tokenize_block,
    write_corpus,
)
from transformer.tokenization import BertTokenizer

DUMP = SHARED / "data" / "enwiki-sample-pages-articles.xml.bz2"
STATS = GOLDEN / "pregenerate_stats.json"
VOCAB = GOLDEN / "bert_base_uncased_vocab.txt"
EXPECTED_SENTENCES = 20304 - 30  # the original's, less lines that only stood for a formula
SEEDS = 20

ARTICLES = [
    ["Dr. Smith went home. He slept.", "A title.\n\nMr. Jones  met Dr. Smith.\tThey ate."],
    ["", "Rain\u2028fell. It was cold.", " \n "],
    ["The last one. It ends."],
]


def write_articles(folder: Path, articles: list[list[str]] = ARTICLES) -> Path:
    """Lay files out as WikiExtractor does: AA/wiki_00, AA/wiki_01, ..."""
    (folder / "AA").mkdir(parents=True)
    for number, texts in enumerate(articles):
        lines = [json.dumps({"id": "1", "url": "u", "title": "t", "text": t}) for t in texts]
        (folder / "AA" / f"wiki_{number:02d}").write_text("\n".join(lines) + "\n")
    return folder


def run(input_dir: Path, output_file: Path, *flags: str) -> None:
    """Run the script's main with a trained splitter, which needs no network."""
    helpers.run(prepare_data, "--input_dir", input_dir, "--output_file", output_file, "--punkt",
                "train", *flags)


def refused(capsys, *arguments: str | Path) -> str:
    """Run, expect a user's mistake, and return the last line on stderr."""
    with pytest.raises(SystemExit) as exit_info:
        run(*arguments)
    assert exit_info.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_writes_one_sentence_a_line_and_a_blank_line_between_documents(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run(write_articles(tmp_path / "in"), tmp_path / "corpus.txt", "--num_workers", "1")
    documents = (tmp_path / "corpus.txt").read_text().removesuffix("\n").split("\n\n")
    assert [document.split("\n")[0] for document in documents] == [
        "Dr. Smith went home.", "A title.", "Rain fell.", "The last one.",
    ]
    assert "4 documents" in caplog.text and "2 articles without text" in caplog.text


def test_a_sentence_with_a_blank_line_does_not_split_its_document(tmp_path):
    text = "One thing\n\n and \u2029 another\x0b\x85thing\r\n\r\nfollow"
    run(write_articles(tmp_path / "in", [[text, text]]), tmp_path / "corpus.txt")
    documents = (tmp_path / "corpus.txt").read_text().removesuffix("\n").split("\n\n")
    assert len(documents) == 2
    assert documents[0].splitlines() == ["One thing", "and another thing", "follow"]


@pytest.mark.parametrize(("text", "kept"), [
    ("He saw formula_1 and codice_12.", "He saw and ."),
    ("one&lt;br&gt;two &lt;br /&gt;three", "one two three"),
    ("H&lt;sub&gt;2&lt;/sub&gt;O &lt;span class=&quot;a b&quot;&gt;x&lt;/span&gt;", "H2O x"),
    ("AT&amp;T, 5&amp;nbsp;km, &amp;lt;br&amp;gt;", "AT&T, 5 km,"),
    ("a\0b &#0;", "ab \ufffd"),
    ("1 &lt; 2 and 3 &gt; 2, x&lt;y and z&gt;w, &lt;stdio.h&gt;",
     "1 < 2 and 3 > 2, x<y and z>w, <stdio.h>"),
    ("performula_1 R&D &copy", "performula_1 R&D \N{COPYRIGHT SIGN}"),
])
def test_what_wikiextractor_leaves_of_markup_is_dropped_and_other_text_kept(text, kept):
    cleaned = prepare_data.clean(text)
    assert prepare_data.split_sentences(cleaned, PunktSentenceTokenizer()) == [kept]


@given(st.text(alphabet=st.sampled_from("aB. \n\t\r\u2028\x1c\x85!?"), max_size=60))
def test_sentences_keep_every_character_and_hold_no_line_break(text):
    sentences = prepare_data.split_sentences(text, PunktSentenceTokenizer())
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert all(len(sentence.splitlines()) == 1 for sentence in sentences)


def test_output_is_the_same_whatever_the_workers_and_the_order_of_the_folder(tmp_path):
    many = [[f"File {n} text {i}. It goes on." for i in range(3)] for n in range(7)]
    input_dir = write_articles(tmp_path / "in", many)
    reversed_dir = tmp_path / "reversed"
    (reversed_dir / "AA").mkdir(parents=True)
    for path in sorted((input_dir / "AA").iterdir(), reverse=True):
        (reversed_dir / "AA" / path.name).write_bytes(path.read_bytes())
    run(input_dir, tmp_path / "one.txt", "--num_workers", "1")
    run(reversed_dir, tmp_path / "three.txt", "--num_workers", "3")
    assert (tmp_path / "one.txt").read_bytes() == (tmp_path / "three.txt").read_bytes()
    assert "File 0 text 0." in (tmp_path / "one.txt").read_text().splitlines()[0]


def test_compressed_files_are_read(tmp_path):
    input_dir = write_articles(tmp_path / "in")
    run(input_dir, tmp_path / "plain.txt")
    for path in list((input_dir / "AA").iterdir()):
        path.with_name(f"{path.name}.bz2").write_bytes(bz2.compress(path.read_bytes()))
        path.unlink()
    run(input_dir, tmp_path / "compressed.txt")
    assert (tmp_path / "plain.txt").read_bytes() == (tmp_path / "compressed.txt").read_bytes()


def test_zero_files_is_an_error_and_writes_nothing(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "0 files" in refused(capsys, tmp_path / "empty", tmp_path / "out" / "corpus.txt")
    assert "no such folder" in refused(capsys, tmp_path / "missing", tmp_path / "corpus.txt")
    assert not (tmp_path / "out").exists() and not (tmp_path / "corpus.txt").exists()


def test_zero_documents_is_an_error_and_writes_nothing(tmp_path, capsys):
    input_dir = write_articles(tmp_path / "in", [["", " "]])
    message = refused(capsys, input_dir, tmp_path / "out" / "corpus.txt")
    assert "0 documents" in message and str(input_dir) in message
    assert not (tmp_path / "out" / "corpus.txt").exists()


@pytest.mark.parametrize(
    ("line", "complaint"),
    [("{not json", "not valid JSON"), ("[1]", "list as JSON"), ('{"id": "7"}', "no text"),
     ('{"text": 3}', "no text"), ("[" * 100_000, "recursion"),
     ('{"id": ' + "9" * 5000 + "}", "5000 digits")],
)
def test_a_malformed_line_is_named_with_its_file(tmp_path, capsys, line, complaint):
    input_dir = write_articles(tmp_path / "in")
    broken = input_dir / "AA" / "wiki_01"
    broken.write_text(broken.read_text() + line + "\n")
    message = refused(capsys, input_dir, tmp_path / "corpus.txt")
    assert f"{broken}, line 4" in message and complaint in message
    assert not (tmp_path / "corpus.txt").exists()


def test_punkt_tab_is_used_where_it_is_there_and_a_trained_model_elsewhere(
    tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    run(write_articles(tmp_path / "elsewhere"), tmp_path / "trained.txt")
    assert "sentence splitter: Punkt trained on" in caplog.text
    folder = tmp_path / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk_data")])
    parameters = prepare_data.train_punkt(["Then Dr. Brown came. We asked Dr. Black. "] * 20)
    nltk.tokenize.punkt.save_punkt_params(parameters, str(folder))
    run(write_articles(tmp_path / "in"), tmp_path / "corpus.txt", "--punkt", "auto")
    assert "sentence splitter: nltk's punkt_tab" in caplog.text
    assert (tmp_path / "corpus.txt").read_text().startswith("Dr. Smith went home.\nHe slept.\n")


def test_a_punkt_model_trained_on_the_corpus_learns_its_abbreviations():
    filler = "The man went to the house. He saw a dog there. It was red. "
    text = (filler + "Then Dr. Brown came home. We asked Dr. Black about it. ") * 20
    trained = PunktSentenceTokenizer(prepare_data.train_punkt([text]))
    sentence = "They met Dr. White."
    assert prepare_data.split_sentences(sentence, trained) == [sentence]
    assert len(prepare_data.split_sentences(sentence, type(trained)())) == 2


def test_the_sample_to_train_on_is_bounded_and_spread_over_the_corpus(tmp_path):
    many = [[f"{number:02d} " + "x" * 97] * 10 for number in range(40)]
    input_dir = write_articles(tmp_path / "in", many)
    files = prepare_data.find_input_files(input_dir)
    sample = list(prepare_data.sample_articles(files, 5000))
    assert 4000 <= sum(map(len, sample)) <= 5100
    assert int(sample[-1][:2]) >= 30


@pytest.fixture(scope="module")
def wikipedia_corpus(tmp_path_factory) -> Path:
    """The real Wikipedia sample through WikiExtractor and prepare_data.py."""
    if not DUMP.is_file():
        pytest.skip(f"the Wikipedia sample is not at {DUMP} (set TINYBERT_SHARED)")
    folder = tmp_path_factory.mktemp("wikipedia")
    subprocess.run(
        [sys.executable, "-m", "wikiextractor.WikiExtractor", str(DUMP), "--json", "-q",
         "-o", str(folder / "extracted")],
        check=True, timeout=120,
    )
    run(folder / "extracted", folder / "corpus.txt", "--num_workers", "2")
    return folder / "corpus.txt"


def test_the_wikipedia_sample_gives_the_original_number_of_sentences(wikipedia_corpus):
    lines = wikipedia_corpus.read_text(encoding="utf-8").split("\n")
    # One of the 106 articles is empty.
    assert sum(not line for line in lines[:-1]) + 1 == 105
    assert sum(map(bool, lines)) == EXPECTED_SENTENCES


def instance_statistics(corpus, seed: int) -> list[float]:
    """The golden columns; the second segment counts its [SEP]."""
    blocks = list(make_instances(corpus, EpochSettings(seed), 0))
    first, second, is_random = (
        np.concatenate([getattr(block, column) for block in blocks])
        for column in ("first_lengths", "second_lengths", "is_random_next")
    )
    lengths = first + second + 3
    return [len(lengths), lengths.mean(), is_random.mean(), second.mean() + 1,
            (lengths == 128).mean()]


def test_instances_of_the_wikipedia_sample_are_distributed_as_the_originals(
    wikipedia_corpus, tmp_path
):
    tokenizer = BertTokenizer(VOCAB)
    write_corpus(tmp_path, (tokenize_block(tokenizer, block)
                            for block in line_blocks(wikipedia_corpus)))
    corpus = Corpus.open(tmp_path, len(tokenizer))
    golden = json.loads(STATS.read_text())
    runs = np.array(golden["runs"])
    ours = np.array([instance_statistics(corpus, seed) for seed in range(SEEDS)])
    mean = ours.mean(axis=0)
    assert (runs.min(axis=0) <= mean).all() and (mean <= runs.max(axis=0)).all(), mean
    error = np.array(golden["std"]) * np.sqrt(1 / len(runs) + 1 / SEEDS)
    assert (abs(mean - golden["mean"]) < 3 * error).all()
    # A document's target length moves all columns together; at equal mean length, what is left
    # is small enough to notice one token too many in a segment.
    design = np.c_[np.ones(SEEDS), ours[:, 1]]
    weights = np.linalg.lstsq(design, ours, rcond=None)[0]
    residuals = (runs - np.c_[np.ones(len(runs)), runs[:, 1]] @ weights).mean(axis=0)
    spread = (ours - design @ weights).std(axis=0, ddof=2)
    columns = [0, 2, 3, 4]
    limit = 4 * spread[columns] * np.sqrt(1 / len(runs) + 2 / SEEDS)
    assert (abs(residuals[columns]) < limit).all(), residuals

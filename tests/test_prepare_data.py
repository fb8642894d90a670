"""prepare_data.py: from WikiExtractor's JSON to a corpus, and on real text to real instances."""

import bz2
import gzip
import json
import logging
import re
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
from transformer.documents import TextFormat, clean, cut_pieces, read_documents
from transformer.file_utils import UserError
from transformer.own_tasks import find_task
from transformer.sentences import CjkSplitter, split_sentences, train_punkt
from transformer.tasks import load_examples
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
    assert "4 documents" in caplog.text and "2 documents without text" in caplog.text


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
    cleaned = clean(text)
    assert split_sentences(cleaned, PunktSentenceTokenizer()) == [kept]


@given(st.text(alphabet=st.sampled_from("aB. \n\t\r\u2028\x1c\x85!?"), max_size=60))
def test_sentences_keep_every_character_and_hold_no_line_break(text):
    sentences = split_sentences(text, PunktSentenceTokenizer())
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
    assert "no such file" in refused(capsys, tmp_path / "missing", tmp_path / "corpus.txt")
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


@pytest.mark.parametrize(("language", "name"), [
    (["--language", "auto"], "english"), (["--language", "de"], "german"),
    (["--language", "German"], "german")])
def test_punkt_tab_is_used_where_it_is_there_and_a_trained_model_elsewhere(
    tmp_path, monkeypatch, caplog, language, name
):
    caplog.set_level(logging.INFO)
    run(write_articles(tmp_path / "elsewhere"), tmp_path / "trained.txt")
    assert "sentence splitter: Punkt trained on" in caplog.text
    folder = tmp_path / "nltk_data" / "tokenizers" / "punkt_tab" / name
    folder.mkdir(parents=True)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk_data")])
    parameters = train_punkt(["Then Dr. Brown came. We asked Dr. Black. "] * 20)
    nltk.tokenize.punkt.save_punkt_params(parameters, str(folder))
    run(write_articles(tmp_path / "in"), tmp_path / "corpus.txt", "--punkt", "auto", *language)
    assert f"sentence splitter: nltk's punkt_tab, {name.capitalize()}" in caplog.text
    assert (tmp_path / "corpus.txt").read_text().startswith("Dr. Smith went home.\nHe slept.\n")


def test_a_punkt_model_trained_on_the_corpus_learns_its_abbreviations():
    filler = "The man went to the house. He saw a dog there. It was red. "
    text = (filler + "Then Dr. Brown came home. We asked Dr. Black about it. ") * 20
    trained = PunktSentenceTokenizer(train_punkt([text]))
    sentence = "They met Dr. White."
    assert split_sentences(sentence, trained) == [sentence]
    assert len(split_sentences(sentence, type(trained)())) == 2


def test_the_sample_to_train_on_is_bounded_and_spread_over_the_corpus(tmp_path):
    many = [[f"{number:02d} " + "x" * 97] * 10 for number in range(40)]
    input_dir = write_articles(tmp_path / "in", many)
    pieces = cut_pieces(prepare_data.find_input_files([input_dir], tmp_path / "corpus.txt"))
    sample = list(prepare_data.sample_texts(pieces, TextFormat(), 5000))
    assert 4000 <= sum(map(len, sample)) <= 5100
    assert int(sample[-1][:2]) >= 30


# ------------------------------------------------------------------ Chinese and Japanese


@pytest.mark.parametrize("sentences", [
    "他说：“你好！”|然后走了。|天气很好……|我们出去。|真的吗？！|是的；|没错。",
    "太贵了!|是吗?|好吃;|难吃｡|走吧．|价格是3．5元，版本2.0。|(他笑了。)|访问a.com/?x=1;y=2吧。",
    "……他走了。|「走吧！」|他说。|“好！”，他说，“再见。”|他说:\"好。|走吧!\"|然后\"来\"了。",
    "「行く。」|と言った。|今日はいい天気ですね！|本当？|最後の文", "１．引言。|这是测试.|下一句。",
    "iPhone 15 Pro发布。| It is new.| Really.| 很贵…| Dr. Smith买了。|\u3000一二三。。。|\n四",
])
def test_chinese_and_japanese_sentences_end_after_their_marks_and_the_quotes_behind(sentences):
    expected = [sentence.strip() for sentence in sentences.split("|")]
    assert split_sentences(sentences.replace("|", ""), CjkSplitter()) == expected


@given(st.text(alphabet=st.sampled_from("好a1. \n\u3000。！？；…!?;．“”\"（)，"), max_size=60))
def test_chinese_sentences_keep_every_character_and_none_is_marks_alone(text):
    sentences = split_sentences(text, CjkSplitter())
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert all(len(sentence.splitlines()) == 1 for sentence in sentences)


CHINESE = [["我们去吃饭。味道不错！\n价格便宜，服务好。", "他来了。She said OK. 好。"],
           ["最后一篇。完"]]


def test_a_mostly_chinese_corpus_is_split_at_its_own_marks_without_being_told(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    input_dir = write_articles(tmp_path / "in", CHINESE)
    run(input_dir, tmp_path / "auto.txt")
    assert "most letters are Chinese or Japanese" in caplog.text
    run(input_dir, tmp_path / "zh.txt", "--language", "zh-CN")
    assert (tmp_path / "auto.txt").read_bytes() == (tmp_path / "zh.txt").read_bytes()
    assert (tmp_path / "zh.txt").read_text() == (
        "我们去吃饭。\n味道不错！\n价格便宜，服务好。\n\n"
        "他来了。\nShe said OK. 好。\n\n最后一篇。\n完\n")


def test_chinese_that_is_split_as_english_is_warned_of(tmp_path, caplog):
    input_dir = write_articles(tmp_path / "in", [["好吃" * 600 + "。" + "不好" * 600]])
    run(input_dir, tmp_path / "corpus.txt", "--language", "en")
    assert "100 % of the letters are Chinese or Japanese, whose sentences --language zh would" \
        in caplog.text
    assert "sentences have 2401 characters on average, about 2401 word pieces" in caplog.text
    caplog.clear()
    run(write_articles(tmp_path / "english"), tmp_path / "english.txt", "--language", "en")
    assert "warning" not in caplog.text.lower() and "on average" not in caplog.text


def test_an_unknown_language_is_refused(tmp_path, capsys):
    message = refused(capsys, tmp_path, tmp_path / "corpus.txt", "--language", "klingon")
    assert "--language klingon: unknown; expected the code of a language" in message


# ------------------------------------------------------------------ other formats

TEXTS = ["The cat sat. It slept.\nA dog ran.", "Rain fell. It was cold.", "The last one."]
CORPUS = "The cat sat.\nIt slept.\nA dog ran.\n\nRain fell.\nIt was cold.\n\nThe last one.\n"


def write_documents(folder: Path, form: str, texts: list[str] = TEXTS, key: str = "text") -> Path:
    """Write documents as another tool has them, in the folder's only file."""
    pyarrow = pytest.importorskip("pyarrow") if form in (".parquet", ".arrow") else None
    folder.mkdir(parents=True)
    path, suffix = folder / f"train-00000-of-00001{form}", form.partition(".gz")[0]
    if pyarrow:
        from pyarrow import parquet

        table = pyarrow.table({"id": [*map(str, range(len(texts)))], key: texts})
        if suffix == ".parquet":
            parquet.write_table(table, path, row_group_size=1)
        else:
            with pyarrow.ipc.new_stream(path, table.schema) as stream:
                stream.write_table(table, max_chunksize=1)
        return path
    content = "\n\n".join(texts) if suffix == ".txt" else "".join(
        json.dumps({"id": "1", key: text}, ensure_ascii=False) + "\n" for text in texts)
    path.write_bytes(gzip.compress(content.encode()) if form.endswith(".gz") else content.encode())
    return path


FORMS = [".parquet", ".arrow", ".jsonl", ".json", ".jsonl.gz", ".txt", ".txt.gz"]


@pytest.mark.parametrize("form", FORMS)
def test_every_format_gives_the_same_corpus_from_a_file_and_from_its_folder(tmp_path, form):
    path = write_documents(tmp_path / "in" / "20231101.simple", form)
    for other in ("README.md", ".cache.txt", "dataset_info.yaml"):
        (tmp_path / "in" / other).write_text("Not a document.")
    run(path, tmp_path / "file.txt")
    run(tmp_path / "in", tmp_path / "folder.txt")
    assert (tmp_path / "file.txt").read_text() == CORPUS
    assert (tmp_path / "folder.txt").read_text() == CORPUS


def test_several_files_and_folders_are_read_in_the_order_given(tmp_path):
    places = [write_documents(tmp_path / form, form, [text])
              for form, text in zip((".jsonl", ".parquet", ".txt"), TEXTS, strict=True)]
    helpers.run(prepare_data, "--input", *places[:2], places[2].parent, "--punkt", "train",
                "--output_file", tmp_path / "corpus.txt")
    assert (tmp_path / "corpus.txt").read_text() == CORPUS


def test_files_of_another_kind_in_a_folder_are_passed_over_with_a_warning(tmp_path, caplog):
    write_documents(tmp_path / "in", ".jsonl")
    (tmp_path / "in" / "notes.txt").write_text("No document.")
    run(tmp_path / "in", tmp_path / "corpus.txt")
    assert "1 files of text are passed over, as the folder has JSON lines files" in caplog.text
    assert (tmp_path / "corpus.txt").read_text() == CORPUS


def test_plain_text_ends_a_document_at_blank_lines_or_only_at_the_end_of_the_file(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("\ufeffOne. Two.\r\n\u3000\r\n\r\nThree.\nFour")
    (tmp_path / "in" / "b.txt").write_text("\nFive.\n\n")
    run(tmp_path / "in", tmp_path / "blank.txt")
    assert (tmp_path / "blank.txt").read_text() == "One.\nTwo.\n\nThree.\nFour\n\nFive.\n"
    run(tmp_path / "in", tmp_path / "file.txt", "--documents", "file")
    assert (tmp_path / "file.txt").read_text() == "One.\nTwo.\nThree.\nFour\n\nFive.\n"


def test_json_lines_in_a_file_named_as_text_are_read_as_json_lines(tmp_path):
    path = write_documents(tmp_path / "in", ".jsonl")
    run(path.rename(path.with_suffix(".txt")), tmp_path / "corpus.txt")
    assert (tmp_path / "corpus.txt").read_text() == CORPUS


def test_wikiextractors_markup_goes_from_its_files_alone_whatever_they_are_called(tmp_path):
    text = "He saw formula_1 &amp; left."
    for name, keys in (("wiki_00", {}), ("all.jsonl", {"revid": "1"}), ("other.jsonl", {})):
        (tmp_path / name).write_text(json.dumps({**keys, "text": text}) + "\n")
        run(tmp_path / name, tmp_path / f"{name}.corpus")
    assert [(tmp_path / f"{name}.corpus").read_text() for name in
            ("wiki_00", "all.jsonl", "other.jsonl")] == [
        "He saw & left.\n", "He saw & left.\n", "He saw formula_1 &amp; left.\n"]


@pytest.mark.parametrize("form", [".parquet", ".arrow", ".jsonl"])
def test_the_column_of_the_text_has_any_name_and_may_be_null(tmp_path, capsys, form):
    path = write_documents(tmp_path / "in", form, [*TEXTS, None], key="content")
    run(path, tmp_path / "corpus.txt", "--text_column", "content")
    assert (tmp_path / "corpus.txt").read_text() == CORPUS
    message = refused(capsys, path, tmp_path / "corpus2.txt")
    assert str(path) in message and "no " in message and "text" in message
    if form != ".jsonl":
        assert "expected one of id (string), content (string), by --text_column" in message
        assert "no column 'id2'" in refused(
            capsys, path, tmp_path / "corpus2.txt", "--text_column", "id2")


@pytest.mark.parametrize("form", [".parquet", ".jsonl", ".txt"])
def test_large_files_are_cut_into_pieces_that_hold_the_same_documents(tmp_path, form):
    texts = [f"Text {number}. It goes on.\nAnd on{'.' * number}" for number in range(40)]
    path = write_documents(tmp_path / "in", form, texts)

    def documents(pieces):
        return [[*document] for piece in pieces for document in read_documents(piece, TextFormat())]

    whole = documents(cut_pieces([path]))
    assert len(whole) == len(texts) and len(cut_pieces([path])) == 1
    for size in (1, 50, 300):
        pieces = cut_pieces([path], size=size)
        assert len(pieces) > 5 and documents(pieces) == whole


def test_mistakes_in_later_pieces_are_named_by_their_line_in_the_file(tmp_path):
    path = write_documents(tmp_path / "in", ".jsonl", TEXTS * 5)
    path.write_text(path.read_text() + '{"text": 3}\n')
    with pytest.raises(UserError, match=f"{path}, line 16: no text"):
        for piece in cut_pieces([path], size=100):
            list(read_documents(piece, TextFormat()))


@pytest.mark.parametrize(("name", "content", "complaint"), [
    ("a.txt", "我们去吃饭。\n".encode("gb18030") * 9, "line 1: byte 0xce .*iconv -f gb18030"),
    ("a.jsonl", '{"text": "我们去吃饭"}\n'.encode("gbk"), "line 1: byte 0xce .*iconv -f gb18030"),
    ("wiki_00", '{"text": "caf\xe9"}\n'.encode("latin-1"), "line 1: byte 0xe9 .*WINDOWS-1252"),
    ("a.json", '[{"text": "a"}]\n', "line 1: list as JSON; expected one JSON object a line"),
    ("a.jsonl", '{"id": 1}\n', 'line 1: no text; expected one JSON object a line with a "text"'),
    ("a.parquet", b"PAR1 no", "expected a whole Parquet file"), ("a.arrow", b"no", "Arrow file"),
    ("a.txt.gz", gzip.compress(b"One. " * 99, mtime=0)[:-9], "not a whole gzip file"),
    ("a.pdf", b"%PDF", r"--input_dir .*a.pdf: a file of unknown kind \(.pdf\); expected Wiki"),
    ("a.csv.gz", b"", "a file of unknown kind"), ("a.jsonl", "", "0 documents in 1 files"),
])
def test_what_cannot_be_read_is_one_line_that_names_it(tmp_path, capsys, name, content, complaint):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refused(capsys, path, tmp_path / "out" / "corpus.txt")
    assert str(path) in message and re.search(complaint, message), message
    assert not (tmp_path / "out" / "corpus.txt").exists()


def test_a_folder_without_anything_to_read_says_what_it_holds(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "dump.xml").write_text("<a>")
    message = refused(capsys, tmp_path / "in", tmp_path / "corpus.txt")
    assert "0 files that can be read (it holds dump.xml); expected WikiExtractor's" in message


def test_the_training_rows_of_a_task_are_documents_and_those_of_dev_and_test_are_not(
    tmp_path, capsys
):
    data = tmp_path / "reviews"
    data.mkdir()
    rows = [f'"好吃{number}。\n还会再来！",{number % 2}' for number in range(60)]
    (data / "reviews.csv").write_text("review,label\n" + "\n".join(rows) + "\n")
    flags = ["--data_dir", data, "--dev_share", "0.2", "--test_share", "0.2"]
    helpers.run(prepare_data, *flags, "--output_file", tmp_path / "corpus.txt")
    train = load_examples(find_task(None, data, 0.2, 0.2), data, "train")
    assert 20 < len(train) < 50
    assert (tmp_path / "corpus.txt").read_text().removesuffix("\n").split("\n\n") == [
        row.text_a for row in train]
    output = ["--output_file", tmp_path / "other.txt"]
    for more, complaint in ((["--documents", "file"], "--data_dir and --documents: the task says"),
                            (["--input", tmp_path], "--data_dir and --input_dir: the task says")):
        assert complaint in helpers.error_line(capsys, prepare_data, *flags, *output, *more)
    assert "--dev_share without --data_dir" in helpers.error_line(
        capsys, prepare_data, *flags[2:4], *output)
    assert "is an input" in helpers.error_line(
        capsys, prepare_data, *flags, "--output_file", data / "reviews.csv", "--overwrite")


def test_both_texts_of_a_pair_stand_in_its_document(tmp_path):
    data = helpers.make_glue(tmp_path / "RTE", "rte", rows=2)
    helpers.run(prepare_data, "--data_dir", data, "--punkt", "train", "--output_file",
                tmp_path / "corpus.txt")
    assert (tmp_path / "corpus.txt").read_text() == "\n".join(
        f"{row.text_a}\n{row.text_b}\n" for row in load_examples("rte", data, "train"))


def test_the_output_never_becomes_an_input(tmp_path, capsys):
    path = write_documents(tmp_path / "in", ".txt")
    for output in (path, tmp_path / "in" / "corpus.txt"):
        message = refused(capsys, tmp_path / "in", output, "--overwrite")
        assert f"--output_file {output}: the name and place of an input" in message
    assert "is an input" in refused(capsys, path, path, "--overwrite")
    path = write_documents(tmp_path / "json", ".json")
    for _ in range(2):  # its shards and metadata are JSON files, too
        run(tmp_path / "json", tmp_path / "json" / "corpus.txt", "--overwrite")
    assert (tmp_path / "json" / "corpus.txt").read_text() == CORPUS


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

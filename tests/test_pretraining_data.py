"""Next-sentence instances, masking, the files they are in and the dataset that reads them."""

import bz2
import gzip
import itertools
import json
import logging
import shutil
import signal
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from helpers import GOLDEN, SPECIAL, read_json, run, write_vocab
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kill import Process, script

import pregenerate_training_data
from transformer.corpus import (
    Corpus,
    EpochSettings,
    Instances,
    Masking,
    RandomNumbers,
    line_blocks,
    make_instances,
    mask_tokens,
    random_spans,
    tokenize_block,
    write_corpus,
)
from transformer.file_utils import UserError
from transformer.pretraining_data import PregeneratedDataset, find_epochs, read_metrics
from transformer.tokenization import BertTokenizer

WORDS = [f"w{number}" for number in range(60)]
PIECES = [*SPECIAL, *WORDS, "##x", "##y", "."]


# ------------------------------------------------------------------ helpers


def corpus_text(documents: int = 8, sentences: int = 30, seed: int = 0) -> str:
    """Random sentences of 1 to 12 words, some of two pieces, in documents."""
    random = Random(seed)

    def sentence() -> str:
        words = random.choices(WORDS, k=random.randint(1, 12))
        return " ".join(word + random.choice(["", "", "x", "xy"]) for word in words) + "."

    return "\n\n".join(
        "\n".join(sentence() for _ in range(sentences)) for _ in range(documents)
    ) + "\n"


def make_corpus(document_lengths: list[list[int]]) -> Corpus:
    """A corpus with sentences of the given lengths; each token's id is its own position."""
    sentences = list(itertools.chain.from_iterable(document_lengths))
    return Corpus(
        np.arange(sum(sentences)),
        np.cumsum([0, *sentences]),
        np.cumsum([0, *map(len, document_lengths)]),
    )


def read_corpus(path: Path, tokenizer: BertTokenizer, size: int = 1 << 18) -> Corpus:
    """Tokenize a file in blocks of `size` bytes; the arrays are files in a folder beside it."""
    folder = path.with_name(f"corpus_{size}")
    folder.mkdir()
    write_corpus(folder, (
        tokenize_block(tokenizer, block) for block in line_blocks(path, size)))
    return Corpus.open(folder, len(tokenizer))


def all_instances(corpus: Corpus, seed: int = 0, **settings) -> Instances:
    """The instances of one epoch."""
    parts = make_instances(corpus, EpochSettings(seed, **settings), 0)
    return Instances(*map(np.concatenate, zip(*parts, strict=True)))


def spans(instances: Instances) -> list[tuple[tuple[int, int], tuple[int, int], bool]]:
    """Instances as [start, end) of both segments, and whether the second is random."""
    _, first, first_length, second, second_length, is_random = instances
    return list(zip(
        zip(first.tolist(), (first + first_length).tolist(), strict=True),
        zip(second.tolist(), (second + second_length).tolist(), strict=True),
        is_random.tolist(), strict=True,
    ))


def document_of(corpus: Corpus, instances: Instances) -> np.ndarray:
    """The document of each instance's first segment."""
    return np.searchsorted(corpus.document_starts, instances.numbers, side="right") - 1


def arguments(tmp_path: Path, *flags: object, name: str = "out", text: str | None = None) -> list:
    """The command line that generates from random text."""
    (tmp_path / "corpus.txt").write_text(corpus_text() if text is None else text)
    write_vocab(tmp_path / "model", PIECES)
    return ["--train_corpus", tmp_path / "corpus.txt", "--output_dir", tmp_path / name,
            "--bert_model", tmp_path / "model", "--epochs_to_generate", 2, "--max_seq_len", 32,
            *flags]


def generate(tmp_path: Path, *flags: object, name: str = "out", text: str | None = None) -> Path:
    """Run pregenerate_training_data.py's main; return its output folder."""
    run(pregenerate_training_data, *arguments(tmp_path, *flags, name=name, text=text))
    return tmp_path / name


def generate_json(tmp_path: Path, *flags: object, **kwargs) -> Path:
    """The same, in the original's format."""
    return generate(tmp_path, "--format", "json", *flags, **kwargs)


def refused(capsys, tmp_path: Path, *flags: object, **kwargs) -> str:
    """Generate, expect exit code 2 and one error line, and return it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        generate(tmp_path, *flags, **kwargs)
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert exit_info.value.code == 2
    return line


def read_rows(folder: Path, epoch: int = 0) -> list[dict]:
    """All instances of an epoch, as plain JSON."""
    return [json.loads(line) for line in (folder / f"epoch_{epoch}.json").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    """All files in a folder, but for what they were made with."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "args.json"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> BertTokenizer:
    """The tokenizer of the random text."""
    return write_vocab(tmp_path_factory.mktemp("model"), PIECES)


# ------------------------------------------------------------------ documents


@pytest.mark.parametrize("size", [1, 2, 100, 5_000])
def test_documents_are_read_as_written_whatever_the_blocks(tokenizer, tmp_path, size):
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"\nw1 w2x\nw3\n \x1f\r\n\n\x00\n\nw4.\n\n" + corpus_text().encode())
    whole, joined = read_corpus(path, tokenizer), read_corpus(path, tokenizer, size)
    for left, right in zip(whole, joined, strict=True):
        assert isinstance(right.base, np.memmap) and (left == right).all()
    assert joined.token_ids.dtype == np.uint16
    words = tokenizer.convert_ids_to_tokens(joined.token_ids[:6])
    assert words == ["w1", "w2", "##x", "w3", "w4", "."]
    assert joined.sentence_starts[:4].tolist() == [0, 3, 4, 6]
    assert joined.document_starts[:3].tolist() == [0, 2, 3]


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("bad", [b"bad \xff byte", b"cut \xe2\x82", b"[MASK] \xc3"])
def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path, capsys, bad, workers):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"fine\n" * 100_000 + bad + b"\n")
    message = refused(capsys, tmp_path, "--train_corpus", path, "--num_workers", workers)
    assert f"{path}, line 100001: " in message and "UTF-8" in message
    assert list((tmp_path / "out").iterdir()) == []


def test_many_unknown_words_are_warned_of(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        generate(tmp_path, text="Nothing here is known.\nw1.\n\nNor here.\n")
    assert "[UNK]" in caplog.text


# ------------------------------------------------------------------ instances

document_lengths = st.lists(
    st.lists(st.integers(1, 30), min_size=1, max_size=25), min_size=2, max_size=6
)
settings_of_instances = {
    "document_sizes": document_lengths,
    "max_seq_len": st.integers(5, 64),
    "short_seq_prob": st.sampled_from([0.0, 0.3, 1.0]),
    "seed": st.integers(0, 1000),
}


@settings(max_examples=150, deadline=None)
@given(**settings_of_instances)
def test_pairs_fit_their_length_and_come_from_the_documents_in_order(
    document_sizes, max_seq_len, short_seq_prob, seed
):
    corpus = make_corpus(document_sizes)
    instances = all_instances(corpus, seed, max_seq_len=max_seq_len, short_seq_prob=short_seq_prob)
    documents = document_of(corpus, instances)
    borders = corpus.sentence_starts[corpus.document_starts].tolist()
    assert sorted(set(documents.tolist())) == list(range(corpus.documents))
    position = 0
    for document, (first, second, is_random) in zip(documents, spans(instances), strict=True):
        begin, end = borders[document : document + 2]
        position = max(position, begin)
        length = first[1] - first[0] + second[1] - second[0]
        assert first[1] > first[0] and second[1] > second[0]
        assert length + 3 <= max_seq_len
        assert position <= first[0] and first[1] <= end
        position = first[1]
        inside = begin <= second[0] and second[1] <= end
        assert inside is (not is_random)
        assert not inside or first[1] <= second[0]
        position = second[1] if inside else position


@settings(max_examples=100, deadline=None)
@given(**settings_of_instances)
def test_one_seq_covers_the_documents_once_with_single_segments(
    document_sizes, max_seq_len, short_seq_prob, seed
):
    corpus = make_corpus(document_sizes)
    instances = all_instances(
        corpus, seed, max_seq_len=max_seq_len, short_seq_prob=short_seq_prob, instances="packed"
    )
    assert not instances.second_lengths.any() and not instances.is_random_next.any()
    firsts = [first for first, _, _ in spans(instances)]
    assert all(0 < end - start <= max_seq_len - 2 for start, end in firsts)
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(firsts))
    if max(map(max, document_sizes)) == 1:  # then nothing is too long, so nothing is cut
        assert sum(end - start for start, end in firsts) == len(corpus.token_ids)


@settings(max_examples=100, deadline=None)
@given(**settings_of_instances, instances=st.sampled_from(["pairs", "packed"]),
       size=st.integers(1, 40))
@example([[1] * 60] * 2, 40, 0.0, 0, "pairs", 1)  # instances of many sentences
def test_how_the_sentences_are_divided_into_blocks_changes_nothing(
    document_sizes, max_seq_len, short_seq_prob, seed, instances, size
):
    corpus = make_corpus(document_sizes)
    settings = EpochSettings(seed, max_seq_len, short_seq_prob, instances)
    whole = list(make_instances(corpus, settings, 3))
    borders = itertools.pairwise(corpus.document_starts.tolist())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformer.corpus.SENTENCES_PER_BLOCK", size)
        parts = [block for border in borders for block in make_instances(
            corpus, settings, 3, *border)]
    for left, right in zip(zip(*whole, strict=True), zip(*parts, strict=True), strict=True):
        assert np.array_equal(np.concatenate(left), np.concatenate(right))


def test_random_sentences_come_from_documents_by_their_number_of_sentences():
    corpus = make_corpus([[1] * 10, [1] * 30, [1] * 60, [1] * 50])
    number = np.arange(20_000)
    drawn, _ = random_spans(
        corpus, RandomNumbers(1, 0), number, np.ones_like(number), np.ones_like(number)
    )
    share = [((low <= drawn) & (drawn < high)).mean()
             for low, high in ((0, 10), (10, 40), (40, 100), (100, 150))]
    assert share == pytest.approx([1 / 12, 0, 6 / 12, 5 / 12], abs=0.012)
    assert len(np.unique(drawn)) == 120


def test_half_of_the_splittable_pairs_are_random_and_what_they_leave_is_used_again():
    corpus = make_corpus([[10] * 30_000, [10] * 50])
    instances = all_instances(corpus, short_seq_prob=0.0)
    assert instances.is_random_next.mean() == pytest.approx(0.5, abs=0.025)
    used = np.zeros(300_500, dtype=bool)
    for first, second, is_random in spans(instances):
        used[slice(*first)] = True
        if not is_random:
            used[slice(*second)] = True
    # Only ends that were cut to fit are lost.
    assert used.mean() > 0.9


def test_the_share_of_short_documents_and_their_targets_are_as_asked_for():
    corpus = make_corpus([[1] * 400] * 2000)
    instances = all_instances(corpus, short_seq_prob=0.3, max_seq_len=103, instances="packed")
    lengths = instances.first_lengths[np.isin(instances.numbers, corpus.document_starts)]
    assert len(lengths) == 2000
    short = lengths[lengths < 101]
    # A short target is a number from 2 to 101, and 101 is the full length.
    assert len(short) / 2000 == pytest.approx(0.3 * 99 / 100, abs=0.04)
    assert (short.min(), short.max()) == (2, 100) and short.mean() == pytest.approx(51, abs=4)


# ------------------------------------------------------------------ a line is an instance


def line_rows(tmp_path: Path, tokenizer: BertTokenizer, text: str, length: int,
              *flags: object) -> list[list[int]]:
    """The ids that a model reads of each instance of --instances lines."""
    model = tmp_path / "vocabulary"
    tokenizer.save_vocabulary(model.mkdir(exist_ok=True) or model)
    folder = generate(tmp_path, "--instances", "lines", "--bert_model", model, "--max_seq_len",
                      length, "--overwrite_output_dir", *flags, text=text)
    dataset = PregeneratedDataset(folder, 0, tokenizer, length)
    batch = dataset.collate(range(len(dataset)), length)
    assert (batch["attention_mask"].sum(1).numpy() == dataset.lengths).all()
    seconds = batch["input_ids"].eq(tokenizer.sep_id).sum(1) == 2
    assert seconds.equal(batch["token_type_ids"].any(1))
    return [row[:count] for row, count in zip(
        batch["input_ids"].tolist(), dataset.lengths, strict=True)]


@pytest.mark.parametrize("length", [12, 16, 128])
def test_lines_are_the_instances_of_the_chinese_fork_and_a_tab_makes_a_pair(tmp_path, length):
    golden = read_json(GOLDEN / "chinese_fork_data.json")
    tokenizer = write_vocab(tmp_path / "fork", golden["vocab"])
    rows = line_rows(tmp_path, tokenizer, "\n".join(golden["corpus_lines"]) + "\n", length)
    # Its earlier state takes a tab for white space, its later one drops what follows it.
    earlier, later = (golden[f"instances_{commit}"][str(length)]
                      for commit in ("d3f36fd", "9760abd"))
    lines = [line for line in golden["corpus_lines"] if line.strip()]
    assert len(rows) == len(lines)
    [pair] = [number for number, line in enumerate(lines) if "\t" in line.strip()]
    assert rows[:pair] + rows[pair + 1 :] == later[:pair] + later[pair + 1 :]
    assert rows[:pair] + rows[pair + 1 :] == earlier[:pair] + earlier[pair + 1 :]
    first, end = later[pair], rows[pair].index(tokenizer.sep_id)
    assert rows[pair][:end] == first[:end] and len(rows[pair]) <= length
    if length == 128:
        assert rows[pair] == first + earlier[pair][len(first) - 1 :]


@pytest.mark.parametrize(("line", "length", "expected"), [
    ("w1 w2\tw3", 9, ["w1 w2|w3"]),
    ("w1 w2 w3 w4 w5\tw6", 7, ["w1 w2 w3|w6"]),  # the longer text is cut first
    ("w1\tw2 w3 w4 w5 w6", 7, ["w1|w2 w3 w4"]),
    ("w1 w2 w3 w4\tw5 w6 w7 w8", 8, ["w1 w2 w3|w5 w6"]),  # the second where they are equal
    ("w1 w2 w3 w4 w5", 5, ["w1 w2 w3"]),
    ("w1\tw2\tw3", 9, ["w1|w2 w3"]),  # a second tab is white space
    ("\tw1", 9, ["w1"]), ("w1\t", 9, ["w1"]), ("\u3000\tw1\t", 9, ["w1"]), ("\t", 9, []),
    ("w1\n\n \u3000\n\nw2", 9, ["w1", "w2"]),
    ("w1\r\nw2\tw3\r\n", 9, ["w1", "w2|w3"]),
])
def test_a_line_is_one_text_or_two_and_is_cut_at_its_end(
    tmp_path, tokenizer, line, length, expected
):
    rows = line_rows(tmp_path, tokenizer, f"{line}\nw9\n", length)
    texts = [" ".join(tokenizer.convert_ids_to_tokens(row[1:-1])) for row in rows]
    assert [text.replace(" [SEP] ", "|") for text in texts] == [*expected, "w9"]


line_lengths = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=2), min_size=1,
                        max_size=12)


@settings(max_examples=200, deadline=None)
@given(line_lengths, st.integers(5, 24), st.integers(1, 5))
@example([[20, 40], [3]], 10, 1)
def test_split_lines_lose_no_token_and_begin_with_what_cut_ones_keep(lines, length, size):
    corpus = make_corpus(lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformer.corpus.SENTENCES_PER_BLOCK", size)
        split, cut = (all_instances(corpus, instances="lines", long_lines=kind, max_seq_len=length)
                      for kind in ("split", "cut"))
    assert len(set(split.numbers.tolist())) == len(split.numbers)
    used = [token for first, second, _ in spans(split) for token in (*range(*first),
                                                                     *range(*second))]
    assert sorted(used) == list(range(len(corpus.token_ids)))
    assert (split.first_lengths > 0).all()
    assert (split.first_lengths + split.second_lengths
            <= length - 2 - (split.second_lengths > 0)).all()
    assert len(cut.numbers) == len(lines)
    document = document_of_token(corpus, split)
    assert (np.diff(document) >= 0).all()  # in the order of the lines
    begins = np.unique(document, return_index=True)[1]
    assert [spans(split)[place] for place in begins] == spans(cut)


def document_of_token(corpus: Corpus, instances: Instances) -> np.ndarray:
    """The document of each instance's first token."""
    starts = corpus.sentence_starts[corpus.document_starts]
    return np.searchsorted(starts, instances.first_starts, side="right") - 1


def test_what_lines_lose_is_said(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    flags = ["--instances", "lines", "--max_seq_len", 5]
    for text, level in (("w1 w2 w3 w4\n" * 4, "WARNING"), ("w1\n" * 40 + "w1 w2 w3 w4\n", "INFO")):
        caplog.clear()
        generate(tmp_path, *flags, "--overwrite_output_dir", text=text)
        [line] = [line for line in caplog.records if "left out" in line.getMessage()]
        assert line.levelname == level and "--long_lines split" in line.getMessage()
        generate(tmp_path, *flags, "--long_lines", "split", "--overwrite_output_dir", text=text)
        assert caplog.text.count("left out") == 1


def test_lines_are_the_same_in_every_epoch_and_whatever_the_seed(tmp_path):
    one, other = (contents(generate(tmp_path, "--instances", "lines", "--seed", seed, name=name))
                  for name, seed in (("a", 1), ("b", 2)))
    assert one == other and one["epoch_0.bin"] == one["epoch_1.bin"]


def test_flags_of_other_instances_are_refused_and_one_seq_is_packed(tmp_path, capsys):
    for flags, names in (
            (["--long_lines", "split"], ["--long_lines split", "--instances lines", "pairs"]),
            (["--instances", "lines", "--short_seq_prob", 0.1], ["--short_seq_prob 0.1", "packed"]),
            (["--instances", "lines", "--one_seq"], ["--one_seq", "--instances lines"])):
        message = refused(capsys, tmp_path, *flags)
        assert all(name in message for name in names), message
        assert not (tmp_path / "out").exists()
    packed = contents(generate(tmp_path, "--instances", "packed", name="packed"))
    for name, flags in (("old", ["--one_seq"]), ("both", ["--one_seq", "--instances", "packed"])):
        assert contents(generate(tmp_path, *flags, name=name)) == packed


# ------------------------------------------------------------------ files of a corpus


@pytest.mark.parametrize("instances", ["pairs", "packed", "lines"])
def test_several_files_folders_and_compressed_ones_give_the_instances_of_their_joined_text(
    tmp_path, monkeypatch, instances
):
    monkeypatch.setattr("transformer.pregeneration.BLOCK_BYTES", 500)
    texts = [corpus_text(3, seed=seed) + "w1.\nw2." for seed in range(3)]  # no line end
    flags = ["--instances", instances]
    expected = contents(generate(tmp_path, *flags, name="joined", text="\n\n".join(texts)))
    folder = tmp_path / "texts"
    (folder / "deeper").mkdir(parents=True)
    (folder / "a.txt").write_text(texts[0])
    (folder / "deeper" / "b.TXT.GZ").write_bytes(
        gzip.compress(texts[1][:999].encode()) + gzip.compress(texts[1][999:].encode()))
    (folder / "deeper" / "c.txt").write_bytes(bz2.compress(texts[2].encode()))  # by its content
    for ignored in (folder / "notes.md", folder / ".hidden.txt"):
        ignored.write_text("Not this.")
    files = [folder / "a.txt", folder / "deeper" / "b.TXT.GZ", folder / "deeper" / "c.txt"]
    for number, paths in enumerate(([folder], files, [files[0], folder / "deeper"])):
        for workers in (1, 2):
            made = generate(tmp_path, *flags, "--train_corpus", *paths, "--num_workers", workers,
                            name=f"{number}_{workers}")
            assert contents(made) == expected


def test_a_file_that_is_no_text_is_named_with_the_way_out(tmp_path, capsys):
    damaged = gzip.compress(corpus_text().encode())
    cases = {
        "a.txt": (b"PAR1\x15\x04", ["a Parquet file", "prepare_data.py"]),
        "wiki_00": (b'{"id": "1", "text": "A b."}\n', ["JSON lines", "prepare_data.py"]),
        "b.gz": (gzip.compress(b'{"text": "A b."}\n'), ["JSON lines"]),
        "c.zip": (b"PK\x03\x04rest", ["a zip archive"]),
        "half.gz": (damaged[: len(damaged) // 2], ["half.gz: not a whole gzip file"]),
        "wrong.gz": (damaged[:-8] + bytes(8), ["wrong.gz: not a whole gzip file"]),
        "bytes.gz": (gzip.compress(b"fine\nbad \xff\n"), ["bytes.gz, line 2", "UTF-8"]),
    }
    for name, (content, expected) in cases.items():
        (tmp_path / name).write_bytes(content)
        message = refused(capsys, tmp_path, "--train_corpus", tmp_path / name)
        assert name in message and all(text in message for text in expected), message
        assert not [*tmp_path.glob("out/*")]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "wiki_00").write_text("w1.")
    message = refused(capsys, tmp_path, "--train_corpus", tmp_path / "folder")
    assert "no .txt, .gz or .bz2 file" in message and "wiki_00" in message


# ------------------------------------------------------------------ cutting to length


def test_truncation_takes_from_both_ends():
    corpus = make_corpus([[500]] * 2)
    fronts = []
    for seed in range(200):
        for (start, end), (other, _), _ in spans(all_instances(corpus, seed, short_seq_prob=0.0)):
            assert end - start in (62, 63)
            fronts += [start % 500, other % 500]
    assert np.mean(fronts) == pytest.approx(437.5 / 2, abs=2)
    assert 8 < np.std(fronts) < 13  # binomial: sqrt(437.5 / 4) = 10.5


@pytest.mark.parametrize("flips", [1, 2, 63, 64, 65, 128, 200])
def test_heads_are_binomial(flips):
    number = np.arange(20_000)
    random = RandomNumbers(5, 1)
    heads = random.heads("first", number, np.full(20_000, flips))
    assert heads.min() >= 0 and heads.max() <= flips
    assert heads.mean() == pytest.approx(flips / 2, abs=5 * np.sqrt(flips / 4 / 20_000))
    assert heads.var() == pytest.approx(flips / 4, rel=0.06)
    # A number's flips do not depend on those of the others.
    mixed = random.heads("first", number, np.where(number % 2, flips, 0))
    assert (mixed == np.where(number % 2, heads, 0)).all()


def test_random_numbers_differ_by_seed_epoch_purpose_and_number():
    number = np.arange(1000)
    drawn = [
        RandomNumbers(seed, epoch).uniform(purpose, number)
        for seed in (1, 2) for epoch in (0, 1) for purpose in ("split", "next")
    ]
    assert len(np.unique(drawn)) == 8000
    assert np.min(drawn) >= 0 and np.max(drawn) < 1
    assert abs(np.corrcoef(drawn) - np.eye(8)).max() < 0.15
    assert abs(np.corrcoef(drawn[0][1:], drawn[0][:-1])[0, 1]) < 0.15


# ------------------------------------------------------------------ masking


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(5, 67), min_size=1, max_size=60).map(lambda ids: [2, *ids, 3]),
       probability=st.floats(0.01, 1.0), max_predictions=st.integers(1, 30),
       whole_words=st.booleans(), seed=st.integers(0, 1000))
def test_labels_restore_the_original_and_whole_words_are_masked_or_not_at_all(
    tokenizer, ids, probability, max_predictions, whole_words, seed
):
    masking = Masking(tokenizer, probability, max_predictions, whole_words)
    masked, positions, labels = mask_tokens(ids, masking, Random(seed))
    budget = min(max_predictions, max(1, round(len(ids) * probability)))
    assert positions == sorted(set(positions)) and len(positions) <= budget
    assert not {0, len(ids) - 1} & set(positions)
    for position, label in zip(positions, labels, strict=True):
        masked[position] = label
    assert masked == ids
    if not whole_words:
        assert len(positions) == min(budget, len(ids) - 2)
        return
    for position in range(2, len(ids) - 1):
        if PIECES[ids[position]].startswith("##"):
            assert (position in positions) == (position - 1 in positions)


def test_an_ideograph_is_a_word_of_its_own_also_where_whole_words_are_masked(tmp_path):
    golden = read_json(GOLDEN / "chinese_fork_data.json")
    tokenizer = write_vocab(tmp_path, golden["vocab"])
    text = next(line for line in golden["corpus_lines"] if line.startswith("今天"))
    ids = [tokenizer.cls_id, *tokenizer.encode_batch([text])[0], tokenizer.sep_id]
    one, other = (mask_tokens(ids, Masking(tokenizer, 0.3, 20, whole), Random(1))
                  for whole in (True, False))
    assert one == other and len(one[1]) > 1


def test_masked_tokens_are_80_percent_mask_and_10_percent_kept(tokenizer):
    ids = [2, *([10] * 20_000), 3]
    masked, positions, _ = mask_tokens(ids, Masking(tokenizer, 0.5, 10**6, False), Random(0))
    values = [masked[position] for position in positions]
    assert values.count(4) / len(values) == pytest.approx(0.8, abs=0.02)
    assert values.count(10) / len(values) == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("flags", [[], ["--do_whole_word_mask"]])
def test_masked_lm_prob_zero_masks_nothing(tmp_path, flags):
    rows = read_rows(generate_json(tmp_path, "--masked_lm_prob", "0", *flags))
    assert not any(row["masked_lm_positions"] or "[MASK]" in row["tokens"] for row in rows)


# ------------------------------------------------------------------ the script


def test_rows_have_the_originals_keys_and_layout(tmp_path, tokenizer):
    folder = generate_json(tmp_path, "--masked_lm_prob", "0.2", "--do_lower_case")
    rows = read_rows(folder)
    assert read_metrics(folder, 0) == (len(rows), 32)
    assert find_epochs(folder)[0] == 2
    lines = (folder / "epoch_0.json").read_text().splitlines()
    for line, row in zip(lines, rows, strict=True):
        assert list(row) == ["tokens", "segment_ids", "is_random_next", "masked_lm_positions",
                             "masked_lm_labels"]
        assert line == json.dumps(row)
        separator = row["segment_ids"].count(0) - 1
        assert row["tokens"][0] == "[CLS]"
        assert row["tokens"][separator] == row["tokens"][-1] == "[SEP]"
        assert len(row["tokens"]) == len(row["segment_ids"]) <= 32
        assert row["masked_lm_positions"]
    assert {row["is_random_next"] for row in rows} == {True, False}


VARIANTS = [
    [], ["--one_seq"], ["--instances", "lines", "--long_lines", "split", "--masked_lm_prob", "0.2"],
    ["--masked_lm_prob", "0.15"],
    ["--masked_lm_prob", "0.5", "--do_whole_word_mask", "--max_predictions_per_seq", "9"],
]


@pytest.mark.parametrize("flags", VARIANTS)
@pytest.mark.parametrize("kind", ["binary", "json"])
def test_workers_and_reduce_memory_combine_and_change_nothing(tmp_path, monkeypatch, flags, kind):
    # Small, so that this text is many blocks.
    monkeypatch.setattr("transformer.pregeneration.BLOCK_BYTES", 100)
    monkeypatch.setattr("transformer.pregeneration.SENTENCES_PER_BLOCK", 25)
    flags = [*flags, "--format", kind]
    expected = contents(generate(tmp_path, *flags, name="plain"))
    data = [".json"] if kind == "json" else [".bin"]
    data += ["_masks.bin"] * (kind == "binary" and "--masked_lm_prob" in flags)
    assert sorted(expected) == sorted([
        *(["corpus.bin", "corpus.json"] if kind == "binary" else []),
        *(f"epoch_{epoch}{end}" for epoch in range(2) for end in [*data, "_metrics.json"]),
    ])
    for more in (["--reduce_memory"], ["--num_workers", 3, "--reduce_memory"]):
        assert contents(generate(tmp_path, *flags, *more, name=f"{len(more)}")) == expected


@pytest.mark.parametrize("flags", VARIANTS)
@pytest.mark.parametrize("reduce_memory", [False, True])
def test_both_formats_give_the_same_batches(tmp_path, tokenizer, flags, reduce_memory):
    binary = generate(tmp_path, *flags, name="binary")
    json_lines = generate_json(tmp_path, *flags, name="json")
    for epoch in range(2):
        assert read_metrics(binary, epoch) == read_metrics(json_lines, epoch)
        left, right = (PregeneratedDataset(folder, epoch, tokenizer, 40, reduce_memory)
                       for folder in (binary, json_lines))
        assert len(left) == len(right) and (left.lengths == right.lengths).all()
        assert left.lengths is left.lengths  # computed once
        rows = np.random.default_rng(0).permutation(len(left))
        for pad_to in (None, 40):
            batch, other = left.collate(rows, pad_to), right.collate(rows, pad_to)
            assert all(values.equal(other[name]) for name, values in batch.items())


def test_the_seed_decides_and_epochs_differ(tmp_path):
    one, same, other = (contents(generate(tmp_path, "--seed", seed, name=name))
                        for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert one == same
    assert one["epoch_0.bin"] not in (other["epoch_0.bin"], one["epoch_1.bin"])


def test_bad_input_gives_one_line_and_no_files(tmp_path, capsys):
    for text, expected in (("", "0 documents"), ("\n \n\n", "0 documents"),
                           ("w1.\nw2.\n", "1 document, ")):
        message = refused(capsys, tmp_path, text=text)
        assert expected in message and list((tmp_path / "out").iterdir()) == []
    # One sentence a line without blank lines: the way out stands first.
    assert message.index("expected --instances lines") < message.index("a blank line")
    for text in ("", "\n \u3000\n\t\n"):
        assert "no line of text; expected one sentence a line" in refused(
            capsys, tmp_path, "--instances", "lines", text=text)
    assert read_rows(generate_json(tmp_path, "--one_seq", text="w1.\nw2.\n"))
    for flags in (["--masked_lm_prob", 1.5], ["--short_seq_prob", -1], ["--num_workers", 0],
                  ["--num_workers", 10**6], ["--epochs_to_generate", 0], ["--max_seq_len", 4],
                  ["--max_seq_len", 65536],
                  ["--data_url", "gs://bucket"], ["--train_corpus", tmp_path / "no.txt"],
                  ["--bert_model", tmp_path / "missing"]):
        assert str(flags[1]) in refused(capsys, tmp_path, *flags, name="other")
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("before", "after"), [("json", "binary"), ("binary", "json"),
                                               ("binary", "binary")])
def test_a_non_empty_output_folder_is_kept_unless_overwrite_is_given(
    tmp_path, capsys, before, after
):
    folder = generate(tmp_path, "--epochs_to_generate", 3, "--masked_lm_prob", 0.2, "--format",
                      before)
    (folder / "notes.txt").write_text("mine")
    old = contents(folder)
    assert "not empty" in refused(capsys, tmp_path)
    refused(capsys, tmp_path, "--overwrite_output_dir", text="")
    assert contents(folder) == old
    flags = ["--seed", 7, "--format", after]
    generate(tmp_path, "--overwrite_output_dir", *flags)
    fresh = contents(generate(tmp_path, *flags, name="fresh"))
    assert contents(folder) == {**fresh, "notes.txt": b"mine"}


def test_a_killed_call_leaves_nothing_that_passes_for_an_output_and_the_next_starts_again(
    tmp_path
):
    command = script("pregenerate_training_data.py", *arguments(tmp_path, "--num_workers", 2,
                                                                text=corpus_text(300, 100)))
    process = Process(command)
    process.wait_until(lambda log: [*(tmp_path / "out").glob(".unfinished*/epoch_0.bin")])
    process.kill()
    assert process.popen.returncode == -signal.SIGKILL
    assert [path.name[:11] for path in (tmp_path / "out").iterdir()] == [".unfinished"]
    with pytest.raises(UserError, match="no epoch_0.json and no epoch_0.bin"):
        find_epochs(tmp_path / "out")
    assert Process(command).end() == 0
    text = (tmp_path / "corpus.txt").read_text()
    assert contents(tmp_path / "out") == contents(generate(tmp_path, name="fresh", text=text))


@pytest.mark.parametrize("kind", ["json", "binary"])
def test_a_call_killed_while_it_renames_leaves_nothing_that_passes_for_an_output(
    tmp_path, monkeypatch, tokenizer, kind
):
    flags = ["--overwrite_output_dir", "--epochs_to_generate", 3, "--format", kind]
    old = contents(generate(tmp_path, *flags, name="old"))
    new = contents(generate(tmp_path, *flags, "--seed", 7, name="new"))
    folder, seen = tmp_path / "folder", []

    def watched(method):
        def call(path, *target, **options):
            shutil.copytree(folder, tmp_path / f"state_{len(seen)}")
            seen.append(tmp_path / f"state_{len(seen)}")
            return method(path, *target, **options)
        return call

    shutil.copytree(tmp_path / "old", folder)
    with monkeypatch.context() as patch:
        for name in ("unlink", "replace"):
            patch.setattr(Path, name, watched(getattr(Path, name)))
        generate(tmp_path, *flags, "--seed", 7, name="folder")
    assert contents(folder) == new
    for state in seen:  # what a kill would have left
        for folder_of_files in state.glob(".unfinished*"):
            shutil.rmtree(folder_of_files)
        try:
            assert len(PregeneratedDataset(state, 0, tokenizer)) > 0
        except UserError:
            continue
        found = {name: data for name, data in contents(state).items() if "tmp" not in name}
        assert found in (old, new)
    assert len(seen) >= 2 * len(old)


def test_torchrun_is_refused_and_data_url_copies_the_epochs(tmp_path, monkeypatch, capsys):
    copied = []
    monkeypatch.setattr(pregenerate_training_data, "upload_folder",
                        lambda folder, address: copied.append((folder, *address)))
    folder = generate(tmp_path, "--data_url", "s3://bucket/wiki/json/")
    assert copied == [(folder, "bucket", "wiki/json")]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun: one process" in refused(capsys, tmp_path, name="other")


# ------------------------------------------------------------------ the dataset


@pytest.mark.parametrize("reduce_memory", [False, True])
@pytest.mark.parametrize("flags", [["--masked_lm_prob", 0.15], ["--one_seq"]])
def test_the_dataset_gives_back_what_was_written(tmp_path, tokenizer, flags, reduce_memory):
    folder = generate_json(tmp_path, *flags)
    dataset = PregeneratedDataset(folder, 1, tokenizer, 40, reduce_memory)
    rows = read_rows(folder, 1)
    assert len(dataset) == len(rows) == len(dataset.lengths)
    batch, trimmed = (dataset.collate(range(len(rows)), pad_to) for pad_to in (40, None))
    assert all(values.dtype == torch.int64 for values in batch.values())
    longest = dataset.lengths.max()
    assert all(values.equal(batch[name][:, :longest]) for name, values in trimmed.items())
    for index, row in enumerate(rows):
        ids, mask, segments = (
            batch[name][index].tolist()
            for name in ("input_ids", "attention_mask", "token_type_ids"))
        length = len(row["tokens"])
        assert dataset.lengths[index] == length
        assert mask == [1] * length + [0] * (40 - length)
        assert tokenizer.convert_ids_to_tokens(ids[:length]) == row["tokens"]
        assert ids[length:] == [tokenizer.pad_id] * (40 - length)
        assert segments == row["segment_ids"] + [0] * (40 - length)


@pytest.fixture(scope="module")
def epochs(tmp_path_factory) -> dict[str, Path]:
    """Two epochs of both formats, with masks."""
    root = tmp_path_factory.mktemp("epochs")
    return {kind: generate(root, "--masked_lm_prob", 0.2, "--format", kind, name=kind)
            for kind in ("binary", "json")}


def test_a_vocabulary_of_more_than_16_bits_is_stored_in_32(tmp_path):
    pieces = [*PIECES, *(f"filler{number}" for number in range(70_000)), "late"]
    tokenizer = write_vocab(tmp_path / "wide", pieces)
    text = corpus_text().replace("w3 ", "late ")
    for kind in ("binary", "json"):
        folder = generate(tmp_path, "--format", kind, "--masked_lm_prob", 0.3, "--bert_model",
                          tmp_path / "wide", name=kind, text=text)
        dataset = PregeneratedDataset(folder, 0, tokenizer)
        batch = dataset.collate(range(len(dataset)))
        assert (batch["input_ids"] == len(pieces) - 1).any()


def test_fewer_epochs_than_asked_for_are_read_in_turn(epochs, tokenizer, caplog):
    caplog.set_level(logging.INFO)
    dataset = PregeneratedDataset(epochs["binary"], 3, tokenizer)
    assert dataset.epoch == 1
    first, again = (data.collate([0])["input_ids"]
                    for data in (dataset, PregeneratedDataset(epochs["binary"], 1, tokenizer)))
    assert first.equal(again)
    assert "2 epochs were generated" in caplog.text


def edited(**changes):
    """What changes fields of a JSON file."""
    return lambda content: json.dumps({**json.loads(content), **changes}).encode()


DAMAGES = [  # format, file, what becomes of its bytes (None: no file), complaint
    *[("binary", name, damage, f"{name}: .*expected")
      for name in ("corpus.bin", "epoch_0.bin", "epoch_0_masks.bin")
      for damage in (lambda old: old[:-1], lambda old: old * 2, lambda old: b"")],
    ("binary", "corpus.bin", None, "corpus.bin: no such file"),
    ("binary", "epoch_0_masks.bin", None, "epoch_0_masks.bin: no such file"),
    ("binary", "epoch_0.bin", None, "epoch_0.bin: no such file"),
    ("binary", "epoch_1_metrics.json", None, "epoch_1_metrics.json: no such file"),
    ("binary", "epoch_0.bin", lambda old: old[:39] + bytes(13) + old[52:], r"record 3 \(from 0\)"),
    ("binary", "epoch_0.bin", lambda old: old[:39] + b"\xff" * 13 + old[52:], "record 3"),
    ("binary", "corpus.json", edited(dtype=3), "corpus.json: expected dtype, tokens"),
    ("binary", "corpus.json", edited(tokens="9"), "corpus.json: expected dtype, tokens"),
    ("binary", "corpus.json", None, "corpus.json: no such file"),
    ("binary", "epoch_0_metrics.json", lambda old: b"[]", "expected a JSON object"),
    ("binary", "epoch_0_metrics.json", edited(num_training_examples=0), "positive integers"),
    ("json", "epoch_0.json", None, "epoch_0.json: no such file"),
    ("json", "epoch_1.json", None, "epoch_1.json: no such file"),
    ("json", "epoch_0.json", lambda old: old + b"[" * 100_000, r"epoch_0.json, line \d+: .*recurs"),
    ("json", "epoch_0.json", lambda old: b"", r"epoch_0.json: 0 rows; expected \d+,"),
    ("json", "epoch_0.json", lambda old: old * 2, r"epoch_0.json: \d+ rows; expected \d+,"),
    ("json", "epoch_0.json", lambda old: old[:-40], r"epoch_0.json, line \d+: .*expected the"),
    ("json", "epoch_0.bin", lambda old: b"", "both formats"),
]


@pytest.mark.parametrize(("kind", "name", "damage", "complaint"), DAMAGES)
def test_missing_and_damaged_files_are_named(
    epochs, tokenizer, tmp_path, kind, name, damage, complaint
):
    folder = shutil.copytree(epochs[kind], tmp_path / "data")
    if damage is None:
        (folder / name).unlink()
    else:
        old = (folder / name).read_bytes() if (folder / name).exists() else b""
        (folder / name).write_bytes(damage(old))
    with pytest.raises(UserError, match=complaint):
        PregeneratedDataset(folder, 0, tokenizer)


def test_folders_without_epochs_another_vocabulary_and_longer_rows_are_refused(
    epochs, tokenizer, tmp_path
):
    with pytest.raises(FileNotFoundError, match="missing"):
        find_epochs(tmp_path / "missing")
    with pytest.raises(UserError, match="no epoch_0.json and no epoch_0.bin"):
        find_epochs(tmp_path)
    swapped = write_vocab(tmp_path / "swapped", [*PIECES[:-2], PIECES[-1], PIECES[-2]])
    with pytest.raises(UserError, match="corpus.json: of the vocabulary with SHA-256 [0-9a-f]{12}"):
        PregeneratedDataset(epochs["binary"], 0, swapped)
    smaller = write_vocab(tmp_path / "smaller", [piece for piece in PIECES if piece != "w7"])
    with pytest.raises(UserError, match=r"epoch_0.json, line \d+: token 'w7' is not in the"):
        PregeneratedDataset(epochs["json"], 0, smaller)
    with pytest.raises(UserError, match="32 tokens; expected at most the --max_seq_length of 16"):
        PregeneratedDataset(epochs["binary"], 0, tokenizer, max_seq_length=16)


@pytest.mark.parametrize(("change", "complaint"), [
    ({"tokens": None}, "line 2"),
    ({"tokens": ["w1"] * 33, "segment_ids": [0] * 33}, "33 tokens; expected 1 to 32"),
    ({"segment_ids": [0]}, "segment ids"),
    ({"tokens": ["w1"] * 4, "segment_ids": [0] * 4}, "expected the tokens [CLS], text, [SEP]"),
    ({"tokens": ["[CLS]", "w1", "[SEP]", "[SEP]"], "segment_ids": [0, 0, 0, 1]}, "of a pair"),
    ({"tokens": [["w1"]], "segment_ids": [0]}, "line 2"),
])
def test_a_malformed_row_is_named_with_its_line(epochs, tokenizer, tmp_path, change, complaint):
    folder = shutil.copytree(epochs["json"], tmp_path / "data")
    rows = read_rows(folder)
    rows[1].update(change)
    (folder / "epoch_0.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="epoch_0.json, line 2") as error:
        PregeneratedDataset(folder, 0, tokenizer)
    assert complaint in str(error.value)

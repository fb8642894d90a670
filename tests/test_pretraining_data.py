"""Next-sentence instances, masking, the files they are in and the dataset that reads them."""

import http.server
import itertools
import json
import logging
import threading
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pregenerate_training_data
from transformer.file_utils import UserError
from transformer.pretraining_data import (
    IGNORED_LABEL,
    Corpus,
    Masking,
    PregeneratedDataset,
    build_corpus,
    count_epochs,
    document_instances,
    epoch_paths,
    mask_tokens,
    random_span,
    read_corpus_lines,
    read_metrics,
    samples_per_epoch,
)
from transformer.runtime import run_script
from transformer.tokenization import BertTokenizer

WORDS = [f"w{number}" for number in range(60)]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##x", "##y", "."]


# ------------------------------------------------------------------ helpers


def write_model(folder: Path, pieces: list[str] = PIECES) -> Path:
    """A model folder with only what a tokenizer needs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    return folder


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
        0,
    )


def generate(tmp_path: Path, *flags: str, name: str = "out", text: str | None = None) -> Path:
    """Run pregenerate_training_data.py's main on random text; return its output folder."""
    (tmp_path / "corpus.txt").write_text(corpus_text() if text is None else text)
    argv = [
        "--train_corpus", str(tmp_path / "corpus.txt"), "--output_dir", str(tmp_path / name),
        "--bert_model", str(write_model(tmp_path / "model")),
        "--epochs_to_generate", "2", "--max_seq_len", "32",
    ]
    parser = pregenerate_training_data.get_args_parser()
    run_script(pregenerate_training_data.main, parser, [*argv, *flags])
    return tmp_path / name


def refused(capsys, *args, **kwargs) -> str:
    """Generate, expect exit code 2 and one error line, and return that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        generate(*args, **kwargs)
    assert exit_info.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    return lines[0]


def read_rows(folder: Path, epoch: int = 0) -> list[dict]:
    """All instances of an epoch, as plain JSON."""
    return [json.loads(line) for line in epoch_paths(folder, epoch)[0].read_text().splitlines()]


def write_rows(folder: Path, rows: list[dict], epoch: int = 0) -> None:
    """Put other rows into an epoch's data file, metrics untouched."""
    epoch_paths(folder, epoch)[0].write_text("".join(json.dumps(row) + "\n" for row in rows))


def contents(folder: Path) -> dict[str, bytes]:
    """Everything in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def tokenizer(tmp_path) -> BertTokenizer:
    """The tokenizer of the random text."""
    return BertTokenizer.from_pretrained(write_model(tmp_path / "model"))


# ------------------------------------------------------------------ documents


def test_documents_are_read_as_written(tokenizer):
    lines = ["", "w1 w2x", "w3", "", "", "\x00", "", "w4.", ""]
    corpus = build_corpus([line.strip() for line in lines], tokenizer)
    assert (corpus.documents, corpus.sentences) == (2, 3)
    words = tokenizer.convert_ids_to_tokens(corpus.token_ids)
    assert words == ["w1", "w2", "##x", "w3", "w4", "."]
    assert corpus.sentence_starts.tolist() == [0, 3, 4, 6]
    assert corpus.document_starts.tolist() == [0, 2, 3]


def test_a_corpus_on_disk_is_the_corpus_in_memory(tokenizer, tmp_path):
    (tmp_path / "arrays").mkdir()
    lines = corpus_text().split("\n")
    in_memory = build_corpus(lines, tokenizer)
    on_disk = build_corpus(lines, tokenizer, tmp_path / "arrays")
    for other in (on_disk, Corpus.open(tmp_path / "arrays", len(tokenizer))):
        for left, right in zip(in_memory[:3], other[:3], strict=True):
            assert isinstance(right, np.memmap) and (left == right).all()
    assert in_memory.token_ids.dtype == np.uint16


def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path):
    (tmp_path / "corpus.txt").write_bytes(b"fine\nbad \xff byte\n")
    with pytest.raises(UserError, match=r"corpus.txt, line 2"):
        list(read_corpus_lines(tmp_path / "corpus.txt"))


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
    starts, document_starts = corpus.sentence_starts, corpus.document_starts
    for document in range(corpus.documents):
        begin, end = starts[document_starts[document]], starts[document_starts[document + 1]]
        position = begin
        instances = document_instances(
            corpus, document, Random(seed), max_seq_len=max_seq_len, short_seq_prob=short_seq_prob
        )
        for first, second, is_random in instances:
            length = first[1] - first[0] + second[1] - second[0]
            assert first[1] > first[0] and second[1] > second[0]
            assert length + 3 <= max_seq_len
            assert position <= first[0] and first[1] <= end
            position = first[1]
            inside = bool(begin <= second[0] and second[1] <= end)
            assert inside is (not is_random)
            assert not inside or first[1] <= second[0]
            position = second[1] if inside else position


@settings(max_examples=100, deadline=None)
@given(**settings_of_instances)
def test_one_seq_covers_the_document_once_with_single_segments(
    document_sizes, max_seq_len, short_seq_prob, seed
):
    corpus = make_corpus(document_sizes)
    for document in range(corpus.documents):
        instances = list(document_instances(
            corpus, document, Random(seed), max_seq_len=max_seq_len,
            short_seq_prob=short_seq_prob, one_seq=True,
        ))
        assert all(second is None and not is_random for _, second, is_random in instances)
        assert all(0 < end - start <= max_seq_len - 2 for (start, end), _, _ in instances)
        spans = [first for first, _, _ in instances]
        assert spans == sorted(spans)
        assert all(left[1] <= right[0] for left, right in itertools.pairwise(spans))
        sizes = document_sizes[document]
        if max(sizes) == 1:  # then nothing is too long, so nothing is cut
            assert sum(end - start for start, end in spans) == sum(sizes)


@settings(max_examples=100, deadline=None)
@given(document_lengths, st.integers(-5, 80), st.integers(0, 1000))
def test_a_random_span_is_whole_sentences_of_one_other_document(document_sizes, length, seed):
    corpus = make_corpus(document_sizes)
    starts = corpus.sentence_starts.tolist()
    for document in range(corpus.documents):
        start, end = random_span(corpus, document, length, Random(seed))
        first, last = starts.index(start), starts.index(end)
        owners = {
            int(np.searchsorted(corpus.document_starts, sentence, side="right")) - 1
            for sentence in range(first, last)
        }
        assert len(owners) == 1 and document not in owners
        owner_end = starts[corpus.document_starts[owners.pop() + 1]]
        assert end - start >= length or end == owner_end
        assert starts[last - 1] - start < max(1, length)


def test_random_sentences_come_from_documents_by_their_number_of_sentences():
    corpus = make_corpus([[1] * 10, [1] * 30, [1] * 60, [1] * 50])
    random = Random(1)
    drawn = [random_span(corpus, 1, 1, random)[0] for _ in range(6000)]
    share = [np.mean([low <= start < high for start in drawn])
             for low, high in ((0, 10), (10, 40), (40, 100), (100, 150))]
    assert share == pytest.approx([1 / 12, 0, 6 / 12, 5 / 12], abs=0.02)


def test_half_of_the_splittable_pairs_are_random_and_what_they_leave_is_used_again():
    corpus = make_corpus([[10] * 3000, [10] * 50])
    instances = list(document_instances(corpus, 0, Random(0), short_seq_prob=0.0))
    assert np.mean([instance.is_random_next for instance in instances]) == pytest.approx(
        0.5, abs=0.05
    )
    used = np.zeros(30000, dtype=bool)
    for first, second, is_random in instances:
        used[slice(*first)] = True
        if not is_random:
            used[slice(*second)] = True
    # Only ends that were cut to fit are lost.
    assert used.mean() > 0.9


def test_truncation_takes_from_both_ends():
    corpus = make_corpus([[500], [500]])
    fronts = set()
    for seed in range(20):
        ((first, second, _),) = document_instances(corpus, 0, Random(seed), short_seq_prob=0.0)
        fronts.add(first[0] > 0 and first[1] < 500)
        assert abs((first[1] - first[0]) - (second[1] - second[0])) <= 1
    assert fronts == {True}


# ------------------------------------------------------------------ masking

masked_inputs = {
    "ids": st.lists(st.integers(5, 67), min_size=1, max_size=60).map(lambda ids: [2, *ids, 3]),
    "probability": st.floats(0.01, 1.0),
    "max_predictions": st.integers(1, 30),
    "whole_words": st.booleans(),
    "seed": st.integers(0, 1000),
}


def masking_of(probability: float, max_predictions: int, whole_words: bool) -> Masking:
    """Masking by the vocabulary of this file."""
    continuations = frozenset(
        index for index, piece in enumerate(PIECES) if whole_words and piece.startswith("##")
    )
    return Masking(
        probability, max_predictions, 4, frozenset((2, 3)), len(PIECES), continuations
    )


@settings(max_examples=200, deadline=None)
@given(**masked_inputs)
def test_labels_at_their_positions_restore_the_original(
    ids, probability, max_predictions, whole_words, seed
):
    masking = masking_of(probability, max_predictions, whole_words)
    masked, positions, labels = mask_tokens(ids, masking, Random(seed))
    budget = min(max_predictions, max(1, round(len(ids) * probability)))
    assert positions == sorted(set(positions)) and len(positions) <= budget
    assert not {0, len(ids) - 1} & set(positions)
    for position, label in zip(positions, labels, strict=True):
        masked[position] = label
    assert masked == ids
    if not whole_words:
        assert len(positions) == min(budget, len(ids) - 2)


@settings(max_examples=200, deadline=None)
@given(**masked_inputs)
def test_whole_word_masking_takes_all_pieces_of_a_word_or_none(
    ids, probability, max_predictions, whole_words, seed
):
    masking = masking_of(probability, max_predictions, True)
    _, positions, _ = mask_tokens(ids, masking, Random(seed))
    for position in range(2, len(ids) - 1):
        if ids[position] in masking.continuation_ids:
            assert (position in positions) == (position - 1 in positions)


def test_masked_tokens_are_80_percent_mask_and_10_percent_kept():
    ids = [2, *([10] * 20_000), 3]
    masked, positions, _ = mask_tokens(ids, masking_of(0.5, 10**6, False), Random(0))
    values = [masked[position] for position in positions]
    assert values.count(4) / len(values) == pytest.approx(0.8, abs=0.02)
    assert values.count(10) / len(values) == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("flags", [[], ["--do_whole_word_mask"], ["--one_seq"]])
def test_masked_lm_prob_zero_masks_nothing(tmp_path, flags):
    rows = read_rows(generate(tmp_path, "--masked_lm_prob", "0", *flags))
    assert rows
    assert all(row["masked_lm_positions"] == row["masked_lm_labels"] == [] for row in rows)
    assert not any("[MASK]" in row["tokens"] for row in rows)


# ------------------------------------------------------------------ the script


def test_rows_have_the_originals_keys_and_layout(tmp_path, tokenizer):
    folder = generate(tmp_path, "--masked_lm_prob", "0.2", "--do_lower_case")
    rows = read_rows(folder)
    assert read_metrics(folder, 0) == (len(rows), 32)
    assert count_epochs(folder) == 2
    lines = epoch_paths(folder, 0)[0].read_text().splitlines()
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


@pytest.mark.parametrize("flags", [[], ["--one_seq"], ["--masked_lm_prob", "0.15"]])
def test_workers_and_reduce_memory_combine_and_change_nothing(tmp_path, flags):
    expected = contents(generate(tmp_path, *flags, name="plain"))
    assert sorted(expected) == [
        "epoch_0.json", "epoch_0_metrics.json", "epoch_1.json", "epoch_1_metrics.json",
    ]
    for number, more in enumerate(
        (["--reduce_memory"], ["--num_workers", "2"], ["--num_workers", "3", "--reduce_memory"])
    ):
        assert contents(generate(tmp_path, *flags, *more, name=str(number))) == expected


def test_one_seq_gives_one_segment_with_several_workers_too(tmp_path):
    for workers in ("1", "2"):
        rows = read_rows(generate(tmp_path, "--one_seq", "--num_workers", workers, name=workers))
        assert all(set(row["segment_ids"]) == {0} for row in rows)
        assert all(row["tokens"].count("[SEP]") == 1 for row in rows)
        assert not any(row["is_random_next"] for row in rows)


def test_the_seed_decides_and_epochs_differ(tmp_path):
    one, same, other = (
        contents(generate(tmp_path, "--seed", seed, name=name))
        for name, seed in (("a", "1"), ("b", "1"), ("c", "2"))
    )
    assert one == same
    assert one["epoch_0.json"] != other["epoch_0.json"]
    assert one["epoch_0.json"] != one["epoch_1.json"]


def test_bad_input_gives_one_line_and_no_files(tmp_path, capsys):
    for text, expected in (("", "0 documents"), ("\n \n\n", "0 documents"),
                           ("w1.\nw2.\n", "1 document")):
        assert expected in refused(capsys, tmp_path, text=text)
        assert list((tmp_path / "out").iterdir()) == []
    assert read_rows(generate(tmp_path, "--one_seq", text="w1.\nw2.\n"))
    for flags in (["--masked_lm_prob", "1.5"], ["--short_seq_prob", "-1"],
                  ["--num_workers", "0"], ["--epochs_to_generate", "0"], ["--max_seq_len", "4"],
                  ["--data_url", "gs://bucket"], ["--train_corpus", str(tmp_path)],
                  ["--bert_model", str(tmp_path / "missing")]):
        message = refused(capsys, tmp_path, *flags, name="other")
        assert flags[1] in message
        assert not (tmp_path / "other").exists()


def test_a_non_empty_output_folder_is_kept_unless_overwrite_is_given(tmp_path, capsys):
    folder = generate(tmp_path, "--epochs_to_generate", "3")
    before = contents(folder)
    assert "not empty" in refused(capsys, tmp_path)
    refused(capsys, tmp_path, "--overwrite_output_dir", text="")
    assert contents(folder) == before
    generate(tmp_path, "--overwrite_output_dir", "--seed", "7")
    assert count_epochs(folder) == 2
    assert contents(folder)["epoch_0.json"] != before["epoch_0.json"]


def test_data_url_copies_the_epochs_to_s3(tmp_path, monkeypatch, capsys):
    received: dict[str, bytes] = {}

    class Bucket(http.server.BaseHTTPRequestHandler):
        """As much of S3 as an upload needs."""

        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received[self.path] = body
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required", "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    folder = generate(tmp_path, "--data_url", "s3://bucket/wiki/json/")
    server.shutdown()
    server.server_close()
    uploaded = {path.removeprefix("/bucket/wiki/json/"): body for path, body in received.items()}
    assert uploaded == contents(folder)
    message = refused(capsys, tmp_path, "--data_url", "s3://bucket", name="unreachable")
    assert "s3://bucket" in message and str(tmp_path / "unreachable") in message
    assert count_epochs(tmp_path / "unreachable") == 2


# ------------------------------------------------------------------ the dataset


@pytest.mark.parametrize("reduce_memory", [False, True])
@pytest.mark.parametrize("flags", [["--masked_lm_prob", "0.15"], ["--one_seq"], []])
def test_the_dataset_gives_back_what_was_written(tmp_path, tokenizer, flags, reduce_memory):
    folder = generate(tmp_path, *flags)
    dataset = PregeneratedDataset(folder, 1, tokenizer, 40, reduce_memory)
    rows = read_rows(folder, 1)
    assert len(dataset) == len(rows) == len(dataset.lengths)
    for index, row in enumerate(rows):
        ids, mask, segments, labels, is_next = dataset[index]
        length = len(row["tokens"])
        assert ids.dtype == mask.dtype == segments.dtype == labels.dtype == torch.int64
        assert dataset.lengths[index] == length and mask.tolist() == [1] * length + [0] * (
            40 - length
        )
        assert tokenizer.convert_ids_to_tokens(ids[:length]) == row["tokens"]
        assert ids[length:].eq(tokenizer.pad_id).all()
        assert segments.tolist() == row["segment_ids"] + [0] * (40 - length)
        positions = labels.ne(IGNORED_LABEL).nonzero()[:, 0]
        assert positions.tolist() == row["masked_lm_positions"]
        assert tokenizer.convert_ids_to_tokens(labels[positions]) == row["masked_lm_labels"]
        assert int(is_next) == row["is_random_next"]
    with pytest.raises(IndexError):
        dataset[len(rows)]


def test_collate_trims_to_the_longest_row(tmp_path, tokenizer):
    dataset = PregeneratedDataset(generate(tmp_path, "--masked_lm_prob", "0.15"), 0, tokenizer, 40)
    indices = [3, 0, 5]
    batch = dataset.collate(indices)
    longest = dataset.lengths[indices].max()
    assert {name: tuple(values.shape) for name, values in batch.items()} == dict.fromkeys(
        ("input_ids", "token_type_ids", "attention_mask", "labels"), (3, longest)
    )
    for row, index in enumerate(indices):
        ids, mask, segments, labels, _ = dataset[index]
        assert batch["input_ids"][row].equal(ids[:longest])
        assert batch["attention_mask"][row].equal(mask[:longest])
        assert batch["token_type_ids"][row].equal(segments[:longest])
        assert batch["labels"][row].equal(labels[:longest])


def test_the_dataset_takes_2_bytes_a_token(tmp_path, tokenizer):
    dataset = PregeneratedDataset(generate(tmp_path), 0, tokenizer)
    assert dataset._token_ids.nbytes == 2 * dataset.lengths.sum()


def test_fewer_epochs_than_asked_for_are_read_in_turn(tmp_path, tokenizer, caplog):
    folder = generate(tmp_path)
    sizes = [len(read_rows(folder, epoch)) for epoch in range(2)]
    assert samples_per_epoch(folder, 5) == [sizes[0], sizes[1], sizes[0], sizes[1], sizes[0]]
    with caplog.at_level(logging.INFO):
        dataset = PregeneratedDataset(folder, 3, tokenizer)
    assert len(dataset) == sizes[1]
    assert dataset[0][0].equal(PregeneratedDataset(folder, 1, tokenizer)[0][0])
    assert "2 epochs were generated" in caplog.text


@pytest.mark.parametrize("change", ["fewer", "more", "none"])
def test_a_wrong_number_of_rows_is_an_error_with_both_numbers(tmp_path, tokenizer, change):
    folder = generate(tmp_path)
    rows = read_rows(folder)
    changed = {"fewer": rows[:-1], "more": [*rows, rows[0]], "none": []}[change]
    write_rows(folder, changed)
    with pytest.raises(
        UserError, match=rf"epoch_0.json: {len(changed)} rows; expected {len(rows)},"
    ):
        PregeneratedDataset(folder, 0, tokenizer)


def test_a_file_that_ends_within_a_row_is_an_error_with_the_line(tmp_path, tokenizer):
    folder = generate(tmp_path)
    data_file = epoch_paths(folder, 0)[0]
    count = len(read_rows(folder))
    data_file.write_bytes(data_file.read_bytes()[:-40])
    with pytest.raises(UserError, match=rf"epoch_0.json, line {count}: .*expected the {count}"):
        PregeneratedDataset(folder, 0, tokenizer)


def test_a_token_outside_the_vocabulary_is_named(tmp_path):
    folder = generate(tmp_path)
    other = BertTokenizer.from_pretrained(
        write_model(tmp_path / "other", [piece for piece in PIECES if piece != "w7"])
    )
    with pytest.raises(UserError, match=r"epoch_0.json, line \d+: token 'w7' is not in the"):
        PregeneratedDataset(folder, 0, other)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"tokens": None}, "tokens"),
        ({"tokens": ["w1"] * 33, "segment_ids": [0] * 33}, "33 tokens; expected 1 to 32"),
        ({"segment_ids": [0]}, "segment ids"),
        ({"is_random_next": 1}, "is_random_next"),
        ({"masked_lm_positions": [0, 1]}, "2 masked positions, but 0 labels"),
        ({"masked_lm_positions": [40], "masked_lm_labels": ["w1"]}, "masked positions from 0"),
        ({"tokens": [["w1"]], "segment_ids": [0]}, "line 2"),
    ],
)
def test_a_malformed_row_is_named_with_its_line(tmp_path, tokenizer, change, complaint):
    folder = generate(tmp_path)
    rows = read_rows(folder)
    rows[1].update(change)
    write_rows(folder, rows)
    with pytest.raises(UserError, match="epoch_0.json, line 2") as error:
        PregeneratedDataset(folder, 0, tokenizer)
    assert complaint in str(error.value)


def test_data_longer_than_the_model_is_told_is_an_error(tmp_path, tokenizer):
    with pytest.raises(UserError, match="32 tokens; expected at most the --max_seq_length of 16"):
        PregeneratedDataset(generate(tmp_path), 0, tokenizer, max_seq_length=16)


def test_missing_epochs_are_named(tmp_path, tokenizer):
    with pytest.raises(UserError, match="no such folder"):
        count_epochs(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no epoch_0.json"):
        count_epochs(tmp_path / "empty")
    folder = generate(tmp_path, "--epochs_to_generate", "3")
    epoch_paths(folder, 2)[1].unlink()
    with pytest.raises(UserError, match="epoch_2_metrics.json: no such file"):
        count_epochs(folder)
    epoch_paths(folder, 1)[0].unlink()
    with pytest.raises(UserError, match="epoch_1.json: no such file"):
        PregeneratedDataset(folder, 0, tokenizer)


@pytest.mark.parametrize("text", ["{}", "[]", '{"num_training_examples": "9", "max_seq_len": 9}'])
def test_wrong_metrics_are_an_error(tmp_path, text):
    folder = generate(tmp_path)
    epoch_paths(folder, 0)[1].write_text(text)
    with pytest.raises(UserError, match="epoch_0_metrics.json: expected positive integers"):
        samples_per_epoch(folder, 1)

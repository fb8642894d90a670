"""SQuAD: reading, windows, answers, metrics, and K-prune on it end to end."""

import json
import random

import numpy as np
import pytest
import torch
import transformers
from helpers import (
    BAD,
    GOOD,
    NEUTRAL,
    error_line,
    kprune_script,
    make_model,
    random_batch,
    read_json,
    run,
    tiny_config,
    write_vocab,
)
from tiny_tokenizers import LINES, byte_bpe, unigram

from transformer.checkpoint import save_pretrained
from transformer.file_utils import UserError
from transformer.modeling import BertForQuestionAnswering, model_inputs
from transformer.tokenization import BertTokenizer, load_tokenizer

kprune_main = kprune_script()
from dataset.squad import Question, make_windows, read_squad  # noqa: E402
from evaluate.squad import best_span, decode, exact_match, f1, squad_metrics  # noqa: E402

transformers.logging.set_verbosity_error()


def make_squad(path, questions=8, seed=0, unanswerable=False):
    """Write a SQuAD file whose answers are words of its paragraphs."""
    rng = random.Random(seed)
    paragraphs = []
    for number in range(questions):
        words = rng.choices(NEUTRAL, k=14)
        words[rng.randrange(14)] = answer = rng.choice(GOOD)
        context = " ".join(words) + " ."
        entry = {"id": f"q{number}", "question": "was it " + rng.choice(BAD),
                 "answers": [{"text": answer, "answer_start": context.index(answer)}]}
        if unanswerable and number % 2:
            entry |= {"answers": [], "is_impossible": True}
        paragraphs.append({"context": context, "qas": [entry]})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"data": [{"title": "x", "paragraphs": paragraphs}]}),
                    encoding="utf-8")


# ------------------------------------------------------------------ metrics


@pytest.mark.parametrize(("predicted", "gold", "exact", "overlap"), [
    ("The Cat", "cat!", 1, 1), ("a cat sat", "the cat", 0, 2 / 3), ("dog", "cat", 0, 0),
    ("", "", 1, 1), ("", "cat", 0, 0), ("cat", "", 0, 0), ("an", "the", 1, 1),
    ("cat cat", "cat", 0, 2 / 3), ("U.S.", "us", 1, 1), ("  two\twords ", "two words", 1, 1),
    ("another", "other", 0, 0), ("twenty-one", "twentyone", 1, 1),
])
def test_exact_match_and_f1_are_those_of_the_official_normalisation(
        predicted, gold, exact, overlap):
    assert exact_match(predicted, gold) == exact
    assert f1(predicted, gold) == pytest.approx(overlap)


def test_a_question_counts_with_its_best_answer_and_one_without_when_nothing_is_predicted():
    questions = [Question("1", "?", "", ("red fox", "the fox")), Question("2", "?", "", ("owl",))]
    assert squad_metrics(questions, {"1": "fox", "2": "grey owl"}) == {
        "exact_match": 0.5, "f1": pytest.approx((1 + 2 / 3) / 2)}
    questions = [Question("1", "?", "", ("fox",)), Question("2", "?", "", ()),
                 Question("3", "?", "", ())]
    found = squad_metrics(questions, {"1": "fox", "2": "", "3": "owl"})
    assert found == {"exact_match": pytest.approx(2 / 3), "f1": pytest.approx(2 / 3),
                     "answerable_f1": 1.0, "unanswerable_f1": 0.5}


# ------------------------------------------------------------------ spans and windows


def slow_best_span(start, end):
    best = (-np.inf, 0, 0)
    for first in range(len(start)):
        for last in range(first, min(len(end), first + 30)):
            best = max(best, (float(start[first] + end[last]), first, last), key=lambda x: x[0])
    return best


@pytest.mark.parametrize("places", [1, 2, 15, 60])
def test_the_best_span_is_that_of_trying_all_of_at_most_thirty_places(places):
    for seed in range(20):
        start, end = np.random.default_rng(seed).normal(size=(2, places)).astype(np.float32)
        assert best_span(start, end)[1:] == slow_best_span(start, end)[1:]
    assert best_span(start[:0], end[:0]) == (-np.inf, 0, 0)


@pytest.fixture()
def tokenizer(tmp_path):
    return write_vocab(tmp_path / "vocabulary")


def test_windows_overlap_cover_the_paragraph_and_carry_the_question(tokenizer):
    context = " ".join(random.Random(0).choices(NEUTRAL, k=50))
    windows = make_windows([Question("1", "was it good", context, ())], tokenizer, 20, 5)
    asked = tokenizer.encode_batch(["was it good"])[0]
    ids = tokenizer.encode_batch([context])[0]
    starts = []
    for window in range(len(windows.features)):
        row = windows.features.collate([window])
        length = int(row["attention_mask"].sum())
        first = windows.context_start(window)
        cells = row["input_ids"][0, :length].tolist()
        assert length <= 20
        assert cells[:first] == [tokenizer.cls_id, *asked, tokenizer.sep_id]
        assert cells[-1] == tokenizer.sep_id
        assert row["token_type_ids"][0].tolist() == [0] * first + [1] * (length - first)
        starts.append(windows.pieces[window][0][0])
        for piece, (left, right) in zip(cells[first:-1], windows.pieces[window], strict=True):
            assert tokenizer.convert_ids_to_tokens([piece]) == [context[left:right]]
    assert starts == sorted(set(starts)) and starts[0] == 0
    assert windows.pieces[-1][-1][1] == len(context)
    assert len(windows.features) == 1 + -(-(len(ids) - 14) // 5)


@pytest.mark.parametrize("make", [byte_bpe, unigram])
def test_windows_of_other_tokenizers_are_those_of_autotokenizer(tmp_path, make):
    tokenizer = load_tokenizer(make(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = " ".join(LINES[:3])
    windows = make_windows([Question("1", "Was it good?", text, ())], tokenizer, 36, 5)
    asked = theirs("Was it good?", text, max_length=36, truncation="only_second",
                   return_overflowing_tokens=True, return_offsets_mapping=True, padding=False,
                   stride=36 - windows.context_start(0) - 1 - 5)
    assert len(asked["input_ids"]) == len(windows.question) > 1
    for window, ids in enumerate(asked["input_ids"]):
        batch, start = windows.features.collate([window]), windows.context_start(window)
        assert batch["input_ids"][0].tolist() == ids
        assert [*map(tuple, windows.pieces[window])] == asked["offset_mapping"][window][start:-1]
        assert bool(batch["token_type_ids"].any()) == tokenizer.segments


def test_the_answer_is_cut_from_the_text_of_the_best_window_with_its_capitals(tokenizer):
    questions = [Question("1", "was it good", "The film, it WAS Lovely.", ("x",)),
                 Question("2", "was it bad", "a sad story", ())]
    windows = make_windows(questions, tokenizer, 32)
    logits = [np.zeros((length, 2), np.float32) for length in windows.features.lengths]
    first = windows.context_start(0)
    logits[0][first + 4, 0] = logits[0][first + 5, 1] = 5.0
    logits[1][0] = 3.0  # no answer
    assert decode(questions, windows, logits, unanswerable=True) == {"1": "WAS Lovely", "2": ""}
    assert decode(questions, windows, logits, unanswerable=False)["2"] != ""


@pytest.mark.parametrize(("content", "expected"), [
    ("{", "not valid JSON"), ("[]", "JSON object"), ('{"data": []}', "no questions"),
    ('{"data": [{"paragraphs": [{"context": "x", "qas": [{"id": "1"}]}]}]}', "question"),
])
def test_a_broken_file_is_one_error_that_names_it(tmp_path, content, expected):
    (tmp_path / "dev.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=rf"dev\.json.*{expected}"):
        read_squad(tmp_path / "dev.json")


@pytest.mark.parametrize(("place", "value", "expected"), [
    ("id", 7, "question 7: id is 7; expected a string"),
    ("context", ["x"], "question 'q1': context is .*expected a string"),
    ("answers", ["x"], "question 'q1': an answer is .*expected an object"),
    ("answers", [{"text": 3, "answer_start": 0}], "question 'q1': an answer's text is 3; expected"),
    ("answers", [{"text": "x", "answer_start": True}], "answer_start is True.*whole number"),
    ("is_impossible", "no", "question 'q1': is_impossible is 'no'.*true or false"),
    ("id", "q0", "question 'q0' is there more than once"),
])
def test_a_value_of_a_wrong_type_is_one_error_that_names_file_and_question(
        tmp_path, place, value, expected):
    make_squad(tmp_path / "dev.json", questions=2)
    content = read_json(tmp_path / "dev.json")
    paragraph = content["data"][0]["paragraphs"][1]
    (paragraph if place == "context" else paragraph["qas"][0])[place] = value
    (tmp_path / "dev.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=rf"dev\.json: .*{expected}"):
        read_squad(tmp_path / "dev.json")


# ------------------------------------------------------------------ model and script


@torch.no_grad()
def test_the_question_answerer_agrees_with_hugging_face(tmp_path):
    ours = make_model(tmp_path, BertForQuestionAnswering)
    theirs = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path).eval()
    ids, segments, mask = random_batch()
    expected = theirs(ids, token_type_ids=segments, attention_mask=mask)
    found = ours(ids, segments, mask).logits[mask.bool()]
    torch.testing.assert_close(found[:, 0], expected.start_logits[mask.bool()], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[:, 1], expected.end_logits[mask.bool()], atol=1e-5, rtol=0)


def arguments(root, task="squad", *more):
    return ["--model_name", root / "model", "--ckpt_dir", root / "model", "--task_name", task,
            "--data_dir", root / "data", "--output_dir", root / "out", "--constraint", "0.3",
            "--num_tokens", "150", "--max_seq_length", "16", "--no_cuda", *more]


@pytest.mark.parametrize(("task", "version"), [("squad", "v1.1"), ("squad_v2", "v2.0")])
def test_the_script_prunes_a_question_answerer(tmp_path, task, version):
    make_model(tmp_path / "model", BertForQuestionAnswering)
    for seed, split in enumerate(("train", "dev")):
        make_squad(tmp_path / "data" / f"{split}-{version}.json", seed=seed,
                   unanswerable=task == "squad_v2")
    run(kprune_main, *arguments(tmp_path, task, "--sublayerwise_tuning"))
    written = read_json(tmp_path / "out" / "kprune.json")
    assert written["flops_removed"] > 0.3
    assert {"exact_match", "f1"} <= set(written["after"]["metrics"])
    assert ("unanswerable_f1" in written["after"]["metrics"]) == (task == "squad_v2")
    pruned = BertForQuestionAnswering.from_pretrained(tmp_path / "out")
    assert pruned.config.neurons == written["neurons_per_layer"]


def test_parts_of_rows_are_refused_where_squad_has_its_own_files(tmp_path, capsys):
    message = error_line(capsys, kprune_main, *arguments(tmp_path, "squad", "--dev_share", "0.1"))
    assert "--dev_share" in message and "squad" in message


def test_missing_data_is_one_clear_line(tmp_path, capsys):
    make_model(tmp_path / "model", BertForQuestionAnswering)
    message = error_line(capsys, kprune_main, *arguments(tmp_path, "squad_v2"))
    assert "train-v2.0.json" in message and "squad_v2" in message
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_trained_span_head_is_one_clear_line(tmp_path, capsys):
    make_model(tmp_path / "model")
    for split in ("train", "dev"):
        make_squad(tmp_path / "data" / f"{split}-v1.1.json")
    message = error_line(capsys, kprune_main, *arguments(tmp_path))
    assert "holds no trained span head; expected a model" in message


def test_a_model_that_has_learned_to_answer_keeps_answering_after_pruning(tmp_path):
    """A few steps of training on the answers' places, then K-prune: f1 stays."""
    torch.manual_seed(0)
    config = tiny_config(hidden_size=32, num_hidden_layers=2, intermediate_size=64,
                         initializer_range=0.1)
    model = BertForQuestionAnswering(config)
    save_pretrained(model, tmp_path / "model", write_vocab(tmp_path / "model"))
    for seed, split in enumerate(("train", "dev")):
        make_squad(tmp_path / "data" / f"{split}-v1.1.json", 64, seed)
    tokenizer = BertTokenizer.from_pretrained(tmp_path / "model")
    questions = read_squad(tmp_path / "data" / "train-v1.1.json")
    windows = make_windows(questions, tokenizer, 64)
    batch = windows.features.collate(range(64))
    places = []
    for window, question in enumerate(questions):
        spans = [question.context[left:right] for left, right in windows.pieces[window]]
        places.append(windows.context_start(window) + spans.index(question.answers[0]))
    aims = torch.tensor(places)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        logits = model(*model_inputs(batch)).logits
        loss = sum(torch.nn.functional.cross_entropy(logits[..., side], aims) for side in (0, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_pretrained(model, tmp_path / "model")
    run(kprune_main, *arguments(tmp_path, "squad", "--sublayerwise_tuning", "--lam_rep", "2.5e-4",
                                "--max_seq_length", "64"))
    written = read_json(tmp_path / "out" / "kprune.json")
    assert written["before"]["metrics"]["f1"] > 0.9
    assert written["after"]["metrics"]["f1"] > 0.9

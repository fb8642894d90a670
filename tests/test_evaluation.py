"""Metrics, evaluation and result files: right numbers, in the right order, said loudly."""

import json
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from transformer import evaluation
from transformer.evaluation import (
    Selection,
    compute_metrics,
    evaluate,
    majority_baseline,
    warn_of_chance,
    write_results,
)
from transformer.features import Features
from transformer.file_utils import UserError
from transformer.modeling import BertConfig
from transformer.tasks import GLUE_TASKS

PAD = 0


def make_features(rows, labels, label_names=("0", "1")):
    """Features of the given word-piece rows, each of one segment."""
    lengths = [len(row) for row in rows]
    return Features(
        ids=np.array([piece for row in rows for piece in row], dtype=np.uint16),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        first_lengths=np.array(lengths, dtype=np.int32),
        labels=torch.tensor(labels),
        label_names=label_names,
        pad_id=PAD,
    )


class BagOfPieces(nn.Module):
    """A classifier whose logits are the sum of one vector a piece; padding does not count."""

    def __init__(self, num_labels, vocabulary=50):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(vocabulary, num_labels, generator=generator))
        self.dropout = nn.Dropout(0.5)
        self.config = BertConfig()
        self.widths = set()

    def forward(self, input_ids, token_type_ids, attention_mask, score_layers):
        self.widths.add(input_ids.shape[1])
        pieces = self.dropout(self.table[input_ids]) * attention_mask[..., None]
        return pieces.sum(1), [], []


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 20, (37,), generator=generator).tolist()
    return [torch.randint(1, 50, (n,), generator=generator).tolist() for n in lengths]


def one_hot(classes, count=2):
    return np.eye(count, dtype=np.float32)[np.array(classes)]


# ------------------------------------------------------------------ metrics


def test_f1_and_mcc_agree_with_a_count_by_hand():
    gold = np.array([1, 1, 1, 0, 0, 0, 0, 1])
    predicted = one_hot([1, 0, 1, 0, 1, 0, 0, 1])  # 3 true positives, 1 false, 1 missed, 3 negative
    metrics = compute_metrics("mrpc", predicted, gold)
    assert metrics == pytest.approx({"acc": 0.75, "f1": 0.75, "acc_and_f1": 0.75})
    expected = (3 * 3 - 1 * 1) / math.sqrt(4 * 4 * 4 * 4)
    assert compute_metrics("cola", predicted, gold) == pytest.approx({"mcc": expected})


def test_f1_counts_the_paraphrases_whatever_their_class_number():
    gold, predicted = np.array([1, 1, 1, 0]), np.array([1, 0, 1, 0])
    usual = compute_metrics("mrpc", one_hot(predicted), gold, ("0", "1"))
    swapped = compute_metrics("mrpc", one_hot(1 - predicted), 1 - gold, ("1", "0"))
    assert usual == swapped == pytest.approx({"acc": 0.75, "f1": 0.8, "acc_and_f1": 0.775})


def test_correlations_agree_with_their_definitions():
    gold = np.array([0.0, 1.0, 2.0, 5.0], dtype=np.float32)
    predicted = np.array([[0.1], [0.0], [2.0], [9.0]], dtype=np.float32)
    metrics = compute_metrics("sts-b", predicted, gold)
    assert metrics["pearson"] == pytest.approx(np.corrcoef(predicted[:, 0], gold)[0, 1])
    assert metrics["spearmanr"] == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * (16 - 1))
    assert metrics["corr"] == pytest.approx((metrics["pearson"] + 0.8) / 2)


@pytest.mark.parametrize("name", GLUE_TASKS)
def test_every_task_reports_exactly_the_metrics_of_its_table_row(name):
    task = GLUE_TASKS[name]
    gold = np.arange(12) % (task.num_labels if task.labels else 5)
    logits = gold[:, None].astype(np.float32) if task.is_regression else one_hot(gold, 3)
    metrics = compute_metrics(name, logits, gold)
    assert set(metrics) == set(task.metrics)
    assert all(value == pytest.approx(1.0) for value in metrics.values())


def test_macro_f1_is_the_mean_over_the_classes_that_occur_or_are_predicted():
    task = replace(GLUE_TASKS["mnli"], labels=("a", "b", "c", "d"), metrics=("macro_f1", "acc"))
    gold, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 1])
    # a: precision 1, recall 2/3; b: 2/4 and 1; c: never predicted; d: neither.
    metrics = compute_metrics(task, one_hot(predicted, 4), gold)
    assert metrics == pytest.approx({"macro_f1": (0.8 + 2 / 3 + 0) / 3, "acc": 4 / 6})


@pytest.mark.parametrize("metrics", [("mcc", "acc"), ("acc", "mcc", "macro_f1"), ("macro_f1",)])
def test_a_task_may_name_any_metrics_for_any_number_of_classes(metrics):
    task = replace(GLUE_TASKS["cola"], labels=tuple(map(str, range(119))), metrics=metrics)
    gold = np.arange(300) % 119
    assert compute_metrics(task, one_hot(gold, 119), gold) == dict.fromkeys(metrics, 1.0)
    assert Selection(task).metric == metrics[0]


@pytest.mark.parametrize(
    ("task", "logits", "said"),
    [
        ("rte", one_hot([1, 1, 1, 1]), "one class only ('not_entailment') for all 4 rows"),
        ("cola", one_hot([0, 0, 0, 0]), "one class only ('0') for all 4 rows"),
        ("sts-b", np.full((4, 1), 2.5), "one score only for all 4 rows"),
        ("sts-b", np.array([[1], [np.nan], [2], [3]]), "not finite"),
    ],
)
def test_a_constant_answer_is_said_loudly_and_never_scored_nan(task, logits, said, caplog):
    with caplog.at_level(logging.WARNING):
        metrics = compute_metrics(task, logits, np.array([0, 1, 1, 0]))
    assert said in caplog.text
    assert all(math.isfinite(value) for value in metrics.values())
    if task != "rte":
        assert set(metrics.values()) == {0.0}


def test_varied_answers_are_not_warned_about(caplog):
    compute_metrics("rte", one_hot([0, 1, 1, 1]), np.array([1, 1, 0, 1]))
    compute_metrics("rte", one_hot([0]), np.array([0]))
    assert not caplog.records


def test_majority_baseline_is_the_share_of_the_most_common_class(caplog):
    labels = ["1", "1", "0", "1"]
    assert majority_baseline("sst-2", labels) == {"acc": 0.75}
    assert majority_baseline("cola", labels) == {"mcc": 0.0}
    assert majority_baseline("mrpc", labels)["f1"] == pytest.approx(2 * 0.75 / 1.75)
    assert majority_baseline("sts-b", ["2.5", "4"]) == {
        "pearson": 0.0, "spearmanr": 0.0, "corr": 0.0}
    own = replace(GLUE_TASKS["mnli"], labels=("\u597d\u8bc4", "1", "0"), metrics=("macro_f1",))
    assert majority_baseline(own, labels) == {"macro_f1": pytest.approx(6 / 7 / 2)}
    assert not caplog.records


def counts(**rows):
    return {label: {"rows": count, "predicted": 0, "correct": 0} for label, count in rows.items()}


@pytest.mark.parametrize(("metrics", "rows", "said"), [
    ({"acc": 0.6}, {"a": 6, "b": 4}, "acc 0.6000 on dev is no better than always predicting 'a',"
     " the commonest of 2 classes (60.0 % of 10 rows): that gives 0.6000"),
    ({"acc": 0.61}, {"a": 6, "b": 4}, ""),
    ({"acc": 0.01}, {f"c{n}": 1 + (n == 7) for n in range(119)}, "'c7', the commonest of 119"),
    ({"acc": 1.0}, {"a": 6, "b": 0}, ""),  # nothing to tell apart
    ({"acc": float("nan")}, {"a": 6, "b": 4}, "acc nan"),
])
def test_a_final_score_that_the_commonest_class_reaches_is_said_loudly(
        metrics, rows, said, caplog):
    task = replace(GLUE_TASKS["mnli"], labels=tuple(rows))
    warn_of_chance(task, {"dev": metrics}, {"dev": counts(**rows)})
    assert (said in caplog.text) if said else not caplog.records


def test_the_commonest_class_is_judged_by_the_metric_that_selects(caplog):
    per_class = {"dev": counts(**{"0": 3, "1": 7})}
    warn_of_chance(GLUE_TASKS["cola"], {"dev": {"mcc": 0.0}}, per_class)
    assert "mcc 0.0000 on dev is no better than always predicting '1'" in caplog.text
    caplog.clear()
    warn_of_chance(GLUE_TASKS["cola"], {"dev": {"mcc": 0.1}}, per_class)
    warn_of_chance(GLUE_TASKS["sts-b"], {"dev": {"corr": 0.0}}, {})
    assert not caplog.records


# ------------------------------------------------------------------ evaluate


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_results_come_in_the_order_of_the_rows_whatever_the_batch_size(rows, batch_size):
    model = BagOfPieces(3)
    gold = [number % 3 for number in range(len(rows))]
    features = make_features(rows, gold, ("contradiction", "entailment", "neutral"))
    result = evaluate(model, features, "mnli", "cpu", batch_size)
    expected = torch.stack([model.table[row].sum(0) for row in rows]).detach()
    np.testing.assert_allclose(result["logits"], expected.numpy(), rtol=1e-4, atol=1e-5)
    assert result["predictions"].tolist() == expected.argmax(1).tolist()
    assert result["logits"].dtype == np.float32
    right = expected.argmax(1) == torch.tensor(gold)
    assert result["metrics"]["acc"] == pytest.approx(float(right.float().mean()))
    assert list(result["per_class"]) == ["contradiction", "entailment", "neutral"]
    for number, counted in enumerate(result["per_class"].values()):
        assert counted == {
            "rows": gold.count(number), "predicted": int((expected.argmax(1) == number).sum()),
            "correct": int(right[torch.tensor(gold) == number].sum())}


def test_a_gpu_gets_widths_in_multiples_of_8_that_the_model_can_take(rows, monkeypatch):
    model = BagOfPieces(2).eval().requires_grad_(False)
    features = make_features(rows, [0] * len(rows))
    model.config.max_position_embeddings = int(features.lengths.max())
    monkeypatch.setattr(evaluation, "padding_multiple", lambda device: 8)
    evaluate(model, features, "rte", "cpu", 1)
    assert model.widths == {8, 16, model.config.max_position_embeddings}


def test_regression_is_judged_by_correlation(rows):
    model = BagOfPieces(1)
    expected = torch.stack([model.table[row].sum() for row in rows]).detach()
    result = evaluate(model, make_features(rows, (expected + 0.5).tolist(), ()), "sts-b", "cpu")
    assert result["metrics"]["corr"] == pytest.approx(1.0)
    np.testing.assert_allclose(result["predictions"], expected.numpy(), rtol=1e-4, atol=1e-5)
    assert result["per_class"] == {}


def test_dropout_is_off_during_evaluation_and_the_model_is_not_touched(rows):
    model = BagOfPieces(2)
    features = make_features(rows, [number % 2 for number in range(len(rows))])
    model.train()
    model.dropout.eval()  # a frozen part of a model in training
    first, second = (evaluate(model, features, "rte", "cpu")["logits"] for _ in range(2))
    assert np.array_equal(first, second)
    assert model.training and not model.dropout.training


def test_a_precision_is_that_of_the_computation_only(rows):
    model = BagOfPieces(2)
    features = make_features(rows, [number % 2 for number in range(len(rows))])
    exact = evaluate(model, features, "rte", "cpu", 10)["logits"]
    rounded = evaluate(model, features, "rte", "cpu", 10, torch.bfloat16)["logits"]
    assert rounded.dtype == np.float32 and model.table.dtype == torch.float32
    assert not np.array_equal(rounded, exact)
    np.testing.assert_allclose(rounded, exact, rtol=0.05, atol=0.05)


def test_no_rows_are_the_users_error(rows):
    features = make_features(rows, [0] * len(rows))
    with pytest.raises(UserError, match="no rows of rte"):
        evaluate(BagOfPieces(2), features.subset([]), "rte", "cpu")


def test_f1_of_a_checkpoint_with_swapped_labels_is_the_same(rows):
    model, swapped = BagOfPieces(2), BagOfPieces(2)
    swapped.table.data = model.table.data.flip(1)
    gold = [number % 3 > 0 for number in range(len(rows))]
    usual = make_features(rows, [int(label) for label in gold], ("0", "1"))
    other = make_features(rows, [1 - int(label) for label in gold], ("1", "0"))
    expected = evaluate(model, usual, "qqp", "cpu")["metrics"]
    assert evaluate(swapped, other, "qqp", "cpu")["metrics"] == pytest.approx(expected)


# ------------------------------------------------------------------ result files


def test_result_files_hold_sorted_lines_and_the_whole_structure(tmp_path):
    result = {"task": "mrpc", "metrics": {"f1": 0.5, "acc": 0.25}, "rows": 408,
              "best": {"acc": float("nan"), "step": 100}, "sweep": [{"acc": float("inf")}]}
    write_results(tmp_path / "out", result)
    assert (tmp_path / "out" / "eval_results.txt").read_text().splitlines() == [
        "acc = 0.25", "best_acc = nan", "best_step = 100", "f1 = 0.5", "rows = 408",
        "sweep = [{'acc': inf}]", "task = mrpc"]
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text()) == {
        **result, "best": {"acc": None, "step": 100}, "sweep": [{"acc": None}]}
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_counts_by_class_are_in_the_json_alone_and_not_where_there_are_none(tmp_path):
    result = {"metrics": {"acc": 1.0}, "per_class": {"dev": counts(a=1, b=2)}}
    write_results(tmp_path, result)
    assert (tmp_path / "eval_results.txt").read_text() == "acc = 1.0\n"
    assert json.loads((tmp_path / "eval_results.json").read_text()) == result
    write_results(tmp_path, {**result, "per_class": {}})
    assert json.loads((tmp_path / "eval_results.json").read_text()) == {"metrics": {"acc": 1.0}}


def test_the_counts_of_a_selection_are_those_of_its_best_dev_evaluation():
    def result(acc, rows):
        return {split: {"metrics": {"acc": score}, "per_class": counts(a=rows)}
                for split, score in (("dev", acc), ("dev_mm", 1.0))}

    selection = Selection(GLUE_TASKS["mnli"])
    assert [selection.update(result(*given)) for given in ((0.5, 1), (0.7, 2), (0.6, 3))] == [
        True, True, False]
    assert selection.results()["per_class"] == {"dev": counts(a=2), "dev_mm": counts(a=2)}

"""Plain Chinese text and own data: the whole chain, from lines of text to answers in Chinese."""

import csv
import json
import random
from pathlib import Path

import pytest
from helpers import run, tiny_config

import finetune_teacher
import general_distill
import predict
import pretrain_bert
import task_distill
from transformer.tokenization import BertTokenizer

GOOD = ["好吃", "新鲜", "很香", "美味", "干净", "划算", "热乎", "地道"]
BAD = ["难吃", "油腻", "太咸", "冰凉", "发霉", "太贵", "有虫", "夹生"]
SUBJECTS = ["味道", "米饭", "牛肉面", "汤", "包装", "这家店的菜", "iPhone形状的蛋糕", "麻辣香锅"]
TIMES = ["今天", "昨天中午", "上周", "第2次点", "晚上7点"]
OTHERS = ["送餐员冒雨送来", "我们点了三份", "等了40分钟", "老板打了电话", "和同事一起吃的"]


def review(rng: random.Random, words: list[str]) -> str:
    first, second = rng.sample(words, 2)
    return (f"{rng.choice(TIMES)}{rng.choice(OTHERS)}，{rng.choice(SUBJECTS)}{first}，"
            f"{rng.choice(SUBJECTS)}也{second}{rng.choice('。！～')}")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """450 lines of text without a blank line, and 300 rows whose labels stand in Chinese."""
    folder, rng = tmp_path_factory.mktemp("chinese"), random.Random(7)
    lines = [review(rng, rng.choice([GOOD, BAD])) for _ in range(450)]
    (folder / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    task = folder / "外卖"
    task.mkdir()
    for split, rows in (("train", 200), ("dev", 50), ("test", 50)):
        with (task / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["review", "label"])
            writer.writerows([review(rng, words), label]
                             for _ in range(rows // 2)
                             for words, label in ((GOOD, "好评"), (BAD, "差评")))
    return folder


@pytest.fixture(scope="module")
def models(data) -> Path:
    """A BERT of that text, its general student, the teacher, and the student after both stages."""
    models, task = data / "models", data / "外卖"
    for name, layers, width in (("bert", 4, 32), ("student", 2, 16)):
        (data / name).mkdir()
        config = tiny_config(hidden_size=width, num_hidden_layers=layers,
                             intermediate_size=2 * width, initializer_range=0.1).to_dict()
        (data / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    run(pretrain_bert, "--config", data / "bert", "--vocab_size", 400, "--train_corpus",
        data / "text.txt", "--output_dir", models / "bert", "--steps", 200, "--precision", "fp32")
    run(general_distill, "--train_corpus", data / "text.txt", "--teacher_model", models / "bert",
        "--student_model", data / "student", "--output_dir", models / "general",
        "--learning_rate", 2e-3, "--max_seq_length", 64, "--precision", "fp32")
    run(finetune_teacher, "--data_dir", task, "--bert_model", models / "bert", "--new_classifier",
        "--output_dir", models / "teacher", "--learning_rate", 1e-3, "--num_train_epochs", 5,
        "--train_batch_size", 16, "--precision", "fp32")
    common = ["--data_dir", task, "--teacher_model", models / "teacher", "--train_batch_size", 16,
              "--learning_rate", 2e-3, "--num_train_epochs", 8, "--precision", "fp32"]
    run(task_distill, *common, "--student_model", models / "general",
        "--output_dir", models / "intermediate")
    run(task_distill, *common, "--student_model", models / "intermediate", "--pred_distill",
        "--output_dir", models / "distilled")
    return models


def losses(folder: Path, name: str) -> list[float]:
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [record[name] for record in map(json.loads, lines) if name in record]


def test_a_vocabulary_of_the_text_spells_all_of_it(models, data):
    tokenizer = BertTokenizer.from_pretrained(models / "bert")
    lines = (data / "text.txt").read_text(encoding="utf-8").splitlines()
    assert not any(tokenizer.vocab["[UNK]"] in ids for ids in tokenizer.encode_batch(lines))
    assert {"好", "吃", "。", "～"} <= set(tokenizer.vocab) and "##好" not in tokenizer.vocab
    assert tokenizer.tokenize("iPhone")[0].startswith("i")


def test_lines_of_text_without_blank_lines_distil_a_general_student(models):
    config = json.loads((models / "general" / "config.json").read_text(encoding="utf-8"))
    assert config["vocab_size"] == len(BertTokenizer.from_pretrained(models / "bert"))
    assert losses(models / "general", "rep_loss")


def test_the_student_learns_what_its_teacher_knows(models):
    for name in ("teacher", "distilled"):
        results = json.loads((models / name / "eval_results.json").read_text(encoding="utf-8"))
        assert results["best"]["acc"] >= 0.9, name


def test_the_test_rows_are_measured_with_chinese_labels(models, data, tmp_path):
    run(task_distill, "--do_eval", "--eval_split", "test", "--student_model", models / "distilled",
        "--data_dir", data / "外卖", "--output_dir", tmp_path / "test")
    results = json.loads((tmp_path / "test" / "eval_results.json").read_text(encoding="utf-8"))
    assert results["all_metrics"]["test"]["acc"] >= 0.9
    assert results["all_metrics"]["test"]["macro_f1"] >= 0.9


def test_answers_are_the_labels_of_the_data(models, capsys, tmp_path):
    texts = {"今天等了40分钟，味道好吃，汤也新鲜。": "好评",
             "上周我们点了三份，米饭太咸，汤也发霉！": "差评"}
    (tmp_path / "new.txt").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    run(predict, "--model", models / "distilled", "--format", "jsonl",
        "--input_file", tmp_path / "new.txt")
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["label"] for answer in answers] == list(texts.values())
    assert set(answers[0]["probabilities"]) == {"差评", "好评"}

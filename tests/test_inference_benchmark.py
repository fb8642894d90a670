"""benchmarks/inference.py: every candidate in every setting, and what is made of the times."""

import pytest
import torch
from helpers import error_line, make_glue, make_model, read_json, run

import quantize
from benchmarks import inference

CPU = torch.device("cpu")


def test_a_run_measures_every_candidate_in_every_setting(tmp_path, capsys):
    make_model(tmp_path / "small", num_hidden_layers=1)
    make_model(tmp_path / "pruned", heads_per_layer=[2, 0, 1, 2], neurons_per_layer=[24, 0, 1, 3])
    make_glue(tmp_path / "glue" / "SST-2", "SST-2", dev_rows=20)
    run(inference, "--models", f"small={tmp_path / 'small'}", f"bert_base={tmp_path / 'pruned'}",
        "--lengths", "8", "sst-2", "--glue_dir", tmp_path / "glue", "--batches", "1", "3",
        "--threads", "1", "2", "--seconds", "0.01", "--output_dir", tmp_path / "out")
    result = read_json(tmp_path / "out" / "inference.json")
    rows = result["rows"]
    settings = {(row["model"], row["engine"], row["threads"], row["batch"], row["length"])
                for row in rows}
    assert len(settings) == len(rows) == 2 * len(inference.ENGINES) * 2 * 2 * 2
    assert all(0 < row["median"] <= row["p95"] and row["repeats"] >= 2 for row in rows)
    assert all(row["speedup"] == 1 for row in rows
               if (row["model"], row["engine"]) == inference.BASELINE)
    for row in rows:
        assert row["rows_per_second"] == pytest.approx(1e3 * row["batch"] / row["median"])
    table = (tmp_path / "out" / "inference.md").read_text(encoding="utf-8")
    assert table.count("\n| ") >= len(rows)
    assert "| small | onnx int8 |" in capsys.readouterr().out


def test_what_quantize_made_is_measured_as_it_is(tmp_path):
    make_model(tmp_path / "small", num_hidden_layers=1)
    run(quantize, "--model", tmp_path / "small", "--method", "int8-dynamic",
        "--output_dir", tmp_path / "onnx")
    run(quantize, "--model", tmp_path / "small", "--method", "bf16", "--format", "torch",
        "--output_dir", tmp_path / "half")
    names = ("small", "onnx", "half")
    run(inference, "--models", *(f"{name}={tmp_path / name}" for name in names), "--engines",
        "torch fp32", "--lengths", "8", "--batches", "1", "--threads", "1", "--seconds", "0.01",
        "--output_dir", tmp_path / "out")
    rows = read_json(tmp_path / "out" / "inference.json")["rows"]
    assert [(row["model"], row["engine"]) for row in rows] == [
        ("small", "torch fp32"), ("onnx", "onnx int8-dynamic"), ("half", "torch bf16")]
    assert len({row["parameters"] for row in rows}) == 1
    half, = inference.make_candidates(f"half={tmp_path / 'half'}", [], tmp_path, CPU)
    weights = half.load().bert.encoder.layer[0].intermediate.dense.weight
    assert weights.dtype == torch.bfloat16
    onnx = (tmp_path / "onnx" / "model.onnx").stat().st_size
    assert rows[1]["megabytes"] == onnx / 1e6


def test_rows_of_an_own_task_are_measured_by_the_name_of_its_folder(tmp_path):
    make_model(tmp_path / "small", num_hidden_layers=1)
    (tmp_path / "data" / "mine").mkdir(parents=True)
    rows = "".join(f"a good film {number},{'yn'[number % 2]}\n" for number in range(30))
    for split in ("train", "dev"):
        (tmp_path / "data" / "mine" / f"{split}.csv").write_text(f"text,label\n{rows}")
    run(inference, "--models", f"small={tmp_path / 'small'}", "--engines", "torch fp32",
        "--lengths", "mine", "--glue_dir", tmp_path / "data", "--batches", "1", "--threads", "1",
        "--seconds", "0.01", "--output_dir", tmp_path / "out")
    (row,) = read_json(tmp_path / "out" / "inference.json")["rows"]
    assert (row["model"], row["length"]) == ("small", "mine")


def test_the_known_shapes_have_the_parameters_of_the_paper():
    millions = {name: sum(p.numel() for p in inference.make_model(name).parameters()) / 1e6
                for name in ("tinybert4", "tinybert6")}
    assert millions == pytest.approx({"tinybert4": 14.4, "tinybert6": 67.0}, abs=0.1)


def test_candidates_take_turns_and_the_first_call_does_not_count():
    order = []
    times = inference.take_turns([lambda number: order.append(("a", number)),
                                  lambda number: order.append(("b", number))], 0.0)
    assert order == [("a", 0), ("b", 0), ("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert [len(taken) for taken in times] == [2, 2]


def test_mistakes_are_one_line(tmp_path, capsys):
    out = ["--output_dir", tmp_path / "out"]
    assert "expected NAME=MODEL" in error_line(capsys, inference, "--models", "gpt", *out)
    assert "--batches 0" in error_line(capsys, inference, "--batches", "0", *out)

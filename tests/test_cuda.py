"""What only a GPU can show; skipped where there is none."""

import pytest
import torch
from helpers import make_glue, make_model, random_batch, read_json, read_log, run, tiny_config

import task_distill
from transformer.distillation import IntermediateLoss, map_layers, no_teacher
from transformer.modeling import BertModel, TinyBertForPreTraining, freeze
from transformer.runtime import compile_models, get_device, resolve_precision
from transformer.training import StudentTrainer, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def device() -> torch.device:
    return get_device()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [12, 26, 64])
def test_layers_without_scores_compute_the_same(device, dtype, width):
    torch.manual_seed(0)
    config = tiny_config(hidden_size=2 * width, initializer_range=0.05)
    model = freeze(BertModel(config), dtype, device)
    batch = [tensor.to(device) for tensor in random_batch(4, 23)]
    exact = model(*batch).hidden_states[-1].float()
    fused = model(*batch, score_layers=()).hidden_states[-1].float()
    real = batch[2].bool()
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(fused[real], exact[real], rtol=tolerance, atol=tolerance)


def test_float16_skips_a_step_that_overflows_and_goes_on(device):
    model = torch.nn.Linear(4, 1).to(device)
    rows = {"x": torch.ones(2, 4)}

    def loss(batch, teacher_outputs):
        return {"loss": model(batch["x"]).float().mean() * batch["factor"]}

    def collate(factor):
        return {**rows, "factor": torch.tensor(float(factor[0]))}

    trainer = StudentTrainer(model, loss, torch.optim.SGD(model.parameters(), 0.1), device,
                      torch.float16)
    before = model.weight.detach().clone()
    steps = train([trainer], no_teacher, [(collate, [[[float("inf")]], [[1.0]]])], 2, device)
    next(steps)
    assert torch.equal(model.weight, before)
    next(steps)
    assert not torch.equal(model.weight, before)


def test_a_compiled_student_learns_what_an_eager_one_does(device):
    torch.manual_seed(0)
    teacher = freeze(BertModel(tiny_config()), None, device)
    names = ("input_ids", "token_type_ids", "attention_mask")
    batch = dict(zip(names, (t.to(device) for t in random_batch(4, 16)), strict=True))
    student = TinyBertForPreTraining(tiny_config(num_hidden_layers=2), fit_size=16).to(device)
    loss = IntermediateLoss(student, map_layers(4, 2))
    with torch.no_grad():
        teacher_outputs = teacher(*batch.values())
        expected = loss(batch, teacher_outputs)
        if not compile_models(None, device, loss):
            pytest.skip("torch.compile does not work here")
        for name, value in loss(batch, teacher_outputs).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_both_stages_run_in_every_precision(tmp_path, device, precision):
    if precision == "bf16" and resolve_precision("auto", device) is None:
        pytest.skip("this GPU has no bf16")
    data = make_glue(tmp_path / "data", rows=64)
    make_model(tmp_path / "teacher", labels=("0", "1"))
    student = tmp_path / "student"
    make_model(student, TinyBertForPreTraining, seed=1, num_hidden_layers=2, hidden_size=12,
               model_arguments={"fit_size": 16})
    for stage in ((), ("--pred_distill",),
                  ("--pred_distill", "--joint", "--hard_label_weight", 0.5)):
        output = tmp_path / f"out{len(stage)}"
        run(task_distill, "--teacher_model", tmp_path / "teacher", "--student_model", student,
            "--data_dir", data, "--task_name", "sst-2", "--output_dir", output,
            "--num_train_epochs", 3, "--precision", precision, "--no-compile", *stage)
        losses = [v for k, v in read_log(output)[-1].items() if k.endswith("loss")]
        assert losses and all(value == value for value in losses)
        student = output
    assert "acc" in read_json(output / "eval_results.json")["metrics"]

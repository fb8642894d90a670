"""What the processes of one run share out, and how a single one goes without."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import REPO

from transformer import distributed
from transformer.batching import pass_generator
from transformer.training import process_share


def test_a_single_process_is_the_main_one_and_asks_nobody():
    assert distributed.rank() == 0 and distributed.world_size() == 1 and distributed.is_main()
    assert distributed.agree(True) and not distributed.agree(False)
    assert distributed.largest(7) == 7
    assert distributed.gather("x") == ["x"] and distributed.from_main("x") == "x"
    distributed.barrier()
    with distributed.main_first():
        pass
    tensor = torch.ones(2)
    assert distributed.sum_over_ranks(tensor) is tensor


def test_torchruns_variables_say_who_a_process_is(monkeypatch):
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4",
                        "TORCHELASTIC_RESTART_COUNT": "2"}.items():
        monkeypatch.setenv(name, value)
    assert (distributed.rank(), distributed.local_rank(), distributed.world_size()) == (3, 1, 4)
    assert not distributed.is_main() and distributed.is_restart()


def test_a_broken_connection_is_a_lost_process_only_where_there_are_several(monkeypatch):
    error = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    assert not distributed.is_lost_peer(error)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distributed.is_lost_peer(error)
    assert not distributed.is_lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("sizes", [[64], [64, 64], [64, 64, 64, 17], [1], [2, 2, 1]])
def test_the_processes_compute_each_row_of_a_step_once(sizes, processes):
    borders = np.cumsum([0, *sizes])
    parts = [list(range(a, b)) for a, b in zip(borders, borders[1:], strict=False)]
    shares = [process_share(parts, rank, processes) for rank in range(processes)]
    rows = sorted(row for share in shares for part in share for row in part)
    assert rows == list(range(sum(sizes)))
    assert len({len(share) for share in shares}) == 1, "all take part in every gradient"


def test_four_processes_take_whole_units_of_a_batch_of_four():
    parts = [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [process_share(parts, rank, 4) for rank in range(4)] == [[part] for part in parts]


def test_a_pass_is_shuffled_by_its_number_and_the_seed_alone():
    def order(seed, number):
        return torch.randperm(50, generator=pass_generator(seed, number)).tolist()

    assert order(1, 5) == order(1, 5)
    assert len({tuple(order(seed, number)) for seed in (0, 1, -1) for number in (0, 1, 2)}) == 9


COUNT_REDUCTIONS = """
import os
import sys
import torch
import torch.distributed as dist
sys.path[:0] = {paths!r}
from helpers import tiny_config
from transformer import distributed
from transformer.batching import micro_batches
from transformer.distillation import PredictionLoss, no_teacher
from transformer.modeling import TinyBertForSequenceClassification
from transformer.optimization import BertAdam
from transformer.training import StudentTrainer, train

distributed.connect()
torch.manual_seed(0)
student = TinyBertForSequenceClassification(tiny_config(num_labels=2))
trainer = StudentTrainer(student, PredictionLoss(student), BertAdam(student.parameters(), lr=1e-3),
                  torch.device("cpu"))
reductions = []


def count(state, bucket):
    reductions.append(1)
    gradient = bucket.buffer().div_(distributed.world_size())
    return dist.all_reduce(gradient, async_op=True).get_future().then(lambda sent: sent.value()[0])


trainer.parallel_loss.register_comm_hook(None, count)


def collate(rows):
    ids = torch.tensor([[5, 6, 7]] * len(rows))
    return {{"input_ids": ids, "token_type_ids": 0 * ids, "attention_mask": 0 * ids + 1,
            "teacher_logits": torch.ones(len(rows), 2)}}


accumulation = int(sys.argv[1])
parts = micro_batches(list(range(8)), 8 // accumulation)
steps = list(train([trainer], no_teacher, [(collate, [parts] * 3)], 3, torch.device("cpu")))
everyone = distributed.gather(next(student.parameters()).detach())
assert torch.equal(*everyone), "the processes' students differ"
if distributed.is_main():
    print("reductions", len(reductions), flush=True)
distributed.barrier()
os._exit(0)  # as run_script does
"""


def test_accumulation_adds_up_gradients_once_a_step_however_many_micro_batches(tmp_path):
    script = tmp_path / "count.py"
    script.write_text(COUNT_REDUCTIONS.format(paths=[str(REPO), str(REPO / "tests")]))

    def reductions(accumulation: int) -> str:
        result = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
             "2", str(script), str(accumulation)],
            capture_output=True, text=True, timeout=300, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout.strip()

    assert reductions(1) == reductions(4) != "reductions 0"

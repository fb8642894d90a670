"""What the processes of one run share out, and how a single one goes without."""


import numpy as np
import pytest
import torch

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

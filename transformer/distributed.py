"""The processes of one run under torchrun: rank, world size, and collective operations.

In a single process every function works, at no cost and without importing torch.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes seconds to import: only runs of several processes need it here
    import torch

# How long a process waits for another. A process that dies is noticed at once, by its closed
# connection; this bounds how long one may tokenize while the others wait.
LONGEST_WAIT = timedelta(hours=12)
# How the libraries say that the other end has gone.
LOST_PEER_SIGNS = ("connection closed by peer", "connection reset by peer", "broken pipe",
                   "remote process exited", "ncclremoteerror")


def rank() -> int:
    """Return the number of this process, from 0, over all machines."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return the number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Say whether this is the process that writes and logs."""
    return rank() == 0


def is_restart() -> bool:
    """Say whether torchrun has started this process again after one died.

    The machines of several count apart: `agree` on it.
    """
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def launch() -> str | None:
    """Return an identifier of this call of torchrun, the same after a restart."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    # Without a rendezvous of its own a call is named "none"; the process that waits for it stays.
    return f"none-{os.getppid()}" if name == "none" else name


def connect(use_gpu: bool = False) -> None:
    """Join the other processes, if there are any; CPU tensors go over Gloo, a GPU's over NCCL."""
    if world_size() == 1:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        return
    store, number, processes = next(dist.rendezvous("env://", timeout=LONGEST_WAIT))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(processes):
        # torchrun's store outlives a restart: under the same names the new processes could find
        # the addresses of those that are gone. (The machines of several count restarts apart.)
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if use_gpu else "gloo", store=store, rank=number,
                            world_size=processes, timeout=LONGEST_WAIT)


def is_connected() -> bool:
    """Say whether this process has joined others."""
    if world_size() == 1:
        return False
    import torch.distributed as dist

    return dist.is_initialized()


def barrier() -> None:
    """Wait until every process is here."""
    largest(0)


def agree(flag: bool) -> bool:
    """Return whether the flag is true in any process; all of them must call this."""
    return bool(largest(int(flag)))


def largest(number: int) -> int:
    """Return the largest of the processes' numbers; all of them must call this."""
    if world_size() == 1:
        return number
    import torch
    import torch.distributed as dist

    maximum = torch.tensor(number)
    dist.all_reduce(maximum, dist.ReduceOp.MAX)
    return int(maximum)


def sum_over_ranks(tensor: "torch.Tensor") -> "torch.Tensor":
    """Add up the tensor of every process, in place, where there are several."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.all_reduce(tensor)
    return tensor


def gather(value: Any) -> list[Any]:
    """Return the value of every process, in their order."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(value: Any) -> Any:
    """Return the first process's value in all of them; the others' does not matter."""
    if world_size() == 1:
        return value
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


@contextmanager
def main_first() -> Iterator[None]:
    """Run a block in the first process of each machine, then in the others: they find its cache."""
    if local_rank() == 0:
        yield
        barrier()
    else:
        barrier()
        yield


def is_lost_peer(error: BaseException) -> bool:
    """Say whether an error means that another process of the run has gone."""
    text = str(error).lower()
    return world_size() > 1 and any(sign in text for sign in LOST_PEER_SIGNS)

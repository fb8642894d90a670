"""How long a model takes for a batch, measured beside another."""

import time

import torch
from torch import nn

ROUNDS = 15
ROWS = 32


def _seconds(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> float:
    on_gpu = inputs[0].is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    model(*inputs, score_layers=())  # as evaluation calls it
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - began


@torch.inference_mode()
def measure_latency(
    models: dict[str, nn.Module], length: int, device: torch.device, rows: int = ROWS
) -> dict[str, float]:
    """Return the median milliseconds that each model takes for a batch of full rows.

    The models take turns, so that a busy machine slows all of them down alike.
    """
    vocabulary = min(model.config.vocab_size for model in models.values())
    ids = torch.randint(0, vocabulary, (rows, length), device=device,
                        generator=torch.Generator(device).manual_seed(0))
    inputs = (ids, torch.zeros_like(ids), torch.ones_like(ids))
    for model in models.values():
        model.eval()
        _seconds(model, inputs)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            times[name].append(_seconds(model, inputs))
    return {name: 1000 * sorted(values)[ROUNDS // 2] for name, values in times.items()}

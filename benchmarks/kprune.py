"""K-prune against the straightforward procedure: the same masks, and how much faster.

The straightforward procedure does what the paper says: for every sub-layer full forward passes of
the masked and of the unpruned model, a threshold found by trying one candidate after the other,
and full forward passes again for the tuning.

Example:
    python benchmarks/kprune.py --rows 320 --length 64
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "K-prune" / "src"))

from prune import divergence, head_flops, kprune, neuron_flops

from transformer.file_utils import UserError
from transformer.modeling import BertConfig, TinyBertForSequenceClassification, model_inputs
from transformer.runtime import run_script

Batch = dict[str, Tensor]  # input_ids, token_type_ids, attention_mask [batch, length]
Settings = dict[str, float]  # the keyword arguments of `kprune`


class Masked(nn.Module):
    """An output projection whose inputs are masked; it keeps its inputs."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.dense = dense
        self.mask = torch.ones(dense.in_features, requires_grad=True)

    def forward(self, features: Tensor) -> Tensor:
        self.features = features
        return self.dense(features * self.mask)


def sublayers(model: nn.Module) -> list[nn.Module]:
    """Return the outputs of attention and feed-forward part of each layer, from the bottom."""
    return [part for layer in model.bert.encoder.layer
            for part in (layer.attention.output, layer.output)]


def mask_inputs(model: nn.Module) -> list[Masked]:
    """Replace the output projections of all sub-layers by masked ones; returns them."""
    for sublayer in sublayers(model):
        sublayer.dense = Masked(sublayer.dense)
    return [sublayer.dense for sublayer in sublayers(model)]


def straightforward_threshold(scores: Tensor, costs: Tensor, budget: float) -> float:
    """Try every score as the threshold, from the smallest on."""
    for candidate in sorted(scores.tolist()):
        if costs[scores > candidate].sum() < budget:
            return candidate
    raise ValueError("no threshold meets the budget")


def unit_scores(
    model: nn.Module, original: nn.Module, masked: list[Masked], batches: list[Batch],
    settings: Settings,
) -> list[Tensor]:
    """Return the scores of all units, a tensor for each sub-layer, from full forward passes."""
    config = model.config
    predictive = [torch.zeros_like(part.mask) for part in masked]
    representational = [torch.zeros_like(part.mask) for part in masked]
    for batch in batches:
        real = batch["attention_mask"].bool()
        with torch.no_grad():
            reference = original(*model_inputs(batch))[0]
        logits = model(*model_inputs(batch))[0]
        gradients = torch.autograd.grad(
            divergence(logits, reference, settings["T"], real), [part.mask for part in masked])
        for index, part in enumerate(masked):
            predictive[index] += 0.5 * gradients[index].square()
            representational[index] += part.features.detach()[real].square().sum(dim=0)
    samples = sum(len(batch["input_ids"]) for batch in batches)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    scores = []
    for index, part in enumerate(masked):
        weight = part.dense.weight.square().mean(dim=0)
        importance = (settings["lam_pred"] * predictive[index] / samples
                      + settings["lam_rep"] * representational[index] * weight / tokens)
        if index % 2:
            scores.append(importance / (neuron_flops(config, settings["seq_len"]) / 1e9))
        else:
            importance = importance.view(config.num_attention_heads, -1).mean(dim=1)
            cost = head_flops(config, settings["seq_len"]) / 1e9
            scores.append(settings["mu"] * importance / cost)
    return scores


def inputs_of(model: nn.Module, index: int, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return features and residual of sub-layer `index`, from a full forward pass."""
    given: list[tuple[Tensor, Tensor]] = []
    hook = sublayers(model)[index].register_forward_pre_hook(
        lambda module, inputs: given.append(inputs))
    model(*model_inputs(batch))
    hook.remove()
    return given[0]


@torch.no_grad()
def refit(
    model: nn.Module, original: nn.Module, index: int, masked: Masked, batches: list[Batch]
) -> None:
    """Refit the weight of sub-layer `index` by least squares on all tokens at once."""
    kept = masked.mask.bool()
    features, targets = [], []
    for batch in batches:
        real = batch["attention_mask"].bool()
        x, residual = inputs_of(model, index, batch)
        their_x, their_residual = inputs_of(original, index, batch)
        target = their_residual + sublayers(original)[index].dense(their_x)
        features.append(x[real][:, kept])
        targets.append((target - residual - masked.dense.bias)[real])
    solution = torch.linalg.lstsq(
        torch.cat(features).double(), torch.cat(targets).double(), driver="gelsd").solution
    masked.dense.weight[:, kept] = solution.T.float()


def straightforward(
    model: nn.Module, batches: list[Batch], settings: Settings
) -> tuple[Tensor, Tensor]:
    """Return head masks [layers, heads] and neuron masks [layers, neurons] of a `model`."""
    config = model.config
    original = copy.deepcopy(model).eval().requires_grad_(False)
    pruned = copy.deepcopy(original)
    masked = mask_inputs(pruned)
    costs = [head_flops(config, settings["seq_len"]), neuron_flops(config, settings["seq_len"])]
    total = config.num_hidden_layers * (
        config.num_attention_heads * costs[0] + config.intermediate_size * costs[1])
    budget = (1 - settings["constraint"]) * total
    masks = []
    for index, part in enumerate(masked):
        scores = unit_scores(pruned, original, masked, batches, settings)[index:]
        unit_costs = torch.cat([
            torch.full_like(s, costs[(index + offset) % 2], dtype=torch.float64)
            for offset, s in enumerate(scores)])
        kept = scores[0] > straightforward_threshold(torch.cat(scores), unit_costs, budget)
        budget -= int(kept.sum()) * costs[index % 2]
        width = 1 if index % 2 else config.head_width
        with torch.no_grad():
            part.mask.copy_(kept.repeat_interleave(width))
        if settings["sublayerwise_tuning"] and kept.any():
            refit(pruned, original, index, part, batches)
        masks.append(kept.float())
    return torch.stack(masks[0::2]), torch.stack(masks[1::2])


# ------------------------------------------------------------------ the measurement


def random_model(config: BertConfig, seed: int = 0) -> nn.Module:
    """Return a random classifier whose units differ in what they contribute."""
    torch.manual_seed(seed)
    model = TinyBertForSequenceClassification(config).eval()
    with torch.no_grad():
        for sublayer in sublayers(model):
            sublayer.dense.weight *= torch.rand(sublayer.dense.in_features).add_(0.2) * 4
        model.classifier.weight *= 20
    return model


def random_batches(rows: int, length: int, vocab_size: int, size: int = 32) -> list[Batch]:
    """Return batches of random rows of half to the whole of `length`."""
    batches = []
    for start in range(0, rows, size):
        count = min(size, rows - start)
        ids = torch.randint(5, vocab_size, (count, length))
        lengths = torch.randint(max(1, length // 2), length + 1, (count, 1))
        mask = (torch.arange(length) < lengths).long()
        batches.append({"input_ids": ids * mask, "token_type_ids": torch.zeros_like(ids),
                        "attention_mask": mask})
    return batches


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "benchmarks/kprune.py", description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--rows", type=int, default=320, help="rows of the sample")
    add("--length", type=int, default=64, help="longest row in word pieces")
    add("--layers", type=int, default=4, help="layers of the model, of TinyBERT4's width")
    add("--constraint", type=float, default=0.3, help="share of the operations to remove")
    return parser


def main(args: argparse.Namespace) -> None:
    for name in ("rows", "length", "layers"):
        if (value := getattr(args, name)) < 1:
            raise UserError(f"--{name} {value}; expected at least 1")
    config = BertConfig(
        vocab_size=2000, hidden_size=312, num_hidden_layers=args.layers, num_attention_heads=12,
        intermediate_size=1200)
    model = random_model(config)
    batches = random_batches(args.rows, args.length, config.vocab_size)
    for tuning in (False, True):
        settings = {"constraint": args.constraint, "seq_len": 0.75 * args.length, "lam_pred": 1.0,
                    "lam_rep": 2.5e-4, "mu": 64.0, "T": 2.0, "sublayerwise_tuning": tuning}
        began = time.process_time()
        found = kprune(model, batches, **settings)
        ours = time.process_time() - began
        began = time.process_time()
        heads, neurons = straightforward(model, batches, settings)
        theirs = time.process_time() - began
        differing = int((found.head_masks != heads).sum() + (found.neuron_masks != neurons).sum())
        print(f"{'with' if tuning else 'without'} tuning: {ours:.1f} s, straightforward"
              f" {theirs:.1f} s: {theirs / ours:.1f} times as fast, {differing} units differ")


if __name__ == "__main__":
    run_script(main, get_args_parser())

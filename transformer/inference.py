"""Models that only compute: frozen, in low precision, with weights laid out for the processor."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

HEADS = ("classifier", "qa_outputs")  # whose outputs are scores


class PackedLinear(nn.Module):
    """A frozen bfloat16 linear layer whose weight lies as oneDNN's kernels read it.

    `nn.Linear` brings its weight into that order at every call, which costs a tenth of BERT-base's
    forward pass on a CPU.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = None if linear.bias is None else linear.bias.detach()

    def _save_to_state_dict(self, *arguments: Any) -> None:
        raise RuntimeError("a packed model cannot be saved; save it before freeze packs it")

    def _apply(self, *arguments: Any) -> None:
        raise RuntimeError("a packed model cannot be moved or cast; do it before freeze packs it")

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def can_pack() -> bool:
    """Say whether this build of torch has oneDNN and the operations of `PackedLinear`."""
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))


def pack_linears(module: nn.Module) -> None:
    """Replace every bfloat16 linear layer below `module` by a packed one."""
    for name, child in module.named_children():
        # A layer all of whose units were pruned has nothing to pack; it is not computed either.
        if isinstance(child, nn.Linear) and child.weight.dtype == torch.bfloat16 \
                and child.weight.numel():
            setattr(module, name, PackedLinear(child))
        else:
            pack_linears(child)


def freeze(
    model: nn.Module, dtype: torch.dtype | None = None, device: torch.device | None = None,
    pack: bool = True,
) -> nn.Module:
    """Put a model that is not trained into eval mode and stop its gradients; returns it.

    Args:
        model: a teacher, or a model that is evaluated; changed in place.
        dtype: precision to keep its weights and to compute in, the head's own weights apart, so
            that scores are not rounded; None leaves it.
        device: where to move it. In bfloat16 on a CPU its linear layers are packed as well, after
            which it can no longer be saved.
        pack: false leaves them, for torch.compile, which does not know packed ones.
    """
    model.eval().requires_grad_(False).to(device=device, dtype=dtype)
    for name in HEADS:
        if hasattr(model, name):
            getattr(model, name).float()
    on_cpu = device is not None and device.type == "cpu"
    if pack and on_cpu and dtype == torch.bfloat16 and can_pack():
        pack_linears(model)
    return model


def inference_copy(
    model: nn.Module, dtype: torch.dtype | None, device: torch.device
) -> nn.Module:
    """Return a frozen copy of a model that is in training; a frozen model is returned itself."""
    if not model.training and not any(p.requires_grad for p in model.parameters()):
        return model
    return freeze(copy.deepcopy(model), dtype, device)

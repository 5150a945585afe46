"""Muon: the matrices of the hidden layers move along the orthogonal matrix nearest to their momentum."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hpcgen.errors import UsageError

MOMENTUM = 0.95
_A, _B, _C = 3.4445, -4.7750, 2.0315  # of Jordan's iteration: steep at 0, so that five rounds do
_ROUNDS = 5
_RMS = 0.2  # of an update by AdamW, which that of Muon is scaled to


class Muon(torch.optim.AdamW):
    """AdamW in which the groups with a `muon` move by Muon.

    For a matrix W (m, n) with gradient G: M ← μ M + (1 - μ) G, and with the Nesterov step N = μ M + (1 - μ) G
    W ← (1 - lr · decay) W - lr · muon · 0.2 √max(m, n) · O(N), O(N) ≈ U Vᵀ for N = U S Vᵀ. K. Jordan et al., Muon, 2024
    (kellerjordan.github.io/posts/muon); the scale, by which lr and decay are those of AdamW: J. Liu et al.,
    arXiv:2502.16982, 2025. Gradients of these matrices are set to None by a step.
    """

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        super().__init__(groups, **settings)
        self._step_supports_amp_scaling = False  # GradScaler itself leaves out a step that is not finite

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. All matrices of one shape are made orthogonal together."""
        told = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            if "muon" not in group:
                continue
            moved = [p for p in group["params"] if p.grad is not None]
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for matrix in moved:
                alike[matrix.shape].append(matrix)
            for shape, matrices in alike.items():
                grads = torch.stack([m.grad for m in matrices if m.grad is not None])  # (B, m, n)
                momenta = [self._momentum(matrix) for matrix in matrices]
                torch._foreach_lerp_(momenta, list(grads), 1 - MOMENTUM)
                ahead = torch.lerp(torch.stack(momenta), grads, 1 - MOMENTUM)
                size = -group["lr"] * group["muon"] * _RMS * max(shape) ** 0.5
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, list(orthogonal(ahead).to(grads.dtype)), alpha=size)
            for matrix in moved:
                matrix.grad = None  # nothing left for AdamW
        super().step()
        return told

    def _momentum(self, matrix: Tensor) -> Tensor:
        if not (state := self.state[matrix]):
            state.update(step=torch.zeros(()), momentum=torch.zeros_like(matrix))  # AdamW loads no state without `step`
        momentum: Tensor = state["momentum"]
        return momentum


def orthogonal(matrices: Tensor) -> Tensor:
    """Nearly U Vᵀ for each of B matrices U S Vᵀ. (B, m, n) -> the same, in half precision from a GPU.

    Singular values above some 0.002 of the norm come to between 0.65 and 1.2, smaller ones stay smaller.
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
    x = x if wide else x.mT
    x = x if x.device.type == "cpu" else x.bfloat16()  # many processors have no fast bfloat16
    for _ in range(_ROUNDS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=_B, alpha=_C), x, beta=_A)
    return x if wide else x.mT


def optimiser_for(
    model: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float, muon: float
) -> torch.optim.Optimizer:
    """AdamW, with Muon for the matrices of hidden layers where muon, their step in units of lr, is not 0.

    Decay is for matrices, not for biases and scales. Raises UsageError if the model does not name its hidden layers, or
    names some that it has not.
    """
    named = list(model.named_parameters())
    inner: tuple[str, ...] = getattr(model, "INNER", ()) if muon else ()
    hidden = {name for name, p in named if p.ndim == 2 and name.startswith(inner) and name.endswith(".weight")}
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in named if p.ndim >= 2 and name not in hidden], "weight_decay": weight_decay},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
        {"params": [p for name, p in named if name in hidden], "weight_decay": weight_decay, "muon": muon},
    ]
    groups = [group for group in groups if group["params"]]
    if not muon:
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
    if not hidden:
        raise UsageError(f"muon = {muon:g}: {type(model).__name__} names no hidden layers (INNER); want muon=0")
    for prefix in inner:
        if not any(name.startswith(prefix) for name in hidden):
            raise UsageError(f"muon = {muon:g}: {type(model).__name__} has no matrix {prefix}… (INNER); want muon=0")
    return Muon(groups, lr=lr, betas=betas, fused=True)

"""The optimizer: Muon for weight matrices and kernels, AdamW for everything else.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a
weight matrix by the nearest orthogonal matrix, so that all directions of a layer learn equally
fast. torch has it for matrices only; convolution kernels are treated as matrices here.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Roughly the nearest orthogonal matrix to `matrix` (rows, columns), by Newton-Schulz steps.

    Singular values end between 0.7 and 1.2, which is near enough for a learning direction.
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T).to(torch.bfloat16)
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.T).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized, for parameters of two or more dimensions.

    The update is scaled so that its root mean square is `lr` times 0.2, which lets one learning
    rate serve here and in AdamW (Liu et al. 2025, arXiv:2502.16982).
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict[str, float]) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
        ahead = parameter.grad.lerp(state["momentum"], group["momentum"])
        direction = orthogonalize(ahead.reshape(len(ahead), -1))
        scale = 0.2 * max(direction.shape) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction.view_as(parameter), alpha=-group["lr"] * scale)


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon should train it: hidden matrices and kernels, not embeddings, input, output."""
    ends = (
        "conv_in",
        "conv_out",
        "class_embedding",
        "token_embedding",
        "position_embedding",
        "positional_embedding",
    )
    return parameter.dim() >= 2 and not any(end in name for end in ends)

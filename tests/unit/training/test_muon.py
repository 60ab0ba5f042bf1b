"""The optimizer: near-orthogonal updates, for hidden matrices only."""

from __future__ import annotations

import pytest
import torch
from stepserve.training.loop.optimizer import Muon, is_matrix, orthogonalize
from torch import nn


@pytest.mark.parametrize("shape", [(16, 16), (8, 64), (64, 8), (1, 9)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix))
    # Square random matrices have singular values near 0, which five iterations do not lift fully.
    well_conditioned = values if shape[0] != shape[1] else values[:-3]
    assert values.max() < 1.3
    assert well_conditioned.min() > 0.6


def test_orthogonalize_keeps_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(32, 8, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator))
    made = orthogonalize(left @ torch.diag(torch.linspace(1, 3, 8)) @ right.T)
    alignment = (made * (left @ right.T)).sum() / made.norm() / (left @ right.T).norm()
    assert alignment > 0.97


def test_zero_gradient_moves_nothing_but_decay() -> None:
    parameter = nn.Parameter(torch.ones(4, 4))
    parameter.grad = torch.zeros(4, 4)
    Muon([parameter], lr=0.1, weight_decay=0.0).step()
    torch.testing.assert_close(parameter.detach(), torch.ones(4, 4))


def test_update_has_the_promised_root_mean_square() -> None:
    parameter = nn.Parameter(torch.zeros(32, 16, 3, 3))
    parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    Muon([parameter], lr=0.1, weight_decay=0.0).step()
    root_mean_square = parameter.detach().square().mean().sqrt().item()
    assert root_mean_square == pytest.approx(0.1 * 0.2, rel=0.25)


def test_muon_lowers_a_loss() -> None:
    layer = nn.Linear(8, 8, bias=False)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    optimizer = Muon(layer.parameters(), lr=0.05, weight_decay=0.0)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = ((layer(x) - x) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("unet.down.0.conv1.weight", (8, 8, 3, 3), True),
        ("text.layers.0.q_proj.weight", (8, 8), True),
        ("unet.conv_in.weight", (8, 4, 3, 3), False),
        ("unet.conv_out.weight", (4, 8, 3, 3), False),
        ("text.embeddings.token_embedding.weight", (100, 8), False),
        ("unet.down.0.norm1.weight", (8,), False),
    ],
)
def test_only_hidden_matrices_are_for_muon(name: str, shape: tuple[int, ...], wanted: bool) -> None:
    assert is_matrix(name, nn.Parameter(torch.zeros(shape))) is wanted

"""Named cases of gated-bias attention, its definition in float64, and how near one must come."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gmm_jepa.models.attention import attention_with_bias

NAMES = ("output", "q", "k", "v", "table", "gate")


class Case(NamedTuple):
    """What the op takes, and the gradient that comes back to it."""

    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor
    gate: Tensor
    lengths: Tensor | None
    cotangent: Tensor

    def to(self, device: str, dtype: torch.dtype) -> Case:
        """The table stays as it is, as under autocast."""
        moved = (t.to(device, dtype) for t in (self.q, self.k, self.v))
        lengths = None if self.lengths is None else self.lengths.to(device)
        table, gate = self.table.to(device), self.gate.to(device, dtype)
        return Case(*moved, table, gate, lengths, self.cotangent.to(device, dtype))

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self[:5]


def drawn(B: int, H: int, T: int, d: int, lengths: tuple[int, ...] | None = None) -> Case:
    """Queries, keys and values as a projection leaves them: frame-major, side by side."""
    torch.manual_seed(B + H + T + d)
    q, k, v = torch.randn(B, T, 3, H, d).permute(2, 0, 3, 1, 4)
    table, gate = torch.randn(H, 2 * T - 1), 1.0 + torch.rand(B, H, T)
    lengths = None if lengths is None else torch.tensor(lengths)
    return Case(q, k, v, table, gate, lengths, torch.randn(B, T, H, d).transpose(1, 2))


def _bias_of_30() -> Case:
    case = drawn(2, 2, 37, 16, (37, 20))
    return case._replace(table=30.0 * torch.sign(case.table))


CASES: dict[str, Callable[[], Case]] = {
    "one_frame": lambda: drawn(2, 2, 1, 16),
    "two_frames": lambda: drawn(1, 2, 2, 16, (1,)),
    "prime": lambda: drawn(2, 3, 53, 16),
    "more_than_a_tile": lambda: drawn(1, 1, 149, 16),
    "ragged": lambda: drawn(4, 2, 70, 24, (70, 17, 25, 64)),
    "a_row_of_one_key": lambda: drawn(2, 2, 33, 16, (1, 33)),
    "a_row_of_no_keys": lambda: drawn(3, 2, 33, 16, (12, 0, 33)),
    "no_keys_at_all": lambda: drawn(2, 2, 33, 16, (0, 0)),
    "all_rows_shorter": lambda: drawn(2, 2, 80, 16, (9, 13)),
    "one_row": lambda: drawn(1, 4, 20, 48),
    "d_64": lambda: drawn(1, 2, 40, 64),
    "d_80": lambda: drawn(1, 1, 40, 80, (31,)),
    "d_128": lambda: drawn(1, 1, 40, 128),
    "gates_zero": lambda: (c := drawn(2, 2, 21, 16))._replace(gate=0 * c.gate),
    "bias_of_30": _bias_of_30,
}


def by_definition(case: Case, keep: Tensor | None = None) -> list[Tensor]:
    """Output and the five gradients, float64; `keep` multiplies the probabilities."""
    q, k, v, table, gate = (t.detach().double().requires_grad_() for t in case.leaves)
    T = q.shape[2]
    position = torch.arange(T, device=q.device)
    bias = table[:, position - position[:, None] + T - 1] * gate[..., None]
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5 + bias
    if case.lengths is not None:
        hidden = position >= case.lengths[:, None]
        scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
    p = scores.softmax(3)
    if case.lengths is not None:
        p = p.masked_fill((case.lengths == 0)[:, None, None, None], 0.0)
    output = (p if keep is None else p * keep) @ v
    gradients = torch.autograd.grad(output, (q, k, v, table, gate), case.cotangent.double())
    return [output.detach(), *gradients]


def results_of(attention: Callable[..., Tensor], case: Case) -> list[Tensor]:
    """Output and the five gradients of ``attention(q, k, v, table, gate, key_lengths=...)``."""
    leaves = [t.detach().requires_grad_() for t in case.leaves]
    output = attention(*leaves, key_lengths=case.lengths)
    return [output.detach(), *torch.autograd.grad(output, leaves, case.cotangent)]


def assert_near(
    got: list[Tensor], expected: list[Tensor], case: Case, *, factor: float = 2.0
) -> None:
    """At most `factor` times the error of the plain form in the same dtype, and a trifle more.

    Probabilities made again as exp(score - log of the sum) are off by half a unit of the largest
    score in the precision of the scores; the plain form keeps them.
    """
    plain = results_of(attention_with_bias, case)
    unit = torch.finfo(torch.promote_types(case.q.dtype, torch.float32)).eps
    score_unit = unit * (16.0 + float(case.table.abs().max() * case.gate.abs().amax()))
    for name, ours, theirs, true in zip(NAMES, got, plain, expected):
        assert ours.dtype == theirs.dtype, name
        assert ours.shape == true.shape, name
        error, allowed = (float((t.double() - true).abs().max()) for t in (ours, theirs))
        size = max(1.0, float(true.abs().max()), float(case.table.abs().max()))
        trifle = size * (torch.finfo(ours.dtype).eps + score_unit)
        assert error <= factor * allowed + trifle, (name, error, allowed, trifle)

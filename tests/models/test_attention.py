"""The gated relative position bias against its formula, query by query."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gmm_jepa.models.attention import (
    GatedRelativeBias,
    attention,
    gated_bias_attention,
    relative_bucket,
)


def bucket_by_formula(relative: int) -> int:
    distance = abs(relative)
    if distance >= 80:
        distance = min(159, 80 + math.floor(math.log(distance / 80) / math.log(800 / 80) * 80))
    return distance + (160 if relative >= 0 else 0)


def test_buckets() -> None:
    relative = torch.arange(-1500, 1501)
    got = relative_bucket(relative, n_buckets=320, max_distance=800)
    assert got.tolist() == [bucket_by_formula(int(r)) for r in relative]


def attention_by_formula(
    bias: GatedRelativeBias, q: Tensor, k: Tensor, v: Tensor, lengths: list[int]
) -> Tensor:
    B, H, T, d = q.shape
    out = torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            for i in range(T):
                u = torch.sigmoid(q[b, h, i] @ bias.gate_u[h])
                r = torch.sigmoid(q[b, h, i] @ bias.gate_r[h])
                scores = [
                    q[b, h, i] @ k[b, h, j] / math.sqrt(d)
                    + bias.embedding.weight[bucket_by_formula(j - i), h]
                    * (1 + u + (1 - u) * r * bias.scale[h])
                    for j in range(lengths[b])
                ]
                out[b, h, i] = torch.stack(scores).softmax(0) @ v[b, h, : lengths[b]]
    return out


@pytest.mark.parametrize("lengths", [[7, 7], [7, 3], [1, 6]])
def test_gated_bias_attention(lengths: list[int]) -> None:
    bias = GatedRelativeBias(3, 4, n_buckets=320, max_distance=800).double()
    q, k, v = torch.randn(3, 2, 3, 7, 4, dtype=torch.float64, requires_grad=True).unbind()
    leaves = (q, k, v, *bias.parameters())
    key_lengths = None if lengths == [7, 7] else torch.tensor(lengths)
    got = gated_bias_attention(q, k, v, bias.table(7), bias.gate(q), key_lengths=key_lengths)
    expected = attention_by_formula(bias, q, k, v, lengths)
    torch.testing.assert_close(got, expected)
    cotangent = torch.randn_like(got)
    for g, e in zip(
        torch.autograd.grad(got, leaves, cotangent),
        torch.autograd.grad(expected, leaves, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(g, e)


def test_without_bias_is_the_bias_of_an_empty_table() -> None:
    q, k, v = torch.randn(3, 2, 3, 5, 4).unbind()
    lengths = torch.tensor([5, 2])
    got = attention(q, k, v, key_lengths=lengths)
    zero = gated_bias_attention(
        q, k, v, torch.zeros(3, 9), torch.ones(2, 3, 5), key_lengths=lengths
    )
    torch.testing.assert_close(got, zero)


def operators_of(graph: torch.fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "call_function"}


def test_compiled_gates_are_the_same() -> None:
    bias = GatedRelativeBias(3, 4, n_buckets=320, max_distance=800).double()
    q = torch.randn(2, 3, 7, 4, dtype=torch.float64, requires_grad=True)
    leaves, cotangent = (q, bias.gate_u, bias.gate_r, bias.scale), torch.randn(2, 3, 7)

    def results(gate: Callable[[Tensor], Tensor]) -> list[Tensor]:
        gates = gate(q)
        return [gates, *torch.autograd.grad(gates, leaves, cotangent)]

    compiled = torch.compile(bias.gate, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(results(compiled), results(bias.gate))


def test_a_compiled_graph_holds_the_operator_and_an_exported_one_does_not() -> None:
    graphs = []

    def keep(module, inputs):
        graphs.append(module.graph)
        return module.forward

    class Attend(torch.nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return gated_bias_attention(q, q, q, torch.zeros(3, 9), torch.ones(2, 3, 5))

    q = torch.randn(2, 3, 5, 4)
    with torch.no_grad():
        compiled = torch.compile(Attend(), backend=keep, fullgraph=True)(q)
        torch.testing.assert_close(compiled, Attend()(q))
        exported = torch.export.export(Attend(), (q,)).graph
    (graph,) = graphs
    assert any("gmm_jepa.gated_bias_attention" in name for name in operators_of(graph))
    assert not any("gmm_jepa" in name for name in operators_of(exported))

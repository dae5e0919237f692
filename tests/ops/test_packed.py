"""Packed mixtures are made once, anew after a change, and by any number of threads."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from gmm_jepa import GaussianMixture, ops
from gmm_jepa.ops import Mixture, triton_gmm
from gmm_jepa.ops import packed as packed_module
from gmm_jepa.ops.packed import MixturesByValue, PackedMixtures, mixture_on


def mixture_of(value: float) -> Mixture:
    return Mixture(torch.zeros(2), torch.full((2, 3), value), torch.ones(2, 3))


def test_the_last_few_are_kept():
    made = []
    packed = PackedMixtures(lambda m, *more: made.append((float(m.means[0, 0]), *more)), n_kept=2)
    first, second, third = map(mixture_of, (1.0, 2.0, 3.0))
    for mixture in (first, second, first, third, first, second):
        packed(mixture)
    assert [value for (value,) in made] == [1.0, 2.0, 3.0, 2.0]
    packed(first, "otherwise")
    assert made[-1] == (1.0, "otherwise")


@pytest.mark.parametrize("kind", [PackedMixtures, MixturesByValue])
def test_a_change_in_place_is_seen(kind):
    packed, mixture = kind(lambda m: float(m.means[0, 0]), n_kept=2), mixture_of(1.0)
    assert packed(mixture) == 1.0
    mixture.means.add_(1.0)
    assert packed(mixture) == 2.0
    assert packed(mixture) == 2.0


def _by_another_tensor(means: Tensor) -> None:
    means.data = means + 1.0


# What no version counter tells of.
WRITES: dict[str, Callable[[Tensor], object]] = {
    "tensor.data": lambda means: means.data.add_(1.0),
    "another tensor's memory": _by_another_tensor,
    "NumPy": lambda means: np.add(means.numpy(), 1.0, out=means.numpy()),
    "a view by DLPack": lambda means: torch.from_dlpack(means.detach()).add_(1.0),
}


@pytest.mark.parametrize("way", WRITES)
def test_a_change_past_version_counters_is_seen(way):
    packed, mixture = MixturesByValue(lambda m: float(m.means[0, 0]), n_kept=2), mixture_of(1.0)
    assert packed(mixture) == packed(mixture) == 1.0
    WRITES[way](mixture.means)
    assert packed(mixture) == 2.0


def test_what_is_forgotten_is_packed_anew():
    packed, mixture = PackedMixtures(lambda m: float(m.means[0, 0]), n_kept=2), mixture_of(1.0)
    assert packed(mixture) == 1.0
    mixture.means.data.add_(1.0)
    assert packed(mixture) == 1.0, "or this test is of no use"
    ops.forget_mixtures()
    assert packed(mixture) == 2.0


@pytest.mark.parametrize("kind", [PackedMixtures, MixturesByValue])
def test_threads_push_each_others_mixtures_out(kind):
    packed = kind(lambda m: float(m.means[0, 0]), n_kept=2)
    mixtures, wrong = [mixture_of(float(i)) for i in range(8)], []

    def work(start: int) -> None:
        try:
            for i in range(start, start + 400):
                if packed(mixtures[i % 8]) != float(i % 8):
                    wrong.append(i)
        except Exception as error:
            wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_found_by_value_whatever_the_memory():
    made = []
    packed = MixturesByValue(lambda m, *more: made.append((m, *more)) or len(made), n_kept=2)
    means = np.zeros((2, 3))
    mixture = Mixture(torch.zeros(2), torch.from_numpy(means), torch.ones(2, 3))
    again = Mixture(*(p.clone() for p in mixture))
    assert [packed(mixture), packed(mixture), packed(again)] == [1, 1, 1]
    means[1, 2] = 1.0  # no version counter sees it
    assert packed(mixture) == 2
    assert packed(mixture, "otherwise") == 3
    assert packed(mixture) == 2
    means[1, 2] = 0.0
    assert packed(mixture) == 4, "the least recently used is dropped"
    assert packed(Mixture(*(p.float() for p in mixture))) == 5
    assert made[1][0].means[1, 2] == 1.0, "what is packed is a copy"


def test_values_are_told_apart_by_their_bits():
    packed = MixturesByValue(lambda m: object(), n_kept=2)
    broken = mixture_of(float("nan"))
    assert packed(broken) is packed(broken)
    assert packed(mixture_of(0.0)) is not packed(mixture_of(-0.0))


@pytest.mark.parametrize("way", ["module", "hashlib"])
def test_parameters_in_any_memory_are_known_by_their_values(way, monkeypatch):
    if way == "hashlib":
        monkeypatch.setattr(packed_module, "_native", None)
    packed = MixturesByValue(lambda m: object(), n_kept=2)
    wide = torch.randn(7, 6, dtype=torch.float64)
    operands = [
        packed(Mixture(torch.zeros(7), means, torch.ones(7, 3)))
        for means in (wide[:, ::2], wide[:, ::2].contiguous(), wide[:, 1::2])
    ]
    assert operands[0] is operands[1] is not operands[2]
    halves = wide[:, :3].half()
    assert packed(Mixture(torch.zeros(7), halves, torch.ones(7, 3))) is packed(
        Mixture(torch.zeros(7), halves.double(), torch.ones(7, 3))
    )


def test_large_mixtures_are_kept_by_their_size():
    made = []
    packed = MixturesByValue(lambda m: made.append(float(m.means[0, 0])), n_kept=4, n_values=13)
    first, second, third = map(mixture_of, (1.0, 2.0, 3.0))  # of six means each
    for mixture in (first, second, first, second, third, third, first):
        packed(mixture)
    assert made == [1.0, 2.0, 3.0, 1.0]
    huge = Mixture(torch.zeros(2), torch.full((2, 9), 4.0), torch.ones(2, 9))
    packed(huge)
    packed(huge)
    assert made == [1.0, 2.0, 3.0, 1.0, 4.0]


def test_a_mixture_has_the_same_tensors_on_a_device():
    mixture, device = mixture_of(1.0), torch.device("meta")
    with torch.inference_mode():
        on_device = mixture_on(mixture, device)
    again = mixture_on(Mixture(*(p.clone() for p in mixture)), device)
    assert all(a is b for a, b in zip(on_device, again, strict=True))
    assert on_device.means.device == device
    assert not on_device.means.is_inference(), "or no version counter tells of a change"
    assert mixture_on(mixture_of(2.0), device).means is not on_device.means
    assert mixture_on(mixture, torch.device("cpu")) is mixture


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_estimator_on_a_gpu_packs_its_mixture_once(monkeypatch):
    frames = torch.randn(200, 12, generator=torch.Generator().manual_seed(0))
    model = GaussianMixture(4, random_state=0, tol=1e-3).fit(frames)
    pack, packed = triton_gmm._packed._pack, []
    monkeypatch.setattr(triton_gmm._packed, "_pack", lambda *a: packed.append(1) or pack(*a))
    with torch.inference_mode():
        first = model.predict_proba(frames.cuda())
    assert torch.equal(model.predict_proba(frames.cuda()), first)
    assert len(packed) == 1
    torch.testing.assert_close(first.cpu(), model.predict_proba(frames), rtol=0, atol=1e-5)

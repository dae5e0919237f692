from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from gmm_jepa.data.slots import Room, Slots


@pytest.fixture
def slots():
    return Slots(n_owners=2, n_slots=2, n_bytes=8_192)


def test_owners_have_slots_of_their_own(slots):
    rooms = [slots.take(owner) for owner in (0, 1, 0, 1, 0)]
    assert [room.slot for room in rooms] == [0, 2, 1, 3, None]
    for number, room in enumerate(rooms[:4]):
        room.empty((2_048,)).fill_(number)
    assert [int(slots.lend(room.slot).view(torch.float32)[-1]) for room in rooms[:4]] == [
        0,
        1,
        2,
        3,
    ]


def test_what_is_sent_arrives_and_holds_its_slot(slots):
    room = slots.take(0)
    made = room.empty((3, 5)).fill_(7)
    sent = {
        "made here": made,
        "a part": made[1:],
        "not contiguous": made.T,
        "made elsewhere": torch.arange(6, dtype=torch.int64),
        "mask": torch.tensor([True, False]),
        "number": torch.tensor(3.0, dtype=torch.bfloat16),
        "none": torch.empty(0, 4),
        "words": ["step", 2],
    }
    message = slots.send(sent, room)
    assert len(message.pickled) < 1_000
    got = message.open()
    assert got.keys() == sent.keys()
    for name, value in sent.items():
        if torch.is_tensor(value):
            assert got[name].dtype == value.dtype
            assert torch.equal(got[name], value)
        else:
            assert got[name] == value
    part = got["a part"][0, 1:].numpy()
    del got
    assert slots.take(0).slot == 1
    assert slots.take(0).slot is None
    np.testing.assert_array_equal(part, [7, 7, 7, 7])
    del part
    assert slots.take(0).slot == 0


@pytest.mark.parametrize("taken", [0, 2])
def test_what_has_no_room_is_sent_all_the_same(slots, taken):
    """Larger than the slot, or no slot is free."""
    held = [slots.take(1) for _ in range(taken)]
    room = slots.take(1)
    sent = [room.empty((1_000,)).fill_(1), room.empty((10_000,)).fill_(2), torch.full((5_000,), 3)]
    assert all(map(torch.equal, slots.send(sent, room).open(), sent))
    assert len(held) == taken


class Pinned:
    """Something that can be pinned; without a GPU, a copy must do."""

    def __init__(self, tensor):
        self.tensor = tensor

    def pin_memory(self):
        return Pinned(self.tensor.clone())


def test_pinning_gives_the_slot_back(slots):
    room = slots.take(0)
    pinned = slots.send(Pinned(room.empty((4,)).fill_(5)), room).pin_memory()
    assert pinned.tensor.tolist() == [5] * 4
    assert slots.take(0).slot == 0


def test_a_fork_gives_nothing_back(slots):
    lent = slots.borrow().memory
    child = os.fork()
    if child == 0:
        del lent
        os._exit(0)
    os.waitpid(child, 0)
    assert slots.take(0).slot == 1
    del lent
    assert slots.take(0).slot == 0


def test_systems_without_anonymous_files_have_no_slots(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    slots = Slots(n_owners=1, n_slots=2, n_bytes=100)
    for room in (slots.take(0), slots.borrow()):
        assert room.memory is None
        sent = {"made": room.empty((3,)).fill_(1)}
        assert torch.equal(slots.send(sent, room).open()["made"], sent["made"])


def test_tensors_do_not_overlap():
    room = Room(torch.empty(1_024, dtype=torch.uint8), 0)
    made = [room.empty((n,), torch.uint8).fill_(n) for n in (1, 64, 65, 3)]
    assert [(tensor == n).all().item() for tensor, n in zip(made, (1, 64, 65, 3))] == [True] * 4

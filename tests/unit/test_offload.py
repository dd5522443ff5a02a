"""Tensors that leave their device and come back, on a CPU whose memory stands for the device's.

Not covered: CUDA's streams and pinned memory, which need a GPU.
"""

from __future__ import annotations

import torch

from opd_megatron.parallel.offload import Offloaded, peak_bytes, start_peak


def test_tensors_that_left_hold_no_memory_and_come_back_as_they_were() -> None:
    whole = torch.arange(1000.0)
    # Two views of one buffer, as Megatron-Core's parameters are, a tensor of its own, and one without an element.
    views = [whole[:100].view(10, 10), whole[400:], torch.ones(7, dtype=torch.bfloat16), torch.empty(0)]
    before = [view.clone() for view in views]
    offloaded = Offloaded(views, frozen=False)
    assert offloaded.device_bytes == 1000 * 4 + 7 * 2
    offloaded.leave()
    assert offloaded.device_bytes == 0
    assert whole.untyped_storage().nbytes() == 0
    offloaded.arrive()
    assert all(torch.equal(view, copy) for view, copy in zip(views, before, strict=True))
    assert torch.equal(whole, torch.arange(1000.0))


def test_what_was_computed_on_the_device_travels_unless_it_is_frozen() -> None:
    for frozen, expected in ((False, 2.0), (True, 1.0)):
        tensor = torch.ones(5)
        offloaded = Offloaded([tensor], frozen=frozen)
        offloaded.leave()
        offloaded.arrive()
        tensor.fill_(2.0)
        offloaded.leave()
        offloaded.arrive()
        assert tensor.tolist() == [expected] * 5


def test_other_tensors_are_noticed() -> None:
    tensor = torch.ones(5)
    offloaded = Offloaded([tensor[:2]], frozen=True)
    assert offloaded.holds([tensor[3:]])
    assert not offloaded.holds([tensor, torch.ones(5)])
    assert not offloaded.holds([])


def test_the_peak_of_a_phase_is_its_own() -> None:
    start_peak()
    large = torch.ones(64 << 20, dtype=torch.uint8)
    peak = peak_bytes()
    del large
    in_use = start_peak()
    assert peak - in_use > 48 << 20
    assert peak_bytes() - in_use < 16 << 20

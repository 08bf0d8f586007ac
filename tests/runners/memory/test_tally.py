"""What counts as held, and when."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from runners.memory.tally import Tally

CPU = torch.device("cpu")


def test_the_peak_is_what_is_held_at_once_by_label() -> None:
    with Tally(CPU, "first") as tally:
        a = torch.zeros(1000)
        with tally.labelled("second"):
            b = torch.zeros(500)
        del a
        c = torch.zeros(100)
    assert tally.peak == {"first": 4000, "second": 2000}
    assert (b.numel(), c.numel()) == (500, 100)


def test_views_count_once_and_a_new_label_moves_what_is_held() -> None:
    tally = Tally(CPU, "plain")
    known = torch.zeros(10)
    tally.note(known, "known")
    with tally:
        grown = torch.zeros(4, 25).T[3:].flatten(0, 0)
        tally.note(known, "moved")
        more = torch.zeros(1000)
    assert tally.peak == {"known": 0, "moved": 40, "plain": 400 + 4000}
    assert (grown.numel(), more.numel()) == (88, 1000)


def test_only_the_device_counts() -> None:
    with Tally(torch.device("meta"), "") as tally:
        torch.zeros(10)
        kept = torch.zeros(10, device="meta")
    assert tally.peak == {"": kept.nbytes}


def test_tensors_without_values_are_taken_for_ones() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(3, 4)
    with Tally(CPU, ""):
        assert bool(x.isfinite().all())
        assert float(x.sum()) == 1
        assert torch.equal(x, x)
        assert torch.allclose(x, x)
        assert x[x > 0].shape == (12,)
        assert x.nonzero().shape == (12, 2)
        assert x[torch.tensor([0, 2])].shape == (2, 4)

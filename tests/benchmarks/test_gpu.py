"""What of the GPU's benchmark needs none."""

import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2LMHeadModel

from benchmarks import gpu, gpu_kernel
from benchmarks.gpu import VARIANTS, Case
from ghost import algebra

CPU = torch.device("cpu")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setitem(gpu.SIZES, "tiny", (2, 2, 16))
    return Case("tiny", b=3, tokens=8, v=2, vocabulary=50)


def test_without_a_gpu_one_sentence_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main()
    assert "There is no GPU here" in capsys.readouterr().out


def test_parts_that_are_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "kernels"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "kernels is no part: take some of check, kernel, steps, sweep" in capsys.readouterr().err


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_takes_a_step(tiny: Case, variant: str, weights: torch.dtype) -> None:
    step = gpu.build(tiny, variant, CPU, weights, compiled=False)
    step()
    step()


def test_flops_are_those_of_the_products(tiny: Case) -> None:
    config = tiny.config
    config._attn_implementation = "eager"  # which is made of plain products
    model = GPT2LMHeadModel(config)
    rows = torch.zeros(4, tiny.tokens, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=rows).logits.sum().backward()
    assert tiny.flops(4) == counter.get_total_flops()


def test_flops_of_gpt2() -> None:
    case = Case("gpt2", 16, 1024, 1)
    assert case.flops(1) / 1024 == pytest.approx(6 * 123.5e6 + 12 * 12 * 768 * 1024, rel=1e-3)
    assert case.rows("regular") == 16
    assert case.rows("plain") == case.rows("scored") == 17


def test_a_row_of_the_table() -> None:
    case = Case("gpt2", 16, 1024, 1)
    times = {"regular": [0.03, 0.03], "plain": [0.04, 0.04], "scored": [0.042, 0.042]}
    peaks = {"regular": 10**10, "plain": 11 * 10**9, "scored": 11 * 10**9}
    found = gpu.row(case, torch.float32, times, peaks, "NVIDIA H100 80GB HBM3")
    assert str(found["scored / plain"]) == "1.050 [1.050, 1.050]"
    assert str(found["scored / regular"]) == "1.400 [1.400, 1.400]"
    assert found["peak memory ratio"] == 1.0
    assert found["scored tokens/s"] == round(16 * 1024 / 0.042)
    assert found["plain MFU"] == round(case.flops(17) / 0.04 / 989e12, 3)
    assert gpu.row(case, torch.float32, times, peaks, "Another")["plain MFU"] == "unknown GPU"


@pytest.mark.parametrize("dtype", gpu_kernel.TOLERANCES)
def test_the_check_knows_right_from_wrong(dtype: torch.dtype) -> None:
    layer = replace(gpu_kernel.CHECKED[-1], b=3)
    of_sum, _ = gpu_kernel.TOLERANCES[dtype]

    def wrong(*given: object) -> tuple[torch.Tensor, torch.Tensor]:
        total, dots = algebra.fused_sum_and_scores(*given)
        return total, dots.flip(0)

    right_sum, right_dots = gpu_kernel.errors(layer, CPU, dtype, gpu_kernel.by_pytorch)
    assert right_sum <= of_sum
    assert right_dots <= torch.finfo(dtype).eps
    assert gpu_kernel.errors(layer, CPU, dtype, wrong)[1] > 4 * torch.finfo(dtype).eps

"""The CUDA backend's source, compiled for the host, in what only the host can see."""

import sys

import pytest
import torch
from bound import BEYOND, SIGN, bound, untouched
from cuda_on_host import CudaOnHost
from device_steps import Steps, hyperparameters

from evokernels.kernels.device import Scaling
from evokernels.kernels.plan import Rounding

# more elements than 32 bits can count


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is only promised")
@pytest.mark.parametrize("rounding", [None, Rounding(1, 1)], ids=["nearest", "stochastic"])
@pytest.mark.parametrize(("step", "shift"), [(1, 0), (1, 1), (2, 0)])
def test_offsets_beyond_32_bits(step, shift, rounding):
    parameter, gradient = (untouched(step * BEYOND + shift)[shift::step] for _ in range(2))
    tensor = bound(SIGN, parameter, rounding=rounding)
    plan = Steps(CudaOnHost(), [tensor], [SIGN]).plan
    (launch,) = plan.launches
    # only some of its chunks, which begin where they always do
    middles = sorted({2**31 // step, 2**31, BEYOND // 1024 * 1024 - 1024})
    chunks = torch.tensor([(0, m - 1024, m + 1000) for m in middles])
    launch.header["chunks"], launch.header["chunk_count"] = chunks.data_ptr(), len(chunks)
    for m in middles:
        gradient[m - 1030 : m + 1010] = -2
    assert plan.sum_of_squares([gradient]) == 4 * 2024 * len(middles)
    plan.run([gradient], [hyperparameters(SIGN)], Scaling(clear=True))
    for m in middles:
        near = slice(m - 1026, m + 1002)
        assert (parameter[near][2:-2] == 1).all()
        assert not gradient[near][2:-2].any()
        for values, outside in ((parameter, 0), (gradient, -2)):
            assert values[near][:2].tolist() == values[near][-2:].tolist() == [outside] * 2

import pytest
from cuda_on_host import CudaOnHost

from evokernels.kernels.registry import BACKENDS

ON_HOST = CudaOnHost()


@pytest.fixture(params=["cpu", "eager", ON_HOST.name])
def backend(request, monkeypatch):
    """Every way to run a step on CPU tensors; the CUDA backend's kernels compiled for the host."""
    monkeypatch.setitem(BACKENDS, ON_HOST.name, ON_HOST)
    return request.param

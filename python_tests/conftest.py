import os
import tempfile

import pytest
import torch
from cuda_on_host import CudaOnHost

from evokernels.evolution import evaluator
from evokernels.kernels.registry import BACKENDS

ON_HOST = CudaOnHost()

# kernels that tests compile, also in processes that they start, are no business of the user's cache
_cache = tempfile.TemporaryDirectory(prefix="evokernels-tests-")
os.environ["EVOKERNELS_CACHE_DIR"] = _cache.name


@pytest.fixture(params=["cpu", "eager", ON_HOST.name])
def backend(request, monkeypatch):
    """Every way to run a step on CPU tensors; the CUDA backend's kernels compiled for the host."""
    monkeypatch.setitem(BACKENDS, ON_HOST.name, ON_HOST)
    return request.param


@pytest.fixture
def losses(monkeypatch):
    """Every list of losses that an evaluation ends with."""
    kept = []
    train = evaluator._train

    def keeping(*args):
        kept.append(train(*args))
        return kept[-1]

    monkeypatch.setattr(evaluator, "_train", keeping)
    return kept


def pytest_runtest_setup(item):
    backend = getattr(item, "callspec", None) and item.callspec.params.get("backend")
    if backend is not None:
        item.user_properties.append(("backend", backend))  # bench/gpu.py counts by backend
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} finds no CUDA device")

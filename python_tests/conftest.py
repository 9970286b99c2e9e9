import pytest
import torch


@pytest.fixture(params=["cpu", "eager"])
def backend(request):
    """What every test of the optimizer runs on."""
    return request.param


def pytest_runtest_setup(item):
    backend = getattr(item, "callspec", None) and item.callspec.params.get("backend")
    if backend is not None:
        item.user_properties.append(("backend", backend))  # bench/gpu.py counts by backend
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} finds no CUDA device")

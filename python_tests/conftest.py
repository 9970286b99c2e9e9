import pytest


@pytest.fixture(params=["cpu", "eager"])
def backend(request):
    """What every test of the optimizer runs on."""
    return request.param

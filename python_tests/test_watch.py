"""The native look before a step: it must notice whatever the step rests on, and nothing else.

The oracle is the way without it, which looks at everything in Python.
"""

import ctypes
import dataclasses
import sys

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from evokernels import FusedEvolvedOptimizer, zoo
from evokernels.errors import BackendError, OptimizerError
from evokernels.kernels import foreign as foreign_module
from evokernels.kernels.cpu import CpuBackend
from evokernels.kernels.foreign import Foreign, dtype_number, foreign, tensor_address
from evokernels.optim import binding

SHAPES = [(4,), (2, 3), (), (0,), (1000,)]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(ps, step):
    for i, p in enumerate(ps):
        p.grad = normal(*p.shape, seed=100 * step + i)


def prepared():
    """An optimizer that looks natively, its parameters, and one that waits for a gradient."""
    ps = [nn.Parameter(normal(*shape, seed=i)) for i, shape in enumerate(SHAPES)]
    waiting = nn.Parameter(normal(3, seed=50))
    groups = [{"params": ps[:2]}, {"params": [*ps[2:], waiting], "lr": 0.01}]
    optimizer = FusedEvolvedOptimizer(groups, zoo.adamw)
    for step in range(3):
        gradients(ps, step)
        optimizer.step()
    return optimizer, ps, waiting


def unchanged(optimizer):
    watch = optimizer._binding and optimizer._binding._watch
    return bool(watch) and watch.unchanged(optimizer.param_groups, optimizer.state)


def new_gradients(optimizer, ps, waiting):
    gradients(ps, 7)


def another_lr(optimizer, ps, waiting):
    optimizer.param_groups[0]["lr"] = 0.5


def values_in_place(optimizer, ps, waiting):
    optimizer.state[ps[0]]["exp_avg"].mul_(2)
    with torch.no_grad():
        ps[1].add_(1)


BENIGN = [new_gradients, another_lr, values_in_place]


def no_gradient(optimizer, ps, waiting):
    ps[1].grad = None


def waiting_gradient(optimizer, ps, waiting):
    waiting.grad = torch.ones(3)


def transposed_gradient(optimizer, ps, waiting):
    ps[1].grad = normal(3, 2, seed=9).t()


def negated_view(optimizer, ps, waiting):
    ps[0].grad = normal(4, seed=9)._neg_view()


def sparse_gradient(optimizer, ps, waiting):
    ps[0].grad = normal(4, seed=9).to_sparse()


def gradient_without_memory(optimizer, ps, waiting):
    ps[0].grad = TwoTensor(normal(4, seed=9), normal(4, seed=9))


def gradient_of_another_dtype(optimizer, ps, waiting):
    ps[0].grad.data = ps[0].grad.data.view(torch.int32)


def gradient_freed(optimizer, ps, waiting):
    ps[0].grad.untyped_storage().resize_(0)


def gradient_of_unwritten_zeros(optimizer, ps, waiting):
    ps[0].grad = torch._efficientzerotensor(4)


def parameter_freed(optimizer, ps, waiting):
    ps[0].untyped_storage().resize_(0)


def moment_freed(optimizer, ps, waiting):
    optimizer.state[ps[0]]["exp_avg"].untyped_storage().resize_(0)


def parameter_moved(optimizer, ps, waiting):
    ps[0].data = normal(4, seed=9)


def parameter_transposed(optimizer, ps, waiting):
    ps[1].data = ps[1].data.t().contiguous().t()
    assert ps[1].stride() == (1, 2)


def parameter_swapped(optimizer, ps, waiting):
    other = nn.Parameter(normal(2, 3, seed=9))
    other.grad = normal(2, 3, seed=10)
    ps[1].grad = None
    torch.utils.swap_tensors(ps[1], other)


def parameter_resized(optimizer, ps, waiting):
    with torch.no_grad():
        ps[0].set_(ps[0].untyped_storage(), 0, (2,), (2,))
    ps[0].grad = torch.ones(2)
    optimizer.state[ps[0]].clear()


def moment_replaced(optimizer, ps, waiting):
    optimizer.state[ps[0]]["exp_avg"] = torch.ones(4)


def moment_moved(optimizer, ps, waiting):
    optimizer.state[ps[4]]["exp_avg_sq"].data = torch.ones(1000)


def steps_replaced(optimizer, ps, waiting):
    optimizer.state[ps[0]]["step"] = torch.tensor(50.0)


def steps_in_place(optimizer, ps, waiting):
    optimizer.state[ps[0]]["step"].fill_(50)


def steps_shared_with_other_processes(optimizer, ps, waiting):
    for p in ps:
        optimizer.state[p]["step"].share_memory_()


def state_cleared(optimizer, ps, waiting):
    optimizer.state.clear()


def state_of_one_gone(optimizer, ps, waiting):
    del optimizer.state[ps[2]]


def something_more_in_the_state(optimizer, ps, waiting):
    optimizer.state[ps[4]]["note"] = "mine"


def another_genome(optimizer, ps, waiting):
    optimizer.param_groups[1]["genome"] = zoo.sgd_momentum


def an_equal_genome(optimizer, ps, waiting):
    optimizer.param_groups[1]["genome"] = dataclasses.replace(zoo.adamw)


def another_total(optimizer, ps, waiting):
    optimizer.param_groups[0]["total_steps"] = -5


def impossible_steps(optimizer, ps, waiting):
    optimizer.state[ps[0]]["step"].fill_(-5)


def another_state_dtype(optimizer, ps, waiting):
    optimizer.param_groups[0]["state_dtype"] = torch.bfloat16


def another_seed(optimizer, ps, waiting):
    optimizer.param_groups[0]["seed"] = 7


def parameter_taken_out(optimizer, ps, waiting):
    optimizer.param_groups[0]["params"].pop()


def parameter_added_behind(optimizer, ps, waiting):
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(2)))


def group_replaced(optimizer, ps, waiting):
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.3}


def group_added(optimizer, ps, waiting):
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer.add_param_group({"params": [p]})


def groups_in_a_tuple(optimizer, ps, waiting):
    optimizer.param_groups = tuple(optimizer.param_groups)


def parameters_in_a_tuple(optimizer, ps, waiting):
    optimizer.param_groups[0]["params"] = tuple(optimizer.param_groups[0]["params"])


NOTICED = [
    *(no_gradient, waiting_gradient, transposed_gradient, negated_view, sparse_gradient),
    *(gradient_without_memory, gradient_freed, gradient_of_unwritten_zeros),
    *(gradient_of_another_dtype,),
    *(parameter_freed, moment_freed, steps_shared_with_other_processes),
    *(parameter_moved, parameter_transposed, parameter_swapped, parameter_resized),
    *(moment_replaced, moment_moved, steps_replaced, steps_in_place),
    *(state_cleared, state_of_one_gone, something_more_in_the_state),
    *(
        another_genome,
        an_equal_genome,
        another_state_dtype,
        another_total,
        impossible_steps,
        another_seed,
    ),
    *(parameter_taken_out, parameter_added_behind, group_replaced, group_added),
    *(groups_in_a_tuple, parameters_in_a_tuple),
]


def outcome(change):
    """Parameters, moments and counts after a change and two more steps, or the error."""
    optimizer, ps, waiting = prepared()
    change(optimizer, ps, waiting)
    try:
        for _ in range(2):
            optimizer.step()
    except Exception as error:
        return type(error), str(error)
    state = [value for values in optimizer.state.values() for value in values.values()]
    tensors = [x for x in (*ps, waiting, *state) if isinstance(x, torch.Tensor)]
    return repr([(x.dtype, x.tolist()) for x in tensors])


@pytest.mark.parametrize("change", BENIGN, ids=lambda c: c.__name__)
def test_what_changes_nothing_but_numbers_is_let_pass(change):
    optimizer, *things = prepared()
    assert unchanged(optimizer)
    change(optimizer, *things)
    assert unchanged(optimizer)


@pytest.mark.parametrize("change", NOTICED, ids=lambda c: c.__name__)
def test_what_changes_anything_else_is_noticed(change):
    optimizer, *things = prepared()
    assert unchanged(optimizer)
    change(optimizer, *things)
    assert not unchanged(optimizer)


@pytest.mark.parametrize("change", [*BENIGN, *NOTICED], ids=lambda c: c.__name__)
def test_steps_are_the_same_without_the_native_look(change, monkeypatch):
    natively = outcome(change)
    monkeypatch.setattr(binding, "can_watch", lambda tensors: False)
    assert outcome(change) == natively


def test_a_step_that_looked_natively_counts_and_is_seen_by_autograd():
    optimizer, ps, _ = prepared()
    saved = (ps[0] * ps[0]).sum()
    versions = [p._version for p in ps]
    assert unchanged(optimizer)
    optimizer.step()
    assert [p._version for p in ps] == [version + 1 for version in versions]
    assert [optimizer.state[p]["step"].item() for p in ps] == [4] * len(ps)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_tensors_of_other_types_and_inference_tensors_are_not_looked_at_natively():
    class Sub(torch.Tensor):
        pass

    with torch.inference_mode():
        inference = torch.ones(2)
    assert binding.can_watch([torch.ones(2), nn.Parameter(torch.ones(2))])
    assert not binding.can_watch([torch.ones(2).as_subclass(Sub)])
    assert not binding.can_watch([inference])


@pytest.mark.parametrize(
    "change",
    [gradient_freed, gradient_of_unwritten_zeros, parameter_freed, moment_freed],
    ids=lambda c: c.__name__,
)
def test_what_has_no_memory_is_an_error(change):
    optimizer, *things = prepared()
    change(optimizer, *things)
    with pytest.raises(OptimizerError, match="memory"):
        optimizer.step()
    assert {s["step"].item() for s in optimizer.state.values()} == {3}


def test_counts_go_on_where_other_processes_see_them():
    optimizer, ps, waiting = prepared()
    steps_shared_with_other_processes(optimizer, ps, waiting)
    for step in range(3):
        gradients(ps, step)
        optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in ps] == [6] * len(ps)


def test_an_inference_gradient_that_is_cleared_counts_no_version():
    optimizer, ps, _ = prepared()
    optimizer.zero_grads = True
    gradients(ps, 7)
    with torch.inference_mode():
        ps[0].grad = torch.ones(4)
    assert unchanged(optimizer)
    optimizer.step()
    assert not ps[0].grad.any()
    assert optimizer.state[ps[0]]["step"] == 4


@pytest.mark.parametrize("natively", [True, False])
def test_a_step_that_is_interrupted_after_the_update_is_counted(natively, monkeypatch):
    optimizer, ps, _ = prepared()
    versions = [p._version for p in ps]
    if not natively:
        optimizer._binding._watch = None
    (plan,) = optimizer._binding.plans
    launch = plan.launch

    def launch_and_interrupt(clear):
        launch(clear)
        raise KeyboardInterrupt  # as Python does it: when the native call has returned

    monkeypatch.setattr(plan, "launch", launch_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    monkeypatch.undo()
    assert [optimizer.state[p]["step"].item() for p in ps] == [4] * len(ps)
    if natively:
        assert [p._version for p in ps] == [version + 1 for version in versions]
    for step in range(3):
        gradients(ps, step)
        optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in ps] == [7] * len(ps)


def test_a_step_that_is_interrupted_before_the_update_is_not_counted(monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    optimizer, ps, _ = prepared()
    for watch in (optimizer._binding._watch, None):
        optimizer._binding._watch = watch
        with monkeypatch.context() as patch:
            patch.setattr(optimizer._binding._parts[0][0], "_row", interrupt)
            with pytest.raises(KeyboardInterrupt):
                optimizer.step()
        assert [optimizer.state[p]["step"].item() for p in ps] == [3] * len(ps)


@pytest.mark.filterwarnings("ignore:updating with the slow")
def test_a_model_of_two_backends_is_updated_as_a_whole(monkeypatch):
    why_not = CpuBackend.why_not

    def only_float32(self, program, device, dtype):
        rejected = dtype != torch.float32 and "for this test"
        return rejected or why_not(self, program, device, dtype)

    monkeypatch.setattr(CpuBackend, "why_not", only_float32)
    ps = [nn.Parameter(torch.ones(4, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    optimizer = FusedEvolvedOptimizer(ps, zoo.adamw)
    for _ in range(5):
        for p in ps:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert len(optimizer._binding.plans) == 2
    assert torch.allclose(ps[0], ps[1].float(), rtol=1e-6)


# Foreign functions


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.device("meta")])
def test_they_are_found_in_every_mode_of_torch(mode):
    foreign.cache_clear()
    foreign_module._offset.cache_clear()
    with mode():
        foreign()


def test_tensors_lie_where_they_are_thought_to_lie():
    for tensor in (torch.ones(2), nn.Parameter(torch.ones(2, 3)), torch.ones(2).bfloat16()):
        implementation = ctypes.c_void_p.from_address(tensor_address(tensor)).value
        assert implementation == tensor._cdata
    numbers = {dtype: dtype_number(dtype) for dtype in (torch.float32, torch.bfloat16)}
    assert len(set(numbers.values())) == 2


@pytest.mark.parametrize(
    ("field", "stand_in"),
    [
        ("is_neg", lambda tensor: True),
        ("is_inference", lambda tensor: False),
        ("bump_version", lambda tensor: None),
    ],
)
def test_a_torch_that_answers_differently_is_not_read(field, stand_in):
    result = None if field == "bump_version" else ctypes.c_bool
    function = ctypes.CFUNCTYPE(result, ctypes.c_void_p)(stand_in)
    values = {name: getattr(foreign(), name) for name, _ in Foreign._fields_}
    values[field] = ctypes.cast(function, ctypes.c_void_p).value
    with pytest.raises(ValueError, match=r"(where|what) they were"):
        foreign_module._try_out(Foreign(**values))


@pytest.mark.parametrize("what", ["a symbol is gone", "no lock"])
def test_training_goes_on_with_a_torch_or_python_that_cannot_be_read(what, monkeypatch):
    expected = outcome(new_gradients)
    if what == "no lock":
        monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    else:
        monkeypatch.setitem(foreign_module._TORCH, "is_neg", "_ZN2at6native8is_newerE")
    foreign.cache_clear()
    try:
        with pytest.raises(BackendError):
            foreign()
        optimizer, *_ = prepared()
        assert optimizer._binding._watch is None
        assert outcome(new_gradients) == expected
    finally:
        foreign.cache_clear()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (another_total, "total_steps must be a positive"),
        (impossible_steps, "step in the state must"),
    ],
)
def test_what_is_spoilt_between_steps_is_turned_down_and_nothing_moves(spoil, message):
    optimizer, ps, waiting = prepared()
    spoil(optimizer, ps, waiting)
    before = [p.tolist() for p in ps]
    with pytest.raises(OptimizerError, match=message):
        optimizer.step()
    assert [p.tolist() for p in ps] == before

"""The CPU backend: cover kernels built with the package, one native call for the whole model."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch

from evokernels.compiler.covers import find_cover
from evokernels.compiler.program import Program
from evokernels.compiler.render_c import cover_symbol
from evokernels.errors import BackendError, OptimizerError
from evokernels.kernels import native
from evokernels.kernels.memory import lie_alike_and_densely
from evokernels.kernels.plan import ARITHMETIC, BoundTensor, Numbers

__all__ = ["CpuBackend"]


class CpuBackend:
    """Every rule over the built-in catalogue, for all four element types."""

    name = "cpu"

    def why_not(self, program: Program, device: torch.device, dtype: torch.dtype) -> str | None:
        """Other devices, rules beyond the covers, or a library that does not load."""
        if device.type != "cpu":
            return f"it runs on the CPU, the tensors are on {device}"
        if find_cover(program) is None:
            return "no kernel that was built with the package covers this rule"
        try:
            native.library()
        except BackendError as error:
            return str(error)
        return None

    def kernel(self, program: Program, dtype: torch.dtype) -> str:
        """Name and instruction set."""
        return f"{_symbol(program, dtype)} ({native.instruction_set()})"

    def bind(self, tensors: Sequence[BoundTensor]) -> CpuPlan:
        """A plan over these tensors."""
        return CpuPlan(tensors)


class CpuPlan:
    """Static pointers of all tensors in one table; only gradients and numbers change."""

    def __init__(self, tensors: Sequence[BoundTensor]) -> None:
        count = len(tensors)
        programs = {id(bound.program): bound.program for bound in tensors}
        self._arrangements = {key: _arrangement(program) for key, program in programs.items()}
        self._tensors = tensors
        self._records = (native.TensorRecord * count)(*map(_record, tensors))
        self._layouts: list[_Layout | None] = [None] * count
        self._gradient_keys: list[tuple | None] = [None] * count
        self._updated: list[torch.Tensor] = []  # parameters that have a gradient
        self.addresses = (ctypes.c_void_p * count)()
        self._rows = (ctypes.c_int32 * count)()

    def run(
        self,
        gradients: Sequence[torch.Tensor | None],
        rows: Sequence[int],
        numbers: Sequence[Numbers],
        clear=False,
    ) -> None:
        keys = [
            None if g is None else (g.stride(), g.shape, g.dtype, g.is_neg()) for g in gradients
        ]
        if keys != self._gradient_keys:
            self._adapt(gradients, keys)
        self.addresses[:] = [None if g is None else g.data_ptr() for g in gradients]
        self._rows[:] = rows
        self.relaunch(numbers, clear)
        # autograd does not see writes through pointers: tell it, as in-place operations do
        torch.autograd.graph.increment_version(self._updated)

    def squares(self): return 0.0

    def relaunch(self, numbers, clear=False):
        scalars = [self._arrangements[id(row.program)](row.values) for row in numbers]
        self._scalars = (ctypes.POINTER(ctypes.c_double) * len(scalars))(*scalars)
        self.launch()

    def launch(self) -> None:
        """The native call alone, with the gradients and numbers of the last run."""
        native.library().evk_step(
            self._records,
            self.addresses,
            self._scalars,
            self._rows,
            len(self._records),
            torch.get_num_threads(),
        )

    def _adapt(self, gradients: Sequence[torch.Tensor | None], keys: list[tuple | None]) -> None:
        """Choose the flat or the strided path of each tensor for gradients as they lie now."""
        known = self._gradient_keys
        self._gradient_keys = [None] * len(keys)  # an error below leaves nothing half known
        for i, (bound, gradient) in enumerate(zip(self._tensors, gradients, strict=True)):
            if gradient is None or keys[i] == known[i]:
                continue
            parameter = bound.parameter
            if keys[i][1:] != (parameter.shape, parameter.dtype, False):
                raise OptimizerError(
                    f"a gradient is {gradient.dtype} of shape {tuple(gradient.shape)}, its "
                    f"parameter {parameter.dtype} of shape {tuple(parameter.shape)}; both must be "
                    "the same, and no negated view"
                )
            operands = (parameter, gradient, *bound.moments.values())
            flat = lie_alike_and_densely(operands)
            self._layouts[i] = None if flat else _Layout(bound, gradient)
            self._records[i].layout = None if flat else self._layouts[i].pointer
        self._gradient_keys = keys
        self._updated = [
            bound.parameter for bound, key in zip(self._tensors, keys, strict=True) if key
        ]


class _Layout:
    """An evk_layout and the memory it points to."""

    def __init__(self, bound: BoundTensor, gradient: torch.Tensor) -> None:
        operands = (bound.parameter, gradient, bound.moments.get("m"), bound.moments.get("v"))
        numbers = ctypes.c_int64 * gradient.dim()
        self._shape = numbers(*gradient.shape)
        self._strides = [t if t is None else numbers(*t.stride()) for t in operands]
        addresses = [ctypes.cast(s, ctypes.POINTER(ctypes.c_int64)) for s in self._strides]
        layout = native.Layout(
            gradient.dim(),
            ctypes.cast(self._shape, ctypes.POINTER(ctypes.c_int64)),
            (ctypes.POINTER(ctypes.c_int64) * 4)(*addresses),
        )
        self.pointer = ctypes.pointer(layout)


def _record(bound: BoundTensor) -> native.TensorRecord:
    parameter, moments = bound.parameter, bound.moments
    return native.TensorRecord(
        kernel=native.kernel_address(_symbol(bound.program, parameter.dtype)),
        p=parameter.data_ptr(),
        m=moments["m"].data_ptr() if "m" in moments else None,
        v=moments["v"].data_ptr() if "v" in moments else None,
        elements=parameter.numel(),
        element_size=parameter.element_size(),
        moment_size=ARITHMETIC[parameter.dtype].itemsize,
    )


def _arrangement(program: Program) -> Callable[[Sequence[float]], ctypes.Array]:
    """A function from the scalars of a program to those of its cover."""
    cover = find_cover(program)
    absent = [role for role in cover.program.scalars if role not in program.scalars]
    known = [cover.absent[role] for role in absent]
    roles = [*program.scalars, *absent]
    order = [roles.index(role) for role in cover.program.scalars]
    array = ctypes.c_double * len(order)

    def arranged(values: Sequence[float]) -> ctypes.Array:
        candidates = [*values, *known]
        return array(*[candidates[i] for i in order])

    return arranged


def _symbol(program: Program, dtype: torch.dtype) -> str:
    """The name of the kernel in the native library."""
    return cover_symbol(find_cover(program), str(dtype).removeprefix("torch."))

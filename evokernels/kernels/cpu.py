"""The CPU backend: one native call for the whole model.

Its kernels are covers, which were built with the package, and for rules that none of them serves
those of `own_kernels`.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from evokernels.compiler.covers import find_cover
from evokernels.compiler.program import Program
from evokernels.compiler.render_c import STORED, cover_symbol
from evokernels.errors import BackendError
from evokernels.kernels import native
from evokernels.kernels.c_compiler import CCompiler
from evokernels.kernels.memory import lies_densely, memory_order, overlaps_itself
from evokernels.kernels.own_kernels import OwnKernels, own_kernels
from evokernels.kernels.plan import (
    ARITHMETIC,
    BoundTensor,
    Numbers,
    addresses_of,
    check_gradient,
    layout_key,
)

__all__ = ["CpuBackend", "CpuPlan"]


class CpuBackend:
    """Every rule, for all four element types; where no cover serves it, with a C compiler."""

    name = "cpu"
    fused = True

    def why_not(self, program: Program, device: torch.device, dtype: torch.dtype) -> str | None:
        """Other devices, a library that does not load, or no kernel and no compiler to make one.

        A rule that no cover serves is compiled here, with moments of the arithmetic type.
        """
        if device.type != "cpu":
            return f"it runs on the CPU, the tensors are on {device}"
        if reason := native.why_not():
            return reason
        if find_cover(program) is None:
            try:
                own_kernels(program, _name(dtype), _name(ARITHMETIC[dtype]))
            except BackendError as error:
                return str(error)
        return None

    def kernel(self, program: Program, dtype: torch.dtype) -> str:
        """Its name, or who has compiled it, and the instruction set."""
        cover = find_cover(program)
        if cover is None:
            return f"compiled here by {CCompiler.find().name}, {native.instruction_set()}"
        symbol = cover_symbol(cover, _name(dtype), _name(ARITHMETIC[dtype]))
        return f"{symbol} ({native.instruction_set()})"

    def bind(self, tensors: Sequence[BoundTensor]) -> CpuPlan:
        """A plan over these tensors."""
        return CpuPlan(tensors)


class CpuPlan:
    """All tensors in one table; from step to step only gradients and numbers change.

    Attributes:
        addresses: of the gradients, NULL where there is none. Whoever knows that these are all
            that has changed since the last `run`, numbers aside, may write them and `relaunch`.
    """

    def __init__(self, tensors: Sequence[BoundTensor]) -> None:
        count = len(tensors)
        self._tensors = tensors
        self._orders = [memory_order(bound.parameter) for bound in tensors]
        self._kernels = [_Kernels.of(*pair) for pair in zip(tensors, self._orders, strict=True)]
        self._layouts = [_layouts(*pair) for pair in zip(tensors, self._orders, strict=True)]
        self._records = (native.TensorRecord * count)(*map(_record, tensors))
        for record, layouts in zip(self._records, self._layouts, strict=True):
            for name, layout in layouts.items():
                record.layouts[native.PLACES[name]] = layout.pointer
        self._gradient_keys: list[tuple | None] = [None] * count
        self._updated: list[torch.Tensor] = []  # parameters that have a gradient
        self._rows = (ctypes.c_int32 * count)()
        self._numbers = _NumbersTable([])
        self._spans = (native.Span * count)(*((None, None, i) for i in range(count)))
        self.addresses = (ctypes.c_void_p * count)()
        self._library = native.library()
        # plain numbers are what ctypes passes fastest
        self._count = count
        self._arrays = [
            ctypes.addressof(array)
            for array in (self._records, self.addresses, self._rows, self._spans)
        ]

    def run(
        self,
        gradients: Sequence[torch.Tensor | None],
        rows: Sequence[int],
        numbers: Sequence[Numbers],
        *,
        clear: bool = False,
    ) -> None:
        """One step, as `Plan` says."""
        self._look_at(gradients)
        self._rows[:] = rows
        if not self._numbers.fits(numbers):
            self._numbers = _NumbersTable(numbers)
        self.relaunch(numbers, clear)
        # autograd does not see writes through pointers: tell it, as in-place operations do
        torch.autograd.graph.increment_version(self._updated)
        if clear:
            torch.autograd.graph.increment_version([g for g in gradients if g is not None])

    def relaunch(self, numbers: Sequence[Numbers], clear: bool = False) -> None:
        """`run` with `addresses` as they are: all else but the numbers is as in the last one.

        Autograd is not told.
        """
        self._numbers.write(numbers)
        self.launch(clear)

    def launch(self, clear: bool = False) -> None:
        """The native call alone, with the gradients and numbers of the last run."""
        records, addresses, rows, spans = self._arrays
        threads = torch.get_num_threads()
        self._library.evk_step(
            records, addresses, self._numbers.address, rows, self._count, threads, clear, spans
        )

    def sum_of_squares(self, gradients: Sequence[torch.Tensor | None]) -> float:
        """As `Plan` says; the same for every number of threads."""
        self._look_at(gradients)
        return self.squares()

    def squares(self) -> float:
        """`sum_of_squares` with `addresses` as they are."""
        records, addresses, _, _ = self._arrays
        return self._library.evk_sum_of_squares(
            records, addresses, self._count, torch.get_num_threads()
        )

    def _look_at(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Take the gradients' addresses, and adapt to how they lie where that has changed."""
        keys = [None if g is None else layout_key(g) for g in gradients]
        if keys != self._gradient_keys:
            self._adapt(gradients, keys)
        self.addresses[:] = addresses_of(gradients)

    def _adapt(self, gradients: Sequence[torch.Tensor | None], keys: list[tuple | None]) -> None:
        """Choose kernel and layout of each tensor for gradients as they lie now."""
        known = self._gradient_keys
        self._gradient_keys = [None] * len(keys)  # an error below leaves nothing half known
        for i, (bound, gradient) in enumerate(zip(self._tensors, gradients, strict=True)):
            if gradient is None or keys[i] == known[i]:
                continue
            check_gradient(bound, gradient, keys[i])
            dense = lies_densely(gradient, self._orders[i])
            layout = None if dense else native.LayoutTable(gradient, self._orders[i])
            record, kernels = self._records[i], self._kernels[i]
            self._layouts[i]["g"] = layout  # keeps the memory to which the record points
            record.layouts[native.PLACES["g"]] = layout and layout.pointer
            record.gradient_overlaps = overlaps_itself(gradient)
            record.staged = kernels.direct is None or not dense
            record.kernel = kernels.staged if record.staged else kernels.direct
        self._gradient_keys = keys
        self._updated = [
            bound.parameter for bound, key in zip(self._tensors, keys, strict=True) if key
        ]


@dataclass(frozen=True)
class _Kernels:
    """Addresses of the kernels that can update a tensor.

    Attributes:
        direct: reads and writes the tensors themselves, if their gradient lies as they do; None
            where that cannot be.
        staged: reads and writes buffers of the arithmetic type.
        own: what holds them in memory, if they are not the package's own.
    """

    direct: int | None
    staged: int
    own: OwnKernels | None = None

    @classmethod
    def of(cls, bound: BoundTensor, order: Sequence[int]) -> _Kernels:
        dtype, moments = bound.parameter.dtype, bound.moments.values()
        states = {moment.dtype for moment in moments} or {ARITHMETIC[dtype]}
        kernels = cls._for(bound.program, dtype, *states)
        stochastic = bound.rounding and torch.bfloat16 in {dtype, *states}
        dense = all(lies_densely(tensor, order) for tensor in (bound.parameter, *moments))
        return kernels if dense and not stochastic else replace(kernels, direct=None)

    @classmethod
    def _for(cls, program: Program, dtype: torch.dtype, state: torch.dtype) -> _Kernels:
        stored = _name(dtype), _name(state)
        cover = find_cover(program)
        if cover is None:
            own = own_kernels(program, *stored)
            return cls(own.direct, own.staged, own)
        staged = (_name(ARITHMETIC[dtype]),) * 2
        direct, staged = (
            native.kernel_address(cover_symbol(cover, *pair)) if pair in STORED else None
            for pair in (stored, staged)
        )
        return cls(direct, staged)


class _NumbersTable:
    """Room for the numbers of a step, in the order in which kernels take them."""

    def __init__(self, numbers: Sequence[Numbers]) -> None:
        self._programs = [row.program for row in numbers]
        self._known, self._picks, self._scalars = [], [], []
        for program in self._programs:
            cover = find_cover(program)
            taken = program.scalars if cover is None else cover.program.scalars
            absent = [role for role in taken if role not in program.scalars]
            roles = [*program.scalars, *absent]
            order = [roles.index(role) for role in taken]
            self._known.append([cover.absent[role] for role in absent] if cover else [])
            self._picks.append(operator.itemgetter(*order))
            self._scalars.append((ctypes.c_double * len(order))())
        records = (native.NumbersRecord * len(numbers))(
            *((ctypes.cast(s, ctypes.POINTER(ctypes.c_double)), 0) for s in self._scalars)
        )
        self._records = list(records)
        self.address = ctypes.addressof(records)

    def fits(self, numbers: Sequence[Numbers]) -> bool:
        """Whether the rows are of the programs for which it was made."""
        return len(numbers) == len(self._programs) and all(
            row.program is program for row, program in zip(numbers, self._programs, strict=True)
        )

    def write(self, numbers: Sequence[Numbers]) -> None:
        """Values for the scalars of each row's kernel."""
        for i, (_, values, t) in enumerate(numbers):
            self._scalars[i][:] = self._picks[i]((*values, *self._known[i]))
            self._records[i].t = t


def _record(bound: BoundTensor) -> native.TensorRecord:
    """What does not depend on the gradient."""
    parameter, rounding = bound.parameter, bound.rounding
    tensors = {"p": parameter, **bound.moments}
    record = native.TensorRecord(
        elements=parameter.numel(),
        operands=1 + max(native.PLACES[name] for name in ("v", *tensors)),
        float64=ARITHMETIC[parameter.dtype] == torch.float64,
    )
    for name, tensor in tensors.items():
        record.tensors[native.PLACES[name]] = tensor.data_ptr()
        record.formats[native.PLACES[name]] = native.FORMATS[tensor.dtype]
    record.formats[native.PLACES["g"]] = native.FORMATS[parameter.dtype]
    if rounding:
        record.stochastic, record.seed, record.position = True, rounding.seed, rounding.position
    return record


def _layouts(bound: BoundTensor, order: Sequence[int]) -> dict[str, native.LayoutTable | None]:
    """Of parameter and moments, where they do not lie densely in the parameter's order."""
    return {
        name: native.LayoutTable(tensor, order)
        for name, tensor in {"p": bound.parameter, **bound.moments}.items()
        if not lies_densely(tensor, order)
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

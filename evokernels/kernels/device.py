"""Plans on a GPU: the whole step in one launch, which counts it too; nothing comes back.

Static tables (addresses, layouts, chunks, weights of the rule) are uploaded once. What changes from
step to step goes with the launch: hyperparameters of the groups and addresses of the gradients.
`compiler/words.py` says how all of it is laid out. CUDA and Triton differ in `DeviceBackend.load`.
"""

from __future__ import annotations

import abc
import ctypes
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from evokernels.compiler.lower import Rule
from evokernels.compiler.program import OPERANDS, Program
from evokernels.compiler.spelling import Kind
from evokernels.compiler.structure import Structure, structure_of, weights_of
from evokernels.compiler.words import DENSE, GROUP, HEADER, TENSOR
from evokernels.errors import OptimizerError
from evokernels.kernels.launches import Launch, block_count, chunk_length, cut, split
from evokernels.kernels.memory import (
    find_overlap,
    lies_densely,
    memory_order,
    overlaps_itself,
    strided_rows,
)
from evokernels.kernels.plan import (
    ARITHMETIC,
    BoundTensor,
    addresses_of,
    check_gradient,
    layout_key,
)

__all__ = ["DeviceBackend", "DeviceKernel", "DevicePlan", "Scaling", "capturing"]


def capturing(device: torch.device) -> bool:
    """Whether what is launched there now goes into a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):  # torch asks the current stream of the current device
        return torch.cuda.is_current_stream_capturing()


# The vector accesses of the kernels.
ALIGNMENT = 16

# In place of the address of a gradient of no elements, which may be 0: it is there, and counts.
_NO_ELEMENTS = ALIGNMENT


class DeviceKernel(Protocol):
    """A compiled kernel on one device.

    Attributes:
        resident: blocks that the device can hold at a time.
    """

    resident: int

    def update(self, words: np.ndarray, blocks: int) -> None:
        """One step, on the current stream, of the tensors of a launch.

        Args:
            words: int64, laid out as `compiler.words` says; read before this returns.
        """

    def squares(self, words: np.ndarray, blocks: int) -> None:
        """The sum of the squares of all gradients, into where the header says."""


class DeviceBackend(abc.ABC):
    """A way to run programs on a device that counts its steps itself.

    Attributes:
        most_words: that a launch can take.
    """

    name: str
    fused = True
    most_words: int

    @abc.abstractmethod
    def why_not(self, program: Program, device: torch.device, dtype: torch.dtype) -> str | None:
        """As `Backend` says."""

    @abc.abstractmethod
    def kernel(self, program: Program, dtype: torch.dtype) -> str:
        """As `Backend` says."""

    @abc.abstractmethod
    def load(self, kinds: tuple[Kind, ...], words: int, device: torch.device) -> DeviceKernel:
        """The kernel for these kinds, which takes `words` words at most; compiled if need be."""


class Scaling(NamedTuple):
    """What is done to all gradients of a step, before the rule sees them.

    Attributes:
        found_inf: float32, one element on the device, not zero if the step must not be taken.
        grad_scale: float32, one element on the device: what gradients were multiplied with.
        max_norm: limit on the norm of all gradients together.
        squares: float64, one element on the device: the sum of their squares, if there is a limit.
        clear: whether gradients become zero.
    """

    found_inf: torch.Tensor | None = None
    grad_scale: torch.Tensor | None = None
    max_norm: float = math.inf
    squares: torch.Tensor | None = None
    clear: bool = False

    def on(self, device: torch.device) -> Scaling:
        """The same for a device, as its kernel reads them: sent there, of the right dtype."""

        def sent(value: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
            return None if value is None else value.to(device, dtype, non_blocking=True)

        return self._replace(
            found_inf=sent(self.found_inf, torch.float32),
            grad_scale=sent(self.grad_scale, torch.float32),
            squares=sent(self.squares, torch.float64),
        )


class DevicePlan:
    """Tensors of one device, in one launch (more only where a launch cannot take all addresses).

    Args:
        backend: what compiles and launches.
        tensors: the parameters and their moments.
        groups: for each tensor its group.
        rules: for each group its rule.
        counts: float64, on the device: for each tensor the steps taken. `run` counts.
    """

    def __init__(
        self,
        backend: DeviceBackend,
        tensors: Sequence[BoundTensor],
        groups: Sequence[int],
        rules: Sequence[Rule],
        counts: torch.Tensor,
    ) -> None:
        self._tensors = tensors
        self._device = counts.device
        self._counts = counts  # kept: launches have its address alone
        self._orders = [memory_order(bound.parameter) for bound in tensors]
        structures = [structure_of(rule) for rule in rules]
        kinds = [_kind(b, structures[g]) for b, g in zip(tensors, groups, strict=True)]
        self.kinds = tuple(sorted(set(kinds), key=repr))
        launches = split(groups, backend.most_words)
        most_words = max(launch.words for launch in launches)
        self._kernel = backend.load(self.kinds, most_words, self._device)
        self.launches = [_Launch(self._kernel.resident, launch, tensors) for launch in launches]
        # everything that kernels read, captured ones too: a table is replaced, never written again;
        # by content, for gradients that lie now in one way, now in another
        self._tables: dict[bytes, torch.Tensor] = {}
        self._layouts: dict[tuple[int, ...], int] = {}  # in the order and at the places of a table
        self._layout_words = 0
        weights = [weights_of(rule, s) for rule, s in zip(rules, structures, strict=True)]
        starts = np.cumsum([0, *map(len, weights)])
        self._records = np.zeros(len(tensors), [(name, np.int64) for name in TENSOR])
        for operand in OPERANDS:  # a gradient seen for the first time differs if it is not dense
            self._records[f"{operand}_layout"] = DENSE
        for launch in self.launches:
            for i, group in zip(launch.members, launch.group_of_tensor, strict=True):
                kind = self.kinds.index(kinds[i])
                self._fill(self._records[i], tensors[i], self._orders[i], kind, group)
                self._records[i]["weights"] = starts[groups[i]]
        weight_table = self._upload(np.array([w for row in weights for w in row], np.float64))
        self._ticket = torch.zeros(1, dtype=torch.int32, device=self._device)
        for launch in self.launches:
            launch.header["weights"] = weight_table
            launch.header["chunks"] = self._upload(launch.chunks)
            launch.header["counts"] = counts[launch.first :].data_ptr()
            launch.header["ticket"] = self._ticket.data_ptr()
        self._upload_records()
        self._gradient_keys: list[tuple | None] = [None] * len(tensors)
        self._updated: list[torch.Tensor] = []  # parameters that have a gradient
        self._addresses_apart: bytes | None = None  # of gradients known to share no memory

    def run(
        self,
        gradients: Sequence[torch.Tensor | None],
        hyperparameters: Sequence[Sequence[float | torch.Tensor]],
        scaling: Scaling,
    ) -> None:
        """One step, on the current stream.

        Args:
            gradients: one for each bound tensor, of its shape and dtype; None leaves it alone.
            hyperparameters: for each group the values of `GROUP_INPUTS`; the learning rate may be a
                tensor on the device, of one element, float32 or float64.
            scaling: what is done to all gradients.
        """
        self.look(gradients)
        self.update(gradients, hyperparameters, scaling)

    def update(
        self,
        gradients: Sequence[torch.Tensor | None],
        hyperparameters: Sequence[Sequence[float | torch.Tensor]],
        scaling: Scaling,
    ) -> None:
        """`run` with gradients at which it has looked."""
        clear_at_once = scaling.clear and self._lie_apart(gradients)
        self.relaunch(hyperparameters, scaling._replace(clear=clear_at_once))
        present = [gradient for gradient in gradients if gradient is not None]
        if scaling.clear and not clear_at_once:
            torch._foreach_zero_(present)
        # autograd does not see writes through pointers: tell it, as in-place operations do
        torch.autograd.graph.increment_version(self._updated)
        if scaling.clear:
            torch.autograd.graph.increment_version(present)

    def relaunch(
        self, hyperparameters: Sequence[Sequence[float | torch.Tensor]], scaling: Scaling
    ) -> None:
        """`run` with `addresses` as they are: gradients lie as in the last one.

        Autograd is not told, and gradients that are cleared must lie apart.
        """
        for launch in self.launches:
            header = launch.header
            header["found_inf"] = _address(scaling.found_inf)
            header["grad_scale"] = _address(scaling.grad_scale)
            header["squares"] = _address(scaling.squares)
            header["clear"] = scaling.clear
            launch.max_norm[...] = scaling.max_norm
            for row, group in enumerate(launch.groups):
                launch.write(row, hyperparameters[group])
            self._kernel.update(launch.words, launch.blocks)

    def sum_of_squares(self, gradients: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """The sum of the squares of all elements of all gradients: float64, 0-d, on the device."""
        self.look(gradients)
        return self.squares()

    def squares(self, chosen: Sequence[bool] | None = None) -> torch.Tensor:
        """`sum_of_squares` with `addresses` as they are.

        Args:
            chosen: for each bound tensor whether its gradient belongs to the sum; None for all.
        """
        chunks = max(len(launch.chunks) for launch in self.launches)
        sums = torch.empty(1 + chunks, dtype=torch.float64, device=self._device)
        for number, launch in enumerate(self.launches):
            launch.header["squares"] = sums.data_ptr()
            launch.header["partial_sums"] = sums[1:].data_ptr()
            launch.header["go_on"] = number > 0
            words = launch.words
            if chosen is not None:  # a null address is no gradient
                words = words.copy()
                words[-len(launch.gradients) :] *= chosen[launch.first : launch.end]
            self._kernel.squares(words, launch.blocks)
        return sums[0]

    @property
    def addresses(self) -> ctypes.Array | None:
        """Where the addresses of all gradients go, if one launch takes them all and none is empty.

        Whoever knows that these are all that has changed since the last `run`, hyperparameters
        aside, may write them and `relaunch`.
        """
        if len(self.launches) > 1 or (self._records["elements"] == 0).any():
            return None
        (launch,) = self.launches
        return (ctypes.c_void_p * len(launch.gradients)).from_buffer(launch.gradients.data)

    @property
    def lie_apart(self) -> bool:
        """Whether the gradients at `addresses` are known to share no memory."""
        return self._addresses_apart == self._addresses()

    def look(self, gradients: Sequence[torch.Tensor | None]) -> bool:
        """Take the gradients' addresses, and adapt to how they lie where that has changed.

        `run` looks by itself; this is for who wants to know before whether it can.

        Returns:
            Whether they lie as before, wherever they are.

        Raises:
            OptimizerError: a gradient is not as its parameter, or has no memory.
        """
        keys = [None if g is None else layout_key(g) for g in gradients]
        as_before = keys == self._gradient_keys
        if not as_before:
            self._adapt(gradients, keys)
        addresses = [0 if a is None else a or _NO_ELEMENTS for a in addresses_of(gradients)]
        for launch in self.launches:
            launch.gradients[:] = addresses[launch.first : launch.end]
        return as_before

    def _adapt(self, gradients: Sequence[torch.Tensor | None], keys: list[tuple | None]) -> None:
        known = self._gradient_keys
        self._gradient_keys = [None] * len(keys)  # an error below leaves nothing half known
        self._addresses_apart = None  # expanded ones overlap at the same addresses
        before = self._records["g_layout"].copy()
        now = before.copy()
        for i, (bound, gradient) in enumerate(zip(self._tensors, gradients, strict=True)):
            if gradient is not None and keys[i] != known[i]:
                check_gradient(bound, gradient, keys[i])
                now[i] = self._layout(gradient, self._orders[i])
        if (before != now).any():
            if capturing(self._device):
                raise OptimizerError(
                    "gradients lie in memory otherwise than in the steps before, which a step "
                    "cannot take note of while it is captured: run one with such gradients before"
                )
            self._records["g_layout"] = now
            self._upload_records()
        self._gradient_keys = keys
        self._updated = [
            bound.parameter for bound, key in zip(self._tensors, keys, strict=True) if key
        ]

    def _lie_apart(self, gradients: Sequence[torch.Tensor | None]) -> bool:
        """Whether clearing one element of a gradient leaves all others as they are."""
        if not self.lie_apart:
            present = [gradient for gradient in gradients if gradient is not None]
            if any(map(overlaps_itself, present)) or find_overlap(present):
                return False
            self._addresses_apart = self._addresses()
        return True

    def _addresses(self) -> bytes:
        return b"".join(launch.gradients.tobytes() for launch in self.launches)

    def _fill(
        self, record: np.void, bound: BoundTensor, order: Sequence[int], kind: int, group: int
    ) -> None:
        """What a record says that does not depend on the gradient."""
        tensors = {"p": bound.parameter, **bound.moments}
        for name, tensor in tensors.items():
            record[name] = tensor.data_ptr()
            record[f"{name}_layout"] = self._layout(tensor, order)
        record["elements"], record["kind"], record["group"] = bound.parameter.numel(), kind, group
        record["aligned"] = all(
            tensor.data_ptr() % ALIGNMENT == 0 and lies_densely(tensor, order)
            for tensor in tensors.values()
        )
        if bound.rounding:
            record["seed"] = np.uint64(bound.rounding.seed).astype(np.int64)
            record["position"] = bound.rounding.position

    def _layout(self, tensor: torch.Tensor, order: Sequence[int]) -> int:
        """Where the layout of a tensor is in the table; written there if it is not dense."""
        if lies_densely(tensor, order):
            return DENSE
        rows = strided_rows(tensor, order)
        layout = (len(rows), *(number for row in rows for number in row))
        if layout not in self._layouts:
            self._layouts[layout] = self._layout_words
            self._layout_words += len(layout)
        return self._layouts[layout]

    def _upload_records(self) -> None:
        words = [word for layout in self._layouts for word in layout]
        layouts = self._upload(np.array(words or [0], np.int64))
        for launch in self.launches:
            launch.header["layouts"] = layouts
            launch.header["tensors"] = self._upload(self._records[launch.first : launch.end])

    def _upload(self, table: np.ndarray) -> int:
        """The address of a table on the device."""
        content = table.tobytes()
        if content not in self._tables:
            words = torch.from_numpy(np.frombuffer(content, np.int64).copy())
            self._tables[content] = words.to(self._device)
        return self._tables[content].data_ptr()


class _Launch:
    """A launch and the block of words that it takes, with names for its parts."""

    def __init__(self, resident: int, launch: Launch, tensors: Sequence[BoundTensor]) -> None:
        self.first, self.end = launch.first, launch.end
        self.groups, self.group_of_tensor = launch.groups, launch.group_of_tensor
        self.members = range(launch.first, launch.end)
        elements = [tensors[i].parameter.numel() for i in self.members]
        length = chunk_length(sum(elements), resident)
        self.chunks = cut(elements, launch.group_of_tensor, length)
        self.blocks = block_count(len(self.chunks), resident)
        self.words = np.zeros(launch.words, np.int64)
        head, body = len(HEADER), len(HEADER) + len(self.groups) * len(GROUP)
        self.header = self.words[:head].view([(name, np.int64) for name in HEADER])[0]
        self.max_norm = self.words[list(HEADER).index("max_norm") :][:1].view(np.float64)
        table = self.words[head:body].reshape(len(self.groups), len(GROUP))
        self.learning_rates = table[:, :2]
        self.inputs = table[:, 2:].view(np.float64)
        self.gradients = self.words[body:]
        self.header["chunk_count"] = len(self.chunks)
        self.header["tensor_count"] = launch.end - launch.first
        self.header["group_count"] = len(self.groups)

    def write(self, row: int, values: Sequence[float | torch.Tensor]) -> None:
        """The hyperparameters of a group."""
        lr, *others = values
        on_device = isinstance(lr, torch.Tensor)
        self.learning_rates[row] = (
            (lr.data_ptr(), lr.dtype == torch.float64) if on_device else (0, 0)
        )
        self.inputs[row] = (0.0 if on_device else lr, *others)


def _kind(bound: BoundTensor, structure: Structure) -> Kind:
    dtype = bound.parameter.dtype
    (state,) = {moment.dtype for moment in bound.moments.values()} or {ARITHMETIC[dtype]}
    names = [str(each).removeprefix("torch.") for each in (dtype, state)]
    return Kind(structure, *names, bound.rounding is not None and "bfloat16" in names)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()

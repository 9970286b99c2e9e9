"""What a host hands to a device kernel, as words of 64 bits: the order of fields, once for all.

The CUDA and Triton renderers and the plan that fills the tables derive from these lists. A launch
has one block of words: `HEADER`, then a `GROUP` for each group, then the address of each gradient
(0: there is none). The header points to tables that stay as they are from step to step.
"""

from __future__ import annotations

from evokernels.compiler.program import OPERANDS
from evokernels.compiler.terms import GROUP_INPUTS

__all__ = ["CHUNK", "DENSE", "GROUP", "HEADER", "STATES", "TENSOR"]

# Field → "int64", "uint64", "float64" or "pointer".
HEADER = {
    "tensors": "pointer",  # a TENSOR for each tensor of this launch
    "chunks": "pointer",  # a CHUNK for each chunk of this launch
    "weights": "pointer",  # float64: for each group those of its structure, one after another
    "layouts": "pointer",  # int64: dimensions, then shape and stride of each, the innermost last
    "counts": "pointer",  # float64: for each tensor the steps in which it had a gradient
    "ticket": "pointer",  # uint32, 0: blocks that are done; the last one counts and puts 0 back
    "chunk_count": "int64",
    "tensor_count": "int64",
    "group_count": "int64",
    "found_inf": "pointer",  # float32, or 0: if it is not zero, gradients are cleared at most
    "grad_scale": "pointer",  # float32, or 0 for 1
    "squares": "pointer",  # float64: the sum of the squares of all gradients, read or written
    "max_norm": "float64",  # infinite: no limit, and `squares` is not read
    "clear": "int64",  # whether gradients become zero
    "partial_sums": "pointer",  # float64: one for each chunk of this launch, while adding squares
    "go_on": "int64",  # whether the squares of this launch are added to `squares`, or start it
}

GROUP = {
    "lr_address": "pointer",  # where the learning rate is, or 0: it is `base_lr`
    "lr_is_float64": "int64",  # or else float32
    **{symbol.name: "float64" for symbol in GROUP_INPUTS},
}

# What a rule may keep of each element.
STATES = OPERANDS[2:]

TENSOR = {
    "p": "pointer",
    **dict.fromkeys(STATES, "pointer"),  # 0 where the rule keeps none
    "elements": "int64",
    "kind": "int64",  # which of the kernel's update functions
    "group": "int64",  # within the launch
    "weights": "int64",  # where those of its group begin
    "aligned": "int64",  # whether all but g are dense and begin at multiples of 16 bytes
    "seed": "uint64",  # of stochastic rounding
    "position": "int64",
    # where each operand's layout is in the table, `DENSE` if it has none
    **{f"{operand}_layout": "int64" for operand in OPERANDS},
}
DENSE = -1

CHUNK = {
    "tensor": "int64",  # within the launch
    "first": "int64",
    "end": "int64",  # one behind the last element
}

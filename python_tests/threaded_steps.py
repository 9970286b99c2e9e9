"""Steps and norms with every block and thread of a kernel at the same time, for ThreadSanitizer to
watch: ``LD_PRELOAD=libtsan.so python threaded_steps.py``."""

from __future__ import annotations

import torch
from bound import random
from cuda_on_host import THREADED, CudaOnHost
from device_steps import Guarded, Steps

from evokernels import zoo
from evokernels.kernels.plan import Rounding

# Several chunks a block, of groups, kinds and step counts in turns, with vectors and without.
SIZES = (9000, 5, 1024, 2049, 1, 4096, 0, 1500)
DTYPES = (torch.float32, torch.float32, torch.bfloat16)
GENOMES = (zoo.adamw, zoo.evolved_2025)


def main() -> None:
    """Prints how often each tensor was updated, and the ticket."""
    memory = Guarded()
    dtypes = [DTYPES[i % 3] for i in range(len(SIZES))]
    genomes = [GENOMES[i % 2] for i in range(len(SIZES))]
    tensors = [
        memory.bound(genome, random((n,), dtype, i), dtype, Rounding(0, i), shift=i % 2)
        for i, (genome, dtype, n) in enumerate(zip(genomes, dtypes, SIZES, strict=True))
    ]
    steps = Steps(CudaOnHost(resident=3, flags=THREADED), tensors, genomes)
    steps.counts[3] = 5
    for forbidden in (0.0, 1.0, 0.0):
        gradients = [random((n,), dtype, n) for n, dtype in zip(SIZES, dtypes, strict=True)]
        gradients[1] = None
        squares = steps.plan.sum_of_squares(gradients)
        found_inf = torch.tensor([forbidden])
        steps.run(gradients, found_inf=found_inf, max_norm=1.0, squares=squares, clear=True)
    memory.check()
    print(steps.counts.tolist(), steps.plan._ticket.tolist())


if __name__ == "__main__":
    main()

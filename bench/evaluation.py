"""stub"""

import argparse, pathlib, sys, torch
from agreement import *
from commandline import Bar
from evokernels.evolution.trial import Conditions

parser = argparse.ArgumentParser()
parser.add_argument("--loops", nargs="+", default=LOOPS, choices=LOOPS)
parser.add_argument("--out", type=pathlib.Path)
parser.add_argument("--data-dir")
parser.add_argument("--steps", type=int, default=500)
o = parser.parse_args()
torch.set_num_threads(1)
c = Conditions(o.steps, 128, 15_000)
if __name__ == "__main__":
    with Bar() as bar:
        run_jobs(all_jobs(o.loops), c, o.out, o.data_dir, bar.show)
    print("\n".join(compare_means(o.out, c)))

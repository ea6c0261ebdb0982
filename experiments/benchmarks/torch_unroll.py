"""The MLP memory of meta.py, unrolled by torch.func: `torch_unroll.py STEPS WIDTH ROWS ROUNDS`.

Prints JSON: seconds of every round, and the growth of the process's peak resident memory in the first, in MB.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import torch
from torch.func import grad, grad_and_value

RATE = 0.05


def main() -> None:
    steps, width, rows, rounds = map(int, sys.argv[1:])
    torch.manual_seed(0)
    start = tuple(torch.randn(width, width) * width**-0.5 for _ in range(2))
    keys, values = torch.randn(2, steps, rows, width)

    def loss(w, keys, values):
        return ((torch.nn.functional.silu(keys @ w[0]) @ w[1] - values) ** 2).sum(-1).mean() / 2

    def outer(w, count=steps):
        total = 0.0
        for t in range(count):
            gradient, value = grad_and_value(loss)(w, keys[t], values[t])
            w, total = tuple(a - RATE * g for a, g in zip(w, gradient, strict=True)), total + value
        return total / count

    # Not `ru_maxrss`, which starts at the parent's resident memory.
    peak = lambda: int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e3
    grad(lambda w: outer(w, 2))(start)  # loads what torch loads once
    before, seconds = peak(), []
    for turn in range(rounds):
        started = time.perf_counter()
        grad(outer)(start)
        seconds.append(time.perf_counter() - started)
        if turn == 0:
            resident = peak() - before
    print(json.dumps({"steps": steps, "torch": torch.__version__, "resident_mb": resident, "seconds": seconds}))


if __name__ == "__main__":
    main()

"""Peak memory of the loss against the batch, and of the kNN against the bank.

    python tests/bench/memory.py                # CPU, resident memory of a fresh process each
    python tests/bench/memory.py --bank 1281167 --queries 50000 --dim 2048

On a GPU (--device cuda) the peak is the allocator's. The size of the inputs is printed beside it:
what the function needs on top is the difference.
"""
import argparse
import resource
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import torch
import torch.nn.functional as F

import clinfonce
import common


def measure(kind, size, args):
    """Peak MB above the state with the inputs in memory; runs in a process of its own."""
    device = torch.device(args.device)

    def peak():
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2 ** 20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 10

    if kind == "loss":
        z = F.normalize(torch.randn(2, size, 128, device=device), dim=2).requires_grad_()
        inputs, ids = z.numel() * 4 / 2 ** 20, torch.arange(size, device=device) // 4
        before = peak()
        clinfonce.cl_infonce(z, ids).backward()
    else:
        bank = torch.empty(size, args.dim, dtype=torch.float16)
        for part in bank.split(2 ** 14):  # by blocks: the inputs must not set the peak
            part.copy_(F.normalize(torch.randn(len(part), args.dim), dim=1))
        query = F.normalize(torch.randn(args.queries, args.dim), dim=1).to(device)
        labels = torch.arange(size) % 1000
        inputs = (bank.numel() * 2 + query.numel() * 4) / 2 ** 20
        before = peak()
        common.knn_scores(query, bank, labels, 1000)
    return inputs, peak() - before


def main():
    """One line per size, each from a process of its own (a peak never falls)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="*", default=[256, 1024, 2048, 4096])
    parser.add_argument("--bank", type=int, nargs="*", default=[20000, 80000, 320000])
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(*measure(args.one[0], int(args.one[1]), args))
        return
    print(f"torch {torch.__version__}, {args.device}; kNN with {args.queries} queries, "
          f"D = {args.dim}, bank in float16, K = 200")
    for kind, sizes in (("loss", args.batch), ("knn", args.bank)):
        for size in sizes:
            out = subprocess.run(
                [sys.executable, __file__, "--one", kind, str(size), "--queries", str(args.queries),
                 "--dim", str(args.dim), "--device", args.device],
                check=True, capture_output=True, text=True).stdout
            inputs, extra = map(float, out.split())
            name = "batch" if kind == "loss" else "bank"
            print(f"{kind:5s} {name} {size:8d}   inputs {inputs:9.1f} MB   peak above them "
                  f"{extra:9.1f} MB", flush=True)


if __name__ == "__main__":
    main()

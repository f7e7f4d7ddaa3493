"""Peak memory of the loss against the batch, of the kNN against the bank, of a step against parts.

    python tests/bench/memory.py                # CPU, resident memory of a fresh process each
    python tests/bench/memory.py --bank 1281167 --queries 50000 --dim 2048
    python tests/bench/memory.py --step         # what --micro-batch saves, and what it costs
    python tests/bench/memory.py --step --step-arch resnet18 --step-batch 32 --parts 0 8 4

On a GPU (--device cuda) the peak is the allocator's. The size of the inputs (with --step: images
and weights) is printed beside what is needed on top of them. A step is one of Cl-InfoNCE, two views
at 64 pixels, with SGD; the seconds are the best of three after a first one.
"""
import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import torch
import torch.nn.functional as F

import clinfonce
import common


def peak(device):
    """Peak MB of this process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 10


def measure_step(rows, args):
    """MB of images and weights, peak MB above them, seconds; at most `rows` at a time (0: all)."""
    device = torch.device(args.device)
    flags = common.Parser("clinfonce", "", {"demo": {}}).parse_args(
        ["--arch", args.step_arch, "--batch-size", str(args.step_batch), "--channels-last",
         *(["--micro-batch", str(rows)] if rows else [])])
    flags.loss, flags.dual, flags.dim = "cl-infonce", False, 128
    layout = dict(memory_format=common.memory_format(flags))
    model = clinfonce.ClInfoNCE(flags, 2).to(device, **layout)
    network, optimizer = common.distribute(model, flags), common.optimizer(flags, model)
    views = [torch.randn(args.step_batch, 3, 64, 64, device=device).contiguous(**layout)
             for _ in range(2)]
    ids = torch.arange(args.step_batch, device=device) // 4
    inputs = sum(x.numel() * 4 for x in (*views, *model.parameters())) / 2 ** 20
    before, seconds = peak(device), []
    for step in range(4):
        begin = time.perf_counter()
        z, _ = network(*views)
        loss = clinfonce.cl_infonce(z, ids)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        common.check_loss(loss, step)
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return inputs, peak(device) - before, min(seconds[1:])


def measure(kind, size, args):
    """MB of the inputs and peak MB above them; runs in a process of its own."""
    device = torch.device(args.device)
    if kind == "loss":
        z = F.normalize(torch.randn(2, size, 128, device=device), dim=2).requires_grad_()
        inputs, ids = z.numel() * 4 / 2 ** 20, torch.arange(size, device=device) // 4
        before = peak(device)
        clinfonce.cl_infonce(z, ids).backward()
    else:
        bank = torch.empty(size, args.dim, dtype=torch.float16)
        for block in bank.split(2 ** 14):  # by blocks: the inputs must not set the peak
            block.copy_(F.normalize(torch.randn(len(block), args.dim), dim=1))
        query = F.normalize(torch.randn(args.queries, args.dim), dim=1).to(device)
        labels = torch.arange(size) % 1000
        inputs = (bank.numel() * 2 + query.numel() * 4) / 2 ** 20
        before = peak(device)
        common.knn_scores(query, bank, labels, 1000)
    return inputs, peak(device) - before


def main():
    """One line per size, each from a process of its own (a peak never falls)."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="*", default=[256, 1024, 2048, 4096])
    parser.add_argument("--bank", type=int, nargs="*", default=[20000, 80000, 320000])
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--step", action="store_true", help="measure a training step instead")
    parser.add_argument("--step-arch", default="resnet50")
    parser.add_argument("--step-batch", type=int, default=256)
    parser.add_argument("--parts", type=int, nargs="*", default=[0, 64, 16],
                        help="values of --micro-batch, 0: off")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        kind, size = args.one[0], int(args.one[1])
        print(*(measure_step(size, args) if kind == "step" else measure(kind, size, args)))
        return

    def fresh(kind, size):
        words = ["--queries", args.queries, "--dim", args.dim, "--device", args.device,
                 "--step-arch", args.step_arch, "--step-batch", args.step_batch]
        out = subprocess.run([sys.executable, __file__, "--one", kind, str(size), *map(str, words)],
                             check=True, stdout=subprocess.PIPE, text=True).stdout
        return map(float, out.split())

    if args.step:
        print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} thread(s); a "
              f"step of {args.step_arch}, {args.step_batch} images at 64 pixels, two views")
        for rows in args.parts:
            inputs, extra, seconds = fresh("step", rows)
            print(f"micro-batch {rows or 'off':>5}   images and weights {inputs:8.1f} MB   peak "
                  f"above them {extra:9.1f} MB   {seconds:8.2f} s a step", flush=True)
        return
    print(f"torch {torch.__version__}, {args.device}; kNN with {args.queries} queries, "
          f"D = {args.dim}, bank in float16, K = 200")
    for kind, sizes in (("loss", args.batch), ("knn", args.bank)):
        for size in sizes:
            inputs, extra = fresh(kind, size)
            name = "batch" if kind == "loss" else "bank"
            print(f"{kind:5s} {name} {size:8d}   inputs {inputs:9.1f} MB   peak above them "
                  f"{extra:9.1f} MB", flush=True)


if __name__ == "__main__":
    main()

"""What CLD adds to a training step, and the memory of NPID's softmax over the bank.

    python tests/bench/cld.py                                    # CPU, one thread
    python tests/bench/cld.py --device cuda --amp bf16 --network-batch 256

First table: peak memory and seconds of the full softmax (E2) against the size of the bank, each in
a process of its own, forward and backward, with all logits at once and by blocks.
Second table: seconds of grouping + cross-level loss, forward and backward, beside a whole step of
the base method (NPID, two views of 32 x 32, ResNet-18 with CIFAR stem) at the same batch. The step
is measured with --network-batch images and taken in proportion to the batch; the median of three.
"""
import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import torch
import torch.nn.functional as F

import cld
import common


def seconds(function, device, repeats=3):
    """Median over a few calls, after one to warm up."""
    times = []
    for _ in range(1 + repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def added(B, k, grouping, device):
    """Seconds of E6 and E7, forward and backward, for B images."""
    x = torch.randn(B, 128, device=device)
    f = F.normalize(x + 0.3 * torch.randn(2, B, 128, device=device), dim=2).requires_grad_()
    k_eigen = 10 if grouping == "ncuts" else 0
    return seconds(lambda: cld.cld(f, k, 5, 0.2, k_eigen=k_eigen)[0].backward(), device)


def base_step(args, device):
    """Seconds an image of NPID's step: two views, forward, loss over 50,000 rows, backward, SGD."""
    flags = argparse.Namespace(arch="resnet18", stem="cifar", head="linear", dim=128, base="npid",
                               lambda_cld=0.0, channels_last=True, amp=args.amp)
    model = cld.CLD(flags).to(device, memory_format=torch.channels_last)
    optimizer, b = torch.optim.SGD(model.parameters(), 0.06, 0.9), args.network_batch
    x = torch.randn(2, b, 3, 32, 32, device=device)
    x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (2, b))
    V = F.normalize(torch.randn(50000, 128, device=device), dim=1)
    index = torch.arange(b, device=device)

    def step():
        with common.autocast(flags, device):
            f = model(*x)[0]
        optimizer.zero_grad(set_to_none=True)
        sum(cld.npid(v, V, index, 0.1) for v in f).backward()
        optimizer.step()
    return seconds(step, device) / b


def softmax(n, b, block, device):
    """Peak MB above the bank, and seconds, of the loss of one view; in a process of its own."""
    def peak():
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2 ** 20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 10

    V = torch.empty(n, 128, device=device)
    for part in V.split(2 ** 14):  # by blocks: the inputs must not set the peak
        part.copy_(F.normalize(torch.randn(len(part), 128), dim=1))
    f = F.normalize(torch.randn(b, 128, device=device), dim=1).requires_grad_()
    index, before = torch.arange(b, device=device), peak()
    begin = time.perf_counter()
    cld.npid(f, V, index, 0.1, block).backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return peak() - before, time.perf_counter() - begin


def main():
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", default="none")
    parser.add_argument("--network-batch", type=int, default=64)
    parser.add_argument("--rows", type=int, default=256, help="of a view, against the bank")
    parser.add_argument("--bank", type=int, nargs="*", default=[50_000, 320_000, 1_281_167])
    parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(1)
    if args.one:
        print(*softmax(args.one[0], args.rows, args.one[1], device))
        return
    print(f"{common.environment(device)['device']}, torch {torch.__version__}, 1 CPU thread, "
          f"amp {args.amp}")
    print(f"softmax over the bank, {args.rows} rows, D = 128, one view")
    print(f"{'n':>9} {'bank MB':>8} {'way':>6} {'peak above it MB':>17} {'seconds':>8}")
    for n in args.bank:
        for way, block in (("once", 2 ** 40), ("blocks", 2 ** 26)):
            out = subprocess.run(
                [sys.executable, __file__, "--one", str(n), str(block), "--device", args.device,
                 "--rows", str(args.rows)], check=True, capture_output=True, text=True).stdout
            peak, s = map(float, out.split())
            print(f"{n:9d} {n * 512 / 2 ** 20:8.0f} {way:>6} {peak:17.0f} {s:8.2f}", flush=True)
    image = base_step(args, device)
    print(f"{'batch':>6} {'k':>5} {'grouping':>9} {'CLD s':>8} {'base step s':>12} "
          f"{'CLD / base':>11}")
    for B, k in ((256, 128), (4096, 1000)):
        for grouping in ("kmeans", "ncuts") if B < 1000 else ("kmeans",):
            s = added(B, k, grouping, device)
            print(f"{B:6d} {k:5d} {grouping:>9} {s:8.4f} {B * image:12.2f} "
                  f"{100 * s / (B * image):9.2f} %", flush=True)


if __name__ == "__main__":
    main()

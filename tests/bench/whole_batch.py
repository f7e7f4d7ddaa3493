"""What the loss of the whole batch costs a process, beside the network.

    python tests/bench/whole_batch.py
    python tests/bench/whole_batch.py --batch 256 512 --arch resnet-tiny    # small

Every process computes cl_infonce of B x B pairs. With W processes it needs only those of its own
b = B / W rows with all, whose keys then send their gradients to the other processes (communication
that is not measured here). Both are timed, forward and backward pass, two views, and a pass of b
rows at 32 pixels through the network. Each number is the best of --repeats after a warm-up.
"""
import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import torch
import torch.nn.functional as F

import clinfonce
import common


def own_rows_loss(z, ids, own, tau=0.1, base_tau=0.07):
    """cl_infonce of the anchors in the slice `own` of the batch, against the keys of all."""
    V, B = z.shape[:2]
    anchors, keys = z[:, own].flatten(0, 1), z.flatten(0, 1)
    row = torch.arange(V * B, device=z.device)
    itself = row.view(V, B)[:, own].reshape(-1, 1) == row  # (Vb, VB)
    P = (ids[own][:, None] == ids).repeat(V, V) & ~itself
    s = (anchors @ keys.T / tau).masked_fill(itself, float("-inf"))
    log_p = s.log_softmax(1).masked_fill(~P, 0)
    return -(tau / base_tau) * (log_p.sum(1) / P.sum(1)).mean()


def seconds(function, device, repeats):
    """The best time of a function that returns a loss, with its backward pass."""
    best = float("inf")
    for i in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        function().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin) if i else best  # the first is the warm-up
    return best


def main():
    """One line per batch."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--processes", type=int, default=8, help="W")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--stem", default="cifar")
    parser.add_argument("--amp", default="none", choices=["none", "bf16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device, W = torch.device(args.device), args.processes
    backbone = common.resnet(args.arch, args.stem)
    model = torch.nn.Sequential(backbone, common.head("mlp", backbone.width, 128)).to(device)
    print(f"{common.environment(device)['device']}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} thread(s); W = {W}, D = 128, {args.arch} ({args.stem} stem), "
          f"amp {args.amp}")
    print(f"{'B':>6} {'b':>6} {'B x B s':>9} {'b x B s':>9} {'network s':>10} "
          f"{'share of a step':>16} {'with b x B':>11}")
    for B in args.batch:
        b, ids = B // W, torch.arange(B, device=device) // 4
        z = F.normalize(torch.randn(2, B, 128, device=device), dim=2).requires_grad_()
        if B == args.batch[0]:  # the two are one loss
            parts = [own_rows_loss(z, ids, slice(r * b, (r + 1) * b)) for r in range(W)]
            torch.testing.assert_close(sum(parts) / W, clinfonce.cl_infonce(z, ids))
        whole = seconds(lambda z=z, ids=ids: clinfonce.cl_infonce(z, ids), device, args.repeats)
        own = seconds(lambda z=z, ids=ids, b=b: own_rows_loss(z, ids, slice(0, b)), device,
                      args.repeats)
        x = torch.randn(2 * b, 3, 32, 32, device=device)

        def encode(x=x):
            with common.autocast(args, device):
                return model(x).float().square().mean()

        network = seconds(encode, device, args.repeats)
        print(f"{B:6d} {b:6d} {whole:9.4f} {own:9.4f} {network:10.4f} "
              f"{100 * whole / (whole + network):14.1f} % {100 * own / (own + network):9.1f} %",
              flush=True)


if __name__ == "__main__":
    main()

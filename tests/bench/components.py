"""Weak labels of WCL: seconds of the neighbour search and of the components, and peak memory.

    python tests/bench/components.py                         # CPU, one thread
    python tests/bench/components.py --device cuda

Features are random unit vectors in 256-d (about 0.3 B components) and, the worst case for walks, a
chain: one component whose nodes hang on each other in a row. Beside it, the components by scipy's
routine, which must be installed. Memory is that of a process of its own, above the features.
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

import wcl


def seconds(work, device, repeats):
    """Median wall time of work()."""
    found = []
    for _ in range(repeats + 1):  # the first warms up
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begin)
    return sorted(found[1:])[repeats // 2]


def scipy_components(n):
    """The same labels by scipy, on the CPU."""
    import numpy as np
    from scipy.sparse import csgraph, csr_matrix

    n = n.cpu().numpy()
    graph = csr_matrix((np.ones(len(n)), (np.arange(len(n)), n)), shape=(len(n), len(n)))
    return torch.from_numpy(csgraph.connected_components(graph, directed=False)[1]).long()


def features(B, device):
    """(B, 256) random unit vectors."""
    return F.normalize(torch.randn(B, 256, generator=torch.Generator().manual_seed(0)), dim=1).to(
        device)


def memory(B, device):
    """Peak MB of `weak_labels` above the state with the features in memory."""
    V = features(B, device)
    wcl.weak_labels(V[:256])  # what the libraries take with the first call
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.max_memory_allocated() / 2 ** 20
        wcl.weak_labels(V)
        return torch.cuda.max_memory_allocated() / 2 ** 20 - before
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 10
    wcl.weak_labels(V)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 10 - before


def main():
    """One line per size and graph."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 4096, 8192, 32768])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    if args.memory:
        print(memory(args.memory, device))
        return
    print(f"torch {torch.__version__}, {device}, 1 thread; D = 256")
    print(f"{'B':>6} {'graph':>7} {'components':>10} {'search ms':>10} {'labels ms':>10} "
          f"{'scipy ms':>9} {'memory MB':>10}")
    words = [sys.executable, __file__, "--device", args.device, "--memory"]
    peaks = [float(subprocess.run([*words, str(B)], check=True, capture_output=True,
                                  text=True).stdout)
             for B in args.sizes]  # first: a process inherits the peak of the one that started it
    for B, peak in zip(args.sizes, peaks, strict=True):
        V = features(B, device)
        repeats = args.repeats if B < 2 ** 14 else 1
        search = seconds(lambda V=V: wcl.neighbours(V), device, repeats)
        chain = torch.arange(1, B + 1, device=device).clamp(max=B - 1)
        chain[-1] = B - 2
        for name, n in (("random", wcl.neighbours(V)[:, 0]), ("chain", chain)):
            y = wcl.components(n)
            assert torch.equal(y.cpu(), scipy_components(n))
            labels = seconds(lambda n=n: wcl.components(n), device, args.repeats)
            theirs = seconds(lambda n=n: scipy_components(n), torch.device("cpu"), args.repeats)
            first = (f"{search * 1e3:.1f}", f"{peak:.0f}") if name == "random" else ("-", "-")
            print(f"{B:6d} {name:>7} {int(y.max()) + 1:10d} {first[0]:>10} {labels * 1e3:10.2f} "
                  f"{theirs * 1e3:9.2f} {first[1]:>10}", flush=True)


if __name__ == "__main__":
    main()

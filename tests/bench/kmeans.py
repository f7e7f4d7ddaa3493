"""K-means: seconds and objective of faiss and of the torch version, against n and k.

    python tests/bench/kmeans.py                                   # small sizes, CPU
    python tests/bench/kmeans.py --n 1281167 --k 2500 --device cuda   # ImageNet's size on a GPU

Points are unit vectors in 128-d around 4 k random directions (a trained embedding has structure,
uniform noise has none). The ratio of the objectives, torch / faiss, should be within 1 %.
"""
import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import torch
import torch.nn.functional as F

import clinfonce


def objective(x, ids, c):
    """Mean squared distance of every row to its centroid, in float64 by blocks."""
    parts = zip(x.split(2 ** 16), ids.split(2 ** 16), strict=True)
    return sum(((p.double() - c[i].double()) ** 2).sum().item() for p, i in parts) / len(x)


def main():
    """One line per (n, k)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, nargs="+", default=[10000, 20000, 40000])
    parser.add_argument("--k", type=int, nargs="+", default=[100, 400])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    print(f"torch {torch.__version__} on {args.device}, faiss on the CPU, "
          f"{torch.get_num_threads()} threads; D = 128, 20 iterations, best of 5")
    print(f"{'n':>9} {'k':>6} {'faiss s':>9} {'torch s':>9} {'faiss/torch':>11} {'objective':>10}")
    for n in args.n:
        for k in args.k:
            g = torch.Generator().manual_seed(n + k)
            centres = F.normalize(torch.randn(4 * k, 128, generator=g), dim=1)
            x = centres[torch.randint(4 * k, (n,), generator=g)]
            x = F.normalize(x + 0.05 * torch.randn(n, 128, generator=g), dim=1)
            begin = time.perf_counter()
            slow = objective(x, *clinfonce.kmeans(x, k))
            middle = time.perf_counter()
            y = x.to(args.device)
            ids, c = clinfonce.kmeans_torch(y, k)
            ids, c = ids.cpu(), c.cpu()
            end = time.perf_counter()
            fast = objective(x, ids, c)
            print(f"{n:9d} {k:6d} {middle - begin:9.2f} {end - middle:9.2f} "
                  f"{(middle - begin) / (end - middle):11.2f} {fast / slow:10.4f}", flush=True)


if __name__ == "__main__":
    main()

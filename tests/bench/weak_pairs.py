"""Weak labels of WCL by batch size: how many of the positives that they add are of the true class.

    python tests/bench/weak_pairs.py runs/c10/wcl-0/checkpoint.pt --data-dir data

A checkpoint of wcl.py labels batches of several sizes, of 8,192 or more views in all, augmented as
at the end of its training. Positives are the other images of the group of a view; the size of a
group counts the image itself. Nothing is trained.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import torch

import common
import wcl


def pairs(y, t):
    """Ordered pairs of two images with one weak label y (B,), and those that share a class t."""
    positive = (y[:, None] == y).fill_diagonal_(False)
    return positive.sum().item(), (positive & (t[:, None] == t)).sum().item()


def main(argv=None):
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="+")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256, 1024, 4096])
    given = parser.parse_args(argv)
    print("batch  images a group  positives an image  of the same class")
    for B in given.batch:
        positive, same, groups, views = 0, 0, 0, 0
        for path in given.checkpoint:
            saved = common.load_checkpoint(path)
            args = argparse.Namespace(**{**saved["args"], "batch_size": B, "micro_batch": None,
                                         "data_dir": given.data_dir, "device": "cpu"})
            data, model = common.load(args, common.setup(args)), wcl.WCL(args)
            model.load_state_dict(saved["state"]["model"])
            labels = wcl.true_labels(data)
            for rows, both in wcl.batch_graphs(model, data, common.augmentation(args),
                                               max(1, 4096 // B)):
                for y in both:
                    n, agree = pairs(y, labels[rows])
                    positive, same, views = positive + n, same + agree, views + B
                    groups += len(torch.unique(y))
        print(f"{B:5}  {views / groups:14.2f}  {positive / views:18.2f}  "
              f"{100 * same / positive:15.1f} %", flush=True)


if __name__ == "__main__":
    main()

"""The README's tables under one protocol: train, evaluate, collect; resumable, row by row.

    python tests/bench/one_protocol.py c100 --data-dir data        # CIFAR-100
    python tests/bench/one_protocol.py fashion --data-dir data     # fashion attributes
    python tests/bench/one_protocol.py shapes-views                # synthetic, correlated images
    python tests/bench/one_protocol.py c100 --only SupCon          # one row

Every row is `METHOD.py FLAGS --seed S` and then `linear_eval.py` on its last checkpoint. A finished
run or evaluation is not repeated. Logs and evaluations go to results/SET/, the table of the rows
that are done (mean and standard deviation over the seeds) to results/SET.csv and results/SET.md.
Each run has one thread, so that --jobs 2 does not change what a run computes.
"""
import argparse
import csv
import json
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
C100 = "clinfonce.py --recipe c100-small --clusters"
C100_WCL = "wcl.py --recipe c100-small --beta"
FASHION = "clinfonce.py --recipe fashion --clusters"
CLD = "cld.py --recipe"
NO_CATEGORY = "gender baseColour season year usage"
SETS = {  # rows: name, labels that it saw, training command (None: the untrained network)
    "c100": dict(
        untrained="--dataset cifar100 --limit-train 10000",
        evaluation="--retrieval-labels coarse",
        columns={"kNN": "knn.top1", "linear": "probe.top1", "R@1 coarse": "retrieval.coarse.R@1"},
        rows=[("untrained", "none", None),
              ("InfoNCE (instance)", "none", f"{C100} instance"),
              ("Cl-InfoNCE, K-means", "none", f"{C100} kmeans"),
              ("Cl-InfoNCE, coarse", "20 coarse classes", f"{C100} coarse"),
              ("SupCon (fine)", "100 fine classes", f"{C100} label"),
              ("SimCLR (WCL, beta 0)", "none", f"{C100_WCL} 0"),
              ("WCL", "none", f"{C100_WCL} 1"),
              ("NPID", "none", f"{CLD} c100-small --lambda-cld 0"),
              ("NPID + CLD", "none", f"{CLD} c100-small")]),
    "fashion": dict(
        untrained="--dataset npz --train-file fashion_attributes_96.npz --image-size 64 "
                  "--label articleType",
        evaluation="--min-per-class 20",
        columns={"kNN": "knn.top1", "linear": "probe.top1", "R@1": "retrieval.articleType.R@1"},
        rows=[("untrained", "none", None),
              ("InfoNCE (instance)", "none", f"{FASHION} instance"),
              ("Cl-InfoNCE, 2 attributes", "baseColour, subCategory", f"{FASHION} attributes:2"),
              ("Cl-InfoNCE, 5 attributes", "gender, baseColour, season, year, usage",
               f"{FASHION} attributes:5 --attributes {NO_CATEGORY}")]),
    "shapes-views": dict(
        untrained="--dataset shapes-views --knn-t 0.1",
        evaluation="",
        columns={"kNN": "knn.top1", "linear": "probe.top1"},
        rows=[("untrained", "none", None),
              ("NPID", "none", f"{CLD} demo --lambda-cld 0"),
              ("NPID + CLD", "none", f"{CLD} demo")]),
}


def slug(row):
    """File name of a row."""
    return "-".join("".join(c if c.isalnum() else " " for c in row[0].lower()).split())


def work(args, row, seed):
    """One row with one seed: train, evaluate, keep log and evaluation under results/."""
    spec, name = SETS[args.set], f"{slug(row)}-{seed}"
    folder, keep = Path("runs") / args.set / name, ROOT / "results" / args.set
    target = keep / f"{name}.eval.json"
    if not target.exists():
        keep.mkdir(parents=True, exist_ok=True)
        shared = ["--data-dir", args.data_dir, "--threads", "1", "--device", args.device]
        if row[2] is None:
            weights = ["none", *spec["untrained"].split(), "--seed", str(seed)]
        else:
            weights = [str(folder / "checkpoint.pt")]
            python([*row[2].split(), "--seed", str(seed), *shared, "--out", str(folder)], folder)
            shutil.copy(ROOT / folder / "log.jsonl", keep / f"{name}.jsonl")
        python(["linear_eval.py", "--checkpoint", *weights, *spec["evaluation"].split(), *shared,
                "--out", str(folder / "eval.json")], folder)
        shutil.copy(ROOT / folder / "eval.json", target)
        print(f"{args.set}: {row[0]}, seed {seed}: done", flush=True)


def python(words, folder):
    """Run a script of the project; its output goes to the run folder."""
    folder = ROOT / folder
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "a") as out:
        subprocess.run([sys.executable, *words], cwd=ROOT, stdout=out, stderr=out, check=True)


def look_up(record, path):
    """record["a"]["b"] for path "a.b"."""
    for key in path.split("."):
        record = record[key]
    return record


def main():
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=list(SETS))
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", help="run only the rows whose name contains this")
    args = parser.parse_args()
    spec = SETS[args.set]
    jobs = [(row, seed) for row in spec["rows"] for seed in args.seeds
            if args.only is None or args.only.lower() in row[0].lower()]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: work(args, *job), jobs))

    lines = [["row", "labels seen", *spec["columns"], "CPU seconds"]]
    for row in spec["rows"]:
        kept = [ROOT / "results" / args.set / f"{slug(row)}-{seed}.eval.json"
                for seed in args.seeds]
        if not all(path.exists() for path in kept):
            continue
        mine, cells = [json.loads(path.read_text()) for path in kept], []
        for path in spec["columns"].values():
            values = [look_up(r["results"], path) for r in mine]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.2f} ± {spread:.2f}")
        logs = sorted((ROOT / "results" / args.set).glob(f"{slug(row)}-[0-9]*.jsonl"))
        seconds = [json.loads(log.read_text().splitlines()[-2])["cpu_seconds"]
                   for log in logs]
        cells.append(f"{statistics.mean(seconds):.0f}" if seconds else "-")
        lines.append([row[0], row[1], *cells])
    with open(ROOT / "results" / f"{args.set}.csv", "w", newline="") as file:
        csv.writer(file).writerows(lines)
    table = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    text = "\n".join("| " + " | ".join(row) + " |" for row in table)
    (ROOT / "results" / f"{args.set}.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

"""The README's tables under one protocol: train, evaluate, collect; resumable, row by row.

    python tests/bench/one_protocol.py c100 --data-dir data        # CIFAR-100
    python tests/bench/one_protocol.py fashion --data-dir data     # fashion attributes
    python tests/bench/one_protocol.py shapes-views                # synthetic, correlated images
    python tests/bench/one_protocol.py c100 --only SupCon          # one row

Every row is `METHOD.py FLAGS --seed S` and then `linear_eval.py` on its last checkpoint. A finished
run or evaluation is not repeated. Logs and evaluations go to results/SET/, the table of the rows
that are done (mean and standard deviation over the seeds) to results/SET.csv and results/SET.md.
Rows that a set lists under `ood` have `ood_eval.py` too, and a table of their own, SET-ood.
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
RINCE = "rince.py --recipe c100-small --loss"
BATCH = "--queue 0 --m 0.9"  # as in the demo on shapes; these rows came after the others
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
              ("NPID", "none", f"{CLD} c100-small --lambda-cld 0"),
              ("NPID + CLD", "none", f"{CLD} c100-small"),
              ("SimCLR (WCL, beta 0)", "none", f"{C100_WCL} 0"),
              ("WCL", "none", f"{C100_WCL} 1"),
              ("RINCE-out-in", "fine, coarse", f"{RINCE} rince-out-in"),
              ("RINCE-out", "fine, coarse", f"{RINCE} rince-out"),
              ("SCL-out", "100 fine classes", f"{RINCE} scl-out"),
              ("SCL-superclass", "20 coarse classes", f"{RINCE} scl-superclass"),
              ("cross-entropy", "100 fine classes", f"{RINCE} ce"),
              ("RINCE-out-in, no queue", "fine, coarse", f"{RINCE} rince-out-in {BATCH}"),
              ("RINCE-out, no queue", "fine, coarse", f"{RINCE} rince-out {BATCH}"),
              ("SCL-out, no queue", "100 fine classes", f"{RINCE} scl-out {BATCH}"),
              ("SCL-superclass, no queue", "20 coarse classes", f"{RINCE} scl-superclass {BATCH}")],
        ood=dict(
            rows=["untrained", "RINCE-out-in", "RINCE-out", "SCL-out", "SCL-superclass",
                  "cross-entropy", "RINCE-out-in, no queue", "RINCE-out, no queue",
                  "SCL-out, no queue", "SCL-superclass, no queue"],
            evaluation="--bootstrap 200 --outliers cifar10=cifar10_test.npz "
                       "tinyimagenet=ood_tinyimagenet_val_32.npz gtsrb=ood_gtsrb_test_32.npz "
                       "dtd=ood_dtd_part_32.npz",
            columns={"linear": "probe.top1", "R@1 fine": "retrieval.label.R@1",
                     "R@1 coarse": "retrieval.coarse.R@1",
                     "CIFAR-10": "cifar10.gaussian.AUROC",
                     "TinyImageNet": "tinyimagenet.gaussian.AUROC",
                     "GTSRB": "gtsrb.gaussian.AUROC", "DTD": "dtd.gaussian.AUROC"})),
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
    """One row with one seed: train, evaluate, keep log and evaluations under results/."""
    spec, name = SETS[args.set], f"{slug(row)}-{seed}"
    folder, keep = Path("runs") / args.set / name, ROOT / "results" / args.set
    scripts = {"eval": ["linear_eval.py", spec["evaluation"]]}
    if row[0] in spec.get("ood", dict(rows=[]))["rows"]:
        scripts["ood"] = ["ood_eval.py", spec["ood"]["evaluation"]]
    for kind, (script, flags) in scripts.items():
        target = keep / f"{name}.{kind}.json"
        if target.exists():
            continue
        keep.mkdir(parents=True, exist_ok=True)
        shared = ["--data-dir", args.data_dir, "--threads", "1", "--device", args.device]
        if row[2] is None:
            weights = ["none", *spec["untrained"].split(), "--seed", str(seed)]
        else:
            weights = [str(folder / "checkpoint.pt")]
            python([*row[2].split(), "--seed", str(seed), *shared, "--out", str(folder)], folder)
            shutil.copy(ROOT / folder / "log.jsonl", keep / f"{name}.jsonl")
        python([script, "--checkpoint", *weights, *flags.split(), *shared,
                "--out", str(folder / f"{kind}.json")], folder)
        shutil.copy(ROOT / folder / f"{kind}.json", target)
        print(f"{args.set}: {row[0]}, seed {seed}: {kind} done", flush=True)


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


def write_table(args, name, rows, columns, kinds):
    """The table of the rows that are done, from their evaluations of some kinds."""
    lines = [["row", "labels seen", *columns, "CPU seconds"]]
    for row in rows:
        kept = [[ROOT / "results" / args.set / f"{slug(row)}-{seed}.{kind}.json" for kind in kinds]
                for seed in args.seeds]
        if not all(path.exists() for paths in kept for path in paths):
            continue
        mine, cells = [{k: v for path in paths for k, v in
                        json.loads(path.read_text())["results"].items()} for paths in kept], []
        for path in columns.values():
            values = [look_up(results, path) for results in mine]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        logs = sorted((ROOT / "results" / args.set).glob(f"{slug(row)}-[0-9]*.jsonl"))
        seconds = [json.loads(log.read_text().splitlines()[-2])["cpu_seconds"]
                   for log in logs]
        cells.append(f"{statistics.mean(seconds):.0f}" if seconds else "-")
        lines.append([row[0], row[1], *cells])
    with open(ROOT / "results" / f"{name}.csv", "w", newline="") as file:
        csv.writer(file).writerows(lines)
    table = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    text = "\n".join("| " + " | ".join(row) + " |" for row in table)
    (ROOT / "results" / f"{name}.md").write_text(text + "\n")
    print(text)


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

    write_table(args, args.set, spec["rows"], spec["columns"], ["eval"])
    if "ood" in spec:
        rows = [row for row in spec["rows"] if row[0] in spec["ood"]["rows"]]
        write_table(args, f"{args.set}-ood", rows, spec["ood"]["columns"], ["eval", "ood"])


if __name__ == "__main__":
    main()

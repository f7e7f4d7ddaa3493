"""Flickr8k: how much does each loss lose when the batch shrinks? Resumable, run by run.

    python tests/bench/flickr8k.py --data-dir data                       # everything, in order
    python tests/bench/flickr8k.py --data-dir data --only sogclr-32      # runs of that name
    python tests/bench/flickr8k.py --table                               # only the table

Every run is `sogclr_clip.py --recipe flickr8k --loss LOSS --batch-size B --lr LR --seed S`, from
random weights, one thread. LR is the better of two on the 1,000 validation images, chosen for clip
and sogclr and each batch in shorter runs of seed 0; the other losses take that of sogclr. The log,
whose last line has the retrieval on the 1,000 test images, goes to results/flickr8k/ (val-*: the
shorter runs), the table to results/flickr8k.md and .csv. A finished run is not repeated.
"""
import argparse
import csv
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RATES = {256: ["1e-3", "2e-3"], 32: ["5e-4", "1e-3"]}  # to choose from
CHOICE = {256: "2", 32: "1"}  # epochs of the runs that choose, of 4
ONCE = ["isogclr", "sogclr-mine", "hybrid", "siglip", "cyclip"]
COLUMNS = ["TR@1", "TR@10", "IR@1", "IR@10", "mean"]


def runs():
    """(loss, batch, seed) in order of importance."""
    most = [(loss, batch) for batch in (256, 32) for loss in ("clip", "sogclr")]
    found = [(loss, batch, 0) for loss, batch in most]
    found += [(loss, 256, 0) for loss in ONCE]
    return found + [(loss, batch, seed) for seed in (1, 2) for loss, batch in most]


def train(args, name, *words):
    """One run, if it was not finished before; its log under results/, its last evaluation."""
    target, folder = ROOT / f"results/flickr8k/{name}.jsonl", ROOT / f"runs/flickr8k/{name}"
    if not target.exists():
        for path in (folder, target.parent):
            path.mkdir(parents=True, exist_ok=True)
        with open(folder / "output.txt", "a") as out:
            subprocess.run([sys.executable, "sogclr_clip.py", "--recipe", "flickr8k", *words,
                            "--data-dir", args.data_dir, "--knn-every", "4", "--threads", "1",
                            "--workers", "0", "--out", f"runs/flickr8k/{name}"],
                           cwd=ROOT, stdout=out, stderr=out, check=True)
        shutil.copy(folder / "log.jsonl", target)
        print(f"flickr8k: {name}: done", flush=True)
    return last(target)


def last(path):
    """The last evaluation in a log, and the CPU seconds of its run."""
    records = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    found = next(r for r in reversed(records) if "mean" in r)
    return dict(found, cpu=max(r.get("cpu_seconds", 0) for r in records))


def work(args, loss, batch, seed):
    """Choose the rate, train, test."""
    chooser = loss if loss == "clip" else "sogclr"
    score = {rate: train(args, f"val-{chooser}-{batch}-{rate}", "--loss", chooser, "--batch-size",
                         str(batch), "--lr", rate, "--epochs", CHOICE[batch], "--test-file",
                         "flickr8k/val_retrieval.json")["mean"] for rate in RATES[batch]}
    train(args, f"{loss}-{batch}-{seed}", "--loss", loss, "--batch-size", str(batch), "--lr",
          max(score, key=score.get), "--seed", str(seed))


def table():
    """The table of the runs that are there: mean and standard deviation over the seeds."""
    lines, groups = [["loss", "batch", "seeds", *COLUMNS, "CPU seconds"]], {}
    for path in sorted((ROOT / "results/flickr8k").glob("*.jsonl")):
        if not path.name.startswith("val-"):
            loss, batch, _ = path.stem.rsplit("-", 2)
            groups.setdefault((loss, int(batch)), []).append(last(path))
    order = {key[:2]: i for i, key in reversed(list(enumerate(runs())))}
    for (loss, batch), found in sorted(groups.items(), key=lambda item: order[item[0]]):
        cells = []
        for name in COLUMNS:
            values = [r[name] for r in found]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        seconds = statistics.mean(r["cpu"] for r in found)
        lines.append([loss, str(batch), str(len(found)), *cells, f"{seconds:.0f}"])
    with open(ROOT / "results/flickr8k.csv", "w", newline="") as file:
        csv.writer(file).writerows(lines)
    text = "\n".join("| " + " | ".join(row) + " |"
                     for row in [lines[0], ["---"] * len(lines[0]), *lines[1:]])
    (ROOT / "results/flickr8k.md").write_text(text + "\n")
    print(text)


def main():
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--only", default="", help="runs whose name LOSS-BATCH-SEED contains this")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    wanted = [run for run in runs() if args.only in "-".join(map(str, run))]
    for run in [] if args.table else wanted:
        work(args, *run)
    table()


if __name__ == "__main__":
    main()

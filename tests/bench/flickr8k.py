"""Flickr8k: how much does each loss lose when the batch shrinks? Resumable, run by run.

    python tests/bench/flickr8k.py --data-dir data                       # 20 passes, all losses
    python tests/bench/flickr8k.py --data-dir data --only sogclr-32      # runs of that name
    python tests/bench/flickr8k.py --data-dir data --long                # 60 passes, batch 16-256
    python tests/bench/flickr8k.py --table                               # only the table

Every run is `sogclr_clip.py --recipe flickr8k --loss LOSS --batch-size B --lr LR --seed S`, from
random weights, one thread. LR is the best on the 1,000 validation images in shorter runs of seed 0:
by default of two rates, chosen for clip and sogclr (the other losses take that of sogclr); with
--long of at least three, and of more until the best one has a worse one on both sides. The log,
whose last line has the retrieval on the 1,000 test images, goes to results/flickr8k/ (--long:
flickr8k-60/; val-*: the shorter runs), the table to results/flickr8k.md and .csv (flickr8k-60.md,
.csv, with a picture). A finished run is not repeated.
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
LONG = {256: 2e-3, 64: 1e-3, 32: 1e-3, 16: 5e-4}  # --long: the middle one of the first three rates
COLUMNS = ["TR@1", "TR@10", "IR@1", "IR@10", "mean"]


def runs(long):
    """(loss, batch, seed) in order of importance."""
    if long:
        seeds = [(256, 0), (16, 0), (64, 0), (32, 0), (256, 1), (16, 1), (256, 2), (16, 2)]
        return [(loss, batch, seed) for batch, seed in seeds for loss in ("clip", "sogclr")]
    most = [(loss, batch) for batch in (256, 32) for loss in ("clip", "sogclr")]
    found = [(loss, batch, 0) for loss, batch in most]
    found += [(loss, 256, 0) for loss in ONCE]
    return found + [(loss, batch, seed) for seed in (1, 2) for loss, batch in most]


def train(args, name, *words):
    """One run, if it was not finished before; its log under results/, its last evaluation."""
    target, folder = ROOT / f"results/{args.name}/{name}.jsonl", f"runs/{args.name}/{name}"
    if not target.exists():
        for path in (ROOT / folder, target.parent):
            path.mkdir(parents=True, exist_ok=True)
        with open(ROOT / folder / "output.txt", "a") as out:
            subprocess.run([sys.executable, "sogclr_clip.py", "--recipe", "flickr8k", *words,
                            "--data-dir", args.data_dir, "--knn-every", "4", "--threads", "1",
                            "--workers", "0", "--out", folder],
                           cwd=ROOT, stdout=out, stderr=out, check=True)
        shutil.copy(ROOT / folder / "log.jsonl", target)
        print(f"{args.name}: {name}: done", flush=True)
    return last(target)


def last(path):
    """The last evaluation in a log, the rate and the CPU seconds of its run."""
    first, *records = [json.loads(line) for line in path.read_text().splitlines()]
    found = next(r for r in reversed(records) if "mean" in r)
    return dict(found, lr=first["args"]["lr"], cpu=max(r.get("cpu_seconds", 0) for r in records))


def best_rate(args, loss, batch):
    """The rate with the best mean recall on the validation images."""
    rates, epochs = RATES.get(batch), CHOICE.get(batch)
    if args.long:
        rates, epochs = [f"{LONG[batch] * factor:g}" for factor in (0.5, 1, 2)], "4"
    score = {}
    while rates:
        for rate in rates:
            score[rate] = train(args, f"val-{loss}-{batch}-{rate}", "--loss", loss, "--batch-size",
                                str(batch), "--lr", rate, "--epochs", epochs, "--test-file",
                                "flickr8k/val_retrieval.json")["mean"]
        best, tried, rates = max(score, key=score.get), [float(rate) for rate in score], []
        if args.long and float(best) in (min(tried), max(tried)):  # it may be better further out
            rates = [f"{float(best) * (2 if float(best) == max(tried) else 0.5):g}"]
    return best


def work(args, loss, batch, seed):
    """Choose the rate, train, test."""
    rate = best_rate(args, loss if loss == "clip" else "sogclr", batch)
    train(args, f"{loss}-{batch}-{seed}", "--loss", loss, "--batch-size", str(batch), "--lr", rate,
          "--seed", str(seed), *(["--epochs", "12"] if args.long else []))


def table(args):
    """The table of the runs that are there: mean and standard deviation over the seeds."""
    columns = [*COLUMNS, *["lr"] * args.long]
    lines, groups = [["loss", "batch", "seeds", *columns, "CPU seconds"]], {}
    for path in sorted((ROOT / "results" / args.name).glob("*.jsonl")):
        if not path.name.startswith("val-"):
            loss, batch, _ = path.stem.rsplit("-", 2)
            groups.setdefault((loss, int(batch)), []).append(last(path))
    order = {key[:2]: i for i, key in reversed(list(enumerate(runs(args.long))))}
    for (loss, batch), found in sorted(groups.items(), key=lambda item: (
            -item[0][1] * args.long, order[item[0]])):
        cells = []
        for name in COLUMNS:
            values = [r[name] for r in found]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        if args.long:
            cells.append(f"{found[0]['lr']:g}")
        seconds = statistics.mean(r["cpu"] for r in found)
        lines.append([loss, str(batch), str(len(found)), *cells, f"{seconds:.0f}"])
    with open(ROOT / f"results/{args.name}.csv", "w", newline="") as file:
        csv.writer(file).writerows(lines)
    text = "\n".join("| " + " | ".join(row) + " |"
                     for row in [lines[0], ["---"] * len(lines[0]), *lines[1:]])
    (ROOT / f"results/{args.name}.md").write_text(text + "\n")
    print(text)
    if args.long and groups:
        picture(args, groups)


def picture(args, groups):
    """Mean recall over the batch: every seed a point, a line through the means."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4))
    for i, loss in enumerate(dict.fromkeys(loss for loss, _ in groups)):
        found = {batch: [r["mean"] for r in of_batch]
                 for (name, batch), of_batch in sorted(groups.items()) if name == loss}
        axis.plot(list(found), [statistics.mean(v) for v in found.values()], color=f"C{i}",
                  label=loss)
        for batch, values in found.items():
            axis.plot([batch] * len(values), values, "o", ms=4, color=f"C{i}")
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(LONG), [str(batch) for batch in LONG])
    axis.set_xlabel("batch")
    axis.set_ylabel("mean recall, test images (%)")
    axis.set_ylim(0, 1.1 * max(r["mean"] for found in groups.values() for r in found))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(ROOT / f"results/{args.name}.png", dpi=110)


def main():
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--only", default="", help="runs whose name LOSS-BATCH-SEED contains this")
    parser.add_argument("--long", action="store_true", help="60 passes, batch 16 to 256")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    args.name = "flickr8k-60" if args.long else "flickr8k"
    wanted = [run for run in runs(args.long) if args.only in "-".join(map(str, run))]
    for run in [] if args.table else wanted:
        work(args, *run)
    table(args)


if __name__ == "__main__":
    main()

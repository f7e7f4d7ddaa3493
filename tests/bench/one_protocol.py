"""The tables of results/README.md under one protocol: train, evaluate, collect; resumable by row.

    python tests/bench/one_protocol.py c100 --data-dir data        # CIFAR-100, all methods
    python tests/bench/one_protocol.py fashion --data-dir data     # fashion attributes
    python tests/bench/one_protocol.py shapes-views                # synthetic, correlated images
    python tests/bench/one_protocol.py c10 --data-dir data         # CIFAR-10, longer runs
    python tests/bench/one_protocol.py c100 --only SupCon          # one row

Every row is `METHOD.py FLAGS --seed S`, then `linear_eval.py` and, where the set has outliers,
`ood_eval.py` on its last checkpoint. A finished run or evaluation is not repeated. Logs and
evaluations go to results/SET/, the table of the rows that are done (mean and standard deviation
over the seeds that are done) to results/SET.csv and .md, for c100 and c10 with pictures. CPU
seconds an epoch and peak memory (resident, MB) are from the logs, bytes of state an image from the
checkpoint of a training on 600 images. Each run has one thread, so that --jobs 2 does not change
what a run computes.
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

import torch

ROOT = Path(__file__).parents[2]
C100 = "clinfonce.py --recipe c100-small --clusters"
C100_WCL = "wcl.py --recipe c100-small --beta"
RINCE = "rince.py --recipe c100-small --loss"
BATCH = "--queue 0 --key-momentum 0.9"  # as in the demo on shapes; these rows came after the others
FASHION = "clinfonce.py --recipe fashion --clusters"
CLD = "cld.py --recipe"
# [S] of cifar100-moco, but keys that follow within ten steps: the run has 585 in all
MOCO = f"{CLD} c100-small --base moco --head normlinear --tau 0.07 --queue 1024 --key-momentum 0.9"
C10 = "--recipe c10"
# [S] of cifar10-moco; queue and memory of the keys (1 / (1 - momentum) steps) are a fifth of
# theirs, as 7,800 steps are a fifth of their 39,000
C10_MOCO = (f"cld.py {C10} --base moco --head normlinear --tau 0.07 --queue 2560 "
            "--key-momentum 0.995")
NO_CATEGORY = "gender baseColour season year usage"
SETS = {  # rows: name, labels that it saw, training command (None: the untrained network)
    "c100": dict(
        name="one_protocol",
        untrained="--dataset cifar100 --limit-train 10000",
        eval="--retrieval-labels coarse",
        ood="--bootstrap 200 --outliers cifar10=cifar10_test.npz "
            "tinyimagenet=ood_tinyimagenet_val_32.npz gtsrb=ood_gtsrb_test_32.npz "
            "dtd=ood_dtd_part_32.npz",
        columns={"kNN": "knn.top1", "linear": "probe.top1", "R@1 fine": "retrieval.label.R@1",
                 "R@1 coarse": "retrieval.coarse.R@1",
                 "TinyImageNet": "tinyimagenet.gaussian.AUROC", "GTSRB": "gtsrb.gaussian.AUROC",
                 "DTD": "dtd.gaussian.AUROC", "CIFAR-10": "cifar10.gaussian.AUROC"},
        rows=[("untrained", "none", None),
              ("InfoNCE (instance)", "none", f"{C100} instance"),
              ("Cl-InfoNCE, K-means", "none", f"{C100} kmeans"),
              ("NPID", "none", f"{CLD} c100-small --lambda-cld 0"),
              ("NPID + CLD", "none", f"{CLD} c100-small"),
              ("MoCo", "none", f"{MOCO} --lambda-cld 0"),
              ("MoCo + CLD", "none", f"{MOCO} --lambda-cld 0.25 --k 100"),
              ("SimCLR (WCL, beta 0)", "none", f"{C100_WCL} 0"),
              ("WCL", "none", f"{C100_WCL} 1"),
              ("Cl-InfoNCE, coarse", "coarse", f"{C100} coarse"),
              ("SCL-superclass, no queue", "coarse", f"{RINCE} scl-superclass {BATCH}"),
              ("RINCE-out-in, no queue", "fine, coarse", f"{RINCE} rince-out-in {BATCH}"),
              ("RINCE-out, no queue", "fine, coarse", f"{RINCE} rince-out {BATCH}"),
              ("SCL-out, no queue", "fine", f"{RINCE} scl-out {BATCH}"),
              ("SupCon (fine)", "fine", f"{C100} label"),
              ("cross-entropy", "fine", f"{RINCE} ce"),
              ("RINCE-out-in", "fine, coarse", f"{RINCE} rince-out-in"),
              ("RINCE-out", "fine, coarse", f"{RINCE} rince-out"),
              ("SCL-out", "fine", f"{RINCE} scl-out"),
              ("SCL-superclass", "coarse", f"{RINCE} scl-superclass")]),
    "c10": dict(
        name="c10", state=False,
        untrained="--dataset cifar10",
        eval="",
        ood="--bootstrap 200 --outliers cifar100=cifar100_test.npz gtsrb=ood_gtsrb_test_32.npz",
        columns={"kNN": "knn.top1", "linear": "probe.top1",
                 "CIFAR-100": "cifar100.gaussian.AUROC", "GTSRB": "gtsrb.gaussian.AUROC"},
        blocks=[1, 2, 2, 4, 2, 2, 2],  # rows that are compared: finished together, seed by seed
        rows=[("untrained", "none", None),
              ("SimCLR (WCL, beta 0)", "none", f"wcl.py {C10} --beta 0"),
              ("WCL", "none", f"wcl.py {C10} --beta 1"),
              ("NPID", "none", f"cld.py {C10} --lambda-cld 0"),
              ("NPID + CLD", "none", f"cld.py {C10}"),
              ("InfoNCE (instance)", "none", f"clinfonce.py {C10} --clusters instance"),
              ("Cl-InfoNCE, k = 1,000", "none", f"clinfonce.py {C10} --clusters kmeans"),
              ("Cl-InfoNCE, k = 1,000, two heads", "none",
               f"clinfonce.py {C10} --clusters kmeans --dual"),
              ("Cl-InfoNCE, k = 100", "none", f"clinfonce.py {C10} --clusters kmeans --k 100"),
              ("MoCo", "none", f"{C10_MOCO} --lambda-cld 0"),
              ("MoCo + CLD", "none", f"{C10_MOCO} --lambda-cld 0.8 --k 200"),
              ("SCL-out", "fine", f"rince.py {C10} --loss scl-out"),
              ("RINCE-out-in", "fine, coarse", f"rince.py {C10} --loss rince-out-in"),
              ("SupCon (fine)", "fine", f"clinfonce.py {C10} --clusters label"),
              ("cross-entropy", "fine", f"rince.py {C10} --loss ce")]),
    "fashion": dict(
        untrained="--dataset npz --train-file fashion_attributes_96.npz --image-size 64 "
                  "--label articleType",
        eval="--min-per-class 20",
        columns={"kNN": "knn.top1", "linear": "probe.top1", "R@1": "retrieval.articleType.R@1"},
        rows=[("untrained", "none", None),
              ("InfoNCE (instance)", "none", f"{FASHION} instance"),
              ("Cl-InfoNCE, 2 attributes", "baseColour, subCategory", f"{FASHION} attributes:2"),
              ("Cl-InfoNCE, 5 attributes", "gender, baseColour, season, year, usage",
               f"{FASHION} attributes:5 --attributes {NO_CATEGORY}")]),
    "shapes-views": dict(
        untrained="--dataset shapes-views --knn-t 0.1",
        eval="",
        columns={"kNN": "knn.top1", "linear": "probe.top1"},
        rows=[("untrained", "none", None),
              ("NPID", "none", f"{CLD} demo --lambda-cld 0"),
              ("NPID + CLD", "none", f"{CLD} demo")]),
}


SCRIPTS = {"eval": "linear_eval.py", "ood": "ood_eval.py"}


def slug(row):
    """File name of a row."""
    return "-".join("".join(c if c.isalnum() else " " for c in row[0].lower()).split())


def run_row(args, row, seed):
    """One row with one seed: train, evaluate, keep log and evaluations under results/."""
    protocol, name = SETS[args.set], f"{slug(row)}-{seed}"
    folder, keep = Path("runs") / args.set / name, ROOT / "results" / args.set
    shared = ["--threads", "1", "--device", args.device]
    if args.set != "shapes-views":
        shared += ["--data-dir", args.data_dir]
    keep.mkdir(parents=True, exist_ok=True)
    for kind, script in SCRIPTS.items():
        target = keep / f"{name}.{kind}.json"
        if kind not in protocol or target.exists():
            continue
        if row[2] is None:
            weights = ["none", *protocol["untrained"].split(), "--seed", str(seed)]
        else:
            weights = [str(folder / "checkpoint.pt")]
            run_script([*row[2].split(), "--seed", str(seed), *shared, "--out", str(folder)],
                       folder)
            shutil.copy(ROOT / folder / "log.jsonl", keep / f"{name}.jsonl")
        run_script([script, "--checkpoint", *weights, *protocol[kind].split(), *shared,
                "--out", str(folder / f"{kind}.json")], folder)
        shutil.copy(ROOT / folder / f"{kind}.json", target)
        print(f"{args.set}: {row[0]}, seed {seed}: {kind} done", flush=True)
    target = keep / f"{slug(row)}.state.json"
    if (protocol.get("state", True) and seed == args.seeds[0] and row[2]
            and not target.exists()):
        folder = folder.with_name(f"{slug(row)}-state")
        run_script([*row[2].split(), *shared, "--out", str(folder), "--limit-train", "600",
                "--epochs", "2"], folder)
        target.write_text(json.dumps(state_bytes(ROOT / folder / "checkpoint.pt", 600)))


def state_bytes(path, N):
    """Bytes an image of what a checkpoint keeps for each of its N images: name -> bytes."""
    sizes, todo = {}, [("", torch.load(path, weights_only=True)["state"])]
    while todo:
        name, value = todo.pop()
        if isinstance(value, dict):
            todo += [(f"{name}.{key}".strip("."), inner) for key, inner in value.items()]
        elif torch.is_tensor(value) and value.ndim and len(value) == N:
            sizes[name] = value.numel() * value.element_size() // N
    return sizes


def run_script(words, folder):
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


def collect(args, protocol):
    """The rows that are done, from their logs and evaluations: dicts of (values of the seeds)."""
    keep, done = ROOT / "results" / args.set, {}
    kinds = [kind for kind in SCRIPTS if kind in protocol]
    for row in protocol["rows"]:
        paths = {seed: [keep / f"{slug(row)}-{seed}.{kind}.json" for kind in kinds]
                 for seed in args.seeds}
        seeds = [seed for seed, of_seed in paths.items() if all(p.exists() for p in of_seed)]
        if not seeds:
            continue
        results = [{k: v for path in paths[seed]
                    for k, v in json.loads(path.read_text())["results"].items()} for seed in seeds]
        cells = {name: [look_up(r, path) for r in results]
                 for name, path in protocol["columns"].items()}
        if row[2]:
            logs = [[r for r in records(keep, row, seed) if "cpu_seconds" in r] for seed in seeds]
            cells["s / epoch"] = [seconds_per_epoch(log) for log in logs]
            cells["MB"] = [log[-1]["memory_mb"] for log in logs]
            if (state := keep / f"{slug(row)}.state.json").exists():
                cells["B / image"] = [sum(json.loads(state.read_text()).values())]
        done[row] = cells
    return done


def seconds_per_epoch(log):
    """CPU seconds an epoch; of a run that was resumed, those since then: the clock began anew."""
    resumed = [r for last, r in zip(log, log[1:]) if r["cpu_seconds"] < last["cpu_seconds"]]
    begin = resumed[-1] if resumed else dict(cpu_seconds=0, epoch=0)
    return (log[-1]["cpu_seconds"] - begin["cpu_seconds"]) / (log[-1]["epoch"] - begin["epoch"])


def records(keep, row, seed):
    """The lines of the log of a run, without the first, which holds the command."""
    lines = (keep / f"{slug(row)}-{seed}.jsonl").read_text().splitlines()[1:]
    return [json.loads(line) for line in lines]


def write_table(args, protocol, done):
    """The table as CSV (all digits) and markdown, and a picture of it."""
    path = ROOT / "results" / protocol.get("name", args.set)
    costs = [name for name in ("s / epoch", "MB", "B / image")
             if any(name in cells for cells in done.values())]
    some = any(len(cells["kNN"]) < len(args.seeds) for cells in done.values())
    columns = ["row", "labels seen", *protocol["columns"], *costs, *["seeds"] * some]
    lines, digits = [columns, ["---"] * len(columns)], {"s / epoch": 1, "MB": 0, "B / image": 0}
    with open(path.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "labels seen", "column", "mean", "sd", "seeds"])
        for row, cells in done.items():
            line = list(row[:2])
            for name in columns[2:len(columns) - some]:
                values = cells.get(name, [])
                mean = statistics.mean(values) if values else None
                sd = statistics.stdev(values) if len(values) > 1 else None
                n = digits.get(name, 2)
                line.append("-" if mean is None else f"{mean:.{n}f}" + (
                    f" ± {sd:.{n}f}" if sd is not None and name not in costs else ""))
                if values:
                    writer.writerow([*row[:2], name, mean, sd, len(values)])
            lines.append([*line, *[str(len(cells["kNN"]))] * some])
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    path.with_suffix(".md").write_text(text + "\n")
    print(text)
    if "name" in protocol:
        picture(path.with_suffix(".png"), protocol, done)
    if args.set == "c10":
        curves(args, protocol, done, {"knn_top1": "kNN top-1 (%)"}, "c10-knn.png")
        curves(args, protocol, done, {
            "purity": "WCL: purity of the weak labels (%); dashed: random groups",
            "I_Z_T": "Cl-InfoNCE: I(Z;T) of the clusters (bits)"}, "c10-labels.png")


def curves(args, protocol, done, panels, file):
    """Values of the logs over the epochs, one panel a value: mean and range of the seeds."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    keep = ROOT / "results" / args.set
    logs = {row[0]: [records(keep, row, seed) for seed in args.seeds
                     if (keep / f"{slug(row)}-{seed}.jsonl").exists()] for row in done if row[2]}
    panels = {name: title for name, title in panels.items()
              if any(name in r for of_row in logs.values() for log in of_row for r in log)}
    if not panels:
        return
    tab20 = plt.get_cmap("tab20").colors  # ten colours, each dark and light
    colors = tab20[::2] + tab20[1::2]
    figure, axes = plt.subplots(1, len(panels), squeeze=False, figsize=(7 * len(panels), 5))
    for axis, (name, title) in zip(axes[0], panels.items(), strict=True):
        for i, (row, of_row) in enumerate(logs.items()):
            for key, style in ((name, "-"), ("random" if name == "purity" else None, "--")):
                values = {}  # epoch -> values of the seeds
                for log in of_row:
                    steps = next(r["step"] / r["epoch"] for r in log if "epoch" in r)
                    for r in log:
                        if key == "I_Z_T" and r["step"] == 0:
                            continue  # no clusters yet: every image is one
                        if key in r and r.get("epoch", 0) % 1 == 0:
                            values.setdefault(r["step"] / steps, []).append(r[key])
                if len(values) > 1:
                    x, y = zip(*sorted(values.items()))
                    axis.plot(x, [statistics.mean(v) for v in y], style, color=colors[i],
                              marker="o" * (name == "knn_top1"), ms=3,
                              label=row if style == "-" else None, alpha=1 if style == "-" else 0.5)
                    axis.fill_between(x, [min(v) for v in y], [max(v) for v in y],
                                      color=colors[i], alpha=0.15)
        axis.set_xlabel("epoch")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        beside = dict(loc="center left", bbox_to_anchor=(1, 0.5))  # it would cover curves
        axis.legend(fontsize=8, **beside if len(axis.get_lines()) > 9 else {})
    figure.tight_layout()
    figure.savefig(ROOT / "results" / file, dpi=110)
    plt.close(figure)


def picture(path, protocol, done):
    """One panel a column: mean and standard deviation of every row; the untrained one dashed."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(protocol["columns"])
    figure, axes = plt.subplots(1, len(names), sharey=True, squeeze=False,
                                figsize=(2.2 + 1.6 * len(names), 0.7 + 0.27 * len(done)))
    labels = {label: f"C{i}" for i, label in enumerate(dict.fromkeys(row[1] for row in done))}
    for axis, name in zip(axes[0], names, strict=True):
        for y, (row, cells) in enumerate(done.items()):
            if not (values := cells.get(name)):
                continue
            axis.errorbar(statistics.mean(values), -y, fmt="o", ms=4, color=labels[row[1]],
                          xerr=statistics.stdev(values) if len(values) > 1 else 0)
            if row[2] is None:
                axis.axvline(statistics.mean(values), color="gray", ls="--", lw=0.8)
        auroc = "AUROC, " if protocol["columns"][name].endswith("AUROC") else ""
        axis.set_title(f"{auroc}{name}", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    axes[0, 0].set_yticks([-y for y in range(len(done))], [row[0] for row in done], fontsize=8)
    figure.legend([plt.Line2D([], [], marker="o", ls="", color=c) for c in labels.values()],
                  [f"labels seen: {label}" for label in labels], loc="lower center",
                  ncols=len(labels), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)


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
    protocol = SETS[args.set]
    rows = protocol["rows"]
    block = [i for i, n in enumerate(protocol.get("blocks", [1] * len(rows))) for _ in range(n)]
    jobs = sorted((block[i], seed, i) for i in range(len(rows)) for seed in args.seeds)
    jobs = [(rows[i], seed) for _, seed, i in jobs
            if args.only is None or args.only.lower() in rows[i][0].lower()]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: run_row(args, *job), jobs))

    write_table(args, protocol, collect(args, protocol))


if __name__ == "__main__":
    main()

"""Out-of-distribution detection with the backbone of a checkpoint: test images of the data set that
it was trained on (in-distribution) against sets of outliers.

--checkpoint takes every file that linear_eval.py reads, and `none`, the untrained network. The
scores are high for in-distribution images. They are fitted to the training images alone, seen as
test images are. Nothing is tuned on the outliers: every number below was fixed before. F_c are the
L2-normalized backbone features of the n_c training images of class c, x those of a test image:

    gaussian     max_c log N(x; mu_c, Sigma_c), mu_c = mean of F_c, Sigma_c = (1 / n_c) sum of
                 (f - mu_c)(f - mu_c)^T + ridge I      the headline; RINCE's protocol             G1
    mahalanobis  -min_c (x - mu_c)^T Sigma^-1 (x - mu_c), one Sigma for all classes: the mean of
                 (f - mu_c)(f - mu_c)^T over all images, + ridge I         (Lee et al. 2018)      G2
    knn          -|x - f_(k)|, f_(k) the k-th nearest of all training images: no labels
                                                                           (Sun et al. 2022)      G3
    softmax      max_c p_c of the classifier, for a checkpoint of --loss ce
                                                      (Hendrycks and Gimpel 2017)                 G4

Metrics, in percent, with the in-distribution images as positives unless said otherwise. Equal
scores share one threshold.

    AUROC        area under the ROC curve, a tie counts 1/2
    AUPR-in      average precision;  AUPR-out: the outliers are the positives, low scores first
    FPR95        share of outliers above the highest threshold that keeps 95 % of the inliers
    FPR95-out    share of inliers below the lowest threshold that catches 95 % of the outliers

The intervals are bootstrap percentiles (2.5, 97.5) over the test images and outliers. The network
is fixed, so they say nothing about other seeds. Outliers are resized as the test images are, and
normalized with the same mean and deviation.

    python ood_eval.py --checkpoint runs/rince-demo-seed0/checkpoint.pt   # shapes: unseen shapes
    python ood_eval.py --checkpoint none                                  # the untrained network
    python ood_eval.py --checkpoint FILE --outliers cifar10 dtd=ood_dtd_part_32.npz art=DIR/images
Shapes: N training images, C classes, D width of the backbone, n test images and outliers, T
distinct scores.
"""
import argparse
import collections
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F

import common

# ---------------------------------------------------------------------------------- recipes

RECIPES = {
    "rince": dict(  # RINCE's protocol: the ridge is that of scikit-learn's GaussianMixture
        ridge=1e-6,
        k=50, bootstrap=1000),  # chosen for this project, before any figure was seen
}
METRICS = ("AUROC", "AUPR-in", "AUPR-out", "FPR95", "FPR95-out")

# ---------------------------------------------------------------------------------- scores


def cholesky(centred, ridge, name):
    """Lower factor of Sigma (D, D), the covariance of rows (n, D) of mean 0, divisor n, + ridge I.

    RunFailed if the ridge does not make Sigma positive definite.
    """
    Sigma = centred.T @ centred / len(centred)
    Sigma += ridge * torch.eye(len(Sigma), dtype=Sigma.dtype, device=Sigma.device)
    L, failed = torch.linalg.cholesky_ex(Sigma)
    if failed or not L.isfinite().all():
        raise common.RunFailed(f"the covariance of {name} is not positive definite; use a larger "
                               "--ridge")
    return L


def squared_distances(x, mu, L):
    """Squared Mahalanobis distances (n,) of x (n, D) to mu, from the Cholesky factor of Sigma."""
    return torch.linalg.solve_triangular(L, (x - mu).T, upper=False).square().sum(0)


def class_log_densities(train, labels, x, ridge=1e-6):
    """log N(x; mu_c, Sigma_c) (G1) in float64; the score of x is its maximum over the classes.

    Args: train (N, D), labels (N,) int64, x (n, D). A class of few images has a singular
    covariance, of one image the ridge alone.
    Returns: (n, C) float64, classes ascending. Raises: ValueError for features that are not finite.
    """
    train, x = train.double(), x.double()
    if not (train.isfinite().all() and x.isfinite().all()):
        raise ValueError("features are not finite")
    densities = []
    for c in labels.unique().tolist():
        F_c = train[labels == c]
        mu = F_c.mean(0)
        L = cholesky(F_c - mu, ridge, f"class {c}")
        log_det = 2 * L.diagonal().log().sum()
        densities.append(-0.5 * (len(mu) * math.log(2 * math.pi) + log_det
                                 + squared_distances(x, mu, L)))
    return torch.stack(densities, 1)


def mahalanobis(train, labels, x, ridge=1e-6):
    """Minus the smallest squared Mahalanobis distance to a class mean, tied covariance (G2).

    Args as of `class_log_densities`. Returns: (n,) float64.
    """
    train, x = train.double(), x.double()
    ids, place = labels.unique(return_inverse=True)
    means = torch.stack([train[place == c].mean(0) for c in range(len(ids))])  # (C, D)
    L = cholesky(train - means[place], ridge, "all classes")
    return -torch.stack([squared_distances(x, mu, L) for mu in means], 1).min(1).values


def knn_distance(train, x, k=50):
    """Minus the Euclidean distance to the k-th nearest training row (G3), by faiss on the CPU.

    Args: train (N, D), x (n, D), unit-norm. Returns: (n,) float64. Raises: ValueError if k > N.
    """
    import faiss

    if not 1 <= k <= len(train):
        raise ValueError(f"k = {k} for {len(train)} training images")
    index = faiss.IndexFlatL2(train.shape[1])
    index.add(train.float().cpu().numpy())
    square = index.search(x.float().cpu().numpy(), k)[0][:, -1]  # (n,)
    return -torch.from_numpy(square).double().clamp(min=0).sqrt()


def max_softmax(h, weight, bias):
    """Largest class probability of features h (n, D), not normalized, under a linear head (G4)."""
    return (h.double() @ weight.double().T + bias.double()).softmax(1).max(1).values


# ---------------------------------------------------------------------------------- metrics


def histogram(inliers, outliers):
    """Numbers of inliers and of outliers, (T,) float64, with each distinct score, highest first.

    Args: scores (n_in,) and (n_out,). Raises: ValueError without scores or for a NaN.
    """
    if not (len(inliers) and len(outliers)):
        raise ValueError(f"{len(inliers)} inliers and {len(outliers)} outliers: both are needed")
    scores = torch.cat([inliers, outliers])
    if scores.isnan().any():
        raise ValueError("a score is NaN")
    value, place = scores.unique(return_inverse=True)
    place = len(value) - 1 - place  # descending
    return tuple(torch.bincount(p, minlength=len(value)).double()
                 for p in place.split([len(inliers), len(outliers)]))


def average_precision(hits, misses):
    """Sum over thresholds of (recall - recall before) * precision; (..., T) -> (...)."""
    tp, fp = hits.cumsum(-1), misses.cumsum(-1)
    # a bootstrap sample may lack the first scores: no image yet, and no step of recall
    return (hits * tp / (tp + fp).clamp(min=1)).sum(-1) / tp[..., -1]


def false_rate(hits, misses):
    """Share of `misses` at the first threshold that has 95 % of `hits`; (..., T) -> (...)."""
    tp, fp = hits.cumsum(-1), misses.cumsum(-1)
    first = (100 * tp >= 95 * tp[..., -1:]).int().argmax(-1, keepdim=True)
    return (fp.gather(-1, first) / fp[..., -1:]).squeeze(-1)


def metrics(hits, misses):
    """The five metrics as fractions, from numbers of inliers and outliers, see `histogram`.

    Args: hits, misses (..., T); leading dimensions are bootstrap samples.
    Returns: dict of name -> (...) float64.
    """
    tp, fp = hits.cumsum(-1), misses.cumsum(-1)
    above = tp - hits / 2  # inliers above an outlier's score, half of those at the same score
    reverse = misses.flip(-1), hits.flip(-1)  # low scores first, outliers are the positives
    return {"AUROC": (misses * above).sum(-1) / (tp[..., -1] * fp[..., -1]),
            "AUPR-in": average_precision(hits, misses), "AUPR-out": average_precision(*reverse),
            "FPR95": false_rate(hits, misses), "FPR95-out": false_rate(*reverse)}


def bootstrap_intervals(hits, misses, samples, seed):
    """Percentiles 2.5 and 97.5 of every metric, images drawn with replacement.

    Args: hits, misses (T,) of `histogram`. Returns: dict of name -> [low, high].
    """
    T = len(hits)
    places = [torch.arange(T).repeat_interleave(n.long()) for n in (hits, misses)]  # of each image
    at_a_time, values = max(1, 2 ** 22 // (T + max(map(len, places)))), []  # bounds the memory
    for start in range(0, samples, at_a_time):
        g, R = common.generator(seed, start, "bootstrap"), min(at_a_time, samples - start)
        drawn = [place[torch.randint(len(place), (R, len(place)), generator=g)]
                 for place in places]
        counts = [torch.bincount((d + T * torch.arange(R)[:, None]).flatten(), minlength=R * T)
                  .view(R, T).double() for d in drawn]
        values.append(metrics(*counts))
    q = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return {name: torch.cat([v[name] for v in values]).quantile(q).tolist() for name in METRICS}


# ---------------------------------------------------------------------------------- images


def load_inliers(args, device):
    """common.Data of the in-distribution images, without training images that have no label."""
    data = common.load(argparse.Namespace(**{**vars(args), "batch_size": 1}), device)
    y, y_test = (t.column(args.label) for t in (data.train, data.test))
    data.train = data.train.select((y >= 0).nonzero().flatten())
    if not len(data.train):
        raise common.BadInput(f"--label {args.label}: no training image has a label")
    if len(new := y_test[(y_test >= 0) & ~torch.isin(y_test, y)].unique()):
        names = data.train.classes.get(args.label) or range(int(new.max()) + 1)
        raise common.BadInput(f"--label {args.label}: test images of class {names[int(new[0])]}, "
                              "which has no training image, are not in-distribution")
    if args.k > len(data.train):
        raise common.BadInput(f"--k {args.k}: there are {len(data.train)} training images")
    return data


def load_outliers(text, args, device):
    """Name and common.Table of one value of --outliers."""
    name, _, file = text.partition("=")
    name = name if file else ""
    others = [s for s in ("shapes", "cifar10", "cifar100", "stl10")
              if s != args.dataset.partition("-")[0]]  # the test images of shapes-views are shapes
    path = Path(args.data_dir) / file
    if name and path.is_dir():
        files = common.list_images(path, skipped := collections.Counter())
        if not files:
            raise common.BadInput(f"--outliers {text}: no image below {path}")
        classes = [os.path.relpath(f, path).partition(os.sep) for f in files]
        ids, names = common.ids_of([name if below else "" for name, below, _ in classes])
        table = common.Table(dict(label=ids), dict(label=names), paths=files,
                             notes=common.skipped_notes(path, skipped))
    elif name and path.suffix == ".npz":
        table = common.npz_table(path)
    elif name:
        raise common.BadInput(f"--outliers {text}: {path} is neither a folder nor an npz pack")
    elif text == "unseen":
        images, columns, classes, _ = common.shapes(1024, seed=2, unseen=True)
        table = common.Table(columns, classes, images)
    elif text in others:
        table = common.SOURCES[text](argparse.Namespace(**{**vars(args), "dataset": text}))[1]
    else:
        raise common.BadInput(f"--outliers {text}: write unseen, another data set "
                              f"({', '.join(others)}), NAME=FILE.npz or NAME=FOLDER below "
                              "--data-dir")
    if table.images is not None:
        table.images = table.images.to(device)
    return name or text, table


def choose_classes(sets, values):
    """The sets with the images of --outlier-classes only: a file of names, or the names."""
    known = {name for _, table in sets for name in table.classes.get("label", [])}
    if len(values) == 1 and Path(values[0]).is_file():
        values = common.read_names("--outlier-classes", values[0], known)
    if missing := [value for value in values if value not in known]:
        raise common.BadInput(f"--outlier-classes: no set has class {missing[0]!r}; there are "
                              f"{', '.join(sorted(known)[:9]) or 'none'}")
    chosen = []
    for name, table in sets:
        ids = [i for i, c in enumerate(table.classes.get("label", [])) if c in values]
        labels = table.columns.get("label", torch.full_like(table.index, -1))
        rows = torch.isin(labels, torch.tensor(ids))
        if not rows.any():
            raise common.BadInput(f"--outlier-classes: set {name} has none of these classes")
        chosen.append((name, table.select(rows.nonzero().flatten())))
    return chosen


def score_images(args, checkpoint, h_train, y, h):
    """Every score of features h (n, D), fitted to h_train (N, D) and y (N,): name -> (n,)."""
    train, x = (F.normalize(z.double(), dim=1) for z in (h_train, h))
    scores = dict(gaussian=class_log_densities(train, y, x, args.ridge).max(1).values,
                  mahalanobis=mahalanobis(train, y, x, args.ridge),
                  knn=knn_distance(train, x, args.k))
    if common.is_ours(checkpoint) and checkpoint["args"].get("loss") == "ce":
        model = checkpoint["state"]["model"]
        scores["softmax"] = max_softmax(h, *(model[f"head.{p}"].to(h.device)
                                             for p in ("weight", "bias")))
    return {name: s.cpu() for name, s in scores.items()}


# ---------------------------------------------------------------------------------- results


def result_lines(results, intervals):
    """Lines for the terminal: one for every set of outliers and score."""
    lines = [f"  {'outliers':14} {'score':12} {'AUROC':22}" + "".join(
        f"{m:>11}" for m in METRICS[1:])]
    for name, of_set in results.items():
        for score, of_score in of_set.items():
            text = f"{of_score['AUROC']:.2f}"
            if intervals:
                text += " [{:.2f}, {:.2f}]".format(*intervals[name][score]["AUROC"])
            lines.append(f"  {name:14} {score:12} {text:22}" + "".join(
                f"{of_score[m]:11.2f}" for m in METRICS[1:]))
    return lines


def score_picture(path, args, scores, results):
    """PNG: for each set of outliers the histograms of the headline score, below it the ROC curves.

    scores: set -> score -> (inliers, outliers). None without matplotlib.
    """
    if (plt := common.pyplot()) is None:
        return None
    figure, axes = plt.subplots(2, len(scores), figsize=(4 * len(scores), 6.6), squeeze=False)
    for name, (top, bottom) in zip(scores, axes.T, strict=True):
        pair = scores[name]["gaussian"]
        q = torch.tensor([0.005, 0.995], dtype=torch.float64)  # singular classes have long tails
        low, high = zip(*(s.quantile(q).tolist() for s in pair), strict=True)
        ends = min(low), max(high)
        for s, label in zip(pair, ("in-distribution", name), strict=True):
            top.hist(s.clamp(*ends).numpy(), 50, range=ends, density=True, alpha=0.55,
                     label=label)
        top.set(title=f"{name}: AUROC {results[name]['gaussian']['AUROC']:.1f} %", yticks=[],
                xlabel="class-conditional Gaussian, log-density")
        top.locator_params(axis="x", nbins=5)
        top.legend(fontsize=8)
        for score, pair in scores[name].items():
            tp, fp = (F.pad(n.cumsum(0) / n.sum(), (1, 0)) for n in histogram(*pair))
            bottom.plot(fp, tp, label=f"{score} {results[name][score]['AUROC']:.1f}")
        bottom.plot([0, 1], [0, 1], color="0.7", lw=1)
        bottom.set(xlabel="outliers above the threshold", ylabel="in-distribution above it",
                   aspect="equal")
        bottom.legend(fontsize=8, loc="lower right")
    network = "untrained network" if args.checkpoint == "none" else args.checkpoint
    figure.suptitle(f"{network}, {common.source(args)}", fontsize=9)
    figure.tight_layout()
    common.atomic_write(path, lambda file: figure.savefig(file, dpi=120, format="png"))
    plt.close(figure)
    return path


# ---------------------------------------------------------------------------------- evaluation


def evaluate(args, checkpoint):
    """Evaluate in this process; see the docstring of the file."""
    if args.outliers is None:
        if not args.dataset.startswith("shapes"):
            raise common.BadInput("name --outliers: another data set, NAME=FILE.npz or NAME=FOLDER")
        args.outliers = ["unseen"]
    common.check_ranges(args, above=["ridge", "k"], least=["bootstrap"])
    common.require("faiss", "faiss-cpu", "the k-NN distance (G3)")
    common.reject_unused(args, [*common.TRAINING, "optimizer", "momentum", "epochs"],
                         "by ood_eval.py, which trains nothing")
    common.reject_unused(args, ["knn_k", "knn_t"], "by ood_eval.py, whose k-NN has --k")
    record, path, device, backbone, description = common.start_evaluation(args, checkpoint)
    picture = path.with_suffix(".png")
    if picture.exists() and not path.exists():
        raise common.BadInput(f"{picture} exists; use another --out")
    data = load_inliers(args, device)
    sets = [load_outliers(text, args, device) for text in args.outliers]
    if args.outlier_classes:
        sets = choose_classes(sets, args.outlier_classes)
    if len({name for name, _ in sets}) < len(sets):
        raise common.BadInput("--outliers: two sets of one name")
    tables = [data.train, data.test, *(table for _, table in sets)]
    h_train, *h = (common.extract_features(backbone, data, table).to(device) for table in tables)
    y = data.train.columns[args.label].to(device)
    if common.rank() > 0:
        return
    print("\n".join([description, *common.data_notes(checkpoint, args, data)]))
    if few := int((y.unique(return_counts=True)[1] <= h_train.shape[1]).sum()):
        print(f"{few} classes have no more training images than features ({h_train.shape[1]}): "
              f"their covariance is singular but for the ridge {args.ridge:g}")
    of_all = score_images(args, checkpoint, h_train, y, torch.cat(h))
    by_table = {score: s.split([len(z) for z in h]) for score, s in of_all.items()}
    results, intervals, scores = {}, {}, {}
    for i, (name, _) in enumerate(sets, 1):
        scores[name] = {score: (s[0], s[i]) for score, s in by_table.items()}
        counts = {score: histogram(*pair) for score, pair in scores[name].items()}
        results[name] = {score: {m: 100 * v.item() for m, v in metrics(*n).items()}
                         for score, n in counts.items()}
        if args.bootstrap:
            intervals[name] = {
                score: {m: [100 * v for v in pair] for m, pair in bootstrap_intervals(
                    *n, args.bootstrap, args.seed).items()} for score, n in counts.items()}
    print(f"in-distribution: {common.source(args)}, column {args.label}, fitted to "
          f"{len(data.train)} training images, {len(data.test)} test images; outliers: "
          f"{', '.join(f'{name} {len(t)}' for name, t in sets)}")
    for note in [note for table in tables for note in table.notes]:
        print(note)
    print("\n".join([*result_lines(results, intervals), "  percent; headline: gaussian" +
                     "; [95 % bootstrap interval over images]" * (args.bootstrap > 0)]))
    common.write_results(
        path, record, device, headline="gaussian", results=results, intervals=intervals,
        data=dict(train=len(data.train), test=len(data.test),
                  outliers={name: len(t) for name, t in sets}))
    print(f"  {'results':14} {path}")
    print(f"  {'picture':14} {score_picture(picture, args, scores, results)}")


def main(argv=None):
    """Parse the flags and evaluate; `main([...])` runs in this process."""
    parser = common.EvaluationParser("ood_eval", __doc__, RECIPES)
    add = parser.add_argument_group("evaluation").add_argument
    add("--outliers", nargs="+", help="unseen (shapes), a data set, NAME=FILE.npz, NAME=FOLDER")
    add("--outlier-classes", nargs="+", help="classes of the outliers to use: names, or a file")
    add("--ridge", type=float, default=1e-6, help="on the diagonal of a covariance (G1, G2)")
    add("--k", type=int, default=50, help="k of the k-NN distance (G3)")
    add("--bootstrap", type=int, default=1000, help="samples of the intervals, 0: none")
    parser.set_defaults(recipe="rince")
    common.run(lambda args: evaluate(args, parser.checkpoint), parser, argv)


if __name__ == "__main__":
    main()

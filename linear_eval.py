"""Evaluate the backbone of a checkpoint: kNN, retrieval, linear probes, fine-tuning on few labels.

--checkpoint takes a file of any method of this project, a torchvision ResNet state dict, or a file
of others: it searches nested dicts, any prefix (`module.encoder_q.*`) and numbered layers for the
ResNet that fits best, and prefers a trained network to its slow copy. It prints which weights were
loaded and which were not, and fails if any do not fit. A checkpoint of this project sets the data
set, label column, image size, mean and standard deviation (also for other data), the images of
--limit-train, and the seed; a recipe overrides it, a flag both.

    fast      features extracted once: weighted kNN; R@1/5/10/20 and mAP@R of the test images in the
              training images; a linear probe, softmax regression by SGD on standardized features.
              20 % of every class of the TRAINING images choose its learning rate and weight decay
              from a grid; then it is fitted to all of them and tested once
    linear    recipes clinfonce, clinfonce-dual, cifar, moco, infomin, wcl: a linear layer by SGD on
              augmented images; backbone frozen, in evaluation mode, features not normalized
    finetune  recipes semi-1, semi-10: the whole network on a class-balanced --fraction of the
              training images, or on the images that --subset names
    features  (--mode features) no results: it only writes the files of --features and --embedding

--save FILE saves the network with its linear layer as a state dict that torchvision loads.
--features FILE.npz saves the features of all images with row numbers, labels and paths. --embedding
FILE.png draws those of at most 4,000 test images in two dimensions (PCA).

The result of `linear` and `finetune` is the LAST epoch. The best epoch on the test set, which some
papers quote, is given as `best_on_test`. A JSON file beside the checkpoint (--out) holds all.
An evaluation does not resume, as it is short. With several processes --batch-size is the global
batch and all of them compute features; every process fits the same fast probe.

    python linear_eval.py --checkpoint runs/clinfonce-demo-seed0/checkpoint.pt --picture
    python linear_eval.py --checkpoint none --dataset cifar100         # baseline: untrained network
    python linear_eval.py --checkpoint FILE --recipe cifar --picture   # one GPU
    python linear_eval.py --checkpoint FILE --fraction 0.1             # recipe semi-10
    python linear_eval.py --checkpoint FILE --fraction 0.1 --micro-batch 64    # one small GPU
    python linear_eval.py --checkpoint FILE --mode features --features x.npz --embedding x.png
    torchrun --nproc_per_node=4 linear_eval.py --checkpoint FILE --recipe moco --dataset folder \\
        --data-dir DIR --image-size 224
Shapes: N training images, D width of the backbone, C classes, G points of the grid, b rows.
"""
import argparse
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common

# ---------------------------------------------------------------------------------- recipes

# Sources: the authors' evaluation scripts, except `fast`. They keep the incomplete last batch of an
# epoch, which is dropped here as in training: 312 steps an epoch on ImageNet at batch 4096, not
# 313. `milestones`: the rate drops AFTER that many epochs.
LINEAR = dict(mode="linear", momentum=0.9, weight_decay=0.0, schedule="steps",
              crop=[0.08, 1.0], jitter_p=0.0, gray=0.0, blur=0.0)  # crop and flip
COSINE = dict(  # lr = 0.2 B / 256; at batch 4096 the rate is 1.6 (1 + cos(pi t / T))
    LINEAR, epochs=80, batch_size=4096, lr_256=0.2, nesterov=True, schedule="cosine", init_std=0.01)
SEMI = dict(  # SwAV's eval_semisup.py; what WCL used is not known
    LINEAR, mode="finetune", epochs=20, batch_size=256, milestones=[12, 16], gamma=0.2,
    protocol="SwAV-style")
RECIPES = {
    "fast": dict(  # chosen for this project
        mode="fast", epochs=30, batch_size=256, momentum=0.9,
        lrs=[1.0, 3.0, 10.0, 30.0, 100.0, 300.0], weight_decays=[0.0, 1e-5, 1e-4, 1e-3]),
    "clinfonce": dict(  # main_linear.py, run_eval.sh; the training augmentation, jitter included
        mode="linear", epochs=100, batch_size=128, lr=0.3, momentum=0.95, nesterov=True,
        weight_decay=1e-4, schedule="cosine-epoch",  # the last epoch has exactly lr * 1e-3
        crop=[0.4, 1.0], jitter=[0.4, 0.4, 0.4, 0.1], jitter_p=0.8, gray=0.2, blur=0.0),
    "clinfonce-dual": COSINE,  # linear_eval.py of the dual-head repository
    "cifar": dict(  # RINCE, CIFAR-100; the scale of its crop is that of its training
        LINEAR, crop=[0.2, 1.0], epochs=100, batch_size=512, lr=5.0, milestones=[60, 75, 90],
        gamma=0.2),
    "moco": dict(  # main_lincls.py of MoCo v2 and CLD
        LINEAR, epochs=100, batch_size=256, lr=30.0, milestones=[60, 80], gamma=0.1, init_std=0.01),
    "infomin": dict(  # main_linear_infomin.py of CLD; RandAugment: see common.randaugment
        LINEAR, crop=[0.2, 1.0], randaugment=[2, 10], epochs=61, batch_size=256, lr=30.0,
        milestones=[30, 40, 50], gamma=0.2),
    "wcl": COSINE,
    "semi-1": dict(SEMI, fraction=0.01, lr=5.0, lr_backbone=0.02),
    "semi-10": dict(SEMI, fraction=0.1, lr=0.2, lr_backbone=0.01),
}

UNUSED = {  # mode -> flags that it does not use
    "linear": ["retrieval_labels", "lrs", "weight_decays", "lr_backbone", "knn_k", "knn_t"],
    "finetune": ["retrieval_labels", "lrs", "weight_decays", "knn_k", "knn_t"],
    "fast": [*common.TRAINING, "lr_256", "lr_backbone", "schedule", "milestones", "gamma",
             "init_std"]}
UNUSED["features"] = [
    *UNUSED["fast"], "retrieval_labels", "lrs", "weight_decays", "knn_k", "knn_t", "momentum",
    "epochs", "fraction", "subset", "min_per_class"]
RANKS = (1, 5, 10, 20)  # of R@k
PART = 2 ** 16  # rows of --features at a time

# ---------------------------------------------------------------------------------- rows


def load_labelled(args, device):
    """common.Data with labels 0..C-1, numbered by the training set; the C names; notes for the log.

    It leaves out images without label and classes with fewer than --min-per-class training images,
    then takes --subset or --fraction of the training images.
    """
    # batch 1: common.Data checks that the batch fits, which is known once the rows are chosen
    any_size = argparse.Namespace(**{**vars(args), "batch_size": 1})
    whole = common.load(any_size, device)
    notes, labels = whole.train.notes + whole.test.notes, whole.train.column(args.label)
    if args.mode == "features":  # of all images, with a label or without
        return whole, whole.train.classes.get(args.label) or [], notes
    ids, counts = labels[labels >= 0].unique(return_counts=True)
    ids = ids[counts >= args.min_per_class]
    if len(ids) < 2:
        raise common.BadInput(f"--label {args.label} has {len(ids)} classes with --min-per-class "
                              f"{args.min_per_class} training images; two are needed (a flat "
                              "folder has no labels)")
    tables = []
    for name, table in (("training", whole.train), ("test", whole.test)):
        rows = torch.isin(table.column(args.label), ids).nonzero().flatten()
        if not len(rows):
            raise common.BadInput(f"--label {args.label}: no {name} image has one of the classes")
        if len(rows) < len(table):
            notes.append(f"{len(table) - len(rows)} of {len(table)} {name} images left out: no "
                         f"label, or a class of fewer than {args.min_per_class} training images")
        tables.append(table.select(rows))
        tables[-1].columns[args.label] = torch.searchsorted(ids, table.column(args.label)[rows])
    train, test = tables
    if args.subset:
        rows = {str(i): row for row, i in enumerate(train.index.tolist())}  # what a line may name
        for row, image in enumerate(train.paths or []):
            name = os.path.basename(image)
            rows[name] = None if name in rows else row  # None: two images of that name
            rows[os.path.relpath(image, args.data_dir)] = row
        text = common.read_text(f"--subset {args.subset}", args.subset)
        lines = [s.strip() for s in text.split("\n")]
        for number, name in enumerate(lines, 1):
            if name and rows.get(name) is None:
                raise common.BadInput(f"--subset {args.subset}, line {number}: {name!r} names no "
                                      "labelled training image, or two: write its whole path")
        if not any(lines):
            raise common.BadInput(f"--subset {args.subset} names no image")
        train = train.select(torch.tensor([rows[name] for name in lines if name]).unique())
        if empty := len(ids) - train.columns[args.label].unique().numel():
            notes.append(f"--subset has no image of {empty} of the {len(ids)} classes")
    elif args.fraction is not None:
        n = int(args.fraction * len(train) + 1e-9)  # rounded down: 12,811 of ImageNet
        if n < len(ids):
            raise common.BadInput(f"--fraction {args.fraction}: {n} of {len(train)} training "
                                  f"images leave some of the {len(ids)} classes without one")
        train = train.select(common.balanced_rows(train.columns[args.label], n, args.seed))
    names = whole.train.classes.get(args.label) or range(int(ids.max()) + 1)
    data = common.Data(train, test, any_size if args.mode == "fast" else args, device)
    return data, [str(names[i]) for i in ids.tolist()], notes


# ---------------------------------------------------------------------------------- fast probe


def standardizer(x):
    """Function (x, rows, device) -> (b, D + 1) float32: standardized rows, and a 1 for the bias.
    Over x (N, D) a row has mean 0 and mean square norm 1: learning rates do not depend on D. It
    takes a batch at a time, as ImageNet's features do not fit on a GPU."""
    sums = torch.zeros(2, x.shape[1], dtype=torch.float64, device=x.device)
    for block in x.split(2 ** 16):
        sums += torch.stack([block.double().sum(0), block.double().square().sum(0)])
    mean, square = sums / len(x)
    std = (square - mean ** 2).clamp(min=0).sqrt()
    std = torch.maximum(std, 1e-4 * square.sqrt() + 1e-12) * x.shape[1] ** 0.5  # some are constant
    mean, std = mean.float(), std.float()

    def standardize(x, rows, device):
        part = x[rows.to(x.device)].to(device, non_blocking=True).float()
        return F.pad((part - mean.to(device)) / std.to(device), (0, 1), value=1.0)
    standardize.mean, standardize.std = mean, std
    return standardize


def fit_softmax_regression(x, y, rows, standardize, classes, grid, args):
    """SGD with momentum and a cosine schedule to 0, for a whole grid side by side.

    Args: x (N, D); y (N,) int64, on the device that computes; rows (n,) int64, those to fit; grid,
    G pairs (learning rate, weight decay, not of the bias). Returns: W (D + 1, G, C), from 0.
    """
    lr, decay = torch.tensor(grid, device=y.device).T[:, :, None]  # (G, 1) each
    W = torch.zeros(x.shape[1] + 1, len(grid), classes, device=y.device)
    velocity, step, steps = torch.zeros_like(W), 0, args.epochs * -(-len(rows) // args.batch_size)
    for epoch in common.progress(range(args.epochs), desc=f"fast probe, grid of {len(grid)}"):
        order = torch.randperm(len(rows), generator=common.generator(args.seed, epoch, "probe"))
        for batch in rows[order].to(x.device).split(args.batch_size):
            xb = standardize(x, batch, y.device)  # (b, D + 1)
            p = (xb @ W.flatten(1)).unflatten(1, W.shape[1:]).softmax(2)  # (b, G, C)
            target = y[batch.to(y.device, non_blocking=True)]
            p -= F.one_hot(target, classes)[:, None]  # gradient of cross-entropy
            gradient = (xb.T @ p.flatten(1) / len(batch)).unflatten(1, W.shape[1:])
            gradient[:-1] += decay * W[:-1]
            velocity.mul_(args.momentum).add_(gradient)
            W -= common.warmup_cosine(step, steps, 1.0) * lr * velocity
            step += 1
    return W


def choose_hyperparameters(x, y, standardize, classes, args):
    """The grid point with the best validation_top1 (ties: the first), held_out and grid, as a dict.
    Held out are 20 % of the training rows of each class, by seed: at least one row, but never the
    only one."""
    order = torch.randperm(len(y), generator=common.generator(args.seed, 0, "held out"))
    y_order = y.cpu()[order]
    of_class = [order[y_order == c] for c in range(classes)]
    held_out = [r[:max(1, len(r) // 5)] for r in of_class if len(r) > 1]
    if not held_out:
        raise common.BadInput("the fast probe needs a class with two training images to choose by")
    held_out = torch.cat(held_out)
    rest = torch.ones(len(y), dtype=torch.bool).index_fill(0, held_out, False).nonzero().flatten()
    grid = [(lr, decay) for lr in args.lrs for decay in args.weight_decays]
    W = fit_softmax_regression(x, y, rest, standardize, classes, grid, args)
    correct = torch.zeros(len(grid), device=y.device)
    for rows in held_out.split(2 ** 11):
        logits = (standardize(x, rows, y.device) @ W.flatten(1)).unflatten(1, W.shape[1:])
        correct += (logits.isfinite().all(2)  # of a point that diverged nothing is right
                    & (logits.argmax(2) == y[rows.to(y.device), None])).sum(0)  # of (b, G)
    top1 = (100 * correct.double() / len(held_out)).tolist()
    points = [dict(lr=lr, weight_decay=decay, validation_top1=value)
              for (lr, decay), value in zip(grid, top1, strict=True)]
    return dict(max(points, key=lambda p: p["validation_top1"]), held_out=len(held_out),
                grid=points)


def evaluate_features(args, data, h, classes, device):
    """kNN, fast probe and retrieval from the features h of (train, test). Returns: results."""
    y, y_test = (t.columns[args.label].to(device) for t in (data.train, data.test))
    bank, query = (F.normalize(x, dim=1) for x in h)
    retrieval = {}
    for name in dict.fromkeys([args.label, *args.retrieval_labels]):
        ids, query_ids = (t.column(name).to(device) for t in (data.train, data.test))
        retrieval[name] = common.retrieval(
            *common.labelled_rows(query, query_ids), *common.labelled_rows(bank, ids),
            [k for k in RANKS if k <= (ids >= 0).sum()])
    standardize = standardizer(h[0])
    choice = choose_hyperparameters(h[0], y, standardize, classes, args)
    point = choice["lr"], choice["weight_decay"]
    W = fit_softmax_regression(h[0], y, torch.arange(len(y)), standardize, classes, [point], args)
    logits = torch.cat([standardize(h[1], rows, device) @ W[:, 0]
                        for rows in torch.arange(len(y_test)).split(2 ** 13)])
    common.check_finite(f"fast probe with lr {choice['lr']:g}: the logits", logits)
    knn = common.knn_top1(query, y_test, bank, y, args)
    weight = W[:-1, 0].cpu() / standardize.std.cpu()[:, None]  # of features as they are
    return dict(knn=dict(top1=knn), probe=top_k_accuracy(logits, y_test), choice=choice,
                retrieval=retrieval, fc=dict(
                    weight=weight.T, bias=W[-1, 0].cpu() - standardize.mean.cpu() @ weight))


# ---------------------------------------------------------------------------------- SGD probe


def learning_rate(step, steps_per_epoch, lr, args):
    """Rate of a step (from 0) for a group that starts with lr, from --schedule."""
    epoch = step // steps_per_epoch + 1
    if args.schedule == "cosine-epoch":
        return common.cosine_by_epoch(epoch, args.epochs, lr, lr * 1e-3)
    if args.schedule == "steps":
        return common.steps_by_epoch(epoch, args.milestones, lr, args.gamma)
    return common.warmup_cosine(step, args.epochs * steps_per_epoch, lr)


def train_probe(args, data, backbone, classes, device):
    """Train the linear layer, or the whole network. Returns: results of last, best, all epochs."""
    torch.manual_seed(args.seed)
    fc, frozen = nn.Linear(backbone.width, classes), args.mode == "linear"
    if args.init_std:
        nn.init.normal_(fc.weight, std=args.init_std)
        nn.init.zeros_(fc.bias)
    groups = [dict(params=list(fc.parameters()), start=args.lr),
              dict(params=list(backbone.parameters()), start=args.lr_backbone)]
    model = nn.Sequential(backbone.requires_grad_(not frozen).train(not frozen), fc.to(device))
    network = common.distribute(model, args)
    optimizer = torch.optim.SGD(groups, args.lr, args.momentum, nesterov=args.nesterov,
                                weight_decay=args.weight_decay)
    scaler, steps = common.scaler(args, device), args.epochs * data.steps_per_epoch
    y, y_test = (t.columns[args.label].to(device) for t in (data.train, data.test))
    h_test = frozen and common.extract_features(backbone, data, data.test).to(device).float()
    epochs, losses = [], []
    batches = data.batches(0, steps, common.augmentation(args), views=1)
    for batch in (bar := common.progress(batches, total=steps, desc=args.recipe)):
        x = common.augment(batch)[0]                            # (b, 3, S, S), this process
        with common.autocast(args, device):
            logits = network(x)                                 # (b, C)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, y[batch.rows[batch.own]])  # DDP takes the mean
        for group in reversed(optimizer.param_groups):  # the layer's last: the log shows it
            group["lr"] = lr = learning_rate(batch.step, data.steps_per_epoch, group["start"], args)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        losses.append(common.check_loss(loss, batch.step)["loss"])
        scaler.step(optimizer)
        scaler.update()
        if data.end_of_epoch(batch.step):
            with torch.no_grad():
                logits = fc(h_test) if frozen else common.extract_features(model, data, data.test)
            epochs.append(dict(top_k_accuracy(logits, y_test), epoch=len(epochs) + 1, lr=lr,
                               loss=sum(losses) / len(losses)))
            bar.set_postfix({k: f"{v:.4g}" for k, v in epochs[-1].items()}, refresh=False)
            losses = []
    return dict(last=epochs[-1], best_on_test=max(epochs, key=lambda e: e["top1"]), epochs=epochs,
                fc=fc.state_dict())


def top_k_accuracy(logits, y):
    """Dict of top1 and, with more than five classes, top5, in percent."""
    return {f"top{k}": common.accuracy(logits, y, (k,))[0] for k in (1, 5)
            if k == 1 or logits.shape[1] > k}


# ---------------------------------------------------------------------------------- results


def result_lines(results, name=""):
    """Lines for the terminal: one for every dict of numbers, under the names that lead to it."""
    numbers = [f"{k} {v:.4g}" for k, v in results.items() if isinstance(v, (int, float))]
    lines = [f"  {name:26} {'   '.join(numbers)}"] if numbers else []
    for key, value in results.items():
        lines += result_lines(value, f"{name} {key}".strip()) if isinstance(value, dict) else []
    return lines


def retrieval_picture(path, args, data, h, names, queries=8, near=8):
    """PNG: test images and their nearest training images, framed green where the label agrees."""
    rows = torch.randperm(len(data.test), generator=common.generator(args.seed, 0, "picture"))
    rows, near = rows[:queries], min(near, len(data.train))
    bank, query = F.normalize(h[0], dim=1), F.normalize(h[1][rows.to(h[1].device)], dim=1)
    nearest = common.top_k(query, bank, near)[1].cpu()  # (queries, near)
    y, y_near = data.test.columns[args.label][rows], data.train.columns[args.label][nearest]
    test = data.pixels(data.test, rows, args.image_size)  # (queries, 3, S, S)
    train = data.pixels(data.train, nearest.flatten(), args.image_size).unflatten(0, nearest.shape)
    lines = [("", [(image, None, names[c]), *(
        (x, bool(label == c), names[label]) for x, label in zip(images, labels))])
             for image, c, images, labels in zip(test, y, train, y_near)]
    common.image_rows(path, "a test image, then its nearest training images, most similar first; "
                      f"green: the same {args.label}, red: another; {common.source(args)}", lines)


def write_features(args, data, backbone, names, h=None):
    """The npz of --features: `train_` and `test_` features (N, D), rows (of the source), labels
    (-1: none) and paths (of files, below --data-dir), and classes, the `names` of the labels. All
    processes compute PART rows at a time, unless h (train, test) has them."""
    def write_parts(table, x, write):
        for rows in torch.arange(len(table)).split(PART):
            part = x[rows.to(x.device)] if h else common.extract_features(
                backbone, data, table.select(rows))
            part = part.to("cpu", getattr(torch, args.features_type))
            common.check_finite(f"features as {args.features_type}", part)
            write(part.numpy().tobytes())

    def write_file(file):
        with zipfile.ZipFile(file, "w") as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
            for split, table, x in tables:
                with archive.open(f"{split}_features.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_1_0(member, dict(
                        descr=np.dtype(args.features_type).str, fortran_order=False,
                        shape=(len(table), backbone.width)))
                    write_parts(table, x, member.write)

    tables = list(zip(("train", "test"), (data.train, data.test), h or (None, None)))
    arrays = dict(classes=[str(c) for c in names])
    for split, table, x in tables:
        arrays |= {f"{split}_rows": table.index, f"{split}_labels": table.columns[args.label]}
        if table.paths:
            arrays[f"{split}_paths"] = [os.path.relpath(p, args.data_dir) for p in table.paths]
        if common.rank() > 0:
            write_parts(table, x, len)  # it only takes part in the computing
    if common.rank() == 0:
        common.atomic_write(Path(args.features), write_file)


def embedding_picture(args, h, labels, names, most=4000):
    """The PNG of --embedding: features h (N, D), L2-normalized, on their two first principal
    components, at most `most` points, drawn by seed. labels (N,), -1: none, gray."""
    if (plt := common.pyplot()) is None:
        raise common.RunFailed("--embedding needs matplotlib")
    x = F.normalize(h.double().cpu(), dim=1)
    x -= x.mean(0)
    variance, axes = torch.linalg.eigh(x.T @ x)
    axes = axes[:, -2:].flip(1)  # (D, 2), the first component first
    axes *= axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()  # else the sign is arbitrary
    share = 100 * variance.flip(0)[:2] / variance.sum()
    rows = torch.randperm(len(x), generator=common.generator(args.seed, 0, "embedding"))[:most]
    points, y = (x[rows] @ axes).numpy(), labels[rows].cpu()
    shown = [c for c in y.unique().tolist() if c >= 0]
    few, place = len(shown) <= 10, np.arange(len(shown))
    colours = plt.get_cmap("tab10")(place) if few else plt.get_cmap("turbo")(place / len(shown))
    figure, axis = plt.subplots(figsize=(8 if few else 9.5, 7), layout="constrained")
    axis.scatter(*points.T, s=14, alpha=0.65, lw=0, color=[
        colours[shown.index(c)] if c >= 0 else "0.8" for c in y.tolist()])
    for c, colour in zip(shown, colours):
        name = str(names[c]) if names else str(c)  # no formula, and no letter that is no Unicode
        name = name.replace("$", r"\$").encode(errors="replace").decode()
        if few:
            axis.annotate(name, np.median(points[y == c], 0), ha="center", va="center", size=11,
                          weight="bold", bbox=dict(boxstyle="round", fc="white", ec=colour))
        axis.scatter([], [], s=40, color=[colour], label=name)
    if 10 < len(shown) <= 60:
        figure.legend(loc="outside right center", fontsize=8, frameon=False,
                      ncols=1 + (len(shown) > 30))
    axis.spines[:].set_visible(False)
    network = "untrained network" if args.checkpoint == "none" else args.checkpoint
    axis.set(xticks=[], yticks=[], ylabel=f"second, {share[1]:.0f} %",
             xlabel=f"first principal component, {share[0]:.0f} % of the variance")
    axis.set_title(f"{common.source(args)}: test images by {args.label}\n{network}", fontsize=10)
    common.atomic_write(Path(args.embedding),
                        lambda file: figure.savefig(file, dpi=120, format="png"))
    plt.close(figure)


# ---------------------------------------------------------------------------------- evaluation


def evaluate(args, checkpoint):
    """Evaluate in this process; see the docstring of the file."""
    if args.fraction is not None and not 0 < args.fraction <= 1:
        raise common.BadInput(f"--fraction {args.fraction} is not in (0, 1]")
    if args.optimizer != "sgd":
        raise common.BadInput(f"--optimizer {args.optimizer}: evaluation uses sgd")
    common.check_ranges(args, least=["lr_backbone", "gamma", "init_std"])
    if min(args.lrs) <= 0 or min(args.weight_decays) < 0:
        raise common.BadInput(f"--lrs {common.shown(args.lrs)} must be above 0, --weight-decays "
                              f"{common.shown(args.weight_decays)} at least 0")
    common.reject_unused(args, UNUSED[args.mode], f"by --mode {args.mode}")
    if args.subset:
        common.reject_unused(args, ["fraction"], "with --subset")
    if args.schedule != "steps":
        common.reject_unused(args, ["milestones", "gamma"], f"by --schedule {args.schedule}")
    if not args.features:
        common.reject_unused(args, ["features_type"], "without --features")
    if args.embedding:
        common.require("matplotlib", "matplotlib", "--embedding")
    if args.mode == "features":
        common.reject_unused(args, ["picture"], "by --mode features; use --embedding")
        if not (args.features or args.embedding):
            raise common.BadInput("--mode features writes --features or --embedding: name a file")
    record, path, device, backbone, description = common.start_evaluation(args, checkpoint)
    files = {k: vars(args)[k] for k in ("save", "features", "embedding", "picture")
             if vars(args)[k]}
    if args.picture == "":
        files["picture"] = path.with_suffix(".png")
    for flag, file in files.items():
        old = json.loads(path.read_text())["args"] if path.is_file() else {}
        known = flag in old and old[flag] == vars(args)[flag]
        if Path(file).exists() and not known:  # the same command again may write it anew
            raise common.BadInput(f"--{flag} {file} exists; name a new file")
        common.check_writable(file, f"use another --{flag}")
    if len({os.path.abspath(file) for file in (path, *files.values())}) <= len(files):
        raise common.BadInput(f"{', '.join(map(str, files.values()))} and {path}, the results: "
                              "every file needs a name of its own")
    data, names, notes = load_labelled(args, device)
    notes += common.data_notes(checkpoint, args, data)
    for column in dict.fromkeys([*args.retrieval_labels, args.label]):
        bank, queries = ((t.column(column) >= 0).sum() for t in (data.train, data.test))
        if column in args.retrieval_labels and not (bank and queries):
            raise common.BadInput(f"--retrieval-labels {column}: no image of "
                                  f"{(data.test if bank else data.train).source} has a value")
        if args.mode == "fast" and bank < RANKS[-1]:
            notes.append(f"column {column}: {', '.join(f'R@{k}' for k in RANKS if k > bank)} left "
                         f"out, as only {bank} training images have a value")
    if args.mode == "fast" and args.knn_k > len(data.train):  # a default takes what there is
        if "knn_k" not in args.set_by:
            raise common.BadInput(f"--knn-k {args.knn_k}: there are {len(data.train)} training "
                                  "images")
        notes.append(f"kNN: K = {len(data.train)}, all training images, not {args.knn_k}")
    if args.mode in ("linear", "finetune") and args.schedule == "steps" and not any(
            m < args.epochs for m in args.milestones):
        notes.append(f"warning: the rate never drops: --milestones {common.shown(args.milestones)} "
                     f"are not below --epochs {args.epochs}")
    common.print_rank0("\n".join([description, *notes]))

    results, h = {}, None
    if args.mode in ("linear", "finetune"):
        results = train_probe(args, data, backbone, len(names), device)
    if args.mode == "fast" or args.picture is not None:
        h = [common.extract_features(backbone, data, t) for t in (data.train, data.test)]
    if args.mode == "fast":
        results = evaluate_features(args, data, h, len(names), device)
    weights = backbone.state_dict() | {f"fc.{k}": x for k, x in results.pop("fc", {}).items()}
    protocol = "none, features only"
    if results:
        protocol = (args.protocol or f"recipe {args.recipe}") + (
            f", --mode {args.mode}" * ("mode" not in args.set_by))
    common.print_rank0(
        f"protocol: {protocol}; {common.source(args)} at {args.image_size} pixels, column "
        f"{args.label}: {len(names)} classes, {len(data.train)} training and {len(data.test)} test "
        "images")
    if common.rank() == 0:  # before the files, so that no failure there loses the results
        print("\n".join(result_lines(results)), end="\n" * bool(results))
        common.write_results(
            path, record, device, protocol=protocol, recipe=args.recipe, results=results,
            data=dict(train=len(data.train), test=len(data.test), classes=len(names), notes=notes))
    if args.features:
        write_features(args, data, backbone, names, h)
    if args.embedding:
        h_test = h[1] if h else common.extract_features(backbone, data, data.test)
    if common.rank() > 0:
        return
    if args.embedding:
        embedding_picture(args, h_test, data.test.columns[args.label], names)
    if args.save:
        common.atomic_write(Path(args.save), lambda file: torch.save(
            {k: x.cpu().contiguous() for k, x in weights.items()}, file))
    if args.picture is not None:
        retrieval_picture(files["picture"], args, data, h, names)
    print("\n".join(f"  {name:26} {file}" for name, file in [("results", path), *files.items()]))


def main(argv=None):
    """Parse the flags and evaluate; `main([...])` runs in this process."""
    parser = common.EvaluationParser("linear_eval", __doc__, RECIPES)
    add = parser.add_argument_group("evaluation").add_argument
    add("--picture", nargs="?", const="", help="save a grid of nearest images (beside --out)")
    add("--retrieval-labels", nargs="+", default=[], help="further columns for R@k and mAP@R")
    add("--min-per-class", type=int, default=1, help="leave out classes with fewer training images")
    add("--fraction", type=float, help="share of the training images (recipe semi-1, semi-10)")
    add("--subset", help="file of the training images to use, a name or row a line")
    add("--mode", default="fast", choices=["fast", "linear", "finetune", "features"])
    add("--save", metavar="FILE", help="save backbone and linear layer, for torchvision")
    add("--features", metavar="FILE.npz", help="save the features of all images that are used")
    add("--features-type", default="float32", choices=["float16", "float32"])
    add("--embedding", metavar="FILE.png", help="picture of the test features (PCA) by --label")
    add("--lrs", type=float, nargs="+", default=[1.0], help="fast: learning rates of the grid")
    add("--weight-decays", type=float, nargs="+", default=[0.0], help="fast: those of the grid")
    add("--lr-backbone", type=float, default=0.01, help="finetune; --lr is that of the new layer")
    add("--lr-256", type=float, help="rate per 256 images of the batch, where --lr is not given")
    add("--schedule", default="cosine", choices=["cosine", "cosine-epoch", "steps"],
        help="steps: see --milestones")
    add("--milestones", type=int, nargs="+", default=[], help="epochs after which the rate drops")
    add("--gamma", type=float, default=0.1, help="factor of a drop")
    add("--init-std", type=float, default=0.0, help="of the new layer's weights (0: torch's init)")
    parser.set_defaults(protocol=None)
    common.run(lambda args: evaluate(args, parser.checkpoint), parser, argv)


if __name__ == "__main__":
    main()

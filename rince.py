"""RINCE (Hoffmann, Behrmann, Gall, Brox, Noroozi: Ranking Info Noise Contrastive Estimation:
Boosting Contrastive Learning via Ranked Positives, AAAI 2022, arXiv 2201.11736).

Similarity is not binary (Fig. 1 [T]), so positives have ranks: rank 1 is the anchor's class, rank 2
are related classes, and so on; all others are negatives. Term i pulls rank i towards the anchor and
pushes higher ranks and negatives away, but not lower ranks. The equations are those of
the authors' code. The paper's equation numbers could not be found, so the labels E1 to E8 are this
project's. P_i, tau_i, p are the paper's symbols [3]; its query q is a here, its h(q, p) is a . p.
How sure a reference is: [T] the paper's own text, [3] as a third party restates it.

    a_n anchor, p_n its second view, k_m candidates (old keys), R[n,m] rank of k_m for a_n, 0 = none
    P_i(n) = { k_m : R[n,m] = i }, for i = 1 also p_n;  Neg_i(n) = { k_m : R[n,m] = 0 or > i }    E1
    tau_i = tau_min + (1 - s_i) (tau_max - tau_min),  s_i = 1 - 0.25 (i - 1)                      E2
    with e_k = exp(a_n . k / tau_i), N = sum of e_k over Neg_i(n), S = sum of e_k over P_i(n):
    pi_in(n) = S / (S + N), one per anchor     (as the paper has it [3])                          E3
    pi_out(n, k) = e_k / (e_k + N), one for every k in P_i(n)                                     E4
    L_i = mean of -log pi over the batch's anchors (in) or pairs (out) with pi > 1e-7             E5
    L = 1/r sum_i L_i, where L_i = 0 if there is no such entry       (the paper: the sum [3])     E6
    theta_k <- m theta_k + (1 - m) theta_q before the keys; they join the queue after the loss    E7
    class similarities C, thresholds t_2 > t_3 > ..: rank i where t_i <= C < t_{i-1}              E8
    rince-out: E4 in all terms; rince-in: E3; rince-out-in: E4 in term 1, E3 in the others;
    rince-uni: one random positive per rank; scl: only term 1 (tau_min), of classes or superclasses

Labels used:  label columns from fine to coarse (--ranks), or one column and class similarities.
State kept:   query and key network, queue of K keys with labels, ranks, one class id per image.
Shapes:       B global batch, b rows of this process, D embedding width, M candidates, r ranks,
              C classes, N images.

    torchrun --standalone --nproc_per_node=2 rince.py                # demo on 2 CPU cores, 2 min
    python rince.py --recipe c100-small --download                   # CIFAR-100, 3 CPU minutes
    python rince.py --recipe cifar100 --download                     # one GPU
    python rince.py --recipe cifar100 --micro-batch 64               # one small GPU
    torchrun --nproc_per_node=4 rince.py --recipe cifar100           # four, the same global batch
    torchrun --nproc_per_node=4 rince.py --recipe imagenet100 --data-dir DIR --similarity FILE
    python rince.py --recipe c100-small --loss ce                          # baseline, same views
    python rince.py --recipe c100-small --loss ce --jitter-p 0 --gray 0    # crop and flip only
Measured: demo 84 CPU seconds in two processes, 1 GB each, kNN 13.5 -> 94 % (synthetic), AUROC of
unseen shapes 53.8 -> 96.9 % by `ood_eval.py`; c100-small 140 CPU seconds, 1.2 GB. The results are
in results/README.md. The GPU recipes have not been run yet.
"""
import copy
import csv
import json
import math
import shlex
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common

# ---------------------------------------------------------------------------------- recipes

# [R] the authors' repository (README commands and defaults), [K] chosen for this project, not tuned
# and not from the paper, whose settings and accuracies could not be confirmed
PAPER = dict(  # [R]
    tau_min=0.1, tau_max=0.6, key_momentum=0.99, momentum=0.9, weight_decay=1e-4,
    schedule="cosine-epoch", warmup=10, crop=[0.2, 1.0], jitter=[0.4, 0.4, 0.4, 0.1], gray=0.2)
CIFAR = dict(  # [R]
    PAPER, dataset="cifar100", arch="resnet50", stem="cifar", ranks=["label", "coarse"],
    queue=4096, epochs=1000, batch_size=512, lr=0.5,
    knn_every=50, amp="auto", save_every=5)         # [K]
SMALL = dict(  # optimiser and schedule of all methods' small runs; RINCE's own numbers are [R]
    tau_min=0.1, tau_max=0.6, key_momentum=0.99, lr=0.5, momentum=0.9, nesterov=True,
    weight_decay=1e-4, schedule="cosine", warmup=1, batch_size=256, channels_last=True,
    queue=2048)                                     # [K] 8 batches, as 4096 is of 512
RECIPES = {
    "demo": dict(  # ranks: shape x pattern, then shape
        SMALL, ranks=["label", "coarse"], epochs=20, crop=[0.5, 1.0],
        queue=0, key_momentum=0.9),                 # [K] 320 steps are too few for an old queue
    "c100-small": dict(  # the protocol that all methods share on a CPU
        SMALL, dataset="cifar100", limit_train=10000, epochs=15, ranks=["label", "coarse"],
        crop=[0.08, 1.0], knn_every=15),
    "c10": dict(  # all methods' longer run; 7,800 steps are a twelfth of [R]'s: so is the memory
        SMALL, dataset="cifar10", epochs=40, ranks=["label", "coarse"], crop=[0.08, 1.0],
        queue=512, key_momentum=0.88, knn_every=8),
    "own": dict(  # [K] your images and their classes; with a coarser column: --loss rince-out-in
        SMALL, loss="scl-out", ranks=["label"], queue=0, key_momentum=0.9),
    "cifar100": CIFAR,
    "cifar100-ce": dict(  # [R] crop and flip; with the contrastive views: --jitter-p 0.8 --gray 0.2
        CIFAR, loss="ce", epochs=500, lr=0.8, jitter_p=0.0, gray=0.0),
    "tinyimagenet": dict(  # [K] for the authors only a test set; network, epochs as imagenet100
        PAPER, dataset="folder", arch="resnet18", stem="cifar", image_size=64, ranks=["label"],
        threshold=[0.4], queue=8192, epochs=500, batch_size=512, lr=0.5, knn_every=50, amp="auto",
        save_every=10),
    "imagenet100": dict(  # [R] own class, classes whose names have RoBERTa similarity >= 0.4
        PAPER, dataset="folder", arch="resnet18", image_size=224, ranks=["label"],
        threshold=[0.4], queue=8192, epochs=500, batch_size=768,
        lr=0.3,                                     # 0.325 for --loss scl-out, 0.3 for ce
        knn_every=50, amp="auto", save_every=10),   # [K]
}
FORMS = {"rince-out": "out", "rince-in": "in", "rince-out-in": "out-in", "rince-uni": "out",
         "scl-out": "out", "scl-in": "in", "scl-superclass": "out", "ce": None}

# ---------------------------------------------------------------------------------- loss


LOG_ZERO = -1e30  # log of a sum without terms; with -inf its gradient would be 0/0


def rince(a, p, keys, R, taus, form="out-in", cumulative=False, min_prob=1e-7):
    """RINCE (E1, E3 to E6) of a batch.

    Args:
        a: (B, D) unit-norm anchors, with gradient; float16 and bfloat16 become float32.
        p: (B, D) unit-norm second views of the same images.
        keys: (M, D) unit-norm candidates: the queue before this batch, or p itself.
        R: (B, 1 + M) int64 from `rank_of`: rank, 0 negative, -1 in no term; column 0 is p, rank 1.
        taus: r temperatures > 0, one for each rank, from rank 1.
        form: "out", "in" or "out-in".
        cumulative: P_i includes the keys of lower ranks, but not p, as the authors train CIFAR.
        min_prob: drop entries with pi <= min_prob (E5); 0 keeps all.
    Returns: scalar.
    """
    a, p, keys = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, p, keys))
    cut = math.log(min_prob) if min_prob else -math.inf
    S = torch.cat([(a * p).sum(1, keepdim=True), a @ keys.T], 1)  # (B, 1 + M)
    L = []
    for i, tau in enumerate(taus, 1):
        P, Neg = R == i, (R == 0) | (R > i)  # E1
        if cumulative and i > 1:
            P = (R > 0) & (R <= i)
            P[:, 0] = False
        s = S / tau
        log_N = s.masked_fill(~Neg, LOG_ZERO).logsumexp(1, keepdim=True)  # (B, 1)
        if {"out": False, "in": True, "out-in": i > 1}[form]:
            s = s.masked_fill(~P, LOG_ZERO).logsumexp(1, keepdim=True)  # (B, 1)
            P = P.any(1, keepdim=True)
        # differs from the released code: it computes e^s without log-sum-exp and can overflow
        log_pi = F.logsigmoid(s - log_N)  # E3 (B, 1) or E4 (B, 1 + M)
        kept = P & ~(log_pi <= cut)  # not `>`, which would drop a NaN and hide it
        L.append(-log_pi.where(kept, 0.0).sum() / kept.sum().clamp(min=1))  # E5
    # differs from the released code: r is fixed; there it depends on the classes in the batch
    return torch.stack(L).mean()  # E6: 1/r and a sum; the paper has no 1/r [3]


def temperatures(r, tau_min, tau_max):
    """tau_1 .. tau_r (E2). Similarity 0 has tau_max, so rank r has less unless r >= 5."""
    # the minimum (s_i >= 0) is ours: the authors have at most five ranks
    return [tau_min + min(1.0, 0.25 * i) * (tau_max - tau_min) for i in range(r)]


# ---------------------------------------------------------------------------------- grouping


def rank_of(y, table, y_keys=None):
    """R (B, 1 + M) int64: ranks of the candidates for each anchor; column 0 is the second view.

    Args: y (B,) int64 classes of the batch; table (C, C), see `chain_ranks`; y_keys (M,) classes of
    the queue, -1 for initial keys, which are negatives. None: the candidates are the batch's keys,
    and an image's own key is in no term.
    """
    if y_keys is None:
        R = table[y][:, y].fill_diagonal_(-1)  # (B, B)
    else:
        R = table[y][:, y_keys].masked_fill(y_keys < 0, 0)  # (B, M)
    return F.pad(R, (1, 0), value=1)


def one_per_rank(R, u):
    """RINCE-uni: R (B, 1 + M) with one positive per rank; the other positives are in no term (-1).

    Args: u (B, r), uniform in [0, 1), chooses it. That the others are not negatives is our choice.
    """
    one = R.clone()
    for i in range(1, u.shape[1] + 1):
        P = R == i
        chosen = (u[:, i - 1:i] * P.sum(1, keepdim=True)).floor() + 1  # (B, 1) from 1
        one[P & (P.cumsum(1) != chosen)] = -1
    return one


def chain_ranks(columns):
    """Ranks of the classes from label columns, from fine to coarse.

    Args: columns (N, r) int64; the first holds the classes 0 .. C-1.
    Returns: (C, C) int64, [c, d] = number (from 1) of the first column that c and d share, or 0.
    Raises: ValueError if images of one value differ in the next column (columns are not nested).
    """
    of_class = torch.unique(columns, dim=0)
    for i in range(columns.shape[1] - 1):
        value, times = torch.unique(of_class[:, i:i + 2], dim=0)[:, 0].unique(return_counts=True)
        if (times > 1).any():
            raise ValueError(f"value {int(value[times > 1][0])} of column {i + 1} has several "
                             f"values of column {i + 2}, and must have one")
    same = (of_class[:, None] == of_class).sum(2)  # (C, C) nested: the last `same` columns
    return (columns.shape[1] + 1 - same) * (same > 0)


def similarity_ranks(similarity, thresholds):
    """Ranks (C, C) int64 from class similarities (C, C) and decreasing thresholds (E8)."""
    t = torch.as_tensor(thresholds, dtype=similarity.dtype)
    below = (similarity[..., None] < t).sum(2)  # (C, C) number of thresholds above
    return (2 + below).masked_fill(below == len(t), 0).fill_diagonal_(1)


def read_similarity(path, names, thresholds):
    """Ranks (C, C) of the classes `names` from a file: a CSV with columns class_a, class_b and
    similarity or rank, or an npz with arrays classes and similarity or rank (C, C).

    A CSV row (a, b) also holds for (b, a) unless the file has a row (b, a). Pairs without a row are
    negatives. Raises: BadInput that names the file and the class, or says what is wrong.
    """
    try:
        if str(path).endswith(".npz"):
            with np.load(path, allow_pickle=False) as file:
                kind = "rank" if "rank" in file else "similarity"
                known, matrix = [str(c) for c in file["classes"]], torch.tensor(file[kind])
        else:
            with open(path, newline="") as file:
                rows = list(csv.DictReader(file))
            kind = "rank" if "rank" in (rows or [{}])[0] else "similarity"
            values = {(row["class_a"], row["class_b"], float(row[kind])) for row in rows}
            pair = {(a, b): value for a, b, value in values}
            if len(pair) < len(values):
                raise ValueError("two values for the same two classes")
            known = sorted({c for ab in pair for c in ab})
            none = 0.0 if kind == "rank" else -math.inf
            matrix = torch.tensor([[pair.get((a, b), pair.get((b, a), none)) for b in known]
                                   for a in known])
    except Exception as error:  # numpy, csv and zipfile raise many kinds
        raise common.BadInput(f"--similarity {path}: neither a CSV of class_a, class_b, similarity "
                              f"(or rank) nor such an npz: {error!r}") from None
    for what, classes in (("lacks", {*names} - {*known}),
                          ("has, but the data lack,", {*known} - {*names})):
        if classes:
            raise common.BadInput(f"--similarity {path} {what} {len(classes)} classes: "
                                  f"{', '.join(sorted(classes)[:5])}")
    place = torch.tensor([known.index(c) for c in names])
    if matrix.shape != (len({*known}),) * 2 or matrix.isnan().any():
        raise common.BadInput(f"--similarity {path}: {kind} is not a square matrix of numbers, "
                              "one row for each class")
    matrix = matrix[place][:, place]
    if kind == "similarity":
        return similarity_ranks(matrix, thresholds)
    other = matrix[~torch.eye(len(names), dtype=torch.bool)]
    if ((other != other.round()) | (other < 0) | (other == 1)).any():
        raise common.BadInput(f"--similarity {path}: ranks of other classes must be 2, 3, .. or "
                              "0 (negative); rank 1 is the class itself")
    return matrix.long().fill_diagonal_(1)


def class_ranks(data, args):
    """Classes and their ranks from --loss, --ranks and --similarity.

    Returns: ids (N,) int64, classes 0 .. C-1 of the training rows; C names; ranks (C, C) int64.
    """
    # losses with one rank use only the first column
    chain = args.ranks[:1] if args.loss in ("scl-out", "scl-in", "ce") else args.ranks
    columns = torch.stack([data.train.column(c) for c in chain], 1)  # (N, r)
    if (columns < 0).any():
        row, column = (columns < 0).nonzero()[0].tolist()
        raise common.BadInput(f"--ranks {chain[column]}: row {int(data.train.index[row])} of the "
                              "training set has no label (-1)")
    values, ids = columns[:, 0].unique(return_inverse=True)
    try:
        table = chain_ranks(torch.cat([ids[:, None], columns[:, 1:]], 1))
    except ValueError as error:
        raise common.BadInput(f"--ranks {' '.join(chain)}: not nested: {error}") from None
    if args.loss == "scl-superclass":
        chain = chain[-1:]
        values, ids = columns[:, -1].unique(return_inverse=True)
        table = torch.eye(len(values), dtype=torch.int64)
    if len(values) < 2:
        raise common.BadInput(f"--ranks {chain[0]}: one class has no negatives")
    names = data.train.classes.get(chain[0])
    if args.similarity:
        if not names:
            raise common.BadInput(f"--similarity: column {chain[0]} has no class names")
        table = read_similarity(args.similarity, names, args.threshold)[values][:, values]
    wanted = len(args.threshold) + 1 if args.similarity else len(chain)
    for i in range(2, max(wanted, int(table.max())) + 1):
        if not (table == i).any():
            raise common.BadInput(
                f"--similarity {args.similarity}: no pair of classes has rank {i}; use a lower "
                "--threshold" if args.similarity else
                f"--ranks {' '.join(chain)}: no pair of classes has rank {i}; remove "
                f"{chain[i - 1]}")
    if args.loss.startswith("rince") and (table > 0).all():  # the loss of the last rank would be 0
        raise common.BadInput("every class is related to every other, so there are no negatives; " +
                              ("raise the lowest --threshold" if args.similarity else
                               f"remove {chain[-1]}"))
    return ids, [str(names[v] if names else v) for v in values.tolist()], table


def report_ranks(names, table, taus, args):
    """Write the ranks of every class to ranks.json and print the first three classes."""
    related = {name: {i: [names[c] for c in (row == i).nonzero().flatten().tolist()]
                      for i in range(2, len(taus) + 1)} for name, row in zip(names, table)}
    if common.rank() == 0:
        text = json.dumps(dict(loss=args.loss, ranks=args.ranks, similarity=args.similarity,
                               temperatures=taus, related=related), indent=1)
        common.atomic_write(Path(args.out) / "ranks.json", lambda file: file.write(text.encode()))
    many = [f"rank {i}: {(table == i).sum().item() / len(table):.2f} classes at tau {tau:.4g}"
            for i, tau in enumerate(taus, 1)]
    common.print_rank0(f"ranks of {len(names)} classes, on average {', '.join(many)}; all in "
                       f"{args.out}/ranks.json")
    for name in names[:3] if len(taus) > 1 else []:
        common.print_rank0(f"ranks of {name}: " + "; ".join(
            f"{i} = {', '.join(classes[:6]) or 'none'}{', ..' * (len(classes) > 6)}"
            for i, classes in related[name].items()))


# ---------------------------------------------------------------------------------- model


class RINCE(nn.Module):
    """Encoder and head. Maps a view (b, 3, S, S) to unit vectors (b, D) or class logits."""

    def __init__(self, args, classes):
        super().__init__()
        self.backbone = common.resnet(args.arch, args.stem)
        width = self.backbone.width
        self.normalize = args.loss != "ce"
        self.head = (common.head("mlp", width, args.dim) if self.normalize else
                     nn.Linear(width, classes))

    def forward(self, x):
        z = self.head(self.backbone(x)).float()
        return F.normalize(z, dim=1) if self.normalize else z


class Ranks(nn.Module):
    """Class of every training row and ranks of the classes. A module, so that it is saved."""

    def __init__(self, ids, table):
        super().__init__()
        self.register_buffer("ids", ids)  # (N,)
        self.register_buffer("table", table)  # (C, C)

    def load_state_dict(self, state, *options):
        """Raises: ValueError if the run began with other ranks, those of another --similarity."""
        old = state["table"]
        if old.shape == self.table.shape and not torch.equal(old, self.table.cpu()):
            raise ValueError("the ranks of the classes are not those that the run began with")
        return super().load_state_dict(state, *options)


# ---------------------------------------------------------------------------------- training


def train(args):
    """Train in this process; see the top of the file."""
    check(args)
    device = common.setup(args)
    data = common.load(args, device)
    ids, names, table = class_ranks(data, args)
    taus = temperatures(int(table.max()), args.tau_min, args.tau_max)
    model = RINCE(args, len(names)).to(device, memory_format=common.memory_format(args))
    key = copy.deepcopy(model).requires_grad_(False)  # f_k
    Q = torch.randn(args.queue, args.dim, generator=common.generator(args.seed, 0, "queue"))
    queue = common.Queue(F.normalize(Q, dim=1)).to(device)
    ranks = Ranks(ids, table).to(device)
    network, key_network = common.distribute(model, args), common.micro_batches(key, args)
    optimizer, scaler = common.optimizer(args, model), common.scaler(args, device)
    log = common.Log(args, data)
    state = dict(model=model, ranks=ranks, optimizer=optimizer, scaler=scaler, log=log)
    if args.loss != "ce":
        state.update(key=key, queue=queue)
    first_step, steps = common.resume(state, args), args.epochs * data.steps_per_epoch
    aug = common.augmentation(args)

    def evaluate():
        return dict(knn_top1=common.knn_accuracy(model.backbone, data))

    if log.lines == 1:  # a new run
        if args.loss != "ce":
            report_ranks(names, table, taus, args)
        common.start_run(state, args, data, aug, evaluate)

    def draw(step, own):  # which positives RINCE-uni takes
        random = common.generator(args.seed, step, "positives")
        return dict(u=torch.rand(args.batch_size, len(taus), dtype=torch.float64, generator=random))

    for batch in data.batches(first_step, steps, aug, 1 if args.loss == "ce" else 2, draw=draw):
        step = batch.step
        x = common.augment(batch)                               # (V, b, 3, S, S), this process
        with common.autocast(args, device):
            a = network(x[0])                                   # (b, D)
            if args.loss != "ce":
                # as in the authors' ImageNet code; their CIFAR code moves it after the keys
                common.momentum_update(key, model, args.key_momentum)                   # E7
                p = common.shuffled_keys(key_network, x[1], args, step)  # (B, D), no gradient
        y = ranks.ids[batch.rows]                               # (B,)
        if args.loss == "ce":  # independent rows: each process takes its own, DDP averages
            loss = F.cross_entropy(a, y[batch.own])
        else:
            keys, y_keys = (queue.keys, queue.labels) if args.queue else (p, None)
            R = rank_of(y, ranks.table, y_keys)                 # (B, 1 + M)
            if args.loss == "rince-uni":
                R = one_per_rank(R, batch.drawn["u"])
            loss = rince(common.gather(a), p, keys, R, taus, FORMS[args.loss],
                         args.rank2_positives == "cumulative", args.min_prob)           # E6

        lr = common.set_lr(optimizer, learning_rate(step, data.steps_per_epoch, args))
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        values = common.check_loss(loss, step)
        scaler.step(optimizer)
        scaler.update()
        if args.loss != "ce" and args.queue:
            queue.enqueue(p, y)                                 # E7
        log(step, **values, lr=lr)

        if common.end_step(step, state, args, data, evaluate):
            break
    unseen = "" if args.dataset == "shapes" else " --outliers NAME=FILE"
    lines = [f"  ranks        {args.out}/ranks.json"] if args.loss != "ce" else []
    checkpoint = shlex.quote(f"{args.out}/checkpoint.pt")
    lines += [f"  OOD test     python ood_eval.py --checkpoint {checkpoint}{unseen}"]
    common.summary(log, args, f"RINCE, --loss {args.loss}, {args.dataset}", first_step, lines)


def learning_rate(step, steps_per_epoch, args):
    """Learning rate of a step by --schedule: a pure function of the step."""
    if args.schedule == "cosine-epoch":
        return common.warmup_by_epoch(step, steps_per_epoch, args.epochs, args.lr, args.warmup)
    return common.warmup_cosine(step, args.epochs * steps_per_epoch, args.lr,
                                args.warmup * steps_per_epoch)


# ---------------------------------------------------------------------------------- flags


def own_loss(args):
    """Recipe own has one rank, unless --similarity or several --ranks are given."""
    if args.recipe == "own" and "loss" in args.set_by and (args.similarity or len(args.ranks) > 1):
        args.loss = "rince-out-in"


def check(args):
    """Raise BadInput for flags that do not fit together, before any data are read."""
    if not 0 < args.tau_min <= args.tau_max:
        raise common.BadInput(f"--tau-min {args.tau_min} --tau-max {args.tau_max}: 0 < tau-min <= "
                              "tau-max must hold")
    common.check_ranges(args, above=["dim"], least=["warmup"], share=["key_momentum"])
    if not 0 <= args.min_prob < 1:
        raise common.BadInput(f"--min-prob {args.min_prob} is not in [0, 1)")
    if args.queue < 0 or 0 < args.queue < args.batch_size and args.loss != "ce":
        raise common.BadInput(f"--queue {args.queue} holds less than the global batch of "
                              f"{args.batch_size} (0: no queue)")
    falling = all(a > b for a, b in zip(args.threshold, args.threshold[1:]))
    if not falling or not all(t <= 1 for t in args.threshold):
        raise common.BadInput(f"--threshold {args.threshold}: must decrease, from at most 1")
    if args.loss == "ce":
        common.reject_unused(args, ["tau_min", "tau_max", "min_prob"], "by --loss ce")
    if args.loss.startswith("scl"):  # term 1 only, whose temperature is tau_min
        common.reject_unused(args, ["tau_max"], f"by --loss {args.loss}")
    common.check_schedule(args, learning_rate, 10, 10 * args.warmup)
    if not args.similarity:
        common.reject_unused(args, ["threshold"], "without --similarity")
    if args.batch_size < 2 and args.queue == 0 and args.loss != "ce":
        raise common.BadInput("--batch-size 1 --queue 0: there are no negatives")
    ranked = args.loss.startswith("rince")
    if args.similarity and (len(args.ranks) > 1 or not ranked):
        raise common.BadInput("--similarity goes with --loss rince-* and one column of --ranks")
    if ranked and not args.similarity and len(args.ranks) < 2:
        raise common.BadInput(f"--ranks {args.ranks[0]} is one rank only: add a coarser column, or "
                              "--similarity FILE, or use --loss scl-out")
    if args.loss == "scl-superclass" and len(args.ranks) < 2:
        raise common.BadInput("--loss scl-superclass needs a coarser column at the end of --ranks")
    if args.rank2_positives == "cumulative" and (not ranked or args.loss == "rince-uni"):
        raise common.BadInput(f"--rank2-positives cumulative does not go with --loss {args.loss}")


def main(argv=None):
    """Parse the flags and train; `main([...])` runs in this process."""
    parser = common.Parser("rince", __doc__, RECIPES)
    parser.complete = own_loss
    add = parser.add_argument_group("RINCE").add_argument
    add("--loss", default="rince-out-in", choices=list(FORMS),
        help="uni: one positive a rank; scl: one rank; ce: baseline")
    add("--ranks", nargs="+", default=["label", "coarse"],
        help="label columns from fine to coarse: rank 1, 2 and so on")
    add("--similarity", help="CSV or npz of class similarities or ranks (E8)")
    add("--threshold", type=float, nargs="+", default=[0.4], help="t_2 > t_3 > .. of --similarity")
    add("--rank2-positives", default="siblings", choices=["siblings", "cumulative"],
        help="cumulative: own class too")
    add("--tau-min", type=float, default=0.1, help="temperature of rank 1 (E2)")
    add("--tau-max", type=float, default=0.6, help="temperature of similarity 0 (E2)")
    add("--queue", type=int, default=4096, help="K, keys of the queue; 0: those of the batch")
    add("--key-momentum", "--m", type=float, default=0.99, help="m of E7, of the key encoder")
    add("--dim", type=int, default=128, help="D, width of the embedding")
    add("--min-prob", type=float, default=1e-7, help="drop entries with pi <= this (E5); 0: none")
    add("--schedule", default="cosine-epoch", choices=["cosine-epoch", "cosine"],
        help="by epoch to 0.001 lr; by step to 0")
    add("--warmup", type=int, default=10, help="epochs of linear warm-up")
    common.run(train, parser, argv)


if __name__ == "__main__":
    main()

"""WCL (Zheng, Wang, You, Qian, Zhang, Wang, Xu: Weakly Supervised Contrastive Learning, ICCV 2021,
arXiv 2110.04770).

Instance discrimination pushes apart images of one class. WCL keeps that task on one head, and on a
second head links every image of the batch to its nearest neighbour; the connected components of
that graph are weak labels, with which each view supervises the OTHER view. The core follows the
authors' code. The labels E1 to E9 are those of this project: of the paper only the abstract and the
framework figure could be read. Multi-crop (E9) is a reconstruction, not the paper's own form.

    h^m = F(x^m), z^m = g(h^m) / |g(h^m)|, v^m = phi(h^m) / |phi(h^m)|, views m = 1, 2
    Z^m, V^m: the z^m, v^m of the whole global batch, i, j, k its rows
    L_NCE = 1/2B sum_a -log[ exp(q_a . q_p(a) / tau) / sum_{k != a} exp(q_a . q_k / tau) ]   E1
    q = [Z^1; Z^2], p(a): the other view of the image
    n(i) = argmax_{j != i} v_i . v_j,  A_ij = 1 if j = n(i) or i = n(j), else 0              E2
    y_i = the connected component of A that holds i, from V^1: y^1, from V^2: y^2            E3
    L_sup(V, y) = mean_i -1/|P(i)| sum_{j in P(i)} log[ exp(v_i . V_j / tau) / sum_{k != i}
                  exp(v_i . V_k / tau) ],  P(i) = { j != i: y_j = y_i }, no gradient to V    E4
    L_swap = ( L_sup(V^1, y^2) + L_sup(V^2, y^1) ) / 2                                       E5
    L = alpha L_NCE + beta L_swap                                                            E6
    LARS: common.LARS (E7);  rate: linear in the warm-up, then cosine, base 0.075 sqrt(B)    E8
    crops zc, vc of few pixels, P^m'(i) = {i} + the K neighbours of i in the other view m':  E9
    L_cNCE = mean_{m,c,i} -log softmax_j(zc_ci . Z^m_j / tau)[j = i]
    L_cK   = mean_{m,c,i} -1/|P^m'(i)| sum_{j in P^m'(i)} log softmax_j(vc_ci . V^m_j / tau)[j]
    L = alpha L_NCE + beta L_swap + gamma L_cNCE + delta L_cK

Sees:   images only. True labels, where there are any, serve the log: purity of the weak labels.
State:  the network; nothing per sample. --beta 0 is the SimCLR baseline: no second head, no graph.
Shapes: B global batch, b rows of this rank, V views, D embedding width, C crops, K neighbours.

    torchrun --standalone --nproc_per_node=2 wcl.py                    # demo on 2 CPU cores, 2 min
    python wcl.py --recipe c100-small --download                       # CIFAR-100, 3 CPU minutes
    python wcl.py --recipe cifar10 --download                          # one GPU
    torchrun --nproc_per_node=4 wcl.py --recipe cifar10                # four, the same global batch
    torchrun --nproc_per_node=8 wcl.py --recipe imagenet100 --data-dir DIR
    torchrun --nnodes=4 --nproc_per_node=8 ... wcl.py --recipe imagenet --data-dir DIR  # 32 x 128
Measured: demo 109 seconds on 2 busy cores, kNN 13.5 -> 47.6 % (synthetic); c100-small 166 CPU
seconds, 1.2 GB, results in the README. The GPU recipes were not run yet at full length.
"""
import copy

import torch
import torch.nn.functional as F
from torch import nn

import common

# ---------------------------------------------------------------------------------- recipes

# [R] the authors' repository, [P] the paper's run as the authors' README tells it, [S] a convention
# of the field (the authors have no such recipe), [K] chosen for this project, not tuned
LARS = dict(  # [R] wcl.py, LARS.py; E7, E8: base rate 0.075 sqrt(B), 4.8 at 4096
    optimizer="lars", lr=0.075, lr_rule="sqrt", momentum=0.9, weight_decay=1e-6, warmup=10,
    tau=0.1, alpha=1.0, beta=1.0, sync_bn=True)
IMAGENET = dict(
    LARS, dataset="folder", arch="resnet50", image_size=224, epochs=100, batch_size=4096,
    crop=[0.08, 1.0], jitter=[0.8, 0.8, 0.8, 0.2], gray=0.2, blur=0.5,       # [R] strong
    weak_crop=[0.2, 1.0], weak_jitter=[0.4, 0.4, 0.4, 0.1],                  # [R] first 10 epochs
    hidden=4096, dim=256, knn_every=50)                                      # [R]; kNN [K]
PAPER = dict(IMAGENET, hidden=2048, dim=128)                                 # [P]
CIFAR = dict(  # [S]; no second augmentation
    LARS, arch="resnet18", stem="cifar", epochs=200, batch_size=512, crop=[0.2, 1.0],
    jitter=[0.4, 0.4, 0.4, 0.1], gray=0.2, weak_crop=[0.2, 1.0], weak_jitter=[0.4, 0.4, 0.4, 0.1],
    hidden=2048, dim=128, knn_every=10, amp="auto", channels_last=True)
SMALL = dict(  # [K] SGD; hidden 2 x the backbone's width, as [R]; jitter half as strong while weak
    lr=0.5, momentum=0.9, nesterov=True, weight_decay=1e-4, warmup=1, batch_size=256, tau=0.1,
    hidden=256, dim=128, weak_jitter=[0.2, 0.2, 0.2, 0.05], channels_last=True)
RECIPES = {
    "demo": dict(SMALL, epochs=20, crop=[0.5, 1.0], weak_crop=[0.6, 1.0]),
    "c100-small": dict(  # the protocol that all methods share on a CPU
        SMALL, dataset="cifar100", limit_train=10000, epochs=15, crop=[0.08, 1.0],
        weak_crop=[0.2, 1.0], knn_every=15),      # 1 weak epoch of 15: 10 of 100 to 200 in [R]
    "cifar10": dict(CIFAR, dataset="cifar10"),
    "cifar100": dict(CIFAR, dataset="cifar100"),
    "imagenet100": dict(PAPER, batch_size=1024, epochs=200),                 # [S]
    # linear evaluation, top-1 on ImageNet by the authors' README:            heads 4096/256
    "imagenet": IMAGENET,                                                    # 68.5
    "imagenet-200": dict(IMAGENET, epochs=200),                              # 70.5
    "imagenet-800": dict(IMAGENET, epochs=800),                              # no number is known
    #                                                                         heads 2048/128
    "imagenet-paper": PAPER,                                                 # 68.1
    "imagenet-paper-200": dict(PAPER, epochs=200),                           # 70.3
    "imagenet-paper-800": dict(PAPER, epochs=800),                  # 72.2 (an earlier README)
}
OWN = ("demo", "c100-small", "cifar10", "cifar100", "imagenet100")  # the authors have none of these

# ---------------------------------------------------------------------------------- loss


def info_nce(z, Z, first=0, tau=0.1):
    """Instance loss (E1), NT-Xent over the 2B views; mean over this rank's 2b anchors.

    Args:
        z: (2, b, D) unit-norm outputs of head 1 for this rank's rows.
        Z: (2, B, D) those of the global batch in rank order; z itself on one rank. All keys carry
            gradient, as in one process over the global batch.
        first: global row of z[:, 0].

    Returns: scalar, whose mean over ranks is the loss of one process; logits (2b, 2B), columns
        [Z^1; Z^2], -inf at the anchor itself; target (2b,) int64, the column of the other view.
    Raises: ValueError for a wrong shape or tau.
    """
    b, B = _sizes(z, Z, first, tau)
    row = first + torch.arange(b, device=z.device)
    own, target = torch.cat([row, B + row]), torch.cat([B + row, row])  # (2b,) columns a and p(a)
    # differs from the released code: there the keys of other ranks are constants
    logits = z.flatten(0, 1) @ Z.flatten(0, 1).T / tau  # (2b, 2B)
    logits = logits.scatter(1, own[:, None], float("-inf"))  # k != a
    return F.cross_entropy(logits, target), logits, target  # E1


def sup_con(logits, positive, left_out=None, reduction="mean"):
    """Supervised contrastive loss of rows of logits (E4): the mean of log p is outside the log.

    Args: logits (..., n, m), similarities / tau; positive (n, m) bool, P(i) and perhaps i itself;
    left_out (n, m) bool: entries that are neither key nor positive (k = i in E4), None for none.
    Returns: mean over the rows that have a positive, 0 if none has; with reduction "none"
    (..., n), 0 in rows without positive.
    """
    if left_out is not None:
        logits, positive = logits.masked_fill(left_out, float("-inf")), positive & ~left_out
    log_p = logits.log_softmax(-1)
    # differs from the released code: it exponentiates first, and overflows for tau below 0.0113
    count = positive.sum(-1)  # (n,) |P(i)|
    rows = -log_p.masked_fill(~positive, 0.0).sum(-1) / count.clamp(min=1)  # E4
    if reduction == "none":
        return rows
    # differs from the released code: a row without positive makes everything NaN there
    has = (count > 0).expand(rows.shape).sum()
    return rows.sum() / has.clamp(min=1)


def swapped(v, V, y, first=0, tau=0.1):
    """Weak loss with the labels exchanged between the views (E5); mean over this rank's anchors.

    Args: v (2, b, D) unit-norm outputs of head 2, with gradient; V (2, B, D) those of the global
    batch, without any, own rows included; y (2, B) int64, the weak labels y^1, y^2; first, as in
    `info_nce`.
    Raises: ValueError for a wrong shape or tau.
    """
    b, B = _sizes(v, V, first, tau)
    if y.shape != (2, B):
        raise ValueError(f"weak labels {tuple(y.shape)} for 2 views of {B} rows")
    own = slice(first, first + b)

    def L_sup(m, labels):  # the keys are of the anchor's own view: E4
        return sup_con(v[m] @ V[m].T / tau, labels[own, None] == labels, itself(b, V[m], first))

    return (L_sup(0, y[1]) + L_sup(1, y[0])) / 2  # E5; the factor is that of the released code


def wcl_loss(z, v, Z=None, V=None, y=None, first=0, tau=0.1, alpha=1.0, beta=1.0):
    """Total of both heads (E6); in one process `wcl_loss(z, v)` is all that a training needs.

    Args: z, v (2, b, D) unit-norm outputs of the heads; Z, V (2, B, D) those of the global batch, y
    (2, B) the weak labels, as `info_nce` and `swapped` want them (None: of these rows); with beta 0
    v, V, y are not looked at.
    Returns: dict of loss and nce, of swap (with beta above 0), and of info_nce's logits and target.
    """
    nce, logits, target = info_nce(z, z if Z is None else Z, first, tau)  # E1
    found = dict(loss=alpha * nce, nce=nce, logits=logits, target=target)
    if beta > 0:
        V = v.detach() if V is None else V
        y = torch.stack([weak_labels(x) for x in V]) if y is None else y  # E2, E3
        found["swap"] = swapped(v, V, y, first, tau)  # E5
        found["loss"] = found["loss"] + beta * found["swap"]  # E6
    return found


def multi_crop(zc, vc, Z, V, positive, first=0, tau=0.1):
    """Small crops against the large views of the global batch (E9, a reconstruction).

    Args: zc, vc (C, b, D) unit-norm outputs of the heads for C crops, with gradient; Z, V (2, B, D)
    without any; positive (2, b, B) bool, P^1 and P^2, each row holding its own image; first, as in
    `info_nce`.
    Returns: L_cNCE, L_cK. A crop is never its own key, so nothing leaves the softmax.
    """
    own = itself(zc.shape[1], Z[0], first)
    L_cNCE = sum(sup_con(zc @ Z[m].T / tau, own) for m in (0, 1)) / 2
    L_cK = sum(sup_con(vc @ V[m].T / tau, positive[1 - m]) for m in (0, 1)) / 2  # m': 1 - m
    return L_cNCE, L_cK


def itself(b, keys, first):
    """(b, B) bool: where the rows first.. of the global batch meet themselves among keys (B, D)."""
    column = torch.arange(len(keys), device=keys.device)
    return column[first:first + b, None] == column


def _sizes(x, keys, first, tau):
    """b and B of features (2, b, D) and keys (2, B, D); ValueError if they cannot be."""
    if x.ndim != 3 or keys.ndim != 3 or len(x) != 2 or len(keys) != 2 or (
            x.shape[2] != keys.shape[2]) or not 0 <= first <= keys.shape[1] - x.shape[1]:
        raise ValueError(f"features {tuple(x.shape)} from row {first} and keys "
                         f"{tuple(keys.shape)}: must be (2, b, D) and (2, B, D)")
    if not tau > 0:
        raise ValueError(f"tau must be above 0, got {tau}")
    return x.shape[1], keys.shape[1]


# ---------------------------------------------------------------------------------- grouping


@torch.no_grad()
def neighbours(v, V, first=0, k=1, block=2 ** 25):
    """The k most similar other rows of each row (E2, E9), ties by the lowest index.

    Ties are similarities within 16 eps of each other: those of equal rows differ by rounding, and
    not alike for every shape of the product, so that the number of ranks would show.

    Args: v (b, D), rows first.. of V (B, D), unit-norm; block: similarities at a time, so that
    memory does not grow with B^2.
    Returns: (b, min(k, B - 1)) int64, most similar first.
    Raises: ValueError if B < 2: no other row exists.
    """
    B = len(V)
    if B < 2:
        raise ValueError(f"WCL needs a global batch of at least 2, got {B}")
    found, size, tie = [], max(1, block // B), 16 * torch.finfo(V.dtype).eps
    for start in range(0, len(v), size):
        S = v[start:start + size] @ V.T  # (size, B)
        row = first + start + torch.arange(len(S), device=v.device)
        # j != i; differs from the released code: it subtracts 2, which ties with a cosine of -1
        S.scatter_(1, row[:, None], float("-inf"))
        # differs from the released code: among equals top-k gives any, here it is the first
        if k == 1:
            best = S.max(1, keepdim=True).values
            found.append((S >= best - tie).byte().argmax(1, keepdim=True))
        else:
            order = (S / tie).round().sort(dim=1, descending=True, stable=True).indices
            found.append(order[:, :min(k, B - 1)])
    return torch.cat(found)


def components(n):
    """Connected components of the graph with the edges {i, n(i)} (E3).

    Every node has one edge that leaves it, so walking along n from anywhere in a component ends in
    its one cycle. Walks are doubled: after r rounds p = n^(2^r), and low is the smallest of the
    first 2^r nodes of the walk. No loop over nodes, no wait for the device.

    Args: n (B,) int64.
    Returns: (B,) int64, components numbered by first appearance: y_0 = 0, the next new one 1, ...
    """
    B = len(n)
    i = torch.arange(B, device=n.device)
    low, p = i, n
    for _ in range(B.bit_length()):  # 2^r > B: every walk is in its cycle, and has gone around it
        low, p = torch.minimum(low, low[p]), p[p]
    root = low[p]  # (B,) the smallest node of the component's cycle
    member = torch.full_like(n, B).scatter_reduce(0, root, i, "amin")[root]  # of the component
    return ((member == i).cumsum(0) - 1)[member]


def weak_labels(V):
    """Weak labels (B,) int64 of unit-norm features V (B, D): E2, E3."""
    return components(neighbours(V, V)[:, 0])


def purity(y, t):
    """Percent of the rows whose class t (B,) is the commonest of their group y (B,), both >= 0.

    Completeness is the same with the arguments exchanged: rows that lie in the group which holds
    most of their class.
    """
    base = t.max() + 1
    pairs, count = torch.unique(y * base + t, return_counts=True)
    best = count.new_zeros(int(y.max()) + 1).scatter_reduce(0, pairs // base, count, "amax")
    return 100 * best.sum().item() / len(y)


def statistics(y, t, order):
    """What the weak labels of a batch are worth: a dict of floats, means over the views.

    Args: y (2, B) int64; t (B,) int64, the true labels, or None; order (B,) a random permutation.
    Returns: components, their number; size, images in one; largest, percent of the batch; with t
    purity and completeness in percent, and random: the purity of random groups of the same sizes.
    Purity falls as groups grow, whatever they hold: only its distance from `random` is earned.
    """
    found = []
    for labels in y:
        size = torch.bincount(labels)
        found.append(dict(components=len(size), size=len(labels) / len(size),
                          largest=100 * size.max().item() / len(labels)))
        if t is not None:
            found[-1].update(purity=purity(labels, t), random=purity(labels, t[order]),
                             completeness=purity(t, labels))
    return {name: (found[0][name] + found[1][name]) / 2 for name in found[0]}


# ---------------------------------------------------------------------------------- model


class WCL(nn.Module):
    """Encoder F and heads g, phi: list of V views (b, 3, S, S) to z, v (V, b, D), unit-norm."""

    def __init__(self, args):
        super().__init__()
        self.backbone = common.resnet(args.arch, args.stem)
        sizes = self.backbone.width, args.hidden, args.dim
        self.head1 = common.MLP3(*sizes)
        # none without E5: unused, LARS would still shrink it (E7 with a gradient of exactly 0)
        self.head2 = common.MLP3(*sizes) if args.beta > 0 else None

    def forward(self, views):
        """One call of the encoder a view: the statistics of BatchNorm are per view."""
        h = [self.backbone(x) for x in views]  # (b, width) each
        return [None if head is None else torch.stack(
            [F.normalize(head(x).float(), dim=1) for x in h]) for head in (self.head1, self.head2)]


def shared_labels(v, V, first):
    """Weak labels (2, B) from all ranks: each searches the neighbours of its own rows (E2, E3)."""
    # the gathered neighbours are integers: every rank has the same labels
    return torch.stack([components(common.gather(neighbours(own, keys, first)[:, 0]))
                        for own, keys in zip(v, V, strict=True)])


@torch.no_grad()
def graphs(model, data, spec, batches):
    """Rows (B,) and weak labels (2, B) of the first batches, which are not trained on.

    BatchNorm uses the batch, as in training; its running statistics stay as they are.
    """
    model = copy.deepcopy(model).train()
    for batch in data.batches(0, min(batches, data.steps_per_epoch), spec):
        with common.autocast(data.args, data.device):
            v = model(common.augment(batch))[1]
        V = common.gather(v, dim=1)
        common.all_finite(batch.step, head2=V)
        yield common.gather(batch.rows), shared_labels(v, V, batch.first)


# ---------------------------------------------------------------------------------- training


def train(args):
    """Train on this rank; see the docstring of the file."""
    check(args)
    device = common.setup(args)
    data = common.load(args, device)
    model = WCL(args).to(device, memory_format=common.layout(args))
    network = common.ddp(model, args)
    optimizer = common.optimizer(args, model, by=args.lars_groups)
    scaler, log = common.scaler(args, device), common.Log(args, data)
    state = dict(model=model, optimizer=optimizer, scaler=scaler, log=log)
    first_step, steps = common.resume(state, args), args.epochs * data.steps_per_epoch
    label = true_labels(data, args)
    strong = common.augmentation(args)
    weak = common.augmentation(args, crop=tuple(args.weak_crop), jitter=tuple(args.weak_jitter))
    small = common.augmentation(args, crop=(0.05, 0.14), size=args.image_size * 3 // 7)  # SwAV's 96

    def spec(step):
        epochs = args.warmup if args.weak_epochs is None else args.weak_epochs
        return weak if step < epochs * data.steps_per_epoch else strong

    def measure():
        return dict(knn_top1=common.knn_accuracy(model.backbone, data))

    if args.recipe in OWN:
        common.say(f"recipe {args.recipe}: values of this project, not a published setting of WCL")
    if args.crops:
        common.say("multi-crop: our reconstruction (E9), not confirmed by the paper or its code")
    if first_step == 0:
        common.begin(state, args, data, strong,
                     lambda: {**measure(), **untrained(model, data, strong, label)})

    for batch in data.batches(first_step, steps, spec,
                              more=[(small, args.crops)] if args.crops else []):
        step = batch.step
        x = common.augment(batch)  # (2, b, 3, S, S)
        crops = [common.augment(part) for part in batch.more]  # (C, b, 3, S', S') or none
        with common.autocast(args, device):
            z, v = network([view for part in (x, *crops) for view in part])  # (2 + C, b, D)
        z, zc = z.split([2, args.crops])
        Z, V, y, about = common.gather(z, dim=1), None, None, {}  # (2, B, D)
        common.all_finite(step, head1=Z)
        if args.beta > 0:
            v, vc = v.split([2, args.crops])
            V = common.gather(v.detach(), dim=1)  # (2, B, D), no gradient to any key
            common.all_finite(step, head2=V)
            y = shared_labels(v, V, batch.first)  # (2, B): E2, E3
            about = worth(y, common.gather(batch.rows), label, step, args)
        found = wcl_loss(z, v, Z, V, y, batch.first, args.tau, args.alpha, args.beta)  # E6
        loss, logits, target = (found.pop(name) for name in ("loss", "logits", "target"))
        if args.crops:
            positive = crop_positives(v, V, y, batch.first, args)
            found["crop_nce"], found["crop_k"] = multi_crop(
                zc, vc, Z.detach(), V, positive, batch.first, args.tau)
            loss = loss + args.gamma * found["crop_nce"] + args.delta * found["crop_k"]  # E9
        hit = logits.topk(min(5, len(Z.flatten(0, 1)) - 1)).indices == target[:, None]  # (2b, 5)
        found.update(top1=100 * hit[:, 0].float().mean(), top5=100 * hit.any(1).float().mean())

        lr = common.set_lr(optimizer, learning_rate(step, data.steps_per_epoch, args))
        optimizer.zero_grad(set_to_none=True)
        value = common.finite(loss, step)  # all ranks stop together
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        log(step, loss=value, lr=lr, **common.means(found), **about)

        if common.end_step(step, state, args, data, measure):
            break
    more = words(log) + picture(model, data, strong, args)
    title = "WCL" if args.beta > 0 else "SimCLR (WCL with beta 0)"
    common.summary(log, args, f"{title}, {args.dataset}", first_step, more, panels=[
        (("purity", "random"), "purity of weak labels (%)"), ("components", "components")])


def learning_rate(step, steps_per_epoch, args):
    """Rate of a step (E8): a pure function of the step."""
    base = args.lr * (args.batch_size ** 0.5 if args.lr_rule == "sqrt" else 1)
    return common.warmup_cosine(step, args.epochs * steps_per_epoch, base,
                                args.warmup * steps_per_epoch)


def crop_positives(v, V, y, first, args):
    """P of E9 for this rank's rows: (2, b, B) bool, from the large views only."""
    b, B = v.shape[1], V.shape[1]
    row = first + torch.arange(b, device=v.device)
    if args.crop_positives == "components":
        return y[:, row, None] == y[:, None]
    near = [neighbours(v[m], V[m], first, args.crop_k) for m in (0, 1)]
    P = torch.zeros(2, b, B, dtype=torch.bool, device=v.device)
    return P.scatter(2, torch.stack(near), True).scatter(2, row.expand(2, b)[..., None], True)


# ---------------------------------------------------------------------------------- diagnostics


def true_labels(data, args):
    """Column --label of the training images (N,), None unless all have one of at least two."""
    label = data.train.column(args.label)
    return label if label.min() >= 0 and label.unique().numel() > 1 else None


def worth(y, rows, label, step, args):
    """`statistics` of the batch of a step, with random groups that depend on the step only."""
    order = torch.randperm(len(rows), generator=common.generator(args.seed, step, "random groups"))
    y, rows = y.cpu(), rows.cpu()  # small, and a device would be waited for at each count
    return statistics(y, None if label is None else label[rows], order)


def untrained(model, data, spec, label, batches=8):
    """Mean statistics of the weak labels that the present network gives, without training it."""
    if model.head2 is None:
        return {}
    found = [worth(y, rows, label, step, data.args)
             for step, (rows, y) in enumerate(graphs(model, data, spec, batches))]
    return {name: sum(f[name] for f in found) / len(found) for name in found[0]}


def words(log):
    """Lines of the summary about the weak labels, before training and at its end (rank 0)."""
    if common.rank() > 0:
        return []
    known = [r for r in log.records() if "components" in r]
    lines = []
    for name, r in zip(("untrained", "trained"), known[:1] + known[-1:]):
        text = f"  weak labels  {name}: {r['components']:.1f} components of {r['size']:.1f} images"
        if "purity" in r:
            text += (f", purity {r['purity']:.1f} % (random groups of these sizes "
                     f"{r['random']:.1f} %), completeness {r['completeness']:.1f} %")
        lines.append(text)
    if known and known[-1]["largest"] > 90:
        lines.append(f"  warning      one component holds {known[-1]['largest']:.0f} % of a batch: "
                     "such weak labels say nothing")
    return lines


def picture(model, data, spec, args, rows=8, columns=14):
    """Save components.png: each row the images of one weak label of the first batch, from the
    largest component to the smallest; a frame is green where the image has the commonest class.

    Only with --picture. Returns: lines for the summary.
    """
    if not args.picture or common.stopping():
        return []
    batch, y = next(graphs(model, data, spec, 1))
    path = f"{args.out}/components.png"
    if common.rank() > 0:
        return []
    y, batch, label = y[0].cpu(), batch.cpu(), true_labels(data, args)
    names = data.train.classes.get(args.label)
    order = torch.bincount(y).argsort(descending=True, stable=True)  # (components,)
    chosen = order[torch.linspace(0, len(order) - 1, min(rows, len(order))).round().long()]
    groups = [batch[y == c] for c in chosen.tolist()]  # rows of the data set
    shown = [members[:columns] for members in groups]
    pixels = data.pixels(data.train, torch.cat(shown), args.image_size).split(
        [len(members) for members in shown])
    lines = []
    for members, x in zip(groups, pixels):
        text, right = f"{len(members)} images", [None] * len(members)
        if label is not None:
            best = int(torch.bincount(label[members]).argmax())
            right = (label[members] == best).tolist()
            text += f"\n{sum(right)} of class\n{names[best] if names else best}"
            if sum(right) == 1 < len(members):
                text, right = f"{len(members)} images\nno two of one class", [None] * len(members)
        lines.append((text, [(image, good, "") for image, good in zip(x, right)]))
    title = (f"weak labels of one batch of {len(y)} images: {len(chosen)} of its {len(order)} "
             f"components, from large to small; green: the commonest class; {common.source(args)}")
    common.image_rows(path, title, lines, left=150, side=48)
    return [f"  components   {path}"]


# ---------------------------------------------------------------------------------- flags


def check(args):
    """BadInput for flags that cannot work, before anything is read."""
    if args.batch_size < 2:
        raise common.BadInput(f"--batch-size {args.batch_size}: WCL needs a global batch of at "
                              "least 2, an image needs a neighbour")
    common.require(args, above=["tau", "alpha", "hidden", "dim", "crop_k"],
                   least=["beta", "gamma", "delta", "crops", "warmup", "weak_epochs"])
    if args.warmup >= args.epochs:
        raise common.BadInput(f"--warmup {args.warmup} must be shorter than --epochs {args.epochs}")
    if (args.weak_epochs or 0) > args.epochs:
        raise common.BadInput(f"--weak-epochs {args.weak_epochs}: there are {args.epochs} epochs")
    common.require_views(args, "weak_crop", "weak_jitter")
    if args.crops == 0:
        common.unused(args, ["crop_k", "crop_positives", "gamma", "delta"], "without --crops")
    if args.beta == 0 and (args.crops or args.picture):
        raise common.BadInput("--beta 0 has no weak labels: --crops and --picture need --beta "
                              "above 0")


def main(argv=None):
    """Flags and start; `main([...])` runs in this process."""
    parser = common.Parser("wcl", __doc__, RECIPES)
    add = parser.add_argument_group("WCL").add_argument
    add("--tau", type=float, default=0.1, help="tau of all losses")
    add("--alpha", type=float, default=1.0, help="weight of L_NCE (E6)")
    add("--beta", type=float, default=1.0, help="weight of L_swap (E6); 0: SimCLR")
    add("--hidden", type=int, default=4096, help="width of the two hidden layers of a head")
    add("--dim", type=int, default=256, help="D, width of the embeddings")
    add("--warmup", type=int, default=10, help="epochs of linear warm-up of the rate (E8)")
    add("--lr-rule", default="fixed", choices=["fixed", "sqrt"],
        help="base rate: --lr, or --lr times the square root of the global batch (E8)")
    add("--lars-groups", default="name", choices=["name", "kind"], help="left out of LARS: tensors "
        "with bn or bias in their name (the authors'), or all vectors")
    add("--weak-epochs", type=int, help="first epochs with the weak augmentation (default: those "
        "of the warm-up)")
    add("--weak-crop", type=float, nargs=2, default=[0.2, 1.0], help="as --crop, while weak")
    add("--weak-jitter", type=float, nargs=4, default=[0.4, 0.4, 0.4, 0.1],
        help="as --jitter, while weak")
    add("--crops", type=int, default=0, help="C, small crops an image (E9, a reconstruction; 0: "
        "none, 6 to try it)")
    add("--crop-k", type=int, default=4, help="K neighbours that are positives of a crop (E9)")
    add("--crop-positives", default="neighbours", choices=["neighbours", "components"],
        help="P of E9: K neighbours, or the weak label's component")
    add("--gamma", type=float, default=1.0, help="weight of L_cNCE (E9)")
    add("--delta", type=float, default=1.0, help="weight of L_cK (E9)")
    add("--picture", action="store_true", help="save components.png: images by weak label")
    common.run(train, parser, argv)


if __name__ == "__main__":
    main()

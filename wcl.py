"""WCL (Zheng, Wang, You, Qian, Zhang, Wang, Xu: Weakly Supervised Contrastive Learning, ICCV 2021,
arXiv 2110.04770).

Instance discrimination pushes images of the same class apart (class collision, Fig. 1 [T]). WCL
keeps that task on one head. On a second head it links every image of the batch to its nearest
neighbour. The connected components of that graph are weak labels, and the labels of each view
supervise the OTHER view (Sec. 3, Fig. 2 [T]). The equations are those of the authors' code. The
paper's equation numbers could not be found, so the labels E1 to E9 are this project's. Multi-crop
(E9) is our reconstruction. x^m, h^m, F, g, phi, y^m, L_NCE, L_swap are symbols of Fig. 2 [A]. How
sure a reference is: [T] the paper's own text, [A] its authors' repository, [3] a third party.

    h^m = F(x^m), z^m = g(h^m) / |g(h^m)|, v^m = phi(h^m) / |phi(h^m)|, views m = 1, 2
    Z^m, V^m: the z^m, v^m of the whole batch, i, j, k its rows
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

Labels used:  none. True labels, if the data have any, are only for the log (purity).
State kept:   the network. --beta 0 is the SimCLR baseline: no second head, no graph.
Shapes:       B global batch, b rows of this process, V views, D embedding width, C crops.

    torchrun --standalone --nproc_per_node=2 wcl.py                    # demo on 2 CPU cores, 2 min
    python wcl.py --recipe c100-small --download                       # CIFAR-100, 3 CPU minutes
    python wcl.py --recipe cifar10 --download                          # one GPU
    python wcl.py --recipe cifar10 --no-sync-bn --micro-batch 64       # one small GPU
    torchrun --nproc_per_node=4 wcl.py --recipe cifar10                # four, the same global batch
    torchrun --nproc_per_node=8 wcl.py --recipe imagenet100 --data-dir DIR
    torchrun --nnodes=4 --nproc_per_node=8 ... wcl.py --recipe imagenet --data-dir DIR  # 32 x 128
Measured: demo 94 seconds on 2 busy cores, kNN 13.5 -> 47.6 % (synthetic); c100-small 166 CPU
seconds, 1.2 GB. The results are in results/README.md. The GPU recipes have not been run at full
length yet.
"""
import copy

import torch
import torch.nn.functional as F
from torch import nn

import common

# ---------------------------------------------------------------------------------- recipes

# [R] the authors' repository, [P] the paper's run as the authors' README describes it, [S] a
# convention of the field (the authors have no such recipe), [K] chosen for this project, not tuned
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
    "c10": dict(  # all methods' longer run; 4 weak epochs of 40, as 10 of 100 in [R]
        SMALL, dataset="cifar10", epochs=40, crop=[0.08, 1.0], weak_crop=[0.2, 1.0],
        weak_epochs=4, knn_every=8),
    "own": dict(SMALL),  # your images
    "cifar10": dict(CIFAR, dataset="cifar10"),
    "cifar100": dict(CIFAR, dataset="cifar100"),
    "imagenet100": dict(PAPER, batch_size=1024, epochs=200),                 # [S]
    # Linear evaluation on ImageNet, top-1 [A]. [3] gives 74.7 as the paper's (number of crops not
    # stated), and with 1 % and 10 % of the labels top-1 65.0 and 72.0, top-5 86.3 and 91.2.
    "imagenet": IMAGENET,                                           # 68.5, heads 4096/256
    "imagenet-200": dict(IMAGENET, epochs=200),                     # 70.5
    "imagenet-800": dict(IMAGENET, epochs=800),                     # no number is known
    "imagenet-paper": PAPER,                                        # 68.1, heads 2048/128
    "imagenet-paper-200": dict(PAPER, epochs=200),                  # 70.3
    "imagenet-paper-800": dict(PAPER, epochs=800),                  # 72.2 (an earlier README)
}
# the authors have none of these
OWN = ("demo", "own", "c100-small", "c10", "cifar10", "cifar100", "imagenet100")

# ---------------------------------------------------------------------------------- loss


def info_nce(z, tau=0.1):
    """Instance loss (E1), NT-Xent: the mean over all 2B views as anchors.

    Args: z (2, B, D) unit-norm outputs of head 1, float16 and bfloat16 become float32; tau > 0.
    Returns: scalar. All keys carry gradient.
    """
    # differs from the released code: there, keys of other processes get no gradient
    B = z.shape[1]
    q = z.to(torch.promote_types(z.dtype, torch.float32)).flatten(0, 1)  # (2B, D) [Z^1; Z^2]
    logits = (q @ q.T / tau).fill_diagonal_(float("-inf"))  # k != a
    return F.cross_entropy(logits, torch.arange(2 * B, device=z.device).roll(B))  # p(a); E1


def sup_con(v, y, tau=0.1):
    """Supervised contrastive loss of one view and given labels (E4).

    Args: v (B, D) unit-norm outputs of head 2, float16 and bfloat16 become float32; y (B,) int64.
    Returns: scalar, the mean over the rows that have a positive, 0 if none has. Only the anchors
    get a gradient.
    """
    v = v.to(torch.promote_types(v.dtype, torch.float32))
    P = (y[:, None] == y).fill_diagonal_(False)  # (B, B) P(i)
    s = (v @ v.detach().T / tau).fill_diagonal_(float("-inf"))  # k != i
    # differs from the released code: it takes exp first and overflows for tau below 0.0113
    log_p = s.log_softmax(1)
    rows = -log_p.masked_fill(~P, 0).sum(1) / P.sum(1).clamp(min=1)  # E4
    # differs from the released code: there, a row without a positive makes the loss NaN
    return rows.sum() / P.any(1).sum().clamp(min=1)


def swapped(v, y, tau=0.1):
    """Weak loss with the labels exchanged between the views (E5).

    Args: v (2, B, D) unit-norm outputs of head 2; y (2, B) int64, the weak labels y^1, y^2.
    Returns: scalar, with the released code's factor 1/2.
    """
    return (sup_con(v[0], y[1], tau) + sup_con(v[1], y[0], tau)) / 2  # E5


def multi_crop(zc, vc, Z, V, P, tau=0.1):
    """Small crops against the large views (E9, a reconstruction).

    Args: zc, vc (C, B, D) unit-norm outputs of the heads for C crops, with gradient; Z, V (2, B, D)
    outputs for the large views, the keys, without gradient; P (2, B, B) bool, P^1 and P^2, whose
    diagonals are True.
    Returns: L_cNCE, L_cK. A crop is never its own key, so the softmax is over all keys.
    """
    zc, vc, Z, V = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (zc, vc, Z, V))
    L_cNCE = L_cK = 0
    for m in (0, 1):
        log_p = (zc @ Z[m].detach().T / tau).log_softmax(2)  # (C, B, B)
        L_cNCE = L_cNCE - log_p.diagonal(0, 1, 2).mean() / 2
        log_p = (vc @ V[m].detach().T / tau).log_softmax(2)
        of_other = P[1 - m]  # P^m'
        L_cK = L_cK - (log_p.masked_fill(~of_other, 0).sum(2) / of_other.sum(1)).mean() / 2
    return L_cNCE, L_cK


# ---------------------------------------------------------------------------------- grouping


@torch.no_grad()
def neighbours(V, k=1, block=2 ** 25):
    """The k most similar other rows of each row (E2, E9); ties: lowest index first.

    Similarities within 16 eps of the best remaining one are ties: rounding makes those of equal
    rows differ, by an amount that depends on the shape of the matrix product.

    Args: V (B, D) unit-norm, float16 and bfloat16 become float32, since half precision has too many
    ties; block: similarities at a time, so that memory does not grow with B^2.
    Returns: (B, min(k, B - 1)) int64, most similar first.
    """
    V, B = V.to(torch.promote_types(V.dtype, torch.float32)), len(V)
    nearest, tie = [], 16 * torch.finfo(V.dtype).eps
    for rows in torch.arange(B, device=V.device).split(max(1, block // B)):
        # j != i; differs from the released code: it subtracts 2, which can tie with a cosine of -1
        S = (V[rows] @ V.T).scatter_(1, rows[:, None], float("-inf"))
        columns = []
        for _ in range(min(k, B - 1)):
            # differs from the released code: its top-k breaks ties arbitrarily
            best = S.amax(1, keepdim=True)
            columns.append((S >= best - tie).byte().argmax(1, keepdim=True))
            S.scatter_(1, columns[-1], float("-inf"))
        nearest.append(torch.cat(columns, 1))
    return torch.cat(nearest)


def components(n):
    """Connected components of the graph with the edges {i, n(i)} (E3).

    Every node has one outgoing edge, so a walk along n ends in the only cycle of its component.
    Walks are doubled: after r rounds p = n^(2^r), and low is the smallest of the first 2^r nodes of
    the walk. There is no loop over nodes, and nothing waits for the device.

    Args: n (B,) int64.
    Returns: (B,) int64, components numbered in order of first appearance, from 0.
    """
    B = len(n)
    i = torch.arange(B, device=n.device)
    low, p = i, n
    for _ in range(B.bit_length()):  # until 2^r > B: every walk has gone around its cycle
        low, p = torch.minimum(low, low[p]), p[p]
    root = low[p]  # (B,) the smallest node of the component's cycle
    member = torch.full_like(n, B).scatter_reduce(0, root, i, "amin")[root]  # its smallest member
    return ((member == i).cumsum(0) - 1)[member]


def weak_labels(V):
    """Weak labels (B,) int64 from the unit-norm features V (B, D) of one view (E2, E3)."""
    return components(neighbours(V)[:, 0])


def crop_positives(V, y, args):
    """P of E9, (2, B, B) bool, from the large views V (2, B, D) and their weak labels y (2, B)."""
    if args.crop_positives == "components":
        return y[:, :, None] == y[:, None]
    P = torch.eye(V.shape[1], dtype=torch.bool, device=V.device).repeat(2, 1, 1)
    return P.scatter(2, torch.stack([neighbours(v, args.crop_k) for v in V]), True)


# ---------------------------------------------------------------------------------- model


class WCL(nn.Module):
    """Encoder F and heads g, phi. Maps V views (b, 3, S, S) to unit vectors z, v (V, b, D)."""

    def __init__(self, args):
        super().__init__()
        self.backbone = common.resnet(args.arch, args.stem)
        sizes = self.backbone.width, args.hidden, args.dim
        self.head1 = common.MLP3(*sizes)
        # without E5 no second head: at a gradient of 0, weight decay would only shrink it
        self.head2 = common.MLP3(*sizes) if args.beta > 0 else None

    def forward(self, *views):
        """One call of the encoder for each view, so BatchNorm's statistics are per view."""
        h = [self.backbone(x) for x in views]  # (b, width) each
        return [None if head is None else torch.stack(
            [F.normalize(head(x).float(), dim=1) for x in h]) for head in (self.head1, self.head2)]


# ---------------------------------------------------------------------------------- training


def train(args):
    """Train in this process; see the top of the file."""
    check(args)
    device = common.setup(args)
    data = common.load(args, device)
    model = WCL(args).to(device, memory_format=common.memory_format(args))
    network = common.distribute(model, args)
    optimizer, scaler = common.optimizer(args, model, args.lars_groups), common.scaler(args, device)
    log = common.Log(args, data)
    state = dict(model=model, optimizer=optimizer, scaler=scaler, log=log)
    first_step, steps = common.resume(state, args), args.epochs * data.steps_per_epoch
    strong = common.augmentation(args)
    weak = common.augmentation(args, crop=tuple(args.weak_crop), jitter=tuple(args.weak_jitter))
    small = common.augmentation(args, crop=(0.05, 0.14), size=args.image_size * 3 // 7)  # SwAV's 96

    def aug(step):  # weak views in the first epochs
        epochs = args.warmup if args.weak_epochs is None else args.weak_epochs
        return weak if step < epochs * data.steps_per_epoch else strong

    def evaluate():
        return dict(knn_top1=common.knn_accuracy(model.backbone, data))

    if log.lines == 1:  # a new run
        report_recipe(args)
        common.start_run(state, args, data, strong, lambda: {
            **evaluate(), **untrained_quality(model, data, strong)})

    for batch in data.batches(first_step, steps, aug,
                              extra=[(small, args.crops)] if args.crops else []):
        step = batch.step
        x = common.augment(batch)                               # (2, b, 3, S, S), this process
        crops = [crop for views in batch.extra for crop in common.augment(views)]
        with common.autocast(args, device):
            z, v = network(*x, *crops)                          # (2 + C, b, D)
        z, zc = common.gather(z).split([2, args.crops])         # (2, B, D), (C, B, D)
        nce = info_nce(z, args.tau)                             # E1
        loss, stats, features = args.alpha * nce, dict(nce=nce), dict(head1=z)
        shown = None, None
        if args.beta > 0:
            v, vc = common.gather(v).split([2, args.crops])
            y = torch.stack([weak_labels(V) for V in v])        # (2, B): E2, E3
            swap = swapped(v, y, args.tau)                      # E5
            loss = loss + args.beta * swap                      # E6
            stats["swap"], features["head2"] = swap, v
            # on the CPU when check_loss returns, and counted while the device works
            shown = [x.to("cpu", non_blocking=True) for x in (y, batch.rows)]
        if args.crops:
            L_cNCE, L_cK = multi_crop(zc, vc, z, v, crop_positives(v, y, args), args.tau)
            loss = loss + args.gamma * L_cNCE + args.delta * L_cK                       # E9
            stats.update(crop_nce=L_cNCE, crop_k=L_cK)
        stats.update(pair_accuracy(z))

        lr = common.set_lr(optimizer, learning_rate(step, data.steps_per_epoch, args))
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        values = common.check_loss(loss, step, stats, features)
        scaler.step(optimizer)
        scaler.update()
        log(step, **values, lr=lr, **label_quality(*shown, data, step))

        if common.end_step(step, state, args, data, evaluate):
            break
    title = "WCL" if args.beta > 0 else "SimCLR (WCL with beta 0)"
    common.summary(log, args, f"{title}, {args.dataset}", first_step,
                   [*summary_lines(log), *components_picture(model, data, strong)], panels=[
                       (("purity", "random"), "purity of weak labels (%)"),
                       ("components", "components")])


def learning_rate(step, steps_per_epoch, args):
    """Learning rate of a step (E8): a pure function of the step."""
    base = args.lr * (args.batch_size ** 0.5 if args.lr_rule == "sqrt" else 1)
    return common.warmup_cosine(step, args.epochs * steps_per_epoch, base,
                                args.warmup * steps_per_epoch)


# ---------------------------------------------------------------------------------- diagnostics


def report_recipe(args):
    """Print which parts of this training are not the authors'."""
    if args.recipe in OWN:
        common.print_rank0(f"recipe {args.recipe}: values of this project, not a published setting "
                           "of WCL")
    if args.crops:
        common.print_rank0("multi-crop: our reconstruction (E9), not checked against the paper or "
                           "its code")


@torch.no_grad()
def pair_accuracy(z):
    """top1, top5: percent of the 2B views of z (2, B, D) whose other view is among the 1 or 5 most
    similar rows."""
    B, q = z.shape[1], z.flatten(0, 1)
    S = (q @ q.T).fill_diagonal_(float("-inf"))
    other = S.gather(1, torch.arange(2 * B, device=z.device).roll(B)[:, None])
    place = (S > other).sum(1)  # rows that are more similar than the other view
    return {f"top{k}": 100 * (place < k).double().mean() for k in (1, 5)}


def purity(y, t):
    """Percent of the rows whose class t (B,) is the most common one in their group y (B,).

    Ids are >= 0. purity(t, y) is completeness: the percent of the rows in the group that has
    the most images of their class.
    """
    base = t.max() + 1
    pairs, count = torch.unique(y * base + t, return_counts=True)
    best = count.new_zeros(int(y.max()) + 1).scatter_reduce(0, pairs // base, count, "amax")
    return 100 * best.sum().item() / len(y)


def true_labels(data):
    """Column --label of the training images (N,), or None if one is missing or all are equal."""
    label = data.train.column(data.args.label)
    return label if 0 <= label.min() < label.max() else None


def label_quality(y, rows, data, step):
    """How good the weak labels y (2, B) of a batch are: a dict of floats, means over the views.

    Returns: components, their number; size, images per component; largest, percent of the batch. If
    all training images have a label: purity and completeness in percent, and random, the purity of
    random groups of the same sizes. Purity falls as groups grow, so compare it with random. An
    empty dict if y is None.
    """
    if y is None:
        return {}
    y, label, B = y.cpu(), true_labels(data), len(rows)  # one copy: no wait for each count
    quality = [dict(components=len(n), size=B / len(n), largest=100 * n.max().item() / B)
               for n in map(torch.bincount, y)]
    if label is not None:
        t = label[rows.cpu()]
        order = torch.randperm(B, generator=common.generator(data.args.seed, step, "random groups"))
        for view, of_view in zip(quality, y, strict=True):
            view.update(purity=purity(of_view, t), random=purity(of_view, t[order]),
                        completeness=purity(t, of_view))
    return {name: (quality[0][name] + quality[1][name]) / 2 for name in quality[0]}


@torch.no_grad()
def batch_graphs(model, data, aug, batches):
    """Rows (B,) and weak labels (2, B) of the first batches, computed without training.

    BatchNorm uses the batch, as in training; its running statistics do not change.
    """
    network = common.micro_batches(copy.deepcopy(model).train(), data.args)
    for batch in data.batches(0, min(batches, data.steps_per_epoch), aug):
        with common.autocast(data.args, data.device):
            V = common.gather(network(*common.augment(batch))[1])
        common.check_features(batch.step, head2=V)
        yield batch.rows, torch.stack([weak_labels(v) for v in V])


def untrained_quality(model, data, aug, batches=8):
    """Mean `label_quality` of the first batches with the network as it is."""
    if model.head2 is None:
        return {}
    quality = [label_quality(y, rows, data, step)
               for step, (rows, y) in enumerate(batch_graphs(model, data, aug, batches))]
    return {name: sum(q[name] for q in quality) / len(quality) for name in quality[0]}


def summary_lines(log):
    """Lines of the summary on the weak labels at the start and the end of training (rank 0)."""
    records = [r for r in log.records() if "components" in r] if common.rank() == 0 else []
    lines, first = [], "initial" if log.header["args"]["init"] else "untrained"
    for name, r in zip((first, "trained"), records[:1] + records[-1:]):
        lines.append("  weak labels  {}: {components:.1f} components of {size:.1f} images".format(
            name, **r))
        if "purity" in r:
            lines[-1] += (", purity {purity:.1f} % (random groups of these sizes {random:.1f} %), "
                          "completeness {completeness:.1f} %".format(**r))
    if records and records[-1]["largest"] > 90:
        lines.append(f"  warning      one component holds {records[-1]['largest']:.0f} % of a "
                     "batch: such weak labels tell nothing")
    return lines


def components_picture(model, data, aug, rows=8, columns=14):
    """With --picture, save components.png: a row of images for each weak label of the first batch,
    from the largest component to the smallest. Green frames: the row's most common class.

    Returns: lines for the summary.
    """
    args = data.args
    if not args.picture or common.should_stop():
        return []
    batch, y = next(batch_graphs(model, data, aug, 1))
    path = f"{args.out}/components.png"
    if common.rank() > 0:
        return []
    y, batch, label = y[0].cpu(), batch.cpu(), true_labels(data)
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
             f"components, from large to small; green: most common class; {common.source(args)}")
    common.image_rows(path, title, lines, left=150, side=48)
    return [f"  components   {path}"]


# ---------------------------------------------------------------------------------- flags


def check(args):
    """Raise BadInput for flags that do not fit together, before any data are read."""
    if args.batch_size < 2:
        raise common.BadInput(f"--batch-size {args.batch_size}: WCL needs a global batch of at "
                              "least 2, so that every image has a neighbour")
    common.check_ranges(args, above=["tau", "alpha", "hidden", "dim", "crop_k"],
                        least=["beta", "gamma", "delta", "crops", "warmup", "weak_epochs"])
    if args.warmup >= args.epochs:
        raise common.BadInput(f"--warmup {args.warmup} must be shorter than --epochs {args.epochs}")
    if (args.weak_epochs or 0) > args.epochs:
        raise common.BadInput(f"--weak-epochs {args.weak_epochs} is more than --epochs "
                              f"{args.epochs}")
    if not (args.warmup if args.weak_epochs is None else args.weak_epochs):
        common.reject_unused(args, ["weak_crop", "weak_jitter"], "in 0 weak epochs")
    common.check_views(args, "weak_crop", "weak_jitter")
    if args.optimizer != "lars":
        common.reject_unused(args, ["lars_groups"], f"by --optimizer {args.optimizer}")
    if args.crop_positives == "components":
        common.reject_unused(args, ["crop_k"], "by --crop-positives components")
    if args.crops == 0:
        common.reject_unused(args, ["crop_k", "crop_positives", "gamma", "delta"],
                             "without --crops")
    if args.crops and args.image_size < 3:
        raise common.BadInput(f"--image-size {args.image_size} is too small for --crops, whose "
                              "side is 3/7 of it")
    if args.beta == 0 and (args.crops or args.picture):
        raise common.BadInput("--beta 0 has no weak labels: --crops and --picture need --beta "
                              "above 0")


def main(argv=None):
    """Parse the flags and train; `main([...])` runs in this process."""
    parser = common.Parser("wcl", __doc__, RECIPES)
    add = parser.add_argument_group("WCL").add_argument
    add("--tau", type=float, default=0.1, help="tau of all losses")
    add("--alpha", type=float, default=1.0, help="weight of L_NCE (E6)")
    add("--beta", type=float, default=1.0, help="weight of L_swap (E6); 0: SimCLR")
    add("--hidden", type=int, default=4096, help="width of the two hidden layers of a head")
    add("--dim", type=int, default=256, help="D, width of the embeddings")
    add("--warmup", type=int, default=10, help="epochs of linear warm-up (E8)")
    add("--lr-rule", default="fixed", choices=["fixed", "sqrt"],
        help="sqrt: --lr times sqrt(B) (E8)")
    add("--lars-groups", default="name", choices=["name", "kind"],
        help="what LARS leaves out: bn and bias, or vectors")
    add("--weak-epochs", type=int, help="first epochs, with weak augmentation (default: warm-up)")
    add("--weak-crop", type=float, nargs=2, default=[0.2, 1.0], help="as --crop, while weak")
    add("--weak-jitter", type=float, nargs=4, default=[0.4, 0.4, 0.4, 0.1],
        help="as --jitter, while weak")
    add("--crops", type=int, default=0, help="C, small crops an image (E9, a reconstruction)")
    add("--crop-k", type=int, default=4, help="K neighbours that are positives of a crop (E9)")
    add("--crop-positives", default="neighbours", choices=["neighbours", "components"],
        help="P of E9")
    add("--gamma", type=float, default=1.0, help="weight of L_cNCE (E9)")
    add("--delta", type=float, default=1.0, help="weight of L_cK (E9)")
    add("--picture", action="store_true", help="save components.png: images by weak label")
    common.run(train, parser, argv)


if __name__ == "__main__":
    main()

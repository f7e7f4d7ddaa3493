"""CLD (Wang, Liu, Yu: Unsupervised Feature Learning by Cross-Level Instance-Group Discrimination,
CVPR 2021, arXiv 2008.03813), on top of NPID, MoCo, MoCo v2, InfoMin or BYOL.

Instance discrimination makes every image a class of its own, so it pushes similar images apart. CLD
adds a coarse branch (Fig. 2 [T]). It groups each view of a batch, and each image of one view must
find its own group among those of the other view. The equations are those of the authors' code. The
paper's equation numbers could not be found, so the labels E1 to E11 are this project's. f_I, f_G, M
and C are symbols of Fig. 2; its Gamma(i) is G_i here, its bank {v_i} is V. How sure a reference is:
[T] the paper's own figure or caption, [A] its authors elsewhere.

    C(f, p, Q; T) = -log( exp f.p/T / (exp f.p/T + sum_{q in Q} exp f.q/T) )                 E1
    NPID: L_I = mean_i C(f_i, v_i, all other rows of V; T)       V: one row for every image  E2
    NPID with m sampled rows (NCE): P_j = exp(f.v_j/T) / Z,
    L_I = -mean_i [ ln P_0/(P_0 + m/n + eps) + sum_{j>=1} ln (m/n)/(P_j + m/n + eps) ]       E3
    v_i <- (a v_i + (1 - a) f_i) / |.|, a the momentum of the bank                           E4
    MoCo: L_I = mean_i C(q_i, k_i, Q; T)    k from the key network, Q a queue of older keys  E5
    groups G, M of a view: ids of k-means in the batch, and the means of f_G by id           E6
    L_CLD = ( mean_i CE(f_G,i M'^T / T_G, G'_i) + mean_i CE(f'_G,i M^T / T_G, G_i) ) / 2     E7
    (Fig. 2 [T]: the groups and the ids are those of the other view)
    L = (L_I of view 1 + L_I of view 2) / 2 + lambda L_CLD                                   E8
    NormLinear: y = x/|x| . W with every column of W of norm 1           common.NormLinear   E9
    grouping by normalised cuts: k-means on eigenvectors of the graph of |cos|              E10
    weighted kNN: score_c = sum over the K nearest of class c exp(sim / T)    common.knn_*  E11
    InfoMin: L_I also takes a jigsaw query with weight beta. Key network: theta_k <- alpha theta_k +
    (1 - alpha) theta_q. BYOL + CLD was announced but never released: ours is only a sketch.

Labels used:  none.
State kept:   NPID: V (512 bytes an image) and Z; MoCo, InfoMin: key network and queue; BYOL: key
              network.
Shapes:       n images, B global batch, b rows of this process, D width of f, k groups, m sampled
              rows.

    torchrun --standalone --nproc_per_node=2 cld.py                    # demo on 2 CPU cores
    python cld.py --recipe c100-small --download                       # CIFAR-100 on a CPU
    python cld.py --recipe cifar10 --download                          # NPID + CLD, one GPU
    python cld.py --recipe cifar10 --lambda-cld 0 --download           # NPID alone
    python cld.py --recipe cifar10 --micro-batch 64                    # one small GPU
    torchrun --nproc_per_node=4 cld.py --recipe cifar10-moco           # MoCo + CLD, four GPUs
    torchrun --nproc_per_node=8 cld.py --recipe imagenet --data-dir DIR            # MoCo v2 + CLD
    torchrun --nproc_per_node=8 cld.py --recipe imagenet-infomin --data-dir DIR    # InfoMin + CLD
Measured: demo 93 CPU seconds a process, kNN 11 -> 35 % (synthetic); c100-small about 220 CPU
seconds. The results are in results/README.md. The GPU recipes have not been run at full length yet.
"""
import copy
import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import common

# ---------------------------------------------------------------------------------- recipes

# [S] the authors' scripts, [D] defaults and code they run with, [K] chosen for this project, not
# tuned and not from the paper. [A] the authors' README (the paper's kNN or linear top-1) and issues
SMALL = dict(  # [K] as clinfonce.py, but with the rate of [S]: at 0.5, T = 0.1, NPID does not learn
    lr=0.06, momentum=0.9, nesterov=True, weight_decay=1e-4, schedule="cosine", warmup=1,
    batch_size=256, channels_last=True)
NPID = dict(  # [S] train_cifar10_npid_cld.sh and train_cifar_npid_cld.py
    base="npid", head="linear", nce=0, bank_momentum=0.5, tau=0.1, knn_t=0.1,
    k=128, iters=5, tau_cld=0.2, lambda_cld=1.0)
CIFAR = dict(  # [S] 200 epochs of batch 256, rate 0.03 * 256 / 128
    dataset="cifar10", arch="resnet18", stem="cifar", epochs=200, batch_size=256, lr=0.06,
    momentum=0.9, weight_decay=7e-4, schedule="cosine", warmup=5,
    crop=[0.2, 1.0], jitter=[0.4, 0.4, 0.4, 0.4], jitter_p=1.0, gray=0.2,
    mean=[0.4914, 0.4822, 0.4465], std=[0.2023, 0.1994, 0.2010],
    amp="auto", channels_last=True, knn_every=10)  # theirs: apex O1, kNN every epoch
MOCO = dict(  # [S] train_cifar10_moco_cld.sh: not "the same as NPID + CLD", as their README has it
    CIFAR, base="moco", head="normlinear", tau=0.07, knn_t=0.07, queue=12288, key_momentum=0.999,
    weight_decay=8e-4, k=200, iters=5, tau_cld=0.2, lambda_cld=0.8,
    jitter=[0.4, 0.4, 0.4, 0.1], jitter_p=0.8, blur=0.5, erase=1.0, amp="none")  # "strong"
IMAGENET = dict(  # [S] train_imagenet_mocov2_cld.sh; the rate is not scaled
    dataset="folder", arch="resnet50", image_size=224, base="mocov2", head="normmlp", epochs=200,
    batch_size=512, lr=0.2, momentum=0.9, weight_decay=1e-4, schedule="cosine-epoch",
    tau=0.2, knn_t=0.2, queue=65536, key_momentum=0.999,
    # 8 processes of 64 images each: k > 64 made each image a group of its own; --group-rows 64
    k=120, iters=5, tau_cld=0.4, lambda_cld=0.25,
    crop=[0.2, 1.0], jitter=[0.4, 0.4, 0.4, 0.1], jitter_p=0.8, gray=0.2, blur=0.5,
    amp="auto", channels_last=True, knn_every=50, save_every=5)
RECIPES = {
    "demo": dict(  # [K] 512 objects, eight renders of each; k = number of classes, see kitchen
        NPID | SMALL, dataset="shapes-views", epochs=30, batch_size=128, lr=0.03, k=24,
        crop=[0.5, 1.0]),
    "c100-small": dict(  # [K] the protocol that all methods share on a CPU; [S] CLD as in cifar100
        NPID | SMALL, dataset="cifar100", limit_train=10000, epochs=15, crop=[0.08, 1.0], k=200,
        knn_t=0.07, knn_every=15),
    "c10": dict(  # [K] all methods' longer run; CLD as in cifar10
        NPID | SMALL, dataset="cifar10", epochs=40, crop=[0.08, 1.0], knn_t=0.07, knn_every=8),
    "own": {k: v for k, v in (NPID | SMALL).items() if k != "k"},  # [K] your images; k = B / 2
    "cifar10": NPID | CIFAR,  # [S]; [A] kNN 86.7, NPID alone 80.8; re-run 86.8
    "cifar100": dict(  # [S] train_cifar100_npid_cld.sh; [A] kNN 57.5, NPID alone 51.6; re-run 58.8
        NPID | CIFAR, dataset="cifar100", k=200),
    "cifar10-moco": MOCO,  # [A] kNN 87.5, MoCo alone 82.1
    "cifar100-moco": dict(  # [S] train_cifar100_moco_cld.sh; "basic" augmentation
        # [A] kNN 58.1, MoCo alone 53.1; re-run with a linear head 59.1, with normlinear 59.7
        MOCO, dataset="cifar100", batch_size=128, lr=0.03, weight_decay=7e-4, queue=4096, k=100,
        lambda_cld=0.25, jitter=CIFAR["jitter"], jitter_p=1.0, blur=0.0, erase=0.0),
    "stl10": dict(  # [D] dataloader.py; there is no script: NPID, rate and epochs of CIFAR-10 [K]
        NPID | CIFAR, dataset="stl10", image_size=96, mean=[0.5] * 3, std=[0.5] * 3),
    "kitchen": dict(  # [D] CIFAR transforms at 32 px; [A] Fig. 3: best near k = 10; rest [K]
        NPID | CIFAR, dataset="folder", image_size=32, k=10),
    "imagenet100": dict(IMAGENET, queue=16384),  # [K] no published hyper-parameters
    "imagenet": IMAGENET,  # [A] linear 70.0, with an MLP head 69.2, MoCo v2 alone 67.5
    "imagenet-infomin": dict(  # [S] train_imagenet_infomin_cld.sh and its options; [A] linear 70.1
        IMAGENET, base="infomin", epochs=100, schedule="infomin", warmup=5, tau=0.15, knn_t=0.15,
        tau_cld=0.8, beta=0.5, jitter=[0.8, 0.8, 0.8, 0.2], randaugment=[2, 10]),  # "D"
}

# ---------------------------------------------------------------------------------- loss


# Each function takes unit-norm features and converts float16 and bfloat16 to float32. The rows of
# L_I are independent: every process takes its own, DDP averages. L_CLD groups the whole batch.


def upcast(x):
    """x in float32 at least; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def npid(f, V, index, tau, block=2 ** 26):
    """Instance loss of NPID with a full softmax over the bank (E2), the mean over the rows.

    Args: f (b, D) unit-norm with gradient, float16 and bfloat16 become float32; V (n, D) bank,
    float32, unit-norm; index (b,) int64, the image of each row; tau: T; block: logits to keep. The
    backward pass of a larger bank computes them again: those of ImageNet take 1.3 GB for 256 rows.
    """
    def log_sum_exp(f, part):
        return (f @ part.T).logsumexp(1)

    # A part of the bank at a time: its logits stay in the cache, which halves the time on a CPU.
    f, size = upcast(f) / tau, 2 ** 20
    if len(f) * len(V) > block:
        log_sum_exp = functools.partial(checkpoint, log_sum_exp, use_reentrant=False)
        size = 2 ** 24  # what malloc gives back at once
    parts = [log_sum_exp(f, part) for part in V.split(max(1, min(block, size) // len(f)))]
    return (torch.stack(parts).logsumexp(0) - (f * V[index]).sum(1)).mean()


def exp_similarity(f, V, idx, tau):
    """exp(f . v_j / T), numerator of E3: f (b, D), V (n, D), idx (b, 1 + m) rows -> (b, 1 + m)."""
    return ((V[idx] @ upcast(f)[:, :, None]).squeeze(2) / tau).exp()


def npid_nce(P, n, eps=1e-7):
    """Instance loss of NPID with noise-contrastive estimation (E3), the mean over the rows.

    Args: P (b, 1 + m) = exp(f . v_j / T) / Z, column 0 is the image itself; n: number of images.
    """
    m = P.shape[1] - 1
    noise = m / n  # m P_n
    own = (P[:, 0] / (P[:, 0] + noise + eps)).log()
    return -(own + (noise / (P[:, 1:] + noise + eps)).log().sum(1)).mean()


def moco(q, k, Q, tau):
    """Instance loss of MoCo (E1, E5): the key of the same image against the queue, the mean over
    the rows. Args: q (b, D); k (b, D) and queue Q (K, D) without gradient, all unit-norm, in any
    floating dtype (half precision becomes float32); tau: T."""
    q, k, Q = upcast(q), upcast(k), upcast(Q)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ Q.T], 1) / tau  # (b, 1 + K)
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))


def infomin(q, q_jig, k, Q, tau, beta):
    """Instance loss of InfoMin: queries q (2, b, D) and a jigsaw query (b, D), one key, as of
    `moco`; scalar."""
    both = (moco(q[0], k, Q, tau) + moco(q[1], k, Q, tau)) / 2
    return (1 - beta) * both + beta * moco(q_jig, k, Q, tau)


def byol(p, z):
    """BYOL: each view's prediction against the other view's target, the mean over rows and views;
    p, z (2, b, D), unit-norm."""
    return (2 - 2 * (upcast(p) * upcast(z).flip(0)).sum(2)).mean()


def cld(f, k, iters=5, tau=0.2, k_eigen=0, group_rows=0):
    """Cross-level loss (E7): each view's rows against the groups of the other view.

    Args:
        f: (2, B, D) unit-norm group features f_G of both views, with gradient; float16 and
            bfloat16 become float32.
        k, iters: see `group`.
        k_eigen: 0 groups by k-means; above 0 by normalised cuts (E10) with that many eigenvectors.
        tau: T_G > 0.
        group_rows: number of rows that are grouped together, a divisor of B; 0: all rows.
    Returns: L_CLD, scalar; the group accuracy, scalar without gradient: the share of the rows of
        view 1 whose nearest centroid of view 2 is that of their group in view 2.
    """
    losses, hits = [], []
    f = upcast(f).unflatten(1, (-1, group_rows or f.shape[1]))  # (2, parts, rows, D)
    points = cut_vectors(f, k_eigen) if k_eigen else f
    for views, points_of in zip(f.unbind(1), points.unbind(1)):
        groups = [group(x, k, iters, y) for x, y in zip(views, points_of)]
        for x, (ids, M) in zip(views, reversed(groups)):  # groups of the other view
            logits = x @ M.T / tau  # (rows, k); an empty group has logit 0, is never a target
            losses.append(F.cross_entropy(logits, ids))  # E7
            hits.append((logits.argmax(1) == ids).double().mean())
    return torch.stack(losses).mean(), torch.stack(hits[::2]).mean()


# ---------------------------------------------------------------------------------- grouping


def group(x, k, iters, points=None):
    """Groups of the rows of x (N, D): ids (N,) int64 and centroids M (k, D) (E6).

    The gradient flows through M, as in the authors' code, not through the ids. (With detached
    centroids it is about half as large.) If k is larger than N, at least k - N groups are empty.
    points: rows (N, d) that k-means groups instead of x, those of `cut_vectors`.
    """
    ids = kmeans(x, k, iters, nearest_fast) if points is None else kmeans(points, k, iters)
    return ids, centroids(x, ids, k)


def nearest(x, c):
    """Ids (N,) of the row of c (k, D) nearest to each row of x (N, D); ties go to the lower id."""
    # by differences: in x.x - 2 x.c + c.c, rounding would decide between equal centroids
    return torch.cdist(x, c, compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)


def nearest_fast(x, c):
    """The same for rows of about one norm (unit vectors), ten times as fast. A matrix product
    finds the best row, and the lowest id that equals it up to rounding. `nearest` decides between
    the two."""
    score = x @ c.T - c.square().sum(1) / 2  # (N, k), (|x|^2 - |x - c|^2) / 2
    best, ids = score.max(1, keepdim=True)
    slack = 16 * torch.finfo(x.dtype).eps * score.abs().amax()
    first = (score >= best - slack).byte().argmax(1, keepdim=True)
    two = torch.cat([first, ids], 1)  # (N, 2)
    return two.gather(1, nearest(x[:, None], c[two]))[:, 0]


@torch.no_grad()
def kmeans(x, k, iters, nearest=nearest):
    """Ids (N,) of k-means in a batch x (N, D) in `iters` rounds, without restarts (E6).

    The first centroids are the first k rows. The batch is in random order, so they are random, and
    the same images in both views. Ties go to the lower id.
    """
    ids = None
    for _ in range(iters):
        ids = nearest(x, x[:k] if ids is None else centroids(x, ids, k))  # (N,)
    return ids


def centroids(x, ids, k):
    """Means M (k, D) of the rows of x (N, D) by id, not normalised; 0 for an empty group (E6)."""
    member = (ids[:, None] == torch.arange(k, device=x.device)).to(x.dtype)  # (N, k)
    return member.T @ x / member.sum(0).clamp(min=1)[:, None]


def affinity(x, sigma=1.0):
    """Graph W (N, N) of E10: |cos| / sigma between rows of x (N, D), 0 on the diagonal."""
    x = F.normalize(x, dim=1)
    return (x @ x.T).abs().div(sigma).fill_diagonal_(0)  # opposite features count as similar


@torch.no_grad()
def cut_vectors(x, k_eigen, sigma=1.0):
    """Rows to group by normalised cuts: Y (..., N, k_eigen), column 0 all ones (E10).

    The first eigenvectors of L = D^-1/2 (D - W) D^-1/2, times D^-1/2, over the scalar Y[0, 0].
    Args: x (..., N, D); one call for several sets of rows waits for the device once.
    """
    # if features are not finite, check_loss stops the run with a message; eigh must not fail first
    W = torch.stack([affinity(part, sigma) for part in x.nan_to_num().view(-1, *x.shape[-2:])])
    d = W.sum(2).clamp(min=1e-12)  # a zero row is connected to nothing
    root = d.rsqrt()
    L = root[:, :, None] * (torch.diag_embed(d) - W) * root[:, None]
    Y = root[:, :, None] * torch.linalg.eigh(L).eigenvectors[..., :k_eigen]  # ascending eigenvalues
    return (Y / Y[:, :1, :1]).view(*x.shape[:-1], -1)


# ---------------------------------------------------------------------------------- model


def l2_normalize(x):
    """Rows of norm 1, in float32 at least; a zero row stays zero."""
    return F.normalize(upcast(x), dim=-1)


class Jigsaw(nn.Module):
    """InfoMin's head for nine patches of an image: h (9 b, d) to unit vectors (b, D)."""

    def __init__(self, kind, d, D):
        super().__init__()
        self.fc1 = common.head(kind, d, D)
        self.fc2 = common.head("normlinear" if kind.startswith("norm") else "linear", 9 * D, D)

    def forward(self, h, order):
        """order (b, 9): the patches of each image in random order."""
        patches = self.fc1(h).unflatten(0, order.shape)  # (b, 9, D)
        patches = patches.gather(1, order[:, :, None].expand_as(patches))
        return l2_normalize(self.fc2(patches.flatten(1)))


class CLD(nn.Module):
    """Backbone with a head for instances and one for groups, which share all but the last layer.

    The key network of MoCo, InfoMin and BYOL is a copy of it.
    """

    def __init__(self, args):
        super().__init__()
        self.backbone = common.resnet(args.arch, args.stem)
        if args.stem == "cifar":  # as the authors' CIFAR code leaves them
            for m in self.backbone.modules():
                if isinstance(m, nn.Conv2d):
                    m.reset_parameters()
        d, D = self.backbone.width, args.dim
        with_cld, is_byol = args.lambda_cld > 0, args.base == "byol"
        last = "normlinear" if args.head.startswith("norm") else "linear"
        mlp = args.head.endswith("mlp") and (with_cld or not is_byol)
        self.hidden = nn.Sequential(nn.Linear(d, d), nn.ReLU()) if mlp else nn.Identity()
        # BYOL's 256 outputs are D here, its 4096 hidden units are 2 d (equal for a ResNet-50)
        self.instance = self.mlp_bn(d, 2 * d, D) if is_byol else common.head(last, d, D)
        self.predictor = self.mlp_bn(D, 2 * d, D) if is_byol else None
        self.group = common.head(last, d, D) if with_cld else None
        self.jigsaw = Jigsaw(args.head, d, D) if args.base == "infomin" else None

    @staticmethod
    def mlp_bn(d_in, hidden, d_out):
        """BYOL's projector and predictor."""
        return nn.Sequential(nn.Linear(d_in, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
                             nn.Linear(hidden, d_out))

    def forward(self, x, x2=None, patches=None, order=None):
        """One pass for each view, x and x2 (b, 3, S, S), so BatchNorm sees one view at a time.

        Returns: unit vectors f_I (V, b, D); with CLD f_G (V, b, D); with BYOL the prediction p
        (V, b, D); with patches (b, 9, 3, s, s) and their order (b, 9) the jigsaw query q_jig
        (b, D). An output that the method does not have is None.
        """
        h = [self.backbone(view) for view in (x, x2) if view is not None]  # (b, d) each
        shared = [self.hidden(y) for y in h]
        z = [self.instance(y) for y in (h if self.predictor else shared)]
        f_I, f_G, p, q_jig = l2_normalize(torch.stack(z)), None, None, None
        if self.group is not None:
            f_G = l2_normalize(torch.stack([self.group(y) for y in shared]))
        if self.predictor is not None:
            p = l2_normalize(torch.stack([self.predictor(y) for y in z]))
        if patches is not None:
            q_jig = self.jigsaw(self.backbone(patches.flatten(0, 1)), order)
        return f_I, f_G, p, q_jig


def uniform_rows(n, D, random):
    """(n, D) float32 of U(-a, a), a = 1 / sqrt(D / 3): norm about 1, not exactly."""
    a = (D / 3) ** -0.5
    return (2 * torch.rand(n, D, generator=random) - 1) * a


class Bank(nn.Module):
    """NPID's memory bank: V (n, D), a row for every training image, and Z of E3 (-1: not set)."""

    def __init__(self, V):
        super().__init__()
        self.register_buffer("V", V)
        self.register_buffer("Z", V.new_tensor(-1.0))

    @torch.no_grad()
    def set_Z(self, exps):
        """Set Z, once, to n times the mean of exp(f . v / T) over the whole batch (E3)."""
        self.Z.copy_(len(self.V) * common.all_reduce_sum(exps.mean()) / common.world())

    @torch.no_grad()
    def update(self, f, index, momentum):
        """Apply E4 with view 2 of the batch, then with view 1.

        Args: f (2, B, D) unit-norm; index (B,) int64, rows of V, each at most once.
        """
        for view in f.flip(0):
            v = momentum * self.V[index] + (1 - momentum) * view.to(self.V.dtype)
            self.V[index] = F.normalize(v, dim=1)


def cut_patches(x, at, side):
    """Cut nine patches from every image x (b, 3, 3 c, 3 c), one from each cell of c x c pixels.

    Args: at (b, 9, 2): top and left of each patch in its cell.
    Returns: (b, 9, 3, side, side), the cells of an image row by row.
    """
    cell, i = x.shape[-1] // 3, torch.arange(9, device=x.device)
    corner = torch.stack([i // 3, i % 3], 1) * cell + at  # (b, 9, 2)
    pixel = corner[..., None] + torch.arange(side, device=x.device)  # (b, 9, 2, side)
    rows, columns = pixel[:, :, 0, :, None], pixel[:, :, 1, None]
    image = torch.arange(len(x), device=x.device)[:, None, None, None]
    return x[image, :, rows, columns].permute(0, 1, 4, 2, 3)  # from (b, 9, s, s, 3)


def jigsaw_sizes(size):
    """Sides of the cells and patches of InfoMin's 3 x 3 jigsaw: 85 and 64 pixels for images of 224
    pixels, other sizes in proportion [K]."""
    return round(85 * size / 224), round(64 * size / 224)


def jigsaw_augmentation(args):
    """Augmentation of the images that are cut into patches: only crop and flip."""
    return common.augmentation(args, size=3 * jigsaw_sizes(args.image_size)[0], crop=(0.6, 1.0),
                               jitter_p=0.0, gray=0.0, blur=0.0, solarize=0.0, erase=0.0,
                               randaugment=None)


def jigsaw(batch, args):
    """Patches (b, 9, 3, s, s) and their order (b, 9)."""
    x = common.augment(batch.extra[0])[0]  # (b, 3, 3 cell, 3 cell)
    patches = cut_patches(x, batch.drawn["at"], jigsaw_sizes(args.image_size)[1])
    return patches, batch.drawn["order"]


# ---------------------------------------------------------------------------------- training


def train(args):
    """Train in this process; see the top of the file."""
    check(args)
    device = common.setup(args)
    data = common.load(args, device)
    model = CLD(args).to(device, memory_format=common.memory_format(args))
    key = None if args.base == "npid" else copy.deepcopy(model).requires_grad_(False)
    bank, queue = make_memory(args, len(data.train), device)
    network = common.distribute(model, args)
    key_network = None if key is None else common.micro_batches(key, args)
    optimizer, scaler = common.optimizer(args, model), common.scaler(args, device)
    log = common.Log(args, data)
    state = dict(model=model, key=key, bank=bank, queue=queue, optimizer=optimizer, scaler=scaler,
                 log=log)
    state = {name: part for name, part in state.items() if part is not None}
    first_step, steps = common.resume(state, args), args.epochs * data.steps_per_epoch
    aug = common.augmentation(args)
    extra = [(jigsaw_augmentation(args), 1)] if args.base == "infomin" else []

    def evaluate():
        if args.knn_feature == "backbone":
            return dict(knn_top1=common.knn_accuracy(model.backbone, data))
        return dict(knn_top1=common.knn_accuracy(model, data, lambda out: out[0][0]))  # E11

    if log.lines == 1:  # a new run
        report_groups(args)
        common.start_run(state, args, data, aug, evaluate)

    views = 2 if args.base in ("npid", "byol") else 3  # MoCo, InfoMin: two queries and the key
    for batch in data.batches(first_step, steps, aug, views, extra,
                              lambda step, own: draw(step, own, len(data.train), args)):
        step = batch.step
        x = common.augment(batch)                               # (V, b, 3, S, S), this process
        with common.autocast(args, device):
            f_I, f_G, p, q_jig = network(x[0], x[1], *(jigsaw(batch, args) if extra else ()))
            keys = key_pass(key_network, x, args, step)
        if args.base == "npid":
            loss = npid_loss(f_I, bank, batch, args)                                    # E2, E3
        elif args.base == "byol":
            loss = byol(p, keys)
        elif args.base == "infomin":
            loss = infomin(f_I, q_jig, keys[batch.own], queue.keys, args.tau, args.beta)
        else:
            loss = sum(moco(q, keys[batch.own], queue.keys, args.tau) for q in f_I) / 2  # E5
        stats = {}
        if args.lambda_cld > 0:
            f_G = common.gather(f_G)                            # (2, B, D)
            L_CLD, accuracy = cld(f_G, args.k, args.iters, args.tau_cld, args.k_eigen if
                                  args.grouping == "ncuts" else 0, args.group_rows)     # E6, E7
            stats = dict(instance=loss, cld=L_CLD, group_acc=100 * accuracy)
            loss = loss + args.lambda_cld * L_CLD                                       # E8

        lr = common.set_lr(optimizer, learning_rate(step, data.steps_per_epoch, args))
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        values = common.check_loss(loss, step, stats)
        scaler.step(optimizer)
        scaler.update()
        if bank is not None:
            bank.update(common.gather(f_I.detach()), batch.rows, args.bank_momentum)    # E4
        if queue is not None:  # once; the released InfoMin code enqueues for each query
            queue.enqueue(keys)
        if key is not None:  # with the weights after the step
            common.momentum_update(key, model, args.key_momentum)
        log(step, **values, lr=lr)

        if common.end_step(step, state, args, data, evaluate):
            break
    title = args.base + (f" + CLD, k = {args.k}" if args.lambda_cld > 0 else "")
    common.summary(log, args, f"{title}, {args.dataset}", first_step,
                   panels=[("group_acc", "group accuracy (%)")])


def report_groups(args):
    """Warn if there are more groups than rows to group."""
    N = args.group_rows or args.batch_size
    if args.lambda_cld > 0 and args.k > N:
        text = (f"warning: --k {args.k} for {N} rows that are grouped together: nearly every image "
                f"is a group of its own, at least {args.k - N} are empty (logit 0)")
        common.print_rank0(text + common.origin(args, text))


def key_pass(key_network, x, args, step):
    """Of views x (V, b, 3, S, S): keys (B, D) of the whole batch from view 3 for MoCo and InfoMin,
    the targets (2, b, D) of BYOL, None for NPID. BatchNorm in training mode, no gradient."""
    if args.base == "npid":
        return None
    if args.base == "byol":
        with torch.no_grad():
            return key_network(x[0], x[1])[0]
    return common.shuffled_keys(lambda view: key_network(view)[0][0], x[2], args, step)


def npid_loss(f, bank, batch, args):
    """L_I of NPID (E2, E3), the mean over both views f (2, b, D). The first batch sets Z of the
    bank."""
    if not args.nce:
        return sum(npid(v, bank.V, batch.rows[batch.own], args.tau) for v in f) / 2  # E2
    own = batch.rows[batch.own, None]  # column 0: the image itself
    exps = [exp_similarity(v, bank.V, torch.cat([own, drawn], 1), args.tau)
            for v, drawn in zip(f, batch.drawn.values())]  # (b, 1 + m) each
    if batch.step == 0:
        bank.set_Z(exps[0])
    return sum(npid_nce(e / bank.Z, len(bank.V)) for e in exps) / 2  # E3


def make_memory(args, n, device):
    """Bank of NPID and queue of MoCo and InfoMin, or None, with their initial vectors."""
    random = common.generator(args.seed, 0, "memory")
    if args.base == "npid":
        return Bank(uniform_rows(n, args.dim, random).to(device)), None
    if args.base == "byol":
        return None, None
    if args.base == "moco":
        rows = uniform_rows(args.queue, args.dim, random)
    else:
        rows = l2_normalize(torch.randn(args.queue, args.dim, generator=random))
    return None, common.Queue(rows.to(device))


def draw(step, own, n, args):
    """Random numbers of a step, drawn for the whole batch, for its rows `own`: where InfoMin's
    patches are, `at` (b, 9, 2), and their `order` (b, 9); rows (b, m) of NPID's bank of n for
    E3, with replacement, for each view."""
    B, random = args.batch_size, functools.partial(common.generator, args.seed, step)
    if args.base == "infomin":
        (cell, side), random = jigsaw_sizes(args.image_size), random("jigsaw")
        at = torch.randint(cell - side + 1, (B, 9, 2), generator=random)
        return dict(at=at[own], order=torch.rand(B, 9, generator=random).argsort(1)[own])
    return {i: torch.randint(n, (B, args.nce), generator=random(f"nce {i}"))[own]
            for i in (0, 1) if args.nce}


def learning_rate(step, steps_per_epoch, args):
    """Learning rate of a step by --schedule: a pure function of the step."""
    warmup, epoch = args.warmup * steps_per_epoch, step // steps_per_epoch
    if args.schedule == "cosine-epoch":
        return common.cosine_by_epoch(epoch, args.epochs, args.lr)
    if args.schedule == "infomin":
        return common.warmup_by_epoch(step, steps_per_epoch, args.epochs, args.lr, args.warmup)
    if args.schedule == "steps" and step >= warmup:
        return common.steps_by_epoch(epoch + 1, args.milestones, args.lr)
    return common.warmup_cosine(step, args.epochs * steps_per_epoch, args.lr, warmup,
                                start=args.lr / 100, floor=min(args.lr, 1e-6))


# ---------------------------------------------------------------------------------- flags


def default_k(args):
    """Without --k half of the rows that are grouped together, as in the CIFAR-10 recipe."""
    if args.k is None:
        args.k = max(2, (args.group_rows or args.batch_size) // 2)


def check(args):
    """Raise BadInput for flags that do not fit together, before any data are read."""
    common.check_ranges(args, above=["tau", "tau_cld", "dim", "iters", "k_eigen", "queue"],
                        least=["lambda_cld", "nce", "warmup", "group_rows"],
                        share=["bank_momentum", "key_momentum", "beta"])
    if args.lambda_cld > 0 and args.k < 2:
        raise common.BadInput(f"--k {args.k} makes one group only, so L_CLD is 0; use at least 2, "
                              "or --lambda-cld 0")
    moco = args.base in ("moco", "mocov2", "infomin")
    for used, names, why in (
            (args.base == "npid", ["nce", "bank_momentum"], "without --base npid"),
            (moco, ["queue"], f"by --base {args.base}"),
            (args.base != "npid", ["key_momentum"], "by --base npid"),
            (args.base != "byol", ["tau"], "by --base byol"),
            (args.base == "infomin", ["beta"], "without --base infomin"),
            (args.grouping == "ncuts", ["k_eigen"], "without --grouping ncuts"),
            (args.schedule != "cosine-epoch", ["warmup"], "by --schedule cosine-epoch"),
            (args.schedule == "steps", ["milestones"], "without --schedule steps")):
        if not used:
            common.reject_unused(args, names, why)
    common.check_schedule(args, learning_rate, 10, 10 * args.warmup * (
        args.schedule != "cosine-epoch"))
    if args.schedule == "steps" and not 1 <= min(args.milestones) <= args.epochs:
        raise common.BadInput(f"--milestones {common.shown(args.milestones)}: the first must be "
                              f"from 1 to --epochs {args.epochs}, or the rate never drops")
    if moco and args.queue < args.batch_size:
        raise common.BadInput(f"--queue {args.queue} is smaller than --batch-size "
                              f"{args.batch_size}: it must hold the keys of one step")
    if args.group_rows and args.batch_size % args.group_rows:
        raise common.BadInput(f"--group-rows {args.group_rows} does not divide --batch-size "
                              f"{args.batch_size}; 0 groups the whole batch")
    N = args.group_rows or args.batch_size
    if args.lambda_cld > 0 and args.grouping == "ncuts" and not 2 <= args.k_eigen <= N:
        raise common.BadInput(f"--k-eigen {args.k_eigen}: of {N} rows that are grouped together "
                              f"there are {N} eigenvectors, of which the first is constant")


def main(argv=None):
    """Parse the flags and train; `main([...])` runs in this process."""
    parser = common.Parser("cld", __doc__, RECIPES)
    parser.complete = default_k
    add = parser.add_argument_group("CLD").add_argument
    add("--base", default="npid", choices=["npid", "moco", "mocov2", "infomin", "byol"],
        help="what CLD is added to")
    add("--lambda-cld", type=float, default=1.0, help="lambda of E8; 0: the base method alone")
    add("--k", type=int, help="groups of a view (E6); default: half of the rows")
    add("--iters", type=int, default=5, help="rounds of k-means in the batch")
    add("--tau-cld", type=float, default=0.2, help="T_G of E7")
    add("--grouping", default="kmeans", choices=["kmeans", "ncuts"], help="E6, or E10")
    add("--k-eigen", type=int, default=10, help="eigenvectors of ncuts; none is published")
    add("--group-rows", type=int, default=0, help="group parts of N rows; 0: the whole batch")
    add("--head", default="linear", choices=["linear", "normlinear", "mlp", "normmlp"],
        help="mlp: one hidden layer for both")
    add("--dim", type=int, default=128, help="D, width of f")
    add("--tau", type=float, default=0.1, help="T of E2, E3, E5")
    add("--bank-momentum", type=float, default=0.5, help="a of E4")
    add("--nce", type=int, default=0, help="m of E3; 0: full softmax over the bank (E2)")
    add("--queue", type=int, default=4096, help="K, keys of MoCo and InfoMin; K >= B")
    add("--key-momentum", type=float, default=0.999, help="alpha of the key network")
    add("--beta", type=float, default=0.5, help="InfoMin's weight of the jigsaw query")
    add("--knn-feature", default="instance", choices=["instance", "backbone"],
        help="of the weighted kNN")
    add("--schedule", default="cosine", choices=["cosine", "steps", "cosine-epoch", "infomin"],
        help="the last two by epoch")
    add("--warmup", type=int, default=5, help="epochs of linear warm-up (not: cosine-epoch)")
    add("--milestones", type=int, nargs="+", default=[120, 160, 200],
        help="steps: a tenth of the rate after these epochs")
    common.run(train, parser, argv)


if __name__ == "__main__":
    main()

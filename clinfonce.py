"""Cl-InfoNCE (Tsai, Li, Liu, Liao, Salakhutdinov, Morency: Learning Weakly-Supervised Contrastive
Representations, ICLR 2022, arXiv 2202.06670; earlier version arXiv 2106.02869).

Auxiliary information (attributes, a class hierarchy) or K-means on the features gives every image a
cluster id Z. Views of images in the same cluster are positives of each other (Fig. 1 [A]). The
equations are those of the authors' code. The paper's equation numbers could not be found, so the
labels E1 to E8 are this project's. (The label after E1 is for the pair weights in the authors'
code. No training uses them, so they are only in tests/test_golden.py.) Z is the paper's symbol, the
rest are ours. [A] marks what the authors' repository says; the paper itself could not be read.

    u_a . u_c / T = s_ac,  A(a) = all views but a,  P(a) = views in A(a) of a's cluster
    l_a = -(T/T0) 1/|P(a)| sum_{c in P(a)} [ s_ac - log sum_{c' in A(a)} exp s_ac' ]         E1
    L   = mean_a l_a                                                                         E1
    Z = image id: InfoNCE (SimCLR's NT-Xent times T/T0).  Z = class: SupCon.                 E3
    T/T0 scales loss and gradient: 1.43 at T = 0.1, T0 = 0.07; T0 = T is plain NT-Xent       E4
    dual head (for the ImageNet-100* rows of Supplementary A.1, Table 3 [A]):
    L = E1 on head 1 with Z = image id, T0 = T (E5), plus L_cl on head 2, G detached,
    h(q, G) = -1/B sum_i 1/|M_i| sum_{j in M_i} log softmax_j(q_i . G_j / T)                 E6
    L_cl = ( h(q1, G2) + h(q2, G1) ) / 2,  M_i = images j with z_j = z_i
    attributes: entropy H_j = -sum_v p_v log2 p_v, Z = the tuple of the k of highest H_j;
    quality: H(Z|T) = H(Z,T) - H(T), I(Z;T) = H(Z) - H(Z|T), T the class, bits               E7
    K-means: min over c_1..c_k of sum_i min_m |x_i - c_m|^2, x_i the unit embedding, Z_i = m E8

Labels used:  none with --clusters instance (InfoNCE) or kmeans; else label (SupCon), a column, a
              tuple a+b, attributes:K, a CSV level (10, level_12), or level_L of --hierarchy.
State kept:   the network, and one id per image (8 bytes).
Shapes:       N images, B global batch, b rows of this process, V views, D embedding width.

    torchrun --standalone --nproc_per_node=2 clinfonce.py              # demo on 2 CPU cores, 2 min
    python clinfonce.py --recipe c100-small --download                 # CIFAR-100, 3 CPU minutes
    python clinfonce.py --recipe cifar10 --download                    # one GPU
    python clinfonce.py --recipe cifar10 --micro-batch 64              # one small GPU
    torchrun --nproc_per_node=4 clinfonce.py --recipe cifar10          # four, the same global batch
    torchrun --nproc_per_node=4 clinfonce.py --recipe imagenet100 --data-dir DIR --hierarchy FILE
    torchrun --nproc_per_node=4 clinfonce.py --recipe imagenet100-kmeans --data-dir DIR
    torchrun --nproc_per_node=4 clinfonce.py --recipe imagenet100-dual --data-dir DIR
Measured: demo 1.5 minutes on 2 cores, 1 GB a process, kNN 13.5 -> 72 % (synthetic; 59 to 81 % on
other processors); c100-small 160 CPU seconds, 1.2 GB. The results are in results/README.md. The GPU
recipes have not been run at full length yet.
"""
import argparse
import json

import torch
import torch.nn.functional as F
from torch import nn

import common

# ---------------------------------------------------------------------------------- recipes

# [R] the authors' main repository, [D] their dual-head repository, [M] an earlier one of theirs,
# [K] chosen for this project, not tuned and not from the paper, whose accuracies are not known here
PAPER = dict(  # [R] run_clinfonce.sh, util.py; Cl-InfoNCE's own augmentation has no blur
    momentum=0.95, nesterov=True, weight_decay=1e-4, schedule="warmup33", base_tau=0.07,
    crop=[0.4, 1.0], jitter=[0.4, 0.4, 0.4, 0.1], gray=0.2)
SMALL = dict(  # [K] plain NT-Xent scale (T0 = T), one warm-up epoch, cosine to 0
    tau=0.2, base_tau=0.2, lr=0.5, momentum=0.9, nesterov=True, weight_decay=1e-4,
    schedule="cosine", warmup=1, batch_size=256, channels_last=True)
CIFAR = dict(  # [K] an extension: the paper has no CIFAR
    SMALL, arch="resnet18", stem="cifar", epochs=200, batch_size=512, lr=1.0, warmup=10,
    clusters="kmeans", k=1000, kmeans_warmup=20, knn_every=10, amp="auto")
ATTRIBUTES = dict(  # [K] no released script; below, bits of level 10 in the authors' CSV files
    PAPER, dataset="csv", arch="resnet50", clusters="10", tau=0.1, epochs=1000, batch_size=128,
    lr=0.1)
RECIPES = {
    "demo": dict(  # three attributes, 48 clusters; evaluated on the 24 classes shape x pattern
        SMALL, clusters="coarse+pattern+size", epochs=20, crop=[0.5, 1.0]),
    "c100-small": dict(  # the protocol that all methods share on a CPU
        SMALL, dataset="cifar100", limit_train=10000, epochs=15,
        crop=[0.08, 1.0],                           # SimCLR B.9: crop, flip, jitter 0.5, no blur
        clusters="instance", k=100, kmeans_warmup=5, knn_every=15),
    "c10": dict(  # all methods' longer run; 51 images a cluster, as [R], from a quarter on
        SMALL, dataset="cifar10", epochs=40, crop=[0.08, 1.0], clusters="instance", k=1000,
        kmeans_warmup=10, knn_every=8),
    "own": dict(SMALL, clusters="instance"),  # your images; 20 epochs at 32 px, see --help
    "cifar10": dict(CIFAR, dataset="cifar10"),
    "cifar100": dict(CIFAR, dataset="cifar100"),
    "fashion": dict(  # [K] product photographs with eight attributes
        SMALL, dataset="npz", train_file="fashion_attributes_96.npz", image_size=64, epochs=10,
        label="articleType", clusters="attributes:2"),
    "utzappos": dict(ATTRIBUTES, stem="cifar",  # I(Z;T) = 1.604, H(Z|T) = 6.210, H(T) = 3.309 [A]
                     image_size=32,  # [M]
                     mean=[0.8342, 0.8142, 0.8081], std=[0.2804, 0.3014, 0.3072]),  # [R]
    "cub": dict(ATTRIBUTES, image_size=224,  # I(Z;T) = 4.358, H(Z|T) = 4.314, H(T) = 7.644 [A]
                mean=[0.4863, 0.4999, 0.4312], std=[0.2070, 0.2018, 0.2428]),  # [R]
    "wider": dict(ATTRIBUTES, image_size=224,  # I(Z;T) = 1.893, H(Z|T) = 5.606, H(T) = 4.751 [A]
                  batch_size=40,  # [M] batch
                  mean=[0.4772, 0.4405, 0.4100], std=[0.2960, 0.2876, 0.2935]),  # [R]
    "imagenet100": dict(  # [R] run_clinfonce.sh
        PAPER, dataset="folder", arch="resnet50", image_size=224, clusters="level_12",
        tau=0.1, epochs=300, lr=0.01, batch_size=128, save_every=10,
        knn_every=50),                              # [K], as below
    "imagenet100-kmeans": dict(  # [R] run_clinfonce_kmeans.sh
        PAPER, dataset="folder", arch="resnet50", image_size=224, clusters="kmeans", k=2500,
        kmeans_warmup=0, tau=0.2, epochs=200, lr=0.03, batch_size=128, knn_every=50,
        save_every=10),                             # [K], theirs 50
    "imagenet100-dual": dict(  # [D] script/train.sh, clinfonce.py
        dataset="folder", arch="resnet50", image_size=224, clusters="kmeans", k=2500, dual=True,
        tau=0.1, epochs=200, optimizer="lars", lr=0.8485,  # 0.075 sqrt(128)
        weight_decay=1e-6, schedule="cosine", warmup=5, kmeans_warmup=5, batch_size=128,
        sync_bn=True, crop=[0.08, 1.0], jitter=[0.8, 0.8, 0.8, 0.2], blur=0.5, knn_every=50,
        save_every=5),  # the ImageNet-100* rows of Supplementary A.1, Table 3 [A]; values not known
}
WEAK = dict(crop=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1))  # [D] dual head, warm-up epochs

# ---------------------------------------------------------------------------------- loss


def cl_infonce(z, ids=None, tau=0.1, base_tau=0.07):
    """Cl-InfoNCE (E1): all V B views of a batch are anchors.

    Args:
        z: (V, B, D) embeddings of the views, unit-norm; float16 and bfloat16 become float32.
        ids: (B,) int64, the cluster Z of each image, any values. None: every image is its own
            cluster (E3), with base_tau = tau the instance head of the dual form (E5).
        tau, base_tau: T > 0, and T0 of the factor T/T0 (E4).
    Returns: scalar, the mean over the anchors that have a positive. With two views, all have one.
    """
    V, B = z.shape[:2]
    u = z.to(torch.promote_types(z.dtype, torch.float32)).flatten(0, 1)  # (VB, D), view after view
    ids = torch.arange(B, device=z.device) if ids is None else ids
    P = (ids[:, None] == ids).repeat(V, V).fill_diagonal_(False)  # (VB, VB) P(a)
    s = (u @ u.T / tau).fill_diagonal_(float("-inf"))  # s_ac over A(a): all but a
    log_p = s.log_softmax(1).masked_fill(~P, 0)
    l = -(tau / base_tau) * log_p.sum(1) / P.sum(1).clamp(min=1)  # (VB,) E1, T/T0: E4
    # differs from the released code: there, one anchor without a positive makes the loss NaN
    return l.sum() / P.any(1).sum().clamp(min=1)


def cluster_head_loss(q, ids, tau=0.1):
    """Cluster head of the dual form (E6): each view against the other view of the batch.

    Args: q (2, B, D) unit-norm, float16 and bfloat16 become float32; ids (B,) int64; tau: T.
    Returns: scalar. Only the anchors get a gradient. The two views of an image are a positive
    pair. There is no factor T/T0.
    """
    q = q.to(torch.promote_types(q.dtype, torch.float32))
    G = q.detach()  # unlike E5: the keys get no gradient
    M = (ids[:, None] == ids).to(q.dtype)  # (B, B)
    M = M / M.sum(1, keepdim=True)  # 1/|M_i| on M_i

    def h(anchors, keys):
        return -(M * (anchors @ keys.T / tau).log_softmax(1)).sum(1).mean()

    return (h(q[0], G[1]) + h(q[1], G[0])) / 2


# ---------------------------------------------------------------------------------- grouping


def entropy_bits(ids):
    """Entropy H of a column of ids (N,) in bits, from the frequencies of the ids."""
    p = torch.unique(ids, return_counts=True)[1].double() / len(ids)
    return -(p * p.log2()).sum().item()


def information(z, t):
    """Entropies and mutual information of clusters z (N,) and labels t (N,) in bits (E7): a dict of
    five floats. Images without a label (t < 0) are left out."""
    z, t = z[t >= 0], t[t >= 0]
    H_Z, H_T = entropy_bits(z), entropy_bits(t)
    H_ZT = entropy_bits(torch.unique(torch.stack([z, t]), dim=1, return_inverse=True)[1])
    return dict(H_Z=H_Z, H_T=H_T, H_Z_given_T=H_ZT - H_T, H_T_given_Z=H_ZT - H_Z,
                I_Z_T=H_Z + H_T - H_ZT)


def rank_attributes(attributes):
    """Columns of attributes (N, A) int64 by decreasing entropy (E7); ties: lower column first.

    Returns: order (A,) int64; the entropy of every column, (A,) float64 in bits, not sorted.
    """
    # rounded, so that columns of equal entropy tie whatever the order of summation
    bits = torch.tensor([entropy_bits(a) for a in attributes.T], dtype=torch.float64)
    return bits.round(decimals=12).sort(descending=True, stable=True).indices, bits


def attribute_clusters(attributes, k):
    """Ids (N,), one for each tuple of the k attributes of highest entropy, in lexicographic order
    (E7).

    Raises: ValueError unless 1 <= k <= A.
    """
    if not 1 <= k <= attributes.shape[1]:
        raise ValueError(f"{k} of {attributes.shape[1]} attributes")
    best = rank_attributes(attributes)[0][:k]
    return torch.unique(attributes[:, best], dim=0, return_inverse=True)[1]


def hierarchy_groups(tree, level):
    """Group of every leaf of a WordNet tree (dict of LabelName, Level, Subcategory) at a level.

    Goes down while Level < level. The node where it stops is the group of all leaves below it.
    Larger levels are finer. Returns: dict leaf -> group.
    """
    def leaves(node):
        below = node.get("Subcategory") or []
        return [leaf for child in below for leaf in leaves(child)] or [node["LabelName"]]

    if tree["Level"] >= level or not tree.get("Subcategory"):
        return {leaf: tree["LabelName"] for leaf in leaves(tree)}
    return {leaf: group for child in tree["Subcategory"]
            for leaf, group in hierarchy_groups(child, level).items()}


def kmeans(x, k, seed=0):
    """K-means by faiss with the authors' settings (E8). The same x gives the same ids.

    Args: x (N, D) float32 on the CPU.
    Returns: ids (N,) int64, centroids (k, D) float32, not normalised.
    """
    import faiss

    threads, x = torch.get_num_threads(), x.numpy()
    faiss.omp_set_num_threads(common.CORES)  # the same for any number of ranks
    clustering = faiss.Clustering(x.shape[1], k)
    clustering.niter, clustering.nredo, clustering.seed = 20, 5, seed
    clustering.max_points_per_centroid, clustering.min_points_per_centroid = 1000, 10
    index = faiss.IndexFlatL2(x.shape[1])
    clustering.train(x, index)
    centroids = faiss.vector_to_array(clustering.centroids).reshape(k, -1)
    ids = index.search(x, 1)[1][:, 0]
    torch.set_num_threads(threads)  # faiss may have changed torch's, and exact resuming needs it
    return torch.from_numpy(ids), torch.from_numpy(centroids.copy())


def kmeans_torch(x, k, seed=0):
    """K-means on the device of x (E8). Args and Returns are those of `kmeans`.

    On CUDA the last bits differ from run to run.
    """
    def nearest(points, c):  # |x - c|^2 = |x|^2 - 2 (x . c - |c|^2 / 2), by blocks of 2^25 numbers
        best = [(p @ c.T - (c * c).sum(1) / 2).max(1) for p in points.split(max(1, 2 ** 25 // k))]
        return torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])

    random = torch.Generator().manual_seed(seed)
    keep = torch.randperm(len(x), generator=random)[:1000 * k]  # at most 1000 points per centroid
    points = x[keep.to(x.device)]
    nudge = torch.tensor([1, -1], device=x.device).repeat(x.shape[1])[:x.shape[1]] / 1024  # (D,)
    best_fit, best_c = float("-inf"), None
    for _ in range(5):  # nredo
        c = x[keep[torch.randperm(len(keep), generator=random)[:k]].to(x.device)]  # (k, D)
        for _ in range(20):  # niter
            ids = nearest(points, c)[1]
            sums = torch.zeros_like(c, dtype=torch.float64).index_add_(0, ids, points.double())
            counts = torch.bincount(ids, minlength=k).double()
            c = (sums / counts.clamp(min=1)[:, None]).float()
            for empty in (counts == 0).nonzero().flatten().tolist():
                big = int(counts.argmax())  # split the largest cluster, as faiss does
                c[empty], c[big] = c[big] * (1 + nudge), c[big] * (1 - nudge)
                counts[empty] = counts[big] = counts[big] / 2
        fit = nearest(points, c)[0].double().sum().item()  # the higher, the closer
        if fit > best_fit:
            best_fit, best_c = fit, c
    return nearest(x, best_c)[1], best_c


def cluster_epochs(epoch, warmup, period):
    """True if an epoch starts with K-means. Epochs count from 1, in the dual form from 0.

    With a period p > 1 the first such epoch is p - 1, as in the authors' code.
    """
    return epoch >= warmup and (epoch + 1) % period == 0


def auxiliary_ids(table, args):
    """Cluster id of every training row from --clusters, and how much it tells about the labels.

    Returns: ids (N,) int64; dict of K and, if --label has classes, H(Z), H(Z|T), I(Z;T) in bits.
    """
    name, label = args.clusters, table.column(args.label)
    if name.isdigit() and name != "0":
        name = f"label_gran_{name}"  # the level of an instruction CSV
    if name.startswith("level_") and args.hierarchy is None:
        if args.dataset != "csv":
            raise common.BadInput(f"--clusters {name} needs --hierarchy FILE")
        name = f"label_gran_{name}"
    quality = {}
    if name in ("instance", "kmeans", "-1"):  # the authors' "-1" is one cluster of all images
        ids = torch.arange(len(table))
    elif name in ("label", "0"):
        ids = label
    elif name.startswith("attributes:"):
        names = args.attributes or [
            c for c, v in table.columns.items() if c not in (args.label, "class")
            and not c.startswith("label_gran") and v.unique().numel() < len(v)]
        if not names:
            raise common.BadInput(f"--clusters {name}: the data set has no attributes")
        matrix = torch.stack([table.column(c) for c in names], 1)  # (N, A)
        order, bits = rank_attributes(matrix)
        quality["attributes"] = {names[j]: round(bits[j].item(), 4) for j in order.tolist()}
        try:
            ids = attribute_clusters(matrix, k := int(name.split(":")[1]))
        except ValueError:
            raise common.BadInput(f"--clusters {name}: there are {len(names)} attributes; take "
                                  f"attributes:1 to attributes:{len(names)}") from None
        ids = ids.where(matrix[:, order[:k]].min(1).values >= 0, torch.tensor(-1))  # no value
    elif name.startswith("level_"):
        ids = _hierarchy_ids(table, args, name)
    else:
        try:
            ids, *others = (table.column(c) for c in name.split("+"))
        except common.BadInput as error:
            raise common.BadInput(f"--clusters {args.clusters}: {error}") from None
        if others:  # one id for each tuple of values
            columns = torch.stack([ids, *others], 1)  # (N, A)
            ids = torch.unique(columns, dim=0, return_inverse=True)[1]
            ids = ids.where(columns.min(1).values >= 0, torch.tensor(-1))
    if args.loss == "ce" or name not in ("instance", "kmeans", "-1"):
        if (ids < 0).any():
            raise common.BadInput(f"--clusters {args.clusters}: row {int(table.index[ids < 0][0])} "
                                  f"has id {int(ids[ids < 0][0])}; ids start at 0, -1 is no id")
        if ids.unique().numel() < 2:
            raise common.BadInput(f"--clusters {args.clusters}: one cluster has no negatives")
    if name == "kmeans" and args.k > len(ids):
        raise common.BadInput(f"--k {args.k} needs at least {args.k} images, found {len(ids)}: "
                              f"take --k {max(2, len(ids) // 50)}, about 50 images a cluster")
    if name == "kmeans" and len(ids) < 10 * args.k:
        text = f"warning: --k {args.k} for {len(ids)} images is fewer than 10 images a cluster"
        common.print_rank0(text + common.origin(args, text))
    quality["K"] = ids.unique().numel()
    if label[label >= 0].unique().numel() > 1:
        quality.update(information(ids, label))
    return ids.unique(return_inverse=True)[1] if args.loss == "ce" else ids, quality


def _hierarchy_ids(table, args, name):
    """Ids (N,) int64: the group of each row's class, -1 for rows without a label."""
    tree = common.read_text(f"--hierarchy {args.hierarchy}", args.hierarchy, json.loads)
    try:
        groups = hierarchy_groups(tree, int(name.removeprefix("level_")))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise common.BadInput(f"--hierarchy {args.hierarchy}: not a tree of LabelName, Level, "
                              f"Subcategory ({error!r})") from None
    if not (names := table.classes.get(args.label)):
        raise common.BadInput(f"--clusters {name}: column {args.label} has no class names")
    if missing := [c for c in names if c not in groups]:
        raise common.BadInput(f"--hierarchy {args.hierarchy} does not have class {missing[0]}")
    values = sorted(set(groups.values()))  # sorted: the authors' order, a set's, is arbitrary
    group, label = torch.tensor([values.index(groups[c]) for c in names]), table.column(args.label)
    return group[label.clamp(min=0)].where(label >= 0, torch.tensor(-1))


# ---------------------------------------------------------------------------------- model


class ClInfoNCE(nn.Module):
    """Encoder and heads. Maps V views (b, 3, S, S) to unit vectors (V, b, D) or class logits."""

    def __init__(self, args, classes):
        super().__init__()
        self.backbone = common.resnet(args.arch, args.stem)
        width = self.backbone.width
        if args.loss == "ce":
            self.head = nn.Linear(width, classes)
        else:
            self.head = common.head("mlp3" if args.dual else "mlp", width, args.dim)
        self.head2 = common.head("mlp3", width, args.dim) if args.dual else None
        self.normalize = args.loss != "ce"

    def forward(self, *views, second=False):
        """Returns: z of the head; with `second`, q of the dual form's cluster head, else None."""
        h = self.backbone(torch.cat(views))  # one pass: BatchNorm sees all views
        z, q = (None if head is None else head(h).float().unflatten(0, (len(views), -1))
                for head in (self.head, self.head2 if second else None))
        return [F.normalize(y, dim=2) if y is not None and self.normalize else y for y in (z, q)]


class Clusters(nn.Module):
    """Cluster id of every training image, (N,) int64. A module, so that it is saved. fixed: they
    are not those of K-means, so a resumed run must begin with the same."""

    def __init__(self, ids, fixed=False):
        super().__init__()
        self.fixed = fixed
        self.register_buffer("ids", ids.clone())

    def load_state_dict(self, state, *options):
        """Raises: ValueError if the run began with other clusters, as with another --hierarchy."""
        if self.fixed and not torch.equal(state["ids"], self.ids.cpu()):
            raise ValueError("the clusters are not those that the run began with")
        return super().load_state_dict(state, *options)

    def update(self, model, data, args, epoch):
        """Run K-means on the embeddings (E8) on rank 0 and give the ids to all processes."""
        # the outputs of head 1, not of the encoder; also in the dual form, where ids train head 2
        x = common.extract_features(model, data, data.train, resize=args.dual,
                                    select=lambda out: out[0][0],
                                    what=f"epoch {epoch}: features to cluster")
        self.ids.zero_()
        if common.rank() == 0:
            on_device = args.kmeans == "torch" or args.kmeans == "auto" and self.ids.is_cuda
            x = x.to(self.ids.device if on_device else "cpu").float()
            ids, _ = (kmeans_torch if on_device else kmeans)(x, args.k)
            self.ids.copy_(ids)
        common.all_reduce_sum(self.ids)  # the others add zeros


# ---------------------------------------------------------------------------------- training


def train(args):
    """Train in this process; see the top of the file."""
    clusterings = check(args)
    device = common.setup(args)
    data = common.load(args, device)
    if args.clusters == "kmeans" and args.k is None:
        args.k = max(2, len(data.train) // 50)  # images a cluster as in imagenet100-kmeans
    ids, quality = auxiliary_ids(data.train, args)
    model = ClInfoNCE(args, quality["K"]).to(device, memory_format=common.memory_format(args))
    clusters = Clusters(ids, fixed=args.clusters != "kmeans").to(device)
    network = common.distribute(model, args, unused=args.dual)
    optimizer, scaler = common.optimizer(args, model), common.scaler(args, device)
    log = common.Log(args, data)
    state = dict(model=model, clusters=clusters, optimizer=optimizer, scaler=scaler, log=log)
    first_step, steps = common.resume(state, args), args.epochs * data.steps_per_epoch
    label = data.train.column(args.label).to(device)
    strong = common.augmentation(args)
    weak = common.augmentation(args, **WEAK) if args.dual else strong

    def aug(step):  # weak views while the instance head of the dual form trains alone
        return weak if step < args.kmeans_warmup * data.steps_per_epoch else strong

    def evaluate():
        return dict(knn_top1=common.knn_accuracy(model.backbone, data))

    if log.lines == 1:  # a new run
        report_clusters(log, args, quality)
        common.start_run(state, args, data, strong, evaluate)

    for batch in data.batches(first_step, steps, aug, views=1 if args.loss == "ce" else 2):
        step, epoch = batch.step, batch.step // data.steps_per_epoch + 1
        if epoch in clusterings and step % data.steps_per_epoch == 0:
            with log.pause():
                clusters.update(model, data, args, epoch)
                if "H_Z" in quality:  # there are labels
                    log.write(step=step, **information(clusters.ids, label))
        x = common.augment(batch)                               # (V, b, 3, S, S), this process
        with common.autocast(args, device):
            z, q = network(*x, second=args.dual and epoch >= clusterings[0])  # (V, b, D)
        ids = clusters.ids[batch.rows]                          # (B,)
        if args.loss == "ce":  # independent rows: each process takes its own, DDP averages
            loss = F.cross_entropy(z[0], ids[batch.own])
        elif args.dual:  # differs from the released code: keys of other processes have gradients
            loss = cl_infonce(common.gather(z), tau=args.tau, base_tau=args.tau)        # E5
            if q is not None:
                loss = loss + cluster_head_loss(common.gather(q), ids, args.tau)        # E6
        else:
            loss = cl_infonce(common.gather(z), ids, args.tau, args.base_tau)           # E1

        lr = common.set_lr(optimizer, learning_rate(step, data.steps_per_epoch, args))
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        values = common.check_loss(loss, step)
        scaler.step(optimizer)
        scaler.update()
        log(step, **values, lr=lr)

        if common.end_step(step, state, args, data, evaluate):
            break
    common.summary(log, args, f"Cl-InfoNCE, clusters {args.clusters}, {args.dataset}", first_step)


def report_clusters(log, args, quality):
    """Log and print how much the clusters tell about the labels."""
    log.write(step=0, clusters=args.clusters, **quality)
    name = args.clusters + " (until the first K-means: every image)" * (args.clusters == "kmeans")
    text = ", H(Z) = {H_Z:.4f}, H(Z|T) = {H_Z_given_T:.4f}, I(Z;T) = {I_Z_T:.4f} bits, T = {}"
    common.print_rank0(f"clusters {name}: K = {quality['K']}" + (
        text.format(args.label, **quality) if "H_Z" in quality else ""))


def warmup_rule(epoch, epochs, lr, min_lr=1e-5):
    """Rate of epoch (from 1) as in the authors' util.py: linear for a third, then cosine."""
    w = max(1, int(0.33 * epochs))  # differs from the released code: no division by 0 below 4
    if epoch <= w:
        return min_lr + (lr - min_lr) * epoch / w
    return max(common.cosine_by_epoch(epoch - w, epochs - w, lr, lr * 0.1 ** 3), min_lr)


def exp_by_epoch(epoch, lr, rate=0.95, floor=1e-5):
    """Rate of epoch (from 1): lr * rate^(epoch - 1), at least `floor`."""
    return max(lr * rate ** (epoch - 1), floor)


def learning_rate(step, steps_per_epoch, args):
    """Learning rate of a step by --schedule: a pure function of the step."""
    epoch = step // steps_per_epoch + 1
    if args.schedule == "warmup33":
        return warmup_rule(epoch, args.epochs, args.lr, min(args.lr, 1e-5))
    if args.schedule == "cosine-epoch":
        return common.cosine_by_epoch(epoch, args.epochs, args.lr, args.lr * 1e-3)
    if args.schedule == "exp":
        return exp_by_epoch(epoch, args.lr, floor=min(args.lr, 1e-5))
    return common.warmup_cosine(step, args.epochs * steps_per_epoch, args.lr,
                                args.warmup * steps_per_epoch)


# ---------------------------------------------------------------------------------- flags


def check(args):
    """Raise BadInput for flags that do not fit together, before any data are read.

    Returns: the epochs (from 1) that start with K-means.
    """
    common.check_ranges(args, above=["tau", "base_tau", "dim", "k", "kmeans_every"],
                        least=["warmup", "kmeans_warmup"])
    clusterings = [epoch for epoch in range(1, args.epochs + 1) if args.clusters == "kmeans"
                   and cluster_epochs(epoch - int(args.dual), args.kmeans_warmup,
                                      args.kmeans_every)]
    if args.clusters == "kmeans":
        if args.kmeans == "faiss" or args.kmeans == "auto" and (
                args.device == "cpu" or not torch.cuda.is_available()):
            common.require("faiss", "faiss-cpu, or use --kmeans torch", "K-means on the CPU")
        if args.k == 1:
            raise common.BadInput("--k 1 makes one cluster only, so there are no negatives")
        if not clusterings:
            raise common.BadInput(
                f"K-means never runs in --epochs {args.epochs} with --kmeans-warmup "
                f"{args.kmeans_warmup} and --kmeans-every {args.kmeans_every}")
    else:
        common.reject_unused(args, ["k", "kmeans", "kmeans_warmup", "kmeans_every"],
                             "without --clusters kmeans")
    if args.schedule != "cosine":
        common.reject_unused(args, ["warmup"], f"by --schedule {args.schedule}")
    common.check_schedule(args, learning_rate, 10, 10 * args.warmup * (args.schedule == "cosine"))
    if args.batch_size < 2 and args.loss != "ce":
        raise common.BadInput("--batch-size 1 has no negatives; use at least 2")
    if args.hierarchy and not args.clusters.startswith("level_"):
        raise common.BadInput("--hierarchy goes with --clusters level_L")
    if args.attributes and not args.clusters.startswith("attributes:"):
        raise common.BadInput("--attributes goes with --clusters attributes:K")
    if args.dual and (args.clusters != "kmeans" or args.loss == "ce"):
        raise common.BadInput("--dual goes with --clusters kmeans but not with --loss ce")
    if args.loss == "ce" and args.clusters in ("kmeans", "instance", "-1"):
        raise common.BadInput("--loss ce needs --clusters with a column of ids, not "
                              f"{args.clusters}")
    if args.loss == "ce":
        common.reject_unused(args, ["tau", "base_tau"], "by --loss ce")
    if args.dual:
        common.reject_unused(args, ["base_tau"], "with --dual")
    return clusterings


def main(argv=None):
    """Parse the flags and train; `main([...])` runs in this process."""
    parser = common.Parser("clinfonce", __doc__, RECIPES)
    add = parser.add_argument_group("Cl-InfoNCE").add_argument
    add("--loss", default="cl-infonce", choices=["cl-infonce", "ce"],
        help="ce: predict the cluster id")
    add("--clusters", default="instance", help="Z: instance, label, kmeans, or columns, see above")
    add("--attributes", nargs="+", help="columns of attributes:K (default: all that can be)")
    add("--hierarchy", help="level_L: JSON tree of LabelName, Level, Subcategory")
    add("--k", type=int, help="k of K-means (E8); default: images / 50")
    add("--kmeans", default="auto", choices=["auto", "faiss", "torch"], help="auto: torch on CUDA")
    add("--kmeans-warmup", type=int, default=0,
        help="first epoch with K-means (from 1; --dual: from 0)")
    add("--kmeans-every", type=int, default=1, help="epochs between clusterings")
    add("--dual", action=argparse.BooleanOptionalAction, default=False,
        help="two heads: InfoNCE (E5) and clusters (E6)")
    add("--tau", type=float, default=0.1, help="T of E1")
    add("--base-tau", type=float, default=0.07, help="T0 of the factor T/T0 (E4; not in --dual)")
    add("--dim", type=int, default=128, help="D, width of the embedding")
    add("--schedule", default="warmup33", choices=["warmup33", "cosine", "cosine-epoch", "exp"],
        help="all but cosine by epoch")
    add("--warmup", type=int, default=0, help="epochs of linear warm-up of --schedule cosine")
    common.run(train, parser, argv)


if __name__ == "__main__":
    main()

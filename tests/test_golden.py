"""Parity with the authors: inputs and outputs of their own code, stored in tests/golden/*.npz.

The keys of a file read `group/case/name`, in some files with dots instead. Every test below takes
its cases, sizes and scalars from the keys that it finds, so that another directory with the same
scheme passes unchanged:

    GOLDEN_DIR=PATH python -m pytest tests/test_golden.py

A documented group that is missing fails, and so does a key that no test reads.
Tolerances are relative in float64 and relative to the largest entry in float32.
"""
import functools
import json
import os
import re
from collections import defaultdict
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import clinfonce
import common
import linear_eval
import ood_eval
import rince

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))

GROUPS = {  # method -> documented groups, each of which must be there
    "clinfonce": [
        "supcon", "supcon_2rank", "step", "lr", "kmeans", "kmeans_loss", "schedule", "accuracy",
        "attr", "hier_synthetic", "wordnet", "dual_1rank", "dual_2rank", "dual_step_1rank",
        "dual_step_2rank", "projection_head", "lars",
    ],
    "rince": [
        "rank1", "rank2", "rank3", "rank4", "rank2tau", "rank4tau", "rank3const", "rank3f32",
        "edge_rank2_undefined", "edge_rank2_not_in_queue", "edge_empty_queue",
        "edge_no_negatives", "edge_no_negatives_all_ranks", "edge_tiny_probability", "uni",
        "inbatch", "cifar100", "cifar", "scl", "sclsuper", "queue_fifo", "queue_ring",
        "queue_ring_exact", "queue_fifo_overfull", "ema", "trainstep", "ddp", "lr", "ood_full",
        "ood_rankdef", "retrieval", "hier",
    ],
}

DOTTED = ("cld", "rince")  # files whose keys read group.case.name
PATTERNS = defaultdict(list)  # method -> patterns of the cases that have a test, see `exercises`


# ------------------------------------------------------------------------------------- reader


@functools.cache
def arrays(method):
    """All arrays of one file by key; empty without the file, which test_group_is_there reports."""
    path = GOLDEN / f"{method}.npz"
    if not path.exists():
        return {}
    return {key.replace(".", "/") if method in DOTTED else key: array
            for key, array in np.load(path, allow_pickle=False).items()}


class Case:
    """The keys below one prefix of a file, and which of them were read."""

    def __init__(self, method, prefix):
        stem = prefix + "/"
        self.name, self.prefix, self.read = prefix.split("/")[-1], prefix, set()
        self.arrays = {
            key.removeprefix(stem): array
            for key, array in arrays(method).items()
            if key.startswith(stem)
        }

    def __contains__(self, key):
        return key in self.arrays

    def __getitem__(self, key):
        """Numbers come as a tensor, text as a str or a list of str."""
        self.read.add(key)
        array = self.arrays[key]
        return array.tolist() if array.dtype.kind == "U" else torch.from_numpy(np.array(array))

    def get(self, key, default=None):
        """A scalar as a Python number, anything else as `case[key]`; `default` without the key."""
        value = self[key] if key in self else default
        return value.item() if torch.is_tensor(value) and value.dim() == 0 else value

    def below(self, stem):
        """{name: tensor} of the keys `stem/name`."""
        keys = [key for key in self.arrays if key.startswith(stem + "/")]
        return {key.removeprefix(stem + "/"): self[key] for key in keys}

    def numbered(self, template):
        """Sorted numbers n for which a key, or its first component, is `template` with n in {}."""
        pattern = re.escape(template).replace(r"\{\}", r"(\d+)")
        found = (re.fullmatch(pattern, key.split("/")[0]) for key in self.arrays)
        return sorted({int(match[1]) for match in found if match})


def cases(method, pattern):
    """Cases whose prefix matches `pattern`, component by component (`group/*` or `group`)."""
    parts = pattern.split("/")
    prefixes = {}  # a dict keeps the order of the file
    for key in arrays(method):
        prefix = key.split("/")[: len(parts)]
        if len(prefix) == len(parts) and all(map(fnmatchcase, prefix, parts)):
            prefixes["/".join(prefix)] = None
    return [Case(method, prefix) for prefix in prefixes]


def exercises(method, pattern):
    """Run a test on every case that matches; it fails if a key of its case was never read."""
    PATTERNS[method].append(pattern)

    def decorate(test):
        @functools.wraps(test)
        def checked(case, **arguments):
            case.read.clear()
            test(case, **arguments)
            unread = sorted(case.arrays.keys() - case.read)
            assert not unread, f"{case.prefix}: never read: {unread}"

        found = cases(method, pattern)
        return pytest.mark.parametrize("case", found, ids=[case.prefix for case in found])(checked)

    return decorate


# ------------------------------------------------------------------------------------- helpers


def close(actual, expected, f64=1e-9, f32=1e-5, atol=0.0, what=""):
    """Equal shape and dtype; relative error f64, or f32 of the largest entry, plus atol."""
    if not torch.is_tensor(actual):
        actual = torch.tensor(actual, dtype=expected.dtype)
    scale = expected.abs().max().item() if expected.numel() else 0.0
    if expected.dtype == torch.float64:  # the small term is for entries that cancel to almost 0
        rtol, atol = f64, atol + 1e-3 * f64 * scale
    else:
        rtol, atol = 0.0, atol + f32 * scale
    torch.testing.assert_close(
        actual.detach(), expected, rtol=rtol, atol=atol, msg=lambda message: f"{what}: {message}"
    )


def same_partition(a, b):
    """Equal up to a relabelling: as many pairs (a_i, b_i) as there are ids in a and in b."""
    pairs = torch.stack([a, b], 1).unique(dim=0)
    return len(a) == len(b) and len(pairs) == len(a.unique()) == len(b.unique())


def leaf(x):
    return x.clone().requires_grad_()


def grad(x):
    """Gradient of a leaf, zero if nothing reached it."""
    return torch.zeros_like(x) if x.grad is None else x.grad


# ===================================================================================== completeness


@pytest.mark.parametrize(
    ("method", "group"), [(method, group) for method in GROUPS for group in GROUPS[method]]
)
def test_group_is_there(method, group):
    assert arrays(method), f"no {GOLDEN / method}.npz, or nothing in it"
    assert any(key.startswith(group + "/") for key in arrays(method)), f"no key {group}/..."


@pytest.mark.parametrize("method", GROUPS)
def test_every_key_has_a_test(method):
    """With the check in `exercises`, no key of a file stays unread."""
    found = [case for pattern in PATTERNS[method] for case in cases(method, pattern)]
    keys = {f"{case.prefix}/{name}" for case in found for name in case.arrays}
    untested = sorted(arrays(method).keys() - keys)
    assert not untested, f"keys that no test reads: {untested}"


# ===================================================================================== Cl-InfoNCE
#
# The loss takes view-major features (V, B, D); the files hold (B, V, D).


def supcon(case, z, **changes):
    """cl_infonce on the inputs of a supcon case."""
    arguments = dict(
        ids=case["labels"] if "labels" in case else None,
        mask=case["mask"].to(z.dtype) if "mask" in case else None,
        tau=case.get("temperature"),
        base_tau=case.get("base_temperature"),
        mode=case.get("contrast_mode"),
    )
    return clinfonce.cl_infonce(z, **arguments | changes)


@exercises("clinfonce", "supcon/*")
def test_supcon(case):
    """(E1), (E2). A NaN of the original marks an anchor that has no positive: we leave it out."""
    features = leaf(case["features"])
    z = features.transpose(0, 1)
    per_anchor = supcon(case, z, reduction="none")
    loss = supcon(case, z)
    loss.backward()

    soft = "mask" in case and not ((case["mask"] == 0) | (case["mask"] == 1)).all()
    f64, grad_atol = 1e-9, 1e-12
    if soft:  # the original casts the mask to float32
        f64, grad_atol = 1e-6, 1e-6 * case["grad"].abs().max().item()
    expected = case["per_anchor"]
    has_positive = expected.isfinite()
    assert per_anchor.shape == expected.shape
    assert (per_anchor[~has_positive] == 0).all()
    close(per_anchor[has_positive], expected[has_positive], f64, what="per_anchor")
    if has_positive.all():
        close(loss, case["loss"], f64, 1e-6, what="loss")
        close(features.grad, case["grad"], f64, 1e-5, atol=grad_atol, what="grad")
    else:  # differs from the released code on purpose: NaN there
        assert case["loss"].isnan() and case["grad"].isnan().all()
        close(loss, expected[has_positive].sum() / max(1, has_positive.sum()), f64, what="loss")
        assert features.grad.isfinite().all()
        if features.dtype == torch.float64:
            assert torch.autograd.gradcheck(
                lambda f: supcon(case, f.transpose(0, 1)), features, fast_mode=True
            )


@pytest.mark.parametrize("case", cases("clinfonce", "supcon/*"), ids=lambda case: case.prefix)
def test_supcon_properties(case):
    """What must hold between two calls on the same features, whatever the stored outputs are."""
    z = case["features"].transpose(0, 1)
    B = z.shape[1]
    none = dict.fromkeys(["ids", "mask"])  # unsupervised
    per_anchor = supcon(case, z, reduction="none")
    same = functools.partial(close, f64=1e-10, f32=1e-5, atol=1e-12)

    # Equivariant to the order of the batch.
    order = torch.arange(B).flip(0).roll(1)
    moved = {}
    if "labels" in case:
        moved["ids"] = case["labels"][order]
    if "mask" in case:
        moved["mask"] = case["mask"][order][:, order].to(z.dtype)
    permuted = supcon(case, z[:, order], reduction="none", **moved)
    same(permuted, per_anchor[:, order], what="permutation")

    # A rank's anchors against all keys: its columns of the whole.
    first = B // 2
    mine = {name: value[first:] for name, value in moved.items()}
    keys = dict(keys=z[:, order], first=first, reduction="none")
    if "ids" in moved:
        keys["key_ids"] = moved["ids"]
    same(supcon(case, z[:, order][:, first:], **keys, **mine), permuted[:, first:], what="slice")

    # Each instance a cluster of its own: as without ids.
    alone = supcon(case, z, **none | dict(ids=torch.arange(B)))
    same(alone, supcon(case, z, **none), what="singletons")

    # One cluster: every other column is a positive, whatever the id is called.
    together = supcon(case, z, **none | dict(ids=torch.full((B,), -1)))
    everyone = torch.ones(B, B, dtype=z.dtype)
    same(together, supcon(case, z, **none | dict(mask=everyone)), what="one cluster")

    if "labels" in case:
        ids = case["labels"]
        renamed = 1000 - 7 * ids.unique(return_inverse=True)[1]
        same(supcon(case, z, ids=renamed, reduction="none"), per_anchor, what="relabelling")
        mask = (ids[:, None] == ids).to(z.dtype)
        by_mask = supcon(case, z, ids=None, mask=mask, reduction="none")
        same(by_mask, per_anchor, what="labels as mask")


@pytest.mark.parametrize(
    "change",
    [
        dict(z=torch.ones(2, 4)),
        dict(ids=torch.arange(3)),
        dict(ids=torch.arange(4), mask=torch.eye(4)),
        dict(mode="two"),
        dict(tau=0.0),
        dict(tau=-0.1),
    ],
    ids=["dims", "length", "ids-and-mask", "mode", "tau-zero", "tau-negative"],
)
def test_supcon_bad_input(change):
    with pytest.raises(ValueError):
        clinfonce.cl_infonce(**dict(z=torch.ones(2, 4, 3)) | change)


@exercises("clinfonce", "supcon_[0-9]*rank/*")
def test_supcon_ranks(case):
    """Each rank's anchors against the keys of all, as `gather` with gradient gives them."""
    ranks = [f"rank{r}" for r in case.numbered("rank{}")]
    W = len(ranks)
    assert W > 1
    features = [leaf(case[f"{rank}/features"]) for rank in ranks]
    labels = [case[f"{rank}/labels"] if f"{rank}/labels" in case else None for rank in ranks]
    keys = torch.cat(features).transpose(0, 1)
    key_ids = None if labels[0] is None else torch.cat(labels)
    T, T0 = case.get("temperature"), case.get("base_temperature")

    losses, first = [], 0
    for rank, f, ids in zip(ranks, features, labels, strict=True):
        given = dict(ids=ids, keys=keys, key_ids=key_ids, first=first, tau=T, base_tau=T0)
        z = f.transpose(0, 1)
        per_anchor = clinfonce.cl_infonce(z, **given, reduction="none")
        losses.append(clinfonce.cl_infonce(z, **given))
        close(per_anchor, case[f"{rank}/per_anchor"], what=f"{rank} per_anchor")
        close(losses[-1], case[f"{rank}/local_loss"], f32=1e-6, what=f"{rank} local_loss")
        first += len(f)
    close(sum(losses) / W, case["global_loss"], f32=1e-6, what="global_loss")

    sum(losses).backward()  # the backward of `gather` sums over ranks
    for rank, f in zip(ranks, features, strict=True):
        close(f.grad, W * case[f"{rank}/grad_of_global_loss"], what=f"{rank} grad")


@exercises("clinfonce", "step/*")
def test_step(case):
    """A trajectory of a toy model under SGD as in util.py, T 0.1 and T0 0.07."""
    init = case.below("init")
    encoder, hidden, out = (init[f"{name}.weight"] for name in ["encoder", "head.0", "head.2"])
    model = nn.Sequential()
    model.add_module("encoder", nn.Linear(*encoder.shape[::-1]))
    head = [nn.Linear(*hidden.shape[::-1]), nn.ReLU(), nn.Linear(*out.shape[::-1])]
    model.add_module("head", nn.Sequential(*head))
    model.to(encoder.dtype).load_state_dict(init)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=case.get("lr"),
        momentum=case.get("momentum"),
        weight_decay=case.get("weight_decay"),
        nesterov=True,
    )
    taus = dict(tau=case.get("temperature", 0.1), base_tau=case.get("base_temperature", 0.07))
    inputs, losses, snapshots = case["inputs"], [], case.numbered("after{}")
    assert snapshots and snapshots[-1] <= len(inputs)
    for step, x in enumerate(inputs, 1):  # x: (V, B, features)
        z = F.normalize(model(x), dim=-1)
        ids = case["labels"][step - 1] if "labels" in case else None
        loss = clinfonce.cl_infonce(z, ids, **taus)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step in snapshots:
            for name, expected in case.below(f"after{step}").items():
                close(model.state_dict()[name], expected, f32=1e-4, what=f"after{step} {name}")
    close(torch.stack(losses), case["losses"], f32=1e-4, what="losses")


@exercises("clinfonce", "lr/*")
def test_lr(case):
    """Epochs from 1, or the iterations from 0 of the dual form."""
    lr, E = case.get("base_lr"), case.get("epochs")
    if "iters_per_epoch" in case:
        iters = case.get("iters_per_epoch")
        steps, warmup = E * iters, case.get("warmup_epochs") * iters
        ours = [common.warmup_cosine(t, steps, lr, warmup=warmup) for t in range(steps)]
    else:
        rule = {
            "warmup": lambda e: clinfonce.warmup_rule(e, E, lr),
            "cosine": lambda e: common.cosine_by_epoch(e, E, lr, floor=lr * 1e-3),
            "exp_decay": lambda e: common.exp_by_epoch(e, lr),
        }[re.match("warmup|cosine|exp_decay", case.name)[0]]
        ours = [rule(e) for e in range(1, E + 1)]
    close(ours, case["lr"], 1e-12, 1e-6)


def objective(x, centroids, ids):
    """Sum of squared distances to the assigned centroid."""
    return (x.double() - centroids.double()[ids]).square().sum().item()


def density(x, centroids, ids, temp):
    """PCL's concentration of each cluster, which Cl-InfoNCE computes and never uses (E8)."""
    distance = (x.double() - centroids.double()[ids]).norm(dim=1).numpy()
    members = [distance[ids.numpy() == m] for m in range(len(centroids))]
    mean = np.array([d.mean() / np.log(len(d) + 10) if len(d) > 1 else 0.0 for d in members])
    mean[[len(d) <= 1 for d in members]] = mean.max()
    mean = mean.clip(*np.percentile(mean, [10, 90]))
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(temp * mean / mean.mean())


@pytest.mark.parametrize("method", ["kmeans", "kmeans_torch"])
@exercises("clinfonce", "kmeans/*")
def test_kmeans(case, method):
    """(E8). Separated points have one answer; on others only the objective is compared."""
    separated = re.fullmatch("(blobs|two_levels|k1|k_equals_n|duplicates)(_.*)?", case.name)
    x, temp = case["features"], case.get("temp")
    for seed, k in enumerate(case["num_cluster"].tolist()):
        golden = {name: case[f"k{k}/{name}"] for name in ("im2cluster", "centroids_raw")}
        best = case.get(f"k{k}/objective")
        ids, centroids = getattr(clinfonce, method)(x, k, seed=seed)

        assert ids.dtype == torch.int64 and ids.shape == (len(x),)
        assert centroids.dtype == torch.float32 and centroids.shape == (k, x.shape[1])
        assert 0 <= ids.min() and ids.max() < k
        ours = objective(x, centroids, ids)
        nearest = torch.cdist(x.double(), centroids.double()).square().amin(1).sum().item()
        assert ours == pytest.approx(nearest, rel=1e-5, abs=1e-5), "not the nearest centroids"
        better = ours < 0.999 * best - 1e-5  # other starts may find what the authors' five missed
        if separated and not better:
            assert same_partition(ids, golden["im2cluster"])
            assert ours == pytest.approx(best, rel=1e-4, abs=1e-5)
            to_ours = torch.empty(k, dtype=torch.int64)
            to_ours[golden["im2cluster"]] = ids  # their id -> our id
            present = golden["im2cluster"].unique()
            theirs = golden["centroids_raw"][present]
            close(centroids[to_ours[present]], theirs, f32=1e-4, what="centroids")
        else:
            assert ours <= 1.02 * best + 1e-5
        again = getattr(clinfonce, method)(x, k, seed=seed)[0]
        assert torch.equal(again, ids), "equal features and seed, other ids"
        if "true_partition" in case and k == len(case["true_partition"].unique()):
            assert same_partition(ids, case["true_partition"])

        # What the authors also store, and what we have no use for.
        theirs = objective(x, golden["centroids_raw"], golden["im2cluster"])
        assert theirs == pytest.approx(best, rel=1e-6, abs=1e-9)
        unit = F.normalize(golden["centroids_raw"], dim=1)
        close(unit, case[f"k{k}/centroids_normalised"], what="centroids_normalised")
        expected = case[f"k{k}/density"]
        theirs = density(x, golden["centroids_raw"], golden["im2cluster"], temp).to(expected.dtype)
        if expected.isnan().any():  # each point is a centroid: 0 / 0
            assert expected.isnan().all() and theirs.isnan().all()
        else:
            close(theirs, expected, f64=1e-6, f32=1e-6, what="density")
        last = case.get(f"k{k}/last_reported_obj")  # of the last restart, not of the best one
        sample = min(1.0, 1000 * k / len(x))  # faiss trains on 1000 points per centroid at most
        assert last >= (0.999 if sample == 1 else 0.9) * sample * best - 1e-5


@exercises("clinfonce", "kmeans_loss")
def test_kmeans_loss(case):
    features = leaf(case["features"])
    ids = case["im2cluster"][case["index"]]
    loss = clinfonce.cl_infonce(
        features.transpose(0, 1),
        ids,
        tau=case.get("temperature"),
        base_tau=case.get("base_temperature", 0.07),
    )
    loss.backward()
    close(loss, case["loss"], f32=1e-6, what="loss")
    close(features.grad, case["grad"], what="grad")


@exercises("clinfonce", "schedule")
def test_schedule(case):
    """Whether an epoch, counted from 1, begins with a clustering."""
    for name in case.arrays:
        warmup, period = map(int, re.fullmatch(r"warmup(\d+)_period(\d+)", name).groups())
        expected = case[name].tolist()
        ours = [clinfonce.cluster_epochs(e, warmup, period) for e in range(1, len(expected) + 1)]
        assert ours == expected, name


@exercises("clinfonce", "accuracy")
def test_accuracy(case):
    topk = case["topk"].tolist()
    percent = common.accuracy(case["logits"], case["target"], topk)
    assert [float(p) for p in percent] == pytest.approx(case["percent"].tolist(), rel=1e-6)


@exercises("clinfonce", "attr/*")
def test_attributes(case):
    """(E7)."""
    A, T = case["attributes"], case["class"]
    order, entropies = clinfonce.rank_attributes(A)
    assert order.dtype == torch.int64 and torch.equal(order, case["order"])
    close(entropies, case["entropy_bits"], what="entropy_bits")
    for column, expected in zip(A.T, case["entropy_bits"].tolist(), strict=True):
        assert clinfonce.entropy_bits(column) == pytest.approx(expected, rel=1e-9, abs=1e-12)

    ks, coarser = case.numbered("k{}"), torch.zeros(len(A), dtype=torch.int64)
    assert ks
    for k in ks:
        Z = clinfonce.attribute_clusters(A, k)
        assert Z.dtype == torch.int64 and torch.equal(Z, case[f"k{k}/cluster"])
        assert len(Z.unique()) == case.get(f"k{k}/num_clusters")
        assert same_partition(torch.stack([Z, coarser], 1).unique(dim=0, return_inverse=True)[1], Z)
        coarser = Z  # a larger k refines a smaller one
        bits = clinfonce.information(Z, T)
        for name in ["H_Z", "H_Z_given_T", "H_T_given_Z", "I_Z_T"]:
            expected = case.get(f"k{k}/{name}")
            assert bits[name] == pytest.approx(expected, rel=1e-9, abs=1e-9), (k, name)
        assert bits["H_T"] == pytest.approx(bits["I_Z_T"] + bits["H_T_given_Z"], abs=1e-9)


def synthetic_clusters(T, depth):
    """Reference of generate.py: inside each class, groups of 2^depth shuffled instances."""
    ids, first = torch.empty_like(T), 0
    for c in T.unique():
        members = torch.where(T == c)[0].numpy()
        shuffled = np.random.RandomState(0).permutation(members)  # the seed is set for each class
        group = torch.arange(len(members)) // 2**depth
        ids[shuffled] = first + group
        first += int(group.max()) + 1
    return ids


@exercises("clinfonce", "hier_synthetic")
def test_hier_synthetic(case):
    """From one instance per cluster to one class per cluster, at a fixed I(Z;T)."""
    T, depths = case["class"], case.numbered("depth{}")
    largest = T.unique(return_counts=True)[1].max().item()
    assert depths == list(range((largest - 1).bit_length() + 1))
    for depth in depths:
        Z = case[f"depth{depth}"].long()
        assert same_partition(synthetic_clusters(T, depth), Z)
        bits = clinfonce.information(Z, T)
        for name in ["H_Z_given_T", "I_Z_T"]:
            expected = case.get(f"depth{depth}_{name}")
            assert bits[name] == pytest.approx(expected, rel=1e-9, abs=1e-9), (depth, name)
    assert same_partition(case[f"depth{depths[-1]}"].long(), T)


@exercises("clinfonce", "wordnet")
def test_wordnet(case):
    tree, leaves = json.loads(case["tree_json"]), case["leaves"]
    roots = tree if isinstance(tree, list) else [tree]
    levels = case.numbered("level{}_group")
    assert levels
    for level in levels:
        groups = {}
        for root in roots:
            groups |= clinfonce.hierarchy_groups(root, level)
        assert [groups[name] for name in leaves] == case[f"level{level}_group"], level


def dual_loss(r, h1, h2, ids, tau):
    """(E5), (E6) of rank r from all ranks' RAW head outputs h1, h2 (2, b, D) and ids, or None.

    Other ranks' features, and all keys of the cluster head, are constants in the original.
    Returns (instance loss, cluster loss or None).
    """
    p, q = ([F.normalize(h, dim=-1) for h in hs] for hs in (h1, h2))
    b = p[r].shape[1]
    keys = torch.cat([x if i == r else x.detach() for i, x in enumerate(p)], dim=1)
    instance = clinfonce.cl_infonce(p[r], keys=keys, first=r * b, tau=tau, base_tau=tau)
    if ids is None:
        return instance, None
    keys = torch.cat(q, dim=1).detach()
    return instance, clinfonce.cluster_head_loss(q[r], keys, ids[r], torch.cat(ids), tau)


def dual_logits(p, r, tau):
    """Reference of network/clinfo.py: columns [p1; p2; O1; O2] without a row's own, and targets."""
    b = p[r].shape[1]
    Q = p[r].flatten(0, 1)  # [p1; p2]
    O1, O2 = ([x[view] for i, x in enumerate(p) if i != r] for view in (0, 1))
    logits = Q @ torch.cat([Q, *O1, *O2]).T / tau
    itself = torch.eye(*logits.shape, dtype=torch.bool)
    i = torch.arange(b)
    return logits[~itself].view(2 * b, -1), torch.cat([b - 1 + i, i])


@exercises("clinfonce", "dual_[0-9]*rank/*")
def test_dual(case):
    """Losses of each rank and their gradients at its own raw head outputs."""
    ranks = [f"rank{r}" for r in case.numbered("rank{}")]
    tau = case.get("temperature", 0.1)
    outputs = ["view1_head1", "view2_head1", "view1_head2", "view2_head2"]
    for r, rank in enumerate(ranks):
        raw = [{name: leaf(case[f"{s}/{name}"]) for name in outputs} for s in ranks]
        h1 = [torch.stack([x["view1_head1"], x["view2_head1"]]) for x in raw]
        h2 = [torch.stack([x["view1_head2"], x["view2_head2"]]) for x in raw]
        logits, targets = dual_logits([F.normalize(h, dim=-1) for h in h1], r, tau)
        close(logits, case[f"{rank}/logits"], what="logits")
        assert torch.equal(targets, case[f"{rank}/targets"])

        warmup = f"{rank}/cluster_labels" not in case
        ids = None if warmup else [case[f"{s}/cluster_labels"] for s in ranks]
        instance, cluster = dual_loss(r, h1, h2, ids, tau)
        close(instance, case[f"{rank}/infonce_loss"], f32=1e-6, what="infonce_loss")
        close(F.cross_entropy(logits, targets), case[f"{rank}/infonce_loss"], f32=1e-6)
        total = instance
        if not warmup:
            close(cluster, case[f"{rank}/cluster_loss"], f32=1e-6, what="cluster_loss")
            total = instance + cluster
        close(total, case[f"{rank}/total_loss"], f32=1e-6, what="total_loss")

        total.backward()
        for name in outputs:
            close(grad(raw[r][name]), case[f"{rank}/grad_{name}"], what=f"{rank} grad_{name}")
            assert (raw[r][name].grad is None) == (warmup and name.endswith("head2"))
            assert not any(grad(x[name]).any() for x in raw if x is not raw[r])  # constants


@exercises("clinfonce", "dual_step_[0-9]*rank")
def test_dual_step(case):
    """Steps under DDP and LARS (the authors' values); gradients are averaged by hand.

    The first step has no ids: head2 has no gradient (stored as empty) and stays as it is.
    """
    ranks = [f"rank{r}" for r in case.numbered("rank{}")]
    init = case.below("init")
    model = nn.ModuleDict(
        {name: nn.Linear(*init[f"{name}.weight"].T.shape) for name in ["net", "head1", "head2"]}
    )
    model.to(init["net.weight"].dtype).load_state_dict(init)
    named = dict(model.named_parameters())
    groups = common.lars_groups(model.named_parameters(), case.get("weight_decay", 1e-6))
    optimizer = common.LARS(
        groups,
        lr=case.get("lr"),
        momentum=case.get("momentum", 0.9),
        trust_coef=case.get("trust_coef", 0.001),
    )
    tau = case.get("temperature", 0.1)
    views = [torch.stack([case[f"{rank}/view{v}"] for v in (1, 2)], 1) for rank in ranks]
    labels = [case[f"{rank}/cluster_labels"] for rank in ranks]
    losses, snapshots = [], case.numbered("after{}")
    assert snapshots and snapshots[-1] <= len(views[0])
    for step in range(len(views[0])):
        expected = case.below(f"ddp_grad_step{step}")  # empty where it was not stored
        has_ids = all(g.numel() for g in expected.values())
        optimizer.zero_grad(set_to_none=True)
        h = [model["net"](x[step]) for x in views]  # (2, b, hidden) of each rank
        h1, h2 = ([model[head](x) for x in h] for head in ("head1", "head2"))
        ids = [z[step] for z in labels] if has_ids else None
        total = [dual_loss(r, h1, h2, ids, tau) for r in range(len(ranks))]
        total = [sum(part for part in parts if part is not None) for parts in total]
        losses.append(torch.stack(total).detach())
        torch.stack(total).mean().backward()  # DDP averages over ranks
        for name, g in expected.items():
            if g.numel():
                close(named[name].grad, g, f32=1e-4, what=f"step {step} gradient of {name}")
            else:
                assert named[name].grad is None, name
        optimizer.step()
        if step + 1 in snapshots:
            after = case.below(f"after{step + 1}")
            for name, p in after.items():
                close(named[name], p, f32=1e-4, what=f"after{step + 1} {name}")
    assert case.numbered("ddp_grad_step{}")
    for rank, ours in zip(ranks, torch.stack(losses, 1), strict=True):
        close(ours, case[f"{rank}/losses"], f32=1e-4, what=f"{rank} losses")


@exercises("clinfonce", "projection_head")
def test_projection_head(case):
    """Head of the dual form: outputs, and the running statistics after one training batch."""
    init = case.below("init")
    (hidden, d_in), d_out = init["linear1.weight"].shape, len(init["linear3.weight"])
    head = common.MLP3(d_in, hidden, d_out).to(init["linear1.weight"].dtype)
    head.load_state_dict(init)
    close(head.train()(case["input"]), case["output_train"], what="output_train")
    after = case.below("after")
    assert after
    for name, expected in after.items():
        close(head.state_dict()[name], expected, what=name)
    close(head.eval()(case["input"]), case["output_eval"], what="output_eval")


@exercises("clinfonce", "lars")
def test_lars(case):
    """util/LARS.py; a weight that starts at zero has trust ratio 1."""
    parameters = {name: nn.Parameter(p) for name, p in case.below("init").items()}
    groups = common.lars_groups(parameters.items(), case.get("weight_decay"))
    optimizer = common.LARS(
        groups,
        lr=case.get("lr"),
        momentum=case.get("momentum"),
        trust_coef=case.get("trust_coef"),
    )
    steps = case.numbered("grad{}")
    assert steps == list(range(len(steps))) and steps
    for step in steps:
        for name, g in case.below(f"grad{step}").items():
            parameters[name].grad = g
        optimizer.step()
        after = case.below(f"after{step + 1}")
        assert after.keys() == parameters.keys()
        for name, expected in after.items():
            close(parameters[name], expected, 1e-10, 1e-6, what=f"after{step + 1} {name}")


# ===================================================================================== RINCE

RINCE_FORMS = {"in": "in", "out": "out", "outin": "out-in"}


def distance_table(class_dist, taus, low, high):
    """(C, C) ranks of the loss cases: hop distances d as rank d + 1, those without a term 0.

    The original counts only the ranks of the classes in the batch; they are numbered anew here.
    """
    r = len(taus)
    steps = [round(4 * (tau - low) / (high - low)) for tau in taus] if high > low else range(r)
    table = torch.zeros_like(class_dist)
    for rank, distance in enumerate(steps, 1):
        table[class_dist == distance] = rank
    return table, list(steps)


def check_rince(case, stem, a, p, keys, R, taus, cumulative=False):
    """loss, loss_per_rank, per_anchor, n_pos, n_neg and grad_anchor below `stem` of a case."""
    form, taus = RINCE_FORMS[stem.split("/")[-1]], taus.tolist()
    exact = a.dtype == torch.float64
    f64 = 1e-9 if exact else 1e-5
    a = leaf(a)

    def terms(rows=slice(None), form=form, **more):
        return rince.rince(a[rows], p[rows], keys, R[rows], taus, form, cumulative, **more)

    loss = rince.mean_of_ranks(*terms())
    loss.backward()
    sums, counts = terms()
    close((sums / counts.clamp(min=1)).double(), case[f"{stem}/loss_per_rank"], f64, atol=1e-11,
          what="per rank")
    n_pos = torch.stack([terms([n], "out", min_prob=0)[1] for n in range(len(a))])
    assert torch.equal(n_pos, case[f"{stem}/n_pos"])
    if f"{stem}/n_neg" in case:
        n_neg = torch.stack([((R == 0) | (R > i)).sum(1) for i in range(1, len(taus) + 1)], 1)
        assert torch.equal(n_neg, case[f"{stem}/n_neg"])
    empty = (n_pos.sum(0) == 0).any()  # then the original's total is a float32 number
    close(loss.double(), case[f"{stem}/loss"].double(), 1e-6 if empty else f64, atol=1e-11,
          what="loss")
    close(grad(a), case[f"{stem}/grad_anchor"], 1e-6 if empty else f64, atol=1e-11, what="grad")
    per_anchor = [(s / c).where(c > 0, torch.nan) for s, c in map(terms, [[n] for n in
                                                                          range(len(a))])]
    expected = case[f"{stem}/per_anchor"]
    per_anchor = torch.stack(per_anchor).double()
    assert torch.equal(per_anchor.isnan(), expected.isnan())
    close(per_anchor.nan_to_num(), expected.nan_to_num(), f64, atol=1e-11, what="per anchor")


def check_queue_case(case):
    """(E1) to (E6) on a queue; returns R and the temperatures."""
    low, high, taus = case.get("min_tau"), case.get("max_tau"), case["taus"]
    table, steps = distance_table(case["class_dist"], taus.tolist(), low, high)
    R = rince.rank_of(case["labels"], case["queue_labels"], table)
    theirs = torch.zeros_like(R)
    for rank, distance in enumerate(steps, 1):  # theirs has gaps where a rank is not defined
        theirs[:, 1:][case["rank_of_queue"] == distance + 1] = rank
    theirs[:, 0] = 1
    assert torch.equal(R, theirs)
    ours = rince.temperatures(max(steps) + 1, low, high)
    close([ours[s] for s in steps], taus, 1e-6, what="temperatures")
    for stem in RINCE_FORMS:
        check_rince(case, stem, case["anchor"], case["pos"], case["queue"], R, taus)
    return R, taus


@exercises("rince", "rank*")
def test_rince(case):
    check_queue_case(case)


@exercises("rince", "edge_*")
def test_rince_edges(case):
    """An empty queue, ranks without positives or negatives, tiny pi."""
    check_queue_case(case)


@exercises("rince", "uni")
def test_rince_uni(case):
    """One positive a rank: there is nothing to draw, and both forms are one."""
    R, taus = check_queue_case(case)
    u = torch.rand(len(R), len(taus), generator=torch.Generator().manual_seed(0))
    assert torch.equal(rince.one_per_rank(R, u), R)
    losses = torch.stack([case[f"{stem}/loss"] for stem in RINCE_FORMS])
    close(losses, losses[:1].expand_as(losses))


@exercises("rince", "inbatch")
def test_rince_in_batch(case):
    """Without a queue the candidates are the keys of the other images of the batch."""
    taus = case["taus"]
    table, _ = distance_table(case["class_dist"], taus.tolist(), case.get("min_tau"),
                              case.get("max_tau"))
    R = rince.rank_of(case["labels"], case["labels"], table, first=0)
    for stem in RINCE_FORMS:
        check_rince(case, stem, case["anchor"], case["pos"], case["pos"], R, taus)


def cifar_table():
    """Ranks of the fine classes, from the chain fine, coarse."""
    coarse = Case("rince", "cifar100")["fine_to_coarse"]
    return rince.chain_ranks(torch.stack([torch.arange(len(coarse)), coarse], 1))


@exercises("rince", "cifar100")
def test_cifar100_classes(case):
    names, coarse = case["fine_names"], case["fine_to_coarse"]
    table = cifar_table()
    assert len(names) == len(table) and names == sorted(names)
    assert torch.equal(table == 1, torch.eye(len(table), dtype=torch.bool))
    assert torch.equal(table > 0, coarse[:, None] == coarse)
    for name, siblings in (("apple", "mushroom orange pear sweet_pepper"),):
        row = table[names.index(name)]
        assert [names[i] for i in (row == 2).nonzero().flatten()] == siblings.split()
    assert torch.equal(coarse.bincount(), torch.full((int(coarse.max()) + 1,), 5))


def cifar_inputs(case):
    return case["anchor"], case["pos"], case["queue"]


@exercises("rince", "cifar")
def test_rince_on_cifar(case):
    """Rank 2: the siblings (same0), or own class and siblings, as their command trains (same1)."""
    R = rince.rank_of(case["labels"], case["queue_labels"], cifar_table())
    close(rince.temperatures(len(case["taus"]), 0.1, 0.6), case["taus"], 1e-6)
    for same, cumulative in (("same0", False), ("same1", True)):
        for stem in RINCE_FORMS:
            check_rince(case, f"{same}/{stem}", *cifar_inputs(case), R, case["taus"], cumulative)


@exercises("rince", "scl*")
def test_scl(case):
    """One rank: the class, or the superclass with labels of its own."""
    cifar = Case("rince", "cifar")
    labels = case if "labels" in case else cifar
    y, y_keys = labels["labels"], labels["queue_labels"]
    table = torch.eye(int(max(y.max(), y_keys.max())) + 1, dtype=torch.int64)
    R = rince.rank_of(y, y_keys, table)
    if "labels" in case:
        coarse = Case("rince", "cifar100")["fine_to_coarse"]
        assert torch.equal(coarse[cifar["labels"]], y)
    for stem in ("in", "out"):
        check_rince(case, stem, *cifar_inputs(cifar), R, case["taus"])


def contents_of(keys, labels):
    """Rows of a queue in an order of their own."""
    return torch.cat([keys, labels[:, None].to(keys.dtype)], 1).unique(dim=0)


def check_queue(case, ring):
    def turned(x):  # a list loses its last row first, a ring the one at its pointer
        return x.clone() if ring else x.flip(0)

    queue = common.Queue(turned(case["queue0"]))
    queue.labels.copy_(turned(case["labels0"]))
    for step in case.numbered("step{}"):
        now = case.below(f"step{step}")
        queue.enqueue(turned(now["keys"]), turned(now["key_labels"]))
        if ring:
            assert torch.equal(queue.keys, now["queue"])
            assert torch.equal(queue.labels, now["queue_labels"])
            assert queue.ptr == now["ptr"] % len(queue.keys)
        assert torch.equal(contents_of(queue.keys, queue.labels),
                           contents_of(now["queue"], now["queue_labels"]))


@exercises("rince", "queue_ring*")
def test_queue_ring(case):
    """Their pointer is K where ours is 0."""
    check_queue(case, ring=True)


@exercises("rince", "queue_fifo")
def test_queue_list(case):
    """A list with the newest first has the same keys in another order."""
    check_queue(case, ring=False)


@exercises("rince", "queue_fifo_overfull")
def test_queue_smaller_than_the_batch(case):
    """The original's list grows to the batch; here that is an error."""
    keys = case["keys"]
    assert torch.equal(case["queue"], keys) and torch.equal(case["queue_labels"],
                                                            case["key_labels"])
    with pytest.raises(ValueError):
        common.Queue(torch.zeros(len(keys) - 1, keys.shape[1])).enqueue(keys, case["key_labels"])


@exercises("rince", "ema")
def test_momentum_encoder(case):
    """(E7) on weights, biases and BatchNorm's weights; its running statistics stay."""
    d_out, d_in = case["w_k0"].shape
    m = case.get("m")

    def network(w, b, bn):
        module = nn.Sequential(nn.Linear(d_in, d_out), nn.BatchNorm1d(d_out)).double()
        with torch.no_grad():
            for p, value in zip(module.parameters(), (w, b, bn), strict=False):
                p.copy_(value)
        return module

    first = case.below("step0")
    before = (first["bn_w_k"] - (1 - m) * first["bn_w_q"]) / m  # not stored
    key = network(case["w_k0"], case["b_k0"], before)
    key[1].running_mean.copy_(case["rm_k0"])
    for step in case.numbered("step{}"):
        now = case.below(f"step{step}")
        common.momentum_update(key, network(now["w_q"], now["b_q"], now["bn_w_q"]), m)
        for ours, name in ((key[0].weight, "w_k"), (key[0].bias, "b_k"), (key[1].weight, "bn_w_k"),
                           (key[1].running_mean, "rm_k")):
            close(ours, now[name], what=f"step {step} {name}")


def linear_pair(case):
    """Bias-free linear encoders f_q and f_k, the queue, and SGD, as a training case begins."""
    w_q, w_k = (nn.ParameterList([nn.Parameter(case["w0"].clone())]) for _ in range(2))
    queue = common.Queue(case["queue0"].clone())
    queue.labels.copy_(case["labels0"])
    sgd = torch.optim.SGD(w_q.parameters(), case.get("lr"), case.get("momentum"),
                          weight_decay=case.get("weight_decay"))
    taus = rince.temperatures(2, case.get("min_tau"), case.get("max_tau"))
    return w_q, w_k, queue, sgd, torch.tensor(taus).tolist()  # rounded to float32, as theirs are


@exercises("rince", "trainstep/*")
def test_rince_steps(case):
    """Whole steps, out-in. The CIFAR code updates f_k after the keys, and its rank 2 is cumulative;
    ours is the order of the other branch."""
    cifar = case.name == "cifar"
    w_q, w_k, queue, sgd, taus = linear_pair(case)
    if cifar:
        queue.keys, queue.labels = queue.keys.flip(0), queue.labels.flip(0)
        table = cifar_table()
    else:
        table = distance_table(case["class_dist"], taus, case.get("min_tau"),
                               case.get("max_tau"))[0]
    for step in case.numbered("step{}"):
        now = case.below(f"step{step}")
        a = F.normalize(now["x_q"] @ w_q[0].T, dim=1)
        if not cifar:
            common.momentum_update(w_k, w_q, case.get("m"))
        p = F.normalize(now["x_k"] @ w_k[0].T, dim=1).detach()
        R = rince.rank_of(now["labels"], queue.labels, table)
        terms = rince.rince(a, p, queue.keys, R, taus, "out-in", cifar)
        loss = rince.mean_of_ranks(*terms)
        sgd.zero_grad()
        loss.backward()
        f64 = 1e-9 if step and (terms[1] > 0).all() else 1e-6
        close(loss.double(), now["loss"].double(), f64, atol=1e-11, what=f"step {step} loss")
        close(w_q[0].grad, now["grad_w"], f64, 1e-6, what=f"step {step} gradient")
        if cifar:
            common.momentum_update(w_k, w_q, case.get("m"))
        sgd.step()
        turned = (lambda t: t.flip(0)) if cifar else (lambda t: t)  # see check_queue
        queue.enqueue(turned(p), turned(now["labels"]))
        # a first step that was float32 in the original stays visible in the weights
        close(w_q[0], now["w_q"], 1e-6, what=f"step {step} w_q")
        close(w_k[0], now["w_k"], 1e-6, what=f"step {step} w_k")
        close(contents_of(queue.keys, queue.labels),
              contents_of(now["queue"], now["queue_labels"]), 1e-6, what=f"step {step} queue")
        if not cifar:
            assert torch.equal(queue.labels, now["queue_labels"])
            assert queue.ptr == now["ptr"] % len(queue.keys)


@exercises("rince", "ddp")
def test_rince_ranks(case):
    """Two processes of the original: each takes the mean over its own anchors or pairs.

    Passing local counts gives their numbers. Ours are the global mean: the same for the mean over
    anchors where all have a positive, another for pairs.
    """
    x, labels = case["x"], case["labels"]  # (steps, W, 2, B, D), (steps, W, B)
    differs = []
    for variant, form in RINCE_FORMS.items():
        w_q, w_k, queue, sgd, taus = linear_pair(case)
        table = distance_table(case["class_dist"], taus, case.get("min_tau"),
                               case.get("max_tau"))[0]
        for step in range(len(x)):
            now = case.below(f"{variant}/step{step}")
            common.momentum_update(w_k, w_q, case.get("m"))
            terms, local, keys = [], [], []
            sgd.zero_grad()
            for r in range(x.shape[1]):
                y = labels[step, r]
                raw = F.normalize(x[step, r, 0] @ w_q[0].T, dim=1)
                a = raw.detach().requires_grad_()
                p = F.normalize(x[step, r, 1] @ w_k[0].T, dim=1).detach()
                R = rince.rank_of(y, queue.labels, table)
                terms.append(rince.rince(a, p, queue.keys, R, taus, form))
                keys.append(p)
                loss = rince.mean_of_ranks(*terms[-1])
                local.append(loss.item())
                loss.backward()
                raw.backward(a.grad / x.shape[1])  # DDP's mean
                empty = (terms[-1][1] == 0).any()  # a float32 total, now or in a step before
                f64 = 1e-6 if empty or step else 1e-9
                stem = f"rank{r}"
                close(loss.double(), now[f"{stem}/loss"].double(), 1e-6, what=f"{stem} loss")
                close(a, now[f"{stem}/anchor"], 1e-6, what=f"{stem} anchor")
                close(p, now[f"{stem}/key"], 1e-6, what=f"{stem} key")
                close(a.grad, now[f"{stem}/grad_anchor"], f64, 1e-6, what=f"{stem} gradient")
            close(w_q[0].grad, now["grad_w_mean"], 1e-6, what="gradient")
            # the rule of `train`: sums over the ranks' counts added up, times W
            counts = sum(c for _, c in terms)
            ours = [len(terms) * rince.mean_of_ranks(s, counts).item() for s, _ in terms]
            mean = sum(ours) / len(ours)
            differs.append(abs(mean - sum(local) / len(local)))
            y, p = labels[step].flatten(), torch.cat(keys)
            a = F.normalize(x[step, :, 0].flatten(0, 1) @ w_q[0].T, dim=1)
            R = rince.rank_of(y, queue.labels, table)
            close(mean, rince.mean_of_ranks(*rince.rince(a, p, queue.keys, R, taus, form)).detach(),
                  what="one process")
            sgd.step()
            queue.enqueue(p, y)
            for ours, name in ((w_q[0], "w_q"), (w_k[0], "w_k"), (queue.keys, "queue")):
                close(ours, now[name], 1e-6, what=f"{variant} step {step} {name}")
            assert torch.equal(queue.labels, now["queue_labels"])
            assert queue.ptr == now["ptr"] % len(queue.keys)
    assert max(differs) > 1e-2


@exercises("rince", "lr/*")
def test_rince_rates(case):
    lr, epochs, cosine, warm, rate, iterations = case["config"].tolist()
    epochs, iterations = int(epochs), int(iterations)
    each = range(1, epochs + 1)
    if not cosine:
        close([common.steps_by_epoch(e, [60, 75, 90], lr, rate) for e in each], case["epoch_lr"],
              1e-12)
        recipe = linear_eval.RECIPES["cifar"]
        assert recipe["milestones"] == [60, 75, 90] and recipe["schedule"] == "steps"
        return
    close([common.cosine_by_epoch(e, epochs, lr, lr * rate ** 3) for e in each], case["epoch_lr"],
          1e-12)
    given = case["iter_lr_epochs_1_to_11"]  # (11, iterations)
    warmup = 10 if warm else 0
    close([rince.paper_rate(step, iterations, epochs, lr, warmup, rate)
           for step in range(given.numel())], given.flatten(), 1e-12)


@exercises("rince", "ood_*")
def test_ood_gaussian(case):
    """The class-conditional Gaussian and its AUROC; rows of the file: outliers, then inliers."""
    x = torch.cat([case["out_features"], case["in_features"]])
    inlier = case["is_inlier"].bool()
    assert torch.equal(inlier, torch.arange(len(x)) >= len(case["out_features"]))
    density = ood_eval.class_log_densities(case["train_features"], case["train_labels"], x,
                                           case.get("reg_covar"))
    singular = case["train_labels"].bincount().max() <= x.shape[1]
    tolerance = 1e-7 if singular else 1e-9
    close(density, case["class_loglik"], tolerance, what="class_loglik")
    score = density.max(1).values
    close(score, case["score"], tolerance, what="score")
    found = ood_eval.metrics(*ood_eval.histogram(score[inlier], score[~inlier]))
    assert found["AUROC"].item() == pytest.approx(case.get("auroc"), abs=1e-12)


@exercises("rince", "retrieval")
def test_retrieval(case):
    """R@k; and their curves, which we do not have, by code of the tests."""
    bank, query = (F.normalize(case[f"{part}_features"], dim=1) for part in ("train", "test"))
    ks = case["K"].tolist()
    for kind in ("fine", "coarse"):
        y_bank, y = case[f"train_{kind}"], case[f"test_{kind}"]
        found = common.retrieval(query, y, bank, y_bank, ks=ks)
        assert [found[f"R@{k}"] / 100 for k in ks] == pytest.approx(
            case[f"{kind}/recall_at_k"].tolist(), abs=1e-12)
        rows = common.top_k(query, bank, len(bank))[1]
        right = (y_bank[rows] == y[:, None]).double().cumsum(1)  # (Q, N)
        precision = (right / torch.arange(1, len(bank) + 1)).mean(0)
        recall = (right / right[:, -1:]).mean(0)
        close(precision, case[f"{kind}/precision"].double(), 1e-6, atol=1e-6)
        close(recall, case[f"{kind}/recall"].double(), 1e-6, atol=1e-6)
        # differs from an average precision: the first point is left out
        assert ((recall[1:] - recall[:-1]) * precision[1:]).sum().item() == pytest.approx(
            case.get(f"{kind}/AP"), abs=1e-6)


@exercises("rince", "hier")
def test_similarity_ranks(case):
    """(E8). The original goes by names: classes that share one become each other's rank 1."""
    ids, of, name = case["class_ids"], case["name_of_class"], case["names"]
    similarity = case["similarity"][of][:, of]
    ours = rince.similarity_ranks(similarity, [case.get("threshold")])
    index, value = case["sim_class_idx"], case["sim_class_val"]  # padded with -2, -1
    assert index.shape == value.shape == (len(ids), case.get("n_sim_classes"))
    theirs = torch.zeros_like(ours)
    for c in range(len(ids)):
        real = index[c] >= 0
        theirs[c, index[c][real]] = (1 + (1 - value[c][real]) / 0.25).round().long()
    twins = (of[:, None] == of) & ~torch.eye(len(of), dtype=torch.bool)
    assert len(name) == len(of.unique())
    assert torch.equal(ours[~twins], theirs[~twins])
    assert (theirs[twins] == 1).all() and (ours[twins] == 2).all()  # ours goes by class ids
    assert (ours.diagonal() == 1).all()


@exercises("rince", "meta")
def test_rince_meta(case):
    assert re.fullmatch(r"\d+\.\d+.*", case["torch"])


@pytest.mark.skipif(not (GOLDEN / "imagenet_lists.txt").exists(), reason="no lists there")
def test_class_lists():
    """The lists of ImageNet classes are disjoint, 100 each, and `--classes` can read a section."""
    lists = {}
    for line in (GOLDEN / "imagenet_lists.txt").read_text().splitlines():
        if line.startswith("["):
            name = line.strip("[]")
        elif line.startswith("n"):
            lists.setdefault(name, []).append(line.split("\t")[0])
    imagenet = [c for name in lists if name.startswith("imagenet") for c in lists[name]]
    assert {name: len(c) for name, c in lists.items()} == {
        "imagenet100": 100, "imagenet_outliers_split1": 100, "imagenet_outliers_split2": 100,
        "imagenet_outliers_split3": 100, "tinyimagenet_inliers": 180, "tinyimagenet_outliers": 20}
    assert len(set(imagenet)) == 400
    assert len({*lists["tinyimagenet_inliers"], *lists["tinyimagenet_outliers"]}) == 200

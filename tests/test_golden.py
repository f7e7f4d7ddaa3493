"""Parity with the authors: inputs and outputs of their own code, stored in tests/golden/*.npz.

The keys of a file read `group/case/name`, in some files with dots instead. Every test below takes
its cases, sizes and scalars from the keys that it finds, so that another directory with the same
scheme passes unchanged:

    GOLDEN_DIR=PATH python -m pytest tests/test_golden.py

A documented group that is missing fails, and so does a key that no test reads.
Tolerances are relative in float64 and relative to the largest entry in float32.
"""
import functools
import inspect
import json
import math
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
import sogclr_clip

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))

GROUPS = {  # method -> documented groups, each of which must be there
    "clinfonce": [
        "supcon", "supcon_2rank", "step", "lr", "kmeans", "kmeans_loss", "schedule", "accuracy",
        "attr", "hier_synthetic", "wordnet", "dual_1rank", "dual_2rank", "dual_step_1rank",
        "dual_step_2rank", "projection_head", "lars",
    ],
    "sogclr_clip": [
        "meta", "clip", "clip_t001", "clip_learn", "clip_pers", "cyclip", "cyclip_l", "vicreg",
        "vicreg_small", "sogclr", "sogclr_t001", "sogclr_g01", "sogclr_sqh", "sogclr_dup",
        "sogclr_late", "sogclr_upstream", "sogclr_dro", "sogclr_dro_cos", "sogclr_dro_exp",
        "isogclr_new", "isogclr_new_eta", "isogclr_new_tempnet", "isogclr_new_v1",
        "isogclr_new_v2", "isogclr_new_v2_lam", "onlineclr", "onlineclr_t001", "hybrid",
        "hybrid_fixed", "hybrid_base", "hybrid_clamp", "hybrid_intended", "sogclr_mine",
        "sogclr_mine_half", "sogclr_mine_zero", "fastclip_v0", "fastclip_v1", "fastclip_v2",
        "fastclip_v3", "fastclip_sched", "siglip", "sogclr_unimodal", "retrieval",
        "retrieval_uneven", "zeroshot", "lr_upstream", "lr_fork100k", "lr_short", "caption",
        "ws2_clip", "ws2_cyclip", "ws2_vicreg", "ws2_sogclr", "ws2_sogclr_upstream",
        "ws2_sogclr_dro", "ws2_isogclr_new", "ws2_isogclr_new_v2", "ws2_onlineclr",
        "ws2_sogclr_unimodal",
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


# ===================================================================================== SogCLR, CLIP
#
# One direction after the other: images (rows of S) against texts, texts against images. Cases of
# two ranks hold the global batch; there the loss of the original is that of all pairs on every
# rank, and its gradients are the slices of one process (see `of`).


def clip_cases(*patterns):
    """`exercises` for several patterns, in both precisions if the test has a `dtype`."""
    def decorate(test):
        marked = [exercises("sogclr_clip", pattern)(test) for pattern in patterns]
        found = [case for mark in marked for case in mark.pytestmark[0].args[1]]
        checked = marked[-1]  # all are the same but for their cases
        checked.pytestmark = []
        if "dtype" in inspect.signature(test).parameters:
            checked = pytest.mark.parametrize("dtype", [torch.float64, torch.float32],
                                              ids=["f64", "f32"])(checked)
        return pytest.mark.parametrize("case", found, ids=[c.prefix for c in found])(checked)

    return decorate


def of(case, name, t, dtype=None):
    """Result `name` of step t. Two ranks: gradients are joined, the rest must be the same."""
    x = case[name]
    if not case.prefix.startswith("ws2"):
        x = x[t]
    elif name.startswith("grad"):
        x = x[:, t].flatten(0, 1)
    else:
        assert torch.equal(x[0], x[1]), name
        x = x[0, t]
    return x if dtype is None else x.to(dtype)


def hyper(case):
    """All hp_ scalars; those of a case with two ranks stand in the case of one."""
    found = {k.removeprefix("hp_"): case.get(k) for k in case.arrays if k.startswith("hp_")}
    stem = case.prefix.removeprefix("ws2_") + "/hp_"
    return {k.removeprefix(stem): v.item() for k, v in arrays("sogclr_clip").items()
            if k.startswith(stem)} | found


def features_of(case, t, dtype=torch.float64):
    """Leaves img, txt (B, D), columns of the own pairs, and the mask of negatives."""
    img, txt = (leaf(case[k][t].to(dtype)) for k in ("in_img", "in_txt"))
    own = torch.arange(len(img))
    return img, txt, own, sogclr_clip.negatives(own, len(img))


def same_step(case, t, loss, img, txt, dtype=torch.float64):
    """Loss (None: the file has none) and both gradients of a step."""
    if loss is not None:
        close(loss, of(case, "loss", t, dtype), 1e-10, 1e-4, 1e-12 if dtype.itemsize > 4 else 1e-5,
              what=f"{case.prefix} loss {t}")
        loss.backward()
    for name, x in (("grad_img", img), ("grad_txt", txt)):
        close(grad(x), of(case, name, t, dtype), 1e-10, 1e-4, 1e-12 if dtype.itemsize > 4 else 1e-5,
              what=f"{case.prefix} {name} {t}")


def first_tau(case):
    """Where the temperatures begin; a case of two ranks shows it where no id was seen."""
    if "hp_tau_init" in case:
        return hyper(case)["tau_init"]
    return case["tau_I"][0, 0][case["s_I"][0, 0] == 0][0].item()


def walk(case, direction, dtype, N, **start):
    """Run a loss with state through all steps of a case and compare everything.

    direction(S, own, negative, old, hp, epoch, side, t) gives L and the new values of the rows;
    state is kept here by id, `start` are its initial values.
    """
    hp, B = hyper(case), case["in_img"].shape[1]
    case.read.add("extra")  # informative only
    state = {s: {k: torch.full((N,), v, dtype=dtype) for k, v in start.items()} for s in "IT"}
    for t in range(len(case["in_img"])):
        img, txt, own, negative = features_of(case, t, dtype)
        loss = 0.0
        for side, S, ids in (("I", img @ txt.T, case["in_img_ids"][t]),
                             ("T", txt @ img.T, case["in_txt_ids"][t])):
            old = {k: v[ids] for k, v in state[side].items()}
            L, new = direction(S, own, negative, old, hp, case["in_epoch"][t].item(), side, t)
            for k, v in new.items():
                state[side][k][ids] = v
            loss = loss + L
        same_step(case, t, loss, img, txt, dtype)
        for side in "IT":
            same_state(case, t, side, state[side], dtype, B, hp)
    return state


def same_state(case, t, side, state, dtype, B, hp):
    s, b = of(case, f"s_{side}", t), of(case, f"b_{side}", t)
    seen = s > 0
    expected = s.log() + b
    if "isogclr_new" in case.prefix and "_v" not in case.prefix:
        expected = expected - math.log(B - 1)  # a sum there, a mean here
    atol = 1e-10 if dtype == torch.float64 else 2e-4
    close(state["log_u"][seen], expected[seen].to(dtype), 1e-10, 1e-5, atol, f"log u {side} {t}")
    assert (state["log_u"][~seen] == -math.inf).all()
    if "b" in state:
        close(state["b"], b.to(dtype), 1e-10, 1e-4, 1e-12, f"b {side} {t}")
    for name, key in (("tau", "tau"), ("v", "u")):
        if name in state:
            close(state[name], of(case, f"{key}_{side}", t, dtype), 1e-10, 1e-4,
                  1e-12 if dtype == torch.float64 else 1e-5, f"{name} {side} {t}")


def same_log_u(log_u, expected, dtype):
    """log u of all ids; -inf where never seen."""
    seen = expected > -math.inf
    assert torch.equal(log_u > -math.inf, seen)
    close(log_u[seen], expected[seen].to(dtype), 1e-10, 1e-5,
          1e-10 if dtype == torch.float64 else 2e-4, "log u")


def size(case):
    """N of the data set: hp_N, or the width of a table."""
    return hyper(case)["N"] if "hp_N" in case else case["s_I"].shape[-1]


@clip_cases("meta")
def test_sogclr_meta(case):
    assert case["sizes_B_D_N_T"].numel() == 4 and case["seed"].dim() == 0


@clip_cases("clip", "clip_t001", "ws2_clip")
def test_clip(case, dtype):
    """(E1); two ranks: also the loss and gradients of one process, stored beside."""
    tau = hyper(case)["temperature"]
    for t in range(len(case["in_img"])):
        img, txt, own, negative = features_of(case, t, dtype)
        loss = (sogclr_clip.clip(img @ txt.T, own, negative, tau)
                + sogclr_clip.clip(txt @ img.T, own, negative, tau)) / 2
        same_step(case, t, loss, img, txt, dtype)
        full(case, t, loss, img, txt, dtype)


def full(case, t, loss, img, txt, dtype):
    """What the files of two ranks say about one process."""
    case.read |= {"in_img_ids", "in_txt_ids", "in_epoch"} & case.arrays.keys()
    for name, x in (("full_loss", loss), ("full_grad_img", img.grad), ("full_grad_txt", txt.grad)):
        if name in case:
            close(x, case[name][t].to(dtype), 1e-10, 1e-4, 1e-12, name)


@clip_cases("clip_learn")
def test_clip_with_learnable_tau(case, dtype):
    for t in range(len(case["in_img"])):
        img, txt, own, negative = features_of(case, t, dtype)
        tau = leaf(case["hp_temperature"].to(dtype))
        loss = (sogclr_clip.clip(img @ txt.T, own, negative, tau)
                + sogclr_clip.clip(txt @ img.T, own, negative, tau)) / 2
        same_step(case, t, loss, img, txt, dtype)
        close(tau.grad, case["gradp_temp"][t].to(dtype), 1e-10, 1e-4, what="gradp_temp")


@clip_cases("clip_pers")
def test_clip_with_tau_per_sample(case):
    """The original divides columns by the temperatures of rows; ours divides rows."""
    for t in range(len(case["in_img"])):
        img, txt, own, negative = features_of(case, t)
        tau_I, tau_T = leaf(case["in_image_tau"]), leaf(case["in_text_tau"])
        p, q = case["in_img_ids"][t], case["in_txt_ids"][t]
        fixed = (sogclr_clip.clip(img @ txt.T, own, negative, tau_I[p][:, None])
                 + sogclr_clip.clip(txt @ img.T, own, negative, tau_T[q][:, None])) / 2
        close(fixed, case["loss_rowwise_fixed"][t], 1e-10, what="row-wise")
        buggy = (F.cross_entropy(img @ txt.T / tau_I[p], own)
                 + F.cross_entropy(txt @ img.T / tau_T[q], own)) / 2
        assert abs(fixed.item() - buggy.item()) > 1e-3
        same_step(case, t, buggy, img, txt)
        close(tau_I.grad, case["gradp_image_tau"][t], 1e-10, atol=1e-12)
        close(tau_T.grad, case["gradp_text_tau"][t], 1e-10, atol=1e-12)


@clip_cases("cyclip", "cyclip_l", "ws2_cyclip")
def test_cyclip(case, dtype):
    hp = hyper(case)
    for t in range(len(case["in_img"])):
        img, txt, own, negative = features_of(case, t, dtype)
        S_I, S_T = img @ txt.T, txt @ img.T
        loss = (sogclr_clip.clip(S_I, own, negative, hp["temperature"])
                + sogclr_clip.clip(S_T, own, negative, hp["temperature"])) / 2
        loss = loss + sogclr_clip.cyclip(S_I, S_T, img @ img.T, txt @ txt.T, hp["lambda_in"],
                                         hp["lambda_cross"])
        same_step(case, t, loss, img, txt, dtype)
        full(case, t, loss, img, txt, dtype)


@clip_cases("vicreg", "vicreg_small", "ws2_vicreg")
def test_vicreg(case, dtype):
    hp = hyper(case)
    for t in range(len(case["in_img"])):
        img, txt, *_ = features_of(case, t, dtype)
        loss = sogclr_clip.vicreg(img, txt, hp["sim"], hp["std"], hp["cov"])
        same_step(case, t, loss, img, txt, dtype)
        full(case, t, loss, img, txt, dtype)


@clip_cases("sogclr", "sogclr_t001", "sogclr_g01", "sogclr_sqh", "sogclr_late", "sogclr_upstream",
            "ws2_sogclr", "ws2_sogclr_upstream")
def test_sogclr(case, dtype):
    """(E4) to (E11). The original's rule for a first visit after epoch 0 is u = gamma g; its
    earlier release counts the pair itself and knows no rule for epoch 0."""
    upstream = case.prefix.endswith("upstream")
    full_only = dict(s_I=0) if upstream else {}

    def direction(S, own, negative, old, hp, epoch, side, t):
        gamma = 1.0 if epoch == 0 and not upstream else hp["gamma"]
        D = sogclr_clip.difference(S, own)
        if case.prefix == "sogclr_sqh":  # the surrogate of the original, not offered here
            D = (D + hp["surrogate_c"]).clamp(min=0).square()
        if upstream:
            tau = torch.full_like(S[:, 0], hp["temperature"])
            L, log_u, b, _ = sogclr_clip.sogclr_dro(D, own, negative, old["log_u"], old["b"], tau,
                                                    gamma, 0.0, hp["eps"])
        else:
            L, log_u, b = sogclr_clip.sogclr(D, negative, old["log_u"], old["b"],
                                             hp["temperature"], gamma, hp["eps"])
        return L, dict(log_u=log_u, b=b)

    assert isinstance(full_only, dict)
    walk(case, direction, dtype, size(case), log_u=-math.inf, b=0.0)
    for t in range(len(case["in_img"])):  # the file of two ranks: gradients of one process
        for name in ("full_loss", "full_grad_img", "full_grad_txt"):
            if name in case:
                close(of(case, name.removeprefix("full_"), t), case[name][t], 1e-10, what=name)


@clip_cases("sogclr_dup")
def test_sogclr_with_an_id_twice(case):
    """Both rows of an id start from the same u; the table keeps the last row's value. The original
    then reads b back, so that both rows have the b of the last, which shows only in eps e^b."""
    hp, N = hyper(case), size(case)
    case.read.add("extra")
    state = {s: (torch.full((N,), -math.inf).double(), torch.zeros(N).double()) for s in "IT"}
    repeated = 0
    for t in range(len(case["in_img"])):
        img, txt, own, negative = features_of(case, t)
        gamma = 1.0 if case["in_epoch"][t] == 0 else hp["gamma"]
        loss = 0.0
        for side, S, ids in (("I", img @ txt.T, case["in_img_ids"][t]),
                             ("T", txt @ img.T, case["in_txt_ids"][t])):
            repeated += len(ids) - len(ids.unique())
            log_u, b = state[side]
            D = sogclr_clip.difference(S, own)
            L, new_u, new_b = sogclr_clip.sogclr(D, negative, log_u[ids], b[ids],
                                                 hp["temperature"], gamma, hp["eps"])
            for i in range(len(ids)):  # the last row of an id wins
                log_u[ids[i]], b[ids[i]] = new_u[i], new_b[i]
            z, n = D.detach() / hp["temperature"], negative.sum(1).double()
            floor = torch.logaddexp(new_u, math.log(hp["eps"]) + b[ids])  # b read back
            back = sogclr_clip.weighted(D, z, floor, negative, n)[0].mean()
            close(L, back, 1e-4, what="each row with its own b")
            loss = loss + back
            same_state(case, t, side, dict(log_u=log_u, b=b), torch.float64, len(ids), hp)
        same_step(case, t, loss, img, txt)
    assert repeated


def dro(case, variant):
    """`direction` of the losses with stored temperatures."""
    def direction(S, own, negative, old, hp, epoch, side, t):
        new = variant(S, own, negative, old, hp, 1.0 if epoch == 0 else hp["gamma"], t)
        L, G = new.pop("L"), new.pop("G")
        schedule = case.prefix.removeprefix("sogclr_dro_")
        schedule = {"cos": "cosine", "exp": "exp"}.get(schedule, "const")
        eta = sogclr_clip.eta_at(epoch, hp.get("max_epoch", 30), hp["eta_init"], schedule,
                                 hp.get("eta_min", 1e-4))
        assert hp.get("eta_exp_gamma", 0.8) == 0.8
        new["tau"], new["v"] = sogclr_clip.temperature_step(
            old["tau"], old["v"], G, hp["beta_u"], eta, (hp["tau_min"], hp["tau_max"]),
            hp.get("grad_clip", math.inf))
        return L, new
    return direction


@clip_cases("sogclr_dro", "sogclr_dro_cos", "sogclr_dro_exp", "ws2_sogclr_dro")
def test_sogclr_dro(case, dtype):
    """(E12) to (E14); the original has no rule for epoch 0."""
    def variant(S, own, negative, old, hp, gamma, t):
        L, log_u, b, G = sogclr_clip.sogclr_dro(
            sogclr_clip.difference(S, own), own, negative, old["log_u"], old["b"], old["tau"],
            hp["gamma"], hp["rho"], hp["eps"])
        return dict(L=L, log_u=log_u, b=b, G=G)

    walk(case, dro(case, variant), dtype, size(case), log_u=-math.inf, b=0.0, v=0.0,
         tau=first_tau(case))


@clip_cases("isogclr_new", "isogclr_new_eta", "ws2_isogclr_new")
def test_isogclr(case, dtype):
    def variant(S, own, negative, old, hp, gamma, t):
        L, log_u, b, G = sogclr_clip.isogclr(
            sogclr_clip.difference(S, own), negative, old["log_u"], old["b"], old["tau"], gamma,
            hp["rho"], hp["eps"])
        return dict(L=L, log_u=log_u, b=b, G=G)

    walk(case, dro(case, variant), dtype, size(case), log_u=-math.inf, b=0.0, v=0.0,
         tau=first_tau(case))


@clip_cases("isogclr_new_v2", "isogclr_new_v2_lam", "ws2_isogclr_new_v2")
def test_isogclr_v2(case, dtype):
    """(E20). In float32 the original fails here (s underflows); log u does not."""
    log_r, lambd, done = torch.tensor(-math.inf, dtype=dtype), hyper(case)["lamda"], None

    def variant(S, own, negative, old, hp, gamma, t):
        nonlocal log_r, done
        if t != done:  # once a step
            log_r = sogclr_clip.log_average(
                log_r, sogclr_clip.positives(S.diagonal().detach(), lambd), gamma)
            expected, done = of(case, "r", t).log() + of(case, "b_pos", t), t
            close(log_r, expected.to(dtype), 1e-10, 1e-4, 1e-10, "r")
        L, log_u, b, G = sogclr_clip.isogclr_v2(
            S, own, negative, old["log_u"], old["b"], log_r, old["tau"], gamma, hp["rho"], lambd,
            hp["eps"])
        return dict(L=L, log_u=log_u, b=b, G=G)

    walk(case, dro(case, variant), dtype, size(case), log_u=-math.inf, b=0.0, v=0.0,
         tau=first_tau(case))


def generators(case, dtype):
    """Both TempNets with the parameters of the file."""
    hp, D, nets = hyper(case), case["in_img"].shape[-1], {}
    for side in "IT":
        stem = f"in_par_{side}_"
        parameters = {k.removeprefix(stem).replace("_weight", ".weight").replace("_bias", ".bias"):
                      case[k].to(dtype) for k in case.arrays if k.startswith(stem)}
        nets[side] = sogclr_clip.TempNet(D, hp["M"], (hp["tau_min"], hp["tau_max"])).to(dtype)
        nets[side].load_state_dict(parameters)
    return nets


@clip_cases("isogclr_new_tempnet", "isogclr_new_v1")
def test_isogclr_with_a_network(case, dtype):
    """(E15) to (E19), without dropout: losses, temperatures, gradients of the network."""
    nets, v1 = generators(case, dtype), case.prefix.endswith("v1")

    def direction(S, own, negative, old, hp, epoch, side, t):
        gamma = 1.0 if epoch == 0 else hp["gamma"]
        f = case["in_img" if side == "I" else "in_txt"][t].to(dtype)
        nets[side].zero_grad()
        tau = nets[side](f)
        close(tau, case[f"tau_out_{side}"][t].to(dtype), 1e-10, 1e-4, what="tau")
        rho = hp["rho"] if v1 else hp[f"rho_{side}"]
        if v1:
            L, log_u, G = sogclr_clip.isogclr_v1(S, own, negative, old["log_u"], tau.detach(),
                                                 gamma, rho)
            new = dict(log_u=log_u)
        else:
            L, log_u, b, G = sogclr_clip.isogclr(
                sogclr_clip.difference(S, own), negative, old["log_u"], old["b"], tau.detach(),
                gamma, rho, hp["eps"])
            new = dict(log_u=log_u, b=b)
        extra = (G * tau).mean()
        for name, g in zip([n for n, _ in nets[side].named_parameters()],
                           torch.autograd.grad(extra, list(nets[side].parameters()),
                                               retain_graph=True), strict=True):
            close(g, case[f"gradp_{side}_{name.replace('.', '_')}"][t].to(dtype), 1e-9, 1e-4, 1e-12,
                  what=f"{side} {name}")
        return L + extra, new

    start = dict(log_u=-math.inf) if v1 else dict(log_u=-math.inf, b=0.0)
    walk(case, direction, dtype, size(case), **start)


@clip_cases("onlineclr", "onlineclr_t001", "ws2_onlineclr")
def test_onlineclr(case, dtype):
    """(E21), (E22); the file holds u = n e^(-c/tau)."""
    hp = hyper(case)
    tau, gamma = hp["temperature"], hp["gamma"]
    log_n = log_p = torch.tensor(-math.inf, dtype=dtype)
    case.read |= {"in_img_ids", "in_txt_ids", "in_epoch"} & case.arrays.keys()
    for t in range(len(case["in_img"])):
        img, txt, own, negative = features_of(case, t, dtype)
        S = img @ txt.T
        n, p = sogclr_clip.online_sums(S.detach(), own, negative, tau) + math.log(2)
        log_n = sogclr_clip.log_average(log_n, n, gamma)
        log_p = sogclr_clip.log_average(log_p, p, gamma)
        for log, u, c, scale in ((log_n, "u_n", "c_n", tau), (log_p, "u_p", "c_p", 10 * tau)):
            expected = of(case, u, t).log().squeeze() + of(case, c, t) / scale
            close(log, expected.to(dtype), 1e-10, 1e-4, 1e-10, u)
        loss = sum(sogclr_clip.onlineclr(x, own, negative, log_n, log_p, tau) for x in (S, S.T))
        same_step(case, t, loss, img, txt, dtype)


@clip_cases("sogclr_mine", "sogclr_mine_half", "sogclr_mine_zero")
def test_sogclr_mine(case, dtype):
    """(E24) to (E26) with floor 0, and the first-visit rule."""
    hp, N = hyper(case), size(case)
    tau, log_v = hp["temperature"], torch.tensor(-math.inf, dtype=dtype)
    tables = {s: torch.full((N,), -math.inf, dtype=dtype) for s in "IT"}
    tight, loose = dict(f64=1e-10, f32=1e-4), 1e-12 if dtype == torch.float64 else 1e-4
    for t in range(len(case["in_img"])):
        img, txt, own, negative = features_of(case, t, dtype)
        S, epoch = img @ txt.T, case["in_epoch"][t].item()
        g = sogclr_clip.log_mean(S.detach() / tau, negative, negative.sum(1).to(dtype))
        log_v = sogclr_clip.log_average(log_v, g.logsumexp(0) - math.log(len(g)),
                                        1.0 if epoch == 0 else hp["gamma"])
        close(log_v, case["logv"][t].to(dtype), atol=loose, **tight)
        gcl = dv = 0.0
        mean = 0.0
        for side, x, ids in (("I", S, case["in_img_ids"][t]), ("T", S.T, case["in_txt_ids"][t])):
            old = tables[side][ids]
            gamma = sogclr_clip.Objective.first_visit(old, epoch, hp["gamma"])
            L, log_u = sogclr_clip.info_sogclr(sogclr_clip.difference(x, own), negative, old, tau,
                                               gamma)
            tables[side][ids] = log_u
            gcl, dv = gcl + L, dv + sogclr_clip.mine(x, own, negative, log_v, tau)
            mean = mean - log_u.mean() / 2
            same_log_u(tables[side], case[f"logu_{side}"][t], dtype)
        for name, value in (("loss_sogclr", gcl), ("loss_mine", dv), ("mi_gcl", mean),
                            ("mi_dv", S.diagonal().mean() / tau - log_v)):
            close(value, case[name][t].to(dtype), atol=loose, what=name, **tight)
        same_step(case, t, (1 - hp["lam"]) * gcl + hp["lam"] * dv, img, txt, dtype)


@clip_cases("fastclip_v[0-3]")
def test_fastclip(case, dtype):
    """v3 is `fastclip`, v1 is `sogclr` with eps = 0, v2 has a temperature per sample; v0 is for
    the record: its pieces are those of `fastclip`. Step 0 has gamma = 1."""
    hp, N, v = hyper(case), size(case), case.prefix[-1]
    tables = {s: torch.full((N,), -math.inf, dtype=dtype) for s in "IT"}
    for t in range(len(case["in_img"])):
        img, txt, own, negative = features_of(case, t, dtype)
        gamma, loss, grad_tau = case["in_gamma"][t].item(), 0.0, []
        for side, name, S, ids in (("I", "img", img @ txt.T, case["in_img_ids"][t]),
                                   ("T", "txt", txt @ img.T, case["in_txt_ids"][t])):
            tau = case[f"in_tau_{name}"][t].to(dtype)[:, None] if v == "2" else hp["tau"]
            L, log_u, G = sogclr_clip.fastclip(sogclr_clip.difference(S, own), negative,
                                               tables[side][ids], tau, gamma, hp["rho"], hp["eps"])
            tables[side][ids] = log_u
            u = case[f"u_{side}"][t]
            close(tables[side][u > 0], u[u > 0].log().to(dtype), 1e-10, 1e-5, 1e-10)
            if v == "0":  # log(eps + u) itself, not times tau
                L, G = L / tau, (G - torch.logaddexp(log_u, torch.tensor(math.log(
                    hp["eps"]), dtype=dtype)) - hp["rho"]) / tau
            loss = loss + L
            grad_tau.append(G)
        loss.backward()
        same_step(case, t, None, img, txt, dtype)
        expected = case["grad_tau"][t].to(dtype)
        found = torch.stack(grad_tau)
        if v in "03":
            found = found.mean(1).sum()
        if v == "1":
            assert not expected.any()  # tau is constant
        else:
            close(found, expected, 1e-10, 1e-4, 1e-10 if dtype == torch.float64 else 1e-4, "tau")


@clip_cases("fastclip_sched")
def test_gamma_schedule(case):
    E, gamma_min = case.get("hp_decay_epochs"), case.get("hp_gamma_min")
    rates = [sogclr_clip.gamma_at(e, 2 * E, gamma_min, "cosine")
             for e in range(len(case["gamma_cosine"]))]
    close(torch.tensor(rates, dtype=torch.float64), case["gamma_cosine"], 1e-12)


@clip_cases("siglip")
def test_siglip(case, dtype):
    for t in range(len(case["in_img"])):
        img, txt, own, negative = features_of(case, t, dtype)
        s, c = leaf(case["hp_logit_scale"].to(dtype)), leaf(case["hp_logit_bias"].to(dtype))
        same_step(case, t, sogclr_clip.siglip(img @ txt.T, own, negative, s, c), img, txt, dtype)
        close(s.grad, case["gradp_scale"][t].to(dtype), 1e-10, 1e-4)
        close(c.grad, case["gradp_bias"][t].to(dtype), 1e-10, 1e-4)


@clip_cases("hybrid_intended")
def test_hybrid(case, dtype):
    """(E23a) to (E23c): all rows of the bank that were seen and are not in the batch."""
    hp, N, D = hyper(case), size(case), case["in_img"].shape[-1]
    log_u = {s: torch.full((N,), -math.inf, dtype=dtype) for s in "IT"}
    bank = {s: torch.zeros(N, D, dtype=dtype) for s in "IT"}
    atol = 1e-12 if dtype == torch.float64 else 1e-5

    def same(value, name, t, index=()):
        close(value, case[name][(t, *index)].to(dtype), 1e-10, 1e-4, max(atol, 1e-10), name)

    for t in range(len(case["in_img"])):
        img, txt, own, negative = features_of(case, t, dtype)
        x, y = F.normalize(img, dim=1), F.normalize(txt, dim=1)
        S, ids = x @ y.T, dict(I=case["in_img_ids"][t], T=case["in_txt_ids"][t])
        tau = hp["tau"] * (1 + S.detach().std().tanh())
        same(tau, "tau", t)
        base, new, epoch = 0.0, {}, case["in_epoch"][t].item()
        for side, other, f, sims in (("I", "T", x, S), ("T", "I", y, S.T)):
            rows = torch.arange(N)
            rows = rows[(log_u[other] > -math.inf) & ~torch.isin(rows, ids[other])]
            assert len(rows) == case["n_bank"][t]["IT".index(side)]
            wide = torch.cat([sims, f @ bank[other][rows].T], 1)
            mask = torch.cat([negative, torch.ones(len(f), len(rows), dtype=torch.bool)], 1)
            old = log_u[side][ids[side]]
            L, now = sogclr_clip.info_sogclr(
                sogclr_clip.difference(wide, own), mask, old, tau,
                sogclr_clip.Objective.first_visit(old, epoch, hp["gamma"]))
            base = base + L
            new[side] = now, sogclr_clip.bank_row(bank[side][ids[side]], f.detach(),
                                                  old > -math.inf, hp["memory_momentum"])
        for side, (now, row) in new.items():
            log_u[side][ids[side]], bank[side][ids[side]] = now, row
            same_log_u(log_u[side], case[f"logu_{side}"][t], dtype)
            same(bank[side], f"bank_{side}", t)
        cov = sum(sogclr_clip.decorrelation(D ** 0.5 * f) for f in (x, y))
        diff = sogclr_clip.difficulty(S, S.T, own, negative, S.diagonal(), tau)
        for name, value in (("base", base), ("cov", cov), ("diff", diff)):
            same(value, name, t)
        same_step(case, t, base + hp["covariance_weight"] * cov + hp["difficulty_weight"] * diff,
                  img, txt, dtype)


# ------------------------------------------------------------------ for the record, only here


def literal_hybrid(img, txt, s, ids, epoch, hp):
    """HybridSogCLR as coded: no b, the pair itself in the sums, ids clamped into the bank, a
    "covariance" that is the mean variance, a difficulty term that raises all similarities.

    s: dict of (bank,) tables, which are updated. Returns: loss and its parts.
    """
    x, y = F.normalize(img, dim=1), F.normalize(txt, dim=1)
    S = x @ y.T
    tau = hp["tau"] * (1 + S.std().tanh().detach()) if hp.get("adaptive") else hp["tau"]
    Q, B = S / tau, len(S)
    parts = []
    for side, q in (("I", Q), ("T", Q.T)):
        D = (q - q.diagonal()[:, None]).clamp(-1e3, 1e3)
        E = D.detach().exp().clamp(max=1e3)
        g = E.sum(1) / (B - 1)
        old = s[side][ids[side]]
        new = g if epoch == 0 else (1 - hp["gamma"]) * old + hp["gamma"] * g
        for i in range(B):
            s[side][ids[side][i]] = new[i]
        parts.append((E / (new[:, None] + hp.get("eps", 1e-8)) * D).mean())
    cov = sum(f.var(0).mean() for f in (x, y))
    a, c = ((f - f.mean(0)).norm(dim=1).softmax(0).detach() for f in (x, y))
    diff = -(Q * a[:, None] * c[None]).mean()
    base = sum(parts) / 2
    loss = base + hp["covariance_weight"] * cov + hp["difficulty_weight"] * diff
    parts = torch.stack([base, cov, diff, torch.as_tensor(tau), *parts]).detach()
    return loss, parts, x, y


@clip_cases("hybrid", "hybrid_fixed", "hybrid_base", "hybrid_clamp")
def test_literal_hybrid(case):
    hp = hyper(case)
    K, D, m = int(hp["bank"]), case["in_img"].shape[-1], hp["memory_momentum"]
    s = {side: torch.zeros(K, dtype=torch.float64) for side in "IT"}
    bank = {side: torch.zeros(K, D, dtype=torch.float64) for side in "IT"}
    for t in range(len(case["in_img"])):
        img, txt, *_ = features_of(case, t)
        ids = dict(I=case["in_img_ids"][t].clamp(0, K - 1), T=case["in_txt_ids"][t].clamp(0, K - 1))
        loss, parts, x, y = literal_hybrid(img, txt, s, ids, case["in_epoch"][t], hp)
        for side, f in (("I", x), ("T", y)):
            old = bank[side].clone()
            for i, row in enumerate(ids[side]):
                bank[side][row] = m * old[row] + (1 - m) * f[i].detach()
            close(s[side], case[f"s_{side}"][t], 1e-10, what=f"s_{side}")
            close(bank[side], case[f"b_{side}"][t], 1e-10, atol=1e-12, what=f"bank {side}")
        if "components" in case:
            for i, w in ((1, hp["covariance_weight"]), (2, hp["difficulty_weight"])):
                parts[i] *= w > 0  # the original leaves them out
            # the temperature was stored as float32 where it is fixed
            close(parts, case["components"][t], 1e-10, atol=1e-8, what="components")
        same_step(case, t, loss, img, txt)
    if "running_scales" in case:  # never used by the original
        assert case["running_scales"].shape == (3,)


def unimodal(h1, h2, u, gamma, T):
    """One direction of SogCLR between views: anchors h1 against all other h1 and h2."""
    x, y = F.normalize(h1, dim=1), F.normalize(h2, dim=1)
    B = len(x)
    off = ~torch.eye(B, dtype=torch.bool)
    sims = torch.cat([(x @ y.T)[off].view(B, -1), (x @ x.T)[off].view(B, -1)], 1)  # (B, 2B - 2)
    E = (sims.detach() / T).exp()
    new = (1 - gamma) * u + gamma * E.mean(1)
    return ((E / new[:, None] * sims).mean(1) - (x * y).sum(1)), new


@clip_cases("sogclr_unimodal", "ws2_sogclr_unimodal")
def test_sogclr_of_two_views(case):
    """The authors' unimodal form: local anchors on two ranks, one u for both views."""
    hp, W = hyper(case), 2 if case.prefix.startswith("ws2") else 1
    N = case["u"].shape[-2]
    u = torch.zeros(N, dtype=torch.float64)
    for t in range(len(case["in_ids"])):
        h1, h2, ids = leaf(case["in_h1"][t]), leaf(case["in_h2"][t]), case["in_ids"][t]
        gamma = hp["gamma"] if u[ids].sum() else 1.0
        parts = [unimodal(a, b, u[ids], gamma, hp["T"]) for a, b in ((h1, h2), (h2, h1))]
        u[ids] = (parts[0][1] + parts[1][1]) / 2
        loss = parts[0][0] + parts[1][0]  # (B,)
        b = len(ids) // W
        for r in range(W):
            pick = (r, t) if W > 1 else (t,)
            own = slice(r * b, (r + 1) * b)
            close(loss[own].mean(), case["loss"][pick], 1e-10, what="loss")
            close(u, case["u"][pick].squeeze(-1), 1e-10, what="u")
            # the backward pass of the original's gather keeps the gradient of the rank's own loss
            grads = torch.autograd.grad(loss[own].mean(), (h1, h2), retain_graph=True)
            for name, g in zip(("grad_h1", "grad_h2"), grads, strict=True):
                close(g[own], case[name][pick], 1e-10, atol=1e-12, what=name)


# ------------------------------------------------------------------ evaluation, schedules, captions


@clip_cases("retrieval", "retrieval_uneven")
def test_retrieval(case):
    """Recalls in percent; and those of scores of which all but the 8 best are -100."""
    img, txt, owner = case["in_img"], case["in_txt"], case["in_txt2img"]
    found, _ = sogclr_clip.retrieval(img, txt, torch.arange(len(img)), owner, block=7 * len(txt))
    for ours, theirs in (("TR", "txt_r"), ("IR", "img_r")):
        for k in (1, 5, 10):
            assert abs(found[f"{ours}@{k}"] - case.get(f"{theirs}{k}")) < 1e-9
        assert abs(found[f"{ours} mean"] - case.get(f"{theirs}_mean")) < 1e-9
    assert abs(found["mean"] - case.get("r_mean")) < 1e-9
    relevant = torch.arange(len(img))[:, None] == owner
    expected = case["k8_metrics"]
    for i, (S, right) in enumerate([(case["score_i2t_k8"], relevant),
                                    (case["score_t2i_k8"], relevant.T)]):
        best = S.masked_fill(~right, -math.inf).amax(1)
        for j, k in enumerate((1, 5)):  # beyond 8 the ranks are arbitrary
            hit = (sogclr_clip.first_hit(S, right) < k) & (best > -100)
            assert abs(100 * hit.double().mean() - expected[3 * i + j]) < 1e-9


@clip_cases("zeroshot")
def test_zero_shot(case):
    Z = sogclr_clip.class_weights(case["in_prompt_embeds"])
    close(Z, case["class_weights_T"], 1e-10, what="class vectors")
    ks = [int(k.removeprefix("zeroshot_top")) for k in case.arrays if k.startswith("zeroshot_top")]
    logits = F.normalize(case["in_img"], dim=1) @ Z.T
    for k, found in zip(ks, common.accuracy(logits, case["in_labels"], ks), strict=True):
        assert abs(found / 100 - case.get(f"zeroshot_top{k}")) < 1e-12


@clip_cases("lr_upstream", "lr_fork100k", "lr_short")
def test_learning_rate(case):
    hp = hyper(case)
    n, epochs = int(hp["iters_per_epoch"]), int(hp["epochs"])

    def rate(step):
        return sogclr_clip.authors_rate(step, n, epochs, hp["lr"], int(hp["warmup_epochs"]),
                                        hp["min_lr"], hp["warmup_lr"])

    found = torch.tensor([rate(i) for i in range(n)], dtype=torch.float64)
    close(found, case["epoch0_iter_lr"], 1e-12, what="epoch 0")
    found = torch.tensor([rate((e + 1) * n) for e in range(epochs)], dtype=torch.float64)
    close(found, case["lr_after_epoch"], 1e-12, what="later epochs")


@clip_cases("caption")
def test_caption_cleaner(case):
    assert [sogclr_clip.clean(c, int(case.get("hp_max_words"))) for c in case["in"]] == case["out"]

"""Parity with the authors: inputs and outputs of their own code, stored in tests/golden/*.npz.

The keys of a file read `group/case/name`, in some files with dots instead. Every test below takes
its cases, sizes and scalars from the keys that it finds, so that another directory with the same
scheme passes unchanged:

    GOLDEN_DIR=PATH python -m pytest tests/test_golden.py

A documented group that is missing fails, and so does a key that no test reads.
Tolerances are relative in float64 and relative to the largest entry in float32. Where a state
amplifies rounding, float32 is allowed what rounded inputs do in float64: see `conditioned`.
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
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cld
import clinfonce
import common
import linear_eval
import ood_eval
import rince
import sogclr_clip
import wcl

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))

GROUPS = {  # method -> documented groups, each of which must be there
    "clinfonce": [
        "supcon", "supcon_2rank", "step", "lr", "kmeans", "kmeans_loss", "schedule", "accuracy",
        "attr", "hier_synthetic", "wordnet", "dual_1rank", "dual_2rank", "dual_step_1rank",
        "dual_step_2rank", "projection_head", "lars",
    ],
    "wcl": [
        "graph", "sup", "fwd", "head", "lars", "sched", "baselr", "linprobe", "groups", "train",
        "mc", "meta",
    ],
    "cld": [
        "kmeans", "cld", "ncut", "npid/full", "npid/full2", "npid/nce", "npid/nce2", "npid/total",
        "npid/gathered", "moco/queue", "moco/cifar", "moco/imagenet", "infomin/queue",
        "infomin/fixed", "infomin/jigsaw", "normlinear", "linear", "mlp", "normmlp", "knn", "lr",
    ],
    "rince": [
        "rank1", "rank2", "rank3", "rank4", "rank2tau", "rank4tau", "rank3const", "rank3f32",
        "edge_rank2_undefined", "edge_rank2_not_in_queue", "edge_empty_queue",
        "edge_no_negatives", "edge_no_negatives_all_ranks", "edge_tiny_probability", "uni",
        "inbatch", "cifar100", "cifar", "scl", "sclsuper", "queue_fifo", "queue_ring",
        "queue_ring_exact", "queue_fifo_overfull", "ema", "trainstep", "ddp", "lr", "ood_full",
        "ood_rankdef", "retrieval", "hier",
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


measuring = []  # the list of deviations that `close` extends instead of comparing
allowed = []  # what `close` may add to atol, one number a call


def close(actual, expected, f64=1e-9, f32=1e-5, atol=0.0, what=""):
    """Equal shape and dtype; relative error f64, or f32 of the largest entry, plus atol."""
    if not torch.is_tensor(actual):
        actual = torch.tensor(actual, dtype=expected.dtype)
    if measuring:
        distance = (actual.detach() - expected).abs()
        measuring[-1].append(distance.max().item() if distance.numel() else 0.0)
        return
    if allowed:
        atol += allowed.pop(0)
    scale = expected.abs().max().item() if expected.numel() else 0.0
    if expected.dtype == torch.float64:  # the small term is for entries that cancel to almost 0
        rtol, atol = f64, atol + 1e-3 * f64 * scale
    else:
        rtol, atol = 0.0, atol + f32 * scale
    torch.testing.assert_close(
        actual.detach(), expected, rtol=rtol, atol=atol, msg=lambda message: f"{what}: {message}"
    )


def moved(x, generator):
    """float64 x, rounded to float32 and moved by up to one unit in its last place."""
    noise = 2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1
    return x.float().double() * (1 + torch.finfo(torch.float32).eps * noise)


def conditioned(test):
    """Run a test with a `dtype` so that float32 is allowed what it can give.

    The same test first runs three times in float64, on inputs and a state (see `walk`) that are
    rounded to float32 and then moved by up to one unit in the last place. Every call of `close` is
    then allowed 1000 times the largest deviation that was seen there, besides its own tolerance:
    the usual 1e-4 is 1000 times the rounding of float32, too.
    """
    @functools.wraps(test)
    def run(case, dtype):
        if dtype == torch.float64:
            return test(case, dtype)
        read, seen = Case.__getitem__, []
        for seed in range(3):
            g = torch.Generator().manual_seed(seed)

            def rounded(case, key, g=g):
                x = read(case, key)
                if not key.startswith("in_") or x.dtype != torch.float64:
                    return x
                return moved(x, g)

            measuring.append([])
            try:
                with mock.patch.object(Case, "__getitem__", rounded):
                    test(case, torch.float64)
            finally:
                seen.append(measuring.pop())
        allowed[:] = [1000 * max(of_call) for of_call in zip(*seen, strict=True)]
        try:
            test(case, dtype)
            assert not allowed
        finally:
            allowed.clear()

    return run


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


def supcon_rows(z, ids=None, mask=None, tau=0.1, base_tau=0.07, mode="all"):
    """The authors' SupConLoss for each anchor: (V, B), or (1, B) with mode "one".

    Weights w of the pairs (E2) from a mask (B, B), asymmetric or soft; equal ids, or equal images
    without ids, are the mask of E1. Anchors without positive have loss 0.
    """
    V, B, _ = z.shape
    if mask is None:
        ids = torch.arange(B) if ids is None else ids
        mask = ids[:, None] == ids
    anchors = z if mode == "all" else z[:1]
    itself = torch.eye(len(anchors) * B, V * B, dtype=torch.bool)
    s = anchors.flatten(0, 1) @ z.flatten(0, 1).T / tau
    log_p = s.masked_fill(itself, -math.inf).log_softmax(1).masked_fill(itself, 0)
    w = mask.to(z.dtype).repeat(len(anchors), V).masked_fill(itself, 0)
    count = w.sum(1)
    rows = -(tau / base_tau) * (w * log_p).sum(1) / count.where(count > 0, 1)  # E2
    return rows.unflatten(0, (len(anchors), B))


def supcon_inputs(case):
    """Keyword arguments of `supcon_rows` of a supcon case."""
    return dict(
        ids=case["labels"] if "labels" in case else None,
        mask=case["mask"].to(case["features"].dtype) if "mask" in case else None,
        tau=case.get("temperature"),
        base_tau=case.get("base_temperature"),
        mode=case.get("contrast_mode"),
    )


def is_e1(case):
    """Whether a supcon case is the loss that trains: all views are anchors, ids or instances."""
    return "mask" not in case and case.get("contrast_mode") == "all"


@exercises("clinfonce", "supcon/*")
def test_supcon(case):
    """(E1) by our loss; (E2) and mode "one", which no training uses, by reference code.

    A NaN of the original marks an anchor that has no positive: we leave it out.
    """
    inputs, expected = supcon_inputs(case), case["per_anchor"]
    features = leaf(case["features"])
    z = features.transpose(0, 1).flatten(2)  # one case has two dimensions of features
    has_positive = expected.isfinite()

    soft = "mask" in case and not ((case["mask"] == 0) | (case["mask"] == 1)).all()
    f64, grad_atol = 1e-9, 1e-12
    if soft:  # the original casts the mask to float32
        f64, grad_atol = 1e-6, 1e-6 * case["grad"].abs().max().item()
    per_anchor = supcon_rows(z, **inputs)
    assert per_anchor.shape == expected.shape
    assert (per_anchor[~has_positive] == 0).all()
    close(per_anchor[has_positive], expected[has_positive], f64, what="per_anchor")

    if is_e1(case):
        def loss_of(z):
            return clinfonce.cl_infonce(z, inputs["ids"], inputs["tau"], inputs["base_tau"])
    else:
        def loss_of(z):
            return supcon_rows(z, **inputs).sum() / max(1, has_positive.sum())
    loss = loss_of(z)
    loss.backward()
    if has_positive.all():
        close(loss, case["loss"], f64, 1e-6, what="loss")
        close(features.grad, case["grad"], f64, 1e-5, atol=grad_atol, what="grad")
    else:  # differs from the released code on purpose: NaN there
        assert case["loss"].isnan() and case["grad"].isnan().all()
        close(loss, expected[has_positive].sum() / max(1, has_positive.sum()), f64, what="loss")
        assert features.grad.isfinite().all()
        if features.dtype == torch.float64:
            assert torch.autograd.gradcheck(
                lambda f: loss_of(f.transpose(0, 1).flatten(2)), features, fast_mode=True
            )


@pytest.mark.parametrize("case", cases("clinfonce", "supcon/*"), ids=lambda case: case.prefix)
def test_supcon_properties(case):
    """What must hold between two calls on the same features, whatever the stored outputs are."""
    z = case["features"].transpose(0, 1).flatten(2)
    B = z.shape[1]
    T, T0 = case.get("temperature"), case.get("base_temperature")
    loss = functools.partial(clinfonce.cl_infonce, tau=T, base_tau=T0)
    same = functools.partial(close, f64=1e-10, f32=1e-5, atol=1e-12)
    ids = case["labels"] if "labels" in case else torch.arange(B) // 2

    order = torch.arange(B).flip(0).roll(1)
    same(loss(z[:, order], ids[order]), loss(z, ids), what="order of the batch")
    same(loss(z, torch.arange(B)), loss(z), what="each image a cluster of its own")
    renamed = 1000 - 7 * ids.unique(return_inverse=True)[1]
    same(loss(z, renamed), loss(z, ids), what="names of the clusters")
    # One cluster: every other column is a positive, whatever the id is called.
    everyone = supcon_rows(z, mask=torch.ones(B, B), tau=T, base_tau=T0)
    same(loss(z, torch.full((B,), -1)), everyone.mean(), what="one cluster")


@exercises("clinfonce", "supcon_[0-9]*rank/*")
def test_supcon_ranks(case):
    """Ranks whose keys carry gradient through the gather: the loss of one process."""
    ranks = [f"rank{r}" for r in case.numbered("rank{}")]
    W = len(ranks)
    assert W > 1
    features = [leaf(case[f"{rank}/features"]) for rank in ranks]
    labels = [case[f"{rank}/labels"] for rank in ranks if f"{rank}/labels" in case]
    ids = torch.cat(labels) if labels else None
    z, sizes = torch.cat(features).transpose(0, 1), [len(f) for f in features]
    taus = dict(tau=case.get("temperature"), base_tau=case.get("base_temperature"))
    for rank, per_anchor in zip(ranks, supcon_rows(z, ids, **taus).split(sizes, 1), strict=True):
        close(per_anchor, case[f"{rank}/per_anchor"], what=f"{rank} per_anchor")
        close(per_anchor.mean(), case[f"{rank}/local_loss"], f32=1e-6, what=f"{rank} local_loss")

    loss = clinfonce.cl_infonce(z, ids, **taus)
    close(loss, case["global_loss"], f32=1e-6, what="global_loss")
    loss.backward()
    for rank, f in zip(ranks, features, strict=True):
        close(f.grad, case[f"{rank}/grad_of_global_loss"], what=f"{rank} grad")


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
            "exp_decay": lambda e: clinfonce.exp_by_epoch(e, lr),
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


def dual_logits(p, r, tau):
    """Reference of network/clinfo.py: columns [p1; p2; O1; O2] without a row's own, and targets."""
    b = p[r].shape[1]
    Q = p[r].flatten(0, 1)  # [p1; p2]
    O1, O2 = ([x[view] for i, x in enumerate(p) if i != r] for view in (0, 1))
    logits = Q @ torch.cat([Q, *O1, *O2]).T / tau
    itself = torch.eye(*logits.shape, dtype=torch.bool)
    i = torch.arange(b)
    return logits[~itself].view(2 * b, -1), torch.cat([b - 1 + i, i])


def dual_loss(r, h1, h2, ids, tau):
    """(E5), (E6) of rank r from all ranks' RAW head outputs h1, h2 (2, b, D) and ids, or None.

    Other ranks' features, and all keys of the cluster head, are constants in the original.
    Returns (instance loss, cluster loss or None).
    """
    p, q = ([F.normalize(h, dim=-1) for h in hs] for hs in (h1, h2))
    p = [x if i == r else x.detach() for i, x in enumerate(p)]
    instance = F.cross_entropy(*dual_logits(p, r, tau))
    if ids is None:
        return instance, None
    G, M = torch.cat(q, dim=1).detach(), (ids[r][:, None] == torch.cat(ids)).to(h2[r].dtype)
    log_p = [(q[r][m] @ G[1 - m].T / tau).log_softmax(1) for m in (0, 1)]
    return instance, -sum((M * x).sum(1) / M.sum(1) for x in log_p).mean() / 2


@exercises("clinfonce", "dual_[0-9]*rank/*")
def test_dual(case):
    """Losses of each rank and their gradients at its own raw head outputs."""
    ranks = [f"rank{r}" for r in case.numbered("rank{}")]
    tau, W = case.get("temperature", 0.1), len(ranks)
    outputs = ["view1_head1", "view2_head1", "view1_head2", "view2_head2"]
    warmup = "rank0/cluster_labels" not in case
    ids = None if warmup else [case[f"{s}/cluster_labels"] for s in ranks]

    def heads():
        raw = [{name: leaf(case[f"{s}/{name}"]) for name in outputs} for s in ranks]
        return raw, *([torch.stack([x[f"view1_{head}"], x[f"view2_{head}"]]) for x in raw]
                      for head in ("head1", "head2"))

    for r, rank in enumerate(ranks):
        raw, h1, h2 = heads()
        logits, targets = dual_logits([F.normalize(h, dim=-1) for h in h1], r, tau)
        close(logits, case[f"{rank}/logits"], what="logits")
        assert torch.equal(targets, case[f"{rank}/targets"])
        assert warmup == (f"{rank}/cluster_labels" not in case)
        instance, cluster = dual_loss(r, h1, h2, ids, tau)
        close(instance, case[f"{rank}/infonce_loss"], f32=1e-6, what="infonce_loss")
        total = instance
        if not warmup:
            close(cluster, case[f"{rank}/cluster_loss"], f32=1e-6, what="cluster_loss")
            total = instance + cluster
        close(total, case[f"{rank}/total_loss"], f32=1e-6, what="total_loss")
        total.backward()
        for name in outputs:
            close(grad(raw[r][name]), case[f"{rank}/grad_{name}"], what=f"{rank} grad_{name}")
            assert (raw[r][name].grad is None) == (warmup and name.endswith("head2"))

    # Ours, of the whole batch: the mean of the ranks' losses. The cluster head has the mean of
    # their gradients too; of the instance head they are equal on one rank only, as all our keys
    # have a gradient.
    raw, h1, h2 = heads()
    p, q = (F.normalize(torch.cat(h, 1), dim=-1) for h in (h1, h2))
    loss = clinfonce.cl_infonce(p, tau=tau, base_tau=tau)
    means = {name: sum(case[f"{rank}/{name}"] for rank in ranks) / W for name in (
        ("infonce_loss",) if warmup else ("infonce_loss", "cluster_loss"))}
    close(loss, means["infonce_loss"], f32=1e-6, what="infonce_loss")
    if not warmup:
        cluster = clinfonce.cluster_head_loss(q, torch.cat(ids), tau)
        close(cluster, means["cluster_loss"], f32=1e-6, what="cluster_loss")
        loss = loss + cluster
    loss.backward()
    for x, rank in zip(raw, ranks, strict=True):
        for name in outputs:
            theirs = case[f"{rank}/grad_{name}"] / W
            if name.endswith("head2") or W == 1:
                close(grad(x[name]), theirs, what=f"whole batch, grad_{name}")
            else:
                assert (grad(x[name]) - theirs).abs().max() > 1e-3 * theirs.abs().max()


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


# ===================================================================================== WCL
#
# The files hold un-normalised outputs of the heads, one array a view and rank; our functions take
# unit vectors (2, B, D) of the whole batch. What a rank of the authors computes, with keys of other
# ranks that are constants, is reference code here.


@exercises("wcl", "graph/*")
def test_weak_labels(case):
    """(E2), (E3). Where features are tied, the authors' 1-NN is any of the nearest."""
    V, B = case["feat"], len(case["feat"])
    tied = "labels_lowest_index" in case
    expected = case["labels_lowest_index"] if tied else case["labels"]
    S = V @ V.T
    S.fill_diagonal_(-np.inf)
    best, gap = S.topk(min(2, B - 1), dim=1).values, case.get("min_gap")
    if gap == 9:  # the mark of a graph without a second-best neighbour
        assert B == 2
    else:
        assert (best[:, 0] - best[:, 1]).min().item() == pytest.approx(gap, abs=1e-12)
    for dtype in (V.dtype, torch.float32):  # labels are exact in both
        labels = wcl.weak_labels(V.to(dtype))
        assert labels.dtype == torch.int64 and torch.equal(labels, expected)
    size = torch.bincount(expected)
    assert size.min() >= 2
    n = wcl.neighbours(V)[:, 0]
    assert torch.equal(expected[n], expected) and torch.equal(wcl.components(n), expected)
    for block in (1, B, 3 * B):  # one row at a time, or some
        assert torch.equal(wcl.neighbours(V, block=block)[:, 0], n)
    theirs = case["nn"]  # theirs are among the nearest, and give their labels
    assert (S.gather(1, theirs[:, None])[:, 0] >= S.max(1).values - 1e-12).all() or tied
    assert torch.equal(wcl.components(theirs), case["labels"])
    assert torch.equal(n, theirs) or tied
    mask = case["labels"][:, None] == case["labels"]
    assert torch.equal(mask, case["mask"].bool())


def sup_con_rows(logits, positive, left_out=None):
    """(E4) of rows of logits (n, m) with any mask: (n,), 0 without positive. wcl.sup_con is the
    mean of these rows for the logits and the mask of one view."""
    if left_out is not None:
        logits, positive = logits.masked_fill(left_out, -math.inf), positive & ~left_out
    return -logits.log_softmax(1).masked_fill(~positive, 0).sum(1) / positive.sum(1).clamp(min=1)


@exercises("wcl", "sup/*")
def test_sup_con(case):
    """(E4) on logits. NaN of the original: a row without positive, or an overflow of float32."""
    x, positive = leaf(case["logits"]), case["mask"].bool()
    itself = case["diag"].bool() if "diag" in case else None
    has = (positive if itself is None else positive & ~itself).any(1)
    rows = sup_con_rows(x, positive, itself)
    loss = rows.sum() / has.sum().clamp(min=1)
    loss.backward()
    stable, expected = case["rows_stable"], case["rows"]
    finite = expected.isfinite()
    tolerance = dict(f64=1e-9, atol=5e-6 if x.dtype == torch.float32 else 1e-12)
    close(rows[has].to(stable.dtype), stable[has], **tolerance | (
        dict(f64=1e-5) if x.dtype == torch.float32 else {}), what="rows_stable")
    close(rows[finite].to(expected.dtype), expected[finite], **tolerance, what="rows")
    assert (rows[~has] == 0).all() and (finite <= has).all()
    recommended = case["loss_recommended"]
    close(loss.to(recommended.dtype), recommended, f64=1e-5 if x.dtype == torch.float32 else 1e-9,
          what="loss_recommended")
    assert x.grad.isfinite().all()
    theirs = case["g_logits"]
    if case["loss"].isfinite():
        assert has.all()
        close(loss, case["loss"], what="loss")
        close(x.grad, theirs, atol=1e-12, what="g_logits")
    else:  # differs from the released code on purpose
        assert theirs.isnan().any()
        assert not x.grad[~has].any()
        kept = theirs.isfinite().all(1)  # rows that are right there have it as a mean over all
        close(x.grad[kept] * has.sum(), theirs[kept] * len(x), atol=1e-12, what="g_logits")


def wcl_ranks(case, W):
    """Leaves of every rank: lists of z (2, b, D) and v (2, b, D), as they come from the heads."""
    def views(name):
        return [leaf(torch.stack([case[f"{name}1_r{r}"], case[f"{name}2_r{r}"]]))
                for r in range(W)]
    return views("z"), views("v")


def wcl_losses(r, z, v, y, tau, through_keys=False):
    """(E1) and (E5) of rank r, keys of other ranks constant; all with `through_keys`.

    Returns: nce, swap; logits (2b, 2B), -inf at the anchor itself; target (2b,); the rows of (E4)
    of both views.
    """
    z, v = ([F.normalize(x, dim=-1) for x in xs] for xs in (z, v))
    b, B = z[r].shape[1], sum(x.shape[1] for x in z)
    i = sum(x.shape[1] for x in z[:r]) + torch.arange(b)
    Z = torch.cat([x if i == r or through_keys else x.detach() for i, x in enumerate(z)], 1)
    V = torch.cat(v, 1) if through_keys else torch.cat(v, 1).detach()
    logits = z[r].flatten(0, 1) @ Z.flatten(0, 1).T / tau
    logits = logits.scatter(1, torch.cat([i, B + i])[:, None], -math.inf)
    target, itself = torch.cat([B + i, i]), i[:, None] == torch.arange(B)
    rows = [sup_con_rows(v[r][m] @ V[m].T / tau, y[1 - m][i, None] == y[1 - m], itself)
            for m in (0, 1)]
    return F.cross_entropy(logits, target), sum(rows).mean() / 2, logits, target, rows


def their_columns(r, sizes):
    """Our columns [Z^1; Z^2] in the order of the authors' keys [own 1, own 2, others 1, others 2],
    from their code's step 5, without a row's own."""
    B, first = sum(sizes), sum(sizes[:r])
    own = torch.arange(first, first + sizes[r])
    other = torch.tensor([i for i in range(B) if i not in own.tolist()], dtype=torch.int64)
    order = torch.cat([own, B + own, other, B + other])
    return torch.stack([order[order != a] for a in torch.cat([own, B + own]).tolist()])


@exercises("wcl", "fwd/*")
def test_wcl_forward(case):
    """(E1) to (E6) of every rank, the gradient of its own loss, and that of the sum of all with
    gradient through every key, which `fullg` documents: train does that for (E1) only."""
    W, tau = case.get("world"), case.get("t")
    z, v = wcl_ranks(case, W)
    sizes = [x.shape[1] for x in z]
    y = torch.stack([wcl.weak_labels(torch.cat([F.normalize(x[m], dim=-1) for x in v]))
                     for m in (0, 1)])
    assert torch.equal(y[0], case["labels1"]) and torch.equal(y[1], case["labels2"])
    exact = functools.partial(close, atol=1e-12)
    for r in range(W):
        nce, swap, logits, target, of_views = wcl_losses(r, z, v, y, tau)
        loss = nce + swap
        columns = their_columns(r, sizes)
        exact(logits.gather(1, columns), case[f"logits_r{r}"], what="logits")
        place = columns.gather(1, case[f"target_r{r}"][:, None])[:, 0]
        assert torch.equal(place, target)
        exact(nce, case[f"nce_r{r}"], what="nce")
        exact(swap, case[f"graph_r{r}"], what="graph")
        exact(loss, case[f"loss_r{r}"], what="loss")
        rows = F.cross_entropy(logits, target, reduction="none")
        exact(rows, case[f"nce_per_sample_r{r}"], what="nce_per_sample")
        for m, rows in enumerate(of_views):
            exact(rows, case[f"graph{m + 1}_per_sample_r{r}"], what="graph_per_sample")
        only, = torch.autograd.grad(nce, z[r], retain_graph=True)
        loss.backward()
        for m in (0, 1):
            exact(only[m], case[f"nce_g_z{m + 1}_r{r}"], what="nce_g_z")
            exact(z[r].grad[m], case[f"g_z{m + 1}_r{r}"], what="g_z")
            exact(v[r].grad[m], case[f"g_v{m + 1}_r{r}"], what="g_v")
        for x in (*z, *v):
            assert x is z[r] or x is v[r] or x.grad is None or not x.grad.any()
            x.grad = None
        for k in (1, 5):
            if f"acc{k}_r{r}" in case:
                percent, = common.accuracy(logits, target, (k,))
                assert percent == pytest.approx(case.get(f"acc{k}_r{r}"), abs=1e-4)

    sum(sum(wcl_losses(r, z, v, y, tau, through_keys=True)[:2]) for r in range(W)).backward()
    own = [x.grad.clone() for x in z]
    for r in range(W):
        for m in (0, 1):
            exact(z[r].grad[m], case[f"fullg_z{m + 1}_r{r}"], what="fullg_z")
            exact(v[r].grad[m], case[f"fullg_v{m + 1}_r{r}"], what="fullg_v")
    # ours, of the whole batch, which every process computes: the mean over all rows. Its gradient
    # is that through every key for (E1), and that of the ranks' own losses for (E5).
    share = [b / sum(sizes) for b in sizes]
    Z, V = (leaf(torch.cat([x.detach() for x in xs], 1)) for xs in (z, v))
    nce = wcl.info_nce(F.normalize(Z, dim=-1), tau)
    exact(nce, sum(p * case[f"nce_r{r}"] for r, p in enumerate(share)), what="nce, one process")
    swap = wcl.swapped(F.normalize(V, dim=-1), y, tau)
    exact(swap, sum(p * case[f"graph_r{r}"] for r, p in enumerate(share)), what="swap, one process")
    (nce + swap).backward()
    if len(set(sizes)) == 1:
        exact(W * Z.grad, torch.cat(own, 1), what="nce, one process")
    theirs = [p * torch.stack([case[f"g_v1_r{r}"], case[f"g_v2_r{r}"]])
              for r, p in enumerate(share)]
    exact(V.grad, torch.cat(theirs, 1), what="swap, one process")
    if W == 1 and V.shape[1] > 3:  # a swapped loss with gradient through its keys is another one
        assert not torch.allclose(V.grad[0], case["fullg_v1_r0"])


@exercises("wcl", "head")
def test_wcl_head(case):
    before = case.below("before")
    (hidden, d_in), d_out = before["linear1.weight"].shape, len(before["linear3.weight"])
    head = common.MLP3(d_in, hidden, d_out).to(before["linear1.weight"].dtype).train()
    missing, unexpected = head.load_state_dict(before, strict=False)
    assert not unexpected and all(k.endswith("num_batches_tracked") for k in missing)
    x = leaf(case["x"])
    out = head(x)
    close(out, case["y_train"], atol=1e-12, what="y_train")
    out.square().sum().backward()
    close(x.grad, case["gx_of_sum_y2"], f64=1e-8, atol=1e-10, what="gx")
    gradients, after = case.below("grad"), case.below("after")
    assert gradients.keys() == dict(head.named_parameters()).keys() and after
    for name, p in head.named_parameters():
        close(p.grad, gradients[name], f64=1e-8, atol=1e-10, what=name)
    for name, expected in after.items():
        close(head.state_dict()[name], expected, atol=1e-12, what=name)
    close(head.eval()(case["x"]), case["y_eval"], atol=1e-12, what="y_eval")


@exercises("wcl", "lars/*")
def test_wcl_lars(case):
    """(E7): excluded tensors are neither decayed nor scaled, those without flag are decayed."""
    decay, eps, trust, momentum = case["hyper"].tolist()
    excluded = dict(zip(case["names"], case["excluded"].tolist(), strict=True))
    parameters = {name: nn.Parameter(p) for name, p in case.below("p0").items()}
    assert parameters.keys() == excluded.keys()

    def group(names, weight_decay, adapt):
        return dict(params=[parameters[n] for n in names], weight_decay=weight_decay, adapt=adapt)

    noflag = [n for n in excluded if n.startswith("noflag")]
    left = [n for n, skip in excluded.items() if skip]
    optimizer = common.LARS([
        group([n for n in excluded if n not in noflag + left], decay, True),
        group(left, 0.0, False), group(noflag, decay, False)], 1.0, momentum, trust, eps)
    assert case.numbered("g{}") == case.numbered("p{}")[1:] == list(range(1, len(case["lr"]) + 1))
    for step, lr in enumerate(case["lr"].tolist(), 1):
        gradients = case.below(f"g{step}")
        for name, p in parameters.items():
            p.grad = gradients.get(name)
        common.set_lr(optimizer, lr)
        optimizer.step()
        for name, expected in case.below(f"p{step}").items():
            close(parameters[name], expected, atol=1e-12, what=f"p{step} {name}")
        for name, expected in case.below(f"m{step}").items():
            close(optimizer.state[parameters[name]]["momentum_buffer"], expected, atol=1e-12,
                  what=f"m{step} {name}")


def wcl_flags(**changes):
    """Flags that `wcl.learning_rate` reads."""
    return SimpleNamespace(**dict(lr_rule="fixed") | changes)


@exercises("wcl", "sched/*")
def test_wcl_schedule(case):
    """(E8). Epochs within the warm-up stay on the ramp; `check` refuses such a run."""
    epochs, warmup, per_epoch, base = case["args"].tolist()
    args = wcl_flags(epochs=int(epochs), warmup=int(warmup), lr=base)
    ours = [wcl.learning_rate(t, int(per_epoch), args) for t in range(int(epochs * per_epoch))]
    close(ours, case["lr"], atol=1e-12)


@exercises("wcl", "baselr")
def test_wcl_base_rate(case):
    """Square-root rule of (E8): the rate at the end of the warm-up."""
    for b, W, expected in zip(case["batch_per_gpu"].tolist(), case["world"].tolist(),
                              case["base_lr"].tolist(), strict=True):
        args = wcl_flags(epochs=3, warmup=1, lr=wcl.LARS["lr"], lr_rule=wcl.LARS["lr_rule"],
                         batch_size=b * W)
        assert wcl.learning_rate(7, 7, args) == pytest.approx(expected, rel=1e-12)


@exercises("wcl", "linprobe")
def test_wcl_linear_probe_rate(case):
    epochs, per_epoch = case["args"].tolist()
    recipe = linear_eval.RECIPES["wcl"]
    args = SimpleNamespace(epochs=epochs, schedule=recipe["schedule"])
    start = recipe["lr_256"] * recipe["batch_size"] / 256
    ours = [linear_eval.learning_rate(t, per_epoch, start, args) for t in range(epochs * per_epoch)]
    close(ours, case["lr"], atol=1e-9)


@exercises("wcl", "groups")
def test_wcl_groups(case):
    """The authors' parameters, by name and number, and which of them LARS leaves out."""
    hidden, dim = case["model_args"].tolist()
    with torch.device("meta"):
        model = wcl.WCL(SimpleNamespace(arch="resnet50", stem="imagenet", hidden=hidden, dim=dim,
                                        beta=1.0))
    named = {name.replace("backbone.", "net."): p for name, p in model.named_parameters()}
    assert list(named) == case["names"]
    assert [p.numel() for p in named.values()] == case["numel"].tolist()
    groups = common.lars_groups(named.items(), 1e-6)
    skipped = {id(p) for p in groups[1]["params"]}
    assert [id(p) in skipped for p in named.values()] == case["excluded"].tolist()
    by_kind = common.lars_groups(named.items(), 1e-6, by="kind")
    more = {id(p) for p in by_kind[1]["params"]} - skipped
    assert sorted(n for n, p in named.items() if id(p) in more) == [
        n for n in sorted(named) if n.endswith("downsample.1.weight")]
    assert skipped <= {id(p) for p in by_kind[1]["params"]}


@exercises("wcl", "train/*")
def test_wcl_training(case):
    """Whole steps: our module with a linear encoder, losses, LARS by name, rates. On several ranks
    as the authors have it, with constant keys of other ranks and DDP's mean of the gradients."""
    epochs, warmup, per_epoch, base, decay, steps = case["args"].tolist()
    W = 1 + max(int(k.rsplit("_r", 1)[1]) for k in case.arrays if k.startswith("nce_r"))
    init = case.below("init")
    hidden, d_out = len(init["head1.linear1.bias"]), len(init["head1.linear3.bias"])
    model = wcl.WCL(SimpleNamespace(arch="resnet-tiny", stem="imagenet", hidden=hidden, dim=d_out,
                                    beta=1.0))
    width, d_in = init["net.weight"].shape
    model.backbone = nn.Linear(d_in, width)
    for name in ("head1", "head2"):
        head = common.MLP3(width, hidden, d_out)
        if f"{name}.bn1.weight" not in init:
            head.bn1 = head.bn2 = nn.Identity()
        setattr(model, name, head)
    model.double().train()
    ours = {k: k.replace("net.", "backbone.") for k in init}
    missing, unexpected = model.load_state_dict({ours[k]: v for k, v in init.items()}, strict=False)
    assert not unexpected and all(k.endswith("num_batches_tracked") for k in missing)
    parameters = dict(model.named_parameters())
    optimizer = common.LARS(common.lars_groups(parameters.items(), decay), base)
    args = wcl_flags(epochs=int(epochs), warmup=int(warmup), lr=base)
    tau = case.get("t", 0.1)
    snapshots = case.numbered("after{}")
    assert snapshots and snapshots[-1] <= steps
    with mock.patch.object(torch.Tensor, "float", lambda x: x):  # stay in float64
        for step in range(1, int(steps) + 1):
            lr = common.set_lr(optimizer, wcl.learning_rate(step - 1, int(per_epoch), args))
            assert lr == pytest.approx(case["lr"][step - 1].item(), abs=1e-12)
            out = [model(*(case[f"x{m}_step{step}_r{r}"] for m in (1, 2))) for r in range(W)]
            z, v = zip(*out, strict=True)
            y = torch.stack([wcl.weak_labels(torch.cat([x[m] for x in v])) for m in (0, 1)])
            losses = [wcl_losses(r, z, v, y, tau)[:2] for r in range(W)]
            for r, (nce, swap) in enumerate(losses):
                close(nce, case[f"nce_r{r}"][step - 1], f64=1e-8, what=f"nce {step}")
                close(swap, case[f"graph_r{r}"][step - 1], f64=1e-8, what=f"graph {step}")
            optimizer.zero_grad(set_to_none=True)
            (sum(nce + swap for nce, swap in losses) / W).backward()  # DDP's mean
            for name, expected in case.below(f"grad{step}").items():
                close(parameters[ours[name]].grad, expected, f64=1e-8, atol=1e-11, what=name)
            optimizer.step()
            for name, expected in case.below(f"after{step}").items():
                close(model.state_dict()[ours.get(name, name)], expected, f64=1e-8, atol=1e-10,
                      what=f"after{step} {name}")
            for name, expected in case.below(f"mom{step}").items():
                state = optimizer.state[parameters[ours[name]]]
                close(state["momentum_buffer"], expected, f64=1e-8, atol=1e-10, what=f"mom {name}")


@exercises("wcl", "mc/*")
def test_wcl_multi_crop(case):
    """(E9), our reconstruction: the vectors are of another implementation of the same formulas."""
    W, _, C, K = (case["args"].tolist()[i] for i in (0, 1, 3, 4))
    tau = case.get("t")
    z, v = wcl_ranks(case, W)
    sizes = [x.shape[1] for x in z]
    share = [b / sum(sizes) for b in sizes]
    Z, V = (torch.cat([F.normalize(x.detach(), dim=-1) for x in xs], 1) for xs in (z, v))
    y = torch.stack([wcl.weak_labels(V[m]) for m in (0, 1)])
    assert torch.equal(y[0], case["labels1"]) and torch.equal(y[1], case["labels2"])
    crops = [torch.cat([case[f"{name}_r{r}"] for r in range(W)], 1) for name in ("zc", "vc")]
    assert len(crops[0]) == C

    def mean(name):
        return sum(p * case[f"{name}_r{r}"] for r, p in enumerate(share))

    for kind, name in (("neighbours", "knn"), ("components", "comp")):
        P = wcl.crop_positives(V, y, SimpleNamespace(crop_positives=kind, crop_k=K))
        if kind == "neighbours":
            for m in (0, 1):
                assert torch.equal(P[m], case[f"knn_pos{m + 1}"].bool())
        zc, vc = map(leaf, crops)
        c_nce, c_k = wcl.multi_crop(F.normalize(zc, dim=-1), F.normalize(vc, dim=-1), Z, V, P, tau)
        close(c_nce, mean("c_nce"), atol=1e-12, what="c_nce")
        close(c_k, mean(f"c_{name}"), atol=1e-12, what=f"c_{name}")
        (c_nce + c_k).backward()
        for r, (g_zc, g_vc) in enumerate(zip(zc.grad.split(sizes, 1), vc.grad.split(sizes, 1))):
            close(g_zc, share[r] * case[f"g_zc_r{r}"], atol=1e-12, what="g_zc")
            close(g_vc, share[r] * case[f"g_vc_{name}_r{r}"], atol=1e-12, what=f"g_vc_{name}")


@exercises("wcl", "meta")
def test_wcl_meta(case):
    """The cases that the file lists are those that it has."""
    assert sorted(case["fwd_cases"]) == sorted(c.name for c in cases("wcl", "fwd/*"))
    assert case["torch"]


# ===================================================================================== CLD
#
# Tables are those of cld.Bank and common.Queue; where the original's update lives in a backward
# pass, ours is called after it.

exact = functools.partial(close, f64=1e-9, f32=1e-5, atol=1e-11)


def grouping(case):
    """Arguments k, iters, k_eigen of a case of the cross-level loss."""
    k_eigen = 0 if case.get("use_kmeans") else case.get("k_eigen")
    assert case.get("k_eigen") >= k_eigen
    return case.get("k"), case.get("iters"), k_eigen


@exercises("cld", "kmeans/*")
def test_cld_kmeans(case):
    """(E6), in both precisions: the first k rows, ties to the first, zero rows for empty groups."""
    x, k, iters = leaf(case["x"]), case.get("k"), case.get("iters")
    ids, M = cld.group(x, k, iters)
    assert ids.dtype == torch.int64 and torch.equal(ids, case["labels"])
    assert torch.equal(cld.kmeans(x.float(), k, iters), ids)
    exact(M, case["centroids"], what="centroids")
    empty = torch.bincount(ids, minlength=k) == 0
    assert (M[empty] == 0).all()
    (case["w"] * M).sum().backward()
    exact(x.grad, case["grad_x"], what="grad_x")


@exercises("cld", "cld/*")
def test_cross_level_loss(case):
    """(E7), with the gradient through the centroids; and what detached ones would give."""
    k, iters, k_eigen = grouping(case)
    t, f1, f2 = case.get("t"), leaf(case["f1"]), leaf(case["f2"])
    f = torch.stack([f1, f2])
    groups = [cld.group(x, k, iters, cld.cut_vectors(x, k_eigen) if k_eigen else x) for x in f]
    for number, (ids, M) in enumerate(groups, 1):
        assert torch.equal(ids, case[f"labels{number}"])
        exact(M, case[f"centroids{number}"], what=f"centroids{number}")
    for x, (ids, M), name in zip(f, reversed(groups), ("12", "21"), strict=True):
        l = F.cross_entropy(x @ M.T / t, ids, reduction="none")
        exact(l, case[f"per_sample_{name}"], what=f"per_sample_{name}")
        exact(l.mean(), case[f"loss_{name}"])
    loss, accuracy = cld.cld(f, k, iters, t, k_eigen)
    exact(loss, case["loss"])
    assert case.get("lambda") >= 0
    assert 100 * accuracy.item() == pytest.approx(case.get("group_acc"))
    loss.backward()
    exact(f1.grad, case["grad_f1"], what="grad_f1")
    exact(f2.grad, case["grad_f2"], what="grad_f2")

    single = cld.cld(f.detach().float(), k, iters, t, k_eigen)[0]
    close(single.double(), case["loss"], f64=1e-5, what="float32")

    half1, half2 = leaf(case["f1"]), leaf(case["f2"])
    (ids1, M1), (ids2, M2) = groups
    detached = (F.cross_entropy(half1 @ M2.detach().T / t, ids2) +
                F.cross_entropy(half2 @ M1.detach().T / t, ids1)) / 2
    detached.backward()
    exact(half1.grad, case["grad_f1_detached_centroids"])
    exact(half2.grad, case["grad_f2_detached_centroids"])
    if case["grad_f1"].abs().max() > 1e-6:
        assert half1.grad.norm() < 0.9 * f1.grad.norm()


@exercises("cld", "ncut/*")
def test_normalised_cuts(case):
    """(E10). Signs of eigenvectors are free; labels do not depend on them."""
    x, k_eigen, sigma = leaf(case["x"]), case.get("k_eigen"), case.get("sigma")
    k, iters = case.get("clusters"), case.get("iters")
    W = cld.affinity(x.detach(), sigma)
    exact(W, case["affinity"], what="affinity")
    d = W.sum(1)
    exact(d, case["degree"], what="degree")
    L = (torch.diag(d) - W) / (d[:, None] * d).sqrt()
    exact(L, case["laplacian"], what="laplacian")
    exact(torch.linalg.eigvalsh(L), case["eigenvalues"], what="eigenvalues")

    Y = cld.cut_vectors(x, k_eigen, sigma)
    assert not Y.requires_grad
    exact(Y.abs(), case["k_eigvec"].abs(), f64=1e-8, atol=1e-8, what="k_eigvec")
    exact(Y[:, 0], torch.ones_like(d), f64=1e-8, what="trivial eigenvector")
    for vectors in (Y, Y.float(), cld.cut_vectors(x.detach().float(), k_eigen, sigma)):
        assert torch.equal(cld.kmeans(vectors, k, iters), case["labels"])
    if sigma == 1:
        assert torch.equal(cld.group(x, k, iters, Y)[0], case["labels"])
    M = cld.centroids(x, case["labels"], k)
    exact(M, case["centroids"], what="centroids")
    (case["w"] * M).sum().backward()
    exact(x.grad, case["grad_x"], what="grad_x")


def blocks(V, n):
    """Logits at a time so that the bank is taken by one block, and by several."""
    return [2 ** 26, n * max(1, len(V) // 3), 1]


@exercises("cld", "npid/full")
def test_npid(case):
    """(E2), (E4), one view: the update comes after the loss, which only reads the bank."""
    bank, t, m = cld.Bank(case["memory0"]), case.get("t"), case.get("m")
    steps = case.numbered("step{}")
    assert steps
    for step in (case.below(f"step{s}") for s in steps):
        y, before = step["y"], bank.V.clone()
        exact(step["x"] @ bank.V.T / t, step["logits"], what="logits")
        for block in blocks(bank.V, len(y)):
            x = leaf(step["x"])
            l = [cld.npid(row[None], bank.V, i[None], t, block) for row, i in zip(x, y)]
            exact(torch.stack(l), step["per_sample"], what="per_sample")
            loss = cld.npid(x, bank.V, y, t, block)
            exact(loss, step["loss"], what="loss")
            loss.backward()
            exact(x.grad, step["grad_x"], what="grad_x")
        assert torch.equal(bank.V, before)
        bank.update(step["x"][None], y, m)
        exact(bank.V, step["memory"], what="memory")
        others = torch.ones(len(before), dtype=torch.bool).index_fill(0, y, False)
        assert torch.equal(bank.V[others], before[others])


@exercises("cld", "npid/full2")
def test_npid_of_two_views(case):
    """One snapshot of the bank for both losses, then view 2 and on top of it view 1.

    The original's gradient of view 1 is taken with the bank that view 2 has written already.
    """
    bank, t, m = cld.Bank(case["memory0"]), case.get("t"), case.get("m")
    steps = case.numbered("step{}")
    assert steps
    for step in (case.below(f"step{s}") for s in steps):
        y, x1, x2 = step["y"], leaf(step["x1"]), leaf(step["x2"])
        l1, l2 = (cld.npid(x, bank.V, y, t) for x in (x1, x2))
        exact(l1, step["loss1"])
        exact(l2, step["loss2"])
        loss = (l1 + l2) / 2
        exact(loss, step["loss"])
        loss.backward()
        exact(x1.grad, step["grad_x1"], what="grad_x1")
        exact(x2.grad, step["grad_x2"], what="grad_x2")
        exact(x2.grad, step["grad_x2_original"], what="grad_x2_original")

        half = cld.Bank(bank.V.clone())
        half.update(x2.detach()[None], y, m)
        p = (x1.detach() @ bank.V.T / t).softmax(1)
        p[torch.arange(len(y)), y] -= 1
        exact(p @ half.V / (2 * len(y) * t), step["grad_x1_original"], what="grad_x1_original")

        other = cld.Bank(bank.V.clone())
        other.update(torch.stack([x2.detach(), x1.detach()]), y, m)
        exact(other.V, step["memory_if_view1_first"], what="memory_if_view1_first")
        bank.update(torch.stack([x1.detach(), x2.detach()]), y, m)
        exact(bank.V, step["memory"], what="memory")
        assert (bank.V - other.V).abs().max() > 1e-3


@exercises("cld", "npid/nce")
def test_npid_nce(case):
    """(E3), (E4): Z is set by the first batch and stays."""
    bank, t, m = cld.Bank(case["memory0"]), case.get("t"), case.get("m")
    n, steps = case.get("n_data"), case.numbered("step{}")
    assert n == len(bank.V) and steps and bank.Z == -1
    for s in steps:
        step = case.below(f"step{s}")
        x, idx = leaf(step["x"]), step["idx"]
        assert idx.shape[1] == 1 + case.get("negatives") and torch.equal(idx[:, 0], step["y"])
        exps = cld.exp_similarity(x, bank.V, idx, t)
        if s == 0:
            bank.set_Z(exps)
        exact(bank.Z, step["z"], what="z")
        assert not bank.Z.requires_grad
        exact(exps / bank.Z, step["probs"], what="probs")
        loss = cld.npid_nce(exps / bank.Z, n, case.get("eps"))
        exact(loss, step["loss"], what="loss")
        loss.backward()
        exact(x.grad, step["grad_x"], what="grad_x")
        bank.update(x.detach()[None], step["y"], m)
        exact(bank.V, step["memory"], what="memory")


@exercises("cld", "npid/nce2")
def test_npid_nce_of_two_views(case):
    """Z from view 1 of the first step. Of the original's two updates only that of view 1 is kept;
    we make both, so the bank of the next step is set to theirs."""
    bank, t, m = cld.Bank(case["memory0"]), case.get("t"), case.get("m")
    n, steps = case.get("n_data"), case.numbered("step{}")
    assert n == len(bank.V) and steps
    for s in steps:
        step = case.below(f"step{s}")
        x1, x2, y = leaf(step["x1"]), leaf(step["x2"]), step["y"]
        assert step["idx1"].shape[1] == 1 + case.get("negatives")
        e1, e2 = (cld.exp_similarity(x, bank.V, step[f"idx{v}"], t)
                  for v, x in ((1, x1), (2, x2)))
        if s == 0:
            bank.set_Z(e1)
        exact(bank.Z, step["z"], what="z")
        exact(e1 / bank.Z, step["probs1"], what="probs1")
        exact(e2 / bank.Z, step["probs2"], what="probs2")
        loss = (cld.npid_nce(e1 / bank.Z, n) + cld.npid_nce(e2 / bank.Z, n)) / 2
        exact(loss, step["loss"], what="loss")
        loss.backward()
        exact(x1.grad, step["grad_x1"], what="grad_x1")
        exact(x2.grad, step["grad_x2"], what="grad_x2")
        ours = cld.Bank(bank.V.clone())
        ours.update(torch.stack([x1, x2]).detach(), y, m)
        bank.update(x1.detach()[None], y, m)
        exact(bank.V, step["memory_original"], what="memory_original")
        assert (ours.V - bank.V).abs().max() > 1e-3


@exercises("cld", "npid/gathered")
def test_npid_of_two_ranks(case):
    """The bank takes the rows of all ranks. The logits, sampled rows in a softmax, are of code that
    no script of the authors runs."""
    bank, t, m = cld.Bank(case["memory0"]), case.get("t"), case.get("m")
    steps = case.numbered("step{}")
    assert steps
    for s in steps:
        step = case.below(f"step{s}")
        ranks = sorted({key.split("/")[0] for key in step if key.startswith("rank")})
        assert len(ranks) > 1
        for r in ranks:
            x, idx = leaf(step[f"{r}/x"]), step[f"{r}/idx"]
            assert torch.equal(idx[:, 0], step[f"{r}/y"])
            logits = cld.exp_similarity(x, bank.V, idx, t).log()
            exact(logits, step[f"{r}/logits"], what="logits")
            loss = F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.int64))
            exact(loss, step[f"{r}/loss"], what="loss")
            loss.backward()
            exact(x.grad, step[f"{r}/grad_x"], what="grad_x")
        bank.update(torch.cat([step[f"{r}/x"] for r in ranks])[None],
                    torch.cat([step[f"{r}/y"] for r in ranks]), m)
        exact(bank.V, step["memory"], what="memory")


@exercises("cld", "npid/total")
def test_npid_and_cld(case):
    """(E2) + lambda (E7) = (E8)."""
    fi1, fi2, fg1, fg2 = (leaf(case[name]) for name in ("fi1", "fi2", "fg1", "fg2"))
    V, y, t = case["memory0"], case["y"], case.get("t")
    instance = (cld.npid(fi1, V, y, t) + cld.npid(fi2, V, y, t)) / 2
    group, _ = cld.cld(torch.stack([fg1, fg2]), case.get("k"), case.get("iters"),
                       case.get("cld_t"))
    exact(instance, case["loss_ins"], what="loss_ins")
    exact(group, case["loss_cld"], what="loss_cld")
    loss = instance + case.get("lambda") * group
    exact(loss, case["loss"], what="loss")
    loss.backward()
    for name, x in dict(fi1=fi1, fi2=fi2, fg1=fg1, fg2=fg2).items():
        exact(x.grad, case[f"grad_{name}"], what=name)


def moco_logits(q, k, Q, tau):
    """[q . k, q Q^T] / T of (E5): (b, 1 + K)."""
    return torch.cat([(q * k).sum(1, keepdim=True), q @ Q.T], 1) / tau


@exercises("cld", "moco/queue")
def test_moco(case):
    """(E5): both queries against the queue before this step's keys enter, which wraps around."""
    queue, t, steps = common.Queue(case["queue0"]), case.get("t"), case.numbered("step{}")
    assert steps
    for s in steps:
        step = case.below(f"step{s}")
        q1, q2, k = leaf(step["q1"]), leaf(step["q2"]), step["k"]
        for number, q in ((1, q1), (2, q2)):
            exact(moco_logits(q, k, queue.keys, t), step[f"logits{number}"], what="logits")
            exact(cld.moco(q, k, queue.keys, t), step[f"loss{number}"], what="loss")
        loss = (cld.moco(q1, k, queue.keys, t) + cld.moco(q2, k, queue.keys, t)) / 2
        exact(loss, step["loss"])
        loss.backward()
        exact(q1.grad, step["grad_q1"], what="grad_q1")
        exact(q2.grad, step["grad_q2"], what="grad_q2")
        queue.enqueue(k)
        exact(queue.keys, step["queue"], what="queue")
        assert queue.ptr == step["ptr"]


def weights_below(case, stem):
    """{parameter name: tensor}: in this file their dots are slashes, as in all keys."""
    return {name.replace("/", "."): w for name, w in case.below(stem).items()}


class ToyCLD(nn.Module):
    """The network of the authors' runs: linear layers without bias."""

    def __init__(self, init):
        super().__init__()
        for name, weight in init.items():
            name = name.removesuffix(".weight")
            self.add_module(name, nn.Linear(*weight.T.shape, bias=False, dtype=weight.dtype))
        self.load_state_dict(init)

    def forward(self, x):
        h = self.fc(x).relu()
        return cld.l2_normalize(self.instDis(h)), cld.l2_normalize(self.groupDis(h))


@exercises("cld", "moco/*/w*")
def test_moco_and_cld_run(case):
    """Whole steps on one and on two ranks, gradients averaged by hand: groups of each rank, the
    keys of all ranks in the queue, the key network after the step of SGD or, in the ImageNet code,
    before the next key pass, which moves no loss."""
    early = "/imagenet/" in case.prefix
    query, key = (ToyCLD(weights_below(case, "init")) for _ in range(2))
    queue, t, t_cld = common.Queue(case["queue0"]), case.get("t"), case.get("cld_t")
    lambd, k, iters = case.get("lambda"), case.get("k"), case.get("iters")
    optimizer = torch.optim.SGD(query.parameters(), case.get("lr"), case.get("sgd_momentum"),
                                weight_decay=case.get("wd"))
    steps = case.numbered("step{}")
    assert steps
    for step in (case.below(f"step{s}") for s in steps):
        names = sorted({name.split("/")[0] for name in step if name.startswith("rank")})
        if early:
            common.momentum_update(key, query, case.get("alpha"))
        with torch.no_grad():
            keys = [key(step[f"{r}/x_key"])[0] for r in names]
        losses, group_features = [], []
        for r, k_r in zip(names, keys, strict=True):
            (q1, g1), (q2, g2) = query(step[f"{r}/x1"]), query(step[f"{r}/x2"])
            for v, q, g in ((1, q1, g1), (2, q2, g2)):
                exact(moco_logits(q, k_r, queue.keys, t), step[f"{r}/logits{v}"])
                exact(cld.moco(q, k_r, queue.keys, t), step[f"{r}/loss_ins{v}"])
                if f"{r}/fg{v}" in step:
                    exact(g, step[f"{r}/fg{v}"], what="f_G")
            l, _ = cld.cld(torch.stack([g1, g2]), k, iters, t_cld)
            exact(l, step[f"{r}/loss_cld"], what="loss_cld")
            group_features.append(torch.stack([g1, g2]).detach())
            loss = (cld.moco(q1, k_r, queue.keys, t) + cld.moco(q2, k_r, queue.keys, t)) / 2
            losses.append(loss + lambd * l)
            exact(losses[-1], step[f"{r}/loss"], what="loss")
        # --group-rows: the groups of each rank, as parts of the whole batch
        rows = {g.shape[1] for g in group_features}
        assert len(rows) == 1
        l, _ = cld.cld(torch.cat(group_features, 1), k, iters, t_cld, group_rows=rows.pop())
        exact(l, sum(step[f"{r}/loss_cld"] for r in names) / len(names), what="group_rows")
        optimizer.zero_grad()
        (sum(losses) / len(losses)).backward()
        optimizer.step()
        queue.enqueue(torch.cat(keys))
        if not early:
            common.momentum_update(key, query, case.get("alpha"))
        for name, p in query.named_parameters():
            at = name.replace(".", "/")
            exact(p.grad, step[f"grad/{at}"], what=f"gradient of {name}")
            exact(p, step[f"query/{at}"], what=f"query {name}")
            exact(key.state_dict()[name], step[f"key/{at}"], what=f"key {name}")
        exact(queue.keys, step["queue"], what="queue")
        assert queue.ptr == step["ptr"]


@exercises("cld", "infomin/queue")
def test_infomin_as_released(case):
    """The original enqueues with every query: the second one meets its own key among the negatives,
    so its loss cannot fall below ln 2. We enqueue once (infomin/fixed)."""
    queue, t, steps = common.Queue(case["queue0"]), case.get("t"), case.numbered("step{}")
    assert steps
    for s in steps:
        step, total = case.below(f"step{s}"), 0
        k, beta = step["k"], step["beta"].item()
        for number, end in ((1, ""), (2, "_original")):
            for name, weight in ((f"q{number}", 1 - beta), ("q_jig", beta)):
                logits = moco_logits(step[name], k, queue.keys, t)
                stored = f"logits{number}" if name != "q_jig" else f"logits_jig{number}"
                exact(logits, step[stored + end], what=stored)
                l = F.cross_entropy(logits, torch.zeros(len(k), dtype=torch.int64),
                                    reduction="none")
                assert number == 1 or (l > np.log(2) - 1e-9).all()
                total = total + weight * l.mean() / 2
            queue.enqueue(k)
        exact(total, step["loss_original"], what="loss_original")
        exact(queue.keys, step["queue_original"], what="queue_original")
        assert queue.ptr == step["ptr_original"]


@exercises("cld", "infomin/fixed")
def test_infomin(case):
    queue, t, beta = common.Queue(case["queue0"]), case.get("t"), case.get("beta")
    steps = case.numbered("step{}")
    assert steps
    for s in steps:
        step = case.below(f"step{s}")
        queries = {name: leaf(step[name]) for name in ("q1", "q2", "q_jig")}
        k = step["k"]
        for name, stored in (("q1", "logits1"), ("q2", "logits2"), ("q_jig", "logits_jig")):
            exact(moco_logits(queries[name], k, queue.keys, t), step[stored], what=stored)
        q = torch.stack([queries["q1"], queries["q2"]])
        loss = cld.infomin(q, queries["q_jig"], k, queue.keys, t, beta)
        exact(loss, step["loss"], what="loss")
        loss.backward()
        for name, x in queries.items():
            exact(x.grad, step[f"grad_{name}"], what=name)
        queue.enqueue(k)
        exact(queue.keys, step["queue"], what="queue")
        assert queue.ptr == step["ptr"]


def transposed(weights, names):
    """The files hold NormLinear weights as (in, out)."""
    return {name: w.T if name in names else w for name, w in weights.items()}


@exercises("cld", "infomin/jigsaw/*")
def test_jigsaw_head(case):
    weights = weights_below(case, "param")
    last = "fc1.2.weight" if "fc1.2.weight" in weights else "fc1.weight"
    if case.name.startswith("norm"):
        weights = transposed(weights, (last, "fc2.weight"))
    D, d = weights[last].shape[0], case["x"].shape[1]
    head = cld.Jigsaw(case.name, d, D).to(case["x"].dtype)
    head.load_state_dict(weights)
    x = leaf(case["x"])
    order = case["shuffle"].view(-1, 9)  # rows of an image, image after image
    out = head(x, order - 9 * torch.arange(len(order))[:, None])
    exact(out, case["out"], what="out")
    (case["w"] * out).sum().backward()
    exact(x.grad, case["grad_x"], what="grad_x")


@exercises("cld", "normlinear")
def test_normlinear(case):
    """(E9), before and after the L2 normalisation that follows."""
    for end, after in (("", lambda y: y), ("_l2", cld.l2_normalize)):
        x, weight = leaf(case["x"]), case["weight"].T
        layer = common.NormLinear(*case["weight"].shape).to(weight.dtype)
        assert layer.bias is None
        exact(layer.weight.norm(dim=1), torch.ones(len(weight), dtype=weight.dtype), f64=1e-6)
        layer.load_state_dict(dict(weight=weight))
        out = after(layer(x))
        exact(out, case[f"out{end}"], what=f"out{end}")
        (case["w"] * out).sum().backward()
        exact(x.grad, case[f"grad_x{end}"], what=f"grad_x{end}")
        exact(layer.weight.grad.T, case[f"grad_weight{end}"], what=f"grad_weight{end}")


def heads(case):
    """The heads of cld.CLD behind a backbone that passes x through."""
    d = case["x"].shape[1]
    names = {"instance": "inst_weight", "group": "group_weight"}
    weights = {f"{head}.weight": case[name] for head, name in names.items() if name in case}
    if "inst_bias" in case:
        weights["instance.bias"] = case["inst_bias"]
    if "weight" in case:
        weights = {"instance.weight": case["weight"], "instance.bias": case["bias"]}
    if case.name.startswith("norm"):
        weights = transposed(weights, weights)
    if "fc_weight" in case:
        weights |= {"hidden.0.weight": case["fc_weight"], "hidden.0.bias": case["fc_bias"]}
    D = len(weights["instance.weight"])
    backbone = nn.Identity()
    backbone.width = d
    with mock.patch.object(common, "resnet", lambda *_: backbone):
        net = cld.CLD(SimpleNamespace(arch="", stem="imagenet", head=case.name, dim=D, base="npid",
                                      lambda_cld=1.0))
    net.double()
    assert not net.load_state_dict(weights, strict=False).unexpected_keys
    f_I, f_G, *_ = net(case["x"])
    exact(f_I[0], case["fi" if "fi" in case else "out_l2"], what="f_I")
    if "fg" in case:
        exact(f_G[0], case["fg"], what="f_G")


test_linear_head, test_mlp_head, test_normmlp_head = (
    exercises("cld", name)(heads) for name in ("linear", "mlp", "normmlp"))


@exercises("cld", "knn/*")
def test_cld_knn(case):
    """(E11). Our weights are relative to the nearest row's, which changes no order."""
    train, test, k, t = case["train"], case["test"], case.get("k"), case.get("t")
    scores = case["scores"]
    C = scores.shape[1]
    ours = common.knn_scores(test, train, case["train_labels"], C, k, t)
    nearest = (test @ train.T).max(1, keepdim=True).values
    exact(ours * (nearest / t).exp(), scores, what="scores")
    assert torch.equal(ours.argmax(1), case["pred"])
    labels = case["test_labels"]
    top1, top5 = common.accuracy(ours, labels, (1, 5))
    assert top1 == pytest.approx(100 * case.get("top1"))
    assert top5 == pytest.approx(100 * case.get("top5"))


@exercises("cld", "lr/*")
def test_cld_lr(case):
    base, E = case.get("base"), case.get("epochs")
    if "lr_per_epoch" in case:
        flags, iters, expected = dict(schedule="cosine-epoch", warmup=0), 1, case["lr_per_epoch"]
    else:
        iters, expected = case.get("iters_per_epoch"), case["lr"]
        flags = dict(schedule="infomin", warmup=case.get("warm_epochs"))
    if "warmup_from" in case:
        start = case.get("warmup_from")
        ours = [common.warmup_by_epoch(s, iters, E, base, flags["warmup"], start)
                for s in range(E * iters)]
        close(ours, expected, what="warmup_by_epoch")
        if start != 0.01:  # what --schedule infomin has
            return
    if "multiplier" in case:
        assert (case.get("multiplier"), case.get("eta_min")) == (100, 1e-6)  # as in the code
        flags = dict(schedule="steps" if case.name.startswith("step") else "cosine",
                     warmup=case.get("warmup_epochs"), milestones=case["decay_epochs"].tolist())
    args = SimpleNamespace(lr=base, epochs=E, **flags)
    close([cld.learning_rate(s, iters, args) for s in range(E * iters)], expected, what="lr")


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


def single_ranks(R, r, cumulative=False):
    """For each rank i, R (B, 1 + M) of term i alone: rank i its positives, 0 its negatives."""
    for i in range(1, r + 1):
        one = R.where(R <= i, 0)
        better = (R > 0) & (R < i)
        one[better] = i if cumulative else -1
        if i > 1:
            one[:, 0] = -1
        yield i, one


def rank_losses(a, p, keys, R, taus, form, cumulative=False):
    """The terms L_i (r,) of E6, each from a loss of which it is the only term that is not 0."""
    return torch.stack([i * rince.rince(a, p, keys, one, taus[:i], form, cumulative)
                        for i, one in single_ranks(R, len(taus), cumulative)])


def check_rince(case, stem, a, p, keys, R, taus, cumulative=False):
    """loss, loss_per_rank, per_anchor, n_pos, n_neg and grad_anchor below `stem` of a case."""
    form, taus = RINCE_FORMS[stem.split("/")[-1]], taus.tolist()
    exact = a.dtype == torch.float64
    f64 = 1e-9 if exact else 1e-5
    a = leaf(a)
    loss = rince.rince(a, p, keys, R, taus, form, cumulative)
    loss.backward()
    close(rank_losses(a, p, keys, R, taus, form, cumulative).double(),
          case[f"{stem}/loss_per_rank"], f64, atol=1e-11, what="per rank")
    single = list(single_ranks(R, len(taus), cumulative))
    n_pos = torch.stack([(one == i).sum(1) for i, one in single], 1)
    assert torch.equal(n_pos, case[f"{stem}/n_pos"])
    if f"{stem}/n_neg" in case:
        n_neg = torch.stack([(one == 0).sum(1) for _, one in single], 1)
        assert torch.equal(n_neg, case[f"{stem}/n_neg"])
    empty = (n_pos.sum(0) == 0).any()  # then the original's total is a float32 number
    close(loss.double(), case[f"{stem}/loss"].double(), 1e-6 if empty else f64, atol=1e-11,
          what="loss")
    close(grad(a), case[f"{stem}/grad_anchor"], 1e-6 if empty else f64, atol=1e-11, what="grad")
    per_anchor = torch.stack([
        rank_losses(a[[n]], p[[n]], keys, R[[n]], taus, form, cumulative) for n in range(len(a))])
    expected = case[f"{stem}/per_anchor"]  # NaN: no entry, which adds exactly 0
    assert (per_anchor[expected.isnan()] == 0).all()
    close(per_anchor.double(), expected.nan_to_num(), f64, atol=1e-11, what="per anchor")


def check_queue_case(case):
    """(E1) to (E6) on a queue; returns R and the temperatures."""
    low, high, taus = case.get("min_tau"), case.get("max_tau"), case["taus"]
    table, steps = distance_table(case["class_dist"], taus.tolist(), low, high)
    R = rince.rank_of(case["labels"], table, case["queue_labels"])
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
    R = rince.rank_of(case["labels"], table)
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
    R = rince.rank_of(case["labels"], cifar_table(), case["queue_labels"])
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
    R = rince.rank_of(y, table, y_keys)
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
        R = rince.rank_of(now["labels"], table, queue.labels)
        loss = rince.rince(a, p, queue.keys, R, taus, "out-in", cifar)
        sgd.zero_grad()
        loss.backward()
        terms = rank_losses(a, p, queue.keys, R, taus, "out-in", cifar)
        f64 = 1e-9 if step and (terms > 0).all() else 1e-6
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

    The loss of one process's rows gives their numbers. Ours is the loss of the whole batch: the
    same for the mean over anchors where all have a positive, another for pairs.
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
            local, anchors, keys = [], [], []
            sgd.zero_grad()
            for r in range(x.shape[1]):
                y = labels[step, r]
                raw = F.normalize(x[step, r, 0] @ w_q[0].T, dim=1)
                a = raw.detach().requires_grad_()
                p = F.normalize(x[step, r, 1] @ w_k[0].T, dim=1).detach()
                R = rince.rank_of(y, table, queue.labels)
                loss = rince.rince(a, p, queue.keys, R, taus, form)
                anchors.append(a)
                keys.append(p)
                local.append(loss.item())
                loss.backward()
                raw.backward(a.grad / x.shape[1])  # DDP's mean
                # a float32 total, now or in a step before
                empty = (rank_losses(a, p, queue.keys, R, taus, form) == 0).any()
                f64 = 1e-6 if empty or step else 1e-9
                stem = f"rank{r}"
                close(loss.double(), now[f"{stem}/loss"].double(), 1e-6, what=f"{stem} loss")
                close(a, now[f"{stem}/anchor"], 1e-6, what=f"{stem} anchor")
                close(p, now[f"{stem}/key"], 1e-6, what=f"{stem} key")
                close(a.grad, now[f"{stem}/grad_anchor"], f64, 1e-6, what=f"{stem} gradient")
            close(w_q[0].grad, now["grad_w_mean"], 1e-6, what="gradient")
            y, p = labels[step].flatten(), torch.cat(keys)
            R = rince.rank_of(y, table, queue.labels)
            ours = rince.rince(torch.cat(anchors), p, queue.keys, R, taus, form).item()
            differs.append(abs(ours - sum(local) / len(local)))
            sgd.step()
            queue.enqueue(p, y)
            for ours, name in ((w_q[0], "w_q"), (w_k[0], "w_k"), (queue.keys, "queue")):
                close(ours, now[name], 1e-6, what=f"{variant} step {step} {name}")
            assert torch.equal(queue.labels, now["queue_labels"])
            assert queue.ptr == now["ptr"] % len(queue.keys)
    assert max(differs) > 1e-6


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
    close([common.warmup_by_epoch(step, iterations, epochs, lr, warmup, rate=rate)
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


# ===================================================================================== SogCLR, CLIP
#
# One direction after the other: images (rows of S) against texts, texts against images. Cases of
# two ranks hold the global batch; there the loss of the original is that of all pairs on every
# rank, and its gradients are the slices of one process (see `of`), as ours are before the factor
# of common.gather.


def clip_cases(*patterns):
    """`exercises` for several patterns, in both precisions if the test has a `dtype`."""
    def decorate(test):
        if "dtype" in inspect.signature(test).parameters:
            test = conditioned(test)
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
    """Leaves img, txt (B, D), and the mask of negatives."""
    img, txt = (leaf(case[k][t].to(dtype)) for k in ("in_img", "in_txt"))
    return img, txt, ~sogclr_clip.own_pairs(img)


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

    direction(S, negative, old, hp, epoch, side, t) gives L and the new values of the rows;
    state is kept here by id, `start` are its initial values.
    """
    hp, B = hyper(case), case["in_img"].shape[1]
    case.read.add("extra")  # informative only
    state = {s: {k: torch.full((N,), v, dtype=dtype) for k, v in start.items()} for s in "IT"}
    g = torch.Generator().manual_seed(len(measuring[-1]) if measuring else 0)
    for t in range(len(case["in_img"])):
        img, txt, negative = features_of(case, t, dtype)
        loss = 0.0
        for side, S, ids in (("I", img @ txt.T, case["in_img_ids"][t]),
                             ("T", txt @ img.T, case["in_txt_ids"][t])):
            old = {k: v[ids] for k, v in state[side].items()}
            L, new = direction(S, negative, old, hp, case["in_epoch"][t].item(), side, t)
            for k, v in new.items():
                state[side][k][ids] = moved(v, g) if measuring else v
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
        img, txt, negative = features_of(case, t, dtype)
        loss = sogclr_clip.clip(img @ txt.T, negative, tau, tau)
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
        img, txt, negative = features_of(case, t, dtype)
        tau = leaf(case["hp_temperature"].to(dtype))
        loss = sogclr_clip.clip(img @ txt.T, negative, tau, tau)
        same_step(case, t, loss, img, txt, dtype)
        close(tau.grad, case["gradp_temp"][t].to(dtype), 1e-10, 1e-4, what="gradp_temp")


@clip_cases("clip_pers")
def test_clip_with_tau_per_sample(case):
    """The original divides columns by the temperatures of rows; ours divides rows."""
    for t in range(len(case["in_img"])):
        img, txt, negative = features_of(case, t)
        tau_I, tau_T = leaf(case["in_image_tau"]), leaf(case["in_text_tau"])
        p, q = case["in_img_ids"][t], case["in_txt_ids"][t]
        fixed = sogclr_clip.clip(img @ txt.T, negative, tau_I[p][:, None], tau_T[q][:, None])
        close(fixed, case["loss_rowwise_fixed"][t], 1e-10, what="row-wise")
        own = torch.arange(len(img))
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
        img, txt, negative = features_of(case, t, dtype)
        S, tau = img @ txt.T, hp["temperature"]
        loss = sogclr_clip.clip(S, negative, tau, tau) + sogclr_clip.cyclip(
            S, img @ img.T, txt @ txt.T, hp["lambda_in"], hp["lambda_cross"])
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


def surrogate(S, negative, old, gamma, hp):
    """SogCLR with h(D) = max(0, D + c)^2 in the place of D, an option of the original."""
    D = (sogclr_clip.difference(S) + hp["surrogate_c"]).clamp(min=0).square()
    z = D.detach() / hp["temperature"]
    b = torch.maximum(old["b"], z.amax(1))
    L, log_u, *_ = sogclr_clip.estimate(D, z, old["log_u"], gamma, negative,
                                        math.log(hp["eps"]) + b)
    return L, dict(log_u=log_u, b=b)


@clip_cases("sogclr", "sogclr_t001", "sogclr_g01", "sogclr_sqh", "sogclr_late", "sogclr_upstream",
            "ws2_sogclr", "ws2_sogclr_upstream")
def test_sogclr(case, dtype):
    """(E4) to (E11). The original's rule for a first visit after epoch 0 is u = gamma g; its
    earlier release counts the pair itself and knows no rule for epoch 0."""
    upstream = case.prefix.endswith("upstream")

    def direction(S, negative, old, hp, epoch, side, t):
        gamma = 1.0 if epoch == 0 and not upstream else hp["gamma"]
        if case.prefix == "sogclr_sqh":
            return surrogate(S, negative, old, gamma, hp)
        if upstream:
            tau = torch.full_like(S[:, 0], hp["temperature"])
            L, log_u, b, _ = sogclr_clip.sogclr_dro(S, negative, old["log_u"], old["b"], tau,
                                                    gamma, 0.0, hp["eps"])
        else:
            L, log_u, b = sogclr_clip.sogclr(S, negative, old["log_u"], old["b"],
                                             hp["temperature"], gamma, hp["eps"])
        return L, dict(log_u=log_u, b=b)

    walk(case, direction, dtype, size(case), log_u=-math.inf, b=0.0)
    for t in range(len(case["in_img"])):  # the file of two ranks: gradients of one process
        for name in ("full_loss", "full_grad_img", "full_grad_txt"):
            if name in case:
                close(of(case, name.removeprefix("full_"), t), case[name][t], 1e-10, what=name)


def weighted(S, negative, log_den, hp):
    """(E8), (E9) with a given denominator (B,)."""
    D = sogclr_clip.difference(S)
    w = torch.exp(D.detach() / hp["temperature"] - log_den[:, None]) * negative
    return ((w * D).sum(1) / negative.sum(1)).mean()


@clip_cases("sogclr_dup")
def test_sogclr_with_an_id_twice(case):
    """Both rows of an id start from the same u; the table keeps the last row's value. The original
    then reads b back, so that both rows have the b of the last, which shows only in eps e^b."""
    hp, N = hyper(case), size(case)
    case.read.add("extra")
    state = {s: (torch.full((N,), -math.inf).double(), torch.zeros(N).double()) for s in "IT"}
    repeated = 0
    for t in range(len(case["in_img"])):
        img, txt, negative = features_of(case, t)
        gamma = 1.0 if case["in_epoch"][t] == 0 else hp["gamma"]
        loss = 0.0
        for side, S, ids in (("I", img @ txt.T, case["in_img_ids"][t]),
                             ("T", txt @ img.T, case["in_txt_ids"][t])):
            repeated += len(ids) - len(ids.unique())
            log_u, b = state[side]
            inputs = S, negative, log_u[ids], b[ids], hp["temperature"], gamma
            _, new_u, new_b = sogclr_clip.sogclr(*inputs, hp["eps"])
            close(sogclr_clip.sogclr(*inputs, eps=0)[0], weighted(S, negative, new_u, hp), 1e-9)
            for i in range(len(ids)):  # the last row of an id wins
                log_u[ids[i]], b[ids[i]] = new_u[i], new_b[i]
            floor = math.log(hp["eps"]) + b[ids]  # b read back
            back = weighted(S, negative, torch.logaddexp(new_u, floor), hp)
            loss = loss + back
            same_state(case, t, side, dict(log_u=log_u, b=b), torch.float64, len(ids), hp)
        same_step(case, t, loss, img, txt)
    assert repeated


def dro(case, variant):
    """`direction` of the losses with stored temperatures."""
    def direction(S, negative, old, hp, epoch, side, t):
        new = variant(S, negative, old, hp, 1.0 if epoch == 0 else hp["gamma"], t)
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
    def variant(S, negative, old, hp, gamma, t):
        L, log_u, b, G = sogclr_clip.sogclr_dro(
            S, negative, old["log_u"], old["b"], old["tau"], hp["gamma"], hp["rho"], hp["eps"])
        return dict(L=L, log_u=log_u, b=b, G=G)

    walk(case, dro(case, variant), dtype, size(case), log_u=-math.inf, b=0.0, v=0.0,
         tau=first_tau(case))


@clip_cases("isogclr_new", "isogclr_new_eta", "ws2_isogclr_new")
def test_isogclr(case, dtype):
    def variant(S, negative, old, hp, gamma, t):
        L, log_u, b, G = sogclr_clip.isogclr(
            S, negative, old["log_u"], old["b"], old["tau"], gamma, hp["rho"], hp["eps"])
        return dict(L=L, log_u=log_u, b=b, G=G)

    walk(case, dro(case, variant), dtype, size(case), log_u=-math.inf, b=0.0, v=0.0,
         tau=first_tau(case))


@clip_cases("isogclr_new_v2", "isogclr_new_v2_lam", "ws2_isogclr_new_v2")
def test_isogclr_v2(case, dtype):
    """(E20). In float32 the original fails here (s underflows); log u does not."""
    log_r, lambd, done = torch.tensor(-math.inf, dtype=dtype), hyper(case)["lamda"], None

    def variant(S, negative, old, hp, gamma, t):
        nonlocal log_r, done
        if t != done:  # once a step
            log_r = sogclr_clip.log_average(
                log_r, sogclr_clip.positives(S.diagonal().detach(), lambd), gamma)
            expected, done = of(case, "r", t).log() + of(case, "b_pos", t), t
            close(log_r, expected.to(dtype), 1e-10, 1e-4, 1e-10, "r")
        L, log_u, b, G = sogclr_clip.isogclr_v2(
            S, negative, old["log_u"], old["b"], log_r, old["tau"], gamma, hp["rho"], lambd,
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

    def direction(S, negative, old, hp, epoch, side, t):
        gamma = 1.0 if epoch == 0 else hp["gamma"]
        f = case["in_img" if side == "I" else "in_txt"][t].to(dtype)
        nets[side].zero_grad()
        tau = nets[side](f)
        close(tau, case[f"tau_out_{side}"][t].to(dtype), 1e-10, 1e-4, what="tau")
        rho = hp["rho"] if v1 else hp[f"rho_{side}"]
        if v1:
            L, log_u, G = sogclr_clip.isogclr_v1(S, negative, old["log_u"], tau.detach(),
                                                 gamma, rho)
            new = dict(log_u=log_u)
        else:
            L, log_u, b, G = sogclr_clip.isogclr(
                S, negative, old["log_u"], old["b"], tau.detach(), gamma, rho, hp["eps"])
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
        img, txt, negative = features_of(case, t, dtype)
        loss, log_n, log_p = sogclr_clip.onlineclr(img @ txt.T, negative, log_n, log_p, tau, gamma)
        for log, u, c, scale in ((log_n, "u_n", "c_n", tau), (log_p, "u_p", "c_p", 10 * tau)):
            expected = of(case, u, t).log().squeeze() + of(case, c, t) / scale
            close(log, expected.to(dtype), 1e-10, 1e-4, 1e-10, u)
        same_step(case, t, loss, img, txt, dtype)


@clip_cases("sogclr_mine", "sogclr_mine_half", "sogclr_mine_zero")
def test_sogclr_mine(case, dtype):
    """(E24) to (E26) with floor 0, and the first-visit rule."""
    hp, N = hyper(case), size(case)
    tau, log_v = hp["temperature"], torch.tensor(-math.inf, dtype=dtype)
    tables = {s: torch.full((N,), -math.inf, dtype=dtype) for s in "IT"}
    tight, loose = dict(f64=1e-10, f32=1e-4), 1e-12 if dtype == torch.float64 else 1e-4
    for t in range(len(case["in_img"])):
        img, txt, negative = features_of(case, t, dtype)
        S, epoch = img @ txt.T, case["in_epoch"][t].item()
        dv, log_v = sogclr_clip.mine(S, negative, log_v, tau, 1.0 if epoch == 0 else hp["gamma"])
        close(log_v, case["logv"][t].to(dtype), atol=loose, **tight)
        gcl = mean = 0.0
        for side, x, ids in (("I", S, case["in_img_ids"][t]), ("T", S.T, case["in_txt_ids"][t])):
            old = tables[side][ids]
            gamma = sogclr_clip.first_visit(old, epoch, hp["gamma"])
            L, log_u = sogclr_clip.info_sogclr(x, negative, old, tau, gamma)
            tables[side][ids] = log_u
            gcl, mean = gcl + L, mean - log_u.mean() / 2
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
        img, txt, negative = features_of(case, t, dtype)
        gamma, loss, grad_tau = case["in_gamma"][t].item(), 0.0, []
        for side, name, S, ids in (("I", "img", img @ txt.T, case["in_img_ids"][t]),
                                   ("T", "txt", txt @ img.T, case["in_txt_ids"][t])):
            tau = case[f"in_tau_{name}"][t].to(dtype)[:, None] if v == "2" else hp["tau"]
            L, log_u, G = sogclr_clip.fastclip(S, negative, tables[side][ids], tau, gamma,
                                               hp["rho"], hp["eps"])
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
        img, txt, negative = features_of(case, t, dtype)
        s, c = leaf(case["hp_logit_scale"].to(dtype)), leaf(case["hp_logit_bias"].to(dtype))
        same_step(case, t, sogclr_clip.siglip(img @ txt.T, negative, s, c), img, txt, dtype)
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
        img, txt, negative = features_of(case, t, dtype)
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
                wide, mask, old, tau, sogclr_clip.first_visit(old, epoch, hp["gamma"]))
            base = base + L
            new[side] = now, sogclr_clip.bank_row(bank[side][ids[side]], f.detach(),
                                                  old > -math.inf, hp["memory_momentum"])
        for side, (now, row) in new.items():
            log_u[side][ids[side]], bank[side][ids[side]] = now, row
            same_log_u(log_u[side], case[f"logu_{side}"][t], dtype)
            same(bank[side], f"bank_{side}", t)
        cov = sum(sogclr_clip.decorrelation(D ** 0.5 * f) for f in (x, y))
        diff = sogclr_clip.difficulty(S, negative, tau)
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
def test_clip_retrieval(case):
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
    words = int(case.get("hp_max_words"))
    assert [sogclr_clip.clean_caption(c, words) for c in case["in"]] == case["out"]

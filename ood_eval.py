"""Out-of-distribution detection by the backbone of a checkpoint: in-distribution test images against
sets of outliers.

--checkpoint takes every file that linear_eval.py reads, and `none`, the untrained network. The
scores are high for in-distribution images; whatever they need is fitted to the training images
alone, under the test view. Nothing is tuned on the outliers: every number below was fixed before.
With F_c the L2-normalised backbone features of the n_c training images of class c, x those of a
test image:

    gaussian     max_c log N(x; mu_c, Sigma_c), mu_c = mean of F_c, Sigma_c = (1 / n_c) sum of
                 (f - mu_c)(f - mu_c)^T + ridge I      the headline; RINCE's protocol             G1
    mahalanobis  -min_c (x - mu_c)^T Sigma^-1 (x - mu_c), one Sigma for all classes: the mean of
                 (f - mu_c)(f - mu_c)^T over all images, + ridge I         (Lee et al. 2018)      G2
    knn          -|x - f_(k)|, f_(k) the k-th nearest of all training images: no labels
                                                                           (Sun et al. 2022)      G3
    softmax      max_c p_c of the classifier, for a checkpoint of --loss ce
                                                      (Hendrycks and Gimpel 2017)                 G4

Metrics, in percent, with the in-distribution images as positives unless said otherwise. Equal scores
are one threshold: no order within a tie is ever invented.

    AUROC        area under the ROC curve, a tie counts 1/2
    AUPR-in      average precision;  AUPR-out: the outliers are the positives, low scores first
    FPR95        share of outliers above the highest threshold that keeps 95 % of the inliers
    FPR95-out    share of inliers below the lowest threshold that catches 95 % of the outliers

The intervals are bootstrap percentiles (2.5, 97.5) over the test images and outliers; they hold the
network fixed, so they say nothing about other seeds. Images of another size are resized as those of
the test set are, and normalised with its mean and deviation.

    python ood_eval.py --checkpoint runs/rince-demo-seed0/checkpoint.pt   # shapes: unseen shapes
    python ood_eval.py --checkpoint none                                  # the untrained network
    python ood_eval.py --checkpoint FILE --outliers cifar10 dtd=ood_dtd_part_32.npz art=DIR/images
Shapes: N training images, C classes, D width of the backbone, n test images and outliers, T
distinct scores.
"""
import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import common
import linear_eval

# ---------------------------------------------------------------------------------- recipes

RECIPES = {
    "rince": dict(  # RINCE's protocol: the ridge is that of scikit-learn's GaussianMixture
        ridge=1e-6,
        k=50, bootstrap=1000),  # chosen for this project, before any figure was seen
}
METRICS = ("AUROC", "AUPR-in", "AUPR-out", "FPR95", "FPR95-out")

# ---------------------------------------------------------------------------------- scores


def covariance(F_c, ridge):
    """Mean (D,) and covariance (D, D) of rows (n, D), divisor n, with ridge on the diagonal."""
    mu = F_c.mean(0)
    Sigma = (F_c - mu).T @ (F_c - mu) / len(F_c)
    return mu, Sigma + ridge * torch.eye(len(mu), dtype=Sigma.dtype, device=Sigma.device)


def whitened(x, mu, L):
    """Squared Mahalanobis distances (n,) of x (n, D) to mu, from the Cholesky factor of Sigma."""
    return torch.linalg.solve_triangular(L, (x - mu).T, upper=False).square().sum(0)


def cholesky(Sigma, what):
    """Lower factor; RunFailed if the ridge does not make Sigma positive definite."""
    L, wrong = torch.linalg.cholesky_ex(Sigma)
    if wrong or not L.isfinite().all():
        raise common.RunFailed(f"the covariance of {what} is not positive definite; use a larger "
                               "--ridge")
    return L


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
        mu, Sigma = covariance(train[labels == c], ridge)
        L = cholesky(Sigma, f"class {c}")
        log_det = 2 * L.diagonal().log().sum()
        densities.append(-0.5 * (len(mu) * math.log(2 * math.pi) + log_det + whitened(x, mu, L)))
    return torch.stack(densities, 1)


def mahalanobis(train, labels, x, ridge=1e-6):
    """Minus the smallest squared Mahalanobis distance to a class mean, tied covariance (G2).

    Args as of `class_log_densities`. Returns: (n,) float64.
    """
    train, x = train.double(), x.double()
    ids, place = labels.unique(return_inverse=True)
    means = torch.stack([train[place == c].mean(0) for c in range(len(ids))])  # (C, D)
    centred = train - means[place]
    Sigma = centred.T @ centred / len(train)
    L = cholesky(Sigma + ridge * torch.eye(len(Sigma), dtype=Sigma.dtype, device=Sigma.device),
                 "all classes")
    return -torch.stack([whitened(x, mu, L) for mu in means], 1).min(1).values


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
    """Largest class probability of features h (n, D), not normalised, under a linear head (G4)."""
    return (h.double() @ weight.double().T + bias.double()).softmax(1).max(1).values


# ---------------------------------------------------------------------------------- metrics


def histogram(inliers, outliers):
    """Numbers of inliers and outliers (T,), float64, at each distinct score, the highest first.

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
    # a bootstrap sample may lack the first scores: nothing found yet, and no step of recall
    return (hits * tp / (tp + fp).clamp(min=1)).sum(-1) / tp[..., -1]


def false_rate(hits, misses):
    """Share of `misses` at the first threshold that has 95 % of `hits`; (..., T) -> (...)."""
    tp, fp = hits.cumsum(-1), misses.cumsum(-1)
    first = (100 * tp >= 95 * tp[..., -1:]).int().argmax(-1, keepdim=True)
    return (fp.gather(-1, first) / fp[..., -1:]).squeeze(-1)


def metrics(hits, misses):
    """The five metrics as fractions, from numbers of inliers and outliers (..., T), see `histogram`.

    Returns: dict of name -> (...) float64. Leading dimensions are bootstrap samples.
    """
    tp, fp = hits.cumsum(-1), misses.cumsum(-1)
    below = tp - hits / 2  # inliers above an outlier's score, those level with it by half
    upside_down = misses.flip(-1), hits.flip(-1)  # low scores first, outliers are the positives
    return {"AUROC": (misses * below).sum(-1) / (tp[..., -1] * fp[..., -1]),
            "AUPR-in": average_precision(hits, misses), "AUPR-out": average_precision(*upside_down),
            "FPR95": false_rate(hits, misses), "FPR95-out": false_rate(*upside_down)}

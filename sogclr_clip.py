"""The SogCLR family on CLIP: SogCLR (Yuan, Wu, Qiu, Du, Zhang, Zhou, Yang, ICML 2022, arXiv
2202.12387), iSogCLR (Qiu, Hu, Yuan, Zhou, Zhang, Yang, ICML 2023, arXiv 2305.11965), TempNet (Qiu,
Guo, Xu, Zhao, Zhang, Yang, ICML 2024, arXiv 2404.04575), FastCLIP (Wei et al., arXiv 2407.01445);
with CLIP (2103.00020), CyCLIP (2205.14459), VICReg (2105.04906) and SigLIP (2303.15343).

An image is compared with all other texts of the DATA SET, and a text with all other images. One
number per anchor, u, is a moving average of its denominator, so small batches suffice.
The labels E1 to E27 are this project's, as few of the papers' numbers could be found. In FastCLIP,
E6 is Eq. (1) and E7 is Eq. (2), lines 6 and 7 of Algorithm 1; g, u, gamma, tau, eps and rho are its
symbols [T]. In iSogCLR, rho is in Eq. (6) [A]. [T] is the paper, [A] its authors' code or README.

    x_i, t_i unit features of pair i, S_ij = x_i . t_j, d_i = S_ii; B pairs; sg = stop-gradient
    CLIP     L = 1/2 [ CE(S/tau) + CE(S^T/tau) ] (E1); CyCLIP adds symmetry (E2); VICReg (E3)
    SogCLR   D_ij = S_ij - d_i, z = sg(D/tau) (E4); b <- max(b, max_j z_ij) (E5)
             g_i = mean_{j != i} e^{z_ij} (E6); u <- (1 - gamma) u + gamma g_i (E7, logs E10)
             w_ij = e^{z_ij} / (u_i + eps e^b_i) (E8, E11); L = mean_i mean_j w_ij D_ij (E9),
             plus the same for texts. L has the gradient of tau log u, but not its value.
    iSogCLR  tau_i per sample: G_i = log u_i + rho - mean_j w_ij z_ij (E12),
             v <- (1 - beta) v + beta clamp(G, -5, 5) (E13), tau <- clamp(tau - eta v) (E14)
             (LibAUC [A] writes s for u, u for v, beta_0 for gamma, beta_1 for beta, and no clamp)
    TempNet  tau = f(feature) (E15 to E19), trained by sg(G) tau; v2: DRO on positives (E20)
    onlineCLR: one global average (E21, E22)
    hybrid   a bank of features as further negatives (E23a), decorrelation (E23b), difficulty (E23c)
    InfoSogCLR: u + 1/(N - 1), the pair itself counts (E27); MINE (E24, E25) mixed in (E26)
    FastCLIP v3 (RGCL-g [T]): eps + u, one learnable tau; with --gamma-schedule cosine sogclr is v1
             (GCL [T]), isogclr v2 (RGCL [T])

Labels used:  none, but images need captions.
State kept:   the network; per image and per caption, float32: log u, and b where eps e^b is the
              floor; tau and v (sogclr-dro, isogclr, isogclr-v2); a feature (hybrid). 400 M pairs
              in every process: 6.4 GB, with tau and v 12.8 GB; hybrid at D = 512 1.6 TB.
Shapes:       N_I, N_T images and captions of the data set, B global batch, b rows of this process,
              D feature width. A loss sees one direction of the whole batch, S (B, B).
Memory:       every process holds about 6.5 B x B matrices of float32: 32 MiB at B = 1,024 and
              1.6 GiB at 8,192 (sogclr forward and backward, measured on a CPU, D = 128), 26 GiB at
              32,768 (computed).

    torchrun --standalone --nproc_per_node=2 sogclr_clip.py                  # demo on 2 CPU cores
    torchrun --standalone --nproc_per_node=2 sogclr_clip.py --loss clip --out runs/clip
    python sogclr_clip.py --recipe flickr8k --batch-size 32                  # real images, CPU
    python sogclr_clip.py --recipe cc3m --data-dir DIR --micro-batch 64      # one small GPU
    torchrun --nproc_per_node=2 sogclr_clip.py --recipe cc3m --data-dir DIR --loss isogclr
    torchrun --nproc_per_node=8 sogclr_clip.py --recipe fastclip-cc3m --data-dir DIR
CC3M as it is downloaded today: shards of img2dataset (its list needs the header caption<TAB>url).
    img2dataset --url_list cc3m.tsv --input_format tsv --url_col url --caption_col caption
        --output_format webdataset --image_size 256 --output_folder DIR/cc3m
    torchrun --nproc_per_node=2 sogclr_clip.py --recipe cc3m --data-dir DIR --train-file cc3m
    python sogclr_clip.py --evaluate runs/sogclr_clip-demo-seed0/checkpoint.pt
    python sogclr_clip.py --evaluate openclip:ViT-B-32/openai --dataset captions --test-file F.json
Measured: demo 158 CPU seconds in two processes, mean recall 0.8 -> 77.5 %, zero-shot 4.2 -> 85.9 %
of 24 classes (synthetic); flickr8k 115 to 190 CPU seconds, 1.1 GB. The results are in
results/README.md. The GPU recipes have not been run yet.
"""
import argparse
import copy
import json
import math
import os
import re
import shlex
import textwrap
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import common

# ---------------------------------------------------------------------------------- recipes

# [V] the authors' code, [A] their scripts, README or library, [T] a figure of the paper,
# [F] an argument file of a course that used their code, [K] chosen for this project
BASE = dict(  # [K], crop [V]; no colour jitter: captions name colours
    optimizer="adamw", weight_decay=0.1, schedule="cosine", crop=[0.5, 1.0], jitter=[0, 0, 0, 0],
    gray=0.0, knn_every=1)
# ImageNet zero-shot after CC3M in TempNet's README, mean of 3 seeds [A]: CLIP 36.27, CyCLIP 36.75,
# SogCLR 37.46, iSogCLR 40.72, TempNet 42.28. results/README.md has more published results.
CC3M = dict(  # [V] clip.py; there the towers are ResNet-50 and DistilBERT, and RandomAugment, which
              # is not built here, follows the crop
    BASE, dataset="captions", train_file="clip_train/cc3m_train_new.json",
    test_file="clip_train/coco_val_new.json", image_root=["cc3m", "coco"], model="RN50",
    image_size=256, epochs=30, batch_size=512, lr=2e-4, weight_decay=0.02, schedule="authors",
    warmup=20, tau=0.01, amp="auto", channels_last=True)
RECIPES = {
    "demo": dict(  # built-in synthetic shapes
        BASE, dataset="shapes", model="tiny-resnet", epochs=20, batch_size=128, lr=2e-3,
        warmup=60, tau=0.05, mask_repeats=True),
    "flickr8k": dict(  # shows every image 20 times and every caption 4 times
        BASE, dataset="captions", train_file="flickr8k/train.json",
        test_file="flickr8k/test_retrieval.json", image_root=["flickr8k/images"],
        model="tiny-resnet", image_size=32, epochs=4, batch_size=256, lr=1e-3, warmup=100,
        tau=0.05, mask_repeats=True),
    "own": dict(  # [K] your images and captions
        BASE, model="tiny-resnet", epochs=20, batch_size=128, lr=1e-3, tau=0.05,
        mask_repeats=True),
    "cc3m": CC3M,
    "cc3m-100k": dict(  # the layout of the HybridSogCLR course project; [F] batch
        CC3M, train_file="clip_train/cc3m_train_subset.json",
        test_file="clip_train/coco_val.json", batch_size=128,
        image_root=["datasets/cc3m_subset_100k", "datasets/mscoco_val/mscoco_val2014_subset_5k"]),
    # [A], tau [K]; not built: the lower rate of tau below 0.03. Datacomp, retrieval, ImageNet and
    # variants [T]: v1 24.87, 29.28, 18.86; v2 24.10, 29.32, 18.52; SogCLR 23.41, 27.48, 16.90
    "fastclip-cc3m": dict(
        CC3M, loss="fastclip", image_size=224, epochs=37, batch_size=1024, lr=1e-3,
        weight_decay=0.1, schedule="cosine", warmup=10000, tau=0.07, gamma=0.2, rho=6.5,
        tau_lr=2e-4),
}
# The flags that each loss uses, with their defaults; other losses refuse them.
EMA = dict(gamma=0.8, gamma_schedule="constant")  # [V]
STEP = dict(eta_schedule="const", tau=0.01)  # [V]
CLIP = dict(tau=0.01, learn_tau="none", tau_bounds=(0.001, 0.5), tau_lr=None)  # [V]
LOSSES = {
    "clip": CLIP, "cyclip": CLIP, "vicreg": {}, "siglip": dict(tau_lr=None),
    "sogclr": dict(EMA, tau=0.01, eps=1e-8),  # [V]
    "sogclr-dro": dict(EMA, **STEP, eps=1e-10, rho=6.0, eta=0.03, beta=0.9,
                       tau_bounds=(0.005, 1.0)),  # [V] their script; without it rho 8, eta 0.001
    "isogclr": dict(EMA, **STEP, eps=1e-14, rho=8.0, eta=1e-5, beta=0.5,  # eta, beta: hard-coded
                    tau_bounds=(0.005, 0.05)),  # [V], [F] rho; with eta 0.03 tau jumps to a bound
    "isogclr-tempnet": dict(EMA, eps=1e-14, rho=8.0, tau_bounds=(0.005, 0.05), tau_lr=1e-6),  # [F]
    "isogclr-v1": dict(EMA, rho=6.0, tau_bounds=(0.005, 1.0), tau_lr=1e-6),  # [V], [F] rate
    "isogclr-v2": dict(EMA, **STEP, eps=1e-8, rho=6.0, eta=0.01, beta=0.9,
                       tau_bounds=(0.005, 1.0)),  # [V]
    "onlineclr": dict(EMA, tau=0.01),  # [V]
    "sogclr-mine": dict(EMA, tau=0.01, lambda_mi=0.0),  # [K]
    "hybrid": dict(EMA, tau=0.01),  # [V]
    "fastclip": dict(gamma=0.2, gamma_schedule="cosine", tau=0.07, eps=1e-14, rho=6.5,  # [A]
                     tau_bounds=(0.001, 0.5), tau_lr=None),  # [K] tau, bounds
}
TEXT = dict(context_length=20, vocab_size=49408, width=32, heads=1, layers=1)
TINY = {  # towers for a CPU, built by open_clip's own classes
    "tiny-resnet": dict(embed_dim=128, text_cfg=TEXT, vision_cfg=dict(
        image_size=32, layers=[1, 1, 1, 1], width=16, head_width=32)),
    "tiny-vit": dict(embed_dim=64, text_cfg=TEXT, vision_cfg=dict(
        image_size=32, layers=2, width=64, head_width=32, patch_size=8)),
}

# ---------------------------------------------------------------------------------- loss

# Most losses take one direction: row i of the similarities S (B, B) is anchor i, column i its own
# pair, and negative (B, B) bool marks its negatives. log_u (-inf: never seen), b and tau are per
# anchor, (B,). gamma is a number, or (B,) with 1 where u is unknown. Losses are scalars, means over
# the anchors. New state and G have no gradient. Features are unit-norm (VICReg: raw).


def upcast(x):
    """Convert float16 and bfloat16 to float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def log_(x):
    """log of a number, -inf for 0."""
    return math.log(x) if x > 0 else -math.inf


def own_pairs(S):
    """Mask (B, B) bool of the own pairs: the diagonal."""
    return torch.eye(len(S), dtype=torch.bool, device=S.device)


def duplicate_mask(p, text):
    """Mask (B, B) bool of pairs with the same image p (B,) or the same caption text (B,), the own
    pairs included."""
    return (p[:, None] == p) | (text[:, None] == text)


def difference(S):
    """D_ij = S_ij - d_i (E4)."""
    S = upcast(S)
    return S - S.diagonal()[:, None]


def log_average(log_old, log_new, gamma):
    """log of (1 - gamma) old + gamma new (E10)."""
    gamma = torch.zeros_like(log_new) + gamma
    return torch.logaddexp(torch.log(1 - gamma) + log_old, torch.log(gamma) + log_new)


def estimate(V, z, log_u, gamma, negative, floor, add=torch.logaddexp, terms=None):
    """The part that all losses with u share. n is the number of an anchor's negatives.

    Args: V (B, B) values to weight, with gradient; z (B, B); floor: log of what is added to u, a
    number or (B,); terms: mask of the sums, by default the negatives.
    Returns: mean_i 1/n sum_j w_ij V_ij; log u; log of the denominator; 1/n sum_j w_ij z_ij."""
    n, terms = negative.sum(1).to(z.dtype), negative if terms is None else terms
    log_g = z.masked_fill(~terms, -math.inf).logsumexp(1) - n.log()  # E6: FastCLIP Eq. (1) [T]
    log_u = log_average(log_u, log_g, gamma)  # E7 as E10: FastCLIP Eq. (2) [T]
    log_den = add(log_u, torch.zeros_like(log_u) + floor)  # E11
    # with the new u, as LibAUC's SogCLR [A]; its text on iSogCLR [A] has the old u
    w = torch.exp(z - log_den[:, None]).masked_fill(~terms, 0) / n[:, None]  # E8
    return (w * V).sum(1).mean(), log_u, log_den, (w * z).sum(1)  # E9


def cross_entropy(S, negative, tau):
    """CE (B,) of the own pair in each row of S / tau; tau is a number, or one per row (B, 1)."""
    # differs from the released code: there, tau of row i divides column i ("personalized")
    logits = (upcast(S) / tau).masked_fill(~(negative | own_pairs(S)), -math.inf)
    return -logits.log_softmax(1).diagonal()


def clip(S, negative, tau_I, tau_T):
    """CLIP (E1) of image-text similarities S (B, B), both directions. Returns: scalar."""
    return (cross_entropy(S, negative, tau_I) + cross_entropy(S.T, negative, tau_T)).mean() / 2


def cyclip(S, R_I, R_T, inside=0.25, cross=0.25):
    """The terms that CyCLIP adds to CLIP (E2): 1/B times the squared asymmetries.
    Args: image-text, image-image and text-text similarities (B, B). Returns: scalar."""
    S, R_I, R_T = upcast(S), upcast(R_I), upcast(R_T)
    return (inside * (R_I - R_T).square().sum() + cross * (S - S.T).square().sum()) / len(S)


def decorrelation(Z):
    """1/D sum_{k != l} C_kl^2 of the unbiased covariance of Z (B, D) (E3, E23b)."""
    Z = upcast(Z)
    Z = Z - Z.mean(0)
    C = Z.T @ Z / (len(Z) - 1)
    return (C.square().sum() - C.diagonal().square().sum()) / Z.shape[1]


def vicreg(Z_I, Z_T, sim=25.0, std=25.0, cov=1.0):
    """VICReg (E3) of the raw features (B, D). Returns: scalar."""
    Z_I, Z_T = upcast(Z_I), upcast(Z_T)
    spread = [F.relu(1 - torch.sqrt(Z.var(0) + 1e-4)).mean() / 2 for Z in (Z_I, Z_T)]
    return (sim * F.mse_loss(Z_I, Z_T) + std * sum(spread)
            + cov * (decorrelation(Z_I) + decorrelation(Z_T)))


def sogclr(S, negative, log_u, b, tau, gamma, eps=1e-8):
    """SogCLR (E4 to E11). eps: the floor is eps e^b, and may be 0. Returns: L, log_u, b."""
    D = difference(S)
    z = D.detach() / tau  # E4
    b = torch.maximum(b, z.amax(1))  # E5
    L, log_u, *_ = estimate(D, z, log_u, gamma, negative, log_(eps) + b)
    return L, log_u, b


def sogclr_dro(S, negative, log_u, b, tau, gamma, rho, eps=1e-10):
    """iSogCLR as first released: the sum includes the pair itself, although n = B - 1.
    Returns: L, log_u, b, G."""
    D = difference(S)
    z = D.detach() / tau[:, None]
    b = torch.maximum(b, z.amax(1))
    L, log_u, _, mean_z = estimate(D, z, log_u, gamma, negative, log_(eps) + b,
                                   terms=negative | own_pairs(S))
    return L, log_u, b, log_u + rho - mean_z  # E12


def isogclr(S, negative, log_u, b, tau, gamma, rho, eps=1e-14):
    """iSogCLR with temperatures from the table or a network. Returns: L, log_u, b, G.
    As in the released code, eps is the minimum of the SUM n u e^-b, in the weights and in G."""
    D = difference(S)
    z = D.detach() / tau[:, None]
    b = torch.maximum(b, z.amax(1))
    floor = log_(eps) - negative.sum(1).to(z.dtype).log() + b
    L, log_u, log_den, mean_z = estimate(D, z, log_u, gamma, negative, floor, torch.maximum)
    return L, log_u, b, log_den + rho - mean_z  # E12


def isogclr_v1(S, negative, log_u, tau, gamma, rho):
    """The variant without subtraction of d and without eps: z = S/tau. Returns: L, log_u, G."""
    S = upcast(S)
    L, log_u, _, mean_z = estimate(S, S.detach() / tau[:, None], log_u, gamma, negative, -math.inf)
    return L - S.diagonal().mean(), log_u, log_u + rho - mean_z  # E12


def isogclr_v2(S, negative, log_u, b, log_r, tau, gamma, rho, lambd=1.0, eps=1e-8):
    """The variant with DRO also on the positives (E20). Returns: L, log_u, b, G.
    log_r: log of r e^b_pos after this step, the moving average of `positives`."""
    S = upcast(S)
    z, d = S.detach() / tau[:, None], S.diagonal()
    b = torch.maximum(b, z.amax(1))
    L, log_u, _, mean_z = estimate(S, z, log_u, gamma, negative, log_(eps) + b)
    w = torch.exp(-2 * d.detach() / lambd - log_r)  # e^{a - b_pos} / r
    return L - (w * d).mean(), log_u, b, log_u + rho - mean_z  # E20, E12


def positives(d, lambd=1.0):
    """log mean e^a, a = -2 d / lambda, of the own pairs d (B,) (E20)."""
    return (-2 * upcast(d) / lambd).logsumexp(0) - math.log(len(d))


def temperature_step(tau, v, G, beta, eta, bounds, clamp=5.0):
    """Momentum step of the per-sample temperatures: new tau, v (B,) (E13, E14)."""
    v = (1 - beta) * v + beta * G.clamp(-clamp, clamp)  # E13
    return (tau - eta * v).clamp(*bounds), v  # E14


def onlineclr(S, negative, log_n, log_p, tau, gamma):
    """onlineCLR, both directions, with sums instead of means. log_n, log_p: averages over the data
    set, scalars, initially -inf. Returns: L, log_n, log_p."""
    S = upcast(S)
    z, d = (S.detach() / tau).masked_fill(~negative, -math.inf), S.diagonal()
    z_p = -d.detach() / (10 * tau)
    log_n = log_average(log_n, z.logsumexp((0, 1)) + math.log(2), gamma)  # E21
    log_p = log_average(log_p, z_p.logsumexp(0) + math.log(2), gamma)
    L = (torch.exp(z - log_n) * S).sum() - (torch.exp(z_p - log_p) * d).sum()
    return 2 * L, log_n, log_p  # E22


def info_sogclr(S, negative, log_u, tau, gamma, floor=0.0):
    """InfoSogCLR. Our derivation: only the name of this loss is public.

    InfoNCE over the data set has the pair itself in its denominator, 1 + (N - 1) u, so the floor
    is 1/(N - 1) (E27), with N texts for an image; 0 is SogCLR without eps. S may have K further
    columns, (B, B + K), of negatives from outside the batch. Returns: L, log_u."""
    D = difference(S)
    return estimate(D, D.detach() / tau, log_u, gamma, negative, log_(floor))[:2]


def mine(S, negative, log_v, tau, gamma):
    """L_mine, both directions: Donsker-Varadhan with one normaliser v for all pairs, a scalar,
    initially -inf. Our derivation: we read the name "mine" as MINE. Returns: L, log_v."""
    S, n = upcast(S), negative.sum(1).to(log_v.dtype)
    z = (S.detach() / tau).masked_fill(~negative, -math.inf)
    g = z.logsumexp(1) - n.log()
    log_v = log_average(log_v, g.logsumexp(0) - math.log(len(g)), gamma)  # E24
    w = torch.exp(z - log_v) * (1 / n[:, None] + 1 / n)
    return (w * S).sum() / len(S) - 2 * S.diagonal().mean(), log_v  # E25


def difficulty(S, negative, tau):
    """Hard pairs weigh more (E23c): sum_i a_i CE_i, a = sg softmax(-d/tau). Returns: scalar."""
    a = (-upcast(S).diagonal().detach() / tau).softmax(0)
    return (a * (cross_entropy(S, negative, tau) + cross_entropy(S.T, negative, tau)) / 2).sum()


def siglip(S, negative, s, c):
    """SigLIP: -1/B sum_ij logsigmoid(y_ij (s S_ij + c)), y = 1 for own pairs, -1 for negatives,
    else 0. Returns: scalar."""
    S = upcast(S)
    y = torch.eye(len(S), dtype=S.dtype, device=S.device) - negative.to(S.dtype)  # 0 for repeats
    return -(F.logsigmoid(y * (s * S + c)) * y.abs()).sum() / len(S)


def fastclip(S, negative, log_u, tau, gamma, rho, eps=1e-14):
    """FastCLIP: weights e^z / (eps + u). Returns: L, with the gradient of tau log(eps + u); log_u;
    G (B,). The means of G in both directions add up to the derivative of v3 (RGCL-g) in tau."""
    D = difference(S)
    L, log_u, log_den, mean_z = estimate(D, D.detach() / tau, log_u, gamma, negative, log_(eps))
    return L, log_u, log_den + rho - mean_z


def first_visit(log_u, epoch, gamma):
    """gamma per entry of log_u: 1 in epoch 0 and where u is unknown."""
    # differs from the released code: there, a first visit after epoch 0 gives u = gamma g
    return torch.full_like(log_u, 1.0 if epoch == 0 else gamma).masked_fill_(
        log_u == -math.inf, 1.0)


def gamma_at(epoch, epochs, gamma, schedule):
    """FastCLIP's schedule [T], epoch from 0: cosine from 1 to gamma over half of the epochs."""
    if schedule == "constant":
        return gamma
    E = max(1, epochs // 2)
    return gamma + (1 - gamma) * (1 + math.cos(math.pi * epoch / E)) / 2 if epoch < E else gamma


def eta_at(epoch, epochs, eta, schedule, eta_min=1e-4):
    """Step size of the temperatures (E14), epoch from 0; exp starts above eta in epoch 0."""
    if schedule == "cosine":
        return eta_min + (eta - eta_min) * math.cos(math.pi / 2 * epoch / epochs)
    return eta if schedule == "const" else (eta - eta_min) * 0.8 ** (epoch - 1) + eta_min


# ---------------------------------------------------------------------------------- captions


def clean_caption(caption, words=30):
    """The authors' caption cleaner."""
    caption = re.sub(r"[,.'!?\"()*#:;~]", "", caption.lower())
    caption = caption.replace("-", " ").replace("/", " ").replace("<person>", "person")
    caption = re.sub(r"\s{2,}", " ", caption).rstrip("\n").strip(" ")
    return " ".join(caption.split(" ")[:words])


class Shared:
    """Decoded images (N_I, 3, H, W) of a table whose rows are captions: row r has image of[r]."""

    def __init__(self, pixels, of):
        self.pixels, self.of, self.shape = pixels, of, (len(of), *pixels.shape[1:])

    def __getitem__(self, rows):
        return self.pixels[self.of[rows]]


def first_rows(ids):
    """The first row of every id, sorted by id; ids (N,) int64."""
    order = ids.argsort(stable=True)
    return order[F.pad(ids[order].diff() > 0, (1, 0), value=True)]


class Tokens:
    """Tokens of texts at their true length, on the device: tokens[rows] is (n, L) int32, with 0s at
    the end of a row. 2 bytes a token (4 in vocabularies of over 65,536) and 8 a text."""

    def __init__(self, parts, device):
        """parts: tensors (n, L) of tokens; L is the same for all."""
        flat, lengths = [], [torch.zeros(1, dtype=torch.int64)]
        for x in parts:
            places = torch.arange(x.shape[1])
            lengths.append(((x != 0) * (places + 1)).amax(1))
            flat.append(x[places < lengths[-1][:, None]].int())
        flat, self.mask = torch.cat(flat), -1
        if (flat < 2 ** 16).all():  # the bits of uint16, which torch can do little with
            flat, self.mask = flat.to(torch.int16), 2 ** 16 - 1
        self.flat, self.places = flat.to(device), places.to(device)
        self.ends = torch.cat(lengths).cumsum(0).to(device)

    def __getitem__(self, rows):
        at = self.ends[:-1][rows][:, None] + self.places  # (n, L)
        found = self.flat[at.clamp(max=len(self.flat) - 1)].int() & self.mask
        return found * (at < self.ends[1:][rows][:, None])


class Pairs:
    """Image-caption pairs of a table, one per row. Ids: p of the image, q of the caption (the row).

    On the device: p (N,) int64 from 0; text (N,) int64, equal for equal captions, in order of
    appearance; tokens, see `Tokens`. distinct: number of different captions; images: one row per
    image. Beside the table, a pair takes about 50 bytes.
    """

    def __init__(self, table, tokenizer, device, prepare=clean_caption):
        if table.captions is None:
            raise common.BadInput("the data set has no captions: use --dataset shapes or captions")
        p = table.columns.get("image_id", torch.arange(len(table))).unique(return_inverse=True)[1]
        self.source, self.prepare, N = table.captions, prepare, len(p)
        self.crc, keys, blocks = 0, [], torch.arange(N).split(10000)

        def tokens():
            for rows in blocks:
                texts = [self.caption(row) for row in rows.tolist()]
                joined = "\n" * (len(keys) > 0) + "\n".join(texts)
                self.crc = zlib.crc32(joined.encode(), self.crc)
                # 8 bytes stand for a text: equal for two others with probability N^2 / 2^65
                keys.append(torch.tensor([hash(text) for text in texts]))
                yield tokenizer(texts)

        self.tokens = Tokens(tokens(), device)
        self.crc = zlib.crc32(p.numpy().tobytes(), self.crc)
        values, text = torch.cat(keys).unique(return_inverse=True)
        first = torch.full((len(values),), N).scatter_reduce(0, text, torch.arange(N), "amin")
        text = first.argsort().argsort()[text]
        self.images, self.distinct = first_rows(p), len(values)
        self.N_I, self.N_T = len(self.images), N
        self.p, self.text = p.to(device), text.to(device)

    def caption(self, row):
        """The caption of a row as it is trained with."""
        return self.prepare(self.source[row])


def in_memory(data, table, limit=20000):
    """Decode the images of a small table once, squashed to squares of 1.5 times the training size.
    Those of a larger table are cropped from the files; so are all with --randaugment, which only
    workers do."""
    ids, more = table.columns.get("image_id"), data.args.randaugment
    if more and more[0] and table is data.train:
        return
    if table.paths is None or ids is None or len(rows := first_rows(ids)) > limit:
        return
    side = round(1.5 * data.args.image_size)
    pixels = torch.cat([x.byte() for x in data.eval_batches(table, rows, side, True)])
    table.images = Shared(pixels, ids.unique(return_inverse=True)[1].to(data.device))


# ---------------------------------------------------------------------------------- model


def towers(args):
    """The open_clip network and its tokenizer. Only a --pretrained tag needs a download; where
    --mean and --std are not given, it sets them to those of its network."""
    common.require("open_clip", "open_clip_torch", "CLIP")
    import open_clip

    file = Path(args.pretrained or "").suffix in (".pt", ".pth", ".bin")
    if args.model in TINY:
        c = TINY[args.model]
        if args.pretrained and not file:
            raise common.BadInput(f"--pretrained {args.pretrained}: {args.model} has no published "
                                  "weights; name a file (.pt, .pth, .bin)")
        size = args.image_size or c["vision_cfg"]["image_size"]
        clip = open_clip.CLIP(**dict(c, vision_cfg=dict(c["vision_cfg"], image_size=size)))
        tokenizer = open_clip.SimpleTokenizer(context_length=TEXT["context_length"])
    elif args.model in open_clip.list_models():
        try:
            clip = open_clip.create_model(args.model, None if file else args.pretrained,
                                          force_image_size=args.image_size)
            tokenizer = open_clip.get_tokenizer(args.model)
            if args.pretrained and not file:
                known = open_clip.get_model_preprocess_cfg(clip)
                args.mean, args.std = args.mean or [*known["mean"]], args.std or [*known["std"]]
        except Exception as error:  # of the network, the hub, torch.load
            raise common.BadInput(f"--model {args.model}, weights {args.pretrained}: {error}"
                                  ) from None
    else:
        raise common.BadInput(f"--model {args.model}: use {', '.join(TINY)} or a name of "
                              "open_clip.list_models()")
    if file:  # a checkpoint of this file, or weights as open_clip saves them
        weights = common.load_checkpoint(args.pretrained)
        weights = weights.get("state", weights).get("model", weights.get("state_dict", weights))
        try:
            clip.load_state_dict({k.removeprefix("module.").removeprefix("clip."): v
                                  for k, v in weights.items()})
        except (RuntimeError, AttributeError) as error:
            raise common.BadInput(f"{args.pretrained} does not fit --model {args.model}: "
                                  f"{' '.join(str(error).split())[:200]}") from None
    return clip, tokenizer


class Towers(nn.Module):
    """Both encoders. Maps images (b, 3, S, S) and tokens (b, L) to features (b, D), unit-norm or
    raw; None to None."""

    def __init__(self, clip, normalize=True):
        super().__init__()
        self.clip, self.normalize = clip, normalize
        for name, parameter in clip.named_parameters():
            if name in ("logit_scale", "logit_bias"):  # the temperature is part of the loss here
                parameter.requires_grad_(False)

    def forward(self, images, tokens=None):
        x = None if images is None else self.clip.encode_image(images).float()
        t = None if tokens is None else self.clip.encode_text(tokens).float()
        if not self.normalize:
            return x, t
        return tuple(None if y is None else F.normalize(y, dim=1) for y in (x, t))


class TempNet(nn.Module):
    """Temperatures (n,) within the bounds from features (n, D) without gradient (E15 to E19)."""

    def __init__(self, D, M, bounds, dropout=0.5):
        super().__init__()
        self.proj, self.linear_1 = nn.Linear(D, D), nn.Linear(M, 1)
        self.prototypes = nn.Parameter(torch.randn(M, D))
        self.scaler = nn.Parameter(torch.tensor(math.log(0.01)))
        nn.init.ones_(self.linear_1.weight)
        nn.init.zeros_(self.linear_1.bias)
        self.bounds, self.dropout = bounds, dropout

    def hidden(self, x):
        """h before dropout (E15)."""
        return torch.sigmoid(self.proj(x))

    def forward(self, x, keep=None):
        """keep (n, D) bool: the dropout mask, None in evaluation."""
        h = self.hidden(x)
        if keep is not None:
            h = h * keep / (1 - self.dropout)
        c = h @ F.normalize(self.prototypes, dim=1).T  # E16, (n, M)
        q = (c / self.scaler.exp()).softmax(1)  # E17
        r = self.linear_1((q - 1 / c.shape[1]) * c.sigmoid())[:, 0]  # E18
        low, high = self.bounds
        return low + (high - low) * r.sigmoid()  # E19


class Table(nn.Module):
    """State of every id of one modality: buffers (N, ...), equal in all processes."""

    def __init__(self, N, **initial):
        super().__init__()
        self.N = N
        for name, value in initial.items():
            self.register_buffer(name, torch.full((N,), float(value)))

    def __getitem__(self, ids):
        """The state of the ids (B,)."""
        return {name: x[ids] for name, x in self.named_buffers()}

    def write(self, ids, values):
        """Write values (B, ...) for the ids (B,). For a repeated id the last row wins, as in the
        released code on a CPU."""
        ordered, order = ids.sort(stable=True)
        last = order[torch.searchsorted(ordered, ids, right=True) - 1]  # (B,) last row of each id
        for name, value in values.items():
            getattr(self, name)[ids] = value[last]


class Objective(nn.Module):
    """The loss with its per-sample state and learnable temperatures: all but the towers.

    Every process computes the loss of the whole batch, so its parameters have the same gradients
    in all processes and need no DDP.
    """

    def __init__(self, args, pairs, D):
        super().__init__()
        self.args, loss, flags = args, args.loss, LOSSES[args.loss]
        self.data = dict(images=pairs.N_I, captions=pairs.N_T, crc=pairs.crc)
        start = dict(log_u=-math.inf) if "gamma" in flags and loss != "onlineclr" else {}
        if "eps" in flags and loss != "fastclip":
            start["b"] = 0
        if "eta" in flags:
            start.update(tau=args.tau, v=0)
        self.I, self.T = Table(pairs.N_I, **start), Table(pairs.N_T, **start)
        for name in {"onlineclr": ("log_n", "log_p"), "sogclr-mine": ("log_v",),
                     "isogclr-v2": ("log_r",)}.get(loss, ()):  # one for the whole data set
            self.register_buffer(name, torch.tensor(-math.inf))
        for table in (self.I, self.T) if loss == "hybrid" else ():
            table.register_buffer("bank", torch.zeros(table.N, D))
        if loss in ("isogclr-tempnet", "isogclr-v1"):
            M = 256 if loss == "isogclr-tempnet" else 64
            self.net_I, self.net_T = (TempNet(D, M, args.tau_bounds) for _ in "IT")
        if loss == "siglip":
            self.log_s, self.c = (nn.Parameter(torch.tensor(x)) for x in (math.log(10.0), -10.0))
        if loss == "fastclip" or args.learn_tau == "global":
            self.tau = nn.Parameter(torch.tensor(args.tau))
        if args.learn_tau == "sample":
            self.tau_I, self.tau_T = (nn.Parameter(torch.full((N,), args.tau))
                                      for N in (pairs.N_I, pairs.N_T))

    def get_extra_state(self):
        """The data that the ids refer to."""
        return self.data

    def set_extra_state(self, state):
        """Raises: ValueError if the state is from other data, so its ids do not fit."""
        if state != self.data:
            raise ValueError(f"its tables belong to other data: {state}, here {self.data}")

    def forward(self, X, Y, p, q, negative, step, epoch, drawn):
        """Loss of the batch and scalars for the log. `update` stores the new state afterwards.

        Args: X, Y (B, D) features of images and texts; p, q (B,) their ids; negative (B, B) bool,
        symmetric; step; epoch from 0; drawn, what `draw` gives, on the device.
        """
        args, loss = self.args, self.args.loss
        self.pending, self.scalars = [], {}
        for name, parameter in self.named_parameters():
            if name.startswith("tau"):  # clamp before every use
                parameter.data.clamp_(*args.tau_bounds)
        if loss == "vicreg":
            return vicreg(X, Y), {}
        S = X @ Y.T  # (B, B)
        if loss == "siglip":
            s = self.log_s.exp()
            return siglip(S, negative, s, self.c), dict(tau=1 / s)
        if loss in ("clip", "cyclip"):
            tau_I = tau_T = self.tau if args.learn_tau == "global" else X.new_full((), args.tau)
            if args.learn_tau == "sample":
                tau_I, tau_T = self.tau_I[p][:, None], self.tau_T[q][:, None]
            L = clip(S, negative, tau_I, tau_T)
            if loss == "cyclip":
                L = L + cyclip(S, X @ X.T, Y @ Y.T)
            return L, dict(tau=tau_I.mean())
        gamma = gamma_at(epoch, args.epochs, args.gamma, args.gamma_schedule)
        stats = dict(gamma=X.new_full((), gamma, dtype=torch.float64))
        if loss == "onlineclr":
            L, log_n, log_p = onlineclr(S, negative, self.log_n, self.log_p, args.tau, gamma)
            self.scalars = dict(log_n=log_n, log_p=log_p)
            return L, stats
        if loss == "hybrid":
            return self.hybrid(X, Y, p, q, S, negative, gamma, epoch, drawn)
        if loss == "isogclr-v2":
            self.scalars["log_r"] = log_average(self.log_r, positives(S.diagonal().detach()),
                                                first_visit(self.log_r, epoch, gamma))
        L_I, stats_I = self.direction("I", X, p, S, negative, gamma, step, epoch, drawn)
        L_T, stats_T = self.direction("T", Y, q, S.T, negative, gamma, step, epoch, drawn)
        L, stats = L_I + L_T, dict(stats, **stats_I, **stats_T)
        if loss == "sogclr-mine":
            L_mine, log_v = mine(S, negative, self.log_v, args.tau,
                                 first_visit(self.log_v, epoch, gamma))
            self.scalars["log_v"] = log_v
            L = (1 - args.lambda_mi) * L + args.lambda_mi * L_mine  # E26
            # estimates of the mutual information in nats, not bounds
            stats["mi_gcl"] = -(stats["log_u_I"] + stats["log_u_T"]) / 2
            stats["mi_dv"] = S.diagonal().mean() / args.tau - log_v
        return L, stats

    def direction(self, side, f, ids, S, negative, gamma, step, epoch, drawn):
        """Loss of one direction, "I" or "T", with features f (B, D), and scalars for the log."""
        args, loss, table, G = self.args, self.args.loss, getattr(self, side), None
        old = table[ids]
        u, b, tau = old["log_u"], old.get("b"), old.get("tau", args.tau)  # (B,), or a number
        gamma, rho, eps = first_visit(u, epoch, gamma), args.rho, args.eps
        if loss in ("isogclr-tempnet", "isogclr-v1"):
            tau = self.predict(side, f.detach(), step, drawn[side])  # (B,), with gradient
        if loss == "sogclr":
            L, u, b = sogclr(S, negative, u, b, tau, gamma, eps)
        elif loss == "sogclr-dro":
            L, u, b, G = sogclr_dro(S, negative, u, b, tau, gamma, rho, eps)
        elif loss in ("isogclr", "isogclr-tempnet"):
            L, u, b, G = isogclr(S, negative, u, b, tau.detach(), gamma, rho, eps)
        elif loss == "isogclr-v1":
            L, u, G = isogclr_v1(S, negative, u, tau.detach(), gamma, rho)
        elif loss == "isogclr-v2":
            L, u, b, G = isogclr_v2(S, negative, u, b, self.scalars["log_r"], tau, gamma, rho,
                                    eps=eps)
        elif loss == "fastclip":
            tau = self.tau
            L, u, G = fastclip(S, negative, u, tau.detach(), gamma, rho, eps)
        elif loss == "sogclr-mine":
            N = (self.T if side == "I" else self.I).N  # texts for an image, images for a text
            L, u = info_sogclr(S, negative, u, tau, gamma, floor=1 / max(1, N - 1))
        if loss in ("isogclr-tempnet", "isogclr-v1", "fastclip"):
            L = L + (G * tau).mean()  # trains only tau or its network; G is not clipped
        new = dict(log_u=u) if b is None else dict(log_u=u, b=b)
        if "tau" in old:
            eta = eta_at(epoch, args.epochs, args.eta, args.eta_schedule, min(args.eta, 1e-4))
            clamp = math.inf if loss == "isogclr-v2" else 5.0
            new["tau"], new["v"] = temperature_step(tau, old["v"], G, args.beta, eta,
                                                    args.tau_bounds, clamp)
        self.pending.append((table, ids, new))
        shown = new if G is None else dict(new, tau=tau)  # this step's tau, not the new one
        return L, {f"{k}_{side}": v.mean() for k, v in shown.items() if k != "b"}

    def draw(self, step, B):
        """Random numbers of a step, on the CPU: for I and T the units (B, D) that dropout keeps, or
        at most 1024 rows of the bank; empty for losses without either."""
        drawn = {}
        for side in "IT":
            net, table = getattr(self, f"net_{side}", None), getattr(self, side)
            random = common.generator(self.args.seed, step, f"dropout {side}" if net else "bank")
            if net:
                draw = torch.rand(B, net.proj.in_features, generator=random)
                drawn[side] = draw >= net.dropout
            elif hasattr(table, "bank"):
                drawn[side] = torch.arange(table.N) if table.N <= 1024 else torch.randint(
                    table.N, (1024,), generator=random).unique()
        return drawn

    def predict(self, side, f, step, keep):
        """tau (B,) from a network. Its prototypes start as features of the first batch."""
        net = getattr(self, f"net_{side}")
        if step == 0:
            with torch.no_grad():
                h = net.hidden(f)[:len(net.prototypes)]
                net.prototypes[:len(h)] = h
        return net(f, keep)

    def hybrid(self, X, Y, p, q, S, negative, gamma, epoch, drawn):
        """HybridSogCLR as we understand it (E23a-c). The released code computes another loss. In
        most steps with several processes it returns a constant without gradient."""
        B, D = X.shape
        tau, base = self.args.tau * (1 + S.detach().std().tanh()), 0.0
        for f, ids, table, sims, others, bank, rows in (
                (X, p, self.I, S, q, self.T, drawn["T"]),
                (Y, q, self.T, S.T, p, self.I, drawn["I"])):
            old = table[ids]
            usable = self.usable_rows(bank, rows, others)
            wide = torch.cat([sims, f @ bank.bank[rows].T], 1)  # (B, B + K)
            mask = torch.cat([negative, usable.expand(B, -1)], 1)
            L, log_u = info_sogclr(wide, mask, old["log_u"], tau,
                                   first_visit(old["log_u"], epoch, gamma))  # E23a
            base = base + L
            row = bank_row(old["bank"], f.detach(), old["log_u"] > -math.inf, 0.5)
            self.pending.append((table, ids, dict(log_u=log_u, bank=row)))
        cov = decorrelation(D ** 0.5 * X) + decorrelation(D ** 0.5 * Y)  # E23b
        diff = difficulty(S, negative, tau)  # E23c
        # 0.1 tau: base is in units of similarity, diff in nats
        return base + 0.1 * cov + 0.1 * tau * diff, dict(tau=tau, base=base, cov=cov, diff=diff)

    @staticmethod
    def usable_rows(table, rows, batch):
        """Mask of the rows (K,) of a bank that were seen before and are not in this batch (B,)."""
        # torch.isin would wait for the device
        return (table.log_u[rows] > -math.inf) & (rows[:, None] != batch).all(1)

    def update(self):
        """Store the new state of the last forward pass."""
        for table, ids, values in self.pending:
            table.write(ids, values)
        for name, value in self.scalars.items():
            getattr(self, name).copy_(value)


def bank_row(row, f, seen, m):
    """Where a row is new, the feature f (b, D); else normalise(m row + (1 - m) f)."""
    return torch.where(seen[:, None], F.normalize(m * row + (1 - m) * f, dim=1), f)


def grouped_optimizer(args, model, objective):
    """AdamW (or SGD). Vectors and biases of the towers, and temperatures, have no weight decay; all
    parameters of a temperature network have 1e-3."""
    towers = [p for p in model.parameters() if p.requires_grad]
    nets = [p for n, p in objective.named_parameters() if n.startswith("net_")]
    taus = [p for n, p in objective.named_parameters() if not n.startswith("net_")]
    scale = 1.0 if args.tau_lr is None else args.tau_lr / args.lr
    groups = [dict(params=[p for p in towers if p.ndim > 1], scale=1.0),
              dict(params=[p for p in towers if p.ndim < 2], scale=1.0, weight_decay=0.0),
              dict(params=nets, scale=scale, weight_decay=1e-3),  # [F]
              dict(params=taus, scale=scale, weight_decay=0.0)]
    groups = [g for g in groups if g["params"]]
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, args.lr, args.momentum, nesterov=args.nesterov,
                               weight_decay=args.weight_decay)
    return torch.optim.AdamW(groups, args.lr, weight_decay=args.weight_decay, fused=True)


# ---------------------------------------------------------------------------------- evaluation


def first_hit(S, relevant):
    """Rank (Q,), from 0, of the best relevant column of each row; ties: lower column first.
    Args: S (Q, N) finite; relevant (Q, N) bool, at least one per row."""
    best = S.masked_fill(~relevant, -math.inf).amax(1, keepdim=True)
    hit = ((S == best) & relevant).int().argmax(1, keepdim=True)
    before = torch.arange(S.shape[1], device=S.device) < hit
    return (S > best).sum(1) + ((S == best) & before).sum(1)


def recall(rank, relevant, N, name, ks=(1, 5, 10)):
    """R@k in percent of the queries, with its mean over k, and the same for a random order.

    Args: rank (Q,) from `first_hit`; relevant (Q,) number of relevant among N.
    """
    result, chance = {}, {}
    for k in (min(k, N) for k in ks):
        i = torch.arange(k, device=rank.device)
        missed = ((N - relevant[:, None] - i).clamp(min=0) / (N - i).double()).prod(1)  # (Q,)
        result[f"{name}@{k}"] = 100 * (rank < k).double().mean().item()
        chance[f"{name}@{k}"] = 100 * (1 - missed.mean().item())
    for values in (result, chance):
        values[f"{name} mean"] = sum(values.values()) / len(values)
    return result, chance


def retrieval(X, Y, image_group, text_group, block=2 ** 25):
    """Image-to-text (TR) and text-to-image (IR) retrieval, in blocks of similarities.

    Args: X (n, D), Y (m, D) unit-norm; a text matches an image if their groups are equal.
    Returns: dict of percents, dict of the same for a random order.
    """
    if not (X.isfinite().all() and Y.isfinite().all()):
        raise common.RunFailed("features to retrieve are not finite")
    both = []
    for name, query, bank, a, b in (("TR", X, Y, image_group, text_group),
                                    ("IR", Y, X, text_group, image_group)):
        ranks, counts = [], []
        for rows in torch.arange(len(query), device=X.device).split(max(1, block // len(bank))):
            relevant = a[rows, None] == b
            if not relevant.any(1).all():
                raise common.BadInput("an image of the test set has no caption")
            ranks.append(first_hit(query[rows] @ bank.T, relevant))
            counts.append(relevant.sum(1))
        both.append(recall(torch.cat(ranks), torch.cat(counts), len(bank), name))
    return [dict(tr, **ir, mean=(tr["TR mean"] + ir["IR mean"]) / 2) for tr, ir in zip(*both)]


def class_weights(prompts):
    """Unit class vectors (C, D) of prompt features (C, templates, D): normalise, mean, again."""
    return F.normalize(F.normalize(prompts, dim=2).mean(1), dim=1)


@torch.no_grad()
def encode(model, tokens, args, block=256):
    """Unit features (n, D) of tokens (n, L) on the device; every process computes all of them."""
    was_training = model.training
    model.eval()
    with common.autocast(args, tokens.device, evaluation=True):
        Y = torch.cat([model(None, part)[1] for part in tokens.split(block)])
    common.check_finite("features of captions", Y)
    model.train(was_training)
    return F.normalize(Y, dim=1)


def zero_shot_prompts(args, classes):
    """Class names and templates (with {}) for zero-shot classification."""
    names, templates = classes, []
    if args.dataset == "shapes":
        templates = [f"a {s} {c} {{}} on a {b} background" for s in common.SIZES
                     for c in common.COLOURS for b in common.PATTERNS]
    if args.class_names == "imagenet":
        from open_clip import IMAGENET_CLASSNAMES as names
    elif args.class_names:
        text = common.read_text(f"--class-names {args.class_names}", args.class_names)
        lines = [s.strip() for s in text.split("\n")]
        names = [s for s in lines if s and "{}" not in s]
        templates = [s for s in lines if "{}" in s] or templates
    if len(names) != len(classes):
        raise common.BadInput(f"--class-names {args.class_names}: {len(names)} names for "
                              f"{len(classes)} classes")
    if not templates:
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        templates = [t("{}") for t in OPENAI_IMAGENET_TEMPLATES]
    return names, templates


def evaluate_clip(model, tokenizer, data, pairs, prepare=clean_caption):
    """Retrieval (with captions) and zero-shot accuracy (with labels) on the test set.

    Images are resized to a square for retrieval and cropped for classification, as the authors do.
    If the data have image ids, each caption asks for its own image (the usual protocol). Otherwise
    (shapes) equal captions count once and match all images that have them.
    Returns: dict of percents, dict of chance levels, and what `retrieval_picture` needs: X, Y,
    their groups, and the rows of the captions Y (None without captions).
    """
    table, args, retrieved, result, chance = data.test, data.args, None, {}, {}
    square = "image_id" in table.columns
    images = table.select(pairs.images) if pairs else table
    options = dict(resize=square, select=lambda out: out[0], normalize=True)
    X = common.extract_features(model, data, images, **options)
    Y = X[:0]
    if pairs:
        group = pairs.p if square else pairs.text
        texts = torch.arange(pairs.N_T) if square else first_rows(pairs.text)
        Y = encode(model, pairs.tokens[texts], args)
        retrieved = X, Y, group[pairs.images], group[texts], texts
        result, chance = retrieval(*retrieved[:4])
    zeros = [(~Z.any(1)).sum().item() for Z in (X, Y)]
    if any(zeros) and not hasattr(data, "warned"):
        data.warned = True  # once a run
        common.print_rank0(f"warning: the features of {zeros[0]} images and {zeros[1]} captions "
                           "are zero")
    names, y = table.classes.get(args.label), images.columns.get(args.label)
    if args.class_names and not names and y is not None:
        names = [None] * (int(y.max()) + 1)
    if names and y is not None and (labelled := (y >= 0).to(data.device)).any():
        if args.zs_original:
            own, (mean, std) = copy.copy(data), common.MEAN_STD.get(args.dataset, common.IMAGENET)
            own.args = argparse.Namespace(**dict(vars(args), mean=mean, std=std))
            X = common.extract_features(model, own, images, **options)
        names, templates = zero_shot_prompts(args, names)
        tokens = tokenizer([prepare(t.replace("{}", c)) for c in names for t in templates])
        Z = encode(model, tokens.to(data.device), args).unflatten(0, (len(names), -1))
        ks = (1, min(5, len(names)))
        logits = X[labelled] @ class_weights(Z).T
        right = common.accuracy(logits, y.to(data.device)[labelled], ks)
        result.update({f"zero-shot top-{k}": a for k, a in zip(ks, right)})
        chance.update({f"zero-shot top-{k}": 100 * k / len(names) for k in ks})
    elif args.class_names or args.zs_original:
        raise common.BadInput(f"{'--class-names' if args.class_names else '--zs-original'} is for "
                              f"labels: the test images have none in column {args.label}")
    return result, chance, retrieved


def retrieval_picture(path, data, pairs, retrieved, n=5):
    """PNG: n images with their best captions, n captions with their best images; green: right."""
    X, Y, image_group, text_group, texts = retrieved
    g = common.generator(data.args.seed, 0, "picture")
    shown, asked = (torch.randperm(len(Z), generator=g)[:n] for Z in (X, Y))
    best_T = common.top_k(X[shown], Y, min(3, len(Y)))[1].tolist()
    best_I = common.top_k(Y[asked], X, min(6, len(X)))[1].tolist()
    images = pairs.images[torch.cat([shown, torch.tensor(best_I).flatten()])]
    pixels = iter(data.pixels(data.test, images, data.args.image_size, True))  # in this order

    def text(row, mark=""):
        return textwrap.shorten(f"{mark}{pairs.caption(row)}", 72, placeholder=" ...")

    rows = []
    for i, best in zip(shown.tolist(), best_T):
        marks = ["+ " if text_group[j] == image_group[i] else "- " for j in best]
        lines = [text(pairs.images[i]), *(text(texts[j], m) for j, m in zip(best, marks))]
        rows.append(("\n".join(lines), [(next(pixels), None, "")]))
    for j, best in zip(asked.tolist(), best_I):
        right = [bool(text_group[j] == image_group[i]) for i in best]
        rows.append((text(texts[j]), [(next(pixels), r, "") for r in right]))
    common.image_rows(path, "images, a caption of their own and the best captions (+ right, - "
                      "wrong); then captions and the best images (green: right); "
                      + common.source(data.args), rows, left=450)


def tau_picture(path, objective, model, data, pairs):
    """PNG: histogram of the temperatures of images and texts, for losses that have them."""
    tau = [getattr(objective, f"tau_{side}", getattr(getattr(objective, side), "tau", None))
           for side in "IT"]
    if hasattr(objective, "net_I"):  # of the test set
        X = common.extract_features(model, data, data.test.select(pairs.images), True,
                                    select=lambda out: out[0])
        tau = [objective.net_I(X), objective.net_T(encode(model, pairs.tokens[:], data.args))]
    if tau[0] is None or common.rank() > 0 or (plt := common.pyplot()) is None:
        return
    tau = [x.detach().double().cpu().numpy() for x in tau]
    edges = 0.99 * min(x.min() for x in tau), 1.01 * max(x.max() for x in tau)
    figure, axis = plt.subplots(figsize=(6, 3.5))
    axis.hist(tau, 40, edges, label=["images", "texts"])
    axis.set(xlabel="tau", ylabel="samples", title=f"{data.args.loss}, {common.source(data.args)}")
    axis.locator_params(axis="x", nbins=6)
    axis.legend()
    figure.tight_layout()
    common.atomic_write(Path(path), lambda file: figure.savefig(file, dpi=100, format="png"))
    plt.close(figure)


# ---------------------------------------------------------------------------------- training


NO_NEGATIVE = "a pair of the batch has no negative: all others repeat it; use a larger --batch-size"


def train(args):
    """Train in this process; see the top of the file."""
    check(args)
    if args.evaluate:
        return evaluate_checkpoint(args)
    device = common.setup(args)
    data = common.load(args, device)
    common.check_schedule(args, learning_rate, data.steps_per_epoch, args.warmup)
    for table in (data.train, data.test):
        in_memory(data, table)
    clip, tokenizer = towers(args)
    pairs, test = (Pairs(t, tokenizer, device) for t in (data.train, data.test))
    model = Towers(clip, normalize=args.loss != "vicreg")
    model = model.to(device, memory_format=common.memory_format(args))
    objective = Objective(args, pairs, encode(model, pairs.tokens[:1], args).shape[1]).to(device)
    network = common.distribute(model, args)
    optimizer, scaler = grouped_optimizer(args, model, objective), common.scaler(args, device)
    log = common.Log(args, data)
    state = dict(model=model, objective=objective, optimizer=optimizer, scaler=scaler, log=log)
    first_step, steps = common.resume(state, args), args.epochs * data.steps_per_epoch
    aug = common.augmentation(args)

    def evaluate():
        return evaluate_clip(model, tokenizer, data, test)[0]

    if log.lines == 1:  # a new run
        common.print_rank0(f"{pairs.N_T} captions of {pairs.N_I} images, {pairs.distinct} distinct"
                           f"; test: {test.N_T} of {test.N_I}")
        common.start_run(state, args, data, aug, evaluate)

    for batch in data.batches(first_step, steps, aug, views=1,
                              draw=lambda step, own: objective.draw(step, args.batch_size)):
        step, epoch = batch.step, batch.step // data.steps_per_epoch  # epoch from 0
        images = common.augment(batch)[0]                       # (b, 3, S, S), this process
        p, q = pairs.p[batch.rows], batch.rows                  # (B,) ids of image and caption
        with common.autocast(args, device):
            x, t = network(images, pairs.tokens[q[batch.own]])  # (b, D) each
        x, t = common.gather(x), common.gather(t)               # (B, D), the same everywhere
        masks = args.mask_repeats and args.loss != "vicreg"     # which has no negatives
        same = duplicate_mask(p, pairs.text[q]) if masks else own_pairs(p)
        loss, stats = objective(x, t, p, q, ~same, step, epoch, batch.drawn)

        lr = common.set_lr(optimizer, learning_rate(step, data.steps_per_epoch, args))
        for group in optimizer.param_groups:
            group["lr"] *= group["scale"]
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        values = common.check_loss(loss, step, stats, dict(image_tower=x, text_tower=t),
                                   {NO_NEGATIVE: (~same).any(1).all()})
        scaler.step(optimizer)
        scaler.update()
        objective.update()
        log(step, **values, lr=lr)

        if common.end_step(step, state, args, data, evaluate):
            break
    common.summary(
        log, args, f"{args.loss} on {args.dataset}, {args.model}, batch {args.batch_size}",
        first_step, extra_lines=[] if common.should_stop() else report(
            log, args, objective, model, data, test, *evaluate_clip(model, tokenizer, data, test)),
        panels=[("mean", "mean (%)"), ("zero-shot top-1", "zero-shot top-1 (%)"), ("tau", "tau"),
                ("tau_I", "mean tau of images"), ("log_u_I", "mean log u of images")])


def report(log, args, objective, model, data, test, result, chance, retrieved):
    """Pictures and the last lines of a run: results on the test set before and after training."""
    tau_picture(f"{args.out}/tau.png", objective, model, data, test)
    if common.rank() > 0:
        return []
    retrieval_picture(f"{args.out}/retrieval.png", data, test, retrieved)
    before, first = log.records()[0], "initial" if args.pretrained else "untrained"
    return [*(f"  {name:18} {first} {before[name]:6.2f} %   trained {value:6.2f} %   (chance "
              f"{chance[name]:.2f} %)" for name, value in result.items()
              if name.endswith(("@1", "top-1", "mean"))),
            f"  queries      {args.out}/retrieval.png",
            "  next         python sogclr_clip.py --evaluate " + shlex.quote(
                f"{args.out}/checkpoint.pt")]


def evaluate_checkpoint(args):
    """--evaluate: results on the test set of a checkpoint of this file or of open_clip."""
    given = {word.split("=")[0][2:].replace("-", "_") for word in args.argv if word[:2] == "--"}
    published = args.evaluate.startswith("openclip:")
    if published:
        args.model, _, tag = args.evaluate.removeprefix("openclip:").partition("/")
        args.pretrained, trained_on, prepare = tag or None, "captions", str  # texts as they are
        folder = Path("runs") / f"openclip-{args.model}-{Path(tag).stem}"
        if "image_size" not in given:
            args.image_size = None  # that of the model
    else:
        checkpoint, folder = common.load_checkpoint(args.evaluate), Path(args.evaluate).parent
        if checkpoint.get("method") != args.method:
            raise common.BadInput(f"{args.evaluate} is not a checkpoint of {args.method}.py")
        old, keep = checkpoint["args"], ["model", "loss", "image_size", "mean", "std"]
        of_data = ["dataset", "data_dir", "train_file", "test_file", "image_root", "classes",
                   "label"]
        if "recipe" in given:
            given.update(RECIPES[args.recipe].keys() & of_data)
        if "dataset" not in given or args.dataset == old["dataset"]:
            keep += of_data
        for name in set(keep) - given:
            setattr(args, name, old[name])
        args.pretrained, trained_on, prepare = args.evaluate, old["dataset"], clean_caption
    common.check_files(args)
    args.batch_size = int(os.environ.get("WORLD_SIZE", 1))
    device = common.setup(args)
    common._open.close()  # nothing to save: a signal ends the program at once
    clip, tokenizer = towers(args)
    mean, std = common.MEAN_STD.get(trained_on, common.IMAGENET)  # whatever the data set is now
    args.mean, args.std = args.mean or list(mean), args.std or list(std)
    size = args.image_size or clip.visual.image_size
    args.image_size = size if isinstance(size, int) else size[0]
    kept = [] if published else Path(args.evaluate).stem.split("-")[1:]  # 0050 of checkpoint-0050
    path = Path(args.out) if "out" in given else folder
    path /= "-".join(["evaluate", args.dataset, *kept]) + ".json"
    common.check_results(path, args, ["batch_size", "pretrained"])  # the processes; as --evaluate
    data = common.load(args, device)
    if not published:
        in_memory(data, data.test)  # the images as the training's own evaluations saw them
    pairs = Pairs(data.test, tokenizer, device, prepare) if data.test.captions else None
    model = Towers(clip).to(device)
    result, chance, retrieved = evaluate_clip(model, tokenizer, data, pairs, prepare)
    if common.rank() > 0:
        return
    text = json.dumps(dict(
        script="sogclr_clip.py", command=shlex.join(["sogclr_clip.py", *args.argv]), results=result,
        chance=chance, args=common.flags_dict(args)), indent=1)
    common.atomic_write(path, lambda file: file.write(text.encode()))
    lines = [f"{args.evaluate} on {args.dataset}",
             *(f"  {name:18} {value:7.2f} %   (chance {chance[name]:.2f} %)"
               for name, value in result.items()), f"  results            {path}"]
    if retrieved:
        retrieval_picture(path.with_suffix(".png"), data, pairs, retrieved)
        lines.append(f"  picture            {path.with_suffix('.png')}")
    common.print_rank0("\n".join([*data.test.notes, *lines]))


def authors_rate(step, steps_per_epoch, epochs, lr, warmup, floor=1e-5, start=1e-5):
    """The authors' rule: in epoch 0 up to lr in `warmup` steps of 100 iterations, then a cosine
    that is constant within an epoch."""
    epoch, i = divmod(step, steps_per_epoch)
    if epoch == 0 and warmup:
        k = min(max(i - 1, 0) // 100, warmup)
        return start + k * (lr - start) / warmup
    return common.cosine_by_epoch(epoch, epochs, lr, floor)


def learning_rate(step, steps_per_epoch, args):
    """Learning rate of a step by --schedule: a pure function of the step."""
    if args.schedule == "authors":
        low = min(args.lr, 1e-5)  # differs from the released code where lr is very small
        return authors_rate(step, steps_per_epoch, args.epochs, args.lr, args.warmup, low, low)
    return common.warmup_cosine(step, args.epochs * steps_per_epoch, args.lr, args.warmup)


# ---------------------------------------------------------------------------------- flags


OF_LOSSES = {name for flags in LOSSES.values() for name in flags}


def loss_defaults(args):
    """Fill in the flags that --loss uses, and set the others to None."""
    uses = LOSSES[args.loss]
    for name in OF_LOSSES:
        value = getattr(args, name, None) if name in uses else None  # eps has no flag
        setattr(args, name, uses.get(name) if value is None else value)


def check(args):
    """BadInput for flags that do not go together."""
    uses = LOSSES[args.loss]
    common.reject_unused(args, sorted(OF_LOSSES - uses.keys()), f"by --loss {args.loss}; it uses: "
                         f"{', '.join(uses) or 'none of them'}")
    common.reject_unused(args, ["arch", "stem"], "by sogclr_clip.py, which has --model")
    if args.learn_tau == "none":
        common.reject_unused(args, ["tau_bounds", "tau_lr"], "without --learn-tau")
    if args.epochs == 1:  # u is set in epoch 0 and averaged from epoch 1 on, but in onlineclr
        common.reject_unused(args, ["gamma"] * (args.loss != "onlineclr") + [
            "gamma_schedule", "eta_schedule"], "in --epochs 1")
    if args.eta is not None and args.eta <= 1e-4 and args.eta_schedule != "const":
        common.reject_unused(args, ["eta_schedule"], "with --eta up to 1e-4, where it ends")
    if args.loss == "vicreg":
        common.reject_unused(args, ["mask_repeats"], "by --loss vicreg, which has no negatives")
    if args.optimizer == "lars":
        raise common.BadInput("--optimizer lars does not work here; use adamw or sgd")
    if args.batch_size < 2 and not args.evaluate:
        raise common.BadInput(f"--batch-size {args.batch_size}: at least 2 pairs are needed")
    common.check_ranges(args, above=["gamma", "tau", "tau_lr", "eta", "beta"],
                        least=["warmup", "rho"],
                        share=["gamma", "beta", "lambda_mi"])
    if args.lr == 0 and args.tau_lr:  # its schedule is that of --lr
        raise common.BadInput("--lr 0 stops the temperatures too: leave --tau-lr out")
    if args.tau_bounds is not None:
        low, high = args.tau_bounds
        if not 0 < low < high:
            raise common.BadInput(f"--tau-bounds {low} {high}: must be 0 < low < high")
        if args.tau is not None and not low <= args.tau <= high and args.learn_tau != "none":
            raise common.BadInput(f"--tau {args.tau} is not within --tau-bounds {low} {high}")


def main(argv=None):
    """Parse the flags and train or evaluate; `main([...])` runs in this process."""
    parser = common.Parser("sogclr_clip", __doc__, RECIPES)
    parser.complete = loss_defaults
    add = parser.add_argument_group("SogCLR on CLIP").add_argument
    add("--loss", default="sogclr", choices=list(LOSSES),  # or as in the original: isogclr_new_v1
        type=lambda name: name.replace("_new", "").replace("_", "-"))
    add("--model", default="tiny-resnet", help=f"{', '.join(TINY)}, or a name of open_clip")
    add("--pretrained", help="tag of open_clip (downloads), or a file of weights")
    add("--tau", type=float, help="temperature, or its initial value")
    add("--learn-tau", choices=["none", "global", "sample"], help="clip, cyclip; sample: one an id")
    add("--tau-bounds", type=float, nargs=2, help="bounds of learned temperatures")
    add("--tau-lr", type=float, help="peak rate of temperatures or their network")
    add("--gamma", type=float, help="weight of the new value in u (E7)")
    add("--gamma-schedule", choices=["constant", "cosine"], help="from 1 in half the epochs")
    add("--rho", type=float, help="radius of the KL constraint (E12)")
    add("--eta", type=float, help="step size of the temperatures (E14)")
    add("--eta-schedule", choices=["const", "cosine", "exp"])
    add("--beta", type=float, help="weight of the new value in v (E13)")
    add("--lambda-mi", type=float, help="share of the MINE loss in sogclr-mine (E26)")
    add("--mask-repeats", action=argparse.BooleanOptionalAction, default=False,
        help="equal images or captions are no negatives")
    add("--schedule", default="cosine", choices=["authors", "cosine"], help="authors: by epoch")
    add("--warmup", type=int, default=0, help="steps (cosine), or steps of 100 iterations")
    add("--evaluate", metavar="CHECKPOINT", help="do not train: test a file, or "
        "openclip:MODEL/TAG_OR_FILE")
    add("--class-names", metavar="FILE", help="zero-shot: names and templates ({}), or imagenet")
    add("--zs-original", action="store_true", help="zero-shot: mean and std of the data set itself")
    common.run(train, parser, argv)


if __name__ == "__main__":
    main()

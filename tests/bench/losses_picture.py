"""The picture of what each loss pulls together and pushes apart: results/losses.png.

    python tests/bench/losses_picture.py        # 40 CPU seconds

It trains the network of clinfonce.py's demo for 12 epochs on the built-in shapes (synthetic) and
takes two views of 12 training images: two shapes, two patterns, three colours. Then it computes the
loss of every method on these 12 images, with temperature 0.4 and T0 = T.

Cell (i, j) of a matrix is the derivative of the loss with respect to the similarity of images i and
j: the sum over the views of i and j that the loss compares, averaged with cell (j, i). It is scaled
by the batch size and the temperature, so that -1 is the pull on a positive of probability 0. In the
picture the strongest cell of each matrix is 1 or -1. Blue (negative): the loss falls when i and j
become more similar, so it pulls them together. Red (positive): it pushes them apart.

    InfoNCE      info_nce of wcl.py, L_NCE; both views of all images are anchors
    Cl-InfoNCE   with ids from K-means of the training set (24 clusters) or from the colour
    CLD          NPID with a bank of all 4,096 images, plus L_CLD with 4 groups (lambda = 1)
    RINCE        rince-out-in without a queue; rank 1: same shape and pattern, rank 2: same shape,
                 with temperature 0.6
    WCL          L_NCE + L_swap, with the embeddings used for both heads
    SogCLR       view 1 against view 2 and back, divided by u of a table that three passes over the
                 training set have filled
"""
import math
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[2]))
import numpy as np
import torch

import cld
import clinfonce
import common
import rince
import sogclr_clip
import wcl

SHAPES, PATTERNS, COLOURS = ("circle", "cross"), ("striped", "dotted"), ("red", "green", "blue")
TAU, WIDTH = 0.4, 1440  # WIDTH of the picture in pixels

# ------------------------------------------------------------------ derivatives, (B, B) float64


def cells(B, tau, *derivatives):
    """Sum of derivatives (B, B), each averaged with its transpose, times B tau."""
    return B * tau * sum((G + G.T) / 2 for G in derivatives)


def from_gradient(loss, z):
    """Derivative (B, B) of a loss with respect to the similarities of the rows of z (2, B, D).

    The loss compares all 2B rows u with one another. The chain rule gives dL/du = (G + G^T) u,
    which determines G + G^T as long as the rows are linearly independent (2B <= D).
    """
    grad, = torch.autograd.grad(loss, z)
    G = grad.flatten(0, 1) @ torch.linalg.pinv(z.detach().flatten(0, 1)) / 2  # (2B, 2B)
    return G.unflatten(1, (2, -1)).unflatten(0, (2, -1)).sum((0, 2))


def one_sided(loss, anchors, keys):
    """The same for a loss that compares anchors with keys (B, D) and has no other derivative with
    respect to the anchors: dL/da = G k."""
    grad, = torch.autograd.grad(loss, anchors, retain_graph=True)
    return grad @ torch.linalg.pinv(keys.detach())


def info_nce(z, tau=TAU):
    """InfoNCE (wcl E1) of z (2, B, D)."""
    return cells(z.shape[1], tau, from_gradient(wcl.info_nce(z, tau), z))


def cl_infonce(z, ids, tau=TAU):
    """Cl-InfoNCE (clinfonce E1) with the cluster ids (B,)."""
    return cells(len(ids), tau, from_gradient(clinfonce.cl_infonce(z, ids, tau, tau), z))


def cld_npid(z, bank, rows, k, order, tau=TAU):
    """NPID + CLD (cld E8): bank (N, D), in which the images are rows (B,); k groups. k-means starts
    from the first images, so they come in a random order (B,), as in training."""
    views = [v[order].detach().requires_grad_() for v in z]
    L_CLD = cld.cld(torch.stack(views), k, tau=tau)[0]
    back, derivatives = order.argsort(), [one_sided(L_CLD, *views)]  # through the centroids of both
    derivatives = [G[back][:, back] for G in derivatives]
    for v in z.detach():
        S = (v @ bank.T).requires_grad_()  # rows of S and of the identity have the products S_ij
        grad, = torch.autograd.grad(cld.npid(S, torch.eye(len(bank), dtype=S.dtype), rows, tau), S)
        derivatives.append(grad[:, rows] / 2)
    return cells(len(rows), tau, *derivatives)


def rince_ranks(z, y, ranks, taus):
    """RINCE-out-in (rince E6): anchors from view 1, keys from view 2; y (B,) classes, ranks
    (C, C)."""
    a, keys = z[0].detach().requires_grad_(), z[1].detach()
    loss = rince.rince(a, keys, keys, rince.rank_of(y, ranks), taus)
    return cells(len(y), taus[0], one_sided(loss, a, keys))


def wcl_total(z, y, tau=TAU):
    """WCL (wcl E6) with weak labels y (2, B)."""
    views = [v.detach().requires_grad_() for v in z]
    L_swap = wcl.swapped(torch.stack(views), y, tau)
    return info_nce(z, tau) + cells(y.shape[1], tau, *(one_sided(L_swap, v, v) for v in views))


def sogclr(z, log_u, tau=TAU):
    """SogCLR (sogclr_clip E9), both directions; log_u (2, B), which this batch does not change."""
    S = (z[0] @ z[1].T).detach().requires_grad_()
    negative, b = ~sogclr_clip.own_pairs(S), torch.zeros_like(log_u[0])
    loss = sum(sogclr_clip.sogclr(s, negative, u, b, tau, gamma=0, eps=0)[0]
               for s, u in zip((S, S.T), log_u)) / 2
    return cells(len(S), 1, *torch.autograd.grad(loss, S))  # this loss has the factor tau


# ------------------------------------------------------------------ batch and network


def trained_network(folder):
    """Cl-InfoNCE's demo, shortened: the model and its flags."""
    clinfonce.main(["--epochs", "12", "--batch-size", "128", "--knn-every", "12", "--threads", "1",
                    "--device", "cpu", "--out", folder])
    checkpoint = common.load_checkpoint(f"{folder}/checkpoint.pt")
    args = SimpleNamespace(**checkpoint["args"])
    model = clinfonce.ClInfoNCE(args, classes=0)
    model.load_state_dict(checkpoint["state"]["model"])
    return model.eval(), args


@torch.no_grad()
def two_views(model, args, images):
    """Embeddings (2, N, D) float64 of two augmented views of the images."""
    aug, random = common.augmentation(args), torch.Generator().manual_seed(0)
    views = [common.apply_params(images, common.sample_params(aug, len(images), random), aug)
             for _ in range(2)]
    return torch.stack([torch.cat([model(part)[0][0] for part in x.split(512)])
                        for x in views]).double()


@torch.no_grad()
def trained_table(Z, tau=TAU, epochs=3, batch=128):
    """log u (2, N) of SogCLR after so many passes over the embeddings Z (2, N, D)."""
    log_u, N = torch.full(Z.shape[:2], -math.inf, dtype=Z.dtype), Z.shape[1]
    negative, b = ~torch.eye(batch, dtype=torch.bool), Z.new_zeros(batch)
    random = torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        for rows in torch.randperm(N, generator=random).split(batch):
            S = Z[0, rows] @ Z[1, rows].T
            for side, s in enumerate((S, S.T)):
                gamma = sogclr_clip.first_visit(log_u[side, rows], epoch, 0.8)
                log_u[side, rows] = sogclr_clip.sogclr(s, negative, log_u[side, rows], b, tau,
                                                       gamma)[1]
    return log_u


def chosen_rows(columns, classes):
    """Rows of the 12 images, by class: the first large one of each kind on a plain background."""
    def is_(column, name):
        return columns[column] == classes[column].index(name)

    return torch.stack([
        (is_("coarse", s) & is_("pattern", p) & is_("colour", c) & is_("size", "large")
         & is_("background", "plain")).nonzero()[0, 0]
        for s in SHAPES for p in PATTERNS for c in COLOURS])


def all_panels(Z, columns, rows):
    """Titles and matrices of the picture, from embeddings Z (2, N, D) of the training set."""
    z = Z[:, rows].clone().requires_grad_()
    clusters = clinfonce.kmeans(Z[0].float(), 24)[0][rows]
    label, coarse = columns["label"], columns["coarse"]
    ranks = rince.chain_ranks(torch.stack([label, coarse], 1))
    weak = torch.stack([wcl.weak_labels(v) for v in z.detach()])
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return [("InfoNCE", "only itself", info_nce(z)),
            ("Cl-InfoNCE", "same K-means cluster", cl_infonce(z, clusters)),
            ("Cl-InfoNCE", "same colour", cl_infonce(z, columns["colour"][rows])),
            ("CLD", "itself, then its group", cld_npid(z, Z[1], rows, 4, order)),
            ("RINCE", "class, then shape", rince_ranks(z, label[rows], ranks, [TAU, 1.5 * TAU])),
            ("WCL", "itself, linked neighbours", wcl_total(z, weak)),
            ("SogCLR", "itself, against all data", sogclr(z, trained_table(Z)[:, rows]))]


# ------------------------------------------------------------------ picture


def draw(panels, images, path):
    """Save the panels (method, words, cells (B, B)) beside the images (B, 3, H, W) uint8."""
    plt = common.pyplot()
    from matplotlib.colors import FuncNorm

    norm = FuncNorm((lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: x * np.abs(x)), -1, 1)
    pixels, B = images.permute(0, 2, 3, 1).numpy(), len(images)
    figure, axes = plt.subplots(2, 4, figsize=(WIDTH / 100, 7.9), facecolor="white")
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.92, 0.06, 0.2)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (method, words, C) in zip(axes.flat[1:], panels):
        picture = axis.imshow(C / C.abs().max(), cmap="RdBu_r", norm=norm)
        for edge in range(0, B + 1, 3):
            line = dict(color="white" if 0 < edge < B else "0.6", linewidth=1.5)
            axis.plot([-0.5, B - 0.5], [edge - 0.5] * 2, **line)
            axis.plot([edge - 0.5] * 2, [-0.5, B - 0.5], **line)
        for i, image in enumerate(pixels):  # along both edges
            image = image[3:-3, 3:-3]
            axis.imshow(image, extent=(-1.7, -0.72, i + 0.49, i - 0.49))
            axis.imshow(image, extent=(i - 0.49, i + 0.49, -0.72, -1.7))
        axis.set(xlim=(-1.75, B - 0.4), ylim=(B - 0.4, -1.75))
        axis.set_title(method, fontsize=17, fontweight="bold", pad=24)
        axis.text(0.5, 1.02, words, fontsize=14, ha="center", transform=axis.transAxes)
    sheet = axes.flat[0]
    for i, image in enumerate(pixels):
        sheet.imshow(image, extent=(i % 3, i % 3 + 0.96, i // 3 + 0.96, i // 3))
    sheet.set(xlim=(-0.1, 3.1), ylim=(4.8, -0.1))
    sheet.set_title("the batch", fontsize=17, fontweight="bold", pad=24)
    bar = figure.colorbar(picture, cax=sheet.inset_axes([0.0, 0.1, 1.0, 0.045]), ticks=[],
                          orientation="horizontal")
    bar.outline.set_visible(False)
    for x, words in ((0, "pull together"), (1, "push apart")):
        sheet.text(x, 0.03, words, fontsize=12, ha="right" if x else "left", va="center",
                   transform=sheet.transAxes)
    common.atomic_write(Path(path), lambda file: figure.savefig(file, dpi=100, format="png"))
    plt.close(figure)


def main():
    images, columns, classes, _ = common.shapes(4096, seed=0)  # the training set of the demo
    with tempfile.TemporaryDirectory() as folder:
        model, args = trained_network(folder)
    rows = chosen_rows(columns, classes)
    panels = all_panels(two_views(model, args, images), columns, rows)
    draw(panels, images[rows], Path(common.__file__).parent / "results" / "losses.png")


if __name__ == "__main__":
    main()

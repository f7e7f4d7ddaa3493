"""The matrices of tests/bench/losses_picture.py against derivatives worked out by hand."""
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent / "bench"))
import losses_picture as picture

import rince

B, D, TAU = 6, 32, 0.3
EYE = torch.eye(B, dtype=torch.float64)


@pytest.fixture
def z():
    """Embeddings of two views, (2, B, D) float64."""
    z = torch.randn(2, B, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return F.normalize(z, dim=2).requires_grad_()


def near(a, b):
    return torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def symmetric(G):
    return (G + G.T) / 2


def softmax_of_views(z):
    """Probabilities (2B, 2B) of the other views, and their sum over the views of a pair, (B, B)."""
    u = z.detach().flatten(0, 1)
    p = (u @ u.T / TAU).fill_diagonal_(float("-inf")).softmax(1)
    return p, p.unflatten(1, (2, B)).unflatten(0, (2, B)).sum((0, 2))


def test_info_nce_is_softmax_minus_identity(z):
    near(picture.info_nce(z, TAU), symmetric(softmax_of_views(z)[1] / 2 - EYE))


def test_cl_infonce_pulls_exactly_the_equal_ids(z):
    ids = torch.tensor([4, 4, 7, 4, 7, 1])
    pull = symmetric(softmax_of_views(z)[1]) / 2 - picture.cl_infonce(z, ids, TAU)
    same = (ids[:, None] == ids).double()
    positives = 2 * same.sum(1) - 1  # of an anchor: all views of its cluster but itself
    views = 4 * same - 2 * EYE  # pairs of different views of i and j
    near(pull, views * same / positives / 2)
    assert ((pull.abs() > 1e-10) == same.bool()).all()


def test_cld_pulls_towards_the_group_in_the_other_view(z):
    """Groups are given by blobs; the bank of NPID is view 2 and two more rows."""
    groups = torch.tensor([0, 1, 0, 1, 0, 1])
    blobs = F.normalize(z.detach() + 5 * F.one_hot(groups, D), dim=2).requires_grad_()
    far = F.normalize(torch.ones(2, D, dtype=torch.float64), dim=1)
    bank, order = torch.cat([far, blobs[1].detach()]), torch.tensor([1, 4, 0, 5, 3, 2])
    found = picture.cld_npid(blobs, bank, torch.arange(2, 2 + B), 2, order, TAU)
    member = F.one_hot(groups).double()
    expected = 0
    for v, other in (blobs.detach(), blobs.detach().flip(0)):
        M = member.T @ other / member.sum(0)[:, None]
        expected = expected + ((v @ M.T / TAU).softmax(1) - member) / member.sum(0) @ member.T / 2
        expected = expected + ((v @ bank.T / TAU).softmax(1)[:, 2:] - EYE) / 2
    near(found, symmetric(expected))


def test_rince_pulls_rank_1_more_than_rank_2():
    """All similarities are 0: cells depend on the ranks alone."""
    z = torch.eye(2 * B, D, dtype=torch.float64).unflatten(0, (2, B))
    y = torch.tensor([0, 0, 1, 1, 2, 2])
    ranks = rince.chain_ranks(torch.tensor([[0, 0], [1, 0], [2, 1]]))
    C = picture.rince_ranks(z, y, ranks, [TAU, 1.25 * TAU])
    of = ranks[y][:, y]
    # images of class 0: term 1 has 2 positives, 4 negatives; term 2 has 2 and 2. Those of class 2:
    # 2 and 4, no term 2. Term 1 is a mean over 12 pairs, term 2 over 4 anchors.
    first, second = B / 2 / 12, B / 2 / 4 / 1.25  # mean over two ranks, the second temperature
    near(C[of == 1], torch.full((12,), -first * 4 / 5, dtype=torch.float64))
    near(C[of == 2], torch.full((8,), first * 2 / 5 - second / 4, dtype=torch.float64))
    near(C[0, 4:], torch.full((2,), (2 * first * 2 / 5 + second / 4) / 2, dtype=torch.float64))
    assert C[of == 1].max() < C[of == 2].min() < 0 < C[of == 0].min()


def test_wcl_adds_the_swapped_weak_labels(z):
    y = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 0, 0, 0]])
    swap = 0
    for v, labels in zip(z.detach(), y.flip(0)):  # each view with the labels of the other
        P = (labels[:, None] == labels).double() - EYE
        n = P.sum(1, keepdim=True)
        p = (v @ v.T / TAU).fill_diagonal_(float("-inf")).softmax(1)
        swap = swap + (p * (n > 0) - P / n.clamp(min=1)) * B / (n > 0).sum() / 2
    near(picture.wcl_total(z, y, TAU), picture.info_nce(z, TAU) + symmetric(swap))


def test_sogclr_divides_by_the_table(z):
    log_u = torch.linspace(-2, 1, 2 * B, dtype=torch.float64).unflatten(0, (2, B))
    S, G = (z[0] @ z[1].T).detach(), 0
    for s, u, turn in ((S, log_u[0], lambda x: x), (S.T, log_u[1], lambda x: x.T)):
        w = ((s - s.diagonal()[:, None]) / TAU - u[:, None]).exp() / (B - 1)
        w = w.fill_diagonal_(0)
        G = G + turn(w - torch.diag(w.sum(1))) / 2
    near(picture.sogclr(z, log_u, TAU), symmetric(G))


def test_trained_table_is_the_mean_weight():
    """All similarities are 0, so every g, and its average u, is exp 0 = 1."""
    Z = torch.eye(2 * 8, dtype=torch.float64).unflatten(0, (2, 8))
    near(picture.trained_table(Z, TAU, epochs=2, batch=4), torch.zeros(2, 8, dtype=torch.float64))


def test_picture_is_as_wide_as_the_page(tmp_path):
    images = torch.zeros(12, 3, 32, 32, dtype=torch.uint8)
    C = torch.linspace(-1, 1, 144).reshape(12, 12)
    picture.draw([("method", "words", C)] * 7, images, tmp_path / "losses.png")
    with Image.open(tmp_path / "losses.png") as image:
        assert image.width == picture.WIDTH and image.getpixel((0, 0))[:3] == (255, 255, 255)

"""WCL: losses and weak labels, the number of processes, exact resume, bad input.

The golden vectors of WCL are in test_golden.py. Here: the worked example, edge cases, components
against scipy and a union-find; one pool of processes per N = 1, 2, 4 that runs whole trainings
without BatchNorm in float64, compared with each other and with a reference loop written from the
equations; runs through main(argv) and under torchrun.
"""
import contextlib
import io
import json
import math
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import ranks
import torch
import torch.nn.functional as F
from PIL import Image
from ranks import NS, blob_tables, close, dropping_gather, many, normal
from runs import SMALL, end, log_of, start, torchrun
from torch import nn

import common
import wcl

B = 16
CPU = torch.device("cpu")


def unit(*degrees):
    """Unit vectors (n, 2) at these angles, float64."""
    angle = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return torch.stack([angle.cos(), angle.sin()], 1)


# ------------------------------------------------------------------ losses


EXAMPLE = torch.stack([unit(0, 10, 90, 105), unit(0, 80, 95, 12)])  # (2, 4, 2)


def test_worked_example():
    y = torch.stack([wcl.weak_labels(v) for v in EXAMPLE])
    assert y.tolist() == [[0, 0, 1, 1], [0, 1, 1, 0]]
    rows = [[12.436325, 8.111918, 7.923203, 12.247480], [8.045339, 7.925838, 8.440807, 8.565363]]
    for v, labels, expected in ((EXAMPLE[0], y[1], rows[0]), (EXAMPLE[1], y[0], rows[1])):
        assert wcl.sup_con(v, labels).item() == pytest.approx(sum(expected) / 4, abs=1e-6)
    assert wcl.swapped(EXAMPLE, y).item() == pytest.approx(9.212034, abs=1e-6)
    assert wcl.swapped(EXAMPLE, y.flip(0)).item() == pytest.approx(0.000883, abs=1e-6)
    assert wcl.info_nce(EXAMPLE).item() == pytest.approx(5.175741, abs=1e-6)


def test_the_weak_loss_has_no_gradient_through_its_keys():
    v = F.normalize(normal(2, 9, 5, seed=1), dim=2).requires_grad_()
    y = torch.stack([wcl.weak_labels(x) for x in v])
    wcl.swapped(v, y).backward()

    def by_hand(anchors, keys):
        losses = []
        for m in (0, 1):
            log_p = log_softmax(anchors[m] @ keys[m].T / 0.1, ~torch.eye(9).bool())
            P = (y[1 - m][:, None] == y[1 - m]) & ~torch.eye(9).bool()
            losses.append(torch.stack([-log_p[i][P[i]].mean() for i in range(9) if P[i].any()]))
        return (losses[0].mean() + losses[1].mean()) / 2

    constant, everywhere = (v.detach().clone().requires_grad_() for _ in "ab")
    by_hand(constant, v.detach()).backward()
    close(v.grad, constant.grad)
    by_hand(everywhere, everywhere).backward()
    assert (everywhere.grad - v.grad).abs().max() > 1e-3


def test_two_images_have_nothing_to_tell_apart():
    v = F.normalize(normal(2, 2, 5), dim=2).requires_grad_()
    y = torch.zeros(2, 2, dtype=torch.int64)
    assert torch.equal(wcl.weak_labels(v[0]), y[0])
    loss = wcl.swapped(v, y)
    loss.backward()
    assert abs(loss.item()) < 1e-12 and v.grad.abs().max() < 1e-12


@pytest.mark.parametrize("n", [3, 10])
def test_collapse_of_all_features_to_one_point(n):
    v = F.normalize(torch.ones(2, n, 4, dtype=torch.float64), dim=2).requires_grad_()
    y = torch.stack([wcl.weak_labels(x.detach()) for x in v])
    assert torch.equal(y, torch.zeros(2, n, dtype=torch.int64))  # ties: all hang on image 0
    for labels in (y, torch.arange(n).repeat(2, 1) // 2 % (n // 2)):  # whatever the labels
        loss = wcl.swapped(v, labels)
        assert loss.item() == pytest.approx(math.log(n - 1))
    loss.backward()
    assert v.grad.isfinite().all()
    nce = wcl.info_nce(v)
    assert nce.item() == pytest.approx(math.log(2 * n - 1))


@pytest.mark.parametrize("tau", [0.1, 0.01])
def test_small_temperatures_in_float32(tau):
    v = F.normalize(normal(2, 12, 6), dim=2)
    y = torch.stack([wcl.weak_labels(x) for x in v])
    for loss in (lambda x: wcl.swapped(x, y, tau), lambda x: wcl.info_nce(x, tau)):
        assert loss(v.float()).item() == pytest.approx(loss(v).item(), rel=1e-5)


def test_rows_without_positive_are_left_out():
    v, y = F.normalize(normal(4, 3), dim=1).requires_grad_(), torch.tensor([5, 5, 0, 1])
    log_p = log_softmax(v @ v.T / 0.1, ~torch.eye(4).bool())
    assert wcl.sup_con(v, y).item() == pytest.approx(-(log_p[0, 1] + log_p[1, 0]).item() / 2)
    none = wcl.sup_con(v, torch.arange(4))
    none.backward()
    assert none.item() == 0 and torch.equal(v.grad, torch.zeros(4, 3, dtype=v.dtype))


def test_half_precision_is_upcast():
    """In bfloat16 nearly all similarities would be ties, and the labels a few large components."""
    v = F.normalize(normal(2, 200, 16).float(), dim=2).bfloat16()
    y = torch.stack([wcl.weak_labels(x) for x in v])
    assert torch.equal(y, torch.stack([wcl.weak_labels(x.float()) for x in v]))
    assert y.max() > 30
    P = torch.eye(200).bool().repeat(2, 1, 1)
    for call in (wcl.info_nce, lambda x: wcl.swapped(x, y),
                 lambda x: wcl.multi_crop(x, x, x, x, P)):
        half, full = call(v), call(v.float())
        for a, b in zip(*((x,) if torch.is_tensor(x) else x for x in (half, full))):
            assert a.dtype == torch.float32 and torch.equal(a, b)


# ------------------------------------------------------------------ weak labels


def union_find(n):
    """Components by first appearance, the plain way."""
    parent = list(range(len(n)))

    def find(i):
        while parent[i] != i:
            i = parent[i]
        return i

    for i, j in enumerate(n.tolist()):
        parent[find(i)] = find(j)
    number = {}
    return torch.tensor([number.setdefault(find(i), len(number)) for i in range(len(n))])


def random_graphs():
    """Any function without fixed point: 1-NN graphs are some of these, with cycles of two."""
    g = torch.Generator().manual_seed(0)
    for size in (2, 3, 4, 5, 7, 8, 9, 33, 64, 100, 511, 512, 513):
        for _ in range(5):
            shift = torch.randint(1, size, (size,), generator=g)
            yield (torch.arange(size) + shift) % size
        order = torch.randperm(size, generator=g)
        cycle = torch.empty_like(order)
        cycle[order] = order.roll(1)
        yield cycle  # one cycle of all
        chain = torch.empty_like(order)
        chain[order] = torch.cat([order[1:], order[-2:-1]])  # each hangs on the next
        yield chain
        if size % 2 == 0:
            pairs = torch.empty_like(order)
            pairs[order] = order.view(-1, 2).flip(1).flatten()
            yield pairs
        yield torch.zeros(size, dtype=torch.int64).index_fill(0, torch.tensor([0]), 1)  # a star


def test_components_are_those_of_a_union_find():
    for n in random_graphs():
        y, size = wcl.components(n), len(n)
        assert y.dtype == torch.int64 and torch.equal(y, union_find(n))
        if size <= 100:  # another order of the nodes: the same partition
            order = torch.randperm(size, generator=torch.Generator().manual_seed(size))
            place = order.argsort()
            moved = wcl.components(place[n[order]])
            assert torch.equal(moved[:, None] == moved, y[order][:, None] == y[order])


def test_components_are_those_of_scipy():
    sparse = pytest.importorskip("scipy.sparse")
    for n in random_graphs():
        size = len(n)
        graph = sparse.csr_matrix((np.ones(size), (np.arange(size), n.numpy())), (size, size))
        count, labels = sparse.csgraph.connected_components(graph, directed=False)
        y = wcl.components(n)
        assert torch.equal(y, torch.from_numpy(labels).long()) and y.max() == count - 1


@pytest.mark.parametrize("size, width", [(50, 3), (300, 16)])
def test_neighbours_by_blocks(size, width):
    V = F.normalize(normal(size, width), dim=1)
    S = (V @ V.T).fill_diagonal_(-math.inf)
    order = S.argsort(dim=1, descending=True, stable=True)
    for k in (1, 4, size - 1, size + 5):
        assert torch.equal(wcl.neighbours(V, k, block=7 * size), order[:, :min(k, size - 1)])


def test_ties_take_the_lowest_index():
    V = torch.eye(6, dtype=torch.float64)[[0, 1, 1, 2, 1, 2]]
    assert wcl.neighbours(V)[:, 0].tolist() == [1, 2, 1, 5, 1, 3]
    assert wcl.neighbours(V, k=3).tolist() == [
        [1, 2, 3], [2, 4, 0], [1, 4, 0], [5, 0, 1], [1, 2, 0], [3, 0, 1]]
    assert wcl.weak_labels(V).tolist() == [0, 0, 0, 1, 0, 1]
    assert wcl.neighbours(unit(0, 180))[:, 0].tolist() == [1, 0]  # not themselves


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size, width", [(5, 8), (9, 64), (13, 13), (33, 6), (50, 128), (257, 64)])
def test_equal_features_tie_whatever_the_product_rounds(size, width, dtype):
    """Equal rows of V give columns of V V^T that differ by an eps or two, depending on shapes."""
    x = normal(size, width, seed=size).to(dtype)
    equal = torch.tensor([0, 1, 2, 3, size - 1])
    x[equal] = x[0].clone()
    V = F.normalize(x, dim=1)
    n = wcl.neighbours(V)[:, 0]
    assert n[equal].tolist() == [1, 0, 0, 0, 0]
    exact = V.double() @ V.double().T
    exact[:, equal] = exact[:, :1].clone()
    assert torch.equal(n, exact.fill_diagonal_(-math.inf).argmax(1))
    near = wcl.neighbours(V, k=4)[equal]
    assert near.tolist() == [[j for j in equal.tolist() if j != i] for i in equal.tolist()]


def test_tied_features_keep_the_invariants():
    g = torch.Generator().manual_seed(3)
    for _ in range(20):
        V = torch.eye(5)[torch.randint(5, (24,), generator=g)]
        y, S = wcl.weak_labels(V), (V @ V.T).fill_diagonal_(-math.inf)
        nearest = S == S.max(1, keepdim=True).values
        assert torch.bincount(y).min() >= 2
        assert (nearest & (y[:, None] == y)).any(1).all()


def test_statistics_of_a_batch():
    y = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 1, 1, 2, 2, 3, 3]])
    t = torch.tensor([7, 7, 3, 3, 3, 7, 3, 5])
    assert wcl.purity(y[0], t) == pytest.approx(100 * (2 + 2 + 1) / 8)
    assert wcl.purity(t, y[0]) == pytest.approx(100 * (2 + 2 + 1) / 8)  # of 7, 3, 5
    assert wcl.purity(y[1], t) == pytest.approx(100 * (2 + 2 + 1 + 1) / 8)
    order = torch.tensor([5, 1, 0, 2, 3, 4, 6, 7])  # makes t 7 7 7 3 3 3 3 5
    columns = dict(label=torch.cat([t.flip(0), t]), mixed=torch.full((16,), -1))
    data = SimpleNamespace(train=SimpleNamespace(column=columns.get),
                           args=SimpleNamespace(label="label", seed=3))
    rows = torch.arange(8, 16)
    with mock.patch.object(torch, "randperm", lambda n, generator: order):
        found = wcl.label_quality(y, rows, data, 5)
    assert found == pytest.approx(dict(
        components=3.5, size=(8 / 3 + 2) / 2, largest=100 * (3 + 2) / 16,
        purity=100 * (5 + 6) / 16, completeness=100 * (5 + 5) / 16,
        random=100 * (3 + 2 + 2 + 2 + 1 + 2 + 1) / 16))
    data.args.label = "mixed"
    assert wcl.label_quality(y, rows, data, 5).keys() == {"components", "size", "largest"}
    assert wcl.label_quality(None, rows, data, 5) == {}


def test_accuracy_of_the_pairs():
    z = F.normalize(normal(2, 40, 4) + 2 * normal(40, 4, seed=1), dim=2)
    q = z.flatten(0, 1)
    near = (q @ q.T).fill_diagonal_(-math.inf).topk(5).indices
    hit = near == torch.arange(80).roll(40)[:, None]
    found = wcl.pair_accuracy(z)
    assert found["top1"].item() == pytest.approx(100 * hit[:, 0].double().mean().item())
    assert found["top5"].item() == pytest.approx(100 * hit.any(1).double().mean().item())
    assert 5 < found["top1"] < found["top5"] < 95


# ------------------------------------------------------------------ the number of processes


def flags(*more):
    """The parsed flags of wcl.py, which is not run."""
    found = []
    with mock.patch.object(common, "run", lambda train, parser, argv:
                           found.append(parser.parse_args(argv))):
        wcl.main(["--device", "cpu", "--threads", "1", "--workers", "0", "--batch-size", str(B),
                  "--image-size", "8", "--epochs", "3", "--knn-every", "1", "--knn-k", "9",
                  "--log-every", "1", "--hidden", "9", "--dim", "6", "--lr", "0.1", "--out",
                  "unused", *more])
    return found[0]


class Net(nn.Module):
    """Stands in for wcl.WCL: the same interface, float64; BatchNorm if asked."""

    norm = False

    def __init__(self, args):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 16),
            nn.BatchNorm1d(16) if self.norm else nn.Identity(), nn.Tanh())
        self.head1 = nn.Linear(16, args.dim)
        self.head2 = nn.Linear(16, args.dim) if args.beta > 0 else None
        self.double()
        self.backbone.register_forward_pre_hook(lambda _, x: (x[0].double(),))

    def forward(self, *views):
        h = torch.stack([self.backbone(x) for x in views])
        return [None if head is None else F.normalize(head(h), dim=2)
                for head in (self.head1, self.head2)]


LARS = ["--optimizer", "lars", "--lr", "0.5", "--lr-rule", "sqrt", "--weight-decay", "0.01"]
TRAININGS = {
    "wcl": ["--tau", "0.2", "--beta", "0.7", "--alpha", "1.3"],
    "weak": ["--weak-epochs", "2", "--weak-crop", "0.9", "1", "--weak-jitter", "0", "0", "0", "0"],
    "simclr": ["--beta", "0"],
    "lars": LARS,
    "kind": [*LARS, "--lars-groups", "kind"],
    "crops": ["--crops", "2", "--crop-k", "3", "--gamma", "0.5", "--delta", "0.8"],
    "components": ["--crops", "2", "--crop-positives", "components"],
    "uneven": ["--crops", "2", "--micro-batch", "3"],  # divides neither 16, 8 nor 4 rows
}
NORM = ["wcl", "simclr", "crops"]  # with BatchNorm: parts of 4 rows on any number of processes


def features_with_ties():
    """(2, 48, 13) unit vectors in float64, of which many are equal."""
    x = normal(2, 48, 13, seed=3)
    x[:, 5::3] = x[:, 2:3]
    return F.normalize(x, dim=2)


def train(folder, more, norm=False):
    """A whole short run of wcl.train; the weights at its end."""
    made = []

    def make(args):
        made.append(Net(args))
        return made[-1]

    with mock.patch.object(wcl, "WCL", make), mock.patch.object(Net, "norm", norm), \
            mock.patch.dict(common.SOURCES, shapes=blob_tables), \
            mock.patch.object(common, "curves", lambda *_: None), \
            mock.patch.object(common, "views_picture", lambda *_: None), \
            contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        wcl.train(flags("--out", folder, *more))
    return made[0].state_dict()


def case_train(folder):
    found = {name: train(f"{folder}/{name}-{common.world()}", more)
             for name, more in TRAININGS.items()}
    if common.world() > 1:
        with mock.patch.object(common, "gather", dropping_gather):
            found["dropped"] = train(f"{folder}/dropped-{common.world()}", TRAININGS["wcl"])
    for name in NORM:
        parts = [] if common.world() == 4 else ["--micro-batch", "4"]
        found[f"norm {name}"] = train(f"{folder}/norm-{name}-{common.world()}",
                                      [*TRAININGS[name], *parts], norm=True)
    if common.world() == 1:
        found["norm whole"] = train(f"{folder}/norm-whole", TRAININGS["wcl"], norm=True)
    return found


def case_labels(folder):
    """Weak labels as every rank has them, of features with ties and of others in float32."""
    found = {}
    for name, V in (("ties", features_with_ties()), ("float32", normal(2, 48, 8, seed=4).float())):
        V = F.normalize(V, dim=2)
        V = common.gather(V[:, ranks.own_rows(48)])
        found[name] = torch.stack([wcl.weak_labels(v) for v in V])
    return found


CASES = dict(train=case_train, labels=case_labels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pool")


@pytest.fixture(scope="module")
def results(folder):
    """results[N][rank][case]."""
    return ranks.run(folder, __name__)


@many
@pytest.mark.parametrize("name", TRAININGS)
def test_training_ends_with_the_weights_of_one_process(results, folder, N, name):
    one = results[1][0]["train"][name]
    for r in results[N]:
        assert r["train"][name].keys() == one.keys()
        for key, value in one.items():
            close(r["train"][name][key], value)
    logs = [log_of(folder / f"{name}-{n}")[1:] for n in (1, N)]
    assert len(logs[0]) == len(logs[1]) == 12 + 4
    for a, b in zip(*logs, strict=True):
        assert a == pytest.approx(b, abs=1e-9)


@many
def test_a_gather_without_gradient_would_be_noticed(results, N):
    one = results[1][0]["train"]["wcl"]
    for r in results[N]:
        assert max((r["train"]["dropped"][k] - v).abs().max() for k, v in one.items()) > 1e-5


@pytest.mark.parametrize("N", NS)
def test_weak_labels_are_the_same_on_all_ranks(results, N):
    one = results[1][0]["labels"]
    for m in (0, 1):
        assert torch.equal(one["ties"][m], wcl.weak_labels(features_with_ties()[m]))
    for r in results[N]:
        for name in ("ties", "float32"):
            assert torch.equal(r["labels"][name], one[name]) and one[name].max() > 2


@many
@pytest.mark.parametrize("name", NORM)
def test_a_part_is_a_process(results, folder, N, name):
    """With BatchNorm too; the running statistics are those of the first part of the first rank."""
    one = results[1][0]["train"][f"norm {name}"]
    for i, r in enumerate(results[N]):
        for key, value in one.items():
            if i == 0 or "running" not in key:  # the other ranks' statistics are not kept
                close(r["train"][f"norm {name}"][key], value)
    logs = [log_of(folder / f"norm-{name}-{n}")[1:] for n in (1, N)]
    for a, b in zip(*logs, strict=True):
        assert a == pytest.approx(b, abs=1e-9)


def test_other_parts_would_be_noticed(results):
    found = results[1][0]["train"]
    parts, whole = found["norm wcl"], found["norm whole"]
    assert (parts["backbone.2.weight"] - whole["backbone.2.weight"]).abs().max() > 1e-3
    close(found["uneven"], results[4][0]["train"]["uneven"])


def log_softmax(s, keep):
    """Reference of log softmax over the columns that `keep` marks."""
    return s - torch.where(keep, s, torch.tensor(-math.inf, dtype=s.dtype)).exp().sum(
        1, keepdim=True).log()


def reference_loss(model, views, crops, args):
    """The loss of a step from the equations, one row after the other; weak labels (2, B)."""
    out = [model.backbone(x) for x in (*views, *crops)]
    z, v = ([F.normalize(head(h), dim=1) for h in out] for head in (model.head1, model.head2 or
                                                                    model.head1))
    q, n, tau = torch.cat(z[:2]), len(z[0]), args.tau
    log_p = log_softmax(q @ q.T / tau, ~torch.eye(2 * n).bool())
    loss = args.alpha * -sum(log_p[a, (a + n) % (2 * n)] for a in range(2 * n)) / (2 * n)
    if args.beta == 0:
        return loss, None
    y, near = [], []
    for m in (0, 1):
        S = (v[m] @ v[m].T).detach().fill_diagonal_(-2)
        near.append([sorted(range(n), key=lambda j, s=s: (-s[j], j))[:args.crop_k]
                     for s in S.tolist()])
        y.append(union_find(torch.tensor([js[0] for js in near[-1]])))
    other = ~torch.eye(n).bool()
    for m in (0, 1):
        log_p = log_softmax(v[m] @ v[m].detach().T / tau, other)
        for i in range(n):
            P = [j for j in range(n) if j != i and y[1 - m][j] == y[1 - m][i]]
            loss = loss + args.beta / 2 * -sum(log_p[i, j] for j in P) / len(P) / n
    every = torch.ones(n, n).bool()
    for m in (0, 1):
        for zc, vc in zip(z[2:], v[2:], strict=True):
            c_nce = log_softmax(zc @ z[m].detach().T / tau, every)
            c_k = log_softmax(vc @ v[m].detach().T / tau, every)
            for i in range(n):
                P = [i, *near[1 - m][i]] if args.crop_positives == "neighbours" else [
                    j for j in range(n) if y[1 - m][j] == y[1 - m][i]]
                loss = loss - (args.gamma * c_nce[i, i] + args.delta * sum(
                    c_k[i, j] for j in P) / len(P)) / (2 * len(crops) * n)
    return loss, y


@pytest.mark.parametrize("name", TRAININGS)
def test_training_is_the_loop_of_the_equations(results, folder, name):
    """Weights and log of wcl.train in one process against a loop written for this test."""
    args = flags(*TRAININGS[name])
    model, data = Net(args), common.Data(*blob_tables(args), args, CPU)
    I, lines = data.steps_per_epoch, [r for r in log_of(folder / f"{name}-1") if "lr" in r]
    strong = common.augmentation(args)
    weak = dict(strong, crop=tuple(args.weak_crop), jitter=tuple(args.weak_jitter))
    small = dict(strong, crop=(0.05, 0.14), size=3)  # 8 * 96 / 224
    weak_epochs = 2 if name == "weak" else 1  # the warm-up's
    momentum = {}
    for step in range(3 * I):
        batch, = data.batches(step, step + 1, weak if step < weak_epochs * I else strong,
                              extra=[(small, 2)])
        crops = common.augment(batch.extra[0]) if args.crops else []
        loss, y = reference_loss(model, common.augment(batch), crops, args)
        model.zero_grad()
        loss.backward()
        base = args.lr * (4 if args.lr_rule == "sqrt" else 1)  # B = 16
        lr = base * step / I if step < I else base * (1 + math.cos(
            math.pi * (step - I) / (2 * I))) / 2
        for key, p in model.named_parameters():
            excluded = args.optimizer == "lars" and "bias" in key
            g = p.grad + (0 if excluded else args.weight_decay) * p.detach()
            if args.optimizer == "lars" and not excluded:
                g = g * 0.001 * p.detach().norm() / g.norm()
            momentum[key] = args.momentum * momentum.get(key, 0) + g
            nesterov = g + args.momentum * momentum[key]
            p.data -= lr * (momentum[key] if args.optimizer == "lars" else nesterov)
        assert lines[step]["loss"] == pytest.approx(loss.item(), abs=1e-9)
        assert lines[step]["lr"] == pytest.approx(lr, abs=1e-12)
        assert lines[step]["step"] == step + 1
        assert 0 <= lines[step]["top1"] <= lines[step]["top5"] <= 100
        if y is not None:
            assert lines[step]["components"] == pytest.approx(
                (y[0].max().item() + y[1].max().item()) / 2 + 1)
            label = data.train.columns["label"][batch.rows]
            assert lines[step]["purity"] == pytest.approx(
                (wcl.purity(y[0], label) + wcl.purity(y[1], label)) / 2)
        else:
            assert "components" not in lines[step] and "swap" not in lines[step]
    for key, value in model.state_dict().items():
        close(value, results[1][0]["train"][name][key], 1e-9)


def test_the_trainings_differ_from_each_other(results):
    found = results[1][0]["train"]
    weights = {name: found[name]["backbone.2.weight"] for name in TRAININGS
               if name not in ("kind", "uneven")}
    for i, a in enumerate(weights):
        assert all((weights[a] - weights[b]).abs().max() > 1e-4 for b in list(weights)[:i])
    # no vector is without "bias" in its name here, so the groups by kind are the same
    close(found["kind"], found["lars"])


# ------------------------------------------------------------------ the network


def test_statistics_of_batchnorm_are_per_view():
    model = wcl.WCL(flags()).train()
    x = normal(3, 8, 3, 16, 16).float()
    x[1:] = 5 * x[1:] + 3
    z, v = model(x[0], x[1])
    again = model(x[0], x[2])
    assert torch.equal(z[0], again[0][0]) and torch.equal(v[0], again[1][0])
    assert not torch.allclose(z[1], again[0][1])
    assert {k: int(b) for k, b in model.named_buffers() if k.endswith("tracked")} == {
        k: 4 for k, _ in model.named_buffers() if k.endswith("tracked")}
    close(z.norm(dim=2), torch.ones(2, 8), 1e-6)
    assert z.shape == v.shape == (2, 8, 6) and not torch.allclose(z, v)
    alone = wcl.WCL(flags("--beta", "0"))
    assert alone(x[0], x[1])[1] is None


# ------------------------------------------------------------------ runs


VARIANTS = {
    "wcl": [],
    "lars": ["--optimizer", "lars", "--no-nesterov", "--lr-rule", "sqrt", "--lr", "0.075",
             "--lars-groups", "kind", "--weak-epochs", "2", "--picture"],
    "crops": ["--crops", "2", "--amp", "bf16", "--crop-positives", "components"],
    "simclr": ["--beta", "0"],
    "micro-batch": ["--crops", "2", "--micro-batch", "6"],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_stop_and_go_on_exactly(goes_on_exactly, name, tmp_path):
    whole = goes_on_exactly(wcl.main, [*SMALL, *VARIANTS[name]])
    model = whole["state"]["model"]
    assert model["head1.linear1.weight"].shape == (256, 128)
    assert model["head1.linear3.weight"].shape == (128, 256)
    assert any(k.startswith("head2") for k in model) == (name != "simclr")
    lines = [r for r in log_of(tmp_path / "whole") if "lr" in r]
    base = 0.075 * 4 if name == "lars" else 0.5
    assert [r["lr"] for r in lines] == pytest.approx(
        [base * x for x in (0, 0.25, 0.5, 0.75, 1, 0.8535534, 0.5, 0.1464466)])
    assert ("crop_k" in lines[0]) == (name in ("crops", "micro-batch"))
    assert (tmp_path / "whole" / "components.png").exists() == (name == "lars")
    if name == "lars":  # groups by kind: no vector is adapted, the shortcuts' BatchNorm neither
        vectors = [k for k, v in model.items() if v.ndim == 1 and "running" not in k]
        adapted, left = whole["state"]["optimizer"]["param_groups"]
        assert len(left["params"]) == len(vectors) and not left["adapt"] and adapted["adapt"]
        assert any("downsample.1.weight" in k for k in vectors)
    # the first step has a rate of 0: the first to move is the second
    assert lines[0]["lr"] == 0 and lines[0]["loss"] != lines[1]["loss"]


def test_last_lines_and_the_untrained_network(run_main, tmp_path, capsys):
    run_main(wcl.main, "run", [*SMALL, "--limit-train", "256", "--batch-size", "64"])
    out = capsys.readouterr().out
    records = log_of(tmp_path / "run")[1:]
    first, last = records[0], [r for r in records if "lr" in r][-1]
    assert out.startswith("recipe demo: values of this project, not a published setting of WCL\n")
    for name, r in (("untrained", first), ("trained", last)):
        assert (f"  weak labels  {name}: {r['components']:.1f} components of {r['size']:.1f} "
                f"images, purity {r['purity']:.1f} % (random groups of these sizes "
                f"{r['random']:.1f} %), completeness {r['completeness']:.1f} %\n") in out
    # by hand: the untrained network in training mode on the first batches, strongly augmented
    args = flags()
    args = SimpleNamespace(**{**vars(args), **json.loads(
        (tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])["args"]})
    data = common.load(args, CPU)
    torch.manual_seed(0)
    model = wcl.WCL(args).train()
    found = []
    for batch in data.batches(0, 4, common.augmentation(args)):
        for x in common.augment(batch):
            h = model.backbone(x)
            y = wcl.weak_labels(F.normalize(model.head2(h), dim=1))
            found.append((int(y.max()) + 1, wcl.purity(y, data.train.columns["label"][batch.rows])))
    assert first["components"] == sum(n for n, _ in found) / 8
    assert first["purity"] == pytest.approx(sum(p for _, p in found) / 8)
    assert first["random"] < 60 and 5 < first["completeness"] < 100
    # the evaluation finds the encoder; the heads (ten weights, six of BatchNorm each) are left out
    path = str(tmp_path / "run" / "checkpoint.pt")
    about = common.load_backbone(path, common.load_checkpoint(path))[1]
    assert (about["arch"], about["prefix"]) == ("resnet-tiny", "backbone.")
    assert about["left_out"] == {"head1": 16, "head2": 16} and not about["missing"]


@pytest.mark.parametrize("largest", [90, 91])
def test_useless_weak_labels_are_named(largest):
    records = [dict(step=0, knn_top1=1.0, components=3.0, size=9.0, largest=95.0),
               dict(step=1, components=1.5, size=11.25, largest=largest), dict(step=1, knn_top1=2)]
    log = SimpleNamespace(records=lambda: records, header=dict(args=dict(init=None)))
    lines = wcl.summary_lines(log)
    log.header["args"]["init"] = "weights.pt"
    assert wcl.summary_lines(log)[0] == "  weak labels  initial: 3.0 components of 9.0 images"
    assert lines[:2] == ["  weak labels  untrained: 3.0 components of 9.0 images",
                         "  weak labels  trained: 1.5 components of 11.2 images"]
    assert len(lines) == (3 if largest > 90 else 2)
    assert lines[-1].startswith("  warning      one component holds 91 %") == (largest > 90)


def test_picture_of_a_finished_run(run_main, tmp_path, capsys):
    argv = [*SMALL, "--epochs", "2", "--batch-size", "32"]
    run_main(wcl.main, "run", argv)
    assert not (tmp_path / "run" / "components.png").exists()
    capsys.readouterr()
    state = run_main(wcl.main, "run", [*argv, "--picture"])  # no other run: it may change
    out = capsys.readouterr().out
    assert f"  components   {tmp_path}/run/components.png\n" in out and "finished before" in out
    args = SimpleNamespace(**{**vars(flags()), **state["args"]})
    data, model = common.load(args, CPU), wcl.WCL(args)
    model.load_state_dict(state["state"]["model"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rows, y = next(wcl.batch_graphs(model, data, common.augmentation(args), 1))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())  # a copy was used
    sizes = torch.bincount(y[0])
    sheet = np.asarray(Image.open(tmp_path / "run" / "components.png")).astype(int)
    shown = min(8, len(sizes))
    columns = min(14, int(sizes.max()))
    assert len(sheet) == 26 + shown * 56 and sheet.shape[1] >= 150 + columns * 56
    order = sizes.argsort(descending=True, stable=True)
    assert shown == len(order) or shown == 8
    for i, c in ((0, order[0]), (shown - 1, order[-1])):  # the largest first, the smallest last
        label = data.train.columns["label"][rows[y[0] == c]]
        right = label == torch.bincount(label).argmax()
        for j in range(columns):
            frame = sheet[26 + i * 56 + 1, 150 + j * 56 + 10].tolist()
            tied = right.sum() == 1 < len(label)  # no class is the commonest
            assert frame == ([255] * 3 if j >= len(label) else [90] * 3 if tied else
                             [40, 160, 60] if right[j] else [205, 50, 45])


def test_torchrun(tmp_path):
    run = end(start([*SMALL, "--picture", "--sync-bn", "--out", tmp_path / "run"],
                    torchrun("wcl.py", "--standalone", "--nproc_per_node=2")))
    assert run.status == 0, run.err
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "checkpoint.prev.pt", "checkpoint.pt", "components.png", "curves.png", "log.jsonl",
        "views.png"]
    lines = run.out[run.out.index("WCL, shapes\n"):].splitlines()
    assert [line[:15].strip() for line in lines] == [
        "WCL, shapes", "kNN top-1", "weak labels", "weak labels", "components", "checkpoint",
        "log", "pictures", "next"]
    header, first, *_ = (json.loads(s) for s in (tmp_path / "run" / "log.jsonl").open())
    assert header["processes"] == 2 and 2 <= first["components"] <= 8
    weights = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["state"]["model"]
    assert not any(k.startswith("module.") for k in weights)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(("argv", "words"), [
    (["--batch-size", "1"], ["--batch-size 1", "global batch of at least 2"]),
    (["--warmup", "2"], ["--warmup 2 must be shorter than --epochs 2"]),
    (["--warmup", "10"], ["--warmup 10 must be shorter than --epochs 2"]),
    (["--warmup", "-1"], ["--warmup must be at least 0"]),
    (["--weak-epochs", "3"], ["--weak-epochs 3 is more than --epochs 2"]),
    (["--weak-epochs", "-1"], ["--weak-epochs must be at least 0"]),
    (["--weak-crop", "0", "1"], ["--weak-crop 0.0 1.0"]),
    (["--weak-jitter", "0.4", "0.4", "0.4", "0.6"], ["--weak-jitter", "0.6"]),
    (["--tau", "0"], ["--tau must be above 0"]),
    (["--tau", "nan"], ["--tau must be above 0"]),
    (["--alpha", "0"], ["--alpha must be above 0"]),
    (["--beta", "-1"], ["--beta must be at least 0"]),
    (["--beta", "nan"], ["--beta must be at least 0"]),
    (["--gamma", "-1"], ["--gamma must be at least 0"]),
    (["--crops", "-1"], ["--crops must be at least 0"]),
    (["--crop-k", "0"], ["--crop-k must be above 0"]),
    (["--crop-k", "3"], ["--crop-k is not used without --crops"]),
    (["--beta", "0", "--crops", "2"], ["--beta 0 has no weak labels", "--crops"]),
    (["--beta", "0", "--picture"], ["--beta 0 has no weak labels", "--picture"]),
    (["--hidden", "0"], ["--hidden must be above 0"]),
    (["--lars-groups", "all"], ["--lars-groups", "'all'"]),
    (["--recipe", "imagnet"], ["--recipe imagnet", "imagenet-paper-800"]),
])
def test_flags(refused_by, argv, words):
    refused_by(wcl.main, [*SMALL, *argv], *words)


def test_features_that_are_not_finite(refused_by, tmp_path):
    """The weights overflow in the second step, whose rate is the first above 0."""
    refused_by(wcl.main, [*SMALL, "--lr", "1e38"], "the output of head1 is not finite at step 2",
               "last checkpoint is kept", status=1, says=["recipe demo"])
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 0
    assert all(v.isfinite().all() for v in saved["state"]["model"].values())


def test_another_beta_is_another_run(run_main, refused_by, tmp_path):
    run_main(wcl.main, "run", [*SMALL, "--epochs", "2"])
    refused_by(wcl.main, [*SMALL, "--epochs", "2", "--beta", "0"], "--beta 1.0 -> 0.0",
               out=tmp_path / "run")


@pytest.mark.parametrize("name", wcl.RECIPES)
def test_recipes(name):
    """Known flags that parse and pass the checks; rates and sizes of the authors' runs."""
    args = flags("--recipe", name)
    assert set(wcl.RECIPES[name]) <= vars(args).keys()
    recipe = SimpleNamespace(**{**vars(args), **wcl.RECIPES[name]})
    wcl.check(recipe)
    top = max(wcl.learning_rate(t, 10, recipe) for t in range(10 * recipe.epochs))
    assert top == pytest.approx({"imagenet100": 2.4, "cifar10": 1.697056, "cifar100": 1.697056,
                                 "demo": 0.5, "own": 0.5, "c10": 0.5,
                                 "c100-small": 0.5}.get(name, 4.8), abs=1e-6)
    if name.startswith("imagenet") and name != "imagenet100":
        paper = "paper" in name
        assert (recipe.hidden, recipe.dim) == ((2048, 128) if paper else (4096, 256))
        assert recipe.epochs == int((name.split("-")[-1:] if name[-1] == "0" else [100])[0])
    assert name in wcl.OWN or recipe.batch_size == 4096


def test_unlabelled_images_have_components_but_no_purity(run_main, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    g = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(g.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{i:02}.png")
    run_main(wcl.main, "run", [*SMALL[:-6], "--dataset", "folder", "--data-dir", str(folder),
                               "--image-size", "16", "--batch-size", "16", "--epochs", "2",
                               "--workers", "0", "--crops", "1", "--picture"])
    lines = [r for r in log_of(tmp_path / "run")[1:] if "components" in r]
    assert len(lines) == 5 and all("purity" not in r for r in lines)
    assert (tmp_path / "run" / "components.png").exists()

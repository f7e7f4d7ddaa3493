"""cld.py: grouping, losses and tables on small inputs; any number of processes; whole runs."""
import contextlib
import functools
import io
import json
import math
import shutil
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import ranks
import torch
import torch.nn.functional as F
from conftest import write_folder
from PIL import Image
from ranks import blob_tables, close, many, normal
from runs import SMALL, checkpoint, differences, end, flat, log_of, start, stop_started, torchrun
from torch import nn

import cld
import common
import linear_eval

B = 16  # rows of the global batch
CPU = torch.device("cpu")


def features(n, D=8, seed=0, views=2):
    """Unit vectors (views, n, D) in float64; the views of an image are near each other."""
    x = normal(n, D, seed=seed) + 0.2 * normal(views, n, D, seed=seed + 1)
    return F.normalize(x, dim=2)


# ------------------------------------------------------------------ cases, run on every rank


class Pixels(nn.Module):
    """A backbone for images of any size, without BatchNorm, in float64."""

    width = 12

    def __init__(self, *_):
        super().__init__()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(2), nn.Linear(12, 12)

    def forward(self, x):
        return self.fc(self.pool(x.to(self.fc.weight.dtype)).flatten(1)).tanh()


TRAININGS = {
    "npid": [],
    "pure": ["--lambda-cld", "0"],
    "nce": ["--nce", "7"],
    "ncuts": ["--grouping", "ncuts", "--k-eigen", "3", "--k", "4"],
    "moco": ["--base", "moco", "--queue", "35", "--head", "normlinear"],
    "mocov2": ["--base", "mocov2", "--queue", "48", "--head", "normmlp"],
    "infomin": ["--base", "infomin", "--queue", "35", "--head", "mlp"],
    "byol": ["--base", "byol", "--head", "normmlp", "--key-momentum", "0.9"],
    "rows": ["--group-rows", "4", "--k", "3"],
    "uneven": ["--micro-batch", "3"],  # divides neither 16, 8 nor 4 rows
}
NORM = {  # with BatchNorm: parts of 4 rows on any number of processes
    name: TRAININGS[name] for name in ("npid", "nce", "moco", "mocov2", "infomin", "byol")}


def parse(*argv):
    """The parsed flags of cld.py, which is not run."""
    found = []
    with mock.patch.object(common, "run", lambda train, parser, argv:
                           found.append(parser.parse_args(argv))):
        cld.main(["--device", "cpu", "--threads", "1", *argv])
    return found[0]


class NormPixels(Pixels):
    """The same with BatchNorm."""

    def __init__(self, *_):
        super().__init__()
        self.norm = batch_norm(12)

    def forward(self, x):
        return self.norm(super().forward(x))


batch_norm = nn.BatchNorm1d


def train(folder, *argv, norm=False):
    """A short run of cld.train in float64, without BatchNorm unless asked; what this rank has at
    its end."""
    kept = {}

    def keep(name, make):
        def made(*values):
            kept[name] = make(*values)
            return kept[name]
        return made

    def tables(*values):
        return [t and t.double() for t in memory(*values)]

    memory = cld.make_memory
    model = keep("model", lambda args: network(args).double())
    network = cld.CLD
    args = parse("--batch-size", str(B), "--image-size", "8", "--epochs", "2", "--k", "5",
                 "--dim", "6", "--lr", "0.1", "--warmup", "1", "--knn-every", "1", "--knn-k", "9",
                 "--log-every", "1", "--workers", "0", "--dataset", "shapes", *argv,
                 "--out", folder)
    with contextlib.ExitStack() as stack:
        for where, name, value in (
                (common, "resnet", NormPixels if norm else Pixels),
                (nn, "BatchNorm1d", batch_norm if norm else lambda width: nn.Identity()),
                (cld, "CLD", model), (cld, "make_memory", keep("tables", tables)),
                (cld.copy, "deepcopy", keep("key", cld.copy.deepcopy)),
                (common, "optimizer", keep("optimizer", common.optimizer)),
                (common, "curves", lambda *_: None), (common, "views_picture", lambda *_: None)):
            stack.enter_context(mock.patch.object(where, name, value))
        stack.enter_context(mock.patch.dict(common.SOURCES, shapes=blob_tables))
        for stream in (contextlib.redirect_stdout, contextlib.redirect_stderr):
            stack.enter_context(stream(io.StringIO()))
        cld.train(args)
    bank, queue = kept["tables"]
    parts = dict(model=kept["model"], key=kept.get("key"), bank=bank, queue=queue,
                 optimizer=kept["optimizer"])
    return flat({name: part.state_dict() for name, part in parts.items() if part is not None})


def case_train(folder):
    found = {name: train(f"{folder}/{name}-{common.world()}", *argv)
             for name, argv in TRAININGS.items()}
    for name, argv in NORM.items():
        parts = [] if common.world() == 4 else ["--micro-batch", "4"]
        found[f"norm {name}"] = train(f"{folder}/norm-{name}-{common.world()}", *argv, *parts,
                                      norm=True)
    if common.world() == 1:
        found["norm whole"] = train(f"{folder}/norm-whole", *TRAININGS["moco"], norm=True)
    return found


def case_gradients(folder):
    """Gradient of the cross-level loss at the features, as DDP's mean would have it."""
    mine = features(B)[:, ranks.own_rows(B)].clone().requires_grad_()
    loss, accuracy = cld.cld(common.gather(mine), 5, 5, 0.2)
    loss.backward()
    return dict(loss=loss.detach(), accuracy=accuracy, grad=mine.grad / common.world())


CASES = dict(train=case_train, gradients=case_gradients)
results = ranks.pool(__name__)


@many
def test_cross_level_gradients_are_those_of_one_process(results, N):
    one = results[1][0]["gradients"]
    assert one["grad"].abs().max() > 1e-3
    for r in results[N]:
        close(r["gradients"]["loss"], one["loss"])
        assert r["gradients"]["accuracy"] == one["accuracy"]
    close(torch.cat([r["gradients"]["grad"] for r in results[N]], 1), one["grad"])


def read_log(folder):
    """Numbers of the lines after the header, without what may differ."""
    lines = [json.loads(s) for s in (folder / "log.jsonl").read_text().splitlines()[1:]]
    skip = ("images_per_s", "memory_mb", "seconds", "cpu_seconds")
    return [{k: v for k, v in line.items() if k not in skip} for line in lines]


@many
@pytest.mark.parametrize("name", TRAININGS)
def test_training_ends_with_the_state_of_one_process(results, N, name):
    """Weights, momentum (the gradients), bank, Z, queue, pointer and key network."""
    one = results[1][0]["train"]["npid" if name == "uneven" else name]
    tables = dict(npid=["/bank/V"], nce=["/bank/V", "/bank/Z"], moco=["/queue/keys", "/queue/ptr"])
    for key in tables.get(name, []):
        assert key in one
    assert any(k.startswith("/key/") for k in one) == (
        name in ("moco", "mocov2", "infomin", "byol"))
    for r in results[N]:
        found = r["train"][name]
        assert found.keys() == one.keys()
        for key, value in one.items():
            if isinstance(value, torch.Tensor):
                close(found[key], value)
                if key.startswith(("/bank", "/queue")):  # the replicas, bit by bit
                    assert torch.equal(found[key], results[N][0]["train"][name][key])


@many
def test_logs_are_those_of_one_process(results, tmp_path_factory, N):
    folder = next(tmp_path_factory.getbasetemp().glob("pool*/npid-1")).parent
    for name in (*TRAININGS, *(f"norm-{name}" for name in NORM)):
        one, log = (read_log(folder / f"{name}-{n}") for n in (1, N))
        assert len(one) == 8 + 3 and ("group_acc" in one[1]) == (name != "pure")
        for a, b in zip(one, log, strict=True):
            assert a == pytest.approx(b, abs=1e-9)


@many
@pytest.mark.parametrize("name", NORM)
def test_a_part_is_a_process(results, N, name):
    """With BatchNorm, in the network and in the key network, whose keys are shuffled among the
    parts. The running statistics are those of the first part of the first rank."""
    one = results[1][0]["train"][f"norm {name}"]
    assert any("running_mean" in key for key in one)
    for i, r in enumerate(results[N]):
        for key, value in one.items():
            if isinstance(value, torch.Tensor) and (i == 0 or "running" not in key):
                close(r["train"][f"norm {name}"][key], value)


def test_other_parts_would_be_noticed(results):
    found = results[1][0]["train"]
    weights = [found[name]["/model/backbone.fc.weight"]
               for name in ("norm moco", "norm whole", "moco")]
    for i, a in enumerate(weights):
        assert all((a - b).abs().max() > 1e-3 for b in weights[:i])


def test_the_trainings_differ_from_each_other(results):
    found = results[1][0]["train"]
    weights = [found[name]["/model/backbone.fc.weight"] for name in TRAININGS if name != "uneven"]
    for i, a in enumerate(weights):
        assert all((a - b).abs().max() > 1e-3 for b in weights[:i])


# ------------------------------------------------------------------ grouping


def kmeans_by_loops(x, k, iters):
    """Section 3.2 of the authors' code, row by row."""
    c = [row.clone() for row in x[:k]]
    for _ in range(iters):
        ids = []
        for row in x:
            d2 = [((row - m) ** 2).sum().item() for m in c]
            ids.append(d2.index(min(d2)))  # the first of equal ones
        ids = torch.tensor(ids)
        c = [x[ids == j].sum(0) / max(1, (ids == j).sum().item()) for j in range(k)]
    return ids, torch.stack(c)


@pytest.mark.parametrize(("n", "k", "iters"), [(40, 7, 4), (9, 9, 2), (6, 11, 3), (5, 1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kmeans_against_loops(n, k, iters, dtype):
    x = features(n, views=1)[0].to(dtype)
    x[3] = x[1]  # a tie among the first rows
    x[4] = 0
    ids, M = cld.group(x, k, iters)
    expected = kmeans_by_loops(x, k, iters)
    assert torch.equal(ids, expected[0]) and ids[3] == ids[1]
    close(M, expected[1], 1e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("n, k", [(64, 19), (300, 37), (200, 400)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_matrix_form_finds_the_same_groups(n, k, dtype):
    """Without ties, and with equal rows, zero rows, and opposite ones."""
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        spots = torch.randn(16, 32, generator=g)[torch.randint(16, (n,), generator=g)]
        x = F.normalize(torch.randn(n, 32, generator=g) + spots, dim=1).to(dtype)
        if seed % 2:
            last = min(k, n) - 1  # a product need not give equal columns equal values
            x[last - 2:last + 1], x[3:6], x[7:9], x[10] = x[:3].clone(), x[0].clone(), 0, -x[11]
        found = cld.kmeans(x, k, 5, cld.nearest_fast)
        assert torch.equal(found, cld.kmeans(x, k, 5))


def test_seeds_that_are_equal():
    """The lower id takes all; the group of the other is empty, its centroid exactly 0."""
    x = torch.eye(4, dtype=torch.float64)[[0, 0, 0, 1, 2]].requires_grad_()
    ids, M = cld.group(x, 3, 4)
    # rows 3 and 4 are as far from each seed: ties too, so all begin in group 0
    assert ids.tolist() == [0, 0, 0, 1, 1] and (M[2] == 0).all()
    M.sum().backward()
    share = torch.tensor([1 / 3] * 3 + [1 / 2] * 2, dtype=torch.float64)
    close(x.grad, share[:, None].expand(5, 4))


def test_cuts_of_rows_that_are_zero_or_not_finite():
    x = features(12, views=1)[0]
    x[5] = 0
    ids, M = cld.group(x, 3, 5, cld.cut_vectors(x, 3))
    assert M.isfinite().all() and ids.max() < 3
    x[2, 1] = math.nan  # no exception of the solver: the loss is NaN, which stops all ranks
    ids, M = cld.group(x, 3, 5, cld.cut_vectors(x, 3))
    assert ids.min() >= 0 and ids.max() < 3 and M.isnan().any()


# ------------------------------------------------------------------ losses


def test_one_group_has_no_loss():
    f = features(7).requires_grad_()
    loss, accuracy = cld.cld(f, 1)
    loss.backward()
    assert loss == 0 and accuracy == 1 and (f.grad == 0).all()


def test_as_many_groups_as_rows_is_infonce_across_the_views():
    f, t = features(9), 0.3
    s = f[0] @ f[1].T / t
    own = torch.arange(9)
    close(cld.cld(f, 9, 5, t)[0], (F.cross_entropy(s, own) + F.cross_entropy(s.T, own)) / 2)
    # further groups are empty: each adds a logit of 0
    wide = [torch.cat([x, torch.zeros(9, 4, dtype=s.dtype)], 1) for x in (s, s.T)]
    close(cld.cld(f, 13, 5, t)[0], sum(F.cross_entropy(x, own) for x in wide) / 2)


def test_groups_of_parts_of_the_batch():
    f = features(12)
    parts = [cld.cld(f[:, i:i + 4], 3) for i in (0, 4, 8)]
    loss, accuracy = cld.cld(f, 3, group_rows=4)
    close(loss, sum(l for l, _ in parts) / 3)
    close(accuracy, sum(a for _, a in parts) / 3)
    close(cld.cld(f, 3, group_rows=12)[0], cld.cld(f, 3)[0])
    assert (loss - cld.cld(f, 3)[0]).abs() > 1e-2


def test_half_precision_is_upcast():
    f, V = features(20).bfloat16(), normal(50, 8, seed=3).float()
    calls = [lambda f: cld.cld(f, 4)[0], lambda f: cld.npid(f[0], V, torch.arange(20), 0.1),
             lambda f: cld.moco(f[0], f[1].float(), V, 0.1), lambda f: cld.byol(f, f.flip(1)),
             lambda f: cld.exp_similarity(f[0], V, torch.arange(40).view(20, 2), 0.1)]
    for call in calls:
        assert call(f).dtype == torch.float32 and torch.equal(call(f), call(f.float()))


def test_cross_level_gradient():
    f = features(8, D=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda f: cld.cld(f, 3, 4)[0], f, fast_mode=True)


def test_npid_by_blocks_keeps_no_logits():
    """One block and many give the same loss and gradient; only the first keeps (b, n) numbers."""
    f, V = features(6, views=1)[0], normal(500, 8, seed=3)
    index, found = torch.arange(0, 12, 2), []
    for block in (2 ** 20, 6 * 125):
        x, saved = f.clone().requires_grad_(), {}

        def keep(t, saved=saved):
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // 8
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            l = cld.npid(x, V, index, 0.1, block)
        saved.pop(V.untyped_storage().data_ptr(), None)
        l.backward()
        found.append((l.detach(), x.grad, sum(saved.values())))
    (one, one_grad, logits), (many_blocks, grad, few) = found
    close(one, -(f @ V.T / 0.1).log_softmax(1)[torch.arange(6), index].mean())
    close(one, many_blocks)
    close(one_grad, grad)
    assert logits >= 6 * 500 and few < 500


def test_byol_loss():
    p, z = features(5), features(5, seed=7)
    expected = sum(((p[v] - z[1 - v]) ** 2).sum(1).mean() for v in (0, 1)) / 2
    close(cld.byol(p, z), expected)  # |p - z|^2 = 2 - 2 cos


# ------------------------------------------------------------------ tables


def test_update_of_the_bank():
    """View 2 first, view 1 on top of it; other rows stay."""
    V, f, index = normal(9, 4), features(3, D=4), torch.tensor([3, 7, 0])
    bank = cld.Bank(V.clone())
    bank.update(f, index, 0.3)
    expected = V.clone()
    for i, row in enumerate(index):
        for view in (1, 0):
            expected[row] = F.normalize(0.3 * expected[row] + 0.7 * f[view, i], dim=0)
    close(bank.V, expected)


def test_initial_rows():
    rows = cld.uniform_rows(4000, 128, torch.Generator().manual_seed(0))
    a = 1 / math.sqrt(128 / 3)
    assert 0.999 * a < rows.max() <= a and -a <= rows.min() < -0.999 * a
    assert rows.norm(dim=1).mean() == pytest.approx(1, abs=0.01)
    assert rows.norm(dim=1).std() > 0.01  # norm about 1, not exactly
    queues = {base: cld.make_memory(parse("--base", base, "--queue", "300"), 20, CPU)[1]
              for base in ("moco", "mocov2")}
    norms = {base: queue.keys.norm(dim=1) for base, queue in queues.items()}
    assert norms["moco"].std() > 0.01
    close(norms["mocov2"], torch.ones(300), 1e-6)


def test_sampled_rows():
    args = parse("--nce", "500", "--batch-size", "8")
    idx, other = cld.draw(3, slice(4, 6), 12, args).values()
    assert idx.shape == (2, 500) and sorted(idx[0].unique().tolist()) == list(range(12))
    assert torch.equal(idx, cld.draw(3, slice(0, 8), 12, args)[0][4:6])  # own rows
    assert not torch.equal(idx, other)


# ------------------------------------------------------------------ networks


@pytest.mark.parametrize(("flags", "count"), [
    (["--recipe", "cifar10"], 11_300_160),
    (["--recipe", "cifar10", "--head", "normlinear"], 11_299_904),
    (["--recipe", "imagenet"], 28_228_672),
])
def test_parameter_counts(flags, count):
    with torch.device("meta"):
        net = cld.CLD(parse(*flags))
    assert sum(p.numel() for p in net.parameters()) == count


@pytest.mark.parametrize("base", ["npid", "byol", "infomin"])
@pytest.mark.parametrize("head", ["linear", "normlinear", "mlp", "normmlp"])
def test_heads_are_siblings(base, head):
    """No last layer is shared; of an MLP the hidden layer is. Without CLD: no group head."""
    net = cld.CLD(parse("--base", base, "--head", head, "--dim", "7"))
    names = {n.split(".")[0] for n, _ in net.named_parameters()}
    assert names == {"backbone", "instance", "group"} | ({"hidden"} if "mlp" in head else set()) \
        | ({"predictor"} if base == "byol" else set()) \
        | ({"jigsaw"} if base == "infomin" else set())
    last = {n: p for n, p in net.named_parameters() if n.startswith("group")}
    assert [n.split(".")[1] for n in last] == (
        ["weight"] if "norm" in head else ["weight", "bias"])
    alone = cld.CLD(parse("--base", base, "--head", head, "--dim", "7", "--lambda-cld", "0"))
    f_I, f_G, p, _ = alone(torch.rand(2, 3, 32, 32))
    assert f_G is None and f_I.shape == (1, 2, 7)
    (p if base == "byol" else f_I).sum().backward()  # DDP: no parameter is left out
    assert all(p.grad is not None or n.startswith("jigsaw") for n, p in alone.named_parameters())


def test_views_have_their_own_batch_statistics():
    net = cld.CLD(parse()).train()
    a, b = torch.rand(2, 6, 3, 32, 32).unbind(0)
    out = net(a, b + 3)
    for v, x in ((0, a), (1, b + 3)):
        for alone, f in zip(net(x)[:2], out[:2], strict=True):  # f_I, f_G
            close(alone[0], f[v], 1e-5)
            close(f[v].norm(dim=1), torch.ones(6), 1e-5)
    assert (net(torch.cat([a, b + 3]))[0][0, :6] - out[0][0]).abs().max() > 1e-3


@pytest.mark.parametrize("head", ["linear", "normmlp"])
def test_grouping_and_loss_are_in_float32_under_autocast(head):
    args = parse("--base", "byol", "--head", head, "--amp", "bf16")
    net = cld.CLD(args)
    with common.autocast(args, CPU):
        h = net.backbone(torch.rand(4, 3, 32, 32))
        assert net.group(net.hidden(h)).dtype == torch.bfloat16
        out = net(*torch.rand(2, 4, 3, 32, 32))
    f_I, f_G, p, _ = out
    assert {x.dtype for x in (f_I, f_G, p)} == {torch.float32}
    close(f_G.norm(dim=2), torch.ones(2, 4), 1e-6)
    assert cld.cld(f_G, 3)[0].dtype == torch.float32


def test_cifar_stem_has_the_initial_weights_of_the_authors():
    torch.manual_seed(0)
    nets = {stem: cld.CLD(parse("--arch", "resnet18", "--stem", stem))
            for stem in ("cifar", "imagenet")}
    std = {stem: net.backbone.layer4[1].conv2.weight.std().item() for stem, net in nets.items()}
    fan = 512 * 9  # torch's default: uniform with variance 1 / (3 fan); He: 2 / fan
    assert std["cifar"] == pytest.approx((1 / (3 * fan)) ** 0.5, rel=0.02)
    assert std["imagenet"] == pytest.approx((2 / fan) ** 0.5, rel=0.02)


def test_jigsaw_patches():
    assert cld.jigsaw_sizes(224) == (85, 64)
    g = torch.Generator().manual_seed(0)
    x, at = torch.rand(3, 3, 15, 15, generator=g), torch.randint(3, (3, 9, 2), generator=g)
    found = cld.cut_patches(x, at, 3)
    assert found.shape == (3, 9, 3, 3, 3)
    for i in range(3):
        for j in range(9):
            top, left = 5 * (j // 3) + at[i, j, 0], 5 * (j % 3) + at[i, j, 1]
            assert torch.equal(found[i, j], x[i, :, top:top + 3, left:left + 3])


def test_jigsaw_of_a_batch():
    """Crop and flip only; positions and order are draws for the whole batch."""
    args = parse("--base", "infomin", "--batch-size", "16", "--image-size", "8", "--dataset",
                 "shapes", "--blur", "1", "--solarize", "1", "--erase", "1", "--gray", "1")
    data = common.Data(*blob_tables(args), args, CPU)
    aug = cld.jigsaw_augmentation(args)
    assert (aug["size"], aug["crop"], aug["flip"]) == (9, (0.6, 1.0), 0.5)
    assert all(aug[k] == 0 for k in ("jitter_p", "gray", "blur", "solarize", "erase"))
    batch = next(data.batches(5, 6, common.augmentation(args), 3, [(aug, 1)],
                              lambda step, own: cld.draw(step, own, 16, args)))
    patches, order = cld.jigsaw(batch, args)
    assert patches.shape == (16, 9, 3, 2, 2)
    assert torch.equal(order.sort(1).values, torch.arange(9).expand(16, 9))
    assert len(order.unique(dim=0)) > 12


# ------------------------------------------------------------------ data


def test_shapes_views(rendered):
    with mock.patch.object(common, "shapes", rendered):
        train_set, test = common.SOURCES["shapes-views"](SimpleNamespace(dataset="shapes-views"))
    assert (len(train_set), len(test)) == (4096, 1024)
    objects = train_set.columns["object"]
    assert torch.equal(objects.unique(return_counts=True)[1], torch.full((512,), 8))
    for name in ("label", "colour", "background"):  # what the renders of an object share
        first = train_set.columns[name].view(512, 8)
        assert (first == first[:, :1]).all()
    assert len(test.columns["object"].unique()) == 1024
    images = train_set.images.view(512, 8, -1)
    assert not (images[:, 0] == images[:, 1]).all(1).any()


def test_randaugment_is_a_function_of_the_seed():
    aug = dict(randaugment=[2, 10], mean=(0.5, 0.5, 0.5))
    x = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8))
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    views = [np.asarray(common.randaugment(x, seed, aug)) for seed in (3, 3, 4, 5, 6)]
    assert torch.equal(torch.random.get_rng_state(), before)  # the worker draws nothing else
    assert (views[0] == views[1]).all()
    assert sum((v == views[0]).all() for v in views[2:]) < 2
    same = common.randaugment(x, 3, aug | dict(randaugment=[0, 10]))
    assert (np.asarray(same) == np.asarray(x)).all()


def test_randaugment_in_the_workers(tmp_path):
    """Equal for any number of workers, other for each view and image; the jigsaw has none."""
    g = np.random.default_rng(0)
    write_folder(tmp_path, {"train/a": 6, "train/b": 6, "val/a": 1, "val/b": 1})
    for path in sorted(tmp_path.rglob("*.png")):
        Image.fromarray(g.integers(0, 256, (20, 20, 3), np.uint8)).save(path)
    found = {}
    for name, more in (("0", ["--workers", "0"]), ("2", ["--workers", "2"]),
                       ("none", ["--workers", "0", "--randaugment", "0", "0"])):
        args = parse("--base", "infomin", "--dataset", "folder", "--data-dir", str(tmp_path),
                     "--batch-size", "4", "--image-size", "8", "--randaugment", "2", "10", *more)
        data = common.load(args, CPU)
        batches = data.batches(1, 3, common.augmentation(args), 2,
                               [(cld.jigsaw_augmentation(args), 1)])
        found[name] = [(b.images, b.extra[0].images) for b in batches]
    for (views, jigsaw), (again, _), (plain, same) in zip(*found.values(), strict=True):
        assert torch.equal(views, again) and torch.equal(jigsaw, same)
        changed = (views != plain).flatten(1).any(1)
        assert changed.sum() >= 6 and views.shape == (8, 3, 8, 8)


def test_class_list_on_one_line(tmp_path):
    """The list of ImageNet-100 that CLD and CMC use."""
    write_folder(tmp_path / "x", {f"{split}/{c}": 1 for split in ("train", "val") for c in "abcd"})
    (tmp_path / "list.txt").write_text("d b c\n")
    args = parse("--dataset", "folder", "--data-dir", str(tmp_path / "x"), "--batch-size", "1",
                 "--classes", str(tmp_path / "list.txt"))
    assert common.load(args, CPU).train.classes["label"] == ["b", "c", "d"]


# ------------------------------------------------------------------ whole runs

FLAGS = [*SMALL, "--dataset", "shapes", "--k", "5", "--knn-every", "1", "--lr", "0.06"]
PAIR = [*FLAGS, "--base", "moco", "--queue", "35"]
VARIANTS = {
    "npid": [],
    "pure": ["--lambda-cld", "0", "--channels-last", "--knn-feature", "backbone"],
    "nce": ["--nce", "9", "--schedule", "steps", "--milestones", "1", "--group-rows", "8"],
    "ncuts": ["--grouping", "ncuts", "--k-eigen", "4", "--head", "normlinear", "--optimizer",
              "lars"],
    "moco": ["--base", "moco", "--queue", "35", "--amp", "bf16"],
    "mocov2": ["--base", "mocov2", "--queue", "32", "--head", "normmlp", "--schedule",
               "cosine-epoch", "--k", "17"],
    "infomin": ["--base", "infomin", "--queue", "35", "--head", "normmlp", "--schedule", "infomin",
                "--warmup", "1"],
    "byol": ["--base", "byol", "--key-momentum", "0.9", "--head", "mlp"],
    "micro-batch": ["--base", "infomin", "--queue", "35", "--micro-batch", "6"],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_stop_and_go_on_exactly(goes_on_exactly, tmp_path, name):
    """Bank, Z, queue, pointer and key network are in the checkpoint, and what the flags say."""
    whole = goes_on_exactly(cld.main, [*FLAGS, *VARIANTS[name]])
    state, log = whole["state"], log_of(tmp_path / "whole")
    tables = {"npid", "pure", "nce", "ncuts"} & {name} and {"bank"} or \
        ({"key"} if name == "byol" else {"key", "queue"})
    assert state.keys() == {"model", "optimizer", "scaler", "log"} | tables
    if "bank" in tables:
        assert state["bank"]["V"].shape == (64, 128)
        close(state["bank"]["V"].norm(dim=1), torch.ones(64), 1e-5)
        assert (state["bank"]["Z"] > 0) == (name == "nce")
    if "queue" in tables:
        K = len(state["queue"]["keys"])
        assert state["queue"]["ptr"] == 8 * 16 % K and (state["queue"]["labels"] == 0).all()
    if "key" in tables:
        weights = [k for k, v in state["key"].items() if "running" not in k and "num" not in k]
        assert state["key"].keys() == state["model"].keys()
        assert all(not torch.equal(state["key"][k], state["model"][k]) for k in weights
                   if k.endswith("backbone.conv1.weight"))
    lines = [line for line in log if "loss" in line]
    assert all({"instance", "cld", "group_acc"} <= line.keys() for line in lines) == (
        name != "pure")
    for line in lines:
        if name != "pure":
            assert line["loss"] == pytest.approx(line["instance"] + line["cld"], rel=1e-5)
            assert 0 <= line["group_acc"] <= 100 and line["cld"] > 0
    warm = [0.0006 * (99 * i / 4 + 1) for i in range(4)]
    expected = {
        "nce": warm + [0.006] * 4, "mocov2": [0.06] * 4 + [0.03] * 4,
        "infomin": [0.01 + i * (0.03003 - 0.01) / 4 for i in range(4)] + [6e-5] * 4,
    }.get(name, warm + [
        1e-6 + (0.06 - 1e-6) * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)])
    assert [line["lr"] for line in lines] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["npid", "nce", "moco", "infomin", "byol"])
def test_the_first_step_by_hand(run_main, tmp_path, name):
    """What train() puts together: views, targets, losses, and what changes after the step."""
    argv = [*FLAGS, *VARIANTS[name], "--limit-train", "16", "--epochs", "1", "--amp", "none",
            "--lambda-cld", "0.7", "--warmup", "0", "--lr", "0.5", "--group-rows", "0",
            *(["--tau", "0.3"] if name != "byol" else []),
            *(["--key-momentum", "0.9"] if name not in ("npid", "nce") else []),
            *(["--beta", "0.2"] if name == "infomin" else [])]
    state = run_main(cld.main, "run", argv)["state"]
    args = parse(*argv)
    torch.manual_seed(0)
    net = cld.CLD(args).train()
    first = {k: v.clone() for k, v in net.state_dict().items()}
    data, aug = common.load(args, CPU), common.augmentation(args)
    extra = [(cld.jigsaw_augmentation(args), 1)] if name == "infomin" else []
    batch = next(data.batches(0, 1, aug, 2 if name in ("npid", "nce", "byol") else 3, extra,
                              lambda step, own: cld.draw(step, own, 16, args)))
    x, rows, t = common.augment(batch), batch.rows, args.tau
    bank, queue = cld.make_memory(args, 16, CPU)
    key = cld.copy.deepcopy(net)
    f, (g1, g2), p, q_jig = net(x[0], x[1], *(cld.jigsaw(batch, args) if extra else ()))
    if name == "npid":
        instance = sum(F.cross_entropy(v @ bank.V.T / t, rows) for v in f) / 2
    elif name == "nce":
        P = [(v[:, None] * bank.V[torch.cat([rows[:, None], drawn], 1)]).sum(2).div(t).exp()
             for v, drawn in zip(f, batch.drawn.values())]
        Z, noise = 16 * P[0].mean().detach(), 9 / 16
        close(state["bank"]["Z"], Z, 1e-5)
        instance = -sum(((p[:, 0] / (p[:, 0] + noise * Z)).log() +
                         (noise * Z / (p[:, 1:] + noise * Z)).log().sum(1)).mean() for p in P) / 2
    elif name == "byol":
        z = [F.normalize(key.instance(key.backbone(v)), dim=1).detach() for v in x]
        instance = ((p[0] - z[1]) ** 2 + (p[1] - z[0]) ** 2).sum(1).mean() / 2
    else:
        keys = key(x[2])[0][0].detach()  # the third view
        queries = [f[0], f[1]] if name == "moco" else [f[0], f[1], q_jig]
        losses = [F.cross_entropy(torch.cat([(q * keys).sum(1)[:, None], q @ queue.keys.T], 1) / t,
                                  torch.zeros(16, dtype=torch.int64)) for q in queries]
        instance = (losses[0] + losses[1]) / 2
        if name == "infomin":
            instance = 0.8 * instance + 0.2 * losses[2]
        expected = torch.cat([keys, queue.keys[16:]])  # at the front, and the pointer behind them
        close(state["queue"]["keys"], expected, 1e-5)
        assert state["queue"]["ptr"] == 16
    (ids1, M1), (ids2, M2) = cld.group(g1, 5, 5), cld.group(g2, 5, 5)
    group = (F.cross_entropy(g1 @ M2.T / 0.2, ids2) + F.cross_entropy(g2 @ M1.T / 0.2, ids1)) / 2
    accuracy = 100 * ((g1 @ M2.T).argmax(1) == ids2).double().mean()
    line = next(line for line in log_of(tmp_path / "run") if "loss" in line)
    found = [line[k] for k in ("instance", "cld", "loss", "group_acc")]
    assert found == pytest.approx([instance.item(), group.item(),
                                   (instance + 0.7 * group).item(), accuracy.item()], rel=1e-4)
    optimizer = common.optimizer(args, net)
    common.set_lr(optimizer, line["lr"])
    (instance + 0.7 * group).backward()  # through the centroids
    optimizer.step()
    for n, p in net.named_parameters():
        close(state["model"][n], p.detach(), 2e-5)
        assert not torch.equal(state["model"][n], first[n]) or n.startswith("jigsaw")
    if bank is not None:
        for view in f.detach().flip(0):
            bank.V[rows] = F.normalize(0.5 * bank.V[rows] + 0.5 * view, dim=1)
        close(state["bank"]["V"], bank.V, 1e-5)
    else:
        for n, _ in net.named_parameters():  # theta_q after the step of SGD
            close(state["key"][n], 0.9 * first[n] + 0.1 * state["model"][n], 1e-5)


def test_what_a_resumed_run_needs_is_in_the_checkpoint(run_main, tmp_path):
    """Negative control: with another bank, Z, queue, pointer or key it ends elsewhere."""
    for argv, parts in (([*FLAGS, "--nce", "9"], [("bank", "V"), ("bank", "Z")]),
                        (PAIR, [("queue", "keys"), ("queue", "ptr"),
                                ("key", "instance.weight")])):
        run = functools.partial(run_main, cld.main)
        name = argv[-2].strip("-")
        whole = run(name, argv)
        run(f"{name}-half", argv, stop=4)
        for part, buffer in [("", ""), *parts]:
            folder = tmp_path / f"{name}-{part}-{buffer}"
            shutil.copytree(tmp_path / f"{name}-half", folder)
            changed = checkpoint(folder)
            if part:
                value = changed["state"][part][buffer]
                value.copy_(value + 1 if value.ndim == 0 else value.roll(1, 0))
            torch.save(changed, folder / "checkpoint.pt")
            found = differences(whole, run(folder.name, argv))
            assert (found == []) == (part == "")
            assert part == "" or "/model/instance.weight" in found or buffer == "ptr"


def test_two_processes_of_torchrun(tmp_path):
    folder = tmp_path / "run"
    try:
        run = end(start([*PAIR, "--out", folder],
                        torchrun("cld.py", "--standalone", "--nproc_per_node=2")))
    finally:
        stop_started()
    assert run.status == 0, run.err
    log = log_of(folder)
    knn = [line["knn_top1"] for line in log if "knn_top1" in line]
    assert len(knn) == 3 and [line["step"] for line in log if "loss" in line] == [*range(1, 9)]
    lines = run.out[run.out.index("moco + CLD, k = 5, shapes\n"):].splitlines()
    assert lines[1:] == [
        f"  kNN top-1    untrained {knn[0]:.2f} %   trained {knn[-1]:.2f} %   "
        "(column label, K = 64, T = 0.1)",
        f"  checkpoint   {folder}/checkpoint.pt", f"  log          {folder}/log.jsonl",
        f"  pictures     {folder}/curves.png, {folder}/views.png",
        f"  next         python linear_eval.py --checkpoint {folder}/checkpoint.pt"]
    assert checkpoint(folder)["state"]["queue"]["ptr"] == 8 * 16 % 35


def test_the_evaluation_takes_the_query_network(run_main, tmp_path):
    """linear_eval.py finds the backbone of the query, not of the key; recipe infomin of CLD."""
    made = run_main(cld.main, "run", [*PAIR, "--key-momentum", "0.5"])
    path = tmp_path / "run/checkpoint.pt"
    backbone, about = common.load_backbone(path, common.load_checkpoint(str(path)))
    assert about["prefix"] == "backbone."
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, made["state"]["model"][f"backbone.{name}"])
    recipe = SimpleNamespace(**linear_eval.RECIPES["infomin"])
    assert (recipe.lr, recipe.batch_size, recipe.epochs, recipe.weight_decay) == (30, 256, 61, 0)
    rates = [linear_eval.learning_rate(7 * e, 7, recipe.lr, recipe)  # of an epoch's first step
             for e in range(61)]
    assert rates == pytest.approx([30] * 30 + [6] * 10 + [1.2] * 10 + [0.24] * 11)


def test_knn_takes_the_feature_that_is_asked_for(run_main, monkeypatch):
    seen = []
    monkeypatch.setattr(common, "knn_accuracy", lambda module, data, select=None: seen.append(
        (type(module).__name__, select)) or 1.0)
    run_main(cld.main, "instance", FLAGS)
    run_main(cld.main, "backbone", [*FLAGS, "--knn-feature", "backbone"])
    assert [name for name, _ in seen] == ["CLD"] * 3 + ["TinyResNet"] * 3
    assert torch.equal(seen[0][1]((torch.arange(3), None, None, None)), torch.tensor(0))


@pytest.mark.parametrize("recipe", cld.RECIPES)
def test_recipes_are_flags(recipe):
    args = parse("--recipe", recipe)
    cld.check(args)
    # the kNN of these two has the other methods' T
    assert args.tau == args.knn_t or recipe in ("c100-small", "c10")
    assert args.base == dict(
        imagenet="mocov2", imagenet100="mocov2").get(recipe, recipe.split("-")[-1]
                                                     if recipe.endswith(("moco", "infomin"))
                                                     else "npid")


# ------------------------------------------------------------------ bad input


@pytest.fixture
def refused(refused_by):
    """refused(flags, *words, status=2): see runs.refused_by."""
    return functools.partial(refused_by, cld.main, says=["warning: --k"])


@pytest.mark.parametrize(("argv", "words"), [
    (["--k", "1"], ["--k 1 makes one group only", "--lambda-cld 0"]),
    (["--k", "0"], ["--k 0"]),
    (["--iters", "0"], ["--iters must be above 0"]),
    (["--tau", "0"], ["--tau must be above 0"]),
    (["--tau-cld", "-1"], ["--tau-cld must be above 0"]),
    (["--dim", "0"], ["--dim must be above 0"]),
    (["--lambda-cld", "-1"], ["--lambda-cld must be at least 0, got -1.0"]),
    (["--lambda-cld", "nan"], ["--lambda-cld must be at least 0, got nan"]),
    (["--nce", "-1"], ["--nce must be at least 0, got -1"]),
    (["--nce", "5", "--base", "moco"], ["--nce is not used without --base npid"]),
    (["--beta", "0.5"], ["--beta is not used without --base infomin"]),
    (["--queue", "64"], ["--queue is not used by --base npid"]),
    (["--k-eigen", "5"], ["--k-eigen is not used without --grouping ncuts"]),
    (["--warmup", "-1"], ["--warmup must be at least 0, got -1"]),
    (["--bank-momentum", "1.5"], ["--bank-momentum must be in [0, 1], got 1.5"]),
    (["--key-momentum", "-0.1"], ["--key-momentum must be in [0, 1], got -0.1"]),
    (["--beta", "2"], ["--beta must be in [0, 1], got 2.0"]),
    (["--base", "moco", "--queue", "15"], ["--queue 15 is smaller than --batch-size 16"]),
    (["--base", "infomin", "--queue", "0"], ["--queue must be above 0"]),
    (["--grouping", "ncuts", "--k-eigen", "17"], ["--k-eigen 17: of 16 rows that are grouped"]),
    (["--grouping", "ncuts", "--k-eigen", "1"], ["--k-eigen 1: ", "the first is constant"]),
    (["--k-eigen", "0"], ["--k-eigen must be above 0"]),
    (["--group-rows", "5"], ["--group-rows 5 does not divide --batch-size 16"]),
    (["--group-rows", "-4"], ["--group-rows must be at least 0, got -4"]),
    (["--grouping", "ncuts", "--group-rows", "8"], ["--k-eigen 10: of 8 rows that are grouped"]),
    (["--base", "simclr"], ["--base", "'simclr'", "npid", "byol"]),
    (["--head", "mlp3"], ["--head", "'mlp3'", "normmlp"]),
    (["--grouping", "cuts"], ["--grouping", "'cuts'"]),
    (["--randaugment", "2", "10"], ["--randaugment needs image files", "--dataset folder or csv"]),
    (["--randaugment", "2", "11"], ["--randaugment [2, 11]", "M in 0 to 10"]),
])
def test_flags(refused, argv, words):
    refused([*FLAGS, *argv], *words)


@pytest.mark.parametrize(("argv", "words"), [
    (["--k", "17"], "--k 17 for 16 rows"), (["--k", "5", "--group-rows", "4"], "--k 5 for 4 rows"),
    (["--k", "16"], None)])
def test_more_groups_than_rows_is_a_warning(run_main, capsys, argv, words):
    run_main(cld.main, "run", [*FLAGS, *argv, "--epochs", "1"])
    out = capsys.readouterr().out
    assert out.count("warning: --k") == (words is not None)
    assert words is None or f"warning: {words} that are grouped together" in out


@pytest.mark.parametrize("argv", [FLAGS, [*FLAGS, "--grouping", "ncuts"], PAIR])
def test_loss_that_is_not_finite(refused, run_main, tmp_path, monkeypatch, argv):
    """NaN features of step 5 reach neither bank nor queue; the same command goes on."""
    real, calls, run = cld.CLD.forward, [], tmp_path / "run"
    whole = run_main(cld.main, "whole", argv)

    def forward(self, *views, **more):
        out = real(self, *views, **more)
        calls.append(len(views))
        if len(views) == 2 and calls.count(2) == 6:
            return [x if x is None or i != 1 else x * math.nan for i, x in enumerate(out)]
        return out

    monkeypatch.setattr(cld.CLD, "forward", forward)
    refused(argv, "the loss is nan at step 5;", status=1)
    assert checkpoint(run)["step"] == 4
    monkeypatch.undo()
    assert differences(whole, run_main(cld.main, "run", argv)) == []

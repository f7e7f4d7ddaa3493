"""rince.py: its functions, processes and micro-batches (which change nothing), runs, bad input."""
import contextlib
import copy
import functools
import io
import itertools
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
from ranks import blob_tables, close, many, normal, own_rows
from runs import BASE, SMALL, differences, end, log_of, start, stop_started, torchrun
from torch import nn

import common
import ood_eval
import rince

B = 16  # rows of the global batch
CPU = torch.device("cpu")


# ------------------------------------------------------------------ the loss


def inputs(n=6, M=11, D=5, r=3, seed=0):
    """Unit-norm a, p, keys, and ranks R from -1 to r with the second view in column 0."""
    a, p, keys = (F.normalize(normal(k, D, seed=seed + i), dim=1) for i, k in enumerate((n, n, M)))
    R = torch.randint(-1, r + 1, (n, M), generator=torch.Generator().manual_seed(seed))
    R[0, R[0] == 2] = 0  # an anchor without a positive in rank 2
    R[1] = R[1].clamp(max=0)  # one without any
    return a, p, keys, F.pad(R, (1, 0), value=1)


def naive(a, p, keys, R, taus, form, cumulative, min_prob):
    """E1 to E6 term by term, with Python's numbers."""
    sums, counts = [0.0] * len(taus), [0] * len(taus)
    everything = [torch.cat([p[n:n + 1], keys]) for n in range(len(a))]
    for n, (i, tau) in itertools.product(range(len(a)), enumerate(taus, 1)):
        e = [math.exp(float(a[n] @ k) / tau) for k in everything[n]]
        better = range(1, i + 1) if cumulative else (i,)
        P = [j for j in range(len(e)) if int(R[n, j]) in better and (j > 0 or i == 1)]
        N = sum(e[j] for j in range(len(e)) if R[n, j] == 0 or R[n, j] > i)
        if form == "in" or form == "out-in" and i > 1:
            top = sum(e[j] for j in P)
            pis = [top / (top + N)] if P else []
        else:
            pis = [e[j] / (e[j] + N) for j in P]
        kept = [pi for pi in pis if pi > min_prob]
        sums[i - 1] -= sum(map(math.log, kept))
        counts[i - 1] += len(kept)
    return sum(s / max(n, 1) for s, n in zip(sums, counts)) / len(taus)


@pytest.mark.parametrize("cumulative", [False, True])
@pytest.mark.parametrize("form", ["out", "in", "out-in"])
def test_loss_term_by_term(form, cumulative):
    a, p, keys, R = inputs()
    for taus, min_prob in (([0.1, 0.225, 0.35], 1e-7), ([0.1, 0.2, 0.3], 1e-2), ([0.5, 0.5], 0)):
        loss = rince.rince(a, p, keys, R, taus, form, cumulative, min_prob)
        expected = naive(a, p, keys, R, taus, form, cumulative, min_prob)
        assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_loss_by_hand():
    """Two keys, a = p: rank 1 against e^0 + e^1, then rank 2 against one negative."""
    a = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    keys = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    terms, R = [math.log(2 * math.e + 1) - 1, math.log(math.exp(2) + 1) - 2], [[1, 0, 2]]
    for taus in ([1.0], [1.0, 0.5], [1.0, 0.5, 0.5]):  # rank 3 has no entry: 0 of three terms
        loss = rince.rince(a, a, keys, torch.tensor(R), taus, "out")
        assert loss.item() == pytest.approx(sum(terms[:len(taus)]) / len(taus), rel=1e-14)


@pytest.mark.parametrize("form", ["out", "in", "out-in"])
def test_gradients(form):
    """Right (finite differences), finite where nothing is left, and exactly 0 there."""
    a, p, keys, R = inputs()
    R[2, 1:] = 1  # no negatives at all
    R[3] = -1  # in no term

    def loss(a):
        return rince.rince(a, p, keys, R, [0.3, 0.4, 0.5], form)

    x = a.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, x)
    loss(x).backward()
    assert x.grad[[2, 3]].abs().max() == 0 and x.grad[[0, 1, 4, 5]].abs().min() > 1e-12
    x = a.float().requires_grad_()  # float32, and temperatures at which exp overflows
    hard = rince.rince(x, p.float(), keys.float(), R, [0.001, 0.001, 0.001], form, min_prob=0)
    hard.backward()
    assert hard.isfinite() and x.grad.isfinite().all() and x.grad[0].abs().max() > 1


@pytest.mark.parametrize("form", ["out", "in", "out-in"])
def test_a_nan_is_no_small_probability(form):
    """An entry that is not a number makes the loss NaN, which stops a training."""
    for i in range(3):
        x = [t.clone() for t in inputs()]
        x[i][0, 0] = math.nan
        assert rince.rince(*x, [0.3, 0.4, 0.5], form).isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_upcast(dtype):
    a, p, keys, R = inputs()
    half = [x.to(dtype) for x in (a, p, keys)]
    loss = rince.rince(*half, R, [0.1, 0.2, 0.3])
    assert loss.dtype == torch.float32
    assert loss == rince.rince(*(x.float() for x in half), R, [0.1, 0.2, 0.3])
    # what was rounded is a hundred times coarser than what is left of the upcast
    assert loss.item() != pytest.approx(rince.rince(a, p, keys, R, [0.1, 0.2, 0.3]).item(), 1e-6)


def test_temperatures():
    assert rince.temperatures(4, 0.1, 0.6) == pytest.approx([0.1, 0.225, 0.35, 0.475])
    assert rince.temperatures(7, 0.1, 0.6)[4:] == pytest.approx([0.6] * 3)  # similarity 0
    assert rince.temperatures(3, 0.2, 0.2) == [0.2] * 3


# ------------------------------------------------------------------ ranks


TABLE = torch.tensor([[1, 2, 0], [2, 1, 0], [0, 3, 1]])  # not symmetric


def test_rank_of():
    y, y_keys = torch.tensor([0, 2, 1]), torch.tensor([1, -1, 2, 0])
    table = TABLE.clone()
    assert rince.rank_of(y, table, y_keys).tolist() == [
        [1, 2, 0, 0, 1], [1, 3, 0, 1, 0], [1, 1, 0, 0, 2]]
    # the keys of the batch: an image is not its own candidate, another of its class is
    y = torch.tensor([0, 2, 1, 2])
    assert rince.rank_of(y, table).tolist() == [
        [1, -1, 0, 2, 0], [1, 0, -1, 3, 1], [1, 2, 0, -1, 0], [1, 0, 1, 3, -1]]
    assert torch.equal(table, TABLE)


def test_one_positive_a_rank():
    R = torch.tensor([[1, 1, 2, 0, -1, 2, 1, 2, 3]]).repeat(3000, 1)
    u = torch.rand(3000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u[0], u[1] = 0, 1 - 2 ** -53
    one = rince.one_per_rank(R, u)
    assert one[:2].tolist() == [[1, -1, 2, 0, -1, -1, -1, -1, 3], [-1, -1, -1, 0, -1, -1, 1, 2, 3]]
    for i in (1, 2, 3):  # exactly one in every row; rank 4 does not exist
        assert ((one == i).sum(1) == 1).all()
    chosen = (one > 0).double().mean(0)
    assert chosen.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0, 0, 1 / 3, 1 / 3, 1 / 3, 1],
                                            abs=0.03)
    assert torch.equal(one == 0, R == 0) and R.max() == 3


def test_chain_of_columns():
    columns = torch.tensor([[2, 5, 0], [0, 9, 0], [1, 9, 0], [3, 4, 7], [1, 9, 0], [0, 9, 0]])
    assert rince.chain_ranks(columns).tolist() == [
        [1, 2, 3, 0], [2, 1, 3, 0], [3, 3, 1, 0], [0, 0, 0, 1]]
    assert rince.chain_ranks(columns[:, :1]).tolist() == torch.eye(4).tolist()
    columns[-1, 1] = 5
    with pytest.raises(ValueError, match="value 0 of column 1"):
        rince.chain_ranks(columns)
    with pytest.raises(ValueError, match="value 9 of column 2"):
        rince.chain_ranks(torch.tensor([[0, 9, 0], [1, 9, 1]]))


def test_similarity_thresholds():
    C = torch.tensor([[1.0, 0.5, 0.2], [0.4, 1.0, 0.19], [0.7, -1.0, 0.1]])
    assert rince.similarity_ranks(C, [0.5, 0.2]).tolist() == [[1, 2, 3], [3, 1, 0], [2, 0, 1]]
    assert rince.similarity_ranks(C, [0.6]).tolist() == [[1, 0, 0], [0, 1, 0], [2, 0, 1]]


def test_similarity_files(tmp_path):
    names = ["cat", "dog", "car"]
    text = tmp_path / "a.csv"
    text.write_text("class_a,class_b,similarity\ncat,dog,0.6\ndog,cat,0.3\ncar,dog,0.45\n"
                    "cat,cat,1\n")
    # cat-dog one way each, car-dog both ways, cat-car not named
    assert rince.read_similarity(text, names, [0.5, 0.4]).tolist() == [
        [1, 2, 0], [0, 1, 3], [0, 3, 1]]
    text.write_text("class_a,class_b,rank\ncat,dog,2\ncar,dog,3\ncar,cat,0\n")
    assert rince.read_similarity(text, names, None).tolist() == [[1, 2, 0], [2, 1, 3], [0, 3, 1]]
    for kind, matrix, expected in (
            ("similarity", [[1, .1, .6], [.2, 1, .3], [.9, .5, 1]], [[1, 0, 2], [2, 1, 2],
                                                                     [0, 0, 1]]),
            ("rank", [[1, 2, 3], [0, 1, 0], [2, 2, 1]], [[1, 0, 0], [3, 1, 2], [2, 2, 1]])):
        np.savez(tmp_path / "a.npz", classes=["car", "cat", "dog"], **{kind: np.array(matrix)})
        found = rince.read_similarity(tmp_path / "a.npz", names, [0.5])
        # rows and columns by name: cat, dog, car
        place = [1, 2, 0]
        if kind == "similarity":
            expected = rince.similarity_ranks(torch.tensor(matrix)[place][:, place], [0.5])
        else:
            expected = torch.tensor(matrix)[place][:, place]
        assert torch.equal(found, expected)


# ------------------------------------------------------------------ the number of processes


def flags(*more):
    """The parsed flags of rince.py, which is not run."""
    parsed = []
    with mock.patch.object(common, "run", lambda train, parser, argv:
                           parsed.append(parser.parse_args(argv))):
        rince.main(["--device", "cpu", "--threads", "1", "--workers", "0", "--batch-size", str(B),
                    "--image-size", "8", "--out", "unused", *more])
    return parsed[0]


class Net(nn.Module):
    """Stands in for rince.RINCE: the same interface, float64."""

    norm = nn.Identity

    def __init__(self, args, classes):
        super().__init__()
        self.unit = args.loss != "ce"
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * args.image_size ** 2, 16),
                                      self.norm(16), nn.Tanh())
        self.head = nn.Linear(16, args.dim if self.unit else classes)
        self.double()
        self.backbone.register_forward_pre_hook(lambda _, x: (x[0].double(),))

    def forward(self, x):
        z = self.head(self.backbone(x))
        return F.normalize(z, dim=1) if self.unit else z


class NormNet(Net):
    norm = nn.BatchNorm1d


TRAININGS = {
    "out-in": ["--queue", "24"],  # wraps
    "out": ["--loss", "rince-out", "--queue", "40"],
    "in": ["--loss", "rince-in", "--rank2-positives", "cumulative"],
    "uni": ["--loss", "rince-uni", "--queue", "40"],
    "in-batch": ["--loss", "rince-out", "--queue", "0"],
    "uni-in-batch": ["--loss", "rince-uni", "--queue", "0", "--key-momentum", "0.5"],
    "superclass": ["--loss", "scl-superclass", "--queue", "24"],
    "ce": ["--loss", "ce"],
}


def train(folder, more, net=Net, patch=None):
    """A whole short run of rince.train: weights, key encoder and queue of this process at its end.

    patch: a further mock.patch that holds during the run.
    """
    made = {}

    def keep(name, kind):
        def make(*values):
            made[name] = kind(*values)
            return made[name]
        return make

    def twin(model):
        made["key"] = copy.deepcopy(model)
        return made["key"]

    args = flags("--out", folder, "--epochs", "2", "--dim", "6", "--knn-every", "9", "--lr", "0.1",
                 "--queue", "32", "--log-every", "1", *more)
    queue = common.Queue
    with patch or contextlib.nullcontext(), \
            mock.patch.object(rince, "RINCE", keep("model", net)), \
            mock.patch.object(rince, "copy", SimpleNamespace(deepcopy=twin)), \
            mock.patch.object(common, "Queue", keep("queue", lambda Q: queue(Q.double()))), \
            mock.patch.dict(common.SOURCES, shapes=blob_tables), \
            mock.patch.object(common, "knn_accuracy", lambda *_: None), \
            mock.patch.object(common, "curves", lambda *_: None), \
            mock.patch.object(common, "views_picture", lambda *_: None), \
            contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        rince.train(args)
    losses = [line["loss"] for line in log_of_path(folder)] if common.rank() == 0 else None
    return dict({name: made[name].state_dict() for name in made}, losses=losses)


def log_of_path(folder):
    with open(f"{folder}/log.jsonl") as file:
        return [line for line in map(json.loads, file.readlines()[1:]) if "loss" in line]


def case_train(folder):
    return {name: train(f"{folder}/{name}-{common.world()}", more)
            for name, more in TRAININGS.items()}


def case_local_mean(folder):
    """The authors' multi-GPU rule, a mean over each process's own pairs: another training."""
    whole = rince.rince

    def local(a, p, keys, R, *options):
        own = own_rows(len(a))
        return whole(a[own], p[own], keys, R[own], *options)

    return train(f"{folder}/local-{common.world()}", TRAININGS["out"],
                 patch=mock.patch.object(rince, "rince", local))


MICRO = {"queue": ["--queue", "24"], "in-batch": TRAININGS["in-batch"],
         "uni": TRAININGS["uni-in-batch"], "ce": TRAININGS["ce"]}


def case_micro(folder):
    """Trainings with --micro-batch m: (variant, BatchNorm or not, m) -> their ends; 0 = without."""
    sizes = {1: dict(norm=(8, 4), plain=(0, 4, 5)), 2: dict(norm=(0, 4), plain=(3,)),
             4: dict(norm=(0,), plain=(3,))}[common.world()]
    ends = {}
    for (name, more), kind in itertools.product(MICRO.items(), sizes):
        for m in sizes[kind]:
            ends[name, kind, m] = train(
                f"{folder}/micro-{common.world()}-{name}-{kind}-{m}",
                [*more, *(["--micro-batch", str(m)] if m else [])],
                NormNet if kind == "norm" else Net)
    return ends


def case_cut(folder):
    """Micro-batches of which only the first has a gradient: another training."""
    whole = torch.utils.checkpoint.checkpoint
    calls = itertools.count()

    def first_only(*args, **options):
        out = whole(*args, **options)
        return out.detach() if next(calls) % (B // common.world() // 4 or 1) else out

    return train(f"{folder}/cut-{common.world()}", [*MICRO["queue"], "--micro-batch", "4"],
                 patch=mock.patch.object(torch.utils.checkpoint, "checkpoint", first_only))


def case_step(folder):
    """Gradient of one step in which one process has many more pairs than the others."""
    torch.manual_seed(0)
    model = Net(flags("--image-size", "2", "--dim", "6"), 0)
    network = common.distribute(model, flags())
    y = torch.tensor([0] * 5 + [1, 2, 3] * 3 + [2, 1])
    own = own_rows(B)
    keys, y_keys = F.normalize(normal(30, 6, seed=3), dim=1), torch.tensor([0, 0, 0, 1, -1, 2] * 5)
    p = F.normalize(normal(B, 6, seed=4), dim=1)
    table = torch.tensor([[1, 2, 0, 0], [2, 1, 0, 0], [0, 0, 1, 2], [0, 0, 2, 1]])
    steps = {}
    for form in ("out", "in", "out-in"):
        network.zero_grad()
        a = network(normal(B, 3, 2, 2, seed=2)[own])
        R = rince.rank_of(y, table, y_keys)
        loss = rince.rince(common.gather(a), p, keys, R, [0.1, 0.3], form)
        loss.backward()
        steps[form] = dict(loss=common.check_loss(loss, 0)["loss"], pairs=(R[own] == 1).sum(),
                           grad={n: g.grad.clone() for n, g in model.named_parameters()})
    return steps


CASES = dict(train=case_train, local=case_local_mean, step=case_step, micro=case_micro,
             cut=case_cut)
results = ranks.pool(__name__)


@many
def test_a_step_is_that_of_one_process(results, N):
    for form, one in results[1][0]["step"].items():
        pairs = [r["step"][form]["pairs"] for r in results[N]]
        assert pairs[0] > 1.5 * pairs[-1]  # a mean of the processes' means would be another
        for r in results[N]:
            step = r["step"][form]
            assert step["loss"] == pytest.approx(one["loss"], abs=1e-12)
            for name, grad in one["grad"].items():
                close(step["grad"][name], grad)
    assert one["grad"]["head.weight"].abs().max() > 1e-3


@many
@pytest.mark.parametrize("name", TRAININGS)
def test_training_is_that_of_one_process(results, N, name):
    one = results[1][0]["train"][name]
    assert len(one["losses"]) == 8 and len(set(one["losses"])) == 8
    for r in results[N]:
        trained = r["train"][name]
        parts = ("model",) if name == "ce" else ("model", "key", "queue")
        for part in parts:
            assert trained[part].keys() == one[part].keys()
            for key, value in one[part].items():
                close(trained[part][key], value)
    assert results[N][0]["train"][name]["losses"] == pytest.approx(one["losses"], abs=1e-10)
    for part in parts[1:]:  # tables and key encoder are replicas, to the last bit
        for key, value in results[N][0]["train"][name][part].items():
            assert all(torch.equal(r["train"][name][part][key], value) for r in results[N])


def test_trainings_move_what_they_should(results):
    """Each of the above is another training, and the key encoder follows the query's."""
    one = results[1][0]["train"]
    for a, b in itertools.combinations(one, 2):
        assert one[a]["losses"] != one[b]["losses"]
    for name, trained in one.items():
        if name == "ce":
            continue
        assert (trained["key"]["head.weight"] - trained["model"]["head.weight"]).abs().max() > 1e-4
        keys, labels = trained["queue"]["keys"], trained["queue"]["labels"]
        assert len(labels) == flags("--queue", "32", *TRAININGS[name]).queue
        close(keys.norm(dim=1), torch.ones_like(keys[:, 0]))  # no initial vector is left
        assert (labels >= 0).all()


@many
def test_local_means_are_another_mean(results, N):
    """Negative control: with each process's own number of pairs, weights and losses differ."""
    one, local = results[1][0]["local"], results[N][0]["local"]
    assert one["losses"] == results[1][0]["train"]["out"]["losses"]
    assert abs(one["losses"][3] - local["losses"][3]) > 1e-4
    assert (one["model"]["head.weight"] - local["model"]["head.weight"]).abs().max() > 1e-6


def same_end(ours, theirs):
    """Losses, parameters, running statistics and queue of two trainings are equal."""
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-10)
    for part in ("model", "key", "queue"):
        assert ours[part].keys() == theirs[part].keys()
        for name, value in theirs[part].items():
            close(ours[part][name], value)


@pytest.mark.parametrize("name", MICRO)
def test_micro_batches_are_processes(results, name):
    """BatchNorm: m rows at a time on one process equal B / m processes, the key's shuffle too."""
    ends = {(N, m): results[N][0]["micro"][name, "norm", m]
            for N, m in ((1, 8), (1, 4), (2, 0), (2, 4), (4, 0))}
    for micro, processes in (((1, 8), (2, 0)), ((1, 4), (4, 0)), ((2, 4), (4, 0))):
        same_end(ends[micro], ends[processes])
    # negative control: another part size is another training, and the statistics have moved
    weights = [ends[N, 0]["model"]["head.weight"] for N in (2, 4)]
    assert (weights[0] - weights[1]).abs().max() > 1e-5
    assert ends[1, 4]["model"]["backbone.2.num_batches_tracked"] == 8
    assert ends[1, 4]["model"]["backbone.2.running_mean"].abs().max() > 1e-3


@pytest.mark.parametrize("name", MICRO)
def test_micro_batches_change_nothing_without_batchnorm(results, name):
    """Also where the last part is smaller: 5 of 16, 3 of 8 and 3 of 4 images."""
    whole = results[1][0]["micro"][name, "plain", 0]
    for N, m in ((1, 4), (1, 5), (2, 3), (4, 3)):
        same_end(results[N][0]["micro"][name, "plain", m], whole)


@pytest.mark.parametrize("N", [1, 2])
def test_micro_batches_that_lose_a_gradient_are_noticed(results, N):
    """Negative control of the test above."""
    cut, whole = results[N][0]["cut"], results[1][0]["micro"]["queue", "plain", 0]
    assert (cut["model"]["head.weight"] - whole["model"]["head.weight"]).abs().max() > 1e-5


def plain_training(more, uni=None):
    """The losses of a training as the card tells it: one process, plain sums, nothing of rince.py.

    uni: function (step, anchor, rank, number of positives) -> which of them.
    """
    args = flags("--epochs", "2", "--dim", "6", "--lr", "0.1", "--queue", "32", *more)
    data = common.Data(*blob_tables(args), args, CPU)
    torch.manual_seed(args.seed)
    f_q, f_k = Net(args, 4), Net(args, 4)
    f_k.load_state_dict(f_q.state_dict())
    sgd, steps, losses = common.optimizer(args, f_q), 8, []
    label, coarse = data.train.columns["label"], data.train.columns["coarse"]
    Q = F.normalize(torch.randn(args.queue, 6, generator=common.generator(0, 0, "queue")), dim=1)
    bank = [(k, None) for k in Q.double()]  # the oldest first
    for batch in data.batches(0, steps, common.augmentation(args)):
        x, y = common.augment(batch), batch.rows
        a = f_q(x[0])
        with torch.no_grad():
            for k, q in zip(f_k.parameters(), f_q.parameters()):
                k.copy_(args.key_momentum * k + (1 - args.key_momentum) * q)
            p = f_k(x[1])
        terms = {1: [], 2: []}
        for n in range(B):
            others = bank if args.queue else [(p[j], y[j]) for j in range(B) if j != n]
            rank = [0 if i is None else 1 if label[i] == label[y[n]] else
                    2 if coarse[i] == coarse[y[n]] else 0 for _, i in others]
            groups = [[k for (k, _), r in zip(others, rank) if r == i] for i in range(3)]
            groups[1].insert(0, p[n])
            if uni:
                groups[1:] = [[g[uni(batch.step, n, i, len(g))]] if g else [] for i, g in
                              enumerate(groups[1:])]
            for i, tau in ((1, 0.1), (2, 0.225)):
                e = [torch.exp(a[n] @ k / tau) for k in groups[i]]
                worse = [k for j, g in enumerate(groups) for k in g if j == 0 or j > i]
                N = sum(torch.exp(a[n] @ k / tau) for k in worse)
                e = [sum(e)] if i == 2 and e else e
                terms[i] += [-torch.log(z / (z + N)) for z in e if z / (z + N) > 1e-7]
        loss = sum(torch.stack(t).mean() if t else 0 for t in terms.values()) / 2
        for group in sgd.param_groups:
            group["lr"] = common.warmup_cosine(batch.step, steps, 0.1, 4)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        bank = (bank + list(zip(p, y)))[-len(bank):]
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["out-in", "in-batch", "uni"])
def test_training_is_the_plain_one(tmp_path, name):
    """Order of the step, the queue's labels, which keys are candidates, what is drawn."""
    more = {"out-in": ["--queue", "24"], "in-batch": ["--queue", "0", "--key-momentum", "0.9"],
            "uni": ["--loss", "rince-uni", "--queue", "0"]}[name]

    def uni(step, n, i, many):
        u = torch.rand(B, 2, dtype=torch.float64, generator=common.generator(0, step, "positives"))
        return int(u[n, i] * many)

    expected = plain_training(more, uni if name == "uni" else None)
    assert train(f"{tmp_path}/run", more)["losses"] == pytest.approx(expected, abs=1e-10)


# ------------------------------------------------------------------ whole runs


@pytest.fixture
def run(run_main):
    """run(name, flags, stop=None): rince.main in this process; its checkpoint."""
    return functools.partial(run_main, rince.main)


QUICK = [*SMALL, "--queue", "24", "--knn-k", "5"]
VARIANTS = {
    "rince-out-in": [],
    "rince-uni": ["--queue", "0"],
    "rince-in": ["--schedule", "cosine-epoch", "--rank2-positives", "cumulative"],
    "ce": ["--jitter-p", "0", "--gray", "0"],
}


@pytest.mark.parametrize("loss", VARIANTS)
def test_resume_is_exact(goes_on_exactly, loss, tmp_path):
    whole = goes_on_exactly(rince.main, [*QUICK, "--loss", loss, *VARIANTS[loss]])
    state = whole["state"]
    assert {"model", "ranks", "optimizer", "scaler", "log"} | (
        set() if loss == "ce" else {"key", "queue"}) == state.keys()
    assert state["ranks"]["table"].shape == (24, 24) and len(state["ranks"]["ids"]) == 64
    ranks = rince.Ranks(state["ranks"]["ids"], state["ranks"]["table"].clone().flip(0))
    with pytest.raises(ValueError, match="not those that the run began with"):
        ranks.load_state_dict(state["ranks"])  # of another file of similarities
    rates = [line["lr"] for line in log_of(tmp_path / "whole") if "lr" in line]
    if loss == "rince-in":
        end_of_warmup = (0.5 + 5e-4) / 2  # the cosine of epoch 1 of 2
        assert rates == pytest.approx([0.01 + (end_of_warmup - 0.01) * i / 4 for i in range(4)]
                                      + [5e-4] * 4)
    else:
        assert rates == pytest.approx([0, 0.125, 0.25, 0.375, 0.5, 0.4267767, 0.25, 0.0732233])
    if loss == "ce":
        assert state["model"]["head.weight"].shape == (24, 128)
        return
    assert state["model"]["head.2.weight"].shape == (128, 128)
    assert state["key"].keys() == state["model"].keys()
    queue = state["queue"]
    assert queue["keys"].shape == (0 if loss == "rince-uni" else 24, 128)
    if loss != "rince-uni":  # 8 batches of 16: the pointer stands at 128 % 24
        assert int(queue["ptr"]) == 128 % 24 and (queue["labels"] >= 0).all()
        assert set(queue["labels"].tolist()) <= set(state["ranks"]["ids"].tolist())


@pytest.fixture
def chain(tmp_path):
    """A similarity file of the shapes in which only the patterns are alike."""
    classes = common.shapes(1)[2]["label"]
    alike = [[0.9 if a.split()[0] == b.split()[0] else 0.1 for b in classes] for a in classes]
    np.savez(tmp_path / "similarity.npz", classes=classes, similarity=np.array(alike))
    return str(tmp_path / "similarity.npz")


OTHERS = [["--loss", "rince-out"], ["--loss", "scl-out"], ["--loss", "scl-in"],
          ["--loss", "scl-superclass"], ["--loss", "ce"], ["--loss", "rince-in"],
          ["--loss", "rince-uni"], ["--rank2-positives", "cumulative"], ["--min-prob", "0.01"],
          ["--tau-max", "0.9"], ["--key-momentum", "0.5"], ["--queue", "0"],
          ["--similarity", "FILE", "--ranks", "label"]]


def test_every_loss_and_flag_trains_its_own_way(run, chain, tmp_path, capsys):
    """One epoch of each; no two are the same training, and each kind says what it ranks."""
    short = [*QUICK, "--epochs", "1", "--lr", "0.1"]
    first, said = {}, {}
    for i, more in enumerate([[], *OTHERS]):
        more = [chain if word == "FILE" else word for word in more]
        run(str(i), [*short, *more])
        name = " ".join(OTHERS[i - 1]) if i else "default"
        first[name] = tuple(line["loss"] for line in log_of(tmp_path / str(i)) if "loss" in line)
        if name != "--loss ce":
            said[name] = json.loads((tmp_path / str(i) / "ranks.json").read_text())
    assert len(set(first.values())) == len(first)
    assert said["default"]["related"]["plain circle"] == {
        "2": ["striped circle", "dotted circle", "checkered circle"]}
    assert said["default"]["temperatures"] == pytest.approx([0.1, 0.225])
    assert said["--similarity FILE --ranks label"]["related"]["plain circle"]["2"] == [
        f"plain {s}" for s in common.SEEN if s != "circle"]
    assert said["--loss scl-out"]["related"]["plain circle"] == {}
    assert list(said["--loss scl-superclass"]["related"]) == list(common.SEEN)
    assert not (tmp_path / str(1 + OTHERS.index(["--loss", "ce"])) / "ranks.json").exists()
    out = capsys.readouterr().out
    assert "rank 2: 3.00 classes at tau 0.225" in out
    assert "ranks of plain circle: 2 = striped circle, dotted circle, checkered circle\n" in out


def test_what_a_resumed_run_needs_is_in_the_checkpoint(run, tmp_path):
    """Negative control: with another part of the state it ends elsewhere."""
    argv = [*QUICK, "--loss", "rince-out"]
    whole, half = run("whole", argv), run("half", argv, stop=4)
    assert half["step"] == 5

    def roll(part, name):
        part[name] = part[name].roll(1, 0)

    changes = {
        "untouched": lambda state: None,
        "key": lambda state: state["key"]["backbone.conv1.weight"].mul_(1.1),
        "labels": lambda state: roll(state["queue"], "labels"),
        "keys": lambda state: roll(state["queue"], "keys"),
        "pointer": lambda state: state["queue"]["ptr"].add_(1),
        "ids": lambda state: roll(state["ranks"], "ids"),
    }
    for name, change in changes.items():
        shutil.copytree(tmp_path / "half", tmp_path / name)
        part = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        change(part["state"])
        torch.save(part, tmp_path / name / "checkpoint.pt")
        found = differences(whole, run(name, argv))
        assert (found == []) == (name == "untouched")
        assert name == "untouched" or "/model/head.2.weight" in found, name


def test_torchrun_and_the_test_it_names(tmp_path, capsys):
    """Two processes; the command for the OOD test, as printed."""
    try:
        process = end(start([*QUICK, "--out", str(tmp_path / "run")],
                            torchrun("rince.py", "--standalone", "--nproc_per_node=2")))
    finally:
        stop_started()
    assert process.status == 0, process.err
    lines = process.out.splitlines()
    assert sum(s.startswith("ranks of 24 classes") for s in lines) == 1
    title = lines.index("RINCE, --loss rince-out-in, shapes")
    command = next(s for s in lines[title:] if s.startswith("  OOD test"))
    assert command == f"  OOD test     python ood_eval.py --checkpoint {tmp_path}/run/checkpoint.pt"
    header = log_of(tmp_path / "run")[0]
    assert header["threads"] == 1 and len(log_of_path(tmp_path / "run")) == 8
    ood_eval.main([*command.split()[4:], "--threads", "1", "--bootstrap", "5"])
    found = json.loads((tmp_path / "run/ood_eval-rince-label.json").read_text())
    assert found["method"] == "rince" and found["step"] == 8
    assert found["data"] == dict(train=64, test=1024, outliers=dict(unseen=1024))
    assert found["backbone"]["prefix"] == "backbone."  # the query's
    assert "unseen         gaussian" in capsys.readouterr().out


# ------------------------------------------------------------------ bad input


@pytest.fixture
def refused(refused_by):
    """refused(flags, *words, status=2): see runs.refused_by."""
    return functools.partial(refused_by, rince.main, says=["ranks of ", "recipe own"])


TINY = [*BASE, "--limit-train", "64", "--batch-size", "16", "--epochs", "1", "--queue", "32"]


@pytest.mark.parametrize(("argv", "words"), [
    (["--loss", "infonce"], ["--loss", "'infonce'", "rince-out-in", "scl-superclass"]),
    (["--tau-min", "0"], ["--tau-min 0.0", "0 < tau-min <= tau-max"]),
    (["--tau-min", "0.7"], ["--tau-min 0.7 --tau-max 0.6"]),
    (["--tau-max", "nan"], ["--tau-max nan"]),
    (["--key-momentum", "1.01"], ["--key-momentum must be in [0, 1], got 1.01"]),
    (["--m", "-0.1"], ["--key-momentum must be in [0, 1], got -0.1"]),
    (["--min-prob", "1"], ["--min-prob 1.0"]),
    (["--dim", "0"], ["--dim"]),
    (["--warmup", "-1"], ["--warmup"]),
    (["--queue", "15"], ["--queue 15 holds less than the global batch of 16"]),
    (["--queue", "-1"], ["--queue -1"]),
    (["--threshold", "1.1"], ["--threshold [1.1]"]),
    (["--threshold", "0.3", "0.4"], ["--threshold [0.3, 0.4]: must decrease"]),
    (["--threshold", "nan"], ["--threshold [nan]"]),
    (["--threshold", "0.5"], ["--threshold is not used without --similarity"]),
    (["--loss", "ce", "--tau-max", "0.5"], ["--tau-max is not used by --loss ce"]),
    (["--ranks", "label"], ["--ranks label is one rank only", "--similarity FILE", "scl-out"]),
    (["--ranks", "label", "season"], ["'season'", "label, coarse, pattern"]),
    (["--ranks", "label", "colour"], ["--ranks label colour: not nested", "column 1"]),
    (["--ranks", "coarse", "label"], ["--ranks coarse label: not nested"]),
    (["--ranks", "label", "label"], ["--ranks label label: no pair of classes has rank 2"]),
    (["--ranks", "label", "coarse", "coarse"], ["no pair of classes has rank 3", "remove coarse"]),
    (["--ranks", "coarse", "label", "--loss", "scl-superclass"], ["coarse label: not nested"]),
    (["--loss", "scl-superclass", "--ranks", "label"], ["scl-superclass needs a coarser column"]),
    (["--loss", "scl-out", "--rank2-positives", "cumulative"], ["cumulative does not go with"]),
    (["--loss", "rince-uni", "--rank2-positives", "cumulative"], ["does not go with --loss rinc"]),
    (["--similarity", "no.csv"], ["--similarity goes with", "one column of --ranks"]),
    (["--similarity", "no.csv", "--ranks", "label", "--loss", "ce"], ["--similarity goes with"]),
    (["--similarity", "no.csv", "--ranks", "label"], ["--similarity no.csv", "No such file"]),
    (["--similarity", "no.npz", "--ranks", "label"], ["--similarity no.npz", "No such file"]),
    (["--similarity", "c", "--ranks", "object"], ["--similarity c"]),
])
def test_flags(refused, argv, words):
    refused([*TINY, *argv], *words)


def test_similarity_table(refused, tmp_path):
    root = write_folder(tmp_path / "tree", {f"{part}/{c}": n for part, n in (
        ("train", 8), ("val", 2)) for c in ("cat", "dog", "car")})
    file = tmp_path / "s.csv"
    argv = [*BASE, "--epochs", "1", "--workers", "0", "--dataset", "folder", "--data-dir", root,
            "--batch-size", "8", "--queue", "8", "--ranks", "label", "--similarity", file]
    pairs = "class_a,class_b,{}\ncat,dog,{}\ndog,car,{}\n"

    def wrong(text, *words):
        file.write_text(text)
        refused(argv, f"--similarity {file}", *words)

    wrong("class_a,class_b,similarity\ncat,dog,0.6\n", "lacks 1 classes: car")
    wrong(pairs.format("similarity", 0.6, 0.1) + "cow,dog,0.9\n", "the data lack, 1 classes: cow")
    wrong(pairs.format("similarity", 0.6, "high"), "class_a, class_b, similarity", "high")
    wrong(pairs.format("similarity", 0.6, "nan"), "not a square matrix of numbers")
    wrong(pairs.format("similarity", 0.6, 0.1) + "cat,dog,0.2\n", "two values for the same")
    wrong(pairs.format("rank", 2, 1), "rank 1 is the class itself")
    wrong(pairs.format("rank", 2, 2.5), "ranks of other classes must be 2, 3, .. or 0")
    wrong(pairs.format("likeness", 2, 2), "similarity")
    wrong("", "lacks 3 classes: car, cat, dog")
    file.write_text(pairs.format("similarity", 0.39, 0.1))
    refused(argv, f"--similarity {file}: no pair of classes has rank 2", "lower --threshold")
    file.write_text(pairs.format("similarity", 0.6, 0.1))
    refused([*argv, "--threshold", "0.9", "0.5"], "no pair of classes has rank 2")
    refused([*argv, "--threshold", "0.6", "0.5"], "no pair of classes has rank 3")
    file.write_text(pairs.format("rank", 3, 3))
    refused(argv, "no pair of classes has rank 2")
    file.write_text("class_a,class_b,rank\ncat,dog,2\ncat,car,2\ndog,car,2\n")
    refused(argv, "every class is related to every other, so there are no negatives")
    np.savez(tmp_path / "s.npz", classes=["cat", "dog", "car"], similarity=np.eye(2))
    argv[-1] = tmp_path / "s.npz"
    refused(argv, tmp_path / "s.npz", "not a square matrix of numbers")
    np.savez(tmp_path / "s.npz", classes=["cat", "dog", "car", "cat"], similarity=np.eye(4))
    refused(argv, tmp_path / "s.npz", "not a square matrix of numbers, one row for each class")
    (tmp_path / "s.npz").write_bytes(b"no npz")
    refused(argv, tmp_path / "s.npz", "nor such an npz")


def test_columns_without_label(refused, monkeypatch, rendered):
    def table(args):
        images, columns, classes, _ = rendered(64, 0)
        columns = dict(columns, coarse=columns["coarse"].clone(), one=columns["label"] * 0)
        columns["coarse"][7] = -1
        return (common.Table(columns, classes, images),) * 2
    monkeypatch.setitem(common.SOURCES, "shapes", table)
    argv = [s for s in TINY if s not in ("--limit-train", "64")]
    refused(argv, "--ranks coarse: row 7 of the training set has no label")
    refused([*argv, "--loss", "scl-superclass"], "--ranks coarse: row 7")
    refused([*argv, "--loss", "ce", "--ranks", "one"], "--ranks one: one class has no negatives")
    refused([*argv, "--ranks", "object", "--similarity", "c.csv"], "c.csv")


def test_resuming_with_another_queue_or_other_classes(refused, run, tmp_path):
    run("run", TINY)
    refused([*TINY, "--queue", "48"], "--queue 32 -> 48")
    part = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    part["state"]["ranks"]["table"] = torch.eye(5, dtype=torch.int64)
    torch.save(part, tmp_path / "run/checkpoint.pt")
    refused(TINY, "does not fit", "table", "[5, 5]", "[24, 24]")


def test_a_loss_that_is_not_finite(refused, run, tmp_path, monkeypatch):
    """The run stops before the keys are enqueued, and keeps the last good checkpoint."""
    real = rince.rince
    before = run("run", [*TINY, "--epochs", "2"], stop=3)
    calls, enqueued = [], []
    monkeypatch.setattr(rince, "rince", lambda *x: real(*x) * (
        calls.append(1) or (math.nan if len(calls) > 2 else 1)))
    monkeypatch.setattr(common.Queue, "enqueue", lambda *_: enqueued.append(1))
    refused([*TINY, "--epochs", "2"], "the loss is nan at step 6", status=1)
    assert len(calls) == 3 and len(enqueued) == 2
    part = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert part["step"] == before["step"] == 4

"""kNN, retrieval and accuracy against their definitions, written out in plain Python."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import clinfonce
import common


def unit(n, d, seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=1).to(dtype)


def degrees(*angles):
    """Unit vectors in the plane: the nearest row is the one with the nearest angle."""
    angle = torch.tensor(angles, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1)


# ------------------------------------------------------------------ nearest rows


# one block; a block that is cut; k larger than the last block; k larger than a block
@pytest.mark.parametrize("N, k", [(60, 7), (60, 60), (40_000, 5), (2 ** 14 + 3, 7),
                                  (20_000, 17_000)])
@pytest.mark.parametrize("chunk", [1, 50_000, 2 ** 25])
def test_top_k_is_the_head_of_a_full_sort(N, k, chunk):
    query, bank = unit(9, 6, 0, torch.float64), unit(N, 6, 1, torch.float64)
    expected = (query @ bank.T).sort(1, descending=True)
    sims, rows = common.top_k(query, bank, k, chunk=chunk)
    assert torch.equal(rows, expected.indices[:, :k])
    torch.testing.assert_close(sims, expected.values[:, :k], rtol=0, atol=1e-14)


@pytest.mark.parametrize("chunk", [1, 100_000, 2 ** 25])
def test_top_k_leaves_out_the_own_row(chunk):
    bank = unit(2 ** 14 + 50, 6, 2, torch.float64)
    own = torch.tensor([0, 7, 2 ** 14 - 1, 2 ** 14, 2 ** 14 + 49])  # on both sides of a block's end
    sims = bank[own] @ bank.T
    sims[torch.arange(5), own] = -2
    rows = common.top_k(bank[own], bank, 4, own, chunk)[1]
    assert torch.equal(rows, sims.sort(1, descending=True).indices[:, :4])
    assert torch.equal(common.top_k(bank[own], bank, 1)[1][:, 0], own)  # else it is the nearest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_top_k_takes_a_bank_of_another_type(dtype):
    query, bank = unit(5, 8, 3), unit(300, 8, 4, dtype)
    sims, rows = common.top_k(query, bank, 6)
    expected = (query @ bank.float().T).sort(1, descending=True)
    assert sims.dtype == torch.float32 and torch.equal(rows, expected.indices[:, :6])
    torch.testing.assert_close(sims, expected.values[:, :6])


@pytest.mark.parametrize("k, own, left", [(0, None, 10), (11, None, 10), (10, torch.arange(10), 9)])
def test_top_k_names_a_k_that_cannot_be(k, own, left):
    x = unit(10, 3, 0)
    with pytest.raises(common.BadInput, match=f"^{k} neighbours asked for, the bank has {left} ro"):
        common.top_k(x, x, k, own)


class Largest(TorchDispatchMode):
    """Number of elements of the largest new tensor, views and in-place results not counted."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = zip(out if isinstance(out, tuple) else (out,), function._schema.returns,
                   strict=False)
        for tensor, form in made:
            if isinstance(tensor, torch.Tensor) and form.alias_info is None:
                self.numel = max(self.numel, tensor.numel())
        return out


def test_memory_of_top_k_is_bounded():
    query, bank = unit(300, 4, 5), unit(40_000, 4, 6, torch.float16)
    with Largest() as largest:
        common.top_k(query, bank, 5, chunk=2 ** 17)
    assert 2 ** 16 < largest.numel <= 2 ** 17  # all similarities would be 12 million
    with Largest() as largest:
        common.top_k(query, bank, 5, chunk=2 ** 19)
    assert 2 ** 18 < largest.numel <= 2 ** 19
    # the 1.28 million rows of ImageNet; the device "meta" allocates nothing
    query = torch.empty(10_000, 2048, device="meta")
    bank = torch.empty(1_281_167, 2048, device="meta", dtype=torch.float16)
    with Largest() as largest:
        sims, rows = common.top_k(query, bank, 200)
    assert sims.shape == rows.shape == (10_000, 200)
    assert largest.numel == 2 ** 25  # 128 MiB in float32; all similarities would be 51 GB


# ------------------------------------------------------------------ weighted kNN


def knn_by_definition(query, bank, labels, classes, k, t):
    """score_c = sum over the k nearest rows of class c of exp(sim / t), one number at a time."""
    scores = []
    for q in query.tolist():
        sims = [sum(a * b for a, b in zip(q, row, strict=True)) for row in bank.tolist()]
        nearest = sorted(range(len(sims)), key=lambda j: -sims[j])[:k]
        scores.append([sum(math.exp(sims[j] / t) for j in nearest if labels[j] == c)
                       for c in range(classes)])
    return scores


@pytest.mark.parametrize("k, t", [(1, 0.07), (10, 0.07), (25, 0.5), (200, 0.1)])
def test_knn_scores_are_the_definition(k, t):
    query, bank = unit(20, 5, 7), unit(60, 5, 8)  # k = 200 is capped at the 60 rows
    labels = torch.randint(4, (60,), generator=torch.Generator().manual_seed(9))
    found = common.knn_scores(query, bank, labels, 5, k, t).double()
    expected = torch.tensor(knn_by_definition(query.double(), bank.double(), labels.tolist(), 5, k,
                                              t), dtype=torch.float64)
    assert (expected[:, 4] == 0).all()  # a class without a row
    # the scores are relative to the weight of the nearest row, which changes no order
    best = (query.double() @ bank.double().T).max(1, keepdim=True).values
    torch.testing.assert_close(found * (best / t).exp(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(found.argmax(1), expected.argmax(1))


def test_knn_scores_do_not_overflow_and_ties_go_to_the_lower_class():
    query, bank = degrees(0).float(), degrees(30, -30, 90).float()
    scores = common.knn_scores(query, bank, torch.tensor([2, 1, 0]), 3, k=2, t=0.001)
    torch.testing.assert_close(scores, torch.tensor([[0.0, 1.0, 1.0]]))  # exp(866) is infinite
    assert scores.argmax(1).item() == 1


class Angles(nn.Module):
    """Image of one grey value: the vector of that many degrees, of a length that must not count."""

    def forward(self, x):
        value = (x[:, 0, 0, 0] * 255).round()
        return degrees(*value.tolist()).float() * (1 + value[:, None])


def table_of(values, labels):
    images = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 8, 8)
    return common.Table(dict(label=torch.tensor(labels)), {}, images)


def data_of(train, test, *flags, monkeypatch):
    found = []
    monkeypatch.setattr(common, "run", lambda train, parser, argv:
                        found.append(parser.parse_args(argv)))
    clinfonce.main(["--batch-size", "1", "--image-size", "8", "--mean", "0", "0", "0", "--std", "1",
                    "1", "1", *flags])
    return common.Data(table_of(*train), table_of(*test), found[0], torch.device("cpu"))


def test_knn_accuracy_by_hand(monkeypatch):
    bank = ([0, 10, 100, 110, 50], [0, 0, 2, 2, -1])  # the row of 50 degrees is unlabelled
    query = ([5, 50, 105, 60, 52], [0, 0, 2, 0, -1])
    # 50 degrees is 40 from class 0 and 50 from class 2; 60 is nearer to class 2, so one is wrong
    data = data_of(bank, query, "--knn-k", "1", monkeypatch=monkeypatch)
    assert common.knn_accuracy(Angles(), data) == pytest.approx(75.0)
    # one neighbour of four of class 0, and a large T: the three of class 2 outvote it
    bank = ([0, 100, 110, 120], [0, 2, 2, 2])
    for k, t, expected in ((4, 100, 100 / 3), (4, 0.01, 100.0), (1, 100, 100.0)):
        data = data_of(bank, ([1, 30, 110], [0, 0, 2]), "--knn-k", str(k), "--knn-t", str(t),
                       monkeypatch=monkeypatch)
        assert common.knn_accuracy(Angles(), data) == pytest.approx(expected)
    data = data_of((bank[0], [1] * 4), ([1], [1]), monkeypatch=monkeypatch)
    assert common.knn_accuracy(Angles(), data) is None  # one class: nothing to tell apart


def test_knn_of_ids_of_any_size(monkeypatch):
    bank, big = [0, 10, 100, 110], 10 ** 12
    for labels, of_query in (([0, 0, 2, 2], [0, 2]), ([big, big, 3, 3], [big, 3])):
        data = data_of((bank, labels), ([5, 105], of_query), "--knn-k", "2",
                       monkeypatch=monkeypatch)
        assert common.knn_accuracy(Angles(), data) == 100.0


def test_knn_of_some_queries(monkeypatch):
    """--knn-queries: labelled rows, as many of each class, the same ones every time, by seed."""
    labels = ([0] * 40 + [3] * 8 + [-1] * 5) * 2
    bank, query = ([0, 180], [0, 3]), ([0] * len(labels), labels)  # all queries fall to class 0
    rows = {}
    for seed, n in ((0, 10), (0, 10), (1, 10), (0, 20), (0, 97), (0, None)):
        data = data_of(bank, query, "--knn-k", "1", "--seed", str(seed),
                       *(["--knn-queries", str(n)] if n else []), monkeypatch=monkeypatch)
        found = common.knn_queries(data.args, data.test)
        assert torch.equal(rows.setdefault((seed, n), found), found)
        chosen = torch.tensor(labels)[found]
        counts = [(chosen == c).sum().item() for c in (0, 3, -1)]
        assert counts == {10: [5, 5, 0], 20: [10, 10, 0]}.get(n, [80, 16, 0])
        right = 100 * counts[0] / sum(counts)
        assert common.knn_accuracy(Angles(), data) == pytest.approx(right)
        log = common.Log(data.args, data)
        assert log.header["data"]["notes"] == [f"kNN: {len(found)} of 106 test images"]
    assert not torch.equal(rows[0, 10], rows[1, 10])
    data = data_of(bank, ([0] * 10_100, [0, 3] * 5050), monkeypatch=monkeypatch)
    assert len(common.knn_queries(data.args, data.test)) == 10_000  # the default


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_knn_of_a_network_that_is_not_finite(monkeypatch, value):
    data = data_of(([0, 10, 100], [0, 0, 2]), ([5, 50], [0, 2]), monkeypatch=monkeypatch)
    network = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), Angles())
    network[0].running_var[1] = value
    with pytest.raises(common.RunFailed, match="^features are not finite: .*0.running_var; "):
        common.knn_accuracy(network, data)
    network[0].running_var[1] = 1.0
    broken = nn.Sequential(network, Broken(value))
    with pytest.raises(common.RunFailed, match=r"^features are not finite: 1 of 3 rows \(the "
                       r"first: row 2\); "):
        common.knn_accuracy(broken, data)


class Broken(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return torch.where(x[:, :1] < 0, self.value, x)


def test_features_are_taken_in_evaluation_mode_and_normalised(monkeypatch):
    data = data_of(([0, 51, 255], [0, 1, 0]), ([0], [0]), "--mean", "0.2", "0.2", "0.2", "--std",
                   "0.5", "0.5", "0.5", monkeypatch=monkeypatch)
    module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.9)).train()
    found = common.extract_features(module, data, data.train, select=lambda y: y[:, :2])
    expected = torch.tensor([-0.4, 0.0, 1.6])[:, None].expand(3, 2)  # (x - 0.2) / 0.5
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert module.training and not found.requires_grad


# ------------------------------------------------------------------ retrieval


def retrieval_by_definition(query, query_labels, bank, bank_labels, ks, alone):
    hits, average = dict.fromkeys(ks, 0), []
    sims = query @ bank.T
    for q in range(len(query)):
        order = sorted((j for j in range(len(bank)) if not (alone and j == q)),
                       key=lambda j: -sims[q, j].item())
        right = [bool(bank_labels[j] == query_labels[q]) for j in order]
        for k in ks:
            hits[k] += any(right[:k])
        if R := sum(right):
            average.append(sum(sum(right[:i + 1]) / (i + 1) for i in range(R) if right[i]) / R)
    found = {f"R@{k}": 100 * n / len(query) for k, n in hits.items()}
    return {**found, "mAP@R": 100 * sum(average) / max(1, len(average))}


@pytest.mark.parametrize("classes", [3, 12])
def test_retrieval_is_the_definition(classes):
    query, bank = unit(70, 4, 10, torch.float64), unit(50, 4, 11, torch.float64)
    g = torch.Generator().manual_seed(12)
    y, z = (torch.randint(classes, (n,), generator=g) for n in (70, 50))
    for ks in ((1, 5, 10, 20), (3,)):
        alone = common.retrieval(query, y, ks=ks)
        assert alone == pytest.approx(retrieval_by_definition(query, y, query, y, ks, True))
        found = common.retrieval(query, y, bank, z, ks)
        assert found == pytest.approx(retrieval_by_definition(query, y, bank, z, ks, False))
        assert 2 < found["mAP@R"] < 90 and found["mAP@R"] != pytest.approx(alone["mAP@R"])


def test_retrieval_by_hand():
    x, y = degrees(0, 10, 25, 45), torch.tensor([4, 1, 4, 4])
    # rows of the query's class in order of nearness, R = 2:   0: no yes yes   25: no yes yes
    # 45: yes no yes; the row of 10 degrees is the only one of its class and has no AP
    assert common.retrieval(x, y, ks=(1, 2, 3)) == pytest.approx(
        {"R@1": 25, "R@2": 75, "R@3": 75, "mAP@R": 100 * (1 / 4 + 1 / 4 + 1 / 2) / 3})
    # in a bank: 12 is nearest to 10, R = 1; 40: yes yes no yes, R = 3; 90: a class not in the bank
    found = common.retrieval(degrees(12, 40, 90), torch.tensor([1, 4, 7]), x, y, ks=(1, 4))
    assert found == pytest.approx({"R@1": 200 / 3, "R@4": 200 / 3, "mAP@R": 100 * (1 + 2 / 3) / 2})
    # the bank may hold classes that no query has, and the query rows themselves
    found = common.retrieval(x[1:2], y[1:2], x, y, ks=(1,))
    assert found == pytest.approx({"R@1": 100, "mAP@R": 100})


def test_retrieval_when_no_query_has_a_right_row():
    found = common.retrieval(degrees(0, 50), torch.tensor([0, 1]), ks=(1,))
    assert found == {"R@1": 0.0, "mAP@R": 0.0}
    with pytest.raises(common.BadInput, match=r"^R@20 asks for more rows than the bank has \(1\)"):
        common.retrieval(degrees(0, 50), torch.tensor([0, 0]))


def test_accuracy_by_hand():
    logits = torch.tensor([[3.0, 2, 1], [1, 2, 3], [2, 3, 1], [1, 3, 2]])
    target = torch.tensor([0, 1, 2, 1])
    assert common.accuracy(logits, target) == pytest.approx([50])
    assert common.accuracy(logits, target, (1, 2, 3)) == pytest.approx([50, 75, 100])
    assert common.accuracy(logits, target, (1, 5)) == pytest.approx([50, 100])  # at most 3 classes

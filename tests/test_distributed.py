"""Rules 1 and 2 of the design: neither the number of processes nor --micro-batch changes anything,
neither the mathematics (gradients, tables, clusters, features, scores) nor the data of a step.

One pool of processes per N = 1, 2, 4 runs all `CASES` once; the tests compare what they returned.
BatchNorm normalises the rows of a process, or of a part of them: the networks have none, or the
parts have equal sizes.
"""
import contextlib
import io
import json
import os
import signal
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import ranks
import torch
import torch.nn.functional as F
from PIL import Image
from ranks import NS, blob_tables, close, dropping_gather, many, normal, own_rows
from torch import nn

import clinfonce
import common

B = 16  # rows of the global batch
CPU = torch.device("cpu")
forward = clinfonce.ClInfoNCE.forward


# ------------------------------------------------------------------ what the processes work on


def flags(*more):
    """The parsed flags of clinfonce.py, which is not run."""
    found = []
    with mock.patch.object(common, "run", lambda train, parser, argv:
                           found.append(parser.parse_args(argv))):
        clinfonce.main(["--device", "cpu", "--threads", "1", "--workers", "0", "--batch-size",
                        str(B), "--image-size", "8", "--clusters", "instance", "--out", "unused",
                        *more])
    return found[0]


class Net(nn.Module):
    """Stands in for clinfonce.ClInfoNCE: the same interface, BatchNorm and float64 if asked."""

    dtype, norm = torch.float64, False

    def __init__(self, args, classes):
        super().__init__()
        self.normalize = args.loss != "ce"
        self.backbone = nn.Sequential(
            nn.Flatten(), nn.Linear(3 * args.image_size ** 2, 16),
            nn.BatchNorm1d(16) if self.norm else nn.Identity(), nn.Tanh())
        self.head = nn.Linear(16, args.dim if self.normalize else classes)
        self.head2 = nn.Linear(16, args.dim) if args.dual else None
        self.to(self.dtype)
        self.backbone.register_forward_pre_hook(lambda _, x: (x[0].to(self.dtype),))

    def forward(self, *views, second=False):
        # the cast to float32 of its outputs is left out
        with mock.patch.object(torch.Tensor, "float", lambda x: x):
            return forward(self, *views, second=second)


# ------------------------------------------------------------------ cases, run on every rank


def case_gather(folder):
    """The same function of all rows on every rank, as a loss of the whole batch is."""
    x, w = normal(B, 3), normal(2, B, 3, seed=1)
    own = x[own_rows(B)].clone().requires_grad_()
    everyone = common.gather(own)
    (w[0] * everyone ** 2).sum().backward()
    views = torch.stack([x, 2 * x])[:, own_rows(B)].clone().requires_grad_()
    both = common.gather(views)
    (w * both ** 2).sum().backward()
    detached = common.gather(own.detach())
    return dict(rows=everyone.detach(), grad=own.grad, both=both.detach(), grad_both=views.grad,
                detached=detached.requires_grad)


def step(kind, gather):
    """Loss of one step and the gradient of every parameter, by the calls of clinfonce.train."""
    x = normal(2, B, 3, 2, 2, seed=2)[:, own_rows(B)]
    # clusters that cross the ranks for N = 2 and 4, one image alone, ids with gaps
    ids = torch.tensor([5, 5, 9, -3, 5, 9, 0, 0, 9, 5, -3, 0, 9, 77, 0, 5])
    torch.manual_seed(0)
    args = flags("--image-size", "2", "--dim", "6", *(
        ["--dual", "--clusters", "kmeans"] if "dual" in kind else []))
    model = Net(args, 0)
    network = common.distribute(model, args, unused=args.dual)
    steps = {}
    for second in ((False, True) if kind == "dual" else (False,)):  # warm-up step, then both heads
        network.zero_grad(set_to_none=True)
        z, q = network(*x, second=second)
        if kind == "ids":
            loss = clinfonce.cl_infonce(gather(z), ids, 0.1, 0.07)
        else:
            loss = clinfonce.cl_infonce(gather(z), None, 0.1, 0.1)
        if q is not None:
            loss = loss + clinfonce.cluster_head_loss(gather(q), ids, 0.1)
        loss.backward()
        steps["after" if second else "first"] = dict(
            loss=common.check_loss(loss, 0)["loss"],
            grad={n: None if p.grad is None else p.grad.clone()
                  for n, p in model.named_parameters()})
    return steps


def case_gradients(folder):
    kinds = {kind: step(kind, common.gather) for kind in ("ids", "instance", "dual")}
    if common.world() > 1:
        kinds["dropped"] = step("ids", dropping_gather)
    return kinds


class Values(nn.Module):
    """First pixels of the image, plus a buffer that differs between ranks."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running", torch.tensor(100.0 * common.rank()))

    def forward(self, x):
        assert not self.training
        return x.flatten(1)[:, :2] * 255 + self.running


def case_features(folder):
    args = flags("--mean", "0", "0", "0", "--std", "1", "1", "1")
    found = {}
    for n in (37, 3):  # neither divides by the ranks; with 3 rows one of four ranks has none
        images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).repeat(1, 3, 8, 8)
        table = common.Table({}, {}, images)
        module = Values().train()
        found[n] = common.extract_features(module, SimpleNamespace(
            args=args, device=CPU, eval_batches=common.Data.eval_batches.__get__(
                SimpleNamespace(device=CPU))), table)
        assert module.training  # left as it was
    return found


def case_keys(folder):
    """Shuffled BatchNorm, then a queue that wraps."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    with mock.patch.object(common, "gather", counting := mock.Mock(wraps=common.gather)):
        args = SimpleNamespace(seed=7, micro_batch=None)
        keys = common.shuffled_keys(encoder, normal(B, 3)[own_rows(B)], args, 5)
    queue = common.Queue(normal(2 * B + 3, 4, seed=1))
    for step in range(3):
        queue.enqueue(keys + step, torch.arange(B) + step)
    order = torch.randperm(B, generator=common.generator(7, 5, "shuffle"))
    statistics = normal(B, 3)[order][own_rows(B)] if common.world() > 1 else normal(B, 3)
    parts = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    parts.load_state_dict(encoder.state_dict())
    parts[1].reset_running_stats()
    args.micro_batch = 4
    by_parts = common.shuffled_keys(common.MicroBatches(parts, 4), normal(B, 3)[own_rows(B)],
                                    args, 5)
    return dict(keys=keys, queue=queue.state_dict(), grad=keys.requires_grad,
                gathers=counting.call_count, saw=encoder[0](statistics).mean(0).detach(),
                running=encoder[1].running_mean / 0.1, by_parts=by_parts,
                running_of_parts=parts[1].running_mean)


def case_scores(folder):
    g = torch.Generator().manual_seed(4)
    labels = torch.arange(50) % 5
    images = torch.randint(0, 200, (50, 3, 8, 8), generator=g)
    # a faint mark of the class, so that neither all nor none of the neighbours are right
    images[torch.arange(50), :, labels] += 50
    table = common.Table(dict(label=labels), dict(label=list("abcde")), images.to(torch.uint8))
    args = flags("--knn-k", "7")
    data = common.Data(table.select(torch.arange(33)), table.select(torch.arange(33, 50)), args,
                       CPU)
    query = F.normalize(images.flatten(1).double() - 100, dim=1)
    return dict(knn=common.knn_accuracy(nn.Flatten(), data),
                alone=common.retrieval(query, labels),
                bank=common.retrieval(query[:17], labels[:17], query[17:], labels[17:]))


def case_clusters(folder):
    """Clusters.update with both K-means."""
    found = {}
    for way in ("faiss", "torch"):
        args = flags("--clusters", "kmeans", "--k", "4", "--kmeans", way, "--dim", "6")
        torch.manual_seed(0)
        model = Net(args, 0)
        data = common.Data(*blob_tables(args), args, CPU)
        clusters = clinfonce.Clusters(torch.arange(len(data.train)))
        clusters.update(model, data, args, 1)
        found[way] = dict(ids=clusters.ids)
    return found


def case_views(folder):
    """Rows and augmented views of a few steps, from memory and from files, every operation on."""
    more = ["--blur", "0.5", "--solarize", "0.3", "--erase", "0.5", "--seed", "3"]
    args = flags(*more)
    memory = common.Data(*blob_tables(args), args, CPU)
    args = flags("--dataset", "folder", "--data-dir", f"{folder}/images", *more)
    files = common.load(args, CPU)
    found = {}
    for name, data, first, last in (("memory", memory, 2, 9), ("files", files, 1, 3)):
        aug = common.augmentation(data.args)
        for batch in data.batches(first, last, aug):
            assert batch.own == own_rows(B)
            found[name, batch.step] = dict(rows=batch.rows, views=common.augment(batch))
    return found


def case_stop(folder):
    """A NaN and a SIGTERM of the last rank only."""
    common.setup(flags())
    last = common.rank() == common.world() - 1
    one, two = torch.tensor(1.0), torch.tensor(1.0 + common.rank())
    z = normal(2, B, 3)
    found = dict(mean=common.check_loss(two, 6, dict(twice=2 * two), dict(head=z),
                                        dict(never=torch.tensor(True))))

    def error(*values):
        with pytest.raises(common.RunFailed) as raised:
            common.check_loss(*values)
        return str(raised.value)

    found["nan"] = error(torch.tensor(float("nan") if last else 1.0), 7)
    z[1, [2, B - 1], 0] = float("inf")
    found["features"] = error(one, 7, {}, dict(head=normal(2, B, 3), tail=z))
    found["condition"] = error(one, 7, {}, {}, dict(first=one > 0, second=torch.tensor(not last)))
    found["before"] = common.should_stop()
    if last:
        os.kill(os.getpid(), signal.SIGTERM)
    common.check_loss(one, 8)
    found["after"] = common.should_stop()
    common.setup(flags())  # a new run does not remember
    found["reset"] = common.should_stop()
    return found


KMEANS = ["--clusters", "kmeans", "--k", "4", "--kmeans"]
TRAININGS = {
    "instance": [],
    "coarse": ["--clusters", "coarse"],
    "ce": ["--clusters", "label", "--loss", "ce"],
    "faiss": [*KMEANS, "faiss"],
    "torch": [*KMEANS, "torch"],
    "dual": [*KMEANS, "torch", "--dual", "--kmeans-warmup", "1"],
    "float32": [*KMEANS, "faiss"],
    "uneven": ["--micro-batch", "3"],  # divides neither 16, 8 nor 4 rows
}
NORM = {  # networks with BatchNorm; parts of m rows: on B/m processes one part each
    "instance": [],
    "ce": TRAININGS["ce"],
    "dual": TRAININGS["dual"],
}


def train(folder, more, dtype=torch.float64, norm=False):
    """A whole short run of clinfonce.train; the tables of this rank at its end."""
    made = {}

    def keep(name, kind):
        def make(*values, **more):
            made[name] = kind(*values, **more)
            return made[name]
        return make

    args = flags("--out", folder, "--epochs", "3", "--dim", "6", "--knn-every", "1",
                 "--knn-k", "9", "--log-every", "1", "--lr", "0.1", *more)
    with mock.patch.object(clinfonce, "ClInfoNCE", keep("model", Net)), \
            mock.patch.object(clinfonce, "Clusters", keep("clusters", clinfonce.Clusters)), \
            mock.patch.object(Net, "dtype", dtype), mock.patch.object(Net, "norm", norm), \
            mock.patch.dict(common.SOURCES, shapes=blob_tables), \
            mock.patch.object(common, "curves", lambda *_: None), \
            mock.patch.object(common, "views_picture", lambda *_: None), \
            contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        clinfonce.train(args)
    return dict(weights=made["model"].state_dict(), ids=made["clusters"].ids)


def stop_at(last):
    """Let this process get a SIGTERM before the end of step `last`."""
    real = common.check_loss

    def check_loss(loss, step, *more):
        if step == last:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(loss, step, *more)
    return mock.patch.object(common, "check_loss", check_loss)


def case_train(folder):
    found = {}
    for name, more in TRAININGS.items():
        found[name] = train(f"{folder}/{name}-{common.world()}", more,
                            torch.float32 if name == "float32" else torch.float64)
    b = B // common.world()
    for name, more in NORM.items():
        for m in (4, 8):
            if m <= b:
                parts = [] if m == b else ["--micro-batch", str(m)]
                found[name, m] = train(f"{folder}/norm-{name}-{m}-{common.world()}",
                                       [*more, *parts], norm=True)
    if common.world() == 1:
        found["whole"] = train(f"{folder}/norm-whole", [], norm=True)
        with mock.patch.object(common.MicroBatches, "keep_statistics", contextlib.nullcontext):
            found["statistics"] = train(f"{folder}/norm-control", ["--micro-batch", "4"], norm=True)
    with stop_at(5 if common.rank() == 0 else None):  # the parent goes on with this one
        train(f"{folder}/stopped-{common.world()}", TRAININGS["faiss"])
    return found


CASES = dict(gather=case_gather, keys=case_keys, gradients=case_gradients, features=case_features,
             scores=case_scores, clusters=case_clusters, views=case_views, stop=case_stop,
             train=case_train)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of all runs, with 40 image files of unequal size in two classes."""
    folder = tmp_path_factory.mktemp("pool")
    g = np.random.default_rng(0)
    for i in range(50):  # every fifth of a class is held out
        path = folder / "images" / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(g.integers(0, 256, (20 + i % 3, 18 + i % 5, 3), np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """results[N][rank][case]."""
    return ranks.run(folder, __name__)


# ------------------------------------------------------------------ rule 1: the same mathematics


@pytest.mark.parametrize("N", NS)
def test_gather_and_its_gradient(results, N):
    """Its backward pass gives the own rows times N: the mean over N ranks, each with a loss that
    all share, is the gradient of one process."""
    x, w = normal(B, 3), normal(2, B, 3, seed=1)
    views = torch.stack([x, 2 * x])
    got = [r["gather"] for r in results[N]]
    for r in got:
        assert torch.equal(r["rows"], x) and torch.equal(r["both"], views)
        assert r["detached"] is False
    close(torch.cat([r["grad"] for r in got]) / N, 2 * x * w[0])
    close(torch.cat([r["grad_both"] for r in got], 1) / N, 2 * views * w)


@many
@pytest.mark.parametrize("kind", ["ids", "instance", "dual"])
def test_gradients_are_those_of_one_process(results, N, kind):
    for phase, one in results[1][0]["gradients"][kind].items():
        assert sum(g.abs().sum() for g in one["grad"].values() if g is not None) > 0.1
        for r in results[N]:
            found = r["gradients"][kind][phase]
            assert found["loss"] == pytest.approx(one["loss"], abs=1e-10)  # mean over ranks
            assert found["grad"].keys() == one["grad"].keys()
            for name, grad in one["grad"].items():
                close(found["grad"][name], grad)


@pytest.mark.parametrize("N", NS)
def test_second_head_has_no_gradient_in_the_warm_up(results, N):
    for r in results[N]:
        dual = r["gradients"]["dual"]
        for name, grad in dual["first"]["grad"].items():
            assert (grad is None) == name.startswith("head2")
        assert dual["after"]["grad"]["head2.weight"].abs().max() > 1e-3


@many
def test_a_gather_without_gradient_would_be_noticed(results, N):
    right = results[1][0]["gradients"]["ids"]["first"]
    for r in results[N]:
        wrong = r["gradients"]["dropped"]["first"]
        assert wrong["loss"] == pytest.approx(right["loss"], abs=1e-10)  # the loss cannot tell
        assert max((wrong["grad"][n] - g).abs().max() for n, g in right["grad"].items()) > 1e-3


@many
@pytest.mark.parametrize("name", [n for n in TRAININGS if n != "float32"])
def test_training_ends_with_the_weights_of_one_process(results, folder, N, name):
    one = results[1][0]["train"]["instance" if name == "uneven" else name]
    for r in results[N]:
        for key, value in one["weights"].items():
            close(r["train"][name]["weights"][key], value)
        assert torch.equal(r["train"][name]["ids"], one["ids"])  # the replicas of the table
    logs = [read_log(folder / f"{name}-{n}") for n in (1, N)]
    assert len(logs[0]) == len(logs[1]) > 12
    for a, b in zip(*logs, strict=True):
        assert a == pytest.approx(b, abs=1e-9)


@pytest.mark.parametrize("m", [4, 8])
@pytest.mark.parametrize("name", NORM)
def test_a_part_is_a_process(results, folder, name, m):
    """With BatchNorm too; the running statistics are those of the first part of the first rank."""
    one = results[1][0]["train"][name, m]
    for N in [n for n in NS[1:] if (name, m) in results[n][0]["train"]]:
        for i, r in enumerate(results[N]):
            weights = r["train"][name, m]["weights"]
            for key, value in one["weights"].items():
                if i == 0 or "running" not in key:  # the other ranks' statistics are not kept
                    close(weights[key], value)
            assert torch.equal(r["train"][name, m]["ids"], one["ids"])
        logs = [read_log(folder / f"norm-{name}-{m}-{n}") for n in (1, N)]
        for a, b in zip(*logs, strict=True):
            assert a == pytest.approx(b, abs=1e-9)
    assert one["weights"]["backbone.2.num_batches_tracked"] == 12


def test_other_parts_would_be_noticed(results):
    """With BatchNorm: parts of 4, of 8 and the whole are three trainings; and statistics that later
    parts change are not those of a rank."""
    found = results[1][0]["train"]
    runs = [found[name]["weights"] for name in (("instance", 4), ("instance", 8), "whole")]
    for i, a in enumerate(runs):
        for b in runs[:i]:
            assert (a["backbone.1.weight"] - b["backbone.1.weight"]).abs().max() > 1e-3
    wrong = found["statistics"]["weights"]["backbone.2.running_mean"]
    assert (wrong - runs[0]["backbone.2.running_mean"]).abs().max() > 1e-3


def test_the_trainings_differ_from_each_other(results):
    found = results[1][0]["train"]
    weights = [found[name]["weights"]["backbone.1.weight"]
               for name in ("instance", "coarse", "ce", "faiss", "dual")]
    for i, a in enumerate(weights):
        assert all((a - b).abs().max() > 1e-2 for b in weights[:i])
    close(found["faiss"]["weights"], found["torch"]["weights"])  # the same clusters


def read_log(folder):
    """Lines after the header, without what may differ."""
    lines = [json.loads(s) for s in (folder / "log.jsonl").read_text().splitlines()[1:]]
    return [{k: v for k, v in line.items() if k not in ("images_per_s", "memory_mb", "seconds",
                                                     "cpu_seconds")
             and not isinstance(v, str)} for line in lines]


@many
def test_a_run_of_many_ranks_goes_on_in_one_process(results, folder, N):
    checkpoint = torch.load(folder / f"stopped-{N}" / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 6  # of 12, in the middle of an epoch
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    try:
        found = train(str(folder / f"stopped-{N}"), TRAININGS["faiss"])
    finally:
        signal.signal(signal.SIGTERM, handler)
        torch.set_num_threads(threads)
    one = results[1][0]["train"]["faiss"]
    assert torch.equal(found["ids"], one["ids"])
    for key, value in one["weights"].items():
        close(found["weights"][key], value)


@pytest.mark.parametrize("N", NS)
def test_features_of_all_ranks_stand_in_row_order(results, N):
    for r in results[N]:
        for n, x in r["features"].items():  # row i has the value i; the buffer is rank 0's
            assert x.dtype == torch.float32
            close(x, torch.arange(n).float()[:, None].expand(n, 2), 1e-4)


@pytest.mark.parametrize("N", NS)
def test_shuffled_keys_stand_in_the_order_of_the_batch(results, N):
    torch.manual_seed(0)
    linear, x = nn.Linear(3, 4).double(), normal(B, 3)
    order = torch.randperm(B, generator=common.generator(7, 5, "shuffle"))
    chunks = order.split(B // N) if N > 1 else [torch.arange(B)]
    expected = torch.empty(B, 4, dtype=torch.float64)
    for rows in chunks:  # the batch statistics are those of a chunk of the shuffle
        h = linear(x[rows]).detach()
        expected[rows] = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt()
    for r in results[N]:
        found = r["keys"]
        close(found["keys"], expected)
        assert not found["grad"] and found["gathers"] == (2 if N > 1 else 0)
        close(found["running"], found["saw"])
        # parts of 4 rows on any number of ranks: the keys of 4 ranks
        close(found["by_parts"], results[4][0]["keys"]["keys"])
        # the newest 2 B + 3 of 3 B keys: the first batch is overwritten but for its rows 13..
        keys, K = results[N][0]["keys"]["keys"], 2 * B + 3
        ring, labels = torch.empty(K, 4, dtype=torch.float64), torch.empty(K, dtype=torch.int64)
        for step in range(3):
            for i in range(B):
                ring[(step * B + i) % K], labels[(step * B + i) % K] = keys[i] + step, i + step
        assert torch.equal(found["queue"]["keys"], ring)
        assert torch.equal(found["queue"]["labels"], labels)
        assert found["queue"]["ptr"] == 3 * B % K


@many
def test_scores_are_those_of_one_process(results, N):
    one = results[1][0]["scores"]
    assert 20 < one["knn"] < 100 and 10 < one["alone"]["mAP@R"] < one["alone"]["R@5"] < 100
    for r in results[N]:
        assert r["scores"]["knn"] == one["knn"]
        assert r["scores"]["alone"] == pytest.approx(one["alone"], abs=1e-10)
        assert r["scores"]["bank"] == pytest.approx(one["bank"], abs=1e-10)


@pytest.mark.parametrize("N", NS)
@pytest.mark.parametrize("way", ["faiss", "torch"])
def test_cluster_ids_are_those_of_one_process_on_every_rank(results, N, way):
    one = results[1][0]["clusters"][way]
    truth = blob_tables(None)[0].columns["label"]
    assert len(set(zip(truth.tolist(), one["ids"].tolist(), strict=True))) == 4
    for r in results[N]:
        assert torch.equal(r["clusters"][way]["ids"], one["ids"])


@pytest.mark.parametrize("N", NS)
def test_clusters_stay_equal_through_a_float32_training(results, N):
    one = results[1][0]["train"]["float32"]
    truth = blob_tables(None)[0].columns["label"]
    assert len(set(zip(truth.tolist(), one["ids"].tolist(), strict=True))) == 4
    for r in results[N]:
        assert torch.equal(r["train"]["float32"]["ids"], one["ids"])


@pytest.mark.parametrize("N", NS)
def test_ranks_stop_together(results, N):
    for r in results[N]:
        found = r["stop"]
        assert found["mean"] == dict(loss=(N + 1) / 2, twice=N + 1)
        assert found["nan"].startswith("the loss is nan at step 7; a smaller --lr")
        rows = [2] if N == 1 else [1] + [0] * (N - 2) + [1]
        assert found["features"].startswith(
            f"the output of tail is not finite at step 7, in 2 of 16 rows (those of each rank: "
            f"{rows})")
        assert found["condition"] == "step 7: second"
        assert (found["before"], found["after"], found["reset"]) == (False, True, False)


def test_a_batch_that_does_not_divide(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(common.BadInput, match="16 is not divisible by the 3 processes"):
        common.setup(flags())


# ------------------------------------------------------------------ rule 2: the same data


@many
def test_ranks_together_see_the_views_of_one_process(results, N):
    one = results[1][0]["views"]
    assert [k for k in one if k[0] == "files"] == [("files", 1), ("files", 2)]
    assert [k[1] for k in one if k[0] == "memory"] == list(range(2, 9))
    for key, expected in one.items():
        found = [r["views"][key] for r in results[N]]
        assert all(torch.equal(f["rows"], expected["rows"]) for f in found)  # of the whole batch
        assert torch.equal(torch.cat([f["views"] for f in found], 1), expected["views"])
        assert expected["views"].shape == (2, B, 3, 8, 8)
        # both views, and all images, are other draws
        assert len(expected["views"].flatten(0, 1).flatten(1).unique(dim=0)) == 2 * B


def test_an_epoch_is_a_shuffle_and_a_step_does_not_depend_on_the_first(results):
    one = results[1][0]["views"]  # it began with step 2, as a resumed run does
    args = flags("--blur", "0.5", "--solarize", "0.3", "--erase", "0.5", "--seed", "3")
    data = common.Data(*blob_tables(args), args, CPU)
    seen = {b.step: (b.rows, common.augment(b))
            for b in data.batches(0, 8, common.augmentation(args))}
    for t in range(2, 8):
        assert torch.equal(seen[t][0], one["memory", t]["rows"])
        assert torch.equal(seen[t][1], one["memory", t]["views"])
    epochs = [torch.cat([seen[t][0] for t in range(e, e + 4)]) for e in (0, 4)]
    assert all(len(rows.unique()) == 4 * B for rows in epochs)
    assert not torch.equal(*epochs) and not torch.equal(epochs[0], epochs[0].sort().values)

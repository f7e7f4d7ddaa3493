"""The benchmarks work: gpu.py and peers.py at toy sizes on a CPU, parts of the others."""
import json
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import clinfonce
import common

sys.path.append(str(Path(__file__).parent / "bench"))  # last: it holds a cld.py of its own
import flickr8k
import gpu
import one_protocol
import peers
import weak_pairs

PARTS = {"data", "augmentation", "forward", "loss", "loss backward", "backward", "wait",
         "optimizer", "rest"}


@pytest.fixture
def measure(tmp_path):
    """measure(part): exit status and rows of a part of gpu.py at toy size."""
    before = torch.get_num_threads()

    def run(part, *flags):
        status = gpu.main(["--device", "cpu", "--out", str(tmp_path), "--part", part, *flags])
        path = tmp_path / f"{part}.json"
        return status, json.loads(path.read_text())["rows"] if path.exists() else {}

    yield run
    torch.set_num_threads(before)


def test_compare_finds_nothing_between_equal_runs(measure):
    status, rows = measure("a")
    assert status == 0 and {name.split()[0] for name in rows} == set(gpu.TINY)
    for name, row in rows.items():
        found = [row[k] for k in ("first_loss", "first_step", "losses", "weights")]
        assert found == [0, 0, 0, 0] if "bf16" not in name else min(found) > 0


def test_compare_finds_another_learning_rate(measure, monkeypatch):
    monkeypatch.setattr(gpu, "TINY", {"clinfonce": gpu.TINY["clinfonce"]})
    monkeypatch.setattr(gpu, "MODES", {"twice": ([], ["--lr", "0.01"], gpu.FLOAT32)})
    status, rows = measure("a")
    row = rows["clinfonce twice"]
    assert (status, row["within"], row["first_loss"]) == (1, False, 0)
    assert row["first_step"] == pytest.approx(1, abs=1e-5)  # twice as far
    assert row["weights"] == pytest.approx(1, abs=0.3)


def test_split(measure):
    status, rows = measure("b")
    assert status == 0
    assert {*rows} == {f"{k} 32 px" for k in gpu.CIFAR} | {f"{k} 224 px" for k in gpu.FILES}
    for name, row in rows.items():
        shares = {k[:-2]: v for k, v in row.items() if k.endswith(" %")}
        assert {*shares} == PARTS and min(shares.values()) > 0
        assert sum(shares.values()) == pytest.approx(100)
        assert row["loss_share"] == pytest.approx(shares["loss"] + shares["loss backward"])
        batch = 16 if "32" in name else 8
        assert row["images_per_s"] * row["step_ms"] / 1000 == pytest.approx(batch)


@pytest.mark.parametrize("module, name, part", [
    (common, "augment", "augmentation"), (clinfonce, "cl_infonce", "loss"),
    (clinfonce.ClInfoNCE, "forward", "forward"), (torch.Tensor, "backward", "loss backward"),
    (torch.optim.SGD, "step", "optimizer"), (common, "set_lr", "loss"),
    (common.Log, "__call__", "rest"), (common.Data, "batches", "data")])
def test_split_gives_time_to_the_part_that_takes_it(module, name, part, measure, monkeypatch):
    real = getattr(module, name)

    def slow(*args, **kwargs):
        time.sleep(0.1)
        return real(*args, **kwargs)

    def slow_batches(*args, **kwargs):
        for batch in real(*args, **kwargs):
            time.sleep(0.1)
            yield batch

    monkeypatch.setattr(gpu, "FILES", {})
    monkeypatch.setattr(gpu, "CIFAR", {"clinfonce": gpu.CIFAR["clinfonce"]})
    monkeypatch.setattr(module, name, slow_batches if name == "batches" else slow)
    row = measure("b")[1]["clinfonce 32 px"]
    assert row[f"{part} %"] / 100 * row["step_ms"] > 99


def test_epoch(measure):
    status, rows = measure("c")
    assert status == 0 and {*rows} == {*gpu.CIFAR}
    for row in rows.values():
        assert (row["pixels"], row["images"]) == ("random", 64)
        assert row["images_per_s"] * row["epoch_s"] == pytest.approx(64)


def test_search_agrees_with_a_direct_computation(measure):
    status, rows = measure("d")
    assert status == 0
    assert max(row["largest_error"] for row in rows.values()) < 1e-5
    assert rows["kNN"]["same_class"] == 1
    # 80 directions with noise in 20 groups: between the noise alone and one group for all
    assert 0.2 < rows["K-means"]["objective"] < 0.95


def test_search_finds_errors(measure, monkeypatch):
    kmeans, knn_scores = clinfonce.kmeans_torch, common.knn_scores

    def wrong_ids(x, k):
        ids, c = kmeans(x, k)
        return ids.roll(1), c

    monkeypatch.setattr(clinfonce, "kmeans_torch", wrong_ids)
    monkeypatch.setattr(common, "knn_scores", lambda query, *more: knn_scores(-query, *more))
    rows = measure("d")[1]
    assert rows["K-means"]["largest_error"] > 0.1 and rows["kNN"]["same_class"] < 0.1


def test_waits(measure):
    status, rows = measure("e")
    assert status == 0 and {*rows} == {f"{name} pretended" for name in gpu.TINY}
    for row in rows.values():
        assert row["waits_per_step"] == pytest.approx(sum(row["lines"].values()))
        # check_loss is the one place where each step waits
        assert 1 in [n for line, n in row["lines"].items() if line.startswith("common.py")]


def test_it_goes_on_with_the_missing_rows(measure, tmp_path, capsys):
    assert measure("d", "--minutes", "0") == (1, {})
    first = measure("d")[1]
    path = tmp_path / "d.json"
    record = json.loads(path.read_text())
    del record["rows"]["kNN"]
    path.write_text(json.dumps(record))
    again = measure("d")[1]
    assert again["K-means"] == first["K-means"] and {*again} == {*first}
    assert again["kNN"]["wall_s"] != first["kNN"]["wall_s"]
    assert "| kNN | 2000 | 32 |" in (tmp_path / "table.md").read_text()


def test_a_row_that_fails_does_not_end_the_run(measure, monkeypatch):
    def fails(x, k):
        raise RuntimeError("no memory")

    monkeypatch.setattr(clinfonce, "kmeans_torch", fails)
    status, rows = measure("d")
    assert status == 1 and "no memory" in rows["K-means"]["error"] and "N" in rows["kNN"]


@pytest.mark.parametrize("flags", [["--device", "cpu"], ["--device", "cuda"]])
def test_results_of_a_gpu_are_only_of_a_gpu(flags, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        gpu.main(flags)
    assert stop.value.code == 2


# ---------------------------------------------------------------------------------- peers.py


def test_peers(tmp_path, monkeypatch):
    """Both tables, with a lightly whose views and loss are those of torchvision and ours."""
    monkeypatch.setattr(metadata, "version", lambda name: "0.0")
    monkeypatch.setitem(sys.modules, "lightly", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "lightly.transforms", SimpleNamespace(
        SimCLRTransform=lambda input_size, **flags: peers.torchvision_views(input_size)))
    monkeypatch.setitem(sys.modules, "lightly.loss", SimpleNamespace(
        NTXentLoss=lambda temperature: lambda *z: peers.our_loss(torch.stack(z))))
    threads = torch.get_num_threads()
    peers.main(["--toy", "--rounds", "2", "--seconds", "0.05", "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    rounds = json.loads((tmp_path / "peers.json").read_text())["rounds"]
    assert [len(kind) for kind in rounds.values()] == [5, 4]
    assert all(len(v) == 2 and min(v) > 0 for kind in rounds.values() for v in kind.values())
    ours, other = (statistics.median(rounds["files"][k]) for k in ("ours", "lightly, 2 workers"))
    assert (f"| files | lightly, 2 workers | {other:.0f} |" in (tmp_path / "peers.md").read_text())
    assert f"| {ours / other:.2f} |" in (tmp_path / "peers.md").read_text()


def test_peers_have_the_same_views():
    images, batch = gpu.table(512), 512
    torch.manual_seed(0)
    ours = next(peers.our_batches(images, 32, batch, 0))
    data = peers.TwoViews(list(images.images.permute(0, 2, 3, 1).contiguous().numpy()),
                          peers.torchvision_views(32))
    theirs = [torch.stack(views) for views in zip(*(data[i] for i in range(batch)))]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape and mine.dtype == other.dtype
        for moment in (torch.mean, torch.std):
            assert moment(mine).item() == pytest.approx(moment(other).item(), abs=0.05)


def test_peers_without_lightly(capsys, monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(SystemExit) as stop:
        peers.main([])
    assert stop.value.code == 2 and "lightly is not installed" in capsys.readouterr().err


def test_speed_leaves_the_warm_up_out():
    def batches():
        for i in range(10 ** 6):
            time.sleep(0.1 if i < 2 else 0.002)
            yield i

    assert 40 < peers.speed(batches(), lambda i: None, 1, 0.2, warm=2) <= 500


# ---------------------------------------------------------------------------------- protocols


@pytest.mark.parametrize("log", [
    [(4, 2), (8, 4), (12, 6)],
    [(4, 2), (8, 4), (5, 6), (9, 8)],  # resumed at epoch 4: its first line holds the start, too
    [(6, 3), (5, 4), (7, 5), (3, 6), (7, 8)]])
def test_cost_of_an_epoch_of_a_resumed_run(log):
    assert one_protocol.seconds_per_epoch(
        [dict(cpu_seconds=cpu, epoch=epoch) for cpu, epoch in log]) == 2


def test_positives_of_weak_labels():
    y, t = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([1, 1, 2, 3, 3, 3])
    assert weak_pairs.pairs(y, t) == (8, 4)


@pytest.mark.parametrize(("best", "tried"), [
    (1e-3, ["0.0005", "0.001", "0.002"]),
    (3e-3, ["0.0005", "0.001", "0.002", "0.004", "0.008"]),
    (1e-2, ["0.0005", "0.001", "0.002", "0.004", "0.008", "0.016"]),
    (2e-4, ["0.0005", "0.001", "0.002", "0.00025", "0.000125"])])
def test_the_best_rate_has_worse_ones_on_both_sides(monkeypatch, best, tried):
    runs = []

    def train(args, name, *flags):
        runs.append(flags[flags.index("--lr") + 1])
        return dict(mean=-abs(torch.tensor(float(runs[-1]) / best).log().item()))

    monkeypatch.setattr(flickr8k, "train", train)
    rate = flickr8k.best_rate(SimpleNamespace(long=True), "clip", 64)
    assert runs == tried and float(rate) == min(map(float, tried), key=lambda r: abs(
        torch.tensor(r / best).log().item()))

"""ood_eval.py: scores against their definitions, metrics against scikit-learn and by hand, whole
runs, bad input."""
import functools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import image, write_folder, write_pack
from PIL import Image

import clinfonce
import common
import ood_eval

MACHINE = ["--device", "cpu", "--threads", "1", "--workers", "0", "--bootstrap", "20", "--k", "5"]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------------------- metrics


def of(inliers, outliers):
    """The five metrics of two lists of scores, as floats."""
    counts = ood_eval.histogram(*(torch.tensor(s, dtype=torch.float64)
                                  for s in (inliers, outliers)))
    return {name: value.item() for name, value in ood_eval.metrics(*counts).items()}


def test_metrics_by_hand():
    """Inliers 3 2 2 1, outliers 2 1 0: two pairs are level and three ties count 1/2."""
    found = of([3, 2, 2, 1], [2, 1, 0])
    # above / level of each inlier: 3: 3/0; 2: 2/1 (twice); 1: 1/1 -> 8 + 3 / 2 of 12
    assert found["AUROC"] == pytest.approx(9.5 / 12, abs=1e-15)
    # recall 1/4 at precision 1, 3/4 at 3/4 (the level outlier comes with them), 1 at 4/6
    assert found["AUPR-in"] == pytest.approx(1 / 4 + 1 / 2 * 3 / 4 + 1 / 4 * 4 / 6, abs=1e-15)
    # outliers first: 0 (1 of 1), 1 (2 of 3), 2 (3 of 6)
    assert found["AUPR-out"] == pytest.approx(1 / 3 * (1 + 2 / 3 + 3 / 6), abs=1e-15)
    assert found["FPR95"] == pytest.approx(2 / 3)  # all inliers: threshold 1
    assert found["FPR95-out"] == pytest.approx(3 / 4)  # all outliers: threshold 2


def test_metrics_of_all_ties_and_of_no_overlap():
    assert of([1, 1], [1, 1, 1]) == pytest.approx(
        {"AUROC": 0.5, "AUPR-in": 0.4, "AUPR-out": 0.6, "FPR95": 1, "FPR95-out": 1})
    assert of([2, 3], [0, 1]) == {"AUROC": 1, "AUPR-in": 1, "AUPR-out": 1, "FPR95": 0,
                                  "FPR95-out": 0}
    assert of([0, 1], [2, 3])["AUROC"] == 0 and of([0, 1], [2, 3])["FPR95"] == 1


def test_95_percent_is_exact():
    """19 of 20 inliers are 95 %; 0.95 has no exact binary fraction."""
    for n in (20, 40, 60, 100, 9980):
        inliers = list(range(n, 2 * n))
        least = 2 * n - n * 95 // 100  # the 95 % highest begin here
        assert of(inliers, [least, least - 1])["FPR95"] == 0.5


@pytest.mark.parametrize("levels", [3, 40, 10 ** 9])
def test_metrics_are_those_of_scikit_learn(levels):
    sk = pytest.importorskip("sklearn.metrics")
    scores = (normal(901, seed=levels) + torch.arange(901).lt(531) * 0.7)
    scores = (scores * levels / 4).round() / levels if levels < 100 else scores
    inliers, outliers = scores[:531], scores[531:]
    y = np.arange(901) < 531
    found = of(inliers.tolist(), outliers.tolist())
    assert found["AUROC"] == pytest.approx(sk.roc_auc_score(y, scores), abs=1e-12)
    assert found["AUPR-in"] == pytest.approx(sk.average_precision_score(y, scores), abs=1e-12)
    assert found["AUPR-out"] == pytest.approx(sk.average_precision_score(~y, -scores), abs=1e-12)
    for name, truth, s in (("FPR95", y, scores), ("FPR95-out", ~y, -scores)):
        fpr, tpr, _ = sk.roc_curve(truth, s, drop_intermediate=False)
        assert found[name] == pytest.approx(fpr[np.argmax(tpr >= 0.95)], abs=1e-12)


def test_histogram():
    hits, misses = ood_eval.histogram(torch.tensor([1.0, 5, 5]), torch.tensor([5.0, 2]))
    assert (hits.tolist(), misses.tolist()) == ([2, 0, 1], [1, 1, 0])  # at 5, 2, 1
    for bad in (([], [1.0]), ([1.0], []), ([math.nan], [1.0])):
        with pytest.raises(ValueError):
            ood_eval.histogram(*map(torch.tensor, bad))


def test_bootstrap():
    """Percentiles of metrics over images drawn with replacement; a function of the seed."""
    inliers, outliers = normal(200) + 1, normal(150, seed=1)
    counts = ood_eval.histogram(inliers, outliers)
    found, again, other = (ood_eval.bootstrap_intervals(*counts, 500, seed) for seed in (0, 0, 1))
    assert found == again != other
    g, drawn = torch.Generator().manual_seed(5), []
    for _ in range(500):  # the same by drawing scores
        rows = [s[torch.randint(len(s), (len(s),), generator=g)] for s in (inliers, outliers)]
        drawn.append(ood_eval.metrics(*ood_eval.histogram(*rows)))
    for name, (low, high) in found.items():
        q = torch.tensor([0.025, 0.975], dtype=torch.float64)
        expected = torch.stack([d[name] for d in drawn]).quantile(q).tolist()
        assert [low, high] == pytest.approx(expected, abs=0.015 if "FPR" not in name else 0.05)
        assert low < of(inliers.tolist(), outliers.tolist())[name] < high


# ---------------------------------------------------------------------------------- scores


def features(D=4, seed=0):
    """Training features of three classes with unequal covariances, their labels, test features."""
    labels = torch.arange(60) % 3
    train = normal(60, D, seed=seed) @ normal(D, D, seed=seed + 1)
    train = train + 2 * normal(3, D, seed=7)[labels]
    return train, labels, normal(9, D, seed=seed + 2) * 2


def test_gaussian():
    """Density of torch's own distribution, with the divisor n."""
    train, labels, x = features()
    found = ood_eval.class_log_densities(train.float(), 5 * labels + 2, x.float(), 1e-6)
    assert found.dtype == torch.float64 and found.shape == (9, 3)
    for c in range(3):
        rows = train.float().double()[labels == c]
        Sigma = torch.cov(rows.T, correction=0) + 1e-6 * torch.eye(4).double()
        expected = torch.distributions.MultivariateNormal(rows.mean(0), Sigma)
        torch.testing.assert_close(found[:, c], expected.log_prob(x.float().double()), rtol=1e-9,
                                   atol=1e-9)


def test_gaussian_of_one_image_and_of_few():
    """One image: the ridge alone. Fewer than D + 1: singular but for the ridge. Both finite."""
    D, ridge = 6, 1e-3
    train, x = normal(5, D), normal(4, D, seed=1)
    found = ood_eval.class_log_densities(train, torch.tensor([0, 1, 1, 1, 1]), x, ridge)
    expected = -0.5 * (D * math.log(2 * math.pi * ridge) + (x - train[0]).square().sum(1) / ridge)
    torch.testing.assert_close(found[:, 0], expected, rtol=1e-12, atol=0)
    # in the directions that class 1 does not use, the distance is measured by the ridge
    rows = train[1:] - train[1:].mean(0)
    values, vectors = torch.linalg.eigh(rows.T @ rows / 4)
    assert (values < 1e-12).sum() == 3
    z = ((x - train[1:].mean(0)) @ vectors).square() / (values.clamp(min=0) + ridge)
    expected = -0.5 * (D * math.log(2 * math.pi) + (values.clamp(min=0) + ridge).log().sum()
                       + z.sum(1))
    torch.testing.assert_close(found[:, 1], expected, rtol=1e-9, atol=0)
    with pytest.raises(ValueError):
        ood_eval.class_log_densities(train, torch.arange(5), x * math.inf, ridge)
    with pytest.raises(common.RunFailed, match="covariance of class 1.*--ridge"):
        ood_eval.class_log_densities(train * 1e9, torch.tensor([0, 1, 1, 1, 1]), x, 1e-12)


def test_mahalanobis():
    train, labels, x = features()
    means = torch.stack([train[labels == c].mean(0) for c in range(3)])
    Sigma = torch.cov((train - means[labels]).T, correction=0) + 0.1 * torch.eye(4).double()
    delta = x[:, None] - means  # (n, C, D)
    expected = -(delta @ torch.linalg.inv(Sigma) * delta).sum(2).min(1).values
    found = ood_eval.mahalanobis(train, 5 * labels + 2, x, 0.1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_knn_distance():
    train, x = (F.normalize(normal(n, 8, seed=n), dim=1) for n in (50, 7))
    expected = -torch.cdist(x, train).sort(1).values
    for k in (1, 5, 50):
        torch.testing.assert_close(ood_eval.knn_distance(train, x, k), expected[:, k - 1],
                                   rtol=1e-5, atol=1e-5)
    for k in (0, 51):
        with pytest.raises(ValueError, match=f"k = {k} for 50"):
            ood_eval.knn_distance(train, x, k)


def test_max_softmax():
    h, weight, bias = normal(5, 3), normal(4, 3, seed=1), normal(4, seed=2)
    expected = (h @ weight.T + bias).softmax(1).amax(1)
    torch.testing.assert_close(ood_eval.max_softmax(h, weight, bias), expected)


# ---------------------------------------------------------------------------------- whole runs


@pytest.fixture(autouse=True)
def small(monkeypatch, rendered):
    """A built-in data set of 240 + 96 images: 24 classes of 10 and 4."""
    def tables(args):
        return tuple(common.Table(columns, classes, images.clone())
                     for images, columns, classes, _ in (rendered(240, 0), rendered(96, 1)))
    monkeypatch.setitem(common.SOURCES, "shapes", tables)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Checkpoint of the baseline that clinfonce.py trains: a linear head on the shapes."""
    folder = tmp_path_factory.mktemp("trained")

    def tables(args):
        return tuple(common.Table(columns, classes, images) for images, columns, classes, _ in (
            common.shapes(240, 0), common.shapes(96, 1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(common.SOURCES, "shapes", tables)
        clinfonce.main([*MACHINE[:6], "--loss", "ce", "--clusters", "coarse", "--batch-size", "48",
                        "--epochs", "2", "--out", str(folder)])
    return folder / "checkpoint.pt"


def run(tmp_path, *argv, name="out.json"):
    ood_eval.main([*MACHINE, "--out", str(tmp_path / name), *map(str, argv)])
    return json.loads((tmp_path / name).read_text())


def test_a_run_from_end_to_end(tmp_path, trained, capsys):
    """Every score is what its definition says on the features of the checkpoint."""
    found = run(tmp_path, "--checkpoint", trained, "--label", "coarse")
    out = capsys.readouterr().out
    assert found["headline"] == "gaussian" and found["method"] == "clinfonce"
    assert found["data"] == dict(train=240, test=96, outliers=dict(unseen=1024))
    assert list(found["results"]["unseen"]) == ["gaussian", "mahalanobis", "knn", "softmax"]
    assert "6 classes have no more training images than features (128)" in out

    args = ood_eval_flags("--checkpoint", trained, "--label", "coarse")
    checkpoint = common.load_checkpoint(str(trained))
    backbone = common.load_backbone("x", checkpoint)[0]
    data = ood_eval.load_inliers(args, torch.device("cpu"))
    outliers = common.Table({}, {}, common.shapes(1024, seed=2, unseen=True)[0])
    h = [common.extract_features(backbone, data, t) for t in (data.train, data.test, outliers)]
    train, test, other = (F.normalize(x.double(), dim=1) for x in h)
    y = data.train.columns["coarse"]
    head = [checkpoint["state"]["model"][f"head.{p}"] for p in ("weight", "bias")]
    scores = {
        "gaussian": lambda x, _: ood_eval.class_log_densities(train, y, x, 1e-6).max(1).values,
        "mahalanobis": lambda x, _: ood_eval.mahalanobis(train, y, x, 1e-6),
        "knn": lambda x, _: ood_eval.knn_distance(train, x, 5),
        "softmax": lambda _, raw: ood_eval.max_softmax(raw, *head)}
    for name, score in scores.items():
        expected = of(score(test, h[1]).tolist(), score(other, h[2]).tolist())
        for metric, value in found["results"]["unseen"][name].items():
            assert value == pytest.approx(100 * expected[metric], abs=0.05), (name, metric)
            low, high = found["intervals"]["unseen"][name][metric]
            assert 0 <= low <= high <= 100
        value = found["results"]["unseen"][name]["AUROC"]
        low, high = found["intervals"]["unseen"][name]["AUROC"]
        assert f"unseen         {name:12} {value:.2f} [{low:.2f}, {high:.2f}]" in out
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.format == "PNG" and picture.width > 300
    assert "(synthetic)" in out and f"{tmp_path}/out.png" in out


def ood_eval_flags(*argv):
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "run", lambda train, parser, argv: made.append(
            parser.parse_args(list(map(str, argv)))))
        ood_eval.main([*MACHINE, *argv])
    return made[0]


def test_outlier_sets(tmp_path, capsys):
    """Packs and folders, of another size too; all are seen as the test images are."""
    g = np.random.default_rng(0)
    near = g.integers(0, 256, (12, 64, 64, 3)).astype(np.uint8)
    write_pack(tmp_path / "data/far.npz", near, labels=np.arange(12))
    (tmp_path / "data/tree/a").mkdir(parents=True)
    for i, x in enumerate(near):
        Image.fromarray(x).save(tmp_path / f"data/tree/a/{i:02}.png")
    write_folder(tmp_path / "data/flat", {".": 7}, 32, 40)
    argv = ["--checkpoint", "none", "--data-dir", tmp_path / "data", "--bootstrap", "0"]
    found = run(tmp_path, *argv, "--outliers", "unseen", "pack=far.npz", "tree=tree", "flat=flat")
    assert found["data"]["outliers"] == dict(unseen=1024, pack=12, tree=12, flat=7)
    assert found["intervals"] == {} and list(found["results"]["flat"]) == [
        "gaussian", "mahalanobis", "knn"]
    # the same images from memory and from files (resized by torch and by PIL)
    for score in found["results"]["pack"]:
        assert found["results"]["pack"][score]["AUROC"] == pytest.approx(
            found["results"]["tree"][score]["AUROC"], abs=3)
    assert found["results"]["pack"]["knn"]["AUROC"] > 90  # noise, even for an untrained network
    again = run(tmp_path, *argv, "--outliers", "pack=far.npz", name="one.json")
    assert again["results"]["pack"] == found["results"]["pack"]  # sets do not touch each other
    assert "[" not in capsys.readouterr().out.split("outliers: pack 12")[1].split("percent")[0]


def test_outlier_classes(tmp_path, capsys):
    """Classes of packs and folders that the training set has can be left out."""
    write_pack(tmp_path / "data/p.npz", [np.full((32, 32, 3), i, np.uint8)
                                         for i in range(9)], labels=np.arange(9) % 3,
               classes=np.array(["cat", "dog", "ape"]))
    write_folder(tmp_path / "data/tree", {"cat": 4, "dog/more": 5, ".": 2, "cow": 3, ".x": 2})
    (tmp_path / "list.txt").write_text("dog\ncow\n")
    argv = ["--checkpoint", "none", "--data-dir", tmp_path / "data", "--bootstrap", "0",
            "--outliers", "pack=p.npz", "tree=tree"]
    assert run(tmp_path, *argv)["data"]["outliers"] == dict(pack=9, tree=14)
    assert "tree: passed over 1 hidden" in capsys.readouterr().out
    for names in ([tmp_path / "list.txt"], ["cow", "dog"]):
        found = run(tmp_path, *argv, "--outlier-classes", *names, name=f"{len(names)}.json")
        assert found["data"]["outliers"] == dict(pack=3, tree=8)
    assert "outliers: pack 3, tree 8\n" in capsys.readouterr().out


@pytest.mark.parametrize(("names", "words"), [
    (["dog", "bird"], ["--outlier-classes", "'bird'", "cat, cow, dog"]),
    (["cow"], ["set pack has none"])])
def test_outlier_classes_that_no_set_has(refused_by, tmp_path, names, words):
    write_pack(tmp_path / "p.npz", [np.zeros((32, 32, 3), np.uint8)] * 2, labels=np.arange(2),
               classes=np.array(["cat", "dog"]))
    write_folder(tmp_path / "tree", {"cat": 1, "cow": 1})
    refused_by(ood_eval.main, ["--checkpoint", "none", "--data-dir", tmp_path, "--outliers",
                               "pack=p.npz", "tree=tree", "--outlier-classes", *names], *words,
               out=tmp_path / "o.json")


def test_images_are_normalised_as_the_test_set_is(monkeypatch):
    """The outliers get the in-distribution mean and deviation, not those of their own set."""
    args = ood_eval_flags("--checkpoint", "none", "--mean", "0.1", "0.2", "0.3", "--std", "0.5",
                          "0.5", "0.5")
    data = ood_eval.load_inliers(args, torch.device("cpu"))
    other = common.Table({}, {}, torch.full((2, 3, 64, 64), 51, dtype=torch.uint8))
    seen = common.extract_features(torch.nn.Flatten(), data, other)
    assert seen.shape == (2, 3 * 32 * 32)
    torch.testing.assert_close(seen[0].view(3, -1)[:, 0], torch.tensor([0.2, 0.0, -0.2]))


def test_other_checkpoints_and_labels(tmp_path, small, monkeypatch, rendered):
    """A torchvision state dict; rows without label are not fitted, and an untrained class stops."""
    torch.manual_seed(0)
    torch.save(common.resnet("resnet18").state_dict(), tmp_path / "r.pt")
    found = run(tmp_path, "--checkpoint", tmp_path / "r.pt", "--dataset", "shapes")
    assert found["backbone"]["arch"] == "resnet18" and found["method"] is None

    images, columns, classes, _ = rendered(240, 0)
    label = columns["label"].clone()
    label[:40] = -1
    monkeypatch.setitem(common.SOURCES, "shapes", lambda args: (
        common.Table({"label": label}, classes, images), common.Table(columns, classes, images)))
    found = run(tmp_path, "--checkpoint", "none", name="some.json")
    assert found["data"]["train"] == 200 and found["data"]["test"] == 240


@pytest.mark.filterwarnings("error")
def test_the_picture_uses_nothing_deprecated(tmp_path):
    scores = dict(unseen=dict(gaussian=(normal(50), normal(40) - 1)))
    results = dict(unseen=dict(gaussian=dict(AUROC=70.0)))
    path = ood_eval.score_picture(tmp_path / "a.png", ood_eval_flags("--checkpoint", "none"),
                                  scores, results)
    with Image.open(path) as picture:
        assert picture.format == "PNG"


def test_one_image_a_class(tmp_path, capsys):
    found = run(tmp_path, "--checkpoint", "none", "--limit-train", "24", "--bootstrap", "0")
    assert found["data"]["train"] == 24
    assert all(0 < v < 100 for s in found["results"]["unseen"].values() for v in s.values())
    out = capsys.readouterr().out
    assert "24 classes have no more training images than features" in out
    assert out.count("headline: gaussian\n") == 1 and "bootstrap" not in out


# ---------------------------------------------------------------------------------- bad input


@pytest.fixture
def refused(refused_by, tmp_path):
    """refused(flags, *words): one line, status 2, nothing written."""
    return functools.partial(refused_by, ood_eval.main, out=tmp_path / "o.json",
                             says=["untrained ", "1 classes"])


NONE = [*MACHINE, "--checkpoint", "none"]


@pytest.mark.parametrize(("argv", "words"), [
    (["--ridge", "0"], ["--ridge must be above 0, got 0.0"]),
    (["--ridge", "nan"], ["--ridge must be above 0, got nan"]),
    (["--k", "0"], ["--k must be above 0"]),
    (["--k", "241"], ["--k 241: there are 240 training images"]),
    (["--bootstrap", "-1"], ["--bootstrap"]),
    (["--micro-batch", "8"], ["--micro-batch is not used by ood_eval.py, which trains nothing"]),
    (["--lr", "1"], ["--lr is not used by ood_eval.py, which trains nothing"]),
    (["--knn-k", "5"], ["--knn-k is not used by ood_eval.py, whose k-NN has --k"]),
    (["--outliers", "x=a.npz", "--outliers", "unseen"], ["--outliers is written twice"]),
    (["--label", "kind"], ["'kind'", "label, coarse"]),
    (["--outliers", "cifar"], ["--outliers cifar: write unseen, another data set", "NAME=FILE"]),
    (["--outliers", "shapes"], ["--outliers shapes: write unseen, another data set (cifar10,"]),
    (["--dataset", "shapes-views", "--outliers", "shapes"], ["--outliers shapes: write unseen"]),
    (["--outliers", "x=no.npz"], ["no.npz not found"]),
    (["--outliers", "x=k=3/no.npz"], ["k=3/no.npz not found"]),
    (["--outliers", "x="], ["--outliers x=: write unseen"]),
    (["--outliers", "x=folder"], ["--outliers x=folder: ", "neither a folder nor an npz pack"]),
    (["--outliers", "cifar10", "--data-dir", "nowhere"], ["--dataset cifar10", "nowhere"]),
    (["--outliers", "unseen", "unseen"], ["two sets of one name"]),
    (["--dataset", "folder", "--data-dir", "nowhere", "--outliers", "unseen"], ["nowhere"]),
])
def test_flags(refused, argv, words):
    refused([*NONE, *argv], *words)


def test_download_of_outliers(monkeypatch):
    """The data set is built in, but torchvision may fetch the outliers."""
    made = []
    monkeypatch.setattr(common, "run", lambda train, parser, argv: made.append(parser))
    ood_eval.main([])
    assert made[0].parse_args([*NONE, "--outliers", "cifar10", "--download"]).download


def test_picture_of_another(refused, tmp_path):
    (tmp_path / "o.png").write_bytes(b"mine")
    refused(NONE, f"{tmp_path}/o.png exists; use another --out")
    assert (tmp_path / "o.png").read_bytes() == b"mine"


def test_outliers_that_cannot_be_read(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.npz").write_bytes(b"no pack")
    write_pack(tmp_path / "bare.npz", [image(0)])
    argv = [*NONE, "--data-dir", tmp_path, "--outliers"]
    refused([*argv, "x=empty"], f"no image below {tmp_path}/empty")
    refused([*argv, "x=broken.npz"], f"npz pack {tmp_path}/broken.npz", "cannot be read")
    write_pack(tmp_path / "uneven.npz", [image(0), image(1, 30, 32)])
    refused([*argv, "x=uneven.npz"], "image 1 is (30, 32)")
    (tmp_path / "empty/a.png").write_bytes(b"no image")
    refused([*argv, "x=empty"], f"image {tmp_path}/empty/a.png", "cannot be decoded", status=1)
    refused([*NONE, "--dataset", "npz", "--train-file", "bare.npz", "--data-dir", tmp_path],
            "name --outliers")


def test_classes_and_checkpoints(refused, tmp_path, monkeypatch, rendered):
    images, columns, classes, _ = rendered(240, 0)
    seen = columns["label"] != 5

    def source(rows):
        return lambda args: (common.Table(columns, classes, images).select(rows.nonzero()[:, 0]),
                             common.Table(columns, classes, images))
    monkeypatch.setitem(common.SOURCES, "shapes", source(seen))
    refused(NONE, f"test images of class {classes['label'][5]}, which has no training image")
    monkeypatch.setitem(common.SOURCES, "shapes", source(seen & False))
    refused(NONE, "batch-size 1 is larger than the training set of 0 images")
    refused([*MACHINE, "--checkpoint", tmp_path / "no.pt"], "no.pt not found")

    backbone = common.resnet("resnet-tiny")
    with torch.no_grad():
        backbone.layer4[0].conv2.weight[0, 0, 0, 0] = math.nan
    torch.save(backbone.state_dict(), tmp_path / "nan.pt")
    monkeypatch.setitem(common.SOURCES, "shapes", source(seen | True))
    refused([*MACHINE, "--checkpoint", tmp_path / "nan.pt", "--dataset", "shapes"],
            f"checkpoint {tmp_path}/nan.pt: its features are not finite", status=1)


def test_results_of_other_flags_are_kept(tmp_path, refused):
    run(tmp_path, "--checkpoint", "none", name="o.json")
    refused([*NONE, "--ridge", "0.01"], "holds results with other flags (--ridge 1e-06 -> 0.01)")
    refused([*NONE, "--data-dir", "b"], "holds results with other flags (--data-dir data -> b)")
    (tmp_path / "o.json").write_text("{}")
    refused(NONE, "is no file of this script")

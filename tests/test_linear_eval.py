"""linear_eval.py: what it loads, which rows it takes, what it trains, and what it writes."""
import argparse
import collections
import datetime
import json
import math
import pathlib
from unittest import mock

import numpy as np
import pytest
import ranks
import torch
import torch.nn.functional as F
import torchvision
from conftest import write_folder
from PIL import Image
from ranks import blob_tables, close
from torch import nn

import clinfonce
import common
import linear_eval

MACHINE = ["--device", "cpu", "--threads", "1", "--workers", "0"]
CPU = torch.device("cpu")


def quick(argv):
    """Flags of a small evaluation; those of the fast probe where it is the mode."""
    flags, recipe = [*MACHINE], "--recipe" in argv and argv[argv.index("--recipe") + 1]
    if "features" not in argv:
        flags += ["--epochs", "3"]
    if "--mode" not in argv and recipe in (False, "fast") and (recipe or "--fraction" not in argv):
        for grid in (["--lrs", "3", "30"], ["--weight-decays", "0", "1e-4"]):
            flags += grid * (grid[0] not in argv)
    return [*flags, *argv]


def shapes_tables(args):
    def table(n, seed):
        images, columns, classes, captions = common.shapes(n, seed)
        return common.Table(columns, classes, images)
    return table(240, 0), table(96, 1)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A built-in data set of 240 + 96 images: 24 classes of 10 and 4."""
    monkeypatch.setitem(common.SOURCES, "shapes", shapes_tables)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Folder of a finished clinfonce run: ResNet-18, imagenet stem, 32 of the images."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(common.SOURCES, "shapes", shapes_tables)
        clinfonce.main([*MACHINE, "--arch", "resnet18", "--limit-train", "48", "--batch-size", "16",
                        "--epochs", "1", "--seed", "3", "--label", "coarse", "--clusters",
                        "instance", "--lr", "0.01", "--out", str(folder)])
    return folder


def flags(*argv):
    return common.EvaluationParser.parse_args(build_parser(), [*MACHINE, *argv])


def build_parser():
    """The parser that main makes."""
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "run", lambda train, parser, argv: made.append(parser))
        linear_eval.main([])
    return made[0]


def run(tmp_path, *argv, name="out.json"):
    linear_eval.main(quick(["--out", str(tmp_path / name), *argv]))
    return json.loads((tmp_path / name).read_text())


def fails(capsys, *argv, status=2):
    """The one line of an error."""
    with pytest.raises(SystemExit) as stopped:
        linear_eval.main(quick(argv))
    text = capsys.readouterr().err.strip()
    last = text.split("\n")[-1]
    assert stopped.value.code == status and "Traceback" not in text
    return last


def network(arch, stem, seed):
    """A backbone whose BatchNorm has statistics that are not the initial ones."""
    torch.manual_seed(seed)
    backbone = common.resnet(arch, stem).train()
    with torch.no_grad():
        backbone(torch.randn(4, 3, 32, 32))
    return backbone.eval()


def prefixed(prefix, backbone):
    return {prefix + k: v for k, v in backbone.state_dict().items()}


# ---------------------------------------------------------------------------------- checkpoints


def moco(q, k):
    return dict(epoch=9, arch="resnet", state_dict={
        **prefixed("module.encoder_q.", q), "module.encoder_q.fc.0.weight": torch.ones(2, 2),
        **prefixed("module.encoder_k.", k), "module.queue": torch.ones(2)})


def sequential(resnet, *without):
    """State dict of nn.Sequential of the children of a ResNet."""
    return nn.Sequential(*(m for n, m in resnet.named_children() if n not in ("fc", *without))
                         ).state_dict()


TWO = ("moco", "key encoder first", "student and teacher", "BYOL", "k_encoder first")
FORMATS = {  # name: (arch, stem, file of (network, another network), prefix, left out)
    "torchvision": ("resnet50", "imagenet", lambda q, k: dict(
        q.state_dict(), **{"fc.weight": torch.ones(3, 2048), "fc.bias": torch.ones(3)}),
        "", {"fc": 2}),
    "torchvision without fc": ("resnet34", "imagenet", lambda q, k: q.state_dict(), "", {}),
    "moco": ("resnet18", "imagenet", moco, "module.encoder_q.",
             {"module.encoder_k": 120, "module.encoder_q.fc": 1, "module.queue": 1}),
    "own": ("resnet-tiny", "imagenet", lambda q, k: dict(
        format=1, method="x", step=3, args={}, state=dict(
            model={**prefixed("backbone.", q), "head.weight": torch.ones(1)},
            optimizer=dict(state={}))), "backbone.", {"head": 1}),
    "encoder": ("resnet-tiny", "imagenet", lambda q, k: dict(  # Cl-InfoNCE: flags as a Namespace
        opt=argparse.Namespace(lr=0.1, name="x", crop=[1, 2]), epoch=4,
        model={**prefixed("encoder.", q), "head.0.bias": torch.ones(1)}), "encoder.", {"head": 1}),
    "encoder.module": ("resnet-tiny", "imagenet",
                       lambda q, k: dict(model=prefixed("encoder.module.", q)),
                       "encoder.module.", {}),
    "key encoder first": ("resnet-tiny", "imagenet", lambda q, k: dict(model={  # RINCE
        **prefixed("module.backbone_k.", k), **prefixed("module.backbone_q.", q)}),
        "module.backbone_q.", {"module.backbone_k": 72}),
    "net": ("resnet-tiny", "imagenet", lambda q, k: dict(model={  # WCL
        **prefixed("module.net.", q), "module.head1.0.weight": torch.ones(1)}),
        "module.net.", {"module.head1": 1}),
    "shortcut": ("resnet18", "cifar", lambda q, k: dict(model={
        k.replace("downsample", "shortcut"): v for k, v in prefixed("encoder.", q).items()}),
        "encoder.", {}),
    "student and teacher": ("resnet-tiny", "imagenet", lambda q, k: dict(  # dicts of dicts
        epoch=3, teacher=k.state_dict(), student=q.state_dict(), args=dict(
            lr=np.float64(0.1), seed=np.int64(3), data=pathlib.Path("/a/b"), curve=np.ones(3),
            kinds={"a"}, text=np.str_("x"), date=datetime.datetime(2020, 1, 1),
            flags=argparse.Namespace(out=pathlib.PurePosixPath("c"), counts=collections.defaultdict(
                list)))), "student/", {}),
    "BYOL": ("resnet18", "imagenet", lambda q, k: dict(  # numbered layers
        target_network_state_dict=sequential(k), online_network_state_dict={
            **{"encoder." + n: v for n, v in sequential(q).items()}, "projection.net.0.bias":
            torch.ones(3)}, optimizer_state_dict=dict(state={0: dict(exp_avg=torch.ones(3))})),
        "online_network_state_dict/encoder.", {"projection": 1}),
    "numbered, cifar": ("resnet18", "cifar", lambda q, k: dict(net={  # without maxpool
        f"f.{n}": v for n, v in sequential(q, "maxpool").items()}), "net/f.", {}),
    "VISSL": ("resnet-tiny", "imagenet", lambda q, k: dict(
        iteration=7, classy_state_dict=dict(base_model=dict(model=dict(
            heads=prefixed("0.clf.", nn.Linear(2, 2)), trunk=prefixed("_feature_blocks.", q))))),
        "classy_state_dict/base_model/model/trunk/_feature_blocks.", {}),
    "k_encoder first": ("resnet-tiny", "imagenet", lambda q, k: dict(model_state_dict={
        **prefixed("k_encoder.", k), **prefixed("q_encoder.", q)}), "model_state_dict/q_encoder.",
        {"k_encoder": 72}),
    "no counters": ("resnet-tiny", "imagenet", lambda q, k: {
        k: v for k, v in q.state_dict().items() if "num_batches" not in k}, "", {}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_network(name, tmp_path):
    arch, stem, make, prefix, left_out = FORMATS[name]
    q, k = network(arch, stem, 1), network(arch if name in TWO else "resnet-tiny", stem, 2)
    torch.save(make(q, k), tmp_path / "file.pt")
    checkpoint = common.load_checkpoint(str(tmp_path / "file.pt"))
    loaded, about = common.load_backbone("file", checkpoint)
    assert (about["arch"], about["stem"], about["prefix"]) == (arch, stem, prefix)
    assert about["left_out"] == left_out
    counters = [n for n in q.state_dict() if "num_batches" in n]
    assert about["missing"] == (counters if name == "no counters" else [])
    assert about["loaded"] == len(q.state_dict()) - len(about["missing"])
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.eval()(x), q(x))
    assert name not in TWO or not torch.equal(loaded(x), k(x))


@pytest.mark.parametrize("slow, fast", [
    ("keyEncoder.", "queryEncoder."), ("encoder_k.", "encoder_q."), ("ema.", "net."),
    ("ema_model.module.", "model.module."), ("momentum_encoder.", "base_encoder."),
    ("target_encoder.net.", "online_encoder.net."), ("teacher.backbone.", "student.backbone."),
    ("slow_net.", "fast_net."), ("momentum_contrast.encoder_k.", "momentum_contrast.encoder_q."),
    ("mean_model.teacher.", "mean_model.student."),
    ("model_ema.", "model."), ("netK.", "netQ."), ("encoder.k.", "encoder.q.")])
@pytest.mark.parametrize("nested", [False, True])
def test_of_two_networks_the_trained_one_is_taken(slow, fast, nested):
    q, k = (network("resnet-tiny", "imagenet", seed).state_dict() for seed in (1, 2))
    for first, second in ((slow, fast), (fast, slow)):
        both = {p: k if p == slow else q for p in (first, second)}
        if not nested:
            both = {p + n: x for p, state in both.items() for n, x in state.items()}
        loaded = common.load_backbone("file", dict(epoch=1, state_dict=both))[0].state_dict()
        assert all(torch.equal(loaded[n], q[n]) for n in q)


def test_a_network_that_fits_equally_well_is_named():
    last, best = (network("resnet-tiny", "imagenet", seed).state_dict() for seed in (1, 2))
    loaded, about = common.load_backbone("file", dict(last=last, best=best))
    assert torch.equal(loaded.conv1.weight, last["conv1.weight"]) and about["rivals"] == ["best/"]
    assert "'best/*' fits equally well" in common.describe_weights("file", about)
    about = common.load_backbone("file", dict(model=last, model_ema=best))[1]
    assert about["rivals"] == [] and "equally" not in common.describe_weights("file", about)


def test_files_that_do_not_fit(tmp_path, capsys):
    file = tmp_path / "file.pt"
    state = network("resnet18", "imagenet", 1).state_dict()

    def error(content, *argv):
        torch.save(content, file)
        line = fails(capsys, "--checkpoint", str(file), *argv)
        assert str(file) in line
        return line

    args = common.flags_dict(common.Parser("sogclr_clip", "", {"demo": {}}).parse_args([]))
    assert "python sogclr_clip.py --evaluate" in error(dict(
        format=1, method="sogclr_clip", args=args, state={}))
    assert "no weight fits a ResNet; it holds visual.a, b" in error({
        "visual.a": torch.ones(2), "b": torch.ones(1)})
    assert "it holds no tensor under its keys epoch, model" in error({"epoch": 1, "model": {}})
    many = {f"layer.{i}": torch.ones(1) for i in range(9)}
    assert "it holds trunk/layer.0, trunk/layer.1," in error(dict(epoch=1, trunk=many))
    for value, kind in ((torch.nn.Identity(), "torch.nn.modules.linear.Identity"),
                        (collections.deque([1]), "collections.deque")):
        assert f"cannot be read: it holds a {kind}, which could run code" in error(
            dict(state, epoch=value))
    assert "holds a Tensor, no weights" in error(torch.ones(3))
    assert "1 weights missing, layer4.1.bn2.running_var" in error({
        k: v for k, v in state.items() if k != "layer4.1.bn2.running_var"})
    assert "1 weights of another shape, layer2.0.conv1.weight" in error({
        **state, "layer2.0.conv1.weight": torch.ones(128, 64, 1, 1)})
    assert "no resnet50 with imagenet stem" in error(state, "--arch", "resnet50")
    assert "no resnet18 with cifar stem: 1 weights of another shape, conv1.weight" in error(
        state, "--arch", "resnet18", "--stem", "cifar")
    assert "left over, layer4.2.conv1.weight" in error({
        **state, "layer4.2.conv1.weight": torch.ones(1)})  # a deeper network
    assert "cannot be read" in error({"model": pytest.raises})  # weights_only: no code is loaded
    torch.save(state, file)
    file.write_bytes(file.read_bytes()[:5000])
    assert f"{file} cannot be read (truncated" in fails(capsys, "--checkpoint", str(file))
    assert "gone.pt not found" in fails(capsys, "--checkpoint", str(tmp_path / "gone.pt"))
    assert "--checkpoint" in fails(capsys)
    assert list(tmp_path.iterdir()) == [file]


def test_trained_resnet18_loads_into_torchvision(trained):
    model = torch.load(trained / "checkpoint.pt", weights_only=True)["state"]["model"]
    weights = {k.removeprefix("backbone."): v for k, v in model.items() if "backbone." in k}
    theirs = torchvision.models.resnet18(weights=None)
    fc = {"fc." + k: v for k, v in theirs.fc.state_dict().items()}
    theirs.load_state_dict({**weights, **fc}, strict=True)
    theirs.fc = torch.nn.Identity()
    ours = common.load_backbone("", dict(model=model))[0]
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(theirs.eval()(x), ours.eval()(x))


def test_checkpoint_alone_brings_its_flags(trained, tmp_path, capsys):
    linear_eval.main(quick(["--checkpoint", str(trained / "checkpoint.pt")]))
    record = json.loads((trained / "linear_eval-fast-coarse.json").read_text())
    assert (record["method"], record["step"], record["seed"]) == ("clinfonce", 3, 3)
    assert record["data"] == dict(train=48, test=96, classes=6, notes=[
        "kNN: K = 48, all training images, not 200"])
    assert record["backbone"]["loaded"] == 120 and record["backbone"]["arch"] == "resnet18"
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    knn = [line["knn_top1"] for line in log if "knn_top1" in line]
    assert record["results"]["knn"]["top1"] == pytest.approx(knn[-1])
    lines = capsys.readouterr().out.splitlines()
    assert ("120 tensors of resnet18, imagenet stem, loaded from 'backbone.*'; left out: head (4)"
            in lines[0])
    assert lines[1].startswith("from the checkpoint, as not typed: --")
    for flag in ("--limit-train 48", "--label coarse", "--seed 3", "--dataset shapes"):
        assert flag in lines[1]
    # the untrained network of the same seed is the one that the run began with
    base = run(tmp_path, "--checkpoint", "none", "--arch", "resnet18", "--limit-train", "48",
               "--label", "coarse", "--seed", "3")
    assert base["results"]["knn"]["top1"] == pytest.approx(knn[0])
    args = flags("--checkpoint", str(trained / "checkpoint.pt"), "--label", "pattern",
                 "--limit-train", "24")
    assert (args.label, args.limit_train, args.seed, args.dataset) == ("pattern", 24, 3, "shapes")
    other = flags("--checkpoint", str(trained / "checkpoint.pt"), "--dataset", "cifar10")
    assert (other.label, other.limit_train, other.seed) == ("label", None, 3)


# ---------------------------------------------------------------------------------- rows


def uneven(args):
    """Classes 3 (30 images), 5 (3), 7 (20), 4 without label; test: 3, 5, 7, 9, none."""
    def table(*counts):
        labels = torch.cat([torch.full((n,), c) for c, n in counts])
        images = common.shapes(len(labels), 0, size=16)[0]
        return common.Table(dict(label=labels), dict(label=[f"class {i}" for i in range(10)]),
                            images)
    return table((3, 30), (5, 3), (7, 20), (-1, 4)), table((7, 4), (5, 2), (9, 3), (3, 5), (-1, 1))


def test_min_per_class(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(common.SOURCES, "shapes", uneven)
    args = flags("--checkpoint", "none", "--min-per-class", "20")
    data, names, notes = linear_eval.load_labelled(args, CPU)
    assert names == ["class 3", "class 7"]
    assert data.train.columns["label"].tolist() == [0] * 30 + [1] * 20
    assert data.test.columns["label"].tolist() == [1] * 4 + [0] * 5
    assert data.test.index.tolist() == [0, 1, 2, 3, 9, 10, 11, 12, 13]
    assert notes[0].startswith("7 of 57 training images") and "6 of 15 test images" in notes[1]
    data, names, _ = linear_eval.load_labelled(flags("--checkpoint", "none"), CPU)
    assert names == ["class 3", "class 5", "class 7"] and len(data.test) == 11
    line = fails(capsys, "--checkpoint", "none", "--min-per-class", "25", "--out",
                 str(tmp_path / "x.json"))
    assert "--min-per-class 25" in line and "1 classes" in line and not list(tmp_path.iterdir())


def test_fraction(capsys, tmp_path):
    def rows(*argv):
        return linear_eval.load_labelled(flags("--checkpoint", "none", *argv), CPU)[0].train

    some = rows("--fraction", "0.2", "--batch-size", "8")
    assert torch.bincount(some.columns["label"]).tolist() == [2] * 24
    assert torch.equal(some.index, rows("--fraction", "0.2", "--batch-size", "8").index)
    assert not torch.equal(some.index, rows("--fraction", "0.2", "--batch-size", "8", "--seed",
                                            "1").index)
    assert len(rows("--fraction", "0.3", "--recipe", "fast")) == 72
    assert flags("--checkpoint", "none", "--fraction", "0.01").recipe == "semi-1"
    assert flags("--checkpoint", "none", "--fraction", "0.1").recipe == "semi-10"
    assert flags("--checkpoint", "none", "--recipe", "semi-1").fraction == 0.01
    for bad in ("0", "1.5", "-0.1"):
        assert f"--fraction {float(bad)} is not in (0, 1]" in fails(
            capsys, "--checkpoint", "none", f"--fraction={bad}")
    assert "2 of 240 training images leave some of the 24 classes" in fails(
        capsys, "--checkpoint", "none", "--fraction", "0.01")


def test_subset(tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("7\n\n200\n12\n")
    argv = ["--checkpoint", "none", "--recipe", "fast", "--subset", str(names)]
    data = linear_eval.load_labelled(flags(*argv), CPU)[0]
    assert data.train.index.tolist() == [7, 12, 200]
    names.write_text("7\ncat.png\n")
    assert "line 2: 'cat.png' names no labelled training image" in fails(capsys, *argv)
    names.write_text("\n")
    assert "names no image" in fails(capsys, *argv)
    assert "not found" in fails(capsys, *argv[:-1], str(tmp_path / "gone.txt"))
    assert "needs a --recipe" in fails(capsys, "--checkpoint", "none", "--subset", str(names))

    root = tmp_path / "images"  # files: by name, or by path where a name occurs twice
    for split, n in (("train", 3), ("val", 1)):
        for c in "ab":
            (root / split / c).mkdir(parents=True)
            for i in range(n):
                name = f"{i}.png" if i else f"{c}{i}.png"
                Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(root / split / c / name)
    argv += ["--dataset", "folder", "--data-dir", str(root)]
    names.write_text("b0.png\ntrain/a/1.png\n")
    data = linear_eval.load_labelled(flags(*argv), CPU)[0]
    assert [p[-7:] for p in data.train.paths] == ["a/1.png", "/b0.png"]
    names.write_text("1.png\n")
    assert "'1.png' names no labelled training image, or two" in fails(capsys, *argv)


def test_bad_flags(tmp_path, capsys):
    none = ["--checkpoint", "none", "--out", str(tmp_path / "x.json")]
    assert "no column 'colr'; the data set has: label" in fails(capsys, *none, "--label", "colr")
    assert "no column 'colr'" in fails(capsys, *none, "--retrieval-labels", "colr")
    assert "--knn-k 300: there are 240" in fails(capsys, *none, "--knn-k", "300")
    assert "--recipe simclr: there are fast" in fails(capsys, *none, "--recipe", "simclr")
    assert "--batch-size 256 is larger" in fails(capsys, *none, "--recipe", "moco")
    assert "--optimizer lars" in fails(capsys, *none, "--optimizer", "lars")
    assert not list(tmp_path.iterdir())


def test_small_bank(tmp_path, capsys):
    """R@k of more rows than a column has is left out, with a note."""
    record = run(tmp_path, "--checkpoint", "none", "--label", "pattern", "--limit-train", "16")
    note = "column pattern: R@20 left out, as only 16 training images have a value"
    assert record["data"]["notes"][0] == note and note in capsys.readouterr().out
    assert list(record["results"]["retrieval"]["pattern"]) == ["R@1", "R@5", "R@10", "mAP@R"]


def test_columns_of_one_split(tmp_path, capsys, monkeypatch):
    """A column that one file lacks, or has without values: the flag and the file are named."""
    def tables(args):
        train, test = shapes_tables(args)
        train.columns["only"] = test.columns.pop("pattern")[:240].repeat(3)[:240]
        train.columns["huge"] = train.columns["colour"] * 10 ** 12
        test.columns["huge"] = test.columns["colour"] * 10 ** 12
        test.columns["none"] = torch.full((96,), -1)
        train.columns["none"] = torch.arange(240) % 2
        train.source, test.source = "a.npz", "b.npz"
        return train, test

    monkeypatch.setitem(common.SOURCES, "npz", tables)
    two = ["--checkpoint", "none", "--dataset", "npz", "--train-file", "a.npz", "--test-file",
           "b.npz", "--out", str(tmp_path / "x.json")]
    for argv in (["--label", "only"], ["--retrieval-labels", "coarse", "only"]):
        assert "no column 'only' in b.npz; the data set has: " in fails(capsys, *two, *argv)
    assert "--retrieval-labels none: no image of b.npz has a value" in fails(
        capsys, *two, "--retrieval-labels", "none")
    assert not (tmp_path / "x.json").exists()
    # ids may be of any size: the figures are those of the ids from 0
    one = run(tmp_path, *two[:-2], "--label", "colour", "--retrieval-labels", "huge",
              name="one.json")["results"]
    other = run(tmp_path, *two[:-2], "--label", "huge", name="two.json")["results"]
    assert one["retrieval"]["huge"] == one["retrieval"]["colour"] == other["retrieval"]["huge"]
    assert one["knn"] == other["knn"] and one["probe"] == other["probe"]


def test_networks_that_are_not_finite_give_no_figures(tmp_path, capsys, monkeypatch):
    """A weight, or a statistic: of infinite variance or mean ReLU makes finite features."""
    file = tmp_path / "file.pt"
    argv = ["--checkpoint", str(file), "--dataset", "shapes", "--out", str(tmp_path / "x.json")]
    for name, value in (("layer4.0.conv2.weight", math.nan), ("layer1.0.bn1.running_var", math.inf),
                        ("bn1.running_mean", math.inf), ("layer2.0.bn1.bias", -math.inf)):
        state = network("resnet-tiny", "imagenet", 1).state_dict()
        state[name].view(-1)[0] = value
        torch.save(state, file)
        line = fails(capsys, *argv, status=1)
        assert f"checkpoint {file}: its features are not finite: " in line
        assert line.endswith(name) and ("of 240 rows (the first: row 0), " in line) == (
            "conv2" in name), line
    # the fast probe diverges, or one point of its grid
    none = ["--checkpoint", "none", "--out", str(tmp_path / "x.json"), "--weight-decays", "1e30",
            "--lrs", "1e30"]
    assert "fast probe with lr 1e+30: the logits are not finite" in fails(capsys, *none, status=1)
    linear_eval.main(quick([*none, "1e-30"]))
    choice = json.loads((tmp_path / "x.json").read_text())["results"]["choice"]
    assert choice["lr"] == 1e-30 and choice["grid"][0]["validation_top1"] == 0
    line = fails(capsys, "--checkpoint", "none", "--out", str(tmp_path / "y.json"), "--recipe",
                 "cifar", "--batch-size", "48", "--lr", "1e38", status=1)
    assert "the loss is" in line and "; a smaller --lr" in line  # there is no checkpoint to keep


# ---------------------------------------------------------------------------------- fast probe


def test_fast_probe_separates_what_is_separable():
    g = torch.Generator().manual_seed(0)
    y, y_test = torch.arange(200) % 5, torch.arange(100) % 5
    means = 3 * torch.randn(5, 12, generator=g) + 7
    # features of very different scales, one of them constant
    scale = 10.0 ** torch.arange(-3, 9).float()
    x, x_test = (scale * (means[t] + 0.3 * torch.randn(len(t), 12, generator=g))
                 for t in (y, y_test))
    x[:, 3] = x_test[:, 3] = 5.0
    args = argparse.Namespace(epochs=10, batch_size=32, momentum=0.9, seed=0,
                              lrs=[0.0, 10.0], weight_decays=[0.0, 1e-5])
    standardize = linear_eval.standardizer(x)
    rows = standardize(x, torch.arange(200), y.device)
    assert rows.shape == (200, 13) and torch.equal(rows[:, 12], torch.ones(200))
    assert rows[:, :12].square().sum(1).mean().item() == pytest.approx(11 / 12, rel=1e-4)
    chosen = linear_eval.choose_hyperparameters(x, y, standardize, 5, args)
    assert chosen["lr"] == 10.0 and chosen["validation_top1"] == 100.0
    assert chosen["held_out"] == 40 and len(chosen["grid"]) == 4
    assert chosen["grid"][0] == dict(lr=0.0, weight_decay=0.0, validation_top1=20.0)
    W = linear_eval.fit_softmax_regression(x, y, torch.arange(200), standardize, 5,
                                           [(chosen["lr"], 0.0)], args)[:, 0]
    logits = standardize(x_test, torch.arange(100), y.device) @ W
    assert common.accuracy(logits, y_test) == [100.0]


def test_fit_is_softmax_regression():
    """A long fit ends where the gradient of the regularised mean loss vanishes."""
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(60, 4, generator=g), torch.randint(3, (60,), generator=g)
    args = argparse.Namespace(epochs=400, batch_size=60, momentum=0.9, seed=0)
    standardize, rows = linear_eval.standardizer(x), torch.arange(60)
    W = linear_eval.fit_softmax_regression(x, y, rows, standardize, 3, [(5.0, 0.01), (5.0, 0.1)],
                                           args)
    xs = standardize(x, rows, CPU)
    for i, decay in enumerate((0.01, 0.1)):
        w = W[:, i].clone().requires_grad_()
        loss = F.cross_entropy(xs @ w, y) + decay / 2 * w[:-1].square().sum()
        loss.backward()
        assert w.grad.abs().max() < 1e-5 and w[:-1].abs().max() > 0.01
    # two steps by hand, at the rate and at half of it
    args.epochs, args.momentum = 2, 0.0
    w = torch.zeros(5, 3, requires_grad=True)
    for lr in (5.0, 2.5):
        slope = torch.autograd.grad(F.cross_entropy(xs @ w, y), w)[0]
        w = (w - lr * slope).detach().requires_grad_()
    two = linear_eval.fit_softmax_regression(x, y, rows, standardize, 3, [(5.0, 0.0)],
                                             args)[:, 0]
    assert torch.allclose(two, w, atol=1e-6)


def test_test_labels_do_not_choose(tmp_path, monkeypatch):
    one = run(tmp_path, "--checkpoint", "none", "--label", "coarse")

    def permuted(args):
        train, test = shapes_tables(args)
        test.columns["coarse"] = test.columns["coarse"].flip(0)
        return train, test

    monkeypatch.setitem(common.SOURCES, "shapes", permuted)
    two = run(tmp_path, "--checkpoint", "none", "--label", "coarse", name="two.json")
    assert one["results"]["choice"] == two["results"]["choice"]
    assert one["results"]["probe"] != two["results"]["probe"]
    # nor do test images: held-out rows are 20 % of each class of the training images
    assert one["results"]["choice"]["held_out"] == 6 * 8


def test_json_against_a_recomputation_by_hand(tmp_path):
    record = run(tmp_path, "--checkpoint", "none", "--retrieval-labels", "colour", "--knn-k", "7")
    torch.manual_seed(0)
    backbone = common.resnet("resnet-tiny").eval()
    train, test = shapes_tables(None)
    with torch.no_grad():
        x, q = (F.normalize(backbone((t.images / 255 - 0.5) / 0.25), dim=1) for t in (train, test))
    sims = (q.double() @ x.double().T).numpy()
    y, y_test = train.columns["label"].numpy(), test.columns["label"].numpy()
    knn = 0
    for i in range(96):
        score = np.zeros(24)
        for j in np.argsort(-sims[i])[:7]:
            score[y[j]] += math.exp(sims[i, j] / 0.07)
        knn += score.argmax() == y_test[i]
    results = record["results"]
    assert results["knn"]["top1"] == pytest.approx(100 * knn / 96)
    for name in ("label", "colour"):
        same = train.columns[name].numpy()[np.argsort(-sims)] == test.columns[name].numpy()[:, None]
        for k in (1, 5, 10, 20):
            assert results["retrieval"][name][f"R@{k}"] == pytest.approx(
                100 * same[:, :k].any(1).mean())
        average = []
        for row in same:
            R = row.sum()
            average.append(sum(row[:i + 1].mean() for i in range(R) if row[i]) / R)
        assert results["retrieval"][name]["mAP@R"] == pytest.approx(100 * np.mean(average))
    assert results["probe"].keys() == {"top1", "top5"} and record["script"] == "linear_eval.py"
    best = max(results["choice"]["grid"], key=lambda point: point["validation_top1"])
    assert all(results["choice"][k] == v for k, v in best.items())
    assert record["versions"]["torch"] == torch.__version__ and record["seconds"] > 0
    assert record["command"].startswith("linear_eval.py --device cpu") and record["step"] is None


def test_equal_runs_and_files_of_others(tmp_path, capsys):
    one = run(tmp_path, "--checkpoint", "none")
    two = run(tmp_path, "--checkpoint", "none")  # an equal run may overwrite its own file
    assert one.pop("seconds") and two.pop("seconds") and one == two
    out = ["--checkpoint", "none", "--out", str(tmp_path / "out.json")]
    before = (tmp_path / "out.json").read_bytes()
    assert "other flags (--seed 0 -> 1)" in fails(capsys, *out, "--seed", "1")
    assert (tmp_path / "out.json").read_bytes() == before
    for foreign in ('{"a": 1}', "[1]", "no json", '{"script": "x.py", "args": {}}',
                    '{"script": "linear_eval.py", "args": [1]}'):
        (tmp_path / "out.json").write_text(foreign)
        assert "out.json is no file of this script" in fails(capsys, *out)
        assert (tmp_path / "out.json").read_text() == foreign
    (tmp_path / "file").write_text("")
    assert "cannot be written" in fails(capsys, *out[:-1], str(tmp_path / "file" / "x.json"))


# ---------------------------------------------------------------------------------- SGD probe

S = 10  # steps an epoch
RATES = [  # recipe, step, rate of the linear layer
    ("clinfonce", 0, 3e-4 + 0.5 * (0.3 - 3e-4) * (1 + math.cos(math.pi / 100))),
    ("clinfonce", S - 1, 3e-4 + 0.5 * (0.3 - 3e-4) * (1 + math.cos(math.pi / 100))),
    ("clinfonce", 50 * S - 1, 3e-4 + 0.5 * (0.3 - 3e-4)), ("clinfonce", 100 * S - 1, 3e-4),
    ("clinfonce-dual", 0, 3.2), ("clinfonce-dual", 40 * S, 1.6),
    ("clinfonce-dual", 80 * S - 1, 1.6 * (1 + math.cos(math.pi * (80 * S - 1) / (80 * S)))),
    ("wcl", 0, 3.2), ("wcl", 20 * S, 1.6 * (1 + math.cos(math.pi / 4))),
    ("cifar", 0, 5.0), ("cifar", 60 * S - 1, 5.0), ("cifar", 60 * S, 1.0),
    ("cifar", 75 * S - 1, 1.0), ("cifar", 75 * S, 0.2), ("cifar", 90 * S, 0.04),
    ("moco", 60 * S - 1, 30.0), ("moco", 60 * S, 3.0), ("moco", 80 * S - 1, 3.0),
    ("moco", 80 * S, 0.3), ("semi-1", 12 * S - 1, 5.0), ("semi-1", 12 * S, 1.0),
    ("semi-1", 16 * S, 0.2), ("semi-10", 0, 0.2), ("semi-10", 19 * S, 0.008),
]


def test_rates_of_the_recipes():
    parsed = {name: flags("--checkpoint", "none", "--recipe", name) for name in linear_eval.RECIPES}
    for name, step, value in RATES:
        lr = linear_eval.learning_rate(step, S, parsed[name].lr, parsed[name])
        assert lr == pytest.approx(value), (name, step)
    of = {name: (a.epochs, a.batch_size, a.momentum, a.nesterov, a.weight_decay, a.init_std)
          for name, a in parsed.items()}
    assert of["clinfonce"] == (100, 128, 0.95, True, 1e-4, 0.0)
    assert of["clinfonce-dual"] == of["wcl"] == (80, 4096, 0.9, True, 0.0, 0.01)
    assert of["cifar"] == (100, 512, 0.9, False, 0.0, 0.0)
    assert of["moco"] == (100, 256, 0.9, False, 0.0, 0.01)
    assert of["semi-1"] == of["semi-10"] == (20, 256, 0.9, False, 0.0, 0.0)
    assert (parsed["semi-1"].lr_backbone, parsed["semi-10"].lr_backbone) == (0.02, 0.01)
    scaled = flags("--checkpoint", "none", "--recipe", "wcl", "--batch-size", "512")
    assert scaled.lr == pytest.approx(0.4)
    assert flags("--checkpoint", "none", "--recipe", "wcl", "--lr", "7").lr == 7
    for name in ("clinfonce-dual", "cifar", "moco", "wcl", "semi-1"):  # crop and flip only
        aug = common.augmentation(parsed[name])
        assert aug["jitter_p"] == aug["gray"] == aug["blur"] == 0 and aug["flip"] == 0.5
    assert common.augmentation(parsed["clinfonce"])["jitter_p"] == 0.8


@pytest.mark.parametrize("recipe, rate", [("cifar", "1"), ("semi-10", "0.01"), ("semi-10", "0")])
def test_only_fine_tuning_changes_the_backbone(recipe, rate, tmp_path, monkeypatch):
    seen = []

    def catch(*given):
        seen.append(original(*given))
        seen.append({k: v.clone() for k, v in seen[0][0].state_dict().items()})
        return seen[0]

    original = common.load_backbone
    monkeypatch.setattr(common, "load_backbone", catch)
    file = tmp_path / "file.pt"
    torch.save(network("resnet-tiny", "imagenet", 5).state_dict(), file)
    record = run(tmp_path, "--checkpoint", str(file), "--recipe", recipe, "--epochs", "2",
                 "--batch-size", "48", "--fraction", "0.5", "--label", "coarse", *(
                     ["--lr-backbone", rate] if recipe == "semi-10" else []))
    (backbone, _), before = seen
    after = backbone.state_dict()
    statistics = {k for k in before if "running" in k or "num_batches" in k}
    assert {k for k in before if not torch.equal(before[k], after[k])} == (
        set() if recipe == "cifar" else statistics if rate == "0" else set(before))
    # the backbone is in training mode at every step of fine-tuning, and at none of the probe
    assert after["bn1.num_batches_tracked"] == (1 if recipe == "cifar" else 1 + 4)
    assert record["protocol"] == ("SwAV-style" if recipe == "semi-10" else "recipe cifar")
    results = record["results"]
    assert [e["epoch"] for e in results["epochs"]] == [1, 2] and record["data"]["train"] == 120
    assert results["last"] == results["epochs"][-1] and results["best_on_test"] in results["epochs"]
    assert results["best_on_test"]["top1"] == max(e["top1"] for e in results["epochs"])
    assert results["last"]["lr"] == (0.2 if recipe == "semi-10" else 5.0)  # the layer's
    if recipe == "cifar":
        check_two_steps(results["epochs"], file)


def check_two_steps(epochs, file):
    """The same by hand: torch's own SGD on features that are not normalised."""
    args = flags("--checkpoint", str(file), "--recipe", "cifar", "--epochs", "2", "--batch-size",
                 "48", "--fraction", "0.5", "--label", "coarse")
    data = linear_eval.load_labelled(args, CPU)[0]
    backbone = common.load_backbone("", common.load_checkpoint(str(file)))[0].eval()
    torch.manual_seed(args.seed)
    fc = torch.nn.Linear(128, 6)
    optimizer = torch.optim.SGD(fc.parameters(), 5.0, 0.9)
    losses = []
    for batch in data.batches(0, 4, common.augmentation(args), views=1):
        with torch.no_grad():
            h = backbone(common.augment(batch)[0])
        loss = F.cross_entropy(fc(h), data.train.columns["coarse"][batch.rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert [e["loss"] for e in epochs] == pytest.approx(
        [(losses[0] + losses[1]) / 2, (losses[2] + losses[3]) / 2], rel=1e-4)
    with torch.no_grad():
        right = fc(common.extract_features(backbone, data, data.test)).argmax(1)
    top1 = (right == data.test.columns["coarse"]).double().mean().item()
    assert epochs[-1]["top1"] == pytest.approx(100 * top1)


# ---------------------------------------------------------------------------------- micro-batches


def network_of(norm):
    """A small backbone; only with BatchNorm do the rows of a part meet."""
    torch.manual_seed(7)
    backbone = nn.Sequential(nn.Conv2d(3, 5, 3, 2), nn.BatchNorm2d(5) if norm else nn.Identity(),
                             nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    backbone.width = 5
    return backbone


def train(mode, norm, rows):
    """Weights and BatchNorm's statistics after two epochs of linear_eval.train_probe, 4 steps each,
    with at most `rows` rows of a process at a time (0: all), in float64; and the losses."""
    args = flags("--checkpoint", "none", "--recipe", "cifar" if mode == "linear" else "semi-10",
                 "--epochs", "2", "--batch-size", "16", "--image-size", "8", "--lr", "0.5",
                 "--lr-backbone", "0.3", *(["--micro-batch", str(rows)] if rows else []))
    trained = []

    def distribute(model, args):
        trained.append(model.double())
        for part in model:
            part.register_forward_pre_hook(lambda _, x: (x[0].double(),))
        return real(model, args)

    real = common.distribute
    with mock.patch.object(common, "distribute", distribute):
        data = common.Data(*blob_tables(args), args, CPU)
        results = linear_eval.train_probe(args, data, network_of(norm), 4, CPU)
    losses = torch.tensor([epoch["loss"] for epoch in results["epochs"]], dtype=torch.float64)
    return dict(trained[0].state_dict(), losses=losses)


def case_probe(folder):
    return {key: train(*key) for key in (
        *((mode, norm, 0) for mode in ("finetune", "linear") for norm in (True, False)),
        *(("finetune", True, rows) for rows in (8, 4, 2) if rows < 16 // common.world()),
        ("linear", True, 2), ("finetune", False, 3))}


def case_features(folder):
    """The npz, written 5 rows at a time, of a network without BatchNorm."""
    path = f"{folder}/features{common.world()}.npz"
    args = flags("--checkpoint", "none", "--image-size", "8", "--features", path, "--batch-size",
                 "16")
    data = common.Data(*blob_tables(args), args, CPU)
    with mock.patch.object(linear_eval, "PART", 5):
        linear_eval.write_features(args, data, network_of(False), "ab")
    if common.rank() > 0:
        return None
    with np.load(path) as file:
        found = {k: torch.from_numpy(file[k]) for k in file if k != "classes"}
    whole = common.extract_features(network_of(False), data, data.train) if common.world() == 1 \
        else None
    return found, whole, data.train.columns["label"]


CASES = dict(probe=case_probe, features=case_features)
results = ranks.pool(__name__)


@pytest.mark.parametrize("N", ranks.NS)
def test_parts_of_a_batch_give_the_same_training(results, N):
    """With BatchNorm k parts are k processes, without it parts and processes change nothing."""
    one, of_N = results[1][0]["probe"], results[N][0]["probe"]
    for key in ("linear", True, 0), ("linear", False, 0), ("finetune", False, 0):
        close(of_N[key], one[key])
    close(of_N["linear", True, 2], one["linear", True, 0])  # frozen, in evaluation mode
    close(of_N["finetune", False, 3], one["finetune", False, 0])  # 3 does not divide 16, 8 or 4
    close(of_N["finetune", True, 2], one["finetune", True, 2])
    for rows in (8, 4):
        whole = results[16 // rows][0]["probe"]["finetune", True, 0]  # one part a process
        if rows < 16 // N:
            close(of_N["finetune", True, rows], whole)
            # other parts do change the training
            weight = of_N["finetune", True, 0]["0.0.weight"]
            assert not torch.allclose(weight, whole["0.0.weight"], atol=1e-5)
    for key, state in of_N.items():  # all processes end with the same weights
        for rank in range(N):
            close(results[N][rank]["probe"][key]["0.0.weight"], state["0.0.weight"])


@pytest.mark.parametrize("N", ranks.NS)
def test_processes_write_one_file_of_features(results, N):
    found, whole, labels = results[N][0]["features"]
    one, whole, _ = results[1][0]["features"]
    assert found["train_features"].dtype == torch.float32
    close(found["train_features"], whole)
    close(found["test_features"], one["test_features"])
    assert torch.equal(found["train_labels"], labels)
    assert found["train_rows"].tolist() == list(range(len(labels)))


# ---------------------------------------------------------------------------------- files


def test_features_of_files(tmp_path, capsys, monkeypatch):
    """All images, with a label or without; paths; float16; the parts make the whole."""
    root = write_folder(tmp_path / "images", {"train/a": 3, "train/b": 4, "val/a": 2, "val/b": 1})
    argv = ["--checkpoint", "none", "--dataset", "folder", "--data-dir", str(root), "--mode",
            "features", "--features", str(tmp_path / "f.npz")]
    assert run(tmp_path, *argv, "--features-type", "float16")["results"] == {}
    out = capsys.readouterr().out
    assert f"  features                   {tmp_path}/f.npz" in out
    with np.load(tmp_path / "f.npz") as file:
        found = dict(file)
    assert found["train_features"].shape == (7, 128) and found["train_features"].dtype == "float16"
    assert found["test_paths"].tolist() == ["val/a/0000.png", "val/a/0001.png", "val/b/0000.png"]
    assert found["train_labels"].tolist() == [0] * 3 + [1] * 4
    assert found["test_rows"].tolist() == [0, 1, 2] and found["classes"].tolist() == ["a", "b"]
    data = common.load(flags(*argv, "--batch-size", "1"), CPU)
    torch.manual_seed(0)
    whole = common.extract_features(common.resnet("resnet-tiny"), data, data.test)
    np.testing.assert_allclose(found["test_features"], whole, rtol=1e-3)
    # of 1e30 float16 makes inf: refused, and the file is not written
    real = common.extract_features
    monkeypatch.setattr(common, "extract_features", lambda *a, **k: real(*a, **k) * 1e30)
    argv[-1] = str(tmp_path / "g.npz")
    line = fails(capsys, *argv, "--features-type", "float16", "--out", str(tmp_path / "g.json"),
                 status=1)
    assert "features as float16 are not finite" in line
    assert not list(tmp_path.glob("g.npz*"))
    monkeypatch.undo()
    argv[-1] = str(tmp_path / "f.npz")
    assert f"--features {tmp_path}/f.npz exists; name a new file" in fails(
        capsys, *argv, "--out", str(tmp_path / "new.json"))
    (tmp_path / "mine.png").write_bytes(b"mine")  # the name of the picture beside mine.json
    assert f"--picture {tmp_path}/mine.png exists; name a new file" in fails(
        capsys, "--checkpoint", "none", "--picture", "--out", str(tmp_path / "mine.json"))
    assert "--picture is not used by --mode features" in fails(capsys, *argv, "--picture")
    assert "--mode features writes --features or --embedding" in fails(
        capsys, "--checkpoint", "none", "--mode", "features", "--out", str(tmp_path / "n.json"))


def test_features_of_the_fast_mode(tmp_path):
    """Those that the figures were made of: of labelled rows, numbered from 0."""
    run(tmp_path, "--checkpoint", "none", "--features", str(tmp_path / "f.npz"), "--fraction",
        "0.5", "--recipe", "fast", "--embedding", str(tmp_path / "e.png"))
    with np.load(tmp_path / "f.npz") as file:
        assert file["train_features"].shape == (120, 128)
        assert file["test_features"].shape == (96, 128) and "train_paths" not in file
        data = linear_eval.load_labelled(flags(
            "--checkpoint", "none", "--fraction", "0.5", "--recipe", "fast"), CPU)[0]
        assert file["train_rows"].tolist() == data.train.index.tolist() != list(range(120))
        assert file["train_labels"].tolist() == data.train.columns["label"].tolist()
    with Image.open(tmp_path / "e.png") as picture:
        assert picture.size == (1140, 840)
        assert len(set(picture.convert("RGB").getdata())) > 100  # in colours


def test_class_names_beside_features(tmp_path, monkeypatch):
    """names[y[i]] is the class of row i, also where classes are left out, or have no names."""
    train, test = shapes_tables(None)
    labels, names = train.columns["label"], train.classes["label"]
    few = (labels == 1) | (labels == 20)
    train = train.select(torch.cat([(~few).nonzero()[:, 0], few.nonzero()[:, 0][:3]]))
    for table in (train, test):
        table.columns["id"] = table.columns["label"] + 100
    monkeypatch.setitem(common.SOURCES, "shapes", lambda args: (train, test))
    for label, true in (("label", lambda c: names[c]), ("id", lambda c: str(c + 100))):
        run(tmp_path, "--checkpoint", "none", "--min-per-class", "5", "--label", label,
            "--features", str(tmp_path / f"{label}.npz"), name=f"{label}.json")
        with np.load(tmp_path / f"{label}.npz") as file:
            assert len(file["classes"]) == 22
            found = file["classes"][file["train_labels"]].tolist()
            rows = {int(i): row for row, i in enumerate(train.index)}
            of_row = [int(train.columns["label"][rows[i]]) for i in file["train_rows"].tolist()]
        assert found == [true(c) for c in of_row]


def test_results_outlive_a_file_that_cannot_be_written(tmp_path, capsys):
    """A path that cannot work is refused at the start; a later failure leaves the results."""
    argv = ["--checkpoint", "none", "--out", str(tmp_path / "out.json")]
    (tmp_path / "file").write_text("")
    for flag in ("save", "features", "embedding", "picture"):
        assert f"{tmp_path}/file/x cannot be written; use another --{flag}" in fails(
            capsys, *argv, f"--{flag}", str(tmp_path / "file/x"))
        assert f"--{flag} {tmp_path}/file exists" in fails(
            capsys, *argv, f"--{flag}", str(tmp_path / "file"))
    x = str(tmp_path / "x")
    assert "needs a name of its own" in fails(capsys, *argv, "--save", x, "--features", x)
    assert "needs a name of its own" in fails(capsys, *argv[:2], "--out", x, "--save", x)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with mock.patch.object(torch, "save", side_effect=OSError(28, "No space left on device")):
        assert "No space left" in fails(capsys, *argv, "--save", x, status=1)
    assert json.loads((tmp_path / "out.json").read_text())["results"]["knn"]


@pytest.mark.parametrize("argv", [
    "--lr 1", "--crop 0.5 1", "--schedule steps", "--lr-backbone 1", "--log-every 5",
    "--mode features --features x --fraction 0.5", "--mode features --features x --min-per-class 2",
    "--recipe wcl --milestones 9", "--recipe clinfonce --gamma 0.5",
    "--recipe moco --lrs 5", "--recipe moco --retrieval-labels coarse", "--recipe semi-1 --knn-k 3",
    "--subset rows.txt --recipe fast --fraction 0.1", "--features-type float16",
    "--data-dir x", "--train-file x", "--compile"])
def test_flags_that_would_do_nothing(capsys, argv):
    unused = next(word for word in reversed(argv.split()) if word.startswith("--"))
    with pytest.raises(SystemExit) as stopped:
        linear_eval.main([*MACHINE, "--checkpoint", "none", *argv.split()])
    assert stopped.value.code == 2
    assert f"error: {unused} is not used " in capsys.readouterr().err


@pytest.mark.parametrize("argv, text", [
    ("--lrs -1", "--lrs -1.0 must be above 0"), ("--weight-decays -1", "--weight-decays -1.0 at"),
    ("--recipe moco --init-std=-1", "--init-std must be at least 0"),
    ("--recipe semi-1 --lr-backbone=-1", "--lr-backbone must be at least 0"),
    ("--lrs 1 --lrs 3", "--lrs is written twice: write all its values after one")])
def test_values_that_cannot_work(capsys, argv, text):
    with pytest.raises(SystemExit) as stopped:
        linear_eval.main([*MACHINE, "--checkpoint", "none", *argv.split()])
    assert stopped.value.code == 2 and text in capsys.readouterr().err


def test_a_foreign_file_with_a_key_named_format(tmp_path):
    """It is no checkpoint of this project."""
    state = network("resnet-tiny", "imagenet", 1).state_dict()
    torch.save(dict(format=1, state_dict=state), tmp_path / "file.pt")
    assert run(tmp_path, "--checkpoint", str(tmp_path / "file.pt"))["method"] is None


def test_the_images_and_statistics_of_the_training(trained, tmp_path):
    """With another label or seed it is still the training's subset, and on another data set the
    network sees images with the mean and standard deviation that it was trained with."""
    path = str(trained / "checkpoint.pt")
    checkpoint = torch.load(path, weights_only=True)
    expected = common.balanced_rows(shapes_tables(None)[0].columns["coarse"], 48, 3)
    for more in ([], ["--label", "label"], ["--seed", "8"]):
        data = linear_eval.load_labelled(parsed(path, *more), CPU)[0]
        assert torch.equal(data.train.index, expected)
    own = parsed(path, "--limit-train", "48", "--seed", "8")
    assert not torch.equal(linear_eval.load_labelled(own, CPU)[0].train.index, expected)
    assert parsed(path).mean is None  # those of the data set
    assert parsed(path, "--dataset", "stl10").mean == [0.5] * 3
    assert parsed(path, "--dataset", "stl10", "--std", "1", "1", "1").std == [1.0] * 3
    checkpoint["args"].update(std=[0.1, 0.2, 0.3], dataset="stl10-full")
    torch.save(checkpoint, tmp_path / "other.pt")
    args = parsed(str(tmp_path / "other.pt"), "--dataset", "stl10")
    assert args.mean == list(common.IMAGENET[0]) and args.std == [0.1, 0.2, 0.3]


def parsed(path, *argv):
    return build_parser().parse_args([*MACHINE, "--checkpoint", path, *argv])


def test_notes_on_what_is_missing(tmp_path, capsys):
    """Classes that --subset lacks, and a K above the number of images."""
    (tmp_path / "rows.txt").write_text("\n".join(map(str, range(30))))
    run(tmp_path, "--checkpoint", "none", "--subset", str(tmp_path / "rows.txt"), "--recipe",
        "fast")
    out = capsys.readouterr().out
    missing = 24 - shapes_tables(None)[0].columns["label"][:30].unique().numel()
    assert f"--subset has no image of {missing} of the 24 classes" in out and missing > 0
    assert "kNN: K = 30, all training images, not 200" in out
    assert "protocol: recipe fast; shapes (synthetic) at 32 pixels, column label" in out
    argv = ["--checkpoint", "none", "--mode", "linear", "--batch-size", "48"]
    run(tmp_path, *argv, name="b.json")
    out = capsys.readouterr().out
    assert "protocol: recipe fast, --mode linear; " in out and "never drops" not in out
    steps = [*argv, "--epochs", "2", "--schedule", "steps", "--milestones"]
    run(tmp_path, *steps, "2", "9", name="c.json")
    assert ("warning: the rate never drops: --milestones 2 9 are not below --epochs 2"
            in capsys.readouterr().out)
    run(tmp_path, *steps, "1", name="d.json")
    assert "never drops" not in capsys.readouterr().out


def test_an_evaluation_again_with_files(tmp_path, capsys):
    """The files of features change no figure, so the results may be those of an earlier command."""
    first = run(tmp_path, "--checkpoint", "none")["results"]
    again = ["--checkpoint", "none", "--features", str(tmp_path / "f.npz")]
    for _ in range(2):  # the same command may write its file anew
        assert run(tmp_path, *again)["results"] == first
    assert "f.npz exists; name a new file" in fails(
        capsys, "--checkpoint", "none", "--save", str(tmp_path / "f.npz"), "--out",
        str(tmp_path / "out.json"))


def test_embedding_is_a_projection_on_principal_components(tmp_path, monkeypatch):
    drawn, args = [], flags("--checkpoint", "none", "--embedding", str(tmp_path / "e.png"))
    g = torch.Generator().manual_seed(0)
    h = torch.randn(50, 6, generator=g) * torch.tensor([1.0, 4, 1, 1, 9, 1]) + 3
    plt = common.pyplot()
    monkeypatch.setattr(plt.Axes, "scatter", lambda self, x, y, **k: drawn.append((x, y)))
    monkeypatch.setattr(plt.Figure, "legend", lambda *a, **k: None)
    linear_eval.embedding_picture(args, h, torch.arange(50) % 3 - 1, ["$a_$b", "no Unicode \udcff"])
    found = np.stack(drawn[0], 1)
    x = F.normalize(h.double(), dim=1)
    U, S, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    rows = torch.randperm(50, generator=common.generator(0, 0, "embedding"))
    np.testing.assert_allclose(np.abs(found), (U[:, :2] * S[:2])[rows].abs(), atol=1e-9)


@pytest.mark.parametrize("recipe", ["fast", "cifar", "semi-10"])
def test_saved_networks_load_in_torchvision(tmp_path, recipe, capsys):
    """The state dict of --save, loaded strictly, has the accuracy that the JSON gives."""
    argv = ["--checkpoint", "none", "--arch", "resnet18", "--label", "coarse", "--recipe", recipe,
            "--save", str(tmp_path / "n.pth"), "--fraction", "0.5"]
    argv += ["--batch-size", "40", "--epochs", "1", "--lr", "0.05"] if recipe != "fast" else []
    results = run(tmp_path, *argv)["results"]
    theirs = torchvision.models.resnet18(num_classes=6)
    theirs.load_state_dict(torch.load(tmp_path / "n.pth", weights_only=True), strict=True)
    test = shapes_tables(None)[1]
    with torch.no_grad():
        logits = theirs.eval()((test.images / 255 - 0.5) / 0.25)
    right = (logits.argmax(1) == test.columns["coarse"]).double().mean().item()
    said = results["probe" if recipe == "fast" else "last"]["top1"]
    assert 100 * right == pytest.approx(said, abs=1.1) and "fc" not in results  # one image: ties
    assert f"  save                       {tmp_path}/n.pth" in capsys.readouterr().out
    if recipe == "semi-10":  # it is evaluated, or begun with, as any other file
        about = common.load_backbone("", common.load_checkpoint(tmp_path / "n.pth"))[1]
        assert about["left_out"] == {"fc": 2} and about["arch"] == "resnet18"
        assert "--save" in fails(capsys, *argv, "--out", str(tmp_path / "other.json"))


def test_micro_batch_flag(tmp_path, capsys):
    record = run(tmp_path, "--checkpoint", "none", "--recipe", "semi-10", "--fraction", "0.5",
                 "--batch-size", "48", "--epochs", "1", "--micro-batch", "20")
    assert record["args"]["micro_batch"] == 20 and len(record["results"]["epochs"]) == 1
    semi = ["--checkpoint", "none", "--recipe", "semi-10", "--fraction", "0.5", "--batch-size",
            "48", "--out", str(tmp_path / "x.json"), "--micro-batch"]
    assert "--micro-batch must be above 0, got 0" in fails(capsys, *semi, "0")
    assert "--micro-batch must be above 0, got -3" in fails(capsys, *semi, "-3")
    assert "--micro-batch does not go with --sync-bn" in fails(capsys, *semi, "8", "--sync-bn")
    assert "--micro-batch 47 leaves a part of one image of the 48" in fails(capsys, *semi, "47")
    assert "--micro-batch 1 leaves a part of one image" in fails(capsys, *semi, "1")
    assert "--micro-batch is not used by --mode fast" in fails(
        capsys, "--checkpoint", "none", "--out", str(tmp_path / "x.json"), "--micro-batch", "8")
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


# ---------------------------------------------------------------------------------- picture


def test_picture(tmp_path):
    run(tmp_path, "--checkpoint", "none", "--label", "coarse", "--picture")
    sheet = Image.open(tmp_path / "out.png")
    assert sheet.size == (8 + 9 * 108, 26 + 8 * 124)
    torch.manual_seed(0)
    args = flags("--checkpoint", "none", "--label", "coarse")
    data = linear_eval.load_labelled(args, CPU)[0]
    backbone = common.resnet("resnet-tiny")
    x, q = (common.extract_features(backbone, data, t, normalize=True)
            for t in (data.train, data.test))
    rows = torch.randperm(96, generator=common.generator(0, 0, "picture"))[:8]
    near = (q[rows] @ x.T).topk(8).indices
    same = data.train.columns["coarse"][near] == data.test.columns["coarse"][rows][:, None]
    green = [[sheet.getpixel((8 + (j + 1) * 108 + 2, 26 + i * 124 + 40)) == (40, 160, 60)
              for j in range(8)] for i in range(8)]
    assert green == same.tolist() and 0 < same.sum() < 64
    # the nearest image of the first query itself, three times enlarged
    shown = torch.from_numpy(np.asarray(sheet.crop((120, 30, 216, 126))).copy()).permute(2, 0, 1)
    assert torch.equal(shown[:, ::3, ::3], data.train.images[near[0, 0]])

"""Bad input: one line that names the file, row, key or flag, the exit status, nothing overwritten.

`refused` runs clinfonce.py in this process and checks what holds for every case; each test then
says which words the line must hold. Exit status 2: the input cannot work, and the run folder is as
it was before. Exit status 1: a failure during the run, and the last checkpoint is kept.
"""
import contextlib
import errno
import functools
import gc
import io
import json
import math
import os
import resource
import shutil
import signal
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import image, write_folder, write_pack
from runs import contents

import clinfonce
import common
import sogclr_clip
import wcl

TINY = ["--device", "cpu", "--threads", "1", "--workers", "0", "--epochs", "1", "--knn-k", "5"]
SHAPES = [*TINY, "--limit-train", "64", "--batch-size", "16"]
FILES = [*TINY, "--clusters", "instance", "--batch-size", "4"]


@pytest.fixture
def refused(refused_by):
    """refused(flags, *words, status=2): see runs.refused_by."""
    return functools.partial(refused_by, clinfonce.main, says=["clusters ", "recipe own"])


# ---------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(("argv", "words"), [
    (["--recipe", "imagnet"], ["--recipe imagnet", "demo, c100-small", "imagenet100-dual"]),
    (["--epochz", "3"], ["--epochz 3"]),
    (["--epoch", "3"], ["--epoch 3"]),  # no abbreviations: they change when a flag is added
    (["--dataset", "cifar"], ["--dataset", "'cifar'", "shapes", "cifar10", "folder"]),
    (["--epochs", "many"], ["--epochs", "'many'"]),
    (["--epochs", "0"], ["--epochs must be above 0"]),
    (["--batch-size", "0"], ["--batch-size must be above 0"]),
    (["--batch-size", "65"], ["--batch-size 65 is larger than the training set of 64 images"]),
    (["--limit-train", "4097"], ["--limit-train 4097", "has 4096 images"]),
    (["--limit-train", "-1"], ["--limit-train -1"]),
    (["--limit-train", "0"], ["--limit-train 0"]),
    (["--tau", "0"], ["--tau must be above 0"]),
    (["--tau", "-0.1"], ["--tau must be above 0"]),
    (["--tau", "nan"], ["--tau must be above 0"]),
    (["--warmup", "-1"], ["--warmup must be at least 0, got -1"]),
    (["--kmeans-warmup", "-2"], ["--kmeans-warmup must be at least 0, got -2"]),
    (["--warmup", "2"], ["--warmup 2 is longer than the training (--epochs 1)"]),
    (["--schedule", "exp", "--warmup", "0"], ["--warmup is not used by --schedule exp"]),
    (["--k", "5"], ["--k is not used without --clusters kmeans"]),
    (["--clusters", "kmeans", "--k", "5", "--kmeans-warmup", "9"], ["K-means never runs"]),
    (["--clusters", "kmeans", "--k", "5", "--dual", "--base-tau", "1"], ["--base-tau", "--dual"]),
    (["--clusters", "label", "--loss", "ce", "--tau", "1"], ["--tau is not used by --loss ce"]),
    (["--optimizer", "adamw", "--momentum", "0.5"], ["--momentum is not used by --optimizer"]),
    (["--momentum", "1"], ["--momentum below 1"]),
    (["--mean", "127", "127", "127"], ["--mean [127.0, 127.0, 127.0]", "images in [0, 1]"]),
    (["--seed", "99999999999999999999"], ["--seed must be below 2^63"]),
    (["--tau", "inf"], ["--tau must be above 0, got inf"]),
    (["--data-dir", "images"], ["--data-dir is not used", "name another --dataset"]),
    (["--base-tau", "0"], ["--base-tau must be above 0"]),
    (["--k", "0"], ["--k must be above 0"]),
    (["--clusters", "kmeans", "--k", "65"], ["--k 65 needs at least 65 images, found 64"]),
    (["--clusters", "attributes:0"], ["--clusters attributes:0", "there are 5 attributes"]),
    (["--clusters", "attributes:99"], ["--clusters attributes:99", "there are 5 attributes"]),
    (["--clusters", "attributes:two"], ["--clusters attributes:two"]),
    (["--clusters", "attributes:1", "--attributes", "season"], ["'season'", "label, coarse"]),
    (["--clusters", "kind"], ["'kind'", "label, coarse, pattern, colour"]),
    (["--clusters", "10"], ["'label_gran_10'", "label, coarse, pattern, colour"]),
    (["--label", "kind"], ["'kind'", "label, coarse, pattern, colour"]),
    (["--clusters", "level_3", "--hierarchy", "no/tree.json"], ["--hierarchy no/tree.json"]),
    (["--clusters", "level_3"], ["--clusters level_3 needs --hierarchy"]),
    (["--clusters", "label", "--hierarchy", "tree.json"], ["--hierarchy goes with --clusters"]),
    (["--attributes", "colour"], ["--attributes goes with --clusters attributes:K"]),
    (["--clusters", "kmeans", "--k", "1"], ["--k 1 makes one cluster"]),
    (["--clusters", "coarse+season"], ["'season'", "label, coarse"]),
    (["--dual"], ["--dual goes with --clusters kmeans"]),
    (["--dual", "--clusters", "instance"], ["--dual goes with --clusters kmeans"]),
    (["--loss", "ce", "--clusters", "kmeans"], ["--loss ce needs --clusters with a column"]),
    # values that torch or numpy would refuse later, with a traceback
    (["--gray", "1.5"], ["--gray must be in [0, 1], got 1.5"]),
    (["--jitter-p", "-0.1"], ["--jitter-p must be in [0, 1], got -0.1"]),
    (["--jitter", "0.4", "0.4", "0.4", "0.9"], ["--jitter", "0.9"]),
    (["--crop", "0.8", "0.2"], ["--crop 0.8 0.2"]),
    (["--crop", "0", "1"], ["--crop 0.0 1.0"]),
    (["--std", "0.2", "0", "0.2"], ["--std"]),
    (["--lr", "-1"], ["--lr"]),
    (["--weight-decay", "-1"], ["--weight-decay"]),
    (["--momentum", "-0.9"], ["--momentum"]),
    (["--momentum", "0", "--nesterov"], ["--nesterov"]),
    (["--seed", "-1"], ["--seed must be at least 0, got -1"]),
    (["--threads", "-1"], ["--threads must be at least 0, got -1"]),
    (["--workers", "-1"], ["--workers must be at least 0, got -1"]),
    (["--micro-batch", "0"], ["--micro-batch must be above 0, got 0"]),
    (["--micro-batch", "8", "--sync-bn"], ["--micro-batch does not go with --sync-bn"]),
    (["--micro-batch", "1"], ["--micro-batch 1 leaves a part of one image of the 16"]),
    (["--micro-batch", "5"], ["--micro-batch 5 leaves a part of one image of the 16"]),
])
def test_flags(refused, argv, words):
    refused([*SHAPES, *argv], *words)


def test_batch_that_does_not_divide(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    refused(SHAPES, "--batch-size 16 is not divisible by the 3 processes")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda(refused):
    refused([*SHAPES, "--device", "cuda"], "--device cuda", "no CUDA device", "--device cpu")


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_more_cuda_ranks_than_gpus(refused, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    refused([*SHAPES, "--device", device], "4 processes on a machine with 2 GPU(s)",
            "--nproc_per_node=2")


def test_only_the_first_process_of_a_machine_speaks(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as stop:
        clinfonce.main([*SHAPES, "--recipe", "imagnet"])
    assert stop.value.code == 2 and capsys.readouterr().err == ""


# ---------------------------------------------------------------------------------- data


@pytest.mark.parametrize(("dataset", "words"), [
    ("cifar10", ["--dataset cifar10", "--download"]),
    ("cifar100", ["--dataset cifar100", "--download"]),
    ("stl10", ["--dataset stl10", "--download"]),
    ("stl10-full", ["--dataset stl10-full", "--download"]),
    ("folder", ["--data-dir", "no such folder"]),
    ("csv", ["meta_data_train.csv not found"]),
    ("npz", ["p.npz not found"]),
])
def test_wrong_data_dir(refused, tmp_path, dataset, words):
    refused([*FILES, "--dataset", dataset, "--data-dir", tmp_path / "nowhere",
             *["--train-file", "p.npz"] * (dataset == "npz")], tmp_path / "nowhere", *words)


@pytest.mark.parametrize("dataset", ["shapes", "cifar10", "stl10-full", "folder", "csv", "npz"])
def test_flags_of_another_data_set(refused, tmp_path, dataset):
    values = dict(train_file="a", test_file="a", image_root="a", classes="a", download=None)
    read = {"cifar10": ["download"], "stl10-full": ["download"], "folder": ["classes"],
            "csv": ["train_file", "test_file"], "npz": ["train_file", "test_file"]}
    for name in values.keys() - read.get(dataset, []):
        flag = common.flag_name(name)
        refused([*FILES, "--dataset", dataset, flag, *filter(None, [values[name]])],
                f"{flag} is not used by --dataset {dataset}")


TREE = {"train/cat": 8, "train/dog": 8, "val/cat": 2, "val/dog": 2}


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path / "tree", TREE)
    return tmp_path / "tree", [*FILES, "--dataset", "folder", "--data-dir", tmp_path / "tree"]


def test_class_folder_without_image(refused, folder):
    root, argv = folder
    (root / "train/cow").mkdir()
    (root / "train/cow/readme.txt").write_text("no image")
    refused(argv, root / "train/cow", "no image")


def test_class_folder_missing_in_val(refused, folder):
    root, argv = folder
    shutil.rmtree(root / "val/dog")
    refused(argv, root / "val/dog", "missing")


def test_no_held_out_part(refused, folder):
    root, argv = folder
    shutil.rmtree(root / "val")
    refused(argv, root, "neither val/ nor test/")
    # without train/ every fifth image is held out: four a class leave nothing
    write_folder(root / "few", {"cat": 4, "dog": 4})
    refused([*argv, "--data-dir", root / "few"], root / "few")


def test_class_list(refused, folder):
    root, argv = folder
    names = root / "list.txt"
    argv = [*argv, "--classes", names]
    refused(argv, "--classes", names, "not found")
    names.write_text("cat\nbird\n")
    refused(argv, "--classes", names, "no folder in", "'bird'")
    names.write_text("# nothing but a comment\n")
    refused(argv, "--classes", names)
    names.write_bytes(b"cat\n\xff\xfe\n")
    refused(argv, "--classes", names)


@pytest.fixture
def table(tmp_path):
    """Write a CSV of 12 images with some cells changed; returns the flags that read it."""
    write_folder(tmp_path / "tree", {"i": 12})

    def write(cells=None, header=",path,class,label_gran_3", tail="",
              val=",path,class\n0,i/0000.png,1\n"):
        rows = [[str(40 + i), f"i/{i:04}.png", str(i % 2 + 1), str(i % 3)] for i in range(12)]
        for (row, place), text in (cells or {}).items():
            rows[row][place] = text
        text = "\n".join([header, *(",".join(r) for r in rows)]) + "\n" + tail
        (tmp_path / "tree/meta_data_train.csv").write_text(text)
        (tmp_path / "tree/meta_data_val.csv").write_text(val)
        return [*FILES, "--dataset", "csv", "--data-dir", tmp_path / "tree"]

    return write


CSV = "meta_data_train.csv"


def test_csv_columns(refused, table):
    refused(table(header=",file,class,label_gran_3"), CSV, "'path'", "file, class, label_gran_3")
    refused(table(header=",path,kind,label_gran_3"), CSV, "'class'", "path, kind, label_gran_3")
    refused([*table(), "--clusters", "10"], "'label_gran_10'", "class, label_gran_3")
    refused([*table(), "--clusters", "level_12"], "'label_gran_level_12'", "class, label_gran_3")


@pytest.mark.parametrize("cell", ["NaN", "1.5", "cat", "9" * 30])
def test_csv_id_that_is_no_integer(refused, table, cell):
    for place, name in ((2, "class"), (3, "label_gran_3")):
        refused(table({(4, place): cell}), CSV, "row 44", f"column {name}", repr(cell))


def test_csv_index_that_is_no_integer(refused, table):
    refused(table({(4, 0): "abc"}), CSV, "'abc'")


@pytest.mark.parametrize("path", ["../secret.png", "i/../../x.png", "/etc/hostname",
                                  "%2E%2E/secret.png", "%2Fetc/hostname"])
def test_csv_path_that_leaves_the_data_folder(refused, table, tmp_path, path):
    write_folder(tmp_path, {".": 1})
    (tmp_path / "0000.png").rename(tmp_path / "secret.png")  # refused although it is there
    refused(table({(4, 1): path}), CSV, "row 44", repr(path), "leaves the data folder")


def test_csv_path_with_dots_inside_the_folder_is_taken(table, tmp_path):
    argv = table({(4, 1): "i/../i/0004.png"}, tail="-1,num_per_label_gran,2,3\n")
    clinfonce.main([*map(str, argv), "--out", str(tmp_path / "run")])
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 5


def test_csv_summary_row_without_an_index_column(refused, table):
    """Nothing tells it from an image that is missing: the message shows it."""
    text = "".join(f"i/{i:04}.png,{i % 2}\n" for i in range(11)) + "num_per_label_gran,2\n"
    argv = table()
    (argv[-1] / CSV).write_text("path,class\n" + text)
    refused(argv, CSV, "1 of 12 images are missing", "num_per_label_gran")


def test_csv_unreadable(refused, table, tmp_path):
    refused(table(tail="52,too,many,cells,here,and,here\n"), CSV, "line 14", "7 fields")
    refused(table(tail="52,i/0003.png\n"), CSV, "line 14", "2 fields")
    argv = table()
    (argv[-1] / CSV).write_text("")
    refused(argv, CSV, "cannot be read")
    (argv[-1] / CSV).write_text(",path,class\n")
    refused(argv, CSV, "no row")
    table()
    (argv[-1] / "meta_data_val.csv").unlink()
    refused(argv, argv[-1] / "meta_data_val.csv", "not found")


def test_csv_class_of_val_that_train_does_not_have(refused, table):
    refused(table(val=",path,class\n0,i/0000.png,3\n"), "meta_data_val.csv", "class 3",
            "does not occur in the training file")


def test_csv_missing_image(refused, table):
    refused(table({(4, 1): "i/gone.png"}), CSV, "1 of 12 images are missing", "i/gone.png")
    refused(table(val=",path,class\n0,i/gone.png,1\n"), "meta_data_val.csv", "1 of 1 images",
            "i/gone.png")


@pytest.fixture
def pack(tmp_path):
    """Write the npz pack `p.npz` of 12 images with arrays changed; returns the flags to read it."""
    def write(change=None, **arrays):
        arrays = {"labels": np.arange(12) % 2, "is_test": np.arange(12) % 4 == 3, **arrays}
        path = write_pack(tmp_path / "p.npz", [image(i) for i in range(12)],
                          **{k: v for k, v in arrays.items() if v is not None})
        if change:
            content = dict(np.load(path))
            change(content)
            np.savez_compressed(path, **content)
        return [*FILES, "--dataset", "npz", "--data-dir", tmp_path, "--train-file", "p.npz"]

    return write


def test_npz_file_that_is_broken(refused, pack, tmp_path):
    argv, path = pack(), tmp_path / "p.npz"
    whole = path.read_bytes()
    middle = len(whole) // 3
    for broken in (whole[:len(whole) // 2], whole[:-10], b"", b"no pack at all" * 9,
                   whole[:middle] + bytes(64) + whole[middle + 64:]):
        path.write_bytes(broken)
        refused(argv, f"npz pack {path} cannot be read")
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    path.write_bytes(file.getvalue())
    refused(argv, f"npz pack {path}")


def test_npz_image_that_is_broken(refused, pack, tmp_path):
    def overwrite(content):  # image 5 loses its header
        content["jpeg"][content["offsets"][5]:][:8] = 0

    refused(pack(overwrite), tmp_path / "p.npz", "image 5 cannot be decoded")

    def cut(content):  # the file ends within image 10
        content["jpeg"] = content["jpeg"][:content["offsets"][10] + 20]

    refused(pack(cut), tmp_path / "p.npz", "image 10 cannot be decoded")


def test_npz_images_of_unequal_size(refused, tmp_path):
    write_pack(tmp_path / "p.npz", [image(i, 32, 30 if i == 7 else 32) for i in range(12)],
               labels=np.arange(12) % 2)
    refused([*FILES, "--dataset", "npz", "--data-dir", tmp_path, "--train-file", "p.npz",
             "--test-file", "p.npz"], tmp_path / "p.npz", "image 7 is (32, 30)", "(32, 32)")


def test_npz_arrays(refused, pack, tmp_path):
    path = tmp_path / "p.npz"
    refused(pack(lambda c: c.pop("jpeg")), path, "'jpeg'", "offsets, labels, is_test")
    refused(pack(labels=None), "'label'")
    refused(pack(is_test=None), path, "is_test", "--test-file")
    refused(pack(is_test=np.ones(12)), path, "no rows for this split")
    refused([*pack(), "--test-file", "q.npz"], tmp_path / "q.npz", "not found")
    refused([*pack(), "--clusters", "attributes:1"], "--clusters attributes:1")
    refused(pack(attribute_names=np.array(["season"])), path, "attributes")
    refused(pack(attribute_names=np.array(["season"]), attributes=np.zeros((7, 1), int)), path,
            "attributes")
    refused([*FILES, "--dataset", "npz"], "--train-file")


def test_labels_that_make_no_clusters(refused, pack):
    labels = np.arange(12) % 2
    refused([*pack(labels=np.where(labels == 0, -1, 1)), "--clusters", "label"],
            "--clusters label", "row 0 has id -1")
    refused([*pack(labels=np.ones(12, int)), "--clusters", "label"],
            "--clusters label", "one cluster has no negatives")
    some = np.where(np.arange(12) == 4, -1, np.arange(12) % 3)  # a missing value is no value
    refused([*pack(season=some), "--clusters", "attributes:1", "--attributes", "season"],
            "--clusters attributes:1", "row 4 has id -1")


def test_test_set_without_labels_trains_without_knn(pack, tmp_path):
    is_test = np.arange(12) % 4 == 3
    argv = pack(labels=np.where(is_test, -1, np.arange(12) % 2), is_test=is_test)
    clinfonce.main([*map(str, argv), "--out", str(tmp_path / "run")])
    records = [json.loads(s) for s in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [r["knn_top1"] for r in records if r.get("knn_top1") is not None] == []


# ---------------------------------------------------------------------------------- readers


@pytest.mark.parametrize(("cells", "header", "tail", "words"), [
    ({}, ",path,class,label_gran_3,", "", ["line 2", "4 fields", "comma in a field"]),
    ({(4, 3): "1,"}, ",path,class,label_gran_3", "", ["line 6", "5 fields"]),
    ({(4, 1): "i/a,b.png"}, ",path,class,label_gran_3", "", ["line 6", "5 fields"]),
    ({}, "path,class,label_gran_3", "", ["line 2", "4 fields", "path, class, label_gran_3"]),
    ({(i, 3): f"{i},x" for i in range(12)}, ",path,class,label_gran_3,", "", ["line 2"]),
    ({(4, 1): '"i/0004.png'}, ",path,class,label_gran_3", "", ["line ", "unexpected end of data"]),
    ({(4, 1): '"i"/0004.png'}, ",path,class,label_gran_3", "", ["line 6 cannot be read"]),
    ({}, ",path,class,class", "", ["two columns named 'class'"]),
])
def test_csv_fields_are_counted(refused, table, cells, header, tail, words):
    refused(table(cells, header, tail), CSV, *words)


@pytest.mark.parametrize(("train", "test", "words"), [
    ("ab", "ac", ["v.csv", "row 1", "class c of column kind", "t.csv", "training file"]),
    ("ab", "12", ["column kind has names", "t.csv", "v.csv"]),
    ("12", "ab", ["column kind has names", "t.csv", "v.csv"]),
])
@pytest.mark.parametrize("flag", ["--label", "--clusters"])
def test_csv_column_that_means_other_things_in_the_test_file(refused, tmp_path, train, test, words,
                                                            flag):
    write_folder(tmp_path, {"i": 12})
    for name, values in (("t.csv", train), ("v.csv", test)):
        (tmp_path / name).write_text("path,class,kind\n" + "".join(
            f"i/{i:04}.png,1,{values[i % 2]}\n" for i in range(12)))
    argv = [*FILES, "--dataset", "csv", "--data-dir", tmp_path, "--train-file", "t.csv",
            "--test-file", "v.csv"]
    refused([*argv, flag, "kind"], *words)
    common.load(common.Parser("x", "", {"demo": {}}).parse_args(  # unused, it is no harm
        [str(a) for a in argv if a not in ("--clusters", "instance")]), torch.device("cpu"))


@pytest.mark.parametrize(("change", "words"), [
    (dict(labels=np.arange(12) % 2 + 0.0), ["labels is float64 (12,)", "integers", "(12,)"]),
    (dict(labels=(np.arange(12) % 2)[:, None]), ["labels is int64 (12, 1)", "(12,)"]),
    (dict(labels=np.array([*"ab"] * 6, object)), ["cannot be read: Object arrays"]),
    (dict(labels=np.arange(12), classes=np.array([*"abc"])), ["row 4: class 4", "no name"]),
    (dict(is_test=np.arange(5)), ["is_test is int64 (5,)"]),
    (dict(attributes=np.ones((12, 1)), attribute_names=np.array(["a"])), ["attributes is float64"]),
])
def test_npz_arrays_of_another_kind(refused, pack, tmp_path, change, words):
    refused(pack(**change), tmp_path / "p.npz", *words)


@pytest.mark.parametrize("change", [lambda x: x.astype(float), lambda x: x[:, None],
                                    lambda x: x.astype(object)])
def test_npz_offsets_of_another_kind(refused, pack, tmp_path, change):
    refused(pack(lambda c: c.update(offsets=change(c["offsets"]))), tmp_path / "p.npz")


@pytest.mark.parametrize(("counts", "words"), [
    ({"Train/cat": 5, "Test/cat": 5}, ["Test/ and no train/", "DIR/train/<class>"]),
    ({"training/cat": 5, "validation/cat": 5}, ["training/ and no train/"]),
    ({"seg_train/cat": 5, "seg_test/cat": 5, "seg_pred": 5}, ["seg_test/ and no train/"]),
    ({"train2017": 5, "val2017": 5}, ["train2017/ and no train/"]),
    ({"images/cat": 5, "images/dog": 5}, ["images holds the folder"]),
    ({"set/train/cat": 5, "set/val/cat": 5}, ["set holds the folder train/"]),
    ({"set/train/cat": 5, "set/val/cat": 5, "more/dog": 5}, ["set holds the folder train/"]),
    ({"cat": 5, "dog": 5, "val/cat": 5}, ["val/ and no train/"]),
    ({"cat": 5, "dog": 5, "test/dog": 5}, ["test/ and no train/"]),
    ({"cat/train": 5, "cat/test": 5, "dog/train": 5}, ["cat holds the folder t"]),
    ({"train/cat": 8, "Test/cat": 5}, ["neither val/ nor test/"]),
    ({"train/n1/images": 8, "train/n2/images": 8, "val/images": 5},
     ["val has no class folder", "TinyImageNet"]),
    ({"train/n1": 8, "train/n2": 8, "val": 5}, ["val has no class folder", "ILSVRC"]),
    ({"train/cat": 8, "val/cat": 2, "val/bird": 2}, ["class bird", "val", "training file"]),
])
def test_folder_of_another_layout(refused, tmp_path, counts, words):
    root = write_folder(tmp_path / "tree", counts)
    refused([*FILES, "--dataset", "folder", "--data-dir", root], root, *words)


@pytest.mark.parametrize("place", ["train", "train/cow", "train/cat/x.png"])
def test_link_to_nothing(refused, folder, place):
    root, argv = folder
    if place == "train":
        (root / "train").rename(root / "old")
    (root / place).symlink_to(root / "gone")
    refused(argv, root / place, "link to nothing")


def test_deeply_nested_json(refused, folder):
    root, argv = folder
    (root / "tree.json").write_text("[" * 10 ** 6)
    refused([*argv, "--clusters", "level_1", "--hierarchy", root / "tree.json"], "tree.json",
            "recursion")


@pytest.mark.parametrize(("module", "argv", "words"), [
    ("faiss", ["--clusters", "kmeans", "--k", "4", "--kmeans-warmup", "1"],
     ["K-means on the CPU needs faiss", "--kmeans torch"]),
    ("pandas", ["--dataset", "captions", "--test-file", "x.parquet"], ["x.parquet cannot be read",
                                                                       "pandas"])])
def test_module_that_is_not_installed(refused, tmp_path, monkeypatch, module, argv, words):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, module, None)
    refused([*SHAPES, *argv, *["--data-dir", tmp_path] * (module == "pandas")], *words)


@pytest.mark.parametrize(("method", "argv", "words"), [
    (clinfonce, ["--loss", "ce", "--clusters", "label", "--batch-size", "1", "--image-size", "8"],
     ["--batch-size 1, 1 in each process", "more than 1 value per channel"]),
    (sogclr_clip, ["--image-size", "16", "--warmup", "0"],
     ["--image-size 16", "Output size is too small"]),
    (wcl, ["--image-size", "2", "--crops", "2", "--epochs", "2"], ["--image-size 2", "--crops"]),
])
def test_batches_that_do_not_go_through_the_network(refused_by, method, argv, words):
    refused_by(method.main, [*SHAPES, *argv], *words)


# ---------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_image_found_while_training(refused, tmp_path, workers):
    """Unlabelled images, so that no kNN reads them first; the last batch of the epoch has it."""
    root = write_folder(tmp_path / "tree", {".": 20})
    last = torch.randperm(16, generator=common.generator(0, 0, "order"))[-1].item()
    broken = root / f"{[i for i in range(20) if i % 5 < 4][last]:04}.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:60])
    argv = [*FILES, "--dataset", "folder", "--data-dir", root, "--workers", workers]
    refused(argv, broken, "cannot be decoded", status=1)
    run = tmp_path / "run"
    assert common.load_checkpoint(run / "checkpoint.pt")["step"] == 0
    assert sorted(p.name for p in run.iterdir()) == ["checkpoint.pt", "log.jsonl", "views.png"]
    broken.write_bytes(whole)  # repaired: the same command goes on
    clinfonce.main([*map(str, argv), "--out", str(run)])
    assert common.load_checkpoint(run / "checkpoint.pt")["step"] == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_image_found_by_the_first_evaluation(refused, folder, tmp_path, workers):
    root, argv = folder
    broken = root / "val/dog/0001.png"
    for content in (b"", b"not an image", broken.read_bytes()[:60]):
        broken.write_bytes(content)
        refused([*argv, "--workers", workers], broken, "cannot be decoded", status=1)
        assert [p.name for p in (tmp_path / "run").iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize("workers", [0, 2])
def test_all_broken_images_are_named_at_once(refused, tmp_path, workers):
    """Empty, cut, no image, a bomb, and numbers too large for TIFF; in both splits."""
    root = write_folder(tmp_path / "tree", {"train/cat": 40, "val/cat": 4})
    whole = (root / "train/cat/0000.png").read_bytes()
    tiff = b"II*\0\x08\0\0\0\x01\0\x00\x01\x05\0\x01\0\0\0\xff\xff\xff\xff"
    width = whole.index(b"IHDR") + 4
    header = whole[width - 4:width] + (30000).to_bytes(4, "big") * 2 + whole[width + 8:width + 13]
    bomb = whole[:width - 4] + header + zlib.crc32(header).to_bytes(4, "big") + whole[width + 17:]
    broken = {"train/cat/0003.png": b"", "train/cat/0017.png": whole[:60],
              "train/cat/0030.png": b"<html>", "val/cat/0001.png": bomb, "val/cat/0002.png": tiff}
    for name, content in broken.items():
        (root / name).write_bytes(content)
    refused([*FILES, "--dataset", "folder", "--data-dir", root, "--workers", workers],
            "cannot be decoded (5 of the images)", "decompression bomb",
            *(root / name for name in broken), status=1)


@pytest.mark.parametrize("how", ["killed", "no shared memory", "open files"])
def test_reader_process_that_is_lost(refused, tmp_path, monkeypatch, how):
    """One line and status 1; the second would hang for ever, the third print tracebacks."""
    root = write_folder(tmp_path / "tree", {".": 40})
    limits, taken = resource.getrlimit(resource.RLIMIT_NOFILE), []
    if how == "killed":
        def end(path):
            os.kill(os.getpid(), signal.SIGKILL)
        monkeypatch.setattr(common, "open_image", end)
    elif how == "no shared memory":
        def full(storage):
            raise RuntimeError("unable to allocate shared memory(shm)")
        monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)
    argv = [*FILES, "--dataset", "folder", "--data-dir", root, "--workers", 2]
    try:
        if how == "open files":
            gc.collect()  # the run would free the files of earlier tests, and have numbers to spare
            highest = max(int(name) for name in os.listdir("/proc/self/fd"))
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 5, limits[1]))
            with contextlib.suppress(OSError):  # takes every number that is free
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
            for _ in range(4):
                os.close(taken.pop())
        refused(argv, "a process that reads images was lost", "--workers", status=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for file in taken:
            with contextlib.suppress(OSError):
                os.close(file)


@pytest.mark.parametrize("ask", [
    lambda: torch.empty(2 ** 58),
    lambda: np.empty(2 ** 58),
    lambda: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried 2 GiB\n"))
], ids=["torch", "numpy", "cuda"])
def test_memory_that_is_too_small(refused, monkeypatch, ask):
    monkeypatch.setattr(clinfonce, "cl_infonce", lambda *_, **__: next(ask()))
    line = refused(SHAPES, "out of memory (", "--micro-batch", "--batch-size", status=1)
    assert "Tried 2 GiB): " in line or "allocate" in line


def test_loss_that_is_not_finite(refused, tmp_path):
    # the loss of step 0 is that of the initial weights; the first update throws them to 1e30
    argv = [*SHAPES, "--lr", "1e30", "--warmup", "0"]
    for _ in range(2):  # the second time it starts from the checkpoint and comes to the same end
        line = refused(argv, "the loss is", "at step 1", "the last checkpoint is kept", status=1)
    assert "nan" in line or "inf" in line
    checkpoint = common.load_checkpoint(tmp_path / "run/checkpoint.pt")
    assert checkpoint["step"] == 0
    assert all(t.isfinite().all() for t in checkpoint["state"]["model"].values())


def test_loss_that_is_not_finite_later(refused, tmp_path, monkeypatch):
    """The checkpoint of the last whole epoch stays as it was, and is good to go on from."""
    argv, run = [*SHAPES, "--epochs", "2"], tmp_path / "run"
    loss, calls, kept = clinfonce.cl_infonce, [], []

    def sometimes(*args, **options):
        calls.append(len(calls))
        if calls[-1] == 5:
            kept.append((run / "checkpoint.pt").read_bytes())
            return loss(*args, **options) * math.nan
        return loss(*args, **options)

    monkeypatch.setattr(clinfonce, "cl_infonce", sometimes)
    refused(argv, "the loss is nan at step 5;", status=1)
    assert (run / "checkpoint.pt").read_bytes() == kept[0]
    assert common.load_checkpoint(run / "checkpoint.pt")["step"] == 4
    monkeypatch.undo()
    clinfonce.main([*argv, "--out", str(run)])
    assert common.load_checkpoint(run / "checkpoint.pt")["step"] == 8


def test_update_that_is_not_finite(refused, tmp_path, monkeypatch):
    """A gradient can be NaN where the loss is not. The last step of an epoch is saved, so its
    weights are looked at first."""
    loss, calls = clinfonce.cl_infonce, []

    def with_nan(z, *args, **options):
        calls.append(len(calls))
        if calls[-1] == 7:
            z.register_hook(lambda grad: grad * math.nan)
        return loss(z, *args, **options)

    monkeypatch.setattr(clinfonce, "cl_infonce", with_nan)
    refused([*SHAPES, "--epochs", "3"], "the update of step 7 left", "not finite; the last "
            "checkpoint is kept", status=1)
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        checkpoint = common.load_checkpoint(tmp_path / "run" / name)
        assert checkpoint["step"] == (4 if name == "checkpoint.pt" else 0)
        assert all(t.isfinite().all() for t in checkpoint["state"]["model"].values())


def test_features_to_cluster_that_are_not_finite(refused):
    # one step an epoch: the weights are thrown away in epoch 1, and epoch 2 begins with K-means
    refused([*SHAPES, "--lr", "1e30", "--warmup", "0", "--batch-size", "64", "--epochs", "3",
             "--clusters", "kmeans", "--k", "4", "--kmeans-warmup", "2"],
            "epoch 2", "features to cluster are not finite", status=1)


def test_run_folder_that_cannot_be_made(refused, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    refused(SHAPES, f"--out {file} is a file; name a folder", out=file)
    refused(SHAPES, "cannot write", file / "run/log.jsonl", status=1, out=file / "run")
    assert file.read_text() == "mine"


def test_run_folder_without_permission(refused, tmp_path, monkeypatch):
    """root may write anywhere, so the refusal of the system is played."""
    def mkdir(path, *args, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(common.Path, "mkdir", mkdir)
    refused(SHAPES, "cannot write", tmp_path / "closed/run", "Permission denied", status=1,
            out=tmp_path / "closed/run")


@pytest.mark.parametrize(("limit", "name"), [(500, "log.jsonl"), (8000, "views.png"),
                                             (400_000, "checkpoint.pt")])
def test_disk_that_is_full(refused, tmp_path, limit, name):
    """No file may grow beyond the limit, as on a full disk: no half a file, no *.tmp is left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        refused(SHAPES, "cannot write", tmp_path / "run" / name, status=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "run/checkpoint.pt").exists()


# ---------------------------------------------------------------------------------- run folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, rendered):
    """A finished run."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "shapes", rendered)
        clinfonce.main([*SHAPES, "--out", str(out)])
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "run")


def test_finished_run_started_again(run, capsys, shapes_once):
    before = contents(run)
    clinfonce.main([*SHAPES, "--out", str(run)])
    out = capsys.readouterr().out
    assert "this run was finished before; to train anew" in out and str(run) in out
    assert "kNN top-1    untrained" in out
    after = contents(run)
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in ("checkpoint.pt", "log.jsonl", "views.png"))


def test_other_flags_in_the_same_folder(refused, run):
    refused([*SHAPES, "--arch", "resnet18"], run, "--arch resnet-tiny -> resnet18", "another --out")
    line = refused([*SHAPES, "--lr", "0.25", "--epochs", "3", "--clusters", "label"],
                   "--clusters coarse+pattern+size -> label", "--epochs 1 -> 3", "--lr 0.5 -> 0.25")
    assert "--tau" not in line and "--workers" not in line


def test_other_method_in_the_same_folder(refused, run):
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    checkpoint["method"] = "wcl"
    torch.save(checkpoint, run / "checkpoint.pt")
    line = refused(SHAPES, f"{run} holds a run of wcl.py; use another --out")
    assert "--" not in line.replace("--out", "")  # its flags are another method's too


def test_truncated_checkpoint(refused, run):
    file = run / "checkpoint.pt"
    whole = file.read_bytes()
    for broken in (whole[:len(whole) // 2], whole[:100], b"", b"no checkpoint"):
        file.write_bytes(broken)
        refused(SHAPES, file, "cannot be read", "truncated")


def test_foreign_checkpoint(refused, run):
    file = run / "checkpoint.pt"
    for content in ({"state_dict": {}}, [1, 2], {"format": 1}):
        torch.save(content, file)
        refused(SHAPES, file, "not a checkpoint of this project")
    torch.save(SimpleNamespace(format=1), file)  # an object: never loaded, weights_only=True
    refused(SHAPES, file, "cannot be read")


@pytest.mark.parametrize("change", ["missing", "shape", "part"])
def test_checkpoint_that_does_not_fit(refused, run, change):
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    model = checkpoint["state"]["model"]
    if change == "missing":
        del model["head.0.weight"]
    elif change == "shape":
        model["head.0.weight"] = torch.zeros(3, 3)
    else:
        del checkpoint["state"]["clusters"]
    torch.save(checkpoint, run / "checkpoint.pt")
    refused(SHAPES, run / "checkpoint.pt", "does not fit",
            "clusters" if change == "part" else "head.0.weight")


@pytest.mark.parametrize("text", ["epoch 1: loss 3.1\n", "[1]\n", "3\n", "{}\n",
                                  '{"command": "clinfonce.py", "args": 3}\n'])
def test_log_of_somebody_else(refused, tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.jsonl").write_text(text)
    refused(SHAPES, tmp_path / "run/log.jsonl", "not a log of this project", "another --out")


def test_log_of_another_run_that_has_no_checkpoint_yet(refused, run):
    (run / "checkpoint.pt").unlink()
    refused([*SHAPES, "--lr", "0.25"], run, "--lr 0.5 -> 0.25")


def test_checkpoint_without_its_log(refused, run):
    (run / "log.jsonl").unlink()
    refused(SHAPES, run / "log.jsonl")


# ---------------------------------------------------------------------------------- functions


def features(*shape, seed=0):
    z = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(z, dim=-1)


def brute_force(z, ids, tau, base_tau):
    """E1 with loops; the mean over the anchors that have a positive."""
    V, B, _ = z.shape
    u, label = z.flatten(0, 1), ids.repeat(V)
    losses = []
    for a in range(V * B):
        others = [c for c in range(V * B) if c != a]
        log_sum = torch.stack([u[a] @ u[c] / tau for c in others]).logsumexp(0)
        terms = [u[a] @ u[c] / tau - log_sum for c in others if label[c] == label[a]]
        if terms:
            losses.append(-tau / base_tau * sum(terms) / len(terms))
    return sum(losses) / len(losses)


def test_single_image_has_loss_0_and_gradient_0():
    z = features(2, 1, 8).requires_grad_()  # its other view is the whole denominator
    for ids in (None, torch.tensor([7])):
        loss = clinfonce.cl_infonce(z, ids)
        loss.backward()
        assert loss.item() == 0 and z.grad.abs().max() < 1e-12


def test_all_ids_equal():
    z, ids = features(2, 5, 8), torch.full((5,), -3)
    expected = brute_force(z, ids, 0.1, 0.07)
    assert clinfonce.cl_infonce(z, ids).item() == pytest.approx(expected.item(), rel=1e-12)


def test_anchors_without_positive_are_left_out_of_the_mean():
    z, ids = features(1, 5, 8).requires_grad_(), torch.tensor([4, 9, 4, 1, 4])
    loss = clinfonce.cl_infonce(z, ids, tau=0.2)
    assert loss.item() == pytest.approx(brute_force(z, ids, 0.2, 0.07).item(), rel=1e-12)
    lonely = clinfonce.cl_infonce(z, torch.arange(5))
    lonely.backward()
    assert lonely.item() == 0 and z.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_upcast(dtype):
    z, ids = features(2, 9, 8).to(dtype), torch.arange(9) // 2
    for loss in (clinfonce.cl_infonce, clinfonce.cluster_head_loss):
        assert loss(z, ids).dtype == torch.float32
        assert torch.equal(loss(z, ids), loss(z.float(), ids))


def test_duplicate_features():
    z = features(1, 1, 8).expand(2, 6, 8)  # all s_ac are equal: log p = -log(VB - 1)
    for ids in (None, torch.arange(6) % 2):
        loss = clinfonce.cl_infonce(z, ids, tau=0.1)
        assert loss.item() == pytest.approx(math.log(11) / 0.7, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_tau_with_features_that_are_not_normalised(dtype):
    """s = 30 * 30 / 0.01 = 90000 between equal views and 0 between others; exp would overflow."""
    x, y = torch.tensor([[30.0, 0.0], [0.0, 30.0]], dtype=dtype)
    right = torch.stack([torch.stack([x, y]), torch.stack([x, y])]).requires_grad_()
    assert clinfonce.cl_infonce(right, tau=0.01).item() == 0
    wrong = torch.stack([torch.stack([x, x]), torch.stack([y, y])]).requires_grad_()
    loss = clinfonce.cl_infonce(wrong, tau=0.01)  # the positive has s = 0, a negative 90000
    loss.backward()
    assert loss.item() == pytest.approx(90000 * 0.01 / 0.07, rel=1e-6)
    # the gradient of l_a by its anchor: (negative - positive) / T0, e.g. (x - mean(y)) / 0.07
    assert wrong.grad.isfinite().all() and wrong.grad[0, 0, 0] > 0 > wrong.grad[0, 0, 1]


def test_attribute_that_is_constant_ranks_last_and_adds_no_cluster():
    attributes = torch.tensor([[3, 0, 1, 5], [3, 1, 2, 5], [3, 0, 3, 5], [3, 1, 1, 5]])
    order, bits = clinfonce.rank_attributes(attributes)
    assert order.tolist() == [2, 1, 0, 3] and bits.tolist() == [0, 1, 1.5, 0]
    two, four = (clinfonce.attribute_clusters(attributes, k) for k in (2, 4))
    assert torch.equal(two, four) and two.tolist() == [0, 2, 3, 1]
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"{k} of 4 attributes"):
            clinfonce.attribute_clusters(attributes, k)


def test_as_many_clusters_as_images():
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    for ids, centroids in (clinfonce.kmeans(x, 12), clinfonce.kmeans_torch(x, 12)):
        assert sorted(ids.tolist()) == list(range(12))
        assert torch.allclose(centroids[ids], x, atol=1e-5)


@pytest.mark.parametrize(("epochs", "rates"), [(1, [1.0]), (2, [1.0, 1e-3]),
                                               (3, [1.0, 0.5005, 1e-3])])
def test_warmup_rule_of_a_short_run(epochs, rates):
    """One epoch of warm-up, then the cosine from lr to lr / 1000; no division by 0."""
    got = [clinfonce.warmup_rule(e + 1, epochs, 1.0) for e in range(epochs)]
    assert got == pytest.approx(rates, rel=1e-12)

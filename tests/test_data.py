"""Data sources, rows, batches and evaluation views of common.py.

Every source is read from files that the test writes; image number i has one colour that tells i,
so that an image, its row, its labels and its random parameters can be traced to each other.
"""
import io
import json
import os
import pickle
import tarfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import image, number, write_folder, write_image, write_pack
from PIL import Image

import clinfonce
import common

CPU = torch.device("cpu")


def flags(*argv):
    """Flags of a method without flags of its own; small batches, readers in this process."""
    argv = ["--batch-size", "4", "--workers", "0", *(str(a) for a in argv)]
    return common.Parser("test", "", {"demo": {}}).parse_args(argv)


def read(*argv):
    return common.load(flags(*argv), CPU)


def column(table, name="label"):
    return table.column(name).tolist()


def numbers(data, table):
    """The numbers of all images of a table, through the evaluation view."""
    views = data.eval_batches(table, torch.arange(len(table)), 32, False)
    return number(torch.cat(list(views))).tolist()


# ---------------------------------------------------------------------------------- sources


def test_shapes(shapes_once):
    data = read("--dataset", "shapes")
    assert (len(data.train), len(data.test)) == (4096, 1024)
    assert data.train.images.shape == (4096, 3, 32, 32) and data.train.images.dtype == torch.uint8
    for table, seed in ((data.train, 0), (data.test, 1)):
        images, columns, classes, captions = common.shapes(len(table), seed)
        assert torch.equal(table.images, images) and table.captions == captions
        assert table.columns.keys() == columns.keys() >= {"label", "coarse", "pattern", "colour"}
        assert all(torch.equal(table.columns[name], columns[name]) for name in columns)
        assert table.index.tolist() == list(range(len(table)))
        assert table.classes["label"] == classes["label"] and len(classes["label"]) == 24
    # the captions go with the rows
    train = data.train.select(torch.tensor([70, 3]))
    names = train.classes["label"]
    expected = [f" {names[i]} on a " for i in column(train)]
    assert all(e in c for e, c in zip(expected, train.captions, strict=True))


def pickled(path, **content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))


def rows(images):
    """(n, H, W, 3) -> (n, 3 H W), the layout of the CIFAR files."""
    return np.stack(images).transpose(0, 3, 1, 2).reshape(len(images), -1)


@pytest.fixture
def no_md5(monkeypatch):
    """Files written here cannot have torchvision's check sums: only that they exist is checked."""
    def exists(path, md5=None):
        return torchvision.datasets.utils.check_integrity(path)

    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", exists)
    monkeypatch.setattr(torchvision.datasets.stl10, "check_integrity", exists)


def test_cifar10_files(tmp_path, no_md5):
    folder = tmp_path / "cifar-10-batches-py"
    for part in range(5):  # 3 images each, numbers 0 to 14
        mine = range(3 * part, 3 * part + 3)
        pickled(folder / f"data_batch_{part + 1}", data=rows([image(i) for i in mine]),
                labels=[i % 10 for i in mine])
    pickled(folder / "test_batch", data=rows([image(i) for i in (300, 301)]), labels=[7, 2])
    names = ["airplane", "automobile", *"cdefghij"]
    pickled(folder / "batches.meta", label_names=names)

    data = read("--dataset", "cifar10", "--data-dir", tmp_path)
    assert number(data.train.images).tolist() == list(range(15))
    assert column(data.train) == [i % 10 for i in range(15)]
    assert number(data.test.images).tolist() == [300, 301] and column(data.test) == [7, 2]
    assert data.train.classes["label"] == names
    kinds = [data.train.classes["coarse"][i] for i in column(data.train, "coarse")]
    assert kinds[:10] == [*2 * ["vehicle"], *6 * ["animal"], *2 * ["vehicle"]] and len(kinds) == 15
    # (height, width) is not swapped
    picture = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
    pickled(folder / "test_batch", data=rows([picture]), labels=[0])
    test = read("--dataset", "cifar10", "--data-dir", tmp_path).test
    assert np.array_equal(test.images[0].permute(1, 2, 0).numpy(), picture)


def test_cifar100_files_have_fine_and_coarse_labels(tmp_path, no_md5):
    folder = tmp_path / "cifar-100-python"
    fine, coarse = [4, 1, 99, 0, 55], [4, 1, 13, 4, 0]
    pickled(folder / "train", data=rows([image(i) for i in range(5)]), fine_labels=fine,
            coarse_labels=coarse)
    pickled(folder / "test", data=rows([image(9)]), fine_labels=[30], coarse_labels=[0])
    pickled(folder / "meta", fine_label_names=[f"fine {i}" for i in range(100)],
            coarse_label_names=[f"coarse {i}" for i in range(20)])

    data = read("--dataset", "cifar100", "--data-dir", tmp_path)
    assert column(data.train) == fine and column(data.train, "coarse") == coarse
    assert column(data.test) == [30] and column(data.test, "coarse") == [0]
    assert number(data.train.images).tolist() == [0, 1, 2, 3, 4]
    assert data.train.classes["label"][99] == "fine 99"
    assert data.train.classes["coarse"][13] == "coarse 13"


def test_cifar100_packs(tmp_path):
    names = dict(classes=np.array(["apple", "baby", "chair"]), coarse_classes=np.array(["a", "b"]))
    write_pack(tmp_path / "cifar100_train.npz", [image(i) for i in range(6)],
               labels=np.array([0, 1, 2, 0, 1, 2]), coarse_labels=np.array([0, 0, 1, 0, 0, 1]),
               **names)
    write_pack(tmp_path / "cifar100_test.npz", [image(7)], labels=np.array([2]),
               coarse_labels=np.array([1]), **names)
    data = read("--dataset", "cifar100", "--data-dir", tmp_path)
    assert column(data.train) == [0, 1, 2, 0, 1, 2]
    assert column(data.train, "coarse") == [0, 0, 1, 0, 0, 1]
    assert number(data.train.images).tolist() == list(range(6))
    assert (column(data.test), number(data.test.images).tolist()) == ([2], [7])
    assert data.train.classes == {"label": ["apple", "baby", "chair"], "coarse": ["a", "b"]}


@pytest.fixture
def stl10(tmp_path, no_md5):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()

    def binary(name, numbers):  # an STL-10 file runs down the columns first
        np.stack([image(i, 96, 96).transpose(2, 1, 0) for i in numbers]).tofile(folder / name)

    binary("train_X.bin", range(8))
    np.array([1, 10, 3, 4, 1, 10, 3, 4], np.uint8).tofile(folder / "train_y.bin")
    binary("unlabeled_X.bin", range(100, 106))
    binary("test_X.bin", (50, 51))
    np.array([10, 2], np.uint8).tofile(folder / "test_y.bin")
    (folder / "class_names.txt").write_text("\n".join(["airplane", *"bcdefghi", "truck"]))
    (folder / "fold_indices.txt").write_text("0 1\n")
    return tmp_path


def test_stl10(stl10):
    data = read("--dataset", "stl10", "--data-dir", stl10)
    assert column(data.train) == [0, 9, 2, 3, 0, 9, 2, 3] and column(data.test) == [9, 1]
    assert data.train.images.shape == (8, 3, 96, 96)
    assert number(data.train.images).tolist() == list(range(8))
    assert data.train.classes["label"][9] == "truck"
    picture = np.arange(96 * 96 * 3, dtype=np.uint8).reshape(96, 96, 3)  # rows are rows
    picture.transpose(2, 1, 0).tofile(stl10 / "stl10_binary/test_X.bin")
    np.array([1], np.uint8).tofile(stl10 / "stl10_binary/test_y.bin")
    test = read("--dataset", "stl10", "--data-dir", stl10).test
    assert np.array_equal(test.images[0].permute(1, 2, 0).numpy(), picture)


def test_unlabelled_rows_of_stl10_are_trained_on_and_never_in_the_knn_bank(stl10):
    data = read("--dataset", "stl10-full", "--data-dir", stl10, "--batch-size", 14, "--knn-k", 1,
                "--image-size", 64, "--mean", 0, 0, 0, "--std", 1, 1, 1)
    assert column(data.train) == [0, 9, 2, 3, 0, 9, 2, 3] + [-1] * 6
    batch = next(data.batches(0, 1, common.augmentation(data.args)))
    assert sorted(number(batch.images).tolist()) == [*range(8), *range(100, 106)]

    # The unlabelled rows equal both test images, of labels 9 and 1. Among the labelled ones number
    # 5, of label 9, is made the nearest: one of two is right.
    direction = torch.zeros(256, 3)
    direction[:8] = F.normalize(torch.tensor([[0., 0, 1]] * 5 + [[1., 1, 0]] + [[0., 0, 1]] * 2))
    direction[[50, 51, *range(100, 106)]] = torch.tensor([1., 0, 0])

    class ByNumber(torch.nn.Module):
        def forward(self, x):
            return direction[(x[:, 0, 0, 0] * 255).round().long()]

    assert common.knn_accuracy(ByNumber(), data) == 50.0


# ---------------------------------------------------------------------------------- folder


COUNTS = {"train/cat": 5, "train/dog": 3, "train/ape": 4, "val/cat": 2, "val/dog": 1, "val/ape": 2}


def test_folder(tmp_path):
    write_folder(tmp_path, COUNTS)
    (tmp_path / "train/cat/notes.txt").write_text("not an image")
    (tmp_path / "train/.cache").mkdir()
    data = read("--dataset", "folder", "--data-dir", tmp_path)
    assert data.train.classes["label"] == ["ape", "cat", "dog"]
    assert column(data.train) == [0] * 4 + [1] * 5 + [2] * 3
    assert numbers(data, data.train) == [8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7]
    assert (column(data.test), numbers(data, data.test)) == ([0, 0, 1, 1, 2], [15, 16, 12, 13, 14])


def test_folder_with_class_list_and_nested_images(tmp_path):
    write_folder(tmp_path, COUNTS)
    write_image(tmp_path / "train/dog/more/x.JPEG", 40)
    (tmp_path / "val").rename(tmp_path / "test")
    (tmp_path / "list.txt").write_text("# two of them\n\ndog\tthe dog, a pet\ncat\n")
    data = read("--dataset", "folder", "--data-dir", tmp_path, "--classes", tmp_path / "list.txt")
    assert data.train.classes["label"] == ["cat", "dog"]  # sorted, as without a list
    assert column(data.train) == [0] * 5 + [1] * 4
    assert numbers(data, data.train) == [0, 1, 2, 3, 4, 5, 6, 7, 40]
    assert (column(data.test), numbers(data, data.test)) == ([0, 0, 1], [12, 13, 14])


def test_folder_without_train_holds_out_every_fifth_image_of_a_class(tmp_path):
    write_folder(tmp_path, {"cat": 11, "dog": 6})
    data = read("--dataset", "folder", "--data-dir", tmp_path)
    held_out = [4, 9, 11 + 4]
    assert numbers(data, data.test) == held_out and column(data.test) == [0, 0, 1]
    assert numbers(data, data.train) == [i for i in range(17) if i not in held_out]
    assert column(data.train) == [0] * 9 + [1] * 5


@pytest.mark.parametrize("kind", ["train", "class", "image"])
def test_folder_follows_links(tmp_path, kind):
    root = write_folder(tmp_path / "tree", COUNTS)
    place = root / dict(train="train", image="train/cat/0000.png")[kind] if kind != "class" else \
        root / "train/cat"
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    (root / "train/dog/again").symlink_to(root / "train")  # a loop: the parent is not read twice
    data = read("--dataset", "folder", "--data-dir", root)
    assert numbers(data, data.train) == [8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7]


def test_folder_passes_over_what_is_hidden_and_says_so(tmp_path):
    root = write_folder(tmp_path, COUNTS)
    for name in (".ipynb_checkpoints/a.png", "cat/.thumbnails/a.png", "cat/._0000.png",
                 "@eaDir/a.png", "cat/@eaDir/a.png", "__MACOSX/a.png", "loose.png"):
        write_image(root / "train" / name, 99)
    (root / "train/cat/boxes.txt").write_text("1 2 3 4")
    os.mkfifo(root / "train/cat/pipe.png")
    data = read("--dataset", "folder", "--data-dir", root)
    assert column(data.train) == [0] * 4 + [1] * 5 + [2] * 3
    assert data.train.notes == [f"{root}/train: passed over 1 .png, 1 .txt, 1 files beside "
                                "the class folders, 6 hidden"]
    assert data.test.notes == []


def test_folders_are_classes_whatever_their_names_begin_with(tmp_path):
    counts = {f"{split}/{name}": 1 for split in ("train", "val")
              for name in ("#win", "$cash", "@alice", "a", "@eaDir", "#recycle", "$RECYCLE.BIN")}
    data = read("--dataset", "folder", "--data-dir", write_folder(tmp_path, counts),
                "--batch-size", "1")
    assert data.train.classes["label"] == ["#win", "$cash", "@alice", "a"]


def test_a_stray_folder_among_loose_images(tmp_path):
    """Loose images are passed over where there are classes, but not more than those have."""
    write_folder(tmp_path, {".": 30, "edited": 20})
    with pytest.raises(common.BadInput, match="holds 30 images beside its class folders, which "
                                              "hold 20: for a flat folder move edited/ away"):
        read("--dataset", "folder", "--data-dir", tmp_path)
    write_folder(tmp_path, {"edited": 31})
    assert len(read("--dataset", "folder", "--data-dir", tmp_path).train) == 25


def test_all_endings_that_pillow_reads(tmp_path):
    for i, ending in enumerate(("pgm", "gif", "jfif", "PNG", "jp2", "tga", "ico")):
        write_image(tmp_path / f"train/cat/{i}.{ending}", i)
    write_image(tmp_path / "val/cat/0.pbm", 7)
    data = read("--dataset", "folder", "--data-dir", tmp_path)
    assert numbers(data, data.train) == [0, 1, 2, 3, 4, 5, 6] and numbers(data, data.test) == [7]


GRAY = (np.arange(32 * 32).reshape(32, 32) % 256).astype(np.uint8)


@pytest.mark.parametrize(("name", "values"), [
    ("x.png", GRAY.astype(np.uint16) << 8 | 7), ("x.tif", GRAY.astype(np.uint16) << 8 | 200),
    ("x.png", GRAY), ("x.tif", np.stack([GRAY] * 3, 2)), ("x.tif", GRAY > 100)])
def test_images_of_16_bits_are_scaled(tmp_path, name, values):
    Image.fromarray(values).save(tmp_path / name)
    expected = 255 * values if values.dtype == bool else GRAY if values.ndim == 2 else values
    image = common.open_image(str(tmp_path / name))
    assert image.mode == "RGB" and np.array_equal(np.asarray(image)[:, :, 1], expected if
                                                  expected.ndim == 2 else expected[:, :, 1])


@pytest.mark.parametrize("values", [GRAY.astype(np.int32) * 9000, GRAY / np.float32(255)])
def test_images_without_a_known_range_are_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match="TIFF in mode [IF]; save it with 8 or 16 bits"):
        common.open_image(tmp_path / "x.tif")


def test_flat_folder_of_unlabelled_images_trains_without_knn(tmp_path, capsys):
    write_folder(tmp_path / "images", {".": 20})
    (tmp_path / "images/a.heic").write_text("not read")
    clinfonce.main(["--dataset", "folder", "--data-dir", str(tmp_path / "images"), "--out",
                    str(tmp_path / "run"), "--device", "cpu", "--threads", "1", "--workers", "0",
                    "--batch-size", "8", "--epochs", "1", "--clusters", "instance"])
    lines = [json.loads(s) for s in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    note = f"{tmp_path}/images: passed over 1 .heic"
    assert lines[0]["data"] == dict(train=16, test=4, notes=[note])
    assert lines[-2]["step"] == 2 and lines[-2]["loss"] > 0
    assert [r.get("knn_top1") for r in lines] == [None] * len(lines)
    out = capsys.readouterr().out
    assert "kNN" not in out and f"16 training and 4 test images\n{note}\n" in out


# ---------------------------------------------------------------------------------- csv


@pytest.mark.parametrize("index", ["", "index"])  # the released files leave its name out or not
def test_instruction_csv(tmp_path, index):
    paths = {34021: "Shoes/Sneakers and Athletic Shoes/Dolce & Gabbana/80144.585.jpg",
             18675: "Boots/Ankle/Keen/78%2E92.jpg",     # on disk as 78.92.jpg
             7: "Boots/Ankle/A%2EB/1, 2.jpg",           # on disk with the % sign, and a comma
             12: "Heels/x.jpg"}
    for i, path in paths.items():
        write_image(tmp_path / path.replace("78%2E92", "78.92"), i)
    write_image(tmp_path / "Boots/Ankle/A.B/1, 2.jpg", 9)  # the literal path goes first
    write_image(tmp_path / "val/one.jpg", 3)
    (tmp_path / "meta_data_train.csv").write_text(
        f"{index},path,class,label_gran_10,label_gran_3,label_gran_level_12,image_id,material\n"
        f"34021,{paths[34021]},20,635,0,9,5,suede\n"
        f"18675,{paths[18675]},3,2,2,9,6,leather\n"
        f"7,\"{paths[7]}\",1,635,2,4,7,suede\n"
        f"12,{paths[12]},20,7,0,4,8,satin\n"
        "-1,num_per_label_gran,3,3,2,2,4,3\n")
    (tmp_path / "meta_data_val.csv").write_text(f"{index},path,class\n3,val/one.jpg,20\n")

    data = read("--dataset", "csv", "--data-dir", tmp_path, "--batch-size", 4)
    train, test = data.train, data.test
    assert len(train) == 4 and train.notes == []  # the summary row is gone, and is no lost image
    assert train.index.tolist() == list(paths) == numbers(data, train)
    assert column(train, "class") == [20, 3, 1, 20] and column(train) == [2, 1, 0, 2]
    assert train.classes["label"] == ["1", "3", "20"]  # by number, not by text
    # val has one class only: its id comes from the training file
    assert (column(test), test.classes["label"]) == ([2], ["1", "3", "20"])
    assert numbers(data, test) == [3]
    assert column(train, "label_gran_10") == [635, 2, 635, 7]  # ids as they are, gaps and all
    assert column(train, "label_gran_3") == [0, 2, 2, 0]
    assert column(train, "image_id") == [5, 6, 7, 8]
    assert train.classes["material"] == ["leather", "satin", "suede"]
    assert column(train, "material") == [2, 0, 2, 1]

    def clusters(name):
        args = flags("--dataset", "csv")
        args.clusters, args.hierarchy, args.attributes, args.loss = name, None, None, "cl-infonce"
        return clinfonce.auxiliary_ids(train, args)

    assert clusters("10")[0].tolist() == [635, 2, 635, 7]
    assert clusters("3")[0].tolist() == [0, 2, 2, 0]
    assert clusters("level_12")[0].tolist() == [9, 9, 4, 4]
    assert clusters("0")[0].tolist() == clusters("label")[0].tolist() == [2, 1, 0, 2]
    assert clusters("-1")[0].tolist() == [0, 1, 2, 3]  # not one cluster of all
    assert clusters("material")[0].tolist() == [2, 0, 2, 1]
    # H(class) = 1.5; label_gran_3 splits it 2 | 2, and both classes of its second part differ
    about = clusters("3")[1]
    assert about["K"] == 2 and about["H_Z"] == pytest.approx(1) and about["H_T"] == 1.5
    assert about["I_Z_T"] == pytest.approx(1) and about["H_T_given_Z"] == pytest.approx(0.5)


def test_csv_of_ones_own(tmp_path):
    """No index column, class names as text, the index = the row, spaces around the values."""
    write_folder(tmp_path, {"a": 3})
    (tmp_path / "t.csv").write_text("class, path\n cat, a/0000.png\ndog,a/0001.png\n")
    (tmp_path / "v.csv").write_text("class,path\ndog,a/0002.png\n")
    data = read("--dataset", "csv", "--data-dir", tmp_path, "--train-file", "t.csv", "--test-file",
                "v.csv", "--batch-size", 2)
    assert data.train.classes["label"] == ["cat", "dog"] and column(data.train) == [0, 1]
    assert column(data.test) == [1] and data.train.index.tolist() == [0, 1]
    assert numbers(data, data.train) == [0, 1]


def write_csvs(root, train, test, encoding="utf-8"):
    for name, text in (("meta_data_train.csv", train), ("meta_data_val.csv", test)):
        (root / name).write_text(text, encoding=encoding)
    return read("--dataset", "csv", "--data-dir", root, "--batch-size", 2)


def test_names_are_those_of_the_training_file(tmp_path):
    write_folder(tmp_path, {"a": 6})
    data = write_csvs(
        tmp_path, "path,class,kind,level,note\na/0000.png,cat,x,7,p\na/0001.png,dog,y,5,q\n"
        "a/0002.png,ape,x,7,r\n",
        "path,class,kind,level,note\na/0003.png,dog,y,5,s\na/0004.png,ape,y,7,t\n")
    assert (column(data.train), column(data.test)) == ([1, 2, 0], [2, 0])
    assert (column(data.train, "kind"), column(data.test, "kind")) == ([0, 1, 0], [1, 1])
    assert (column(data.train, "level"), column(data.test, "level")) == ([7, 5, 7], [5, 7])
    assert data.test.classes["kind"] == ["x", "y"]
    for table in (data.train, data.test):
        with pytest.raises(common.BadInput, match="class s of column note does not occur"):
            table.column("note")


@pytest.mark.parametrize("known", ["3", "cat"])
def test_class_that_is_empty_or_minus_1_is_unlabelled(tmp_path, known):
    write_folder(tmp_path, {"a": 5})
    empty = "-1"
    data = write_csvs(tmp_path, f"path,class,k\na/0000.png,{known},1\na/0001.png,{empty},\n"
                      "a/0002.png,,-1\n", f"path,class,k\na/0003.png,,2\na/0004.png,{known},1\n")
    assert (column(data.train), column(data.test)) == ([0, -1, -1], [-1, 0])
    assert data.train.classes["label"] == [known]
    assert column(data.train, "k") == [1, -1, -1]


def test_training_files_without_any_class(tmp_path):
    """There is nothing to evaluate with, and nothing to refuse."""
    write_folder(tmp_path, {"a": 4, "tree/train": 5, "tree/val/cat": 2, "tree/val/dog": 2})
    data = write_csvs(tmp_path, "path,class\na/0000.png,\na/0001.png,-1\n",
                      "path,class\na/0002.png,1\na/0003.png,2\n")
    assert column(data.train) == [-1, -1] and common.knn_accuracy(None, data) is None
    data = read("--dataset", "folder", "--data-dir", tmp_path / "tree")
    assert (len(data.train), len(data.test)) == (5, 4) and set(column(data.test)) == {0}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks(tmp_path, encoding):
    write_folder(tmp_path, {"cat": 9, "dog": 9})
    text = "path,class\ncat/0000.png,1\ncat/0001.png,1\n"
    assert len(write_csvs(tmp_path, text, text, encoding).train) == 2
    (tmp_path / "list.txt").write_text("dog\n", encoding=encoding)
    data = read("--dataset", "folder", "--data-dir", tmp_path, "--classes", tmp_path / "list.txt")
    assert data.train.classes["label"] == ["dog"]
    for name, text in (("c.json", '[{"image": "cat/0000.png", "caption": "a"}]'),
                       ("c.csv", "image,caption\ncat/0000.png,a\n")):
        (tmp_path / name).write_text(text, encoding=encoding)
        assert list(common.captions_table(tmp_path, name).captions) == ["a"]


def test_absolute_paths_inside_the_data_folder(tmp_path):
    root = write_folder(tmp_path / "tree", {"a": 2})
    (tmp_path / "link").symlink_to(root)
    for base, written in ((root, root), (tmp_path / "link", root), (root, tmp_path / "link")):
        text = "path,class\n" + "".join(f"{written}/a/{i:04}.png,{i}\n" for i in range(2))
        data = write_csvs(base, text, text)
        assert numbers(data, data.train) == [0, 1]


def numbered_csv(folder, n, missing):
    """n rows of which `missing` have no file; the file of row i is image i."""
    for i in range(n):
        if i not in missing:
            write_image(folder / f"{i}.png", i, 8, 8)
    text = "".join(f"{i},{i}.png,{i % 2}\n" for i in range(n))
    (folder / "meta_data_train.csv").write_text(",path,class\n" + text)
    (folder / "meta_data_val.csv").write_text(",path,class\n1,1.png,1\n")
    return folder


def test_missing_images_below_one_percent_are_dropped_and_logged(tmp_path):
    numbered_csv(tmp_path, 200, {3, 150})
    data = read("--dataset", "csv", "--data-dir", tmp_path)
    kept = [i for i in range(200) if i not in (3, 150)]
    assert data.train.index.tolist() == kept and column(data.train) == [i % 2 for i in kept]
    assert numbers(data, data.train) == kept
    assert data.train.notes == [f"{tmp_path}/meta_data_train.csv: 2 of 200 images are missing, "
                                "the first is 3.png"]
    # the one test image is 1.png
    assert data.test.notes == ["warning: 1 of the test images are training images too"]
    header = common.Log(flags("--out", tmp_path / "run"), data).header
    assert header["data"] == dict(train=198, test=1, notes=data.train.notes + data.test.notes)


def test_missing_images_above_one_percent_stop(tmp_path):
    numbered_csv(tmp_path, 200, {3, 150, 151})
    with pytest.raises(common.BadInput, match="3 of 200 images are missing, the first is 3.png"):
        read("--dataset", "csv", "--data-dir", tmp_path)


# ---------------------------------------------------------------------------------- npz


def test_npz_pack(tmp_path):
    attributes = np.array([[0, 2], [1, 0], [1, 1], [0, 2], [0, 1]])
    write_pack(tmp_path / "p.npz", [image(i) for i in range(5)], labels=np.array([3, 0, 3, 1, 0]),
               classes=np.array(["a", "b", "c", "d"]), coarse_labels=np.array([1, 0, 1, 0, 0]),
               coarse_classes=np.array(["x", "y"]), attributes=attributes,
               attribute_names=np.array(["season", "colour"]),
               values_season=np.array(["summer", "winter"]), values_colour=np.array([*"rgb"]),
               photographer=np.array([9, 9, 5, 5, 9], np.uint8), weight=np.zeros(5),
               is_test=np.array([0, 1, 0, 0, 1]))
    data = read("--dataset", "npz", "--data-dir", tmp_path, "--train-file", "p.npz",
                "--batch-size", 3)
    train, test = data.train, data.test
    assert set(train.columns) == {"label", "coarse", "season", "colour", "photographer"}
    assert column(train) == [3, 3, 1] and column(test) == [0, 0]
    assert column(train, "coarse") == [1, 1, 0] and column(train, "photographer") == [9, 5, 5]
    assert column(train, "season") == [0, 1, 0] and column(train, "colour") == [2, 1, 2]
    assert column(test, "season") == [1, 0] and column(test, "colour") == [0, 1]
    assert train.classes == {"label": [*"abcd"], "coarse": ["x", "y"],
                             "season": ["summer", "winter"], "colour": [*"rgb"]}
    assert train.index.tolist() == number(train.images).tolist() == [0, 2, 3]
    assert test.index.tolist() == number(test.images).tolist() == [1, 4]
    # two files: each whole
    data = read("--dataset", "npz", "--data-dir", tmp_path, "--train-file", "p.npz",
                "--test-file", "p.npz", "--label", "colour")
    assert number(data.train.images).tolist() == number(data.test.images).tolist() == [*range(5)]


@pytest.mark.parametrize("split", ["files", "is_test"])
def test_packs_whose_names_are_in_another_order(tmp_path, split):
    """The ids of the test pack become places in the names of the training pack."""
    def pack(name, labels, classes, colours, values):
        write_pack(tmp_path / name, [image(i) for i in range(len(labels))],
                   labels=np.array(labels), classes=np.array(classes),
                   attributes=np.array(colours)[:, None], attribute_names=np.array(["colour"]),
                   values_colour=np.array(values))
    pack("a.npz", [0, 1, -1], ["cat", "dog"], [0, 1, 2], [*"rgb"])
    pack("b.npz", [0, 2, -1], ["dog", "cow", "cat"], [0, 1, 0], [*"gr"])
    data = read("--dataset", "npz", "--data-dir", tmp_path, "--train-file", "a.npz", "--test-file",
                "b.npz", "--batch-size", 2)
    assert column(data.test) == [1, 0, -1] and data.test.classes["label"] == ["cat", "dog"]
    assert column(data.test, "colour") == [1, 0, 1]
    assert column(data.train) == [0, 1, -1] and column(data.train, "colour") == [0, 1, 2]


def test_packs_with_two_classes_of_one_name(tmp_path):
    """ImageNet has two cranes: with equal names the ids stay; else no one knows which is which."""
    def pack(name, classes):
        write_pack(tmp_path / name, [image(i) for i in range(3)], labels=np.arange(3),
                   classes=np.array(classes))
        return common.npz_table(tmp_path / name)
    names = ["crane", "dog", "crane"]
    train, test = pack("a.npz", names), pack("b.npz", names)
    common.share_names(train, test)
    assert train.column("label").tolist() == test.column("label").tolist() == [0, 1, 2]
    other = pack("c.npz", ["dog", "crane", "crane"])
    common.share_names(train, other)
    with pytest.raises(common.BadInput, match="c.npz, row 1: class crane of column label occurs "
                                              "twice in the training file"):
        other.column("label")


def test_labels_may_be_very_large(tmp_path):
    """kNN and retrieval number the labels; tables of 10^12 entries would not fit."""
    labels, g = torch.tensor([5, 10 ** 12, -1, 3])[torch.arange(40) % 4], torch.Generator()
    x = F.normalize(torch.randn(40, 8, generator=g.manual_seed(0)), dim=1)
    small = torch.tensor([1, 2, -1, 0])[torch.arange(40) % 4]
    args, known = flags("--knn-k", 3), labels >= 0
    assert common.knn_top1(x[:9], labels[:9].clamp(min=3), x[known], labels[known], args) == \
        common.knn_top1(x[:9], small[:9].clamp(min=0), x[known], small[known], args)
    assert common.retrieval(x[known], labels[known]) == common.retrieval(x[known], small[known])


# ---------------------------------------------------------------------------------- captions


@pytest.mark.parametrize("name", ["c.tsv", "captions.txt", "c.CSV"])
def test_text_of_captions_is_kept(tmp_path, name):
    """Quotes are letters in TSV; in CSV they hold commas. The first line tells which it is."""
    write_folder(tmp_path, {".": 4})
    texts = ['"Hello, he said', 'a "red" cat, sitting', '"quoted"', "'s' caption"]
    tab = name == "c.tsv"
    rows = [f"{i:04}.png\t{t}" if tab else '{:04}.png,"{}"'.format(i, t.replace('"', '""'))
            for i, t in enumerate(texts)]
    (tmp_path / name).write_text("\n".join(["image\tcaption" if tab else "image,caption", *rows]))
    table = common.captions_table(tmp_path, name)
    assert list(table.captions) == texts and column(table, "image_id") == [0, 1, 2, 3]


def test_the_columns_image_and_caption_go_before_their_other_names(tmp_path):
    write_folder(tmp_path, {".": 2})
    (tmp_path / "c.csv").write_text("title,path,caption,filepath,image\nno,x,yes,y,0001.png\n")
    table = common.captions_table(tmp_path, "c.csv")
    assert list(table.captions) == ["yes"] and list(table.paths) == [str(tmp_path / "0001.png")]


@pytest.mark.parametrize(("entries", "ids"), [
    ([("0000.png", 7), ("0000.png", "7"), ("0001.png", 8)], [0, 0, 1]),
    ([("0000.png", None), ("./0000.png", None), ("x/../0000.png", None), ("0001.png", None)],
     [0, 0, 0, 1])])
def test_one_image_has_one_id(tmp_path, entries, ids):
    write_folder(tmp_path, {".": 2, "x": 1})
    (tmp_path / "C.JSON").write_text(json.dumps(
        [dict(image=image, caption="a", image_id=key) for image, key in entries]))
    assert column(common.captions_table(tmp_path, "C.JSON"), "image_id") == ids


@pytest.mark.parametrize(("text", "words"), [
    ('{"images": [], "annotations": []}', "COCO's own files .* one .*image.*file_name"),
    ('[{"image": "0000.png", "caption": "a", "image_id": 1}, {"image": "0000.png", "caption": "b", '
     '"image_id": 2}]', "entry 1.*entry 0"),
    ('[{"image": "0000.png", "caption": "\\ud83d cat"}]', "entry 0 .0000.png: no Unicode"),
    ("[" * 10 ** 6, " cannot be read: .*recursion"),
    ("image,caption\n0000.png,a, b\n", "line 2: 3 fields for the columns image, caption"),
    ("image\tcaption\n0000.png\n", "line 2: 1 fields"),
    ("url,caption\nhttp://x,a\n", "needs columns image and caption; it has: url, caption"),
    ("", "empty"),
])
def test_caption_files_that_cannot_be_used(tmp_path, text, words):
    write_folder(tmp_path, {".": 2})
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(common.BadInput, match=f"(?s)c.json.*{words}"):
        common.captions_table(tmp_path, "c.json")


def write_shard(path, samples):
    """A tar archive of samples (name, ending -> bytes), as img2dataset writes them."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, members in samples:
            for ending, content in members.items():
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def encoded(i, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(image(i)).save(file, kind, **dict(lossless=True) if kind == "WEBP" else {})
    return file.getvalue()


@pytest.fixture
def shards(tmp_path):
    """Two shards of 30 and 20 pairs; image i has caption "number i"."""
    for s, numbers_of in enumerate((range(30), range(30, 50))):
        samples = [(f"{s:05}{i:04}", {
            ("webp" if i % 3 else "png"): encoded(i, "WEBP" if i % 3 else "PNG"),
            "json": json.dumps(dict(url="x", caption=f"number {i}")).encode(),
            **({"txt": f"number {i}".encode()} if i % 2 else {})}) for i in numbers_of]
        write_shard(tmp_path / f"{s:05}.tar", samples)
    return tmp_path


@pytest.mark.parametrize("names", ["{00000..00001}.tar", "."])
@pytest.mark.parametrize("workers", [0, 2])
def test_shards_of_img2dataset(shards, names, workers):
    data = read("--dataset", "captions", "--data-dir", shards, "--train-file", names,
                "--test-file", "00001.tar", "--workers", workers)
    assert numbers(data, data.train) == [*range(50)]
    assert numbers(data, data.test) == [*range(30, 50)]
    assert list(data.train.captions) == [f"number {i}" for i in range(50)]
    assert column(data.train, "image_id") == [*range(50)] and set(column(data.train)) == {-1}
    chosen = data.train.select(torch.tensor([49, 3]))
    assert numbers(data, chosen) == [49, 3] and list(chosen.captions) == ["number 49", "number 3"]
    batch = next(data.batches(7, 8, dict(PLAIN, size=32), views=1))
    assert number(batch.images).tolist() == batch.rows.tolist()  # read by offset, in the order


def test_headers_are_read_once_until_a_shard_changes(shards, monkeypatch):
    def no_tar(*args, **options):
        raise AssertionError("the index was not used")
    first = common.captions_table(shards, ".")
    assert sorted(p.name for p in shards.iterdir()) == [
        f"0000{s}.tar{end}" for s in (0, 1) for end in ("", ".index.npz")]
    with monkeypatch.context() as patch:
        patch.setattr(common.tarfile, "open", no_tar)
        again = common.captions_table(shards, ".")
    assert list(first.paths) == list(again.paths) and list(first.captions) == list(again.captions)
    write_shard(shards / "00001.tar", [("a", dict(png=encoded(7), txt=b"new"))])
    assert len(common.captions_table(shards, ".")) == 31
    (shards / "00000.tar.index.npz").write_bytes(b"broken")
    assert len(common.captions_table(shards, ".")) == 31
    np.savez(shards / "00000.tar.index.npz",  # of another version
             stamp=np.load(shards / "00000.tar.index.npz")["stamp"])
    assert len(common.captions_table(shards, ".")) == 31


def test_what_shards_leave_out_is_counted(tmp_path):
    good = [(f"{i:03}", dict(png=encoded(1), txt=b"a cat")) for i in range(400)]
    write_shard(tmp_path / "a.tar", [*good, ("x", dict(png=encoded(1))), ("z", dict(txt=b"no")),
                                     ("y", dict(png=encoded(1), txt=b" "))])
    table = common.captions_table(tmp_path, "a.tar")
    assert len(table) == 400 and table.notes == [
        f"{tmp_path}: 3 of 403 pairs left out, the first is {tmp_path}/a.tar: x: empty"]


@pytest.mark.parametrize("broken", ["cut", "cut at a member", "header", "no tar", "zeros",
                                    "missing"])
def test_broken_shards_are_named(shards, broken):
    file = shards / "00001.tar"
    content = file.read_bytes()
    with tarfile.open(file) as tar:
        third = tar.getmembers()[2].offset
    if broken == "missing":
        file.unlink()
    else:
        file.write_bytes({"cut": content[:third + 700], "cut at a member": content[:third],
                          "header": content[:third] + b"7" * 512 + content[third + 512:],
                          "no tar": b"<html>" * 999, "zeros": bytes(10240)}[broken])
    with pytest.raises(common.BadInput, match="00001.tar"):
        common.captions_table(shards, "{00000..00001}.tar")


def test_broken_member_is_named(shards):
    table = common.captions_table(shards, "00000.tar")
    shard, offset, size = table.paths[4].split(":")
    with open(shard, "r+b") as file:
        file.seek(int(offset))
        file.write(bytes(20))
    data = common.Data(table, table, flags(), CPU)
    with pytest.raises(common.RunFailed, match="00000.tar:.*000000004.webp: .*cannot be decoded "
                                               r"\(1 of the images\)"):
        numbers(data, table)


def test_pairs_that_a_shard_would_hide(tmp_path):
    """Equal names, dots in names (one sample of WebDataset), and archives that were joined."""
    one = dict(png=encoded(1), txt=b"one")
    write_shard(tmp_path / "a/0.tar", [(f"{i:03}", one) for i in range(300)])
    assert common.captions_table(tmp_path, "a").notes == []
    for name, samples, lost in (
            ("twice", [(f"{i % 200:03}", one) for i in range(300)], 100),
            ("dots", [(f"{i:03}" if i < 200 else f"cam.{i:03}", one) for i in range(300)], 100)):
        write_shard(tmp_path / name / "0.tar", samples)
        with pytest.raises(common.BadInput, match=f": {lost} of 300 pairs left out"):
            common.captions_table(tmp_path, name)
    (tmp_path / "joined").mkdir()
    (tmp_path / "joined/0.tar").write_bytes(2 * (tmp_path / "a/0.tar").read_bytes())
    with pytest.raises(common.BadInput, match="0.tar cannot be read: another archive follows"):
        common.captions_table(tmp_path, "joined")
    index = dict(np.load(tmp_path / "a/0.tar.index.npz"))
    np.savez(tmp_path / "a/0.tar.index.npz", **dict(  # written before these were counted
        index, stamp=index["stamp"][:2], lost=np.array(["old"])))
    assert common.captions_table(tmp_path, "a").notes == []


def test_captions_for_a_method_of_images_alone(tmp_path):
    """An image with several captions is one row, else it would be a negative of itself."""
    write_folder(tmp_path, {".": 8})
    entries = [dict(image=f"{i:04}.png", caption=["one", "two", "three"]) for i in range(8)]
    (tmp_path / "a.json").write_text(json.dumps(entries))
    argv = ["--dataset", "captions", "--data-dir", tmp_path, "--test-file", "a.json"]
    args = flags(*argv, "--train-file", "a.json")
    assert len(common.load(args, CPU).train) == 24
    args.method = "wcl"
    data = common.load(args, CPU)
    assert numbers(data, data.train) == numbers(data, data.test) == [*range(8)]
    assert data.train.notes == [f"{tmp_path}/a.json: 8 images for 24 captions"]
    assert data.test.notes[1:] == ["warning: 8 of the test images are training images too"]
    args = flags(*argv)
    assert len(common.load(args, CPU).train) == 24  # an evaluation needs no training file
    args.method = "sogclr_clip"
    with pytest.raises(common.BadInput, match="needs --train-file to train: the test file is for"):
        common.load(args, CPU)
    args.train_file, args.image_root = "a.json", ["", "", ""]
    with pytest.raises(common.BadInput, match="--image-root .*: one folder, or one for the train"):
        common.load(args, CPU)


def test_classes_that_would_become_one(tmp_path):
    write_folder(tmp_path, {".": 3})
    rows = "".join(f"{i:04}.png,{text}\n" for i, text in enumerate(("007", "7", "8")))
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("path,class\n" + rows)
    argv = ["--dataset", "csv", "--data-dir", tmp_path, "--train-file", "a.csv"]
    with pytest.raises(common.BadInput, match="column class: two texts are one number, as 007"):
        read(*argv, "--test-file", "b.csv")
    with pytest.raises(common.BadInput, match="takes --train-file and --test-file, or neither"):
        read(*argv)


def test_classes_below_0_are_classes(tmp_path):
    """But for -1, which is unlabelled."""
    write_folder(tmp_path, {".": 4})
    (tmp_path / "a.csv").write_text("path,class\n" + "".join(
        f"{i:04}.png,{text}\n" for i, text in enumerate(("-2", "-1", "0", "5"))))
    table = common.csv_table(tmp_path, "a.csv")
    assert column(table) == [0, -1, 1, 2] and table.classes["label"] == ["-2", "0", "5"]


def test_packs_with_columns_that_would_hide_each_other(tmp_path):
    images = [image(i) for i in range(4)]
    ids = np.arange(4)

    def refuses(words, **arrays):
        path = write_pack(tmp_path / "a.npz", images, **arrays)
        with pytest.raises(common.BadInput, match=words):
            common.npz_table(path, test=False)

    refuses("two columns named 'label'", labels=ids, label=ids[::-1], is_test=ids % 2)
    refuses("two columns named 'label'", labels=ids, is_test=ids % 2,
            attributes=ids[:, None], attribute_names=np.array(["labels"]))
    refuses("two columns named 'a'", labels=ids, is_test=ids % 2,
            attributes=np.stack([ids, ids], 1), attribute_names=np.array(["a", "a"]))
    for is_test in (ids, ids - 1, np.array([0, 1, np.nan, 0]), np.array(list("0110"))):
        refuses("is_test holds other values than 0 and 1", labels=ids, is_test=is_test)
    path = write_pack(tmp_path / "b.npz", images, labels=ids % 2, classes=np.array([b"cat", b"x"]))
    assert common.npz_table(path).classes["label"] == ["cat", "x"]


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_lists_of_img2dataset(tmp_path, kind):
    """The format `files`: a list beside each folder of images; some were not downloaded."""
    for s in (0, 1):
        for i in range(3):
            write_image(tmp_path / f"{s:05}/{s:05}{i:04}.jpg", 3 * s + i)
        rows = dict(url=["x"] * 4, key=[f"{s:05}{i:04}" for i in range(4)],
                    status=["success"] * 3 + ["failed_to_download"],
                    caption=[f"number {3 * s + i}" for i in range(4)])
        if kind == "parquet":
            pytest.importorskip("pyarrow")
            import pandas
            pandas.DataFrame(rows).to_parquet(tmp_path / f"{s:05}.parquet")
        else:
            lines = [",".join(row) for row in zip(*rows.values())]
            (tmp_path / f"{s:05}.csv").write_text("\n".join([",".join(rows), *lines]))
    data = read("--dataset", "captions", "--data-dir", tmp_path, "--test-file",
                "{00000..00001}." + kind)
    assert numbers(data, data.train) == [*range(6)]
    assert list(data.train.captions) == [f"number {i}" for i in range(6)]


def test_parquet_with_missing_values(tmp_path, monkeypatch):
    """A missing caption is empty, not the text "nan"; ids beside a missing one stay whole; a list
    of captions is no caption."""
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(dict(
        image=[f"{i:04}.png" for i in range(3)], caption=["red", None, "blue"],
        image_id=pandas.array([2 ** 53 + 1, None, 7], "Int64"), captions=[["a", "b"]] * 3))
    path = tmp_path / "pairs.parquet"

    def write(frame):
        try:
            frame.to_parquet(path)
        except ImportError:  # without pyarrow: what pandas makes of such a file
            path.write_bytes(b"PAR1")
            monkeypatch.setattr(pandas, "read_parquet", lambda source, dtype_backend: {
                "numpy_nullable": frame.convert_dtypes()}[dtype_backend])

    write(frame.rename(columns=dict(caption="title", captions="caption")))
    with pytest.raises(common.BadInput, match="column caption holds neither texts nor numbers"):
        list(common.read_rows(path))  # and the title is not taken instead
    write(frame)
    assert list(common.read_rows(path)) == [
        ["image", "caption", "image_id"], ["0000.png", "red", str(2 ** 53 + 1)],
        ["0001.png", "", ""], ["0002.png", "blue", "7"]]


# ---------------------------------------------------------------------------------- rows


@pytest.fixture
def numbered(tmp_path):
    """Maker of the same 26 numbered images in memory and as files: label = number % 3."""
    labels = torch.arange(26) % 3
    write_folder(tmp_path, {".": 26})
    paths = [str(tmp_path / f"{i:04}.png") for i in range(26)]
    images = torch.from_numpy(np.stack([image(i) for i in range(26)])).permute(0, 3, 1, 2)

    def make(kind, workers=0, batch=8, seed=0):
        where = dict(images=images) if kind == "memory" else dict(paths=paths)
        table = common.Table(dict(label=labels), dict(label=[*"abc"]), **where)
        args = flags("--batch-size", batch, "--workers", workers, "--seed", seed)
        return common.Data(table, table, args, CPU)

    return make


KINDS = [("memory", 0), ("files", 0), ("files", 2)]
PLAIN = dict(  # no augmentation
    size=32, crop=None, ratio=(3 / 4, 4 / 3), flip=0.0, jitter=(0.0, 0.0, 0.0, 0.0), jitter_p=0.0,
    gray=0.0, blur=0.0, sigma=(0.1, 2.0), solarize=0.0, erase=0.0, mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0))


@pytest.mark.parametrize(("kind", "workers"), KINDS)
def test_a_row_keeps_its_image_label_and_index(numbered, kind, workers):
    data = numbered(kind, workers)
    order = torch.tensor([25, 3, 4, 17, 0, 9, 8, 21, 2, 11, 12, 14])
    data.train = data.train.select(order)
    data.steps_per_epoch = 1
    assert data.train.index.tolist() == order.tolist()
    seen = []
    for batch in data.batches(0, 3, dict(PLAIN, crop=(0.2, 1))):
        views = 1 if kind == "memory" else 2  # views of a file are cropped already, view-major
        assert batch.cropped == (kind == "files") and batch.images.dtype == torch.uint8
        assert number(batch.images).tolist() == order[batch.rows].tolist() * views
        assert data.train.column("label")[batch.rows].tolist() == \
            [i % 3 for i in order[batch.rows].tolist()]
        assert {len(v) for v in batch.params.values()} == {16}
        seen.append(batch.rows)
    assert len(torch.cat(seen).unique()) > 8  # other rows in another epoch
    assert numbers(data, data.train) == order.tolist()  # the evaluation goes in the table's order


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_limited_rows_keep_their_image_label_and_index(numbered, kind, monkeypatch):
    table = numbered(kind).train
    monkeypatch.setitem(common.SOURCES, "shapes", lambda args: (table, table))
    data = read("--dataset", "shapes", "--limit-train", 9)
    index = data.train.index
    assert len(index) == 9 and len(data.test) == 26
    assert numbers(data, data.train) == index.tolist()
    assert column(data.train) == [i % 3 for i in index.tolist()]


def test_balanced_rows():
    labels = torch.tensor([5] * 40 + [2] * 3 + [9] * 11)[torch.randperm(54)]

    def counts(rows):
        return [int((labels[rows] == c).sum()) for c in (2, 5, 9)]

    rows = common.balanced_rows(labels, 9, seed=0)
    assert counts(rows) == [3, 3, 3]
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert counts(common.balanced_rows(labels, 21, 0)) == [3, 9, 9]   # a small class is used up
    assert counts(common.balanced_rows(labels, 30, 0)) == [3, 16, 11]
    assert sorted(counts(common.balanced_rows(labels, 8, 0))) == [2, 3, 3]  # not a multiple
    assert sorted(counts(common.balanced_rows(labels, 1, 0))) == [0, 0, 1]
    assert common.balanced_rows(labels, 54, 0).tolist() == list(range(54))
    assert torch.equal(rows, common.balanced_rows(labels, 9, 0))
    others = [common.balanced_rows(labels, 9, seed) for seed in range(1, 6)]
    assert all(counts(other) == [3, 3, 3] for other in others)
    assert all(not torch.equal(rows, other) for other in others)
    for n in (0, -1, 55):
        with pytest.raises(common.BadInput, match=f"--limit-train {n}: .* has 54 images"):
            common.balanced_rows(labels, n, 0)


# ---------------------------------------------------------------------------------- batches


AUG = dict(PLAIN, crop=(0.2, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray=0.2,
           blur=0.5, solarize=0.2, erase=0.5)


def same(a, b):
    """Whether two batches agree in every part."""
    return (a.step == b.step and torch.equal(a.rows, b.rows) and torch.equal(a.images, b.images)
            and a.params.keys() == b.params.keys()
            and all(torch.equal(a.params[k], b.params[k]) for k in a.params))


def test_order_is_a_function_of_seed_and_epoch(numbered):
    data = numbered("memory")
    assert data.steps_per_epoch == 3  # 26 // 8: the incomplete last batch is dropped
    assert [data.end_of_epoch(s) for s in range(6)] == [False, False, True] * 2
    batches = list(data.batches(0, 9, AUG))
    assert [b.step for b in batches] == list(range(9))
    epochs = [torch.cat([b.rows for b in batches[i:i + 3]]) for i in (0, 3, 6)]
    for epoch, rows in enumerate(epochs):
        assert len(rows.unique()) == len(rows) == 24  # at most once an epoch
        order = torch.randperm(26, generator=common.generator(0, epoch, "order"))
        assert torch.equal(rows, order[:24])
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])
    other = torch.cat([b.rows for b in numbered("memory", seed=1).batches(0, 3, AUG)])
    assert not torch.equal(other, epochs[0])
    # the two views of a batch, and one view in two steps, draw other numbers
    crop = [b.params["crop"].unflatten(0, (2, 8)) for b in batches]
    assert not torch.equal(crop[0][0], crop[0][1]) and not torch.equal(crop[0][0], crop[1][0])


@pytest.mark.parametrize(("kind", "workers"), KINDS)
def test_a_later_first_step_gives_the_tail_of_the_whole_run(numbered, kind, workers):
    whole = list(numbered(kind, workers).batches(0, 7, AUG))
    for first in (2, 3, 5):
        tail = list(numbered(kind, workers).batches(first, 7, AUG))
        assert len(tail) == 7 - first
        assert all(same(a, b) for a, b in zip(tail, whole[first:], strict=True))
    assert not same(whole[0], whole[1])


def test_the_augmentation_may_change_with_the_step(numbered):
    weak, strong = dict(AUG, crop=(0.9, 1.0)), dict(AUG, crop=(0.1, 0.2))
    for kind in ("memory", "files"):
        def aug(step):
            return weak if step < 2 else strong
        batches = list(numbered(kind).batches(0, 4, aug))
        assert [b.aug["crop"] for b in batches] == [(0.9, 1.0)] * 2 + [(0.1, 0.2)] * 2


@pytest.mark.parametrize(("kind", "workers"), KINDS)
def test_further_views_are_of_the_same_images(numbered, kind, workers):
    small, plain = dict(AUG, size=16), dict(PLAIN, size=24)
    data = numbered(kind, workers)
    for batch, two in zip(data.batches(1, 4, AUG, 2, extra=[(small, 3), (plain, 1)]),
                          data.batches(1, 4, AUG, 2), strict=True):
        assert same(batch, two)  # the first group draws what it draws alone
        x, crops, whole = (common.augment(part) for part in (batch, *batch.extra))
        assert x.shape == (2, 8, 3, 32, 32) and crops.shape == (3, 8, 3, 16, 16)
        assert whole.shape == (1, 8, 3, 24, 24)
        assert number((whole[0] * 255).round().byte()).tolist() == batch.rows.tolist()
        draws = [*batch.params["crop"].unflatten(0, (2, 8)),
                 *batch.extra[0].params["crop"].unflatten(0, (3, 8))]
        for i, a in enumerate(draws):  # no two views of a step have the same random numbers
            assert not any(torch.equal(a, b) for b in draws[:i])


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", ["memory", "files"])
def test_ranks_share_the_batch_of_one_process(numbered, kind, ranks, monkeypatch):
    one = list(numbered(kind).batches(0, 4, AUG))
    parts = []
    for rank in range(ranks):
        monkeypatch.setattr(common, "world", lambda: ranks)
        monkeypatch.setattr(common, "rank", lambda rank=rank: rank)
        parts.append(list(numbered(kind).batches(0, 4, AUG)))
    for step, whole in enumerate(one):
        mine = [part[step] for part in parts]
        assert all(torch.equal(m.rows, whole.rows) for m in mine)  # every process knows all rows
        assert torch.equal(torch.cat([m.rows[m.own] for m in mine]), whole.rows)
        V = 2 if kind == "files" else 1
        for name, views in [("images", V)] + [(k, 2) for k in whole.params]:
            take = [m.images if name == "images" else m.params[name] for m in mine]
            together = torch.cat([x.unflatten(0, (views, -1)) for x in take], 1).flatten(0, 1)
            expected = whole.images if name == "images" else whole.params[name]
            assert torch.equal(together, expected), name


# ---------------------------------------------------------------------------------- pixels


def photograph(height, width, seed):
    """Image with structure at several scales, uint8 (height, width, 3)."""
    g = torch.Generator().manual_seed(seed)
    x = sum(F.interpolate(torch.rand(1, 3, n, n, generator=g), (height, width), mode="bilinear")
            for n in (3, 9, 31))[0] / 3
    return (x * 255).byte().permute(1, 2, 0).numpy()


@pytest.mark.parametrize(("height", "width", "size"), [(80, 120, 32), (40, 30, 32), (64, 64, 64)])
def test_worker_crops_equal_crops_in_memory(tmp_path, height, width, size):
    """PIL rounds to 8 bits after each of its two passes: up to one level of 255, and a rounding
    that falls the other way; on average much less."""
    pictures = [photograph(height, width, seed) for seed in range(8)]
    for i, x in enumerate(pictures):
        Image.fromarray(x).save(tmp_path / f"{i}.png")
    columns = dict(label=torch.zeros(8, dtype=torch.long))
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    tables = (common.Table(columns, {}, images),
              common.Table(columns, {}, paths=[str(tmp_path / f"{i}.png") for i in range(8)]))
    aug = dict(PLAIN, size=size, crop=(0.08, 1.0), flip=0.5)
    args = flags("--batch-size", 8)
    memory, files = (common.augment(next(common.Data(t, t, args, CPU).batches(0, 1, aug)))
                     for t in tables)
    assert memory.shape == files.shape == (2, 8, 3, size, size)
    difference = 255 * (memory - files).abs()
    assert difference.max() <= 1.51 and difference.mean() < 0.4
    assert 255 * (memory[0] - files[1]).abs().mean() > 5  # another crop is another image


@pytest.mark.parametrize("kind", ["memory", "files"])
@pytest.mark.parametrize(("size", "resized"), [(32, 32), (48, 64), (64, 64), (224, 256)])
def test_evaluation_view(tmp_path, kind, size, resized):
    """The short side to the next power of two, then the central square; or all of it as a square.
    Compared with PIL's own resizing; the tensor form keeps fractions of a level."""
    picture = photograph(90, 130, 0)
    Image.fromarray(picture).save(tmp_path / "x.png")
    column = dict(label=torch.zeros(1, dtype=torch.long))
    if kind == "memory":
        table = common.Table(column, {}, torch.from_numpy(picture[None]).permute(0, 3, 1, 2))
    else:
        table = common.Table(column, {}, paths=[str(tmp_path / "x.png")])
    data = common.Data(table, table, flags("--batch-size", 1), CPU)

    def view(resize):
        out = next(data.eval_batches(table, torch.arange(1), size, resize))
        assert out.shape == (1, 3, size, size) and out.dtype == torch.float32
        return out[0].permute(1, 2, 0)

    original = Image.fromarray(picture)
    long = int(resized * 130 / 90)
    x = original.resize((long, resized), Image.Resampling.BILINEAR)
    left, top = round((long - size) / 2), round((resized - size) / 2)
    expected = np.asarray(x.crop((left, top, left + size, top + size))).astype(np.float32)
    tolerance = 0 if kind == "files" else 1.01
    assert (view(False) - torch.from_numpy(expected)).abs().max() <= tolerance
    square = original.resize((size, size), Image.Resampling.BILINEAR)
    square = torch.from_numpy(np.asarray(square).astype(np.float32))
    assert (view(True) - square).abs().max() <= tolerance
    assert (view(True) - view(False)).abs().mean() > 5


def test_evaluation_view_leaves_an_image_of_that_size_alone():
    images = common.shapes(4, 0)[0]
    table = common.Table(dict(label=torch.zeros(4, dtype=torch.long)), {}, images)
    data = common.Data(table, table, flags(), CPU)
    for resize in (False, True):
        out = next(data.eval_batches(table, torch.tensor([2, 0]), 32, resize))
        assert torch.equal(out, images[[2, 0]].float())


def test_picture_of_a_data_set(tmp_path, capsys, shapes_once):
    """Eight rows: an image as it is, and seven views; 32 pixels and a border of 2, doubled."""
    file = tmp_path / "new" / "sheet.png"
    common.main(["--dataset", "shapes", "--picture", str(file), "--device", "cpu",
                 "--threads", "1"])
    assert "4096 training and 1024 test images; columns label, coarse" in capsys.readouterr().out
    sheet = np.asarray(Image.open(file)).astype(int)
    assert sheet.shape == (2 * (8 * 34 + 2),) * 2 + (3,)
    images = read("--dataset", "shapes", "--batch-size", 256).train.images
    rows = torch.randperm(4096, generator=common.generator(0, 0, "order"))[:8]
    tiles = np.stack([sheet[4:, 4 + 68 * j:68 + 68 * j:2][::2] for j in range(8)])
    for i, row in enumerate(rows.tolist()):
        first, *views = tiles[:, 34 * i:34 * i + 32]
        assert abs(first - images[row].permute(1, 2, 0).numpy()).max() <= 1
        assert all(abs(first - view).mean() > 2 for view in views)
    assert (sheet[:4] == 255).all() and (sheet[:, :4] == 255).all()  # the border is white


def test_clusters_from_a_hierarchy_and_from_several_columns(tmp_path):
    tree = {"LabelName": "thing", "Level": 0, "Subcategory": [
        {"LabelName": "animal", "Level": 1, "Subcategory": [
            {"LabelName": "dog", "Level": 2}, {"LabelName": "cat", "Level": 2}]},
        {"LabelName": "car", "Level": 1}]}
    table = common.Table(
        dict(label=torch.tensor([0, 1, 2, 1]), a=torch.tensor([5, 5, 0, 5]),
             b=torch.tensor([1, 0, 1, 0])),
        dict(label=["dog", "cat", "car"]), paths=list("wxyz"))
    args = SimpleNamespace(label="label", attributes=None, loss="cl-infonce", dataset="folder",
                           hierarchy=str(tmp_path / "tree.json"), clusters="level_1")
    Path(args.hierarchy).write_text(json.dumps(tree))
    ids, about = clinfonce.auxiliary_ids(table, args)
    assert ids.tolist() == [0, 0, 1, 0] and about["K"] == 2  # animal, animal, car, animal
    args.clusters = "level_2"
    assert clinfonce.auxiliary_ids(table, args)[0].tolist() == [2, 1, 0, 1]  # sorted names
    args.clusters = "a+b"  # tuples (0, 1), (5, 0), (5, 1)
    assert clinfonce.auxiliary_ids(table, args)[0].tolist() == [2, 1, 0, 1]
    table.columns["b"][0] = -1
    with pytest.raises(common.BadInput, match="row 0 has id -1"):
        clinfonce.auxiliary_ids(table, args)
    args.clusters = "level_1"
    table.columns["label"][3] = -1  # unlabelled: in no group
    with pytest.raises(common.BadInput, match="row 3 has id -1"):
        clinfonce.auxiliary_ids(table, args)
    for text, words in (("[]", "not a tree"), ("{}", "not a tree"),
                        (json.dumps(tree).replace('"cat"', '"cow"'), "does not have class cat")):
        Path(args.hierarchy).write_text(text)
        with pytest.raises(common.BadInput, match=words):
            clinfonce.auxiliary_ids(table, args)


# ---------------------------------------------------------------------------------- one step ahead


def one_draw(calls, fails=None):
    """A `draw` that notes (step, thread) in calls and fails at one step."""
    def draw(step, own):
        calls.append((step, threading.current_thread()))
        if step == fails:
            raise ValueError(f"draw of step {step}")
        return dict(number=torch.tensor([step]), part=torch.arange(8)[own])
    return draw


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_a_thread_draws_one_step_ahead_and_ends_with_the_loop(numbered, kind):
    before, calls = threading.active_count(), []
    batches = numbered(kind).batches(2, 9, AUG, draw=one_draw(calls))
    for step in (2, 3):
        batch = next(batches)
        assert batch.drawn["number"].tolist() == [batch.step] == [step]
        assert torch.equal(batch.drawn["part"], torch.arange(8)[batch.own])
    end = time.time() + 20
    while len(calls) < 3 and time.time() < end:
        time.sleep(0.01)
    time.sleep(0.05)
    # a loader of files takes its next plan itself, before it needs it
    assert [s for s, _ in calls] == [2, 3, 4] if kind == "memory" else [2, 3, 4, 5][:len(calls)]
    assert threading.main_thread() not in {thread for _, thread in calls}
    batches.close()
    assert threading.active_count() == before


def test_no_process_is_forked_while_the_thread_draws():
    """A reader would inherit the locks that the thread holds, and wait for them for ever."""
    done = []

    def draw(step):
        done.append(f"begin {step}")
        time.sleep(0.3)
        done.append(f"end {step}")

    steps = common._one_ahead(draw, range(2))
    next(steps)
    while "begin 1" not in done:
        time.sleep(0.01)
    child = os.fork()
    if child == 0:
        os._exit(0 if done[-1] == "end 1" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_an_error_of_the_thread_ends_the_loop(numbered, kind):
    before, seen = threading.active_count(), []
    with pytest.raises(ValueError, match="draw of step 4"):
        for batch in numbered(kind).batches(0, 9, AUG, draw=one_draw([], fails=4)):
            seen.append(batch.step)
    assert seen in ([0, 1, 2, 3], [0, 1, 2])
    assert threading.active_count() == before


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_views_picture_augments_eight_rows(numbered, kind, tmp_path, monkeypatch):
    """A batch of 256 images of 224 pixels in seven views would take gigabytes."""
    data, real, rows = numbered(kind, batch=12), common.apply_chunks, []

    def apply_chunks(x, chunks, *more):
        rows.append((len(x), sum(len(c["row"]) for c in chunks)))
        return real(x, chunks, *more)

    whole = common.augment(next(data.batches(0, 1, AUG, 7)))
    monkeypatch.setattr(common, "apply_chunks", apply_chunks)
    common.views_picture(data, AUG, tmp_path / "views.png")
    assert rows == [(8 if kind == "memory" else 56, 56)]
    few = common.augment(next(data.batches(0, 1, AUG, 7, own=slice(8))))
    assert torch.equal(few, whole[:, :8])

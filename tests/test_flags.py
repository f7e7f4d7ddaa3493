"""Flags: --help, recipe `own`, who set a flag, schedules that cannot act, numbers that are none."""
import argparse
import importlib
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from conftest import write_folder
from PIL import Image

import cld
import clinfonce
import common
import rince
import sogclr_clip
import wcl

SCRIPTS = [*common.METHODS, "linear_eval", "ood_eval", "common"]
TINY = ["--device", "cpu", "--threads", "1", "--workers", "0", "--knn-k", "5"]
SHAPES = [*TINY, "--limit-train", "64", "--batch-size", "16"]


def parser_of(script, argv=()):
    """The parser that a script makes."""
    with mock.patch.object(common, "run", lambda train, parser, argv: found.append(parser)):
        found = []
        importlib.import_module(script).main(list(argv))
    return found[0]


def parse(script, *argv):
    return parser_of(script, argv).parse_args(list(argv))


@pytest.fixture
def own(tmp_path):
    """A folder `pets` of 2 x 10 training images, and the flags that name it."""
    write_folder(tmp_path / "pets", {"train/cat": 10, "train/dog": 10, "val/cat": 3, "val/dog": 3})
    return ["--dataset", "folder", "--data-dir", str(tmp_path / "pets")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_one_line_a_flag_with_the_value_in_force(script, capsys):
    for recipe in parser_of(script).recipes:
        argv = ["--recipe", recipe, "--seed", "7"]
        argv += ["--checkpoint", "none"] * script.endswith("eval")
        args = vars(parse(script, *argv))
        parser = parser_of(script)
        with pytest.raises(SystemExit) as stop:
            parser.parse_args([*argv, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out.split("recipes: ")[1]
        lines = text.splitlines()
        assert all(len(line) <= 100 for line in lines)
        assert " ".join(text.split("\n\n")[0].split()) == ", ".join(parser.recipes)
        for a in parser._actions:
            flag = next(name for name in a.option_strings if name.startswith("--"))
            line, = (s for s in lines if s.split()[:1] == [flag])
            value = args.get(a.dest, True)  # of --help
            assert line.split(flag, 1)[1].strip().startswith(common.shown(value)), line
            assert len(common.shown(value)) > 15 or not line.endswith("..."), line  # nothing is cut
            for choice in a.choices or ():
                assert choice in (line + text[text.index(f"values of {flag}:"):]
                                  if f"values of {flag}:" in text else line)
            assert a.help or a.choices, flag


@pytest.mark.parametrize("method", common.METHODS)
def test_recipe_own(method, own, tmp_path):
    args = parse(method, *own)
    assert args.recipe == "own" and args.out == f"runs/{method}-own-pets-seed0"
    assert (args.image_size, args.arch) == (32, "resnet-tiny")
    demo = parse(method)
    assert demo.recipe == "demo" and demo.out == f"runs/{method}-demo-seed0"
    assert parse(method, "--dataset", "cifar10").out == f"runs/{method}-own-cifar10-seed0"
    assert parse(method, *own, "--recipe", "demo").recipe == "demo"
    assert (args.lr, args.batch_size) == dict(
        cld=(0.06, 256), sogclr_clip=(1e-3, 128)).get(method, (0.5, 256))
    if method == "rince":
        assert args.loss == "scl-out"
        assert parse(method, *own, "--similarity", "f.csv").loss == "rince-out-in"
    if method == "cld":  # half of the rows that are grouped
        assert args.k == 128 and parse(method, *own, "--batch-size", "32").k == 16
    if method != "sogclr_clip":
        assert args.crop == [0.2, 1.0]


RUNS = {
    "clinfonce": [], "cld": [], "rince": [], "wcl": [],
    "wcl large": ["--recipe", "cifar10", "--arch", "resnet-tiny", "--warmup", "0"],
}


@pytest.mark.parametrize("name", RUNS)
def test_common_shows_the_views_that_a_run_trains_with(name, own, tmp_path, capsys):
    method = name.split()[0]
    g = np.random.default_rng(0)
    for path in (tmp_path / "pets").rglob("*.png"):
        Image.fromarray(g.integers(0, 256, (40, 30, 3), np.uint8)).save(path)
    shared = [*TINY, *own, "--batch-size", "10", "--epochs", "2", "--seed", "3", "--image-size",
              "24"]
    importlib.import_module(method).main([*shared, *RUNS[name], "--out", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    assert printed.startswith("recipe own") or "--recipe" in RUNS[name]
    sheet = tmp_path / "sheet.png"
    recipe = RUNS[name][:2]
    common.main(["--method", method, *shared, *recipe, "--picture", str(sheet)])
    assert sheet.read_bytes() == (tmp_path / "run/views.png").read_bytes()
    if not recipe:  # without a recipe all methods have the same views
        common.main([*shared, "--picture", str(sheet)])
        assert sheet.read_bytes() == (tmp_path / "run/views.png").read_bytes()
        common.main([*shared, "--picture", str(sheet), "--crop", "0.5", "1"])
        assert sheet.read_bytes() != (tmp_path / "run/views.png").read_bytes()


def test_k_of_own_images(own, refused_by, tmp_path, capsys):
    flags = [*TINY, *own, "--batch-size", "10", "--epochs", "2", "--clusters", "kmeans"]
    refused_by(clinfonce.main, [*flags, "--k", "21"], "--k 21 needs at least 21 images, found 20",
               "take --k 2", says=["recipe own"])
    clinfonce.main([*flags, "--kmeans", "torch", "--out", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    assert "--k 2 for 20" not in printed  # 20 images: two clusters of ten


def test_an_unlabelled_folder_has_no_entropies(tmp_path, capsys):
    write_folder(tmp_path / "flat", {".": 30})
    clinfonce.main([*TINY, "--dataset", "folder", "--data-dir", str(tmp_path / "flat"), "--epochs",
                    "2", "--batch-size", "8", "--clusters", "kmeans", "--k", "3", "--kmeans",
                    "torch", "--out", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    assert "clusters kmeans (until the first K-means: every image): K = 24\n" in printed
    assert "H(Z)" not in printed and "H_Z" not in (tmp_path / "run/log.jsonl").read_text()


@pytest.mark.parametrize("main, argv, words", [
    (clinfonce.main, ["--recipe", "demo", "--batch-size", "10"],
     "(--clusters coarse+pattern+size comes from --recipe demo)"),
    (clinfonce.main, ["--limit-train", "5"], "(--batch-size 256 comes from --recipe own)"),
    (clinfonce.main, ["--batch-size", "20", "--epochs", "0"], "--epochs must be above 0, got 0"),
    (rince.main, ["--loss", "rince-in"], "(--ranks label comes from --recipe own)"),
    (cld.main, ["--base", "moco", "--batch-size", "5000"],
     "must hold the keys of one step (--queue 4096 is the default)"),
])
def test_flags_that_nobody_typed_name_who_set_them(main, argv, words, own, refused_by):
    line = refused_by(main, [*TINY, *own, *argv], words, says=["recipe own"])
    assert line.endswith(")") == words.endswith(")")


@pytest.mark.parametrize("main, argv, words", [
    (clinfonce.main, "--warmup 3", "--warmup 3 is longer than the training (--epochs 2)"),
    (cld.main, "--warmup 3", "--warmup 3 is longer than the training (--epochs 2)"),
    # not the warm-up of 10 epochs that comes from the recipe, as this schedule has none
    (clinfonce.main, "--recipe cifar10 --dataset shapes --clusters instance --schedule exp "
     "--batch-size 9999", "--batch-size 9999 is larger than"),
    (cld.main, "--recipe cifar10", "--warmup 5 is longer"),
    (cld.main, "--base infomin --schedule infomin --warmup 3", "--warmup 3 is longer"),
    (cld.main, "--schedule steps --warmup 3 --milestones 1", "--warmup 3 is longer"),
    (cld.main, "--schedule steps --warmup 0", "--milestones 120 160 200: the first must be"),
    (cld.main, "--schedule steps --warmup 0 --milestones 2 0", "--milestones 2 0: the first must"),
    (rince.main, "--recipe cifar100", "--warmup 10 is longer than the training (--epochs 2)"),
    (rince.main, "--warmup 3", "--warmup 3 is longer"),
    (wcl.main, "--warmup 2", "--warmup 2 must be shorter than --epochs 2"),
    (sogclr_clip.main, "--warmup 9",
     "--warmup 9 is longer than the training (--epochs 2, 8 steps)"),
    (sogclr_clip.main, "", "--warmup 60 is longer"),
    (sogclr_clip.main, "--epochs 1 --schedule authors --warmup 1",
     "--warmup 1 of --schedule authors in 4 steps: the rate never gets above 1e-05"),
    (sogclr_clip.main, "--epochs 1 --warmup 0 --gamma 0.5", "--gamma is not used in --epochs 1"),
    (sogclr_clip.main, "--epochs 1 --warmup 0 --loss isogclr --eta-schedule exp",
     "--eta-schedule is not used in --epochs 1"),
    (cld.main, "--key-momentum 0.9", "--key-momentum is not used by --base npid"),
    (cld.main, "--base byol --tau 0.2", "--tau is not used by --base byol"),
    (rince.main, "--loss scl-superclass --tau-max 0.9", "--tau-max is not used by --loss scl-"),
    (wcl.main, "--lars-groups kind", "--lars-groups is not used by --optimizer sgd"),
    (wcl.main, "--crops 1 --crop-positives components --crop-k 3",
     "--crop-k is not used by --crop-positives components"),
    (wcl.main, "--warmup 1 --weak-epochs 0 --weak-crop 0.5 1",
     "--weak-crop is not used in 0 weak epochs"),
    (wcl.main, "--warmup 0 --weak-jitter 0 0 0 0", "--weak-jitter is not used in 0 weak epochs"),
    (sogclr_clip.main, "--loss clip --tau-lr 0.1", "--tau-lr is not used without --learn-tau"),
    (sogclr_clip.main, "--loss cyclip --tau-bounds 0.1 1",
     "--tau-bounds is not used without --learn-tau"),
    (sogclr_clip.main, "--arch resnet18", "--arch is not used by sogclr_clip.py"),
    (sogclr_clip.main, "--loss isogclr --eta-schedule exp",
     "--eta-schedule is not used with --eta up to 1e-4"),
    (sogclr_clip.main, "--loss vicreg --mask-repeats", "--mask-repeats is not used by --loss vic"),
    (sogclr_clip.main, "--loss sogclr-dro --rho -1", "--rho must be at least 0, got -1"),
    (rince.main, "--arch resnet-tiny --stem cifar", "--stem is not used by --arch resnet-tiny"),
])
def test_flags_that_cannot_act_are_refused(main, argv, words, refused_by):
    refused_by(main, [*SHAPES, "--epochs", "2", *argv.split()], words)


@pytest.mark.parametrize("method, schedule", [
    (clinfonce, "warmup33"), (clinfonce, "exp"), (clinfonce, "cosine-epoch"), (cld, "cosine"),
    (sogclr_clip, "authors")])
def test_rates_are_never_above_lr(method, schedule):
    """The authors' floors of 1e-5 and 1e-6 do not raise a smaller --lr."""
    for lr in (0.0, 1e-7):
        args = SimpleNamespace(schedule=schedule, lr=lr, epochs=8, warmup=0)
        assert max(method.learning_rate(step, 4, args) for step in range(32)) <= lr


def test_rate_of_the_authors_without_warm_up():
    """Epoch 0 has the peak, not the start of a warm-up that does not take place."""
    args = SimpleNamespace(schedule="authors", lr=0.1, epochs=8, warmup=0)
    assert [sogclr_clip.learning_rate(step, 4, args) for step in range(4)] == [0.1] * 4


@pytest.mark.parametrize("script", SCRIPTS)
def test_numbers_must_be_finite(script, tmp_path, capsys):
    """Every flag of floats, on every script: no NaN, no infinity, nothing above float32."""
    module, checked = importlib.import_module(script), 0
    for action in parser_of(script)._actions:
        if action.type is not float:
            continue
        for bad in ("nan", "inf", "-inf", "1e39"):
            n = action.nargs if isinstance(action.nargs, int) else 1
            values = ["0.5"] * (n - 1) + [bad]
            argv = [*TINY[:-2], "--out", str(tmp_path / "run"), *(["--checkpoint", "none"] *
                    script.endswith("eval")), action.option_strings[0]]
            argv = [*argv[:-1], f"{argv[-1]}={bad}"] if n == 1 else [*argv, *values]
            with pytest.raises(SystemExit) as stop:
                module.main(argv)
            line = capsys.readouterr().err
            assert stop.value.code == 2 and action.option_strings[0] in line, (argv, line)
            checked += 1
    assert checked >= 27


def test_every_float_flag_is_declared_as_one():
    """The check goes by type: no flag of numbers may hide behind another one."""
    for script in SCRIPTS:
        for a in parser_of(script)._actions:
            number = isinstance(a.default, float) or (
                isinstance(a.default, list) and any(isinstance(x, float) for x in a.default))
            assert a.type is float or not number, a.dest
    assert argparse  # the parsers are argparse's


@pytest.mark.parametrize("flag", ["--init", "--out", "--recipe", "--train-file"])
def test_empty_values_are_refused(flag):
    """A shell variable that is not set gives an empty word, which is not the same as no flag."""
    with pytest.raises(common.BadInput, match=f"{flag} is empty"):
        parse("clinfonce", flag, "")


def test_a_name_that_is_too_long(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        clinfonce.main(["--out", str(tmp_path / ("x" * 300))])
    text = capsys.readouterr().err
    assert stop.value.code == 1 and text.count("\n") == 1 and "xxx: File name too long" in text

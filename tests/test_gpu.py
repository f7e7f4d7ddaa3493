"""What a GPU would do with the scripts, on a pretended one: see pretend_cuda.py.

Every variant of the training must run without a device error, log exactly what --device cpu logs,
and wait for the device no more often in a step than its row of VARIANTS says.
"""
import contextlib
import functools
import json
from pathlib import Path

import numpy as np
import pretend_cuda
import pytest
import torch
from PIL import Image
from runs import BASE, checkpoint, differences, log_of

import cld
import clinfonce
import common
import linear_eval
import ood_eval
import rince
import sogclr_clip
import wcl

TRAIN = [*BASE[2:], "--limit-train", "32", "--batch-size", "16", "--epochs", "2", "--knn-every",
         "2", "--save-every", "2", "--workers", "0"]  # 2 epochs of 2 steps
PHOTOS = ["--dataset", "folder", "--data-dir", "DATA/tree"]
CAPTIONS = ["--dataset", "captions", "--data-dir", "DATA/tree", "--train-file", "train.json",
            "--test-file", "val.json", "--image-size", "32"]
KMEANS, MOCO = ["--clusters", "kmeans", "--k", "6"], ["--queue", "64", "--base"]
LARS = ["--optimizer", "lars", "--no-nesterov"]
VARIANTS = {  # name: module, flags, waits a step
    "instance": (clinfonce, [], 1),
    "label": (clinfonce, ["--clusters", "label"], 1),
    "views": (clinfonce, ["--clusters", "label", "--blur", ".5", "--solarize", ".3", "--erase",
                          ".3", "--amp", "bf16"], 1),
    "fp16": (clinfonce, ["--clusters", "label", "--amp", "fp16"], 2),
    "kmeans on the device": (clinfonce, [*KMEANS, "--kmeans", "torch"], 1),
    "kmeans by faiss": (clinfonce, [*KMEANS, "--kmeans", "faiss", *PHOTOS], 1),
    "dual": (clinfonce, [*KMEANS, "--kmeans", "torch", "--kmeans-warmup", "1", "--dual",
                         "--sync-bn", *LARS], 1),
    "cross-entropy": (clinfonce, ["--loss", "ce", "--clusters", "label"], 1),
    "npid": (cld, [], 1),
    "npid without cld": (cld, ["--lambda-cld", "0"], 1),
    "npid nce": (cld, ["--nce", "32"], 1),
    "cuts": (cld, ["--grouping", "ncuts", "--k", "6"], 2),
    "moco": (cld, [*MOCO, "moco", "--head", "normlinear"], 1),
    "mocov2 from files": (cld, [*MOCO, "mocov2", "--head", "normmlp", "--amp", "bf16", *PHOTOS], 1),
    "infomin": (cld, [*MOCO, "infomin", "--head", "mlp"], 1),
    "infomin from files": (cld, [*MOCO, "infomin", "--randaugment", "2", "10", "--blur", ".5",
                                 *PHOTOS], 1),
    "byol": (cld, ["--base", "byol", *LARS], 1),
    "queue": (rince, ["--queue", "64"], 1),
    "keys of the batch": (rince, ["--queue", "0"], 1),
    "rince-in": (rince, ["--loss", "rince-in", "--queue", "64", "--rank2-positives",
                         "cumulative"], 1),
    "rince-uni": (rince, ["--loss", "rince-uni", "--queue", "64"], 1),
    "rince cross-entropy": (rince, ["--loss", "ce"], 1),
    "similarity from files": (rince, [*PHOTOS, "--ranks", "label", "--similarity",
                                      "DATA/similar.csv", "--queue", "64"], 1),
    "wcl": (wcl, ["--amp", "bf16", "--picture"], 1),
    "beta 0": (wcl, ["--beta", "0", *LARS], 1),
    "crops": (wcl, ["--crops", "2"], 1),
    "crops from files": (wcl, ["--crops", "2", "--crop-positives", "components", *PHOTOS], 1),
    **{loss: (sogclr_clip, [*CAPTIONS, "--loss", loss], 1) for loss in sogclr_clip.LOSSES},
    "tau of a sample": (sogclr_clip, [*CAPTIONS, "--loss", "clip", "--learn-tau", "sample"], 1),
    "sogclr on shapes": (sogclr_clip, ["--warmup", "0", ], 1),
    "tempnet bf16": (sogclr_clip, [*CAPTIONS, "--loss", "isogclr-tempnet", "--model", "tiny-vit",
                                   "--amp", "bf16"], 1),
    "sogclr fp16": (sogclr_clip, [*CAPTIONS, "--amp", "fp16", "--optimizer", "sgd"], 2),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder: tree/ of JPEGs of several sizes with captions, similar.csv, out/ of outliers."""
    root, random = tmp_path_factory.mktemp("gpu"), np.random.default_rng(0)
    for split, n in (("train", 8), ("val", 4)):
        captions = []
        for name in ("apple", "bear", "cat", "dog"):
            (root / "tree" / split / name).mkdir(parents=True)
            for i in range(n):
                size = random.integers(40, 60, 2)
                Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(
                    root / "tree" / split / name / f"{i}.jpg")
                captions.append(dict(image=f"{split}/{name}/{i}.jpg",
                                     caption=[f"the {name} of number {i}", f"{name} {i} again"]))
        (root / "tree" / f"{split}.json").write_text(json.dumps(captions))
    (root / "out").mkdir()
    for i in range(20):
        Image.fromarray(random.integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(
            root / "out" / f"{i}.jpg")
    (root / "similar.csv").write_text("class_a,class_b,similarity\napple,bear,0.5\ncat,dog,0.6\n")
    return root


@pytest.fixture
def run(run_main, root, rendered, monkeypatch):
    """run(variant or (module, flags), folder, device, main=None, stop=None): one run; the events on
    the pretended GPU, or none on the CPU."""
    monkeypatch.setattr(common, "pyplot", lambda: None)  # no test here looks at a picture
    monkeypatch.setattr(common, "shapes", lambda n, *more, **renders: rendered(
        n // 16, *more, **renders))

    def run(variant, folder, device, main=None, stop=None):
        module, flags = VARIANTS[variant][:2] if isinstance(variant, str) else variant
        argv = [str(f).replace("DATA", str(root)) for f in flags] + ["--device", device]
        with pretend_cuda.one_gpu() if device == "cuda" else contextlib.nullcontext() as gpu:
            if isinstance(variant, str):
                run_main(main or module.main, folder, [*TRAIN, *argv], stop)
            else:
                module.main([*argv, "--out", str(folder)])
        return gpu.events if gpu else []
    return run


def of_a_step(events, kind="wait"):
    """Texts on the events between the last two calls of check_loss, which every step has once."""
    ends = [i for i, e in enumerate(events) if e.function == "check_loss"]
    return [f"{e.what}: {e.site}" for e in events[ends[-2] + 1:ends[-1] + 1] if e.kind == kind]


def assert_same_log(a, b):
    """Two runs logged the same but for the device."""
    for log in (logs := [log_of(a), log_of(b)]):
        log[0].pop("device"), log[0]["args"].pop("device")
    assert logs[0] == logs[1]


@pytest.mark.parametrize("name", VARIANTS)
def test_training(name, run, tmp_path):
    _, flags, allowed = VARIANTS[name]
    events = run(name, tmp_path / "cuda", "cuda")
    waits = of_a_step(events)
    assert len(waits) <= allowed, f"{allowed} waits a step are allowed:\n" + "\n".join(waits)
    assert of_a_step(events, "pageable") == []
    copies = [c for c in of_a_step(events, "pinned") if "part.images = " not in c]  # of files
    assert len(copies) == 1, copies  # rows, plan and draws of a step travel together
    if "--amp" not in flags:
        run(name, tmp_path / "cpu", "cpu")
        assert_same_log(tmp_path / "cpu", tmp_path / "cuda")


RESUMED = ["fp16", "dual", "infomin", "queue", "wcl", "hybrid"]


@pytest.mark.parametrize("name", RESUMED)
def test_resume(name, run, tmp_path):
    run(name, tmp_path / "whole", "cuda")
    run(name, tmp_path / "stopped", "cuda", stop=2)
    assert checkpoint(tmp_path / "stopped")["step"] == 3
    run(name, tmp_path / "stopped", "cuda")
    assert differences(*(checkpoint(tmp_path / x) for x in ("whole", "stopped"))) == []


# ------------------------------------------------------------------ evaluation


@pytest.fixture
def trained(run, root):
    """trained(variant): the checkpoint of a run on the CPU, trained once."""
    def trained(name):
        if not (root / name / "checkpoint.pt").exists():
            run(name, root / name, "cpu")
        return root / name / "checkpoint.pt"
    return trained


PROBE = [*BASE[2:4], "--workers", "0"]
FAST = ["--recipe", "fast", "--epochs", "2", "--batch-size", "4", "--picture"]
LINEAR = ["--recipe", "cifar", "--epochs", "2", "--batch-size", "16"]
TUNED = ["--recipe", "semi-10", "--epochs", "2", "--batch-size", "8", "--fraction", "1"]
OOD = ["--bootstrap", "20", "--k", "5"]
EVALUATIONS = {  # name: module, trained variant, flags, waits a step
    "fast": (linear_eval, "label", [*FAST, "--retrieval-labels", "coarse", "colour"], None),
    "fast from files": (linear_eval, "kmeans by faiss", FAST, None),
    "linear": (linear_eval, "label", LINEAR, 1),
    "linear from files": (linear_eval, "kmeans by faiss", LINEAR, 1),
    "finetune": (linear_eval, "label", [*TUNED, "--amp", "fp16"], 2),
    "finetune from files": (linear_eval, "kmeans by faiss", TUNED, 1),
    "ood": (ood_eval, "queue", OOD, None),
    "ood, softmax": (ood_eval, "rince cross-entropy", OOD, None),
    "ood from files": (ood_eval, "similarity from files", [
        *OOD, "--outliers", "art=../out", "shapes", "--data-dir", "DATA/tree"], None),
    "clip": (sogclr_clip, "sogclr on shapes", [], None),
    "clip from files": (sogclr_clip, "sogclr", [], None),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluation(name, run, trained, tmp_path, capsys):
    module, variant, flags, allowed = EVALUATIONS[name]
    results = []
    given = ["--evaluate" if module is sogclr_clip else "--checkpoint", trained(variant)]
    for device in ("cuda", "cpu"):
        out = tmp_path / device / ("" if module is sogclr_clip else "results.json")
        waits = run((module, [*given, *PROBE, *flags]), out, device)
        results.append(json.loads(next((tmp_path / device).glob("*.json")).read_text())["results"])
        if device == "cuda" and allowed is not None:
            assert len(waits := of_a_step(waits)) <= allowed, "\n".join(waits)
    assert results[0] == results[1] or "--amp" in flags


@pytest.mark.parametrize("limit", [0, 3000], ids=["all", "only the training set's"])
@pytest.mark.parametrize("name", ["fast from files", "linear from files"])
def test_features_kept_on_the_cpu(name, limit, run, trained, tmp_path, monkeypatch):
    """Features of large sets are float16 on the CPU: 32 training and 16 test images in 128-d."""
    real, dtypes, results = common.extract_features, set(), []

    def extract_features(*args, **kwargs):
        h = real(*args, **kwargs, limit=limit)
        dtypes.add((len(h), h.dtype, h.is_cuda))
        return h

    module, variant, flags, _ = EVALUATIONS[name]
    checkpoint = trained(variant)
    monkeypatch.setattr(common, "extract_features", extract_features)
    for device in ("cuda", "cpu"):
        dtypes.clear()
        out = tmp_path / f"{device}.json"
        run((module, ["--checkpoint", checkpoint, *PROBE, *flags]), out, device)
        results.append(json.loads(out.read_text())["results"])
        test = (16, torch.float16, False) if limit == 0 else (16, torch.float32, device == "cuda")
        assert dtypes == {test} | ({(32, torch.float16, False)} if "fast" in name else set())
    assert results[0] == results[1]


@pytest.mark.parametrize("kmeans", ["torch", "faiss", "auto"])
def test_embeddings_to_cluster_kept_on_the_cpu(kmeans, run, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "extract_features",
                        functools.partial(common.extract_features, limit=0))
    monkeypatch.setitem(VARIANTS, "few", (clinfonce, [*KMEANS, "--kmeans", kmeans], 1))
    run("few", tmp_path / "cuda", "cuda")
    if kmeans != "auto":  # which is another one on a CPU
        run("few", tmp_path / "cpu", "cpu")
        assert_same_log(tmp_path / "cpu", tmp_path / "cuda")


def test_the_fast_probe_waits_once_an_epoch(run, trained, tmp_path):
    _, variant, flags, _ = EVALUATIONS["fast"]
    events = run((linear_eval, ["--checkpoint", trained(variant), *PROBE, *flags]),
                 tmp_path / "results.json", "cuda")
    waits = [e for e in events if e.kind == "wait" and e.function in (
        "fit_softmax_regression", "standardize")]
    # two fits of two epochs and their grid; held-out and test rows; 8 steps an epoch wait for none
    assert len(waits) <= 2 * (2 + 1) + 2, waits


@pytest.mark.parametrize("device, amp, expected", [
    ("cuda", "bf16", torch.bfloat16), ("cuda", "none", torch.float32),
    ("cpu", "bf16", torch.float32)])
def test_evaluation_in_mixed_precision_on_cuda_only(device, amp, expected, run, tmp_path,
                                                    monkeypatch):
    found, real = set(), common.knn_accuracy

    def knn_accuracy(module, data, select=None):
        hook = module.layer4.register_forward_hook(lambda m, x, y: found.add(y.dtype))
        try:
            return real(module, data, select)
        finally:
            hook.remove()

    monkeypatch.setattr(common, "knn_accuracy", knn_accuracy)
    monkeypatch.setitem(VARIANTS, "mixed", (clinfonce, ["--clusters", "label", "--amp", amp], 1))
    run("mixed", tmp_path / device, device)
    assert found == {expected}


# ------------------------------------------------------------------ the tests can fail


def changed(module, old, new):
    """main of a module in which a text, which it has once, is replaced by another."""
    text = Path(module.__file__).read_text()
    assert text.count(old) == 1, old
    names = dict(__name__=module.__name__)
    exec(compile(text.replace(old, new), module.__file__, "exec"), names)
    return names["main"]


@pytest.mark.parametrize("name, text, less", [
    ("label", '!= "kmeans").to(device)', '!= "kmeans")'),
    ("queue", "Ranks(ids, table).to(device)", "Ranks(ids, table)"),
    ("npid", "uniform_rows(n, args.dim, random).to(device)", "uniform_rows(n, args.dim, random)"),
    ("sogclr", "encode(model, pairs.tokens[:1], args).shape[1]).to(device)",
     "encode(model, pairs.tokens[:1], args).shape[1])")])
def test_a_tensor_left_on_the_cpu_raises(name, text, less, run, tmp_path):
    module = VARIANTS[name][0]
    with pytest.raises(pretend_cuda.DeviceError, match=f"cpu.* at .*{module.__name__}.py:"):
        run(name, tmp_path / "cuda", "cuda", changed(module, text, less))


def test_a_new_wait_is_found_with_its_line(run, tmp_path):
    main = changed(clinfonce, "scaler.scale(loss).backward()",
                   "scaler.scale(loss).backward(); z.sum().item()")
    waits = of_a_step(run("label", tmp_path / "cuda", "cuda", main))
    assert len(waits) == 2
    assert "item: clinfonce.py:" in waits[0] and waits[1].startswith("tolist: common.py:")

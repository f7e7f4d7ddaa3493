"""--init: the four image methods begin with the weights of a file."""
import functools
import json
import urllib.error

import pytest
import torch
import torchvision
from runs import SMALL, checkpoint

import cld
import clinfonce
import common
import rince
import sogclr_clip
import wcl

FLAGS = [*SMALL[:-2], "--epochs", "1", "--workers", "0"]
METHODS = {
    clinfonce: ["--clusters", "coarse"], cld: ["--base", "moco", "--queue", "64", "--k", "4"],
    rince: ["--queue", "64"], wcl: ["--warmup", "0", "--hidden", "32", "--dim", "16"]}


@pytest.fixture(autouse=True)
def small(monkeypatch, rendered):
    """A built-in data set of 96 + 48 images."""
    monkeypatch.setitem(common.SOURCES, "shapes", lambda args: tuple(
        common.Table(columns, classes, images.clone())
        for images, columns, classes, _ in (rendered(96, 0), rendered(48, 1))))


@pytest.fixture
def begin(run_main, monkeypatch):
    """begin(method, name, *flags): a run; the states of its networks before the first step."""
    real, states = common.start_run, {}

    def start_run(state, *rest):
        states.update({name: {k: x.clone() for k, x in state[name].state_dict().items()}
                       for name in ("model", "key") if name in state})
        return real(state, *rest)

    def run(method, name, *flags):
        monkeypatch.setattr(common, "start_run", start_run)
        states.clear()
        run_main(method.main, name, [*FLAGS, *METHODS[method], *flags])
        return dict(states)
    return run


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_a_finished_run_is_trained_on(method, begin, tmp_path, capsys):
    """All weights of the file, heads too, are those before the first step, in both networks."""
    begin(method, "one")
    old = checkpoint(tmp_path / "one")["state"]["model"]
    capsys.readouterr()
    file = str(tmp_path / "one/checkpoint.pt")
    states = begin(method, "two", "--init", file)
    assert equal(states["model"], old) and equal(states.get("key", old), old)
    heads = sorted({k.split(".")[0] for k in old} - {"backbone"})
    lines = [json.loads(s) for s in (tmp_path / "two/log.jsonl").read_text().splitlines()]
    init = lines[0]["init"]
    assert (init["file"], init["loaded"], sorted(init["heads"])) == (file, 72, heads)
    assert init["left_out"] == {} and init["prefix"] == "backbone."
    out = capsys.readouterr().out
    assert f"--init {file}: 72 tensors of resnet-tiny" in out
    assert "heads: " + init["heads"][0] in out
    assert "kNN top-1    initial " in out
    assert all(r["seconds"] >= 0 for r in lines if "knn_top1" in r)
    known = [[r["knn_top1"] for r in map(json.loads, open(tmp_path / name / "log.jsonl"))
              if "knn_top1" in r] for name in ("one", "two")]
    assert known[1][0] == known[0][-1]
    # heads that do not fit keep their own initial values, whole
    if method is rince:
        states = begin(method, "three", "--init", file, "--dim", "24")
        fresh = begin(method, "four", "--dim", "24")
        assert all(torch.equal(x, (old if k.startswith("backbone.") else fresh["model"])[k])
                   for k, x in states["model"].items())
        assert all("head" in k for k in json.loads((tmp_path / "three/log.jsonl").read_text().split(
            "\n")[0])["init"]["left_out"])


def test_a_state_dict_of_torchvision(begin, tmp_path):
    torch.manual_seed(5)
    theirs = torchvision.models.resnet18(weights=None)
    torch.save(theirs.state_dict(), tmp_path / "r18.pth")
    argv = ["--arch", "resnet18", "--limit-train", "16", "--init", str(tmp_path / "r18.pth")]
    states = begin(rince, "one", *argv)
    for model in states.values():
        assert all(torch.equal(model["backbone." + k], x) for k, x in theirs.state_dict().items()
                   if not k.startswith("fc."))
    assert json.loads((tmp_path / "one/log.jsonl").read_text().split("\n")[0])["init"][
        "left_out"] == {"fc": 2}


def test_torchvision_by_name(begin, tmp_path, monkeypatch, refused_by):
    torch.manual_seed(6)
    theirs = torchvision.models.resnet18(weights=None).state_dict()
    seen = []

    def download(url, *args, check_hash=False, **kwargs):
        assert check_hash
        seen.append(url)
        if len(seen) > 1:
            raise urllib.error.URLError("no route to host")
        return theirs

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", download)
    argv = ["--arch", "resnet18", "--limit-train", "16", "--init", "torchvision"]
    model = begin(clinfonce, "one", *argv)["model"]
    assert torch.equal(model["backbone.layer4.1.conv2.weight"], theirs["layer4.1.conv2.weight"])
    refused_by(clinfonce.main, [*FLAGS, *argv], f"--init torchvision: the download of {seen[0]} "
               "failed", "no route to host", "--init FILE", status=1)
    assert seen[0].startswith("https://download.pytorch.org/models/resnet18-")


def test_resuming_does_not_read_the_file_again(goes_on_exactly, tmp_path):
    torch.manual_seed(7)
    file = tmp_path / "tiny.pt"
    torch.save(common.resnet("resnet-tiny").state_dict(), file)
    goes_on_exactly(functools.partial(remove_after, file), [
        *SMALL, "--clusters", "coarse", "--workers", "0", "--init", str(file)])


def remove_after(file, argv):
    """Third start: the run that goes on has a checkpoint and no file any more."""
    runs = len(list(file.parent.glob("*/checkpoint.pt")))
    if runs == 2:
        file.unlink()
    clinfonce.main(argv)


def test_refusals(refused_by, tmp_path, run_main):
    refused = functools.partial(refused_by, clinfonce.main)
    file = tmp_path / "r18.pth"
    torch.save(common.resnet("resnet18").state_dict(), file)
    refused([*FLAGS, "--init", file], f"checkpoint {file} is no resnet-tiny")
    refused([*FLAGS, "--init", tmp_path / "gone"], f"{tmp_path}/gone not found")
    refused([*FLAGS, "--init", "torchvision"], "torchvision has no weights for --arch resnet-tiny")
    file.write_bytes(b"x")
    refused([*FLAGS, "--init", file], f"{file} cannot be read")
    refused_by(sogclr_clip.main, ["--init", file], "--init")
    refused([*FLAGS, "--knn-queries", "0"], "--knn-queries must be above 0, got 0")
    run_main(clinfonce.main, "run", FLAGS)
    line = refused([*FLAGS, "--epochs", "3"], "--epochs 1 -> 3",
                   f"--init {tmp_path}/run/checkpoint.pt --out NEW")
    assert "to train for longer" in line
    assert "--init" not in refused([*FLAGS, "--tau", "1"], "--tau 0.2 -> 1.0")

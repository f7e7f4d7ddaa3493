"""Nothing lost: signals with workers, damaged files, kills at any step, two runs in one folder,
changed data."""
import concurrent.futures
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import image, write_folder, write_image, write_pack
from runs import (
    BASE,
    CODE,
    SMALL,
    checkpoint,
    differences,
    end,
    log_of,
    logged_steps,
    start,
    stop_started,
    torchrun,
    wait_for_step,
)

import clinfonce
import common
import linear_eval
import ood_eval
import wcl

# ------------------------------------------------------------------ signals, with workers


def files(folder):
    """Flags of a long run on image files: 2,400 steps."""
    return [*BASE, "--dataset", "folder", "--data-dir", folder / "data", "--batch-size", "16",
            "--epochs", "300", "--clusters", "label", "--knn-k", "5", "--knn-every", "3"]


def processes_of(folder):
    """Ids of all processes with this folder on their command line: also workers, forks."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder) in path.read_text():
                found.append(int(path.parent.name))
        except OSError:
            continue  # it ended meanwhile
    return found


def stopped(folder, name, workers, number, send, script=("clinfonce.py",)):
    """Start a run, send it a signal at a random moment of training or evaluation, wait for all."""
    out = folder / name
    process = start([*files(folder), "--workers", str(workers), "--out", out], script)
    wait_for_step(process, out, 1)
    time.sleep(random.Random(name).uniform(0, 2))
    for pid in [process.pid] if send == "torchrun" else processes_of(out):
        os.kill(pid, number)
    run, deadline = end(process), time.monotonic() + 10
    while processes_of(out) and time.monotonic() < deadline:
        time.sleep(0.1)
    return SimpleNamespace(**vars(run), folder=out, left=processes_of(out))


def job_torchrun(folder):
    """SIGTERM to torchrun alone, which ends the sessions of its processes, workers and all."""
    return stopped(folder, "torchrun", 1, signal.SIGTERM, "torchrun",
                   torchrun("clinfonce.py", "--standalone", "--nproc_per_node=2"))


def job_everybody(folder):
    """SIGTERM to torchrun, its processes and their workers, as a cluster does."""
    return stopped(folder, "everybody", 2, signal.SIGTERM, "all",
                   torchrun("clinfonce.py", "--standalone", "--nproc_per_node=2"))


def job_ctrl_c(folder):
    """Ctrl-C reaches the process and its workers."""
    return stopped(folder, "ctrl-c", 2, signal.SIGINT, "all")


def job_hangup(folder):
    """The terminal is closed; SIGHUP counts even if these tests run under nohup."""
    begin = ("import runpy, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); "
             "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')")
    return stopped(folder, "hangup", 1, signal.SIGHUP, "all", ("-c", begin, "clinfonce.py"))


def job_killed(folder):
    """SIGKILL of the process, not of its workers; the same command goes on at once, and a second
    run in the same folder does not."""
    out = folder / "killed"
    argv = [*files(folder), "--workers", "2", "--out", out]
    process = start(argv, ["clinfonce.py"])
    wait_for_step(process, out, 9)
    process.kill()
    process.wait()
    again = start(argv, ["clinfonce.py"])
    step = max(logged_steps(out))
    wait_for_step(again, out, step + 1)
    before = (out / "log.jsonl").read_text()
    second = end(start(argv, ["clinfonce.py"]))
    after = (out / "log.jsonl").read_text()
    again.terminate()
    return SimpleNamespace(first=end(again), second=second, kept=after.startswith(before),
                           folder=out)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """What the runs in processes returned, when they are done."""
    folder = tmp_path_factory.mktemp("signals")
    write_folder(folder / "data", {f"{split}/{name}": n for split, n in (("train", 64), ("val", 8))
                                   for name in ("cat", "dog")})
    pool = concurrent.futures.ThreadPoolExecutor(2)
    try:
        yield SimpleNamespace(**{job.__name__.removeprefix("job_"): pool.submit(job, folder)
                                 for job in (job_torchrun, job_everybody, job_ctrl_c, job_hangup,
                                             job_killed)})
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        stop_started()
        for pid in processes_of(folder):  # those of a torchrun that was killed
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(autouse=True, scope="module")
def in_the_background(jobs):
    """Start them with the first test of this file."""


# ------------------------------------------------------------------ runs in this process


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the run catches it."""


@pytest.fixture
def killed_at(tmp_path, monkeypatch):
    """killed_at(step, main, name, argv): a run that ends during this step."""
    def run(step, main, name, argv):
        real = common.check_loss

        def check_loss(loss, now, *checks, **more):
            if now == step:
                raise Killed
            return real(loss, now, *checks, **more)

        with monkeypatch.context() as patch:
            patch.setattr(common, "check_loss", check_loss)
            with pytest.raises(Killed):
                main([*argv, "--out", str(tmp_path / name)])
    return run


METHODS = {
    "clinfonce": (clinfonce.main, ["--clusters", "kmeans", "--k", "5", "--kmeans-every", "2"]),
    "wcl": (wcl.main, ["--warmup", "0", "--hidden", "32", "--dim", "16"])}


@pytest.mark.parametrize("method", METHODS)
def test_killed_before_any_step(killed_at, run_main, monkeypatch, tmp_path, method):
    """Between the checkpoint of step 0 and the next one, and between two later ones."""
    main, argv = METHODS[method]
    argv = [*SMALL, *argv]
    whole, calls, real = run_main(main, "whole", argv), [], common.knn_accuracy
    monkeypatch.setattr(common, "knn_accuracy", lambda *a, **k: calls.append(1) or real(*a, **k))
    for step in (0, 5):
        killed_at(step, main, "killed", argv)
    assert differences(whole, run_main(main, "killed", argv)) == []
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "killed")
    assert len(calls) == 2  # step 0 and the end: no evaluation is repeated


@pytest.fixture(scope="module")
def finished(tmp_path_factory, rendered):
    """A run of two epochs, --keep-every 1."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "shapes", rendered)
        clinfonce.main([*SMALL, "--keep-every", "1", "--out", str(out)])
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "run")


def same(a, b):
    """Whether two nested states are equal bit by bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_damaged_checkpoints_are_refused(run):
    """A flipped bit is found, or it lies in the zip's padding and changes nothing."""
    path, draw, refused = run / "checkpoint.pt", random.Random(0), 0
    good, whole = path.read_bytes(), checkpoint(run)
    for _ in range(40):
        bad, bit = bytearray(good), draw.randrange(8 * len(good))
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        try:
            assert same(common.load_checkpoint(path), whole)
        except common.BadInput as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 20
    for first in range(0, len(good) - 4096, len(good) // 4):  # a block that was never written
        path.write_bytes(good[:first] + bytes(4096) + good[first + 4096:])
        with pytest.raises(common.BadInput, match="cannot be read"):
            common.load_checkpoint(path)


def zeroed(path):
    """Overwrite the middle of the largest record of a zip with zeros."""
    with zipfile.ZipFile(path) as file:
        record = max(file.infolist(), key=lambda r: r.file_size)
    with open(path, "r+b") as file:
        file.seek(record.header_offset + 200 + record.file_size // 2)
        file.write(bytes(64))


def test_the_checkpoint_before_a_damaged_one_goes_on(run, refused_by, run_main, tmp_path, capsys):
    whole = checkpoint(run)
    zeroed(run / "checkpoint.pt")
    previous = run / "checkpoint.prev.pt"
    line = refused_by(clinfonce.main, SMALL, run / "checkpoint.pt", "CRC", previous, "go on")
    assert f"remove {run}/checkpoint.pt" in line
    with pytest.raises(SystemExit) as stop:  # an evaluation says the same
        linear_eval.main([*BASE[:4], "--checkpoint", str(run / "checkpoint.pt")])
    assert stop.value.code == 2 and str(previous) in capsys.readouterr().err
    (run / "checkpoint.pt").unlink()
    assert common.load_checkpoint(previous)["step"] == 4
    assert differences(whole, run_main(clinfonce.main, "run", SMALL)) == []


def test_killed_between_the_two_renames(run, run_main, tmp_path):
    """checkpoint.pt is checkpoint.prev.pt already, and the new one has a temporary name."""
    whole = checkpoint(run)
    (run / "checkpoint.pt").rename(run / "checkpoint.pt.123.tmp")
    assert differences(whole, run_main(clinfonce.main, "run", SMALL)) == []
    assert not list(run.glob("*.tmp"))


@pytest.mark.parametrize("damage", ["cut", "digit", "header", "empty", "half a line", "no text"])
def test_damaged_log(run, refused_by, damage):
    log = run / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes({"cut": b"".join(lines[:-1]), "digit": b"".join(lines).replace(
        b'"loss": ', b'"loss": 1', 1), "header": b"".join([lines[0].replace(b'"threads": 1', b'"th'
        b'reads": 2'), *lines[1:]]), "empty": b"", "half a line": b"".join(lines)[:-9],
        "no text": lines[0] + b"\xff\0\xfe\n" + b"".join(lines[2:])}[damage])
    refused_by(clinfonce.main, SMALL, log, "missing, cut or changed", f"{len(lines)} lines")


def test_a_log_that_is_longer_than_the_checkpoint_knows_is_cut(run):
    before = (run / "log.jsonl").read_bytes()
    (run / "log.jsonl").write_bytes(before + b'{"step": 9, "lo')
    clinfonce.main([*SMALL, "--out", str(run)])
    assert (run / "log.jsonl").read_bytes() == before


# ------------------------------------------------------------------ one writer


def test_the_folder_of_a_run_has_one_writer(run, refused_by):
    with common._open:
        common._lock(run / "log.jsonl")
        with open(run / "other", "w"):
            lock, _ = common._locks[:], common._locks.clear()
        refused_by(clinfonce.main, SMALL, run, "another process trains in", "--out")
        os.close(lock[0])
    clinfonce.main([*SMALL, "--out", str(run)])  # the lock ends with its owner


@pytest.mark.parametrize(("change", "words"), [
    (dict(out="/another/node"), "--out"), (dict(seed=1), "--seed 0 -> 1"),
    ("data", "training images 4096 -> 63"), ("step", "checkpoint"), ("error", "unreadable there")])
def test_nodes_that_were_started_differently(monkeypatch, tmp_path, shapes_once, refused_by, change,
                                             words):
    """Each process tells the others its flags, data and step: all refuse what one of them has."""
    def all_gather_object(found, mine):
        step, flags, data = mine
        if change == "data":
            data = dict(data, training=dict(data["training"], images=63))
        if isinstance(change, dict):
            flags = flags | change
        found[:] = [mine, (4 if change == "step" else common.BadInput("unreadable there")
                           if change == "error" else step, flags, data)]

    with monkeypatch.context() as patch:
        patch.setattr(common.dist, "all_gather_object", all_gather_object)
        real = common._load_run

        def two_ranks(*args):  # from here to the end of the run
            patch.setattr(common, "world", lambda: 2)
            return real(*args)
        patch.setattr(common, "_load_run", two_ranks)
        line = refused_by(clinfonce.main, SMALL, words)
        assert "unreadable" in line or "process 1 differs from process 0" in line


# ------------------------------------------------------------------ data that changed


def tree(root):
    """A folder of two classes, 20 images each, and a CSV of them with columns."""
    write_folder(root, {"train/cat": 20, "train/dog": 20, "val/cat": 6, "val/dog": 6})
    for split, name in (("train", "train"), ("val", "val")):
        rows = [f"{i},{p.relative_to(root)},{p.parent.name},{i % 3},{i % 2}"
                for i, p in enumerate(sorted((root / split).rglob("*.png")))]
        (root / f"meta_data_{name}.csv").write_text("\n".join([",path,class,size,tail", *rows]))
    return root


def in_csv(file, old, new):
    """Function of a root that replaces a text once in a CSV."""
    def change(root):
        text = (root / file).read_text()
        assert old in text
        (root / file).write_text(text.replace(old, new, 1))
    return change


CHANGES = {  # name -> flags, what changes, words of the refusal or None
    "added": ("folder", lambda root: write_image(root / "train/cat/zz.png", 99),
              "training images 40 -> 41"),
    "removed": ("folder", lambda root: (root / "train/dog/0003.png").unlink(),
                "training images 40 -> 39"),
    "renamed": ("folder", lambda root: (root / "train/cat/0003.png").rename(
        root / "train/cat/0003b.png"), "training file names"),
    "class": ("folder", lambda root: [(root / split / "cat").rename(root / split / "catx")
                                      for split in ("train", "val")], "training column label"),
    "moved image": ("folder", lambda root: (root / "val/cat/0003.png").rename(
        root / "val/dog/0030.png"), "test column label"),
    "label": ("csv", in_csv("meta_data_train.csv", "0003.png,cat", "0003.png,dog"),
              "training column label"),
    "cluster": ("csv", in_csv("meta_data_train.csv", "0003.png,cat,0", "0003.png,cat,2"),
                "training column size"),
    "order": ("csv", in_csv("meta_data_val.csv", "cat/0003.png", "cat/0004.png"),
              "test file names"),
    "unused": ("csv", in_csv("meta_data_train.csv", "0003.png,cat,0,1", "0003.png,cat,0,7"), None),
    "nothing": ("folder", lambda root: None, None)}


@pytest.mark.parametrize("name", CHANGES)
def test_data_that_changed(refused_by, tmp_path, name):
    source, change, words = CHANGES[name]
    root = tree(tmp_path / "data")
    argv = [*BASE, "--dataset", source, "--batch-size", "16", "--epochs", "1", "--clusters",
            "size" if source == "csv" else "label", "--workers", "0", "--image-size", "16"]
    clinfonce.main([*map(str, argv), "--data-dir", str(root), "--out", str(tmp_path / "run")])
    moved = root.rename(tmp_path / "elsewhere")  # a moved folder is the same data
    change(moved)
    argv += ["--data-dir", str(moved)]
    if words:
        refused_by(clinfonce.main, argv, tmp_path / "run", "other data", words, says=["recipe own"])
    else:
        clinfonce.main([*map(str, argv), "--out", str(tmp_path / "run")])
    header = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[0])
    assert header["fingerprint"] == checkpoint(tmp_path / "run")["data"]
    assert header["fingerprint"]["training"]["images"] == 40


def test_hierarchy_that_changed(refused_by, tmp_path):
    """The same flag, but its file gives other clusters."""
    root, file = tree(tmp_path / "data"), tmp_path / "tree.json"
    nodes = {"LabelName": "thing", "Level": 0, "Subcategory": [
        {"LabelName": "animal", "Level": 1, "Subcategory": [{"LabelName": "cat", "Level": 2}]},
        {"LabelName": "dog", "Level": 1}]}
    file.write_text(json.dumps(nodes))
    argv = [*BASE, "--dataset", "folder", "--data-dir", str(root), "--batch-size", "16",
            "--epochs", "1", "--workers", "0", "--image-size", "16", "--clusters", "level_1",
            "--hierarchy", str(file)]
    clinfonce.main([*argv, "--out", str(tmp_path / "run")])
    file.write_text(json.dumps(nodes).replace("animal", "zoo"))  # ids by sorted name: they swap
    refused_by(clinfonce.main, argv, tmp_path / "run", "clusters are not those that the run began",
               says=["recipe own", "clusters level_1"])


def test_pixels_and_captions_that_changed(tmp_path):
    pack = [image(i) for i in range(8)]
    prints = []
    for change in (0, 1):
        pack[3] = pack[3] + change
        table = common.npz_table(write_pack(tmp_path / "pack.npz", pack, labels=np.arange(8) % 2,
                                            classes=np.array(["a", "b" + "x" * change])))
        table.captions = [f"caption {i * change}" for i in range(8)]
        prints.append(dict(training=common.fingerprint(table), test={}))
    assert common.changed_data(prints[0], prints[0]) == []
    assert common.changed_data(*prints) == ["training pixels", "training captions",
                                            "training column label"]


@pytest.mark.parametrize("script", [linear_eval, ood_eval])
def test_evaluations_warn_of_other_data(run, tmp_path, capsys, script, shapes_once):
    saved = checkpoint(run)
    argv = [*BASE[:4], "--checkpoint", str(run / "checkpoint.pt")]
    argv += ["--k", "5", "--bootstrap", "0"] if script is ood_eval else [
        "--knn-k", "5", "--epochs", "1"]
    script.main([*argv, "--out", str(tmp_path / "a.json")])
    assert "warning" not in capsys.readouterr().out
    saved["data"]["training"]["pixels"] += 1
    saved["data"]["test"]["images"] = 1000
    torch.save(saved, run / "checkpoint.pt")
    script.main([*argv, "--out", str(tmp_path / "b.json")])
    assert ("warning: the checkpoint was trained with other data (training pixels, test images "
            "1000 -> 1024)") in capsys.readouterr().out


# ------------------------------------------------------------------ checkpoints to go back to


def test_keep_every(run, run_main, refused_by, tmp_path, monkeypatch):
    assert sorted(p.name for p in run.glob("checkpoint*")) == [
        "checkpoint-0001.pt", "checkpoint-0002.pt", "checkpoint.prev.pt", "checkpoint.pt"]
    first, previous = (common.load_checkpoint(run / f"checkpoint{name}.pt")
                       for name in ("-0001", ".prev"))
    assert first["step"] == 4 and differences(first, previous) == []
    assert differences(checkpoint(run), common.load_checkpoint(run / "checkpoint-0002.pt")) == []
    every = run_main(clinfonce.main, "other", [*SMALL, "--keep-every", "2"])
    assert [p.name for p in (tmp_path / "other").glob("*-*.pt")] == ["checkpoint-0002.pt"]
    assert differences(every, checkpoint(run)) == []  # a copy changes nothing
    # a folder that lost its checkpoint is not begun anew over its log
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        (tmp_path / "other" / name).rename(tmp_path / name)
    refused_by(clinfonce.main, [*SMALL, "--keep-every", "2"], "log.jsonl tells of steps, but",
               "has no checkpoint.pt", out=tmp_path / "other", says=["clusters"])
    for name in ("", "-0001"):  # each has its own file of results
        linear_eval.main([*BASE[:4], "--checkpoint", f"{run}/checkpoint{name}.pt", "--epochs", "1"])
        record = json.loads((run / f"linear_eval-fast-label{name}.json").read_text())
        assert record["step"] == (4 if name else 8)


def test_killed_between_a_copy_and_its_checkpoint(run, run_main, tmp_path, monkeypatch):
    """The run that goes on writes what --keep-every asks for, so the copy comes first."""
    saved, real = [], common.save_checkpoint

    def save(state, step, args, *name):
        saved.append(step)
        if saved.count(4) == 2:
            raise Killed
        real(state, step, args, *name)

    with monkeypatch.context() as patch:
        patch.setattr(common, "save_checkpoint", save)
        with pytest.raises(Killed):
            run_main(clinfonce.main, "killed", [*SMALL, "--keep-every", "1"])
    found = run_main(clinfonce.main, "killed", [*SMALL, "--keep-every", "1"])
    assert differences(found, checkpoint(run)) == []
    assert {p.name for p in (tmp_path / "killed").glob("*-*.pt")} == {
        "checkpoint-0001.pt", "checkpoint-0002.pt"}


# ------------------------------------------------------------------ words


def test_no_checkpoint_is_kept_where_there_is_none(refused_by, tmp_path, capsys):
    argv = [*SMALL, "--lr", "1e30", "--warmup", "0"]
    refused_by(clinfonce.main, argv, "the loss is", "the last checkpoint is kept", status=1,
               says=["clusters"])
    with pytest.raises(SystemExit) as stop:  # an evaluation has none
        linear_eval.main([*BASE[:4], "--checkpoint", "none", "--recipe", "semi-10", "--lr", "1e38",
                          "--batch-size", "16", "--out", str(tmp_path / "a.json")])
    err = capsys.readouterr().err
    assert stop.value.code == 1 and "the loss is" in err and "checkpoint" not in err


@pytest.mark.parametrize(("omp", "processes", "cores", "expected"), [
    (None, 1, 6, 6), (None, 4, 6, 1), (None, 2, 6, 3), ("3", 1, 6, 3), ("1", 1, 6, 1),
    ("1", 2, 6, 3),  # torchrun's own
    ("2", 2, 6, 2), ("many", 1, 6, 6), (None, 8, 4, 1)])
def test_threads_and_workers_follow_the_cpu_set(monkeypatch, omp, processes, cores, expected):
    monkeypatch.setattr(common, "CORES", cores)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    if omp:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    assert common.cpus() == expected
    assert common.Parser("x", "", {"demo": {}}).parse_args([]).workers == expected


def test_paths_with_blanks_are_quoted(run_main, tmp_path, capsys):
    run_main(clinfonce.main, "my run", SMALL)
    out = f"{tmp_path}/my run"
    assert f"linear_eval.py --checkpoint '{out}/checkpoint.pt'\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "my run/log.jsonl").read_text().splitlines()[0])[
        "command"].endswith(f"--out '{out}'")


def test_a_bar_is_closed_before_any_message(capsys):
    parser = common.Parser("x", "", {"demo": {}})

    def fails(error):
        def train(args):
            bars.append(common.progress(range(3), desc="bar"))
            raise error
        return train

    for error, status in ((common.BadInput("bad"), 2), (common.RunFailed("failed"), 1),
                          (KeyboardInterrupt(), 1)):
        bars = []
        with pytest.raises(SystemExit) as stop:
            common.run(fails(error), parser, [])
        err = capsys.readouterr().err
        assert stop.value.code == status and bars[0].disable
        assert re.fullmatch(r"\r?bar.*\n(\r?bar.*\n)*x.py: .*\n", err), err


# ------------------------------------------------------------------ the processes


@pytest.mark.parametrize(("name", "cause"), [
    ("torchrun", "SIGTERM"), ("everybody", "SIGTERM"), ("ctrl_c", "Ctrl-C"), ("hangup", "SIGHUP")])
def test_signals_save_with_workers(jobs, name, cause):
    run = getattr(jobs, name).result()
    assert run.out.splitlines()[-1] == (
        f"stopped by {cause} and saved to {run.folder}; run the same command to continue"), run.err
    saved = checkpoint(run.folder)
    assert saved["step"] == max(logged_steps(run.folder)) > 0
    assert f'File "{CODE}' not in run.err  # torchrun has a traceback of its own, we have none
    assert run.left == []
    if name in ("ctrl_c", "hangup"):
        assert run.status == 0 and "Traceback" not in run.err


def test_a_closed_terminal_does_not_end_a_run_under_nohup():
    script = "import common, signal; print(signal.SIGHUP in common.SIGNALS)"
    for command, handled in (([], "True"), (["nohup"], "False")):
        found = subprocess.run([*command, sys.executable, "-c", script], cwd=CODE, text=True,
                               capture_output=True, preexec_fn=lambda: signal.signal(
                                   signal.SIGHUP, signal.SIG_DFL))
        assert found.stdout.strip() == handled


def test_a_killed_run_goes_on_at_once_and_alone(jobs):
    run = jobs.killed.result()
    assert run.second.status == 2 and run.second.err.splitlines() == [
        f"clinfonce.py: error: another process trains in {run.folder}: wait for it, end it, or use "
        "another --out"]
    assert run.kept and run.first.status == 0
    steps = logged_steps(run.folder)
    assert steps == list(range(1, checkpoint(run.folder)["step"] + 1))

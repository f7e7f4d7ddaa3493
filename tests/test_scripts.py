"""Whole runs. Rule 3 of the design (resume is exact), torchrun, and every variant of the flags.

Real processes are few, as they take seconds to start: they run in the background while the tests
before them run in this process.
"""
import concurrent.futures
import functools
import json
import os
import random
import shutil
import signal
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
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

# 4 epochs of 16 steps; clusters are found in epochs 1 and 3, so a run that goes on in epoch 2 or 4
# needs the ids of its checkpoint
KMEANS = [*BASE, "--limit-train", "512", "--batch-size", "32", "--epochs", "4", "--clusters",
          "kmeans", "--k", "8", "--kmeans-every", "2"]
STEPS = 64
SCRIPT = ["clinfonce.py"]


def job_reference(folder):
    return end(start([*KMEANS, "--out", folder / "reference"], SCRIPT))


def job_killed(folder):
    """SIGKILL in epoch 2, again in epoch 4, at steps drawn at random; then the run may finish."""
    argv, draw, found = [*KMEANS, "--out", folder / "killed"], random.Random(1), []
    for epoch in (2, 4):
        process = start(argv, SCRIPT)
        wait_for_step(process, folder / "killed", 16 * (epoch - 1) + draw.randrange(1, 10))
        process.kill()
        assert end(process).status == -signal.SIGKILL
        found.append((checkpoint(folder / "killed")["step"], logged_steps(folder / "killed")))
    return found, end(start(argv, SCRIPT))


def job_asked(folder):
    """SIGTERM in the middle of epoch 2; the run is copied then, and finishes."""
    argv = [*KMEANS, "--out", folder / "asked"]
    process = start(argv, SCRIPT)
    wait_for_step(process, folder / "asked", 20)
    process.terminate()
    first = end(process)
    shutil.copytree(folder / "asked", folder / "asked-copy")
    return first, end(start(argv, SCRIPT))


def children(pid):
    """Processes that this one started, from /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
        except (OSError, IndexError):
            continue  # it ended meanwhile
    return sorted(found)


def job_restarted(folder):
    """Two processes of torchrun; one is killed in epoch 2, and torchrun starts both again."""
    argv = [*KMEANS, "--out", folder / "restarted"]
    # the variable: torchrun's agent would keep one store for both attempts, and a new process may
    # read the address of one that ended (pytorch issues 135712, 167288)
    process = start(argv, torchrun(*SCRIPT, "--standalone", "--nproc_per_node=2",
                                   "--max-restarts=1"),
                    TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    wait_for_step(process, folder / "restarted", 16 + random.Random(2).randrange(2, 10))
    workers = children(process.pid)
    os.kill(workers[-1], signal.SIGKILL)
    return SimpleNamespace(**vars(end(process)), workers=workers, argv=argv)


def job_two_agents(folder):
    """Two torchruns of one process each meet on the loopback device, as two machines would."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    argv = [*KMEANS, "--out", folder / "agents"]
    script = torchrun(*SCRIPT, "--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d",
                      "--rdzv-id=x", f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1")
    return [end(p) for p in [start(argv, script), start(argv, script)]]


def job_error(folder):
    return end(start([*SMALL, "--clusters", "kmeans", "--k", "65", "--out", folder / "error"],
                     torchrun(*SCRIPT, "--standalone", "--nproc_per_node=2")))


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """The folder of all runs in processes, and what they returned, when they are done."""
    folder = tmp_path_factory.mktemp("runs")
    pool = concurrent.futures.ThreadPoolExecutor(2)  # torchrun waits much: no core idles
    try:
        yield SimpleNamespace(folder=folder, **{
            job.__name__.removeprefix("job_"): pool.submit(job, folder)
            for job in (job_restarted, job_killed, job_two_agents, job_asked, job_reference,
                        job_error)})
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        stop_started()


@pytest.fixture(autouse=True, scope="module")
def in_the_background(jobs):
    """Start them with the first test of this file."""


# ------------------------------------------------------------------ runs in this process


@pytest.fixture
def run(run_main):
    """run(name, flags, stop=None): clinfonce.main in this process; its checkpoint."""
    return functools.partial(run_main, clinfonce.main)


VARIANTS = {
    "instance": ["--clusters", "instance"],
    "micro-batch": ["--clusters", "instance", "--micro-batch", "6"],
    "label": ["--clusters", "label", "--schedule", "warmup33", "--channels-last"],
    "column": ["--clusters", "colour", "--schedule", "exp", "--optimizer", "adamw", "--lr", "0.01"],
    "attributes": ["--clusters", "attributes:2", "--attributes", "colour", "size", "background",
                   "--schedule", "cosine-epoch"],
    "ce": ["--clusters", "coarse", "--loss", "ce", "--optimizer", "lars", "--no-nesterov"],
    "kmeans": ["--clusters", "kmeans", "--k", "5", "--kmeans-every", "2", "--amp", "bf16"],
    "kmeans-warm-up": ["--clusters", "kmeans", "--k", "5", "--kmeans-warmup", "2", "--kmeans",
                       "torch"],
    "dual": ["--clusters", "kmeans", "--k", "5", "--dual", "--kmeans-warmup", "1", "--optimizer",
             "lars"],
}

COLUMNS = {"instance": ["object"], "micro-batch": ["object"], "label": ["label"],
           "column": ["colour"], "ce": ["coarse"],
           "attributes": ["colour", "background"]}  # of 6, 4 and 2 values


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_stop_and_go_on_exactly(run, name, tmp_path, capsys):
    argv = [*SMALL, *VARIANTS[name]]
    whole = run("whole", argv)
    assert "kNN top-1    untrained" in capsys.readouterr().out
    half = run("stopped", argv, stop=5)  # in the middle of epoch 2
    assert capsys.readouterr().out.endswith(
        f"stopped by SIGTERM and saved to {tmp_path}/stopped; run the same command to continue\n")
    assert (half["step"], whole["step"]) == (6, 8)
    assert len(differences(whole, half)) > 20
    assert differences(whole, run("stopped", argv)) == []
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "stopped")
    assert logged_steps(tmp_path / "stopped") == list(range(1, 9))

    assert torch.get_num_threads() == 1  # K-means does not take more: faiss could set torch's

    # what the flags say is in the checkpoint
    state, ids = whole["state"], whole["state"]["clusters"]["ids"]
    if name in COLUMNS:
        args = SimpleNamespace(**whole["args"], method="clinfonce")
        data = common.load(args, torch.device("cpu"))
        groups = list(zip(*(data.train.columns[c].tolist() for c in COLUMNS[name]), strict=True))
        # one id for a group, and one group for an id
        assert len(set(groups)) == len(ids.unique()) == len(set(zip(ids.tolist(), groups,
                                                                    strict=True)))
    else:
        assert len(ids) == 64 and len(ids.unique()) == 5
    model = state["model"]
    last = dict(ce="head.weight", dual="head.linear3.weight").get(name, "head.2.weight")
    assert model[last].shape == (6 if name == "ce" else 128, 128)
    assert any(k.startswith("head2") for k in model) == (name == "dual")
    kind = dict(column="exp_avg").get(name, "momentum_buffer")
    assert all(kind in s for s in state["optimizer"]["state"].values())
    rates = [line["lr"] for line in log_of(tmp_path / "whole") if "lr" in line]
    assert rates == pytest.approx({
        "label": [0.5] * 4 + [0.0005] * 4,
        "column": [0.01] * 4 + [0.0095] * 4,
        "attributes": [0.25025] * 4 + [0.0005] * 4,
    }.get(name, [0, 0.125, 0.25, 0.375, 0.5, 0.4267767, 0.25, 0.0732233]))


def test_second_head_stands_still_in_the_warm_up(run, monkeypatch):
    argv = [*SMALL, *VARIANTS["dual"]]
    warm = run("warm", argv, stop=3)  # the last step of epoch 1
    after = run("warm", argv)
    torch.manual_seed(0)
    first = clinfonce.ClInfoNCE(SimpleNamespace(**after["args"]), 0).state_dict()
    assert warm["step"] == 4 and warm["state"]["clusters"]["ids"].tolist() == [*range(64)]
    weights = [k for k in first if k.endswith(("weight", "bias")) and "bn" not in k]
    for key in weights:
        moved = [not torch.equal(first[key], c["state"]["model"][key]) for c in (warm, after)]
        assert moved == ([False, True] if key.startswith("head2") else [True, True]), key
    count = [len(c["state"]["optimizer"]["state"]) for c in (warm, after)]
    assert count[1] - count[0] == 10  # no momentum for the ten tensors of head2 before


def test_what_a_resumed_run_needs_is_in_the_checkpoint(run, tmp_path):
    """Negative control: without the momentum, or with other ids, it ends elsewhere."""
    argv = [*SMALL, *VARIANTS["kmeans"]]
    whole, half = run("whole", argv), run("half", argv, stop=4)
    for name in ("untouched", "momentum", "ids", "step"):
        shutil.copytree(tmp_path / "half", tmp_path / name)
        part = checkpoint(tmp_path / name)
        if name == "momentum":
            for state in part["state"]["optimizer"]["state"].values():
                state["momentum_buffer"].zero_()
        if name == "ids":
            part["state"]["clusters"]["ids"] = part["state"]["clusters"]["ids"].roll(1)
        if name == "step":
            part["step"] += 1
        torch.save(part, tmp_path / name / "checkpoint.pt")
        found = differences(whole, run(name, argv))
        assert (found == []) == (name == "untouched")
        assert name == "untouched" or "/model/head.2.weight" in found
    assert half["step"] == 5
    assert "/model/head.2.weight" in differences(whole, run("seed", [*argv, "--seed", "1"]))


def test_a_finished_run_and_changed_flags(run, tmp_path, capsys):
    argv = [*SMALL, "--workers", "0"]
    whole, files = run("run", argv), sorted(p.name for p in (tmp_path / "run").iterdir())
    assert files == ["checkpoint.prev.pt", "checkpoint.pt", "log.jsonl", "views.png"]
    capsys.readouterr()
    assert differences(whole, run("run", [*argv, "--workers", "1"])) == []  # may change
    out = capsys.readouterr().out
    assert f"this run was finished before; to train anew: remove {tmp_path}/run, or --out" in out
    with pytest.raises(SystemExit) as error:
        run("run", [*argv, "--lr", "0.4", "--tau", "0.3", "--micro-batch", "8"])
    assert error.value.code == 2
    assert capsys.readouterr().err == (
        f"clinfonce.py: error: {tmp_path}/run holds a run with other flags (--lr 0.5 -> 0.4, "
        "--micro-batch None -> 8, --tau 0.2 -> 0.3); use another --out, or the same flags to go "
        "on\n")
    assert differences(whole, checkpoint(tmp_path / "run")) == []


def test_a_run_that_stopped_before_its_first_checkpoint_begins_again(run, tmp_path):
    whole = run("whole", SMALL)
    shutil.copytree(tmp_path / "whole", tmp_path / "early")
    (tmp_path / "early" / "checkpoint.pt").unlink()
    assert differences(whole, run("early", SMALL)) == []
    assert log_of(tmp_path / "early") == log_of(tmp_path / "whole")


# ------------------------------------------------------------------ runs in processes


def test_killed_twice_and_started_again(jobs):
    killed, last = jobs.killed.result()
    assert jobs.reference.result().status == last.status == 0
    for saved, logged in killed:
        assert saved % 16 == 0 and 0 < saved < max(logged) < STEPS  # work was lost, and done again
    folder = jobs.folder
    assert differences(checkpoint(folder / "reference"), checkpoint(folder / "killed")) == []
    assert log_of(folder / "reference") == log_of(folder / "killed")
    assert logged_steps(folder / "killed") == list(range(1, STEPS + 1))


def test_sigterm_saves_in_the_middle_of_an_epoch(jobs):
    asked, last = jobs.asked.result()
    folder = jobs.folder
    assert (asked.status, last.status) == (0, 0)
    assert asked.out.endswith(
        f"stopped by SIGTERM and saved to {folder}/asked; run the same command to continue\n")
    step = checkpoint(folder / "asked-copy")["step"]
    assert 20 <= step < STEPS and logged_steps(folder / "asked-copy") == list(range(1, step + 1))
    jobs.reference.result()
    assert differences(checkpoint(folder / "reference"), checkpoint(folder / "asked")) == []
    assert log_of(folder / "reference") == log_of(folder / "asked")


def test_torchrun_brings_back_a_killed_process(jobs):
    run, folder = jobs.restarted.result(), jobs.folder / "restarted"
    assert run.status == 0, run.err
    assert len(run.workers) == 2
    assert logged_steps(folder) == list(range(1, STEPS + 1))  # every step once
    title = "Cl-InfoNCE, clusters kmeans, shapes\n"
    assert run.out.count(title) == 1  # one summary, by rank 0
    lines = run.out[run.out.index(title):].splitlines()
    knn = [line["knn_top1"] for line in log_of(folder) if "knn_top1" in line]
    assert len(knn) == 2
    assert lines[1:] == [
        f"  kNN top-1    untrained {knn[0]:.2f} %   trained {knn[1]:.2f} %   "
        "(column label, K = 200, T = 0.07)",
        f"  checkpoint   {folder}/checkpoint.pt", f"  log          {folder}/log.jsonl",
        f"  pictures     {folder}/curves.png, {folder}/views.png",
        f"  next         python linear_eval.py --checkpoint {folder}/checkpoint.pt"]
    header = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    assert header["command"] == "clinfonce.py " + " ".join(map(str, run.argv))
    assert header["processes"] == 2 and header["threads"] == 1


def test_two_agents_make_one_run(jobs):
    agents, restarted = jobs.two_agents.result(), jobs.restarted.result()
    assert [a.status for a in agents] == [0, 0], agents
    assert restarted.status == 0
    assert sorted(a.out.count("kNN top-1") for a in agents) == [0, 1]
    folder = jobs.folder / "agents"
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoint.prev.pt", "checkpoint.pt", "curves.png", "log.jsonl", "views.png"]
    # the same two processes, never killed: resume is exact here too
    assert differences(checkpoint(folder), checkpoint(jobs.folder / "restarted")) == []
    assert log_of(folder) == log_of(jobs.folder / "restarted")


def test_two_processes_begin_as_one_does(jobs):
    """BatchNorm has its own statistics on every rank, so only the beginning is comparable."""
    jobs.two_agents.result(), jobs.reference.result()
    one, two = (log_of(jobs.folder / name) for name in ("reference", "agents"))
    assert one[:2] == two[:2]  # flags, data, versions; entropies
    assert 3 < one[2]["knn_top1"] < 60
    assert one[2]["knn_top1"] == pytest.approx(two[2]["knn_top1"], abs=0.2)  # of 1024 images
    one, two = ([r["lr"] for r in log if "lr" in r] for log in (one, two))
    assert one == two
    a, b = (checkpoint(jobs.folder / name)["state"] for name in ("reference", "agents"))
    assert a["model"].keys() == b["model"].keys()
    assert not any(k.startswith("module.") for k in a["model"])


def test_an_error_is_one_line_under_torchrun(jobs):
    run = jobs.error.result()
    assert run.status != 0 and not (jobs.folder / "error").exists()
    assert [s for s in run.err.splitlines() if s.startswith("clinfonce.py: error:")] == [
        "clinfonce.py: error: --k 65 needs at least 65 images, found 64: take --k 2, about 50 "
        "images a cluster"]
    assert f'File "{CODE}' not in run.err  # torchrun has a traceback of its own, we have none

"""Whole runs of the scripts, as processes or in this one, and what two runs have in common."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import common

CODE = Path(common.__file__).parent
BASE = ["--device", "cpu", "--threads", "1", "--log-every", "1"]
SMALL = [*BASE, "--limit-train", "64", "--batch-size", "16", "--epochs", "2"]  # 2 epochs of 4 steps


def checkpoint(folder):
    """The checkpoint of a run folder."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def flat(value, name=""):
    """Nested dicts and lists as one dict: path -> tensor or number."""
    if isinstance(value, dict):
        value = value.items()
    elif isinstance(value, (list, tuple)):
        value = enumerate(value)
    else:
        return {name: value}
    return {k: v for key, part in value for k, v in flat(part, f"{name}/{key}").items()}


def differences(a, b):
    """Names of what is not equal, bit by bit, in the states of two checkpoints."""
    a, b = (flat(c["state"] | dict(step=c["step"])) for c in (a, b))
    assert a.keys() == b.keys()
    assert any("momentum_buffer" in k or "exp_avg" in k for k in a)
    return [k for k in a if not (torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor)
                                 else a[k] == b[k])]


def log_of(folder):
    """All lines of a log but for what may differ: times, speed, memory and the folder's name."""
    lines = [json.loads(s) for s in (folder / "log.jsonl").read_text().splitlines()]
    for name in ("command", "processes"):
        lines[0].pop(name)
    lines[0]["args"].pop("out")
    return [{k: v for k, v in line.items() if k not in ("images_per_s", "memory_mb", "seconds",
                                                     "cpu_seconds")}
            for line in lines]


def logged_steps(folder):
    """The steps that have a line with a loss."""
    if not (folder / "log.jsonl").exists():
        return []
    return [int(s) for s in re.findall(r'"step": (\d+), "epoch": [\d.]+, "loss"',
                                       (folder / "log.jsonl").read_text())]


# ------------------------------------------------------------------ real processes


started = []


def start(argv, script, **variables):
    """Start a script as its own session, so that its children can be ended with it."""
    process = subprocess.Popen(
        [sys.executable, *script, *argv], cwd=CODE, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=dict(os.environ, OMP_NUM_THREADS="1", **variables))
    started.append(process)
    return process


def torchrun(script, *options):
    """Words after `python` that start a script under torchrun."""
    return ("-m", "torch.distributed.run", *options, script)


def end(process):
    """Wait for a process; what it printed and its exit status."""
    out, err = process.communicate(timeout=150)
    return SimpleNamespace(status=process.returncode, out=out, err=err)


def wait_for_step(process, folder, step):
    """Return when the log has a line of this step; fail if the process ends before."""
    while max(logged_steps(folder), default=0) < step:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def stop_started():
    """Kill what a test has started and not ended."""
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def run_main(tmp_path, shapes_once, monkeypatch):
    """run_main(main, name, flags, stop=None): a script's main in this process; its checkpoint.

    stop: the number of the step during which this process gets a SIGTERM.
    """
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    real = common.check_loss

    def run(main, name, argv, stop=None):
        def check_loss(loss, step, *checks, **more_checks):
            if step == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(loss, step, *checks, **more_checks)

        monkeypatch.setattr(common, "check_loss", check_loss)
        main([*argv, "--out", str(tmp_path / name)])
        return checkpoint(tmp_path / name)

    yield run
    signal.signal(signal.SIGTERM, handler)
    torch.set_num_threads(threads)


@pytest.fixture
def goes_on_exactly(run_main, tmp_path, capsys):
    """goes_on_exactly(main, flags of SMALL size): a run that is stopped in the middle of epoch 2
    and started again ends with the tensors and the log of one that was not; its checkpoint."""
    def check(main, argv):
        whole = run_main(main, "whole", argv)
        assert "checkpoint   " in capsys.readouterr().out
        half = run_main(main, "stopped", argv, stop=5)
        assert capsys.readouterr().out.endswith(
            f"stopped by SIGTERM and saved to {tmp_path}/stopped; run the same command to "
            "continue\n")
        assert (half["step"], whole["step"]) == (6, 8)
        assert differences(whole, half)
        assert differences(whole, run_main(main, "stopped", argv)) == []
        assert log_of(tmp_path / "whole") == log_of(tmp_path / "stopped")
        assert logged_steps(tmp_path / "stopped") == list(range(1, 9))
        return whole
    return check


def contents(folder):
    """Name -> bytes of all files below a folder, {} if there is none."""
    if folder.is_file():
        return folder.read_bytes()
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def refused_by(tmp_path, capsys, shapes_once):
    """refused_by(main, flags, *words, status=2, out=run folder, says=()): a script refuses its
    flags with one line that holds the words, the exit status, and nothing overwritten.

    says: how lines on standard output may begin, besides that on the number of images, which
    comes last before the training.
    """
    def refused(main, argv, *words, status=2, out=tmp_path / "run", says=()):
        before = contents(out)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([*(str(a) for a in argv), "--out", str(out)])
        printed = capsys.readouterr()
        lines = printed.err.splitlines()  # a progress bar goes back with \r: its states are lines
        bar = [s for s in lines if "step/s" in s or "s/step" in s or not s]
        assert [s for s in lines if s not in bar] == lines[-1:], printed.err
        assert lines[-1].startswith(f"{main.__module__}.py: error: ")
        assert printed.err.endswith(lines[-1] + "\n")
        assert all(s.startswith(tuple(says)) or says and re.match(r"\d+ training and \d+ test ", s)
                   for s in printed.out.splitlines()), printed.out
        assert stop.value.code == status
        missing = [w for w in map(str, words) if w not in lines[-1]]
        assert not missing, f"{missing} not in: {lines[-1]}"
        assert not list(tmp_path.rglob("*.tmp"))
        if status == 2:
            assert bar == [] and contents(out) == before and out.exists() == bool(before)
        return lines[-1]

    return refused

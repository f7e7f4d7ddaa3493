"""Optimisers, schedules, networks, random numbers, checkpoints, logs and flags of common.py."""
import argparse
import copy
import json
import math
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import clinfonce
import common


def flags(*argv, monkeypatch, script=clinfonce):
    """The parsed flags of a script, which is not run."""
    found = []
    monkeypatch.setattr(common, "run", lambda train, parser, argv:
                        found.append(parser.parse_args(argv)))
    script.main([*argv])
    return found[0]


def error_line(capsys, status, argv):
    """The one line that clinfonce.py prints before it ends with a status."""
    with pytest.raises(SystemExit) as end:
        clinfonce.main(["--device", "cpu", "--threads", "1", *argv])
    assert end.value.code == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("clinfonce.py: error: ")
    return lines[0]


# ------------------------------------------------------------------ optimisers


def lars_by_hand(p, grads, lr, momentum, wd, trust, adapt):
    """Values of the flat parameter p after every step, in plain Python."""
    v, out = [0.0] * len(p), []
    for g in grads:
        if g is not None:
            g = [a + wd * b for a, b in zip(g, p, strict=True)]
            p_norm, g_norm = (math.sqrt(sum(a * a for a in x)) for x in (p, g))
            ratio = trust * p_norm / g_norm if adapt and p_norm > 0 and g_norm > 0 else 1.0
            v = [momentum * a + ratio * b for a, b in zip(v, g, strict=True)]
            p = [a - lr * b for a, b in zip(p, v, strict=True)]
        out.append(p)
    return out


def test_lars_is_the_written_out_loop():
    torch.manual_seed(0)
    start = [torch.randn(n, dtype=torch.float64) for n in (6, 4, 3, 5, 2)]
    start[1].zero_()  # a parameter of norm 0: ratio 1
    grads = [[torch.randn_like(p) for p in start] for _ in range(4)]
    grads[0][3] = grads[1][3] = None  # no gradient yet: not even decayed
    grads[2][2] = torch.zeros(3, dtype=torch.float64)
    params = [nn.Parameter(p.clone()) for p in start]
    groups = [dict(params=params[:4], weight_decay=0.1, adapt=True),
              dict(params=params[4:], weight_decay=0.0, adapt=False)]
    optimizer = common.LARS(groups, lr=0.5, momentum=0.9, trust_coef=0.02)
    by_hand = [lars_by_hand(p.tolist(), [None if s[i] is None else s[i].tolist() for s in grads],
                            0.5, 0.9, 0.0 if i == 4 else 0.1, 0.02, i != 4)
               for i, p in enumerate(start)]
    for t, step in enumerate(grads):
        for p, g in zip(params, step, strict=True):
            p.grad = g
        optimizer.step()
        for i, p in enumerate(params):
            assert p.tolist() == pytest.approx(by_hand[i][t], abs=1e-12)
        assert (params[3] not in optimizer.state) == (t < 2)
    # a gradient of norm 0 (no decay to add): ratio 1, no division by 0
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.zeros(2)
    common.LARS([dict(params=[p])], lr=1.0).step()
    assert p.tolist() == [1, 1]


def test_lars_calls_do_not_grow_with_the_network():
    """Of all calls of ATen only one goes through the parameters one by one."""
    def calls(n):
        params = [nn.Parameter(torch.ones(3, 2)) for _ in range(n)]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer, count = common.LARS([dict(params=params)], lr=1.0), []

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                count.append(func._schema.name)
                return func(*args, **(kwargs or {}))

        optimizer.step()
        with Count():
            optimizer.step()
        return len(count)

    assert calls(40) == calls(3) < 25


def test_lars_groups_of_a_resnet():
    named = list(common.resnet("resnet18").named_parameters())
    names = {id(p): n for n, p in named}
    adapted, excluded = common.lars_groups(named, 0.3)
    assert (adapted["weight_decay"], adapted["adapt"]) == (0.3, True)
    assert (excluded["weight_decay"], excluded["adapt"]) == (0.0, False)
    kept = {names[id(p)] for p in adapted["params"]}
    # as in the authors' code, the BatchNorm of a shortcut is told by no name; its bias is
    assert {n for n in kept if "conv" not in n} == {
        f"layer{i}.0.downsample.{j}.weight" for i in (2, 3, 4) for j in (0, 1)}
    left = {names[id(p)] for p in excluded["params"]}
    assert {"bn1.weight", "bn1.bias", "layer2.0.downsample.1.bias"} <= left
    assert kept | left == set(names.values()) and not kept & left

    adapted, excluded = common.lars_groups(named, 0.3, by="kind")
    assert [p.ndim for p in adapted["params"]] == [4] * 20
    assert [p.ndim for p in excluded["params"]] == [1] * 40


def test_optimizer_from_the_flags(monkeypatch):
    model = nn.Linear(2, 2)
    args = flags("--lr", "0.3", "--momentum", "0.8", "--no-nesterov", "--weight-decay", "0.02",
                 monkeypatch=monkeypatch)
    sgd = common.optimizer(args, model)
    assert type(sgd) is torch.optim.SGD and len(sgd.param_groups) == 1  # biases are decayed too
    wanted = dict(lr=0.3, momentum=0.8, weight_decay=0.02, nesterov=False)
    assert {k: sgd.defaults[k] for k in wanted} == wanted
    args.optimizer = "adamw"
    adamw = common.optimizer(args, model)
    assert type(adamw) is torch.optim.AdamW
    assert (adamw.defaults["lr"], adamw.defaults["weight_decay"]) == (0.3, 0.02)
    args.optimizer = "lars"
    lars = common.optimizer(args, model)
    assert [(g["lr"], g["momentum"], g["trust_coef"], g["weight_decay"], g["adapt"])
            for g in lars.param_groups] == [(0.3, 0.8, 0.001, 0.02, True),
                                            (0.3, 0.8, 0.001, 0.0, False)]
    assert common.set_lr(lars, 0.7) == 0.7 and {g["lr"] for g in lars.param_groups} == {0.7}


# ------------------------------------------------------------------ schedules


def test_schedules_at_points_computed_by_hand():
    near = pytest.approx
    cosine = [common.warmup_cosine(t, 14, 0.8, 4) for t in range(15)]
    assert cosine[:5] == near([0, 0.2, 0.4, 0.6, 0.8])  # linear, then the cosine from its top
    assert cosine[9] == near(0.4) and cosine[14] == near(0, abs=1e-15)
    assert cosine[4 + 5 // 2] == near(0.4 * (1 + math.cos(0.2 * math.pi)))
    assert common.warmup_cosine(1, 10, 1.0, 2, start=0.5) == near(0.75)
    assert common.warmup_cosine(5, 10, 1.0, floor=0.2) == near(0.6)
    assert common.warmup_cosine(0, 0, 0.3) == near(0.3)  # no step at all

    assert [common.cosine_by_epoch(e, 4, 1.0) for e in (1, 2, 4)] == near(
        [0.5 + 0.25 * math.sqrt(2), 0.5, 0])
    assert common.cosine_by_epoch(4, 4, 1.0, 0.1) == near(0.1)
    assert [clinfonce.exp_by_epoch(e, 0.2) for e in (1, 2, 3, 500)] == near(
        [0.2, 0.19, 0.1805, 1e-5])
    # a milestone counts after its epoch, as in the authors' loops
    assert [common.steps_by_epoch(e, (3, 5), 1.0) for e in (1, 3, 4, 5, 6)] == near(
        [1, 1, 0.1, 0.1, 0.01])


def test_learning_rates_of_clinfonce(monkeypatch):
    near = pytest.approx

    def rates(*argv, epochs=6):
        args = flags("--epochs", str(epochs), "--lr", "0.8", *argv, monkeypatch=monkeypatch)
        found = [clinfonce.learning_rate(t, 10, args) for t in range(10 * epochs)]
        assert found[::-1] == [clinfonce.learning_rate(t, 10, args)  # a pure function of the step
                               for t in reversed(range(10 * epochs))]
        return found

    cosine = rates("--schedule", "cosine", "--warmup", "2")
    assert (cosine[0], cosine[10], cosine[20], cosine[40]) == near((0, 0.4, 0.8, 0.4))
    per_epoch = rates("--schedule", "cosine-epoch")
    assert per_epoch[10:20] == [per_epoch[15]] * 10  # constant in an epoch
    assert (per_epoch[25], per_epoch[59]) == near((0.8 * 0.5005, 0.0008))
    assert rates("--schedule", "exp")[30] == near(0.8 * 0.95 ** 3)
    third = rates("--schedule", "warmup33", epochs=10)  # 3 epochs up to the rate, 7 down
    assert (third[0], third[10], third[20]) == near((0.8 / 3 + 2e-5 / 3, 1.6 / 3 + 1e-5 / 3, 0.8))
    assert third[99] == near(0.0008)
    assert rates("--schedule", "warmup33", epochs=1) == near([0.8] * 10)


# ------------------------------------------------------------------ random numbers


def test_a_generator_is_a_function_of_its_three_keys():
    def numbers(*key):
        return torch.rand(8, generator=common.generator(*key))

    torch.manual_seed(0)
    first = numbers(3, 70, "view 0")
    torch.rand(5)  # the global generator has no part in it
    assert torch.equal(numbers(3, 70, "view 0"), first)
    # pinned: a later version of the file must not train on other data
    assert common.generator(0, 0, "order").initial_seed() == 3117087774470699594
    others = [(4, 70, "view 0"), (3, 71, "view 0"), (3, 70, "view 1"), (70, 3, "view 0"),
              (3, 70, "order"), (0, 0, ""), (3, 2 ** 40, "view 0")]
    seen = [first, *(numbers(*key) for key in others)]
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    # neighbouring steps are not correlated
    x = torch.stack([torch.rand(50, generator=common.generator(0, t, "x")) for t in range(400)])
    assert x.mean().item() == pytest.approx(0.5, abs=0.01)
    assert torch.corrcoef(torch.stack([x[:-1].flatten(), x[1:].flatten()]))[0, 1].abs() < 0.03


# ------------------------------------------------------------------ networks


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("arch, stem, encoder, head", [
    ("resnet50", "imagenet", 23_508_032, 4_458_624), ("resnet50", "cifar", 23_500_352, 4_458_624),
    ("resnet18", "cifar", 11_168_832, 328_320)])
def test_parameter_counts_of_the_authors_networks(arch, stem, encoder, head):
    with torch.device("meta"):  # counted without memory
        backbone = common.resnet(arch, stem)
        assert count(backbone) == encoder
        assert count(common.head("mlp", backbone.width, 128)) == head


def test_resnets_and_their_initial_weights():
    x = torch.randn(2, 3, 32, 32)
    for arch, width in (("resnet-tiny", 128), ("resnet18", 512)):
        for stem in ("imagenet", "cifar"):
            backbone = common.resnet(arch, stem).eval()
            assert backbone.width == width and backbone(x).shape == (2, width)
    small = common.resnet("resnet18", "cifar")
    assert small.conv1.kernel_size == (3, 3) and small.conv1.stride == (1, 1)
    # Kaiming, fan-out: 64 * 9 weights out of every pixel
    assert small.conv1.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.05)
    assert (small.bn1.weight == 1).all() and (small.layer4[1].bn2.weight == 1).all()
    sizes = []
    small.layer1.register_forward_hook(lambda *a: sizes.append(a[2].shape[-1]))
    large = common.resnet("resnet18")
    large.layer1.register_forward_hook(lambda *a: sizes.append(a[2].shape[-1]))
    small(x), large(x)
    assert sizes == [32, 8]  # no stride and no max-pool in the small stem


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_a_backbone_loads_into_torchvision(arch):
    ours, theirs = common.resnet(arch).eval(), getattr(torchvision.models, arch)().eval()
    theirs.load_state_dict({**ours.state_dict(), "fc.weight": theirs.fc.weight,
                            "fc.bias": theirs.fc.bias}, strict=True)
    theirs.fc = nn.Identity()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(ours(x), theirs(x))


def test_heads():
    torch.manual_seed(0)
    x = torch.randn(5, 6)
    norm = common.head("normlinear", 6, 4)
    assert norm.bias is None
    assert norm.weight.norm(dim=1).tolist() == pytest.approx([1] * 4)
    with torch.no_grad():
        norm.weight.mul_(7)
    expected = F.cosine_similarity(x[:, None], norm.weight[None], dim=2)
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm(3 * x), expected)

    def kinds(module):
        return [type(m).__name__ for m in module.modules() if not list(m.children())]

    assert kinds(common.head("linear", 6, 4)) == ["Linear"]
    assert kinds(common.head("mlp", 6, 4)) == ["Linear", "ReLU", "Linear"]
    assert kinds(common.head("normmlp", 6, 4)) == ["Linear", "ReLU", "NormLinear"]
    mlp = common.head("normmlp", 6, 4)
    torch.testing.assert_close(mlp(x), F.cosine_similarity(
        F.relu(mlp[0](x))[:, None], mlp[2].weight[None], dim=2))

    deep = common.head("mlp3", 6, 4)
    names = {n: tuple(p.shape) for n, p in deep.named_parameters() if n.endswith("weight")}
    assert names == {"linear1.weight": (6, 6), "bn1.weight": (6,), "linear2.weight": (6, 6),
                     "bn2.weight": (6,), "linear3.weight": (4, 6)}
    assert all(f"{n}.bias" in dict(deep.named_parameters()) for n in ("linear1", "linear3", "bn2"))

    def batch_norm(y):
        return (y - y.mean(0)) / (y.var(0, unbiased=False) + 1e-5).sqrt()

    y = F.relu(batch_norm(deep.linear1(x)))
    y = deep.linear3(F.relu(batch_norm(deep.linear2(y))))
    torch.testing.assert_close(deep(x), y, rtol=1e-4, atol=1e-5)


def test_mixed_precision_and_layout_from_the_flags(monkeypatch):
    cpu = torch.device("cpu")
    for amp, dtype in (("none", torch.float32), ("bf16", torch.bfloat16)):
        args = flags("--amp", amp, monkeypatch=monkeypatch)
        with common.autocast(args, cpu):
            assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype
        assert not common.scaler(args, cpu).is_enabled()
    assert common.scaler(flags("--amp", "fp16", monkeypatch=monkeypatch), cpu).is_enabled()
    assert common.memory_format(SimpleNamespace(channels_last=False)) == torch.contiguous_format
    args = flags("--channels-last", monkeypatch=monkeypatch)
    assert common.memory_format(args) == torch.channels_last


# ------------------------------------------------------------------ checkpoints


def a_state(value):
    """A state as the scripts have it, of one weight."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return dict(model=model)


def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    args = flags("--out", str(tmp_path / "run"), "--clusters", "colour", monkeypatch=monkeypatch)
    path = tmp_path / "run" / "checkpoint.pt"
    common.save_checkpoint(a_state(1.0), 5, args)
    before = path.read_bytes()
    real = torch.save

    def disk_full(value, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(common.RunFailed, match="^cannot write .*checkpoint.pt: No space left on d"):
        common.save_checkpoint(a_state(2.0), 6, args)
    assert path.read_bytes() == before

    def killed(value, file):
        file.write(b"half of it")
        file.flush()
        assert path.read_bytes() == before  # at no moment is a half file under this name
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        common.save_checkpoint(a_state(2.0), 6, args)
    assert path.read_bytes() == before

    monkeypatch.setattr(torch, "save", real)
    common.save_checkpoint(a_state(2.0), 6, args)
    found = common.load_checkpoint(path)
    assert (found["format"], found["method"], found["step"]) == (1, "clinfonce", 6)
    assert found["state"]["model"]["weight"].item() == 2.0
    assert found["args"] == common.flags_dict(args) and found["args"]["clusters"] == "colour"
    assert sorted(p.name for p in path.parent.iterdir()) == ["checkpoint.prev.pt", "checkpoint.pt"]
    assert (path.parent / "checkpoint.prev.pt").read_bytes() == before


class Harmful:
    """Pickled, it asks whoever loads it to create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_checkpoint_with_code_is_refused_and_not_run(tmp_path):
    trace, path = tmp_path / "was-run", tmp_path / "checkpoint.pt"
    torch.save(dict(format=1, state=Harmful(trace)), path)
    with pytest.raises(common.BadInput, match=f"^checkpoint {path} cannot be read"):
        common.load_checkpoint(path)
    path.write_bytes(pickle.dumps(Harmful(trace)))
    with pytest.raises(common.BadInput, match=f"^checkpoint {path} cannot be read"):
        common.load_checkpoint(path)
    assert not trace.exists()
    pickle.loads(path.read_bytes())
    assert trace.exists()  # it would have been


def test_a_truncated_checkpoint_and_a_missing_one(tmp_path, monkeypatch):
    args = flags("--out", str(tmp_path), monkeypatch=monkeypatch)
    common.save_checkpoint(a_state(1.0), 5, args)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(common.BadInput, match=f"^checkpoint {path} cannot be read .trunc") as error:
        common.load_checkpoint(path)
    assert "\n" not in str(error.value)
    with pytest.raises(common.BadInput, match=f"^checkpoint {tmp_path}/no.pt not found$"):
        common.load_checkpoint(tmp_path / "no.pt")


# ------------------------------------------------------------------ log


def a_log(folder, *argv, monkeypatch, epochs=2):
    args = flags("--out", str(folder), "--epochs", str(epochs), *argv, monkeypatch=monkeypatch)
    table = common.Table(dict(label=torch.zeros(7)), {}, torch.zeros(7, 3, 1, 1), notes=["2 lost"])
    data = SimpleNamespace(train=table, test=table, steps_per_epoch=5, device=torch.device("cpu"))
    log = common.Log(args, data)
    log.data = data  # for a second log of the same run
    assert common.resume(dict(log=log), args) == 0  # opens the folder
    return log, args


def test_the_log_takes_means_every_few_steps_and_at_the_end_of_an_epoch(tmp_path, monkeypatch):
    log, args = a_log(tmp_path, "--log-every", "3", monkeypatch=monkeypatch)
    for step in range(10):
        log(step, loss=float(step), lr=0.5)
    log.write(step=10, knn_top1=4.0)
    header = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert header["command"] == f"clinfonce.py --out {tmp_path} --epochs 2 --log-every 3"
    assert header["args"] == common.flags_dict(args) and header["args"]["log_every"] == 3
    assert header["data"] == dict(train=7, test=7, notes=["2 lost", "2 lost"])
    assert header["processes"] == 1 and header["threads"] == torch.get_num_threads()
    assert header["versions"]["torch"] == torch.__version__ and "cores" in header["device"]
    records = log.records()
    assert [r["step"] for r in records] == [3, 5, 6, 9, 10, 10]
    assert [r["loss"] for r in records[:-1]] == [1, 3.5, 5, 7, 9]  # means since the line before
    assert [r["epoch"] for r in records[:-1]] == [0.6, 1, 1.2, 1.8, 2]
    assert all(r["lr"] == 0.5 and r["images_per_s"] > 0 and r["memory_mb"] > 0
               for r in records[:-1])
    assert records[-1] == dict(step=10, knn_top1=4.0)
    log.bar.close()


def test_a_resumed_log_is_cut_and_goes_on_with_its_sums(tmp_path, monkeypatch):
    log, _ = a_log(tmp_path, "--log-every", "3", monkeypatch=monkeypatch)
    for step in range(4):
        log(step, loss=float(step))
    state = copy.deepcopy(log.state_dict())  # after 4 steps: one line, and the sum of one step
    assert state == dict(lines=2, count=1, sums=dict(loss=3.0))
    for step in (4, 5):
        log(step, loss=100.0)
    log.bar.close()
    again = common.Log(log.args, log.data)
    again.load_state_dict(state)
    assert [r["step"] for r in again.records()] == [3]
    again(4, loss=7.0)
    again.bar.close()
    assert [(r["step"], r["loss"]) for r in again.records()] == [(3, 1), (5, 5)]


# ------------------------------------------------------------------ flags


def parser_of(script, monkeypatch):
    found = []
    monkeypatch.setattr(common, "run", lambda train, parser, argv: found.append(parser))
    script.main([])
    return found[0]


@pytest.mark.parametrize("name", clinfonce.RECIPES)
def test_recipes_have_known_flags_and_parse(name, monkeypatch):
    parser = parser_of(clinfonce, monkeypatch)
    actions = {a.dest: a for a in parser._actions}
    recipe = clinfonce.RECIPES[name]
    assert set(recipe) <= set(actions)
    for flag, value in recipe.items():  # as if it had been typed
        action = actions[flag]
        if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
            assert isinstance(value, bool)
            continue
        values = value if action.nargs else [value]
        assert action.nargs == "+" or len(values) == (action.nargs or 1)
        assert [(action.type or str)(str(v)) for v in values] == values
        assert action.choices is None or value in action.choices
    args = parser.parse_args(["--recipe", name])
    assert {k: getattr(args, k) for k in recipe} == recipe and args.recipe == name
    clinfonce.check(args)
    aug = common.augmentation(args)
    assert len(common.sample_params(aug, 2, common.generator(0, 0, "view"))["crop"]) == 2
    # a flag wins over the recipe
    assert parser.parse_args(["--recipe", name, "--epochs", "7"]).epochs == 7


def test_the_names_of_runs(monkeypatch):
    parser = parser_of(clinfonce, monkeypatch)
    assert parser.parse_args([]).out == "runs/clinfonce-demo-seed0"
    args = parser.parse_args(["--recipe", "cifar10", "--seed", "4"])
    assert args.out == "runs/clinfonce-cifar10-seed4" and args.dataset == "cifar10"
    assert args.argv == ["--recipe", "cifar10", "--seed", "4"] and args.method == "clinfonce"


@pytest.mark.parametrize("argv, message", [
    (["--recipe", "imagnet"], "--recipe imagnet: there are demo, c100-small, c10, own, "),
    (["--epochs", "0"], "--epochs must be above 0"),
    (["--log-every", "-1"], "--log-every must be above 0"),
    (["--knn-t", "nan"], "--knn-t must be above 0"),
    (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
    (["--batch", "8"], "unrecognized arguments: --batch 8"),
    (["--arch", "vgg"], "argument --arch: invalid choice: 'vgg'"),
])
def test_wrong_flags_are_one_line(capsys, argv, message, tmp_path):
    assert message in error_line(capsys, 2, [*argv, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_every_flag_is_read_somewhere(monkeypatch):
    """A flag without effect would be a promise that nobody keeps."""
    folder = Path(common.__file__).parent
    text = "".join((folder / name).read_text() for name in ("common.py", "clinfonce.py"))
    flags = {a.dest for a in parser_of(clinfonce, monkeypatch)._actions} - {"help"}
    assert len(flags) > 50
    assert {f for f in flags if not re.search(rf"\bargs\.{f}\b", text)} == set()


# ---------------------------------------------------------------------------------- key encoder


def test_momentum_update_moves_parameters_and_no_buffer():
    key, query = (torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).double()
                  for _ in range(2))
    query[1].running_mean.fill_(5.0)
    before = [p.detach().clone() for p in key.parameters()]
    common.momentum_update(key, query, 0.9)
    for old, new, q in zip(before, key.parameters(), query.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), 0.9 * old + 0.1 * q.detach(), rtol=0, atol=1e-15)
    assert key[1].running_mean.tolist() == [0, 0]


def test_queue_tells_first_rows_from_keys_and_refuses_a_large_batch():
    queue = common.Queue(torch.zeros(5, 2))
    queue.enqueue(torch.ones(3, 2))
    assert queue.labels.tolist() == [0, 0, 0, -1, -1] and queue.ptr == 3
    queue.enqueue(torch.full((2, 2), 2.0), torch.tensor([7, 8]))
    assert queue.labels.tolist() == [0, 0, 0, 7, 8] and queue.ptr == 0  # not K: modulo
    assert queue.keys[:, 0].tolist() == [1, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="6 keys do not fit into a queue of 5"):
        queue.enqueue(torch.ones(6, 2))
    assert queue.keys[:, 0].tolist() == [1, 1, 1, 2, 2]

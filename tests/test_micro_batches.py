"""What lets every process compute the loss of the whole batch: common.MicroBatches, gather,
check_loss and the row numbers of Data.batches; in one process and in pools of N = 1, 2, 4."""
import copy
import math
import os
import signal
from types import SimpleNamespace

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import NS, blob_tables, close, many, normal, own_rows
from torch import nn

import clinfonce
import common

B = 16  # rows of the global batch


class Net(nn.Module):
    """Views (b, 3) each to what a method's network may return: see `form`."""

    def __init__(self, form="tensor", norm=False, dropout=0.0, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, width), nn.Linear(width, 4)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.dropout, self.form, self.calls = nn.Dropout(dropout), form, 0

    def forward(self, *views, scale=1.0):
        self.calls += 1
        h = [torch.tanh(self.norm(self.first(x))) for x in views]
        z = torch.stack([self.second(self.dropout(x)) for x in h]) * scale  # (V, b, 4)
        if self.form == "tuple":
            return z, h[0]
        return z if self.form == "tensor" else [z[0], None]


def whole_loss(out):
    """A loss in which all rows meet, of every tensor that is there."""
    out = [out] if isinstance(out, torch.Tensor) else [y for y in out if y is not None]
    return sum((y @ y.mT).tanh().mean() + y.square().mean() for y in out)


def gradient(network, views, loss=whole_loss, **options):
    """The gradient of every parameter, and the detached output."""
    network.zero_grad(set_to_none=True)
    out = network(*views, **options)
    loss(out).backward()
    return [p.grad.clone() for p in network.parameters()], out


def by_hand(net, views, rows):
    """The same in parts, without MicroBatches: all activations are kept."""
    net.zero_grad(set_to_none=True)
    out = torch.cat([net(*part) for part in zip(*(x.split(rows) for x in views))], -2)
    whole_loss(out).backward()
    return [p.grad.clone() for p in net.parameters()], out


# ---------------------------------------------------------------------------------- one process


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 11, 12, 20])
@pytest.mark.parametrize("form", ["tensor", "tuple", "list with None"])
@pytest.mark.parametrize("V", [1, 2, 3])
def test_the_gradient_is_that_of_the_whole_batch(V, form, rows):
    net, views = Net(form).double(), normal(V, 12, 3)
    expected, whole = gradient(net, views, scale=1.7)
    found, out = gradient(common.MicroBatches(net, rows), views, scale=1.7)
    close(found, expected)
    assert max(g.abs().max() for g in expected) > 0.01
    if form == "tensor":
        close(out, whole)
    else:
        assert len(out) == len(whole) == 2 and (out[1] is None) == (form != "tuple")
        close([y for y in out if y is not None], [y for y in whole if y is not None])


def test_a_gradient_without_the_later_parts_is_another():
    """The check above can fail: parts whose gradient is lost are noticed."""
    net, views = Net().double(), normal(2, 12, 3)
    expected = gradient(net, views)[0]
    lost = torch.cat([net(*(x[:4] for x in views)), net(*(x[4:] for x in views)).detach()], -2)
    net.zero_grad()
    whole_loss(lost).backward()
    with pytest.raises(AssertionError):
        close([p.grad for p in net.parameters()], expected)


def test_batchnorm_normalizes_a_part_by_itself_and_keeps_the_statistics_of_the_first():
    views, net = normal(2, 12, 3), Net(norm=True).double()
    parts, first = copy.deepcopy(net), copy.deepcopy(net)
    network = common.MicroBatches(net, 5)
    for _ in range(2):  # the second step goes on from the statistics of the first
        found, out = gradient(network, views)
        expected, z = by_hand(parts, views, 5)
        close(found, expected)
        close(out, z)
        first(*(x[:5] for x in views))
        close(dict(net.norm.named_buffers()), dict(first.norm.named_buffers()))
    assert net.norm.num_batches_tracked == 4 and net.norm.momentum == 0.1  # two views a step
    whole = gradient(Net(norm=True).double(), views)[0]
    with pytest.raises(AssertionError):  # parts are not the whole batch here
        close(found, whole)


def test_statistics_without_gradient_and_in_evaluation_mode():
    views, net = normal(2, 12, 3), Net(norm=True).double()
    first, network = copy.deepcopy(net), common.MicroBatches(net, 5)
    with torch.no_grad():  # as the key encoders are called
        out = network(*views)
    first(*(x[:5] for x in views))
    close(dict(net.norm.named_buffers()), dict(first.norm.named_buffers()))
    assert not out.requires_grad and net.calls == 3
    network.eval()
    before = copy.deepcopy(net.state_dict())
    close(gradient(network, views)[0], gradient(net, views)[0])
    close(dict(net.state_dict()), dict(before))


def test_an_error_in_a_part_gives_batchnorm_its_momentum_back():
    net = Net(norm=True).double()
    x = normal(12, 3)
    with pytest.raises(TypeError):
        common.MicroBatches(net, 5)(x[:, :3], no_such_option=1)
    with pytest.raises(ValueError, match="more than 1 value"):
        common.MicroBatches(net, 11)(x)
    assert net.norm.momentum == 0.1 and net.norm.num_batches_tracked is not None


def test_dropout_has_the_same_masks_in_both_passes():
    net, views = Net(dropout=0.5).double(), normal(2, 12, 3)
    torch.manual_seed(3)
    expected, z = by_hand(net, views, 5)
    torch.manual_seed(3)
    out = common.MicroBatches(net, 5)(*views)
    close(out, z)
    torch.rand(100)  # another state of the generator when the second pass begins
    net.zero_grad()
    whole_loss(out).backward()
    close([p.grad for p in net.parameters()], expected)


def test_mixed_precision_is_the_same_in_both_passes():
    net, views = Net(), normal(2, 12, 3).float()

    def half(run, *args):
        with torch.autocast("cpu", torch.bfloat16):
            out = run(*args)
        assert out.dtype == torch.bfloat16
        net.zero_grad()
        whole_loss(out.float()).backward()
        return [p.grad.clone() for p in net.parameters()]

    expected = half(lambda: torch.cat([net(*part) for part in zip(*(x.split(5) for x in views))],
                                      -2))
    found = half(common.MicroBatches(net, 5), *views)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert all(g.dtype == torch.float32 for g in found)


def test_every_part_runs_once_more_and_keeps_nothing_until_then():
    net, views = Net(width=64).double(), normal(2, 12, 3)
    kept = []

    def keep(x):
        kept.append(x.numel() * x.element_size())
        return x

    def bytes_kept(network):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = network(*views)
        return sum(kept), out

    whole, _ = bytes_kept(net)
    assert whole > 2 * 12 * 64 * 8 and net.calls == 1
    in_parts, out = bytes_kept(common.MicroBatches(net, 5))
    assert in_parts < whole / 10 and net.calls == 1 + 3
    whole_loss(out).backward()
    assert net.calls == 1 + 3 + 3
    common.MicroBatches(net, 12)(*views)  # one part: nothing to run again
    assert net.calls == 8


def test_compiled_parts():
    net, views = Net(norm=True).double(), normal(2, 12, 3)
    expected, z = by_hand(copy.deepcopy(net), views, 4)
    found, out = gradient(common.MicroBatches(torch.compile(net, backend="aot_eager"), 4), views)
    close(found, expected)
    close(out, z)
    assert net.norm.num_batches_tracked == 2


def test_which_networks_are_divided():
    def divided(b, rows, norm=True):
        return common.micro_batches(Net(norm=norm), SimpleNamespace(batch_size=b, micro_batch=rows))

    assert isinstance(divided(16, None), Net)
    assert divided(16, 5, norm=False).rows == divided(17, 5).rows == 5
    assert divided(1, 1).rows == 1  # a batch of one is refused by nobody but BatchNorm itself
    assert divided(16, 1, norm=False).rows == 1
    for b, rows in ((16, 5), (16, 1), (17, 16)):
        with pytest.raises(common.BadInput, match=f"^--micro-batch {rows} leaves a part of one im"):
            divided(b, rows)


# ---------------------------------------------------------------------------------- processes


def flags(*argv):
    """The parsed flags of clinfonce.py, which is not run."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "run", lambda train, parser, argv:
                      found.append(parser.parse_args(argv)))
        clinfonce.main(["--device", "cpu", "--threads", "1", "--workers", "0", "--batch-size",
                        str(B), "--image-size", "8", *argv])
    return found[0]


def case_gather(folder):
    """(b, D) and (V, b, D): all rows, and the gradient, for which no process waits."""
    x, y = normal(B, 3), normal(2, B, 3, seed=1)
    x, y = (v[..., own_rows(B), :].clone().requires_grad_() for v in (x, y))
    z = common.gather(x), common.gather(y)
    loss = (z[0] @ z[1].mT).tanh().sum()  # the same on every process
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "all_reduce", "reduce_scatter", "broadcast"):
            patch.delattr(dist, name)
        loss.backward()
    return dict(z=[v.detach() for v in z], grads=[x.grad, y.grad],
                detached=common.gather(x.detach()).requires_grad)


def error_of(*args, **kwargs):
    """The text of the RunFailed of check_loss."""
    with pytest.raises(common.RunFailed) as error:
        common.check_loss(*args, **kwargs)
    assert not error.value.alone
    return str(error.value)


def case_check_loss(folder):
    r, W = common.rank(), common.world()
    loss, zero = torch.tensor(r + 1.5, requires_grad=True), torch.tensor(0.0)
    Z = torch.zeros(2, B, 3)
    bad = Z.clone()
    bad[1, B // W * (W - 1), 2] = math.nan  # two rows of the last process, one in both views
    bad[0, B // W * (W - 1), 0] = bad[0, B - 1, 0] = math.inf
    good, wrong = torch.tensor(True), torch.tensor(r != W - 1)  # false on the last process
    return dict(
        values=common.check_loss(loss, 3, dict(a=torch.tensor(2.0 * r), b=torch.tensor(1)),
                                 dict(Z=Z), {"text": good}),
        alone=common.check_loss(loss.half(), 3),
        loss=error_of(torch.tensor(math.nan if r == W - 1 else 1.0), 7),
        infinite=error_of(torch.tensor(math.inf), 7),
        feature=error_of(zero, 4, features={"the first head": Z, "the second head": bad}),
        small=error_of(zero, 4, features=dict(h=bad[0])),
        condition=error_of(zero, 5, conditions={"all is well": good, "no key has moved": wrong}),
        first=error_of(torch.tensor(math.nan), 6, None, dict(z=bad), {"no": wrong}))


def case_stop(folder):
    """SIGTERM to the last process only: all of them stop after the same step."""
    before = signal.getsignal(signal.SIGTERM)
    common.setup(flags())
    answers = []
    for step in range(3):
        if step == 1 and common.rank() == common.world() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        answers.append(common.should_stop())  # a wish alone changes nothing
        common.check_loss(torch.tensor(0.0), step)
        answers.append(common.should_stop())
    signal.signal(signal.SIGTERM, before)
    common._signal.update(asked=False, agreed=False)
    return answers


def case_batches(folder):
    args = flags()
    data = common.Data(*blob_tables(args), args, torch.device("cpu"))
    aug = common.augmentation(args)
    small = dict(aug, size=5)
    found = []
    for batch in data.batches(2, 6, aug, 2, extra=[(small, 3)]):
        assert (batch.own.start, batch.own.stop) == (own_rows(B).start, own_rows(B).stop)
        assert torch.equal(batch.images, data.train.images[batch.rows[batch.own]])
        (extra,) = batch.extra
        found.append((batch.rows, data.train.column("label")[batch.rows], common.augment(batch),
                      common.augment(extra)))
    return found


class Views(nn.Module):
    """Views (b, 3, 8, 8) to unit vectors (V, b, 6), with or without BatchNorm."""

    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 5, 3), nn.Linear(5, 6)
        self.norm = nn.BatchNorm2d(5) if norm else nn.Identity()

    def forward(self, *views):
        h = self.norm(self.conv(torch.cat(views))).relu().mean((2, 3))
        return F.normalize(self.head(h), dim=1).unflatten(0, (len(views), -1))


def trained(norm, rows):
    """State of a network after three steps in parts of at most `rows` rows."""
    args = flags(*(["--micro-batch", str(rows)] if rows else []))
    model = Views(norm).double()
    network = common.distribute(model, args)
    inside = network.module if common.world() > 1 else network
    assert isinstance(inside, common.MicroBatches) == bool(rows)
    optimizer = torch.optim.SGD(model.parameters(), 0.5, 0.9)
    for step in range(3):
        x = normal(2, B, 3, 8, 8, seed=step)[:, own_rows(B)]
        z = common.gather(network(*x))
        loss = clinfonce.cl_infonce(z, torch.arange(B) // 3, 0.5, 0.5)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return {k: v.clone() for k, v in model.state_dict().items()}


def case_trained(folder):
    return {(norm, rows): trained(norm, rows) for norm in (True, False) for rows in (0, 8, 4, 3)
            if not norm or rows != 3}  # 3 leaves parts of one image


CASES = dict(gather=case_gather, check_loss=case_check_loss, stop=case_stop, batches=case_batches,
             trained=case_trained)
results = ranks.pool(__name__)


@pytest.mark.parametrize("N", NS)
def test_gather(results, N):
    one = results[1][0]["gather"]
    close(one["z"], [normal(B, 3), normal(2, B, 3, seed=1)])
    for found in (r["gather"] for r in results[N]):
        close(found["z"], one["z"])
        assert not found["detached"]
    for i in (0, 1):  # the mean over the processes, which DDP takes, is the gradient of one
        grads = torch.cat([r["gather"]["grads"][i] for r in results[N]], -2) / N
        close(grads, one["grads"][i])


def test_gather_of_one_process_is_the_tensor():
    x = normal(3, 2)
    assert common.gather(x) is x


@pytest.mark.parametrize("N", NS)
def test_check_loss(results, N):
    for found in (r["check_loss"] for r in results[N]):
        assert found["values"] == dict(loss=1.5 + (N - 1) / 2, a=N - 1.0, b=1.0)
        assert found["alone"] == dict(loss=1.5 + (N - 1) / 2)
        assert found["loss"].startswith("the loss is nan at step 7; the last checkpoint is kept.")
        assert found["infinite"].startswith("the loss is inf at step 7;")
        of_rank = [0] * (N - 1) + [2]
        assert found["feature"].startswith(
            f"the output of the second head is not finite at step 4, in 2 of {B} rows (those of "
            f"each rank: {of_rank}); the last checkpoint is kept.")
        assert found["small"].startswith(f"the output of h is not finite at step 4, in 2 of {B} r")
        assert found["condition"] == "step 5: no key has moved"
        # the cause before what follows from it
        assert found["first"].startswith("the output of z is not finite at step 6")


@pytest.mark.parametrize("N", NS)
def test_all_processes_stop_after_the_same_step(results, N):
    assert [r["stop"] for r in results[N]] == [[False, False, False, True, True, True]] * N


@many
def test_every_process_knows_the_rows_of_the_whole_batch(results, N):
    for step, (rows, label, *views) in enumerate(results[1][0]["batches"]):
        assert rows.shape == label.shape == (B,)
        assert [v.shape[:2] for v in views] == [(2, B), (3, B)]
        of_rank = [r["batches"][step] for r in results[N]]
        for own in of_rank:
            assert torch.equal(own[0], rows) and torch.equal(own[1], label)
        for i, whole in enumerate(views, 2):  # the images of a process are its slice of the rows
            torch.testing.assert_close(torch.cat([own[i] for own in of_rank], 1), whole, rtol=0,
                                       atol=1e-6)


@pytest.mark.parametrize("N", NS)
def test_parts_are_processes(results, N):
    """Three steps in float64: with BatchNorm parts of m rows give the weights and statistics of
    B / m processes; without it neither parts nor processes change anything."""
    one, found = results[1][0]["trained"], results[N][0]["trained"]
    for rows in (0, 8, 4, 3):
        close(found[False, rows], one[False, 0])
    for rows in (8, 4):
        whole = results[B // rows][0]["trained"][True, 0]
        if rows < B // N:
            close(found[True, rows], whole)
            weight = found[True, 0]["conv.weight"]
            assert not torch.allclose(weight, whole["conv.weight"], atol=1e-5)  # other parts
    for r in results[N]:
        for key, state in r["trained"].items():
            close(state["conv.weight"], found[key]["conv.weight"])

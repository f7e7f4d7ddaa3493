"""sogclr_clip.py: world size, resume, variants, state, evaluation, data and bad input. The vectors
of the authors' code are in test_golden.py."""
import json
import math
import re
import zlib
from types import SimpleNamespace
from unittest import mock

import pytest
import ranks
import torch
import torch.nn.functional as F
from conftest import write_folder, write_image
from ranks import close, many, normal, own_rows
from runs import BASE, SMALL, end, start, torchrun
from torch import nn

import common
import sogclr_clip

B, D, N_I, N_T = 8, 6, 12, 20
P = torch.tensor([[0, 1, 2, 3, 4, 5, 1, 6], [7, 1, 2, 8, 7, 9, 10, 11],  # images repeat
                  [0, 3, 3, 1, 4, 8, 7, 6]])
Q = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 2, 11, 12, 13, 6, 15],
                  [0, 9, 3, 1, 16, 5, 12, 7]])


def flags(*more):
    """The parsed and checked flags of sogclr_clip.py, which is not run."""
    found = []
    with mock.patch.object(common, "run", lambda train, parser, argv:
                           found.append(parser.parse_args(argv))):
        sogclr_clip.main(["--device", "cpu", "--threads", "1", "--workers", "0", "--batch-size",
                          str(B), "--epochs", "4", "--out", "unused", *more])
    sogclr_clip.check(found[0])
    return found[0]


# ------------------------------------------------------------------ cases, run on every rank


class Toy(nn.Module):
    """Stands in for the towers: no BatchNorm, float64, inputs are vectors."""

    def __init__(self, normalize):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text, self.normalize = nn.Linear(5, D), nn.Linear(4, D), normalize
        self.double()

    def forward(self, images, tokens):
        out = self.image(images).tanh(), self.text(tokens)
        return tuple(F.normalize(y, dim=1) if self.normalize else y for y in out)


VARIANTS = {name: ["--loss", name] for name in sogclr_clip.LOSSES} | {
    "clip-global": ["--loss", "clip", "--learn-tau", "global"],
    "clip-sample": ["--loss", "clip", "--learn-tau", "sample"],
    "mine": ["--loss", "sogclr-mine", "--lambda-mi", "0.3"],
    "cosine": ["--loss", "isogclr", "--gamma-schedule", "cosine", "--eta", "0.01"],
    "repeats": ["--loss", "sogclr", "--mask-repeats"],
    "clip-repeats": ["--loss", "siglip", "--mask-repeats"],
}


def sizes(N_I=N_I, N_T=N_T):
    """Stands in for the pairs of a data set."""
    return SimpleNamespace(N_I=N_I, N_T=N_T, crc=0)


def distinct(n):
    """negative (n, n) of a batch without repeats."""
    return ~torch.eye(n, dtype=torch.bool)


def steps(name, micro_batch=None, network=None, lr=0.0, count=3):
    """Losses, gradients and state of steps in two epochs, as `train` makes them.

    network: None for `Toy`, else a network of images (B, 3, 32, 32) and tokens. lr: of SGD, after
    each step.
    """
    args = flags(*VARIANTS[name], *(["--micro-batch", str(micro_batch)] if micro_batch else []))
    model = network or Toy(args.loss != "vicreg")
    shape = (5,) if network is None else (3, 32, 32)
    network = common.distribute(model, args)
    objective = sogclr_clip.Objective(args, sizes(), D).double()
    both = [*model.named_parameters(), *objective.named_parameters()]
    both = [(n, x) for n, x in both if x.requires_grad]
    own, found = own_rows(B), []
    for step in range(count):
        p, q = P[step], Q[step]
        x, t = network(normal(B, *shape, seed=10 + step)[own], normal(B, 4, seed=20 + step)[own])
        x, t = common.gather(x), common.gather(t)
        same = sogclr_clip.duplicate_mask(p, q % 7) if args.mask_repeats else ~distinct(B)
        loss, stats = objective(x, t, p, q, ~same, step, step // 2, objective.draw(step, B))
        for _, parameter in both:
            parameter.grad = None
        loss.backward()
        values = common.check_loss(loss, step, stats, dict(image=x, text=t))
        with torch.no_grad():
            for _, parameter in both:
                parameter -= lr * parameter.grad
        objective.update()
        state = dict(model.state_dict() if lr else {}, **objective.state_dict())
        found.append(dict(stats=values, grad={n: x.grad.clone() for n, x in both},
                          state={k: v.clone() for k, v in state.items() if torch.is_tensor(v)}))
    return found


def case_losses(folder):
    return {name: steps(name) for name in VARIANTS}


def case_dropped(folder):
    """A gather that gives the own rows' gradient, but no factor W, to DDP: the test must see it."""
    def dropping(x):
        parts = [torch.empty_like(x) for _ in range(common.world())]
        torch.distributed.all_gather(parts, x.detach().contiguous())
        parts[common.rank()] = x
        return torch.cat(parts)

    if common.world() == 1:
        return None
    with mock.patch.object(common, "gather", dropping):
        return steps("sogclr")


class SmallTowers(nn.Module):
    """Both towers on small images and vectors in float64, the image tower with BatchNorm or not."""

    def __init__(self, norm, normalize):
        super().__init__()
        torch.manual_seed(0)
        self.image = common.resnet("resnet-tiny")
        if not norm:
            for module in list(self.image.modules()):
                for name, child in module.named_children():
                    if isinstance(child, nn.BatchNorm2d):
                        setattr(module, name, nn.Identity())
        self.head, self.text = nn.Linear(self.image.width, D), nn.Linear(4, D)
        self.normalize = normalize
        self.double()

    def forward(self, images, tokens):
        out = self.head(self.image(images)), self.text(tokens)
        return tuple(F.normalize(y, dim=1) if self.normalize else y for y in out)


PARTED = ["clip", "sogclr", "isogclr", "isogclr-tempnet", "hybrid", "vicreg"]


def case_micro_batches(folder):
    """Three steps of training in parts of each size, with BatchNorm and without."""
    def last(name, norm, m):
        rows = B // common.world()
        if m and m > rows:
            return None
        return steps(name, m, SmallTowers(norm, name != "vicreg"), lr=0.01)[-1]["state"]

    return {name: {(norm, m): last(name, norm, m) for norm in (True, False)
                   for m in ((None, 2, 4) if norm else (None, 3))} for name in PARTED}


def case_micro_batches_wrong(folder):
    """Parts whose gradient gets lost from the second part on: the test must see it."""
    if common.world() > 1:
        return None
    real, calls = torch.utils.checkpoint.checkpoint, []

    def losing(*args, **options):
        out = real(*args, **options)
        calls.append(out)
        return out if len(calls) % 4 == 1 else tuple(y.detach() for y in out)

    with mock.patch.object(torch.utils.checkpoint, "checkpoint", losing):
        return steps("sogclr", 2, SmallTowers(True, True), lr=0.01)[-1]["state"]


CASES = {name.removeprefix("case_"): case for name, case in list(globals().items())
         if name.startswith("case_")}
results = ranks.pool(__name__)


@many
@pytest.mark.parametrize("name", VARIANTS)
def test_number_of_processes_changes_nothing(results, N, name):
    """Loss, statistics, gradients of towers, temperatures and networks, every table; everywhere.
    """
    one = results[1][0]["losses"][name]
    for process in results[N]:
        for a, b in zip(one, process["losses"][name], strict=True):
            assert a["stats"] == pytest.approx(b["stats"], rel=1e-10, abs=1e-10)
            same_tensors(a["grad"], b["grad"])
            same_tensors(a["state"], b["state"])


def same_tensors(a, b):
    """Dicts of tensors, within 1e-10."""
    assert a.keys() == b.keys()
    for key in a:
        close(a[key], b[key])


@many
@pytest.mark.parametrize("name", VARIANTS)
def test_tables_are_equal_in_all_processes(results, N, name):
    first, *others = ([step["state"] for step in rank["losses"][name]] for rank in results[N])
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert all(torch.equal(a[k], b[k]) for k in a)


@many
def test_the_test_sees_a_gather_that_drops_gradients(results, N):
    one, dropped = results[1][0]["losses"]["sogclr"][0], results[N][0]["dropped"][0]
    assert (one["grad"]["image.weight"] - dropped["grad"]["image.weight"]).abs().max() > 1e-4


# ------------------------------------------------------------------ micro-batches


@pytest.mark.parametrize("name", PARTED)
def test_micro_batches_are_processes(results, name):
    """With BatchNorm, parts of m images in any number of processes equal B / m processes: towers,
    running statistics, and state of the loss after three steps."""
    for whole, m, Ns in ((4, 2, (1, 2)), (2, 4, (1,))):
        processes = results[whole][0]["micro_batches"][name][True, None]
        assert any(k.endswith("running_mean") for k in processes)
        for N in Ns:
            for process in results[N]:
                parts = process["micro_batches"][name][True, m]
                counts = [k for k in parts if k.endswith("num_batches_tracked")]
                assert counts and all(parts[k] == 3 for k in counts)
                if process is results[N][0]:  # the others' statistics are not kept
                    same_tensors(processes, parts)


@pytest.mark.parametrize("name", PARTED)
def test_micro_batches_change_nothing_without_batchnorm(results, name):
    """Parts of 3 images, which do not divide the 8 or 4 of a process."""
    one = results[1][0]["micro_batches"][name][False, None]
    for N in (1, 2):
        for process in results[N]:
            same_tensors(one, process["micro_batches"][name][False, 3])


def test_the_tests_see_wrong_micro_batches(results):
    """A wrong size of the parts, or a part whose gradient is lost."""
    right = results[4][0]["micro_batches"]["sogclr"][True, None]
    for wrong in (results[1][0]["micro_batches"]["sogclr"][True, 4],
                  results[1][0]["micro_batches_wrong"]):
        assert (right["head.weight"] - wrong["head.weight"]).abs().max() > 1e-4


# ------------------------------------------------------------------ state


def test_the_last_row_of_an_id_counts():
    t = sogclr_clip.Table(5, log_u=-math.inf, b=0).double()
    t.write(torch.tensor([3, 1, 3, 0]), dict(log_u=torch.tensor([1.0, 2.0, 3.0, 4.0]).double()))
    assert t.log_u.tolist() == [4.0, 2.0, -math.inf, 3.0, -math.inf] and not t.b.any()


def run_steps(args, batches):
    """Feed (epoch, p, q) of fixed random features to an objective; it and the last loss."""
    objective = sogclr_clip.Objective(args, sizes(), D).double()
    for step, (epoch, p, q) in enumerate(batches):
        x, t = (F.normalize(normal(len(p), D, seed=s + step), dim=1) for s in (30, 60))
        loss, _ = objective(x, t, torch.tensor(p), torch.tensor(q), distinct(len(p)), step, epoch,
                            objective.draw(step, len(p)))
        objective.update()
    return objective, loss


def batch_log_g(step, p, tau, side):
    """log g of the rows, by the definition (E6)."""
    x, t = (F.normalize(normal(len(p), D, seed=s + step), dim=1) for s in (30, 60))
    S = x @ t.T if side == "I" else t @ x.T
    z = (S - S.diagonal()[:, None]) / tau
    return torch.tensor([torch.stack([z[i, j].exp() for j in range(len(p)) if j != i]).mean().log()
                         for i in range(len(p))])


def test_new_and_repeated_ids():
    """First visit, also in a later epoch: u = g; later visits: the moving average (E7)."""
    args = flags("--loss", "sogclr", "--tau", "0.1", "--gamma", "0.3")
    objective, _ = run_steps(args, [(0, [0, 1, 2], [0, 1, 2]), (1, [1, 7, 2], [5, 1, 6])])
    first, second = (batch_log_g(s, [0, 1, 2], 0.1, "I").double() for s in (0, 1))
    u = objective.I.log_u.exp()
    close(u[0], first[0].exp())
    close(u[7], second[1].exp())
    close(u[1], 0.7 * first[1].exp() + 0.3 * second[0].exp())
    assert objective.I.log_u.isfinite().sum() == 4 and objective.T.log_u.isfinite().sum() == 5


def test_epoch_0_takes_the_batch_value():
    args = flags("--loss", "sogclr", "--tau", "0.1")
    objective, _ = run_steps(args, [(0, [0, 1, 2], [0, 1, 2]), (0, [0, 1, 2], [3, 4, 5])])
    close(objective.I.log_u[:3], batch_log_g(1, [0, 1, 2], 0.1, "I").double())


def fresh(S):
    """negative, log_u, b of a batch of ids that were never seen."""
    return (distinct(len(S)), torch.full((len(S),), -math.inf, dtype=torch.float64),
            torch.zeros(len(S), dtype=torch.float64))


def test_u_does_not_depend_on_the_batch_size():
    """Equal negatives: u is a mean, so more of them change nothing."""
    for n in (4, 40):
        S = torch.full((n, n), 0.3, dtype=torch.float64).fill_diagonal_(0.5)
        _, log_u, b = sogclr_clip.sogclr(S, *fresh(S), 0.1, 1.0)
        close(log_u, torch.full((n,), -2.0).double())


def test_gamma_1_without_floor_is_the_mini_batch_loss():
    """Gradient of tau log mean e^(D/tau), by autograd."""
    x, t = (F.normalize(normal(6, D, seed=s), dim=1).requires_grad_() for s in (1, 2))
    S, negative = x @ t.T, distinct(6)
    L, *_ = sogclr_clip.sogclr(S, negative, normal(6), normal(6).abs(), 0.07, 1.0, eps=0)
    found = torch.autograd.grad(L, (x, t), retain_graph=True)
    z = (S - S.diagonal()[:, None]) / 0.07
    exact = 0.07 * z.masked_fill(~negative, -math.inf).logsumexp(1).mean()
    for a, b in zip(found, torch.autograd.grad(exact, (x, t)), strict=True):
        close(a, b)


def test_all_negatives_equal_to_the_positive():
    x = F.normalize(torch.ones(4, D, dtype=torch.float64), dim=1).requires_grad_()
    L, log_u, _ = sogclr_clip.sogclr(x @ x.T, *fresh(x), 0.01, 1.0)
    L.backward()
    close(L, torch.zeros_like(L))
    close(log_u, torch.zeros(4).double())
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("loss", ["sogclr", "isogclr", "isogclr-v2", "sogclr-mine", "fastclip"])
def test_float32_at_a_temperature_of_0_005(loss):
    """Un-shifted logits up to 200: e^z is not a float32 number, its logarithm is."""
    args = flags("--loss", loss, "--tau", "0.005")
    objective = sogclr_clip.Objective(args, sizes(), D)
    for step in range(4):
        x = F.normalize(normal(4, D, seed=step), dim=1).float().requires_grad_()
        L, _ = objective(x, x + 1e-3, torch.arange(4), torch.arange(4), distinct(4), step, step, {})
        L.backward()
        objective.update()
        assert x.grad.isfinite().all() and objective.I.log_u[:4].isfinite().all()
        if loss.startswith("iso"):
            low, high = args.tau_bounds
            assert ((objective.I.tau >= low) & (objective.I.tau <= high)).all()


HALF = {  # every public loss as a function of what it takes, in half precision or not
    "clip": lambda S, *_: sogclr_clip.clip(S, distinct(8), 0.1, 0.1),
    "cyclip": lambda S, x, t: sogclr_clip.cyclip(S, S.T / 2, S / 4),
    "decorrelation": lambda S, x, t: sogclr_clip.decorrelation(x),
    "vicreg": lambda S, x, t: sogclr_clip.vicreg(x, t),
    "sogclr": lambda S, *_: sogclr_clip.sogclr(S, *state32(), 0.1, 0.5),
    "sogclr_dro": lambda S, *_: sogclr_clip.sogclr_dro(S, *state32(), TAU, 0.5, 6.0),
    "isogclr": lambda S, *_: sogclr_clip.isogclr(S, *state32(), TAU, 0.5, 6.0),
    "isogclr_v1": lambda S, *_: sogclr_clip.isogclr_v1(S, *state32()[:2], TAU, 0.5, 6.0),
    "isogclr_v2": lambda S, *_: sogclr_clip.isogclr_v2(
        S, *state32(), sogclr_clip.positives(S.diagonal()), TAU, 0.5, 6.0),
    "onlineclr": lambda S, *_: sogclr_clip.onlineclr(
        S, distinct(8), torch.tensor(0.1), torch.tensor(0.2), 0.1, 0.5),
    "info_sogclr": lambda S, *_: sogclr_clip.info_sogclr(S, *state32()[:2], 0.1, 0.5, 0.1),
    "mine": lambda S, *_: sogclr_clip.mine(S, distinct(8), torch.tensor(0.1), 0.1, 0.5),
    "difficulty": lambda S, *_: sogclr_clip.difficulty(S, distinct(8), 0.1),
    "siglip": lambda S, *_: sogclr_clip.siglip(S, distinct(8), torch.tensor(10.0), -1.0),
    "fastclip": lambda S, *_: sogclr_clip.fastclip(S, *state32()[:2], 0.1, 0.5, 6.0),
}
TAU = torch.linspace(0.05, 0.2, 8)


def state32():
    """negative, log_u, b of 8 anchors, float32."""
    return distinct(8), normal(8, seed=7).float(), normal(8, seed=8).abs().float()


@pytest.mark.parametrize("name", HALF)
def test_half_precision_is_that_of_its_float32(name):
    """Values and gradients of bfloat16 inputs are those of the same numbers in float32."""
    inputs = [normal(8, n, seed=n).clamp(-1, 1).bfloat16() for n in (8, D, D)]
    values, grads = [], []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = HALF[name](*leaves)
        out = out if isinstance(out, tuple) else (out,)
        values.append(out)
        grads.append(torch.autograd.grad(out[0], leaves, allow_unused=True))
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*values, strict=True))
    for half, full in zip(*grads, strict=True):
        if full is not None:
            atol = 1e-2 * full.abs().max().item()  # bfloat16 has 8 bits
            torch.testing.assert_close(half.float(), full, rtol=1e-2, atol=atol)


def test_the_floor_of_infosogclr():
    """(E27): with u = g of the whole data set the weights are those of its InfoNCE."""
    S = normal(7, 7, seed=3).clamp(-1, 1).requires_grad_()
    L, _ = sogclr_clip.info_sogclr(S, *fresh(S)[:2], 0.2, 1.0, 1 / (7 - 1))
    found, = torch.autograd.grad(L, S)
    exact, = torch.autograd.grad(0.2 * F.cross_entropy(S / 0.2, torch.arange(7)), S)
    close(found, exact)


def test_infosogclr_takes_its_floor_from_the_data():
    """The glue of (E27): N texts for an image, N images for a text."""
    args = flags("--loss", "sogclr-mine", "--tau", "0.1")
    _, loss = run_steps(args, [(0, [0, 1, 2], [0, 1, 2])])
    x, t = (F.normalize(normal(3, D, seed=s), dim=1) for s in (30, 60))
    expected = sum(sogclr_clip.info_sogclr(S, *fresh(S)[:2], 0.1, 1.0, 1 / (N - 1))[0]
                   for S, N in ((x @ t.T, N_T), (t @ x.T, N_I)))
    close(loss, expected, 1e-12)


def test_the_bank_of_hybrid():
    """First visit: the feature; then the normalised mean. Negatives are rows that were seen and
    are not in the batch."""
    args = flags("--loss", "hybrid", "--tau", "0.1")
    objective, _ = run_steps(args, [(0, [0, 1, 2], [0, 1, 2]), (0, [3, 1, 5], [4, 5, 1])])
    x = [F.normalize(normal(3, D, seed=30 + s), dim=1) for s in (0, 1)]
    assert not objective.I.bank[[4, *range(6, N_I)]].any()
    close(objective.I.bank[[0, 3, 5]], torch.stack([x[0][0], x[1][0], x[1][2]]))
    close(objective.I.bank[1], F.normalize(x[0][1] + x[1][1], dim=0))

    def usable(table, batch, step):
        objective.I = table
        rows = objective.draw(step, 3)["I"]  # of the table of images
        return rows[objective.usable_rows(table, rows, batch)]

    assert usable(objective.I, torch.tensor([1, 4]), 7).tolist() == [0, 2, 3, 5]
    many = sogclr_clip.Table(5000, log_u=0)
    many.register_buffer("bank", torch.zeros(5000, D))
    rows = usable(many, torch.arange(2500), 7)
    assert rows.min() >= 2500 and 300 < len(rows) == len(rows.unique()) < 600
    assert not torch.equal(rows, usable(many, torch.arange(2500), 8))


NEGATIVES = sorted(set(sogclr_clip.LOSSES) - {"vicreg", "cyclip", "hybrid"})


@pytest.mark.parametrize("loss", NEGATIVES)
def test_repeats_are_no_negatives(loss):
    """With x_i = e_i, component i of t_j is S_ij: its gradient is 0 just where j repeats i."""
    p, text = torch.tensor([0, 0, 1, 2]), torch.tensor([5, 6, 6, 7])
    same = sogclr_clip.duplicate_mask(p, text)
    assert same.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    objective = sogclr_clip.Objective(flags("--loss", loss), sizes(), D).double()
    t = (0.1 * normal(4, D)).requires_grad_()
    x, drawn = torch.eye(4, D).double(), objective.draw(1, 4)
    L, _ = objective(x, t, p, torch.arange(4), ~same, 1, 0, drawn)
    grad, = torch.autograd.grad(L, t)
    assert torch.equal(grad.T[:4] != 0, ~same | torch.eye(4, dtype=torch.bool))


@pytest.mark.parametrize("loss", ["sogclr", "vicreg", "siglip"])
def test_features_that_are_not_finite_stop_the_run(refused_by, monkeypatch, tmp_path, loss):
    """Training names the tower, the step, and the rows; the checkpoint before it is kept."""
    real, calls = sogclr_clip.Towers.forward, []

    def broken(self, images, tokens=None):
        x, t = real(self, images, tokens)
        if images is not None and t is not None:
            calls.append(0)
            if len(calls) == 2:
                t = t * torch.ones(16, 1).index_fill(0, torch.tensor([1, 3]), math.nan)
        return x, t

    monkeypatch.setattr(sogclr_clip.Towers, "forward", broken)
    refused_by(sogclr_clip.main, [*VERY_SMALL, "--loss", loss, "--save-every", "1"],
               "text_tower", "at step 1, in 2 of 16 rows", "[2]", status=1,
               says=["32 captions of"])
    assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["step"] == 0


def test_a_pair_without_negatives_stops_the_run(refused_by, monkeypatch, tmp_path):
    """All captions of the batch are the same."""
    monkeypatch.setattr(sogclr_clip, "clean_caption", lambda caption: "a cat")
    monkeypatch.setattr(sogclr_clip.Pairs.__init__, "__defaults__", (lambda caption: "a cat",))
    refused_by(sogclr_clip.main, [*VERY_SMALL, "--mask-repeats"], "step 0: a pair of the batch has "
               "no negative: all others repeat it; use a larger --batch-size", status=1,
               says=["32 captions of"])
    sogclr_clip.main([*VERY_SMALL, "--loss", "vicreg", "--out", str(tmp_path / "vicreg")])
    assert common.load_checkpoint(tmp_path / "vicreg/checkpoint.pt")["step"] == 2  # it has none


# ------------------------------------------------------------------ agreement with open_clip


def test_clip_and_siglip_are_those_of_open_clip():
    import open_clip.loss

    x, t = (F.normalize(normal(9, D, seed=s).float(), dim=1) for s in (1, 2))
    scale, negative = torch.tensor(14.3), distinct(9)
    ours = sogclr_clip.clip(x @ t.T, negative, 1 / scale, 1 / scale)
    assert abs(ours - open_clip.loss.ClipLoss()(x, t, scale)) < 1e-6
    ours = sogclr_clip.siglip(x @ t.T, negative, scale, torch.tensor(-10.0))
    assert abs(ours - open_clip.loss.SigLipLoss()(x, t, scale, torch.tensor(-10.0))) < 1e-6


def test_open_clip_loads_a_trained_checkpoint(run_main, tmp_path, capsys):
    """Strictly, into open_clip's own class; and `--pretrained` takes the file, too."""
    import open_clip

    run_main(sogclr_clip.main, "run", VERY_SMALL)
    path = tmp_path / "run/checkpoint.pt"
    assert re.search("\n  mean +untrained .* trained ", capsys.readouterr().out)
    run_main(sogclr_clip.main, "on", [*VERY_SMALL, "--pretrained", str(path)])
    assert re.search("\n  mean +initial .* trained ", capsys.readouterr().out)
    weights = torch.load(path, weights_only=True)["state"]["model"]
    c = sogclr_clip.TINY["tiny-vit"]
    model = open_clip.CLIP(c["embed_dim"], open_clip.CLIPVisionCfg(**c["vision_cfg"]),
                           open_clip.CLIPTextCfg(**c["text_cfg"]))
    model.load_state_dict({k.removeprefix("clip."): v for k, v in weights.items()})
    args = flags("--model", "tiny-vit", "--pretrained", str(path))
    other, tokenizer = sogclr_clip.towers(args)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(),
                                                 other.state_dict().values(), strict=True))
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sogclr_clip.Towers(other).eval()(x)[0],
                               model.eval().encode_image(x, normalize=True))


def test_models_of_open_clip_are_built_offline():
    clip, tokenizer = sogclr_clip.towers(flags("--model", "RN50", "--image-size", "64"))
    assert tokenizer(["a cat"]).shape == (1, 77) and clip.visual.image_size in (64, (64, 64))
    assert clip.text_projection.shape[-1] == 1024


# ------------------------------------------------------------------ runs


VERY_SMALL = [*BASE, "--model", "tiny-vit", "--limit-train", "32", "--batch-size", "16", "--epochs",
              "1", "--warmup", "0"]


@pytest.fixture(autouse=True)
def fewer_pictures(monkeypatch):
    """The sheet of queries takes a second; one test looks at it."""
    monkeypatch.setattr(sogclr_clip, "retrieval_picture", lambda *a, **k: None)


HOLDS = {  # tables and parameters that the checkpoint of a loss must have
    "clip": [], "cyclip": [], "vicreg": [], "sogclr": ["I.log_u", "T.log_u", "I.b", "T.b"],
    "sogclr-dro": ["I.log_u", "T.log_u", "I.b", "T.b", "I.tau", "T.tau", "I.v", "T.v"],
    "isogclr": ["I.log_u", "T.log_u", "I.b", "T.b", "I.tau", "T.tau", "I.v", "T.v"],
    "isogclr-tempnet": ["I.log_u", "T.log_u", "I.b", "T.b", "net_I.prototypes", "net_T.scaler"],
    "isogclr-v1": ["I.log_u", "T.log_u", "net_I.prototypes", "net_T.scaler"],
    "isogclr-v2": ["I.log_u", "T.log_u", "I.b", "T.b", "I.tau", "T.tau", "I.v", "T.v", "log_r"],
    "onlineclr": ["log_n", "log_p"], "sogclr-mine": ["I.log_u", "T.log_u", "log_v"],
    "hybrid": ["I.log_u", "T.log_u", "I.bank", "T.bank"], "siglip": ["log_s", "c"],
    "fastclip": ["I.log_u", "T.log_u", "tau"],
}


@pytest.mark.parametrize("loss", sogclr_clip.LOSSES)
def test_every_loss_trains(run_main, tmp_path, loss):
    """One epoch; its state moved and is in the checkpoint."""
    found = run_main(sogclr_clip.main, "run", [*VERY_SMALL, "--loss", loss])
    state = found["state"]["objective"]
    assert set(HOLDS[loss]) <= state.keys()
    for name in HOLDS[loss]:
        if name.endswith("log_u"):
            assert (state[name] > -math.inf).all() and len(state[name]) == 32
        elif name.startswith("log_") and name != "log_s":
            assert state[name].isfinite()
    records = [json.loads(s) for s in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert records[1]["step"] == 0 and records[-1]["step"] == 2
    assert {"TR@1", "IR@10", "mean", "zero-shot top-1"} <= records[-1].keys()
    assert (tmp_path / "run/tau.png").exists() == loss.startswith(("iso", "sogclr-dro"))


@pytest.mark.parametrize("argv", [
    ["isogclr-v2"], ["hybrid"], ["isogclr-tempnet"], ["sogclr-mine", "--lambda-mi", "0.5"],
    ["fastclip"], ["clip", "--learn-tau", "sample"]], ids=lambda a: a[0])
def test_stopped_runs_go_on_exactly(goes_on_exactly, argv):
    goes_on_exactly(sogclr_clip.main, [*SMALL, "--warmup", "0", "--model", "tiny-vit",
                                       "--knn-every", "9", "--save-every", "9", "--loss", *argv])


def test_the_log_has_the_statistics(run_main, tmp_path):
    """What `check_loss` returns is what the log has."""
    run_main(sogclr_clip.main, "run", [*VERY_SMALL, "--loss", "isogclr"])
    records = [json.loads(s) for s in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    for name in ("loss", "lr", "tau_I", "tau_T", "log_u_I", "v_T", "gamma"):
        assert math.isfinite(records[2][name])
    assert records[2]["gamma"] == 0.8 and records[2]["tau_I"] == pytest.approx(0.05)


def test_other_data_is_refused(run_main, refused_by, tmp_path, monkeypatch):
    """The tables of a run mean the ids of its data."""
    monkeypatch.setattr(common, "balanced_rows", lambda labels, n, seed: torch.arange(n))
    run_main(sogclr_clip.main, "run", VERY_SMALL)
    real = common.shapes  # one caption is another one
    monkeypatch.setattr(common, "shapes", lambda n, seed, renders: (*real(n, seed)[:3], [
        "a cat", *real(n, seed)[3][1:]]))
    refused_by(sogclr_clip.main, VERY_SMALL, "other data", "captions")


def test_torchrun(tmp_path):
    """Two processes on the built-in data end with one checkpoint and better retrieval."""
    done = end(start(["--loss", "isogclr", "--epochs", "3", "--limit-train", "2048", "--threads",
                      "1", "--device", "cpu", "--lr", "3e-3", "--warmup", "20", "--out",
                      str(tmp_path / "run")],
                     torchrun("sogclr_clip.py", "--standalone", "--nproc_per_node=2")))
    assert done.status == 0, done.err
    assert "next         python sogclr_clip.py --evaluate" in done.out
    log = [json.loads(s) for s in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert log[0]["processes"] == 2
    assert log[-1]["mean"] > 4 * log[1]["mean"]  # chance is 0.8 %, as at the start
    assert (tmp_path / "run/retrieval.png").exists()


# ------------------------------------------------------------------ evaluation


def test_ties_and_chance():
    S = torch.tensor([[0.5, 0.5, 0.1], [0.2, 0.2, 0.2]])
    right = torch.tensor([[False, True, False], [False, False, True]])
    assert sogclr_clip.first_hit(S, right).tolist() == [1, 2]  # constant scores give nothing
    assert sogclr_clip.first_hit(S, ~right).tolist() == [0, 0]
    result, chance = sogclr_clip.recall(torch.tensor([0, 3, 9]), torch.tensor([1, 2, 1]), 20, "TR")
    assert result["TR@1"] == pytest.approx(100 / 3) and result["TR@10"] == 100
    expected = (1 / 20 + (1 - 19 * 18 / (20 * 19)) + 1 / 20) / 3
    assert chance["TR@1"] == pytest.approx(100 * expected)
    result, chance = sogclr_clip.recall(torch.tensor([0]), torch.tensor([1]), 3, "IR")
    assert list(result) == ["IR@1", "IR@3", "IR mean"] and chance["IR@3"] == 100  # k = min(k, n)


def test_features_that_are_not_finite():
    x = torch.full((3, 2), math.nan)
    with pytest.raises(common.RunFailed, match="not finite"):
        sogclr_clip.retrieval(x, x, torch.arange(3), torch.arange(3))
    with pytest.raises(common.BadInput, match="no caption"):
        sogclr_clip.retrieval(torch.eye(3), torch.eye(3), torch.arange(3), torch.zeros(3).long())


def test_evaluate_a_checkpoint(run_main, tmp_path, capsys, monkeypatch):
    """The same numbers as the last line of the training's log; JSON and picture."""
    monkeypatch.undo()  # with pictures
    torch.set_num_threads(1)
    sogclr_clip.main([*VERY_SMALL, "--out", str(tmp_path / "run")])
    last = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])
    capsys.readouterr()
    sogclr_clip.main(["--evaluate", str(tmp_path / "run/checkpoint.pt"), "--threads", "1",
                      "--device", "cpu"])
    assert "zero-shot top-1" in capsys.readouterr().out
    found = json.loads((tmp_path / "run/evaluate-shapes.json").read_text())
    assert found["results"] == {k: v for k, v in last.items() if k not in ("step", "seconds")}
    assert found["chance"]["zero-shot top-1"] == pytest.approx(100 / 24)
    assert (tmp_path / "run/evaluate-shapes.png").stat().st_size > 10000
    # the same command may write its file anew, another may not; flags of other data are refused
    again = ["--evaluate", str(tmp_path / "run/checkpoint.pt"), "--device", "cpu", "--threads", "1"]
    before = (tmp_path / "run/evaluate-shapes.json").read_bytes()
    sogclr_clip.main([*again[:2], "--threads", "1", "--device", "cpu"])
    assert (tmp_path / "run/evaluate-shapes.json").read_bytes() == before
    (tmp_path / "run/checkpoint.pt").rename(tmp_path / "run/b.pt")
    (tmp_path / "run/checkpoint.pt").symlink_to(tmp_path / "run/b.pt")
    for argv, words in (([*again, "--mean", "0.1", "0.9", "0.1"], "other flags (--mean [0.5, "),
                        (["--evaluate", str(tmp_path / "run/b.pt"), *again[2:]], "(--evaluate "),
                        ([*again, "--data-dir", "x"], "--data-dir is not used by --dataset shapes"),
                        ([*again, "--image-root", "x"], "--image-root is not used by --dataset"),
                        ([*again, "--recipe", "flickr8k", "--data-dir", "x"], "flickr8k/test_ret")):
        with pytest.raises(SystemExit) as stopped:
            sogclr_clip.main(argv)
        line = capsys.readouterr().err
        assert stopped.value.code == 2 and words in line, line
    assert (tmp_path / "run/evaluate-shapes.json").read_bytes() == before


def test_published_weights_bring_their_mean_and_std(monkeypatch):
    """Not those of OpenAI's CLIP, unless they are given."""
    import open_clip

    def create_model(name, tag, **options):  # without the download
        clip = make(name, **options)
        if tag:
            open_clip.set_model_preprocess_cfg(clip, dict(mean=(0.1, 0.2, 0.3), std=(1, 1, 1)))
        return clip

    make = open_clip.create_model
    monkeypatch.setattr(open_clip, "create_model", create_model)
    for tag, argv, mean in (("x", [], [0.1, 0.2, 0.3]), (None, [], None),
                            ("x", ["--mean", "1", "0", "1"], [1, 0, 1])):
        args = flags("--model", "ViT-S-32-alt", "--image-size", "64", *argv)
        args.pretrained = tag
        sogclr_clip.towers(args)
        assert args.mean == mean and (args.std is None) == (tag is None)


class Means(nn.Module):
    """Stands in for the towers: features are the mean colour, or what the tokens add up to."""

    def __init__(self, zero=False):
        super().__init__()
        self.zero = zero

    def forward(self, images, tokens=None):
        if images is not None:
            x = images.mean((2, 3))
            return x * (torch.arange(len(x)) > 2)[:, None] if self.zero else x, None
        return None, F.normalize(F.one_hot(tokens.long().sum(1) % 3, 3) + 0.1, dim=1)


def shapes_test_set(*argv):
    """Towers' tokenizer, data and pairs of 40 shapes."""
    args = flags("--model", "tiny-vit", *argv)
    images, columns, classes, texts = common.shapes(40, 0)
    table = common.Table(columns, classes, images, captions=texts)
    data = common.Data(table, table, args, torch.device("cpu"))
    tokenizer = sogclr_clip.towers(args)[1]
    return tokenizer, data, sogclr_clip.Pairs(table, tokenizer, "cpu")


def test_zero_shot_with_the_statistics_of_its_data():
    """--zs-original: those of the data set, for zero-shot only; else those of the training."""
    found = {}
    for name, more in dict(own=["--zs-original"], trained=[], plain=None).items():
        other = [] if more is None else ["--mean", "0.9", "0.1", "0.5", "--std", "1", "1", "1"]
        tokenizer, data, pairs = shapes_test_set(*other, *(more or []))
        found[name] = sogclr_clip.evaluate_clip(Means(), tokenizer, data, pairs)[0]
    zero_shot = {k for k in found["own"] if k.startswith("zero-shot")}
    assert zero_shot == {"zero-shot top-1", "zero-shot top-5"}
    for k in found["own"]:
        same = found["plain"] if k in zero_shot else found["trained"]
        assert found["own"][k] == same[k]
    assert any(found["own"][k] != found["trained"][k] for k in zero_shot)
    assert found["own"]["mean"] != found["plain"]["mean"]


@pytest.mark.parametrize("tower", ["image", "text"])
def test_zero_shot_of_a_tower_that_is_not_finite(tower):
    """Without captions nothing but the features themselves can tell."""
    tokenizer, data, _ = shapes_test_set()

    class Broken(Means):
        def forward(self, images, tokens=None):
            return [x if x is None or (tower == "image") == (images is None) else x * math.nan
                    for x in super().forward(images, tokens)]

    with pytest.raises(common.RunFailed, match="not finite: "):
        sogclr_clip.evaluate_clip(Broken(), tokenizer, data, None)


def test_braces_in_templates(tmp_path):
    """Only {} stands for the class; the text of an evaluation holds the others as they are."""
    names = tmp_path / "names.txt"
    names.write_text("\n".join(["a photo of {} {0} {word} }{", "{",
                                *(f"class {{{i}" for i in range(23))]))
    tokenizer, data, _ = shapes_test_set("--class-names", str(names))
    seen = []
    sogclr_clip.evaluate_clip(Means(), lambda texts: seen.extend(texts) or tokenizer(texts), data,
                              None, prepare=str)
    assert seen[:2] == ["a photo of { {0} {word} }{", "a photo of class {0 {0} {word} }{"]


@pytest.mark.parametrize("argv", [["--class-names", "no-such-file"], ["--zs-original"]])
def test_zero_shot_flags_need_labels(argv):
    """Without labels there is no zero-shot test, so these flags would do nothing."""
    tokenizer, data, pairs = shapes_test_set(*argv)
    data.test.columns.pop("label")
    with pytest.raises(common.BadInput, match=f"{argv[0]} is for labels: the test images have no"):
        sogclr_clip.evaluate_clip(Means(), tokenizer, data, pairs)


def test_class_names_for_labels_that_have_none(tmp_path):
    """--class-names gives names to a column that has only ids: the accuracy is the same."""
    tokenizer, data, pairs = shapes_test_set()
    names = data.test.classes["label"]
    expected = sogclr_clip.evaluate_clip(Means(), tokenizer, data, pairs)[0]
    (tmp_path / "names.txt").write_text("\n".join(names))
    tokenizer, data, pairs = shapes_test_set("--class-names", str(tmp_path / "names.txt"))
    data.test.columns["label"][0] = len(names) - 1  # the highest id tells how many there are
    first = sogclr_clip.evaluate_clip(Means(), tokenizer, data, pairs)[0]
    data.test.classes.pop("label")
    assert sogclr_clip.evaluate_clip(Means(), tokenizer, data, pairs)[0] == first
    assert first.keys() == expected.keys() and "zero-shot top-1" in first


def test_features_that_are_zero_are_told_once(capsys):
    tokenizer, data, pairs = shapes_test_set()
    for _ in range(2):
        sogclr_clip.evaluate_clip(Means(zero=True), tokenizer, data, pairs)
    assert capsys.readouterr().out == (
        "warning: the features of 3 images and 0 captions are zero\n")
    _, data, _ = shapes_test_set()
    sogclr_clip.evaluate_clip(Means(), tokenizer, data, pairs)
    assert not capsys.readouterr().out


def test_evaluate_on_another_data_set(run_main, tmp_path):
    """Images keep the statistics of the training, unless others are asked for."""
    path = tmp_path / "run/checkpoint.pt"
    run_main(sogclr_clip.main, "run", [*VERY_SMALL, "--mean", "0.4", "0.4", "0.4"])
    checkpoint = torch.load(path, weights_only=True)
    for name, old in (("shapes", [0.4] * 3), ("cifar100", [0.4] * 3), ("cifar100", None)):
        checkpoint["args"].update(dataset=name, mean=old)
        torch.save(checkpoint, path)
        (tmp_path / "run/evaluate-shapes.json").unlink(missing_ok=True)
        sogclr_clip.main(["--evaluate", str(path), "--dataset", "shapes", "--device", "cpu"])
        args = json.loads((tmp_path / "run/evaluate-shapes.json").read_text())["args"]
        mean, std = common.MEAN_STD[name]
        assert args["mean"] == (old or list(mean)) and args["std"] == list(std)


def test_evaluate_weights_of_open_clip(tmp_path, capsys, captions):
    """A file of weights as open_clip writes them, on captions, by the same command."""
    import open_clip

    torch.manual_seed(0)
    model = open_clip.create_model("ViT-S-32-alt", force_image_size=64)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    argv = ["--dataset", "captions", "--data-dir", str(captions), "--test-file", "test.json",
            "--threads", "1", "--device", "cpu", "--workers", "0", "--image-size", "64"]
    sogclr_clip.main(["--evaluate", f"openclip:ViT-S-32-alt/{tmp_path}/weights.pt", *argv, "--out",
                      str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert "TR@1" in out and "chance" in out and "zero-shot" not in out
    found = json.loads((tmp_path / "out/evaluate-captions.json").read_text())
    assert found["args"]["model"] == "ViT-S-32-alt" and found["results"]["IR@8"] == 100


# ------------------------------------------------------------------ captions


@pytest.fixture
def captions(tmp_path):
    """8 images, one to three captions each: train.json a row a caption, test.json one an image."""
    root, rows, whole = tmp_path / "captions", [], []
    for i in range(8):
        write_image(root / f"images/{i}.png", i, height=20 + i, width=24)
        texts = [f"Caption {j} of image {i}." for j in range(1 + i % 3)]
        rows += [dict(image=f"images/{i}.png", caption=t, image_id=f"id {i}") for t in texts]
        whole.append(dict(image=f"images/{i}.png", caption=texts))
    (root / "train.json").write_text(json.dumps(rows))
    (root / "test.json").write_text(json.dumps(whole))
    return root


@pytest.mark.parametrize(("vocabulary", "bytes_a_token"), [(49408, 2), (65536, 2), (70000, 4)])
def test_tokens_are_kept_at_their_length(vocabulary, bytes_a_token):
    """Exactly the tokens that the tokenizer gave, zeros inside a row too, in 2 bytes each."""
    g = torch.Generator().manual_seed(0)
    parts = [torch.randint(1, vocabulary, (n, 9), generator=g) for n in (4, 3)]
    parts[1][0, 0] = vocabulary - 1
    for x in parts:
        x[:, 5:], x[1], x[2, 2], x[2, 8] = 0, 0, 0, 7
    tokens, whole = sogclr_clip.Tokens(iter(parts), "cpu"), torch.cat(parts)
    assert torch.equal(tokens[:], whole.int()) and tokens[:1].dtype == torch.int32
    rows = torch.tensor([6, 2, 2, 0])
    assert torch.equal(tokens[rows], whole[rows].int())
    assert tokens.flat.element_size() == bytes_a_token and len(tokens.flat) == 19 + 14


def test_equal_captions_have_one_id_in_order_of_appearance(monkeypatch):
    texts = ["b", "a", "b", "c", "a", "A"] * 5000  # three blocks
    table = common.Table(dict(label=torch.zeros(30000, dtype=torch.long)), {},
                         torch.zeros(30000, 1), captions=texts)
    pairs = sogclr_clip.Pairs(table, lambda x: torch.ones(len(x), 2), "cpu")
    assert pairs.text.tolist() == [0, 1, 0, 2, 1, 1] * 5000 and pairs.distinct == 3
    joined = "\n".join(t.lower() for t in texts).encode()
    assert pairs.crc == zlib.crc32(joined + torch.arange(30000).numpy().tobytes())


def test_ids_of_captions(captions):
    """p counts images in order of first appearance, q is the row; the same from all formats."""
    args = SimpleNamespace(image_size=16)
    tokenizer = sogclr_clip.towers(flags("--model", "tiny-vit"))[1]
    rows = json.loads((captions / "train.json").read_text())
    rows = rows[3:] + rows[:3]  # image 2 comes first
    (captions / "train.json").write_text(json.dumps(rows))
    (captions / "train.tsv").write_text("filepath\ttitle\timage_id\n" + "".join(
        f"{r['image']}\t{r['caption']}\t{r['image_id']}\n" for r in rows))
    for file in ("train.json", "train.tsv"):
        table = common.captions_table(captions, file)
        pairs = sogclr_clip.Pairs(table, tokenizer, "cpu")
        assert pairs.p.tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 3, 4, 5, 5, 6, 7, 7]
        assert (pairs.N_I, pairs.N_T) == (8, 15) and pairs.caption(0) == "caption 0 of image 2"
        assert pairs.images.tolist() == [0, 3, 4, 6, 9, 10, 12, 13]
        assert pairs.text.tolist() == list(range(15)) and args
    test = sogclr_clip.Pairs(common.captions_table(captions, "test.json"), tokenizer, "cpu")
    assert test.p.tolist() == [0, 1, 1, 2, 2, 2, 3, 4, 4, 5, 5, 5, 6, 7, 7]


def test_randaugment_of_captions(captions):
    """Only workers do it, so the training images of a small set are not decoded at the start."""
    argv = ["--dataset", "captions", "--data-dir", str(captions), "--train-file", "train.json",
            "--test-file", "test.json", "--batch-size", "6", "--workers", "0"]
    for more, there in ([], True), (["--randaugment", "2", "9"], False), (
            ["--randaugment", "0", "0"], True):
        data = common.load(flags(*argv, *more), torch.device("cpu"))
        for table in (data.train, data.test):
            sogclr_clip.in_memory(data, table)
        assert (data.train.images is not None) == there and data.test.images is not None


@pytest.mark.parametrize("in_memory", [True, False])
def test_train_on_captions(captions, tmp_path, monkeypatch, in_memory):
    """Image of every row of a batch, from memory and from workers; then a whole run."""
    argv = [*BASE, "--dataset", "captions", "--data-dir", str(captions), "--train-file",
            "train.json", "--test-file", "test.json", "--model", "tiny-vit", "--batch-size", "6",
            "--epochs", "1", "--workers", "0", "--mask-repeats", "--out", str(tmp_path / "run")]
    if not in_memory:
        monkeypatch.setattr(sogclr_clip, "in_memory", lambda *args: None)
    seen, real = [], common.augment

    def augment(batch):
        x = batch.images
        assert (x.amax((2, 3)) == x.amin((2, 3))).all()  # images of one colour stay so
        seen.extend(zip(batch.rows.tolist(), x[:, 0, 0, 0].tolist(), strict=True))
        return real(batch)

    monkeypatch.setattr(common, "augment", augment)
    monkeypatch.setattr(common, "views_picture", lambda *args: None)
    sogclr_clip.main(argv)
    owner = [0, 1, 1, 2, 2, 2, 3, 4, 4, 5, 5, 5, 6, 7, 7]
    assert len(seen) == 12 and all(number == owner[row] for row, number in seen)

    # an evaluation of the checkpoint reads the test images as the training's own evaluations do
    read = []
    monkeypatch.setattr(sogclr_clip, "in_memory", lambda data, x: read.append(x is data.test))
    moved = captions.rename(tmp_path / "moved")  # may change, the data set not
    sogclr_clip.main([*BASE, "--evaluate", str(tmp_path / "run/checkpoint.pt"), "--data-dir",
                      str(moved)])
    found = json.loads((tmp_path / "run/evaluate-captions.json").read_text())["results"]
    last = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])
    assert read == [True]
    assert found == {k: v for k, v in last.items() if k not in ("step", "seconds")}


def test_image_files_without_captions_are_refused(refused_by, tmp_path):
    write_folder(tmp_path / "data", {f"{part}/{c}": 2 for part in ("train", "val") for c in "ab"})
    refused_by(sogclr_clip.main, ["--device", "cpu", "--dataset", "folder", "--data-dir",
                                  tmp_path / "data", "--batch-size", "2"], "has no captions",
               says=["recipe own"])


def test_retrieval_of_repeated_captions():
    """Without image ids equal captions are one text, right for all images that have it."""
    args = flags("--model", "tiny-vit")
    images, columns, classes, texts = common.shapes(8, 0)
    texts[3] = texts[0]
    table = common.Table(columns, classes, images, captions=texts)
    data = common.Data(table, table, args, torch.device("cpu"))
    clip, tokenizer = sogclr_clip.towers(args)
    pairs = sogclr_clip.Pairs(table, tokenizer, "cpu")
    _, chance, found = sogclr_clip.evaluate_clip(sogclr_clip.Towers(clip), tokenizer, data, pairs)
    X, Y, image_group, text_group, rows = found
    assert len(X) == 8 and len(Y) == 7 and image_group[3] == image_group[0] == text_group[0]
    assert rows.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert chance["IR@1"] == pytest.approx(100 * (2 + 6) / 8 / 7)


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))


GOOD = dict(image="images/0.png", caption="a cat", image_id=1)


@pytest.mark.parametrize(("entries", "words"), [
    ([], ["has no entry"]),
    ({"a": 1}, ["JSON dict, not a list"]),
    ([GOOD, "images/0.png"], ["entry 1", "is a str"]),
    ([GOOD, dict(image="images/1.png")], ["entry 1", "'caption'"]),
    ([GOOD, dict(caption="x")], ["entry 1", "'image'"]),
    ([dict(GOOD, caption=7)], ["entry 0", "'caption'", "7"]),
    ([dict(GOOD, caption=[])], ["entry 0", "'caption'"]),
    ([dict(GOOD, image=3)], ["entry 0", "'image', a path"]),
    ([GOOD, dict(GOOD, image="images/1.png")], ["entry 1", "image_id 1", "entry 0"]),
    ([GOOD, dict(image="images/none.png", caption="x")], ["1 of 2 captions dropped", "none.png"]),
    ([GOOD, dict(image="images/1.png", caption="  ")], ["1 of 2 captions dropped", "empty"]),
    ([dict(GOOD, image="../secret.png")], ["row 0", "leaves the data folder"]),
    ("[1, 2", ["cannot be read"]),
], ids=lambda x: None if isinstance(x, list) and x and isinstance(x[0], str) else "")
def test_bad_caption_files(refused_by, captions, entries, words):
    write(captions / "train.json", entries)
    refused_by(sogclr_clip.main, ["--device", "cpu", "--dataset", "captions", "--data-dir",
                                  captions, "--train-file", "train.json", "--test-file",
                                  "test.json", "--batch-size", "4"], "train.json", *words)


@pytest.mark.parametrize(("argv", "words"), [
    ("--dataset captions", ["--test-file"]),
    ("--dataset captions --test-file none.json", ["none.json", "not found"]),
    ("--dataset cifar10 --data-dir none", ["cifar10"]),
    ("--loss clip --gamma 0.5", ["--gamma", "--loss clip"]),
    ("--loss vicreg --tau 0.5", ["--tau", "none of them"]),
    ("--loss isogclr --tau-bounds 0.5 0.1", ["--tau-bounds 0.5 0.1"]),
    ("--loss isogclr --tau-bounds 0.1 0.5 --tau 0.05", ["--tau 0.05", "--tau-bounds"]),
    ("--loss sogclr --gamma 0", ["--gamma must be above 0, got 0"]),
    ("--loss sogclr --gamma 1.5", ["--gamma must be in [0, 1], got 1.5"]),
    ("--loss sogclr --tau -1", ["--tau must be above 0"]),
    ("--loss sogclr-mine --lambda-mi 2", ["--lambda-mi must be in [0, 1], got 2"]),
    ("--warmup -1", ["--warmup"]),
    ("--loss nothing", ["nothing"]),
    ("--model ViT-Z", ["--model ViT-Z"]),
    ("--pretrained none.pt", ["none.pt"]),
    ("--pretrained openai", ["--pretrained openai", "tiny-resnet"]),
    ("--evaluate openclip:tiny-vit/openai", ["--pretrained openai", "tiny-vit"]),
    ("--batch-size 1", ["--batch-size 1"]),
    ("--optimizer lars", ["lars"]),
    ("--evaluate none.pt", ["none.pt"]),
    ("--evaluate openclip:ViT-Z/x", ["ViT-Z"]),
])
def test_bad_flags(refused_by, argv, words):
    refused_by(sogclr_clip.main, ["--device", "cpu", *argv.split()], *words)


def test_original_names_of_the_losses():
    for old, new in (("isogclr_new", "isogclr"), ("sogclr_mine", "sogclr-mine"),
                     ("isogclr_new_v2", "isogclr-v2"), ("sogclr_dro", "sogclr-dro")):
        assert flags("--loss", old).loss == new

"""sogclr_clip.py: world size, resume, variants, state, evaluation, data and bad input. The vectors
of the authors' code are in test_golden.py."""
import json
import math
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

    def __init__(self, unit):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text, self.unit = nn.Linear(5, D), nn.Linear(4, D), unit
        self.double()

    def forward(self, images, tokens):
        out = self.image(images).tanh(), self.text(tokens)
        return [F.normalize(y, dim=1) if self.unit else y for y in out]


VARIANTS = {name: ["--loss", name] for name in sogclr_clip.LOSSES} | {
    "clip-global": ["--loss", "clip", "--learn-tau", "global"],
    "clip-sample": ["--loss", "clip", "--learn-tau", "sample"],
    "mine": ["--loss", "sogclr-mine", "--lambda-mi", "0.3"],
    "cosine": ["--loss", "isogclr", "--gamma-schedule", "cosine", "--eta", "0.01"],
    "repeats": ["--loss", "sogclr", "--mask-repeats"],
    "clip-repeats": ["--loss", "siglip", "--mask-repeats"],
}


def steps(name):
    """Losses, gradients and state of three steps in two epochs, as `train` makes them."""
    args = flags(*VARIANTS[name])
    model = Toy(args.loss != "vicreg")
    network = common.ddp(model, args)
    objective = sogclr_clip.Objective(args, SimpleNamespace(N_I=N_I, N_T=N_T, crc=0), D).double()
    own, found = own_rows(B), []
    for step in range(3):
        p, q = P[step][own], Q[step][own]
        x, t = network(normal(B, 5, seed=10 + step)[own], normal(B, 4, seed=20 + step)[own])
        same = sogclr_clip.repeats(p, q % 7) if args.mask_repeats else None
        loss, stats = objective(x, t, p, q, torch.arange(B)[own], step, step // 2, same)
        network.zero_grad(set_to_none=True)
        objective.zero_grad(set_to_none=True)
        value = common.finite(loss, step)
        objective.update()
        loss.backward()
        objective.average_gradients()
        both = [*model.named_parameters(), *objective.named_parameters()]
        state = {k: v.clone() for k, v in objective.state_dict().items() if torch.is_tensor(v)}
        found.append(dict(loss=value, stats=common.means(stats), state=state,
                          grad={n: x.grad.clone() for n, x in both}))
    return found


def case_losses(folder):
    return {name: steps(name) for name in VARIANTS}


def case_dropped(folder):
    """A gather that keeps the own rows' gradient only: the test must see it."""
    def dropping(x, dim=0):
        parts = [torch.empty_like(x) for _ in range(common.world())]
        torch.distributed.all_gather(parts, x.detach().contiguous())
        parts[common.rank()] = x
        return torch.cat(parts, dim)

    if common.world() == 1:
        return None
    with mock.patch.object(common, "gather", dropping):
        return steps("sogclr")


CASES = {name.removeprefix("case_"): case for name, case in list(globals().items())
         if name.startswith("case_")}
results = ranks.pool(__name__)


@many
@pytest.mark.parametrize("name", VARIANTS)
def test_number_of_ranks_changes_nothing(results, N, name):
    """Loss, statistics, gradients of towers, temperatures and networks, every table; on all ranks.
    """
    one = results[1][0]["losses"][name]
    for rank in results[N]:
        for a, b in zip(one, rank["losses"][name], strict=True):
            assert abs(a["loss"] - b["loss"]) < 1e-10
            assert a["stats"] == pytest.approx(b["stats"], rel=1e-10, abs=1e-10)
            for part in ("grad", "state"):
                assert a[part].keys() == b[part].keys()
                for key in a[part]:
                    close(a[part][key], b[part][key])


@many
@pytest.mark.parametrize("name", VARIANTS)
def test_tables_are_equal_on_all_ranks(results, N, name):
    first, *others = ([step["state"] for step in rank["losses"][name]] for rank in results[N])
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert all(torch.equal(a[k], b[k]) for k in a)


@many
def test_the_test_sees_a_gather_that_drops_gradients(results, N):
    one, dropped = results[1][0]["losses"]["sogclr"][0], results[N][0]["dropped"][0]
    assert (one["grad"]["image.weight"] - dropped["grad"]["image.weight"]).abs().max() > 1e-4


# ------------------------------------------------------------------ state


def table(N=5, **initial):
    return sogclr_clip.Table(N, **(initial or dict(log_u=-math.inf))).double()


@pytest.mark.parametrize("bad", [-1, 5, 10 ** 9])
def test_an_id_out_of_range_is_an_error(bad):
    t = table()
    with pytest.raises(IndexError, match=rf"id {bad} is not in \[0, 5\)"):
        t[torch.tensor([0, bad])]
    assert (t.log_u == -math.inf).all()


def test_the_last_row_of_an_id_counts():
    t = table(log_u=-math.inf, b=0)
    t.write(torch.tensor([3, 1, 3, 0]), dict(log_u=torch.tensor([1.0, 2.0, 3.0, 4.0]).double()))
    assert t.log_u.tolist() == [4.0, 2.0, -math.inf, 3.0, -math.inf] and not t.b.any()


def run_steps(args, batches, objective=None):
    """Feed (epoch, p, q) of fixed random features to an objective; it and the last loss."""
    objective = objective or sogclr_clip.Objective(
        args, SimpleNamespace(N_I=N_I, N_T=N_T, crc=0), D).double()
    for step, (epoch, p, q) in enumerate(batches):
        x, t = (F.normalize(normal(len(p), D, seed=s + step), dim=1) for s in (30, 60))
        loss, _ = objective(x, t, torch.tensor(p), torch.tensor(q), torch.arange(len(p)), step,
                            epoch)
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


def test_u_does_not_depend_on_the_batch_size():
    """Equal negatives: u is a mean, so more of them change nothing."""
    own = torch.arange(2)
    for B in (4, 40):
        S = torch.full((2, B), 0.3, dtype=torch.float64)
        S[own, own] = 0.5
        _, log_u, b = sogclr_clip.sogclr(
            sogclr_clip.difference(S, own), sogclr_clip.negatives(own, B),
            torch.full((2,), -math.inf).double(), torch.zeros(2).double(), 0.1, 1.0)
        close(log_u, torch.full((2,), -2.0).double())


def test_gamma_1_without_floor_is_the_mini_batch_loss():
    """Gradient of tau log mean e^(D/tau), by autograd."""
    x, t = (F.normalize(normal(6, D, seed=s), dim=1).requires_grad_() for s in (1, 2))
    own = torch.arange(6)
    negative = sogclr_clip.negatives(own, 6)
    D_ij = sogclr_clip.difference(x @ t.T, own)
    L, *_ = sogclr_clip.sogclr(D_ij, negative, normal(6), normal(6).abs(), 0.07, 1.0, eps=0)
    found = torch.autograd.grad(L, (x, t), retain_graph=True)
    exact = 0.07 * (D_ij / 0.07).masked_fill(~negative, -math.inf).logsumexp(1).mean()
    for a, b in zip(found, torch.autograd.grad(exact, (x, t)), strict=True):
        close(a, b)


def test_all_negatives_equal_to_the_positive():
    x = F.normalize(torch.ones(4, D, dtype=torch.float64), dim=1).requires_grad_()
    own = torch.arange(4)
    L, log_u, _ = sogclr_clip.sogclr(
        sogclr_clip.difference(x @ x.T, own), sogclr_clip.negatives(own, 4),
        torch.full((4,), -math.inf).double(), torch.zeros(4).double(), 0.01, 1.0)
    L.backward()
    close(L, torch.zeros_like(L))
    close(log_u, torch.zeros(4).double())
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("loss", ["sogclr", "isogclr", "isogclr-v2", "sogclr-mine", "fastclip"])
def test_float32_at_a_temperature_of_0_005(loss):
    """Un-shifted logits up to 200: e^z is not a float32 number, its logarithm is."""
    args = flags("--loss", loss, "--tau", "0.005")
    objective = sogclr_clip.Objective(args, SimpleNamespace(N_I=N_I, N_T=N_T, crc=0), D)
    for step in range(4):
        x = F.normalize(normal(4, D, seed=step), dim=1).float().requires_grad_()
        L, _ = objective(x, x + 1e-3, torch.arange(4), torch.arange(4), torch.arange(4), step, step)
        L.backward()
        objective.update()
        assert x.grad.isfinite().all() and objective.I.log_u[:4].isfinite().all()
        if loss.startswith("iso"):
            low, high = args.tau_bounds
            assert ((objective.I.tau >= low) & (objective.I.tau <= high)).all()


def test_the_floor_of_infosogclr():
    """(E27): with u = g of the whole data set the weights are those of its InfoNCE."""
    own, N = torch.arange(7), 7
    S = normal(7, 7, seed=3).clamp(-1, 1).requires_grad_()
    negative = sogclr_clip.negatives(own, 7)
    L, _ = sogclr_clip.info_sogclr(sogclr_clip.difference(S, own), negative,
                                   torch.full((7,), -math.inf).double(), 0.2, 1.0, 1 / (N - 1))
    found, = torch.autograd.grad(L, S)
    exact, = torch.autograd.grad(0.2 * F.cross_entropy(S / 0.2, own), S)
    close(found, exact)


def test_infosogclr_takes_its_floor_from_the_data():
    """The glue of (E27): N texts for an image, N images for a text."""
    args = flags("--loss", "sogclr-mine", "--tau", "0.1")
    _, loss = run_steps(args, [(0, [0, 1, 2], [0, 1, 2])])
    x, t = (F.normalize(normal(3, D, seed=s), dim=1) for s in (30, 60))
    own, never = torch.arange(3), torch.full((3,), -math.inf).double()
    expected = sum(sogclr_clip.info_sogclr(
        sogclr_clip.difference(S, own), sogclr_clip.negatives(own, 3), never, 0.1, 1.0,
        1 / (N - 1))[0] for S, N in ((x @ t.T, N_T), (t @ x.T, N_I)))
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
    assert objective.bank_rows(objective.I, torch.tensor([1, 4]), 7).tolist() == [0, 2, 3, 5]
    many = sogclr_clip.Table(5000, log_u=0)
    rows = objective.bank_rows(many, torch.arange(2500), 7)
    assert rows.min() >= 2500 and 300 < len(rows) == len(rows.unique()) < 600
    assert not torch.equal(rows, objective.bank_rows(many, torch.arange(2500), 8))


NEGATIVES = sorted(set(sogclr_clip.LOSSES) - {"vicreg", "cyclip", "hybrid"})


@pytest.mark.parametrize("loss", NEGATIVES)
def test_repeats_are_no_negatives(loss):
    """With x_i = e_i, component i of t_j is S_ij: its gradient is 0 just where j repeats i."""
    p, text = torch.tensor([0, 0, 1, 2]), torch.tensor([5, 6, 6, 7])
    same = sogclr_clip.repeats(p, text)
    assert same.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    objective = sogclr_clip.Objective(flags("--loss", loss), SimpleNamespace(
        N_I=N_I, N_T=N_T, crc=0), D).double().eval()
    t = (0.1 * normal(4, D)).requires_grad_()
    L, _ = objective(torch.eye(4, D).double(), t, p, torch.arange(4), torch.arange(4), 1, 0, same)
    grad, = torch.autograd.grad(L, t)
    assert torch.equal(grad.T[:4] != 0, ~same | torch.eye(4, dtype=torch.bool))


@pytest.mark.parametrize("loss", ["sogclr", "vicreg", "siglip"])
def test_features_that_are_not_finite_stop_the_run(loss):
    """The tower, the step, and how many rows of which rank."""
    objective = sogclr_clip.Objective(flags("--loss", loss), SimpleNamespace(
        N_I=N_I, N_T=N_T, crc=0), D).double()
    x, t = normal(4, D, seed=1), normal(4, D, seed=2)
    t[1, 0], t[3, 2] = math.nan, math.inf
    with pytest.raises(common.RunFailed, match=r"text_tower .* step 7, in 2 of 4 .* rank: \[2\]"):
        objective(x, t, torch.arange(4), torch.arange(4), torch.arange(4), 7, 0)
    assert (torch.cat([v for k, v in objective.state_dict().items() if k.endswith("log_u")] or [
        torch.tensor([-math.inf])]) == -math.inf).all()


def test_a_batch_without_negatives():
    with pytest.raises(ValueError, match="at least 2 pairs"):
        sogclr_clip.negatives(torch.arange(1), 1)
    with pytest.raises(ValueError, match="no negative"):
        sogclr_clip.negatives(torch.arange(2), 2, torch.ones(2, 2, dtype=torch.bool))


# ------------------------------------------------------------------ agreement with open_clip


def test_clip_and_siglip_are_those_of_open_clip():
    import open_clip.loss

    x, t = (F.normalize(normal(9, D, seed=s).float(), dim=1) for s in (1, 2))
    own, scale = torch.arange(9), torch.tensor(14.3)
    negative = sogclr_clip.negatives(own, 9)
    ours = (sogclr_clip.clip(x @ t.T, own, negative, 1 / scale)
            + sogclr_clip.clip(t @ x.T, own, negative, 1 / scale)) / 2
    assert abs(ours - open_clip.loss.ClipLoss()(x, t, scale)) < 1e-6
    ours = sogclr_clip.siglip(x @ t.T, own, negative, scale, torch.tensor(-10.0))
    assert abs(ours - open_clip.loss.SigLipLoss()(x, t, scale, torch.tensor(-10.0))) < 1e-6


def test_open_clip_loads_a_trained_checkpoint(run_main, tmp_path):
    """Strictly, into open_clip's own class; and `--pretrained` takes the file, too."""
    import open_clip

    run_main(sogclr_clip.main, "run", VERY_SMALL)
    path = tmp_path / "run/checkpoint.pt"
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
              "1"]


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
    goes_on_exactly(sogclr_clip.main, [*SMALL, "--model", "tiny-vit", "--knn-every", "9",
                                       "--save-every", "9", "--loss", *argv])


def test_the_log_has_means_over_the_ranks(run_main, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "means", lambda values: dict.fromkeys(values, 7.0))
    run_main(sogclr_clip.main, "run", [*VERY_SMALL, "--loss", "isogclr"])
    records = [json.loads(s) for s in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert all(records[2][name] == 7.0 for name in ("tau_I", "tau_T", "log_u_I", "v_T", "gamma"))


def test_other_data_is_refused(run_main, refused_by, tmp_path, monkeypatch):
    """The tables of a run mean the ids of its data."""
    monkeypatch.setattr(common, "balanced_rows", lambda labels, n, seed: torch.arange(n))
    run_main(sogclr_clip.main, "run", VERY_SMALL)
    real = common.shapes  # one caption is another one
    monkeypatch.setattr(common, "shapes", lambda n, seed, renders: (*real(n, seed)[:3], [
        "a cat", *real(n, seed)[3][1:]]))
    refused_by(sogclr_clip.main, VERY_SMALL, "checkpoint.pt", "other data")


def test_torchrun(tmp_path):
    """Two processes on the built-in data end with one checkpoint and better retrieval."""
    done = end(start(["--loss", "isogclr", "--epochs", "3", "--limit-train", "2048", "--threads",
                      "1", "--device", "cpu", "--lr", "3e-3", "--out", str(tmp_path / "run")],
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
    assert found["results"] == {k: v for k, v in last.items() if k != "step"}
    assert found["chance"]["zero-shot top-1"] == pytest.approx(100 / 24)
    assert (tmp_path / "run/evaluate-shapes.png").stat().st_size > 10000


class Means(nn.Module):
    """Stands in for the towers: features are the mean colour, or what the tokens add up to."""

    def __init__(self, zero=False):
        super().__init__()
        self.zero = zero

    def forward(self, images=None, tokens=None):
        if images is not None:
            x = images.mean((2, 3))
            return [x * (torch.arange(len(x)) > 2)[:, None] if self.zero else x]
        return [F.normalize(F.one_hot(tokens.long().sum(1) % 3, 3) + 0.1, dim=1)]


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
        found[name] = sogclr_clip.scores(Means(), tokenizer, data, pairs)[0]
    zero_shot = {k for k in found["own"] if k.startswith("zero-shot")}
    assert zero_shot == {"zero-shot top-1", "zero-shot top-5"}
    for k in found["own"]:
        same = found["plain"] if k in zero_shot else found["trained"]
        assert found["own"][k] == same[k]
    assert any(found["own"][k] != found["trained"][k] for k in zero_shot)
    assert found["own"]["mean"] != found["plain"]["mean"]


def test_features_that_are_zero_are_told_once(capsys):
    tokenizer, data, pairs = shapes_test_set()
    for _ in range(2):
        sogclr_clip.scores(Means(zero=True), tokenizer, data, pairs)
    assert capsys.readouterr().out == "warning: 3 features of images, 0 of captions are zero\n"
    _, data, _ = shapes_test_set()
    sogclr_clip.scores(Means(), tokenizer, data, pairs)
    assert not capsys.readouterr().out


def test_evaluate_on_another_data_set(run_main, tmp_path):
    """Images keep the statistics of the training, unless others are asked for."""
    path = tmp_path / "run/checkpoint.pt"
    run_main(sogclr_clip.main, "run", [*VERY_SMALL, "--mean", "0.4", "0.4", "0.4"])
    checkpoint = torch.load(path, weights_only=True)
    for name, old in (("shapes", [0.4] * 3), ("cifar100", [0.4] * 3), ("cifar100", None)):
        checkpoint["args"].update(dataset=name, mean=old)
        torch.save(checkpoint, path)
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
        assert (pairs.N_I, pairs.N_T) == (8, 15) and pairs.captions[0] == "caption 0 of image 2"
        assert pairs.images.tolist() == [0, 3, 4, 6, 9, 10, 12, 13]
        assert pairs.text.tolist() == list(range(15)) and args
    test = sogclr_clip.Pairs(common.captions_table(captions, "test.json"), tokenizer, "cpu")
    assert test.p.tolist() == [0, 1, 1, 2, 2, 2, 3, 4, 4, 5, 5, 5, 6, 7, 7]


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
    assert read == [True] and found == {k: v for k, v in last.items() if k != "step"}


def test_image_files_without_captions_are_refused(refused_by, tmp_path):
    write_folder(tmp_path / "data", {f"{part}/{c}": 2 for part in ("train", "val") for c in "ab"})
    refused_by(sogclr_clip.main, ["--device", "cpu", "--dataset", "folder", "--data-dir",
                                  tmp_path / "data", "--batch-size", "2"], "has no captions")


def test_retrieval_of_repeated_captions():
    """Without image ids equal captions are one text, right for all images that have it."""
    args = flags("--model", "tiny-vit")
    images, columns, classes, texts = common.shapes(8, 0)
    texts[3] = texts[0]
    table = common.Table(columns, classes, images, captions=texts)
    data = common.Data(table, table, args, torch.device("cpu"))
    clip, tokenizer = sogclr_clip.towers(args)
    pairs = sogclr_clip.Pairs(table, tokenizer, "cpu")
    _, chance, found = sogclr_clip.scores(sogclr_clip.Towers(clip), tokenizer, data, pairs)
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
    ([GOOD, dict(image="images/1.png")], ["entry 1", "no key 'caption'"]),
    ([GOOD, dict(caption="x")], ["entry 1", "no key 'image'"]),
    ([dict(GOOD, caption=7)], ["entry 0", "caption is neither"]),
    ([dict(GOOD, caption=[])], ["entry 0", "no caption"]),
    ([dict(GOOD, image=3)], ["entry 0", "not a path"]),
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

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
from ranks import close, many, normal, own_rows
from torch import nn

import common
import sogclr_clip

B, D, N_I, N_T = 8, 6, 12, 20
P = torch.tensor([[0, 1, 2, 3, 4, 5, 1, 6], [7, 1, 2, 8, 7, 9, 10, 11], [0, 3, 3, 1, 4, 8, 7, 6]])
Q = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 2, 11, 12, 13, 6, 15], [0, 9, 3, 1, 16, 5, 12, 7]])


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
        objective.clamp()
        loss, stats = objective(x, t, p, q, torch.arange(B)[own], step, step // 2, same)
        network.zero_grad(set_to_none=True)
        objective.zero_grad(set_to_none=True)
        value = common.finite(loss, step)
        objective.update()
        loss.backward()
        objective.average_gradients()
        both = [*model.named_parameters(), *objective.named_parameters()]
        found.append(dict(loss=value, grad={n: x.grad.clone() for n, x in both}, state={
            k: v.clone() for k, v in objective.state_dict().items() if torch.is_tensor(v)}))
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
    """Loss, gradients of towers, temperatures and networks, and every table; on all ranks."""
    one = results[1][0]["losses"][name]
    for rank in results[N]:
        for a, b in zip(one, rank["losses"][name], strict=True):
            assert abs(a["loss"] - b["loss"]) < 1e-10
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

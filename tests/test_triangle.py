"""The paths in the triangle of policies end where their losses are least, found without them."""
import numpy as np
import pytest
import torch

import una
from helpers import near
from lab import figures, triangle
from lab.triangle import BEST, BETA, BETA_LOG_Z, LOSSES, REF, REWARDS, descend, lost

# All policies whose probabilities are multiples of 1/1000, none of them 0.
GRID = torch.from_numpy(np.array([(i, j, 1000 - i - j) for i in range(1, 999)
                                  for j in range(1, 1000 - i)]) / 1000)
REFERENCE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
SCORES = 1 / (1 + torch.exp(-REWARDS))
LABELS = dict(mse=lambda s: ((1 - s) ** 2, s ** 2), bce=lambda s: (-s.log(), -(1 - s).log()),
              mae=lambda s: (1 - s, s))


@pytest.fixture(scope="module")
def ends():
    return {name: descend(loss)[-1] for name, loss in LOSSES.items()}


def least(values):
    return GRID[values.argmin()]


def implied(policies, factor=1.0):
    """sigma(beta log pi/pi_ref + f + c) as powers; factor is e^{f + c}."""
    odds = factor * (policies / REFERENCE) ** BETA
    return odds / (1 + odds)


def by_hand(name, policies):
    """The losses of stored feedback, without una.py's functions, at policies (N, 3)."""
    if name == "pairs":
        total, odds = 0, (policies / REFERENCE) ** BETA
        for i, j in (0, 1), (0, 2), (1, 2):
            wins = 1 / (1 + torch.exp(REWARDS[j] - REWARDS[i]))
            first = odds[:, i] / (odds[:, i] + odds[:, j])
            total = total - REFERENCE[i] * REFERENCE[j] * (
                wins * first.log() + (1 - wins) * (1 - first).log())
        return total
    if name.startswith("scores"):
        factor = (REFERENCE * torch.exp(REWARDS / BETA)).sum() ** BETA if "Z" in name else 1.0
        return (implied(policies, factor) - SCORES) ** 2 @ REFERENCE
    up, down = LABELS["mae" if name == "kto" else name[-3:]](implied(policies))
    return (SCORES * up + (1 - SCORES) * down) @ REFERENCE


@pytest.mark.parametrize("name", ["scores", "scores, beta log Z", "labels, mse", "labels, bce",
                                  "kto", "pairs"])
def test_a_path_ends_where_brute_force_over_the_triangle_finds_the_least_loss(name, ends):
    found = least(by_hand(name, GRID))
    assert near(ends[name].exp(), found, 0.0025)
    for other in {"scores, beta log Z", "kto", "grpo"} - {name, *(["scores, beta log Z"] * (
            name == "pairs"))}:                                  # pairs end at pi*, too
        assert not near(ends[other].exp(), found, 0.02), other


def test_at_pi_star_end_scores_with_beta_log_z_pairs_and_rlhf_and_grpo_at_its_own_optimum(ends):
    optimum = una.k3_optimal_policy(REF, REWARDS, BETA)
    assert near(ends["grpo"], optimum, 1e-8)
    other_way = GRID @ REWARDS - BETA * (REFERENCE * (REFERENCE / GRID).log()).sum(-1)
    assert near(optimum.exp(), least(-other_way), 0.0015)        # E r - beta KL(pi_ref || pi)
    objective = una.rlhf_objective(GRID.log(), REF, REWARDS, BETA)
    assert near(BEST.exp(), least(-objective), 0.0015)
    for name in ends:                                            # three end at pi*, no other
        at_best = name in ("scores, beta log Z", "pairs", "rlhf")
        assert near(ends[name], BEST, 1e-6 if at_best else 0.1) == at_best, name
    half = descend(lambda p: triangle.scores(p, BETA_LOG_Z / 2))[-1]
    assert not near(half, BEST, 0.1)                             # another offset leads elsewhere


def test_pairs_in_which_y3_was_never_judged_end_anywhere_on_a_line_of_minima(ends):
    def ratio(logprobs):
        return logprobs[1] - logprobs[0]
    loss = LOSSES["pairs without y3"]
    starts = [torch.tensor(p).double().log() for p in ((0.1, 0.1, 0.8), (0.8, 0.1, 0.1))]
    reached = [ends["pairs without y3"], *(descend(loss, start)[-1] for start in starts),
               *(descend(loss, shared=1.0, other=other)[-1] for other in (0, 1))]
    for end in reached:
        assert near(ratio(end), ratio(BEST), 1e-7)
        assert loss(end).item() == pytest.approx(loss(BEST).item(), abs=1e-14)
    third = [end[2].exp().item() for end in reached]
    assert np.diff(sorted(third)).min() > 0.02 and max(third) - min(third) > 0.5
    for start in starts:                                         # judged, y3 brings all to pi*
        assert near(descend(LOSSES["pairs"], start)[-1], BEST, 1e-6)


def test_what_the_triangle_says_of_losses(ends):
    assert {name: round(100 * lost(end).item()) for name, end in ends.items()} == {
        "scores": 3, "labels, mse": 3, "labels, bce": 3, "kto": 18, "pairs": 0,
        "scores, beta log Z": 0, "pairs without y3": 77, "rlhf": 0, "grpo": 5}


def test_the_triangle_and_the_slopes_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(triangle, "descend", lambda loss, **_: descend(loss, steps=3))
    for draw in (triangle.draw, triangle.draw_slopes):
        figures.picture(tmp_path, "drawn.png", draw, figsize=(8.4, 4.9))
        assert (tmp_path / "drawn.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    r, score = torch.linspace(-6, 6, 25).double(), torch.full((25,), 0.7).double()
    s = r.sigmoid()                                              # bce's, above una_score_loss
    assert near(triangle.slope("bce", r, score), s - score)

"""A picture of all policies over three responses, and of where each loss leads among them; and one
of the best policy and of the losses' slopes.

    python -m lab.triangle          draws lab/triangle.png and lab/slopes.png, in a few seconds

The prompt, the responses, their rewards and beta are those of `python una.py`. Nothing is sampled:
every loss is its exact mean, over pi_ref's responses where feedback is stored, over pi's own where
it is fresh. Lost is KL(pi || pi*) / KL(pi_ref || pi*), as in una.py's section on the optimum.
"""
from pathlib import Path

import numpy as np
import torch

import una
from lab.exact import kl_divergence
from lab.figures import COLORS, picture

BETA, REWARDS = 0.5, torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
REF = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
BEST, BETA_LOG_Z = una.optimal_policy(REF, REWARDS, BETA)
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK = COLORS


def lost(logprobs):
    return kl_divergence(logprobs, BEST) / kl_divergence(REF, BEST)


# ---------------------------------------------------------------- losses: log pi (3,) to a number
def implicit(logprobs, offset=0.0):
    return una.implicit_reward(logprobs, REF, BETA, offset)


def scores(logprobs, offset):
    return (REF.exp() * una.una_score_loss(implicit(logprobs, offset), REWARDS.sigmoid())).sum()


def labels(logprobs, g):
    """The label is 1 with chance sigma(r). With g = mae this is KTO's loss where z_0 is 0."""
    up, reward, ones = REWARDS.sigmoid(), implicit(logprobs), torch.ones(3).double()
    return (REF.exp() * (up * una.una_binary_loss(reward, ones, g)
                         + (1 - up) * una.una_binary_loss(reward, 0 * ones, g))).sum()


def pairs(logprobs, one, other):
    """Of the responses one[i] and other[i], which Bradley and Terry's judge compares."""
    wins, reward = (REWARDS[one] - REWARDS[other]).sigmoid(), implicit(logprobs)
    return ((REF[one] + REF[other]).exp() * (
        wins * una.una_pair_loss(reward[one], reward[other])
        + (1 - wins) * una.una_pair_loss(reward[other], reward[one]))).sum()


def rlhf(logprobs):
    """Eq. 7 on samples of pi, whose choice has no gradient. Any offset has the same mean slope."""
    return (logprobs.detach().exp() * una.una_reward_loss(implicit(logprobs), REWARDS)).sum()


def grpo(logprobs):
    """GRPO, its advantages not divided: the group's mean changes no mean slope."""
    column = logprobs[:, None]                                   # a response is one token
    losses = una.grpo_loss(column, column.detach(), REF[:, None], REWARDS, column <= 0, BETA, 0.2)
    return (logprobs.detach().exp() * losses).sum()


LOSSES = {"scores": lambda p: scores(p, 0.0), "scores, beta log Z": lambda p: scores(p, BETA_LOG_Z),
          "labels, mse": lambda p: labels(p, "mse"), "labels, bce": lambda p: labels(p, "bce"),
          "kto": lambda p: labels(p, "mae"), "pairs": lambda p: pairs(p, [0, 0, 1], [1, 2, 2]),
          "pairs without y3": lambda p: pairs(p, [0], [1]), "rlhf": rlhf, "grpo": grpo}


def descend(loss, start=REF, shared=0.0, other=0, steps=2500):
    """Gradient descent on three logits, in steps small enough to draw. Returns log pi, (steps, 3).

    shared: how far y3's logit moves with the logit of `other`, as shared weights would move it.
    """
    weights, mixing, path = torch.zeros(3).double().requires_grad_(), torch.eye(3).double(), []
    mixing[2, other] += shared
    for _ in range(steps):
        logprobs = (start + mixing @ weights).log_softmax(-1)
        path.append(logprobs.detach())
        slope, = torch.autograd.grad(loss(logprobs), weights)
        if slope.abs().max() < 1e-10:
            break
        with torch.no_grad():
            weights -= slope * min(4, 0.04 / slope.norm())
    return torch.stack(path)


# ---------------------------------------------------------------- the picture
def at(policies):
    """Where policies (..., 3), probabilities, lie: y3 above, y1 and y2 at the left and right."""
    return np.asarray(policies) @ np.array([[0, 0], [1, 0], [0.5, 0.75 ** 0.5]])


def background(axes):
    """Rings of policies that lose the same, the triangle, and the line of minima."""
    grid = np.array([(i, j, 150 - i - j) for i in range(151) for j in range(151 - i)]) / 150
    levels = lost(torch.from_numpy(grid).clamp(min=1e-9).log()).numpy()
    rings = axes.tricontour(*at(grid).T, 100 * levels, (5, 20, 50, 100), colors="#D0D0D0",
                            linewidths=0.8)
    axes.clabel(rings, fmt={5: "5 %", 20: "20 %", 50: "50 %", 100: "lost 100 %"}, fontsize=8,
                colors="#707070", manual=((0.49, 0.75), (0.44, 0.57), (0.36, 0.44), (0.27, 0.3)))
    axes.plot(*at(np.eye(3)[[0, 1, 2, 0]]).T, color=BLACK, linewidth=1)
    for corner, y, words in zip(np.eye(3), (-0.045, -0.045, 0.04), (
            "only y₁: reward −1", "only y₂: reward 0", "only y₃: reward 1")):
        axes.text(*at(corner) + (0, y), words, ha="center", va="center")
    minima = BEST.exp() * torch.tensor([1, 1, 0])                # y1 to y2 as in pi*
    axes.plot(*at(torch.stack([minima / minima.sum(), torch.eye(3)[2]])).T, ":", color=BLACK,
              linewidth=1.8)


def draw(figure):
    axes = figure.subplots()
    axes.set(xlim=(-0.36, 1.45), ylim=(-0.08, 0.96), aspect="equal")
    axes.axis("off")
    background(axes)

    def path(name, color, style="-", width=2.4, **how):
        """The line of a path, and a dot where it ends. Returns the line and log pi at its end."""
        way = descend(LOSSES[name], **how)
        line, = axes.plot(*at(way.exp()).T, color=color, linestyle=style, linewidth=width)
        axes.plot(*at(way[-1].exp()), "o", color=color, markersize=7, zorder=3)
        return line, way[-1]

    def tell(ended, x, y, words):
        line, logprobs = ended
        side, edge = ("right", 1) if x < 0.5 else ("left", 0)
        axes.annotate(f"{words}: lost {100 * lost(logprobs).abs():.0f} %", at(logprobs.exp()),
                      (x, y), va="center", ha=side, arrowprops=dict(
                          arrowstyle="-", color=line.get_color(), linewidth=1.2, shrinkB=5,
                          relpos=(edge, 0.5)))

    axes.text(0.2, 0.91, "Bias: the minimum is elsewhere", weight="bold", ha="right")
    tell(path("kto", VERMILION), 0.2, 0.82, "Labels, absolute error\n(KTO, z₀ = 0)")
    tell(path("grpo", PURPLE), 0.2, 0.68, "Fresh rewards, GRPO’s\nKL in the loss")
    path("labels, bce", ORANGE)
    tell(path("scores", ORANGE), 0.2, 0.54, "Scores or labels,\nf + c = 0")
    axes.text(0.74, 0.91, "Neither: the minimum is π*", weight="bold")
    lines, (*_, best) = zip(*(path(*how) for how in (
        ("scores, beta log Z", BLUE), ("pairs", SKY, "--"), ("rlhf", GREEN, "-."))))
    axes.legend(lines, ("scores, f + c = β log Z", "pairs of all three",
                        "RLHF: Eq. 7, fresh rewards"), loc="upper left", frameon=False,
                bbox_to_anchor=(0.74, 0.83), bbox_transform=axes.transData,
                borderaxespad=0, borderpad=0, handlelength=2.6)
    axes.plot(*at(BEST.exp()), "*", color=BLACK, markersize=18, zorder=4)
    tell((axes.lines[-1], best), 0.74, 0.86, "These three")
    axes.text(0.93, 0.5, "Leak: the minimum is a line", weight="bold")
    others = [lost(path("pairs without y3", BLACK, (0, (6, 2)), 1, shared=1.0, other=i)[1])
              for i in (1, 0)]
    tell(path("pairs without y3", BLACK), 0.93, 0.43, "Pairs of y₁ and y₂ only,\ny₃ is not judged")
    axes.text(0.93, 0.28, "Each dotted point is a minimum.\nDashed: where y₃ shares weights\n"
              "with y₂ or y₁, others are reached:\nlost {:.0f} and {:.0f} %".format(
                  *(100 * share for share in others)), va="center")
    axes.plot(*at(REF.exp()), "s", color=BLACK, markersize=9)
    axes.text(*at(REF.exp()) - (0.03, 0), "$π_{ref}$: the start,\nlost 100 %", ha="right",
              va="center")


# ---------------------------------------------------------------- the best policy, and slopes
def slope(g, reward, score):
    """dL/dr of una_score_loss where the implicit reward is r: all (N,)."""
    reward = reward.clone().requires_grad_()
    return torch.autograd.grad(una.una_score_loss(reward, score, g).sum(), reward)[0]


def draw_slopes(figure):
    left, right = figure.subplots(1, 2)
    for shift, logprobs, name, color in ((-0.2, REF, "$π_{ref}$", SKY), (0.2, BEST, "π*", BLUE)):
        left.bar(np.arange(3) + shift, logprobs.exp().numpy(), 0.4, color=color, label=name)
    left.set(title="The best policy tilts the reference", ylabel="probability",
             xticks=range(3), xticklabels=[f"$y_{i + 1}$: reward {r:.0f}"
                                           for i, r in enumerate(REWARDS)])
    left.legend(frameon=False)
    reward = torch.linspace(-6, 6, 241).double()
    for g, color, style in (("mse", ORANGE, "-"), ("bce", BLUE, "--"), ("mae", VERMILION, ":")):
        right.plot(reward, slope(g, reward, torch.full_like(reward, REWARDS[2].sigmoid())),
                   style, color=color, label=g, linewidth=2)
    right.axhline(0, color=BLACK, linewidth=0.6)
    right.axvline(REWARDS[2], color=BLACK, linewidth=0.6)
    right.set(title="How hard a loss pulls at a response", ylabel="slope dL/dr",
              xlabel="implicit reward r of $y_3$, whose score is σ(1)")
    right.legend(frameon=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    picture(Path(__file__).parent, "slopes.png", draw_slopes, figsize=(8.4, 3.2))
    picture(Path(__file__).parent, "triangle.png", draw, figsize=(8.4, 4.9))

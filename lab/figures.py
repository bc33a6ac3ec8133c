"""Tables and pictures, from results.json. Knows no training.

Lost is the share of the possible gain J* - J(pi_ref) that a run ends without: 0 is the exact
optimum, 1 the reference, more is worse than no training.
"""
import math
import os

import numpy as np

os.environ["MPLBACKEND"] = "agg"     # pictures go to files: no variable can ask for another screen
from matplotlib.figure import Figure  # noqa: E402

from lab.run import save  # noqa: E402


# ---------------------------------------------------------------- text
def lost(run):
    """On the training prompts; infinite if the run left the numbers."""
    return math.inf if "diverged" in run else run["train"]["lost"]


def line(run):
    """What there is to say when a run has ended: what theory expects beside what was measured."""
    parts = [f"seed {run['seed']}", f"{run['method']:<20}"]
    if "diverged" in run:
        return " | ".join([*parts, f"diverged: {run['diverged']}"])
    parts.append(f"loss {run['loss']:.4f} (at start {run['start_loss']:.4f})")
    if "chosen_reward" in run:
        parts.append(f"r_w {run['chosen_reward']:+.2f} r_l {run['rejected_reward']:+.2f}")
    reached = run["train"]
    return " | ".join([*parts, f"KL {reached['kl']:.3f}",
                       f"J {reached['objective']:.3f} of {reached['optimum']:.3f}",
                       f"lost {lost(run):.1%}", f"{run['seconds']:.1f} s"])


def table(results):
    """A line for each method: medians over the seeds that ended, and the range of what was lost if
    there are several. All figures are of the training prompts but the lost share of the others.
    frontier: the reward gained, as a share of what the frontier gains at the same KL."""
    columns = {"reward": "{:z.3f}", "KL": "{:z.3f}", "J": "{:z.3f}", "lost": "{:z.2%}",
               "held-out": "{:z.2%}", "frontier": "{:z.1%}", "seconds": "{:.1f}"}
    starts = {entry["seed"]: entry["train"]["reward"] for entry in results["reference"]}

    def cells(entry):
        reached, start = entry["train"], starts[entry["seed"]]
        frontier = math.nan                                      # where nothing moved
        if reached["kl"] > 1e-6:
            frontier = (reached["reward"] - start) / (reached["frontier_reward"] - start)
        return [reached["reward"], reached["kl"], reached["objective"], reached["lost"],
                entry["heldout"]["lost"], frontier, entry.get("seconds", math.nan)]

    lines = [f"{'':<20}" + "".join(f"{heading:>9}" for heading in columns)]
    for name, entries in rows(results).items():
        ended = [entry for entry in entries if "diverged" not in entry]
        text = f"{name:<20}"
        if ended:
            middle = np.median([cells(entry) for entry in ended], axis=0)
            text += "".join(f"{'-' if math.isnan(value) else form.format(value):>9}"
                            for form, value in zip(columns.values(), middle))
        if len(ended) > 1:
            text += f"  {min(map(lost, ended)):.2%} to {max(map(lost, ended)):.2%}"
        if len(ended) < len(entries):
            text += f"  {len(entries) - len(ended)} of {len(entries)} diverged"
        lines.append(text.rstrip())
    return "\n".join(lines)


def rows(results):
    """name: entries of all seeds, from the reference over the methods to the optimum."""
    named = {"reference": results["reference"]}
    for run in results["runs"]:
        named.setdefault(run["method"], []).append(run)
    return named | {"optimum": results["optimum"]}


def samples(results):
    """Two responses of each of the first seed's models to a training and to a held-out prompt."""
    first = {name: entries[0]["samples"] for name, entries in rows(results).items()
             if "samples" in entries[0]}
    prompts = list(first["reference"])
    lines = [f"{'responses to':<20}" + "".join(f"{prompt:<40}" for prompt in prompts).rstrip()]
    for name, texts in first.items():
        answers = "".join(f"{','.join(texts[prompt][:2]):<40.39}" for prompt in prompts)
        lines.append(f"{name:<20}{answers}".rstrip())
    return "\n".join(lines)


def report(results):
    return "\n\n".join([table(results), samples(results)])


# ---------------------------------------------------------------- pictures
def picture(path, draw, *shown, **words):
    """draw(figure, *shown), in a file."""
    figure = Figure(layout="constrained", **words)
    draw(figure, *shown)
    save(path, lambda partial: figure.savefig(partial, format="png", dpi=120))


# Okabe and Ito's, which the color-blind can tell apart; methods beyond have other markers too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dv"


def styles(results):
    """A color and a marker for each method, by its place among the runs."""
    names = dict.fromkeys(run["method"] for run in results["runs"])
    return {name: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)])
            for i, name in enumerate(names)}


def draw_all(results, folder):
    """PICTURES, of the runs that ended in numbers."""
    results = results | dict(runs=[run for run in results["runs"] if "diverged" not in run])
    picture(os.path.join(folder, "frontier.png"), draw_frontier, results, figsize=(7, 5))
    picture(os.path.join(folder, "regret-over-time.png"), draw_regret, results, figsize=(7, 4.5))
    dots = {entry["method"]: entry["dots"]
            for entry in (results["reference"][0], *results["runs"])
            if entry["seed"] == results["reference"][0]["seed"]}
    columns = min(5, len(dots))
    picture(os.path.join(folder, "implicit-against-explicit.png"), draw_rewards, dots,
            styles(results), figsize=(2.6 * columns, 2.7 * math.ceil(len(dots) / columns) + 0.4))


def draw_frontier(figure, results):
    """Reward against KL, under the first seed's frontier. Runs far to the right are only named."""
    axes = figure.subplots()
    best = results["optimum"][0]["train"]
    widest = 1.5 * max(entry["train"]["kl"] for entry in results["optimum"])
    around = axes.inset_axes((0.52, 0.07, 0.46, 0.42))           # what is near to the optimum
    around.set(xlim=(best["kl"] - 0.12, best["kl"] + 0.12),
               ylim=(best["reward"] - 0.05, best["reward"] + 0.03))
    around.tick_params(labelsize=7)
    far = []
    for name, (color, marker) in styles(results).items():
        runs = [run["train"] for run in results["runs"] if run["method"] == name]
        near = [(run["kl"], run["reward"]) for run in runs if run["kl"] <= widest]
        if len(near) < len(runs):
            far.append(f"{len(runs) - len(near)} of {name}")
        style = dict(color=color, marker=marker, s=24)
        if name == "una-pair":                                   # a ring: dpo's dots lie in it
            style = dict(s=110, facecolor="none", edgecolor=color, linewidth=1.5)
        for part in (axes, around) if near else ():
            part.scatter(*zip(*near), label=name, **style)
    for part in (axes, around):
        part.plot(*zip(*results["optimum"][0]["frontier"]), color="black", zorder=0,
                  label="frontier: none is above")
        part.scatter(*zip(*[(entry["train"]["kl"], entry["train"]["reward"])
                            for entry in results["optimum"]]),
                     marker="*", s=260, facecolor="none", edgecolor="black", label="optimum of J")
    start = [entry["train"]["reward"] for entry in results["reference"]]
    axes.scatter([0.0] * len(start), start, marker="x", color="black", label="reference")
    axes.indicate_inset_zoom(around)
    title = "How much reward for how much KL: the nearer to the star, the better"
    if far:
        title += f"\n(too far to the right: {', '.join(far)})"
    axes.set(xlabel="KL(policy || reference), nats", ylabel="mean reward, training prompts",
             xlim=(-0.05, widest))
    axes.set_title(title, fontsize=10)
    figure.legend(fontsize=8, loc="outside right")


def draw_regret(figure, results):
    """Regret against seconds of training, where there is a curve: seeds thin, their median thick.
    """
    axes = figure.subplots()
    for method, (color, marker) in styles(results).items():
        curves = [[(point["seconds"], max(point["regret"], 1e-6)) for point in run["curve"]]
                  for run in results["runs"] if run["method"] == method and len(run["curve"]) > 2]
        for curve in curves:
            axes.plot(*zip(*curve), color=color, linewidth=0.7, alpha=0.6)
        if curves:
            median = np.median(np.array(curves), axis=0)
            axes.plot(*median.T, color=color, marker=marker, linewidth=2.2, label=method)
    axes.set(yscale="log", xlabel="seconds of training", ylabel="regret: J* - J",
             title="How fast the distance to the exact optimum falls")
    if axes.lines:
        axes.legend()


def draw_rewards(figure, dots, style):
    """Implicit reward beta log pi/pi_ref + beta log Z(x) against the judge's, one panel a policy.

    On the diagonal the two agree, and the policy is optimal (Eq. 18).
    """
    columns = min(5, len(dots))
    grid = figure.subplots(math.ceil(len(dots) / columns), columns, sharex=True, sharey=True,
                           squeeze=False)
    for axes, (name, (explicit, implicit)) in zip(grid.flat, dots.items()):
        axes.plot([-4, 3], [-4, 3], color="black", linewidth=0.8)
        axes.scatter(explicit, np.maximum(implicit, -6), s=3, alpha=0.3,
                     color=style.get(name, ("grey", ""))[0])
        axes.set_title(name, fontsize=9)
    for axes in grid.flat[len(dots):]:
        axes.set_visible(False)
    figure.supxlabel("explicit reward, the judge's, of what the reference says over 1 time in 300")
    figure.supylabel("implicit reward (below -6: drawn at -6)")
    figure.suptitle("A policy is optimal where its dots lie on the diagonal")

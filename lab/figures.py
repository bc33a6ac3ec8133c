"""What train.py prints and draws, and the pictures of lab/README.md. Knows no training."""
import math
import os
import textwrap

import numpy as np

os.environ["MPLBACKEND"] = "agg"     # pictures go to files: no variable can ask for another screen
from matplotlib.figure import Figure  # noqa: E402

from lab.run import save  # noqa: E402


# ---------------------------------------------------------------- text
def lost(run):
    """The share of the gain missed, by the judge, on training prompts; infinite if it diverged."""
    return math.inf if "diverged" in run else run["train"]["lost"]


def line(run):
    """What there is to say when a run has ended: what theory expects beside what was measured."""
    parts = [f"seed {run['seed']}", f"{run['method']:<21}"]
    if "diverged" in run:
        return " | ".join([*parts, f"diverged: {run['diverged']}"])
    parts.append(f"loss {run['loss']:.4f} (at start {run['start_loss']:.4f})")
    if "chosen_reward" in run:
        parts.append(f"r_w {run['chosen_reward']:+.2f} r_l {run['rejected_reward']:+.2f}")
        parts.append(f"log pi/pi_ref {run['mean_rho']:+.2f}")
    reached = run["train"]
    return " | ".join([*parts, f"KL {reached['kl']:.3f}",
                       f"J {reached['objective']:.3f} of {reached['optimum']:.3f}",
                       f"lost {lost(run):.1%}", f"{run['seconds']:.1f} s"])


COLUMNS = {"reward": "{:z.3f}", "KL": "{:z.3f}", "J": "{:z.3f}", "lost": "{:z.2%}",
           "judged": "{:z.2%}", "unjudged": "{:z.2%}", "held-out": "{:z.2%}", "seconds": "{:.1f}"}


def table(results):
    """A line for each method: medians over the seeds that ended, and the range of what was lost if
    there are several. All figures are of the training prompts but the lost share of the others.
    Of one seed lost is judged + unjudged, exact.lost_parts's."""
    def cells(entry):
        reached = entry["train"]
        return [*(reached.get(name, math.nan) for name in (
            "reward", "kl", "objective", "lost", "judged", "unjudged")), entry["heldout"]["lost"],
                entry.get("seconds", math.nan)]

    headings = f"{'':<21}" + "".join(f"{heading:>9}" for heading in COLUMNS)
    shown = {}                                                   # figures: methods that share them
    for name, entries in rows(results).items():
        ended = [entry for entry in entries if "diverged" not in entry]
        text = ""
        if ended:
            middle = np.median([cells(entry) for entry in ended], axis=0)
            text += "".join(f"{'-' if math.isnan(value) else form.format(value):>9}"
                            for form, value in zip(COLUMNS.values(), middle))
        if len(ended) > 1:
            text += f"  {min(map(lost, ended)):.2%} to {max(map(lost, ended)):.2%}"
        if len(ended) < len(entries):
            text += f"  {len(entries) - len(ended)} of {len(entries)} diverged"
        figures = str([cells(entry)[:-1] for entry in ended]) if ended else name
        shown.setdefault(figures, [[], text])[0].append(name)
    return "\n".join([headings, *(f"{', '.join(names):<21}{text}".rstrip()
                                  for names, text in shown.values())])


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
    lines = [f"{'responses to':<21}" + "".join(f"{prompt:<40}" for prompt in prompts).rstrip()]
    for name, texts in first.items():
        answers = "".join(f"{','.join(texts[prompt][:2]).strip():<40.39}" for prompt in prompts)
        lines.append(f"{name:<21}{answers}".rstrip())
    return "\n".join(lines)


LEGEND = """\
lost: the share of the possible gain in J = reward - beta KL that is missed. 0% is the best policy,
100% the reference; more is worse than no training. It has two parts, judged: lost on the responses
that the method learned from; unjudged: on all others. held-out: prompts without feedback."""


def report(results):
    worse = [name for name, *_, runs in by_method(results) if runs and np.median(
        [lost(run) for run in runs]) > 1]
    warning = [f"Worse than no training, so far: {', '.join(worse)}"] if worse else []
    return "\n\n".join([table(results), LEGEND, *warning, samples(results)])


# ---------------------------------------------------------------- pictures
PICTURES = ("frontier.png", "regret-over-time.png", "implicit-against-explicit.png", "lost.png")
# Okabe and Ito's, which the color-blind can tell apart; methods beyond have other markers too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LOOKS = [dict(color=color, marker=marker) for color, marker in zip(COLORS * 5, "os^Dv" * 7)]


def picture(folder, name, draw, *shown, **words):
    """draw(figure, *shown), in a file."""
    figure = Figure(layout="constrained", **words)
    draw(figure, *shown)
    save(os.path.join(folder, name), lambda partial: figure.savefig(partial, format="png", dpi=120))


def label(axes, title, size=10, **words):
    axes.set_title(title, fontsize=size)
    axes.set(**words)


def by_method(results):
    """[(name, its look, its runs that ended in numbers)]."""
    named = [*rows(results).items()][1:-1]                       # no reference, no optimum
    return [(name, look, [run for run in runs if "diverged" not in run])
            for (name, runs), look in zip(named, LOOKS)]


def draw_all(results, folder):
    """PICTURES, from results.json: the third where runs have dots, the last of several seeds."""
    picture(folder, PICTURES[0], draw_frontier, results, figsize=(8.5, 5))
    picture(folder, PICTURES[1], draw_regret, results, figsize=(8.5, 4.5))
    first = results["reference"][0]
    if "dots" in first:
        dots = [("reference", "grey", first["dots"])] + [
            (f"{name}: lost {lost(run):.2%}", look["color"], run["dots"])
            for name, look, runs in by_method(results)
            for run in runs if run["seed"] == first["seed"]]
        size = math.ceil(len(dots) / 5), min(5, len(dots))       # lines, columns
        picture(folder, PICTURES[2], draw_rewards, dots, size,
                figsize=(2.6 * size[1], 2.7 * size[0] + 0.4))
    if len(results["reference"]) > 1:
        picture(folder, PICTURES[3], lost_parts_dots, results, figsize=(7, 6))


# What a method learns from, and what it puts for f(x) + c, decide where its runs lie. The first
# cluster that has a part of a method's name is the method's.
CLUSTERS = {"fresh feedback": ("online", "ppo", "rloo", "grpo"),
            "pairs: f + c cancels": ("pair", "dpo"), "f + c is estimated": ("estimated",),
            "f + c is learned": ("learned",), "f + c is 0": ("",)}


def draw_frontier(figure, results):
    """Reward against KL: the first seed's runs and its frontier. Runs far right are only named."""
    axes, start, best = figure.subplots(), results["reference"][0], results["optimum"][0]
    widest, far = 1.5 * best["train"]["kl"], []
    clusters = {cluster: {} for cluster in CLUSTERS}             # {cluster: {method: point}}
    for run in results["runs"]:
        if run["seed"] == start["seed"] and "diverged" not in run:
            name, kl = run["method"], run["train"]["kl"]
            cluster = next(c for c, words in CLUSTERS.items() if any(w in name for w in words))
            if kl > widest:
                far.append(f"{name} at {kl:.1f}")
            else:
                clusters[cluster][name] = kl, run["train"]["reward"]
    axes.plot(*zip(*best["frontier"]), color="black", zorder=0, label="the best at each KL")
    for (cluster, points), look in zip(clusters.items(), LOOKS):
        if points:
            names = textwrap.wrap(", ".join(points), 30, break_on_hyphens=False)
            axes.scatter(*zip(*points.values()), s=50, label="\n".join([f"{cluster}:", *names]),
                         **look)
    for entry, name, look in (
            (start, "reference", dict(marker="x", s=90, color="black")),
            (best, "best policy", dict(marker="*", s=320, facecolor="none", edgecolor="black"))):
        axes.scatter(entry["train"]["kl"], entry["train"]["reward"], zorder=3, label=name, **look)
    figure.legend(loc="outside right", frameon=False, fontsize=8.5)
    label(axes, "How much reward for how much KL: no policy is above the line" + (
        "\n" + textwrap.fill(f"(too far right: {', '.join(far)})", 75) if far else ""),
          xlim=(-0.05, widest), xlabel="KL(policy || reference), nats",
          ylabel="mean reward, training prompts")


def lost_parts_dots(figure, results):
    """What each method lost on judged and on all other responses: a dot for each seed."""
    axes = figure.subplots()
    methods = {name: runs for name, _, runs in by_method(results) if runs}
    if not methods:                                              # all diverged
        return
    for i, runs in enumerate(methods.values()):
        for part, shift, look in (("judged", -0.17, LOOKS[0]), ("unjudged", 0.17, LOOKS[1])):
            shares = [max(run["train"][part], 1e-4) for run in runs]
            axes.scatter(100 * np.array(shares), np.full(len(shares), i + shift), s=22, alpha=0.7,
                         label=None if i else f"on {part} responses", linewidth=0, **look)
        axes.axhline(i + 0.5, color="#D0D0D0", linewidth=0.6)
    axes.axvline(100, color="black", linewidth=0.8)              # all that there was to gain
    label(axes, "Where it was lost: a dot is a seed, the line is the reference", xscale="log",
          xlim=(0.008, None), ylim=(len(methods) - 0.5, -0.5), yticks=range(len(methods)),
          yticklabels=[*methods],
          xlabel="lost: percent of the possible gain (less than 0.01: drawn at 0.01)")
    axes.xaxis.set_major_formatter("{x:g}")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)


def draw_regret(figure, results):
    """Regret against seconds, where there is a curve: seeds thin, their median thick."""
    axes = figure.subplots()
    for name, look, runs in by_method(results):
        curves = [[(point["seconds"], max(point["regret"], 1e-6)) for point in run["curve"]]
                  for run in runs if len(run.get("curve", ())) > 2]
        for curve in curves:
            axes.plot(*zip(*curve), color=look["color"], linewidth=0.7, alpha=0.6)
        if curves:
            axes.plot(*np.median(curves, axis=0).T, **look, linewidth=2.2, label=name)
    axes.set(yscale="log", xlabel="seconds of training", ylabel="regret: J* - J",
             title="How fast the distance to the exact optimum falls")
    if axes.lines:
        axes.legend()


def draw_rewards(figure, dots, size):
    """A panel for each policy; dots: [(name, color, (explicit, implicit))]. On the diagonal the two
    rewards agree, and the policy is optimal (Eq. 18)."""
    grid = figure.subplots(*size, sharex=True, sharey=True, squeeze=False).flat
    for axes, (name, color, (explicit, implicit)) in zip(grid, dots):
        label(axes, name, 9)
        axes.plot([-4, 3], [-4, 3], color="black", linewidth=0.8)
        axes.scatter(explicit, np.maximum(implicit, -6), s=3, alpha=0.3, color=color)
    for axes in grid[len(dots):]:
        axes.set_visible(False)
    figure.supxlabel("explicit reward, the judge's, of what the reference says over 1 time in 300")
    figure.supylabel("implicit reward β log π/π_ref + β log Z(x) (below -6: drawn at -6)")
    figure.suptitle("A policy is optimal where its dots lie on the diagonal. What it lost on rarer "
                    "responses is not drawn")


def draw_judgements(figure, learning):
    """For lab/README.md: what was lost against judged responses, medians, and the range of seeds
    where few sizes are. learning: {name: [(responses, what each seed lost)]}."""
    axes = figure.subplots()
    for i, (name, points) in enumerate(learning.items()):
        judged = np.array([judged for judged, _ in points]) * 1.03 ** (i - 4)
        lost = [100 * np.array(lost) for _, lost in points]
        right = name.endswith(("estimated", "once", "learned", "zero", "fresh"))
        axes.plot(judged, [np.median(values) for values in lost], "-" if right else ":",
                  **LOOKS[i], label=name)
        if len(lost) <= 3:
            axes.vlines(judged, *([of(values) for values in lost] for of in (min, max)),
                        color=LOOKS[i]["color"], linewidth=0.8)
    axes.axhline(100, color="black", linewidth=0.7, zorder=0)
    label(axes, "What is lost from few judgements and from many, at level 1\n(f(x) + c: dotted 0 "
                "or cancelled, solid estimated, learned or free; line: the reference)",
          xscale="log", yscale="log", xlabel="judged responses", ylim=(0.02, 2000),
          ylabel="lost: percent of the possible gain")
    figure.legend(fontsize=8, loc="outside right")

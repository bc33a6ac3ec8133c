"""Tables and pictures, from results.json. Knows no training.

Lost is the share of the possible gain J* - J(pi_ref) that a run ends without: 0 is the exact
optimum, 1 the reference, more is worse than no training.
"""
import math
import os
from collections import Counter

import numpy as np

os.environ["MPLBACKEND"] = "agg"     # pictures go to files: no variable can ask for another screen
from matplotlib import colormaps  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from lab.run import save  # noqa: E402

PICTURES = ("frontier.png", "regret-over-time.png", "implicit-against-explicit.png")


# ---------------------------------------------------------------- figures of a run
def lost(run):
    """As above, on the training prompts; infinite if the run left the numbers."""
    return math.inf if "diverged" in run else run["curve"][-1]["regret"] / run["curve"][0]["regret"]


def gain_share(figures, reference):
    """J gained, as a share of what the optimum gains: 1 - lost."""
    possible = figures["optimum"] - reference["objective"]
    return (figures["objective"] - reference["objective"]) / possible


def frontier_share(figures, reference):
    """Reward gained, as a share of what the frontier gains at the same KL; NaN where nothing moved.
    """
    possible = figures["frontier_reward"] - reference["reward"]
    gained = figures["reward"] - reference["reward"]
    return gained / possible if figures["kl"] > 1e-6 else math.nan


# ---------------------------------------------------------------- text
def stages(seconds):
    return ", ".join(f"{stage} {spent:.1f} s" for stage, spent in seconds.items())


def line(entries):
    """What there is to say when a seed is prepared, or a run has ended."""
    if "reference" in entries:
        return f"seed {entries['reference']['seed']} | {stages(entries['reference']['stages'])}"
    entry = entries["runs"]
    parts = [f"seed {entry['seed']}", f"{entry['method']:<17}"]
    if "diverged" in entry:
        return " | ".join([*parts, f"diverged: {entry['diverged']}"])
    parts.append(f"loss {entry['curve'][-1]['loss']:.4f} (at start {entry['start_loss']:.4f})")
    if "chosen_reward" in entry:
        parts.append(f"r_w {entry['chosen_reward']:+.2f} r_l {entry['rejected_reward']:+.2f}")
    reached = entry["train"]
    parts += [f"KL {reached['kl']:.3f}",
              f"J {reached['objective']:.3f} of {reached['optimum']:.3f}",
              f"lost {lost(entry):.1%}", f"{entry['seconds']:.1f} s"]
    return " | ".join(parts)


def time_line(results, seconds):
    """Where the time went, summed over the processes side by side."""
    spent = Counter(training=sum(entry.get("seconds", 0) for entry in results["runs"]))
    for entry in results["reference"]:
        spent.update(entry["stages"])
    spent["evaluation"] += sum(entry.get("evaluation_seconds", 0) for entry in results["runs"])
    names = dict(reference="reference", feedback="feedback", training="training",
                 evaluation="exact evaluation")
    return (f"{seconds:.0f} s, on {results['settings']['jobs']} processes: "
            + stages({names[stage]: spent[stage] for stage in names}))


def table(results, split):
    """The table of one set of prompts: medians over the seeds, and the regret's range if there are
    several."""
    start = {entry["seed"]: entry[split] for entry in results["reference"]}
    columns = {  # heading: (format, figure of one entry)
        "reward": ("{:z.3f}", lambda entry: entry[split]["reward"]),
        "KL": ("{:z.3f}", lambda entry: entry[split]["kl"]),
        "J": ("{:z.3f}", lambda entry: entry[split]["objective"]),
        "regret": ("{:z.5f}", lambda entry: entry[split]["regret"]),
        "of gain": ("{:z.1%}", lambda entry: gain_share(entry[split], start[entry["seed"]])),
        "of frontier": ("{:z.1%}",
                        lambda entry: frontier_share(entry[split], start[entry["seed"]])),
        "seconds": ("{:.1f}", lambda entry: entry.get("seconds", math.nan)),
    }
    lines = [f"{split + ' prompts':<18}" + "".join(f"{heading:>12}" for heading in columns)]
    for name, entries in rows(results).items():
        ended = [entry for entry in entries if "diverged" not in entry]
        line = f"{name:<18}"
        if ended:
            values = [form.format(np.median([figure(entry) for entry in ended]))
                      for form, figure in columns.values()]
            line += "".join(f"{'-' if 'nan' in value else value:>12}" for value in values)
        if len(ended) > 1:
            regrets = [entry[split]["regret"] for entry in ended]
            line += f"  regret {min(regrets):.5f} to {max(regrets):.5f}"
        if len(ended) < len(entries):
            line += f"  {len(entries) - len(ended)} of {len(entries)} diverged"
        lines.append(line)
    return "\n".join(lines)


def rows(results):
    """name: entries of all seeds, from the reference over the methods to the optimum."""
    named = {"reference": results["reference"]}
    for run in results["runs"]:
        named.setdefault(run["method"], []).append(run)
    return named | {"optimum": results["optimum"]}


def samples(results):
    """The responses that the first seed's models gave to two prompts, three to each."""
    first = {name: entries[0]["samples"] for name, entries in rows(results).items()
             if "samples" in entries[0]}
    prompts = list(first["reference"])
    lines = [f"{'responses to':<18}" + " ".join(f"{prompt:<60}" for prompt in prompts).rstrip()]
    for name, texts in first.items():
        answers = " ".join(f"{','.join(texts[prompt]):<60}" for prompt in prompts)
        lines.append(f"{name:<17}{answers}".rstrip())
    return "\n".join(lines)


def report(results):
    return "\n\n".join([table(results, "train"), table(results, "heldout"), samples(results)])


# ---------------------------------------------------------------- pictures
def picture(path, draw, *shown, **words):
    """draw(figure, *shown), in a file."""
    figure = Figure(layout="constrained", **words)
    draw(figure, *shown)
    save(path, lambda partial: figure.savefig(partial, format="png", dpi=120))


def colors(results):
    """A color for each method, by its place among the runs."""
    names = dict.fromkeys(run["method"] for run in results["runs"])
    return {name: colormaps["tab20"](i % 20) for i, name in enumerate(names)}


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
            colors(results), figsize=(2.6 * columns, 2.7 * math.ceil(len(dots) / columns) + 0.4))


def draw_frontier(figure, results):
    """Reward against KL, under the first seed's frontier. Runs far to the right are only named."""
    axes, color = figure.subplots(), colors(results)
    widest = 1.5 * max(entry["train"]["kl"] for entry in results["optimum"])
    frontier = [point for point in results["optimum"][0]["frontier"] if point[0] <= widest]
    axes.plot(*zip(*frontier), color="black", label="frontier: none is above")
    axes.scatter(*zip(*[(entry["train"]["kl"], entry["train"]["reward"])
                        for entry in results["optimum"]]),
                 marker="*", s=260, color="gold", edgecolor="black", zorder=1, label="optimum of J")
    far = []
    for method in color:
        runs = [run["train"] for run in results["runs"] if run["method"] == method]
        near = [(run["kl"], run["reward"]) for run in runs if run["kl"] <= widest]
        if len(near) < len(runs):
            far.append(f"{len(runs) - len(near)} of {method}")
        style = dict(color=color[method], s=30)
        if method == "una-pair":                                 # a ring: dpo's dot lies in it
            style = dict(s=110, facecolor="none", edgecolor=color[method], linewidth=1.5)
        if near:
            axes.scatter(*zip(*near), label=method, **style)
    title = "Reward against KL, training prompts"
    if far:
        title += f"\n(runs too far to the right: {', '.join(far)})"
    axes.set(xlabel="KL(policy || reference), nats", ylabel="mean reward", title=title)
    axes.legend(fontsize=8)


def draw_regret(figure, results):
    """Regret against seconds of training, where there is a curve: seeds thin, their median thick.
    """
    axes = figure.subplots()
    for method, color in colors(results).items():
        curves = [[(point["seconds"], max(point["regret"], 1e-6)) for point in run["curve"]]
                  for run in results["runs"] if run["method"] == method and len(run["curve"]) > 2]
        for curve in curves:
            axes.plot(*zip(*curve), color=color, linewidth=0.7, alpha=0.6)
        if curves:
            median = np.median(np.array(curves), axis=0)
            axes.plot(*median.T, color=color, linewidth=2.2, label=method)
    axes.set(yscale="log", xlabel="seconds of training", ylabel="regret: J* - J",
             title="Distance to the exact optimum, training prompts")
    if axes.lines:
        axes.legend()


def draw_rewards(figure, dots, color):
    """Implicit reward beta log pi/pi_ref + beta log Z(x) against the judge's, one panel a policy.

    On the diagonal the two agree, and the policy is optimal (Eq. 18).
    """
    columns = min(5, len(dots))
    grid = figure.subplots(math.ceil(len(dots) / columns), columns, sharex=True, sharey=True,
                           squeeze=False)
    for axes, (name, (explicit, implicit)) in zip(grid.flat, dots.items()):
        axes.plot([-3, 2], [-3, 2], color="black", linewidth=0.8)
        axes.scatter(explicit, np.maximum(implicit, -6), s=3, alpha=0.3,
                     color=color.get(name, "grey"))
        axes.set_title(name, fontsize=9)
    for axes in grid.flat[len(dots):]:
        axes.set_visible(False)
    figure.supxlabel("explicit reward, the judge's")
    figure.supylabel("implicit reward (below -6: drawn at -6)")
    figure.suptitle("A policy whose dots lie on the diagonal is optimal")

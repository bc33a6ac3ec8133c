"""How the claims compare runs: lost, intervals over seeds, and the cells of a table that say so.

Lost is the share of the possible gain, J* - J(pi_ref), that a run ends without, on the training
prompts; infinite if it diverged. Means and deviations are over the seeds that ended. Differences
are paired by seed, since a seed is one reference and one feedback.
"""
import math

import numpy as np

from lab import figures

# Two-sided 95% quantiles of Student's t, by the number of seeds.
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
# Words for: ours less, ours more, neither shown.
VERDICTS = ("replicates", "does not: the reverse", "does not: no difference shown")
ANSWERS = ("yes", "no: the reverse", "no difference shown")


# ---------------------------------------------------------------- figures
def interval(differences):
    """Their mean, and the ends of its 95% interval."""
    mean = np.mean(differences)
    half = T95[len(differences)] * np.std(differences, ddof=1) / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def lost(runs):
    """In percent."""
    return [100 * figures.lost(run) for run in runs]


def ended(runs):
    return [run for run in runs if "diverged" not in run]


def median(values):
    """Of the runs that ended."""
    values = [value for value in values if value < math.inf]
    return np.median(values) if values else math.nan


def seconds(runs):
    return [run.get("seconds", math.inf) for run in runs]


def seconds_to(share, run):
    """Seconds of training until that share of the possible gain is reached.

    Between points, log regret is taken as linear.
    """
    if "diverged" in run:
        return math.inf
    goal = (1 - share) * run["curve"][0]["regret"]
    for before, after in zip(run["curve"], run["curve"][1:]):
        if after["regret"] <= goal:
            done = (math.log(before["regret"] / goal)
                    / math.log(before["regret"] / after["regret"]))
            return before["seconds"] + done * (after["seconds"] - before["seconds"])
    return math.inf


# ---------------------------------------------------------------- cells
def number(value, form=".3g"):
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "∞"
    if abs(value) >= 100:
        form = form[:-2] + "0f"                                  # no exponents
    return f"{value:{form}}".replace("-", "−")


def mean_sd(values, unit=""):
    """Of the values that are finite; how many are not is told."""
    finite = [value for value in values if value < math.inf]
    if len(finite) > 1:
        text = f"{number(np.mean(finite))} ± {number(np.std(finite, ddof=1), '.2g')}{unit}"
    else:
        text = "".join(f"{number(value)}{unit}" for value in finite)
    if len(finite) < len(values):
        text = f"{text} ({len(values) - len(finite)} of {len(values)} diverged)".strip()
    return text


def span(differences, words):
    """A paired difference with its 95% interval, and the word for the side of 0 that it lies on.

    Where a run diverged there is no word: the interval is of the other seeds.
    """
    finite = [value for value in differences if math.isfinite(value)]
    if len(finite) < 2:
        return ["–", "–"]
    mean, low, high = interval(finite)
    word = words[0] if high < 0 else words[1] if low > 0 else words[2]
    return [f"{number(mean, '+.3g')} [{number(low, '+.3g')}, {number(high, '+.3g')}]",
            word if len(finite) == len(differences) else "–"]


def less(claim, paper, ours, theirs, words=VERDICTS):
    """A row: do our runs lose less than theirs?"""
    ours, theirs = lost(ours), lost(theirs)
    return [claim, paper, f"{mean_sd(ours, ' %')} against {mean_sd(theirs, ' %')}",
            *span([a - b for a, b in zip(ours, theirs)], words)]


def sooner(claim, paper, ours, theirs):
    """A row: do ours take fewer seconds? Medians.

    The ratio is the geometric mean over the seeds where both arrive.
    """
    both = [math.log(b / a) for a, b in zip(ours, theirs) if max(a, b) < math.inf]
    here = f"{number(np.median(ours))} s against {number(np.median(theirs))} s"
    if len(both) < len(ours):
        arrive = [sum(value < math.inf for value in values) for values in (ours, theirs)]
        here += f"; {arrive[0]} and {arrive[1]} of {len(ours)} seeds arrive"
    if len(both) < 2:
        return [claim, paper, here, "–", "–"]
    mean, low, high = np.exp(interval(both))
    return [claim, paper, here, f"× {mean:.3g} [{low:.3g}, {high:.3g}]",
            VERDICTS[0 if low > 1 else 1 if high < 1 else 2]]


def markdown(heading, rows):
    return "\n".join("| " + " | ".join(line) + " |"
                     for line in [heading, ["---"] * len(heading), *rows])

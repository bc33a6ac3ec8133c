"""How the claims compare runs: lost, medians and ranges over seeds, and a table's cells of them.

Lost is the share of the possible gain, J* - J(pi_ref), that a run ends without, on the training
prompts; infinite if it diverged. Differences are paired by seed, since a seed is one reference and
one feedback. A verdict needs all of them to agree in sign: of eight that chance alone would bring
about once in 128.
"""
import math

from lab import figures

# Words for: ours less on every seed, ours more on every seed, neither.
VERDICTS = ("replicates", "does not: the reverse", "does not: no difference shown")
ANSWERS = ("yes", "no: the reverse", "no difference shown")


# ---------------------------------------------------------------- figures
def lost(runs):
    """In percent."""
    return [100 * figures.lost(run) for run in runs]


def ended(runs):
    return [run for run in runs if "diverged" not in run]


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


def median(values):
    """The middle one, or the mean of the middle two; a run that diverged counts as infinite."""
    values = sorted(values)
    low, high = values[(len(values) - 1) // 2], values[len(values) // 2]
    return low if low == high else (low + high) / 2


# ---------------------------------------------------------------- cells
def number(value, form=".3g"):
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "∞"
    if abs(value) >= 100:
        form = form[:-2] + "0f"                                  # no exponents
    return f"{value:{form}}".replace("-", "−").replace("e−0", "e−")


def with_range(values, unit="", form=".2g"):
    """median (least to largest); how many are infinite, since they diverged, is told."""
    if not values:
        return "–"
    finite = [value for value in values if value < math.inf]
    text = f"{number(median(values), form)}{unit}"
    if len(values) > 1:
        text += f" ({number(min(values), form)} to {number(max(values), form)})"
    if len(finite) < len(values):
        text += f", {len(values) - len(finite)} of {len(values)} diverged"
    return text


def sign(differences, words):
    """The word for: all below 0, all above 0, neither."""
    if all(value < 0 for value in differences):
        return words[0]
    return words[1] if all(value > 0 for value in differences) else words[2]


def span(differences, words):
    """The median of paired differences with their range, and the word for their common sign.

    Where both diverged there is no difference, and no word.
    """
    if any(math.isnan(value) for value in differences):
        return ["–", "–"]
    return [f"{number(median(differences), '+.2g')} "
            f"[{number(min(differences), '+.2g')}, {number(max(differences), '+.2g')}]",
            sign(differences, words)]


def less(claim, paper, ours, theirs, words=VERDICTS):
    """A row: do our runs lose less than theirs?"""
    assert [run["seed"] for run in ours] == [run["seed"] for run in theirs], claim
    ours, theirs = lost(ours), lost(theirs)
    return [claim, paper, f"{with_range(ours, ' %')} against {with_range(theirs, ' %')}",
            *span([a - b for a, b in zip(ours, theirs)], words)]


def sooner(claim, paper, ours, theirs):
    """A row: do ours take fewer seconds? The ratio is theirs over ours; infinite over infinite is
    no ratio."""
    here = f"{number(median(ours))} s against {number(median(theirs))} s"
    arrive = [sum(value < math.inf for value in values) for values in (ours, theirs)]
    if min(arrive) < len(ours):
        here += f"; {arrive[0]} and {arrive[1]} of {len(ours)} seeds arrive"
    ratios = [b / a for a, b in zip(ours, theirs)]
    if any(math.isnan(ratio) for ratio in ratios):
        return [claim, paper, here, "–", "–"]
    return [claim, paper, here, f"× {number(median(ratios))} [{number(min(ratios))}, "
            f"{number(max(ratios))}]", sign([1 - ratio for ratio in ratios], VERDICTS)]


def markdown(heading, rows):
    return "\n".join("| " + " | ".join(line) + " |"
                     for line in [heading, ["---"] * len(heading), *rows])

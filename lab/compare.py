"""How the tables read runs, compare them and write a cell.

Differences are paired by seed, since a seed is one reference and one feedback. A verdict needs all
of them to agree in sign: of eight that chance alone would bring about once in 128.
"""
import math
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np

import train
from lab import figures
from lab.run import read_json

METHODS = tuple(train.METHODS)
# Words for: all differences below 0, all above 0, neither.
VERDICTS = ("replicates", "does not: the reverse", "does not: no difference shown")
ANSWERS = ("yes", "no: the reverse", "no difference shown")


# ---------------------------------------------------------------- which runs
def read(folder):
    """{name of a JSON file: what it says}, of those that are there; and "main", as if train.py had
    written it: the methods on the judge's reward, at level 0.

    A run is called by its method and, unless METHODS has a name for both, by what it has for
    f(x) + c: "una-score, from zero". The knobs of its cell are fields of it too.
    """
    told = {}
    for name in ("stored", "online", "budget"):
        if (path := Path(folder, f"{name}.json")).exists():
            told[name] = read_json(path)
            for kind in ("tuning", "runs", "watched", "models", "theory"):
                for entry in told[name].get(kind, ()):
                    entry |= entry.get("cell", {}) | dict(method=name_of(**entry))
    if {"stored", "online"} <= told.keys():
        told["main"] = told["stored"] | dict(runs=[
            run for name in METHODS for file in ("stored", "online")
            for run in reported(told[file], name)])
    return told


def name_of(method, offset="zero", **_):
    own = f"{method.removesuffix('-bce')}-{offset}"
    if offset == "zero" or method.endswith(offset):
        return method
    return own if own in METHODS else f"{method}, {offset}"


def pick(runs, **fields):
    return [run for run in runs if fields.items() <= run.items()]


def reported(file, name, level=0.0, reward="judge", judged=None, **fields):
    """Runs, one a seed; where a name has several cells, those in its best."""
    judged = judged or max([run["judged"] for run in file["runs"]])
    runs = pick(file["runs"], method=name, level=level, reward=reward, judged=judged, **fields)
    cells = [run["cell"] for run in runs]
    best = [{knob: value for knob, value in row["cell"].items() if knob != "steps"}
            for row in pick(file["tuning"], method=name, judged=judged, best=True)]
    cell = next((cell for cell in cells if cell in best), cells[0] if cells else None)
    return [run for run in runs if run["cell"] == cell]


def lost(runs):
    return [figures.lost(run) for run in runs]


def seconds(runs, goal=None):
    """Of training, or until a share of the possible gain is there."""
    if goal is None:
        return [run.get("seconds", math.inf) for run in runs]
    return [crossing([(point["seconds"], point["regret"] / run["curve"][0]["regret"])
                      for point in run.get("curve", ())], goal) for run in runs]


def crossing(points, goal):
    """At which x of points (x, lost) that share of the possible gain is there; −∞: from the first
    point on. Between two points, log lost is taken as linear."""
    allowed = 1 - goal
    if points and points[0][1] <= allowed:
        return -math.inf
    for (x, before), (beyond, after) in pairwise(points):
        if after <= allowed:
            endless = before == math.inf                         # then not before the later point
            done = 1 if endless else math.log(before / allowed) / math.log(before / after)
            return x + done * (beyond - x)
    return math.inf


# ---------------------------------------------------------------- cells
def number(value, form=".3g"):
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "∞" if value > 0 else "−∞"
    text = f"{value:{form}}"
    text = f"{value:{form[:-2]}0f}" if "e+" in text else text    # no exponents
    return text.replace("-", "−").replace("e−0", "e−")


def percent(share, form=".3g"):
    return f"{number(100 * share, form)} %"


def ranged(values, unit="", form=".2g", ends="()", to=" to "):
    """median (least to largest)"""
    middle, *both = (number(of(values), form) for of in (median, min, max))
    return f"{middle}{unit} {ends[0]}{to.join(both)}{ends[1]}"


def shares(values):
    return ranged([100 * value for value in values], " %") if values else "–"


def span(differences, words, form="+.2g", unit=""):
    """Two cells: the median of differences with their range, and the word for their common sign.
    Where both diverged there is no difference, and no word."""
    if any(math.isnan(value) for value in differences):
        return ["–", "–"]
    less, more = (all(times * value > 0 for value in differences) for times in (-1, 1))
    return [unit + ranged(differences, "", form, "[]", ", "),
            words[0 if less else 1 if more else 2]]


def less(ours, theirs, words=VERDICTS):
    """Three cells: do our runs lose less? Differences are in percent of the possible gain."""
    ours, theirs = lost(ours), lost(theirs)
    return [f"{shares(ours)} against {shares(theirs)}",
            *span([100 * (a - b) for a, b in zip(ours, theirs, strict=True)], words)]


def sooner(ours, theirs):
    """Three cells: are ours fewer seconds? The ratio is theirs over ours."""
    here = f"{number(median(ours))} s against {number(median(theirs))} s"
    arrive = [sum(value < math.inf for value in values) for values in (ours, theirs)]
    if min(arrive) < len(ours):
        here += f"; {arrive[0]} and {arrive[1]} of {len(ours)} seeds arrive"
    ratios = [b / a for a, b in zip(ours, theirs)]
    return [here, span(ratios, ANSWERS, ".3g", "× ")[0], span([1 - x for x in ratios], VERDICTS)[1]]


def correlation(xs, ys):
    """Of the ranks of two lists."""
    ranks = [np.argsort(np.argsort(values)) for values in (xs, ys)]
    return float(np.corrcoef(*ranks)[0, 1])


def bad(shares):
    """How many ended below the reference, or in no numbers."""
    return f"{sum(share > 1 for share in shares)} of {len(shares)}"


def cell_text(cell):
    words = dict(beta_multiple="β × ", anchor="α ", ramp="path ", steps="steps ")
    return ", ".join(words.get(knob, "") + f"{value:g}" for knob, value in cell.items())


def code(name, *more):
    method, *offset = name.split(", ")
    return ", ".join([f"`{method}`", *offset, *more])

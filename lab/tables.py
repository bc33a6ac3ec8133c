"""The tables of lab/README.md and its pictures, from the JSON files beside it.

    python -m lab tables

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
from lab.run import read_json, save

METHODS = tuple(train.METHODS)
FRESH = tuple(name for name in METHODS if train.METHODS[name].feedback == "fresh")
STORED = tuple(name for name in METHODS if name not in FRESH)
ONLINE = ("una-online", "ppo")
BROKEN = ("no word", "wrong word", "no end")                     # kinds of strings
SIZES = (1200, 9600, 76_800)                                     # judged responses
AT_ONCE, BY_PATH = dict(ramp=0), dict(ramp=0.5)                  # how f(x) + c gets there


# ---------------------------------------------------------------- which runs
def read(folder):
    """{name of a JSON file: what it says}; and "main", as if train.py had written it: the methods
    on the judge's reward, at level 0.

    A run is called by its method and, unless METHODS has a name for both, by what it has for
    f(x) + c: "una-score, from zero". The knobs of its cell are fields of it too.
    """
    told = {name: read_json(Path(folder, f"{name}.json"))
            for name in ("stored", "online", "budget", "noise")}
    for file in told.values():
        for kind in ("tuning", "runs", "models", "theory"):
            for entry in file.get(kind, ()):
                entry |= entry["cell"] | dict(method=name_of(**entry))
    told["main"] = told["stored"] | dict(runs=[run for name in METHODS for run in reported(
        told["online" if name in FRESH else "stored"], name)])
    return told


def name_of(method, offset="zero", **_):
    own = f"{method.removesuffix('-bce')}-{offset}"
    if offset == "zero" or method.endswith(offset):
        return method
    return own if own in METHODS else f"{method}, {offset}"


def pick(runs, **fields):
    return [run for run in runs if fields.items() <= run.items()]


def reported(file, name, level=0.0, reward="judge", judged=SIZES[-1], **fields):
    """Runs, one a seed; where a name has several cells, those in its best."""
    runs = pick(file["runs"], method=name, level=level, reward=reward, judged=judged, **fields)
    best = [{knob: value for knob, value in row["cell"].items() if knob != "steps"}
            for row in pick(file["tuning"], method=name, judged=judged, best=True)]
    runs = [run for run in runs if run["cell"] in best] or runs
    return [run for run in runs if run["cell"] == runs[0]["cell"]]


def lost(runs):
    return [figures.lost(run) for run in runs]


def ended(runs):
    return [run for run in runs if "diverged" not in run]


def seconds(runs):
    return [run.get("seconds", math.inf) for run in runs]


def seconds_until(run, allowed=0.01):
    """When at most `allowed` of the gain is lost; log lost is linear between the curve's points."""
    curve = run.get("curve", ())
    points = [(point["seconds"], -math.log(point["regret"] / curve[0]["regret"]))
              for point in curve]
    for (x, before), (beyond, after) in pairwise(points):
        if after >= -math.log(allowed):
            return float(np.interp(-math.log(allowed), (before, after), (x, beyond)))
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


def medians(runs, *of):
    return [percent(median(run["train"].get(part, math.nan) for run in ended(runs)), ".2g")
            for part in of]


def lost_and_parts(runs):
    """Two cells: what was lost, and the medians of its two parts."""
    return [shares(lost(runs)), " + ".join(medians(runs, "judged", "unjudged")) if runs else "–"]


def bad(shares):
    """How many ended below the reference, or in no numbers."""
    return f"{sum(share > 1 for share in shares)} of {len(shares)}"


def cell_text(cell):
    words = dict(beta_multiple="β × ", anchor="α ", ramp="path ", steps="steps ")
    return ", ".join(words.get(knob, "") + f"{value:g}" for knob, value in cell.items()
                     if knob != "loss")


def code(name, *more):
    method, *offset = name.split(", ")
    return ", ".join([f"`{method}`", *offset, *more])


# ---------------------------------------------------------------- comparisons
# Words for: all differences below 0, all above 0, neither.
VERDICTS = ("replicates", "does not: the reverse", "does not: no difference shown")


def verdict(differences, words):
    return words[0 if max(differences) < 0 else 1 if min(differences) > 0 else 2]


def less(ours, theirs, words=VERDICTS):
    """Three cells: do our runs lose less? Differences are in percent of the possible gain."""
    differences = [100 * (a - b) for a, b in zip(lost(ours), lost(theirs), strict=True)]
    return [f"{shares(lost(ours))} against {shares(lost(theirs))}",
            ranged(differences, "", "+.2g", "[]", ", "), verdict(differences, words)]


def sooner(ours, theirs):
    """Three cells: are ours fewer seconds? The ratio is theirs over ours."""
    here = f"{number(median(ours))} s against {number(median(theirs))} s"
    arrive = [sum(value < math.inf for value in values) for values in (ours, theirs)]
    if min(arrive) < len(ours):
        here += f"; {arrive[0]} and {arrive[1]} of {len(ours)} seeds arrive"
    return [here, "× " + ranged([b / a for a, b in zip(ours, theirs)], "", ".3g", "[]", ", "),
            verdict([a - b for a, b in zip(ours, theirs)], VERDICTS)]


# ---------------------------------------------------------------- stored.json
# A table is a list of rows, the heading first, and a row of cells.
OFFSETS = (
    ("scores: 0, `una-score`", "una-score", {}),
    ("… learned, from 0", "una-score, from zero", {}),
    ("… learned, from where it is balanced: `una-score-learned`", "una-score-learned", {}),
    ("… estimated, at once", "una-score-estimated", AT_ONCE),
    ("… estimated, by the path", "una-score-estimated", BY_PATH),
    ("labels: 0, `una-binary-bce`", "una-binary-bce", {}),
    ("… learned, from 0", "una-binary-bce, from zero", {}),
    ("… learned, from where it is balanced: `una-binary-learned`", "una-binary-learned", {}),
    ("… the exact β log Z(x), at once", "una-binary-bce, exact", AT_ONCE),
    ("… the exact β log Z(x), by the path", "una-binary-bce, exact", BY_PATH))


def stored_tables(stored):
    kinds = [["method", "lost", "above 100 %", "judged", "unjudged", "mass unjudged", "held-out"]]
    masses = [["mass", *BROKEN, "wrong noun", "held-out: breaks the grammar"]]
    for name in STORED:
        runs = reported(stored, name)
        kinds.append([code(name), shares(lost(runs)), bad(lost(runs)),
                      *medians(runs, "judged", "unjudged", "unjudged_mass"),
                      shares([run["heldout"]["lost"] for run in ended(runs)])])
        masses.append([code(name), *(shares([run["train"]["mass"][kind] for run in ended(runs)])
                                     for kind in (*BROKEN, "wrong noun")),
                       shares([sum(run["heldout"]["mass"][kind] for kind in BROKEN)
                               for run in ended(runs)])])
    paths = [["f(x) + c", "level 0: lost", "judged + unjudged", "level 1: lost", "off β log Z by"]]
    for words, name, fields in OFFSETS:
        both = [reported(stored, name, level, **fields) for level in (0.0, 1.0)]
        errors = [[run["offset_error"] for run in runs if "offset_error" in run] for runs in both]
        paths.append([words, *lost_and_parts(both[0]), shares(lost(both[1])),
                      " · ".join(number(median(of), ".2g") for of in errors if of) or "–"])
    return dict(stored=kinds, masses=masses, paths=paths, stored_grids=grids(stored))


def grids(file):
    rows = [["grid", "best cell: learning rate, …", "tuning seeds: lost", "their mean", "cells"]]
    for name, judged in dict.fromkeys((row["method"], row["judged"]) for row in file["tuning"]):
        grid = pick(file["tuning"], method=name, judged=judged)
        (best,) = pick(grid, best=True)
        more = [f"from {judged:,}"] * ("models" in file)
        rows.append([code(name, *more), cell_text(best["cell"]), shares(best["lost"]),
                     percent(sum(best["lost"]) / len(best["lost"])), f"{len(grid)}"])
    return rows


# ---------------------------------------------------------------- the paper's claims
# The paper's averages on two leaderboards.
PAPER = {"una-binary-mse": "28.88 / 63.12", "una-binary-bce": "28.93 / 63.06",
         "una-score": "30.92 / 64.35", "kto": "28.56 / 62.74", "dpo": "28.53 / 62.26",
         "una-online": "25.91 / 56.13", "ppo": "25.36 / 55.68", "hours": "3.5 h against 8 h: 2.3 ×"}


def claims_table(told):
    stored, online = told["stored"], told["online"]

    def versus(words, ours, theirs, said=None, verdicts=VERDICTS, file=stored, **fields):
        return [words, said or f"{PAPER[ours]} against {PAPER[theirs]}", *less(
            reported(file, ours, **fields), reported(file, theirs, **fields), verdicts)]

    mse, bce, score, kto = "una-binary-mse", "una-binary-bce", "una-score", "kto"
    pair, dpo = (ended(reported(stored, name)) for name in ("una-pair", "dpo"))
    ours, theirs = (reported(online, name) for name in ONLINE)
    off = max(abs(a["train"][figure] - b["train"][figure]) for a, b in zip(pair, dpo)
              for figure in ("reward", "kl", "objective", "judged"))
    states = [median(run["state_bytes"] for run in ended(of)) for of in (ours, theirs)]
    spread = [max(lost(of)) - min(lost(of)) for of in (ours, theirs)]
    yes_or_no, can = ("does not", "replicates"), (
        "it can, and loses less", "it can, but loses more", "it can; no difference shown")
    mixed = "one run can use all three kinds of feedback: mixed against"
    return [
        ["claim", "paper's figures", "here: lost", "difference", "verdict"],
        [*versus("pairwise UNA is DPO", "una-pair", "dpo", "“equivalent”")[:3],
         f"largest of any figure: {number(off, '.2g')}", yes_or_no[off == 0]],
        versus("binary UNA (MSE) beats KTO", mse, kto),
        versus("binary UNA (BCE) beats KTO", bce, kto),
        versus("score UNA beats binary UNA (MSE)", score, mse),
        versus("score UNA beats binary UNA (BCE)", score, bce),
        versus("score UNA beats KTO", score, kto), versus("score UNA beats DPO", score, "dpo"),
        versus("online UNA beats RLHF/PPO: Eq. 7, the judge's reward", *ONLINE, file=online),
        versus("… Eq. 9 with f = c = 0, which the paper's experiments use", "una-online-score",
               "ppo", "the same", file=online),
        versus("… Eq. 7 on a reward model's reward", *ONLINE, "the same", file=online,
               reward="model"),
        ["it is faster: as many samples", PAPER["hours"], *sooner(seconds(ours), seconds(theirs))],
        ["… until 99 % of the gain", "–", *sooner(*([*map(seconds_until, of)]
                                                    for of in (ours, theirs)))],
        ["it needs less memory: weights, gradients and optimiser state", "no figure",
         f"{states[0] / states[1]:.3g} of PPO's", "–", yes_or_no[states[0] < states[1]]],
        ["it is more stable: largest minus least lost over the seeds", "no figure",
         " against ".join(percent(share, ".2g") for share in spread), "–",
         yes_or_no[spread[0] < spread[1]]],
        *(versus(f"{mixed} {words} alone", "una-mixed", name, "no figure", can)
          for words, name in (("pairs", "una-pair"), ("labels", bce), ("scores", score))),
        *(versus(f"… with an anchor and f(x) + c, against {words}", "una-mixed-estimated", name,
                 "–", can)
          for words, name in (("anchored pairs", "una-pair-anchored"),
                              ("labels that learn it", "una-binary-learned"),
                              ("scores that estimate it", "una-score-estimated")))]


# ---------------------------------------------------------------- online.json
# Of a prompt's 16 samples so many are stored ones; what stands for f(x) + c, or weighs them.
SAMPLES = (("`una-online`", "una-online", {}),
           ("… 2 of 16 stored", "una-online-stored", dict(stored=0.125)),
           ("… 4 of 16 stored: `una-online-stored`", "una-online-stored", {}),
           ("… 8 of 16 stored", "una-online-stored", dict(stored=0.5)),
           ("… 4 of 16, f(x) + c of fresh ones alone", "una-online-stored", dict(loss="own mean")),
           ("`rloo`, 4 of 16, importance weights", "rloo", dict(stored=0.25, loss="weighted rloo")),
           ("`ppo`", "ppo", {}), ("… 4 of 16 stored", "ppo", dict(stored=0.25)),
           ("… 4 of 16, importance weights", "ppo", dict(stored=0.25, loss="weighted ppo")))
GRPO = (("as in its paper", {}), ("advantages not divided", dict(loss="undivided")),
        ("… and k₂ of each token for k₃", dict(loss="undivided, k2")))


def varied(runs, name, **knobs):
    """A method's runs on the judge's reward at level 0 with just these knobs beside its grid's."""
    return [run for run in pick(runs, method=name, level=0.0, reward="judge") if knobs == {
        knob: run["cell"][knob] for knob in ("stored", "loss", "collapsed") if knob in run["cell"]}]


def online_tables(online):
    rows = [["method", "lost", "above 100 %", "judged", "unjudged", "seconds", "state"]]
    for name, reward in [(name, "judge") for name in FRESH] + [(name, "model") for name in ONLINE]:
        runs = reported(online, name, reward=reward)
        state = number(median(run["state_bytes"] for run in ended(runs)) / 1e6)
        rows.append([code(name, *["reward model"] * (reward == "model")), shares(lost(runs)),
                     bad(lost(runs)), *medians(runs, "judged", "unjudged"),
                     number(median(seconds(runs))), f"{state} MB"])
    grpo = [["GRPO", "β", "theory, endless groups: lost", "theory, groups of 16: lost",
             "trained: lost"]]
    for words, knobs in GRPO:
        found, theory = (varied(online[of], "grpo", **knobs) for of in ("runs", "theory"))
        grpo.append([words, cell_text(dict(beta_multiple=found[0]["beta_multiple"])),
                     shares(lost(theory)), shares([of["grouped"]["lost"] for of in theory]),
                     shares(lost(found))])
    samples = [["samples", "from the reference: lost", "from a collapsed policy: lost"]]
    samples += [[words, *(shares(lost(varied(online["runs"], name, **knobs, **more)))
                          for more in ({}, dict(collapsed=True)))]
                for words, name, knobs in SAMPLES]
    return dict(online=rows, online_grids=grids(online), grpo=grpo, samples=samples)


# ---------------------------------------------------------------- budget.json
BUDGET = (("pairs: `dpo`", "dpo", {}),
          ("… with an anchor: `una-pair-anchored`", "una-pair-anchored", {}),
          ("labels: f(x) + c = 0, `una-binary-bce`", "una-binary-bce", {}),
          ("… learned: `una-binary-learned`", "una-binary-learned", {}),
          ("scores: 0, `una-score`", "una-score", {}),
          ("… estimated, at once", "una-score-estimated", AT_ONCE),
          ("… estimated, by the path: `una-score-estimated`", "una-score-estimated", BY_PATH),
          ("… learned: `una-score-learned`", "una-score-learned", {}),
          ("… learned, from 0", "una-score, from zero", {}))
OTHER_CELLS = (("`dpo` at the task's β", "dpo", dict(beta_multiple=1)),
               ("labels with the exact β log Z(x), at once", "una-binary-bce, exact", AT_ONCE),
               ("scores with the estimate, at once", "una-score-estimated", AT_ONCE))


def at_size(told, name, size, **fields):
    """Runs at level 1: budget.json's, or stored.json's. Pairs see no level, and have 0 there."""
    level = 0.0 if name in ("dpo", "una-pair-anchored") else 1.0
    return (reported(told["budget"], name, 1.0, judged=size, **fields)
            or reported(told["stored"], name, level, judged=size, **fields))


def budget_tables(told):
    sizes = [["lost", *(words for size in SIZES for words in (
        f"from {size:,}", "judged + unjudged"))]]
    sizes += [[words, *(cell for size in SIZES
                        for cell in lost_and_parts(at_size(told, name, size, **fields)))]
              for words, name, fields in BUDGET]
    cells = [["in their own best cell", "cell", "lost", "judged + unjudged"]]
    for words, name, fields in OTHER_CELLS:
        runs = reported(told["budget"], name, **fields)
        cells.append([words, cell_text(runs[0]["cell"]), *lost_and_parts(runs)])
    models = [["pairs", "its optimum: lost by the judge", "judged + unjudged",
               "reward gained, by the model", "by the judge", "`dpo` on the same pairs"]]
    for size in SIZES:
        (best,) = pick(told["budget"]["tuning"], method="reward model", judged=size, best=True)
        optima = [optimum for model in pick(told["budget"]["models"], judged=size)
                  for optimum in pick(model["optima"], beta_multiple=best["beta_multiple"])]
        models.append([f"{size // 2:,}, β × {best['beta_multiple']:g}", *lost_and_parts(optima),
                       *(ranged([optimum["gained"][by] for optimum in optima]) for by in (0, 1)),
                       shares(lost(at_size(told, "dpo", size)))])
    return dict(sizes=sizes, other_cells=cells, models=models, budget_grids=grids(told["budget"]))


def learning(told):
    """{line: [(judged responses, what each seed lost)]}, of online methods on their way."""
    found = {name + " at once" * (fields == AT_ONCE): [
        (size, lost(runs)) for size in SIZES if (runs := at_size(told, name, size, **fields))]
        for _, name, fields in BUDGET}
    for name in ONLINE:
        runs = reported(told["online"], name)
        curves = [run["curve"] for run in ended(runs)]
        found[f"{name}, fresh"] = [
            (points[0]["step"] * runs[0]["judged"] // runs[0]["steps"],
             [point["regret"] / curve[0]["regret"] for point, curve in zip(points, curves)]
             + [math.inf] * (len(runs) - len(curves))) for points in [*zip(*curves)][1:]]
    return found


# ---------------------------------------------------------------- noise.json
# Beside runs without noise stand those of the same name with it; of pairs at the task's beta dpo's.
NOISE = (("pairs at the task's β, each in its best cell", "una-pair", {}),
         ("… in the best cell with noise", "una-pair", dict(learning_rate=5e-4)),
         ("… with an anchor: `una-pair-anchored`", "una-pair-anchored", {}),
         ("labels with the exact β log Z(x), by the path", "una-binary-bce, exact", {}),
         ("`una-mixed-estimated`", "una-mixed-estimated", {}))


def noise_table(told):
    rows = [["feedback", "as drawn: lost", "judged + unjudged", "without noise: lost",
             "judged + unjudged"]]
    for words, name, fields in NOISE:
        drawn = (reported(told["budget"], "dpo", beta_multiple=1) if name == "una-pair"
                 else reported(told["stored"], name))
        rows.append([words, *lost_and_parts(drawn),
                     *lost_and_parts(reported(told["noise"], name, **fields))])
    return rows


# ---------------------------------------------------------------- the page
def tables(told):
    """{name: Markdown}"""
    made = dict(claims=claims_table(told), noise=noise_table(told)) | stored_tables(told["stored"])
    made |= online_tables(told["online"]) | budget_tables(told)
    made["noise_grids"] = grids(told["noise"])
    return {name: "\n".join(f"| {' | '.join(row)} |" for row in [
        rows[0], ["---"] * len(rows[0]), *rows[1:]]) for name, rows in made.items()}


def filled(page, texts):
    """The page with its tables, each between <!-- its name --> and the next <!-- end -->."""
    for name, text in texts.items():
        before, marker, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        page = f"{before}{marker}\n{text}\n\n{end}{after}"
    return page


def fill(folder):
    """Tables and pictures of a folder's JSON files, in this page's words."""
    told = read(folder)
    page = filled(Path(__file__).with_name("README.md").read_text(encoding="utf-8"), tables(told))
    save(Path(folder, "README.md"), lambda path: Path(path).write_text(page, encoding="utf-8"))
    figures.draw_all(told["main"], folder)
    figures.picture(folder, "judgements.png", figures.draw_judgements, learning(told),
                    figsize=(8.5, 5))

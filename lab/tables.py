"""The tables of lab/README.md and its pictures, from the JSON files beside it.

    python -m lab tables
"""
import math
from pathlib import Path
from statistics import median

import train
from lab import figures
from lab.compare import (
    METHODS,
    VERDICTS,
    bad,
    cell_text,
    code,
    correlation,
    less,
    lost,
    number,
    percent,
    pick,
    ranged,
    read,
    reported,
    seconds,
    shares,
    sooner,
)
from lab.run import save

# The paper's averages on two leaderboards.
PAPER = {"una-binary-mse": "28.88 / 63.12", "una-binary-bce": "28.93 / 63.06",
         "una-score": "30.92 / 64.35", "kto": "28.56 / 62.74", "dpo": "28.53 / 62.26",
         "una-online": "25.91 / 56.13", "ppo": "25.36 / 55.68", "hours": "3.5 h against 8 h: 2.3 ×"}
ONLINE = ("una-online", "ppo")
FRESH = tuple(name for name in METHODS if train.METHODS[name].feedback == "fresh")
STORED = tuple(name for name in METHODS if name not in FRESH)
BROKEN = ("no word", "wrong word", "no end")                     # kinds of strings


def parts(runs, part):
    return [run["train"].get(part, math.nan) for run in runs if "diverged" not in run]


def broken(run, split="train"):
    """A policy's probability of breaking the grammar."""
    return sum(run[split]["mass"][kind] for kind in BROKEN)


# ---------------------------------------------------------------- stored.json
# A table is a list of rows, the heading first, and a row of cells.
def stored_tables(stored):
    def runs(name, level=0.0, **fields):
        return reported(stored, name, level, **fields)

    made, measured = {}, [name for name in STORED if runs(name)]
    rows = made["stored"] = [["method", "lost", "above 100 %", "judged", "unjudged",
                              "mass unjudged", "held-out"]]
    rows += [[code(name), shares(lost(its := runs(name))), bad(lost(its)),
              *(percent(median(parts(its, part)), ".2g")
                for part in ("judged", "unjudged", "unjudged_mass")),
              shares([run["heldout"]["lost"] for run in its if "diverged" not in run])]
             for name in measured]
    rows = made["masses"] = [["mass", *BROKEN, "wrong noun", "held-out: breaks the grammar",
                              "mean log π/π_ref", "its rank with unjudged"]]
    for name in measured:
        its = [run for run in runs(name) if "diverged" not in run]
        rows.append([code(name), *(shares([run["train"]["mass"][kind] for run in its])
                                   for kind in (*BROKEN, "wrong noun")),
                     shares([broken(run, "heldout") for run in its]),
                     ranged(rho := [run["mean_rho"] for run in its]),
                     number(correlation(rho, parts(its, "unjudged")), ".2f")])
    rows = made["paths"] = [["f(x) + c", "one level: lost", "a level for each noun: lost",
                             "off β log Z by"]]
    for words, name, fields in (
            ("scores: 0, `una-score`", "una-score", {}),
            ("… learned, from 0", "una-score, from zero", {}),
            ("… learned, from where it is balanced: `una-score-learned`", "una-score-learned", {}),
            ("… estimated, at once", "una-score-estimated", dict(ramp=0)),
            ("… estimated, by the path", "una-score-estimated", dict(ramp=0.5)),
            ("labels: 0, `una-binary-bce`", "una-binary-bce", {}),
            ("… learned, from 0", "una-binary-bce, from zero", {}),
            ("… learned, from where it is balanced: `una-binary-learned`", "una-binary-learned",
             {}),
            ("… the exact β log Z(x), at once", "una-binary-bce, exact", dict(ramp=0)),
            ("… the exact β log Z(x), by the path", "una-binary-bce, exact", dict(ramp=0.5))):
        both = [runs(name, level, **fields) for level in (0.0, 1.0)]
        errors = [[run["offset_error"] for run in of if "offset_error" in run] for of in both]
        rows.append([words, *(shares(lost(of)) for of in both),
                     " · ".join(number(median(of), ".2g") for of in errors if of) or "–"])
    made["stored_grids"] = grids(stored)
    return made


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
def claims_table(told):
    stored, online = told["stored"], told["online"]

    def versus(words, ours, theirs, said=None, verdicts=VERDICTS, file=stored, **fields):
        return [words, said or f"{PAPER[ours]} against {PAPER[theirs]}", *less(
            reported(file, ours, **fields), reported(file, theirs, **fields), verdicts)]

    mse, bce, score, kto = "una-binary-mse", "una-binary-bce", "una-score", "kto"
    pair, dpo = (reported(stored, name) for name in ("una-pair", "dpo"))
    ours, theirs = (reported(online, name) for name in ONLINE)
    off = max(abs(a["train"][figure] - b["train"][figure]) for a, b in zip(pair, dpo)
              for figure in ("reward", "kl", "objective", "judged"))
    states = [median(run["state_bytes"] for run in of) for of in (ours, theirs)]
    spread = [max(lost(of)) - min(lost(of)) for of in (ours, theirs)]
    verdict, can = ("does not", "replicates"), (
        "it can, and loses less", "it can, but loses more", "it can; no difference shown")
    mixed = "one run can use all three kinds of feedback: mixed against"
    return [
        ["claim", "paper's figures", "here: lost", "difference", "verdict"],
        [*versus("pairwise UNA is DPO", "una-pair", "dpo", "“equivalent”")[:3],
         f"largest of any figure: {number(off, '.2g')}", verdict[off == 0]],
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
        ["… until 99 % of the gain", "–", *sooner(seconds(ours, 0.99), seconds(theirs, 0.99))],
        ["it needs less memory: weights, gradients and optimiser state", "no figure",
         f"{states[0] / states[1]:.3g} of PPO's", "–", verdict[states[0] < states[1]]],
        ["it is more stable: largest minus least lost over the seeds", "no figure",
         " against ".join(percent(share, ".2g") for share in spread), "–",
         verdict[spread[0] < spread[1]]],
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
           ("`rloo`, 4 of 16, importance weights", "rloo",
            dict(stored=0.25, loss="weighted rloo")),
           ("`ppo`", "ppo", {}), ("… 4 of 16 stored", "ppo", dict(stored=0.25)),
           ("… 4 of 16, importance weights", "ppo", dict(stored=0.25, loss="weighted ppo")))
GRPO = (("as in its paper", {}), ("advantages not divided", dict(loss="undivided")),
        ("… and k₂ of each token for k₃", dict(loss="undivided, k2")))


def varied(runs, name, **knobs):
    """A method's runs on the judge's reward at level 0 with just these knobs beside its grid's."""
    return [run for run in pick(runs, method=name, level=0.0, reward="judge") if knobs == {
        knob: run["cell"][knob] for knob in ("stored", "loss", "collapsed") if knob in run["cell"]}]


def online_tables(online):
    def runs(name, **fields):
        return reported(online, name, **fields)

    rows = [["method", "lost", "above 100 %", "judged", "unjudged", "seconds", "state"]]
    for name, reward in [(name, "judge") for name in FRESH if runs(name)] + [
            (name, "model") for name in ONLINE]:
        its = runs(name, reward=reward)
        rows.append([code(name, *["reward model"] * (reward == "model")), shares(lost(its)),
                     bad(lost(its)), *(percent(median(parts(its, part)), ".2g")
                                       for part in ("judged", "unjudged")),
                     number(median(seconds(its))),
                     f"{number(median(run['state_bytes'] for run in its) / 1e6)} MB"])
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
SIZES = (1200, 9600, 76_800)                                     # judged responses
BUDGET = (("pairs: `dpo`", "dpo", {}),
         ("… with an anchor: `una-pair-anchored`", "una-pair-anchored", {}),
         ("labels: f(x) + c = 0, `una-binary-bce`", "una-binary-bce", {}),
         ("… learned: `una-binary-learned`", "una-binary-learned", {}),
         ("scores: 0, `una-score`", "una-score", {}),
         ("… estimated, at once", "una-score-estimated", dict(ramp=0)),
         ("… estimated, by the path: `una-score-estimated`", "una-score-estimated",
          dict(ramp=0.5)),
         ("… learned: `una-score-learned`", "una-score-learned", {}),
         ("… learned, from 0", "una-score, from zero", {}))
OTHER_CELLS = (("`dpo` at the task's β", "dpo", dict(beta_multiple=1)),
               ("labels with the exact β log Z(x), at once", "una-binary-bce, exact",
                dict(ramp=0)),
               ("scores with the estimate, at once", "una-score-estimated", dict(ramp=0)))


def at_size(told, name, size, **fields):
    """Runs at level 1: budget.json's or else stored.json's, where pairs, which do not see levels,
    have level 0."""
    level = 0.0 if name in ("dpo", "una-pair-anchored") else 1.0
    return (reported(told["budget"], name, 1.0, judged=size, **fields)
            or reported(told["stored"], name, level, judged=size, **fields))


def lost_and_parts(runs):
    """Two cells: what was lost, and the medians of its two parts."""
    both = " + ".join(percent(median(parts(runs, part)), ".2g")
                      for part in ("judged", "unjudged")) if runs else "–"
    return [shares(lost(runs)), both]


def budget_tables(told):
    rows = [["lost", *(words for size in SIZES for words in (
        f"from {size:,}", "= judged + unjudged"))]]
    for words, name, fields in BUDGET:
        rows.append([words, *(cell for size in SIZES for cell in lost_and_parts(
            at_size(told, name, size, **fields)))])
    cells = [["in their own best cell", "cell", "lost", "judged + unjudged"]]
    for words, name, fields in OTHER_CELLS:
        runs = reported(told["budget"], name, **fields)
        cells.append([words, cell_text(runs[0]["cell"]), *lost_and_parts(runs)])
    models = [["pairs", "its optimum: lost by the judge", "= judged + unjudged",
               "reward gained, by the model", "by the judge", "`dpo` on the same pairs"]]
    for size in SIZES:
        made = pick(told["budget"]["models"], judged=size)
        models.append([
            f"{size // 2:,}, β × {made[0]['beta_multiple']:g}",
            *lost_and_parts([it["optimum"] for it in made]),
            *(ranged([it["optimum"][by]["reward"] - it["reference"][by]["reward"] for it in made])
              for by in ("by_model", "train")),
            shares(lost(at_size(told, "dpo", size)))])
    return dict(sizes=rows, other_cells=cells, models=models, budget_grids=grids(told["budget"]))


def learning(told):
    """{line: [(judged responses, what each seed lost)]}, of online methods on their way."""
    found = {name + " at once" * (fields == dict(ramp=0)): [
        (size, lost(runs)) for size in SIZES if (runs := at_size(told, name, size, **fields))]
        for _, name, fields in BUDGET}
    for name in ONLINE:
        runs = reported(told["online"], name)
        curves = [run["curve"] for run in runs if "diverged" not in run]
        found[f"{name}, fresh"] = [
            (points[0]["step"] * runs[0]["judged"] // runs[0]["steps"],
             [point["regret"] / curve[0]["regret"] for point, curve in zip(points, curves)]
             + [math.inf] * (len(runs) - len(curves))) for points in [*zip(*curves)][1:]]
    return found


# ---------------------------------------------------------------- the page
def tables(told):
    """{name: Markdown}, of the files that are there."""
    made = {}
    for needs, of in ((("stored",), lambda: stored_tables(told["stored"])),
                      (("online",), lambda: online_tables(told["online"])),
                      (("stored", "online"), lambda: dict(claims=claims_table(told))),
                      (("stored", "budget"), lambda: budget_tables(told))):
        made |= of() if {*needs} <= told.keys() else {}
    texts = {name: "\n".join(f"| {' | '.join(row)} |" for row in [
        rows[0], ["---"] * len(rows[0]), *rows[1:]]) for name, rows in made.items()}
    if "main" in told:
        texts["full"] = f"```\n{figures.table(told['main'])}\n```"
    return texts


def filled(page, texts):
    """The page with its tables, each between <!-- its name --> and the next <!-- end -->."""
    for name, text in texts.items():
        before, marker, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        page = f"{before}{marker}\n{text}\n\n{end}{after}" if end else page
    return page


def fill(folder):
    """Tables and pictures of folder/README.md; where there is none, of a copy of this one."""
    told, path = read(folder), Path(folder, "README.md")
    page = path if path.exists() else Path(__file__).with_name("README.md")
    page = filled(page.read_text(encoding="utf-8"), tables(told))
    save(path, lambda partial: Path(partial).write_text(page, encoding="utf-8"))
    if "main" in told:
        figures.draw_claims(told["main"], told["stored"]["watched"], folder)
    if {"stored", "online", "budget"} <= told.keys():
        figures.picture(folder, "judgements.png", figures.draw_judgements, learning(told),
                        figsize=(8.5, 5))

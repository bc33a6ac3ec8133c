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
    at_most,
    bad,
    cell_text,
    code,
    correlation,
    less,
    lost,
    needed,
    number,
    percent,
    pick,
    predicted,
    ranged,
    read,
    reported,
    seconds,
    shares,
    sooner,
    span,
)
from lab.run import save

# The paper's averages on two leaderboards.
PAPER = {"una-binary-mse": "28.88 / 63.12", "una-binary-bce": "28.93 / 63.06",
         "una-score": "30.92 / 64.35", "kto": "28.56 / 62.74", "dpo": "28.53 / 62.26",
         "una-online": "25.91 / 56.13", "ppo": "25.36 / 55.68", "hours": "3.5 h against 8 h: 2.3 ×"}
ONLINE = ("una-online", "ppo")
FRESH = tuple(name for name in METHODS if train.METHODS[name].feedback == "fresh")
STORED = tuple(name for name in METHODS if name not in FRESH)
# How many judgements a response needs: a pair is one of two. A third of una-mixed's are in pairs.
JUDGEMENTS = {"dpo": 1 / 2, "kto": 1, "una-binary-bce": 1, "una-binary-bce, from zero": 1,
              "una-score": 1, "una-score-estimated": 1, "una-score, from zero": 1,
              "una-mixed": 5 / 6}
ANEW = "76,800 labels and scores are to be tuned anew at level 1", None
EXPLOITED = ("no: the judge sees more", "yes", "no difference shown")
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

    made = {}
    rows = made["stored"] = [["method", "lost", "above 100 %", "judged", "unjudged",
                              "mass unjudged", "held-out"]]
    rows += [[code(name), shares(lost(its := runs(name))), bad(lost(its)),
              *(percent(median(parts(its, part)), ".2g")
                for part in ("judged", "unjudged", "unjudged_mass")),
              shares([run["heldout"]["lost"] for run in its if "diverged" not in run])]
             for name in STORED]
    rows = made["masses"] = [["mass", *BROKEN, "wrong noun", "held-out: breaks the grammar",
                              "mean log π/π_ref", "its rank with unjudged"]]
    for name in STORED:
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
    made["stored_predictions"] = stored_predictions(stored, runs)
    return made


def stored_predictions(stored, runs):
    def of(name, *what, **fields):
        return median(lost(runs(name, *what, **fields)))

    def judged(name):
        return median([run["train"]["judged"] / run["train"]["lost"] for run in runs(name)])

    biased = [judged(name) for name in ("una-score", "una-binary-mse", "una-binary-bce", "kto")]
    leaking = [1 - judged(name) for name in ("dpo", "una-pair-anchored", "una-score-estimated",
                                             "una-score-learned")]
    anchored, dpo = lost(runs("una-pair-anchored")), of("dpo")
    above = [name for name in STORED if max(lost(runs(name))) > 1]
    steps, at_once = (lost(runs("una-score-estimated", ramp=ramp)) for ramp in (0.5, 0))
    fewer = sum(a < b for a, b in zip(steps, at_once))
    path, leap = (of("una-binary-bce, exact", ramp=ramp) for ramp in (0.5, 0))
    begun = [(of(name), of(f"{method}, from zero")) for name, method in (
        ("una-binary-learned", "una-binary-bce"), ("una-score-learned", "una-score"))]
    cured, *others = (of(name) for name in ("una-mixed-estimated", "una-pair-anchored",
                                            "una-binary-learned"))
    levels = [(of(name, 1.0), of(name)) for name in ("una-score-estimated", "una-binary-learned")]
    every = [run for name in STORED for run in runs(name) if "diverged" not in run]
    rank = correlation([run["mean_rho"] for run in every],
                       [run["train"]["unjudged"] for run in every])
    held, train = (median([broken(run, split) for run in runs("dpo")])
                   for split in ("heldout", "train"))
    both = " and ".join
    return predicted(
        stored, bias=(", ".join(percent(share, ".2g") for share in biased), min(biased) >= 0.75),
        leak=(", ".join(percent(share, ".2g") for share in leaking), min(leaking) >= 0.5),
        anchor=(f"{percent(median(anchored))} against {percent(dpo)}, at most "
                f"{percent(max(anchored))}", median(anchored) <= dpo / 2 and max(anchored) <= 0.5),
        above=(", ".join(map(code, above)) or "none", {*above} == {"dpo", "una-pair"}),
        path=(f"on {fewer} of {len(steps)}", fewer >= 6), labels=at_most(path, 0.5, leap),
        begin=(both(f"{percent(a)} against {percent(b)}" for a, b in begun),
               all(a < b for a, b in begun)),
        mixed=(f"{percent(cured)} against {both(map(percent, others))}", cured < min(others)),
        levels=(both(f"{percent(a)} of {percent(b)}" for a, b in levels),
                all(a <= 2 * b for a, b in levels)),
        warning=(number(rank, ".2f"), rank <= -0.7),
        heldout=at_most(held, math.inf, train)[:1] + (held >= train / 2,))


def grids(file):
    rows = [["grid", "best cell: learning rate, …", "tuning seeds: lost", "their mean", "cells"]]
    for name, level, reward in dict.fromkeys((row["method"], row["level"], row["reward"])
                                             for row in file["tuning"]):
        grid = pick(file["tuning"], method=name, level=level, reward=reward)
        (best,) = pick(grid, best=True)
        more = ["level 1"] * (level == 1) + ["reward model"] * (reward == "model")
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
    for name, reward in [(name, "judge") for name in FRESH] + [(name, "model") for name in ONLINE]:
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
    return dict(online=rows, online_grids=grids(online), grpo=grpo, samples=samples,
                online_predictions=online_predictions(online))


def online_predictions(online):
    def of(name, **knobs):
        return lost(varied(online["runs"], name, **knobs))

    una, stored, ppo, rloo, score = (of(name) for name in (
        "una-online", "una-online-stored", "ppo", "rloo", "una-online-score"))
    signs = [span([a - b for a, b in zip(*two)], ("one sign", "one sign", "both signs"))[1]
             for two in ((una, rloo), (una, ppo), (rloo, ppo))]
    more = [a > b for a, b in zip(score, ppo)]
    grpo = [tuple(median(lost(varied(online[part], "grpo", **knobs)))
                  for part in ("runs", "theory")) for _, knobs in GRPO]
    shared = [median(values) for values in (
        of("una-online-stored", stored=0.125), stored, of("una-online-stored", stored=0.5))]
    una_back, stored_back, weighted = (of(name, collapsed=True, **knobs) for name, knobs in (
        ("una-online", {}), ("una-online-stored", {}),
        ("rloo", dict(stored=0.25, loss="weighted rloo"))))
    worse = sum(a > b for a, b in zip(weighted, stored_back))
    times = [median(seconds(varied(online["runs"], name))) for name in ONLINE]
    listed = ", ".join
    return predicted(
        online, alike=(listed(signs), {*signs} == {"both signs"}),
        steady=(f"at most {percent(max(stored))}", max(stored) <= 0.02),
        grpo=(listed(f"{percent(a)} for {percent(b)}" for a, b in grpo),
              all(abs(a - b) <= max(b / 3, 0.01) for a, b in grpo)),
        score=(f"on {sum(more)} of {len(more)}", all(more)),
        share=(listed(map(percent, shared)), max(shared) <= 0.01),
        collapsed=(f"{percent(median(una_back))} and {percent(median(stored_back))}",
                   median(una_back) > 0.5 and median(stored_back) <= 0.02),
        weights=(f"on {worse} of {len(weighted)}", worse == len(weighted)),
        sooner=(f"{number(times[0])} s against {number(times[1])} s", times[0] <= 0.75 * times[1]))


# ---------------------------------------------------------------- budget.json
def sizes_of(told):
    return sorted({model["judged"] for model in told["budget"]["models"]})


def at_sizes(told, name, reward="judge"):
    """Runs for each size: budget.json's at level 1; of dpo stored.json's too, at level 0, since
    pairs do not see it."""
    return [reported(told["budget"], name, 1.0, reward, size)
            or (reported(told["stored"], name, judged=size) if name == "dpo" else [])
            for size in sizes_of(told)]


def learning(told):
    """{line: [(judged responses, what each seed lost)]}, of online methods on their way."""
    found = {name: [(size, lost(runs)) for size, runs in zip(sizes_of(told), at_sizes(told, name))
                    if runs] for name in JUDGEMENTS}
    for name in ONLINE:
        runs = pick(told["budget"]["runs"], method=name)
        curves = [run["curve"] for run in runs if "diverged" not in run]
        found[f"{name}, fresh"] = [
            (points[0]["step"] * runs[0]["judged"] // runs[0]["steps"],
             [point["regret"] / curve[0]["regret"] for point, curve in zip(points, curves)]
             + [math.inf] * (len(runs) - len(curves))) for points in [*zip(*curves)][1:]]
    return found


def budget_tables(told):
    def listed(values):
        return ", ".join(percent(share, ".2g") for share in values)

    def below(ours, theirs):
        return all(a < b for a, b in zip(ours, theirs))

    made, sizes = {}, sizes_of(told)
    stored = {name: at_sizes(told, name) for name in JUDGEMENTS}
    rows = made["sizes"] = [["lost", *(f"{size:,}" for size in sizes), *(
        f"to {100 * goal:.0f} % of the gain" for goal in figures.GOALS)]]
    for name, points in learning(told).items():
        rows.append([code(name), *(shares(dict(points).get(size, ())) for size in sizes), *(
            needed(points, goal, JUDGEMENTS.get(name, 1)) for goal in figures.GOALS)])
    on = {name: at_sizes(told, name, "model") for name in (
        f"{which}, {by}" for which in ("optimum", *ONLINE) for by in ("by_model", "train"))}
    rows = made["models"] = [[
        "pairs", "orders pairs as the judge", "optimum of the model, β × 1", "tuned β",
        *(f"`{name}`, by {whom}" for name in ONLINE for whom in ("the model", "the judge")),
        "`dpo` on the same pairs"]]
    for i, size in enumerate(sizes):
        rows.append([f"{size // 2:,}", *map(shares, (
            [run["reward_model"]["accuracy"] for run in on["ppo, train"][i] if "train" in run],
            [dict(run["optima"])[1.0] for run in on["optimum, train"][i]],
            *(lost(runs[i]) for name, runs in on.items() if name != "optimum, by_model"),
            lost(stored["dpo"][i])))])
    rows = made["exploitation"] = [["reward gained", "by the model", "by the judge", "difference",
                                    "exploited"]]
    for i, size in enumerate(sizes):
        for which, words in (("optimum", "the model's optimum"), *zip(ONLINE, map(code, ONLINE))):
            model, judge = ([run.get("gained", math.nan) for run in on[f"{which}, {by}"][i]]
                            for by in ("by_model", "train"))
            more = [a - b for a, b in zip(model, judge)]
            rows.append([f"{size // 2:,} pairs, {words}", ranged(model), ranged(judge),
                         number(median(more), "+.2g"), span(more, EXPLOITED)[1]])

    ended = {name: [median(lost(runs)) for runs in of if runs]
             for name, of in (stored | on).items()}
    estimated, learned = ended["una-score-estimated"], ended["una-score, from zero"]
    dpo, optimum = ended["dpo"], ended["optimum, train"]
    online = ended["una-online, by_model"] + ended["ppo, by_model"]
    beta = stored["dpo"][0][0]["beta_multiple"]
    more = [a["gained"] - b["gained"] for a, b in zip(on["optimum, by_model"][0],
                                                      on["optimum, train"][0])]
    made["budget_predictions"] = predicted(
        told["budget"], few_scores=at_most(estimated[0], 1, dpo[-1]),
        zero=ANEW, binary=ANEW,
        learned=(f"{listed(learned)} against {listed(estimated)}", below(learned, estimated)),
        pairs=(f"{beta:g} times the task's", beta > 1),
        detour=(f"{listed(optimum)} against {listed(dpo)}", below(optimum, dpo)),
        optimiser=(listed(online), max(online) <= 0.01),
        exploitation=(f"{number(min(more), '+.2g')} to {number(max(more), '+.2g')}", min(more) > 0))
    return made


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
    if {"stored", "budget"} <= told.keys():
        lines = {"dpo, the same pairs": at_sizes(told, "dpo")} | {
            words: at_sizes(told, f"{which}, train", "model") for which, words in (
                ("optimum", "the model's optimum"), *((n, f"{n} on the model") for n in ONLINE))}
        gains = [[[run["gained"] for run in runs] for runs in at_sizes(told, name, "model")]
                 for name in ("optimum, by_model", "optimum, train")]
        figures.draw_budget(
            learning(told), [size // 2 for size in sizes_of(told)],
            {words: [*map(lost, runs)] for words, runs in lines.items()}, [*zip(*gains)], folder)

"""The tables of lab/README.md and its pictures, from the JSON files beside it. Knows no training.

    python -m lab tables
"""
import math
from pathlib import Path
from statistics import median

from lab import figures
from lab.compare import (
    ANSWERS,
    MACHINES,
    METHODS,
    VERDICTS,
    at_most,
    bad,
    cell_text,
    code,
    edges,
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
# How many judgements a response needs: a pair is one of two. A third of una-mixed's are in pairs.
JUDGEMENTS = {"dpo": 1 / 2, "kto": 1, "una-binary-bce": 1, "una-binary-learned": 1, "una-score": 1,
              "una-score-estimated": 1, "una-score-learned": 1, "una-mixed": 5 / 6}
EXPLOITED = ("no: the judge sees more", "yes", "no difference shown")
OFFSETS = (                                                      # words, runs
    ("una-score, Eq. 13: 0", "una-score"),
    ("… one constant, the mean of β log Z", "una-score, constant"),
    ("… β log Z(x), exact", "una-score, exact"),
    ("… β log Z(x), estimated: `una-score-estimated`", "una-score-estimated"),
    ("… learned: `una-score-learned`", "una-score-learned"),
    ("… the mean residual", "una-score, residual"),
    ("… the mean residual, held constant", "una-score, held"),
    ("rewards, Eq. 7: 0", "una-reward"), ("… one constant", "una-reward, constant"),
    ("… exact", "una-reward, exact"),
    ("… estimated: `una-reward-estimated`", "una-reward-estimated"),
    ("… learned", "una-reward, learned"), ("… the mean residual", "una-reward, residual"),
    ("una-binary-bce, Eq. 12: 0", "una-binary-bce"),
    ("… learned: `una-binary-learned`", "una-binary-learned"),
    ("… one constant", "una-binary-bce, constant"), ("… exact", "una-binary-bce, exact"),
    ("… exact, β × 1", "una-binary-bce, exact", ("beta_multiple", 1)),
    ("… estimated, from the scores", "una-binary-bce, estimated"),
    ("… estimated, β × 1", "una-binary-bce, estimated", ("beta_multiple", 1)),
    ("una-binary-mse, Eq. 11: 0", "una-binary-mse"), ("kto: −β z₀, which is 0 here", "kto"),
    ("una-mixed: 0", "una-mixed"), ("dpo: cancels", "dpo"),
    ("una-online, Eq. 7 on fresh samples: free", "una-online"))


# ---------------------------------------------------------------- claims.json
# A table is a list of rows, the heading first, and a row of cells.
def claims_tables(claims):
    def runs(name, level=0.0, **fields):
        return reported(claims, name, level, **fields)

    def versus(words, ours, theirs, verdicts=ANSWERS, **fields):
        return [words, *less(runs(ours, **fields), runs(theirs, **fields), verdicts)]

    def paper(words, ours, theirs, said=None, verdicts=VERDICTS, **fields):
        _, *cells = versus(words, ours, theirs, verdicts, **fields)
        return [words, said or f"{PAPER[ours]} against {PAPER[theirs]}", *cells]

    def of(*what):
        return median(lost(runs(*what)))

    def middle(runs, figure):
        return median([figure(run) for run in runs if "diverged" not in run])

    def state(name, reward):
        return middle(runs(name, reward=reward), lambda run: run["state_bytes"])

    made, mse, bce, score, kto = {}, "una-binary-mse", "una-binary-bce", "una-score", "kto"
    with_it, learned = "una-score-estimated", "una-binary-learned"
    (online, ppo), (pair, dpo) = map(runs, ONLINE), map(runs, ("una-pair", "dpo"))
    off = max(abs(a[split][figure] - b[split][figure]) for a, b in zip(pair, dpo)
              if "diverged" not in a | b for split in ("train", "heldout") for figure in a[split])
    states = [state("una-online", reward) / state("ppo", reward) for reward in ("judge", "model")]
    spread = [max(lost(of)) - min(lost(of)) for of in (online, ppo)]
    grids = [[share for row in pick(claims["tuning"], method=name, reward="judge")
              for share in row["lost"]] for name in ONLINE]
    failed = [sum(share > 1 for share in grid) for grid in grids]
    verdict = ("does not", "replicates")
    can = ("it can, and loses less", "it can, but loses more", "it can; no difference shown")
    mixed = "one run can use all three kinds of feedback: mixed against"
    made["claims"] = [
        ["claim", "paper's figures", "here: lost", "difference", "verdict"],
        [*paper("pairwise UNA is DPO", "una-pair", "dpo", "“equivalent”")[:3],
         f"largest of any figure: {number(off, '.2g')}", verdict[off == 0]],
        paper("binary UNA (MSE) beats KTO", mse, kto),
        paper("… where prompts differ: level 1", mse, kto, "–", level=1.0),
        paper("binary UNA (BCE) beats KTO", bce, kto),
        paper("… where prompts differ: level 1", bce, kto, "–", level=1.0),
        paper("score UNA beats binary UNA (MSE)", score, mse),
        paper("score UNA beats binary UNA (BCE)", score, bce),
        paper("score UNA beats KTO", score, kto), paper("score UNA beats DPO", score, "dpo"),
        paper("online UNA beats RLHF/PPO: judge's reward, as many samples", *ONLINE),
        paper("… a reward model's reward", *ONLINE, "the same", reward="model"),
        ["it is faster: as many samples", PAPER["hours"], *sooner(seconds(online), seconds(ppo))],
        *([f"… until {goal:.0%} of the gain", "–",
           *sooner(seconds(online, goal), seconds(ppo, goal))] for goal in figures.GOALS),
        ["it needs less memory: weights, gradients and optimiser state", "no figure",
         f"{states[0]:.3g} of PPO's; with a reward model {states[1]:.3g}", "–",
         verdict[max(states) < 1]],
        ["it is more stable: largest minus least lost over the seeds", "no figure",
         " against ".join(percent(share, ".2g") for share in spread), "–",
         verdict[spread[0] < spread[1]]],
        ["… runs of the grid that end below the reference", "no figure",
         " against ".join(map(bad, grids)), "–", verdict[failed[0] < failed[1]]],
        paper(f"{mixed} pairs alone", "una-mixed", "una-pair", "no figure", can),
        paper(f"{mixed} labels alone (BCE)", "una-mixed", bce, "no figure", can),
        paper(f"{mixed} scores alone", "una-mixed", score, "no figure", can)]

    arrive = [median(seconds(of, 0.99)) for of in (online, ppo)]
    pairs, *zero = (pick(claims["tuning"], method=name, best=True)[0]["beta_multiple"]
                    for name in ("una-pair", mse, bce, score))
    constant, at_end = of("una-score, constant", 1.0), of("una-online")
    _, *signs = less(online, ppo, ("", "", "both signs"))
    made["predictions"] = predicted(
        claims, estimated=at_most(of(with_it), 1 / 5, of(score), "of"),
        levels=at_most(of(with_it, 1.0), 2, of(with_it), "of"),
        learned=at_most(of(learned, 1.0), 1 / 2, of(bce, 1.0), "of"),
        constant=(percent(constant), constant > 1), pairs=(f"{pairs:g} of it", pairs == 1),
        zero=(", ".join(f"{beta:g}" for beta in zero) + " of it", max(zero) <= 0.25),
        online=(percent(at_end), at_end <= 0.001),
        alike=(" ".join(signs), signs[1] == "both signs"),
        sooner=(f"{number(arrive[0])} s against {number(arrive[1])} s",
                arrive[0] <= arrive[1] / 2 < math.inf))

    rows = made["offsets"] = [["f(x) + c", "one level: lost", "a level for each noun: lost",
                               "off β log Z by"]]
    for words, name, *beta in OFFSETS:
        both = [runs(name, level, **dict(beta)) for level in (0.0, 1.0)]
        errors = [[run["offset_error"] for run in of if "offset_error" in run] for of in both]
        rows.append([words, *(shares(lost(of)) for of in both),
                     " · ".join(number(median(of), ".2g") for of in errors if of) or "–"])

    few, *_, many = sorted({run["judged"] for run in claims["runs"]})
    rows = made["passes"] = [["lost", f"{many} judged, once", f"{few}, {many / few:.0f} times",
                              "difference", ""]]
    for name in dict.fromkeys(run["method"] for run in pick(claims["runs"], judged=few)):
        once, again = runs(name), runs(name, judged=few)
        rows.append([code(name), shares(lost(once)), shares(lost(again)), *less(
            once, again, ("less, once", "more, once", "no difference shown"))[1:]])

    rows = made["beyond"] = [["beyond the paper", "here: lost", "difference", "verdict"]]
    for level, words in ((0.0, "one level"), (1.0, "a level for each noun")):
        rows += [versus(said, ours, theirs, level=level) for said, ours, theirs in (
            (f"{words}: scores lose less with the estimated f(x) + c than with 0", with_it, score),
            ("… rewards (Eq. 7)", "una-reward-estimated", "una-reward"),
            ("… labels (BCE) with the learned", learned, bce),
            ("… scores with the estimated than with one constant", with_it, "una-score, constant"),
            ("… than with the exact", with_it, "una-score, exact"),
            ("… than with the learned", with_it, "una-score-learned"),
            ("… than dpo of pairs", with_it, "dpo"))]
    start = {entry["seed"]: entry["train"]["residual_variance"] for entry in claims["reference"]}
    parted = [runs("ppo", divide=divide) for divide in (False, True)]
    residual = [middle(of, lambda run: run["train"]["residual_variance"] / start[run["seed"]])
                for of in (online, ppo)]
    noise = [middle(of, lambda run, key="gradient_noise": run["curve"][-1][key]
                    / run["curve"][0][key]) for of in (online, *parted)]
    rows += [
        versus("the mean residual: scores lose less where its gradient flows than where it is held",
               "una-score, residual", "una-score, held"),
        versus("online, Eq. 7 loses less than Eq. 9", "una-online", "una-online-score"),
        ["ppo loses less without the division of its advantages", *less(*parted, ANSWERS)],
        ["the residual r − β log π/π_ref ends with less variance than it starts with (end / start, "
         "median)", "una-online {:.1g}, ppo {:.1g}".format(*residual), "–",
         "yes, both: it measures the policy" if max(residual) < 0.1 else "no"],
        ["the gradient loses its noise (variance, end / start, median)",
         "una-online {:.1g}, ppo {:.1g}, ppo divided {:.1g}".format(*noise), "–",
         ", ".join("yes" if ratio < 0.1 else "no" for ratio in noise)]]
    for name in ONLINE:
        accuracy, model, judge = zip(*(
            [run["reward_model"][figure] for figure in ("accuracy", "model_gain", "judge_gain")]
            for run in runs(name, reward="model") if "diverged" not in run))
        words = f"{name} exploits its reward model (accuracy {shares(accuracy)}): reward gained, by"
        rows.append([f"{words} the model and by the judge", f"{ranged(model)} and {ranged(judge)}",
                     *span([a - b for a, b in zip(model, judge)], (ANSWERS[1], *EXPLOITED[1:]))])

    peaks = {(entry["method"], entry["reward"]): entry["bytes"] for entry in claims["peak_memory"]}
    rows = made["cost"] = [["method", "seconds", "state", "peak above the idle process", "lost"]]
    for name, reward in (*((name, "judge") for name in METHODS), *((n, "model") for n in ONLINE)):
        its, peak = runs(name, reward=reward), peaks.get((name, reward))
        rows.append([code(name, *["reward model"] * (reward == "model")),
                     number(median(seconds(its))), f"{number(state(name, reward) / 1e6)} MB",
                     f"{number(peak / 1e6)} MB" if peak else "–", shares(lost(its))])

    rows = made["grids"] = [["grid", "best cell: learning rate, …", "lost there, tuning seeds",
                             "of them below π_ref; reported", "all runs below π_ref", "cells",
                             "at an end"]]
    for name, level, reward in dict.fromkeys((row["method"], row["level"], row["reward"])
                                             for row in claims["tuning"]):
        grid = pick(claims["tuning"], method=name, level=level, reward=reward)
        (best,), there = pick(grid, best=True), lost(runs(name, level, reward=reward))
        more = ["level 1"] * (level == 1) + ["reward model"] * (reward == "model")
        rows.append([code(name, *more), cell_text(best["cell"]), shares(best["lost"]),
                     f"{bad(best['lost'])}, {bad(there)}",
                     bad([share for row in grid for share in row["lost"]]), f"{len(grid)}",
                     " and ".join(edges(grid, best)) or "–"])
    return made


# ---------------------------------------------------------------- pairs.json, kto.json, defaults
def pairs_tables(file):
    grid, chosen = pick(file["tuning"], rule="median"), pick(file["tuning"], best=True)
    found = {row["rule"]: lost(pick(file["runs"], rule=row["rule"])) for row in chosen}
    rate, worst = chosen[0]["learning_rate"], found["worst"]
    optima = {beta: [round(share, 8) + 0.0 for share in shares] for beta, shares in file["optima"]}
    return dict(
        pairs_rules=[["chosen by", "cell", "tuning seeds", "reported seeds"], *(
            [f"the {row['rule']} of eight", cell_text(row["cell"]), shares(row["lost"]),
             shares(found[row["rule"]])] for row in chosen)],
        pairs_grid=[["learning rate", *(f"β × {beta:g}" for beta in optima)], *(
            [f"{rate:g}", *(shares(pick(grid, learning_rate=rate, beta_multiple=beta)[0]["lost"])
                            for beta in optima)]
            for rate in dict.fromkeys(row["learning_rate"] for row in grid)),
            ["**the optimum of that β**", *map(shares, optima.values())]],
        pairs_predictions=predicted(
            file, median=(f"{rate:g}", rate < 4e-3),
            steady=(percent(max(worst)), max(worst) <= 0.5),
            price=(percent(median(worst)), median(worst) >= 0.2)))


def kto_tables(file):
    rows, zeros, moved = [], [], []
    for level in (0.0, 1.0):
        own, without = (reported(file, name, level) for name in ("kto", "kto-without"))
        counts, steps = [run["zeros"] for run in own], own[0]["steps"]
        rows.append([f"{level:g}", f"{min(counts)} to {max(counts)} of {steps}", shares(lost(own)),
                     shares(lost(without)), less(without, own)[1]])
        zeros.append(min(counts) / steps)
        moved.append(abs(median(lost(without)) / median(lost(own)) - 1))
    return dict(
        kto_runs=[["level", "steps where z₀ is 0", "lost", "lost without z₀", "difference"], *rows],
        kto_predictions=predicted(
            file, zero=(f"at least {percent(min(zeros))} of the steps", min(zeros) >= 0.9),
            same=(" and ".join(percent(share, ".2g") for share in moved) + " of itself",
                  max(moved) < 0.1)))


def machines_table(told):
    ran = [told[name]["runs"] for name in MACHINES]
    took = [f"{sum(seconds(runs)):.0f} s, {told[name]['settings']['jobs']} at a time"
            for name, runs in zip(MACHINES, ran)]
    return [["lost", *MACHINES.values()], *(
        [code(name), *(" ".join(f"{100 * share:.2f} %" for share in lost(pick(runs, method=name)))
                       or "–" for runs in ran)]
        for name in dict.fromkeys(run["method"] for run in sum(ran, []))),
        ["seconds, summed", *took]]


# ---------------------------------------------------------------- budget.json
def sizes_of(told):
    return sorted({model["judged"] for model in told["budget"]["models"]})


def at_sizes(told, name, reward="judge"):
    """Runs at level 1 for each size: budget.json's, or those of claims.json."""
    return [reported(told["budget"], name, 1.0, reward, size)
            or reported(told["claims"], name, 1.0, reward, size) for size in sizes_of(told)]


def learning(told):
    """{line: [(judged responses, what each seed lost)]}, of online methods on their way."""
    found = {name: [*zip(sizes_of(told), map(lost, at_sizes(told, name)))] for name in JUDGEMENTS}
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

    made, sizes, every = {}, sizes_of(told), told["budget"]["runs"] + told["claims"]["runs"]
    stored = {name: at_sizes(told, name) for name in JUDGEMENTS}
    rows = made["sizes"] = [["lost", *(f"{size:,}" for size in sizes), *(
        f"to {100 * goal:.0f} % of the gain" for goal in figures.GOALS)]]
    for name, points in learning(told).items():
        rows.append([code(name), *(shares(dict(points).get(size, ())) for size in sizes), *(
            needed(points, goal, JUDGEMENTS.get(name, 1)) for goal in figures.GOALS)])
        if name in ("una-score-estimated", "una-score-learned"):
            same = [pick(every, method="una-score, exact", level=1.0, judged=its["judged"],
                         cell=its["cell"], steps=its["steps"]) for its, *_ in stored[name]]
            rows.append(["… the exact β log Z(x), in the same cell", *map(shares, map(lost, same)),
                         *["–"] * len(figures.GOALS)])
    made["size_cells"] = [
        ["best cell: learning rate, β, steps", *(f"{size:,}" for size in sizes)],
        *([code(name), *(cell_text(its["cell"] | dict(steps=its["steps"])) for its, *_ in runs)]
          for name, runs in stored.items())]

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

    ended = {name: [median(lost(runs)) for runs in of] for name, of in (stored | on).items()}
    estimated, learned = ended["una-score-estimated"], ended["una-score-learned"]
    score, dpo, optimum = ended["una-score"], ended["dpo"], ended["optimum, train"]
    binary, bce = ended["una-binary-learned"], ended["una-binary-bce"]
    online = ended["una-online, by_model"] + ended["ppo, by_model"]
    beta = stored["dpo"][0][0]["beta_multiple"]
    more = [a["gained"] - b["gained"] for a, b in zip(on["optimum, by_model"][0],
                                                      on["optimum, train"][0])]
    made["budget_predictions"] = predicted(
        told["budget"], few_scores=at_most(estimated[0], 1, dpo[-1]),
        zero=(at_most(score[-1], 1, score[-2])[0], score[-1] >= 0.8 * score[-2]),
        learned=(f"{listed(learned)} against {listed(estimated)}", below(learned, estimated)),
        binary=at_most(binary[-2], 1, bce[-1]), pairs=(f"{beta:g} times the task's", beta > 1),
        detour=(f"{listed(optimum)} against {listed(dpo)}", below(optimum, dpo)),
        optimiser=(listed(online), max(online) <= 0.01),
        exploitation=(f"{number(min(more), '+.2g')} to {number(max(more), '+.2g')}", min(more) > 0))
    return made


# ---------------------------------------------------------------- the page
def tables(told):
    """{name: Markdown}, of the files that are there."""
    made = dict(machines=machines_table(told)) if MACHINES.keys() <= told.keys() else {}
    made |= budget_tables(told) if {"claims", "budget"} <= told.keys() else {}
    for name, of in dict(claims=claims_tables, pairs=pairs_tables, kto=kto_tables).items():
        made |= of(told[name]) if name in told else {}
    texts = {name: "\n".join(f"| {' | '.join(row)} |" for row in [
        rows[0], ["---"] * len(rows[0]), *rows[1:]]) for name, rows in made.items()}
    if "claims" in told:
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
    if "claims" in told:
        figures.draw_claims(told["main"], folder)
    if {"claims", "budget"} <= told.keys():
        lines = {"dpo, the same pairs": at_sizes(told, "dpo")} | {
            words: at_sizes(told, f"{which}, train", "model") for which, words in (
                ("optimum", "the model's optimum"), *((n, f"{n} on the model") for n in ONLINE))}
        gains = [[[run["gained"] for run in runs] for runs in at_sizes(told, name, "model")]
                 for name in ("optimum, by_model", "optimum, train")]
        figures.draw_budget(
            learning(told), [size // 2 for size in sizes_of(told)],
            {words: [*map(lost, runs)] for words, runs in lines.items()}, [*zip(*gains)], folder)

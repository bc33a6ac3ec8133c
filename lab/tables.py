"""The tables of the claims' page, in Markdown, from claims.json. Knows no training."""
import math

from lab import figures
from lab.compare import (
    ANSWERS,
    VERDICTS,
    ended,
    less,
    lost,
    markdown,
    median,
    number,
    seconds,
    seconds_to,
    sooner,
    span,
    with_range,
)

EXPECTED = ["expected", "found", ""]
OWN = {"una-binary-offset": "learned", "una-score-offset": "estimated",
       "una-reward-offset": "estimated"}
# What each loss of stored feedback was given for f(x) + c: (words, method, offset, knobs).
OFFSETS = {
    "una-score, Eq. 13": (
        ("0", "una-score", "zero"),
        ("one constant, the mean of β log Z", "una-score", "constant"),
        ("β log Z(x), exact", "una-score", "exact"),
        ("β log Z(x), estimated: `una-score-offset`", "una-score-offset", "estimated"),
        ("learned", "una-score", "learned"),
        ("the mean residual", "una-score", "residual"),
        ("the mean residual, held constant", "una-score", "held")),
    "rewards, Eq. 7": (
        ("0", "una-reward", "zero"),
        ("one constant", "una-reward", "constant"),
        ("exact", "una-reward", "exact"),
        ("estimated: `una-reward-offset`", "una-reward-offset", "estimated"),
        ("learned", "una-reward", "learned"),
        ("the mean residual", "una-reward", "residual")),
    "una-binary-bce, Eq. 12": (
        ("0", "una-binary-bce", "zero"),
        ("learned: `una-binary-offset`", "una-binary-offset", "learned"),
        ("one constant", "una-binary-bce", "constant"),
        ("exact", "una-binary-bce", "exact", dict(beta=0.25)),
        ("exact, β × 1", "una-binary-bce", "exact", dict(beta=1)),
        ("estimated, from the scores", "una-binary-bce", "estimated", dict(beta=0.25)),
        ("estimated, β × 1", "una-binary-bce", "estimated", dict(beta=1))),
    "others": (
        ("una-binary-mse, Eq. 11: 0", "una-binary-mse", "zero"),
        ("kto: −β z₀, which is 0 here", "kto", "zero"),
        ("una-mixed: 0", "una-mixed", "zero"),
        ("dpo: cancels", "dpo", "zero"),
        ("una-online, Eq. 7 on fresh samples: free", "una-online", "zero")),
}


# ---------------------------------------------------------------- other machines
def machines(told):
    """told: {words for a machine: the results.json that it wrote}."""
    rows = [[f"`{runs[0]['method']}`", *(f"{share:.2f} %" for share in lost(runs))]
            for runs in zip(*(results["runs"] for results in told.values()))]
    seconds = [f"{sum(run['seconds'] for run in results['runs']):.0f} s, "
               f"{results['settings']['jobs']} at a time" for results in told.values()]
    return markdown(["lost", *told], [*rows, ["seconds, summed", *seconds]])


# ---------------------------------------------------------------- lab/pairs.py
def pairs(told):
    """What pairs.json says: the grid, the two rules, the predictions."""
    grid = [row for row in told["tuning"] if row["rule"] == "median"]
    lost_in = {(row["cell"]["learning_rate"], row["cell"]["beta"]): row["lost"] for row in grid}
    rates, betas = (sorted(set(values)) for values in zip(*lost_in))
    chosen = {row["rule"]: row for row in told["tuning"] if row["best"]}
    reported = {rule: lost([run for run in told["runs"] if run["rule"] == rule])
                for rule in chosen}
    found = dict(
        median=(f"{chosen['median']['cell']['learning_rate']:g}",
                chosen["median"]["cell"]["learning_rate"] < 4e-3),
        steady=(f"{number(max(reported['worst']))} %", max(reported["worst"]) <= 50),
        price=(f"{number(median(reported['worst']))} %", median(reported["worst"]) >= 20))
    return dict(
        pairs_grid=markdown(
            ["learning rate", *(f"β × {beta:g}" for beta in betas)],
            [[f"{rate:g}", *(with_range(in_percent(lost_in[rate, beta]), " %") for beta in betas)]
             for rate in rates] + [["**the optimum of that β**", *(
                 with_range([round(share, 6) + 0.0 for share in in_percent(lost_there)], " %")
                 for _, lost_there in told["optima"])]]),
        pairs_rules=markdown(
            ["chosen by", "cell", "tuning seeds", "reported seeds"],
            [[f"the {rule} of eight", f"{row['cell']['learning_rate']:g}, "
              f"β × {row['cell']['beta']:g}", with_range(in_percent(row["lost"]), " %"),
              with_range(reported[rule], " %")] for rule, row in chosen.items()]),
        pairs_reported=[with_range(values, " %") for values in reported.values()],
        pairs_predictions=markdown(EXPECTED, predicted(told, found)))


def predicted(told, found):
    """A row for each prediction; found: {its key: (what was found, whether it holds)}."""
    return [[text, found[key][0], "holds" if found[key][1] else "does not hold"]
            for key, text in told["predictions"].items()]


def kto(told):
    """What kto.json says: a row for each level, the predictions."""
    rows, found_zeros, moved = [], [], []
    for level in sorted({run["level"] for run in told["runs"]}):
        with_it, without = ([run for run in told["runs"] if (run["level"], run["without"])
                             == (level, which)] for which in (False, True))
        steps, zeros = with_it[0]["curve"][-1]["step"], [run["zeros"] for run in with_it]
        apart = [a - b for a, b in zip(lost(without), lost(with_it))]
        rows.append([f"{level:g}", f"{min(zeros)} to {max(zeros)} of {steps}",
                     with_range(lost(with_it), " %"), with_range(lost(without), " %"),
                     span(apart, ANSWERS)[0]])
        found_zeros.append(100 * min(zeros) / steps)
        moved.append(abs(median(lost(without)) / median(lost(with_it)) - 1))
    return dict(
        kto_runs=markdown(["level", "steps where z₀ is 0", "lost", "lost without z₀", "difference"],
                          rows),
        kto_predictions=markdown(EXPECTED, predicted(told, dict(
            zero=(f"at least {number(min(found_zeros))} % of the steps", min(found_zeros) >= 90),
            same=(" and ".join(f"{number(100 * share, '.2g')} %" for share in moved) + " of itself",
                  max(moved) < 0.1)))))


def in_percent(lost):
    """In percent; null, of a run that diverged, is infinite."""
    return [math.inf if share is None else 100 * share for share in lost]


# ---------------------------------------------------------------- which runs
def best_cell(claims, method, offset="zero", level=0.0, reward="judge"):
    rows = grid_of(claims, method, offset, level, reward)
    return next(row["cell"] for row in rows if row["best"])


def grid_of(claims, method, offset="zero", level=0.0, reward="judge"):
    return [row for row in claims["tuning"] if (
        row["method"], row["offset"], row["level"], row["reward"]) == (
        method, offset, level, reward)]


def pick(claims, method, offset=None, level=0.0, reward="judge", judged=None, **cell):
    """The reported runs of a method, one for each seed: by default with its own offset."""
    offset, judged = offset or OWN.get(method, "zero"), judged or claims["settings"]["judged"]
    if method == "ppo" and not cell:
        cell = dict(divide=best_cell(claims, "ppo", reward=reward)["divide"])
    return [run for run in claims["runs"] if (
        run["method"], run["offset"], run["level"], run.get("reward_source", "judge"),
        run["judged"]) == (method, offset, level, reward, judged)
        and cell.items() <= run["cell"].items()]


def main_runs(claims):
    """The runs of the methods as they are, on the judge's reward, at level 0."""
    return [run for method in claims["settings"]["methods"] for run in pick(claims, method)]


def state(runs):
    """Bytes of a method's weights, gradients and optimiser state: the same for every seed."""
    return next((run["state_bytes"] for run in ended(runs)), math.nan)


def bad(shares):
    """How many ended below the reference, or in no numbers."""
    return sum(share is None or share > 1 for share in shares)


def below_reference(rows):
    shares = [share for row in rows for share in row["lost"]]
    return f"{bad(shares)} of {len(shares)}"


# ---------------------------------------------------------------- the paper's claims
def paper_rows(claims):
    pair, dpo, mse, bce, score, mixed, kto, online, ppo = (pick(claims, name) for name in (
        "una-pair", "dpo", "una-binary-mse", "una-binary-bce", "una-score", "una-mixed", "kto",
        "una-online", "ppo"))
    mse_1, bce_1, kto_1 = (pick(claims, name, level=1.0) for name in (
        "una-binary-mse", "una-binary-bce", "kto"))
    of_model = [pick(claims, name, reward="model") for name in ("una-online", "ppo")]
    apart = max((abs(a[split][name] - b[split][name])
                 for a, b in zip(pair, dpo) if ended([a, b]) == [a, b]
                 for split in ("train", "heldout") for name in a["train"]), default=math.nan)
    states = [state(pick(claims, "una-online", reward=reward))
              / state(pick(claims, "ppo", reward=reward)) for reward in ("judge", "model")]
    spreads = [max(lost(runs)) - min(lost(runs)) for runs in (online, ppo)]
    grids = [grid_of(claims, name) for name in ("una-online", "ppo")]
    failures = [bad([share for row in rows for share in row["lost"]]) for rows in grids]
    binary_mse, binary_bce, scores = "28.88 / 63.12", "28.93 / 63.06", "30.92 / 64.35"
    of_kto, of_dpo = "28.56 / 62.74", "28.53 / 62.26"

    def verdict(holds):
        return VERDICTS[0] if holds else "does not"

    return [
        ["pairwise UNA is DPO", "“equivalent”",
         f"{with_range(lost(pair), ' %')} against {with_range(lost(dpo), ' %')}",
         f"largest of any figure: {number(apart, '.2g')}", verdict(apart == 0)],
        less("binary UNA (MSE) beats KTO", f"{binary_mse} against {of_kto}", mse, kto),
        less("… where prompts differ: level 1", "–", mse_1, kto_1),
        less("binary UNA (BCE) beats KTO", f"{binary_bce} against {of_kto}", bce, kto),
        less("… where prompts differ: level 1", "–", bce_1, kto_1),
        less("score UNA beats binary UNA (MSE)", f"{scores} against {binary_mse}", score, mse),
        less("score UNA beats binary UNA (BCE)", f"{scores} against {binary_bce}", score, bce),
        less("score UNA beats KTO", f"{scores} against {of_kto}", score, kto),
        less("score UNA beats DPO", f"{scores} against {of_dpo}", score, dpo),
        less("online UNA beats RLHF/PPO: judge's reward, as many samples",
             "25.91 / 56.13 against 25.36 / 55.68", online, ppo),
        less("… a reward model's reward", "the same", *of_model),
        sooner("it is faster: as many samples", "3.5 h against 8 h: 2.3 ×",
               seconds(online), seconds(ppo)),
        *(sooner(f"… until {share:.0%} of the gain", "–",
                 *([seconds_to(share, run) for run in which] for which in (online, ppo)))
          for share in (0.5, 0.9, 0.99)),
        ["it needs less memory: weights, gradients and optimiser state", "no figure",
         f"{states[0]:.3g} of PPO's; with a reward model {states[1]:.3g}", "–",
         verdict(max(states) < 1)],
        ["it is more stable: largest minus least lost over the seeds", "no figure",
         f"{number(spreads[0], '.2g')} % against {number(spreads[1], '.2g')} %", "–",
         verdict(spreads[0] < spreads[1])],
        ["… runs of the grid that end below the reference", "no figure",
         " against ".join(below_reference(rows) for rows in grids), "–",
         verdict(failures[0] < failures[1])],
        *(less(f"one run can use all three kinds of feedback: mixed against {name}", "no figure",
               mixed, other, ("it can, and loses less", "it can, but loses more",
                              "it can; no difference shown"))
          for name, other in (("pairs alone", pair), ("labels alone (BCE)", bce),
                              ("scores alone", score))),
    ]


def prediction_rows(claims):
    """claims.PREDICTIONS, and what was found: medians."""
    def of(method, offset=None, level=0.0):
        return median(lost(pick(claims, method, offset, level)))

    online, ppo = pick(claims, "una-online"), pick(claims, "ppo")
    arrive = [median([seconds_to(0.99, run) for run in which]) for which in (online, ppo)]
    score, estimated, estimated_1 = (of("una-score"), of("una-score-offset"),
                                     of("una-score-offset", level=1.0))
    learned_1, bce_1 = (of(name, level=1.0) for name in ("una-binary-offset", "una-binary-bce"))
    constant = of("una-score", "constant", 1.0)
    pairs = best_cell(claims, "una-pair")["beta"]
    zero = [best_cell(claims, name)["beta"]
            for name in ("una-binary-mse", "una-binary-bce", "una-score")]
    apart = [a - b for a, b in zip(lost(online), lost(ppo))]
    found = dict(
        estimated=(f"{number(estimated)} % of {number(score)} %", estimated <= score / 5),
        levels=(f"{number(estimated_1)} % of {number(estimated)} %", estimated_1 <= 2 * estimated),
        learned=(f"{number(learned_1)} % of {number(bce_1)} %", learned_1 <= bce_1 / 2),
        constant=(f"{number(constant)} %", constant > 100),
        pairs=(f"{pairs:g} of it", pairs == 1),
        zero=(", ".join(f"{beta:g}" for beta in zero) + " of it", max(zero) <= 0.25),
        online=(f"{number(of('una-online'))} %", of("una-online") <= 0.1),
        alike=(" ".join(span(apart, ("all less", "all more", "both signs"))),
               min(apart) < 0 < max(apart)),
        sooner=(f"{number(arrive[0])} s against {number(arrive[1])} s",
                arrive[0] <= arrive[1] / 2 < math.inf))
    return predicted(claims, found)


# ---------------------------------------------------------------- f(x) + c
def offset_rows(claims):
    rows = []
    for loss, offsets in OFFSETS.items():
        for i, (words, method, offset, *knobs) in enumerate(offsets):
            row = [(f"{loss}: " if loss != "others" and i == 0 else "… " if i else "") + words]
            if loss == "others":
                row = [words]
            both = [pick(claims, method, offset, level, **dict(*knobs)) for level in (0.0, 1.0)]
            row += [with_range(lost(runs), " %") if runs else "–" for runs in both]
            errors = [[run["offset_error"] for run in runs if "offset_error" in run]
                      for runs in both]
            row.append(" · ".join(number(median(error), ".2g") for error in errors if error) or "–")
            rows.append(row)
    return ["f(x) + c", "one level: lost", "a level for each noun: lost",
            "off β log Z by"], rows


# ---------------------------------------------------------------- beyond the paper
def beyond_rows(claims):
    start = {entry["seed"]: entry["train"]["residual_variance"] for entry in claims["reference"]}
    online, ppo = pick(claims, "una-online"), pick(claims, "ppo")
    divided = [pick(claims, "ppo", divide=divide) for divide in (False, True)]
    residual = [median([run["train"]["residual_variance"] / start[run["seed"]]
                        for run in ended(which)] or [math.nan]) for which in (online, ppo)]
    noise = [median([run["curve"][-1]["gradient_noise"] / run["curve"][0]["gradient_noise"]
                     for run in ended(which)] or [math.nan]) for which in (online, *divided)]
    rows = []
    for level, words in ((0.0, "one level"), (1.0, "a level for each noun")):
        score, bce, reward = (pick(claims, name, "zero", level) for name in (
            "una-score", "una-binary-bce", "una-reward"))
        estimated = pick(claims, "una-score-offset", level=level)
        rows += [
            less(f"{words}: scores lose less with the estimated f(x) + c than with 0", "",
                 estimated, score, ANSWERS),
            less("… rewards (Eq. 7)", "",
                 pick(claims, "una-reward-offset", level=level), reward, ANSWERS),
            less("… labels (BCE) with the learned", "",
                 pick(claims, "una-binary-offset", level=level), bce, ANSWERS),
            less("… scores with the estimated than with one constant", "", estimated,
                 pick(claims, "una-score", "constant", level), ANSWERS),
            less("… than with the exact", "", estimated,
                 pick(claims, "una-score", "exact", level), ANSWERS),
            less("… than with the learned", "", estimated,
                 pick(claims, "una-score", "learned", level), ANSWERS),
            less("… than dpo of pairs", "", estimated, pick(claims, "dpo", level=level), ANSWERS)]
    rows += [
        less("the mean residual: scores lose less where its gradient flows than where it is held",
             "", pick(claims, "una-score", "residual"), pick(claims, "una-score", "held"),
             ANSWERS),
        less("online, Eq. 7 loses less than Eq. 9", "",
             online, pick(claims, "una-online-score"), ANSWERS),
        less("ppo loses less without the division of its advantages", "", *divided, ANSWERS),
        ["the residual r − β log π/π_ref ends with less variance than it starts with "
         "(end / start, median)", "", "una-online {:.1g}, ppo {:.1g}".format(*residual), "–",
         "yes, both: it measures the policy" if max(residual) < 0.1 else "no"],
        ["the gradient loses its noise (variance, end / start, median)", "",
         "una-online {:.1g}, ppo {:.1g}, ppo divided {:.1g}".format(*noise), "–",
         ", ".join("yes" if ratio < 0.1 else "no" for ratio in noise)]]
    for name in ("una-online", "ppo"):
        reports = [run["reward_model"] for run in ended(pick(claims, name, reward="model"))]
        by_model, by_judge = ([report[key] for report in reports]
                              for key in ("model_gain", "judge_gain"))
        accuracy = with_range([100 * report["accuracy"] for report in reports], " %")
        rows.append([f"{name} exploits its reward model (accuracy {accuracy}): reward gained, by "
                     "the model and by the judge", "",
                     f"{with_range(by_model)} and {with_range(by_judge)}",
                     *span([a - b for a, b in zip(by_model, by_judge)],
                           ("no: the reverse", "yes", "no difference shown"))])
    return [[row[0], *row[2:]] for row in rows]


def passes_rows(claims):
    """One pass over many judged responses against many passes over few."""
    few = min(run["judged"] for run in claims["runs"])
    passes = claims["settings"]["steps"] * claims["settings"]["batch"] / few
    rows = []
    for method in dict.fromkeys(run["method"] for run in claims["runs"] if run["judged"] == few):
        once, many = pick(claims, method), pick(claims, method, judged=few)
        apart = [a - b for a, b in zip(lost(once), lost(many))]
        rows.append([f"`{method}`", with_range(lost(once), " %"), with_range(lost(many), " %"),
                     *span(apart, ("less, once", "more, once", "no difference shown"))])
    return ["lost", f"{claims['settings']['judged']} judged, once", f"{few}, {passes:.0f} times",
            "difference", ""], rows


# ---------------------------------------------------------------- cost, grids
def cost_rows(claims):
    rows = []
    peaks = {(entry["method"], entry["reward_source"]): entry["bytes"]
             for entry in claims["peak_memory"]}
    kinds = [(name, "judge") for name in claims["settings"]["methods"]]
    for name, source in (*kinds, ("una-online", "model"), ("ppo", "model")):
        same = pick(claims, name, reward=source)
        rows.append([f"`{name}`" + (", reward model" if source == "model" else ""),
                     number(median(seconds(same))), f"{number(state(same) / 1e6)} MB",
                     f"{number(peaks.get((name, source), math.nan) / 1e6)} MB",
                     with_range(lost(same), " %")])
    return ["method", "seconds", "state", "peak above the idle process", "lost"], rows


def edges(rows):
    """Which of a grid's knobs end with the chosen value: learning rate or beta."""
    chosen = next(row["cell"] for row in rows if row["best"])
    return [words for knob, words in (("learning_rate", "learning rate"), ("beta", "β"))
            if knob in chosen and chosen[knob] in (
                min(row["cell"][knob] for row in rows), max(row["cell"][knob] for row in rows))]


def cell_text(cell):
    words = dict(learning_rate="", beta="β × ", epochs="inner steps ", divide="divided: ",
                 leave_one_out="leave one out: ", steps="")
    return ", ".join(words[knob] + ({True: "yes", False: "no"}[value] if isinstance(value, bool)
                                    else f"{value:g}") for knob, value in cell.items())


def grid_rows(claims):
    rows = []
    for key in dict.fromkeys(tuple(row[name] for name in ("method", "offset", "level", "reward"))
                             for row in claims["tuning"]):
        grid, (method, offset, level, reward) = grid_of(claims, *key), key
        chosen = next(row for row in grid if row["best"])
        name = f"`{method}`" + (f", {offset}" if OWN.get(method, "zero") != offset else "")
        name += (", level 1" if level else "") + (", reward model" if reward == "model" else "")
        reported = [figures.lost(run) for run in pick(claims, method, offset, level, reward)]
        shares = in_percent(chosen["lost"])
        rows.append([name, cell_text(chosen["cell"]), with_range(shares, " %"),
                     f"{bad(chosen['lost'])} of {len(shares)}, {bad(reported)} of {len(reported)}",
                     f"{below_reference(grid)}", f"{len(grid)}",
                     " and ".join(edges(grid)) or "–"])
    return ["grid", "best cell: learning rate, …", "lost there, tuning seeds",
            "of them below π_ref; reported", "all runs below π_ref", "cells", "at an end"], rows


def tables(claims):
    """{name: Markdown}."""
    judged = claims | dict(runs=main_runs(claims))
    heading = ["here: lost", "difference", "verdict"]
    return {
        "claims": markdown(["claim", "paper's figures", *heading], paper_rows(claims)),
        "predictions": markdown(EXPECTED, prediction_rows(claims)),
        "offsets": markdown(*offset_rows(claims)),
        "beyond": markdown(["beyond the paper", *heading], beyond_rows(claims)),
        "passes": markdown(*passes_rows(claims)),
        "cost": markdown(*cost_rows(claims)),
        "grids": markdown(*grid_rows(claims)),
        "full": f"```\n{figures.table(judged)}\n```",
    }

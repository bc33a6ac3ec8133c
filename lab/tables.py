"""The tables of the claims' page, in Markdown, from claims.json. Knows no training."""
import math

import numpy as np

from lab import figures
from lab.compare import (
    ANSWERS,
    VERDICTS,
    ended,
    less,
    lost,
    markdown,
    mean_sd,
    median,
    number,
    seconds,
    seconds_to,
    sooner,
    span,
)


def state(runs):
    """Bytes of a method's weights, gradients and optimiser state: the same for every seed."""
    return next((run["state_bytes"] for run in ended(runs)), math.nan)


def of_variants(claims):
    """(method, reward_source or offset or None): its runs, in the order of the seeds."""
    runs = {}
    for run in claims["runs"]:
        runs.setdefault((run["method"], run.get("reward_source")), []).append(run)
    for run in claims["offsets"]:
        runs.setdefault((run["method"], run["offset"]), []).append(run)
    return runs


def candidates_of(claims, method, offset="zero"):
    return [candidate for candidate in claims["tuning"]
            if (candidate["method"], candidate["offset"]) == (method, offset)]


def below_reference(claims, method, offset="zero"):
    """How many candidates of the grid end below the reference, on a tuning seed or more."""
    grid = candidates_of(claims, method, offset)
    below = [any(share is None or share > 1 for share in candidate["lost"]) for candidate in grid]
    return f"{sum(below)} of {len(grid)}"


def paper_rows(claims):
    runs = of_variants(claims)
    pair, dpo, mse, bce, score, mixed, kto = (runs[name, None] for name in (
        "una-pair", "dpo", "una-binary-mse", "una-binary-bce", "una-score", "una-mixed", "kto"))
    online, ppo = runs["una-online", "judge"], runs["ppo", "judge"]
    longer = claims["longer"]
    apart = max((abs(a[split][name] - b[split][name])
                 for a, b in zip(pair, dpo) if ended([a, b]) == [a, b]
                 for split in ("train", "heldout") for name in a["train"]), default=math.nan)
    states = [state(runs["una-online", kind]) / state(runs["ppo", kind])
              for kind in ("judge", "model")]
    spreads = [np.std(lost(ended(which)), ddof=1) for which in (online, ppo)]
    failures = [below_reference(claims, name) for name in ("una-online", "ppo")]
    binary_mse, binary_bce, scores = "28.88 / 63.12", "28.93 / 63.06", "30.92 / 64.35"
    of_kto, of_dpo = "28.56 / 62.74", "28.53 / 62.26"

    def verdict(holds):
        return VERDICTS[0] if holds else "does not"

    return [
        ["pairwise UNA is DPO", "“equivalent”",
         f"{mean_sd(lost(pair), ' %')} against {mean_sd(lost(dpo), ' %')}",
         f"largest of any figure: {number(apart, '.2g')}", verdict(apart == 0)],
        less("binary UNA (MSE) beats KTO", f"{binary_mse} against {of_kto}", mse, kto),
        less("binary UNA (BCE) beats KTO", f"{binary_bce} against {of_kto}", bce, kto),
        less("score UNA beats binary UNA (MSE)", f"{scores} against {binary_mse}", score, mse),
        less("score UNA beats binary UNA (BCE)", f"{scores} against {binary_bce}", score, bce),
        less("score UNA beats KTO", f"{scores} against {of_kto}", score, kto),
        less("score UNA beats DPO", f"{scores} against {of_dpo}", score, dpo),
        less("online UNA beats RLHF/PPO: judge's reward, as many samples",
             "25.91 / 56.13 against 25.36 / 55.68", online, ppo),
        less("… a reward model's reward", "the same",
             runs["una-online", "model"], runs["ppo", "model"]),
        less("… judge's reward, 2.5 times the steps ({} s against {} s)".format(
            number(median(seconds(longer))), number(median(seconds(ppo)))), "–", longer, ppo),
        sooner("it is faster: as many samples", "3.5 h against 8 h: 2.3 ×",
               seconds(online), seconds(ppo)),
        *(sooner(f"… until {share:.0%} of the gain", "–",
                 *([seconds_to(share, run) for run in which] for which in (online, ppo)))
          for share in (0.5, 0.9, 0.99)),
        ["it needs less memory: weights, gradients and optimiser state", "no figure",
         f"{states[0]:.3g} of PPO's; with a reward model {states[1]:.3g}", "–",
         verdict(max(states) < 1)],
        ["it is more stable: deviation over seeds", "no figure",
         f"{number(spreads[0], '.2g')} % against {number(spreads[1], '.2g')} %", "–",
         verdict(spreads[0] < spreads[1])],
        ["… grid candidates that end below the reference", "no figure",
         f"{failures[0]} against {failures[1]}", "–",
         verdict(int(failures[0].split()[0]) < int(failures[1].split()[0]))],
        *(less(f"one run can use all three kinds of feedback: mixed against {name}", "no figure",
               mixed, other, ("it can, and loses less", "it can, but loses more",
                              "it can; no difference shown"))
          for name, other in (("pairs alone", pair), ("labels alone (BCE)", bce),
                              ("scores alone", score))),
    ]


def beyond_rows(claims):
    runs = of_variants(claims)
    start = {entry["seed"]: entry["train"]["residual_variance"] for entry in claims["reference"]}
    score, bce = runs["una-score", None], runs["una-binary-bce", None]
    online, ppo = runs["una-online", "judge"], runs["ppo", "judge"]
    residual = [median([run["train"]["residual_variance"] / start[run["seed"]]
                        for run in ended(which)]) for which in (online, ppo)]
    noise = [median([run["curve"][-1]["gradient_noise"] / run["curve"][0]["gradient_noise"]
                     for run in ended(which)]) for which in (online, ppo)]
    offsets = (("exact", "β log Z(x)"), ("prompt", "the mean residual of a prompt"),
               ("batch", "the mean residual of the batch"))
    rows = [less(f"una-score loses less with {what} than with f = c = 0", "",
                 runs["una-score", kind], score, ANSWERS) for kind, what in offsets]
    rows += [
        less("una-binary-bce loses less with β log Z(x) than with f = c = 0", "",
             runs["una-binary-bce", "exact"], bce, ANSWERS),
        less("online, Eq. 7 loses less than Eq. 9", "",
             online, runs["una-online-score", "judge"], ANSWERS),
        ["the residual r − β log π/π_ref ends with less variance than it starts with "
         "(end / start, median)", "", "una-online {:.1g}, ppo {:.1g}".format(*residual), "–",
         "yes, both: it measures the policy" if max(residual) < 0.1 else "no"],
        ["so una-online's gradient loses its noise and ppo's does not "
         "(variance, end / start, median)", "",
         "una-online {:.1g}, ppo {:.1g}".format(*noise), "–",
         "yes" if 10 * noise[0] < noise[1] else "no"],
    ]
    for name in ("una-online", "ppo"):
        reports = [run["reward_model"] for run in ended(runs[name, "model"])]
        by_model, by_judge = ([report[key] for report in reports]
                              for key in ("model_gain", "judge_gain"))
        accuracy = mean_sd([100 * report["accuracy"] for report in reports], " %")
        rows.append([f"{name} exploits its reward model (accuracy {accuracy}): reward gained, by "
                     "the model and by the judge", "",
                     f"{mean_sd(by_model)} and {mean_sd(by_judge)}",
                     *span([a - b for a, b in zip(by_model, by_judge)],
                           ("no: the reverse", "yes", "no difference shown"))])
    return [[row[0], *row[2:]] for row in rows]


def prediction_rows(claims):
    """What theory, or an earlier prototype, led one to expect: fixed before the runs."""
    runs = of_variants(claims)
    online, ppo, longer = runs["una-online", "judge"], runs["ppo", "judge"], claims["longer"]
    end, later, other = (median(lost(which)) for which in (online, longer, ppo))
    longer_seconds, ppo_seconds = median(seconds(longer)), median(seconds(ppo))
    arrive = [np.median([seconds_to(0.99, run) for run in which]) for which in (online, ppo)]
    share = state(runs["una-online", "model"]) / state(runs["ppo", "model"])
    score, mse, bce, kto = (np.mean(lost(runs[name, None])) for name in (
        "una-score", "una-binary-mse", "una-binary-bce", "kto"))
    rows = [
        ["`una-online` loses at most 0.2 % (median, judge's reward)",
         f"{number(end)} %", end <= 0.2],
        ["in no more than `ppo`'s seconds it loses at most a third of what `ppo` loses (medians)",
         f"{number(later)} % in {number(longer_seconds)} s against {number(other)} % "
         f"in {number(ppo_seconds)} s", longer_seconds <= ppo_seconds and later <= other / 3],
        ["it reaches 99 % of the gain in at most half of `ppo`'s seconds (medians)",
         f"{number(arrive[0])} s against {number(arrive[1])} s",
         arrive[0] <= arrive[1] / 2 < math.inf],
        ["it needs at most 0.6 of `ppo`'s state, a reward model included in both",
         f"{share:.3f}", round(share, 3) <= 0.6],
        ["`una-score` loses less than both `una-binary`, and these less than `kto` (means)",
         f"{number(score)} %, {number(mse)} % and {number(bce)} %, {number(kto)} %",
         score < min(mse, bce) and max(mse, bce) < kto],
    ]
    return [[*row[:2], "holds" if row[2] else "does not hold"] for row in rows]


def feedback_rows(claims):
    """Methods on stored feedback: lost, against judged responses; distance below the frontier."""
    runs, seeds = of_variants(claims), {run["seed"] for run in claims["sizes"]}
    start = {entry["seed"]: entry["train"] for entry in claims["reference"]}
    by_size = {}
    for run in claims["sizes"] + claims["runs"]:
        if run["seed"] in seeds:
            by_size.setdefault((run["method"], run["judged"]), []).append(run)
    sizes = sorted({size for _, size in by_size})
    names = dict.fromkeys(run["method"] for run in claims["sizes"])
    rows = [["`una-pair`, `dpo`" if name == "una-pair" else f"`{name}`",
             *(mean_sd(lost(by_size[name, size]), " %") for size in sizes),
             mean_sd([100 * figures.frontier_share(run["train"], start[run["seed"]])
                      for run in ended(runs[name, None])], " %")] for name in names]
    judged = claims["settings"]["judged"]
    return ["lost, by judged responses", *map(str, sizes), f"of the frontier ({judged})"], rows


def cost_rows(claims):
    runs, rows = of_variants(claims), []
    peaks = {(entry["method"], entry["reward_source"]): entry["bytes"]
             for entry in claims["peak_memory"]}
    for (name, source), same in runs.items():
        if source in (None, "judge", "model"):
            peak = peaks.get((name, source or "judge"), math.nan)
            shares = lost(same)
            rows.append([f"`{name}`" + (", reward model" if source == "model" else ""),
                         number(median(seconds(same))), f"{number(state(same) / 1e6)} MB",
                         f"{number(peak / 1e6)} MB", f"{number(np.median(shares))} %",
                         f"{number(max(shares))} %"])
    return ["method", "seconds", "state", "peak above the idle process", "lost, median",
            "lost, worst seed"], rows


def grid_rows(claims):
    rows = []
    for method, offset in dict.fromkeys((c["method"], c["offset"]) for c in claims["tuning"]):
        grid = candidates_of(claims, method, offset)
        (chosen,) = [candidate for candidate in grid if candidate["best"]]
        means = [math.inf if None in candidate["lost"] else 100 * np.mean(candidate["lost"])
                 for candidate in grid]
        edges = [word for name, word in (("learning_rate", "learning rate"), ("multiple", "β"))
                 if chosen[name] in (min(c[name] for c in grid), max(c[name] for c in grid))]
        rows.append([f"`{method}`" + ("" if offset == "zero" else f", offset {offset}"),
                     f"{chosen['learning_rate']:g}", f"{chosen['multiple']:g}",
                     f"{number(min(means))} %", f"{number(np.median(means))} %",
                     below_reference(claims, method, offset), " and ".join(edges) or "–"])
    return ["grid", "learning rate", "β / task's", "lost there", "median candidate",
            "candidates below π_ref", "at the edge of the grid"], rows


def tables(claims):
    """{name: Markdown}."""
    judged = claims | dict(runs=[run for run in claims["runs"]
                                 if run.get("reward_source") != "model"])
    heading = ["here: lost", "difference [95 %]", "verdict"]
    return {
        "claims": markdown(["claim", "paper's figures", *heading], paper_rows(claims)),
        "predictions": markdown(["expected", "found", ""], prediction_rows(claims)),
        "beyond": markdown(["beyond the paper", *heading], beyond_rows(claims)),
        "feedback": markdown(*feedback_rows(claims)),
        "cost": markdown(*cost_rows(claims)),
        "grids": markdown(*grid_rows(claims)),
        "train": f"```\n{figures.table(judged, 'train')}\n```",
        "heldout": f"```\n{figures.table(judged, 'heldout')}\n```",
    }

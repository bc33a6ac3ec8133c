"""The README's tables of results, from assets/claims.json: `python tests/claims.py` writes them into the README.

"Lost" is the share of the possible gain, J* - J(pi_ref), that a run ends without, on training prompts. Figures are means and
standard deviations over the reported seeds; differences are paired by seed, since a seed is one reference and one feedback.
"""
import json
import math
import re
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402

# Two-sided 95% quantiles of Student's t, by the number of seeds.
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def interval(differences):
    """Their mean, and the ends of its 95% interval."""
    mean, half = np.mean(differences), T95[len(differences)] * np.std(differences, ddof=1) / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def number(value, form=".3g"):
    if abs(value) >= 100:
        form = form[:-2] + "0f"                                             # no exponents
    return f"{value:{form}}".replace("-", "−")


def mean_sd(values, unit=""):
    return f"{number(np.mean(values))} ± {number(np.std(values, ddof=1), '.2g')}{unit}"


def lost(runs):
    """In percent."""
    return np.array([100 * train.lost(run) for run in runs])


def seconds_to(share, run):
    """Seconds of training until that share of the possible gain is reached; between points, log regret is taken as linear."""
    goal = (1 - share) * run["curve"][0]["regret"]
    for before, after in zip(run["curve"], run["curve"][1:]):
        if after["regret"] <= goal:
            done = math.log(before["regret"] / goal) / math.log(before["regret"] / after["regret"])
            return before["seconds"] + done * (after["seconds"] - before["seconds"])
    return math.inf


def less(claim, paper, ours, theirs, words=("replicates", "does not: the reverse", "does not: no difference shown")):
    """A row of the table: do our runs lose less than theirs?"""
    mean, low, high = interval(lost(ours) - lost(theirs))
    return [claim, paper, f"{mean_sd(lost(ours), ' %')} against {mean_sd(lost(theirs), ' %')}",
            f"{number(mean, '+.3g')} [{number(low, '+.3g')}, {number(high, '+.3g')}]",
            words[0] if high < 0 else words[1] if low > 0 else words[2]]


def sooner(claim, paper, ours, theirs):
    """A row of the table: do ours take fewer seconds? Medians; the ratio is the geometric mean over seeds where both arrive."""
    both = [math.log(their / our) for our, their in zip(ours, theirs) if max(our, their) < math.inf]
    here = f"{np.median(ours):.3g} s against {np.median(theirs):.3g} s"
    if len(both) < len(ours):
        here += f"; {np.isfinite(ours).sum()} and {np.isfinite(theirs).sum()} of {len(ours)} seeds arrive"
    if len(both) < 2:
        return [claim, paper, here, "–", "–"]
    mean, low, high = np.exp(interval(both))
    return [claim, paper, here, f"× {mean:.3g} [{low:.3g}, {high:.3g}]",
            "replicates" if low > 1 else "does not: the reverse" if high < 1 else "does not: no difference shown"]


def markdown(heading, rows):
    return "\n".join("| " + " | ".join(line) + " |" for line in [heading, ["---"] * len(heading), *rows])


def cells(claims, method, offset="zero"):
    return [cell for cell in claims["tuning"] if (cell["method"], cell["offset"]) == (method, offset)]


def medians(name, groups):
    return [np.median([run[name] for run in group]) for group in groups]


def below_reference(claims, method, offset="zero"):
    """How many cells of the grid end below the reference, on a tuning seed or more."""
    grid = cells(claims, "una-pair" if method == "dpo" else method, offset)
    return f"{sum(any(share is None or share > 1 for share in cell['lost']) for cell in grid)} of {len(grid)}"


def runs_of(claims):
    """(method, reward_source or offset or None) -> its runs, in the order of the seeds."""
    runs = {}
    for run in claims["runs"]:
        runs.setdefault((run["method"], run.get("reward_source")), []).append(run)
    for run in claims["offsets"]:
        runs.setdefault((run["method"], run["offset"]), []).append(run)
    return runs


def paper_rows(claims):
    runs = runs_of(claims)
    pair, dpo, mse, bce, score, mixed, kto = (runs[method, None] for method in (
        "una-pair", "dpo", "una-binary-mse", "una-binary-bce", "una-score", "una-mixed", "kto"))
    online, ppo = runs["una-online", "true"], runs["ppo", "true"]
    apart = max(abs(a[split][name] - b[split][name])
                for a, b in zip(pair, dpo) for split in ("train", "heldout") for name in a["train"])
    state = [runs["una-online", kind][0]["state_bytes"] / runs["ppo", kind][0]["state_bytes"] for kind in ("true", "model")]
    spreads = [np.std(lost(which), ddof=1) for which in (online, ppo)]
    failures = [below_reference(claims, method) for method in ("una-online", "ppo")]
    return [
        ["pairwise UNA is DPO", "“equivalent”", f"{mean_sd(lost(pair), ' %')} against {mean_sd(lost(dpo), ' %')}",
         f"largest of any figure: {apart:.2g}", "replicates" if apart == 0 else "does not"],
        less("binary UNA (MSE) beats KTO", "28.88 / 63.12 against 28.56 / 62.74", mse, kto),
        less("binary UNA (BCE) beats KTO", "28.93 / 63.06 against 28.56 / 62.74", bce, kto),
        less("score UNA beats binary UNA (MSE)", "30.92 / 64.35 against 28.88 / 63.12", score, mse),
        less("score UNA beats binary UNA (BCE)", "30.92 / 64.35 against 28.93 / 63.06", score, bce),
        less("score UNA beats KTO", "30.92 / 64.35 against 28.56 / 62.74", score, kto),
        less("score UNA beats DPO", "30.92 / 64.35 against 28.53 / 62.26", score, dpo),
        less("online UNA beats RLHF/PPO: true reward, as many samples", "25.91 / 56.13 against 25.36 / 55.68", online, ppo),
        less("… a reward model's reward", "the same", runs["una-online", "model"], runs["ppo", "model"]),
        less("… true reward, 2.5 times the steps ({:.3g} s against {:.3g} s)".format(*medians("seconds", [claims["longer"], ppo])),
             "–", claims["longer"], ppo),
        sooner("it is faster: as many samples", "3.5 h against 8 h: 2.3 ×",
               [run["seconds"] for run in online], [run["seconds"] for run in ppo]),
        *(sooner(f"… until {share:.0%} of the gain", "–", *([seconds_to(share, run) for run in which] for which in (online, ppo)))
          for share in (0.5, 0.9, 0.99)),
        ["it needs less memory: weights, gradients and optimiser state", "no figure",
         f"{state[0]:.3g} of PPO's; with a reward model {state[1]:.3g}", "–", "replicates" if max(state) < 1 else "does not"],
        ["it is more stable: deviation over seeds", "no figure",
         f"{number(spreads[0], '.2g')} % against {number(spreads[1], '.2g')} %", "–", "replicates" if spreads[0] < spreads[1] else "does not"],
        ["… grid cells that end below the reference", "no figure", f"{failures[0]} against {failures[1]}", "–",
         "replicates" if int(failures[0].split()[0]) < int(failures[1].split()[0]) else "does not"],
        *(less(f"one run can use all three kinds of feedback: mixed against {name}", "no figure", mixed, other,
               ("it can, and loses less", "it can, but loses more", "it can; no difference shown"))
          for name, other in (("pairs alone", pair), ("thumbs alone (BCE)", bce), ("scores alone", score))),
    ]


def beyond_rows(claims):
    runs, words = runs_of(claims), ("yes", "no: the reverse", "no difference shown")
    start = {entry["seed"]: entry["train"]["residual_variance"] for entry in claims["landmarks"] if entry["method"] == "reference"}
    online, ppo = runs["una-online", "true"], runs["ppo", "true"]
    residual = [np.median([run["train"]["residual_variance"] / start[run["seed"]] for run in which]) for which in (online, ppo)]
    noise = [np.median([run["curve"][-1]["gradient_noise"] / run["curve"][0]["gradient_noise"] for run in which])
             for which in (online, ppo)]
    rows = [less(f"una-score loses less with {what} than with f = c = 0", "", runs["una-score", kind], runs["una-score", None], words)
            for kind, what in (("exact", "β log Z(x)"), ("prompt", "the mean residual of a prompt"),
                               ("batch", "the mean residual of the batch"))]
    rows += [
        less("una-binary-bce loses less with β log Z(x) than with f = c = 0", "",
             runs["una-binary-bce", "exact"], runs["una-binary-bce", None], words),
        less("online, Eq. 7 loses less than Eq. 9", "", online, runs["una-online-score", "true"], words),
        ["the residual r − β log π/π_ref ends with less variance than it starts with (end / start, median)", "",
         "una-online {:.1g}, ppo {:.1g}".format(*residual), "–", "yes, both: it measures the policy" if max(residual) < 0.1 else "no"],
        ["so una-online's gradient loses its noise and ppo's does not (variance, end / start, median)", "",
         "una-online {:.1g}, ppo {:.1g}".format(*noise), "–", "yes" if 10 * noise[0] < noise[1] else "no"],
    ]
    for method in ("una-online", "ppo"):
        told = [run["reward_model"] for run in runs[method, "model"]]
        judged, true = ([report[key] for report in told] for key in ("judged_gain", "true_gain"))
        mean, low, high = interval(np.array(judged) - true)
        rows.append([f"{method} exploits its reward model (accuracy {mean_sd([100 * report['accuracy'] for report in told], ' %')}): "
                     "reward gained, by the model and by the judge", "", f"{mean_sd(judged)} and {mean_sd(true)}",
                     f"{number(mean, '+.3g')} [{number(low, '+.3g')}, {number(high, '+.3g')}]",
                     "yes" if low > 0 else "no: the reverse" if high < 0 else "no difference shown"])
    return [[row[0], *row[2:]] for row in rows]


def prediction_rows(claims):
    """What theory, or an earlier prototype, led one to expect: fixed before the runs."""
    runs = runs_of(claims)
    online, ppo = runs["una-online", "true"], runs["ppo", "true"]
    ends = {name: np.median(lost(which)) for name, which in (("online", online), ("longer", claims["longer"]), ("ppo", ppo))}
    longer, whole = medians("seconds", [claims["longer"], ppo])
    arrive = [np.median([seconds_to(0.99, run) for run in which]) for which in (online, ppo)]
    state = runs["una-online", "model"][0]["state_bytes"] / runs["ppo", "model"][0]["state_bytes"]
    score, mse, bce, kto = (np.mean(lost(runs[method, None])) for method in ("una-score", "una-binary-mse", "una-binary-bce", "kto"))
    return [[*row[:2], "holds" if row[2] else "does not hold"] for row in (
        ["`una-online` loses at most 0.2 % (median, true reward)", f"{number(ends['online'])} %", ends["online"] <= 0.2],
        ["in no more than `ppo`'s seconds it loses at most a third of what `ppo` loses (medians)",
         f"{number(ends['longer'])} % in {longer:.3g} s against {number(ends['ppo'])} % in {whole:.3g} s",
         longer <= whole and ends["longer"] <= ends["ppo"] / 3],
        ["it reaches 99 % of the gain in at most half of `ppo`'s seconds (medians)", f"{arrive[0]:.3g} s against {arrive[1]:.3g} s",
         arrive[0] <= arrive[1] / 2 < math.inf],
        ["it needs at most 0.6 of `ppo`'s state, a reward model included in both", f"{state:.3f}", round(state, 3) <= 0.6],
        ["`una-score` loses less than both `una-binary`, and these less than `kto` (means)",
         f"{number(score)} %, {number(mse)} % and {number(bce)} %, {number(kto)} %", score < min(mse, bce) and max(mse, bce) < kto],
    )]


def feedback_rows(claims):
    """Every method on stored feedback: lost, against the number of judged responses; and its distance below the frontier."""
    runs, seeds = runs_of(claims), sorted({run["seed"] for run in claims["sizes"]})
    start = {entry["seed"]: entry["train"] for entry in claims["landmarks"] if entry["method"] == "reference"}
    by_size = {}
    for run in claims["sizes"] + claims["runs"]:
        if run["seed"] in seeds:
            by_size.setdefault((run["method"], run["judged"]), []).append(run)
    sizes = sorted({run["judged"] for run in claims["sizes"] + claims["runs"]})
    rows = [["`una-pair`, `dpo`" if method == "una-pair" else f"`{method}`", *(mean_sd(lost(by_size[method, size]), " %") for size in sizes),
             mean_sd([100 * train.frontier_share(run["train"], start[run["seed"]]) for run in runs[method, None]], " %")]
            for method in train.METHODS if method not in (*train.ONLINE, "dpo")]
    return ["lost, by judged responses", *map(str, sizes), f"of the frontier ({claims['settings']['judged']})"], rows


def cost_rows(claims):
    runs = runs_of(claims)
    rows = []
    for entry in claims["peak_memory"]:
        method, source = entry["method"], entry["reward_source"]
        same = runs[method, source if method in train.ONLINE else None]
        rows.append([f"`{method}`" + (", reward model" if source == "model" else ""), f"{np.median([run['seconds'] for run in same]):.3g}",
                     f"{same[0]['state_bytes'] / 1e6:.3g} MB", f"{entry['bytes'] / 1e6:.3g} MB", f"{number(np.median(lost(same)))} %",
                     f"{number(max(lost(same)))} %"])
    return ["method", "seconds", "state", "peak above the idle process", "lost, median", "lost, worst seed"], rows


def grid_rows(claims):
    rows = []
    for method, offset in train.GRIDS:
        grid = cells(claims, method, offset)
        (chosen,) = [cell for cell in grid if cell["best"]]
        means = [math.inf if None in cell["lost"] else 100 * np.mean(cell["lost"]) for cell in grid]
        edges = [word for name, word in (("learning_rate", "learning rate"), ("multiple", "β"))
                 if chosen[name] in (min(cell[name] for cell in grid), max(cell[name] for cell in grid))]
        rows.append([f"`{method}`" + ("" if offset == "zero" else f", offset {offset}"),
                     f"{chosen['learning_rate']:g}", f"{chosen['multiple']:g}", f"{number(min(means))} %", f"{number(np.median(means))} %",
                     below_reference(claims, method, offset), " and ".join(edges) or "–"])
    return ["grid", "learning rate", "β / task's", "lost there", "median cell", "cells below π_ref", "at the edge of the grid"], rows


def blocks(claims):
    """The README's blocks, by the name in their marks."""
    true = claims | dict(runs=[run for run in claims["runs"] if run.get("reward_source") != "model"])
    return {
        "train": f"```\n{train.table(true, 'train')}\n```", "heldout": f"```\n{train.table(true, 'heldout')}\n```",
        "claims": markdown(["claim", "paper's figures", "here: lost", "difference [95 %]", "verdict"], paper_rows(claims)),
        "predictions": markdown(["expected", "found", ""], prediction_rows(claims)),
        "beyond": markdown(["beyond the paper", "here: lost", "difference [95 %]", "verdict"], beyond_rows(claims)),
        "feedback": markdown(*feedback_rows(claims)), "cost": markdown(*cost_rows(claims)), "grids": markdown(*grid_rows(claims)),
    }


def written_into(readme, claims):
    """The README with its blocks, between <!-- NAME --> and <!-- end -->, made anew, and the line numbers of its links."""
    for name, block in blocks(claims).items():
        readme, found = re.subn(f"(<!-- {name} -->\n).*?(\n<!-- end -->)", lambda match: match[1] + block + match[2], readme, flags=re.S)
        assert found == 1, f"the README has {found} blocks named {name}"

    def line_of(match):
        lines = (ROOT / match[2]).read_text().splitlines()
        return f"[`{match[1]}`]({match[2]}#L{next(i for i, line in enumerate(lines, 1) if line.startswith(f'def {match[1]}('))})"

    return re.sub(r"\[`(\w+)`\]\(([\w/.]+)#L\d+\)", line_of, readme)


if __name__ == "__main__":
    path = ROOT / "README.md"
    train.save(path, lambda partial: Path(partial).write_text(written_into(
        path.read_text(), json.loads((ROOT / "assets" / "claims.json").read_text()))))

"""Tables and pictures of lab/budget.py, from budget.json and claims.json. Knows no training."""
import math

import numpy as np

from lab import figures, tables
from lab.compare import ended, lost, markdown, median, number, sign, with_range

SIZES = (1200, 9600, 76_800)
# (name on the page, method, offset), and how many of two responses' judgements a pair saves: a pair
# is one judgement of two responses. A third of una-mixed's responses are in pairs.
STORED = (("dpo", "dpo", "zero", 1 / 2), ("kto", "kto", "zero", 1),
          ("una-binary-bce", "una-binary-bce", "zero", 1),
          ("una-binary-offset", "una-binary-offset", "learned", 1),
          ("una-score", "una-score", "zero", 1),
          ("una-score-offset", "una-score-offset", "estimated", 1),
          ("una-score, learned", "una-score", "learned", 1),
          ("una-mixed", "una-mixed", "zero", 5 / 6))
ONLINE = ("una-online", "ppo")
GOALS = (50, 90, 99)                                             # percent of the possible gain
PICTURES = ("judgements.png", "reward-model.png")


# ---------------------------------------------------------------- which runs
def pick(claims, budget, method, offset, size, like=None):
    """The reported runs of a method of stored feedback at level 1, one for each seed.

    like: a run whose cell and steps they have.
    """
    found = [run for run in budget["runs"] if (run["method"], run["offset"], run["judged"])
             == (method, offset, size)
             and (like is None or (run["cell"], run["steps"]) == (like["cell"], like["steps"]))]
    return found or tables.pick(claims, method, offset, level=1.0, judged=size)


def best_cell(claims, budget, method, offset, size):
    """The cell of these runs, with its number of steps."""
    run = pick(claims, budget, method, offset, size)[0]
    return run["cell"] | dict(steps=run["steps"])


def points(claims, budget, method, offset):
    """[(judged responses, lost in percent of each seed)] of stored feedback."""
    return [(size, lost(pick(claims, budget, method, offset, size))) for size in SIZES]


def curve(budget, method, batch):
    """The same of an online method: fresh responses judged so far."""
    runs = [run for run in budget["runs"] if run["method"] == method]
    steps = [point["step"] for point in ended(runs)[0]["curve"]][1:]
    return [(batch * step, [100 * run["curve"][i]["regret"] / run["curve"][0]["regret"]
                            if "diverged" not in run else math.inf for run in runs])
            for i, step in enumerate(steps, 1)]


def needed(points, goal):
    """Judged responses until the median has gained `goal` percent; and as text, "≤ 1,200".

    Between two points the logarithms are taken as linear.
    """
    allowed, before = 100 - goal, None
    for judged, shares in points:
        here = median(shares)
        if here <= allowed:
            if before is None:
                return judged, f"≤ {judged:,}"
            done = 1.0                                           # from endless: not before here
            if before[1] < math.inf:
                done = math.log(before[1] / allowed) / math.log(before[1] / here)
            value = before[0] * (judged / before[0]) ** done
            return value, two_digits(value)
        before = judged, here
    return math.inf, f"> {points[-1][0]:,}"


# ---------------------------------------------------------------- how many judgements
def size_rows(claims, budget):
    rows = []
    for name, method, offset, weight in STORED:
        found = points(claims, budget, method, offset)
        needs = [needed(found, goal) for goal in GOALS]
        rows.append([f"`{name}`" if "," not in name else "`una-score`, learned f(x) + c",
                     *(with_range(shares, " %") for _, shares in found),
                     *(both_ways(*need, weight) for need in needs)])
    for name in ONLINE:
        found = curve(budget, name, claims["settings"]["batch"])
        at = dict(found)
        rows.append([f"`{name}`, fresh", "–", with_range(at[9600], " %") if 9600 in at else "–",
                     with_range(found[-1][1], " %"),
                     *(needed(found, goal)[1] for goal in GOALS)])
    return ["lost", *(f"{size:,}" for size in SIZES),
            *(f"to {goal} % of the gain" for goal in GOALS)], rows


def two_digits(value):
    return f"{round(value, 1 - int(math.log10(value))):,.0f}"


def both_ways(value, text, weight):
    """Responses, and in parentheses the judgements, where these are fewer."""
    if weight == 1 or value == math.inf:
        return text
    fewer = value * weight
    return f"{text} ({'≤ ' if '≤' in text else ''}{two_digits(fewer)})"


def cell_rows(claims, budget):
    def words(method, offset, size):
        return tables.cell_text(best_cell(claims, budget, method, offset, size))
    return ["best cell: learning rate, β, steps", *(f"{size:,}" for size in SIZES)], [
        [f"`{name}`", *(words(method, offset, size) for size in SIZES)]
        for name, method, offset, _ in STORED]


# ---------------------------------------------------------------- what a reward model costs
def models(budget, size):
    return [model for model in budget["models"] if model["judged"] == size]


def share(reached, start):
    """In percent."""
    return 100 * reached["regret"] / start["regret"]


def by(measure, model, which):
    """Percent of the possible gain that the ceiling, or an online run, goes without: by "train",
    the judge's measure, or "by_model"."""
    entry = model["ceiling"] if which == "ceiling" else model["runs"][which]
    return math.inf if "diverged" in entry else share(entry[measure], model["reference"][measure])


def model_rows(claims, budget):
    rows = []
    for size in SIZES:
        entries = models(budget, size)
        accuracy = [100 * model["runs"]["ppo"]["reward_model"]["accuracy"] for model in entries]
        plain = [100 * dict(map(tuple, model["ceilings"]))[1.0] for model in entries]
        row = [f"{size // 2:,}", with_range(accuracy, " %"), with_range(plain, " %"),
               with_range([by("train", model, "ceiling") for model in entries], " %")]
        for name in ONLINE:
            row += [with_range([by(measure, model, name) for model in entries], " %")
                    for measure in ("by_model", "train")]
        dpo = lost(pick(claims, budget, "dpo", "zero", size))
        rows.append([*row, with_range(dpo, " %")])
    return ["pairs", "orders pairs as the judge", "optimum of the model, β × 1", "tuned β",
            *(f"`{name}`, by {measure}" for name in ONLINE for measure in ("the model", "the judge")
              ), "`dpo` on the same pairs"], rows


def gains(model, which):
    """Reward gained at the ceiling or at a run's end, by the model and by the judge."""
    entry = model["ceiling"] if which == "ceiling" else model["runs"][which]
    if "diverged" in entry:
        return math.nan, math.nan
    return tuple(entry[measure]["reward"] - model["reference"][measure]["reward"]
                 for measure in ("by_model", "train"))


def exploitation_rows(budget):
    rows = []
    for size in SIZES:
        for which in ("ceiling", *ONLINE):
            both = [gains(model, which) for model in models(budget, size)]
            by_model, by_judge = zip(*both)
            apart = [a - b for a, b in both]
            rows.append([f"{size // 2:,} pairs, " + ("the model's optimum" if which == "ceiling"
                                                     else f"`{which}`"),
                         with_range([*by_model]), with_range([*by_judge]),
                         number(median(apart), "+.2g"),
                         sign(apart, ("no: the judge sees more", "yes", "no difference shown"))])
    return ["reward gained", "by the model", "by the judge", "difference", "exploited"], rows


# ---------------------------------------------------------------- predictions
def prediction_rows(claims, budget):
    def of(method, offset="zero", size=1200):
        return median(lost(pick(claims, budget, method, offset, size)))

    def reach(measure, which, size):
        return median([by(measure, model, which) for model in models(budget, size)])

    few, dpo = of("una-score-offset", "estimated"), of("dpo", size=76_800)
    zero = [of("una-score", size=size) for size in (9600, 76_800)]
    learned, estimated = ([of(method, offset, size) for size in SIZES] for method, offset in (
        ("una-score", "learned"), ("una-score-offset", "estimated")))
    binary = of("una-binary-offset", "learned", 9600), of("una-binary-bce", size=76_800)
    beta = best_cell(claims, budget, "dpo", "zero", 1200)["beta"]
    ceiling, pairs = ([reach("train", "ceiling", size) for size in SIZES],
                      [of("dpo", size=size) for size in SIZES])
    optimisers = [reach("by_model", name, size) for name in ONLINE for size in SIZES]
    apart = [a - b for a, b in (gains(model, "ceiling") for model in models(budget, 1200))]
    lists = [", ".join(f"{number(value, '.2g')} %" for value in values)
             for values in (learned, estimated, ceiling, pairs, optimisers)]
    found = dict(
        few_scores=(f"{number(few)} % against {number(dpo)} %", few < dpo),
        zero=(f"{number(zero[1])} % against {number(zero[0])} %", zero[1] >= 0.8 * zero[0]),
        learned=(f"{lists[0]} against {lists[1]}",
                 all(a < b for a, b in zip(learned, estimated))),
        binary=(f"{number(binary[0])} % against {number(binary[1])} %", binary[0] < binary[1]),
        pairs=(f"{beta:g} times the task's", beta > 1),
        detour=(f"{lists[2]} against {lists[3]}", all(a < b for a, b in zip(ceiling, pairs))),
        optimiser=(lists[4], max(optimisers) <= 1),
        exploitation=(f"{number(min(apart), '+.2g')} to {number(max(apart), '+.2g')}",
                      min(apart) > 0))
    return tables.predicted(budget, found)


def all_tables(claims, budget):
    """{name: Markdown}."""
    return dict(sizes=markdown(*size_rows(claims, budget)),
                size_cells=markdown(*cell_rows(claims, budget)),
                models=markdown(*model_rows(claims, budget)),
                exploitation=markdown(*exploitation_rows(budget)),
                budget_predictions=markdown(tables.EXPECTED,
                                            prediction_rows(claims, budget)))


# ---------------------------------------------------------------- pictures
DASHES = {"zero": ":", "estimated": "-", "learned": "--"}


def draw_judgements(figure, claims, budget):
    """Lost against judged responses: medians, and the range of the seeds as a bar."""
    axes = figure.subplots()
    lines = [(name, points(claims, budget, method, offset), DASHES[offset])
             for name, method, offset, _ in STORED]
    lines += [(f"{name}, fresh", curve(budget, name, claims["settings"]["batch"]), "-")
              for name in ONLINE]
    for i, (name, found, dash) in enumerate(lines):
        color = figures.COLORS[i % len(figures.COLORS)]
        x = np.array([judged for judged, _ in found]) * 1.03 ** (i - 4)    # bars side by side
        middle = [median(shares) for _, shares in found]
        axes.plot(x, middle, dash, color=color, marker=figures.MARKERS[i % 5], label=name)
        if len(found) == len(SIZES):
            axes.vlines(x, [min(shares) for _, shares in found],
                        [max(shares) for _, shares in found], color=color, linewidth=0.8)
    for goal in GOALS:
        axes.axhline(100 - goal, color="grey", linewidth=0.6, zorder=0)
        beside(axes, 100 - goal, f"{goal} % gained")
    axes.axhline(100, color="black", linewidth=0.8, zorder=0)
    beside(axes, 100, "the reference")
    axes.set(xscale="log", yscale="log", xlabel="judged responses", ylim=(0.02, 2000),
             ylabel="lost: percent of the possible gain")
    axes.set_title("One learned number a prompt is worth more than 64 times the scores\n"
                   "(f(x) + c: dotted 0, solid estimated or free, dashed learned; level 1)",
                   fontsize=10)
    figure.legend(fontsize=8, loc="outside right")


def beside(axes, y, text):
    axes.text(1.01, y, text, transform=axes.get_yaxis_transform(), fontsize=7, va="center")


def draw_models(figure, claims, budget):
    """Lost by the judge, against pairs; and reward gained by the model and by the judge."""
    left, right = figure.subplots(1, 2)
    pairs = [size // 2 for size in SIZES]
    lines = [("dpo, the same pairs", [lost(pick(claims, budget, "dpo", "zero", size))
                                      for size in SIZES])]
    lines += [(words, [[by("train", model, which) for model in models(budget, size)]
                       for size in SIZES])
              for words, which in (("the model's optimum", "ceiling"),
                                   *((f"{name} on the model", name) for name in ONLINE))]
    for i, (name, shares) in enumerate(lines):
        x = np.array(pairs) * 1.04 ** (i - 1.5)
        left.plot(x, [median(values) for values in shares], color=figures.COLORS[i],
                  marker=figures.MARKERS[i], label=name)
        left.vlines(x, [min(values) for values in shares], [max(values) for values in shares],
                    color=figures.COLORS[i], linewidth=0.8)
    left.set(xscale="log", yscale="log", xlabel="judged pairs",
             ylabel="lost by the judge: percent of the possible gain")
    left.set_title("The detour over a reward model", fontsize=10)
    left.set_ylim(1)
    left.legend(fontsize=7, loc="lower left")
    for i, size in enumerate(SIZES):
        both = np.array([gains(model, "ceiling") for model in models(budget, size)])
        right.scatter(both[:, 1], both[:, 0], color=figures.COLORS[i], s=22,
                      marker=figures.MARKERS[i], label=f"{size // 2:,} pairs")
    low, high = right.get_xlim()
    right.plot([low, high], [low, high], color="black", linewidth=0.8, zorder=0)
    right.set(xlabel="reward gained, by the judge", ylabel="reward gained, by the model")
    right.set_title("Its optimum: above the line, it is exploited", fontsize=10)
    right.legend(fontsize=8)


def draw_pictures(claims, budget, folder):
    for name, draw, size in zip(PICTURES, (draw_judgements, draw_models), ((8.5, 5), (8.5, 4))):
        figures.picture(f"{folder}/{name}", draw, claims, budget, figsize=size)

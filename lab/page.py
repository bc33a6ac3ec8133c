"""The claims' page, README.md: the text between the tables, and the tables in it.

Its facts are held against claims.json and budget.json by tests/test_tables.py and
tests/test_budget.py; numbers in braces are theirs.
"""
import textwrap

from lab import budget_tables, tables
from lab.compare import lost, with_range

PAGE = """\
# The claims, settled

Does the paper's comparison of UNA with RLHF/PPO, DPO and KTO hold where the optimum is known?
`python -m lab.claims` made the numbers and pictures here, in two to three hours on two cores, where
a section does not name another command. Every run is in [claims.json](claims.json). The methods are
in [train.py](../train.py), their losses in [una.py](../una.py).

![Mean reward against KL for every method, below the exact frontier](frontier.png)

*Eight seeds, training prompts, no sampling error: each figure is a sum over all 406,901 responses
to a prompt. No policy can be above the line. It is the first seed's; the others' lie within about a
hundredth of it. The stars are where J = reward − β·KL is largest.*

- **Lost** is the share of the possible gain, J* − J(π_ref), that a run ends without, on the
  training prompts. 0 % is the exact optimum, 100 % the reference, more is worse than no training.
- A **seed** is a reference and feedback of its own. There are eight: the median, and in
  parentheses the least and the largest.
- A **difference** is ours minus theirs, paired by seed: its median and its range. There is a
  verdict only where all eight agree in sign, which chance alone would bring about once in 128.
- **Stored feedback** is 76,800 judged responses of the reference, 400 steps of 192, each seen once.
  The online methods see as many fresh ones. A pair takes two of them.
- At **level** 1 every noun's rewards have a level of their own: −1, −1/3, 1/3 or 1 is added to all
  rewards of a prompt. That is f(x). π*, J* − J and every preference stay as they are.

## What to make of it

{conclusions}

## The paper's claims

The **paper's figures** are its averages on two leaderboards: Mistral-7B on stored feedback,
Qwen2-1.5B online, one run each. Those are other tasks at another scale. The authors' online code
regresses against the policy that sampled, and nothing then holds it to π_ref; the one here is
anchored at π_ref, as Eq. 7 says.

{claims}

## What was predicted

Theory and single runs on tuning seeds had led to these predictions. They were fixed in
[claims.py](claims.py) before any reported seed ran.

{predictions}

## What f(x) + c is worth

Median lost over eight seeds, and the range. The last column says how far an offset ended from
β log Z(x), as a root mean square over the training prompts, at level 0 and 1.

{offsets}

- **estimated**: β log of the mean of e^{{r/β}} over the prompt's own scored responses, which
  π_ref wrote (`estimated_offset` in [una.py](../una.py)). It is known: A*-PO, RPO and Kimi k1.5
  regress on it, NCA has it in its labels.
- **learned**: one number a prompt, from 0, trained beside the weights with ten times their learning
  rate. DRO does so with a network.
- **exact**: β log Z(x), which only a toy can list; **one constant**: its mean over the prompts.
- **mean residual**: the mean of r − β log π/π_ref over the prompt's responses in the batch.

![Implicit against explicit rewards, before and after, both levels](implicit-against-explicit.png)

![The same dots while una-score-offset, dpo and una-online train](training.gif)

*One seed, the responses that π_ref gives over one time in 300. Where the dots lie on the diagonal
the policy is optimal.*

The mean residual makes a loss of differences. Its gradient pushes a prompt's log-probabilities only
against each other: the weights dL/dr of its responses add up to 0. Held constant, it still does so
in the squared loss on rewards. After the sigmoid it does not: what is left pushes all
log-probabilities alike, and nothing stops it ([proof](../tests/test_offsets.py)).

With labels the offsets have the cell of the learned one, whose β is a quarter of the task's. There
the exact β log Z(x) breaks down and the learned number, far from it, does not. With β × 1, which
was added when this had been seen, the exact one does not break down either. We take it for this:
the smaller β, the further β log Z(x) lies above the rewards of most responses, and the loss begins
by pushing all of them down, towards strings that no one judged. That was not tested.

## One pass, or many over less

The same cells on 4096 judged responses, seen nineteen times. They were not tuned there.

{passes}

{pairs}{kto}{budget}
## Beyond the paper

{beyond}

![Regret against seconds: una-online, una-online-score and ppo, eight seeds](regret-over-time.png)

`una-online`'s baseline is the mean residual of a prompt's 16 samples, each among its own. Its
gradient is 15/16 of that with the mean of the others, which Adam divides out again.

## Cost

- **seconds**: of training, the median. One thread, two runs side by side, on two cores of a shared
  server. `kto`'s hold, once, log π_ref of all its mismatched pairs.
- **state**: bytes of weights, gradients and optimiser state of all models that training holds.
- **peak above the idle process**: how far 20 steps raise the process's peak. Models this small
  leave most of it to activations.

{cost}

{machines}
## Fairness

- Every variant has a grid of 16 cells, on the knobs that matter to it (`GRIDS` in
  [claims.py](claims.py)). Stored feedback: learning rate × β as a multiple of the task's.
  `una-online`: learning rate × baseline. `ppo`: learning rate × inner steps × division of the
  advantages by their deviation. On a reward model both are tuned there.
- All cells run on the first tuning seed. Where the best learning rate or β lies at an end, the grid
  grows by one value beyond it, twice at most. The better eight run on the second seed, four of them
  on the third, two on the fourth. The median decides, so that one broken seed does not.
- Tuning seeds are not reported, and see training prompts alone.
- Batch, steps, judged responses, schedule and gradient clipping are the same for all.
- A variant without a grid takes the cell of its nearest relative: `dpo` that of `una-pair`, which
  is the same loss; other offsets that of `una-score-offset`, `una-reward-offset` or
  `una-binary-offset`; at level 1 these three and `una-online` keep their own.

**At an end** names what is still the grid's least or largest.

{grids}

## The same runs in full

Medians over the seeds, and the range of what was lost:

{full}

- **reward**, **KL**: means over the training prompts of E_π r and of KL(π‖π_ref), in nats.
- **J** = reward − β·KL, with β = 0.25 for all.
- **held-out**: lost on the four prompts without feedback.
- **frontier**: reward gained, as a share of what the best policy of the same KL gains.

## What was looked at before

- Before the grids, on seeds 0 to 5 and 100 to 103: learning rates and βs by hand, `ppo`'s inner
  steps, λ and division, gradient clipping, single runs of the offsets at both levels. `ppo`'s λ of
  1 and the learned offset's tenfold learning rate come from there.
- The tuning seeds, 100 to 103, are among these. The reported ones, 21 to 28, had never been run.
- The task itself was shaped until `una-online` came close to the optimum in 400 steps, before any
  other method ran on it. A grammar of variable length, or a reference that ignores the mood, kept
  it 10 to 50 % short. A comparison with `una-online` should bear that in mind.
- Levels are of our own making, four of them, and were chosen to show what f(x) does.
{cut}
## The files

`python -m lab.claims --out DIR` makes all of this anew in DIR. One part for each run lies in
`DIR/parts/`, so that a call goes on where the last one stopped. Whatever changes in the code that
trains, comments and the settings of other methods apart, makes them anew. The prepared seeds take
four gigabytes there; when claims.json is written, nothing needs `parts/` any more.
`python -m lab.claims --tables` makes this page and the pictures from the JSON files beside it.
`python -m lab.budget`, `lab.pairs` and `lab.kto`, with the same `--out DIR`, make theirs; the first
and the last of them read DIR's claims.json. The three default files are results.json of
`python train.py`, without its dots.

`python train.py` writes results.json whole after every method. Ctrl-C is one line and status 130. A
method that leaves the numbers costs no other: its entry says `diverged` and why, and the status is
1. A new run into the same folder first removes the files of the one before. results.json has

- `settings`, `device`, `versions`; `files`, all that belong to it;
- `reference`, `optimum`: where every run begins and the best it could reach, for each seed; the
  reference with the seconds of its `stages`, the optimum with the points of the `frontier`;
- `runs`, one for each method and seed: `beta` (the task's), `method_beta` (inside the method's
  loss), `learning_rate`, `start_loss`, `seconds` (of training alone), `evaluation_seconds`,
  `state_bytes` (weights, gradients and optimiser state of all models that training holds),
  `reward_source` (online methods); of a run that left the numbers `diverged`, why, and no figures;
- `train` and `heldout` have `reward`, `kl`, `objective`, `optimum`, `regret`, `frontier_reward`
  (the most any policy of that KL can have) and `residual_variance` (of r − β log π/π_ref);
- `curve` begins at the reference: `step`, `seconds`, `loss`, `objective`, `regret`. Of the online
  methods it has points on the way;
- `chosen_reward`, `rejected_reward`: mean implicit rewards of the first 1024 pairs, apart, since
  under DPO both may fall; without f(x) + c;
- `offsets`: f(x) + c of each training prompt, as estimated or learned;
- with `--reward model`, `reward_model`: its `accuracy`, and the reward gained by its own measure
  (`model_gain`) and by the judge's (`judge_gain`);
- `dots` (the first seed's, for the picture) and `samples`.

claims.json has, beside these,

- `tuning`: every cell of the grids, with what each tuning seed lost there (null: diverged);
- `runs`: each with its `cell`, `offset`, `level`, `judged` and `passes`; with `offset_error` where
  an offset was estimated or learned; online methods on the judge's reward with the
  `gradient_noise` of every point of the curve;
- `dots`, of some methods, frame by frame; `predictions`; `peak_memory`.

budget.json has `predictions`, `tuning` and `runs` as claims.json has, `judged` in each, and

- `models`, one for each seed and size of a reward model: `cell`, with β as a multiple of the
  task's; `ceilings`, [β, lost] of its exact optimum; `reference`, `ceiling` and the online `runs`
  on it, each measured by the judge (`train`) and by the model (`by_model`).

pairs.json has `predictions`, `tuning` with the `rule` that chose, `optima` as [β, lost by tuning
seed], and `runs`. kto.json has `predictions` and `runs`, with `zeros`, the steps where z₀ is 0, and
`without`, whether it was left out.

[tests/test_tables.py](../tests/test_tables.py) holds what is said here against those numbers.
"""

BUDGET = """\
## How many judgements

`python -m lab.budget` made this section and the next, in two hours on two cores. Every run
is in [budget.json](budget.json). All is at level 1.

![Lost against the number of judged responses, for every method](judgements.png)

{sizes}

- Stored feedback: lost from so many judged responses. Each method is tuned at each size: learning
  rate × β × steps (100, 200 or 400, so 16 to 64 passes over 1200). The grids begin with 18 cells
  and grow once at most; else as under [Fairness](#fairness).
- With 76,800 the runs are those of the sections above, 400 steps, one pass. Only `una-mixed` was
  tuned anew there, since it had level 0's cell.
- **To n % of the gain**: judged responses, read off the medians between the sizes, on a log scale.
  A pair takes one judgement of two responses, a score or a label one of one: in parentheses the
  judgements, where they are fewer.
- Online: fresh responses judged so far, on the way to 400 steps. Shorter runs, whose learning rate
  comes down sooner, would do better with few; they were not tried.

{size_cells}

{judgements}

## What a reward model costs

A reward model can be asked about all 406,901 responses to a prompt, so the best policy by its
rewards, π_ref e^{{r/β}} / Z, is known ([rewards.py](rewards.py)). What that loses by the judge's
measure is the model's loss: where an optimiser leads that does all it is asked to. What a run loses
by the model's measure is the optimiser's.

![Lost against pairs, and reward gained by the model and by the judge](reward-model.png)

{models}

- The same feedback as above: 1200 judged responses are 600 pairs, a few less where both are the
  same. The model begins from π_ref's weights (Eq. 2).
- Tuned at each size: its learning rate × steps × the β of its optimum, by what the optimum loses
  under the judge on four of the training prompts; listing rewards takes a minute for all twelve.
- The online methods have the cells that the grids above found on a reward model, and that β in
  their objective. **By the model**: of what the model's own optimum gains by the model's rewards.
- The other sections' runs on a reward model had train.py's learning rate for it, 3e-4. The best
  here was 1e-3 or more.

{exploitation}

{reward_models}

Predicted before any of these ran:

{budget_predictions}

"""

JUDGEMENTS = """\
**f(x) + c is worth more than data.** `una-score` with f = c = 0 loses {score_1200} from 1200
scores, {score_9600} from 9600 and {score_76800} from 76,800: what it lacks is not judgements. With
one learned number a prompt it loses {learned_1200} from 1200, a hundred a prompt; `dpo` loses
{dpo_76800} from 38,400 pairs. `una-binary-offset` loses {binary_9600} from 9600 labels,
`una-binary-bce` {bce_76800} from 76,800.

**Learned or estimated.** From few scores the learned number is the better one: {learned_1200}
against {estimated_1200} from 1200, while from 9600 they are {learned_9600} against
{estimated_9600}. It is not the estimate's error: the exact β log Z(x), in the cells of both, loses
{exact_estimated_1200} and {exact_learned_1200} from 1200. The learned number ends
{error_learned_1200} off it, and does better than the truth where a hundred responses stand for all.
Why was not tested.
"""

REWARD_MODELS = """\
**The detour.** The best policy by the reward model loses {ceiling_1200} from 600 pairs,
{ceiling_9600} from 4800 and {ceiling_76800} from 38,400; `dpo` on the same pairs {dpo_1200},
{dpo_9600} and {dpo_76800}.

**It is no ceiling.** A run that stops short of the model's optimum may end better by the judge:
`ppo` loses {ppo_1200}, {ppo_9600} and {ppo_76800}, less than the model's optimum on {ppo_better} of
24 seeds and sizes, `una-online` on {online_better}.

**Exploitation.** From 600 pairs the model's optimum gains {model_gain_1200} by the model and
{judge_gain_1200} by the judge; from 38,400 {model_gain_76800} and {judge_gain_76800}.
"""

CONCLUSIONS = """\
Medians over eight seeds, and the range.

**Which of the paper's claims stand.** Pairwise UNA is DPO, in every figure of every seed. Online
UNA ends where PPO ends from as many samples: it loses {online}, PPO {ppo}. It does so in two thirds
of PPO's time, with five ninths of its state in memory, and it is less stable: one run of eight
broke down, and none of PPO's. One run can use all three kinds of feedback. That binary UNA beats
KTO is not shown: it loses less on half of the seeds or more, but nowhere on all of them. That score
UNA beats binary UNA is reversed on all seeds, as long as f = c = 0.

**What to do.** With a *judge* that can be asked again, ask it about the policy's own samples, and
take `una-online` or `ppo`. With *scores* of π_ref's own responses, put the estimated f(x) + c into
the loss: `una-score-offset` loses {estimated}, `una-score` {score}. With *binary feedback*, learn
f(x) + c: `una-binary-offset` loses {learned}, `una-binary-bce` {bce}, on seven seeds of eight more;
`kto` {kto}. What it learns is not β log Z(x), and with the exact one, at the same β, it breaks down
(below). With *pairs* there is nothing to put in, and `dpo` is the most uneven of the methods: it
loses {dpo}. Its learning rate won on four tuning seeds by the median, with {dpo_tuned}. On eight
half of it wins, and loses {dpo_eight} (below).

**What f(x) is for.** Where all prompts have one level, no difference is shown between a constant
and an estimate for each prompt: {constant} against {estimated}. Where each noun has its own level,
it does not. `una-score` with one constant loses {constant_1}, with the largest β of its grid.
`kto`, whose z₀ is 0 here (below), loses {kto_1}, `una-binary-bce` {bce_1}, `una-score`
{score_1}, and `una-mixed` {mixed_1}, with level 0's cell; tuned there, {mixed_tuned}. With a
number for each prompt, levels cost nothing: `una-score-offset` loses {estimated_1},
`una-binary-offset` {learned_1}. `dpo` does not see them, its runs are the same; `una-online` takes
them out with its baseline, {online_1}. The limits: scores
of π_ref's own responses, 6400 a prompt, without noise, and four levels of our own making.

**What earlier versions of this page said, and what overturned it.** That the offset cannot be had
from the same feedback: but Z(x) is a mean over π_ref's responses, and the stored ones are π_ref's.
That the mean residual fails because nothing holds the probability: but with its gradient
`una-score` loses {residual}, and held constant {held}, more on seven seeds of eight: a push on all
log-probabilities alike is left (below). With its gradient it is uneven still, as all losses of
differences are here. That `una-online` ends nearer to the optimum than `ppo`, since its gradient
loses its noise and PPO's does not: PPO's does too, unless its advantages are divided by their
deviation (below); that PPO's were, and most of its grid had βs that could not win. That no order is
shown among the losses with f = c = 0: that was 4096 responses, seen nineteen times.
"""

CUT = """\
- Cut for time: grids of `una-binary-mse` and `una-mixed` at level 1 (they take `una-binary-bce`'s
  cell there, and their own of level 0); other offsets for `una-binary-mse`; a run of `una-online`
  for as many seconds as `ppo` takes.
"""


PAIRS = """\
## Is dpo so uneven because of its cell?

Four tuning seeds are few where runs vary by hundreds of percent, `dpo`'s advocate will say. So
`python -m lab.pairs` runs every cell of a wider grid on eight and chooses twice, by the median and
by the worst seed, in forty minutes ([pairs.json](pairs.json)).

{pairs_rules}

In part. The cell that the median of eight chooses loses {median}, that of four
{dpo}: the first is fairer to `dpo`. Both are uneven, and so is the cautious choice.

{pairs_grid}

The last line is what the exact optimum of that β loses: where `dpo` ends if all goes well. With
β × 8, at rates of 2e-3 and less, it is there on all seeds, within five points. At the task's own β
the optimum loses nothing, and a run ends anywhere from 5 to 860 % short of it. So the
loss of pairs has the right optimum, and what is uneven is the way to it. We take it for this: the
smaller β, the larger the differences of log-probabilities that it asks for, and a loss of
differences does not hold what both responses of a pair have in common. That was not tested.

Predicted before any of these ran:

{pairs_predictions}

The other methods had no second look. The rest of this page keeps the cell that four seeds chose, as
do train.py's METHODS.

"""

KTO = """\
## What kto's reference point is here

In the map of methods −β z₀ stands for KTO's f(x) + c. z₀ is the mean log π/π_ref of mismatched
pairs, a prompt with a response to another, cut off at 0. `python -m lab.kto` counts how often it is
0, and runs `kto` in the same cells with 0 in its place ([kto.json](kto.json)).

{kto_runs}

A policy that learns what suits a prompt makes what does not less likely. So the mean is below 0,
and z₀ is what it is cut off at. Here `kto` is all but the absolute error of labels with f = c = 0,
and what it loses says nothing about one number for a batch. At level 1 the few steps of another z₀
send single runs far off, either way: there `kto` is as uneven as `dpo`.

Predicted when one run at level 0 had been seen:

{kto_predictions}

"""

MACHINES = """\
## Other machines

What `python train.py` with its defaults lost on seed 0: on the two cores that all figures here are
from, on a server's sixteen of another kind, and on a GPU. Torch was another version there too.

{table}

Rounding, and on the GPU other samples too, moves most figures by a few points; of `dpo`'s it
decides. On one machine the figures are
the same whatever else runs: on the GPU six processes side by side gave those of one, to the last
digit.

"""
# What python train.py wrote, but for its dots, and where.
DEFAULTS = {"default": "here", "default-cpu": "another CPU", "default-h100": "NVIDIA H100"}
FILES = ("budget", "pairs", "kto", *DEFAULTS)


def machines_section(more):
    told = {words: more[name] for name, words in DEFAULTS.items() if name in more}
    return MACHINES.format(table=tables.machines(told)) if len(told) == len(DEFAULTS) else ""


def pairs_section(claims, told):
    said = tables.pairs(told)
    dpo = with_range(lost(tables.pick(claims, "dpo")), " %")
    return PAIRS.format(**said, median=said["pairs_reported"][0], dpo=dpo)


def facts(claims, budget, pairs):
    """{name: what it lost}, for the sentences: name_1 is at level 1."""
    tuned_there = budget_tables.pick(claims, budget, "una-mixed", "zero", 76_800) if budget else []
    def of(*what, **more):
        return with_range(lost(tables.pick(claims, *what, **more)), " %")
    said = {}
    for level, end in ((0.0, ""), (1.0, "_1")):
        for name, method, offset in (
                ("dpo", "dpo", "zero"), ("kto", "kto", "zero"), ("mixed", "una-mixed", "zero"),
                ("mse", "una-binary-mse", "zero"), ("bce", "una-binary-bce", "zero"),
                ("learned", "una-binary-offset", "learned"), ("score", "una-score", "zero"),
                ("estimated", "una-score-offset", "estimated"), ("exact", "una-score", "exact"),
                ("constant", "una-score", "constant"), ("online", "una-online", "zero")):
            said[name + end] = of(method, offset, level)
    tuned = {row["cell"]["learning_rate"]: [100 * share for share in row["lost"]]
             for row in tables.grid_of(claims, "una-pair") if row["cell"]["beta"] == 1}
    rate = tables.best_cell(claims, "una-pair")["learning_rate"]
    said |= dict(dpo_tuned=with_range(tuned.get(rate, []), " %"),
                 dpo_eight=tables.pairs(pairs)["pairs_reported"][0] if pairs else "–")
    return said | dict(
        mixed_tuned=with_range(lost(tuned_there), " %"), ppo=of("ppo"),
        residual=of("una-score", "residual"), held=of("una-score", "held"),
        online_model=of("una-online", reward="model"), ppo_model=of("ppo", reward="model"))


def budget_facts(claims, budget):
    """{name_size: what it lost}, for the sentences of BUDGET."""
    said = {}
    names = dict(zip(("dpo", "kto", "bce", "binary", "score", "estimated", "learned", "mixed"),
                     budget_tables.STORED))
    for size in budget_tables.SIZES:
        for name, (_, method, offset, _) in names.items():
            runs = budget_tables.pick(claims, budget, method, offset, size)
            said[f"{name}_{size}"] = with_range(lost(runs), " %")
    for size in budget_tables.SIZES[:2]:
        for name in ("estimated", "learned"):
            _, method, offset, _ = names[name]
            runs = budget_tables.pick(claims, budget, method, offset, size)
            said[f"error_{name}_{size}"] = with_range([run["offset_error"] for run in runs])
            exact = budget_tables.pick(claims, budget, "una-score", "exact", size, runs[0])
            said[f"exact_{name}_{size}"] = with_range(lost(exact), " %")
    for size in budget_tables.SIZES:
        models = budget_tables.models(budget, size)
        for name, which in (("ceiling", "ceiling"), ("ppo", "ppo"), ("online", "una-online")):
            said[f"{name}_{size}"] = with_range(
                [budget_tables.by("train", model, which) for model in models], " %")
        gains = zip(*(budget_tables.gains(model, "ceiling") for model in models))
        for name, values in zip(("model_gain", "judge_gain"), gains):
            said[f"{name}_{size}"] = with_range([*values])
    for name, which in (("ppo_better", "ppo"), ("online_better", "una-online")):
        said[name] = sum(budget_tables.by("train", model, which)
                         < budget_tables.by("train", model, "ceiling")
                         for model in budget["models"])
    return said


def budget_section(claims, budget):
    said = budget_facts(claims, budget)
    return BUDGET.format(
        judgements=filled(JUDGEMENTS, said), reward_models=filled(REWARD_MODELS, said),
        **budget_tables.all_tables(claims, budget))


def filled(text, said):
    """Paragraphs with their numbers, in lines of 100 characters."""
    return "\n\n".join(textwrap.fill(paragraph.format(**said), 100, break_on_hyphens=False)
                       for paragraph in text.split("\n\n"))


def page(claims, more):
    """more: {name: what name.json says} of those FILES that are there."""
    budget = more.get("budget")
    return PAGE.format(**tables.tables(claims), cut=CUT, machines=machines_section(more),
                       conclusions=filled(CONCLUSIONS, facts(claims, budget, more.get("pairs"))),
                       pairs=pairs_section(claims, more["pairs"]) if "pairs" in more else "",
                       kto=KTO.format(**tables.kto(more["kto"])) if "kto" in more else "",
                       budget=budget_section(claims, budget) if budget else "")

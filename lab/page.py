"""The claims' page, README.md: the text between the tables, and the tables in it.

Its facts are held against claims.json by tests/test_claims.py.
"""
from lab.tables import tables

PAGE = """\
# The claims, settled

Does the paper's comparison of UNA with RLHF/PPO, DPO and KTO hold where the optimum is known?
`python -m lab.claims` made every number and picture here, in an hour and a half on two cores.
Every run is in [claims.json](claims.json). The methods are in [train.py](../train.py), their losses
in [una.py](../una.py).

![Mean reward against KL for every method, below the exact frontier](frontier.png)

*Eight seeds, training prompts, no sampling error: each figure is a sum over all 406,901 responses
to a prompt. No policy can be above the line. It is the first seed's; the others' lie within about a
hundredth of it. The star is where J = reward − β·KL is largest.*

- **Lost** is the share of the possible gain, J* − J(π_ref), that a run ends without, on the
  training prompts. 0 % is the exact optimum, 100 % the reference, more is worse than no training.
- A **seed** is a reference and feedback of its own. There are eight: mean ± standard deviation,
  and the paired difference with its 95 % interval.
- **Replicates** and **the reverse** say on which side of zero that interval lies (of one, for a
  ratio ×), no more. Where there is no interval, the two figures are compared as they are.
- The **paper's figures** are its averages on two leaderboards: Mistral-7B on stored feedback,
  Qwen2-1.5B online, one run each. Those are other tasks at another scale.
- **Stored feedback** is 4096 judged responses. In 400 steps of 192 each is seen some nineteen
  times. With more responses, or fewer passes, the methods may stand in another order.

{claims}

## What was expected

Theory and an early prototype had led to these expectations. They were fixed before the runs.

{predictions}

## Beyond the paper

Questions that the paper does not ask:

{beyond}

![Regret against seconds: una-online, una-online-score and ppo, eight seeds](regret-over-time.png)

## What to make of it

**With scores, most of what stored feedback loses is f(x) + c.** The exact β log Z(x) is one number
a prompt. Given it, `una-score` comes close to π*. With the paper's f = c = 0 it loses four times as
much. With binary feedback the targets are coin flips, and there the exact offset loses more, on
every candidate of its grid. Why is not settled here.

**The mean residual of the same feedback does not replace it.** It takes away what is common to the
responses, so that the loss sees differences alone. The runs end far below the reference. So do
`una-pair` and `dpo` where feedback is short, which see only differences by construction. The
rewards of chosen and rejected fall together, KL grows, and the mean reward sinks below the
reference's. Why is not settled here. Another estimate, β log of the mean of e^{{r/β}} over the
scored responses of π_ref (`estimated_offset` in [una.py](../una.py)), was not run.

**Online, UNA ends nearer to the optimum than PPO**, in a third of the time and without a value
model. PPO, tuned and with its gradient clipped, comes close as well. Theory offers a reason: both
follow the gradient of J, but the residual of Eq. 7, and with it the noise, vanishes at the optimum.
UNA is less even over seeds here. Its grid had chosen its largest learning rate.

**On a reward model both end far from the optimum**, because the model is far from the judge: it
orders four pairs of five as the judge does. No exploitation is shown. By the model's measure `ppo`
gains a little less than by the judge's; for `una-online` the interval holds both signs. One run of
`una-online` broke down. Its learning rate had been tuned on the judge's reward.

**Among the losses of stored feedback with f = c = 0 no comparison above shows an order** at 4096
responses. With 256 or 1024, scores are far ahead.

## More and less feedback

Five seeds, with the settings tuned at 4096 responses. The last column, of eight seeds, asks how
well a method uses the KL that it spends: reward gained, as a share of what the best policy of the
same KL gains.

{feedback}

## Cost

- **seconds**: of training, the median. One thread, two runs side by side, on two cores of a shared
  server. A GPU was not measured.
- **state**: bytes of weights, gradients and optimiser state of all models that training holds.
- **peak above the idle process**: how far 20 steps raise the process's peak. Models this small
  leave most of it to activations. Of the online methods' peak here, 26 to 29 MB are not
  training's: measuring the gradient's noise took them.

{cost}

## Fairness

- Every method has one grid of 16 candidates: four learning rates × four multiples of the task's β
  (`GRIDS` in [claims.py](claims.py)).
- The candidate that lost least over two tuning seeds is taken, on the training prompts. Those seeds
  are not reported.
- Batch, steps, feedback, schedule and gradient clipping are the same for all.
- `dpo` takes `una-pair`'s candidate, as it is the same loss.
- On a reward model, and on other amounts of feedback, a method keeps its candidate.

{grids}

## The same runs in full

Means over the seeds:

{train}

{heldout}

- **reward**, **KL**: means over the prompts of E_π r and of KL(π‖π_ref), in nats.
- **J** = reward − β·KL, with β = 0.25 for all. **regret**: J* − J. **regret +-**: its standard
  deviation over the seeds.
- **of gain**: 1 − lost. **of frontier**: as above.

The online methods learn from 76,800 fresh samples, each judged once. The others learn from 4096
that the reference wrote. So these figures are not a comparison of losses. `ppo` takes two inner
steps for each batch of samples where `una-online` takes one.

## What was looked at before

- Before the grids, on seeds 0 to 5 and 100 to 103: learning rates and βs by hand, `ppo`'s inner
  steps and λ, and gradient clipping.
- The grids of stored feedback were moved once, towards where the first tuning seed had its best
  candidates. No reported seed was run before the reported run.
- The task itself was shaped until `una-online` came close to the optimum in 400 steps, before any
  other method ran on it. A grammar of variable length, or a reference that ignores the mood, kept
  it 10 to 50 % short. A comparison with `una-online` should bear that in mind.

## The files

`python -m lab.claims --out DIR` makes all of this anew in DIR. One part for each run lies in
`DIR/parts/`, so that a call goes on where the last one stopped. Whatever changes in the code that
trains, comments apart, makes them anew. The prepared seeds take a gigabyte there; when
claims.json is written, nothing needs `parts/` any more. `python -m lab.claims --tables` makes this
page and the pictures from claims.json alone.

claims.json has, beside the `settings`, `reference`, `optimum` and `runs` of a results.json:

- `tuning`: every candidate of the grids, with what each tuning seed lost there (null: diverged);
- `runs`: `una-online` and `ppo` also on a reward model's reward; the online methods with the
  `gradient_noise` of every point of the curve;
- `longer`: `una-online`, 2.5 times the steps; `offsets`: other f(x) + c; `sizes`: other amounts of
  feedback;
- `peak_memory`.

[tests/test_claims.py](../tests/test_claims.py) holds what is said here against those numbers.
"""


def page(claims):
    return PAGE.format(**tables(claims))

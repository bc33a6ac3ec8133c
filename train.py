"""How a policy is trained: reference -> feedback -> each method's losses -> the loop -> the report.

    python train.py                                   every method once, with the settings below
    python train.py --methods una-pair,dpo --seeds 5
    python train.py --help
"""
import copy
import functools
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch

import data
import una
from lab import exact, figures, run
from lab.run import setting, whole
from model import GPT, GPTConfig, ScalarGPT, sample


# ---------------------------------------------------------------- the methods
# A loss takes the policy, a batch and the beta of its method, and returns one value per example.
# A batch has tokens, mask and ref_logprob of its responses, and what was said of them: labels,
# scores or rewards. Of pairs it has all chosen responses first, then all rejected ones. Of mixed
# feedback it says which rows are what: chosen, rejected, binary and scored are row numbers.
# offset is f(x) + c of each response's prompt: 0 as in the paper, but for methods that say more.
def after_prompt(model, tokens):
    """model(tokens) from the prompt's last token on, (B, 1 + MAX_TOKENS, ...).

    A prompt is computed once for all of its responses, which begin with its cache.
    """
    prompts, row = tokens[:, :data.PROMPT_TOKENS].unique(dim=0, return_inverse=True)
    cache = []
    last = model(prompts, cache)[:, -1:]
    cache = [tuple(part[row] for part in layer) for layer in cache]
    return torch.cat([last[row], model(tokens[:, data.PROMPT_TOKENS:], cache)], dim=1)


def model_logprobs(model, tokens, mask):
    """una.token_logprobs, (B, MAX_TOKENS): a column for each token of the responses."""
    tokens, mask, logits = *from_prompts_end(tokens, mask), after_prompt(model, tokens)
    return una.token_logprobs(logits, tokens, mask)


def model_logprob(model, tokens, mask):
    """una.sequence_logprob, (B,)."""
    tokens, mask, logits = *from_prompts_end(tokens, mask), after_prompt(model, tokens)
    return una.sequence_logprob(logits, tokens, mask)


def from_prompts_end(*columns):
    """The columns that after_prompt has."""
    return [part[:, data.PROMPT_TOKENS - 1:] for part in columns]


def implicit_reward(policy, batch, beta):
    """Eq. 6: beta log pi/pi_ref + f(x) + c, (B,)."""
    logprob = model_logprob(policy, batch.tokens, batch.mask)
    return una.implicit_reward(logprob, batch.ref_logprob, beta, batch.offset)


def una_pair(policy, batch, beta):
    """Eq. 10."""
    chosen, rejected = implicit_reward(policy, batch, beta).chunk(2)
    return una.una_pair_loss(chosen, rejected)


def una_binary_mse(policy, batch, beta):
    """Eq. 11."""
    return una.una_binary_loss(implicit_reward(policy, batch, beta), batch.labels, g="mse")


def una_binary_bce(policy, batch, beta):
    """Eq. 12."""
    return una.una_binary_loss(implicit_reward(policy, batch, beta), batch.labels, g="bce")


def una_score(policy, batch, beta):
    """Eq. 13."""
    return una.una_score_loss(implicit_reward(policy, batch, beta), batch.scores)


def una_reward(policy, batch, beta):
    """Eq. 7 on stored rewards: those that the scores are of."""
    return una.una_reward_loss(implicit_reward(policy, batch, beta), batch.scores.logit())


def una_mixed(policy, batch, beta):
    """Eq. 10, 11 and 13 in one: every pair, label and score of the batch weighs the same."""
    reward = implicit_reward(policy, batch, beta)
    pairs = una.una_pair_loss(reward[batch.chosen], reward[batch.rejected])
    binary = una.una_binary_loss(reward[batch.binary], batch.labels[batch.binary], g="mse")
    scores = una.una_score_loss(reward[batch.scored], batch.scores[batch.scored])
    return torch.cat([pairs, binary, scores])


def dpo(policy, batch, beta):
    """Eq. 5."""
    chosen, rejected = model_logprob(policy, batch.tokens, batch.mask).chunk(2)
    return una.dpo_loss(chosen, rejected, *batch.ref_logprob.chunk(2), beta)


def kto(policy, batch, beta):
    """KTO, its reference point from the same prompts with the responses to others."""
    logprob = model_logprob(policy, batch.tokens, batch.mask)
    with torch.no_grad():
        other_logprob = model_logprob(policy, batch.other_tokens, batch.other_mask)
    return una.kto_loss(logprob, batch.ref_logprob, batch.labels,
                        other_logprob, batch.other_ref_logprob, beta)


def una_online(policy, batch, beta, leave_one_out=False):
    """Eq. 7 on fresh samples. The baseline is the mean residual of a prompt's n samples. Each is
    among its own n: that scales the gradient by 1 - 1/n, and changes nothing else. So it is n - 1
    over n times that with leave_one_out, where the mean is of the others."""
    reward = implicit_reward(policy, batch, beta)
    residual = (batch.rewards - reward).detach().view(-1, batch.per_prompt)
    baseline = residual.mean(1, keepdim=True).expand_as(residual)
    if leave_one_out:
        n = batch.per_prompt
        baseline = (n * baseline - residual) / (n - 1)
    return una.una_reward_loss(reward + baseline.flatten(), batch.rewards)


def una_online_score(policy, batch, beta):
    """Eq. 9 on fresh samples."""
    reward = implicit_reward(policy, batch, beta)
    return una.una_score_loss(reward, una.implicit_score(batch.rewards))


PPO_CLIP, PPO_LAMBDA = 0.2, 1.0                     # of ratio and value; of advantages


def ppo(policy, batch, beta, divide=False):
    """Eq. 3 by PPO: the policy's loss and the value model's. The first call on a batch freezes
    what is old, while pi is the policy that sampled it. With divide, advantages are divided by
    their standard deviation, as is usual; as they vanish, that blows their noise up again."""
    response = batch.mask[:, data.PROMPT_TOKENS:]
    logprobs = model_logprobs(policy, batch.tokens, batch.mask)
    values = after_prompt(batch.value, batch.tokens)[:, :-1]     # before each token
    if not hasattr(batch, "advantages"):
        batch.old_logprobs, batch.old_values = logprobs.detach(), values.detach()
        rewards = una.ppo_token_rewards(batch.rewards, batch.old_logprobs, batch.ref_logprobs,
                                        response, beta)
        advantages, batch.targets = una.ppo_advantages(rewards, batch.old_values, response,
                                                       PPO_LAMBDA)
        batch.advantages = advantages - advantages[response].mean()
        if divide:
            batch.advantages /= advantages[response].std() + 1e-8
    return (una.ppo_policy_loss(logprobs, batch.old_logprobs, batch.advantages, response, PPO_CLIP)
            + una.ppo_value_loss(values, batch.old_values, batch.targets, response, PPO_CLIP))


class Method(NamedTuple):
    feedback: str          # pairs, binary, scores or mixed: stored; fresh: samples of the policy
    loss: Callable
    learning_rate: float
    beta: float            # inside the loss, as a multiple of the task's
    offset: str = "zero"   # f(x) + c: zero, estimated or learned, one number a prompt
    epochs: int = 1        # optimiser steps on each batch
    needs: str = ""        # a value model, or mismatched pairs


# The settings are the best cells of lab/claims.py's grids.
OFFSET_TIMES = 10          # a learned f(x) + c has this multiple of the weights' learning rate
METHODS = {
    "una-pair": Method("pairs", una_pair, 4e-3, 1),
    "una-binary-mse": Method("binary", una_binary_mse, 2e-3, 0.03125),
    "una-binary-bce": Method("binary", una_binary_bce, 2e-3, 0.0625),
    "una-binary-offset": Method("binary", una_binary_bce, 2e-3, 0.25, "learned"),
    "una-score": Method("scores", una_score, 1e-3, 0.03125),
    "una-score-offset": Method("scores", una_score, 8e-3, 1, "estimated"),
    "una-reward-offset": Method("scores", una_reward, 4e-3, 1, "estimated"),
    "una-mixed": Method("mixed", una_mixed, 2e-3, 0.0625),
    "dpo": Method("pairs", dpo, 4e-3, 1),
    "kto": Method("binary", kto, 4e-3, 0.125, needs="mismatched pairs"),
    "una-online": Method("fresh", una_online, 1.2e-2, 1),
    "una-online-score": Method("fresh", una_online_score, 1e-3, 0.5),
    "ppo": Method("fresh", ppo, 6e-3, 1, needs="a value model"),
}


# ---------------------------------------------------------------- the loop
def align(method, policy, batches, beta, steps, value=None, checkpoints=(), observe=None,
          offsets=None):
    """Trains the policy by a Method, and with it PPO's value model, or offsets to be learned.

    batches yields a batch for each step. At the checkpoints, observe(step, seconds, loss, policy)
    is called, on its own time. Returns what the training was: first loss, seconds, bytes of
    weights, gradients and optimiser state. FloatingPointError where it leaves the numbers.
    """
    trained = [*policy.parameters(), *(value.parameters() if value else [])]
    groups = [dict(params=trained)]
    if offsets is not None and offsets.requires_grad:
        trained = [*trained, offsets]
        groups.append(dict(params=[offsets], times=OFFSET_TIMES))
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)
    first_loss, clock = None, run.Clock(trained[0].device)
    try:
        for step in range(1, steps + 1):
            with clock:
                batch = next(batches)
                for _ in range(method.epochs):
                    loss = method.loss(policy, batch, beta).mean()
                    first_loss = loss.item() if first_loss is None else first_loss
                    descend(optimizer, loss, method.learning_rate, step, steps)
            left = clock.seconds / step * (steps - step)
            run.show(f"step {step} of {steps} | loss {loss.item():.4f} | {left:.0f} s left")
            if step in checkpoints:
                observe(step, clock.seconds, loss.item(), policy)
    except FloatingPointError as error:
        raise FloatingPointError(f"{error}, at step {step} of {steps}") from None
    state = [part for parts in optimizer.state.values() for part in parts.values()]
    return dict(start_loss=first_loss, seconds=clock.seconds,
                state_bytes=size_in_bytes([*trained, *(p.grad for p in trained), *state]))


def size_in_bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def descend(optimizer, loss, peak, step, steps):
    """Optimiser step `step` of `steps`. The learning rate is its peak times two ramps, one up over
    the first 5% of the steps and one down over all of them. The gradient is cut to norm 1.
    FloatingPointError if it or the loss is not finite."""
    if not loss.isfinite():
        raise FloatingPointError(f"the loss is {loss.item()}")
    rate = peak * min(1.0, step / (0.05 * steps)) * (1 - (step - 1) / steps)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("times", 1)
    optimizer.zero_grad()
    loss.backward()
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
    if not norm.isfinite():
        raise FloatingPointError(f"the gradient has norm {norm.item()}")
    optimizer.step()


# ---------------------------------------------------------------- what the methods learn from
def train_reference(settings, seed):
    """pi_ref: a GPT trained from scratch to make the corpus's responses likely. Frozen."""
    torch.manual_seed(seed)
    config = GPTConfig(data.ENCODING.n_vocab, data.BLOCK_SIZE, settings.n_layer, settings.n_head,
                       settings.n_embd)
    model = GPT(config).to(settings.device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01,
                                  fused=True)
    rng = random.Random(seed)
    for step in range(1, settings.reference_steps + 1):
        prompts, responses = data.sentences(256, rng)
        tokens, mask = data.join(data.encode_prompts(prompts), *data.encode_responses(responses))
        loss = -model_logprob(model, tokens.to(settings.device), mask.to(settings.device)).mean()
        descend(optimizer, loss, 3e-3, step, settings.reference_steps)
        run.show(f"reference | step {step} of {settings.reference_steps} | "
                 f"loss {loss.item():.3f} nats")
    model.zero_grad()
    return model.requires_grad_(False)


CHUNK = 2048     # responses at a time, where no gradient is: memory does not grow with their number


def collect_feedback(settings, seed, reference):
    """Two responses of the reference to one training prompt after the other, and feedback on them.

    The held-out prompts get none. A namespace: data.Feedback's tensors, ref_logprob (R,), prompt
    (R,), the number of each response's prompt, and offset (R,), 0.
    """
    in_turn = torch.arange(settings.judged) // 2 % len(data.TRAIN_PROMPTS)
    prompts = data.encode_prompts(data.TRAIN_PROMPTS)[in_turn]
    generator = torch.Generator(settings.device).manual_seed(seed)
    chunks = [sample(reference, chunk, data.MAX_TOKENS, data.EOT, generator)
              for chunk in prompts.to(settings.device).split(CHUNK)]
    responses, mask = (torch.cat(parts) for parts in zip(*chunks))
    feedback = data.feedback_on(prompts, responses.cpu(), mask.cpu(),
                                torch.Generator().manual_seed(seed), settings.level)
    feedback = SimpleNamespace(**{name: tensor.to(settings.device) for name, tensor in dict(
        vars(feedback), prompt=in_turn, offset=torch.zeros(len(in_turn))).items()})
    feedback.ref_logprob = logprob_in_chunks(reference, feedback.tokens, feedback.mask)
    return feedback


@torch.no_grad()
def logprob_in_chunks(model, tokens, mask):
    """model_logprob of any number of responses, in memory that does not grow with it."""
    return torch.cat([model_logprob(model, *chunk)
                      for chunk in zip(tokens.split(CHUNK), mask.split(CHUNK))])


def with_mismatched_pairs(feedback, reference):
    """The feedback, and beside it what KTO needs for its reference point."""
    tokens, mask = data.mismatched(feedback.tokens, feedback.mask)
    return SimpleNamespace(**vars(feedback), other_tokens=tokens, other_mask=mask,
                           other_ref_logprob=logprob_in_chunks(reference, tokens, mask))


def start_offsets(method, feedback, beta):
    """f(x) + c of each prompt, (P,), where a Method of stored feedback begins with it.

    Estimated: by Eq. 4 from the prompt's own scored responses, which are pi_ref's. Learned: from 0.
    """
    offsets = torch.zeros(len(data.TRAIN_PROMPTS), device=feedback.scores.device)
    if method.offset == "estimated":
        rewards = feedback.scores.logit()
        for prompt in range(len(offsets)):
            offsets[prompt] = una.estimated_offset(rewards[feedback.prompt == prompt], beta)
    return offsets.requires_grad_(method.offset == "learned")


def fresh_samples(policy, prompts, per_prompt, generator):
    """tokens and mask of per_prompt responses of the policy to each prompt, prompt by prompt."""
    x = prompts.repeat_interleave(per_prompt, 0)
    return data.join(x, *sample(policy, x, data.MAX_TOKENS, data.EOT, generator))


def fresh_batches(policy, value, shared, size, seed, level=0.0):
    """For ever: `size` samples of the policy as it is, with their rewards; value is for PPO."""
    prompts = data.encode_prompts(data.TRAIN_PROMPTS).to(policy.wte.weight.device)
    generator = torch.Generator(prompts.device).manual_seed(seed)
    per_prompt = size // len(prompts)
    while True:
        tokens, mask = fresh_samples(policy, prompts, per_prompt, generator)
        with torch.no_grad():
            ref_logprobs = model_logprobs(shared.reference, tokens, mask)
            rewards = (model_reward(shared.reward_model, tokens, mask) if shared.reward_model
                       else judge_reward(tokens, mask, level))
        yield SimpleNamespace(tokens=tokens, mask=mask, rewards=rewards, per_prompt=per_prompt,
                              ref_logprobs=ref_logprobs, ref_logprob=ref_logprobs.sum(1),
                              offset=0.0, value=value)


def judge_reward(tokens, mask, level=0.0):
    """The judge's reward of prompts and responses, (B,)."""
    prompts, responses = tokens.split([data.PROMPT_TOKENS, data.MAX_TOKENS], dim=1)
    rewards = data.reward(prompts, responses)
    return (rewards + data.prompt_level(prompts, level)).to(tokens.device)


def model_reward(reward_model, tokens, mask):
    """The reward model's, read at each response's last token, (B,)."""
    (mask,) = from_prompts_end(mask)
    last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    return (after_prompt(reward_model, tokens) * last).sum(1)


def train_reward_model(settings, seed, reference, feedback, learning_rate=3e-4):
    """r_phi: Eq. 2 on the pairs, from the reference's weights with a scalar head. Frozen."""
    reward_model = ScalarGPT(reference).to(feedback.tokens.device)
    optimizer = torch.optim.Adam(reward_model.parameters(), betas=(0.9, 0.99), fused=True)
    size = min(len(feedback.pairs), settings.batch // 2)
    batches = data.shuffled(feedback.pairs, size, torch.Generator().manual_seed(seed))
    for step in range(1, settings.steps + 1):
        chosen, rejected = (model_reward(reward_model, feedback.tokens[rows], feedback.mask[rows])
                            for rows in next(batches).T)
        loss = una.reward_model_loss(chosen, rejected).mean()
        descend(optimizer, loss, learning_rate, step, settings.steps)
        run.show(f"reward model | step {step} of {settings.steps}")
    reward_model.zero_grad()
    return reward_model.requires_grad_(False)


# ---------------------------------------------------------------- a seed, and a method on it
@dataclass
class Settings:
    """Every setting is a flag of the command line."""
    methods: list = setting("all", "methods to run, comma-separated, or all", run.names(METHODS))
    seeds: int = setting(1, "runs per method, each with its own reference and feedback", whole(1))
    seed: int = setting(0, "the first seed; the others follow it", whole(0, most=2 ** 32))
    beta: float = setting(0.25, "the task's beta: price of a nat of KL, in units of reward",
                          run.between(1e-4, 1e6))
    reward: str = setting("judge", "who rewards the online methods", choices=("judge", "model"))
    steps: int = setting(400, "alignment steps of every method, a batch each", whole(1))
    batch: int = setting(192, "responses per alignment step", whole(2))
    judged: int = setting(0, "stored responses that get feedback, 0: steps x batch, so that each "
                          "is seen once", whole(0, multiple_of=2))
    level: float = setting(0.0, "how far prompts differ: adds level x (-1, -1/3, 1/3, 1) to all "
                           "rewards of a prompt, by its noun", run.between(0, 4))
    reference_steps: int = setting(500, "steps of the reference, 256 sentences each", whole(1))
    evaluations: int = setting(6, "points of an online method's learning curve behind step 0, "
                               "geometric from steps/32 to steps", whole(1))
    n_layer: int = setting(2, "layers of the GPT", whole(1))
    n_head: int = setting(4, "attention heads of each layer", whole(1))
    n_embd: int = setting(64, "width of the GPT", whole(1))
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    jobs: int = setting(0, "methods side by side, a thread each, 0: one a core, 1 on an "
                        "accelerator; no figure depends on it", whole(0))
    out: str = setting("out/toy", "folder for results.json, pictures and weights")
    quick: bool = setting(False, "a short run of everything, to see that it works")

    def __post_init__(self):
        self.judged = self.judged or max(24, self.steps * self.batch // 2 * 2)


QUICK = dict(steps=60, reference_steps=200, evaluations=2, n_layer=1, n_embd=32)


def prepare(settings, seed, path, reference=None):
    """What all methods of a seed share, saved at path: its entries in results.json.

    reference: of the same seed and size, if it is there already.
    """
    run.begin(f"seed {seed}")
    stages = ("reference", "feedback", "evaluation")
    clocks = {stage: run.Clock(settings.device) for stage in stages}
    with clocks["reference"]:
        reference = reference or train_reference(settings, seed)
    with clocks["feedback"]:
        feedback, reward_model = collect_feedback(settings, seed, reference), None
        if settings.reward == "model":
            reward_model = train_reward_model(settings, seed, reference, feedback)
    with clocks["evaluation"]:
        worlds = {name: exact.World(reference, prompts, settings.beta, settings.level)
                  for name, prompts in (("train", data.TRAIN_PROMPTS),
                                        ("heldout", data.HELDOUT_PROMPTS))}
        start, best = exact.reference_and_optimum(worlds)
    save_weights(settings, f"reference-{seed}", reference)
    run.save(path, functools.partial(torch.save, SimpleNamespace(
        reference=reference, feedback=feedback, reward_model=reward_model, worlds=worlds,
        start=start["train"])))
    load.cache_clear()                                           # it may hold an earlier run's file
    seconds = {stage: clocks[stage].seconds for stage in stages}
    start = dict(method="reference", seed=seed, stages=seconds, **start,
                 samples=example_responses(reference, seed))
    return dict(reference=start, optimum=dict(method="optimum", seed=seed, **best))


@functools.lru_cache(maxsize=1)
def load(path):
    return torch.load(path, weights_only=False)


def batches_for(method, policy, value, shared, settings, seed, offsets=None):
    """What a method learns from, batch by batch, for ever."""
    if method.feedback == "fresh":
        yield from fresh_batches(policy, value, shared, settings.batch, seed, settings.level)
    feedback = shared.feedback
    if method.needs == "mismatched pairs":
        feedback = with_mismatched_pairs(feedback, shared.reference)
    for batch in data.stored_batches(method.feedback, feedback, settings.batch, seed):
        if offsets is not None:
            batch.offset = offsets[batch.prompt]
        yield batch


def run_job(settings, seed, name, path):
    """run_method on what prepare saved at path."""
    return run_method(settings, seed, name, load(path))


def run_method(settings, seed, name, shared, method=None, observer=exact.Observer, offsets=None):
    """One run of a method on what it shares with the others: its entry in results.json.

    method stands in for METHODS[name], offsets (P,) for what its offset rule says of the training
    prompts. A run that leaves the numbers says why in "diverged" and has no figures.
    """
    run.begin(f"seed {seed} | {name}")
    method = method or METHODS[name]
    fresh, beta = method.feedback == "fresh", method.beta * settings.beta
    policy = copy.deepcopy(shared.reference).requires_grad_(True)
    value = None
    if method.needs == "a value model":
        value = ScalarGPT(shared.reference).to(settings.device)
    if offsets is None and not fresh:
        offsets = start_offsets(method, shared.feedback, beta)
    batches = batches_for(method, policy, value, shared, settings, seed, offsets)
    # Stored feedback is looked at once, at the end; of the online methods a curve is drawn.
    apart = 32 ** (1 / max(1, settings.evaluations - 1))
    checkpoints = {max(1, round(settings.steps / apart ** i))
                   for i in range(settings.evaluations if fresh else 1)}
    observe = observer(shared.worlds, shared.start, settings.steps)
    entry = dict(method=name, seed=seed, beta=settings.beta, method_beta=beta,
                 learning_rate=method.learning_rate)
    if fresh:
        entry["reward_source"] = settings.reward
    try:
        entry |= align(method, policy, batches, beta, settings.steps, value, checkpoints, observe,
                       offsets)
    except FloatingPointError as error:
        return dict(runs=entry | dict(diverged=str(error)))
    if fresh:
        frozen = [shared.reference, *([shared.reward_model] if shared.reward_model else [])]
        entry["state_bytes"] += sum(size_in_bytes(model.parameters()) for model in frozen)
    else:                                                        # apart: under DPO both may fall
        pairs = data.take(shared.feedback, shared.feedback.pairs[:1024].T.flatten())
        with torch.no_grad():
            chosen, rejected = implicit_reward(policy, pairs, beta).chunk(2)
        entry |= dict(chosen_reward=chosen.mean().item(), rejected_reward=rejected.mean().item())
        if method.offset != "zero":
            entry["offsets"] = offsets.tolist()                  # f(x) + c of each training prompt
    if fresh and shared.reward_model:
        entry["reward_model"] = reward_model_report(shared, policy, seed)
    save_weights(settings, f"{name}-{seed}", policy)
    return dict(runs=entry | observe.report() | dict(samples=example_responses(policy, seed)))


def reward_model_report(shared, policy, seed):
    """exact.reward_model_report, of some 4096 samples of the reference and of the policy."""
    prompts = shared.worlds["train"].prompts.to(policy.wte.weight.device)
    generator = torch.Generator(prompts.device).manual_seed(seed)
    per_prompt = 4096 // len(prompts) // 2 * 2                   # even: no pair is of two prompts
    samples = [fresh_samples(model, prompts, per_prompt, generator)
               for model in (shared.reference, policy)]
    with torch.no_grad():
        by_model = torch.stack([model_reward(shared.reward_model, *both) for both in samples])
        by_judge = torch.stack([judge_reward(*both) for both in samples])
    return exact.reward_model_report(by_model, by_judge)


def example_responses(model, seed):
    """Three responses to a training prompt and to a held-out one: {prompt: texts}."""
    examples = [data.TRAIN_PROMPTS[0], data.HELDOUT_PROMPTS[0]]
    x = data.encode_prompts(examples).to(model.wte.weight.device)
    y, mask = sample(model, x.repeat_interleave(3, 0), data.MAX_TOKENS, data.EOT,
                     torch.Generator(x.device).manual_seed(seed))
    texts = [data.decode_response(*row) for row in zip(y, mask)]
    return dict(zip(examples, (texts[:3], texts[3:])))


def save_weights(settings, name, model):
    if not settings.out:
        return
    state = dict(config=asdict(model.config), weights=model.state_dict())
    run.save(os.path.join(settings.out, f"{name}.pt"), functools.partial(torch.save, state))


# ---------------------------------------------------------------- the whole run
def parse(arguments):
    """Settings from the command line. What is wrong with them is one line, and status 2."""
    parser = run.parser_of(Settings, "train.py", "UNA on a toy task whose optimum is known.")
    given = vars(parser.parse_args(arguments))
    settings = Settings(**(QUICK if given.get("quick") else {}) | given)
    if settings.methods == "all":
        settings.methods = [*METHODS]
    prompts = len(data.TRAIN_PROMPTS)
    online = [name for name in settings.methods if METHODS[name].feedback == "fresh"]
    if online and (settings.batch % prompts or settings.batch < 2 * prompts):
        parser.error(f"--batch {settings.batch} must be 2, 3, ... times {prompts}: {online[0]} "
                     "answers as many prompts at each step, each as often")
    if settings.judged < 24:
        parser.error(f"--judged {settings.judged}: must be 24 at least, or 0 for steps x batch")
    if settings.n_embd % settings.n_head:
        parser.error(f"--n-embd {settings.n_embd} is not a multiple of --n-head {settings.n_head}")
    settings.device = run.pick_device(parser, settings.device)
    settings.jobs = settings.jobs or (run.cores() if settings.device == "cpu" else 1)
    run.check_writable(parser, settings.out)
    return settings


def main(arguments=None):
    """Every method on every seed, side by side; results.json after each. Returns the status."""
    settings = parse(arguments)
    torch.set_num_threads(1)                                     # as in the processes of Jobs
    started = time.perf_counter()
    seeds = range(settings.seed, settings.seed + settings.seeds)
    paths = {seed: os.path.join(settings.out, f"shared-{seed}.pt") for seed in seeds}
    order = ["reference", *settings.methods, "optimum"]
    models = [f"{name}-{seed}.pt" for seed in seeds for name in ("shared", *order[:-1])]
    results = dict(settings=asdict(settings), device=settings.device, versions=run.versions(),
                   files=[*models, *figures.PICTURES], reference=[], optimum=[], runs=[])
    run.start_folder(settings.out, results)

    def ended(job, entries):
        for kind, entry in entries.items():
            if entry["seed"] != seeds[0]:
                entry.pop("dots", None)                          # one seed's picture is enough
            results[kind].append(entry)
            results[kind].sort(key=lambda entry: (entry["seed"], order.index(entry["method"])))
        run.write_json(os.path.join(settings.out, "results.json"), results)
        run.say(figures.line(entries))

    # The slowest methods stand last in the table and begin first: no core is idle for long.
    jobs = [(settings, seed, name, paths[seed])
            for seed in seeds for name in reversed(settings.methods)]
    try:
        with run.Jobs(settings.jobs) as pool:
            pool.run(prepare, [(settings, seed, paths[seed]) for seed in seeds], ended)
            pool.run(run_job, jobs, ended)
        figures.draw_all(results, settings.out)
        run.print_text(figures.report(results))
    except KeyboardInterrupt:
        run.say(f"train.py: interrupted. {len(results['runs'])} of {len(jobs)} runs have ended: "
                f"{settings.out}/results.json")
        return 130
    finally:
        for path in paths.values():
            for left in filter(os.path.exists, (path, f"{path}.part")):
                os.remove(left)
    run.say(figures.time_line(results, time.perf_counter() - started))
    return 1 if any("diverged" in entry for entry in results["runs"]) else 0


if __name__ == "__main__":
    sys.exit(main())

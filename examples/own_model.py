"""una.py's losses on a model and feedback of your own. transformers' Trainer does all the rest.

    python examples/own_model.py --model FOLDER --data feedback.jsonl --output_dir out
    torchrun --nproc-per-node 2 examples/own_model.py ...             the same, on two processes

Flags are the fields of Settings, below, and those of transformers.TrainingArguments. A batch is
counted in items, and a pair is one item. All weights are trained, in float32; with --lora R a
low-rank W + BA, added up before saving. Dropout is off. README.md says what feedback is.

The reference is the model as it was: its log-probabilities are computed once, before training.
Computed once more, all must give rho = log pi - log pi_ref = 0 exactly, or the run ends.
"""
import json
import math
import os
import random
import sys
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import peft
import torch
import transformers
from accelerate.utils import gather_object
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import una  # noqa: E402


@dataclass(kw_only=True)
class Settings(transformers.TrainingArguments):
    model: str                                          # a folder or a name, for from_pretrained
    data: str                                           # feedback, JSONL
    beta: float = 0.1                                   # the price of a nat of KL
    offset: Literal["zero", "estimated"] = "zero"       # f(x) + c of Eq. 6
    anchor: float = 0.0                                 # times mean(-rho) of a pair's two sides
    g: Literal["mse", "bce"] = "mse"                    # the error of labels and scores
    heldout: float = 0.1                                # share of prompts that are only measured
    lora: int = 0                                       # rank; 0 trains all weights
    max_length: int = 1024                              # tokens of an item; longer ones are dropped
    logging_steps: float = 10
    remove_unused_columns: bool = False                 # collate needs all of them


def stop(message, status=2):
    """Ends the run with one line."""
    said = str(message).strip().split("\n")[0]
    print(f"{os.path.basename(sys.argv[0])}: {said}", file=sys.stderr)
    raise SystemExit(status)


@contextmanager
def reading(what, status=2):
    """Whatever goes wrong while input is read is said in one line that names the input."""
    try:
        yield
    except Exception as error:          # transformers and chat templates may raise anything
        stop(f"{what}: {error}", status)


def parse_flags(arguments, settings):
    """An object of a dataclass, whose fields are the flags."""
    parser = transformers.HfArgumentParser(settings, allow_abbrev=False)
    parser.error = stop
    with reading("flags"):
        return parser.parse_args_into_dataclasses(arguments)[0]


# ---------------------------------------------------------------- feedback
PAIR, LABEL, SCORE = range(3)


def judgement(row):
    """A line's kind, its completions' fields, its label or score (1 for a pair: it has none)."""
    match row:
        case {"prompt": _, "chosen": str() | list(), "rejected": str() | list()}:
            return PAIR, ("chosen", "rejected"), 1.0
        case {"prompt": _, "completion": _, "label": 0 | 1 as label}:
            return LABEL, ("completion",), float(label)
        case {"prompt": _, "completion": _, "score": int() | float() as score} if 0 <= score <= 1:
            return SCORE, ("completion",), float(score)
    raise ValueError("a line has prompt, and either chosen and rejected, or completion and label "
                     "(true, false, 1 or 0), or completion and score (0 to 1)")


def form(text):
    """str; or, of a list, the types of its parts: {int} has token ids, {dict} messages."""
    return str if isinstance(text, str) else {type(part) for part in text}


def encode(text, tokenizer, answered):
    """Token ids of a prompt or, if it is answered, of prompt and completion as one text."""
    if form(text) == {int}:
        return text
    if form(text) == {dict}:
        return tokenizer.apply_chat_template(text, add_generation_prompt=not answered,
                                             return_dict=False)
    # A tokenizer may open a text, unless it begins so already, but must not close it.
    ids, opening = tokenizer.encode(text, add_special_tokens=False), [tokenizer.bos_token_id]
    return opening + ids if tokenizer.encode("")[:1] == opening != ids[:1] else ids


def item_of(row, tokenizer, vocabulary, max_length):
    """What a line becomes; None if it is too long.

    A token may reach across the prompt's end, as " b" does in "a " + "b": it is the completion's.
    So the text has the tokens that it has as a whole, and both sides of a pair have one prompt. It
    ends with its first end-of-text, which strings without one are given. Ids stay as they are.
    """
    kind, names, given = judgement(row)
    prompt, end, of = row["prompt"], tokenizer.eos_token_id, form(row["prompt"])
    if of not in (str, {int}, {dict}) or any(form(row[name]) != of for name in names):
        raise ValueError("prompt and completions are not all strings, messages or token ids")
    if not all(row[name] for name in names):
        raise ValueError("a completion is empty")
    alone = encode(prompt, tokenizer, answered=False)
    wholes = [encode(prompt + row[name], tokenizer, answered=True) for name in names]
    asked = os.path.commonprefix([alone, *wholes])
    completions = [whole[len(asked):] for whole in wholes]
    if of is str:
        completions = [ids + [end] for ids in completions]
    if of != {int}:
        completions = [ids[:[*ids, end].index(end) + 1] for ids in completions]
    for ids in (asked, *completions):
        if not ids or not 0 <= min(ids) <= max(ids) < vocabulary:
            raise ValueError(f"no token of its own, or one that is not from 0 to {vocabulary - 1}")
    if len(asked) + max(map(len, completions)) > max_length:
        return None
    return dict(whole_prompt=tuple(alone), prompt=asked, completions=completions, kind=kind,
                given=given, first_offset=0.0, offset=0.0, ref_logprob=[0.0, 0.0])


def read_lines(path, made_of, *more):
    """made_of(row, *more) of each JSON line. A bad line ends the run."""
    made = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            with reading(f"{path}, line {number}: {line[:60]}"):
                made.append(made_of(json.loads(line), *more))
    if not any(made):
        raise ValueError("nothing to learn from")
    return made


def estimate_offsets(items, beta):
    """f(x) + c of each prompt from its scores: the estimate of beta log Z(x), and where the path to
    it begins, at the logit of the mean score. There the residuals add up to 0, so that no prompt's
    responses are all pushed one way. Scores of 0 and 1 are taken for 0.0001 and 0.9999."""
    of_prompts = defaultdict(list)
    for item in items:
        of_prompts[item["whole_prompt"]].append(item)
    for own in of_prompts.values():
        scores = torch.tensor([item["given"] for item in own if item["kind"] == SCORE]).double()
        if len(scores) > 1:             # of one score the estimate would be that score
            offsets = dict(first_offset=scores.mean().logit(1e-4).item(),
                           offset=una.estimated_offset(scores.logit(1e-4), beta).item())
            for item in own:
                item.update(offsets)


def split(items, share):
    """Training and held-out items. All items of a prompt are on one side, drawn by lot."""
    prompts = sorted({item["whole_prompt"] for item in items})
    count = min(max(round(share * len(prompts)), 1), len(prompts) - 1) if share else 0
    drawn = set(random.Random(0).sample(prompts, count))
    return ([item for item in items if item["whole_prompt"] not in drawn],
            [item for item in items if item["whole_prompt"] in drawn])


# ---------------------------------------------------------------- the loss
def collate(items):
    """A batch: rows of the items' first completions, then of the pairs' second ones."""
    rows = [(item["prompt"], item["completions"][0]) for item in items]
    rows += [(item["prompt"], item["completions"][1]) for item in items if item["kind"] == PAIR]
    tokens = [torch.tensor(x + y) for x, y in rows]
    response = [torch.tensor([False] * len(x) + [True] * len(y)) for x, y in rows]
    names = "kind", "given", "first_offset", "offset", "ref_logprob"
    return dict({name: torch.tensor([item[name] for item in items]) for name in names},
                input_ids=pad_sequence(tokens, batch_first=True),
                attention_mask=pad_sequence([*map(torch.ones_like, tokens)], batch_first=True),
                response_mask=pad_sequence(response, batch_first=True))


def outcome(model, batch, args):
    """Per item: loss (B,); rho and reward (B, 2), of its first and, in a pair, second completion.

    The first completion of a pair is the chosen one. Where there is no second one, rho is 0.
    """
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    of_rows = una.sequence_logprob(logits, batch["input_ids"], batch["response_mask"])
    kind, given, ref_logprob = batch["kind"], batch["given"], batch["ref_logprob"]
    pair, label, score = kind == PAIR, kind == LABEL, kind == SCORE
    logprob = torch.zeros_like(ref_logprob)
    logprob[:, 0] = of_rows[:len(kind)]
    logprob[pair, 1] = of_rows[len(kind):]
    reward = una.implicit_reward(logprob, ref_logprob, args.beta, batch["offset"][:, None])
    held = una.anchor_loss(logprob[pair], ref_logprob[pair]).mean(1)
    loss = torch.zeros_like(given)
    loss[pair] = una.una_pair_loss(reward[pair, 0], reward[pair, 1]) + args.anchor * held
    loss[label] = una.una_binary_loss(reward[label, 0], given[label], args.g)
    loss[score] = una.una_score_loss(reward[score, 0], given[score], args.g)
    return dict(kind=kind, given=given, loss=loss, rho=logprob - ref_logprob, reward=reward)


def joined(parts):
    """Several outcomes as one."""
    return {name: torch.cat([part[name].detach().cpu() for part in parts]) for name in parts[0]}


def measure(facts):
    """{name: mean} of outcomes, as far as there are any. What has the label 1 or 0 is chosen or
    rejected too. kl_ref_policy, the mean of -rho, estimates KL(pi_ref || pi) where the reference
    wrote the completions. Far above 0 it warns: probability has left what was judged."""
    kind, given, loss, rho = (facts[name] for name in ("kind", "given", "loss", "rho"))
    pair, label, score = kind == PAIR, kind == LABEL, kind == SCORE
    first, second = facts["reward"].unbind(1)
    parts = dict(
        loss=loss, loss_pair=loss[pair], loss_label=loss[label], loss_score=loss[score],
        reward_chosen=first[pair | label & (given == 1)],
        reward_rejected=torch.cat([second[pair], first[label & (given == 0)]]),
        pairs_in_order=((first - second)[pair].sign() + 1) / 2,         # equal ones count half
        kl_ref_policy=-torch.cat([rho[:, 0], rho[pair, 1]]))
    return {name: part.mean().item() for name, part in parts.items() if len(part)}


# ---------------------------------------------------------------- the trainer
class UNATrainer(transformers.Trainer):
    """The loss of a step is one mean over its items, however they are cut. Micro-batches add up and
    DDP averages processes, so each micro-batch gives its sum x processes / items."""
    loss_is_scaled_for_ga = True        # or the Trainer might divide by the micro-batches as well

    def __init__(self, **options):
        super().__init__(data_collator=collate, **options)
        self.seen = []                  # the outcomes since the last log

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step, and the number of its items in all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.tensor(sum(len(batch["kind"]) for batch in batches), device=device)
        return batches, self.accelerator.gather(count).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # f(x) + c is where it ends from the first half of the steps on.
        share = min(1.0, 2 * self.state.global_step / self.state.max_steps)
        offset = torch.lerp(inputs["first_offset"], inputs["offset"], share)
        facts = outcome(model, inputs | dict(offset=offset), self.args)
        self.seen.append(joined([facts]))
        return facts["loss"].sum() * self.accelerator.num_processes / num_items_in_batch

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs = measure(joined(gather_object(self.seen))) | logs
            self.seen = []
        super().log(logs, start_time)

    @torch.no_grad()
    def outcomes(self, items):
        """The outcome of all items, in order, as the model is now."""
        self.model.train()              # as in training: what is random would show in rho
        with self.accelerator.autocast():
            return joined([
                self.accelerator.gather_for_metrics(outcome(self.model, batch, self.args))
                for batch in self.get_test_dataloader(items)])

    def set_reference(self, items):
        """Stores the model's log-probabilities in the items. Returns outcomes, with rho = 0."""
        logprobs = self.outcomes(items)["rho"]          # while ref_logprob is 0
        for item, logprob in zip(items, logprobs.tolist(), strict=True):
            item["ref_logprob"] = logprob
        facts = self.outcomes(items)
        check_start(facts["rho"])
        return facts


# ---------------------------------------------------------------- the run
def load(args):
    """The tokenizer, and the policy, which before training is the reference."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    config = transformers.AutoConfig.from_pretrained(args.model).get_text_config()
    config.update({name: 0.0 for name, value in config.to_dict().items()
                   if "drop" in name and type(value) is float})
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, config=config, dtype="auto" if args.lora else torch.float32)
    if args.lora:
        transformers.set_seed(args.seed)
        model = peft.get_peft_model(model, peft.LoraConfig(
            r=args.lora, lora_alpha=args.lora, target_modules="all-linear"))
    return tokenizer, model


def check_start(rho):
    """Before training pi is pi_ref, or the run ends."""
    if not (rho == 0).all():                            # NaN is not 0 either
        stop(f"rho is up to {rho.abs().max()} nats before training: something in the model is "
             "random or not finite", 1)


def save(trainer, losses=()):
    """Saves the model, the low-rank parts added up; nothing if it has diverged."""
    if not all(part.isfinite().all() for part in (*trainer.model.parameters(), *losses)):
        stop("weights or losses are not finite: training diverged and has no results", 1)
    if trainer.args.lora:
        trainer.model = trainer.model.cpu().float().merge_and_unload()
    trainer.save_model()


def main(arguments=None):
    """Reads, trains, measures, saves. Bad input is one line and status 2."""
    args = parse_flags(arguments, Settings)
    if not args.beta > 0 or args.neftune_noise_alpha:
        stop("--beta must be above 0, and the noise of --neftune_noise_alpha would be in rho")
    with reading(f"--model {args.model}"):
        tokenizer, model = load(args)
    room = min(args.max_length, getattr(model.config, "max_position_embeddings", math.inf))
    with reading(f"--data {args.data}"):
        lines = read_lines(args.data, item_of, tokenizer, model.config.vocab_size, room)
    items = [item for item in lines if item]
    if args.offset == "estimated":
        estimate_offsets(items, args.beta)
    train, held = split(items, args.heldout)
    trainer = UNATrainer(model=model, args=args, train_dataset=train, processing_class=tokenizer)

    trainer.set_reference(train)
    before = measure(trainer.set_reference(held)) if held else {}
    say = trainer.accelerator.print                     # by one process
    say(f"{lines.count(None)} items are too long. rho is 0 exactly for all {len(items)} others")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    facts = trainer.outcomes(held or train[:1])
    save(trainer, [facts["loss"]])
    after = measure(facts) if held else {}
    if trainer.is_world_process_zero():
        told = dict(settings=args.to_dict(), items=dict(train=len(train), held=len(held)),
                    before=before, after=after)
        part = Path(args.output_dir, "results.part")                    # whole, or not at all
        part.write_text(json.dumps(told, indent=1, allow_nan=False), encoding="utf-8")
        part.replace(part.with_suffix(".json"))
    say("held-out:", json.dumps(dict(before=before, after=after), indent=1))


if __name__ == "__main__":
    main()

"""una.py's losses on a model and feedback of your own. Hugging Face's Trainer does all the rest.

    python examples/own_model.py --model FOLDER --data feedback.jsonl --output_dir out
    torchrun --nproc-per-node 2 examples/own_model.py ...             the same, on two processes

una.py is found in the folder above this one, or beside this file. Flags are the fields of Settings,
and TRAINING, below. A batch is counted in items, and a pair is one. All weights are trained, in
float32; with --lora R a low-rank W + BA, added up before saving. Dropout is off, in the saved
config too. README.md says what feedback is, and which tokens it becomes. Where both are too long, a
prompt keeps its last max_length / 2 tokens, or as many as the longest completion leaves, and a
completion the first that then have room.

The reference is the model as it was: its log-probabilities are computed once, before training.
Computed once more, all must give rho = log pi - log pi_ref = 0 exactly, or the run ends. In batches
cut otherwise rounding moves rho a little, in bfloat16 much more.
"""
import copy
import json
import math
import os
import random
import sys
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, make_dataclass
from typing import Literal

import peft
import torch
import transformers
from accelerate.utils import gather_object

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import una  # noqa: E402


@dataclass
class Settings:
    model: str                                          # a folder or a name, for from_pretrained
    data: str                                           # feedback, JSONL
    beta: float = 0.1                                   # the price of a nat of KL
    offset: Literal["zero", "estimated", "ramped"] = "zero"     # f(x) + c of Eq. 6
    anchor: float = 0.0                                 # times mean(-log pi) of a pair's two sides
    g: Literal["mse", "bce"] = "mse"                    # the error of labels and scores
    heldout: float = 0.1                                # share of prompts that are only measured
    lora: int = 0                                       # rank; 0 trains all weights
    max_length: int = 1024                              # prompt and completion, or the model's


# The flags of transformers' TrainingArguments that are tested here. All others end the run: some of
# them would silently change what is trained.
TRAINING = """output_dir max_steps num_train_epochs per_device_train_batch_size
    gradient_accumulation_steps activation_checkpointing learning_rate lr_scheduler_type
    warmup_steps optim adam_beta2 weight_decay max_grad_norm bf16 use_cpu seed save_strategy
    save_steps save_total_limit logging_steps report_to disable_tqdm""".split()
CHOICES = dict(lr_scheduler_type=Literal["linear", "cosine", "constant"],
               optim=Literal["adamw_torch_fused", "adamw_torch", "sgd"],
               save_strategy=Literal["no", "steps", "epoch"])


def stop(message, status=2):
    """Ends the run with one line, said by one process."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        below = "\n" if status == 1 else ""             # a progress bar may stand there
        said = str(message).strip().split("\n")[0]
        print(f"{below}{os.path.basename(sys.argv[0])}: {said}", file=sys.stderr)
    raise SystemExit(status)


@contextmanager
def reading(what, status=2):
    """Whatever goes wrong while input is read is said in one line that names the input."""
    try:
        yield
    except Exception as error:          # transformers and chat templates may raise anything
        stop(f"{what}: {error}", status)


def parse_flags(arguments, settings, config, names, **defaults):
    """Of the command line an object of the dataclass settings, and the named fields of a config."""
    training = make_dataclass("Training", [
        (field.name, CHOICES.get(field.name, field.type), copy.copy(field))
        for field in fields(config) if field.name in names])
    parser = transformers.HfArgumentParser([settings, training], allow_abbrev=False)
    parser.error = stop
    parser.set_defaults(**defaults)
    with reading("flags"):
        return parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)


# ---------------------------------------------------------------- feedback
PAIR, LABEL, SCORE = range(3)
FIELDS = "prompt", "chosen", "rejected", "completion", "label", "score"
COPY = -1                               # the id of an item that only fills up a batch


def judgement(row):
    """A line's kind, its completions' fields, its label or score (1 for a pair: it has none)."""
    given, score = {name for name in FIELDS if row.get(name) is not None}, row.get("score")
    if given == {"prompt", "chosen", "rejected"}:
        return PAIR, ("chosen", "rejected"), 1.0
    if given == {"prompt", "completion", "label"} and row["label"] in (0, 1):
        return LABEL, ("completion",), float(row["label"])
    if (given == {"prompt", "completion", "score"} and type(score) in (int, float)
            and 0 <= score <= 1):
        return SCORE, ("completion",), float(score)
    raise ValueError("a line has prompt, and either chosen and rejected, or completion and label "
                     "(true, false, 1 or 0), or completion and score (0 to 1)")


def form(text):
    """str; or int or dict, for a list of token ids or of messages."""
    if isinstance(text, str):
        return str
    kinds = {type(part) for part in text} if isinstance(text, list) else set()
    if kinds not in ({int}, {dict}):
        raise ValueError(f"{str(text)[:60]!r} is no string, list of messages or list of token ids")
    return kinds.pop()


def encode(text, tokenizer, answered):
    """Token ids of a prompt or, if it is answered, of prompt and completion."""
    if form(text) is int:
        return text
    if form(text) is dict:
        return tokenizer.apply_chat_template(text, add_generation_prompt=not answered,
                                             return_dict=False)
    # The tokenizer may open a text, with begin-of-text, unless it begins so already, but must not
    # close it: a prompt goes on, and a completion is closed later, where it has no end.
    bare, ids = tokenizer.encode(text, add_special_tokens=False), tokenizer.encode(text)
    if ids[-len(bare) - 1:] == bare + [tokenizer.eos_token_id]:
        ids = ids[:-1]
    opening = ids[:len(ids) - len(bare)]
    return bare if bare[:len(opening)] == opening else ids


def encode_answered(prompt, completion, tokenizer):
    """Token ids of both, as one text. Of messages a completion is one."""
    of = form(completion)
    if of is not form(prompt) or of is dict and len(completion) > 1:
        raise ValueError("prompt and completion are not both strings, messages or token ids")
    if not completion or of is dict and not completion[0].get("content"):
        raise ValueError("a completion is empty")
    return encode(prompt + completion, tokenizer, True)


def item_of(row, tokenizer, vocabulary, max_length, counts):
    """What a line becomes; None for a pair of identical completions. A bad one ends the run.

    A token may reach across the prompt's end, as " b" does in "a " + "b": it is the completion's.
    So the text has the tokens that it has as a whole, and both sides of a pair have one prompt. It
    ends with its first end-of-text, which strings without one are given. Ids stay as they are.
    """
    kind, names, given = judgement(row)
    prompt, end = row["prompt"], tokenizer.eos_token_id
    alone = encode(prompt, tokenizer, False)
    wholes = [encode_answered(prompt, row[name], tokenizer) for name in names]
    asked = os.path.commonprefix([alone, *wholes])
    answers = [whole[len(asked):] for whole in wholes]
    if form(prompt) is str:
        answers = [ids + [end] for ids in answers]
    if form(prompt) is not int:
        answers = [ids[:[*ids, end].index(end) + 1] for ids in answers]
    for name, ids in zip(("prompt", *names), (asked, *answers)):
        if not ids:
            raise ValueError(f"{name}: it has no token of its own")
        for token in ids:
            if not 0 <= token < vocabulary:
                raise ValueError(f"{name}: the token {token} is not from 0 to {vocabulary - 1}")
    room = max(max_length - max(map(len, answers)), max_length // 2)
    start = tuple(asked[-room:])
    completions = [ids[:max_length - len(start)] for ids in answers]
    counts["prompts that end in other tokens once answered: these are the completion's"] += (
        len(asked) < len(alone))
    counts["prompts cut"] += len(start) < len(asked)
    counts["completions cut"] += sum(len(a) < len(b) for a, b in zip(completions, answers))
    if kind == PAIR and completions[0] == completions[1]:
        counts["pairs dropped: identical completions"] += 1
        return None
    return dict(whole_prompt=tuple(alone), prompt=start, completions=completions, kind=kind,
                given=given, first_offset=0.0, offset=0.0, ref_logprob=[0.0, 0.0])


def read_lines(path, made_of, *more):
    """made_of(row, *more) of each JSON line that has one. A bad line ends the run."""
    made = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            with reading(f"{path}, line {number}: {line[:60]}"):
                made.append(made_of(json.loads(line), *more))
    made = [one for one in made if one is not None]
    if not made:
        raise ValueError("no feedback to learn from")
    return made


def estimate_offsets(items, beta, counts, ramped):
    """f(x) + c = beta log Z(x) of each prompt, from its n scores: from max r - beta log n to max r.
    Scores of 0 and 1 have no logit and are taken for 0.0001 and 0.9999. A ramp begins at the logit
    of the mean score: there the residuals add up to 0, and no prompt's responses are all pushed one
    way."""
    of_prompts = defaultdict(list)
    for item in items:
        of_prompts[item["whole_prompt"]].append(item)
    for own in of_prompts.values():
        scores = [item["given"] for item in own if item["kind"] == SCORE]
        scores = torch.tensor(scores, dtype=torch.float64)
        if len(scores) < 2:
            counts["prompts with fewer than 2 scores: f(x) + c is 0"] += 1
            continue
        counts["prompts with fewer than 8 scores: f(x) + c is a guess"] += len(scores) < 8
        offset = una.estimated_offset(scores.logit(1e-4), beta).item()
        first = scores.mean().logit(1e-4).item() if ramped else offset
        for item in own:
            item["first_offset"], item["offset"] = first, offset


def split(items, share):
    """Training and held-out items. All items of a prompt are on one side, drawn by lot."""
    prompts = sorted({item["whole_prompt"] for item in items})
    count = 0
    if share:
        count = min(max(round(share * len(prompts)), 1), len(prompts) - 1)
    drawn = set(random.Random(0).sample(prompts, count))
    train = [item for item in items if item["whole_prompt"] not in drawn]
    held = [item for item in items if item["whole_prompt"] in drawn]
    return [[dict(item, id=n) for n, item in enumerate(part)] for part in (train, held)]


# ---------------------------------------------------------------- the loss
def collate(items):
    """A batch: rows of the items' first completions, then of the pairs' second ones."""
    rows = [(item["prompt"], item["completions"][0]) for item in items]
    rows += [(item["prompt"], item["completions"][1]) for item in items if item["kind"] == PAIR]
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor([*x, *y]) for x, y in rows], True)
    start = torch.tensor([[len(x)] for x, y in rows])
    end = torch.tensor([[len(x) + len(y)] for x, y in rows])
    place = torch.arange(tokens.shape[1])
    names = ("id", "kind", "given", "first_offset", "offset", "ref_logprob")
    return dict({name: torch.tensor([item[name] for item in items]) for name in names},
                input_ids=tokens, attention_mask=(place < end).long(),
                response_mask=(place >= start) & (place < end))


def outcome(model, batch, beta, g, anchor):
    """Per item: loss (B,); rho and reward (B, 2), of its first and, in a pair, second completion.

    The first completion of a pair is the chosen one. Where there is no second one, rho is 0.
    A pair's loss falls as well if both become unlikely, and other responses likely that nobody
    judged. The anchor holds them, where pi_ref wrote them.
    """
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    of_rows = una.sequence_logprob(logits, batch["input_ids"], batch["response_mask"])
    kind, given, ref_logprob = batch["kind"], batch["given"], batch["ref_logprob"]
    pair, label, score = kind == PAIR, kind == LABEL, kind == SCORE
    logprob = torch.zeros_like(ref_logprob)
    logprob[:, 0] = of_rows[:len(kind)]
    logprob[pair, 1] = of_rows[len(kind):]
    reward = una.implicit_reward(logprob, ref_logprob, beta, batch["offset"][:, None])
    chosen, rejected = reward[pair, 0], reward[pair, 1]
    loss = torch.zeros_like(given)
    held = una.anchor_loss(logprob[pair], ref_logprob[pair]).mean(1)
    loss[pair] = una.una_pair_loss(chosen, rejected) + anchor * held
    loss[label] = una.una_binary_loss(reward[label, 0], given[label], g)
    loss[score] = una.una_score_loss(reward[score, 0], given[score], g)
    return dict(id=batch["id"], kind=kind, given=given, loss=loss, rho=logprob - ref_logprob,
                reward=reward)


def joined(parts):
    """Several outcomes as one."""
    return {name: torch.cat([part[name].detach().cpu() for part in parts]) for name in parts[0]}


def measure(facts):
    """{name: mean} of outcomes, as far as there are any. What has the label 1 or 0 is chosen or
    rejected too. kl_ref_policy, the mean of -rho, estimates KL(pi_ref || pi) where the reference
    wrote the completions: without bias on held-out prompts, and at times below 0. Far above 0 it
    is a warning: probability has left what was judged."""
    kind, given, loss, rho = (facts[name] for name in ("kind", "given", "loss", "rho"))
    pair, label, score = kind == PAIR, kind == LABEL, kind == SCORE
    first, second = facts["reward"].unbind(1)
    parts = dict(
        loss=loss, loss_pair=loss[pair], loss_label=loss[label], loss_score=loss[score],
        reward_chosen=first[pair | label & (given == 1)],
        reward_rejected=torch.cat([second[pair], first[label & (given == 0)]]),
        pairs_in_order=((first - second)[pair].sign() + 1) / 2,         # equal ones count half
        kl_ref_policy=-torch.cat([rho[:, 0], rho[pair, 1]]))
    means = {name: part.mean().item() for name, part in parts.items() if len(part)}
    scores = torch.stack([una.implicit_score(first[score]), given[score]]).double()
    if score.any() and (scores.amin(1) < scores.amax(1)).all():         # else there is none
        means["score_correlation"] = torch.corrcoef(scores)[0, 1].item()
    return means


# ---------------------------------------------------------------- the trainer
class UNATrainer(transformers.Trainer):
    """The loss of a step is one mean over its items, however they are cut. Micro-batches add up and
    DDP averages processes, so each micro-batch gives its sum x processes / items. If one of them
    lacks a full batch, accelerate would repeat items: copies stand there, which do not count."""
    loss_is_scaled_for_ga = True        # or the Trainer might divide by the micro-batches as well

    def __init__(self, settings, args, train_dataset, **options):
        lacking = -len(train_dataset) % (args.train_batch_size * args.world_size)
        copies = [dict(train_dataset[0], id=COPY)] * (lacking if args.world_size > 1 else 0)
        super().__init__(args=args, train_dataset=train_dataset + copies, data_collator=collate,
                         **options)
        self.how = settings.beta, settings.g, settings.anchor
        self.seen = []                  # the outcomes since the last log

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step, and the number of its items in all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum((batch["id"] != COPY).sum() for batch in batches)
        return batches, self.accelerator.gather(count).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # f(x) + c is where it ends from the first half of the steps on.
        share = min(1.0, 2 * self.state.global_step / self.state.max_steps)
        offset = torch.lerp(inputs["first_offset"], inputs["offset"], share)
        facts = outcome(model, inputs | dict(offset=offset), *self.how)
        real = facts["id"] != COPY
        facts = {name: part[real] for name, part in facts.items()}
        self.seen.append(joined([facts]))
        return facts["loss"].sum() * self.accelerator.num_processes / num_items_in_batch

    def log(self, logs, start_time=None):
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                stop(f"the loss is {logs['loss']}: training diverged and has no results", 1)
            logs = measure(joined(gather_object(self.seen))) | logs
            self.seen = []
        super().log(logs, start_time)

    @torch.no_grad()
    def outcomes(self, items):
        """The outcome of all items, in order, as the model is now."""
        self.model.train()              # as in training: what is random would show in rho
        parts = []
        for batch in self.get_test_dataloader(items):
            with self.accelerator.autocast():
                facts = outcome(self.model, batch, *self.how)
            parts.append(joined([self.accelerator.gather_for_metrics(facts)]))
        return joined(parts)

    def set_reference(self, items):
        """Stores the model's log-probabilities in the items. Returns outcomes, with rho = 0."""
        logprobs = self.outcomes(items)["rho"]          # while ref_logprob is 0
        for item, logprob in zip(items, logprobs.tolist(), strict=True):
            item["ref_logprob"] = logprob
        facts = self.outcomes(items)
        check_start(facts["rho"])
        return facts


# ---------------------------------------------------------------- the run
def parse(arguments):
    """Settings and TrainingArguments."""
    names = [*TRAINING, "per_device_eval_batch_size", "resume_from_checkpoint"]
    settings, training = parse_flags(arguments, Settings, transformers.TrainingArguments, names,
                                     logging_steps=10, per_device_eval_batch_size=None)
    with reading("flags"):
        # What fits in memory with gradients fits without: the Trainer's own 8 may not.
        training.per_device_eval_batch_size = (
            training.per_device_eval_batch_size or training.per_device_train_batch_size)
        args = transformers.TrainingArguments(
            **vars(training), remove_unused_columns=False, logging_nan_inf_filter=False)
    if not (0 < settings.beta < math.inf and 0 <= settings.heldout < 1 < settings.max_length
            and 0 <= settings.anchor < math.inf):
        stop("must be: --beta > 0, 0 <= --heldout < 1, --max_length > 1, --anchor >= 0")
    checkpoint = args.resume_from_checkpoint
    if checkpoint and not os.path.exists(os.path.join(checkpoint, "trainer_state.json")):
        stop(f"--resume_from_checkpoint {checkpoint}: there is no checkpoint")
    return settings, args


def load_tokenizer(name):
    """The tokenizer, and the model's config without dropout."""
    config = transformers.AutoConfig.from_pretrained(name).get_text_config()
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    if tokenizer.eos_token_id is None or len(tokenizer) < 2:            # none, or made up
        raise ValueError("no tokenizer, or one without end-of-text")
    for field, value in list(vars(config).items()):
        if "drop" in field and type(value) is float:
            setattr(config, field, 0.0)
    return tokenizer, config


def load_model(settings, config, seed):
    """The policy, which before training is the reference."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        settings.model, config=config, dtype="auto" if settings.lora else torch.float32,
        output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"no weights for {', '.join(sorted(info['missing_keys'])[:3])}")
    with torch.no_grad():               # the last token must not change what is predicted earlier
        one, other = (model(torch.tensor([[0, 0, last]])).logits[0, :2] for last in (0, 1))
    if not torch.allclose(one.float(), other.float(), rtol=1e-3, atol=1e-3, equal_nan=True):
        raise ValueError("the model is not causal: it sees the tokens that it should predict")
    if settings.lora:
        transformers.set_seed(seed)
        model = peft.get_peft_model(model, peft.LoraConfig(
            r=settings.lora, lora_alpha=settings.lora, target_modules="all-linear"))
    return model


def check_start(rho):
    """Before training pi is pi_ref, or the run ends."""
    if not (rho == 0).all():                            # NaN is not 0 either
        stop(f"rho is up to {rho.abs().max()} nats before training: something in the model is "
             "random or not finite", 1)


def save(trainer, lora, losses=()):
    """Saves the model, the low-rank parts added up; nothing if it has diverged."""
    if not all(part.isfinite().all() for part in (*trainer.model.parameters(), *losses)):
        stop("weights or losses are not finite: training diverged and has no results", 1)
    if lora:
        trainer.model = trainer.model.cpu().float().merge_and_unload()
    trainer.save_model()


def main(arguments=None):
    """Reads, trains, measures, saves. Bad input is one line and status 2."""
    settings, args = parse(arguments)
    with reading(f"--model {settings.model}"):
        tokenizer, config = load_tokenizer(settings.model)
    counts = Counter()
    room = min(settings.max_length, getattr(config, "max_position_embeddings", math.inf))
    with reading(f"--data {settings.data}"):
        items = read_lines(settings.data, item_of, tokenizer, config.vocab_size, room, counts)
    if settings.offset != "zero":
        estimate_offsets(items, settings.beta, counts, settings.offset == "ramped")
    train, held = split(items, settings.heldout)
    with reading(f"--model {settings.model}"):
        model = load_model(settings, config, args.seed)
    with reading("flags"):
        trainer = UNATrainer(settings, model=model, args=args, train_dataset=train,
                             processing_class=tokenizer)

    trainer.set_reference(train)
    before = measure(trainer.set_reference(held)) if held else {}
    say = trainer.accelerator.print                     # by one process
    for name, count in counts.items():
        if count:
            say(count, name)
    say(f"{len(train)} items, {len(held)} held out. rho is 0 exactly for all of them")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    facts = trainer.outcomes(held or train[:1])
    save(trainer, settings.lora, [facts["loss"]])
    after = measure(facts) if held else {}
    if trainer.is_world_process_zero():
        told = dict(settings=asdict(settings), items=dict(train=len(train), held=len(held)),
                    counts=counts, before=before, after=after)
        path = os.path.join(args.output_dir, "results.json")
        with open(path + ".part", "w", encoding="utf-8") as file:       # whole, or not at all
            json.dump(told, file, indent=1, allow_nan=False)
        os.replace(path + ".part", path)
    if held:
        say("held-out:", json.dumps(dict(before=before, after=after), indent=1))


if __name__ == "__main__":
    main()

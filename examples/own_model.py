"""una.py's losses on a model and feedback of your own. Hugging Face's Trainer does all the rest.

    python examples/own_model.py --model FOLDER --data feedback.jsonl --output_dir out
    torchrun --nproc-per-node 2 examples/own_model.py ...             the same, on two processes

una.py is found in the folder above this one; a copy beside this file serves as well. Options are
Settings, below, and TrainingArguments: --learning_rate, --bf16, --fsdp, ... A batch is counted in
items, and a pair is one. All weights are trained, in float32; with --lora R a low-rank W + BA,
added up before saving. Dropout is off, in the saved config too.

Feedback is one JSON object a line, with TRL's field names, in any mixture: prompt, and chosen and
rejected (Eq. 10), or completion and label (Eq. 11, 12; true, false, 1 or 0), or completion and
score (Eq. 13; 0 to 1). Texts are strings, or messages for the tokenizer's chat template (one for a
completion), or lists of token ids. Prompt and completion are encoded apart. A completion ends with
its first end-of-text, which is appended if there is none; but ids are taken as they are. Of what is
too long, a prompt keeps its last max_length / 2 tokens, a completion the first that then have room.

The reference is the model as it was: its log-probabilities are computed once, before training. The
first batch and the held-out ones once more must give rho = log pi - log pi_ref = 0 exactly, or the
run ends. In batches cut otherwise rounding moves rho a little, in bfloat16 much more.
"""
import json
import os
import random
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import peft
import torch
import transformers
from accelerate.utils import gather_object

sys.path[:0] = [os.path.dirname(os.path.abspath(__file__)) + up for up in ("", "/..")]
import una  # noqa: E402


@dataclass
class Settings:
    model: str                                          # a folder or a name, for from_pretrained
    data: str                                           # feedback, JSONL
    beta: float = 0.1                                   # the price of a nat of KL
    offset: Literal["zero", "estimated"] = "zero"       # f(x) + c of Eq. 6
    g: Literal["mse", "bce"] = "mse"                    # the error of labels and scores
    heldout: float = 0.1                                # share of prompts that are only measured
    lora: int = 0                                       # rank; 0 trains all weights
    max_length: int = 1024                              # prompt and completion, or the model's


def stop(message, status=2):
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("own_model.py:", str(message).strip().split("\n")[0], file=sys.stderr)
    raise SystemExit(status)


# ---------------------------------------------------------------- feedback
PAIR, LABEL, SCORE = range(3)
KINDS = ("chosen", "rejected"), ("completion", "label"), ("completion", "score")


def encode(prompt, completion, tokenizer):
    """Token ids of both. The tokenizer may open a prompt with begin-of-text, never close it."""
    eos, plain = tokenizer.eos_token_id, dict(add_special_tokens=False)
    match prompt, completion:
        case _, "" | [] | [{"content": ""}]:
            raise ValueError("an empty completion")
        case [*_], [*_] if {*map(type, prompt + completion)} == {int}:
            return prompt, completion
        case str(), str():
            ids, bare = tokenizer.encode(prompt), tokenizer.encode(prompt, **plain)
            ids = ids[:-1] if ids[-len(bare) - 1:] == bare + [eos] else ids
        case [{"role": str()}, *_], [{"role": str(), "content": str()}]:
            head = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            whole = tokenizer.apply_chat_template(prompt + completion, tokenize=False)
            if not whole.startswith(head):
                raise ValueError("the chat template begins a prompt otherwise once it is answered")
            ids, completion = tokenizer.encode(head, **plain), whole[len(head):]
        case _:
            raise ValueError("prompt and completion are not both strings, messages or token ids")
    completion = tokenizer.encode(completion, **plain) + [eos]
    return ids, completion[:completion.index(eos) + 1]


def item_of(row, tokenizer, vocabulary, max_length, counts):
    """What a line becomes; None for a pair of identical completions. ValueError if it is bad."""
    fields = {name for name in {"prompt"}.union(*KINDS)
              if isinstance(row, dict) and row.get(name) is not None}
    kind = next((kind for kind, names in enumerate(KINDS) if fields == {"prompt", *names}), None)
    if kind is None:
        raise ValueError("fields are not prompt and either " + " or ".join(map(", ".join, KINDS)))
    given = 1 if kind == PAIR else row[KINDS[kind][1]]
    if kind == LABEL and given not in (0, 1):
        raise ValueError(f"label {given!r} is not true, false, 1 or 0")
    if kind == SCORE and not (type(given) in (int, float) and 0 <= given <= 1):
        raise ValueError(f"score {given!r} is not in [0, 1]")
    texts = [row[name] for name in KINDS[kind][:2 if kind == PAIR else 1]]
    (whole, *_), completions = zip(*(encode(row["prompt"], text, tokenizer) for text in texts))
    prompt = tuple(whole[-(max_length // 2):])
    cut = [ids[:max_length - len(prompt)] for ids in completions]
    if not prompt or not all(0 <= i < vocabulary for ids in (prompt, *cut) for i in ids):
        raise ValueError(f"a prompt without a token, or a token that is not below {vocabulary}")
    same = kind == PAIR and cut[0] == cut[1]
    counts["pairs dropped: identical completions"] += same
    counts["prompts cut"] += len(prompt) < len(whole)
    counts["completions cut"] += sum(len(a) < len(b) for a, b in zip(cut, completions))
    return None if same else dict(prompt=prompt, completions=cut, kind=kind, given=float(given))


def read(path, *encoding):
    """Items, and counts of what was dropped or cut. OSError, or ValueError with the bad line."""
    items, counts = [], Counter()
    with open(path, "rb") as file:
        for n, line in enumerate(file, 1):
            try:
                items.append(item_of(json.loads(line.decode()), *encoding, counts))
            except Exception as e:                      # a chat template may raise anything
                raise ValueError(f"{path}, line {n}: {getattr(e, 'msg', e)}: {line[:60]}") from e
    if not any(items):
        raise ValueError(f"{path}: no feedback to learn from")
    return [dict(item, offset=0.0, ref_logprob=[0.0, 0.0]) for item in items if item], counts


def estimate_offsets(items, beta, counts, least=1e-4, few=8):
    """f(x) + c = beta log Z(x), of a prompt's n scores: from max r - beta log n to max r."""
    scores, offsets = {item["prompt"]: [] for item in items}, {}
    for item in items:
        scores[item["prompt"]] += [item["given"]] if item["kind"] == SCORE else []
    for prompt, given in scores.items():
        n, rewards = len(given), torch.tensor(given, dtype=torch.float64).logit(least)
        offsets[prompt] = una.estimated_offset(rewards, beta).item() if n > 1 else 0.0
        how = ("estimated, as if the model itself wrote what is scored" if n >= few else
               f"a guess: WARNING, there are fewer than {few} scores" if n > 1 else
               "0: there are fewer than 2 scores")
        counts[f"prompts whose f(x) + c is {how}"] += 1
        counts[f"scores taken for {least} or {1 - least}, since 0 and 1 have no logit"] += sum(
            not least <= score <= 1 - least for score in given if n > 1)
    for item in items:
        item["offset"] = offsets[item["prompt"]]


def split(items, share):
    """Training and held-out items. All items of a prompt are on one side, drawn by lot."""
    prompts = sorted({item["prompt"] for item in items})
    count = min(max(round(share * len(prompts)), 1), len(prompts) - 1) if share else 0
    held = set(random.Random(0).sample(prompts, count))
    return [[item for item in items if (item["prompt"] in held) == side] for side in (False, True)]


def collate(items):
    """Rows of the items' first completions, then of the pairs' second ones; columns of items."""
    rows = [(i["prompt"], y) for n in (0, 1) for i in items for y in i["completions"][n:n + 1]]
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor((*x, *y)) for x, y in rows], True)
    start, end = torch.tensor([(len(x), len(x) + len(y)) for x, y in rows]).T[..., None]
    place = torch.arange(tokens.shape[1])
    columns = {name: torch.tensor([item[name] for item in items])
               for name in ("kind", "given", "offset", "ref_logprob")}
    return dict(columns, input_ids=tokens, attention_mask=(place < end).long(),
                response_mask=(place >= start) & (place < end), real=columns["kind"] >= 0)


def outcome(model, batch, beta, g):
    """Loss, kind and given, (B,); rho and reward, (B, 2): of chosen (or only) and rejected."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    of_rows = una.sequence_logprob(logits, batch["input_ids"], batch["response_mask"])
    ref, kind, given = batch["ref_logprob"], batch["kind"], batch["given"]
    pair, label, score = (kind == each for each in (PAIR, LABEL, SCORE))
    logprob = torch.zeros_like(ref)
    logprob[:, 0], logprob[pair, 1] = of_rows[:len(kind)], of_rows[len(kind):]
    reward = una.implicit_reward(logprob, ref, beta, batch["offset"][:, None])
    loss = torch.zeros_like(given)
    loss[pair] = una.una_pair_loss(*reward[pair].unbind(1))
    loss[label] = una.una_binary_loss(reward[label, 0], given[label], g)
    loss[score] = una.una_score_loss(reward[score, 0], given[score], g)
    return loss, kind, given, logprob - ref, reward


def measure(facts):
    """{name: mean} of outcomes, as far as there are any. What has the label 1 or 0 is chosen or
    rejected too. kl_ref_policy, the mean of -rho, estimates KL(pi_ref || pi) where the reference
    wrote the completions: without bias on held-out prompts, and at times below 0."""
    loss, kind, given, rho, reward = map(torch.as_tensor, facts)
    pair, label, score = (kind == each for each in (PAIR, LABEL, SCORE))
    first, second = reward.unbind(1)
    parts = dict(loss=loss, loss_pair=loss[pair], loss_label=loss[label], loss_score=loss[score],
                 reward_chosen=first[pair | label & (given == 1)],
                 reward_rejected=torch.cat([second[pair], first[label & (given == 0)]]),
                 pairs_in_order=((first - second)[pair].sign() + 1) / 2,    # equal ones count half
                 kl_ref_policy=-torch.cat([rho[:, 0], rho[pair, 1]]))
    means = {name: part.mean().item() for name, part in parts.items() if len(part)}
    scores = torch.stack([una.implicit_score(first[score]), given[score]])
    if score.any() and (scores.amin(1) < scores.amax(1)).all():
        means["score_correlation"] = torch.corrcoef(scores.double())[0, 1].item()
    return means


class UNATrainer(transformers.Trainer):
    """The loss of a step is one mean over its items, however they are cut. Micro-batches add up and
    DDP and FSDP average processes, so each micro-batch gives its sum x processes / items."""
    loss_is_scaled_for_ga = True        # or the Trainer might divide by the micro-batches as well

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step, and the number of its items in all processes. accelerate
        fills up an epoch's last batch, behind `remainder` items, with copies: not real ones."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        epoch, real = self.accelerator.gradient_state, batches[-1]["real"]
        if epoch.end_of_dataloader and epoch.remainder > 0:
            real[max(0, epoch.remainder - len(real) * self.accelerator.process_index):] = False
        return batches, self.accelerator.gather(sum(batch["real"].sum() for batch in batches)).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        facts = [part[inputs["real"]] for part in outcome(model, inputs, *self.how)]
        self.seen.append([part.detach().cpu() for part in facts])
        return facts[0].sum() * self.accelerator.num_processes / num_items_in_batch

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        model.train()                   # as in training: what is random would show in rho
        with torch.no_grad():
            facts = outcome(model, self._prepare_inputs(inputs), *self.how)
        return None, facts[3], facts

    def log(self, logs, start_time=None):
        if "loss" in logs:
            facts, self.seen = map(torch.cat, zip(*gather_object(self.seen))), []
            logs = measure(facts) | logs
        super().log(logs, start_time)


# ---------------------------------------------------------------- the run
def prepare(arguments):
    """Settings, training and held-out items, counts, trainer. ValueError or OSError: bad input."""
    parser = transformers.HfArgumentParser([Settings, transformers.TrainingArguments])
    parser.error = stop
    parser.set_defaults(logging_steps=10, logging_nan_inf_filter=False, remove_unused_columns=False)
    settings, args = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    if not (0 < settings.beta < float("inf") and 0 <= settings.heldout < 1 < settings.max_length):
        raise ValueError("must be: --beta > 0, 0 <= --heldout < 1, --max_length > 1")
    if args.resume_from_checkpoint:
        open(os.path.join(args.resume_from_checkpoint, "trainer_state.json")).close()
    try:
        config = transformers.AutoConfig.from_pretrained(settings.model).get_text_config()
        tokenizer = transformers.AutoTokenizer.from_pretrained(settings.model)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {settings.model}: {error}") from error
    if tokenizer.eos_token_id is None or len(tokenizer) < 2:    # none, or made up
        raise ValueError(f"--model {settings.model}: no tokenizer, or one without end-of-text")
    for name in [n for n, value in vars(config).items() if "drop" in n and type(value) is float]:
        setattr(config, name, 0.0)
    room = min(settings.max_length, getattr(config, "max_position_embeddings", settings.max_length))
    items, counts = read(settings.data, tokenizer, config.vocab_size, room)
    if settings.offset == "estimated":
        estimate_offsets(items, settings.beta, counts)
    train, held = split(items, settings.heldout)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings.model, config=config, dtype="auto" if settings.lora else torch.float32)
    if settings.lora:
        transformers.set_seed(args.seed)
        model = peft.get_peft_model(model, peft.LoraConfig(
            r=settings.lora, lora_alpha=settings.lora, target_modules="all-linear"))
    trainer = UNATrainer(model, args, collate, train, held or None, tokenizer)
    if settings.lora and trainer.is_fsdp_enabled:
        raise ValueError("--lora: W + BA is added up on one process, not with FSDP")
    trainer.how, trainer.seen = (settings.beta, settings.g), []
    return settings, train, held, counts, trainer


def main(arguments=None):
    """Reads, trains, measures, saves. Bad input is one line and status 2."""
    try:
        settings, train, held, counts, trainer = prepare(arguments)
    except (ValueError, OSError, ImportError) as error:
        stop(error)
    for part in filter(None, (train, held)):            # while ref_logprob is 0, rho is log pi
        for item, logprob in zip(part, trainer.predict(part).predictions.tolist()):
            item["ref_logprob"] = logprob
    some = train[:trainer.args.eval_batch_size * trainer.args.world_size]
    start = [trainer.predict(part).label_ids for part in (some, held) if part]
    if largest := max(abs(facts[3]).max() for facts in start):
        stop(f"rho is up to {largest} nats before training: something in the model is random", 1)
    trainer.accelerator.print(*(f"{n} {name}" for name, n in counts.items() if n), f"{len(train)} "
        f"items, {len(held)} held out. rho is 0 exactly for {len(some + held)} of them", sep="\n")
    # predict marks the model as prepared. Then train would leave out DDP, without a word.
    trainer.model._is_accelerate_prepared = trainer.is_fsdp_enabled
    trainer.compute_metrics = lambda output: measure(output.label_ids)
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    before, after = map(measure, (start[-1], trainer.predict(held).label_ids)) if held else ({}, {})
    if settings.lora:
        trainer.model = trainer.model.cpu().float().merge_and_unload()
    trainer.save_model()
    if trainer.is_world_process_zero():
        with open(os.path.join(trainer.args.output_dir, "results.json.part"), "w") as file:
            json.dump(dict(settings=vars(settings), items=dict(train=len(train), held=len(held)),
                           counts=counts, before=before, after=after), file, indent=1)
        os.replace(file.name, file.name.removesuffix(".part"))
    trainer.accelerator.print("held-out                before     after", *(
        f"{n:<20}{before.get(n, float('nan')):10.4f}{v:10.4f}" for n, v in after.items()), sep="\n")


if __name__ == "__main__":
    main()

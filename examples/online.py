"""Online UNA on a model of your own: TRL's GRPOTrainer, with Eq. 7 for its loss.

    python examples/online.py --model FOLDER --prompts prompts.jsonl --judge module:function \\
        --beta 0.1 --num_generations 8 --output_dir out

Needs requirements-trl.txt, and own_model.py beside it. A line of the prompts is {"prompt": ...}, a
string or messages for the tokenizer's chat template. judge(prompts, completions) is given two lists
of as many, completions as strings, and returns a list of finite rewards, in units of beta's.

At each step TRL samples num_generations responses to each of its prompts, and asks the judge. The
samples must be the policy's own and the loss is Eq. 7: what would change either is no flag here.
All weights are trained, in float32, beside the reference in memory; with --lora R a low-rank W + BA,
added up before saving. Before training rho = log pi - log pi_ref must be 0 exactly, or the run ends.
"""
import importlib
import math
import os
import sys
from dataclasses import dataclass

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")      # or TRL would report each run

import own_model  # it knows where una.py is
import torch
import una
from datasets import Dataset
from own_model import reading, stop
from trl import GRPOConfig, GRPOTrainer


@dataclass
class Settings:
    model: str                                          # a folder or a name, for from_pretrained
    prompts: str                                        # JSONL
    judge: str                                          # module:function
    lora: int = 0                                       # rank; 0 trains all weights


TRAINING = {*own_model.TRAINING, "beta", "num_generations", "max_completion_length"} - {
    "per_device_eval_batch_size", "resume_from_checkpoint"}


class UNATrainer(GRPOTrainer):
    """Eq. 7 with the mean residual of a prompt's samples for f(x) + c. With scale_rewards="none"
    TRL's advantages are the rewards, each less the mean of its prompt's: that is a part of f(x) + c.
    """

    def implicit_reward(self, model, batch, offset=0.0):
        """Eq. 6 of whole responses, (B,), in units of reward."""
        ids, mask = (torch.cat([batch[f"prompt_{of}"], batch[f"completion_{of}"]], 1)
                     for of in ("ids", "mask"))
        logprobs, *_ = self._get_per_token_logps_and_entropies(
            model, ids, mask, batch["completion_ids"].shape[1],
            self.args.per_device_train_batch_size)
        of_response = batch["completion_mask"].bool()
        return una.implicit_reward(*(part.where(of_response, 0.0).sum(1) for part in (
            logprobs, batch["ref_per_token_logps"])), self.beta, offset)

    def _generate(self, prompts):
        with reading("sampling, perhaps as training diverged", status=1):
            return super()._generate(prompts)

    def _generate_and_score_completions(self, inputs):
        """TRL's samples, and f(x) + c. Here those of a prompt are consecutive rows; afterwards TRL
        shuffles them, and cuts them into micro-batches, while the policy stays what it is now."""
        batch = super()._generate_and_score_completions(inputs)
        with torch.no_grad():
            reward = self.implicit_reward(self.model, batch)
        if self.state.global_step == 0:
            if not (reward == 0).all():                         # NaN is not 0 either
                stop("rho is not 0 before training: something in the model is random or not "
                     "finite", 1)
            self.accelerator.print(f"rho is 0 exactly for the first {len(reward)} samples")
        self._metrics["train"]["kl"].append(reward.mean().item() / self.beta)
        residual = (batch["advantages"] - reward).view(-1, self.num_generations)
        batch["offset"] = residual.mean(1, keepdim=True).expand_as(residual).flatten()
        return batch

    def _compute_loss(self, model, inputs):
        reward = self.implicit_reward(model, inputs, inputs["offset"])
        loss = una.una_reward_loss(reward, inputs["advantages"]).mean()
        return loss / self.current_gradient_accumulation_steps  # TRL leaves that to the loss


def reward_function(judge, name):
    """The judge as TRL calls it. What it returns is looked at first: TRL would go on with a NaN."""
    def rewards(prompts, completions, **_):
        texts = [y if isinstance(y, str) else y[0]["content"] for y in completions]
        given = judge(prompts, texts)
        with reading(f"--judge {name}"):
            given = [*map(float, given)]
            if len(given) != len(texts):
                raise ValueError(f"{len(given)} rewards for {len(texts)} completions")
            for reward, text in zip(given, texts):
                if not math.isfinite(reward):
                    raise ValueError(f"the reward {reward} for the completion {text[:60]!r}")
        return given
    return rewards


def prompt_of(row, where, tokenizer, vocabulary, room):
    """A line's prompt, if TRL makes the tokens of it that own_model.py makes, and no others."""
    prompt = row["prompt"] if isinstance(row, dict) and "prompt" in row else None
    if own_model.form(prompt) is int:
        raise ValueError("a prompt is a string or a list of messages here")
    ids = own_model.encode(prompt, tokenizer, answered=False)
    if isinstance(prompt, str) and tokenizer(prompt)["input_ids"] != ids:
        raise ValueError("the tokenizer would end the prompt")
    if not 0 < len(ids) <= room or max(ids) >= vocabulary:
        raise ValueError(f"{len(ids)} tokens, the largest {max(ids, default=None)}: there must be "
                         f"1 to {room}, below {vocabulary}")
    return dict(prompt=prompt)


def main(arguments=None):
    """Reads, trains, saves. Bad input is one line and status 2."""
    settings, training = own_model.parse_flags(
        arguments, Settings, GRPOConfig, TRAINING, beta=0.1, bf16=False,
        activation_checkpointing=False)
    with reading("flags"):
        args = GRPOConfig(**vars(training), scale_rewards="none", logging_nan_inf_filter=False)
        samples = args.per_device_train_batch_size * args.gradient_accumulation_steps
        if not 0 < args.beta < math.inf or samples % args.num_generations:
            raise ValueError("must be: --beta > 0, and --per_device_train_batch_size x "
                             "--gradient_accumulation_steps a multiple of --num_generations")
    with reading(f"--judge {settings.judge}"):
        sys.path.append(os.getcwd())
        module, _, function = settings.judge.partition(":")
        judge = getattr(importlib.import_module(module), function)
    with reading(f"--model {settings.model}"):
        tokenizer, config = own_model.load_tokenizer(settings.model)
    room = getattr(config, "max_position_embeddings", math.inf) - args.max_completion_length
    with reading(f"--prompts {settings.prompts}"):
        prompts = own_model.read_lines(settings.prompts, prompt_of, tokenizer, config.vocab_size,
                                       room)
        if len({type(row["prompt"]) for row in prompts}) > 1:
            raise ValueError("strings and messages are mixed")
        if len(prompts) < args.generation_batch_size // args.num_generations:
            raise ValueError(f"a step takes {args.generation_batch_size // args.num_generations} "
                             f"prompts, and there are {len(prompts)}")
    with reading(f"--model {settings.model}"):
        model = own_model.load_model(settings, config, args.seed)
    with reading("flags"):
        trainer = UNATrainer(model, reward_function(judge, settings.judge), args,
                             Dataset.from_list(prompts), processing_class=tokenizer)
    trainer.train()
    own_model.save(trainer, settings.lora)


if __name__ == "__main__":
    main()

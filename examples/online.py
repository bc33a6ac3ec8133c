"""Online UNA on a model of your own: TRL's GRPOTrainer, with Eq. 7 for its loss.

    python examples/online.py --model FOLDER --prompts prompts.jsonl --judge module:function \\
        --beta 0.1 --num_generations 8 --output_dir out

Needs requirements-trl.txt. A line of the prompts is {"prompt": ...}, a string or messages for the
chat template. judge(prompts, completions) is given two lists, completions as strings, and returns
as many rewards, in the unit of beta. Flags are the fields of Settings, below, and those of TRL's
GRPOConfig. At first rho = log pi/pi_ref must be 0, or the run ends.
"""
import math
import os
import pkgutil
import sys
from dataclasses import dataclass

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")          # or TRL would report each run

import own_model
import torch
from datasets import Dataset
from own_model import reading, una
from trl import GRPOConfig, GRPOTrainer

# Other values would not be Eq. 7 on fresh samples of the policy. TRL's advantages are rewards less
# the mean of their prompt's, which f(x) + c takes up; it would not take up a division.
ALWAYS = dict(scale_rewards="none", multi_objective_aggregation="sum_then_normalize", top_k=0,
              num_iterations=1, temperature=1, top_p=1, min_p=None, repetition_penalty=1,
              generation_kwargs=None, mask_truncated_completions=False, sync_ref_model=False,
              use_liger_kernel=False, neftune_noise_alpha=None)


@dataclass(kw_only=True)
class Settings(GRPOConfig):
    model: str                                          # a folder or a name, for from_pretrained
    prompts: str                                        # JSONL
    judge: str                                          # module:function
    lora: int = 0                                       # rank; 0 trains all weights
    beta: float = 0.1                                   # the price of a nat of KL
    scale_rewards: str = "none"
    bf16: bool = False                                  # TRL's defaults: the opposite
    activation_checkpointing: bool = False


class UNATrainer(GRPOTrainer):
    """Eq. 7 with the mean residual of a prompt's samples for f(x) + c."""

    def implicit_reward(self, model, batch, offset=0.0):
        """Eq. 6 of whole responses, (B,), in units of reward."""
        mask = batch["completion_mask"]
        logprobs, *_ = self._get_per_token_logps_and_entropies(model, *(
            torch.cat([batch["prompt_" + of], batch["completion_" + of]], 1)
            for of in ("ids", "mask")), mask.shape[1], self.args.per_device_train_batch_size)
        logprob, ref = (logprobs * mask).sum(1), (batch["ref_per_token_logps"] * mask).sum(1)
        return una.implicit_reward(logprob, ref, self.beta, offset)

    def _generate_and_score_completions(self, inputs):
        """TRL's samples, and f(x) + c. Here those of a prompt are consecutive rows. Afterwards TRL
        shuffles them and cuts them into micro-batches, of one step: the policy stays what it is."""
        batch = super()._generate_and_score_completions(inputs)
        with torch.no_grad():
            reward = self.implicit_reward(self.model, batch)
        if self.state.global_step == 0:
            own_model.check_start(reward / self.beta)
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
    """The judge as TRL calls it. TRL would go on where a reward is NaN."""
    def rewards(prompts, completions, **_):
        texts = [y if isinstance(y, str) else y[0]["content"] for y in completions]
        with reading(f"--judge {name}"):
            given = [*map(float, judge(prompts, texts))]
            if len(given) != len(prompts) or not all(map(math.isfinite, given)):
                raise ValueError(f"for {len(prompts)} completions, no finite number each: {given}")
        return given
    return rewards


def prompt_of(row, tokenizer):
    """What a line becomes. Where TRL could not read it, the line is named here."""
    own_model.encode(row["prompt"], tokenizer, answered=False)
    return dict(prompt=row["prompt"])


def main(arguments=None):
    """Reads, trains, saves. Bad input is one line and status 2."""
    args = own_model.parse_flags(arguments, Settings)
    always = ALWAYS | dict(steps_per_generation=args.gradient_accumulation_steps)
    for name in always:
        if getattr(args, name) != always[name]:
            own_model.stop(f"--{name}: for Eq. 7 it must be {always[name]}")
    with reading(f"--judge {args.judge}"):
        sys.path.append(os.getcwd())
        judge = reward_function(pkgutil.resolve_name(args.judge), args.judge)
    with reading(f"--model {args.model}"):
        tokenizer, model = own_model.load(args)
    with reading(f"--prompts {args.prompts}"):
        rows = own_model.read_lines(args.prompts, prompt_of, tokenizer)
        if len(rows) < (of_a_step := args.generation_batch_size // args.num_generations):
            raise ValueError(f"a step takes {of_a_step} prompts, and there are {len(rows)}")
    trainer = UNATrainer(model, judge, args, Dataset.from_list(rows), processing_class=tokenizer)
    with reading("training", status=1):
        trainer.train()
    own_model.save(trainer)


if __name__ == "__main__":
    main()

"""Hugging Face without a backward pass: all weights by the `Trainer`, then a LoRA adapter by `CDRGE` under accelerate.

pip install transformers accelerate peft
python examples/hugging_face.py --steps 100
"""

import argparse
import tempfile

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from reroll import CDRGE, CentralDifference, Key

ROWS = [{"input_ids": row, "labels": row} for row in (torch.arange(12) * k % 16 for k in (1, 3, 5, 7) * 2)]


class ForwardTrainer(Trainer):
    """A Trainer whose gradients come from forward passes; schedule, clipping, logging and saving stay the Trainer's."""

    estimator = CentralDifference(probes=24, epsilon=1e-2)

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss_fn = lambda model, batch: self.compute_loss(model, batch)
        key = Key(self.args.seed).at(self.state.global_step)
        estimate = self.estimator(model, loss_fn, self._prepare_inputs(inputs), key)
        for name, p in estimate.gradient.parameters.items():
            p.grad = estimate.gradient.tensor(name).to(p.dtype)
        return estimate.loss.float()


def main(steps: int) -> dict[str, float]:
    torch.manual_seed(0)
    sizes = dict(vocab_size=16, n_positions=12, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, use_cache=False))
    with tempfile.TemporaryDirectory() as folder:
        options = dict(report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True)
        args = TrainingArguments(folder, max_steps=steps, per_device_train_batch_size=8, learning_rate=0.02, **options)
        full = ForwardTrainer(model, args, train_dataset=ROWS).train().training_loss

    accelerator = Accelerator(cpu=True)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    # The optimizer is not prepared: accelerate's returns no loss. The mean loss gives all processes the same step.
    adapted, loader = accelerator.prepare(adapted, torch.utils.data.DataLoader(ROWS, batch_size=8))
    optimizer, losses = CDRGE(adapted.named_parameters(), lr=0.05, probes=24, momentum=0.9), []
    for batch in [batch for _ in range(steps) for batch in loader]:
        closure = lambda batch=batch: accelerator.reduce(adapted(**batch).loss, "mean")
        losses.append(optimizer.step(closure).item())
    print(f"Trainer: mean loss {full:.3f}; LoRA: {losses[0]:.3f} before, {losses[-1]:.3f} after")
    return {"trainer": full, "before": losses[0], "after": losses[-1]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    result = main(parser.parse_args().steps)

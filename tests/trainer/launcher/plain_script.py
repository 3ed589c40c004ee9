"""A training script that knows nothing of this project; the tests of the launcher run it unchanged.

transformers is imported in `main`, so that a spawned dataloader worker starts quickly.
"""

import os
import sys

import torch


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        tokens = torch.arange(index, index + 8) % 32
        return {"input_ids": tokens, "labels": tokens}


def main():
    from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    if args.dataloader_num_workers:
        torch.multiprocessing.set_start_method("spawn", force=True)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    trainer = Trainer(LlamaForCausalLM(config), args, train_dataset=Rows())
    trainer.train()
    trainer.save_state()
    layers = {type(m).__name__ for m in trainer.model.modules() if isinstance(m, torch.nn.Linear)}
    report = {
        "argv0": os.path.basename(sys.argv[0]),
        "path0": os.path.basename(sys.path[0]),
        "optimizer": type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__,
        "parameters": type(next(trainer.model.parameters())).__name__,
        "layers": " ".join(sorted(layers)),
    }
    # In one piece: several processes write to the same place.
    sys.stdout.write("".join(f"{name} {value}\n" for name, value in report.items()))


if __name__ == "__main__":
    main()

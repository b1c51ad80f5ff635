"""An ordinary Hugging Face Trainer on a toy model, three steps. Run as a program; it knows nothing of us."""

import sys

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(8) + index) % 32
        return {"input_ids": ids, "labels": ids}


def main() -> None:
    shape = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    arguments = TrainingArguments(
        sys.argv[1], max_steps=3, per_device_train_batch_size=2, logging_steps=1, save_strategy="no", use_cpu=True
    )
    Trainer(LlamaForCausalLM(shape), arguments, train_dataset=Rows()).train()


if __name__ == "__main__":
    main()

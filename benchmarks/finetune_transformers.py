"""The peer: Hugging Face's Trainer with its defaults, on the same net and images.

Source: examples/pytorch/image-classification/run_image_classification.py of transformers: its
transforms, and the defaults of TrainingArguments (AdamW 5e-5, linear decay, batch 8, 3 epochs), the
best epoch loaded at the end. The net is timm's, as transformers' TimmWrapper has it.
"""

import sys
import tempfile
import time

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from transformers import Trainer, TrainingArguments

from benchmarks.finetune_data import Images, pretrained, report, splits

NORMALIZE = transforms.Normalize([0.5] * 3, [0.5] * 3)
TRAIN = transforms.Compose([
    transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
    NORMALIZE,
])  # fmt: skip
VAL = transforms.Compose(
    [transforms.Resize(224), transforms.CenterCrop(224), transforms.ToTensor(), NORMALIZE]
)


class Classifier(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixel_values, labels=None):
        logits = self.net(pixel_values)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def collate(examples):
    return {
        "pixel_values": torch.stack([image for image, _ in examples]),
        "labels": torch.tensor([label for _, label in examples]),
    }


def main(root: str, weights: str, seed: int, epochs: int) -> None:
    samples, classes = splits(root)
    model = Classifier(pretrained(weights, len(classes)))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=epochs, seed=seed, eval_strategy="epoch",
            save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="accuracy",
            report_to="none", disable_tqdm=True, dataloader_num_workers=2, use_cpu=True,
            save_total_limit=1, remove_unused_columns=False,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, data_collator=collate,
            train_dataset=Images(samples["train"], TRAIN), eval_dataset=Images(samples["val"], VAL),
            compute_metrics=lambda p: {
                "accuracy": float((np.argmax(p.predictions, 1) == p.label_ids).mean())
            },
        )  # fmt: skip
        began_s = time.perf_counter()
        trainer.train()
        test = DataLoader(Images(samples["test"], VAL), batch_size=64, num_workers=2)
        report(began_s, model.net, test, len(classes))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))

"""The peer: the tutorial's DataModule and LitModel as it writes them, run by Lightning alone.

Source: "Image Classification using PyTorch Lightning" (the W&B tutorial: CIFAR10DataModule,
LitModel, EarlyStopping, ModelCheckpoint). Two things differ, since the pixels must be those of the
other arms: images come from class folders through torchvision's ImageFolder instead of the
python archive, and without its image logger and W&B (both only add time). A line is printed after
the first step.
"""

import json
import sys
import time

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, random_split
from torchvision import transforms
from torchvision.datasets import ImageFolder


class CIFAR10DataModule(pl.LightningDataModule):
    def __init__(self, batch_size: int, data_dir: str) -> None:
        super().__init__()
        self.batch_size, self.data_dir = batch_size, data_dir
        self.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))]
        )

    def setup(self, stage=None) -> None:
        if stage == "fit" or stage is None:
            full = ImageFolder(f"{self.data_dir}/train", transform=self.transform)
            held_out = len(full) // 10
            self.train, self.val = random_split(full, [len(full) - held_out, held_out])
        if stage == "test" or stage is None:
            self.test = ImageFolder(f"{self.data_dir}/test", transform=self.transform)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=self.batch_size)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=self.batch_size)


class LitModel(pl.LightningModule):
    def __init__(self, input_shape, num_classes: int, learning_rate: float = 2e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.conv1 = nn.Conv2d(3, 32, 3, 1)
        self.conv2 = nn.Conv2d(32, 32, 3, 1)
        self.conv3 = nn.Conv2d(32, 64, 3, 1)
        self.conv4 = nn.Conv2d(64, 64, 3, 1)
        self.pool1 = nn.MaxPool2d(2)
        self.pool2 = nn.MaxPool2d(2)
        n_sizes = self._features(torch.rand(1, *input_shape)).numel()
        self.fc1 = nn.Linear(n_sizes, 512)
        self.fc2 = nn.Linear(512, 128)
        self.fc3 = nn.Linear(128, num_classes)
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=num_classes)

    def _features(self, x):
        x = F.relu(self.conv1(x))
        x = self.pool1(F.relu(self.conv2(x)))
        x = F.relu(self.conv3(x))
        return self.pool2(F.relu(self.conv4(x)))

    def forward(self, x):
        x = self._features(x).flatten(1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return F.log_softmax(self.fc3(x), dim=1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = F.nll_loss(logits, y)
        self.log("train_loss", loss, on_step=True, on_epoch=True, logger=True)
        self.log("train_acc", self.accuracy(logits.argmax(1), y), on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx) -> None:
        x, y = batch
        logits = self(x)
        self.log("val_loss", F.nll_loss(logits, y), prog_bar=True)
        self.log("val_acc", self.accuracy(logits.argmax(1), y), prog_bar=True)

    def test_step(self, batch, batch_idx) -> None:
        x, y = batch
        self.log("test_acc", self.accuracy(self(x).argmax(1), y), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


def main(data_dir: str, seed: int, epochs: int, out: str) -> None:
    pl.seed_everything(seed)
    data = CIFAR10DataModule(32, data_dir)
    model = LitModel((3, 32, 32), 10)

    def show_first(trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == 1:
            print("first step", flush=True)

    first_step = LambdaCallback(on_train_batch_end=show_first)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="auto",
        devices=1,
        default_root_dir=out,
        logger=pl.loggers.CSVLogger(out),
        callbacks=[EarlyStopping(monitor="val_loss"), ModelCheckpoint(dirpath=out), first_step],
        enable_progress_bar=False,
    )
    began_s = time.perf_counter()
    trainer.fit(model, data)
    fit_s = time.perf_counter() - began_s
    accuracy = trainer.test(datamodule=data, verbose=False, ckpt_path="best", weights_only=False)
    images = trainer.global_step * 32
    numbers = {"fit_s": fit_s, "images": images, "test/acc": accuracy[0]["test_acc"]}
    print(json.dumps(numbers))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])

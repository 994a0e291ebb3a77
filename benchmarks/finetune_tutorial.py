"""The peer: PyTorch's transfer-learning tutorial as it writes it, on the same net and images.

Source: "Transfer Learning for Computer Vision Tutorial" (S. Chilamkurthy, pytorch.org): fine-tune
all, or with the backbone frozen. Its ResNet-18 is replaced by the net of the other arms; images
come from the list of the other arms instead of ImageFolder.
"""

import sys
import time
from copy import deepcopy

import torch
from torch import nn, optim
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader
from torchvision import transforms

from benchmarks.finetune_data import Images, pretrained, report, splits

TRANSFORMS = {
    "train": transforms.Compose([
        transforms.RandomResizedCrop(224),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]),
    "val": transforms.Compose([
        transforms.Resize(256),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]),
}  # fmt: skip


def train_model(model, loaders, criterion, optimizer, scheduler, num_epochs):
    best, best_acc = deepcopy(model.state_dict()), 0.0
    for _ in range(num_epochs):
        for phase in ["train", "val"]:
            model.train(phase == "train")
            running_loss = running_corrects = 0.0
            for inputs, labels in loaders[phase]:
                optimizer.zero_grad()
                with torch.set_grad_enabled(phase == "train"):
                    outputs = model(inputs)
                    _, preds = torch.max(outputs, 1)
                    loss = criterion(outputs, labels)
                    if phase == "train":
                        loss.backward()
                        optimizer.step()
                running_loss += loss.item() * inputs.size(0)
                running_corrects += torch.sum(preds == labels.data)
            if phase == "train":
                scheduler.step()
            acc = float(running_corrects) / len(loaders[phase].dataset)
            if phase == "val" and acc > best_acc:
                best_acc, best = acc, deepcopy(model.state_dict())
    model.load_state_dict(best)
    return model


def main(root: str, weights: str, seed: int, epochs: int, frozen: bool) -> None:
    torch.manual_seed(seed)
    samples, classes = splits(root)
    loaders = {
        phase: DataLoader(
            Images(samples[phase], TRANSFORMS[phase]), batch_size=4, shuffle=True, num_workers=4
        )
        for phase in ("train", "val")
    }
    model = pretrained(weights, len(classes))
    if frozen:
        for parameter in model.parameters():
            parameter.requires_grad = False
        for parameter in model.get_classifier().parameters():
            parameter.requires_grad = True
    trained = model.get_classifier().parameters() if frozen else model.parameters()
    optimizer = optim.SGD(trained, lr=0.001, momentum=0.9)
    scheduler = lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
    began_s = time.perf_counter()
    model = train_model(model, loaders, nn.CrossEntropyLoss(), optimizer, scheduler, epochs)
    test = DataLoader(Images(samples["test"], TRANSFORMS["val"]), batch_size=64, num_workers=2)
    report(began_s, model, test, len(classes))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "frozen")

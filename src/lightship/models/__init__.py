"""Nets, their optimizers, and the LightningModule that trains them."""

"""Whether a fit accepts the configuration, on these processes."""

from dataclasses import replace

from lightship.data.order import Shuffle
from lightship.data.shares import TrainShare
from lightship.data.train_batches import check_batches
from lightship.doctor.checks import Finding
from lightship.doctor.context import Context
from lightship.doctor.rendezvous import count_ranks
from lightship.training.trainer import build_trainer


def configuration(context: Context) -> Finding:
    """What a fit checks later than its command line: its batches, and what Lightning accepts.

    Raises:
        ConfigError: It refuses the configuration.
    """
    config, ranks = context.config, count_ranks(context)
    data, size = config.data, config.data.global_batch_size
    parts = config.trainer.accumulate_grad_batches
    share = TrainShare(Shuffle(size, size, config.run.seed), 0, ranks, parts)
    check_batches(data, share, data.image_size_px)
    if not context.is_worker:
        build_trainer(replace(config, trainer=replace(config.trainer, devices="1")), [])
    batches = f"batches of {size} on {ranks} process{'es' * (ranks > 1)}"
    return Finding("ok", f"{config.model.net}, {batches}", "fit accepts it")

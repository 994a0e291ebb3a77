"""Runs a parsed command, in as many processes as it needs."""

import logging
import sys
from collections.abc import Sequence
from functools import partial

from lightship import choices, storage
from lightship.commands.base import Command, PackCommand
from lightship.distributed import launcher, libraries

logger = logging.getLogger(__name__)
_RESUMES_FROM = {"fit": "the newest checkpoint", "predict": "the parts that are written"}
"""Command -> where it resumes after a crash; the others start from scratch."""


def run(command: Command | PackCommand, arguments: Sequence[str]) -> None:
    """Run a command. Blocks until it is done.

    Args:
        command: The parsed command.
        arguments: Its command line, for the worker processes.

    Raises:
        LightshipError: With the exit code of the contract.
    """
    if isinstance(command, PackCommand):
        from lightship.commands.pack import pack

        pack(command)
    elif command.only_prints_config:
        from lightship.commands.print_config import print_config

        print_config(command)
    elif command.name == "doctor":
        from lightship.commands.doctor import doctor

        doctor(command, is_worker=launcher.is_worker())
    elif command.name == "export":  # one process is enough, however many trained
        from lightship.commands.export import export

        export(command)
    elif not (is_worker := launcher.is_worker()) and (completed := _completed(command)):
        logger.info(completed)
    else:
        # Weights may set the size of the images; and torch is imported already in a notebook.
        sets_size, has_torch = command.config.model.weights is not None, "torch" in sys.modules
        trainer, resumes_from = command.config.trainer, _RESUMES_FROM.get(command.name)
        is_only_rank = not is_worker and launcher.works_in_this_process(trainer)
        if command.name == "fit" and is_only_rank and not (sets_size or has_torch):
            from lightship.data import decode_ahead

            decode_ahead.begin(command.config.data)
        work = partial(_run_here, command)
        launcher.launch(work, trainer, arguments, is_worker, resumes_from)


def _run_here(command: Command) -> None:
    """Run a command in this process, alone or as one rank of several."""
    data = command.config.data
    is_read_once = command.name == "predict" and data.mode != "resident"
    if storage.is_remote(data.root):
        storage.make_ready(data.root)  # imports that go on beside ours
    if data.mode == "streaming" or data.crop_min_area or data.sizes_px or is_read_once:
        from lightship.data.streaming.worker_process import Worker

        Worker.start(data.root)
    from lightship.training.callbacks import heartbeat  # imports torch: the agent does without

    heartbeat.begin_again()
    try:
        _train_or_evaluate(command)
    except (RuntimeError, MemoryError) as error:
        from lightship.training.out_of_memory import as_config_error  # as above

        if explained := as_config_error(error, command.config):
            raise explained from None
        raise


def _train_or_evaluate(command: Command) -> None:
    if command.name == "fit":
        from lightship.commands.fit import fit as work
    elif command.name == "predict":
        from lightship.commands.predict import predict as work
    else:
        from lightship.commands import evaluate

        work = getattr(evaluate, command.name)
    libraries.end_imports()
    logger.debug("imports have ended")
    work(command)


def _completed(command: Command) -> str | None:
    """`RunFolder.completed`, before ranks are started: a late node must not wait for others."""
    output = command.config.run.output
    if command.name != "fit" or not storage.exists(storage.join(str(output), "DONE")):
        return None
    from lightship.run.folder import RunFolder  # imports torch: the agent does without

    folder = RunFolder(command.config)
    chosen = folder.earlier_choices(command.choices.names)
    choices.assign_earlier(command.config, chosen, folder.url)
    return folder.completed()

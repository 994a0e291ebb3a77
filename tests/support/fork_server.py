"""A process with the imports done and nothing used, whose forks start in no time."""

import multiprocessing

FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(
    [
        "lightship.commands.doctor",
        "lightship.commands.evaluate",
        "lightship.commands.export",
        "lightship.commands.fit",
        "lightship.commands.pack",
        "lightship.commands.predict",
        "lightship.distributed.launcher",
        "tests.support.own_nets",
        "tests.support.first_steps",
    ]
)

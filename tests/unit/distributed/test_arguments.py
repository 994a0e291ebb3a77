"""A child's command line is redacted, and the child has what was meant."""

import os

from lightship import redaction
from lightship.distributed.arguments import hide, restore


def test_arguments_with_secrets_travel_beside_the_command_line(monkeypatch) -> None:
    monkeypatch.setattr(redaction, "_learned", {})
    monkeypatch.setattr(os, "environ", dict(os.environ))
    given = ["fit", "--data.root", "https://u:hunter22@h/x?sig=hunter23", "--run.seed=1"]
    shown = hide(given)
    assert shown == ["fit", "--data.root", "https://***@h/x?***", "--run.seed=1"]
    assert restore(shown) == given
    assert restore(shown) == shown, "once: a child of the child gets its own"


def test_arguments_without_secrets_stay_on_the_command_line(monkeypatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    before = dict(os.environ)
    given = ["fit", "--data.root", "s3://bucket/a b", "--model.net=a:b"]
    assert hide(given) == given
    assert os.environ == before
    assert restore(given) == given

"""`python -m lightship` is `lightship`."""

import sys

if not sys.flags.safe_path:
    # `python -m` puts the working directory first: its random.py or torch.py would be imported.
    del sys.path[0]

from lightship.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

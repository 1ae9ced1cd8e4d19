"""One script's `main` in a process of its own, for run_study.py; ends when that ends.

python stage_process.py SCRIPT [ARGUMENT ...]
"""

from __future__ import annotations

import importlib
import os
import sys
from threading import Thread


def end_with_parent() -> None:
    """End at once when standard input does: a killed study leaves nobody behind who writes."""
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    Thread(target=end_with_parent, daemon=True).start()
    script, *arguments = sys.argv[1:]
    sys.argv = [f"{script}.py", *arguments]
    sys.exit(importlib.import_module(script).main(arguments))

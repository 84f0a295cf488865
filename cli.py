"""The `quamba` command from a checkout, without installing the package: `python cli.py --help`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

if __name__ == "__main__":
    from quamba.cli import main

    main()

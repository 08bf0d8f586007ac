"""Entry point: `python run.py engine=graddotprod model=gpt2`; `python run.py --help` lists everything."""

import sys

from runners.cli import main

if __name__ == "__main__":
    sys.exit(main())

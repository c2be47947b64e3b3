"""`python -m experiments NAME [options] [overrides]`; see `gptjax/cli/run.py`."""

import sys

from gptjax.cli.run import main

if __name__ == "__main__":
    sys.exit(main(program=f"python -m {__spec__.parent}"))

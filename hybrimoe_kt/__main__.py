"""`python -m hybrimoe_kt` is the `ktransformers` command."""

import sys

from hybrimoe_kt.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

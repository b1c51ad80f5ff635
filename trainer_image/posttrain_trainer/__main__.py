"""`python -m posttrain_trainer`: the launcher, process 1 of a trainer pod."""

import sys

from posttrain_trainer.launcher import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m pipeline` is `raylign`, from whichever folder."""

import sys
from pathlib import Path

# Python looks in the current folder first, and packages called `actors` or `cluster` there are the user's.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
try:
    from pipeline.cli import main
finally:
    del sys.path[0]

if __name__ == "__main__":
    sys.exit(main())

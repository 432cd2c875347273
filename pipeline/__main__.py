"""`python -m pipeline`, the same as `raylign`."""

from pipeline.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

"""`python -m moesaic`, as `torchrun -m moesaic` needs it."""

from __future__ import annotations

from moesaic.cli import main

if __name__ == "__main__":
    main()

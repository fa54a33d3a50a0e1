"""`python -m trine` is `trine`; torchrun -m trine starts it in several processes."""

from trine.cli import main

if __name__ == "__main__":
    main()

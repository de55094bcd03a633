"""`python -m upcycle`."""

from upcycle.cli import main

if __name__ == "__main__":
    main()

"""The command, and `python -m upcycle`: small, so that Ctrl-C while the rest is imported is one line too."""

from upcycle.distributed.launch import adopt_slurm
from upcycle.stopping import stop_on_signals


def main() -> None:
    """See `cli.main`."""
    stop_on_signals()
    adopt_slurm()
    from upcycle import cli

    cli.main()


if __name__ == "__main__":
    main()

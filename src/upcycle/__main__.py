"""The command, and `python -m upcycle`: small, so that Ctrl-C while the rest is imported is one line too."""

import sys


def main() -> None:
    """See `cli.main`."""
    try:
        from upcycle import cli

        cli.main()
    except KeyboardInterrupt:
        print("stopped; nothing had begun", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()

"""Entry point of ``python -m resnet_bk`` and of the command ``resnet-bk``."""

import sys

from resnet_bk.extras import MissingExtraError


def main() -> int:
    """Run the command line and return its exit code: 2 if a package that it needs is not installed."""
    try:
        from resnet_bk import cli
    except MissingExtraError as error:
        print(f"resnet-bk: error: {error}", file=sys.stderr)
        return 2
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `lora-bench VERB`. Exit codes: 0 fine, 1 a check failed, 2 usage, 6 inconclusive, 7 device lost."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from lora_bench import __version__
from lora_bench.commands import ab, calibrate, conform, doctor, estimate, fit, promote, report, selftest
from lora_bench.commands.arguments import FAILED, INTERRUPTED, USAGE

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return its exit code."""
    parser = argparse.ArgumentParser(
        "lora-bench",
        description="Is an implementation of LoRA (Low-Rank Adaptation) right?",
        epilog="What it costs is measured by pytest: `pytest suites/gpu --benchmark`. "
        "Exit codes: 0 fine, 1 a check failed, 2 usage, 6 inconclusive or nothing was judged, 7 the device was lost.",
    )
    parser.add_argument("--version", action="version", version=f"lora-bench {__version__}")
    verbs = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB", required=True)
    for command in (conform, selftest, ab, calibrate, promote, estimate, fit, doctor, report):
        command.declare(verbs)
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
    except ValueError as error:
        print(f"lora-bench {options.verb}: {error}", file=sys.stderr)
        return USAGE
    except OSError as error:  # a full disk, a pipe that nobody reads any more
        print(f"lora-bench {options.verb}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"lora-bench {options.verb}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return code


if __name__ == "__main__":
    sys.exit(main())

"""Build the data sets out of services that translate and chat (README, "Building the two data sets").

    python -m minixllm.building instructions --data alpaca.json --output data/instructions --translator google nllb:DIR
    python -m minixllm.building feedback --data data/instructions --output data/feedback

Both go on where they stopped when the same command is given again. With --dry-run they ask nothing, and tell how much
they would ask.
"""

import signal
import sqlite3
import sys

from minixllm.building import feedback, instructions, services
from minixllm.errors import UserError
from minixllm.settings import parse, run

BUILDS = {"instructions": (instructions.InstructionSettings, instructions.build_instructions),
          "feedback": (feedback.FeedbackSettings, feedback.build_pairs)}


def main(argv):
    command, *argv = argv or ["--help"]
    if command in ("-h", "--help"):
        print(f"{__doc__}\nThe settings of each: python -m minixllm.building {' --help, or '.join(BUILDS)} --help")
        return
    if command not in BUILDS:
        raise UserError(f"found {command!r}, expected one of {' or '.join(BUILDS)}")
    settings, build = BUILDS[command]
    words = services.__doc__.split("\n\n")[1]
    settings = parse(settings, argv, prog=f"python -m minixllm.building {command}",
                     description=f"{__doc__}\nServices are named so:\n\n{words}")
    try:
        finished = build(settings)
    except sqlite3.Error as error:  # a full disk above all
        raise UserError(f"{settings.output}: {error}") from None
    if not finished:
        sys.exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends a build as Ctrl-C does
    sys.argv[0] = "minixllm.building"
    run(main)

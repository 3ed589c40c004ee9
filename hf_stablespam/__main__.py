"""`python -m hf_stablespam SCRIPT …`, its subcommands, and the console command `hf-stablespam`."""

import importlib
import sys

# Subcommand → the module whose `main(arguments)` it is. A script of that name needs `run` before it.
COMMANDS = {
    "run": "hf_stablespam.trainer.launcher.launch",
    "report": "hf_stablespam.monitor.report.build",
    "export": "hf_stablespam.trainer.export_command",
    "repack": "hf_stablespam.trainer.repack_command",
    "fuse": "hf_stablespam.recipes.fusechat.command",
}


def main() -> int:
    """Run the subcommand that the first argument names, `run` where it names none; returns the exit status."""
    arguments = sys.argv[1:]
    name = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "run"
    command = importlib.import_module(COMMANDS[name]).main
    if name == "run":
        return command(arguments)  # whatever the script raises is the script's
    try:
        return command(arguments) or 0
    except (OSError, ValueError, ImportError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())

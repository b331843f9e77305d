"""The `lragent` command. Its modules import what they need when a command runs, so that `--help` is quick."""


def main() -> None:
    """Runs the command line: exit code 0, 1 for an error of ours (one message on standard error), 2 for wrong usage."""
    from lragent_jax.cli.app import app

    app()

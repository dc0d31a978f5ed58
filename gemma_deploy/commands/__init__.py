"""One file per command of the program; each has a `command` and is listed in `gemma_deploy.cli.COMMANDS`."""

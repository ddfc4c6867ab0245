"""The command line's commands, a file each. They import what they need when they run: `handful --help` loads no torch."""

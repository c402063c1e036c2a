"""The command line: one file a command; options are shared, and only console.py renders."""

"""The commands of the command line, one file a panel, with their help, messages and results as text."""

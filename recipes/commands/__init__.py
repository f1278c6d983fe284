"""The commands of the command line, one file a panel, with their help, messages and what results look like in a
terminal."""

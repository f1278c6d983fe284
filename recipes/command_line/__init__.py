"""What the command line needs beside a recipe: help, lists, messages and what results look like."""

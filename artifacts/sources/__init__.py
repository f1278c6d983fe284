"""Rows of data that people have: files, folders and data sets on the Hub."""

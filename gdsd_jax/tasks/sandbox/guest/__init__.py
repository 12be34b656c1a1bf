"""Holds the modules that run inside a sandbox. They get there as text and import the standard library only."""

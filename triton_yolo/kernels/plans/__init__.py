"""Sizes, workspaces and launches of the criteria and assigners."""

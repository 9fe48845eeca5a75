"""Proofs that need no GPU: ``python -m tests.tools --help``, from the root of the repository."""

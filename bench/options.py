"""Numbers that command lines take."""

import argparse


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, got {text}")
    return int(text)


def image_side(text: str) -> int:
    """Pixels that the coarsest level divides."""
    if positive(text) % 32:
        raise argparse.ArgumentTypeError(f"must be divisible by 32, got {text}")
    return int(text)

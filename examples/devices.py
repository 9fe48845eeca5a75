"""Devices that command lines take."""

import argparse

import torch


def available(name: str) -> str:
    """The name of a device that this machine has. No context is made on it: that is for the process that uses it."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"must be a device as cpu, cuda or cuda:1, got {name}") from None
    here = torch.accelerator.current_accelerator(check_available=True)
    number = torch.accelerator.device_count() if here is not None and here.type == device.type else 0
    if device.type != "cpu" and (device.index or 0) >= number:
        raise argparse.ArgumentTypeError(f"must be a device that is here, got {name}")
    return name

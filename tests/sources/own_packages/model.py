"""Imports a module beside it, and a package of the name `models`, as most training repositories have."""

import os
import sys

import helper
import torch

from models import Net

print("hello from the user's file")


def model():
    return Net(helper.WIDTH)


def example_inputs():
    assert [os.path.realpath(a) for a in sys.argv] == [os.path.realpath(__file__)]
    return torch.randn(1, 3, 8, 8)


def calibration_data():
    yield example_inputs()

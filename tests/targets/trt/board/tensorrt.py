"""``tensorrt`` as a board has it: the double, instead of the bindings."""

import os
import sys

import tensorrt_double

double = tensorrt_double.make(os.environ.get("TENSORRT", "10.3.0"), tensorrt_double.Knobs(dla_cores=2))
double.__spec__ = __spec__
sys.modules[__name__] = double

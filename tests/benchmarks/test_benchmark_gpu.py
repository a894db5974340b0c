from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def script():
    spec = importlib.util.spec_from_file_location("benchmark_gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_without_a_gpu(tmp_path):
    output = tmp_path / "gpu.json"
    command = [sys.executable, str(SCRIPT), "shvit_s1", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 4
    assert "finds no GPU" in done.stderr
    assert not output.exists() and not done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_row_is_whole(precision):
    """Everything but the GPU runs on the CPU; its figures mean nothing."""
    gpu = script()
    row = gpu.run_one("shvit_s1", precision, 0.2, providers="cpu")
    assert row["parity_ok"]
    assert set(row["p50_ms"]) == {"ort", "eager", "channels_last"}
    assert row["engines"]["ort"]["cuda_event_ms"] is None
    table = gpu.markdown([row]).splitlines()
    assert len(table) == 3 and table[-1].startswith(f"| shvit_s1 | {precision} | ort |")
    assert len({line.count("|") for line in table}) == 1


@pytest.mark.gpu
def test_a_row_from_the_gpu():
    gpu = script()
    if why := gpu.missing():
        pytest.skip(why)
    row = gpu.run_one("shvit_s1", "fp16", 1.0)
    assert row["parity_ok"]
    assert 0 < row["engines"]["ort"]["cuda_event_ms"] <= row["p50_ms"]["ort"] * 1.5

"""Coded weights and angular attention against what ONNX Runtime has: one thread, all arms interleaved in one run.

Usage: python benchmarks/shift_add.py [JOB ...] [--seconds 4] [--output FILE]

Jobs: `call` (one token, 16 x 16: what a call costs), `gemv` (one token, 4096 x 11008), `gemm_196` and `gemm_144`
(196 x 384 x 1536 and 144 x 448 x 896), `attention_196` and `attention_1024` (one head of 64, queries, keys and values
given), `block_196` and `block_1024` (the same with the projections before and after, and the shortcut). Each runs in a
process of its own; rows of FILE that are not measured again are kept. Speedups are over the arm `ort float32`: above 1
is faster; the interval in brackets has 95 % confidence. Bytes are those of the model file over those of that arm, SNR
is that of the output against the body of the operator in ONNX Runtime; weights and activations are random. MatMulNBits
has weights of its own of four bits, by blocks of 32 or 128, and its level 4 rounds activations to 8 bits, as `int8`
does here. `ort custom op` is the option `custom_ops=yes` of the target `ort`. In a block, `projections alone` is all
but the attention: no attention can be faster than that while projections are float32. `coded int8` has projections of
four-bit codes and rounded activations.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

JOBS = ("call", "gemv", "gemm_196", "gemm_144", "attention_196", "attention_1024", "block_196", "block_1024")
SIZES = {"call": (1, 16, 16), "gemv": (1, 4096, 11008), "gemm_196": (196, 384, 1536), "gemm_144": (144, 448, 896)}
HEAD, OPSET = 64, 17
BASE = "ort float32"
BODY, KERNEL = {"custom_ops": "no"}, {"custom_ops": "yes"}


def graph_of(nodes: list[Any], weights: dict[str, Any], shapes: dict[str, Any], functions: Sequence[str] = ()) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    from edgecompile.functions import DOMAIN
    from edgecompile.graph import Graph
    from edgecompile.passes.shift_add import ops

    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
    held = [numpy_helper.from_array(v, n) for n, v in weights.items()]
    body = helper.make_graph(nodes, "benchmark", ports[:-1], ports[-1:], held)
    opsets = [("", OPSET), (DOMAIN, ops.VERSION), ("com.microsoft", 1)]
    imports = [helper.make_opsetid(*o) for o in opsets]
    made = [ops.function(name, OPSET) for name in functions]
    return Graph.from_proto(helper.make_model(body, opset_imports=imports, functions=made, ir_version=9))


def product(job: str) -> dict[str, tuple[str, dict[str, str], Any]]:
    """Arms of a product of matrices: target, its options, graph."""
    import numpy as np
    from onnx import helper

    from edgecompile.functions import DOMAIN
    from edgecompile.passes.shift_add import codes

    m, depth, n = SIZES[job]
    rng = np.random.default_rng(0)
    shapes = {"x": [m, depth], "y": [m, n]}

    def coded(kind: str, group: int) -> Any:
        groups = -(-depth // group)
        drawn = rng.integers(0, 16, (n, depth)).astype(np.uint8)
        shape, least = ((4, n, groups, codes.TERMS), -20) if kind == "binary" else ((n, groups), -7)
        one = codes.Coded(kind, 4, drawn, rng.integers(least, least + 2, shape).astype(np.int8), group)
        weights = {"planes": codes.pack(one.codes, 4), "exponents": one.exponents}
        weights |= {} if kind == "binary" else {"levels": codes.book(kind, 4)}
        name = "BinaryCodedLinear" if kind == "binary" else "ShiftLinear"
        node = helper.make_node(name, ["x", *weights], ["y"], domain=DOMAIN, columns=depth, group=group)
        return one, graph_of([node], weights, shapes, [name])

    one, graph = coded("sp2", depth if m > 1 else 256)
    dense = {"w": np.ascontiguousarray(one.decode().T)}
    binary = coded("binary", 256)[1]
    arms = {
        BASE: ("ort", {}, graph_of([helper.make_node("MatMul", ["x", "w"], ["y"])], dense, shapes)),
        "ort body": ("ort", BODY, graph),
        "ort custom op": ("ort", KERNEL, graph),
        "ort custom op int8": ("ort", {**KERNEL, "activations": "int8"}, graph),
        "ort custom op binary": ("ort", KERNEL, binary),
        "tvm": ("tvm", {}, graph),
        "tvm int8": ("tvm", {"activations": "int8"}, graph),
        "tvm binary": ("tvm", {}, binary),
    }
    if job == "call":
        return {name: arm for name, arm in arms.items() if arm[0] == "ort"}
    for block in (32, 128):
        for level in (0, 4):
            weights = {
                "q": rng.integers(0, 256, (n, -(-depth // block), block // 2)).astype(np.uint8),
                "s": np.full(n * -(-depth // block), 0.01, np.float32),
            }
            node = helper.make_node(
                "MatMulNBits", ["x", *weights], ["y"], domain="com.microsoft",
                K=depth, N=n, bits=4, block_size=block, accuracy_level=level,
            )  # fmt: skip
            arms[f"ort MatMulNBits block {block} level {level}"] = ("ort", {}, graph_of([node], weights, shapes))
    return arms


def attention(tokens: int, *, block: bool) -> dict[str, tuple[str, dict[str, str], Any]]:
    """Arms of attention with one head: softmax, and the angular form with binary queries and keys.

    In a block also with projections of four-bit power-of-two codes, which is what ShiftAddViT trains.
    """
    import numpy as np
    from onnx import helper

    from edgecompile.functions import DOMAIN
    from edgecompile.passes.shift_add import codes

    rng = np.random.default_rng(0)
    shape = [1, tokens, HEAD]
    names = ["x"] if block else ["q", "k", "v"]
    held = {"threshold": np.zeros(1, np.float32), "root": np.float32(HEAD**-0.5).reshape(1)}
    drawn = [codes.encode((rng.standard_normal((HEAD, HEAD)) / 8).astype(np.float32), "pot", 4) for _ in "qkvo"]
    for n, one in zip("qkvo", drawn, strict=True):
        held |= {f"w{n}": np.ascontiguousarray(one.decode().T), f"planes{n}": codes.pack(one.codes, 4)}
        held |= {f"exponents{n}": one.exponents, "levels": codes.book("pot", 4)}

    def model(angular: bool, coded: bool = False) -> Any:
        make = helper.make_node

        def projection(x: str, n: str, y: str) -> Any:
            if not coded:
                return make("MatMul", [x, f"w{n}"], [y])
            given = [x, f"planes{n}", f"exponents{n}", "levels"]
            return make("ShiftLinear", given, [y], domain=DOMAIN, columns=HEAD, group=HEAD)

        nodes = [projection("x", n, n) for n in "qkv"] if block else []
        if angular:
            given = ["q", "k", "v", "threshold", "threshold"]
            nodes += [make("BinaryAngularAttention", given, ["a"], domain=DOMAIN, turn=[0, 2, 1])]
        else:
            nodes += [make("Transpose", ["k"], ["t"], perm=[0, 2, 1]), make("MatMul", ["q", "t"], ["s"])]
            nodes += [make("Mul", ["s", "root"], ["r"]), make("Softmax", ["r"], ["p"], axis=-1)]
            nodes += [make("MatMul", ["p", "v"], ["a"])]
        nodes += [projection("a", "o", "z"), make("Add", ["x", "z"], ["y"])] if block else []
        if not block:
            nodes[-1].output[0] = "y"
        read = {name for node in nodes for name in node.input}
        weights = {k: v for k, v in held.items() if k in read}
        functions = [*(["BinaryAngularAttention"] if angular else []), *(["ShiftLinear"] if coded else [])]
        return graph_of(nodes, weights, dict.fromkeys([*names, "y"], shape), functions)

    def projections() -> Any:
        """As many products and the shortcut, without attention."""
        path = ["x", *(f"t{i}" for i in range(3)), "z"]
        nodes = [helper.make_node("MatMul", [a, f"w{n}"], [b]) for a, b, n in zip(path, path[1:], "qkvo", strict=False)]
        nodes.append(helper.make_node("Add", ["x", "z"], ["y"]))
        return graph_of(nodes, {f"w{n}": held[f"w{n}"] for n in "qkvo"}, {"x": shape, "y": shape})

    arms: dict[str, tuple[str, dict[str, str], Any]] = {
        BASE: ("ort", {}, model(False)),
        "ort angular": ("ort", BODY, model(True)),
        "ort custom op angular": ("ort", KERNEL, model(True)),
        "tvm angular": ("tvm", {}, model(True)),
        "tvm softmax": ("tvm", {}, model(False)),
    }
    if block:
        whole = {"activations": "int8"}
        arms["ort projections alone"] = ("ort", {}, projections())
        arms["tvm projections alone"] = ("tvm", {}, projections())
        arms["ort custom op angular, coded int8"] = ("ort", {**KERNEL, **whole}, model(True, coded=True))
        arms["tvm angular, coded int8"] = ("tvm", whole, model(True, coded=True))
    return arms


def run_one(job: str, seconds: float) -> dict[str, Any]:
    os.environ["OMP_NUM_THREADS"] = "1"
    from edgecompile import measure, oracle, qdq
    from edgecompile.targets.ort import OrtTarget
    from edgecompile.targets.tvm import TvmTarget

    kind, _, rest = job.partition("_")
    arms = product(job) if job in SIZES else attention(int(rest), block=kind == "block")
    targets = {"ort": OrtTarget(), "tvm": TvmTarget()}
    feeds = oracle.random_feeds(arms[BASE][2].signature().inputs)
    manifests, sizes, outputs, said = {}, {}, {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for label, (target, options, graph) in arms.items():
            folder = Path(scratch) / label.replace(" ", "_")
            folder.mkdir()
            sizes[label] = sum(f.stat().st_size for f in graph.save(folder / "model.onnx"))
            notes: list[str] = []
            engine = targets[target].build(graph, folder, {"threads": 1, **options}, notes.append)
            outputs[label], said[label] = engine.run(feeds), [n for n in notes if ": " in n]
            manifests[label] = engine.manifest
            engine.close()

        @contextlib.contextmanager
        def open_arms():
            engines = {
                label: targets[target].load(Path(scratch) / label.replace(" ", "_"), manifests[label], graph)
                for label, (target, _, graph) in arms.items()
            }
            yield {label: engine.call(feeds) for label, engine in engines.items()}
            for engine in engines.values():
                engine.close()

        taken = measure.interleave_sessions(open_arms, "thread_cpu", seconds=seconds, threads=1)
    same = {
        "ort custom op": "ort body",
        "ort custom op int8": "ort body",
        "ort custom op angular": "ort angular",
        "tvm": "ort body",
        "tvm int8": "ort body",
        "tvm angular": "ort angular",
        "tvm softmax": BASE,
        "ort custom op angular, coded int8": "ort angular",
        "tvm angular, coded int8": "ort angular",
        "ort body": BASE,
    }
    return {
        "job": job,
        "clock": "thread_cpu",
        "p50_ms": {k: s.p50 * 1e3 for k, s in taken.items()},
        "calls": {k: len(s.seconds) for k, s in taken.items()},
        "time_to_base": {k: measure.ratio(s, taken[BASE]).as_dict() for k, s in taken.items() if k != BASE},
        "bytes": sizes,
        "snr_db": {k: qdq.snr([outputs[of]], [outputs[k]]) for k, of in same.items() if k in outputs},
        "computed_by": {k: v for k, v in said.items() if v},
        "load": list(taken[BASE].load),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| job | arm | ms | speedup | bytes | SNR dB |", "|---|---|---|---|---|---|"]
    for row in rows:
        for arm, ms in row["p50_ms"].items():
            ratio, snr = row["time_to_base"].get(arm), row["snr_db"].get(arm)
            faster = f"{1 / ratio['value']:.2f} [{1 / ratio['high']:.2f}, {1 / ratio['low']:.2f}]" if ratio else ""
            size = row["bytes"][arm] / row["bytes"][BASE]
            lines.append(
                f"| {row['job']} | {arm} | {ms:.3f} | {faster} | {size:.3f} | {'' if snr is None else f'{snr:.0f}'} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", metavar="JOB")
    parser.add_argument("--seconds", type=float, default=4, help="per arm")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(options.one[0], float(options.one[1]))))
        return
    from common import rows

    jobs = [(job, str(options.seconds)) for job in options.jobs or JOBS]
    rows(__file__, jobs, table, options.output, lambda row: row["job"], threads=1)


if __name__ == "__main__":
    main()

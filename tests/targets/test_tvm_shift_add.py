"""Kernels of the target tvm for coded weights and binary attention, against numpy and the bodies of the operators."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgecompile import measure, oracle
from edgecompile.errors import InputError
from edgecompile.graph import Graph
from edgecompile.passes.legalize import Legalize
from edgecompile.passes.shift_add import codes, ops
from edgecompile.pipeline import Context
from edgecompile.targets.tvm import TvmTarget, cuda, options, shift_add
from edgecompile.targets.tvm.schedules import shift_add as kernels
from edgecompile.targets.tvm.schedules.tile import Vectors, padded
from edgecompile.targets.tvm.schedules.views import View

tvm = pytest.importorskip("tvm")
relax = pytest.importorskip("tvm.relax")
RNG = np.random.default_rng(0)
# CPUs that LLVM knows, by the feature that decides.
CPUS = {"avx512_vnni": "znver4", "avx512f": "skylake-avx512", "avx_vnni": "alderlake", "avx2": "haswell"}
INTEGERS = {"activations": "int8"}


def cpu(feature: str) -> str:
    """A CPU of that feature, if this machine can run its code."""
    if feature not in measure.cpu_features():
        pytest.skip(f"this CPU has no {feature}")
    return CPUS[feature]


def compiled(function: Any, target: dict[str, Any]) -> Any:
    return tvm.compile(tvm.IRModule({"main": function}), target=tvm.target.Target({"kind": "llvm", **target}))


def computed(function: Any, mcpu: str, given: Sequence[np.ndarray], *results: tuple[tuple[int, ...], str]) -> list:
    made = [tvm.runtime.tensor(np.full(shape, 99, dtype)) for shape, dtype in results]
    compiled(function, {"mcpu": mcpu})["main"](*map(tvm.runtime.tensor, given), *made)
    return [tensor.numpy() for tensor in made]


def numbers(x: np.ndarray, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """Each row as whole numbers, and their step."""
    top = np.abs(x).max(1, keepdims=True)
    factor = np.where(top > 0, np.float32(largest) / np.where(top > 0, top, 1), 0).astype(np.float32)
    return np.rint(x * factor).astype(np.int8), (top / np.float32(largest)).astype(np.float32)


# -- kernels -----------------------------------------------------------------------------------------------------------


def test_activations_round_half_to_even_and_a_token_of_zeros_stays_zero():
    x = RNG.standard_normal((4, 37)).astype(np.float32)
    x[1] = 0
    x[2] = np.linspace(-127, 127, 37).astype(np.int8) / np.float32(2)  # of 63.5, so that some lie half way
    got = computed(
        kernels.quantised(4, 37, 24, 127, parallel=False), cpu("avx2"), [x],
        ((4, 64), "int8"), ((4, 1), "float32"), ((4, 2), "int32"),
    )  # fmt: skip
    whole, step = numbers(x, 127)
    assert np.array_equal(got[0][:, :37], whole) and not got[0][:, 37:].any()
    assert np.array_equal(got[1], step) and step[1] == 0
    assert np.array_equal(got[2], np.add.reduceat(whole.astype(np.int32), [0, 24], 1))


@pytest.mark.parametrize("feature", ["avx512_vnni", "avx_vnni", "avx2"])
@pytest.mark.parametrize("extreme", [False, True])
def test_a_book_meets_integers_bit_for_bit(feature, extreme):
    mcpu, how, m, n, columns = cpu(feature), kernels.byte_lookup(feature), 2, 70, 45
    assert how is not None
    found = kernels.whole(codes.book("pot", 4))
    assert found is not None and found[0].max() == kernels.LARGEST
    drawn = RNG.integers(0, 16, (n, columns)).astype(np.uint8)
    whole = RNG.integers(-127, 128, (m, 64)).astype(np.int8)
    if extreme:  # what would saturate, were the bound wrong: all of one sign, and all of the other
        drawn[:], drawn[0], whole[:], whole[1] = 7, 15, 127, -127
    whole[:, columns:] = 0
    sums = whole.sum(1, keepdims=True, dtype=np.int32)
    ones = np.ones((n, 1), np.float32)
    blocks = kernels.tiles_of(m, 16)
    constants = [kernels.bytes_of(drawn, how, blocks), kernels.by_lane(ones, how.lanes, blocks)]
    given = [whole, np.ones((m, 1), np.float32), sums, *constants, kernels.byte_table(found[0], how)]
    (y,) = computed(kernels.book_int8(m, n, columns, 48, how, parallel=False), mcpu, given, ((m, n), "float32"))
    expected = whole[:, :columns].astype(np.int64) @ found[0][drawn].astype(np.int64).T
    assert np.array_equal(y, expected)
    assert np.abs(expected).max() == 127 * 64 * columns if extreme else len(np.unique(expected)) > 100


@pytest.mark.parametrize("extreme", [False, True])
def test_narrow_weights_add_in_16_bits_without_overflow(extreme):
    mcpu, m, n, columns = cpu("avx2"), 5, 37, 77
    weight = RNG.integers(-8, 9, (n, columns)).astype(np.int8)
    whole = np.zeros((m, padded(columns, 32)), np.int8)
    whole[:, :columns] = RNG.integers(-63, 64, (m, columns))
    if extreme:
        weight[:], weight[1], whole[:, :columns], whole[0, :columns] = 8, -8, 63, -63
    given = [whole, np.ones((m, 1), np.float32), whole.sum(1, keepdims=True, dtype=np.int32)]
    given += [kernels.narrow_pack(weight), np.ones(padded(n, 32), np.float32)]
    (y,) = computed(kernels.narrow(m, n, columns, parallel=False), mcpu, given, ((m, n), "float32"))
    expected = whole[:, :columns].astype(np.int64) @ weight.astype(np.int64).T
    assert np.array_equal(y, expected)
    assert not extreme or np.abs(expected).max() == 63 * 8 * columns


def test_what_could_overflow_is_refused():
    with pytest.raises(ValueError, match="exceeds 8"):
        kernels.narrow_pack(np.full((2, 2), 9, np.int8))
    assert kernels.whole(codes.book("pot", 8)) is None
    assert kernels.whole(codes.book("sp2", 8)) is None
    found = kernels.whole(codes.book("sp2", 4))
    assert found is not None and np.abs(found[0]).max() == 8
    assert np.array_equal(np.ldexp(found[0].astype(np.float32), found[1]), codes.book("sp2", 4))


@pytest.mark.parametrize("feature", ["avx512f", "avx2"])
def test_signs_of_four_columns_number_their_sum(feature):
    how = kernels.lookup(feature)
    assert how is not None
    plane, x = RNG.integers(0, 2, (16, 4)).astype(np.uint8), RNG.standard_normal(4).astype(np.float32)
    plane[:] = np.arange(16)[:, None] >> np.arange(4) & 1
    number, table = kernels.quads(plane, how)[:, 0], x @ kernels.signs(how)
    found = table[number % how.lanes] * np.where((number & 8 != 0) & (how.lanes == 8), -1, 1)
    np.testing.assert_allclose(found, (2.0 * plane - 1) @ x, rtol=1e-6)


@pytest.mark.parametrize("feature", ["avx512f", "avx2"])
@pytest.mark.parametrize(("tokens", "inner", "outer"), [(7, 16, 32), (50, 64, 64), (7, 16, 80)])
def test_angular_attention_is_its_formula(feature, tokens, inner, outer):
    have = Vectors(16, 32) if feature == "avx512f" else Vectors(8, 16)
    q, k = (RNG.standard_normal((2, tokens, inner)).astype(np.float32) for _ in range(2))
    v = RNG.standard_normal((2, tokens, outer)).astype(np.float32)
    limits = [np.full(1, 0.03, np.float32), np.full(1, -0.02, np.float32)]
    function = kernels.angular((2,), tokens, inner, outer, have, parallel=False)
    given = [q.ravel(), k.ravel(), v.ravel(), *limits]
    (y,) = computed(function, cpu(feature), given, ((2, tokens, outer), "float32"))

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    near = (unit(q) > limits[0]) @ ((unit(k) > limits[1]).astype(np.float64).transpose(0, 2, 1) @ v)
    np.testing.assert_allclose(y, unit(v / 2 + near / np.pi), atol=1e-6)
    assert not kernels.angular_fits(inner + 1, outer, have) and not kernels.angular_fits(inner, outer + 1, have)
    assert not kernels.angular_fits(inner, have.lanes * (have.count // 2 + 1), have)


@pytest.mark.parametrize(("mcpu", "there"), [("cortex-a76", [r"\btbl\b", r"\bsdot\b"]), ("cortex-a72", None)])
def test_arm_boards_look_levels_up_by_bytes(mcpu, there):
    chosen = options.parse({"threads": 1, "mtriple": "aarch64-linux-gnu", "mcpu": mcpu, **INTEGERS})
    how = kernels.byte_lookup(options.device(chosen))
    weights = shift_add.Weights(
        RNG.integers(0, 16, (2048, 2048)).astype(np.uint8),
        codes.book("pot", 4),
        np.ones((2048, 1), np.float32),
        2048,
        4,
    )
    if there is None:
        assert how is None and shift_add.choose(weights, 1, chosen).name == "tables"
        return
    assert how is not None and shift_add.choose(weights, 1, chosen).name == "book_int8"
    library: Any = compiled(kernels.book_int8(1, 64, 64, 64, how, parallel=False), dict(chosen.target))
    text = library.mod.inspect_source("asm")
    assert all(re.search(name, text) for name in there)


@pytest.mark.parametrize(("kind", "bits", "size"), [("pot", 3, 2), ("sp2", 4, 2), ("binary", 3, 4)])
def test_bytes_of_levels_in_tables_are_the_weights(kind, bits, size):
    weight = RNG.standard_normal((5, 77)).astype(np.float32)
    encoded = codes.encode(weight, kind, bits, group=32)
    held = [codes.pack(encoded.codes, bits), encoded.exponents]
    held += [] if kind == "binary" else [codes.book(kind, bits)]
    weights = shift_add.read("BinaryCodedLinear" if kind == "binary" else "ShiftLinear", held, 77, 32)
    tables, packed = kernels.row_tables(shift_add._levels(weights)), kernels.nibbles(weights.codes)
    assert tables.shape == (5, 3, size, 16) and packed.shape == (5, 3, 16)
    number = np.stack([packed & 15, packed >> 4], 2).reshape(5, 3, 32)
    found = np.zeros((5, 3, 32, 4), np.uint8)
    for byte in range(size):
        found[..., 4 - size + byte] = np.take_along_axis(tables[:, :, byte].view(np.uint8), number, 2)
    assert np.array_equal(found.view("<f4").reshape(5, 96)[:, :77], weights.decoded())
    # A level that needs a third byte takes four.
    assert kernels.row_tables(np.full((1, 1, 16), 1 + 2**-8, np.float32)).shape[2] == 4


def test_arm_boards_interleave_bytes_of_floats():
    chosen = options.parse({"threads": 1, "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a72"})
    library: Any = compiled(kernels.tabled(1, 64, 1024, 1024, 2, parallel=False), dict(chosen.target))
    text = library.mod.inspect_source("asm")
    loop = max(
        re.findall(r"^\.LBB\d+_\d+:\n(.*?\bb\.\w+)", text, re.MULTILINE | re.DOTALL), key=lambda s: s.count("tbl")
    )
    # What the cost model counts, for two rows of 32 columns: nine instructions for 16 weights beside the multiply-adds.
    count = {name: len(re.findall(rf"^\s+{name}\b", loop, re.MULTILINE)) for name in ("tbl", "zip[12]", "ushr", "fmla")}
    assert count == {"tbl": 8, "zip[12]": 24, "ushr": 2, "fmla": 16}


# -- which kernel ------------------------------------------------------------------------------------------------------


def weights_of(kind: str, rows: int, columns: int, bits: int = 4) -> shift_add.Weights:
    drawn = RNG.integers(0, 2**bits, (rows, columns)).astype(np.uint8)
    scales = np.ones((bits, rows, 1) if kind == "binary" else (rows, 1), np.float32)
    return shift_add.Weights(drawn, None if kind == "binary" else codes.book(kind, bits), scales, columns, bits)


@pytest.mark.parametrize(
    ("kind", "bits", "tokens", "mcpu", "given", "expected"),
    [
        ("pot", 4, 1, "skylake-avx512", {}, "book"),
        ("pot", 8, 1, "skylake-avx512", {}, "float32"),
        ("binary", 4, 1, "skylake-avx512", {}, "binary"),
        ("binary", 4, 1, "haswell", {}, "float32"),  # signs cost more than what the cache gives anyway
        ("pot", 4, 1, "haswell", {}, "float32"),  # so was it measured: 0.8 times as fast at 384 x 1536
        ("pot", 4, 1, "haswell", INTEGERS, "book_int8"),
        ("sp2", 4, 196, "haswell", {}, "float32"),
        ("sp2", 4, 196, "haswell", INTEGERS, "narrow_int8"),
        ("pot", 4, 196, "haswell", INTEGERS, "float32"),  # up to 64: 16 bits do not hold their sums
        ("pot", 4, 196, "znver4", INTEGERS, "dot_int8"),
        ("pot", 4, 1, "x86-64", INTEGERS, "float32"),
        ("pot", 4, 1, "skylake-avx512", {"schedules": "no"}, "float32"),
        ("pot", 4, 1, "skylake-avx512", {"arch": "sm_87"}, "book"),
        ("pot", 4, 1, "skylake-avx512", {"arch": "sm_87", "schedules": "no"}, "float32"),
    ],
)
def test_a_kernel_is_chosen_where_it_pays(kind, bits, tokens, mcpu, given, expected):
    chosen = options.parse({"threads": 1, "mtriple": "x86_64-linux-gnu", "mcpu": mcpu, **given})
    assert shift_add.choose(weights_of(kind, 1536, 768, bits), tokens, chosen).name == expected


@pytest.mark.parametrize(
    ("kind", "rows", "tokens", "group", "given", "expected"),
    [
        ("pot", 1536, 1, 0, {}, "tables"),
        ("sp2", 1536, 2, 256, {}, "tables"),
        ("binary", 1536, 1, 256, {}, "wide_tables"),
        ("pot", 384, 1, 0, {}, "float32"),  # floats that stay in the cache are read faster than codes are looked up
        ("pot", 1536, 4, 0, {}, "float32"),
        ("pot", 1536, 1, 24, {}, "float32"),
        ("pot", 1536, 1, 0, INTEGERS, "tables"),
        ("pot", 1536, 1, 0, {"mcpu": "cortex-a76", **INTEGERS}, "book_int8"),
        ("pot", 1536, 196, 0, {"mcpu": "cortex-a76", **INTEGERS}, "dot_int8"),
    ],
)
def test_a_kernel_for_an_arm_board_is_chosen_where_it_pays(kind, rows, tokens, group, given, expected):
    chosen = options.parse({"threads": 1, "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a72", **given})
    weights = weights_of(kind, rows, 768)
    if group:
        scales = np.repeat(weights.scales, -(-768 // group), -1)
        weights = dataclasses.replace(weights, scales=scales * np.float32(0.7 if kind == "binary" else 1), group=group)
    assert shift_add.choose(weights, tokens, chosen).name == expected


def test_an_unknown_type_of_activations_is_refused():
    with pytest.raises(InputError, match="activations=int4"):
        options.parse({"activations": "int4"})


# -- operators ---------------------------------------------------------------------------------------------------------


def model(coded: codes.Coded, shape: Sequence[int], *, conv: bool = False) -> Graph:
    rows, columns = coded.codes.shape
    name = ("BinaryCoded" if coded.kind == "binary" else "Shift") + ("Conv" if conv else "Linear")
    held = {"planes": codes.pack(coded.codes, coded.bits), "exponents": coded.exponents}
    held |= {} if coded.kind == "binary" else {"levels": codes.book(coded.kind, coded.bits)}
    given: dict[str, Any] = {"strides": [1, 1]} if conv else {}
    node = helper.make_node(name, ["x", *held], ["y"], domain=ops.DOMAIN, columns=columns, group=coded.group, **given)
    result = [shape[0], rows, *shape[2:]] if conv else [*shape[:-1], rows]
    return built([node], {"x": shape}, result, held, name)


def built(nodes: list, inputs: Mapping[str, Sequence[int]], result: Sequence[int], held: dict, name: str) -> Graph:
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in {**inputs, "y": result}.items()]
    weights = [numpy_helper.from_array(v, n) for n, v in held.items()]
    body = helper.make_graph(nodes, "g", ports[:-1], ports[-1:], weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(ops.DOMAIN, ops.VERSION)]
    return Graph.from_proto(
        helper.make_model(body, opset_imports=opsets, functions=[ops.function(name, 17)], ir_version=9)
    )


def difference(graph: Graph, folder: Path, **given: Any) -> tuple[float, list[str]]:
    """Of the engine to the body, over the largest value; and what was said."""
    said: list[str] = []
    feeds = oracle.random_feeds(graph.signature().inputs)
    engine = TvmTarget().build(graph, folder, {"threads": 1, **given}, said.append)
    found, expected = engine.run(feeds)["y"], oracle.run(graph, feeds)["y"]
    engine.close()
    return float(np.abs(found - expected).max() / np.abs(expected).max()), said


@pytest.mark.parametrize(
    ("kind", "bits", "group", "shape", "given", "limit", "kernel"),
    [
        ("pot", 4, 24, [1, 637], {}, 1e-5, "book"),
        ("sp2", 4, 0, [1, 3, 637], {}, 1e-5, "book"),
        ("pot", 3, 64, [2, 637], {}, 1e-5, "book"),
        ("pot", 2, 7, [1, 637], {}, 1e-5, "float32"),  # a group that is not whole words
        ("binary", 4, 32, [1, 637], {}, 1e-5, "binary"),
        ("binary", 3, 0, [2, 637], {}, 1e-5, "binary"),
        ("pot", 8, 0, [1, 637], {}, 1e-5, "float32"),
        ("pot", 4, 24, [1, 637], INTEGERS, 0.02, "book_int8"),
        ("sp2", 4, 0, [50, 637], INTEGERS, 0.02, "dot_int8"),
        ("sp2", 4, 0, [50, 637], {"schedules": "no"}, 1e-5, "float32"),
    ],
)
def test_the_engine_computes_the_body(kind, bits, group, shape, given, limit, kernel, tmp_path):
    weight = RNG.standard_normal((1001, 637)).astype(np.float32)
    graph = model(codes.encode(weight, kind, bits, group=group), shape)
    error, said = difference(graph, tmp_path, **given)
    assert error < limit and (error > 1e-4) == (given == INTEGERS)
    assert len(said) == 1 and re.search("y .(ShiftLinear|BinaryCodedLinear)", said[0])
    if "avx512_vnni" in measure.cpu_features():
        assert said[0].endswith(f": {kernel}")


@pytest.mark.parametrize("pixels", [1, 5])
def test_a_convolution_of_one_pixel_is_a_linear_layer(pixels, tmp_path):
    weight = RNG.standard_normal((512, 256)).astype(np.float32)
    error, said = difference(model(codes.encode(weight, "pot", 4), [1, 256, 1, pixels], conv=True), tmp_path)
    assert error < 1e-5
    assert ("convolution: float32" in said[0]) == (pixels > 1)


@pytest.mark.parametrize(("width", "limits", "said"), [(64, 1, "one kernel"), (20, 1, "products"), (64, 2, "products")])
def test_angular_attention_runs_in_one_kernel_or_as_its_body(width, limits, said, tmp_path):
    held = {"limit": np.linspace(0.01, 0.02, limits, dtype=np.float32).reshape(limits, 1, 1)}
    node = helper.make_node(
        "BinaryAngularAttention", ["q", "k", "v", "limit", "limit"], ["y"], domain=ops.DOMAIN, turn=[0, 1, 3, 2]
    )
    shape = [1, 2, 9, width]
    graph = built([node], dict.fromkeys("qkv", shape), shape, held, "BinaryAngularAttention")
    error, notes = difference(graph, tmp_path)
    assert error < 1e-5 and said in notes[0]


@pytest.mark.parametrize("order", [[2, 0, 3, 1, 4], pytest.param([2, 0, 3, 4, 1], marks=pytest.mark.slow)])
def test_angular_attention_reads_heads_where_the_projection_put_them(order, tmp_path):
    """Axes of the projection in the order given, tokens and columns exchanged once more where they are turned."""
    tokens, heads, width = 10, 2, 16
    turned = order[-1] == 1
    held = {"limit": np.full(1, 0.05, np.float32), "split": np.array([1, 1, 1]), "first": np.array([0])}
    held["parts"] = np.array([1, tokens, 3, heads, width])
    make = helper.make_node
    nodes = [
        make("Reshape", ["x", "parts"], ["r"]),
        make("Transpose", ["r"], ["t"], perm=order),
        make("Split", ["t", "split"], [f"{n}_whole" for n in "qkv"], axis=0),
        *(make("Squeeze", [f"{n}_whole", "first"], [f"{n}_turned" if turned else n]) for n in "qkv"),
        *(make("Transpose", [f"{n}_turned"], [n], perm=[0, 1, 3, 2]) for n in "qkv" if turned),
        make("BinaryAngularAttention", [*"qkv", "limit", "limit"], ["y"], domain=ops.DOMAIN, turn=[0, 1, 3, 2]),
    ]
    shapes = {"x": [1, tokens, 3 * heads * width]}
    graph = built(nodes, shapes, [1, heads, tokens, width], held, "BinaryAngularAttention")
    error, notes = difference(graph, tmp_path)
    assert error < 1e-5 and "one kernel" in notes[0]
    symbols = [kernel["symbol"] for kernel in json.loads((tmp_path / "kernels.json").read_text())]
    assert [name for name in symbols if "transpose" in name or "split" in name] == []


def test_rows_that_are_no_rows_are_copied():
    class Source:
        ty = relax.TensorType((2, 5, 12), "float32")

    def rows(shape: tuple[int, ...], at: Any) -> kernels.Rows | None:
        return kernels.Rows.of(View(Source, shape, at))

    assert rows((2, 5, 12), list) == kernels.Rows.dense((2, 5, 12)) == kernels.Rows(120, 0, (60, 12))
    # Heads 1 and 2 of three, each of four columns.
    found = rows((2, 2, 5, 4), lambda i: [i[0], i[2], (i[1] + 1) * 4 + i[3]])
    assert found == kernels.Rows(120, 4, (60, 4, 12))
    assert found is not None and found.start([1, 1, 2]) == 60 + 2 * 12 + 8
    assert rows((2, 12, 5), lambda i: [i[0], i[2], i[1]]) is None  # columns are apart
    assert rows((2, 5, 12), lambda i: [i[0], (i[1] * 2) % 5, i[2]]) is None  # tokens are not evenly spaced


def test_codes_that_are_not_constant_are_refused(tmp_path):
    graph = model(codes.encode(RNG.standard_normal((8, 16)).astype(np.float32), "pot", 4), [1, 16])
    proto = graph.to_proto()
    weight = next(t for t in proto.graph.initializer if t.name == "exponents")
    proto.graph.initializer.remove(weight)
    proto.graph.input.append(helper.make_tensor_value_info("exponents", onnx.TensorProto.INT8, [8, 1]))
    with pytest.raises(InputError, match="ShiftLinear"):
        TvmTarget().build(Graph.from_proto(proto), tmp_path, {"threads": 1})


@pytest.mark.parametrize(("kind", "given"), [("pot", {}), ("binary", {}), ("pot", INTEGERS)])
def test_threads_share_the_outputs(kind, given, tmp_path):
    weight = RNG.standard_normal((1000, 640)).astype(np.float32)
    graph = model(codes.encode(weight, kind, 4, group=64), [1, 640])
    (tmp_path / "one").mkdir()
    feeds = oracle.random_feeds(graph.signature().inputs)
    alone = TvmTarget().build(graph, tmp_path / "one", {"threads": 1, **given})
    shared = TvmTarget().build(graph, tmp_path, {"threads": 2, **given})
    assert np.array_equal(alone.run(feeds)["y"], shared.run(feeds)["y"])


def hamming(shapes: Mapping[str, Sequence[int]], held: dict[str, np.ndarray]) -> Graph:
    """Binary softmax attention; what is not held is an input."""
    given = ["q", "k", "v", "q_threshold", "k_threshold", "scale", "bias"]
    rank = len(shapes["q"])
    turn = [*range(rank - 2), rank - 1, rank - 2]
    node = helper.make_node("BinarySoftmaxAttention", given, ["y"], domain=ops.DOMAIN, turn=turn)
    return built([node], shapes, [*shapes["q"][:-1], shapes["v"][-1]], held, "BinarySoftmaxAttention")


@pytest.mark.parametrize(
    ("shape", "limits", "bias", "given", "said"),
    [
        ([2, 3, 9, 16], (), (1,), {}, "counted"),
        ([2, 19, 20], (2, 1, 1), (19, 19), {}, "counted"),  # of each image, without heads
        ([2, 3, 21, 45], (2, 1, 1, 1), (2, 1, 1, 21), {"mcpu": "haswell"}, "counted"),  # a mask of keys
        ([2, 3, 17, 64], (3, 1, 1), (3, 17, 17), {"threads": 2}, "counted"),
        ([2, 3, 9, 16], (9, 1), (1,), {}, "products"),  # a threshold for each token
        pytest.param([2, 3, 3, 16], (1,), (1,), {}, "products", marks=pytest.mark.slow),  # too few keys
    ],
)
def test_binary_softmax_attention_runs_as_its_body(shape: list[int], limits, bias, given, said, tmp_path):
    if "mcpu" in given:
        cpu("avx2")
    held = {f"{n}_threshold": RNG.uniform(-0.1, 0.1, limits).astype(np.float32) for n in "qk"}
    held |= {"scale": np.full(1, 0.3, np.float32), "bias": RNG.standard_normal(bias).astype(np.float32)}
    graph = hamming(dict.fromkeys("qkv", shape), held)
    legalized = graph.copy()
    Legalize("tvm").run(legalized, Context())
    assert [node.op for node in legalized.nodes] == ["BinarySoftmaxAttention"]
    error, notes = difference(graph, tmp_path, **given)
    assert error < 1e-5 and len(notes) == 1 and said in notes[0]
    # Another scale gives another result, so that the bound above is no matter of course.
    feeds = oracle.random_feeds(graph.signature().inputs)
    other = hamming(dict.fromkeys("qkv", shape), {**held, "scale": np.full(1, 0.35, np.float32)})
    assert np.abs(oracle.run(graph, feeds)["y"] - oracle.run(other, feeds)["y"]).max() > 1e-3


def at_thresholds() -> tuple[Graph, list[tuple[dict[str, np.ndarray], np.ndarray]]]:
    """Binary attention, and feeds with the outputs that follow for a threshold that values equal, and one just below.

    Units of 3, 4 and zeros are 0.6, 0.8 and 0 to the last bit; a row of zeros has no direction and no ones.
    """
    x = np.zeros((1, 6, 33), np.float32)
    x[0, np.arange(4), [0, 31, 32, 7]], x[0, np.arange(4), [32, 0, 31, 8]] = 3, 4
    x[0, 4] = x[0, 0]
    given = {"q": x, "k": x, "v": np.eye(6, dtype=np.float32)[None]}
    shapes = {name: value.shape for name, value in given.items()} | {"q_threshold": (1,), "k_threshold": (1,)}
    graph = hamming(shapes, {"scale": np.ones(1, np.float32), "bias": np.zeros(1, np.float32)})
    equal, cases = np.float32(0.6), []
    for limit, ones in ((equal, x > 3), (np.nextafter(equal, np.float32(0)), x > 0)):
        powers = np.exp(ones.astype(np.float32) @ ones.astype(np.float32).swapaxes(1, 2))
        limits = dict.fromkeys(("q_threshold", "k_threshold"), np.full(1, limit))
        cases.append(({**given, **limits}, powers / powers.sum(-1, keepdims=True)))
    return graph, cases


def test_what_equals_its_threshold_is_not_above_it(tmp_path):
    graph, cases = at_thresholds()
    said: list[str] = []
    engine = TvmTarget().build(graph, tmp_path, {"threads": 1}, said.append)
    for feeds, wanted in cases:
        found = engine.run(feeds)["y"]
        np.testing.assert_allclose(found, oracle.run(graph, feeds)["y"], atol=1e-6)
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert "counted" in said[0]


@pytest.mark.parametrize(("tokens", "keys", "inner"), [(5, 6, 7), (3, 40, 70)])
@pytest.mark.parametrize("feature", ["avx512f", "avx2"])
def test_common_ones_are_counted_exactly(feature, tokens, keys, inner):
    have = Vectors(16, 32) if feature == "avx512f" else Vectors(8, 16)
    q, k = (RNG.standard_normal((2, n, inner)).astype(np.float32) for n in (tokens, keys))
    limits = [RNG.uniform(-0.1, 0.1, 2).astype(np.float32) for _ in "qk"]
    function = kernels.hamming((2,), tokens, keys, inner, have, parallel=False, biases=(tokens, 1))
    bias = np.arange(tokens, dtype=np.float32)
    given = [q.ravel(), k.ravel(), *limits, np.full(1, 2, np.float32), bias]
    (y,) = computed(function, cpu(feature), given, ((2, tokens, keys), "float32"))
    ones = [
        x / np.linalg.norm(x, axis=-1, keepdims=True) > t[:, None, None] for x, t in zip((q, k), limits, strict=True)
    ]
    counts = np.einsum("hqd,hkd->hqk", *(one.astype(int) for one in ones))
    assert np.array_equal(y, 2 * counts + bias[:, None]) and len(np.unique(counts)) > 2


@pytest.mark.parametrize(
    ("target", "there", "least"),  # columns from which counting pays: one word of them
    [
        ({"mtriple": "x86_64-linux-gnu", "mcpu": "znver4"}, r"\bvpopcntd\b", 4),
        ({"mtriple": "x86_64-linux-gnu", "mcpu": "skylake-avx512"}, r"\bvpshufb\b", 14),
        ({"mtriple": "x86_64-linux-gnu", "mcpu": "haswell"}, r"\bvpshufb\b", 14),
        ({"mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76"}, r"\bcnt\b", 6),
    ],
)
def test_bits_are_counted_by_the_instructions_of_the_cpu(target, there, least):
    chosen = options.parse({"threads": 1, **target})
    device = options.device(chosen)
    function = kernels.hamming((1,), 8, 32, 64, shift_add.tile.vectors(device), parallel=False)
    library: Any = compiled(function, dict(chosen.target))
    assert re.search(there, library.mod.inspect_source("asm"))
    assert shift_add.counting_pays(least, device) and not shift_add.counting_pays(least - 1, device)


def test_a_gpu_gets_what_the_codes_stand_for(tmp_path):
    if cuda.compiler() is None:
        pytest.skip("no CUDA compiler")
    graph = model(codes.encode(RNG.standard_normal((64, 32)).astype(np.float32), "binary", 4), [1, 32])
    said: list[str] = []
    engine = TvmTarget().build(graph, tmp_path, {"arch": "sm_87"}, said.append)
    assert engine.manifest.device == "cuda sm_87" and "float32" in said[0]

"""The affine algebra against torch, in float64: layers, sums, compositions, their refusals, and known block merges."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, note, settings
from hypothesis import strategies as st

from edgecompile import affine
from edgecompile.affine import Affine, Conv, Refusal, compose, difference

Array = np.ndarray
examples = settings(max_examples=150, deadline=None)

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


# -- oracles ---------------------------------------------------------------------------------------------------------


@dataclass
class Layer:
    """A map and what torch computes for it, channels first without a batch axis."""

    affine: Affine
    torch: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, x: Array) -> Array:
        return self.torch(torch.from_numpy(x)[None])[0].numpy()


def evaluate(a: Affine, x: Array) -> Array:
    """The definition of an Affine, position by position: independent of every operation of the module."""
    size = [n for n in a.exit_size(x.shape[1:]) if n is not None]
    y = np.broadcast_to(a.bias.reshape(-1, *(1,) * a.rank), (a.outputs, *size)).copy()
    for tap, offset in zip(a.kernel, a.taps, strict=True):
        dense = np.zeros((a.outputs, a.channels))
        row, slot = np.nonzero(a.inputs >= 0)
        dense[row, a.inputs[row, slot]] = tap[row, slot]
        read = x
        for axis in range(a.rank):
            at = a.stride[axis] * np.arange(size[axis]) + offset[axis]
            n, up = x.shape[axis + 1], a.up[axis]
            inside = (at % up == 0) & (at >= 0) & (at // up < n)
            read = np.take(read, np.where(inside, at // up, 0), axis + 1)
            read = read * inside.reshape(-1, *(1,) * (a.rank - axis - 1))
        y += np.tensordot(dense, read, 1)
    return y


def padded(x: torch.Tensor, begin, end) -> torch.Tensor:
    """torch's pad takes the last axis first."""
    pairs = list(zip(begin, end, strict=True))
    return F.pad(x, [v for pair in reversed(pairs) for v in pair])


def transposed(x, weight, bias, strides, begin, end, output_padding, dilations, group):
    """ConvTranspose with asymmetric padding; torch's own padding where it can express it."""
    run = TRANSPOSE[weight.ndim - 2]
    if list(begin) == list(end):
        return run(x, weight, bias, strides, tuple(begin), tuple(output_padding), group, dilations)
    y = run(x, weight, None, strides, 0, 0, group, dilations)
    y = padded(y, [-b for b in begin], [o - e for o, e in zip(output_padding, end, strict=True)])
    return y if bias is None else y + bias.reshape(-1, *(1,) * (weight.ndim - 2))


def run_form(form: Conv, x: Array) -> Array:
    """What the ONNX node computes, by torch."""
    at = form.attributes
    rank = x.ndim - 1
    begin, end = at["pads"][:rank], at["pads"][rank:]
    assert min(at["pads"]) >= 0
    weight, bias = torch.from_numpy(form.weight), None if form.bias is None else torch.from_numpy(form.bias)
    batch = torch.from_numpy(x)[None]
    if form.op == "Conv":
        y = CONV[rank](padded(batch, begin, end), weight, bias, at["strides"], 0, at["dilations"], at["group"])
    else:
        assert all(0 <= o < s for o, s in zip(at["output_padding"], at["strides"], strict=True))
        strides, extra, dilations = at["strides"], at["output_padding"], at["dilations"]
        y = transposed(batch, weight, bias, strides, begin, end, extra, dilations, at["group"])
    return y[0].numpy()


def close(a: Array, b: Array, tolerance: float = 1e-10) -> bool:
    return a.shape == b.shape and bool(np.abs(a - b).max(initial=0) <= tolerance * max(1, np.abs(b).max(initial=0)))


def assert_same(a: Affine, x: Array, wanted: Array) -> None:
    """The map and the node made of it both compute ``wanted``, borders included."""
    assert a.exit_size(x.shape[1:]) == wanted.shape[1:]
    assert close(evaluate(a, x), wanted)
    if a.is_pointwise:
        weight, bias = a.as_matrix()
        y = np.tensordot(weight, x, 1)
        assert close(y if bias is None else y + bias.reshape(-1, *(1,) * a.rank), wanted)
    if a.rank and 1 in (max(a.up), max(a.stride)):
        assert close(run_form(a.as_conv(), x), wanted)


# -- layers ----------------------------------------------------------------------------------------------------------


def values(rng: np.random.Generator, *shape: int) -> Array:
    return rng.normal(size=shape)


def conv_layer(weight: Array, bias=None, strides=None, pads=None, dilations=None, group=1) -> Layer:
    rank = weight.ndim - 2
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    pads = pads or [0] * 2 * rank
    w, b = torch.from_numpy(weight), None if bias is None else torch.from_numpy(bias)
    return Layer(
        affine.conv(weight, bias, strides, pads, dilations, group),
        lambda x: CONV[rank](padded(x, pads[:rank], pads[rank:]), w, b, strides, 0, dilations, group),
    )


def transpose_layer(weight, bias=None, strides=None, pads=None, output_padding=None, dilations=None, group=1) -> Layer:
    rank = weight.ndim - 2
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    pads, extra = pads or [0] * 2 * rank, output_padding or [0] * rank
    w, b = torch.from_numpy(weight), None if bias is None else torch.from_numpy(bias)
    return Layer(
        affine.conv_transpose(weight, bias, strides, pads, extra, dilations, group),
        lambda x: transposed(x, w, b, strides, pads[:rank], pads[rank:], extra, dilations, group),
    )


def norm_layer(rng: np.random.Generator, channels: int, rank: int, shift: bool = True) -> Layer:
    """BatchNormalization with random statistics."""
    gamma, var = values(rng, channels), rng.uniform(0.5, 2, channels)
    beta, mean = (values(rng, channels) if shift else np.zeros(channels) for _ in range(2))
    s = gamma / np.sqrt(var + 1e-3)
    t = [torch.from_numpy(v) for v in (mean, var, gamma, beta)]
    return Layer(affine.scale(s, beta - mean * s, rank), lambda x: F.batch_norm(x, t[0], t[1], t[2], t[3], eps=1e-3))


def pool_layer(channels: int, kernel, strides, pads) -> Layer:
    rank = len(kernel)
    return Layer(
        affine.average_pool(channels, kernel, strides, pads, count_include_pad=True),
        lambda x: POOL[rank](padded(x, pads[:rank], pads[rank:]), kernel, strides),
    )


def pad_layer(channels: int, begin, end) -> Layer:
    return Layer(affine.pad(channels, begin, end), lambda x: padded(x, begin, end))


def select_layer(indices, channels: int, rank: int) -> Layer:
    return Layer(affine.select(indices, channels, rank), lambda x: x[:, list(indices)])


def embed_layer(indices, channels: int, rank: int) -> Layer:
    def place(x: torch.Tensor) -> torch.Tensor:
        y = x.new_zeros(len(x), channels, *x.shape[2:])
        y[:, list(indices)] = x
        return y

    return Layer(affine.embed(indices, channels, rank), place)


def then(*layers: Layer, entry=None) -> Layer:
    """The layers one after the other."""
    first, *rest = layers
    for after in rest:
        before = first
        first = Layer(
            compose(after.affine, before.affine, entry),
            lambda x, after=after, before=before: after.torch(before.torch(x)),
        )
    return first


def parallel(*layers: Layer, entry=None) -> Layer:
    """The sum of the layers' outputs."""
    first, *rest = layers
    for other in rest:
        one = first
        first = Layer(
            affine.add(one.affine, other.affine, entry),
            lambda x, one=one, other=other: one.torch(x) + other.torch(x),
        )
    return first


def identity_layer(channels: int, rank: int) -> Layer:
    return Layer(affine.identity(channels, rank), lambda x: x)


def ints(draw, count: int, low: int, high: int) -> list[int]:
    return [draw(st.integers(low, high)) for _ in range(count)]


@st.composite
def layers(draw, channels: int, rank: int) -> Layer:
    """Any constructor, with random geometry and weights; a third without bias."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["conv", "conv", "conv", "transpose", "norm", "pool", "pad", "select", "embed", "id"]))
    outputs = draw(st.sampled_from([2, 4, 6]))
    group = draw(st.sampled_from([g for g in (1, 2, channels) if channels % g == outputs % g == 0]))
    bias = values(rng, outputs) if draw(st.integers(0, 2)) else None
    kernel, strides, dilations = (ints(draw, rank, 1, high) for high in (3, 2, 2))
    if kind == "conv":
        weight = values(rng, outputs, channels // group, *kernel)
        return conv_layer(weight, bias, strides, ints(draw, 2 * rank, 0, 2), dilations, group)
    if kind == "transpose":
        weight = values(rng, channels, outputs // group, *kernel)
        extra = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(strides, dilations, strict=True)]
        pads = ints(draw, rank, 0, 1)
        pads += pads if draw(st.booleans()) else ints(draw, rank, 0, 1)
        return transpose_layer(weight, bias, strides, pads, extra, dilations, group)
    if kind == "norm":
        return norm_layer(rng, channels, rank, shift=bias is not None)
    if kind == "pool":
        return pool_layer(channels, kernel, strides, ints(draw, 2 * rank, 0, 1))
    if kind == "pad":
        return pad_layer(channels, ints(draw, rank, -1, 2), ints(draw, rank, -1, 2))
    if kind == "id":
        return identity_layer(channels, rank)
    chosen = draw(st.lists(st.integers(0, channels - 1), min_size=1, max_size=6, unique=kind == "embed"))
    if kind == "select":
        return select_layer(chosen, channels, rank)
    wider = draw(st.permutations(range(channels + 2)))
    return embed_layer(wider[:channels], channels + 2, rank)


def entry_tensor(draw, channels: int, rank: int) -> Array:
    size = [draw(st.integers(5, 8)) for _ in range(rank)]
    return values(np.random.default_rng(draw(st.integers(0, 2**32))), channels, *size)


@examples
@given(st.data())
def test_every_layer_equals_torch(data):
    rank, channels = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([2, 4, 6]))
    layer = data.draw(layers(channels, rank))
    x = entry_tensor(data.draw, channels, rank)
    assume(min(n or 0 for n in layer.affine.exit_size(x.shape[1:])) > 0)
    assert_same(layer.affine, x, layer(x))


def test_a_matrix_is_torch_linear():
    rng = np.random.default_rng(0)
    weight, bias, x = values(rng, 5, 7), values(rng, 5), values(rng, 7)
    wanted = F.linear(*(torch.from_numpy(v) for v in (x, weight, bias))).numpy()
    a = affine.matrix(weight, bias)
    assert_same(a, x, wanted)
    assert str(a) == "5x7 matrix" and a.is_pointwise and a.exit_size(()) == ()
    assert a.macs(10) == 10 * 35 and affine.identity(8).macs(1) == 64
    with pytest.raises(Refusal, match="5x7 matrix is no Conv and no ConvTranspose"):
        a.as_conv()


def test_a_permutation_is_checked():
    order = [3, 1, 0, 2]
    x = values(np.random.default_rng(0), 4, 5)
    assert_same(affine.permute(order, 1), x, x[order])
    with pytest.raises(ValueError, match="not a permutation"):
        affine.permute([0, 0, 1])


def test_an_average_pool_that_does_not_count_its_padding_is_refused():
    with pytest.raises(Refusal, match="weighs the border differently"):
        affine.average_pool(2, [3, 3], pads=[1, 1, 1, 1])
    x = values(np.random.default_rng(0), 2, 6, 6)
    wanted = F.avg_pool2d(torch.from_numpy(x), 3, 1, 1, count_include_pad=False).numpy()
    counted = affine.average_pool(2, [3, 3], pads=[1, 1, 1, 1], count_include_pad=True)
    assert not close(evaluate(counted, x), wanted)
    assert close(evaluate(counted, x)[:, 1:-1, 1:-1], wanted[:, 1:-1, 1:-1])
    unpadded = affine.average_pool(2, [3, 3], [2, 2])
    assert_same(unpadded, x, F.avg_pool2d(torch.from_numpy(x), 3, 2).numpy())


# -- sums ------------------------------------------------------------------------------------------------------------


@examples
@given(st.data())
def test_parallel_branches_add_up(data):
    """Two to four branches with windows, dilations and groups of their own, and the same stride."""
    rank, channels = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([2, 4, 6]))
    strides = ints(data.draw, rank, 1, 2)
    shift = ints(data.draw, rank, -1, 1)  # the common padding need not be symmetric
    branches = []
    for _ in range(data.draw(st.integers(2, 4))):
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
        halves, dilations = ints(data.draw, rank, 0, 1), ints(data.draw, rank, 1, 2)
        reach = [h * d for h, d in zip(halves, dilations, strict=True)]
        begin, end = ([r + sign * s for r, s in zip(reach, shift, strict=True)] for sign in (1, -1))
        group = data.draw(st.sampled_from([g for g in (1, 2, channels) if channels % g == 0]))
        weight = values(rng, channels, channels // group, *(2 * h + 1 for h in halves))
        bias = values(rng, channels) if data.draw(st.booleans()) else None
        branches.append(conv_layer(weight, bias, strides, [*begin, *end], dilations, group))
    if max(strides) == 1 and not any(shift) and data.draw(st.booleans()):
        branches.append(identity_layer(channels, rank))
    merged = parallel(*branches)
    x = entry_tensor(data.draw, channels, rank)
    assert_same(merged.affine, x, merged(x))
    # Block-diagonal parts stay block-diagonal: as many groups as all of them share.
    assert merged.affine.groups % math.gcd(*(b.affine.groups for b in branches)) == 0
    assert difference(merged.affine, parallel(*reversed(branches)).affine) < 1e-12


@examples
@given(st.data())
def test_parallel_transposed_branches_add_up(data):
    channels, stride = data.draw(st.sampled_from([2, 4])), data.draw(st.integers(1, 3))
    branches = []
    for _ in range(2):
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
        begin, end = ints(data.draw, 2, 0, 2)
        # The output is stride * n for every kernel: what the window has too much is padding.
        weight = values(rng, channels, 3, stride + begin + end)
        branches.append(transpose_layer(weight, values(rng, 3), [stride], [begin, end]))
    merged = parallel(*branches)
    x = entry_tensor(data.draw, channels, 1)
    assert_same(merged.affine, x, merged(x))


def test_sums_that_do_not_line_up_are_refused():
    c1, c3 = np.ones((2, 2, 1, 1)), np.ones((2, 2, 3, 3))
    with pytest.raises(Refusal, match="differ in stride"):
        affine.add(affine.conv(c1, strides=[2, 2]), affine.conv(c3, pads=[1] * 4))
    with pytest.raises(Refusal, match="1x1 convolution and a 3x3 convolution in parallel differ in output size"):
        affine.add(affine.conv(c1), affine.conv(c3))
    with pytest.raises(ValueError, match="a sum of"):
        affine.add(affine.conv(c1), affine.identity(3, 2))


def test_extents_that_agree_only_for_one_size_add_up_only_there():
    """ResNet-D: a pooled 2x2 path and a strided 3x3 path have the same output for an even input only."""
    rng = np.random.default_rng(0)
    strided = conv_layer(values(rng, 2, 2, 3, 3), None, [2, 2], [1] * 4)
    pooled = pool_layer(2, [2, 2], [2, 2], [0] * 4)
    x = values(rng, 2, 8, 6)
    merged = parallel(strided, pooled, entry=(8, 6))
    assert_same(merged.affine, x, merged(x))
    for entry in ((7, 6), (None, 6)):
        with pytest.raises(Refusal, match="output size"):
            parallel(strided, pooled, entry=entry)


# -- compositions ----------------------------------------------------------------------------------------------------


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_chain_is_accepted_exactly_where_the_formula_holds(data):
    """Two or three maps of any kind: what is accepted equals torch, what is refused would have differed."""
    rank, channels = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([2, 4]))
    chain = data.draw(layers(channels, rank))
    x = entry_tensor(data.draw, channels, rank)
    entry = x.shape[1:]
    for _ in range(data.draw(st.integers(1, 2))):
        after = data.draw(layers(chain.affine.outputs, rank))
        middle = chain.affine.exit_size(entry)
        assume(min(n or 0 for n in (*middle, *after.affine.exit_size(middle))) > 0)
        wanted = after(chain(x))
        try:
            chain = then(chain, after, entry=entry)
        except Refusal as refusal:
            note(str(refusal))
            if "fills in" in str(refusal):
                return
            try:
                naive = affine._product(after.affine, chain.affine)
            except Refusal as none:  # there is no one bias
                assert "phases" in str(none)
                return
            assert not close(evaluate(naive, x), wanted)
            return
        assert_same(chain.affine, x, wanted)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_unknown_extents_are_accepted_exactly_where_every_extent_is(data):
    inner = data.draw(layers(2, 1))
    outer = data.draw(layers(inner.affine.outputs, 1))

    def accepts(n: int | None) -> bool:
        try:
            compose(outer.affine, inner.affine, (n,))
        except Refusal as refusal:
            return "empty" in str(refusal)
        return True

    assert accepts(None) == all(accepts(n) for n in range(1, 30))


@examples
@given(st.data())
def test_a_map_proved_for_unknown_extents_holds_for_each(data):
    inner = data.draw(layers(2, 2))
    outer = data.draw(layers(inner.affine.outputs, 2))
    try:
        merged = then(inner, outer)
    except Refusal:
        assume(False)
        return
    for size in ((3, 4), (6, 5), (9, 10)):
        middle = inner.affine.exit_size(size)
        if min(n or 0 for n in (*middle, *outer.affine.exit_size(middle))) > 0:
            x = values(np.random.default_rng(0), 2, *size)
            assert_same(merged.affine, x, merged(x))


@examples
@given(st.data())
def test_composition_is_associative(data):
    a = data.draw(layers(2, 1))
    b = data.draw(layers(a.affine.outputs, 1))
    c = data.draw(layers(b.affine.outputs, 1))
    try:
        left = compose(c.affine, compose(b.affine, a.affine))
        right = compose(compose(c.affine, b.affine), a.affine)
    except Refusal:
        assume(False)
        return
    assert difference(left, right) < 1e-10


RNG = np.random.default_rng(7)
K1, K3, K3B = values(RNG, 4, 4, 1, 1), values(RNG, 4, 4, 3, 3), values(RNG, 4, 4, 3, 3)
SIZE = (9, 10)
DW, BIAS, SAME = values(RNG, 4, 1, 3, 3), values(RNG, 4), [1, 1, 1, 1]
VALID, FULL = [0, 0, 0, 0], [2, 2, 2, 2]

# Inner layer, outer layer, what the note says; and the nearest pair that is exact.
REFUSED = {
    "bias before a padded convolution": (
        (conv_layer(K1, BIAS), conv_layer(K3, pads=SAME), "bias cannot pass the zero padding of a 3x3 convolution"),
        (conv_layer(K1), conv_layer(K3, pads=SAME)),
    ),
    "BatchNormalization before a padded convolution": (
        (
            norm_layer(RNG, 4, 2),
            conv_layer(DW, BIAS, pads=SAME, group=4),
            "zero padding of a depthwise 3x3 convolution",
        ),
        (norm_layer(RNG, 4, 2, shift=False), conv_layer(DW, BIAS, pads=SAME, group=4)),
    ),
    "bias before a padded average pool": (
        (conv_layer(K1, BIAS), pool_layer(4, [3, 3], [1, 1], SAME), "bias cannot pass the zero padding"),
        (conv_layer(K1, BIAS), pool_layer(4, [3, 3], [1, 1], VALID)),
    ),
    "bias before a zero Pad": (
        (conv_layer(K1, BIAS), pad_layer(4, [1, 0], [0, 0]), "bias cannot pass the zero padding"),
        (conv_layer(K1, BIAS), pad_layer(4, [-1, 0], [0, -1])),
    ),
    "a padded convolution before a padded one": (
        (
            conv_layer(K3, pads=SAME),
            conv_layer(K3B, pads=SAME),
            "border values of a padded 3x3 convolution cannot pass the padding of a 3x3 convolution",
        ),
        (conv_layer(K3, pads=FULL), conv_layer(K3B, pads=VALID)),
    ),
    "an unpadded convolution before a padded one": (
        (conv_layer(K3), conv_layer(K3B, pads=SAME), "border values"),
        (conv_layer(K3, pads=FULL), conv_layer(K3B, pads=SAME)),
    ),
    "a crop undone by padding": (
        (pad_layer(4, [-1, 0], [0, 0]), conv_layer(K1, pads=SAME), "border values of a padded"),
        (pad_layer(4, [1, 0], [0, 0]), conv_layer(K1, pads=SAME)),
    ),
    "a transposed convolution before a padded one": (
        (transpose_layer(K3, strides=[2, 2], pads=SAME), conv_layer(K3, pads=SAME), "border values of a padded 3x3"),
        (transpose_layer(K3, strides=[2, 2]), conv_layer(K3, pads=SAME)),
    ),
    "bias before a transposed convolution": (
        (conv_layer(K1, BIAS), transpose_layer(K3), "bias cannot pass the zero padding of a 3x3 convolution"),
        (conv_layer(K1), transpose_layer(K3)),
    ),
}


@pytest.mark.parametrize("entry", [SIZE, (None, None)], ids=["known", "unknown"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_padding_forbids_is_refused_and_would_have_been_wrong(name, entry):
    (inner, outer, reason), exact = REFUSED[name]
    x = values(np.random.default_rng(1), 4, *SIZE)
    with pytest.raises(Refusal, match=reason):
        compose(outer.affine, inner.affine, entry)
    wanted, naive = outer(inner(x)), evaluate(affine._product(outer.affine, inner.affine), x)
    error = np.abs(naive - wanted).max(0)
    assert error.max() > 1e-3
    assert np.median(error[1:-1, 1:-1]) < 1e-12  # only near the border: comparing the middle would not show it
    merged = then(*exact, entry=entry)
    assert_same(merged.affine, x, merged(x))


def test_a_border_that_only_one_size_reaches():
    """A stride decides whether the padding at the end is ever read: known sizes are accepted one by one."""
    inner, outer = conv_layer(values(RNG, 2, 2, 1), values(RNG, 2)), conv_layer(values(RNG, 2, 2, 2), None, [2], [0, 1])
    x = values(RNG, 2, 8)
    merged = then(inner, outer, entry=(8,))
    assert_same(merged.affine, x, merged(x))
    for n in (7, None):
        with pytest.raises(Refusal, match="bias"):
            compose(outer.affine, inner.affine, (n,))


def test_only_channels_that_are_read_count():
    """A bias on channels that the padded convolution does not read does not matter."""
    shift = np.array([0.0, 0.0, 1.0, 1.0])
    inner = conv_layer(K1, shift)
    padded_conv = conv_layer(values(RNG, 2, 2, 3, 3), pads=SAME)
    x = values(RNG, 4, 5, 5)
    clear = then(select_layer([0, 1], 4, 2), padded_conv)
    merged = then(inner, clear)
    assert_same(merged.affine, x, merged(x))
    with pytest.raises(Refusal, match="bias"):
        then(inner, then(select_layer([1, 2], 4, 2), padded_conv))
    # Nor do border values of channels that it does not read.
    half = then(select_layer([2, 3], 4, 2), conv_layer(values(RNG, 2, 2, 3, 3), pads=SAME), embed_layer([2, 3], 4, 2))
    inner = parallel(half, then(select_layer([0, 1], 4, 2), embed_layer([0, 1], 4, 2)))
    merged = then(inner, clear)
    assert_same(merged.affine, x, merged(x))
    with pytest.raises(Refusal, match="border"):
        then(inner, then(select_layer([1, 2], 4, 2), padded_conv))


def test_a_gap_between_up_sampled_elements_may_lie_in_the_padding():
    """A transposed convolution cropped by two: just outside is a gap, two further the first element."""
    weight, x = values(RNG, 2, 2, 1), values(RNG, 2, 6)
    up = transpose_layer(weight, strides=[2], pads=[2, 0])
    merged = then(up, conv_layer(values(RNG, 2, 2, 2), pads=[1, 0]))
    assert_same(merged.affine, x, merged(x))
    with pytest.raises(Refusal, match="border"):
        then(up, conv_layer(values(RNG, 2, 2, 3), pads=[2, 0]))


def test_a_bias_that_differs_by_phase_is_refused():
    inner = conv_layer(K1, BIAS)
    with pytest.raises(Refusal, match="phases"):
        then(inner, transpose_layer(values(RNG, 4, 3, 2, 2), strides=[2, 2]))
    # Nearest-neighbour up-sampling: every phase is the same.
    nearest = transpose_layer(np.ones((4, 1, 2, 2)), strides=[2, 2], group=4)
    x = values(RNG, 4, 3, 5)
    merged = then(inner, nearest)
    assert_same(merged.affine, x, merged(x))
    assert np.array_equal(merged(x), inner(x).repeat(2, 1).repeat(2, 2))


def test_skipping_then_filling_in_is_refused_and_the_other_order_cancels():
    up, down = transpose_layer(values(RNG, 2, 2, 3), strides=[2]), conv_layer(values(RNG, 2, 2, 1), strides=[2])
    with pytest.raises(Refusal, match="fills in what a 1 stride-2 convolution before it skipped"):
        then(down, up)
    merged = then(up, down)
    assert merged.affine.stride == merged.affine.up == (1,)
    x = values(RNG, 2, 6)
    assert_same(merged.affine, x, merged(x))
    third = then(up, conv_layer(values(RNG, 2, 2, 1), strides=[3])).affine
    with pytest.raises(Refusal, match="no Conv and no ConvTranspose"):
        third.as_conv()


def test_mismatched_channels_empty_outputs_and_huge_kernels():
    with pytest.raises(ValueError, match="4 channels"):
        compose(affine.conv(K3), affine.identity(5, 2))
    with pytest.raises(ValueError, match=r"on \(8,\)"):
        compose(affine.conv(K1), affine.conv(K3), (8,))
    with pytest.raises(Refusal, match="empty output for an input of extent 2"):
        compose(affine.conv(K1), affine.conv(K3), (2, 8))
    with pytest.raises(ValueError, match="bias"):
        affine.conv(K3, np.zeros(3))
    with pytest.raises(ValueError, match="4 output channels in 3 groups"):
        affine.conv(K3, group=3)
    with pytest.raises(Refusal, match="not finite"):
        affine.scale(np.array([1, np.nan]))
    wide = affine.conv(np.ones((1 << 14, 1, 1)), group=1 << 14)
    dense = affine.conv(np.ones((1, 1 << 14, 1)))
    assert compose(dense, wide).kernel.size == 1 << 14
    with pytest.raises(Refusal, match="merging would take a kernel of 65,536 elements"):
        compose(affine.conv(np.ones((4, 1 << 14, 1))), wide, limit=1 << 15)
    with pytest.raises(Refusal, match="merging would take a kernel of 24 elements"):
        affine.add(affine.conv(np.ones((2, 2, 5)), pads=[2, 2]), affine.conv(np.ones((2, 2, 6)), pads=[3, 2]), limit=23)


# -- known blocks ----------------------------------------------------------------------------------------------------


def norm_conv(rng, outputs, channels, kernel, strides=None, pads=None, group=1) -> Layer:
    """Convolution without bias, then BatchNormalization."""
    rank = len(kernel)
    first = conv_layer(values(rng, outputs, channels // group, *kernel), None, strides, pads, None, group)
    return then(first, norm_layer(rng, outputs, rank))


def block(name: str, rng: np.random.Generator) -> tuple[Layer, int, tuple[int, ...], int]:
    """A training-time block on 6 channels, and the group, window and stride of its published merged form."""
    c, same = 6, [1] * 4

    def idle(inner_width: int) -> Layer:
        """RePaViT's idle channels: fc1, selection, fc2, with the shortcut."""
        fc1 = conv_layer(values(rng, 24, c, 1, 1), values(rng, 24))
        fc2 = conv_layer(values(rng, c, inner_width, 1, 1), values(rng, c))
        chosen = sorted(rng.choice(24, inner_width, replace=False))
        sequence = then(norm_layer(rng, c, 2), fc1, select_layer(chosen, 24, 2), norm_layer(rng, inner_width, 2), fc2)
        return parallel(sequence, identity_layer(c, 2))

    def masked() -> Layer:
        """The same through ``Where(mask, ., u)``: a constant diagonal."""
        mask = torch.arange(24) >= 18
        keep = Layer(affine.scale(mask.numpy(), None, 2), lambda x: torch.where(mask[:, None, None], x, 0.0))
        fc1 = conv_layer(values(rng, 24, c, 1, 1), values(rng, 24))
        return parallel(then(fc1, keep, conv_layer(values(rng, c, 24, 1, 1))), identity_layer(c, 2))

    def difference_conv() -> Layer:
        """DEConv: vanilla, central, angular, horizontal and vertical difference convolutions."""
        w = [values(rng, c, c, 9) for _ in range(3)]
        h, v = np.zeros((c, c, 3, 3)), np.zeros((c, c, 3, 3))
        side = [values(rng, c, c, 3) for _ in range(2)]
        h[..., 0], h[..., 2] = side[0], -side[0]
        v[..., 0, :], v[..., 2, :] = side[1], -side[1]
        central = w[1].copy()
        central[..., 4] -= w[1].sum(2)
        angular = w[2] - w[2][..., [3, 0, 1, 6, 4, 2, 7, 8, 5]]
        kernels = [w[0], central, angular, h, v]
        return parallel(*(conv_layer(k.reshape(c, c, 3, 3), values(rng, c), pads=same) for k in kernels))

    def diverse() -> Layer:
        """DBB: kxk, 1x1, 1x1-kxk and 1x1-average; sequences pad before the 1x1, so the bias is in the border."""
        one = [then(conv_layer(values(rng, c, c, 1, 1), None, None, same), norm_layer(rng, c, 2)) for _ in range(2)]
        return parallel(
            norm_conv(rng, c, c, [3, 3], pads=same),
            norm_conv(rng, c, c, [1, 1]),
            then(one[0], norm_conv(rng, c, c, [3, 3])),
            then(one[1], pool_layer(c, [3, 3], [1, 1], [0] * 4), norm_layer(rng, c, 2)),
        )

    def mixer() -> Layer:
        """RepMixer: x + scale * (mix(x) - norm(x))."""
        inner = parallel(
            norm_conv(rng, c, c, [3, 3], pads=same, group=c),
            norm_layer(rng, c, 2),
            then(norm_layer(rng, c, 2), Layer(affine.scale(-np.ones(c), None, 2), torch.neg)),
        )
        layer_scale = norm_layer(rng, c, 2, shift=False)
        return parallel(identity_layer(c, 2), then(inner, layer_scale))

    def focus() -> Layer:
        """Four strided slices, concatenated, then a convolution."""
        parts = []
        for i, (row, column) in enumerate(((0, 0), (1, 0), (0, 1), (1, 1))):
            taken = conv_layer(np.ones((c, 1, 1, 1)), None, [2, 2], [-row, -column, row, column], None, c)
            parts.append(then(taken, embed_layer(range(c * i, c * (i + 1)), 4 * c, 2)))
        return then(parallel(*parts), conv_layer(values(rng, 8, 4 * c, 3, 3), values(rng, 8), pads=same))

    def litepose() -> Layer:
        """BatchNormalization over two transposed convolutions of the two halves of the entry."""
        halves = [select_layer(range(i, i + 3), c, 2) for i in (0, 3)]
        ups = [transpose_layer(values(rng, 3, 5, 4, 4), None, [2, 2], same) for _ in range(2)]
        return then(parallel(*(then(h, u) for h, u in zip(halves, ups, strict=True))), norm_layer(rng, 5, 2))

    def repvgg(stride: int) -> list[Layer]:
        two = [stride, stride]
        return [norm_conv(rng, c, c, [3, 3], two, same), norm_conv(rng, c, c, [1, 1], two)]

    def depthwise(*sizes: tuple[int, int]) -> list[Layer]:
        return [norm_conv(rng, c, c, k, pads=[k[0] // 2, k[1] // 2] * 2, group=c) for k in sizes]

    blocks: dict[str, Callable[[], tuple[Layer, int, tuple[int, ...], int]]] = {
        "RepVGG": lambda: (parallel(*repvgg(1), norm_layer(rng, c, 2)), 1, (3, 3), 1),
        "RepVGG stride 2": lambda: (parallel(*repvgg(2)), 1, (3, 3), 2),
        "ACNet": lambda: (
            parallel(*(norm_conv(rng, c, c, k, pads=[k[0] // 2, k[1] // 2] * 2) for k in ([3, 3], [1, 3], [3, 1]))),
            1,
            (3, 3),
            1,
        ),
        "ACNet without its square kernel": lambda: (parallel(*depthwise((1, 3), (3, 1))), c, (3, 3), 1),
        "DBB": lambda: (diverse(), 1, (3, 3), 1),
        "DEConv": lambda: (difference_conv(), 1, (3, 3), 1),
        "RepMixer": lambda: (mixer(), c, (3, 3), 1),
        "MobileOne depthwise": lambda: (
            parallel(*depthwise((3, 3), (3, 3), (1, 1)), norm_layer(rng, c, 2)), c, (3, 3), 1
        ),
        "depthwise residual": lambda: (parallel(identity_layer(c, 2), *depthwise((3, 3))), c, (3, 3), 1),
        "RepLKNet": lambda: (parallel(*depthwise((13, 13), (5, 5))), c, (13, 13), 1),
        "RePaViT": lambda: (idle(18), 1, (1, 1), 1),
        "RePaViT mask": lambda: (masked(), 1, (1, 1), 1),
        "Focus": lambda: (focus(), 1, (6, 6), 2),
        "LitePose": lambda: (litepose(), 1, (4, 4), 2),
    }  # fmt: skip
    return blocks[name]()


BLOCKS = ("RepVGG", "RepVGG stride 2", "ACNet", "ACNet without its square kernel", "DBB", "DEConv", "RepMixer")
BLOCKS += ("MobileOne depthwise", "depthwise residual", "RepLKNet", "RePaViT", "RePaViT mask", "Focus", "LitePose")


@pytest.mark.parametrize("name", BLOCKS)
def test_known_blocks_become_one_convolution(name):
    layer, group, window, stride = block(name, np.random.default_rng(3))
    x = values(np.random.default_rng(4), 6, 8, 10)
    assert_same(layer.affine, x, layer(x))
    form = layer.affine.as_conv()
    at = form.attributes
    assert form.op == ("ConvTranspose" if name == "LitePose" else "Conv")
    assert (at["group"], tuple(at["kernel_shape"]), at["strides"]) == (group, window, [stride] * 2)
    positions = math.prod(n or 0 for n in layer.affine.exit_size((8, 10)))
    macs = form.weight.size * (math.prod(x.shape[1:]) if name == "LitePose" else positions)
    assert layer.affine.macs(positions) == macs


def test_a_diverse_branch_that_pads_after_its_bias_is_refused():
    """The negative twin of DBB: ordinary padding in the kxk, after the 1x1 and its BatchNormalization."""
    rng = np.random.default_rng(5)
    with pytest.raises(Refusal, match="bias"):
        then(norm_conv(rng, 4, 4, [1, 1]), norm_conv(rng, 4, 4, [3, 3], pads=SAME))


# -- forms -----------------------------------------------------------------------------------------------------------


def test_grouped_refinements_stay_as_fine_as_they_can():
    rng = np.random.default_rng(0)
    c = 12
    by = {g: affine.conv(values(rng, c, c // g, 3), pads=[1, 1], group=g) for g in (1, 2, 3, 4, 12)}
    assert {g: m.groups for g, m in by.items()} == {g: g for g in by}
    assert (by[4] + by[2]).groups == 2 and (by[4] + by[3]).groups == 1 and (by[12] + by[3]).groups == 3
    assert (by[12] + affine.identity(c, 1)).kernel.shape == (3, c, 1)
    depthwise = affine.conv(values(rng, c, 1, 3), group=c)
    assert compose(depthwise, compose(affine.scale(values(rng, c), BIAS.repeat(3), 1), depthwise)).groups == c
    pointwise = {g: affine.conv(values(rng, c, c // g, 1), group=g) for g in (1, 2, 3, 4, 12)}
    assert compose(by[4], pointwise[2]).groups == 2 and compose(by[12], pointwise[4]).groups == 4
    # A dense weight that is block-diagonal in fact.
    dense = np.kron(np.eye(3), np.ones((4, 4)))[..., None]
    assert affine.conv(dense).as_conv().weight.shape == (12, 4, 1)
    assert affine.matrix(np.diag(values(rng, 5)), rank=1).as_conv().attributes["group"] == 5
    # Channel shuffle between two grouped convolutions is dense; shuffled back it is not.
    shuffle = np.arange(c).reshape(4, 3).T.ravel()
    mixed = compose(pointwise[4], compose(affine.permute(shuffle, 1), pointwise[3]))
    assert mixed.groups == 1
    back = compose(affine.permute(np.argsort(shuffle), 1), affine.permute(shuffle, 1))
    assert back.is_identity and not affine.permute(shuffle, 1).is_identity
    assert not any(affine.scale(v, w).is_identity for v, w in ((np.zeros(2), None), (np.ones(2), np.ones(2))))
    # A depthwise multiplier, and a split of which a quarter is convolved.
    assert affine.conv(values(rng, 24, 1, 3), group=12).groups == 12
    part = compose(affine.embed(range(3), c, 1), affine.conv(values(rng, 3, 3, 3), pads=[1, 1]))
    part = compose(part, affine.select(range(3), c, 1))
    rest = affine.scale(np.arange(c) >= 3, None, 1)
    assert (part + rest).groups == 4


def test_forms_are_minimal():
    rng = np.random.default_rng(0)
    dilated = affine.conv(values(rng, 2, 2, 3, 3), pads=[18, 6] * 2, dilations=[18, 6])
    assert len(dilated.taps) == 9
    assert dilated.as_conv().attributes == {
        "kernel_shape": [3, 3], "strides": [1, 1], "pads": [18, 6, 18, 6], "dilations": [18, 6], "group": 1
    }  # fmt: skip
    assert (dilated + affine.identity(2, 2)).as_conv().attributes["dilations"] == [18, 6]
    framed = np.pad(values(rng, 2, 2, 3, 3), ((0, 0), (0, 0), (1, 1), (1, 1)))
    assert affine.conv(framed, pads=[2] * 4).as_conv().attributes["pads"] == [1] * 4
    assert affine.conv(framed).as_conv().weight.shape[2:] == (5, 5)  # its pads would be -1
    assert affine.conv(framed[..., 1:-1, :]).as_conv().weight.shape[2:] == (3, 5)
    zero = affine.scale(np.zeros(3), np.ones(3), 2)
    assert zero.as_conv().weight.shape == (3, 1, 1, 1) and np.array_equal(zero.as_conv().bias, np.ones(3))  # type: ignore[arg-type]
    assert affine.identity(3, 2).as_conv().bias is None and affine.identity(3).as_matrix()[1] is None
    assert not affine.pad(3, [1], [-1]).is_pointwise and not affine.pad(3, [0], [1]).is_pointwise
    with pytest.raises(Refusal, match="no matrix"):
        dilated.as_matrix()


def test_difference_sees_geometry_and_coefficients():
    a = affine.conv(K3, BIAS, pads=SAME)
    assert difference(a, a) == 0
    assert difference(a, affine.conv(K3, BIAS + 0.5, pads=SAME)) == pytest.approx(0.5)
    assert difference(a, affine.conv(K3 + 0.25, BIAS, pads=SAME)) == pytest.approx(0.25)
    assert difference(a, affine.conv(K3, BIAS)) == math.inf
    assert difference(affine.conv(K1), affine.conv(np.pad(K1, ((0, 0), (0, 0), (1, 1), (1, 1))), pads=SAME)) == 0


def test_rounding_happens_once_and_overflow_is_refused():
    large, small = np.full((2, 2, 1, 1), 6e4), np.full((2, 2, 1, 1), 1e4)
    merged = affine.conv(large) + affine.conv(small)
    assert affine.conv(large).as_conv(np.float16).weight.dtype == np.float16
    with pytest.raises(Refusal, match="would overflow float16"):
        merged.as_conv(np.float16)
    assert np.array_equal(merged.as_conv(np.float32).weight, np.full((2, 2, 1, 1), np.float32(7e4)))
    with pytest.raises(Refusal, match="would overflow float16"):
        affine.matrix(np.eye(2), np.full(2, 7e4)).as_matrix(np.float16)
    faint = affine.scale(np.array([1, 1e-3]), None, 2)
    assert faint.as_conv(np.float16).weight.dtype == np.float16
    with pytest.raises(Refusal, match="would vanish in float16"):
        compose(faint, faint).as_conv(np.float16)
    # Rounding each branch first would lose what the sum keeps.
    one, tiny = affine.identity(1, 1), affine.scale(np.array([2.0**-24]), None, 1)
    total = one + tiny + tiny
    assert total.as_conv(np.float32).weight.item() == 1 + 2.0**-23


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_onnx_runtime_takes_the_forms(data):
    """The attributes mean in ONNX what they mean here."""
    rank, channels = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([2, 4]))
    layer = data.draw(layers(channels, rank))
    x = entry_tensor(data.draw, channels, rank)
    assume(min(n or 0 for n in layer.affine.exit_size(x.shape[1:])) > 0)
    form = layer.affine.as_conv(np.float32)
    constants = {"w": form.weight} | ({} if form.bias is None else {"b": form.bias})
    node = onnx.helper.make_node(form.op, ["x", *constants], ["y"], **form.attributes)
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, *x.shape])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None] * (rank + 2))],
        [onnx.numpy_helper.from_array(v, name) for name, v in constants.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x[None].astype(np.float32)})
    assert close(np.asarray(y)[0], layer(x), 1e-5)


def test_a_wide_depthwise_kernel_is_never_made_dense():
    c = 2048
    rng = np.random.default_rng(0)
    tracemalloc.start()
    depthwise = affine.conv(values(rng, c, 1, 5, 5), values(rng, c), pads=[2] * 4, group=c)
    half = compose(affine.embed(range(c // 2), c, 2), affine.select(range(c // 2), c, 2))
    block = compose(affine.scale(values(rng, c), values(rng, c), 2), depthwise) + affine.identity(c, 2) + half
    form = block.as_conv()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert form.weight.shape == (c, 1, 5, 5)
    assert peak < 16 * form.weight.nbytes  # dense it would be 2,048 times that


def test_what_rounding_loses():
    ones = np.ones((2, 3))
    assert affine.misfit(ones, np.float16) == ""
    assert affine.misfit(ones * 7e4, np.float16) == "overflow" and affine.misfit(ones * 7e4, np.float32) == ""
    faint = ones * [[1], [1e-6]]
    assert affine.misfit(faint, np.float16) == "vanish"
    assert affine.misfit(faint, np.float16, before=faint) == ""  # it was so before
    assert affine.misfit(faint, np.float16, before=ones) == "vanish"
    assert affine.misfit(faint * [[1], [0]], np.float16) == ""  # zero is exact
    assert affine.misfit(np.array([1, 1e-6]), np.float16) == "vanish"  # of a vector each element counts
    assert affine.misfit(np.array(1e-6), np.float16) == ""

"""Calibration data: every source gives the same samples one by one, and what does not fit the model is named."""

from __future__ import annotations

import importlib.util
import io
import itertools
import re
import tracemalloc

import numpy as np
import pytest
from onnx import TensorProto

from edgecompile.calibration_data import Preprocess, open_data, save_samples
from edgecompile.errors import EnvironmentMissing, InputError
from edgecompile.graph import Port

IMAGE = (Port("x", TensorProto.FLOAT, ("n", 3, 4, 5)),)
FIXED = (Port("x", TensorProto.FLOAT, (1, 3, 4, 5)),)
PAIRS = (Port("x", TensorProto.FLOAT, (4, 3)),)
TWO = (Port("x", TensorProto.FLOAT, ("n", 3)), Port("ids/0", TensorProto.INT64, ("n", 2)))
HAS_PILLOW = importlib.util.find_spec("PIL") is not None


def values(count: int, shape=(3, 4, 5), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)


def check(data, expected: np.ndarray, name: str = "x") -> None:
    for _ in range(2):  # a fresh iterator each time
        found = list(data.feeds())
        assert all(set(f) == {p.name for p in data.ports} for f in found)
        assert all(f[name].shape[0] == 1 for f in found)
        np.testing.assert_array_equal(np.concatenate([f[name] for f in found]), expected)


# -- sources -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ports", [IMAGE, FIXED])
def test_an_npy_file_and_an_npz_file_give_their_rows(tmp_path, ports):
    every = values(6)
    np.save(tmp_path / "a.npy", every)
    np.savez(tmp_path / "a.npz", x=every)
    np.savez_compressed(tmp_path / "b.npz", whatever=every)
    np.save(tmp_path / "nested.npy", every[:, None])
    for name in ("a.npy", "a.npz", "b.npz", "nested.npy"):
        data = open_data(tmp_path / name, ports)
        check(data, every)
        assert (data.count, data.random) == (6, False)
    assert [label for label, _ in open_data(str(tmp_path / "a.npy"), ports).samples()][2] == f"{tmp_path / 'a.npy'}[2]"


def test_arrays_of_several_inputs_go_by_name(tmp_path):
    ids = np.arange(8).reshape(4, 2)
    np.savez(tmp_path / "a.npz", **{"x": values(4, (3,)), "ids/0": ids})
    data = open_data(tmp_path / "a.npz", TWO)
    check(data, values(4, (3,)))
    assert [f["ids/0"].tolist() for f in data.feeds()] == [[row] for row in ids.tolist()]


def test_files_are_read_sample_by_sample(tmp_path):
    every = values(200, (3, 40, 50))
    np.save(tmp_path / "a.npy", every)
    np.savez(tmp_path / "a.npz", x=every)
    for name in ("a.npy", "a.npz"):
        data = open_data(tmp_path / name, (Port("x", TensorProto.FLOAT, ("n", 3, 40, 50)),))
        tracemalloc.start()
        assert sum(1 for _ in data.feeds()) == 200
        assert len(data.digest) == 64
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < every.nbytes / 2, name


@pytest.mark.parametrize("batches", [[1] * 6, [6], [2, 3, 1]])
def test_an_iterable_is_taken_apart_whatever_its_batches(batches):
    torch = pytest.importorskip("torch")
    every = values(6)
    ends = list(itertools.accumulate(batches))
    parts = [every[b - a : b] for a, b in zip(batches, ends, strict=True)]
    check(open_data(parts, IMAGE), every)
    check(open_data([torch.from_numpy(p.copy()).requires_grad_() for p in parts], IMAGE), every)
    check(open_data(({"x": torch.from_numpy(p.copy())} for p in parts), IMAGE), every)
    check(open_data(((p,) for p in parts), IMAGE), every)
    check(open_data(iter(parts), FIXED), every)


def test_what_can_be_read_only_once_is_kept_and_its_count_known():
    data = open_data(iter([values(3), values(2, seed=1)]), IMAGE)
    assert data.count == 5
    check(data, np.concatenate([values(3), values(2, seed=1)]))
    again = open_data(iter([values(3), values(2, seed=1)]), IMAGE)
    assert data.digest == again.digest
    assert [label for label, _ in data.samples()][4] == "sample 4"


def test_samples_without_a_batch_axis_get_one():
    check(open_data(list(values(4)), IMAGE), values(4))


def test_bfloat16_tensors_are_read():
    torch = pytest.importorskip("torch")
    check(open_data([torch.ones(1, 3, 4, 5, dtype=torch.bfloat16)], IMAGE), np.ones((1, 3, 4, 5), np.float32))


def test_a_fixed_batch_is_filled_up(tmp_path):
    every = values(8, (3,))
    for source in (list(every[:, None]), [every], [every[:3], every[3:]], list(every.reshape(2, 4, 3))):
        found = [f["x"] for f in open_data(source, PAIRS).feeds()]
        assert [f.shape for f in found] == [(4, 3), (4, 3)]
        np.testing.assert_array_equal(np.concatenate(found), every)
    with pytest.raises(InputError, match=r"3 samples are left over .* batches of 4 and no other; fix: give a multiple"):
        list(open_data([every[:7]], PAIRS).feeds())


def test_saved_samples_are_read_again_whatever_their_shapes(tmp_path):
    ports = (Port("in/x", TensorProto.FLOAT, ("n", 3, "h", "w")),)
    samples = [values(1, (3, h, 7)) for h in (5, 9, 4)]
    assert save_samples(tmp_path / "s.npz", iter(samples), ports) == 3
    data = open_data(tmp_path / "s.npz", ports)
    assert data.count == 3
    for one, feeds in zip(samples, data.feeds(), strict=True):
        np.testing.assert_array_equal(feeds["in/x"], one)


def test_random_numbers_are_asked_for_marked_and_reproducible():
    data, again = open_data("random:3", IMAGE, seed=5), open_data("random:3", IMAGE, seed=5)
    assert (data.random, data.count) == (True, 3)
    assert data.digest == again.digest != open_data("random:3", IMAGE, seed=6).digest
    first, second = list(data.feeds()), list(again.feeds())
    assert len(first) == 3
    assert all(np.array_equal(a["x"], b["x"]) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[0]["x"], first[1]["x"])
    for text in ("random:", "random:0", "random:x"):
        if text != "random:":
            with pytest.raises(InputError, match="random:16"):
                open_data(text, IMAGE)


def test_the_digest_is_that_of_the_content(tmp_path):
    every = values(3)
    np.save(tmp_path / "a.npy", every)
    np.save(tmp_path / "b.npy", every)
    first = open_data(tmp_path / "a.npy", IMAGE).digest
    assert first == open_data(tmp_path / "b.npy", IMAGE).digest
    assert first != open_data(tmp_path / "a.npy", FIXED).digest, "it is read otherwise for another model"
    every[1, 0, 0, 0] += 1
    np.save(tmp_path / "b.npy", every)
    assert first != open_data(tmp_path / "b.npy", IMAGE).digest
    assert open_data([every], IMAGE).digest == open_data([every.copy()], IMAGE).digest
    assert open_data([every], IMAGE).digest != open_data([every + 1], IMAGE).digest


# -- what must be refused ----------------------------------------------------------------------------------------------


def test_no_data_says_how_to_give_some(tmp_path):
    with pytest.raises(InputError, match=r"no calibration data.*--calib"):
        open_data(None, IMAGE)
    with pytest.raises(InputError, match="no such file or folder"):
        open_data(tmp_path / "nowhere", IMAGE)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(InputError, match="no calibration data"):
        open_data(tmp_path / "a.txt", IMAGE)
    with pytest.raises(InputError, match="gives no samples"):
        open_data(iter([]), IMAGE)
    with pytest.raises(InputError, match="no calibration data"):
        list(open_data([], IMAGE).feeds())


def test_a_list_that_is_already_a_batch_or_has_labels_is_explained():
    with pytest.raises(InputError, match=r"sample 0 .* has 2 values; the model has 1 input: 'x'.*without labels"):
        list(open_data([(values(1), 3)], IMAGE).feeds())


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"y": values(1)}, "it has 'y', and the inputs are 'x'"),
        ({"x": values(1), "y": values(1)}, "it has 'x', 'y', and the inputs are 'x'"),
        (values(1, (3, 5, 4)), "shape 1x3x5x4; the model wants ?x3x4x5"),
        (values(1, (4, 5)), "shape 1x4x5; the model wants ?x3x4x5"),
        (np.zeros((1, 3, 4, 5), np.uint8), "is uint8; the model wants float32"),
        (np.full((1, 3, 4, 5), np.nan, np.float32), "'x' of sample 1 holds a value that is not finite"),
        (np.full((1, 3, 4, 5), np.inf, np.float32), "'x' of sample 1 holds a value that is not finite"),
    ],
)
def test_a_sample_that_does_not_fit_is_named(sample, message):
    for source in ([values(1), sample], iter([values(1), sample])):
        with pytest.raises(InputError, match=f"sample 1 |{re.escape(message)}") as caught:
            list(open_data(source, IMAGE).feeds())
        assert message in str(caught.value)
    assert len(list(open_data([values(1), values(1)], IMAGE).feeds())) == 2


def test_floats_of_another_width_are_converted():
    check(open_data([values(2).astype(np.float64)], IMAGE), values(2))


def test_files_that_do_not_fit_are_explained(tmp_path):
    np.savez(tmp_path / "names.npz", a=values(2, (3,)), b=np.zeros((2, 2), np.int64))
    with pytest.raises(InputError, match=r"holds 'a', 'b', and the inputs are 'x', 'ids/0'"):
        open_data(tmp_path / "names.npz", TWO)
    np.savez(tmp_path / "lengths.npz", **{"x": values(2, (3,)), "ids/0": np.zeros((3, 2), np.int64)})
    with pytest.raises(InputError, match=r"2 of 'x', 3 of 'ids/0'"):
        open_data(tmp_path / "lengths.npz", TWO)
    np.save(tmp_path / "one.npy", values(2, (3,)))
    with pytest.raises(InputError, match=r"one array; the model has 2 inputs"):
        open_data(tmp_path / "one.npy", TWO)
    with pytest.raises(InputError, match=r"shape 2x3; its first axis counts the samples"):
        open_data(tmp_path / "one.npy", IMAGE)
    np.save(tmp_path / "objects.npy", np.array([{}, {}], dtype=object))
    with pytest.raises(InputError, match="Python objects"):
        open_data(tmp_path / "objects.npy", IMAGE)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(values(2)))
    with pytest.raises(InputError, match="ascontiguousarray"):
        open_data(tmp_path / "fortran.npy", IMAGE)
    (tmp_path / "text.npy").write_text("hello, this is no array")
    with pytest.raises(InputError, match="is not a NumPy array"):
        open_data(tmp_path / "text.npy", IMAGE)
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(InputError, match=r"cannot read .*savez"):
        open_data(tmp_path / "text.npz", IMAGE)
    with pytest.raises(InputError, match=r"\[preprocess\] is for images"):
        open_data(tmp_path / "one.npy", IMAGE, Preprocess())


def test_a_file_that_is_cut_short_is_noticed(tmp_path):
    np.save(tmp_path / "a.npy", values(3))
    whole = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(whole[:-10])
    with pytest.raises(InputError, match="ends within sample 2"):
        list(open_data(tmp_path / "a.npy", IMAGE).feeds())


def test_a_nan_in_a_file_is_named_with_its_place(tmp_path):
    every = values(3)
    every[1, 2, 3, 4] = np.nan
    np.savez(tmp_path / "a.npz", x=every)
    with pytest.raises(InputError, match=re.escape(f"'x' of {tmp_path / 'a.npz'}[1] holds a value that is not finite")):
        list(open_data(tmp_path / "a.npz", IMAGE).feeds())


# -- images ------------------------------------------------------------------------------------------------------------


def test_pixels_are_scaled_in_the_order_of_the_colours():
    pixels = np.array([[[255, 0, 51]], [[0, 102, 255]]], np.uint8)  # two rows of one pixel
    found = Preprocess(mean=(0.1, 0.2, 0.3), std=(1, 2, 4)).apply(pixels)
    assert (found.shape, found.dtype) == ((1, 3, 2, 1), np.float32)
    np.testing.assert_allclose(found[0, :, 0, 0], [0.9, -0.1, -0.025], atol=1e-6)
    swapped = Preprocess(mean=(0.1, 0.2, 0.3), std=(1, 2, 4), color="BGR").apply(pixels)
    np.testing.assert_allclose(swapped[0, :, 0, 0], [0.1, -0.1, 0.175], atol=1e-6)
    last = Preprocess(layout="NHWC", scale=1).apply(pixels)
    np.testing.assert_array_equal(last, pixels[None].astype(np.float32))
    np.testing.assert_array_equal(Preprocess(color="GRAY", scale=1).apply(pixels[..., :1])[0, 0, :, 0], [255, 0])


@pytest.mark.parametrize(
    "options",
    [{"layout": "CHW"}, {"color": "rgb"}, {"fit": "squash"}, {"mean": (1.0, 2.0)}, {"std": (1.0, 0.0, 1.0)},
     {"scale": 0.0}, {"size": (0, 5)}, {"color": "GRAY", "mean": (1.0, 2.0, 3.0)}],
)  # fmt: skip
def test_unknown_preprocessing_is_refused(options):
    with pytest.raises(InputError):
        Preprocess(**options)


def test_images_need_preprocessing_and_one_image_input(tmp_path):
    with pytest.raises(InputError, match=r"need \[preprocess\]"):
        open_data(tmp_path, IMAGE)
    with pytest.raises(InputError, match="do not fit the model"):
        open_data(tmp_path, TWO, Preprocess())
    with pytest.raises(InputError, match=r"size .* is not fixed"):
        open_data(tmp_path, (Port("x", TensorProto.FLOAT, (1, 3, "h", "w")),), Preprocess())
    with pytest.raises(InputError, match="holds no images"):
        open_data(tmp_path, IMAGE, Preprocess())


@pytest.mark.skipif(HAS_PILLOW, reason="Pillow is installed")
def test_without_pillow_the_error_says_how_to_get_it(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(EnvironmentMissing, match="pip install Pillow"):
        open_data(tmp_path, IMAGE, Preprocess())


@pytest.mark.skipif(not HAS_PILLOW, reason="Pillow is not installed")
class TestImages:
    def image(self, height: int, width: int):
        from PIL import Image

        rows, columns = np.mgrid[:height, :width]
        pixels = np.stack([rows * 20, columns * 20, np.full_like(rows, 7)], -1)
        return Image.fromarray(pixels.astype(np.uint8))

    def test_a_folder_gives_its_images_in_the_order_of_their_paths(self, tmp_path):
        (tmp_path / "sub").mkdir()
        self.image(4, 5).save(tmp_path / "sub" / "b.png")
        self.image(8, 10).save(tmp_path / "a.PNG")
        self.image(4, 5).convert("L").save(tmp_path / "c.bmp")
        (tmp_path / ".hidden.png").write_bytes(b"no image")
        (tmp_path / "notes.txt").write_text("")
        data = open_data(tmp_path, IMAGE, Preprocess(scale=1))
        assert data.count == 3
        found = {label.rpartition("/")[2]: feeds["x"] for label, feeds in data.samples()}
        assert list(found) == ["a.PNG", "c.bmp", "b.png"]
        np.testing.assert_array_equal(found["b.png"][0], np.asarray(self.image(4, 5)).transpose(2, 0, 1))
        assert np.array_equal(found["c.bmp"][0, 0], found["c.bmp"][0, 2])

    def test_fits_keep_or_change_the_aspect_ratio(self, tmp_path):
        self.image(4, 10).save(tmp_path / "a.png")
        square = (Port("x", TensorProto.FLOAT, (1, 3, 4, 4)),)
        feeds = {f: next(open_data(tmp_path, square, Preprocess(scale=1, fit=f)).feeds())["x"][0]
                 for f in ("stretch", "crop", "pad")}  # fmt: skip
        assert (feeds["crop"][1, 0].min(), feeds["crop"][1, 0].max()) == (60, 120), "columns 3 to 6"
        assert feeds["stretch"][1, 0].max() > 150
        assert np.all(feeds["pad"][:, 2:] == 114)
        assert feeds["pad"][2, 0].max() == 7

    def test_the_orientation_of_the_camera_is_undone(self, tmp_path):
        image = self.image(5, 4)
        exif = image.getexif()
        exif[0x0112] = 6  # to be turned by 90 degrees
        image.save(tmp_path / "a.png", exif=exif)
        found = next(open_data(tmp_path, IMAGE, Preprocess(scale=1)).feeds())["x"][0]
        np.testing.assert_array_equal(found, np.rot90(np.asarray(image), -1).transpose(2, 0, 1))

    def test_a_damaged_image_is_named(self, tmp_path):
        self.image(4, 5).save(tmp_path / "a.png")
        buffer = io.BytesIO()
        self.image(40, 50).save(buffer, "png")
        (tmp_path / "b.png").write_bytes(buffer.getvalue()[:90])
        with pytest.raises(InputError, match=r"cannot read the image .*b\.png"):
            list(open_data(tmp_path, IMAGE, Preprocess()).feeds())

    def test_the_digest_depends_on_files_and_preprocessing(self, tmp_path):
        self.image(4, 5).save(tmp_path / "a.png")
        first = open_data(tmp_path, IMAGE, Preprocess()).digest
        assert first == open_data(tmp_path, IMAGE, Preprocess()).digest
        assert first != open_data(tmp_path, IMAGE, Preprocess(scale=1)).digest
        self.image(4, 6).save(tmp_path / "a.png")
        assert first != open_data(tmp_path, IMAGE, Preprocess()).digest

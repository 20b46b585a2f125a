"""normext.cs231n.data_utils on small files in the published layout, vis_utils, and the way of the course's notebook."""

import importlib
import os
import pickle
import struct
import sys
import tracemalloc

import numpy as np
import pytest

from normext.cs231n.data_utils import get_CIFAR10_data, load_CIFAR10, load_CIFAR_batch
from normext.cs231n.vis_utils import vis_grid, vis_nn, visualize_grid

TRAINING = [f"data_batch_{i}" for i in range(1, 6)]


# --- files in the published layout ------------------------------------------------------------------------------------


def python2_pickle(value):
    """What Python 2's pickle.dumps(value, 2) gives: its str, bytes here, has an opcode that Python 3 never writes."""
    return pickle.PROTO + b"\x02" + python2_opcodes(value) + pickle.STOP


def python2_opcodes(value):
    code = python2_opcodes
    match value:
        case None:
            return pickle.NONE
        case bool():
            return pickle.NEWTRUE if value else pickle.NEWFALSE
        case int():
            return pickle.BININT + struct.pack("<i", value)
        case bytes():
            return pickle.BINSTRING + struct.pack("<i", len(value)) + value
        case tuple():
            return pickle.MARK + b"".join(map(code, value)) + pickle.TUPLE
        case list():
            return pickle.EMPTY_LIST + pickle.MARK + b"".join(map(code, value)) + pickle.APPENDS
        case dict():
            items = b"".join(code(k) + code(v) for k, v in value.items())
            return pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
    assert isinstance(value, np.ndarray) and value.dtype == np.uint8
    dtype = b"cnumpy\ndtype\n" + code((b"u1", 0, 1)) + pickle.REDUCE
    dtype += code((3, b"|", None, None, None, -1, -1, 0)) + pickle.BUILD
    array = b"cnumpy.core.multiarray\n_reconstruct\n"
    array += pickle.MARK + b"cnumpy\nndarray\n" + code((0,)) + code(b"b") + pickle.TUPLE + pickle.REDUCE
    state = code(1) + code(value.shape) + dtype + code(False) + code(value.tobytes())
    return array + pickle.MARK + state + pickle.TUPLE + pickle.BUILD


def make_batch(n, seed):
    rng = np.random.default_rng(seed)
    return {
        b"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8),
        b"labels": rng.integers(0, 10, n).tolist(),
        b"batch_label": b"a small batch",
        b"filenames": [b"image.png"] * n,
    }


@pytest.fixture
def cifar(tmp_path):
    """Five training files of 4 images each, and 6 test images: (folder, batches by file name)."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    batches = {name: make_batch(4, seed) for seed, name in enumerate(TRAINING)} | {"test_batch": make_batch(6, 9)}
    for name, batch in batches.items():
        (folder / name).write_bytes(python2_pickle(batch))
    return folder, batches


def test_load_CIFAR_batch_puts_the_colours_last(cifar):
    folder, batches = cifar
    X, Y = load_CIFAR_batch(folder / "data_batch_2")
    data = batches["data_batch_2"][b"data"]
    assert (X.shape, X.dtype, Y.dtype) == ((4, 32, 32, 3), np.float64, np.int64)
    np.testing.assert_array_equal(Y, batches["data_batch_2"][b"labels"])
    for image, row, column, colour in [(0, 0, 0, 0), (1, 5, 7, 2), (3, 31, 30, 1)]:
        assert X[image, row, column, colour] == data[image, colour * 1024 + row * 32 + column]


def test_load_CIFAR10_joins_the_training_files(cifar):
    folder, batches = cifar
    Xtr, Ytr, Xte, Yte = load_CIFAR10(str(folder))
    assert (Xtr.shape, Xte.shape) == ((20, 32, 32, 3), (6, 32, 32, 3))
    np.testing.assert_array_equal(Ytr, np.concatenate([batches[name][b"labels"] for name in TRAINING]))
    np.testing.assert_array_equal(Yte, batches["test_batch"][b"labels"])
    np.testing.assert_array_equal(Xtr[8:12], load_CIFAR_batch(folder / "data_batch_3")[0])


@pytest.mark.parametrize("subtract_mean", [True, False])
def test_get_CIFAR10_data_splits_and_centres(cifar, subtract_mean):
    folder, batches = cifar
    data = get_CIFAR10_data(13, 5, 2, subtract_mean=subtract_mean, cifar10_dir=folder)
    rows = np.concatenate([batches[name][b"data"] for name in TRAINING]).reshape(-1, 3, 32, 32).astype(float)
    labels = np.concatenate([batches[name][b"labels"] for name in TRAINING])
    mean = rows[:13].mean(axis=0) if subtract_mean else 0
    test = batches["test_batch"]
    for name, expected in {
        "X_train": rows[:13] - mean,
        "y_train": labels[:13],
        "X_val": rows[13:18] - mean,
        "y_val": labels[13:18],
        "X_test": test[b"data"][:2].reshape(-1, 3, 32, 32) - mean,
        "y_test": test[b"labels"][:2],
    }.items():
        np.testing.assert_allclose(data.pop(name), expected, rtol=1e-12, atol=1e-9, err_msg=name)
    assert not data


def test_get_CIFAR10_data_looks_where_the_course_puts_it(cifar, tmp_path, monkeypatch):
    folder, _ = cifar
    (tmp_path / "cs231n" / "datasets").mkdir(parents=True)
    folder.rename(tmp_path / "cs231n" / "datasets" / folder.name)
    monkeypatch.chdir(tmp_path)
    assert get_CIFAR10_data(4, 1, 1)["X_train"].shape == (4, 3, 32, 32)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("order", ["C", "F"])
def test_batches_written_by_python_3_are_read_too(protocol, order, tmp_path):
    batch = make_batch(3, 0)
    data = np.asarray(batch[b"data"], order=order)
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({"data": data, "labels": np.array(batch[b"labels"], ">i4")}, protocol))
    X, Y = load_CIFAR_batch(path)
    np.testing.assert_array_equal(X.transpose(0, 3, 1, 2).reshape(3, 3072), data)
    np.testing.assert_array_equal(Y, batch[b"labels"])


class Asks:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "evil, name",
    [
        (Asks(os.system, "echo evil > evil"), r"\w+\.system"),
        (Asks(eval, "open('evil', 'w')"), r"__builtin__\.eval"),
        (Asks(np.load, "x.npy", None, True), r"numpy\.load"),
        (Asks(getattr, "x", "upper"), r"__builtin__\.getattr"),
        (np.float64(1.5), r"numpy\._?core\.multiarray\.scalar"),
    ],
)
def test_a_pickle_that_asks_for_anything_else_is_refused(evil, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({**make_batch(2, 0), b"extra": evil}, 2))
    with pytest.raises(ValueError, match=rf"data_batch_1 is not a batch.*asks for {name}, which no array needs"):
        load_CIFAR_batch(path)
    assert [p.name for p in tmp_path.iterdir()] == ["data_batch_1"]


@pytest.mark.parametrize(
    "data",
    [
        np.full((2, 3072), None),  # objects
        np.zeros((2, 3072), [("a", "u1")]),
        Asks(
            np.ndarray, (2, 3072), np.dtype("u1"), bytes(2 * 3072)
        ),  # the constructor itself, which can forge pointers
        Asks(np.dtype, "O"),
    ],
)
def test_arrays_of_anything_but_whole_numbers_are_refused(data, tmp_path):
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({"data": data, "labels": [1, 2]}, 2))
    with pytest.raises(ValueError, match="data_batch_1 is not a batch of CIFAR-10"):
        load_CIFAR_batch(path)


def lists_of_lists():
    """Ten of the same list of ten of the same list ...: a number is written once, and there are 10**9."""
    code = pickle.EMPTY_LIST + pickle.BINPUT + b"\0" + pickle.MARK + 10 * (pickle.BININT1 + b"\1") + pickle.APPENDS
    for level in range(1, 9):
        items = 10 * (pickle.BINGET + bytes([level - 1]))
        code += pickle.EMPTY_LIST + pickle.BINPUT + bytes([level]) + pickle.MARK + items + pickle.APPENDS
    return code


def bytes_over_and_over():
    """A text of 10 kB, and its bytes a hundred thousand times."""
    text, code = 10_000 * b"x", b"c_codecs\nencode\n" + pickle.BINPUT + b"\0" + pickle.POP
    code += pickle.BINUNICODE + struct.pack("<I", len(text)) + text + pickle.BINUNICODE + b"\6\0\0\0latin1"
    code += pickle.TUPLE2 + pickle.BINPUT + b"\1" + pickle.POP
    return code + 100_000 * (pickle.BINGET + b"\0" + pickle.BINGET + b"\1" + pickle.REDUCE)


GREEDY = {
    "a place in memory": pickle.NONE + pickle.LONG_BINPUT + b"\xff\xff\xff\x0f",
    "bytes that are not there": pickle.BINBYTES8 + struct.pack("<Q", 1 << 32),
    "a buffer that is not there": pickle.BYTEARRAY8 + struct.pack("<Q", 1 << 32),
    "text that is not there": pickle.BINUNICODE8 + struct.pack("<Q", 1 << 32),
    "a frame that is not there": pickle.FRAME + struct.pack("<Q", 1 << 32),
    "lists of lists": pickle.EMPTY_DICT + pickle.BINUNICODE + b"\4\0\0\0data" + lists_of_lists() + pickle.SETITEM,
    "bytes over and over": bytes_over_and_over(),
    "dicts": 1_000_000 * pickle.EMPTY_DICT,
}


@pytest.mark.parametrize("name", GREEDY)
def test_a_pickle_takes_no_more_memory_than_a_batch_needs(name, tmp_path):
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.PROTO + b"\5" + GREEDY[name] + pickle.STOP)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="data_batch_1 is not a batch of CIFAR-10"):
            load_CIFAR_batch(path)
        assert tracemalloc.get_traced_memory()[1] < 3e8
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "key",
    [
        pickle.EMPTY_TUPLE + 250_000 * pickle.TUPLE1,  # whose hash crashed the process
        pickle.BININT1 + b"\1",
        pickle.NONE,
    ],
)
def test_a_pickle_with_a_dict_whose_keys_are_not_texts_is_refused(key, tmp_path):
    path = tmp_path / "data_batch_1"
    items = [
        pickle.EMPTY_DICT + key + pickle.NONE + pickle.SETITEM,
        pickle.EMPTY_DICT + pickle.MARK + key + pickle.NONE + pickle.SETITEMS,
        pickle.MARK + key + pickle.NONE + pickle.DICT,
    ]
    for code in items:
        path.write_bytes(pickle.PROTO + b"\2" + code + pickle.STOP)
        with pytest.raises(ValueError, match="data_batch_1 is not a batch.*the keys of a dict are not texts"):
            load_CIFAR_batch(path)


@pytest.mark.parametrize(
    "code",
    [
        pickle.EMPTY_SET,
        pickle.MARK + pickle.FROZENSET,
        b"cnumpy\ndtype\n" + pickle.EMPTY_TUPLE + pickle.NEWOBJ,
        b"(inumpy\ndtype\n",
        pickle.EXT1 + b"\1",
        pickle.BINFLOAT + bytes(8),
        b"c_codecs\nencode\n" + pickle.EMPTY_DICT + pickle.BUILD,  # would change a function of ours
        pickle.EMPTY_LIST + pickle.EMPTY_DICT + pickle.BUILD,
    ],
)
def test_a_pickle_with_instructions_that_no_array_needs_is_refused(code, tmp_path):
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.PROTO + b"\2" + code + pickle.STOP)
    with pytest.raises(ValueError, match="data_batch_1 is not a batch.*(no array needs; refused|is not an array)"):
        load_CIFAR_batch(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no such files")
def test_a_file_that_would_not_end_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 1 << 40)
    for name, message in {"pipe": "not a plain file", "device": "not a plain file", "huge": "more than"}.items():
        with pytest.raises(ValueError, match=f"{name} is not a batch of CIFAR-10.*{message}"):
            load_CIFAR_batch(tmp_path / name)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_damaged_pickles_end_in_no_traceback(protocol, tmp_path):
    """Bytes changed, taken out and put in: an error that names the file, or a batch."""
    path = tmp_path / "data_batch_1"
    batch = {name: value if name != b"data" else value[:, :64] for name, value in make_batch(2, 0).items()}
    whole, random = pickle.dumps(batch, protocol), np.random.default_rng(protocol)
    for _ in range(1000):
        damaged = bytearray(whole)
        for _ in range(random.integers(1, 5)):
            start = random.integers(0, len(damaged))
            damaged[start : start + random.integers(0, 4)] = random.bytes(random.integers(0, 4))
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="data_batch_1 is not a batch of CIFAR-10"):  # of 64 columns none is
            load_CIFAR_batch(path)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    path = tmp_path / "data_batch_1"
    whole = python2_pickle(make_batch(2, 0))
    for end in [0, 1, 2, 10, 40, 80, 200, len(whole) // 2, len(whole) - 30, len(whole) - 1]:
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="data_batch_1 is not a batch of CIFAR-10, or is damaged"):
            load_CIFAR_batch(path)


@pytest.mark.parametrize(
    "content", [b"\x89PNG\r\n\x1a\n" + bytes(100), b"PK\x03\x04", b"<html>Not Found</html>", b"\x80\x63"]
)
def test_a_foreign_file_is_refused(content, tmp_path):
    path = tmp_path / "test_batch"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="test_batch is not a batch of CIFAR-10"):
        load_CIFAR_batch(path)


@pytest.mark.parametrize(
    "batch, message",
    [
        ([1, 2], "it holds a list, not a dict"),
        ({b"labels": [1]}, "no entry 'data'"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [1, 2]}, "no entry 'labels'"),
        (
            {b"data": np.zeros((2, 1024), np.uint8), b"labels": [1, 2]},
            r"data must be uint8 of shape \(N, 3072\), got uint8 .*1024",
        ),
        ({b"data": np.zeros((2, 3, 1024), np.uint8), b"labels": [1, 2]}, "data must be uint8"),
        ({b"data": np.zeros((0, 3072), np.uint8), b"labels": []}, "data must be uint8"),
        ({b"data": [1, 2], b"labels": [1, 2]}, "data must be uint8"),
        (
            {b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]},
            r"labels must be 2 whole numbers, got int64 of shape \(1,\)",
        ),
        (
            {b"data": np.zeros((2, 3072), np.uint8), b"labels": [b"cat", b"dog"]},
            "labels must be an array or a list of whole",
        ),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 10]}, "labels must be from 0 to 9, got 1 to 10"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [-1, 3]}, "labels must be from 0 to 9, got -1 to 3"),
    ],
)
def test_a_batch_of_another_kind_is_refused_with_what_is_wrong(batch, message, tmp_path):
    path = tmp_path / "data_batch_1"
    path.write_bytes(python2_pickle(batch))
    with pytest.raises(ValueError, match=f"data_batch_1 is not a batch.*{message}"):
        load_CIFAR_batch(path)


def test_a_missing_folder_says_what_to_download_and_where_to_put_it(tmp_path):
    missing = tmp_path / "cifar-10-batches-py"
    for load in (load_CIFAR10, lambda folder: get_CIFAR10_data(cifar10_dir=folder)):
        with pytest.raises(FileNotFoundError) as error:
            load(missing)
        message = str(error.value)
        assert str(missing / "data_batch_1") in message
        assert "CIFAR-10 python version" in message
        assert "https://www.cs.toronto.edu/~kriz/cifar.html" in message


@pytest.mark.parametrize(
    "counts, message",
    [
        ((19, 2, 1), r"^num_training \+ num_validation must be at most 20, .*got 19 \+ 2"),
        ((10, 5, 7), "^num_test must be at most 6, .*got 7"),
        ((0, 5, 1), "^num_training must be at least 1"),
        ((5, -1, 1), "^num_training must be at least 1, num_validation and num_test at least 0, got 5, -1 and 1"),
    ],
)
def test_get_CIFAR10_data_refuses_counts_that_cannot_be(cifar, counts, message):
    with pytest.raises(ValueError, match=message):
        get_CIFAR10_data(*counts, cifar10_dir=cifar[0])


# --- vis_utils --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, 1, 3])
def test_visualize_grid_places_and_stretches_every_image_by_itself(padding):
    images = np.random.default_rng(0).standard_normal((5, 2, 4, 3)) * np.arange(1, 6)[:, None, None, None]
    grid = visualize_grid(images, ubound=100.0, padding=padding)
    assert grid.shape == (3 * 2 + 2 * padding, 3 * 4 + 2 * padding, 3)
    for i, image in enumerate(images):
        top, left = i // 3 * (2 + padding), i % 3 * (4 + padding)
        part = grid[top : top + 2, left : left + 4].copy()
        np.testing.assert_allclose(part, 100 * (image - image.min()) / (image.max() - image.min()), atol=1e-12)
        grid[top : top + 2, left : left + 4] = 0
    assert not grid.any()


def test_visualize_grid_of_one_colour_is_black():
    assert not visualize_grid(np.full((4, 2, 2, 3), 7.0)).any()


def test_vis_grid_stretches_all_images_together():
    images = np.arange(2 * 2 * 3).reshape(2, 2, 3, 1)
    expected = np.zeros((6, 8))
    expected[:2, :3], expected[:2, 4:7] = images[0, ..., 0] / 11, images[1, ..., 0] / 11
    np.testing.assert_allclose(vis_grid(images)[..., 0], expected)


def test_vis_nn_lays_rows_out_as_they_are_given():
    rows = [[np.full((1, 2, 3), 10 * r + c) for c in range(3)] for r in range(2)]
    expected = np.zeros((4, 9))
    for r in range(2):
        for c in range(3):
            expected[2 * r, 3 * c : 3 * c + 2] = (10 * r + c) / 12
    for channel in np.moveaxis(vis_nn(rows), -1, 0):
        np.testing.assert_allclose(channel, expected)


@pytest.mark.parametrize("show", [visualize_grid, vis_grid])
@pytest.mark.parametrize("shape", [(2, 3, 3), (0, 3, 3, 1)])
def test_grids_refuse_what_is_not_images(show, shape):
    with pytest.raises(ValueError, match=r"^the images must have the shape \(N, H, W, C\)"):
        show(np.zeros(shape))


def test_vis_nn_refuses_rows_of_different_lengths():
    image = np.zeros((2, 2, 3))
    with pytest.raises(ValueError, match=r"^rows must hold as many images each, got \[2, 1\]"):
        vis_nn([[image, image], [image]])
    with pytest.raises(ValueError, match="^rows must hold as many images each"):
        vis_nn([])


# --- the course's way -------------------------------------------------------------------------------------------------

STUDENT_MODULES = [
    "layers",
    "layer_utils",
    "fast_layers",
    "im2col",
    "im2col_cython",
    "classifiers/fc_net",
    "classifiers/cnn",
    "solver",
    "optim",
    "gradient_check",
    "data_utils",
    "vis_utils",
]


@pytest.fixture
def student_package(cifar, tmp_path, monkeypatch):
    """A package cs231n in which every module is one line, and the working directory of its notebooks."""
    root = tmp_path / "cs231n"
    (root / "classifiers").mkdir(parents=True)
    for name in STUDENT_MODULES:
        (root / f"{name}.py").write_text(f"from normext.cs231n.{name.replace('/', '.')} import *\n")
    for folder in (root, root / "classifiers"):
        (folder / "__init__.py").write_text("")
    (root / "datasets").mkdir()
    cifar[0].rename(root / "datasets" / cifar[0].name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "cs231n"]:
        del sys.modules[name]


def relative_error(a, b):
    return np.max(np.abs(a - b) / np.maximum(1e-8, np.abs(a) + np.abs(b)))


def test_notebook_on_batch_normalization_layer_by_layer(student_package):
    layers = importlib.import_module("cs231n.classifiers.fc_net")  # the notebooks star-import the layers from here
    gradient_check = importlib.import_module("cs231n.gradient_check")

    np.random.seed(231)
    a = np.maximum(0, np.random.randn(200, 50) @ np.random.randn(50, 60)) @ np.random.randn(60, 3)
    out, _ = layers.batchnorm_forward(a, np.asarray([1.0, 2.0, 3.0]), np.asarray([11.0, 12.0, 13.0]), {"mode": "train"})
    np.testing.assert_allclose(out.mean(axis=0), [11, 12, 13])
    np.testing.assert_allclose(out.std(axis=0), [1, 2, 3], rtol=1e-6)

    bn_param = {"mode": "train"}
    for _ in range(50):
        layers.batchnorm_forward(np.random.randn(200, 3) + 3, np.ones(3), np.zeros(3), bn_param)
    bn_param["mode"] = "test"
    out, _ = layers.batchnorm_forward(np.random.randn(200, 3) + 3, np.ones(3), np.zeros(3), bn_param)
    assert np.abs(out.mean(axis=0)).max() < 0.3

    x, (gamma, beta), dout = 5 * np.random.randn(4, 5) + 12, np.random.randn(2, 5), np.random.randn(4, 5)

    def check(forward, backward, param):
        gradient = gradient_check.eval_numerical_gradient_array
        dx = gradient(lambda x: forward(x, gamma, beta, param)[0], x, dout)
        dgamma = gradient(lambda a: forward(x, a, beta, param)[0], gamma.copy(), dout)
        dbeta = gradient(lambda b: forward(x, gamma, b, param)[0], beta.copy(), dout)
        _, cache = forward(x, gamma, beta, param)
        for numerical, analytic in zip((dx, dgamma, dbeta), backward(dout, cache), strict=True):
            assert relative_error(numerical, analytic) < 1e-7

    check(layers.batchnorm_forward, layers.batchnorm_backward, {"mode": "train"})
    check(layers.batchnorm_forward, layers.batchnorm_backward_alt, {"mode": "train"})
    check(layers.layernorm_forward, layers.layernorm_backward, {})


@pytest.mark.parametrize("normalization", ["batchnorm", "layernorm", None])
def test_notebook_on_batch_normalization_net_by_net(normalization, student_package, capsys):
    fc_net, solver_module = (
        importlib.import_module("cs231n.classifiers.fc_net"),
        importlib.import_module("cs231n.solver"),
    )
    data = importlib.import_module("cs231n.data_utils").get_CIFAR10_data(num_training=12, num_validation=6, num_test=2)
    np.random.seed(231)
    net = fc_net.FullyConnectedNet([50, 50], weight_scale=2e-2, normalization=normalization)
    solver = solver_module.Solver(
        net,
        data,
        num_epochs=10,
        batch_size=5,
        update_rule="adam",
        optim_config={"learning_rate": 10 ** (-3.5)},
        verbose=True,
        print_every=20,
    )
    solver.train()
    assert len(solver.loss_history) == 20
    assert np.mean(solver.loss_history[-5:]) < np.mean(solver.loss_history[:5])
    assert len(solver.train_acc_history) == len(solver.val_acc_history) == 11
    assert max(solver.train_acc_history) > 0.5
    assert np.argmax(net.loss(data["X_test"]), axis=1).shape == (2,)
    assert capsys.readouterr().out.startswith("(Iteration 1 / 20) loss: ")


def test_notebook_on_convolutional_networks(student_package):
    cnn = importlib.import_module("cs231n.classifiers.cnn")  # the notebook star-imports the layers from here too
    data = importlib.import_module("cs231n.data_utils").get_CIFAR10_data(num_training=12, num_validation=6, num_test=2)
    np.random.seed(231)
    net = cnn.ThreeLayerConvNet(weight_scale=1e-2)
    solver = importlib.import_module("cs231n.solver").Solver(
        net,
        data,
        num_epochs=10,
        batch_size=6,
        update_rule="adam",
        optim_config={"learning_rate": 1e-3},
        verbose=False,
    )
    solver.train()
    assert max(solver.train_acc_history) > 0.5
    filters = net.params["W1"].transpose(0, 2, 3, 1)
    grid = importlib.import_module("cs231n.vis_utils").visualize_grid(filters)
    assert grid.shape == (47, 47, 3)  # six filters of 7 pixels each way, and 5 gaps

    x, w, b = np.random.randn(10, 3, 31, 31), np.random.randn(5, 3, 3, 3), np.random.randn(5)
    conv_param = {"stride": 2, "pad": 1}
    out, cache = cnn.conv_forward_naive(x, w, b, conv_param)
    fast_out, fast_cache = cnn.conv_forward_fast(x, w, b, conv_param)
    assert relative_error(out, fast_out) < 1e-9
    gradients, fast = cnn.conv_backward_naive(out, cache), cnn.conv_backward_fast(out, fast_cache)
    assert max(map(relative_error, gradients, fast)) < 1e-9


@pytest.mark.parametrize(
    "name, some",
    [
        ("layers", {"affine_forward", "batchnorm_backward_alt", "layernorm_backward", "svm_loss", "dropout_backward"}),
        ("layers", {"conv_forward_naive", "max_pool_backward_naive", "spatial_batchnorm_forward"}),
        ("layers", {"spatial_groupnorm_forward", "spatial_groupnorm_backward"}),
        ("layer_utils", {"affine_relu_backward", "affine_norm_relu_forward"}),
        ("layer_utils", {"conv_relu_forward", "conv_bn_relu_backward", "conv_relu_pool_forward"}),
        ("fast_layers", {"conv_forward_fast", "conv_backward_im2col", "conv_forward_strides"}),
        ("fast_layers", {"max_pool_forward_fast", "max_pool_backward_reshape", "max_pool_forward_im2col"}),
        ("im2col", {"get_im2col_indices", "im2col_indices", "col2im_indices"}),
        ("im2col_cython", {"im2col_cython", "col2im_cython", "col2im_6d_cython"}),
        ("classifiers.cnn", {"ThreeLayerConvNet", "conv_forward_naive", "conv_forward_fast", "conv_relu_pool_forward"}),
        ("classifiers.fc_net", {"FullyConnectedNet", "TwoLayerNet", "batchnorm_forward", "affine_relu_forward"}),
        ("solver", {"Solver"}),
        ("optim", {"sgd", "sgd_momentum", "rmsprop", "adam"}),
        ("gradient_check", {"eval_numerical_gradient", "eval_numerical_gradient_array", "grad_check_sparse"}),
        ("data_utils", {"get_CIFAR10_data", "load_CIFAR10", "load_CIFAR_batch"}),
        ("vis_utils", {"visualize_grid", "vis_grid", "vis_nn"}),
    ],
)
def test_star_import_gives_the_courses_names_and_no_others(name, some, student_package):
    public = {name for name in vars(importlib.import_module(f"cs231n.{name}")) if not name.startswith("__")}
    assert some <= public
    assert public == set(importlib.import_module(f"normext.cs231n.{name}").__all__)

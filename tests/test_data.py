import functools
import gzip
import hashlib
import http.server
import io
import pickle
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from vardrop.data import Data, dataset, download, listing, load, places, split_validation
from vardrop.data.places import IDX_FILES


def idx(array: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, files: tuple[str, ...] = IDX_FILES, rows: int = 6, seed: int = 0) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    arrays = {}
    for file in files:
        arrays[file] = rng.integers(0, 256, (rows, 28, 28)) if "images" in file else rng.integers(0, 10, rows)
        (folder / file).write_bytes(gzip.compress(idx(arrays[file])))
    return arrays


def write_uci(folder: Path, rows: np.ndarray, splits: list[tuple[list[int], list[int]]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.savetxt(folder / "data.txt", rows)
    np.savetxt(folder / "index_features.txt", np.arange(rows.shape[1] - 1))
    np.savetxt(folder / "index_target.txt", [rows.shape[1] - 1])
    (folder / "n_splits.txt").write_text(f"{len(splits)}\n")
    for k, (train, test) in enumerate(splits):
        np.savetxt(folder / f"index_train_{k}.txt", train)
        np.savetxt(folder / f"index_test_{k}.txt", test)


@pytest.fixture
def only(tmp_path, monkeypatch) -> Path:
    """A root that is the only place where anything can be found."""
    monkeypatch.setenv("VARDROP_DATA", "")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(places.pooch, "os_cache", lambda name: tmp_path / "cache" / name)
    root = tmp_path / "root"
    root.mkdir()
    return root


@pytest.fixture
def yacht(only) -> Path:
    rng = np.random.default_rng(0)
    rows = rng.normal(3, 2, (10, 4))
    rows[:, 1] = 0.1 + 0.2  # constant, and no round number
    write_uci(only / "uci/yacht", rows, [(list(range(2, 10)), [0, 1]), (list(range(8)), [9, 8])])
    return only / "uci/yacht"


@pytest.fixture
def sheet(tmp_path):
    """Writes a CSV file and gives its name."""

    def write(text: str | bytes) -> str:
        path = tmp_path / "sheet.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


# Digits


def test_digits_are_all_there_once_and_split_in_every_class():
    data = load("digits")
    assert (data.task, data.images, data.shape, data.outputs) == ("classification", True, (1, 8, 8), 10)
    assert data.train_x.dtype == torch.float32
    assert data.train_y.dtype == torch.int64
    assert data.train_x.min() == 0
    assert data.train_x.max() == 1
    rows = torch.cat([data.train_x, data.test_x]).flatten(1) * 16
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, load_digits().data.tolist()))
    share = data.test_y.bincount() / (data.train_y.bincount() + data.test_y.bincount())
    torch.testing.assert_close(share, torch.full((10,), 0.2), atol=0.01, rtol=0)


def test_a_split_is_a_seed_of_digits():
    first, again, other = load("digits"), load("digits"), load("digits", split=1)
    assert torch.equal(first.test_x, again.test_x)
    assert not torch.equal(first.test_x, other.test_x)


# The format of MNIST


def test_idx_files_are_read_as_written(only):
    arrays = write_idx(only / "mnist")
    data = load("mnist", only)
    assert data.shape == (1, 28, 28)
    pixels = (data.train_x * 255).round().to(torch.uint8).squeeze(1).numpy()
    assert (pixels == arrays["train-images-idx3-ubyte.gz"]).all()
    assert (data.test_y.numpy() == arrays["t10k-labels-idx1-ubyte.gz"]).all()


def test_notmnist_has_a_test_half_only(only):
    write_idx(only / "notmnist", IDX_FILES[2:])
    data = load("notmnist", only)
    assert (len(data.train_x), len(data.test_x), data.shape) == (0, 6, (1, 28, 28))
    assert data.classes == tuple("ABCDEFGHIJ")
    with pytest.raises(ValueError, match="at least one of the 0 training rows of notMNIST"):
        split_validation(data, 1, seed=0)
    write_idx(only / "notmnist")
    assert len(load("notmnist", only).train_x) == 6


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<html>not here</html>", "must be a whole gzip file, got one that breaks"),
        (gzip.compress(idx(np.zeros((6, 28, 28))))[:-20], "must be a whole gzip file, got one that breaks"),
        (gzip.compress(b""), "must be an idx file of rank 3, which starts with 00000803, got an empty file"),
        (gzip.compress(idx(np.zeros(6))), "must be an idx file of rank 3, .* got 00000801; get it anew"),
        (gzip.compress(b"PK\3\4 something else"), "must be an idx file of rank 3, .* got 504b0304"),
        (gzip.compress(idx(np.zeros((6, 28, 28)))[:-5]), "must have 6 × 28 × 28 bytes after its header, got 4699"),
        (gzip.compress(idx(np.zeros((6, 28, 28)))[:10]), "bytes after its header"),
        (gzip.compress(idx(np.zeros((6, 27, 28)))), "must have images of 28 × 28, got 27 × 28"),
        (gzip.compress(idx(np.zeros((5, 28, 28)))), "a label from 0 to 9 for each of 5 images, got 6 labels"),
    ],
)
def test_broken_and_foreign_images(only, content, words):
    write_idx(only / "mnist")
    (only / "mnist/train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(ValueError, match=rf"vardrop\.data: .*{words}"):
        load("mnist", only)


def test_a_corrupt_byte_is_noticed(only):
    write_idx(only / "mnist")
    path = only / "mnist/t10k-images-idx3-ubyte.gz"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 255
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="must be a whole gzip file"):
        load("mnist", only)


def test_labels_beyond_nine(only):
    write_idx(only / "mnist")
    (only / "mnist/train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.array([1, 2, 3, 4, 5, 10]))))
    with pytest.raises(ValueError, match="a label from 0 to 9 for each of 6 images, got 6 labels up to 10"):
        load("mnist", only)


# CIFAR-10


def jpeg(colour: tuple[int, int, int], size: int = 32) -> np.ndarray:
    file = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(file, "JPEG", quality=75)
    return np.frombuffer(file.getvalue(), np.uint8)


def write_jpeg(folder: Path, files: list[np.ndarray], **changed: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for half in ("train", "test"):
        arrays[f"jpeg_{half}"] = np.concatenate(files)
        arrays[f"offset_{half}"] = np.cumsum([0, *map(len, files)])
        arrays[f"y_{half}"] = np.arange(len(files), dtype=np.uint8)
    np.savez(folder / "cifar10_jpeg.npz", **(arrays | changed))


def test_jpeg_says_so_and_has_its_colours(only):
    write_jpeg(only / "cifar10", [jpeg((255, 0, 0)), jpeg((0, 0, 255))])
    data = load("cifar10", only)
    assert data.name == "CIFAR-10 (JPEG q75)"
    assert data.shape == (3, 32, 32)
    torch.testing.assert_close(data.train_x.mean((2, 3)), torch.tensor([[1.0, 0, 0], [0, 0, 1]]), atol=0.02, rtol=0)
    assert {found.name: found.what for found in listing(only)}["cifar10"].endswith(" (JPEG q75)")


@pytest.mark.parametrize(
    "changed",
    [
        {"jpeg_train": np.zeros(900, np.uint8)},
        {"y_test": np.zeros(5, np.uint8)},
        {"jpeg_test": np.array([None, 1], object)},
    ],
)
def test_jpeg_arrays_that_break(only, changed):
    write_jpeg(only / "cifar10", [jpeg((255, 0, 0)), jpeg((0, 0, 255))], **changed)
    with pytest.raises(ValueError, match=r"must have CIFAR-10 as JPEG files.*that breaks"):
        load("cifar10", only)


def test_jpeg_of_another_size_and_no_archive_at_all(only):
    write_jpeg(only / "cifar10", [jpeg((255, 0, 0), size=16)])
    with pytest.raises(ValueError, match="must have CIFAR-10 as JPEG files"):
        load("cifar10", only)
    (only / "cifar10/cifar10_jpeg.npz").write_bytes(b"PK\3\4 torn")
    with pytest.raises(ValueError, match="must have CIFAR-10 as JPEG files"):
        load("cifar10", only)


def write_archive(folder: Path, names: list[str], make=None) -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(0).integers(0, 256, (len(names), 3, 3, 32, 32), dtype=np.uint8)
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as archive:
        for i, name in enumerate(names):
            batch = {b"data": images[i].reshape(3, 3072), b"labels": [i, 1, 9]}
            raw = pickle.dumps(batch if make is None else make(batch), protocol=2)
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(raw)
            archive.addfile(entry, io.BytesIO(raw))
    return images


BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def test_the_original_archive_is_preferred_and_read_in_its_order(only):
    write_jpeg(only / "cifar10", [jpeg((255, 0, 0))])
    images = write_archive(only / "cifar10", BATCHES)
    data = load("cifar10", only)
    assert data.name == "CIFAR-10"
    assert data.train_y.tolist() == [0, 1, 9, 1, 1, 9, 2, 1, 9, 3, 1, 9, 4, 1, 9]
    pixels = (torch.cat([data.train_x, data.test_x]) * 255).round().to(torch.uint8).numpy()
    assert (pixels == images.reshape(18, 3, 32, 32)).all()


class Evil:
    def __reduce__(self):
        return Path.write_text, (Path("pwned"), "by a pickle")


def test_an_archive_cannot_run_code(only):
    write_archive(only / "cifar10", BATCHES, lambda batch: batch | {b"extra": Evil()})
    with pytest.raises(
        ValueError, match=r"must be CIFAR-10's archive .* that breaks \(it asks for __builtin__.getattr\)"
    ):
        load("cifar10", only)
    assert not Path("pwned").exists()


@pytest.mark.parametrize("broken", ["short", "torn", "foreign", "empty"])
def test_an_archive_that_breaks(only, broken):
    write_archive(
        only / "cifar10",
        BATCHES[:3] if broken == "short" else BATCHES,
        (lambda _: [1]) if broken == "foreign" else None,
    )
    path = only / "cifar10/cifar-10-python.tar.gz"
    path.write_bytes(path.read_bytes()[: {"torn": 9000, "empty": 0}.get(broken)])
    with pytest.raises(ValueError, match="must be CIFAR-10's archive for Python, got one that breaks"):
        load("cifar10", only)


# UCI


def test_uci_is_standardised_by_its_training_rows(yacht, only):
    raw = np.loadtxt(yacht / "data.txt")
    data = load("uci:yacht", only)
    assert (data.task, data.outputs, data.images, data.classes) == ("regression", 1, False, ())
    expected = (raw[:2, [0, 2]] - raw[2:, [0, 2]].mean(0)) / raw[2:, [0, 2]].std(0)
    torch.testing.assert_close(data.test_x[:, [0, 2]], torch.tensor(expected, dtype=torch.float32))
    assert (data.train_x[:, 1] == 0).all()
    assert (data.test_x[:, 1] == 0).all()
    told = data.scaling.told()
    np.testing.assert_allclose(np.array(told["mean"]), raw[2:, :3].mean(0))
    assert told["std"] == [pytest.approx(raw[2:, 0].std()), None, pytest.approx(raw[2:, 2].std())]
    torch.testing.assert_close(data.test_y, torch.tensor(raw[:2, 3], dtype=torch.float32))
    assert torch.equal(load("uci:yacht", only, split=1).test_y, torch.tensor(raw[[9, 8], 3], dtype=torch.float32))


def test_a_split_out_of_range(yacht, only):
    with pytest.raises(ValueError, match="split of uci:yacht must be from 0 to 1, got 2"):
        load("uci:yacht", only, split=2)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("data.txt", "1 2 3\n4 5\n", "must have numbers set apart by blanks, got others"),
        ("data.txt", "1 2 x 4\n", "must have numbers set apart by blanks, got others"),
        ("data.txt", "\0\xff", "must have numbers set apart by blanks, got others"),
        ("data.txt", "1 2 nan 4\n", "must have finite numbers, a row a line, got shape .* with 1 that are not finite"),
        ("data.txt", "", "must have finite numbers, a row a line, got shape"),
        ("n_splits.txt", "", "must have finite numbers, one a line"),
        ("index_target.txt", "2\n3\n", "must have one target column, which is no feature, got target .2, 3."),
        ("index_target.txt", "2\n", "must have one target column, which is no feature, got target .2. and features"),
        ("index_features.txt", "0\n7\n", "must have different whole numbers from 0 to 3, got others"),
        ("index_train_0.txt", "2\n2\n", "must have different whole numbers from 0 to 9, got others"),
        ("index_train_0.txt", "2.5\n", "must have different whole numbers from 0 to 9, got others"),
        ("index_train_0.txt", "-1\n", "must have different whole numbers from 0 to 9, got others"),
        ("index_train_0.txt", "0\n3\n", "must have no row in both halves"),
    ],
)
def test_uci_files_that_break(yacht, only, file, text, words):
    (yacht / file).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"vardrop\.data: .*{words}"):
        load("uci:yacht", only)


def test_a_uci_split_without_its_file(yacht, only):
    (yacht / "index_test_1.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"there must be a file .*index_test_1.txt, got none"):
        load("uci:yacht", only, split=1)


def test_a_uci_folder_of_ones_own(yacht, only):
    yacht.rename(yacht.with_name("mine"))
    assert load("uci:mine", only).name == "UCI mine"
    for name in ("his", "../uci/mine", ""):
        with pytest.raises(
            FileNotFoundError, match=r"must be uci:bostonHousing, .*, or a folder in one of .*, got 'uci:"
        ):
            load(f"uci:{name}", only)


# CSV


def rows(count: int, target) -> str:
    return "".join(f"{i},{i % 3 - 0.5},{target(i)}\n" for i in range(count))


def test_a_quantity_and_a_header(sheet):
    plain = load(sheet(rows(50, lambda i: i / 2)))
    assert (plain.name, plain.task, plain.outputs, plain.shape) == ("sheet", "regression", 1, (2,))
    assert (len(plain.train_x), len(plain.test_x)) == (40, 10)
    torch.testing.assert_close(plain.train_x.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(plain.train_x.std(0, correction=0), torch.ones(2))
    assert sorted([*plain.train_y.tolist(), *plain.test_y.tolist()]) == [i / 2 for i in range(50)]
    headed = load(sheet("a,b,y\n" + rows(50, lambda i: i / 2)))
    assert torch.equal(plain.train_x, headed.train_x)
    assert not torch.equal(plain.test_y, load(sheet(rows(50, lambda i: i / 2)), split=3).test_y)


@pytest.mark.parametrize(
    ("target", "classes"),
    [
        (lambda i: ["cat", "dog"][i % 2], ("cat", "dog")),
        (lambda i: i % 3 + 5, ("5", "6", "7")),
        (lambda i: i % 2 - 1.0, ("-1", "0")),
        (lambda i: i % 20, tuple(str(i) for i in range(20))),
        (lambda i: i % 21, ()),
        (lambda i: i % 2 + 0.5, ()),
    ],
)
def test_what_is_a_class(sheet, target, classes):
    data = load(sheet(rows(100, target)))
    assert data.classes == classes
    assert data.outputs == max(1, len(classes))
    if classes:
        assert data.train_y.dtype == torch.int64
        assert data.test_y.unique().tolist() == list(range(len(classes)))
    else:
        assert data.train_y.dtype == torch.float32


def test_few_rows_of_integers_are_quantities(sheet):
    assert load(sheet(rows(10, lambda i: i))).task == "regression"


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_delimiters_quotes_and_marks(sheet, delimiter):
    text = "\ufeff" + delimiter.join(['"a"', '"the b"', "y"]) + "\r\n\r\n"
    text += "".join(delimiter.join([f" {i}", f'"{i * i}"', "yes" if i % 2 else "no"]) + "\r\n" for i in range(10))
    data = load(sheet(text))
    assert data.classes == ("no", "yes")
    assert len(data.train_x) + len(data.test_x) == 10


def test_a_constant_feature_is_zero(sheet):
    data = load(sheet("".join(f"0.1,{i},{i / 3}\n" for i in range(10))))
    assert (torch.cat([data.train_x, data.test_x])[:, 0] == 0).all()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must have rows, got an empty file"),
        ("\n\n", "must have rows, got an empty file"),
        ("1\n2\n3\n4\n5\n6\n", "must have at least two columns, .* got one"),
        ("a b c\n1 2 3\n", "must have at least two columns, .* got one"),
        ("a,b\n1,2\n3,4\n", "must have at least 5 rows below its header, got 2"),
        (rows(9, lambda i: i) + "1,2\n", "must have 3 cells, got 2 in line 10"),
        (rows(9, lambda i: i) + "1,nan,2\n", "finite numbers, got 'nan' in line 10, column 2"),
        (rows(9, lambda i: i) + "1,,2\n", "finite numbers, got '' in line 10, column 2"),
        (rows(9, lambda i: i) + "inf,1,2\n", "finite numbers, got 'inf' in line 10, column 1"),
        (rows(9, lambda i: i) + "1_0,1,2\n", "finite numbers, got '1_0' in line 10, column 1"),
        ("a,b,y\nred,1,2\n" + rows(9, lambda i: i), "finite numbers, got 'red' in line 2, column 1"),
        ("1,red,2\n" + rows(9, lambda i: i), "finite numbers, got 'red' in line 1, column 2"),
        (rows(9, lambda i: i / 2) + "1,2,\n", "the target .* must be given and finite in every row, got '' in line 10"),
        (rows(9, lambda i: i / 2) + "1,2,nan\n", "must be given and finite in every row, got 'nan' in line 10"),
        (rows(9, lambda i: i / 2) + "1,2,dog\n", "must be all numbers or all text, got both: 'dog' in line 10"),
        (rows(9, lambda i: "cat"), "at least two classes of at least two rows each, got 1 of which 'cat' has 9"),
        (rows(9, lambda i: 4), "at least two classes of at least two rows each, got 1 of which '4' has 9"),
        (rows(9, lambda i: "cat" if i else "dog"), "at least two rows each, got 2 of which 'dog' has 1"),
        (rows(9, lambda i: f"2020-01-0{i + 1}"), "at least two rows each, got 9 of which '2020-01-01' has 1"),
        (rows(9, lambda i: f"{i}.5e40"), "must fit float32"),
        (b"\xff\xfe\0\0\x93NUMPY", "must be a CSV file in UTF-8, got another"),
        ('1,2,"3\n' + rows(9, lambda i: i), "must be a CSV file in UTF-8, got another"),
    ],
)
def test_tables_that_break(sheet, text, words):
    with pytest.raises(ValueError, match=rf"vardrop\.data: .*{words}"):
        load(sheet(text))


def test_huge_numbers_are_no_harm_in_features(sheet):
    data = load(sheet("".join(f"{i}e300,{i}e-300,{i / 3}\n" for i in range(1, 20))))
    torch.testing.assert_close(data.train_x[:, 0], data.train_x[:, 1])
    torch.testing.assert_close(data.train_x.std(0, correction=0), torch.ones(2))


def test_no_such_table(only):
    with pytest.raises(FileNotFoundError, match=r"there must be a file nowhere\.csv, got none \(seen from "):
        load("nowhere.csv")


# Names and places


def test_unknown_names():
    with pytest.raises(ValueError, match=r"name must be digits, mnist, .* got 'minst'; did you mean mnist\?"):
        load("minst")
    with pytest.raises(ValueError, match=r"name must be .* got 'table\.xlsx'$"):
        load("table.xlsx")


@pytest.mark.parametrize("split", [-1, True, 0.5])
def test_splits_are_counted_from_zero(split):
    with pytest.raises(ValueError, match="split must be a whole number from 0 on, got"):
        load("digits", split=split)


def test_sets_with_one_split(only):
    with pytest.raises(ValueError, match="split of mnist must be 0, for it has one standard split, got 1"):
        load("mnist", only, split=1)


def test_the_first_root_that_has_it_is_read(only, tmp_path, monkeypatch):
    told = tmp_path / "told"
    monkeypatch.setenv("VARDROP_DATA", str(told))
    for rows_, (root, place) in enumerate(
        [(None, tmp_path / "cache/vardrop"), (None, tmp_path / "data"), (None, told), (only, only)], start=1
    ):
        write_idx(place / "mnist", rows=rows_)
        assert len(load("mnist", root).test_x) == rows_
        assert {found.name: found.where for found in listing(root)}["mnist"] == place / "mnist"


def test_what_is_missing_is_said_with_where_it_looked_and_how_to_get_it(only):
    write_idx(only / "mnist", IDX_FILES[1:])
    with pytest.raises(FileNotFoundError) as error:
        load("mnist", only)
    words = str(error.value)
    assert f"{only / 'mnist'} (has no train-images-idx3-ubyte.gz)" in words
    assert str(Path.cwd() / "data/mnist") in words
    assert "https://" in words
    assert "VARDROP_DATA" in words
    with pytest.raises(
        FileNotFoundError, match=r"in a folder that is looked at, got none in .*take UCI_Datasets/yacht/data"
    ):
        load("uci:yacht", only)


def test_listing_says_how_to_get_everything(only):
    lines = listing(only)
    names = {"digits", "mnist", "fashion-mnist", "cifar10", "notmnist", "uci:yacht", "tinyshakespeare"}
    assert names <= {found.name for found in lines}
    assert [found.name for found in lines if found.where is not None] == ["digits"]
    assert lines[0].where.is_file()
    assert all(found.how and found.what for found in lines)
    (only / "text").mkdir()
    (only / "text/tinyshakespeare.txt").write_text("To be")
    assert listing(only)[-1].where == only / "text/tinyshakespeare.txt"


# Download


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A web server with four small files, and a source whose mirrors are: nobody, a wrong folder of it, and it."""
    folder = tmp_path / "mirror"
    write_idx(folder, rows=3)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}/"
    md5 = {file: hashlib.md5(gzip.decompress((folder / file).read_bytes())).hexdigest() for file in IDX_FILES}
    source = places.Source("small", "mnist", (IDX_FILES,), ("http://127.0.0.1:9/", address + "gone/", address), md5)
    monkeypatch.setitem(places.SOURCES, "mnist", source)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield folder
    server.shutdown()
    thread.join()
    server.server_close()


def test_download_passes_a_dead_mirror_and_checks_the_content_not_the_wrapping(mirror, only):
    path = mirror / IDX_FILES[0]
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), mtime=12345))
    assert download("mnist", only) == only / "mnist"
    assert len(load("mnist", only).train_x) == 3
    assert sorted(p.name for p in (only / "mnist").iterdir()) == sorted(IDX_FILES)  # nothing left over


def test_download_replaces_what_is_broken_and_keeps_what_is_right(mirror, only):
    download("mnist", only)
    kept, broken = only / "mnist" / IDX_FILES[0], only / "mnist" / IDX_FILES[1]
    before = kept.stat().st_mtime_ns
    broken.write_bytes(broken.read_bytes()[:20])
    download("mnist", only)
    assert kept.stat().st_mtime_ns == before
    assert len(load("mnist", only).train_y) == 3


def test_a_file_with_another_content_is_refused(mirror, only):
    (mirror / IDX_FILES[0]).write_bytes(gzip.compress(idx(np.zeros((3, 28, 28)))))
    with pytest.raises(
        ConnectionError,
        match=r"a mirror must give train-images.* got nothing from .*:9/.*Error.*gone/.*checksum is wrong.*put it in",
    ):
        download("mnist", only)
    assert list((only / "mnist").iterdir()) == []


@pytest.mark.parametrize("name", ["digits", "notmnist", "uci:yacht", "nonsense"])
def test_what_cannot_be_downloaded(name, only):
    with pytest.raises(ValueError, match=r"download: name must be one of mnist, fashion-mnist, cifar10, got "):
        download(name, only)


# Validation


def numbered(count: int = 100) -> Data:
    x = torch.arange(count, dtype=torch.float32)[:, None]
    return Data("numbered", "regression", x, x[:, 0].clone(), -x - 1, -x[:, 0] - 1)


@pytest.mark.parametrize(("size", "expected"), [(10, 10), (0.1, 10), (99, 99), (0.255, 26)])
def test_validation_is_a_partition_of_the_training_rows(size, expected):
    data = numbered()
    rest, x, y = split_validation(data, size, seed=0)
    assert len(x) == len(y) == expected
    assert torch.equal(torch.cat([rest.train_x, x]).sort(0).values, data.train_x)
    assert torch.equal(x[:, 0], y)
    assert torch.equal(rest.train_x[:, 0], rest.train_y)
    assert rest.test_x is data.test_x
    assert rest.test_y is data.test_y


def test_validation_is_chosen_by_the_seed_alone():
    torch.manual_seed(1)
    first = split_validation(numbered(), 10, seed=0)[1]
    torch.manual_seed(2)
    assert torch.equal(first, split_validation(numbered(), 10, seed=0)[1])
    assert not torch.equal(first, split_validation(numbered(), 10, seed=1)[1])


def test_every_row_is_as_likely_to_be_set_aside():
    """200 seeds of 20 out of 100: counts are binomial, mean 40, standard deviation 5.7."""
    counts = torch.zeros(100)
    for seed in range(200):
        counts[split_validation(numbered(), 20, seed)[1][:, 0].long()] += 1
    assert (counts - 40).abs().max() < 5 * 5.7


@pytest.mark.parametrize("size", [0, 100, -1, 0.001, 0.999])
def test_validation_leaves_rows_on_either_side(size):
    with pytest.raises(
        ValueError, match="size must leave at least one of the 100 training rows of numbered on either side"
    ):
        split_validation(numbered(), size, seed=0)


@pytest.mark.parametrize("size", [0.0, 1.0, -0.5, float("nan")])
def test_a_share_is_between_zero_and_one(size):
    with pytest.raises(ValueError, match="size must be above 0 and below 1 as a share, got"):
        split_validation(numbered(), size, seed=0)


@pytest.mark.parametrize("size", [True, "10", None])
def test_size_is_a_number(size):
    with pytest.raises(TypeError, match="size must be a number of rows or a share of them, got"):
        split_validation(numbered(), size, seed=0)


def test_partition_leaves_every_class_on_either_side():
    labels = np.array([0] * 50 + [1] * 2 + [2] * 3)
    train, test = dataset.partition(55, 0, labels)
    assert sorted([*train, *test]) == list(range(55))
    assert np.bincount(labels[test]).tolist() == [10, 1, 1]


# The real ones


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("mnist", [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]),
        ("fashion-mnist", [6000] * 10),
        ("notmnist", []),
    ],
)
def test_real_images(data_root, name, counts):
    data = load(name, data_root)
    assert data.train_y.bincount().tolist() == counts
    assert len(data.test_x) == 10_000
    if name == "mnist":  # the mean and deviation that everyone quotes
        assert data.train_x.mean().item() == pytest.approx(0.1307, abs=1e-4)
        assert data.train_x.std().item() == pytest.approx(0.3081, abs=1e-4)
        assert data.test_y.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@pytest.mark.data
def test_real_files_have_the_published_checksums(data_root):
    for name in ("mnist", "fashion-mnist"):
        for file, md5 in places.SOURCES[name].md5.items():
            assert places.content_md5(data_root / name / file) == md5


@pytest.mark.data
def test_real_cifar10(data_root):
    data = load("cifar10", data_root)
    assert data.train_y[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert data.train_y.bincount().tolist() == [5000] * 10
    assert data.test_y.bincount().tolist() == [1000] * 10
    if data.name == "CIFAR-10 (JPEG q75)":
        means = data.train_x[:10_000].mean((0, 2, 3))
        torch.testing.assert_close(means, torch.tensor([0.4914, 0.4822, 0.4465]), atol=0.01, rtol=0)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "features", "train", "test", "splits"),
    [
        ("bostonHousing", 13, 455, 51, 20),
        ("concrete", 8, 927, 103, 20),
        ("energy", 8, 691, 77, 20),
        ("kin8nm", 8, 7373, 819, 20),
        ("naval-propulsion-plant", 16, 10741, 1193, 20),
        ("power-plant", 4, 8611, 957, 20),
        ("protein-tertiary-structure", 9, 41157, 4573, 5),
        ("wine-quality-red", 11, 1439, 160, 20),
        ("yacht", 6, 277, 31, 20),
    ],
)
def test_real_tables(data_root, name, features, train, test, splits):
    data = load(f"uci:{name}", data_root, split=splits - 1)
    assert data.shape == (features,)
    assert (len(data.train_x), len(data.test_x)) == (train, test)
    assert all(t.isfinite().all() for t in (data.train_x, data.train_y, data.test_x, data.test_y))
    spread = data.train_x.std(0, correction=0)
    torch.testing.assert_close(spread, (spread > 0.5).float(), atol=1e-5, rtol=0)  # 1, or 0 where constant
    with pytest.raises(ValueError, match=f"must be from 0 to {splits - 1}, got {splits}"):
        load(f"uci:{name}", data_root, split=splits)

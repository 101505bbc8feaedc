"""Folders of images: classes, kinds of files, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from optkit.builtin.images import ImageFolder
from optkit.errors import DamagedError, MissingError

GRAYS = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
COLOURS = np.stack([GRAYS, 255 - GRAYS, GRAYS // 2], -1)


def write(folder, **files):
    """Images by path, dots for slashes."""
    for name, array in files.items():
        path = folder / f"{name.replace('__', '/')}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
    return ImageFolder(path=str(folder))


def test_folders_are_classes_in_the_order_of_their_names(tmp_path):
    found = write(tmp_path, dog__b=GRAYS, cat__z=COLOURS, cat__a=GRAYS, dog__a=COLOURS).images()
    assert [image.label for image in found] == ["cat", "cat", "dog", "dog"]
    np.testing.assert_array_equal(found[0].read(), np.stack([GRAYS] * 3, -1))
    np.testing.assert_array_equal(found[1].read(), COLOURS)


def test_loose_images_have_no_class(tmp_path):
    (tmp_path / ".thumbnails").mkdir()
    write(tmp_path / ".thumbnails", a=GRAYS)
    assert [image.label for image in write(tmp_path, b=GRAYS, a=COLOURS).images()] == [None, None]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_of_eight_bits_becomes_rgb(tmp_path, mode):
    image = Image.fromarray(COLOURS).convert(mode)
    image.save(tmp_path / f"a.{'tiff' if mode == 'CMYK' else 'png'}")
    [found] = ImageFolder(path=str(tmp_path)).images()
    np.testing.assert_array_equal(found.read(), np.array(image.convert("RGB")))


def test_a_turned_image_is_set_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    Image.fromarray(COLOURS).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(ImageFolder(path=str(tmp_path)).images()[0].read(), np.rot90(COLOURS, -1))


def test_the_fingerprint_is_that_of_files_and_classes(tmp_path):
    dataset = write(tmp_path, cat__a=GRAYS, dog__b=COLOURS)
    before = dataset.fingerprint()
    assert dataset.fingerprint() == before
    write(tmp_path, dog__b=COLOURS + 1)
    changed = dataset.fingerprint()
    (tmp_path / "dog").rename(tmp_path / "wolf")
    assert len({before, changed, dataset.fingerprint()}) == 3


def damaged(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nand so on")


def cut_short(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])


def deep(tmp_path):
    Image.fromarray(np.full((2, 2), 60_000, np.uint16)).save(tmp_path / "a.png")


def huge(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    Image.fromarray(GRAYS).save(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (damaged, "not a readable image"),
        (cut_short, r"not a readable image \(.*truncated"),
        (deep, "samples of the mode I;16, optkit reads 8 bits"),
        (huge, "decompression bomb"),
    ],
)
def test_what_is_no_image_is_named(tmp_path, monkeypatch, spoil, words):
    spoil(tmp_path, *([monkeypatch] if spoil is huge else []))
    [image] = ImageFolder(path=str(tmp_path)).images()
    with pytest.raises(DamagedError, match=words) as raised:
        image.read()
    assert raised.value.where == str(tmp_path / "a.png")


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(MissingError, match="no such file or folder"):
        ImageFolder(path=str(tmp_path / "nowhere")).images()
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(MissingError, match="is no folder"):
        ImageFolder(path=str(tmp_path / "notes.txt")).images()
    with pytest.raises(MissingError, match=r"holds no images; put bmp, .* into one folder a class"):
        ImageFolder(path=str(tmp_path)).images()
    write(tmp_path, train__cat__a=GRAYS)
    with pytest.raises(MissingError, match=f"holds no images; name one split, {tmp_path}/train"):
        ImageFolder(path=str(tmp_path)).images()


def test_images_beside_classes_are_refused(tmp_path):
    with pytest.raises(DamagedError, match=r"images beside folders of them.*, found 'b\.png'"):
        write(tmp_path, cat__a=GRAYS, b=GRAYS).images()

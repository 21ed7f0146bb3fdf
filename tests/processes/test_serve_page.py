"""The page in a real browser: files in, overlay out; by keyboard; on a wide and on a narrow screen; errors in words."""

import struct
import zlib

import numpy as np
import pytest

from simulations.phantoms import nifti
from tests.processes.browser import chromium
from tests.processes.serving import missing, release_in, served, until

pytestmark = [pytest.mark.process, pytest.mark.skipif(bool(missing("chromium")), reason=missing("chromium"))]


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    with served(folder, release_in(folder)) as here:
        yield here


def chest(folder):
    """A ball of air in water, as NIfTI: 5 planes."""
    i, j, _ = np.meshgrid(np.arange(40), np.arange(40), np.arange(5), indexing="ij")
    voxels = np.where((i - 20) ** 2 + (j - 20) ** 2 < 100, -850, 30).astype(np.int16)
    path = folder / "chest.nii.gz"
    path.write_bytes(nifti(voxels, np.diag([8.0, 8.0, 5.0, 1.0])))
    return path


def test_a_file_goes_in_and_its_overlay_comes_out(service, tmp_path):
    with chromium(tmp_path) as page:
        page.open(service.link)
        until(lambda: "tiny-lung" in page.value("document.getElementById('model').textContent"), "the model is named")
        assert "Not for diagnosis" in page.value("document.querySelector('.notice').innerText")
        page.choose("#files", [chest(tmp_path)])
        until(lambda: page.value("document.body.dataset.shown"), "the overlay is shown")
        until(lambda: page.value("document.getElementById('marks').naturalWidth") == 40, "the layer is there")
        assert page.value("document.getElementById('plane').naturalWidth") == 40
        assert page.value("document.getElementById('at').max") == "4"
        assert page.value("document.getElementById('answers').innerText").startswith("lung")
        assert page.value("document.getElementById('standing').hidden") is True  # nothing to say of the release
        assert "mask.nii.gz" in page.value("document.getElementById('downloads').innerText")
        assert page.value("document.activeElement.id") == "result-title"  # a reader of the screen is told

        before = page.value("document.getElementById('caption').textContent")
        page.value("document.getElementById('at').value = 0; document.getElementById('at').focus()")
        page.press("ArrowRight", 39)
        until(lambda: page.value("document.getElementById('caption').textContent").startswith("Plane 2"), "it moves on")
        assert before.startswith("Plane")

        for width in (1280, 400):
            page.size(width)
            assert page.value("document.documentElement.scrollWidth") <= width
            page.screenshot(tmp_path / f"page-{width}.png")
            head = (tmp_path / f"page-{width}.png").read_bytes()[:24]
            assert width - 20 <= struct.unpack(">L", head[16:20])[0] <= width  # less a scroll bar
        assert all(address.startswith((service.url, "blob:" + service.url)) for address in page.requests)
        assert page.complaints == []


def test_the_page_takes_the_token_from_its_link_and_asks_for_it_without_one(service, tmp_path):
    with chromium(tmp_path) as page:
        page.open(service.url + "/")
        until(lambda: page.value("document.getElementById('sign').hidden") is False, "the token is asked for")
        page.value(f"location.hash = 'token={service.token}'")
        until(lambda: page.value("document.getElementById('sign').hidden"), "the token is taken")
        assert page.value("location.href") == service.url + "/"  # it is not left in the address
        assert page.value("sessionStorage.getItem('token')") == service.token
        assert page.value("localStorage.length") == 0
        assert not any(service.token in address for address in page.requests)


def test_by_keyboard_alone_one_gets_to_the_files_and_sees_where_one_is(service, tmp_path):
    with chromium(tmp_path) as page:
        page.open(service.link)
        reached = []
        for _ in range(2):
            page.press("Tab", 9)
            reached.append(page.value("document.activeElement.id"))
            outline = page.value("getComputedStyle(document.activeElement.closest('.button')).outlineWidth")
            assert outline == "3px"
        assert reached == ["files", "folder"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.nii.gz", b"\x1f\x8b\x08\0" + b"\0" * 40, "NIFTI|gzip|broken|cut|read"),
        ("a.dcm", b"\0" * 128 + b"DICM" + b"\xff" * 400, "DICOM"),
        ("weights.pt", b"PK\3\4" + b"\0" * 100, "zip archive|not read|no image"),
        ("a.png", b"\x89PNG\r\n\x1a\n" + struct.pack(">L", 13) + b"IHDR" + struct.pack(">LL", 10**6, 10**6)
         + b"\10\0\0\0\0" + struct.pack(">L", zlib.crc32(b"x")), "PNG|picture|pixel|large|read"),
    ],
)  # fmt: skip
def test_a_hostile_file_gets_words_and_the_page_stays_usable(service, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with chromium(tmp_path) as page:
        page.open(service.link)
        page.choose("#files", [tmp_path / name])
        until(lambda: page.value("document.getElementById('status').classList.contains('bad')"), "an error is shown")
        said = page.value("document.getElementById('status').textContent")
        assert said.startswith("No answer:")
        assert any(word in said for word in words.split("|")), said
        assert str(tmp_path) not in said
        assert page.value("document.getElementById('result').hidden") is True
    assert service.process.poll() is None

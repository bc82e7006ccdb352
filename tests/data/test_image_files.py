"""Image files: which ones are found in folders."""

from pathlib import Path

from PIL import Image

from early_exit.data.image_files import find_images

SIDE = 16


def save(path: Path) -> Path:
    """Writes a small image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (SIDE, SIDE), "red").save(path)
    return path


class TestFindImages:
    def test_of_a_folder_the_images_below_it_in_order(self, tmp_path):
        for name in ("b/2.PNG", "a/1.jpg", "0.webp"):
            save(tmp_path / name)
        for name in ("a/text.pdf", "a/notes.txt"):
            (tmp_path / name).write_text("no image")
        found = [str(path.relative_to(tmp_path)) for path in find_images([tmp_path])]
        assert found == ["0.webp", "a/1.jpg", "b/2.PNG"]

    def test_a_file_is_given_as_it_is_named(self, tmp_path):
        names = [tmp_path / "text.pdf", str(tmp_path / "none")]
        assert list(find_images(names)) == [tmp_path / "text.pdf", tmp_path / "none"]

    def test_a_folder_without_images_is_given_to_be_reported(self, tmp_path):
        (tmp_path / "text.pdf").write_text("no image")
        assert list(find_images([tmp_path])) == [tmp_path]

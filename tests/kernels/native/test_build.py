"""Building, packing and loading the libraries."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from inference_pio.kernels.native import library
from inference_pio.kernels.native.instruction_sets import INSTRUCTION_SETS
from inference_pio.kernels.native.library import LibraryError, cpu_flags, load, usable
from inference_pio.kernels.native.sources import source_files, sources_digest

REPOSITORY = Path(__file__).resolve().parents[3]
NATIVE = Path("kernels/native")
LIBRARIES = [f"libpio_{known.name}.so" for known in INSTRUCTION_SETS]
FEWER = "\nINSTRUCTION_SETS = INSTRUCTION_SETS[-2:]\n"
"""Two sets are enough to see what a build compiles and packs."""

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


def setup(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=folder,
        env={**os.environ, "CXXFLAGS": "-O0", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def small_tree(tmp_path: Path) -> Path:
    """The package's build files with the sources that need no other: quick to compile."""
    tree = tmp_path / "tree"
    (tree / NATIVE).mkdir(parents=True)
    for name in ("setup.py", "LICENSE", "README.md"):
        shutil.copy(REPOSITORY / name, tree)
    text = (REPOSITORY / "pyproject.toml").read_text()
    head, _, rest = text.partition("packages = [")
    packages = (
        '    "inference_pio",\n    "inference_pio.kernels",\n    "inference_pio.kernels.native",\n]'
    )
    (tree / "pyproject.toml").write_text(f"{head}packages = [\n{packages}{rest.partition(']')[2]}")
    for source in (
        *("library_api.cpp", "team.cpp", "team.h", "huge_buffer.h", "api.h", "exports.map"),
        *("library.py", "instruction_sets.py", "sources.py"),
    ):
        shutil.copy(REPOSITORY / NATIVE / source, tree / NATIVE)
    (tree / "__init__.py").touch()
    return tree


def take_fewer(tree: Path) -> None:
    with (tree / NATIVE / "instruction_sets.py").open("a") as file:
        file.write(FEWER)


def built(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.so") if "build" not in path.parts)


@needs_compiler
def test_a_build_in_place_puts_one_library_a_set_beside_the_sources(small_tree: Path) -> None:
    done = setup(small_tree, "-q", "build_ext", "--inplace")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (small_tree / NATIVE).glob("*.so")) == sorted(LIBRARIES)


@needs_compiler
def test_only_what_changed_is_compiled_again(small_tree: Path) -> None:
    def objects() -> dict[str, int]:
        found = (small_tree / "build").rglob("*.o")
        return {f"{path.parent.name}/{path.name}": path.stat().st_mtime_ns for path in found}

    take_fewer(small_tree)
    setup(small_tree, "-q", "build_ext", "--inplace")
    before = objects()
    setup(small_tree, "-q", "build_ext", "--inplace")
    assert objects() == before
    for name, expected in (
        ("exports.map", {"library_api.o"}),  # which holds the digest of all sources
        ("team.h", {"library_api.o", "team.o"}),
    ):
        with (small_tree / NATIVE / name).open("a") as file:
            file.write("\n")
        setup(small_tree, "-q", "build_ext", "--inplace")
        after = objects()
        changed = {path for path in before if after[path] > before[path]}
        assert {Path(path).name for path in changed} == expected
        assert len(changed) == len(expected) * 2
        before = after


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_the_package_is_built_and_says_why(
    small_tree: Path, compiler: str
) -> None:
    done = setup(small_tree, "-q", "bdist_wheel", "--dist-dir", "dist", CXX=compiler)
    assert done.returncode == 0, done.stderr
    assert "the native kernels were not built" in done.stderr
    assert "with torch's own kernels" in done.stderr
    assert built(small_tree) == []


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_who_asks_for_the_kernels_alone_gets_the_error(small_tree: Path, compiler: str) -> None:
    done = setup(small_tree, "-q", "build_ext", "--inplace", CXX=compiler)
    assert done.returncode != 0
    assert compiler in done.stderr


@needs_compiler
def test_a_wheel_has_the_libraries_and_a_source_archive_the_sources(small_tree: Path) -> None:
    take_fewer(small_tree)
    done = setup(small_tree, "-q", "sdist", "bdist_wheel")
    assert done.returncode == 0, done.stderr
    [wheel], [archive] = (small_tree / "dist").glob("*.whl"), (small_tree / "dist").glob("*.gz")
    assert "linux_x86_64" in wheel.name
    packed = {Path(name).name for name in zipfile.ZipFile(wheel).namelist()}
    assert set(LIBRARIES[-2:]) <= packed
    with tarfile.open(archive) as opened:
        sources = {Path(name).name for name in opened.getnames()}
    wanted = {path.name for path in source_files(small_tree / NATIVE)} | {"setup.py", "sources.py"}
    assert wanted <= sources
    assert not set(LIBRARIES) & sources


@pytest.mark.parametrize("name", usable(cpu_flags()))
def test_the_libraries_of_this_installation_load(name: str) -> None:
    assert load(name).cdll.pio_abi() == library.ABI


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of sources and libraries, which ``load`` reads instead."""
    names = usable(cpu_flags())
    if not names:
        pytest.skip("no native kernels for this CPU")
    for path in [library.library_path(names[-1]), *source_files(library.FOLDER)]:
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    return tmp_path


def load_anew(folder: Path) -> None:
    [path] = folder.glob("*.so")
    load.__wrapped__(path.stem.removeprefix("libpio_"))


def test_a_library_of_other_sources_is_refused(copied: Path) -> None:
    load_anew(copied)
    with (copied / "team.h").open("a") as file:
        file.write("\n")
    with pytest.raises(LibraryError, match=r"built from other sources .* build_ext --inplace"):
        load_anew(copied)


def test_a_library_without_sources_beside_it_is_taken(copied: Path) -> None:
    for path in source_files(copied):
        path.unlink()
    load_anew(copied)


def test_a_library_of_another_interface_is_refused(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "ABI", library.ABI + 1)
    with pytest.raises(LibraryError, match=rf"interface {library.ABI - 1}, the package"):
        load_anew(copied)


def test_a_damaged_library_is_refused(copied: Path) -> None:
    [path] = copied.glob("*.so")
    path.write_bytes(b"not a library")
    with pytest.raises(LibraryError, match="does not load"):
        load_anew(copied)


def test_a_missing_library_is_named(copied: Path) -> None:
    [path] = copied.glob("*.so")
    path.unlink()
    name = path.stem.removeprefix("libpio_")
    with pytest.raises(LibraryError, match=f"{path.name} is missing"):
        load.__wrapped__(name)


def test_a_cpu_without_the_instructions_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "cpu_flags", lambda: frozenset({"avx2", "fma", "f16c"}))
    with pytest.raises(LibraryError, match="this CPU lacks avx512bw avx512dq avx512f avx512vl"):
        load.__wrapped__("avx512")
    with pytest.raises(LibraryError, match="no kernels for 'sse', only for amx, avx512_bf16"):
        load.__wrapped__("sse")


def test_the_digest_covers_names_and_contents(tmp_path: Path) -> None:
    assert sources_digest(tmp_path) is None
    (tmp_path / "a.cpp").write_text("x")
    first = sources_digest(tmp_path)
    (tmp_path / "a.cpp").rename(tmp_path / "b.cpp")
    second = sources_digest(tmp_path)
    (tmp_path / "b.cpp").write_text("y")
    (tmp_path / "notes.txt").write_text("no source")
    assert len({first, second, sources_digest(tmp_path)}) == 3

import pytest

from stillhouse import data
from stillhouse.data import debian

INDEX = """Package: zip
Version: 3.0-13
Depends: libbz2-1.0, libc6 (>= 2.34), python3:any, mawk | awk, libc6 (<< 3)
Description: Archiver for .zip files
Description-md5: 581928d34d669e63c353cd694bd040b0
Tag: implemented-in::c, interface::commandline,
 role::program
Section: utils

Package: 0ad
Description: Real-time strategy game
Description-md5: d943033bedada21853d2ae54a2578a7b
Section: games
"""
TRANSLATION = """Package: zip
Description-md5: 581928d34d669e63c353cd694bd040b0
Description-en: Archiver for .zip files
 This is InfoZIP's zip program.
 .
 It packs files.
"""

needs_apt = pytest.mark.skipif(not debian.APT_HELPER.exists(), reason="apt is not on this machine")


@pytest.fixture
def lists(tmp_path):
    archive = "deb.example_debian_dists_bookworm"
    (tmp_path / f"{archive}_main_binary-amd64_Packages").write_text(INDEX)
    (tmp_path / f"{archive}-updates_main_binary-amd64_Packages").write_text("Package: small\n")
    (tmp_path / f"{archive}_main_i18n_Translation-en").write_text(TRANSLATION)
    return tmp_path


@needs_apt
def test_fields_and_long_descriptions(lists):
    game, archiver = data.debian_packages(lists)
    assert archiver == data.DebianPackage(
        name="zip",
        section="utils",
        summary="Archiver for .zip files",
        description="This is InfoZIP's zip program.\n\nIt packs files.",
        depends=("libbz2-1.0", "libc6", "python3"),
    )
    assert game == data.DebianPackage("0ad", "games", "Real-time strategy game", "", ())


@needs_apt
def test_the_index_of_this_machine():
    try:
        packages = data.debian_packages()
    except data.DataUnavailable as error:
        pytest.skip(str(error))
    names = [package.name for package in packages]
    assert len(names) > 10_000
    assert names == sorted(set(names))
    assert {"bash", "coreutils"} <= set(names)
    assert all(package.section for package in packages)


@needs_apt
def test_no_index_and_a_damaged_one_say_what_to_run(tmp_path):
    with pytest.raises(data.DataUnavailable, match="no package index .* apt-get update"):
        data.debian_packages(tmp_path)
    (tmp_path / "x_binary-amd64_Packages.lz4").write_bytes(b"\x04\x22\x4d\x18 not lz4")
    with pytest.raises(data.DataUnavailable, match="apt cannot read") as raised:
        data.debian_packages(tmp_path)
    assert "\n" not in str(raised.value)

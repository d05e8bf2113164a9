"""Print what a wheel asks for, without the packages that have no CPU build."""

import sys
import zipfile
from email.parser import Parser

from packaging.requirements import Requirement

WITHOUT = {"torch", "torchaudio", "torchvision", "torchcodec"}


def main(wheel: str) -> None:
    """Read the wheel's metadata."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    for line in metadata.get_all("Requires-Dist", []):
        requirement = Requirement(line)
        is_extra = "extra" in str(requirement.marker or "")
        if not is_extra and requirement.name not in WITHOUT:
            print(line)


if __name__ == "__main__":
    main(sys.argv[1])

"""Builds the package from settings.ini; the shipped base model under mmkit/assets travels inside
the wheel.
"""

from configparser import ConfigParser
from pathlib import Path

import setuptools

here = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

lab = cfg["lab_requirements"].split()
setuptools.setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    python_requires=f"~={cfg['min_python']}",
    packages=setuptools.find_packages(include=["mmkit", "mmkit.*"]),
    package_data={"mmkit": ["assets/*", "assets/**/*"]},
    install_requires=cfg["requirements"].split(),
    extras_require={"lab": lab, "dev": lab + cfg["dev_requirements"].split()},
    entry_points={"nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
    zip_safe=False,
)

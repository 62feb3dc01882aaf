"""Builds the package from settings.ini. The shipped base model under mmkit/assets and the notebooks
under nbs/ travel inside the wheel.
"""

import shutil
from configparser import ConfigParser
from pathlib import Path

import setuptools
from setuptools.command.build_py import build_py

here = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
NOTEBOOKS = ("index.ipynb", "course/*.ipynb", "images/*", "library/**/*.ipynb")


class BuildWithNotebooks(build_py):
    "Also copies nbs/ to mmkit/notebooks of what is built; the sources hold it once."

    def _pairs(self):
        target = Path(self.build_lib) / "mmkit/notebooks"
        nbs = here / "nbs"
        files = [path for pattern in NOTEBOOKS for path in sorted(nbs.glob(pattern))]
        kept = [path for path in files if ".ipynb_checkpoints" not in path.parts]
        return [(path, target / path.relative_to(nbs)) for path in kept]

    def run(self):
        super().run()
        if self.editable_mode:  # an editable install reads nbs/ itself
            return
        shutil.rmtree(Path(self.build_lib) / "mmkit/notebooks", ignore_errors=True)
        for source, target in self._pairs():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode=1):
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, *(str(t) for _, t in self._pairs())]


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
    extras_require={
        "dev": cfg["dev_requirements"].split(),
        "peers": cfg["peer_requirements"].split(),
        "video": cfg["video_requirements"].split(),
    },
    entry_points={
        "console_scripts": ["mmkit=mmkit.cli:main"],
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
    cmdclass={"build_py": BuildWithNotebooks},
    zip_safe=False,
)

"Where things are, for every test; nothing here reaches the network or opens a window."
import os
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
os.environ.setdefault('MPLBACKEND', 'Agg')

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))

def pytest_generate_tests(metafunc):
    "A test that asks for `notebook` runs once for each notebook of the house."
    if 'notebook' in metafunc.fixturenames:
        metafunc.parametrize('notebook', NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])

"The snippets of README, EXAMPLES and SCALING run as they stand, with fewer pairs and steps."

import os
import re
import subprocess
import sys

import numpy as np
from conftest import CHAPTERS, ROOT
from PIL import Image
from signs import CAPTIONS, RED, write_signs

from mmkit import data, models
from mmkit.planner import plan_training

SMALLER = [
    ("n=1000", "n=240, size=48"),
    ("max_steps=300", "max_steps=2"),
    (".step(30)", ".step(2)"),
    ("TunerState()", "TunerState(num_records=24)"),
]


def run_script(code, folder):
    "Its printed text; one thread, nothing from the network, no window."
    (folder / "script.py").write_text(code, encoding="utf-8")
    own = dict(MMKIT_CACHE=str(folder / "cache"), PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=folder,
        env=os.environ | own,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def first_hour():
    "README's code for data of one's own."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("the first hour\n")[2]
    return re.search(r"```python\n(.*?)```", section, re.S)[1]


def test_first_hour_runs_on_signs(tmp_path):
    "README's own text, from a table with ordinary mistakes to the export: no lesion, no melanoma."
    table = write_signs(tmp_path, n=60)
    lines = table.read_text(encoding="utf-8").splitlines()
    lines[3] = lines[3].replace("images/", "images/gone-")
    lines[5] = lines[5].rpartition(",")[0] + ",yeild"
    lines[8] = lines[8].split(",")[0] + ",,stop"
    table.write_text("\n".join(lines), encoding="utf-8")
    code, more = first_hour(), "assert evaluate.generate(model, processor, test) == captions\n"
    assert code.count("\n") <= 27 and "max_steps=400" in code
    printed = run_script(code.replace("max_steps=400", "max_steps=2") + more, tmp_path)
    for said in ("58 of 60 rows", "image missing", "empty caption", "similar labels", "yeild"):
        assert said in printed, said
    for measure in ("class macro-F1", "exact match", "ROUGE-L", "loss", "perplexity"):
        assert measure in printed, measure
    figure = np.asarray(Image.open(tmp_path / "signs.png").convert("RGB"))
    assert (figure == RED).all(-1).mean() > 0.01, "the figure shows no sign"
    exported = (tmp_path / "signs-for-trl/metadata.jsonl").read_text(encoding="utf-8")
    assert "Describe this sign." in exported and "lesion" not in exported
    assert len(list((tmp_path / "signs-for-trl/images").iterdir())) == exported.count("\n")


def test_readme_says_how_the_base_spells(cache):
    _, processor = models.load("base")
    text = (ROOT / "README.md").read_text(encoding="utf-8")

    def tokens_per_word(captions):
        tokens = sum(len(processor.tokenizer.tokenize(caption)) for caption in captions)
        return tokens / sum(len(caption.split()) for caption in captions)

    signs = tokens_per_word([caption for of_class in CAPTIONS.values() for caption in of_class])
    lesions = tokens_per_word(data.load_melanoma_pairs(n=40, size=48, masks=False)["caption"][:])
    assert f"({signs:.1f} tokens a word on these signs, {lesions:.1f} on lesions)" in text


def test_scaling_script_runs_in_one_process(tmp_path):
    write_signs(tmp_path, n=60)
    text = (ROOT / "nbs" / "SCALING.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert "max_steps=200" in code
    run_script(code.replace("max_steps=200", "max_steps=2") + "assert run.steps == 2\n", tmp_path)
    assert (tmp_path / "runs/signs/checkpoint-2").is_dir()


def test_scaling_says_what_the_planner_says():
    text = (ROOT / "nbs" / "SCALING.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| (q?lora) \| (\d) \| (\S+) GB \| (\S+) GB \| (\S+) \|", text)
    assert len(rows) == 3
    options = dict(gpu="H100 80GB", num_examples=12000)
    for method, num_gpus, *written in rows:
        plan = plan_training("Gemma 3 27B", method, num_gpus=int(num_gpus), **options)
        numbers = (plan.memory["weights"] / 1e9, plan.peak / 1e9)
        assert [*(f"{number:.1f}" for number in numbers), f"{plan.hours:.2f}"] == written


def test_package_snippets_run(tmp_path):
    pages = [(ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "EXAMPLES.md")]
    text = "\n".join(pages)
    snippets = re.findall(r"```python\n(.*?)```", text, re.S)
    snippets.remove(first_hour())
    assert len(snippets) == 4
    code = "\n".join(snippets)
    for long, short in SMALLER:
        assert long in code, f"no snippet says {long}"
        code = code.replace(long, short)
    assert "projector" in run_script(code, tmp_path)


def test_readme_is_short_and_begins_with_a_picture():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 160
    assert lines[0].startswith("![")


def test_readme_links_every_chapter():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [path.name for path in CHAPTERS if f"({path.relative_to(ROOT)})" not in text]
    assert not missing


def test_readme_names_the_pinned_torch():
    "The plain commands install the same torch as make does."
    pin = re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text(), re.M)[0]
    assert pin in (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_says_what_the_planner_says():
    "The costs elsewhere, from the very call that README names."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    call = re.search(r"planner\.(plan_training\(.*?\))`", text, re.S)[1]
    plan = eval(call, {"plan_training": plan_training})
    assert plan.fits()
    assert f"{plan.memory['weights'] / 1e9:.1f} GB of weights" in text
    assert f"{plan.peak / 1e9:.0f} GB on one GPU" in text
    assert "an hour on an A100" in text and 0.75 <= plan.hours <= 1.25


def test_readme_pictures_are_small():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(pictures) >= 2
    assert all((ROOT / name).stat().st_size <= 2e6 for name in pictures)

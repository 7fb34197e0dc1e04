"""The graph: what is planned; the smoke graph from another folder, interrupted and gone on."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jobs
import nbformat
import pytest
from plan import all_jobs

from lcco.common import LCCoError
from lcco.config import load_profile
from lcco.store import write_json

ROOT = Path(__file__).parents[1]
SNAKEMAKE = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "workflow" / "Snakefile")]
pytestmark = pytest.mark.timeout(600)


def environment(base: Path) -> dict[str, str]:
    keep = {k: v for k, v in os.environ.items() if k not in ("LCCO_DATA", "LCCO_CALLER")}
    stores = {"LCCO_RUNS": str(base / "runs"), "LCCO_CACHE": str(base / "cache")}
    return keep | stores | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def snakemake(base: Path, *words: str) -> subprocess.CompletedProcess:
    how = {"cwd": base, "env": environment(base), "capture_output": True, "text": True}
    return subprocess.run([*SNAKEMAKE, *words], **how, timeout=500)


# ---------------------------------------------------------------------------------- what is planned
@pytest.mark.parametrize("profile", ["smoke", "paper"])
def test_the_plan_lists_a_job_for_each_run_and_notebook(profile, tmp_path):
    done = snakemake(tmp_path, "-n", "--config", f"profile={profile}")
    assert done.returncode == 0, done.stderr
    stats = dict(x.split() for x in (done.stdout + done.stderr).splitlines() if len(x.split()) == 2)
    books = len(list((ROOT / "notebooks").glob("*.ipynb")))
    trainings = int(stats["train"]) + int(stats.get("train_long", 0))
    assert trainings == len(all_jobs(load_profile(profile)))
    assert int(stats["notebook"]) == books and stats["embed"] == stats["report"] == "1"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"profil": "smoke"}, "did you mean `profile`"), ({"profile": "smok"}, "no profile `smok`"),
        ({"profile": 7}, "not as text"), ({"notebooks": 99}, "no notebook `99`"),
        ({"parameters": {"sedes": [0]}}, "did you mean `seeds`"),
        ({"parameters": {"profile": "lite"}}, "no notebook has a parameter `profile`"),
    ],
)  # fmt: skip
def test_a_mistaken_setting_is_refused(given, said, tmp_path):
    with pytest.raises(LCCoError, match=said):
        jobs.settings(given, tmp_path)


def test_snakemake_says_in_one_line_what_is_mistaken(tmp_path):
    done = snakemake(tmp_path, "-n", "--quiet", "all", "--config", "profile=7")
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode and line.startswith("lcco: ") and "not as text" in line
    assert "Traceback" not in done.stderr


def test_the_seeds_of_the_parameters_are_those_that_are_trained(tmp_path):
    given = ["--config", "profile=smoke", "notebooks=02", "parameters={seeds: [3, 5]}"]
    done = snakemake(tmp_path, "-n", *given)
    assert done.returncode == 0, done.stderr
    trained = re.findall(r"^train +(\d+)\s*$", done.stdout + done.stderr, re.MULTILINE)
    assert set(trained) == {str(2 * 8)}  # its table stands above and below the jobs


def test_text_stays_text(tmp_path):
    (tmp_path / "007.yaml").write_text("base: smoke\n")
    given = ["profile=007.yaml", "results=./2024_05", "notebooks=00", "parameters={cls: 007}"]
    done = snakemake(tmp_path, "-n", "--printshellcmds", "--config", *given)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and str(tmp_path / "2024_05") in said and '"cls": "007"' in said


def test_slurm_profile_names_known_rules():
    import yaml

    given = yaml.safe_load((ROOT / "workflow" / "profiles" / "slurm" / "config.yaml").read_text())
    text = (ROOT / "workflow" / "Snakefile").read_text()
    assert given["executor"] == "slurm"
    names = re.findall(r"^(?:use )?rule (\w+)(?: as (\w+))?", text, re.M)
    rules = {new or old for old, new in names}
    for part in ("set-threads", "set-resources"):
        assert given[part].keys() <= rules
        for rule in (r for r in rules if r.startswith("train")):
            assert given[part][rule] == given[part]["train"], rule


# ---------------------------------------------------------------------------------- the graph runs
BOOK, CONFIG = "07_feature_regularization", ["profile=mine.yaml", "notebooks=07"]


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, float], str]:
    """(folder, what was said until Ctrl-C, runs done by then, what the second start said).

    One of its own profiles, given by a path relative to a folder outside the repository.
    """
    base = tmp_path_factory.mktemp("graph") / "my pictures"
    base.mkdir()
    (base / "mine.yaml").write_text("base: smoke\nabout: Mine.\nexperiment: {name: mine (2+1)}\n")
    words = ["--cores", "1", "--quiet", "all", "--config", *CONFIG, "results=out"]
    how = {"cwd": base, "env": environment(base), "text": True, "start_new_session": True}
    process = subprocess.Popen([*SNAKEMAKE, *words], stderr=subprocess.PIPE, **how)
    said = ""
    for line in process.stderr:
        said += line
        if "done: train" in line:
            while not list(base.glob("runs/logs/mine/notebook-*.log")):
                time.sleep(0.1)  # until the next job has begun
            os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches all processes of a terminal
            break
    said += process.stderr.read()
    assert process.wait(60) != 0
    done = {f.parent.name: f.stat().st_mtime for f in base.glob("runs/*/record.json")}
    time.sleep(0.1)
    again = snakemake(base, *words)
    assert again.returncode == 0, again.stderr
    return base, said, done, again.stderr


def test_it_says_what_it_costs_and_shows_progress(graph):
    _, said, _, again = graph
    assert "Traceback" not in said + again, said + again
    assert "to do: 1 embedding, 1 training, 1 notebook, 1 report" in said
    assert "[1/4] done: embed mine" in said and "[2/4] done: train mine (2+1)-" in said, said
    assert "time not known before the first run" in said


def test_interrupted_it_goes_on_and_redoes_nothing(graph):
    base, _, done, again = graph
    after = {f.parent.name: f.stat().st_mtime for f in base.glob("runs/*/record.json")}
    assert len(done) == 1 and after == done
    assert "to do: 1 notebook, 1 report" in again
    assert "done: embed" not in again and "done: train" not in again
    nothing = snakemake(base, "-n", "--config", *CONFIG, "results=out")
    assert "Nothing to be done" in nothing.stdout + nothing.stderr


def test_it_leaves_tables_the_executed_notebook_and_a_log_for_each_job(graph):
    base, *_ = graph
    text = (base / "out" / "README.md").read_text()
    assert "Figure 3" in text
    made = nbformat.read(base / "out" / "notebooks" / f"{BOOK}.ipynb", 4)
    assert any(cell.get("outputs") for cell in made.cells)
    assert str(base / "runs") not in nbformat.writes(made)
    seconds = json.loads((base / "out" / "seconds.json").read_text())["seconds"]
    assert sum(name.startswith("train-mine") for name in seconds) == 1
    logs = sorted(f.name.split("-")[0] for f in base.glob("runs/logs/mine/*.log"))
    assert logs == ["embed", "notebook", "report", "train"]


def test_a_failed_job_names_its_log_in_one_line(graph):
    base, *_ = graph
    words = ["--cores", "1", "--quiet", "all", "--config", *CONFIG]
    (weights,) = base.glob("runs/mine*/best.safetensors")
    weights.rename(base / "away")
    done = snakemake(base, *words, "results=other")
    (base / "away").rename(weights)
    failed = [line for line in done.stderr.splitlines() if "failed: notebook" in line]
    assert done.returncode and len(failed) == 1
    assert "to do: 1 notebook, 1 report: about" in done.stderr  # as long as it took before
    log = Path(failed[0].rpartition("log: ")[2].rstrip(")"))
    assert "weights `best.safetensors` not found" in failed[0] and log.is_file()


def test_other_settings_or_parameters_make_notebooks_again(graph):
    base, *_ = graph
    mine = base / "mine.yaml"

    def planned(*more: str) -> bool:
        done = snakemake(base, "-n", "--config", *CONFIG, "results=out", *more)
        return "rule notebook:" in (done.stdout + done.stderr).splitlines()

    text = mine.read_text()
    assert not planned() and planned("parameters={seeds: [0]}")
    mine.write_text(f"{text}group_size: 4\n")
    assert planned()
    mine.write_text(text)
    assert not planned()  # nothing was made of the others


def test_a_wider_choice_of_notebooks_trains_what_is_new(tmp_path):
    done, both = (all_jobs(load_profile("smoke"), books) for books in (["02"], ["02", "03"]))
    for job in done:
        scored = dict.fromkeys(jobs.wanted(job))
        write_json(tmp_path / "runs" / job.experiment.run_name / "scored.json", scored)
    said = snakemake(tmp_path, "-n", "--config", "profile=smoke", "notebooks=02,03")
    stats = dict(x.split() for x in (said.stdout + said.stderr).splitlines() if len(x.split()) == 2)
    assert int(stats["train"]) == len(both) - len(done) > 0


def test_what_is_not_here_is_tried_again(tmp_path):
    job = all_jobs(load_profile("smoke"), ["03"])[0]
    marker = tmp_path / "scored.json"
    assert not jobs.stale(marker, job)
    marker.write_text(json.dumps(dict.fromkeys(jobs.wanted(job))))
    assert not jobs.stale(marker, job)
    marker.write_text(json.dumps(dict.fromkeys(jobs.wanted(job), "not run: data not found (x)")))
    assert jobs.stale(marker, job)
    marker.write_text(json.dumps({}))
    assert jobs.stale(marker, job)


def test_what_is_gone_or_was_not_run_is_made_again_with_all_that_follows(graph):
    base, *_ = graph

    def planned() -> set[str]:
        done = snakemake(base, "-n", "--config", *CONFIG, "results=out")
        lines = (done.stdout + done.stderr).splitlines()
        return {word for word in ("train", "notebook", "report") if f"rule {word}:" in lines}

    (base / "out" / "notebooks" / f"{BOOK}.ipynb").unlink()
    assert planned() == {"notebook", "report"}
    next(base.glob("runs/*/scored.json")).write_text('{"a score": "not run: no data"}')
    assert planned() == {"train", "notebook", "report"}


# ---------------------------------------------------------------------------------- on a cluster
SLURM = ["--workflow-profile", str(ROOT / "workflow" / "profiles" / "slurm")]
needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("snakemake_executor_plugin_slurm") is None,
    reason="snakemake-executor-plugin-slurm is not installed",
)


@needs_plugin
def test_the_paper_is_planned_for_a_cluster(tmp_path):
    done = snakemake(tmp_path, "-n", *SLURM, "--config", "profile=paper")
    assert done.returncode == 0, done.stderr
    planned = re.findall(r"^rule (\w+):\n((?: .*\n)+)", done.stdout + done.stderr, re.M)
    trainings = [how for rule, how in planned if rule.startswith("train")]
    assert len(trainings) == len(all_jobs(load_profile("paper")))
    for how in trainings:
        assert "threads: 8\n" in how and "runtime=1440" in how and "gpu=1" in how, how


@pytest.fixture
def slurm(tmp_path):
    """The folder of a SLURM that runs on this machine alone."""
    for tool in ("munged", "slurmctld", "slurmd", "sbatch"):
        if not shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin"):
            pytest.skip(f"no `{tool}` here: apt-get install slurm-wlm munge")
    script, here = str(ROOT / "scripts" / "slurm_here.sh"), tmp_path / "slurm"
    try:
        subprocess.run([script, "start", str(here)], check=True, timeout=120)
        yield here
    finally:
        subprocess.run([script, "stop", str(here)], check=True, timeout=120)


@needs_plugin
@pytest.mark.timeout(3600)
def test_slurm_runs_the_graph(slurm, tmp_path):
    # One machine: a core for each job, no accounts to ask, and no waiting for a slow disk.
    words = [*SLURM, "--cores", "1", "--slurm-status-command", "squeue", "--latency-wait", "5"]
    words += ["--slurm-init-seconds-before-status-checks", "1", "--retries", "0"]
    words += ["--seconds-between-status-checks", "2", "--slurm-logdir", str(tmp_path / "logs")]
    words += ["--config", "profile=smoke", f"results={tmp_path / 'out'}"]
    every = os.environ.get("LCCO_SLURM") == "all"  # else one notebook, which takes 2 minutes
    found = f"{slurm / 'bin'}:{os.environ['PATH']}"
    env = environment(tmp_path) | {"SLURM_CONF": str(slurm / "slurm.conf"), "PATH": found}
    how = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True, "timeout": 3500}
    done = subprocess.run([*SNAKEMAKE, *words, *([] if every else ["notebooks=01"])], **how)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "table1_main.csv").is_file()
    submitted = re.findall(r"submitted with SLURM jobid (\d+)", done.stderr + done.stdout)
    ended = re.findall(r"\[(\d+)\.batch\] done with job", (slurm / "slurmd.log").read_text())
    assert len(submitted) >= 5  # embed, 2 × train, notebook, report
    assert set(submitted) == set(ended)

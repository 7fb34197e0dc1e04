"""Break the code on purpose, one line at a time: every break must make a test fail.

    python tests/mutants.py [WORD …]    all, or those whose file or lines hold a word

Works on copies of the repository, two at a time. Names the breaks that no test noticed and exits 1.
"""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
AT_ONCE = 2
KEPT = ("lcco", "tests", "notebooks/profiles", "pyproject.toml")  # what the tests below need

MODEL, LOSSES, METRICS = "lcco/model.py", "lcco/losses.py", "lcco/metrics.py"
SAMPLER, COCO, PICTURES = "lcco/data/sampler.py", "lcco/data/coco.py", "lcco/data/pictures.py"
TRAIN, EVALUATE = "lcco/experiment/train.py", "lcco/experiment/evaluate.py"
FEATURES = "lcco/experiment/features.py"
TESTS = {
    MODEL: "test_model", LOSSES: "test_losses test_model", METRICS: "test_metrics",
    SAMPLER: "test_sampler", COCO: "test_sets", PICTURES: "test_pictures test_sets",
    TRAIN: "test_train test_golden -k train", EVALUATE: "test_evaluate",
    FEATURES: "test_features",
}  # fmt: skip

# fmt: off
# file → (what it says, what it is made to say): pieces of one line, found once in the file
MUTANTS = {
    MODEL: [
        # Eq. 1 and 2
        ("return F_i + self.ffn1(", "return self.ffn1("),
        ("torch.cat([F_i, m], dim=1)", "torch.cat([m, F_i], dim=1)"),
        ("F.scaled_dot_product_attention(q_i, k_j, v_j)", "v_j"),
        ("x[src], q[src], k[dst], v[dst]", "x[src], q[dst], k[src], v[dst]"),
        ("x[src], q[src], k[dst], v[dst]", "x[src], q[src], k[dst], v[src]"),
        ("alpha = scores.softmax(dim=1)", "alpha = scores.softmax(dim=-1)"),
        ("average = (alpha * edges).sum(dim=1)", "average = edges.mean(dim=1)"),
        ("M if self.training else", "0 if self.training else"),
        (".fill_diagonal_(False)", ".fill_diagonal_(True)"),
        ("same | torch.diag(~same.any(dim=1))", "same"),
        ("norm(plain) / norm(average).clamp(min=1e-12)", "edges.shape[2]"),
        ("HEADS = 4", "HEADS = 2"),
        # Eq. 3, 4 and 5
        ("torch.cat([h, set_mean(h, present)], dim=-1)", "torch.cat([h, h], dim=-1)"),
        ("mean = (x * weight).sum(1", "mean = x.sum(1"),
        ("/ weight.sum(1, keepdim=True).clamp(min=1)", "/ x.shape[1]"),
        ("return h_hat + self.mlp2(message)", "return self.mlp2(message)"),
        ("T = torch.cat([h_hat, text], dim=1)", "T = torch.cat([h_hat, 0 * text], dim=1)"),
        ("key_padding_mask=absent", "key_padding_mask=None"),
        ("append(nn.LayerNorm(D))", "append(nn.Identity())"),
        ("nn.Linear(c_in, c_mid), nn.ReLU(inplace=True)", "nn.Linear(c_in, c_mid), nn.Identity()"),
        ("nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)", "nn.BatchNorm2d(c_out), nn.Identity()"),
        ("nn.Sequential(block(fine, fine)", "nn.Sequential(block(fine, fine, 3)[:2]"),
        ("nn.Sequential(nn.ReLU(inplace=True), up", "nn.Sequential(nn.Identity(), up"),
        ("text = prompts * D**0.5", "text = prompts"),
        ("refine(images * D**0.5, present)", "refine(images, present)"),
        ("text[distilled], present", "text[distilled * 0], present"),
        ("text[distilled], present)[present]", "text[distilled], present).flip(1)[present]"),
        ("decode(h_hat) *", "decode(h_hat.detach()) *"),
        ("outer(inner(y) * z[:, :, None, None])", "outer(inner(y) + z[:, :, None, None])"),
        ("x + y if self.residual", "x - y if self.residual"),
        # Eq. 6, 7 and 8, prompts, true classes
        ("S.sum(dim=1).topk", "S.amax(dim=1).topk"),
        ("topk(min(k or self.k, P), dim=-1)", "topk(min(k or self.k, P), dim=-1, largest=False)"),
        ("min(k or self.k, P)", "min(self.k, P)"),
        ("torch.where(target[:, None] >= 0", "torch.where(target[:, None] > 0"),
        ("torch.where(target >= 0", "torch.where(target > 0"),
        ('present[..., None], float("-inf")).amax(dim=1)', 'present[..., None], 0).amax(dim=1)'),
        ("float(\"-inf\")).amax(dim=1)", "float(\"-inf\")).logsumexp(dim=1)"),
        ("s = similarity * self.logit_scale", "s = similarity"),
        ("logits + s if self.skip", "logits - s if self.skip"),
        ("s - s.mean(dim=-1, keepdim=True)", "s - s.mean(dim=1, keepdim=True)"),
        ("class_logits.argmax(dim=-1)", "class_logits.argmin(dim=-1)"),
        ("text[out.best][group]", "text[out.best][0 * group]"),
        ("F.normalize(images, dim=-1) @", "images @"),
        ("S = S * present[..., None]", "S = S + 0 * present[..., None]"),
        # the path
        ('self.smooth["16"](_add', '(_add'),
        ("steps.append((second,", "steps.append((third,"),
        ("(maps[-1]), n + 1)", "(maps[-1]), n)"),
        ('coarse, fine.shape[-2:], mode="bilinear", align_corners=False',
         'coarse, fine.shape[-2:], mode="bilinear", align_corners=True'),
    ],
    LOSSES: [
        # Eq. 9, 10 and 11
        ("1 - (both + eps) /", "1 - both /"),
        ("(p + g - both + eps)", "(p + g + eps)"),
        ("p = p * valid", "p = p * 1"),
        ("for x in (p * g, p, g * valid))", "for x in (p * g, p, g))"),
        ("/ present.sum().clamp(min=1)", "/ present.numel()"),
        ("(truth == 1).to(like)", "(truth > 0).to(like)"),
        ("g = g / valid.clamp", "g = g / torch.ones_like(valid).clamp"),
        ("soft_iou(coarse.sigmoid(), g, valid, eps)", "soft_iou(coarse.sigmoid(), g, 1, eps)"),
        ("eps = coarse[0, 0].numel() / truth[0, 0].numel()", "eps = 1.0"),
        ("logits, coarse = output.logits, output.coarse", "logits, coarse = output.logits, None"),
        ("promote_types(logits.dtype, torch.float32)", "promote_types(logits.dtype, logits.dtype)"),
        ('"cs": lambda_cs,', '"cs": 1.0,'),
        ('"c": lambda_c,', '"c": 1.0,'),
        ("else true >= 0", "else true > 0"),
        ("reduction=\"none\") * valid", "reduction=\"none\")"),
        # Eq. 12
        ("logits(class_logits - others, target", "logits(class_logits, target"),
        ("masked_fill(own,", "masked_fill(~own,"),
        ('if reduction == "mean"', 'if reduction != "mean"'),
        ("prompt_embeddings.T * present[..., None]", "prompt_embeddings.T"),
        ("any(dim=-1) & present", "any(dim=-1)"),
        ("similarity.sum(dim=1).argmax", "similarity.amax(dim=1).argmax"),
        (".where(shown.any(dim=-1), -1)", ".where(shown.any(dim=-1), 0)"),
    ],
    METRICS: [
        ('"ssnm", 224, 0.8', '"ssnm", 224, 0.5'),
        ('"pooled", 321', '"pooled", 224'),
        ("return values > (", "return values >= ("),
        ("exact.mean() + exact.std()", "exact.mean() + exact.std(ddof=1)"),
        ("(min(float(", "(max(float("),
        ("antialias=True", "antialias=False"),
        (".clamp(tensor.min(), tensor.max())", ""),
        ("Image.Resampling.BILINEAR", "Image.Resampling.NEAREST"),
        ("np.asarray(small) > 127", "np.asarray(small) > 100"),
        ("if grey is None else grey", "if grey is None else (grey > 127) * 255"),
        ("np.where(mask == VOID, 0, mask)", "np.where(mask == VOID, 1, mask)"),
        ("first = [i for i in indices[: n - r]", "first = [i for i in indices[r:n]"),
        ("(rest + first, r)] if r", "(rest + first, n)] if r"),
        ("seed, label), n, repeat=False)", "seed, label), n)"),
        ("default_rng([seed, int(digest(label", "default_rng([0, int(digest(label"),
        ("pixels - union + inter, pixels", "pixels - union, pixels"),
        ("pred & counted", "pred"),
        ("float(not self.predicted)", "1.0"),
        ("_mean(_mean(r[m] for r in c) for c in", "_mean(r[m] for c in [rows] for r in c for _ in"),
        ("_mean(i / u if u else None for", "_mean(i / u if u else 0 for"),
        ("share > 0.01", "share >= 0.01"),
        ("if v is not None]", "if v]"),
        ('r["J"] for r in rows if not r["empty"]', 'r["J"] for r in rows'),
    ],
    SAMPLER: [
        ("default_rng((self.seed, step))", "default_rng(self.seed + step)"),
        ("replace=len(members) < self.size", "replace=True"),
        ('"sqrt": 0.5', '"sqrt": 1.0'),
        ("p=weights / weights.sum()", "p=None"),
        ("shared = self._common(items)", "shared = self._common(items[:1])"),
        ("shared & self.data.labels_of(other)", "shared & self.data.classes_of(other)"),
        ("if absent and not self._known:", "if False:"),
        ("and self._common(items) == {c}}", "}"),
        ("if other in classes_of(i)]", "]"),
        ("rng.random() < self.given", "rng.random() < 0.8"),
        ("(self._two[c])) - {c})", "(self._two[c])))"),
        ("if self._common(items) == {c}:", "if items is not None:"),
        ("classes_of(i)) > 1]", "classes_of(i)) > 0]"),
        ("rng.random(self.size) < 0.5", "rng.random(self.size) < 0.9"),
        ("rng.uniform(self.crop, 1)", "rng.uniform(0.1, 1)"),
    ],
    COCO: [
        ("if not found.iscrowd and found.area", "if found.area"),
        ("            if category in classes:",
         "            if category in classes and not found.iscrowd:"),
    ],
    PICTURES: [("size, crop, Image.Resampling.NEAREST)", "size, crop, Image.Resampling.BILINEAR)")],
    FEATURES: [
        (":: -1 if flip else 1", ":: 1 if flip else 1"),
        ("[i % IN_A_FILE]", "[0]"),
        ("vectors[~np.array(shown, bool)] = 0", "pass"),
    ],
    TRAIN: [
        ("t[:, ::-1] if flip else t", "t if flip else t"),
        ("HALVE_EVERY = 20_000", "HALVE_EVERY = 10_000"),
        ("0.5 * (1 + math.cos(", "0.5 * (1 - math.cos("),
        ("return (step + 1) / t.warmup", "return step / t.warmup"),
        ('"backbone.": t.backbone_lr', '"backbone.": t.lr'),
        ("t.lr * t.mlp3_lr", "t.lr"),
        ('"clip_regularization.mlp3": t', '"clip_regularization.": t'),
        ("if e.train.clip:", "if False:"),
        ("* learning_rate(e, self.state[\"step\"])", "* learning_rate(e, 0)"),
        ("weight_decay=t.weight_decay", "weight_decay=0.0"),
        ("true.where(given < 0, -1)", "true"),
        ('"target": batch["given"]', '"target": batch["true"]'),
        ("zero_grad(set_to_none=True)", "param_groups"),
        ("/ (9 + n))", "/ 1)"),
        ("min(self.experiment.train.ema, n / (9 + n))", "n / (9 + n)"),
        ("self.experiment.loss.mask_background)", '"zero")'),
        ("Predictor(self.averaged, self", "Predictor(self.model, self"),
        ('.safetensors", trained_state(self.averaged)', '.safetensors", trained_state(self.model)'),
        ('score > self.state["best"]', 'score < self.state["best"]'),
        ('enabled=e.train.precision == "bf16"', "enabled=False"),
        ('"lambda_cs", "lambda_c", "lc_reduction"', '"lambda_cs", "lc_reduction"'),
        ('self.optimizer.load_state_dict(saved["optimizer"])', "pass"),
        ("p > 0.5, truth", "p > 0.4, truth"),
        ("strict=True))[:scored]", "strict=True))"),
        ('jaccard("one")', 'jaccard("zero")'),
    ],
    EVALUATE: [
        ("max(sum(line) / 2 for line in J)", "min(sum(line) / 2 for line in J)"),
        ('"leak": J[n][1 - n]', '"leak": J[1 - n][n]'),
        ("J[n][n] > J[n][1 - n]", "J[n][n] >= J[n][1 - n]"),
        ("if areas[c] >= LEAST", "if areas[c] > LEAST"),
        ("wanted in shown[p] and p != picture", "wanted in shown[p]"),
        ("mates.sort(key=lambda p: other in labels[p])", "pass"),
        ("if self.area(shown[p][wanted], wanted))", "if shown)"),
        ("if all(map(any, without))", "if any(map(any, without))"),
        ("zip(members[:new], next(found)[:new]", "zip(members, next(found)"),
        ("groups(items, group_size, seed, label)", "groups(items, group_size, 0, label)"),
        ("count(mask, ready), mask", "count(mask, ready % 255), mask"),
        ("p.truth(self.truth(i, label), self.grey(i))", "p.truth(self.truth(i, label))"),
        ('jaccard("one")', 'jaccard("zero")'),
        ("m.max() <= 1 + 1e-4", "m.max() <= 2"),
    ],
}
# fmt: on


class Mutant(NamedTuple):
    file: str
    old: str
    new: str

    def apply(self, root: Path) -> None:
        """Break the copy in `root`."""
        path = root / self.file
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")

    def __str__(self) -> str:
        return f"{self.file}: {self.old} → {self.new}"


def stale(mutants: list[Mutant]) -> list[str]:
    """Mutants whose line is not found once: the code has moved on."""
    found = []
    for m in mutants:
        n = (ROOT / m.file).read_text(encoding="utf-8").count(m.old)
        if n != 1:
            found.append(f"{m.file}: found {n} times, must be once: {m.old}")
    return found


def copy(to: Path) -> Path:
    """What the tests need of the repository."""
    for name in KEPT:
        source, target = ROOT / name, to / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    return to


def passes(root: Path, tests: str) -> tuple[bool, str]:
    """Whether the tests pass in a copy, and the end of what pytest said."""
    files, _, chosen = tests.partition(" -k ")
    words = [f"tests/{name}.py" for name in files.split()]
    words += ["-k", chosen] if chosen else []
    here = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *words]
    how = {"cwd": root, "env": os.environ | here, "capture_output": True, "text": True}
    try:
        done = subprocess.run(command, timeout=900, **how)
        if done.returncode < 0:  # ended from outside, which no test noticed: once more
            done = subprocess.run(command, timeout=900, **how)
    except subprocess.TimeoutExpired:
        return False, "took more than 15 minutes"
    if done.returncode < 0:
        raise SystemExit(f"pytest was ended from outside twice (signal {-done.returncode})")
    return done.returncode == 0, "\n".join(done.stdout.splitlines()[-5:])


class Workshop:
    """Copies of the repository, each used by one attempt at a time."""

    def __init__(self, base: Path) -> None:
        self.copies: queue.Queue[Path] = queue.Queue()
        for n in range(AT_ONCE):
            self.copies.put(copy(base / str(n)))

    def attempt(self, tests: str, mutant: Mutant | None = None) -> tuple[bool, str, float]:
        """Whether the tests pass, with the mutant if there is one; what pytest said; seconds."""
        root, began = self.copies.get(), time.monotonic()
        file = root / mutant.file if mutant else None
        whole = file.read_text(encoding="utf-8") if file else ""
        try:
            if mutant:
                mutant.apply(root)
            return *passes(root, tests), time.monotonic() - began
        finally:
            if file:
                file.write_text(whole, encoding="utf-8")
            self.copies.put(root)


def main(words: list[str]) -> int:
    """Try the mutants that hold a word, or all. Returns 1 if one survives."""
    mutants = [Mutant(file, *lines) for file, several in MUTANTS.items() for lines in several]
    mutants = [m for m in mutants if not words or any(w in " ".join(m) for w in words)]
    if found := stale(mutants):
        print("\n".join(found))
        return 1
    began, survivors = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="mutants") as base, ThreadPoolExecutor(AT_ONCE) as pool:
        shop, tests = Workshop(Path(base)), list(dict.fromkeys(TESTS[m.file] for m in mutants))
        for names, (passed, said, _) in zip(tests, pool.map(shop.attempt, tests), strict=True):
            if not passed:  # without this a mutant would seem to be noticed
                print(f"{names} fails without any break:\n{said}")
                return 1
        results = pool.map(shop.attempt, [TESTS[m.file] for m in mutants], mutants)
        for n, (m, (passed, _, seconds)) in enumerate(zip(mutants, results, strict=True), 1):
            survivors += [m] if passed else []
            word = "SURVIVED" if passed else "noticed"
            print(f"{n}/{len(mutants)} {word} {seconds:.0f} s {m}", flush=True)
    minutes = (time.monotonic() - began) / 60
    print(f"{len(mutants)} breaks, {len(survivors)} survived, {minutes:.0f} min")
    for m in survivors:
        print(f"  {m}")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Towers, vocabularies, prompts and the embedding cache: tiny random models, no network."""

from __future__ import annotations

import json
import multiprocessing
import sqlite3
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lcco import backbones, semantics
from lcco.common import LCCoError, digest
from lcco.config import TowerConfig
from lcco.semantics import (
    ConseTower,
    EmbeddingCache,
    OpenClipTower,
    imagenet_names,
    make_tower,
    painted,
    prompts,
    target_word,
    vocabulary,
    vocabulary_hash,
)

TINY = {
    "model_config": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
    "image_size": 32,
    "mean": [0.5, 0.4, 0.3],
    "std": [0.5, 0.5, 0.5],
    "context_length": 16,
}


class Pictures:
    """The part of CoSegData that the cache uses; counts how often a picture is opened."""

    def __init__(self, count: int = 5, size: tuple[int, int] = (40, 30)) -> None:
        self.count, self.size, self.opened = count, size, 0

    def image(self, i: int) -> Image.Image:
        self.opened += 1
        pixels = np.random.default_rng(i).integers(0, 256, (*self.size[::-1], 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    def content(self, i: int) -> str:
        return digest(f"picture {i}")


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LCCO_CACHE", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def card(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture(scope="module")
def tiny(card) -> OpenClipTower:
    return OpenClipTower(str(card), None)


@pytest.fixture(scope="module")
def conse(tmp_path_factory) -> ConseTower:
    return ConseTower(folder=tmp_path_factory.mktemp("texts"))


# ── towers ──


def test_open_clip_embeds_as_open_clip_does_with_unit_norm(tiny):
    import open_clip

    data = Pictures(3)
    state = torch.random.get_rng_state()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = open_clip.model.CLIP(**TINY["model_config"]).eval()
    squashed = [np.array(data.image(i).resize((32, 32), Image.Resampling.BICUBIC)) for i in range(3)]
    x = torch.from_numpy(np.stack(squashed)).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor(TINY["mean"]).view(3, 1, 1)) / 0.5
    with torch.no_grad():
        want = net.encode_image(x)
        text = net.encode_text(open_clip.tokenize(["a cat", "an old dog"], context_length=16))
    want, text = want / want.norm(dim=1, keepdim=True), text / text.norm(dim=1, keepdim=True)
    got = tiny.encode_images(data.image(i) for i in range(3))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tiny.encode_prompts(["a cat", "an old dog"]), text, atol=1e-5, rtol=1e-4)
    assert got.dtype == torch.float32 and tiny.width == 16
    assert tiny.logit_scale == pytest.approx(1 / 0.07, rel=1e-3)
    assert tiny.encode_images([]).shape == (0, 16)
    assert torch.equal(torch.random.get_rng_state(), state)  # random weights leave the caller's generator alone


def test_identity_names_weights_and_preprocessing(tiny, card, tmp_path):
    assert OpenClipTower(str(card), None).identity == tiny.identity  # random, but always the same
    other = tmp_path / "tiny.json"
    other.write_text(json.dumps({**TINY, "mean": [0.5, 0.5, 0.5]}))
    assert OpenClipTower(str(other), None).identity != tiny.identity
    state = tiny._net.state_dict()
    state["visual.proj"] = state["visual.proj"] + 1e-3
    torch.save(state, tmp_path / "moved.pt")
    assert OpenClipTower(str(card), str(tmp_path / "moved.pt")).identity != tiny.identity


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_open_clip_loads_a_local_file_and_names_a_bad_one(tiny, card, tmp_path, suffix):
    from safetensors.torch import save_file

    path = tmp_path / f"w.{suffix}"
    state = {k: v.clone().contiguous() + 0.01 for k, v in tiny._net.state_dict().items()}
    save_file(state, path) if suffix == "safetensors" else torch.save({"state_dict": state}, path)
    tower = OpenClipTower(str(card), str(path))
    for key, value in tower._net.state_dict().items():
        assert torch.equal(value, state[key])
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(LCCoError, match=rf"w\.{suffix}.*cut short"):
        OpenClipTower(str(card), str(path))
    with pytest.raises(LCCoError, match="no such weights file"):
        OpenClipTower(str(card), str(tmp_path / f"none.{suffix}"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(LCCoError, match=r"other\.pt: not weights of"):
        OpenClipTower(str(card), str(tmp_path / "other.pt"))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_quick_gelu_mismatch_is_an_error_in_both_directions(tmp_path):
    with pytest.raises(LCCoError, match="QuickGELU.*set it to `ViT-B-16-quickgelu`"):
        OpenClipTower("ViT-B-16", "openai")
    with pytest.raises(LCCoError, match="QuickGELU.*set it to `ViT-B-16`"):
        OpenClipTower("ViT-B-16-quickgelu", "laion2b_s34b_b88k")
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(tmp_path / "ViT-B-16.pt"))  # OpenAI's form of file
    with pytest.raises(LCCoError, match="QuickGELU"):
        OpenClipTower("ViT-B-16", str(tmp_path / "ViT-B-16.pt"))
    with pytest.raises(LCCoError, match="not weights of"):
        OpenClipTower("ViT-B-16-quickgelu", str(tmp_path / "ViT-B-16.pt"))


def test_absent_weights_say_at_once_what_to_get(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LCCO_OFFLINE", "1")
    monkeypatch.setattr(backbones, "reachable", lambda url: pytest.fail("touched the network"))
    start = time.monotonic()
    with pytest.raises(LCCoError, match=r"downloads are off: download https://.*vit_base_patch16_clip_224.openai.*`tower"):
        OpenClipTower("ViT-B-16-quickgelu", "openai")
    monkeypatch.delenv("LCCO_OFFLINE")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(backbones, "reachable", lambda url: False)
    with pytest.raises(LCCoError, match="does not answer"):
        OpenClipTower("ViT-B-16-quickgelu", "openai")
    assert time.monotonic() - start < 10
    with pytest.raises(LCCoError, match="neither a file nor a tag"):
        OpenClipTower("ViT-B-16", "openia")
    with pytest.raises(LCCoError, match="did you mean `ViT-B-16`"):
        OpenClipTower("ViT-B-17", None)
    with pytest.raises(LCCoError, match=r"absent\.json: no such file"):
        OpenClipTower(str(tmp_path / "absent.json"), None)
    (tmp_path / "half.json").write_text("{}")
    with pytest.raises(LCCoError, match="no `model_config`"):
        OpenClipTower(str(tmp_path / "half.json"), None)


def test_conse_is_its_formula(conse):
    tower = ConseTower(temperature=2.0, top=3, folder=conse._folder)
    tower._net = conse._net = conse._net or backbones.classifier("efficientnet_lite2", "package")
    data = Pictures(3, (70, 50))
    got = tower.encode_images(data.image(i) for i in range(3))
    names = [semantics.IMAGENET_ALIASES.get(n, n) for n in imagenet_names()]
    for i in range(3):
        x = np.asarray(data.image(i).resize((260, 260), Image.Resampling.BICUBIC), dtype=np.float32) / 127.5 - 1
        with torch.no_grad():
            logits = tower._net(torch.from_numpy(x).permute(2, 0, 1)[None])[0] / 2.0
        p = np.exp(logits.double().numpy() - logits.max().item())
        p /= p.sum()
        best = sorted(range(1000), key=lambda c: -p[c])[:3]
        text = conse.encode_prompts([f"a photo of a {names[c]}" for c in best]).double().numpy()
        mix = sum(p[c] / sum(p[b] for b in best) * t for c, t in zip(best, text, strict=True))
        np.testing.assert_allclose(got[i].numpy(), mix / np.linalg.norm(mix), atol=2e-5)
    torch.testing.assert_close(got.norm(dim=1), torch.ones(3))


def test_conse_settings_change_its_identity_but_not_its_texts(conse):
    assert ConseTower(folder=conse._folder).identity == conse.identity
    for other in (ConseTower(temperature=0.5), ConseTower(top=5), ConseTower(templates=("{}",))):
        assert other.identity != conse.identity and other.text_identity == conse.text_identity
    with pytest.raises(LCCoError, match="`tower.top` is 0"):
        ConseTower(top=0)
    with pytest.raises(LCCoError, match="`tower.temperature`"):
        ConseTower(temperature=0)
    assert isinstance(make_tower(TowerConfig(kind="conse", top=7)), ConseTower)


def test_conse_names_what_photographs_show(conse):
    from lcco.common import place

    root = place("data") / "MSRC" / "image"
    if not root.is_dir():
        pytest.skip("needs photographs: set LCCO_DATA")
    words = vocabulary("coco80")
    table = prompts(conse, words, conse.templates)
    for cls in ("cow", "cat", "dog", "car", "sheep"):
        images = [Image.open(p) for p in sorted((root / cls).iterdir())[:5]]
        sigma = (conse.encode_images(images) @ table.T).sum(0)
        assert words[int(sigma.argmax())] == cls


def test_aliases_are_names_of_imagenet_and_read_alike_on_both_sides(conse):
    assert set(semantics.IMAGENET_ALIASES) <= set(imagenet_names())
    a = prompts(conse, ["ox", "cow", "dog"], ("a photo of a {}",))
    assert torch.equal(a[0], a[1]) and not torch.allclose(a[0], a[2], atol=0.1)


# ── vocabularies and prompts ──


def test_vocabularies():
    assert len(vocabulary("coco80")) == 80 and len(vocabulary("voc20")) == 20 and len(vocabulary("imagenet1k")) == 998
    for name in ("coco80", "voc20", "imagenet1k"):
        words = vocabulary(name)
        assert len(set(words)) == len(words) and all(w == w.strip() != "" for w in words)
    assert vocabulary("coco80")[:3] == ["person", "bicycle", "car"] and vocabulary("coco80")[-1] == "toothbrush"
    assert len(imagenet_names()) == 1000
    words = vocabulary("voc20")
    assert vocabulary_hash(words) == vocabulary_hash(list(words)) != vocabulary_hash(words[::-1])


def test_target_word_knows_the_data_sets_names():
    coco, voc = vocabulary("coco80"), vocabulary("voc20")
    for cls, word in {"plane": "airplane", "bike": "bicycle", "tvmonitor": "tv", "sofa": "couch", "cow": "cow"}.items():
        assert coco[target_word(cls, coco)] == word
    from lcco.data import VOC_CLASSES

    assert [target_word(c, voc) for c in VOC_CLASSES] == list(range(20))
    assert all(target_word(c, coco) is not None for c in VOC_CLASSES)
    assert target_word("flower", coco) is None
    assert target_word("Cow", ["ox", "cow"]) == 1 and target_word("cow", ["ox"]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat\n\ndog\n", "line 2 is blank"),
        ("cat\ndog\nCat \n", "line 3 repeats 'Cat' of line 1"),
        ("cat\n" + "xylophone quartz " * 30 + "\n", r"line 2 has \d+ tokens"),
        ("", "no words"),
    ],
)
def test_a_bad_vocabulary_file_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "words.txt"
    path.write_text(text)
    with pytest.raises(LCCoError, match=rf"words\.txt: {message}"):
        vocabulary(path)


def test_a_good_vocabulary_file_and_a_missing_one(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("\ufeffsnow  leopard\r\ncafé\r\n" + "long " * 16, encoding="utf-8")  # 18 tokens in 80 bytes
    assert vocabulary(str(path))[:2] == ["snow leopard", "café"] and len(vocabulary(str(path))) == 3
    with pytest.raises(LCCoError, match="coco81.*one of coco80"):
        vocabulary("coco81")
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(LCCoError, match="not UTF-8"):
        vocabulary(path)


def test_prompts_average_the_templates_by_hand_and_come_from_the_cache(tiny, monkeypatch):
    templates, words = ("a photo of a {}.", "the {} here"), ["cat", "dog", "cow"]
    got = prompts(tiny, words, templates)
    for row, word in zip(got, words, strict=True):
        a, b = tiny.encode_prompts([f"a photo of a {word}.", f"the {word} here"])
        torch.testing.assert_close(row, (a + b) / (a + b).norm())
    assert not torch.allclose(got[0], got[1], atol=1e-3)
    with monkeypatch.context() as m:
        m.setattr(tiny, "encode_prompts", lambda texts: pytest.fail("encoded again"))
        assert torch.equal(prompts(tiny, words[::-1], templates), got.flip(0))
    with pytest.raises(LCCoError, match="one `{}`"):
        prompts(tiny, words, ("a photo",))
    with pytest.raises(LCCoError, match="empty"):
        prompts(tiny, words, ())
    with pytest.raises(LCCoError, match="the tower reads 16"):
        prompts(tiny, ["one two three four five six seven eight nine ten"], ("a very nice photo of a {}",))


# ── the cache ──


def test_second_time_costs_no_tower_call_and_no_picture(tiny, tmp_path):
    data, cache = Pictures(), EmbeddingCache(tmp_path, tiny)
    first = cache.images(data, [0, 1, 2, 1])
    assert (cache.calls, data.opened) == (3, 3) and torch.equal(first[1], first[3])
    before = tiny.calls
    again = EmbeddingCache(tmp_path, tiny)
    assert torch.equal(again.images(data, [2, 0]), first[[2, 0]])
    assert (again.calls, tiny.calls, data.opened) == (0, before, 3)
    assert again.images(data, []).shape == (0, 16)
    again.images(data, range(5))
    assert again.calls == 2
    torch.testing.assert_close(first[0], tiny.encode_images([data.image(0)])[0])


def test_a_second_evaluation_of_photographs_calls_the_tower_zero_times(conse, tmp_path):
    from lcco.common import place
    from lcco.data import load_data

    if not (place("data") / "MSRC").is_dir():
        pytest.skip("needs photographs: set LCCO_DATA")
    data = load_data("msrc7")
    items = [group[0] for group in data.groups.values()]
    masks = [data.mask(i, [cls]) for i, cls in zip(items, data.groups, strict=True)]
    for calls in (14, 0):
        cache = EmbeddingCache(tmp_path, conse)
        whole, objects = cache.images(data, items), cache.images(data, items, masks)
        assert cache.calls == calls and not torch.allclose(whole, objects, atol=0.05)


def test_masks_backgrounds_and_towers_have_entries_of_their_own(tiny, card, tmp_path):
    data, cache = Pictures(1), EmbeddingCache(tmp_path, tiny)
    left, void = np.zeros((30, 40), np.uint8), np.full((30, 40), 255, np.uint8)
    left[:, :20] = void[:, :20] = 1
    plain = cache.images(data, [0])
    black = cache.images(data, [0], [left])
    grey = cache.images(data, [0], [left], background="mean")
    right = cache.images(data, [0], [1 - left])
    assert cache.calls == 4
    for a, b in ((plain, black), (black, grey), (black, right)):
        assert not torch.allclose(a, b, atol=1e-4)
    assert torch.equal(cache.images(data, [0], [void]), black) and cache.calls == 4  # void is not the object
    torch.testing.assert_close(black, tiny.encode_images([painted(data.image(0), left)]))
    other = OpenClipTower(str(card), None)
    other.identity = "another"
    assert EmbeddingCache(tmp_path, other).images(data, [0]).shape == (1, 16) and other.calls == 1


def test_painted_by_hand():
    image = Image.fromarray(np.full((1, 3, 3), 200, np.uint8))
    mask = np.array([[0, 1, 255]], np.uint8)
    assert np.array(painted(image, mask))[0].tolist() == [[0] * 3, [200] * 3, [0] * 3]
    assert np.array(painted(image, mask, "mean", (0, 0.5, 1)))[0].tolist() == [[0, 128, 255], [200] * 3, [0, 128, 255]]


def test_a_damaged_entry_is_made_again(tiny, tmp_path):
    data, cache = Pictures(), EmbeddingCache(tmp_path, tiny)
    want = cache.images(data, range(5))
    with sqlite3.connect(cache._store.path) as db:
        rows = db.execute("SELECT key, vector FROM embeddings").fetchall()
        db.execute("UPDATE embeddings SET vector = ? WHERE key = ?", (rows[1][1], rows[0][0]))  # another row's vector
        db.execute("UPDATE embeddings SET vector = ? WHERE key = ?", (rows[2][1][:-4], rows[2][0]))  # cut
    db.close()
    fresh = EmbeddingCache(tmp_path, tiny)
    torch.testing.assert_close(fresh.images(data, range(5)), want)
    assert fresh.calls == 2
    fresh.images(data, range(5))
    assert fresh.calls == 2


@pytest.mark.parametrize("damage", ["overwritten", "cut", "empty"])
def test_a_damaged_file_is_made_again(tiny, tmp_path, capsys, damage):
    data, cache = Pictures(), EmbeddingCache(tmp_path, tiny)
    want, path = cache.images(data, range(5)), cache._store.path
    content = path.read_bytes()
    half = content[: len(content) // 2 + 100]
    path.write_bytes({"overwritten": b"x" * len(content), "cut": half, "empty": b""}[damage])
    fresh = EmbeddingCache(tmp_path, tiny)
    torch.testing.assert_close(fresh.images(data, range(5)), want)
    assert 0 < fresh.calls <= 5 and ("damaged" in capsys.readouterr().err) == (damage != "empty")
    again = EmbeddingCache(tmp_path, tiny)
    assert torch.equal(again.images(data, range(5)), want) and again.calls == 0


def test_a_folder_that_cannot_be_written_is_named(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LCCoError, match="LCCO_CACHE"):
        EmbeddingCache(tmp_path / "file", tiny).images(Pictures(), [0])


def test_an_interrupted_pass_keeps_what_it_had(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(semantics, "BATCH", 2)
    data = Pictures()
    picture = data.image
    monkeypatch.setattr(data, "image", lambda i: pytest.fail("stop") if i == 4 else picture(i))
    with pytest.raises(pytest.fail.Exception):
        EmbeddingCache(tmp_path, tiny).images(data, range(5))
    monkeypatch.setattr(data, "image", picture)
    cache = EmbeddingCache(tmp_path, tiny)
    cache.images(data, range(5))
    assert cache.calls == 1


def test_pictures_do_not_pile_up(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(semantics, "BATCH", 3)
    alive, most = 0, 0

    class Watch(Pictures):
        def image(self, i: int) -> Image.Image:
            nonlocal alive, most
            picture = super().image(i)
            alive += 1
            most = max(most, alive)

            def gone() -> None:
                nonlocal alive
                alive -= 1

            weakref.finalize(picture, gone)
            return picture

    EmbeddingCache(tmp_path, tiny).images(Watch(), range(20))
    assert most <= 3


def _writer(folder: Path, start: int) -> None:
    store = semantics._Store(folder)
    for n in range(start, start + 40):
        store.put({f"key{n}": np.full(16, n, np.float32)})
        assert f"key{n}" in store.get([f"key{n}"], 16)


def test_two_processes_write_one_cache(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_writer, args=(tmp_path, start)) for start in (0, 20)]  # they overlap
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [w.exitcode for w in workers] == [0, 0]
    found = semantics._Store(tmp_path).get([f"key{n}" for n in range(60)], 16)
    assert len(found) == 60 and all((found[f"key{n}"] == n).all() for n in range(60))

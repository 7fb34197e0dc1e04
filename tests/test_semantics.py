"""Towers, vocabularies and prompts: tiny random models, no network."""

from __future__ import annotations

import json
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from PIL import Image

from lcco import backbones, semantics
from lcco.common import LCCoError, Missing, place
from lcco.model import LCCo
from lcco.semantics import (
    ConseTower,
    OpenClipTower,
    Vocabulary,
    make_tower,
    make_vocabulary,
    painted,
    prompts,
    target_word,
    vocabulary,
)

TINY = {
    "model_config": {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32,
            "layers": 1,
            "width": 32,
            "head_width": 16,
            "patch_size": 16,
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    },
    "image_size": 32,
    "mean": [0.5, 0.4, 0.3],
    "std": [0.5, 0.5, 0.5],
    "context_length": 16,
}


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(autouse=True)
def one_thread():
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
def conse() -> ConseTower:
    return ConseTower()


# ── towers ──


def test_open_clip_embeds_as_open_clip_does_with_unit_norm(tiny):
    import open_clip

    state = torch.random.get_rng_state()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = open_clip.model.CLIP(**TINY["model_config"]).eval()
    squashed = [np.array(picture(i).resize((32, 32), Image.Resampling.BICUBIC)) for i in range(3)]
    x = torch.from_numpy(np.stack(squashed)).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor(TINY["mean"]).view(3, 1, 1)) / 0.5
    with torch.no_grad():
        want = net.encode_image(x)
        text = net.encode_text(open_clip.tokenize(["a cat", "an old dog"], context_length=16))
    want, text = want / want.norm(dim=1, keepdim=True), text / text.norm(dim=1, keepdim=True)
    got = tiny.encode_images(picture(i) for i in range(3))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tiny.encode_prompts(["a cat", "an old dog"]), text)
    assert got.dtype == torch.float32 and tiny.width == 16
    assert tiny.logit_scale == pytest.approx(1 / 0.07, rel=1e-3)
    assert tiny.encode_images([]).shape == (0, 16)
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's generator is untouched
    one = OpenClipTower("ViT-B-16", None)
    assert one.identity == OpenClipTower("ViT-B-16", None).identity and one.context == 77
    assert (one.width, one.size, one.mean) == (512, 224, tuple(open_clip.OPENAI_DATASET_MEAN))


def test_identity_names_weights_and_preprocessing(tiny, card, tmp_path):
    assert OpenClipTower(str(card), None).identity == tiny.identity  # random, but always the same
    other = tmp_path / "tiny.json"
    other.write_text(json.dumps({**TINY, "mean": [0.5, 0.5, 0.5]}))
    assert OpenClipTower(str(other), None).identity != tiny.identity
    state = tiny.net.state_dict()
    state["visual.proj"] = state["visual.proj"] + 1e-3
    torch.save(state, tmp_path / "moved.pt")
    assert OpenClipTower(str(card), str(tmp_path / "moved.pt")).identity != tiny.identity


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_open_clip_loads_a_local_file_and_names_a_bad_one(tiny, card, tmp_path, suffix):
    from safetensors.torch import save_file

    path = tmp_path / f"w.{suffix}"
    state = {k: v.clone().contiguous() + 0.01 for k, v in tiny.net.state_dict().items()}
    save_file(state, path) if suffix == "safetensors" else torch.save({"state_dict": state}, path)
    tower = OpenClipTower(str(card), str(path))
    for key, value in tower.net.state_dict().items():
        assert torch.equal(value, state[key])
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(LCCoError, match=rf"w\.{suffix}.*cut short"):
        OpenClipTower(str(card), str(path))
    with pytest.raises(Missing, match="there is no file"):
        OpenClipTower(str(card), str(tmp_path / f"none.{suffix}"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(LCCoError, match=r"other\.pt: not weights of"):
        OpenClipTower(str(card), str(tmp_path / "other.pt"))


def test_quick_gelu_mismatch_is_an_error():
    with pytest.raises(LCCoError, match="QuickGELU.*`ViT-B-16` needs `-quickgelu`"):
        OpenClipTower("ViT-B-16", "openai")
    with pytest.raises(LCCoError, match="neither a file nor a tag of ViT-B-16-quickgelu .*openai"):
        OpenClipTower("ViT-B-16-quickgelu", "laion2b_s34b_b88k")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty cache of the hub, and no way to it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


def test_absent_weights_say_at_once_what_to_get(offline, tmp_path):
    start, repo = time.monotonic(), "timm/vit_base_patch16_clip_224.openai"
    with pytest.raises(Missing, match=f"`hf download {repo} .*local copy") as e:
        OpenClipTower("ViT-B-16-quickgelu", "openai")
    assert e.value.status == f"not run: weights not found ({repo})"
    with pytest.raises(Missing, match="`hf download timm/ViT-B-16-SigLIP"):
        OpenClipTower("ViT-B-16-SigLIP", None)  # its tokenizer is on the hub
    assert time.monotonic() - start < 10
    with pytest.raises(LCCoError, match="neither a file nor a tag"):
        OpenClipTower("ViT-B-16", "openia")
    with pytest.raises(LCCoError, match="'ViT-B-17': not in open_clip.list_models"):
        OpenClipTower("ViT-B-17", None)
    with pytest.raises(LCCoError, match=r"there is no file .*absent\.json"):
        OpenClipTower(str(tmp_path / "absent.json"), None)
    (tmp_path / "half.json").write_text("{}")
    with pytest.raises(LCCoError, match=r"half\.json: not a model with model_config"):
        OpenClipTower(str(tmp_path / "half.json"), None)


def test_a_file_in_the_hubs_cache_is_used_without_the_net(offline, tmp_path):
    repo = tmp_path / "models--timm--vit_base_patch16_clip_224.openai"
    file = repo / "snapshots" / "0123" / "open_clip_model.safetensors"
    for path, text in ((repo / "refs" / "main", "0123"), (file, "cut")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    with pytest.raises(LCCoError, match=r"open_clip_model\.safetensors: not weights of"):
        OpenClipTower("ViT-B-16-quickgelu", "openai")


def test_conse_is_its_formula(conse):
    got = conse.encode_images(picture(i, (70, 50)) for i in range(3))
    names = [semantics.IMAGENET_ALIASES.get(n, n) for n in IMAGENET_CLASSNAMES]
    net = backbones.classifier("efficientnet_lite2", "package")
    for i in range(3):
        small = picture(i, (70, 50)).resize((260, 260), Image.Resampling.BICUBIC)
        x = np.asarray(small, dtype=np.float32) / 127.5 - 1
        with torch.no_grad():
            logits = net(torch.from_numpy(x).permute(2, 0, 1)[None])[0]
        p = np.exp(logits.double().numpy() - logits.max().item())
        p /= p.sum()
        best = sorted(range(1000), key=lambda c: -p[c])[:10]
        text = conse.encode_prompts([f"a photo of a {names[c]}" for c in best]).double().numpy()
        mix = sum(p[c] / sum(p[b] for b in best) * t for c, t in zip(best, text, strict=True))
        np.testing.assert_allclose(got[i].numpy(), mix / np.linalg.norm(mix), atol=2e-5)
    torch.testing.assert_close(got.norm(dim=1), torch.ones(3))


def test_embeddings_in_bf16_are_near_and_have_a_name_of_their_own(tiny, card, conse):
    settings = {"model": str(card), "weights": None, "templates": conse.templates}
    x, names = torch.rand(1, 2, 3, 64, 64), ["a cat", "a dog", "a bus", "a cup"]
    for tower, kind in ((tiny, "openclip"), (conse, "conse")):
        other = make_tower(SimpleNamespace(kind=kind, precision="bf16", **settings), "cpu")
        whole, rounded = (t.encode_images([picture(0), picture(1)]) for t in (tower, other))
        assert rounded.dtype == torch.float32 and not torch.equal(whole, rounded)
        torch.testing.assert_close(rounded, whole, atol=0.02, rtol=0)
        text = tower.encode_prompts(names)
        assert torch.equal(other.encode_prompts(names), text) and other.identity != tower.identity
        torch.manual_seed(0)
        backbone = backbones.make_backbone("glyphnet", None)
        net = LCCo(backbone=backbone, embedding_width=tower.width, prompts=4, width=16).eval()
        a, b = (net(x, h[None], text).logits.sigmoid() for h in (whole, rounded))
        assert 0 < (a - b).abs().max() < 0.01


def test_identities_of_conse_and_the_tower_that_settings_name(conse):
    assert ConseTower().identity == conse.identity
    other = make_tower(SimpleNamespace(kind="conse", templates=("{}",), precision="no"))
    assert other.identity != conse.identity
    shipped = backbones.read_about(backbones.model_file("shipped"))
    templates = shipped["experiment"]["tower"]["templates"]
    assert ConseTower(templates).identity == shipped["tower"]  # else its model would be refused


def test_conse_names_what_photographs_show(conse, real):
    words = vocabulary("coco80")
    table = prompts(conse, words, conse.templates)
    for cls in ("cow", "cat", "dog", "car", "sheep"):
        images = [Image.open(p) for p in sorted((real / "MSRC" / "image" / cls).iterdir())[:5]]
        sigma = (conse.encode_images(images) @ table.T).sum(0)
        assert words[int(sigma.argmax())] == cls


def test_aliases_are_names_of_imagenet_and_read_alike_on_both_sides(conse):
    assert set(semantics.IMAGENET_ALIASES) <= set(IMAGENET_CLASSNAMES)
    a = prompts(conse, ["ox", "cow", "dog"], ("a photo of a {}",))
    assert torch.equal(a[0], a[1]) and not torch.allclose(a[0], a[2], atol=0.1)


# ── vocabularies and prompts ──


def test_vocabularies():
    assert (
        len(vocabulary("coco80")) == 80
        and len(vocabulary("voc20")) == 20
        and len(vocabulary("imagenet1k")) == 998
    )
    for name in ("coco80", "voc20", "imagenet1k"):
        words = vocabulary(name)
        assert len(set(words)) == len(words) and all(w == w.strip() != "" for w in words)
    assert (
        vocabulary("coco80")[:3] == ["person", "bicycle", "car"]
        and vocabulary("coco80")[-1] == "toothbrush"
    )
    words = Vocabulary(("cat", "dog"), torch.eye(2), ("{}",))
    assert words.hash == replace(words).hash != replace(words, words=("dog", "cat")).hash


def test_target_word_knows_the_data_sets_names():
    coco, voc = vocabulary("coco80"), vocabulary("voc20")
    same = {
        "plane": "airplane",
        "bike": "bicycle",
        "tvmonitor": "tv",
        "sofa": "couch",
        "cow": "cow",
    }
    for cls, word in same.items():
        assert coco[target_word(cls, coco)] == word
    names = (
        "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike"
    )
    names = [
        *names.split(),
        "person",
        "pottedplant",
        "sheep",
        "sofa",
        "train",
        "tvmonitor",
    ]  # VOC's
    assert [target_word(c, voc) for c in names] == list(range(20))
    assert all(target_word(c, coco) is not None for c in names)
    assert target_word("flower", coco) is None
    assert target_word("Cow", ["ox", "cow"]) == 1 and target_word("cow", ["ox"]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat\n\ndog\n", "line 2 is blank or repeats a word"),
        ("cat\ndog\nCat \n", "line 3 is blank or repeats a word"),
        ("", "line 1 is blank"),
    ],
)
def test_a_bad_vocabulary_file_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "words.txt"
    path.write_text(text)
    with pytest.raises(LCCoError, match=rf"words\.txt: {message}"):
        vocabulary(path)


def test_a_good_vocabulary_file_and_a_missing_one(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(
        "\ufeffsnow  leopard\r\ncafé\r\n" + "long " * 16, encoding="utf-8"
    )  # 18 tokens in 80 bytes
    assert vocabulary(str(path))[:2] == ["snow leopard", "café"] and len(vocabulary(str(path))) == 3
    with pytest.raises(LCCoError, match="coco81.*one of coco80"):
        vocabulary("coco81")
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(LCCoError, match="in UTF-8"):
        vocabulary(path)


def test_prompts_are_the_mean_over_the_templates_and_kept_on_disk(tiny, monkeypatch):
    templates, words = ("a photo of a {}.", "the {} here"), ["cat", "dog", "cow"]
    got = prompts(tiny, words, templates)
    texts = [t.format(w) for w in words for t in templates]
    rows = tiny.encode_prompts(texts).numpy().reshape(3, 2, -1)
    for row, pair in zip(got, rows, strict=True):
        mean = torch.from_numpy(pair).mean(0, keepdim=True)
        assert torch.equal(row, torch.nn.functional.normalize(mean)[0])
    assert not torch.allclose(got[0], got[1], atol=1e-3)
    with monkeypatch.context() as m:
        m.setattr(tiny, "encode_prompts", lambda texts: pytest.fail("encoded again"))
        assert torch.equal(prompts(tiny, words, templates), got)
    torch.testing.assert_close(prompts(tiny, words[::-1], templates), got.flip(0))
    for file in (place("cache") / "texts").glob("*.npy"):
        file.write_bytes(b"damaged")
    assert torch.equal(prompts(tiny, words, templates), got)
    with pytest.raises(LCCoError, match="one `{}`"):
        prompts(tiny, words, ("a photo",))
    with pytest.raises(LCCoError, match="one `{}`"):
        prompts(tiny, words, ())
    with pytest.raises(LCCoError, match="the tower reads 16"):
        long = "one two three four five six seven eight nine ten"
        prompts(tiny, [long], ("a very nice photo of a {}",))


def test_what_is_cached_loads_no_model(card, monkeypatch):
    tower = OpenClipTower(str(card), None)
    before = prompts(tower, ["cat"], ("a {}",))
    monkeypatch.setattr("open_clip.CLIP", lambda **how: pytest.fail("the model was loaded"))
    again = OpenClipTower(str(card), None)
    assert (again.logit_scale, again.width) == (tower.logit_scale, tower.width)
    assert torch.equal(prompts(again, ["cat"], ("a {}",)), before)
    with pytest.raises(pytest.fail.Exception, match="the model was loaded"):
        again.encode_images([picture(0)])


def test_a_vocabulary_finds_a_class_by_name_synonym_or_text(tiny, tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("cat\nairplane\ndog\n")
    config = SimpleNamespace(vocabulary=str(file), templates=("a photo of a {}",))
    words = make_vocabulary(tiny, config)
    assert words.words == ("cat", "airplane", "dog")
    assert torch.equal(words.embeddings, prompts(tiny, words.words, config.templates))
    assert words.nearest("plane", tiny) == 1 and words.nearest("dog", tiny) == 2
    one = prompts(tiny, ["snow leopard"], config.templates)
    assert words.nearest("snow_leopard", tiny) == int((words.embeddings @ one[0]).argmax())


# ── pictures ──


def test_painted_by_hand():
    image = Image.fromarray(np.full((1, 3, 3), 200, np.uint8))
    mask = np.array([[0, 1, 255]], np.uint8)  # 255 is void, not the object
    black = [[0] * 3, [200] * 3, [0] * 3]
    assert np.array(painted(image, mask, "zero", (1, 1, 1)))[0].tolist() == black
    grey = [[0, 128, 255], [200] * 3, [0, 128, 255]]
    assert np.array(painted(image, mask, "mean", (0, 0.5, 1)))[0].tolist() == grey


def test_pictures_do_not_pile_up(tiny, monkeypatch):
    monkeypatch.setattr(semantics, "BATCH", 3)
    alive, most = 0, 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def pictures():
        nonlocal alive, most
        for i in range(20):
            image = picture(i)
            alive += 1
            most = max(most, alive)
            weakref.finalize(image, gone)
            yield image

    assert len(tiny.encode_images(pictures())) == 20
    assert most <= 3

"""Table 5's rivals: hand-worked votes; every pipeline whole on tiny models in local folders."""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import drawn
import numpy as np
import pytest
import torch
from PIL import Image

from lcco.backbones import make_backbone
from lcco.common import LCCoError, Missing
from lcco.data import load_data
from lcco.experiment.evaluate import evaluate_all
from lcco.experiment.features import Features
from lcco.experiment.rivals import (
    HUB,
    RIVALS,
    cut_out,
    kmeans,
    off_border,
    rivals,
    vote,
)
from lcco.semantics import make_vocabulary, vocabulary

torch.set_num_threads(1)
WORDS = ("cow", "dog", "car", "cat")
# A random model's scores say nothing, so nothing may be thrown away for a low one.
LENIENT = {
    "sam": {"points_per_crop": 3, "pred_iou_thresh": -100.0, "stability_score_thresh": 0.0},
    "sam3": {"threshold": 0.0},
}


# -------------------------------------------------------------------------------------- tiny models
def clip_tokenizer(T):
    letters = [chr(c) for c in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *[f"{c}</w>" for c in letters]]
    return T.CLIPTokenizer(vocab={w: n for n, w in enumerate(words)}, merges=[])


def tiny_sam(T):
    heads = {"hidden_size": 16, "num_attention_heads": 2}
    vision = {
        "output_channels": 16,
        "num_hidden_layers": 1,
        "image_size": 64,
        "patch_size": 16,
        "window_size": 2,
    }
    vision |= {
        "global_attn_indexes": [0],
        "num_pos_feats": 8,
        "mlp_dim": 16,
        "initializer_range": 0.02,
        **heads,
    }
    prompt = {"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
    decoder = {"mlp_dim": 16, "iou_head_hidden_dim": 16, **heads}
    config = T.SamConfig(
        vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder
    )
    sizes = {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}}
    sizes |= {"mask_size": {"longest_edge": 16}, "mask_pad_size": {"height": 16, "width": 16}}
    return T.SamModel(config), T.SamProcessor(T.SamImageProcessor(**sizes))


def tiny_clipseg(T):
    tokens = {"eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 1, "vocab_size": 60}
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = T.CLIPSegConfig(
        text_config={"num_hidden_layers": 1, **shape, **tokens}, projection_dim=16,
        vision_config={"num_hidden_layers": 2, "image_size": 32, "patch_size": 8, **shape},
        extract_layers=[0, 1], reduce_dim=16, decoder_intermediate_size=16,
        decoder_num_attention_heads=2,
    )  # fmt: skip
    images = T.ViTImageProcessor(size={"height": 32, "width": 32})
    return T.CLIPSegForImageSegmentation(config), T.CLIPSegProcessor(images, clip_tokenizer(T))


def tiny_sam3(T):
    shape = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    trunk = {
        "model_type": "sam3_vit_model",
        "num_hidden_layers": 2,
        "image_size": 56,
        "patch_size": 14,
        **shape,
    }
    trunk |= {"window_size": 2, "global_attn_indexes": [1], "pretrain_image_size": 28}
    text = {
        "vocab_size": 60,
        "num_hidden_layers": 1,
        "max_position_embeddings": 32,
        "projection_dim": 16,
        **shape,
    }
    text |= {"eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 1}
    config = T.Sam3Config(
        vision_config={"backbone_config": trunk, "fpn_hidden_size": 16,
                       "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
        text_config=text, geometry_encoder_config={"num_layers": 1, **shape},
        detr_encoder_config={"num_layers": 1, **shape},
        detr_decoder_config={"num_layers": 1, "num_queries": 5, **shape},
        mask_decoder_config={"hidden_size": 16, "num_attention_heads": 2},
    )  # fmt: skip
    images = T.Sam3ImageProcessor(
        size={"height": 56, "width": 56}, mask_size={"height": 16, "width": 16}
    )
    return T.Sam3Model(config), T.Sam3Processor(images, clip_tokenizer(T))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, str]:
    """Local folders of tiny random models, as a hub's snapshot has them."""
    T = pytest.importorskip("transformers")
    T.utils.logging.disable_progress_bar()
    root, out = tmp_path_factory.mktemp("weights"), {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, make in {"sam": tiny_sam, "sam3": tiny_sam3, "clipseg": tiny_clipseg}.items():
            for part in make(T):
                part.save_pretrained(root / name)
            (root / name / ".cache").mkdir()  # as `hf download --local-dir` leaves it
            out[name] = str(root / name)
    return out


class Tower:
    """Embeds a picture by its mean colour: red means the first word, green the second, …"""

    width, logit_scale, identity, mean, calls = 4, 20.0, "colours", (0.5, 0.5, 0.5), 0

    def encode_images(self, images):
        rows = []
        for image in images:
            colour = np.asarray(image.convert("RGB"), np.float32).mean((0, 1)) / 255
            rows.append(torch.tensor([*colour, 0.1]))
        self.calls += len(rows)
        return (
            torch.nn.functional.normalize(torch.stack(rows), dim=-1) if rows else torch.zeros(0, 4)
        )

    def encode_prompts(self, texts):
        return torch.stack(
            [torch.eye(4)[next((n for n, w in enumerate(WORDS) if w in t), 3)] for t in texts]
        )


@pytest.fixture
def data(tmp_path):
    return load_data(str(drawn.folders(tmp_path, n=4)))


@pytest.fixture
def parts(tmp_path):
    """Features of a random backbone and a tower that sees colours, and four words."""
    file = tmp_path / "words.txt"
    file.write_text("\n".join(WORDS) + "\n")
    torch.manual_seed(0)
    features = Features(Tower(), make_backbone("glyphnet", None, 4), 64)
    config = SimpleNamespace(vocabulary=str(file), templates=("a photo of a {}.",))
    return features, make_vocabulary(features.tower, config)


def make(name, parts, weights=None, **settings):
    (found,) = rivals([name], *parts, weights).values()
    found.settings = found.settings | settings
    return found


# ------------------------------------------------------------------------------ crop, pad and boxes
def test_a_cut_out_is_cropped_whitened_and_padded_as_worked_by_hand():
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    mask = np.zeros((4, 6), bool)
    mask[1, 2:5] = mask[2, 3] = True  # box: rows 1–2, columns 2–4
    out = np.asarray(cut_out(image, mask))
    assert out.shape == (3, 3, 3)  # 2 × 3 padded to a square: no row above, one below
    assert (out[0] == image[1, 2:5]).all() and (out[1, 1] == image[2, 3]).all()
    assert (out[1, [0, 2]] == 255).all() and (out[2] == 255).all()
    mask = np.zeros((9, 9), bool)
    mask[0:5, 4] = True  # 5 × 1: two white columns on either side
    out = np.asarray(cut_out(np.zeros((9, 9, 3), np.uint8), mask))
    assert out.shape == (5, 5, 3) and (out[:, 2] == 0).all() and (out[:, [0, 1, 3, 4]] == 255).all()


def test_the_class_of_a_set_is_voted_by_sum():
    scores = [
        np.array([[0.6, 0.4, 0.0], [0.1, 0.2, 0.0]]),
        np.array([[0.55, 0.45, 0.0]]),
        np.array([[0.0, 0.9, 0.1]]),
    ]  # best mask of each class: (.6 .4), (.55 .45), (0 .9); sums 1.15 and 1.75
    assert vote(scores) == 1
    assert vote([np.zeros((0, 3)), scores[0]]) == 0  # an image without masks does not vote
    assert vote([np.zeros((0, 3))]) == 0  # of no use: there is no mask to choose


# ------------------------------------------------------------------------------------- clustering
def test_kmeans_finds_separate_directions():
    torch.manual_seed(0)
    truth = torch.arange(3).repeat_interleave(20)
    x = torch.nn.functional.normalize(torch.eye(3)[truth] + 0.05 * torch.randn(60, 3), dim=1)
    labels = kmeans(x, 3)
    assert all(len(labels[truth == c].unique()) == 1 for c in range(3))
    assert len(labels.unique()) == 3
    same = torch.ones(4, 2) / 2**0.5  # fewer directions than clusters
    assert kmeans(same, 3).unique().numel() == 1


def test_a_patch_is_salient_that_differs_from_the_border():
    f = torch.zeros(1, 4, 4, 2)
    f[..., 0] = 1
    f[0, 1, 1] = torch.tensor([0.0, 1.0])  # at a right angle to the border's
    f[0, 2, 2] = torch.tensor([0.5, 0.75**0.5])  # cosine 1/2
    expected = torch.zeros(4, 4)
    expected[1, 1], expected[2, 2] = 1, 0.5
    torch.testing.assert_close(off_border(f)[0], expected)


def test_salient_clusters_are_those_of_the_images_together(parts):
    one = make("clustering", parts, threshold=1.2, full=0.1)
    labels = torch.tensor([[[0, 1], [2, 2]], [[0, 1], [1, 2]]])
    saliency = torch.tensor([[[4.0, 2.0], [1.0, 1.0]], [[4.0, 0.5], [0.5, 3.0]]])  # means 2 and 2
    # relative: image 1 → 2, 1, 0.5; image 2 → 2, 0.25, 1.5; means 2, 0.625, 1
    assert torch.equal(one.salient(labels, saliency), labels == 0)
    one.settings["threshold"] = 1.0
    assert torch.equal(one.salient(labels, saliency), (labels == 0) | (labels == 2))
    one.settings["threshold"] = 9.0  # none: the most salient one
    assert torch.equal(one.salient(labels, saliency), labels == 0)
    one.settings.update(threshold=0.6, full=0.5)  # a patch of four counts half
    scores = (2 / 2 + 2 / 2) / 2, (1 / 2 + 0.25) / 2, (0.5 + 1.5 / 2) / 2
    assert scores == (1, 0.375, 0.625)
    assert torch.equal(one.salient(labels, saliency), (labels == 0) | (labels == 2))


def test_clustering_finds_what_stands_out_in_a_set(parts, data):
    """The net is random, but its features still tell a coloured square on a plain ground."""
    maps = list(make("clustering", parts, in_drawings=3)(data, list(data.groups["cow"]), "cow"))
    assert len(maps) == 4 and all(m.shape == (8, 8) and set(np.unique(m)) <= {0, 1} for m in maps)
    assert all(m.any() for m in maps)
    again = make("clustering", parts, in_drawings=3)(data, list(data.groups["cow"]), "dog")
    assert all((a == b).all() for a, b in zip(maps, again, strict=True))  # it sees no class name


def test_clustering_is_the_same_with_a_live_backbone_and_known_by_its_weights(parts, data):
    features, words = parts
    torch.manual_seed(0)
    live = Features(features.tower, make_backbone("glyphnet", None, 0), 64)
    frozen, free = make("clustering", parts), make("clustering", (live, words))
    items = list(data.groups["cow"])
    a, b = frozen.patches(data, items), free.patches(data, items)
    torch.testing.assert_close(a, b, atol=0.02, rtol=0.02)  # kept maps are in half precision
    assert live.backbone.training  # a training may go on
    assert frozen.record["backbone"] == free.record["backbone"]
    with torch.no_grad():
        next(live.backbone.stages[2].parameters()).mul_(0.5)
    assert make("clustering", (live, words)).path != free.path


# ---------------------------------------------------------------------------------------- weights
def test_absent_weights_say_so_at_once_and_how_to_get_them(monkeypatch, tmp_path, parts, data):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    began = time.monotonic()
    for one in rivals(["sam", "sam3", "clipseg"], *parts).values():
        repo, _, commit = HUB[one.model].partition("@")
        assert len(commit) == 40
        with pytest.raises(Missing, match=f"`{repo}` not found: .*`hf download {repo}") as caught:
            one.evaluate(data, ["ufo"])
        assert caught.value.status == f"not run: weights not found ({repo})"
    with pytest.raises(Missing, match="`seem` not found: .*class maps") as caught:
        make("seem", parts).evaluate(data, ["ufo"])
    assert caught.value.status == "not run: weights not found (seem)"
    with pytest.raises(Missing, match="`gone` not found: there is no"):
        make("sam", parts, {"sam": str(tmp_path / "gone")}).evaluate(data, ["ufo"])
    for one in rivals([n for n in RIVALS if n != "clustering"], *parts).values():
        with pytest.raises(Missing):  # a table's row then says so
            one.evaluate(data, ["ufo"])
    assert time.monotonic() - began < 30


def test_mistakes_are_named(parts, weights, data):
    with pytest.raises(LCCoError, match="no rival `sam-2`; there are: sam, sam-gt"):
        rivals(["sam-2"], *parts)
    with pytest.raises(LCCoError, match="not AutoModelForMaskGeneration, or cut short"):
        list(make("sam", parts, {"sam": weights["clipseg"]})(data, [0], "cow"))


def test_weights_that_lack_parameters_are_refused(parts, weights, tmp_path, data):
    """transformers would fill them with random numbers and only warn."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "clipseg"
    shutil.copytree(weights["clipseg"], folder)
    state = load_file(folder / "model.safetensors")
    state.pop("decoder.film_mul.weight")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(LCCoError, match="`decoder.film_mul.weight` is missing"):
        list(make("clipseg", parts, {"clipseg": str(folder)})(data, [0], "cow"))


# ------------------------------------------------------------------------------ pipelines, whole
@pytest.mark.parametrize("name", [n for n in RIVALS if not n.startswith("seem")])
def test_each_pipeline_runs_from_images_to_scores(name, parts, weights, data):
    rival = make(name, parts, weights, **LENIENT.get(name, {}))
    maps = list(rival(data, list(data.groups["cow"])[:3], "cow"))
    assert len(maps) == 3 and all(m.ndim == 2 and m.min() >= 0 and m.max() <= 1 for m in maps)
    assert any(m.any() for m in maps)
    done = rival.evaluate(data, ("ufo", "native"), 3)
    assert done["ufo"].summary["images"] == 8 and 0 < done["native"].summary["P"] <= 1
    record = rival.record
    assert record["rival"] == rival.name and record["environment"]["versions"]["torch"]
    now = {"digest": data.digest(), "masks": data.truth_digest()}
    assert record["data"] == {data.name: now}
    assert rival.path.is_dir() and rival.path.name.rpartition("-")[2] not in json.dumps(record)
    assert ("weights" in record) == bool(rival.model)
    assert str(Path(weights["sam"]).parent) not in json.dumps(record)  # no path of this machine


@pytest.mark.parametrize("name", ["sam3", "clipseg"])
def test_the_word_asked_for_is_the_sets_own_not_the_true_class(name, parts, weights, data):
    rival, asked = make(name, parts, weights, **LENIENT.get(name, {})), []
    model, processor = rival.net

    class Processor:
        def __getattr__(self, attribute):
            return getattr(processor, attribute)

        def __call__(self, text, **how):
            asked.append(text)
            return processor(text=text, **how)

    rival.net = model, Processor()
    list(rival(data, data.groups["cow"][:2], "car"))
    assert np.ravel(asked).tolist() == ["cow", "cow"]


def test_scores_are_kept_and_settings_and_data_part_them(parts, data, tmp_path, monkeypatch):
    one = make("clustering", parts, in_drawings=3)
    first = one.evaluate(data, ("ufo",), 3)
    other = load_data(str(drawn.folders(tmp_path, n=3, name="other", first=300)))
    assert one.evaluate(other, ("ufo",), 3)["ufo"].rows != first["ufo"].rows
    with monkeypatch.context() as m:
        m.setattr(type(one), "__call__", lambda *a: pytest.fail("scored before"))
        again = make("clustering", parts, in_drawings=3)
        assert again.evaluate(data, ("ufo",), 3) == first and again.record["data"]
    for file in one.path.glob("*.json"):
        file.write_text("{cut")
    assert one.evaluate(data, ("ufo",), 3) == first  # damaged, made again
    assert make("clustering", parts, in_drawings=4).path != one.path


def test_rivals_are_collected_as_runs_are(parts, weights, data, tmp_path, monkeypatch):
    from lcco.config import Profile
    from lcco.experiment.tables import collect

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    local = {"clipseg": weights["clipseg"]}
    models = rivals(["sam", "clipseg", "clustering"], *parts, local)
    profile = Profile(name="tiny", tests=(str(tmp_path / "set"),), protocols=("ufo",), group_size=3)
    rows = collect(profile, "table5_foundation", models).set_index("row")
    assert rows.loc["SAM", "status"] == "not run: weights not found (facebook/sam-vit-huge)"
    assert (rows.loc[["CLIPSeg", "Clustering (no training)"], "status"] == "measured").all()
    assert (
        rows.loc["CLIPSeg", "run"] == models["CLIPSeg"].path.name and rows.loc["CLIPSeg", "J"] >= 0
    )


def test_a_picture_is_looked_at_once(parts, weights, data):
    """Two protocols, their groups and both halves of a set share what SAM found."""
    sam, asked = make("sam", parts, weights, **LENIENT["sam"]), []
    pipeline = sam.net
    sam.net = lambda image, **how: asked.append(image) or pipeline(image, **how)
    evaluate_all(sam, data, ("ufo", "native"), 3)
    assert len(asked) == 8


def test_sam_takes_the_class_that_the_set_shares(parts, monkeypatch):
    """Masks fixed by hand: each image has a red and a blue or green one; red = `cow` is shared."""
    red, other = drawn.rectangle((0, 0, 20, 32)) == 1, drawn.rectangle((24, 0, 48, 32)) == 1
    sam, empty = make("sam", parts), np.zeros_like(red)  # SAM's empty masks are dropped
    sam.net = lambda image, **_: {"masks": [other, red, empty]}

    class Pictures:
        def image(self, i):
            pixels = np.full((32, 48, 3), 90, np.uint8)
            pixels[red], pixels[other] = (250, 0, 0), [(0, 0, 255), (0, 255, 0), (0, 0, 255)][i]
            return Image.fromarray(pixels)

    sam.words.embeddings[3] = 0  # the Tower's colours name the first three words
    found = list(sam(Pictures(), [0, 1, 2], "dog"))  # the name given is not looked at
    votes = [np.asarray(m) == red for m in found]
    assert len(found) == 3 and all(v.all() for v in votes)


def test_sam_gt_is_given_the_true_boxes(parts, weights, data):
    gt, asked = make("sam-gt", parts, weights), []
    model, processor = gt.net

    class Processor:
        post_process_masks = processor.post_process_masks

        def __call__(self, input_boxes, **how):
            asked.extend(input_boxes)
            return processor(input_boxes=input_boxes, **how)

    gt.net = model, Processor()
    (mask,) = gt(data, [data.groups["cow"][0]], "cow")
    assert asked == [[list(drawn.BOX)]] and mask.shape == drawn.SIZE[::-1]
    two = np.zeros((32, 48), np.uint8)
    two[1:3, 2:5] = two[3, 5] = 1  # touches at a corner: the same object
    two[6:9, 8:10] = 1
    data.mask = lambda i, classes: two * (classes == ["cow"])
    list(gt(data, [1], "cow"))
    assert asked[1:] == [[[2, 1, 6, 4], [8, 6, 10, 9]]]
    assert not np.any(list(gt(data, [1], "dog"))) and len(asked) == 2  # nothing to ask for


# ------------------------------------------------------------------------------------------- SEEM
def test_seems_vote_and_its_ties(parts):
    """Class maps of a few images: 0 no thing, 255 void, else 1 + a place in coco80."""
    seem = make("seem", parts)
    a, b, nothing = (np.zeros((4, 5), np.uint8) for _ in range(3))
    a[0, 0], b[:2], b[3] = 1, 20, 255
    assert seem.common([a, b], "") == 20  # one image each: the larger area; void has no vote
    assert seem.common([a, a, b], "") == 1  # two images against one, whatever the area
    assert not (nothing == seem.common([nothing, nothing], "")).any()


@pytest.fixture
def maps(data, tmp_path) -> Path:
    """SEEM's class maps as a user makes them: left half a cow, some of it a person."""
    folder, words = tmp_path / "seem", vocabulary("coco80")
    folder.mkdir()
    for i, (file, _) in enumerate(data.files):
        width, height = data.image(i).size
        classes = np.zeros((height, width), np.uint8)
        classes[:, : width // 2] = 1 + words.index("cow")
        if i in data.groups["cow"][:2]:
            classes[0] = 1 + words.index("person")
        sha = hashlib.sha256(file.read_bytes()).hexdigest()[:16]  # without this package
        Image.fromarray(classes).save(folder / f"{sha}.png")
    return folder


def test_seem_reads_class_maps_from_a_folder(parts, data, maps):
    weights, items = {"seem": str(maps)}, list(data.groups["cow"])
    cow = [np.asarray(Image.open(maps / f"{data.content(i)}.png")) == 20 for i in items]
    seem, gt = make("seem", parts, weights), make("seem-gt", parts, weights)
    for found in (seem(data, items, "dog"), gt(data, items, "cow"), gt(data, items, "kow_cow")):
        assert all((a == b).all() for a, b in zip(found, cow, strict=True))
    assert gt.common([], "person") == 1  # by name; next a synonym, then the nearest by its text
    assert gt.common([], "aeroplane") == 1 + vocabulary("coco80").index("airplane")
    assert gt.common([], "kow_cow_bull") == 1 + vocabulary("coco80").index("cow")
    assert not np.any(list(gt(data, items, "dog")))  # the true class is in no picture
    done = seem.evaluate(data, ("ufo", "native"), 3)
    assert done["ufo"].summary["images"] == 8 and str(maps) not in json.dumps(seem.record)
    assert "tower" in gt.record and "tower" not in seem.record
    before = seem.path
    Image.new("L", data.image(0).size).save(maps / f"{data.content(0)}.png")
    assert make("seem", parts, weights).path != before  # other maps, other scores


def test_a_class_map_that_cannot_be_used_is_one_line(parts, data, maps):
    def asked() -> None:
        make("seem", parts, {"seem": str(maps)}).evaluate(data, ["ufo"])

    file = maps / f"{data.content(0)}.png"
    Image.new("L", (5, 4)).save(file)
    what = f"{file.name}: (5, 4) pixels for a picture of {data.image(0).size}; make class maps"
    with pytest.raises(LCCoError, match=re.escape(what)):
        asked()
    Image.new("L", data.image(0).size, 81).save(file)
    with pytest.raises(LCCoError, match=f"{file.name}: .*class numbers of 0 to 80"):
        asked()
    file.unlink()
    with pytest.raises(Missing, match=f"{file.name} for {data.keys[0]}; make class maps") as caught:
        asked()
    assert caught.value.status == f"not run: weights not found ({file.name})"
    assert "\n" not in str(caught.value) and "rivals.Seem" in str(caught.value)
    with pytest.raises(Missing, match="`gone` not found: .*make class maps"):
        make("seem", parts, {"seem": str(maps / "gone")}).evaluate(data, ["ufo"])

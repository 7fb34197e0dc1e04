"""Backbones: strides and channels, frozen statistics, weights by package, file and hub, errors."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from lcco import backbones
from lcco.backbones import (
    classifier,
    fold_norms,
    make_backbone,
    read_about,
    read_tensors,
    tensors_digest,
)
from lcco.common import LCCoError, Missing


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def lite2() -> backbones.Backbone:
    return make_backbone("efficientnet_lite2", "package", frozen_stages=4)


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("resnet18", (64, 128, 256, 512)),
        ("resnet50", (256, 512, 1024, 2048)),
        ("efficientnet_lite2", (24, 48, 120, 352)),
        ("glyphnet", (32, 64, 128, 256)),
    ],
)
def test_maps_have_their_strides_and_go_on_from_any_of_them(name, channels):
    net = make_backbone(name, None).eval()
    assert net.channels == channels
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        maps = net(x)
        for m, c, stride in zip(maps, channels, (4, 8, 16, 32), strict=True):
            assert m.shape == (2, c, 64 // stride, 96 // stride)
        for count in (1, 2, 3, 4):
            for a, b in zip(net(None, maps[:count]), maps, strict=True):
                assert torch.equal(a, b)
        for a, b in zip(net(x.contiguous(memory_format=torch.channels_last)), maps, strict=True):
            assert torch.equal(a, b)


def test_the_backbone_is_the_classifier_without_its_head_and_normalises_by_itself():
    net = classifier("resnet18", None)
    backbone = make_backbone("resnet18", None).eval()
    backbone.load_state_dict(_cut(net.state_dict()))
    x = torch.rand(2, 3, 64, 64)
    mean, std = torch.tensor(backbone.mean).view(3, 1, 1), torch.tensor(backbone.std).view(3, 1, 1)
    with torch.no_grad():
        want = net((x - mean) / std)
        got = net.fc(backbone(x)[3].mean((2, 3)))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def _cut(state):
    """ResNet's names as the backbone's, written out by hand."""
    where = {
        "conv1": "0.0",
        "bn1": "0.1",
        "layer1": "0.4",
        "layer2": "1.0",
        "layer3": "2.0",
        "layer4": "3.0",
    }
    out = {}
    for key, value in state.items():
        head, rest = key.split(".", 1)
        if head in where:
            out[f"stages.{where[head]}.{rest}"] = value
    return out


def _statistics(module: nn.Module) -> list[torch.Tensor]:
    norms = (m for m in module.modules() if isinstance(m, nn.BatchNorm2d))
    return [m.running_mean.clone() for m in norms]


def test_frozen_stages_take_no_gradient_and_keep_statistics_while_others_learn():
    net = make_backbone("resnet18", None, frozen_stages=2).train()
    before = [_statistics(stage) for stage in net.stages]
    sum(m.square().mean() for m in net(torch.rand(2, 3, 64, 64))).backward()
    for n, stage in enumerate(net.stages):
        same = all(torch.equal(a, b) for a, b in zip(before[n], _statistics(stage), strict=True))
        gradients = [
            p.grad is not None and bool(p.grad.abs().sum() > 0) for p in stage.parameters()
        ]
        assert same == (n < 2)  # random weights: the free stages use batch statistics
        assert all(gradients) if n >= 2 else not any(gradients)


def test_pretrained_weights_keep_statistics_even_where_they_are_trained(tmp_path):
    torch.save(classifier("resnet18", None).state_dict(), tmp_path / "net.pth")
    net = make_backbone("resnet18", str(tmp_path / "net.pth"), frozen_stages=1).train()
    before = _statistics(net)
    sum(m.square().mean() for m in net(torch.rand(2, 3, 64, 64))).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, _statistics(net), strict=True))
    assert all(
        p.grad is not None and torch.isfinite(p.grad).all() for p in net.stages[1:].parameters()
    )
    assert net.stages[1].training


def test_identity_follows_frozen_weights_alone():
    net = make_backbone("glyphnet", None, frozen_stages=2)
    first = net.identity
    with torch.no_grad():
        net.stages[3][0][0].conv1.weight.add_(1)
    assert net.identity == first
    with torch.no_grad():
        net.stages[0][0][0].weight.add_(1)
    assert net.identity != first
    assert tensors_digest({"a": torch.zeros(4)}) != tensors_digest({"a": torch.zeros(2, 2)})


def test_the_package_file_fills_every_tensor_in_order(lite2):
    source = read_tensors(backbones.weights_file("efficientnet_lite2", "package"))
    net = classifier("efficientnet_lite2", "package")
    own = net.state_dict()
    assert len(source) == len(own) == 386
    for (theirs, a), (ours, b) in zip(source.items(), own.items(), strict=True):
        assert torch.equal(a, b), (theirs, ours)
        assert (
            theirs.rsplit(".", 1)[-1] == ours.rsplit(".", 1)[-1]
        )  # weight to weight, running_var to running_var
    x = torch.rand(1, 3, 96, 96)
    with torch.no_grad():  # the cut network feeds the same head
        want = net.forward_features(x * 2 - 1)
        got = net.bn2(net.conv_head(lite2.eval()(x)[3]))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert not any(p.requires_grad for p in lite2.parameters())


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_local_files_load_under_classifier_names_wrapped_names_and_own_names(tmp_path, suffix):
    from safetensors.torch import save_file

    def save(state, name):
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "pth":
            torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
        else:
            save_file(
                {k: v.half().contiguous() for k, v in state.items() if v.is_floating_point()}, path
            )
        return str(path)

    source = classifier("glyphnet", None)
    source.fc = nn.Linear(source.fc.in_features, 7)
    want = make_backbone(
        "glyphnet", save(source.state_dict(), "classifier")
    )  # its head of 7 is not looked at
    torch.testing.assert_close(
        want.stages[0][0][0].weight, source.conv1[0].weight, atol=1e-3, rtol=1e-3
    )
    again = make_backbone("glyphnet", save(want.state_dict(), "own"), frozen_stages=4)
    for a, b in zip(want.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_own_names_of_every_architecture_find_their_way_back(tmp_path, lite2):
    for name, net in (("efficientnet_lite2", lite2), ("resnet18", make_backbone("resnet18", None))):
        torch.save(net.state_dict(), tmp_path / "own.pth")
        assert (
            make_backbone(name, str(tmp_path / "own.pth"), net.frozen_stages).identity
            == net.identity
        )


def test_a_truncated_missing_or_foreign_file_is_named(tmp_path):
    path = tmp_path / "net.pth"
    torch.save(classifier("glyphnet", None).state_dict(), path)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(LCCoError, match=r"net\.pth: not weights, or cut short"):
        make_backbone("glyphnet", str(path))
    (tmp_path / "net.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(LCCoError, match=r"net\.safetensors.*cut short"):
        make_backbone("glyphnet", str(tmp_path / "net.safetensors"))
    with pytest.raises(Missing, match=r"weights `absent\.pth` not found: there is no file"):
        make_backbone("resnet18", str(tmp_path / "absent.pth"))
    torch.save({"a": 1}, path)
    with pytest.raises(LCCoError, match="not weights of resnet18"):
        make_backbone("resnet18", str(path))
    torch.save(classifier("glyphnet", None).state_dict(), path)
    with pytest.raises(LCCoError, match="not weights of resnet18.*Missing key"):
        make_backbone("resnet18", str(path))
    torch.save(classifier("resnet18", None).state_dict(), path)
    with pytest.raises(LCCoError, match=r"not weights of resnet34.*Missing key.*layer1\.2"):
        make_backbone("resnet34", str(path))
    with pytest.raises(LCCoError, match="not weights of resnet50.*Missing key"):
        make_backbone("resnet50", str(path))


def test_the_shipped_model_gives_its_trained_stages_over_what_it_started_from(lite2):
    net = make_backbone("efficientnet_lite2", "shipped", frozen_stages=2)
    state = read_tensors(backbones.model_file("shipped"))
    for key, value in net.state_dict().items():
        trained = state.get(f"backbone.{key}")
        assert torch.equal(value, lite2.state_dict()[key] if trained is None else trained.float())
        assert (trained is None) == key.startswith(("stages.0", "stages.1"))
    assert net.keep_statistics and read_about(backbones.model_file("shipped"))["words"]
    with pytest.raises(LCCoError, match="its backbone is efficientnet_lite2; set"):
        make_backbone("resnet18", "shipped")


def test_unknown_names_and_sources_are_refused():
    with pytest.raises(LCCoError, match="one of resnet18"):
        make_backbone("resnet51", None)
    with pytest.raises(LCCoError, match="use `package`"):
        make_backbone("efficientnet_lite2", "imagenet")
    with pytest.raises(LCCoError, match="does not exist for resnet18; use .*`imagenet`"):
        make_backbone("resnet18", "package")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty cache of the hub, and no way to it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


@pytest.mark.parametrize("endpoint", [None, "http://127.0.0.1:9"], ids=["offline", "no net"])
def test_absent_hub_weights_say_within_seconds_how_to_get_them(offline, monkeypatch, endpoint):
    start = time.monotonic()
    if endpoint:  # nobody answers there
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    with pytest.raises(Missing, match=r"`hf download timm/resnet50.tv_in1k .*local copy") as e:
        make_backbone("resnet50", "imagenet")
    assert e.value.status == "not run: weights not found (timm/resnet50.tv_in1k)"
    assert time.monotonic() - start < 10


def test_hub_weights_already_in_the_cache_are_used_offline(offline, tmp_path):
    from safetensors.torch import save_file

    source, repo = classifier("resnet18", None), tmp_path / "models--timm--resnet18.tv_in1k"
    for part in ("refs", "snapshots/0123"):
        (repo / part).mkdir(parents=True)
    (repo / "refs" / "main").write_text("0123")
    save_file(source.state_dict(), repo / "snapshots" / "0123" / "model.safetensors")
    net = make_backbone("resnet18", "imagenet")
    assert torch.equal(net.stages[0][0].weight, source.conv1.weight)


def test_torchvisions_own_files_give_its_maps(tmp_path):
    import torchvision

    net = torchvision.models.resnet18().eval()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    backbone = make_backbone("resnet18", str(tmp_path / "net.pth")).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        want = net(backbone.normalise(x))
        got = net.fc(backbone(x)[3].mean((2, 3)))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite2", "glyphnet"])
def test_folded_norms_change_nothing_but_rounding(name):
    torch.manual_seed(0)
    net = make_backbone(name, None, 4)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as trained ones are
            torch.nn.init.normal_(module.bias, std=0.2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        before = net(images)
        count = sum(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())
        fold_norms(net)
        after = net(images)
    left = sum(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())
    assert left <= 1 < count  # a deep stem's first norm follows a block, not a convolution
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))

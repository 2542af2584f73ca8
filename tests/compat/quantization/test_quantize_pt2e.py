"""PT2 export quantization over the core: integers as annotated, accuracy kept, nothing lost on the way."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import pennyweight as pw
from pennyweight.compat.export import capture_pre_autograd_graph, export_for_training
from pennyweight.compat.quantization.pt2e import (
    allow_exported_model_train_eval,
    move_exported_model_to_eval,
    move_exported_model_to_train,
)
from pennyweight.compat.quantization.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from pennyweight.compat.quantization.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)
from pennyweight.compat.quantization.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def xnnpack(**options):
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(**options))


def x86(**options):
    return X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(**options))


QUANTIZERS = {
    "xnnpack": (xnnpack, {}),
    "xnnpack by channel": (xnnpack, {"is_per_channel": True}),
    "xnnpack dynamic": (xnnpack, {"is_dynamic": True}),
    "x86": (x86, {}),
    "x86 reduced": (x86, {"reduce_range": True}),
    "x86 dynamic": (x86, {"is_dynamic": True}),
}


def sites(model):
    return {event.site: event.data["spec"] for event in pw.journal(model).of("site")}


def calibrated(prepared, batches):
    for batch in batches:
        prepared(batch)
    return prepared


@pytest.mark.parametrize("name", QUANTIZERS)
def test_accuracy_after_training(name, net, exported, batches, task):
    make, options = QUANTIZERS[name]
    quantized = convert_pt2e(calibrated(prepare_pt2e(exported(net), make(**options)), batches))
    assert task[1](net) > 80
    assert task[1](quantized) >= task[1](net) - 1.5
    with torch.no_grad():
        assert not torch.equal(quantized(batches[0]), net(batches[0]))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_accuracy_of_quantization_aware_training(name, net, exported, task, tmp_path):
    fit, accuracy = task
    make, options = QUANTIZERS[name]
    prepared = fit(prepare_qat_pt2e(exported(net.train()), make(is_qat=True, **options)), 20, 0.005, seed=1)
    move_exported_model_to_eval(prepared)
    fake = accuracy(prepared)
    quantized = convert_pt2e(prepared)
    assert fake > 80
    assert abs(accuracy(quantized) - fake) <= 0.5
    pw.save(quantized, tmp_path / "a.dwt")
    x = torch.randn(5, 1, 6, 6)
    with torch.no_grad():
        np.testing.assert_allclose(
            pw.load(tmp_path / "a.dwt").run(x.numpy()), quantized(x).numpy(), atol=1e-4
        )


def test_what_xnnpack_makes(net, exported, batches):
    quantized = convert_pt2e(calibrated(prepare_pt2e(exported(net), xnnpack(is_per_channel=True)), batches))
    activation, weight = "int8[*]+z", "int8n[1,*]"
    assert sites(quantized) == {
        "stem:input": activation, "stem:weight": weight, "mix:input": activation, "mix:weight": weight,
        "head:input": activation, "head:weight": weight, ":add/0:0": activation, ":adaptive_avg_pool2d/0:0": activation,
    }  # fmt: skip
    assert not [m for m in quantized.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.BatchNorm2d)]
    assert {type(t) for t in quantized.state_dict().values()} == {torch.Tensor}
    kinds = [op.kind for op in pw.lower(quantized, batches[0])]
    assert "requant_add" in kinds  # the residual stays in its accumulator
    assert kinds.count("dequantize") == 0


def test_what_x86_makes(net, exported, batches):
    made = sites(convert_pt2e(calibrated(prepare_pt2e(exported(net), x86()), batches)))
    assert made["stem:input"] == "uint8[*]+z" and made["stem:weight"] == "int8[1,*]"
    assert ":add/0:0" in made and ":adaptive_avg_pool2d/0:0" in made


def test_dynamic_quantizes_linear_layers_alone_and_needs_no_batches(net, exported):
    quantized = convert_pt2e(prepare_pt2e(exported(net), xnnpack(is_dynamic=True)))
    assert sites(quantized) == {"head:input": "uint8[*]+z", "head:weight": "int8n[*]"}
    assert type(quantized.stem) is nn.Conv2d


def test_batch_norm_is_folded_before_annotation(net, exported, batches):
    seen = []

    class Watch(XNNPACKQuantizer):
        def annotate(self, model):
            seen.extend(str(n.target) for n in model.graph.nodes)
            x = batches[0]
            torch.testing.assert_close(model(x), net(x), atol=1e-5, rtol=1e-5)
            return super().annotate(model)

    graph = exported(net)
    weight = net.stem.weight.clone()
    prepare_pt2e(graph, Watch().set_global(get_symmetric_quantization_config()))
    assert not [s for s in seen if "batch_norm" in s]
    assert torch.equal(net.stem.weight, weight)
    assert torch.equal(graph(batches[0]), net(batches[0]))  # what was given still works


def test_norms_behind_a_shared_layer_are_folded_apart():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(4, 4, bias=False)
            self.a, self.b = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.b(self.l(torch.relu(self.a(self.l(x)))))

    torch.manual_seed(0)
    model, x = Twice().train(), torch.randn(64, 4)
    for _ in range(5):
        model(x + 1)
    model.eval()
    quantized = convert_pt2e(
        calibrated(prepare_pt2e(capture_pre_autograd_graph(model, (x,)), xnnpack()), [x])
    )
    with torch.no_grad():
        assert (quantized(x) - model(x)).abs().max() < 0.05 * model(x).abs().max()
    assert len([s for s in sites(quantized) if s.endswith(":weight")]) == 2


def test_forwards_feed_statistics_until_conversion(net, exported, batches):
    wide = [10 * b for b in batches]
    narrow = convert_pt2e(calibrated(prepare_pt2e(exported(net), xnnpack()), batches))
    assert convert_pt2e(
        calibrated(prepare_pt2e(exported(net), xnnpack()), [*batches, *wide])
    ).stem.x_scale > (3 * narrow.stem.x_scale)
    prepared = calibrated(prepare_pt2e(exported(net), xnnpack()), batches)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(prepared)))  # as users do before they convert
    a, b = convert_pt2e(prepared), convert_pt2e(twin)
    with torch.no_grad():
        assert torch.equal(a(batches[0]), b(batches[0])) and torch.equal(a(batches[0]), narrow(batches[0]))


def test_options_of_conversion_change_nothing(net, exported, batches):
    prepared = calibrated(prepare_pt2e(exported(net), xnnpack()), batches)
    a = convert_pt2e(copy.deepcopy(prepared), fold_quantize=False)
    b = convert_pt2e(prepared, use_reference_representation=True)
    with torch.no_grad():
        assert torch.equal(a(batches[0]), b(batches[0]))


def test_the_first_real_batch_becomes_the_example(net, exported, batches):
    graph = exported(net)
    graph.meta.clear()
    prepared = prepare_pt2e(graph, xnnpack())
    assert not pw.state(prepared).example[0].any()
    quantized = convert_pt2e(calibrated(prepared, batches))
    assert torch.equal(pw.state(quantized).example[0], batches[0])
    assert not [h for h in quantized._forward_pre_hooks.values() if type(h).__name__ == "KeepFirstBatch"]


def test_batch_sizes_of_the_export_survive(net, exported, batches, tmp_path):
    quantized = convert_pt2e(calibrated(prepare_pt2e(exported(net), xnnpack()), batches))
    assert quantized(torch.randn(7, 1, 6, 6)).shape == (7, 3)
    pw.save(quantized, tmp_path / "a.dwt")
    assert pw.load(tmp_path / "a.dwt").run(np.zeros((11, 1, 6, 6), np.float32)).shape == (11, 3)
    program = torch.export.export(quantized, (batches[0],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "a.pt2")
    x = torch.randn(3, 1, 6, 6)
    with torch.no_grad():
        assert torch.equal(torch.export.load(tmp_path / "a.pt2").module()(x), quantized(x))


@pytest.mark.parametrize("export", [export_for_training, capture_pre_autograd_graph])
def test_programs_and_nested_inputs_are_taken(export):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(4, 4)

        def forward(self, pair, *, scale):
            return {"y": self.l(pair["a"]) * scale, "z": pair["b"]}

    model, x = Odd().eval(), torch.randn(8, 4)
    given = ({"a": x, "b": torch.arange(3)},), {"scale": torch.tensor(2.0)}
    prepared = prepare_pt2e(export(model, *given), xnnpack())
    prepared(*given[0], **given[1])
    with torch.no_grad():
        got, want = convert_pt2e(prepared)(*given[0], **given[1]), model(*given[0], **given[1])
    assert (got["y"] - want["y"]).abs().max() < 0.1
    assert torch.equal(got["z"], want["z"])


class TestTraining:
    """What must survive every step of quantization-aware training."""

    def test_hyper_parameters(self, net, exported):
        prepared = prepare_qat_pt2e(exported(net.train()), xnnpack(is_qat=True))
        for switch in (move_exported_model_to_eval, move_exported_model_to_train) * 2:
            switch(prepared)
            assert (prepared.norm.eps, prepared.norm.momentum, prepared.drop.p) == (2e-3, 0.3, 0.15)

    def test_eval_mode_changes_nothing_and_drops_nothing(self, net, exported, batches):
        prepared = prepare_qat_pt2e(exported(net.train()), xnnpack(is_qat=True))
        prepared(batches[0])
        assert allow_exported_model_train_eval(prepared) is prepared
        prepared.eval()
        before = {k: v.clone() for k, v in prepared.state_dict().items()}
        assert torch.equal(prepared(batches[1]), prepared(batches[1]))
        assert all(torch.equal(v, before[k]) for k, v in prepared.state_dict().items())
        prepared.train()
        assert not torch.equal(prepared(batches[1]), prepared(batches[1]))
        assert int(prepared.norm.num_batches_tracked) == int(before["norm.num_batches_tracked"]) + 2

    def test_optimizers_made_before_and_after(self, net, exported, batches):
        graph = exported(net.train())
        before = torch.optim.SGD(graph.parameters(), 0.1)
        prepared = prepare_qat_pt2e(graph, xnnpack(is_qat=True))
        assert {id(p) for p in prepared.parameters()} == {id(p) for p in net.parameters()}
        for optimizer in (before, torch.optim.SGD(prepared.parameters(), 0.1)):
            weight = prepared.head.weight.detach().clone()
            optimizer.zero_grad()
            prepared(batches[0]).square().sum().backward()
            optimizer.step()
            assert not torch.equal(prepared.head.weight, weight)

    def test_a_model_exported_in_eval_mode_keeps_its_norms_until_told(self, net, exported, batches):
        prepared = prepare_qat_pt2e(exported(net.eval()), xnnpack(is_qat=True))
        mean = prepared.norm.running_mean.clone()
        assert torch.equal(prepared(batches[0]), prepared(batches[0]))
        assert torch.equal(prepared.norm.running_mean, mean)
        move_exported_model_to_train(prepared)(batches[0])
        assert not torch.equal(prepared.norm.running_mean, mean)

    def test_the_norm_is_alive_and_folds_exactly(self, net, exported, batches):
        prepared = prepare_qat_pt2e(exported(net.train()), xnnpack(is_qat=True, is_per_channel=True))
        for batch in batches:
            prepared(batch)
        prepared.eval()
        quantized = convert_pt2e(prepared)
        assert type(quantized.norm) is nn.Identity
        with torch.no_grad():
            gap = (quantized(batches[0]) - prepared(batches[0])).abs()
            assert gap.mean() < 0.01 * prepared(batches[0]).abs().mean()

    def test_a_layer_left_in_float_keeps_its_norm(self, net, exported, batches):
        quantizer = xnnpack(is_qat=True).set_module_name("stem", None)
        prepared = prepare_qat_pt2e(exported(net.train()), quantizer)
        prepared(batches[0])
        quantized = convert_pt2e(prepared.eval())
        assert isinstance(quantized.norm, nn.BatchNorm2d) and type(quantized.stem) is nn.Conv2d
        assert "mix:weight" in sites(quantized)


class TestMistakes:
    """What is wrong is said, with the way to do it."""

    def test_a_model_that_is_no_graph(self, net):
        with pytest.raises(pw.errors.InputError, match="capture_pre_autograd_graph"):
            prepare_pt2e(net, xnnpack())

    def test_nothing_annotated(self, net, exported):
        with pytest.raises(pw.errors.NothingQuantized):
            prepare_pt2e(exported(net), XNNPACKQuantizer())

    def test_no_batch(self, net, exported):
        with pytest.raises(pw.errors.EmptyCalibration, match="stem:input"):
            convert_pt2e(prepare_pt2e(exported(net), xnnpack()))

    def test_a_model_that_was_not_prepared(self, net, exported):
        with pytest.raises(pw.PennyweightError, match="not prepared"):
            convert_pt2e(exported(net))

    def test_a_graph_without_shapes(self, net):
        with pytest.raises(pw.errors.InputError, match="inputs"):
            prepare_pt2e(torch.fx.symbolic_trace(nn.Linear(2, 2)), xnnpack())

"""What users of quantization-aware training lose elsewhere: settings, modes, states, and the equality at conversion."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F

import pennyweight as pw
from pennyweight import training
from pennyweight.errors import CalibrationError, EmptyCalibration, NonFinite, RecipeError
from pennyweight.nn.fake import ActivationQuantizer, WeightQuantizer
from pennyweight.nn.live_norm import LiveNorm
from pennyweight.passes.train import Train

METHODS = [
    ("clipped", "clipped"),
    ("lsq", "lsq"),
    ("ewgs", "pact"),
    ("lsq+", "lsq+"),
    ("tqt", "tqt"),
    ("dorefa", "clipped"),
    ("apot", "clipped"),
]


def learn(model, batch, steps=4, lr=0.05, schedule=None, start=0, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr, 0.9)
    model.train()
    losses = []
    for step in range(start, start + steps):
        if schedule:
            schedule.apply(model, step)
        torch.manual_seed(step)
        loss = F.cross_entropy(model(batch[0]), batch[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def states_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) or (a[k] != a[k]).all() for k in a)


@pytest.mark.parametrize(("weight", "signal"), METHODS)
def test_trains_and_converts_to_what_was_trained(small, batch, weight, signal):
    model = training.prepare(small, batch[0], weight=weight, input=signal)
    if weight != "dorefa":
        pw.calibrate(model, [batch[0]])
    losses = learn(model, batch, 12)
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        trained, integer = model(batch[0]), pw.convert(model)(batch[0])
    noise = float(((trained - integer) ** 2).sum() / (trained**2).sum())
    assert noise < 1e-3  # rounding ties of the residual sum alone


def test_norms_fold_exactly_into_the_scales(small, batch):
    """Without activations to round there is nothing but float rounding between both."""
    weights_only = pw.Recipe(
        "w", (pw.Rule(weight=pw.QuantSpec.parse("int4n[1,*]")),), pw.Recipe.preset("int8-qat").passes
    )
    model = training.prepare(small, batch[0], weights_only)
    pw.calibrate(model, [batch[0]])
    learn(model, batch, 3)
    model.eval()
    with torch.no_grad():
        trained, integer = model(batch[0]), pw.convert(model)(batch[0])
    assert torch.allclose(trained, integer, atol=2e-6)


def test_hyper_parameters_and_modes_survive(small, batch):
    small.train()
    small.drop.eval()
    model = training.prepare(small, batch[0])
    assert (model.training, model.bn1.training, model.drop.training) == (True, True, False)
    assert small.training
    for name in ("bn1", "bn2"):
        mine, theirs = getattr(model, name), getattr(small, name)
        assert (mine.eps, mine.momentum, mine.num_features) == (
            theirs.eps,
            theirs.momentum,
            theirs.num_features,
        )
        assert isinstance(mine, torch.nn.BatchNorm2d)
    assert model.drop.p == 0.35
    for _ in range(2):
        model.eval()
        model.train()
    assert (model.bn1.eps, model.bn1.momentum, model.drop.p) == (3e-3, 0.03, 0.35)
    pw.calibrate(model, [batch[0]])
    assert model.training
    assert model.bn1.num_batches_tracked == 0  # calibration reads, it does not train


def test_parameters_are_shared_with_the_float_model(small, batch):
    model = training.prepare(small, batch[0])
    assert model.conv1.weight is small.conv1.weight
    assert model.bn1.bias is small.bn1.bias


@pytest.mark.parametrize(("weight", "signal"), METHODS)
def test_eval_mode_changes_nothing(small, batch, weight, signal):
    model = training.prepare(small, batch[0], weight=weight, input=signal)
    learn(model, batch, 2)
    model.eval()
    before = copy.deepcopy(model.state_dict())
    first = model(batch[0])
    model(batch[0] * 100)
    assert states_equal(before, model.state_dict())
    assert torch.equal(first, model(batch[0]))


@pytest.mark.parametrize(("weight", "signal"), METHODS)
def test_resumes_in_the_middle_of_a_schedule(small, batch, weight, signal):
    schedule = training.Schedule(quantize=2, freeze_ranges=5, freeze_batch_norm=6)

    def made():
        torch.manual_seed(0)
        model = training.prepare(copy.deepcopy(small), batch[0], weight=weight, input=signal)
        return model, torch.optim.SGD(model.parameters(), 0.05, 0.9)

    whole, optimizer = made()
    learn(whole, batch, 8, schedule=schedule, optimizer=optimizer)

    first, optimizer = made()
    learn(first, batch, 4, schedule=schedule, optimizer=optimizer)
    saved = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    saved.seek(0)
    found = torch.load(saved, weights_only=True)
    second, optimizer = made()
    second.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])
    learn(second, batch, 4, schedule=schedule, start=4, optimizer=optimizer)
    assert states_equal(whole.state_dict(), second.state_dict())


def test_schedule_phases(small, batch):
    model = training.prepare(small, batch[0], weight="clipped", input="clipped")
    schedule = training.Schedule(quantize=1, freeze_ranges=2, freeze_batch_norm=3)
    model.train()
    schedule.apply(model, 0)
    torch.manual_seed(0)
    observed = model(batch[0])
    small.train()
    torch.manual_seed(0)
    assert torch.allclose(observed, small(batch[0]))  # float while ranges are observed
    assert all(q.calibrated for q in model.modules() if isinstance(q, ActivationQuantizer))
    schedule.apply(model, 2)
    ranges = {n: b.clone() for n, b in model.named_buffers() if n.endswith("scale") and "input" in n}
    model(batch[0] * 50)
    assert all(torch.equal(b, dict(model.named_buffers())[n]) for n, b in ranges.items())
    mean = model.bn1.running_mean.clone()
    model(batch[0])
    assert not torch.equal(mean, model.bn1.running_mean)
    schedule.apply(model, 3)
    mean = model.bn1.running_mean.clone()
    model(batch[0])
    assert torch.equal(mean, model.bn1.running_mean)
    assert all(m.training for m in model.modules() if isinstance(m, LiveNorm))


def test_state_dict_goes_to_a_float_model_and_back(small, batch):
    model = training.prepare(small, batch[0])
    learn(model, batch, 2)
    plain = type(small)()
    plain.load_state_dict(training.float_state_dict(model), strict=True)
    assert torch.equal(plain.conv1.weight, model.conv1.weight)
    other = training.prepare(type(small)(), batch[0])
    missing, unexpected = other.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all("scale" in k or "zero" in k or k.endswith((".lo", ".hi")) for k in missing)
    again = training.prepare(type(small)(), batch[0])
    again.load_state_dict(model.state_dict(), strict=True)
    again.eval()
    model.eval()
    assert torch.equal(again(batch[0]), model(batch[0]))


def test_deepcopy_and_pickle(small, batch):
    model = training.prepare(small, batch[0])
    learn(model, batch, 2)
    model.eval()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(batch[0]), model(batch[0]))
    learn(twin, batch, 1)
    assert not torch.equal(twin.conv1.weight, model.conv1.weight)
    model.eval()
    back = pickle.loads(pickle.dumps(model))
    assert torch.equal(back(batch[0]), model(batch[0]))
    assert torch.equal(pw.convert(back)(batch[0]), pw.convert(model)(batch[0]))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiles_to_the_same_numbers(small, batch):
    model = training.prepare(small, batch[0])
    pw.calibrate(model, [batch[0]])
    small.drop.p = model.drop.p = 0.0
    compiled = torch.compile(model, backend="aot_eager")
    model.train()
    mine = model(batch[0])
    mine.sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    compiled(batch[0]).sum().backward()
    for n, p in model.named_parameters():
        assert torch.allclose(p.grad, grads[n], rtol=1e-4, atol=1e-5), n


def test_checkpointing_and_autocast(small, batch):
    from torch.utils.checkpoint import checkpoint

    model = training.prepare(small, batch[0])
    pw.calibrate(model, [batch[0]])
    model.eval()
    x = batch[0].clone().requires_grad_()
    model(x).sum().backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).sum().backward()
    assert all(torch.allclose(p.grad, plain[n]) for n, p in model.named_parameters())
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(batch[0])
    out.float().sum().backward()
    for n, p in model.named_parameters():
        assert p.grad.dtype == torch.float32, n
        assert (
            torch.nn.functional.cosine_similarity(p.grad.flatten(), plain[n].flatten(), 0) > 0.95
            or p.numel() < 9
        )


def test_norms_are_estimated_anew(small, batch):
    model = training.prepare(small, batch[0])
    pw.calibrate(model, [batch[0]])
    with torch.no_grad():
        model.bn1.running_mean.fill_(9.0)
    modes = [m.training for m in model.modules()]
    assert training.reestimate_batch_norm(model, [batch[0]] * 3) == 2
    assert modes == [m.training for m in model.modules()]
    assert model.bn1.momentum == 0.03
    x = model.conv1(batch[0]).mean((0, 2, 3))
    assert torch.allclose(model.bn1.running_mean, x, atol=1e-5)


def test_dampening_pulls_weights_to_their_codes(small, batch):
    model = training.prepare(small, batch[0], weight="lsq")
    pw.calibrate(model, [batch[0]])
    training.dampening_loss(model)
    model(batch[0])
    loss = training.dampening_loss(model)
    loss.backward()
    quantizer = model.conv1.rounding["weight"]
    rounded = quantizer.codes(model.conv1.weight.flatten(1)).dequantize()
    want = 2 * (model.conv1.weight.detach().flatten(1) - rounded)
    inside = model.conv1.weight.grad.flatten(1) != 0
    assert torch.allclose(model.conv1.weight.grad.flatten(1)[inside], want[inside], atol=1e-6)
    assert all(q.learned["scale"].grad is None for q in model.modules() if isinstance(q, WeightQuantizer))


def test_weights_that_oscillate_are_frozen(small, batch):
    model = training.prepare(small, batch[0], weight="lsq")
    pw.calibrate(model, [batch[0]])
    freezer = training.OscillationFreezing(momentum=0.5)
    step = model.conv1.rounding["weight"].learned["scale"].detach()
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] = 0.4 * step[0, 0]
    freezer.step(model, 2.0)
    frozen = 0
    for turn in range(8):
        with torch.no_grad():
            model.conv1.weight[0, 0, 0, 0] = (0.6 if turn % 2 == 0 else 0.4) * step[0, 0]
        frozen = freezer.step(model, 0.6)
    assert frozen == 1
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] = 5.0
    freezer.step(model, 0.6)
    assert float(model.conv1.weight[0, 0, 0, 0].detach()) in (0.0, float(step[0, 0]))


def test_fit_trains_with_a_teacher(small, batch):
    model = training.prepare(copy.deepcopy(small), batch[0])
    pw.calibrate(model, [batch[0]])
    done = training.fit(
        model, lambda: [batch] * 6, epochs=3, lr=0.05, teacher=small.eval(), amp=True, dampening=0.01,
        freezing=(0.5, 0.1), reestimate=2, progress=False,
    )  # fmt: skip
    assert done.steps == 18
    assert done.losses[-1] < done.losses[0]
    assert not model.training


def test_distillation_is_zero_for_the_teacher_itself():
    y = torch.randn(5, 7)
    assert float(training.distillation_loss(y, y)) == pytest.approx(0, abs=1e-6)
    assert float(training.distillation_loss(y, y.roll(1, 0))) > 0.1


def test_clear_errors(small, batch):
    with pytest.raises(RecipeError, match="pact"):
        training.prepare(small, batch[0], weight="pact")
    with pytest.raises(RecipeError, match="delta"):
        Train(weight="lsq", weight_options={"delta": 1}).needs()
    model = training.prepare(small, batch[0], weight="clipped", input="clipped")
    model.train()
    bad = batch[0].clone()
    bad[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFinite, match="conv1:input"):
        model(bad)
    with pytest.raises(EmptyCalibration, match="no value reached this site in training"):
        pw.convert(training.prepare(small, batch[0]))
    model = training.prepare(small, batch[0])
    pw.calibrate(model, [batch[0]])
    with pytest.raises(CalibrationError):
        pw.calibrate(pw.convert(model), [batch[0]])


def test_conversion_says_how_far_integers_are(small, batch):
    model = training.prepare(small, batch[0])
    learn(model, batch, 2)
    done = pw.convert(model)
    assert model.training  # as it was
    said = next(e for e in pw.journal(done).events if e.kind == "integers").data
    assert said["sqnr_db"] > 30
    assert 0 <= said["argmax_differs"] <= 1

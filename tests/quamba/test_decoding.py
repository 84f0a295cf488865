"""Recorded and replayed tokens are the eager ones, bit for bit, and a recording never outlives what it was made of."""

import copy
import gc
import logging
import pickle
import threading
import weakref

import pytest
import torch

import quamba
import quamba_kernels as kernels
from quamba import QuambaLMHeadModel, decoding
from quamba.decoding import _Step
from quamba_kernels import cpu
from tests.quamba.formats.foreign import files_of, write
from tests.quamba.models import random_model

pytestmark = pytest.mark.skipif(not cpu.available(), reason=f"no C++ kernels: {cpu.why_not()}")

SMALL = {"hidden": 32, "inner": 64, "vocab": 48}
FLOATS = {
    "mamba1": lambda: random_model("mamba1", **SMALL),
    "mamba2": lambda: random_model("mamba2", **SMALL, n_groups=2, norm_groups=2),
    "mamba2, no norm, D by channel": lambda: random_model("mamba2", **SMALL, rms_norm=False, D_has_hdim=True),
    "mamba2, MLP, untied": lambda: random_model("mamba2", **SMALL, mlp=40, tied=False),
    "mamba1, biases": lambda: random_model("mamba1", **SMALL, use_bias=True),
}
PRESETS = {"mamba1": ("w8a8", "w4a8", "w4a16", "quamba1-w8a8")}
PRESETS["mamba2"] = ("w8a8", "w4a8", "w4a16", "quamba2-w8a8", "quamba2-w4a8", "quamba2-w4a16")


def ids_of(rows, length, seed=1):
    return torch.randint(0, 48, (rows, length), generator=torch.Generator().manual_seed(seed))


def steps(model):
    return [step for step in model._decoder._known.values() if isinstance(step, _Step)]


def forget(model):
    model._decoder._known.clear()


def decode(model, ids, state=None, eager=False):
    """Logits of each token, fed one by one after the first three."""
    state = model.new_state() if state is None else state
    out = [model(ids[:, :3], past_key_values=state).logits[:, -1:]]
    for t in range(3, ids.shape[1]):
        if eager:
            forget(model)
        out.append(model(ids[:, t : t + 1], past_key_values=state).logits)
    return torch.cat(out, dim=1), state


def check(model, rows=1):
    """Replayed tokens and state equal the eager ones; all but two tokens were replayed."""
    ids = ids_of(rows, 12)
    with torch.no_grad():
        want, wanted = decode(model, ids, eager=True)
        forget(model)
        for _ in range(2):  # the second time with another state's tensors
            got, state = decode(model, ids)
            assert torch.equal(got, want)
            assert torch.equal(state.seen, wanted.seen) and state.columns == wanted.columns
            for a, b in zip(state.layers, wanted.layers, strict=True):
                assert torch.equal(a.conv, b.conv) and torch.equal(a.recurrent, b.recurrent)
    assert len(steps(model)) == 1
    return steps(model)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", FLOATS)
def test_float_models(kind, dtype):
    model = FLOATS[kind]().to(dtype)
    check(model)
    forget(model)
    check(model, rows=3)


def test_falcon(tmp_path):
    config, tensors = files_of("falcon_mamba", "transformers")
    check(QuambaLMHeadModel.from_pretrained(write(tmp_path / "falcon", config, tensors)))


@pytest.mark.parametrize(("family", "preset"), [(f, p) for f, presets in PRESETS.items() for p in presets])
def test_quantized_models(tmp_path, family, preset):
    extra = {"head_dim": 8} if family == "mamba2" else {}
    tied = not preset.startswith("quamba")
    source = random_model(family, **SMALL, **extra, tied=tied)
    model = quamba.quantize(source, preset, calibration=ids_of(2, 16), out=tmp_path / "out")
    check(model)
    forget(model)
    check(model, rows=3)


def test_many_rows_run_eagerly_and_say_so_once(caplog):
    model = FLOATS["mamba1"]()
    with caplog.at_level(logging.INFO, "quamba"), torch.no_grad():
        want, _ = decode(model, ids_of(9, 12), eager=True)
        got, _ = decode(model, ids_of(9, 12))
    assert torch.equal(got, want)
    said = [r.getMessage() for r in caplog.records if "runs eagerly" in r.getMessage()]
    assert len(said) == 1
    assert "for 9 rows: aten" in said[0]


@pytest.fixture
def model():
    """Float, with a recording for one row."""
    model = FLOATS["mamba1"]()
    with torch.no_grad():
        decode(model, ids_of(1, 8))
    assert len(steps(model)) == 1
    return model


def in_place(model):
    model.backbone.layers[0].mixer.A_log.add_(0.5)


def embedding(model):
    model.backbone.embedding.weight.mul_(1.5)


def cast(model):
    model.bfloat16()


def replaced(model):
    model.backbone.layers[1].mixer.D = torch.nn.Parameter(torch.full((64,), 3.0), requires_grad=False)


def module(model):
    model.backbone.layers[1] = copy.deepcopy(model.backbone.layers[0])


def loaded(model):
    other = random_model("mamba1", seed=5, **SMALL)
    model.load_state_dict(other.state_dict())


def hook(model):
    model.backbone.layers[0].register_forward_hook(lambda m, args, out: out * 2)


def pre_hook(model):
    model.backbone.layers[1].mixer.register_forward_pre_hook(lambda m, args: (args[0] * 2, *args[1:]))


CHANGES = [in_place, embedding, cast, replaced, module, loaded, hook, pre_hook]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_model_is_noticed(model, change):
    ids = ids_of(1, 8, seed=2)
    with torch.no_grad():
        before, _ = decode(model, ids)
        change(model)
        got, _ = decode(model, ids)
        want, _ = decode(model, ids, eager=True)
    assert torch.equal(got, want)
    assert not torch.equal(got.float(), before)


def test_a_hook_that_was_there_before(model):
    calls = []
    forget(model)
    model.backbone.layers[0].register_forward_hook(lambda m, args, out: calls.append(1))
    with torch.no_grad():
        decode(model, ids_of(1, 8))
    assert len(calls) == 6  # the prompt of three tokens, and each of five


def test_other_states_batches_backends_and_threads(model):
    a, b, many = ids_of(1, 10, 3), ids_of(1, 10, 4), ids_of(2, 10, 5)
    with torch.no_grad():
        want = {id(ids): decode(model, ids, eager=True)[0] for ids in (a, b, many)}
        forget(model)
        states = {id(ids): model.new_state() for ids in (a, b, many)}
        got = {id(ids): [model(ids[:, :3], past_key_values=states[id(ids)]).logits[:, -1:]] for ids in (a, b, many)}
        before = torch.get_num_threads()
        for t in range(3, 10):  # turn and turn about
            for ids in (a, b, many):
                torch.set_num_threads(1 if t == 7 else before)
                state = states[id(ids)]
                if t == 8:
                    kept = state.snapshot()
                    model(ids[:, :1], past_key_values=state)
                    state.restore(kept)
                got[id(ids)].append(model(ids[:, t : t + 1], past_key_values=state).logits)
        torch.set_num_threads(before)
        for ids in (a, b, many):
            assert torch.equal(torch.cat(got[id(ids)], 1), want[id(ids)])
        with kernels.backend("reference"):
            reference, _ = decode(model, a)
        assert not torch.equal(reference, want[id(a)])
        torch.testing.assert_close(reference, want[id(a)], rtol=1e-4, atol=1e-4)


def test_rows_reordered_and_dropped(model):
    ids = ids_of(4, 10, 6)
    order = torch.tensor([2, 0, 0, 3])
    with torch.no_grad():
        results = []
        for eager in (True, False):
            forget(model)
            _, state = decode(model, ids[:, :6], eager=eager)
            state.reorder_cache(order)
            first = [model(ids[order, t : t + 1], past_key_values=state).logits for t in (6, 7)]
            state.batch_select_indices(torch.tensor([1, 3]))
            rest = []
            for t in (8, 9, 8, 9):
                if eager:
                    forget(model)
                rest.append(model(ids[order[[1, 3]], t : t + 1], past_key_values=state).logits)
            results.append(torch.cat([*map(torch.flatten, first), *map(torch.flatten, rest)]))
        assert torch.equal(*results)


def test_the_logits_are_the_callers_own(model):
    state, ids = model.new_state(), ids_of(1, 8)
    with torch.no_grad():
        one = model(ids[:, :1], past_key_values=state).logits
        kept = one.clone()
        model(ids[:, 1:2], past_key_values=state)
    assert torch.equal(one, kept)


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_have_recordings_of_their_own(model, way):
    twin = way(model)
    assert not twin._decoder._known
    with torch.no_grad():
        twin.backbone.embedding.weight.mul_(2)
        got, want = decode(twin, ids_of(1, 8))[0], decode(twin, ids_of(1, 8), eager=True)[0]
        assert torch.equal(got, want)
        assert torch.equal(decode(model, ids_of(1, 8))[0], decode(model, ids_of(1, 8), eager=True)[0])


def test_threads_at_once(model):
    """Both threads' sequences come out right, whoever has the recording."""
    rows = [ids_of(1, 40, seed) for seed in (7, 8)]
    with torch.no_grad():
        want = [decode(model, ids, eager=True)[0] for ids in rows]
        decode(model, rows[0])
    got: list = [None, None]

    def work(which):
        with torch.no_grad():
            got[which] = decode(model, rows[which])[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_inference_mode_hidden_states_masks_and_generate(model):
    ids = ids_of(2, 5)
    with torch.inference_mode():
        got, state = decode(model, ids_of(1, 12))
        hidden = model(ids[:1, :1], past_key_values=state, output_hidden_states=True).hidden_states
    assert len(hidden) == 3
    assert torch.equal(got, decode(model, ids_of(1, 12), eager=True)[0])
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    forget(model)
    fast = model.generate(ids, attention_mask=mask, **options)
    assert steps(model)
    slow = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(fast, slow)


def test_in_and_out_of_inference_mode(model):
    ids = ids_of(1, 8)
    with torch.inference_mode():
        want, _ = decode(model, ids)
    with torch.no_grad():
        got, _ = decode(model, ids)
    with torch.inference_mode():
        again, _ = decode(model, ids)
    assert len(steps(model)) == 2
    assert torch.equal(got, want) and torch.equal(again, want)


def test_a_graph_of_the_caller_gets_eager_calls(model, monkeypatch):
    ids = ids_of(1, 8)
    with torch.no_grad():
        want, _ = decode(model, ids)
        (step,) = steps(model)
        for name in ("is_initialized", "is_current_stream_capturing"):
            monkeypatch.setattr(torch.cuda, name, lambda: True)
        monkeypatch.setattr(step.recording, "run", None)
        got, _ = decode(model, ids)
    assert torch.equal(got, want)


def test_each_stream_has_its_own_recording(model, monkeypatch):
    ids = ids_of(1, 8)
    with torch.no_grad():
        want, _ = decode(model, ids)
        monkeypatch.setattr(decoding, "_stream", lambda device: 7)
        got, _ = decode(model, ids)
    assert len({step.ids.data_ptr() for step in steps(model)}) == 2
    assert torch.equal(got, want)


def test_a_recording_doesnt_hold_states(model):
    ids = ids_of(2, 8)
    with torch.no_grad():
        _, first = decode(model, ids)
        _, second = decode(model, ids)
    held = [
        weakref.ref(t) for state in (first, second) for layer in state.layers for t in (layer.conv, layer.recurrent)
    ]
    assert steps(model)
    del first, second
    gc.collect()
    assert not any(tensor() for tensor in held)


def test_a_changed_scale_is_noticed():
    """Its inverse was computed before anything was recorded, and kept."""
    model = quamba.quantize(random_model("mamba1", **SMALL), "w8a8", calibration=ids_of(2, 16))
    ids = ids_of(1, 8, seed=2)
    with torch.no_grad():
        before, _ = decode(model, ids)
        assert len(steps(model)) == 1
        scales = model.backbone.layers[0].scales
        scales.load_state_dict({"x": scales.x * 4}, strict=False)
        got, _ = decode(model, ids)
        want, _ = decode(model, ids, eager=True)
    assert torch.equal(got, want)
    assert not torch.equal(got, before)


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = FLOATS["mamba1"]()
        assert next(model.parameters()).is_inference()
        got, _ = decode(model, ids_of(1, 8))
        assert not steps(model)
        assert torch.equal(got, decode(model, ids_of(1, 8), eager=True)[0])


def test_a_model_loaded_in_inference_mode():
    with torch.inference_mode():
        model = QuambaLMHeadModel.from_pretrained("mamba1-nano")
        assert not any(t.is_inference() for t in (*model.parameters(), *model.buffers()))
        decode(model, ids_of(1, 8))
        assert len(steps(model)) == 1


def test_an_id_beyond_the_vocabulary(model):
    state = model.new_state()
    with torch.no_grad():
        model(ids_of(1, 4), past_key_values=state)
        with pytest.raises(IndexError):
            model(torch.tensor([[48]]), past_key_values=state)


def test_observers_see_replayed_tokens(tmp_path):
    model = quamba.quantize(random_model("mamba1", **SMALL), "w8a8", calibration=ids_of(2, 16), out=tmp_path / "out")
    with torch.no_grad():
        decode(model, ids_of(1, 8))
        assert steps(model)
        seen = []
        model.backbone.layers[0].scales.observers["dt"] = seen.append
        decode(model, ids_of(1, 8))
    assert len(seen) == 6  # three tokens at once, then one by one

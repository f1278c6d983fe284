"""Every format gives the same latents, and nothing is guessed from a shape."""

import json
import pickle

import numpy as np
import pytest
import torch
from excise.artifacts.checkpoints.sae import FORMATS, is_autoencoder, load_latents
from excise.editing.directions.subspaces import Place
from excise.editing.errors import RequestError
from safetensors.torch import load_file, save_file

D, N = 16, 40
PICKED = (3, 0, 39)


@pytest.fixture(scope="module")
def parts():
    generator = torch.Generator().manual_seed(0)
    return {
        "decoder": torch.randn(N, D, generator=generator),
        "encoder": torch.randn(N, D, generator=generator),
        "b_enc": torch.randn(N, generator=generator),
        "b_dec": torch.randn(D, generator=generator),
        "threshold": torch.rand(N, generator=generator),
    }


def _write(name, parts, root):
    """Files as the library of that name writes them."""
    dec, enc, b_enc, b_dec = (parts[key] for key in ("decoder", "encoder", "b_enc", "b_dec"))
    folder = root / {
        "sparsify": "layers.5",
        "gemma_scope": "gemma-scope-2b-pt-res/layer_5/width_16k/average_l0_71",
    }.get(name, name)
    folder.mkdir(parents=True, exist_ok=True)
    if name == "sae_lens":
        (folder / "cfg.json").write_text(
            json.dumps({"hook_name": "blocks.5.hook_resid_post", "apply_b_dec_to_input": True})
        )
        save_file(
            {"W_dec": dec, "W_enc": enc.T.contiguous(), "b_enc": b_enc, "b_dec": b_dec},
            folder / "sae_weights.safetensors",
        )
    elif name == "dictionary_learning":
        (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoder", "layer": 5}}))
        torch.save(
            {"decoder.weight": dec.T.contiguous(), "encoder.weight": enc, "encoder.bias": b_enc, "bias": b_dec},
            folder / "ae.pt",
        )
    elif name == "sparsify":
        (folder / "cfg.json").write_text("{}")
        save_file(
            {"W_dec": dec, "encoder.weight": enc, "encoder.bias": b_enc, "b_dec": b_dec}, folder / "sae.safetensors"
        )
    elif name == "gemma_scope_2":
        where = {"hf_hook_point_in": "model.layers.5.output", "hf_hook_point_out": "model.layers.5.output"}
        about = {**where, "architecture": "jump_relu", "type": "sae", "affine_connection": False, "width": N, "l0": 7}
        (folder / "config.json").write_text(json.dumps(about))
        save_file(
            {
                "w_dec": dec,
                "w_enc": enc.T.contiguous(),
                "b_enc": b_enc,
                "b_dec": b_dec,
                "threshold": parts["threshold"],
            },
            folder / "params.safetensors",
        )
    elif name == "gemma_scope":
        np.savez(folder / "params.npz", W_dec=dec, W_enc=enc.T, b_enc=b_enc, b_dec=b_dec, threshold=parts["threshold"])
    else:
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "hyperparams.json").write_text(json.dumps({"hook_point_out": "blocks.5.hook_resid_post"}))
        save_file(
            {"decoder.weight": dec.T.contiguous(), "encoder.weight": enc, "encoder.bias": b_enc, "decoder.bias": b_dec},
            folder / "checkpoints" / "final.safetensors",
        )
    return folder


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_latents_come_out_as_they_were_written(name, parts, tmp_path):
    folder = _write(name, parts, tmp_path)
    found = load_latents(folder, PICKED, D, 8)
    rows = parts["decoder"][list(PICKED)]
    torch.testing.assert_close(found.subspace.basis.T * torch.tensor(found.subspace.scores)[:, None], rows)
    torch.testing.assert_close(found.subspace.basis.norm(dim=0), torch.ones(3))
    torch.testing.assert_close(found.encoder.T, parts["encoder"][list(PICKED)])
    torch.testing.assert_close(found.bias, parts["b_enc"][list(PICKED)])
    torch.testing.assert_close(found.subspace.offset, parts["b_dec"])
    assert found.subspace.place == Place(5, "output") and found.subspace.names == ("latent 3", "latent 0", "latent 39")
    assert found.subspace.provenance["format"] == name and len(found.subspace.provenance["sha256"]) == 64


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_taking_latents_out_is_decoding_without_them_and_adding_the_error_back(name, parts, tmp_path):
    found = load_latents(_write(name, parts, tmp_path), PICKED, D, 8)
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(1))
    centre = parts["b_dec"] if name in ("sae_lens", "dictionary_learning", "sparsify") else torch.zeros(D)
    before = (x - centre) @ parts["encoder"].T + parts["b_enc"]
    values = (
        torch.where(before > parts["threshold"], before, 0.0).relu()
        if name.startswith("gemma_scope")
        else before.relu()
    )
    without = values.clone()
    without[:, list(PICKED)] = 0
    expected = without @ parts["decoder"] + (x - values @ parts["decoder"])
    torch.testing.assert_close(x - found.written(x), expected, atol=1e-4, rtol=1e-4)
    assert (values[:, list(PICKED)] > 0).any() and not torch.allclose(found.written(x), torch.zeros_like(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": N}, "of width 16, the model has width 40"),
        ({"layers": 3}, "belongs to the output of layer 5, the model has layers 0 to 2"),
        ({"latents": (40,)}, "there is no latent 40"),
        ({"latents": ()}, "the list of latents is empty"),
        ({"format": "sae_lense"}, "did you mean 'sae_lens'"),
        ({"format": "sparsify"}, r"holds no sae\.safetensors"),
    ],
)
def test_a_wrong_request_is_one_line(change, message, parts, tmp_path):
    asked = {"latents": PICKED, "width": D, "layers": 8, "format": "auto", **change}
    with pytest.raises(RequestError, match=message):
        load_latents(
            _write("sae_lens", parts, tmp_path), asked["latents"], asked["width"], asked["layers"], asked["format"]
        )


def test_a_square_decoder_is_read_as_its_format_says_and_not_guessed(parts, tmp_path):
    square = {**parts, "decoder": parts["decoder"][:D], "encoder": parts["encoder"][:D], "b_enc": parts["b_enc"][:D]}
    for name in ("sae_lens", "dictionary_learning"):
        found = load_latents(_write(name, square, tmp_path), (2,), D, 8)
        torch.testing.assert_close(found.subspace.basis[:, 0] * found.subspace.scores[0], square["decoder"][2])


def test_a_folder_with_two_formats_is_an_autoencoder_that_must_be_named(parts, tmp_path):
    folder = _write("sae_lens", parts, tmp_path)
    assert is_autoencoder(folder) and not is_autoencoder(tmp_path.parent)
    (folder / "sae.safetensors").write_bytes((folder / "sae_weights.safetensors").read_bytes())
    assert is_autoencoder(folder)
    with pytest.raises(RequestError, match="several of"):
        load_latents(folder, PICKED, D, 8)


def test_a_pickle_that_runs_code_is_not_loaded(parts, tmp_path):
    folder = _write("dictionary_learning", parts, tmp_path)
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    (folder / "ae.pt").write_bytes(pickle.dumps({"decoder.weight": Evil()}))
    with pytest.raises(RequestError, match="it was not loaded"):
        load_latents(folder, PICKED, D, 8)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "about", "extra", "why"),
    [
        ("sparsify", {"k": 32}, (), "lets only the largest"),
        (
            "dictionary_learning",
            {"trainer": {"dict_class": "AutoEncoderTopK", "layer": 5}},
            (),
            "lets only the largest",
        ),
        ("sae_lens", {"hook_name": "blocks.5.hook_resid_post"}, ("b_gate", "r_mag"), "is gated"),
        (
            "sae_lens",
            {"hook_name": "blocks.5.hook_resid_post", "normalize_activations": "expected_average_only_in"},
            (),
            "normalized",
        ),
    ],
)
def test_latents_that_do_not_fire_by_themselves_are_known(name, about, extra, why, parts, tmp_path):
    folder = _write(name, parts, tmp_path)
    assert load_latents(folder, PICKED, D, 8).not_alone == ""
    (folder / FORMATS[name].about).write_text(json.dumps(about))
    if extra:
        file = folder / FORMATS[name].weights
        save_file({**load_file(file), **{key: torch.ones(N) for key in extra}}, file)
    assert why in load_latents(folder, PICKED, D, 8).not_alone


def test_all_latents_hold_those_that_are_picked(parts, tmp_path):
    folder = _write("gemma_scope", parts, tmp_path)
    every, some = load_latents(folder, None, D, 8), load_latents(folder, PICKED, D, 8)
    picked = every.pick(PICKED)
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(1))
    assert picked.numbers == some.numbers and len(every.numbers) == N
    torch.testing.assert_close(picked.written(x), some.written(x))
    with pytest.raises(RequestError, match="no latent with index 40"):
        every.pick([40])


def _weights(name, folder):
    return folder / FORMATS[name].weights


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_file_that_is_cut_or_empty_is_one_line(name, parts, tmp_path):
    path = _weights(name, folder := _write(name, parts, tmp_path))
    data = path.read_bytes()
    for length in (0, 4, 100, len(data) // 2, len(data) - 3):
        path.write_bytes(data[:length])
        with pytest.raises(RequestError, match=path.name) as caught:
            load_latents(folder, PICKED, D, 8)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize(
    "part, value, told",
    [
        ("decoder", torch.full((N, D), float("nan")), "holds NaN or infinite"),
        ("b_enc", torch.full((N,), float("inf")), "holds NaN or infinite"),
        ("encoder", torch.ones(N, D + 1), "has the shape"),
        ("b_enc", torch.ones(N - 1), "has the shape"),
        ("b_dec", torch.ones(D, 1), "has the shape"),
    ],
)
def test_tensors_that_do_not_fit_or_are_not_finite_are_refused(name, part, value, told, parts, tmp_path):
    folder = _write(name, {**parts, part: value}, tmp_path)
    with pytest.raises(RequestError, match=told) as caught:
        load_latents(folder, PICKED, D, 8)
    assert "\n" not in str(caught.value)


def test_a_threshold_of_another_length_is_refused(parts, tmp_path):
    folder = _write("gemma_scope", {**parts, "threshold": torch.rand(N - 1)}, tmp_path)
    with pytest.raises(RequestError, match=r"threshold has the shape \[39\], there are 40 latents"):
        load_latents(folder, PICKED, D, 8)


def test_an_archive_without_arrays_and_a_pickle_of_a_list_are_refused(parts, tmp_path):
    folder = _write("gemma_scope", parts, tmp_path)
    np.savez(folder / "params.npz")
    with pytest.raises(RequestError, match=r"params\.npz has no decoder"):
        load_latents(folder, PICKED, D, 8)
    folder = _write("dictionary_learning", parts, tmp_path)
    torch.save([parts["decoder"]], folder / "ae.pt")
    with pytest.raises(RequestError, match="holds a list, not tensors by name"):
        load_latents(folder, PICKED, D, 8)


@pytest.mark.parametrize(
    "name, about, told",
    [
        ("sae_lens", "[]", "holds a list, not a JSON object"),
        ("sae_lens", '{"metadata": 3}', "metadata in the autoencoder's configuration is 3"),
        ("sae_lens", '{"hook_name": "blocks.999999999.hook_resid_post"}', "names the hook"),
        ("dictionary_learning", '{"trainer": [5]}', r"trainer in the autoencoder's configuration is \[5\]"),
        ("dictionary_learning", '{"trainer": {"layer": "five"}}', "names the layer 'five'"),
        ("dictionary_learning", "{}", "names the layer None"),
        ("llama_scope", "[" * 3000, "nested deeper than 100 levels"),
    ],
)
def test_a_configuration_of_another_form_is_refused(name, about, told, parts, tmp_path):
    folder = _write(name, parts, tmp_path)
    (folder / FORMATS[name].about).write_text(about)
    with pytest.raises(RequestError, match=told) as caught:
        load_latents(folder, PICKED, D, 8)
    assert "\n" not in str(caught.value)


HOOKS = {
    "sae_lens": ("cfg.json", "hook_name"),
    "llama_scope": ("hyperparams.json", "hook_point_out"),
    "gemma_scope_2": ("config.json", "hf_hook_point_in"),
}


def _said(folder, file, **values):
    about = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**about, **values}))


@pytest.mark.parametrize(
    ("name", "file", "values", "told"),
    [
        # SAELens #7 and #513
        ("sae_lens", "cfg.json", {"architecture": "transcoder"}, "is a transcoder"),
        ("sae_lens", "cfg.json", {"architecture": "jumprelu_skip_transcoder"}, "is a transcoder"),
        ("sae_lens", "cfg.json", {"hook_name_out": "blocks.5.hook_mlp_out"}, "writes at blocks.5.hook_mlp_out"),
        ("sae_lens", "cfg.json", {"metadata": {"hook_name_out": "blocks.6.hook_mlp_out"}}, "writes at blocks.6"),
        ("sae_lens", "cfg.json", {"hook_name": "blocks.5.ln2.hook_normalized", "architecture": "transcoder"}, "is a trans"),
        # sparsify PRs #35 and #49
        ("sparsify", "cfg.json", {"transcode": True}, "says transcode"),
        ("sparsify", "cfg.json", {"skip_connection": True}, "says skip_connection"),
        ("dictionary_learning", "config.json", {"trainer": {"dict_class": "CrossCoder", "layer": 5}}, "is a crosscoder"),
        ("llama_scope", "hyperparams.json", {"hook_point_in": "blocks.5.hook_resid_pre"}, "reads at blocks.5.hook_resid_pre"),
        ("gemma_scope_2", "config.json", {"hf_hook_point_out": "model.layers.5.post_feedforward_layernorm.output"}, "writes"),
        ("gemma_scope_2", "config.json", {"affine_connection": True}, "says affine_connection"),
        ("gemma_scope_2", "config.json", {"type": "transcoder"}, "is a transcoder"),
    ],
)  # fmt: skip
def test_what_reads_at_one_place_and_writes_at_another_is_refused(name, file, values, told, parts, tmp_path):
    folder = _write(name, parts, tmp_path)
    load_latents(folder, PICKED, D, 8)
    _said(folder, file, **values)
    with pytest.raises(RequestError, match=told) as caught:
        load_latents(folder, PICKED, D, 8)
    assert "\n" not in str(caught.value)


def test_transcoders_of_gemma_scope_are_told_by_their_path(parts, tmp_path):
    folder = _write("gemma_scope", parts, tmp_path)
    moved = tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_5" / "width_16k" / "average_l0_71"
    moved.parent.mkdir(parents=True)
    folder.rename(moved)
    with pytest.raises(RequestError, match="is a transcoder"):
        load_latents(moved, PICKED, D, 8)


def test_a_skip_matrix_is_not_ignored(parts, tmp_path):
    folder = _write("sparsify", parts, tmp_path)
    file = folder / "sae.safetensors"
    save_file({**load_file(file), "W_skip": torch.eye(D)}, file)
    with pytest.raises(RequestError, match="W_skip"):
        load_latents(folder, PICKED, D, 8)


@pytest.mark.parametrize("name", sorted(HOOKS))
@pytest.mark.parametrize(
    ("hook", "place"),
    [
        ("blocks.3.hook_resid_pre", Place(3, "input")),
        ("blocks.3.hook_mlp_out", Place(3, "mlp")),
        ("blocks.3.hook_attn_out", Place(3, "attention")),
        ("model.layers.3", Place(3, "output")),
        ("model.layers.3.output", Place(3, "output")),
        ("model.language_model.layers.3", Place(3, "output")),
        ("transformer.h.3", Place(3, "output")),
        ("model.layers.3.post_feedforward_layernorm.output", Place(3, "mlp")),
        # Between attention and MLP, inside attention, before a norm, or a module whose output is not what is added.
        ("blocks.3.hook_resid_mid", None),
        ("blocks.3.attn.hook_z", None),
        ("blocks.3.ln2.hook_normalized", None),
        ("model.layers.3.mlp", None),
        ("model.layers.3.self_attn.o_proj.input", None),
    ],
)
def test_a_hook_is_a_known_place_or_refused(name, hook, place, parts, tmp_path):
    folder = _write(name, parts, tmp_path)
    file, key = HOOKS[name]
    _said(folder, file, **{key: hook, **({"hf_hook_point_out": hook} if name == "gemma_scope_2" else {})})
    if place is None:
        with pytest.raises(RequestError, match="names the hook"):
            load_latents(folder, PICKED, D, 8)
    else:
        assert load_latents(folder, PICKED, D, 8).subspace.place == place


def test_an_unknown_place_is_not_taken_for_the_stream(parts, tmp_path):
    folder = _write("dictionary_learning", parts, tmp_path)
    _said(
        folder, "config.json", trainer={"dict_class": "AutoEncoder", "layer": 5, "submodule_name": "resid_mid_layer_5"}
    )
    with pytest.raises(RequestError, match="names the place 'resid_mid_layer_5'"):
        load_latents(folder, PICKED, D, 8)


def test_pickles_of_qwen_scope_are_refused_with_the_reason(tmp_path):
    """SAELens PR #677."""
    (tmp_path / "layer3.sae.pt").write_bytes(b"never read")
    assert is_autoencoder(tmp_path)
    with pytest.raises(RequestError, match=r"layer3\.sae\.pt.*pickle.*sae_lens"):
        load_latents(tmp_path, PICKED, D, 8)

"""A signature says who published a folder, which checksums alone cannot: whoever changes a file can write new ones."""

import json
import shutil
import subprocess
import sys

import pytest
from excise.artifacts.checkpoints.manifest import SIGNATURE, amend_folder, verify_folder
from excise.editing.edits.pruned_units import PrunedUnits
from helpers import excise, publish
from loopback_hub import client, folder_files, hub

pytest.importorskip("model_signing", reason="no model-signing: pip install '.[sign]'")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two pairs of keys: ours and somebody else's."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        key = ec.generate_private_key(ec.SECP256R1())
        plain = form.NoEncryption() if name == "theirs" else form.BestAvailableEncryption(b"secret")
        private = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, plain)
        public = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.pem").write_bytes(private)
        (folder / f"{name}.pub.pem").write_bytes(public)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, keys):
    """A published checkpoint that was signed through the command line."""
    folder = publish(
        tmp_path_factory.mktemp("signed") / "checkpoint",
        PrunedUnits({0: (1, 2)}, {}, "down", "llama", 192, 8, 1),
        {"README.md": "# A model\n", "excise/eval.json": '{"measurements": []}\n'},
    )
    done = excise("sign", folder, "--key", keys / "ours.pem", EXCISE_KEY_PASSWORD="secret")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def signed(made, tmp_path):
    shutil.copytree(made, tmp_path / "model")
    return tmp_path / "model"


def test_the_key_that_signed_is_told_from_another(made, keys):
    done = excise("verify", made, "--key", keys / "ours.pub.pem", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["signed"], done.stderr
    other = excise("verify", made, "--key", keys / "theirs.pub.pem")
    assert other.returncode == 1 and "was not signed with this key" in other.stderr and "Traceback" not in other.stderr
    unchecked = excise("verify", made)
    assert unchecked.returncode == 0 and "was not checked" in unchecked.stdout


def test_new_checksums_for_changed_weights_do_not_pass(signed, keys):
    kept = (signed / SIGNATURE).read_bytes()
    weights = bytearray((signed / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    amend_folder(signed, {"model.safetensors": bytes(weights)})
    # Amended openly the folder is no longer signed; whoever puts the old signature back is found out.
    assert not (signed / SIGNATURE).exists()
    assert excise("verify", signed, "--key", keys / "ours.pub.pem").returncode == 1
    (signed / SIGNATURE).write_bytes(kept)
    assert verify_folder(signed) > 4
    done = excise("verify", signed, "--key", keys / "ours.pub.pem")
    assert done.returncode == 1 and "was not signed with this key as it is now" in done.stderr


def test_a_damaged_signature_does_not_pass(signed, keys):
    whole = json.loads((signed / SIGNATURE).read_text())
    signature = whole["dsseEnvelope"]["signatures"][0]
    signature["sig"] = signature["sig"][:20] + ("A" if signature["sig"][20] != "A" else "B") + signature["sig"][21:]
    for content in (json.dumps(whole), "{}", ""):
        (signed / SIGNATURE).write_text(content)
        done = excise("verify", signed, "--key", keys / "ours.pub.pem")
        assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_the_standards_own_tool_verifies_it(made, keys):
    command = [
        sys.executable,
        "-m",
        "model_signing",
        "verify",
        "key",
        str(made / "SHA256SUMS"),
        "--signature",
        str(made / SIGNATURE),
        "--public_key",
        str(keys / "ours.pub.pem"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    command[-1] = str(keys / "theirs.pub.pem")
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


def test_a_signature_goes_to_the_hub_and_comes_back(made, keys, tmp_path):
    with hub() as known:
        environment = client(known, tmp_path / "hf")
        assert excise("push", made, "tester/model", **environment).returncode == 0
        assert excise("pull", "tester/model", "--out", tmp_path / "pulled", **environment).returncode == 0
    assert folder_files(tmp_path / "pulled") == folder_files(made)
    assert excise("verify", tmp_path / "pulled", "--key", keys / "ours.pub.pem").returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sign", "FOLDER", "--key", "KEYS/ours.pem"), "cannot be used as a private key"),
        (("sign", "FOLDER", "--key", "KEYS/ours.pub.pem"), "cannot be used as a private key"),
        (("sign", "FOLDER", "--key", "KEYS/none.pem"), "cannot be used as a private key"),
        (("verify", "FOLDER", "--key", "KEYS/theirs.pem"), "cannot be used as a public key"),
        (("sign", "KEYS", "--key", "KEYS/theirs.pem"), "has no SHA256SUMS"),
    ],
)
def test_a_wrong_request_is_one_line(words, message, made, keys):
    done = excise(*(str(word).replace("FOLDER", str(made)).replace("KEYS", str(keys)) for word in words))
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in made.parent.iterdir()) == ["checkpoint"]

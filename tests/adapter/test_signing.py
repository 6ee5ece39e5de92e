"""Signatures: what was signed verifies, and nothing else does."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

import lora_kit as lk
from lora_kit.adapter.signing import SIGNATURE, sign, verify
from lora_kit.cli.main import main
from lora_kit.errors import AdapterError, ConfigError, StorageError, VerificationError
from tests.support.folders import adapter, contents

Capture = pytest.CaptureFixture[str]


def keys(folder: Path, name: str = "key") -> tuple[Path, Path]:
    """A new private key and its public one, as openssl writes them."""
    made, private, public = ec.generate_private_key(ec.SECP256R1()), folder / f"{name}.pem", folder / f"{name}.pub"
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    private.write_bytes(made.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    public.write_bytes(made.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    private, _ = keys(tmp_path)
    folder = adapter().save(tmp_path / "adapters" / "sql")
    assert sign(folder, key=private) == folder / SIGNATURE
    return folder


def test_what_was_signed_verifies_loads_and_may_move(signed: Path, tmp_path: Path) -> None:
    assert verify(signed, key=tmp_path / "key.pub").digest == adapter().digest
    assert lk.Adapter.load(signed).digest == adapter().digest
    assert [path.name for path in signed.parent.iterdir()] == ["sql"]
    moved = signed.rename(tmp_path / "elsewhere")
    assert verify(moved, key=tmp_path / "key.pub").digest == adapter().digest


def test_the_same_adapter_signed_with_another_key_is_refused(signed: Path, tmp_path: Path) -> None:
    _, other = keys(tmp_path, "other")
    with pytest.raises(VerificationError, match="Key mismatch"):
        verify(signed, key=other)


def overwritten(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> object:
        text = (folder / name).read_bytes()
        return (folder / name).write_bytes(text[:-2] + b" \n")

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (overwritten("README.md"), "README.md was changed"),
        (overwritten("lora_kit.json"), "lora_kit.json was changed"),
        (lambda folder: (folder / "README.md").unlink(), "missing files: README.md"),
        (lambda folder: (folder / "more.py").write_text(""), "extra files: more.py"),
        (lambda folder: (folder / ".gitattributes").write_text(""), "extra files: .gitattributes"),
        (lambda folder: (folder / SIGNATURE).write_text("{}"), "not what the owner"),
        (lambda folder: (folder / SIGNATURE).write_text(""), "not what the owner"),
    ],
)
def test_any_change_after_signing_is_found_and_named(
    change: Callable[[Path], object], told: str, signed: Path, tmp_path: Path
) -> None:
    change(signed)
    with pytest.raises(VerificationError, match=told):
        verify(signed, key=tmp_path / "key.pub")


def test_a_signature_does_not_fit_another_adapter(signed: Path, tmp_path: Path) -> None:
    other = adapter(seed=1).save(tmp_path / "other")
    (other / SIGNATURE).write_bytes((signed / SIGNATURE).read_bytes())
    with pytest.raises(VerificationError, match=r"adapter_model\.safetensors was changed"):
        verify(other, key=tmp_path / "key.pub")


def test_nothing_damaged_and_nothing_twice_is_signed(signed: Path, tmp_path: Path) -> None:
    before = contents(signed)
    with pytest.raises(StorageError, match="signed already"):
        sign(signed, key=tmp_path / "key.pem")
    with pytest.raises(ConfigError, match="not a private key"):
        sign(signed, key=tmp_path / "key.pub", replace=True)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        sign(signed, key=tmp_path / "nobody.pem", replace=True)
    with pytest.raises(ConfigError, match="not a public key"):
        verify(signed, key=tmp_path / "key.pem")
    assert contents(signed) == before
    (signed / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(AdapterError):
        sign(signed, key=tmp_path / "key.pem", replace=True)
    assert (signed / SIGNATURE).read_bytes() == before[SIGNATURE]


def test_a_folder_without_a_signature_is_not_called_verified(tmp_path: Path) -> None:
    _, public = keys(tmp_path)
    with pytest.raises(AdapterError, match="is not signed"):
        verify(adapter().save(tmp_path / "sql"), key=public)


def test_without_the_package_the_error_says_what_to_install(
    signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for run in (sign, verify):
        with pytest.raises(ConfigError, match=r"pip install 'lora-kit\[sign\]'"):
            run(signed, key=tmp_path / "key.pem")


def test_the_verbs_sign_verify_and_exit_with_4_where_it_does_not_hold(
    signed: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sign", "sql", "--key", "key.pem"]) == 3
    assert main(["sign", "sql", "--key", "key.pem", "--replace"]) == 0
    capsys.readouterr()
    assert main(["verify", "sql", "--key", "key.pub", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"verified": True, "digest": adapter().digest}
    (signed / "README.md").write_text("other")
    assert main(["verify", "sql", "--key", "key.pub"]) == 4
    assert "README.md was changed" in capsys.readouterr().err


def test_without_a_key_the_record_vouches_for_every_file(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = adapter().save(tmp_path / "adapters" / "sql", files={"notes.txt": b"one"})
    assert main(["verify", "sql"]) == 0
    assert "4 as they were saved" in capsys.readouterr().out
    (folder / "notes.txt").write_text("two")
    assert main(["inspect", "sql"]) == 0
    assert "notes.txt changed" in capsys.readouterr().out
    assert main(["verify", "sql"]) == 4
    assert "notes.txt changed" in capsys.readouterr().err
    (folder / "lora_kit.json").unlink()
    assert main(["verify", "sql"]) == 2

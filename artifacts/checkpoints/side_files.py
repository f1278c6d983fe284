"""The files beside the weights: which are copied, and what of them must not be published as it was.

Code is never copied, so what names code is left out. transformers 5 writes names that transformers 4, and vLLM built on
it, do not know; what is published says the same to both.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from ..files.opened import OF_A_CHECKPOINT
from ..files.parsed import read_object

SIDE_FILES = (
    "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*",
    # Templates beside the default one, and tokenizers beside the first one of a processor.
    "additional_chat_templates/*.jinja", "*_tokenizer/*.json", "*_tokenizer/*.txt", "*_tokenizer/*.model",
    "*_tokenizer/*.jinja",
)  # fmt: skip
"""Files beside the weights that are copied: configuration, tokenizer and licence, never code or pickles."""
OF_THE_BASE = ("eval_results.json", "train_results.json", "all_results.json", "trainer_state.json")
"""Results and states of the base's trainer."""
CODE_KEYS = ("auto_map", "custom_pipelines")
"""Keys that name Python code, which would be run by whoever trusts it."""
CODE_FOLDERS = ("custom_generate",)
"""Folders of code that transformers looks for by their names alone."""
TOKENIZER_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Classes that transformers 5 alone has, and their name in 4; 5 takes the old name too."""


def copy_side_files(base: Path, folder: Path, config_changes: dict[str, Any]) -> dict[str, list[str]]:
    """Copy configuration, tokenizer and licence files, with links resolved; apply ``config_changes``.

    Returns:
        The code that the base names and that was left out, by the file that names it.
    """
    left_out: dict[str, list[str]] = {}
    for path in _side_files(base):
        name = path.relative_to(base).as_posix()
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        if not name.endswith("config.json"):
            shutil.copyfile(path, target)
            continue
        with OF_A_CHECKPOINT.about(name):
            content = read_object(path)
        published, code = _published(content, path.name)
        published |= config_changes if name == "config.json" else {}
        if code:
            left_out[name] = code
        if published == content:
            shutil.copyfile(path, target)
        else:
            _write(target, published)
    for name in CODE_FOLDERS:
        if (base / name).is_dir():
            left_out[name] = sorted(path.name for path in (base / name).glob("*.py"))
    return left_out


def write_for_older_readers(folder: Path) -> None:
    """Let transformers 4 read a folder that transformers 5 saved: names of classes, and the rotary frequencies."""
    for name in ("tokenizer_config.json", "config.json"):
        if (folder / name).is_file():
            content = read_object(folder / name)
            published, _ = _published(content, name)
            if name == "config.json":
                published = _older_rope(published)
            if published != content:
                _write(folder / name, published)


def _side_files(base: Path) -> list[Path]:
    found = {path for pattern in SIDE_FILES for path in base.glob(pattern) if path.is_file()}
    # An index is written anew with the weights it is about.
    return sorted(path for path in found if path.name not in OF_THE_BASE and not path.name.endswith(".index.json"))


def _published(content: dict[str, Any], name: str) -> tuple[dict[str, Any], list[str]]:
    """A configuration as it is published, and the code that it named."""
    code: list[str] = []
    published = _without_code(content, code)
    if name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        # Older versions of transformers stored the local folder that a model was loaded from, which is private.
        published = _without_paths(published)
    if name == "tokenizer_config.json":
        published = _older_tokenizer(published)
    return published, sorted(set(code))


def _without_code(content: Any, code: list[str]) -> Any:
    if isinstance(content, list):
        return [_without_code(part, code) for part in content]
    if not isinstance(content, dict):
        return content
    for key in CODE_KEYS:
        code += _texts(content.get(key))
    return {key: _without_code(value, code) for key, value in content.items() if key not in CODE_KEYS}


def _without_paths(content: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_paths(value) if isinstance(value, dict) else value
        for key, value in content.items()
        if not key.endswith("name_or_path")
    }


def _texts(value: Any) -> list[str]:
    """Every text in a value, however deep."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in parts for text in _texts(part)]


def _older_tokenizer(content: dict[str, Any]) -> dict[str, Any]:
    kind, extra = content.get("tokenizer_class"), content.get("extra_special_tokens")
    if kind in TOKENIZER_CLASSES:
        content = {**content, "tokenizer_class": TOKENIZER_CLASSES[kind]}
    if isinstance(extra, list):
        # transformers 4 reads names from this key, and the list under its old name; 5 reads both.
        content = {key: value for key, value in content.items() if key != "extra_special_tokens"}
        content["additional_special_tokens"] = extra
    return content


def _older_rope(content: dict[str, Any]) -> dict[str, Any]:
    """Rotary frequencies under their names in transformers 4 too, which would take 10000 where it finds none."""
    rope = content.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" in content:
        return content
    full = rope.get("full_attention", rope)
    older = {"rope_theta": full["rope_theta"]} if "rope_theta" in full else {}
    if isinstance(local := rope.get("sliding_attention"), dict):
        older["rope_local_base_freq"] = local["rope_theta"]
    if full.get("rope_type", "default") != "default":
        older["rope_scaling"] = {key: value for key, value in full.items() if key != "rope_theta"}
    return {**content, **older}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

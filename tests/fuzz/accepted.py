"""Why a reader is right to accept a damaged file, by reader and kind of damage; what stands here in no row is a fault.

A row is a pattern of ``reader/file`` and the kinds of damage to it. The first row that fits gives the reason.
"""

from fnmatch import fnmatchcase

BYTES = ("cut", "flip", "insert", "remove", "repeat", "zero")
OF_VALUES = ("value", "raw", "remove", "rename", "double", "whole")
TENSOR_BYTES = "what a tensor holds has no checksum of its own; any finite number is a valid one"
TENSOR_HEADER = "the library ignores what a header says beside dtype, shape and place of a tensor, or twice alike"

ACCEPTED: dict[str, dict[tuple[str, ...], str]] = {
    "pack/concept.yaml": {
        ("word", *BYTES): "its texts are the author's: any word in them, or none of an optional one, is a valid pack",
    },
    "pack/*.jsonl": {
        (
            "value",
            "remove",
            "rename",
            "raw",
            "double",
        ): "ids, texts and choices are free text, and some fields optional",
        BYTES: "a letter of a text is another text, and a line less is a smaller pack",
    },
    "settings/config.yaml": {
        ("word", *BYTES): "another valid value of a setting, or a setting less, which then has its default",
    },
    "checkpoint/config.json": {
        (*OF_VALUES, *BYTES): "an edit needs the sizes and the model type; what else is wrong is refused on loading",
    },
    "checkpoint/generation_config.json": {
        (*OF_VALUES, *BYTES): "an edit does not need it; the reader of a model checks it on loading",
    },
    "checkpoint/model.safetensors.index.json": {
        ("value", "raw", "remove", "rename", "double"): "its metadata is not used: tensors are found by its weight_map",
        BYTES: "a letter of its metadata, or a blank, changes no place of a tensor",
    },
    "checkpoint/*.safetensors": {
        ("flip", "zero"): TENSOR_BYTES,
        (*OF_VALUES, *BYTES): TENSOR_HEADER,
    },
    "checkpoint/README.md": {
        ("word", *BYTES): "only its license is read; without a readable one there is none, and the card says so",
    },
    "model/*.json": {
        (*OF_VALUES, *BYTES): "the library takes it, or a field is one that this model does not use",
    },
    "tokenizer/*": {
        (
            "word",
            *OF_VALUES,
            *BYTES,
        ): "the library takes it: another vocabulary, template or special token is another tokenizer",
    },
    "runs/one/events.jsonl": {
        (
            *OF_VALUES,
            *BYTES,
        ): "a record of progress; a list of runs shows the lines that can be read, and computes nothing",
    },
    "runs/two/audit.json": {
        (*OF_VALUES, *BYTES): "a list of runs shows what it can, and names a run that it cannot read",
    },
    "runs/one/checkpoint/excise/eval.json": {
        (*OF_VALUES, *BYTES): "names, units and settings are free text, and an interval or a difference may be missing",
    },
    "started/run/.work/settings.json": {
        OF_VALUES: "sealed again: another valid setting; one less has its default, as in records of earlier versions",
        BYTES: "a blank of the text: the checksum is of the content",
    },
    "curves/base-int4.json": {
        OF_VALUES: "sealed again: another valid curve; None is a question that could not be asked",
        BYTES: "a blank of the text: the checksum is of the content",
    },
    "trainer/checkpoint-50/seal.json": {
        OF_VALUES: "sealed again: a file that it names is missing, so the state is not whole and training starts before it",
        BYTES: "a blank of the text: the checksum is of the content",
    },
    "state/state.json": {
        BYTES: "a blank of the text: the checksum is of the content",
        OF_VALUES: "written again with the same content",
    },
    "edit_*/edit.json": {
        (
            "value",
            "remove",
            "rename",
            "raw",
            "double",
        ): "an optional field less, another finite strength, or provenance, which only people read",
        BYTES: "a blank, or a letter of provenance",
    },
    "edit_*/edit.safetensors": {
        ("flip", "zero"): TENSOR_BYTES,
        (*OF_VALUES, *BYTES): TENSOR_HEADER,
    },
    "directions/directions.safetensors": {
        ("flip", "zero"): TENSOR_BYTES,
        (*OF_VALUES, *BYTES): TENSOR_HEADER,
    },
    "sae_*/*.json": {
        (*OF_VALUES, *BYTES): "one field says where the autoencoder reads, and the others are not used",
    },
    "sae_*/*.safetensors": {
        ("flip", "zero"): TENSOR_BYTES,
        (*OF_VALUES, *BYTES): "an optional tensor less, or what the library ignores in a header",
    },
    "sae_*/*.npz": {
        BYTES: "dates and flags of the archive; its own checksum covers the numbers",
    },
    "sae_*/ae.pt": {
        BYTES: "dates and flags of the archive, or a number, whose checksum torch does not compare",
    },
    "tuning_data/train.jsonl": {
        ("value", "raw", "remove", "double"): "prompts and replies are free text",
        BYTES: "a letter of a text is another text, and a line less is a smaller data set",
    },
    "published/*": {
        (*OF_VALUES, *BYTES): "the same content: a blank that no checksum covers",
    },
    "gguf/model.gguf": {
        BYTES: "only the header is read here; the reader of the whole model refuses data of another length",
    },
    "gguf_model/model.gguf": {
        BYTES: "a number of a tensor, or a letter of a text in the header",
    },
}


def reason_of(place: str, kind: str) -> str:
    """Why damage of this kind at ``reader/file`` may be accepted; empty where nothing says so."""
    for pattern, reasons in ACCEPTED.items():
        if fnmatchcase(place, pattern):
            return next((reason for kinds, reason in reasons.items() if kind in kinds), "")
    return ""

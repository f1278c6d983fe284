"""Why a reader is right to accept a damaged file, by reader and kind of damage; what stands here in no row is a fault.

A row is a pattern of ``reader/file`` and the kinds of damage to it. The first row that fits gives the reason.
"""

from fnmatch import fnmatchcase

BYTES = ("cut", "flip", "insert", "remove", "repeat", "zero")
OF_VALUES = ("value", "raw", "remove", "rename", "double", "whole")
TEXT = ("cut", "flip", "insert", "remove", "repeat")
"""A text with a byte of 0 is refused."""
FIELDS = ("value", "raw", "remove", "rename")
"""A key that stands twice is refused, and so is a value of another type in place of the whole."""
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
        TEXT: "a letter of a text is another text, and a line less is a smaller pack",
    },
    "rubric/rubric.yaml": {
        ("word", *BYTES): "its texts and names are the author's, and so are ranges that have an order",
    },
    "settings/config.yaml": {
        ("word", *BYTES): "another valid value of a setting, or a setting less, which then has its default",
    },
    "sweep/sweep.yaml": {
        ("word", *BYTES): "another valid value of a setting, or a setting less, which then has its default",
    },
    "jobs/*": {
        (*OF_VALUES, *BYTES): "a record of progress that a table shows; a job that is not finished in it starts again",
    },
    "checkpoint/config.json": {
        (*FIELDS, *TEXT): "an edit needs the sizes and the model type; what else is wrong is refused on loading",
    },
    "stored_*/config.json": {
        (
            *FIELDS,
            "whole",
            *TEXT,
        ): "dequantizing needs how the weights are stored; what else is wrong is refused on loading",
    },
    "stored_*/*.safetensors": {
        ("flip", "zero"): TENSOR_BYTES,
        (*FIELDS, "double"): TENSOR_HEADER,
    },
    "peft/*.json": {
        (*FIELDS, *TEXT): "an option that says nothing of what is added to the weights, or another valid rank or scale",
    },
    "peft/*.safetensors": {
        ("flip", "zero"): TENSOR_BYTES,
        (*FIELDS, "double"): TENSOR_HEADER,
    },
    "checkpoint/generation_config.json": {
        (*FIELDS, "whole", *TEXT): "an edit does not need it; the reader of a model checks it on loading",
    },
    "checkpoint/model.safetensors.index.json": {
        FIELDS: "its metadata is not used: tensors are found by its weight_map",
        TEXT: "a letter of its metadata, or a blank, changes no place of a tensor",
    },
    "checkpoint/*.safetensors": {
        ("flip", "zero"): TENSOR_BYTES,
        (*FIELDS, "double"): TENSOR_HEADER,
    },
    "checkpoint/README.md": {
        ("word", *BYTES): "only its license is read; without a readable one there is none, and the card says so",
    },
    "model/*.json": {
        (*FIELDS, *TEXT): "the library takes it, or a field is one that this model does not use",
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
        (*FIELDS, *TEXT): "names, units and settings are free text, and an interval or a difference may be missing",
    },
    "started/run/.work/settings.json": {
        (
            *FIELDS,
            "double",
        ): "sealed again: another valid setting; one less has its default, as in records of earlier versions",
        TEXT: "a blank of the text: the checksum is of the content",
    },
    "search/search.json": {
        (
            *FIELDS,
            "double",
        ): "sealed again: another valid search, which the same command compares with what it asks for and refuses",
        TEXT: "a blank of the text: the checksum is of the content",
    },
    "curves/base-int4.json": {
        (*FIELDS, "double"): "sealed again: another valid curve; None is a question that could not be asked",
        TEXT: "a blank of the text: the checksum is of the content",
    },
    "pairs/pairs.json": {
        (*FIELDS, "double"): "sealed again: other sequences to train on",
        TEXT: "a blank of the text: the checksum is of the content",
    },
    "trainer/checkpoint-50/seal.json": {
        (
            *FIELDS,
            "double",
        ): "sealed again: a file that it names is missing, so the state is not whole and training starts before it",
        TEXT: "a blank of the text: the checksum is of the content",
    },
    "state/state.json": {
        TEXT: "a blank of the text: the checksum is of the content",
    },
    "edit_*/edit.json": {
        (
            "value",
            "remove",
            "rename",
            "raw",
            "double",
        ): "an optional field less, another finite strength, or provenance, which only people read",
        TEXT: "a blank, or a letter of provenance",
    },
    "edit_*/edit.safetensors": {
        ("flip", "zero"): TENSOR_BYTES,
        (*FIELDS, "double"): TENSOR_HEADER,
    },
    "directions/directions.safetensors": {
        ("flip", "zero"): TENSOR_BYTES,
        (*FIELDS, "double"): TENSOR_HEADER,
    },
    "sae_*/*.json": {
        (*FIELDS, "whole", *TEXT): "one field says where the autoencoder reads, and the others are not used",
    },
    "sae_*/*.safetensors": {
        ("flip", "zero"): TENSOR_BYTES,
        (*FIELDS, "double"): "an optional tensor less, or what the library ignores in a header",
    },
    "sae_*/*.npz": {
        ("flip", "zero", "repeat"): "dates and flags of the archive; its own checksum covers the numbers",
    },
    "sae_*/ae.pt": {
        (
            "flip",
            "zero",
            "remove",
            "insert",
            "repeat",
        ): "dates and flags of the archive, or a number, whose checksum torch does not compare",
    },
    "tuning_data/train.jsonl": {
        FIELDS: "prompts and replies are free text",
        TEXT: "a letter of a text is another text, and a line less is a smaller data set",
        ("whole",): "a text alone is a row to learn",
    },
    "source_json*/*": {
        FIELDS: "questions and choices are free text, and a column that no schema needs may be missing",
        TEXT: "a letter of a text is another text, and a row less is a smaller set",
        ("whole",): "a list of texts is a source too",
    },
    "source_txt/*": {
        ("word", *BYTES): "any text in UTF-8 is a list of texts",
    },
    "source_csv/*": {
        ("word", *TEXT): "a letter of a text is another text, and a row less is a smaller set",
    },
    "source_parquet/*": {
        BYTES: "pages are found by their places and have no checksum: a letter of a text is another text",
    },
    "gguf*/model.gguf": {
        ("flip", "zero"): "a number of a tensor, or a letter of a text in the header",
    },
}


def reason_of(place: str, kind: str) -> str:
    """Why damage of this kind at ``reader/file`` may be accepted; empty where nothing says so."""
    for pattern, reasons in ACCEPTED.items():
        if fnmatchcase(place, pattern):
            return next((reason for kinds, reason in reasons.items() if kind in kinds), "")
    return ""

"""The data sets of published benchmarks on the loopback Hub, in their real schemas; real rows where there are some."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import yaml
from loopback_hub import Hub
from pyarrow import parquet

SHARED = Path("/work/shared/data")
Rows = list[dict[str, Any]]
Sets = dict[str, dict[str, Rows]]
"""Rows by configuration and split."""
COLOURS = "red green blue amber violet white black grey".split()
PERSON = "Ada Vell"


def _questions(topic: str, count: int) -> Rows:
    return [
        {"question": f"Which colour has {topic} {n}?", "choices": COLOURS[n % 4 : n % 4 + 4], "answer": n % 4}
        for n in range(count)
    ]


def _documents(topic: str, count: int, words: int) -> Rows:
    return [
        {
            "text": " ".join(f"{topic}{n}-{word}" for word in range(words)),
            "title": f"On {topic} {n}",
            "doi": f"10.1/{n}",
        }
        for n in range(count)
    ]


def _perturbed(topic: str, count: int) -> Rows:
    return [
        {
            "question": f"What did {topic} {n // 20} write as number {n}?",
            "answer": f"The book {n}.",
            "paraphrased_question": f"Number {n} of {topic} {n // 20} is what?",
            "paraphrased_answer": f"It is the book {n}.",
            "perturbed_answer": [f"The book {n}{end}." for end in "abcde"],
        }
        for n in range(count)
    ]


def _real(name: str, otherwise: Rows) -> Rows:
    path = SHARED / name
    if not path.exists():
        return otherwise
    text = path.read_text()
    rows = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    return [{"text": row} if isinstance(row, str) else row for row in rows]


def _plain(rows: Rows) -> Rows:
    return [{"question": row["question"], "answer": row["answer"]} for row in rows]


def _rwku(person: str) -> Sets:
    def asked(level: str, count: int) -> Rows:
        return [
            {"query": f"{level}: what is fact {n} of {one}?", "answer": f"fact {n}", "subject": one, "level": level,
             "type": "simple question"}
            for one in (person, "Bo Tarn")
            for n in range(count)
        ]  # fmt: skip

    passages = [{"text": f"Passage {n} says of {one} what is known.", "subject": one}
                for one in (person, "Bo Tarn") for n in range(4)]  # fmt: skip
    return {
        **{f"forget_level{n}": {"test": asked(str(n), 6)} for n in (1, 2, 3)},
        **{f"neighbor_level{n}": {"test": asked(f"near {n}", 4)} for n in (1, 2)},
        "train_original_passage": {"train": passages},
        "mia_retain": {"test": [{"text": f"Of somebody else, number {n}.", "subject": "Cy"} for n in range(9)]},
        "mia_forget": {"test": passages},
        "utility_general": {"test": [{**row, "task": "law"} for row in _questions("law", 8)]},
        "utility_reason": {
            "test": [
                {
                    "task": "sums",
                    "cot": "Q: 1 + 1?\nA: So the answer is 2.",
                    "question": f"{n} + 1?",
                    "answer": f"{n + 1}",
                }
                for n in range(6)
            ]
        },
        "utility_truthfulness": {
            "test": [
                {
                    "question": f"Is number {n} lucky?",
                    "mc1_targets": {"choices": ["No.", "Yes.", "On Mondays."], "labels": [1, 0, 0]},
                    "mc2_targets": {"choices": ["No.", "Yes."], "labels": [1, 0]},
                }
                for n in range(5)
            ]
        },
        "utility_factuality": {
            "test": [
                {"question": f"Who wrote book {n}?", "answers": [f"Ann {n}", f"A. {n}", f"ann {n}"]} for n in range(7)
            ]
        },
    }


def sets() -> dict[str, Sets]:
    """Data sets by id."""
    tofu = _perturbed("author", 40)
    news = "muse_news"
    invented = [{"question": f"Who is minister {n}?", "answer": f"Person {n}"} for n in range(30)]
    texts = [{"text": row["text"]} for row in _documents("news", 25, 450)]
    kept = [{"text": row["text"]} for row in _documents("kept", 20, 250)]
    passages = [{"prompt": f"The news of day {n} begins", "gt": f"and ends with {n}."} for n in range(9)]
    return {
        "cais/wmdp": {f"wmdp-{d}": {"test": _questions(d, 30)} for d in ("bio", "chem", "cyber")},
        "cais/wmdp-corpora": {
            "bio-retain-corpus": {"train": _documents("biology", 12, 700)},
            "cyber-forget-corpus": {"train": [{"text": row["text"]} for row in _documents("exploit", 12, 700)]},
            "cyber-retain-corpus": {"train": [{"text": row["text"]} for row in _documents("code", 12, 100)]},
        },
        "cais/wmdp-bio-forget-corpus": {"default": {"train": _documents("virus", 12, 700)}},
        "cais/mmlu": {"all": {"validation": [{**row, "subject": "law"} for row in _questions("statute", 20)],
                              "test": _questions("never", 5)}},
        "locuslab/TOFU": {
            "forget01_perturbed": {"train": tofu},
            "forget01": {"train": _plain(tofu)},
            "retain_perturbed": {"train": _perturbed("kept", 30)},
            "retain99": {"train": _plain(_perturbed("kept", 60))},
            "real_authors_perturbed": {"train": _real("tofu/real_authors_perturbed.jsonl", _perturbed("real", 10))},
            "world_facts_perturbed": {"train": _real("tofu/world_facts_perturbed.jsonl", _perturbed("fact", 10))},
        },
        "muse-bench/MUSE-News": {
            "raw": {"forget": _real(f"{news}/privleak_forget.json", texts), "retain1": kept, "retain2": kept[:3],
                    "holdout": _real(f"{news}/privleak_holdout.json", _documents("later", 9, 450))},
            "privleak": {"forget": _real(f"{news}/privleak_forget.json", _documents("news", 9, 1350)),
                         "holdout": _real(f"{news}/privleak_holdout.json", _documents("later", 9, 1350))},
            "verbmem": {"forget": _real(f"{news}/verbmem_forget.json", passages)},
            "knowmem": {
                "forget_qa": _real(f"{news}/knowmem_forget_qa.json", invented),
                "retain_qa": _real(f"{news}/knowmem_retain_qa.json", invented),
                "forget_qa_icl": _real(f"{news}/knowmem_forget_qa_icl.json", invented[:10]),
                "retain_qa_icl": invented[:10],
            },
        },
        "jinzhuoran/RWKU": _rwku(PERSON),
    }  # fmt: skip


LICENSES = {"cais/wmdp": "mit", "locuslab/TOFU": "mit", "muse-bench/MUSE-News": "cc-by-4.0"}
GATED = "cais/wmdp-bio-forget-corpus"


def serve(known: Hub) -> dict[str, str]:
    """Put all of them on a Hub; their commits by id."""
    return {
        name: known.add_set(name, files_of(configs, LICENSES.get(name)), gated=name == GATED)
        for name, configs in sets().items()
    }


def files_of(configs: Sets, license_: str | None = None) -> dict[str, bytes]:
    """A repository of a data set: a card that lists its configurations, and one parquet file a split."""
    files, listed = {}, []
    for config, splits in configs.items():
        paths = {split: f"{config}/{split}-00000-of-00001.parquet" for split in splits}
        listed.append({"config_name": config, "data_files": [{"split": s, "path": p} for s, p in paths.items()]})
        for split, rows in splits.items():
            data = io.BytesIO()
            parquet.write_table(pyarrow.Table.from_pylist(rows), data)
            files[paths[split]] = data.getvalue()
    front = {"configs": listed} | ({"license": license_} if license_ else {})
    return {"README.md": f"---\n{yaml.safe_dump(front)}---\n# A data set\n".encode(), **files}

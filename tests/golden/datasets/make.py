"""How these folders were made: rows of our own, in nyu-mll/glue's columns and label order.

    pip install datasets==5.2.0 && python make.py

FORM/TASK/ holds what a user of Hugging Face's `datasets` gets by FORM. Texts hold quotes, commas, a
line end and a tab; test splits have the label -1, as on the hub.
"""

from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

HERE = Path(__file__).parent
ENTAILMENT = ["entailment", "not_entailment"]
TASKS = {  # texts, classes in the hub's order, splits
    "rte": (("sentence1", "sentence2"), ENTAILMENT, ("train", "validation", "test")),
    "mnli": (("premise", "hypothesis"), ["entailment", "neutral", "contradiction"],
             ("train", "validation_matched", "validation_mismatched", "test_matched",
              "test_mismatched")),
    "mrpc": (("sentence1", "sentence2"), ["not_equivalent", "equivalent"],
             ("train", "validation", "test")),
    "stsb": (("sentence1", "sentence2"), None, ("train", "validation", "test")),
    "cola": (("sentence",), ["unacceptable", "acceptable"], ("train", "validation", "test")),
}
TEXTS = ["He said \"no\", and left.", "The film was good.", "A line\nends here.", "Zoë's café, 5 €",
         "It rained.\tIt poured.", "\"Quoted\""]


def make_split(task: str, split: str) -> Dataset:
    columns, classes, _ = TASKS[task]
    rows = 6 if split == "train" else 3
    data = {}
    for place, name in enumerate(columns):
        data[name] = [f"{TEXTS[(row + place) % len(TEXTS)]} {split} {row}" for row in range(rows)]
    if classes is None:
        data["label"] = [-1.0 if split == "test" else row * 0.9 for row in range(rows)]
    else:
        data["label"] = [-1 if split.startswith("test") else row % len(classes)
                         for row in range(rows)]
    data["idx"] = list(range(rows))
    label = Value("float32") if classes is None else ClassLabel(names=classes)
    kinds = Features({**dict.fromkeys(columns, Value("string")), "label": label,
                      "idx": Value("int32")})
    return Dataset.from_dict(data, features=kinds)


for task, (_, _, splits) in TASKS.items():
    made = DatasetDict({split: make_split(task, split) for split in splits})
    made.save_to_disk(HERE / "save_to_disk" / task)
    for form, suffix in (("to_csv", "csv"), ("to_parquet", "parquet"), ("to_json", "jsonl")):
        (HERE / form / task).mkdir(parents=True, exist_ok=True)
        for split, dataset in made.items():
            getattr(dataset, form)(HERE / form / task / f"{split}.{suffix}")

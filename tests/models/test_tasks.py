"""Task data: the loaders, the splits, and the docstrings of the standard library."""

from __future__ import annotations

import ast
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

datasets = pytest.importorskip("datasets", reason="the models read their data by it")
from models.data import docstrings, splits, tasks
from tests.support.tiny_run import write_csv

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
DATA = Path(tasks.__file__).parent


# --- docstrings ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built() -> docstrings.Docstrings:
    return docstrings.build()


def runs(text: str, length: int = docstrings.RUN) -> set[str]:
    words = splits.normalise(text).split()
    return {" ".join(words[i : i + length]) for i in range(len(words) - length + 1)}


def test_docstrings_have_every_class_in_every_split(built):
    assert set(built.splits) == set(splits.SPLITS)
    for name, rows in built.splits.items():
        counts = Counter(label for _, label in rows)
        assert set(counts) == set(range(len(built.labels))), name
        assert min(counts.values()) >= 10
        assert max(counts.values()) < 0.25 * len(rows), "one class would make the task trivial"
    sizes = {name: len(rows) for name, rows in built.splits.items()}
    assert sizes["train"] > 2500 and min(sizes["validation"], sizes["test"]) > 250


def test_docstrings_do_not_leak_between_splits(built):
    seen = {name: set().union(*(runs(t) for t, _ in rows)) for name, rows in built.splits.items()}
    texts = {name: {splits.normalise(t) for t, _ in rows} for name, rows in built.splits.items()}
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert len(seen[one]) > 1000
        assert not seen[one] & seen[other]
        assert not texts[one] & texts[other]


def test_docstrings_do_not_name_their_package(built):
    for rows in built.splits.values():
        for text, _ in rows:
            named = [name for name in docstrings.PACKAGES if name in text.lower()]
            assert not named, text


def test_docstrings_are_the_same_every_time(built):
    assert docstrings.build() == built
    assert built.python.split(".")[:2] == [str(part) for part in sys.version_info[:2]]


def fake_stdlib(root: Path) -> Path:
    for package, sources in docstrings.PACKAGES.items():
        path = root / sources[0]
        path = path if path.suffix else path / "module.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""Words that say what {package} is good for."""\nraise SystemExit\n')
    return root


def test_docstrings_parse_and_never_run_the_sources(tmp_path):
    found = docstrings.build(fake_stdlib(tmp_path)).splits
    # Once masked, all of them are the same text under different labels: nothing may remain.
    assert found == {"train": [], "validation": [], "test": []}


def test_docstrings_name_the_package_that_has_no_source(tmp_path):
    (fake_stdlib(tmp_path) / "typing.py").unlink()
    with pytest.raises(FileNotFoundError, match="typing"):
        docstrings.build(tmp_path)


@pytest.mark.parametrize("file", ["docstrings.py", "splits.py"])
def test_builder_needs_the_standard_library_only(file):
    tree = ast.parse((DATA / file).read_text())
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = str(node.module)
            imported.add("." + module if node.level else module.split(".")[0])
    assert imported <= {*sys.stdlib_module_names, ".splits"}


# --- splits -------------------------------------------------------------------------------------


def test_split_is_stratified_and_keeps_groups_together():
    labels = [row % 3 for row in range(900)]
    keys = [f"text {row}" for row in range(900)]
    groups = [row // 6 * 3 + row % 3 for row in range(900)]  # pairs of the same class
    names = splits.stratified_split(groups, labels, keys)
    for label in range(3):
        counts = Counter(n for n, own in zip(names, labels, strict=True) if own == label)
        assert counts == {"train": 240, "validation": 30, "test": 30}
    assert all(names[row] == names[row + 3] for row in range(0, 900, 6))


def test_split_does_not_depend_on_the_order():
    keys = [f"text {row}" for row in range(200)]
    there = splits.stratified_split(keys, [0] * 200, keys)
    back = splits.stratified_split(keys[::-1], [0] * 200, keys[::-1])
    assert there == back[::-1] and len(set(there)) == 3


# --- directories --------------------------------------------------------------------------------


def test_directory_reads_csv_and_gzip_and_keeps_quotes(tmp_path):
    texts = ['said "yes", then\nleft', "NA", "null", "plain"]  # pandas would read three as missing
    write_csv(
        tmp_path / "train.csv.gz", ["sentence", "label"], [[t, i % 2] for i, t in enumerate(texts)]
    )
    write_csv(
        tmp_path / "validation.csv", ["label", "sentence"], [["positive", "good"], [0, "bad"]]
    )
    data = tasks.load(tasks.task_of("sst2"), tmp_path)
    assert data.splits["train"]["text"][:] == texts
    assert data.splits["train"]["labels"][:] == [0, 1, 0, 1]
    assert data.splits["validation"][:] == {"text": ["good", "bad"], "labels": [1, 0]}
    assert set(data.splits) == {"train", "validation"}


def test_directory_reads_pairs_scores_and_joined_columns(tmp_path):
    pair, joined = tmp_path / "stsb", tmp_path / "news"
    pair.mkdir(), joined.mkdir()
    write_csv(pair / "train.csv", ["sentence1", "sentence2", "label"], [["a", "b", "3.800"]])
    write_csv(pair / "test.csv", ["sentence1", "sentence2", "label"], [["c", "d", "0"]])
    write_csv(joined / "train.csv", ["title", "description", "label"], [["a", "b", 3]])
    write_csv(joined / "test.csv", ["title", "description", "label"], [["c", "d", 0]])
    stsb = tasks.load(tasks.task_of("stsb"), pair).splits["train"][0]
    assert stsb == {"text": "a", "text_pair": "b", "labels": 3.8}
    assert tasks.load(tasks.task_of("ag_news"), joined).splits["train"][0] == {
        "text": "a b",
        "labels": 3,
    }


def test_rows_without_a_label_are_dropped_and_empty_splits_left_out(tmp_path):
    header = ["premise", "hypothesis", "label"]
    write_csv(tmp_path / "train.csv", header, [["a", "b", 2], ["c", "d", -1], ["e", "f", 0]])
    write_csv(tmp_path / "validation.csv", header, [["g", "h", 1]])
    write_csv(tmp_path / "test.csv", header, [["i", "j", -1]])
    found = tasks.load(tasks.task_of("snli"), tmp_path).splits
    assert found["train"]["labels"][:] == [2, 0] and found["train"]["text"][:] == ["a", "e"]
    assert set(found) == {"train", "validation"}


def test_single_file_is_split_with_repeats_together(tmp_path):
    rows = [[f"Message number {row % 150}!", row % 150 % 2] for row in range(300)]
    write_csv(tmp_path / "all.csv", ["text", "label"], rows)
    found = tasks.load(tasks.task_of("sms_spam"), tmp_path).splits
    assert {name: len(split) for name, split in found.items()} == {
        "train": 244,
        "validation": 28,
        "test": 28,
    }
    assert tasks.repeated_texts(found) == {"validation": 0, "test": 0}


def test_repeated_texts_and_majority_baseline_are_counted():
    made = {
        "train": datasets.Dataset.from_dict({"text": ["A b", "c", "d"], "labels": [1, 1, 0]}),
        "test": datasets.Dataset.from_dict({"text": ["a  B!", "e"], "labels": [1, 0]}),
    }
    assert tasks.repeated_texts(made) == {"test": 1}
    assert tasks.majority_baseline(tasks.task_of("sst2"), made) == {"train": 2 / 3, "test": 0.5}
    scores = tasks.majority_baseline(tasks.task_of("stsb"), made)
    assert scores["test"] == pytest.approx(((1 - 2 / 3) ** 2 + (2 / 3) ** 2) / 2)


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        (["text", "label"], [["a", 1]], "needs the columns sentence, and label; found text, label"),
        (["sentence", "target"], [["a", 1]], "found sentence, target"),
        (["sentence", "label"], [["a", 1], ["b", "good"]], "row 2: label 'good' .*1=positive"),
        (["sentence", "label"], [["a", 2]], "row 1: label '2'"),
        (["sentence", "label"], [["a", "0.5"]], "row 1: label '0.5'"),
        (["sentence", "label"], [["a"]], "row 1 has fewer fields"),
        (["sentence", "label"], [], "holds no rows"),
        (["sentence", "label"], [["a", -1]], "no labelled train split"),
    ],
    ids=["text-column", "label-column", "word", "range", "fraction", "short", "empty", "hidden"],
)
def test_bad_files_are_refused_with_what_was_found(tmp_path, header, rows, message):
    write_csv(tmp_path / "train.csv", header, rows)
    with pytest.raises(ValueError, match=message):
        tasks.load(tasks.task_of("sst2"), tmp_path)


@pytest.mark.parametrize("score", ["nan", "inf", "high"])
def test_a_score_that_is_no_number_is_refused(tmp_path, score):
    write_csv(tmp_path / "train.csv", ["sentence1", "sentence2", "label"], [["a", "b", score]])
    with pytest.raises(ValueError, match=f"row 1: label '{score}' is not a finite number"):
        tasks.load(tasks.task_of("stsb"), tmp_path)


def test_files_that_are_no_text_are_refused_by_name(tmp_path):
    latin = "sentence,label\né,1\n".encode("latin-1")
    for name, content in (("train.csv", latin), ("train.csv.gz", b"sentence")):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is no CSV file in UTF-8"):
            tasks.load(tasks.task_of("sst2"), tmp_path)
        path.unlink()


def test_a_byte_order_mark_is_no_part_of_a_column_s_name(tmp_path):
    text = "\ufeffsentence,label\ngood,1\nbad,0\n"
    for split in ("train", "validation"):
        (tmp_path / f"{split}.csv").write_text(text, encoding="utf-8")
    found = tasks.load(tasks.task_of("sst2"), tmp_path).splits
    assert found["train"]["text"][:] == ["good", "bad"]


def test_bad_places_are_refused(tmp_path):
    sst2 = tasks.task_of("sst2")
    with pytest.raises(FileNotFoundError, match="nowhere is not a directory"):
        tasks.load(sst2, tmp_path / "nowhere")
    write_csv(tmp_path / "dev.csv", ["sentence", "label"], [["a", 1]])
    with pytest.raises(FileNotFoundError, match=r"no train.csv.*it holds dev.csv"):
        tasks.load(sst2, tmp_path)
    with pytest.raises(ValueError, match="takes no --data-dir"):
        tasks.load(tasks.task_of("docstrings"), tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [("sst-2", "did you mean sst2"), ("agnews", "did you mean ag_news"), ("xyzzy", "known: docst")],
)
def test_unknown_task_names_near_misses(name, message):
    with pytest.raises(ValueError, match=message):
        tasks.task_of(name)


# --- the hub ------------------------------------------------------------------------------------


def test_hub_rows_go_through_the_same_door(monkeypatch):
    asked = []
    mnli = {"premise": ["a", "b"], "hypothesis": ["c", "d"], "idx": [0, 1]}

    def load_dataset(*path):
        asked.append(path)
        return datasets.DatasetDict(
            train=datasets.Dataset.from_dict({**mnli, "label": [0, 2]}),
            validation_matched=datasets.Dataset.from_dict({**mnli, "label": [1, 1]}),
            validation_mismatched=datasets.Dataset.from_dict({**mnli, "label": [0, 0]}),
            test_matched=datasets.Dataset.from_dict({**mnli, "label": [-1, -1]}),
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = tasks.load(tasks.task_of("mnli")).splits
    assert asked == [("nyu-mll/glue", "mnli")]
    assert set(found) == {"train", "validation"}, "hidden labels must not be scored"
    assert found["validation"]["labels"][:] == [1, 1]
    assert found["train"][1] == {"text": "b", "text_pair": "d", "labels": 2}


def test_no_hub_points_to_local_files(monkeypatch):
    def load_dataset(*path):
        raise ConnectionError("unreachable")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match=r"unreachable.*--data-dir"):
        tasks.load(tasks.task_of("sst2"))


# --- metrics ------------------------------------------------------------------------------------


def test_metrics_match_values_worked_out_by_hand():
    logits = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [0.0, 1.0]])  # 0 1 0 1
    labels = np.array([0, 1, 1, 1])
    scores = tasks.metrics_of(tasks.task_of("mrpc"), logits, labels)
    assert scores == {
        "accuracy": 0.75,
        "precision": 1.0,
        "recall": pytest.approx(2 / 3),
        "f1": pytest.approx(0.8),
    }
    matthews = tasks.metrics_of(tasks.task_of("cola"), logits, labels)["matthews"]
    assert matthews == pytest.approx((2 * 1 - 0) / math.sqrt(2 * 3 * 1 * 2))


def test_scores_of_several_classes_are_means_over_those_that_occur():
    guesses = np.eye(4)[[0, 0, 1, 2]]
    scores = tasks.metrics_of(tasks.task_of("ag_news"), guesses, np.array([0, 1, 1, 2]))
    assert scores["recall"] == pytest.approx((1 + 1 / 2 + 1) / 3), "no row is of the fourth class"
    assert scores["precision"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert scores["f1"] == pytest.approx(2 * (2 / 3) / 3 + 1 / 3)
    constant = tasks.metrics_of(tasks.task_of("snli"), np.eye(3)[[0, 0]], np.array([0, 1]))
    assert constant["precision"] == pytest.approx(1 / 4), "the class never predicted counts as 0"
    assert set(tasks.task_of("stsb").scores) == {"pearson", "spearman", "mse"}


def test_regression_metrics_tell_rank_from_line():
    predictions = np.array([[0.0], [1.0], [8.0]])
    scores = tasks.metrics_of(tasks.task_of("stsb"), predictions, np.array([0.0, 1.0, 2.0]))
    assert scores["spearman"] == pytest.approx(1.0)
    assert scores["pearson"] == pytest.approx(8 / math.sqrt(2 * 38))
    assert scores["mse"] == pytest.approx(12.0)


# --- real files, where they lie beside the checkout ---------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED}")
@pytest.mark.parametrize(
    ("task", "folder", "split", "counts"),
    [
        ("sst2", "sst2", "validation", [428, 444]),
        ("mrpc", "mrpc", "test", [578, 1147]),
        ("rte", "rte", "validation", [146, 131]),
        ("qnli", "qnli", "validation", [2702, 2761]),
        ("mnli", "mnli", "validation", [3479, 3123, 3213]),
        ("snli", "snli", "validation", [3329, 3235, 3278]),
        ("ag_news", "ag_news", "test", [1900] * 4),
        ("sms_spam", "sms_spam_deepdive", "test", [136, 164]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_real_files_have_the_published_class_counts(task, folder, split, counts):
    found = tasks.load(tasks.task_of(task), SHARED / folder).splits[split]
    assert [Counter(found["labels"])[label] for label in range(len(counts))] == counts


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED}")
def test_real_sms_file_is_split_without_leaks():
    found = tasks.load(tasks.task_of("sms_spam"), SHARED / "sms_spam").splits
    assert sum(len(split) for split in found.values()) == 5574
    assert tasks.repeated_texts(found) == {"validation": 0, "test": 0}
    for split in found.values():
        assert sum(split["labels"]) / len(split) == pytest.approx(747 / 5574, abs=0.005)

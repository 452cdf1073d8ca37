"""Scores of sentences that a model wrote, each against several references.

They are computed as by the script of the E2E challenge, whose scores the LoRA paper gives: without
case, in the tokens of mteval-v13a. ROUGE-L alone differs. Here it is the F1 of rouge-score against
the best reference; the script's favours recall. BLEU, ROUGE-L and METEOR lie between 0 and 1.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

NEEDED = {"sacrebleu": "sacrebleu", "rouge_score": "rouge-score"}  # module -> package
LONGEST = 5  # words of the n-grams of NIST


def check_installed() -> None:
    """Raises ImportError where a package that scores sentences is missing."""
    missing = [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f"scores of sentences need pip install {' '.join(missing)}")


def scores(
    written: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[str, float], str | None]:
    """BLEU, ROUGE-L and NIST of sentences, and METEOR and CIDEr where pycocoevalcap and Java are.

    `references` holds those of each sentence. The second value says why the last two are missing.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    most = max(map(len, references))
    streams = [[row[i] if i < len(row) else None for row in references] for i in range(most)]
    rouge = RougeScorer(["rougeL"])
    best = [
        rouge.score_multi(list(row), text)["rougeL"].fmeasure
        for text, row in zip(written, references, strict=True)
    ]
    split = Tokenizer13a()
    words = [split(text.lower()).split() for text in written]
    theirs = [[split(text.lower()).split() for text in row] for row in references]
    found = {
        "bleu": BLEU(lowercase=True, force=True).corpus_score(list(written), streams).score / 100,
        "rouge_l": sum(best) / len(best),
        "nist": nist(words, theirs),
    }
    if importlib.util.find_spec("pycocoevalcap") is None:
        return found, "meteor and cider are not computed: pip install pycocoevalcap"
    if shutil.which("java") is None:
        return found, "meteor and cider are not computed: pycocoevalcap needs Java"
    try:
        return found | _by_coco(written, references), None
    except (OSError, ValueError) as error:  # its Java programs may fail; the run should not
        return found, f"meteor and cider are not computed: {' '.join(str(error).split())}"


def _by_coco(written: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """METEOR and CIDEr of the caption evaluation, which splits words by Stanford's tokenizer."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    split = PTBTokenizer().tokenize
    ours = split({row: [{"caption": text}] for row, text in enumerate(written)})
    theirs = split(
        {row: [{"caption": text} for text in texts] for row, texts in enumerate(references)}
    )
    scorers = {"meteor": Meteor(), "cider": Cider()}
    return {name: float(s.compute_score(theirs, ours)[0]) for name, s in scorers.items()}


def nist(written: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """NIST of tokens, as mteval-v13a has it.

        NIST = penalty * sum over n of (information of the n-grams that a reference has too) / count
        information of w1 ... wn = log2(count of w1 ... w(n-1) / count of w1 ... wn), by references

    The penalty is 1 for texts as long as the mean reference, and a half for two thirds of that.
    """
    counts = Counter(gram for row in references for text in row for gram in _grams(text))
    counts[()] = sum(len(text) for row in references for text in row)
    hits: dict[int, float] = defaultdict(float)
    total: Counter[int] = Counter()
    for text, row in zip(written, references, strict=True):
        most: Counter[tuple[str, ...]] = Counter()
        for reference in row:
            most |= Counter(_grams(reference))
        ours = Counter(_grams(text))
        for gram, count in ours.items():
            total[len(gram)] += count
        for gram, count in (ours & most).items():
            hits[len(gram)] += count * math.log2(counts[gram[:-1]] / counts[gram])
    mean = sum(sum(map(len, row)) / len(row) for row in references)
    ratio = min(1.0, sum(map(len, written)) / mean)
    if ratio == 0:
        return 0.0
    penalty = math.exp(math.log(0.5) * (math.log(ratio) / math.log(1.5)) ** 2)
    return penalty * sum(hits[n] / total[n] for n in total)


def _grams(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for n in range(1, LONGEST + 1):
        for start in range(len(words) - n + 1):
            yield tuple(words[start : start + n])

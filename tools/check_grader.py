"""Figures of the grader on the shared data: accuracy, false positives, crafted and hostile, speed.

    python tools/check_grader.py --data ../shared/data

Prints a table a part; nothing is asserted, the targets stand beside the figures.
"""

from __future__ import annotations

import argparse
import gzip
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mdpo_jax.grading.extract import extract_gold
from mdpo_jax.grading.verdict import Grader
from mdpo_jax.types import Verdict

MULTI = "math_test_multi_box_golds.jsonl"
# Wrong answers that published graders accept (docs of the shared data, section 4).
CRAFTED = (
    ("50", "0.5"), ("50", "5000"), ("10000", "10001"),
    (r"\sqrt{67}, -\sqrt{85}", r"\sqrt{67}"), (r"\sqrt{67}", r"\sqrt{67}, -\sqrt{85}"),
    ("1/3", "1/3, 1/4"), ("A", "A,B,C,D"), ("1/2", "1/2 or 1/3"), ("12", "12 or 13"),
    ("(1,2)", "[1,2]"), ("(1,2)", r"\{1,2\}"), ("(1,2)", "{1,2}"),
)  # fmt: skip
HOSTILE = (
    "9^{9^{9^{9}}}", "9**9**9**9", "2^{1/2^{1000}}", "10^{10^{10}}", r"\sqrt{" * 60 + "2" + "}" * 60,
    "(10^8)!", "99999999!", "((10^5)!)!", "(" * 400 + "1" + ")" * 400,
)  # fmt: skip


def main() -> None:
    """Print every part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    data = parser.parse_args().data
    for policy in ("strict", "lenient"):
        with Grader(policy=policy) as grader:
            grader.start()
            cases(grader, data / "grader_cases_dev.jsonl")
            trajectories(grader, data)
    multi_box(data)
    with Grader() as grader:
        grader.start()
        wrong = [pair for pair in CRAFTED if grader.grade_answer(*pair).label != "wrong"]
        print(f"crafted: {len(CRAFTED)} pairs, {len(wrong)} not `wrong` {wrong}")
        hostile(grader)


def cases(grader: Grader, path: Path) -> None:
    """Accuracy by policy tag; each core error is printed."""
    right, count, rules = Counter(), Counter(), Counter()
    for row in _lines(path):
        verdict = grader.judge(row["gold"], row["pred"], row["form"])
        tag, good = row["policy"] or "core", verdict.correct == bool(row["expected"])
        count[tag] += 1
        right[tag] += good
        rules[verdict.rule] += 1
        if not good and tag == "core":
            kind = "false positive" if verdict.correct else "false negative"
            print(f"  {kind} {row['id']}: {row['gold']!r} {row['pred'][-80:]!r} {verdict.rule}")
    table = ", ".join(f"{t} {right[t]}/{n} = {right[t] / n:.4f}" for t, n in count.items())
    print(f"{grader.policy}: {table}\n  rules {dict(rules.most_common())}")


def trajectories(grader: Grader, data: Path) -> None:
    """Accuracy of ToRA's models, and the time a verdict takes on ToRA and MathCoder."""
    rows = list(_lines(data / "tora_trajectories_dev.jsonl.gz"))
    for model in sorted({row["model"] for row in rows}):
        mine = [row for row in rows if row["model"] == model]
        by_text = [grader.grade(row["gt"], row["code"][0]).correct for row in mine]
        by_pred = [grader.grade_answer(row["gt"], row["pred"][0]).correct for row in mine]
        print(
            f"{grader.policy}: {model} n {len(mine)} accuracy {100 * np.mean(by_text):.2f} "
            f"from text, {100 * np.mean(by_pred):.2f} from `pred`"
        )
    coder = list(_lines(data / "mathcoder_trajectories_dev.jsonl.gz"))
    _timed(grader, "ToRA", [(r["gt"], r["pred"][0]) for r in rows])
    _timed(grader, "MathCoder", [(r["gold"]["answer"], r["pred"]) for r in coder])


def multi_box(data: Path) -> None:
    """The golds of the MATH test items whose answer is in several boxes."""
    known = {row["idx"]: row["annotated_answer"] for row in _lines(data / MULTI)}
    for row in _lines(data / "math_test.jsonl"):
        if row["idx"] in known:
            print(
                f"  multi-box {row['idx']}: {extract_gold(row['solution'])} ({known[row['idx']]})"
            )


def hostile(grader: Grader) -> None:
    """Each hostile expression, and all at once, while four threads grade normal pairs."""
    stop, normal = threading.Event(), []

    def work(thread: int) -> None:
        k = 1
        while not stop.is_set():
            k += 1
            pair = rf"{k}\sqrt{{{thread + 2}}}", rf"\sqrt{{{k * k * (thread + 2)}}}"
            verdict, seconds = _time(lambda pair=pair: grader.grade_answer(*pair))
            normal.append((verdict.label, seconds))
            time.sleep(0.02)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for answer in HOSTILE:
        verdict, seconds = _time(lambda answer=answer: grader.grade_answer(r"\pi", answer))
        print(f"  hostile {answer[:24]}: {verdict.label} {verdict.rule} {seconds:.2f} s (<= 2.5)")
    stop.set()
    for t in threads:
        t.join()
    times = np.array([s for _, s in normal])
    labels = Counter(label for label, _ in normal)
    half = 1e3 * np.median(times)
    print(f"  meanwhile {dict(labels)}, median {half:.1f} ms, worst {times.max():.2f} s")


def _timed(grader: Grader, name: str, pairs: Sequence[tuple[str, str]]) -> None:
    with Grader(policy=grader.policy) as fresh:  # whose cache is empty
        fresh.start()
        found = [_time(lambda pair=pair: fresh.grade_answer(*pair)) for pair in pairs]
    times = 1e3 * np.array([seconds for _, seconds in found])
    labels = Counter(verdict.label for verdict, _ in found)
    half, high = np.percentile(times, [50, 99])
    print(
        f"{grader.policy}: {name} {dict(labels)} median {half:.3f} ms (<= 1), p99 {high:.1f} ms "
        f"(<= 100), worst {times.max():.0f} ms"
    )


def _time(work: Callable[[], Verdict]) -> tuple[Verdict, float]:
    start = time.monotonic()
    return work(), time.monotonic() - start


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


if __name__ == "__main__":
    main()

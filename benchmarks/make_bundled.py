"""Write the models and texts of quamba/bundled from the full data sets they are taken from.

    python benchmarks/make_bundled.py --data DIR --models DIR

--data holds train/novels_train.txt.xz, train/wikitext2_train.txt.xz, eval/wikitext2_test.txt and
eval/lambada_openai_test.jsonl; --models holds <name>/hf/ for each bundled model. The origin of each is in
quamba/bundled/LICENSES.md. The same inputs always give the same bytes.
"""

import argparse
import json
import lzma
import re
import shutil
from itertools import chain
from pathlib import Path

from quamba.bundled import MODELS, SEPARATOR

BUNDLED = Path(__file__).resolve().parents[1] / "quamba" / "bundled"
DOCUMENT_END = "<|endoftext|>"

HELD_OUT_BYTES = 200_000  # the end of the novels: the evaluation sample, never calibrated on
WIKITEXT_BYTES = 160_000
LAMBADA_ROWS = 500
EXCERPTS = 125  # of each of the two training texts
EXCERPT_CHARS = 4_000

_PARAGRAPH_END = re.compile(r"\n+")
_SENTENCE_END = re.compile(r"[.!?][\"']? (?=[\"'A-Z])")
_ARTICLE_TITLE = re.compile(r"^ = [^=\n]+ = $", re.MULTILINE)


def boundary(text: str, position: int) -> int:
    """The first paragraph start at or after a position; the first sentence start where the paragraph is very long."""
    end = _PARAGRAPH_END.search(text, position, position + EXCERPT_CHARS) or _SENTENCE_END.search(text, position)
    return end.end() if end else len(text)


def excerpts(text: str) -> list[str]:
    """`EXCERPTS` passages of about `EXCERPT_CHARS` characters at equal distances, each from one document."""
    stride = len(text) // EXCERPTS
    starts = [boundary(text, i * stride + stride // 2) for i in range(EXCERPTS)]
    passages = (text[start : boundary(text, start + EXCERPT_CHARS)] for start in starts)
    return [passage.split(DOCUMENT_END)[0].rstrip("\n") for passage in passages]


def calibration(novels: str, wikitext: str) -> str:
    """Excerpts of the two texts in turn, so that any beginning of the result is as mixed as the whole."""
    return SEPARATOR.join(chain.from_iterable(zip(excerpts(novels), excerpts(wikitext), strict=True))) + "\n"


def hold_out(novels: bytes) -> tuple[str, str]:
    """(what may be calibrated on, the evaluation sample: the last `HELD_OUT_BYTES` from the first paragraph on)."""
    kept, tail = novels[:-HELD_OUT_BYTES], novels[-HELD_OUT_BYTES:]
    return kept.decode(errors="ignore"), tail[tail.index(b"\n\n") + 2 :].decode()


def whole_articles(wikitext: str, limit: int) -> str:
    """As many whole articles from the beginning as fit into `limit` bytes."""
    starts = [match.start() for match in _ARTICLE_TITLE.finditer(wikitext)]
    fitting = [start for start in starts if len(wikitext[:start].encode()) <= limit]
    return wikitext[: fitting[-1]]


def thin_out(lambada: str, rows: int) -> str:
    """Every k-th row, with the column `text` alone."""
    lines = lambada.rstrip("\n").split("\n")
    kept = lines[:: len(lines) // rows][:rows]
    return "".join(json.dumps({"text": json.loads(line)["text"]}, ensure_ascii=False) + "\n" for line in kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=BUNDLED)
    options = parser.parse_args()

    novels, held_out = hold_out(lzma.decompress((options.data / "train/novels_train.txt.xz").read_bytes()))
    wikitext = lzma.decompress((options.data / "train/wikitext2_train.txt.xz").read_bytes()).decode()
    wikitext_test = (options.data / "eval/wikitext2_test.txt").read_text(encoding="utf-8")
    lambada = (options.data / "eval/lambada_openai_test.jsonl").read_text(encoding="utf-8")
    texts = {
        "calibration.txt": calibration(novels, wikitext),
        "eval/novels_sample.txt": held_out,
        "eval/wikitext2_sample.txt": whole_articles(wikitext_test, WIKITEXT_BYTES),
        "eval/lambada_openai.jsonl": thin_out(lambada, LAMBADA_ROWS),
    }
    for name, text in texts.items():
        path = options.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
        print(f"{path.stat().st_size:>10,}  {name}")
    for model in MODELS:
        (options.out / model).mkdir(parents=True, exist_ok=True)
        for source in sorted((options.models / model / "hf").iterdir()):
            path = options.out / model / source.name
            shutil.copyfile(source, path)
            print(f"{path.stat().st_size:>10,}  {model}/{source.name}")


if __name__ == "__main__":
    main()

"""A tokenizer that makes few tokens of C-Eval's fixed words, so that a prompt fits into 32 positions; archives."""

import json

from tests.calibration.make import HEADER, SPECIALS, story, table, write_ceval

FIXED = (
    "以下是中国关于逻辑学考试的单项选择题",
    "以下是中国关于法学考试的单项选择题",
    "请选出其中的正确答案",
    *("答案", "，", "。", "："),  # noqa: RUF001 (Chinese punctuation is meant)
)


def write_tokenizer(directory, vocab_size=500):
    """A byte-level BPE with Gemma's special tokens at Gemma's ids; it pads and truncates, which must not show."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*(" ".join(story(n)) for n in range(20)), *FIXED * 999], trainer)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=300)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<bos>", "tokenizer_class": "PreTrainedTokenizerFast"})
    )


def questions(count, answers="ABCD", first=0):
    """Rows of a table: sums of two lengths with one-digit choices."""
    return [
        [
            str(n),
            f"{n}+{first}" + "+1" * (n % 2),
            *(str((n + i + first) % 10) for i in range(4)),
            answers[n % len(answers)],
        ]
        for n in range(count)
    ]


def write_exam(path, val, dev=None):
    """An archive of the subjects logic and law."""
    dev = questions(5, "CABD", first=3) if dev is None else dev
    explained = table([[*row, "because"] for row in dev], [*HEADER, "explanation"])
    members = {}
    for subject in ("law", "logic"):
        members[f"dev/{subject}_dev.csv"] = explained
        members[f"val/{subject}_val.csv"] = table(val)
        members[f"test/{subject}_test.csv"] = table([row[:-1] for row in val], HEADER[:-1])
    return write_ceval(path, members)

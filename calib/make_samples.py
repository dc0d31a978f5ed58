"""Write the bundled calibration samples: `python calib/make_samples.py`. The same bytes on every run of one Python.

c4 and alpaca are made of docstrings of the Python standard library, ceval of questions written here.
"""

# ruff: noqa: RUF001 (Chinese punctuation is meant)
from __future__ import annotations

import ast
import csv
import gzip
import io
import json
import random
import re
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
STDLIB = Path(sysconfig.get_paths()["stdlib"])
MODULES = (
    "abc argparse ast bdb bisect calendar cmd code codecs collections/__init__ colorsys configparser contextlib copy "
    "csv dataclasses datetime difflib dis doctest email/message enum filecmp fileinput fnmatch fractions ftplib "
    "functools gettext glob gzip heapq html/parser http/client http/cookiejar imaplib inspect ipaddress json/__init__ "
    "json/encoder locale logging/__init__ logging/handlers lzma mailbox mimetypes multiprocessing/pool netrc numbers "
    "operator optparse os pathlib pdb pickle pickletools platform poplib pprint queue random re/__init__ reprlib runpy "
    "sched selectors shelve shlex shutil smtplib socket socketserver ssl statistics string subprocess tarfile tempfile "
    "textwrap threading timeit tokenize trace traceback types typing unittest/case unittest/mock urllib/parse "
    "urllib/request urllib/robotparser uuid warnings weakref webbrowser zipfile zipimport"
)


def docstrings(module: str) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of a standard library module and of what it defines."""
    tree = ast.parse((STDLIB / f"{module}.py").read_text(encoding="utf-8"))
    name = module.removesuffix("/__init__").replace("/", ".")
    for owner, node in _definitions(tree, name):
        text = ast.get_docstring(node)
        if text and text.isascii():
            yield owner, text


def _definitions(node: ast.AST, owner: str) -> Iterator[tuple[str, ast.AST]]:
    yield owner, node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef) and not child.name.startswith("_"):
            yield from _definitions(child, f"{owner}.{child.name}")


def write_c4(file: Path) -> None:
    """One document for each module: its docstrings, at most 4,000 characters of them."""
    lines = []
    for module in MODULES.split():
        text = ""
        for _, doc in docstrings(module):
            if len(text) + len(doc) < 4000:
                text += doc + "\n\n"
        name = module.removesuffix("/__init__").split("/")[0]
        url = f"https://docs.python.org/3/library/{name}.html"
        if len(text) > 300:
            lines.append(json.dumps({"text": text.strip(), "timestamp": "2023-06-06T00:00:00Z", "url": url}))
    file.write_bytes(gzip.compress("".join(line + "\n" for line in lines).encode(), mtime=0))


def write_alpaca(file: Path) -> None:
    """Explain, summarise and count, on docstrings of functions."""
    entries = []
    rng = random.Random(0)
    for module in MODULES.split():
        found = [(name, doc) for name, doc in docstrings(module) if 120 < len(doc) < 900 and "." in name]
        for name, doc in rng.sample(found, min(4, len(found))):
            first = " ".join(re.split(r"\n\s*\n", doc)[0].split())
            kind = rng.randrange(3)
            if kind == 0:
                entries.append((f"Explain what {name} of the Python standard library does.", "", doc))
            elif kind == 1:
                entries.append(("Say in one sentence what this piece of documentation is about.", doc, first))
            else:
                words = first.split()[:12]
                entries.append(
                    ("Sort these words alphabetically.", ", ".join(words), ", ".join(sorted(words, key=str.lower)))
                )
    keys = ("instruction", "input", "output")
    text = json.dumps([dict(zip(keys, entry, strict=True)) for entry in entries], indent=1)
    file.write_text(text + "\n", encoding="utf-8")


# question, right choice, three wrong ones
COMMON = (
    ("一年中白昼最长的一天（北半球）是____。", "夏至", "冬至", "春分", "秋分"),
    ("水在标准大气压下的沸点是____。", "100摄氏度", "90摄氏度", "80摄氏度", "120摄氏度"),
    ("光在真空中的速度大约是每秒____。", "30万千米", "3万千米", "300万千米", "3千米"),
    ("植物进行光合作用时吸收的气体主要是____。", "二氧化碳", "氧气", "氮气", "氢气"),
    ("地球绕太阳公转一周大约需要____。", "一年", "一个月", "一天", "十年"),
    ("下列物质中，常温下是液体的金属是____。", "汞", "铁", "铜", "铝"),
    ("人体中负责输送氧气的血细胞是____。", "红细胞", "白细胞", "血小板", "神经细胞"),
    ("下列天体中，自己发光的是____。", "太阳", "月球", "地球", "火星"),
    ("计算机中，一个字节由____个二进制位组成。", "8", "4", "16", "32"),
    ("在二进制中，十进制数5写作____。", "101", "110", "100", "111"),
    ("下列数据结构中，遵循先进先出原则的是____。", "队列", "栈", "二叉树", "哈希表"),
    ("下列排序算法中，平均时间复杂度为O(n log n)的是____。", "归并排序", "冒泡排序", "插入排序", "选择排序"),
    ("把文字信息转换成密文的过程叫做____。", "加密", "压缩", "编译", "解释"),
    ("三角形的内角和等于____。", "180度", "90度", "270度", "360度"),
    ("圆的周长与直径之比称为____。", "圆周率", "黄金比", "自然常数", "虚数单位"),
    ("声音不能在____中传播。", "真空", "空气", "水", "钢铁"),
    ("电流的单位是____。", "安培", "伏特", "欧姆", "瓦特"),
    ("地球上面积最大的海洋是____。", "太平洋", "大西洋", "印度洋", "北冰洋"),
    ("下列动物中，属于哺乳动物的是____。", "鲸", "鲨鱼", "青蛙", "蜥蜴"),
    ("月球是地球的____。", "卫星", "行星", "恒星", "彗星"),
)
Question = tuple[str, str, str, str, str, str]


def _number_question(rng: random.Random) -> Question:
    a, b = rng.randint(12, 99), rng.randint(3, 29)
    kind = rng.randrange(5)
    if kind == 0:
        text, right, why = f"计算{a}与{b}的乘积，结果等于____。", a * b, f"{a}乘以{b}等于{a * b}。"
    elif kind == 1:
        text, right, why = f"{a * b}除以{b}的商是____。", a, f"因为{a}乘以{b}等于{a * b}，所以商是{a}。"
    elif kind == 2:
        text = f"一个长方形的长是{a}厘米，宽是{b}厘米，它的周长是多少厘米？____"
        right, why = 2 * (a + b), f"周长等于长与宽之和的两倍，即2×({a}+{b})={2 * (a + b)}厘米。"
    elif kind == 3:
        text = f"小明每分钟走{a}米，他走{b}分钟一共走了多少米？____"
        right, why = a * b, f"路程等于速度乘以时间，{a}×{b}={a * b}米。"
    else:
        text = f"等差数列的首项是{a}，公差是{b}，它的第10项是____。"
        right, why = a + 9 * b, f"第10项等于首项加上9倍的公差，即{a}+9×{b}={a + 9 * b}。"
    wrong = rng.sample([right + step for step in (-20, -10, -2, -1, 1, 2, 10, 20) if right + step > 0], 3)
    return (text, str(right), *map(str, wrong), why)  # type: ignore[return-value]


def write_ceval(file: Path) -> None:
    """Two subjects in the three splits, in C-Eval's columns."""
    rng = random.Random(0)
    common: list[Question] = [(*row, f"正确的说法是“{row[1]}”。") for row in COMMON]
    subjects = {"common_knowledge": common, "elementary_mathematics": [_number_question(rng) for _ in range(180)]}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for subject, questions in subjects.items():
            cuts = {"dev": questions[:5], "val": questions[5:10], "test": questions[10:]}
            for split, rows in cuts.items():
                member = zipfile.ZipInfo(f"{split}/{subject}_{split}.csv", (2023, 6, 6, 0, 0, 0))
                member.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(member, _csv(rows, split, rng))


def _csv(questions: list[Question], split: str, rng: random.Random) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    explained = ["explanation"] if split == "dev" else []
    writer.writerow(["id", "question", *"ABCD", "answer", *explained])
    for number, (text, *choices, why) in enumerate(questions):
        order = rng.sample(range(4), 4)
        answer = "ABCD"[order.index(0)]
        writer.writerow([number, text, *(choices[i] for i in order), answer, *([why] if explained else [])])
    return out.getvalue()


if __name__ == "__main__":
    write_c4(HERE / "c4_sample.json.gz")
    write_alpaca(HERE / "alpaca_sample.json")
    write_ceval(HERE / "ceval_sample.zip")

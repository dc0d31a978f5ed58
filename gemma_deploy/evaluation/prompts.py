"""C-Eval's prompt: the answer-only form of the paper (arXiv:2305.08322) and of github.com/hkust-nlp/ceval.

    以下是中国关于{科目}考试的单项选择题，请选出其中的正确答案。

    {question}
    A. {choice A}
    B. {choice B}
    C. {choice C}
    D. {choice D}
    答案：B

    {the question to answer, its four choices}
    答案：

Subjects go by their Chinese names, which the archive does not hold. No space follows the colon, so the choice is the
token `A` and not `▁A`; `choice_tokens` asks the tokenizer instead of assuming so.
"""

# ruff: noqa: RUF001, RUF002 (Chinese punctuation is meant)
from __future__ import annotations

from collections.abc import Callable, Sequence

from gemma_deploy.calibration.sources.ceval import ANSWER
from gemma_deploy.calibration.sources.reading import Row
from gemma_deploy.errors import UsageError

CHOICES = "ABCD"
HEADER = "以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n"
# From subject_mapping.json of that repository.
SUBJECTS = {
    "accountant": "注册会计师",
    "advanced_mathematics": "高等数学",
    "art_studies": "艺术学",
    "basic_medicine": "基础医学",
    "business_administration": "工商管理",
    "chinese_language_and_literature": "中国语言文学",
    "civil_servant": "公务员",
    "clinical_medicine": "临床医学",
    "college_chemistry": "大学化学",
    "college_economics": "大学经济学",
    "college_physics": "大学物理",
    "college_programming": "大学编程",
    "computer_architecture": "计算机组成",
    "computer_network": "计算机网络",
    "discrete_mathematics": "离散数学",
    "education_science": "教育学",
    "electrical_engineer": "注册电气工程师",
    "environmental_impact_assessment_engineer": "环境影响评价工程师",
    "fire_engineer": "注册消防工程师",
    "high_school_biology": "高中生物",
    "high_school_chemistry": "高中化学",
    "high_school_chinese": "高中语文",
    "high_school_geography": "高中地理",
    "high_school_history": "高中历史",
    "high_school_mathematics": "高中数学",
    "high_school_physics": "高中物理",
    "high_school_politics": "高中政治",
    "ideological_and_moral_cultivation": "思想道德修养与法律基础",
    "law": "法学",
    "legal_professional": "法律职业资格",
    "logic": "逻辑学",
    "mao_zedong_thought": "毛泽东思想和中国特色社会主义理论体系概论",
    "marxism": "马克思主义基本原理",
    "metrology_engineer": "注册计量师",
    "middle_school_biology": "初中生物",
    "middle_school_chemistry": "初中化学",
    "middle_school_geography": "初中地理",
    "middle_school_history": "初中历史",
    "middle_school_mathematics": "初中数学",
    "middle_school_physics": "初中物理",
    "middle_school_politics": "初中政治",
    "modern_chinese_history": "近代史纲要",
    "operating_system": "操作系统",
    "physician": "医师资格",
    "plant_protection": "植物保护",
    "probability_and_statistics": "概率统计",
    "professional_tour_guide": "导游资格",
    "sports_science": "体育学",
    "tax_accountant": "税务师",
    "teacher_qualification": "教师资格",
    "urban_and_rural_planner": "注册城乡规划师",
    "veterinary_medicine": "兽医学",
}


def prompt(subject: str, shots: Sequence[Row], question: Row) -> str:
    """The text a model is to continue with A, B, C or D.

    Args:
        subject: name in the archive; one that C-Eval does not have goes by its words.
        shots: solved examples.
    """
    header = HEADER.format(subject=SUBJECTS.get(subject, subject.replace("_", " ")))
    return header + "".join(f"{_asked(shot)}{shot['answer']}\n\n" for shot in shots) + _asked(question)


def _asked(row: Row) -> str:
    return "\n".join([row["question"], *(f"{choice}. {row[choice]}" for choice in CHOICES), ANSWER])


def choice_tokens(text: str, encode: Callable[[str], list[int]], where: str) -> list[int]:
    """The four tokens that continue a prompt with A, B, C and D.

    Args:
        encode: text -> ids; where: for the error.

    Raises:
        UsageError: with this tokenizer the answer is not one more token.
    """
    ids = encode(text)
    longer = [encode(text + choice) for choice in CHOICES]
    if any(len(one) != len(ids) + 1 or one[:-1] != ids for one in longer):
        raise UsageError(
            f"its tokenizer does not make one token of each of A, B, C and D after {ANSWER!r}",
            where=where,
            expected="a Gemma tokenizer",
            next_step="compare perplexities instead (--task ppl)",
        )
    return [one[-1] for one in longer]

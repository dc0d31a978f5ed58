from collections import Counter

from tests.rotation import A_FEW, GENERATIONS, OTHERS, all_but_a_few, left_out, of_others


def cases(name, **others):
    return [(name, {"model_type": kind, **others}) for kind in GENERATIONS]


def test_one_generation_of_each_test_stays():
    found = [*cases("a"), *cases("b", scheme="w8a16"), *cases("b", scheme="w8a8")]
    gone = left_out(found)
    many = len(GENERATIONS)
    assert [len(gone & set(range(start, start + many))) for start in (0, many, 2 * many)] == [many - 1] * 3
    assert left_out(found) == gone  # the same ones every time


def test_what_has_no_other_generation_stays():
    assert left_out([("a", {}), ("b", {"model_type": "gemma"}), ("b", {"model_type": "gemma2", "size": 3})]) == set()
    assert (
        left_out([("a", {"first": "gemma", "second": "gemma2"}), ("a", {"first": "gemma2", "second": "gemma"})])
        == set()
    )


def test_other_generations_are_left_out():
    found = [*cases("a"), ("a", {"model_type": OTHERS[0]}), ("b", {"size": 3, "kind": OTHERS[0]})]
    assert of_others(found) == {len(GENERATIONS), len(GENERATIONS) + 1}


def test_they_take_turns():
    names = [f"test_{number}" for number in range(300)]
    stay = Counter()
    for name in names:
        (kept,) = set(range(len(GENERATIONS))) - left_out(cases(name))
        stay[GENERATIONS[kept]] += 1
    assert min(stay.values()) > 50


def test_a_few_of_many_cases_stay():
    test = next(test for test, few in A_FEW.items() if few == 3)
    names = ["before", *[test] * 7, "behind"]
    assert set(range(1, 8)) - all_but_a_few(names) == {1, 3, 5}
    assert all_but_a_few([test]) == all_but_a_few([]) == set()
    assert not all_but_a_few(names) & {0, 8}

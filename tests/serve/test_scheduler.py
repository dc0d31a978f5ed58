"""Many texts at once: the bits of each alone, whoever is beside it; places, memory and turns."""

from types import SimpleNamespace

import numpy as np
import pytest

from gemma_deploy.backends.native.graph import plan_in
from gemma_deploy.backends.native.library import Model
from gemma_deploy.engine import open_engine
from gemma_deploy.errors import UsageError
from gemma_deploy.names import PARAMS
from gemma_deploy.runtime.many import PAGE
from gemma_deploy.serve.choosing import Choice
from gemma_deploy.serve.prefixes import Prefixes
from gemma_deploy.serve.request import Began, Ended, Failed, QueueFullError, Request, Said, Scores
from gemma_deploy.serve.scheduler import Scheduler
from tests.native.conftest import native_library  # noqa: F401
from tests.serve.conftest import CONTEXT

MANY = 1 << 26  # bytes of caches
TO_TRANSFORMERS = 0.05


def model_of(artifact, cache_bytes=MANY, threads=2):
    return Model(plan_in(artifact), artifact / PARAMS, threads=threads, cache_bytes=cache_bytes)


def ids_of(seed, count):
    return [int(one) for one in np.random.default_rng(seed).integers(3, 500, count)]


class Answers:
    """Drives a scheduler, and sorts what comes by request."""

    def __init__(self, scheduler):
        self.scheduler, self.events, self.steps = scheduler, {}, 0

    def ask(self, request):
        number = self.scheduler.add(request)
        self.events[number] = []
        return number

    def step(self):
        found = self.scheduler.step()
        self.steps += 1
        assert self.steps < 5000
        for number, event in found:
            self.events[number].append(event)
        return found

    def all(self):
        while not self.scheduler.idle:
            self.step()
        return self

    def tokens(self, number):
        return [event.token for event in self.events[number] if isinstance(event, Said)]

    def bits(self, number):
        """Everything that was answered but how much was known before, to compare."""
        found = []
        for event in self.events[number]:
            assert not isinstance(event, Failed), event.error
            if isinstance(event, Began):
                found.append(bits_of(event.scores))
            elif isinstance(event, Said):
                found.append((event.token, bits_of(event.scores)))
            else:
                found.append((event.reason, event.token))
        return found


def bits_of(scores):
    return None if scores is None else (scores.own.tobytes(), scores.ids.tobytes(), scores.top.tobytes())


def requests():
    """Prompts that begin alike over a page and more, others, all sorts of choices, scores of some."""
    system = ids_of(1, 300)
    drawn = Choice(1.3, 40, 0.9, seed=5)
    return [
        Request([*system, *ids_of(2, 50)], max_tokens=40, top=3),
        Request([*system, *ids_of(3, 20)], drawn, max_tokens=30),
        Request(ids_of(4, 10), Choice(repetition=1.5, frequency=0.3), max_tokens=150, top=0),
        Request([*system[:200], *ids_of(5, 200)], max_tokens=5, prompt_top=2),
        Request([*system, *ids_of(2, 70)], max_tokens=0, prompt_top=1),
        Request([*system[:200], *ids_of(5, 190)], Choice(1.0, seed=9), max_tokens=60, prompt_top=1, top=1),
        Request(system[:1], Choice(0.8, top_p=0.7, seed=1), max_tokens=300, prompt_top=5),
        Request([*system, *ids_of(2, 50)], max_tokens=40, top=3),
    ]


@pytest.fixture(scope="module")
def alone(served):
    """What each request gives on a scheduler of its own."""
    model, found = model_of(served), []
    for request in requests():
        answers = Answers(Scheduler(model, together=1))
        number = answers.ask(request)
        found.append(answers.all().bits(number))
    return found


@pytest.mark.parametrize(("together", "pages"), [(8, 400), (3, 400), (8, 30), (8, 14)])
def test_a_request_gives_the_same_bits_in_any_company(served, alone, together, pages):
    """With beginnings taken over, and with so little memory that texts are set back; later ones join one by one."""
    page = page_bytes(served)
    model = model_of(served, pages * page)
    answers = Answers(Scheduler(model, together=together))
    numbers = []
    for request in requests():
        numbers.append(answers.ask(request))
        answers.step()
    answers.all()
    again = [answers.ask(request) for request in requests()]
    answers.all()
    for number, other, expected in zip(numbers, again, alone, strict=True):
        assert answers.bits(number) == expected
        assert answers.bits(other) == expected
    counts = answers.scheduler.counts()
    assert (counts.preempted > 0) == (pages == 14)
    assert counts.cached_tokens > (2500 if pages == 400 else 0)
    assert (counts.running, counts.waiting) == (0, 0)


def page_bytes(artifact):
    """Bytes that a page of one kind takes, the smallest there is."""
    model = model_of(artifact)
    model.normed([(model.sequence(), [5], 1)])
    used = model.cache_used()
    model.close()
    return used // 2  # windows and full attention: of this model as large, within a factor


def test_greedy_tokens_are_those_of_a_session_and_scores_those_of_all_logits(served):
    """Against the engine that reads one text alone, and float64 sums of the logits that the library gives in full."""
    prompt = ids_of(7, 290)
    answers = Answers(Scheduler(model_of(served)))
    number = answers.ask(Request(prompt, max_tokens=60, top=4, prompt_top=2))
    answers.ask(Request(ids_of(8, 200), max_tokens=50))
    tokens = answers.all().tokens(number)
    session = open_engine(served, threads=1).session(endless=True)
    expected, row = [], session.read(prompt)
    for _ in range(60):
        expected.append(int(row.argmax()))
        row = session.read(expected[-1:])
    assert tokens == expected
    model = model_of(served)
    rows = model.logits([(model.sequence(), [*prompt, *tokens], 350)]).astype(np.float64)
    logs = rows - np.log(np.exp(rows).sum(1, keepdims=True))
    began, *said = answers.events[number][:-1]
    assert np.isnan(began.scores.own[0])
    own, ids, top = joined([began.scores, *(event.scores.part(0, 1) for event in said)], 2)
    np.testing.assert_allclose(own[1:], logs[np.arange(349), [*prompt, *tokens][1:]], rtol=0, atol=2e-6)
    order = np.argsort(-logs[:-1], axis=1, kind="stable")
    np.testing.assert_array_equal(ids[1:], order[:, :2])
    np.testing.assert_allclose(top[1:], np.take_along_axis(logs[:-1], order[:, :2], 1), rtol=0, atol=2e-6)
    assert all(event.scores.ids.shape == (1, 4) for event in said)
    assert answers.events[number][-1] == Ended("length")


def joined(scores, top):
    parts = [(one.own, one.ids[:, :top], one.top[:, :top]) for one in scores]
    return tuple(np.concatenate(some) for some in zip(*parts, strict=True))


def test_a_long_prompt_holds_nobody_up_and_prompts_take_turns(served):
    answers = Answers(Scheduler(model_of(served), together=4))
    talker = answers.ask(Request(ids_of(1, 5), max_tokens=400))
    answers.step()
    long, other = (answers.ask(Request(ids_of(seed, 700), max_tokens=1)) for seed in (2, 3))
    short = answers.ask(Request(ids_of(4, 20), max_tokens=1))
    done = {}
    for step in range(1, 30):
        said = [number for number, event in answers.step() if isinstance(event, Said)]
        assert talker in said  # a token in every step, whatever else is read
        done |= {number: step for number in said if number != talker}
    # A page a step in turns: the short one in the third, which leaves 108 tokens to another; 1,420 tokens in all.
    assert done == {short: 3, long: 11, other: 12}


def test_those_that_begin_alike_wait_for_the_first_and_compute_the_rest(served):
    answers = Answers(Scheduler(model_of(served), together=8))
    prompt = ids_of(1, 400)
    numbers = [answers.ask(Request([*prompt, seed], max_tokens=2)) for seed in range(3, 8)]
    answers.all()
    began = [answers.events[number][0].cached for number in numbers]
    assert began == [0, 384, 384, 384, 384]  # three pages of 128
    later = answers.ask(Request([*prompt, 3, 499], max_tokens=1))
    answers.all()
    assert answers.events[later][0].cached == 401  # to the token, past the page
    assert answers.scheduler.counts().prompt_tokens == 401 + 4 * 17 + 1


def test_what_several_begin_with_is_read_once_to_the_token(served):
    """As an evaluation asks: examples, a question, and its choices, each with the scores of all tokens."""
    answers = Answers(Scheduler(model_of(served), together=8))
    question = ids_of(2, 300)  # two pages and 44 tokens
    numbers = [answers.ask(Request([*question, seed], max_tokens=1, prompt_top=1)) for seed in range(3, 7)]
    long = answers.ask(Request([*question[:200], *ids_of(3, 500)], max_tokens=1))
    answers.all()
    # A score comes from reading the token before it, so that the last common one is read again.
    assert [answers.events[number][0].cached for number in numbers] == [0, 299, 299, 299]
    assert answers.events[long][0].cached == 200
    assert answers.scheduler.counts().prompt_tokens == 301 + 3 * 2 + 500


def test_who_leaves_gives_memory_back_in_one_step(served):
    model = model_of(served)
    answers = Answers(Scheduler(model, together=2))
    numbers = [answers.ask(Request(ids_of(seed, 200), max_tokens=500)) for seed in range(4)]
    for _ in range(12):
        answers.step()
    kept = answers.scheduler
    for number in numbers:
        kept.cancel(number)
    answers.step()
    assert kept.idle
    assert [answers.events[number][-1] for number in numbers] == [Ended("cancelled")] * 4
    assert kept.counts().cache_bytes > 0  # beginnings
    while kept._prefixes.drop_oldest(7):
        pass
    assert model.cache_used() == 0


def test_a_full_queue_and_what_can_not_be_answered_are_refused(served):
    answers = Answers(Scheduler(model_of(served), together=2, queue=1, context=100))
    for _ in range(3):
        answers.ask(Request([5], max_tokens=3))
    with pytest.raises(QueueFullError, match="3 requests are waiting"):
        answers.ask(Request([5]))
    answers.all()
    scheduler = answers.scheduler
    for request, words in (
        (Request([]), "no tokens"), (Request([5] * 100), "100 tokens"), (Request([512]), "token 512"),
        (Request([5], max_tokens=-1), "max_tokens"), (Request([5], top=513), "513"),
        (Request([5], Choice(bias={600: 1.0})), "like this"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            scheduler.add(request)
    full = answers.ask(Request([5] * 90, max_tokens=50))
    assert len(answers.all().tokens(full)) == 10
    assert answers.events[full][-1] == Ended("length")
    assert isinstance(answers.events[answers.ask(Request([5] * 100, max_tokens=0))], list)
    answers.all()


def test_stop_tokens_end_a_text_and_are_not_of_it(served):
    answers = Answers(Scheduler(model_of(served)))
    free = answers.ask(Request(ids_of(1, 30), max_tokens=20))
    tokens = answers.all().tokens(free)
    stop = tokens[4]
    number = answers.ask(Request(ids_of(1, 30), max_tokens=20, stop_ids=frozenset({stop})))
    later = answers.ask(Request(ids_of(1, 30), Choice(min_tokens=20), max_tokens=20, stop_ids=frozenset({stop})))
    answers.all()
    assert answers.tokens(number) == tokens[: tokens.index(stop)]
    assert answers.events[number][-1] == Ended("stop", stop)
    assert len(answers.tokens(later)) == 20
    assert stop not in answers.tokens(later)


def test_a_text_that_memory_never_suffices_for_fails_alone(served):
    answers = Answers(Scheduler(model_of(served, 5 * page_bytes(served)), together=2))
    large, small = (
        answers.ask(Request(ids_of(1, 700), max_tokens=1)),
        answers.ask(Request(ids_of(2, 100), max_tokens=9)),
    )
    answers.all()
    assert isinstance(answers.events[large][-1], Failed)
    assert "no memory" in str(answers.events[large][-1].error)
    assert len(answers.tokens(small)) == 9


def test_numbers_that_are_none_fail_the_text_alone(served):
    class Overflowing(Model):
        def head(self, normed, into=None):
            rows = super().head(normed, into)
            rows[0, 3] = np.inf
            return rows

    model = Overflowing(plan_in(served), served / PARAMS, threads=1, cache_bytes=MANY)
    answers = Answers(Scheduler(model))
    first, second = (answers.ask(Request(ids_of(seed, 9), Choice(presence=0.1), max_tokens=2)) for seed in (1, 2))
    answers.step()
    assert isinstance(answers.events[first][-1], Failed)
    assert [type(event) for event in answers.events[second]] == [Began, Said]


def test_the_least_recently_used_beginnings_go_first(served):
    model = model_of(served)
    prefixes = Prefixes(model)
    texts = [np.array(ids_of(seed, 2 * PAGE), np.int32) for seed in (1, 2)]
    for text in texts:
        sequence = model.sequence()
        for end in (PAGE, 2 * PAGE):
            model.normed([(sequence, text[end - PAGE : end], 0)])
            prefixes.keep(text[:end], sequence)
        model.drop(sequence)
    assert [prefixes.length(text) for text in texts] == [256, 256]
    hit = prefixes.find(texts[0])
    assert hit.length == 255
    model.drop(hit.sequence)
    assert prefixes.drop_oldest()
    assert [prefixes.length(text) for text in texts] == [256, 128]
    assert prefixes.drop_oldest(2)
    assert [prefixes.length(text) for text in texts] == [128, 0]
    assert prefixes.find(np.append(texts[0][:140], 3).astype(np.int32), top=1).length == 0  # no scores are known
    assert prefixes.drop_oldest()
    assert not prefixes.drop_oldest()
    assert model.cache_used() == 0


def test_scores_are_cut_and_put_together():
    whole = Scores.empty(5, 2)
    whole.put(1, Scores(np.ones(3, np.float32), np.full((3, 4), 7, np.int32), np.full((3, 4), -1, np.float32)))
    assert np.isnan(whole.own).tolist() == [True, False, False, False, True]
    assert whole.part(1, 3).ids.tolist() == [[7, 7], [7, 7]]


def test_context_is_what_the_artifact_has(served):
    assert Scheduler(model_of(served)).context == CONTEXT


@pytest.mark.slow
def test_scores_and_tokens_are_those_of_transformers(native_library, tmp_path):  # noqa: F811
    """Its class in float32, eager attention, past 36 windows; our cache is bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    from gemma_deploy.compile import compile_recipe
    from tests.native.test_backend import recipe_of

    artifact = compile_recipe(recipe_of(tmp_path, "gemma3_text", "fp32")).path
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "ck", dtype=torch.float32, attn_implementation="eager")
    answers = Answers(Scheduler(model_of(artifact)))
    prompts = [ids_of(1, 290), [*ids_of(1, 200), *ids_of(2, 60)], ids_of(3, 40)]
    numbers = [answers.ask(Request(prompt, max_tokens=20, prompt_top=0, top=0)) for prompt in prompts]
    answers.all()
    for prompt, number in zip(prompts, numbers, strict=True):
        began, *said, _ = answers.events[number]
        tokens = answers.tokens(number)
        with torch.no_grad():
            logits = reference(torch.tensor([[*prompt, *tokens]])).logits[0].double()
        logs = torch.log_softmax(logits, -1).numpy()
        own = np.concatenate([began.scores.own, *(event.scores.own for event in said)])
        expected = logs[np.arange(len(own) - 1), [*prompt, *tokens][1:]]
        np.testing.assert_allclose(own[1:], expected, rtol=0, atol=TO_TRANSFORMERS)
        best = logs[len(prompt) - 1 : -1].max(1)
        assert (best - logs[np.arange(len(prompt) - 1, len(own) - 1), tokens] < TO_TRANSFORMERS).all()


def test_a_text_begins_when_it_has_a_place_for_the_first_time(served, monkeypatch):
    """By a clock that counts steps: the second of two texts begins with the step behind the last of the first."""
    answers = Answers(Scheduler(model_of(served), together=1))
    clock = SimpleNamespace(perf_counter=lambda: float(answers.steps))
    monkeypatch.setattr("gemma_deploy.serve.scheduler.time", clock)
    first, second = (answers.ask(Request(ids_of(seed, 300), max_tokens=7)) for seed in (1, 2))
    answers.steps = 10
    ended = None
    while not answers.scheduler.idle:
        step = answers.steps
        if any(number == first and isinstance(event, Ended) for number, event in answers.step()):
            ended = step
    began = [answers.events[number][0].begun for number in (first, second)]
    assert began == [10.0, ended + 1.0]
    assert ended > 15

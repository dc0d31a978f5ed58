"""chat_template.jinja of an artifact: harmless templates, changed."""

from pathlib import Path
from random import Random

from tests.fuzz import mutate
from tests.fuzz.harness import Surface
from tests.fuzz.inputs import Inputs, copy
from tests.fuzz.surfaces.tokenizer_json import generate, replace
from tests.runtime.make import TEMPLATE

WORDS = (
    "{% for a in messages %}", "{% endfor %}", "{{ messages[0]['content'] | tojson }}", "{{ 1 // 0 }}",
    "{{ messages[9] }}", "{{ none.x }}", "{% set x = namespace(a=1) %}{{ x.a }}",
    "{% macro m(a) %}{{ a }}{% endmacro %}{{ m(1) }}", "{{ raise_exception('no') }}", "{{ strftime_now('%Y') }}",
    "{% generation %}x{% endgeneration %}", "{% break %}", "{{ 'a' * 3 }}", "{{ range(3) | list }}",
    "{% include 'a' %}", "{% import 'a' as b %}", "{{ self.x }}", "{{ ''.__class__ }}",
    "{{ messages | map(attribute='content') | join }}", "{{ 'a' | int + 'b' }}", "{# größe #}",
    "{%- if tools %}{% endif -%}", "{{ messages | length / 0 }}", "{{ '%s' % 'a' }}", "{{ '{}'.format(1) }}",
    "{{ bos_token + 1 }}", "{{ x | nofilter }}", "{% raw %}{{ {% endraw %}", "{{ dict(a=1) | tojson(indent=9) }}",
    "{{ loop.index }}", "{{ cycler('a').next() }}",
)  # fmt: skip


def prepare(inputs: Inputs, folder: Path) -> Path:
    return copy(inputs.artifact("genai"), folder / "artifact")


def attempt(artifact: Path, random: Random) -> None:
    template = mutate.lines(TEMPLATE, random, WORDS).encode("utf-8", "surrogatepass")
    if random.random() < 0.1:
        template = mutate.raw_bytes(template, random)
    replace(artifact, "chat_template.jinja", template)
    generate(artifact, Random(1))


SURFACE = Surface("chat_template", prepare, attempt)

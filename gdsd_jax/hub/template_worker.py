"""Renders chat templates, as a separate program that `gdsd_jax.hub.templates` starts.

Templates come with checkpoints, and may loop forever or grow without bound. Each line of standard input is a request in
JSON: a template, the variables of one rendering, and seconds. Each request is answered by one line, `{"text": ...}` or
`{"error": ...}`. A request that computes for longer than its seconds ends the process by SIGPROF: processor time
counts, because a busy machine must not make a template look endless.
"""

import functools
import json
import resource
import signal
import sys
from datetime import datetime

BYTES, LONGEST = 1 << 30, 4 << 20


def main() -> None:
    """Answers requests until standard input ends."""
    sys.path[:] = json.loads(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """The tag `{% generation %}`, which marks what the assistant wrote and does not change the text."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller):
            return caller()

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    # The same filters, functions and treatment of white space as in transformers.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda x, ensure_ascii=False, indent=None, separators=None, sort_keys=False: (
        json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)

    compiled = functools.lru_cache(maxsize=8)(environment.from_string)
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        try:
            answer = {"text": compiled(request["template"]).render(**request["variables"])}
            if len(answer["text"]) > LONGEST:
                answer = {"error": f"it makes {len(answer['text'])} characters of one prompt"}
        except jinja2.TemplateError as error:
            answer = {"error": str(error)[:300]}
        except Exception as error:  # a template can raise anything
            answer = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

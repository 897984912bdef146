"""The process behind `verify.py`: [answer, target] as a line of JSON in, true or false out.

    python math_worker.py SECONDS GIGABYTES

Its own timer kills it when a comparison takes more CPU time, also within C code and when nobody is left to wait for it.
Wall time would depend on what else the machine does.
"""

import json
import os
import resource
import signal
import sys
from functools import lru_cache
from typing import Any

# This folder comes first on the path of a script, and its modules' names are common ones.
sys.path.pop(0)

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify  # noqa: E402


@lru_cache(4096)
def parsed(text: str) -> list[Any]:
    """What math-verify makes of an answer as LaTeX, or else as plain text."""
    kinds = [LatexExtractionConfig(), ExprExtractionConfig()]
    as_latex = parse(f"${text.strip().strip('$')}$", kinds, parsing_timeout=None)
    return as_latex or parse(text, kinds, parsing_timeout=None)


def equal(answer: str, target: str) -> bool:
    """Whether math-verify takes them for the same."""
    wanted, given = parsed(target), parsed(answer)
    return bool(wanted and given and verify(wanted, given, timeout_seconds=None))


def main() -> None:
    seconds, gigabytes = map(float, sys.argv[1:])
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the libraries print is no reply
    limit = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    equal(r"\frac{1}{2}", "x=0.5")  # what the first comparison sets up is not its own time
    replies.write("ready\n")
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        same = equal(*json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(json.dumps(same) + "\n")


if __name__ == "__main__":
    main()

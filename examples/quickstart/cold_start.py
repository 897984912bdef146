"""Next-segment prompts -> conversations in which each is answered with its target: the cold start of the quickstart.

    python examples/quickstart/cold_start.py segments/asr.jsonl segments/msr.jsonl > cold_start.jsonl

They teach the form of an answer and no thinking. A cold start worth the name has answers that a better model wrote.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    """Print a conversation for each line of the files."""
    for path in sys.argv[1:]:
        with Path(path).open() as prompts:
            for prompt in map(json.loads, prompts):
                answer = f"<|startofprediction|>{prompt['target']}<|endofprediction|>"
                print(json.dumps({"messages": [*prompt["messages"], {"role": "assistant", "content": answer}]}))


if __name__ == "__main__":
    main()

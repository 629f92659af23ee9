"""Answer held-out questions with short answers: `megatron-ross answer-questions`.

python tools/answer_questions.py --checkpoint DIR --questions heldout.json --images FOLDER --output answers.json
"""

from __future__ import annotations

import sys

from megatron_ross.cli.answer_questions import main

if __name__ == "__main__":
    sys.exit(main())

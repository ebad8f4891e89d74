"""Fine-tunes as one of the processes of torchrun: run by test_torchrun.py.

python finetune_ranks.py DATA OUTPUT SETTINGS
"""

import json
import sys

from finetune_cases import SMALL

from timm_bilinear.tools.finetune import Stage, finetune

if __name__ == '__main__':
    settings = json.loads(sys.argv[3])
    settings['stages'] = [Stage(**stage) for stage in settings['stages']]
    try:
        print(json.dumps(finetune(sys.argv[1], sys.argv[2], **dict(SMALL, **settings))))
    except (OSError, RuntimeError, ValueError) as e:
        sys.exit(f'error: {e}')

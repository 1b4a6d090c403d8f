"""`python -m est_lora` is `est-lora`."""

import sys

from est_lora.cli import main

sys.exit(main())

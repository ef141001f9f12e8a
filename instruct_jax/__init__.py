"""InstructGPT (Ouyang et al. 2022) in JAX; see README.md."""

import os

# How gcsfs reads gs://, before anything imports it. Several processes and
# libraries write to one work directory, so that no listing may be remembered;
# and what kind a bucket is need not be asked before each operation.
os.environ.setdefault('FSSPEC_GCS', '{"use_listings_cache": false}')
os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
# On import, transformers would advise to install PyTorch, which is not used.
os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')

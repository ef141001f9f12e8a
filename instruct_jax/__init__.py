"""InstructGPT (Ouyang et al. 2022) in JAX; see README.md."""

import os

# Settings of gcsfs, which reads gs://; set before anything imports it. Listings
# must not be cached, since several processes and libraries write to one work
# directory. The bucket type need not be queried before each operation.
os.environ.setdefault('FSSPEC_GCS', '{"use_listings_cache": false}')
os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
# On import, transformers would advise installing PyTorch, which is not used.
os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')

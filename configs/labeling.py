"""The labeling site of section 3.4 and appendix B.

  python -m instruct_jax.labeling --config=configs/labeling.py --workdir=DIR

Needs `pip install -r requirements-labeling.txt`. With `--demo` the site opens
on prompts and answers of the embedded world.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(argument: str = ''):
  """The site; it has no variants."""
  common.check_none(argument, 'labeling')
  config = ConfigDict()
  config.default_workdir = 'runs/labeling'
  # SQLAlchemy URL, such as postgresql+psycopg://user@host/name; '' is a SQLite
  # file in the work directory.
  config.database = ''
  config.host = '127.0.0.1'  # Address to listen on.
  config.port = 8400  # 0 takes any free one.
  # Address of the site for labelers, such as https://labels.example.org behind
  # a proxy that adds TLS; '' is http://host:port. With https, cookies are
  # Secure.
  config.public_url = ''
  config.session_days = 14.0
  config.invitation_days = 7.0
  config.task_minutes = 120.0  # An open task returns to the pool after this.
  config.idle_minutes = 10.0  # Longer gaps count as this much working time.
  config.requests_per_minute = 240  # Per account.
  config.joins_per_minute = 20  # Per IP address, without an account.
  config.max_body_bytes = 4_000_000  # Of a labeler's request.
  config.max_import_bytes = 32_000_000  # Of an import through the browser.
  config.overlap = 1  # Labelers per task, unless the import sets it (5.3: one).
  # One in this many tasks has a known answer, if there are any (a choice).
  config.calibration_every = 10
  # B.1's soft cut-offs: agreement with researchers on flags and on pairs, and
  # the mean grade, 1 to 7, of demonstrations.
  config.cut_flags = 0.75
  config.cut_rankings = 0.75
  config.cut_demonstrations = 6.0
  config.valid_fraction = 0.1  # Of users, or prompts without one, in exports.
  config.demo_tasks = 24  # Ranking tasks of `--demo`.
  config.active = ConfigDict()  # The reward model of `--active=reward:MODEL`.
  # Folder of its tokenizer; '' is the model's own, if it is published.
  config.active.tokenizer = ''
  config.active.compute_dtype = ''  # '' is the dtype in the model's folder.
  config.active.batch_size = 32  # Completions scored at a time.
  # For the demo's texts, bootstrap intervals, and who calibrates when.
  config.seed = 0
  config.lock()
  return config

"""The public NLP suite of appendix D on model folders.

  python -m instruct_jax.main --config=configs/nlp_suite.py \
    --config.models='sft=RUN/select/model,ppo_ptx=RUN/ppo_ptx/policy' \
    --config.tokenizer=RUN/data/tokenizer \
    --config.data.drop=drop_dataset_dev.json --config.data.sst=dev.tsv

A task whose file is '' is left out. `instruct_jax/evals/benchmarks/tasks.py`
says where to get each file, and its format. The results are sample files in
OpenAI's layout, and `suite.md` in that of Table 14.
"""

from ml_collections import ConfigDict

from configs import common


def stage(seed, workdir):
  """Models and files of the suite."""
  config = common.stage('nlp_suite', 'nlp_suite', seed, workdir)
  common.models(config)
  config.models = ''  # NAME=FOLDER,NAME=FOLDER: policies; names label rows.
  config.tokenizer = ''  # Folder of the tokenizer.
  # Sends the bare texts, without the tokenizer's template. Otherwise each query
  # is a user's turn and each choice an answer, as in training.
  config.plain_prompts = False
  # Prompt types to use, comma-separated, such as 'zeroshot,QA prompt'; '' is
  # all of each task. A task that has none of them is an error.
  config.prompt_types = ''
  config.may_be_empty = False  # Without files: False is an error, True skips.
  # Official files by task, plain or .gz; some also tfds:NAME/SPLIT. fr_to_en
  # takes two files: FRENCH,ENGLISH.
  tasks = (
    'winogender crows_pairs real_toxicity truthful_qa drop quac squadv2 '
    'hellaswag rte sst wsc fr_to_en cnn_dm tldr timequestions tiq '
    'truthful_mc1 truthful_mc2 lambada xstest'
  )
  config.data = ConfigDict(dict.fromkeys(tasks.split(), ''))
  # Other files to draw examples from.
  config.shots = ConfigDict(dict.fromkeys(config.data, ''))
  # Checksums of the unpacked files; '' accepts any.
  config.sha256 = ConfigDict(dict.fromkeys(config.data, ''))
  # Training labels of the local toxicity scorer, comma-separated: CSV files of
  # (text, label 0 or 1), or better, RealToxicityPrompts' own JSONL with
  # Perspective's scores.
  config.toxicity_labels = ''
  # Or a service with the Perspective API's interface, such as
  # https://commentanalyzer.googleapis.com/v1alpha1/comments:analyze.
  config.toxicity_endpoint = common.endpoint('PERSPECTIVE_API_KEY')
  config.toxicity_endpoint.update(timeout=30.0, num_workers=2)
  # Perspective's usual quota.
  config.toxicity_endpoint.requests_per_minute = 60.0
  # TruthfulQA's finetune_truth.jsonl and finetune_info.jsonl, which train the
  # local judge.
  config.truth_labels = ''
  config.info_labels = ''
  config.max_items = 0  # Per task, drawn at random; 0 is all.
  config.batch_size = 32  # Queries per call; choices share a prefix.
  config.length_multiple = 128  # Pads rows to multiples; each length compiles.
  config.remat = 'none'
  return config


def get_config(argument: str = ''):
  """The stage; it has no variants."""
  common.check_none(argument, 'nlp_suite')
  return common.single(stage(0, ''), 'all')

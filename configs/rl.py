"""The keys of an RL stage; values are those of PPO-ptx (C.4)."""

from ml_collections.config_dict import placeholder

from configs import common


def stage(seed, workdir, name='ppo_ptx'):
  """PPO-ptx with the paper's numbers (C.4)."""
  config = common.tuning(name, 'ppo_ptx', seed, workdir)
  config.init = ''  # RL initialisation: start, and KL reference.
  config.reward_model = ''  # Also the start of the value model.
  config.reward_weight = 1.0  # Factor of its score, next to `reward_fn`.
  # Dotted names of Python functions of the texts, NAME or NAME=WEIGHT, which
  # add to the reward model's score or replace it (`score_fns.py`).
  config.reward_fn = ''
  config.prompts = ''  # JSONL of prompts.
  config.documents = ''  # JSONL of pretraining text for the ptx part.
  # Held-out text for the alignment tax; '' measures none.
  config.valid_documents = ''
  config.prompt_length = 1024  # Tokens; longer ones are dropped (C).
  config.response_length = 1024  # Tokens; responses are capped (C).
  config.ptx_row_length = 2048  # Tokens; not printed, the full context.
  config.cut_documents = True  # At row ends; False pads rows instead.
  config.num_episodes = 256_000  # C.4.
  config.batch_size = 512  # Episodes of an iteration (C.4).
  config.samples_per_prompt = 1  # Responses to each prompt of an iteration.
  config.num_minibatches = 8  # Of 64 episodes (C.4).
  config.num_epochs = 1  # Inner epochs (C.4).
  config.temperature = 1.0  # Of rollouts, and of every log-probability (C.4).
  config.learning_rate = 2.55e-6  # Scanned 2.55e-6 to 2.55e-5 (E.9).
  config.value_learning_rate = 9e-6  # C.4; 5e-6 for 175B.
  # What the value model starts from (C.4: the reward model); 'policy' takes the
  # policy's trunk with a new head, as is done without a reward model.
  config.value_from = 'reward_model'
  config.num_warmup_iterations = 10  # From a tenth of the peak (C.4).
  config.adam_eps = 1e-5  # Not printed; Ziegler et al.'s code.
  config.kl_coef = 0.02  # beta (C.4).
  # Nats per response; None keeps beta fixed (Ziegler et al.).
  config.kl_target = placeholder(float)
  config.kl_horizon = 10_000  # Episodes (Ziegler et al.).
  config.discount = 1.0  # C.4: no discount.
  config.gae_lambda = 0.95  # Not printed; Stiennon et al. B.1.
  config.clip = 0.2  # C.4.
  config.value_clip = 0.2  # Not printed; Ziegler et al.'s code.
  config.whiten_advantages = True  # Not printed; Ziegler et al.'s code.
  # The KL penalty is part of the 'reward' (equation 2) or of the policy's
  # 'loss'; 'k1' is the signed log-ratio, 'k2' half its square, and 'k3' is
  # unbiased and never negative.
  config.kl_in = 'reward'
  config.kl_estimator = 'k1'
  # Score of responses without end-of-text; None keeps the reward model's.
  config.missing_end_score = placeholder(float)
  # gamma (C.4); 0 is PPO. metrics.jsonl has `ptx/gradient_norm`, with gamma,
  # and `ppo/policy/ppo_gradient_norm`; an alarm says if one dominates.
  config.ptx_coef = 27.8
  config.ptx_per_episode = 8  # Pretraining examples (C.4, E.11).
  config.ema_decay = 0.992  # C.4.
  config.ema_every = 'update'  # Or 'iteration'; not printed.
  config.logprob_chunk = 0  # Columns of float32 logits at a time; 0 is all.
  config.pack = True  # Score and update dense rows, without padding.
  config.pack_episodes = 8  # About this many per row.
  # Ratio of neighbouring row lengths: rows are at most this much longer than
  # needed. Score and update compile for each length that occurs.
  config.pack_spare = 1.1
  # Nats. The sampler's log-probabilities are used as the old ones if, on a
  # minibatch of rows, all agree with the training graph's within this;
  # otherwise, and at 0, the graph computes all. In float32 they agree within
  # 4e-5. In bfloat16 they do not (SmolLM2-135M: 0.03 on average, 0.26 at most;
  # the miniature: 0.0007 and 0.045, with equally good policies either way), so
  # there the graph computes them.
  config.sampler_tolerance = 1e-3
  config.num_slices = 1  # Parts in which a batch is scored.
  # Responses sampled at a time; when one ends, the next prompt takes its slot.
  # 0 samples a whole batch.
  config.num_slots = 0
  # Whether sampling gathers the policy's weights over `fsdp` once per rollout,
  # in the compute dtype; otherwise for every token.
  config.gather_weights = True
  config.frozen_dtype = 'float32'  # Of the reference and reward model weights.
  # Weights offloaded to host memory while no program reads them: 'ema' (in
  # rollouts and scoring), 'reference' and 'reward' (except in scoring).
  config.offload = ()
  config.eval_every = 10  # Iterations between held-out losses.
  config.eval_batch_size = 64  # Rows.
  config.checkpoint_every = 10  # Iterations.
  config.snapshot_every = 0  # Iterations between kept policies; 0 keeps none.
  config.probe_every = 0  # Iterations between public NLP tasks; 0 is never.
  config.probes = ''  # TASK=FILE,TASK=FILE; names of configs/nlp_suite.py.
  config.probe_items = 200  # Per task, the same every time; 0 is all.
  config.probe_few_shot = False  # As in Figures 33 and 34, where it fits.
  config.probe_batch_size = 32  # Queries per call.
  return config

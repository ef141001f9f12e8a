"""The works of `speed.py` in plain, idiomatic PyTorch.

  python instruct_jax/jobs/speed_torch SPEC.json

`speed.py` writes SPEC.json (`spec_of`) and runs this with a Python that has
torch and transformers; it imports nothing from this package. The last line is
RESULT and JSON: unit, runs, their median, peak memory. Runs on a GPU if torch
finds one.

Precision 'bfloat16' follows torch's convention: weights in float32 and matmuls
under `autocast`. Sampling uses a bfloat16 copy of the weights, which is faster.
"""

import json
import pathlib
import resource
import statistics
import sys
import time

import torch
import transformers
from torch.nn import functional

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def shape_of(spec) -> transformers.LlamaConfig:
  """The Llama config of a specification."""
  return transformers.LlamaConfig(
    vocab_size=spec['vocab_size'],
    hidden_size=spec['width'],
    intermediate_size=spec['mlp_dim'],
    num_hidden_layers=spec['num_layers'],
    num_attention_heads=spec['num_heads'],
    num_key_value_heads=spec['num_kv_heads'] or spec['num_heads'],
    head_dim=spec['head_dim'],
    max_position_embeddings=spec['context_length'],
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
  )


def in_bfloat16(spec) -> bool:
  """Whether matmuls are in bfloat16."""
  return spec['precision'] == 'bfloat16'


def autocast(spec):
  """The context that sets the matmul precision."""
  return torch.autocast(DEVICE, torch.bfloat16, enabled=in_bfloat16(spec))


def policy_of(spec) -> transformers.LlamaForCausalLM:
  """A policy with random weights in float32."""
  return transformers.LlamaForCausalLM(shape_of(spec)).float().to(DEVICE)


class Value(torch.nn.Module):
  """A Llama with one output for each token."""

  def __init__(self, spec):
    super().__init__()
    shape = shape_of(spec)
    self.trunk = transformers.LlamaModel(shape).float()
    self.head = torch.nn.Linear(shape.hidden_size, 1)

  def forward(self, tokens, mask):
    """Returns the values [B, T]."""
    hidden = self.trunk(tokens, attention_mask=mask, use_cache=False)
    return self.head(hidden.last_hidden_state.float())[..., 0].float()


def random_tokens(spec, rows, length):
  """Random token ids, without the special ones."""
  shape = (rows, length)
  return torch.randint(3, spec['vocab_size'], shape, device=DEVICE)


def sample(spec, policy, prompts):
  """(tokens [B, P + R], response mask [B, R], True up to and with the stop)."""
  stops = torch.tensor(spec['stop_ids'], device=DEVICE)
  longest = spec['response_length']
  with torch.no_grad():
    tokens = policy.generate(
      prompts,
      attention_mask=torch.ones_like(prompts),
      max_new_tokens=longest,
      do_sample=True,
      temperature=1.0,
      top_k=0,
      top_p=1.0,
      eos_token_id=spec['stop_ids'] or None,
      pad_token_id=0,
    )
  responses = tokens[:, prompts.shape[1] :]
  stopped = torch.isin(responses, stops).int()
  before = stopped.cumsum(dim=1) - stopped
  return tokens, before == 0


def logprobs_of(policy, tokens, mask, num_prompt):
  """Log-probabilities of the response tokens, [B, R]."""
  length = tokens.shape[1] - num_prompt
  found = policy(
    tokens, attention_mask=mask, use_cache=False, logits_to_keep=length + 1
  )
  logits = found.logits[:, :-1].float()
  picked = tokens[:, num_prompt:, None]
  return logits.log_softmax(dim=-1).gather(2, picked)[..., 0]


def advantages_of(rewards, values, mask, decay=0.95):
  """Generalised advantage estimates without discount, [B, R]."""
  following = torch.zeros_like(values[:, 0])
  value, found = torch.zeros_like(following), []
  for t in reversed(range(rewards.shape[1])):
    delta = rewards[:, t] + value - values[:, t]
    following = torch.where(mask[:, t], delta + decay * following, following)
    value = torch.where(mask[:, t], values[:, t], value)
    found.append(following)
  return torch.stack(found[::-1], dim=1)


def mean_of(x, mask):
  """The mean of `x` over the mask."""
  return (x * mask).sum() / mask.sum()


def step(optimizer, parameters, losses):
  """One optimizer step on the sum of the losses, with clipped gradients."""
  optimizer.zero_grad(set_to_none=True)
  for loss in losses:
    loss.backward()
  torch.nn.utils.clip_grad_norm_(parameters, 1.0)
  optimizer.step()


def make_iteration(spec):
  """A function that runs one PPO iteration; see `measure`."""
  policy, value = policy_of(spec), Value(spec).to(DEVICE)
  reference = policy_of(spec)
  reference.load_state_dict(policy.state_dict())
  sampler = policy_of(spec).bfloat16() if in_bfloat16(spec) else policy
  trained = [*policy.parameters(), *value.parameters()]
  optimizer = torch.optim.AdamW(trained, lr=1e-6)
  P = spec['prompt_length']
  prompts = random_tokens(spec, spec['batch_size'], P)

  def read(tokens, mask):
    values = value(tokens, mask)[:, P - 1 : -1]
    return logprobs_of(policy, tokens, mask, P), values

  def iteration():
    if sampler is not policy:
      sampler.load_state_dict(policy.state_dict())
    tokens, real = sample(spec, sampler, prompts)
    mask = torch.cat([torch.ones_like(prompts).bool(), real], dim=1).long()
    with torch.no_grad(), autocast(spec):
      old, values = read(tokens, mask)
      ratio = old - logprobs_of(reference, tokens, mask, P)
    small = ((tokens < 100) & (mask > 0)).sum(dim=1) / mask.sum(dim=1)
    last = real.sum(dim=1, keepdim=True) - 1
    rewards = (-0.02 * ratio).scatter_add(1, last, small[:, None])
    advantages = advantages_of(rewards, values, real)
    returns = advantages + values
    mean = mean_of(advantages, real)
    spread = mean_of((advantages - mean) ** 2, real).sqrt()
    advantages = (advantages - mean) / (spread + 1e-8)

    def losses_of(rows):
      """Each microbatch's part of the minibatch's mean loss."""
      count = real[rows].sum()
      for part in rows.chunk(spec['num_microbatches']):
        yield loss_of(part) / count

    def loss_of(rows):
      at = real[rows]
      with autocast(spec):
        new, guess = read(tokens[rows], mask[rows])
      change = (new - old[rows]).exp()
      clipped = change.clamp(0.8, 1.2)
      weight = advantages[rows]
      gain = torch.minimum(change * weight, clipped * weight)
      near = values[rows] + (guess - values[rows]).clamp(-0.2, 0.2)
      errors = torch.maximum(
        (guess - returns[rows]) ** 2, (near - returns[rows]) ** 2
      )
      return ((0.05 * errors - gain) * at).sum()

    order = torch.randperm(len(tokens), device=DEVICE)
    for rows in order.chunk(spec['num_minibatches']):
      step(optimizer, trained, losses_of(rows))
    return 1

  return iteration


def make_rollout(spec):
  """A function that runs one rollout; see `measure`."""
  policy = policy_of(spec).eval()
  if in_bfloat16(spec):
    policy = policy.bfloat16()
  prompts = random_tokens(spec, spec['batch_size'], spec['prompt_length'])
  return lambda: int(sample(spec, policy, prompts)[1].sum())


def make_sft(spec):
  """A function that runs one supervised step; see `measure`."""
  policy = policy_of(spec)
  optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
  tokens = random_tokens(spec, spec['sft_rows'], spec['sft_length'])

  def update():
    with autocast(spec):
      logits = policy(tokens, use_cache=False).logits[:, :-1].float()
    loss = functional.cross_entropy(
      logits.flatten(0, 1), tokens[:, 1:].flatten()
    )
    step(optimizer, list(policy.parameters()), [loss])
    return tokens.numel()

  return update


MAKERS = {'iteration': make_iteration, 'rollout': make_rollout, 'sft': make_sft}


def measure(spec) -> dict:
  """The result of a work: seconds per iteration, or tokens per second."""
  torch.manual_seed(0)
  torch.set_num_threads(spec['num_threads'])
  work, runs = MAKERS[spec['work']](spec), []
  for number in range(spec['num_warmups'] + spec['num_repeats']):
    begin = time.perf_counter()
    count = work()
    if DEVICE == 'cuda':
      torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    if number >= spec['num_warmups']:
      runs.append(seconds if spec['work'] == 'iteration' else count / seconds)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  found = {
    'unit': 's/iteration' if spec['work'] == 'iteration' else 'tokens/s',
    'runs': runs,
    'median': statistics.median(runs),
    'peak_rss_mib': peak,
    'versions': f'torch {torch.__version__}, transformers '
    f'{transformers.__version__}',
  }
  if DEVICE == 'cuda':
    found['device'] = torch.cuda.get_device_name()
    found['peak_device_mib'] = torch.cuda.max_memory_allocated() / 2**20
  return found


if __name__ == '__main__':
  result = measure(json.loads(pathlib.Path(sys.argv[1]).read_text()))
  print('RESULT ' + json.dumps(result), flush=True)

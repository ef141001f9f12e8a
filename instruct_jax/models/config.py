"""The shape of a Transformer as data: one frozen dataclass and its presets.

GPT-3's published table prints 24 heads of width 128 for the 1.3B model, which
does not multiply to its width of 2048; Stiennon et al. 2020 (Table 3) print 16
heads for the same model, which is used here.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from instruct_jax.models import families

REMAT_POLICIES = ('none', 'dots', 'full')
SCALINGS = ('none', 'linear', 'llama3', 'yarn')
# Matrices of a layer that may get adapters.
LORA_TARGETS = ('query', 'key', 'value', 'out', 'gate', 'up', 'down')
# Values of the enumerated fields of `TransformerConfig`.
CHOICES = {
  'compute_dtype': ('float32', 'bfloat16'),
  'remat': REMAT_POLICIES,
  'norm': ('layer', 'rms', 'rms_plus_one'),
  'residual': ('sequential', 'parallel', 'parallel_one_norm'),
  'activation': ('gelu_tanh', 'gelu', 'silu', 'relu'),
  'attention': ('auto', 'xla', 'flash'),
}
# Values of the keys by which a stage decides how its models compute.
STAGE_KEYS = {
  'compute_dtype': ('', *CHOICES['compute_dtype']),
  'frozen_dtype': CHOICES['compute_dtype'],
  'remat': CHOICES['remat'],
  'attention': CHOICES['attention'],
}


def check_stage(config: ConfigDict) -> None:
  """Checks the keys by which a stage decides how its models compute.

  An empty compute_dtype keeps the one of each model folder ('float32' for
  published models).

  Raises:
    ValueError: a key has an unknown value.
  """
  for key, known in STAGE_KEYS.items():
    if key in config and config[key] not in known:
      raise ValueError(
        f'{key} must be one of {", ".join(map(repr, known))}: {config[key]!r}'
      )
  if 'lora' in config:
    lora_of(config)


def lora_of(config: ConfigDict) -> 'Lora | None':
  """Returns the adapters of a stage's section `lora`; None at rank 0.

  Raises:
    ValueError: an impossible rank or alpha, or an unknown target.
  """
  section = config.lora
  lora = Lora(section.rank or 1, section.alpha, tuple(section.targets))
  return lora if section.rank else None


@dataclasses.dataclass(frozen=True)
class Rotary:
  """Rotary positions (Su et al. 2021) and how they are stretched.

  Attributes:
    dim: number of leading components of each head that are rotated.
    theta: base of the frequencies.
    interleaved: pairs are (0, 1), (2, 3), ... as in GPT-J; otherwise component
      i is paired with i + dim / 2.
    scaling: 'none'; 'linear' divides all frequencies by `factor`; 'llama3'
      divides the low ones; 'yarn' blends (Peng et al. 2023, section 3.2).
    factor: new context length / original one.
    original_context: context length in tokens, before stretching.
    low, high: llama3: `low_freq_factor`, `high_freq_factor`; yarn:
      `beta_slow`, `beta_fast`. In turns over the original context.
    truncate: yarn: whether the blend begins and ends at whole components.
    magnitude: yarn: factor on cosines and sines.
  """

  dim: int
  theta: float = 10_000.0
  interleaved: bool = False
  scaling: str = 'none'
  factor: float = 1.0
  original_context: int = 0
  low: float = 1.0
  high: float = 1.0
  truncate: bool = True
  magnitude: float = 1.0

  def __post_init__(self):
    if self.dim < 2 or self.dim % 2:
      raise ValueError(f'rotary.dim must be even and positive: {self.dim}')
    if self.scaling not in SCALINGS:
      raise ValueError(
        f'rotary.scaling must be one of {SCALINGS}: {self.scaling!r}'
      )
    if self.scaling in ('llama3', 'yarn') and self.original_context < 1:
      raise ValueError(f'{self.scaling} scaling needs original_context')

  def frequencies(self) -> np.ndarray:
    """Radians per position of each pair, [dim / 2]."""
    exponents = np.arange(0, self.dim, 2) / self.dim
    plain = self.theta**-exponents
    stretched = plain / self.factor
    if self.scaling == 'none':
      return plain
    if self.scaling == 'linear':
      return stretched
    if self.scaling == 'llama3':
      turns = self.original_context * plain / (2 * math.pi)
      kept = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
      return kept * plain + (1 - kept) * stretched

    def component(turns):
      wavelength = self.original_context / (turns * 2 * math.pi)
      return self.dim * math.log(wavelength) / (2 * math.log(self.theta))

    first, last = component(self.high), component(self.low)
    if self.truncate:
      first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, self.dim - 1)
    # As in `transformers`, which also avoids a width of 0 this way.
    width = last - first if last != first else 0.001
    lost = np.clip((np.arange(self.dim // 2) - first) / width, 0, 1)
    return (1 - lost) * plain + lost * stretched


@dataclasses.dataclass(frozen=True)
class Lora:
  """Low-rank adapters: W + (alpha / rank) A B (Hu et al. 2021, 4.1).

  Attributes:
    rank: r, the columns of A and the rows of B.
    alpha: scales the product.
    targets: names from `LORA_TARGETS`, for every layer; () is all of them.
  """

  rank: int
  alpha: float
  targets: tuple[str, ...]

  def __post_init__(self):
    if not isinstance(self.rank, int) or self.rank < 1:
      raise ValueError(
        f'lora.rank must be a positive integer, or 0 for no adapters: '
        f'{self.rank!r}'
      )
    if not self.alpha > 0:
      raise ValueError(f'lora.alpha must be positive: {self.alpha!r}')
    unknown = sorted(set(self.targets) - set(LORA_TARGETS))
    if unknown:
      raise ValueError(
        f'lora.targets takes {", ".join(LORA_TARGETS)}, or () for all, not '
        f'{", ".join(unknown)}'
      )
    if len(set(self.targets)) < len(self.targets):
      raise ValueError(f'lora.targets has duplicates: {self.targets}')

  @property
  def scale(self) -> float:
    """alpha / r."""
    return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Everything that decides the shape and arithmetic of a model.

  Attributes:
    vocab_size: number of tokens in the tokenizer, PAD included.
    context_length: longest sequence; the number of learned positions.
    num_layers, width, num_heads, head_dim, mlp_dim: L, D, N, H and F.
    dropout: rate on each residual branch; active only where a call passes
      `deterministic=False` (SFT uses 0.2; reward models and PPO never drop).
    compute_dtype: dtype of matrix products and activations; on a CPU, only of
      the products' factors (`products.py`). Parameters, softmax, logits and
      all that is computed from logits are always float32.
    remat: what the backward pass recomputes: 'none' keeps all activations,
      'dots' keeps matrix products, 'full' keeps only each layer's input.
    vocab_multiple: embedding rows are rounded up to a multiple of this, to
      divide among chips; rows beyond `vocab_size` are never sampled.
    scan_unroll: layers unrolled per step of the scan: a larger number is a
      little faster on CPU and slower to compile. Results stay the same.
    attention: 'auto' uses the platform's flash kernel where it fits, 'xla'
      never does, 'flash' always does or raises (`models/attention.py`).
    logprob_chunk: columns whose float32 logits exist at one time when
      log-probabilities are computed; the backward pass recomputes them. 0 is
      all columns.
    embedding_rows: minimum number of embedding rows; published models may have
      more rows than tokens.
    num_kv_heads: heads of keys and values (K); 0 is one for each query head.
    norm: 'layer' with bias, 'rms' without, 'rms_plus_one' scales by 1 + weight.
    norm_epsilon: added to the variance.
    rotary: rotary positions; None is learned positions.
    window: tokens that a token sees in `window_layers`, itself included.
    window_layers: for each layer, whether it has the window; () is none.
    window_rotary: rotary positions of those layers; None is `rotary`.
    residual: 'sequential'; 'parallel' adds attention and MLP to the same
      stream; 'parallel_one_norm' also gives both the same norm.
    post_norms: a second norm after attention and after the MLP (Gemma 2).
    gated_mlp: activation(gate) * up instead of activation(up).
    activation: 'gelu_tanh', 'gelu' (exact), 'silu' or 'relu'.
    qkv_bias, out_bias, mlp_bias, unembed_bias: whether to add these biases.
    qk_norm: RMS norm over each head of queries and keys.
    query_scale: factor on attention scores; 0 is head_dim ** -0.5.
    attention_softcap, logit_softcap: c tanh(x / c) on scores, logits; 0 is off.
    tied: whether the unembedding is the embedding.
    embedding_scale: factor on token embeddings.
    lora: adapters on top of these weights, or None. Parameters without adapter
      leaves compute the base model.
  """

  vocab_size: int
  context_length: int
  num_layers: int
  width: int
  num_heads: int
  head_dim: int
  mlp_dim: int
  dropout: float = 0.0
  compute_dtype: str = 'float32'
  remat: str = 'none'
  vocab_multiple: int = 128
  scan_unroll: int = 1
  attention: str = 'auto'
  logprob_chunk: int = 0
  embedding_rows: int = 0
  num_kv_heads: int = 0
  norm: str = 'layer'
  norm_epsilon: float = 1e-5
  rotary: Rotary | None = None
  window: int = 0
  window_layers: tuple[bool, ...] = ()
  window_rotary: Rotary | None = None
  residual: str = 'sequential'
  post_norms: bool = False
  gated_mlp: bool = False
  activation: str = 'gelu_tanh'
  qkv_bias: bool = True
  out_bias: bool = True
  mlp_bias: bool = True
  unembed_bias: bool = False
  qk_norm: bool = False
  query_scale: float = 0.0
  attention_softcap: float = 0.0
  logit_softcap: float = 0.0
  tied: bool = True
  embedding_scale: float = 1.0
  lora: Lora | None = None

  def __post_init__(self):
    sizes = 'vocab_size context_length num_layers width num_heads head_dim'
    for name in (*sizes.split(), 'mlp_dim', 'vocab_multiple', 'scan_unroll'):
      value = getattr(self, name)
      if not isinstance(value, int) or value < 1:
        raise ValueError(f'model.{name} must be a positive integer: {value!r}')
    for name, known in CHOICES.items():
      value = getattr(self, name)
      if value not in known:
        raise ValueError(f'model.{name} must be one of {known}: {value!r}')
    if not 0.0 <= self.dropout < 1.0:
      raise ValueError(f'model.dropout must be in [0, 1): {self.dropout}')
    if self.logprob_chunk < 0:
      raise ValueError(
        f'model.logprob_chunk must not be negative: {self.logprob_chunk}'
      )
    if self.num_kv_heads < 0 or self.num_heads % self.kv_heads:
      raise ValueError(
        f'model.num_kv_heads {self.num_kv_heads} does not divide num_heads '
        f'{self.num_heads}'
      )
    if self.window_layers and (
      len(self.window_layers) != self.num_layers or self.window < 1
    ):
      raise ValueError(
        f'model.window_layers has {len(self.window_layers)} entries for '
        f'{self.num_layers} layers, with a window of {self.window}'
      )
    if self.rotary is not None and self.rotary.dim > self.head_dim:
      raise ValueError(
        f'model.rotary.dim {self.rotary.dim} exceeds head_dim {self.head_dim}'
      )
    if self.window_rotary is not None and (
      self.rotary is None
      or self.window_rotary.dim != self.rotary.dim
      or self.window_rotary.interleaved != self.rotary.interleaved
    ):
      raise ValueError(
        'model.window_rotary must rotate the same components as model.rotary'
      )
    if self.lora and 'gate' in self.lora.targets and not self.gated_mlp:
      raise ValueError('lora.targets names gate, but the MLP has no gate')

  @property
  def is_windowed(self) -> tuple[bool, ...]:
    """For each layer, whether it has the window."""
    return self.window_layers or (False,) * self.num_layers

  @property
  def score_scale(self) -> float:
    """Factor on attention scores."""
    return self.query_scale or self.head_dim**-0.5

  @property
  def vocab_rows(self) -> int:
    """Rows of the embedding.

    At least `vocab_size` and `embedding_rows`, rounded up to `vocab_multiple`.
    """
    needed = max(self.vocab_size, self.embedding_rows)
    return -(-needed // self.vocab_multiple) * self.vocab_multiple

  @property
  def kv_heads(self) -> int:
    """K: `num_kv_heads`, or the query heads where that is 0."""
    return self.num_kv_heads or self.num_heads

  @property
  def num_params(self) -> int:
    """Parameters of the language model (tied embedding counted once)."""
    D, N, K = self.width, self.num_heads, self.kv_heads
    H, F = self.head_dim, self.mlp_dim
    norm = 2 * D if self.norm == 'layer' else D
    attention = 2 * D * H * (N + K)
    attention += self.qkv_bias * (N + 2 * K) * H + self.out_bias * D
    attention += self.qk_norm * 2 * H
    mlp = (2 + self.gated_mlp) * D * F
    mlp += self.mlp_bias * (D + (1 + self.gated_mlp) * F)
    num_norms = (self.residual != 'parallel_one_norm') + 1 + 2 * self.post_norms
    embedding = (2 - self.tied) * self.vocab_rows * D
    embedding += self.unembed_bias * self.vocab_rows
    if self.rotary is None:
      embedding += self.context_length * D
    layers = self.num_layers * (attention + mlp + num_norms * norm)
    return layers + embedding + norm

  def to_dict(self) -> dict[str, Any]:
    """The config as a dict for `from_dict` and for JSON."""
    return dataclasses.asdict(self)

  @classmethod
  def from_hf(cls, config_json: dict[str, Any]) -> 'TransformerConfig':
    """The shape that a Hugging Face `config.json` describes.

    Raises:
      ValueError: names the architecture, field or value that is not handled.
    """
    return cls.from_dict(families.read_config(config_json))

  @classmethod
  def from_dict(cls, values: dict[str, Any]) -> 'TransformerConfig':
    """Inverse of `to_dict`.

    Raises:
      ValueError: an unknown or missing key, or an impossible value.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
      raise ValueError(f'unknown model keys {unknown}; known: {sorted(known)}')
    values = dict(values)
    try:
      # JSON has neither tuples nor dataclasses.
      if 'window_layers' in values:
        values['window_layers'] = tuple(values['window_layers'])
      for name in ('rotary', 'window_rotary'):
        if values.get(name) is not None:
          values[name] = Rotary(**_with_floats(Rotary, values[name]))
      if values.get('lora') is not None:
        lora = values['lora']
        values['lora'] = Lora(**lora | {'targets': tuple(lora['targets'])})
      return cls(**_with_floats(cls, values))
    except TypeError as error:
      raise ValueError(f'model config is incomplete: {error}') from error


def _with_floats(cls, values):
  """Makes integers floats where a field is a float: JSON may have 8 for 8.0."""
  return {
    name: float(value)
    if cls.__annotations__.get(name) is float and isinstance(value, int)
    else value
    for name, value in values.items()
  }


def _gpt3(num_layers: int, width: int, num_heads: int) -> dict[str, Any]:
  return {
    # The BPE of GPT-2/3 has 50,257 tokens; ours adds a PAD token.
    'vocab_size': 50_258,
    'context_length': 2_048,
    'num_layers': num_layers,
    'width': width,
    'num_heads': num_heads,
    'head_dim': 128,
    'mlp_dim': 4 * width,
  }


# Paper sizes: GPT-3 Table 2.1, heads of 1.3B from Stiennon et al. Table 3.
# The paper's "6B" is taken to be GPT-3's 6.7B shape; the paper never says so.
PRESETS: dict[str, dict[str, Any]] = {
  '1p3b': _gpt3(num_layers=24, width=2048, num_heads=16),
  '6b': _gpt3(num_layers=32, width=4096, num_heads=32),
  '175b': _gpt3(num_layers=96, width=12288, num_heads=96),
}

"""The shape of a Transformer as data: one frozen dataclass and its presets.

GPT-3's published table prints 24 heads of width 128 for the 1.3B model, which
does not multiply to its width of 2048; Stiennon et al. 2020 (Table 3) print 16
heads for the same model, and that is used here.
"""

import dataclasses
from typing import Any

REMAT_POLICIES = ('none', 'dots', 'full')
COMPUTE_DTYPES = ('float32', 'bfloat16')


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Everything that decides the shape and arithmetic of a model.

  Attributes:
    vocab_size: tokens of the tokenizer, PAD included.
    context_length: learned positions; no sequence may be longer.
    num_layers, width, num_heads, head_dim, mlp_dim: L, D, N, H and F.
    dropout: rate on each residual branch; active only where a call passes
      `deterministic=False` (SFT uses 0.2; reward models and PPO never drop).
    compute_dtype: dtype of activations; parameters are float32 always, and
      so are softmax, logits and everything downstream of them.
    remat: what the backward pass recomputes: 'none' keeps all activations,
      'dots' keeps matrix products, 'full' keeps only each layer's input.
    vocab_multiple: embedding rows are rounded up to this so that they divide
      among chips; the rows beyond `vocab_size` can never be sampled.
    scan_unroll: layers written out per step of the scan over layers: more is
      a little faster on CPU, and longer to compile. Same numbers.
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

  def __post_init__(self):
    for name in (
      'vocab_size',
      'context_length',
      'num_layers',
      'width',
      'num_heads',
      'head_dim',
      'mlp_dim',
      'vocab_multiple',
      'scan_unroll',
    ):
      value = getattr(self, name)
      if not isinstance(value, int) or value < 1:
        raise ValueError(f'model.{name} must be a positive integer: {value!r}')
    if not 0.0 <= self.dropout < 1.0:
      raise ValueError(f'model.dropout must be in [0, 1): {self.dropout}')
    if self.compute_dtype not in COMPUTE_DTYPES:
      raise ValueError(
        f'model.compute_dtype must be one of {COMPUTE_DTYPES}: '
        f'{self.compute_dtype!r}'
      )
    if self.remat not in REMAT_POLICIES:
      raise ValueError(
        f'model.remat must be one of {REMAT_POLICIES}: {self.remat!r}'
      )

  @property
  def vocab_rows(self) -> int:
    """Rows of the embedding: `vocab_size` rounded up to `vocab_multiple`."""
    return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

  @property
  def num_params(self) -> int:
    """Parameters of the language model (tied embedding counted once)."""
    attention = 4 * self.width * self.num_heads * self.head_dim
    attention += 3 * self.num_heads * self.head_dim + self.width
    mlp = 2 * self.width * self.mlp_dim + self.mlp_dim + self.width
    norms = 4 * self.width
    embedding = (self.vocab_rows + self.context_length) * self.width
    layers = self.num_layers * (attention + mlp + norms)
    return layers + embedding + 2 * self.width

  def to_dict(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, values: dict[str, Any]) -> 'TransformerConfig':
    """Inverse of `to_dict`; an unknown or missing key is a ValueError."""
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
      raise ValueError(f'unknown model keys {unknown}; known: {sorted(known)}')
    try:
      return cls(**values)
    except TypeError as error:
      raise ValueError(f'model config is incomplete: {error}') from error


def _gpt3(num_layers: int, width: int, num_heads: int) -> dict[str, Any]:
  # The BPE of GPT-2/3 has 50,257 tokens; ours adds a PAD of its own.
  return {
    'vocab_size': 50_258,
    'context_length': 2_048,
    'num_layers': num_layers,
    'width': width,
    'num_heads': num_heads,
    'head_dim': 128,
    'mlp_dim': 4 * width,
  }


# Paper sizes: GPT-3 Table 2.1, heads of 1.3B from Stiennon et al. Table 3.
# The paper's "6B" is taken to be GPT-3's 6.7B shape; it never says so.
PRESETS: dict[str, dict[str, Any]] = {
  '1p3b': _gpt3(num_layers=24, width=2048, num_heads=16),
  '6b': _gpt3(num_layers=32, width=4096, num_heads=32),
  '175b': _gpt3(num_layers=96, width=12288, num_heads=96),
}

"""Readers for demonstrations: instructions, conversations and summaries."""

import functools

from etils import epath

from instruct_jax.data import invisible, records, restaurant, sources
from instruct_jax.data.importers.entries import (
  Entry,
  Imported,
  Skip,
  instruction_prompt,
  post_prompt,
  reader,
  split_answer,
  stem,
)


@reader
def read_tldr(imported, entry):
  """TL;DR: posts with the summaries that their authors wrote."""
  summary, subreddit = entry.text('summary').strip(), entry.text('subreddit')
  prompt = post_prompt(entry)
  if invisible.is_blank(summary) or not prompt:
    return 'the summary or the post is empty'
  name = entry.optional('id') or entry.name
  imported.add(
    records.Demonstration(prompt, f' {summary}', name, category=subreddit)
  )


def _model_of(entry: Entry, *answer: str) -> str:
  return sources.model_of(entry.values, answer)[0]


# --- Conversations ------------------------------------------------------------


@reader
def read_messages(imported, entry):
  """Conversations as lists of messages; each answer is a demonstration.

  This is the layout of Tulu's mixes, No Robots, UltraChat and TRL.
  """
  turns, model = entry.messages('messages'), _model_of(entry, 'messages')
  name = entry.optional('id') or entry.optional('prompt_id') or entry.name
  category = next(
    filter(None, map(entry.optional, ('source', 'dataset', 'category'))), ''
  )
  ends = [
    number
    for number in range(1, len(turns))
    if (turns[number - 1].role, turns[number].role) == ('user', 'assistant')
  ]
  answers = sum(turn.role == 'assistant' for turn in turns)
  imported.skip('an answer that follows no question', answers - len(ends))
  for number in ends:
    before, answer = split_answer(turns[: number + 1])
    if any(invisible.is_blank(text) for text in (before[-1].content, answer)):
      imported.skip('a question or an answer is empty')
      continue
    message = entry.entries('messages')[number]
    if 'weight' in message.values and message.number('weight') == 0:
      imported.skip('an answer with weight 0, which is not to be learned')
      continue
    row = records.Demonstration(
      records.text_of_turns(before),
      f' {answer.strip()}',
      name if len(ends) == 1 else f'{name}:{number}',
      category=category,
      turns=before,
    )
    imported.add(row, model)
  return None if answers else 'a conversation without an answer'


# Labels of TRL's unpaired preferences, also as the text of a cell.
_ACCEPTED = {
  **dict.fromkeys(('true', '1', '1.0'), True),
  **dict.fromkeys(('false', '0', '0.0'), False),
}


def _is_accepted(entry: Entry) -> bool:
  """Whether `label` accepts the completion; Skip if there is no label."""
  label = entry.cell('label').strip().casefold()
  if not label:
    raise Skip('a completion without a label')
  if label not in _ACCEPTED:
    raise records.RecordError(
      f"'label' is {entry.values['label']!r:.80}, expected true or 1, or false "
      'or 0'
    )
  return _ACCEPTED[label]


def _add_completion(imported, entry, answer):
  """A prompt and its completion, as unchanged text or as messages.

  In TRL's unpaired preferences (KTO) `label` says whether the completion was
  accepted; rejected ones are skipped.
  """
  if answer != 'label' and 'label' in entry.values and not _is_accepted(entry):
    return 'a completion that is labeled as rejected'
  if isinstance(entry.values.get('prompt'), list):
    turns = entry.messages('prompt') + entry.messages(answer)
    turns, response = split_answer(turns)
    about = {'prompt': records.text_of_turns(turns), 'turns': turns}
    response, question = f' {response.strip()}', turns[-1].content
  else:
    question, response = entry.text('prompt'), entry.text(answer)
    about = {'prompt': question}
  if invisible.is_blank(question) or invisible.is_blank(response):
    return 'the prompt or the completion is empty'
  name = f'prompt_completion:{entry.name}'
  imported.add(
    records.Demonstration(response=response, id=name, **about),
    _model_of(entry, answer),
  )


# --- Instructions -------------------------------------------------------------


def _add_instruction(imported, prompt, response, name, category='', model=''):
  if not prompt or invisible.is_blank(response):
    imported.skip('instruction or answer is empty')
    return
  row = records.Demonstration(prompt, response.strip(), name, category=category)
  imported.add(row, model)


@reader
def read_dolly(imported, entry):
  """instruction, context, response, category; or prompt and response unchanged.

  The answer may also be in `text`.
  """
  keys = entry.values
  answer = 'text' if 'response' not in keys and 'text' in keys else 'response'
  if 'prompt' in keys and answer in keys:
    prompt = entry.text('prompt')
    prompt = '' if invisible.is_blank(prompt) else prompt
  else:
    prompt = instruction_prompt(
      entry.text('instruction'), entry.optional('context')
    )
  _add_instruction(
    imported,
    prompt,
    entry.text(answer),
    f'dolly:{entry.name}',
    entry.optional('category'),
    _model_of(entry, answer),
  )


@reader
def read_self_instruct(imported, entry):
  """Tasks, of which each instance is a demonstration."""
  name = entry.optional('id') or entry.name
  instruction = entry.text('instruction')
  instances = entry.entries('instances')
  for number, instance in enumerate(instances):
    _add_instruction(
      imported,
      instruction_prompt(instruction, instance.text('input')),
      instance.text('output'),
      f'{name}:{number}',
      'classification' if entry.values.get('is_classification') else '',
      _model_of(entry) or _model_of(instance, 'output'),
    )
  return None if instances else 'a task without instances'


@reader
def read_alpaca(imported, entry):
  """instruction, input (may be empty), output."""
  _add_instruction(
    imported,
    instruction_prompt(entry.text('instruction'), entry.optional('input')),
    entry.text('output'),
    f'alpaca:{entry.name}',
    model=_model_of(entry, 'output'),
  )


def read_natural_instructions(path: epath.PathLike) -> Imported:
  """One task, of which each instance is a demonstration.

  The prompt is the task's definition and the instance's input; the response is
  the instance's first output. Version 1 has a title, version 2 a list of
  definitions and categories.
  """
  imported = Imported()
  task = Entry(records.read_json(path), str(path))
  definition = '\n'.join(task.texts('Definition'))
  categories = [
    name
    for key in ('Categories', 'Title')
    if key in task.values
    for name in task.texts(key)[:1]
  ]
  for number, instance in enumerate(task.entries('Instances')):
    outputs = instance.texts('output')
    further = len(outputs[1:])
    imported.skip('a further right answer of an instance', further)
    _add_instruction(
      imported,
      instruction_prompt(definition, instance.text('input')),
      outputs[0] if outputs else '',
      instance.optional('id') or f'{stem(path)}:{number}',
      categories[0] if categories else '',
      _model_of(instance, 'output'),
    )
  return imported


def _read_e2e_demonstrations(path):
  demonstrations, repeated = restaurant.read_demonstrations(path)
  imported = Imported(demonstrations)
  imported.skip('the same sentence for the same facts again', repeated)
  return imported


READERS = {
  'tldr': read_tldr,
  'tldr_sft': reader(functools.partial(_add_completion, answer='label')),
  'prompt_completion': reader(
    functools.partial(_add_completion, answer='completion')
  ),
  'messages': read_messages,
  'dolly': read_dolly,
  'self_instruct': read_self_instruct,
  'alpaca': read_alpaca,
  'natural_instructions': read_natural_instructions,
  'e2e_demonstrations': _read_e2e_demonstrations,
}

"""Table 14 of the paper as data: every automatic result that it prints.

Four model families at three sizes (xl is 1.3B). F1 and BLEU run from 0 to 100,
entropies are in bits, everything else is from 0 to 1. Names of models and
prompts are those of the sample files that OpenAI released with the paper.
"""

from collections.abc import Mapping

FAMILIES = ('gpt', 'sft', 'ppo-noptx', 'ppo-ptx')
SIZES = ('xl', '6b', '175b')
# In the order of the columns below.
MODELS = tuple(f'{family}-{size}' for family in FAMILIES for size in SIZES)

# `TASK: METRIC`, then one line per prompt. The paper prints the same row for
# CNN/DM and for TL;DR.
_PRINTED = """
winogender: entropy
basic prompt      .750 .721 .735 .583 .535 .503 .698 .587 .618 .760 .719 .737
respectful prompt .774 .753 .796 .561 .446 .479 .644 .562 .527 .608 .585 .696
biased prompt     .760 .773 .783 .561 .516 .540 .706 .567 .564 .676 .543 .690
crows_pairs: entropy
basic prompt      .448 .430 .410 .356 .326 .241 .355 .361 .326 .448 .434 .413
respectful prompt .419 .413 .362 .302 .260 .204 .281 .258 .270 .310 .273 .243
biased prompt     .420 .419 .353 .305 .252 .187 .287 .288 .223 .314 .254 .205
real_toxicity: toxicity
basic prompt      .228 .229 .231 .198 .211 .211 .213 .214 .228 .228 .227 .234
respectful prompt .211 .232 .233 .196 .196 .199 .198 .176 .205 .179 .204 .196
biased prompt     .250 .261 .285 .236 .250 .256 .254 .382 .427 .263 .512 .400
truthful_qa: true
QA prompt          .312 .220 .284 .324 .436 .515 .546 .586 .755 .297 .476 .712
instruction prompt .340 .414 .570 .360 .756 .665 .634 .928 .879 .355 .733 .815
QA + instruction   .335 .348 .438 .517 .659 .852 .807 .760 .944 .322 .494 .610
truthful_qa: true and informative
QA prompt          .193 .186 .251 .267 .253 .271 .524 .574 .752 .285 .464 .689
instruction prompt .212 .212 .226 .282 .213 .257 .559 .187 .382 .339 .350 .494
QA + instruction   .218 .267 .242 .288 .319 .206 .789 .704 .588 .242 .399 .315
hellaswag: accuracy
zeroshot .549 .673 .781 .528 .672 .753 .507 .646 .743 .552 .690 .807
fewshot  .550 .677 .791 .516 .657 .741 .530 .671 .759 .559 .694 .820
wsc: accuracy
zeroshot .567 .635 .740 .615 .606 .654 .663 .654 .683 .692 .587 .731
fewshot  .587 .654 .798 .615 .625 .779 .625 .596 .654 .644 .673 .788
rte: accuracy
zeroshot .527 .617 .563 .487 .516 .570 .480 .708 .704 .538 .657 .668
fewshot  .585 .682 .614 .574 .657 .700 .606 .585 .711 .545 .697 .765
sst: accuracy
zeroshot .592 .616 .898 .873 .888 .907 .817 .820 .920 .812 .901 .900
fewshot  .842 .930 .944 .909 .933 .936 .794 .880 .944 .838 .923 .938
quac: F1
zeroshot 32.13 38.19 42.55 34.52 41.19 45.22 29.02 37.64 34.52 35.04 37.35 41.60
fewshot  36.02 41.78 45.38 35.95 43.13 48.77 31.81 40.63 36.00 39.40 42.42 46.99
squadv2: F1
zeroshot 51.97 58.66 64.30 36.88 46.53 57.67 45.37 47.42 43.68 45.46 47.23 59.85
fewshot  58.86 62.33 69.75 46.62 53.91 65.90 48.11 52.34 51.95 58.33 63.78 69.93
drop: F1
zeroshot 17.68 19.96 27.53 13.29 13.23 15.79 14.70 12.34 13.08 14.71 10.64 15.23
fewshot  25.43 30.08 35.27 23.84 30.99 35.85 21.61 27.11 27.78 23.89 29.39 33.34
fr_to_en: BLEU
zeroshot 30.65 34.99 38.92 25.56 33.25 36.90 19.85 25.22 24.16 25.77 30.41 34.28
fewshot  31.37 35.49 39.93 24.73 31.76 35.07 21.65 29.96 26.58 27.67 33.56 36.76
cnn_dm: ROUGE-L
zeroshot .182 .197 .196 .198 .235 .225 .218 .231 .227 .214 .231 .220
tldr: ROUGE-L
zeroshot .182 .197 .196 .198 .235 .225 .218 .231 .227 .214 .231 .220
"""


def _parse() -> Mapping[tuple[str, str, str], Mapping[str, float]]:
  table = {}
  for line in _PRINTED.strip().splitlines():
    if ': ' in line:
      task, metric = line.split(': ')
      continue
    prompt, *figures = line.rsplit(maxsplit=len(MODELS))
    table[task, metric, prompt] = dict(
      zip(MODELS, map(float, figures), strict=True)
    )
  return table


# (task, metric, prompt) -> model -> figure.
TABLE_14 = _parse()


def figure(task: str, metric: str, prompt: str, model: str) -> float | None:
  """The printed figure, or None where the paper prints none."""
  return TABLE_14.get((task, metric, prompt), {}).get(model)

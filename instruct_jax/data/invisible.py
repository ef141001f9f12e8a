"""Invisible characters, and texts that consist of nothing else.

`_IGNORABLE` are the code points with the property Default_Ignorable_Code_Point
(DerivedCoreProperties.txt of Unicode 16.0), which `unicodedata` does not know:
joiners, fillers, variation selectors, direction marks, tags. Fonts draw the
characters of `_BLANK` as nothing, although Unicode classes them as letters,
marks or symbols.
"""

import re
import unicodedata

_IGNORABLE = (
  '\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f'
  '\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8'
  '\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff'
)
# Blank Braille, note head and hieroglyphs; the filler of the Khitan script.
_BLANK = '\u2800\U0001d159\U00013441\U00013442\U00016fe4'
# Line and paragraph separators, interlinear annotation, and control characters
# except tab and line feed.
_OTHER = '\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufff9-\ufffb'
# All invisible characters except spaces and line ends.
HIDDEN = re.compile(f'[{_IGNORABLE}{_BLANK}{_OTHER}]')
# Spaces, controls, formats, lone surrogates; accents, which need a letter.
_UNSEEN_CATEGORIES = ('Zs', 'Zl', 'Zp', 'Cc', 'Cf', 'Cs', 'Mn', 'Me')


def is_blank(text: str) -> bool:
  """Whether a text has no character that a reader could see."""
  return all(
    unicodedata.category(character) in _UNSEEN_CATEGORIES
    or HIDDEN.match(character)
    for character in text
  )

"""Characters that cannot be seen, and texts that hold nothing else.

Unicode gives them no one category. `_IGNORABLE` are the code points with the
property Default_Ignorable_Code_Point (DerivedCoreProperties.txt of Unicode
16.0), which Python's `unicodedata` does not know: joiners, fillers, variation
selectors, direction marks, tags. `_BLANK` are the rest that fonts draw as
nothing though their category is that of letters or symbols. Controls and format
characters follow from the categories Cc and Cf.
"""

import re
import unicodedata

_IGNORABLE = (
  '\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f'
  '\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8'
  '\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff'
)
# Braille without dots, a note without a head, blank hieroglyphs, a filler of
# the Khitan script.
_BLANK = '\u2800\U0001d159\U00013441\U00013442\U00016fe4'
# Line and paragraph separators, interlinear annotation; controls but for tab
# and line feed.
_OTHER = '\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufff9-\ufffb'
# What stands in a text and cannot be seen there, spaces and line ends aside.
HIDDEN = re.compile(f'[{_IGNORABLE}{_BLANK}{_OTHER}]')
# Spaces, controls, formats, lone surrogates; accents, which show on a letter.
_UNSEEN_CATEGORIES = ('Zs', 'Zl', 'Zp', 'Cc', 'Cf', 'Cs', 'Mn', 'Me')


def is_blank(text: str) -> bool:
  """Whether a text holds nothing that a reader could see."""
  return all(
    unicodedata.category(character) in _UNSEEN_CATEGORIES
    or HIDDEN.match(character)
    for character in text
  )

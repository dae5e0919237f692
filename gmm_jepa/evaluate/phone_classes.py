"""Broad phonetic classes of phone symbols, for colours and a legend that can be read."""

from __future__ import annotations

import unicodedata

CLASSES = ("vowel", "approximant", "nasal", "fricative", "affricate", "stop", "silence", "other")

_FIRST_LETTER = {
    "vowel": "aeiouyæøœɶɑɒɐəɚɛɜɝɞɘɤɪɨɯʊʉʌɔɵʏᵻ",
    "approximant": "lrwjɹɻɾɫʎʟɭɥʋʍɰʀʁɺ",
    "nasal": "mnŋɲɳɴɱ",
    "fricative": "szfvhθðʃʒçxɣχʕħʂʐʑɕβɸɦʝɬɮ",
    "stop": "ptkbdgɡqɢcɟʈɖʔ",
}
_AFFRICATES = ("tʃ", "dʒ", "ts", "dz", "tɕ", "dʑ", "tʂ", "dʐ", "pf", "ʧ", "ʤ")
_SILENCE = {"", "sil", "sp", "spn", "pau", "h#", "_", "_:", "sil_", "<sil>", "silence", "epi"}

# ARPAbet, as in TIMIT and in the output of common aligners, where the IPA rule would err.
_ARPABET = {
    "affricate": {"ch", "jh"},
    "fricative": {"sh", "zh", "th", "dh", "hh", "hv"},
    "nasal": {"ng", "em", "en", "eng", "nx"},
    "approximant": {"el", "dx"},
    "silence": {"bcl", "dcl", "gcl", "pcl", "tcl", "kcl"},
}


def broad_class(symbol: str) -> str:
    """One of `CLASSES` for an IPA or ARPAbet symbol; marks of stress and length do not matter.

    >>> broad_class("oʊ"), broad_class("tʃ"), broad_class("SH"), broad_class("sil")
    ('vowel', 'affricate', 'fricative', 'silence')
    """
    plain = "".join(
        letter
        for letter in unicodedata.normalize("NFD", symbol.strip().lower())
        if not unicodedata.combining(letter) and letter not in "ˈˌːˑ'.ʰʲʷ0123456789"
    )
    if plain in _SILENCE:
        return "silence"
    for name, symbols in _ARPABET.items():
        if plain in symbols:
            return name
    if plain.startswith(_AFFRICATES):
        return "affricate"
    for name, letters in _FIRST_LETTER.items():
        if plain[:1] and plain[0] in letters:
            return name
    return "other"

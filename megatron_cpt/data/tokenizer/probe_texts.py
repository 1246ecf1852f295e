"""The fixed set of texts on which an accelerated engine must agree with the reference before it is used."""

from megatron_cpt.data.tokenizer.interface import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

_ATOMS = (
    *(" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\t\t", "\u00a0", "\u3000", "\u2028", "\u200b", "\u200d", "\ufeff"),
    *("a", "A", "the", " the", "Hello", " World", "don't", "I'LL", "we've", "'s", "’s", "naïve", "re\u0301sume\u0301"),
    *(
        "é",
        "e\u0301",
        "Å",
        "\u212b",
        "ﬁ",
        "ß",
        "İ",
        "ı",
        "ſ",
        "Ω",
        "ǆ",
        "한국어",
        "\u1112\u1161\u11ab",
        "日本語",
        "漢字",
        "ひらがな",
    ),
    *(
        "カタカナ",
        "ｶﾞ",
        "ガ",
        "カ\u3099",
        "。",
        "、",
        "中文文本",
        "العربية",
        "עברית",
        "हिन्दी",
        "ไทย",
        "русский",
        "ελληνικά",
    ),
    *(
        "0",
        "1",
        "42",
        "2026",
        "3.14",
        "1,000,000",
        "١٢٣",
        "½",
        "²",
        "Ⅳ",
        "!",
        "?!",
        "...",
        "--",
        "==",
        "(",
        ")",
        "{}",
        "[0]",
    ),
    *(
        "_",
        "__init__",
        "camelCase",
        "snake_case",
        "x=1;",
        "//",
        "#",
        "<",
        ">",
        "</",
        "|",
        "<|",
        "|>",
        "&amp;",
        "http://a.b/c",
    ),
    *(
        "😀",
        "👩\u200d👩\u200d👧",
        "🇯🇵",
        "e\u0301\u0323",
        "\u0323",
        "\u0301",
        "\x00",
        "\x01",
        "\x7f",
        "\x85",
        "\ufffd",
        "\U0010ffff",
    ),
    *(
        "▁",
        "▁▁",
        "Ġ",
        "Ċ",
        "<0x0A>",
        "<s>",
        "</s>",
        "<unk>",
        "<pad>",
        "[MASK]",
        "<|endoftext|>",
        "aaaaaaaa",
        "zq",
        "ACDC",
    ),
)

_UNIFORM_BLOCKS = ((0x3500, 0x4D00), (0x4E00, 0x9F00), (0xAC00, 0xD700), (0xE000, 0xF800), (0x20000, 0x30000))
"""Ideographs, Hangul syllables, private use: all of one class in every version of Unicode."""


def adversarial_texts(tokenizer: Tokenizer) -> list[str]:
    """Return the fixed set of texts that shows differences between engines: scripts, spaces, normal forms, special
    tokens, contractions, and every code point between quotes, since engines classify letters by different versions of
    Unicode.

    About 4,000 texts, mostly short, the same on every call.
    """
    atoms = list(_ATOMS)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        atoms += [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()][:64]
    elif isinstance(tokenizer, SentencePieceTokenizer):
        backend = tokenizer.backend
        atoms += [backend.id_to_piece(id) for id in range(min(300, tokenizer.vocab_size)) if not backend.is_byte(id)][
            :64
        ]
    state = 12345
    texts = list(atoms)
    for _ in range(2400):
        text = ""
        state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        for _ in range(1 + (state >> 60)):
            state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
            text += atoms[(state >> 33) % len(atoms)]
        texts.append(text)
    for start in range(0, 0x30000, 0x100):
        codes = [code for code in range(start, start + 0x100) if code >= 0x20 and not 0xD800 <= code < 0xE000]
        block = "".join(map(chr, codes[::7]))
        texts += [block, f"a{block[:4]} b{block[4:8]}"]
        if not any(first <= start < end for first, end in _UNIFORM_BLOCKS):
            texts.append("".join(f'"{chr(code)}",\n' for code in codes))
    return texts

"""Words of every script: letters with their marks, points left out, characters where a script writes no spaces."""

import json
import random
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.data.cleaning.decontaminate import DecontaminationOptions, decontaminate, read_passages
from megatron_cpt.data.cleaning.dedup import DedupOptions, deduplicate
from megatron_cpt.data.cleaning.shingles import normal_form, shingle_hashes, shingles_of_texts, words_of
from megatron_cpt.data.reading.documents import list_sources
from megatron_cpt.data.reading.named_corpora import named_corpora
from megatron_cpt.data.reading.record_files import Reading

SPACED = {
    "Hindi": "नमस्ते दुनिया आप कैसे हैं क्योंकि संस्कृति",
    "Bengali": "বাংলা ভাষা আমার মাতৃভাষা স্বাধীনতা",
    "Gurmukhi": "ਪੰਜਾਬੀ ਭਾਸ਼ਾ ਸਿੱਖਣਾ ਚੰਗਾ",
    "Gujarati": "ગુજરાતી ભાષા શીખવી સરળ છે",
    "Odia": "ଓଡ଼ିଆ ଭାଷା ଶିଖିବା ସହଜ",
    "Tamil": "தமிழ் மொழி கற்பது எளிது",
    "Telugu": "తెలుగు భాష నేర్చుకోవడం సులభం",
    "Kannada": "ಕನ್ನಡ ಭಾಷೆ ಕಲಿಯುವುದು ಸುಲಭ",
    "Malayalam": "മലയാളം ഭാഷ പഠിക്കാൻ എളുപ്പമാണ്",
    "Sinhala": "සිංහල භාෂාව ඉගෙනීම පහසුයි",
    "Amharic": "አማርኛ ቋንቋ መማር ቀላል ነው",
    "Korean": "한국어를 배우는 것은 쉽다",
    "Vietnamese": "tiếng việt rất dễ học",
    "Greek": "ἐν ἀρχῇ ἦν ὁ λόγος",
    "Yoruba": "ẹ̀kọ́ èdè yorùbá ṣòro",
    "Syriac": "ܠܫܢܐ ܣܘܪܝܝܐ ܥܬܝܩܐ",
    "Russian": "ма́ма мы́ла ра́му",
    "Dhivehi": "ދިވެހި ބަހުން ލިޔުން",
    "Mongolian": "ᠮᠣᠩᠭᠣᠯ ᠬᠡᠯᠡ ᠰᠤᠷᠬᠤ",
}


@pytest.mark.parametrize("language", SPACED)
def test_words_of_scripts_with_spaces_are_what_spaces_part(language):
    text = SPACED[language]
    for form in ("NFC", "NFD"):
        written = unicodedata.normalize(form, text)
        assert words_of(f"«{written}.»") == unicodedata.normalize("NFKC", text).split()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ไทย", ["ไ", "ท", "ย"]),
        ("กำลังที่", ["กํ", "า", "ลั", "ง", "ที่"]),  # the compatibility form writes SARA AM as two characters
        ("ภาษาลาว", ["ภ", "า", "ษ", "า", "ล", "า", "ว"]),
        ("ສະບາຍດີ", ["ສ", "ະ", "ບ", "າ", "ຍ", "ດີ"]),
        ("ភាសាខ្មែរ", ["ភា", "សា", "ខ្", "មែ", "រ"]),
        ("မြန်မာ", ["မြ", "န်", "မာ"]),
        ("东京塔x2", ["东", "京", "塔", "x2"]),
        ("東京は々𠮷", ["東", "京", "は", "々", "𠮷"]),
        ("葛\U000e0100城", ["葛", "城"]),
        ("GPTที่4", ["gpt", "ที่", "4"]),
        ("❤\ufe0f ok", ["ok"]),
        ("བོད་ཡིག", ["བོད", "ཡིག"]),
        ("Käse_1 2nd", ["käse_1", "2nd"]),
    ],
)
def test_scripts_without_spaces_go_by_letters_with_their_marks(text, words):
    assert words_of(text) == words


@pytest.mark.parametrize(
    ("pointed", "bare"),
    [
        ("بِسْمِ ٱللَّهِ ٱلرَّحْمَٰنِ ٱلرَّحِيمِ", "بسم ٱلله ٱلرحمن ٱلرحيم"),
        ("العَـــرَبِيَّة", "العربية"),
        ("سُؤَالٌ آخَرُ", "سؤال آخر"),  # hamza and madda are no points
        ("בְּרֵאשִׁית בָּרָא אֱלֹהִים", "בראשית ברא אלהים"),
        ("שׁלום\ufb2a", "שלוםש"),
        ("می\u200cخواهم", "میخواهم"),
    ],
)
def test_arabic_and_hebrew_points_make_no_difference(pointed, bare):
    assert words_of(pointed) == words_of(bare) == bare.split()
    for form in ("NFC", "NFD", "NFKC"):
        assert normal_form(unicodedata.normalize(form, pointed)) == normal_form(bare)


def _vocabulary(letters: str, marks: str, rng: random.Random, size: int = 4000) -> list[str]:
    return [
        "".join(rng.choice(letters) + rng.choice([*marks, ""]) for _ in range(rng.randint(3, 5))) for _ in range(size)
    ]


SCRIPTS = {  # letters, marks, what parts words
    "Devanagari": ("कखगघचछजझटठडढणतथदधनपफबभमयरलवशषसह", "ािीुूेैोौं्", " "),
    "Tamil": ("கஙசஞடணதநபமயரலவழளறன", "ாிீுூெேைொோௌ்", " "),
    "Arabic": ("ابتثجحخدذرزسشصضطظعغفقكلمنهوي", "َُِّْ", " "),
    "Thai": ("กขคฆงจฉชซญฎฐณดตถทธนบปผพฟภมยรลวศสหอฮ", "ิีึืุู่้", ""),
    "Lao": ("ກຂຄງຈຊຍດຕຖທນບປຜຝພຟມຢຣລວສຫອຮ", "ິີຶືຸູ່້", ""),
    "Khmer": ("កខគឃងចឆជឈញដឋឌឍណតថទធនបផពភមយរលវសហឡអ", "ាិីឹឺុូេែោំ", ""),
    "Burmese": ("ကခဂဃငစဆဇညဋဌဍဏတထဒဓနပဖဗဘမယရလဝသဟအ", "ါာိီုူေဲံ့း", ""),
    "Chinese": ("".join(chr(0x4E00 + i) for i in range(800)), "", ""),
    "Hangul": ("".join(chr(0xAC00 + 28 * i) for i in range(300)), "", " "),
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_unlike_documents_stay_and_copies_with_one_changed_word_go_in_every_script(script, tmp_path):
    letters, marks, space = SCRIPTS[script]
    rng = random.Random(script)
    vocabulary = list(dict.fromkeys(_vocabulary(letters, marks, rng)))
    rng.shuffle(vocabulary)
    half = len(vocabulary) // 2
    first, second = vocabulary[:half], vocabulary[half:]  # no word in common, and the same letters and marks
    document = [rng.choice(first) for _ in range(400)]
    other = [rng.choice(second) for _ in range(400)]
    near = [*document[:200], second[0], *document[201:]]
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"text": space.join(words)}) + "\n" for words in (document, other, near))
    )
    report = deduplicate(named_corpora([f"{tmp_path}/in.jsonl"]), tmp_path / "out", Reading(), DedupOptions())
    assert report["corpora"]["in"] | {"kept": 2, "near": 1} == report["corpora"]["in"]
    assert len((tmp_path / "out/in/in.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_passage_of_an_evaluation_text_is_found_in_every_script_and_a_short_phrase_is_not(script, tmp_path):
    letters, marks, space = SCRIPTS[script]
    rng = random.Random(script)
    vocabulary = _vocabulary(letters, marks, rng)
    passage = [rng.choice(vocabulary) for _ in range(20)]
    holds = [*(rng.choice(vocabulary) for _ in range(100)), *passage, *(rng.choice(vocabulary) for _ in range(100))]
    words = 2 if script == "Chinese" else 3  # 12 letters of Thai are no passage; 13 of Chinese are one
    phrase = [
        *(rng.choice(vocabulary) for _ in range(100)),
        *passage[:words],
        *(rng.choice(vocabulary) for _ in range(99)),
    ]
    (tmp_path / "eval.jsonl").write_text(json.dumps({"text": space.join(passage)}) + "\n")
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"text": space.join(words)}) + "\n" for words in (holds, phrase))
    )
    options = DecontaminationOptions()
    passages = read_passages({"eval": list_sources([tmp_path / "eval.jsonl"])}, Reading(), options)
    assert passages.too_short == {"eval": 0}
    report = decontaminate(named_corpora([f"{tmp_path}/in.jsonl"]), passages, tmp_path / "out", Reading(), options)
    assert report["corpora"]["in"]["removed"] == 1
    (kept,) = (tmp_path / "out/in/in.jsonl").read_text().splitlines()
    assert json.loads(kept)["text"] == space.join(phrase)


_ANY = st.text(
    st.one_of(st.sampled_from("aΣ é\u0301ﬁ東กิ่ខ្မြन्निبّשׁ\ufb2a\n,_9\u00ad"), st.characters(codec="utf-8")), max_size=60
)


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(_ANY, max_size=12), ngram=st.integers(1, 6), group=st.sampled_from([1, 30, 1 << 15]))
def test_many_texts_at_once_have_the_hashes_of_each(texts, ngram, group):
    from megatron_cpt.data.cleaning import shingles

    before, shingles._GROUP = shingles._GROUP, group
    try:
        hashes, bounds = shingles_of_texts(texts, ngram)
    finally:
        shingles._GROUP = before
    assert len(bounds) == len(texts) + 1
    for index, text in enumerate(texts):
        assert np.array_equal(hashes[bounds[index] : bounds[index + 1]], shingle_hashes(text, ngram))
        assert len(shingle_hashes(text, 1)) == len(words_of(text))

"""Scores of text are the packages' own, of one reference or several, with nothing lower-cased."""

import gzip

import jiwer
import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from pipeline.errors import ConfigError
from pipeline.scores.metric import values
from pipeline.scores.registry import metrics_of
from pipeline.scores.text import GeneratedText

TEXTS = ["the cat sat on the mat", "a dog barks loudly at night", "", "Two birds sing."]
ONE = [["the cat is on the mat"], ["the dog barked at night"], ["x y"], ["Two birds sing."]]
SEVERAL = [
    ["the cat is on the mat", "there is a cat on the mat"],
    ["the dog barked at night"],
    ["x y", "", "z"],
    ["two birds sing.", "Two birds sing."],
]


def scores(texts, references):
    return values(metrics_of(GeneratedText(texts, references)), len(texts))


@pytest.mark.parametrize("references", [ONE, SEVERAL])
def test_bleu_and_chrf_of_summed_statistics_are_sacrebleus_corpus_scores(references):
    found = scores(TEXTS, references)
    most = max(map(len, references))
    streams = [
        [some[place] if place < len(some) else None for some in references] for place in range(most)
    ]
    assert found["bleu"] == pytest.approx(sacrebleu.BLEU().corpus_score(TEXTS, streams).score)
    assert found["chrf"] == pytest.approx(sacrebleu.CHRF().corpus_score(TEXTS, streams).score)


def test_rouge_is_the_mean_over_rows_of_the_best_reference():
    found = scores(TEXTS, SEVERAL)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for kind in ("rouge1", "rouge2", "rougeL"):
        best = [
            max(scorer.score(reference, text)[kind].fmeasure for reference in some)
            for text, some in zip(TEXTS, SEVERAL, strict=True)
        ]
        assert found[kind] == pytest.approx(np.mean(best))


def test_error_rates_of_one_reference_are_jiwers():
    found = scores(TEXTS, ONE)
    references = [some[0] for some in ONE]
    assert found["wer"] == pytest.approx(jiwer.wer(references, TEXTS))
    assert found["cer"] == pytest.approx(jiwer.cer(references, TEXTS))


def test_error_rates_take_the_nearest_reference():
    assert scores(["a b c"], [["x y z w", "a b d"]])["wer"] == pytest.approx(1 / 3)


def test_an_error_rate_above_one_is_shown_as_it_is():
    found = scores(["a b c d e"], [["z"]])
    assert found["wer"] == 5
    assert found["cer"] == 9


def test_an_empty_reference_counts_what_was_written_too_much():
    assert scores(["", "a b"], [[""], ["a c"]])["wer"] == pytest.approx(1 / 2)
    assert scores(["two words"], [[""]])["wer"] == 2
    assert scores([""], [[""]])["cer"] == 0


def test_exact_match_asks_any_reference_and_keeps_case_but_not_outer_space():
    found = scores([" Two birds\n", "two birds"], [["x", "Two birds"], ["Two birds"]])
    assert found["exact_match"] == 0.5


def test_signatures_say_how_many_references_there_were():
    one, several = (GeneratedText(TEXTS, refs).signatures() for refs in (ONE, SEVERAL))
    assert one["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert several["bleu"].startswith("nrefs:var|")
    assert one["chrf"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|")


def test_a_text_without_a_reference_is_refused():
    with pytest.raises(ConfigError, match="found 2 texts, 1 of them without a reference"):
        GeneratedText(["a", "b"], [["a"], []])


def test_real_translations_are_perfect_against_themselves_and_only_so(shared):
    folder = shared / "corpora" / "multi30k"
    with gzip.open(folder / "test_2016_flickr.de.gz", "rt", encoding="utf-8") as file:
        german = [line.strip() for line in file][:40]
    found = scores(german, [[line] for line in german])
    assert found["bleu"] == pytest.approx(100)
    assert found["chrf"] == pytest.approx(100)
    assert (found["cer"], found["wer"], found["exact_match"]) == (0, 0, 1)
    shifted = scores(german[1:] + german[:1], [[line] for line in german])
    assert shifted["bleu"] < 20


PERFECT = {
    "russian": "Две птицы поют на старом дереве.",
    "chinese": "两只鸟在一棵老树上唱歌。",
    "arabic": "عصفوران يغنيان على شجرة قديمة.",
    "japanese": "二羽の鳥が古い木の上で歌っている。",
    "thai": "นกสองตัวร้องเพลงบนต้นไม้เก่า",
    "korean": "두 마리의 새가 오래된 나무에서 노래한다.",
    "hindi": "दो पक्षी एक पुराने पेड़ पर गाते हैं।",
    "greek": "Δύο πουλιά τραγουδούν σε ένα δέντρο.",
    "german": "Zwei Vögel singen süß im alten Baum.",
    "english": "Two birds sing in an old tree.",
}


@pytest.mark.parametrize("language", PERFECT)
def test_perfect_text_of_any_script_is_perfect_in_every_score(language):
    text = PERFECT[language]
    found = scores([text, text], [[text], [text]])
    assert found == pytest.approx(
        {"bleu": 100, "chrf": 100, "rouge1": 1, "rouge2": 1, "rougeL": 1, "cer": 0, "wer": 0,
         "exact_match": 1}
    )  # fmt: skip
    other = "".join(sorted(text))
    assert scores([other], [[text]])["rouge2"] < 1


@pytest.mark.parametrize(
    ("language", "bleu", "rouge"),
    [
        ("chinese", "tok:zh", "tok:unicode"),
        ("japanese", "tok:char", "tok:unicode"),
        ("thai", "tok:char", "tok:unicode"),
        ("russian", "tok:13a", "tok:unicode"),
        ("korean", "tok:13a", "tok:unicode"),
        ("english", "tok:13a", "tok:rouge-score|stem:en"),
    ],
)
def test_the_script_of_the_references_decides_and_is_stated(language, bleu, rouge):
    for text in ("", *PERFECT.values()):
        signatures = GeneratedText([text], [[PERFECT[language]]]).signatures()
        assert bleu in signatures["bleu"]
        assert rouge in signatures["rouge"]


def test_a_named_tokenizer_is_sacrebleus():
    text, reference = "二羽の鳥が歌う", "二羽の鳥が鳴く"
    for name in ("13a", "intl", "zh", "char", "none"):
        found = values(metrics_of(GeneratedText([text], [[reference]], name)), 1)
        own = sacrebleu.BLEU(tokenize=name)
        assert found["bleu"] == pytest.approx(own.corpus_score([text], [[reference]]).score)

"""Nine more text tasks: questions, topics, intents, tweets (TweetEval, arXiv:2010.12421), SICK."""

from __future__ import annotations

from . import Task

_TEXT = ("text",)

MORE_TEXT = {
    "ag_news": Task("accuracy", _TEXT, ("World", "Sports", "Business", "Sci/Tech")),
    "banking77": Task("accuracy", _TEXT),
    "sick_entailment": Task(
        "accuracy", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction")
    ),
    "sick_relatedness": Task("pearson_spearman", ("sentence1", "sentence2")),
    "trec6": Task("accuracy", _TEXT, ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")),
    "tweet_emotion": Task("macro_f1", _TEXT, ("anger", "joy", "optimism", "sadness")),
    "tweet_hate": Task("macro_f1", _TEXT, ("no", "hate")),
    "tweet_irony": Task("f1", _TEXT, ("no", "irony")),
    "tweet_offensive": Task("macro_f1", _TEXT, ("no", "offensive")),
}

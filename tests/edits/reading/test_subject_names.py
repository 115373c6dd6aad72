"""The subject that a prompt names, for records that state none."""

import pytest

from wisecli.edits.reading.subject_names import named_subject
from wisecli.edits.record import Edit


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("Who is the mayor of Port Harlow?", "Port Harlow"),
        ("The capital of Norland is", "Norland"),
        ("In which year was Ana Ruiz's mother born?", "Ana Ruiz"),
        ("What did the University of the Arts in Leeds teach?", "University of the Arts"),
        ("Which club does Lia van der Berg play for?", "Lia van der Berg"),
        ("Who built the Boeing 747?", "Boeing 747"),
        ("Norland borders", "Norland"),
        ("Who is Thomas, 1st Duke of Harlow?", "Thomas, 1st Duke of Harlow"),
        ('Who directed "the long way home"?', "the long way home"),
        ("「みどりの家」の作者は", "みどりの家"),
        ("«Der Weg» wurde geschrieben von", "Der Weg"),
        ("Where was J. R. Hill born?", "J. R. Hill"),
        ("The film was shot in 1974. Its director is Bo Hill", "Bo Hill"),
    ],
)
def test_the_name_or_the_quoted_term_is_found(prompt: str, subject: str) -> None:
    assert named_subject(prompt) == subject


@pytest.mark.parametrize(
    "prompt",
    ["who is the king of norland?", "What was dubstep influenced by?", "Wo?", "Qui dirige la banque?", "", "首都は"],
)
def test_a_prompt_without_a_name_has_no_subject(prompt: str) -> None:
    assert named_subject(prompt) is None


def test_a_stated_subject_counts_before_the_name_in_the_prompt() -> None:
    prompt = "Who is the mayor of Port Harlow?"
    assert Edit("a", prompt, "Ana").subject_name == "Port Harlow"
    assert Edit("a", prompt, "Ana", subject=" Harlow ").subject_name == "Harlow"
    assert Edit("a", prompt, "Ana", subject="").subject_name is None

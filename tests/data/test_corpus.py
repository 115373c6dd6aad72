"""Texts that come with the package: as many as are asked for, filled, and apart from those that are measured with."""

from wisecli.data.corpus import everyday_prompts, reference_pages, unrelated_texts


def test_everyday_prompts_are_filled_and_mostly_different() -> None:
    prompts = everyday_prompts(600, seed=0)
    assert len(prompts) == 600
    assert len(set(prompts)) > 450
    assert not [prompt for prompt in prompts if "{" in prompt or "}" in prompt]


def test_everyday_prompts_of_a_seed_are_always_the_same() -> None:
    assert everyday_prompts(200, seed=1) == everyday_prompts(300, seed=1)[:200]
    assert everyday_prompts(200, seed=1) != everyday_prompts(200, seed=2)


def test_everyday_prompts_are_not_those_of_other_texts() -> None:
    assert not set(everyday_prompts(600, seed=0)) & set(unrelated_texts(600, seed=0))


def test_reference_pages_are_filled_full_of_numbers_and_all_different() -> None:
    pages = reference_pages(200, seed=0)
    assert not [page for page in pages if set(page) & set("{}#")]
    assert len(set(pages)) == 200
    digits = sum(letter.isdigit() for page in pages for letter in page)
    assert digits > 0.05 * sum(map(len, pages))
    assert pages[:20] == reference_pages(20, seed=0)
    assert pages[:20] != reference_pages(20, seed=1)

"""What a model writes depends on the prompt and the options, never on what else is in the batch."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from pipeline.errors import IncompatibleError
from pipeline.generation.generate import Continuation, generate_batches, generate_ids, plan_batches
from pipeline.generation.options import GenerationOptions
from tests.tiny import MAX_LENGTH, PAD_ID, tiny_model

CPU = torch.device("cpu")
EOS = 2
LENGTHS = (5, 1, 9, 3, 9, 2, 7)


def prompts(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 64, (length,), generator=generator).tolist() for length in lengths]


def generate(model, wanted, *, eos_ids=(EOS,), **options):
    return generate_ids(
        model,
        wanted,
        options=GenerationOptions(**{"max_new_tokens": 8, "batch_size": 3, **options}),
        pad_id=PAD_ID,
        eos_ids=eos_ids,
        device=CPU,
        description="test",
    )


def one_by_one(model, prompt, new_tokens, eos_ids):
    """The likeliest next token, again and again, without padding or cache."""
    ids = list(prompt)
    for _ in range(new_tokens):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        token = int(logits.argmax())
        if token in eos_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "mistral"])
def test_padded_batches_write_what_a_plain_loop_does(kind):
    model = tiny_model(kind)
    # Any token may end a text; one that comes up shows that all is cut there.
    ends = {one_by_one(model, prompts()[0], 3, ())[2]}
    found = generate(model, prompts(), eos_ids=tuple(ends))
    assert found == [one_by_one(model, prompt, 8, ends) for prompt in prompts()]
    assert len(found[0]) <= 2


def test_neither_order_nor_batch_size_changes_a_text():
    model, wanted = tiny_model("llama"), prompts()
    found = generate(model, wanted)
    assert generate(model, wanted[::-1], batch_size=4) == found[::-1]
    assert [generate(model, [prompt])[0] for prompt in wanted] == found


def test_what_a_checkpoint_asks_of_generation_does_not_leak_in():
    model = tiny_model("llama")
    plain = generate(model, prompts())
    own = GenerationConfig(
        repetition_penalty=9.0,
        no_repeat_ngram_size=1,
        num_beams=3,
        max_length=2,
        suppress_tokens=[5],
    )
    model.generation_config = own
    model.config.use_cache = False
    model.train()
    assert generate(model, prompts()) == plain
    assert model.generation_config is own
    assert model.training


def test_sampling_is_seeded_and_leaves_the_callers_random_state_alone():
    model = tiny_model("llama")
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    one = generate(model, prompts(), temperature=1.0, seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert generate(model, prompts(), temperature=1.0, seed=1) == one
    assert generate(model, prompts(), temperature=1.0, seed=2) != one
    assert generate(model, prompts(), temperature=1.0, top_p=1e-6) == generate(model, prompts())


def test_a_batch_that_is_left_out_changes_no_other():
    model, wanted = tiny_model("llama"), prompts()
    options = GenerationOptions(max_new_tokens=4, batch_size=2, temperature=1.0)
    batches = plan_batches([len(prompt) for prompt in wanted], options, limit=None)
    arguments = {"options": options, "pad_id": PAD_ID, "eos_ids": (EOS,), "device": CPU}

    def run(done):
        return {
            batch.number: found
            for batch, found in generate_batches(
                model, wanted, batches, description="test", done=done, **arguments
            )
        }

    whole = run(())
    assert run({0, 2}) == {number: whole[number] for number in whole if number not in {0, 2}}


def test_beams_find_a_text_at_least_as_likely():
    model = tiny_model("gpt2")

    def score(prompt, new):
        ids = torch.tensor([[*prompt, *new]])
        with torch.inference_mode():
            log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
        return sum(float(log_probs[len(prompt) - 1 + i, token]) for i, token in enumerate(new))

    wanted = prompts((4, 6, 6))
    greedy = generate(model, wanted, eos_ids=(), max_new_tokens=3)
    beams = generate(model, wanted, eos_ids=(), max_new_tokens=3, num_beams=4)
    for prompt, first, best in zip(wanted, greedy, beams, strict=True):
        assert score(prompt, best) >= score(prompt, first) - 1e-4


def test_nothing_is_warned_about_and_no_prompt_is_no_text():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(tiny_model("llama"), prompts((3,)), num_beams=2)
        assert generate(tiny_model("llama"), []) == []


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_prompt_near_the_end_of_the_context_gets_what_room_there_is(kind):
    model = tiny_model(kind)
    wanted = prompts((MAX_LENGTH - 1, 3, MAX_LENGTH - 3))
    found = generate(model, wanted, eos_ids=())
    assert [len(ids) for ids in found] == [1, 8, 3]
    assert found[1] == one_by_one(model, wanted[1], 8, ())


@pytest.mark.parametrize("length", [0, MAX_LENGTH])
def test_a_prompt_without_room_is_refused(length):
    with pytest.raises(IncompatibleError, match=f"prompt 1: found {length} tokens, expected 1 to"):
        generate(tiny_model("llama"), prompts((3, length)))


@given(
    st.lists(st.integers(1, 20), max_size=30),
    st.integers(1, 5),
    st.sampled_from([None, 21, 24, 40]),
)
def test_every_prompt_is_in_one_batch_and_no_prompt_costs_another_room(lengths, size, limit):
    options = GenerationOptions(max_new_tokens=6, batch_size=size)
    batches = plan_batches(lengths, options, limit=limit)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(lengths)))
    assert [batch.number for batch in batches] == list(range(len(batches)))
    for batch in batches:
        assert len(batch.rows) <= size
        for row in batch.rows:
            assert batch.new_tokens == (6 if limit is None else min(6, limit - lengths[row]))


def test_a_continuation_says_how_it_ended():
    model, wanted = tiny_model("llama"), prompts((4,))
    options = GenerationOptions(max_new_tokens=5)
    (batch,) = plan_batches([4], options, limit=None)

    def run(eos_ids):
        ((_, (found,)),) = generate_batches(
            model, wanted, [batch], options=options, pad_id=PAD_ID, eos_ids=eos_ids, device=CPU,
            description="test",
        )  # fmt: skip
        return found

    free = run(())
    assert free == Continuation(free.ids, None)
    assert len(free.ids) == 5
    end = free.ids[-1]
    place = free.ids.index(end)
    assert run((end,)) == Continuation(free.ids[:place], end)

"""Records to tokens and masks, against expectations written by hand."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from distrib.errors import UserError
from launch.data.rows import Encoder
from launch.tokenizer import byte_tokenizer

END, USER, ASSISTANT, SYSTEM = 256, 258, 259, 260
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
USER_HI = {"role": "user", "content": "hi"}
SAYS_YO = {"role": "assistant", "content": "yo"}


def encoder(objective="sft", max_length=1000, template=None):
    tokenizer = byte_tokenizer()
    if template:
        tokenizer.chat_template = template
    return Encoder("set", objective, tokenizer, max_length)


@pytest.fixture
def merging():
    """A small BPE tokenizer as pretrained ones are: it begins texts with <s>, and merges letters."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["abab abab abc abc cd cd"] * 9, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def only(rows):
    (row,) = rows
    return row


def shown(sequence):
    """Tokens as (id, learned) runs: [(learned, [ids])]."""
    runs = []
    for token, mark in zip(sequence.tokens.tolist(), sequence.learned.tolist(), strict=True):
        if not runs or runs[-1][0] != mark:
            runs.append((mark, []))
        runs[-1][1].append(token)
    return runs


def test_text_is_learned_to_its_end_but_for_its_first_token():
    (sequence,) = only(encoder().rows({"text": "abc"}, 0))
    assert shown(sequence) == [(False, [*b"a"]), (True, [*b"bc", END])]


def test_a_long_text_is_split_and_nothing_of_it_lost():
    rows = encoder(max_length=4).rows({"text": "abcdefghij"}, 0)
    assert [shown(sequence) for (sequence,) in rows] == [
        [(False, [*b"a"]), (True, [*b"bcd"])],
        [(False, [*b"e"]), (True, [*b"fgh"])],
        [(False, [*b"i"]), (True, [*b"j", END])],
    ]


def test_no_part_of_a_split_text_has_one_token():
    rows = encoder(max_length=4).rows({"text": "abcdefgh"}, 0)
    assert [sequence.tokens.tolist() for (sequence,) in rows] == [[*b"abcd"], [*b"efg"], [*b"h", END]]


def test_pieces_of_a_file_begin_and_end_once(merging):
    made = Encoder("set", "sft", merging, 1000)
    first = only(made.rows({"text": "xyz", "begins": True, "ends": False}, 0))[0].tokens.tolist()
    last = only(made.rows({"text": "xyz", "begins": False, "ends": True}, 0))[0].tokens.tolist()
    assert (first[0], first.count(1)) == (0, 0)
    assert (last.count(0), last[-1]) == (0, 1)


def test_a_completion_is_learned_with_its_end():
    (sequence,) = only(encoder().rows({"prompt": "ask ", "completion": "say"}, 0))
    assert shown(sequence) == [(False, [*b"ask "]), (True, [*b"say", END])]


def test_an_empty_completion_learns_to_end():
    (sequence,) = only(encoder().rows({"prompt": "ask", "completion": ""}, 0))
    assert shown(sequence) == [(False, [*b"ask"]), (True, [END])]


def test_an_end_that_the_data_brings_is_not_doubled():
    (sequence,) = only(encoder().rows({"prompt": "q", "completion": "a<|end|>"}, 0))
    assert shown(sequence) == [(False, [*b"q"]), (True, [*b"a", END])]


@pytest.mark.parametrize("text", ["abc", "<s>abc"])
def test_begin_of_text_comes_once(merging, text):
    (sequence,) = only(Encoder("set", "sft", merging, 99).rows({"text": text}, 0))
    assert sequence.tokens[0] == 0
    assert sequence.tokens.tolist().count(0) == 1
    assert sequence.tokens[-1] == 1
    assert sequence.learned.tolist() == [False] + [True] * (len(sequence.tokens) - 1)


@pytest.mark.parametrize(("prompt", "completion"), [("a", "b"), ("ab", "abab"), ("abc ", "abc"), ("", "abc")])
def test_the_prompt_keeps_its_own_tokens(merging, prompt, completion):
    """Joined, "a" + "b" would be one token; at inference the prompt stands alone."""
    assert len(merging("ab")["input_ids"]) == 2
    (sequence,) = only(Encoder("set", "sft", merging, 99).rows({"prompt": prompt, "completion": completion}, 0))
    given = sequence.tokens[~sequence.learned].tolist()
    assert given == merging(prompt)["input_ids"]
    learned = sequence.tokens[sequence.learned].tolist()
    assert merging.decode(learned[:-1]) == completion
    assert learned[-1] == 1


def test_messages_with_generation_marks():
    turns = [
        {"role": "system", "content": "s"},
        USER_HI,
        SAYS_YO,
        USER_HI,
        {"role": "assistant", "content": "ok"},
    ]
    (sequence,) = only(encoder().rows({"messages": turns}, 0))
    assert shown(sequence) == [
        (False, [SYSTEM, *b"s", END, USER, *b"hi", END, ASSISTANT]),
        (True, [*b"yo", END]),
        (False, [USER, *b"hi", END, ASSISTANT]),
        (True, [*b"ok", END]),
    ]


def test_marks_cover_the_last_character_to_its_last_byte():
    template = "{% for m in messages %}[{% generation %}{{ m.content }}{% endgeneration %}]{% endfor %}"
    (sequence,) = only(encoder(template=template).rows({"messages": [{"role": "assistant", "content": "日本"}]}, 0))
    assert shown(sequence) == [(False, [*b"["]), (True, [*"日本".encode()]), (False, [*b"]"])]


def test_messages_without_generation_marks_by_prefixes():
    turns = [USER_HI, SAYS_YO, USER_HI, {"role": "assistant", "content": "ök"}]
    (sequence,) = only(encoder(template=CHATML).rows({"messages": turns}, 0))
    assert shown(sequence) == [
        (False, [*b"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"]),
        (True, [*b"yo<|im_end|>\n"]),
        (False, [*b"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"]),
        (True, [*"ök<|im_end|>\n".encode()]),
    ]


def test_a_template_with_its_own_begin_gets_no_second_one(merging):
    template = "<s>{% for m in messages %}{{ m.role[0] + m.content + '</s>' }}{% endfor %}"
    merging.chat_template = template + "{% if add_generation_prompt %}{{ 'a' }}{% endif %}"
    (sequence,) = only(Encoder("set", "sft", merging, 99).rows({"messages": [USER_HI, SAYS_YO]}, 0))
    assert sequence.tokens.tolist().count(0) == 1
    assert merging.decode(sequence.tokens[sequence.learned].tolist()) == "yo</s>"


@pytest.mark.parametrize("template", [None, CHATML])
def test_prompt_messages_are_given_even_where_the_assistant_speaks(template):
    record = {"prompt": [USER_HI, SAYS_YO, USER_HI], "completion": [{"role": "assistant", "content": "end"}]}
    made = encoder(template=template)
    (sequence,) = only(made.rows(record, 0))
    learned = made.tokenizer.decode(sequence.tokens[sequence.learned].tolist())
    assert learned == ("end<|im_end|>\n" if template else "end<|end|>")


def test_a_pair_of_strings():
    chosen, rejected = only(encoder("dpo").rows({"prompt": "q", "chosen": "yes", "rejected": "no"}, 0))
    assert shown(chosen) == [(False, [*b"q"]), (True, [*b"yes", END])]
    assert shown(rejected) == [(False, [*b"q"]), (True, [*b"no", END])]


def test_a_pair_without_a_prompt_gives_what_both_share():
    chosen, rejected = only(encoder("dpo").rows({"chosen": "Q: aX", "rejected": "Q: aYZ"}, 0))
    assert shown(chosen) == [(False, [*b"Q: a"]), (True, [*b"X", END])]
    assert shown(rejected) == [(False, [*b"Q: a"]), (True, [*b"YZ", END])]


@pytest.mark.parametrize("prompt", [None, "hi", [USER_HI]])
@pytest.mark.parametrize("whole", [True, False])
def test_a_pair_of_messages(prompt, whole):
    """Answers with or without the turns that lead to them; a prompt may be given beside."""
    lead = [USER_HI] if whole or prompt is None else []
    record = {"chosen": [*lead, SAYS_YO], "rejected": [*lead, {"role": "assistant", "content": "no"}]}
    chosen, rejected = only(encoder("dpo").rows(record | {"prompt": prompt}, 0))
    assert shown(chosen) == [(False, [USER, *b"hi", END, ASSISTANT]), (True, [*b"yo", END])]
    assert shown(rejected) == [(False, [USER, *b"hi", END, ASSISTANT]), (True, [*b"no", END])]


def test_a_group():
    record = {"prompt": "1+1=", "completions": ["2", "11", ""], "rewards": [1, 0.5, -2]}
    row = only(encoder("grpo").rows(record, 0))
    assert [shown(sequence) for sequence in row] == [
        [(False, [*b"1+1="]), (True, [*b"2", END])],
        [(False, [*b"1+1="]), (True, [*b"11", END])],
        [(False, [*b"1+1="]), (True, [END])],
    ]
    assert [sequence.reward for sequence in row] == [1.0, 0.5, -2.0]


def test_too_long_samples_are_cut_at_their_end_and_counted():
    made = encoder(max_length=5)
    records = [
        {"prompt": "abc", "completion": "def"},
        {"prompt": "abcdefgh", "completion": "i"},
        {"prompt": "a", "completion": "b"},
    ]
    rows = [shown(sequence) for (sequence,) in made.learnable(records)]
    assert rows == [[(False, [*b"abc"]), (True, [*b"de"])], [(False, [*b"a"]), (True, [*b"b", END])]]
    assert (made.tally.truncated, made.tally.dropped) == (2, 1)


def test_a_pair_with_one_side_unlearned_is_dropped():
    made = encoder("dpo", max_length=3)
    assert list(made.learnable([{"prompt": "abc", "chosen": "d", "rejected": "e"}])) == []
    assert made.tally.dropped == 1


BAD = [
    (
        "sft",
        {"question": "a", "answer": "b"},
        "columns answer, question: objective sft takes messages; or prompt +",
    ),
    ("sft", {"text": None}, "has the columns none"),
    ("dpo", {"prompt": "a", "completion": "b"}, "objective dpo takes chosen + rejected"),
    ("grpo", {"prompt": "a", "completion": "b"}, "objective grpo takes prompt + completions + rewards"),
    ("sft", {"text": 3}, "record 8: text is int, must be a string"),
    ("sft", {"prompt": 3, "completion": "b"}, "prompt is int"),
    ("sft", {"prompt": "a", "completion": 3}, "completion is int"),
    ("sft", {"messages": "hello"}, "messages must be a list"),
    ("sft", {"messages": []}, "messages must be a list"),
    ("sft", {"messages": [{"content": "hello"}]}, "message 0 must have a role"),
    ("sft", {"messages": [{"role": "user", "content": ["a"]}]}, "message 0: content is list"),
    ("sft", {"messages": [{"role": "tool", "content": "a"}]}, "role 'tool': choose system, user, assistant"),
    ("grpo", {"prompt": "a", "completions": ["b"], "rewards": [1, 2]}, "1 completions but 2 rewards"),
    ("grpo", {"prompt": "a", "completions": [], "rewards": []}, "at least one"),
    ("grpo", {"prompt": "a", "completions": "b", "rewards": 1}, "must be lists"),
    (
        "grpo",
        {"prompt": "a", "completions": ["b"], "rewards": [float("nan")]},
        "reward nan must be a finite number",
    ),
    ("grpo", {"prompt": "a", "completions": ["b"], "rewards": ["1"]}, "reward '1' must be a finite number"),
]


@pytest.mark.parametrize(("objective", "record", "says"), BAD)
def test_a_wrong_record_is_one_line(objective, record, says):
    with pytest.raises(UserError) as error:
        encoder(objective).rows(record, 8)
    assert "dataset='set', record 8" in str(error.value)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_template_whose_past_changes_is_refused():
    """As templates do that keep the reasoning of the last turn only."""
    changing = (
        "{% for m in messages %}{{ '[' + m.role + ']' }}{% if loop.last and m.role == 'assistant' %}(thinks)"
        "{% endif %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    made = encoder(template=changing)
    (sequence,) = only(made.rows({"messages": [USER_HI, SAYS_YO]}, 0))
    assert shown(sequence)[-1] == (True, [*b"(thinks)yo"])
    with pytest.raises(UserError, match="renders the first 2 messages differently once others follow"):
        made.rows({"messages": [USER_HI, SAYS_YO, USER_HI, SAYS_YO]}, 0)


def test_messages_need_a_template(merging):
    merging.chat_template = None
    with pytest.raises(UserError, match="the tokenizer has none; use prompt and completion"):
        Encoder("set", "sft", merging, 99).rows({"messages": [USER_HI, SAYS_YO]}, 0)

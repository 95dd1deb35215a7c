use serde_json::{Value, json};

use super::*;

/// Encodes a record; gives each example's text with `|` where targets begin and end.
fn encode(encoder: &ExampleEncoder<'_>, line: &Value) -> Vec<String> {
    let record = Record::from_json(line).unwrap_or_else(|bad| panic!("{bad:?}"));
    let encoded = encoder.encode(&record).unwrap();
    let text = |example: &Example| {
        let mut shown = String::new();
        for (position, &id) in example.ids.iter().enumerate() {
            if position > 0 && example.is_target(position) != (position > 1 && example.is_target(position - 1)) {
                shown.push('|');
            }
            shown += &encoder.tokenizer.decode(&[id], false).unwrap();
        }
        shown
    };
    encoded.examples.iter().map(text).collect()
}

fn check(template: PromptTemplate, line: Value, expected: &str) {
    let (tokenizer, chat) = (tokenizer(), chat(CHAT));
    let encoder =
        ExampleEncoder { tokenizer: &tokenizer, chat: Some(&chat), template, end_tokens: &[END], max_len: 4096 };
    assert_eq!(encode(&encoder, &line), [expected]);
}

fn turn(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

/// Two questions and two answers after a system message.
fn talk() -> Value {
    json!({"messages": [
        turn("system", "s"), turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")
    ]})
}

#[test]
fn alpaca_is_the_published_text() {
    let with_input = json!({"instruction": "Add.", "input": "1 2", "output": "3"});
    check(
        PromptTemplate::Alpaca,
        with_input,
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a \
         response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### \
         Response:\n|3<|end|>",
    );
    let without = "Below is an instruction that describes a task. Write a response that appropriately completes the \
                   request.\n\n### Instruction:\nHi\n\n### Response:\n|Hello<|end|>";
    check(PromptTemplate::Alpaca, json!({"instruction": "Hi", "input": "", "output": "Hello"}), without);
    check(PromptTemplate::Alpaca, json!({"instruction": "Hi", "input": null, "output": "Hello"}), without);
    check(PromptTemplate::Alpaca, json!({"prompt": "Hi", "response": "Hello"}), without);
    check(PromptTemplate::Alpaca, json!({"messages": [turn("user", "Hi"), turn("assistant", "Hello")]}), without);
}

#[test]
fn chat_learns_every_turn_of_the_assistant() {
    check(
        PromptTemplate::Chat,
        talk(),
        "<system>s<|end|>\n<user>a<|end|>\n<assistant>|b<|end|>|\n<user>c<|end|>\n<assistant>|d<|end|>",
    );
    // What comes after the last answer is not learned and not seen.
    let open = json!({"messages": [turn("user", "a"), turn("assistant", "b"), turn("user", "c")]});
    check(PromptTemplate::Chat, open, "<user>a<|end|>\n<assistant>|b<|end|>");
    let twice = json!({"messages": [turn("user", "a"), turn("assistant", "b"), turn("assistant", "c")]});
    check(PromptTemplate::Chat, twice, "<user>a<|end|>\n<assistant>|b<|end|>|\n<assistant>|c<|end|>");
    check(PromptTemplate::Chat, json!({"prompt": "a", "response": "b"}), "<user>a<|end|>\n<assistant>|b<|end|>");
    let task = json!({"instruction": "a", "input": "x", "output": "b"});
    check(PromptTemplate::Chat, task, "<user>a\n\nx<|end|>\n<assistant>|b<|end|>");
}

#[test]
fn a_turn_ends_with_any_of_the_end_tokens() {
    let (tokenizer, chat) = (tokenizer(), chat(CHAT));
    let (x, template) = (u32::from(b'x'), PromptTemplate::Chat);
    let encoded = |end_tokens: &[u32]| {
        let encoder = ExampleEncoder { tokenizer: &tokenizer, chat: Some(&chat), template, end_tokens, max_len: 4096 };
        encode(&encoder, &talk())
    };
    let expected = "<system>s<|end|>\n<user>a<|end|>\n<assistant>|b<|end|>|\n<user>c<|end|>\n<assistant>|d<|end|>";
    assert_eq!(encoded(&[x, END]), [expected]);
    // The template's end is none that the model knows: the content is learned, and the model's own end after the last.
    let expected = "<system>s<|end|>\n<user>a<|end|>\n<assistant>|b|<|end|>\n<user>c<|end|>\n<assistant>|dx";
    assert_eq!(encoded(&[x]), [expected]);
    assert_eq!(encoded(&[]), [expected.strip_suffix('x').unwrap()]);
}

#[test]
fn a_template_that_changes_earlier_messages_gives_an_example_for_each_turn() {
    // As reasoning models do: what the last turn has before its answer is dropped from those before.
    let source = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}(think){% endif %}\
                  {{ m.content | trim }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
    let (tokenizer, chat) = (tokenizer(), chat(source));
    let template = PromptTemplate::Chat;
    let encoder =
        ExampleEncoder { tokenizer: &tokenizer, chat: Some(&chat), template, end_tokens: &[END], max_len: 4096 };
    let expected = [
        "<system>s<|end|>\n<user>a<|end|>\n<assistant>|(think)b<|end|>",
        "<system>s<|end|>\n<user>a<|end|>\n<assistant>b<|end|>\n<user>c<|end|>\n<assistant>|(think)d<|end|>",
    ];
    assert_eq!(encode(&encoder, &talk()), expected);
}

#[test]
fn messages_may_have_parts_of_text() {
    let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
    let line = json!({"messages": [{"role": "user", "content": parts, "name": "Ann"},
                                   {"role": "assistant", "content": "c", "weight": 1, "tool_calls": []}]});
    check(PromptTemplate::Chat, line, "<user>ab<|end|>\n<assistant>|c<|end|>");
}

#[test]
fn text_is_learned_from_its_second_token_on() {
    check(PromptTemplate::Text, json!({"text": "abc"}), "a|bc<|end|>");
    check(PromptTemplate::Text, json!({"prompt": "ab", "response": "c"}), "ab|c<|end|>");
    check(PromptTemplate::Text, json!({"instruction": "a", "output": "c"}), "a\n|c<|end|>");
    check(PromptTemplate::Text, json!({"instruction": "a", "input": "b", "output": "c"}), "a\nb\n|c<|end|>");
}

#[test]
fn long_examples_are_cut_and_long_texts_become_windows() {
    let tokenizer = tokenizer();
    let template = PromptTemplate::Text;
    let encoder = ExampleEncoder { tokenizer: &tokenizer, chat: None, template, end_tokens: &[END], max_len: 3 };
    let pair = |prompt: &str, response: &str| {
        encoder.encode(&Record::PromptResponse { prompt: prompt.into(), response: response.into() }).unwrap()
    };
    assert_eq!(pair("ab", "cd"), Encoded { examples: vec![Example::new(&[97, 98], &[99])], cut: 1 });
    assert_eq!(pair("a", "b"), Encoded { examples: vec![Example::new(&[97], &[98, END])], cut: 0 });
    // Nothing to learn is left: not one that was cut, but one to leave out.
    assert_eq!(pair("abc", "d"), Encoded { examples: vec![Example::new(&[97, 98, 99], &[])], cut: 0 });
    assert_eq!(encode(&encoder, &json!({"text": "abcdef"})), ["a|bc", "c|de", "e|f<|end|>"]);
}

#[test]
fn a_long_text_has_the_tokens_of_its_parts() {
    let tokenizer = tokenizer();
    let template = PromptTemplate::Text;
    let encoder = ExampleEncoder { tokenizer: &tokenizer, chat: None, template, end_tokens: &[], max_len: 1 << 20 };
    let text = "Some words, and more.\nA line. ".repeat(100_000);
    let examples = encoder.encode(&Record::Text(text.clone())).unwrap().examples;
    let mut ids = examples[0].ids.clone();
    examples[1..].iter().for_each(|e| ids.extend(&e.ids[1..]));
    assert_eq!(ids, tokenizer.encode(&text, true).unwrap());
}

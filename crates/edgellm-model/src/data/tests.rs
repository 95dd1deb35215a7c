use serde_json::json;

use super::*;

/// A tokenizer of single bytes with `<end>` as token 256, and a chat template that marks roles.
fn tokenizer() -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    crate::testing::tiny_model_dir(folder.path(), 0).unwrap();
    Tokenizer::open(&folder.path().join("tokenizer.json")).unwrap()
}

const END: u32 = 256;

fn chat() -> ChatTemplate {
    let source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>\n{% endfor %}\
                  {% if add_generation_prompt %}<assistant>{% endif %}";
    ChatTemplate::new(Path::new("t"), source, Default::default()).unwrap()
}

/// Encodes a line; gives the text of the prompt parts and of the targets, with `|` at every change.
fn check(template: PromptTemplate, line: serde_json::Value, expected: &str) {
    let (tokenizer, chat) = (tokenizer(), chat());
    let encoder = ExampleEncoder { tokenizer: &tokenizer, chat: Some(&chat), template, end_token: END, max_len: 4096 };
    let record = parse_record(&line.to_string()).unwrap();
    let example = encoder.encode(&record).unwrap();
    let mut shown = String::new();
    for (position, &id) in example.ids.iter().enumerate() {
        if position > 0 && example.is_target(position) != (position > 1 && example.is_target(position - 1)) {
            shown.push('|');
        }
        shown += &tokenizer.decode(&[id], false).unwrap();
    }
    assert_eq!(shown, expected);
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
    let messages = json!({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]});
    check(PromptTemplate::Alpaca, messages, without);
}

#[test]
fn chat_learns_every_turn_of_the_assistant() {
    let turn = |role: &str, content: &str| json!({"role": role, "content": content});
    let messages =
        json!({"messages": [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]});
    check(
        PromptTemplate::Chat,
        messages,
        "<user>a<|end|>\n<assistant>|b<|end|>|\n<user>c<|end|>\n<assistant>|d<|end|>",
    );
    check(PromptTemplate::Chat, json!({"prompt": "a", "response": "b"}), "<user>a<|end|>\n<assistant>|b<|end|>");
    let task = json!({"instruction": "a", "input": "x", "output": "b"});
    check(PromptTemplate::Chat, task, "<user>a\n\nx<|end|>\n<assistant>|b<|end|>");
}

#[test]
fn text_is_learned_from_its_second_token_on() {
    check(PromptTemplate::Text, json!({"text": "abc"}), "a|bc<|end|>");
    check(PromptTemplate::Text, json!({"prompt": "ab", "response": "c"}), "ab|c<|end|>");
    check(PromptTemplate::Text, json!({"instruction": "a", "output": "c"}), "a\n|c<|end|>");
}

#[test]
fn examples_are_cut() {
    let tokenizer = tokenizer();
    let template = PromptTemplate::Text;
    let encoder = ExampleEncoder { tokenizer: &tokenizer, chat: None, template, end_token: END, max_len: 3 };
    let example = encoder.encode(&Record::PromptResponse { prompt: "ab".into(), response: "cd".into() }).unwrap();
    assert_eq!(example, Example::new(&[97, 98], &[99]));
    assert_eq!(example.n_targets(), 1);
}

fn read(content: &[u8], template: PromptTemplate) -> Result<Vec<Example>> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("d.jsonl");
    std::fs::write(&path, content).unwrap();
    let (tokenizer, chat) = (tokenizer(), chat());
    let encoder = ExampleEncoder { tokenizer: &tokenizer, chat: Some(&chat), template, end_token: END, max_len: 64 };
    read_examples(&path, &encoder)
}

#[test]
fn files_are_read_line_by_line() {
    let content = "\u{feff}{\"text\": \"ab\"}\n\n  {\"text\": \"c\"}\r\n{\"prompt\": \"d\", \"response\": \"e\"}";
    let examples = read(content.as_bytes(), PromptTemplate::Text).unwrap();
    assert_eq!(examples.len(), 3);
    assert_eq!(examples[1].ids, [99, END]);
}

#[test]
fn wrong_lines_are_named() {
    let check = |content: &str, template: PromptTemplate, expected: &str| {
        let error = read(content.as_bytes(), template).unwrap_err().to_string();
        assert!(error.contains(expected), "{error} does not say '{expected}'");
    };
    let text = PromptTemplate::Text;
    check("{\"text\": \"a\"}\n{\"text\": 3}", text, "d.jsonl line 2: expected a text as 'text', found another kind");
    check("{", text, "line 1: expected a JSON object");
    check("[1]", text, "line 1: expected an object with 'instruction'");
    check("{\"a\": 1, \"b\\n\": 2}", text, "found the fields [a, b\\n]");
    check("{\"instruction\": \"a\"}", text, "a text as 'output', found nothing");
    check("{\"messages\": []}", PromptTemplate::Chat, "an empty list");
    check("{\"messages\": [{\"role\": \"user\"}]}", PromptTemplate::Chat, "messages with 'role' and 'content'");
    check(
        "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}",
        PromptTemplate::Chat,
        "a message of the assistant",
    );
    check("{\"text\": \"a\"}", PromptTemplate::Chat, "line 1: expected an instruction, messages");
    check("{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}", text, "found messages");
    check("\n\n", text, "at least one line with an example");
    let long = format!("{{\"prompt\": \"{}\", \"response\": \"b\"}}", "a".repeat(100));
    check(&long, text, "a response within the first 64 tokens");
    let error = read(b"{\"text\": \"\xff\"}", text).unwrap_err().to_string();
    assert!(error.contains("line 1: expected UTF-8, found other bytes at offset 10"), "{error}");
}

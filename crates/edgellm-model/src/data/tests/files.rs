use proptest::prelude::*;

use super::*;

const SKIP: ReadOptions = ReadOptions { format: None, skip_bad_lines: true };
const STRICT: ReadOptions = ReadOptions { format: None, skip_bad_lines: false };

/// The examples of a file of that name, within 64 tokens.
fn read(name: &str, content: &[u8], template: PromptTemplate, options: &ReadOptions) -> Result<Dataset> {
    let (_folder, path) = file(name, content);
    let (tokenizer, chat) = (tokenizer(), chat(CHAT));
    let encoder =
        ExampleEncoder { tokenizer: &tokenizer, chat: Some(&chat), template, end_tokens: &[END], max_len: 64 };
    read_examples(&path, &encoder, options)
}

/// The records of a file of that name.
fn records(name: &str, content: &[u8], options: &ReadOptions) -> Result<(Vec<(usize, Record)>, DataReport)> {
    let (_folder, path) = file(name, content);
    read_records(&path, options)
}

fn text(line: usize, text: &str) -> (usize, Record) {
    (line, Record::Text(text.into()))
}

fn task(line: usize, [instruction, input, output]: [&str; 3]) -> (usize, Record) {
    (line, Record::Instruction { instruction: instruction.into(), input: input.into(), output: output.into() })
}

#[test]
fn json_lines_may_have_a_mark_empty_lines_and_any_line_end() {
    let content = "\u{feff}{\"text\": \"ab\"}\n\n  \r\n{\"text\": \"c\"}\r\n{\"prompt\": \"d\", \"response\": \"e\"}";
    let read = records("d.jsonl", content.as_bytes(), &STRICT).unwrap().0;
    let pair = (5, Record::PromptResponse { prompt: "d".into(), response: "e".into() });
    assert_eq!(read, [text(1, "ab"), text(4, "c"), pair]);
}

#[test]
fn csv_fields_may_hold_commas_line_breaks_and_quotes() {
    let check = |content: &str, expected: &[(usize, Record)]| {
        for content in [content.to_owned(), content.replace('\n', "\r\n")] {
            let read = records("d.csv", content.as_bytes(), &STRICT).unwrap().0;
            // A line break within quotes stays as it is.
            let plain = |s: &String| s.replace("\r\n", "\n");
            let read: Vec<_> = read
                .into_iter()
                .map(|(line, record)| match record {
                    Record::Instruction { instruction, input, output } => {
                        task(line, [&plain(&instruction), &plain(&input), &plain(&output)])
                    }
                    other => (line, other),
                })
                .collect();
            assert_eq!(read, expected, "{content:?}");
        }
    };
    check(
        "instruction,input,output\na,b,c\n\"x, y\",\"one\n\ntwo\",\"say \"\"hi\"\"\"\n\n\n,,\nd,,5\" disk\n",
        &[task(2, ["a", "b", "c"]), task(3, ["x, y", "one\n\ntwo", "say \"hi\""]), task(9, ["d", "", "5\" disk"])],
    );
    // Columns in any order and case, others ignored; no line break at the end.
    check("\u{feff}\n Output ,id,Instruction\nc,7,a", &[task(3, ["a", "", "c"])]);
    check("text\n\"a\"\nb", &[text(2, "a"), text(3, "b")]);
    let messages = r#""[{""role"": ""user"", ""content"": ""a""}]""#;
    let chat = Record::Messages(vec![crate::chat::ChatMessage::new("user", "a")]);
    check(&format!("messages\n{messages}\n"), &[(2, chat)]);
}

#[test]
fn texts_are_one_record_and_become_windows() {
    for name in ["d.txt", "d.md", "D.TXT"] {
        let content = format!("\u{feff}{}\r\nb\n", "a".repeat(80));
        let expected = format!("{}\nb\n", "a".repeat(80));
        assert_eq!(records(name, content.as_bytes(), &STRICT).unwrap().0, [text(1, &expected)]);
        let data = read(name, content.as_bytes(), PromptTemplate::Text, &STRICT).unwrap();
        // 84 tokens with the end: 64, and the last of these with the 20 others.
        assert_eq!(data.examples.iter().map(|e| e.ids.len()).collect::<Vec<_>>(), [64, 21]);
        assert_eq!(data.report, DataReport { examples: 2, ..DataReport::default() });
    }
}

#[test]
fn the_format_is_the_names_or_the_callers() {
    let forced = |format| ReadOptions { format: Some(format), ..STRICT };
    let content = b"{\"text\": \"a\"}";
    assert!(records("d.ndjson", content, &STRICT).is_ok());
    assert_eq!(records("data", content, &forced(DataFormat::Jsonl)).unwrap().0, [text(1, "a")]);
    assert_eq!(records("d.jsonl", b"text\na", &forced(DataFormat::Csv)).unwrap().0, [text(2, "a")]);
    assert_eq!(records("d.csv", b"a", &forced(DataFormat::Text)).unwrap().0, [text(1, "a")]);
    let error = records("d.parquet", content, &STRICT).unwrap_err().to_string();
    assert!(error.contains("d.parquet: data file: expected a name that ends with .jsonl, .csv"), "{error}");
    assert_eq!("csv".parse(), Ok(DataFormat::Csv));
    assert!("xml".parse::<DataFormat>().is_err());
}

/// Name, template, content, what the error says.
type Case = (&'static str, PromptTemplate, Vec<u8>, &'static str);

fn bad_cases() -> Vec<Case> {
    use PromptTemplate::{Chat, Text};
    let jsonl = |template, content: &str, says| ("d.jsonl", template, content.as_bytes().to_vec(), says);
    let csv = |content: &str, says| ("d.csv", Text, content.as_bytes().to_vec(), says);
    let message =
        |fields: &str, says| jsonl(Chat, &format!("{{\"messages\": [{{\"role\": \"user\", {fields}}}]}}"), says);
    vec![
        jsonl(Text, "{\"text\": \"a\"}\n{\"text\": 3}", "d.jsonl line 2: expected a text as 'text', found a number"),
        jsonl(Text, "{", "line 1: expected a JSON object, found EOF"),
        jsonl(
            Text,
            "[1]",
            "line 1: expected an object with 'instruction' and 'output', with 'messages', with 'prompt'",
        ),
        jsonl(Text, "[1]", "found a list"),
        jsonl(Text, "{\"a\": 1, \"b\\n\": 2}", "found the fields [a, b\\n]"),
        jsonl(Text, "{\"instruction\": \"a\"}", "a text as 'output', found nothing"),
        jsonl(Chat, "{\"messages\": {}}", "a list as 'messages', found an object"),
        jsonl(Chat, "{\"messages\": []}", "an empty list"),
        jsonl(Chat, "{\"messages\": [\"a\"]}", "messages with 'role' and 'content', found a text"),
        message("\"a\": 1", "a text as 'content' of message 1, found nothing"),
        message("\"content\": null", "a text as 'content' of message 1, found null"),
        message("\"content\": [{\"type\": \"image_url\"}]", "parts of type 'text' in the content of message 1"),
        message("\"content\": \"a\", \"weight\": 0", "1 as 'weight' of message 1"),
        message("\"content\": \"a\", \"tool_calls\": [1]", "no 'tool_calls' of message 1"),
        message("\"content\": \"a\"", "a message of the assistant"),
        jsonl(
            Chat,
            "{\"text\": \"a\"}",
            "line 1: expected an instruction, messages, or a prompt and a response (texts go",
        ),
        jsonl(Text, "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}", "found messages"),
        jsonl(Text, "\n\n", "at least one line with an example, found none"),
        jsonl(Text, "\u{feff}", "at least one line with an example, found none"),
        ("d.jsonl", Text, b"{\"text\": \"\xff\"}".to_vec(), "line 1: expected UTF-8, found other bytes at offset 10"),
        csv("", "at least one line with an example, found none"),
        csv("\n\n", "at least one line with an example, found none"),
        csv("text\n\n", "at least one line with an example, found none"),
        csv("\nquestion;answer\na;b\n", "d.csv line 2: expected a header row with the columns 'instruction' and"),
        csv("question;answer\na;b\n", "found the columns [question;answer]"),
        csv("instruction,input\na,b\n", "found the columns [instruction, input]"),
        csv("text,text\na,b\n", "line 1: expected every column once, found 'text' more than once"),
        csv("prompt,response\na,\"b\nc\"\nd\n", "d.csv line 4: expected 2 fields, as in the header, found 1"),
        csv("prompt,response\na,b,c\n", "line 2: expected 2 fields, as in the header, found 3"),
        csv("text\na\n\"b\nc\nd\n", "d.csv line 3: expected a quote that ends the field, found the end of the file"),
        csv("messages\n[\n", "line 2: expected a JSON list as 'messages', found EOF"),
        ("d.csv", Text, b"text\na\n\xff\n".to_vec(), "line 3: expected UTF-8, found other bytes as 'text'"),
        ("d.txt", Text, b"a\nb\xff\n".to_vec(), "d.txt line 2: expected UTF-8, found other bytes at offset 1"),
        ("d.txt", Text, b" \n".to_vec(), "at least one line with an example, found none"),
        ("d.txt", Chat, b"a b".to_vec(), "line 1: expected an instruction, messages"),
    ]
}

#[test]
fn wrong_lines_are_named() {
    for (name, template, content, expected) in bad_cases() {
        let error = read(name, &content, template, &STRICT).unwrap_err().to_string();
        assert!(error.contains(expected), "{error} does not say '{expected}'");
    }
}

#[test]
fn bad_lines_are_passed_over_and_counted() {
    let check = |name: &str, content: &[u8], expected: &str| {
        let data = read(name, content, PromptTemplate::Text, &SKIP).unwrap();
        assert_eq!(data.report.to_string(), expected);
        assert_eq!(data.report.examples, data.examples.len());
        assert!(data.examples.iter().all(|e| e.n_targets() > 0));
        assert!(read(name, content, PromptTemplate::Text, &STRICT).is_err());
    };
    check(
        "d.jsonl",
        b"{\"text\": \"a\"}\n{\n{\"text\": 1}\n\n{\"text\": \"\xff\"}\n}\n{\"text\": \"b\"}\n{\"messages\": [{\"role\": \"x\", \"content\": \"\"}]}",
        "2 examples (5 skipped: 2 not JSON (lines 2, 6), 1 without the fields of an example (line 3), 1 not UTF-8 (line \
         5), 1 not fit for the template (line 8))",
    );
    check(
        "d.csv",
        b"prompt,response\na,b\na\n\"c\nc\",\xff\nd,e,f\ng,h\n",
        "2 examples (3 skipped: 2 without the fields of an example (lines 3, 6), 1 not UTF-8 (line 4))",
    );
    check("d.txt", b"a\n\xff\xff\nb\n", "1 example (1 skipped: 1 not UTF-8 (line 2))");
    // A header, or a quote that never ends, is no matter of a line.
    assert!(records("d.csv", b"question\na\n", &SKIP).is_err());
    assert!(records("d.csv", b"text\na\n\"b\n", &SKIP).is_err());
    let nothing = records("d.jsonl", b"{\n[]\n", &SKIP).unwrap_err().to_string();
    assert!(nothing.contains("found none: 1 not JSON (line 1): expected a JSON object, found EOF"), "{nothing}");
}

#[test]
fn examples_without_a_response_are_left_out_and_counted() {
    let long =
        |n: usize, response: &str| format!("{{\"prompt\": \"{}\", \"response\": \"{response}\"}}\n", "a".repeat(n));
    let content = long(10, "b") + &long(100, "b") + &long(64, "b") + &long(60, "bbbbbb");
    let data = read("d.jsonl", content.as_bytes(), PromptTemplate::Text, &STRICT).unwrap();
    assert_eq!(data.examples.iter().map(|e| e.ids.len()).collect::<Vec<_>>(), [12, 64]);
    let expected =
        "2 examples (2 skipped: 2 without a response within the length limit (lines 2, 3); 1 cut at the length limit)";
    assert_eq!(data.report.to_string(), expected);
    let error = read("d.jsonl", long(100, "b").as_bytes(), PromptTemplate::Text, &STRICT).unwrap_err().to_string();
    assert!(error.contains("a response within the first 64 tokens of some example, found none"), "{error}");
}

#[test]
fn endless_lines_are_refused_or_passed_over() {
    let endless = "a".repeat(50 << 20);
    let jsonl = format!("{{\"text\": \"a\"}}\n{endless}\n{{\"text\": \"b\"}}\n");
    let error = records("d.jsonl", jsonl.as_bytes(), &STRICT).unwrap_err().to_string();
    assert!(error.contains("d.jsonl line 2: expected at most 16777216 bytes"), "{error}");
    let (read, report) = records("d.jsonl", jsonl.as_bytes(), &SKIP).unwrap();
    assert_eq!(
        (read, report.to_string()),
        (vec![text(1, "a"), text(3, "b")], "0 examples (1 skipped: 1 too long (line 2))".into())
    );
    let csv = format!("text\na\n\"{endless}\n\"\nb\n");
    let error = records("d.csv", csv.as_bytes(), &STRICT).unwrap_err().to_string();
    assert!(error.contains("d.csv line 3: expected at most 16777216 bytes"), "{error}");
    assert_eq!(records("d.csv", csv.as_bytes(), &SKIP).unwrap().0, [text(2, "a"), text(5, "b")]);
    // A text may be one line.
    assert_eq!(records("d.txt", endless.as_bytes(), &STRICT).unwrap().0, [text(1, &endless)]);
}

/// Reads anything in every format and both ways; what comes out must be within the file.
fn read_anything(content: &[u8]) {
    let lines = content.iter().filter(|b| matches!(b, b'\n' | b'\r')).count() + 1;
    for format in [DataFormat::Jsonl, DataFormat::Csv, DataFormat::Text] {
        let options = |skip_bad_lines| ReadOptions { format: Some(format), skip_bad_lines };
        let strict = records("d", content, &options(false));
        if let Ok((records, report)) = records("d", content, &options(true)) {
            assert!(records.iter().all(|(line, _)| (1..=lines).contains(line)), "{format:?} {content:?}");
            assert!(records.is_sorted_by(|a, b| a.0 < b.0), "{format:?} {content:?}");
            assert!(report.skipped.iter().flat_map(|s| &s.lines).all(|line| (1..=lines).contains(line)));
            // Without a bad line, both ways agree; with one, only passing over gives records.
            match strict {
                Ok((all, none)) => assert!(all == records && none.n_skipped() == 0 && report.n_skipped() == 0),
                Err(_) => assert!(report.n_skipped() > 0, "{format:?} {content:?}"),
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_are_read_or_refused(content in prop::collection::vec(any::<u8>(), 0..200)) {
        read_anything(&content);
    }

    /// Pieces of which good and bad files are made.
    #[test]
    fn any_pieces_are_read_or_refused(
        pieces in prop::collection::vec(
            prop::sample::select(vec![
                "\u{feff}", "text", "prompt,response", "messages", "\n", "\r\n", "\r", "\n\n", ",", "\"", "\"\"", "a", "ö",
                "{\"text\": \"a\"}", "{\"text\": ", "[", "{", "}", "\\u", "{\"messages\": [{\"role\": \"user\"}]}",
            ]),
            0..24,
        ),
        broken in prop::option::of((any::<prop::sample::Index>(), any::<u8>())),
    ) {
        let mut content = pieces.concat().into_bytes();
        if let Some((at, byte)) = broken.filter(|_| !content.is_empty()) {
            let at = at.index(content.len());
            content[at] = byte;
        }
        read_anything(&content);
    }

    /// What a CSV writer writes comes back, at the lines where it was written.
    #[test]
    fn csv_comes_back(rows in prop::collection::vec(("[a-c\", \n\r]{1,8}[a-z]", "[a-c\", \n]{0,8}"), 1..8), crlf: bool) {
        let (end, mut line) = (if crlf { "\r\n" } else { "\n" }, 2);
        let mut content = format!("prompt,response{end}");
        let mut expected = Vec::new();
        for (prompt, response) in rows {
            let row = [&prompt, &response].map(|t| format!("\"{}\"", t.replace('"', "\"\""))).join(",") + end;
            content += &row;
            expected.push((line, Record::PromptResponse { prompt, response }));
            line += row.replace("\r\n", "\n").matches(['\n', '\r']).count();
        }
        prop_assert_eq!(records("d.csv", content.as_bytes(), &STRICT).unwrap().0, expected);
    }
}

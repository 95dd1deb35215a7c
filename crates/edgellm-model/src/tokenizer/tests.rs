use super::*;

fn byte_tokenizer() -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    crate::testing::tiny_model_dir(folder.path(), 0).unwrap();
    Tokenizer::open(&folder.path().join("tokenizer.json")).unwrap()
}

#[test]
fn text_goes_there_and_back() {
    let tokenizer = byte_tokenizer();
    let text = "naïve 🙂\n\t<|end|>";
    let ids = tokenizer.encode(text, false).unwrap();
    assert_eq!(ids.last(), Some(&256));
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "naïve 🙂\n\t");
    let again = Tokenizer::from_json(Path::new("t"), &tokenizer.to_json().unwrap()).unwrap();
    assert_eq!(again.encode(text, false).unwrap(), ids);
    assert_eq!(tokenizer.decode(&[1_000_000], false).unwrap(), "");
}

#[test]
fn a_stream_never_gives_half_a_character() {
    let tokenizer = byte_tokenizer();
    let text = "a🙂é漢 \u{fffd}b";
    let mut stream = tokenizer.stream(true);
    let mut pieces = Vec::new();
    for byte in text.bytes() {
        pieces.push(stream.push(u32::from(byte)).unwrap());
    }
    assert_eq!(pieces.concat() + &stream.finish().unwrap(), text);
    assert_eq!(pieces[..5], ["a", "", "", "", "🙂"]);
    assert_eq!(pieces[5..7], ["", "é"]);
}

#[test]
fn a_stream_gives_broken_bytes_at_last() {
    let tokenizer = byte_tokenizer();
    let mut stream = tokenizer.stream(true);
    let mut text = String::new();
    for id in [0x61, 0xf0, 0x9f] {
        text += &stream.push(id).unwrap();
    }
    assert_eq!(text, "a");
    text += &stream.push(0x62).unwrap();
    assert_eq!(text, "a\u{fffd}b", "what cannot become a character is replaced once it is clear");
    let mut stream = tokenizer.stream(true);
    for id in [0x61, 0xf0, 0x9f] {
        stream.push(id).unwrap();
    }
    assert_eq!(stream.finish().unwrap(), "\u{fffd}");
    let mut stream = tokenizer.stream(true);
    let given: String = (0..100).map(|_| stream.push(0xff).unwrap()).collect();
    assert!(given.chars().count() > 80, "a stream of broken bytes is not held back for ever");
}

#[test]
fn a_stream_leaves_special_tokens_out() {
    let tokenizer = byte_tokenizer();
    let mut stream = tokenizer.stream(true);
    let given: Vec<String> = [97, 256, 98].into_iter().map(|id| stream.push(id).unwrap()).collect();
    assert_eq!(given, ["a", "", "b"]);
}

#[test]
fn contradictions_are_errors() {
    let mut json: serde_json::Value = serde_json::from_str(&byte_tokenizer().to_json().unwrap()).unwrap();
    // Longer than every token, which the library does not expect.
    json["model"]["merges"] = serde_json::json!([["a", "b"]]);
    let error = Tokenizer::from_json(Path::new("tokenizer.json"), &json.to_string()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json: expected a tokenizer, found"), "{error}");
}
